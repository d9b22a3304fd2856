//! What a kernel does, as an input of the `message` target spells it: a cap, then messages, signed or not, and loose frames.
//!
//! Texts end with a zero byte, so that taking bytes out or putting some in leaves the rest what it was.

use bytes::Bytes;
use cellblock_wire::link::OutputCap;

use crate::filler::Filler;
use crate::json::short_fields;
use crate::message::Signer;

/// The kernel's key.
pub const KEY: &[u8] = b"key";
/// Executions under way from the beginning.
pub const EXECUTIONS: [&str; 2] = ["e", "f"];

const LIMITS: [u64; 16] =
    [0, 1, 2, 5, 20, 100, 400, 4096, 65_536, 100_000, 262_144, 300_000, 1 << 20, 8 << 20, 1 << 40, u64::MAX];
const ROOMS: [usize; 4] = [0, 100, 70_000, 12 << 20];
const PARENTS: [&str; 4] = [EXECUTIONS[0], EXECUTIONS[1], "", "stranger"];
const TYPES: [&str; 12] = [
    "stream",
    "display_data",
    "execute_result",
    "error",
    "status",
    "execute_input",
    "execute_reply",
    "input_request",
    "comm_msg",
    "clear_output",
    "iopub_welcome",
    "",
];
const LONGEST_HEADER: usize = 64 * 1024;
const MOST_PARTS: usize = 64;
const LONGEST_NAME: usize = 256;

/// What happens next.
#[derive(Debug)]
pub enum Step {
    /// Frames come over a channel.
    Frames {
        /// Which one, of three.
        lane: usize,
        /// Their bodies.
        frames: Vec<Bytes>,
        /// Header, parent header, metadata, content and buffers, if they are signed and within the limits.
        arrives: Option<Vec<Bytes>>,
        /// How much more output can be kept.
        room: usize,
    },
    /// A message was sent to the kernel.
    Sent,
}

/// The rest of a script.
pub struct Script<'a> {
    bytes: &'a [u8],
    filler: Filler,
}

impl<'a> Script<'a> {
    /// The cap of all executions, and the script.
    #[must_use]
    pub fn begin(bytes: &'a [u8]) -> Option<(OutputCap, Self)> {
        let ([text, result, total, messages, rate], bytes) = bytes.split_first_chunk()?;
        let limit = |choice: &u8| LIMITS[usize::from(choice % 16)];
        let cap = OutputCap {
            text_bytes: limit(text),
            result_bytes: limit(result),
            total_bytes: limit(total),
            messages: limit(messages),
            messages_per_second: limit(rate),
        };
        Some((cap, Self { bytes, filler: Filler::default() }))
    }

    fn message(&mut self, [what, kind, choices, lengths, buffers]: [u8; 5], text: &[u8]) -> Step {
        let parent = PARENTS[usize::from(choices & 3)];
        let text = Bytes::from(self.filler.fill(text, lengths));
        let header = format!(r#"{{"msg_id":"m","msg_type":"{}"}}"#, TYPES[usize::from(kind) % TYPES.len()]);
        let mut parts =
            [header, format!(r#"{{"msg_id":"{parent}"}}"#), "{}".to_owned(), "{}".to_owned()].map(Bytes::from);
        // Mostly the content, but any part can be what it likes.
        parts[[3, 3, 3, 3, 0, 1, 2, 3][usize::from(choices >> 4 & 7)]] = text;
        let mut parts = parts.to_vec();
        for _ in 0..buffers % 80 {
            parts.push(vec![0; self.filler.size(lengths >> 4)].into());
        }
        let mut frames = vec![Bytes::from_static(b"topic")];
        let signer = Signer::new(if choices >> 2 & 3 == 2 { b"another" } else { KEY });
        frames.extend(signer.frames(parts.clone()));
        if choices >> 2 & 3 == 3 {
            frames[2] = Bytes::from_static(b"no signature");
        }
        let arrives = choices >> 2 & 3 < 2 && frames.len() <= MOST_PARTS && is_read(&parts);
        Step::Frames {
            lane: [0, 0, 0, 0, 1, 2][usize::from(what)],
            frames,
            arrives: arrives.then_some(parts),
            room: ROOMS[usize::from(what ^ kind >> 4) % 4],
        }
    }
}

impl Iterator for Script<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let (control, rest) = self.bytes.split_first_chunk::<5>()?;
        let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
        let text = &rest[..end];
        self.bytes = rest.get(end + 1..).unwrap_or_default();
        Some(match control[0] % 8 {
            what @ 0..=5 => self.message([what, control[1], control[2], control[3], control[4]], text),
            6 => {
                let frames = text.split(|byte| *byte == 0x1d).map(|frame| self.filler.fill(frame, control[3]).into());
                let lane = usize::from(control[1] % 3);
                Step::Frames { lane, frames: frames.collect(), arrives: None, room: ROOMS[3] }
            }
            _ => Step::Sent,
        })
    }
}

/// Whether header, parent header and metadata are what a message needs to be passed on.
fn is_read(parts: &[Bytes]) -> bool {
    let msg_type = short_fields(&parts[0], &["msg_type"], LONGEST_NAME);
    parts[..3].iter().all(|part| part.len() <= LONGEST_HEADER)
        && matches!(msg_type, Some([Some(msg_type)]) if !msg_type.is_empty())
        && short_fields(&parts[1], &["msg_id"], LONGEST_NAME).is_some()
}
