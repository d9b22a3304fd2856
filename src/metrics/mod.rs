//! What the server counts of itself, for Prometheus: each figure with its name, its unit and its labels. It decides nothing, and knows nothing of who counts.
//!
//! Every label has few values that are known beforehand: words of ours, names of templates, templates of routes. No id is among them, and no tenant but in figures of their
//! own that have to be asked for (`tenants`). The figures are this handle's own, so that two servers in one process count apart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

use crate::domain::lifecycle::EndReason;
use crate::domain::output::{Status, Truncated};

mod levels;
mod tenants;

pub use levels::{Ceiling, Levels, PoolLevel};
use tenants::Tenants;

/// The form of the exposition, as Prometheus wants it in `Content-Type`.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Bounds of the histograms, in seconds.
const STARTS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];
const EXECUTIONS: &[f64] = &[0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0, 3600.0];
const WAITS: &[f64] = &[0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0];
const CALLS: &[f64] = &[0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
const COMMITS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];

/// How a session came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Made when it was asked for.
    Cold,
    /// Claimed from a pool.
    Warm,
    /// Made for a pool.
    Pool,
    /// A live session's next container.
    Replacement,
}

impl Source {
    const ALL: [Self; 4] = [Self::Cold, Self::Warm, Self::Pool, Self::Replacement];

    fn word(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Pool => "pool",
            Self::Replacement => "replacement",
        }
    }
}

/// How a start ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// The session is ready.
    Ok,
    /// It could not be started.
    Failed,
    /// It was ended before it was ready.
    Ended,
}

impl Started {
    const ALL: [Self; 3] = [Self::Ok, Self::Failed, Self::Ended];

    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::Ended => "ended",
        }
    }
}

/// What a comparison of the engine with the sessions has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reconciled {
    /// A container that no session knows was removed.
    OrphanRemoved,
    /// A container that was made after its session had given it up was removed.
    StrayRemoved,
    /// A session was told to look for its container.
    SessionTold,
    /// Something that earlier versions have left was removed.
    LeftoverRemoved,
    /// Something could not be removed.
    Failed,
}

impl Reconciled {
    const ALL: [Self; 5] =
        [Self::OrphanRemoved, Self::StrayRemoved, Self::SessionTold, Self::LeftoverRemoved, Self::Failed];

    fn word(self) -> &'static str {
        match self {
            Self::OrphanRemoved => "orphan_removed",
            Self::StrayRemoved => "stray_removed",
            Self::SessionTold => "session_told",
            Self::LeftoverRemoved => "leftover_removed",
            Self::Failed => "failed",
        }
    }
}

/// The figures. Clones are the same.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Instruments>);

#[derive(Debug)]
struct Instruments {
    registry: Registry,
    sessions: Sessions,
    executions: Executions,
    engine: Calls,
    reconciler: Rounds,
    requests: Requests,
    egress: Egress,
    spans_dropped: IntCounter,
    tenants: Option<Tenants>,
}

#[derive(Debug)]
struct Sessions {
    starts: IntCounterVec,
    start_seconds: HistogramVec,
    ends: IntCounterVec,
    wait: Histogram,
    refused: IntCounter,
}

impl Sessions {
    fn new(of: &Maker) -> Self {
        let starts = "Starts of sessions by where they came from and how they ended.";
        let start = "Time from a session's place, or its claim, until it was ready; without those that failed.";
        let wait = "Time that creates waited for a place, those without success included.";
        let refused = "Creates that found no place in their time, or no room in the line.";
        let made = Self {
            starts: of.counters("session_starts_total", starts, &["source", "outcome"], &[]),
            start_seconds: of.histograms("session_start_duration_seconds", start, &["source"], STARTS),
            ends: of.counters(
                "session_ends_total",
                "Sessions that have ended, by reason.",
                &["reason"],
                &EndReason::ALL.map(EndReason::word),
            ),
            wait: of.histogram("create_queue_wait_duration_seconds", wait, WAITS),
            refused: of.counter("creates_refused_total", refused),
        };
        for source in Source::ALL.map(Source::word) {
            Started::ALL.iter().for_each(|o| drop(made.starts.with_label_values(&[source, o.word()])));
            drop(made.start_seconds.with_label_values(&[source]));
        }
        made
    }
}

#[derive(Debug)]
struct Executions {
    ended: IntCounterVec,
    seconds: HistogramVec,
    wait: Histogram,
    truncations: IntCounterVec,
}

