//! A kernel's or a command's processes: which they are, what they hold, and their end. Starts none.
//!
//! They are those below its own, and those with its mark in their environment. Code can hide from both; what has to be gone
//! for certain goes with everything else in the cell ([`kill_all`]).

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Marks the environment of a kernel and of what it starts, with the kernel's folder.
pub const MARK: &str = "CELLBLOCK_KERNEL";
/// Marks the environment of a command and of what it starts, with the command's id.
pub const COMMAND_MARK: &str = "CELLBLOCK_COMMAND";
const MAX_ENVIRON: u64 = 1 << 20;
/// Longest command line that is told, in bytes.
const MAX_COMMAND: usize = 256;
/// Looks that have to find nothing while nothing starts, for one may come as a process becomes another program and shows no environment.
const CALM_LOOKS: u32 = 2;
/// And those that have to where something starts during each: a look misses a process that has ended before it is read, and has left another.
const QUIET_LOOKS: u32 = 10;
/// Once this long has passed, what was found is killed, though looks may find more: the guest does nothing else meanwhile.
const HALT_TIME: Duration = Duration::from_millis(50);
/// Numbers of a line of `/proc/{pid}/stat` behind the command's name, see `proc_pid_stat(5)`.
const STAT_PARENT: usize = 1;
const STAT_STARTED: usize = 19;

/// A living process. A pid may be used again, but not with the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Its id inside the cell.
    pub pid: i32,
    /// When it was started, in hundredths of a second since the machine's boot.
    pub started: u64,
}

/// A kernel's or a command's process and all that is known to be of it.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Its process id, and its group's; 0 once that process is gone.
    pub pid: i32,
    mark: Vec<u8>,
}

/// Signals a kernel's group; false when it is gone.
#[must_use]
pub fn signal_group(pid: i32, signal: Signal) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| kill_process_group(pid, signal).is_ok())
}

/// Whether the guest is the first process, so that everything it sees is of the cell.
#[must_use]
pub fn is_init() -> bool {
    rustix::process::getpid().is_init()
}

/// Kills everything in the cell but the guest, and says whether there was anything. The machine's kernel does it in one go: nobody
/// escapes by forking. Outside of a cell it does nothing, for there it would end everything of the user's.
pub fn kill_all() -> bool {
    // Minus one, which is the group's number with its sign turned, is everybody but the caller and the first process.
    is_init() && kill_process_group(Pid::INIT, Signal::KILL).is_ok()
}

/// Kills what is of no kernel and no command any more: it has left its tree and cleared its environment, so nobody can say whose it was.
/// `roots` are the processes of those that live. Says whether there was anything. Outside of a cell it does nothing.
pub fn kill_strays(roots: &[i32]) -> bool {
    if !is_init() {
        return false;
    }
    let strays = strays(look_around(b"", |variable, _| is_any_mark(variable)), roots);
    for pid in strays.iter().filter_map(|member| Pid::from_raw(member.pid)) {
        let _ = kill_process(pid, Signal::KILL);
    }
    !strays.is_empty()
}

/// Whether a variable is the mark of a kernel or a command, whichever.
fn is_any_mark(variable: &[u8]) -> bool {
    let rest = |mark: &str| variable.strip_prefix(mark.as_bytes());
    [MARK, COMMAND_MARK].into_iter().filter_map(rest).any(|rest| rest.starts_with(b"="))
}

/// Those that are neither marked nor among `roots`, and not below any that is.
fn strays(seen: Vec<Seen>, roots: &[i32]) -> Vec<Member> {
    let found = with_descendants(&seen, |seen| seen.marked || roots.contains(&seen.member.pid));
    let own = std::process::id() as i32;
    seen.into_iter().map(|seen| seen.member).filter(|m| m.pid != own && !found.contains(&m.pid)).collect()
}

/// Ids of those that fulfil a condition, and of all below them.
fn with_descendants(seen: &[Seen], is_root: impl Fn(&Seen) -> bool) -> Vec<i32> {
    let mut found: Vec<i32> = seen.iter().filter(|seen| is_root(seen)).map(|seen| seen.member.pid).collect();
    let mut at = 0;
    while at < found.len() {
        let children = seen.iter().filter(|seen| seen.parent == found[at]).map(|seen| seen.member.pid);
        let new: Vec<i32> = children.filter(|child| !found.contains(child)).collect();
        found.extend(new);
        at += 1;
    }
    found
}

/// Everything alive that `/proc` shows. Marked is what has a variable in its environment that `is_mark`.
fn look_around(mark: &[u8], is_mark: impl Fn(&[u8], &[u8]) -> bool) -> Vec<Seen> {
    living(mark, is_mark).collect()
}

