//! A session's end of the link: actions in order, one at a time, and events with their acknowledgement. Performs; decides nothing.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cellblock_wire::frame::Frame;
use cellblock_wire::link::{KernelDeleted, KernelStarted, Numbered, Refusal, StartKernel, Transport};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::context::Action;
use crate::kernel::link::{Events, Link, LinkError};
use crate::store::state::State;

/// Events are acknowledged after this many, or when nothing more is under way …
const ACK_EVERY: u64 = 128;
/// … which must last this long, so that it does not stand in the way of what follows at once;
const ACK_AFTER: Duration = Duration::from_millis(50);
/// or after this many bytes: a guest's ring holds a few MiB, and what does not fit is cut.
const ACK_BYTES: usize = 512 * 1024;

/// An action can't be done once it has got no answer in time twice, or its link has broken that often.
const HOPELESS: u32 = 4;

/// The refusal of code that could not be committed: ours, before the guest is asked.
pub(super) const UNKEPT: &str = "unkept";

/// What an action has brought about.
#[derive(Debug)]
pub(super) enum Acted {
    Started(KernelStarted),
    Deleted(KernelDeleted),
    Sent,
}

/// An action that was carried out, or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Act {
    /// The kernel that it was about, if it was about one.
    pub(super) kernel: String,
    pub(super) kind: ActKind,
}

/// What an action was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ActKind {
    Start,
    Delete,
    /// With the message's id.
    Send(String),
    Signal,
    SetUp,
}

impl Act {
    fn of(action: &Action) -> Self {
        let (kernel, kind) = match action {
            Action::Start { kernel, .. } => (kernel, ActKind::Start),
            Action::Delete { kernel } => (kernel, ActKind::Delete),
            Action::Send { kernel, head, .. } => (kernel, ActKind::Send(head.msg_id.clone())),
            Action::Signal { kernel, .. } => (kernel, ActKind::Signal),
            Action::SetUp(_) => return Self { kernel: String::new(), kind: ActKind::SetUp },
        };
        Self { kernel: kernel.clone(), kind }
    }
}

/// How kernels are started in this session.
#[derive(Debug, Clone)]
pub(super) struct Starting {
    pub(super) transport: Transport,
    pub(super) connect_timeout: Duration,
    /// Where kernels' names, code and events are to be found afterwards.
    pub(super) state: Option<State>,
}

/// An action that waits for its turn.
struct Planned {
    action: Action,
    /// How far it is from being hopeless.
    failures: u32,
}

/// An action on its way.
struct UnderWay {
    /// The link that carries it.
    round: u32,
    planned: Planned,
}

/// An action that is being carried out: by which link, what it is, and what came of it.
type Acting = BoxFuture<'static, (u32, Act, Result<Acted, LinkError>)>;

/// How an action came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    /// It is done, or was refused. Where it was said before, without an answer, it may have been done then.
    Over { was_tried: bool },
    /// The link that carried it is gone, and it waits for the next.
    Again,
    /// It got no answer, and is to be said again over another link.
    Broken,
    /// It got no answer too often.
    Hopeless,
}

/// The link to a session's guest, while there is one.
pub(super) struct Wiring {
    starting: Starting,
    link: Option<Link>,
    /// How many links there have been.
    round: u32,
    events: Option<Events>,
    last_seq: u64,
    acked: u64,
    unacked_bytes: usize,
    acking: bool,
    /// When a quiet session's events are acknowledged.
    ack_due: Option<Instant>,
    pending: VecDeque<Planned>,
    under_way: Option<UnderWay>,
}

impl Wiring {
    /// Events of the cell's guest up to number `heard` have been taken note of before.
    pub(super) fn new(starting: Starting, heard: u64) -> Self {
        Self {
            starting,
            link: None,
            round: 0,
            events: None,
            last_seq: heard,
            acked: 0,
            unacked_bytes: 0,
            acking: false,
            ack_due: None,
            pending: VecDeque::new(),
            under_way: None,
        }
    }

