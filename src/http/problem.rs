//! Problems: how every refusal and failure is said: as RFC 9457 has it (`application/problem+json`), or in the form of another protocol's clients.
//!
//! A handler returns a [`Problem`]; the outermost layer writes its body, since only that layer knows the request's id.

use std::sync::Arc;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::rate::{Limit, seconds};
use crate::domain::spec::FieldError;
use crate::service::files::FileFault;
use crate::service::{self, Error};
use crate::session::StartFault;
use crate::session::once::NotOnce;

/// A refusal (4xx) or a failure of ours (5xx).
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct Problem {
    /// A URI for the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// The code in words.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What happened here, and what can be done.
    pub detail: String,
    /// A word for programs.
    pub code: &'static str,
    /// The request, for the server's log.
    pub request_id: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// When to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u64>,
    /// Why the session ended, where that is the problem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_reason: Option<&'static str>,
    /// Each field that is wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldProblem>,
    /// The quota that is used up, where that is the problem; for the head.
    #[serde(skip)]
    #[schema(ignore)]
    pub limit: Option<Limit>,
    /// How it is written.
    #[serde(skip)]
    #[schema(ignore)]
    pub form: Form,
}

/// How a problem is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Form {
    /// As RFC 9457 has it.
    #[default]
    Problem,
    /// As Jupyter Server does: a message, and a reason or none.
    Jupyter,
    /// As FastAPI does: a `detail`, which is this where it is more than a sentence.
    Detail(Option<Box<Value>>),
}

/// One field that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldProblem {
    /// JSON pointer of the field; a query parameter's name after `?`.
    pub pointer: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl From<FieldError> for FieldProblem {
    fn from(error: FieldError) -> Self {
        Self { pointer: error.pointer, message: error.message }
    }
}

/// The codes, each with its status, its title, and whether trying again may help.
macro_rules! codes {
    ($($name:ident $code:literal $status:ident $title:literal $retryable:literal;)*) => {
        $(#[doc = $title]
        pub const $name: Code = Code { code: $code, status: StatusCode::$status, title: $title, retryable: $retryable };)*
    };
}

/// A kind of problem.
#[derive(Debug, Clone, Copy)]
pub struct Code {
    code: &'static str,
    status: StatusCode,
    title: &'static str,
    retryable: bool,
}

impl Code {
    /// The word for programs.
    #[must_use]
    pub const fn word(self) -> &'static str {
        self.code
    }
}

