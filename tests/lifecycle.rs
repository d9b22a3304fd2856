//! Sessions and executions against an engine that can be told to fail: what happens when it does. No containers; the same contract
//! suite that Docker passes holds the fake to the truth.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/bench.rs"]
mod bench;
#[path = "support/engine_fake.rs"]
mod engine_fake;
#[path = "support/engine_suite.rs"]
mod engine_suite;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bench::{Bench, INSTANCE, NEVER, bounded, cell_of};
use cellblock::domain::lifecycle::{EndReason, Phase};
use cellblock::domain::output::{RestartCause, Status, StopStep};
use cellblock::domain::spec::{OnExpiry, OnGuestLost, OnIdle, OnKernelDeath, SessionRequest};
use cellblock::engine::{CellName, CellState, Engine, EngineError};
use cellblock::service::keys::Principal;
use cellblock::service::{Error, ExecuteRequest};
use cellblock::session::execution::OnTimeout;
use cellblock::session::reconcile::{Reconciler, Report};
use cellblock::session::registry::{AfterDrain, Created};
use cellblock::session::{Refused, Session, StartFault, fresh};
use cellblock::store::state::{AuditQuery, State};
use engine_fake::{FakeEngine, Faults, IMAGE};
use tokio_util::sync::CancellationToken;

async fn end_of(session: &Session) -> EndReason {
    match bounded(session.wait_for(|s| matches!(s.phase, Phase::Ended(_)))).await.phase {
        Phase::Ended(reason) => reason,
        phase => panic!("{phase:?}"),
    }
}

#[tokio::test]
async fn the_fake_keeps_the_contract_of_engines() {
    let engine = Arc::new(FakeEngine::new(INSTANCE));
    let killed = Arc::clone(&engine);
    let kill = move |name: CellName| -> futures_util::future::BoxFuture<'static, ()> {
        let engine = Arc::clone(&killed);
        Box::pin(async move { engine.kill(&name) })
    };
    let subject = engine_suite::Subject {
        engine: engine.as_ref(),
        operator: engine.as_ref(),
        instance: INSTANCE,
        image: IMAGE,
        kill: &kill,
    };
    engine_suite::run(&subject).await;
}

#[tokio::test]
async fn code_runs_and_the_session_ends_without_a_trace() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let execution = bench.run(&session, "print hello", 5.0).await;
    assert_eq!((execution.status(), execution.outcome().stdout.as_str()), (Status::Ok, "hello"));
    assert_eq!(bench.run(&session, "raise", 5.0).await.status(), Status::Error);
    let deleted = bounded(bench.service.delete_session(&bench.who, session.id)).await.unwrap();
    assert_eq!(deleted.phase(), Phase::Ended(EndReason::Deleted));
    assert_eq!(bench.cells().await, 0);
    let refused = bench.start(&session, "hello", 1.0).await.unwrap_err();
    assert_eq!(refused, Error::SessionEnded(EndReason::Deleted));
}

#[tokio::test]
async fn an_answer_never_reaches_another_execution() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let execution = bench.run(&session, "foreign", 5.0).await;
    assert_eq!((execution.status(), execution.outcome().stdout.as_str()), (Status::Ok, ""));
}

#[tokio::test]
async fn a_failed_start_says_why_and_leaves_no_cell() {
    type Break = fn(&mut Faults);
    let table: [(Break, StartFault); 5] = [
        (|f| f.ensure_fails = true, StartFault::EngineUnavailable),
        (|f| f.unverified = true, StartFault::Unverified),
        (|f| f.kernel_dies = true, StartFault::KernelFailed),
        (|f| f.kernel_stalls = true, StartFault::TimedOut),
        (|f| f.guest_silent = true, StartFault::TimedOut),
    ];
    for (fault, expected) in table {
        let bench = Bench::with(|settings, _| settings.start_timeout = Duration::from_secs(1));
        bench.engine.faults(fault);
        let Err(Error::StartFailed(failure)) = bench.create().await else { panic!("{expected:?}: it started") };
        let kernel_gave_up = failure.fault == StartFault::KernelFailed && expected == StartFault::TimedOut;
        assert!(failure.fault == expected || kernel_gave_up, "{failure:?}");
        assert_eq!(bench.cells().await, 0, "{expected:?}");
        if expected == StartFault::Unverified {
            assert_eq!(bench.engine.kernels_started(), 0, "nothing may run in a cell that is not confined");
        }
        if expected == StartFault::KernelFailed {
            assert!(failure.detail.contains("the last words"), "{failure:?}");
        }
    }
}

#[tokio::test]
async fn a_session_that_ends_while_the_engine_is_asked_waits_for_the_answer() {
    let bench = Bench::new();
    bench.engine.faults(|f| f.ensure_takes = Duration::from_millis(400));
    let created = bench.service.create_session(&bench.who, &SessionRequest::default(), false, None).await.unwrap();
    let Created::New(session) = created else { panic!("not new") };
    session.end(EndReason::Deleted);
    bounded(session.wait_for(|s| matches!(s.phase, Phase::Aborting(EndReason::Deleted)))).await;
    assert_eq!(end_of(&session).await, EndReason::Deleted);
    assert_eq!(bench.cells().await, 0, "the cell that was made meanwhile is gone");
}

#[tokio::test]
async fn a_removal_is_tried_until_the_cell_is_gone() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    bench.engine.faults(|f| f.removals_fail = 2);
    session.end(EndReason::Deleted);
    assert_eq!(end_of(&session).await, EndReason::Deleted);
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn a_caller_that_goes_away_changes_nothing() {
    let bench = Bench::new();
    bench.engine.faults(|f| f.ensure_takes = Duration::from_millis(300));
    let request = SessionRequest { name: Some("kept".to_owned()), ..SessionRequest::default() };
    let creating = bench.service.create_session(&bench.who, &request, true, None);
    assert!(tokio::time::timeout(Duration::from_millis(50), creating).await.is_err(), "it was too quick to be left");
    let [session] = bench
        .service
        .list_sessions(&bench.who, &cellblock::service::Filter::default(), None)
        .unwrap()
        .try_into()
        .unwrap();
    bounded(session.wait_for(|s| s.phase == Phase::Ready)).await;
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
}

