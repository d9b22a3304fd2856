//! How refusals and failures are said to E2B's clients: its control API's form, its agent's, Connect's two, its code interpreter's, and its gateway's. What went wrong
//! is a [`Problem`] as everywhere, so logs, metrics and the audit know it by the same word.

use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::domain::ids::SessionId;
use crate::http::problem::{self, Form, Problem};
use crate::service::Error;

/// Tells a client of E2B whether to send the same again by itself.
pub(super) const SHOULD_RETRY: HeaderName = HeaderName::from_static("should-retry");

/// How a problem is written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    /// `{"code": status, "message": …, "error_code": …}`: the control API's.
    Numbered,
    /// `{"code": status, "message": …}`: the agent's outside of RPC.
    Agent,
    /// `{"code": "not_found", "message": …}`: an RPC with one answer.
    Connect(Code),
    /// A sentence: the code interpreter's.
    Text,
    /// What a proxy before sandboxes says: of this one, and its port where that is what is closed.
    Gateway {
        /// The sandbox, where one can be of that name.
        sandbox: Option<SessionId>,
        /// Its port.
        port: Option<u16>,
    },
}

/// Codes of Connect (<https://connectrpc.com/docs/protocol#error-codes>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are the protocol's own words")]
pub enum Code {
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    ResourceExhausted,
    FailedPrecondition,
    Unimplemented,
    Internal,
    Unavailable,
    Unauthenticated,
}

impl Code {
    /// The word on the wire.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::NotFound => "not_found",
            Self::AlreadyExists => "already_exists",
            Self::PermissionDenied => "permission_denied",
            Self::ResourceExhausted => "resource_exhausted",
            Self::FailedPrecondition => "failed_precondition",
            Self::Unimplemented => "unimplemented",
            Self::Internal => "internal",
            Self::Unavailable => "unavailable",
            Self::Unauthenticated => "unauthenticated",
        }
    }

    /// The status that goes with it where there is one answer.
    fn status(self) -> StatusCode {
        match self {
            Self::InvalidArgument | Self::FailedPrecondition => StatusCode::BAD_REQUEST,
            Self::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::AlreadyExists => StatusCode::CONFLICT,
            Self::PermissionDenied => StatusCode::FORBIDDEN,
            Self::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Self::Unimplemented => StatusCode::NOT_IMPLEMENTED,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
        }
    }

    /// What a kind of problem is in an RPC.
    fn of(problem: &Problem) -> Self {
        match problem.code {
            "invalid-request" | "spec-rejected" | "is-a-directory" | "not-a-directory" | "unsupported-media-type" => {
                Self::InvalidArgument
            }
            "unauthenticated" => Self::Unauthenticated,
            "forbidden" | "permission-denied" | "port-not-allowed" => Self::PermissionDenied,
            "not-found" => Self::NotFound,
            "exists" => Self::AlreadyExists,
            "rate-limited" | "quota-exceeded" | "queue-full" | "at-capacity" | "no-space" | "too-large"
            | "payload-too-large" => Self::ResourceExhausted,
            "session-not-ready" | "session-ended" | "state-conflict" | "spawn-failed" | "precondition-failed" => {
                Self::FailedPrecondition
            }
            "request-timeout" | "port-silent" | "start-timed-out" => Self::DeadlineExceeded,
            "not-implemented" => Self::Unimplemented,
            "draining" | "engine-unavailable" | "guest-unreachable" | "storage-unavailable" => Self::Unavailable,
            _ => Self::Internal,
        }
    }
}

/// A refusal in one of the forms.
#[derive(Debug)]
pub struct Refusal(Problem);

impl Refusal {
    /// One of the control API. Its clients send again what is answered with 502, 503 or 504, so what has begun is answered otherwise.
    #[must_use]
    pub fn of_control(problem: impl Into<Problem>) -> Self {
        let problem = problem.into();
        let status = match problem.code {
            "spec-rejected"
            | "setup-failed"
            | "image-rejected"
            | "install-failed"
            | "unsupported-media-type"
            | "idempotency-mismatch" => StatusCode::BAD_REQUEST.as_u16(),
            "session-ended" => StatusCode::NOT_FOUND.as_u16(),
            "kernel-failed" | "engine-refused" | "isolation-unverified" | "start-timed-out" | "guest-unreachable" => {
                StatusCode::INTERNAL_SERVER_ERROR.as_u16()
            }
            _ => problem.status,
        };
        Self(Problem { status, form: Form::E2b(Words::Numbered), ..problem })
    }

