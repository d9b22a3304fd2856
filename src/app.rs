//! Composition: builds the control plane from a configuration, runs it, and takes it down again. Decides nothing by itself.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Config, DrainContainers, Inputs, KeySection, Loaded, PullPolicy};
use crate::domain::ids::InstallationId;
use crate::domain::packages::Index;
use crate::domain::quota::QuotaTable;
use crate::domain::spec::Template;
use crate::egress::{self, Egress, Outside, Trust};
use crate::engine::docker::{Demand, DockerEngine, DockerSettings, GuestFile, Quota};
use crate::engine::guard::{self, BindError, Guard, GuardEngine, Permitted, Policy};
use crate::engine::metered::Metered;
use crate::engine::{Engine, EngineError, Pull};
use crate::http;
use crate::http::tls::{Tls, TlsError};
use crate::metrics::Metrics;
use crate::service::Service;
use crate::service::admin::{Admin, Reload};
use crate::service::audit::{Audit, AuditBounds};
use crate::service::keys::{self, ConfiguredKey, KeyError, KeyHash, KeyRing, Principal, Scope};
use crate::service::log::LogLevel;
use crate::service::offer::Offer;
use crate::service::quotas::Quotas;
use crate::session::pool::{self, Pool};
use crate::session::reconcile;
use crate::session::reconcile::Reconciler;
use crate::session::registry::{AfterDrain, Registry};
use crate::store::state::{self, Left, State, StateError};
use crate::store::{Archive, ArchiveLimits, installation};
use crate::task;
use crate::traces::{self, Traces};
use crate::tuning::{self, Reloader, Shown, ceilings, limits, pool_plans, settings};

pub mod data;
pub mod front;

/// Containers are gone within this time at an orderly end, or are left to the next start.
const DRAIN_REMOVAL: Duration = Duration::from_secs(30);
/// After the last session has ended, answers under way have this long.
const LAST_ANSWERS: Duration = Duration::from_secs(3);
/// The tenant of the key that is made at the first start.
const FIRST_TENANT: &str = "default";
/// Its name among others.
const FIRST_KEY: &str = "api-key-file";
/// Our launcher for `ipykernel`, beside the guest in its volume.
const IPYKERNEL_LAUNCHER: &[u8] = include_bytes!("../crates/guest/launcher/ipykernel_launcher.py");
/// What each Python of a cell imports first, and what installs packages.
const SITECUSTOMIZE: &[u8] = include_bytes!("../crates/guest/launcher/python/sitecustomize.py");
const PACKAGES: &[u8] = include_bytes!("../crates/guest/launcher/python/cellblock_packages.py");
/// An index that is not there.
const NOWHERE: Index = Index { host: String::new(), port: 443, path: String::new(), file_hosts: Vec::new() };

