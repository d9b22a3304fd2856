use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::domain::execution::Asker;
use crate::kernel::client;
use crate::session::keeping::Keeping;
use crate::session::tap::{Heard, Tap, TapBounds};

const LIMITS: OutputLimits =
    OutputLimits { text_bytes: 1000, result_bytes: 1000, total_bytes: 4000, messages: 100, messages_per_second: 1000 };
const PACE: Pace =
    Pace { boot: Duration::from_secs(5), interrupt_grace: Duration::from_secs(1), queue: Duration::from_secs(30) };

/// Something that happens: asked by callers, told by a guest that may say anything, or the passing of time.
#[derive(Debug, Clone)]
enum Step {
    Execute {
        seconds: u64,
        restarts: bool,
    },
    Cancel(usize),
    Interrupt,
    Restart,
    Ask,
    /// A client that speaks Jupyter says something.
    Pass,
    Connected,
    /// An answer to the newest message but this many.
    Answer {
        back: usize,
        idle: bool,
    },
    Text,
    Exited(Option<i32>),
    Failed,
    Deleted,
    /// The guest would not pass the newest message on.
    Refused {
        gone: bool,
    },
    Wait(u64),
    /// The link was broken for so long.
    Unheard(u64),
    /// Another process takes over.
    NextProcess,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..4u64, any::<bool>()).prop_map(|(seconds, restarts)| Step::Execute { seconds, restarts }),
        1 => (0..4usize).prop_map(Step::Cancel),
        1 => Just(Step::Interrupt),
        1 => Just(Step::Restart),
        1 => Just(Step::Ask),
        1 => Just(Step::Pass),
        3 => Just(Step::Connected),
        8 => (0..4usize, any::<bool>()).prop_map(|(back, idle)| Step::Answer { back, idle }),
        1 => Just(Step::Text),
        1 => proptest::option::of(0..3i32).prop_map(Step::Exited),
        1 => Just(Step::Failed),
        3 => Just(Step::Deleted),
        1 => any::<bool>().prop_map(|gone| Step::Refused { gone }),
        2 => (0..4000u64).prop_map(Step::Wait),
        2 => (0..60_000u64).prop_map(Step::Unheard),
        2 => Just(Step::NextProcess),
    ];
    proptest::collection::vec(step, 0..80)
}

fn making() -> Making {
    Making {
        place: Place { keeping: Keeping::nothing(), ..Place::for_tests() },
        pace: PACE,
        max_queue: 4,
        kernelspec: None,
        cwd: None,
        setup: Arc::from(["setup".to_owned()]),
        setup_output: LIMITS,
        on_kernel_death: OnKernelDeath::Restart,
        is_default: true,
        is_unclaimed: false,
    }
}

/// A message of a client that nothing is known of but its type.
fn aside(msg_type: &str) -> Aside {
    let header = json!({"msg_id": "theirs", "msg_type": msg_type, "session": "s"}).to_string();
    let header = client::ClientHeader::read(header.as_bytes()).expect("a header");
    let [metadata, content] = [(); 2].map(|()| Bytes::from_static(b"{}"));
    Aside { asker: Asker::Nameless(1), channel: Channel::Shell, header, metadata, content, buffers: Vec::new() }
}

/// A context with a guest that does what it is told, and what has been told so far.
struct World {
    context: Context,
    now: Instant,
    executions: Vec<Arc<Execution>>,
    sent: Vec<(String, Outbound)>,
    deletes: Vec<String>,
    started: BTreeSet<String>,
    failed: bool,
}

impl World {
    fn new() -> Self {
        Self::with(|making, now| {
            let mut context = Context::new(making);
            context.boot(now, PACE.boot);
            context
        })
    }

    /// One whose context is of an earlier process, with a kernel that has nothing to do.
    fn adopted() -> Self {
        Self::with(|making, now| {
            let record = ContextRecord {
                born: 1,
                is_ready: true,
                ..ContextRecord::new(making.place.context, Timestamp::now(), None)
            };
            Context::adopt(making, record, now)
        })
    }

