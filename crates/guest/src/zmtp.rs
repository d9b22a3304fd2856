//! ZMTP 3 with the NULL mechanism, the client's half: frames without any input or output, and the handshake over a stream.
//!
//! Knows nothing of Jupyter. The peer may be hostile: no length it declares reserves memory, and every wait has a limit.
//! Source: <https://rfc.zeromq.org/spec/23/>.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most commands the peer may send before it is ready.
const MAX_HANDSHAKE_COMMANDS: usize = 8;
/// Longest command, during the handshake and later.
pub const MAX_COMMAND: u64 = 1024;
const GREETING_TIME: Duration = Duration::from_secs(2);
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);

/// Why a peer can't be spoken with.
#[derive(Debug, thiserror::Error)]
pub enum ZmtpError {
    /// The connection ended or broke.
    #[error("the connection ended: {0}")]
    Ended(#[from] std::io::Error),
    /// The peer stayed silent.
    #[error("no {0} in time")]
    Silent(&'static str),
    /// What came is not ZMTP, or above a limit.
    #[error("no ZeroMQ: {0}")]
    Garbage(&'static str),
}

/// A socket's type, as far as a Jupyter client needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketType {
    /// Requests and replies.
    Dealer,
    /// Publications; subscribed to all of them.
    Sub,
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHead {
    /// More frames of the same message follow.
    pub more: bool,
    /// A command, not part of a message.
    pub command: bool,
    /// Declared length of the body.
    pub length: u64,
}

/// What [`FrameDecoder::next`] finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// A frame begins.
    Start(FrameHead),
    /// More of its body.
    Data(&'a [u8]),
    /// It is complete.
    End,
}

/// Cuts a byte stream into frames and hands their bodies through. Holds at most nine bytes.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    head: [u8; 9],
    have: usize,
    body: Option<u64>,
}

impl FrameDecoder {
    /// The next item of `input`, which is shortened by what was used; `None` when all of it is used.
    ///
    /// # Errors
    /// When the bytes are no frame; the decoder is of no further use then.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Item<'a>>, ZmtpError> {
        match self.body {
            Some(0) => {
                self.body = None;
                Ok(Some(Item::End))
            }
            Some(_) if input.is_empty() => Ok(None),
            Some(left) => {
                let (data, rest) = input.split_at(usize::try_from(left).unwrap_or(usize::MAX).min(input.len()));
                *input = rest;
                self.body = Some(left - data.len() as u64);
                Ok(Some(Item::Data(data)))
            }
            None => self.next_head(input),
        }
    }

    fn next_head<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Item<'a>>, ZmtpError> {
        while let Some((byte, rest)) = input.split_first() {
            *input = rest;
            self.head[self.have] = *byte;
            self.have += 1;
            let flags = self.head[0];
            if flags & !0b111 != 0 || flags & 0b101 == 0b101 {
                return Err(ZmtpError::Garbage("unknown flags of a frame"));
            }
            let length = match (flags & 0b010 != 0, self.have) {
                (false, 2) => u64::from(self.head[1]),
                (true, 9) => self.head[1..].iter().fold(0, |n, b| n << 8 | u64::from(*b)),
                _ => continue,
            };
            self.have = 0;
            self.body = Some(length);
            return Ok(Some(Item::Start(FrameHead { more: flags & 1 != 0, command: flags & 4 != 0, length })));
        }
        Ok(None)
    }
}

/// Appends the head of a message's frame.
pub fn put_frame_head(out: &mut BytesMut, more: bool, length: usize) {
    match u8::try_from(length) {
        Ok(short) => out.put_slice(&[u8::from(more), short]),
        Err(_) => {
            out.put_u8(u8::from(more) | 0b010);
            out.put_u64(length as u64);
        }
    }
}

/// A message's frames as chunks to be written: small ones together, large ones as they are.
#[must_use]
pub fn message_chunks(parts: &[Bytes]) -> Vec<Bytes> {
    const COPIED: usize = 4096;
    let mut chunks = Vec::new();
    let mut small = BytesMut::new();
    for (at, part) in parts.iter().enumerate() {
        put_frame_head(&mut small, at + 1 < parts.len(), part.len());
        if part.len() <= COPIED {
            small.put_slice(part);
        } else {
            chunks.push(small.split().freeze());
            chunks.push(part.clone());
        }
    }
    chunks.push(small.freeze());
    chunks
}

