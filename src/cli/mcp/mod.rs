//! `cellblock mcp`: for clients of the Model Context Protocol that only start programs, and for people who set clients up.

use std::sync::Arc;

use super::args::{McpArgs, McpCommand};
use super::client::Client;
use super::problem::Failure;
use super::render::OK;
use crate::config::Environment;

mod bridge;
mod install;
mod remote;

pub use bridge::{Door, Reply, bridge};

/// What `mcp` comes to here; nothing where it needs a control plane of its own, because no server is named.
///
/// # Errors
/// The server can't be found, or a client can't be set up.
pub(super) async fn perform(args: &McpArgs, environment: &Environment) -> Option<Result<u8, Failure>> {
    match &args.command {
        Some(McpCommand::Install(install)) => Some(install::perform(install, environment)),
        None if !args.stdio => {
            let usage = "say --stdio to serve a client on standard input and output, or `install CLIENT` to set one up";
            Some(Err(Failure::Usage(usage.to_owned())))
        }
        None if is_embedded(args, environment) => None,
        None => Some(over_stdio(args, environment).await),
    }
}

/// Whether no server is named, so that one has to live in this program.
#[must_use]
pub fn is_embedded(args: &McpArgs, environment: &Environment) -> bool {
    args.server.url.is_none() && environment.get("CELLBLOCK_URL").is_none()
}

async fn over_stdio(args: &McpArgs, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, environment)?;
    bridge(Arc::new(client)).await?;
    Ok(OK)
}