/// Why the control plane does not start. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The engine is not there, or can't be used.
    #[error("the container engine at {host} can't be used: {source}\n  {}", advice(source))]
    Engine {
        /// Where it was looked for.
        host: String,
        /// Why.
        source: EngineError,
    },
    /// The guard that has the engine is not there, or can't be used.
    #[error(
        "the guard at {} can't be used: {source}\n  does `cellblock guard` run there, with the same engine.instance, and is this user its guard.user?",
        socket.display()
    )]
    Guard {
        /// Where it was looked for.
        socket: PathBuf,
        /// Why.
        source: EngineError,
    },
    /// A guard was told to use a guard.
    #[error(
        "engine.host = \"{host}\" is a guard's socket; a guard needs the engine's own address, such as unix:///var/run/docker.sock"
    )]
    GuardOfGuard {
        /// What was configured.
        host: String,
    },
    /// A guard can't listen.
    #[error("the guard can't listen on {source}\n  `guard.socket` in the configuration says where to")]
    GuardSocket {
        /// Where, and why.
        #[from]
        source: BindError,
    },
    /// The guest's binary is not there.
    #[error("the guest binary {} can't be read: {source}\n  `make server` builds it; `guest.binary` in the configuration says where it is", path.display())]
    Guest {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key file can't be used.
    #[error("the API key file {} can't be used: {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// A key of the configuration can't be taken.
    #[error("the API key \"{name}\" of the configuration can't be used: {reason}")]
    ConfiguredKey {
        /// Its name.
        name: String,
        /// Why.
        reason: KeyError,
    },
    /// TLS can't be spoken.
    #[error("TLS can't be spoken with server.tls_cert_file and server.tls_key_file: {0}")]
    Tls(#[from] TlsError),
    /// What is kept in the data folder can't be used.
    #[error("notebooks and blobs can't be kept in the data folder {}: {source}", path.display())]
    Archive {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The database of sessions can't be used.
    #[error("the database {} can't be used: {source}\n  nothing was changed, and no container was removed", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: StateError,
    },
    /// The audit's file can't be written.
    #[error("the file {} can't be added to: {source}\n  `audit.file` in the configuration names it; empty, events are in the database only", path.display())]
    Audit {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Traces can't be sent.
    #[error(
        "traces can't be sent to {endpoint}: {reason}\n  `[traces]` in the configuration says where to, and with which headers"
    )]
    Traces {
        /// The collector.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// The authorities of upstreams can't be had.
    #[error("the authorities in {} can't be used: {reason}\n  `egress.ca_file` in the configuration names it", path.display())]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The data folder can't be had.
    #[error("the data folder can't be locked with {}: {reason}\n  end the other server, or give this one a folder and an engine.instance of its own", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The id of this installation can't be had.
    #[error("the file {} can't be used: {source}\n  it says which installation this is; without it, one with a new id is made", path.display())]
    Installation {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another installation works under this one's name.
    #[error(
        "engine.instance = \"{instance}\" can't be used on the engine at {host}: {source}\n  two servers of one name would end each other's sessions: give this one an engine.instance of its own"
    )]
    Claimed {
        /// The name.
        instance: String,
        /// The engine.
        host: String,
        /// Whose the name is, and how it is freed.
        source: EngineError,
    },
    /// Data that templates name is not on the engine.
    #[error("{}", missing.iter().map(|(template, name)| format!("the template \"{template}\" names the data \"{name}\", which the engine has not: `cellblock data import DIR {name}` puts it there")).collect::<Vec<_>>().join("\n"))]
    NoData {
        /// Template and name.
        missing: Vec<(String, String)>,
    },
    /// The address can't be listened on.
    #[error("can't listen on {address}: {source}\n  {place} says where to")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What names it, for people.
        place: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Asks a server to stop. Cloning it gives another handle to the same wish.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    asked: CancellationToken,
    at_once: CancellationToken,
}

impl Stop {
    /// Lets running executions come to their end first, for as long as the configuration says.
    pub fn gently(&self) {
        self.asked.cancel();
    }

    /// Gives running executions no time.
    pub fn at_once(&self) {
        self.at_once.cancel();
        self.asked.cancel();
    }

    /// Waits until running executions may not go on, once the server is to stop: they have this long, unless they are to have none.
    async fn end_of_grace(&self, grace: Duration) {
        // Whichever comes first ends it.
        let _ = tokio::time::timeout(grace, self.at_once.cancelled()).await;
    }
}

/// What the server has of the process that it runs in.
#[derive(Debug, Default)]
pub struct Process {
    /// Asks it to stop.
    pub stop: Stop,
    /// How much the log tells, if that can be changed.
    pub log: Option<LogLevel>,
    /// Where its configuration was read from, and what was read; without it, nothing can be read again.
    pub read: Option<(Inputs, Loaded)>,
    /// Asks it to read its configuration again.
    pub reload: Arc<Notify>,
    /// What sessions' connections to the outside meet; the world, unless a test puts something in its place.
    pub outside: Outside,
}

/// A running control plane without a front door.
pub struct Plane {
    /// Every command of the product.
    pub service: Arc<Service>,
    /// Who may ask, as far as the database knows.
    pub keys: Arc<KeyRing>,
    registry: Arc<Registry>,
    archive: Option<Archive>,
    after_drain: AfterDrain,
    stop: CancellationToken,
    /// Where it owns its instance.
    reconciler: Option<Arc<Reconciler>>,
    /// Cancelled when an operator has it drain.
    drain: CancellationToken,
}

