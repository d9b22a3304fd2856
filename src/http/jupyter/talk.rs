//! A client's connection to a kernel: what it hears, at its own pace, and its end. What it says is worked on beside.
//!
//! A ping carries the number of the newest message before it, so the pong says what the client has: from there on it hears again when it comes back. Who does not
//! take what is sent, or answers no ping, costs its own connection only.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::extract::ws::{self, CloseFrame, WebSocket, close_code};
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::asking::Asking;
use super::codec::{self, Form, Garbage, Incoming};
use crate::domain::execution::Asker;
use crate::domain::ids::ExecutionId;
use crate::session::Session;
use crate::session::tap::{Channel, Heard, Listener, Message, Silence};

/// A client is asked whether it is there …
const PING: Duration = Duration::from_secs(30);
/// … and is taken for gone when it has not answered for so long.
const GONE: Duration = Duration::from_secs(90);
/// It is asked earlier after so many bytes, or messages, so that not much is told again.
const PING_BYTES: usize = 512 * 1024;
const PING_MESSAGES: usize = 500;
/// What is sent is taken within this time.
const TAKES: Duration = Duration::from_secs(60);
/// Bytes that are sent together.
const BATCH: usize = 256 * 1024;
/// What a client still says is read for so long after the end was said to it.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Answers of this server's own that may wait for a client.
const ANSWERS: usize = 16;

/// A client may come back at once, and hears what it has missed.
const COME_BACK: u16 = 1012;
/// The same, later.
const COME_BACK_LATER: u16 = 1013;

/// A connection.
pub(super) struct Talk {
    pub(super) asking: Asking,
    pub(super) session: Session,
    pub(super) form: Form,
    pub(super) asker: Asker,
    pub(super) address: Option<IpAddr>,
    /// As it may be told.
    pub(super) path: String,
}

/// What this server says to a client, beside what the kernel does.
pub(super) enum Say {
    Message(Message),
    Close(u16, &'static str),
}

/// What the two halves of a connection know of each other.
pub(super) struct Shared {
    began: Instant,
    /// One more than the number of the newest message that the client has; 0: it has not said.
    has: AtomicU64,
    /// Milliseconds from the beginning to the last pong, or the end of the last work on a message.
    ponged: AtomicU64,
    /// A message is worked on: nothing more is read meanwhile, so the client's silence is not its own.
    is_at_work: AtomicBool,
    /// The execution that has asked this client for a line.
    pub(super) asks: Mutex<Option<ExecutionId>>,
    pub(super) says: mpsc::Sender<Say>,
}

impl Shared {
    fn new(says: mpsc::Sender<Say>) -> Self {
        let (has, ponged, is_at_work) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Self { began: Instant::now(), has, ponged, is_at_work, asks: Mutex::default(), says }
    }

    /// How long the client has been silent while it was heard.
    fn silent_for(&self) -> Duration {
        // In this order: the time is set before the work is over.
        if self.is_at_work.load(Ordering::Acquire) {
            return Duration::ZERO;
        }
        self.began.elapsed().saturating_sub(Duration::from_millis(self.ponged.load(Ordering::Relaxed)))
    }

    fn is_there(&self) {
        let at = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.ponged.store(at, Ordering::Relaxed);
    }

    /// Works on a message of the client's. It may have to wait, as for the tenant's rate, and is not lost by that.
    async fn at_work<T>(&self, work: impl Future<Output = T>) -> T {
        self.is_at_work.store(true, Ordering::Relaxed);
        let done = work.await;
        self.is_there();
        self.is_at_work.store(false, Ordering::Release);
        done
    }

    /// Says something, once there is room.
    pub(super) async fn say(&self, say: Say) {
        // A connection that has ended needs none.
        let _ = self.says.send(say).await;
    }

    fn tell_what_it_has(&self, listener: &Listener) {
        if let Some(number) = self.has.load(Ordering::Relaxed).checked_sub(1) {
            listener.has_all_to(number);
        }
    }

