//! The guest's half of ZMTP: the handshake with a hostile peer, and frames out of a stream.
#![no_main]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use cellblock_fuzz::heap;
use cellblock_fuzz::reads::Reads;
use cellblock_fuzz::zmtp::{
    FrameDecoder, FrameHead, Item, MAX_COMMAND, SocketType, answer_command, message_chunks, shake_hands,
};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Runtime;

/// The handshake may hold a command of at most 1 KiB and what was read with it.
const HELD: usize = 8 * 1024;
const GREETING: usize = 64;
const IDENTITY: &[u8] = b"cellblock";

fuzz_target!(|input: &[u8]| {
    let Some((reads, bytes)) = Reads::split_off(input) else { return };
    let frames = Frames::expected(bytes);
    assert_eq!(Frames::decoded(bytes, Reads::WHOLE), frames);
    assert_eq!(Frames::decoded(bytes, reads), frames);
    frames.survive_encoding();
    frames.commands_are_answered();
    check_handshake(bytes, reads);
});

#[derive(Debug, PartialEq)]
struct Frame {
    head: FrameHead,
    body: Vec<u8>,
    complete: bool,
}

#[derive(Debug, Default, PartialEq)]
struct Frames {
    frames: Vec<Frame>,
    garbage: bool,
}

impl Frames {
    fn decoded(bytes: &[u8], reads: Reads) -> Self {
        let mut decoder = FrameDecoder::default();
        let mut found = Self::default();
        for mut read in reads.of(bytes) {
            loop {
                match decoder.next(&mut read) {
                    Ok(None) => break,
                    Ok(Some(item)) => found.take(item),
                    Err(_) => return Self { garbage: true, ..found },
                }
            }
            assert!(read.is_empty());
        }
        found
    }

    fn take(&mut self, item: Item<'_>) {
        match (item, self.frames.last_mut()) {
            (Item::Start(head), _) => self.frames.push(Frame { head, body: Vec::new(), complete: false }),
            (Item::Data(data), Some(frame)) if !data.is_empty() => frame.body.extend_from_slice(data),
            (Item::End, Some(frame)) => frame.complete = true,
            (item, _) => panic!("{item:?} in no frame, or of no bytes"),
        }
    }

    /// What the specification says, read from the whole.
    fn expected(mut bytes: &[u8]) -> Self {
        let mut found = Self::default();
        while let Some(frame) = expected_frame(&mut bytes, &mut found.garbage) {
            found.frames.push(frame);
        }
        found
    }

    /// What is written is read again as it was.
    fn survive_encoding(&self) {
        let parts: Vec<Bytes> = self.frames.iter().map(|frame| Bytes::copy_from_slice(&frame.body)).collect();
        if parts.is_empty() {
            return;
        }
        let again = Self::expected(&message_chunks(&parts).concat());
        assert!(!again.garbage && again.frames.len() == parts.len());
        for (at, (frame, part)) in again.frames.iter().zip(&parts).enumerate() {
            let head = FrameHead { more: at + 1 < parts.len(), command: false, length: part.len() as u64 };
            assert_eq!((frame.head, &frame.body[..], frame.complete), (head, &part[..], true));
        }
    }

    fn commands_are_answered(&self) {
        for frame in self.frames.iter().filter(|f| f.head.command && f.complete && f.head.length <= MAX_COMMAND) {
            let context = frame.body.strip_prefix(b"\x04PING").and_then(|rest| rest.get(2..));
            let expected = context.map(|context| [b"\x04PONG", &context[..context.len().min(16)]].concat());
            let answer = answer_command(&frame.body);
            assert_eq!(answer.map(|answer| the_command(&answer)), expected);
        }
    }
}