    /// What was planned before is done now. Events up to number `heard` have been taken note of before.
    pub(super) fn connect(&mut self, link: Link, events: Events, heard: u64) {
        (self.link, self.events) = (Some(link), Some(events));
        self.round += 1;
        (self.last_seq, self.acked, self.unacked_bytes) = (heard, 0, 0);
        (self.acking, self.ack_due) = (false, None);
    }

    /// Breaks the link off, if there is one. What was to be done waits for the next.
    pub(super) fn cut(&mut self) -> Option<Link> {
        self.events = None;
        self.link.take().inspect(Link::cut)
    }

    /// Breaks the link off, and forgets what was to be done in a cell that goes.
    pub(super) fn forget(&mut self) {
        self.cut();
        self.pending.clear();
        self.under_way = None;
    }

    /// Whether nothing is on its way to the guest, and could be.
    pub(super) fn is_quiet(&self) -> bool {
        self.link.is_some() && self.under_way.is_none() && self.pending.is_empty()
    }

    pub(super) fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    /// Takes actions. The end of a kernel comes before all else: what was still to be said to it is pointless, and others can wait.
    pub(super) fn plan(&mut self, actions: Vec<Action>) {
        for action in actions {
            if let Action::Delete { kernel } = &action {
                self.pending.retain(|planned| Act::of(&planned.action).kernel != *kernel);
                self.pending.push_front(Planned { action, failures: 0 });
            } else {
                self.pending.push_back(Planned { action, failures: 0 });
            }
        }
    }

    /// The guest's next event, or never while there is no link.
    pub(super) async fn next_event(&mut self) -> Result<Option<Frame<Numbered>>, LinkError> {
        match &mut self.events {
            Some(events) => events.next().await,
            None => std::future::pending().await,
        }
    }

    /// Takes note of an event; false when it was there before.
    pub(super) fn note(&mut self, seq: u64, parts: &[Bytes]) -> bool {
        if seq <= self.last_seq {
            return false;
        }
        self.last_seq = seq;
        self.unacked_bytes += parts.iter().map(Bytes::len).sum::<usize>();
        true
    }

    /// The next action, if none is under way: their order is their meaning. Its end is to be told with [`Wiring::has_acted`].
    pub(super) fn act(&mut self) -> Option<Acting> {
        if self.under_way.is_some() {
            return None;
        }
        let link = self.link.clone()?;
        let planned = self.pending.pop_front()?;
        let (round, action) = (self.round, planned.action.clone());
        let act = Act::of(&action);
        self.under_way = Some(UnderWay { round, planned });
        Some(Box::pin(perform(link, action, self.starting.clone()).map(move |result| (round, act, result))))
    }

    /// The number of the newest event that was noted.
    pub(super) fn last_seq(&self) -> u64 {
        self.last_seq
    }

    /// Takes note of an action's end. One without an answer may have been done: the guest knows what it has been told before.
    pub(super) fn has_acted(&mut self, round: u32, result: &Result<Acted, LinkError>) -> Settled {
        let Some(UnderWay { planned, .. }) = self.under_way.take_if(|under_way| under_way.round == round) else {
            return Settled::Over { was_tried: false };
        };
        let weight = match result {
            Ok(_) | Err(LinkError::Refused { .. }) => return Settled::Over { was_tried: planned.failures > 0 },
            Err(LinkError::TimedOut { .. }) => HOPELESS / 2,
            Err(_) => 1,
        };
        let failures = planned.failures + weight;
        let act = Act::of(&planned.action);
        let ends_its_kernel =
            |next: &Planned| matches!(&next.action, Action::Delete { kernel } if *kernel == act.kernel);
        if !self.pending.iter().any(ends_its_kernel) {
            self.pending.push_front(Planned { failures, ..planned });
        }
        if round != self.round || self.link.is_none() {
            Settled::Again
        } else if failures >= HOPELESS {
            Settled::Hopeless
        } else {
            Settled::Broken
        }
    }

