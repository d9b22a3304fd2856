//! Many files at once over HTTP: archives in both directions, forms, and what changes in a folder.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body as RawBody, BodyDataStream, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use cellblock_wire::files::{Archive, Event as Change, Watch};
use futures_util::stream::{self, Stream};
use http_body_util::BodyExt;
use multer::Multipart;
use serde::Serialize;
use utoipa::ToSchema;

use super::files::FileView;
use super::sessions::bad_parameter;
use crate::domain::ids::SessionId;
use crate::http::App;
use crate::http::extract::{Answer, Caller, Id, Params};
use crate::http::problem::{self, Problem};
use crate::service::files::WriteFile;
use crate::service::transfer::{Pieces, STALLED};

/// A silent stream says that it lives this often.
const PING: Duration = Duration::from_secs(15);
/// Longest event of a guest's: two paths, each byte of which may take six.
const MAX_LINE: usize = 64 * 1024;
/// Files of one form.
const MAX_FILES: usize = 1000;
/// Bytes of a form's heads, and of what is read before it is taken.
const MAX_UNTAKEN: usize = 1024 * 1024;

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
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let boundary = multer::parse_boundary(kind).map_err(|_| {
        Problem::new(problem::UNSUPPORTED_MEDIA_TYPE, "send a form as multipart/form-data, or one file with PUT")
    })?;
    let untaken = Arc::new(AtomicUsize::new(0));
    let mut form = Multipart::new(Sparing::new(request.into_body(), &untaken), boundary);
    let mut files = Vec::new();
    loop {
        let next = tokio::time::timeout(STALLED, form.next_field()).await;
        let Some(field) = next.map_err(|_| stalled())?.map_err(|error| broken(&error))? else { break };
        untaken.store(0, Ordering::Relaxed);
        let Some(name) = field.file_name().filter(|name| !name.is_empty()).map(str::to_owned) else {
            return Err(Problem::new(problem::INVALID_REQUEST, "a part of the form has no file name"));
        };
        if files.len() == MAX_FILES {
            return Err(Problem::new(problem::INVALID_REQUEST, format!("a form may have {MAX_FILES} files")));
        }
        let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
        files.push(write_field(&app, &who, id, path, field, &untaken).await?);
    }
    let location = [(header::LOCATION, HeaderValue::from_str(&format!("/v1/sessions/{id}/files")))];
    let location = location.into_iter().filter_map(|(name, value)| Some((name, value.ok()?))).collect::<HeaderMap>();
    Ok((StatusCode::CREATED, location, Answer(UploadedFiles { files })).into_response())
}

/// Writes one file of a form. Its pieces are handed over, since the form itself lives only here.
pub(in crate::http) async fn write_field(
    app: &App,
    who: &crate::service::keys::Principal,
    id: SessionId,
    path: String,
    mut field: multer::Field<'_>,
    untaken: &AtomicUsize,
) -> Result<FileView, Problem> {
    let (pieces, source) = tokio::sync::mpsc::channel::<Result<Bytes, ()>>(1);
    let source = tokio_stream::wrappers::ReceiverStream::new(source);
    let asked = WriteFile { path, ..WriteFile::default() };
    let reading = async {
        loop {
            let piece = match tokio::time::timeout(STALLED, field.chunk()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => {
                    drop(pieces);
                    return None;
                }
                Ok(Err(error)) => {
                    // It is not whole.
                    let _ = pieces.send(Err(())).await;
                    return Some(broken(&error));
                }
                Err(_) => {
                    let _ = pieces.send(Err(())).await;
                    return Some(stalled());
                }
            };
            untaken.store(0, Ordering::Relaxed);
            if pieces.send(Ok(piece)).await.is_err() {
                return None;
            }
        }
    };
    let (problem, written) = futures_util::future::join(reading, app.service.write_file(who, id, asked, source)).await;
    if let Some(problem) = problem {
        return Err(problem);
    }
    let written = written?;
    let stat = written.stat.ok_or_else(|| Problem::new(problem::GUEST_UNREACHABLE, "the file was not written"))?;
    Ok(FileView::of(&stat))
}

pub(in crate::http) fn stalled() -> Problem {
    Problem::new(problem::REQUEST_TIMEOUT, "nothing of the form came for 30 s")
}