/// The same one by one, so that something can be done about each at once. All of one is read together: some live for milliseconds only.
fn living<'a>(mark: &'a [u8], is_mark: impl Fn(&[u8], &[u8]) -> bool + 'a) -> impl Iterator<Item = Seen> + 'a {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<i32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    // The newest first: what lives for a moment only is among them, and is gone once many others have been read.
    pids.sort_unstable_by_key(|pid| std::cmp::Reverse(*pid));
    let read = move |pid: i32| {
        let stat = read_start(pid, "stat", 4096)?;
        let stat = String::from_utf8_lossy(&stat);
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().take(STAT_STARTED + 1).collect();
        let parent = fields.get(STAT_PARENT)?.parse().ok()?;
        let started = fields.get(STAT_STARTED)?.parse().ok()?;
        let is_alive = !matches!(fields[0], "Z" | "X");
        let environ = read_start(pid, "environ", MAX_ENVIRON).unwrap_or_default();
        let marked = environ.split(|b| *b == 0).any(|variable| is_mark(variable, mark));
        is_alive.then_some(Seen { member: Member { pid, started }, parent, marked })
    };
    pids.into_iter().filter_map(read)
}

impl Tree {
    /// The tree of the kernel with this process and this mark.
    #[must_use]
    pub fn new(pid: i32, mark: &OsStr) -> Self {
        Self { pid, mark: [MARK.as_bytes(), b"=", mark.as_bytes()].concat() }
    }

    /// The tree of the command with this process and this id.
    #[must_use]
    pub fn of_command(pid: i32, id: &str) -> Self {
        Self { pid, mark: format!("{COMMAND_MARK}={id}").into_bytes() }
    }

    /// The same without its first process, which is gone: its number may be another's by now.
    #[must_use]
    pub fn orphaned(&self) -> Self {
        Self { pid: 0, ..self.clone() }
    }

    /// Kills its group and all living members, and says whether any were found. All are stopped first, for what is stopped starts nothing.
    /// There may be others where any were found.
    pub fn kill(&self) -> bool {
        let halted = self.halt();
        let _ = signal_group(self.pid, Signal::KILL);
        for pid in halted.iter().filter_map(|member| Pid::from_raw(member.pid)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        !halted.is_empty()
    }

    /// Stops each member as soon as it is seen, until looks find no other, for a while: code may start processes faster than they are looked through.
    fn halt(&self) -> Vec<Member> {
        let mut halted = Vec::new();
        look_until_quiet(last_started, || {
            let before = halted.len();
            self.look_and_halt(&mut halted);
            halted.len() > before
        });
        halted
    }

    fn look_and_halt(&self, halted: &mut Vec<Member>) {
        let own = std::process::id() as i32;
        let stop = |member: Member, halted: &mut Vec<Member>| {
            if member.pid != own && !halted.contains(&member) {
                let _ = Pid::from_raw(member.pid).map(|pid| kill_process(pid, Signal::STOP));
                halted.push(member);
            }
        };
        let mut others = Vec::new();
        for seen in living(&self.mark, |variable, mark| variable == mark) {
            match seen.marked || seen.member.pid == self.pid {
                true => stop(seen.member, halted),
                false => others.push(seen),
            }
        }
        let mut at = 0;
        while let Some(parent) = halted.get(at).map(|member| member.pid) {
            others.iter().filter(|seen| seen.parent == parent).for_each(|seen| stop(seen.member, halted));
            at += 1;
        }
    }

    /// Signals its group and all living members, and says whether any were found.
    pub fn signal(&self, signal: Signal) -> bool {
        let found = self.members();
        let _ = signal_group(self.pid, signal);
        for pid in found.iter().filter_map(|member| Pid::from_raw(member.pid)) {
            let _ = kill_process(pid, signal);
        }
        !found.is_empty()
    }

    /// The same where no other kernel lives: all living processes of the cell. Outside of a cell, only those that can be told.
    #[must_use]
    pub fn members_alone(&self) -> Vec<Member> {
        if !is_init() {
            return self.members();
        }
        let own = std::process::id() as i32;
        let seen = look_around(&self.mark, |_, _| true);
        seen.into_iter().map(|seen| seen.member).filter(|member| member.pid != own).collect()
    }

    /// Living processes below the kernel's, or with its mark in their environment; the kernel's own too.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        let seen = look_around(&self.mark, |variable, mark| variable == mark);
        let found = with_descendants(&seen, |seen| seen.marked || seen.member.pid == self.pid);
        let own = std::process::id() as i32;
        let is_member = |member: &Member| member.pid != own && found.contains(&member.pid);
        seen.into_iter().map(|seen| seen.member).filter(is_member).collect()
    }
}

