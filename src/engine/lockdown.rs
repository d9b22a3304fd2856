//! The lock: a pure function from a cell's specification to the container that Docker is asked for, every flag with its reason.
//!
//! Nothing here talks to an engine. [`attest`](attest()) compares what an engine and a guest show with what was asked for.

use std::collections::HashMap;

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig, Mount, MountType,
    MountVolumeOptions, ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
};
use cellblock_wire::link::{GUEST_DIR, GUEST_PATH, STATE_DIR, WORKDIR};
use sha2::{Digest, Sha256};

use super::CellSpec;
use crate::domain::spec::{MIB, Resources};

mod attest;
mod paths;
pub mod runtime;
pub mod seccomp;

pub use attest::attest;

/// Label: the control plane that a container or volume belongs to.
pub const LABEL_INSTANCE: &str = "io.cellblock.instance";
/// Label: one of the `ROLE_…`s.
pub const LABEL_ROLE: &str = "io.cellblock.role";
/// Label: the session of a cell.
pub const LABEL_SESSION: &str = "io.cellblock.session";
/// Label: the uid of a cell, which no other cell on the engine has.
pub const LABEL_UID: &str = "io.cellblock.uid";
/// Label: [`spec_hash`] of what the cell was made from.
pub const LABEL_SPEC: &str = "io.cellblock.spec";
/// Label: CPU time that a cell was promised, in thousandths of a CPU.
pub const LABEL_CPU: &str = "io.cellblock.cpu-millis";
/// Label: memory that a cell was promised, in bytes.
pub const LABEL_MEMORY: &str = "io.cellblock.memory-bytes";
/// Label: the installation that has the instance's name.
pub const LABEL_INSTALLATION: &str = "io.cellblock.installation";

/// Label: the name of the data that a volume has to do with.
pub const LABEL_DATA: &str = "io.cellblock.data";
/// Label: which of all contents of that name it is.
pub const LABEL_VERSION: &str = "io.cellblock.data-version";
/// Label: when it was whole, in milliseconds since the beginning of 1970.
pub const LABEL_WHOLE_AT: &str = "io.cellblock.data-whole-at";
/// Label: bytes of the archive that it was made from.
pub const LABEL_BYTES: &str = "io.cellblock.data-bytes";
/// Label: the archive's SHA-256.
pub const LABEL_SHA256: &str = "io.cellblock.data-sha256";

/// Role of a session's container.
pub const ROLE_CELL: &str = "cell";
/// Role of the volume that holds the guest.
pub const ROLE_GUEST: &str = "guest";
/// Role of a container that is never started and only gives access to a volume.
pub const ROLE_HELPER: &str = "helper";
/// Role of a volume that holds data, or a part of it.
pub const ROLE_DATA: &str = "data";
/// Role of an empty volume that says, by being there, that one with data is whole.
pub const ROLE_DATA_WHOLE: &str = "data-whole";
/// Role of a container that is never started and through which data comes into its volume.
pub const ROLE_DATA_HELPER: &str = "data-helper";
/// Role of a volume that is the working folder of one cell after the other.
pub const ROLE_WORKSPACE: &str = "workspace";
/// Role of a container that is never started and through which such a volume gets its owner.
pub const ROLE_WORKSPACE_HELPER: &str = "workspace-helper";
/// Role of a volume that only tries whether the engine enforces quotas.
pub const ROLE_QUOTA_TRIAL: &str = "quota-trial";
/// Role of a container that is never started and only says whose the instance's name is.
pub const ROLE_LOCK: &str = "lock";

/// Where POSIX shared memory lives.
const SHM_DIR: &str = "/dev/shm";
/// Where temporary files go.
const TMP_DIR: &str = "/tmp";

/// What of an engine's machine changes how a cell is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// The machine has only the unified control groups.
    pub cgroup_v2: bool,
    /// The engine confines containers with AppArmor.
    pub apparmor: bool,
    /// Uids inside are others outside, so that all cells share the quotas of one user of the machine.
    pub remapped_users: bool,
    /// What is added to a uid inside to have it outside, where that is known.
    pub uid_offset: u32,
}

