//! Standard input and output on one side, the server's door over HTTP on the other: a message a line, in both eras of the protocol. It understands no more of a
//! message than which headers it needs, and bounds what it holds.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, FuturesUnordered};
use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

use crate::cli::problem::Failure;

/// Longest line, in either direction.
const MAX_LINE: usize = 32 * 1024 * 1024;
/// Most requests under way; more are refused. As many other messages may be on their way, which then wait where they are: what takes a request back has to get through.
const MOST: usize = 64;
/// Two answers with one id could not be told apart.
const TWICE: &str = "a request with this id is under way; take another id";
/// Key of the revision in a request's `_meta`.
const VERSION: &str = "io.modelcontextprotocol/protocolVersion";

/// An answer of the door.
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// What an old client's requests belong together by, from now on.
    pub session: Option<String>,
    /// Type of the body.
    pub kind: String,
    /// The body, as it comes.
    pub body: BoxStream<'static, Result<Vec<u8>, String>>,
}

/// Where messages go.
pub trait Door: Send + Sync + 'static {
    /// Sends a message with headers. Dropping the future, or the body of its reply, hangs up.
    fn post(&self, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> BoxFuture<'static, Result<Reply, String>>;
}

/// What is known of the client by now.
#[derive(Debug, Default)]
struct Known {
    session: Option<String>,
    version: Option<String>,
    /// Requests under way, by their ids.
    calls: HashMap<String, CancellationToken>,
}

struct Bridge {
    door: Arc<dyn Door>,
    known: Mutex<Known>,
    out: mpsc::Sender<Vec<u8>>,
}

/// Serves the client on standard input and output until it closes its side and is answered.
///
/// # Errors
/// Standard input can't be read, or standard output not written.
pub async fn bridge(door: Arc<dyn Door>) -> Result<(), Failure> {
    serve(door, BufReader::new(tokio::io::stdin()), tokio::io::stdout()).await
}

async fn serve(
    door: Arc<dyn Door>,
    mut input: impl AsyncBufRead + Unpin,
    mut output: impl AsyncWrite + Unpin,
) -> Result<(), Failure> {
    let (out, mut lines) = mpsc::channel::<Vec<u8>>(MOST);
    let bridge = Arc::new(Bridge { door, known: Mutex::default(), out });
    let reading = async move {
        let (mut running, mut line) = (FuturesUnordered::new(), Line::default());
        loop {
            tokio::select! {
                read = read_line(&mut input, &mut line), if running.len() < 2 * MOST => match read? {
                    Read::Line(line) if line.trim_ascii().is_empty() => {}
                    Read::Line(line) => running.push(Arc::clone(&bridge).pass(line)),
                    Read::TooLong => {
                        let detail = format!("the message is longer than {MAX_LINE} bytes; write_file adds to files by parts");
                        bridge.fail(&Value::Null, -32600, &detail).await;
                    }
                    Read::End => break,
                },
                Some(()) = running.next() => {}
            }
        }
        while running.next().await.is_some() {}
        Ok::<_, Failure>(())
    };
    let writing = async move {
        while let Some(mut line) = lines.recv().await {
            // Between values of JSON these are spaces; within texts they are written otherwise.
            line.retain(|byte| !matches!(byte, b'\n' | b'\r'));
            line.push(b'\n');
            output.write_all(&line).await?;
            output.flush().await?;
        }
        Ok::<_, Failure>(())
    };
    let (read, written) = tokio::join!(reading, writing);
    read.and(written)
}

/// What has come of a line by now.
#[derive(Debug, Default)]
struct Line {
    bytes: Vec<u8>,
    /// It was too long, and the rest of it is passed over.
    is_too_long: bool,
}

/// What was read.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    Line(Vec<u8>),
    TooLong,
    End,
}

