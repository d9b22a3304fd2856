//! Traces as a collector gets them, from a real server with real containers: one trace an execution, below its caller's span, with nothing secret in it; and a
//! collector that does not answer holds up nobody.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use cellblock::task;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use prost::Message;
use reqwest::Method;
use serde_json::{Value, json};
use server::{Cell, NEVER, Server, text};
use tokio::net::TcpListener;
use tokio::sync::watch;

const SETTINGS: &str = r#"
default_template = "small"
[templates.small]
image = "cellblock/python:latest"
[templates.small.default]
memory = "160MiB"
disk = "16MiB"
tmp = "16MiB"
"#;
/// Stands in code and in what it puts out.
const MARK: &str = "marked_6f1c";
/// Of a caller.
const PARENT: &str = "b7ad6b7169203331";
const SECRET: &str = "Bearer of-the-collector";

/// A collector that keeps what it gets.
struct Collector {
    address: SocketAddr,
    got: watch::Receiver<Vec<(HeaderMap, Bytes)>>,
}

impl Collector {
    /// With `answers`, it takes what it gets; without, no request is ever answered.
    async fn start(answers: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (keep, got) = watch::channel(Vec::new());
        let take = async move |headers: HeaderMap, body: Bytes| {
            keep.send_modify(|got: &mut Vec<_>| got.push((headers, body)));
            if !answers {
                std::future::pending::<()>().await;
            }
            StatusCode::OK
        };
        let router = Router::new().route("/v1/traces", post(take));
        task::spawn("collector", async move { axum::serve(listener, router).await.unwrap() });
        Self { address, got }
    }

    /// All spans by now, with the names of the services that they are of.
    fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::new();
        for (headers, body) in self.got.borrow().iter() {
            assert_eq!(headers["content-type"], "application/x-protobuf");
            let authorization = headers.get("authorization").map(|value| value.to_str().unwrap());
            assert_eq!(authorization, Some(SECRET));
            let request = ExportTraceServiceRequest::decode(body.clone()).unwrap();
            for of_resource in request.resource_spans {
                let resource = of_resource.resource.unwrap();
                let name = resource.attributes.iter().find(|a| a.key == "service.name").unwrap();
                assert_eq!(name.value.clone().unwrap().value, Some(AnyValue::StringValue("cells".to_owned())));
                spans.extend(of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
            }
        }
        spans
    }

    /// The spans of one trace, once there are so many.
    async fn trace(&self, id: &str, count: usize) -> Trace {
        let mut got = self.got.clone();
        let all = async {
            loop {
                let spans: Vec<_> = self.spans().into_iter().filter(|span| hex(&span.trace_id) == id).collect();
                if spans.len() >= count {
                    return Trace(spans);
                }
                got.changed().await.unwrap();
            }
        };
        let trace = tokio::time::timeout(NEVER, all).await;
        let trace = trace.unwrap_or_else(|_| panic!("not {count} spans of {id}: {:#?}", self.spans()));
        assert_eq!(trace.0.len(), count, "{trace:#?}");
        trace
    }
}

#[derive(Debug)]
struct Trace(Vec<Span>);

impl Trace {
    fn span(&self, name: &str) -> &Span {
        let mut found = self.0.iter().filter(|span| span.name == name);
        let span = found.next().unwrap_or_else(|| panic!("no {name} in {self:#?}"));
        assert!(found.next().is_none(), "{name} twice in {self:#?}");
        span
    }

    fn request(&self) -> &Span {
        let span = self.span("POST /v1/sessions/{id}/executions");
        assert_eq!(span.kind, SpanKind::Server as i32);
        assert_eq!(attribute(span, "http.request.method"), "POST");
        assert_eq!(attribute(span, "http.route"), "/v1/sessions/{id}/executions");
        assert_eq!(
            (attribute(span, "url.scheme"), attribute(span, "server.address")),
            ("http".into(), "127.0.0.1".into())
        );
        span
    }

