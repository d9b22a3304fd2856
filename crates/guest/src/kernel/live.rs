//! One kernel's life after its process was started: connecting, relaying, and telling how it ended. One task for each kernel.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cellblock_wire::link::{Channel, Event};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::channels::{Broken, Connection, Consumer, connect_all, run};
use super::launch::Launched;
use super::outbox::{Outbox, Port};
use super::relay::Relay;
use crate::cgroup::Cgroup;
use crate::events::Ring;
use crate::message::{Assembler, Incoming, Signer, Taken};
use crate::reap::{Exit, ExitWatch, exited};
use crate::zmtp::{Item, ZmtpError};

/// A kernel closes its sockets some time before its process ends.
const EXIT_AFTER_END: Duration = Duration::from_secs(2);
/// How long a dead kernel's sockets are read; children of it may hold them open.
const DRAIN: Duration = Duration::from_millis(300);
const STDERR_AFTER_EXIT: Duration = Duration::from_millis(50);
const STDERR_TAIL: usize = 4096;
const REAP: Duration = Duration::from_secs(5);

/// What the task and the requests about a kernel share.
pub struct Shared {
    /// The kernel's name.
    pub name: String,
    /// Signs for it.
    pub signer: Signer,
    /// Where its events go.
    pub ring: Ring,
    /// Messages to it.
    pub outbox: Outbox,
    relay: Mutex<Relay>,
}

impl Shared {
    /// The shared half of a kernel.
    #[must_use]
    pub fn new(name: String, signer: Signer, ring: Ring) -> Self {
        Self { name, signer, ring, outbox: Outbox::default(), relay: Mutex::default() }
    }

    /// The relay's state.
    pub fn relay(&self) -> MutexGuard<'_, Relay> {
        self.relay.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request to end a kernel, answered when it is done.
pub type Deletion = oneshot::Sender<()>;

/// What the task needs.
pub struct Life {
    /// Shared with the requests.
    pub shared: Arc<Shared>,
    /// The process.
    pub launched: Launched,
    /// Its exit.
    pub exit: ExitWatch,
    /// For the count of processes that ran out of memory.
    pub cgroup: Cgroup,
    /// Until when all channels must have answered.
    pub deadline: Instant,
}

enum End {
    Exited(Exit),
    Failed(Broken),
}

impl Life {
    /// Lives the kernel's life until it is deleted.
    pub async fn run(mut self, mut deletions: mpsc::Receiver<Deletion>, removed: impl FnOnce()) {
        let deletion = tokio::select! {
            biased;
            deletion = deletions.recv() => deletion,
            () = self.until_the_end() => None,
        };
        self.shared.outbox.close();
        let deletion = match deletion {
            Some(deletion) => Some(deletion),
            None => deletions.recv().await,
        };
        self.end_processes().await;
        let Self { launched, .. } = self;
        drop(launched.folder);
        removed();
        if let Some(deletion) = deletion {
            let _ = deletion.send(());
        }
    }

    async fn until_the_end(&mut self) {
        let (tail, mut at_end) = self.drain_stderr();
        let end = self.relay_until_the_end().await;
        self.shared.outbox.close();
        if matches!(end, End::Failed(_)) {
            self.launched.kill_tree();
        }
        let _ = tokio::time::timeout(STDERR_AFTER_EXIT, at_end.wait_for(|ended| *ended)).await;
        let stderr_tail = tail.text();
        let event = match end {
            End::Exited(Exit { status, signal }) => {
                Event::KernelExited { status, signal, oom_kills: self.cgroup.oom_kills(), stderr_tail }
            }
            End::Failed((port, error)) => {
                Event::KernelFailed { channel: Some(port.name().to_owned()), reason: error.to_string(), stderr_tail }
            }
        };
        self.shared.ring.push(&self.shared.name, event, Vec::new());
    }

    async fn relay_until_the_end(&mut self) -> End {
        let connecting = connect_all(&self.launched.endpoints, self.shared.name.as_bytes(), self.deadline);
        let connected = tokio::select! {
            exit = exited(&mut self.exit) => return End::Exited(exit),
            connected = connecting => connected,
        };
        match connected {
            Ok(connections) => {
                self.shared.ring.push(&self.shared.name, Event::KernelConnected, Vec::new());
                self.relay(connections).await
            }
            Err(broken) => self.judge(broken).await,
        }
    }

    /// A connection's end is its process's end, if that follows.
    async fn judge(&mut self, broken: Broken) -> End {
        if matches!(broken.1, ZmtpError::Ended(_))
            && let Ok(exit) = tokio::time::timeout(EXIT_AFTER_END, exited(&mut self.exit)).await
        {
            return End::Exited(exit);
        }
        End::Failed(broken)
    }

