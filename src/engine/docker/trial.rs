//! Tries on a host what a cell's locks hold: containers like a cell's, in which the guest does what each lock should prevent. For an operator, not for
//! sessions.
//!
//! What it makes carries an instance's name that no server has, so none of them touches it; what a killed one leaves is removed once it is old.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bollard::Docker;
use bollard::models::{ContainerCreateBody, HostConfig, SystemInfo, SystemInfoCgroupVersionEnum};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, ListVolumesOptionsBuilder, RemoveContainerOptionsBuilder,
    RemoveVolumeOptionsBuilder, StatsOptionsBuilder,
};
use cellblock_wire::link::Report;
use cellblock_wire::trial::{Line, Machine, Step, TRIAL, Tried};
use futures_util::StreamExt;
use tokio::io::AsyncReadExt;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::super::{ByteStream, CellName, CellSpec, CellState, Engine, EngineError, ImageInfo, Pull};
use super::client::{self, call};
use super::preflight::{self, Demand};
use super::{DockerEngine, DockerSettings, cells, images, never_started, workspaces};
use crate::domain::ids::SessionId;
use crate::domain::lock::Lock;
use crate::domain::spec::{MIB, Resources};
use crate::engine::lockdown::{self, LABEL_INSTANCE};
use crate::task;

/// What the name of a trial's instance begins with. No server may have one like it.
pub const INSTANCE_PREFIX: &str = "doctor-";
/// One container, from its making to its removal.
const LONGEST: Duration = Duration::from_secs(60);
/// Between two looks at what a container uses.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// What a guest says in a trial.
const MOST_SAID: u64 = 1 << 20;
/// What is older was left by one that was killed.
const OLD_SECONDS: i64 = 600;
/// Much less than a session has, so that a limit is reached soon.
const RESOURCES: Resources = Resources {
    cpu_millis: 250,
    memory_bytes: 128 * MIB,
    disk_bytes: 8 * MIB,
    tmp_bytes: 4 * MIB,
    pids: 96,
    open_files: 256,
};
/// Inodes of `/dev/shm`, as the lock has them.
const SHM_INODES: u64 = 1024;

/// An engine on whose host things are tried.
#[derive(Debug)]
pub struct Host {
    docker: Docker,
    info: SystemInfo,
    settings: DockerSettings,
    api: String,
    /// Held while something is made, which goes on at the engine whoever waits for it.
    making: Arc<tokio::sync::Mutex<()>>,
    /// How far its clock is ahead of ours, in milliseconds, if it tells.
    pub clock_ahead_ms: Option<i64>,
}

/// What an engine says of itself and of its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The engine's version.
    pub version: String,
    /// The version of its API that is spoken.
    pub api: String,
    /// `1` or `2`.
    pub cgroup_version: String,
    /// Who makes control groups.
    pub cgroup_driver: String,
    /// Names of the runtimes; the default one is the first.
    pub runtimes: Vec<String>,
    /// The engine runs without root.
    pub is_rootless: bool,
    /// Uids inside are others outside.
    pub is_remapped: bool,
    /// Where images and volumes are, and how.
    pub storage: String,
    /// What the engine's host lacks that nobody can do without.
    pub missing: Vec<String>,
    /// What the engine itself warns of.
    pub warnings: Vec<String>,
}

/// What was found in one container or several of one runtime.
#[derive(Debug, Clone, Default)]
pub struct Found {
    /// What was tried.
    pub tried: Vec<Tried>,
    /// What the guest sees of the machine.
    pub machine: Option<Machine>,
    /// What the guest reports.
    pub report: Option<Report>,
    /// Every difference between what was asked for and what engine and guest show, but for what is done without.
    pub mismatches: Vec<String>,
}