    /// An acknowledgement, if one is due. Its end is to be told with [`Wiring::has_acked`].
    pub(super) fn acknowledge(&mut self, is_busy: bool) -> Option<BoxFuture<'static, ()>> {
        let behind = self.last_seq - self.acked;
        let much = behind >= ACK_EVERY || self.unacked_bytes >= ACK_BYTES;
        if behind == 0 || is_busy {
            self.ack_due = None;
        } else if self.ack_due.is_none() {
            self.ack_due = Some(Instant::now() + ACK_AFTER);
        }
        let due = self.ack_due.is_some_and(|at| Instant::now() >= at);
        if self.acking || !(due || much) {
            return None;
        }
        let link = self.link.clone()?;
        (self.acking, self.acked, self.unacked_bytes, self.ack_due) = (true, self.last_seq, 0, None);
        let (seq, state) = (self.last_seq, self.starting.state.clone());
        Some(Box::pin(async move {
            // The guest forgets what it is told of here: what could not be committed it is told with the next.
            if let Some(state) = state
                && state.settle().await.is_err()
            {
                return;
            }
            // A link that fails here fails for its event stream too, which tells.
            let _ = link.ack(seq).await;
        }))
    }

    pub(super) fn has_acked(&mut self) {
        self.acking = false;
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.ack_due.filter(|_| !self.acking && self.link.is_some())
    }
}

async fn perform(link: Link, action: Action, starting: Starting) -> Result<Acted, LinkError> {
    match action {
        Action::Start { kernel, kernelspec, cwd } => {
            let start = StartKernel {
                kernel,
                kernelspec,
                transport: starting.transport,
                env: BTreeMap::new(),
                cwd,
                connect_timeout_ms: u64::try_from(starting.connect_timeout.as_millis()).unwrap_or(u64::MAX),
            };
            // The next process must not give this name to another kernel. Without a database that can be written it is lost with this one.
            if let Some(state) = &starting.state
                && let Err(error) = state.settle().await
            {
                tracing::error!(kernel = start.kernel, %error, "a kernel's name could not be kept");
            }
            link.start_kernel(&start).await.map(Acted::Started)
        }
        Action::Delete { kernel } => link.delete_kernel(&kernel).await.map(Acted::Deleted),
        Action::Send { kernel, head, parts } => {
            // What runs code is known to the next process first, which could run it again otherwise, or not know of it.
            if let (Some(state), Some(_)) = (&starting.state, head.cap.filter(|_| !head.is_aside))
                && let Err(error) = state.settle().await
            {
                tracing::error!(execution = head.msg_id, %error, "an execution could not be kept");
                let refusal = Refusal { code: UNKEPT.to_owned(), message: error.to_string(), number: None };
                return Err(LinkError::Refused { attempt: "keep an execution".to_owned(), refusal });
            }
            link.send_message(&kernel, &head, &parts).await.map(|()| Acted::Sent)
        }
        Action::SetUp(init) => link.set_up(&init).await.map(|_| Acted::Sent),
        Action::Signal { kernel, signal } => link.signal(&kernel, signal).await.map(|()| Acted::Sent),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_kernel_overtakes_all_and_drops_what_was_for_it() {
        let starting = Starting { transport: Transport::Ipc, connect_timeout: Duration::ZERO, state: None };
        let mut wiring = Wiring::new(starting, 0);
        let signal = |kernel: &str| Action::Signal { kernel: kernel.to_owned(), signal: "SIGINT" };
        let delete = |kernel: &str| Action::Delete { kernel: kernel.to_owned() };
        wiring.plan(vec![signal("a"), signal("b"), signal("a"), delete("a"), signal("b")]);
        let planned: Vec<Act> = wiring.pending.iter().map(|planned| Act::of(&planned.action)).collect();
        let act = |kernel: &str, kind| Act { kernel: kernel.to_owned(), kind };
        assert_eq!(planned, [act("a", ActKind::Delete), act("b", ActKind::Signal), act("b", ActKind::Signal)]);
    }
}
