//! An engine without containers: its cells are tasks that speak the link, with a kernel that understands a few words. It keeps the
//! same contract as Docker (`tests/lifecycle.rs` runs the suite on it), and it can be told to fail.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use cellblock::domain::ids::InstallationId;
use cellblock::domain::spec::MIB;
use cellblock::engine::{
    ArchiveStream, ByteStream, CellName, CellSpec, CellState, DataVolume, Engine, EngineError, EngineEvent,
    EngineEventKind, EngineInfo, ImageInfo, Observed, Pull, WorkspaceName, WorkspaceSpec, WorkspaceVolume,
};
use cellblock_wire::frame::{self, Frame};
use cellblock_wire::link::{
    Channel, Event, Hello, KernelDeleted, KernelStarted, Numbered, Outbound, Refusal, Report, StartKernel, Stats,
};
use cellblock_wire::marker::{MARKER_LEN, MarkerScanner, Scanned};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

/// How late events are, where they are.
const LATE: Duration = Duration::from_millis(300);

/// The one image there is.
pub const IMAGE: &str = "fake:latest";

/// What goes wrong, until it is changed.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// `ensure` takes this long.
    pub ensure_takes: Duration,
    /// `ensure` fails after the cell was made.
    pub ensure_fails: bool,
    /// This many pauses fail, after the cell was frozen.
    pub pauses_fail: u32,
    /// This many resumes fail.
    pub resumes_fail: u32,
    /// This many removals fail.
    pub removals_fail: u32,
    /// Attestation finds this.
    pub unverified: bool,
    /// The guest never answers its marker.
    pub guest_silent: bool,
    /// Kernels never connect.
    pub kernel_stalls: bool,
    /// Kernels die while they start.
    pub kernel_dies: bool,
    /// The guests of cells that are made from now on don't answer when a kernel is to be ended.
    pub deaf_to_deletions: bool,
    /// Over links that are opened from now on, events come later than answers.
    pub events_late: bool,
    /// The engine can't be reached.
    pub unreachable: bool,
    /// This many removals of workspaces get no answer.
    pub workspace_removals_fail: u32,
    /// A workspace is made after this time.
    pub workspace_takes: Duration,
}

/// The engine.
pub struct FakeEngine {
    instance: String,
    faults: Arc<Mutex<Faults>>,
    cells: Arc<Mutex<BTreeMap<CellName, Cell>>>,
    holder: Arc<Mutex<Option<InstallationId>>>,
    data: Mutex<BTreeMap<String, DataVolume>>,
    /// Workspaces with their uids.
    workspaces: Mutex<BTreeMap<WorkspaceName, u32>>,
    events: broadcast::Sender<EngineEvent>,
    /// How often each thing was attempted.
    asked: Mutex<BTreeMap<&'static str, usize>>,
}

#[derive(Clone)]
struct Cell {
    spec: CellSpec,
    state: CellState,
    guest: Arc<Guest>,
}

impl FakeEngine {
    /// An engine with nothing on it.
    pub fn new(instance: &str) -> Self {
        let events = broadcast::channel(64).0;
        Self {
            instance: instance.to_owned(),
            faults: Arc::default(),
            cells: Arc::default(),
            holder: Arc::default(),
            data: Mutex::default(),
            workspaces: Mutex::default(),
            events,
            asked: Mutex::default(),
        }
    }

    /// How often this was attempted: `make a cell`, `list`, `find an image`, …
    pub fn asked(&self, attempt: &'static str) -> usize {
        self.asked.lock().unwrap().get(attempt).copied().unwrap_or_default()
    }

