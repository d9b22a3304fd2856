//! What an execution has cost and changed: figures taken when it is sent, and again when the kernel has answered it.
//!
//! Measures only; when the result is told, and to whom, is decided elsewhere. All of it is what a hostile cell lets itself be seen as.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cellblock_wire::link::{Effects, Process};
use rustix::fs::{StatVfs, statvfs};
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::cgroup::{Cgroup, Gauge};
use crate::changes::{Files, Since};
use crate::kernel::tree::{Member, Tree, command, forget_peak, peak};

/// Requests whose reply is waited for; the oldest question is forgotten first.
const MAX_OPEN: usize = 256;
/// Executions that may each hold a look at the folder of their own; older ones share the next one's.
const MAX_LOOKS: usize = 8;
/// Most processes that are told; the rest is counted.
const MAX_PROCESSES: usize = 32;
/// Most processes whose memory is asked for.
const MAX_MEASURED: usize = 256;
/// Less free room than this is none.
const PAGE: u64 = 4096;
/// The machine's kernel tells programs when a process was started in units of this many nanoseconds.
const TICK: u64 = 10_000_000;
/// Where code can write, beside its working folder.
const SCRATCH: [&str; 2] = ["/tmp", "/dev/shm"];

/// What all kernels of the cell are measured with.
pub struct Meters {
    /// The working folder.
    pub files: Files,
    cpu: Option<Gauge>,
    pids: Option<Gauge>,
    pids_hits: Option<Gauge>,
    oom_kills: Option<Gauge>,
    newest_pid: Option<Gauge>,
    folders: Vec<PathBuf>,
    living: AtomicUsize,
}

/// Something beside kernels whose processes their figures may have in them, as long as this lives.
pub struct Neighbour(Arc<Meters>);

impl Neighbour {
    pub(crate) fn new(meters: &Arc<Meters>) -> Self {
        meters.living.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(meters))
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.0.living.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the meters show at a time. Times are microseconds.
#[derive(Debug, Clone, Copy, Default)]
struct Reading {
    cpu: Option<u64>,
    own_cpu: u64,
    pids: Option<u64>,
    pids_hits: u64,
    oom_kills: u64,
    newest_pid: Option<u64>,
    living: usize,
}

/// The last number of `/proc/loadavg`, see `proc_loadavg(5)`: it stays as long as neither a process nor a thread is started.
fn newest_pid(loadavg: &str) -> Option<u64> {
    loadavg.trim().rsplit(' ').next()?.parse().ok().filter(|pid| *pid > 0)
}

fn microseconds(time: Timespec) -> u64 {
    (time.tv_sec as u64).saturating_mul(1_000_000).saturating_add(time.tv_nsec as u64 / 1000)
}

impl Meters {
    /// The meters of a cell.
    #[must_use]
    pub fn new(cgroup: &Cgroup, workdir: &Path) -> Self {
        let scratch = SCRATCH.map(PathBuf::from);
        Self {
            files: Files::new(workdir),
            cpu: cgroup.cpu_gauge(),
            pids: cgroup.pids_gauge(),
            pids_hits: cgroup.pids_hits_gauge(),
            oom_kills: cgroup.oom_gauge(),
            newest_pid: Gauge::open(Path::new("/proc/loadavg"), newest_pid),
            folders: scratch.into_iter().chain([workdir.to_owned()]).collect(),
            living: AtomicUsize::new(0),
        }
    }

    fn read(&self) -> Reading {
        let read = |gauge: &Option<Gauge>| gauge.as_ref().and_then(Gauge::read);
        Reading {
            cpu: read(&self.cpu),
            own_cpu: microseconds(clock_gettime(ClockId::ProcessCPUTime)),
            pids: read(&self.pids),
            pids_hits: read(&self.pids_hits).unwrap_or(0),
            oom_kills: read(&self.oom_kills).unwrap_or(0),
            newest_pid: read(&self.newest_pid),
            living: self.living.load(Ordering::Relaxed),
        }
    }

