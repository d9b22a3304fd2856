//! The kernels of the cell, by name: starting, messages, signals, deleting. Each lives in a task of its own ([`live`]).

pub mod channels;
pub mod launch;
pub mod live;
pub mod outbox;
pub mod relay;
pub mod spec;
pub mod tree;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::link::{Channel, KernelDeleted, KernelSpec, KernelStarted, Outbound, StartKernel};
use rustix::process::Signal;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::api::Refused;
use crate::cgroup::Cgroup;
use crate::changes::Files;
use crate::command::Commands;
use crate::effects::{Account, Meters, Neighbour};
use crate::events::Ring;
use crate::reap::Reaper;
use launch::Launch;
use live::{Deletion, Life, Shared};
use outbox::Port;
use spec::{FoundSpec, find_specs};
use tree::signal_group;

const MAX_KERNELS: usize = 32;
const MAX_NAMES: usize = 4096;
const MAX_CONNECT: Duration = Duration::from_secs(600);

/// Where things are.
#[derive(Debug, Clone)]
pub struct Places {
    /// The session's working folder.
    pub workdir: PathBuf,
    /// The folder of the kernels' folders.
    pub state: PathBuf,
    /// Our launcher for `ipykernel`.
    pub launcher: PathBuf,
}

struct Handle {
    shared: Arc<Shared>,
    pid: i32,
    deletions: mpsc::Sender<Deletion>,
    /// What its start was answered with.
    started: KernelStarted,
}

#[derive(Default)]
struct Table {
    kernels: HashMap<String, Handle>,
    used: HashSet<String>,
    env: BTreeMap<String, String>,
}

/// The kernels. Cheap to clone.
#[derive(Clone)]
pub struct Kernels {
    table: Arc<Mutex<Table>>,
    places: Arc<Places>,
    ring: Ring,
    reaper: Reaper,
    cgroup: Cgroup,
    meters: Arc<Meters>,
    commands: Commands,
}

impl Handle {
    fn is_alive(&self) -> bool {
        self.shared.exit.borrow().is_none() && !self.shared.is_swept()
    }
}

impl Kernels {
    /// No kernels yet.
    #[must_use]
    pub fn new(places: Places, ring: Ring, reaper: Reaper, cgroup: Cgroup, commands: Commands) -> Self {
        let meters = Arc::new(Meters::new(&cgroup, &places.workdir));
        Self { table: Arc::default(), places: Arc::new(places), ring, reaper, cgroup, meters, commands }
    }

    /// Looks at the working folder, so that what is there before the first kernel is nobody's change.
    pub async fn look_around(&self) {
        self.meters.files.look().await;
    }

