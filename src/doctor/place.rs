//! Where a server would run: its clock, its open files, its data folder and database, and disks. Reads only.

use std::path::Path;
use std::time::Duration;

use rustix::fs::{Access, access, statvfs};

use super::verdict::Check;
use crate::config::Config;
use crate::engine::EngineError;
use crate::engine::docker::QUOTA_REMEDY;
use crate::engine::docker::trial::Host;
use crate::store::state;

/// The name of the check of quotas.
pub(super) const QUOTA: &str = "disk quota";
/// Open files that a server has beside those of its sessions: listeners, the database, calls to the engine, callers.
const FILES_BESIDE: u64 = 256;
/// Open files of one session: the stream to its container, its caller, and a call to the engine.
const FILES_A_SESSION: u64 = 3;
/// A clock that is further away than this is worth a look …
const NOTICED_MS: i64 = 5_000;
/// … and with this, what is old can't be told from what is young.
const UNUSABLE_MS: i64 = 300_000;
/// A database may be read for this long.
const READING: Duration = Duration::from_secs(60);
/// Less than this is next to nothing.
const LEAST_FREE: u64 = 256 << 20;
/// An engine makes images and layers: with less than this it soon can't.
const ENGINE_FREE: u64 = 2 << 30;
const GIB: f64 = (1u64 << 30) as f64;

/// What needs no engine.
pub(super) async fn checks(config: &Config) -> Vec<Check> {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    vec![
        open_files(soft_limit(&limits), u64::from(config.limits.sessions)),
        data_folder(
            &config.server.data_dir,
            config.executions.blob_size.saturating_add(config.executions.notebooks_size),
        ),
        database(&config.server.data_dir).await,
    ]
}

/// The soft limit of open files, from `/proc/self/limits`; `None` is unlimited or unknown.
fn soft_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn open_files(limit: Option<u64>, sessions: u64) -> Check {
    let needed = sessions * FILES_A_SESSION + FILES_BESIDE;
    match limit {
        Some(limit) if limit < needed => {
            let seen = format!("{limit} are permitted, and {sessions} sessions may need {needed}");
            Check::weak("open files", seen)
                .with(format!("LimitNOFILE={needed} in the unit, `ulimit -n`, or lower limits.sessions"))
        }
        Some(limit) => {
            Check::ok("open files", format!("{limit} are permitted, and {sessions} sessions may need {needed}"))
        }
        None => Check::ok("open files", "no limit is told"),
    }
}

/// `budget` is what may be kept there in all.
fn data_folder(folder: &Path, budget: u64) -> Check {
    const NAME: &str = "data folder";
    let shown = folder.display();
    // It is made at the first start, and so are those above it.
    let Some(there) = folder.ancestors().find(|path| path.exists()) else {
        return Check::broken(NAME, format!("{shown} can't be made")).with("server.data_dir names another");
    };
    if let Err(error) = access(there, Access::WRITE_OK | Access::EXEC_OK) {
        let seen = format!("{} can't be written by this user: {error}", there.display());
        return Check::broken(NAME, seen).with("let the server's user own it, or name another with server.data_dir");
    }
    let free = match statvfs(there) {
        Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize),
        Err(error) => return Check::weak(NAME, format!("nobody knows what is free in {shown}: {error}")),
    };
    let seen =
        format!("{shown}: {:.1} GiB are free, and up to {:.1} GiB of results may be kept", gib(free), gib(budget));
    match free {
        ..LEAST_FREE => {
            Check::broken(NAME, seen).with("make room: nothing new is accepted while the database can't be written")
        }
        free if free < budget => {
            Check::weak(NAME, seen).with("make room, or lower executions.blob_size and executions.notebooks_size")
        }
        _ => Check::ok(NAME, seen),
    }
}

async fn database(folder: &Path) -> Check {
    const NAME: &str = "database";
    let (path, folder) = (state::path_in(folder), folder.to_owned());
    let looking = tokio::task::spawn_blocking(move || state::examine(&folder));
    let remedy = "move it away to begin anew, or restore a copy made with `cellblock backup`";
    match tokio::time::timeout(READING, looking).await {
        Ok(Ok(Ok(None))) => Check::ok(NAME, format!("{} is not there yet; the first start makes it", path.display())),
        Ok(Ok(Ok(Some((version, newest))))) if version < newest => {
            Check::ok(NAME, format!("version {version}; the next start brings it to {newest}"))
        }
        Ok(Ok(Ok(Some((version, _))))) => Check::ok(NAME, format!("sound, version {version}")),
        Ok(Ok(Err(error))) => Check::broken(NAME, format!("{}: {error}", path.display())).with(remedy),
        Ok(Err(error)) => Check::broken(NAME, format!("{}: {error}", path.display())).with(remedy),
        Err(_) => Check::weak(NAME, format!("{} could not be read through within {READING:?}", path.display())),
    }
}

