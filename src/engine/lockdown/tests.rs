//! The lock under a snapshot, and an attestation that notices each lock that is missing.

use bollard::models::{ContainerInspectResponse, MountPoint, ResourcesUlimits};
use cellblock_wire::link::{Mount as SeenMount, Report};
use serde_json::{Value, json};
use uuid::Uuid;

use super::attest::as_shown;
use super::runtime::{Kind, View};
use super::*;
use crate::domain::data::DataMount;
use crate::domain::ids::SessionId;
use crate::domain::lock::Lock;
use crate::engine::CellName;

const UID: u32 = 200_007;

fn cell() -> CellSpec {
    let session = SessionId::from_uuid(Uuid::from_u128(7));
    CellSpec {
        name: CellName::new("test", session, 0),
        session,
        image: "sha256:1".to_owned(),
        runtime: String::new(),
        resources: Resources {
            cpu_millis: 1500,
            memory_bytes: 1024 * MIB,
            disk_bytes: 512 * MIB,
            tmp_bytes: 64 * MIB,
            pids: 128,
            open_files: 1024,
        },
        workdir: cellblock_wire::link::WORKDIR.to_owned(),
        data: vec![],
        workspace: None,
    }
}

fn locked() -> ContainerCreateBody {
    container(&cell(), UID, Volumes::only_guest("cellblock-guest-test-0"), "test", &HostFacts::default())
}

/// What a guest reports in a container that is locked as it should be; taken from a real one.
fn report() -> Report {
    let mount = |point: &str, fstype: &str, options: &str| SeenMount {
        point: point.to_owned(),
        fstype: fstype.to_owned(),
        options: options.split(',').map(str::to_owned).collect(),
    };
    let owned = "uid=200007,gid=200007";
    let limit = |name: &str, value: u64| (name.to_owned(), (Some(value), Some(value)));
    Report {
        uids: vec![UID; 4],
        gids: vec![UID; 4],
        groups: vec![UID],
        capabilities: ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| (set.to_owned(), 0)).into(),
        no_new_privs: Some(1),
        seccomp: Some(2),
        interfaces: vec!["lo".to_owned()],
        mounts: vec![
            mount("/", "overlay", "ro,relatime,rw,lowerdir=/x"),
            mount("/proc", "proc", "rw,nosuid,nodev,noexec,relatime,rw"),
            mount("/dev", "tmpfs", "rw,nosuid,rw,size=65536k,mode=755"),
            mount("/sys", "sysfs", "ro,nosuid,nodev,noexec,relatime,ro"),
            mount("/cellblock", "ext4", "ro,relatime,rw"),
            mount(
                "/tmp",
                "tmpfs",
                &format!("rw,nosuid,nodev,noexec,relatime,rw,size=65536k,nr_inodes=8192,mode=700,{owned}"),
            ),
            mount(
                "/workspace",
                "tmpfs",
                &format!("rw,nosuid,nodev,relatime,rw,size=524288k,nr_inodes=32768,mode=700,{owned}"),
            ),
            mount(
                "/dev/shm",
                "tmpfs",
                &format!("rw,nosuid,nodev,noexec,relatime,rw,size=65536k,nr_inodes=1024,mode=700,{owned}"),
            ),
            mount(
                "/run/cellblock",
                "tmpfs",
                &format!("rw,nosuid,nodev,noexec,relatime,rw,size=1024k,nr_inodes=512,mode=700,{owned}"),
            ),
            mount("/proc/kcore", "tmpfs", "rw,nosuid,rw,size=65536k,mode=755"),
            mount("/proc/sys", "proc", "ro,nosuid,nodev,noexec,relatime,rw"),
        ],
        rlimits: [
            limit("Max core file size", 0),
            limit("Max open files", 1024),
            limit("Max file size", 512 * MIB),
            limit("Max locked memory", 0),
            limit("Max msgqueue size", 0),
            limit("Max pending signals", 256),
        ]
        .into(),
        memory_limit_bytes: Some(1024 * MIB),
        pids_limit: Some(128),
        cpu_millis: Some(1500),
        is_init: true,
        undumpable: true,
        probes: [("socket(AF_VSOCK)".to_owned(), 1), ("pidfd_getfd".to_owned(), 1)].into(),
    }
}

