//! The sections of the configuration as serde reads them. No defaults here: `default.toml` has every key, and a test
//! holds the two together.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::Deserialize;

use super::units::{
    address, duration, key_hash, moment, networks, optional_address, optional_number, optional_path, scopes, size,
    texts,
};
use crate::domain::access::{KeyHash, Scope};
use crate::domain::data::DataMount;
use crate::domain::egress::{self, NetworkMode, NetworkOffer, Rule};
use crate::domain::lock;
use crate::domain::packages::{self, Index, PackagePolicy, Requirement};
use crate::domain::ports::Ports;
use crate::domain::quota::{Quota, Rate, Share};
use crate::domain::spec::{
    self, KernelTransport, MIB, OutputLimits, PoolPlan, PoolSize, Resources, SessionRequest, Template, Timeouts,
};
use crate::domain::workspace::WorkspaceOffer;

/// The whole document, all layers merged and templates with what they inherit.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    pub default_template: String,
    #[expect(dead_code, reason = "read for its form; it says where more of the document stands")]
    pub templates_dir: String,
    pub keys: Vec<KeySection>,
    pub server: Server,
    pub auth: Auth,
    pub drain: Drain,
    pub engine: EngineSection,
    pub guard: GuardSection,
    pub guest: Guest,
    pub limits: Limits,
    pub classes: BTreeMap<String, Class>,
    pub tenants: BTreeMap<String, Tenant>,
    pub executions: Executions,
    pub egress: Egress,
    pub packages: Packages,
    pub jupyter: Jupyter,
    pub doors: Doors,
    pub e2b: E2b,
    pub audit: Audit,
    pub metrics: MetricsSection,
    pub traces: Traces,
    pub log: Log,
    #[expect(dead_code, reason = "read for its form; templates have their own copies of what is in it")]
    pub template_defaults: TemplateSection,
    pub templates: BTreeMap<String, TemplateSection>,
}

/// The front door.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// Where the HTTP API listens.
    #[serde(deserialize_with = "address")]
    pub listen: SocketAddr,
    /// Folder of what the server keeps. Never empty.
    pub data_dir: PathBuf,
    /// File with the first API key; none: [`Server::key_file`] names the generated one.
    #[serde(deserialize_with = "optional_path")]
    pub api_key_file: Option<PathBuf>,
    /// Whether plain HTTP may leave the machine.
    pub allow_plain_http: bool,
    /// The certificate chain as PEM; with its key, or not at all.
    #[serde(deserialize_with = "optional_path")]
    pub tls_cert_file: Option<PathBuf>,
    /// Its private key as PEM.
    #[serde(deserialize_with = "optional_path")]
    pub tls_key_file: Option<PathBuf>,
    /// Networks of proxies whose word about callers' addresses counts.
    #[serde(deserialize_with = "networks")]
    pub trusted_proxies: Vec<IpNet>,
    /// The header in which they give it.
    pub forwarded_header: ForwardedHeader,
    /// Origins whose pages may use the API, as browsers write them.
    #[serde(deserialize_with = "texts")]
    pub cors_origins: Vec<String>,
    /// Connections at the same time.
    pub connections: u32,
    /// Those of one address.
    pub connections_per_address: u32,
    /// A request's head arrives within this time.
    #[serde(deserialize_with = "duration")]
    pub header_timeout: Duration,
    /// Bytes of a request's head.
    #[serde(deserialize_with = "size")]
    pub max_header: u64,
    /// What is sent is taken within this time.
    #[serde(deserialize_with = "duration")]
    pub write_timeout: Duration,
    /// Where the admin listener is, if there is one.
    #[serde(deserialize_with = "optional_address")]
    pub admin_listen: Option<SocketAddr>,
    /// Whether the admin listener, which asks for no key, may be reached from other machines.
    pub admin_allow_remote: bool,
    /// Domain whose hosts `<port>-<session>` are ports of sessions, if there is one.
    pub ports_domain: String,
    /// What a session serves on a port answers, or goes on taking a body, within this time.
    #[serde(deserialize_with = "duration")]
    pub ports_timeout: Duration,
    /// Largest body of a request, in bytes.
    #[serde(deserialize_with = "size")]
    pub max_body: u64,
    /// A request's body arrives within this time.
    #[serde(deserialize_with = "duration")]
    pub request_timeout: Duration,
    /// Time that running executions get after SIGTERM.
    #[serde(deserialize_with = "duration")]
    pub drain_timeout: Duration,
}