impl Executions {
    fn new(of: &Maker) -> Self {
        let statuses = Status::FINAL.map(Status::word);
        let seconds = "Time from an execution's start until its end, by status.";
        let truncations = "Places at which output of an execution was left out, by what it was.";
        let known = Truncated::ALL.map(Truncated::word);
        let made = Self {
            ended: of.counters("executions_total", "Executions that have ended, by status.", &["status"], &statuses),
            seconds: of.histograms("execution_duration_seconds", seconds, &["status"], EXECUTIONS),
            wait: of.histogram(
                "execution_queue_wait_duration_seconds",
                "Time that executions waited for their kernel.",
                WAITS,
            ),
            truncations: of.counters("output_truncations_total", truncations, &["output"], &known),
        };
        statuses.iter().for_each(|status| drop(made.seconds.with_label_values(&[*status])));
        made
    }
}

/// Calls to the engine, and what its streams carry.
#[derive(Debug)]
struct Calls {
    count: IntCounterVec,
    seconds: HistogramVec,
    received: IntCounter,
    sent: IntCounter,
}

impl Calls {
    fn new(of: &Maker) -> Self {
        let count = "Calls to the container engine, by operation and result.";
        let seconds = "Time that calls to the container engine took, by operation.";
        Self {
            count: of.counters("engine_calls_total", count, &["operation", "result"], &[]),
            seconds: of.histograms("engine_call_duration_seconds", seconds, &["operation"], CALLS),
            received: of.counter("link_received_bytes_total", "Bytes that guests have sent over their links."),
            sent: of.counter("link_sent_bytes_total", "Bytes that guests were sent over their links."),
        }
    }
}

#[derive(Debug)]
struct Rounds {
    count: IntCounterVec,
    actions: IntCounterVec,
}

impl Rounds {
    fn new(of: &Maker) -> Self {
        let (count, known) =
            ("Comparisons of the engine with the sessions, by result.", Reconciled::ALL.map(Reconciled::word));
        let actions = "What comparing the engine with the sessions has led to.";
        Self {
            count: of.counters("reconcile_rounds_total", count, &["result"], &["ok", "failed"]),
            actions: of.counters("reconcile_actions_total", actions, &["action"], &known),
        }
    }
}

#[derive(Debug)]
struct Requests {
    count: IntCounterVec,
    seconds: HistogramVec,
}

impl Requests {
    fn new(of: &Maker) -> Self {
        let count = "Answered requests by template of the route, method and class of the status.";
        let seconds = "Time until a request's answer began, by template of the route and method.";
        Self {
            count: of.counters("http_requests_total", count, &["route", "method", "status"], &[]),
            seconds: of.histograms("http_request_duration_seconds", seconds, &["route", "method"], CALLS),
        }
    }
}

/// Connections of cells to the outside.
#[derive(Debug)]
struct Egress {
    decided: IntCounterVec,
    sent: IntCounter,
    received: IntCounter,
}

impl Egress {
    fn new(of: &Maker) -> Self {
        let decided = "Connections that code has asked for, by what was decided.";
        Self {
            decided: of.counters("egress_connections_total", decided, &["outcome"], &["ok"]),
            sent: of.counter("egress_sent_bytes_total", "Bytes that code has sent to the outside."),
            received: of.counter("egress_received_bytes_total", "Bytes that code was sent from outside."),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Nothing was counted yet.
    #[must_use]
    pub fn new() -> Self {
        Self::counting(false)
    }

    /// The same, which counts by tenant too.
    #[must_use]
    pub fn by_tenant() -> Self {
        Self::counting(true)
    }

    fn counting(by_tenant: bool) -> Self {
        let of = Maker(Registry::new());
        let build = of.gauges("build_info", "The version of the server that runs; always 1.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        Self(Arc::new(Instruments {
            sessions: Sessions::new(&of),
            executions: Executions::new(&of),
            engine: Calls::new(&of),
            reconciler: Rounds::new(&of),
            requests: Requests::new(&of),
            egress: Egress::new(&of),
            spans_dropped: of.counter("trace_spans_dropped_total", "Spans of traces that no collector has taken."),
            tenants: by_tenant.then(|| Tenants::new(&of)),
            registry: of.0,
        }))
    }

    /// A start has ended, after this long.
    pub fn session_started(&self, source: Source, outcome: Started, took: Duration) {
        self.0.sessions.starts.with_label_values(&[source.word(), outcome.word()]).inc();
        if outcome == Started::Ok {
            self.0.sessions.start_seconds.with_label_values(&[source.word()]).observe(took.as_secs_f64());
        }
    }

    /// A session has ended.
    pub fn session_ended(&self, reason: EndReason) {
        self.0.sessions.ends.with_label_values(&[reason.word()]).inc();
    }

    /// A create has waited for a place, and got it or not.
    pub fn create_waited(&self, took: Duration, has_place: bool) {
        self.0.sessions.wait.observe(took.as_secs_f64());
        self.0.sessions.refused.inc_by(u64::from(!has_place));
    }