/// The volumes of a cell, as the engine names them.
#[derive(Debug, Clone, Copy)]
pub struct Volumes<'a> {
    /// The guest's.
    pub guest: &'a str,
    /// One for each of the cell's data, in their order.
    pub data: &'a [String],
    /// Its working folder, where that is not memory of its own.
    pub workspace: Option<&'a str>,
}

impl<'a> Volumes<'a> {
    /// Those of a cell without data, whose files are its own.
    #[must_use]
    pub fn only_guest(guest: &'a str) -> Self {
        Self { guest, data: &[], workspace: None }
    }
}

/// The container for a cell. The same arguments give the same container.
#[must_use]
pub fn container(
    cell: &CellSpec,
    uid: u32,
    volumes: Volumes<'_>,
    instance: &str,
    host: &HostFacts,
) -> ContainerCreateBody {
    let mut body = unlabelled(cell, uid, volumes, host);
    let labels = [
        (LABEL_INSTANCE, instance.to_owned()),
        (LABEL_ROLE, ROLE_CELL.to_owned()),
        (LABEL_SESSION, cell.session.to_string()),
        (LABEL_UID, uid.to_string()),
        (LABEL_CPU, cell.resources.cpu_millis.to_string()),
        (LABEL_MEMORY, cell.resources.memory_bytes.to_string()),
        (LABEL_SPEC, spec_hash(cell, volumes, host)),
    ];
    // For finding it again. No label holds a caller's text.
    body.labels = Some(labels.into_iter().map(|(name, value)| (name.to_owned(), value)).collect());
    body
}

/// Stands for everything that a cell is made from but its uid: two cells with one hash are locked alike.
#[must_use]
pub fn spec_hash(cell: &CellSpec, volumes: Volumes<'_>, host: &HostFacts) -> String {
    // Through `Value`, whose maps are ordered.
    let body = serde_json::to_value(unlabelled(cell, 0, volumes, host)).unwrap_or_default();
    hex(&Sha256::digest(format!("{}{body}", cell.name)))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unlabelled(cell: &CellSpec, uid: u32, volumes: Volumes<'_>, host: &HostFacts) -> ContainerCreateBody {
    ContainerCreateBody {
        // The image's id, not its name: what a tag means may change at any time.
        image: Some(cell.image.clone()),
        // Our own first process: it can't be killed from inside, nor read. The image's entrypoint and command are ignored.
        entrypoint: Some(vec![GUEST_PATH.to_owned()]),
        // Where to work, if it is elsewhere than the guest takes for granted.
        cmd: (cell.workdir != WORKDIR).then(|| vec![cell.workdir.clone()]),
        working_dir: Some(cell.workdir.clone()),
        // Numeric, so that it needs no entry in the image. A uid of its own, because the kernel counts inotify instances,
        // pipe buffers and pending signals by uid: cells that shared one could exhaust each other's.
        user: Some(format!("{uid}:{uid}")),
        env: Some(environment(&cell.workdir)),
        // The default is the container's id, which code inside has no need to know.
        hostname: Some("cell".to_owned()),
        // stdin and stdout are the link. Stdin must survive a disconnect (`stdin_once` would close the guest's for good),
        // and a terminal would change the bytes.
        tty: Some(false),
        open_stdin: Some(true),
        stdin_once: Some(false),
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        attach_stderr: Some(false),
        // An image's health check would have the engine enter a hostile container again and again.
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }),
        // No network device at all, no resolver, no copy of the machine's DNS settings; also half the time to start.
        network_disabled: Some(true),
        // The end is a kill: nothing inside is asked for its consent.
        stop_signal: Some("SIGKILL".to_owned()),
        stop_timeout: Some(1),
        host_config: Some(host_config(cell, uid, volumes, host)),
        // Left out on purpose: exposed ports, volumes, on-build triggers, network endpoints.
        ..ContainerCreateBody::default()
    }
}

