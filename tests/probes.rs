//! Every lock twice: a probe finds it shut in a locked cell, and open in one where just that lock was left out.
//!
//! A probe that does not find the open door would be blind, and its finding of the shut one worth nothing.

#[path = "support/engine_docker.rs"]
mod engine_docker;
#[path = "support/engine_suite.rs"]
mod engine_suite;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bollard::container::LogOutput;
use bollard::models::{
    ContainerConfig, ContainerCreateBody, ContainerInspectResponse, DeviceMapping, HealthConfig, HostConfig,
};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, InspectContainerOptionsBuilder,
};
use cellblock::domain::ids::SessionId;
use cellblock::domain::spec::MIB;
use cellblock::engine::docker::GuestFile;
use cellblock::engine::{CellName, CellSpec, lockdown};
use engine_docker::{Bench, on_docker, real_guest, scripted_guest};
use futures_util::StreamExt;
use uuid::Uuid;

type Findings = BTreeMap<String, Option<String>>;
type Unlock = fn(&mut ContainerCreateBody);

/// What is left out, and the probes that must notice.
struct Row {
    lock: &'static str,
    unlock: Unlock,
    probes: &'static [&'static str],
}

fn host(body: &mut ContainerCreateBody) -> &mut HostConfig {
    body.host_config.as_mut().expect("a host configuration")
}

fn folder(body: &mut ContainerCreateBody, path: &str, option: &str, instead: &str) {
    let options = host(body).tmpfs.as_mut().expect("folders").get_mut(path).expect("a folder");
    let kept = options.split(',').filter(|o| !o.starts_with(option)).map(str::to_owned);
    *options = kept.chain((!instead.is_empty()).then(|| instead.to_owned())).collect::<Vec<_>>().join(",");
}

fn ulimit(body: &mut ContainerCreateBody, name: &str, limit: i64) {
    let limits = host(body).ulimits.as_mut().expect("limits");
    let found = limits.iter_mut().find(|l| l.name.as_deref() == Some(name)).expect("a limit");
    (found.soft, found.hard) = (Some(limit), Some(limit));
}

fn without_seccomp(body: &mut ContainerCreateBody) {
    let options = host(body).security_opt.as_mut().expect("options");
    options.retain(|o| !o.starts_with("seccomp="));
    options.push("seccomp=unconfined".to_owned());
}

/// Every call that nothing but the profile refuses to an unprivileged program. What capabilities refuse as well (mounts,
/// kernel modules, `bpf`) is held by the unit tests of the profile.
#[cfg(target_arch = "x86_64")]
const CALLS: &[&str] = &[
    "ptrace",
    "process_vm_readv",
    "pidfd_getfd",
    "kcmp",
    "splice",
    "tee",
    "vmsplice",
    "setns",
    "clone3",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "keyctl",
    "add_key",
    "request_key",
    "name_to_handle_at",
    "fanotify_init",
    "mq_open",
    "msgget",
    "semget",
    "shmget",
    "mbind",
    "modify_ldt",
    "clock_adjtime",
    "seccomp",
    "personality(ADDR_NO_RANDOMIZE)",
    "prlimit64(another)",
    "unshare",
    "socket(AF_VSOCK)",
    "socket(AF_ALG)",
    "socket(NETLINK_NETFILTER)",
    "socket(SCTP)",
    "socket(ICMP)",
    "mknod(device)",
    "socket_families",
    "old_calls",
];
#[cfg(not(target_arch = "x86_64"))]
const CALLS: &[&str] = &["socket_families"];