    /// An execution has begun, after it waited this long.
    pub fn execution_began(&self, waited: Duration) {
        self.0.executions.wait.observe(waited.as_secs_f64());
    }

    /// An execution has ended, this long after its start, if it had one.
    pub fn execution_ended(&self, status: Status, ran: Option<Duration>) {
        self.0.executions.ended.with_label_values(&[status.word()]).inc();
        if let Some(ran) = ran {
            self.0.executions.seconds.with_label_values(&[status.word()]).observe(ran.as_secs_f64());
        }
    }

    /// An execution of a tenant's has ended, and so much CPU time counts for it. Nothing is counted unless tenants are.
    pub fn execution_of_tenant_ended(&self, tenant: &str, status: Status, cpu: Duration) {
        if let Some(tenants) = &self.0.tenants {
            tenants.execution_ended(tenant, status, cpu);
        }
    }

    /// How many there are of each tenant, by its label; nothing unless tenants are counted.
    #[must_use]
    pub fn tenant_levels<'a>(&self, of: impl Iterator<Item = &'a str>) -> Vec<(String, usize)> {
        let Some(tenants) = &self.0.tenants else { return Vec::new() };
        let mut levels = BTreeMap::<&str, usize>::new();
        of.for_each(|tenant| *levels.entry(tenants.label(tenant)).or_default() += 1);
        levels.into_iter().map(|(tenant, count)| (tenant.to_owned(), count)).collect()
    }

    /// Output was left out.
    pub fn output_truncated(&self, what: Truncated) {
        self.0.executions.truncations.with_label_values(&[what.word()]).inc();
    }

    /// The engine was called. `operation` and `result` are words of ours.
    pub fn engine_called(&self, operation: &'static str, result: &'static str, took: Duration) {
        self.0.engine.count.with_label_values(&[operation, result]).inc();
        self.0.engine.seconds.with_label_values(&[operation]).observe(took.as_secs_f64());
    }

    /// A guest has sent so many bytes.
    pub fn link_received(&self, bytes: usize) {
        self.0.engine.received.inc_by(bytes as u64);
    }

    /// A guest was sent so many bytes.
    pub fn link_sent(&self, bytes: usize) {
        self.0.engine.sent.inc_by(bytes as u64);
    }

    /// A connection to the outside was made (`ok`), or refused; the word is one of ours.
    pub fn egress_decided(&self, outcome: &'static str) {
        self.0.egress.decided.with_label_values(&[outcome]).inc();
    }

    /// Cells have sent so many bytes out.
    pub fn egress_sent(&self, bytes: usize) {
        self.0.egress.sent.inc_by(bytes as u64);
    }

    /// Cells were sent so many bytes from outside.
    pub fn egress_received(&self, bytes: usize) {
        self.0.egress.received.inc_by(bytes as u64);
    }

    /// So many spans of traces were dropped.
    pub fn trace_spans_dropped(&self, count: usize) {
        self.0.spans_dropped.inc_by(count as u64);
    }

    /// How many were dropped by now.
    #[must_use]
    pub fn dropped_trace_spans(&self) -> u64 {
        self.0.spans_dropped.get()
    }

    /// Comparing the engine with the sessions has led to something, so many times.
    pub fn reconciled(&self, action: Reconciled, times: usize) {
        self.0.reconciler.actions.with_label_values(&[action.word()]).inc_by(times as u64);
    }

    /// The engine was compared with the sessions, or could not be.
    pub fn reconcile_round(&self, succeeded: bool) {
        self.0.reconciler.count.with_label_values(&[if succeeded { "ok" } else { "failed" }]).inc();
    }

    /// A request was answered. `route` is a template; methods that HTTP does not define, which callers make up, count as one.
    pub fn request_answered(&self, route: &str, method: &str, status: u16, took: Duration) {
        let method = known_method(method).unwrap_or("other");
        let class = match status / 100 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            _ => "5xx",
        };
        self.0.requests.count.with_label_values(&[route, method, class]).inc();
        self.0.requests.seconds.with_label_values(&[route, method]).observe(took.as_secs_f64());
    }

    /// Counts the commits of a database too.
    pub fn include(&self, commits: &Commits) {
        for collector in [Box::new(commits.count.clone()) as Box<dyn Collector>, Box::new(commits.seconds.clone())] {
            if self.0.registry.register(collector).is_err() {
                tracing::error!("the commits of two databases can't be counted as one");
            }
        }
    }

    /// Everything in the text format of Prometheus, with what was seen at this moment.
    #[must_use]
    pub fn render(&self, levels: &Levels) -> String {
        let mut families = self.0.registry.gather();
        families.extend(levels.gather());
        // Writing into a string fails for families without a figure or a name only, and there are none.
        TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }
}

