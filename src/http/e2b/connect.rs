//! Connect's framing (<https://connectrpc.com/docs/protocol>), as E2B's clients speak it: JSON, never compressed. What is asked and answered is its rooms' business.
//!
//! An RPC with one answer is a plain request. One that streams has bodies of envelopes, a byte of flags and four of length before each message, and its answer
//! ends with an envelope that says how.

use std::pin::Pin;
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, BufMut, BytesMut};
use futures_util::stream::{self, Stream, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::Instant;

use super::error::{Code, Fault, Refusal};
use crate::http::Bounds;
use crate::http::extract::{Answer, read};

/// The type of bodies that stream.
const STREAM_TYPE: &str = "application/connect+json";
/// Longest message in a stream, in bytes. Input to processes comes in pieces of less.
pub(super) const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// Length of what stands before a message.
const HEAD: usize = 5;
/// The flag of a message that is compressed, which none is.
const COMPRESSED: u8 = 1;
/// The flag of the last envelope of an answer.
const END: u8 = 2;
/// An idle stream is kept alive by a message after this long, if nobody says otherwise; and within what may be said.
const KEEPALIVE: Duration = Duration::from_secs(50);
const KEEPALIVES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
/// Most digits of a deadline, by the protocol.
const DEADLINE_DIGITS: usize = 10;

/// Reads the one message of a request.
///
/// # Errors
/// When it is too long, late, or not understood.
pub(super) async fn unary<T: DeserializeOwned>(body: Body, bounds: Bounds) -> Result<T, Fault> {
    parsed(&read(body, bounds).await?)
}

/// The one message of an answer.
pub(super) fn answer<T: Serialize>(message: T) -> Response {
    Answer(message).into_response()
}

fn parsed<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    // What has no fields may be nothing.
    let text: &[u8] = if bytes.trim_ascii().is_empty() { b"{}" } else { bytes };
    let wrong = |error| Fault::new(Code::InvalidArgument, format!("the message is not understood: {error}"));
    serde_json::from_slice(text).map_err(wrong)
}

/// When a caller wants an answer by; never, if it does not say.
///
/// # Errors
/// When what it says is no number of milliseconds.
pub(super) fn deadline(headers: &HeaderMap) -> Result<Option<Instant>, Fault> {
    let Some(given) = headers.get("connect-timeout-ms") else { return Ok(None) };
    let text = given.to_str().unwrap_or_default();
    let is_number = (1..=DEADLINE_DIGITS).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    let millis = text.parse::<u64>().ok().filter(|_| is_number);
    match millis {
        Some(millis) => Ok(Some(Instant::now() + Duration::from_millis(millis))),
        None => Err(Fault::new(
            Code::InvalidArgument,
            format!("Connect-Timeout-Ms is {text:.20?}; allowed are 1 to {DEADLINE_DIGITS} digits"),
        )),
    }
}

/// After how long a caller wants to hear that an idle stream is alive.
pub(super) fn keepalive(headers: &HeaderMap) -> Duration {
    let asked = headers.get("keepalive-ping-interval").and_then(|value| value.to_str().ok()?.parse().ok());
    asked.map_or(KEEPALIVE, |seconds| Duration::from_secs(seconds).clamp(KEEPALIVES.0, KEEPALIVES.1))
}

/// Messages of a request that streams, in their order. What is not taken waits with the caller.
pub(super) struct Envelopes {
    body: BodyDataStream,
    held: BytesMut,
    /// The next piece arrives within this time.
    within: Duration,
}

impl Envelopes {
    /// Those of a request whose pieces arrive within a time of each other.
    ///
    /// # Errors
    /// When it does not stream JSON.
    pub(super) fn of(request: Request, within: Duration) -> Result<Self, Refusal> {
        check_stream(request.headers())?;
        Ok(Self { body: request.into_body().into_data_stream(), held: BytesMut::new(), within })
    }