impl Server {
    /// The file with the first API key: the configured one, else `api-key` in the data folder.
    #[must_use]
    pub fn key_file(&self) -> PathBuf {
        self.api_key_file.clone().unwrap_or_else(|| self.data_dir.join("api-key"))
    }
}

/// The header in which proxies say whom they were asked by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForwardedHeader {
    /// A list of addresses.
    XForwardedFor,
    /// That of RFC 7239.
    Forwarded,
}

/// An API key of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeySection {
    /// For people.
    pub name: String,
    /// Whose it is.
    pub tenant: String,
    /// What it allows.
    #[serde(deserialize_with = "scopes")]
    pub scopes: Vec<Scope>,
    /// The templates that it allows; none: all.
    #[serde(default)]
    pub templates: Option<Vec<String>>,
    /// It is none any more from then on.
    #[serde(default, deserialize_with = "moment")]
    pub expires_at: Option<Timestamp>,
    /// Of the key; this or a file.
    #[serde(default, deserialize_with = "key_hash")]
    pub hash: Option<KeyHash>,
    /// A file with the key.
    #[serde(default)]
    pub file: Option<PathBuf>,
}

/// Keys that are not valid.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    /// So many may come from one address …
    pub failures: u32,
    /// … within this time.
    #[serde(deserialize_with = "duration")]
    pub failure_window: Duration,
}

/// What happens when the server stops.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// What becomes of the containers of live sessions.
    pub containers: DrainContainers,
}

/// What becomes of the containers of live sessions when the server stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DrainContainers {
    /// They stay, and the next server goes on with their sessions.
    Keep,
    /// They are removed, and their sessions end.
    Remove,
}

/// The Docker engine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSection {
    /// `unix:///path`, `tcp://host:port`, `http://…`, `https://…` or `guard:///path`. Never empty.
    pub host: String,
    /// Folder with `ca.pem`, `cert.pem` and `key.pem`.
    #[serde(deserialize_with = "optional_path")]
    pub tls_cert_dir: Option<PathBuf>,
    /// Separates control planes on one engine.
    pub instance: String,
    /// What to do about an image that the engine doesn't have.
    pub pull: PullPolicy,
    /// Folder with Docker's `config.json`.
    #[serde(deserialize_with = "optional_path")]
    pub docker_config: Option<PathBuf>,
    /// First user id of sessions.
    pub uid_first: u32,
    /// Last user id of sessions, itself one of them.
    pub uid_last: u32,
    /// A session is ready within this time of its creation, or ends.
    #[serde(deserialize_with = "duration")]
    pub start_timeout: Duration,
    /// A container that has heard from no control plane for this long ends itself.
    #[serde(deserialize_with = "duration")]
    pub orphan_timeout: Duration,
}

/// What to do about an image that the engine doesn't have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullPolicy {
    /// Refuse.
    Never,
    /// Pull it.
    Missing,
}

impl EngineSection {
    /// The socket of the guard that has the engine, where one stands between.
    #[must_use]
    pub fn guard(&self) -> Option<PathBuf> {
        self.host.strip_prefix("guard://").map(PathBuf::from)
    }
}

/// `cellblock guard`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuardSection {
    /// The socket that it listens on.
    pub socket: PathBuf,
    /// Who may call it beside its own user.
    #[serde(deserialize_with = "optional_number")]
    pub user: Option<u32>,
    /// Containers that it makes at once, and again in each minute.
    pub creates_per_minute: u32,
}

/// PID 1 of sessions.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// Its binary; none: the one built with this server.
    #[serde(deserialize_with = "optional_path")]
    pub binary: Option<PathBuf>,
}

/// How much of everything.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Live sessions.
    pub sessions: u32,
    /// CPUs that all live sessions may use together; 0: no ceiling.
    pub cpu: f64,
    /// Bytes of memory that all live sessions may use together; 0: no ceiling.
    #[serde(deserialize_with = "size")]
    pub memory: u64,
    /// Creates that may wait for a place.
    pub queued_creates: u32,
    /// Longest wait for a place.
    #[serde(deserialize_with = "duration")]
    pub create_wait: Duration,
    /// Executions that may wait in one context.
    pub queued_executions: u32,
    /// An ended session can be asked about for this long.
    #[serde(deserialize_with = "duration")]
    pub session_retention: Duration,
    /// Containers started at the same time.
    pub concurrent_starts: u32,
    /// Contexts of one session.
    pub contexts: u32,
    /// Workspaces that outlive sessions, of all tenants.
    pub workspaces: u32,
}

