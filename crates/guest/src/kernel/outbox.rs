//! Messages on their way to a kernel: bounded queues, one for each port, and the memory of ids that were sent.

use std::collections::{HashSet, VecDeque, hash_map::RandomState};
use std::hash::BuildHasher;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

const MAX_MESSAGES: usize = 64;
const MAX_BYTES: usize = 32 * 1024 * 1024;
const REMEMBERED: usize = 4096;

/// One of a kernel's five ports, in the order of its endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// Requests and replies.
    Shell,
    /// Outputs and status.
    Iopub,
    /// Requests for input.
    Stdin,
    /// Requests that overtake.
    Control,
    /// Echoes.
    Heartbeat,
}

impl Port {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Shell, Self::Iopub, Self::Stdin, Self::Control, Self::Heartbeat];

    /// Its name on the link.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["shell", "iopub", "stdin", "control", "heartbeat"][self as usize]
    }
}

/// Why a message is not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// Its id was seen before.
    Seen,
    /// Too much waits already.
    Full,
    /// The kernel has ended.
    Closed,
}

#[derive(Default)]
struct State {
    queues: [VecDeque<Vec<Bytes>>; 5],
    messages: usize,
    bytes: usize,
    /// Of each port by itself: many answers to a request for input must not have the request to run the code forgotten.
    known: [Known; 5],
    closed: bool,
}

/// Ids that were seen, the oldest first.
#[derive(Default)]
struct Known {
    order: VecDeque<u64>,
    seen: HashSet<u64>,
}

/// The queues.
#[derive(Default)]
pub struct Outbox {
    state: Mutex<State>,
    ready: [Notify; 5],
    hasher: RandomState,
}

fn size(frames: &[Bytes]) -> usize {
    frames.iter().map(Bytes::len).sum()
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the frames of a message.
    ///
    /// # Errors
    /// When it is refused; then nothing has changed.
    pub fn push(&self, port: Port, msg_id: &str, frames: Vec<Bytes>) -> Result<(), Refused> {
        let mut state = self.lock();
        let id = self.hasher.hash_one(msg_id);
        let bytes = size(&frames);
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.known[port as usize].seen.contains(&id) {
            return Err(Refused::Seen);
        }
        if state.messages == MAX_MESSAGES || state.bytes + bytes > MAX_BYTES {
            return Err(Refused::Full);
        }
        let known = &mut state.known[port as usize];
        if known.order.len() == REMEMBERED
            && let Some(oldest) = known.order.pop_front()
        {
            known.seen.remove(&oldest);
        }
        known.order.push_back(id);
        known.seen.insert(id);
        state.messages += 1;
        state.bytes += bytes;
        state.queues[port as usize].push_back(frames);
        self.ready[port as usize].notify_one();
        Ok(())
    }

    /// The next message for a port.
    pub async fn next(&self, port: Port) -> Vec<Bytes> {
        loop {
            if let Some(frames) = self.pop(port) {
                return frames;
            }
            self.ready[port as usize].notified().await;
        }
    }

    fn pop(&self, port: Port) -> Option<Vec<Bytes>> {
        let mut state = self.lock();
        let frames = state.queues[port as usize].pop_front()?;
        state.messages -= 1;
        state.bytes -= size(&frames);
        Some(frames)
    }

    /// Takes nothing more and forgets what waits.
    pub fn close(&self) {
        let mut state = self.lock();
        *state = State { closed: true, ..State::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn queues_are_bounded_and_ids_are_sent_once() {
        let outbox = Outbox::default();
        let frames = || vec![Bytes::from_static(b"x")];
        assert_eq!(outbox.push(Port::Shell, "a", frames()), Ok(()));
        assert_eq!(outbox.push(Port::Shell, "a", frames()), Err(Refused::Seen));
        assert_eq!(outbox.push(Port::Shell, "b", vec![vec![0; MAX_BYTES].into()]), Err(Refused::Full));
        for n in 1..MAX_MESSAGES {
            assert_eq!(outbox.push(Port::Shell, &n.to_string(), frames()), Ok(()));
        }
        assert_eq!(outbox.push(Port::Shell, "b", frames()), Err(Refused::Full));
        for _ in 0..MAX_MESSAGES {
            assert_eq!(outbox.next(Port::Shell).await, frames());
        }
        assert_eq!(outbox.lock().messages, 0);
        assert_eq!(outbox.lock().bytes, 0);
        for n in 0..REMEMBERED {
            outbox.push(Port::Stdin, &format!("n{n}"), frames()).unwrap();
            outbox.next(Port::Stdin).await;
        }
        assert_eq!(outbox.push(Port::Shell, "a", frames()), Err(Refused::Seen), "it is another port's");
        assert_eq!(outbox.push(Port::Stdin, "more", frames()), Ok(()));
        outbox.next(Port::Stdin).await;
        assert_eq!(outbox.push(Port::Stdin, "n0", frames()), Ok(()), "the oldest is forgotten");
        assert_eq!(outbox.push(Port::Stdin, "n9", frames()), Err(Refused::Seen));
        outbox.close();
        assert_eq!(outbox.push(Port::Shell, "c", frames()), Err(Refused::Closed));
    }
}