#[test]
fn the_whole_container() {
    let mut body = serde_json::to_value(locked()).expect("a container is JSON");
    body.sort_all_objects();
    let options = body.pointer_mut("/HostConfig/SecurityOpt").and_then(Value::as_array_mut).expect("options");
    for option in options.iter_mut() {
        if option.as_str().is_some_and(|o| o.starts_with("seccomp=")) {
            // It has a file and tests of its own.
            *option = json!("seccomp=<config/seccomp/default.json>");
        }
    }
    insta::assert_json_snapshot!("container", body);
}

#[test]
fn the_same_cell_is_the_same_container_and_another_one_is_not() {
    assert_eq!(locked(), locked());
    let hash = |cell: &CellSpec, volume: &str| spec_hash(cell, Volumes::only_guest(volume), &HostFacts::default());
    let mut other = cell();
    other.resources.pids += 1;
    assert_eq!(hash(&cell(), "v"), hash(&cell(), "v"));
    assert_ne!(hash(&cell(), "v"), hash(&other, "v"));
    assert_ne!(hash(&cell(), "v"), hash(&cell(), "w"));
}

#[test]
fn a_machine_changes_only_what_it_must() {
    let on = |host: HostFacts| {
        let body = container(&cell(), UID, Volumes::only_guest("v"), "test", &host);
        body.host_config.expect("a host configuration")
    };
    let new = on(HostFacts { cgroup_v2: true, ..HostFacts::default() });
    assert_eq!((new.memory_swappiness, new.oom_kill_disable, new.memory_swap), (None, None, new.memory));
    let confined = on(HostFacts { apparmor: true, ..HostFacts::default() });
    assert!(confined.security_opt.expect("options").contains(&"apparmor=docker-default".to_owned()));
    let remapped = on(HostFacts { remapped_users: true, ..HostFacts::default() });
    assert!(!remapped.security_opt.expect("options").iter().any(|o| o.contains("inotify")));
}

#[test]
fn a_cell_that_is_locked_passes() {
    let body = locked();
    assert_eq!(
        attest(&body, UID, &as_shown(&body), &report(), &HostFacts::default(), &View::default()),
        Vec::<String>::new()
    );
}

#[test]
fn a_workspace_that_outlives_the_cell_is_the_one_volume_that_can_be_written() {
    let volumes = Volumes { workspace: Some("w"), ..Volumes::only_guest("v") };
    let body = container(&cell(), UID, volumes, "test", &HostFacts::default());
    let host = body.host_config.clone().expect("a host configuration");
    let mounts: Vec<_> = host.mounts.iter().flatten().map(|m| (m.target.as_deref(), m.read_only)).collect();
    assert_eq!(mounts, [(Some("/cellblock"), Some(true)), (Some("/workspace"), Some(false))]);
    let mut folders: Vec<_> = host.tmpfs.iter().flatten().map(|(point, _)| point.as_str()).collect();
    folders.sort_unstable();
    assert_eq!(folders, ["/dev/shm", "/run/cellblock", "/tmp"]);
    let found = |options: &str| {
        let mut seen = report();
        seen.mounts.retain(|mount| mount.point != "/workspace");
        let options = options.split(',').map(str::to_owned).collect();
        seen.mounts.push(SeenMount { point: "/workspace".to_owned(), fstype: "ext4".to_owned(), options });
        attest(&body, UID, &as_shown(&body), &seen, &HostFacts::default(), &View::default())
    };
    assert_eq!(found("rw,relatime"), Vec::<String>::new());
    assert!(found("ro,relatime")[0].starts_with("mount /workspace can be written"));
    let mut shown = as_shown(&body);
    shown.mounts.as_mut().expect("mounts")[1].name = Some("another".to_owned());
    let differences = attest(&body, UID, &shown, &report(), &HostFacts::default(), &View::default());
    assert!(differences.iter().any(|d| d.starts_with("/Mounts")), "{differences:?}");
}