#[tokio::test]
async fn a_time_limit_interrupts_and_code_that_ignores_it_loses_its_kernel() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let heeding = bench.run(&session, "hang", 0.1).await;
    assert_eq!((heeding.status(), heeding.outcome().restarted), (Status::Timeout, None));
    let ignoring = bench.run(&session, "hang hard", 0.1).await;
    assert_eq!(ignoring.status(), Status::Timeout);
    assert!(ignoring.outcome().restarted.is_some());
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
}

#[tokio::test]
async fn a_dead_kernel_is_replaced_and_the_queue_goes_on() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let dying = bench.start(&session, "die", 5.0).await.unwrap();
    let waiting = bench.start(&session, "hello", 5.0).await.unwrap();
    bounded(async { tokio::join!(dying.ended(), waiting.ended()) }).await;
    assert_eq!((dying.status(), waiting.status()), (Status::KernelDied, Status::Ok));
}

#[tokio::test]
async fn a_kernel_that_is_leaving_gets_nothing_more() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let leaving = bench.start(&session, "leave", 5.0).await.unwrap();
    let next = bench.start(&session, "hello", 5.0).await.unwrap();
    bounded(async { tokio::join!(leaving.ended(), next.ended()) }).await;
    assert_eq!((leaving.status(), next.status()), (Status::Ok, Status::Ok));
    assert!(leaving.outcome().restarted.is_some());
    assert_eq!(bench.engine.kernels_started(), 2);
}

#[tokio::test]
async fn asking_again_puts_nothing_off() {
    let bench = Bench::with(|settings, _| settings.interrupt_grace = Duration::from_millis(500));
    let session = bench.create().await.unwrap();
    let running = bench.start(&session, "hang hard", 10.0).await.unwrap();
    let began = std::time::Instant::now();
    while !running.status().is_final() {
        bench.service.cancel(&bench.who, running.id).unwrap();
        bench.service.interrupt(&bench.who, session.id, None).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(began.elapsed() < Duration::from_secs(5), "cancelling it again and again keeps it alive");
    }
    assert_eq!(running.status(), Status::Cancelled);
}

#[tokio::test]
async fn what_is_asked_has_a_bound_in_bytes() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let code = "x".repeat(cellblock::service::MAX_CODE + 1);
    let Err(Error::SpecRejected(fields)) = bench.start(&session, &code, 5.0).await else { panic!("it was accepted") };
    assert_eq!(fields[0].pointer, "/code");
    let values = (0..9).map(|n| (format!("V{n}"), "x".repeat(32 * 1024)));
    let request = SessionRequest { env: values.collect(), ..SessionRequest::default() };
    let refused = bench.service.create_session(&bench.who, &request, true, None).await.unwrap_err();
    assert!(matches!(&refused, Error::SpecRejected(fields) if fields[0].pointer == "/env"), "{refused:?}");
}

#[tokio::test]
async fn the_environment_is_not_kept_with_a_session() {
    let bench = Bench::new();
    let env = BTreeMap::from([("SECRET".to_owned(), "x".to_owned())]);
    let request = SessionRequest { env, ..SessionRequest::default() };
    let created = bench.service.create_session(&bench.who, &request, true, None).await.unwrap();
    let (Created::New(session) | Created::Reused(session)) = created;
    assert!(session.spec.env.is_empty());
}

#[tokio::test]
async fn the_queue_has_an_end_in_length_and_in_time() {
    let bench = Bench::with(|settings, _| settings.queue_timeout = Duration::from_millis(200));
    let session = bench.create().await.unwrap();
    let running = bench.start(&session, "hang", 2.0).await.unwrap();
    let mut waiting = Vec::new();
    for _ in 0..3 {
        waiting.push(bench.start(&session, "hello", 5.0).await.unwrap());
    }
    assert_eq!(bench.start(&session, "hello", 5.0).await.unwrap_err(), Error::QueueFull);
    for execution in waiting {
        bounded(execution.ended()).await;
        assert_eq!(execution.status(), Status::Timeout, "it waited too long");
    }
    assert_eq!(running.status(), Status::Running, "what runs is not disturbed");
    bench.service.cancel(&bench.who, running.id).unwrap();
    bounded(running.ended()).await;
    assert_eq!(running.status(), Status::Cancelled);
}

#[tokio::test]
async fn a_guest_that_is_gone_ends_the_session_as_lost() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let running = bench.start(&session, "hang", 5.0).await.unwrap();
    bench.engine.kill(&CellName::new(INSTANCE, session.id, 1));
    assert_eq!(end_of(&session).await, EndReason::Lost);
    assert_eq!(running.status(), Status::Lost);
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn idle_and_lifetime_end_a_session_but_work_is_not_idle() {
    let bench = Bench::with(|_, template| template.default_timeouts.idle = Duration::from_millis(300));
    let idle = bench.create().await.unwrap();
    let busy = bench.create().await.unwrap();
    let work = bench.start(&busy, "hang", 1.5).await.unwrap();
    assert_eq!(end_of(&idle).await, EndReason::Idle);
    assert_eq!((busy.phase(), work.status()), (Phase::Ready, Status::Running));
    bounded(work.ended()).await;
    assert_eq!(end_of(&busy).await, EndReason::Idle);

    let bench = Bench::with(|_, template| template.default_timeouts.lifetime = Duration::from_millis(300));
    let old = bench.create().await.unwrap();
    let work = bench.start(&old, "hang", 5.0).await.unwrap();
    assert_eq!(end_of(&old).await, EndReason::Lifetime);
    assert!(work.status().is_final());
}

