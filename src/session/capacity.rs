//! Who may have a session now, and who waits for one: ceilings on what is promised, and a line that is fair between tenants. Of sessions it knows
//! only what they need.
//!
//! A [`Place`] is a session's share of the machine, given back when it is dropped. Tenants take turns, each with the caller that waits
//! longest, so that many creates of one delay another's by one start at most. Nor can one fill the line: where it is full, whoever has fewer in it
//! takes the last place of whoever has most.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::domain::spec::{FieldError, MIB, Resources};
use crate::metrics::{Ceiling, Levels};

#[cfg(test)]
mod tests;

/// Ends of sessions that tell how long a place is waited for.
const SEEN_ENDS: usize = 16;
/// The longest wait that is advised, and the one that is where nothing has been seen yet.
const LONGEST_ADVICE: Duration = Duration::from_secs(60);
const FIRST_ADVICE: Duration = Duration::from_secs(5);

/// How much may be promised at once, and who may wait for it.
#[derive(Debug, Clone, Copy)]
pub struct Ceilings {
    /// Sessions that have a container, or will.
    pub sessions: usize,
    /// What all of them may use of CPUs, in thousandths; nothing: no ceiling.
    pub cpu_millis: Option<u64>,
    /// What all of them may use of memory; nothing: no ceiling.
    pub memory_bytes: Option<u64>,
    /// Sessions that start at the same time.
    pub starts: usize,
    /// Creates that may wait.
    pub waiting: usize,
    /// They wait for so long.
    pub patience: Duration,
}

/// What a session is promised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    cpu_millis: u64,
    memory_bytes: u64,
}

impl From<&Resources> for Need {
    fn from(resources: &Resources) -> Self {
        Self { cpu_millis: resources.cpu_millis.into(), memory_bytes: resources.memory_bytes }
    }
}

/// There is no place, and none within the time that a create may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    /// When there may be one, as far as the last ends tell.
    pub retry_after: Duration,
}

/// The machine's places. Clones are the same.
#[derive(Debug, Clone)]
pub struct Capacity(Arc<Mutex<Book>>, Arc<Notify>);

/// Somebody in the line. Whoever stops waiting lets those behind pass.
struct Waits<'a> {
    given: Option<oneshot::Receiver<Place>>,
    capacity: &'a Capacity,
}

impl Waits<'_> {
    async fn place(mut self) -> Option<Place> {
        match &mut self.given {
            Some(given) => given.await.ok(),
            None => None,
        }
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        drop(self.given.take());
        self.capacity.serve();
    }
}

/// A session's place.
#[derive(Debug)]
pub struct Place {
    capacity: Capacity,
    need: Need,
    is_starting: bool,
}

impl Place {
    /// Its session has started, or will not: another may.
    pub fn has_started(&mut self) {
        if std::mem::take(&mut self.is_starting) {
            self.capacity.book().starting -= 1;
            self.capacity.serve();
            self.capacity.1.notify_one();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.has_started();
        self.capacity.book().give_back(self.need, Instant::now());
        self.capacity.serve();
        self.capacity.1.notify_one();
    }
}

#[derive(Debug)]
struct Book {
    ceilings: Ceilings,
    sessions: usize,
    taken: Need,
    starting: usize,
    lines: HashMap<Arc<str>, VecDeque<Waiter>>,
    /// Tenants with somebody in their line, the next one first.
    turns: VecDeque<Arc<str>>,
    ends: VecDeque<Instant>,
}

#[derive(Debug)]
struct Waiter {
    need: Need,
    turn: oneshot::Sender<Place>,
}

impl Capacity {
    /// Nothing is taken.
    #[must_use]
    pub fn new(ceilings: Ceilings) -> Self {
        let book = Book {
            ceilings,
            sessions: 0,
            taken: Need::default(),
            starting: 0,
            lines: HashMap::new(),
            turns: VecDeque::new(),
            ends: VecDeque::new(),
        };
        Self(Arc::new(Mutex::new(book)), Arc::default())
    }

    /// Goes on with other ceilings. What is taken stays taken, whatever they are; who waits may have a place now.
    pub fn change(&self, ceilings: Ceilings) {
        self.book().ceilings = ceilings;
        self.serve();
        self.1.notify_one();
    }

