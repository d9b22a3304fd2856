//! The log's one line of a request, and its span in a trace: told when it is answered, or when its caller leaves before that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Method;

use super::NO_ROUTE;
use crate::service::trail::Trail;
use crate::traces::Requested;

/// A request that is worked on. It tells its line when it is dropped.
pub(super) struct Line {
    pub(super) method: Method,
    /// The template that its path matches.
    pub(super) route: Arc<str>,
    pub(super) trail: Arc<Trail>,
    pub(super) bytes_in: Option<u64>,
    started: Instant,
    answer: Option<Answer>,
}

/// What is answered.
struct Answer {
    status: u16,
    problem: Option<&'static str>,
    took: Duration,
    bytes: Option<u64>,
}

impl Line {
    pub(super) fn new(method: Method, route: Arc<str>, trail: Arc<Trail>, bytes_in: Option<u64>) -> Self {
        Self { method, route, trail, bytes_in, started: Instant::now(), answer: None }
    }

    /// The answer is there, and begins now. Says how long that took.
    pub(super) fn answered(&mut self, status: u16, problem: Option<&'static str>, bytes: Option<u64>) -> Duration {
        let took = self.started.elapsed();
        self.answer = Some(Answer { status, problem, took, bytes });
        took
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let (told, origin, answer) = (self.trail.told(), self.trail.origin(), self.answer.as_ref());
        let took = answer.map_or_else(|| self.started.elapsed(), |answer| answer.took);
        // Strangers do not fill a collector.
        if let (Some(trace), Some(_)) = (self.trail.trace(), &told.tenant) {
            trace.request_ended(&Requested {
                method: self.method.as_str(),
                route: Some(&*self.route).filter(|route| *route != NO_ROUTE),
                status: answer.map(|answer| answer.status),
                problem: answer.and_then(|answer| answer.problem),
                took,
                session: told.session,
                execution: told.execution,
            });
        }
        tracing::info!(
            method = %self.method,
            route = &*self.route,
            status = answer.map(|answer| answer.status),
            problem = answer.and_then(|answer| answer.problem),
            elapsed_ms = took.as_secs_f64() * 1000.0,
            request_id = origin.request,
            tenant = told.tenant.as_deref(),
            key = told.key.map(tracing::field::display),
            session = told.session.map(tracing::field::display),
            execution = told.execution.map(tracing::field::display),
            address = origin.address.map(tracing::field::display),
            trace_id = self.trail.trace().map(|trace| tracing::field::display(trace.id())),
            bytes_in = self.bytes_in,
            bytes_out = answer.and_then(|answer| answer.bytes),
            "{}", if answer.is_some() { "request" } else { "request without an answer: its caller has left" }
        );
    }
}
