//! Commands of operators over HTTP. Their keys need the scope "admin".

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Params};
use crate::http::problem::Problem;
use crate::service::admin::{Changed, Draining};
use crate::session::reconcile::Report;
use crate::session::registry::AfterDrain;

/// No fields: commands of operators take no arguments.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// A server that is stopping.
#[derive(Debug, Serialize, ToSchema)]
pub struct DrainView {
    /// Always `draining`.
    status: &'static str,
    /// Sessions that have not ended.
    sessions: usize,
    /// Executions that run or wait.
    executions: usize,
    /// They have this long; the server ends earlier if all have ended.
    grace_seconds: f64,
    /// What becomes of sessions' containers then: `keep` leaves them to the next start, `remove` ends the sessions.
    containers: &'static str,
}

impl From<Draining> for DrainView {
    fn from(draining: Draining) -> Self {
        Self {
            status: "draining",
            sessions: draining.sessions,
            executions: draining.executions,
            grace_seconds: draining.grace.as_secs_f64(),
            containers: match draining.after {
                AfterDrain::Keep => "keep",
                AfterDrain::Remove => "remove",
            },
        }
    }
}

/// What a comparison of the engine with the sessions has found and done.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReconcileView {
    /// Containers of sessions on the engine, before anything was removed.
    cells_seen: usize,
    /// Those that no session knew, and that are gone now.
    cells_removed: Vec<String>,
    /// Sessions whose container is not there or has ended. They look for themselves, and end as `lost` or `oom`.
    sessions_told: Vec<String>,
    /// Volumes that earlier versions of the server had left, and that are gone now.
    volumes_removed: Vec<String>,
    /// What could not be removed, in the engine's words. The next round tries again.
    errors: Vec<String>,
}

impl From<Report> for ReconcileView {
    fn from(report: Report) -> Self {
        Self {
            cells_seen: report.seen,
            cells_removed: report.removed.iter().map(ToString::to_string).collect(),
            sessions_told: report.told.iter().map(ToString::to_string).collect(),
            volumes_removed: report.swept,
            errors: report.errors.iter().map(ToString::to_string).collect(),
        }
    }
}

/// How much the log tells.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogView {
    /// `off`, `error`, `warn`, `info`, `debug` or `trace`, also by module: `info,cellblock::engine=debug`.
    level: String,
}

/// Look at the log's level
///
/// Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/log", operation_id = "get_log_level", tag = "admin",
    responses((status = 200, body = LogView), (status = "4XX", body = Problem)))]
pub async fn get_log_level(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
) -> Result<Answer<LogView>, Problem> {
    params.only(&[])?;
    Ok(Answer(LogView { level: app.service.log_level(&who)? }))
}

/// Change the log's level
///
/// At once, and until the server ends: the next start has what its configuration says. Needs the scope `admin`.
#[utoipa::path(put, path = "/v1/admin/log", operation_id = "set_log_level", tag = "admin", request_body = LogView,
    responses((status = 200, body = LogView), (status = "4XX", body = Problem)))]
pub async fn set_log_level(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
    Body(asked): Body<LogView>,
) -> Result<Answer<LogView>, Problem> {
    params.only(&[])?;
    Ok(Answer(LogView { level: app.service.set_log_level(&who, &asked.level)? }))
}

/// Stop the server
///
/// The same as SIGTERM: nothing new is accepted from now on, running executions get a grace, and the server exits. Its containers stay for the next start or are
/// removed, as its configuration says. Needs the scope `admin`.
#[utoipa::path(post, path = "/v1/admin/drain", operation_id = "drain_server", tag = "admin",
    responses((status = 202, body = DrainView), (status = "4XX", body = Problem)))]
pub async fn drain_server(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
    Body(Nothing {}): Body<Nothing>,
) -> Result<Response, Problem> {
    params.only(&[])?;
    let draining = app.service.drain(&who)?;
    Ok((StatusCode::ACCEPTED, Answer(DrainView::from(draining))).into_response())
}

/// A value of the configuration that is another now.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChangeView {
    /// Its key, such as `limits.sessions`. Of `server.tls_cert_file` it is the file that is another: its SHA-256, as `"sha256:…"`.
    key: String,
    /// As TOML; nothing where there was no such key.
    before: Option<String>,
    /// As TOML; nothing where there is no such key any more.
    after: Option<String>,
}

/// What a server has taken over.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReloadView {
    /// In the order of their keys.
    changes: Vec<ChangeView>,
}

impl From<Changed> for ChangeView {
    fn from(Changed { key, before, after }: Changed) -> Self {
        Self { key, before, after }
    }
}

/// Read the configuration again
///
/// The same as SIGHUP: limits, templates with their pools, quotas, the log's level and a certificate that was exchanged are taken over, all that is different or, where something is wrong or needs a
/// restart, nothing (`config-rejected`, with a line for each). Sessions that are there keep what they have. Needs the scope `admin`.
#[utoipa::path(post, path = "/v1/admin/reload", operation_id = "reload_server", tag = "admin",
    responses((status = 200, body = ReloadView), (status = "4XX", body = Problem)))]
pub async fn reload_server(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
    Body(Nothing {}): Body<Nothing>,
) -> Result<Answer<ReloadView>, Problem> {
    params.only(&[])?;
    let changes = app.service.reload(&who).await?;
    Ok(Answer(ReloadView { changes: changes.into_iter().map(ChangeView::from).collect() }))
}

/// Compare the engine with the sessions now
///
/// The server does so every 30 seconds by itself. Answers once it is done. Needs the scope `admin`.
#[utoipa::path(post, path = "/v1/admin/reconcile", operation_id = "reconcile_server", tag = "admin",
    responses((status = 200, body = ReconcileView), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn reconcile_server(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
    Body(Nothing {}): Body<Nothing>,
) -> Result<Answer<ReconcileView>, Problem> {
    params.only(&[])?;
    Ok(Answer(app.service.reconcile(&who).await?.into()))
}