/// How far the engine's clock is ahead of this machine's.
pub(super) fn clock(ahead_ms: Option<i64>) -> Check {
    const NAME: &str = "clock";
    const REMEDY: &str = "keep both machines' clocks with NTP: what is old is told from what is young by them";
    let Some(ahead) = ahead_ms else { return Check::weak(NAME, "the engine does not tell its time") };
    let seen = format!("the engine's is {ahead} ms ahead of this one");
    match ahead.saturating_abs() {
        away if away >= UNUSABLE_MS => Check::broken(NAME, seen).with(REMEDY),
        away if away >= NOTICED_MS => Check::weak(NAME, seen).with(REMEDY),
        _ => Check::ok(NAME, seen),
    }
}

/// Whether the engine could limit the disk of a container; sessions write to memory only, so it need not.
pub(super) async fn quota(host: &Host, image: &str) -> Check {
    match host.limits_disk(image).await {
        Ok(()) => Check::ok(QUOTA, "the engine can limit a container's disk; sessions write to memory only"),
        Err(EngineError::Rejected { detail, .. } | EngineError::Unexpected { detail, .. }) => {
            Check::ok(QUOTA, format!("none here, and none is needed, since sessions write to memory only ({detail})"))
        }
        Err(error) => Check::weak(QUOTA, error.to_string()),
    }
}

/// Whether the quota of workspaces that outlive sessions is enforced, where there are any.
pub(super) async fn workspace_quota(config: &Config, host: &Host) -> Option<Check> {
    const NAME: &str = "workspaces";
    let offers = || config.templates.values().filter(|template| template.workspace.is_some());
    let relying: Vec<_> = offers().filter(|t| !t.accept_unlimited_workspace).map(|t| t.name.as_str()).collect();
    offers().next()?;
    Some(match host.lacks_quotas().await {
        Ok(None) => Check::ok(NAME, "the engine enforces their quotas: it has made a volume with one"),
        Ok(Some(why)) if relying.is_empty() => Check::weak(
            NAME,
            format!("no quota is enforced, which is accepted: sessions can fill the engine's disk ({why})"),
        ),
        Ok(Some(why)) => {
            let names = relying.join(", ");
            Check::broken(NAME, format!("no quota is enforced, which templates rely on: {names} ({why})"))
                .with(QUOTA_REMEDY)
        }
        Err(error) => Check::weak(NAME, error.to_string()),
    })
}

/// What is free where the engine keeps images and volumes.
pub(super) fn engine_disk(free: u64, all: u64) -> Check {
    const NAME: &str = "engine's disk";
    const REMEDY: &str = "make room: `docker system df` tells what is there";
    let seen = format!("{:.1} of {:.1} GiB are free", gib(free), gib(all));
    match free {
        ..LEAST_FREE => Check::broken(NAME, seen).with(REMEDY),
        LEAST_FREE..ENGINE_FREE => Check::weak(NAME, seen).with(REMEDY),
        _ => Check::ok(NAME, seen),
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::verdict::Verdict;

    #[test]
    fn open_files_are_counted_against_sessions() {
        assert_eq!(
            soft_limit("Limit  Soft\nMax open files            1024                 4096   files\n"),
            Some(1024)
        );
        assert_eq!(soft_limit("Max open files            unlimited            unlimited            files\n"), None);
        assert_eq!(open_files(Some(1024), 100).verdict, Verdict::Ok);
        assert_eq!(open_files(Some(1024), 1000).verdict, Verdict::Weak);
        assert_eq!(open_files(None, 1000).verdict, Verdict::Ok);
    }

    #[test]
    fn clocks_and_disks_have_three_degrees() {
        let clocks = [Some(-40), Some(-6_000), Some(400_000), None].map(|ahead| clock(ahead).verdict);
        assert_eq!(clocks, [Verdict::Ok, Verdict::Weak, Verdict::Broken, Verdict::Weak]);
        let disks = [50 << 30, 1 << 30, 1 << 20].map(|free| engine_disk(free, 100 << 30).verdict);
        assert_eq!(disks, [Verdict::Ok, Verdict::Weak, Verdict::Broken]);
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_judged_by_the_one_above() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("a/b");
        assert_eq!(data_folder(&inside, 0).verdict, Verdict::Ok);
        assert!(!inside.exists(), "it only looks");
        assert_eq!(data_folder(&inside, u64::MAX).verdict, Verdict::Weak);
        assert_eq!(data_folder(Path::new("/proc/self/nothing"), 0).verdict, Verdict::Broken);
    }
}
