//! `cellblock mcp --stdio` without a server: a control plane inside the command, asked over its own router, without a port. Its sessions end with it.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};

use super::{INSTANCE, RunError, told_to_stop};
use crate::app::{Plane, front};
use crate::cli::mcp::{Door, Reply, bridge};
use crate::cli::{self, Failure};
use crate::config::Config;
use crate::http::local::Local;
use crate::service::keys::{self, ConfiguredKey, Principal, Scope};

/// The way to a control plane in this process.
struct Own {
    local: Local,
    key: String,
}

impl Door for Own {
    fn post(&self, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> BoxFuture<'static, Result<Reply, String>> {
        let (local, key) = (self.local.clone(), format!("Bearer {}", self.key));
        async move {
            let answer = local.post("/mcp", headers.into_iter().chain([("authorization", key)]), body).await?;
            let header = |name| answer.header(name).map(str::to_owned);
            let (session, kind) = (header("mcp-session-id"), header("content-type").unwrap_or_default());
            Ok(Reply { status: answer.status(), session, kind, body: answer.body().boxed() })
        }
        .boxed()
    }
}

/// Serves a client on standard input and output until it closes its side, and gives the exit status. No session is left.
///
/// # Errors
/// See [`RunError`].
pub async fn serve(mut config: Config) -> Result<u8, RunError> {
    INSTANCE.clone_into(&mut config.engine.instance);
    config.doors.mcp = true;
    config.doors.mcp_hosts.clear();
    let plane = Plane::start(&config, false).await?;
    let served = match own(&config, &plane) {
        Ok(own) => tokio::select! {
            served = bridge(Arc::new(own)) => served.map(|()| cli::OK),
            () = told_to_stop() => Ok(cli::OK),
        },
        Err(error) => Err(error),
    };
    let left = plane.stop(std::future::ready(())).await;
    if left > 0 {
        eprintln!("cellblock: {left} containers could not be removed; `make clean-containers` does it");
    }
    Ok(served.unwrap_or_else(|failure| cli::complain(&failure)))
}

/// The door of this process, with a key that nobody else has.
fn own(config: &Config, plane: &Plane) -> Result<Own, Failure> {
    let failed = |what: &str| Failure::Usage(format!("no key can be made: {what}"));
    let key = keys::generate().map_err(|error| failed(&error.to_string()))?;
    let hash = keys::hash(&key).ok_or_else(|| failed("it is none"))?;
    let principal = Principal::new(INSTANCE, [Scope::Sessions]);
    let configured = ConfiguredKey { hash, name: INSTANCE.to_owned(), principal, expires_at: None };
    plane.keys.add(configured).map_err(|error| failed(&error.to_string()))?;
    Ok(Own { local: Local::new(front::app(config, plane)), key })
}