/// The next frame, as far as it is there. Source: <https://rfc.zeromq.org/spec/23/>, "Framing".
fn expected_frame(bytes: &mut &[u8], garbage: &mut bool) -> Option<Frame> {
    let flags = *bytes.first()?;
    let (more, long, command) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
    if flags > 7 || more && command {
        *garbage = true;
        return None;
    }
    let (length, rest) = if long {
        let (length, rest) = bytes[1..].split_first_chunk()?;
        (u64::from_be_bytes(*length), rest)
    } else {
        let (length, rest) = bytes[1..].split_first()?;
        (u64::from(*length), rest)
    };
    let there = rest.len().min(usize::try_from(length).unwrap_or(usize::MAX));
    let (body, rest) = rest.split_at(there);
    *bytes = rest;
    let head = FrameHead { more, command, length };
    Some(Frame { head, body: body.to_vec(), complete: there as u64 == length })
}

fn the_command(bytes: &[u8]) -> Vec<u8> {
    let Frames { mut frames, garbage: false } = Frames::expected(bytes) else { panic!("no frame") };
    assert!(frames.len() == 1 && frames[0].head.command && frames[0].complete);
    frames.remove(0).body
}

fn check_handshake(bytes: &[u8], reads: Reads) {
    let kind = if reads.choice(3) < 128 { SocketType::Dealer } else { SocketType::Sub };
    let whole = handshake(bytes, Reads::WHOLE, kind);
    let cut = handshake(bytes, reads, kind);
    assert_eq!(whole, cut);
    assert_eq!(cut.ok().as_deref(), expected_rest(bytes));
}

/// What follows the handshake, or why there was none.
fn handshake(bytes: &[u8], reads: Reads, kind: SocketType) -> Result<Vec<u8>, String> {
    thread_local! {
        static RUNTIME: Runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    }
    let mut peer = Peer { says: Box::new(reads.of(bytes)), read: &[], heard: Vec::new() };
    let shaken =
        RUNTIME.with(|runtime| heap::at_most(HELD, || runtime.block_on(shake_hands(&mut peer, kind, IDENTITY))));
    let mut rest = shaken.map_err(|error| error.to_string())?;
    peer.check_heard(kind);
    rest.extend_from_slice(peer.read);
    peer.says.for_each(|read| rest.extend_from_slice(read));
    Ok(rest.into())
}

/// What an honest reading of the specification leaves after the handshake; `None` where it fails.
fn expected_rest(bytes: &[u8]) -> Option<&[u8]> {
    let (greeting, mut rest) = bytes.split_at_checked(GREETING)?;
    let is_v3 = greeting[0] == 0xff && greeting[9] == 0x7f && greeting[10] >= 3;
    if !is_v3 || greeting[12..32] != *b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" {
        return None;
    }
    for _ in 0..8 {
        let command = expected_frame(&mut rest, &mut false)?;
        if !command.head.command || command.head.length > MAX_COMMAND || !command.complete {
            return None;
        }
        match command.body.get(..6) {
            Some(b"\x05READY") => return Some(rest),
            Some(b"\x05ERROR") => return None,
            _ => {}
        }
    }
    None
}

/// A stream that answers at once, in reads of the fuzzer's choice.
struct Peer<'a> {
    says: Box<dyn Iterator<Item = &'a [u8]> + 'a>,
    read: &'a [u8],
    heard: Vec<u8>,
}

impl Peer<'_> {
    /// A greeting, `READY`, and a subscription where that is due.
    fn check_heard(&self, kind: SocketType) {
        assert_eq!(self.heard[0], 0xff);
        let Frames { frames, garbage: false } = Frames::expected(&self.heard[GREETING..]) else {
            panic!("garbage sent")
        };
        assert!(frames[0].head.command && frames[0].body.starts_with(b"\x05READY\x0bSocket-Type"));
        let after: Vec<&[u8]> = frames[1..].iter().map(|frame| &frame.body[..]).collect();
        assert_eq!(after, if kind == SocketType::Sub { vec![b"\x01".as_slice()] } else { vec![] });
    }
}

impl AsyncRead for Peer<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            self.read = self.says.next().unwrap_or_default();
        }
        let (now, later) = self.read.split_at(self.read.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.read = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Peer<'_> {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.heard.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
