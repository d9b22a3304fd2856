//! Waits for children, its own and orphans, as PID 1 must. Starts and ends nothing.
//!
//! The only waiter in the process: with another one (`tokio::process`, `Child::wait`) exits would be lost.

use std::collections::{BTreeSet, HashMap};
use std::os::unix::process::ExitStatusExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its exit status, if it exited.
    pub status: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// What it has used, where that was asked for and could be told.
    pub usage: Option<Usage>,
}

/// What a process has used, with those below it that it has waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in microseconds.
    pub cpu_usec: u64,
    /// The most memory that any one of them held, in bytes. The machine's kernel counts in what this process held when it started it.
    pub peak_bytes: u64,
}

/// Orphans that are reaped before those are looked at again whose usage is to be told.
const ORPHANS: usize = 32;

/// The exit of a process, once it is known.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// The reaper. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reaper {
    waiting: Arc<Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>>,
    measured: Arc<Mutex<BTreeSet<i32>>>,
}

impl Reaper {
    fn lock(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a child. To be called before the task that spawned it waits for anything, or its exit is missed.
    #[must_use]
    pub fn watch(&self, pid: i32) -> ExitWatch {
        let (sender, receiver) = watch::channel(None);
        self.lock().insert(pid, sender);
        receiver
    }

    /// The same for one whose usage is to be told with its exit.
    #[must_use]
    pub fn watch_usage(&self, pid: i32) -> ExitWatch {
        self.measured().insert(pid);
        self.watch(pid)
    }

    fn measured(&self) -> MutexGuard<'_, BTreeSet<i32>> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps for ever.
    ///
    /// # Errors
    /// When `SIGCHLD` can't be listened to.
    pub async fn run(self) -> std::io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.reap_all();
            children.recv().await;
        }
    }

    fn reap_all(&self) {
        loop {
            self.reap_measured();
            for _ in 0..ORPHANS {
                let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) else { return };
                let pid = pid.as_raw_nonzero().get();
                // One that is to be measured and has ended just now.
                self.measured().remove(&pid);
                let (status, signal) = (status.exit_status(), status.terminating_signal());
                self.tell(pid, Exit { status, signal, usage: None });
            }
        }
    }

    fn reap_measured(&self) {
        let mut ended = Vec::new();
        self.measured().retain(|pid| match wait4::try_wait4_pid(*pid as u32) {
            Ok(Some(used)) => {
                ended.push((*pid, used));
                false
            }
            Ok(None) => true,
            Err(_) => false,
        });
        for (pid, used) in ended {
            let cpu = used.rusage.utime + used.rusage.stime;
            let cpu_usec = u64::try_from(cpu.as_micros()).unwrap_or(u64::MAX);
            let usage = Some(Usage { cpu_usec, peak_bytes: used.rusage.maxrss });
            self.tell(pid, Exit { status: used.status.code(), signal: used.status.signal(), usage });
        }
    }

    fn tell(&self, pid: i32, exit: Exit) {
        if let Some(sender) = self.lock().remove(&pid) {
            sender.send_replace(Some(exit));
        }
    }
}

/// Waits for the exit.
pub async fn exited(watch: &mut ExitWatch) -> Exit {
    match watch.wait_for(Option::is_some).await.map(|exit| *exit) {
        Ok(Some(exit)) => exit,
        _ => std::future::pending().await,
    }
}
