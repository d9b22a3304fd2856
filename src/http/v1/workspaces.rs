//! Workspaces over HTTP.

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::sessions::{page_limit, time};
use crate::domain::ids::WorkspaceId;
use crate::http::App;
use crate::http::extract::{Answer, Caller, Id, Params};
use crate::http::problem::Problem;
use crate::session::workspaces::WorkspaceView as Found;

/// A working folder that outlives the sessions that have it, one after the other.
#[derive(Debug, Serialize, ToSchema)]
pub struct WorkspaceView {
    /// Its name.
    name: String,
    /// The template whose sessions may have it.
    template: String,
    /// The session that has it now.
    session: Option<String>,
    /// The most bytes that it may hold, where the host enforces that; nothing where there is no quota.
    quota_bytes: Option<u64>,
    /// When it was made.
    created_at: String,
    /// When a session last got it or gave it back.
    last_used_at: String,
    /// When it goes with all that is in it if no session has it until then; nothing while one does.
    expires_at: Option<String>,
}

/// A page of workspaces.
#[derive(Debug, Serialize, ToSchema)]
pub struct WorkspacePage {
    /// In the order of their making.
    workspaces: Vec<WorkspaceView>,
    /// Pass it as `cursor` for the next page; nothing on the last one.
    next_cursor: Option<String>,
}

impl From<Found> for WorkspaceView {
    fn from(found: Found) -> Self {
        Self {
            session: found.session.map(|id| id.to_string()),
            expires_at: found.expires_at().map(time),
            created_at: time(found.record.created_at),
            last_used_at: time(found.record.last_used),
            quota_bytes: found.record.quota_bytes,
            name: found.record.name,
            template: found.record.template,
        }
    }
}

/// List your workspaces
///
/// They come to be with the sessions that name them.
#[utoipa::path(get, path = "/v1/workspaces", operation_id = "list_workspaces", tag = "workspaces",
    params(("limit" = Option<usize>, Query, description = "1 to 200; 50 when absent"),
        ("cursor" = Option<String>, Query, description = "From `next_cursor`")),
    responses((status = 200, body = WorkspacePage), (status = "4XX", body = Problem)))]
pub async fn list_workspaces(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
) -> Result<Answer<WorkspacePage>, Problem> {
    let params = params.only(&["limit", "cursor"])?;
    let limit = page_limit(&params)?;
    let after = params.parse::<WorkspaceId>("cursor", "a value of next_cursor")?;
    let mut found = app.service.list_workspaces(&who, after)?.into_iter();
    let page: Vec<_> = found.by_ref().take(limit).collect();
    let next_cursor = found.next().and(page.last()).map(|last| last.record.id.to_string());
    Ok(Answer(WorkspacePage { workspaces: page.into_iter().map(WorkspaceView::from).collect(), next_cursor }))
}

/// Look at a workspace
#[utoipa::path(get, path = "/v1/workspaces/{name}", operation_id = "get_workspace", tag = "workspaces",
    params(("name" = String, Path)), responses((status = 200, body = WorkspaceView), (status = "4XX", body = Problem)))]
pub async fn get_workspace(
    State(app): State<App>,
    Caller(who): Caller,
    Id(name): Id<String>,
) -> Result<Answer<WorkspaceView>, Problem> {
    Ok(Answer(app.service.workspace(&who, &name)?.into()))
}

/// Delete a workspace
///
/// With all that is in it. Its name is free at once. Not while a session has it.
#[utoipa::path(delete, path = "/v1/workspaces/{name}", operation_id = "delete_workspace", tag = "workspaces",
    params(("name" = String, Path)), responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn delete_workspace(
    State(app): State<App>,
    Caller(who): Caller,
    Id(name): Id<String>,
) -> Result<StatusCode, Problem> {
    app.service.delete_workspace(&who, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}
