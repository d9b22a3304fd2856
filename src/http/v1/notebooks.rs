//! Notebooks over HTTP: what a session has run, as `nbformat` 4.5 has it.

use std::convert::Infallible;

use axum::body::Body as RawBody;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;

use crate::domain::ids::SessionId;
use crate::http::App;
use crate::http::extract::{Caller, Id};
use crate::http::problem::Problem;
use crate::service::Notebook;

/// Bytes that are handed on at a time.
const PIECE: usize = 256 * 1024;

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
    let Notebook { bytes, room } = app.service.notebook(&who, id).await?;
    let length = bytes.len().to_string();
    let headers = [
        (header::CONTENT_TYPE, "application/x-ipynb+json".to_owned()),
        (header::CONTENT_LENGTH, length),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{id}.ipynb\"")),
    ];
    // The room is given back with the last piece, or when the caller is gone.
    let pieces = stream::unfold((bytes, room), |(mut bytes, room)| async move {
        let piece = bytes.split_to(bytes.len().min(PIECE));
        (!piece.is_empty()).then_some((Ok::<_, Infallible>(piece), (bytes, room)))
    });
    Ok((headers, RawBody::from_stream(pieces)).into_response())
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
