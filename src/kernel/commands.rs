//! Commands and terminals over the link to their guest. Decides nothing, and begins nothing anew when the link breaks.

use bytes::{Bytes, BytesMut};
use cellblock_wire::commands::{CommandView, NumberedCommandEvent, Size, StartCommand, StdinTaken};
use cellblock_wire::frame::{self, Frame};
use cellblock_wire::link::Signal;
use cellblock_wire::tunnel::Tunnel;
use http_body_util::{BodyExt, Empty};
use hyper::Method;
use hyper::body::Incoming;
use tokio::io::AsyncReadExt;

use super::link::{Asked, Link, LinkError, REQUEST_TIMEOUT, json_body};

const FOLLOW: &str = "tell a command's events";

impl Link {
    /// Starts a command, with what is on its stdin when it starts. Saying it again under the same id starts nothing.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn start_command(&self, start: &StartCommand, input: &Bytes) -> Result<CommandView, LinkError> {
        let attempt = "start a command";
        let mut body = BytesMut::new();
        let parts: &[Bytes] = if input.is_empty() { &[] } else { std::slice::from_ref(input) };
        frame::encode(start, parts, &mut body)
            .map_err(|e| LinkError::Protocol { attempt: attempt.to_owned(), detail: e.to_string() })?;
        self.call(attempt, Method::POST, "/commands", body.freeze()).await
    }

    /// All commands that the guest knows, oldest first.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn commands(&self) -> Result<Vec<CommandView>, LinkError> {
        self.call("list its commands", Method::GET, "/commands", Bytes::new()).await
    }

    /// A command as it is.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn command(&self, id: &str) -> Result<CommandView, LinkError> {
        self.call("tell of a command", Method::GET, &format!("/commands/{id}"), Bytes::new()).await
    }

    /// A command's events after number `after`; with `is_waiting` to its end, else to what there is.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn follow_command(&self, id: &str, after: u64, is_waiting: bool) -> Result<CommandEvents, LinkError> {
        let query = format!("after={after}&follow={}", u8::from(is_waiting));
        let path = format!("/commands/{id}/follow?{query}");
        let asked = Asked { attempt: FOLLOW, method: Method::POST, path: &path, within: Some(REQUEST_TIMEOUT) };
        let source = match self.narrow_tunnel(asked).await {
            Ok(tunnel) => Source::Tunnel(Box::new(tunnel), BytesMut::new()),
            // A guest of an earlier version knows no other way than the one without a window of its own; or there is no such command.
            Err(LinkError::Refused { refusal, .. }) if refusal.code == "not-found" => {
                let path = format!("/commands/{id}/events?{query}");
                let asked = Asked { attempt: FOLLOW, method: Method::GET, path: &path, within: Some(REQUEST_TIMEOUT) };
                let body = Empty::new().map_err(|never: std::convert::Infallible| match never {});
                Source::Body(self.exchange(asked, body).await?.into_body())
            }
            Err(error) => return Err(error),
        };
        Ok(CommandEvents { source, decoder: frame::Decoder::limited(MAX_EVENT) })
    }

    /// Writes to a command's stdin; says how much of it was taken.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn write_command(&self, id: &str, bytes: Bytes, close: bool) -> Result<StdinTaken, LinkError> {
        let path = format!("/commands/{id}/stdin?close={}", u8::from(close));
        self.call("pass on a command's input", Method::POST, &path, bytes).await
    }

    /// Signals a command's process group.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn signal_command(&self, id: &str, signal: &str) -> Result<(), LinkError> {
        let body = json_body(&Signal { signal: signal.to_owned() });
        self.order("signal a command", Method::POST, &format!("/commands/{id}/signal"), body).await
    }

    /// Gives a command's terminal another size.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn resize_command(&self, id: &str, size: Size) -> Result<(), LinkError> {
        self.order("resize a terminal", Method::POST, &format!("/commands/{id}/resize"), json_body(&size)).await
    }

    /// Ends a command with all its processes.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn end_command(&self, id: &str) -> Result<CommandView, LinkError> {
        self.call("end a command", Method::DELETE, &format!("/commands/{id}"), Bytes::new()).await
    }
}

/// Longest event of a command, in bytes: a piece of its output and a head.
const MAX_EVENT: usize = 512 * 1024;
/// Bytes that are read at once.
const READ: usize = 16 * 1024;

/// The stream of a command's events.
#[derive(Debug)]
pub struct CommandEvents {
    source: Source,
    decoder: frame::Decoder,
}

#[derive(Debug)]
enum Source {
    /// With what of it is being read.
    Tunnel(Box<Tunnel<Incoming>>, BytesMut),
    Body(Incoming),
}

impl Source {
    /// What comes next; nothing at the end, or where it breaks off. Safe to drop and call again.
    async fn next(&mut self) -> Option<Bytes> {
        match self {
            Self::Tunnel(tunnel, read) => {
                read.reserve(READ);
                let is_more = tunnel.read_buf(read).await.is_ok_and(|bytes| bytes > 0);
                is_more.then(|| read.split().freeze())
            }
            Self::Body(body) => loop {
                if let Ok(data) = body.frame().await?.ok()?.into_data() {
                    return Some(data);
                }
            },
        }
    }
}

impl CommandEvents {
    /// The next event; `None` behind the last, or once the connection is gone. Safe to drop and call again.
    ///
    /// # Errors
    /// When the guest sends what is no event; the stream is of no further use then.
    pub async fn next(&mut self) -> Result<Option<Frame<NumberedCommandEvent>>, LinkError> {
        let broken = |detail: String| LinkError::Protocol { attempt: FOLLOW.to_owned(), detail };
        loop {
            if let Some(event) = self.decoder.next_frame().map_err(|e| broken(e.to_string()))? {
                return Ok(Some(event));
            }
            match self.source.next().await {
                Some(data) => self.decoder.push(&data),
                None => return Ok(None),
            }
        }
    }
}
