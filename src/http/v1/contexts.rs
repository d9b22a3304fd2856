//! Contexts over HTTP: the kernels of a session, and questions to them.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::executions::{self, ExecutionView, OnDisconnect, raw};
use super::sessions::{First, SessionView, begin, time};
use crate::domain::ids::{ContextId, SessionId};
use crate::domain::output::{Comm, CommKind, JsonText};
use crate::domain::spec::FieldError;
use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Id, Ids, Keyed};
use crate::http::problem::{self, Problem};
use crate::service::{ContextRequest, Error, ExecuteRequest, Question};
use crate::session::once::Made;
use crate::session::{self, ContextState};

/// What a context is to be; everything is optional.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateContext {
    /// One of the image's kernelspecs; that of the session when absent.
    kernelspec: Option<String>,
    /// Instead of it, a language that one of them runs: `python`, `bash`, `r`, `typescript`, `javascript`, as the image has them.
    language: Option<String>,
    /// Working folder of its kernel; the session's when absent.
    cwd: Option<String>,
}

/// A context: a kernel with its own variables and its own queue.
#[derive(Debug, Serialize, ToSchema)]
pub struct ContextView {
    /// Its id.
    id: String,
    /// `starting`, `ready` or `busy`; more may come.
    state: &'static str,
    /// Its kernel's language.
    language: String,
    /// The image's kernelspec.
    kernelspec: String,
    /// Whether executions run here that name no context.
    is_default: bool,
    /// The folder in which its kernel starts.
    cwd: String,
    /// Executions that wait for their turn.
    queued: usize,
    /// When it was created.
    created_at: String,
}

/// A session's contexts.
#[derive(Debug, Serialize, ToSchema)]
pub struct ContextList {
    /// In the order of their creation.
    contexts: Vec<ContextView>,
}

impl From<session::ContextView> for ContextView {
    fn from(view: session::ContextView) -> Self {
        Self {
            id: view.id.to_string(),
            state: match view.state {
                ContextState::Starting => "starting",
                ContextState::Ready => "ready",
                ContextState::Busy => "busy",
            },
            language: view.language,
            kernelspec: view.kernelspec,
            is_default: view.is_default,
            cwd: view.cwd,
            queued: view.queued,
            created_at: time(view.created_at),
        }
    }
}

/// List a session's contexts
#[utoipa::path(get, path = "/v1/sessions/{id}/contexts", operation_id = "list_contexts", tag = "contexts", params(("id" = String, Path)),
    responses((status = 200, body = ContextList), (status = "4XX", body = Problem)))]
pub async fn list_contexts(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<ContextList>, Problem> {
    let contexts = app.service.contexts(&who, id).await?.into_iter().map(ContextView::from).collect();
    Ok(Answer(ContextList { contexts }))
}

/// Add a context
///
/// Another kernel in the same container, with variables and a queue of its own; the session's limits hold for all of them together.
/// Answers once it is ready.
#[utoipa::path(post, path = "/v1/sessions/{id}/contexts", operation_id = "create_context", tag = "contexts",
    params(("id" = String, Path), ("Idempotency-Key" = Option<String>, Header, description = "With it the request can be sent again within a day and makes nothing twice")),
    request_body(content = CreateContext, description = "Everything is optional; an empty body works"),
    responses((status = 201, body = ContextView), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn create_context(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    Keyed(body, key): Keyed<CreateContext>,
) -> Result<Response, Problem> {
    let context = match begin(&app, &who, key)? {
        First::New(once) => {
            let CreateContext { kernelspec, language, cwd } = body;
            app.service.create_context(&who, id, ContextRequest { kernelspec, language, cwd }, once).await?
        }
        First::Made(made) => {
            let contexts = app.service.contexts(&who, id).await?;
            let is_made = |context: &session::ContextView| made == Made::Context(id, context.id);
            contexts.into_iter().find(is_made).ok_or(Error::NotFound("context"))?
        }
    };
    let location = format!("/v1/sessions/{id}/contexts/{}", context.id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Answer(ContextView::from(context))).into_response())
}

/// End a context
///
/// What runs or waits in it is cancelled, and its processes end. The default context stays as long as its session.
#[utoipa::path(delete, path = "/v1/sessions/{id}/contexts/{context}", operation_id = "delete_context", tag = "contexts",
    params(("id" = String, Path), ("context" = String, Path)),
    responses((status = 200, body = ContextView), (status = "4XX", body = Problem)))]
pub async fn delete_context(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, context): Ids<SessionId, ContextId>,
) -> Result<Answer<ContextView>, Problem> {
    Ok(Answer(app.service.delete_context(&who, id, context).await?.into()))
}

/// Interrupt what runs in a context
#[utoipa::path(post, path = "/v1/sessions/{id}/contexts/{context}/interrupt", operation_id = "interrupt_context", tag = "contexts",
    params(("id" = String, Path), ("context" = String, Path)),
    responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn interrupt_context(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, context): Ids<SessionId, ContextId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.interrupt(&who, id, Some(context)).await?)))
}

/// Replace a context's kernel
///
/// Files stay, variables go; what runs or waits in it is cancelled. Answers once the new kernel does.
#[utoipa::path(post, path = "/v1/sessions/{id}/contexts/{context}/restart", operation_id = "restart_context", tag = "contexts",
    params(("id" = String, Path), ("context" = String, Path)),
    responses((status = 200, body = SessionView), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn restart_context(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, context): Ids<SessionId, ContextId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.restart(&who, id, Some(context)).await?)))
}

/// Code and a place in it.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompleteCode {
    /// The code.
    code: String,
    /// The place, in Unicode characters from the beginning; the end when absent.
    #[serde(default)]
    cursor: Option<u64>,
}

