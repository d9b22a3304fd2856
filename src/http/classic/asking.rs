//! Who asks and about whose session, and refusals as FastAPI's clients read them. Reads no bodies.

use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::http::App;
use crate::http::jupyter::asking::admit;
use crate::http::problem::{self, Form, Problem};
use crate::service::keys::Principal;

/// Longest `user_id`, in bytes.
pub(super) const MAX_USER: usize = 256;
/// Longest value that a refusal repeats, in bytes of JSON.
const MAX_REPEATED: usize = 1000;

/// A refusal with a `detail`.
#[derive(Debug)]
pub(super) struct Refusal(Problem);

impl<P: Into<Problem>> From<P> for Refusal {
    fn from(problem: P) -> Self {
        let problem: Problem = problem.into();
        let problem = match problem.code {
            // What has ended is not there.
            "not-found" | "session-ended" => {
                Problem::new(problem::NOT_FOUND, "Session not found. Please start a new session.")
            }
            // 422 is about the form of a request, and has a list.
            "spec-rejected" => Problem { status: StatusCode::BAD_REQUEST.as_u16(), ..problem },
            "install-failed" => Problem { status: StatusCode::INTERNAL_SERVER_ERROR.as_u16(), ..problem },
            _ => problem,
        };
        Self(Problem { form: Form::Detail(None), ..problem })
    }
}

impl Refusal {
    /// The same with another status.
    pub fn with_status(self, status: StatusCode) -> Self {
        Self(Problem { status: status.as_u16(), ..self.0 })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.0.into_response()
    }
}

/// A field that is not understood, as FastAPI tells it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wrong {
    kind: &'static str,
    at: Vec<Value>,
    message: String,
    input: Value,
}

impl Wrong {
    /// Of a field of the body; `input` is what was sent in its place.
    pub fn new(kind: &'static str, field: &str, message: impl Into<String>, input: Value) -> Self {
        Self { kind, at: vec!["body".into(), field.into()], message: message.into(), input }
    }

    /// A field that is missing.
    pub fn missing(field: &str, input: Value) -> Self {
        Self::new("missing", field, "Field required", input)
    }

    /// The body as a whole; `at` is the byte where it stops being what it should, where that is known.
    pub fn body(kind: &'static str, at: Option<usize>, message: impl Into<String>) -> Self {
        let at = std::iter::once("body".into()).chain(at.map(Value::from)).collect();
        Self { kind, at, message: message.into(), input: Value::Null }
    }

    fn told(self) -> Value {
        // Whoever sends much is not sent much.
        let is_short = serde_json::to_vec(&self.input).is_ok_and(|json| json.len() <= MAX_REPEATED);
        let input = if is_short { self.input } else { Value::Null };
        json!({"type": self.kind, "loc": self.at, "msg": self.message, "input": input})
    }
}

impl From<Vec<Wrong>> for Refusal {
    fn from(wrong: Vec<Wrong>) -> Self {
        let detail = Value::Array(wrong.into_iter().map(Wrong::told).collect());
        let problem = Problem::new(problem::INVALID_REQUEST, "the request is not understood");
        let status = StatusCode::UNPROCESSABLE_ENTITY.as_u16();
        Self(Problem { status, form: Form::Detail(Some(Box::new(detail))), ..problem })
    }
}

/// Who asks.
pub(super) struct Asking {
    /// Everything that answers.
    pub app: App,
    /// Who stands behind the key.
    pub who: Principal,
}

impl FromRequestParts<App> for Asking {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let (who, _) = admit(parts, app).await?;
        Ok(Self { app: app.clone(), who })
    }
}

/// A `user_id`: 1 to 256 bytes of UTF-8.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User(pub String);

impl User {
    /// Reads one.
    ///
    /// # Errors
    /// It is too long, or empty.
    pub fn parse(text: String) -> Result<Self, Wrong> {
        let wrong = |kind, message: String| Wrong::new(kind, "user_id", message, text.clone().into());
        match text.len() {
            0 => Err(wrong("string_too_short", "String should have at least 1 character".to_owned())),
            1..=MAX_USER => Ok(Self(text)),
            _ => Err(wrong("string_too_long", format!("String should have at most {MAX_USER} bytes"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Error;

    #[test]
    fn a_user_has_a_name_of_some_length() {
        assert!(User::parse("é/../\0".to_owned()).is_ok());
        assert!(User::parse("x".repeat(MAX_USER)).is_ok());
        assert_eq!(User::parse(String::new()).unwrap_err().kind, "string_too_short");
        let told = User::parse("x".repeat(100_000)).unwrap_err().told();
        assert_eq!(told["loc"], json!(["body", "user_id"]));
        assert!(told["input"].is_null(), "what is long is not repeated");
    }

    #[test]
    fn a_refusal_has_the_status_that_clients_know() {
        let status = |error: Error| Refusal::from(error).0.status;
        assert_eq!(status(Error::NotFound("session")), 404);
        assert_eq!(status(Error::SessionEnded(crate::domain::lifecycle::EndReason::Idle)), 404);
        assert_eq!(status(Error::InstallFailed(String::new())), 500);
        assert_eq!(status(Error::SpecRejected(Vec::new())), 400);
        assert_eq!(status(Error::QueueFull), 429);
    }
}
