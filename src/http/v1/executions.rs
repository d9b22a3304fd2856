//! Executions over HTTP: as one JSON answer, as server-sent events, or as lines of JSON.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body as RawBody;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio_util::io::ReaderStream;
use utoipa::ToSchema;

use super::sessions::{First, begin};
use super::stream::{self, Format};
use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::output::{
    BlobRef, Change, Effects, ErrorInfo, FileChange, JsonText, MimeBundle, MimePart, Outcome, Process, RestartCause,
    ResultKind, RichOutput, Status, Stop, StopStep, TextTotals,
};
use crate::domain::spec::MIB;
use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Id, Ids, Keyed, Params};
use crate::http::problem::Problem;
use crate::service::keys::Principal;
use crate::service::{BlobBody, Error, ExecuteRequest};
use crate::session::execution::{Execution, OnTimeout, Stdin};
use crate::session::once::Made;

/// What is to be run.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateExecution {
    /// The code.
    pub(super) code: String,
    /// Where it runs; the session's default context when absent.
    #[serde(default)]
    pub(super) context_id: Option<String>,
    /// Its language, where no context is named: the session's context of that language runs it, and is made if there is none.
    #[serde(default)]
    pub(super) language: Option<String>,
    /// It is interrupted after this long; the session's limit when absent.
    #[serde(default)]
    pub(super) timeout_seconds: Option<f64>,
    /// Nothing is shown and nothing is counted.
    #[serde(default)]
    pub(super) silent: bool,
    /// It takes part in the kernel's count; yes when absent.
    #[serde(default)]
    pub(super) store_history: Option<bool>,
    /// Bytes of stdout and of stderr, each, before head and tail are kept; the template's limit when absent.
    #[serde(default)]
    pub(super) max_output_bytes: Option<u64>,
    /// Answer at once with 202; look at it, or at its events, later.
    #[serde(default)]
    pub(super) background: bool,
    /// What happens when you hang up before its end.
    #[serde(default)]
    pub(super) on_disconnect: OnDisconnect,
    /// What it gets when it asks for a line: `"deny"`, an exception; a list of lines, these in order; `"interactive"`, what you send to
    /// `…/input` when `input.requested` comes.
    #[serde(default)]
    #[schema(value_type = StdinSchema)]
    pub(super) stdin: StdinRequest,
    /// Expressions that are evaluated after it, by name.
    #[serde(default)]
    pub(super) user_expressions: BTreeMap<String, String>,
    /// What happens at the time limit first.
    #[serde(default)]
    pub(super) on_timeout: OnTimeoutName,
}

/// What code gets that asks for a line.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "allowed are \"deny\", \"interactive\" and a list of lines")]
pub enum StdinRequest {
    /// By a word.
    Word(StdinWord),
    /// These lines.
    Lines(Vec<String>),
    /// Nothing was said.
    #[default]
    #[serde(skip)]
    Absent,
}

/// What code gets that asks for a line, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StdinWord {
    /// An exception.
    Deny,
    /// What a caller sends.
    Interactive,
}

/// `deny`, `interactive`, or a list of lines.
#[derive(Debug, ToSchema)]
#[schema(as = Stdin)]
#[serde(untagged)]
pub enum StdinSchema {
    /// By a word.
    Word(StdinWord),
    /// These lines.
    Lines(Vec<String>),
}

/// What happens at the time limit first.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeoutName {
    /// It is interrupted, so that variables may survive.
    #[default]
    Interrupt,
    /// Its kernel is replaced.
    Restart,
}

/// What happens to an execution whose caller hangs up.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
    /// How it ended, for people, where the status and the error don't say all.
    detail: Option<String>,
    /// Whether the kernel survived.
    kernel: KernelView,
    /// How it was stopped, if a limit or a caller stopped it.
    stop: Option<StopView>,
    /// Limits that the code ran into: `pids`, `disk`, `memory`, `output`; more may come.
    limits_hit: Vec<&'static str>,
    /// Files below the working folder that are not as they were.
    files: Vec<FileView>,
    /// How many more there are.
    files_omitted: u64,
    /// Processes that it started and that still run.
    processes: Vec<ProcessView>,
    /// How many more there are.
    processes_omitted: u64,
    /// What it has cost.
    usage: UsageView,
    /// The kernel's answers to its user expressions.
    #[schema(value_type = BTreeMap<String, serde_json::Value>)]
    user_expressions: BTreeMap<String, Box<RawValue>>,
    /// What else the kernel gives back: pages of help, the next input.
    #[schema(value_type = Vec<serde_json::Value>)]
    payloads: Vec<Box<RawValue>>,
}

