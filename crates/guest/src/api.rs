//! The link's requests: routing, bodies within bounds, refusals. What they do is done elsewhere.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::commands::{MAX_STDIN, StartCommand};
use cellblock_wire::frame::{Decoder, Frame, MAX_FRAME};
use cellblock_wire::link::{Ack, Hello, Init, Outbound, Refusal, Signal, StartKernel, Stats};
use cellblock_wire::ports::{PORT_CLOSED, PORT_STUCK};
use cellblock_wire::tunnel::Outgoing;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Frame as BodyFrame, Incoming, SizeHint};
use hyper::{Method, Request, Response, StatusCode};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{mpsc, watch};

use crate::cgroup::Cgroup;
use crate::command::Commands;
use crate::egress::Egress;
use crate::events::{Ring, Subscription};
use crate::files::resume::Resumable;
use crate::files::{Download, FileError, used_bytes};
use crate::kernel::{Kernels, Places};
use crate::ports;
use crate::report::take_report;

const MAX_JSON: usize = 1024 * 1024;
/// The shortest lease that can be asked for.
const MIN_ORPHAN_TIMEOUT: Duration = Duration::from_secs(1);

/// A refusal and its status.
#[derive(Debug)]
pub struct Refused {
    status: StatusCode,
    code: &'static str,
    message: String,
    number: Option<u64>,
}

impl Refused {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), number: None }
    }

    /// There is nothing of this kind under this name.
    #[must_use]
    pub fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", format!("there is no such {what}"))
    }

    /// It was there before.
    #[must_use]
    pub fn exists(message: &str) -> Self {
        Self::new(StatusCode::CONFLICT, "exists", message)
    }

    /// The request itself will not do.
    #[must_use]
    pub fn invalid(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }

    /// A bound is reached; later it may be different.
    #[must_use]
    pub fn busy(message: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message)
    }

    /// The image offers no such kernel.
    #[must_use]
    pub fn no_kernelspec(wanted: Option<&str>) -> Self {
        let message = match wanted {
            Some(name) => format!("the image has no kernelspec `{}`", name.chars().take(100).collect::<String>()),
            None => "the image has no kernelspec".to_owned(),
        };
        Self::new(StatusCode::NOT_FOUND, "no-kernelspec", message)
    }

    /// The kernel's process can't be started.
    #[must_use]
    pub fn spawn_failed(error: &std::io::Error) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "spawn-failed", format!("the kernel can't be started: {error}"))
    }

    /// Nothing listens on a port.
    #[must_use]
    pub fn port_closed(port: u16) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, PORT_CLOSED, format!("nothing listens on port {port}"))
    }

    /// What listens on a port does not take connections.
    #[must_use]
    pub fn port_stuck(port: u16) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, PORT_STUCK, format!("what listens on port {port} takes no connection"))
    }

    /// There is no such folder.
    #[must_use]
    pub fn no_folder(path: &str) -> Self {
        let path: String = path.chars().take(300).collect();
        Self::new(StatusCode::BAD_REQUEST, "no-folder", format!("there is no folder `{path}`"))
    }

    /// There is no such program, or it is none.
    #[must_use]
    pub fn no_program(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "no-program", message)
    }

    /// It is too late for this.
    #[must_use]
    pub fn closed(message: &str) -> Self {
        Self::new(StatusCode::CONFLICT, "closed", message)
    }

    /// Another one.
    #[must_use]
    pub fn with(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(status, code, message)
    }

    fn too_large() -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", "the body is longer than the link allows")
    }
}

