//! Executions over HTTP: as one JSON answer, as server-sent events, or as lines of JSON.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::stream::{self, Format};
use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::output::{
    ErrorInfo, JsonText, MimeBundle, Outcome, RestartCause, ResultKind, RichOutput, Status, TextTotals, Truncated,
};
use crate::domain::spec::FieldError;
use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Id, Params};
use crate::http::problem::{self, Problem};
use crate::service::{Error, ExecuteRequest};
use crate::session::execution::Execution;

/// What is to be run.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateExecution {
    /// The code.
    code: String,
    /// Where it runs; the session's default context when absent.
    #[serde(default)]
    context_id: Option<String>,
    /// It is interrupted after this long; the session's limit when absent.
    #[serde(default)]
    timeout_seconds: Option<f64>,
    /// Nothing is shown and nothing is counted.
    #[serde(default)]
    silent: bool,
    /// It takes part in the kernel's count; yes when absent.
    #[serde(default)]
    store_history: Option<bool>,
    /// Bytes of stdout and of stderr, each, before head and tail are kept; the template's limit when absent.
    #[serde(default)]
    max_output_bytes: Option<u64>,
    /// Answer at once with 202; look at it, or at its events, later.
    #[serde(default)]
    background: bool,
    /// What happens when you hang up before its end.
    #[serde(default)]
    on_disconnect: OnDisconnect,
}

/// What happens to an execution whose caller hangs up.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnDisconnect {
    /// It goes on.
    #[default]
    Continue,
    /// It is cancelled.
    Interrupt,
}

/// An execution.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExecutionView {
    /// Its id.
    id: String,
    /// Its session.
    session_id: String,
    /// Its context.
    context_id: String,
    /// `queued`, `running`, `ok`, `error`, `timeout`, `cancelled`, `oom`, `kernel_died`, `input_denied` or `lost`; more may come.
    status: &'static str,
    /// The kernel's count.
    execution_count: Option<u64>,
    /// The kernel's language.
    language: String,
    /// When it was accepted.
    created_at: String,
    /// Time in the queue.
    queued_ms: u64,
    /// Time it ran.
    duration_ms: u64,
    /// Standard output; where a part was left out, a line says so.
    stdout: String,
    /// Standard error, likewise.
    stderr: String,
    /// Totals of both.
    output: OutputView,
    /// Rich outputs in order, updates applied.
    #[schema(value_type = Vec<ResultSchema>)]
    results: Vec<ResultView>,
    /// The exception.
    error: Option<ErrorView>,
    /// Whether the kernel survived.
    kernel: KernelView,
    /// Limits that the code ran into: `output`, `memory`; more may come.
    limits_hit: Vec<&'static str>,
}

/// Totals of the text.
#[derive(Debug, Serialize, ToSchema)]
pub struct OutputView {
    /// Standard output.
    stdout: TextView,
    /// Standard error.
    stderr: TextView,
    /// Bytes of results that were left out.
    results_omitted_bytes: u64,
}

/// Totals of one stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct TextView {
    /// Bytes that the code wrote.
    bytes: u64,
    /// Whether a part was left out.
    truncated: bool,
}

/// A rich output, as in an `.ipynb` file.
#[derive(Debug, Serialize)]
pub struct ResultView {
    kind: &'static str,
    data: BTreeMap<String, Box<RawValue>>,
    metadata: Box<RawValue>,
    display_id: Option<String>,
}

/// A rich output, as in an `.ipynb` file.
#[derive(Debug, ToSchema)]
#[schema(as = ResultView)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct ResultSchema {
    /// `execute_result` or `display_data`.
    kind: String,
    /// MIME type to content: a text, base64 for images, or JSON.
    data: BTreeMap<String, serde_json::Value>,
    /// About the content.
    metadata: serde_json::Value,
    /// For a later update.
    display_id: Option<String>,
}

/// An exception.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorView {
    /// Its class.
    name: String,
    /// Its message.
    value: String,
    /// Its traceback as the kernel gave it, with ANSI colours.
    traceback: Vec<String>,
}

/// Whether the kernel survived.
#[derive(Debug, Serialize, ToSchema)]
pub struct KernelView {
    /// It was replaced: variables are gone, files stay.
    restarted: bool,
    /// Why: `timeout`, `oom`, `died` or `requested`.
    cause: Option<&'static str>,
    /// The exit status of the one that died.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_status: Option<i32>,
    /// The signal that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<i32>,
}

