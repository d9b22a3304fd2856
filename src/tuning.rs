//! What of a configuration can change while the server runs: how the parts are told, at its start and when the configuration is read again.

use std::sync::{Arc, Mutex, PoisonError};

use crate::config::{self, Change, Config, Inputs, Loaded};
use crate::domain::spec::{self, PoolPlan, Template};
use crate::http::tls::{Certificate, Tls};
use crate::service::admin::{Changed, Reload};
use crate::service::log::LogLevel;
use crate::service::offer::{Choice, Offer};
use crate::service::quotas::Quotas;
use crate::session::Settings;
use crate::session::capacity::Ceilings;
use crate::session::pool::Plan;
use crate::session::registry::{Limits, Registry};
use crate::session::tap::TapBounds;

/// Reads a configuration again from where it came from, and tells the parts.
pub struct Reloader {
    /// Where it is read from.
    pub inputs: Inputs,
    /// What is in force.
    pub loaded: Mutex<Loaded>,
    /// Bounds and pools.
    pub registry: Arc<Registry>,
    /// Templates.
    pub offer: Offer,
    /// Quotas of tenants.
    pub quotas: Arc<Quotas>,
    /// The log's level, if it can be changed.
    pub log: Option<LogLevel>,
    /// The certificate, where TLS is spoken.
    pub shown: Option<Shown>,
}

/// What callers are shown of who this is.
#[derive(Debug)]
pub struct Shown {
    tls: Arc<Tls>,
    /// The one that the last reload, or the start, has left.
    before: Mutex<String>,
}

impl Shown {
    /// As it is now.
    pub fn new(tls: Arc<Tls>) -> Self {
        let before = Mutex::new(tls.in_force().sha256);
        Self { tls, before }
    }

    fn look(&self) -> Result<Option<Certificate>, String> {
        self.tls.look().map_err(|error| format!("server.tls_cert_file: {error}; the certificate in force stays"))
    }

    /// Takes one over. It may have been noticed before by the task that looks now and then: then that is told now.
    fn take_over(&self, fresh: Option<Certificate>) -> Option<Changed> {
        if let Some(fresh) = fresh {
            self.tls.put_in_force(fresh);
        }
        let now = self.tls.in_force().sha256;
        let before = std::mem::replace(&mut *self.before.lock().unwrap_or_else(PoisonError::into_inner), now.clone());
        let shown = |sha256: &str| Some(format!("\"sha256:{sha256}\""));
        let key = "server.tls_cert_file".to_owned();
        (before != now).then(|| Changed { key, before: shown(&before), after: shown(&now) })
    }
}

impl std::fmt::Debug for Reloader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reloader").field("inputs", &self.inputs).finish_non_exhaustive()
    }
}

impl Reload for Reloader {
    fn reload(&self) -> Result<Vec<Changed>, Vec<String>> {
        // Held to the end: one after the other.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let later = config::load(&self.inputs)
            .map_err(|mistakes| mistakes.0.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let changes = loaded.changes(&later);
        let mut refused: Vec<String> = changes.iter().filter(|change| !change.is_live()).map(needs_restart).collect();
        let fresh = match self.shown.as_ref().map(Shown::look).transpose() {
            Ok(fresh) => fresh.flatten(),
            Err(mistake) => {
                refused.push(mistake);
                None
            }
        };
        if !refused.is_empty() {
            return Err(refused);
        }
        let config = &later.config;
        if let Some(log) = self.log.as_ref().filter(|_| config.log.level != loaded.config.log.level) {
            log.change(&config.log.level).map_err(|reason| vec![format!("log.level: {reason}")])?;
        }
        self.registry.tune(settings(config), limits(config));
        self.quotas.change(config.quotas.clone());
        self.offer.change(choice(config));
        self.registry.pool().change(pool_plans(config));
        let told = changes.into_iter().map(|Change { key, before, after, .. }| Changed { key, before, after });
        let mut told: Vec<_> = told.chain(self.shown.as_ref().and_then(|shown| shown.take_over(fresh))).collect();
        told.sort_by(|one, other| one.key.cmp(&other.key));
        for change in &told {
            tracing::info!(%change, "the configuration has changed");
        }
        *loaded = later;
        Ok(told)
    }
}

fn needs_restart(change: &Change) -> String {
    let source = change.source.as_ref().map(|source| format!(" ({source})")).unwrap_or_default();
    format!("{change}{source}: this needs a restart; take it back, or restart the server, which keeps its sessions")
}

/// What callers can choose from.
pub fn choice(config: &Config) -> Choice {
    Choice { templates: config.templates.clone(), default: config.default_template.clone() }
}

/// What each session is told.
pub fn settings(config: &Config) -> Settings {
    Settings {
        start_timeout: config.engine.start_timeout,
        interrupt_grace: config.executions.interrupt_grace,
        orphan_timeout: config.engine.orphan_timeout,
        queued_executions: config.limits.queued_executions as usize,
        queue_timeout: config.executions.queue_timeout,
        contexts: config.limits.contexts as usize,
        inline: usize::try_from(config.executions.inline).unwrap_or(usize::MAX),
        package_bytes: config.packages.size,
        package_timeout: config.packages.timeout,
        tap: TapBounds {
            bytes: usize::try_from(config.jupyter.buffer_size).unwrap_or(usize::MAX),
            time: config.jupyter.buffer_time,
        },
    }
}

/// What is kept ready.
pub fn pool_plans(config: &Config) -> Vec<Plan> {
    let plans = |template: &Template| {
        let plan = |PoolPlan { request, size }: &PoolPlan| {
            let spec = spec::resolve(template, request).ok().filter(|_| size.max > 0)?;
            Some(Plan { spec, image: template.image.clone(), size: *size })
        };
        template.pools.iter().filter_map(plan).collect::<Vec<_>>()
    };
    config.templates.values().flat_map(plans).collect()
}

/// How much is kept, and how much there may be.
pub fn limits(config: &Config) -> Limits {
    Limits {
        ceilings: ceilings(config),
        session_retention: config.limits.session_retention,
        execution_retention: config.executions.retention_time,
        executions: config.executions.retention_count as usize,
        execution_bytes: config.executions.retention_size,
        workspaces: config.limits.workspaces as usize,
    }
}

/// What may be promised at once.
pub fn ceilings(config: &Config) -> Ceilings {
    Ceilings {
        sessions: config.limits.sessions as usize,
        cpu_millis: Some((config.limits.cpu * 1000.0) as u64).filter(|millis| *millis > 0),
        memory_bytes: Some(config.limits.memory).filter(|bytes| *bytes > 0),
        starts: config.limits.concurrent_starts as usize,
        waiting: config.limits.queued_creates as usize,
        patience: config.limits.create_wait,
    }
}