    /// Changes what goes wrong.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.faults.lock().unwrap());
    }

    /// Ends a cell's guest behind the engine's back.
    pub fn kill(&self, name: &CellName) {
        if let Some(cell) = self.cells.lock().unwrap().get_mut(name) {
            cell.state = CellState::Exited { status: 137, oom: false };
            cell.guest.stop.cancel();
        }
        self.tell(name, EngineEventKind::Exited);
    }

    /// Freezes a cell behind the control plane's back.
    pub async fn freeze(&self, name: &CellName) {
        self.pause(name).await.unwrap();
    }

    /// Breaks off every link to a cell, whose guest lives on.
    pub fn cut_links(&self, name: &CellName) {
        if let Some(cell) = self.cells.lock().unwrap().get(name) {
            cell.guest.cut.send_modify(|cut| *cut += 1);
        }
    }

    /// The next answers of a cell's guest are lost, and with each its link: what was asked is done.
    pub fn lose_answers(&self, name: &CellName, count: u32) {
        if let Some(cell) = self.cells.lock().unwrap().get(name) {
            cell.guest.state.lock().unwrap().answers_lost = count;
        }
    }

    /// How many answers of it are still to be lost.
    pub fn answers_to_lose(&self, name: &CellName) -> u32 {
        self.cells.lock().unwrap().get(name).map_or(0, |cell| cell.guest.state.lock().unwrap().answers_lost)
    }

    /// What a cell does, if it is there.
    pub fn state(&self, name: &CellName) -> Option<CellState> {
        self.cells.lock().unwrap().get(name).map(|cell| cell.state)
    }

    /// How often a guest was told to begin, which is once for each link, in all cells that are there.
    pub fn links(&self) -> usize {
        self.cells.lock().unwrap().values().map(|c| c.guest.state.lock().unwrap().links).sum()
    }

    fn change(&self, name: &CellName, attempt: &'static str, to: CellState) -> Result<(), EngineError> {
        let mut cells = self.cells.lock().unwrap();
        let cell = cells.get_mut(name).ok_or(EngineError::Absent { attempt, what: name.to_string() })?;
        match cell.state {
            CellState::Running | CellState::Paused => {}
            state => return Err(EngineError::Conflict { attempt, detail: format!("it does not run: {state:?}") }),
        }
        let (frozen, changed) = (to == CellState::Paused, cell.state != to);
        cell.state = to;
        cell.guest.frozen.send_replace(frozen);
        if changed {
            self.tell(name, if frozen { EngineEventKind::Paused } else { EngineEventKind::Resumed });
        }
        Ok(())
    }

    /// Whether a cell has a workspace, other than this one.
    fn has_it(&self, workspace: Option<&WorkspaceName>, but: Option<&CellName>) -> bool {
        let cells = self.cells.lock().unwrap();
        cells.values().any(|cell| cell.spec.workspace.as_ref() == workspace && Some(&cell.spec.name) != but)
    }

    /// Puts a workspace there that nobody knows.
    pub fn leave_workspace(&self, name: WorkspaceName) {
        self.workspaces.lock().unwrap().insert(name, 0);
    }

    /// Takes one from a count of calls that are to fail.
    fn fails(&self, attempt: &'static str, count: impl FnOnce(&mut Faults) -> &mut u32) -> Result<(), EngineError> {
        let mut faults = self.faults.lock().unwrap();
        let count = count(&mut faults);
        if *count == 0 {
            return Ok(());
        }
        *count -= 1;
        Err(EngineError::Unexpected { attempt, detail: "told to fail".to_owned() })
    }

    /// Has the engine show a cell as ended, and say so to nobody; not even its guest notices.
    pub fn end_unheard(&self, name: &CellName) {
        if let Some(cell) = self.cells.lock().unwrap().get_mut(name) {
            cell.state = CellState::Exited { status: 137, oom: false };
        }
    }

    /// The kernels that were started in all cells so far.
    pub fn kernels_started(&self) -> usize {
        self.cells.lock().unwrap().values().map(|c| c.guest.state.lock().unwrap().started).sum()
    }

    fn tell(&self, name: &CellName, kind: EngineEventKind) {
        // Nobody may be watching.
        let _ = self.events.send(EngineEvent { name: name.clone(), kind });
    }

    fn reachable(&self, attempt: &'static str) -> Result<Faults, EngineError> {
        *self.asked.lock().unwrap().entry(attempt).or_default() += 1;
        let faults = self.faults.lock().unwrap().clone();
        if faults.unreachable {
            return Err(EngineError::Unavailable { attempt, detail: "told to fail".to_owned() });
        }
        Ok(faults)
    }

    fn open(&self, name: &CellName, attempt: &'static str) -> Result<ByteStream, EngineError> {
        let cells = self.cells.lock().unwrap();
        let cell = cells.get(name).ok_or(EngineError::Absent { attempt, what: name.to_string() })?;
        if cell.state != CellState::Running {
            return Err(EngineError::Conflict { attempt, detail: "it does not run".to_owned() });
        }
        let (ours, theirs) = tokio::io::duplex(256 * 1024);
        let (guest, faults) = (Arc::clone(&cell.guest), self.faults.lock().unwrap().clone());
        cellblock::task::spawn("guest", async move {
            let (stop, mut cut) = (guest.stop.clone(), guest.cut.subscribe());
            tokio::select! {
                () = stop.cancelled() => {}
                Ok(()) = cut.changed() => {}
                () = serve(guest, theirs, faults) => {}
            }
        });
        Ok(Box::new(ours))
    }
}

