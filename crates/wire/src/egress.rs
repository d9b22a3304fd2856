//! The inside half of the guarded way out, and what it says to the outside half. Neither trusts the other; the decision is the control plane's.
//!
//! Where [`Init::egress`](crate::link::Init) says so, the guest is an HTTP proxy on the container's loopback ([`PROXY_PORT`]). Each connection that is asked of it is
//! announced as an [`Event::Egress`](crate::link::Event::Egress), and waits for one of these:
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /egress/{id}` | what goes into the cell, as a [`tunnel`](crate::tunnel) | what comes out of it, likewise |
//! | `DELETE /egress/{id}` | [`EgressRefused`] | `{}` |
//!
//! An id that was not decided about within [`EXPIRES`] is forgotten; there are at most [`MAX_WAITING`] of them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where the guest listens on 127.0.0.1.
pub const PROXY_PORT: u16 = 3128;
/// What is announced is decided about within this time, dialling included.
pub const EXPIRES: Duration = Duration::from_secs(45);
/// Connections that may wait for a decision at once.
pub const MAX_WAITING: usize = 64;
/// Longest name of a host that is announced, in bytes; longer ones exist nowhere.
pub const MAX_HOST: usize = 255;

/// The variables that name the proxy, for programs that ask their environment.
pub const PROXY_VARIABLES: [&str; 6] =
    ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
/// The variables that say what is not behind the proxy.
pub const NO_PROXY_VARIABLES: [&str; 2] = ["NO_PROXY", "no_proxy"];
/// Their value.
pub const NO_PROXY: &str = "localhost,127.0.0.1,::1";

/// A connection is not opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressRefused {
    /// The HTTP status that the proxy answers with: 403, 429, 502, 503 or 504.
    pub status: u16,
    /// A sentence for whoever wrote the code, in ASCII.
    pub reason: String,
}