    /// A place now, if nobody waits for one, or starts.
    #[must_use]
    pub fn spare_place(&self, need: Need) -> Option<Place> {
        let mut book = self.book();
        book.leave_out_the_gone();
        // Nor for a start, which real work has first.
        let is_free = book.turns.is_empty() && book.starting == 0 && book.fits(need);
        is_free.then(|| {
            book.take(need);
            book.starting += 1;
            Place { capacity: self.clone(), need, is_starting: true }
        })
    }

    /// How many sessions would have to end for all who wait, and one more, to have a place, if they are all like that one.
    #[must_use]
    pub fn short_of(&self, need: Need) -> usize {
        let mut book = self.book();
        book.leave_out_the_gone();
        let wanted = (book.waiting() + 1) as u64;
        let Ceilings { sessions, cpu_millis, memory_bytes, .. } = book.ceilings;
        let short = |taken: u64, each: u64, most: Option<u64>| {
            let over = most.map_or(0, |most| taken.saturating_add(wanted.saturating_mul(each)).saturating_sub(most));
            over.div_ceil(each.max(1))
        };
        let counts = [
            short(book.sessions as u64, 1, Some(sessions as u64)),
            short(book.taken.cpu_millis, need.cpu_millis, cpu_millis),
            short(book.taken.memory_bytes, need.memory_bytes, memory_bytes),
        ];
        usize::try_from(counts.into_iter().max().unwrap_or_default()).unwrap_or(usize::MAX)
    }

    /// What the one that is next waits for, if anybody does.
    #[must_use]
    pub fn awaited(&self) -> Option<Need> {
        let mut book = self.book();
        book.leave_out_the_gone();
        let tenant = book.turns.front()?;
        book.lines.get(tenant)?.front().map(|waiter| waiter.need)
    }

    /// Waits until a place was given back.
    pub async fn place_is_free(&self) {
        self.1.notified().await;
    }

    /// A place, now or when it is this tenant's turn. Whoever stops waiting leaves the line.
    ///
    /// # Errors
    /// When as many wait as may, or the wait was too long.
    pub async fn place(&self, tenant: &Arc<str>, need: Need) -> Result<Place, Full> {
        let (turn, given) = oneshot::channel();
        let patience = {
            let mut book = self.book();
            book.leave_out_the_gone();
            let is_full = book.waiting() >= book.ceilings.waiting && !(book.turns.is_empty() && book.fits(need));
            if is_full && !book.make_room_for(tenant) {
                return Err(book.full());
            }
            book.queue(tenant, Waiter { need, turn });
            book.ceilings.patience
        };
        self.serve();
        let waits = Waits { given: Some(given), capacity: self };
        match tokio::time::timeout(patience, waits.place()).await {
            Ok(Some(place)) => Ok(place),
            // The time is over, or somebody with fewer in the line has come.
            _ => Err(self.book().full()),
        }
    }

    /// How much is promised, and who waits.
    pub(super) fn look(&self, levels: &mut Levels) {
        let mut book = self.book();
        book.leave_out_the_gone();
        let Ceilings { sessions, cpu_millis, memory_bytes, .. } = book.ceilings;
        (levels.waiting, levels.starting) = (book.waiting(), book.starting);
        levels.places = Ceiling { promised: book.sessions as f64, most: Some(sessions as f64) };
        let cpus = |millis: u64| millis as f64 / 1000.0;
        levels.cpus = Ceiling { promised: cpus(book.taken.cpu_millis), most: cpu_millis.map(cpus) };
        let memory = book.taken.memory_bytes as f64;
        levels.memory = Ceiling { promised: memory, most: memory_bytes.map(|bytes| bytes as f64) };
    }

