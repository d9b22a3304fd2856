//! Why a command failed, in words: the server's problems (RFC 9457) and our own. All of it exits with 125.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use super::text::{escape, escape_line};

/// A server's refusal or failure, `application/problem+json`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Problem {
    /// The HTTP status.
    pub status: u16,
    /// What kind of problem, for programs.
    pub code: String,
    /// What kind of problem, for people.
    pub title: String,
    /// This one.
    pub detail: Option<String>,
    /// For the server's log.
    pub request_id: Option<String>,
    /// When to try again.
    pub retry_after_seconds: Option<f64>,
    /// Mistakes in fields.
    pub errors: Option<Vec<ProblemField>>,
}

/// A mistake in one field.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ProblemField {
    /// JSON pointer.
    pub pointer: String,
    /// What is wrong.
    pub message: String,
}

impl Problem {
    /// Reads an answer that isn't a success; one without a problem in it is described by its status.
    #[must_use]
    pub fn read(status: reqwest::StatusCode, body: &[u8]) -> Self {
        let mut problem: Self = serde_json::from_slice(body).unwrap_or_default();
        problem.status = status.as_u16();
        if problem.title.is_empty() {
            problem.title = format!("the server answered {status}");
        }
        problem
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape_line(&self.title))?;
        if let Some(detail) = self.detail.as_deref().filter(|detail| *detail != self.title) {
            write!(f, ": {}", escape(detail))?;
        }
        for field in self.errors.iter().flatten() {
            write!(f, "\n  {}: {}", escape_line(&field.pointer), escape(&field.message))?;
        }
        if self.status == 401 {
            f.write_str("\n  give the API key with --key-file, CELLBLOCK_API_KEY or CELLBLOCK_API_KEY_FILE")?;
        }
        if let Some(seconds) = self.retry_after_seconds {
            write!(f, "\n  try again in {seconds} s")?;
        }
        match self.request_id.as_deref() {
            Some(id) => write!(f, "\n  ({}, request {})", self.status, escape_line(id)),
            None => Ok(()),
        }
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line asks for what can't be.
    #[error("{0}")]
    Usage(String),
    /// The server refused or failed.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// The server didn't answer.
    #[error("no answer from {url}: {}", innermost(source))]
    Unreachable {
        /// The server.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The answer isn't what the API promises.
    #[error("the server's answer is not understood: {0}")]
    Garbled(String),
    /// A file of ours.
    #[error("can't {attempted} {path}: {source}", path = path.display())]
    File {
        /// A verb.
        attempted: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The terminal or pipe that we print to.
    #[error("can't print: {0}")]
    Print(#[from] std::io::Error),
}

impl Failure {
    /// The HTTP status of a problem.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Problem(problem) => Some(problem.status),
            _ => None,
        }
    }
}

/// reqwest's own words repeat the URL; the cause at the end is what a person needs.
fn innermost(error: &reqwest::Error) -> String {
    let mut error: &dyn std::error::Error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    escape_line(&error.to_string())
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;

    use super::*;

    #[test]
    fn a_problem_is_one_message_with_its_fields() {
        let body = r#"{"type": "x", "title": "Specification rejected", "status": 422, "detail": "two\u001b[2J mistakes",
            "code": "spec-rejected", "request_id": "req1", "retryable": false, "unheard_of": 1,
            "errors": [{"pointer": "/resources/cpu", "message": "9 was asked for"}]}"#;
        let text = Problem::read(StatusCode::UNPROCESSABLE_ENTITY, body.as_bytes()).to_string();
        assert_eq!(
            text,
            "Specification rejected: two\\u{1b}[2J mistakes\n  /resources/cpu: 9 was asked for\n  (422, request req1)"
        );
    }

    #[test]
    fn refusals_say_what_to_do() {
        let text = Problem::read(StatusCode::UNAUTHORIZED, br#"{"title": "No key"}"#).to_string();
        assert!(text.contains("--key-file"), "{text}");
        let text = Problem::read(StatusCode::SERVICE_UNAVAILABLE, br#"{"retry_after_seconds": 5}"#).to_string();
        assert_eq!(text, "the server answered 503 Service Unavailable\n  try again in 5 s");
    }

    #[test]
    fn anything_else_is_described_by_its_status() {
        assert_eq!(
            Problem::read(StatusCode::BAD_GATEWAY, b"<html>").to_string(),
            "the server answered 502 Bad Gateway"
        );
    }
}