    /// The next message; nothing once the caller has said all.
    ///
    /// # Errors
    /// When it is too long, compressed, cut off, late or not understood. There is no going on after that.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Fault> {
        if !self.hold(HEAD).await? {
            return Ok(None);
        }
        let flags = self.held[0];
        let length = u32::from_be_bytes([self.held[1], self.held[2], self.held[3], self.held[4]]) as usize;
        if flags & COMPRESSED != 0 {
            return Err(Fault::new(Code::Unimplemented, "a message is compressed; nothing here is"));
        }
        if flags & END != 0 {
            return Ok(None);
        }
        // Before anything is made ready for it.
        if length > MAX_MESSAGE {
            let detail = format!("a message of {length} bytes was announced; allowed are {MAX_MESSAGE}");
            return Err(Fault::new(Code::ResourceExhausted, detail));
        }
        self.held.advance(HEAD);
        if !self.hold(length).await? {
            return Err(cut_off());
        }
        parsed(&self.held.split_to(length)).map(Some)
    }

    /// Reads until so many bytes are held; says no if the body ends before anything of them came.
    async fn hold(&mut self, bytes: usize) -> Result<bool, Fault> {
        while self.held.len() < bytes {
            let piece = tokio::time::timeout(self.within, self.body.next()).await;
            match piece {
                Ok(Some(Ok(piece))) => self.held.extend_from_slice(&piece),
                Ok(None) if self.held.is_empty() => return Ok(false),
                Ok(None | Some(Err(_))) => return Err(cut_off()),
                Err(_) => {
                    let detail = format!("nothing more of the request came within {:?}", self.within);
                    return Err(Fault::new(Code::DeadlineExceeded, detail));
                }
            }
        }
        Ok(true)
    }

    /// The only message of a request that streams its answer.
    ///
    /// # Errors
    /// Those of [`Envelopes::next`], and when there is none.
    pub(super) async fn only<T: DeserializeOwned>(mut self) -> Result<T, Fault> {
        self.next().await?.ok_or_else(|| Fault::new(Code::InvalidArgument, "the request has no message"))
    }
}

fn cut_off() -> Fault {
    Fault::new(Code::InvalidArgument, "the request ends within a message")
}

fn check_stream(headers: &HeaderMap) -> Result<(), Refusal> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if given.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case(STREAM_TYPE)) {
        return Ok(());
    }
    let detail = format!("this RPC streams: send {STREAM_TYPE}, one envelope a message");
    let fault = Fault::new(Code::InvalidArgument, detail);
    Err(Refusal::of_rpc(fault).with_status(axum::http::StatusCode::UNSUPPORTED_MEDIA_TYPE))
}

/// How a stream of answers is kept and ended.
pub(super) struct Serving {
    /// It ends with `deadline_exceeded` then.
    pub(super) deadline: Option<Instant>,
    /// What is sent when nothing else was for this long.
    pub(super) keepalive: Option<(Duration, serde_json::Value)>,
    /// It is broken off, connection and all, when this is over: see [`super::sandbox::Sandbox::gone`].
    pub(super) gone: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// Is done when the deadline has come while the caller was still there: a process is ended then, which a caller that merely leaves does not do.
    pub(super) on_deadline: Option<Box<dyn FnOnce() + Send>>,
}

impl Serving {
    /// One that is kept until its events end, or the sandbox goes.
    pub(super) fn until(gone: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { deadline: None, keepalive: None, gone: Box::pin(gone), on_deadline: None }
    }
}

/// Why a body breaks off.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox that this comes from is gone")]
struct Gone;

/// Answers with a stream of messages; their end, or their first fault, is the answer's. Each is sent as it comes.
pub(super) fn stream(
    serving: Serving,
    messages: impl Stream<Item = Result<serde_json::Value, Fault>> + Send + 'static,
) -> Response {
    let sending = Sending { serving, messages: Box::pin(messages), is_over: false };
    let body = Body::from_stream(stream::unfold(sending, |mut sending| async move {
        let piece = sending.next().await?;
        Some((piece, sending))
    }));
    ([(header::CONTENT_TYPE, STREAM_TYPE)], body).into_response()
}

/// Answers a stream that a caller has sent with its one message, or with why there is none.
pub(super) fn answer_stream<T: Serialize>(outcome: Result<T, Fault>) -> Response {
    let mut body = BytesMut::new();
    let fault = match outcome.map(|message| serde_json::to_vec(&message)) {
        Ok(Ok(message)) => {
            body.extend_from_slice(&envelope(0, &message));
            None
        }
        Ok(Err(error)) => Some(Fault::new(Code::Internal, format!("the answer could not be written: {error}"))),
        Err(fault) => Some(fault),
    };
    body.extend_from_slice(&end(fault.as_ref()));
    ([(header::CONTENT_TYPE, STREAM_TYPE)], body.freeze()).into_response()
}

