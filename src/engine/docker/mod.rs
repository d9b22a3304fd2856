//! Docker as an engine: cells are containers, found again by their names and labels.
//!
//! The one place of the control plane that speaks Docker's API. What a cell may do is decided in
//! [`lockdown`], not here.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::{ContainerCreateBody, SystemInfo};
use cellblock_wire::link::Report;
use futures_util::stream::BoxStream;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::lockdown::runtime::View;
use super::lockdown::{self, HostFacts, LABEL_INSTANCE, LABEL_SPEC, LABEL_UID, Volumes};
use super::{
    ArchiveStream, ByteStream, CellName, CellSpec, CellState, DataVolume, Engine, EngineError, EngineEvent, EngineInfo,
    ImageInfo, Observed, Pull, WorkspaceName, WorkspaceSpec, WorkspaceVolume,
};
use crate::domain::ids::InstallationId;

mod cells;
mod client;
mod data;
mod events;
mod filling;
mod guest_volume;
mod images;
mod lock;
mod never_started;
mod preflight;
mod stream;
pub mod trial;
mod uids;
mod workspaces;

use data::Data;
pub use guest_volume::GuestFile;
use guest_volume::GuestVolume;
use lock::Lock;
pub use preflight::{Demand, QUOTA_REMEDY, Quota};
use uids::UidPool;

/// How often a uid may turn out to be another control plane's before that is an error.
const UID_ATTEMPTS: usize = 8;

/// How to reach an engine, and what belongs to this control plane there.
#[derive(Debug, Clone)]
pub struct DockerSettings {
    /// As in `DOCKER_HOST`: `unix://`, `tcp://` or `http://`. The usual socket when absent.
    pub host: Option<String>,
    /// A folder with `ca.pem`, `cert.pem` and `key.pem`. With it, `tcp://` is TLS.
    pub tls_folder: Option<PathBuf>,
    /// Name of this control plane on the engine: lower-case letters, digits and `-`. No two may share one.
    pub instance: String,
    /// What the guest's volume holds.
    pub guest_files: Vec<GuestFile>,
    /// Uids for cells. Nothing else on the engine's machine should have them.
    pub uids: RangeInclusive<u32>,
    /// The operator's `config.json` of Docker, for registry credentials.
    pub credentials_file: Option<PathBuf>,
    /// What cells are to have, and what may be missing. Without any, the engine's default runtime with every lock.
    pub demands: Vec<Demand>,
    /// Cells that are made at one time. More only wait for each other inside the engine.
    pub starts_at_once: usize,
}

impl DockerSettings {
    /// The local engine, and an instance without a guest.
    #[must_use]
    pub fn new(instance: &str) -> Self {
        Self {
            host: None,
            tls_folder: None,
            instance: instance.to_owned(),
            guest_files: Vec::new(),
            uids: 200_000..=265_535,
            credentials_file: None,
            demands: Vec::new(),
            starts_at_once: 4,
        }
    }
}

/// A Docker engine. Cloning it gives another handle to the same one.
#[derive(Clone)]
pub struct DockerEngine {
    shared: Arc<Shared>,
}

struct Shared {
    docker: Docker,
    settings: DockerSettings,
    info: SystemInfo,
    facts: HostFacts,
    guest: GuestVolume,
    data: Data,
    lock: Lock,
    /// The first image that was asked for and is there.
    image: OnceLock<String>,
    /// Which volume was read back.
    verified: tokio::sync::Mutex<Option<String>>,
    uids: Mutex<UidPool>,
    starts: Semaphore,
    /// Why the engine enforces no quota of a volume; nothing where it does. Tried once.
    quota: tokio::sync::OnceCell<Option<String>>,
    /// A quota was not given to a workspace, and the log says so.
    dropped: std::sync::Once,
}

impl std::fmt::Debug for DockerEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DockerEngine").field("instance", &self.shared.settings.instance).finish_non_exhaustive()
    }
}

/// Whether a container of the wanted name was there already.
enum Made {
    New,
    Was(CellState),
}

