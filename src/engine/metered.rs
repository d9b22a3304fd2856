//! Counts the calls to any engine, and the bytes of its cells' streams. It changes nothing of what the engine says.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Instant, SystemTime};

use async_trait::async_trait;
use cellblock_wire::link::Report;
use futures_util::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    ArchiveStream, ByteStream, CellName, CellSpec, DataVolume, Engine, EngineError, EngineEvent, EngineInfo, ImageInfo,
    Observed, Pull, WorkspaceName, WorkspaceSpec, WorkspaceVolume,
};
use crate::domain::ids::InstallationId;
use crate::metrics::Metrics;

/// An engine whose calls are counted.
pub struct Metered {
    engine: Arc<dyn Engine>,
    metrics: Metrics,
}

impl Metered {
    /// Counts the calls to `engine`.
    pub fn new(engine: Arc<dyn Engine>, metrics: Metrics) -> Self {
        Self { engine, metrics }
    }

    async fn count<T>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        let began = Instant::now();
        let outcome = call.await;
        let result = outcome.as_ref().err().map_or("ok", EngineError::word);
        self.metrics.engine_called(operation, result, began.elapsed());
        outcome
    }

    fn counted(&self, stream: ByteStream) -> ByteStream {
        Box::new(Counted { stream, metrics: self.metrics.clone() })
    }
}

impl EngineError {
    /// A word for its kind.
    fn word(&self) -> &'static str {
        match self {
            Self::Absent { .. } => "absent",
            Self::Conflict { .. } => "conflict",
            Self::Rejected { .. } => "rejected",
            Self::Unavailable { .. } => "unavailable",
            Self::TimedOut { .. } => "timed_out",
            Self::Claimed { .. } => "claimed",
            Self::Unverified { .. } => "unverified",
            Self::Unexpected { .. } => "unexpected",
        }
    }
}

#[async_trait]
impl Engine for Metered {
    async fn info(&self) -> Result<EngineInfo, EngineError> {
        self.count("info", self.engine.info()).await
    }

    async fn resolve_image(&self, reference: &str, pull: Pull) -> Result<ImageInfo, EngineError> {
        self.count("resolve_image", self.engine.resolve_image(reference, pull)).await
    }

    async fn prepare(&self, image: &str) -> Result<(), EngineError> {
        self.count("prepare", self.engine.prepare(image)).await
    }

    async fn ensure(&self, cell: &CellSpec) -> Result<ByteStream, EngineError> {
        self.count("ensure", self.engine.ensure(cell)).await.map(|stream| self.counted(stream))
    }

    async fn link(&self, name: &CellName) -> Result<ByteStream, EngineError> {
        self.count("link", self.engine.link(name)).await.map(|stream| self.counted(stream))
    }

    async fn attest(&self, cell: &CellSpec, report: &Report) -> Result<(), EngineError> {
        self.count("attest", self.engine.attest(cell, report)).await
    }

    async fn pause(&self, name: &CellName) -> Result<(), EngineError> {
        self.count("pause", self.engine.pause(name)).await
    }

    async fn resume(&self, name: &CellName) -> Result<(), EngineError> {
        self.count("resume", self.engine.resume(name)).await
    }

    async fn remove(&self, name: &CellName) -> Result<(), EngineError> {
        self.count("remove", self.engine.remove(name)).await
    }

    async fn observe(&self, name: &CellName) -> Result<Option<Observed>, EngineError> {
        self.count("observe", self.engine.observe(name)).await
    }

    async fn claim(&self, installation: InstallationId) -> Result<(), EngineError> {
        self.count("claim", self.engine.claim(installation)).await
    }

    async fn release(&self, installation: InstallationId) -> Result<(), EngineError> {
        self.count("release", self.engine.release(installation)).await
    }

    async fn sweep(&self) -> Result<Vec<String>, EngineError> {
        self.count("sweep", self.engine.sweep()).await
    }

    async fn import_data(&self, name: &str, image: &str, archive: ArchiveStream) -> Result<DataVolume, EngineError> {
        self.count("import_data", self.engine.import_data(name, image, archive)).await
    }

    async fn list_data(&self) -> Result<Vec<DataVolume>, EngineError> {
        self.count("list_data", self.engine.list_data()).await
    }

    async fn remove_data(&self, name: &str) -> Result<(), EngineError> {
        self.count("remove_data", self.engine.remove_data(name)).await
    }

    async fn ensure_workspace(&self, workspace: &WorkspaceSpec) -> Result<WorkspaceVolume, EngineError> {
        self.count("ensure_workspace", self.engine.ensure_workspace(workspace)).await
    }

    async fn remove_workspace(&self, name: &WorkspaceName) -> Result<(), EngineError> {
        self.count("remove_workspace", self.engine.remove_workspace(name)).await
    }

    async fn list_workspaces(&self) -> Result<Vec<WorkspaceName>, EngineError> {
        self.count("list_workspaces", self.engine.list_workspaces()).await
    }

    async fn list(&self) -> Result<Vec<Observed>, EngineError> {
        self.count("list", self.engine.list()).await
    }

    fn watch_since(&self, since: SystemTime) -> BoxStream<'static, EngineEvent> {
        self.engine.watch_since(since)
    }
}

/// A cell's stream whose bytes are counted.
struct Counted {
    stream: ByteStream,
    metrics: Metrics,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.metrics.link_received(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.metrics.link_sent(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
