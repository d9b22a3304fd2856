//! The commands of the cell, by id: starting, following, input, signals, ending. Each lives in a task of its own ([`live`]).
//!
//! They are the guest's, not the control plane's: one that comes anew finds them as they are. Memory is bounded over all of them together; the oldest of
//! those that have ended are forgotten for new ones.

pub mod launch;
pub mod live;
pub mod log;
mod tell;
pub mod tty;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use cellblock_wire::commands::{CommandStream, CommandView, MAX_STDIN, Size, StartCommand, StdinTaken};
use futures_util::Stream;
use rustix::process::Signal;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use crate::api::Refused;
use crate::cgroup::Cgroup;
use crate::kernel::Kernels;
use crate::kernel::tree::{Tree, signal_group};
use crate::reap::{ExitWatch, Reaper};
use live::{Ending, Input, Life, feed, kill_all_of};
use log::{Budget, Keep, Log};
pub use tell::tell;

/// Commands that may run at once.
const MAX_LIVE: usize = 200;
/// Ended ones that are remembered.
const MAX_ENDED: usize = 256;
/// Memory of all their output. An ended one is forgotten when a new one needs its room.
const OUTPUT: usize = 16 * 1024 * 1024;
/// So much room is made for a new one, if there is anything to forget.
const ROOM: usize = 256 * 1024;
/// Outputs that are read after their commands' ends.
const LEFTOVERS: usize = 64;
/// Requests with input that wait for one command.
const MAX_INPUTS: usize = 8;
/// The same of its folder, and of its tag.
const MAX_CWD: usize = 256;
/// Longest command line that is remembered for people, in bytes: a list of all commands is one small answer.
const MAX_ARGV: usize = 1024;

/// A command, as its task and the requests about it share it.
pub struct Running {
    /// Its id.
    pub id: String,
    /// Its processes.
    pub tree: Tree,
    /// What it has put out.
    pub log: Arc<Log>,
    /// When it was started.
    pub began: Instant,
    /// How many processes of the cell had been ended for want of memory by then.
    pub oom_kills_before: u64,
    started_at: SystemTime,
    argv: Vec<String>,
    cwd: String,
    tag: Option<String>,
    terminal: Option<OwnedFd>,
    inputs: mpsc::Sender<Input>,
    endings: mpsc::Sender<Ending>,
    exit: ExitWatch,
    swept: AtomicBool,
}

impl Running {
    /// Whether it was ended together with a kernel.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.swept.load(Ordering::Relaxed)
    }

    fn is_alive(&self) -> bool {
        self.exit.borrow().is_none()
    }

    fn view(&self) -> CommandView {
        let (stdout, stderr, last_seq) = self.log.totals();
        let since = self.started_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        CommandView {
            id: self.id.clone(),
            argv: self.argv.clone(),
            cwd: self.cwd.clone(),
            tty: self.terminal.is_some(),
            tag: self.tag.clone(),
            pid: self.tree.pid,
            started_at_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            stdout,
            stderr,
            last_seq,
            end: self.log.ending(),
        }
    }
}

#[derive(Default)]
struct Table {
    all: HashMap<String, Arc<Running>>,
    /// Ids in the order of their starts.
    order: VecDeque<String>,
    /// Ids of those that have ended, in that order.
    ended: VecDeque<String>,
    env: BTreeMap<String, String>,
}

/// The commands. Cheap to clone.
#[derive(Clone)]
pub struct Commands {
    table: Arc<Mutex<Table>>,
    workdir: Arc<PathBuf>,
    reaper: Reaper,
    cgroup: Cgroup,
    budget: Budget,
    leftovers: Arc<Semaphore>,
}

