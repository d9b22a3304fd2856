//! Waits for children, its own and orphans, as PID 1 must. Starts and ends nothing.
//!
//! The only waiter in the process: with another one (`tokio::process`, `Child::wait`) exits would be lost.

use std::collections::HashMap;
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
}

/// The exit of a process, once it is known.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// The reaper. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reaper {
    waiting: Arc<Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>>,
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
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(sender) = self.lock().remove(&pid.as_raw_nonzero().get()) {
                sender.send_replace(Some(Exit { status: status.exit_status(), signal: status.terminating_signal() }));
            }
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