    /// One of the agent, outside of RPC.
    #[must_use]
    pub fn of_agent(problem: impl Into<Problem>) -> Self {
        let problem = problem.into();
        let status = match problem.code {
            "spec-rejected" | "is-a-directory" | "not-a-directory" => StatusCode::BAD_REQUEST.as_u16(),
            _ => problem.status,
        };
        Self(Problem { status, form: Form::E2b(Words::Agent), ..problem })
    }

    /// One of an RPC with one answer.
    #[must_use]
    pub fn of_rpc(fault: impl Into<Fault>) -> Self {
        let Fault { code, problem } = fault.into();
        Self(Problem { status: code.status().as_u16(), form: Form::E2b(Words::Connect(code)), ..*problem })
    }

    /// One of the code interpreter.
    #[must_use]
    pub fn of_interpreter(problem: impl Into<Problem>) -> Self {
        let problem = problem.into();
        let status = if problem.code == "spec-rejected" { 400 } else { problem.status };
        Self(Problem { status, form: Form::E2b(Words::Text), ..problem })
    }

    /// There is no such sandbox, or it is over or rests: all the same to whoever is outside.
    #[must_use]
    pub fn sandbox_missing(sandbox: Option<SessionId>) -> Self {
        let problem =
            Problem { retry_after_seconds: None, ..Problem::new(problem::NOT_FOUND, "The sandbox was not found") };
        Self::of_gateway(problem, Words::Gateway { sandbox, port: None })
    }

    /// Nothing listens on the sandbox's port.
    #[must_use]
    pub fn port_closed(sandbox: SessionId, port: u16) -> Self {
        let problem = Problem::new(problem::PORT_CLOSED, "The sandbox is running but port is not open");
        Self::of_gateway(problem, Words::Gateway { sandbox: Some(sandbox), port: Some(port) })
    }

    fn of_gateway(problem: Problem, words: Words) -> Self {
        Self(Problem { status: StatusCode::BAD_GATEWAY.as_u16(), form: Form::E2b(words), ..problem })
    }

    /// The same with another status.
    #[must_use]
    pub fn with_status(self, status: StatusCode) -> Self {
        Self(Problem { status: status.as_u16(), ..self.0 })
    }

    /// The same with another sentence, where clients know one.
    #[must_use]
    pub fn saying(self, detail: impl Into<String>) -> Self {
        Self(Problem { detail: detail.into(), ..self.0 })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.0.into_response()
    }
}

/// What went wrong in an RPC: its code, and the problem.
#[derive(Debug, Clone)]
pub struct Fault {
    /// For programs.
    pub code: Code,
    problem: Box<Problem>,
}

impl Fault {
    /// One with a sentence for people.
    #[must_use]
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let kind = match code {
            Code::InvalidArgument => problem::INVALID_REQUEST,
            Code::DeadlineExceeded => problem::REQUEST_TIMEOUT,
            Code::NotFound => problem::NOT_FOUND,
            Code::AlreadyExists => problem::EXISTS,
            Code::PermissionDenied => problem::FORBIDDEN,
            Code::ResourceExhausted => problem::PAYLOAD_TOO_LARGE,
            Code::FailedPrecondition => problem::STATE_CONFLICT,
            Code::Unimplemented => problem::NOT_IMPLEMENTED,
            Code::Internal => problem::INTERNAL,
            Code::Unavailable => problem::GUEST_UNREACHABLE,
            Code::Unauthenticated => problem::UNAUTHENTICATED,
        };
        Self { code, problem: Box::new(Problem::new(kind, detail)) }
    }

    /// `{"code": …, "message": …}`.
    #[must_use]
    pub fn words(&self) -> Value {
        json!({"code": self.code.word(), "message": message(&self.problem)})
    }
}

impl<P: Into<Problem>> From<P> for Fault {
    fn from(problem: P) -> Self {
        let problem = problem.into();
        Self { code: Code::of(&problem), problem: Box::new(problem) }
    }
}

/// Why something of a sandbox is not done: the sandbox has ended meanwhile, or something else, in its room's words.
#[must_use]
pub fn of_sandbox(error: Error, sandbox: SessionId, otherwise: impl FnOnce(Problem) -> Refusal) -> Refusal {
    match error {
        Error::SessionEnded(_) | Error::NotFound("session") => Refusal::sandbox_missing(Some(sandbox)),
        error => otherwise(error.into()),
    }
}

