//! `process.Process`: commands and terminals, by RPC.

use axum::Router;
use axum::routing::post;

use super::super::error::Refusal;
use super::super::sandbox::ForRpc;
use crate::http::App;

/// Its methods.
const METHODS: [&str; 8] =
    ["Start", "Connect", "List", "SendInput", "StreamInput", "CloseStdin", "SendSignal", "Update"];

pub(super) fn routes() -> Router<App> {
    METHODS
        .iter()
        .fold(Router::new(), |router, method| router.route(&format!("/process.Process/{method}"), post(unbuilt)))
}

async fn unbuilt(_: ForRpc) -> Refusal {
    Refusal::of_rpc(Refusal::unbuilt("process.Process"))
}
