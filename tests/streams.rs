//! Answers that last: what becomes of them when nobody takes them, when their key is taken away, and when a link breaks. The whole front door in this
//! process, on the fake engine; callers over HTTP/2 decide themselves how much room they give.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/bench.rs"]
mod bench;
#[path = "support/engine_fake.rs"]
mod engine_fake;
#[path = "support/withheld.rs"]
mod withheld;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::{Bench, INSTANCE, NEVER, bounded, cell_of};
use bytes::Bytes;
use cellblock::domain::ids::{ExecutionId, KeyId, SessionId};
use cellblock::domain::output::{JsonText, Shown, Status, TextStream};
use cellblock::http;
use cellblock::service::Error;
use cellblock::service::issuing::KeyRequest;
use cellblock::service::keys::{Principal, Scope};
use cellblock::session::fresh;
use cellblock::store::{Archive, ArchiveLimits, NotebookCell, NotebookKernel, Owner};
use engine_fake::FakeEngine;
use jiff::Timestamp;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use withheld::{End, Streams};

/// How long nothing may be taken here.
const PATIENCE: Duration = Duration::from_secs(1);
/// Streams of a key that was taken away are closed within this time.
const CLOSED: Duration = Duration::from_secs(5);
const MIB: usize = 1 << 20;

/// A front door before the fake engine.
struct Front {
    bench: Bench,
    archive: Archive,
    address: SocketAddr,
    operator: Principal,
    stop: CancellationToken,
    _folder: tempfile::TempDir,
}

impl Front {
    async fn open() -> Self {
        Self::with_patience(PATIENCE).await
    }

    async fn with_patience(patience: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let limits = ArchiveLimits {
            blob_bytes: 256 << 20,
            blob_retention: NEVER,
            notebook_bytes: 256 << 20,
            notebooks_bytes: 1 << 30,
            notebook_retention: NEVER,
        };
        let archive = Archive::open(folder.path(), limits).unwrap();
        let engine = Arc::new(FakeEngine::new(INSTANCE));
        let bench = Bench::keeping(engine, Some(archive.clone()), None, |_, _| {});
        let (app, connections) = (bench.app(), bench.connections(patience));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        cellblock::task::spawn("server", http::serve(listener, app, connections, stop.clone()));
        let operator = Principal::new("operators", [Scope::Admin]);
        Self { bench, archive, address, operator, stop, _folder: folder }
    }

    async fn key(&self, expires_in_seconds: Option<f64>) -> (KeyId, String) {
        let request = KeyRequest {
            name: "k".to_owned(),
            tenant: Some(self.bench.who.tenant.to_string()),
            scopes: vec!["sessions".to_owned()],
            templates: None,
            expires_in_seconds,
        };
        let (key, secret) = self.bench.service.create_key(&self.operator, request).await.unwrap();
        (key.record.id, secret)
    }

    /// A connection of HTTP/2 each of whose streams has room for so many bytes until it gives more.
    async fn streams(&self, room: u32) -> Streams {
        Streams::open(TcpStream::connect(self.address).await.unwrap(), room).await
    }

    /// Has a notebook of this size kept for a session that is not known any more.
    async fn notebook(&self, tenant: &str, bytes: usize) -> SessionId {
        let session = fresh();
        let text = |text: &str| text.to_owned();
        let kernel = NotebookKernel {
            kernelspec: text("k"),
            display_name: text("K"),
            language: text("k"),
            language_info: JsonText::object(),
        };
        self.archive.open_notebook(tenant, session, kernel);
        // More does not wait to be written at once.
        let one = bytes.min(16 * MIB);
        for _ in 0..bytes.div_ceil(one) {
            let cell = NotebookCell {
                execution: fresh(),
                context: fresh(),
                code: text("print(x)"),
                language: text("k"),
                execution_count: Some(1),
                status: Status::Ok,
                shown: vec![Shown::Text { stream: TextStream::Stdout, text: "x".repeat(one) }],
                updates: Vec::new(),
                detail: None,
                queued_at: Timestamp::now(),
                started_at: None,
                finished_at: Timestamp::now(),
            };
            self.archive.add_cell(session, cell);
            self.archive.flush().await;
        }
        session
    }

    fn blob(&self, bytes: usize) -> ExecutionId {
        let execution = fresh();
        let owner = Owner { tenant: Arc::clone(&self.bench.who.tenant), session: fresh(), execution };
        self.archive.put_blob(&owner, 0, "text/plain", vec![b'x'; bytes].into()).unwrap();
        execution
    }