    /// What became of an execution, below the request, in order and without a gap.
    fn of_execution(&self, names: &[&str], cell: &Cell, id: &str, status: &str) {
        let request = self.request();
        let spans: Vec<_> = names.iter().map(|name| self.span(name)).collect();
        assert_eq!(self.0.len(), names.len() + 1, "{self:#?}");
        for span in &spans {
            assert_eq!((&span.parent_span_id, span.kind), (&request.span_id, SpanKind::Internal as i32));
            let told = ["cellblock.session.id", "cellblock.execution.id", "cellblock.template", "cellblock.status"]
                .map(|name| attribute(span, name));
            assert_eq!(told, [cell.id.as_str(), id, "small", status]);
        }
        assert!(request.start_time_unix_nano <= spans[0].start_time_unix_nano, "{self:#?}");
        for pair in spans.windows(2) {
            assert_eq!(pair[0].end_time_unix_nano, pair[1].start_time_unix_nano, "{self:#?}");
        }
        for span in &spans {
            assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{self:#?}");
            let is_wrong = status != "ok" && span.name == *names.last().unwrap();
            let expected = if is_wrong { SpanStatus::Error } else { SpanStatus::Unset };
            assert_eq!(span.status.as_ref().unwrap().code, expected as i32, "{span:#?}");
            assert_eq!(attribute(span, "error.type"), if is_wrong { status } else { "" });
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Nothing where there is none of that name.
fn attribute(span: &Span, name: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key == name);
    match found.and_then(|attribute| attribute.value.clone()?.value) {
        Some(AnyValue::StringValue(text)) => text,
        Some(AnyValue::IntValue(number)) => number.to_string(),
        None => String::new(),
        Some(other) => panic!("{other:?}"),
    }
}

/// A trace of a caller, by a number.
fn caller(number: u128) -> (String, String) {
    let id = format!("{:032x}", 0xa000 + number);
    let header = format!("00-{id}-{PARENT}-01");
    (id, header)
}

async fn execute(cell: &Cell, traceparent: &str, body: Value) -> Value {
    let request = cell.server.request(Method::POST, &cell.path("/executions")).header("traceparent", traceparent);
    let reply = cell.server.send(request.header("tracestate", "vendor=opaque").json(&body)).await;
    assert!(reply.status == 200 || reply.status == 202, "{}", reply.text);
    assert!(reply.headers.get("traceparent").is_none() && reply.headers.get("tracestate").is_none());
    reply.json
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_execution_is_one_trace_from_its_caller_to_the_kernel() {
    let collector = Collector::start(true).await;
    let secrets = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&secrets, format!("Authorization: {SECRET}\n")).unwrap();
    std::fs::set_permissions(&secrets, std::fs::Permissions::from_mode(0o600)).unwrap();
    let settings = format!(
        "log.format = \"json\"\n{SETTINGS}\n[traces]\nendpoint = \"http://{}/\"\nservice_name = \"cells\"\nheaders_file = {:?}\n",
        collector.address,
        secrets.path(),
    );
    let (server, _) = Server::spawn(&settings).await;
    let cell = server.create(json!({})).await;

    runs_to_its_end(&cell, &collector).await;
    goes_on_in_the_background(&cell, &collector).await;
    goes_on_when_its_caller_leaves(&cell, &collector).await;
    fails(&cell, &collector).await;
    is_told_as_its_caller_says(&server, &cell, &collector).await;

    cell.delete().await;
    let log = std::fs::read_to_string(server.data().parent().unwrap().join("log")).unwrap();
    assert!(log.contains(&format!("\"trace_id\":\"{}\"", caller(1).0)), "{log}");
    server.finish().await.unwrap();
    for secret in [MARK, &server.key, SECRET] {
        let is_told = |(_, body): &(HeaderMap, Bytes)| String::from_utf8_lossy(body).contains(secret);
        assert!(!collector.got.borrow().iter().any(is_told), "{secret} was sent");
        assert!(!log.contains(secret), "{secret} is in the log");
    }
    let deleted = collector.spans().into_iter().find(|span| span.name == "DELETE /v1/sessions/{id}");
    assert!(deleted.is_some(), "what was told last is not sent when the server ends");
}

async fn runs_to_its_end(cell: &Cell, collector: &Collector) {
    let (id, traceparent) = caller(1);
    let ran = execute(cell, &traceparent, json!({"code": format!("print('{MARK}')")})).await;
    let trace = collector.trace(&id, 4).await;
    trace.of_execution(&["queue", "link", "kernel"], cell, &text(&ran["id"]), "ok");
    let request = trace.request();
    assert_eq!((hex(&request.parent_span_id).as_str(), request.trace_state.as_str()), (PARENT, "vendor=opaque"));
    assert_eq!(attribute(request, "http.response.status_code"), "200");
    assert_eq!(attribute(request, "cellblock.session.id"), cell.id);
    assert_eq!(attribute(request, "cellblock.execution.id"), text(&ran["id"]));
    assert!(trace.span("kernel").end_time_unix_nano <= request.end_time_unix_nano, "{trace:#?}");
}

/// One that ends after its request, one that waits behind it, and one that is taken back before it runs.
async fn goes_on_in_the_background(cell: &Cell, collector: &Collector) {
    let [(id, first), (waiting_id, second), (cancelled_id, third)] = [caller(2), caller(3), caller(4)];
    let body = json!({"code": format!("{MARK} = input()"), "background": true, "stdin": "interactive"});
    let asks = text(&execute(cell, &first, body).await["id"]);
    let waits = text(&execute(cell, &second, json!({"code": "1", "background": true})).await["id"]);
    let cancelled = text(&execute(cell, &third, json!({"code": "1", "background": true})).await["id"]);
    assert_eq!(cell.server.post(&format!("/v1/executions/{cancelled}/cancel"), &Value::Null).await.status / 100, 2);
    cell.server.follow(&asks, 0).await.until("input.requested").await;
    let answer = json!({"text": MARK});
    assert_eq!(cell.server.post(&format!("/v1/executions/{asks}/input"), &answer).await.status / 100, 2);

    let trace = collector.trace(&id, 4).await;
    trace.of_execution(&["queue", "link", "kernel"], cell, &asks, "ok");
    assert_eq!(attribute(trace.request(), "http.response.status_code"), "202");
    assert!(trace.span("kernel").end_time_unix_nano > trace.request().end_time_unix_nano, "{trace:#?}");
    let trace = collector.trace(&waiting_id, 4).await;
    trace.of_execution(&["queue", "link", "kernel"], cell, &waits, "ok");
    assert!(trace.span("queue").end_time_unix_nano > trace.request().end_time_unix_nano, "{trace:#?}");
    let trace = collector.trace(&cancelled_id, 2).await;
    trace.of_execution(&["queue"], cell, &cancelled, "cancelled");
}

async fn goes_on_when_its_caller_leaves(cell: &Cell, collector: &Collector) {
    let (id, traceparent) = caller(5);
    let request = cell.server.request(Method::POST, &cell.path("/executions")).header("traceparent", traceparent);
    let request = request.json(&json!({"code": "import time\ntime.sleep(600)"}));
    tokio::select! {
        reply = cell.server.send(request) => panic!("{}", reply.text),
        _ = cell.wait("busy") => {}
    }
    assert_eq!(attribute(collector.trace(&id, 1).await.request(), "http.response.status_code"), "");
    assert_eq!(cell.server.post(&cell.path("/interrupt"), &Value::Null).await.status / 100, 2);
    let trace = collector.trace(&id, 4).await;
    let execution = attribute(trace.span("kernel"), "cellblock.execution.id");
    trace.of_execution(&["queue", "link", "kernel"], cell, &execution, "error");
    assert!(trace.span("kernel").end_time_unix_nano > trace.request().end_time_unix_nano, "{trace:#?}");
}

async fn fails(cell: &Cell, collector: &Collector) {
    let (id, traceparent) = caller(6);
    let ran = execute(cell, &traceparent, json!({"code": format!("raise ValueError('{MARK}')")})).await;
    let trace = collector.trace(&id, 4).await;
    trace.of_execution(&["queue", "link", "kernel"], cell, &text(&ran["id"]), "error");
    assert_eq!(trace.request().status.as_ref().unwrap().code, SpanStatus::Unset as i32, "the request went well");
}

/// Not where the caller does not sample, below nobody where what it says is not valid, and not for whoever has no key.
async fn is_told_as_its_caller_says(server: &Server, cell: &Cell, collector: &Collector) {
    let [(unsampled, header), (stranger, strange), (last, after)] = [caller(7), caller(8), caller(9)];
    execute(cell, &header.replace("-01", "-00"), json!({"code": "1"})).await;
    let unknown = server.bare(Method::GET, "/v1/sessions").header("traceparent", strange);
    server.send(unknown).await.problem(401, "unauthenticated");
    let invalid = text(&execute(cell, &header.to_uppercase(), json!({"code": "1"})).await["id"]);
    execute(cell, &after, json!({"code": "1"})).await;
    // They come in the order in which they have ended, so nothing of what was before is missing by then.
    collector.trace(&last, 4).await;
    let spans = collector.spans();
    assert!(!spans.iter().any(|span| [&unsampled, &stranger].contains(&&hex(&span.trace_id))));
    let own: Vec<_> = spans.into_iter().filter(|span| attribute(span, "cellblock.execution.id") == invalid).collect();
    let trace = Trace(own);
    trace.of_execution(&["queue", "link", "kernel"], cell, &invalid, "ok");
    assert!(trace.request().parent_span_id.is_empty(), "{trace:#?}");
    assert!(trace.0.iter().all(|span| span.trace_id == trace.request().trace_id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_does_not_answer_holds_up_nobody() {
    let collector = Collector::start(false).await;
    let admin = TcpListener::bind("127.0.0.1:0").await.and_then(|listener| listener.local_addr()).unwrap();
    let settings = format!(
        "server.admin_listen = \"{admin}\"\n{SETTINGS}\n[traces]\nendpoint = \"http://{}\"\ntimeout = \"60s\"\nqueue = 8\n",
        collector.address
    );
    let server = Server::start(&settings).await;
    let cell = server.create(json!({})).await;
    let mut got = collector.got.clone();
    // It has a request that it does not answer.
    tokio::time::timeout(NEVER, got.wait_for(|got| !got.is_empty())).await.unwrap().unwrap();
    for number in 0..10 {
        assert_eq!(cell.value(&number.to_string()).await, number.to_string());
    }
    assert_eq!(collector.got.borrow().len(), 1, "the first request was given up meanwhile");
    let metrics = server.bare_at(Method::GET, &format!("http://{admin}/metrics")).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let dropped = metrics.lines().find_map(|line| line.strip_prefix("cellblock_trace_spans_dropped_total "));
    let dropped: usize = dropped.unwrap().parse().unwrap();
    // Four an execution, of which the last request's may not be told yet; what waits in the queue was not dropped.
    assert!((31..=32).contains(&dropped), "{dropped} were dropped");
    cell.delete().await;
    server.finish().await.unwrap();
}
