//! Traces for a collector that speaks OTLP: what is known of a request, or of an execution that has ended, as spans. It decides nothing, and nobody waits for it:
//! spans that find no room in the queue, or that the collector does not take, are dropped and counted.
//!
//! One trace has the request's span, whose parent is the caller's, and below it what became of the execution that it has begun: `queue` until it was started,
//! `link` until the kernel worked on it, `kernel` until its end. No span has code, output or a key in it.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanKind, Status as SpanStatus, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, Sampler, SamplingDecision, ShouldSample, SpanData, SpanEvents, SpanLinks,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::domain::ids::{ExecutionId, SessionId};
use crate::domain::output::Status;
use crate::metrics::{Metrics, known_method};
use crate::task;

mod export;
mod parent;

use export::Exporter;

/// What is on its way when the server ends has this long.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// Where spans go, and which.
pub struct Settings {
    /// The collector's base URL; `/v1/traces` is added.
    pub endpoint: String,
    /// Lines of `Name: value` that go with each request to it. They are secret.
    pub headers: String,
    /// The part of traces that is told, of those that begin here.
    pub sample_ratio: f64,
    /// What this server is called there.
    pub service_name: String,
    /// This server's name among others.
    pub instance: String,
    /// Where it listens.
    pub server: SocketAddr,
    /// Whether it speaks TLS there.
    pub is_tls: bool,
    /// The collector answers within this time.
    pub timeout: Duration,
    /// Spans that wait for it.
    pub queue: usize,
}

/// The traces of one server. Clones are the same.
#[derive(Debug, Clone)]
pub struct Traces(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    queue: mpsc::Sender<SpanData>,
    sampler: Sampler,
    scope: InstrumentationScope,
    server: SocketAddr,
    is_tls: bool,
    metrics: Metrics,
    closing: CancellationToken,
    closed: CancellationToken,
}

/// A request's place in a trace.
#[derive(Debug, Clone)]
pub struct Trace {
    traces: Traces,
    own: SpanContext,
    /// The caller's span.
    parent: Option<SpanId>,
    began: SystemTime,
}

/// A request that was answered, or whose caller has left.
#[derive(Debug)]
pub struct Requested<'a> {
    /// The method.
    pub method: &'a str,
    /// The template that its path matches.
    pub route: Option<&'a str>,
    /// How it was answered.
    pub status: Option<u16>,
    /// The code of the problem, if that was the answer.
    pub problem: Option<&'static str>,
    /// How long it took.
    pub took: Duration,
    /// The session that it was about.
    pub session: Option<SessionId>,
    /// The execution.
    pub execution: Option<ExecutionId>,
}

/// An execution that has ended.
#[derive(Debug)]
pub struct Executed<'a> {
    /// Its id.
    pub id: ExecutionId,
    /// Its session.
    pub session: SessionId,
    /// That session's template.
    pub template: &'a str,
    /// How it ended.
    pub status: Status,
    /// When it was accepted.
    pub accepted: SystemTime,
    /// When it was sent to its kernel.
    pub started: Option<SystemTime>,
    /// When that said that it works on it.
    pub busy: Option<SystemTime>,
    /// When it ended.
    pub ended: SystemTime,
}

impl Traces {
    /// Begins to send spans to a collector, which need not be there.
    ///
    /// # Errors
    /// What is wrong with the settings.
    pub fn start(settings: Settings, metrics: Metrics) -> Result<Self, String> {
        let resource = Resource::builder_empty().with_attributes([
            KeyValue::new("service.name", settings.service_name),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", settings.instance),
        ]);
        let client = export::client(&settings.endpoint, &settings.headers, settings.timeout)?;
        let (queue, spans) = mpsc::channel(settings.queue);
        let (closing, closed) = (CancellationToken::new(), CancellationToken::new());
        let exporter = Exporter::new(client, &settings.endpoint, (&resource.build()).into(), metrics.clone());
        // Whatever ends the task.
        let (told, over) = (closing.clone(), closed.clone().drop_guard());
        task::spawn("traces", async move {
            exporter.run(spans, told).await;
            drop(over);
        });
        let scope = InstrumentationScope::builder("cellblock").with_version(env!("CARGO_PKG_VERSION")).build();
        let sampler = Sampler::TraceIdRatioBased(settings.sample_ratio);
        let (server, is_tls) = (settings.server, settings.is_tls);
        Ok(Self(Arc::new(Inner { queue, sampler, scope, server, is_tls, metrics, closing, closed })))
    }

