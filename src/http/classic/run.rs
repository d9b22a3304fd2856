//! Code of a user, and what it has put out as one text. Nothing of it is cut here: the record has its bounds.

use std::sync::Arc;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::asking::{Asking, Refusal, Wrong};
use super::body::Json;
use super::sessions::{conflict, ready};
use crate::domain::output::{ErrorInfo, MimeBundle, MimePart, Shown, Status};
use crate::http::extract::Answer;
use crate::service::{Error, ExecuteRequest, MAX_CODE};
use crate::session::execution::Execution;

/// What a text is here.
const PLAIN: &str = "text/plain";

/// Runs code, and answers once it has ended.
pub(super) async fn execute(asking: Asking, body: Json) -> Result<Response, Refusal> {
    let (user, code) = body.user_and("code")?;
    asking.who.require_sessions()?;
    if code.len() > MAX_CODE {
        let message = format!("String should have at most {MAX_CODE} bytes");
        return Err(vec![Wrong::new("string_too_long", "code", message, code.into())].into());
    }
    let session = ready(&asking, &user).await?;
    let request = ExecuteRequest { code, ..ExecuteRequest::default() };
    let execution = asking.app.service.execute(&asking.who, session.id, request, None).await?;
    ended(&execution).await?;
    Ok(match failure(&execution)? {
        Some(failed) => failed,
        None => Answer(json!({"output": output(&execution)})).into_response(),
    })
}

/// Waits until an execution has ended.
///
/// # Errors
/// It goes on with the next server, which nobody here can wait for.
pub(super) async fn ended(execution: &Arc<Execution>) -> Result<(), Refusal> {
    execution.ended().await;
    if execution.status().is_final() { Ok(()) } else { Err(Error::Draining.into()) }
}

/// What is answered of code that did not run to its end.
///
/// # Errors
/// It was not its own doing.
pub(super) fn failure(execution: &Execution) -> Result<Option<Response>, Refusal> {
    let outcome = execution.outcome();
    let told =
        |status: StatusCode, detail: Value| Ok(Some((status, Answer(json!({"detail": detail}))).into_response()));
    let reason = |otherwise: &str| outcome.detail.clone().unwrap_or_else(|| otherwise.to_owned());
    match outcome.status {
        Status::Ok | Status::Queued | Status::Running => Ok(None),
        Status::Timeout => told(StatusCode::REQUEST_TIMEOUT, "Code execution timed out".into()),
        Status::Error | Status::InputDenied => {
            let traceback = outcome.error.map(traceback).unwrap_or_default();
            told(StatusCode::BAD_REQUEST, json!({"error": "Execution error", "traceback": traceback}))
        }
        Status::Oom => {
            told(StatusCode::INTERNAL_SERVER_ERROR, reason("Memory ran out and the kernel was ended").into())
        }
        Status::KernelDied => told(StatusCode::INTERNAL_SERVER_ERROR, reason("Kernel died").into()),
        Status::Lost => Err(Error::NotFound("session").into()),
        Status::Cancelled => {
            Err(conflict("Code execution was taken back: the session was ended or reset, or another request did so"))
        }
    }
}

fn traceback(error: ErrorInfo) -> Vec<String> {
    match error.traceback.is_empty() {
        true => vec![format!("{}: {}", error.name, error.value)],
        false => error.traceback,
    }
}

/// What was written and shown, in its order.
fn output(execution: &Execution) -> String {
    execution.shown().iter().fold(String::new(), |output, shown| match shown {
        Shown::Text { text, .. } => output + text,
        Shown::Rich(rich) => match text_of(&rich.data) {
            Some(text) if output.is_empty() || output.ends_with('\n') => output + &text,
            Some(text) => output + "\n" + &text,
            None => output,
        },
        Shown::Error(_) => output,
    })
}

/// The text of a result. One that is so long that it is kept beside its execution is told of only.
fn text_of(data: &MimeBundle) -> Option<String> {
    match data.get(PLAIN)? {
        MimePart::Inline(json) => serde_json::from_str(&json.0).ok(),
        MimePart::Blob(blob) => Some(format!("[{} bytes of {PLAIN} are in the notebook]", blob.bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::output::{BlobRef, JsonText};

    #[test]
    fn a_result_has_a_text_or_none() {
        let of = |mime: &str, part: MimePart| text_of(&[(mime.to_owned(), part)].into());
        let inline = |json: &str| MimePart::Inline(JsonText(json.to_owned()));
        assert_eq!(of(PLAIN, inline("\"4\"")).as_deref(), Some("4"));
        assert_eq!(of("image/png", inline("\"aGk=\"")), None);
        assert_eq!(of(PLAIN, inline("7")), None, "a kernel may say anything");
        let blob = MimePart::Blob(BlobRef { number: 1, bytes: 5, sha256: String::new() });
        assert_eq!(of(PLAIN, blob).as_deref(), Some("[5 bytes of text/plain are in the notebook]"));
    }
}
