//! Files over HTTP: lists, files and parts of them, conditions, folders. Archives, forms and watches are in `transfers`.

use axum::body::{Body as RawBody, HttpBody};
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use cellblock_wire::files::{
    Conditions, Delete, Kind, List, MAX_DEPTH, MAX_LISTED, Made, Move, Opened, Range, Read, Stat, Upload,
};
use cellblock_wire::link::escape_path;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::sessions::{bad_parameter, time};
use crate::domain::ids::SessionId;
use crate::domain::spec::FieldError;
use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Id, Params};
use crate::http::problem::{self, Problem};
use crate::service::Error;
use crate::service::files::{FileFault, FileWritten, WriteFile};

/// Entries of a list when nothing is asked for.
const PAGE: usize = 1000;
/// Most tags of one condition.
const MAX_TAGS: usize = 32;
const UPLOAD_OFFSET: HeaderName = HeaderName::from_static("upload-offset");
const UPLOAD_COMPLETE: HeaderName = HeaderName::from_static("upload-complete");
const REPR_DIGEST: HeaderName = HeaderName::from_static("repr-digest");

/// A session, and a path in it.
#[derive(Debug)]
pub struct InSession(pub SessionId, pub String);

impl<S: Send + Sync> FromRequestParts<S> for InSession {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = axum::extract::Path::<(String, String)>::from_request_parts(parts, state).await;
        let axum::extract::Path((id, path)) =
            path.map_err(|_| Problem::new(problem::INVALID_REQUEST, "the path is no UTF-8, percent-encoded"))?;
        let id = id.parse().map_err(|_| Problem::new(problem::NOT_FOUND, "there is nothing under that id"))?;
        Ok(Self(id, path))
    }
}

/// A file, a folder or something else.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = File)]
pub struct FileView {
    /// Its path: relative to the working folder, or absolute where it is not in that.
    path: String,
    /// The last name of its path.
    name: String,
    /// `file`, `directory`, `symlink` or `other`.
    kind: &'static str,
    /// Its length in bytes.
    size: u64,
    /// Its permissions, in octal.
    mode: String,
    /// When it was written last.
    modified_at: String,
    /// Its tag, for `If-Match` and `If-None-Match`.
    etag: String,
    /// SHA-256 of its content in hex, where it is known from what was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// What is in a folder.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileList {
    /// Each folder before what is in it.
    files: Vec<FileView>,
    /// Entries that can't be told: their names are no UTF-8, or too long.
    omitted: u64,
    /// There are more.
    truncated: bool,
    /// Pass it as `cursor` for the next page; nothing on the last one.
    next_cursor: Option<String>,
}

/// A part of an upload has come.
#[derive(Debug, Serialize, ToSchema)]
pub struct UploadView {
    /// The upload's name.
    upload: String,
    /// Bytes that are there: the next part begins there.
    offset: u64,
}

/// A folder to be made.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeFolder {
    /// Where. Those that it is in are made as well.
    path: String,
}

/// Something to be moved.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveFile {
    /// From here …
    from: String,
    /// … to here. Folders on the way are made.
    to: String,
    /// A file that is there is replaced.
    #[serde(default)]
    overwrite: bool,
}

impl FileView {
    pub(super) fn of(stat: &Stat) -> Self {
        Self {
            name: stat.path.rsplit('/').next().unwrap_or_default().to_owned(),
            path: stat.path.clone(),
            kind: match stat.kind {
                Kind::File => "file",
                Kind::Directory => "directory",
                Kind::Symlink => "symlink",
                Kind::Other => "other",
            },
            size: stat.size,
            mode: format!("{:04o}", stat.mode & 0o7777),
            modified_at: time(modified(stat)),
            etag: quoted(&stat.etag),
            sha256: None,
        }
    }

    fn with_hash(self, sha256: Option<String>) -> Self {
        Self { sha256, ..self }
    }
}