/// The answer to a command, where it needs one (`PING`).
#[must_use]
pub fn answer_command(body: &[u8]) -> Option<Bytes> {
    let context = body.strip_prefix(b"\x04PING")?.get(2..)?;
    let context = &context[..context.len().min(16)];
    Some([&[0x04, 5 + context.len() as u8], b"\x04PONG".as_slice(), context].concat().into())
}

/// Shakes hands; returns bytes that came after the handshake.
///
/// # Errors
/// When the peer is silent, gone, or no ZMTP 3 peer with the NULL mechanism.
pub async fn shake_hands<S>(stream: &mut S, kind: SocketType, identity: &[u8]) -> Result<BytesMut, ZmtpError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tokio::time::timeout(HANDSHAKE_TIME, async {
        tokio::time::timeout(GREETING_TIME, greet(stream)).await.map_err(|_| ZmtpError::Silent("greeting"))??;
        stream.write_all(&ready(kind, identity)).await?;
        let rest = await_ready(stream).await?;
        if kind == SocketType::Sub {
            stream.write_all(b"\x00\x01\x01").await?;
        }
        Ok(rest)
    })
    .await
    .map_err(|_| ZmtpError::Silent("handshake"))?
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<(), ZmtpError> {
    let mut ours = [0; 64];
    ours[0] = 0xff;
    ours[9] = 0x7f;
    ours[10] = 3;
    ours[12..16].copy_from_slice(b"NULL");
    stream.write_all(&ours).await?;
    let mut theirs = [0; 64];
    let mut have = 0;
    while have < theirs.len() {
        let read = stream.read(&mut theirs[have..]).await?;
        if read == 0 {
            return Err(end_of_file());
        }
        have += read;
        check_greeting(&theirs[..have])?;
    }
    Ok(())
}

/// Judges as much of a greeting as there is, so that a stranger is recognised at his first byte.
fn check_greeting(greeting: &[u8]) -> Result<(), ZmtpError> {
    let is = |at: usize, byte: u8| greeting.get(at).is_none_or(|b| *b == byte);
    if !is(0, 0xff) || !is(9, 0x7f) {
        return Err(ZmtpError::Garbage("not its greeting"));
    }
    if greeting.get(10).is_some_and(|major| *major < 3) {
        return Err(ZmtpError::Garbage("a version before 3"));
    }
    let mechanism = b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    if !mechanism.iter().enumerate().all(|(at, b)| is(12 + at, *b)) {
        return Err(ZmtpError::Garbage("a mechanism other than NULL"));
    }
    Ok(())
}

fn ready(kind: SocketType, identity: &[u8]) -> BytesMut {
    let mut body = BytesMut::from(b"\x05READY".as_slice());
    let kind: &[u8] = match kind {
        SocketType::Dealer => b"DEALER",
        SocketType::Sub => b"SUB",
    };
    for (name, value) in [(b"Socket-Type".as_slice(), kind), (b"Identity", identity)] {
        body.put_u8(name.len() as u8);
        body.put_slice(name);
        body.put_u32(value.len() as u32);
        body.put_slice(value);
    }
    let mut out = BytesMut::new();
    out.put_slice(&[0x04, body.len() as u8]);
    out.put_slice(&body);
    out
}

/// Reads commands until `READY`. The properties are of no interest: a peer of the wrong kind shows itself soon enough.
async fn await_ready<S: AsyncRead + Unpin>(stream: &mut S) -> Result<BytesMut, ZmtpError> {
    let mut decoder = FrameDecoder::default();
    let mut commands = 0;
    let mut command = Vec::new();
    let mut buffer = [0; 512];
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Err(end_of_file());
        }
        let mut input = &buffer[..read];
        while let Some(item) = decoder.next(&mut input)? {
            match item {
                Item::Start(head) => {
                    commands += 1;
                    if !head.command || head.length > MAX_COMMAND || commands > MAX_HANDSHAKE_COMMANDS {
                        return Err(ZmtpError::Garbage("not the handshake's command"));
                    }
                    command.clear();
                }
                Item::Data(data) => command.extend_from_slice(data),
                Item::End if command.starts_with(b"\x05READY") => return Ok(BytesMut::from(input)),
                Item::End if command.starts_with(b"\x05ERROR") => {
                    return Err(ZmtpError::Garbage("refused by the peer"));
                }
                Item::End => {}
            }
        }
    }
}