/// How may this code go on?
///
/// The content of the kernel's `complete_reply` as it is.
#[utoipa::path(post, path = "/v1/sessions/{id}/contexts/{context}/complete", operation_id = "complete_code", tag = "contexts",
    params(("id" = String, Path), ("context" = String, Path)), request_body = CompleteCode,
    responses((status = 200, body = Object), (status = "4XX", body = Problem)))]
pub async fn complete_code(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, context): Ids<SessionId, ContextId>,
    Body(body): Body<CompleteCode>,
) -> Result<Answer<Box<RawValue>>, Problem> {
    let question = Question::Complete(body.cursor);
    Ok(Answer(raw(&app.service.ask_kernel(&who, (id, context), &question, &body.code).await?)))
}

/// Code, a place in it, and how much is wanted.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InspectCode {
    /// The code.
    code: String,
    /// The place, in Unicode characters from the beginning; the end when absent.
    #[serde(default)]
    cursor: Option<u64>,
    /// 0, or 1 for more.
    #[serde(default)]
    detail_level: DetailLevel,
}

/// How much is wanted.
#[derive(Debug, Default, Clone, Copy, Deserialize, ToSchema)]
#[serde(try_from = "u8")]
#[schema(value_type = u8)]
pub struct DetailLevel(u8);

impl TryFrom<u8> for DetailLevel {
    type Error = &'static str;

    fn try_from(level: u8) -> Result<Self, Self::Error> {
        if level <= 1 { Ok(Self(level)) } else { Err("allowed are 0 and 1") }
    }
}

/// What stands at this place in the code?
///
/// The content of the kernel's `inspect_reply` as it is.
#[utoipa::path(post, path = "/v1/sessions/{id}/contexts/{context}/inspect", operation_id = "inspect_code", tag = "contexts",
    params(("id" = String, Path), ("context" = String, Path)), request_body = InspectCode,
    responses((status = 200, body = Object), (status = "4XX", body = Problem)))]
pub async fn inspect_code(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, context): Ids<SessionId, ContextId>,
    Body(body): Body<InspectCode>,
) -> Result<Answer<Box<RawValue>>, Problem> {
    let question = Question::Inspect(body.cursor, body.detail_level.0);
    Ok(Answer(raw(&app.service.ask_kernel(&who, (id, context), &question, &body.code).await?)))
}

/// Code.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckCode {
    /// The code.
    code: String,
}

/// Is this code complete?
///
/// The content of the kernel's `is_complete_reply` as it is.
#[utoipa::path(post, path = "/v1/sessions/{id}/contexts/{context}/is_complete", operation_id = "check_code", tag = "contexts",
    params(("id" = String, Path), ("context" = String, Path)), request_body = CheckCode,
    responses((status = 200, body = Object), (status = "4XX", body = Problem)))]
pub async fn check_code(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, context): Ids<SessionId, ContextId>,
    Body(body): Body<CheckCode>,
) -> Result<Answer<Box<RawValue>>, Problem> {
    Ok(Answer(raw(&app.service.ask_kernel(&who, (id, context), &Question::IsComplete, &body.code).await?)))
}

/// A message of a comm: a channel between an object of the kernel, such as a widget, and yours.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SendComm {
    /// Which message.
    msg_type: CommType,
    /// Its content: `comm_id`, `data`, and for `comm_open` a `target_name`.
    #[schema(value_type = Object)]
    content: serde_json::Map<String, serde_json::Value>,
    /// Its metadata.
    #[serde(default)]
    #[schema(value_type = Object)]
    metadata: serde_json::Map<String, serde_json::Value>,
    /// Its binary buffers in base 64.
    #[serde(default)]
    buffers_base64: Vec<String>,
    /// What the kernel does about it is interrupted after this long; the session's limit when absent.
    #[serde(default)]
    timeout_seconds: Option<f64>,
}

/// The messages of a comm.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CommType {
    /// It is opened.
    CommOpen,
    /// Something is told.
    CommMsg,
    /// It is closed.
    CommClose,
}

/// Send a message of a comm
///
/// It waits for its turn like code, and what the kernel does about it is an execution: its output, and messages of comms as `comm`
/// events. Messages that the kernel sends come as such events of whatever execution sent them.
#[utoipa::path(post, path = "/v1/sessions/{id}/contexts/{context}/comms", operation_id = "send_comm", tag = "contexts",
    params(("id" = String, Path), ("context" = String, Path)), request_body = SendComm,
    responses((status = 200, body = ExecutionView), (status = "4XX", body = Problem)))]
pub async fn send_comm(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, context): Ids<SessionId, ContextId>,
    headers: HeaderMap,
    Body(body): Body<SendComm>,
) -> Result<Response, Problem> {
    let mut buffers = Vec::new();
    for (at, buffer) in body.buffers_base64.iter().enumerate() {
        buffers.push(BASE64.decode(buffer).map_err(|_| {
            let field = FieldError::new(format!("/buffers_base64/{at}"), "allowed is base 64 with padding");
            Problem::new(problem::INVALID_REQUEST, "the body is not understood").with_fields(vec![field])
        })?);
    }
    let text = |object| JsonText(serde_json::Value::Object(object).to_string());
    let kind = match body.msg_type {
        CommType::CommOpen => CommKind::Open,
        CommType::CommMsg => CommKind::Message,
        CommType::CommClose => CommKind::Close,
    };
    let request = ExecuteRequest {
        context: Some(context),
        timeout_seconds: body.timeout_seconds,
        silent: true,
        comm: Some(Comm { kind, content: text(body.content), metadata: text(body.metadata), buffers }),
        ..ExecuteRequest::default()
    };
    let execution = app.service.execute(&who, id, request, None).await?;
    Ok(executions::answer(app, who, execution, OnDisconnect::Continue, &headers).await)
}
