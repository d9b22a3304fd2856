//! A kernel's or a command's processes: which they are, what they hold, and their end. Starts none.
//!
//! They are those below its own, and those with its mark in their environment. Code can hide from both; what has to be gone
//! for certain goes with everything else in the cell ([`kill_all`]).

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Marks the environment of a kernel and of what it starts, with the kernel's folder.
pub const MARK: &str = "CELLBLOCK_KERNEL";
/// Marks the environment of a command and of what it starts, with the command's id.
pub const COMMAND_MARK: &str = "CELLBLOCK_COMMAND";
const MAX_ENVIRON: u64 = 1 << 20;
/// Longest command line that is told, in bytes.
const MAX_COMMAND: usize = 256;
/// One look may miss a process that has ended just then, and has left another.
const QUIET_LOOKS: u32 = 2;
/// Most looks for processes that are to be stopped, before what was found is killed.
const MAX_LOOKS: u32 = 50;
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
    let read = move |entry: std::fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
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
    entries.filter_map(read)
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
        let own = std::process::id() as i32;
        let mut halted: Vec<Member> = Vec::new();
        let mut quiet = 0;
        for _ in 0..MAX_LOOKS {
            let before = halted.len();
            for Seen { member, parent, marked } in living(&self.mark, |variable, mark| variable == mark) {
                let is_ours = marked || member.pid == self.pid || halted.iter().any(|known| known.pid == parent);
                if is_ours && member.pid != own && !halted.contains(&member) {
                    let _ = Pid::from_raw(member.pid).map(|pid| kill_process(pid, Signal::STOP));
                    halted.push(member);
                }
            }
            quiet = if halted.len() > before { 0 } else { quiet + 1 };
            if quiet == QUIET_LOOKS {
                break;
            }
        }
        halted
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

    #[test]
    fn a_chain_whose_links_live_for_a_moment_only_is_ended() {
        let folder = format!("/chain/{}", std::process::id());
        let chain = "import os\nos.setsid()\nwhile True:\n    if os.fork(): os._exit(0)";
        let mut first = Command::new("python3").args(["-c", chain]).env(MARK, &folder).spawn().unwrap();
        first.wait().unwrap();
        let tree = Tree::new(0, OsStr::new(&folder));
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while tree.kill() && std::time::Instant::now() < end {}
        for look in 0..20 {
            assert_eq!(tree.members(), [], "look {look}");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
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