impl Plane {
    /// Connects to the engine and makes it ready. With `owns_instance`, what an earlier process of this instance has left goes on, and cells that it knew
    /// nothing of are removed before anything new is made; without, other processes may share the instance's name, and only cells that have ended are removed.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: &Config, owns_instance: bool) -> Result<Self, StartError> {
        Self::start_in(config, owns_instance, Process::default(), None).await
    }

    async fn start_in(
        config: &Config,
        owns_instance: bool,
        process: Process,
        tls: Option<Arc<Tls>>,
    ) -> Result<Self, StartError> {
        let Process { log, read, outside, .. } = process;
        let pull = pull(config);
        let metrics = if config.metrics.tenant_label { Metrics::by_tenant() } else { Metrics::new() };
        // Before anything is there that would have to be taken down.
        let trust = trust(config)?;
        let traces = if owns_instance { traces(config, &metrics)? } else { None };
        let engine: Arc<dyn Engine> = Arc::new(Metered::new(connect(config).await?, metrics.clone()));
        let (settings, limits) = (settings(config), limits(config));
        // One process works with a data folder; whoever shares an instance keeps nothing.
        let archive = if owns_instance { Some(archive(config)?) } else { None };
        let kept = owns_instance.then(|| open_state(config, archive.clone())).transpose()?;
        let (state, mut left) = kept.map_or_else(Default::default, |(state, left)| (Some(state), left));
        let installation = if owns_instance { Some(installation_id(config)?) } else { None };
        let image = first_image(engine.as_ref(), config).await;
        if let Some(installation) = installation {
            claim(engine.as_ref(), config, installation).await?;
        }
        if owns_instance {
            data::require(engine.as_ref(), config).await?;
        }
        if let Some(image) = image {
            engine.prepare(&image).await.map_err(|e| engine_error(config, e))?;
        }
        let instance = config.engine.instance.clone();
        let keys = Arc::new(KeyRing::new(state.clone(), std::mem::take(&mut left.api_keys)));
        // Who runs code on this machine without a server is no tenant.
        let table = if owns_instance { config.quotas.clone() } else { QuotaTable::default() };
        let quotas = Arc::new(Quotas::new(table, state.clone(), std::mem::take(&mut left.usage)));
        let offer = Offer::new(tuning::choice(config));
        let pool = Pool::new(if owns_instance { pool_plans(config) } else { Vec::new() });
        let audit = state.clone().map(|state| audit(config, state)).transpose()?;
        let egress = Egress::new(egress_settings(config).await, trust, outside, metrics.clone(), state.clone());
        let registry = Registry::new(Arc::clone(&engine), archive.clone(), state, instance, settings, limits, pool);
        let registry = Arc::new(registry.counting(metrics).reaching(egress));
        let stop = CancellationToken::new();
        registry.take_over(left);
        let (running, told) = (Arc::clone(&quotas), stop.clone());
        task::spawn("quotas", async move { running.stay_within_bounds(told).await });
        let mut service =
            Service::new(Arc::clone(&registry), Arc::clone(&engine), offer.clone(), pull, archive.clone())
                .with_keys(Arc::clone(&keys))
                .with_quotas(Arc::clone(&quotas));
        if let Some(log) = &log {
            service = service.logging(log.clone());
        }
        if let Some(traces) = traces {
            service = service.traced(traces);
        }
        if let Some(audit) = audit {
            service = service.audited(Arc::clone(&audit));
            let told = stop.clone();
            task::spawn("audit", async move { audit.stay_within_bounds(told).await });
        }
        let after_drain = match config.drain.containers {
            DrainContainers::Keep if owns_instance => AfterDrain::Keep,
            _ => AfterDrain::Remove,
        };
        let drain = CancellationToken::new();
        let mut reconciler = None;
        if let Some(installation) = installation {
            let own = Arc::new(Reconciler::new(Arc::clone(&engine), Arc::clone(&registry), installation));
            own.round().await.map_err(|e| engine_error(config, e))?;
            let (running, told) = (Arc::clone(&own), stop.clone());
            task::spawn("reconcile", async move { running.run(told).await });
            task::spawn("pools", pool::run(Arc::clone(&engine), Arc::clone(&registry), stop.clone()));
            let reload = read.map(|(inputs, loaded)| -> Arc<dyn Reload> {
                let (registry, loaded) = (Arc::clone(&registry), Mutex::new(loaded));
                Arc::new(Reloader { inputs, loaded, registry, offer, quotas, log, shown: tls.map(Shown::new) })
            });
            service = service.administered(Admin {
                reload,
                reconciler: Arc::clone(&own),
                drain: drain.clone(),
                grace: config.server.drain_timeout,
                after: after_drain,
            });
            reconciler = Some(own);
        } else {
            reconcile::remove_ended(engine.as_ref()).await.map_err(|e| engine_error(config, e))?;
        }
        Ok(Self { service: Arc::new(service), keys, registry, archive, after_drain, stop, reconciler, drain })
    }

    /// Gives what runs a grace, and ends every session and waits until their containers are gone, or leaves them to the next process, as the
    /// configuration says. Returns how many are left after a while that should be gone.
    pub async fn stop(self, grace: impl Future<Output = ()>) -> usize {
        let left = self.registry.drain(grace, DRAIN_REMOVAL, self.after_drain).await;
        self.stop.cancel();
        if let Some(reconciler) = &self.reconciler {
            end_rounds(reconciler, self.after_drain).await;
        }
        if let Some(archive) = &self.archive {
            archive.flush().await;
        }
        left
    }
}

