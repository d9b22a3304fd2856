//! What a model is shown of an execution: one short text, pictures, links to the rest, and the execution itself for programs. All of it is bounded, since a model
//! pays for every word.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rmcp::model::{CallToolResult, ContentBlock, Resource};
use serde_json::Value;

use super::call::Call;
use super::resources;
use crate::domain::output::{Change, FileChange, MimeBundle, MimePart, Outcome, Status};
use crate::http::v1::executions::ExecutionView;
use crate::session::execution::Execution;

/// Longest text, in characters, with all that is said about it.
pub(super) const MAX_TEXT: usize = 8000;
/// Longest text of each kind in what programs are told, in characters.
const MAX_STRUCTURED: usize = 32_000;
/// Most pictures, and most bytes of them.
const MAX_IMAGES: (usize, usize) = (8, 4 * 1024 * 1024);
/// Most links to files.
const MAX_LINKS: usize = 50;
/// Pictures that models see.
const IMAGES: [&str; 4] = ["image/png", "image/jpeg", "image/webp", "image/gif"];

/// An answer with a text for models and an object for programs.
pub(super) fn structured(text: impl Into<String>, value: Value) -> CallToolResult {
    let mut told = CallToolResult::success(vec![ContentBlock::text(text)]);
    told.structured_content = Some(value);
    told
}

/// Whether a type is of pictures that models see.
pub(super) fn is_image(mime: &str) -> bool {
    IMAGES.contains(&mime)
}

/// An execution that nobody waits for.
pub(super) fn begun(execution: &Execution) -> CallToolResult {
    let (id, session) = (execution.id, execution.place.session);
    let text = format!("Execution {id} goes on in session {session}. Read execution://{id} to see how far it is.");
    let mut told = structured(text, ExecutionView::of(execution).compact(MAX_STRUCTURED));
    told.content.push(link_to(execution));
    told
}

/// An execution as it is by now. `is_new`: the caller has not heard of its session yet.
pub(super) async fn of(call: &Call, execution: &Execution, is_new: bool) -> CallToolResult {
    let outcome = execution.outcome();
    let (pictures, without) = images(call, execution, &outcome).await;
    let footer = footer(execution, &outcome, is_new, without);
    let body = body(&outcome);
    let room = MAX_TEXT.saturating_sub(footer.chars().count() + 1);
    let (text, is_cut) = cut(&body, room);
    let separator = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let mut content = vec![ContentBlock::text(format!("{text}{separator}{footer}"))];
    if is_cut || without > 0 {
        content.push(link_to(execution));
    }
    content.extend(pictures);
    let there = outcome.effects.files.iter().filter(|file| file.change != Change::Deleted);
    content.extend(there.take(MAX_LINKS).map(|file| file_link(execution, file)));
    let mut told = CallToolResult::success(content);
    told.is_error = Some(!matches!(outcome.status, Status::Ok | Status::Queued | Status::Running));
    told.structured_content = Some(ExecutionView::of(execution).compact(MAX_STRUCTURED));
    told
}

fn link_to(execution: &Execution) -> ContentBlock {
    let link = Resource::new(format!("execution://{}", execution.id), execution.id.to_string());
    ContentBlock::resource_link(link.with_description("The whole execution").with_mime_type("application/json"))
}

fn file_link(execution: &Execution, file: &FileChange) -> ContentBlock {
    let mime = mime_guess::from_path(&file.path).first_raw();
    let mut link = Resource::new(resources::file_uri(execution.place.session, &file.path), file.path.clone());
    link.size = file.bytes;
    link.mime_type = mime.map(str::to_owned);
    ContentBlock::resource_link(link)
}

/// What the code has put out, in the order in which a model asks for it.
fn body(outcome: &Outcome) -> String {
    let mut parts = Vec::new();
    if !outcome.stdout.is_empty() {
        parts.push(plain(&outcome.stdout));
    }
    parts.extend(outcome.results.iter().filter_map(|result| text_of(&result.data)));
    if !outcome.stderr.is_empty() {
        parts.push(format!("[stderr]\n{}", plain(&outcome.stderr)));
    }
    if let Some(error) = &outcome.error {
        let traceback = plain(&error.traceback.join("\n"));
        parts.push(if traceback.trim().is_empty() { format!("{}: {}", error.name, error.value) } else { traceback });
    }
    let mut body = String::new();
    for part in parts {
        if !body.is_empty() && !body.ends_with('\n') {
            body.push('\n');
        }
        body.push_str(&part);
    }
    body
}

fn plain(text: &str) -> String {
    anstream::adapter::strip_str(text).to_string()
}

/// A result as text; nothing where it is shown as a picture.
fn text_of(data: &MimeBundle) -> Option<String> {
    if data.keys().any(|mime| is_image(mime)) {
        return None;
    }
    let (mime, part) = ["text/plain", "text/markdown"]
        .iter()
        .find_map(|mime| data.get_key_value(*mime))
        .or_else(|| data.iter().next())?;
    match part {
        MimePart::Inline(json) if mime.starts_with("text/") => serde_json::from_str::<String>(&json.0).ok(),
        MimePart::Inline(json) => Some(format!("[{mime}, {} bytes]", json.0.len())),
        MimePart::Blob(blob) => Some(format!("[{mime}, {} bytes]", blob.bytes)),
    }
}