    async fn relay(&mut self, connections: Vec<Connection>) -> End {
        let shared = &self.shared;
        let mut channels: FuturesUnordered<_> = connections
            .into_iter()
            .map(|connection| run(connection, &shared.outbox, Inbox::new(shared.clone())))
            .collect();
        let mut exit = None;
        let mut broken: Option<Broken> = None;
        let mut deadline = Instant::now() + Duration::from_secs(86400 * 365);
        loop {
            tokio::select! {
                end = exited(&mut self.exit), if exit.is_none() => {
                    exit = Some(end);
                    deadline = Instant::now() + DRAIN;
                }
                Some(end) = channels.next() => {
                    let wait = if matches!(end.1, ZmtpError::Ended(_)) { EXIT_AFTER_END } else { Duration::ZERO };
                    deadline = deadline.min(Instant::now() + wait);
                    // One that broke says more than others that ended after it.
                    let says_less = |first: &Broken| matches!(first.1, ZmtpError::Ended(_)) && !matches!(end.1, ZmtpError::Ended(_));
                    if broken.as_ref().is_none_or(says_less) {
                        broken = Some(end);
                    }
                }
                () = sleep_until(deadline) => break,
            }
            if exit.is_some() && channels.is_empty() {
                break;
            }
        }
        match (exit, broken) {
            (Some(exit), _) => End::Exited(exit),
            (None, Some(broken)) => End::Failed(broken),
            (None, None) => End::Exited(exited(&mut self.exit).await),
        }
    }

    /// Reads stderr as long as anybody writes to it, so that nobody who does ever waits.
    fn drain_stderr(&mut self) -> (Tail, watch::Receiver<bool>) {
        let tail = Tail::default();
        let (ended, at_end) = watch::channel(false);
        let stderr = self.launched.stderr.take().and_then(|stderr| pipe::Receiver::from_owned_fd(stderr.into()).ok());
        let kept = tail.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 1024];
            if let Some(mut stderr) = stderr {
                while let Ok(read @ 1..) = stderr.read(&mut buffer).await {
                    kept.push(&buffer[..read]);
                }
            }
            ended.send_replace(true);
        });
        (tail, at_end)
    }

    /// Kills until nothing of the kernel is found any more, and waits until its process is reaped.
    async fn end_processes(&mut self) {
        let end = Instant::now() + REAP;
        while self.launched.kill_tree() && Instant::now() < end {
            let _ = tokio::time::timeout(Duration::from_millis(5), exited(&mut self.exit)).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let _ = tokio::time::timeout_at(end, exited(&mut self.exit)).await;
    }
}

/// The last bytes of stderr.
#[derive(Clone, Default)]
struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut kept = self.lock();
        kept.extend_from_slice(bytes);
        let excess = kept.len().saturating_sub(STDERR_TAIL);
        kept.drain(..excess);
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock()).into_owned()
    }
}

/// Takes in one channel's messages.
struct Inbox {
    shared: Arc<Shared>,
    assembler: Assembler,
    ready: Option<Box<Incoming>>,
}

impl Inbox {
    fn new(shared: Arc<Shared>) -> Self {
        let assembler = Assembler::new(shared.signer.clone());
        Self { shared, assembler, ready: None }
    }
}

impl Consumer for Inbox {
    fn take(&mut self, _: Port, item: Item<'_>) -> Result<Option<Vec<u8>>, ZmtpError> {
        let shared = &self.shared;
        match self.assembler.take(item, |parent| shared.relay().capture_limits(parent))? {
            Taken::Nothing => Ok(None),
            Taken::Command(command) => Ok(Some(command)),
            Taken::Message(message) => {
                self.ready = Some(message);
                Ok(None)
            }
        }
    }

    async fn settle(&mut self, port: Port) {
        let Some(message) = self.ready.take() else { return };
        let Shared { ring, name, .. } = &*self.shared;
        let channel = match port {
            Port::Iopub => {
                ring.await_output_room(message.output_size()).await;
                let told = self.shared.relay().iopub(*message, ring.output_room());
                told.into_iter().for_each(|out| ring.push(name, out.event, out.parts));
                return;
            }
            Port::Stdin => Channel::Stdin,
            Port::Control => Channel::Control,
            Port::Shell | Port::Heartbeat => Channel::Shell,
        };
        ring.room().await;
        let told = self.shared.relay().reply(channel, *message);
        told.into_iter().for_each(|out| ring.push(name, out.event, out.parts));
    }
}