/// The end of a stream, as an error.
#[must_use]
pub fn end_of_file() -> ZmtpError {
    ZmtpError::Ended(std::io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &[u8], step: usize) -> (Vec<(FrameHead, Vec<u8>)>, bool) {
        let mut decoder = FrameDecoder::default();
        let mut frames: Vec<(FrameHead, Vec<u8>)> = Vec::new();
        for mut chunk in bytes.chunks(step) {
            loop {
                match decoder.next(&mut chunk) {
                    Ok(Some(Item::Start(head))) => frames.push((head, Vec::new())),
                    Ok(Some(Item::Data(data))) => frames.last_mut().unwrap().1.extend_from_slice(data),
                    Ok(Some(Item::End)) => {
                        assert_eq!(frames.last().unwrap().0.length, frames.last().unwrap().1.len() as u64)
                    }
                    Ok(None) => break,
                    Err(_) => return (frames, false),
                }
            }
        }
        (frames, true)
    }

    async fn against(peer: &[u8]) -> Result<BytesMut, ZmtpError> {
        let (mut ours, mut theirs) = tokio::io::duplex(4096);
        theirs.write_all(peer).await.unwrap();
        shake_hands(&mut ours, SocketType::Dealer, b"id").await
    }

    fn greeting() -> Vec<u8> {
        let mut greeting = vec![0; 64];
        greeting[0] = 0xff;
        greeting[9] = 0x7f;
        greeting[10] = 3;
        greeting[12..16].copy_from_slice(b"NULL");
        greeting
    }

    #[tokio::test(start_paused = true)]
    async fn hands_are_shaken_with_a_peer_only() {
        let rest = against(&[greeting(), b"\x04\x06\x05READYx".to_vec()].concat()).await;
        assert_eq!(rest.unwrap(), "x");
        assert!(matches!(against(b"\xff").await, Err(ZmtpError::Silent("greeting"))));
        assert!(matches!(against(b"HTTP/1.1 400").await, Err(ZmtpError::Garbage(_))));
        assert!(matches!(against(&greeting()).await, Err(ZmtpError::Silent("handshake"))));
        let huge = [greeting(), b"\x06\x00\x00\x20\x00\x00\x00\x00\x00".to_vec()].concat();
        assert!(matches!(against(&huge).await, Err(ZmtpError::Garbage(_))));
        let endless = [greeting(), b"\x04\x01x".repeat(9)].concat();
        assert!(matches!(against(&endless).await, Err(ZmtpError::Garbage(_))));
    }

    #[test]
    fn a_ping_is_answered() {
        assert_eq!(answer_command(b"\x04PING\x00\x0actx").unwrap(), b"\x04\x08\x04PONGctx".as_slice());
        assert_eq!(answer_command(b"\x04PING"), None);
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..700), 1..6), big in 0usize..9000, step in 1usize..300) {
            let mut parts: Vec<Bytes> = parts.into_iter().map(Bytes::from).collect();
            parts.push(vec![7; big].into());
            let (frames, whole) = decode(&message_chunks(&parts).concat(), step);
            prop_assert!(whole);
            prop_assert_eq!(frames.iter().map(|f| Bytes::from(f.1.clone())).collect::<Vec<_>>(), parts.clone());
            prop_assert_eq!(frames.iter().filter(|f| f.0.more).count(), parts.len() - 1);
        }

        #[test]
        fn garbage_is_refused_or_passed_but_never_reserved_for(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0u8..8], 0..200), step in 1usize..20) {
            prop_assert_eq!(decode(&bytes, step), decode(&bytes, 1000));
        }

        #[test]
        fn no_peer_makes_the_handshake_panic(tail in proptest::collection::vec(prop_oneof![any::<u8>(), 0u8..8], 0..100), whole in any::<bool>()) {
            let bytes = if whole { [greeting(), tail].concat() } else { tail };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let _ = runtime.block_on(against(&bytes));
        }
    }
}
