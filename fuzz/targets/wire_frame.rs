//! The link between guest and control plane: frames out of a stream, and markers in one, whatever the other side writes.
#![no_main]

use bytes::{Bytes, BytesMut};
use cellblock_fuzz::heap;
use cellblock_fuzz::reads::Reads;
use cellblock_wire::frame::{Decoder, Frame, MAX_FRAME, MAX_HEAD, MAX_PARTS, encode};
use cellblock_wire::link::Numbered;
use cellblock_wire::marker::{LinkSecret, MAGIC, MARKER_LEN, Marker, MarkerScanner, Scanned};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};

const SECRET: LinkSecret = LinkSecret([7; 16]);
/// What decoding may hold beside and for the bytes that came: a buffer that doubles, and values, which cost more than their text.
const HELD: usize = 16 * 1024;
const HELD_PER_BYTE: usize = 128;

fuzz_target!(|input: &[u8]| {
    let Some((reads, bytes)) = Reads::split_off(input) else { return };
    check_frames::<IgnoredAny>(bytes, reads);
    // The head that comes from a guest.
    check_again(&check_frames::<Numbered>(bytes, reads));
    check_markers(bytes, reads);
});

trait Head: DeserializeOwned + PartialEq + std::fmt::Debug {}
impl<H: DeserializeOwned + PartialEq + std::fmt::Debug> Head for H {}

#[derive(Debug, PartialEq)]
struct Frames<H> {
    frames: Vec<Frame<H>>,
    /// The stream can't be read any further.
    refused: bool,
    /// Bytes of an unfinished frame are left.
    unfinished: bool,
}

impl<H: Head> Frames<H> {
    fn decoded(bytes: &[u8], reads: Reads) -> Self {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for read in reads.of(bytes) {
            decoder.push(read);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(_) => return Self { frames, refused: true, unfinished: false },
                }
            }
        }
        Self { frames, refused: false, unfinished: !decoder.is_empty() }
    }

    /// What the layout says, read from the whole.
    fn expected(mut bytes: &[u8]) -> Self {
        let mut frames = Vec::new();
        let is_refused = loop {
            if declared(bytes).is_some_and(|length| length > MAX_FRAME) {
                break true;
            }
            let Some(body) = piece(&mut bytes, MAX_FRAME) else { break false };
            match expected_frame(body) {
                Some(frame) => frames.push(frame),
                None => break true,
            }
        };
        Self { frames, refused: is_refused, unfinished: !is_refused && !bytes.is_empty() }
    }
}

fn expected_frame<H: Head>(mut body: &[u8]) -> Option<Frame<H>> {
    let head = piece(&mut body, MAX_HEAD)?;
    let mut parts = Vec::new();
    while !body.is_empty() {
        parts.push(Bytes::copy_from_slice(piece(&mut body, MAX_FRAME)?));
    }
    let head = serde_json::from_slice(head).ok()?;
    (parts.len() <= MAX_PARTS).then_some(Frame { head, parts })
}

fn declared(bytes: &[u8]) -> Option<usize> {
    bytes.first_chunk().map(|length| u32::from_be_bytes(*length) as usize)
}

/// Takes a length and so many bytes, if they are there.
fn piece<'a>(bytes: &mut &'a [u8], limit: usize) -> Option<&'a [u8]> {
    let length = declared(bytes).filter(|length| *length <= limit)?;
    let piece = bytes[4..].get(..length)?;
    *bytes = &bytes[4 + length..];
    Some(piece)
}

fn check_frames<H: Head>(bytes: &[u8], reads: Reads) -> Vec<Frame<H>> {
    let expected = Frames::expected(bytes);
    for reads in [Reads::WHOLE, reads] {
        let decoded = heap::at_most(HELD + HELD_PER_BYTE * bytes.len(), || Frames::<H>::decoded(bytes, reads));
        assert_eq!(decoded, expected);
    }
    expected.frames
}

/// What was read can be written, and is read again as it was.
fn check_again<H: Head + Serialize>(frames: &[Frame<H>]) {
    for frame in frames {
        let mut out = BytesMut::new();
        encode(&frame.head, &frame.parts, &mut out).expect("a frame that came can be sent");
        let mut decoder = Decoder::default();
        decoder.push(&out);
        assert_eq!(decoder.next_frame().expect("a frame").as_ref(), Some(frame));
        assert!(decoder.is_empty());
    }
}

/// A stream as its markers divide it: bytes before each, and after the last.
#[derive(Debug, PartialEq)]
struct Divided {
    markers: Vec<Marker>,
    bytes: Vec<Vec<u8>>,
}

impl Divided {
    fn nothing() -> Self {
        Self { markers: Vec::new(), bytes: vec![Vec::new()] }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.bytes.last_mut().expect("never empty").extend_from_slice(bytes);
    }

    fn divide(&mut self, marker: Marker) {
        self.markers.push(marker);
        self.bytes.push(Vec::new());
    }

    fn expected(mut bytes: &[u8]) -> Self {
        let mut divided = Self::nothing();
        while let Some((byte, rest)) = bytes.split_first() {
            let nonce = bytes.get(32..MARKER_LEN).and_then(|nonce| nonce.first_chunk());
            match nonce.filter(|_| bytes.starts_with(&[MAGIC, SECRET.0].concat())) {
                Some(nonce) => {
                    divided.divide(Marker { secret: SECRET, nonce: *nonce });
                    bytes = &bytes[MARKER_LEN..];
                }
                None => {
                    divided.take(&[*byte]);
                    bytes = rest;
                }
            }
        }
        divided
    }

    /// As the scanner divides it. `release` says after which reads what is held back is asked for.
    fn scanned(bytes: &[u8], reads: Reads, release: impl Fn(usize) -> bool) -> Self {
        let mut divided = Self::nothing();
        let mut scanner = MarkerScanner::default();
        for (at, read) in reads.of(bytes).enumerate() {
            for piece in scanner.push(read, |marker| marker.secret == SECRET) {
                match piece {
                    Scanned::Bytes(bytes) => divided.take(&bytes),
                    Scanned::Marker(marker) => divided.divide(marker),
                }
            }
            assert!(scanner.held().len() < MARKER_LEN);
            if release(at) {
                divided.take(&scanner.release());
                assert!(!scanner.is_holding());
            }
        }
        divided.take(&scanner.release());
        divided
    }
}

fn check_markers(bytes: &[u8], reads: Reads) {
    let expected = Divided::expected(bytes);
    assert_eq!(Divided::scanned(bytes, Reads::WHOLE, |_| false), expected);
    assert_eq!(Divided::scanned(bytes, reads, |_| false), expected);
    // What is released early may turn out to be the beginning of a marker; nothing else is added, and nothing lost.
    let released = Divided::scanned(bytes, reads, |at| reads.choice(at / 4 + 1) >> (at % 8) & 1 == 1);
    assert_eq!(released.markers, expected.markers);
    for (at, (released, bytes)) in released.bytes.iter().zip(&expected.bytes).enumerate() {
        let added = released.strip_prefix(&bytes[..]).expect("nothing lost");
        let marker = expected.markers.get(at).map(Marker::to_bytes);
        assert!(marker.map_or(added.is_empty(), |marker| added.len() < MARKER_LEN && marker.starts_with(added)));
    }
}
