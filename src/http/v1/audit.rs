//! The audit over HTTP. Keys need the scope "admin".

use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::ids::SessionId;
use crate::domain::spec::FieldError;
use crate::http::App;
use crate::http::extract::{Answer, Caller, Params};
use crate::http::problem::{self, Problem};
use crate::service::audit::{AuditEvent, AuditFound, AuditQuery};

/// Events of a page: without a limit, and at most.
const PAGE: (usize, usize) = (100, 1000);

/// Some events.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditPage {
    /// The oldest first.
    events: Vec<AuditView>,
    /// Where to go on; nothing if there are no more by now.
    next_cursor: Option<String>,
}

/// Something that was asked for, or has happened.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditView {
    /// When it was answered, or given up.
    at: String,
    /// Whose key it was; nothing for a key that is not valid.
    tenant: Option<String>,
    /// Which key it was, where that is known.
    key: Option<String>,
    /// Where the request came from.
    address: Option<String>,
    /// The request's id, as in the log; nothing where there was no request.
    request_id: Option<String>,
    /// The operation, as `operationId` in this document; `refuse_key` for a request whose key is not valid, `leave_out_refused` for those refused beyond what is told of one
    /// by one, `end_session` for the end of a session that nobody has asked for.
    action: String,
    /// The path of what was asked for, or, where something was made, of that.
    target: String,
    /// The session that it was about.
    session_id: Option<String>,
    /// The context.
    context_id: Option<String>,
    /// The execution.
    execution_id: Option<String>,
    /// Bytes of code that was sent.
    code_bytes: Option<usize>,
    /// SHA-256 of that code, in hexadecimal digits.
    code_sha256: Option<String>,
    /// The code itself, where the server records it.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<String>,
    /// The status of the answer; nothing if the caller left before it.
    status: Option<u16>,
    /// `ok`, the code of the problem, or `unanswered`; for the end of a session its reason; `refused`.
    outcome: String,
    /// How many requests it stands for, where that is not one.
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
}

impl From<AuditEvent> for AuditView {
    fn from(event: AuditEvent) -> Self {
        Self {
            at: format!("{:.3}", event.at),
            tenant: event.tenant,
            key: event.key,
            address: event.address.map(|address| address.to_string()),
            request_id: Some(event.request).filter(|id| !id.is_empty()),
            action: event.action,
            target: event.target,
            session_id: event.session,
            context_id: event.context,
            execution_id: event.execution,
            code_bytes: event.code_bytes,
            code_sha256: event.code_sha256,
            code: event.code,
            status: event.status,
            outcome: event.outcome,
            count: event.count,
        }
    }
}

/// List audit events
///
/// Of all tenants, the oldest first: what was asked of the server that changes something, by whom, and what came of it. Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/audit", operation_id = "list_audit", tag = "admin",
    params(("tenant" = Option<String>, Query), ("session" = Option<String>, Query, description = "The id of a session"),
        ("action" = Option<String>, Query, description = "Such as `create_execution`"),
        ("since" = Option<String>, Query, description = "Not before, as RFC 3339 has it"),
        ("until" = Option<String>, Query, description = "Before"),
        ("limit" = Option<usize>, Query, description = "1 to 1000; 100 when absent. A page has fewer where they are long"),
        ("cursor" = Option<String>, Query, description = "From `next_cursor`")),
    responses((status = 200, body = AuditPage), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn list_audit(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
) -> Result<Answer<AuditPage>, Problem> {
    let params = params.only(&["tenant", "session", "action", "since", "until", "limit", "cursor"])?;
    let limit = params.parse::<usize>("limit", "1 to 1000")?.unwrap_or(PAGE.0);
    if limit == 0 || limit > PAGE.1 {
        return Err(wrong("limit", "allowed is 1 to 1000"));
    }
    let time = "a time such as 2030-01-31T12:00:00Z";
    let query = AuditQuery {
        tenant: params.get("tenant").map(str::to_owned),
        session: params.parse::<SessionId>("session", "the id of a session")?,
        action: params.get("action").map(str::to_owned),
        since: params.parse::<Timestamp>("since", time)?,
        until: params.parse::<Timestamp>("until", time)?,
        after: params.get("cursor").map(read_cursor).transpose()?.unwrap_or(0),
        limit,
    };
    let AuditFound { events, has_more } = app.service.list_audit(&who, query).await?;
    let next_cursor = events.last().filter(|_| has_more).map(|(number, _)| cursor(*number));
    Ok(Answer(AuditPage { events: events.into_iter().map(|(_, event)| event.into()).collect(), next_cursor }))
}

fn cursor(number: i64) -> String {
    URL_SAFE_NO_PAD.encode(number.to_be_bytes())
}

fn read_cursor(text: &str) -> Result<i64, Problem> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
    bytes.map(i64::from_be_bytes).ok_or_else(|| wrong("cursor", "allowed is a value of next_cursor"))
}

fn wrong(name: &str, allowed: &str) -> Problem {
    Problem::new(problem::INVALID_REQUEST, "a query parameter is not understood")
        .with_fields(vec![FieldError::new(format!("?{name}"), allowed)])
}
