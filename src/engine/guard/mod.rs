//! The guard: a process that holds the engine and serves it to a control plane, which then holds no engine.
//!
//! ```text
//! control plane ──GuardEngine──▶ unix socket ──▶ guard ──DockerEngine──▶ engine
//! ```
//!
//! What crosses the socket are the calls of [`Engine`](super::Engine) as typed messages (`protocol`), never a request to an engine. The guard builds those
//! itself, from what its own configuration permits (`policy`), and so it confines whoever has taken over the process that faces callers to what that one
//! could have asked for anyway: locked cells of one instance, of listed images, within ceilings.
//!
//! One connection is one call: the request, the answer, and for a cell's stream or a watch what follows it.

mod client;
mod policy;
mod protocol;
mod server;

pub use client::GuardEngine;
pub use policy::{Permitted, Policy, WorkspaceQuota};
pub use server::{BindError, Guard, Needs, bind};