/// Each lock is taken away where the engine shows it, and the attestation must name it.
#[test]
fn a_lock_that_the_engine_does_not_show_is_named() {
    type Change = fn(&mut ContainerInspectResponse);
    fn host(shown: &mut ContainerInspectResponse) -> &mut HostConfig {
        shown.host_config.as_mut().expect("a host configuration")
    }
    fn config(shown: &mut ContainerInspectResponse) -> &mut bollard::models::ContainerConfig {
        shown.config.as_mut().expect("a configuration")
    }
    let changes: Vec<(&str, Change)> = vec![
        ("CapDrop", |s| host(s).cap_drop = None),
        ("CapAdd", |s| host(s).cap_add = Some(vec!["SYS_ADMIN".into()])),
        ("SecurityOpt", |s| host(s).security_opt = Some(vec!["no-new-privileges:true".into()])),
        ("SecurityOpt", |s| host(s).security_opt.as_mut().expect("options").retain(|o| o.starts_with("seccomp"))),
        ("Privileged", |s| host(s).privileged = Some(true)),
        ("ReadonlyRootfs", |s| host(s).readonly_rootfs = Some(false)),
        ("Tmpfs", |s| {
            host(s).tmpfs.as_mut().expect("folders").insert("/tmp".into(), "rw".into());
        }),
        ("Memory", |s| host(s).memory = Some(0)),
        ("MemorySwap", |s| host(s).memory_swap = Some(-1)),
        ("NanoCpus", |s| host(s).nano_cpus = None),
        ("PidsLimit", |s| host(s).pids_limit = None),
        ("Ulimits", |s| host(s).ulimits = Some(vec![ResourcesUlimits::default()])),
        ("NetworkMode", |s| host(s).network_mode = Some("bridge".into())),
        ("IpcMode", |s| host(s).ipc_mode = Some("host".into())),
        ("PidMode", |s| host(s).pid_mode = Some("host".into())),
        ("UsernsMode", |s| host(s).userns_mode = Some("host".into())),
        ("CgroupnsMode", |s| host(s).cgroupns_mode = None),
        ("LogConfig", |s| host(s).log_config = None),
        ("MaskedPaths", |s| {
            host(s).masked_paths.as_mut().expect("paths").pop();
        }),
        ("ReadonlyPaths", |s| host(s).readonly_paths = None),
        ("Binds", |s| host(s).binds = Some(vec!["/:/host".into()])),
        ("Devices", |s| {
            host(s).devices = Some(vec![bollard::models::DeviceMapping {
                path_on_host: Some("/dev/kvm".into()),
                ..Default::default()
            }])
        }),
        ("Sysctls", |s| host(s).sysctls = Some([("kernel.x".to_owned(), "1".to_owned())].into())),
        ("RestartPolicy", |s| {
            host(s).restart_policy =
                Some(RestartPolicy { name: Some(RestartPolicyNameEnum::ALWAYS), maximum_retry_count: None })
        }),
        ("Init", |s| host(s).init = Some(true)),
        ("/Mounts", |s| s.mounts.as_mut().expect("mounts").push(MountPoint::default())),
        ("/Mounts", |s| s.mounts.as_mut().expect("mounts")[0].rw = Some(true)),
        ("User", |s| config(s).user = Some("0".into())),
        ("NetworkDisabled", |s| config(s).network_disabled = None),
        ("Healthcheck", |s| config(s).healthcheck = None),
        ("Volumes", |s| config(s).volumes = Some(vec!["/data".into()])),
        ("StdinOnce", |s| config(s).stdin_once = Some(true)),
        ("Labels", |s| {
            config(s).labels.as_mut().expect("labels").remove(LABEL_UID);
        }),
        ("Env", |s| config(s).env = Some(vec![])),
        ("Entrypoint", |s| config(s).entrypoint = Some(vec!["/bin/sh".into()])),
        ("/Path", |s| s.path = Some("/bin/sh".into())),
        ("/Image", |s| s.image = Some("sha256:2".into())),
        ("ExecIDs", |s| s.exec_ids = Some(vec!["1".into()])),
    ];
    for (name, change) in changes {
        let body = locked();
        let mut shown = as_shown(&body);
        change(&mut shown);
        let found = attest(&body, UID, &shown, &report(), &HostFacts::default(), &View::default());
        assert!(found.iter().any(|f| f.contains(name)), "{name} was taken away: {found:?}");
    }
}

