//! What trials under one runtime mean: each lock held, is done without by name, or is broken. Pure.

use std::collections::BTreeSet;

use super::verdict::Check;
use crate::domain::lock::Lock;
use crate::engine::docker::trial::Found;

/// One finding for each lock, named with the runtime. `accepted` is what every template of this runtime does without.
pub(super) fn checks(runtime: &str, found: &Found, unenforced: &[Lock], accepted: &BTreeSet<Lock>) -> Vec<Check> {
    let judge = |(name, held, seen): (&str, bool, String)| {
        let full = format!("{name} ({runtime})");
        let lock = Lock::ALL.into_iter().find(|lock| lock.name() == name);
        match lock {
            _ if held => Check::ok(full, seen),
            Some(lock) if accepted.contains(&lock) => {
                Check::weak(full, format!("{seen}: the templates of this runtime accept it"))
            }
            _ => Check::broken(full, seen).with(remedy(name)),
        }
    };
    let tried = found.tried.iter().map(|tried| (tried.lock.as_str(), tried.held, tried.seen.clone()));
    let seen = tried.chain(identity(found, unenforced)).chain(swap(found, unenforced));
    let mut checks: Vec<_> = seen.map(judge).collect();
    checks.push(judge(flags(unenforced)));
    checks.push(judge(agreement(found)));
    checks
}

/// What the guest reports of itself.
fn identity(found: &Found, unenforced: &[Lock]) -> Vec<(&'static str, bool, String)> {
    let Some(report) = &found.report else { return vec![("report", false, "the guest reported nothing".to_owned())] };
    let filtered = report.seccomp == Some(2) && !unenforced.contains(&Lock::Seccomp);
    let refused: Vec<_> =
        report.probes.iter().filter(|(_, errno)| **errno != 0).map(|(call, _)| call.as_str()).collect();
    let capabilities: u64 = report.capabilities.values().fold(0, |all, set| all | set);
    vec![
        ("seccomp", filtered, format!("mode {}; refused: {}", report.seccomp.unwrap_or(0), refused.join(", "))),
        ("no-new-privileges", report.no_new_privs == Some(1), "setuid files give nothing".to_owned()),
        ("capabilities", capabilities == 0 && report.capabilities.len() >= 4, format!("{capabilities:#x} in all sets")),
        ("uid", !report.uids.is_empty() && !report.uids.contains(&0), format!("runs as {:?}", report.uids)),
    ]
}

fn swap(found: &Found, unenforced: &[Lock]) -> Option<(&'static str, bool, String)> {
    let memory = found.tried.iter().find(|tried| tried.lock == Lock::Memory.name())?;
    let swap = found.machine.as_ref().and_then(|machine| machine.swap_bytes);
    let seen = match swap {
        Some(0) => "the machine has no swap to try it with".to_owned(),
        Some(bytes) => format!("the machine has {bytes} bytes of swap, and memory beyond the limit did not go there"),
        None => "the machine does not tell of its swap".to_owned(),
    };
    // With swap about, a process that was not killed in time has used it.
    let held = !unenforced.contains(&Lock::MemorySwap) && (memory.held || swap == Some(0));
    Some((
        Lock::MemorySwap.name(),
        held,
        if held { seen } else { "memory beyond the limit may be swapped out".to_owned() },
    ))
}

fn flags(unenforced: &[Lock]) -> (&'static str, bool, String) {
    let held = !unenforced.contains(&Lock::MountFlags);
    let seen =
        if held { "folders in memory are nosuid and nodev" } else { "this runtime knows neither nosuid nor nodev" };
    (Lock::MountFlags.name(), held, seen.to_owned())
}

/// All that a session's container is compared with before anything runs in it.
fn agreement(found: &Found) -> (&'static str, bool, String) {
    match found.mismatches.as_slice() {
        [] if found.report.is_none() => ("attestation", false, "there is nothing to compare".to_owned()),
        [] => ("attestation", true, "engine and guest show what was asked for".to_owned()),
        all => ("attestation", false, all.join("; ")),
    }
}

