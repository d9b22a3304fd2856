//! Jupyter messages between ZMTP frames and parts: signing, checking, and taking in messages of any size in bounded memory.
//!
//! Parts stay the bytes they were. Only what routing needs is read (`msg_type`, the parent's `msg_id`), and text of messages that
//! are too large to be held is captured while it passes. Decides nothing about what is relayed.
//! Source: "Messaging in Jupyter", the wire protocol.

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::cap::{CaptureLimits, Captured};
use crate::capture::{Failure, FailureCapture, MAX_ERROR, TextCapture};
use crate::json::short_fields;
use crate::zmtp::{FrameHead, Item, ZmtpError};

const DELIMITER: &[u8] = b"<IDS|MSG>";
const MAX_PARTS: usize = 64;
const MAX_MESSAGE: u64 = 1 << 30;
const MAX_IDENT: u64 = 1024;
const MAX_HEADER: u64 = 64 * 1024;
const MAX_METADATA: u64 = 64 * 1024;
/// Longest content that is held whole.
const MAX_CONTENT: u64 = 8 * 1024 * 1024;
/// Most bytes of content and buffers that are held together.
const MAX_HELD: u64 = 16 * 1024 * 1024;
/// Above this, text is captured as it passes.
const MAX_TEXT_HELD: u64 = 64 * 1024;
const MAX_NAME: usize = 256;
/// A buffer grows by what came, not by what was declared.
const STEP: usize = 64 * 1024;

/// Signs and checks with a kernel's key.
#[derive(Clone)]
pub struct Signer(Hmac<Sha256>);

impl Signer {
    /// A signer for the key of a connection file.
    #[must_use]
    pub fn new(key: &[u8]) -> Self {
        match Hmac::new_from_slice(key) {
            Ok(mac) => Self(mac),
            Err(_) => unreachable!("HMAC takes keys of any length"),
        }
    }

    /// The frames of a message to a kernel.
    #[must_use]
    pub fn frames(&self, parts: Vec<Bytes>) -> Vec<Bytes> {
        let mut mac = self.0.clone();
        parts.iter().take(4).for_each(|part| mac.update(part));
        let signature: String = mac.finalize().into_bytes().iter().map(|b| format!("{b:02x}")).collect();
        [Bytes::from_static(DELIMITER), signature.into()].into_iter().chain(parts).collect()
    }
}

fn from_hex(hex: &[u8]) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if hex.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// A message of a kernel whose signature was right.
#[derive(Debug)]
pub struct Incoming {
    /// From its header; never empty.
    pub msg_type: String,
    /// `msg_id` of its parent header; empty where there is none.
    pub parent_id: String,
    /// As it came.
    pub header: Bytes,
    /// As it came.
    pub parent: Bytes,
    /// As it came.
    pub metadata: Bytes,
    /// As it came, or what was kept of it.
    pub content: Content,
    /// As they came; none when the message was too large to be held.
    pub buffers: Vec<Bytes>,
    /// Bytes of content and buffers together, as they came.
    pub size: u64,
}

/// The content of a message.
#[derive(Debug)]
pub enum Content {
    /// The bytes as they came.
    Whole(Bytes),
    /// A long `stream` message's name and text.
    Text(String, Captured),
    /// A long error's, or failed reply's, strings.
    Failure(Failure),
    /// Too large for any use.
    LeftOut,
}

enum Body {
    Keep(Vec<u8>),
    Text(Box<TextCapture>),
    Failure(Box<FailureCapture>),
    Pass,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Idents,
    Signature,
    Header,
    Parent,
    Metadata,
    Content,
    Buffers,
    /// The message is no Jupyter message; the rest of it is read and forgotten.
    Skip,
}

/// A message in assembly.
struct Draft {
    stage: Stage,
    body: Body,
    more: bool,
    parts: usize,
    bytes: u64,
    size: u64,
    signature: Vec<u8>,
    mac: Hmac<Sha256>,
    msg_type: String,
    parent_id: String,
    held: [Bytes; 3],
    content: Content,
    buffers: Vec<Bytes>,
}

/// Makes messages of a channel's frames.
pub struct Assembler {
    signer: Signer,
    draft: Draft,
    dropped: u64,
}

/// What became of an item.
#[derive(Debug)]
pub enum Taken {
    /// Nothing yet.
    Nothing,
    /// A message is complete.
    Message(Box<Incoming>),
    /// A command is complete.
    Command(Vec<u8>),
}

impl Assembler {
    /// An assembler for one channel.
    #[must_use]
    pub fn new(signer: Signer) -> Self {
        let draft = Draft::new(&signer);
        Self { signer, draft, dropped: 0 }
    }

