//! The tools that read and write a session's files, within bounds that fit a model.

use std::convert::Infallible;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use cellblock_wire::files::{Conditions, Kind, List, Listing, Range, Read};
use futures_util::stream;
use http_body_util::{BodyExt, Limited};
use rmcp::model::{CallToolResult, ContentBlock, JsonObject, Resource};
use serde::Deserialize;
use serde_json::json;

use super::answer::{is_image, structured};
use super::binding::find;
use super::call::{Call, arguments};
use super::resources;
use crate::domain::ids::SessionId;
use crate::domain::spec::FieldError;
use crate::http::problem::{self, Problem};
use crate::service::files::{FileFault, WriteFile as Write};
use crate::service::transfer::Pieces;
use crate::service::{Error, trail};

/// Bytes of text that are read when nothing is said, and at most.
const LIMIT: (u64, u64) = (32_000, 256 * 1024);
/// Longest picture that is shown, and longest file that is added to.
pub(super) const MAX_WHOLE: u64 = 4 * 1024 * 1024;
/// Most entries of a folder.
pub(super) const MAX_LISTED: usize = 300;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadFile {
    session_id: String,
    path: String,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    limit: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WriteFile {
    session_id: String,
    path: String,
    content: String,
    #[serde(default)]
    encoding: Encoding,
    #[serde(default)]
    append: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Encoding {
    #[default]
    #[serde(rename = "utf-8")]
    Text,
    #[serde(rename = "base64")]
    Base64,
}

/// Reads a file, or a part of one; lists a folder.
///
/// # Errors
/// It is not there, or too long to be shown.
pub(super) async fn read(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let ReadFile { session_id, path, offset, limit } = arguments(given)?;
    let limit = limit.unwrap_or(LIMIT.0);
    if !(1..=LIMIT.1).contains(&limit) {
        let field = FieldError::new("/limit", format!("allowed are 1 to {} bytes", LIMIT.1));
        return Err(
            Problem::new(problem::INVALID_REQUEST, "arguments of the tool are not understood").with_fields(vec![field])
        );
    }
    let id = find(call, &session_id)?.id;
    let mime = mime_guess::from_path(&path).first_raw();
    if offset == 0 && mime.is_some_and(is_image) {
        return picture(call, id, &path, mime.unwrap_or_default()).await;
    }
    let range = Some(Range::From(offset, Some(offset.saturating_add(limit - 1))));
    let opened =
        call.service.read_file(&call.asked.who, id, &Read { path: path.clone(), range, ..Read::default() }).await;
    match opened {
        Ok((opened, pieces)) => {
            let bytes = collect(pieces, limit).await?;
            Ok(text(id, &path, (opened.first, opened.stat.size), &bytes))
        }
        Err(Error::File(FileFault::Range(size), _)) => Ok(text(id, &path, (offset, size), &[])),
        Err(Error::File(FileFault::IsFolder, _)) => folder(call, id, path).await,
        Err(error) => Err(error.into()),
    }
}

async fn picture(call: &Call, id: SessionId, path: &str, mime: &str) -> Result<CallToolResult, Problem> {
    let asked = Read { path: path.to_owned(), ..Read::default() };
    let (opened, pieces) = call.service.read_file(&call.asked.who, id, &asked).await?;
    let size = opened.stat.size;
    let told = json!({"path": path, "size": size, "mime_type": mime});
    if size > MAX_WHOLE {
        let mut answer = structured(format!("The picture has {size} bytes, more than are shown."), told);
        answer.content.push(link(id, path, size));
        return Ok(answer);
    }
    let bytes = collect(pieces, MAX_WHOLE).await?;
    let mut answer = CallToolResult::success(vec![ContentBlock::image(BASE64.encode(bytes), mime)]);
    answer.structured_content = Some(told);
    Ok(answer)
}

/// A part of a text. Bytes that are none are linked.
fn text(id: SessionId, path: &str, (first, size): (u64, u64), bytes: &[u8]) -> CallToolResult {
    let is_whole = first + bytes.len() as u64 >= size;
    let valid = match std::str::from_utf8(bytes) {
        Ok(text) => Some(text),
        // The last character goes on behind the part.
        Err(error) if error.error_len().is_none() && !is_whole => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).ok()
        }
        Err(_) => None,
    };
    let Some(content) = valid else {
        let told = json!({"path": path, "size": size});
        let mut answer = structured(format!("\"{path}\" has {size} bytes, which are no text from {first} on."), told);
        answer.content.push(link(id, path, size));
        return answer;
    };
    let next = first + content.len() as u64;
    let mut told = json!({"path": path, "size": size, "offset": first});
    let mut answer = vec![ContentBlock::text(content)];
    if next < size {
        told["next_offset"] = next.into();
        answer.push(ContentBlock::text(format!("[{} of {size} bytes; go on with offset {next}]", content.len())));
    } else if content.is_empty() {
        answer = vec![ContentBlock::text(format!("[there is nothing from byte {first} on; the file has {size}]"))];
    }
    let mut answer = CallToolResult::success(answer);
    answer.structured_content = Some(told);
    answer
}

