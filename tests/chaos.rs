//! A whole server whose way to the engine is broken in every way, one request after another. Whatever happens: creates succeed or say truly why not,
//! every place can be had again, and nothing is left that the reconciler would have to remove.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/engine_proxy.rs"]
mod engine_proxy;
#[path = "support/server.rs"]
mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use engine_proxy::Fault::{self, Break, Fail, HalfClose, Late, Swallow};
use engine_proxy::Proxy;
use serde_json::{Value, json};
use server::{Cell, Reply, Server, text};

/// Sessions that there may be: all of them are made after each fault.
const PLACES: usize = 2;
/// Callers at once where faults come at random, for this long.
const CALLERS: usize = 3;
const STORM: Duration = Duration::from_secs(15);
/// How long the engine is stopped: longer than any answer of it or of a guest is waited for.
const STALLED: Duration = Duration::from_secs(32);
const SETTINGS: &str = r#"
[limits]
sessions = 2
create_wait = "2s"
[executions]
interrupt_grace = "1s"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "160MiB"
disk = "16MiB"
tmp = "16MiB"
"#;

const CREATE: &str = "POST /containers/create";
const ATTACH: &str = "POST /containers/*/attach";
const START: &str = "POST /containers/*/start";
const INSPECT: &str = "GET /containers/*/json";
const REMOVE: &str = "DELETE /containers/*";
const LIST: &str = "GET /containers/json";
const VOLUME: &str = "GET /volumes/*";
const IMAGE: &str = "GET /images/*/*/json";
const EVENTS: &str = "GET /events";

/// A fault while a session is created: to what, how often, and the code of the problem that it is told as; none where the create succeeds.
type Case = (&'static str, Fault, usize, Option<&'static str>);

const SECOND: Duration = Duration::from_secs(1);
const UNAVAILABLE: Option<&str> = Some("engine-unavailable");
const REFUSED: Option<&str> = Some("engine-refused");

const CASES: [Case; 24] = [
    (IMAGE, Break, 1, UNAVAILABLE),
    (IMAGE, Fail, 1, UNAVAILABLE),
    (VOLUME, Break, 1, UNAVAILABLE),
    (VOLUME, Fail, 1, REFUSED),
    (CREATE, Break, 1, UNAVAILABLE),
    (CREATE, Swallow, 1, UNAVAILABLE),
    (CREATE, Fail, 1, REFUSED),
    (CREATE, HalfClose(0), 1, UNAVAILABLE),
    (CREATE, HalfClose(30), 1, UNAVAILABLE),
    (CREATE, Late(SECOND), 1, None),
    (LIST, Break, 1, UNAVAILABLE),
    (LIST, Fail, 1, REFUSED),
    (ATTACH, Break, 1, UNAVAILABLE),
    (ATTACH, Fail, 1, REFUSED),
    (ATTACH, HalfClose(0), 1, UNAVAILABLE),
    (ATTACH, HalfClose(200), 1, Some("guest-unreachable")),
    (ATTACH, Late(SECOND), 1, None),
    (START, Break, 1, UNAVAILABLE),
    (START, Swallow, 1, UNAVAILABLE),
    (START, Fail, 1, REFUSED),
    (START, Late(SECOND), 1, None),
    (INSPECT, Break, 1, UNAVAILABLE),
    (INSPECT, Fail, 1, REFUSED),
    (INSPECT, HalfClose(30), 1, UNAVAILABLE),
];

/// A server, and the way to its engine.
struct Way {
    server: Arc<Server>,
    proxy: Proxy,
    _folder: tempfile::TempDir,
}

