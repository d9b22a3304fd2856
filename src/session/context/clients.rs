//! What Jupyter's clients ask a kernel beside executions, and what they hear of it: messages pass, and nothing is decided by them.
//!
//! What a client sends goes to the kernel as one of ours. Answers find back to who has asked; what a kernel publishes is for all. What belongs to
//! executions is told where they are recorded, and what this server asks for itself is told to nobody.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cellblock_wire::link::{Channel, Outbound, Refusal};
use serde_json::{Value, json};

use super::{Action, Context, QueueFull, State};
use crate::domain::execution::Asker;
use crate::domain::output::JsonText;
use crate::kernel::client::{self, ClientHeader};
use crate::kernel::protocol::{self, Iopub};
use crate::session::tap::Message;

/// Most messages that a kernel has not done with, and most bytes of them: with its questions, fewer than a guest holds for a kernel.
const MAX_ASIDES: usize = 24;
const MAX_ASIDE_BYTES: usize = 12 * 1024 * 1024;
/// A kernel that has not answered for so long will not, or not soon: then others may ask.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Most parents that are remembered after their end, for what is said late.
const MAX_PARENTS: usize = 64;

/// A message of a client, other than one that runs code.
#[derive(Debug, Clone)]
pub struct Aside {
    /// Who gets the answer.
    pub asker: Asker,
    /// Where it goes.
    pub channel: Channel,
    /// Its header.
    pub header: ClientHeader,
    /// As it came.
    pub metadata: Bytes,
    /// As it came.
    pub content: Bytes,
    /// As they came.
    pub buffers: Vec<Bytes>,
}

impl Aside {
    fn len(&self) -> usize {
        let buffers: usize = self.buffers.iter().map(Bytes::len).sum();
        self.header.text.0.len() + self.metadata.len() + self.content.len() + buffers
    }
}

/// Those that a kernel works on, or will.
#[derive(Debug, Default)]
pub(super) struct Asides {
    asked: BTreeMap<u64, Asked>,
    /// What came while there was no kernel.
    held: Vec<Aside>,
    parents: VecDeque<(String, JsonText)>,
}

#[derive(Debug)]
struct Asked {
    msg_id: String,
    msg_type: String,
    asker: Asker,
    parent: JsonText,
    channel: Channel,
    bytes: usize,
    since: Instant,
    is_replied: bool,
    is_idle: bool,
}

impl Asides {
    /// Whether the kernel owes nobody an answer that may still come.
    pub(super) fn are_quiet(&self) -> bool {
        self.held.is_empty() && self.asked.values().all(|asked| asked.since.elapsed() >= FORGOTTEN)
    }

    fn has_room(&mut self, aside: &Aside, now: Instant) -> bool {
        let oldest = self.asked.first_entry();
        if let Some(oldest) = oldest.filter(|oldest| now >= oldest.get().since + FORGOTTEN) {
            oldest.remove();
        }
        let bytes: usize = self.asked.values().map(|asked| asked.bytes).chain(self.held.iter().map(Aside::len)).sum();
        self.asked.len() + self.held.len() < MAX_ASIDES && bytes + aside.len() <= MAX_ASIDE_BYTES
    }

    fn remember(&mut self, msg_id: &str, parent: &JsonText) {
        if self.parents.len() == MAX_PARENTS {
            self.parents.pop_front();
        }
        self.parents.push_back((msg_id.to_owned(), parent.clone()));
    }

    fn remove(&mut self, msg_id: &str) -> Option<Asked> {
        let at = self.asked.iter().find(|(_, asked)| asked.msg_id == msg_id).map(|(at, _)| *at)?;
        self.asked.remove(&at)
    }

    /// Who has asked, and with which header, if one of these is answered by a message.
    fn heard(
        &mut self,
        channel: Channel,
        msg_type: &str,
        parent_id: &str,
        content: &[u8],
    ) -> Option<(Asker, JsonText)> {
        let asked = self.asked.values_mut().find(|asked| asked.msg_id == parent_id)?;
        let says_idle = || matches!(protocol::read_iopub(msg_type, content), Ok(Iopub::Status { idle: true }));
        match channel {
            Channel::Iopub if msg_type == "status" && says_idle() => asked.is_idle = true,
            Channel::Shell | Channel::Control if msg_type.ends_with("_reply") => asked.is_replied = true,
            _ => {}
        }
        let who = (asked.asker.clone(), asked.parent.clone());
        let is_done = asked.is_idle && (asked.is_replied || !asked.msg_type.ends_with("_request"));
        if is_done {
            self.remove(parent_id);
            self.remember(parent_id, &who.1);
        }
        Some(who)
    }

    /// The header under which what an earlier message has begun is still told.
    fn parent(&self, msg_id: &str) -> Option<&JsonText> {
        self.parents.iter().rev().find(|(id, _)| id == msg_id).map(|(_, parent)| parent)
    }
}

impl Context {
    /// Passes a client's message on. While there is no kernel it waits for the next, and after an interrupt until the kernel has dealt with that:
    /// one that is at work for a client would seem not to have.
    pub(in crate::session) fn pass(&mut self, aside: Aside, now: Instant) -> Result<(), QueueFull> {
        if matches!(self.state, State::Dead) || !self.asides.has_room(&aside, now) {
            return Err(QueueFull);
        }
        match self.state {
            State::Replacing(_) | State::Settling(_) => self.asides.held.push(aside),
            _ => self.send_aside(aside, now),
        }
        Ok(())
    }