async fn folder(call: &Call, id: SessionId, path: String) -> Result<CallToolResult, Problem> {
    let asked = List { path: path.clone(), depth: 1, limit: MAX_LISTED, ..List::default() };
    Ok(listed(&path, &call.service.list_files(&call.asked.who, id, &asked).await?))
}

/// What is in a folder.
pub(super) fn listed(path: &str, listing: &Listing) -> CallToolResult {
    let line = |entry: &cellblock_wire::files::Stat| match entry.kind {
        Kind::Directory => format!("{}/", entry.path),
        _ => format!("{}  {} bytes", entry.path, entry.size),
    };
    // Names come from the code inside.
    let plain = |text: String| text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect::<String>();
    let mut lines: Vec<_> = listing.entries.iter().map(line).map(plain).collect();
    if lines.is_empty() {
        lines.push("[an empty folder]".to_owned());
    }
    if listing.truncated {
        lines.push("[there are more, after the last of these]".to_owned());
    }
    let entries: Vec<_> =
        listing.entries.iter().map(|e| json!({"path": e.path, "size": e.size, "kind": e.kind})).collect();
    structured(lines.join("\n"), json!({"path": path, "entries": entries, "truncated": listing.truncated}))
}

/// Writes a file, or adds to one.
///
/// # Errors
/// It can't be written, or has changed while it was added to.
pub(super) async fn write(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let WriteFile { session_id, path, content, encoding, append } = arguments(given)?;
    trail::note_action("write_file");
    call.asked.who.require_sessions()?;
    let bytes = match encoding {
        Encoding::Text => content.into_bytes(),
        Encoding::Base64 => BASE64.decode(content.as_bytes()).map_err(|error| {
            let field = FieldError::new("/content", format!("no base64: {error}"));
            Problem::new(problem::INVALID_REQUEST, "arguments of the tool are not understood").with_fields(vec![field])
        })?,
    };
    let id = find(call, &session_id)?.id;
    let (bytes, conditions) =
        if append { added(call, id, &path, bytes).await? } else { (bytes, Conditions::default()) };
    let size = bytes.len() as u64;
    let body = stream::iter([Ok::<_, Infallible>(Bytes::from(bytes))]);
    let asked = Write { path: path.clone(), size: Some(size), conditions, ..Write::default() };
    let written = call.service.write_file(&call.asked.who, id, asked, body).await?;
    let what = if written.is_new { "new" } else { "written" };
    let mut answer = structured(
        format!("\"{path}\" is {what}, with {size} bytes."),
        json!({"path": path, "size": size, "is_new": written.is_new}),
    );
    answer.content.push(link(id, &path, size));
    Ok(answer)
}

/// What is there with something behind it, on the condition that it is still there then.
async fn added(call: &Call, id: SessionId, path: &str, more: Vec<u8>) -> Result<(Vec<u8>, Conditions), Problem> {
    let asked = Read { path: path.to_owned(), ..Read::default() };
    match call.service.read_file(&call.asked.who, id, &asked).await {
        Ok((opened, _)) if opened.stat.size > MAX_WHOLE => {
            let detail = format!(
                "the file has {} bytes; at most {MAX_WHOLE} can be added to, longer ones by code",
                opened.stat.size
            );
            Err(Problem::new(problem::TOO_LARGE, detail))
        }
        Ok((opened, pieces)) => {
            let mut bytes = collect(pieces, MAX_WHOLE).await?;
            bytes.extend(more);
            Ok((bytes, Conditions { if_match: Some(vec![opened.stat.etag]), if_none_match: None }))
        }
        Err(Error::File(FileFault::Absent, _)) => {
            Ok((more, Conditions { if_match: None, if_none_match: Some(vec!["*".to_owned()]) }))
        }
        Err(error) => Err(error.into()),
    }
}

/// All of what comes, within a bound.
pub(super) async fn collect(pieces: Pieces, most: u64) -> Result<Vec<u8>, Problem> {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let collected = Limited::new(pieces, most).collect().await;
    collected
        .map(|bytes| bytes.to_bytes().to_vec())
        .map_err(|_| Problem::new(problem::GUEST_UNREACHABLE, "the session's container did not send all of the file"))
}

/// A link to a file of a session.
pub(super) fn link(id: SessionId, path: &str, size: u64) -> ContentBlock {
    let mut link = Resource::new(resources::file_uri(id, path), path).with_size(size);
    link.mime_type = mime_guess::from_path(path).first_raw().map(str::to_owned);
    ContentBlock::resource_link(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_ends_between_characters_and_says_where_to_go_on() {
        let id = SessionId::from_uuid(uuid::Uuid::from_u128(1));
        let bytes = "aé".as_bytes();
        let told = text(id, "x", (0, 10), &bytes[..2]);
        assert_eq!(told.content[0].as_text().map(|t| t.text.as_str()), Some("a"));
        assert_eq!(told.structured_content, Some(json!({"path": "x", "size": 10, "offset": 0, "next_offset": 1})));
        let told = text(id, "x", (0, 2), &bytes[..2]);
        assert!(
            matches!(told.content[1], ContentBlock::ResourceLink(_)),
            "a file that ends within a character is no text"
        );
        let told = text(id, "x", (9, 3), &[]);
        assert!(told.content[0].as_text().is_some_and(|t| t.text.contains("nothing from byte 9")));
    }
}