#[tokio::test]
async fn the_audit_tells_ends_that_nobody_has_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let (state, _) = State::open(folder.path(), None).unwrap();
    let bench = Bench::on(Arc::new(FakeEngine::new(INSTANCE)), Some(state.clone()), |_, template| {
        template.default_timeouts.idle = Duration::from_millis(500);
    });
    let [deleted, idle, lost] = [bench.create().await, bench.create().await, bench.create().await].map(Result::unwrap);
    bench.start(&lost, "hang", 30.0).await.unwrap();
    bounded(bench.service.delete_session(&bench.who, deleted.id)).await.unwrap();
    assert_eq!(end_of(&idle).await, EndReason::Idle);
    // Where something runs it is not idle.
    bench.engine.kill(&CellName::new(INSTANCE, lost.id, 1));
    assert_eq!(end_of(&lost).await, EndReason::Lost);
    let query = AuditQuery { limit: 10, ..AuditQuery::default() };
    let found = state.audit(query).await.unwrap().events;
    let told: Vec<_> =
        found.iter().map(|(_, event)| (event.session.clone().unwrap(), event.outcome.as_str())).collect();
    assert_eq!(told, [(idle.id.to_string(), "idle"), (lost.id.to_string(), "lost")]);
    for (_, event) in &found {
        assert_eq!((event.action.as_str(), event.tenant.as_deref()), ("end_session", Some("one")));
        assert_eq!((&event.key, event.address, event.status), (&None, None, None));
    }
}

#[tokio::test]
async fn names_are_unique_among_a_tenants_live_sessions() {
    let bench = Bench::new();
    let named = |reuse| SessionRequest { name: Some("chat".to_owned()), reuse, ..SessionRequest::default() };
    let Created::New(first) = bench.service.create_session(&bench.who, &named(false), true, None).await.unwrap() else {
        panic!()
    };
    let refused = bench.service.create_session(&bench.who, &named(false), true, None).await.unwrap_err();
    assert_eq!(refused, Error::NameInUse(Some(first.id)));
    let Created::Reused(same) = bench.service.create_session(&bench.who, &named(true), true, None).await.unwrap()
    else {
        panic!()
    };
    assert_eq!(same.id, first.id);
    let other = Principal { tenant: Arc::from("two"), ..bench.who.clone() };
    let Created::New(theirs) = bench.service.create_session(&other, &named(true), true, None).await.unwrap() else {
        panic!()
    };
    assert_ne!(theirs.id, first.id);
    // A key of other templates is told that the name is taken, and not by whom.
    let limited = Principal { templates: Some(Arc::new(["u".to_owned()])), ..bench.who.clone() };
    for reuse in [false, true] {
        let request = SessionRequest { template: Some("u".to_owned()), ..named(reuse) };
        let refused = bench.service.create_session(&limited, &request, true, None).await.unwrap_err();
        assert_eq!(refused, Error::NameInUse(None));
        assert_eq!(refused.to_string(), "a live session has that name");
    }
    assert_eq!(bench.service.session(&other, first.id).unwrap_err(), Error::NotFound("session"));
}

#[tokio::test]
async fn capacity_is_full_until_a_container_is_gone() {
    let bench = Bench::new();
    let mut sessions = Vec::new();
    for _ in 0..5 {
        sessions.push(bench.create().await.unwrap());
    }
    assert!(matches!(bench.create().await.unwrap_err(), Error::AtCapacity { .. }), "nobody ended one in time");
    bounded(bench.service.delete_session(&bench.who, sessions[0].id)).await.unwrap();
    bench.create().await.unwrap();
    // One that ends while another waits makes room for it.
    let ending = async {
        tokio::task::yield_now().await;
        bounded(bench.service.delete_session(&bench.who, sessions[1].id)).await.unwrap();
    };
    let (created, ()) = tokio::join!(bench.create(), ending);
    created.unwrap();
}

#[tokio::test]
async fn the_reconciler_removes_what_nobody_knows_and_notices_what_is_missing() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let stranger = Bench::new();
    let subject = engine_suite::Subject {
        engine: bench.engine.as_ref(),
        operator: bench.engine.as_ref(),
        instance: INSTANCE,
        image: IMAGE,
        kill: &|_| Box::pin(async {}),
    };
    let orphan = engine_suite::spec(&subject).await;
    bench.engine.ensure(&orphan).await.unwrap();
    let reconciler = Arc::new(bench.reconciler());
    let report = reconciler.round().await.unwrap();
    assert_eq!(report, Report { seen: 2, removed: vec![orphan.name.clone()], ..Report::default() });
    assert_eq!(bench.engine.observe(&orphan.name).await, Ok(None));
    assert_eq!(session.phase(), Phase::Ready, "a session's own cell stays");
    assert_eq!(reconciler.round().await, Ok(Report { seen: 1, ..Report::default() }), "nothing is left to do");
    drop(stranger);

    // One that ended while nobody was told.
    let unheard = bench.create().await.unwrap();
    bench.engine.end_unheard(&CellName::new(INSTANCE, unheard.id, 1));
    assert_eq!(reconciler.round().await.unwrap().told, [unheard.id]);
    assert_eq!(end_of(&unheard).await, EndReason::Lost);

    let stop = CancellationToken::new();
    let (own, told) = (Arc::clone(&reconciler), stop.clone());
    let running = cellblock::task::spawn("reconcile", async move { own.run(told).await });
    bounded(async {
        while !session.is_over() {
            // Events are hints that may be lost while the reconciler is starting, so it is told again.
            bench.engine.kill(&CellName::new(INSTANCE, session.id, 1));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(end_of(&session).await, EndReason::Lost);
    stop.cancel();
    bounded(running).await.unwrap();
}

/// Another installation that has taken the name has sessions of its own on the engine.
#[tokio::test]
async fn nothing_is_removed_under_a_name_that_is_anothers() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let strangers = || Bench::beside(Arc::clone(&bench.engine)).reconciler();
    let (ours, theirs) = (bench.reconciler(), strangers());
    assert_eq!(ours.round().await.unwrap().seen, 1);
    let refused = theirs.round().await;
    assert!(matches!(refused, Err(EngineError::Claimed { holder: Some(_), .. })), "{refused:?}");
    assert!(theirs.clear().await.is_err());
    assert_eq!((bench.cells().await, session.phase()), (1, Phase::Ready), "its cell is unknown to them, and stays");

    // What one leaves to its next process stays taken; what one clears is free.
    let next = Reconciler::new(bench.engine.clone(), Arc::clone(&bench.registry), ours.installation());
    ours.leave().await;
    assert_eq!(ours.round().await, Ok(Report::default()), "no round after the end");
    assert!(strangers().round().await.is_err());
    bounded(bench.registry.drain(std::future::ready(()), NEVER, AfterDrain::Remove)).await;
    next.clear().await.unwrap();
    assert_eq!(strangers().round().await, Ok(Report::default()));
}

#[tokio::test]
async fn an_engine_that_comes_back_is_used_again() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    bench.engine.faults(|f| f.unreachable = true);
    assert_eq!(bench.create().await.unwrap_err(), Error::EngineUnavailable);
    assert_eq!(bench.service.ready().await, Err(Error::EngineUnavailable));
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok, "a link needs no engine");
    session.end(EndReason::Deleted);
    bounded(session.wait_for(|s| matches!(s.phase, Phase::Ending(_)))).await;
    bench.engine.faults(|f| f.unreachable = false);
    assert_eq!(end_of(&session).await, EndReason::Deleted);
    bench.create().await.unwrap();
}

