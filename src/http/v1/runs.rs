//! Runs over HTTP: code in, result out, and a container of its own that is thrown away.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use tokio_util::sync::{CancellationToken, DropGuard};
use utoipa::ToSchema;

use super::executions::{self, CreateExecution, ExecutionView, OnDisconnect, OnTimeoutName, StdinRequest, StdinSchema};
use super::sessions::{CreateSession, First, NetworkRequest, NewFileRequest, ResourceRequest, TimeoutRequest, begin};
use crate::domain::spec::SessionRequest;
use crate::http::App;
use crate::http::extract::{Caller, Keyed, object};
use crate::http::problem::Problem;

/// What is to be run, and in what.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRun {
    /// The code.
    code: String,
    /// A template's name; the server's default when absent.
    #[serde(default)]
    template: Option<String>,
    /// A name for its session, unique among your live sessions.
    #[serde(default)]
    name: Option<String>,
    /// Environment variables for everything that runs in it.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// For finding its session while it runs.
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// Code that prepares the kernel.
    #[serde(default)]
    setup: Option<String>,
    /// What it may use.
    #[serde(default, deserialize_with = "object")]
    resources: ResourceRequest,
    /// How long things may take.
    #[serde(default, deserialize_with = "object")]
    timeouts: TimeoutRequest,
    /// What it may reach.
    #[serde(default, deserialize_with = "object")]
    network: NetworkRequest,
    /// Files that are there before any code runs: at most 100, with 16 MiB in all.
    #[serde(default)]
    files: Vec<NewFileRequest>,
    /// It is interrupted after this long; the template's limit when absent.
    #[serde(default)]
    timeout_seconds: Option<f64>,
    /// Bytes of stdout and of stderr, each, before head and tail are kept; the template's limit when absent.
    #[serde(default)]
    max_output_bytes: Option<u64>,
    /// Answer with 202 as soon as the code is about to run; look at it, or at its events, later.
    #[serde(default)]
    background: bool,
    /// What happens when you hang up before its end.
    #[serde(default)]
    on_disconnect: OnDisconnect,
    /// What it gets when it asks for a line.
    #[serde(default)]
    #[schema(value_type = StdinSchema)]
    stdin: StdinRequest,
    /// Its language; that of the template when absent.
    #[serde(default)]
    language: Option<String>,
    /// Expressions that are evaluated after it, by name.
    #[serde(default)]
    user_expressions: BTreeMap<String, String>,
    /// What happens at the time limit first.
    #[serde(default)]
    on_timeout: OnTimeoutName,
}

impl CreateRun {
    fn split(self) -> (CreateSession, CreateExecution) {
        let session = CreateSession {
            template: self.template,
            name: self.name,
            env: self.env,
            labels: self.labels,
            setup: self.setup,
            resources: self.resources,
            timeouts: self.timeouts,
            network: self.network,
            files: self.files,
            ..CreateSession::default()
        };
        let execution = CreateExecution {
            code: self.code,
            context_id: None,
            language: self.language,
            timeout_seconds: self.timeout_seconds,
            silent: false,
            store_history: None,
            max_output_bytes: self.max_output_bytes,
            background: self.background,
            on_disconnect: self.on_disconnect,
            stdin: self.stdin,
            user_expressions: self.user_expressions,
            on_timeout: self.on_timeout,
        };
        (session, execution)
    }
}

/// Run code in a container of its own
///
/// From code to result in one call; the container is thrown away. Answers as running code in a session does.
#[utoipa::path(post, path = "/v1/runs", operation_id = "create_run", tag = "executions",
    params(("Idempotency-Key" = Option<String>, Header, description = "With it the request can be sent again within a day and makes nothing twice")), request_body = CreateRun,
    responses((status = 200, body = ExecutionView), (status = 202, body = ExecutionView, description = "In the background"),
        (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn create_run(
    State(app): State<App>,
    Caller(who): Caller,
    headers: HeaderMap,
    Keyed(body, key): Keyed<CreateRun>,
) -> Result<Response, Problem> {
    let (session, execution) = body.split();
    let (background, on_disconnect) = (execution.background, execution.on_disconnect);
    let request = executions::execute_request(execution)?;
    let abandoned = CancellationToken::new();
    // Dropped with this handler when the caller hangs up while the session starts.
    let guard = (on_disconnect == OnDisconnect::Interrupt).then(|| abandoned.clone().drop_guard());
    let execution = match begin(&app, &who, key)? {
        First::New(once) => app.service.run(&who, SessionRequest::from(session), request, abandoned, once).await?,
        First::Made(made) => executions::made_before(&app, &who, made)?,
    };
    let _ = guard.map(DropGuard::disarm);
    if background {
        return Ok(executions::accepted(&execution));
    }
    Ok(executions::answer(app, who, execution, on_disconnect, &headers).await)
}
