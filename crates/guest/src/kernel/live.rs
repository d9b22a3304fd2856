//! One kernel's life after its process was started: connecting, relaying, and telling how it ended. One task for each kernel.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cellblock_wire::link::{Channel, Effects, Event, KernelDeleted};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::Kernels;
use super::channels::{Broken, Connection, Consumer, connect_all, run};
use super::launch::Launched;
use super::outbox::{Outbox, Port};
use super::relay::Relay;
use super::tree::{is_init, kill_all, kill_strays};
use crate::effects::{Account, LastLook};
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
/// So long one kernel's processes are looked for among others before all are ended.
const SEARCH: Duration = Duration::from_secs(1);

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
    /// What its executions cost.
    pub account: Account,
    /// Its process's exit.
    pub exit: ExitWatch,
    /// Its output may come this long after the idle status.
    late_output: Option<Duration>,
    relay: Mutex<Relay>,
    /// A reply whose execution's effects are being looked at.
    held: Mutex<Option<Box<Incoming>>>,
    swept: AtomicBool,
}

impl Shared {
    /// The shared half of a kernel.
    #[must_use]
    pub fn new(name: String, signer: Signer, ring: Ring, account: Account, exit: ExitWatch) -> Self {
        let (outbox, relay, held) = (Outbox::default(), Mutex::default(), Mutex::default());
        Self {
            name,
            signer,
            ring,
            outbox,
            account,
            exit,
            late_output: None,
            relay,
            held,
            swept: AtomicBool::new(false),
        }
    }

    /// The same, of a kernel whose output may come so long after the idle status.
    #[must_use]
    pub fn with_late_output(self, late_output: Option<Duration>) -> Self {
        Self { late_output, ..self }
    }

    /// It is about to be ended together with another kernel.
    pub fn sweep(&self) {
        self.swept.store(true, Ordering::Relaxed);
    }

    /// Whether it was.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.swept.load(Ordering::Relaxed)
    }

    /// The relay's state.
    pub fn relay(&self) -> MutexGuard<'_, Relay> {
        self.relay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Option<Box<Incoming>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel has ended: tells what was held back of its output.
    fn flush_output(&self) {
        let told = self.relay().flush(self.ring.output_room());
        told.into_iter().for_each(|out| self.ring.push(&self.name, out.event, out.parts));
    }

    fn push_effects(&self, effects: Vec<(String, Effects)>) {
        for (parent_id, effects) in effects {
            self.ring.push(&self.name, Event::Effects { parent_id, effects: Box::new(effects) }, Vec::new());
        }
    }

    fn push_reply(&self, channel: Channel, message: Incoming) {
        let told = self.relay().reply(channel, message);
        told.into_iter().for_each(|out| self.ring.push(&self.name, out.event, out.parts));
    }
}

/// A request to end a kernel, answered when it is done.
pub type Deletion = oneshot::Sender<KernelDeleted>;

/// What the task needs.
pub struct Life {
    /// Shared with the requests.
    pub shared: Arc<Shared>,
    /// The process.
    pub launched: Launched,
    /// Its exit.
    pub exit: ExitWatch,
    /// All kernels of the cell.
    pub kernels: Kernels,
    /// Until when all channels must have answered.
    pub deadline: Instant,
}

enum End {
    Exited(Exit),
    Failed(Broken),
}

impl Life {
    /// Lives the kernel's life until it is deleted.
    pub async fn run(mut self, mut deletions: mpsc::Receiver<Deletion>) {
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
        let deleted = self.delete().await;
        self.shared.account.close();
        let Self { launched, kernels, shared, .. } = self;
        drop(launched.folder);
        kernels.remove(&shared.name);
        if let Some(deletion) = deletion {
            let _ = deletion.send(deleted);
        }
    }

    async fn until_the_end(&mut self) {
        let (tail, mut at_end) = self.drain_stderr();
        let end = self.relay_until_the_end().await;
        self.shared.outbox.close();
        let last = self.shared.account.last_look();
        if matches!(end, End::Failed(_)) {
            self.kill(&mut KernelDeleted::default(), Instant::now());
        }
        self.tell_last_effects(last.as_ref()).await;
        self.shared.account.close();
        let _ = tokio::time::timeout(STDERR_AFTER_EXIT, at_end.wait_for(|ended| *ended)).await;
        let stderr_tail = tail.text();
        let event = match end {
            End::Exited(Exit { status, signal, .. }) => {
                let (oom_kills, swept) = (self.kernels.cgroup.oom_kills(), self.shared.is_swept());
                Event::KernelExited { status, signal, oom_kills, swept, stderr_tail }
            }
            End::Failed((port, error)) => {
                Event::KernelFailed { channel: Some(port.name().to_owned()), reason: error.to_string(), stderr_tail }
            }
        };
        self.shared.ring.push(&self.shared.name, event, Vec::new());
    }