#[tokio::test]
async fn draining_takes_nothing_new_and_lets_work_end() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let work = bench.start(&session, "hang", 0.5).await.unwrap();
    let left = bounded(bench.registry.drain(
        tokio::time::sleep(Duration::from_secs(5)),
        Duration::from_secs(5),
        AfterDrain::Remove,
    ))
    .await;
    assert_eq!((left, work.status()), (0, Status::Timeout), "it came to its own end");
    assert_eq!(bench.create().await.unwrap_err(), Error::Draining);
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn a_guest_that_is_deaf_ends_its_session_or_gets_a_new_cell() {
    for replace in [false, true] {
        let bench = Bench::with(|_, template| {
            template.on_guest_lost = if replace { OnGuestLost::Replace } else { OnGuestLost::End };
        });
        bench.engine.faults(|f| f.deaf_to_deletions = true);
        let session = bench.create().await.unwrap();
        let running = bench.start(&session, "hang hard", 0.1).await.unwrap();
        let waiting = bench.start(&session, "hello", 1.0).await.unwrap();
        bench.engine.faults(|f| f.deaf_to_deletions = false);
        bounded(running.ended()).await;
        let outcome = running.outcome();
        assert_eq!(outcome.status, Status::Timeout);
        let step = outcome.stop.map(|s| s.step);
        if replace {
            assert_eq!(step, Some(StopStep::Replace));
            bounded(waiting.ended()).await;
            assert_eq!(waiting.status(), Status::Ok, "{:?}", waiting.outcome());
            assert_eq!(waiting.outcome().restarted, Some(RestartCause::GuestLost));
            assert_eq!((session.phase(), bench.cells().await), (Phase::Ready, 1));
            session.end(EndReason::Deleted);
            assert_eq!(end_of(&session).await, EndReason::Deleted);
        } else {
            assert_eq!(step, Some(StopStep::End));
            assert_eq!(end_of(&session).await, EndReason::Lost);
            assert_eq!(waiting.status(), Status::Lost);
        }
        assert_eq!(bench.cells().await, 0);
    }
}

#[tokio::test]
async fn a_new_cell_that_does_not_start_is_the_end() {
    let bench = Bench::with(|_, template| template.on_guest_lost = OnGuestLost::Replace);
    bench.engine.faults(|f| f.deaf_to_deletions = true);
    let session = bench.create().await.unwrap();
    let running = bench.start(&session, "hang hard", 0.1).await.unwrap();
    bench.engine.faults(|f| f.kernel_dies = true);
    assert_eq!(end_of(&session).await, EndReason::Lost);
    assert_eq!(running.outcome().stop.map(|s| s.step), Some(StopStep::Replace));
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn a_kernel_that_dies_ends_its_session_if_the_template_says_so() {
    let bench = Bench::with(|_, template| template.on_kernel_death = OnKernelDeath::End);
    let session = bench.create().await.unwrap();
    let died = bench.run(&session, "die", 5.0).await;
    assert_eq!(died.status(), Status::KernelDied);
    assert!(died.outcome().detail.is_some_and(|d| d.contains("status 3")));
    assert_eq!(end_of(&session).await, EndReason::KernelDied);
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn the_time_limit_can_go_straight_to_the_kernel() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let request = ExecuteRequest {
        code: "hang".to_owned(),
        timeout_seconds: Some(0.1),
        on_timeout: OnTimeout::Restart,
        ..ExecuteRequest::default()
    };
    let execution = bench.service.execute(&bench.who, session.id, request, None).await.unwrap();
    bounded(execution.ended()).await;
    let outcome = execution.outcome();
    assert_eq!((outcome.status, outcome.restarted), (Status::Timeout, Some(RestartCause::Timeout)));
    assert_eq!(outcome.stop.map(|s| s.step), Some(StopStep::Restart));
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
}

#[tokio::test]
async fn setup_code_runs_before_a_session_is_ready_and_its_failure_is_that_of_the_start() {
    let bench = Bench::with(|_, template| template.setup = "hello".to_owned());
    let session = bench.create().await.unwrap();
    assert_eq!(bench.run(&session, "hello", 5.0).await.outcome().execution_count, Some(2));
    let setup = |code: &str| SessionRequest { setup: Some(code.to_owned()), ..SessionRequest::default() };
    for code in ["raise", "die", "hang"] {
        let failed = bounded(bench.service.create_session(&bench.who, &setup(code), true, None)).await.unwrap_err();
        let Error::StartFailed(failure) = failed else { panic!("{code}: {failed:?}") };
        assert_eq!(failure.fault, StartFault::SetupFailed, "{code}: {failure:?}");
    }
    assert_eq!(bench.cells().await, 1);
}

#[tokio::test]
async fn contexts_have_kernels_and_queues_of_their_own() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let second = bounded(session.create_context(fresh(), None, None)).await.unwrap();
    assert_eq!(session.create_context(fresh(), None, None).await, Err(Refused::TooManyContexts(2)));
    let hanging = bench.start(&session, "hang", 10.0).await.unwrap();
    let request = ExecuteRequest { code: "hello".to_owned(), context: Some(second.id), ..ExecuteRequest::default() };
    let beside = bench.service.execute(&bench.who, session.id, request, None).await.unwrap();
    bounded(beside.ended()).await;
    assert_eq!((beside.status(), hanging.status()), (Status::Ok, Status::Running));
    assert_eq!(session.delete_context(session.default_context).await, Err(Refused::DefaultContext));
    bounded(session.restart(Some(second.id))).await.unwrap();
    assert_eq!(hanging.status(), Status::Running);
    assert_eq!(bounded(session.delete_context(second.id)).await.unwrap().id, second.id);
    assert_eq!(session.contexts().await.unwrap().len(), 1);
    assert_eq!(session.interrupt(Some(second.id)).await, Err(Refused::NoSuchContext));
}