    /// What the context leaves is all that the next one knows.
    fn next_process(&mut self) {
        let (record, running) = (self.context.record(), self.context.running_record(|_| Timestamp::now()));
        self.context.leave();
        self.context = Context::adopt(making(), record, self.now);
        for execution in self.executions.iter_mut().filter(|e| !e.status().is_final()) {
            let kept = running.as_ref().filter(|(id, _)| *id == execution.id).map(|(_, kept)| kept.clone());
            *execution = Arc::new(Execution::restore(execution.left(), kept.as_ref(), Keeping::nothing(), None));
            let until = (execution.status() == Status::Running).then(|| self.now + execution.request.timeout);
            self.context.take_over(Arc::clone(execution), kept, until, self.now);
        }
        self.context.is_linked(self.now, Duration::ZERO);
    }

    fn with(make: impl FnOnce(Making, Instant) -> Context) -> Self {
        let now = Instant::now();
        let context = make(making(), now);
        let (executions, sent, deletes) = (Vec::new(), Vec::new(), Vec::new());
        Self { context, now, executions, sent, deletes, started: BTreeSet::new(), failed: false }
    }

    fn take(&mut self) {
        let (actions, notices) = self.context.take();
        for action in actions {
            match action {
                Action::Start { kernel, .. } => assert!(self.started.insert(kernel), "a kernel's name is used once"),
                Action::Delete { kernel } => self.deletes.push(kernel),
                Action::Send { kernel, head, .. } => self.sent.push((kernel, head)),
                Action::Signal { .. } | Action::SetUp(_) => {}
            }
        }
        self.failed |= notices.iter().any(|n| matches!(n, Notice::BootFailed(_) | Notice::SetupFailed(_)));
        let running = self.executions.iter().filter(|e| e.status() == Status::Running).count();
        assert!(running <= 1, "one after another");
    }

    fn tell(&mut self, event: Event, content: &str) {
        let kernel = self.context.kernel.clone();
        let parts = ["{}", "{}", "{}", content].map(|part| Bytes::copy_from_slice(part.as_bytes()));
        self.context.on_event(&kernel, event, &parts, self.now);
    }

    fn message(&mut self, channel: Channel, msg_type: &str, parent_id: &str, content: &str) {
        let (msg_type, parent_id) = (msg_type.to_owned(), parent_id.to_owned());
        self.tell(Event::Message { channel, msg_type, parent_id }, content);
    }

