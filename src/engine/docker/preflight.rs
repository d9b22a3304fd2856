//! What the engine's machine can enforce, and the refusal to run cells where a lock would silently not hold.

use std::collections::BTreeSet;

use bollard::models::{SystemInfo, SystemInfoCgroupVersionEnum};

use super::super::{EngineError, EngineInfo};
use super::DockerSettings;
use crate::domain::lock::{Lock, quoted};
use crate::engine::lockdown::HostFacts;
use crate::engine::lockdown::runtime::{Runtime, View};

/// The largest uid inside that a usual range of remapped users has room for.
const LAST_REMAPPED_UID: u32 = 65_535;

/// What of the machine changes how cells are locked.
pub(super) fn host_facts(info: &SystemInfo) -> HostFacts {
    HostFacts {
        cgroup_v2: info.cgroup_version == Some(SystemInfoCgroupVersionEnum::_2),
        apparmor: has_security(info, "apparmor"),
        remapped_users: has_security(info, "userns") || has_security(info, "rootless"),
        uid_offset: u32::try_from(root_outside(info).0).unwrap_or(0),
    }
}

/// The uid and gid that root inside has outside. An engine that remaps users keeps its data in a folder of that name.
pub(super) fn root_outside(info: &SystemInfo) -> (u64, u64) {
    let folder = info.docker_root_dir.as_deref().filter(|_| has_security(info, "userns"));
    let ids = folder.and_then(|folder| folder.rsplit('/').next()?.split_once('.'));
    let ids = ids.and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    ids.unwrap_or((0, 0))
}

/// For people, and for the budget.
pub(super) fn engine_info(info: &SystemInfo) -> EngineInfo {
    EngineInfo {
        version: format!("Docker Engine {}", info.server_version.as_deref().unwrap_or("of unknown version")),
        cpus: info.ncpu.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        memory_bytes: info.mem_total.and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
    }
}

/// What an operator may do where no quota of workspaces is enforced.
pub const QUOTA_REMEDY: &str =
    "put the engine's data on xfs that is mounted with pquota, or do without: workspace.accept_unenforced = true";

/// A runtime that cells are to have, and what of it their operator does without.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Demand {
    /// Whose cells: a template's name.
    pub template: String,
    /// The runtime; the engine's default when empty.
    pub runtime: String,
    /// What need not be enforced.
    pub accepted: BTreeSet<Lock>,
    /// Its workspaces, where it has any that outlive cells.
    pub workspaces: Option<Quota>,
}

/// What workspaces are to have of their quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    /// All of it.
    Enforced,
    /// Nothing, where the engine does not enforce any.
    DoneWithout,
}

/// Refuses a machine where a limit would be dropped without an error, unless it is done without by name.
pub(super) fn check(info: &SystemInfo, settings: &DockerSettings) -> Result<(), EngineError> {
    let mut missing = missing(info, settings);
    let default = [Demand::default()];
    let demands = if settings.demands.is_empty() { &default[..] } else { &settings.demands };
    let unmet = |demand: &Demand| Some(format!("template \"{}\": {}", demand.template, unmet(info, demand)?));
    missing.extend(demands.iter().filter_map(unmet));
    if missing.is_empty() {
        return Ok(());
    }
    Err(unconfined(&missing))
}

/// A machine on which something does not hold.
pub(super) fn unconfined(missing: &[String]) -> EngineError {
    let detail = format!("it does not confine cells as the configuration says:\n  {}", missing.join("\n  "));
    EngineError::Rejected { attempt: "checking the engine", detail }
}

/// That a template's workspaces would have no quota, and what may be done about it. `why` is the engine's word.
pub(super) fn unmet_quota(template: &str, why: &str) -> String {
    format!("template \"{template}\": {}", no_quota(why))
}

/// The same of any template.
pub(super) fn no_quota(why: &str) -> String {
    format!("workspace.quota is not enforced here ({why}); {QUOTA_REMEDY}")
}

