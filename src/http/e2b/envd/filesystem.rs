//! `filesystem.Filesystem`: looking at files, folders and what changes in them, and moving and removing them, by RPC.

use axum::Router;
use axum::routing::post;

use super::super::error::Refusal;
use super::super::sandbox::ForRpc;
use crate::http::App;

/// Its methods.
const METHODS: [&str; 9] =
    ["Stat", "ListDir", "MakeDir", "Move", "Remove", "WatchDir", "CreateWatcher", "GetWatcherEvents", "RemoveWatcher"];

pub(super) fn routes() -> Router<App> {
    METHODS
        .iter()
        .fold(Router::new(), |router, method| router.route(&format!("/filesystem.Filesystem/{method}"), post(unbuilt)))
}

async fn unbuilt(_: ForRpc) -> Refusal {
    Refusal::of_rpc(Refusal::unbuilt("filesystem.Filesystem"))
}
