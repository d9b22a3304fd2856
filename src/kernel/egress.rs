//! What the control plane says to a guest about a connection that it has announced: a byte stream, or a refusal. Decides nothing.

use std::time::Duration;

use cellblock_wire::egress::EgressRefused;
use cellblock_wire::tunnel::Tunnel;
use hyper::Method;
use hyper::body::Incoming;

use super::link::{Asked, Link, LinkError};

/// The guest takes an open connection within this time; nobody waits for it any more otherwise.
const TAKE: Duration = Duration::from_secs(10);

impl Link {
    /// Opens the byte stream of an announced connection.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn open_egress(&self, id: u64) -> Result<Tunnel<Incoming>, LinkError> {
        let path = format!("/egress/{id}");
        self.tunnel(Asked { attempt: "take a connection", method: Method::POST, path: &path, within: Some(TAKE) }).await
    }

    /// Refuses an announced connection.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn refuse_egress(&self, id: u64, refused: &EgressRefused) -> Result<(), LinkError> {
        let path = format!("/egress/{id}");
        self.ask::<serde_json::Value>("hear why a connection is not made", Method::DELETE, &path, refused)
            .await
            .map(drop)
    }
}