    /// Tells what the open executions have done, and a reply that was held back for that.
    async fn tell_last_effects(&self, last: Option<&LastLook>) {
        let effects = self.shared.account.ended(last).await;
        self.shared.flush_output();
        self.shared.push_effects(effects);
        if let Some(reply) = self.shared.held().take() {
            self.shared.push_reply(Channel::Shell, *reply);
        }
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

    /// Ends the kernel's processes and says what else has ended with them. Nothing that can wait comes before the first kill: where
    /// code starts processes as fast as it can, the guest has a hundredth of a CPU.
    async fn delete(&mut self) -> KernelDeleted {
        let last = self.shared.account.last_look();
        let mut deleted = KernelDeleted::default();
        let began = Instant::now();
        while self.kill(&mut deleted, began) && began.elapsed() < REAP {
            let _ = tokio::time::timeout(Duration::from_millis(5), exited(&mut self.exit)).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let _ = tokio::time::timeout_at(began + REAP, exited(&mut self.exit)).await;
        let effects = self.shared.account.ended(last.as_ref()).await;
        deleted.effects = effects.into_iter().next().map(|(_, effects)| effects);
        self.shared.flush_output();
        deleted.last_seq = self.shared.ring.last_seq();
        deleted
    }

    /// Kills what there is of the kernel; false when nothing was found. Beside others only its own processes, as long as they can be
    /// told apart in time, and not while the cell is full of processes.
    fn kill(&self, deleted: &mut KernelDeleted, began: Instant) -> bool {
        let (name, kernels) = (&self.shared.name, &self.kernels);
        let is_hopeless = || !deleted.swept && (began.elapsed() > SEARCH || kernels.cgroup.is_full_of_processes());
        match choose_kill(is_init(), kernels.has_others(name), is_hopeless) {
            Kill::Own => self.launched.tree.kill() || kill_strays(&kernels.roots()),
            Kill::All => kill_all(),
            Kill::AllWithOthers => {
                deleted.ended_kernels = kernels.sweep_others(name);
                deleted.swept = true;
                kill_all()
            }
        }
    }
}

/// Whom to kill for the end of a kernel.
#[derive(Debug, PartialEq, Eq)]
enum Kill {
    /// What is known to be of it.
    Own,
    /// Everybody: nobody else is there.
    All,
    /// Everybody, other kernels with it.
    AllWithOthers,
}

fn choose_kill(is_init: bool, has_others: bool, is_hopeless: impl FnOnce() -> bool) -> Kill {
    match (is_init, has_others) {
        // What is outside of a cell is nothing of ours.
        (false, _) => Kill::Own,
        (true, false) => Kill::All,
        (true, true) if is_hopeless() => Kill::AllWithOthers,
        (true, true) => Kill::Own,
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
        let channel = match port {
            Port::Iopub => return self.settle_output(*message).await,
            Port::Stdin => Channel::Stdin,
            Port::Control => Channel::Control,
            Port::Shell | Port::Heartbeat => Channel::Shell,
        };
        let shared = &self.shared;
        shared.ring.room().await;
        if port != Port::Shell || !message.msg_type.ends_with("_reply") {
            return shared.push_reply(channel, *message);
        }
        let id = message.parent_id.clone();
        *shared.held() = Some(message);
        let effects = shared.account.replied(&id).await;
        shared.push_effects(effects);
        if let Some(message) = shared.held().take() {
            shared.push_reply(channel, *message);
        }
    }
}

impl Inbox {
    async fn settle_output(&mut self, message: Incoming) {
        if let Some(late_output) = self.shared.late_output
            && self.shared.relay().puts_off(&message)
        {
            let shared = self.shared.clone();
            tokio::spawn(async move {
                tokio::time::sleep(late_output).await;
                shared.tell_output(message).await;
            });
            return;
        }
        self.shared.tell_output(message).await;
    }
}

impl Shared {
    async fn tell_output(&self, message: Incoming) {
        let Self { ring, name, exit, .. } = self;
        ring.await_output_room(message.output_size()).await;
        let (told, due) = {
            let mut relay = self.relay();
            (relay.iopub(message, ring.output_room()), relay.due(Instant::now().into_std()))
        };
        if let Some(due) = due {
            // A kernel that has ended is not slowed down any more, and what it said would be lost.
            let _ = tokio::time::timeout_at(due.into(), exited(&mut exit.clone())).await;
        }
        told.into_iter().for_each(|out| ring.push(name, out.event, out.parts));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_ended_only_where_nothing_else_helps_and_never_outside_of_a_cell() {
        for (is_init, has_others, is_hopeless, expected) in [
            (false, false, true, Kill::Own),
            (false, true, true, Kill::Own),
            (true, false, false, Kill::All),
            (true, true, false, Kill::Own),
            (true, true, true, Kill::AllWithOthers),
        ] {
            assert_eq!(choose_kill(is_init, has_others, || is_hopeless), expected);
        }
    }
}
