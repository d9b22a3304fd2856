//! One command's life after its process was started: what it puts out, what is put in, its time limit and its end. One task for each.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::commands::{CommandEnd, CommandStream, EndedBy, StdinTaken};
use rustix::process::Signal;
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::log::Log;
use super::{Commands, Running};
use crate::effects::Neighbour;
use crate::kernel::Kernels;
use crate::kernel::tree::kill_strays;
use crate::reap::{Exit, ExitWatch, exited};

/// One read takes as much.
const READ: usize = 32 * 1024;
/// A command that puts out little at a time is read no more often than this, so that little costs no more than much.
const DRIBBLE: Duration = Duration::from_millis(1);
/// So much is no little: a terminal gives 4095 bytes at once at most.
const MUCH: usize = 1024;
/// How long what is on its way is read after the command's end: processes that it leaves behind may hold its output open.
const DRAIN: Duration = Duration::from_millis(300);
/// Its processes have this long to end by themselves, once they are told to.
const GRACE: Duration = Duration::from_secs(2);
/// How long its processes are killed again and again, as long as there are any.
const REAP: Duration = Duration::from_secs(3);
/// Time is counted in steps: the clock goes on while the cell is frozen, and that is no time of the command's.
const STEP: Duration = Duration::from_secs(5);
/// A command reads what is sent to it within this time, or what it did not read was not sent.
const STDIN_TIME: Duration = Duration::from_secs(5);
/// Longest time limit: more is none.
const FOREVER: Duration = Duration::from_secs(365 * 86_400);

/// A request to end a command with its processes, answered when that is done.
pub type Ending = oneshot::Sender<()>;

/// What is to be written to a command.
pub struct Input {
    /// The bytes.
    pub bytes: Bytes,
    /// Whether its stdin is at its end behind them.
    pub close: bool,
    /// Hears what was written.
    pub reply: oneshot::Sender<StdinTaken>,
}

/// What the task needs.
pub struct Life {
    /// Shared with the requests.
    pub running: Arc<Running>,
    /// Its output.
    pub outputs: Vec<(CommandStream, Receiver)>,
    /// Its process's exit.
    pub exit: ExitWatch,
    /// Its time limit.
    pub limit: Option<Duration>,
    /// All commands of the cell.
    pub commands: Commands,
    /// The kernels beside it.
    pub kernels: Kernels,
    /// They count it as long as it lives.
    pub _neighbour: Neighbour,
}

impl Life {
    /// Lives the command's life.
    pub async fn run(mut self, mut endings: mpsc::Receiver<Ending>) {
        let (over, is_over) = watch::channel(());
        let pumps: Vec<_> = std::mem::take(&mut self.outputs)
            .into_iter()
            .map(|(stream, output)| {
                let (log, left, over) = (self.running.log.clone(), self.commands.leftovers(), is_over.clone());
                tokio::spawn(pump(output, stream, log, over, left))
            })
            .collect();
        let mut left = self.limit.unwrap_or(FOREVER);
        let (by, ending) = loop {
            let (began, step) = (Instant::now(), left.min(STEP));
            tokio::select! {
                biased;
                _ = exited(&mut self.exit) => break (EndedBy::Itself, None),
                ending = endings.recv() => break (EndedBy::Request, ending),
                () = sleep(step) => left = left.saturating_sub(began.elapsed().min(step)),
            }
            if left.is_zero() {
                break (EndedBy::Timeout, None);
            }
        };
        if by != EndedBy::Itself {
            self.end_tree().await;
        }
        // One that even that has not ended is stuck in the machine's kernel, and ends when that lets go of it.
        let exit = exited(&mut self.exit).await;
        let drained = async {
            for pump in pumps {
                let _ = pump.await;
            }
        };
        let _ = timeout(DRAIN, drained).await;
        self.running.log.end(self.how_it_ended(exit, by));
        drop(over);
        self.commands.ended(&self.running.id);
        if let Some(ending) = ending {
            let _ = ending.send(());
        }
        // Requests that came meanwhile hear of the end by their answers being dropped.
    }

