//! Resources: a session's files and log, and executions with their long contents. Whose they are is checked as everywhere; what is not one's own is not there.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use cellblock_wire::files::Read;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use rmcp::model::{
    ErrorData, ListResourcesResult, MetaObject, ReadResourceResult, Resource, ResourceContents, ResourceTemplate,
};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::call::describe;
use super::files::collect;
use crate::domain::ids::{ExecutionId, SessionId};
use crate::domain::output::TextStream;
use crate::http::problem::Problem;
use crate::http::v1::executions::ExecutionView;
use crate::service::keys::Principal;
use crate::service::{Blob, BlobBody, Error, Filter, Service};
use crate::session::execution::Execution;
use crate::task;

/// Most bytes of one resource.
const MAX_BYTES: u64 = 4 * 1024 * 1024;
/// Most bytes of a part of a text.
const MAX_PART: usize = 1024 * 1024;
/// How long texts may be of an execution that is too long, one after the other until it is not, in characters.
const SHORTER: [usize; 3] = [400_000, 32_000, 1000];
/// The type of notebooks.
pub(super) const NOTEBOOK: &str = "application/x-ipynb+json";
/// Longest notebook that a log is made of, in bytes, and longest log, in characters.
const MAX_LOG: (usize, usize) = (16 * 1024 * 1024, 200_000);
/// Most resources that are listed.
const MAX_LISTED: usize = 100;
/// What stands in a path of a URI as it is.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// What a URI names.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    File(SessionId, String),
    Log(SessionId),
    Notebook(SessionId),
    Execution(ExecutionId),
    Text(ExecutionId, TextStream, u64),
    Blob(ExecutionId, u32),
}

impl Named {
    fn of(uri: &str) -> Option<Self> {
        if let Some(rest) = uri.strip_prefix("execution://") {
            let Some((id, part)) = rest.split_once('/') else { return Some(Self::Execution(rest.parse().ok()?)) };
            let id = id.parse().ok()?;
            if let Some(number) = part.strip_prefix("blobs/") {
                return Some(Self::Blob(id, number.parse().ok()?));
            }
            let (stream, offset) = part.split_once("?offset=").unwrap_or((part, "0"));
            let stream = match stream {
                "stdout" => TextStream::Stdout,
                "stderr" => TextStream::Stderr,
                _ => return None,
            };
            return Some(Self::Text(id, stream, offset.parse().ok()?));
        }
        let (id, rest) = uri.strip_prefix("session://")?.split_once('/')?;
        let id = id.parse().ok()?;
        match rest.split_once('/') {
            None if rest == "log" => Some(Self::Log(id)),
            None if rest == "notebook" => Some(Self::Notebook(id)),
            // The guest, which alone can, decides what a path may be.
            Some(("files", path)) if !path.is_empty() => {
                Some(Self::File(id, percent_decode_str(path).decode_utf8().ok()?.into_owned()))
            }
            _ => None,
        }
    }
}

/// The URI of a session's file.
pub(super) fn file_uri(session: SessionId, path: &str) -> String {
    format!("session://{session}/files/{}", utf8_percent_encode(path, PATH))
}

/// The URI of a session's notebook.
pub(super) fn notebook_uri(session: SessionId) -> String {
    format!("session://{session}/notebook")
}

/// The forms of URIs.
pub(super) fn templates() -> Vec<ResourceTemplate> {
    let template =
        |uri: &str, name: &str, description: &str| ResourceTemplate::new(uri, name).with_description(description);
    vec![
        template("session://{id}/files/{+path}", "file", "A file of a session, relative to its working folder"),
        template("session://{id}/log", "log", "What was run in a session, and what it put out")
            .with_mime_type("text/plain"),
        template("execution://{id}", "execution", "An execution as it is by now, all of it if it is not too long")
            .with_mime_type("application/json"),
        template(
            "execution://{id}/stdout{?offset}",
            "stdout",
            "A part of an execution's standard output, from a byte on",
        )
        .with_mime_type("text/plain"),
        template("execution://{id}/stderr{?offset}", "stderr", "The same of its standard error")
            .with_mime_type("text/plain"),
        template("execution://{id}/blobs/{number}", "blob", "A long content of an execution's results"),
        template("session://{id}/notebook", "notebook", "What was run in a session, as an .ipynb file")
            .with_mime_type(NOTEBOOK),
    ]
}