/// What every process inside sees, before the guest adds what came over the link. No secret stands here: `inspect` shows it.
fn environment(workdir: &str) -> Vec<String> {
    let home = format!("HOME={workdir}");
    [
        // `PATH` is the image's.
        home.as_str(),
        "USER=user",
        "LANG=C.UTF-8",
        // What programs keep for themselves goes where a listing of the working folder does not show it.
        "IPYTHONDIR=/tmp/.ipython",
        "XDG_CACHE_HOME=/tmp/.cache",
        "XDG_CONFIG_HOME=/tmp/.config",
        "PYTHONDONTWRITEBYTECODE=1",
    ]
    .map(str::to_owned)
    .to_vec()
}

fn host_config(cell: &CellSpec, uid: u32, volumes: Volumes<'_>, host: &HostFacts) -> HostConfig {
    let limits = &cell.resources;
    HostConfig {
        runtime: (!cell.runtime.is_empty()).then(|| cell.runtime.clone()),
        mounts: Some(mounts(cell, volumes)),
        tmpfs: Some(writable_folders((&cell.workdir, volumes.workspace.is_some()), limits, uid)),
        ulimits: Some(ulimits(limits)),
        security_opt: Some(security_options(host)),
        ..limited(limits, host, isolated())
    }
}

/// What is the same for every cell: namespaces, capabilities, paths.
fn isolated() -> HostConfig {
    HostConfig {
        // Together with `network_disabled`; the only mode in which the machine itself can't be reached.
        network_mode: Some("none".to_owned()),
        privileged: Some(false),
        cap_add: Some(vec![]),
        // Code inside is nobody special, and no file of the image makes it so.
        cap_drop: Some(vec!["ALL".to_owned()]),
        group_add: Some(vec![]),
        // What can be written is the four folders below, each with a size, and never the machine's disk.
        readonly_rootfs: Some(true),
        // A namespace of its own, and no /dev/shm from the engine: its size could be capped, its inodes not. Ours is below.
        ipc_mode: Some("none".to_owned()),
        // Empty is a namespace of its own; `host` and `container:` would show other processes.
        pid_mode: Some(String::new()),
        uts_mode: Some(String::new()),
        // Empty keeps the engine's remapping, if it has one; `host` would turn it off.
        userns_mode: Some(String::new()),
        // The paths of the machine's control groups are not for code inside.
        cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
        // The engine's own first process could be read and written by others of its uid, and through it the link.
        init: Some(false),
        // The exit status must stay readable, and what ended stays ended.
        auto_remove: Some(false),
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: Some(0) }),
        // Output would fill the machine's disk. Attaching works without a log.
        log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: Some(HashMap::new()) }),
        masked_paths: Some(paths::masked()),
        readonly_paths: Some(paths::read_only()),
        publish_all_ports: Some(false),
        // Each of these is a way out, or sideways. Empty here, and required to be empty by `attest`: binds, volumes_from,
        // devices, device_requests, device_cgroup_rules, links, port_bindings, extra_hosts, dns, sysctls, storage_opt.
        ..HostConfig::default()
    }
}

fn limited(limits: &Resources, host: &HostFacts, isolated: HostConfig) -> HostConfig {
    let memory = signed(limits.memory_bytes);
    HostConfig {
        memory: Some(memory),
        // Memory and swap together: unset, it would be twice the memory.
        memory_swap: Some(memory),
        // Only the older control groups know it.
        memory_swappiness: (!host.cgroup_v2).then_some(0),
        // Where processes may not be killed for memory, they hang instead.
        oom_kill_disable: (!host.cgroup_v2).then_some(false),
        // Cells go before anything of the machine's. A hint: code inside can lower it to zero.
        oom_score_adj: Some(500),
        nano_cpus: Some(i64::from(limits.cpu_millis) * 1_000_000),
        // An eighth of the default weight: a machine full of busy cells still answers.
        cpu_shares: Some(128),
        // Zero and -1 would mean no limit, without an error.
        pids_limit: Some(i64::from(limits.pids.max(1))),
        shm_size: Some(signed(shm_bytes(limits))),
        ..isolated
    }
}