impl DockerEngine {
    /// Connects, agrees on a version of the API, and learns which uids are in use. Leaves nothing on the engine; where a workspace is to have a quota, it makes a
    /// volume to see whether that is enforced.
    ///
    /// # Errors
    /// When the engine does not answer, or is older than Docker 20.10; [`EngineError::Rejected`] with what its machine lacks to
    /// confine cells.
    pub async fn connect(settings: DockerSettings) -> Result<Self, EngineError> {
        let docker = client::connect(settings.host.as_deref(), settings.tls_folder.as_ref()).await?;
        let info = system_info(&docker).await?;
        preflight::check(&info, &settings)?;
        for warning in info.warnings.iter().flatten() {
            tracing::warn!(warning, "the engine warns about its machine");
        }
        let shared = Shared {
            facts: preflight::host_facts(&info),
            guest: GuestVolume::new(&settings.instance, settings.guest_files.clone(), preflight::root_outside(&info)),
            info,
            data: Data::new(&settings.instance),
            lock: Lock::new(&settings.instance, settings.host.as_deref()),
            image: OnceLock::new(),
            verified: tokio::sync::Mutex::default(),
            uids: Mutex::new(UidPool::new(settings.uids.clone(), random()?)),
            starts: Semaphore::new(settings.starts_at_once),
            quota: tokio::sync::OnceCell::new(),
            dropped: std::sync::Once::new(),
            docker,
            settings,
        };
        let engine = Self { shared: Arc::new(shared) };
        engine.load_uids().await?;
        engine.check_quotas().await?;
        Ok(engine)
    }

    /// What of the engine's machine changes how cells are locked.
    #[must_use]
    pub fn host_facts(&self) -> HostFacts {
        self.shared.facts
    }

    /// The guest's volume.
    #[must_use]
    pub fn guest_volume(&self) -> &str {
        self.shared.guest.name()
    }

    /// How cells of a runtime are looked at.
    fn view(&self, runtime: &str) -> View {
        preflight::view(&self.shared.info, &self.shared.settings.demands, runtime)
    }

    fn uids(&self) -> MutexGuard<'_, UidPool> {
        // Every change of the pool is complete in itself.
        self.shared.uids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses an engine that does not enforce a quota which a template relies on.
    async fn check_quotas(&self) -> Result<(), EngineError> {
        let wanting: Vec<_> =
            self.shared.settings.demands.iter().filter(|demand| demand.workspaces == Some(Quota::Enforced)).collect();
        let why = if wanting.is_empty() { None } else { self.lacks_quotas().await? };
        let Some(why) = why else { return Ok(()) };
        let unmet = wanting.iter().map(|demand| preflight::unmet_quota(&demand.template, &why)).collect::<Vec<_>>();
        Err(preflight::unconfined(&unmet))
    }

    /// Why the engine enforces no quota of a volume; nothing where it does.
    async fn lacks_quotas(&self) -> Result<Option<String>, EngineError> {
        let shared = &*self.shared;
        let tried = shared.quota.get_or_try_init(|| workspaces::try_quota(&shared.docker, &shared.settings.instance));
        Ok(tried.await?.clone())
    }

    /// The kernel counts by uid whoever made the container, so other control planes' cells count as well. A workspace keeps its uid without a cell.
    async fn load_uids(&self) -> Result<(), EngineError> {
        let all = cells::list(&self.shared.docker, vec![LABEL_UID.to_owned()]).await?;
        let kept = workspaces::uids(&self.shared.docker).await?;
        let mut pool = self.uids();
        for (name, uid) in kept {
            match name.id(&self.shared.settings.instance) {
                Some(_) => pool.hold(name.as_str(), uid),
                None => pool.exclude(uid),
            }
        }
        for summary in &all {
            match (cells::listed_name(summary), cells::listed_uid(summary)) {
                (Some(name), Some(uid)) if self.owns(&name) => pool.hold(name.as_str(), uid),
                (_, Some(uid)) => pool.exclude(uid),
                _ => {}
            }
        }
        Ok(())
    }

    fn owns(&self, name: &CellName) -> bool {
        name.session(&self.shared.settings.instance).is_some()
    }

    /// Nothing here touches a container that is not this instance's.
    fn check_name(&self, attempt: &'static str, name: &CellName) -> Result<(), EngineError> {
        if self.owns(name) {
            return Ok(());
        }
        Err(EngineError::Rejected { attempt, detail: format!("{name} is not a cell of this instance") })
    }