/// The body of a problem, and its type.
pub(in crate::http) fn written(problem: &Problem, words: Words) -> (&'static str, Vec<u8>) {
    let body = match words {
        Words::Text => return ("text/plain; charset=utf-8", message(problem).into_bytes()),
        Words::Numbered => json!({"code": problem.status, "message": message(problem), "error_code": problem.code}),
        Words::Agent => json!({"code": problem.status, "message": message(problem)}),
        Words::Connect(code) => json!({"code": code.word(), "message": message(problem)}),
        Words::Gateway { sandbox, port } => {
            let mut body = json!({"message": problem.detail, "code": problem.status});
            if let Some(sandbox) = sandbox {
                body["sandboxId"] = json!(sandbox.to_string());
            }
            if let Some(port) = port {
                body["port"] = json!(port);
            }
            body
        }
    };
    ("application/json", body.to_string().into_bytes())
}

/// A problem in one sentence, with the fields that are wrong.
fn message(problem: &Problem) -> String {
    let fields = problem.errors.iter().map(|field| format!("; {}: {}", field.pointer, field.message));
    std::iter::once(problem.detail.clone()).chain(fields).collect()
}

/// Whether nothing was begun, so that sending the same again does nothing twice.
pub(super) fn begins_nothing(problem: &Problem) -> bool {
    matches!(problem.code, "rate-limited" | "at-capacity" | "draining" | "queue-full")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lifecycle::EndReason;
    use crate::domain::spec::FieldError;
    use crate::session::{StartFailure, StartFault};

    fn told(refusal: &Refusal) -> (u16, &'static str, String) {
        let Form::E2b(words) = refusal.0.form else { panic!("another form") };
        let (kind, body) = written(&refusal.0, words);
        (refusal.0.status, kind, String::from_utf8(body).unwrap())
    }

    #[test]
    fn the_control_api_says_its_status_in_the_body_too() {
        let wrong = Error::SpecRejected(vec![FieldError::new("/timeout", "too long")]);
        let (status, kind, body) = told(&Refusal::of_control(wrong));
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, kind, &body["code"]), (400, "application/json", &json!(400)));
        assert!(body["message"].as_str().unwrap().contains("/timeout: too long"), "{body}");
        assert_eq!(told(&Refusal::of_control(Error::SessionEnded(EndReason::Idle))).0, 404);
    }

    #[test]
    fn what_has_begun_is_not_answered_as_if_it_could_be_sent_again() {
        for fault in [
            StartFault::EngineRefused,
            StartFault::Unverified,
            StartFault::GuestUnreachable,
            StartFault::KernelFailed,
            StartFault::TimedOut,
        ] {
            let failure = StartFailure { fault, detail: "no".to_owned() };
            assert_eq!(told(&Refusal::of_control(Error::StartFailed(failure))).0, 500, "{fault:?}");
        }
    }

    #[test]
    fn each_room_has_its_own_words() {
        let id = SessionId::from_uuid(uuid::Uuid::from_u128(1));
        let (status, _, body) = told(&Refusal::sandbox_missing(Some(id)));
        let expected = json!({"sandboxId": id.to_string(), "message": "The sandbox was not found", "code": 502});
        assert_eq!((status, serde_json::from_str::<Value>(&body).unwrap()), (502, expected));
        let (status, _, body) = told(&Refusal::port_closed(id, 8000));
        assert!(status == 502 && body.contains("port is not open") && body.contains("\"port\":8000"), "{body}");
        let (status, kind, body) = told(&Refusal::of_interpreter(Error::NotFound("context")));
        assert_eq!((status, kind, body.as_str()), (404, "text/plain; charset=utf-8", "there is no such context"));
        let (status, _, body) = told(&Refusal::of_rpc(Error::NotFound("command")));
        let expected = json!({"code": "not_found", "message": "there is no such command"});
        assert_eq!((status, serde_json::from_str::<Value>(&body).unwrap()), (404, expected));
        assert_eq!(told(&Refusal::of_rpc(Fault::new(Code::Unimplemented, "no"))).0, 501);
        let ended = of_sandbox(Error::SessionEnded(EndReason::Deleted), id, Refusal::of_agent);
        assert_eq!(told(&ended).0, 502);
    }
}
