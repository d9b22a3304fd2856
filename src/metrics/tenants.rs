//! What is counted by tenant, where that is wanted. Tenants are no words of ours, so only so many of them have a label of their own. It knows nothing of who they are.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{CounterVec, IntCounterVec, Opts};

use super::Maker;
use crate::domain::output::Status;

/// So many tenants have a label of their own, in the order in which they come …
pub(super) const MAX_TENANTS: usize = 200;
/// … and all others this one.
pub(super) const OTHER: &str = "other";

/// Figures by tenant.
#[derive(Debug)]
pub(super) struct Tenants {
    known: Mutex<HashSet<Arc<str>>>,
    executions: IntCounterVec,
    cpu: CounterVec,
}

impl Tenants {
    pub(super) fn new(of: &Maker) -> Self {
        let executions = "Executions that have ended, by tenant and status.";
        let cpu = "CPU time that executions have used, by tenant, as it counts for the tenant's quota.";
        let name = Maker::name("tenant_cpu_seconds_total");
        Self {
            known: Mutex::default(),
            executions: of.counters("tenant_executions_total", executions, &["tenant", "status"], &[]),
            cpu: of.made(CounterVec::new(Opts::new(name, cpu), &["tenant"])),
        }
    }

    /// What a tenant is called.
    pub(super) fn label<'a>(&self, tenant: &'a str) -> &'a str {
        // Every change is a single call, so a panic leaves nothing half done.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.contains(tenant) {
            return tenant;
        }
        if known.len() >= MAX_TENANTS {
            return OTHER;
        }
        known.insert(Arc::from(tenant));
        tenant
    }

    pub(super) fn execution_ended(&self, tenant: &str, status: Status, cpu: Duration) {
        let tenant = self.label(tenant);
        self.executions.with_label_values(&[tenant, status.word()]).inc();
        self.cpu.with_label_values(&[tenant]).inc_by(cpu.as_secs_f64());
    }
}
