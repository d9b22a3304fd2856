//! The guest: PID 1 of a session's container. Starts kernels and relays their messages over the container's own stdin and stdout.
//!
//! A library only so that tests and fuzzers reach the decoders; `main.rs` is the program.
//!
//! ```text
//! stdin/stdout ─ link ─ api ─┬─ files, report, cgroup
//!                            ├─ command ─ launch, live, log, tty
//!                            ├─ egress ─ events
//!                            ├─ events ◀────────┐
//!                            └─ kernel ─ launch, live ─ channels ─ zmtp ─ message ─ relay ─ cap
//!                                               └─ effects ─ tree, changes ─ files
//! trial ─ report, cgroup
//! ```

pub mod api;
pub mod cap;
pub mod capture;
pub mod cgroup;
pub mod changes;
pub mod command;
pub mod effects;
pub mod egress;
pub mod events;
pub mod files;
pub mod json;
pub mod kernel;
pub mod link;
pub mod message;
pub mod names;
pub mod ports;
pub mod reap;
pub mod report;
pub mod trial;
pub mod zmtp;
