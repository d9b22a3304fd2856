//! Sessions: each has one task that owns it (`actor`); everybody else holds a [`Session`] handle and a watch of its snapshot.
//!
//! Nothing here knows HTTP, tenants' rights or an engine's name. Handles are cheap, and dropping one changes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use crate::domain::egress::Network;
use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::lifecycle::{EndReason, Phase};
use crate::domain::output::JsonText;
use crate::domain::spec::SessionSpec;
use crate::egress::Gate;
pub use crate::egress::{Decision, GateView, Refusal};
pub use crate::kernel::client::ClientHeader;
use crate::kernel::link::Link;
use crate::store::state::Lasting;
use crate::task;

mod actor;
mod boot;
pub mod capacity;
mod context;
mod effects;
pub mod execution;
mod first_files;
pub mod keeping;
pub mod once;
pub mod pool;
pub mod reconcile;
pub mod registry;
mod retelling;
mod running;
pub mod tap;
pub mod visits;
mod wiring;
pub mod workspaces;

use actor::Wish;
pub use context::{Aside, ContextState};
use execution::{Execution, ExecutionRequest};
use keeping::Keeping;
use tap::{Tap, TapBounds};
use visits::{Visit, Weight};

/// Commands that may wait for a session's task; more are refused.
const COMMAND_QUEUE: usize = 256;

/// A new id of any kind.
#[must_use]
pub fn fresh<T: From<Uuid>>() -> T {
    Uuid::now_v7().into()
}

/// A moment of the wall's clock on the process's.
fn instant(at: Timestamp) -> Instant {
    let (now, wall) = (Instant::now(), Timestamp::now());
    match Duration::try_from(at.duration_since(wall)) {
        Ok(ahead) => now + ahead,
        // A process does not know moments from before its machine's start.
        Err(_) => now.checked_sub(wall.duration_since(at).unsigned_abs()).unwrap_or(now),
    }
}

/// Times and bounds that all sessions keep to.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// A session is ready within this time of its creation, or ends.
    pub start_timeout: Duration,
    /// An interrupt is obeyed within this time, or the kernel is replaced.
    pub interrupt_grace: Duration,
    /// A guest ends itself after hearing nothing for this long.
    pub orphan_timeout: Duration,
    /// Executions that may wait in one context.
    pub queued_executions: usize,
    /// One that waits longer ends without having run.
    pub queue_timeout: Duration,
    /// Contexts that a session may have.
    pub contexts: usize,
    /// Contents of results of more bytes are kept beside the execution.
    pub inline: usize,
    /// Bytes that an installation of packages may add.
    pub package_bytes: u64,
    /// Time for one that is asked for by request.
    pub package_timeout: Duration,
    /// What is kept of a kernel's messages for clients that speak Jupyter.
    pub tap: TapBounds,
}

/// What can be seen of a session. Changes are published as a whole, with a number that rises.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Rises with every change.
    pub generation: u64,
    /// Where it is in its life.
    pub phase: Phase,
    /// Whether anything runs or waits.
    pub busy: bool,
    /// How many cells it has had; the last one is its own.
    pub cells: u32,
    /// Its labels and times, which a caller may change.
    pub attributes: Arc<Attributes>,
    /// When something was last asked of it.
    pub last_active: Timestamp,
    /// When it ends for its age.
    pub expires_at: Timestamp,
    /// When it ends or is paused for idleness, or ends after it was paused; nothing while it is busy.
    pub idle_deadline: Option<Timestamp>,
    /// Why it never became ready.
    pub start_failure: Option<Arc<StartFailure>>,
    /// The language of its default context, once known.
    pub language: Arc<str>,
    /// What became of its cell, for people, where that ended it.
    pub loss: Option<Arc<str>>,
}

/// What a caller may change of a live session.
#[derive(Debug, Clone, PartialEq)]
pub struct Attributes {
    /// For finding it again.
    pub labels: BTreeMap<String, String>,
    /// It ends after this long without work, or is paused.
    pub idle: Duration,
    /// What it may reach.
    pub network: Network,
}

/// Why a session never became ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartFailure {
    /// Whose fault it is, and what can be done.
    pub fault: StartFault,
    /// A sentence for the caller; never an engine's own words.
    pub detail: String,
}

/// Kinds of failed starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartFault {
    /// The engine can't be reached, or did not answer.
    EngineUnavailable,
    /// The engine would not start a cell of this kind.
    EngineRefused,
    /// The cell is not confined as specified.
    Unverified,
    /// The guest did not answer.
    GuestUnreachable,
    /// The kernel died or stalled while it started.
    KernelFailed,
    /// The setup code failed, or a file that it begins with could not be put in place.
    SetupFailed,
    /// What the next process would have to know of it can't be written.
    Unkept,
    /// It took too long.
    TimedOut,
}