impl Commands {
    /// No commands yet.
    #[must_use]
    pub fn new(workdir: PathBuf, reaper: Reaper, cgroup: Cgroup) -> Self {
        let (budget, leftovers) = (Budget::new(OUTPUT), Arc::new(Semaphore::new(LEFTOVERS)));
        Self { table: Arc::default(), workdir: Arc::new(workdir), reaper, cgroup, budget, leftovers }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the environment of all commands that are started from now on.
    pub fn set_env(&self, env: BTreeMap<String, String>) {
        self.lock().env = env;
    }

    fn find(&self, id: &str) -> Result<Arc<Running>, Refused> {
        self.lock().all.get(id).cloned().ok_or_else(|| Refused::not_found("command"))
    }

    /// Starts a command; one that was started before, where that answer was perhaps not heard, is left as it is.
    ///
    /// # Errors
    /// When the request will not do, there are as many as may be, or the process can't be started.
    pub fn start(&self, request: &StartCommand, input: Bytes, kernels: &Kernels) -> Result<CommandView, Refused> {
        if let Some(known) = self.lock().all.get(&request.id) {
            return Ok(known.view());
        }
        self.check(request, &input)?;
        self.make_room(input.len());
        let argv = launch::argv(request);
        let cwd = launch::folder(request, &self.workdir)?;
        if !self.budget.take(input.len()) {
            return Err(Refused::busy("the output of other commands leaves no room for what is to be on its stdin"));
        }
        let held = Held { budget: self.budget.clone(), bytes: input.len() };
        let needs_stdin = request.stdin || !input.is_empty();
        let env = self.lock().env.clone();
        let oom_kills_before = self.cgroup.oom_kills();
        let launched = launch::start(request, &argv, &cwd, &env, needs_stdin)?;
        let exit = self.reaper.watch_usage(launched.tree.pid);
        let keep: fn(u64) -> Keep = if request.tty.is_some() { Keep::End } else { Keep::HeadAndTail };
        let (inputs, to_write) = mpsc::channel(MAX_INPUTS);
        let (endings, to_end) = mpsc::channel(1);
        let running = Arc::new(Running {
            id: request.id.clone(),
            log: Arc::new(Log::new(keep(request.text_bytes), self.budget.clone())),
            began: Instant::now(),
            oom_kills_before,
            started_at: SystemTime::now(),
            argv: cut(argv),
            cwd: cut_to(cwd.to_string_lossy().into_owned(), MAX_CWD),
            tag: request.tag.clone().map(|tag| cut_to(tag, MAX_CWD)),
            terminal: launched.terminal,
            inputs,
            endings,
            exit: exit.clone(),
            swept: AtomicBool::new(false),
            tree: launched.tree,
        });
        running.log.started(running.tree.pid);
        if let Some(stdin) = launched.stdin {
            let is_terminal = running.terminal.is_some();
            begin_input(&running.inputs, input, !request.stdin, held);
            tokio::spawn(feed(stdin, to_write, exit.clone(), is_terminal));
        }
        let mut table = self.lock();
        table.all.insert(running.id.clone(), Arc::clone(&running));
        table.order.push_back(running.id.clone());
        drop(table);
        let view = running.view();
        let outputs = [(CommandStream::Stdout, launched.stdout), (CommandStream::Stderr, launched.stderr)];
        let outputs = outputs.into_iter().filter_map(|(stream, output)| Some((stream, output?))).collect();
        let limit = request.timeout_ms.map(Duration::from_millis);
        let (commands, kernels) = (self.clone(), kernels.clone());
        let _neighbour = kernels.gets_neighbour();
        tokio::spawn(Life { running, outputs, exit, limit, commands, kernels, _neighbour }.run(to_end));
        Ok(view)
    }

    fn check(&self, request: &StartCommand, input: &Bytes) -> Result<(), Refused> {
        let id = &request.id;
        let fits = (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let has_zero = |text: &String| text.contains('\0');
        if !fits {
            Err(Refused::invalid("a command's id is 1 to 64 lower-case letters and digits"))
        } else if input.len() > MAX_STDIN {
            Err(Refused::invalid("what is to be on its stdin is too long"))
        } else if request.argv.iter().chain(&request.shell).chain(&request.cwd).any(has_zero) {
            Err(Refused::invalid("no argument holds a zero byte"))
        } else if self.lock().live() >= MAX_LIVE {
            Err(Refused::busy(&format!("{MAX_LIVE} commands run in this session, which is all that may")))
        } else {
            Ok(())
        }
    }

    /// Forgets commands that have ended, oldest first, until there is room for another one's output.
    fn make_room(&self, more: usize) {
        let mut table = self.lock();
        while table.ended.len() > MAX_ENDED || self.budget.left() < ROOM + more {
            let Some(oldest) = table.ended.pop_front() else { return };
            table.all.remove(&oldest);
            table.order.retain(|id| *id != oldest);
        }
    }

    /// All that are known, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<CommandView> {
        let table = self.lock();
        table.order.iter().filter_map(|id| table.all.get(id)).map(|running| running.view()).collect()
    }

    /// A command as it is.
    ///
    /// # Errors
    /// When there is no such command.
    pub fn get(&self, id: &str) -> Result<CommandView, Refused> {
        Ok(self.find(id)?.view())
    }

    /// Frames of a command's events after a number; with `is_waiting` to its end, else to what there is.
    ///
    /// # Errors
    /// When there is no such command.
    pub fn follow(
        &self,
        id: &str,
        after: u64,
        is_waiting: bool,
    ) -> Result<impl Stream<Item = Bytes> + Send + use<>, Refused> {
        Ok(self.find(id)?.log.follow(after, is_waiting))
    }

    /// Writes to a command's stdin; says how much it took.
    ///
    /// # Errors
    /// When there is no such command, its stdin is closed, or too much waits for it.
    pub async fn write(&self, id: &str, bytes: Bytes, close: bool) -> Result<StdinTaken, Refused> {
        let running = self.find(id)?;
        let closed = || Refused::closed("its stdin is closed, or it has ended");
        let (reply, answer) = oneshot::channel();
        running.inputs.try_send(Input { bytes, close, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refused::busy("too much waits for this command to read it"),
            mpsc::error::TrySendError::Closed(_) => closed(),
        })?;
        drop(running);
        answer.await.map_err(|_| closed())
    }

    /// Signals a command's process group.
    ///
    /// # Errors
    /// When there is no such signal, no such command, or it has ended.
    pub fn signal(&self, id: &str, signal: &str) -> Result<(), Refused> {
        let signal = match signal {
            "SIGHUP" => Signal::HUP,
            "SIGINT" => Signal::INT,
            "SIGQUIT" => Signal::QUIT,
            "SIGKILL" => Signal::KILL,
            "SIGUSR1" => Signal::USR1,
            "SIGUSR2" => Signal::USR2,
            "SIGTERM" => Signal::TERM,
            "SIGCONT" => Signal::CONT,
            "SIGSTOP" => Signal::STOP,
            "SIGTSTP" => Signal::TSTP,
            "SIGWINCH" => Signal::WINCH,
            _ => return Err(Refused::invalid("there is no such signal here")),
        };
        let running = self.find(id)?;
        match running.is_alive() && signal_group(running.tree.pid, signal) {
            true => Ok(()),
            false => Err(Refused::closed("it has ended")),
        }
    }

    /// Gives a command's terminal another size.
    ///
    /// # Errors
    /// When there is no such command, or it has no terminal.
    pub fn resize(&self, id: &str, size: Size) -> Result<(), Refused> {
        let running = self.find(id)?;
        let Some(terminal) = &running.terminal else { return Err(Refused::closed("it has no terminal")) };
        tty::resize(terminal, size).map_err(|_| Refused::closed("its terminal is gone"))
    }

    /// Ends a command with all its processes, those that it has left behind too; answers once they are gone.
    ///
    /// # Errors
    /// When there is no such command.
    pub async fn end(&self, id: &str) -> Result<CommandView, Refused> {
        let running = self.find(id)?;
        let (done, is_done) = oneshot::channel();
        if running.log.ending().is_none() && running.endings.send(done).await.is_ok() {
            // Another request's end ends this wait as well.
            let _ = is_done.await;
        }
        let tree = running.tree.orphaned();
        kill_all_of(|| tree.kill()).await;
        Ok(running.view())
    }

    /// Processes of the commands that live.
    #[must_use]
    pub fn living_pids(&self) -> Vec<i32> {
        let table = self.lock();
        table.all.values().filter(|running| running.is_alive()).map(|running| running.tree.pid).collect()
    }

    /// Whether any is known, so that there may be processes of it.
    #[must_use]
    pub fn are_any(&self) -> bool {
        !self.lock().all.is_empty()
    }

    /// All are about to be ended with a kernel.
    pub fn sweep(&self) {
        let table = self.lock();
        table.all.values().filter(|running| running.is_alive()).for_each(|running| {
            running.swept.store(true, Ordering::Relaxed);
        });
    }

    fn ended(&self, id: &str) {
        self.lock().ended.push_back(id.to_owned());
        self.make_room(0);
    }

    fn oom_kills(&self) -> u64 {
        self.cgroup.oom_kills()
    }

    fn leftovers(&self) -> Arc<Semaphore> {
        Arc::clone(&self.leftovers)
    }
}

impl Table {
    fn live(&self) -> usize {
        self.all.len() - self.ended.len()
    }
}

/// Room for what is on its way to a command's stdin.
struct Held {
    budget: Budget,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.give(self.bytes);
    }
}