impl From<FileError> for Refused {
    fn from(error: FileError) -> Self {
        let (status, code, number) = match error {
            FileError::Absent => (StatusCode::NOT_FOUND, "not-found", None),
            FileError::Invalid(_) | FileError::BrokeOff => (StatusCode::BAD_REQUEST, "invalid", None),
            FileError::IsFolder => (StatusCode::CONFLICT, "is-a-directory", None),
            FileError::NotFolder => (StatusCode::CONFLICT, "not-a-directory", None),
            FileError::Exists(_) => (StatusCode::CONFLICT, "exists", None),
            FileError::Denied(_) => (StatusCode::FORBIDDEN, "permission-denied", None),
            FileError::NoSpace(left) => (StatusCode::INSUFFICIENT_STORAGE, "no-space", left),
            FileError::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too-large", None),
            FileError::Precondition => (StatusCode::PRECONDITION_FAILED, "precondition", None),
            FileError::Range { size } => (StatusCode::RANGE_NOT_SATISFIABLE, "range", Some(size)),
            FileError::Offset { received } => (StatusCode::CONFLICT, "offset", Some(received)),
            FileError::Digest => (StatusCode::BAD_REQUEST, "digest", None),
            FileError::Archive(_) => (StatusCode::BAD_REQUEST, "archive", None),
            FileError::Busy(_) => (StatusCode::SERVICE_UNAVAILABLE, "busy", None),
            FileError::Failed(..) => (StatusCode::INTERNAL_SERVER_ERROR, "failed", None),
        };
        Self { number, ..Self::new(status, code, error.to_string()) }
    }
}