/// A change of a live session.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Patch {
    /// It ends for its age this long from now.
    pub expires_in: Option<Duration>,
    /// It ends after this long without work.
    pub idle: Option<Duration>,
    /// Replaces its labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// Are among its labels from then on, whatever others it has.
    pub more_labels: BTreeMap<String, String>,
    /// What it may reach from now on.
    pub network: Option<Network>,
}

/// A context, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextView {
    /// Its id.
    pub id: ContextId,
    /// How it is.
    pub state: ContextState,
    /// Its kernel's language; empty until it is known.
    pub language: String,
    /// The image's kernelspec; empty until it is known.
    pub kernelspec: String,
    /// Whether executions run here that name no context.
    pub is_default: bool,
    /// Executions that wait.
    pub queued: usize,
    /// When it was created.
    pub created_at: Timestamp,
}

/// Why a session's task does not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is not ready yet.
    #[error("the session is still starting")]
    NotReady,
    /// It is ending or has ended.
    #[error("the session has ended")]
    Ended(EndReason),
    /// This process leaves it to the next one.
    #[error("the session goes on with the next server")]
    Left,
    /// As many executions as allowed are waiting.
    #[error("the context's queue is full")]
    QueueFull,
    /// There is no such context.
    #[error("the session has no such context")]
    NoSuchContext,
    /// The kernel did not come back.
    #[error("the kernel did not start again")]
    KernelLost,
    /// A new context's kernel did not start.
    #[error("{}", .0.detail)]
    KernelFailed(StartFailure),
    /// The session has as many contexts as it may.
    #[error("the session has as many contexts as it may, {0}")]
    TooManyContexts(usize),
    /// It would have more labels than it may.
    #[error("the session may have {0} labels")]
    TooManyLabels(usize),
    /// The default context stays as long as its session.
    #[error("it is the default context")]
    DefaultContext,
    /// The execution does not ask for a line.
    #[error("nothing is asked")]
    NothingAsked,
    /// It can't be paused while something runs or waits in it, in a kernel or beside one.
    #[error("something runs or waits in the session")]
    Busy,
    /// It can't be paused, since its kernels have not come to rest.
    #[error("its kernels did not come to rest within {0:?}")]
    Restless(Duration),
    /// The engine did not pause it.
    #[error("the session could not be paused")]
    NotPaused,
    /// As much goes on beside its kernels as may.
    #[error("as many files, commands and connections of the session are under way as may be at once")]
    TooManyVisits,
}