fn remedy(lock: &str) -> &'static str {
    match lock {
        "memory" | "pids" | "cpu" => {
            "let the engine have this control group: cgroup v2 with its controllers delegated, and a runtime without --ignore-cgroups"
        }
        "memory-swap" => "boot with swapaccount=1, or turn swap off",
        "seccomp" => "use a kernel, an engine and a runtime with seccomp filters",
        "tmpfs-inodes" | "mount-flags" => "use a runtime that knows these mount options, such as runc",
        "network" | "read-only-root" | "no-new-privileges" | "capabilities" | "uid" | "tmpfs-size" => {
            "this runtime confines nobody: use another"
        }
        _ => "no session starts under this runtime: look what of the engine or its plugins changes containers",
    }
}

#[cfg(test)]
mod tests {
    use cellblock_wire::link::Report;
    use cellblock_wire::trial::{Machine, Tried};

    use super::*;
    use crate::doctor::verdict::Verdict;

    fn found() -> Found {
        let tried = |lock: &str| Tried { lock: lock.to_owned(), held: true, seen: "s".to_owned() };
        Found {
            tried: ["network", "read-only-root", "cpu", "tmpfs-size", "tmpfs-inodes", "pids", "memory"]
                .map(tried)
                .to_vec(),
            machine: Some(Machine { swap_bytes: Some(0), ..Machine::default() }),
            mismatches: Vec::new(),
            report: Some(Report {
                uids: vec![40_000; 4],
                capabilities: ["CapInh", "CapPrm", "CapEff", "CapBnd"].map(|set| (set.to_owned(), 0)).into(),
                no_new_privs: Some(1),
                seccomp: Some(2),
                ..Report::default()
            }),
        }
    }

    fn verdict_of(name: &str, found: &Found, unenforced: &[Lock], accepted: &[Lock]) -> Verdict {
        let checks = checks("r", found, unenforced, &accepted.iter().copied().collect());
        checks.iter().find(|check| check.name == format!("{name} (r)")).map(|check| check.verdict).expect("a check")
    }

    #[test]
    fn all_is_well_where_everything_held() {
        let checks = checks("r", &found(), &[], &BTreeSet::new());
        assert!(checks.iter().all(|check| check.verdict == Verdict::Ok), "{checks:?}");
        assert_eq!(checks.len(), 14, "{checks:?}");
    }

    #[test]
    fn a_lock_that_did_not_hold_is_broken_unless_it_is_accepted_and_can_be() {
        let mut open = found();
        open.tried.iter_mut().for_each(|tried| tried.held = false);
        assert_eq!(verdict_of("pids", &open, &[], &[]), Verdict::Broken);
        assert_eq!(verdict_of("pids", &open, &[], &[Lock::Pids]), Verdict::Weak);
        assert_eq!(verdict_of("network", &open, &[], &Lock::ALL), Verdict::Broken);
        assert_eq!(verdict_of("mount-flags", &open, &[Lock::MountFlags], &[]), Verdict::Broken);
        assert_eq!(verdict_of("mount-flags", &open, &[Lock::MountFlags], &Lock::ALL), Verdict::Weak);
    }

    #[test]
    fn what_the_guest_reports_is_judged() {
        type Change = fn(&mut Report);
        let changes: [(&str, Change); 4] = [
            ("seccomp", |r| r.seccomp = Some(0)),
            ("no-new-privileges", |r| r.no_new_privs = None),
            ("capabilities", |r| *r.capabilities.get_mut("CapBnd").expect("a set") = 1),
            ("uid", |r| r.uids[1] = 0),
        ];
        for (name, change) in changes {
            let mut open = found();
            change(open.report.as_mut().expect("a report"));
            assert_eq!(verdict_of(name, &open, &[], &[]), Verdict::Broken, "{name}");
        }
        let silent = Found { report: None, ..found() };
        assert_eq!(verdict_of("report", &silent, &[], &[]), Verdict::Broken);
        assert_eq!(verdict_of("attestation", &silent, &[], &[]), Verdict::Broken);
    }

    #[test]
    fn swap_is_judged_by_what_memory_did() {
        let mut swapping = found();
        swapping.machine = Some(Machine { swap_bytes: Some(1 << 30), ..Machine::default() });
        assert_eq!(verdict_of("memory-swap", &swapping, &[], &[]), Verdict::Ok);
        swapping.tried.last_mut().expect("memory").held = false;
        assert_eq!(verdict_of("memory-swap", &swapping, &[], &[]), Verdict::Broken);
        assert_eq!(verdict_of("memory-swap", &found(), &[Lock::MemorySwap], &[]), Verdict::Broken);
    }
}