    /// How many messages were malformed or wrongly signed.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Takes the next item. `limits` says how much text of a message with this parent is of use.
    ///
    /// # Errors
    /// When a message is above the limits on parts or bytes, or a command above its own.
    pub fn take(&mut self, item: Item<'_>, limits: impl Fn(&str) -> CaptureLimits) -> Result<Taken, ZmtpError> {
        match item {
            Item::Start(head) => self.draft.start(head, limits)?,
            Item::Data(data) => self.draft.data(data),
            Item::End => return Ok(self.end()),
        }
        Ok(Taken::Nothing)
    }

    fn end(&mut self) -> Taken {
        if let Some(command) = self.draft.end() {
            return Taken::Command(command);
        }
        if self.draft.more {
            return Taken::Nothing;
        }
        match std::mem::replace(&mut self.draft, Draft::new(&self.signer)).finish() {
            Some(message) => Taken::Message(Box::new(message)),
            None => {
                self.dropped += 1;
                Taken::Nothing
            }
        }
    }
}

impl Draft {
    fn new(signer: &Signer) -> Self {
        Self {
            stage: Stage::Idents,
            body: Body::Pass,
            more: false,
            parts: 0,
            bytes: 0,
            size: 0,
            signature: Vec::new(),
            mac: signer.0.clone(),
            msg_type: String::new(),
            parent_id: String::new(),
            held: [const { Bytes::new() }; 3],
            content: Content::LeftOut,
            buffers: Vec::new(),
        }
    }

    fn start(&mut self, head: FrameHead, limits: impl Fn(&str) -> CaptureLimits) -> Result<(), ZmtpError> {
        if head.command {
            if self.parts > 0 || head.length > crate::zmtp::MAX_COMMAND {
                return Err(ZmtpError::Garbage("a command inside a message, or a long one"));
            }
            self.body = Body::Keep(Vec::new());
            return Ok(());
        }
        self.parts += 1;
        self.bytes = self.bytes.saturating_add(head.length);
        self.more = head.more;
        if self.parts > MAX_PARTS || self.bytes > MAX_MESSAGE {
            return Err(ZmtpError::Garbage("a message of too many parts or bytes"));
        }
        self.body = self.choose_body(head.length, limits);
        Ok(())
    }

    fn choose_body(&mut self, length: u64, limits: impl Fn(&str) -> CaptureLimits) -> Body {
        let limit = match self.stage {
            Stage::Idents => MAX_IDENT,
            Stage::Signature => 64,
            Stage::Header | Stage::Parent => MAX_HEADER,
            Stage::Metadata => MAX_METADATA,
            Stage::Skip => return Body::Pass,
            Stage::Content => {
                self.size += length;
                return self.choose_content(length, limits);
            }
            Stage::Buffers => {
                self.size += length;
                let held = self.size <= MAX_HELD && matches!(self.content, Content::Whole(_));
                if !held {
                    self.content = std::mem::replace(&mut self.content, Content::LeftOut).without_whole();
                    self.buffers.clear();
                }
                return if held { Body::Keep(Vec::new()) } else { Body::Pass };
            }
        };
        if length > limit {
            self.stage = Stage::Skip;
            return Body::Pass;
        }
        Body::Keep(Vec::new())
    }

    fn choose_content(&self, length: u64, limits: impl Fn(&str) -> CaptureLimits) -> Body {
        let is_failure = self.msg_type == "error" && length > MAX_ERROR as u64
            || self.msg_type.ends_with("_reply") && length > MAX_CONTENT;
        if self.msg_type == "stream" && length > MAX_TEXT_HELD {
            Body::Text(Box::new(TextCapture::new(limits(&self.parent_id))))
        } else if is_failure {
            Body::Failure(Box::new(FailureCapture::new()))
        } else if length <= MAX_CONTENT {
            Body::Keep(Vec::new())
        } else {
            Body::Pass
        }
    }

    fn data(&mut self, data: &[u8]) {
        if (Stage::Header..=Stage::Content).contains(&self.stage) {
            self.mac.update(data);
        }
        match &mut self.body {
            Body::Keep(kept) => {
                if kept.capacity() - kept.len() < data.len() {
                    kept.reserve_exact(data.len().max(STEP.min(kept.len())));
                }
                kept.extend_from_slice(data);
            }
            Body::Text(capture) => capture.push(data),
            Body::Failure(capture) => capture.push(data),
            Body::Pass => {}
        }
    }

