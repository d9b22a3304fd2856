//! Sandboxes as E2B's clients read them: what a create or a connect answers, and what a list and a look tell.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::super::sandbox::{LABEL_AUTO_RESUME, LABEL_TEMPLATE};
use super::network;
use super::{Named, rests};
use crate::domain::lifecycle::Phase;
use crate::domain::spec::{MIB, OnExpiry};
use crate::http::App;
use crate::http::extract::Answer;
use crate::http::v1::sessions::time;
use crate::service::bearer::Purpose;
use crate::session::{Session, Snapshot};

/// The version of E2B's agent that a sandbox answers as: clients switch on by it what they ask for.
const AGENT_VERSION: &str = "0.6.13";
/// Clients want one, and do nothing with it.
const CLIENT: &str = "cellblock";

/// What a create or a connect answers: all that a client works with.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SandboxView {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    envd_version: &'static str,
    envd_access_token: String,
    traffic_access_token: String,
    domain: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
}

impl SandboxView {
    /// Whoever is told must be allowed to work with it.
    pub(super) fn of(app: &App, session: &Session) -> Self {
        Self {
            template_id: session.spec.template.clone(),
            sandbox_id: session.id.to_string(),
            client_id: CLIENT,
            envd_version: AGENT_VERSION,
            envd_access_token: app.service.session_token(Purpose::Agent, session.id),
            traffic_access_token: app.service.session_token(Purpose::Traffic, session.id),
            domain: domain(app),
            alias: alias(&session.snapshot()),
        }
    }
}

/// A sandbox in a list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListedView {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
    started_at: String,
    end_at: String,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u64,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u64,
    state: &'static str,
    envd_version: &'static str,
    metadata: BTreeMap<String, String>,
}

impl ListedView {
    pub(super) fn of(session: &Session) -> Self {
        let (spec, snapshot) = (&session.spec, session.snapshot());
        Self {
            template_id: spec.template.clone(),
            sandbox_id: session.id.to_string(),
            client_id: CLIENT,
            alias: alias(&snapshot),
            started_at: time(session.created_at),
            end_at: time(end_of(session, &snapshot)),
            cpu_count: cpus(session),
            memory_mb: spec.resources.memory_bytes / MIB,
            disk_size_mb: spec.resources.disk_bytes / MIB,
            state: if rests(session) { "paused" } else { "running" },
            envd_version: AGENT_VERSION,
            metadata: spec.metadata.clone(),
        }
    }
}

/// A sandbox that is looked at.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DetailView {
    #[serde(flatten)]
    listed: ListedView,
    /// Only for who may work with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    domain: Option<String>,
    allow_internet_access: bool,
    network: Value,
    lifecycle: Value,
}

/// Looks at a sandbox.
pub(super) async fn get_one(Named { app, who, session }: Named) -> Answer<DetailView> {
    let snapshot = session.snapshot();
    let may_work = who.require_sessions().is_ok();
    let on_timeout = match session.spec.on_expiry {
        OnExpiry::Delete => "kill",
        OnExpiry::Pause => "pause",
    };
    let resumes = snapshot.attributes.labels.get(LABEL_AUTO_RESUME).is_some_and(|value| value == "true");
    Answer(DetailView {
        listed: ListedView::of(&session),
        envd_access_token: may_work.then(|| app.service.session_token(Purpose::Agent, session.id)),
        domain: domain(&app),
        allow_internet_access: snapshot.attributes.network.is_open(),
        network: network::told(&snapshot.attributes.network),
        lifecycle: json!({"autoResume": resumes, "onTimeout": on_timeout}),
    })
}

/// The template as its creator named it.
pub(super) fn alias(snapshot: &Snapshot) -> Option<String> {
    snapshot.attributes.labels.get(LABEL_TEMPLATE).cloned()
}

/// Whole CPUs, of which there is at least one.
pub(super) fn cpus(session: &Session) -> u32 {
    session.spec.resources.cpu_millis.div_ceil(1000).max(1)
}

fn domain(app: &App) -> Option<String> {
    app.e2b.as_ref()?.domain.as_deref().map(str::to_owned)
}

/// When it ends, or is paused. A paused one ends when it was paused for its time.
fn end_of(session: &Session, snapshot: &Snapshot) -> jiff::Timestamp {
    let oldest = session.created_at.saturating_add(session.spec.max_lifetime).unwrap_or(jiff::Timestamp::MAX);
    match snapshot.idle_deadline {
        Some(end) if matches!(snapshot.phase, Phase::Paused) => end.min(oldest),
        _ => snapshot.expires_at,
    }
}