/// How an execution was stopped.
#[derive(Debug, Serialize, ToSchema)]
pub struct StopView {
    /// What it took: `interrupt`, `restart` of the kernel, `replace` of the container, or the `end` of the session.
    step: &'static str,
    /// Whether variables survived.
    variables_kept: bool,
    /// From the decision to the end.
    took_ms: u64,
    /// Contexts whose kernels were ended with it, because processes could not be told apart.
    also_ended: Vec<String>,
}

/// A file that an execution has changed.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileView {
    /// Its path relative to the working folder.
    path: String,
    /// `created`, `changed` or `deleted`.
    change: &'static str,
    /// Its size in bytes.
    size: Option<u64>,
    /// SHA-256 of its bytes, where it is not too long.
    sha256: Option<String>,
    /// Its MIME type, by its name.
    mime: Option<String>,
}

/// A process.
#[derive(Debug, Serialize, ToSchema)]
pub struct ProcessView {
    /// Its id inside the container.
    pid: i32,
    /// Its command line, cut.
    command: String,
}

/// What an execution has cost.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageView {
    /// CPU time.
    cpu_ms: Option<u64>,
    /// The most memory that the kernel's processes held, in MiB, as the sum of each one's own peak.
    peak_memory_mb: Option<f64>,
    /// Whether others in the container may be counted in.
    approximate: bool,
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
    pub(super) bytes: u64,
    /// Whether a part was left out.
    pub(super) truncated: bool,
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
    /// MIME type to content: a text, base64 for images, or JSON; `{"$ref": path, "bytes": n, "sha256": hex}` when it is long: fetch
    /// it from that path.
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
    /// The same as one text without them.
    traceback_text: String,
}

/// Whether the kernel survived.
#[derive(Debug, Serialize, ToSchema)]
pub struct KernelView {
    /// It was replaced: variables are gone, files stay.
    restarted: bool,
    /// Why it was replaced, or ended without another: `timeout`, `oom`, `died`, `requested`, `swept` or `guest_lost`; more may come.
    cause: Option<&'static str>,
    /// The exit status of the one that died.
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_status: Option<i32>,
    /// The signal that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<i32>,
}

impl ExecutionView {
    pub(in crate::http) fn of(execution: &Execution) -> Self {
        let outcome = execution.outcome();
        let (limits_hit, kernel) = (limits_hit(&outcome), KernelView::of(&outcome));
        Self {
            id: execution.id.to_string(),
            session_id: execution.place.session.to_string(),
            context_id: execution.place.context.to_string(),
            status: outcome.status.word(),
            execution_count: outcome.execution_count,
            language: execution.place.language.clone(),
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
            results: outcome.results.iter().map(|output| ResultView::of(execution, output)).collect(),
            error: outcome.error.map(ErrorView::of),
            detail: outcome.detail,
            kernel,
            stop: outcome.stop.as_ref().map(StopView::of),
            limits_hit,
            files: outcome.effects.files.iter().map(FileView::of).collect(),
            files_omitted: outcome.effects.files_omitted,
            processes: outcome.effects.processes.iter().map(ProcessView::of).collect(),
            processes_omitted: outcome.effects.processes_omitted,
            usage: UsageView::of(&outcome.effects),
            user_expressions: outcome.user_expressions.iter().map(|(name, v)| (name.clone(), raw(v))).collect(),
            payloads: outcome.payloads.iter().map(raw).collect(),
        }
    }
}