/// The same, where the guest sees it.
#[test]
fn a_lock_that_the_guest_does_not_see_is_named() {
    type Change = fn(&mut Report);
    fn without(report: &mut Report, point: &str, option: &str) {
        let mount = report.mounts.iter_mut().find(|m| m.point == point).expect("a mount");
        mount.options.retain(|o| o != option);
    }
    let changes: Vec<(&str, Change)> = vec![
        ("uids", |r| r.uids[1] = 0),
        ("gids", |r| r.gids = vec![0; 4]),
        ("groups", |r| r.groups.push(0)),
        ("CapEff", |r| {
            r.capabilities.insert("CapEff".into(), 0x20);
        }),
        ("CapBnd", |r| {
            r.capabilities.remove("CapBnd");
        }),
        ("NoNewPrivs", |r| r.no_new_privs = Some(0)),
        ("Seccomp", |r| r.seccomp = None),
        ("interfaces", |r| r.interfaces.push("eth0".into())),
        ("interfaces", |r| r.interfaces.clear()),
        ("mount / ", |r| without(r, "/", "ro")),
        ("mount /cellblock", |r| without(r, "/cellblock", "ro")),
        ("mount /proc/sys", |r| without(r, "/proc/sys", "ro")),
        ("mount /tmp, noexec", |r| without(r, "/tmp", "noexec")),
        ("mount /workspace, size", |r| without(r, "/workspace", "size=524288k")),
        ("mount /workspace, nr_inodes", |r| without(r, "/workspace", "nr_inodes=32768")),
        ("mount /run/cellblock, noexec", |r| without(r, "/run/cellblock", "noexec")),
        ("mount /run/cellblock, size", |r| without(r, "/run/cellblock", "size=1024k")),
        ("mount /run/cellblock, nr_inodes", |r| without(r, "/run/cellblock", "nr_inodes=512")),
        ("mount /dev/shm", |r| r.mounts.retain(|m| m.point != "/dev/shm")),
        ("mount /data is not writable", |r| {
            r.mounts.push(SeenMount { point: "/data".into(), fstype: "ext4".into(), options: vec!["rw".into()] })
        }),
        ("Max open files", |r| {
            r.rlimits.insert("Max open files".into(), (Some(1024), None));
        }),
        ("Max core file size", |r| {
            r.rlimits.remove("Max core file size");
        }),
        ("memory limit", |r| r.memory_limit_bytes = Some(u64::MAX)),
        ("limit of processes", |r| r.pids_limit = Some(1 << 20)),
        ("CPU quota", |r| r.cpu_millis = Some(2000)),
        ("first process", |r| r.is_init = false),
        ("can't be read", |r| r.undumpable = false),
        ("socket(AF_VSOCK) is refused", |r| {
            r.probes.insert("socket(AF_VSOCK)".into(), 0);
        }),
        ("pidfd_getfd was tried", |r| {
            r.probes.remove("pidfd_getfd");
        }),
    ];
    for (name, change) in changes {
        let body = locked();
        let mut seen = report();
        change(&mut seen);
        let found = attest(&body, UID, &as_shown(&body), &seen, &HostFacts::default(), &View::default());
        assert!(found.iter().any(|f| f.contains(name)), "{name} was taken away: {found:?}");
    }
}

