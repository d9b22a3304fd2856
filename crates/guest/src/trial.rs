//! Tries the cell's locks from inside, for an operator: does what each should prevent, and tells on stdout how far it came. No code of a caller's ever
//! runs beside it. Judges nothing but whether a lock held.

use std::io::Write;
use std::net::UdpSocket;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use cellblock_wire::link::{GUEST_DIR, GUEST_PATH};
use cellblock_wire::trial::{Line, Machine, Step, TRIAL, Tried};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use crate::cgroup::Cgroup;
use crate::report::{mounts, read_bounded, take_report};

/// Nothing of a trial is left after this time, whoever waits for it or does not any more.
const LONGEST: Duration = Duration::from_secs(45);
/// How long the CPU is used.
const BUSY: Duration = Duration::from_millis(1000);
/// Written at one time, to disk or to memory.
const BLOCK: usize = 1 << 20;
/// The child that uses memory.
const TOUCH: &str = "touch";
/// Blocks and threads beyond a limit that prove that there is none.
const BEYOND: u64 = 64;
/// An address for documentation: nobody has it.
const NOWHERE: &str = "192.0.2.1:9";

/// Runs the step that the arguments name: `calm`, `pids LIMIT` or `memory LIMIT`, with what the lock should permit.
#[must_use]
pub fn run(arguments: &[String]) -> ExitCode {
    let mut arguments = arguments.iter().map(String::as_str);
    let (step, limits) = (arguments.next().unwrap_or_default(), arguments.filter_map(|a| a.parse().ok()));
    let limits: Vec<u64> = limits.collect();
    let limit = limits.first().copied().unwrap_or(0);
    if step == TOUCH {
        touch(limit);
        return ExitCode::SUCCESS;
    }
    let bounded = std::thread::Builder::new().spawn(|| {
        std::thread::sleep(LONGEST);
        std::process::exit(1);
    });
    if bounded.is_err() {
        return ExitCode::FAILURE;
    }
    match Step::ALL.into_iter().find(|known| known.name() == step) {
        Some(Step::Calm) => calm(&limits),
        Some(Step::Pids) => say(&Line::Tried(pids(limit))),
        Some(Step::Memory) => say(&Line::Tried(memory(limit))),
        None => return ExitCode::FAILURE,
    }
    ExitCode::SUCCESS
}

fn say(line: &Line) {
    // Nobody is there to be told that nobody listens.
    let text = serde_json::to_string(line).unwrap_or_default();
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

fn tried(lock: &str, held: bool, seen: impl Into<String>) -> Tried {
    Tried { lock: lock.to_owned(), held, seen: seen.into() }
}

/// `limits`: thousandths of a CPU, bytes of /tmp, inodes of /dev/shm.
fn calm(limits: &[u64]) {
    let limit = |n: usize| limits.get(n).copied().unwrap_or(0);
    let cgroup = Cgroup::default();
    say(&Line::Report(Box::new(take_report(&cgroup))));
    say(&Line::Machine(machine()));
    say(&Line::Tried(network()));
    say(&Line::Tried(root()));
    say(&Line::Tried(cpu(&cgroup, limit(0))));
    say(&Line::Tried(space(Path::new("/tmp"), limit(1))));
    say(&Line::Tried(inodes(Path::new("/dev/shm"), limit(2))));
}

fn machine() -> Machine {
    let text = |path: &str| read_bounded(Path::new(path)).unwrap_or_default();
    let swap = text("/proc/meminfo").lines().find_map(|line| {
        let (number, _) = line.strip_prefix("SwapTotal:")?.trim().split_once(' ')?;
        number.parse::<u64>().ok().map(|kib| kib * 1024)
    });
    let disk = rustix::fs::statvfs(GUEST_DIR).ok();
    Machine {
        kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
        uid_map: text("/proc/self/uid_map").split_whitespace().collect::<Vec<_>>().join(" "),
        swap_bytes: swap,
        disk_free_bytes: disk.as_ref().map_or(0, |d| d.f_bavail.saturating_mul(d.f_frsize)),
        disk_bytes: disk.as_ref().map_or(0, |d| d.f_blocks.saturating_mul(d.f_frsize)),
    }
}

fn network() -> Tried {
    let reached = UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect(NOWHERE));
    match reached {
        Ok(()) => tried("network", false, format!("there is a way to {NOWHERE}")),
        Err(error) => tried("network", true, format!("no way out: {error}")),
    }
}

fn root() -> Tried {
    let mounts = mounts(&read_bounded(Path::new("/proc/self/mountinfo")).unwrap_or_default());
    for folder in ["/", GUEST_DIR] {
        let path = Path::new(folder).join(".probe");
        let errno = std::fs::File::create(&path).err().and_then(|e| Errno::from_io_error(&e));
        let mount = mounts.iter().rev().find(|mount| mount.point == folder);
        let is_read_only = mount.is_some_and(|mount| mount.options.iter().any(|option| option == "ro"));
        // Permissions alone would not do, since a file of the image may be writable by anybody; but some kernels ask for them first.
        let held = errno == Some(Errno::ROFS) || (errno == Some(Errno::ACCESS) && is_read_only);
        if !held {
            let seen = errno.map_or_else(|| "a file could be made".to_owned(), |e| e.to_string());
            return tried("read-only-root", false, format!("{folder} is not mounted read-only: {seen}"));
        }
    }
    tried("read-only-root", true, "the root and the guest's folder can't be written")
}

