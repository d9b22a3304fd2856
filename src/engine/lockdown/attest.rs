//! Whether a running cell is locked as it was asked to be: what the engine shows and what the guest reports, field by field.
//!
//! Pure comparison. Everything that was not asked for must be empty, so a field that nobody thought of counts as a difference.

use std::collections::BTreeMap;

use bollard::models::{ContainerCreateBody, ContainerInspectResponse};
use cellblock_wire::link::{GUEST_DIR, Mount, Report};
use serde_json::{Map, Value};

use super::runtime::{Kind, View};
use super::{HostFacts, paths};
use crate::domain::lock::Lock;

/// What an engine shows although nobody asked for it, and which opens nothing.
const SHOWN_UNASKED: [&str; 4] = [
    // The default runtime, by its name.
    "/HostConfig/Runtime",
    // What the image says of itself; without a network, ports mean nothing.
    "/Config/ExposedPorts",
    "/Config/Shell",
    "/Config/ArgsEscaped",
];

/// Devices that some kernels put into every network namespace. They are down and can't be configured without a capability.
const FALLBACK_TUNNELS: [&str; 9] =
    ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];

/// Mounts that may be writable besides those that were asked for: the kernel's own, where file permissions and capabilities
/// rule.
const WRITABLE_BY_KERNEL: [&str; 5] = ["/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys/fs/cgroup"];

/// Devices that every container has, and that do nothing to the machine.
const DEVICES: [&str; 6] = ["/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero"];

/// Names in `/proc/self/limits` of what Docker calls by other names.
const LIMIT_NAMES: [(&str, &str); 6] = [
    ("core", "Max core file size"),
    ("nofile", "Max open files"),
    ("fsize", "Max file size"),
    ("memlock", "Max locked memory"),
    ("msgqueue", "Max msgqueue size"),
    ("sigpending", "Max pending signals"),
];

/// Where the engine shows a lock.
const HOST_FIELDS: [(Lock, &str); 6] = [
    (Lock::Memory, "Memory"),
    (Lock::Memory, "MemorySwap"),
    (Lock::Memory, "OomKillDisable"),
    (Lock::MemorySwap, "MemorySwap"),
    (Lock::MemorySwap, "MemorySwappiness"),
    (Lock::Pids, "PidsLimit"),
];

/// Calls that a guest must have tried: the one reaches the machine's hypervisor, the other is refused by nothing but our profile.
const REQUIRED_PROBES: [&str; 2] = ["socket(AF_VSOCK)", "pidfd_getfd"];

/// Every difference between a container that was asked for and the one that runs, each beginning with the field's name.
#[must_use]
pub fn attest(
    body: &ContainerCreateBody,
    uid: u32,
    inspected: &ContainerInspectResponse,
    report: &Report,
    host: &HostFacts,
    view: &View,
) -> Vec<String> {
    let mut found = Differences(Vec::new());
    compare_config(&mut found, body, inspected, view);
    compare_state(&mut found, body, inspected, host);
    compare_identity(&mut found, uid, report, view);
    compare_limits(&mut found, body, report, view);
    compare_mounts(&mut found, body, report, host, view);
    compare_surface(&mut found, report);
    found.0
}

struct Differences(Vec<String>);

impl Differences {
    fn expect<T: PartialEq + std::fmt::Debug>(&mut self, field: &str, asked: &T, shown: &T) {
        if asked != shown {
            self.0.push(format!("{field}: asked for {asked:?}, found {shown:?}"));
        }
    }

    fn require(&mut self, holds: bool, field: &str, found: impl std::fmt::Debug) {
        if !holds {
            self.0.push(format!("{field}: found {found:?}"));
        }
    }
}

fn compare_config(
    found: &mut Differences,
    body: &ContainerCreateBody,
    inspected: &ContainerInspectResponse,
    view: &View,
) {
    let (mut asked_host, mut shown_host) = (object(&body.host_config), object(&inspected.host_config));
    // What the engine can't have enforced it shows as not asked for.
    for (lock, field) in HOST_FIELDS {
        if !view.requires(lock) {
            asked_host.remove(field);
            shown_host.remove(field);
        }
    }
    compare_fields(found, "/HostConfig", &asked_host, &shown_host);
    let mut asked = object(&Some(body));
    asked.remove("HostConfig");
    asked.remove("NetworkingConfig");
    let mut shown = object(&inspected.config);
    // The image's variables and labels are added by the engine; ours must be among them.
    for field in ["Env", "Labels"] {
        let (ours, all) = (asked.remove(field).unwrap_or_default(), shown.remove(field).unwrap_or_default());
        found.require(is_within(&ours, &all), &format!("/Config/{field}"), &all);
    }
    compare_fields(found, "/Config", &asked, &shown);
}