/// Serves until it is told to stop, then ends all sessions or leaves them to the next process. `ready` is called with the address once requests are answered.
///
/// # Errors
/// See [`StartError`].
pub async fn serve(config: &Config, process: Process, ready: impl FnOnce(SocketAddr)) -> Result<(), StartError> {
    let (stop, reload) = (process.stop.clone(), Arc::clone(&process.reload));
    let address = config.server.listen;
    let listen_error =
        |source| StartError::Listen { address, place: "`server.listen` in the configuration, or --listen,", source };
    // Bound first: a second server finds out before it touches the engine.
    let listener = TcpListener::bind(address).await.map_err(listen_error)?;
    let local = listener.local_addr().map_err(listen_error)?;
    let connections = front::connections(config)?;
    let admin = admin_listener(config).await?;
    let keys = configured_keys(config)?;
    let _lock = lock(&config.server.data_dir)?;
    let plane = Plane::start_in(config, true, process, connections.tls.clone()).await?;
    for key in keys {
        let name = key.name.clone();
        plane.keys.add(key).map_err(|reason| StartError::ConfiguredKey { name, reason })?;
    }
    let app = front::app(config, &plane);
    ready(local);
    let closing = CancellationToken::new();
    let (service, closed) = (Arc::clone(&plane.service), closing.clone());
    task::spawn("reload", async move {
        let asked = async {
            loop {
                reload.notified().await;
                reload_aloud(&service).await;
            }
        };
        // Whichever ends first.
        let _ = closed.run_until_cancelled(asked).await;
    });
    if let Some(admin) = admin {
        task::spawn("admin listener", http::admin::serve(admin, app.clone(), connections.plain(), closing.clone()));
    }
    let door = http::serve(listener, app, connections, closing.clone());
    let (operator, traces) = (plane.drain.clone(), plane.service.traces().cloned());
    let drain = async {
        tokio::select! {
            () = stop.asked.cancelled() => {}
            () = operator.cancelled() => tracing::info!("stopping, as an operator wants it"),
        }
        let grace = stop.end_of_grace(config.server.drain_timeout);
        // Streams end with their sessions, so sessions go first and the door closes after them.
        let left = plane.stop(grace).await;
        if left > 0 {
            tracing::error!(left, "containers are left behind; the next start removes them");
        }
        closing.cancel();
        // A connection that neither ends nor reads must not keep the process.
        tokio::time::sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        () = door => {}
        () = drain => {}
    }
    if let Some(traces) = traces {
        traces.end().await;
    }
    Ok(())
}

/// Reads the configuration again for somebody who reads the log.
async fn reload_aloud(service: &Service) {
    match service.reload_by_signal().await {
        Ok(changes) => tracing::info!(changes = changes.len(), "the configuration was read again"),
        Err(mistakes) => {
            mistakes.iter().for_each(|mistake| tracing::error!("{mistake}"));
            tracing::error!(mistakes = mistakes.len(), "the configuration was not taken over, and nothing has changed");
        }
    }
}

/// The admin listener, where there is to be one.
async fn admin_listener(config: &Config) -> Result<Option<TcpListener>, StartError> {
    let Some(address) = config.server.admin_listen else { return Ok(None) };
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(|source| StartError::Listen {
        address,
        place: "`server.admin_listen` in the configuration",
        source,
    })?;
    tracing::info!(%address, "the admin listener answers GET /metrics");
    Ok(Some(listener))
}