/// The logs of live sessions, newest first.
///
/// # Errors
/// The key may not look.
pub(super) fn list(service: &Service, who: &Principal) -> Result<ListResourcesResult, ErrorData> {
    let sessions = service.list_sessions(who, &Filter::default(), None).map_err(|error| refused(error.into(), ""))?;
    let live = sessions.iter().rev().filter(|session| !session.is_over()).take(MAX_LISTED);
    let resource = |id: SessionId| {
        Resource::new(format!("session://{id}/log"), format!("log of {id}")).with_mime_type("text/plain")
    };
    Ok(ListResourcesResult::with_all_items(live.map(|session| resource(session.id)).collect()))
}

/// What a URI names.
///
/// # Errors
/// It names nothing of the caller's, or what is too long.
pub(super) async fn read(service: &Service, who: &Principal, uri: &str) -> Result<ReadResourceResult, ErrorData> {
    let nothing = || ErrorData::resource_not_found("there is nothing under that URI", Some(json!({ "uri": uri })));
    let contents = match Named::of(uri).ok_or_else(nothing)? {
        Named::File(session, path) => file(service, who, (session, path), uri).await,
        Named::Log(session) => log(service, who, session, uri).await,
        Named::Notebook(session) => notebook(service, who, session, uri).await,
        Named::Execution(id) => service
            .execution(who, id)
            .map_err(Problem::from)
            .map(|execution| typed(ResourceContents::text(whole_or_bounded(&execution), uri), "application/json")),
        Named::Text(id, stream, offset) => service.execution(who, id).map_err(Problem::from).map(|execution| {
            let outcome = execution.outcome();
            let text = if stream == TextStream::Stdout { &outcome.stdout } else { &outcome.stderr };
            part(text, offset, uri)
        }),
        Named::Blob(id, number) => blob(service, who, (id, number), uri).await,
    };
    contents.map(|contents| ReadResourceResult::new(vec![contents])).map_err(|problem| refused(problem, uri))
}

/// An execution as JSON; of one that is too long, what is short of it, and where the rest is.
fn whole_or_bounded(execution: &Execution) -> String {
    let most = usize::try_from(MAX_BYTES).unwrap_or(usize::MAX);
    let whole = serde_json::to_string(&ExecutionView::of(execution)).unwrap_or_default();
    if whole.len() <= most {
        return whole;
    }
    let parts = |stream: &str| format!("execution://{}/{stream}?offset=0", execution.id);
    let bounded = json!({
        "bytes": whole.len(),
        "why": format!("the execution has more than {most} bytes: texts are cut in the middle, pictures and long contents left out"),
        "read": [parts("stdout"), parts("stderr")],
        "all": format!("GET /v1/executions/{}", execution.id),
    });
    drop(whole);
    for length in SHORTER {
        let mut told = ExecutionView::of(execution).compact(length);
        told["bounded"] = bounded.clone();
        if let Some(text) = Some(told.to_string()).filter(|text| text.len() <= most) {
            return text;
        }
    }
    // So many results that none of them can be shown.
    let mut told = ExecutionView::of(execution).compact(0);
    let left_out = told["results"].as_array().map_or(0, Vec::len);
    for key in ["results", "payloads", "files"] {
        told[key] = json!([]);
    }
    told["user_expressions"] = json!({});
    told["bounded"] = bounded;
    told["bounded"]["results_omitted"] = json!(left_out);
    told.to_string()
}

/// A part of a text from a byte on, and where to go on.
fn part(text: &str, offset: u64, uri: &str) -> ResourceContents {
    let first = text.ceil_char_boundary(usize::try_from(offset).unwrap_or(usize::MAX).min(text.len()));
    let end = text.floor_char_boundary(first.saturating_add(MAX_PART).min(text.len()));
    let mut meta = json!({"offset": first, "size": text.len()});
    if end < text.len() {
        meta["next_offset"] = json!(end);
    }
    let meta = MetaObject(meta.as_object().cloned().unwrap_or_default());
    ResourceContents::text(&text[first..end], uri).with_meta(meta)
}

async fn notebook(service: &Service, who: &Principal, id: SessionId, uri: &str) -> Result<ResourceContents, Problem> {
    service.session(who, id)?;
    let notebook = service.notebook(who, id).await?;
    if notebook.len() as u64 > MAX_BYTES {
        let length = notebook.len();
        let detail = format!(
            "the notebook has {length} bytes, and a resource at most {MAX_BYTES}; GET /v1/sessions/{id}/notebook has it, and export_notebook of the full set of tools writes it into a file"
        );
        return Err(Problem::new(crate::http::problem::TOO_LARGE, detail));
    }
    let text = String::from_utf8_lossy(&notebook);
    Ok(typed(ResourceContents::text(text, uri), NOTEBOOK))
}