/// What is said about the whole of it.
fn footer(execution: &Execution, outcome: &Outcome, is_new: bool, without: usize) -> String {
    let (id, session) = (execution.id, execution.place.session);
    let mut lines = Vec::new();
    match outcome.status {
        Status::Ok | Status::Error => {}
        Status::Queued | Status::Running if execution.is_followed() => lines.push("It has not ended yet.".to_owned()),
        Status::Queued | Status::Running => lines.push("The server stops; the next one goes on with this.".to_owned()),
        status => lines.push(format!("It ended with the status {}.", status.word())),
    }
    lines.extend(outcome.detail.clone().map(|detail| cut(&detail, 500).0));
    if outcome.restarted.is_some() {
        lines.push("The kernel was replaced: variables are gone, files are still there.".to_owned());
    }
    if without > 0 {
        lines.push(format!("{without} pictures are not shown; the execution has them."));
    }
    let more = outcome.effects.files.len().saturating_sub(MAX_LINKS) as u64 + outcome.effects.files_omitted;
    if more > 0 {
        lines.push(format!("{more} more files have changed than are linked here."));
    }
    lines.push(format!("[{} ms, execution {id}, session {session}]", outcome.duration.as_millis()));
    if is_new {
        lines.push(format!("Pass session_id \"{session}\" on to go on with these variables and files."));
    }
    lines.join("\n")
}

/// Pictures within the bounds, and how many are left out.
async fn images(call: &Call, execution: &Execution, outcome: &Outcome) -> (Vec<ContentBlock>, usize) {
    let (mut shown, mut without, mut room) = (Vec::new(), 0, MAX_IMAGES.1);
    for result in &outcome.results {
        let Some((mime, part)) = IMAGES.iter().find_map(|mime| result.data.get_key_value(*mime)) else { continue };
        let image = if shown.len() < MAX_IMAGES.0 { image(call, execution, part, room).await } else { None };
        match image {
            Some(image) => {
                room -= image.len();
                shown.push(ContentBlock::image(BASE64.encode(image), mime.clone()));
            }
            None => without += 1,
        }
    }
    (shown, without)
}

/// The bytes of a picture, if they are some and not too many. What a kernel calls base64 may be anything.
async fn image(call: &Call, execution: &Execution, part: &MimePart, room: usize) -> Option<Vec<u8>> {
    match part {
        MimePart::Inline(json) => {
            let text: String = serde_json::from_str(&json.0).ok()?;
            let digits: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
            BASE64.decode(digits).ok().filter(|bytes| bytes.len() <= room)
        }
        MimePart::Blob(blob) if blob.bytes <= room as u64 => {
            let blob = call.service.blob(&call.asked.who, execution.id, blob.number).await.ok()?;
            resources::blob_bytes(blob, room).await
        }
        MimePart::Blob(_) => None,
    }
}

/// A text's head and tail within so many characters, and whether something is left out.
pub(in crate::http) fn cut(text: &str, most: usize) -> (String, bool) {
    let length = text.chars().count();
    if length <= most {
        return (text.to_owned(), false);
    }
    // The longest that the line about it can be.
    let said = "\n[… 00000000000000000000 characters are left out …]\n".len();
    let room = most.saturating_sub(said);
    // An error stands at the end, and says more than the beginning.
    let head = room * 2 / 5;
    let tail = room - head;
    let at = |n: usize| text.char_indices().nth(n).map_or(text.len(), |(at, _)| at);
    let (first, last) = (&text[..at(head)], &text[at(length - tail)..]);
    (format!("{first}\n[… {} characters are left out …]\n{last}", length - room), true)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::domain::output::JsonText;

    #[test]
    fn a_long_text_keeps_head_and_tail_and_never_more_than_it_may() {
        assert_eq!(cut("short", 5), ("short".to_owned(), false));
        let long = "é".repeat(20_000) + "end";
        let (text, is_cut) = cut(&long, MAX_TEXT);
        assert!(is_cut && text.starts_with('é') && text.ends_with("end") && text.contains("left out"));
        assert!(text.chars().count() <= MAX_TEXT);
        assert!(cut(&long, 10).0.chars().count() < 100, "even where there is no room");
    }

    #[test]
    fn a_result_is_a_text_unless_it_is_a_picture() {
        let part = |json: &str| MimePart::Inline(JsonText(json.to_owned()));
        let of = |parts: &[(&str, &str)]| {
            text_of(&parts.iter().map(|(mime, json)| ((*mime).to_owned(), part(json))).collect::<BTreeMap<_, _>>())
        };
        assert_eq!(of(&[("text/plain", "\"4\""), ("text/html", "\"<b>4</b>\"")]).as_deref(), Some("4"));
        assert_eq!(of(&[("text/plain", "\"<Figure>\""), ("image/png", "\"aGk=\"")]), None);
        assert_eq!(of(&[("application/json", "{}")]).as_deref(), Some("[application/json, 2 bytes]"));
    }
}
