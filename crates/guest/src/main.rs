//! Boots the guest: locks itself, then serves the link until its lease is over, or tries its confinement. Decides nothing else.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use cellblock_guest::api::Guest;
use cellblock_guest::cgroup::Cgroup;
use cellblock_guest::command::{Commands, tty};
use cellblock_guest::egress::Egress;
use cellblock_guest::events::Ring;
use cellblock_guest::files::resume::Resumable;
use cellblock_guest::kernel::{Kernels, Places};
use cellblock_guest::link::Link;
use cellblock_guest::reap::Reaper;
use cellblock_guest::{names, trial};
use cellblock_wire::link::{IPYKERNEL_LAUNCHER_PATH, STATE_DIR, WORKDIR};
use cellblock_wire::trial::TRIAL;
use rustix::fs::Mode;
use rustix::process::DumpableBehavior;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// The lease until `POST /init` sets it.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|mode| mode == tty::PROGRAM) {
        return tty::become_program(&std::env::args_os().skip(2).collect::<Vec<_>>());
    }
    // Before the guest closes itself, for afterwards this file belongs to root. User code runs much later.
    for lowest in ["-1000", "-500", "0"] {
        if std::fs::write("/proc/self/oom_score_adj", lowest).is_ok() {
            break;
        }
    }
    let locked = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    if let Err(errno) = locked {
        eprintln!("cellblock-guest: its memory can't be closed to others: {errno}");
        return ExitCode::FAILURE;
    }
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    if std::env::args().nth(1).as_deref() == Some(TRIAL) {
        return trial::run(&std::env::args().skip(2).collect::<Vec<_>>());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.and_then(|runtime| runtime.block_on(serve())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cellblock-guest: the link can't be served: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> std::io::Result<()> {
    // The first process of a cell gets no signal that it has no handler for, so there is none whose frames could pile up.
    if !rustix::process::getpid().is_init() {
        ignore_signals()?;
    }
    let places = places();
    let (ring, reaper, cgroup) = (Ring::default(), Reaper::default(), Cgroup::default());
    let commands = Commands::new(places.workdir.clone(), reaper.clone(), cgroup.clone());
    let kernels = Kernels::new(places.clone(), ring.clone(), reaper.clone(), cgroup.clone(), commands.clone());
    tokio::spawn(reaper.run());
    kernels.look_around().await;
    // Only a container's loopback is the guest's to speak on.
    if rustix::process::getpid().is_init() {
        tokio::spawn(names::serve());
    }
    let (orphan_timeout, _) = watch::channel(ORPHAN_TIMEOUT);
    let (uploads, egress) = (Resumable::default(), Egress::new(ring.clone()));
    Link::open(Guest { kernels, commands, ring, egress, cgroup, places, uploads, orphan_timeout })?.serve().await;
    Ok(())
}

/// No signal has a meaning here: code inside could send it.
fn ignore_signals() -> std::io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::quit()] {
        // Once it is listened to, its default is gone for good, whether anybody listens or not.
        drop(signal(kind)?);
    }
    Ok(())
}

/// Where things are; the tests put them elsewhere.
fn places() -> Places {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let mut next = |default: &str| arguments.next().unwrap_or_else(|| PathBuf::from(default));
    Places { workdir: next(WORKDIR), state: next(STATE_DIR), launcher: next(IPYKERNEL_LAUNCHER_PATH) }
}