struct Sending {
    serving: Serving,
    messages: Pin<Box<dyn Stream<Item = Result<serde_json::Value, Fault>> + Send>>,
    is_over: bool,
}

impl Sending {
    async fn next(&mut self) -> Option<Result<Bytes, Gone>> {
        if self.is_over {
            return None;
        }
        let Serving { deadline, keepalive, gone, on_deadline } = &mut self.serving;
        let deadline = *deadline;
        let late = async move {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let (wait, ping) = keepalive.as_ref().map_or((None, None), |(wait, ping)| (Some(*wait), Some(ping)));
        let idle = async move {
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // What has come is heard first; but a stream that always has something to say gets no longer than others.
            biased;
            () = gone.as_mut() => {
                self.is_over = true;
                tracing::debug!("an answer is broken off: its sandbox is gone");
                Some(Err(Gone))
            }
            () = late => {
                self.is_over = true;
                if let Some(act) = on_deadline.take() {
                    act();
                }
                let fault = Fault::new(Code::DeadlineExceeded, "the time that the request had is over");
                Some(Ok(end(Some(&fault))))
            }
            message = self.messages.next() => Some(Ok(match message {
                Some(Ok(message)) => envelope(0, message.to_string().as_bytes()),
                Some(Err(fault)) => {
                    self.is_over = true;
                    end(Some(&fault))
                }
                None => {
                    self.is_over = true;
                    end(None)
                }
            })),
            () = idle => Some(Ok(envelope(0, ping.map(ToString::to_string).unwrap_or_default().as_bytes()))),
        }
    }
}

fn envelope(flags: u8, message: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEAD + message.len());
    bytes.put_u8(flags);
    // Messages are made here, of pieces that have bounds far below this.
    bytes.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    bytes.put_slice(message);
    bytes.freeze()
}