/// The guest, and the cell's data, read-only; and a working folder that outlives the cell. All that is mounted. Nothing can be asked of such a mount as to setuid
/// files and devices: no privilege is gained by either, device nodes take a capability to make, and the engine's device rules refuse to open them.
fn mounts(cell: &CellSpec, volumes: Volumes<'_>) -> Vec<Mount> {
    let data = cell.data.iter().zip(volumes.data).map(|(at, volume)| mount(volume, &at.path, true));
    let workspace = volumes.workspace.map(|volume| mount(volume, &cell.workdir, false));
    std::iter::once(mount(volumes.guest, GUEST_DIR, true)).chain(data).chain(workspace).collect()
}

fn mount(volume: &str, target: &str, read_only: bool) -> Mount {
    Mount {
        typ: Some(MountType::VOLUME),
        source: Some(volume.to_owned()),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        // An empty volume would otherwise be filled with what the image has there.
        volume_options: Some(MountVolumeOptions { no_copy: Some(true), ..MountVolumeOptions::default() }),
        ..Mount::default()
    }
}

/// Everything that can be written to, but for a working folder that outlives the cell: memory with a size and a number of inodes, charged to the cell's own limit.
fn writable_folders(
    (workdir, is_work_elsewhere): (&str, bool),
    limits: &Resources,
    uid: u32,
) -> HashMap<String, String> {
    let owned = |exec: &str, bytes: u64, inodes: u64, mode: &str| {
        format!("rw,nosuid,nodev,{exec},size={bytes},nr_inodes={inodes},mode={mode},uid={uid},gid={uid}")
    };
    // Packages with compiled parts are installed into the working folder, so files there may be executed.
    let work = owned("exec", limits.disk_bytes, (limits.disk_bytes / (16 * 1024)).clamp(4096, 262_144), "0700");
    let tmp = owned("noexec", limits.tmp_bytes, 8192, "0700");
    let shm = owned("noexec", shm_bytes(limits), 1024, "0700");
    // The guest's own: were it a part of the temporary files, code that fills those would keep its next kernel from starting. Thirty
    // kernels at a time, each with a folder, a file and five sockets.
    let state = owned("noexec", MIB, 512, "0700");
    let folders = [(workdir, work), (TMP_DIR, tmp), (SHM_DIR, shm), (STATE_DIR, state)];
    let own = folders.into_iter().filter(|(path, _)| !(is_work_elsewhere && *path == workdir));
    own.map(|(path, options)| (path.to_owned(), options)).collect()
}

/// `multiprocessing` needs some; it is charged to the cell's memory.
fn shm_bytes(limits: &Resources) -> u64 {
    (limits.memory_bytes / 8).min(64 * MIB)
}

fn ulimits(limits: &Resources) -> Vec<ResourcesUlimits> {
    let largest_file = limits.disk_bytes.max(limits.tmp_bytes);
    [
        // Core dumps may be piped to a program of the machine's.
        ("core", 0),
        ("nofile", u64::from(limits.open_files)),
        // A sparse file of a TiB costs nothing until somebody reads it.
        ("fsize", largest_file),
        // Locked memory and message queues are the kernel's own memory.
        ("memlock", 0),
        ("msgqueue", 0),
        ("sigpending", 256),
        // No `nproc`: the kernel counts it by uid, and `pids_limit` counts what is meant.
    ]
    .map(|(name, limit)| ResourcesUlimits {
        name: Some(name.to_owned()),
        soft: Some(signed(limit)),
        hard: Some(signed(limit)),
    })
    .to_vec()
}

fn security_options(host: &HostFacts) -> Vec<String> {
    let mut options = vec![
        // A setuid file of the image gives nothing.
        "no-new-privileges:true".to_owned(),
        // Our own: engines' default profiles of some years let AF_VSOCK, AF_ALG and io_uring through.
        format!("seccomp={}", seccomp::profile(host.remapped_users)),
    ];
    if host.apparmor {
        // An engine without AppArmor takes the option silently, and then it means nothing.
        options.push("apparmor=docker-default".to_owned());
    }
    options
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