#[async_trait]
impl Engine for FakeEngine {
    async fn info(&self) -> Result<EngineInfo, EngineError> {
        self.reachable("ask")?;
        Ok(EngineInfo { version: "fake".to_owned(), cpus: 2, memory_bytes: 1024 * MIB })
    }

    async fn resolve_image(&self, reference: &str, _pull: Pull) -> Result<ImageInfo, EngineError> {
        self.reachable("find an image")?;
        if reference != IMAGE && reference != "sha256:fake" {
            return Err(EngineError::Absent { attempt: "find an image", what: reference.to_owned() });
        }
        Ok(ImageInfo {
            id: "sha256:fake".to_owned(),
            reference: reference.to_owned(),
            size_bytes: 1,
            labels: BTreeMap::new(),
        })
    }

    async fn prepare(&self, _image: &str) -> Result<(), EngineError> {
        self.reachable("prepare").map(drop)
    }

    async fn ensure(&self, spec: &CellSpec) -> Result<ByteStream, EngineError> {
        let attempt = "make a cell";
        let faults = self.reachable(attempt)?;
        if spec.image != "sha256:fake" {
            return Err(EngineError::Absent { attempt, what: spec.image.clone() });
        }
        if let Some(mount) = spec.data.iter().find(|mount| !self.data.lock().unwrap().contains_key(&mount.name)) {
            return Err(EngineError::Absent { attempt, what: mount.to_string() });
        }
        if let Some(name) = spec.workspace.as_ref().filter(|name| !self.workspaces.lock().unwrap().contains_key(name)) {
            return Err(EngineError::Absent { attempt, what: name.to_string() });
        }
        if spec.workspace.is_some() && self.has_it(spec.workspace.as_ref(), Some(&spec.name)) {
            return Err(EngineError::Conflict { attempt, detail: "another cell has the workspace".to_owned() });
        }
        tokio::time::sleep(faults.ensure_takes).await;
        {
            let mut cells = self.cells.lock().unwrap();
            let cell = cells.entry(spec.name.clone()).or_insert_with(|| {
                self.tell(&spec.name, EngineEventKind::Created);
                let guest = Arc::<Guest>::default();
                guest.state.lock().unwrap().deaf_to_deletions = faults.deaf_to_deletions;
                Cell { spec: spec.clone(), state: CellState::Running, guest }
            });
            if cell.spec != *spec {
                return Err(EngineError::Conflict { attempt, detail: "made from another specification".to_owned() });
            }
        }
        if faults.ensure_fails {
            return Err(EngineError::TimedOut { attempt, limit: faults.ensure_takes });
        }
        self.open(&spec.name, attempt)
    }

    async fn link(&self, name: &CellName) -> Result<ByteStream, EngineError> {
        self.reachable("link")?;
        self.open(name, "link")
    }

    async fn attest(&self, _cell: &CellSpec, _report: &Report) -> Result<(), EngineError> {
        let faults = self.reachable("attest")?;
        if faults.unverified {
            return Err(EngineError::Unverified { mismatches: vec!["told to".to_owned()] });
        }
        Ok(())
    }

    async fn pause(&self, name: &CellName) -> Result<(), EngineError> {
        self.reachable("pause")?;
        self.change(name, "pause", CellState::Paused)?;
        self.fails("pause", |faults| &mut faults.pauses_fail)
    }

    async fn resume(&self, name: &CellName) -> Result<(), EngineError> {
        self.reachable("resume")?;
        self.fails("resume", |faults| &mut faults.resumes_fail)?;
        self.change(name, "resume", CellState::Running)
    }

    async fn remove(&self, name: &CellName) -> Result<(), EngineError> {
        self.reachable("remove")?;
        self.fails("remove", |faults| &mut faults.removals_fail)?;
        if let Some(cell) = self.cells.lock().unwrap().remove(name) {
            cell.guest.stop.cancel();
            self.tell(name, EngineEventKind::Exited);
            self.tell(name, EngineEventKind::Removed);
        }
        Ok(())
    }