    /// A kernel's answer to a message, and its status after it.
    fn answer(&mut self, id: &str, is_idle: bool) {
        let is_execution = self.executions.iter().any(|e| e.id.to_string() == id) || id.starts_with("exe");
        let msg_type = if is_execution { "execute_reply" } else { "kernel_info_reply" };
        self.message(Channel::Shell, msg_type, id, r#"{"status":"ok","execution_count":1}"#);
        if is_idle {
            self.message(Channel::Iopub, "status", id, r#"{"execution_state":"idle"}"#);
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Execute { seconds, restarts } => {
                let request = ExecutionRequest {
                    timeout: Duration::from_secs(seconds),
                    on_timeout: if restarts { OnTimeout::Restart } else { OnTimeout::Interrupt },
                    ..ExecutionRequest::for_tests(LIMITS)
                };
                self.executions.extend(self.context.enqueue(fresh(), request, self.now).ok());
            }
            Step::Cancel(back) => {
                let id = self.executions.iter().rev().nth(back).map(|e| e.id);
                id.into_iter().for_each(|id| self.context.cancel(id, self.now));
            }
            Step::Interrupt => self.context.interrupt(self.now),
            Step::Restart => self.context.restart(self.now),
            Step::Ask => drop(self.context.ask("complete_request", &json!({}), oneshot::channel().0)),
            Step::Pass => drop(self.context.pass(aside("kernel_info_request"), self.now)),
            Step::Connected => self.tell(Event::KernelConnected, ""),
            Step::Answer { back, idle } => {
                let id = self.sent.iter().rev().nth(back).map(|(_, head)| head.msg_id.clone());
                id.into_iter().for_each(|id| self.answer(&id, idle));
            }
            Step::Text => {
                let running = self.executions.iter().find(|e| e.status() == Status::Running);
                let id = running.map(|e| e.id.to_string()).unwrap_or_default();
                self.message(Channel::Iopub, "stream", &id, r#"{"name":"stdout","text":"x"}"#);
            }
            Step::Exited(status) => {
                let signal = status.is_none().then_some(9);
                let stderr_tail = String::new();
                self.tell(Event::KernelExited { status, signal, oom_kills: 0, swept: false, stderr_tail }, "");
            }
            Step::Failed => {
                let (reason, stderr_tail) = (String::new(), String::new());
                self.tell(Event::KernelFailed { channel: None, reason, stderr_tail }, "");
            }
            Step::Deleted => self.delete(),
            Step::Refused { gone } => {
                let Some((kernel, head)) = self.sent.last().cloned() else { return };
                let code = if gone { "not-found" } else { "busy" }.to_owned();
                let act = Act { kernel, kind: ActKind::Send(head.msg_id) };
                self.context.on_refusal(&act, &Refusal { code, message: String::new(), number: None }, self.now);
            }
            Step::Wait(milliseconds) => {
                self.now += Duration::from_millis(milliseconds);
                self.context.on_time(self.now);
            }
            Step::Unheard(milliseconds) => {
                let unheard = Duration::from_millis(milliseconds);
                self.now += unheard;
                self.context.is_linked(self.now, unheard);
            }
            Step::NextProcess => self.next_process(),
        }
        self.take();
    }

    fn delete(&mut self) {
        for kernel in std::mem::take(&mut self.deletes) {
            self.context.on_deleted(&kernel, KernelDeleted::default(), Vec::new(), self.now);
        }
        self.take();
    }

    /// The guest does its part from now on, and the kernels boot; they answer no code.
    fn come_to_rest(&mut self) {
        for _ in 0..200 {
            self.delete();
            self.tell(Event::KernelConnected, "");
            let infos: Vec<String> = self.sent.iter().map(|(_, head)| head.msg_id.clone()).collect();
            infos.iter().filter(|id| id.contains("-info")).for_each(|id| self.answer(id, true));
            if self.failed || self.executions.iter().all(|e| e.status().is_final()) {
                return;
            }
            if let Some(next) = self.context.next_deadline() {
                self.now = self.now.max(next);
                self.context.on_time(self.now);
            }
            self.take();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn every_execution_ends_whatever_happens(is_new in any::<bool>(), steps in steps()) {
        let mut world = if is_new { World::new() } else { World::adopted() };
        world.take();
        for step in steps {
            world.step(step);
            if world.failed { break; }
        }
        world.come_to_rest();
        if world.failed {
            // The session ends, or the context goes.
            world.context.settle(Status::Cancelled, StopStep::End, "its session ended");
        }
        for execution in &world.executions {
            prop_assert!(execution.status().is_final(), "{:?}: {:?}", execution.status(), world.context);
            let events = execution.events_after(0);
            let completed = events.iter().filter(|logged| logged.event == ExecutionEvent::Completed).count();
            prop_assert_eq!(completed, 1);
            prop_assert_eq!(&events[events.len() - 1].event, &ExecutionEvent::Completed);
            let begun = events.iter().filter(|logged| logged.event == ExecutionEvent::Started).count();
            prop_assert!(begun <= 1);
        }
    }
}

/// A context whose kernel is up.
fn ready() -> World {
    let mut world = World::new();
    world.take();
    world.step(Step::Connected);
    let info = world.sent[0].1.msg_id.clone();
    world.message(Channel::Iopub, "status", &info, r#"{"execution_state":"idle"}"#);
    world.answer(&info, true);
    world.take();
    let setup = world.sent.last().unwrap().1.msg_id.clone();
    world.answer(&setup, true);
    world.take();
    assert!(world.context.is_up(), "{:?}", world.context);
    world
}

#[test]
fn a_kernel_that_lost_the_question_too_is_asked_again() {
    let mut world = ready();
    world.step(Step::Execute { seconds: 100, restarts: false });
    world.step(Step::Interrupt);
    let probes = |world: &World| world.sent.iter().filter(|(_, head)| head.msg_id.contains("-probe")).count();
    for (wait, expected) in [(1000, 1), (1999, 1), (1, 2), (4000, 3)] {
        world.step(Step::Wait(wait));
        world.step(Step::Wait(0));
        assert_eq!(probes(&world), expected, "after {wait} ms more");
    }
    let last = world.sent.iter().rev().find(|(_, head)| head.msg_id.contains("-probe")).unwrap().1.msg_id.clone();
    world.answer(&last, true);
    assert_eq!(world.executions[0].status(), Status::Error);
}

#[test]
fn a_kernel_that_says_nothing_more_after_an_interrupt_is_replaced_before_anything_is_sent_to_it() {
    let mut world = ready();
    world.step(Step::Execute { seconds: 1, restarts: false });
    world.step(Step::Execute { seconds: 100, restarts: false });
    world.step(Step::Wait(1000));
    let [first, second] = [0, 1].map(|at| world.executions[at].id.to_string());
    let kernel = world.context.kernel.clone();
    world.answer(&first, true);
    world.take();
    assert_eq!(world.executions[0].status(), Status::Timeout);
    let was_sent = |world: &World| world.sent.iter().any(|(_, head)| head.msg_id == second);
    for wait in [1000, 2000, 4000] {
        world.step(Step::Wait(wait));
        assert!(!was_sent(&world) && world.deletes.is_empty(), "after {wait} ms more");
    }
    world.step(Step::Wait(3000));
    assert_eq!(world.deletes, [kernel]);
    world.delete();
    let info = world.sent.last().unwrap().1.msg_id.clone();
    world.step(Step::Connected);
    world.answer(&info, true);
    world.take();
    let setup = world.sent.last().unwrap().1.msg_id.clone();
    world.answer(&setup, true);
    world.take();
    assert!(was_sent(&world), "{:?}", world.context);
    let is_told = |logged: &Arc<crate::session::execution::Logged>| matches!(&logged.event, ExecutionEvent::KernelRestarted { cause } if *cause == RestartCause::Timeout);
    assert!(world.executions[1].events_after(0).iter().any(is_told));
}

#[test]
fn what_clients_ask_after_an_interrupt_waits_until_the_kernel_has_dealt_with_it() {
    let mut world = ready();
    world.step(Step::Execute { seconds: 1, restarts: false });
    world.step(Step::Wait(1000));
    let first = world.executions[0].id.to_string();
    world.answer(&first, true);
    world.take();
    world.context.pass(aside("complete_request"), world.now).unwrap();
    let (answer, _answered) = oneshot::channel();
    world.context.ask("complete_request", &json!({}), answer).unwrap();
    let is_asked = |head: &Outbound| head.is_aside || head.msg_id.contains("-ask");
    let asides = |world: &World| world.sent.iter().filter(|(_, head)| is_asked(head)).count();
    world.step(Step::Wait(1000));
    world.take();
    assert_eq!(asides(&world), 0);
    let probe = world.sent.last().unwrap().1.msg_id.clone();
    world.answer(&probe, true);
    world.take();
    assert_eq!((asides(&world), world.deletes.len()), (2, 0));
    world.context.pass(aside("complete_request"), world.now).unwrap();
    world.take();
    assert_eq!(asides(&world), 3);
}

#[test]
fn an_interrupt_before_the_kernel_is_at_its_code_is_said_again() {
    let interrupts = |world: &World| {
        let sent = world.sent.iter().filter(|(_, head)| head.channel == Channel::Control);
        sent.cloned().collect::<Vec<_>>()
    };
    let answer = |world: &mut World| {
        let (kernel, Outbound { msg_id, .. }) = interrupts(world).pop().unwrap();
        world.message(Channel::Control, "interrupt_reply", &msg_id, r#"{"status": "ok"}"#);
        world.context.on_sent(&Act { kernel, kind: ActKind::Send(msg_id) });
        world.take();
    };
    for is_early in [true, false] {
        let expected = 1 + usize::from(is_early);
        let mut world = ready();
        world.step(Step::Execute { seconds: 100, restarts: false });
        let id = world.executions[0].id.to_string();
        let echo = r#"{"code": "x", "execution_count": 1}"#;
        if !is_early {
            world.message(Channel::Iopub, "execute_input", &id, echo);
        }
        world.step(Step::Cancel(0));
        answer(&mut world);
        // A signal follows what may have hit nothing, if the kernel does not come to its code.
        let due = PACE.interrupt_grace / if is_early { 2 } else { 1 };
        assert_eq!(world.context.next_deadline(), Some(world.now + due));
        world.message(Channel::Iopub, "execute_input", &id, echo);
        world.take();
        assert_eq!(interrupts(&world).len(), expected);
        answer(&mut world);
        assert_eq!(
            world.context.next_deadline(),
            Some(world.now + PACE.interrupt_grace),
            "no signal into what cleans up"
        );
    }
}

#[test]
fn a_request_that_the_kernel_has_lost_is_not_waited_for() {
    let probes = |world: &World| world.sent.iter().filter(|(_, head)| head.msg_id.contains("-probe")).count();
    for begins in [true, false] {
        let mut world = ready();
        world.step(Step::Execute { seconds: 100, restarts: false });
        let id = world.executions[0].id.to_string();
        if begins {
            world.message(Channel::Iopub, "status", &id, r#"{"execution_state":"busy"}"#);
        }
        world.step(Step::Wait(5000));
        assert_eq!(probes(&world), usize::from(!begins));
        if begins {
            continue;
        }
        let probe = world.sent.last().unwrap().1.msg_id.clone();
        world.answer(&probe, true);
        assert_eq!(world.executions[0].status(), Status::Error);
    }
}

#[test]
fn time_in_which_nothing_could_be_sent_is_not_that_of_the_code() {
    const GAP: u64 = 60_000;
    let mut world = ready();
    world.step(Step::Execute { seconds: 30, restarts: true });
    // It was not sent.
    world.step(Step::Unheard(GAP));
    world.step(Step::Wait(29_000));
    assert_eq!((world.executions[0].status(), world.deletes.len()), (Status::Running, 0));
    // It was, and had its time.
    let (kernel, head) = world.sent.last().cloned().unwrap();
    world.context.on_sent(&Act { kernel, kind: ActKind::Send(head.msg_id) });
    world.step(Step::Unheard(GAP));
    world.step(Step::Wait(4_000));
    assert_eq!(world.deletes.len(), 0, "what it has said meanwhile is on its way");
    world.step(Step::Wait(2_000));
    assert_eq!(world.deletes.len(), 1);
    // A kernel that boots is not late for it either, nor is what prepares it.
    world.delete();
    world.step(Step::Unheard(GAP));
    world.step(Step::Wait(4_000));
    world.step(Step::Connected);
    let info = world.sent.iter().rev().find(|(_, head)| head.msg_id.contains("-info")).unwrap().1.msg_id.clone();
    world.answer(&info, true);
    world.take();
    assert!(!world.failed, "{:?}", world.context);
    world.step(Step::Unheard(GAP));
    world.step(Step::Wait(900));
    assert!(!world.failed && !world.context.is_up(), "{:?}", world.context);
}

#[test]
fn code_that_could_not_be_committed_is_not_run_and_what_was_taken_over_is_sent_again() {
    let mut world = ready();
    world.step(Step::Execute { seconds: 1, restarts: false });
    world.step(Step::Execute { seconds: 1, restarts: false });
    let unkept = |world: &mut World| {
        let (kernel, head) = world.sent.last().cloned().unwrap();
        let refusal = Refusal { code: UNKEPT.to_owned(), message: String::new(), number: None };
        world.context.on_refusal(&Act { kernel, kind: ActKind::Send(head.msg_id) }, &refusal, world.now);
        world.take();
    };
    unkept(&mut world);
    let statuses = |world: &World| world.executions.iter().map(|e| e.status()).collect::<Vec<_>>();
    assert_eq!(statuses(&world), [Status::Lost, Status::Running], "the next one may be kept");
    world.step(Step::NextProcess);
    let before = world.sent.len();
    unkept(&mut world);
    assert_eq!(statuses(&world), [Status::Lost, Status::Running]);
    assert_eq!((world.sent.len(), &world.sent[before].1.msg_id), (before + 1, &world.executions[1].id.to_string()));
}

#[test]
fn code_that_a_dead_kernel_did_not_take_runs_in_the_next() {
    let mut world = ready();
    world.step(Step::Execute { seconds: 1, restarts: false });
    world.step(Step::Refused { gone: true });
    world.step(Step::Exited(Some(3)));
    world.delete();
    let execution = Arc::clone(&world.executions[0]);
    assert_eq!(execution.status(), Status::Running);
    let first = world.sent.iter().rposition(|(_, head)| head.msg_id == execution.id.to_string()).unwrap();
    world.step(Step::Connected);
    let info = world.sent.last().unwrap().1.msg_id.clone();
    world.message(Channel::Iopub, "status", &info, r#"{"execution_state":"idle"}"#);
    world.answer(&info, true);
    world.take();
    let setup = world.sent.last().unwrap().1.msg_id.clone();
    world.answer(&setup, true);
    world.take();
    let again = world.sent.iter().rposition(|(_, head)| head.msg_id == execution.id.to_string()).unwrap();
    assert!(again > first && world.sent[again].0 != world.sent[first].0);
    world.answer(&execution.id.to_string(), true);
    let outcome = execution.outcome();
    assert_eq!(outcome.status, Status::Ok);
    assert_eq!(outcome.restarted, Some(RestartCause::Died { status: Some(3), signal: None }));
}

#[test]
fn what_runs_goes_on_with_the_next_process_and_what_waits_comes_after_it() {
    let mut world = ready();
    world.step(Step::Execute { seconds: 1, restarts: false });
    world.step(Step::Execute { seconds: 1, restarts: false });
    let ids: Vec<String> = world.executions.iter().map(|e| e.id.to_string()).collect();
    world.message(Channel::Iopub, "stream", &ids[0], r#"{"name":"stdout","text":"before"}"#);
    world.message(Channel::Shell, "execute_reply", &ids[0], r#"{"status":"ok","execution_count":5}"#);
    world.step(Step::NextProcess);
    // It is sent again, and the guest has it already.
    let (kernel, head) = world.sent.last().cloned().unwrap();
    assert_eq!(head.msg_id, ids[0]);
    let act = Act { kernel, kind: ActKind::Send(head.msg_id) };
    let refusal = Refusal { code: "exists".to_owned(), message: String::new(), number: None };
    world.context.on_refusal(&act, &refusal, world.now);
    world.message(Channel::Iopub, "stream", &ids[0], r#"{"name":"stdout","text":" and after"}"#);
    world.message(Channel::Iopub, "status", &ids[0], r#"{"execution_state":"idle"}"#);
    let outcome = world.executions[0].outcome();
    assert_eq!((outcome.status, outcome.execution_count), (Status::Ok, Some(5)));
    assert_eq!(outcome.stdout, "before and after");
    let seqs: Vec<u64> = world.executions[0].events_after(0).iter().map(|logged| logged.seq).collect();
    assert_eq!(seqs, (1..=5).collect::<Vec<_>>());
    world.take();
    assert_eq!(world.sent.last().unwrap().1.msg_id, ids[1]);
    assert_eq!(world.executions[1].status(), Status::Running);
}

#[test]
fn what_was_taken_over_from_a_kernel_that_is_gone_ends_as_it_did_there_and_runs_nowhere_else() {
    for ended in [true, false] {
        let mut world = ready();
        world.step(Step::Execute { seconds: 1, restarts: false });
        world.step(Step::NextProcess);
        // The kernel has ended meanwhile, of which nothing has been heard yet.
        world.step(Step::Refused { gone: true });
        let execution = Arc::clone(&world.executions[0]);
        let id = execution.id.to_string();
        world.message(Channel::Iopub, "stream", &id, r#"{"name":"stdout","text":"there"}"#);
        if ended {
            world.answer(&id, true);
        }
        world.step(Step::Exited(Some(3)));
        world.delete();
        let expected = if ended { Status::Ok } else { Status::KernelDied };
        assert_eq!((execution.status(), execution.outcome().stdout.as_str()), (expected, "there"));
        let kernel = world.context.kernel.clone();
        assert!(!world.sent.iter().any(|(to, head)| *to == kernel && head.msg_id == id));
    }
}

#[test]
fn a_line_that_may_not_have_been_sent_is_sent_again_under_the_same_id() {
    let mut world = ready();
    let stdin = Stdin::Lines(vec!["one".to_owned(), "two".to_owned()]);
    let request = ExecutionRequest { stdin, ..ExecutionRequest::for_tests(LIMITS) };
    world.executions.extend(world.context.enqueue(fresh(), request, world.now).ok());
    world.take();
    let id = world.executions[0].id.to_string();
    world.message(Channel::Stdin, "input_request", &id, r#"{"prompt":"?","password":false}"#);
    world.take();
    let first = world.sent.last().cloned().unwrap().1.msg_id;
    assert!(first.contains("-line"));
    world.step(Step::NextProcess);
    assert_eq!(world.sent.last().unwrap().1.msg_id, first);
    let kernel = world.context.kernel.clone();
    world.context.on_sent(&Act { kernel, kind: ActKind::Send(first) });
    let running = world.context.running_record(|_| Timestamp::now()).unwrap().1;
    assert_eq!((running.lines_given, running.asked), (1, None), "the guest has it");
}

#[test]
fn what_was_being_stopped_is_stopped_by_the_next_process() {
    let mut world = ready();
    world.step(Step::Execute { seconds: 1, restarts: false });
    world.step(Step::Wait(1000));
    assert!(world.sent.last().unwrap().1.msg_id.contains("-int"));
    world.step(Step::NextProcess);
    assert!(world.sent.last().unwrap().1.msg_id.contains("-int"));
    // What the interrupt has brought about may be on its way.
    world.step(Step::Wait(CATCH_UP.as_millis() as u64 + 100));
    world.step(Step::Wait(0));
    world.step(Step::Wait(0));
    assert_eq!(world.deletes.len(), 1);
    // The kernel is being replaced, and that is not forgotten either.
    world.step(Step::NextProcess);
    world.delete();
    let outcome = world.executions[0].outcome();
    assert_eq!((outcome.status, outcome.restarted), (Status::Timeout, Some(RestartCause::Timeout)));
}

#[test]
fn a_refused_question_costs_nobody_else_anything_and_questions_have_bounds() {
    let mut world = ready();
    world.step(Step::Execute { seconds: 1, restarts: false });
    world.step(Step::Ask);
    world.step(Step::Refused { gone: false });
    assert_eq!(world.executions[0].status(), Status::Running);
    let asked = |world: &mut World, bytes: usize| {
        let content = json!({"code": "x".repeat(bytes)});
        world.context.ask("complete_request", &content, oneshot::channel().0).is_ok()
    };
    let accepted = (0..1000).filter(|_| asked(&mut world, 1)).count();
    assert_eq!(accepted, MAX_QUESTIONS, "nobody waits for them any more, and the kernel still has them");
    let mut other = ready();
    assert!(asked(&mut other, MAX_QUESTION_BYTES / 2));
    assert!(!asked(&mut other, MAX_QUESTION_BYTES / 2));
}

#[tokio::test]
async fn clients_hear_what_is_theirs_under_their_own_header_and_nothing_of_ours() {
    let mut world = ready();
    let tap = Tap::new(TapBounds { bytes: 1 << 20, time: Duration::from_secs(60) });
    world.context.making.place.tap = Some(Arc::clone(&tap));
    let (mut asks, mut other) = (tap.listen(None, 9).unwrap(), tap.listen(None, 9).unwrap());
    world.step(Step::Ask);
    world.take();
    let own = world.sent.last().unwrap().1.msg_id.clone();
    world.answer(&own, true);
    let theirs = Aside { asker: asks.asker.clone(), ..aside("kernel_info_request") };
    let header = theirs.header.text.0.clone();
    world.context.pass(theirs, world.now).unwrap();
    world.take();
    let passed = world.sent.last().unwrap().1.clone();
    assert!(passed.is_aside && passed.msg_id != "theirs", "{passed:?}");
    world.answer(&passed.msg_id, true);
    world.message(Channel::Shell, "kernel_info_reply", "stranger", "{}");
    world.message(Channel::Iopub, "comm_msg", "stranger", "{}");
    let types = |heard: Heard| match heard {
        Heard::Messages(messages, _) => {
            messages.iter().map(|m| (m.msg_type.clone(), m.parts[1].clone())).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let heard = types(asks.hear(usize::MAX).await);
    let told = |msg_type: &str, parent: &str| (msg_type.to_owned(), Bytes::from(parent.to_owned()));
    assert_eq!(heard, [told("kernel_info_reply", &header), told("status", &header), told("comm_msg", "{}")]);
    assert_eq!(types(other.hear(usize::MAX).await), heard[1..]);
    assert!(world.context.asides.are_quiet());

    // What comes while there is no kernel goes to the next one, and there is an end to what is taken.
    world.step(Step::Restart);
    world.take();
    let before = world.sent.len();
    let accepted = (0..1000).filter(|_| world.context.pass(aside("comm_info_request"), world.now).is_ok()).count();
    world.take();
    assert_eq!((world.sent.len(), accepted > 0, accepted < 100), (before, true, true));
    world.delete();
    world.take();
    let kernel = world.context.kernel.clone();
    let sent = world.sent[before..].iter().filter(|(to, head)| *to == kernel && head.is_aside).count();
    assert_eq!(sent, accepted);
    // One that the guest does not take is answered.
    world.step(Step::Refused { gone: false });
    let refused = types(asks.hear(usize::MAX).await);
    assert!(refused.iter().any(|(msg_type, _)| msg_type == "status"), "{refused:?}");
}