/// Copies the database of sessions to a file that is not there yet.
///
/// # Errors
/// See [`StartError`].
pub fn backup(config: &Config, to: &Path) -> Result<(), StartError> {
    let folder = &config.server.data_dir;
    state::backup(folder, to).map_err(|source| StartError::State { path: state::path_in(folder), source })
}

/// Holds the engine for a server that does not, until it is told to stop. `ready` is called with the socket once calls are answered.
///
/// # Errors
/// See [`StartError`].
pub async fn guard(config: &Config, process: Process, ready: impl FnOnce(&Path)) -> Result<(), StartError> {
    if config.engine.guard().is_some() {
        return Err(StartError::GuardOfGuard { host: config.engine.host.clone() });
    }
    let socket = &config.guard.socket;
    let failed = |error: io::Error| BindError { path: socket.clone(), reason: error.to_string() };
    let own = tokio::net::UnixStream::pair().and_then(|(one, _other)| one.peer_cred()).map_err(failed)?.uid();
    let users: Vec<u32> = [Some(own), config.guard.user].into_iter().flatten().collect();
    // Listened on first: a second guard finds out before it touches the engine.
    let listener = guard::bind(socket, users.iter().any(|user| *user != own)).await?;
    let engine: Arc<dyn Engine> = Arc::new(connect_docker(config).await?);
    let guard = Arc::new(Guard::new(engine, policy(config)).await.map_err(|e| engine_error(config, e))?);
    ready(socket);
    let Process { stop, read, reload, .. } = process;
    let told = Arc::clone(&guard);
    let serving = guard.serve(listener, users, stop.asked);
    let changing = async {
        let Some((inputs, mut loaded)) = read else { return std::future::pending().await };
        loop {
            reload.notified().await;
            change_guard(&told, &inputs, &mut loaded).await;
        }
    };
    tokio::select! {
        () = serving => Ok(()),
        () = changing => Ok(()),
    }
}

/// Reads the configuration again, and takes over what a guard can: all of it, or nothing.
async fn change_guard(guard: &Guard, inputs: &Inputs, loaded: &mut Loaded) {
    let again = inputs.clone();
    let later = match task::blocking(move || config::load(&again)).await {
        Some(Ok(later)) => later,
        Some(Err(mistakes)) => return tracing::error!("nothing has changed: {mistakes}"),
        None => return,
    };
    let fixed = |config: &Config| {
        let (guard, starts) = (&config.guard, config.limits.concurrent_starts);
        (config.engine.clone(), guard.socket.clone(), guard.user, config.guest.clone(), starts, config.log.clone())
    };
    if fixed(&later.config) != fixed(&loaded.config) {
        return tracing::error!(
            "nothing has changed: engine.*, guest.*, log.*, limits.concurrent_starts, guard.socket and guard.user need a restart of the guard"
        );
    }
    if let Some(change) = loaded.changes(&later).iter().find(|change| change.is_of_confinement()) {
        return tracing::error!(%change, "nothing has changed: this needs a restart of the guard");
    }
    loaded.changes(&later).iter().for_each(|change| tracing::info!(%change, "the configuration has changed"));
    guard.change(policy(&later.config)).await;
    *loaded = later;
}

/// Asks the guard of this machine whether it and its engine answer.
///
/// # Errors
/// See [`StartError`].
pub async fn check_guard(config: &Config) -> Result<(), StartError> {
    connect_guard(&config.guard.socket, config).await.map(drop)
}

/// Connects to the engine that the configuration names, or to the guard that has it.
///
/// # Errors
/// See [`StartError`].
pub async fn connect(config: &Config) -> Result<Arc<dyn Engine>, StartError> {
    match config.engine.guard() {
        Some(socket) => Ok(Arc::new(connect_guard(&socket, config).await?)),
        None => Ok(Arc::new(connect_docker(config).await?)),
    }
}

async fn connect_guard(socket: &Path, config: &Config) -> Result<GuardEngine, StartError> {
    let connected = GuardEngine::connect(socket.to_owned(), &config.engine.instance).await;
    connected.map_err(|source| StartError::Guard { socket: socket.to_owned(), source })
}

/// With the guest's files at hand.
async fn connect_docker(config: &Config) -> Result<DockerEngine, StartError> {
    let settings = engine_settings(config, guest_files(config.guest.binary.as_deref())?);
    DockerEngine::connect(settings).await.map_err(|e| engine_error(config, e))
}