#[tokio::test]
async fn after_an_interrupt_nothing_begins_before_the_kernel_has_dealt_with_it() {
    let bench = Bench::with(|settings, _| settings.interrupt_grace = NEVER);
    let session = bench.create().await.unwrap();
    for (code, waits) in [("hang", false), ("hang mute", true)] {
        let stopped = bench.start(&session, code, 10.0).await.unwrap();
        let next = bench.start(&session, "hello", 5.0).await.unwrap();
        bench.service.cancel(&bench.who, stopped.id).unwrap();
        bounded(stopped.ended()).await;
        let began = std::time::Instant::now();
        bounded(next.ended()).await;
        assert_eq!((stopped.status(), next.status()), (Status::Cancelled, Status::Ok));
        let waited = began.elapsed() >= Duration::from_millis(800);
        assert_eq!(waited, waits, "{code}: {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn finished_executions_go_by_their_number_and_by_what_they_hold() {
    let bench = Bench::new();
    let session = bench.create().await.expect("ready");
    let mut ids = Vec::new();
    for _ in 0..200 {
        ids.push(bench.run(&session, "print x", 5.0).await.id);
    }
    let kept =
        |bench: &Bench| ids.iter().map(|id| bench.service.execution(&bench.who, *id).is_ok()).collect::<Vec<_>>();
    bench.registry.prune();
    let by_number = kept(&bench);
    assert_eq!(by_number.iter().filter(|kept| **kept).count(), 100);
    assert!(by_number[100..].iter().all(|kept| *kept), "the oldest go first");

    // A few long ones are more than all may hold, and make room by themselves: nobody has to look.
    let long = format!("print {}", "x".repeat(300_000));
    for _ in 0..4 {
        bench.run(&session, &long, 5.0).await;
    }
    bench.run(&session, "print x", 5.0).await;
    assert!(!kept(&bench)[199], "what came before the long ones is gone");
}

impl Bench {
    fn state_of(&self, session: &Session) -> Option<CellState> {
        self.engine.state(&cell_of(session))
    }

    async fn pause(&self, session: &Session) {
        bounded(self.service.pause(&self.who, session.id)).await.unwrap();
        assert_eq!((session.phase(), self.state_of(session)), (Phase::Paused, Some(CellState::Paused)));
    }

    /// Has the reconciler look after everything while something is done.
    async fn reconciled<T>(&self, work: impl Future<Output = T>) -> T {
        let reconciler = self.reconciler();
        tokio::select! {
            () = reconciler.run(CancellationToken::new()) => unreachable!("nobody stops it"),
            done = work => done,
        }
    }
}

#[tokio::test]
async fn a_paused_session_answers_looks_and_is_resumed_by_work() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    bench.run(&session, "hello", 5.0).await;
    bench.pause(&session).await;
    bench.pause(&session).await;
    session.contexts().await.unwrap();
    bounded(bench.service.keep_alive(&bench.who, session.id)).await.unwrap();
    bounded(session.patch(cellblock::session::Patch::default())).await.unwrap();
    assert_eq!(session.phase(), Phase::Paused, "none of these needs its cell");
    let execution = bench.run(&session, "hello", 5.0).await;
    assert_eq!((execution.status(), execution.outcome().execution_count), (Status::Ok, Some(2)));
    assert_eq!((session.phase(), bench.engine.kernels_started()), (Phase::Ready, 1), "the kernel is the same");
    assert_eq!(execution.outcome().restarted, None);
    for _ in 0..2 {
        bounded(bench.service.resume(&bench.who, session.id)).await.unwrap();
    }
    assert_eq!(bench.engine.links(), 2, "a link for the start, and one for the resume");
}

#[tokio::test]
async fn whatever_needs_the_cell_resumes_it_first() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    bench.pause(&session).await;
    bounded(session.interrupt(None)).await.unwrap();
    bench.pause(&session).await;
    bounded(session.restart(None)).await.unwrap();
    bench.pause(&session).await;
    let context = bounded(session.create_context(fresh(), None, None)).await.unwrap();
    bench.pause(&session).await;
    bounded(session.delete_context(context.id)).await.unwrap();
    bench.pause(&session).await;
    bounded(session.link()).await.unwrap();
    bench.pause(&session).await;
    let answer = bounded(session.ask_kernel(None, "kernel_info_request", serde_json::json!({}))).await.unwrap();
    assert!(bounded(answer).await.unwrap().0.contains("fake"));
    bench.pause(&session).await;
    bounded(bench.service.resume(&bench.who, session.id)).await.unwrap();
    assert_eq!((session.phase(), bench.state_of(&session)), (Phase::Ready, Some(CellState::Running)));
}