    /// Ends a frame; returns the body of a command.
    fn end(&mut self) -> Option<Vec<u8>> {
        let body = std::mem::replace(&mut self.body, Body::Pass);
        if self.parts == 0 {
            return match body {
                Body::Keep(command) => Some(command),
                _ => None,
            };
        }
        self.end_part(body);
        None
    }

    fn end_part(&mut self, body: Body) {
        let (kept, content) = match body {
            Body::Keep(kept) => (Bytes::from(kept), None),
            Body::Text(capture) => (Bytes::new(), capture.finish().map(|(name, text)| Content::Text(name, text))),
            Body::Failure(capture) => (Bytes::new(), Some(Content::Failure(capture.finish()))),
            Body::Pass => (Bytes::new(), Some(Content::LeftOut)),
        };
        self.stage = match self.stage {
            Stage::Idents if kept == DELIMITER => Stage::Signature,
            Stage::Idents => Stage::Idents,
            Stage::Signature => {
                self.signature = kept.into();
                Stage::Header
            }
            Stage::Header => self.end_header(kept),
            Stage::Parent => self.end_parent(kept),
            Stage::Metadata => {
                self.held[2] = kept;
                Stage::Content
            }
            Stage::Content => {
                self.content = content.unwrap_or(Content::Whole(kept)).or_left_out(self.size);
                Stage::Buffers
            }
            Stage::Buffers => {
                if matches!(self.content, Content::Whole(_)) {
                    self.buffers.push(kept);
                }
                Stage::Buffers
            }
            Stage::Skip => Stage::Skip,
        };
    }

    fn end_header(&mut self, header: Bytes) -> Stage {
        match short_fields(&header, &["msg_type"], MAX_NAME) {
            Some([Some(msg_type)]) if !msg_type.is_empty() => self.msg_type = msg_type,
            _ => return Stage::Skip,
        }
        self.held[0] = header;
        Stage::Parent
    }

    fn end_parent(&mut self, parent: Bytes) -> Stage {
        match short_fields(&parent, &["msg_id"], MAX_NAME) {
            Some([id]) => self.parent_id = id.unwrap_or_default(),
            None => return Stage::Skip,
        }
        self.held[1] = parent;
        Stage::Metadata
    }

    fn finish(self) -> Option<Incoming> {
        if self.stage != Stage::Buffers {
            return None;
        }
        self.mac.verify_slice(&from_hex(&self.signature)?).ok()?;
        let [header, parent, metadata] = self.held;
        Some(Incoming {
            msg_type: self.msg_type,
            parent_id: self.parent_id,
            header,
            parent,
            metadata,
            content: self.content,
            buffers: self.buffers,
            size: self.size,
        })
    }
}

impl Incoming {
    /// Most bytes of it that could be passed on as output.
    #[must_use]
    pub fn output_size(&self) -> u64 {
        match &self.content {
            Content::Text(_, text) => (text.head.len() + text.tail.len()) as u64,
            Content::Whole(_) => self.size,
            Content::Failure(_) | Content::LeftOut => 0,
        }
    }
}

impl Content {
    /// A text capture that found no text holds nothing; bytes of a whole content never count more than they are.
    fn or_left_out(self, size: u64) -> Self {
        match self {
            Self::Whole(bytes) if bytes.len() as u64 != size => Self::LeftOut,
            other => other,
        }
    }

