//! Figures of the container's cgroup, versions 1 and 2, as the container sees them. Reads only; what is absent is `None`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cellblock_wire::link::Stats;

use crate::report::read_bounded;

/// Above this, a version 1 limit means none.
const UNLIMITED: u64 = 1 << 62;
/// So much of a gauge's file is read; what is looked for stands in its first lines.
const MAX_GAUGE: usize = 512;

/// The limits that a report tells.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
}

/// A cgroup file system.
#[derive(Debug, Clone)]
pub struct Cgroup {
    root: PathBuf,
}

impl Default for Cgroup {
    fn default() -> Self {
        Self { root: PathBuf::from("/sys/fs/cgroup") }
    }
}

impl Cgroup {
    /// A cgroup file system that is mounted elsewhere.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn text(&self, path: &str) -> Option<String> {
        read_bounded(&self.root.join(path))
    }

    fn number(&self, path: &str) -> Option<u64> {
        number(&self.text(path)?)
    }

    fn first_number(&self, paths: [&str; 2]) -> Option<u64> {
        paths.into_iter().find_map(|path| self.number(path))
    }

    fn field(&self, path: &str, name: &str) -> Option<u64> {
        named(&self.text(path)?, name)
    }

    /// Processes that the kernel has ended for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let v2 = self.field("memory.events", "oom_kill");
        v2.or_else(|| self.field("memory/memory.oom_control", "oom_kill")).unwrap_or(0)
    }

    /// Periods in which processes had to wait for their CPU quota.
    #[must_use]
    pub fn throttled(&self) -> Option<u64> {
        self.field("cpu.stat", "nr_throttled").or_else(|| self.field("cpu/cpu.stat", "nr_throttled"))
    }

    /// What is used now, but for the disk, of which a cgroup knows nothing.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let cpu_v1 = || Some(self.number("cpuacct/cpuacct.usage")? / 1000);
        Stats {
            memory_bytes: self.first_number(["memory.current", "memory/memory.usage_in_bytes"]),
            memory_peak_bytes: self.first_number(["memory.peak", "memory/memory.max_usage_in_bytes"]),
            cpu_usec: self.field("cpu.stat", "usage_usec").or_else(cpu_v1),
            pids: self.first_number(["pids.current", "pids/pids.current"]),
            oom_kills: self.oom_kills(),
            disk_bytes: None,
        }
    }

    /// What may be used.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let memory = self.first_number(["memory.max", "memory/memory.limit_in_bytes"]);
        Limits {
            memory_bytes: memory.filter(|limit| *limit < UNLIMITED),
            pids: self.first_number(["pids.max", "pids/pids.max"]),
            cpu_millis: self.cpu_millis(),
        }
    }

    /// Whether no process or thread can be started any more.
    #[must_use]
    pub fn is_full_of_processes(&self) -> bool {
        let used = self.first_number(["pids.current", "pids/pids.current"]);
        let limit = self.first_number(["pids.max", "pids/pids.max"]);
        used.zip(limit).is_some_and(|(used, limit)| used >= limit)
    }

    fn cpu_millis(&self) -> Option<u64> {
        let v2 = || {
            let text = self.text("cpu.max")?;
            let (quota, period) = text.trim().split_once(' ')?;
            Some((quota.parse::<u64>().ok()?, period.parse().ok()?))
        };
        let v1 = || Some((self.number("cpu/cpu.cfs_quota_us")?, self.number("cpu/cpu.cfs_period_us")?));
        let (quota, period) = v2().or_else(v1)?;
        quota.saturating_mul(1000).checked_div(period)
    }
}

/// Finds a figure in a file's text.
pub type Figure = fn(&str) -> Option<u64>;

/// One figure that is asked for again and again, from a file that is kept open.
#[derive(Debug)]
pub struct Gauge {
    file: File,
    figure: Figure,
}

impl Gauge {
    /// A gauge of this file; `None` where it does not show the figure.
    #[must_use]
    pub fn open(path: &Path, figure: Figure) -> Option<Self> {
        let gauge = Self { file: File::open(path).ok()?, figure };
        gauge.read().is_some().then_some(gauge)
    }

    /// The figure now.
    #[must_use]
    pub fn read(&self) -> Option<u64> {
        let mut text = [0; MAX_GAUGE];
        let read = self.file.read_at(&mut text, 0).ok()?;
        (self.figure)(std::str::from_utf8(&text[..read]).ok()?)
    }
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The number behind a word at a line's beginning.
fn named(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| number(line.strip_prefix(name)?.strip_prefix(' ')?))
}

impl Cgroup {
    fn gauge(&self, places: [(&str, Figure); 2]) -> Option<Gauge> {
        places.into_iter().find_map(|(path, figure)| Gauge::open(&self.root.join(path), figure))
    }

    /// CPU time used so far, in microseconds.
    #[must_use]
    pub fn cpu_gauge(&self) -> Option<Gauge> {
        let v1 = |text: &str| Some(number(text)? / 1000);
        self.gauge([("cpu.stat", |text| named(text, "usage_usec")), ("cpuacct/cpuacct.usage", v1)])
    }

    /// Processes and threads.
    #[must_use]
    pub fn pids_gauge(&self) -> Option<Gauge> {
        self.gauge([("pids.current", number), ("pids/pids.current", number)])
    }

    /// How often one more was refused.
    #[must_use]
    pub fn pids_hits_gauge(&self) -> Option<Gauge> {
        let hits = |text: &str| named(text, "max");
        self.gauge([("pids.events", hits), ("pids/pids.events", hits)])
    }

    /// How many were ended for want of memory.
    #[must_use]
    pub fn oom_gauge(&self) -> Option<Gauge> {
        let kills = |text: &str| named(text, "oom_kill");
        self.gauge([("memory.events", kills), ("memory/memory.oom_control", kills)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str, files: &[(&str, &str)]) -> Cgroup {
        let root = std::env::temp_dir().join(format!("cellblock-cgroup-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Cgroup::at(&root)
    }

    #[test]
    fn both_versions_are_understood_and_absence_too() {
        let v2 = tree(
            "v2",
            &[
                ("memory.current", "10\n"),
                ("memory.peak", "20\n"),
                ("memory.max", "max\n"),
                ("memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"),
                ("cpu.stat", "usage_usec 77\nuser_usec 1\n"),
                ("cpu.max", "150000 100000\n"),
                ("pids.current", "4\n"),
                ("pids.max", "128\n"),
            ],
        );
        let stats = v2.stats();
        assert_eq!(
            (stats.memory_bytes, stats.memory_peak_bytes, stats.cpu_usec, stats.pids, stats.oom_kills),
            (Some(10), Some(20), Some(77), Some(4), 2)
        );
        assert_eq!(v2.limits(), Limits { memory_bytes: None, pids: Some(128), cpu_millis: Some(1500) });
        let v1 = tree(
            "v1",
            &[
                ("memory/memory.usage_in_bytes", "10\n"),
                ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"),
                ("cpuacct/cpuacct.usage", "5000\n"),
                ("cpu/cpu.cfs_quota_us", "-1\n"),
                ("cpu/cpu.cfs_period_us", "100000\n"),
            ],
        );
        let stats = v1.stats();
        assert_eq!((stats.memory_bytes, stats.cpu_usec, stats.pids, stats.oom_kills), (Some(10), Some(5), None, 1));
        assert_eq!(v1.limits(), Limits::default());
        assert_eq!(Cgroup::at(Path::new("/nonexistent")).limits(), Limits::default());
        let _ = std::fs::remove_dir_all(v1.root);
        let _ = std::fs::remove_dir_all(v2.root);
    }
}