/// Sends what a command finds on its stdin when it starts. A command that reads slowly takes it all the same, as long as it lives.
fn begin_input(inputs: &mpsc::Sender<Input>, input: Bytes, close: bool, held: Held) {
    if input.is_empty() && !close {
        return;
    }
    let inputs = inputs.clone();
    tokio::spawn(async move {
        let mut rest = input;
        loop {
            let (reply, answer) = oneshot::channel();
            if inputs.send(Input { bytes: rest.clone(), close, reply }).await.is_err() {
                break;
            }
            let Ok(taken) = answer.await else { break };
            let taken_bytes = usize::try_from(taken.bytes).unwrap_or(usize::MAX).min(rest.len());
            let _ = rest.split_to(taken_bytes);
            if taken.closed || rest.is_empty() {
                break;
            }
        }
        drop(held);
    });
}

fn cut_to(mut text: String, limit: usize) -> String {
    text.truncate(text.floor_char_boundary(limit));
    text
}

/// A command line that is not too long to be remembered.
fn cut(argv: Vec<String>) -> Vec<String> {
    let mut left = MAX_ARGV;
    let mut kept = Vec::new();
    for mut argument in argv {
        if left == 0 {
            break;
        }
        argument = cut_to(argument, left);
        left -= argument.len();
        kept.push(argument);
    }
    kept
}