    async fn observe(&self, name: &CellName) -> Result<Option<Observed>, EngineError> {
        Ok(self.list().await?.into_iter().find(|seen| seen.name == *name))
    }

    async fn claim(&self, installation: InstallationId) -> Result<(), EngineError> {
        self.reachable("claim")?;
        let holder = *self.holder.lock().unwrap().get_or_insert(installation);
        if holder == installation {
            return Ok(());
        }
        Err(EngineError::Claimed { holder: Some(holder), remedy: "forget it".to_owned() })
    }

    async fn release(&self, installation: InstallationId) -> Result<(), EngineError> {
        self.reachable("release")?;
        self.holder.lock().unwrap().take_if(|holder| *holder == installation);
        Ok(())
    }

    async fn sweep(&self) -> Result<Vec<String>, EngineError> {
        self.reachable("sweep")?;
        Ok(vec![])
    }

    async fn import_data(&self, name: &str, _: &str, mut archive: ArchiveStream) -> Result<DataVolume, EngineError> {
        let attempt = "import data";
        self.reachable(attempt)?;
        cellblock::domain::data::check_name(name).map_err(|detail| EngineError::Rejected { attempt, detail })?;
        let mut bytes = 0;
        while let Some(piece) = archive.next().await {
            let piece = piece.map_err(|e| EngineError::Unavailable { attempt, detail: e.to_string() })?;
            bytes += piece.len() as u64;
        }
        let version = uuid::Uuid::new_v4().to_string();
        let volume = DataVolume { name: name.to_owned(), version, bytes, sha256: String::new() };
        self.data.lock().unwrap().insert(name.to_owned(), volume.clone());
        Ok(volume)
    }

    async fn list_data(&self) -> Result<Vec<DataVolume>, EngineError> {
        self.reachable("list data")?;
        Ok(self.data.lock().unwrap().values().cloned().collect())
    }

    async fn remove_data(&self, name: &str) -> Result<(), EngineError> {
        let attempt = "remove data";
        self.reachable(attempt)?;
        let removed = self.data.lock().unwrap().remove(name);
        removed.map(drop).ok_or_else(|| EngineError::Absent { attempt, what: name.to_owned() })
    }

    async fn ensure_workspace(&self, workspace: &WorkspaceSpec) -> Result<WorkspaceVolume, EngineError> {
        let attempt = "make a workspace";
        let faults = self.reachable(attempt)?;
        if workspace.name.id(&self.instance).is_none() {
            return Err(EngineError::Rejected { attempt, detail: "it is another instance's".to_owned() });
        }
        tokio::time::sleep(faults.workspace_takes).await;
        let mut workspaces = self.workspaces.lock().unwrap();
        let uid = 1 + u32::try_from(workspaces.len()).unwrap();
        let is_new = !workspaces.contains_key(&workspace.name);
        let uid = *workspaces.entry(workspace.name.clone()).or_insert(uid);
        Ok(WorkspaceVolume { uid, is_new })
    }

    async fn remove_workspace(&self, name: &WorkspaceName) -> Result<(), EngineError> {
        let attempt = "remove a workspace";
        self.reachable(attempt)?;
        let fails = self.fails(attempt, |faults| &mut faults.workspace_removals_fail);
        fails.map_err(|_| EngineError::TimedOut { attempt, limit: Duration::ZERO })?;
        if name.id(&self.instance).is_none() {
            return Err(EngineError::Rejected { attempt, detail: "it is another instance's".to_owned() });
        }
        if self.has_it(Some(name), None) {
            return Err(EngineError::Conflict { attempt, detail: "a cell has it".to_owned() });
        }
        self.workspaces.lock().unwrap().remove(name);
        Ok(())
    }

    async fn list_workspaces(&self) -> Result<Vec<WorkspaceName>, EngineError> {
        self.reachable("list workspaces")?;
        Ok(self.workspaces.lock().unwrap().keys().cloned().collect())
    }

    async fn list(&self) -> Result<Vec<Observed>, EngineError> {
        self.reachable("list")?;
        let cells = self.cells.lock().unwrap();
        Ok(cells
            .values()
            .map(|c| Observed {
                name: c.spec.name.clone(),
                session: Some(c.spec.session),
                state: c.state,
                promised: Some((&c.spec.resources).into()),
            })
            .collect())
    }

