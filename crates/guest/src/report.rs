//! What the guest sees of its own confinement. Reads `/proc` and tries a few calls that are harmless if they succeed.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use cellblock_wire::link::{Mount, Report};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::{DumpableBehavior, PidfdFlags, PidfdGetfdFlags, Resource};

use crate::cgroup::Cgroup;

const MAX_READ: u64 = 1024 * 1024;
/// `AF_ALG` of `linux/socket.h`, which rustix has no name for.
const AF_ALG: u16 = 38;

/// A text file's content up to a limit, invalid UTF-8 replaced.
#[must_use]
pub fn read_bounded(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(MAX_READ).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Takes the report.
#[must_use]
pub fn take_report(cgroup: &Cgroup) -> Report {
    let limits = cgroup.limits();
    let mut report = Report {
        interfaces: interfaces(),
        mounts: mounts(&read_bounded(Path::new("/proc/self/mountinfo")).unwrap_or_default()),
        rlimits: rlimits(&read_bounded(Path::new("/proc/self/limits")).unwrap_or_default()),
        memory_limit_bytes: limits.memory_bytes,
        pids_limit: limits.pids,
        cpu_millis: limits.cpu_millis,
        is_init: std::process::id() == 1,
        undumpable: matches!(rustix::process::dumpable_behavior(), Ok(DumpableBehavior::NotDumpable)),
        probes: probes(),
        ..Report::default()
    };
    add_status(&mut report, &read_bounded(Path::new("/proc/self/status")).unwrap_or_default());
    // Kernels that show less in their files are asked.
    if report.rlimits.is_empty() {
        report.rlimits = asked_rlimits();
    }
    report.no_new_privs = report.no_new_privs.or_else(|| rustix::thread::no_new_privs().ok().map(u32::from));
    report
}

fn asked_rlimits() -> BTreeMap<String, (Option<u64>, Option<u64>)> {
    let ask = |(name, resource): (&str, Resource)| {
        let limit = rustix::process::getrlimit(resource);
        (name.to_owned(), (limit.current, limit.maximum))
    };
    [
        ("Max core file size", Resource::Core),
        ("Max open files", Resource::Nofile),
        ("Max file size", Resource::Fsize),
        ("Max locked memory", Resource::Memlock),
        ("Max msgqueue size", Resource::Msgqueue),
        ("Max pending signals", Resource::Sigpending),
    ]
    .map(ask)
    .into()
}

fn add_status(report: &mut Report, status: &str) {
    for line in status.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let numbers = || value.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        match name {
            "Uid" => report.uids = numbers(),
            "Gid" => report.gids = numbers(),
            "Groups" => report.groups = numbers(),
            "NoNewPrivs" => report.no_new_privs = value.trim().parse().ok(),
            "Seccomp" => report.seccomp = value.trim().parse().ok(),
            _ if name.starts_with("Cap") => {
                report
                    .capabilities
                    .extend(u64::from_str_radix(value.trim(), 16).ok().map(|set| (name.to_owned(), set)));
            }
            _ => {}
        }
    }
}

fn interfaces() -> Vec<String> {
    if let Ok(entries) = std::fs::read_dir("/sys/class/net") {
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names.filter(|name| name != "bonding_masters").collect();
        names.sort();
        return names;
    }
    let table = read_bounded(Path::new("/proc/net/dev")).unwrap_or_default();
    table.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect()
}

/// `proc_pid_mountinfo(5)`: `id parent dev root point options optional* - type source superoptions`.
pub(crate) fn mounts(mountinfo: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let (mut before, mut after) = (before.split(' ').skip(4), after.split(' '));
        let point = before.next()?.replace("\\040", " ");
        let fstype = after.next()?.to_owned();
        let options = before.next()?.split(',').chain(after.nth(1).unwrap_or_default().split(','));
        Some(Mount { point, fstype, options: options.filter(|o| !o.is_empty()).map(str::to_owned).collect() })
    };
    mountinfo.lines().filter_map(parse).collect()
}

fn rlimits(limits: &str) -> BTreeMap<String, (Option<u64>, Option<u64>)> {
    let parse = |line: &str| {
        let (name, values) = line.split_at_checked(26)?;
        let mut values = values.split_whitespace().map(|value| value.parse().ok());
        Some((name.trim().to_owned(), (values.next()?, values.next()?)))
    };
    limits.lines().skip(1).filter_map(parse).collect()
}

/// Calls that a locked cell refuses, by name, with their errno.
fn probes() -> BTreeMap<String, i32> {
    let families = [
        ("socket(AF_VSOCK)", AddressFamily::VSOCK, SocketType::STREAM),
        ("socket(AF_ALG)", AddressFamily::from_raw(AF_ALG), SocketType::SEQPACKET),
        ("socket(AF_PACKET)", AddressFamily::PACKET, SocketType::RAW),
        ("socket(AF_BLUETOOTH)", AddressFamily::BLUETOOTH, SocketType::RAW),
    ];
    let mut probes: BTreeMap<String, i32> = families
        .into_iter()
        .map(|(name, family, kind)| (name.to_owned(), errno(socket_with(family, kind, SocketFlags::CLOEXEC, None))))
        .collect();
    probes.insert("pidfd_getfd".to_owned(), errno(own_descriptor()));
    probes.insert(
        "open(/dev/mem)".to_owned(),
        std::fs::File::open("/dev/mem").map_or_else(|e| e.raw_os_error().unwrap_or(-1), |_| 0),
    );
    probes
}

fn own_descriptor() -> rustix::io::Result<rustix::fd::OwnedFd> {
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    rustix::process::pidfd_getfd(own, 0, PidfdGetfdFlags::empty())
}

fn errno<T>(result: rustix::io::Result<T>) -> i32 {
    result.map_or_else(|errno| errno.raw_os_error(), |_| 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let mounts = mounts("30 23 0:26 / /with\\040space ro,nosuid shared:1 - tmpfs tmpfs rw,size=64k\nbroken\n");
        assert_eq!(mounts.len(), 1);
        assert_eq!((mounts[0].point.as_str(), mounts[0].fstype.as_str()), ("/with space", "tmpfs"));
        assert_eq!(mounts[0].options, ["ro", "nosuid", "rw", "size=64k"]);
        let limits = rlimits(
            "Limit                     Soft Limit           Hard Limit           Units\nMax open files            1024                 unlimited            files\n",
        );
        assert_eq!(limits["Max open files"], (Some(1024), None));
        let mut report = Report::default();
        add_status(
            &mut report,
            "Uid:\t1\t2\t3\t4\nGroups:\t \nCapEff:\t00000000a80425fb\nNoNewPrivs:\t1\nSeccomp:\t2\n",
        );
        assert_eq!((report.uids, report.no_new_privs, report.seccomp), (vec![1, 2, 3, 4], Some(1), Some(2)));
        assert_eq!(report.capabilities["CapEff"], 0xa804_25fb);
    }

    #[test]
    fn a_report_of_this_process_is_filled() {
        let report = take_report(&Cgroup::default());
        assert_eq!((report.uids.len(), report.gids.len()), (4, 4));
        assert!(report.capabilities.contains_key("CapBnd") && report.rlimits.contains_key("Max open files"));
        let asked = asked_rlimits();
        assert!(asked.iter().all(|(name, limit)| report.rlimits.get(name) == Some(limit)), "{asked:?}");
        assert!(!report.mounts.is_empty() && !report.is_init && report.probes.contains_key("socket(AF_VSOCK)"));
    }
}