    /// The execution that has asked for a line, once.
    pub(super) fn take_asking(&self) -> Option<ExecutionId> {
        self.asks.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Serves a connection to its end.
pub(super) async fn talk(talk: Talk, mut listener: Listener, socket: WebSocket) {
    let (says, answers) = mpsc::channel(ANSWERS);
    let shared = Shared::new(says);
    let (sink, mut stream) = socket.split();
    let (is_closed, has_taken_leave) = {
        let writing = Writer { talk: &talk, shared: &shared, sink, unasked: (0, 0), retold: HashMap::new() };
        tokio::select! {
            closing = writing.write(&mut listener, answers) => (closing.is_some(), false),
            has_taken_leave = talk.read(&mut stream, &shared) => (false, has_taken_leave),
        }
    };
    shared.tell_what_it_has(&listener);
    if has_taken_leave {
        listener.takes_leave();
    }
    drop(listener);
    if is_closed {
        // A connection that is closed over what has not been read takes the reason along.
        let rest = stream.take_while(|frame| std::future::ready(frame.is_ok())).for_each(|_| async {});
        let _ = tokio::time::timeout(LAST_WORDS, rest).await;
    }
}

/// The half that speaks.
struct Writer<'a> {
    talk: &'a Talk,
    shared: &'a Shared,
    sink: SplitSink<WebSocket, ws::Message>,
    /// Bytes and messages since the last ping.
    unasked: (usize, usize),
    /// What was told from records: up to which event of which execution.
    retold: HashMap<ExecutionId, u64>,
}

/// The client is gone, or does not take what is sent.
struct Lost;

impl Writer<'_> {
    /// Tells the client everything; answers with the code of the end if it was told that, too.
    async fn write(mut self, listener: &mut Listener, mut answers: mpsc::Receiver<Say>) -> Option<u16> {
        let Asking { app, who, .. } = &self.talk.asking;
        let lapsed = who.key.map(|key| app.door.closed_to(key));
        let lapses = async {
            match lapsed {
                Some(lapsed) => lapsed.await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            biased;
            () = lapses => Ok((close_code::POLICY, "the key is not valid any more")),
            ended = self.go_on(listener, &mut answers) => ended,
        };
        let closing = match ended {
            Ok((code, reason)) => self.close(code, reason).await.map(|()| code),
            Err(Lost) => Err(Lost),
        };
        closing.ok()
    }

    async fn go_on(
        &mut self,
        listener: &mut Listener,
        answers: &mut mpsc::Receiver<Say>,
    ) -> Result<(u16, &'static str), Lost> {
        self.tell_missed(listener).await?;
        let mut looks = tokio::time::interval(PING);
        // It is asked for the first time at once if it was told something from before.
        if self.retold.is_empty() {
            looks.reset();
        }
        loop {
            tokio::select! {
                biased;
                Some(say) = answers.recv() => match say {
                    Say::Message(message) => {
                        self.feed(&message).await?;
                        self.flush().await?;
                    }
                    Say::Close(code, reason) => return Ok((code, reason)),
                },
                _ = looks.tick() => {
                    let Asking { app, key, .. } = &self.talk.asking;
                    if app.door.principal(key).is_none() {
                        return Ok((close_code::POLICY, "the key is not valid any more"));
                    }
                    if self.shared.silent_for() >= GONE {
                        return Err(Lost);
                    }
                    self.ping(listener).await?;
                }
                heard = listener.hear(BATCH) => {
                    self.shared.tell_what_it_has(listener);
                    match heard {
                        Heard::Messages(messages, _) => self.tell(&messages, listener).await?,
                        Heard::Behind => return Ok((COME_BACK_LATER, "too far behind; come back for the rest")),
                        Heard::Replaced => return Ok((close_code::NORMAL, "another connection has this session_id")),
                        Heard::Silence(Silence::Left) => return Ok((COME_BACK, "the server is restarting")),
                        Heard::Silence(Silence::Over) => {
                            let content = json!({"execution_state": "dead"});
                            self.feed(&Message::made(Channel::Iopub, "status", None, &content)).await?;
                            return Ok((close_code::NORMAL, "the session has ended"));
                        }
                    }
                }
            }
        }
    }

    /// What this process, or an earlier one, has not kept for it is told from records.
    async fn tell_missed(&mut self, listener: &mut Listener) -> Result<(), Lost> {
        if listener.is_whole {
            return Ok(());
        }
        let Asking { app, who, .. } = &self.talk.asking;
        let missed = app.service.missed(&self.talk.session, listener);
        if missed.is_empty() {
            listener.is_made_whole();
        }
        for execution in missed {
            for message in app.service.retell(who, &execution).await {
                if let Some((id, seq)) = message.of {
                    self.retold.insert(id, seq);
                }
                self.feed(&message).await?;
            }
            self.flush().await?;
        }
        Ok(())
    }

    async fn tell(&mut self, messages: &[std::sync::Arc<Message>], listener: &Listener) -> Result<(), Lost> {
        for message in messages {
            let is_told = message.of.is_some_and(|(id, seq)| self.retold.get(&id).is_some_and(|told| seq <= *told));
            if !is_told {
                self.feed(message).await?;
            }
        }
        self.flush().await?;
        if self.unasked.0 >= PING_BYTES || self.unasked.1 >= PING_MESSAGES {
            self.ping(listener).await?;
        }
        Ok(())
    }

    async fn feed(&mut self, message: &Message) -> Result<(), Lost> {
        let Some(frame) = codec::write(self.talk.form, message) else { return Ok(()) };
        if let (Channel::Stdin, Some((id, _))) = (message.channel, message.of) {
            *self.shared.asks.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
        }
        let bytes = match &frame {
            ws::Message::Text(text) => text.len(),
            ws::Message::Binary(bytes) => bytes.len(),
            _ => 0,
        };
        self.unasked = (self.unasked.0 + bytes, self.unasked.1 + 1);
        in_time(self.sink.feed(frame)).await
    }

    async fn ping(&mut self, listener: &Listener) -> Result<(), Lost> {
        self.unasked = (0, 0);
        let number = Bytes::copy_from_slice(&(listener.told() + 1).to_be_bytes());
        in_time(self.sink.send(ws::Message::Ping(number))).await
    }

    async fn flush(&mut self) -> Result<(), Lost> {
        in_time(self.sink.flush()).await
    }

    async fn close(&mut self, code: u16, reason: &'static str) -> Result<(), Lost> {
        in_time(self.sink.send(ws::Message::Close(Some(CloseFrame { code, reason: reason.into() })))).await
    }
}

async fn in_time(sending: impl Future<Output = Result<(), axum::Error>>) -> Result<(), Lost> {
    match tokio::time::timeout(TAKES, sending).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(Lost),
    }
}

impl Talk {
    /// The half that listens: takes what the client says, one after the other. Answers whether the client has said that it leaves.
    async fn read(&self, stream: &mut SplitStream<WebSocket>, shared: &Shared) -> bool {
        while let Some(frame) = stream.next().await {
            let incoming = match frame {
                Ok(ws::Message::Text(text)) => codec::read_text(self.form, text.as_str()),
                Ok(ws::Message::Binary(bytes)) => codec::read_binary(self.form, &bytes),
                Ok(ws::Message::Pong(number)) => {
                    self.has_ponged(&number, shared);
                    continue;
                }
                Ok(ws::Message::Ping(_)) => continue,
                Ok(ws::Message::Close(_)) => return true,
                Err(error) => {
                    let Some((code, reason)) = why_unreadable(error) else { return false };
                    return self.end(shared, code, reason).await;
                }
            };
            if let Err((code, reason)) = shared.at_work(self.take(incoming, shared)).await {
                return self.end(shared, code, reason).await;
            }
        }
        false
    }

