//! The guest's way of a message, from a kernel's frames to what goes on: what is signed arrives as it was, what is not does not, and
//! output stays within its execution's cap and is accounted for to the byte.
#![no_main]

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use cellblock_fuzz::cap::{CaptureLimits, MAX_PIECE, MAX_TEXT};
use cellblock_fuzz::capture::stream_text;
use cellblock_fuzz::heap;
use cellblock_fuzz::json::short_fields;
use cellblock_fuzz::message::{Assembler, Content, Incoming, Signer, Taken};
use cellblock_fuzz::reads::Reads;
use cellblock_fuzz::relay::{Out, Relay};
use cellblock_fuzz::script::{EXECUTIONS, KEY, Script, Step};
use cellblock_fuzz::zmtp::{FrameDecoder, ZmtpError, message_chunks};
use cellblock_wire::frame::encode;
use cellblock_wire::link::{Channel, Event, Numbered, OutputCap};
use libfuzzer_sys::fuzz_target;

/// What taking a message in may hold beside and for its own bytes.
const HELD: usize = 64 * 1024;
const HELD_PER_BYTE: usize = 5;
const CHANNELS: [Channel; 3] = [Channel::Iopub, Channel::Shell, Channel::Stdin];
const MAX_STATUSES: u64 = 8;
const MAX_ERRORS: u64 = 4;
const MAX_INPUTS: u64 = 2;
const MAX_STATUS: u64 = 4096;
/// What may go on of messages that belong to no execution, between two messages to the kernel.
const BACKGROUND_BYTES: u64 = 256 * 1024;
const BACKGROUND_MESSAGES: u64 = 500;
/// Bytes of a message of text that are no text.
const UNCOUNTED: u64 = 1024;
/// For what is told when the kernel has ended.
const ROOM: usize = 1 << 20;
const ALL: CaptureLimits = CaptureLimits { head: usize::MAX, tail: 0 };

fuzz_target!(|input: &[u8]| {
    let Some((reads, bytes)) = Reads::split_off(input) else { return };
    let Some((cap, script)) = Script::begin(bytes) else { return };
    let mut books = Books::new(&cap);
    let (mut whole, mut cut) = (Guest::new(&cap, Reads::WHOLE), Guest::new(&cap, reads));
    for step in script {
        let message = whole.arrival(&step);
        assert_eq!(message.is_some(), whole.is_expected(&step));
        let came = message.as_ref().map(Came::of);
        let told = whole.judge(&step, message);
        books.enter(&step, came, &told);
        let message = cut.arrival(&step);
        let told_again = cut.judge(&step, message);
        assert!(told.iter().map(in_short).eq(told_again.iter().map(in_short)), "it matters how this is read: {step:?}");
    }
    let told = whole.relay.flush(ROOM);
    books.close(&told);
    assert!(told.iter().map(in_short).eq(cut.relay.flush(ROOM).iter().map(in_short)));
});

fn in_short(out: &Out) -> (String, &[Bytes]) {
    (format!("{:?}", out.event), &out.parts)
}