    /// The folders that code can write to.
    #[must_use]
    pub fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    fn is_disk_full(&self) -> bool {
        self.folders.iter().any(|folder| statvfs(folder).is_ok_and(|stat| is_full(&stat)))
    }
}

/// A file system without a bound says that it has none of it at all.
fn is_full(stat: &StatVfs) -> bool {
    let no_room = stat.f_blocks > 0 && stat.f_bavail.saturating_mul(stat.f_frsize) < PAGE;
    no_room || (stat.f_files > 0 && stat.f_favail == 0)
}

/// How it was when an execution was sent.
#[derive(Clone)]
struct Baseline {
    reading: Reading,
    files: Since,
    /// In [`TICK`]s since the machine's boot.
    time: u64,
}

#[derive(Clone)]
struct Open {
    id: String,
    /// `None` for requests that run nothing, whose replies say all the same how far the kernel is.
    baseline: Option<Baseline>,
}

/// What was known of a kernel's processes when they were listed.
struct Listing {
    members: Vec<Member>,
    pids: Option<u64>,
    newest_pid: Option<u64>,
}

#[derive(Default)]
struct State {
    open: VecDeque<Open>,
    listing: Option<Listing>,
}

/// What one kernel's executions cost.
pub struct Account {
    meters: Arc<Meters>,
    tree: Tree,
    state: Mutex<State>,
    closed: AtomicBool,
}

/// A kernel as it was last seen alive.
pub struct LastLook {
    reading: Reading,
    peak: Option<u64>,
    disk_hit: bool,
}

impl Account {
    /// The account of a kernel that was just started.
    #[must_use]
    pub fn open(meters: Arc<Meters>, tree: Tree) -> Self {
        meters.living.fetch_add(1, Ordering::Relaxed);
        Self { meters, tree, state: Mutex::default(), closed: AtomicBool::new(false) }
    }