/// What a guest reports under gVisor, which was started with `--oci-seccomp`; taken from a real one.
fn gvisors_report() -> Report {
    let folder = |point: &str, options: &str| SeenMount {
        point: point.to_owned(),
        fstype: "tmpfs".to_owned(),
        options: format!("{options},mode=0700,uid={UID},gid={UID}").split(',').map(str::to_owned).collect(),
    };
    let mut seen = report();
    seen.capabilities.remove("CapAmb");
    (seen.memory_limit_bytes, seen.pids_limit, seen.cpu_millis) = (None, None, None);
    seen.mounts.retain(|m| m.fstype != "tmpfs" || m.point == "/dev");
    seen.mounts.extend([
        folder("/tmp", "rw,noexec,rw,size=67108864"),
        folder("/workspace", "rw,rw,size=536870912"),
        folder("/dev/shm", "rw,noexec,rw,size=67108864"),
        folder("/run/cellblock", "rw,noexec,rw,size=1048576"),
    ]);
    seen
}

#[test]
fn what_is_forgone_is_not_looked_for_and_nothing_else() {
    let body = locked();
    let look = |seen: &Report, kind, forgone: &[Lock]| {
        let view = View { kind, forgone: forgone.iter().copied().collect() };
        attest(&body, UID, &as_shown(&body), seen, &HostFacts::default(), &view)
    };
    let forgone = [Lock::TmpfsInodes, Lock::MountFlags];
    let seen = gvisors_report();
    assert_eq!(look(&seen, Kind::Gvisor, &forgone), Vec::<String>::new());
    assert!(look(&seen, Kind::Linux, &forgone).iter().any(|m| m.contains("CapAmb")));
    assert!(look(&seen, Kind::Gvisor, &forgone[..1]).iter().any(|m| m.contains("nosuid")));
    assert!(look(&seen, Kind::Gvisor, &forgone[1..]).iter().any(|m| m.contains("nr_inodes")));
    type Change = fn(&mut Report);
    let changes: [(&str, Change); 5] = [
        ("Seccomp", |r| r.seccomp = Some(0)),
        ("size=65536k", |r| r.mounts.iter_mut().for_each(|m| m.options.retain(|o| !o.starts_with("size=")))),
        ("noexec", |r| r.mounts.iter_mut().for_each(|m| m.options.retain(|o| o != "noexec"))),
        ("CapBnd", |r| {
            r.capabilities.remove("CapBnd");
        }),
        ("interfaces", |r| r.interfaces.push("eth0".into())),
    ];
    for (name, change) in changes {
        let mut seen = gvisors_report();
        change(&mut seen);
        let found = look(&seen, Kind::Gvisor, &forgone);
        assert!(found.iter().any(|f| f.contains(name)), "{name} was taken away: {found:?}");
    }
}

#[test]
fn a_limit_that_the_engine_dropped_is_missed_unless_it_is_forgone() {
    let body = locked();
    let mut shown = as_shown(&body);
    shown.host_config.as_mut().expect("a host configuration").memory_swap = Some(-1);
    let look = |forgone: &[Lock]| {
        let view = View { kind: Kind::Linux, forgone: forgone.iter().copied().collect() };
        attest(&body, UID, &shown, &report(), &HostFacts::default(), &view)
    };
    assert!(look(&[Lock::Pids]).iter().any(|m| m.contains("MemorySwap")));
    assert_eq!(look(&[Lock::MemorySwap]), Vec::<String>::new());
}