/// How the engine is reached, and what belongs to this control plane there.
#[must_use]
pub fn engine_settings(config: &Config, guest_files: Vec<GuestFile>) -> DockerSettings {
    let section = &config.engine;
    DockerSettings {
        host: Some(section.host.clone()),
        tls_folder: section.tls_cert_dir.clone(),
        instance: section.instance.clone(),
        guest_files,
        uids: section.uid_first..=section.uid_last,
        credentials_file: section.docker_config.as_ref().map(|folder| folder.join("config.json")),
        demands: demands(config),
        starts_at_once: config.limits.concurrent_starts as usize,
    }
}

/// What each template relies on.
#[must_use]
pub fn demands(config: &Config) -> Vec<Demand> {
    let demand = |template: &Template| Demand {
        template: template.name.clone(),
        runtime: template.runtime.clone(),
        accepted: template.accept_unenforced.clone(),
        workspaces: template.workspace.is_some().then_some(match template.accept_unlimited_workspace {
            true => Quota::DoneWithout,
            false => Quota::Enforced,
        }),
    };
    config.templates.values().map(demand).collect()
}

/// What to do about an engine that can't be used.
fn advice(error: &EngineError) -> &'static str {
    match error {
        EngineError::Rejected { .. } => "`cellblock doctor` tries what holds on this host, and says what to do",
        _ => "is Docker running, and may this user reach it? `docker info` tells; `make setup` installs and starts it",
    }
}

/// What a guard permits: what the server that it stands before would ask for.
fn policy(config: &Config) -> Policy {
    let permitted = |template: &Template| Permitted {
        image: template.image.clone(),
        runtime: template.runtime.clone(),
        most: template.max_resources,
        data: template.data.clone(),
        workspace: template.workspace.map(|offer| offer.quota_bytes),
    };
    let ceilings = ceilings(config);
    Policy {
        instance: config.engine.instance.clone(),
        templates: config.templates.values().map(permitted).collect(),
        pull: pull(config),
        cells: ceilings.sessions,
        cpu_millis: ceilings.cpu_millis,
        memory_bytes: ceilings.memory_bytes,
        workspaces: config.limits.workspaces as usize,
        creates_per_minute: config.guard.creates_per_minute,
    }
}

fn pull(config: &Config) -> Pull {
    match config.engine.pull {
        PullPolicy::Never => Pull::Never,
        PullPolicy::Missing => Pull::Missing,
    }
}

/// No round of the reconciler begins after this. Where nothing stays, the instance's name is free then.
async fn end_rounds(reconciler: &Reconciler, after: AfterDrain) {
    let ending = async {
        match after {
            AfterDrain::Keep => reconciler.leave().await,
            AfterDrain::Remove => {
                if let Err(error) = reconciler.clear().await {
                    tracing::warn!(%error, "the instance's name was not given back; a server of another data folder can't take it");
                }
            }
        }
    };
    if tokio::time::timeout(DRAIN_REMOVAL, ending).await.is_err() {
        tracing::warn!("the engine did not answer in time; what is left there stays for the next start");
    }
}

/// The id of the first template image that is there, the default template's before others. Without one nothing can start yet: each create says so, and the
/// first one that can puts the guest in place.
async fn first_image(engine: &dyn Engine, config: &Config) -> Option<String> {
    let default = config.templates.get(&config.default_template);
    for template in default.into_iter().chain(config.templates.values()) {
        match engine.resolve_image(&template.image, Pull::Never).await {
            Ok(image) => return Some(image.id),
            Err(error) => tracing::warn!(template = template.name, %error, "a template's image is not there"),
        }
    }
    None
}

/// Takes the instance's name. Before anything else is done on the engine: what is there may be another installation's.
async fn claim(engine: &dyn Engine, config: &Config, installation: InstallationId) -> Result<(), StartError> {
    match engine.claim(installation).await {
        Ok(()) => Ok(()),
        // Nothing can run there yet. The reconciler tries again.
        Err(EngineError::Absent { .. }) => {
            tracing::warn!("the engine has no image, so the instance's name can't be taken on it yet");
            Ok(())
        }
        Err(source @ EngineError::Claimed { .. }) => {
            let (instance, host) = (config.engine.instance.clone(), config.engine.host.clone());
            Err(StartError::Claimed { instance, host, source })
        }
        Err(error) => Err(engine_error(config, error)),
    }
}

