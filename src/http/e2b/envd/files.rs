//! Files outside of RPC: `GET` and `POST /files`, by token, or by a signature in the query.

use std::collections::{BTreeMap, HashSet};

use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use cellblock_wire::files::Read;
use futures_util::stream::{BoxStream, StreamExt};
use http_body_util::BodyExt;
use jiff::Timestamp;
use serde::Serialize;

use super::super::error::{Refusal, of_sandbox};
use super::super::sandbox::{ACCESS_TOKEN, Aimed, ByAgentToken, Sandbox, gone_or, unknown};
use super::signature::{Operation, Query};
use super::{check_user, gzip, paths};
use crate::http::App;
use crate::http::extract::Answer;
use crate::http::form::Form;
use crate::http::problem::{self, Problem};
use crate::service::Error;
use crate::service::bearer::Purpose;
use crate::service::files::{FileWritten, WriteFile};

/// The part of a form that is a file.
const FILE: &str = "file";
/// What is said of a file: headers of this prefix, kept as attributes of that one.
const METADATA: &str = "x-metadata-";
pub(super) const ATTRIBUTE: &str = "e2b.";
/// Longest name of what is said, and most bytes of all of it.
const MAX_NAME: usize = 246;
const MAX_METADATA: usize = 4096;

/// A file that was written.
#[derive(Debug, Serialize)]
struct Written {
    path: String,
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

/// `GET /files?path=`: the bytes of a file.
pub(super) async fn read(State(app): State<App>, request: Request) -> Result<Response, Refusal> {
    let (mut parts, _) = request.into_parts();
    let (sandbox, query) = opened(&app, &mut parts, Operation::Read).await?;
    send(&sandbox, &query, &parts.headers).await
}

/// `POST /files`: writes one file or several.
pub(super) async fn write(State(app): State<App>, request: Request) -> Result<Response, Refusal> {
    let (mut parts, body) = request.into_parts();
    let (sandbox, query) = opened(&app, &mut parts, Operation::Write).await?;
    take(&sandbox, &query, &parts.headers, body).await
}

/// The same without a header that names the sandbox: whose token has signed the query is looked for.
pub(super) async fn read_signed(State(app): State<App>, request: Request) -> Result<Response, Refusal> {
    let (parts, _) = request.into_parts();
    let (sandbox, query) = signer(&app, &parts, Operation::Read)?;
    send(&sandbox, &query, &parts.headers).await
}

/// The same for writing.
pub(super) async fn write_signed(State(app): State<App>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let (sandbox, query) = signer(&app, &parts, Operation::Write)?;
    take(&sandbox, &query, &parts.headers, body).await
}

/// The sandbox that a request names, by its token or by a signature.
async fn opened(app: &App, parts: &mut Parts, operation: Operation) -> Result<(Sandbox, Query), Refusal> {
    let query = Query::of(&parts.uri);
    if parts.headers.contains_key(&ACCESS_TOKEN) || query.signature.is_none() {
        let ByAgentToken(sandbox) = ByAgentToken::from_request_parts(parts, app).await?;
        return Ok((sandbox, query));
    }
    let aimed = Aimed::from_request_parts(parts, app).await?;
    let (id, token) = (aimed.session.id, app.service.session_token(Purpose::Agent, aimed.session.id));
    let who = query.is_signed_by(&token, operation).then(|| app.service.bearer(&aimed.session, Purpose::Agent, &token));
    let Some(who) = who.flatten() else { return Err(Refusal::of_agent(unsigned(app, parts, true))) };
    check_expiry(&query)?;
    let sandbox = aimed.known(parts, who).map_err(|problem| gone_or(problem, id, Refusal::of_agent))?;
    Ok((sandbox, query))
}

/// The sandbox whose token has signed a request.
fn signer(app: &App, parts: &Parts, operation: Operation) -> Result<(Sandbox, Query), Refusal> {
    let query = Query::of(&parts.uri);
    let is_guess = query.signature.is_some();
    let found = is_guess.then(|| app.service.signer(|token| query.is_signed_by(token, operation))).flatten();
    let Some((session, who)) = found else { return Err(Refusal::of_agent(unsigned(app, parts, is_guess))) };
    check_expiry(&query)?;
    let id = session.id;
    let aimed = Aimed::signed(app, session)?;
    let sandbox = aimed.known(parts, who).map_err(|problem| gone_or(problem, id, Refusal::of_agent))?;
    Ok((sandbox, query))
}

fn unsigned(app: &App, parts: &Parts, is_guess: bool) -> Problem {
    unknown(app, parts, is_guess, "invalid signature, or none; and X-Access-Token is missing")
}

fn check_expiry(query: &Query) -> Result<(), Refusal> {
    match query.is_expired(Timestamp::now().as_second()) {
        true => Err(Refusal::of_agent(Problem::new(problem::UNAUTHENTICATED, "signature is already expired"))),
        false => Ok(()),
    }
}

fn wrong(detail: impl Into<String>) -> Refusal {
    Refusal::of_agent(Problem::new(problem::INVALID_REQUEST, detail))
}

fn check_username(query: &Query) -> Result<(), Refusal> {
    check_user(&query.username).map_err(|detail| Refusal::of_agent(Problem::new(problem::UNAUTHENTICATED, detail)))
}

async fn send(sandbox: &Sandbox, query: &Query, headers: &HeaderMap) -> Result<Response, Refusal> {
    check_username(query)?;
    let path = paths::absolute(&sandbox.session.spec.workdir, &query.path).map_err(wrong)?;
    let asked = Read { path, ..Read::default() };
    let opened = sandbox.app.service.read_file(&sandbox.who, sandbox.id(), &asked).await;
    let (opened, bytes) = opened.map_err(|error| refused(sandbox, error))?;
    let is_compressed = gzip::is_wanted(headers) && opened.length > 0;
    let mut response = if is_compressed {
        Response::new(Body::from_stream(gzip::deflated(bytes.into_data_stream())))
    } else {
        Response::new(Body::new(bytes))
    };
    let told = response.headers_mut();
    // Code inside has written it: no browser is to take it for a page.
    told.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    told.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox; default-src 'none'"));
    told.insert(header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment"));
    told.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if is_compressed {
        told.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    } else {
        told.insert(header::CONTENT_LENGTH, HeaderValue::from(opened.length));
    }
    Ok(response)
}

fn refused(sandbox: &Sandbox, error: Error) -> Refusal {
    of_sandbox(error, sandbox.id(), Refusal::of_agent)
}

/// Pieces of a body, as they are or inflated.
type Pieces = BoxStream<'static, std::io::Result<axum::body::Bytes>>;

async fn take(sandbox: &Sandbox, query: &Query, headers: &HeaderMap, body: Body) -> Result<Response, Refusal> {
    check_username(query)?;
    sandbox.app.service.may_change_files(&sandbox.who, sandbox.id()).map_err(|error| refused(sandbox, error))?;
    let metadata = metadata(headers).map_err(wrong)?;
    let is_compressed = gzip::is_on(headers).map_err(wrong)?;
    let size = axum::body::HttpBody::size_hint(&body).exact().filter(|_| !is_compressed);
    let source = body.into_data_stream();
    let source: Pieces = match is_compressed {
        true => gzip::inflated(source).boxed(),
        false => source.map(|piece| piece.map_err(std::io::Error::other)).boxed(),
    };
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    let taking = async {
        if essence.eq_ignore_ascii_case("application/octet-stream") {
            return Ok(vec![take_one(sandbox, query, (size, metadata), source).await?]);
        }
        if essence.eq_ignore_ascii_case("multipart/form-data") {
            let form = Form::open(headers, source).map_err(Refusal::of_agent)?;
            return take_form(sandbox, query, &metadata, form).await;
        }
        let detail = "send multipart/form-data, or one file as application/octet-stream with ?path=";
        Err(wrong(detail))
    };
    Ok(Answer(taking.await?).into_response())
}

async fn take_one(
    sandbox: &Sandbox,
    query: &Query,
    (size, metadata): (Option<u64>, BTreeMap<String, String>),
    source: Pieces,
) -> Result<Written, Refusal> {
    if query.path.is_empty() {
        return Err(wrong("?path= is missing; it names the file that is written"));
    }
    let asked = WriteFile { size, ..place(sandbox, &query.path, &metadata)? };
    let path = asked.path.clone();
    let written = sandbox.app.service.write_file(&sandbox.who, sandbox.id(), asked, source).await;
    told(written.map_err(|error| refused(sandbox, error))?, path, metadata)
}

async fn take_form(
    sandbox: &Sandbox,
    query: &Query,
    metadata: &BTreeMap<String, String>,
    mut form: Form,
) -> Result<Vec<Written>, Refusal> {
    let (mut files, mut paths) = (Vec::new(), HashSet::new());
    while let Some(field) = form.next().await.map_err(Refusal::of_agent)? {
        if field.name() != Some(FILE) {
            continue;
        }
        // The query names one file; several are named by themselves, folders and all.
        let path = if query.path.is_empty() {
            field.file_name().map(unquoted).unwrap_or_default()
        } else {
            query.path.clone()
        };
        if path.is_empty() {
            return Err(wrong("a part of the form has no file name, and there is no ?path="));
        }
        let asked = place(sandbox, &path, metadata)?;
        if !paths.insert(asked.path.clone()) {
            return Err(wrong(format!("you cannot upload multiple files to the same path {:?}", asked.path)));
        }
        let path = asked.path.clone();
        let written = form.write(&sandbox.app, (&sandbox.who, sandbox.id()), asked, field).await;
        let written = written.map_err(|problem| gone_or_refused(sandbox, problem))?;
        files.push(told(written, path, metadata.clone())?);
    }
    if files.is_empty() {
        return Err(wrong(format!("the form has no part named {FILE:?}")));
    }
    Ok(files)
}

fn gone_or_refused(sandbox: &Sandbox, problem: Problem) -> Refusal {
    match problem.code {
        "session-ended" => Refusal::sandbox_missing(Some(sandbox.id())),
        _ => Refusal::of_agent(problem),
    }
}

/// A file to be written where a path leads.
fn place(sandbox: &Sandbox, path: &str, metadata: &BTreeMap<String, String>) -> Result<WriteFile, Refusal> {
    if path.ends_with('/') {
        return Err(wrong(format!("the path {path:.200?} ends with a slash; it names no file")));
    }
    let path = paths::absolute(&sandbox.session.spec.workdir, path).map_err(wrong)?;
    let attributes = metadata.iter().map(|(name, value)| (format!("{ATTRIBUTE}{name}"), value.clone())).collect();
    Ok(WriteFile { path, attributes, ..WriteFile::default() })
}

fn told(written: FileWritten, path: String, metadata: BTreeMap<String, String>) -> Result<Written, Refusal> {
    match written.stat {
        Some(_) => Ok(Written { name: paths::name(&path).to_owned(), path, kind: "file", metadata }),
        None => Err(Refusal::of_agent(Problem::new(problem::GUEST_UNREACHABLE, "the file was not written"))),
    }
}

/// A name as forms have it: three characters are written otherwise there.
fn unquoted(name: &str) -> String {
    name.replace("%22", "\"").replace("%0D", "\r").replace("%0A", "\n")
}

/// What headers say of the files, by lower-case name.
fn metadata(headers: &HeaderMap) -> Result<BTreeMap<String, String>, String> {
    let (mut said, mut bytes) = (BTreeMap::new(), 0);
    for (header, value) in headers {
        let Some(name) = header.as_str().strip_prefix(METADATA) else { continue };
        let value = value.to_str().ok().filter(|value| value.bytes().all(|b| (0x20..0x7f).contains(&b)));
        let Some(value) = value else { return Err(format!("metadata {name:.60?} is not printable ASCII")) };
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(format!("the metadata name {name:.60?} has {} bytes; allowed are 1 to {MAX_NAME}", name.len()));
        }
        bytes += name.len() + value.len();
        if bytes > MAX_METADATA {
            return Err(format!("metadata has more than {MAX_METADATA} bytes"));
        }
        said.insert(name.to_owned(), value.to_owned());
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_forms_are_whole_paths() {
        assert_eq!(unquoted("/tmp/a%22b%22/%25.txt"), "/tmp/a\"b\"/%25.txt");
    }

    #[test]
    fn what_is_said_of_files_has_bounds() {
        let said = |name: &str, value: &'static [u8]| {
            let name = axum::http::HeaderName::try_from(name).unwrap();
            metadata(&HeaderMap::from_iter([(name, HeaderValue::from_bytes(value).unwrap())]))
        };
        assert_eq!(said("X-Metadata-Author", b"me"), Ok(BTreeMap::from([("author".to_owned(), "me".to_owned())])));
        assert_eq!(said("X-Other", b"me"), Ok(BTreeMap::new()));
        assert!(said("X-Metadata-A", "é".as_bytes()).is_err() && said("X-Metadata-A", b"a\tb").is_err());
        assert!(said(&format!("X-Metadata-{}", "a".repeat(247)), b"").is_err());
        assert!(said("X-Metadata-A", &[b'x'; 4096]).is_err());
    }
}