/// What a tenant may have and do; 0 is no limit.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Class {
    pub sessions: u32,
    pub cpu: f64,
    #[serde(deserialize_with = "size")]
    pub memory: u64,
    pub executions: u32,
    pub workspaces: u32,
    #[serde(deserialize_with = "size")]
    pub storage: u64,
    pub cpu_seconds_a_day: u64,
    pub requests_per_second: f64,
    pub request_burst: u32,
}

/// A tenant, with what it has of its class. Other fields are refused by the schema.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Tenant {
    pub class: String,
    #[serde(flatten)]
    pub quota: Class,
}

impl Class {
    pub(super) fn quota(&self) -> Quota {
        // Amounts are checked to be small elsewhere; until then casts saturate.
        let burst = if self.request_burst == 0 { self.requests_per_second.ceil() as u32 } else { self.request_burst };
        let rate = Rate { per_second: self.requests_per_second, burst: burst.max(1) };
        Quota {
            share: Share {
                sessions: Some(self.sessions).filter(|most| *most > 0),
                cpu_millis: Some((self.cpu * 1000.0).round() as u64).filter(|most| *most > 0),
                memory_bytes: Some(self.memory).filter(|most| *most > 0),
            },
            executions: Some(self.executions).filter(|most| *most > 0),
            workspaces: Some(self.workspaces).filter(|most| *most > 0),
            stored_bytes: Some(self.storage).filter(|most| *most > 0),
            cpu_seconds_a_day: Some(self.cpu_seconds_a_day).filter(|most| *most > 0),
            requests: Some(rate).filter(|rate| rate.per_second > 0.0),
        }
    }
}

/// Executions.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Executions {
    /// Time from an interrupt to the kernel's end.
    #[serde(deserialize_with = "duration")]
    pub interrupt_grace: Duration,
    /// Longest wait in a context's queue.
    #[serde(deserialize_with = "duration")]
    pub queue_timeout: Duration,
    /// How long finished executions can be read.
    #[serde(deserialize_with = "duration")]
    pub retention_time: Duration,
    /// How many finished executions are kept, in all.
    pub retention_count: u32,
    /// Bytes that finished executions hold, in all.
    #[serde(deserialize_with = "size")]
    pub retention_size: u64,
    /// Contents of results above this are kept beside the execution, as blobs.
    #[serde(deserialize_with = "size")]
    pub inline: u64,
    /// How long blobs can be fetched.
    #[serde(deserialize_with = "duration")]
    pub blob_retention: Duration,
    /// Bytes of all blobs.
    #[serde(deserialize_with = "size")]
    pub blob_size: u64,
    /// How long a notebook can be fetched after its session has ended.
    #[serde(deserialize_with = "duration")]
    pub notebook_retention: Duration,
    /// Bytes of one notebook.
    #[serde(deserialize_with = "size")]
    pub notebook_size: u64,
    /// Bytes of all notebooks.
    #[serde(deserialize_with = "size")]
    pub notebooks_size: u64,
}

/// Connections of code to the outside, where a template permits them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// Open at once, of all sessions.
    pub connections: u32,
    /// Open at once, of one session.
    pub session_connections: u32,
    /// Asked for in a minute, by one session.
    pub session_connections_per_minute: u32,
    /// Bytes that one session may send; 0: no limit.
    #[serde(deserialize_with = "size")]
    pub session_sent: u64,
    /// Bytes that one session may receive; 0: no limit.
    #[serde(deserialize_with = "size")]
    pub session_received: u64,
    /// Time to resolve and dial.
    #[serde(deserialize_with = "duration")]
    pub connect_timeout: Duration,
    /// Time without a byte.
    #[serde(deserialize_with = "duration")]
    pub idle_timeout: Duration,
    /// Networks that nobody reaches.
    #[serde(deserialize_with = "networks")]
    pub deny: Vec<IpNet>,
    /// A proxy that connections go through, `http://host:port`; empty: none.
    pub proxy: String,
    /// Certificates of authorities for upstreams, beside the system's.
    #[serde(deserialize_with = "optional_path")]
    pub ca_file: Option<PathBuf>,
}

/// Where packages come from, and how much of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packages {
    /// The index, `https://host/path`.
    pub index_url: String,
    /// Hosts that its files are at, beside its own.
    #[serde(deserialize_with = "texts")]
    pub file_hosts: Vec<String>,
    /// Time for one installation.
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
    /// Bytes that one installation may add.
    #[serde(deserialize_with = "size")]
    pub size: u64,
}