    async fn close(self) {
        self.stop.cancel();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_taken_over_http2_is_ended_and_the_rest_goes_on() {
    let front = Front::open().await;
    let (_, key) = front.key(None).await;
    let session = front.bench.create().await.unwrap();
    let said = front.bench.run(&session, &format!("print {}", "x".repeat(500)), 5.0).await;
    let notebook = front.notebook("one", MIB).await;
    let (small, large) = (front.blob(300), front.blob(4 * MIB));
    front.archive.flush().await;
    let paths = [
        format!("/v1/sessions/{notebook}/notebook"),
        format!("/v1/executions/{small}/blobs/0"),
        format!("/v1/executions/{large}/blobs/0"),
        format!("/v1/executions/{}/events", said.id),
        format!("/v1/executions/{}", said.id),
        format!("/v1/sessions/{}", session.id),
        "/v1/there-is-no-such-path".to_owned(),
        "/docs/swagger-ui-bundle.js".to_owned(),
    ];
    // No room, some that is used up at once, and more than a frame of it.
    for room in [0, 10, 60_000] {
        let streams = front.streams(room).await;
        let asked = Instant::now();
        let unread = paths.iter().map(|path| async {
            let mut answer = streams.get(path, &key, &[]).await;
            let end = answer.unread(NEVER).await;
            (path.clone(), end, asked.elapsed())
        });
        for (path, end, took) in futures_util::future::join_all(unread).await {
            // What has room as a whole is no affair of this test.
            if let End::Whole(bytes) = end {
                assert!(bytes <= room as usize, "{path} with {room}");
                continue;
            }
            assert_eq!(end, End::Reset(h2::Reason::CANCEL), "{path} with {room}");
            assert!((PATIENCE..PATIENCE * 5).contains(&took), "{path} with {room}: {took:?}");
        }
        // The connection and its other streams are as they were.
        if room > 0 {
            let answer = streams.get("/livez", &key, &[]).await.taken(Duration::ZERO, NEVER).await;
            assert!(matches!(answer, End::Whole(20..)), "{answer:?}");
        }
    }
    front.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_slow_or_has_nothing_to_hear_is_left_alone() {
    let front = Front::open().await;
    let (_, key) = front.key(None).await;
    let session = front.bench.create().await.unwrap();
    let running = front.bench.start(&session, "hang", 30.0).await.unwrap();
    let large = front.blob(4 * MIB);
    front.archive.flush().await;
    let streams = front.streams(65_535).await;
    let mut quiet = streams.get(&format!("/v1/executions/{}/events", running.id), &key, &[]).await;
    let began = Instant::now();
    let slow = streams.get(&format!("/v1/executions/{large}/blobs/0"), &key, &[]).await;
    assert_eq!(slow.taken(Duration::from_millis(30), NEVER).await, End::Whole(4 * MIB));
    assert!(began.elapsed() > 2 * PATIENCE, "it was to take longer than nothing may be taken");
    assert_eq!(quiet.unread(PATIENCE).await, End::Open);
    // One that was quiet for long is heard all the same.
    front.bench.service.cancel(&front.bench.who, running.id).unwrap();
    assert!(matches!(quiet.taken(Duration::ZERO, NEVER).await, End::Whole(1..)));
    front.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_notebooks_are_a_tenants_own_trouble_and_give_their_room_back() {
    // It takes a while to make such notebooks of their files.
    let front = Front::with_patience(8 * PATIENCE).await;
    let (_, key) = front.key(None).await;
    // Two of them are more than one tenant may have on its way, and less than there may be.
    let own = front.notebook("one", 70 * MIB).await;
    let others = front.notebook("two", 70 * MIB).await;
    let fetch = async |tenant: &str, id| {
        front.bench.service.notebook(&Principal::new(tenant, [Scope::Read]), id).await.map(|bytes| bytes.len())
    };
    assert!(fetch("one", own).await.unwrap() > 70 * MIB);
    let streams = front.streams(10).await;
    let mut unread = streams.get(&format!("/v1/sessions/{own}/notebook"), &key, &[]).await;
    assert_eq!(fetch("one", own).await, Err(Error::OwnNotebooksBusy), "the control: it has its room");
    assert!(fetch("two", others).await.is_ok());
    let refused = reqwest::Client::new().get(format!("http://{}/v1/sessions/{own}/notebook", front.address));
    assert_eq!(refused.bearer_auth(&key).send().await.unwrap().status(), 429);
    assert_eq!(unread.unread(NEVER).await, End::Reset(h2::Reason::CANCEL));
    bounded(async {
        while fetch("one", own).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    front.close().await;
}

/// Follows something over HTTP/1.1 until it ends; whether it ended well.
async fn followed(response: reqwest::Response) -> bool {
    response.bytes().await.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_close_with_their_key_and_no_others_do() {
    let front = Front::open().await;
    let session = front.bench.create().await.unwrap();
    let running = front.bench.start(&session, "hang", 30.0).await.unwrap();
    let events = format!("/v1/executions/{}/events", running.id);
    let metrics = format!("/v1/sessions/{}/metrics?interval_seconds=1", session.id);
    let asked = [(&events, "text/event-stream"), (&events, "application/x-ndjson"), (&metrics, "text/event-stream")];
    let http = reqwest::Client::new();
    let open = async |key: &str| {
        let streams = front.streams(65_535).await;
        let (mut one, mut two) = (Vec::new(), Vec::new());
        for (path, accept) in asked {
            let request = http.get(format!("http://{}{path}", front.address)).bearer_auth(key);
            let response = request.header("accept", accept).send().await.unwrap();
            assert_eq!(response.status(), 200);
            one.push(response);
            two.push(streams.get(path, key, &[("accept", accept)]).await);
        }
        (one, two)
    };
    let ((_, stays), (revoked, goes), (_, expires)) =
        (front.key(None).await, front.key(None).await, front.key(Some(3.0)).await);
    let expiry = Instant::now() + Duration::from_secs(3);
    let (mut kept, mut closed, mut expired) = (open(&stays).await, open(&goes).await, open(&expires).await);
    assert_eq!(closed.1[0].unread(Duration::from_millis(500)).await, End::Open, "the control");

    let began = Instant::now();
    front.bench.service.revoke_key(&front.operator, revoked).await.unwrap();
    let all = async |(one, two): &mut (Vec<reqwest::Response>, Vec<withheld::Answer>)| {
        for response in one.drain(..) {
            assert!(!followed(response).await, "a stream that is broken off does not look whole");
        }
        for answer in two.drain(..) {
            let end = answer.taken(Duration::ZERO, NEVER).await;
            assert!(matches!(end, End::Reset(_)), "{end:?}");
        }
    };
    bounded(all(&mut closed)).await;
    assert!(began.elapsed() < CLOSED, "{:?}", began.elapsed());
    bounded(all(&mut expired)).await;
    assert!(Instant::now() >= expiry && expiry.elapsed() < CLOSED, "{:?}", expiry.elapsed());

    // What the key has begun goes on, and so do streams of other keys.
    assert_eq!(running.status(), Status::Running);
    assert_eq!(kept.1[0].unread(Duration::from_millis(200)).await, End::Open);
    front.bench.service.cancel(&front.bench.who, running.id).unwrap();
    front.bench.service.delete_session(&front.bench.who, session.id).await.unwrap();
    for response in kept.0.drain(..) {
        assert!(bounded(followed(response)).await);
    }
    for answer in kept.1.drain(..) {
        assert!(matches!(answer.taken(Duration::ZERO, NEVER).await, End::Whole(1..)));
    }
    front.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn figures_are_told_on_after_a_link_was_lost_until_the_session_ends() {
    let front = Front::open().await;
    let (_, key) = front.key(None).await;
    let session = front.bench.create().await.unwrap();
    let http = reqwest::Client::new();
    let path = format!("http://{}/v1/sessions/{}/metrics", front.address, session.id);
    let request = http.get(format!("{path}?interval_seconds=1")).bearer_auth(&key);
    let mut followed = request.header("accept", "text/event-stream").send().await.unwrap();
    let mut next = async || -> Option<Bytes> { bounded(followed.chunk()).await.unwrap() };
    assert!(next().await.is_some() && next().await.is_some());
    front.bench.engine.faults(|faults| faults.unreachable = true);
    front.bench.engine.cut_links(&cell_of(&session));
    // Longer than the time between two events, so one is missed.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(http.get(&path).bearer_auth(&key).send().await.unwrap().status(), 409, "the control: it can't be asked");
    front.bench.engine.faults(|faults| faults.unreachable = false);
    for _ in 0..3 {
        let event = next().await.expect("it goes on");
        assert!(event.starts_with(b"event: metrics"), "{event:?}");
    }
    front.bench.service.delete_session(&front.bench.who, session.id).await.unwrap();
    bounded(async { while next().await.is_some() {} }).await;
    front.close().await;
}