impl Way {
    async fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("docker.sock");
        let proxy = Proxy::start(&socket, "/var/run/docker.sock");
        let server = Server::start(&format!("{SETTINGS}\n[engine]\nhost = \"unix://{}\"", socket.display())).await;
        Self { server, proxy, _folder: folder }
    }

    async fn create(&self) -> Reply {
        self.server.post("/v1/sessions", &json!({"template": "small"})).await
    }

    fn cell(&self, created: &Reply) -> Cell {
        assert_eq!((created.status, &created.json["state"]), (201, &json!("ready")), "{}", created.text);
        Cell { server: Arc::clone(&self.server), id: text(&created.json["id"]), view: created.json.clone() }
    }

    async fn round(&self) -> Value {
        let report = self.server.post("/v1/admin/reconcile", &Value::Null).await;
        assert_eq!((report.status, &report.json["errors"]), (200, &json!([])), "{}", report.text);
        report.json
    }

    /// Whatever was done on the way: nothing is left of it, all places can be had, and what is made in them works.
    async fn is_whole(&self, after: &str) {
        self.proxy.settle().await;
        // Long before the reconciler looks by itself.
        let began = Instant::now();
        while !self.server.containers("").await.is_empty() {
            assert!(began.elapsed() < 5 * SECOND, "{after}: {:?} stay", self.server.containers("").await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let seen = self.round().await;
        let nothing =
            json!({"cells_seen": 0, "cells_removed": [], "sessions_told": [], "volumes_removed": [], "errors": []});
        assert_eq!(seen, nothing, "{after}");
        let created = futures_util::future::join_all((0..PLACES).map(|_| self.create())).await;
        let cells: Vec<_> = created.iter().map(|created| self.cell(created)).collect();
        futures_util::future::join_all(cells.iter().map(Cell::works)).await;
        futures_util::future::join_all(cells.iter().map(Cell::delete)).await;
    }
}

async fn creates(way: &Way) {
    for (what, fault, times, expected) in CASES {
        let began = Instant::now();
        way.proxy.fault(what, fault, times);
        let created = way.create().await;
        let (hits, name) = (way.proxy.calm(), format!("{what} {fault:?}"));
        println!("{name}: {} {} in {:?}", created.status, created.json["code"], began.elapsed());
        assert_eq!(hits, times, "{name}: it was not asked for as expected: {}", created.text);
        match expected {
            None => way.cell(&created).delete().await,
            Some(code) => {
                created.is_a_problem();
                assert_eq!(created.json["code"], code, "{name}: {}", created.text);
            }
        }
        way.is_whole(&name).await;
    }
}

/// Removals that fail are tried again until the container is seen to be gone.
async fn removals(way: &Way) {
    for (what, fault, times) in [
        (REMOVE, Break, 2),
        (REMOVE, Swallow, 1),
        (REMOVE, Fail, 3),
        (REMOVE, HalfClose(10), 1),
        (REMOVE, Late(SECOND), 1),
        (INSPECT, Fail, 2),
        (INSPECT, Break, 1),
    ] {
        let cell = way.cell(&way.create().await);
        way.proxy.fault(what, fault, times);
        cell.delete().await;
        let (hits, name) = (way.proxy.calm(), format!("{what} {fault:?} at an end"));
        assert_eq!(hits, times, "{name}");
        assert_eq!(cell.containers().await, Vec::<String>::new(), "{name}");
        way.is_whole(&name).await;
    }
}

/// What happens to a container is noticed, whatever becomes of the engine's events.
async fn events(way: &Way) {
    for fault in [Break, Fail, HalfClose(5)] {
        way.proxy.fault(EVENTS, fault, 3);
        let cell = way.cell(&way.create().await);
        cell.run("x = 1").await;
        // The present watch ends, and with it the links of sessions, which are opened again.
        assert!(way.proxy.cut() > 0);
        assert_eq!(cell.value("x + 1").await, "2");
        cell.delete().await;
        let other = way.cell(&way.create().await);
        let options = bollard::query_parameters::KillContainerOptionsBuilder::default().signal("SIGKILL").build();
        way.server.docker.kill_container(&other.containers().await[0], Some(options)).await.unwrap();
        let ended = other.wait("ended").await;
        assert_eq!(ended["end_reason"], "lost", "{ended}");
        way.proxy.calm();
        way.is_whole(&format!("{EVENTS} {fault:?}")).await;
    }
}

/// The guest's volume is pruned away, and what it would be filled through again is made for nobody.
async fn pruned(way: &Way) {
    for fault in [Swallow, Break, HalfClose(30)] {
        let options = bollard::query_parameters::RemoveVolumeOptionsBuilder::default().build();
        way.server.docker.remove_volume(&way.server.volumes().await[0], Some(options)).await.unwrap();
        way.proxy.fault(CREATE, fault, 1);
        way.create().await.problem(503, "engine-unavailable");
        assert_eq!(way.proxy.calm(), 1);
        way.is_whole(&format!("{CREATE} {fault:?} for the guest's volume")).await;
    }
}

/// The engine is gone for a while, and comes back.
async fn away(way: &Way) {
    let cell = way.cell(&way.create().await);
    way.proxy.fault("** /", Break, usize::MAX);
    let refused = way.create().await;
    assert_eq!(refused.problem(503, "engine-unavailable")["retryable"], true);
    way.server.post("/v1/admin/reconcile", &Value::Null).await.problem(503, "engine-unavailable");
    way.server.get("/readyz").await.problem(503, "engine-unavailable");
    let printed = cell.background("import time\nfor i in range(30):\n    print(i)\n    time.sleep(0.2)").await;
    way.proxy.cut();
    // It can't be seen to be gone, so it has not ended, and what is asked waits.
    let meanwhile = async {
        tokio::time::sleep(2 * SECOND).await;
        assert_eq!(cell.look().await["state"], "busy");
        way.proxy.calm();
        prints_all(way, &printed, 30).await;
    };
    let (asked, ()) = tokio::join!(cell.value("i + 1"), meanwhile);
    assert_eq!(asked, "30");
    cell.delete().await;
    way.is_whole("the engine was away").await;
}

/// The engine comes to a create so late that nobody waits any more: what it makes then is nobody's, and goes at once.
async fn too_late(way: &Way) {
    way.proxy.fault(CREATE, Late(13 * SECOND), 1);
    way.proxy.fault(ATTACH, Late(7 * SECOND), 1);
    let began = Instant::now();
    let created = way.create().await;
    assert_eq!(created.problem(503, "engine-unavailable")["retryable"], true);
    assert!(began.elapsed() < 13 * SECOND, "{:?}", began.elapsed());
    way.create().await.problem(503, "engine-unavailable");
    assert_eq!(way.proxy.calm(), 2);
    // The one was made all the same; the other was gone by then.
    assert_eq!(way.proxy.settle().await, [201, 404]);
    way.is_whole("a create came too late, and an attach").await;
}

/// The engine takes every request and answers none for a while: whoever asks hears so in time.
async fn hanging(way: &Way) {
    way.proxy.fault("** /", Late(12 * SECOND), usize::MAX);
    let began = Instant::now();
    let asked = async {
        let body = way.server.post("/v1/admin/reconcile", &Value::Null);
        tokio::join!(way.create(), body, way.server.get("/readyz"))
    };
    let (created, round, ready) = asked.await;
    for answer in [created, round, ready] {
        answer.problem(503, "engine-unavailable");
    }
    assert!(began.elapsed() < 9 * SECOND, "{:?}", began.elapsed());
    assert!(way.proxy.calm() >= 3);
    way.is_whole("the engine hung").await;
}

/// What was printed is there, without a gap or a repeat.
async fn prints_all(way: &Way, execution: &str, count: usize) {
    let events = way.server.follow(execution, 0).await.rest().await;
    let expected: String = (0..count).map(|i| format!("{i}\n")).collect();
    assert_eq!(server::joined(&events, "stdout"), expected);
    assert_eq!(way.server.ended(execution).await["status"], "ok");
}

/// The engine stops in the middle of everything, for longer than any answer is waited for, and goes on: sessions go on too.
async fn stalled(way: &Way, time: Duration) {
    let (one, other) = (way.cell(&way.create().await), way.cell(&way.create().await));
    other.run("x = 41").await;
    let count = time.as_secs() as usize + 10;
    let code = format!("import time\nfor i in range({count}):\n    print(i)\n    time.sleep(1)");
    let printed = one.background_until_output(&code).await;
    way.proxy.stall(true);
    let began = Instant::now();
    let meanwhile = async {
        tokio::time::sleep(SECOND).await;
        way.server.get("/readyz").await.problem(503, "engine-unavailable");
        // Whatever concerns no container is answered as ever.
        let looked = Instant::now();
        assert_eq!((one.look().await["state"].clone(), looked.elapsed() < SECOND), (json!("busy"), true));
        tokio::time::sleep(time.saturating_sub(began.elapsed())).await;
        way.proxy.stall(false);
        Instant::now()
    };
    let request = json!({"code": "x + 1", "timeout_seconds": 300});
    let (answer, goes_on) = tokio::join!(other.execute(request), meanwhile);
    println!("after {time:?} without an engine: an answer in {:?}", goes_on.elapsed());
    let value = &answer["results"][0]["data"]["text/plain"];
    assert_eq!((&answer["status"], value), (&json!("ok"), &json!("42")), "{answer}");
    prints_all(way, &printed, count).await;
    for cell in [one, other] {
        assert_eq!(cell.look().await["end_reason"], Value::Null);
        cell.works().await;
        cell.delete().await;
    }
    way.is_whole("the engine was stopped").await;
}

/// One caller, who is content with any true answer.
async fn caller(way: &Way, until: Instant, made: &AtomicUsize) {
    const TRUE: [&str; 8] = [
        "engine-unavailable",
        "engine-refused",
        "guest-unreachable",
        "kernel-failed",
        "start-timed-out",
        "at-capacity",
        "session-ended",
        "session-not-ready",
    ];
    let is_true = |reply: &Reply| {
        if reply.status >= 400 {
            reply.is_a_problem();
            assert!(TRUE.contains(&text(&reply.json["code"]).as_str()), "{}", reply.text);
        }
        reply.status < 400
    };
    while Instant::now() < until {
        let created = way.create().await;
        if !is_true(&created) {
            continue;
        }
        made.fetch_add(1, Ordering::Relaxed);
        let cell = way.cell(&created);
        let ran = way.server.post(&cell.path("/executions"), &json!({"code": "6 * 7"})).await;
        if is_true(&ran) && ran.json["status"] == "ok" {
            assert_eq!(ran.json["results"][0]["data"]["text/plain"], "42", "{}", ran.text);
        }
        is_true(&way.server.delete(&cell.path("")).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_leaves_nothing() {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let way = Way::open().await;
    way.proxy.at_random(seed, 8);
    let (until, made) = (Instant::now() + STORM, AtomicUsize::new(0));
    let callers = futures_util::future::join_all((0..CALLERS).map(|_| caller(&way, until, &made)));
    let cuts = async {
        while Instant::now() < until {
            tokio::time::sleep(2 * SECOND).await;
            way.proxy.cut();
        }
    };
    tokio::join!(callers, cuts);
    let hits = way.proxy.calm();
    println!("seed {seed}: {} sessions made, {hits} faults", made.load(Ordering::Relaxed));
    assert!(hits > 10 && made.load(Ordering::Relaxed) > 3, "the storm was none");
    way.proxy.settle().await;
    // What could not be removed is tried again, later each time.
    let ended = async {
        while way.server.get("/v1/sessions?limit=100").await.json["sessions"]
            .as_array()
            .unwrap()
            .iter()
            .any(|s| s["state"] != "ended")
        {
            tokio::time::sleep(SECOND / 10).await;
        }
    };
    tokio::time::timeout(40 * SECOND, ended).await.expect("the end of all sessions");
    way.is_whole("a storm").await;
    way.server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_on_a_bad_way_to_the_engine() {
    let (one, other) = (Way::open().await, Way::open().await);
    let quick = async {
        creates(&one).await;
        removals(&one).await;
        events(&one).await;
        pruned(&one).await;
        away(&one).await;
    };
    let slow = async {
        stalled(&other, STALLED).await;
        too_late(&other).await;
        hanging(&other).await;
    };
    tokio::join!(quick, slow);
    for way in [one, other] {
        way.server.finish().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes two minutes; `make soak` runs it"]
async fn an_engine_that_stops_for_a_minute_costs_nothing() {
    let way = Way::open().await;
    stalled(&way, Duration::from_secs(75)).await;
    way.server.finish().await.unwrap();
}