impl Packages {
    /// The index; nothing where it is none, which is told elsewhere.
    #[must_use]
    pub fn index(&self) -> Option<Index> {
        let (host, port, path) = egress::Upstream::parse_url(&self.index_url).ok()?;
        let file_hosts: Option<Vec<String>> =
            self.file_hosts.iter().map(|host| packages::file_host(host).ok()).collect();
        Some(Index { host, port, path, file_hosts: file_hosts? })
    }
}

/// Which packages sessions of a template may install.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "allowed are \"none\", \"any\" and a list of packages")]
pub(super) enum PackageRule {
    /// `none` or `any`.
    Word(PackageWord),
    /// These.
    Listed(Vec<String>),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum PackageWord {
    None,
    Any,
}

impl PackageRule {
    /// What is no package is told elsewhere.
    fn policy(&self) -> PackagePolicy {
        match self {
            Self::Word(PackageWord::None) => PackagePolicy::None,
            Self::Word(PackageWord::Any) => PackagePolicy::Any,
            Self::Listed(texts) => {
                PackagePolicy::Listed(texts.iter().filter_map(|text| Requirement::parse(text).ok()).collect())
            }
        }
    }
}

/// How much there is of Jupyter Server's API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jupyter {
    /// What a client has missed is kept for it for this long.
    #[serde(deserialize_with = "duration")]
    pub buffer_time: Duration,
    /// Bytes of a session's newest messages that are kept.
    #[serde(deserialize_with = "size")]
    pub buffer_size: u64,
    /// Longest message of a client, in bytes.
    #[serde(deserialize_with = "size")]
    pub max_message: u64,
    /// Connections to one session at the same time.
    pub connections_per_session: u32,
    /// Connections to all sessions of a tenant at the same time.
    pub connections_per_tenant: u32,
}

/// Who has asked for what.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// A file that events are copied to; none: they are in the database only.
    #[serde(deserialize_with = "optional_path")]
    pub file: Option<PathBuf>,
    /// Whether code stands in them.
    pub record_code: bool,
    /// They go after this long.
    #[serde(deserialize_with = "duration")]
    pub retention_time: Duration,
    /// The oldest beyond so many go earlier.
    pub retention_count: u32,
}

/// Which doors are open beside the native API's.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Doors {
    /// Jupyter Server's API.
    pub jupyter: bool,
    /// That of the Model Context Protocol.
    pub mcp: bool,
    /// Names that it may be asked under; none: any.
    #[serde(deserialize_with = "texts")]
    pub mcp_hosts: Vec<String>,
    /// How many tools it has.
    pub mcp_tools: McpTools,
    /// That for clients of E2B.
    pub e2b: bool,
    /// The page that says how clients connect.
    pub connect: bool,
    /// The classic routes.
    pub classic: Classic,
}

/// How many tools clients of the Model Context Protocol find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum McpTools {
    /// Those that most work is done with.
    Small,
    /// Those, and what else a session can do.
    Full,
}

/// What clients of E2B find.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct E2b {
    /// Domain whose hosts are the API and sandboxes, if there is one.
    pub domain: String,
    /// Templates by the names that clients have for them.
    pub templates: BTreeMap<String, String>,
}

/// The five routes of a sandbox that many have copied, for its clients.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Classic {
    /// Whether they are there.
    pub enabled: bool,
    /// The template of their sessions; empty: the default one.
    pub template: String,
    /// What is imported before any code runs, each as it stands behind `import`.
    #[serde(deserialize_with = "texts")]
    pub imports: Vec<String>,
    /// A session without work ends after this long.
    #[serde(deserialize_with = "duration")]
    pub idle: Duration,
}

impl Classic {
    /// The code that imports what is to be imported, if anything is.
    #[must_use]
    pub fn setup(&self) -> Option<String> {
        let lines: String = self.imports.iter().map(|what| format!("import {what}\n")).collect();
        Some(lines).filter(|lines| !lines.is_empty())
    }
}

/// What is counted.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsSection {
    /// Whether there are figures by tenant.
    pub tenant_label: bool,
}

/// Requests and executions as traces.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// Base URL of a collector that speaks OTLP over HTTP; empty: none.
    pub endpoint: String,
    /// A file with headers for it, which are secret.
    #[serde(deserialize_with = "optional_path")]
    pub headers_file: Option<PathBuf>,
    /// What this server is called there.
    pub service_name: String,
    /// The part of traces that is told.
    pub sample_ratio: f64,
    /// The collector answers within this time.
    #[serde(deserialize_with = "duration")]
    pub timeout: Duration,
    /// Spans that wait for it.
    pub queue: u32,
}