/// Looks until looks find nothing new, or until it has taken long enough if any has found something. `started` says what has started last.
fn look_until_quiet<S: PartialEq>(started: impl Fn() -> Option<S>, mut look: impl FnMut() -> bool) {
    let began = Instant::now();
    let (mut quiet, mut calm, mut has_found) = (0, 0, false);
    while quiet < QUIET_LOOKS && calm < CALM_LOOKS && !(has_found && began.elapsed() >= HALT_TIME) {
        let before = started();
        let is_new = look();
        let is_calm = !is_new && before.is_some() && before == started();
        quiet = if is_new { 0 } else { quiet + 1 };
        calm = if is_calm { calm + 1 } else { 0 };
        has_found |= is_new;
    }
}

/// The number of the process or thread that the machine's kernel has started last in this PID namespace, see `proc_loadavg(5)`: while it
/// stays the same nothing starts. None where it is not told.
fn last_started() -> Option<i32> {
    let figures = std::fs::read_to_string("/proc/loadavg").ok()?;
    let last = figures.split_whitespace().next_back()?.parse().ok()?;
    (last > 0).then_some(last)
}

/// A process of the cell, whoever it is of.
struct Seen {
    member: Member,
    parent: i32,
    marked: bool,
}

fn read_start(pid: i32, name: &str, limit: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(format!("/proc/{pid}/{name}")).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The most memory that a living process held since [`forget_peak`], in bytes.
#[must_use]
pub fn peak(pid: i32) -> Option<u64> {
    let status = read_start(pid, "status", 4096)?;
    let line =
        String::from_utf8_lossy(&status).lines().find_map(|line| line.strip_prefix("VmHWM:").map(str::to_owned))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// Has the machine's kernel count a process's peak anew, where it can: `clear_refs` of `proc_pid_clear_refs(5)`.
pub fn forget_peak(pid: i32) {
    let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// A process's command line, for people: arguments with spaces between them, cut.
#[must_use]
pub fn command(pid: i32) -> Option<String> {
    let line = read_start(pid, "cmdline", MAX_COMMAND as u64 * 4)?;
    if line.is_empty() {
        let name = read_start(pid, "comm", 64)?;
        return Some(format!("[{}]", readable(&name)));
    }
    Some(readable(&line))
}

fn readable(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\0").or(line.strip_suffix(b"\n")).unwrap_or(line);
    let character = |c: char| match c {
        '\0' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    let mut text: String = String::from_utf8_lossy(line).chars().map(character).collect();
    text.truncate(text.floor_char_boundary(MAX_COMMAND));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    use rustix::fs::{OFlags, fcntl_setfl};

    #[test]
    fn command_lines_are_cut_and_made_readable() {
        assert_eq!(readable(b"sleep\0 10\0"), "sleep  10");
        assert_eq!(readable(b"a\x1b[31m\0\xff\0"), "a\u{fffd}[31m \u{fffd}");
        assert!(readable(&[0xe2; 2000]).len() <= MAX_COMMAND && readable("é".repeat(200).as_bytes()).len() == 256);
    }

    #[test]
    fn members_are_found_by_descent_and_by_mark() {
        let folder = format!("/none/{}", std::process::id());
        let shell = |script: &str, mark: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]).env(MARK, mark).stdout(Stdio::piped());
            command.spawn().unwrap()
        };
        let mut kernel = shell("env -i sleep 1000 & echo $!; wait", "/other");
        let mut marked = shell("echo $$; exec sleep 1001", &folder);
        let mut stranger = shell("echo $$; exec sleep 1002", "/other");
        let read = |child: &mut std::process::Child| {
            let mut line = String::new();
            let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
            std::io::BufRead::read_line(&mut out, &mut line).unwrap();
            line.trim().parse::<i32>().unwrap()
        };
        let below = read(&mut kernel);
        let (with_mark, other) = (read(&mut marked), read(&mut stranger));
        let tree = Tree::new(kernel.id() as i32, OsStr::new(&folder));
        let members = tree.members();
        let pids: Vec<i32> = members.iter().map(|member| member.pid).collect();
        assert!([tree.pid, below, with_mark].iter().all(|pid| pids.contains(pid)) && !pids.contains(&other));
        assert!(members.iter().all(|member| member.started > 0));
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        // It says its number as a shell, and becomes another program then.
        while command(other).unwrap() != "sleep 1002" {
            assert!(std::time::Instant::now() < end, "{:?}", command(other));
        }
        assert!(peak(tree.pid).unwrap() > 4096);
        forget_peak(tree.pid);
        while tree.kill() && std::time::Instant::now() < end {
            let _ = (kernel.try_wait(), marked.try_wait());
        }
        assert!(tree.members().is_empty() && stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    /// A process that ends as soon as it has left another like it. All hold the same pipe, in one group.
    struct Chain {
        first: i32,
        held: std::process::ChildStdout,
    }

    impl Chain {
        fn start(mark: &str) -> Self {
            let code = "import os\nos.setsid()\nwhile True:\n    if os.fork(): os._exit(0)";
            let mut first =
                Command::new("python3").args(["-c", code]).env(MARK, mark).stdout(Stdio::piped()).spawn().unwrap();
            let chain = Self { first: first.id() as i32, held: first.stdout.take().unwrap() };
            fcntl_setfl(&chain.held, OFlags::RDONLY | OFlags::NONBLOCK).unwrap();
            first.wait().unwrap();
            chain
        }

        /// Whether none is left: the pipe's other end is closed for good, which takes a killed process a moment.
        fn is_over_within(&self, time: Duration) -> bool {
            let end = Instant::now() + time;
            while rustix::io::read(&self.held, &mut [0; 1]) != Ok(0) {
                if Instant::now() > end {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            true
        }
    }

    impl Drop for Chain {
        fn drop(&mut self) {
            if !self.is_over_within(Duration::ZERO) {
                let _ = signal_group(self.first, Signal::KILL);
            }
        }
    }

    #[test]
    fn a_chain_whose_links_live_for_a_moment_only_is_ended() {
        let folder = format!("/chain/{}", std::process::id());
        let chain = Chain::start(&folder);
        assert!(!chain.is_over_within(Duration::ZERO));
        let tree = Tree::new(0, OsStr::new(&folder));
        let end = Instant::now() + Duration::from_secs(20);
        let mut kills = 0;
        while tree.kill() && Instant::now() < end {
            kills += 1;
        }
        assert!(chain.is_over_within(Duration::from_secs(5)) && tree.members().is_empty(), "{kills} kills");
    }

    #[test]
    fn looks_end_in_time_and_find_nothing_only_where_nothing_starts_or_many_have_looked() {
        let looks_with = |started: fn(u32) -> Option<u32>, is_new: fn(u32) -> bool| {
            let looks = std::cell::Cell::new(0);
            look_until_quiet(
                || started(looks.get()),
                || {
                    std::thread::sleep(HALT_TIME / 5);
                    looks.set(looks.get() + 1);
                    is_new(looks.get())
                },
            );
            looks.get()
        };
        let [calm, busy]: [fn(u32) -> Option<u32>; 2] = [|_| Some(7), Some];
        assert!((1..=5).contains(&looks_with(calm, |_| true)));
        assert_eq!(looks_with(calm, |_| false), CALM_LOOKS);
        assert_eq!(looks_with(busy, |_| false), QUIET_LOOKS);
        assert_eq!(looks_with(|_| None, |_| false), QUIET_LOOKS);
        assert_eq!(looks_with(|looks| Some(looks.min(3)), |_| false), 3 + CALM_LOOKS);
    }

    #[test]
    fn what_starts_is_told_by_its_number() {
        let before = last_started().unwrap();
        Command::new("true").status().unwrap();
        assert_ne!(last_started().unwrap(), before);
    }

    #[test]
    fn strays_are_below_no_kernel_and_bear_no_mark() {
        let seen = |pid, parent, marked| Seen { member: Member { pid, started: 1 }, parent, marked };
        let all = vec![
            seen(7, 1, false),
            seen(8, 7, false),
            seen(9, 1, true),
            seen(10, 9, false),
            seen(11, 1, false),
            seen(12, 11, false),
        ];
        let pids: Vec<i32> = strays(all, &[7]).into_iter().map(|member| member.pid).collect();
        assert_eq!(pids, [11, 12]);
        assert!(is_any_mark(b"CELLBLOCK_KERNEL=/x") && is_any_mark(b"CELLBLOCK_COMMAND=cmd1"));
        assert!(!is_any_mark(b"CELLBLOCK_COMMANDS=x") && !is_any_mark(b"X=CELLBLOCK_KERNEL="));
    }

    #[test]
    fn outside_of_a_cell_nobody_is_swept() {
        assert!(!is_init() && !kill_all() && !kill_strays(&[]));
    }
}