enum Command {
    Execute {
        id: ExecutionId,
        context: Option<ContextId>,
        request: Box<ExecutionRequest>,
        reply: oneshot::Sender<Result<Arc<Execution>, Refused>>,
    },
    Cancel {
        execution: ExecutionId,
    },
    Input {
        execution: ExecutionId,
        line: String,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    /// All contexts where none is named.
    Interrupt {
        context: Option<ContextId>,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    Restart {
        context: Option<ContextId>,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    Contexts {
        reply: oneshot::Sender<Result<Vec<ContextView>, Refused>>,
    },
    CreateContext {
        id: ContextId,
        kernelspec: Option<String>,
        cwd: Option<String>,
        reply: oneshot::Sender<Result<ContextView, Refused>>,
    },
    DeleteContext {
        context: ContextId,
        reply: oneshot::Sender<Result<ContextView, Refused>>,
    },
    Ask {
        context: Option<ContextId>,
        msg_type: &'static str,
        content: serde_json::Value,
        answer: oneshot::Sender<JsonText>,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    Pass {
        aside: Box<Aside>,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    Patch {
        patch: Patch,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    KeepAlive {
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    Claim {
        claim: Box<Claim>,
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    Link {
        reply: oneshot::Sender<Result<Link, Refused>>,
    },
    Enter {
        weight: Weight,
        reply: oneshot::Sender<Result<Visit, Refused>>,
    },
    /// Answered once it is paused.
    Pause {
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    /// Answered once it is ready.
    Resume {
        reply: oneshot::Sender<Result<(), Refused>>,
    },
    LookAtCell,
}

/// Whose a session becomes that was made before anybody asked for it, and what it is from now on.
struct Claim {
    tenant: Arc<str>,
    spec: Arc<SessionSpec>,
    env: BTreeMap<String, String>,
    lasting: Lasting,
    keeping: Keeping,
    /// Those of its pool may be older.
    settings: Settings,
    created_at: Timestamp,
}

impl Command {
    /// Whether it is for what is in the cell, so that a paused session is resumed for it.
    fn needs_cell(&self) -> bool {
        match self {
            Self::Execute { .. }
            | Self::Interrupt { .. }
            | Self::Restart { .. }
            | Self::CreateContext { .. }
            | Self::DeleteContext { .. }
            | Self::Ask { .. }
            | Self::Pass { .. }
            | Self::Claim { .. }
            | Self::Link { .. }
            | Self::Enter { .. }
            | Self::Resume { .. } => true,
            Self::Cancel { .. }
            | Self::Input { .. }
            | Self::Contexts { .. }
            | Self::Patch { .. }
            | Self::KeepAlive { .. }
            | Self::Pause { .. }
            | Self::LookAtCell => false,
        }
    }
}

/// A handle on a session.
#[derive(Debug, Clone)]
pub struct Session {
    /// Its id.
    pub id: SessionId,
    /// Whose it is.
    pub tenant: Arc<str>,
    /// What it is.
    pub spec: Arc<SessionSpec>,
    /// Its first context.
    pub default_context: ContextId,
    /// When it was created.
    pub created_at: Timestamp,
    /// It was there before it was asked for.
    pub is_warm: bool,
    /// Held while a context is looked for by its language, and made.
    pub(crate) by_language: Arc<tokio::sync::Mutex<()>>,
    gate: Arc<Gate>,
    /// Where its default context is heard by clients that speak Jupyter.
    pub tap: Arc<Tap>,
    commands: mpsc::Sender<Command>,
    wishes: mpsc::Sender<Wish>,
    snapshot: watch::Receiver<Snapshot>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Command")
    }
}

impl Session {
    /// What can be seen of it now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }

    /// Where it is in its life.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.snapshot.borrow().phase
    }

    /// What can be seen of its way out.
    #[must_use]
    pub fn egress(&self) -> GateView {
        self.gate.view()
    }

    /// Whether it will not come to anything any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.phase(), Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_))
    }

    /// Waits until a snapshot fulfils a condition. Level-triggered: it answers at once if it already does.
    pub async fn wait_for(&self, mut condition: impl FnMut(&Snapshot) -> bool) -> Snapshot {
        let mut snapshot = self.snapshot.clone();
        match snapshot.wait_for(|s| condition(s)).await {
            Ok(found) => found.clone(),
            // The task is gone, so nothing changes any more.
            Err(_) => self.snapshot(),
        }
    }

    /// Asks it to end. Never waits behind other work; asking twice is asking once.
    pub fn end(&self, reason: EndReason) {
        // A full channel means that it was told already; a closed one that it has ended.
        let _ = self.wishes.try_send(Wish::End(reason));
    }

    /// Has it end when an execution has.
    pub fn end_after(&self, execution: Arc<Execution>) {
        let session = self.clone();
        task::spawn("run", async move {
            execution.ended().await;
            // One that goes on with the next process needs its session.
            if execution.status().is_final() {
                session.end(EndReason::Deleted);
            }
        });
    }

    /// Has its task end and its container stay, for the next process, which goes on with what runs; answers once that is done.
    pub(super) async fn leave(&self) {
        // A closed channel means that it has ended.
        let _ = self.wishes.send(Wish::Leave).await;
        self.commands.closed().await;
    }

    /// Runs code, or lets it wait for its turn.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn execute(
        &self,
        id: ExecutionId,
        context: Option<ContextId>,
        request: ExecutionRequest,
    ) -> Result<Arc<Execution>, Refused> {
        self.ask(|reply| Command::Execute { id, context, request: Box::new(request), reply }).await
    }

    /// Takes an execution back.
    ///
    /// # Errors
    /// [`Refused::QueueFull`] when the session's task has too much to do.
    pub fn cancel(&self, execution: ExecutionId) -> Result<(), Refused> {
        self.commands.try_send(Command::Cancel { execution }).map_err(|e| self.why_not(&e))
    }

    /// Takes an execution back, at once or as soon as the session's task gets to it. Nobody is left to be told that it has too much to do.
    pub fn cancel_unheard(&self, execution: ExecutionId) {
        if let Err(mpsc::error::TrySendError::Full(command)) = self.commands.try_send(Command::Cancel { execution }) {
            let commands = self.commands.clone();
            task::spawn("cancel", async move {
                // A session that has ended meanwhile has ended its executions too.
                let _ = commands.send(command).await;
            });
        }
    }

    /// Gives an execution the line that it asks for.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn answer_input(&self, execution: ExecutionId, line: String) -> Result<(), Refused> {
        self.ask(|reply| Command::Input { execution, line, reply }).await
    }

    /// Interrupts what runs in a context, or in all of them.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn interrupt(&self, context: Option<ContextId>) -> Result<(), Refused> {
        self.ask(|reply| Command::Interrupt { context, reply }).await
    }

    /// Replaces the kernel of a context, or of all; files stay, variables go. Answers once the new one does.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn restart(&self, context: Option<ContextId>) -> Result<(), Refused> {
        self.ask(|reply| Command::Restart { context, reply }).await
    }

    /// Its contexts in the order of their creation.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn contexts(&self) -> Result<Vec<ContextView>, Refused> {
        self.ask(|reply| Command::Contexts { reply }).await
    }

    /// Adds a context; answers once its kernel does.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn create_context(
        &self,
        id: ContextId,
        kernelspec: Option<String>,
        cwd: Option<String>,
    ) -> Result<ContextView, Refused> {
        self.ask(|reply| Command::CreateContext { id, kernelspec, cwd, reply }).await
    }