/// As a real guest reports it under an engine with `userns-remap`.
#[test]
fn where_users_are_remapped_owners_and_devices_are_those_outside() {
    let body = locked();
    let mut seen = report();
    for option in seen.mounts.iter_mut().flat_map(|mount| mount.options.iter_mut()) {
        *option = option.replace("uid=200007", "uid=300007").replace("gid=200007", "gid=300007");
    }
    let mount = |point: &str, fstype: &str| SeenMount {
        point: point.to_owned(),
        fstype: fstype.to_owned(),
        options: vec!["rw".to_owned()],
    };
    let bound = [("/dev/null", "devtmpfs"), ("/proc/kmsg", "devtmpfs"), ("/sys/fs/cgroup/pids", "cgroup")];
    seen.mounts.extend(bound.map(|(point, fstype)| mount(point, fstype)));
    let remapped = HostFacts { remapped_users: true, uid_offset: 100_000, ..HostFacts::default() };
    let look = |seen: &Report, host: &HostFacts| {
        let body = container(&cell(), UID, Volumes::only_guest("cellblock-guest-test-0"), "test", host);
        attest(&body, UID, &as_shown(&body), seen, host, &View::default())
    };
    assert_eq!(look(&seen, &remapped), Vec::<String>::new());
    let plain = attest(&body, UID, &as_shown(&body), &seen, &HostFacts::default(), &View::default());
    assert!(
        plain.iter().any(|m| m.contains("/dev/null")) && plain.iter().any(|m| m.contains("uid=200007")),
        "{plain:?}"
    );
    for (point, fstype) in [("/dev/sda", "devtmpfs"), ("/etc/passwd", "devtmpfs"), ("/data", "ext4"), ("/x", "cgroup")]
    {
        let mut open = seen.clone();
        open.mounts.push(mount(point, fstype));
        assert!(look(&open, &remapped).iter().any(|m| m.contains(point)), "{point}");
    }
}

#[test]
fn data_is_one_more_mount_that_must_be_there_and_read_only() {
    let mut cell = cell();
    cell.data = [("maps", "/mnt/maps"), ("words", "/opt/words")]
        .map(|(name, path)| DataMount { name: name.to_owned(), path: path.to_owned() })
        .to_vec();
    let body_of = |data: [&str; 2]| {
        let data = data.map(str::to_owned);
        container(&cell, UID, Volumes { data: &data, ..Volumes::only_guest("g") }, "test", &HostFacts::default())
    };
    let body = body_of(["maps.1", "words.1"]);
    let mounts = body.host_config.as_ref().and_then(|h| h.mounts.clone()).expect("mounts");
    assert_eq!(mounts.len(), 3);
    for mount in &mounts {
        let no_copy = mount.volume_options.as_ref().and_then(|options| options.no_copy);
        assert_eq!((mount.typ, mount.read_only, no_copy), (Some(MountType::VOLUME), Some(true), Some(true)));
    }
    let label = |body: &ContainerCreateBody| body.labels.as_ref().and_then(|labels| labels.get(LABEL_SPEC).cloned());
    assert_ne!(label(&body), label(&body_of(["maps.2", "words.1"])), "another content is another cell");

    let seen_at = |points: &[(&str, &str)]| {
        let mut seen = report();
        seen.mounts.extend(points.iter().map(|(point, option)| SeenMount {
            point: (*point).to_owned(),
            fstype: "ext4".to_owned(),
            options: vec![(*option).to_owned(), "relatime".to_owned()],
        }));
        seen
    };
    let look = |shown: &ContainerInspectResponse, seen: &Report| {
        attest(&body, UID, shown, seen, &HostFacts::default(), &View::default())
    };
    let sound = seen_at(&[("/mnt/maps", "ro"), ("/opt/words", "ro")]);
    let mut shown = as_shown(&body);
    shown.mounts.as_mut().expect("mounts").reverse();
    assert_eq!(look(&shown, &sound), Vec::<String>::new(), "in any order");
    for (what, seen) in [
        ("one is missing", seen_at(&[("/mnt/maps", "ro")])),
        ("one can be written", seen_at(&[("/mnt/maps", "ro"), ("/opt/words", "rw")])),
    ] {
        assert!(look(&shown, &seen).iter().any(|m| m.contains("/opt/words")), "{what}");
    }
    let mut other = as_shown(&body);
    other.mounts.as_mut().expect("mounts")[1].name = Some("maps.2".to_owned());
    assert!(look(&other, &sound).iter().any(|m| m.contains("/Mounts")), "another volume");
}