impl ExecutionView {
    pub(super) fn of(execution: &Execution) -> Self {
        let outcome = execution.outcome();
        let limits_hit = limits_hit(&outcome);
        Self {
            id: execution.id.to_string(),
            session_id: execution.session.to_string(),
            context_id: execution.context.to_string(),
            status: status(outcome.status),
            execution_count: outcome.execution_count,
            language: execution.language.clone(),
            created_at: super::sessions::time(execution.created_at),
            queued_ms: u64::try_from(outcome.queued.as_millis()).unwrap_or(u64::MAX),
            duration_ms: u64::try_from(outcome.duration.as_millis()).unwrap_or(u64::MAX),
            output: OutputView {
                stdout: TextView::of(outcome.stdout_totals),
                stderr: TextView::of(outcome.stderr_totals),
                results_omitted_bytes: outcome.results_omitted,
            },
            stdout: outcome.stdout,
            stderr: outcome.stderr,
            results: outcome.results.iter().map(ResultView::of).collect(),
            error: outcome.error.map(ErrorView::of),
            kernel: KernelView::of(outcome.restarted.as_ref()),
            limits_hit,
        }
    }
}

impl TextView {
    fn of(totals: TextTotals) -> Self {
        Self { bytes: totals.bytes, truncated: totals.omitted > 0 }
    }
}

impl ResultView {
    pub(super) fn of(output: &RichOutput) -> Self {
        Self {
            kind: match output.kind {
                ResultKind::ExecuteResult => "execute_result",
                ResultKind::DisplayData => "display_data",
            },
            data: bundle(&output.data),
            metadata: raw(&output.metadata),
            display_id: output.display_id.clone(),
        }
    }
}

impl ErrorView {
    pub(super) fn of(error: ErrorInfo) -> Self {
        Self { name: error.name, value: error.value, traceback: error.traceback }
    }
}

impl KernelView {
    fn of(cause: Option<&RestartCause>) -> Self {
        let (exit_status, signal) = match cause {
            Some(RestartCause::Died { status, signal }) => (*status, *signal),
            _ => (None, None),
        };
        Self { restarted: cause.is_some(), cause: cause.map(restart_cause), exit_status, signal }
    }
}

pub(super) fn bundle(data: &MimeBundle) -> BTreeMap<String, Box<RawValue>> {
    data.iter().map(|(mime, content)| (mime.clone(), raw(content))).collect()
}

/// JSON that a kernel wrote, as it is. It was read as JSON once, so this can't fail.
pub(super) fn raw(text: &JsonText) -> Box<RawValue> {
    RawValue::from_string(text.0.clone()).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

fn limits_hit(outcome: &Outcome) -> Vec<&'static str> {
    let omitted = [outcome.stdout_totals.omitted, outcome.stderr_totals.omitted, outcome.results_omitted];
    let cut = omitted.iter().any(|bytes| *bytes > 0);
    let limits = [(cut, "output"), (outcome.status == Status::Oom, "memory")];
    limits.into_iter().filter_map(|(hit, name)| hit.then_some(name)).collect()
}

pub(super) fn status(status: Status) -> &'static str {
    match status {
        Status::Queued => "queued",
        Status::Running => "running",
        Status::Ok => "ok",
        Status::Error => "error",
        Status::Timeout => "timeout",
        Status::Cancelled => "cancelled",
        Status::Oom => "oom",
        Status::KernelDied => "kernel_died",
        Status::InputDenied => "input_denied",
        Status::Lost => "lost",
    }
}

pub(super) fn restart_cause(cause: &RestartCause) -> &'static str {
    match cause {
        RestartCause::Timeout => "timeout",
        RestartCause::Oom => "oom",
        RestartCause::Died { .. } => "died",
        RestartCause::Requested => "requested",
    }
}

pub(super) fn truncated(what: Truncated) -> &'static str {
    match what {
        Truncated::Stdout => "stdout",
        Truncated::Stderr => "stderr",
        Truncated::Results => "results",
    }
}