    /// Ends a context and what runs in it.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn delete_context(&self, context: ContextId) -> Result<ContextView, Refused> {
        self.ask(|reply| Command::DeleteContext { context, reply }).await
    }

    /// Asks a context's kernel something on its shell channel; the answer's content comes when the kernel has time. An answer
    /// that never comes is dropped with the kernel.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn ask_kernel(
        &self,
        context: Option<ContextId>,
        msg_type: &'static str,
        content: serde_json::Value,
    ) -> Result<oneshot::Receiver<JsonText>, Refused> {
        let (answer, answered) = oneshot::channel();
        self.ask(|reply| Command::Ask { context, msg_type, content, answer, reply }).await?;
        Ok(answered)
    }

    /// Passes a message of a client on to the kernel of the default context.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn pass(&self, aside: Aside) -> Result<(), Refused> {
        self.ask(|reply| Command::Pass { aside: Box::new(aside), reply }).await
    }

    /// Changes it.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn patch(&self, patch: Patch) -> Result<(), Refused> {
        self.ask(|reply| Command::Patch { patch, reply }).await
    }

    /// Counts as activity.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn keep_alive(&self) -> Result<(), Refused> {
        self.ask(|reply| Command::KeepAlive { reply }).await
    }

    /// Makes it somebody's.
    async fn claim(&self, claim: Claim) -> Result<(), Refused> {
        self.ask(|reply| Command::Claim { claim: Box::new(claim), reply }).await
    }

    /// Begins work beside its kernels, for which it is resumed if it is paused, and during which it is neither idle nor paused.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn enter(&self, weight: Weight) -> Result<Visit, Refused> {
        self.ask(|reply| Command::Enter { weight, reply }).await
    }

    /// The link to its guest, for a question that is no activity.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn link(&self) -> Result<Link, Refused> {
        self.ask(|reply| Command::Link { reply }).await
    }

    /// Freezes it; answers once that is done. What is asked of it later resumes it.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn pause(&self) -> Result<(), Refused> {
        self.ask(|reply| Command::Pause { reply }).await
    }

    /// Resumes it if it is paused; answers once it is ready.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn resume(&self) -> Result<(), Refused> {
        self.ask(|reply| Command::Resume { reply }).await
    }

    /// A hint that something may have happened to its cell.
    pub fn look_at_cell(&self) {
        // A hint that finds the queue full is made good by the next round of the reconciler.
        let _ = self.commands.try_send(Command::LookAtCell);
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T, Refused>>) -> Command) -> Result<T, Refused> {
        let (reply, answer) = oneshot::channel();
        self.commands.try_send(command(reply)).map_err(|e| self.why_not(&e))?;
        answer.await.unwrap_or_else(|_| Err(self.why_closed()))
    }

    fn why_not(&self, error: &mpsc::error::TrySendError<Command>) -> Refused {
        match error {
            mpsc::error::TrySendError::Full(_) => Refused::QueueFull,
            mpsc::error::TrySendError::Closed(_) => self.why_closed(),
        }
    }

    /// Why its task does not answer any more.
    fn why_closed(&self) -> Refused {
        match self.phase() {
            Phase::Aborting(reason) | Phase::Ending(reason) | Phase::Ended(reason) => Refused::Ended(reason),
            _ => Refused::Left,
        }
    }
}