    fn how_it_ended(&self, exit: Exit, by: EndedBy) -> CommandEnd {
        let killed = exit.signal == Some(Signal::KILL.as_raw());
        CommandEnd {
            status: exit.status,
            signal: exit.signal,
            by: if self.running.is_swept() { EndedBy::Swept } else { by },
            cpu_usec: exit.usage.map(|usage| usage.cpu_usec),
            peak_memory_bytes: exit.usage.map(|usage| usage.peak_bytes),
            duration_ms: u64::try_from(self.running.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            oom: killed && by == EndedBy::Itself && self.commands.oom_kills() > self.running.oom_kills_before,
        }
    }

    /// Tells its processes to end, and kills those that do not.
    async fn end_tree(&mut self) {
        self.running.tree.signal(Signal::TERM);
        // Stopped ones hear nothing else.
        self.running.tree.signal(Signal::CONT);
        let _ = timeout(GRACE, exited(&mut self.exit)).await;
        let is_gone = self.exit.borrow().is_some();
        let tree = if is_gone { self.running.tree.orphaned() } else { self.running.tree.clone() };
        kill_all_of(|| tree.kill() || kill_strays(&self.kernels.roots())).await;
    }
}

/// Kills until nothing is found, for a while.
pub async fn kill_all_of(kill: impl Fn() -> bool) {
    let began = Instant::now();
    while kill() && began.elapsed() < REAP {
        sleep(Duration::from_millis(2)).await;
    }
}

/// Reads a command's output as long as anybody holds it open, so that nobody who writes to it ever waits. After the command's end it is for
/// nobody, and read only if not too many others are.
async fn pump(
    output: Receiver,
    stream: CommandStream,
    log: Arc<Log>,
    over: watch::Receiver<()>,
    leftovers: Arc<Semaphore>,
) {
    let mut over = over;
    tokio::select! {
        biased;
        () = read_all(&output, |bytes| log.output(stream, bytes)) => return,
        _ = over.changed() => {}
    }
    if let Ok(_place) = leftovers.try_acquire_owned() {
        read_all(&output, |_| {}).await;
    }
}

async fn read_all(output: &Receiver, mut take: impl FnMut(&[u8])) {
    let mut before = Instant::now();
    loop {
        if output.readable().await.is_err() {
            return;
        }
        // On the stack, and not across a wait: there may be hundreds of these tasks.
        let read = {
            let mut buffer = [0_u8; READ];
            output.try_read(&mut buffer).inspect(|read| take(&buffer[..*read]))
        };
        let read = match read {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
            // A terminal that nobody has open any more says so.
            Err(_) => return,
        };
        if read < MUCH && before.elapsed() < DRIBBLE {
            sleep(DRIBBLE).await;
        } else {
            tokio::task::yield_now().await;
        }
        before = Instant::now();
    }
}

/// Writes what is sent to a command, in order, until its stdin is closed or it has ended.
pub async fn feed(stdin: Sender, mut inputs: mpsc::Receiver<Input>, mut exit: ExitWatch, is_terminal: bool) {
    loop {
        let input = tokio::select! {
            biased;
            _ = exited(&mut exit) => return,
            input = inputs.recv() => input,
        };
        let Some(Input { bytes, close, reply }) = input else { return };
        let mut written = 0;
        let all = async {
            while written < bytes.len() {
                if stdin.writable().await.is_err() {
                    return false;
                }
                match stdin.try_write(&bytes[written..]) {
                    Ok(wrote) => written += wrote,
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                    Err(_) => return false,
                }
            }
            true
        };
        let is_open = tokio::select! {
            _ = exited(&mut exit) => false,
            outcome = timeout(STDIN_TIME, all) => outcome.unwrap_or(true),
        };
        // A terminal has no end of its own to close.
        let closed = !is_open || (close && written == bytes.len() && !is_terminal);
        let _ = reply.send(StdinTaken { bytes: written as u64, closed });
        if closed {
            return;
        }
    }
}
