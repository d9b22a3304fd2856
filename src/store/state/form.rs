//! A session's record as JSON: the form only. What later servers add is optional, so that each reads what an older one wrote.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cellblock_wire::marker::LinkSecret;
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::value::RawValue;

use super::execution_form::{CauseItem, Maybe, parsed};
use super::network_form::{self, NetworkForm};
use super::{ContextRecord, Lasting, SessionRecord, Stage};
use crate::domain::data::DataMount;
use crate::domain::egress::NetworkOffer;
use crate::domain::lifecycle::EndReason;
use crate::domain::output::{JsonText, RestartCause};
use crate::domain::ports::Ports;
use crate::domain::spec::{
    self, KernelTransport, OnExpiry, OnGuestLost, OnIdle, OnKernelDeath, OutputLimits, Resources, SessionSpec, Timeouts,
};
use crate::domain::workspace::{WorkspaceOffer, WorkspaceUse};
use crate::store::moment;

/// Writes a record, but for its id and revision, which have columns of their own.
pub(super) fn write(record: &SessionRecord) -> serde_json::Result<String> {
    let SessionRecord { secret, contexts, .. } = record;
    serde_json::to_string(&Form {
        tenant: record.tenant.to_string(),
        spec: SpecForm(SessionSpec::clone(&record.spec)),
        stage: record.stage.into(),
        paused_since: match record.stage {
            Stage::Paused(since) => Some(moment::text(since)),
            _ => None,
        },
        lasting: record.lasting,
        workspace: record.workspace.map(|id| id.to_string()),
        is_warm: record.is_warm,
        secret: secret.0.iter().map(|b| format!("{b:02x}")).collect(),
        created_at: record.created_at,
        expires_at: record.expires_at,
        last_active: record.last_active,
        idle: record.idle,
        labels: record.labels.clone(),
        network: Some(NetworkForm::from(&record.network)),
        env: record.env.clone(),
        cells: record.cells,
        loss: record.loss.clone(),
        default_context: record.default_context.to_string(),
        contexts: contexts.iter().map(ContextForm::from).collect(),
    })
}

/// Reads a record.
pub(super) fn read(id: &str, revision: u64, body: &str) -> serde_json::Result<SessionRecord> {
    let form: Form = serde_json::from_str(body)?;
    let paused_since = form.paused_since.as_deref().map(parsed).transpose()?;
    Ok(SessionRecord {
        id: parsed(id)?,
        revision,
        tenant: Arc::from(form.tenant),
        network: form.network.map_or_else(|| form.spec.0.network.initial.clone(), Into::into),
        spec: Arc::new(form.spec.0),
        stage: match (form.stage.into(), paused_since) {
            (Stage::Live, Some(since)) => Stage::Paused(since),
            (stage, _) => stage,
        },
        lasting: form.lasting,
        workspace: form.workspace.as_deref().map(parsed).transpose()?,
        is_warm: form.is_warm,
        secret: secret(&form.secret)?,
        created_at: form.created_at,
        expires_at: form.expires_at,
        last_active: form.last_active,
        idle: form.idle,
        labels: form.labels,
        env: form.env,
        cells: form.cells,
        loss: form.loss,
        default_context: parsed(&form.default_context)?,
        contexts: form.contexts.into_iter().map(ContextRecord::try_from).collect::<Result<_, _>>()?,
    })
}

fn secret(hex: &str) -> serde_json::Result<LinkSecret> {
    let number = u128::from_str_radix(hex, 16).map_err(de::Error::custom)?;
    Ok(LinkSecret(number.to_be_bytes()))
}

#[derive(Serialize, Deserialize)]
struct Form {
    tenant: String,
    spec: SpecForm,
    stage: StageForm,
    /// Of one that lives and is paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    paused_since: Option<String>,
    #[serde(with = "LastingForm")]
    lasting: Lasting,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    workspace: Option<String>,
    #[serde(default)]
    is_warm: bool,
    secret: String,
    #[serde(with = "moment")]
    created_at: Timestamp,
    #[serde(with = "moment")]
    expires_at: Timestamp,
    #[serde(with = "moment")]
    last_active: Timestamp,
    idle: Duration,
    labels: BTreeMap<String, String>,
    /// What it may reach now; what its specification says in records of servers that did not know it.
    #[serde(default)]
    network: Option<NetworkForm>,
    env: BTreeMap<String, String>,
    cells: u32,
    #[serde(default)]
    loss: Option<String>,
    default_context: String,
    contexts: Vec<ContextForm>,
}