#[rustfmt::skip]
fn table() -> Vec<Row> {
    let row = |lock, probes, unlock| Row { lock, unlock, probes };
    vec![
        row("NetworkMode and NetworkDisabled", &["network_device", "route", "resolver"], |b| {
            b.network_disabled = None;
            host(b).network_mode = Some("bridge".to_owned());
        }),
        row("NetworkDisabled", &["resolver"], |b| b.network_disabled = None),
        row("Hostname", &["machine_name"], |b| b.hostname = None),
        row("IpcMode", &["machine_namespaces"], |b| host(b).ipc_mode = Some("host".to_owned())),
        row("UTSMode", &["machine_namespaces"], |b| {
            // The engine refuses both together.
            b.hostname = None;
            host(b).uts_mode = Some("host".to_owned());
        }),
        row("CgroupnsMode", &["machine_namespaces"], |b| host(b).cgroupns_mode = Some(bollard::models::HostConfigCgroupnsModeEnum::HOST)),
        row("PidMode", &["machine_processes", "machine_namespaces"], |b| host(b).pid_mode = Some("host".to_owned())),
        row("CapDrop", &["capabilities"], |b| host(b).cap_drop = None),
        row("no-new-privileges", &["new_privileges"], |b| host(b).security_opt.as_mut().expect("options").retain(|o| o.starts_with("seccomp="))),
        row("seccomp", CALLS, without_seccomp),
        row("User", &["privileged_user"], |b| b.user = Some("0:0".to_owned())),
        row("GroupAdd", &["other_groups"], |b| host(b).group_add = Some(vec!["0".to_owned()])),
        row("ReadonlyRootfs", &["root_file_system"], |b| host(b).readonly_rootfs = None),
        row("User and ReadonlyRootfs", &["writable_folders"], |b| {
            b.user = Some("0:0".to_owned());
            host(b).readonly_rootfs = None;
        }),
        row("Mounts, read-only", &["guest_folder"], |b| host(b).mounts.as_mut().expect("mounts")[0].read_only = Some(false)),
        row("/workspace, size", &["work_size"], |b| folder(b, "/workspace", "size", "")),
        row("/workspace, nr_inodes", &["work_inodes"], |b| folder(b, "/workspace", "nr_inodes", "")),
        row("/tmp, size", &["tmp_size"], |b| folder(b, "/tmp", "size", "")),
        row("/tmp, noexec", &["tmp_programs"], |b| folder(b, "/tmp", "noexec", "exec")),
        row("/tmp, nosuid", &["setuid_and_devices"], |b| folder(b, "/tmp", "nosuid", "suid")),
        row("/dev/shm, size", &["shm_size"], |b| folder(b, "/dev/shm", "size", "")),
        row("/dev/shm, nr_inodes", &["shm_inodes"], |b| folder(b, "/dev/shm", "nr_inodes", "")),
        row("/dev/shm, noexec", &["shm_programs"], |b| folder(b, "/dev/shm", "noexec", "exec")),
        row("/run/cellblock, size", &["state_size"], |b| folder(b, "/run/cellblock", "size", "")),
        row("/run/cellblock, nr_inodes", &["state_inodes"], |b| folder(b, "/run/cellblock", "nr_inodes", "")),
        row("Devices", &["device_list"], |b| host(b).devices = Some(vec![DeviceMapping {
            path_on_host: Some("/dev/zero".to_owned()),
            path_in_container: Some("/dev/sda".to_owned()),
            cgroup_permissions: Some("r".to_owned()),
        }])),
        row("MaskedPaths", &["machine_files"], |b| host(b).masked_paths = Some(vec![])),
        row("ReadonlyPaths", &["machine_settings"], |b| host(b).readonly_paths = Some(vec![])),
        row("Memory", &["memory"], |b| (host(b).memory, host(b).memory_swap) = (None, None)),
        row("MemorySwap", &["swap"], |b| host(b).memory_swap = None),
        row("MemorySwappiness", &["swappiness"], |b| host(b).memory_swappiness = None),
        row("PidsLimit", &["processes"], |b| host(b).pids_limit = None),
        row("nofile", &["open_files"], |b| ulimit(b, "nofile", 4096)),
        row("fsize", &["file_size"], |b| ulimit(b, "fsize", -1)),
        row("core", &["core_files"], |b| ulimit(b, "core", -1)),
        row("memlock", &["locked_memory"], |b| ulimit(b, "memlock", 65_536)),
        row("msgqueue", &["message_queues"], |b| ulimit(b, "msgqueue", 65_536)),
        row("sigpending", &["pending_signals"], |b| ulimit(b, "sigpending", 10_000)),
        row("NanoCpus", &["cpu"], |b| host(b).nano_cpus = None),
        row("CpuShares", &["cpu_weight"], |b| host(b).cpu_shares = None),
        row("OomScoreAdj", &["oom_order"], |b| host(b).oom_score_adj = None),
    ]
}

fn guest_files() -> Vec<GuestFile> {
    let file = |name: &str, bytes: &[u8]| GuestFile { name: name.to_owned(), mode: 0o444, bytes: bytes.to_vec() };
    let mut files = scripted_guest();
    files.push(file("probes.py", include_bytes!("support/engine_probes.py")));
    files.push(file("workloads.py", include_bytes!("../config/seccomp/workloads.py")));
    files
}