    /// What is known of the working folder's files: callers' changes of it are to be told, lest they count as the code's.
    pub fn files(&self) -> &Files {
        &self.meters.files
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the environment of all kernels that are started from now on.
    pub fn set_env(&self, env: BTreeMap<String, String>) {
        self.lock().env = env;
    }

    /// What the image offers.
    #[must_use]
    pub fn specs(&self) -> Vec<KernelSpec> {
        let tell = |spec: FoundSpec| KernelSpec {
            name: spec.name,
            language: spec.json.language,
            display_name: spec.json.display_name,
            also: spec.json.metadata.cellblock.languages,
        };
        find_specs().into_iter().map(tell).collect()
    }

    /// The names of those that are there, which may be on their way out.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.lock().kernels.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    /// Starts a kernel's process and its task; one that was started before, where that answer was perhaps not heard, is left as it is.
    ///
    /// # Errors
    /// When the name or the kernelspec will not do, or the process can't be started.
    pub fn start(&self, request: &StartKernel) -> Result<KernelStarted, Refused> {
        let name = &request.kernel;
        if let Some(started) = self.lock().kernels.get(name).map(|handle| handle.started.clone()) {
            return Ok(started);
        }
        self.check_name(name)?;
        let wanted = request.kernelspec.as_deref();
        let Some(spec) = find_specs().into_iter().find(|spec| wanted.is_none_or(|name| spec.name == name)) else {
            return Err(Refused::no_kernelspec(wanted));
        };
        let init_env = self.lock().env.clone();
        let launch = Launch {
            kernel: name,
            spec: &spec,
            transport: spec.json.metadata.cellblock.transport.unwrap_or(request.transport),
            env: [&init_env, &spec.json.env, &request.env],
            cwd: request.cwd.as_deref().map_or(self.places.workdir.as_path(), std::path::Path::new),
            state: &self.places.state,
            launcher: &self.places.launcher,
        };
        launch::reopen(self.meters.folders());
        launch::clear(&self.places.state, |name| {
            name.to_str().is_some_and(|name| self.lock().kernels.contains_key(name))
        });
        let launched = launch.start().map_err(|error| Refused::spawn_failed(&error))?;
        let exit = self.reaper.watch(launched.tree.pid);
        let account = Account::open(self.meters.clone(), launched.tree.clone());
        let signer = launched.signer.clone();
        let shared = Shared::new(name.clone(), signer, self.ring.clone(), account, exit.clone());
        let shared = Arc::new(shared.with_late_output(spec.json.metadata.cellblock.late_output()));
        let (deletions, to_delete) = mpsc::channel(1);
        let FoundSpec { name: kernelspec, json, .. } = spec;
        let started = KernelStarted { kernelspec, language: json.language, display_name: json.display_name };
        let pid = launched.tree.pid;
        let handle = Handle { shared: shared.clone(), pid, deletions, started: started.clone() };
        let mut table = self.lock();
        table.kernels.insert(name.clone(), handle);
        table.used.insert(name.clone());
        drop(table);
        let deadline = Instant::now() + Duration::from_millis(request.connect_timeout_ms).min(MAX_CONNECT);
        let life = Life { shared, launched, exit, kernels: self.clone(), deadline };
        tokio::spawn(life.run(to_delete));
        Ok(started)
    }

    fn check_name(&self, name: &str) -> Result<(), Refused> {
        let fits = (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let table = self.lock();
        if !fits {
            Err(Refused::invalid("a kernel's name is 1 to 64 lower-case letters and digits"))
        } else if table.used.contains(name) {
            Err(Refused::exists("a kernel of this name was started before"))
        } else if table.kernels.len() >= MAX_KERNELS || table.used.len() >= MAX_NAMES {
            Err(Refused::busy("no more kernels can be started in this cell"))
        } else {
            Ok(())
        }
    }

    /// Queues a message to a kernel.
    ///
    /// # Errors
    /// When there is no such kernel, the message is none, its id was seen, or too much waits.
    pub fn send(&self, name: &str, head: &Outbound, parts: Vec<Bytes>) -> Result<(), Refused> {
        let port = match head.channel {
            Channel::Shell => Port::Shell,
            Channel::Stdin => Port::Stdin,
            Channel::Control => Port::Control,
            Channel::Iopub => return Err(Refused::invalid("nothing can be sent on iopub")),
        };
        if parts.len() < 4 || head.msg_id.is_empty() {
            return Err(Refused::invalid("a message has an id and at least four parts"));
        }
        let shared = self.lock().kernels.get(name).map(|handle| handle.shared.clone());
        let Some(shared) = shared else { return Err(Refused::not_found("kernel")) };
        let frames = shared.signer.frames(parts);
        shared.outbox.push(port, &head.msg_id, frames).map_err(|refused| match refused {
            outbox::Refused::Seen => Refused::exists("a message of this id was sent before"),
            outbox::Refused::Full => Refused::busy("too many messages to this kernel wait"),
            outbox::Refused::Closed => Refused::not_found("living kernel"),
        })?;
        shared.relay().sent(&head.msg_id, head.cap);
        // An interrupt; what a client asks on this channel is none.
        if port == Port::Control && !head.is_aside {
            shared.relay().rush(Instant::now().into_std());
        }
        if port == Port::Shell {
            shared.account.sent(&head.msg_id, head.cap.is_some() && !head.is_aside);
        }
        Ok(())
    }

    /// Signals a kernel's process group.
    ///
    /// # Errors
    /// When there is no such kernel or signal.
    pub fn signal(&self, name: &str, signal: &str) -> Result<(), Refused> {
        let signal = match signal {
            "SIGINT" => Signal::INT,
            "SIGTERM" => Signal::TERM,
            "SIGKILL" => Signal::KILL,
            _ => return Err(Refused::invalid("the signal is SIGINT, SIGTERM or SIGKILL")),
        };
        let table = self.lock();
        let alive = table.kernels.get(name).filter(|handle| handle.shared.exit.borrow().is_none());
        if let Some(handle) = alive {
            handle.shared.relay().rush(Instant::now().into_std());
        }
        match alive.is_some_and(|handle| signal_group(handle.pid, signal)) {
            true => Ok(()),
            false => Err(Refused::not_found("living kernel")),
        }
    }

    /// Ends a kernel and all that is known to be of it.
    ///
    /// # Errors
    /// When there is no such kernel.
    pub async fn delete(&self, name: &str) -> Result<KernelDeleted, Refused> {
        let deletions = self.lock().kernels.get(name).map(|handle| handle.deletions.clone());
        let Some(deletions) = deletions else { return Err(Refused::not_found("kernel")) };
        let (done, is_done) = oneshot::channel();
        // A second deletion waits for the first one's end: its answer is dropped with the task. All that the kernel has said has a number by then.
        let first = match deletions.send(done).await {
            Ok(()) => is_done.await.ok(),
            Err(_) => None,
        };
        Ok(first.unwrap_or_else(|| KernelDeleted { last_seq: self.ring.last_seq(), ..KernelDeleted::default() }))
    }

    /// Forgets a kernel that is gone.
    fn remove(&self, name: &str) {
        self.lock().kernels.remove(name);
    }

    /// Whether a kernel other than this one lives, or a command or what it has left behind may.
    fn has_others(&self, name: &str) -> bool {
        self.commands.are_any() || self.lock().kernels.iter().any(|(other, handle)| other != name && handle.is_alive())
    }

    /// A command is measured with what kernels are measured with, as long as it lives.
    pub(crate) fn gets_neighbour(&self) -> Neighbour {
        Neighbour::new(&self.meters)
    }

    /// Processes of the kernels that live.
    fn living_pids(&self) -> Vec<i32> {
        self.lock().kernels.values().filter(|handle| handle.is_alive()).map(|handle| handle.pid).collect()
    }

    /// Processes of the kernels and of the commands that live.
    pub(crate) fn roots(&self) -> Vec<i32> {
        [self.living_pids(), self.commands.living_pids()].concat()
    }

    /// All others, and all commands, are about to be ended with this one: marks them, and returns the kernels' names.
    fn sweep_others(&self, name: &str) -> Vec<String> {
        self.commands.sweep();
        let table = self.lock();
        let others = table.kernels.iter().filter(|(other, handle)| *other != name && handle.is_alive());
        let mut names: Vec<String> =
            others.inspect(|(_, other)| other.shared.sweep()).map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }
}