#[derive(Serialize, Deserialize)]
struct ContextForm {
    id: String,
    #[serde(with = "moment")]
    created_at: Timestamp,
    born: u32,
    is_ready: bool,
    asked_kernelspec: Option<String>,
    cwd: Option<String>,
    kernelspec: String,
    display_name: String,
    language: String,
    language_info: Option<Box<RawValue>>,
    oom_seen: u64,
    oom_told: u64,
    #[serde(default, with = "Maybe::<CauseItem>")]
    replaced: Option<RestartCause>,
}

impl From<&ContextRecord> for ContextForm {
    fn from(record: &ContextRecord) -> Self {
        let record = record.clone();
        Self {
            id: record.id.to_string(),
            created_at: record.created_at,
            born: record.born,
            is_ready: record.is_ready,
            asked_kernelspec: record.asked_kernelspec,
            cwd: record.cwd,
            kernelspec: record.kernelspec,
            display_name: record.display_name,
            language: record.language,
            // A kernel's JSON that can't be written is done without: it is for notebooks only.
            language_info: record.language_info.and_then(|info| RawValue::from_string(info.0).ok()),
            oom_seen: record.oom_seen,
            oom_told: record.oom_told,
            replaced: record.replaced,
        }
    }
}

impl TryFrom<ContextForm> for ContextRecord {
    type Error = serde_json::Error;