    fn watch_since(&self, _since: SystemTime) -> BoxStream<'static, EngineEvent> {
        tokio_stream::wrappers::BroadcastStream::new(self.events.subscribe()).filter_map(|e| async { e.ok() }).boxed()
    }
}

/// A guest, as far as a control plane can tell.
struct Guest {
    state: Mutex<GuestState>,
    newest: watch::Sender<u64>,
    frozen: watch::Sender<bool>,
    /// Changes when all links are to break off.
    cut: watch::Sender<u32>,
    stop: CancellationToken,
}

#[derive(Default)]
struct GuestState {
    links: usize,
    log: VecDeque<(Numbered, Vec<Bytes>)>,
    kernels: BTreeMap<String, Kernel>,
    started: usize,
    answers_lost: u32,
    deaf_to_deletions: bool,
}

#[derive(Default)]
struct Kernel {
    count: u64,
    /// The header of what runs without end, and whether it heeds interrupts.
    hanging: Option<(Bytes, bool)>,
    /// It does what it is interrupted for, and never says so.
    mute: bool,
    /// It has ended, and takes nothing more.
    is_over: bool,
    /// The ids of the messages that it was sent.
    seen: BTreeSet<String>,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            newest: watch::Sender::new(0),
            frozen: watch::Sender::new(false),
            cut: watch::Sender::new(0),
            stop: CancellationToken::new(),
        }
    }
}