    async fn start_permit(&self) -> Result<SemaphorePermit<'_>, EngineError> {
        let closed = |_| EngineError::Unavailable { attempt: "starting a cell", detail: "shutting down".to_owned() };
        self.shared.starts.acquire().await.map_err(closed)
    }

    /// The guest's volume is still the one that was read back; one that was pruned away meanwhile is made again. The engine
    /// would make an empty one by itself.
    async fn check_guest(&self, image: &str) -> Result<(), EngineError> {
        let shared = &*self.shared;
        let mut verified = shared.verified.lock().await;
        let there = shared.guest.observe(&shared.docker).await?;
        if there.is_none() || there != *verified {
            if verified.is_some() {
                let volume = shared.guest.name();
                tracing::warn!(volume, "the guest's volume was replaced or removed; filling it again");
            }
            *verified = None;
            *verified = Some(shared.guest.ensure(&shared.docker, image).await?);
        }
        Ok(())
    }

    /// The container for a cell that only tries its locks, and its uid.
    fn trial_body(&self, cell: &CellSpec, arguments: Vec<String>) -> Result<(ContainerCreateBody, u32), EngineError> {
        let shared = &*self.shared;
        let uid = self.uids().take(cell.name.as_str()).ok_or_else(out_of_uids)?;
        let body = lockdown::container(
            cell,
            uid,
            Volumes::only_guest(shared.guest.name()),
            &shared.settings.instance,
            &shared.facts,
        );
        Ok((ContainerCreateBody { cmd: Some(arguments), ..body }, uid))
    }

    async fn make(&self, cell: &CellSpec) -> Result<Made, EngineError> {
        let shared = &*self.shared;
        let data = shared.data.of_cell(&shared.docker, cell).await?;
        let volumes = self.volumes(cell, &data);
        if let Some(workspace) = &cell.workspace {
            return self.make_with(cell, workspace, volumes).await;
        }
        for _ in 0..UID_ATTEMPTS {
            let Some(uid) = self.uids().take(cell.name.as_str()) else {
                return Err(out_of_uids());
            };
            let body = lockdown::container(cell, uid, volumes, &shared.settings.instance, &shared.facts);
            match cells::create(&shared.docker, &cell.name, body).await {
                Ok(warnings) => self.judge(cell, warnings)?,
                Err(EngineError::Conflict { .. }) => return self.adopt(cell, volumes).await,
                Err(error) => return Err(error),
            }
            if !self.is_shared(uid, 1, None).await? {
                return Ok(Made::New);
            }
            cells::remove(&shared.docker, &cell.name).await?;
            self.uids().avoid(cell.name.as_str());
            self.avoid_workspaces_of_others().await?;
        }
        Err(out_of_uids())
    }

    /// The same for a cell that has a workspace: its uid is the workspace's, and nobody else may have that.
    async fn make_with(
        &self,
        cell: &CellSpec,
        workspace: &WorkspaceName,
        volumes: Volumes<'_>,
    ) -> Result<Made, EngineError> {
        let shared = &*self.shared;
        let instance = &shared.settings.instance;
        // The engine would make an empty volume of that name, which is root's.
        let there = workspaces::uid_of(&shared.docker, workspaces::ATTACH, instance, workspace).await?;
        let absent = || EngineError::Absent { attempt: workspaces::ATTACH, what: workspace.to_string() };
        let uid = there.ok_or_else(absent)?;
        self.uids().hold(workspace.as_str(), uid);
        let body = lockdown::container(cell, uid, volumes, instance, &shared.facts);
        match cells::create(&shared.docker, &cell.name, body).await {
            Ok(warnings) => self.judge(cell, warnings)?,
            Err(EngineError::Conflict { .. }) => return self.adopt(cell, volumes).await,
            Err(error) => return Err(error),
        }
        if !self.is_shared(uid, 1, Some(workspace)).await? {
            self.uids().hold(cell.name.as_str(), uid);
            return Ok(Made::New);
        }
        cells::remove(&shared.docker, &cell.name).await?;
        Err(EngineError::Conflict {
            attempt: workspaces::ATTACH,
            detail: format!("another cell has {workspace}, or its uid"),
        })
    }

    fn volumes<'a>(&'a self, cell: &'a CellSpec, data: &'a [String]) -> Volumes<'a> {
        let workspace = cell.workspace.as_ref().map(WorkspaceName::as_str);
        Volumes { guest: self.shared.guest.name(), data, workspace }
    }

    /// The volume of a workspace, which may be there already, and its uid, which nobody else has.
    async fn make_workspace(&self, workspace: &WorkspaceSpec) -> Result<WorkspaceVolume, EngineError> {
        let shared = &*self.shared;
        let (docker, instance, name) = (&shared.docker, &shared.settings.instance, &workspace.name);
        if let Some(uid) = workspaces::uid_of(docker, workspaces::ENSURE, instance, name).await? {
            self.uids().hold(name.as_str(), uid);
            return Ok(WorkspaceVolume { uid, is_new: false });
        }
        let quota = self.enforced(workspace.quota_bytes).await?;
        for _ in 0..UID_ATTEMPTS {
            let wanted = self.uids().take(name.as_str()).ok_or_else(out_of_uids)?;
            let uid = workspaces::create(docker, instance, name, wanted, quota).await?;
            self.uids().hold(name.as_str(), uid);
            if !self.is_shared(uid, 0, Some(name)).await? {
                return Ok(WorkspaceVolume { uid, is_new: true });
            }
            workspaces::remove(docker, instance, name).await?;
            self.uids().avoid(name.as_str());
            self.avoid_workspaces_of_others().await?;
        }
        Err(out_of_uids())
    }

    /// A quota as far as the engine has any, where it is done without by the configuration that the engine was asked about.
    async fn enforced(&self, quota_bytes: Option<u64>) -> Result<Option<u64>, EngineError> {
        if quota_bytes.is_none() {
            return Ok(None);
        }
        let Some(why) = self.lacks_quotas().await? else { return Ok(quota_bytes) };
        let shared = &*self.shared;
        if !shared.settings.demands.iter().any(|demand| demand.workspaces == Some(Quota::DoneWithout)) {
            let detail = preflight::no_quota(&why);
            return Err(EngineError::Rejected { attempt: workspaces::ENSURE, detail });
        }
        shared.dropped.call_once(|| tracing::warn!(why, "workspaces are made without their quota, as is accepted"));
        Ok(None)
    }

    /// Those of another control plane lie beside each other as ours do: one that is met is seldom the last.
    async fn avoid_workspaces_of_others(&self) -> Result<(), EngineError> {
        let all = workspaces::uids(&self.shared.docker).await?;
        let others = all.into_iter().filter(|(name, _)| name.id(&self.shared.settings.instance).is_none());
        let mut pool = self.uids();
        others.for_each(|(_, uid)| pool.exclude(uid));
        Ok(())
    }

    fn check_workspace(&self, attempt: &'static str, name: &WorkspaceName) -> Result<(), EngineError> {
        if name.id(&self.shared.settings.instance).is_some() {
            return Ok(());
        }
        Err(EngineError::Rejected { attempt, detail: format!("{name} is not a workspace of this instance") })
    }

    /// A warning says that part of what was asked for will not be enforced.
    fn judge(&self, cell: &CellSpec, mut warnings: Vec<String>) -> Result<(), EngineError> {
        let view = self.view(&cell.runtime);
        warnings.retain(|warning| view.requires_despite(warning));
        if warnings.is_empty() { Ok(()) } else { Err(EngineError::Unverified { mismatches: warnings }) }
    }

    /// Whether a uid is that of more cells than this, or of another workspace than `own`: two control planes can choose the same at the same time.
    async fn is_shared(&self, uid: u32, most: usize, own: Option<&WorkspaceName>) -> Result<bool, EngineError> {
        let docker = &self.shared.docker;
        let label = vec![format!("{LABEL_UID}={uid}")];
        let (cells, workspaces) = tokio::try_join!(cells::list(docker, label), workspaces::with_uid(docker, uid))?;
        Ok(cells.len() > most || workspaces.iter().any(|name| Some(name) != own))
    }

    /// Takes a container that has the wanted name already, if it is the wanted one.
    async fn adopt(&self, cell: &CellSpec, volumes: Volumes<'_>) -> Result<Made, EngineError> {
        let shared = &*self.shared;
        let conflict = |detail: &str| {
            Err(EngineError::Conflict { attempt: "creating a cell", detail: format!("{} {detail}", cell.name) })
        };
        let found = cells::inspect(&shared.docker, &cell.name).await?;
        let wanted = lockdown::spec_hash(cell, volumes, &shared.facts);
        if cells::label(&found, LABEL_SPEC) != Some(wanted.as_str()) {
            return conflict("exists and was made from another specification");
        }
        if let Some(uid) = cells::label(&found, LABEL_UID).and_then(|uid| uid.parse().ok()) {
            self.uids().hold(cell.name.as_str(), uid);
        }
        match cells::observed(&cell.name, &found).state {
            state @ (CellState::Created | CellState::Running) => Ok(Made::Was(state)),
            CellState::Paused => conflict("exists and is paused"),
            CellState::Exited { .. } => conflict("exists and has ended"),
        }
    }
}

