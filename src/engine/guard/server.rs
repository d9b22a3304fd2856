//! The guard's side: who may connect, one call a connection, and the bytes of cells. It asks an [`Engine`] for what [`Policy`] permits.
//!
//! Every wait on a peer has a limit, a peer that goes away takes its call with it, and what one sends that is no request costs its own connection.

use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::unix::ReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::policy::{Books, Doubt, Policy, Refusal};
use super::protocol::{
    self, Call, Cell, Failure, Happened, MAX_ANSWER, MAX_REQUEST, Request, Seen, VERSION, Workspace,
};
use crate::domain::ids::InstallationId;
use crate::engine::{
    ByteStream, CellName, CellSpec, Engine, EngineError, ImageInfo, Observed, Pull, WorkspaceName, WorkspaceVolume,
};
use crate::task;

/// A request has arrived within this time.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// An answer is taken within this time.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Calls that are under way at an orderly end have this long.
const LAST_CALLS: Duration = Duration::from_secs(10);
/// Connections beside one for each cell's stream.
const CALLS: usize = 256;
/// Bytes of a stream on their way, in each direction.
const PIECE: usize = 32 * 1024;
/// Lists of all cells that are made or told at one time; each is as long as there are cells.
const LISTS: usize = 2;
/// What a connection takes beside its pieces: the engine's end of it, and the tasks.
const CONNECTION_BYTES: usize = 64 * 1024;
/// What a cell takes in a list: the engine's words for it, what is read of them, and the answer.
const LISTED_BYTES: usize = 16 * 1024;
/// What the process takes when nothing is asked of it, code and allocator included.
const OWN_BYTES: usize = 64 * 1024 * 1024;
/// Open files beside those of connections.
const OWN_FILES: usize = 64;
/// How often a peer that is not read from is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// After a connection could not be taken, the next one is tried after this time.
const AGAIN: Duration = Duration::from_millis(100);

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct BindError {
    /// The socket.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// Listens on a socket, whose folder is made if it is missing. With `shared`, the group of this process may connect too, else its user alone.
///
/// # Errors
/// When another guard listens there, or the file can't be made.
pub async fn bind(path: &Path, shared: bool) -> Result<UnixListener, BindError> {
    let failed = |reason: String| BindError { path: path.to_owned(), reason };
    let io_failed = |error: io::Error| failed(error.to_string());
    if let Some(folder) = path.parent() {
        let mode = if shared { 0o750 } else { 0o700 };
        std::fs::DirBuilder::new().recursive(true).mode(mode).create(folder).map_err(io_failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(failed("there is a file, and it is no socket".to_owned()));
        }
        Ok(_) => match UnixStream::connect(path).await {
            Ok(_) => return Err(failed("another guard listens there".to_owned())),
            // One that was killed has left it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(io_failed)?;
            }
            Err(error) => return Err(io_failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(io_failed)?;
    let mode = if shared { 0o660 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(io_failed)?;
    Ok(listener)
}

/// How many connections there may be at once.
fn connections(policy: &Policy) -> u32 {
    u32::try_from(most_connections(policy.cells)).unwrap_or(u32::MAX)
}

/// What a guard may come to need of its machine, whatever is asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Bytes of memory.
    pub memory: usize,
    /// Open files: a peer's and an engine's for each connection.
    pub files: usize,
}

impl Needs {
    /// Of one that permits this many cells.
    #[must_use]
    pub fn of(cells: usize) -> Self {
        let connections = most_connections(cells);
        let requests = protocol::ROOM * protocol::READ_BYTES;
        let memory = OWN_BYTES + requests + connections * (2 * PIECE + CONNECTION_BYTES) + LISTS * cells * LISTED_BYTES;
        Self { memory, files: OWN_FILES + 2 * connections }
    }
}

fn most_connections(cells: usize) -> usize {
    cells.saturating_mul(2).saturating_add(CALLS)
}

/// An engine behind a policy.
pub struct Guard {
    engine: Arc<dyn Engine>,
    policy: RwLock<Arc<Policy>>,
    books: Mutex<Books>,
    connections: Arc<Semaphore>,
    most: AtomicU32,
    /// For requests in hand, in bytes.
    room: Arc<Semaphore>,
    lists: Semaphore,
    /// Held while a workspace is made: how many there are is counted before.
    making_workspaces: Arc<Semaphore>,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("policy", &self.policy()).finish_non_exhaustive()
    }
}

/// A creation that is under way.
struct Making {
    guard: Arc<Guard>,
    name: CellName,
}

impl Drop for Making {
    fn drop(&mut self) {
        self.guard.books().settle(&self.name, Instant::now());
    }
}

impl Guard {
    /// Learns which cells there are, and which images.
    ///
    /// # Errors
    /// When the engine can't list its cells.
    pub async fn new(engine: Arc<dyn Engine>, policy: Policy) -> Result<Self, EngineError> {
        let books = Mutex::new(Books::new(&policy, Instant::now()));
        let most = connections(&policy);
        let guard = Self {
            engine,
            policy: RwLock::new(Arc::new(policy)),
            books,
            connections: Arc::new(Semaphore::new(most as usize)),
            most: AtomicU32::new(most),
            room: Arc::new(Semaphore::new(protocol::ROOM)),
            lists: Semaphore::new(LISTS),
            making_workspaces: Arc::new(Semaphore::new(1)),
        };
        guard.list().await?;
        guard.resolve_all().await;
        Ok(guard)
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Goes on under another policy of the same instance. Cells that are there stay, whatever it says of them.
    pub async fn change(&self, policy: Policy) {
        let most = connections(&policy);
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(policy);
        // Never fewer: those that are open stay.
        let before = self.most.fetch_max(most, Ordering::Relaxed);
        self.connections.add_permits(most.saturating_sub(before) as usize);
        self.resolve_all().await;
    }

    /// Serves those users until it is told to stop, and then ends what was its: streams at once, calls when they are done.
    pub async fn serve(self: Arc<Self>, listener: UnixListener, users: Vec<u32>, stop: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            };
            let user = stream.peer_cred().map(|peer| peer.uid());
            if !user.as_ref().is_ok_and(|user| users.contains(user)) {
                tracing::warn!(?user, ?users, "refused a user that may not call the guard");
                continue;
            }
            let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else {
                tracing::warn!(
                    most = self.most.load(Ordering::Relaxed),
                    "refused a connection: there are as many as permitted"
                );
                continue;
            };
            let (guard, stop) = (Arc::clone(&self), stop.clone());
            task::spawn("guard", async move {
                guard.attend(stream, &stop).await;
                drop(permit);
            });
        }
        drop(listener);
        // Each connection holds a permit.
        let _ =
            tokio::time::timeout(LAST_CALLS, self.connections.acquire_many(self.most.load(Ordering::Relaxed))).await;
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Every change of the books is complete in itself.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn attend(self: &Arc<Self>, mut stream: UnixStream, stop: &CancellationToken) {
        let reading = protocol::read_into_room(&mut stream, MAX_REQUEST, &self.room);
        let request = match tokio::time::timeout(REQUEST_TIME, reading).await {
            Ok(Ok((request, room))) => self.accept(request).map(|call| (call, room)),
            Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                Err(rejected("reading a request", format!("{:.500}", error.to_string())))
            }
            // It went away, or says nothing, or others have said so much that there was no room.
            Ok(Err(_)) | Err(_) => return,
        };
        match request {
            Ok((call, room)) => self.perform(call, room, stream, stop).await,
            Err(error) => {
                tracing::warn!(%error, "refused what is no request");
                let _ = answer::<()>(&mut stream, Err(error)).await;
            }
        }
    }

    fn accept(&self, request: Request) -> Result<Call, EngineError> {
        const ATTEMPT: &str = "calling the guard";
        let Request { version, instance, call } = request;
        if version != VERSION {
            return Err(rejected(
                ATTEMPT,
                format!("it speaks version {VERSION}, the caller {version}: use one build for both"),
            ));
        }
        if instance != self.policy().instance {
            let detail = format!("it works for instance {:?}, the caller for {instance:.40?}", self.policy().instance);
            return Err(rejected(ATTEMPT, format!("{detail}: give both the same engine.instance")));
        }
        Ok(call)
    }

    /// `room` is what the call takes: all others hold it until they are answered.
    async fn perform(
        self: &Arc<Self>,
        call: Call,
        room: OwnedSemaphorePermit,
        stream: UnixStream,
        stop: &CancellationToken,
    ) {
        match call {
            Call::Ensure { cell } => open(stream, holding(room, self.ensure(cell)), stop).await,
            Call::Link { name } => open(stream, holding(room, self.link(name)), stop).await,
            Call::Watch { since_ms } => {
                drop(room);
                self.watch(stream, since_ms, stop).await;
            }
            Call::Info => tell(stream, self.engine.info()).await,
            Call::ResolveImage { reference, pull } => tell(stream, self.resolve_image(&reference, pull)).await,
            Call::Prepare { image } => tell(stream, self.prepare(&image)).await,
            Call::Attest { cell, report } => tell(stream, self.attest(cell, &report)).await,
            Call::Pause { name } => tell(stream, self.pause(name)).await,
            Call::Resume { name } => tell(stream, self.resume(name)).await,
            Call::Remove { name } => tell(stream, self.remove(name)).await,
            Call::Observe { name } => tell(stream, self.observe(name)).await,
            Call::Claim { installation } => tell(stream, self.claim(&installation)).await,
            Call::Release { installation } => tell(stream, self.release(&installation)).await,
            Call::Sweep => tell(stream, self.engine.sweep()).await,
            Call::ListData => tell(stream, self.engine.list_data()).await,
            Call::EnsureWorkspace { workspace } => tell(stream, self.ensure_workspace(workspace)).await,
            Call::RemoveWorkspace { name } => tell(stream, self.remove_workspace(name)).await,
            Call::ListWorkspaces => {
                let _turn = self.lists.acquire().await;
                tell(stream, self.list_workspaces()).await;
            }
            Call::List => {
                // Until it is told; nobody closes it.
                let _turn = self.lists.acquire().await;
                tell(stream, self.list()).await;
            }
        }
    }

    async fn resolve_image(&self, reference: &str, pull: Pull) -> Result<ImageInfo, EngineError> {
        let is_listed = self.policy().lists(reference);
        if !is_listed && !self.books().knows_image(reference) {
            let detail = format!("{reference:.200} is none of the images of the guard's templates");
            let error = rejected("looking for an image", detail);
            tracing::warn!(%error, "refused a call");
            return Err(error);
        }
        let pull = if is_listed && self.policy().pull == Pull::Missing { pull } else { Pull::Never };
        let image = self.engine.resolve_image(reference, pull).await?;
        if is_listed {
            self.books().note_image(&image.id, reference);
        }
        Ok(image)
    }

    /// What each listed reference means now, as far as the engine has it.
    async fn resolve_all(&self) {
        for reference in self.policy().references() {
            if let Ok(image) = self.engine.resolve_image(reference, Pull::Never).await {
                self.books().note_image(&image.id, reference);
            }
        }
    }

    async fn prepare(&self, image: &str) -> Result<(), EngineError> {
        if !self.books().knows_image(image) {
            let what = format!("image {image:.200} among those of the guard's templates");
            return Err(EngineError::Absent { attempt: "preparing the engine", what });
        }
        self.engine.prepare(image).await
    }

    async fn ensure(self: &Arc<Self>, cell: Cell) -> Result<ByteStream, EngineError> {
        let cell = cell.read(&self.policy().instance).ok_or_else(|| foreign("creating a cell"))?;
        self.reserve(&cell).await.inspect_err(|error| tracing::warn!(%error, "refused a cell"))?;
        let making = Making { guard: Arc::clone(self), name: cell.name.clone() };
        // What it makes stays booked until it can be seen.
        to_its_end("creating a cell", async move {
            let made = making.guard.engine.ensure(&cell).await;
            drop(making);
            made
        })
        .await
    }

    /// Takes a place for a cell. The engine is looked at where it may know better, once for each doubt, and only as long as looks are paid for: whoever is
    /// refused costs it nothing else.
    async fn reserve(&self, cell: &CellSpec) -> Result<(), EngineError> {
        let mut looked = None;
        loop {
            let policy = self.policy();
            let reserved = self.books().reserve(&policy, cell, Instant::now());
            let Err(Refusal { error, doubt }) = reserved else { return Ok(()) };
            let Some(doubt) = doubt.filter(|doubt| looked != Some(*doubt)) else { return Err(error) };
            if !self.books().may_look(&policy, Instant::now()) {
                return Err(error);
            }
            match doubt {
                // An earlier guard may have found it.
                Doubt::Images => self.resolve_all().await,
                // Others than us may have removed cells.
                Doubt::Cells => {
                    let _turn = self.lists.acquire().await;
                    self.list().await?;
                }
            }
            looked = Some(doubt);
        }
    }

    async fn link(&self, name: String) -> Result<ByteStream, EngineError> {
        let name = self.own("attaching to a cell", name).await?;
        self.engine.link(&name).await
    }

    async fn attest(&self, cell: Cell, report: &cellblock_wire::link::Report) -> Result<(), EngineError> {
        let cell = cell.read(&self.policy().instance).ok_or_else(|| foreign("attesting a cell"))?;
        self.engine.attest(&cell, report).await
    }

    async fn ensure_workspace(self: &Arc<Self>, workspace: Workspace) -> Result<WorkspaceVolume, EngineError> {
        const ATTEMPT: &str = "making a workspace";
        let policy = self.policy();
        let workspace = workspace.read(&policy.instance).ok_or_else(|| foreign(ATTEMPT))?;
        let admitted = self.books().admit_workspace(&policy, &workspace, Instant::now());
        admitted.inspect_err(|error| tracing::warn!(%error, "refused a workspace"))?;
        let mut turn = None;
        if !self.engine.list_workspaces().await?.contains(&workspace.name) {
            // Nobody closes it.
            turn = Arc::clone(&self.making_workspaces).acquire_owned().await.ok();
            let there = self.engine.list_workspaces().await?;
            if !there.contains(&workspace.name) && there.len() >= policy.workspaces {
                let detail = format!("the guard permits {} workspaces", policy.workspaces);
                return Err(EngineError::Unavailable { attempt: ATTEMPT, detail });
            }
        }
        let engine = Arc::clone(&self.engine);
        let making = async move {
            let made = engine.ensure_workspace(&workspace).await;
            drop(turn);
            made
        };
        to_its_end(ATTEMPT, making).await
    }

    async fn remove_workspace(&self, name: String) -> Result<(), EngineError> {
        let name = protocol::workspace_name(name, &self.policy().instance);
        self.engine.remove_workspace(&name.ok_or_else(|| foreign("removing a workspace"))?).await
    }

    async fn list_workspaces(&self) -> Result<Vec<String>, EngineError> {
        Ok(self.engine.list_workspaces().await?.iter().map(WorkspaceName::to_string).collect())
    }

    async fn pause(&self, name: String) -> Result<(), EngineError> {
        let name = self.own("pausing a cell", name).await?;
        self.engine.pause(&name).await
    }

    async fn resume(&self, name: String) -> Result<(), EngineError> {
        let name = self.own("resuming a cell", name).await?;
        self.engine.resume(&name).await
    }

    async fn remove(&self, name: String) -> Result<(), EngineError> {
        let name = self.own("removing a cell", name).await?;
        if self.books().is_being_made(&name) {
            let detail = "it is being made; it can be removed then".to_owned();
            return Err(EngineError::Unavailable { attempt: "removing a cell", detail });
        }
        self.engine.remove(&name).await?;
        self.books().forget(&name);
        Ok(())
    }

    async fn observe(&self, name: String) -> Result<Option<Seen>, EngineError> {
        let name = self.named("inspecting a cell", name)?;
        Ok(self.engine.observe(&name).await?.as_ref().map(Seen::from))
    }

    async fn claim(&self, installation: &str) -> Result<(), EngineError> {
        self.engine.claim(installation_id(installation)?).await
    }

    async fn release(&self, installation: &str) -> Result<(), EngineError> {
        self.engine.release(installation_id(installation)?).await
    }

    async fn list(&self) -> Result<Vec<Seen>, EngineError> {
        let began = Instant::now();
        let mut listed = self.engine.list().await?;
        // What carries our label under another name is nothing that anybody here could touch.
        listed.retain(|seen: &Observed| seen.name.session(&self.policy().instance).is_some());
        self.books().bring_up_to_date(&listed, began);
        Ok(listed.iter().map(Seen::from).collect())
    }

    async fn watch(&self, mut stream: UnixStream, since_ms: u64, stop: &CancellationToken) {
        let since = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(since_ms));
        let mut events = self.engine.watch_since(since.unwrap_or_else(SystemTime::now));
        if answer(&mut stream, Ok(())).await.is_err() {
            return;
        }
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = gone(&stream) => return,
                () = stop.cancelled() => return,
            };
            let Some(event) = event else { return };
            if event.name.session(&self.policy().instance).is_none() {
                continue;
            }
            let happened = Happened::from(&event);
            let telling = protocol::write(&mut stream, MAX_ANSWER, &happened);
            if !matches!(tokio::time::timeout(ANSWER_TIME, telling).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    fn named(&self, attempt: &'static str, name: String) -> Result<CellName, EngineError> {
        protocol::name(name, &self.policy().instance).ok_or_else(|| foreign(attempt))
    }

    /// A name of ours whose cell, if there is one, carries our label.
    async fn own(&self, attempt: &'static str, name: String) -> Result<CellName, EngineError> {
        let name = self.named(attempt, name)?;
        self.engine.observe(&name).await?;
        Ok(name)
    }
}

fn rejected(attempt: &'static str, detail: String) -> EngineError {
    EngineError::Rejected { attempt, detail }
}

fn foreign(attempt: &'static str) -> EngineError {
    let error = rejected(attempt, "the name is not one of this instance".to_owned());
    tracing::warn!(%error, "refused a call");
    error
}

fn installation_id(text: &str) -> Result<InstallationId, EngineError> {
    text.parse().map_err(|_| rejected("taking the instance's name", "this is no installation's id".to_owned()))
}

/// Does something to its end, whoever waits: the engine goes on too.
async fn to_its_end<T: Send + 'static>(
    attempt: &'static str,
    making: impl Future<Output = Result<T, EngineError>> + Send + 'static,
) -> Result<T, EngineError> {
    let (tell, told) = oneshot::channel();
    task::spawn(attempt, async move { drop(tell.send(making.await)) });
    told.await.unwrap_or_else(|_| Err(EngineError::Unexpected { attempt, detail: "it broke off".to_owned() }))
}

