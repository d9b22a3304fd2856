//! The control plane's side: an [`Engine`] whose every call is a message to a guard. It holds no engine, and no connection between calls.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use cellblock_wire::link::Report;
use futures_util::stream::{self, BoxStream, StreamExt};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::protocol::{
    self, Call, Cell, Failure, Happened, MAX_ANSWER, MAX_REQUEST, Request, Seen, VERSION, Workspace,
};
use crate::domain::ids::InstallationId;
use crate::engine::{
    ArchiveStream, ByteStream, CellName, CellSpec, DataVolume, Engine, EngineError, EngineEvent, EngineInfo, ImageInfo,
    Observed, Pull, WorkspaceName, WorkspaceSpec, WorkspaceVolume,
};

// The guard has limits of its own for each step, below these.
/// A look at something.
const LOOK: Duration = Duration::from_secs(12);
/// A change of something.
const CHANGE: Duration = Duration::from_secs(45);
/// Making a cell, which may have to wait for others, and filling the guest's volume.
const MAKE: Duration = Duration::from_secs(180);
/// A pull.
const PULL: Duration = Duration::from_secs(31 * 60);

/// A stream of events that breaks off is taken up again this much earlier.
const OVERLAP: Duration = Duration::from_secs(2);
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A guard's engine.
#[derive(Debug, Clone)]
pub struct GuardEngine {
    socket: PathBuf,
    instance: String,
}

impl GuardEngine {
    /// Asks the guard at this socket whether it works for this instance, and whether its engine answers.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`] when nothing answers there; [`EngineError::Rejected`] when the guard is another instance's or another version.
    pub async fn connect(socket: PathBuf, instance: &str) -> Result<Self, EngineError> {
        let engine = Self { socket, instance: instance.to_owned() };
        engine.info().await?;
        Ok(engine)
    }

    /// One call. Behind the answer the connection is whatever the call makes it.
    async fn open<T: DeserializeOwned>(
        &self,
        attempt: &'static str,
        limit: Duration,
        call: Call,
    ) -> Result<(T, UnixStream), EngineError> {
        let request = Request { version: VERSION, instance: self.instance.clone(), call };
        let exchange = async {
            let mut stream = UnixStream::connect(&self.socket).await?;
            protocol::write(&mut stream, MAX_REQUEST, &request).await?;
            let answer: Result<T, Failure> = protocol::read(&mut stream, MAX_ANSWER).await?;
            Ok((answer, stream))
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(Ok((Ok(answer), stream))) => Ok((answer, stream)),
            Ok(Ok((Err(failure), _))) => Err(failure.read(attempt)),
            Ok(Err(error)) => Err(self.broken(attempt, &error)),
            Err(_) => Err(EngineError::TimedOut { attempt, limit }),
        }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        attempt: &'static str,
        limit: Duration,
        call: Call,
    ) -> Result<T, EngineError> {
        Ok(self.open(attempt, limit, call).await?.0)
    }

    async fn stream(&self, attempt: &'static str, limit: Duration, call: Call) -> Result<ByteStream, EngineError> {
        let ((), stream) = self.open(attempt, limit, call).await?;
        Ok(Box::new(stream))
    }

    fn broken(&self, attempt: &'static str, error: &io::Error) -> EngineError {
        let guard = format!("the guard at {}", self.socket.display());
        match error.kind() {
            io::ErrorKind::InvalidData => EngineError::Unexpected {
                attempt,
                detail: format!("what was said with {guard} is no message: {error}"),
            },
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                let detail = format!("{guard} has closed the connection; its log says why, unless it has ended");
                EngineError::Unavailable { attempt, detail }
            }
            _ => EngineError::Unavailable { attempt, detail: format!("{guard}: {error}") },
        }
    }

    async fn open_watch(&self, since: SystemTime) -> Result<UnixStream, EngineError> {
        let since = since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let since_ms = u64::try_from(since.as_millis()).unwrap_or_default();
        Ok(self.open::<()>("watching cells", LOOK, Call::Watch { since_ms }).await?.1)
    }
}

/// What an operator does where the engine is. Who has only a guard can't say what cells find in themselves.
fn not_here(attempt: &'static str) -> EngineError {
    let detail = "a guard takes no part in it: run this where the guard's own configuration is, which names the engine";
    EngineError::Rejected { attempt, detail: detail.to_owned() }
}

struct Watch {
    engine: GuardEngine,
    stream: Option<UnixStream>,
    /// What happened before was told.
    since: SystemTime,
    pause: Option<Duration>,
}

impl Watch {
    async fn next(&mut self) -> EngineEvent {
        loop {
            let stream = match &mut self.stream {
                Some(stream) => stream,
                None => {
                    if let Some(pause) = self.pause {
                        tokio::time::sleep(pause).await;
                    }
                    match self.engine.open_watch(self.since).await {
                        Ok(stream) => self.stream.insert(stream),
                        Err(error) => {
                            self.reopen_later(&error.to_string());
                            continue;
                        }
                    }
                }
            };
            match protocol::read::<Happened>(stream, MAX_ANSWER).await {
                Ok(happened) => {
                    self.pause = None;
                    if let Some(event) = happened.read(&self.engine.instance) {
                        return event;
                    }
                }
                Err(error) => self.reopen_later(&error.to_string()),
            }
        }
    }

