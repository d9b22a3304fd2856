//! The tools of the full set for a session's files: what is in a folder, a text replaced by another, and what is to go. Reading and writing stand in `files`.

use std::convert::Infallible;

use bytes::Bytes;
use cellblock_wire::files::{Conditions, Delete, List, Read};
use futures_util::stream;
use rmcp::model::{CallToolResult, JsonObject};
use serde::Deserialize;
use serde_json::json;

use super::answer::structured;
use super::binding::find;
use super::call::{Call, arguments};
use super::files::{MAX_LISTED, MAX_WHOLE, collect, link, listed};
use crate::domain::spec::FieldError;
use crate::http::problem::{self, Problem};
use crate::service::files::WriteFile as Write;
use crate::service::trail;

/// Most folders deep.
const MAX_DEPTH: usize = 16;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListFiles {
    session_id: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    depth: Option<usize>,
    #[serde(default)]
    after: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EditFile {
    session_id: String,
    path: String,
    old: String,
    new: String,
    #[serde(default)]
    all: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeleteFile {
    session_id: String,
    path: String,
    #[serde(default)]
    recursive: bool,
}

/// Lists a folder.
///
/// # Errors
/// It is not there.
pub(super) async fn list(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let ListFiles { session_id, path, depth, after } = arguments(given)?;
    let depth = depth.unwrap_or(1);
    if !(1..=MAX_DEPTH).contains(&depth) {
        return Err(wrong("/depth", format!("allowed are 1 to {MAX_DEPTH} folders")));
    }
    let id = find(call, &session_id)?.id;
    let asked = List { path: path.clone(), depth, limit: MAX_LISTED, after, ..List::default() };
    let listing = call.service.list_files(&call.asked.who, id, &asked).await?;
    Ok(listed(&path, &listing))
}

/// Replaces a text in a file by another.
///
/// # Errors
/// It does not stand there once, the file is no text or too long, or it has changed meanwhile.
pub(super) async fn edit(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let EditFile { session_id, path, old, new, all } = arguments(given)?;
    trail::note_action("write_file");
    call.asked.who.require_sessions()?;
    if old.is_empty() {
        return Err(wrong("/old", "it must be what stands there, so that it is found; write_file writes new files"));
    }
    let id = find(call, &session_id)?.id;
    let asked = Read { path: path.clone(), ..Read::default() };
    let (opened, pieces) = call.service.read_file(&call.asked.who, id, &asked).await?;
    if opened.stat.size > MAX_WHOLE {
        let size = opened.stat.size;
        let detail = format!("the file has {size} bytes; at most {MAX_WHOLE} can be edited, longer ones by code");
        return Err(Problem::new(problem::TOO_LARGE, detail));
    }
    let text = String::from_utf8(collect(pieces, MAX_WHOLE).await?)
        .map_err(|_| wrong("/path", "the file is no text in UTF-8; code can change it"))?;
    let (text, count) = replaced(&text, (&old, &new), all)?;
    let size = text.len() as u64;
    // On the condition that it is still what was read.
    let conditions = Conditions { if_match: Some(vec![opened.stat.etag]), if_none_match: None };
    let body = stream::iter([Ok::<_, Infallible>(Bytes::from(text))]);
    let asked = Write { path: path.clone(), size: Some(size), conditions, ..Write::default() };
    call.service.write_file(&call.asked.who, id, asked, body).await?;
    let told = json!({"path": path, "size": size, "replaced": count});
    let mut answer = structured(format!("Replaced {count} times in \"{path}\", which has {size} bytes now."), told);
    answer.content.push(link(id, &path, size));
    Ok(answer)
}

/// The text with one in place of another, and how many times. It may grow to what can be edited again.
fn replaced(text: &str, (old, new): (&str, &str), all: bool) -> Result<(String, usize), Problem> {
    let count = text.matches(old).count();
    match count {
        0 => return Err(wrong("/old", "it does not stand in the file; it must be exact, with its spaces and lines")),
        2.. if !all => {
            let message = format!("it stands there {count} times: add what is around it, or say all");
            return Err(wrong("/old", message));
        }
        _ => {}
    }
    let size = text.len() + count * new.len() - count * old.len();
    if size as u64 > MAX_WHOLE {
        return Err(wrong("/new", format!("the file would have {size} bytes; at most {MAX_WHOLE} are taken here")));
    }
    Ok((text.replace(old, new), count))
}

/// Removes a file or a folder.
///
/// # Errors
/// It is not there, or something is in it.
pub(super) async fn delete(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let DeleteFile { session_id, path, recursive } = arguments(given)?;
    trail::note_action("delete_file");
    call.asked.who.require_sessions()?;
    let id = find(call, &session_id)?.id;
    let asked = Delete { path: path.clone(), recursive, ..Delete::default() };
    call.service.delete_file(&call.asked.who, id, &asked).await?;
    Ok(structured(format!("\"{path}\" is gone."), json!({ "path": path })))
}

/// A mistake in one argument.
fn wrong(pointer: &str, message: impl Into<String>) -> Problem {
    let field = FieldError::new(pointer, message);
    Problem::new(problem::INVALID_REQUEST, "arguments of the tool are not understood").with_fields(vec![field])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_replaced_where_it_stands_once_or_everywhere() {
        assert_eq!(replaced("a b a", ("b", "c"), false).unwrap(), ("a c a".to_owned(), 1));
        assert_eq!(replaced("a b a", ("a", ""), true).unwrap(), (" b ".to_owned(), 2));
        assert!(replaced("a b a", ("a", "c"), false).unwrap_err().errors[0].message.contains("2 times"));
        assert!(replaced("a b a", ("x", "c"), true).unwrap_err().errors[0].message.contains("does not stand"));
        let long = "y".repeat(1000);
        let grown = replaced(&"x".repeat(10_000), ("x", &long), true).unwrap_err();
        assert_eq!(grown.errors[0].pointer, "/new");
    }
}