/// What a call takes is free again once it has come to its end.
async fn holding<T>(room: OwnedSemaphorePermit, call: impl Future<Output = T>) -> T {
    let outcome = call.await;
    drop(room);
    outcome
}

/// Answers with what comes out, unless the peer goes away first.
async fn tell<T: Serialize>(mut stream: UnixStream, outcome: impl Future<Output = Result<T, EngineError>>) {
    let outcome = tokio::select! {
        outcome = outcome => outcome,
        () = gone(&stream) => return,
    };
    // Whoever does not take it has gone.
    let _ = answer(&mut stream, outcome).await;
}

/// Answers, and passes a cell's stream on from there.
async fn open(
    mut stream: UnixStream,
    opening: impl Future<Output = Result<ByteStream, EngineError>>,
    stop: &CancellationToken,
) {
    let outcome = tokio::select! {
        outcome = opening => outcome,
        () = gone(&stream) => return,
    };
    match outcome {
        Ok(cell) => {
            if answer(&mut stream, Ok(())).await.is_ok() {
                tokio::select! {
                    () = pass_on(stream, cell) => {}
                    () = stop.cancelled() => {}
                }
            }
        }
        Err(error) => {
            let _ = answer::<()>(&mut stream, Err(error)).await;
        }
    }
}

async fn answer<T: Serialize>(stream: &mut UnixStream, outcome: Result<T, EngineError>) -> io::Result<()> {
    let outcome = outcome.map_err(Failure::from);
    tokio::time::timeout(ANSWER_TIME, protocol::write(stream, MAX_ANSWER, &outcome)).await?
}

