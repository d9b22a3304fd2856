//! The link's requests for connections to what code in a cell listens on. What is spoken on them is hostile, and not looked at here.

use std::time::Duration;

use cellblock_wire::tunnel::Tunnel;
use hyper::Method;
use hyper::body::Incoming;

use super::link::{Asked, Link, LinkError};

/// The guest itself gives a connection up some time before.
const CONNECT: Duration = Duration::from_secs(15);

impl Link {
    /// Connects to a port of the cell's loopback.
    ///
    /// # Errors
    /// A refusal with a code of [`cellblock_wire::ports`], or as every request: see [`LinkError`].
    pub async fn port(&self, port: u16) -> Result<Tunnel<Incoming>, LinkError> {
        let path = format!("/ports/{port}");
        self.tunnel(Asked { attempt: "connect to a port", method: Method::POST, path: &path, within: Some(CONNECT) })
            .await
    }
}