#[async_trait]
impl Engine for DockerEngine {
    async fn info(&self) -> Result<EngineInfo, EngineError> {
        Ok(preflight::engine_info(&system_info(&self.shared.docker).await?))
    }

    async fn resolve_image(&self, reference: &str, pull: Pull) -> Result<ImageInfo, EngineError> {
        let shared = &*self.shared;
        let credentials = shared.settings.credentials_file.as_deref();
        let architecture = shared.info.architecture.as_deref().unwrap_or_default();
        let image = images::resolve(&shared.docker, credentials, architecture, reference, pull).await?;
        shared.image.get_or_init(|| image.id.clone());
        Ok(image)
    }

    /// Puts the guest into its volume, and removes volumes of other guests that nobody uses. The volume is filled through a container of the image that
    /// is never started.
    async fn prepare(&self, image: &str) -> Result<(), EngineError> {
        let shared = &*self.shared;
        let mut verified = shared.verified.lock().await;
        *verified = Some(shared.guest.ensure(&shared.docker, image).await?);
        shared.guest.remove_others(&shared.docker).await?;
        Ok(())
    }

    async fn ensure(&self, cell: &CellSpec) -> Result<ByteStream, EngineError> {
        self.check_name("creating a cell", &cell.name)?;
        let _permit = self.start_permit().await?;
        self.check_guest(&cell.image).await?;
        let made = self.make(cell).await?;
        // Before the start, so that not a byte is missed: the engine throws away what nobody is attached to.
        let stream = cells::attach(&self.shared.docker, &cell.name).await?;
        if !matches!(made, Made::Was(CellState::Running)) {
            cells::start(&self.shared.docker, &cell.name).await?;
        }
        Ok(stream)
    }

