//! Notebooks over HTTP: what a session has run, as `nbformat` 4.5 has it.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::domain::ids::SessionId;
use crate::http::App;
use crate::http::extract::{Caller, Id};
use crate::http::problem::Problem;

/// Fetch a session's notebook
///
/// All cells that have run, with their outputs. It stays for a while after the session has ended.
#[utoipa::path(get, path = "/v1/sessions/{id}/notebook", operation_id = "get_notebook", tag = "sessions", params(("id" = String, Path)),
    responses((status = 200, content_type = "application/x-ipynb+json", body = Object), (status = "4XX", body = Problem)))]
pub async fn get_notebook(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Response, Problem> {
    let bytes = app.service.notebook(&who, id).await?;
    let headers = [
        (header::CONTENT_TYPE, "application/x-ipynb+json".to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{id}.ipynb\"")),
    ];
    Ok((headers, bytes).into_response())
}

/// Forget a session's notebook
#[utoipa::path(delete, path = "/v1/sessions/{id}/notebook", operation_id = "delete_notebook", tag = "sessions",
    params(("id" = String, Path)), responses((status = 204), (status = "4XX", body = Problem)))]
pub async fn delete_notebook(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<StatusCode, Problem> {
    app.service.delete_notebook(&who, id).await?;
    Ok(StatusCode::NO_CONTENT)
}