/// What nobody can do without.
pub(super) fn missing(info: &SystemInfo, settings: &DockerSettings) -> Vec<String> {
    let mut missing = Vec::new();
    let mut require = |holds: bool, what: &str| {
        if !holds {
            missing.push(format!("its machine has no {what}"));
        }
    };
    require(info.cpu_cfs_quota == Some(true), "CPU quotas");
    require(has_security(info, "seccomp"), "seccomp");
    require(info.os_type.as_deref() == Some("linux"), "Linux");
    if host_facts(info).remapped_users && *settings.uids.end() > LAST_REMAPPED_UID {
        missing.push(format!("uids above {LAST_REMAPPED_UID}: users are remapped, so set engine.uid_last lower"));
    }
    missing
}

/// Why a template's cells would not be confined, and what may be done about it.
pub(super) fn unmet(info: &SystemInfo, demand: &Demand) -> Option<String> {
    let Some(runtime) = runtime(info, &demand.runtime) else {
        let known = runtimes(info).join(", ");
        return Some(format!("the engine has no runtime \"{}\"; it has {known}", demand.runtime));
    };
    let lacking: BTreeSet<Lock> = unenforced(info, &runtime).difference(&demand.accepted).copied().collect();
    if lacking.is_empty() {
        return None;
    }
    let (name, all) = (runtime_name(info, &demand.runtime), quoted(&lacking));
    Some(format!(
        "{all} not enforced here by the runtime \"{name}\" and its machine; mend that, or do without: accept_unenforced = [{}]",
        quoted(lacking.union(&demand.accepted))
    ))
}

/// What of a cell's locks does not hold under a runtime of this engine.
pub(super) fn unenforced(info: &SystemInfo, runtime: &Runtime) -> BTreeSet<Lock> {
    let host = [(info.memory_limit, Lock::Memory), (info.swap_limit, Lock::MemorySwap), (info.pids_limit, Lock::Pids)];
    let host = host.into_iter().filter(|(holds, _)| *holds != Some(true)).map(|(_, lock)| lock);
    runtime.unenforced().into_iter().chain(host).collect()
}

/// How cells of a runtime are looked at: only what all their operators do without, and is not enforced, is not looked for.
pub(super) fn view(info: &SystemInfo, demands: &[Demand], name: &str) -> View {
    let Some(runtime) = runtime(info, name) else { return View::default() };
    let accepted = demands.iter().filter(|demand| demand.runtime == name).map(|demand| demand.accepted.clone());
    let accepted = accepted.reduce(|all, one| &all & &one).unwrap_or_default();
    View { kind: runtime.kind, forgone: &unenforced(info, &runtime) & &accepted }
}

/// A runtime that the engine knows.
pub(super) fn runtime(info: &SystemInfo, name: &str) -> Option<Runtime> {
    let name = runtime_name(info, name);
    match info.runtimes.as_ref().and_then(|known| known.get(name)) {
        Some(known) => {
            let arguments = known.runtime_args.clone().unwrap_or_default();
            Some(Runtime::new(name, known.path.as_deref().filter(|path| !path.is_empty()), &arguments))
        }
        // Engines that are not Docker's own tell of none.
        None => info.runtimes.is_none().then(|| Runtime::new(name, None, &[])),
    }
}

/// The engine's default has a name, too.
pub(super) fn runtime_name<'a>(info: &'a SystemInfo, name: &'a str) -> &'a str {
    match (name, info.default_runtime.as_deref()) {
        ("", default) => default.unwrap_or("runc"),
        (name, _) => name,
    }
}

/// Names of the runtimes that the engine knows, sorted.
pub(super) fn runtimes(info: &SystemInfo) -> Vec<String> {
    let mut names: Vec<_> = info.runtimes.iter().flatten().map(|(name, _)| name.clone()).collect();
    names.sort();
    names
}