/// Reads to the end of a line. What was read before it is dropped stays in `line`, and it goes on there. No more is held of a line than it may have.
async fn read_line(input: &mut (impl AsyncBufRead + Unpin), line: &mut Line) -> Result<Read, Failure> {
    loop {
        let room = (MAX_LINE + 1).saturating_sub(line.bytes.len());
        input.take(room as u64).read_until(b'\n', &mut line.bytes).await?;
        let is_ended = line.bytes.ends_with(b"\n");
        if line.bytes.len() > MAX_LINE && !is_ended {
            line.is_too_long = true;
            line.bytes.clear();
            continue;
        }
        let Line { bytes, is_too_long } = std::mem::take(line);
        return Ok(match (is_too_long, bytes.is_empty()) {
            (true, _) => Read::TooLong,
            (false, true) => Read::End,
            (false, false) => Read::Line(bytes),
        });
    }
}

impl Bridge {
    /// Sends a message and passes on what comes of it.
    async fn pass(self: Arc<Self>, line: Vec<u8>) {
        let Ok(message) = serde_json::from_slice::<Value>(&line) else {
            return self.fail(&Value::Null, -32700, "the line is not JSON").await;
        };
        let id = message.get("id").cloned().unwrap_or_default();
        let taken_back = CancellationToken::new();
        let key = id.to_string();
        if message["method"] == "notifications/cancelled" {
            let target = message["params"]["requestId"].to_string();
            let known = self.known.lock().await;
            // Whoever speaks without sessions takes a request back by hanging up.
            if let (Some(call), None) = (known.calls.get(&target), &known.session) {
                return call.cancel();
            }
        } else if !id.is_null() {
            let mut known = self.known.lock().await;
            let refusal = match known.calls.len() {
                MOST.. => Some(format!("{MOST} requests are under way; send this again when one is answered")),
                _ if known.calls.contains_key(&key) => Some(TWICE.to_owned()),
                _ => None,
            };
            if let Some(refusal) = refusal {
                drop(known);
                return self.fail(&id, -32000, &refusal).await;
            }
            known.calls.insert(key.clone(), taken_back.clone());
        }
        let headers = self.headers(&message).await;
        let posted = self.door.post(headers, line);
        let passed = async {
            match posted.await {
                Ok(reply) => self.take(&message, reply).await,
                Err(error) => Err(error),
            }
        };
        let outcome = taken_back.run_until_cancelled(passed).await;
        self.known.lock().await.calls.remove(&key);
        match outcome {
            Some(Err(error)) if id.is_null() => eprintln!("cellblock: {error}"),
            Some(Err(error)) => self.fail(&id, -32000, &error).await,
            Some(Ok(())) | None => {}
        }
    }

    /// What has to stand in the head of the request, so that proxies need not read its body.
    async fn headers(&self, message: &Value) -> Vec<(&'static str, String)> {
        let text = |value: &Value| value.as_str().map(header_value);
        let mut headers = vec![
            ("content-type", "application/json".to_owned()),
            ("accept", "application/json, text/event-stream".to_owned()),
        ];
        let params = &message["params"];
        let Some(version) = version_of(message) else {
            let known = self.known.lock().await;
            headers.extend(known.session.clone().map(|session| ("mcp-session-id", session)));
            headers.extend(known.version.clone().map(|version| ("mcp-protocol-version", version)));
            return headers;
        };
        headers.push(("mcp-protocol-version", header_value(version)));
        headers.extend(text(&message["method"]).map(|method| ("mcp-method", method)));
        let name = match message["method"].as_str() {
            Some("tools/call" | "prompts/get") => &params["name"],
            Some("resources/read") => &params["uri"],
            _ => &Value::Null,
        };
        headers.extend(text(name).map(|name| ("mcp-name", name)));
        if message["method"] == "tools/call" {
            headers.extend(text(&params["arguments"]["session_id"]).map(|id| ("mcp-param-session-id", id)));
        }
        headers
    }

    /// Passes on what an answer has.
    async fn take(&self, message: &Value, mut reply: Reply) -> Result<(), String> {
        if reply.kind.starts_with("text/event-stream") {
            return self.take_events(reply).await;
        }
        let mut body = Vec::new();
        while let Some(piece) = reply.body.next().await {
            body.extend(piece?);
            if body.len() > MAX_LINE {
                return Err(format!("the server's answer is longer than {MAX_LINE} bytes"));
            }
        }
        if body.is_empty() && reply.status < 300 {
            return Ok(());
        }
        let told = serde_json::from_slice::<Value>(&body).unwrap_or_default();
        if told["jsonrpc"] != "2.0" {
            let detail = told["detail"].as_str().or_else(|| told["title"].as_str()).map(str::to_owned);
            let detail = detail.unwrap_or_else(|| String::from_utf8_lossy(&body).chars().take(300).collect());
            return Err(format!("the server answered {}: {detail}", reply.status));
        }
        if message["method"] == "initialize" && told.get("result").is_some() {
            let mut known = self.known.lock().await;
            known.session = reply.session;
            known.version = told["result"]["protocolVersion"].as_str().map(str::to_owned);
        }
        self.say(body).await
    }