/// Waits until the peer has closed its side, or says something where it has to wait.
async fn gone(stream: &UnixStream) {
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

/// Passes bytes on in both directions. The end of what the peer says is passed on too; the end of what the cell says, or of the whole connection, is the end
/// of all: as long as a stream of a cell is open, the engine gives no other.
async fn pass_on(mut peer: UnixStream, cell: ByteStream) {
    let (mut from_peer, mut to_peer) = peer.split();
    let (mut from_cell, mut to_cell) = tokio::io::split(cell);
    tokio::select! {
        () = from_the_cell(&mut from_cell, &mut to_peer) => {}
        () = from_the_peer(&mut from_peer, &mut to_cell) => {}
    }
}

async fn from_the_cell(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) {
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece).await {
            Ok(read) if read > 0 && to.write_all(&piece[..read]).await.is_ok() => {}
            _ => return,
        }
    }
}

async fn from_the_peer(from: &mut ReadHalf<'_>, to: &mut (impl AsyncWrite + Unpin)) {
    let mut piece = vec![0; PIECE];
    loop {
        let Ok(read) = from.read(&mut piece).await else { return };
        if read == 0 {
            let _ = to.shutdown().await;
            return hung_up(from).await;
        }
        let written = async {
            to.write_all(&piece[..read]).await?;
            to.flush().await
        };
        let written = tokio::select! {
            biased;
            written = written => written,
            // A cell that does not read must not keep its stream from the next who asks for it.
            () = hung_up(from) => return,
        };
        if written.is_err() {
            return;
        }
    }
}