    /// A request comes in, with what its caller says of the trace that it belongs to. Without that, or when it is not valid, a trace begins here.
    #[must_use]
    pub fn begin(&self, traceparent: Option<&str>, tracestate: Option<&str>) -> Trace {
        let parent = traceparent.and_then(|traceparent| parent::read(traceparent, tracestate));
        let ids = RandomIdGenerator::default();
        let own = match &parent {
            Some(parent) => {
                let (trace, state) = (parent.trace_id(), parent.trace_state().clone());
                SpanContext::new(trace, ids.new_span_id(), parent.trace_flags(), false, state)
            }
            None => {
                let trace = ids.new_trace_id();
                let sampled = self.0.sampler.should_sample(None, trace, "", &SpanKind::Server, &[], &[]);
                let is_sampled = sampled.decision == SamplingDecision::RecordAndSample;
                let flags = TraceFlags::NOT_SAMPLED.with_sampled(is_sampled);
                SpanContext::new(trace, ids.new_span_id(), flags, false, TraceState::NONE)
            }
        };
        let parent = parent.map(|parent| parent.span_id());
        Trace { traces: self.clone(), own, parent, began: SystemTime::now() }
    }

    /// Nothing more comes: gives what is on its way a moment to arrive.
    pub async fn end(&self) {
        self.0.closing.cancel();
        // What has not arrived by then is lost with the process.
        let _ = tokio::time::timeout(LAST_SPANS, self.0.closed.cancelled()).await;
    }

    fn put(&self, span: SpanData) {
        if self.0.queue.try_send(span).is_err() {
            self.0.metrics.trace_spans_dropped(1);
        }
    }
}

impl Trace {
    /// The trace's id.
    #[must_use]
    pub fn id(&self) -> TraceId {
        self.own.trace_id()
    }

    /// The request is answered, or is not going to be.
    pub fn request_ended(&self, request: &Requested<'_>) {
        if !self.own.is_sampled() {
            return;
        }
        let method = known_method(request.method);
        let Inner { server, is_tls, .. } = *self.traces.0;
        let failed = request.status.filter(|status| *status >= 500);
        let error = failed.map(|status| request.problem.map_or_else(|| status.to_string(), str::to_owned));
        let mut attributes = vec![
            KeyValue::new("http.request.method", method.unwrap_or("_OTHER")),
            KeyValue::new("url.scheme", if is_tls { "https" } else { "http" }),
            KeyValue::new("server.address", server.ip().to_string()),
        ];
        let port = Some(server.port()).filter(|port| *port > 0);
        attributes.extend(port.map(|port| KeyValue::new("server.port", i64::from(port))));
        attributes.extend(request.route.map(|route| KeyValue::new("http.route", route.to_owned())));
        attributes.extend(request.status.map(|s| KeyValue::new("http.response.status_code", i64::from(s))));
        attributes.extend(request.session.map(|id| KeyValue::new("cellblock.session.id", id.to_string())));
        attributes.extend(request.execution.map(|id| KeyValue::new("cellblock.execution.id", id.to_string())));
        let name = match (method.unwrap_or("HTTP"), request.route) {
            (method, Some(route)) => format!("{method} {route}").into(),
            (method, None) => method.into(),
        };
        let times = (self.began, self.began + request.took);
        let span = self.span(name, times, attributes, error);
        self.traces.put(SpanData {
            span_context: self.own.clone(),
            parent_span_id: self.parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: self.parent.is_some(),
            span_kind: SpanKind::Server,
            ..span
        });
    }

