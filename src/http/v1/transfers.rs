//! Many files at once over HTTP: archives in both directions, forms, and what changes in a folder.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body as RawBody;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use cellblock_wire::files::{Archive, Event as Change, Watch};
use futures_util::stream;
use serde::Serialize;
use utoipa::ToSchema;

use super::files::FileView;
use super::sessions::bad_parameter;
use crate::domain::ids::SessionId;
use crate::http::App;
use crate::http::extract::{Answer, Caller, Id, Params};
use crate::http::form::Form;
use crate::http::problem::{self, Problem};
use crate::service::files::WriteFile;

/// A silent stream says that it lives this often.
const PING: Duration = Duration::from_secs(15);

/// The files of a form that were written.
#[derive(Debug, Serialize, ToSchema)]
pub struct UploadedFiles {
    /// In the order of the form.
    files: Vec<FileView>,
}

/// An archive was unpacked.
#[derive(Debug, Serialize, ToSchema)]
pub struct UnpackedView {
    /// Entries of it.
    entries: u64,
    /// Bytes of its files.
    bytes: u64,
}

/// A change in a folder.
#[derive(Debug, Serialize, ToSchema)]
struct ChangeView {
    /// Where; before a move.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    /// Where it was moved to.
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    /// What was created is a folder.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    is_directory: bool,
    /// Changes are looked for every so many milliseconds, since the host has nothing better.
    #[serde(skip_serializing_if = "Option::is_none")]
    polls_ms: Option<u64>,
}

fn archive(params: Params) -> Result<Archive, Problem> {
    let params = params.only(&["path", "format"])?;
    let gzip = match params.get("format").unwrap_or("tar") {
        "tar" => false,
        "tar.gz" | "tgz" => true,
        _ => return Err(bad_parameter("format", "allowed is tar or tar.gz")),
    };
    Ok(Archive { path: params.get("path").unwrap_or_default().to_owned(), gzip })
}

/// Download a folder
///
/// As a tar archive of files, folders and links.
#[utoipa::path(get, path = "/v1/sessions/{id}/archive", operation_id = "pack_files", tag = "files",
    params(("id" = String, Path), ("path" = Option<String>, Query, description = "The working folder when absent"),
        ("format" = Option<String>, Query, description = "`tar` or `tar.gz`; `tar` when absent")),
    responses((status = 200, content_type = "application/x-tar", body = Vec<u8>), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn pack_files(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
) -> Result<Response, Problem> {
    let asked = archive(params)?;
    let body = app.service.pack_files(&who, id, &asked).await?;
    let (mime, name) = match asked.gzip {
        true => ("application/gzip", "attachment; filename=\"files.tar.gz\""),
        false => ("application/x-tar", "attachment; filename=\"files.tar\""),
    };
    Ok(([(header::CONTENT_TYPE, mime), (header::CONTENT_DISPOSITION, name)], RawBody::new(body)).into_response())
}

/// Upload a folder
///
/// A tar archive is unpacked into a folder, which is made if it is not there. All of it is put in place, or, where something of it is refused or there is no room,
/// nothing: links that lead out, devices, sparse files, absolute names and those with `..` are refused, as are more than 100,000 entries.
#[utoipa::path(put, path = "/v1/sessions/{id}/archive", operation_id = "unpack_files", tag = "files",
    params(("id" = String, Path), ("path" = Option<String>, Query, description = "The working folder when absent"),
        ("format" = Option<String>, Query, description = "`tar` or `tar.gz`; `tar` when absent")),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 200, body = UnpackedView), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn unpack_files(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
    request: Request,
) -> Result<Answer<UnpackedView>, Problem> {
    let asked = archive(params)?;
    let body = request.into_body().into_data_stream();
    let done = app.service.unpack_files(&who, id, &asked, body).await?;
    Ok(Answer(UnpackedView { entries: done.entries, bytes: done.bytes }))
}

/// Upload files as a form
///
/// Each part with a file name is written, below `path`; the name may have folders in it. Those that were written before one is refused stay.
#[utoipa::path(post, path = "/v1/sessions/{id}/files", operation_id = "upload_files", tag = "files",
    params(("id" = String, Path), ("path" = Option<String>, Query, description = "A folder; the working folder when absent")),
    request_body(content = Vec<u8>, content_type = "multipart/form-data"),
    responses((status = 201, body = UploadedFiles), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn upload_files(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    let params = params.only(&["path"])?;
    let folder = params.get("path").unwrap_or_default();
    app.service.may_change_files(&who, id)?;
    let mut form = Form::open(&headers, request.into_body().into_data_stream())?;
    let mut files = Vec::new();
    while let Some(field) = form.next().await? {
        let Some(name) = field.file_name().filter(|name| !name.is_empty()).map(str::to_owned) else {
            return Err(Problem::new(problem::INVALID_REQUEST, "a part of the form has no file name"));
        };
        let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
        let asked = WriteFile { path, ..WriteFile::default() };
        let written = form.write(&app, (&who, id), asked, field).await?;
        let stat = written.stat.ok_or_else(|| Problem::new(problem::GUEST_UNREACHABLE, "the file was not written"))?;
        files.push(FileView::of(&stat));
    }
    let location = [(header::LOCATION, HeaderValue::from_str(&format!("/v1/sessions/{id}/files")))];
    let location = location.into_iter().filter_map(|(name, value)| Some((name, value.ok()?))).collect::<HeaderMap>();
    Ok((StatusCode::CREATED, location, Answer(UploadedFiles { files })).into_response())
}

/// Watch a folder
///
/// Server-sent events: `watching` first, then `created`, `modified`, `deleted` and `moved`, each with `path`; `overflow` when some were lost, and the folder has to be
/// looked at again. It ends with the session, or when the folder is gone.
#[utoipa::path(get, path = "/v1/sessions/{id}/files:watch", operation_id = "watch_files", tag = "files",
    params(("id" = String, Path), ("path" = Option<String>, Query, description = "The working folder when absent"), ("recursive" = Option<bool>, Query)),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn watch_files(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
) -> Result<Response, Problem> {
    let params = params.only(&["path", "recursive"])?;
    let recursive = params.parse::<bool>("recursive", "true or false")?.unwrap_or_default();
    let asked = Watch { path: params.get("path").unwrap_or_default().to_owned(), recursive };
    let changes = app.service.changes(&who, id, &asked).await?;
    let events = stream::unfold(changes, |mut changes| async move {
        let event = changes.next().await?;
        Some((Ok::<_, Infallible>(told(event)), changes))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(PING).text("ping")).into_response())
}

fn told(change: Change) -> Event {
    let none = ChangeView { path: None, to: None, is_directory: false, polls_ms: None };
    let (name, view) = match change {
        Change::Watching { polls_ms } => ("watching", ChangeView { polls_ms, ..none }),
        Change::Created { path, is_folder, .. } => {
            ("created", ChangeView { path: Some(path), is_directory: is_folder, ..none })
        }
        Change::Modified { path } => ("modified", ChangeView { path: Some(path), ..none }),
        Change::Deleted { path } => ("deleted", ChangeView { path: Some(path), ..none }),
        Change::Moved { path, to } => ("moved", ChangeView { path: Some(path), to: Some(to), ..none }),
        Change::Overflow => ("overflow", none),
    };
    // A structure of texts and numbers: writing it can't fail.
    Event::default().event(name).data(serde_json::to_string(&view).unwrap_or_default())
}