    async fn link(&self, name: &CellName) -> Result<ByteStream, EngineError> {
        const ATTEMPT: &str = "attaching to a cell";
        self.check_name(ATTEMPT, name)?;
        // The engine would attach to one that has ended, and then nothing would ever come.
        let found = cells::inspect(&self.shared.docker, name).await?;
        match cells::observed(name, &found).state {
            CellState::Running => cells::attach(&self.shared.docker, name).await,
            state => Err(EngineError::Conflict { attempt: ATTEMPT, detail: format!("{name} does not run: {state:?}") }),
        }
    }

    async fn attest(&self, cell: &CellSpec, report: &Report) -> Result<(), EngineError> {
        let shared = &*self.shared;
        let unknown = || EngineError::Absent { attempt: "attesting a cell", what: cell.name.to_string() };
        let uid = self.uids().held(cell.name.as_str()).ok_or_else(unknown)?;
        let inspected = cells::inspect(&shared.docker, &cell.name).await?;
        let data = shared.data.of_cell(&shared.docker, cell).await?;
        let volumes = self.volumes(cell, &data);
        let body = lockdown::container(cell, uid, volumes, &shared.settings.instance, &shared.facts);
        let view = self.view(&cell.runtime);
        let mut mismatches = lockdown::attest(&body, uid, &inspected, report, &shared.facts, &view);
        if self.is_shared(uid, 1, cell.workspace.as_ref()).await? {
            mismatches.push(format!("uid {uid} is another cell's as well"));
        }
        if mismatches.is_empty() { Ok(()) } else { Err(EngineError::Unverified { mismatches }) }
    }

    async fn pause(&self, name: &CellName) -> Result<(), EngineError> {
        self.check_name("pausing a cell", name)?;
        cells::pause(&self.shared.docker, name).await
    }

    async fn resume(&self, name: &CellName) -> Result<(), EngineError> {
        self.check_name("resuming a cell", name)?;
        cells::unpause(&self.shared.docker, name).await
    }

    async fn remove(&self, name: &CellName) -> Result<(), EngineError> {
        self.check_name("removing a cell", name)?;
        cells::remove(&self.shared.docker, name).await?;
        // Only now, and not when the removal was merely asked for: until then its processes may live.
        self.uids().release(name.as_str());
        self.shared.data.release(name);
        Ok(())
    }