/// The commits of a database. Clones are the same.
#[derive(Debug, Clone)]
pub struct Commits {
    count: IntCounterVec,
    seconds: Histogram,
}

impl Default for Commits {
    fn default() -> Self {
        let of = Maker(Registry::new());
        let count = of.counters(
            "database_commits_total",
            "Commits of the database, by result.",
            &["result"],
            &["ok", "failed"],
        );
        let seconds =
            of.histogram("database_commit_duration_seconds", "Time that a commit of the database took.", COMMITS);
        Self { count, seconds }
    }
}

impl Commits {
    /// Something was committed, or could not be.
    pub fn committed(&self, succeeded: bool, took: Duration) {
        self.count.with_label_values(&[if succeeded { "ok" } else { "failed" }]).inc();
        self.seconds.observe(took.as_secs_f64());
    }
}

/// A method as HTTP defines it; nothing of one that a caller has made up.
#[must_use]
pub fn known_method(method: &str) -> Option<&'static str> {
    const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"];
    METHODS.into_iter().find(|known| *known == method)
}

/// Makes figures under our prefix. Names and labels are written in this folder, so that one which is not allowed, or is there twice, is a defect that every
/// start shows.
struct Maker(Registry);

impl Maker {
    fn name(name: &str) -> String {
        format!("cellblock_{name}")
    }

    fn made<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let made = made.expect("the name and the labels of a figure are allowed");
        self.0.register(Box::new(made.clone())).expect("a figure is there once");
        made
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.made(IntCounter::new(Self::name(name), help))
    }

    /// With `known` values of a single label there from the beginning, so that their rates are right from the first one on.
    fn counters(&self, name: &str, help: &str, labels: &[&str], known: &[&str]) -> IntCounterVec {
        let made = self.made(IntCounterVec::new(Opts::new(Self::name(name), help), labels));
        known.iter().for_each(|value| drop(made.with_label_values(&[*value])));
        made
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.made(GaugeVec::new(Opts::new(Self::name(name), help), labels))
    }

    fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Histogram {
        self.made(Histogram::with_opts(HistogramOpts::new(Self::name(name), help).buckets(bounds.to_vec())))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], bounds: &[f64]) -> HistogramVec {
        let options = HistogramOpts::new(Self::name(name), help).buckets(bounds.to_vec());
        self.made(HistogramVec::new(options, labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_in_one_process_count_apart() {
        let (one, other) = (Metrics::new(), Metrics::new());
        one.session_ended(EndReason::Idle);
        let line = |n| format!("cellblock_session_ends_total{{reason=\"idle\"}} {n}\n");
        assert!(one.render(&Levels::default()).contains(&line(1)));
        assert!(other.render(&Levels::default()).contains(&line(0)));
    }

    #[test]
    fn tenants_are_counted_where_that_is_wanted_and_only_so_many_by_name() {
        let count = |metrics: &Metrics| {
            for n in 0..tenants::MAX_TENANTS + 5 {
                metrics.execution_of_tenant_ended(&format!("t{n}"), Status::Ok, Duration::from_millis(500));
            }
            let sessions = metrics.tenant_levels(["t0", "t0", "late", "later"].into_iter());
            metrics.render(&Levels { tenants: sessions, ..Levels::default() })
        };
        assert!(!count(&Metrics::new()).contains("tenant"));
        let text = count(&Metrics::by_tenant());
        for line in [
            "cellblock_tenant_executions_total{status=\"ok\",tenant=\"t0\"} 1",
            "cellblock_tenant_executions_total{status=\"ok\",tenant=\"other\"} 5",
            "cellblock_tenant_cpu_seconds_total{tenant=\"other\"} 2.5",
            "cellblock_tenant_sessions{tenant=\"t0\"} 2",
            "cellblock_tenant_sessions{tenant=\"other\"} 2",
        ] {
            assert!(text.lines().any(|told| told == line), "{line} is not in {text}");
        }
        let of_executions = text.lines().filter(|line| line.starts_with("cellblock_tenant_executions_total{"));
        assert_eq!(of_executions.count(), tenants::MAX_TENANTS + 1);
    }

    #[test]
    fn a_method_that_a_caller_makes_up_takes_no_room() {
        let metrics = Metrics::new();
        for n in 0..100 {
            metrics.request_answered("/livez", &format!("X{n}"), 405, Duration::ZERO);
        }
        let text = metrics.render(&Levels::default());
        assert!(text.contains("cellblock_http_requests_total{method=\"other\",route=\"/livez\",status=\"4xx\"} 100\n"));
        assert!(!text.contains("X1"), "{text}");
    }
}