    fn reopen_later(&mut self, why: &str) {
        let pause = self.pause.map_or(SHORTEST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
        tracing::debug!(why, ?pause, "the guard's event stream broke off");
        self.pause = Some(pause);
        if self.stream.take().is_some() {
            // A little is told twice, and nothing is lost.
            self.since = self.since.max(SystemTime::now() - OVERLAP);
        }
    }
}

#[async_trait]
impl Engine for GuardEngine {
    async fn info(&self) -> Result<EngineInfo, EngineError> {
        self.call("asking the engine about itself", LOOK, Call::Info).await
    }

    async fn resolve_image(&self, reference: &str, pull: Pull) -> Result<ImageInfo, EngineError> {
        let limit = if pull == Pull::Never { LOOK } else { PULL };
        self.call("looking for an image", limit, Call::ResolveImage { reference: reference.to_owned(), pull }).await
    }

    async fn prepare(&self, image: &str) -> Result<(), EngineError> {
        self.call("preparing the engine", MAKE, Call::Prepare { image: image.to_owned() }).await
    }

    async fn ensure(&self, cell: &CellSpec) -> Result<ByteStream, EngineError> {
        self.stream("creating a cell", MAKE, Call::Ensure { cell: Cell::from(cell) }).await
    }

    async fn link(&self, name: &CellName) -> Result<ByteStream, EngineError> {
        self.stream("attaching to a cell", CHANGE, Call::Link { name: name.to_string() }).await
    }

    async fn attest(&self, cell: &CellSpec, report: &Report) -> Result<(), EngineError> {
        let report = Box::new(report.clone());
        self.call("attesting a cell", CHANGE, Call::Attest { cell: Cell::from(cell), report }).await
    }

    async fn pause(&self, name: &CellName) -> Result<(), EngineError> {
        self.call("pausing a cell", CHANGE, Call::Pause { name: name.to_string() }).await
    }

    async fn resume(&self, name: &CellName) -> Result<(), EngineError> {
        self.call("resuming a cell", CHANGE, Call::Resume { name: name.to_string() }).await
    }

    async fn remove(&self, name: &CellName) -> Result<(), EngineError> {
        self.call("removing a cell", CHANGE, Call::Remove { name: name.to_string() }).await
    }

    async fn observe(&self, name: &CellName) -> Result<Option<Observed>, EngineError> {
        const ATTEMPT: &str = "inspecting a cell";
        let seen: Option<Seen> = self.call(ATTEMPT, LOOK, Call::Observe { name: name.to_string() }).await?;
        let Some(seen) = seen else { return Ok(None) };
        let read = seen.read(&self.instance).filter(|seen| seen.name == *name);
        let another =
            || EngineError::Unexpected { attempt: ATTEMPT, detail: "the guard told of another cell".to_owned() };
        Ok(Some(read.ok_or_else(another)?))
    }

    async fn claim(&self, installation: InstallationId) -> Result<(), EngineError> {
        let installation = installation.to_string();
        self.call("taking the instance's name", CHANGE, Call::Claim { installation }).await
    }

    async fn release(&self, installation: InstallationId) -> Result<(), EngineError> {
        let installation = installation.to_string();
        self.call("giving the instance's name back", CHANGE, Call::Release { installation }).await
    }

    async fn sweep(&self) -> Result<Vec<String>, EngineError> {
        self.call("removing what earlier versions have left", MAKE, Call::Sweep).await
    }

    async fn import_data(&self, _: &str, _: &str, _: ArchiveStream) -> Result<DataVolume, EngineError> {
        Err(not_here("importing data"))
    }

    async fn list_data(&self) -> Result<Vec<DataVolume>, EngineError> {
        self.call("listing data", LOOK, Call::ListData).await
    }

    async fn remove_data(&self, _: &str) -> Result<(), EngineError> {
        Err(not_here("removing data"))
    }

    async fn ensure_workspace(&self, workspace: &WorkspaceSpec) -> Result<WorkspaceVolume, EngineError> {
        let workspace = Workspace::from(workspace);
        self.call("making a workspace", MAKE, Call::EnsureWorkspace { workspace }).await
    }

    async fn remove_workspace(&self, name: &WorkspaceName) -> Result<(), EngineError> {
        self.call("removing a workspace", CHANGE, Call::RemoveWorkspace { name: name.to_string() }).await
    }

    async fn list_workspaces(&self) -> Result<Vec<WorkspaceName>, EngineError> {
        let names: Vec<String> = self.call("listing workspaces", LOOK, Call::ListWorkspaces).await?;
        Ok(names.into_iter().filter_map(|name| protocol::workspace_name(name, &self.instance)).collect())
    }

    async fn list(&self) -> Result<Vec<Observed>, EngineError> {
        let seen: Vec<Seen> = self.call("listing cells", CHANGE, Call::List).await?;
        Ok(seen.into_iter().filter_map(|seen| seen.read(&self.instance)).collect())
    }

    fn watch_since(&self, since: SystemTime) -> BoxStream<'static, EngineEvent> {
        let watch = Watch { engine: self.clone(), stream: None, since, pause: None };
        stream::unfold(watch, |mut watch| async move {
            let event = watch.next().await;
            Some((event, watch))
        })
        .boxed()
    }
}