/// The body of an answer.
pub enum Answer {
    /// These bytes, if any.
    Bytes(Option<Bytes>),
    /// Events as they come.
    Events(Subscription),
    /// A file.
    File(Download),
    /// What a byte stream sends.
    Tunnel(Outgoing),
    /// What somebody else reads ahead.
    Pieces(mpsc::Receiver<std::io::Result<Bytes>>),
    /// Pieces as they come.
    Stream(BoxStream<'static, Bytes>),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Bytes(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(BodyFrame::data(bytes)))),
            Self::Events(events) => {
                events.poll_chunk(context).map(|chunk| chunk.map(|chunk| Ok(BodyFrame::data(chunk))))
            }
            Self::Tunnel(outgoing) => Pin::new(outgoing).poll_frame(context),
            Self::Pieces(pieces) => {
                pieces.poll_recv(context).map(|piece| piece.map(|piece| piece.map(BodyFrame::data)))
            }
            Self::Stream(pieces) => {
                pieces.poll_next_unpin(context).map(|piece| piece.map(|piece| Ok(BodyFrame::data(piece))))
            }
            Self::File(file) => Poll::Ready(match file.read() {
                Ok(chunk) if chunk.is_empty() => None,
                Ok(chunk) => Some(Ok(BodyFrame::data(chunk))),
                Err(errno) => Some(Err(errno.into())),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Bytes(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Bytes(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            _ => SizeHint::default(),
        }
    }
}

/// All that requests may ask of the guest.
pub struct Guest {
    /// The kernels.
    pub kernels: Kernels,
    /// The commands.
    pub commands: Commands,
    /// The events.
    pub ring: Ring,
    /// The way out.
    pub egress: Egress,
    /// The container's figures.
    pub cgroup: Cgroup,
    /// Where things are.
    pub places: Places,
    /// Uploads that can go on.
    pub uploads: Resumable,
    /// How long the guest lives without hearing anything.
    pub orphan_timeout: watch::Sender<Duration>,
}

pub(crate) type Answered = Result<Response<Answer>, Refused>;

impl Guest {
    /// Answers a request.
    ///
    /// # Errors
    /// Never: refusals are answers.
    pub async fn serve(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
        Ok(self.route(request).await.unwrap_or_else(|refused| {
            let refusal = Refusal { code: refused.code.to_owned(), message: refused.message, number: refused.number };
            let mut response = json(&refusal);
            *response.status_mut() = refused.status;
            response
        }))
    }

    async fn route(&self, request: Request<Incoming>) -> Answered {
        let (head, body) = request.into_parts();
        let path = head.uri.path().trim_start_matches('/').to_owned();
        let (first, rest) = path.split_once('/').unwrap_or((&path, ""));
        let query = head.uri.query().unwrap_or_default();
        match (&head.method, first, rest) {
            (&Method::POST, "init", "") => self.init(read_json(body).await?),
            (&Method::GET, "report", "") => Ok(json(&take_report(&self.cgroup))),
            (&Method::GET, "stats", "") => {
                Ok(json(&Stats { disk_bytes: used_bytes(&self.places.workdir), ..self.cgroup.stats() }))
            }
            (&Method::GET, "kernelspecs", "") => Ok(json(&self.kernels.specs())),
            (&Method::GET, "events", "") => self.events(query),
            (&Method::POST, "ack", "") => self.acknowledge(read_json(body).await?),
            (method, "kernels", rest) => self.route_kernels(method, rest, body).await,
            (&Method::POST, "ports", port) => Ok(Response::new(Answer::Tunnel(ports::open(port, body).await?))),
            (method, "files", rest) => self.route_files(method, rest, query, body).await,
            (method, "commands", rest) => self.route_commands(method, rest, query, body).await,
            (method, "egress", id) => self.route_egress(method, id, body).await,
            _ => Err(Refused::not_found("request")),
        }
    }

    async fn route_kernels(&self, method: &Method, rest: &str, body: Incoming) -> Answered {
        match (method, rest.split_once('/').unwrap_or((rest, ""))) {
            (&Method::GET, ("", "")) => Ok(json(&self.kernels.names())),
            (&Method::POST, ("", "")) => {
                let request: StartKernel = read_json(body).await?;
                Ok(json(&self.kernels.start(&request)?))
            }
            (&Method::DELETE, (kernel, "")) => self.kernels.delete(kernel).await.map(|deleted| json(&deleted)),
            (&Method::POST, (kernel, "messages")) => {
                let Frame { head, parts } = read_frame::<Outbound>(body).await?;
                self.kernels.send(kernel, &head, parts)?;
                if head.cap.is_some() {
                    // The kernel is about to start on it, and needs the time that this answer takes on its way.
                    self.ring.beside_events().await;
                }
                Ok(nothing())
            }
            (&Method::POST, (kernel, "signal")) => {
                let Signal { signal } = read_json(body).await?;
                self.kernels.signal(kernel, &signal).map(|()| nothing())
            }
            _ => Err(Refused::not_found("request")),
        }
    }

    async fn route_commands(&self, method: &Method, rest: &str, query: &str, body: Incoming) -> Answered {
        let commands = &self.commands;
        match (method, rest.split_once('/').unwrap_or((rest, ""))) {
            (&Method::POST, ("", "")) => {
                let Frame { head, parts } = read_frame::<StartCommand>(body).await?;
                let input = parts.into_iter().next().unwrap_or_default();
                Ok(json(&commands.start(&head, input, &self.kernels)?))
            }
            (&Method::GET, ("", "")) => Ok(json(&commands.list())),
            (&Method::GET, (id, "")) => Ok(json(&commands.get(id)?)),
            (&Method::GET, (id, "events")) => {
                let is_waiting = parameter(query, "follow") != Some("0");
                let pieces = commands.follow(id, after(query)?, is_waiting)?;
                Ok(Response::new(Answer::Stream(pieces.boxed())))
            }
            (&Method::POST, (id, "follow")) => {
                let is_waiting = parameter(query, "follow") != Some("0");
                let pieces = commands.follow(id, after(query)?, is_waiting)?;
                Ok(Response::new(Answer::Tunnel(crate::command::tell(pieces, body))))
            }
            (&Method::POST, (id, "stdin")) => {
                let bytes = Limited::new(body, MAX_STDIN).collect().await.map_err(|_| Refused::too_large())?.to_bytes();
                let close = parameter(query, "close") == Some("1");
                Ok(json(&commands.write(id, bytes, close).await?))
            }
            (&Method::POST, (id, "signal")) => {
                let Signal { signal } = read_json(body).await?;
                commands.signal(id, &signal).map(|()| nothing())
            }
            (&Method::POST, (id, "resize")) => commands.resize(id, read_json(body).await?).map(|()| nothing()),
            (&Method::DELETE, (id, "")) => Ok(json(&commands.end(id).await?)),
            _ => Err(Refused::not_found("request")),
        }
    }

    async fn route_egress(&self, method: &Method, id: &str, body: Incoming) -> Answered {
        let id = id.parse().map_err(|_| Refused::invalid("a connection's id is a number"))?;
        match *method {
            Method::POST => Ok(Response::new(Answer::Tunnel(self.egress.open(id, body)?))),
            Method::DELETE => {
                self.egress.refuse(id, read_json(body).await?)?;
                Ok(json(&serde_json::json!({})))
            }
            _ => Err(Refused::not_found("request")),
        }
    }

    fn init(&self, init: Init) -> Answered {
        self.orphan_timeout.send_replace(Duration::from_secs(init.orphan_timeout_seconds).max(MIN_ORPHAN_TIMEOUT));
        let env = match init.egress {
            true => self.egress.offer(init.env),
            false => init.env,
        };
        let env = crate::packages::offer(env, &self.places.workdir);
        self.commands.set_env(env.clone());
        self.kernels.set_env(env);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(json(&Hello { generation: cellblock_wire::GENERATION, version, last_seq: self.ring.last_seq() }))
    }

    fn events(&self, query: &str) -> Answered {
        Ok(Response::new(Answer::Events(self.ring.subscribe(after(query)?))))
    }

    fn acknowledge(&self, ack: Ack) -> Answered {
        match self.ring.acknowledge(ack.seq) {
            true => Ok(nothing()),
            false => Err(Refused::invalid("there was no event of this number")),
        }
    }
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn after(query: &str) -> Result<u64, Refused> {
    match parameter(query, "after") {
        Some(after) => after.parse().map_err(|_| Refused::invalid("`after` is the number of an event")),
        None => Ok(0),
    }
}

fn nothing() -> Response<Answer> {
    let mut response = Response::new(Answer::Bytes(None));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

pub(crate) fn json(value: &impl Serialize) -> Response<Answer> {
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(Answer::Bytes(Some(bytes.into())));
    let kind = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, kind);
    response
}

pub(crate) async fn read_json<T: DeserializeOwned>(body: Incoming) -> Result<T, Refused> {
    let body = Limited::new(body, MAX_JSON).collect().await.map_err(|_| Refused::too_large())?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|error| Refused::invalid(&format!("the body is not understood: {error}")))
}

async fn read_frame<H: DeserializeOwned>(mut body: Incoming) -> Result<Frame<H>, Refused> {
    let mut decoder = Decoder::default();
    let mut length = 0;
    while let Some(chunk) = body.frame().await {
        let chunk = chunk.map_err(|_| Refused::invalid("the body broke off"))?;
        let Ok(data) = chunk.into_data() else { continue };
        length += data.len();
        if length > MAX_FRAME + 4 {
            return Err(Refused::too_large());
        }
        decoder.push(&data);
    }
    match decoder.next_frame() {
        Ok(Some(frame)) if decoder.is_empty() => Ok(frame),
        Ok(_) => Err(Refused::invalid("the body is not one frame")),
        Err(error) => Err(Refused::invalid(&error.to_string())),
    }
}

/// Decodes `%xx`; what is no such sequence stays.
pub(crate) fn percent_decode(path: &str) -> Vec<u8> {
    let path = path.as_bytes();
    let mut decoded = Vec::with_capacity(path.len());
    let mut at = 0;
    while let Some(byte) = path.get(at) {
        let hex = path.get(at + 1..at + 3).filter(|hex| *byte == b'%' && hex.iter().all(u8::is_ascii_hexdigit));
        let value = hex.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        decoded.push(value.unwrap_or(*byte));
        at += if value.is_some() { 3 } else { 1 };
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_decoded_once() {
        assert_eq!(percent_decode("a%20b/%C3%A9%252F%zz%"), "a b/é%2F%zz%".as_bytes());
    }
}
