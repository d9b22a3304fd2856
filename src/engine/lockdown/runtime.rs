//! What each runtime enforces of a cell's locks, and how that is seen: the table that [`attest`](super::attest()) reads. Values only.
//!
//! | runtime | not enforced | seen otherwise |
//! |---|---|---|
//! | `runc` and others | | |
//! | gVisor | `pids`, `tmpfs-inodes`, `mount-flags`; without `--oci-seccomp` also `seccomp`; with `--ignore-cgroups` also `memory`, `memory-swap`, `cpu` | it has no ambient capabilities |
//!
//! gVisor's limits hold for its kernel, which is a process of the machine: where memory runs out the whole cell ends, and what the machine counts as processes
//! are not those inside. Measured with release 20221219; one that shows other things than these is refused by the attestation.

use std::collections::BTreeSet;

use crate::domain::lock::Lock;

/// Whose kernel serves a cell's calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// The machine's, or one of the same kind in a virtual machine.
    #[default]
    Linux,
    /// gVisor's.
    Gvisor,
}

/// A runtime as the engine knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Runtime {
    /// Whose kernel it has.
    pub kind: Kind,
    /// What the engine starts it with, if the engine says so.
    pub arguments: Option<Vec<String>>,
}

impl Runtime {
    /// A runtime by what the engine says of it: its name, its program, and its arguments. One without a program has its settings elsewhere.
    #[must_use]
    pub fn new(name: &str, program: Option<&str>, arguments: &[String]) -> Self {
        let is_gvisor =
            [name, program.unwrap_or_default()].iter().any(|word| word.contains("runsc") || word.contains("gvisor"));
        let kind = if is_gvisor { Kind::Gvisor } else { Kind::Linux };
        Self { kind, arguments: program.map(|_| arguments.to_vec()) }
    }

    /// What it does not enforce, whatever the host can.
    #[must_use]
    pub fn unenforced(&self) -> BTreeSet<Lock> {
        if self.kind == Kind::Linux {
            return BTreeSet::new();
        }
        let mut missing = BTreeSet::from([Lock::Pids, Lock::TmpfsInodes, Lock::MountFlags]);
        let has = |flag| self.arguments.as_ref().map(|arguments| is_set(arguments, flag));
        // What can't be known is taken for the worse.
        if !has("oci-seccomp").unwrap_or(false) {
            missing.insert(Lock::Seccomp);
        }
        if has("ignore-cgroups").unwrap_or(true) {
            missing.extend([Lock::Memory, Lock::MemorySwap, Lock::Cpu]);
        }
        missing
    }
}

/// Flags as Go reads them: one dash or two, alone or with a value. The last one counts.
fn is_set(arguments: &[String], flag: &str) -> bool {
    let given = |argument: &String| {
        let (name, value) = argument.strip_prefix('-')?.split_once('=').unwrap_or((&argument[1..], "true"));
        let is_meant = name.strip_prefix('-').unwrap_or(name) == flag;
        is_meant.then(|| ["1", "t", "T", "true", "TRUE", "True"].contains(&value))
    };
    arguments.iter().filter_map(given).next_back().unwrap_or(false)
}

/// How a cell is looked at: the kernel that it sees, and what its operator does without, for it is not enforced there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct View {
    /// Whose kernel it has.
    pub kind: Kind,
    /// What is not looked for.
    pub forgone: BTreeSet<Lock>,
}

impl View {
    /// Whether this lock must hold.
    #[must_use]
    pub fn requires(&self, lock: Lock) -> bool {
        !self.forgone.contains(&lock)
    }

    /// Whether something must hold of which an engine warns in these words that it does not.
    #[must_use]
    pub fn requires_despite(&self, warning: &str) -> bool {
        let warning = warning.to_lowercase();
        let warned = |word: &str| warning.contains(&format!("{word} limit capabilities"));
        let words = [(Lock::Memory, "memory"), (Lock::MemorySwap, "swap"), (Lock::Pids, "pids")];
        !words.into_iter().any(|(lock, word)| warned(word) && !self.requires(lock))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gvisor(arguments: &[&str]) -> BTreeSet<Lock> {
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        Runtime::new("runsc", Some("/usr/bin/runsc"), &arguments).unenforced()
    }

    #[test]
    fn a_runtime_is_known_by_its_name_or_its_program() {
        let kind = |name: &str, program: &str| Runtime::new(name, Some(program), &[]).kind;
        assert_eq!(kind("runc", "runc"), Kind::Linux);
        assert_eq!(kind("kata", "/usr/bin/kata-runtime"), Kind::Linux);
        assert_eq!(kind("strict", "/usr/local/bin/runsc"), Kind::Gvisor);
        let elsewhere = Runtime::new("runsc", None, &[]);
        assert_eq!(
            (elsewhere.kind, elsewhere.unenforced()),
            (Kind::Gvisor, Lock::ALL.into()),
            "nobody knows how it is set"
        );
    }

    #[test]
    fn a_warning_about_what_is_forgone_is_none() {
        let swap = "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap.";
        let pids =
            "Your kernel does not support PIDs limit capabilities or the cgroup is not mounted. PIDs limit discarded.";
        let requires = |warning, lock| View { forgone: [lock].into(), ..View::default() }.requires_despite(warning);
        assert!(View::default().requires_despite(swap) && !requires(swap, Lock::MemorySwap));
        assert!(requires(swap, Lock::Memory) && requires(swap, Lock::Pids) && !requires(pids, Lock::Pids));
        assert!(requires("Something else.", Lock::Pids));
    }

    #[test]
    fn arguments_decide_what_gvisor_enforces() {
        let always = [Lock::Pids, Lock::TmpfsInodes, Lock::MountFlags];
        assert_eq!(gvisor(&["--network=none", "--oci-seccomp"]), always.into());
        assert_eq!(gvisor(&["-oci-seccomp=true"]), always.into());
        assert!(gvisor(&["--oci-seccomp", "--oci-seccomp=false"]).contains(&Lock::Seccomp));
        assert!(gvisor(&["oci-seccomp"]).contains(&Lock::Seccomp));
        let without = gvisor(&["--oci-seccomp", "--ignore-cgroups"]);
        assert!([Lock::Memory, Lock::MemorySwap, Lock::Cpu].iter().all(|l| without.contains(l)));
        assert!(!gvisor(&["--ignore-cgroups=false"]).contains(&Lock::Memory));
    }
}