/// What the server says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Directives as of `tracing_subscriber::EnvFilter`: `info,cellblock::engine=debug`.
    pub level: String,
    /// Text or JSON.
    pub format: LogFormat,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For log collectors.
    Json,
}

/// A template as an operator writes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TemplateSection {
    pub enabled: bool,
    pub description: String,
    pub image: String,
    pub runtime: String,
    pub accept_unenforced: Vec<Lock>,
    pub kernelspec: String,
    pub transport: Transport,
    pub network: Network,
    pub packages: PackageRule,
    pub data: Vec<Data>,
    pub workdir: String,
    pub workspace: Workspace,
    pub ports: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub setup: String,
    pub on_kernel_death: OnKernelDeath,
    pub on_guest_lost: OnGuestLost,
    pub pool: Pool,
    pub on_idle: OnIdle,
    pub default: Bounds,
    pub maximum: Bounds,
    pub output: Output,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Lock {
    Memory,
    MemorySwap,
    Pids,
    Cpu,
    Seccomp,
    TmpfsInodes,
    MountFlags,
}

impl Lock {
    fn into_domain(self) -> lock::Lock {
        match self {
            Self::Memory => lock::Lock::Memory,
            Self::MemorySwap => lock::Lock::MemorySwap,
            Self::Pids => lock::Lock::Pids,
            Self::Cpu => lock::Lock::Cpu,
            Self::Seccomp => lock::Lock::Seccomp,
            Self::TmpfsInodes => lock::Lock::TmpfsInodes,
            Self::MountFlags => lock::Lock::MountFlags,
        }
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Transport {
    Ipc,
    Tcp,
}

/// What sessions of a template may reach.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Network {
    pub mode: Mode,
    #[serde(deserialize_with = "texts")]
    pub allow: Vec<String>,
    #[serde(deserialize_with = "texts")]
    pub may_allow: Vec<String>,
    pub upstreams: Vec<Upstream>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    None,
    Allowlist,
}

/// A server that code asks without knowing the secret that is shown to it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Upstream {
    pub name: String,
    pub url: String,
    pub header: String,
    pub secret_file: PathBuf,
}