    /// Passes on each event of a stream.
    async fn take_events(&self, mut reply: Reply) -> Result<(), String> {
        let (mut pending, mut data) = (Vec::new(), Vec::new());
        while let Some(piece) = reply.body.next().await {
            pending.extend(piece?);
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let line = line.trim_ascii_end();
                if let Some(more) = line.strip_prefix(b"data:") {
                    data.extend_from_slice(more.trim_ascii_start());
                } else if line.is_empty() && !data.is_empty() {
                    self.say(std::mem::take(&mut data)).await?;
                }
            }
            if pending.len() + data.len() > MAX_LINE {
                return Err(format!("an event of the server is longer than {MAX_LINE} bytes"));
            }
        }
        Ok(())
    }

    async fn fail(&self, id: &Value, code: i32, message: &str) {
        let line = json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}});
        // A client that reads nothing more is told nothing.
        let _ = self.say(line.to_string().into_bytes()).await;
    }

    async fn say(&self, line: Vec<u8>) -> Result<(), String> {
        self.out.send(line).await.map_err(|_| "standard output is closed".to_owned())
    }
}

/// The revision that a request speaks by itself, without an `initialize` before it.
fn version_of(message: &Value) -> Option<&str> {
    message["params"]["_meta"][VERSION].as_str()
}