pub(in crate::http) fn broken(error: &multer::Error) -> Problem {
    let error: String = error.to_string().chars().take(200).collect();
    Problem::new(problem::INVALID_REQUEST, format!("the form is not understood: {error}"))
}

/// A form's body, a piece at a time: its reader would otherwise take all that there is, and hold it.
pub(in crate::http) struct Sparing {
    source: BodyDataStream,
    /// Bytes that were read since the reader has given something on.
    untaken: Arc<AtomicUsize>,
    rests: bool,
}

impl Sparing {
    /// A body, and what its reader sets to nothing whenever it has given something on.
    pub(in crate::http) fn new(body: RawBody, untaken: &Arc<AtomicUsize>) -> Self {
        Self { source: body.into_data_stream(), untaken: Arc::clone(untaken), rests: false }
    }
}

impl Stream for Sparing {
    type Item = Result<Bytes, std::io::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.rests) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let piece = std::task::ready!(Pin::new(&mut self.source).poll_next(cx));
        self.rests = true;
        Poll::Ready(piece.map(|piece| {
            let piece = piece.map_err(std::io::Error::other)?;
            let untaken = self.untaken.fetch_add(piece.len(), Ordering::Relaxed) + piece.len();
            if untaken > MAX_UNTAKEN {
                return Err(std::io::Error::other("the head of a part is too long"));
            }
            Ok(piece)
        }))
    }
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
    let pieces = app.service.watch_files(&who, id, &asked).await?;
    let events = stream::unfold((pieces, Lines::default()), |(mut pieces, mut lines)| async move {
        let event = next_event(&mut pieces, &mut lines).await?;
        Some((Ok::<_, Infallible>(told(event)), (pieces, lines)))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(PING).text("ping")).into_response())
}

/// The next event of a guest's. What is none ends the stream.
async fn next_event(pieces: &mut Pieces, lines: &mut Lines) -> Option<Change> {
    loop {
        if let Some(line) = lines.next() {
            return serde_json::from_slice(&line).ok();
        }
        if lines.buffer.len() > MAX_LINE {
            return None;
        }
        lines.buffer.extend_from_slice(&pieces.frame().await?.ok()?.into_data().ok()?);
    }
}

/// Lines that come in pieces, however small: each byte is looked at once.
#[derive(Default)]
struct Lines {
    buffer: BytesMut,
    /// Bytes at its beginning that hold no line's end.
    looked: usize,
}

impl Lines {
    fn next(&mut self) -> Option<BytesMut> {
        let looked = std::mem::replace(&mut self.looked, self.buffer.len());
        let end = looked + self.buffer[looked..].iter().position(|byte| *byte == b'\n')? + 1;
        self.looked = 0;
        Some(self.buffer.split_to(end))
    }
}

fn told(change: Change) -> Event {
    let none = ChangeView { path: None, to: None, is_directory: false, polls_ms: None };
    let (name, view) = match change {
        Change::Watching { polls_ms } => ("watching", ChangeView { polls_ms, ..none }),
        Change::Created { path, is_folder } => {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_the_same_in_whatever_pieces_they_come() {
        let text = b"{\"a\": 1}\n\n{}\nrest";
        for step in 1..text.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for piece in text.chunks(step) {
                lines.buffer.extend_from_slice(piece);
                seen.extend(std::iter::from_fn(|| lines.next()).map(|line| line.to_vec()));
            }
            assert_eq!(seen, [&b"{\"a\": 1}\n"[..], b"\n", b"{}\n"], "in pieces of {step}");
            assert_eq!(&lines.buffer[..], b"rest");
        }
    }

    #[test]
    fn many_lines_in_one_piece_and_a_line_in_many_pieces_cost_no_more_than_their_length() {
        let began = std::time::Instant::now();
        let mut lines = Lines::default();
        lines.buffer.extend_from_slice(&[b'\n'; 1 << 20]);
        assert_eq!(std::iter::from_fn(|| lines.next()).count(), 1 << 20);
        for _ in 0..200_000 {
            lines.buffer.extend_from_slice(b"x");
            assert!(lines.next().is_none());
        }
        // What looks at all of it again, or moves it, takes minutes.
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
    }
}
