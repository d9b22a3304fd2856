//! E2B's code interpreter: executions as lines of JSON, and contexts. An execution here is one of the native API's, taken back when its caller hangs up; how it is told
//! stands in [`lines`].

use std::collections::BTreeMap;

use axum::Router;
use axum::body::Body;
use axum::extract::Path;
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, delete, get, post};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Change;
use super::error::{Refusal, of_sandbox};
use super::sandbox::{Aimed, ByTrafficToken, Sandbox};
use crate::domain::ids::ContextId;
use crate::http::App;
use crate::http::extract::{Answer, read};
use crate::http::problem::{self, Problem};
use crate::service::{ContextRequest, Error, ExecuteRequest};
use crate::session::ContextView;

mod lines;

/// What changes something here, and what that is to the audit.
pub(super) const CHANGES: [Change; 4] = [
    (Method::POST, "/execute", "create_execution"),
    (Method::POST, "/contexts", "create_context"),
    (Method::POST, "/contexts/{id}/restart", "restart_context"),
    (Method::DELETE, "/contexts/{id}", "delete_context"),
];

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/health", get(health))
        .route("/execute", post(execute))
        .route("/contexts", get(list_contexts).post(create_context))
        .route("/contexts/{id}/restart", post(restart_context))
        .route("/contexts/{id}", delete(delete_context))
        .route("/{*rest}", any(nothing_there))
        .method_not_allowed_fallback(no_method)
}

async fn no_method() -> Refusal {
    Refusal::of_interpreter(Problem::new(problem::METHOD_NOT_ALLOWED, "the path does not know this method"))
}

/// Whether it runs, in the words of its own server.
async fn health(_: Aimed) -> &'static str {
    "\"OK\""
}

pub(super) async fn nothing_there(_: ByTrafficToken) -> Refusal {
    Refusal::of_interpreter(Problem::new(problem::NOT_FOUND, "there is no such path here; docs/E2B.md lists all"))
}

/// What is to be run. Fields that newer clients may send are passed over.
#[derive(Debug, Deserialize)]
struct Execute {
    code: String,
    #[serde(default)]
    context_id: Option<String>,
    #[serde(default)]
    language: Option<String>,
    #[serde(default)]
    env_vars: Option<BTreeMap<String, String>>,
}

/// Runs code, and tells what comes of it as it comes.
async fn execute(ByTrafficToken(sandbox): ByTrafficToken, body: Body) -> Result<Response, Refusal> {
    let Execute { code, context_id, language, env_vars } = json(&sandbox, body).await?;
    if context_id.is_some() && language.is_some() {
        let detail = "context_id and language were both given; a context has its language, so name one of the two";
        return Err(Refusal::of_interpreter(Problem::new(problem::INVALID_REQUEST, detail)));
    }
    let request = ExecuteRequest {
        code,
        context: context_id.map(|id| context_of(&id)).transpose()?,
        language: language.map(|name| normal(&name)).filter(|name| !name.is_empty()),
        // It is the caller who gives up on code here.
        timeout_seconds: Some(sandbox.session.spec.max_execution.as_secs_f64()),
        ..ExecuteRequest::default()
    };
    let env = env_vars.unwrap_or_default();
    let accepted = sandbox.app.service.execute_within(&sandbox.who, sandbox.id(), request, env).await;
    let execution = accepted.map_err(|error| refused(&sandbox, error))?;
    Ok(lines::told(sandbox, execution))
}

/// A context as clients are told of it.
#[derive(Debug, Serialize)]
struct Told {
    id: String,
    language: String,
    cwd: String,
}

impl From<ContextView> for Told {
    fn from(view: ContextView) -> Self {
        // The kernel of TypeScript runs both, and calls itself so.
        let language = if view.kernelspec == "javascript" { view.kernelspec } else { view.language };
        Self { id: view.id.to_string(), language: language.to_ascii_lowercase(), cwd: view.cwd }
    }
}

/// What a context is to be.
#[derive(Debug, Deserialize)]
struct Wanted {
    #[serde(default)]
    language: Option<String>,
    #[serde(default)]
    cwd: Option<String>,
}

/// In the order of their creation: clients take the last for the newest.
async fn list_contexts(ByTrafficToken(sandbox): ByTrafficToken) -> Result<Answer<Vec<Told>>, Refusal> {
    let contexts = sandbox.app.service.contexts(&sandbox.who, sandbox.id()).await;
    let contexts = contexts.map_err(|error| refused(&sandbox, error))?;
    Ok(Answer(contexts.into_iter().map(Told::from).collect()))
}

async fn create_context(ByTrafficToken(sandbox): ByTrafficToken, body: Body) -> Result<Answer<Told>, Refusal> {
    let Wanted { language, cwd } = json(&sandbox, body).await?;
    let language = language.map(|name| normal(&name)).filter(|name| !name.is_empty());
    let cwd = cwd.filter(|cwd| !cwd.is_empty());
    let request = ContextRequest { kernelspec: None, language, cwd };
    let created = sandbox.app.service.create_context(&sandbox.who, sandbox.id(), request, None).await;
    created.map(|view| Answer(view.into())).map_err(|error| refused(&sandbox, error))
}

async fn restart_context(ByTrafficToken(sandbox): ByTrafficToken, Path(id): Path<String>) -> Result<Response, Refusal> {
    let context = context_of(&id)?;
    let restarted = sandbox.app.service.restart(&sandbox.who, sandbox.id(), Some(context)).await;
    restarted.map(|_| nothing()).map_err(|error| refused(&sandbox, error))
}

async fn delete_context(ByTrafficToken(sandbox): ByTrafficToken, Path(id): Path<String>) -> Result<Response, Refusal> {
    let context = context_of(&id)?;
    let deleted = sandbox.app.service.delete_context(&sandbox.who, sandbox.id(), context).await;
    deleted.map(|_| nothing()).map_err(|error| refused(&sandbox, error))
}

/// The answer where there is nothing to say.
fn nothing() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], "null").into_response()
}

/// A language as it is named inside: clients are free with capitals and blanks.
fn normal(language: &str) -> String {
    language.trim().to_ascii_lowercase()
}

fn context_of(id: &str) -> Result<ContextId, Refusal> {
    id.parse().map_err(|_| no_context())
}

fn no_context() -> Refusal {
    let detail = "there is no such context in this sandbox; GET /contexts lists all";
    Refusal::of_interpreter(Problem::new(problem::NOT_FOUND, detail))
}

fn refused(sandbox: &Sandbox, error: Error) -> Refusal {
    match error {
        Error::NotFound("context") => no_context(),
        error => of_sandbox(error, sandbox.id(), |problem| {
            let is_kernels = problem.code == "kernel-failed";
            let refusal = Refusal::of_interpreter(problem);
            // By this its clients know it.
            if is_kernels { refusal.with_status(StatusCode::INTERNAL_SERVER_ERROR) } else { refusal }
        }),
    }
}

async fn json<T: DeserializeOwned>(sandbox: &Sandbox, body: Body) -> Result<T, Refusal> {
    let bytes = read(body, sandbox.app.bounds).await.map_err(Refusal::of_interpreter)?;
    let text: &[u8] = if bytes.trim_ascii().is_empty() { b"{}" } else { &bytes };
    serde_json::from_slice(text).map_err(|error| {
        let detail = format!("the body is not understood: {error}");
        Refusal::of_interpreter(Problem::new(problem::INVALID_REQUEST, detail))
    })
}