async fn serve(guest: Arc<Guest>, mut stream: DuplexStream, faults: Faults) {
    let mut scanner = MarkerScanner::default();
    let mut buffer = [0; MARKER_LEN];
    loop {
        let Ok(read @ 1..) = stream.read(&mut buffer).await else { return };
        let pieces = scanner.push(&buffer[..read], |_| true);
        if let Some(Scanned::Marker(marker)) = pieces.into_iter().next_back() {
            if faults.guest_silent {
                return std::future::pending().await;
            }
            if stream.write_all(&marker.to_bytes()).await.is_err() {
                return;
            }
            break;
        }
    }
    let service = hyper::service::service_fn(move |request| {
        let (guest, faults) = (Arc::clone(&guest), faults.clone());
        async move { Ok::<_, Infallible>(answer(&guest, &faults, request).await) }
    });
    let _ = hyper::server::conn::http2::Builder::new(cellblock::task::Executor)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

async fn answer(guest: &Arc<Guest>, faults: &Faults, request: Request<Incoming>) -> Answer {
    let is_an_order = request.method() != "GET" && request.uri().path().starts_with("/kernels");
    let answer = answer_heard(guest, faults, request).await;
    let is_lost = is_an_order && {
        let mut state = guest.state.lock().unwrap();
        let is_lost = state.answers_lost > 0;
        state.answers_lost -= u32::from(is_lost);
        is_lost
    };
    if is_lost {
        guest.cut.send_modify(|cut| *cut += 1);
        return std::future::pending().await;
    }
    answer
}

async fn answer_heard(guest: &Arc<Guest>, faults: &Faults, request: Request<Incoming>) -> Answer {
    // What is frozen answers nothing.
    let _ = guest.frozen.subscribe().wait_for(|frozen| !frozen).await;
    let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
    if path == "/events" {
        let after =
            request.uri().query().and_then(|q| q.strip_prefix("after=")).and_then(|n| n.parse().ok()).unwrap_or(0);
        return events(Arc::clone(guest), after, if faults.events_late { LATE } else { Duration::ZERO });
    }
    let body = request.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match (method.as_str(), parts.as_slice()) {
        ("POST", ["init"]) => {
            guest.state.lock().unwrap().links += 1;
            json_answer(&Hello { generation: 1, version: "fake".to_owned(), last_seq: 0 })
        }
        ("GET", ["stats"]) => json_answer(&Stats::default()),
        ("GET", ["report"]) => json_answer(&Report::default()),
        ("GET", ["kernels"]) => json_answer(&guest.state.lock().unwrap().kernels.keys().collect::<Vec<_>>()),
        ("POST", ["kernels"]) => {
            let start: StartKernel = serde_json::from_slice(&body).unwrap();
            if !guest.state.lock().unwrap().kernels.contains_key(&start.kernel) {
                guest.start(&start.kernel, faults);
            }
            let [kernelspec, language, display_name] = ["fake", "fake", "Fake"].map(str::to_owned);
            json_answer(&KernelStarted { kernelspec, language, display_name })
        }
        ("POST", ["kernels", kernel, "messages"]) => {
            let mut decoder = frame::Decoder::default();
            decoder.push(&body);
            let frame: Frame<Outbound> = decoder.next_frame().unwrap().unwrap();
            guest.take(kernel, &frame)
        }
        ("DELETE", ["kernels", kernel]) => {
            let is_deaf = guest.state.lock().unwrap().deaf_to_deletions;
            if is_deaf {
                return std::future::pending().await;
            }
            match guest.state.lock().unwrap().kernels.remove(*kernel) {
                Some(_) => json_answer(&KernelDeleted::default()),
                None => refuse("not-found"),
            }
        }
        ("POST", ["ack" | "kernels", ..]) => empty(),
        _ => refuse("not-found"),
    }
}

impl Guest {
    fn tell(&self, kernel: &str, event: Event, parts: Vec<Bytes>) {
        let mut state = self.state.lock().unwrap();
        let seq = state.log.back().map_or(0, |(n, _)| n.seq) + 1;
        state.log.push_back((Numbered { seq, kernel: kernel.to_owned(), event }, parts));
        drop(state);
        self.newest.send_replace(seq);
    }

    fn start(&self, kernel: &str, faults: &Faults) {
        {
            let mut state = self.state.lock().unwrap();
            state.kernels.insert(kernel.to_owned(), Kernel::default());
            state.started += 1;
        }
        if faults.kernel_dies {
            self.exit(kernel, 3);
        } else if !faults.kernel_stalls {
            self.tell(kernel, Event::KernelConnected, vec![]);
        }
    }

    fn exit(&self, kernel: &str, status: i32) {
        if let Some(kernel) = self.state.lock().unwrap().kernels.get_mut(kernel) {
            kernel.is_over = true;
        }
        let stderr_tail = "the last words".to_owned();
        self.tell(
            kernel,
            Event::KernelExited { status: Some(status), signal: None, oom_kills: 0, swept: false, stderr_tail },
            vec![],
        );
    }

    fn take(&self, kernel: &str, frame: &Frame<Outbound>) -> Answer {
        let is_new = self
            .state
            .lock()
            .unwrap()
            .kernels
            .get_mut(kernel)
            .filter(|k| !k.is_over)
            .map(|k| k.seen.insert(frame.head.msg_id.clone()));
        match is_new {
            None => return refuse("not-found"),
            Some(false) => return refuse("exists"),
            Some(true) => {}
        }
        let header: Value = serde_json::from_slice(&frame.parts[0]).unwrap();
        let content: Value = serde_json::from_slice(&frame.parts[3]).unwrap();
        match header["msg_type"].as_str().unwrap() {
            "kernel_info_request" => {
                self.say(kernel, &frame.parts[0], Channel::Iopub, "status", &json!({"execution_state": "busy"}));
                let info = json!({"language_info": {"name": "fake"}});
                self.say(kernel, &frame.parts[0], Channel::Shell, "kernel_info_reply", &info);
            }
            "interrupt_request" => {
                self.interrupt(kernel);
                if self.state.lock().unwrap().kernels.get(kernel).is_some_and(|kernel| kernel.mute) {
                    return empty();
                }
                self.say(kernel, &frame.parts[0], Channel::Control, "interrupt_reply", &json!({"status": "ok"}));
            }
            "execute_request" => self.execute(kernel, &frame.parts[0], content["code"].as_str().unwrap()),
            _ => {}
        }
        empty()
    }

    /// The kernel's language: `print X`, `hang`, `hang hard`, `hang mute`, `die`, `raise`, `leave` (as `exit()` does), and `hello` whose value is 1.
    fn execute(&self, kernel: &str, parent: &Bytes, code: &str) {
        self.say(kernel, parent, Channel::Iopub, "status", &json!({"execution_state": "busy"}));
        let word = code.split(' ').next().unwrap_or_default();
        match word {
            "hang" => {
                let heeds = code != "hang hard";
                let mut state = self.state.lock().unwrap();
                let kernel = state.kernels.entry(kernel.to_owned()).or_default();
                (kernel.hanging, kernel.mute) = (Some((parent.clone(), heeds)), code == "hang mute");
                return;
            }
            "die" => return self.exit(kernel, 3),
            "print" => {
                self.say(kernel, parent, Channel::Iopub, "stream", &json!({"name": "stdout", "text": &code[6..]}))
            }
            "raise" => return self.finish(kernel, parent, "Error"),
            "leave" => return self.leave(kernel, parent),
            "foreign" => {
                let other = Bytes::from(json!({"msg_id": "another"}).to_string());
                self.say(kernel, &other, Channel::Iopub, "stream", &json!({"name": "stdout", "text": "not yours"}));
            }
            _ => {
                let data = json!({"data": {"text/plain": "1"}, "metadata": {}, "execution_count": 1});
                self.say(kernel, parent, Channel::Iopub, "execute_result", &data);
            }
        }
        self.finish(kernel, parent, "");
    }

    /// Says that it is going, and takes whatever comes next to its grave.
    fn leave(&self, kernel: &str, parent: &Bytes) {
        let payload = json!([{"source": "ask_exit", "keepkernel": false}]);
        let reply = json!({"status": "ok", "execution_count": 1, "payload": payload});
        self.say(kernel, parent, Channel::Shell, "execute_reply", &reply);
        self.say(kernel, parent, Channel::Iopub, "status", &json!({"execution_state": "idle"}));
    }

    fn interrupt(&self, kernel: &str) {
        let hanging = {
            let mut state = self.state.lock().unwrap();
            let kernel = state.kernels.entry(kernel.to_owned()).or_default();
            kernel.hanging.take_if(|(_, heeds)| *heeds)
        };
        if let Some((parent, _)) = hanging {
            self.finish(kernel, &parent, "KeyboardInterrupt");
        }
    }

    fn finish(&self, kernel: &str, parent: &Bytes, error: &str) {
        let count = {
            let mut state = self.state.lock().unwrap();
            let kernel = state.kernels.entry(kernel.to_owned()).or_default();
            kernel.count += 1;
            kernel.count
        };
        let reply = match error {
            "" => json!({"status": "ok", "execution_count": count}),
            name => json!({"status": "error", "execution_count": count, "ename": name, "evalue": "", "traceback": []}),
        };
        self.say(kernel, parent, Channel::Shell, "execute_reply", &reply);
        self.say(kernel, parent, Channel::Iopub, "status", &json!({"execution_state": "idle"}));
    }

    fn say(&self, kernel: &str, parent: &Bytes, channel: Channel, msg_type: &str, content: &Value) {
        let parent_id = serde_json::from_slice::<Value>(parent).unwrap()["msg_id"].as_str().unwrap().to_owned();
        let parts = ["{}", "{}", "{}", &content.to_string()].map(|p| Bytes::from(p.to_owned())).to_vec();
        self.tell(kernel, Event::Message { channel, msg_type: msg_type.to_owned(), parent_id }, parts);
    }
}

fn events(guest: Arc<Guest>, after: u64, late: Duration) -> Answer {
    let newest = guest.newest.subscribe();
    let frames = futures_util::stream::unfold((guest, newest, after), move |(guest, mut newest, mut seq)| async move {
        tokio::time::sleep(late).await;
        loop {
            let _ = guest.frozen.subscribe().wait_for(|frozen| !frozen).await;
            newest.mark_unchanged();
            let (mut bytes, mut last) = (BytesMut::new(), seq);
            for (head, parts) in guest.state.lock().unwrap().log.iter().filter(|(n, _)| n.seq > seq) {
                frame::encode(head, parts, &mut bytes).unwrap();
                last = head.seq;
            }
            if !bytes.is_empty() {
                seq = last;
                let frame = Ok::<_, Infallible>(hyper::body::Frame::data(bytes.freeze()));
                return Some((frame, (guest, newest, seq)));
            }
            newest.changed().await.ok()?;
        }
    });
    Response::new(UnsyncBoxBody::new(StreamBody::new(frames.boxed())))
}

fn json_answer<T: serde::Serialize>(body: &T) -> Answer {
    Response::new(UnsyncBoxBody::new(Full::new(Bytes::from(serde_json::to_vec(body).unwrap()))))
}

fn empty() -> Answer {
    status(StatusCode::NO_CONTENT, Bytes::new())
}

fn refuse(code: &str) -> Answer {
    let refusal = Refusal { code: code.to_owned(), message: "told to".to_owned(), number: None };
    status(StatusCode::NOT_FOUND, Bytes::from(serde_json::to_vec(&refusal).unwrap()))
}

fn status(status: StatusCode, body: Bytes) -> Answer {
    let mut response = Response::new(UnsyncBoxBody::new(Full::new(body)));
    *response.status_mut() = status;
    response
}