/// Run code
///
/// Answers with the finished execution; with `Accept: text/event-stream` or `application/x-ndjson`, with its events as they
/// happen. 200 whenever the code ran, however it ended.
#[utoipa::path(post, path = "/v1/sessions/{id}/executions", operation_id = "create_execution", tag = "executions",
    params(("id" = String, Path)), request_body = CreateExecution,
    responses((status = 200, body = ExecutionView), (status = 202, body = ExecutionView, description = "In the background"),
        (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn create_execution(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    headers: HeaderMap,
    Body(body): Body<CreateExecution>,
) -> Result<Response, Problem> {
    let (background, on_disconnect) = (body.background, body.on_disconnect);
    let request = execute_request(body)?;
    let execution = app.service.execute(&who, id, request).await?;
    if background {
        let location = format!("/v1/executions/{}", execution.id);
        return Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], Answer(ExecutionView::of(&execution)))
            .into_response());
    }
    let guard = Listener { app, who, execution: Arc::clone(&execution), on_disconnect };
    if let Some(format) = Format::wanted(&headers) {
        return Ok(stream::respond(execution, 0, format, Some(guard)));
    }
    execution.ended().await;
    drop(guard);
    Ok(Answer(ExecutionView::of(&execution)).into_response())
}

/// Takes an execution back when its caller hangs up, if that was asked for.
pub(super) struct Listener {
    app: App,
    who: crate::service::keys::Principal,
    execution: Arc<Execution>,
    on_disconnect: OnDisconnect,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.on_disconnect == OnDisconnect::Interrupt && !self.execution.status().is_final() {
            // A session that has ended meanwhile has ended its executions too.
            let _ = self.app.service.cancel(&self.who, self.execution.id);
        }
    }
}

fn execute_request(body: CreateExecution) -> Result<ExecuteRequest, Problem> {
    let context = match body.context_id.as_deref().map(str::parse::<ContextId>) {
        None => None,
        Some(Ok(context)) => Some(context),
        Some(Err(_)) => return Err(Error::NotFound("context").into()),
    };
    Ok(ExecuteRequest {
        code: body.code,
        context,
        timeout_seconds: body.timeout_seconds,
        silent: body.silent,
        store_history: body.store_history,
        max_output_bytes: body.max_output_bytes,
    })
}

/// Look at an execution
#[utoipa::path(get, path = "/v1/executions/{id}", operation_id = "get_execution", tag = "executions", params(("id" = String, Path)),
    responses((status = 200, body = ExecutionView), (status = "4XX", body = Problem)))]
pub async fn get_execution(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<ExecutionId>,
) -> Result<Answer<ExecutionView>, Problem> {
    Ok(Answer(ExecutionView::of(&*app.service.execution(&who, id)?)))
}

/// Follow an execution
///
/// All its events from the beginning, or after `Last-Event-ID`, and then as they happen; for any number of readers.
#[utoipa::path(get, path = "/v1/executions/{id}/events", operation_id = "list_execution_events", tag = "executions",
    params(("id" = String, Path), ("Last-Event-ID" = Option<u64>, Header, description = "The last event that you have")),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = "4XX", body = Problem)))]
pub async fn list_execution_events(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<ExecutionId>,
    headers: HeaderMap,
    params: Params,
) -> Result<Response, Problem> {
    params.only(&[])?;
    let execution = app.service.execution(&who, id)?;
    let after = match headers.get("last-event-id").map(|v| v.to_str().unwrap_or_default().parse::<u64>()) {
        None => 0,
        Some(Ok(after)) => after,
        Some(Err(_)) => {
            let field = FieldError::new("Last-Event-ID", "allowed is the id of an event of this execution");
            return Err(Problem::new(problem::INVALID_REQUEST, "a header is not understood").with_fields(vec![field]));
        }
    };
    Ok(stream::respond(execution, after, Format::wanted(&headers).unwrap_or(Format::Sse), None))
}

/// Take an execution back
///
/// Out of the queue, or by an interrupt. One that has ended stays as it is. Answers at once.
#[utoipa::path(post, path = "/v1/executions/{id}/cancel", operation_id = "cancel_execution", tag = "executions",
    params(("id" = String, Path)), responses((status = 200, body = ExecutionView), (status = "4XX", body = Problem)))]
pub async fn cancel_execution(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<ExecutionId>,
) -> Result<Answer<ExecutionView>, Problem> {
    Ok(Answer(ExecutionView::of(&*app.service.cancel(&who, id)?)))
}