fn size(parts: &[Bytes]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

/// The part of a guest that a message passes through.
struct Guest {
    reads: Reads,
    /// Those that are not given up.
    lanes: [Option<(FrameDecoder, Assembler)>; 3],
    relay: Relay,
    started: Instant,
}

impl Guest {
    fn new(cap: &OutputCap, reads: Reads) -> Self {
        let signer = Signer::new(KEY);
        let mut relay = Relay::default();
        EXECUTIONS.iter().for_each(|id| relay.sent(id, Some(*cap)));
        let lanes = [(); 3].map(|()| Some((FrameDecoder::default(), Assembler::new(signer.clone()))));
        Self { reads, lanes, relay, started: Instant::now() }
    }

    /// The message that the step's frames are, if they are one.
    fn arrival(&mut self, step: &Step) -> Option<Incoming> {
        let Step::Frames { lane, frames, arrives, .. } = step else { return None };
        let (decoder, assembler) = self.lanes[*lane].as_mut()?;
        let bytes = message_chunks(frames).concat();
        let mut arrived = None;
        let result = heap::at_most(HELD + HELD_PER_BYTE * bytes.len(), || {
            for mut read in self.reads.of(&bytes) {
                while let Some(item) = decoder.next(&mut read)? {
                    match assembler.take(item, |parent| self.relay.capture_limits(parent))? {
                        Taken::Nothing => {}
                        Taken::Message(message) => assert!(arrived.replace(*message).is_none()),
                        Taken::Command(_) => panic!("no command was sent"),
                    }
                }
            }
            Ok::<_, ZmtpError>(())
        });
        if result.is_err() {
            self.lanes[*lane] = None;
        }
        if let (Some(message), Some(parts)) = (&arrived, arrives) {
            check_arrival(message, parts);
        }
        arrived
    }

    /// Whether the step's frames are a message that is passed on.
    fn is_expected(&self, step: &Step) -> bool {
        matches!(step, Step::Frames { lane, arrives: Some(_), .. } if self.lanes[*lane].is_some())
    }

    fn judge(&mut self, step: &Step, message: Option<Incoming>) -> Vec<Out> {
        match (step, message) {
            (Step::Sent, _) => {
                self.relay.sent("s", None);
                Vec::new()
            }
            (Step::Frames { lane: 0, room, .. }, Some(message)) => {
                let told = self.relay.iopub(message, *room);
                let _ = self.relay.due(self.started);
                told
            }
            (Step::Frames { lane, .. }, Some(message)) => {
                self.relay.reply(CHANNELS[*lane], message).into_iter().collect()
            }
            (Step::Frames { .. }, None) => Vec::new(),
        }
    }
}

fn check_arrival(message: &Incoming, parts: &[Bytes]) {
    assert_eq!([&message.header, &message.parent, &message.metadata], [&parts[0], &parts[1], &parts[2]]);
    assert_eq!(message.size, size(&parts[3..]));
    if let Content::Whole(content) = &message.content {
        assert!(*content == parts[3] && message.buffers == parts[4..]);
    } else {
        assert!(message.buffers.is_empty());
    }
}

/// What goes on can be written to the link.
fn check_out(out: &Out) {
    let numbered = Numbered { seq: 1, kernel: "kernel".to_owned(), event: out.event.clone() };
    encode(&numbered, &out.parts, &mut BytesMut::new()).expect("the link carries it");
    assert!(matches!(out.event, Event::Gap { .. }) == out.parts.is_empty());
}

/// What is of interest of a message.
struct Came {
    msg_type: String,
    parent_id: String,
    size: u64,
    /// The stream, and the length of the text, of a message that has one.
    text: Option<(usize, u64)>,
}

impl Came {
    fn of(message: &Incoming) -> Self {
        let text = match &message.content {
            _ if message.msg_type != "stream" => None,
            Content::Whole(content) => stream_text(content, ALL).map(|(name, text)| (name, text.total)),
            Content::Text(name, text) => Some((name.clone(), text.total)),
            _ => None,
        };
        Self {
            msg_type: message.msg_type.clone(),
            parent_id: message.parent_id.clone(),
            size: message.size,
            text: text.map(|(name, length)| (usize::from(name == "stderr"), length)),
        }
    }
}

/// What came and went.
struct Books {
    accounts: [Account; 2],
    background: Background,
}

impl Books {
    fn new(cap: &OutputCap) -> Self {
        Self { accounts: [(); 2].map(|()| Account::new(cap)), background: Background::default() }
    }

    fn enter(&mut self, step: &Step, came: Option<Came>, told: &[Out]) {
        told.iter().for_each(check_out);
        let (lane, room, came) = match (step, came) {
            (Step::Sent, _) => return self.background = Background::default(),
            (Step::Frames { lane, room, .. }, Some(came)) => (*lane, *room as u64, came),
            (Step::Frames { .. }, None) => return assert!(told.is_empty()),
        };
        let execution = EXECUTIONS.iter().position(|id| *id == came.parent_id);
        match execution.map(|at| &mut self.accounts[at]).filter(|account| !account.idle) {
            _ if lane > 0 => assert_eq!(told.len(), 1, "each reply goes on"),
            _ if came.msg_type == "iopub_welcome" => assert!(told.is_empty()),
            Some(account) => account.take(&came, told, room),
            None => self.background.take(&came, told),
        }
    }

    /// The kernel has ended in the middle of what it did.
    fn close(&mut self, told: &[Out]) {
        told.iter().for_each(check_out);
        let mut rest = told;
        for (id, account) in EXECUTIONS.iter().zip(&mut self.accounts).filter(|(_, account)| !account.idle) {
            let is_its = |out: &&Out| match &out.event {
                Event::Gap { parent_id, .. } | Event::Message { parent_id, .. } => parent_id == id,
                _ => false,
            };
            let (its, others) = rest.split_at(rest.iter().take_while(is_its).count());
            account.end(its);
            account.check_cap();
            rest = others;
        }
        assert!(rest.is_empty());
    }
}

/// The books of one execution.
struct Account {
    cap: OutputCap,
    came: [u64; 2],
    told: [u64; 2],
    results_came: u64,
    results_told: u64,
    messages: u64,
    statuses: u64,
    errors: u64,
    inputs: u64,
    idle: bool,
}

impl Account {
    fn new(cap: &OutputCap) -> Self {
        Self {
            cap: *cap,
            came: [0; 2],
            told: [0; 2],
            results_came: 0,
            results_told: 0,
            messages: 0,
            statuses: 0,
            errors: 0,
            inputs: 0,
            idle: false,
        }
    }

    fn take(&mut self, came: &Came, told: &[Out], room: u64) {
        match (came.msg_type.as_str(), came.text) {
            ("status", _) if came.size <= MAX_STATUS => self.status(told),
            ("error", _) if self.errors < MAX_ERRORS => {
                self.errors += 1;
                assert!(told.len() <= 1);
            }
            ("execute_input", _) if self.inputs < MAX_INPUTS => {
                self.inputs += 1;
                assert_eq!(told.len(), 1);
            }
            (_, Some((stream, length))) => {
                self.came[stream] += length;
                let before = self.told[stream];
                told.iter().for_each(|out| self.text(stream, out));
                assert!(self.told[stream] - before <= length.min(room));
                self.messages += told.len() as u64;
            }
            _ => self.result(came.size, told, room),
        }
        self.check_cap();
    }

    fn text(&mut self, stream: usize, out: &Out) {
        let content = &out.parts[3];
        let (name, text) = stream_text(content, ALL).expect("text is told as text");
        assert_eq!(usize::from(name == "stderr"), stream);
        self.told[stream] += text.total;
        // A byte of text may take six in JSON; there is nothing else that would not be counted.
        let size = size(&out.parts[3..]);
        assert!(size <= UNCOUNTED + 6 * text.total, "{size} bytes tell {} of text", text.total);
    }

    fn result(&mut self, size: u64, told: &[Out], room: u64) {
        self.results_came += size;
        if let [out] = told {
            assert!(size <= room && size == self::size(&out.parts[3..]));
            self.results_told += size;
            self.messages += 1;
        } else {
            assert!(told.is_empty());
        }
    }

    fn status(&mut self, told: &[Out]) {
        let Some((status, before)) = told.split_last() else { return };
        let state = short_fields(&status.parts[3], &["execution_state"], 64).and_then(|[state]| state);
        if state.as_deref() == Some("idle") {
            self.idle = true;
            self.end(before);
        } else {
            assert!(before.is_empty());
            self.statuses += 1;
        }
    }

    /// What was left out is said and adds up, and is followed by what was held back.
    fn end(&mut self, told: &[Out]) {
        let mut omitted = [0; 3];
        for out in told {
            match &out.event {
                Event::Gap { stream, total_bytes, omitted_bytes, .. } => {
                    let came = [self.came[0], self.came[1], self.results_came][*stream as usize];
                    assert_eq!(*total_bytes, came);
                    assert!(*omitted_bytes > 0);
                    omitted[*stream as usize] = *omitted_bytes;
                }
                _ => {
                    let name = short_fields(&out.parts[3], &["name"], MAX_PIECE).expect("an object");
                    self.text(usize::from(name[0].as_deref() == Some("stderr")), out);
                }
            }
        }
        let told = [self.told[0], self.told[1], self.results_told];
        let came = [self.came[0], self.came[1], self.results_came];
        for at in 0..3 {
            assert_eq!(told[at] + omitted[at], came[at], "told and omitted is what came");
        }
    }

    fn check_cap(&self) {
        let Self { cap, told: [out, err], .. } = self;
        assert!(*out.max(err) <= cap.text_bytes.min(MAX_TEXT));
        assert!(self.results_told <= cap.result_bytes);
        assert!(out + err + self.results_told <= cap.total_bytes);
        // A message whose middle was left out is told in two.
        assert!(self.messages <= cap.messages.saturating_mul(2), "{} messages", self.messages);
        assert!(self.statuses <= MAX_STATUSES);
    }
}

/// The books of what belongs to no execution.
#[derive(Default)]
struct Background {
    bytes: u64,
    messages: u64,
    statuses: u64,
}

impl Background {
    fn take(&mut self, came: &Came, told: &[Out]) {
        let [_] = told else {
            assert!(told.is_empty());
            return;
        };
        if came.msg_type == "status" && came.size <= MAX_STATUS {
            self.statuses += 1;
        } else {
            self.messages += 1;
            self.bytes += came.size;
        }
        assert!(self.bytes <= BACKGROUND_BYTES && self.messages.max(self.statuses) <= BACKGROUND_MESSAGES);
    }
}
