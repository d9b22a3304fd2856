//! Cellblock: a control plane that gives every session its own locked container with a real Jupyter kernel in it.
//!
//! Layers, each may use only those below: `app` → `http` → `service` → `session` → `engine`, `kernel`, `store` → `domain`.
//! `docs/ARCHITECTURE.md` says why.

pub mod app;
pub mod cli;
pub mod config;
pub mod connect;
pub mod doctor;
pub mod domain;
pub mod egress;
pub mod engine;
pub mod http;
pub mod json;
pub mod kernel;
pub mod metrics;
pub mod places;
pub mod run;
pub mod service;
pub mod session;
pub mod store;
pub mod task;
pub mod traces;
pub mod tuning;
