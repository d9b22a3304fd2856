//! What the engine's machine can enforce, and the refusal to run cells where a lock would silently not hold.

use bollard::models::{SystemInfo, SystemInfoCgroupVersionEnum};

use super::super::{EngineError, EngineInfo};
use super::DockerSettings;
use crate::engine::lockdown::HostFacts;

/// The largest uid inside that a usual range of remapped users has room for.
const LAST_REMAPPED_UID: u32 = 65_535;

/// What of the machine changes how cells are locked.
pub(super) fn host_facts(info: &SystemInfo) -> HostFacts {
    HostFacts {
        cgroup_v2: info.cgroup_version == Some(SystemInfoCgroupVersionEnum::_2),
        apparmor: has_security(info, "apparmor"),
        remapped_users: has_security(info, "userns") || has_security(info, "rootless"),
    }
}

/// For people, and for the budget.
pub(super) fn engine_info(info: &SystemInfo) -> EngineInfo {
    EngineInfo {
        version: format!("Docker Engine {}", info.server_version.as_deref().unwrap_or("of unknown version")),
        cpus: info.ncpu.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        memory_bytes: info.mem_total.and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
    }
}

/// Refuses a machine where a limit would be dropped without an error.
pub(super) fn check(info: &SystemInfo, settings: &DockerSettings) -> Result<(), EngineError> {
    let missing = missing(info, settings);
    if missing.is_empty() {
        return Ok(());
    }
    let detail = format!("its machine lacks what confines cells: {}", missing.join(", "));
    Err(EngineError::Rejected { attempt: "checking the engine", detail })
}

fn missing(info: &SystemInfo, settings: &DockerSettings) -> Vec<String> {
    let mut missing = Vec::new();
    let mut require = |holds: Option<bool>, what: &str| {
        if holds != Some(true) {
            missing.push(what.to_owned());
        }
    };
    require(info.memory_limit, "memory limits");
    require(info.pids_limit, "limits on processes");
    require(info.cpu_cfs_quota, "CPU quotas");
    if settings.require_swap_limit {
        require(info.swap_limit, "limits on swap");
    }
    require(Some(has_security(info, "seccomp")), "seccomp");
    require(Some(info.os_type.as_deref() == Some("linux")), "Linux");
    if host_facts(info).remapped_users && *settings.uids.end() > LAST_REMAPPED_UID {
        missing.push(format!("uids above {LAST_REMAPPED_UID} (users are remapped; set a lower range)"));
    }
    missing
}

fn has_security(info: &SystemInfo, name: &str) -> bool {
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
    fn each_missing_lock_is_named() {
        assert!(refusal(|i| i.memory_limit = Some(false)).contains("memory limits"));
        assert!(refusal(|i| i.swap_limit = None).contains("swap"));
        assert!(refusal(|i| i.pids_limit = Some(false)).contains("processes"));
        assert!(refusal(|i| i.cpu_cfs_quota = Some(false)).contains("CPU"));
        assert!(refusal(|i| i.security_options = None).contains("seccomp"));
        let remapped = |i: &mut SystemInfo| i.security_options = Some(vec!["seccomp".into(), "name=userns".into()]);
        assert!(refusal(remapped).contains("65535"));
    }
}