    /// Whether a session is not larger than all together may be.
    ///
    /// # Errors
    /// With the field that is too large, and the ceiling.
    pub fn can_ever_hold(&self, need: Need) -> Result<(), Vec<FieldError>> {
        let Ceilings { cpu_millis, memory_bytes, .. } = self.book().ceilings;
        let check = |field: &str, need: u64, most: Option<u64>, words: fn(u64) -> String| {
            let most = most.filter(|most| need > *most)?;
            let message =
                format!("{} is more than all sessions of this server may have together, {}", words(need), words(most));
            Some(FieldError::new(format!("/resources/{field}"), message))
        };
        let cpu = check("cpu", need.cpu_millis, cpu_millis, |millis| (millis as f64 / 1000.0).to_string());
        let memory = check("memory_mb", need.memory_bytes, memory_bytes, |bytes| (bytes / MIB).to_string());
        let errors: Vec<_> = cpu.into_iter().chain(memory).collect();
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// A place for a session that is there already, whatever the ceilings are now.
    #[must_use]
    pub fn place_of_a_session(&self, need: Need) -> Place {
        self.book().take(need);
        Place { capacity: self.clone(), need, is_starting: false }
    }

    /// Gives places to those whose turn it is, as far as there are any.
    fn serve(&self) {
        loop {
            let Some(Waiter { need, turn }) = self.book().next() else { return };
            // Who has just stopped waiting gives it back.
            drop(turn.send(Place { capacity: self.clone(), need, is_starting: true }));
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // Every change is whole between its statements that can panic, of which there are none.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn fits(&self, need: Need) -> bool {
        let Ceilings { sessions, cpu_millis, memory_bytes, starts, .. } = self.ceilings;
        let within =
            |taken: u64, more: u64, most: Option<u64>| most.is_none_or(|most| taken.saturating_add(more) <= most);
        self.sessions < sessions
            && self.starting < starts
            && within(self.taken.cpu_millis, need.cpu_millis, cpu_millis)
            && within(self.taken.memory_bytes, need.memory_bytes, memory_bytes)
    }

    fn take(&mut self, need: Need) {
        self.sessions += 1;
        self.taken.cpu_millis = self.taken.cpu_millis.saturating_add(need.cpu_millis);
        self.taken.memory_bytes = self.taken.memory_bytes.saturating_add(need.memory_bytes);
    }

    fn give_back(&mut self, need: Need, now: Instant) {
        self.sessions = self.sessions.saturating_sub(1);
        self.taken.cpu_millis = self.taken.cpu_millis.saturating_sub(need.cpu_millis);
        self.taken.memory_bytes = self.taken.memory_bytes.saturating_sub(need.memory_bytes);
        self.ends.push_back(now);
        if self.ends.len() > SEEN_ENDS {
            self.ends.pop_front();
        }
    }

    fn waiting(&self) -> usize {
        self.lines.values().map(VecDeque::len).sum()
    }

    fn queue(&mut self, tenant: &Arc<str>, waiter: Waiter) {
        if !self.lines.contains_key(tenant) {
            self.turns.push_back(Arc::clone(tenant));
        }
        self.lines.entry(Arc::clone(tenant)).or_default().push_back(waiter);
    }

    /// Puts the last one out of the longest line, if it is longer than the tenant's will be.
    fn make_room_for(&mut self, tenant: &Arc<str>) -> bool {
        let own = self.lines.get(tenant).map_or(0, VecDeque::len);
        let longest = self.lines.values_mut().max_by_key(|line| line.len());
        longest.filter(|line| line.len() > own + 1).and_then(VecDeque::pop_back).is_some()
    }

    fn leave_out_the_gone(&mut self) {
        // A tenant whose caller left had its turn, or callers who come and go could keep it for ever.
        let left = |line: &VecDeque<Waiter>| line.front().is_some_and(|waiter| waiter.turn.is_closed());
        if self.turns.front().and_then(|tenant| self.lines.get(tenant)).is_some_and(left) {
            self.turns.rotate_left(1);
        }
        self.lines.values_mut().for_each(|line| line.retain(|waiter| !waiter.turn.is_closed()));
        self.lines.retain(|_, line| !line.is_empty());
        let lines = &self.lines;
        self.turns.retain(|tenant| lines.contains_key(tenant));
    }

    /// Who is next, if there is room, which is then taken. A large one is not overtaken by smaller ones, or it would wait for ever.
    fn next(&mut self) -> Option<Waiter> {
        self.leave_out_the_gone();
        let tenant = self.turns.front()?.clone();
        let need = self.lines.get(&tenant)?.front()?.need;
        if !self.fits(need) {
            return None;
        }
        let line = self.lines.get_mut(&tenant)?;
        let waiter = line.pop_front()?;
        let is_last = line.is_empty();
        self.turns.pop_front();
        if is_last {
            self.lines.remove(&tenant);
        } else {
            self.turns.push_back(tenant);
        }
        self.take(need);
        self.starting += 1;
        Some(waiter)
    }

    fn full(&self) -> Full {
        let (first, last) = (self.ends.front(), self.ends.back());
        let retry_after = match (first, last) {
            (Some(first), Some(last)) if self.ends.len() > 1 => {
                let between = (*last - *first) / (self.ends.len() - 1) as u32;
                between.saturating_mul(self.waiting() as u32 + 1)
            }
            _ => FIRST_ADVICE,
        };
        Full { retry_after: retry_after.clamp(Duration::from_secs(1), LONGEST_ADVICE) }
    }
}
