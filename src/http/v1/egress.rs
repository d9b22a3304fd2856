//! What a session's way out has done, over HTTP. The audit has the same for operators, and for longer.

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::sessions::{NetworkView, time};
use crate::domain::ids::SessionId;
use crate::http::App;
use crate::http::extract::{Answer, Caller, Id, Params};
use crate::http::problem::Problem;
use crate::session::Decision;

/// A session's way out.
#[derive(Debug, Serialize, ToSchema)]
pub struct EgressView {
    /// What may be reached now.
    network: NetworkView,
    /// Servers that code asks as `http://NAME.upstream/`, in plain HTTP, while the mode is `allowlist`; a secret that it does not see is added to what it asks.
    upstreams: Vec<String>,
    /// Connections that are open.
    open: usize,
    /// Connections that were made since the server began.
    made: u64,
    /// Connections that were refused since then.
    refused: u64,
    /// Bytes that code has sent out since then.
    sent_bytes: u64,
    /// Bytes that came in since then.
    received_bytes: u64,
    /// The latest decisions, at most 200, the newest last.
    decisions: Vec<DecisionView>,
}

/// A decision about a connection that code asked for.
#[derive(Debug, Serialize, ToSchema)]
pub struct DecisionView {
    /// When.
    at: String,
    /// The host.
    host: String,
    /// The port.
    port: u16,
    /// The address that was dialled, or that is to blame; nothing where none is known.
    address: Option<String>,
    /// Whether the connection was made.
    allowed: bool,
    /// Why it was not: `closed`, `no-host`, `not-allowed`, `not-public`, `denied`, `not-resolved`, `unreachable`, `too-many-connections`, `too-fast`,
    /// `too-many-bytes` or `full`; more may come.
    reason: Option<&'static str>,
    /// The same as a sentence, which the code was told too.
    detail: Option<String>,
    /// How it has ended: `done`, `broken`, `idle`, `too-many-bytes`, `cut`, or `wrong-name` where TLS was begun with a server of another name; nothing
    /// while it is open.
    ended: Option<&'static str>,
    /// Bytes that it has sent out, once it has ended.
    sent_bytes: u64,
    /// Bytes that it has brought in, once it has ended.
    received_bytes: u64,
}

impl From<Decision> for DecisionView {
    fn from(decision: Decision) -> Self {
        Self {
            at: time(decision.at),
            host: decision.host,
            port: decision.port,
            address: decision.address.map(|address| address.to_string()),
            allowed: decision.refusal.is_none(),
            reason: decision.refusal.as_ref().map(crate::session::Refusal::word),
            detail: decision.refusal.as_ref().map(ToString::to_string),
            ended: decision.ended,
            sent_bytes: decision.sent,
            received_bytes: decision.received,
        }
    }
}

/// Look at a session's way out
///
/// What its code has asked to be connected to lately, and what was decided.
#[utoipa::path(get, path = "/v1/sessions/{id}/egress", operation_id = "get_session_egress", tag = "sessions",
    params(("id" = String, Path)), responses((status = 200, body = EgressView), (status = "4XX", body = Problem)))]
pub async fn get_session_egress(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
) -> Result<Answer<EgressView>, Problem> {
    params.only(&[])?;
    let (network, seen) = app.service.session_egress(&who, id)?;
    Ok(Answer(EgressView {
        network: NetworkView::from(&network),
        upstreams: seen.upstreams,
        open: seen.open,
        made: seen.made,
        refused: seen.refused,
        sent_bytes: seen.sent,
        received_bytes: seen.received,
        decisions: seen.decisions.into_iter().map(DecisionView::from).collect(),
    }))
}
