//! Executions are opened and ended against a cell of made-up figures and real processes.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::files::Stamp;
use crate::kernel::tree::MARK;

/// A kernel that is a sleeping process, in a cell whose figures are files.
struct Cell {
    root: PathBuf,
    kernel: Child,
    others: Vec<Child>,
    account: Account,
}

impl Cell {
    fn new(name: &str) -> Self {
        let root = std::env::temp_dir().join(format!("cellblock-effects-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("work")).unwrap();
        fs::create_dir_all(root.join("cgroup")).unwrap();
        let kernel = sleep(&root, "1000");
        let tree = Tree::new(kernel.id() as i32, root.as_os_str());
        let cell = |account| Self { root: root.clone(), kernel, others: Vec::new(), account };
        let figure = |file: &str, text: &str| fs::write(root.join("cgroup").join(file), text).unwrap();
        figure("cpu.stat", "usage_usec 1000000\n");
        figure("pids.current", "4\n");
        figure("pids.events", "max 3\n");
        figure("memory.events", "oom 0\noom_kill 2\n");
        let mut meters = Meters::new(&Cgroup::at(&root.join("cgroup")), &root.join("work"));
        meters.folders.clear();
        cell(Account::open(Arc::new(meters), tree))
    }

    fn figure(&self, file: &str, text: &str) {
        fs::write(self.root.join("cgroup").join(file), text).unwrap();
    }

    fn start(&mut self, seconds: &str) -> i32 {
        self.others.push(sleep(&self.root, seconds));
        self.others.last().unwrap().id() as i32
    }

    async fn run(&self, id: &str, work: impl FnOnce()) -> Effects {
        self.account.sent(id, true);
        work();
        let mut told = self.account.replied(id).await;
        assert_eq!(told.len(), 1);
        let (told, effects) = told.remove(0);
        assert_eq!(told, id);
        effects
    }
}

/// Polls once.
async fn is_pending(future: std::pin::Pin<&mut impl Future>) -> bool {
    tokio::select! {
        biased;
        _ = future => false,
        () = std::future::ready(()) => true,
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        for child in self.others.iter_mut().chain([&mut self.kernel]) {
            let _ = (child.kill(), child.wait());
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn sleep(mark: &Path, seconds: &str) -> Child {
    let mut command = Command::new("sleep");
    let child = command.arg(seconds).env(MARK, mark).stdin(Stdio::null()).process_group(0).spawn().unwrap();
    // It runs before the system shows what it runs with.
    while fs::read(format!("/proc/{}/environ", child.id())).unwrap().is_empty() {
        std::thread::yield_now();
    }
    child
}

fn commands(effects: &Effects) -> Vec<&str> {
    effects.processes.iter().map(|process| process.command.as_str()).collect()
}

#[tokio::test]
async fn figures_that_rose_are_told_once_and_of_this_execution_only() {
    let cell = Cell::new("figures");
    let effects = cell
        .run("a", || {
            cell.figure("cpu.stat", "usage_usec 9000000\n");
            cell.figure("pids.events", "max 4\n");
            cell.figure("memory.events", "oom 1\noom_kill 3\n");
            fs::write(cell.root.join("work/new"), "x").unwrap();
        })
        .await;
    assert!(effects.pids_hit && effects.memory_hit && !effects.disk_hit && !effects.approximate);
    assert_eq!((effects.oom_kills, effects.files.len(), effects.files_omitted), (3, 1, 0));
    // The guest's own time is taken off.
    assert!((7_000_000..8_000_000).contains(&effects.cpu_usec.unwrap()), "{effects:?}");
    assert!(effects.peak_memory_bytes.unwrap() > 4096);
    assert!(cell.account.replied("a").await.is_empty(), "once");
    let quiet = cell.run("b", || ()).await;
    assert_eq!((quiet.cpu_usec, quiet.oom_kills, quiet.files), (Some(0), 3, vec![]));
    assert!(!quiet.pids_hit && !quiet.memory_hit && quiet.processes.is_empty());
}

#[tokio::test]
async fn processes_that_an_execution_left_are_told_by_it_and_by_no_later_one() {
    let mut cell = Cell::new("processes");
    cell.run("first", || ()).await;
    cell.account.sent("a", true);
    cell.start("1001");
    let told = cell.account.replied("a").await;
    assert_eq!(commands(&told[0].1), ["sleep 1001"]);
    cell.account.sent("b", true);
    for number in 0..MAX_PROCESSES + 3 {
        cell.start(&format!("2{number:03}"));
    }
    let told = cell.account.replied("b").await;
    assert_eq!((told[0].1.processes.len(), told[0].1.processes_omitted), (MAX_PROCESSES, 3));
    assert!(commands(&told[0].1).iter().all(|command| command.starts_with("sleep 2")));
    assert!(cell.run("c", || ()).await.processes.is_empty());
}

#[tokio::test]
async fn a_reply_ends_executions_whose_own_reply_was_lost() {
    let cell = Cell::new("lost");
    cell.account.sent("lost", true);
    cell.account.sent("probe", false);
    fs::write(cell.root.join("work/by-lost"), "x").unwrap();
    let told = cell.account.replied("probe").await;
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].0.as_str(), told[0].1.files.len()), ("lost", 1));
    assert!(cell.account.replied("lost").await.is_empty());
    assert!(cell.account.replied("unknown").await.is_empty());
}

#[tokio::test]
async fn what_waited_begins_when_what_was_before_it_ends() {
    let cell = Cell::new("queue");
    cell.account.sent("a", true);
    cell.account.sent("b", true);
    cell.figure("cpu.stat", "usage_usec 5000000\n");
    fs::write(cell.root.join("work/by-a"), "x").unwrap();
    assert_eq!(cell.account.replied("a").await[0].1.files.len(), 1);
    let told = cell.account.replied("b").await;
    assert_eq!((told[0].1.files.len(), told[0].1.cpu_usec), (0, Some(0)));
}

#[tokio::test]
async fn the_end_of_the_kernel_ends_all_and_the_oldest_has_done_it() {
    let mut cell = Cell::new("end");
    assert!(cell.account.last_look().is_none());
    assert!(cell.account.ended(None).await.is_empty());
    cell.account.sent("a", true);
    cell.account.sent("probe", false);
    cell.account.sent("b", true);
    let last = cell.account.last_look();
    cell.start("1001");
    cell.figure("memory.events", "oom 1\noom_kill 3\n");
    fs::write(cell.root.join("work/by-a"), "x").unwrap();
    let told = cell.account.ended(last.as_ref()).await;
    assert_eq!(told.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((told[0].1.files.len(), told[0].1.processes.len(), told[0].1.memory_hit), (1, 0, true));
    assert_eq!(told[1].1, Effects { oom_kills: 3, ..Effects::default() });
    assert!(cell.account.last_look().is_none() && cell.account.ended(last.as_ref()).await.is_empty());
}

#[tokio::test]
async fn a_reply_that_is_dropped_half_way_has_told_nothing() {
    let cell = Cell::new("half");
    cell.account.sent("a", true);
    for number in 0..3 {
        fs::write(cell.root.join(format!("work/{number}")), vec![0; 200_000]).unwrap();
    }
    {
        let replied = cell.account.replied("a");
        tokio::pin!(replied);
        assert!(is_pending(replied.as_mut()).await);
    }
    let told = cell.account.ended(cell.account.last_look().as_ref()).await;
    assert_eq!((told.len(), told[0].1.files.len()), (1, 3));
}

#[tokio::test]
async fn beside_another_kernel_figures_are_approximate() {
    let cell = Cell::new("beside");
    let other = Account::open(cell.account.meters.clone(), cell.account.tree.clone());
    assert!(cell.run("a", || other.close()).await.approximate);
    other.close();
    assert!(!cell.run("b", || ()).await.approximate);
}

#[tokio::test]
async fn open_executions_are_bounded_and_so_are_their_looks() {
    let cell = Cell::new("bounds");
    for number in 0..MAX_OPEN + 9 {
        let stamp = Stamp { size: number as u64, modified: 0, changed: 0, inode: 0 };
        cell.account.meters.files.uploaded([(std::path::PathBuf::from("up"), stamp)]);
        cell.account.sent(&number.to_string(), true);
    }
    let state = cell.account.lock();
    assert_eq!(state.open.len(), MAX_OPEN);
    let mut looks: Vec<_> =
        state.open.iter().filter_map(|open| Some(Arc::as_ptr(&open.baseline.as_ref()?.files.files))).collect();
    looks.dedup();
    assert_eq!(looks.len(), MAX_LOOKS);
}

#[test]
fn a_folder_is_full_without_blocks_or_inodes_and_never_without_bounds() {
    let mut stat = statvfs("/").unwrap();
    let mut full = |blocks, free_blocks, files, free_files| {
        (stat.f_frsize, stat.f_blocks, stat.f_bavail) = (4096, blocks, free_blocks);
        (stat.f_files, stat.f_favail) = (files, free_files);
        is_full(&stat)
    };
    assert!(full(10, 0, 10, 5) && full(10, 5, 10, 0));
    assert!(!full(10, 1, 10, 1) && !full(0, 0, 0, 0));
}

#[test]
fn the_newest_pid_is_the_last_number() {
    assert_eq!(newest_pid("0.25 0.11 0.69 3/124 23340\n"), Some(23340));
    assert_eq!((newest_pid("0.00 0.00 0.00 0/0 0"), newest_pid("")), (None, None));
}

/// Not a test of anything but time: `cargo test --release -p cellblock-guest --lib -- --ignored --nocapture cost`.
#[tokio::test]
#[ignore = "measures"]
async fn cost_of_an_execution_that_does_nothing() {
    let cell = Cell::new("cost");
    let mut meters = Meters::new(&Cgroup::default(), &cell.root.join("work"));
    // Processes of this machine come and go; those of a cell don't.
    meters.newest_pid = None;
    meters.pids = Cgroup::at(&cell.root.join("cgroup")).pids_gauge();
    let account = Account::open(Arc::new(meters), cell.account.tree.clone());
    let (mut sent, mut replied) = (std::time::Duration::ZERO, std::time::Duration::ZERO);
    let rounds = 2000;
    for number in 0..rounds {
        let began = std::time::Instant::now();
        account.sent(&number.to_string(), true);
        sent += began.elapsed();
        let began = std::time::Instant::now();
        account.replied(&number.to_string()).await;
        replied += began.elapsed();
    }
    println!("sent {:?}, replied {:?}", sent / rounds, replied / rounds);
}