fn installation_id(config: &Config) -> Result<InstallationId, StartError> {
    let folder = &config.server.data_dir;
    installation::ensure(folder)
        .map_err(|source| StartError::Installation { path: installation::path_in(folder), source })
}

fn engine_error(config: &Config, source: EngineError) -> StartError {
    if let Some(socket) = config.engine.guard() {
        return StartError::Guard { socket, source };
    }
    StartError::Engine { host: config.engine.host.clone(), source }
}

/// What the guest's volume holds: the binary, beside this program unless it is named, and its launcher.
///
/// # Errors
/// When the binary can't be read.
pub fn guest_files(binary: Option<&Path>) -> Result<Vec<GuestFile>, StartError> {
    let beside_us = || {
        let exe = std::env::current_exe().unwrap_or_default();
        exe.with_file_name("cellblock-guest")
    };
    let path = binary.map_or_else(beside_us, Path::to_path_buf);
    let bytes = std::fs::read(&path).map_err(|source| StartError::Guest { path, source })?;
    let file = |name: &str, mode, bytes| GuestFile { name: name.to_owned(), mode, bytes };
    let text = |name: &str, text: &[u8]| file(name, 0o444, text.to_vec());
    Ok(vec![
        file("guest", 0o555, bytes),
        text("ipykernel_launcher.py", IPYKERNEL_LAUNCHER),
        text("python/cellblock_packages.py", PACKAGES),
        text("python/sitecustomize.py", SITECUSTOMIZE),
    ])
}

fn archive(config: &Config) -> Result<Archive, StartError> {
    let (folder, executions) = (&config.server.data_dir, &config.executions);
    let limits = ArchiveLimits {
        blob_bytes: executions.blob_size,
        blob_retention: executions.blob_retention,
        notebook_bytes: executions.notebook_size,
        notebooks_bytes: executions.notebooks_size,
        notebook_retention: executions.notebook_retention,
    };
    Archive::open(folder, limits).map_err(|source| StartError::Archive { path: folder.clone(), source })
}

fn open_state(config: &Config, archive: Option<Archive>) -> Result<(State, Left), StartError> {
    let folder = &config.server.data_dir;
    State::open(folder, archive).map_err(|source| StartError::State { path: state::path_in(folder), source })
}

/// Whom upstreams are trusted by.
fn trust(config: &Config) -> Result<Trust, StartError> {
    let file = config.egress.ca_file.as_deref();
    let path = file.map(Path::to_path_buf).unwrap_or_default();
    Trust::load(file).map_err(|reason| StartError::Authorities { path, reason })
}

/// What the way out of all sessions keeps to. The engine's own address is among what nobody reaches.
async fn egress_settings(config: &Config) -> egress::Settings {
    let section = &config.egress;
    let limit = |bytes: u64| Some(bytes).filter(|bytes| *bytes > 0);
    let engine = config.engine.host.split_once("://").filter(|(scheme, _)| !["unix", "guard"].contains(scheme));
    let engine = match engine {
        // Without a port, where that of its protocol is meant, any will do to look up the name.
        Some((_, host)) if host.contains(':') => egress::addresses_of(host.trim_end_matches('/')).await,
        Some((_, host)) => egress::addresses_of(&format!("{host}:2375")).await,
        None => Vec::new(),
    };
    egress::Settings {
        connections: section.connections as usize,
        connections_per_session: section.session_connections as usize,
        connections_per_minute: section.session_connections_per_minute,
        sent_bytes: limit(section.session_sent),
        received_bytes: limit(section.session_received),
        connect_timeout: section.connect_timeout,
        idle_timeout: section.idle_timeout,
        deny: section.deny.iter().copied().chain(engine.into_iter().map(IpNet::from)).collect(),
        proxy: config::proxy_of(&section.proxy).map(str::to_owned),
        index: config.packages.index().unwrap_or(NOWHERE),
        package_bytes: config.packages.size,
    }
}

fn audit(config: &Config, state: State) -> Result<Arc<Audit>, StartError> {
    let section = &config.audit;
    if let Some(path) = &section.file {
        state.copy_audit_to(path).map_err(|source| StartError::Audit { path: path.clone(), source })?;
    }
    let bounds = AuditBounds {
        record_code: section.record_code,
        retention: section.retention_time,
        events: section.retention_count.into(),
    };
    Ok(Arc::new(Audit::new(state, bounds)))
}

