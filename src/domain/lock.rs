//! Locks of a cell that some hosts or runtimes don't enforce, by the names that operators know them by. What is not among them can't be done without.

use std::fmt;

/// A lock that an operator may do without, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lock {
    /// The ceiling of memory.
    Memory,
    /// No swap beyond it.
    MemorySwap,
    /// The ceiling of processes and threads.
    Pids,
    /// The CPU quota.
    Cpu,
    /// Our filter of system calls.
    Seccomp,
    /// How many files a folder in memory may have.
    TmpfsInodes,
    /// `nosuid` and `nodev` on these folders.
    MountFlags,
}

impl Lock {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Memory, Self::MemorySwap, Self::Pids, Self::Cpu, Self::Seccomp, Self::TmpfsInodes, Self::MountFlags];

    /// Its name in `accept_unenforced`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::MemorySwap => "memory-swap",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
            Self::Seccomp => "seccomp",
            Self::TmpfsInodes => "tmpfs-inodes",
            Self::MountFlags => "mount-flags",
        }
    }
}

impl fmt::Display for Lock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Names as a configuration lists them: `"memory", "pids"`.
#[must_use]
pub fn quoted<'a>(locks: impl IntoIterator<Item = &'a Lock>) -> String {
    locks.into_iter().map(|lock| format!("\"{lock}\"")).collect::<Vec<_>>().join(", ")
}