impl ExecutionView {
    /// As programs are told it that hand all of it to a model: without pictures, texts within so many characters, and without what can't be read as JSON.
    pub(in crate::http) fn compact(mut self, most: usize) -> serde_json::Value {
        let shortened = |text: &str| crate::http::mcp::cut(text, most).0;
        (self.stdout, self.stderr) = (shortened(&self.stdout), shortened(&self.stderr));
        for result in &mut self.results {
            for (mime, content) in &mut result.data {
                let is_picture = mime.starts_with("image/") && content.get().starts_with('"');
                shorten(content, if is_picture { 0 } else { most });
            }
            shorten(&mut result.metadata, most);
        }
        self.user_expressions.values_mut().chain(&mut self.payloads).for_each(|content| shorten(content, most));
        if let Some(error) = &mut self.error {
            // The text has it without its colours.
            error.traceback.clear();
            error.traceback_text = shortened(&error.traceback_text);
            error.value = shortened(&error.value);
        }
        serde_json::to_value(self).unwrap_or_default()
    }
}

/// JSON of a kernel may be longer than is wanted, or more than a reader takes: then only its length stays.
fn shorten(content: &mut Box<RawValue>, most: usize) {
    if content.get().len() > most || serde_json::from_str::<serde_json::Value>(content.get()).is_err() {
        *content = raw(&JsonText(serde_json::json!({"omitted_bytes": content.get().len()}).to_string()));
    }
}

impl TextView {
    fn of(totals: TextTotals) -> Self {
        Self { bytes: totals.bytes, truncated: totals.omitted > 0 }
    }
}

impl StopView {
    fn of(stop: &Stop) -> Self {
        Self {
            step: match stop.step {
                StopStep::Interrupt => "interrupt",
                StopStep::Restart => "restart",
                StopStep::Replace => "replace",
                StopStep::End => "end",
            },
            variables_kept: stop.step == StopStep::Interrupt,
            took_ms: u64::try_from(stop.took.as_millis()).unwrap_or(u64::MAX),
            also_ended: stop.also_ended.iter().map(ToString::to_string).collect(),
        }
    }
}

impl FileView {
    fn of(file: &FileChange) -> Self {
        Self {
            path: file.path.clone(),
            change: match file.change {
                Change::Created => "created",
                Change::Changed => "changed",
                Change::Deleted => "deleted",
            },
            size: file.bytes,
            sha256: file.sha256.clone(),
            mime: mime_guess::from_path(&file.path).first_raw().map(str::to_owned),
        }
    }
}

impl ProcessView {
    fn of(process: &Process) -> Self {
        Self { pid: process.pid, command: process.command.clone() }
    }
}

impl UsageView {
    fn of(effects: &Effects) -> Self {
        let mib = |bytes: u64| (bytes as f64 / MIB as f64 * 10.0).round() / 10.0;
        Self {
            cpu_ms: effects.cpu.map(|cpu| u64::try_from(cpu.as_millis()).unwrap_or(u64::MAX)),
            peak_memory_mb: effects.peak_memory_bytes.map(mib),
            approximate: effects.approximate,
        }
    }
}

impl ResultView {
    pub(super) fn of(execution: &Execution, output: &RichOutput) -> Self {
        Self {
            kind: match output.kind {
                ResultKind::ExecuteResult => "execute_result",
                ResultKind::DisplayData => "display_data",
            },
            data: bundle(execution, &output.data),
            metadata: raw(&output.metadata),
            display_id: output.display_id.clone(),
        }
    }
}

impl ErrorView {
    pub(super) fn of(error: ErrorInfo) -> Self {
        let plain = |block: &String| anstream::adapter::strip_str(block).to_string();
        let traceback_text = error.traceback.iter().map(plain).collect::<Vec<_>>().join("\n");
        Self { name: error.name, value: error.value, traceback: error.traceback, traceback_text }
    }
}

impl KernelView {
    fn of(outcome: &Outcome) -> Self {
        let cause = outcome.restarted.as_ref().or(outcome.kernel_end.as_ref());
        let (exit_status, signal) = match cause {
            Some(RestartCause::Died { status, signal }) => (*status, *signal),
            _ => (None, None),
        };
        Self { restarted: outcome.restarted.is_some(), cause: cause.map(restart_cause), exit_status, signal }
    }
}