/// The locked container of a cell, with another first process.
fn locked(bench: &Bench, image: &str, program: &[&str]) -> ContainerCreateBody {
    // In each process, from another place: uids are nobody else's here, but two tests should not share one either.
    static NEXT_UID: AtomicU32 = AtomicU32::new(0);
    let uid = 266_000 + (std::process::id() % 1000) * 1000 + NEXT_UID.fetch_add(1, Ordering::Relaxed);
    let session = SessionId::from_uuid(Uuid::now_v7());
    let mut resources = engine_suite::resources();
    (resources.disk_bytes, resources.tmp_bytes, resources.cpu_millis) = (16 * MIB, 16 * MIB, 500);
    let cell = CellSpec {
        data: vec![],
        workdir: "/workspace".to_owned(),
        workspace: None,
        name: CellName::new(&bench.instance, session, 0),
        session,
        image: image.to_owned(),
        runtime: String::new(),
        resources,
    };
    let volumes = lockdown::Volumes::only_guest(bench.engine.guest_volume());
    let mut body = lockdown::container(&cell, uid, volumes, &bench.instance, &bench.engine.host_facts());
    body.entrypoint = Some(program.iter().map(ToString::to_string).collect());
    body.attach_stderr = Some(true);
    body
}

/// A container's whole output, what the engine says of it while it is there, and its exit status.
struct Ran {
    output: String,
    inspected: ContainerInspectResponse,
}

async fn run(bench: &Bench, body: ContainerCreateBody) -> Ran {
    let docker = &bench.docker;
    let name = format!("cellblock-{}-probe-{}", bench.instance, Uuid::new_v4());
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    docker.create_container(Some(options), body).await.expect("a container");
    let options = AttachContainerOptionsBuilder::default().stream(true).stdout(true).stderr(true).build();
    let mut attached = docker.attach_container(&name, Some(options)).await.expect("a stream");
    docker.start_container(&name, None).await.expect("a start");
    let whole = async {
        let mut output = String::new();
        while let Some(Ok(LogOutput::StdOut { message } | LogOutput::StdErr { message })) = attached.output.next().await
        {
            output.push_str(&String::from_utf8_lossy(&message));
        }
        output
    };
    let output = tokio::time::timeout(Duration::from_secs(60), whole).await.expect("a program that ends");
    let options = InspectContainerOptionsBuilder::default().size(true).build();
    let inspected = docker.inspect_container(&name, Some(options)).await.expect("a container");
    engine_docker::remove(bench, &name).await;
    Ran { output, inspected }
}

async fn findings(bench: &Bench, probes: &[&str], unlock: impl FnOnce(&mut ContainerCreateBody)) -> Findings {
    let program: Vec<&str> = ["python3", "/cellblock/probes.py"].iter().chain(probes).copied().collect();
    let mut body = locked(bench, &bench.image, &program);
    body.env.as_mut().expect("an environment").push(format!("MACHINE_NAMESPACES={}", machine_namespaces()));
    unlock(&mut body);
    let ran = run(bench, body).await;
    let last = ran.output.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|_| panic!("{probes:?} said: {}", ran.output))
}