impl Host {
    /// Connects, whatever the host lacks. Changes nothing there.
    ///
    /// # Errors
    /// When the engine does not answer, or is older than Docker 20.10.
    pub async fn connect(settings: DockerSettings) -> Result<Self, EngineError> {
        let docker = client::connect(settings.host.as_deref(), settings.tls_folder.as_ref()).await?;
        let asked = jiff::Timestamp::now();
        let info = super::system_info(&docker).await?;
        let told = info.system_time.as_ref().and_then(|time| time.to_string().parse::<jiff::Timestamp>().ok());
        // It told the time somewhere between question and answer.
        let now = jiff::Timestamp::now();
        let middle = i64::midpoint(asked.as_millisecond(), now.as_millisecond());
        let clock_ahead_ms = told.map(|told| told.as_millisecond() - middle);
        let api = docker.client_version().to_string();
        let id = Uuid::new_v4().simple().to_string();
        let settings = DockerSettings { instance: format!("{INSTANCE_PREFIX}{}", &id[..8]), ..settings };
        Ok(Self { docker, info, settings, api, making: Arc::default(), clock_ahead_ms })
    }

    /// What the engine says.
    #[must_use]
    pub fn facts(&self) -> Facts {
        let info = &self.info;
        let mut runtimes = preflight::runtimes(info);
        let default = preflight::runtime_name(info, "");
        runtimes.sort_by_key(|name| name != default);
        let storage =
            info.driver_status.iter().flatten().find(|pair| pair.first().is_some_and(|n| n == "Backing Filesystem"));
        let backing = storage.and_then(|pair| pair.get(1)).map_or("an unknown file system", String::as_str);
        Facts {
            version: info.server_version.clone().unwrap_or_default(),
            api: self.api.clone(),
            cgroup_version: match info.cgroup_version {
                Some(SystemInfoCgroupVersionEnum::_2) => "2".to_owned(),
                _ => "1".to_owned(),
            },
            cgroup_driver: info.cgroup_driver.map(|driver| driver.to_string()).unwrap_or_default(),
            runtimes,
            is_rootless: preflight::has_security(info, "rootless"),
            is_remapped: preflight::has_security(info, "userns"),
            storage: format!("{} on {backing}", info.driver.as_deref().unwrap_or("an unknown driver")),
            missing: preflight::missing(info, &self.settings),
            warnings: info.warnings.clone().unwrap_or_default(),
        }
    }

    /// The name of a runtime, its default's when none is given.
    #[must_use]
    pub fn runtime_name<'a>(&'a self, name: &'a str) -> &'a str {
        preflight::runtime_name(&self.info, name)
    }

    /// Why a template's cells would be refused.
    #[must_use]
    pub fn unmet(&self, demand: &Demand) -> Option<String> {
        preflight::unmet(&self.info, demand)
    }

    /// What is known not to hold under a runtime; `None` for one that the engine has not.
    #[must_use]
    pub fn unenforced(&self, runtime: &str) -> Option<Vec<Lock>> {
        let known = preflight::runtime(&self.info, runtime)?;
        Some(preflight::unenforced(&self.info, &known).into_iter().collect())
    }

    /// Looks for an image, and never fetches it.
    ///
    /// # Errors
    /// When it is not there, or no session may have it.
    pub async fn image(&self, reference: &str) -> Result<ImageInfo, EngineError> {
        let architecture = self.info.architecture.as_deref().unwrap_or_default();
        images::resolve(&self.docker, None, architecture, reference, Pull::Never).await
    }