async fn file(
    service: &Service,
    who: &Principal,
    (session, path): (SessionId, String),
    uri: &str,
) -> Result<ResourceContents, Problem> {
    let mime = mime_guess::from_path(&path).first_raw();
    let (opened, pieces) = service.read_file(who, session, &Read { path, ..Read::default() }).await?;
    let bytes = collect(bounded(opened.length, pieces)?, MAX_BYTES).await?;
    Ok(match String::from_utf8(bytes) {
        Ok(text) => typed(ResourceContents::text(text, uri), mime.unwrap_or("text/plain")),
        Err(error) => typed(
            ResourceContents::blob(BASE64.encode(error.as_bytes()), uri),
            mime.unwrap_or("application/octet-stream"),
        ),
    })
}

async fn log(service: &Service, who: &Principal, id: SessionId, uri: &str) -> Result<ResourceContents, Problem> {
    service.session(who, id)?;
    let text = match service.notebook(who, id).await {
        Ok(notebook) => task::blocking(move || log_of(&notebook)).await.unwrap_or_default(),
        // Nothing was run in it yet.
        Err(Error::NotFound(_)) => String::new(),
        Err(error) => return Err(error.into()),
    };
    Ok(ResourceContents::text(text, uri))
}

async fn blob(
    service: &Service,
    who: &Principal,
    (id, number): (ExecutionId, u32),
    uri: &str,
) -> Result<ResourceContents, Problem> {
    let blob = service.blob(who, id, number).await?;
    let (length, mime) = (blob.bytes, blob.mime.clone());
    let bytes = blob_bytes(bounded(length, blob)?, usize::try_from(MAX_BYTES).unwrap_or(usize::MAX)).await;
    let bytes = bytes.ok_or(Error::NotFound("blob"))?;
    Ok(typed(ResourceContents::blob(BASE64.encode(bytes), uri), &mime))
}

/// The bytes of a blob, if there are no more than that.
pub(super) async fn blob_bytes(blob: Blob, most: usize) -> Option<Vec<u8>> {
    let bytes = match blob.body {
        BlobBody::Memory(bytes) => bytes.to_vec(),
        BlobBody::File(file) => {
            let mut bytes = Vec::new();
            file.take(most as u64 + 1).read_to_end(&mut bytes).await.ok()?;
            bytes
        }
    };
    (bytes.len() <= most).then_some(bytes)
}

fn bounded<T>(length: u64, what: T) -> Result<T, Problem> {
    if length <= MAX_BYTES {
        return Ok(what);
    }
    let detail = format!("it has {length} bytes, and a resource at most {MAX_BYTES}; read_file reads parts of a file");
    Err(Problem::new(crate::http::problem::TOO_LARGE, detail))
}

fn typed(contents: ResourceContents, mime: &str) -> ResourceContents {
    contents.with_mime_type(mime)
}

/// What is refused, as the protocol says it.
fn refused(problem: Problem, uri: &str) -> ErrorData {
    let data = Some(json!({"code": problem.code, "uri": uri}));
    match problem.status {
        404 | 410 => ErrorData::resource_not_found(describe(&problem), data),
        500.. => ErrorData::internal_error(describe(&problem), data),
        _ => ErrorData::invalid_params(describe(&problem), data),
    }
}

/// A notebook as a text: code and what it put out, newest last, as much of its end as fits.
fn log_of(notebook: &[u8]) -> String {
    if notebook.len() > MAX_LOG.0 {
        return format!(
            "[the log has {} bytes, more than are read here; the session's notebook has it]",
            notebook.len()
        );
    }
    let Ok(notebook) = serde_json::from_slice::<Value>(notebook) else {
        return "[something in the log can't be read here; the session's notebook has it]".to_owned();
    };
    let cells = notebook["cells"].as_array().map(Vec::as_slice).unwrap_or_default();
    let (mut entries, mut room) = (Vec::new(), MAX_LOG.1);
    for cell in cells.iter().rev() {
        let entry = entry_of(cell);
        let length = entry.chars().count();
        if length > room {
            entries.push(format!("[{} older cells are left out]\n", cells.len() - entries.len()));
            break;
        }
        room -= length;
        entries.push(entry);
    }
    entries.reverse();
    entries.join("\n")
}