#[tokio::test]
async fn what_is_asked_while_it_is_being_paused_is_done_in_order() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    for _ in 0..20 {
        let asked = async {
            tokio::join!(
                bench.service.pause(&bench.who, session.id),
                bench.start(&session, "print 1", 5.0),
                bench.service.resume(&bench.who, session.id),
                bench.start(&session, "print 2", 5.0),
                bench.service.pause(&bench.who, session.id),
            )
        };
        let (_, first, resumed, second, _) = bounded(asked).await;
        resumed.unwrap();
        for execution in [first.unwrap(), second.unwrap()] {
            bounded(execution.ended()).await;
            assert_eq!(execution.status(), Status::Ok);
        }
    }
}

#[tokio::test]
async fn work_is_not_paused() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let running = bench.start(&session, "hang", 10.0).await.unwrap();
    let refused = bounded(bench.service.pause(&bench.who, session.id)).await.unwrap_err();
    assert!(matches!(&refused, Error::StateConflict(words) if words.contains("cancelled")), "{refused:?}");
    assert_eq!((session.phase(), running.status()), (Phase::Ready, Status::Running));
    bench.service.cancel(&bench.who, running.id).unwrap();
    bounded(running.ended()).await;
    // After an interrupt the kernel is asked something, which is waited for.
    bench.pause(&session).await;
}

#[tokio::test]
async fn a_pause_that_fails_leaves_a_session_that_works() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    bench.engine.faults(|f| (f.pauses_fail, f.resumes_fail) = (1, 1));
    let refused = bounded(bench.service.pause(&bench.who, session.id)).await.unwrap_err();
    assert_eq!(refused, Error::EngineUnavailable);
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
    assert_eq!((session.phase(), bench.state_of(&session)), (Phase::Ready, Some(CellState::Running)));
    bench.pause(&session).await;
}

#[tokio::test]
async fn a_session_that_can_not_be_resumed_is_lost_or_gets_a_new_cell() {
    for replace in [false, true] {
        let bench = Bench::with(|settings, template| {
            settings.start_timeout = Duration::from_secs(2);
            template.on_guest_lost = if replace { OnGuestLost::Replace } else { OnGuestLost::End };
        });
        let session = bench.create().await.unwrap();
        bench.pause(&session).await;
        bench.engine.faults(|f| f.resumes_fail = u32::MAX);
        let refused = bounded(bench.start(&session, "hello", 5.0)).await.unwrap_err();
        if replace {
            assert_eq!(refused, Error::NotReady);
            bounded(session.wait_for(|s| s.phase == Phase::Ready)).await;
            assert_eq!(bench.run(&session, "hello", 5.0).await.outcome().restarted, Some(RestartCause::GuestLost));
        } else {
            assert_eq!(refused, Error::SessionEnded(EndReason::Lost));
            assert_eq!(end_of(&session).await, EndReason::Lost);
            assert_eq!(bench.cells().await, 0);
        }
    }
}