codes! {
    INVALID_REQUEST "invalid-request" BAD_REQUEST "The request is not understood" false;
    UNAUTHENTICATED "unauthenticated" UNAUTHORIZED "A valid API key is needed" false;
    FORBIDDEN "forbidden" FORBIDDEN "The key does not allow this" false;
    NOT_FOUND "not-found" NOT_FOUND "There is no such thing" false;
    METHOD_NOT_ALLOWED "method-not-allowed" METHOD_NOT_ALLOWED "The path does not know this method" false;
    REQUEST_TIMEOUT "request-timeout" REQUEST_TIMEOUT "The body did not arrive in time" true;
    SESSION_NOT_READY "session-not-ready" CONFLICT "The session is not ready" true;
    NAME_IN_USE "name-in-use" CONFLICT "A live session has that name" false;
    WORKSPACE_IN_USE "workspace-in-use" CONFLICT "Another session has that workspace" true;
    STATE_CONFLICT "state-conflict" CONFLICT "The state does not allow this now" true;
    SESSION_ENDED "session-ended" GONE "The session has ended" false;
    PAYLOAD_TOO_LARGE "payload-too-large" PAYLOAD_TOO_LARGE "The body is too large" false;
    UNSUPPORTED_MEDIA_TYPE "unsupported-media-type" UNSUPPORTED_MEDIA_TYPE "The body is not JSON" false;
    SPEC_REJECTED "spec-rejected" UNPROCESSABLE_ENTITY "The request asks for what is not allowed" false;
    CONFIG_REJECTED "config-rejected" UNPROCESSABLE_ENTITY "The configuration has mistakes" false;
    SETUP_FAILED "setup-failed" UNPROCESSABLE_ENTITY "The session could not be set up" false;
    IMAGE_REJECTED "image-rejected" UNPROCESSABLE_ENTITY "The template's image can't be used" false;
    IDEMPOTENCY_IN_FLIGHT "idempotency-in-flight" CONFLICT "The first request with this key is not answered yet" true;
    IDEMPOTENCY_MISMATCH "idempotency-mismatch" UNPROCESSABLE_ENTITY "Another request had this key" false;
    QUOTA_EXCEEDED "quota-exceeded" TOO_MANY_REQUESTS "The tenant has as much as it may" true;
    RATE_LIMITED "rate-limited" TOO_MANY_REQUESTS "Too many requests" true;
    QUEUE_FULL "queue-full" TOO_MANY_REQUESTS "Too many executions are waiting" true;
    SPAWN_FAILED "spawn-failed" CONFLICT "The command can't be started" true;
    IS_A_DIRECTORY "is-a-directory" CONFLICT "It is a folder" false;
    NOT_A_DIRECTORY "not-a-directory" CONFLICT "It is no folder" false;
    EXISTS "exists" CONFLICT "Something is there already" false;
    OFFSET_MISMATCH "offset-mismatch" CONFLICT "The upload goes on elsewhere" false;
    PERMISSION_DENIED "permission-denied" FORBIDDEN "It may not be reached" false;
    PRECONDITION_FAILED "precondition-failed" PRECONDITION_FAILED "What is there is not what the request is about" false;
    TOO_LARGE "too-large" PAYLOAD_TOO_LARGE "It is larger than a file may be" false;
    RANGE_NOT_SATISFIABLE "range-not-satisfiable" RANGE_NOT_SATISFIABLE "The file has no such part" false;
    DIGEST_MISMATCH "digest-mismatch" UNPROCESSABLE_ENTITY "The content is not what was announced" false;
    ARCHIVE_REFUSED "archive-refused" UNPROCESSABLE_ENTITY "The archive is not taken" false;
    NO_SPACE "no-space" INSUFFICIENT_STORAGE "The session's disk is full" false;
    INSTALL_FAILED "install-failed" UNPROCESSABLE_ENTITY "The packages were not installed" false;
    INTERNAL "internal" INTERNAL_SERVER_ERROR "The server failed" true;
    GUEST_UNREACHABLE "guest-unreachable" BAD_GATEWAY "The session's container did not answer" true;
    KERNEL_FAILED "kernel-failed" BAD_GATEWAY "The kernel did not start" false;
    PORT_NOT_ALLOWED "port-not-allowed" FORBIDDEN "The template does not allow this port" false;
    PORT_CLOSED "port-closed" BAD_GATEWAY "Nothing listens on this port" true;
    PORT_FAILED "port-failed" BAD_GATEWAY "What listens on this port does not answer as HTTP" false;
    PORT_SILENT "port-silent" GATEWAY_TIMEOUT "What listens on this port does not answer" true;
    AT_CAPACITY "at-capacity" SERVICE_UNAVAILABLE "The server holds as many sessions as it may" true;
    ENGINE_UNAVAILABLE "engine-unavailable" SERVICE_UNAVAILABLE "The container engine is unavailable" true;
    ENGINE_REFUSED "engine-refused" BAD_GATEWAY "The container engine refused" false;
    STORAGE_UNAVAILABLE "storage-unavailable" SERVICE_UNAVAILABLE "The server can't write what it has to keep" true;
    DRAINING "draining" SERVICE_UNAVAILABLE "The server is stopping" true;
    ISOLATION_UNVERIFIED "isolation-unverified" SERVICE_UNAVAILABLE "The container was not confined as specified" true;
    START_TIMED_OUT "start-timed-out" GATEWAY_TIMEOUT "The session was not ready in time" true;
}