pub(super) fn bundle(execution: &Execution, data: &MimeBundle) -> BTreeMap<String, Box<RawValue>> {
    let content = |part: &MimePart| match part {
        MimePart::Inline(text) => raw(text),
        MimePart::Blob(BlobRef { number, bytes, sha256 }) => {
            let path = format!("/v1/executions/{}/blobs/{number}", execution.id);
            raw(&JsonText(serde_json::json!({"$ref": path, "bytes": bytes, "sha256": sha256}).to_string()))
        }
    };
    data.iter().map(|(mime, part)| (mime.clone(), content(part))).collect()
}

/// JSON that a kernel wrote, as it is. It was read as JSON once, so this can't fail.
pub(super) fn raw(text: &JsonText) -> Box<RawValue> {
    RawValue::from_string(text.0.clone()).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

fn limits_hit(outcome: &Outcome) -> Vec<&'static str> {
    let omitted = [outcome.stdout_totals.omitted, outcome.stderr_totals.omitted, outcome.results_omitted];
    let cut = omitted.iter().any(|bytes| *bytes > 0);
    let effects = &outcome.effects;
    let no_space = outcome.error.as_ref().is_some_and(|e| e.name == "OSError" && e.value.starts_with("[Errno 28]"));
    let limits = [
        (effects.pids_hit, "pids"),
        (effects.disk_hit || no_space, "disk"),
        (effects.memory_hit || outcome.status == Status::Oom, "memory"),
        (cut, "output"),
    ];
    limits.into_iter().filter_map(|(hit, name)| hit.then_some(name)).collect()
}

pub(super) fn restart_cause(cause: &RestartCause) -> &'static str {
    match cause {
        RestartCause::Timeout => "timeout",
        RestartCause::Oom => "oom",
        RestartCause::Died { .. } => "died",
        RestartCause::Requested => "requested",
        RestartCause::Swept => "swept",
        RestartCause::GuestLost => "guest_lost",
    }
}