/// Where requests and executions are told as traces, if they are to be.
fn traces(config: &Config, metrics: &Metrics) -> Result<Option<Traces>, StartError> {
    let section = &config.traces;
    if section.endpoint.is_empty() {
        return Ok(None);
    }
    let failed = |reason| StartError::Traces { endpoint: section.endpoint.clone(), reason };
    let headers = section.headers_file.as_deref().map(|path| read_secret(path).map_err(|e| (path, e)));
    let headers = headers.transpose().map_err(|(path, e)| failed(format!("{}: {e}", path.display())))?;
    let settings = traces::Settings {
        endpoint: section.endpoint.clone(),
        headers: headers.unwrap_or_default(),
        sample_ratio: section.sample_ratio,
        service_name: section.service_name.clone(),
        instance: config.engine.instance.clone(),
        server: config.server.listen,
        is_tls: config.server.tls_cert_file.is_some(),
        timeout: section.timeout,
        queue: usize::try_from(section.queue).unwrap_or(usize::MAX),
    };
    Traces::start(settings, metrics.clone()).map(Some).map_err(failed)
}

/// Refuses a data folder that another server works with: two of one instance would end each other's sessions. Held while the file is.
fn lock(folder: &Path) -> Result<std::fs::File, StartError> {
    use std::os::unix::fs::DirBuilderExt;
    let path = folder.join("lock");
    let failed = |reason: String| StartError::Locked { path: path.clone(), reason };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|e| failed(e.to_string()))?;
    let file = std::fs::File::create(&path).map_err(|e| failed(e.to_string()))?;
    file.try_lock().map_err(|e| match e {
        std::fs::TryLockError::WouldBlock => failed("another server works with this folder".to_owned()),
        std::fs::TryLockError::Error(e) => failed(e.to_string()),
    })?;
    Ok(file)
}

/// The first key, which is made where there is none, and those of the configuration.
fn configured_keys(config: &Config) -> Result<Vec<ConfiguredKey>, StartError> {
    let path = config.server.key_file();
    let failed = |reason: String| StartError::Key { path: path.clone(), reason };
    let hash = match std::fs::exists(&path) {
        Ok(false) => hash_of(&create_key(&path).map_err(|e| failed(e.to_string()))?),
        _ => read_key(&path),
    };
    let hash = hash.map_err(|reason| failed(format!("{reason}, or remove it to have a new one made")))?;
    let principal = Principal::new(FIRST_TENANT, [Scope::Sessions, Scope::Admin]);
    let first = ConfiguredKey { hash, name: FIRST_KEY.to_owned(), principal, expires_at: None };
    let others = config.keys.iter().map(configured_key);
    std::iter::once(Ok(first)).chain(others).collect()
}

fn configured_key(section: &KeySection) -> Result<ConfiguredKey, StartError> {
    let hash = match (section.hash, &section.file) {
        (Some(hash), _) => hash,
        (None, Some(path)) => read_key(path).map_err(|reason| StartError::Key { path: path.clone(), reason })?,
        // A section has one of both.
        (None, None) => {
            return Err(StartError::ConfiguredKey { name: section.name.clone(), reason: KeyError::Malformed });
        }
    };
    let templates = section.templates.as_deref().map(Arc::from);
    let principal = Principal { templates, ..Principal::new(section.tenant.as_str(), section.scopes.as_slice()) };
    Ok(ConfiguredKey { hash, name: section.name.clone(), principal, expires_at: section.expires_at })
}

/// Reads a key from a file that nobody else may read. An error says what to do about it.
fn read_key(path: &Path) -> Result<KeyHash, String> {
    hash_of(read_secret(path)?.trim())
}

/// Reads a file that nobody else may read. An error says what to do about it.
fn read_secret(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    check_mode(path)?;
    Ok(text)
}

fn hash_of(key: &str) -> Result<KeyHash, String> {
    keys::hash(key).ok_or_else(|| format!("{}: put one in", KeyError::Malformed))
}

fn check_mode(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path).map_err(|e| e.to_string())?.permissions().mode() & 0o777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(format!("others may read it (mode {mode:03o}): `chmod 600` it")) }
}

fn create_key(path: &Path) -> io::Result<String> {
    use std::io::Write;
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let key = keys::generate().map_err(|e| io::Error::other(e.to_string()))?;
    if let Some(folder) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{key}")?;
    Ok(key)
}
