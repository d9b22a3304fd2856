//! The link to a cell that is there already: one that an earlier process has left, one that was frozen, and one whose link broke while its guest lives on.
//!
//! An engine that hangs, restarts or cuts its connections costs a session nothing but time: what was on its way is said again, which the guest knows, and what the
//! guest has said meanwhile it says again too. Only a cell that is seen to be gone, or a guest that stays silent beside an engine that answers, ends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::context::Action;
use super::super::wiring::Settled;
use super::freezing;
use super::{Actor, Booted, Done, LAST_WORDS, Verdict, boot};
use crate::domain::ids::ContextId;
use crate::domain::lifecycle::Phase;
use crate::kernel::link::{Link, LinkError};

/// What is said of a guest that is silent.
const SILENT: &str = "the program in its container that runs kernels did not answer";
/// A guest whose link broke answers within this time, or a start's time if that is less.
const GUEST_ANSWERS: Duration = Duration::from_secs(20);
/// A link that broke sooner than this is not opened again at once …
const SHORT: Duration = Duration::from_secs(10);
/// … but after this time, doubled with each such link up to `SHORT`.
const WAIT_FIRST: Duration = Duration::from_millis(500);
/// Most kernels of no context that are ended after one link: more than a guest runs.
const MOST_STRAYS: usize = 64;

/// What a session knows of its links.
pub(super) struct Linking {
    /// A link is being opened, by whoever also thaws the cell.
    pub(super) is_under_way: bool,
    since: Instant,
    /// Since when there is none, where there was one.
    lost_at: Option<Instant>,
    /// How many links in a row broke soon.
    short: u32,
}

impl Linking {
    pub(super) fn new(now: Instant) -> Self {
        Self { is_under_way: false, since: now, lost_at: None, short: 0 }
    }

    /// How long the next link is put off.
    fn wait(&mut self, now: Instant) -> Duration {
        if now.duration_since(self.since) >= SHORT {
            self.short = 0;
            return Duration::ZERO;
        }
        let wait = WAIT_FIRST * 2_u32.saturating_pow(self.short);
        self.short = (self.short + 1).min(8);
        wait.min(SHORT)
    }
}

impl Actor {
    pub(super) fn adoption(&self, guest_patience: Duration, words: &'static str) -> boot::Adoption {
        boot::Adoption {
            engine: Arc::clone(&self.engine),
            name: self.cell.name.clone(),
            secret: self.secret,
            init: self.init(),
            guest_patience,
            engine_patience: self.settings.orphan_timeout,
            words,
        }
    }

    /// Takes over the cell that an earlier process has left.
    pub(super) fn adopt_cell(&mut self) {
        let words = "its container could not be taken over from the server before";
        let adoption = self.adoption(self.settings.start_timeout, words);
        self.linking.is_under_way = true;
        self.start(async move { Done::Adopted(adoption.adopt().await) });
    }

    /// Events up to number `heard` have been taken note of before.
    pub(super) fn connect(&mut self, booted: Booted, heard: u64) {
        (self.linking.since, self.linking.lost_at) = (Instant::now(), None);
        self.end_strays(booted.kernels);
        self.wiring.connect(booted.link, booted.events, heard);
    }

    /// Ends kernels that no context has. One whose context was deleted while its guest was not heard was to be ended over the next link: the process that
    /// was to do so may have ended first, and no record tells of it.
    fn end_strays(&mut self, kernels: Vec<String>) {
        let strays = kernels.into_iter().filter(|name| is_a_kernels(name));
        let strays = strays.filter(|name| !self.contexts.values().any(|context| context.has(name)));
        let deletions: Vec<_> = strays.take(MOST_STRAYS).map(|kernel| Action::Delete { kernel }).collect();
        for deletion in &deletions {
            tracing::info!(session = %self.cell.session, ?deletion, "a kernel of no context is ended");
        }
        self.wiring.plan(deletions);
    }

    /// The same guest can be heard again. It tells again what it was not told to forget.
    pub(super) fn connect_again(&mut self, booted: Booted) {
        let now = Instant::now();
        let unheard = self.linking.lost_at.map_or(Duration::ZERO, |at| now.duration_since(at));
        self.connect(booted, self.wiring.last_seq());
        self.contexts.values_mut().for_each(|context| context.is_linked(now, unheard));
        self.gone.iter_mut().for_each(|gone| gone.until = now + LAST_WORDS);
        self.open_notebook();
    }

    /// The link is of no use any more.
    fn cut(&mut self) -> Option<Link> {
        let link = self.wiring.cut()?;
        self.linking.lost_at = Some(Instant::now());
        Some(link)
    }

    pub(super) fn on_adopted(&mut self, outcome: Result<Booted, Verdict>) {
        self.linking.is_under_way = false;
        match outcome {
            // It may have been claimed meanwhile.
            _ if !matches!(self.phase, Phase::Ready | Phase::Connecting) => {}
            Ok(booted) => {
                tracing::info!(session = %self.cell.session, "a session is linked again");
                self.connect_again(booted);
            }
            Err(verdict) => self.on_verdict(verdict),
        }
    }

    /// An action got no answer.
    pub(super) fn on_unanswered(&mut self, settled: Settled, error: &LinkError) {
        match settled {
            Settled::Over { .. } | Settled::Again => {}
            Settled::Broken => self.lose_link(&error.to_string()),
            Settled::Hopeless => {
                tracing::warn!(session = %self.cell.session, %error, "a guest does not do what it is told");
                self.cut();
                self.diagnose(Verdict::Unreachable(SILENT));
            }
        }
    }

    /// The guest can't be heard any more: opens another link, if there is something to link.
    pub(super) fn lose_link(&mut self, why: &str) {
        if !matches!(self.phase, Phase::Connecting | Phase::Ready) {
            return;
        }
        let Some(link) = self.cut() else { return };
        tracing::info!(session = %self.cell.session, why, "a session's link is gone");
        if self.phase == Phase::Connecting {
            return self.diagnose(Verdict::Unreachable(SILENT));
        }
        self.link_again(Some(link));
    }

    /// Opens another link, once the last one is closed.
    pub(super) fn link_again(&mut self, last: Option<Link>) {
        let wait = self.linking.wait(Instant::now());
        let adoption = self.adoption(self.settings.start_timeout.min(GUEST_ANSWERS), SILENT);
        self.linking.is_under_way = true;
        self.start(async move {
            freezing::close(last).await;
            tokio::time::sleep(wait).await;
            Done::Adopted(adoption.adopt().await)
        });
    }
}

/// Whether this is a name as contexts give it to their kernels. What a guest says instead chooses nothing.
fn is_a_kernels(name: &str) -> bool {
    let parts = name.rsplit_once('n').and_then(|(context, n)| Some((context.parse().ok()?, n.parse().ok()?)));
    parts.is_some_and(|(context, n): (ContextId, u32)| format!("{context}n{n}") == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_name_of_ours_is_a_kernels() {
        let id = ContextId::from_uuid(uuid::Uuid::from_u128(5));
        assert!(is_a_kernels(&format!("{id}n12")));
        let upper = id.to_string().to_uppercase();
        let odd = ["n1", "../init", &format!("{id}"), &format!("{id}n"), &format!("{id}n01"), &format!("{id}n+1")];
        for name in
            odd.into_iter().chain([format!("{upper}n1").as_str(), &format!("{id}n1/signal"), &format!("{id}n1 ")])
        {
            assert!(!is_a_kernels(name), "{name}");
        }
    }
}