/// A text as a header can have it.
fn header_value(text: &str) -> String {
    use base64::Engine as _;
    let is_plain = text.bytes().all(|b| (0x20..0x7f).contains(&b)) && text.trim() == text && !text.is_empty();
    if is_plain && !text.starts_with("=?base64?") {
        return text.to_owned();
    }
    format!("=?base64?{}?=", base64::engine::general_purpose::STANDARD.encode(text))
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, stream};

    use super::*;

    /// Answers each message as its method asks for, and keeps what it was sent with.
    struct Echo(std::sync::Mutex<Vec<Vec<(&'static str, String)>>>);

    impl Door for Echo {
        fn post(
            &self,
            headers: Vec<(&'static str, String)>,
            body: Vec<u8>,
        ) -> BoxFuture<'static, Result<Reply, String>> {
            self.0.lock().unwrap().push(headers);
            let message: Value = serde_json::from_slice(&body).unwrap();
            let answer = json!({"jsonrpc": "2.0", "id": message["id"], "result": {"protocolVersion": "2025-11-25"}});
            let pieces = |text: String| {
                let cut: Vec<_> = text.into_bytes().chunks(7).map(|piece| Ok(piece.to_vec())).collect();
                stream::iter(cut).boxed()
            };
            let reply = |status, kind: &str, text: String| Reply {
                status,
                session: Some("s".to_owned()),
                kind: kind.to_owned(),
                body: pieces(text),
            };
            let reply = match message["method"].as_str().unwrap() {
                "stream" => reply(
                    200,
                    "text/event-stream",
                    format!(": ping\n\ndata: {{\"a\":\ndata: 1}}\n\ndata: {answer}\n\n"),
                ),
                "refused" => reply(401, "application/problem+json", json!({"detail": "no key"}).to_string()),
                "silent" => reply(202, "", String::new()),
                "never" => return std::future::pending().boxed(),
                _ => reply(200, "application/json", format!("{answer:#}")),
            };
            std::future::ready(Ok(reply)).boxed()
        }
    }

    async fn answered(input: &[u8]) -> Vec<Value> {
        let (door, mut output) = (Arc::new(Echo(std::sync::Mutex::default())), Vec::new());
        serve(door, input, &mut output).await.unwrap();
        let lines = output.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_is_answered_and_the_next_is_read() {
        let next = json!({"id": 1, "method": "x"}).to_string();
        for over in [1, MAX_LINE + 7] {
            let mut input = vec![b'y'; MAX_LINE + over];
            input.extend(format!("\n{next}\n").into_bytes());
            let lines = answered(&input).await;
            assert_eq!((lines.len(), &lines[0]["error"]["code"]), (2, &json!(-32600)), "{over}");
            assert_eq!((&lines[0]["id"], &lines[1]["id"]), (&Value::Null, &json!(1)), "{over}");
        }
        let lines = answered(&vec![b'y'; MAX_LINE + 1]).await;
        assert_eq!((lines.len(), &lines[0]["error"]["code"]), (1, &json!(-32600)), "the last one too");
    }

    #[tokio::test]
    async fn requests_beyond_the_bound_and_ids_under_way_are_refused_and_can_be_taken_back() {
        let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28"});
        let never = |id: usize| json!({"id": id, "method": "never", "params": {"_meta": meta}}).to_string();
        let cancel = |id: usize| json!({"method": "notifications/cancelled", "params": {"requestId": id}}).to_string();
        let twice = [never(0), never(0), cancel(0)].join("\n");
        let lines = answered(twice.as_bytes()).await;
        assert_eq!((lines.len(), &lines[0]["id"], &lines[0]["error"]["message"]), (1, &json!(0), &json!(TWICE)));
        // One more than there may be; then all are taken back, for which there is room.
        let all = (0..=MOST).map(never).chain((0..MOST).map(cancel)).collect::<Vec<_>>().join("\n");
        let lines = answered(all.as_bytes()).await;
        assert_eq!((lines.len(), &lines[0]["id"]), (1, &json!(MOST)), "{lines:?}");
        assert!(lines[0]["error"]["message"].as_str().unwrap().contains("64 requests"), "{}", lines[0]);
    }

    async fn passed(lines: &[Value]) -> (Vec<Value>, Vec<Vec<(&'static str, String)>>) {
        let door = Arc::new(Echo(std::sync::Mutex::default()));
        let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let mut output = Vec::new();
        serve(Arc::clone(&door) as Arc<dyn Door>, input.as_bytes(), &mut output).await.unwrap();
        let lines = output.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        let lines = lines.map(|line| serde_json::from_slice(line).unwrap()).collect();
        let headers = std::mem::take(&mut *door.0.lock().unwrap());
        (lines, headers)
    }

    #[tokio::test]
    async fn every_answer_is_one_line_whatever_form_it_came_in() {
        let (lines, _) = passed(&[json!({"id": 1, "method": "x"})]).await;
        assert_eq!((lines.len(), &lines[0]["id"]), (1, &json!(1)));
        let (lines, _) = passed(&[json!({"id": 2, "method": "stream"})]).await;
        assert_eq!((lines.len(), &lines[0], &lines[1]["id"]), (2, &json!({"a": 1}), &json!(2)));
        let (lines, _) = passed(&[json!({"id": 3, "method": "refused"}), json!({"method": "silent"})]).await;
        assert_eq!(lines.len(), 1);
        assert!(lines[0]["error"]["message"].as_str().unwrap().contains("401: no key"), "{}", lines[0]);
    }

    #[tokio::test]
    async fn a_request_of_the_new_era_says_in_its_head_what_it_is_and_hangs_up_when_it_is_taken_back() {
        let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28"});
        let call = json!({"id": 7, "method": "tools/call",
            "params": {"_meta": meta, "name": "é", "arguments": {"session_id": "ses1"}}});
        let (_, headers) = passed(&[call]).await;
        for header in [
            ("mcp-protocol-version", "2026-07-28"),
            ("mcp-method", "tools/call"),
            ("mcp-name", "=?base64?w6k=?="),
            ("mcp-param-session-id", "ses1"),
        ] {
            assert!(headers[0].contains(&(header.0, header.1.to_owned())), "{header:?} {headers:?}");
        }
        let never = json!({"id": 8, "method": "never", "params": {"_meta": meta}});
        let cancel = json!({"method": "notifications/cancelled", "params": {"requestId": 8}});
        let (lines, headers) = passed(&[never, cancel]).await;
        assert_eq!((lines.len(), headers.len()), (0, 1), "it ended, and nothing more was sent");
    }
}