impl Network {
    /// Rules that are none are told elsewhere.
    fn offer(self, packages: PackagePolicy) -> NetworkOffer {
        let rules = |texts: &[String]| texts.iter().filter_map(|text| Rule::parse(text).ok()).flatten().collect();
        let usual: std::sync::Arc<[Rule]> = rules(&self.allow);
        let initial = match self.mode {
            Mode::None => egress::Network::default(),
            Mode::Allowlist => egress::Network { mode: NetworkMode::Allowlist, allow: usual.clone() },
        };
        let upstream = |of: Upstream| {
            let (host, port, path) = egress::Upstream::parse_url(&of.url).ok()?;
            let (name, header, secret_file) = (of.name, of.header, of.secret_file);
            Some(egress::Upstream { name, host, port, path, header, secret_file })
        };
        let upstreams = self.upstreams.into_iter().filter_map(upstream).collect();
        NetworkOffer { initial, usual, may_allow: rules(&self.may_allow), upstreams, packages }
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnKernelDeath {
    Restart,
    End,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnGuestLost {
    End,
    Replace,
}

/// Data in the containers of a template.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Data {
    pub name: String,
    pub path: String,
}

impl Data {
    pub(super) fn mount(&self) -> DataMount {
        DataMount { name: self.name.clone(), path: self.path.clone() }
    }
}

/// The working folder of a template's sessions.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Workspace {
    pub kind: WorkspaceKind,
    #[serde(deserialize_with = "duration")]
    pub max_age: Duration,
    #[serde(deserialize_with = "size")]
    pub quota: u64,
    pub accept_unenforced: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum WorkspaceKind {
    Tmpfs,
    Volume,
}

impl Workspace {
    fn offer(&self) -> Option<WorkspaceOffer> {
        let offer = WorkspaceOffer { max_age: self.max_age, quota_bytes: Some(self.quota).filter(|bytes| *bytes > 0) };
        (self.kind == WorkspaceKind::Volume).then_some(offer)
    }
}

/// Sessions that are made before anybody asks.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pool {
    pub min: u32,
    pub max: u32,
    pub other: Vec<OtherPool>,
}

/// The same with resources other than the template's own.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OtherPool {
    pub cpu: Option<f64>,
    pub memory: Option<Size>,
    pub disk: Option<Size>,
    pub pids: Option<u64>,
    #[serde(default)]
    pub min: u32,
    pub max: u32,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Size(#[serde(deserialize_with = "size")] pub u64);

impl Pool {
    /// All of them, the template's own first.
    pub(super) fn plans(&self) -> Vec<PoolPlan> {
        let own = PoolPlan { request: SessionRequest::default(), size: PoolSize { min: self.min, max: self.max } };
        let other = self.other.iter().map(OtherPool::plan);
        std::iter::once(own).chain(other).collect()
    }
}

impl OtherPool {
    fn plan(&self) -> PoolPlan {
        let whole = |size: Size| size.0 / MIB;
        let request = SessionRequest {
            cpu: self.cpu,
            memory_mb: self.memory.map(whole),
            disk_mb: self.disk.map(whole),
            pids: self.pids,
            ..SessionRequest::default()
        };
        PoolPlan { request, size: PoolSize { min: self.min, max: self.max } }
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OnIdle {
    Delete,
    Pause,
    Keep,
}

/// Resources and times, once as defaults and once as ceilings.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Bounds {
    pub cpu: f64,
    #[serde(deserialize_with = "size")]
    pub memory: u64,
    #[serde(deserialize_with = "size")]
    pub disk: u64,
    #[serde(deserialize_with = "size")]
    pub tmp: u64,
    pub pids: u32,
    pub open_files: u32,
    #[serde(deserialize_with = "duration")]
    pub idle: Duration,
    #[serde(deserialize_with = "duration")]
    pub lifetime: Duration,
    #[serde(deserialize_with = "duration")]
    pub execution: Duration,
    #[serde(deserialize_with = "duration")]
    pub paused: Duration,
}

impl Bounds {
    /// `cpu` is checked to be small elsewhere; until then the cast saturates.
    fn resources(&self) -> Resources {
        Resources {
            cpu_millis: (self.cpu * 1000.0).round() as u32,
            memory_bytes: self.memory,
            disk_bytes: self.disk,
            tmp_bytes: self.tmp,
            pids: self.pids,
            open_files: self.open_files,
        }
    }

    fn timeouts(&self) -> Timeouts {
        Timeouts { idle: self.idle, lifetime: self.lifetime, execution: self.execution, paused: self.paused }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Output {
    #[serde(deserialize_with = "size")]
    pub text: u64,
    #[serde(deserialize_with = "size")]
    pub results: u64,
    #[serde(deserialize_with = "size")]
    pub total: u64,
    pub messages: u64,
    pub messages_per_second: u64,
}

impl TemplateSection {
    pub(super) fn into_template(self, name: String) -> Template {
        Template {
            name,
            description: self.description,
            image: self.image,
            runtime: self.runtime,
            accept_unenforced: self.accept_unenforced.into_iter().map(Lock::into_domain).collect(),
            kernelspec: self.kernelspec,
            transport: match self.transport {
                Transport::Ipc => KernelTransport::Ipc,
                Transport::Tcp => KernelTransport::Tcp,
            },
            env: self.env,
            default_resources: self.default.resources(),
            max_resources: self.maximum.resources(),
            default_timeouts: self.default.timeouts(),
            max_timeouts: self.maximum.timeouts(),
            output: OutputLimits {
                text_bytes: self.output.text,
                result_bytes: self.output.results,
                total_bytes: self.output.total,
                messages: self.output.messages,
                messages_per_second: self.output.messages_per_second,
            },
            setup: self.setup,
            on_kernel_death: match self.on_kernel_death {
                OnKernelDeath::Restart => spec::OnKernelDeath::Restart,
                OnKernelDeath::End => spec::OnKernelDeath::End,
            },
            on_guest_lost: match self.on_guest_lost {
                OnGuestLost::End => spec::OnGuestLost::End,
                OnGuestLost::Replace => spec::OnGuestLost::Replace,
            },
            pools: self.pool.plans(),
            on_idle: match self.on_idle {
                OnIdle::Delete => spec::OnIdle::Delete,
                OnIdle::Pause => spec::OnIdle::Pause,
                OnIdle::Keep => spec::OnIdle::Keep,
            },
            workdir: self.workdir,
            data: self.data.iter().map(Data::mount).collect(),
            accept_unlimited_workspace: self.workspace.accept_unenforced,
            workspace: self.workspace.offer(),
            // What is none was refused before.
            ports: Ports::parse(&self.ports).unwrap_or_default(),
            network: self.network.offer(self.packages.policy()),
        }
    }
}