impl Problem {
    /// A problem of a kind, with what happened here.
    #[must_use]
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("https://cellblock.dev/problems/{}", code.code),
            title: code.title,
            status: code.status.as_u16(),
            detail: detail.into(),
            code: code.code,
            request_id: String::new(),
            retryable: code.retryable,
            retry_after_seconds: (code.retryable
                && (code.status.is_server_error() || code.status == StatusCode::TOO_MANY_REQUESTS))
                .then_some(1),
            end_reason: None,
            errors: Vec::new(),
            limit: None,
            form: Form::Problem,
        }
    }

    /// The same with the fields that are wrong.
    #[must_use]
    pub fn with_fields(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors.into_iter().map(FieldProblem::from).collect();
        self
    }

    fn in_jupyters_words(&self) -> Vec<u8> {
        let (is_unknown, fields) = (self.code == UNAUTHENTICATED.code, self.errors.iter());
        let fields: String = fields.map(|field| format!("; {}: {}", field.pointer, field.message)).collect();
        let mut body = match is_unknown {
            true => serde_json::json!({"message": "Forbidden", "reason": null}),
            false => serde_json::json!({"message": format!("{}{fields}", self.detail), "reason": self.code}),
        };
        if self.status == StatusCode::NOT_IMPLEMENTED.as_u16() {
            body["short_message"] = self.title.into();
        }
        body.to_string().into_bytes()
    }

    fn as_detail(&self, detail: Option<&Value>) -> Vec<u8> {
        let sentence = || {
            let fields = self.errors.iter().map(|field| field.message.as_str());
            std::iter::once(self.detail.as_str()).chain(fields).collect::<Vec<_>>().join("; ")
        };
        let detail = detail.cloned().unwrap_or_else(|| Value::String(sentence()));
        serde_json::json!({"detail": detail}).to_string().into_bytes()
    }

    /// The whole answer. The body is written here; `request_id` is filled in by then.
    pub(super) fn render(&self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let (kind, body) = match &self.form {
            // A structure of texts and numbers: writing it can't fail.
            Form::Problem => ("application/problem+json", serde_json::to_vec(self).unwrap_or_default()),
            Form::Jupyter => ("application/json", self.in_jupyters_words()),
            Form::Detail(detail) => ("application/json", self.as_detail(detail.as_deref())),
        };
        let mut response = (status, [(header::CONTENT_TYPE, kind)], body).into_response();
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(limit) = self.limit {
            limit.write(response.headers_mut());
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.render();
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let detail = error.to_string();
        match error {
            Error::SpecRejected(fields) => Self::new(SPEC_REJECTED, detail).with_fields(fields),
            Error::ConfigRejected(mistakes) => {
                let fields = mistakes.into_iter().map(|mistake| FieldError::new("", mistake)).collect();
                Self::new(CONFIG_REJECTED, detail).with_fields(fields)
            }
            Error::NotFound(_) => Self::new(NOT_FOUND, detail),
            Error::Forbidden(_) => Self::new(FORBIDDEN, detail),
            Error::NameInUse(None) => Self::new(NAME_IN_USE, format!("{detail}; the key does not allow it")),
            Error::NameInUse(Some(_)) => {
                Self::new(NAME_IN_USE, format!("{detail}; say \"if_exists\": \"reuse\" to get it"))
            }
            Error::WorkspaceInUse(_) => {
                Self::new(WORKSPACE_IN_USE, format!("{detail}; end that one, or wait for its end"))
            }
            Error::NotReady => Self::new(SESSION_NOT_READY, format!("{detail}; wait with GET …/wait?state=ready")),
            Error::SessionEnded(reason) => {
                let reason = reason.word();
                let mut problem = Self::new(SESSION_ENDED, format!("{detail} ({reason}); create a new one"));
                problem.end_reason = Some(reason);
                problem
            }
            Error::QueueFull | Error::VisitsFull => {
                Self::new(QUEUE_FULL, format!("{detail}; try again when some have ended"))
            }
            Error::CommandsFull(_) => Self::new(QUEUE_FULL, format!("{detail}; try again when some have ended")),
            Error::SpawnFailed(_) => {
                Self::new(SPAWN_FAILED, format!("{detail}; end some of its commands, or of what its code has started"))
            }
            Error::InstallFailed(_) => Self::new(INSTALL_FAILED, detail),
            Error::StateConflict(_) | Error::KernelBusy(_) => Self::new(STATE_CONFLICT, detail),
            Error::NotOnce(NotOnce::InFlight) => Self::new(IDEMPOTENCY_IN_FLIGHT, detail),
            Error::NotOnce(NotOnce::Mismatch) => Self::new(IDEMPOTENCY_MISMATCH, detail),
            Error::NotOnce(NotOnce::TooMany(wait)) => {
                Self { retry_after_seconds: Some(wait.as_secs() + 1), ..Self::new(QUOTA_EXCEEDED, detail) }
            }
            Error::Unkept => Self::new(STORAGE_UNAVAILABLE, detail),
            Error::OverQuota { exceeded, retry_after } => Self {
                retry_after_seconds: Some(seconds(retry_after)),
                limit: Some(Limit::exceeded(exceeded, retry_after)),
                ..Self::new(QUOTA_EXCEEDED, format!("{detail}; GET /v1/usage tells what it uses"))
            },
            Error::RateLimited { rate, retry_after } => Self {
                retry_after_seconds: Some(seconds(retry_after)),
                limit: Some(Limit::exhausted(rate, retry_after)),
                ..Self::new(RATE_LIMITED, detail)
            },
            Error::OwnNotebooksBusy => Self::new(RATE_LIMITED, detail),
            Error::NotebooksBusy => Self::new(AT_CAPACITY, format!("{detail}; try again in a moment")),
            Error::AtCapacity { retry_after } => Self {
                retry_after_seconds: Some(retry_after.as_secs_f64().ceil() as u64),
                ..Self::new(AT_CAPACITY, format!("{detail}; end one, or try again later"))
            },
            Error::WorkspacesFull => Self::new(AT_CAPACITY, format!("{detail}; delete one, or try again later")),
            Error::Draining => Self::new(DRAINING, detail),
            Error::StartFailed(failure) => {
                let mut problem = Self::new(start_code(failure.fault), failure.detail);
                problem.retryable = service::is_retryable(failure.fault);
                problem
            }
            Error::ImageRejected { .. } => Self::new(IMAGE_REJECTED, detail),
            Error::EngineUnavailable => Self::new(ENGINE_UNAVAILABLE, format!("{detail}; is Docker running?")),
            Error::PortNotAllowed { .. } => Self::new(PORT_NOT_ALLOWED, detail),
            Error::PortClosed(_) => Self::new(PORT_CLOSED, detail),
            Error::PortStuck(_) => Self::new(PORT_SILENT, detail),
            Error::GuestUnreachable => Self::new(GUEST_UNREACHABLE, detail),
            Error::File(fault, _) => Self::new(file_code(fault), detail),
            Error::TransfersBusy => Self::new(AT_CAPACITY, format!("{detail}; try again in a moment")),
        }
    }
}

