//! What is looked at when somebody asks, instead of being counted: how much there is of everything at this moment.

use prometheus::proto::MetricFamily;
use prometheus::{Gauge, IntCounterVec, Opts};

use super::Maker;

/// How much there is of everything.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Levels {
    /// Sessions in each phase, those of pools included.
    pub sessions: Vec<(&'static str, usize)>,
    /// Sessions in which something runs or waits.
    pub busy: usize,
    /// Executions that wait for their kernel.
    pub queued: usize,
    /// Executions that run.
    pub running: usize,
    /// Creates that wait for a place.
    pub waiting: usize,
    /// Sessions that start.
    pub starting: usize,
    /// Sessions that have a place.
    pub places: Ceiling,
    /// CPUs promised to them.
    pub cpus: Ceiling,
    /// Bytes of memory promised to them.
    pub memory: Ceiling,
    /// Workspaces that outlive sessions.
    pub workspaces: usize,
    /// The pools.
    pub pools: Vec<PoolLevel>,
    /// Sessions of each tenant, where tenants are counted.
    pub tenants: Vec<(String, usize)>,
}

/// What was promised of something, and what may be.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Ceiling {
    /// Promised.
    pub promised: f64,
    /// The most that may be; nothing: there is no ceiling.
    pub most: Option<f64>,
}

/// One template's pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoolLevel {
    /// The template.
    pub template: String,
    /// Sessions that can be claimed.
    pub ready: usize,
    /// Sessions that start.
    pub starting: usize,
    /// How many there should be.
    pub target: usize,
    /// Requests that got one.
    pub hits: u64,
    /// Requests that could have, and found none.
    pub misses: u64,
}

impl Levels {
    /// In the form of counted figures.
    pub(super) fn gather(&self) -> Vec<MetricFamily> {
        let of = Maker(prometheus::Registry::new());
        let phases =
            of.gauges("sessions", "Sessions that have not ended, by phase; those of pools included.", &["phase"]);
        for (phase, count) in &self.sessions {
            phases.with_label_values(&[*phase]).set(*count as f64);
        }
        let executions = of.gauges("unfinished_executions", "Executions that wait or run.", &["status"]);
        executions.with_label_values(&["queued"]).set(self.queued as f64);
        executions.with_label_values(&["running"]).set(self.running as f64);
        of.gauge("busy_sessions", "Sessions in which something runs or waits.", self.busy as f64);
        of.gauge("waiting_creates", "Creates that wait for a place.", self.waiting as f64);
        of.gauge("starting_sessions", "Sessions that start, and so keep others from starting.", self.starting as f64);
        of.gauge(
            "workspaces",
            "Workspaces that outlive sessions, those included that are to be removed.",
            self.workspaces as f64,
        );
        of.ceiling("sessions", "Places of sessions", self.places);
        of.ceiling("cpus", "CPUs", self.cpus);
        of.ceiling("memory_bytes", "Bytes of memory", self.memory);
        of.pools(&self.pools);
        if !self.tenants.is_empty() {
            let sessions = of.gauges("tenant_sessions", "Sessions that have not ended, by tenant.", &["tenant"]);
            for (tenant, count) in &self.tenants {
                sessions.with_label_values(&[tenant]).set(*count as f64);
            }
        }
        of.0.gather()
    }
}

impl Maker {
    fn gauge(&self, name: &str, help: &str, value: f64) {
        self.made(Gauge::new(Self::name(name), help)).set(value);
    }

    fn ceiling(&self, what: &str, words: &str, Ceiling { promised, most }: Ceiling) {
        self.gauge(&format!("promised_{what}"), &format!("{words} that live sessions were promised."), promised);
        let help = format!("{words} that live sessions may have together; +Inf without a ceiling.");
        self.gauge(&format!("ceiling_{what}"), &help, most.unwrap_or(f64::INFINITY));
    }

    fn pools(&self, pools: &[PoolLevel]) {
        let sessions =
            self.gauges("pool_sessions", "Sessions of pools, by template and state.", &["template", "state"]);
        let targets = self.gauges("pool_target_sessions", "Sessions that a pool should have now.", &["template"]);
        let counts = |name, help| self.made(IntCounterVec::new(Opts::new(Self::name(name), help), &["template"]));
        let hits = counts("pool_hits_total", "Creates that got a session of a pool.");
        let misses =
            counts("pool_misses_total", "Creates that a pool's session would have fitted, and that found none.");
        // A template may have pools of several sizes.
        for pool in pools {
            let template = pool.template.as_str();
            sessions.with_label_values(&[template, "ready"]).add(pool.ready as f64);
            sessions.with_label_values(&[template, "starting"]).add(pool.starting as f64);
            targets.with_label_values(&[template]).add(pool.target as f64);
            hits.with_label_values(&[template]).inc_by(pool.hits);
            misses.with_label_values(&[template]).inc_by(pool.misses);
        }
    }
}