#[tokio::test]
async fn a_paused_session_ends_when_it_is_told_to_or_is_old() {
    let bench = Bench::with(|_, template| template.default_timeouts.lifetime = Duration::from_millis(600));
    let (deleted, old, removed) =
        (bench.create().await.unwrap(), bench.create().await.unwrap(), bench.create().await.unwrap());
    for session in [&deleted, &old, &removed] {
        bench.pause(session).await;
    }
    bounded(bench.service.delete_session(&bench.who, deleted.id)).await.unwrap();
    assert_eq!(end_of(&deleted).await, EndReason::Deleted);
    bench.engine.remove(&cell_of(&removed)).await.unwrap();
    removed.look_at_cell();
    assert_eq!(end_of(&removed).await, EndReason::Lost);
    assert_eq!(end_of(&old).await, EndReason::Lifetime);
    assert_eq!(bench.cells().await, 0);
    let pausing = bench.create().await.unwrap();
    let (paused, ()) = bounded(async {
        tokio::join!(bench.service.pause(&bench.who, pausing.id), async { pausing.end(EndReason::Deleted) })
    })
    .await;
    assert!(matches!(paused, Ok(_) | Err(Error::SessionEnded(EndReason::Deleted))), "{paused:?}");
    assert_eq!(end_of(&pausing).await, EndReason::Deleted);
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn idleness_ends_a_session_or_pauses_it_and_ends_it_later() {
    let (idle, paused) = (Duration::from_millis(300), Duration::from_millis(700));
    let bench = Bench::with(|_, template| {
        (template.default_timeouts.idle, template.default_timeouts.paused) = (idle, paused);
    });
    let request = SessionRequest { on_idle: Some(OnIdle::Pause), ..SessionRequest::default() };
    let created = bounded(bench.service.create_session(&bench.who, &request, true, None)).await.unwrap();
    let (Created::New(session) | Created::Reused(session)) = created;
    bounded(session.wait_for(|s| s.phase == Phase::Paused)).await;
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
    bounded(session.wait_for(|s| s.phase == Phase::Paused)).await;
    let began = std::time::Instant::now();
    assert_eq!(end_of(&session).await, EndReason::Idle);
    assert!(began.elapsed() >= Duration::from_millis(500), "{:?}", began.elapsed());

    // One that a caller has paused is not idle, whatever the policy: it has the time of a paused one.
    let session = bench.create().await.unwrap();
    bench.pause(&session).await;
    let began = std::time::Instant::now();
    assert_eq!(end_of(&session).await, EndReason::Idle);
    assert!(began.elapsed() >= Duration::from_millis(600), "{:?}", began.elapsed());
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn a_session_that_is_kept_rests_when_it_expires_and_has_its_time_again_when_it_is_used() {
    let short = Duration::from_millis(400);
    let bench = Bench::with(|_, template| {
        (template.default_timeouts.idle, template.default_timeouts.lifetime) = (short / 4, short);
        template.max_timeouts.lifetime = 8 * short;
    });
    let request = SessionRequest {
        on_idle: Some(OnIdle::Keep),
        on_expiry: OnExpiry::Pause,
        metadata: [("a b".to_owned(), "c&d".to_owned())].into(),
        ..SessionRequest::default()
    };
    let began = std::time::Instant::now();
    let created = bounded(bench.service.create_session(&bench.who, &request, true, None)).await.unwrap();
    let (Created::New(session) | Created::Reused(session)) = created;
    assert_eq!(session.spec.metadata, request.metadata);
    assert_eq!(session.snapshot().idle_deadline, None, "idleness is nothing to it");
    // What runs is not cut off by it.
    let running = bench.start(&session, "hang", 10.0).await.unwrap();
    tokio::time::sleep(2 * short).await;
    assert_eq!((session.phase(), running.status()), (Phase::Ready, Status::Running));
    bench.service.cancel(&bench.who, running.id).unwrap();
    bounded(running.ended()).await;
    bounded(session.wait_for(|s| s.phase == Phase::Paused)).await;
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
    let again = session.snapshot();
    assert!(again.expires_at > jiff::Timestamp::now() && again.phase == Phase::Ready, "{again:?}");
    bounded(session.wait_for(|s| s.phase == Phase::Paused)).await;
    assert_eq!(end_of(&session).await, EndReason::Lifetime);
    assert!(began.elapsed() >= 8 * short, "it is as old as it may be: {:?}", began.elapsed());
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn what_others_pause_is_resumed_and_what_they_resume_is_ready() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    bench
        .reconciled(async {
            let running = bench.start(&session, "hang", 10.0).await.unwrap();
            bounded(async {
                bench.engine.freeze(&cell_of(&session)).await;
                while bench.state_of(&session) != Some(CellState::Running) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
            .await;
            assert_eq!(running.status(), Status::Running);
            bench.service.cancel(&bench.who, running.id).unwrap();
            bounded(running.ended()).await;
            assert_eq!(running.status(), Status::Cancelled, "its link is the same");
            assert_eq!(bench.engine.links(), 1);

            bench.pause(&session).await;
            bench.engine.resume(&cell_of(&session)).await.unwrap();
            bounded(session.wait_for(|s| s.phase == Phase::Ready)).await;
            assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
        })
        .await;
}

#[tokio::test]
async fn a_link_that_is_lost_while_others_pause_is_opened_again() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let running = bench.start(&session, "hang", 10.0).await.unwrap();
    bench.engine.freeze(&cell_of(&session)).await;
    let links = bench.engine.links();
    bench.engine.cut_links(&cell_of(&session));
    bounded(async {
        while bench.engine.links() == links {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    bench.service.cancel(&bench.who, running.id).unwrap();
    bounded(running.ended()).await;
    assert_eq!(running.status(), Status::Cancelled);
    bounded(session.wait_for(|s| s.phase == Phase::Ready && !s.busy)).await;
}

#[tokio::test]
async fn a_link_that_breaks_costs_a_session_nothing() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let cell = cell_of(&session);
    let running = bench.start(&session, "hang", 10.0).await.unwrap();
    let waiting = bench.start(&session, "print once", 10.0).await.unwrap();
    // The engine is away, and nothing is decided while it is.
    bench.engine.faults(|f| f.unreachable = true);
    bench.engine.cut_links(&cell);
    bench.reconciler().round().await.unwrap_err();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((session.phase(), running.status()), (Phase::Ready, Status::Running));
    // What is asked meanwhile is done afterwards.
    bench.service.cancel(&bench.who, running.id).unwrap();
    bench.engine.faults(|f| f.unreachable = false);
    bounded(running.ended()).await;
    bounded(waiting.ended()).await;
    assert_eq!((running.status(), waiting.status()), (Status::Cancelled, Status::Ok));
    goes_on_with(&bench, &session, 3).await;
}

/// Each thing that a guest is told, done and not heard to be done, is done once.
#[tokio::test]
async fn what_is_said_again_is_done_once() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    let cell = cell_of(&session);
    bench.engine.lose_answers(&cell, 1);
    let execution = bench.run(&session, "print once", 5.0).await;
    assert_eq!((execution.outcome().stdout.as_str(), bench.engine.answers_to_lose(&cell)), ("once", 0));
    // An interrupt.
    let running = bench.start(&session, "hang", 10.0).await.unwrap();
    bounded(async {
        while running.status() != Status::Running {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    bench.engine.lose_answers(&cell, 1);
    bench.service.cancel(&bench.who, running.id).unwrap();
    bounded(running.ended()).await;
    assert_eq!((running.status(), bench.engine.answers_to_lose(&cell)), (Status::Cancelled, 0));
    goes_on_with(&bench, &session, 3).await;
    // The end of a kernel, the start of another, and what it is asked first.
    bench.engine.lose_answers(&cell, 3);
    bounded(bench.service.restart(&bench.who, session.id, None)).await.unwrap();
    assert_eq!((bench.engine.answers_to_lose(&cell), bench.engine.kernels_started()), (0, 2));
    assert_eq!(bench.run(&session, "hello", 5.0).await.outcome().execution_count, Some(1));
}

/// Code that ends its kernel while nobody hears of it has run, and does not run again in the next one.
#[tokio::test]
async fn code_that_was_perhaps_heard_is_not_given_to_another_kernel() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    // The refusal to take it again comes before the word of the end.
    bench.engine.faults(|f| f.events_late = true);
    bench.engine.lose_answers(&cell_of(&session), 1);
    let execution = bench.run(&session, "die", 5.0).await;
    assert_eq!((execution.status(), bench.engine.answers_to_lose(&cell_of(&session))), (Status::KernelDied, 0));
    assert_eq!(bench.run(&session, "hello", 5.0).await.outcome().execution_count, Some(1));
    assert_eq!(bench.engine.kernels_started(), 2);
}

#[tokio::test]
async fn an_engine_that_stays_away_for_longer_than_a_lease_has_lost_its_sessions() {
    let bench = Bench::with(|settings, _| settings.orphan_timeout = Duration::from_secs(2));
    let session = bench.create().await.unwrap();
    let running = bench.start(&session, "hang", 10.0).await.unwrap();
    bench.engine.faults(|f| f.unreachable = true);
    bench.engine.cut_links(&cell_of(&session));
    bounded(running.ended()).await;
    assert_eq!((running.status(), session.phase()), (Status::Lost, Phase::Ending(EndReason::Lost)));
    bench.engine.faults(|f| f.unreachable = false);
    assert_eq!(end_of(&session).await, EndReason::Lost);
    assert_eq!(bench.cells().await, 0);
}

#[tokio::test]
async fn what_no_event_has_told_is_seen_by_the_next_round() {
    let bench = Bench::new();
    let session = bench.create().await.unwrap();
    bench.engine.freeze(&cell_of(&session)).await;
    bench.reconciler().round().await.unwrap();
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
    bench.pause(&session).await;
    bench.engine.resume(&cell_of(&session)).await.unwrap();
    bench.reconciler().round().await.unwrap();
    bounded(session.wait_for(|s| s.phase == Phase::Ready)).await;
}

/// Leaves a session to the next process, paused or not, does something in between, and gives it as that one has it.
async fn taken_over(paused: bool, between: impl AsyncFnOnce(&FakeEngine, &CellName)) -> (Bench, Session) {
    let folder = tempfile::tempdir().unwrap();
    let (state, _) = State::open(folder.path(), None).unwrap();
    let first = Bench::on(Arc::new(FakeEngine::new(INSTANCE)), Some(state), |_, _| {});
    let session = first.create().await.unwrap();
    assert_eq!(first.run(&session, "hello", 5.0).await.outcome().execution_count, Some(1));
    if paused {
        first.pause(&session).await;
    }
    bounded(first.registry.drain(std::future::ready(()), NEVER, AfterDrain::Keep)).await;
    between(&first.engine, &cell_of(&session)).await;
    let (state, records) = State::open(folder.path(), None).unwrap();
    assert_eq!(records.sessions.len(), 1);
    let second = Bench::on(Arc::clone(&first.engine), Some(state), |_, _| {});
    second.registry.take_over(records);
    let session = second.registry.any_session(session.id).unwrap();
    (second, session)
}

/// What can't be kept is not accepted, and what was accepted before is not harmed.
#[tokio::test]
async fn nothing_is_accepted_while_the_database_can_not_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let (state, _) = State::open(folder.path(), None).unwrap();
    let bench = Bench::on(Arc::new(FakeEngine::new(INSTANCE)), Some(state), |_, _| {});
    let session = bench.create().await.unwrap();
    let other = rusqlite::Connection::open(cellblock::store::state::path_in(folder.path())).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    // The first is found out about by trying, and does not run to its end unheard; the next are refused at once.
    assert_eq!(bench.start(&session, "hang", 15.0).await.err(), Some(Error::Unkept));
    assert_eq!(bench.service.ready().await, Err(Error::Unkept));
    let refused = tokio::time::timeout(Duration::from_secs(1), bench.start(&session, "hello", 5.0)).await;
    assert_eq!(refused.unwrap().err(), Some(Error::Unkept));
    assert_eq!(bench.create().await.err(), Some(Error::Unkept));
    assert_eq!(bench.registry.live().len(), 1);
    other.execute_batch("ROLLBACK").unwrap();
    while bench.service.ready().await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(bench.run(&session, "hello", 5.0).await.status(), Status::Ok);
}

async fn goes_on(bench: &Bench, session: &Session) {
    goes_on_with(bench, session, 2).await;
}

async fn goes_on_with(bench: &Bench, session: &Session, count: u64) {
    let execution = bench.run(session, "hello", 5.0).await;
    assert_eq!((execution.status(), execution.outcome().execution_count), (Status::Ok, Some(count)));
    assert_eq!((session.phase(), bench.engine.kernels_started()), (Phase::Ready, 1), "the kernel is the same");
}

#[tokio::test]
async fn the_next_process_has_it_paused_without_a_link() {
    let (bench, session) = taken_over(true, async |_, _| {}).await;
    bounded(session.wait_for(|s| s.phase == Phase::Paused)).await;
    assert_eq!((bench.state_of(&session), bench.engine.links()), (Some(CellState::Paused), 1));
    goes_on(&bench, &session).await;
    assert_eq!(bench.engine.links(), 2);
}

#[tokio::test]
async fn the_next_process_makes_the_world_what_the_record_says() {
    // The process ended between the record and the freezing.
    let (bench, session) = taken_over(true, async |engine, cell| engine.resume(cell).await.unwrap()).await;
    bounded(session.wait_for(|s| s.phase == Phase::Paused)).await;
    assert_eq!(bench.state_of(&session), Some(CellState::Paused));
    goes_on(&bench, &session).await;
    // It ended between the record and the thaw.
    let (bench, session) = taken_over(false, async |engine, cell| engine.freeze(cell).await).await;
    goes_on(&bench, &session).await;
    assert_eq!(bench.state_of(&session), Some(CellState::Running));
    // What could not be thawed at once is tried again.
    let (bench, session) = taken_over(true, async |engine, _| engine.faults(|f| f.resumes_fail = 1)).await;
    goes_on(&bench, &session).await;
    // Its cell is gone.
    let (bench, session) = taken_over(true, async |engine, cell| engine.remove(cell).await.unwrap()).await;
    assert_eq!(end_of(&session).await, EndReason::Lost);
    assert_eq!(bench.cells().await, 0);
}