fn entry_of(cell: &Value) -> String {
    let count = cell["execution_count"].as_u64().map_or_else(|| " ".to_owned(), |n| n.to_string());
    let mut entry = format!("In [{count}]:\n{}\n", joined(&cell["source"]));
    for output in cell["outputs"].as_array().into_iter().flatten() {
        let text = match output["output_type"].as_str() {
            Some("stream") => joined(&output["text"]),
            Some("error") => joined(&output["traceback"]),
            _ => match &output["data"]["text/plain"] {
                Value::Null => "[a result that is no text]".to_owned(),
                text => joined(text),
            },
        };
        let (text, _) = super::answer::cut(&anstream::adapter::strip_str(&text).to_string(), super::answer::MAX_TEXT);
        entry.push_str(text.trim_end());
        entry.push('\n');
    }
    entry
}

/// A text of a notebook, which may be in lines.
fn joined(text: &Value) -> String {
    match text {
        Value::String(text) => text.clone(),
        Value::Array(lines) => lines.iter().filter_map(Value::as_str).collect(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_names_one_thing_or_nothing() {
        let (session, execution) =
            (SessionId::from_uuid(uuid::Uuid::from_u128(1)), ExecutionId::from_uuid(uuid::Uuid::from_u128(2)));
        let uri = file_uri(session, "a b/ü#?.txt");
        assert_eq!(Named::of(&uri), Some(Named::File(session, "a b/ü#?.txt".to_owned())), "{uri}");
        assert_eq!(Named::of(&format!("session://{session}/log")), Some(Named::Log(session)));
        assert_eq!(Named::of(&format!("execution://{execution}")), Some(Named::Execution(execution)));
        let named = Named::of(&format!("execution://{execution}/stderr?offset=7"));
        assert_eq!(named, Some(Named::Text(execution, TextStream::Stderr, 7)));
        assert_eq!(
            Named::of(&format!("execution://{execution}/stdout")),
            Some(Named::Text(execution, TextStream::Stdout, 0))
        );
        assert_eq!(Named::of(&notebook_uri(session)), Some(Named::Notebook(session)));
        assert_eq!(Named::of(&format!("execution://{execution}/blobs/3")), Some(Named::Blob(execution, 3)));
        for wrong in [
            "",
            "session://",
            "session:///log",
            "file:///etc/passwd",
            &format!("session://{session}"),
            &format!("session://{session}/files/"),
            &format!("session://{session}/files/%ff"),
            &format!("session://{session}/other"),
            &format!("session://{execution}/log"),
            &format!("execution://{execution}/blobs/-1"),
            &format!("execution://{execution}/"),
            &format!("execution://{execution}/stdin"),
            &format!("execution://{execution}/stdout?offset=-1"),
            &format!("execution://{execution}/stdout?limit=1"),
        ] {
            assert_eq!(Named::of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_part_of_a_text_ends_between_characters_and_says_where_to_go_on() {
        let text = "é".repeat(MAX_PART);
        let (mut read, mut offset, mut parts) = (String::new(), 1, 0);
        loop {
            let told = serde_json::to_value(part(&text, offset, "x")).unwrap();
            read.push_str(told["text"].as_str().unwrap());
            parts += 1;
            assert!(told["text"].as_str().unwrap().len() <= MAX_PART && told["_meta"]["size"] == text.len());
            match told["_meta"]["next_offset"].as_u64() {
                Some(next) => offset = next,
                None => break,
            }
        }
        // From within a character it begins with the next.
        assert!(read == text[2..] && parts == 2, "{} bytes in {parts}", read.len());
        assert_eq!(serde_json::to_value(part("ab", u64::MAX, "x")).unwrap()["text"], "");
    }

    #[test]
    fn a_log_shows_the_newest_cells() {
        let cell = |n: u64, text: String| json!({"execution_count": n, "source": ["x = 1\n", "x"], "outputs": [{"output_type": "stream", "text": text}]});
        let small = json!({"cells": [cell(1, "\u{1b}[31mred\u{1b}[0m".to_owned())]});
        assert_eq!(log_of(small.to_string().as_bytes()), "In [1]:\nx = 1\nx\nred\n");
        let many: Vec<_> = (0..100).map(|n| cell(n, "y".repeat(7000))).collect();
        let log = log_of(json!({ "cells": many }).to_string().as_bytes());
        assert!(
            log.chars().count() < MAX_LOG.1 + 100 && log.contains("In [99]") && log.starts_with("[7"),
            "{}",
            &log[..80]
        );
        assert!(log_of(b"[").contains("can't be read"));
    }
}
