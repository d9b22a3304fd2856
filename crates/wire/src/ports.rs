//! Connections to what code in a cell listens on.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /ports/{port}` | a [`tunnel`](crate::tunnel) | the other half of it, once the connection is there |
//!
//! The connection goes to the container's own loopback and nowhere else: the request has no field for an address.

/// The code of a refusal: nothing listens on that port.
pub const PORT_CLOSED: &str = "port-closed";
/// The code of a refusal: something listens, and does not take the connection.
pub const PORT_STUCK: &str = "port-stuck";