/// Those of the machine that runs the engine, which is this one.
fn machine_namespaces() -> String {
    let link = |kind| std::fs::read_link(format!("/proc/self/ns/{kind}")).map(|l| l.display().to_string());
    ["ipc", "uts", "pid", "cgroup", "net", "mnt"]
        .into_iter()
        .filter_map(|kind| link(kind).ok())
        .collect::<Vec<_>>()
        .join(",")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_lock_is_shut_and_every_probe_sees_it_open() {
    on_docker(guest_files(), |bench| async move {
        let mut all: Vec<&str> = table().iter().flat_map(|row| row.probes.iter().copied()).collect();
        all.sort_unstable();
        all.dedup();
        all.push("inotify");
        let shut = findings(&bench, &all, |_| {}).await;
        let found: Vec<_> = shut.iter().filter(|(_, found)| found.is_some()).collect();
        assert!(found.is_empty(), "open in a locked cell: {found:#?}");

        let blind: Vec<String> = futures_util::stream::iter(table())
            .map(|row| notice(bench.clone(), row))
            .buffer_unordered(3)
            .flat_map(futures_util::stream::iter)
            .collect()
            .await;
        assert!(blind.is_empty(), "these locks were left out and nothing noticed: {blind:#?}");
    })
    .await;
}

/// The probes of a row that find the lock shut although it was left out.
async fn notice(bench: Arc<Bench>, row: Row) -> Vec<String> {
    let open = findings(&bench, row.probes, row.unlock).await;
    let blind = open.into_iter().filter(|(_, found)| found.is_none());
    blind.map(|(probe, _)| format!("{}: {probe}", row.lock)).collect()
}

#[tokio::test]
async fn harmless_programs_run_in_a_locked_cell() {
    on_docker(guest_files(), |bench| async move {
        let mut body = locked(&bench, &bench.image, &["python3", "/cellblock/workloads.py", "system"]);
        let host = host(&mut body);
        (host.nano_cpus, host.memory, host.memory_swap) = (Some(2_000_000_000), Some(1 << 30), Some(1 << 30));
        let ran = run(&bench, body).await;
        assert_eq!(ran.inspected.state.and_then(|s| s.exit_code), Some(0), "{}", ran.output);
    })
    .await;
}

#[tokio::test]
async fn nothing_that_is_printed_or_written_reaches_the_machines_disk() {
    const WRITE: &str = "
for folder in ('/tmp', '/workspace', '/dev/shm'):
    with open(folder + '/file', 'wb') as file:
        file.write(bytes(1 << 20))
try:
    open('/var/tmp/file', 'wb').write(bytes(1 << 20))
except OSError:
    pass
print(1)";
    on_docker(guest_files(), |bench| async move {
        let shut = run(&bench, locked(&bench, &bench.image, &["python3", "-c", WRITE])).await.inspected;
        assert_eq!((shut.log_path.as_deref().unwrap_or(""), shut.size_rw), ("", Some(0)));
        let mut body = locked(&bench, &bench.image, &["python3", "-c", WRITE]);
        body.user = None;
        (host(&mut body).log_config, host(&mut body).readonly_rootfs) = (None, None);
        host(&mut body).tmpfs.as_mut().expect("folders").clear();
        let open = run(&bench, body).await.inspected;
        assert_ne!(open.log_path.as_deref().unwrap_or(""), "", "the probe is blind");
        assert!(open.size_rw > Some(0), "the probe is blind");
    })
    .await;
}

#[tokio::test]
async fn an_images_health_check_and_command_and_user_mean_nothing() {
    on_docker(guest_files(), |bench| async move {
        let words = |words: &[&str]| Some(words.iter().map(ToString::to_string).collect());
        let test = words(&["CMD", "true"]);
        let config = ContainerConfig {
            healthcheck: Some(HealthConfig { test, interval: Some(1_000_000_000), ..HealthConfig::default() }),
            entrypoint: words(&["false"]),
            cmd: words(&["x"]),
            user: Some("0".to_owned()),
            working_dir: Some("/".to_owned()),
            ..ContainerConfig::default()
        };
        let image = engine_docker::commit(&bench, config).await;
        let shows = |ran: &Ran| {
            ran.inspected.state.as_ref().and_then(|s| s.health.as_ref()).is_some_and(|h| h.status.is_some())
        };
        let program = ["python3", "-c", "import os; print(os.getuid() > 0, os.getcwd())"];
        let shut = run(&bench, locked(&bench, &image, &program)).await;
        assert!(!shows(&shut), "{:?}", shut.inspected.state);
        assert_eq!(shut.output.trim(), "True /workspace");
        let mut body = locked(&bench, &image, &program);
        body.healthcheck = None;
        assert!(shows(&run(&bench, body).await), "the probe is blind");
        engine_docker::forget(&bench, &image).await;
    })
    .await;
}

/// The first process holds the link. Another one of its uid gets at neither its memory nor its descriptors.
#[tokio::test]
async fn the_guest_can_not_be_read_by_others_of_its_uid() {
    let mut files = real_guest();
    files.push(GuestFile { name: "x".to_owned(), mode: 0o444, bytes: vec![] });
    on_docker(files, |bench| async move {
        let shut = peek(&bench, None).await;
        assert_eq!(shut.trim(), "[]", "the guest can be read");
        let open = peek(&bench, Some(true)).await;
        assert!(open.contains("mem") && open.contains("environ"), "the probe is blind: {open}");
    })
    .await;
}

/// What another process of the same uid can open of the first one.
async fn peek(bench: &Bench, init: Option<bool>) -> String {
    const PEEK: &str = "
import os
found = []
for name in ('mem', 'environ', 'maps', 'fd/0', 'fd/1', 'root', 'cwd'):
    try:
        os.close(os.open('/proc/1/' + name, os.O_RDONLY if name not in ('mem',) else os.O_RDWR))
        found.append(name)
    except OSError:
        pass
print(found)";
    let mut body = locked(bench, &bench.image, &["/cellblock/guest"]);
    host(&mut body).init = init.or(Some(false));
    let name = format!("cellblock-{}-probe-{}", bench.instance, Uuid::new_v4());
    let options = CreateContainerOptionsBuilder::default().name(&name).build();
    bench.docker.create_container(Some(options), body).await.expect("a container");
    bench.docker.start_container(&name, None).await.expect("a start");
    let output = engine_docker::execute(bench, &name, &["python3", "-c", PEEK]).await;
    engine_docker::remove(bench, &name).await;
    output
}