    /// The kernel is gone: it is no neighbour of others any more.
    pub fn close(&self) {
        if !self.closed.swap(true, Ordering::Relaxed) {
            self.meters.living.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a request on the kernel's shell, and of how things are if it is an execution.
    pub fn sent(&self, id: &str, is_execution: bool) {
        if is_execution {
            self.known_pids().into_iter().for_each(forget_peak);
        }
        let baseline = is_execution.then(|| self.baseline(self.meters.read()));
        let mut state = self.lock();
        if state.open.len() == MAX_OPEN {
            // What is known of an execution is not forgotten for a question.
            let oldest = state.open.iter().position(|open| open.baseline.is_none()).unwrap_or(0);
            state.open.remove(oldest);
        }
        state.open.push_back(Open { id: id.to_owned(), baseline });
        share_old_looks(&mut state.open);
    }

    fn baseline(&self, reading: Reading) -> Baseline {
        let time = clock_gettime(ClockId::Boottime);
        let time = (time.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(time.tv_nsec as u64);
        Baseline { reading, files: self.meters.files.since_now(), time: time / TICK }
    }

    /// The kernel's own process, and those that were known to be of it.
    fn known_pids(&self) -> Vec<i32> {
        let state = self.lock();
        let known = state.listing.iter().flat_map(|listing| &listing.members).map(|member| member.pid);
        std::iter::once(self.tree.pid).chain(known.filter(|pid| *pid != self.tree.pid)).take(MAX_MEASURED).collect()
    }

    /// Figures that the end of the kernel's processes takes away; `None` when no execution is open.
    #[must_use]
    pub fn last_look(&self) -> Option<LastLook> {
        let is_open = self.lock().open.iter().any(|open| open.baseline.is_some());
        is_open.then(|| self.look(self.meters.read()))
    }

    fn look(&self, reading: Reading) -> LastLook {
        LastLook { reading, peak: self.peak(), disk_hit: self.meters.is_disk_full() }
    }

    fn peak(&self) -> Option<u64> {
        let pids = self.known_pids();
        let own = peak(*pids.first()?)?;
        Some(pids[1..].iter().filter_map(|pid| peak(*pid)).fold(own, u64::saturating_add))
    }

    /// The kernel has answered a request on its shell: the effects of the execution, if it is one, and of any before it, whose
    /// replies are lost, for answers come in order. Dropped before it is done, it has done nothing.
    pub async fn replied(&self, id: &str) -> Vec<(String, Effects)> {
        let answered: Vec<Open> = {
            let state = self.lock();
            let Some(at) = state.open.iter().position(|open| open.id == id) else { return Vec::new() };
            state.open.range(..=at).cloned().collect()
        };
        let mut told = Vec::new();
        let mut reading = None;
        for Open { id, baseline } in &answered {
            let Some(baseline) = baseline else { continue };
            let reading = *reading.get_or_insert_with(|| self.meters.read());
            let (processes, processes_omitted) = self.processes_since(baseline, &reading);
            let effects = self.effects(baseline, &self.look(reading)).await;
            told.push((id.clone(), Effects { processes, processes_omitted, ..effects }));
        }
        let mut state = self.lock();
        let left = state.open.iter().position(|open| open.id == id).map_or(0, |at| at + 1);
        state.open.drain(..left);
        // What waited behind it begins now.
        if let Some(reading) = reading.filter(|_| !state.open.is_empty()) {
            let baseline = self.baseline(reading);
            state.open.iter_mut().filter_map(|open| open.baseline.as_mut()).for_each(|old| *old = baseline.clone());
        }
        told
    }

    /// The kernel has ended: the effects of the execution that was under way, which is the oldest, and those of others, which have
    /// done nothing. Dropped before it is done, it has done nothing.
    pub async fn ended(&self, last: Option<&LastLook>) -> Vec<(String, Effects)> {
        let oldest = self.lock().open.iter().find_map(|open| open.baseline.clone());
        let (Some(last), Some(oldest)) = (last, oldest) else { return Vec::new() };
        let mut effects = self.effects(&oldest, last).await;
        // The count of those that were killed may be later than the last look.
        let now = self.meters.read();
        effects.oom_kills = now.oom_kills;
        effects.memory_hit = now.oom_kills > oldest.reading.oom_kills;
        let open = std::mem::take(&mut self.lock().open);
        let ids = open.into_iter().filter(|open| open.baseline.is_some()).map(|open| open.id);
        let idle = Effects { oom_kills: effects.oom_kills, ..Effects::default() };
        ids.zip(std::iter::once(effects).chain(std::iter::repeat(idle))).collect()
    }

    async fn effects(&self, baseline: &Baseline, last: &LastLook) -> Effects {
        let (before, after) = (&baseline.reading, &last.reading);
        let changes = self.meters.files.changes(&baseline.files).await;
        let cpu = before.cpu.zip(after.cpu).map(|(before, after)| after.saturating_sub(before));
        let own_cpu = after.own_cpu.saturating_sub(before.own_cpu);
        Effects {
            files: changes.told,
            files_omitted: changes.omitted,
            cpu_usec: cpu.map(|cpu| cpu.saturating_sub(own_cpu)),
            peak_memory_bytes: last.peak,
            approximate: before.living > 1 || after.living > 1,
            pids_hit: after.pids_hits > before.pids_hits,
            disk_hit: last.disk_hit,
            memory_hit: after.oom_kills > before.oom_kills,
            oom_kills: after.oom_kills,
            ..Effects::default()
        }
    }

    /// Members of the kernel's tree that are younger than the baseline, and how many more there are.
    fn processes_since(&self, baseline: &Baseline, reading: &Reading) -> (Vec<Process>, u64) {
        let Some(known) = self.update_listing(reading) else { return (Vec::new(), 0) };
        let state = self.lock();
        let members = state.listing.iter().flat_map(|listing| &listing.members);
        let is_new = |member: &&Member| {
            member.pid != self.tree.pid && member.started >= baseline.time && !known.contains(*member)
        };
        let mut new: Vec<Member> = members.filter(is_new).copied().collect();
        drop(state);
        new.sort_unstable_by_key(|member| member.pid);
        let omitted = new.len().saturating_sub(MAX_PROCESSES);
        new.truncate(MAX_PROCESSES);
        // Without a command line it has ended meanwhile.
        let told = new.iter().filter_map(|member| Some(Process { pid: member.pid, command: command(member.pid)? }));
        (told.collect(), omitted as u64)
    }

    /// Lists the processes again and returns those that were known before; `None` when none can be new.
    fn update_listing(&self, reading: &Reading) -> Option<Vec<Member>> {
        let is_same = self.lock().listing.as_ref().is_some_and(|listing| {
            let knows_pids = reading.newest_pid.is_some() || reading.pids.is_some();
            knows_pids && reading.newest_pid == listing.newest_pid && reading.pids <= listing.pids
        });
        if is_same {
            return None;
        }
        // Alone in the cell, a kernel's processes are all there are, those that hide as well.
        let members = if reading.living == 1 { self.tree.members_alone() } else { self.tree.members() };
        let listing = Listing { members, pids: reading.pids, newest_pid: reading.newest_pid };
        let before = self.lock().listing.replace(listing);
        Some(before.map(|before| before.members).unwrap_or_default())
    }
}

/// A look may hold ten thousand paths, and so may each open execution.
fn share_old_looks(open: &mut VecDeque<Open>) {
    let mut looks = open.iter_mut().rev().filter_map(|open| open.baseline.as_mut()).skip(MAX_LOOKS - 1);
    let Some(newer) = looks.next() else { return };
    looks.for_each(|older| older.files.clone_from(&newer.files));
}

#[cfg(test)]
mod tests;