fn cpu(cgroup: &Cgroup, millis: u64) -> Tried {
    let used = || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default();
    let (before, throttled, began) = (used(), cgroup.throttled(), Instant::now());
    while began.elapsed() < BUSY {
        std::hint::black_box((0..10_000u64).sum::<u64>());
    }
    let share = (used() - before).as_millis() as u64 * 1000 / began.elapsed().as_millis().max(1) as u64;
    let throttled = cgroup.throttled().unwrap_or(0).saturating_sub(throttled.unwrap_or(0));
    let seen = format!("{share} of 1000 of one CPU where {millis} are permitted; throttled {throttled} times");
    tried("cpu", quota_holds(share, throttled, millis), seen)
}

/// A busy machine gives less by itself, so throttling is the better sign. A period of the scheduler more or less is no matter.
fn quota_holds(share: u64, throttled: u64, permitted: u64) -> bool {
    throttled > 0 || share <= permitted + 150
}

fn space(folder: &Path, limit: u64) -> Tried {
    let path = folder.join("filled");
    let (block, most) = (vec![1; BLOCK], limit + BEYOND * BLOCK as u64);
    let filled = std::fs::File::create(&path).map(|mut file| {
        let mut written = 0;
        while written < most {
            match file.write(&block) {
                Ok(n) => written += n as u64,
                Err(error) => return (written, Some(error)),
            }
        }
        (written, None)
    });
    // It goes with the container otherwise.
    let _ = std::fs::remove_file(&path);
    match filled {
        Ok((written, Some(error))) if Errno::from_io_error(&error) == Some(Errno::NOSPC) => {
            tried("tmpfs-size", written <= limit, format!("full after {written} bytes where {limit} are permitted"))
        }
        Ok((written, Some(error))) => tried("tmpfs-size", false, format!("{error} after {written} bytes")),
        Ok((written, None)) => {
            tried("tmpfs-size", false, format!("{written} bytes were written where {limit} are permitted"))
        }
        Err(error) => tried("tmpfs-size", false, format!("no file could be made in {}: {error}", folder.display())),
    }
}

fn inodes(folder: &Path, limit: u64) -> Tried {
    let mut made = 0;
    let path = |n: u64| folder.join(format!("file-{n}"));
    let full = loop {
        match std::fs::File::create(path(made)) {
            Ok(_) if made > limit + BEYOND => break None,
            Ok(_) => made += 1,
            Err(error) => break Some(error),
        }
    };
    for n in 0..=made {
        // It goes with the container otherwise.
        let _ = std::fs::remove_file(path(n));
    }
    let held = full.as_ref().is_some_and(|e| Errno::from_io_error(e) == Some(Errno::NOSPC)) && made <= limit;
    tried("tmpfs-inodes", held, format!("{made} files were made where {limit} are permitted"))
}

fn pids(limit: u64) -> Tried {
    say(&Line::Begins);
    let mut started = 0;
    while started < limit + BEYOND {
        let thread = std::thread::Builder::new().stack_size(16 * 1024).spawn(|| std::thread::sleep(LONGEST));
        if let Err(error) = thread {
            return tried("pids", started <= limit, format!("{started} threads, then: {error}; {limit} are permitted"));
        }
        started += 1;
    }
    tried("pids", false, format!("{started} threads were started where {limit} are permitted"))
}

fn memory(limit: u64) -> Tried {
    say(&Line::Begins);
    let most = limit * 2;
    let mut child = Command::new(GUEST_PATH);
    child.args([TRIAL, TOUCH, &most.to_string()]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match child.status() {
        Ok(status) if status.signal() == Some(9) => {
            tried("memory", true, format!("a process that used more than {limit} bytes was killed"))
        }
        Ok(status) if status.success() => {
            tried("memory", false, format!("a process used {most} bytes where {limit} are permitted"))
        }
        Ok(status) => tried("memory", false, format!("the process that uses memory ended otherwise: {status}")),
        Err(error) => tried("memory", false, format!("a process that uses memory could not be started: {error}")),
    }
}

/// Has this many bytes in memory at once.
fn touch(bytes: u64) {
    let blocks: Vec<Vec<u8>> = (0..bytes / BLOCK as u64).map(|_| vec![1; BLOCK]).collect();
    std::hint::black_box(blocks);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_limit_is_told() {
        let folder = std::env::temp_dir().join(format!("trial-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (space, inodes) = (space(&folder, 1000), inodes(&folder, 3));
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(!space.held && !inodes.held, "{space:?} {inodes:?}");
    }

    #[test]
    fn a_cpu_without_a_quota_is_told() {
        assert!(!quota_holds(980, 0, 250));
        assert!(quota_holds(300, 0, 250) && quota_holds(980, 3, 250));
    }

    #[test]
    fn a_root_that_is_writable_is_told() {
        assert!(!root().held);
    }
}