    fn try_from(form: ContextForm) -> Result<Self, Self::Error> {
        Ok(Self {
            id: parsed(&form.id)?,
            created_at: form.created_at,
            born: form.born,
            is_ready: form.is_ready,
            asked_kernelspec: form.asked_kernelspec,
            cwd: form.cwd,
            kernelspec: form.kernelspec,
            display_name: form.display_name,
            language: form.language,
            language_info: form.language_info.map(|info| JsonText(info.get().to_owned())),
            oom_seen: form.oom_seen,
            oom_told: form.oom_told,
            replaced: form.replaced,
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StageForm {
    Starting,
    Live,
    Ending(#[serde(with = "Reason")] EndReason),
    Ended {
        #[serde(with = "Reason")]
        reason: EndReason,
        #[serde(with = "moment")]
        at: Timestamp,
    },
}

impl From<Stage> for StageForm {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::Starting => Self::Starting,
            Stage::Live | Stage::Paused(_) => Self::Live,
            Stage::Ending(reason) => Self::Ending(reason),
            Stage::Ended(reason, at) => Self::Ended { reason, at },
        }
    }
}

impl From<StageForm> for Stage {
    fn from(form: StageForm) -> Self {
        match form {
            StageForm::Starting => Self::Starting,
            StageForm::Live => Self::Live,
            StageForm::Ending(reason) => Self::Ending(reason),
            StageForm::Ended { reason, at } => Self::Ended(reason, at),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Lasting", rename_all = "snake_case")]
enum LastingForm {
    Always,
    OnceReady,
    Never,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "EndReason", rename_all = "snake_case")]
enum Reason {
    Deleted,
    Idle,
    Lifetime,
    Oom,
    KernelDied,
    Lost,
    Drained,
    StartFailed,
}

#[derive(Serialize, Deserialize)]
struct SpecForm(#[serde(with = "Spec")] SessionSpec);

#[derive(Serialize, Deserialize)]
#[serde(remote = "SessionSpec")]
struct Spec {
    template: String,
    image: String,
    runtime: String,
    kernelspec: Option<String>,
    #[serde(with = "TransportForm")]
    transport: KernelTransport,
    name: Option<String>,
    env: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    #[serde(with = "ResourcesForm")]
    resources: Resources,
    #[serde(with = "TimeoutsForm")]
    timeouts: Timeouts,
    max_execution: Duration,
    max_lifetime: Duration,
    max_idle: Duration,
    #[serde(with = "OutputForm")]
    output: OutputLimits,
    #[serde(with = "network_form")]
    network: NetworkOffer,
    #[serde(with = "PortsForm", default)]
    ports: Ports,
    #[serde(serialize_with = "write_data", deserialize_with = "read_data", default)]
    data: Vec<DataMount>,
    #[serde(default = "usual_workdir")]
    workdir: String,
    #[serde(default, serialize_with = "write_workspace", deserialize_with = "read_workspace")]
    workspace: Option<WorkspaceUse>,
    #[serde(serialize_with = "write_texts", deserialize_with = "read_texts")]
    setup: Arc<[String]>,
    #[serde(with = "KernelDeathForm")]
    on_kernel_death: OnKernelDeath,
    #[serde(with = "GuestLostForm")]
    on_guest_lost: OnGuestLost,
    #[serde(with = "IdleForm", default)]
    on_idle: OnIdle,
    #[serde(with = "ExpiryForm", default)]
    on_expiry: OnExpiry,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
}

/// What `workdir` is in a record of a server that knew no other.
fn usual_workdir() -> String {
    spec::WORKDIR.to_owned()
}

fn write_texts<S: Serializer>(texts: &Arc<[String]>, to: S) -> Result<S::Ok, S::Error> {
    texts.as_ref().serialize(to)
}

fn read_texts<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<[String]>, D::Error> {
    Vec::<String>::deserialize(from).map(Arc::from)
}

/// Ports as templates name them.
struct PortsForm;

impl PortsForm {
    fn serialize<S: Serializer>(ports: &Ports, to: S) -> Result<S::Ok, S::Error> {
        ports.texts().serialize(to)
    }

    fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Ports, D::Error> {
        Ports::parse(&Vec::<String>::deserialize(from)?).map_err(de::Error::custom)
    }
}

fn write_data<S: Serializer>(mounts: &[DataMount], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(mounts.iter().map(|mount| (&mount.name, &mount.path)))
}

fn read_data<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<DataMount>, D::Error> {
    let pairs = Vec::<(String, String)>::deserialize(from)?;
    Ok(pairs.into_iter().map(|(name, path)| DataMount { name, path }).collect())
}

#[derive(Serialize, Deserialize)]
struct WorkspaceForm {
    name: String,
    max_age: Duration,
    quota_bytes: Option<u64>,
}

fn write_workspace<S: Serializer>(workspace: &Option<WorkspaceUse>, to: S) -> Result<S::Ok, S::Error> {
    let form = workspace.as_ref().map(|WorkspaceUse { name, offer: WorkspaceOffer { max_age, quota_bytes } }| {
        WorkspaceForm { name: name.clone(), max_age: *max_age, quota_bytes: *quota_bytes }
    });
    form.serialize(to)
}

fn read_workspace<'de, D: Deserializer<'de>>(from: D) -> Result<Option<WorkspaceUse>, D::Error> {
    let form = Option::<WorkspaceForm>::deserialize(from)?;
    Ok(form.map(|WorkspaceForm { name, max_age, quota_bytes }| WorkspaceUse {
        name,
        offer: WorkspaceOffer { max_age, quota_bytes },
    }))
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Resources")]
struct ResourcesForm {
    cpu_millis: u32,
    memory_bytes: u64,
    disk_bytes: u64,
    tmp_bytes: u64,
    pids: u32,
    open_files: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Timeouts")]
struct TimeoutsForm {
    idle: Duration,
    lifetime: Duration,
    execution: Duration,
    #[serde(default = "paused_by_default")]
    paused: Duration,
}

/// What `paused` is in a record of a server that did not know it.
fn paused_by_default() -> Duration {
    Duration::from_secs(3600)
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "OutputLimits")]
pub(super) struct OutputForm {
    text_bytes: u64,
    result_bytes: u64,
    total_bytes: u64,
    messages: u64,
    messages_per_second: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "KernelTransport", rename_all = "snake_case")]
enum TransportForm {
    Ipc,
    Tcp,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "OnKernelDeath", rename_all = "snake_case")]
enum KernelDeathForm {
    Restart,
    End,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "OnGuestLost", rename_all = "snake_case")]
enum GuestLostForm {
    End,
    Replace,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "OnIdle", rename_all = "snake_case")]
enum IdleForm {
    Delete,
    Pause,
    Keep,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "OnExpiry", rename_all = "snake_case")]
enum ExpiryForm {
    Delete,
    Pause,
}
