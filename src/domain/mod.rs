//! The words and rules of the product: ids, what may be asked for, the life of a session, the outcome of an execution.
//!
//! Pure values. No tokio, no serde, no clock, no I/O: everything here can be tested by calling it.

pub mod access;
pub mod data;
pub mod egress;
pub mod execution;
pub mod ids;
pub mod lifecycle;
pub mod lock;
pub mod output;
pub mod packages;
pub mod ports;
pub mod quota;
pub mod spec;
pub mod workspace;