/// The envelope that ends an answer, well or not.
fn end(fault: Option<&Fault>) -> Bytes {
    let body = fault.map_or_else(|| json!({}), |fault| json!({"error": fault.words()}));
    envelope(END, body.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use axum::http::HeaderValue;
    use serde_json::Value;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn request(pieces: Vec<Vec<u8>>) -> Envelopes {
        let body = Body::from_stream(stream::iter(pieces.into_iter().map(Ok::<_, std::io::Error>)));
        let request = Request::builder().header("content-type", "application/connect+json").body(body).unwrap();
        Envelopes::of(request, SECOND).ok().unwrap()
    }

    fn enveloped(flags: u8, length: u32, message: &[u8]) -> Vec<u8> {
        [&[flags][..], &length.to_be_bytes(), message].concat()
    }

    /// What a client reads of an answer: its envelopes, and whether it was whole.
    async fn heard(response: Response) -> (Vec<(u8, Value)>, bool) {
        let mut pieces = response.into_body().into_data_stream();
        let (mut bytes, mut is_whole) = (Vec::new(), true);
        while let Some(piece) = pieces.next().await {
            match piece {
                Ok(piece) => bytes.extend_from_slice(&piece),
                Err(_) => is_whole = false,
            }
        }
        let (mut rest, mut found) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let length = u32::from_be_bytes(rest[1..5].try_into().unwrap()) as usize;
            found.push((rest[0], serde_json::from_slice(&rest[5..5 + length]).unwrap()));
            rest = &rest[5 + length..];
        }
        (found, is_whole)
    }

    fn never() -> Serving {
        Serving::until(std::future::pending())
    }

    #[tokio::test]
    async fn messages_are_cut_anywhere_and_read_all_the_same() {
        let whole = [enveloped(0, 7, b"{\"a\":1}"), enveloped(0, 0, b""), enveloped(0, 2, b"{}")].concat();
        for step in [1, 3, 6, 100] {
            let mut envelopes = request(whole.chunks(step).map(<[u8]>::to_vec).collect());
            for expected in [json!({"a": 1}), json!({}), json!({})] {
                assert_eq!(envelopes.next::<Value>().await.unwrap(), Some(expected), "in steps of {step}");
            }
            assert_eq!(envelopes.next::<Value>().await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn what_is_no_message_is_refused_before_it_costs_anything() {
        let code = async |bytes: Vec<u8>| request(vec![bytes]).next::<Value>().await.unwrap_err().code;
        let mut huge = request(vec![enveloped(0, u32::MAX, b"")]);
        assert_eq!(huge.next::<Value>().await.unwrap_err().code, Code::ResourceExhausted);
        assert!(huge.held.capacity() < 1024 * 1024, "nothing is made ready for what is announced");
        assert_eq!(code(enveloped(1, 2, b"{}")).await, Code::Unimplemented);
        assert_eq!(code(enveloped(0, 9, b"{}")).await, Code::InvalidArgument);
        assert_eq!(code(vec![0, 0]).await, Code::InvalidArgument);
        assert_eq!(code(enveloped(0, 2, b"{]")).await, Code::InvalidArgument);
        assert_eq!(request(vec![]).only::<Value>().await.unwrap_err().code, Code::InvalidArgument);
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_for_long_is_not_waited_for() {
        let body = Body::from_stream(stream::pending::<Result<Vec<u8>, std::io::Error>>());
        let request = Request::builder().header("content-type", "application/connect+json").body(body).unwrap();
        let mut envelopes = Envelopes::of(request, SECOND).ok().unwrap();
        assert_eq!(envelopes.next::<Value>().await.unwrap_err().code, Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn an_answer_ends_with_how_it_ended() {
        let well = stream(never(), stream::iter([Ok(json!({"n": 1}))]));
        assert_eq!(well.headers()["content-type"], "application/connect+json");
        assert_eq!(heard(well).await, (vec![(0, json!({"n": 1})), (2, json!({}))], true));
        let badly = stream(never(), stream::iter([Ok(json!({})), Err(Fault::new(Code::NotFound, "no"))]));
        let error = json!({"error": {"code": "not_found", "message": "no"}});
        assert_eq!(heard(badly).await, (vec![(0, json!({})), (2, error.clone())], true));
        assert_eq!(heard(answer_stream(Ok(json!({})))).await, (vec![(0, json!({})), (2, json!({}))], true));
        let refused = answer_stream::<Value>(Err(Fault::new(Code::NotFound, "no")));
        assert_eq!(heard(refused).await, (vec![(2, error)], true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_ends_the_answer_and_what_it_is_about() {
        let is_ended = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_ended);
        let serving = Serving {
            deadline: Some(Instant::now() + 5 * SECOND),
            keepalive: Some((2 * SECOND, json!({"event": {"keepalive": {}}}))),
            on_deadline: Some(Box::new(move || told.store(true, Ordering::Relaxed))),
            ..never()
        };
        let (found, is_whole) = heard(stream(serving, stream::pending())).await;
        let flags: Vec<_> = found.iter().map(|(flags, _)| *flags).collect();
        assert_eq!((flags, is_whole), (vec![0, 0, 2], true), "two signs of life within five seconds, then the end");
        assert_eq!(found[2].1["error"]["code"], "deadline_exceeded");
        assert!(is_ended.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_before_the_deadline_ends_nothing() {
        let is_ended = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_ended);
        let serving = Serving {
            deadline: Some(Instant::now() + SECOND),
            on_deadline: Some(Box::new(move || told.store(true, Ordering::Relaxed))),
            ..never()
        };
        drop(stream(serving, stream::pending()));
        tokio::time::sleep(2 * SECOND).await;
        assert!(!is_ended.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_its_sandbox_breaks_an_answer_off() {
        let serving = Serving::until(tokio::time::sleep(SECOND));
        let (found, is_whole) = heard(stream(serving, stream::pending())).await;
        assert_eq!((found.len(), is_whole), (0, false), "no last envelope, and no orderly end of the body");
    }

    #[test]
    fn deadlines_and_signs_of_life_are_numbers_within_bounds() {
        let headers = |name: &'static str, value: &str| {
            let value = HeaderValue::from_str(value).unwrap();
            HeaderMap::from_iter([(axum::http::HeaderName::from_static(name), value)])
        };
        assert_eq!(deadline(&HeaderMap::new()).unwrap(), None);
        assert!(deadline(&headers("connect-timeout-ms", "60000")).unwrap().is_some());
        for wrong in ["", "-1", "1s", "12345678901", "+5"] {
            assert!(deadline(&headers("connect-timeout-ms", wrong)).is_err(), "{wrong}");
        }
        assert_eq!(keepalive(&HeaderMap::new()), KEEPALIVE);
        assert_eq!(keepalive(&headers("keepalive-ping-interval", "0")), SECOND);
        assert_eq!(keepalive(&headers("keepalive-ping-interval", "7")), 7 * SECOND);
        assert_eq!(keepalive(&headers("keepalive-ping-interval", "x")), KEEPALIVE);
    }
}