    fn without_whole(self) -> Self {
        match self {
            Self::Whole(_) => Self::LeftOut,
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zmtp::{FrameDecoder, message_chunks};
    use proptest::prelude::*;

    const LIMITS: CaptureLimits = CaptureLimits { head: 100, tail: 50 };

    fn feed(assembler: &mut Assembler, bytes: &[u8], step: usize) -> Result<Vec<Incoming>, ZmtpError> {
        let mut decoder = FrameDecoder::default();
        let mut messages = Vec::new();
        for mut chunk in bytes.chunks(step) {
            while let Some(item) = decoder.next(&mut chunk)? {
                if let Taken::Message(message) = assembler.take(item, |_| LIMITS)? {
                    messages.push(*message);
                }
            }
        }
        Ok(messages)
    }

    fn parts(msg_type: &str, content: &str, buffers: &[&[u8]]) -> Vec<Bytes> {
        let header = format!(r#"{{"msg_id":"m","msg_type":"{msg_type}","x":[{{}}]}}"#);
        let fixed = [header, r#"{"msg_id":"p"}"#.to_owned(), "{}".to_owned(), content.to_owned()];
        fixed.into_iter().map(Bytes::from).chain(buffers.iter().map(|b| Bytes::copy_from_slice(b))).collect()
    }

    fn wire(signer: &Signer, parts: Vec<Bytes>) -> Vec<u8> {
        let frames = [vec![Bytes::from_static(b"topic")], signer.frames(parts)].concat();
        message_chunks(&frames).concat()
    }

    fn one(parts: Vec<Bytes>) -> Incoming {
        let signer = Signer::new(b"key");
        let mut messages = feed(&mut Assembler::new(signer.clone()), &wire(&signer, parts), 5000).unwrap();
        assert_eq!(messages.len(), 1);
        messages.remove(0)
    }

    #[test]
    fn parts_stay_the_bytes_they_were() {
        let message = one(parts("comm_open", "{\"a\": NaN}", &[b"\0\x01\xff", b""]));
        assert_eq!((message.msg_type.as_str(), message.parent_id.as_str(), message.size), ("comm_open", "p", 13));
        assert!(matches!(&message.content, Content::Whole(b) if b == "{\"a\": NaN}"));
        assert_eq!(message.buffers, [Bytes::from_static(b"\0\x01\xff"), Bytes::new()]);
    }

    #[test]
    fn wrong_signatures_are_dropped_whatever_the_size() {
        let signer = Signer::new(b"key");
        for text in ["x".to_owned(), "x".repeat(100_000)] {
            let bytes =
                wire(&Signer::new(b"other"), parts("stream", &format!(r#"{{"name":"stdout","text":"{text}"}}"#), &[]));
            let mut assembler = Assembler::new(signer.clone());
            assert!(feed(&mut assembler, &bytes, 4096).unwrap().is_empty());
            assert_eq!(assembler.dropped(), 1);
        }
    }

    #[test]
    fn long_text_is_captured_and_long_results_are_counted() {
        let text = format!("{}é{}", "a".repeat(200_000), "b".repeat(60));
        let message = one(parts("stream", &format!(r#"{{"text":"{text}","name":"stderr"}}"#), &[]));
        let Content::Text(name, captured) = message.content else { panic!("no text") };
        assert_eq!(
            (name.as_str(), captured.head.len(), captured.tail.as_str()),
            ("stderr", 100, "b".repeat(50).as_str())
        );
        assert_eq!(captured.total, 200_062);
        let message = one(parts("display_data", &format!("\"{}\"", "x".repeat(9_000_000)), &[b"buffer"]));
        assert!(matches!(message.content, Content::LeftOut));
        assert_eq!((message.size, message.buffers.len()), (9_000_008, 0));
        let huge = vec![0; 16 << 20];
        let message = one(parts("display_data", "{}", &[b"x", &huge]));
        assert!(matches!(message.content, Content::LeftOut));
        assert!(message.buffers.is_empty());
    }

    #[test]
    fn long_errors_keep_their_beginning() {
        let content = serde_json::json!({"status": "error", "ename": "E", "evalue": "v".repeat(9_000_000), "traceback": ["t", "u".repeat(300_000), "w"]});
        let message = one(parts("execute_reply", &content.to_string(), &[]));
        let Content::Failure(failure) = message.content else { panic!("no failure") };
        assert_eq!((failure.is_error(), failure.ename.as_str(), failure.evalue.len()), (true, "E", MAX_ERROR / 4));
        assert_eq!(failure.traceback[0], "t");
        assert!(failure.traceback.iter().map(String::len).sum::<usize>() <= MAX_ERROR);
        assert!(serde_json::to_string(&failure).unwrap().starts_with(r#"{"status":"error","ename":"E""#));
    }

    #[test]
    fn endless_parts_are_an_error_and_strange_ones_are_skipped() {
        let signer = Signer::new(b"key");
        let endless = message_chunks(&vec![Bytes::new(); 65]).concat();
        assert!(feed(&mut Assembler::new(signer.clone()), &endless, 100).is_err());
        let mut assembler = Assembler::new(signer.clone());
        let long_header = vec![Bytes::from(vec![b' '; 70_000]), "{}".into(), "{}".into(), "{}".into()];
        let stream = [
            wire(&signer, long_header),
            message_chunks(&[Bytes::from_static(b"x")]).concat(),
            wire(&signer, parts("status", "{}", &[])),
        ];
        assert_eq!(feed(&mut assembler, &stream.concat(), 100).unwrap().len(), 1);
        assert_eq!(assembler.dropped(), 2);
    }

    proptest! {
        #[test]
        fn no_frames_make_the_assembler_panic_or_hold_much(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0u8..8], 0..300), frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 1..9), step in 1usize..50) {
            let signer = Signer::new(b"key");
            let _ = feed(&mut Assembler::new(signer.clone()), &bytes, step);
            let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
            let _ = feed(&mut Assembler::new(signer.clone()), &wire(&signer, frames), step);
        }
    }
}