fn file_code(fault: FileFault) -> Code {
    match fault {
        FileFault::Absent => NOT_FOUND,
        FileFault::Invalid | FileFault::BrokeOff => INVALID_REQUEST,
        FileFault::IsFolder => IS_A_DIRECTORY,
        FileFault::NotFolder => NOT_A_DIRECTORY,
        FileFault::Exists => EXISTS,
        FileFault::Denied => PERMISSION_DENIED,
        FileFault::NoSpace => NO_SPACE,
        FileFault::TooLarge => TOO_LARGE,
        FileFault::Precondition => PRECONDITION_FAILED,
        FileFault::Range(_) => RANGE_NOT_SATISFIABLE,
        FileFault::Offset(_) => OFFSET_MISMATCH,
        FileFault::Digest => DIGEST_MISMATCH,
        FileFault::Archive => ARCHIVE_REFUSED,
        FileFault::Busy => QUEUE_FULL,
        FileFault::Stalled => REQUEST_TIMEOUT,
        FileFault::Failed => GUEST_UNREACHABLE,
    }
}

fn start_code(fault: StartFault) -> Code {
    match fault {
        StartFault::EngineUnavailable => ENGINE_UNAVAILABLE,
        StartFault::EngineRefused => ENGINE_REFUSED,
        StartFault::Unverified => ISOLATION_UNVERIFIED,
        StartFault::GuestUnreachable => GUEST_UNREACHABLE,
        StartFault::KernelFailed => KERNEL_FAILED,
        StartFault::SetupFailed => SETUP_FAILED,
        StartFault::TimedOut => START_TIMED_OUT,
        StartFault::Unkept => STORAGE_UNAVAILABLE,
    }
}