    /// An execution that the request has begun has ended.
    pub fn execution_ended(&self, execution: &Executed<'_>) {
        if !self.own.is_sampled() {
            return;
        }
        let Executed { accepted, started, busy, ended, status, .. } = *execution;
        let mut begins = Some(accepted);
        for (name, end) in [("queue", started), ("link", busy), ("kernel", None)] {
            let Some(began) = begins else { return };
            let is_last = end.is_none();
            let attributes = vec![
                KeyValue::new("cellblock.session.id", execution.session.to_string()),
                KeyValue::new("cellblock.execution.id", execution.id.to_string()),
                KeyValue::new("cellblock.template", execution.template.to_owned()),
                KeyValue::new("cellblock.status", status.word()),
            ];
            let error = (is_last && status != Status::Ok).then(|| status.word().to_owned());
            self.traces.put(self.span(name.into(), (began, end.unwrap_or(ended)), attributes, error));
            begins = end;
        }
    }

    /// A span below the request's own.
    fn span(
        &self,
        name: Cow<'static, str>,
        (start_time, end_time): (SystemTime, SystemTime),
        mut attributes: Vec<KeyValue>,
        error: Option<String>,
    ) -> SpanData {
        let own = &self.own;
        let id = RandomIdGenerator::default().new_span_id();
        let status = error.as_ref().map_or(SpanStatus::Unset, |_| SpanStatus::error(""));
        attributes.extend(error.map(|error| KeyValue::new("error.type", error)));
        SpanData {
            span_context: SpanContext::new(own.trace_id(), id, own.trace_flags(), false, own.trace_state().clone()),
            parent_span_id: own.span_id(),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name,
            start_time,
            end_time,
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status,
            instrumentation_scope: self.traces.0.scope.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    /// With a collector that is not there: what is sent to it counts as dropped.
    fn traces(sample_ratio: f64, queue: usize) -> Traces {
        let settings = Settings {
            endpoint: "http://127.0.0.1:1".to_owned(),
            headers: String::new(),
            sample_ratio,
            service_name: "cells".to_owned(),
            instance: "default".to_owned(),
            server: SocketAddr::from(([127, 0, 0, 1], 8080)),
            is_tls: false,
            timeout: Duration::from_secs(1),
            queue,
        };
        Traces::start(settings, Metrics::new()).unwrap()
    }

    fn request_in(trace: &Trace) {
        trace.request_ended(&Requested {
            method: "GET",
            route: None,
            status: Some(200),
            problem: None,
            took: Duration::ZERO,
            session: None,
            execution: None,
        });
    }

    #[tokio::test]
    async fn a_collector_that_is_gone_costs_the_spans_only() {
        let traces = traces(1.0, 2);
        // Nobody takes from the queue before this test waits.
        (0..5).for_each(|_| request_in(&traces.begin(None, None)));
        assert_eq!(traces.0.metrics.dropped_trace_spans(), 3);
        traces.end().await;
        assert_eq!(traces.0.metrics.dropped_trace_spans(), 5);
        request_in(&traces.begin(None, None));
        assert_eq!(traces.0.metrics.dropped_trace_spans(), 6, "it is closed");
    }

    #[tokio::test]
    async fn a_caller_says_whether_its_trace_is_sampled_and_the_ratio_says_it_of_others() {
        for (ratio, others) in [(0.0, 0), (1.0, 1)] {
            for (traceparent, expected) in
                [(None, others), (Some(SAMPLED), 1), (Some(&*SAMPLED.replace("-01", "-00")), 0)]
            {
                let traces = traces(ratio, 2);
                let trace = traces.begin(traceparent, None);
                assert_eq!(trace.id().to_string() == SAMPLED[3..35], traceparent.is_some());
                request_in(&trace);
                traces.end().await;
                assert_eq!(traces.0.metrics.dropped_trace_spans(), expected, "{ratio} {traceparent:?}");
            }
        }
    }
}
