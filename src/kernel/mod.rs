//! The way to a kernel: the link to a cell's guest, and the Jupyter messages that travel over it.
//!
//! Everything that arrives here was written by somebody hostile. Nothing in it chooses a path, a name or the size of an
//! allocation; what can't be understood is dropped and counted.

pub mod client;
pub mod commands;
pub mod egress;
pub mod files;
pub mod link;
pub mod ports;
pub mod protocol;