/// Waits until the peer has closed the whole connection, which is more than to say nothing any more. Nothing tells of that by itself.
async fn hung_up(stream: &ReadHalf<'_>) {
    loop {
        match stream.ready(Interest::WRITABLE).await {
            Ok(ready) if !ready.is_write_closed() => tokio::time::sleep(LOOK).await,
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer, and the far end of a cell's stream, with a relay between that ends by itself.
    fn relay() -> (UnixStream, tokio::io::DuplexStream, tokio::task::JoinHandle<()>) {
        let (peer, ours) = UnixStream::pair().unwrap();
        let (cell, far) = tokio::io::duplex(1024);
        (peer, far, task::spawn("relay", pass_on(ours, Box::new(cell))))
    }

    #[tokio::test]
    async fn who_has_said_all_still_hears_the_rest() {
        let (mut peer, mut far, relay) = relay();
        peer.write_all(b"question").await.unwrap();
        peer.shutdown().await.unwrap();
        let mut said = Vec::new();
        far.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"question", "the end is passed on");
        let answering = async move {
            far.write_all(&[7; 100_000]).await.unwrap();
            drop(far);
        };
        let mut heard = Vec::new();
        let (read, ()) = tokio::join!(peer.read_to_end(&mut heard), answering);
        read.unwrap();
        assert_eq!(heard.len(), 100_000);
        relay.await.unwrap();
    }

    #[tokio::test]
    async fn who_goes_away_takes_the_cells_stream_along_whatever_is_on_its_way() {
        for (what, shut, stuck) in [("silent", false, false), ("half closed", true, false), ("stuck", false, true)] {
            let (mut peer, far, relay) = relay();
            if shut {
                peer.shutdown().await.unwrap();
            }
            if stuck {
                // More than the cell takes, which reads nothing.
                peer.write_all(&[7; 20_000]).await.unwrap();
            }
            drop(peer);
            let ended = tokio::time::timeout(Duration::from_secs(20), relay).await;
            ended.unwrap_or_else(|_| panic!("{what}: the cell's stream stays open")).unwrap();
            drop(far);
        }
    }
}