    /// Whether the engine can limit the size of a container's own files. Makes a container that is never started.
    ///
    /// # Errors
    /// The engine's words where it can't.
    pub async fn limits_disk(&self, image: &str) -> Result<(), EngineError> {
        const ATTEMPT: &str = "limiting a container's disk";
        let name = format!("cellblock-{}-disk", self.settings.instance);
        let host = HostConfig {
            storage_opt: Some(HashMap::from([("size".to_owned(), "1G".to_owned())])),
            network_mode: Some("none".to_owned()),
            ..HostConfig::default()
        };
        let body = ContainerCreateBody {
            image: Some(image.to_owned()),
            entrypoint: Some(vec!["/nothing".to_owned()]),
            labels: Some(HashMap::from([(LABEL_INSTANCE.to_owned(), self.settings.instance.clone())])),
            host_config: Some(host),
            ..ContainerCreateBody::default()
        };
        let (docker, image) = (self.docker.clone(), image.to_owned());
        let making = async move {
            let options = CreateContainerOptionsBuilder::default().name(&name).build();
            let made = call(ATTEMPT, &image, client::CREATE, docker.create_container(Some(options), body)).await?;
            never_started::remove(&docker, ATTEMPT, &made.id).await
        };
        self.whole(making).await
    }

    /// Why the engine enforces no quota of a volume, in its own words; nothing where it does. Makes a volume with one, and removes it.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn lacks_quotas(&self) -> Result<Option<String>, EngineError> {
        let (docker, instance) = (self.docker.clone(), self.settings.instance.clone());
        self.whole(async move { workspaces::try_quota(&docker, &instance).await }).await
    }

    /// Does something to its end, even where nobody waits for that any more: what is made is then there to be removed.
    async fn whole<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, EngineError>> + Send + 'static,
    ) -> Result<T, EngineError> {
        let guard = Arc::clone(&self.making).lock_owned().await;
        let (tell, told) = oneshot::channel();
        task::spawn("trial", async move {
            let done = work.await;
            drop(guard);
            // Whoever asked may have been interrupted.
            let _ = tell.send(done);
        });
        let lost = |_| EngineError::Unexpected { attempt: "trying a cell's locks", detail: "it broke off".to_owned() };
        told.await.map_err(lost)?
    }

    /// Runs the guest's trials under a runtime.
    ///
    /// # Errors
    /// When no container can be started.
    pub async fn try_locks(&self, image: &str, runtime: &str) -> Result<Found, EngineError> {
        let settings = DockerSettings { demands: self.demands(runtime), ..self.settings.clone() };
        let engine = DockerEngine::connect(settings).await?;
        let (preparing, any) = (engine.clone(), image.to_owned());
        self.whole(async move { preparing.prepare(&any).await }).await?;
        let mut found = Found::default();
        for step in Step::ALL {
            let trial = tokio::time::timeout(LONGEST, self.run(&engine, image, runtime, step));
            trial
                .await
                .unwrap_or(Err(EngineError::TimedOut { attempt: "trying a cell's locks", limit: LONGEST }))?
                .add_to(&mut found);
        }
        Ok(found)
    }

    /// The host is tried as it is: nothing is refused beforehand.
    fn demands(&self, runtime: &str) -> Vec<Demand> {
        let (runtime, accepted) = (runtime.to_owned(), Lock::ALL.into());
        vec![Demand { template: String::new(), runtime, accepted, workspaces: None }]
    }

    async fn run(&self, engine: &DockerEngine, image: &str, runtime: &str, step: Step) -> Result<Trial, EngineError> {
        let session = SessionId::from_uuid(Uuid::now_v7());
        let cell = CellSpec {
            name: CellName::new(&self.settings.instance, session, 0),
            session,
            image: image.to_owned(),
            runtime: runtime.to_owned(),
            resources: RESOURCES,
            data: Vec::new(),
            workspace: None,
        };
        let (body, uid) = engine.trial_body(&cell, arguments(step))?;
        let (docker, name, asked) = (self.docker.clone(), cell.name.clone(), body.clone());
        let warnings = self.whole(async move { cells::create(&docker, &name, asked).await }).await?;
        engine.judge(&cell, warnings)?;
        let mut stream = cells::attach(&self.docker, &cell.name).await?;
        cells::start(&self.docker, &cell.name).await?;
        // While it runs, for the step that takes a second.
        let inspected = cells::inspect(&self.docker, &cell.name).await;
        let (lines, throttled) = tokio::join!(read(&mut stream), self.throttled(&cell.name));
        let lines = lines?;
        let report = lines.iter().find_map(|line| if let Line::Report(report) = line { Some(report) } else { None });
        let mismatches = match (report, inspected) {
            (Some(report), Ok(shown)) => {
                lockdown::attest(&body, uid, &shown, report, &engine.host_facts(), &engine.view(runtime))
            }
            _ => Vec::new(),
        };
        let ended = cells::observed(&cell.name, &cells::inspect(&self.docker, &cell.name).await?).state;
        cells::remove(&self.docker, &cell.name).await?;
        Ok(Trial { step, lines, mismatches, ended, throttled })
    }

    /// How often the engine has seen a container wait for its CPU quota, until that ends. What a kernel of its own counts inside is not the machine's time.
    async fn throttled(&self, name: &CellName) -> u64 {
        let mut most = 0;
        loop {
            let options = StatsOptionsBuilder::default().stream(false).one_shot(true).build();
            let mut stats = self.docker.stats(name.as_str(), Some(options));
            let asked = async { stats.next().await.transpose() };
            let Ok(Some(seen)) = call("reading what a cell uses", name.as_str(), client::INSPECT, asked).await else {
                return most;
            };
            let throttling = seen.cpu_stats.and_then(|cpu| cpu.throttling_data);
            most = most.max(throttling.and_then(|data| data.throttled_periods).unwrap_or(0));
            if !matches!(
                cells::inspect(&self.docker, name).await.map(|i| cells::observed(name, &i).state),
                Ok(CellState::Running)
            ) {
                return most;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Removes what this one has made, all of it.
    ///
    /// # Errors
    /// When the engine does not remove something.
    pub async fn clear(&self) -> Result<(), EngineError> {
        let _nothing_is_made = self.making.lock().await;
        clear(&self.docker, |instance, _| instance == self.settings.instance).await
    }
}

/// Removes what killed ones have left.
pub(super) async fn clear_old(docker: &Docker) -> Result<(), EngineError> {
    let old = jiff::Timestamp::now().as_second() - OLD_SECONDS;
    clear(docker, |instance, made| instance.starts_with(INSTANCE_PREFIX) && made < old).await
}

/// Removes containers and volumes by their instance and the second of their making.
async fn clear(docker: &Docker, is_meant: impl Fn(&str, i64) -> bool) -> Result<(), EngineError> {
    const ATTEMPT: &str = "removing what a trial has made";
    let instance = |labels: &HashMap<String, String>| labels.get(LABEL_INSTANCE).cloned().unwrap_or_default();
    for found in cells::list(docker, vec![LABEL_INSTANCE.to_owned()]).await? {
        let (labels, made) = (found.labels.unwrap_or_default(), found.created.unwrap_or(i64::MAX));
        if let Some(id) = found.id.filter(|_| is_meant(&instance(&labels), made)) {
            let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            match call(ATTEMPT, &id, client::REMOVE, docker.remove_container(&id, Some(options))).await {
                // A conflict is a removal that is under way.
                Ok(()) | Err(EngineError::Absent { .. } | EngineError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    let filters = HashMap::from([("label", vec![LABEL_INSTANCE.to_owned()])]);
    let options = ListVolumesOptionsBuilder::default().filters(&filters).build();
    let volumes = call(ATTEMPT, "volumes", client::INSPECT, docker.list_volumes(Some(options))).await?.volumes;
    for volume in volumes.into_iter().flatten() {
        let made = volume.created_at.as_ref().and_then(|at| at.to_string().parse::<jiff::Timestamp>().ok());
        if is_meant(&instance(&volume.labels), made.map_or(i64::MAX, jiff::Timestamp::as_second)) {
            let options = RemoveVolumeOptionsBuilder::default().build();
            match call(ATTEMPT, &volume.name, client::REMOVE, docker.remove_volume(&volume.name, Some(options))).await {
                Ok(()) | Err(EngineError::Absent { .. } | EngineError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// What the guest is started with.
fn arguments(step: Step) -> Vec<String> {
    let limits = match step {
        Step::Calm => vec![u64::from(RESOURCES.cpu_millis), RESOURCES.tmp_bytes, SHM_INODES],
        Step::Pids => vec![u64::from(RESOURCES.pids)],
        Step::Memory => vec![RESOURCES.memory_bytes],
    };
    let names = [TRIAL, step.name()].map(str::to_owned);
    names.into_iter().chain(limits.iter().map(ToString::to_string)).collect()
}

/// Reads what a guest says until its end. What it says is bounded, and what is no line of a trial is left out.
async fn read(stream: &mut ByteStream) -> Result<Vec<Line>, EngineError> {
    let mut bytes = Vec::new();
    let mut bounded = stream.take(MOST_SAID);
    let reading = bounded.read_to_end(&mut bytes);
    reading
        .await
        .map_err(|e| EngineError::Unexpected { attempt: "reading what a cell says", detail: e.to_string() })?;
    Ok(String::from_utf8_lossy(&bytes).lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// One container's.
#[derive(Debug)]
struct Trial {
    step: Step,
    lines: Vec<Line>,
    mismatches: Vec<String>,
    ended: CellState,
    /// How often the engine has seen it wait for its CPU quota.
    throttled: u64,
}

impl Trial {
    fn add_to(self, found: &mut Found) {
        let (mut begins, mut tried) = (false, Vec::new());
        for line in self.lines {
            match line {
                Line::Begins => begins = true,
                Line::Tried(one) if one.lock == Lock::Cpu.name() => {
                    let seen = format!("{}; the engine saw it throttled {} times", one.seen, self.throttled);
                    tried.push(Tried { held: one.held || self.throttled > 0, seen, ..one });
                }
                Line::Tried(one) => tried.push(one),
                Line::Machine(machine) => found.machine = Some(machine),
                Line::Report(report) => found.report = Some(*report),
            }
        }
        if tried.is_empty() {
            // Some runtimes end all of a cell where a limit is reached.
            let held = begins && matches!(self.ended, CellState::Exited { status, oom } if oom || status == 137);
            let seen = if held { "the whole cell was ended" } else { "the trial came to nothing" };
            let lock = if self.step == Step::Calm { "start" } else { self.step.name() };
            tried.push(Tried { lock: lock.to_owned(), held, seen: format!("{seen} ({:?})", self.ended) });
        }
        found.tried.extend(tried);
        found.mismatches.extend(self.mismatches);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(step: Step, lines: Vec<Line>, ended: CellState) -> Found {
        let mut found = Found::default();
        Trial { step, lines, mismatches: Vec::new(), ended, throttled: 2 }.add_to(&mut found);
        found
    }

    #[test]
    fn a_cell_that_was_killed_while_it_tried_has_met_its_limit() {
        let killed = CellState::Exited { status: 137, oom: true };
        assert!(trial(Step::Memory, vec![Line::Begins], killed).tried[0].held);
        assert!(!trial(Step::Memory, vec![], killed).tried[0].held, "it had not begun");
        let ended = CellState::Exited { status: 0, oom: false };
        let nothing = trial(Step::Pids, vec![Line::Begins], ended).tried;
        assert_eq!((nothing[0].lock.as_str(), nothing[0].held), ("pids", false));
        let tried = Tried { lock: "pids".to_owned(), held: true, seen: String::new() };
        assert_eq!(trial(Step::Pids, vec![Line::Begins, Line::Tried(tried.clone())], ended).tried, [tried]);
        let cpu = Tried { lock: "cpu".to_owned(), held: false, seen: String::new() };
        assert!(trial(Step::Calm, vec![Line::Tried(cpu)], ended).tried[0].held, "the engine saw it throttled");
    }
}