fn object<T: serde::Serialize>(part: &Option<T>) -> Map<String, Value> {
    match serde_json::to_value(part) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

fn compare_fields(found: &mut Differences, place: &str, asked: &Map<String, Value>, shown: &Map<String, Value>) {
    let names: std::collections::BTreeSet<_> = asked.keys().chain(shown.keys()).collect();
    for name in names {
        let (asked, shown) = (asked.get(name).unwrap_or(&Value::Null), shown.get(name).unwrap_or(&Value::Null));
        let field = format!("{place}/{name}");
        let tolerated = asked.is_null() && SHOWN_UNASKED.contains(&field.as_str());
        if !tolerated && !is_same(asked, shown) {
            found.0.push(format!("{field}: asked for {}, found {}", brief(asked), brief(shown)));
        }
    }
}

/// Long values (a profile, a list of paths) by their beginning.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Equal but for order, and for how nothing is written.
fn is_same(asked: &Value, shown: &Value) -> bool {
    match (asked, shown) {
        _ if is_nothing(asked) && is_nothing(shown) => true,
        (Value::Array(asked), Value::Array(shown)) => {
            asked.len() == shown.len() && asked.iter().all(|a| shown.iter().any(|s| is_same(a, s)))
        }
        (Value::Object(asked), Value::Object(shown)) => asked
            .keys()
            .chain(shown.keys())
            .all(|name| is_same(asked.get(name).unwrap_or(&Value::Null), shown.get(name).unwrap_or(&Value::Null))),
        _ => asked == shown,
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(yes) => !yes,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        // A size of a terminal that is not there is written [0, 0].
        Value::Array(items) => items.iter().all(|item| item.as_i64() == Some(0)),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// Whether every element, or every field, is in the other one.
fn is_within(ours: &Value, all: &Value) -> bool {
    match (ours, all) {
        (Value::Array(ours), Value::Array(all)) => ours.iter().all(|one| all.contains(one)),
        (Value::Object(ours), Value::Object(all)) => ours.iter().all(|(name, value)| all.get(name) == Some(value)),
        _ => is_nothing(ours),
    }
}

/// What the engine made of it, beyond repeating the words.
fn compare_state(
    found: &mut Differences,
    body: &ContainerCreateBody,
    inspected: &ContainerInspectResponse,
    host: &HostFacts,
) {
    found.expect("/Image", &body.image, &inspected.image);
    let path = body.entrypoint.iter().flatten().next().cloned();
    found.expect("/Path", &path, &inspected.path);
    found.expect("/Args", &body.cmd.clone().unwrap_or_default(), &inspected.args.clone().unwrap_or_default());
    found.require(inspected.exec_ids.iter().flatten().count() == 0, "/ExecIDs", &inspected.exec_ids);
    let running = inspected.state.as_ref().and_then(|s| s.running);
    found.expect("/State/Running", &Some(true), &running);
    let health = inspected.state.as_ref().and_then(|s| s.health.as_ref());
    found.require(health.is_none_or(|h| h.log.iter().flatten().count() == 0), "/State/Health", health);
    if host.apparmor {
        found.expect("/AppArmorProfile", &Some("docker-default".to_owned()), &inspected.app_armor_profile);
    }

    let mut mounts: Vec<_> =
        inspected.mounts.iter().flatten().map(|m| (m.name.clone(), m.destination.clone(), m.rw)).collect();
    let asked_mounts = body.host_config.iter().flat_map(|h| h.mounts.iter().flatten());
    let mut asked: Vec<_> =
        asked_mounts.map(|m| (m.source.clone(), m.target.clone(), Some(m.read_only != Some(true)))).collect();
    // The engine shows them in any order.
    mounts.sort();
    asked.sort();
    found.expect("/Mounts", &asked, &mounts);

    let network = inspected.network_settings.clone().unwrap_or_default();
    let networks: Vec<_> = network.networks.iter().flatten().map(|(name, _)| name).filter(|n| *n != "none").collect();
    found.require(networks.is_empty(), "/NetworkSettings/Networks", &networks);
    let ports: Vec<_> = network.ports.iter().flatten().filter(|(_, bound)| bound.is_some()).collect();
    found.require(ports.is_empty(), "/NetworkSettings/Ports", &ports);
}

fn compare_identity(found: &mut Differences, uid: u32, report: &Report, view: &View) {
    found.expect("the guest's uids", &vec![uid; 4], &report.uids);
    found.expect("the guest's gids", &vec![uid; 4], &report.gids);
    found.require(report.groups.iter().all(|g| *g == uid), "the guest's groups", &report.groups);
    // gVisor has no ambient set; where there is one, it is within the permitted one.
    let ambient = (view.kind == Kind::Linux).then_some("CapAmb");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd"].into_iter().chain(ambient) {
        found.expect(&format!("the guest's {set}"), &Some(0), &report.capabilities.get(set).copied());
    }
    found.expect("the guest's NoNewPrivs", &Some(1), &report.no_new_privs);
    if view.requires(Lock::Seccomp) {
        found.expect("the guest's Seccomp", &Some(2), &report.seccomp);
    }
    found.expect("the guest is the first process", &true, &report.is_init);
    found.expect("the guest can't be read by others of its uid", &true, &report.undumpable);
}

/// Limits that the guest can't read are left to what the engine shows.
fn compare_limits(found: &mut Differences, body: &ContainerCreateBody, report: &Report, view: &View) {
    let host = body.host_config.clone().unwrap_or_default();
    let mut compare = |lock: Lock, field: &str, asked: Option<i64>, seen: Option<u64>| {
        let asked = asked.and_then(|n| u64::try_from(n).ok());
        if seen.is_some() && view.requires(lock) {
            found.expect(field, &asked, &seen);
        }
    };
    // The kernel counts pages.
    compare(
        Lock::Memory,
        "the guest's memory limit",
        host.memory.map(|bytes| bytes & !4095),
        report.memory_limit_bytes,
    );
    compare(Lock::Pids, "the guest's limit of processes", host.pids_limit, report.pids_limit);
    compare(Lock::Cpu, "the guest's CPU quota", host.nano_cpus.map(|nano| nano / 1_000_000), report.cpu_millis);

    for limit in host.ulimits.iter().flatten() {
        let docker_name = limit.name.as_deref().unwrap_or_default();
        let Some((_, name)) = LIMIT_NAMES.iter().find(|(docker, _)| *docker == docker_name) else {
            found.0.push(format!("limit {docker_name}: nobody looks whether it holds"));
            continue;
        };
        let number = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok());
        found.expect(name, &Some((number(limit.soft), number(limit.hard))), &report.rlimits.get(*name).copied());
    }
}

fn compare_mounts(
    found: &mut Differences,
    body: &ContainerCreateBody,
    report: &Report,
    machine: &HostFacts,
    view: &View,
) {
    let host = body.host_config.clone().unwrap_or_default();
    // The last mount at a place is the one that is seen.
    let mounts: BTreeMap<&str, &Mount> = report.mounts.iter().map(|m| (m.point.as_str(), m)).collect();
    let volumes = host.mounts.iter().flatten().filter_map(|volume| Some((volume.target.as_deref()?, volume)));
    let (fixed, changing): (Vec<_>, Vec<_>) = volumes.partition(|(_, volume)| volume.read_only == Some(true));
    for point in ["/", GUEST_DIR].into_iter().chain(fixed.into_iter().map(|(point, _)| point)) {
        let read_only = mounts.get(point).is_some_and(|m| is_read_only(m));
        found.require(read_only, &format!("mount {point} is read-only"), mounts.get(point));
    }
    let changing: Vec<_> = changing.into_iter().map(|(point, _)| point).collect();
    for point in &changing {
        let writable = mounts.get(point).is_some_and(|m| !is_read_only(m));
        found.require(writable, &format!("mount {point} can be written"), mounts.get(point));
    }
    let folders = host.tmpfs.clone().unwrap_or_default();
    for (point, asked) in &folders {
        match mounts.get(point.as_str()) {
            Some(mount) => compare_folder(found, point, &outside(asked, machine), mount, view),
            None => found.0.push(format!("mount {point}: not there")),
        }
    }
    let masks = host.masked_paths.unwrap_or_else(paths::masked);
    for (point, mount) in mounts {
        let known = folders.contains_key(point)
            || changing.contains(&point)
            || WRITABLE_BY_KERNEL.contains(&point)
            // A masked file is the null device, on the container's own /dev.
            || (mount.fstype == "tmpfs" && masks.iter().any(|mask| mask == point))
            || (machine.remapped_users && is_bound_for_remapped(mount, &masks));
        found.require(known || is_read_only(mount), &format!("mount {point} is not writable"), mount);
    }
}

/// Who may not make device nodes has the machine's own bound, masks among them; and the older control groups are mounted for root inside, who is nobody to
/// them.
fn is_bound_for_remapped(mount: &Mount, masks: &[String]) -> bool {
    match mount.fstype.as_str() {
        "devtmpfs" => DEVICES.contains(&mount.point.as_str()) || masks.contains(&mount.point),
        "cgroup" => mount.point.starts_with("/sys/fs/cgroup/"),
        _ => false,
    }
}

/// A folder's options as they show where users are remapped: the kernel tells owners as they are outside.
fn outside(options: &str, machine: &HostFacts) -> String {
    let one = |option: &str| match option.split_once('=') {
        Some((name @ ("uid" | "gid"), id)) => {
            format!("{name}={}", id.parse::<u32>().unwrap_or(0).saturating_add(machine.uid_offset))
        }
        _ => option.to_owned(),
    };
    options.split(',').map(one).collect::<Vec<_>>().join(",")
}

fn is_read_only(mount: &Mount) -> bool {
    mount.options.iter().any(|option| option == "ro")
}

fn compare_folder(found: &mut Differences, point: &str, asked: &str, mount: &Mount, view: &View) {
    found.expect(&format!("mount {point}, type"), &"tmpfs", &mount.fstype.as_str());
    let shown = |option: &str| mount.options.iter().any(|o| o == option || canonical(o) == option);
    for option in asked.split(',') {
        let lock = match option {
            "nosuid" | "nodev" => Some(Lock::MountFlags),
            inodes if inodes.starts_with("nr_inodes=") => Some(Lock::TmpfsInodes),
            _ => None,
        };
        if lock.is_some_and(|lock| !view.requires(lock)) {
            continue;
        }
        if option == "exec" {
            found.require(!shown("noexec"), &format!("mount {point}, exec"), &mount.options);
            continue;
        }
        let wanted = canonical(option);
        found.require(shown(&wanted), &format!("mount {point}, {wanted}"), &mount.options);
    }
}

/// An option as Linux writes it; gVisor repeats what it was given.
fn canonical(option: &str) -> String {
    match option.split_once('=') {
        Some(("size", size)) => match size.parse::<u64>() {
            Ok(bytes) => format!("size={}k", bytes.div_ceil(4096) * 4),
            Err(_) => option.to_owned(),
        },
        Some(("mode", mode)) => format!("mode={}", mode.trim_start_matches('0')),
        _ => option.to_owned(),
    }
}

fn compare_surface(found: &mut Differences, report: &Report) {
    let devices: Vec<_> = report.interfaces.iter().filter(|i| !FALLBACK_TUNNELS.contains(&i.as_str())).collect();
    found.require(devices == ["lo"], "network interfaces", &devices);
    for probe in REQUIRED_PROBES {
        found.require(report.probes.contains_key(probe), &format!("{probe} was tried"), &report.probes);
    }
    for (probe, errno) in &report.probes {
        found.require(*errno != 0, &format!("{probe} is refused"), "success");
    }
}

/// The fields that a create request and a read-back share.
#[cfg(test)]
pub(super) fn as_shown(body: &ContainerCreateBody) -> ContainerInspectResponse {
    use bollard::models::{ContainerConfig, ContainerState, HostConfig, MountPoint};

    let mut fields = object(&Some(body));
    let host: Option<HostConfig> = fields.remove("HostConfig").and_then(|h| serde_json::from_value(h).ok());
    let config: Option<ContainerConfig> = serde_json::from_value(Value::Object(fields)).ok();
    let mounts = host.iter().flat_map(|h| h.mounts.iter().flatten());
    let mounts = mounts.map(|m| MountPoint {
        name: m.source.clone(),
        destination: m.target.clone(),
        rw: Some(m.read_only != Some(true)),
        ..MountPoint::default()
    });
    ContainerInspectResponse {
        image: body.image.clone(),
        path: body.entrypoint.iter().flatten().next().cloned(),
        args: Some(vec![]),
        state: Some(ContainerState { running: Some(true), ..ContainerState::default() }),
        mounts: Some(mounts.collect()),
        config,
        host_config: host,
        ..ContainerInspectResponse::default()
    }
}