/// Run code
///
/// Answers with the finished execution; with `Accept: text/event-stream` or `application/x-ndjson`, with its events as they
/// happen. 200 whenever the code ran, however it ended.
#[utoipa::path(post, path = "/v1/sessions/{id}/executions", operation_id = "create_execution", tag = "executions",
    params(("id" = String, Path), ("Idempotency-Key" = Option<String>, Header, description = "With it the request can be sent again within a day and makes nothing twice")),
    request_body = CreateExecution,
    responses((status = 200, body = ExecutionView), (status = 202, body = ExecutionView, description = "In the background, or because the server stops and the next one goes on with it"),
        (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn create_execution(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    headers: HeaderMap,
    Keyed(body, key): Keyed<CreateExecution>,
) -> Result<Response, Problem> {
    let (background, on_disconnect) = (body.background, body.on_disconnect);
    let request = execute_request(body)?;
    let execution = match begin(&app, &who, key)? {
        First::New(once) => app.service.execute(&who, id, request, once).await?,
        First::Made(made) => made_before(&app, &who, made)?,
    };
    if background {
        return Ok(accepted(&execution));
    }
    Ok(answer(app, who, execution, on_disconnect, &headers).await)
}

/// What the first request with a key has made.
pub(super) fn made_before(app: &App, who: &Principal, made: Made) -> Result<Arc<Execution>, Problem> {
    match made {
        Made::Execution(id) => Ok(app.service.execution(who, id)?),
        Made::Session(_) | Made::Context(..) | Made::Command(..) => Err(Error::NotFound("execution").into()),
    }
}

/// The answer about an execution that goes on in the background.
pub(super) fn accepted(execution: &Execution) -> Response {
    let location = format!("/v1/executions/{}", execution.id);
    (StatusCode::ACCEPTED, [(header::LOCATION, location)], Answer(ExecutionView::of(execution))).into_response()
}

/// The answer to the caller of an execution, in the form that it accepts.
pub(super) async fn answer(
    app: App,
    who: Principal,
    execution: Arc<Execution>,
    on_disconnect: OnDisconnect,
    headers: &HeaderMap,
) -> Response {
    let guard = Listener { app, who, execution: Arc::clone(&execution), on_disconnect };
    if let Some(format) = Format::wanted(headers) {
        return stream::respond(execution, 0, format, Some(guard));
    }
    execution.ended().await;
    drop(guard);
    match execution.status().is_final() {
        true => Answer(ExecutionView::of(&execution)).into_response(),
        // It goes on with the next server.
        false => accepted(&execution),
    }
}

/// Takes an execution back when its caller hangs up, if that was asked for.
pub(in crate::http) struct Listener {
    app: App,
    who: Principal,
    execution: Arc<Execution>,
    on_disconnect: OnDisconnect,
}

impl Listener {
    /// One whose hanging up ends the execution.
    pub(in crate::http) fn of(app: App, who: Principal, execution: &Arc<Execution>) -> Self {
        Self { app, who, execution: Arc::clone(execution), on_disconnect: OnDisconnect::Interrupt }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.on_disconnect == OnDisconnect::Interrupt {
            self.app.service.cancel_unheard(&self.who, &self.execution);
        }
    }
}

pub(super) fn execute_request(body: CreateExecution) -> Result<ExecuteRequest, Problem> {
    let context = match body.context_id.as_deref().map(str::parse::<ContextId>) {
        None => None,
        Some(Ok(context)) => Some(context),
        Some(Err(_)) => return Err(Error::NotFound("context").into()),
    };
    Ok(ExecuteRequest {
        code: body.code,
        context,
        language: body.language,
        timeout_seconds: body.timeout_seconds,
        silent: body.silent,
        store_history: body.store_history,
        max_output_bytes: body.max_output_bytes,
        stdin: match body.stdin {
            StdinRequest::Absent | StdinRequest::Word(StdinWord::Deny) => Stdin::Deny,
            StdinRequest::Word(StdinWord::Interactive) => Stdin::Interactive,
            StdinRequest::Lines(lines) => Stdin::Lines(lines),
        },
        user_expressions: body.user_expressions,
        on_timeout: match body.on_timeout {
            OnTimeoutName::Interrupt => OnTimeout::Interrupt,
            OnTimeoutName::Restart => OnTimeout::Restart,
        },
        stop_on_error: false,
        asked_by: None,
        comm: None,
    })
}

/// A line of input.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AnswerInput {
    /// The line, without its end.
    text: String,
}

/// Answer a request for input
///
/// After `input.requested`, within the execution's time limit.
#[utoipa::path(post, path = "/v1/executions/{id}/input", operation_id = "answer_input", tag = "executions",
    params(("id" = String, Path)), request_body = AnswerInput,
    responses((status = 200, body = ExecutionView), (status = "4XX", body = Problem)))]
pub async fn answer_input(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<ExecutionId>,
    Body(body): Body<AnswerInput>,
) -> Result<Answer<ExecutionView>, Problem> {
    Ok(Answer(ExecutionView::of(&*app.service.answer_input(&who, id, body.text).await?)))
}

/// Fetch a long content
///
/// What a result's `$ref` names, decoded, with its own type.
#[utoipa::path(get, path = "/v1/executions/{id}/blobs/{number}", operation_id = "get_blob", tag = "executions",
    params(("id" = String, Path), ("number" = u32, Path)),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), (status = "4XX", body = Problem)))]
pub async fn get_blob(
    State(app): State<App>,
    Caller(who): Caller,
    Ids(id, number): Ids<ExecutionId, u32>,
) -> Result<Response, Problem> {
    let blob = app.service.blob(&who, id, number).await?;
    // A type that code inside has chosen: nothing of it may run in a browser.
    let headers = [
        (header::CONTENT_TYPE, blob.mime),
        (header::CONTENT_LENGTH, blob.bytes.to_string()),
        (header::ETAG, format!("\"{}\"", blob.sha256)),
        (header::CONTENT_DISPOSITION, "attachment".to_owned()),
        (header::CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'".to_owned()),
    ];
    let body = match blob.body {
        BlobBody::Memory(bytes) => RawBody::from(bytes),
        BlobBody::File(file) => RawBody::from_stream(ReaderStream::new(file)),
    };
    Ok((headers, body).into_response())
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
    let after = stream::last_event(&headers)?;
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