    /// A new kernel is asked for: what was asked of the one before is not answered any more.
    pub(super) fn pass_held(&mut self, now: Instant) {
        self.asides.asked.clear();
        self.send_held(now);
    }

    pub(super) fn send_held(&mut self, now: Instant) {
        for aside in std::mem::take(&mut self.asides.held) {
            self.send_aside(aside, now);
        }
    }

    fn send_aside(&mut self, aside: Aside, now: Instant) {
        let (msg_id, bytes) = (self.next_id("aside"), aside.len());
        let Aside { asker, channel, header, metadata, content, buffers } = aside;
        let request = client::passed(&msg_id, &self.client, &header, [metadata, content], &buffers);
        // Also on control, where a kernel's answer can come with output as well.
        let cap = Some(super::cap_of(&self.making.setup_output));
        let head = Outbound { channel, msg_id: msg_id.clone(), cap, is_aside: true };
        self.actions.push(Action::Send { kernel: self.kernel.clone(), head, parts: request.parts });
        let (msg_type, parent) = (header.msg_type, header.text);
        let (since, is_replied, is_idle) = (now, false, false);
        let asked = Asked { msg_id, msg_type, asker, parent, channel, bytes, since, is_replied, is_idle };
        self.asides.asked.insert(self.messages, asked);
    }

    /// The guest did not take a client's message; says whether it was one.
    pub(super) fn refuse_aside(&mut self, msg_id: &str, refusal: &Refusal) -> bool {
        let Some(asked) = self.asides.remove(msg_id) else { return false };
        let Some(kind) = asked.msg_type.strip_suffix("_request") else { return true };
        let content = json!({"status": "error", "ename": refusal.code, "evalue": refusal.message, "traceback": []});
        self.tell_made(asked.channel, &format!("{kind}_reply"), Some(&asked.parent), &content, Some(asked.asker));
        self.tell_made(Channel::Iopub, "status", Some(&asked.parent), &json!({"execution_state": "idle"}), None);
        true
    }

    /// All who listen hear that the kernel is replaced.
    pub(super) fn tell_restart(&mut self) {
        self.tell_made(Channel::Iopub, "status", None, &json!({"execution_state": "restarting"}), None);
        self.note_restart();
    }

    /// The kernel is replaced as somebody has asked, who knows.
    pub(super) fn note_restart(&self) {
        if let Some(tap) = &self.making.place.tap {
            tap.is_replaced();
        }
    }

    fn tell_made(
        &mut self,
        channel: Channel,
        msg_type: &str,
        parent: Option<&JsonText>,
        content: &Value,
        only: Option<Asker>,
    ) {
        let Some(tap) = self.making.place.tap.clone().filter(|tap| tap.is_open()) else { return };
        let msg_id = self.next_id("told");
        let parts = client::told(&msg_id, msg_type, parent, content, Vec::new());
        tap.tell(Message { channel, msg_type: msg_type.to_owned(), msg_id, parts, of: None, only });
    }

    /// Tells a message of the kernel to who has asked, or to all, unless it belongs to an execution.
    pub(super) fn retell(&mut self, channel: Channel, msg_type: &str, parent_id: &str, parts: &[Bytes]) {
        let content = parts.get(3).map(|content| &content[..]).unwrap_or_default();
        let heard = self.asides.heard(channel, msg_type, parent_id, content);
        let Some(tap) = self.making.place.tap.clone().filter(|tap| tap.is_open()) else { return };
        let is_ours = parent_id.strip_prefix(self.kernel.as_str()).is_some_and(|rest| rest.starts_with('-'));
        let late = heard.is_none().then(|| self.asides.parent(parent_id).cloned()).flatten();
        let (only, parent) = match (channel, heard) {
            (Channel::Iopub, Some((_, parent))) => (None, Some(parent)),
            (_, Some((asker, parent))) => (Some(asker), Some(parent)),
            // Of what has ended, nobody is told that it is busy, or ends once more.
            (Channel::Iopub, None) if late.is_some() && msg_type == "status" => return,
            (Channel::Iopub, None) if late.is_some() => (None, late),
            // What nobody here has asked for is published under its own parent.
            (Channel::Iopub, None) if !is_ours => (None, None),
            _ => return,
        };
        // Text that was cut has one header for all its pieces.
        let msg_id = (msg_type == "stream").then(|| self.next_id("told"));
        let Some((msg_id, mut parts)) = client::retold(parts, parent.as_ref(), msg_id.as_deref()) else { return };
        if msg_type == "kernel_info_reply" {
            parts[3] = client::without_side_doors(&parts[3]);
        }
        tap.tell(Message { channel, msg_type: msg_type.to_owned(), msg_id, parts, of: None, only });
    }

    /// What an execution has begun may be told after its end.
    pub(super) fn remember_parent(&mut self, msg_id: &str, parent: &JsonText) {
        self.asides.remember(msg_id, parent);
    }
}