    async fn take(&self, incoming: Result<Incoming, Garbage>, shared: &Shared) -> Result<(), (u16, &'static str)> {
        match incoming {
            Ok(incoming) => self.on_message(incoming, shared).await,
            Err(Garbage::Text) => Err((close_code::UNSUPPORTED, "this subprotocol has binary frames only")),
            Err(Garbage::Malformed) => Err((close_code::INVALID, "not a message of this subprotocol")),
            Err(Garbage::Buffers) => Err((close_code::SIZE, "too many buffers")),
        }
    }

    /// Says the end, and waits for the other half to have said it.
    async fn end(&self, shared: &Shared, code: u16, reason: &'static str) -> bool {
        shared.say(Say::Close(code, reason)).await;
        std::future::pending().await
    }

    fn has_ponged(&self, number: &[u8], shared: &Shared) {
        // Some clients send pongs of their own.
        let Ok(number) = number.try_into().map(u64::from_be_bytes) else { return };
        shared.has.fetch_max(number, Ordering::Relaxed);
        shared.is_there();
    }
}

/// How a frame that can't be read is answered; nothing where the connection is gone.
fn why_unreadable(error: axum::Error) -> Option<(u16, &'static str)> {
    match error.into_inner().downcast_ref::<tungstenite::Error>()? {
        tungstenite::Error::Capacity(_) => Some((close_code::SIZE, "a message is longer than jupyter.max_message")),
        tungstenite::Error::Utf8(_) => Some((close_code::INVALID, "text that is no UTF-8")),
        tungstenite::Error::Protocol(tungstenite::error::ProtocolError::ResetWithoutClosingHandshake) => None,
        tungstenite::Error::Protocol(_) => Some((close_code::PROTOCOL, "not the WebSocket protocol")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_is_made_to_wait_is_not_silent() {
        let shared = Shared::new(mpsc::channel(1).0);
        tokio::time::advance(GONE).await;
        assert!(shared.silent_for() >= GONE, "who is read of and says nothing is");
        let waits = async {
            tokio::time::advance(2 * GONE).await;
            shared.silent_for()
        };
        assert_eq!(shared.at_work(waits).await, Duration::ZERO);
        assert_eq!(shared.silent_for(), Duration::ZERO, "and has all its time again");
        tokio::time::advance(GONE).await;
        assert!(shared.silent_for() >= GONE);
    }
}