    async fn observe(&self, name: &CellName) -> Result<Option<Observed>, EngineError> {
        const ATTEMPT: &str = "inspecting a cell";
        self.check_name(ATTEMPT, name)?;
        let instance = self.shared.settings.instance.as_str();
        match cells::inspect(&self.shared.docker, name).await {
            // Somebody else made it, under a name that is ours.
            Ok(found) if cells::label(&found, LABEL_INSTANCE) != Some(instance) => {
                let detail = format!("{name} does not carry this instance's label");
                Err(EngineError::Rejected { attempt: ATTEMPT, detail })
            }
            Ok(found) => Ok(Some(cells::observed(name, &found))),
            Err(EngineError::Absent { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn claim(&self, installation: InstallationId) -> Result<(), EngineError> {
        let shared = &*self.shared;
        match shared.lock.claim(&shared.docker, installation, shared.image.get().cloned()).await {
            // It was there once.
            Err(EngineError::Absent { .. }) => shared.lock.claim(&shared.docker, installation, None).await,
            claimed => claimed,
        }
    }

    async fn release(&self, installation: InstallationId) -> Result<(), EngineError> {
        self.shared.lock.release(&self.shared.docker, installation).await
    }

    async fn sweep(&self) -> Result<Vec<String>, EngineError> {
        let shared = &*self.shared;
        trial::clear_old(&shared.docker).await?;
        let mut removed = shared.guest.remove_others(&shared.docker).await?;
        removed.extend(shared.data.sweep(&shared.docker).await?);
        workspaces::sweep(&shared.docker, &shared.settings.instance).await?;
        Ok(removed)
    }

    async fn import_data(&self, name: &str, image: &str, archive: ArchiveStream) -> Result<DataVolume, EngineError> {
        let shared = &*self.shared;
        let imported = shared.data.import(&shared.docker, name, image, archive).await?;
        if let Err(error) = shared.data.sweep(&shared.docker).await {
            tracing::warn!(%error, "what the data replaces is left to the next sweep");
        }
        Ok(imported)
    }

    async fn list_data(&self) -> Result<Vec<DataVolume>, EngineError> {
        self.shared.data.list(&self.shared.docker).await
    }

    async fn remove_data(&self, name: &str) -> Result<(), EngineError> {
        self.shared.data.remove(&self.shared.docker, name).await
    }

    async fn ensure_workspace(&self, workspace: &WorkspaceSpec) -> Result<WorkspaceVolume, EngineError> {
        self.check_workspace(workspaces::ENSURE, &workspace.name)?;
        let shared = &*self.shared;
        let made = self.make_workspace(workspace).await?;
        // Each time: whoever made it may have been killed before it was given away.
        let owner = (made, shared.facts.uid_offset);
        let (docker, instance) = (&shared.docker, &shared.settings.instance);
        workspaces::give_to(docker, instance, &workspace.name, &workspace.image, owner).await?;
        Ok(made)
    }

    async fn remove_workspace(&self, name: &WorkspaceName) -> Result<(), EngineError> {
        self.check_workspace(workspaces::REMOVE, name)?;
        workspaces::remove(&self.shared.docker, &self.shared.settings.instance, name).await?;
        // Only now: until then files are there that belong to it.
        self.uids().release(name.as_str());
        Ok(())
    }

    async fn list_workspaces(&self) -> Result<Vec<WorkspaceName>, EngineError> {
        workspaces::list(&self.shared.docker, &self.shared.settings.instance).await
    }

    async fn list(&self) -> Result<Vec<Observed>, EngineError> {
        let labels = cells::labels_of(&self.shared.settings.instance);
        let mut all = Vec::new();
        for summary in cells::list(&self.shared.docker, labels).await? {
            // How a cell ended is not in the list.
            match (cells::listed(&summary), cells::listed_name(&summary)) {
                (Some(observed), _) => all.push(observed),
                (None, Some(name)) => all.extend(self.observe(&name).await?),
                (None, None) => {}
            }
        }
        Ok(all)
    }

    fn watch_since(&self, since: SystemTime) -> BoxStream<'static, EngineEvent> {
        events::watch(self.shared.docker.clone(), self.shared.settings.instance.clone(), since)
    }
}

async fn system_info(docker: &Docker) -> Result<SystemInfo, EngineError> {
    client::call("asking the engine about itself", "the engine", client::INSPECT, docker.info()).await
}

fn out_of_uids() -> EngineError {
    EngineError::Unavailable { attempt: "creating a cell", detail: "no uid of the range is free".to_owned() }
}

fn random() -> Result<u32, EngineError> {
    getrandom::u32().map_err(|e| EngineError::Unexpected { attempt: "choosing uids", detail: e.to_string() })
}