/// Code inside may give a file any time.
fn modified(stat: &Stat) -> Timestamp {
    Timestamp::from_nanosecond(stat.modified.into()).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn quoted(etag: &str) -> String {
    format!("\"{etag}\"")
}

/// List files
///
/// Of a `path` that is no folder, that itself.
#[utoipa::path(get, path = "/v1/sessions/{id}/files", operation_id = "list_files", tag = "files",
    params(("id" = String, Path), ("path" = Option<String>, Query, description = "The working folder when absent"),
        ("depth" = Option<usize>, Query, description = "How many folders deep, 1 to 32; 1 when absent"),
        ("limit" = Option<usize>, Query, description = "1 to 2000; 1000 when absent"),
        ("cursor" = Option<String>, Query, description = "From `next_cursor`")),
    responses((status = 200, body = FileList), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn list_files(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
) -> Result<Answer<FileList>, Problem> {
    let params = params.only(&["path", "depth", "limit", "cursor"])?;
    let within = |name: &str, allowed: &str, most: usize, default: usize| {
        let number = params.parse::<usize>(name, allowed)?.unwrap_or(default);
        if (1..=most).contains(&number) {
            Ok(number)
        } else {
            Err(bad_parameter(name, &format!("allowed is {allowed}")))
        }
    };
    let asked = List {
        path: params.get("path").unwrap_or_default().to_owned(),
        depth: within("depth", "1 to 32", MAX_DEPTH, 1)?,
        limit: within("limit", "1 to 2000", MAX_LISTED, PAGE)?,
        after: params.get("cursor").map(str::to_owned),
        attributes: false,
    };
    let listing = app.service.list_files(&who, id, &asked).await?;
    let last = listing.entries.last().map(|entry| entry.path.clone());
    Ok(Answer(FileList {
        files: listing.entries.iter().map(FileView::of).collect(),
        omitted: listing.omitted,
        truncated: listing.truncated,
        next_cursor: last.filter(|_| listing.truncated),
    }))
}

/// Read a file
///
/// Whole, or a part of it (`Range`, one at a time). Links are followed as long as they stay below the folder.
#[utoipa::path(get, path = "/v1/sessions/{id}/files/{*path}", operation_id = "read_file", tag = "files",
    params(("id" = String, Path), ("path" = String, Path, description = "Relative to the working folder, percent-encoded; `%2Ftmp%2F…` is absolute"),
        ("Range" = Option<String>, Header), ("If-Range" = Option<String>, Header), ("If-Match" = Option<String>, Header), ("If-None-Match" = Option<String>, Header)),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), (status = 206, description = "A part of it"),
        (status = 304, description = "You have it"), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn read_file(
    State(app): State<App>,
    Caller(who): Caller,
    InSession(id, path): InSession,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    params.only(&[])?;
    let asked = Read { range: range(&headers), if_range: if_range(&headers), conditions: conditions(&headers)?, path };
    let (opened, body) = match app.service.read_file(&who, id, &asked).await {
        Err(error @ Error::File(FileFault::Range(size), _)) => {
            let whole = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((whole, Problem::from(error)).into_response());
        }
        answer => answer?,
    };
    let Opened { stat, first, length, is_part, is_known } = opened;
    let mut response = match is_known {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => Response::new(RawBody::new(body)),
    };
    describe(response.headers_mut(), &asked.path, &stat);
    if is_known {
        return Ok(response);
    }
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    if is_part {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let part = format!("bytes {first}-{}/{}", first + length.saturating_sub(1), stat.size);
        if let Ok(part) = HeaderValue::from_str(&part) {
            response.headers_mut().insert(header::CONTENT_RANGE, part);
        }
    }
    Ok(response)
}

/// Look at a file
///
/// What reading it would say of it. With `upload`, how much of that upload is there (`Upload-Offset`).
#[utoipa::path(head, path = "/v1/sessions/{id}/files/{*path}", operation_id = "head_file", tag = "files",
    params(("id" = String, Path), ("path" = String, Path), ("upload" = Option<String>, Query)),
    responses((status = 200, description = "It is there"), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn head_file(
    State(app): State<App>,
    Caller(who): Caller,
    InSession(id, path): InSession,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let params = params.only(&["upload"])?;
    if let Some(upload) = params.get("upload") {
        let received = app.service.upload_received(&who, id, &Upload { path, upload: upload.to_owned() }).await?;
        let told = [(UPLOAD_OFFSET, received.to_string()), (UPLOAD_COMPLETE, "?0".to_owned())];
        return Ok((StatusCode::NO_CONTENT, told).into_response());
    }
    let conditions = conditions(&headers)?;
    let mut stat = app.service.stat_file(&who, id, &path).await?;
    if stat.kind == Kind::Symlink {
        // What it leads to is what is read. Its bytes are not asked for.
        stat = app.service.read_file(&who, id, &Read { path: path.clone(), ..Read::default() }).await?.0.stat;
    }
    if !conditions.match_holds(Some(&stat.etag)) {
        return Err(Error::File(FileFault::Precondition, "the file has another tag".to_owned()).into());
    }
    let is_known = !conditions.none_match_holds(Some(&stat.etag));
    let status = if is_known { StatusCode::NOT_MODIFIED } else { StatusCode::OK };
    let mut response = status.into_response();
    describe(response.headers_mut(), &path, &stat);
    if !is_known && stat.kind == Kind::File {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(stat.size));
    }
    Ok(response)
}

/// What is said of a file in the head of an answer. Its name and its content come from code inside: nothing of it may run in a browser.
fn describe(headers: &mut HeaderMap, path: &str, stat: &Stat) {
    let name = path.rsplit('/').next().unwrap_or_default();
    let mime = match stat.kind {
        Kind::Directory => "inode/directory",
        _ => mime_guess::from_path(name).first_raw().unwrap_or("application/octet-stream"),
    };
    let modified = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&modified(stat));
    let told = [
        (header::CONTENT_TYPE, mime.to_owned()),
        (header::ETAG, quoted(&stat.etag)),
        (header::LAST_MODIFIED, modified.unwrap_or_default()),
        (header::ACCEPT_RANGES, "bytes".to_owned()),
        (header::CACHE_CONTROL, "private, no-cache".to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename*=UTF-8''{}", escape_path(name))),
        (header::CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'".to_owned()),
        (HeaderName::from_static("x-file-kind"), FileView::of(stat).kind.to_owned()),
        (HeaderName::from_static("x-file-mode"), format!("{:04o}", stat.mode & 0o7777)),
    ];
    for (name, value) in told {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    }
}

/// Write a file
///
/// It is there whole, or not at all; folders on the way are made. With `sha256` (or `Repr-Digest: sha-256=:…:`) nothing is written where a file of that content is
/// there already, and other content is refused; the answer has the hash then, and where the file came in parts. With `upload`, a name of your choice, it goes on where it broke off: each request brings the part from
/// `Upload-Offset` on, `Upload-Complete: ?0` says that more follows, and `HEAD …?upload=` tells how much is there. What is not gone on with is forgotten in ten minutes.
#[utoipa::path(put, path = "/v1/sessions/{id}/files/{*path}", operation_id = "write_file", tag = "files",
    params(("id" = String, Path), ("path" = String, Path), ("mode" = Option<String>, Query, description = "Permissions in octal, up to 0777"),
        ("sha256" = Option<String>, Query), ("upload" = Option<String>, Query), ("Upload-Offset" = Option<u64>, Header), ("Upload-Complete" = Option<String>, Header),
        ("Repr-Digest" = Option<String>, Header), ("If-Match" = Option<String>, Header), ("If-None-Match" = Option<String>, Header)),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 201, body = FileView), (status = 200, body = FileView, description = "It replaces one, or was there already"),
        (status = 202, body = UploadView, description = "A part has come"), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn write_file(
    State(app): State<App>,
    Caller(who): Caller,
    InSession(id, path): InSession,
    params: Params,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, Problem> {
    let params = params.only(&["mode", "sha256", "upload"])?;
    if headers.contains_key(header::CONTENT_RANGE) {
        let detail = "a file is written whole, or in parts with ?upload= and Upload-Offset";
        return Err(Problem::new(problem::INVALID_REQUEST, detail));
    }
    let (body, part) = (request.into_body(), part(&params, &headers)?);
    let asked = WriteFile {
        path: path.clone(),
        mode: params.get("mode").map(mode).transpose()?,
        size: body.size_hint().exact(),
        sha256: digest(&params, &headers)?,
        conditions: conditions(&headers)?,
        part: part.clone(),
        ..WriteFile::default()
    };
    let written = app.service.write_file(&who, id, asked, body.into_data_stream()).await;
    let FileWritten { stat, is_new, received, sha256 } = match written {
        Err(error @ Error::File(FileFault::Offset(received), _)) => {
            return Ok(([(UPLOAD_OFFSET, received.to_string())], Problem::from(error)).into_response());
        }
        written => written?,
    };
    let Some(stat) = stat else {
        let told = [(UPLOAD_OFFSET, received.to_string()), (UPLOAD_COMPLETE, "?0".to_owned())];
        let upload = part.map(|(upload, ..)| upload).unwrap_or_default();
        return Ok((StatusCode::ACCEPTED, told, Answer(UploadView { upload, offset: received })).into_response());
    };
    Ok(made(id, &stat, is_new, sha256))
}

/// The answer to what was made.
fn made(id: SessionId, stat: &Stat, is_new: bool, sha256: Option<String>) -> Response {
    let told = [(header::LOCATION, location(id, &stat.path)), (header::ETAG, quoted(&stat.etag))];
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    (status, told, Answer(FileView::of(stat).with_hash(sha256))).into_response()
}

fn location(id: SessionId, path: &str) -> String {
    format!("/v1/sessions/{id}/files/{}", escape_path(path))
}

/// Delete a file or a folder
///
/// A folder that is not empty goes only with `recursive=true`, and is out of sight at once.
#[utoipa::path(delete, path = "/v1/sessions/{id}/files/{*path}", operation_id = "delete_file", tag = "files",
    params(("id" = String, Path), ("path" = String, Path), ("recursive" = Option<bool>, Query), ("If-Match" = Option<String>, Header)),
    responses((status = 204, description = "It is gone"), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn delete_file(
    State(app): State<App>,
    Caller(who): Caller,
    InSession(id, path): InSession,
    params: Params,
    headers: HeaderMap,
) -> Result<StatusCode, Problem> {
    let params = params.only(&["recursive"])?;
    let recursive = params.parse::<bool>("recursive", "true or false")?.unwrap_or_default();
    let conditions = conditions(&headers)?;
    app.service.delete_file(&who, id, &Delete { path, recursive, conditions }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make a folder
///
/// One that is there is no error.
#[utoipa::path(post, path = "/v1/sessions/{id}/files:mkdir", operation_id = "make_folder", tag = "files", params(("id" = String, Path)),
    request_body = MakeFolder, responses((status = 201, body = FileView), (status = 200, body = FileView, description = "It was there"),
        (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn make_folder(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    Body(body): Body<MakeFolder>,
) -> Result<Response, Problem> {
    let Made { stat, is_new } = app.service.make_folder(&who, id, &body.path).await?;
    Ok(made(id, &stat, is_new, None))
}

/// Move a file or a folder
#[utoipa::path(post, path = "/v1/sessions/{id}/files:move", operation_id = "move_file", tag = "files", params(("id" = String, Path)),
    request_body = MoveFile, responses((status = 201, body = FileView), (status = 200, body = FileView, description = "It replaces a file"),
        (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn move_file(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    Body(body): Body<MoveFile>,
) -> Result<Response, Problem> {
    let asked = Move { from: body.from, to: body.to, overwrite: body.overwrite };
    let Made { stat, is_new } = app.service.move_file(&who, id, &asked).await?;
    Ok(made(id, &stat, is_new, None))
}

fn bad_header(name: &str, allowed: &str) -> Problem {
    Problem::new(problem::INVALID_REQUEST, "a header is not understood")
        .with_fields(vec![FieldError::new(name, format!("allowed is {allowed}"))])
}

/// What must be the case (RFC 9110, section 13).
fn conditions(headers: &HeaderMap) -> Result<Conditions, Problem> {
    Ok(Conditions {
        if_match: tags(headers, &header::IF_MATCH, false)?,
        if_none_match: tags(headers, &header::IF_NONE_MATCH, true)?,
    })
}

/// The tags that a condition names. Weak ones are as good as others where that is harmless, and match nothing elsewhere.
fn tags(headers: &HeaderMap, name: &HeaderName, takes_weak: bool) -> Result<Option<Vec<String>>, Problem> {
    let mut found = Vec::new();
    for value in headers.get_all(name) {
        let text = value.to_str().map_err(|_| bad_header(name.as_str(), "tags in quotes, or *"))?;
        for tag in text.split(',').map(str::trim).filter(|tag| !tag.is_empty()) {
            let (weak, tag) = tag.strip_prefix("W/").map_or((false, tag), |tag| (true, tag));
            let inner =
                if tag == "*" { Some("*") } else { tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')) };
            let inner = inner.ok_or_else(|| bad_header(name.as_str(), "tags in quotes, or *"))?;
            found.push(if weak && !takes_weak { String::new() } else { inner.to_owned() });
        }
    }
    if found.len() > MAX_TAGS {
        return Err(bad_header(name.as_str(), &format!("{MAX_TAGS} tags at most")));
    }
    Ok(headers.contains_key(name).then_some(found))
}

/// The part that is asked for, if it is one: several at once, or another unit, is answered with all of it (RFC 9110, section 14.2).
fn range(headers: &HeaderMap) -> Option<Range> {
    let text = headers.get(header::RANGE)?.to_str().ok()?.trim().strip_prefix("bytes=")?;
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().unwrap_or(u64::MAX));
    match text.split_once('-')? {
        ("", last) if !last.is_empty() => number(last).map(Range::Last),
        ("", _) => None,
        (first, "") => number(first).map(|first| Range::From(first, None)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Range::From(first, Some(last)))
        }
    }
}

fn if_range(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(header::IF_RANGE)?.to_str().unwrap_or_default().trim();
    // A date is never exact enough.
    Some(text.strip_prefix('"').and_then(|tag| tag.strip_suffix('"')).unwrap_or_default().to_owned())
}

fn mode(text: &str) -> Result<u32, Problem> {
    let mode =
        u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777 && text.bytes().all(|b| b.is_ascii_digit()));
    mode.ok_or_else(|| bad_parameter("mode", "allowed is a number in octal, up to 0777"))
}

/// The SHA-256 that is announced, in hex: by the query, or by the header of RFC 9530.
fn digest(params: &Params, headers: &HeaderMap) -> Result<Option<String>, Problem> {
    if let Some(text) = params.get("sha256") {
        let text = text.to_ascii_lowercase();
        let is_hash = text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        return if is_hash {
            Ok(Some(text))
        } else {
            Err(bad_parameter("sha256", "allowed are 64 hexadecimal digits"))
        };
    }
    let Some(value) = headers.get(&REPR_DIGEST) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let Some(found) = text.split(',').find_map(|part| part.trim().strip_prefix("sha-256=")) else { return Ok(None) };
    let bytes =
        found.strip_prefix(':').and_then(|text| text.strip_suffix(':')).and_then(|text| BASE64.decode(text).ok());
    let bytes = bytes.filter(|bytes| bytes.len() == 32).ok_or_else(|| bad_header("Repr-Digest", "sha-256=:BASE64:"))?;
    Ok(Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// The part of an upload: its name, where it begins, and whether it is the last one.
fn part(params: &Params, headers: &HeaderMap) -> Result<Option<(String, u64, bool)>, Problem> {
    let text = |name: &HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?").trim().to_owned());
    let (offset, complete) = (text(&UPLOAD_OFFSET), text(&UPLOAD_COMPLETE));
    let Some(upload) = params.get("upload") else {
        return match (offset, complete) {
            (None, None) => Ok(None),
            _ => {
                Err(bad_parameter("upload", "an upload in parts has a name, 1 to 64 letters, digits, \"-\" and \"_\""))
            }
        };
    };
    let offset = match offset {
        Some(text) => text.parse().map_err(|_| bad_header("Upload-Offset", "a number of bytes"))?,
        None => 0,
    };
    let is_last = match complete.as_deref() {
        None | Some("?1") => true,
        Some("?0") => false,
        Some(_) => return Err(bad_header("Upload-Complete", "?0 or ?1")),
    };
    Ok(Some((upload.to_owned(), offset, is_last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn parts_are_read_and_what_is_none_is_all_of_it() {
        for (text, expected) in [
            ("bytes=0-", Some(Range::From(0, None))),
            ("bytes=5-9", Some(Range::From(5, Some(9)))),
            ("bytes=-7", Some(Range::Last(7))),
            ("bytes=0-99999999999999999999999", Some(Range::From(0, Some(u64::MAX)))),
            ("bytes=9-5", None),
            ("bytes=0-1,3-4", None),
            ("bytes=-", None),
            ("bytes=+1-2", None),
            ("lines=1-2", None),
            ("bytes", None),
        ] {
            assert_eq!(range(&headers(header::RANGE, text)), expected, "{text}");
        }
    }

    #[test]
    fn tags_are_read_as_they_are_meant() {
        let read = |text: &str, weak| tags(&headers(header::IF_MATCH, text), &header::IF_MATCH, weak).unwrap();
        assert_eq!(read("\"a\", \"b\"", false), Some(vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(read("*", false), Some(vec!["*".to_owned()]));
        assert_eq!(read("W/\"a\"", true), Some(vec!["a".to_owned()]));
        assert_eq!(read("W/\"a\"", false), Some(vec![String::new()]), "a weak one matches nothing");
        assert_eq!(tags(&HeaderMap::new(), &header::IF_MATCH, false).unwrap(), None);
        assert!(tags(&headers(header::IF_MATCH, "a"), &header::IF_MATCH, false).is_err());
        assert!(tags(&headers(header::IF_MATCH, &["\"a\""; 33].join(",")), &header::IF_MATCH, false).is_err());
    }
}