pub(super) fn has_security(info: &SystemInfo, name: &str) -> bool {
    // `name=seccomp,profile=default`; older engines say only `seccomp`.
    info.security_options
        .iter()
        .flatten()
        .any(|option| option.split(',').any(|part| part == name || part.strip_prefix("name=") == Some(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> SystemInfo {
        SystemInfo {
            memory_limit: Some(true),
            swap_limit: Some(true),
            pids_limit: Some(true),
            cpu_cfs_quota: Some(true),
            os_type: Some("linux".to_owned()),
            security_options: Some(vec!["name=seccomp,profile=default".to_owned()]),
            ..SystemInfo::default()
        }
    }

    fn refusal(change: impl Fn(&mut SystemInfo)) -> String {
        let mut info = good();
        change(&mut info);
        check(&info, &DockerSettings::new("t")).expect_err("a machine that lacks something").to_string()
    }

    #[test]
    fn a_machine_that_can_everything_is_taken() {
        assert_eq!(check(&good(), &DockerSettings::new("t")), Ok(()));
    }

    #[test]
    fn root_is_another_outside_where_users_are_remapped() {
        let mut info = good();
        info.docker_root_dir = Some("/var/lib/docker/100000.200000".to_owned());
        assert_eq!(root_outside(&info), (0, 0), "it is only called so");
        info.security_options = Some(vec!["name=userns".to_owned()]);
        assert_eq!(root_outside(&info), (100_000, 200_000));
    }

    #[test]
    fn each_missing_lock_is_named() {
        assert!(refusal(|i| i.memory_limit = Some(false)).contains("\"memory\""));
        assert!(refusal(|i| i.swap_limit = None).contains("accept_unenforced = [\"memory-swap\"]"));
        assert!(refusal(|i| i.pids_limit = Some(false)).contains("\"pids\""));
        assert!(refusal(|i| i.cpu_cfs_quota = Some(false)).contains("CPU"));
        assert!(refusal(|i| i.security_options = None).contains("seccomp"));
        let remapped = |i: &mut SystemInfo| i.security_options = Some(vec!["seccomp".into(), "name=userns".into()]);
        assert!(refusal(remapped).contains("65535"));
    }

    fn demand(template: &str, runtime: &str, accepted: &[Lock]) -> Demand {
        let accepted = accepted.iter().copied().collect();
        Demand { template: template.to_owned(), runtime: runtime.to_owned(), accepted, workspaces: None }
    }

    fn with_gvisor() -> SystemInfo {
        let known = |path: &str, arguments: &[&str]| bollard::models::Runtime {
            path: Some(path.to_owned()),
            runtime_args: Some(arguments.iter().map(ToString::to_string).collect()),
            status: None,
        };
        let runtimes = [("runc", known("runc", &[])), ("runsc", known("/usr/bin/runsc", &["--oci-seccomp"]))];
        SystemInfo { runtimes: Some(runtimes.map(|(n, r)| (n.to_owned(), r)).into()), ..good() }
    }

    #[test]
    fn each_template_says_for_itself_what_it_does_without() {
        let refusal = |demands: &[Demand]| {
            let settings = DockerSettings { demands: demands.to_vec(), ..DockerSettings::new("t") };
            check(&with_gvisor(), &settings).err().map(|e| e.to_string()).unwrap_or_default()
        };
        let accepted = [Lock::Pids, Lock::TmpfsInodes, Lock::MountFlags];
        assert_eq!(refusal(&[demand("plain", "", &[]), demand("safe", "runsc", &accepted)]), "");
        let refused = refusal(&[demand("plain", "", &accepted), demand("safe", "runsc", &accepted[..1])]);
        assert!(refused.contains("\"safe\"") && !refused.contains("plain"), "{refused}");
        assert!(refused.contains("accept_unenforced = [\"pids\", \"tmpfs-inodes\", \"mount-flags\"]"), "{refused}");
        let refused = refusal(&[demand("vm", "kata", &Lock::ALL)]);
        assert!(refused.contains("no runtime \"kata\"; it has runc, runsc"), "{refused}");
    }

    #[test]
    fn only_what_is_accepted_and_unenforced_is_not_looked_for() {
        let info = with_gvisor();
        let view = |demands: &[Demand], runtime| view(&info, demands, runtime);
        let all = demand("a", "runsc", &Lock::ALL);
        assert_eq!(view(&[], "runsc").forgone, BTreeSet::new());
        let forgone = view(std::slice::from_ref(&all), "runsc").forgone;
        assert_eq!(forgone, BTreeSet::from([Lock::Pids, Lock::TmpfsInodes, Lock::MountFlags]));
        let less = demand("b", "runsc", &[Lock::MountFlags]);
        assert_eq!(view(&[all.clone(), less], "runsc").forgone, BTreeSet::from([Lock::MountFlags]));
        assert_eq!(view(&[all], "").forgone, BTreeSet::new());
    }
}
