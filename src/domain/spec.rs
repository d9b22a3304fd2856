//! What a session may be: templates with their ceilings, what a caller asks for, and the specification that results.
//!
//! [`resolve`] is the only way to a [`SessionSpec`], so that inside there is nothing to check again. Nothing is clamped
//! silently: what is above a ceiling is refused with its field and the ceiling.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::data::DataMount;
use super::egress::{Network, NetworkOffer, NetworkRequest};
use super::lock::Lock;
use super::ports::Ports;
use super::workspace::{WorkspaceOffer, WorkspaceUse};

/// Bytes in a MiB.
pub const MIB: u64 = 1024 * 1024;

/// A mistake in one field of a request or configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// JSON pointer of the field.
    pub pointer: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl FieldError {
    /// A mistake at a JSON pointer.
    pub fn new(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), message: message.into() }
    }
}

/// What a cell may use of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// CPU time a second, in thousandths of a CPU.
    pub cpu_millis: u32,
    /// Memory with everything in it: processes, working folder, temporary files.
    pub memory_bytes: u64,
    /// Size of the working folder.
    pub disk_bytes: u64,
    /// Size of the folder for temporary files.
    pub tmp_bytes: u64,
    /// Processes and threads.
    pub pids: u32,
    /// Open files of one process.
    pub open_files: u32,
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// A session without a running execution ends after this long, or is paused.
    pub idle: Duration,
    /// A session ends at this age, whatever it does.
    pub lifetime: Duration,
    /// An execution is interrupted after this long.
    pub execution: Duration,
    /// A paused session ends after this long if nothing is asked of it.
    pub paused: Duration,
}

/// What becomes of a session that was idle for its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnIdle {
    /// It ends.
    #[default]
    Delete,
    /// It is paused, and ends when it was paused for its time.
    Pause,
    /// Nothing: it is there until it expires.
    Keep,
}

/// What becomes of a session that has expired, by its age or by what was last said of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnExpiry {
    /// It ends.
    #[default]
    Delete,
    /// It is paused as soon as nothing runs in it, and ends when it was paused for its time. What is asked of it later resumes it for as long again. At the
    /// greatest age that its template allows it ends all the same.
    Pause,
}

/// How the guest reaches a template's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelTransport {
    /// Unix sockets.
    #[default]
    Ipc,
    /// TCP on the container's loopback.
    Tcp,
}

/// What one execution may put out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputLimits {
    /// Bytes of stdout and of stderr, each.
    pub text_bytes: u64,
    /// Bytes of rich results and displays, all together.
    pub result_bytes: u64,
    /// Bytes of text and results, all together.
    pub total_bytes: u64,
    /// Messages of any kind.
    pub messages: u64,
    /// Messages a second, after as many at once: faster ones wait, and the code with them.
    pub messages_per_second: u64,
}

/// What a session does when its kernel dies by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnKernelDeath {
    /// It goes on with a new one.
    #[default]
    Restart,
    /// It ends.
    End,
}

/// What a session does when the guest in its container does not answer any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnGuestLost {
    /// It ends.
    #[default]
    End,
    /// It goes on in a new container, without its files.
    Replace,
}

/// How many sessions of a template are made before anybody asks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolSize {
    /// At least.
    pub min: u32,
    /// At most, when many were asked for lately; with 0 there is no pool.
    pub max: u32,
}

/// Sessions of one kind that are made before anybody asks for them.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolPlan {
    /// What they are: what a caller gets who asks for the same.
    pub request: SessionRequest,
    /// How many there are.
    pub size: PoolSize,
}

/// An image and its limits, as an operator writes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// For people.
    pub description: String,
    /// The image: a reference that the engine knows, or can pull.
    pub image: String,
    /// The engine's runtime (`runc`, `runsc`, …); the engine's default when empty.
    pub runtime: String,
    /// What of a cell's locks its runtime or its host need not enforce.
    pub accept_unenforced: BTreeSet<Lock>,
    /// The image's kernelspec; the guest chooses when empty.
    pub kernelspec: String,
    /// How its kernels are reached.
    pub transport: KernelTransport,
    /// Set for every process.
    pub env: BTreeMap<String, String>,
    /// What a session gets when nothing is asked for.
    pub default_resources: Resources,
    /// The ceilings.
    pub max_resources: Resources,
    /// The same for times.
    pub default_timeouts: Timeouts,
    /// The ceilings of times.
    pub max_timeouts: Timeouts,
    /// What an execution may put out; also the ceiling.
    pub output: OutputLimits,
    /// What sessions may reach.
    pub network: NetworkOffer,
    /// Ports in their containers that callers may reach.
    pub ports: Ports,
    /// Data that they find in their containers.
    pub data: Vec<DataMount>,
    /// Their working folder, which is also their home: see [`check_workdir`](super::data::check_workdir).
    pub workdir: String,
    /// Working folders that outlive sessions, if there are any.
    pub workspace: Option<WorkspaceOffer>,
    /// Whether these may grow without a limit that the host enforces.
    pub accept_unlimited_workspace: bool,
    /// Code that prepares every kernel before it is ready; none when empty.
    pub setup: String,
    /// What happens when a kernel dies by itself.
    pub on_kernel_death: OnKernelDeath,
    /// What happens when a guest does not answer.
    pub on_guest_lost: OnGuestLost,
    /// Sessions that are made before anybody asks for them.
    pub pools: Vec<PoolPlan>,
    /// What happens to a session that is idle, if its caller does not say.
    pub on_idle: OnIdle,
}

/// What a caller asks for; everything is optional.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SessionRequest {
    /// A template's name.
    pub template: Option<String>,
    /// A name, unique among the tenant's live sessions.
    pub name: Option<String>,
    /// Give the live session of this name instead of a refusal.
    pub reuse: bool,
    /// Added to the template's environment.
    pub env: BTreeMap<String, String>,
    /// Code that prepares every kernel, after the template's.
    pub setup: Option<String>,
    /// For finding sessions again.
    pub labels: BTreeMap<String, String>,
    /// CPUs.
    pub cpu: Option<f64>,
    /// MiB.
    pub memory_mb: Option<u64>,
    /// MiB.
    pub disk_mb: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Seconds.
    pub idle_seconds: Option<f64>,
    /// Seconds.
    pub lifetime_seconds: Option<f64>,
    /// Seconds.
    pub execution_seconds: Option<f64>,
    /// Seconds.
    pub paused_seconds: Option<f64>,
    /// What happens when it is idle.
    pub on_idle: Option<OnIdle>,
    /// What happens when it expires.
    pub on_expiry: OnExpiry,
    /// What its caller wants kept with it.
    pub metadata: BTreeMap<String, String>,
    /// The name of a working folder that outlives it.
    pub workspace: Option<String>,
    /// What it is to reach.
    pub network: NetworkRequest,
    /// What is installed before it is given to its caller.
    pub packages: Vec<String>,
    /// Files that are there before anything runs in it.
    pub files: Arc<[NewFile]>,
}

/// A file that a session begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewFile {
    /// Its path: see [`is_file_path`].
    pub path: String,
    /// Its bytes.
    pub content: Arc<[u8]>,
}

/// A specification that holds every rule.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionSpec {
    /// The template it came from.
    pub template: String,
    /// The engine's id of the image.
    pub image: String,
    /// The engine's runtime.
    pub runtime: String,
    /// The image's kernelspec.
    pub kernelspec: Option<String>,
    /// How kernels are reached.
    pub transport: KernelTransport,
    /// The caller's name for it.
    pub name: Option<String>,
    /// Set for every process.
    pub env: BTreeMap<String, String>,
    /// For finding it again.
    pub labels: BTreeMap<String, String>,
    /// What it may use.
    pub resources: Resources,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// The ceiling for one execution's own time limit.
    pub max_execution: Duration,
    /// The ceiling for a renewed age, counted from its creation.
    pub max_lifetime: Duration,
    /// The ceiling for a changed idle time.
    pub max_idle: Duration,
    /// What an execution may put out.
    pub output: OutputLimits,
    /// What it may reach, `initial`ly and when it is changed.
    pub network: NetworkOffer,
    /// Ports in its container that callers may reach.
    pub ports: Ports,
    /// Data that it finds in its container.
    pub data: Vec<DataMount>,
    /// Its working folder, which is also its home.
    pub workdir: String,
    /// Its working folder, if that outlives it.
    pub workspace: Option<WorkspaceUse>,
    /// Codes that prepare every kernel, in order.
    pub setup: Arc<[String]>,
    /// What happens when a kernel dies by itself.
    pub on_kernel_death: OnKernelDeath,
    /// What happens when its guest does not answer.
    pub on_guest_lost: OnGuestLost,
    /// What happens when it is idle.
    pub on_idle: OnIdle,
    /// What happens when it expires.
    pub on_expiry: OnExpiry,
    /// What its caller wants kept with it. Nothing is found by it here.
    pub metadata: BTreeMap<String, String>,
}

/// The working folder where a template names none.
pub const WORKDIR: &str = "/workspace";
/// Longest setup code, in bytes.
pub const MAX_SETUP: usize = 256 * 1024;
/// Most entries in `env` and `labels`, each.
pub const MAX_ENTRIES: usize = 64;
/// Longest value of an `env` entry, in bytes.
pub const MAX_ENV_VALUE: usize = 32 * 1024;
/// Most bytes of an environment, names and values together: the guest takes it in one small request.
pub const MAX_ENV: usize = 256 * 1024;
/// Longest name and longest value in `metadata`, and most bytes of all together.
pub const MAX_METADATA: (usize, usize, usize) = (256, 4096, 64 * 1024);
/// Most files that a session begins with, and most bytes of them together.
pub const MAX_NEW_FILES: (usize, usize) = (100, 16 * 1024 * 1024);
/// Memory that a kernel needs beside its files, in bytes.
pub const KERNEL_FLOOR: u64 = 48 * MIB;

/// Environment names that would change how the interpreter or the loader starts, so that a caller can't set them.
const RESERVED_ENV: [&str; 3] = ["LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH"];

/// Makes a specification of a template and a request.
///
/// # Errors
/// All mistakes at once, each with its field and what is allowed.
pub fn resolve(template: &Template, request: &SessionRequest) -> Result<SessionSpec, Vec<FieldError>> {
    let mut errors = Vec::new();
    check_name(request.name.as_deref(), &mut errors);
    check_env(&request.env, &mut errors);
    check_labels(&request.labels, &mut errors);
    check_metadata(&request.metadata, &mut errors);
    if let Some(setup) = request.setup.as_ref().filter(|setup| setup.len() > MAX_SETUP) {
        errors.push(FieldError::new("/setup", format!("{} bytes; allowed are {MAX_SETUP}", setup.len())));
    }
    let resources = resolve_resources(template, request, &mut errors);
    check_files(&request.files, (&template.workdir, resources.disk_bytes), &mut errors);
    let timeouts = resolve_timeouts(template, request, &mut errors);
    let network = template.network.choose(&template.network.initial, &request.network);
    let network = network.unwrap_or_else(|wrong| {
        errors.extend(wrong);
        Network::default()
    });
    errors.extend(template.network.packages.choose(&request.packages).err().unwrap_or_default());
    let workspace = resolve_workspace(template, request).unwrap_or_else(|wrong| {
        errors.push(wrong);
        None
    });
    if !errors.is_empty() {
        return Err(errors);
    }
    let mut env = template.env.clone();
    env.extend(request.env.clone());
    Ok(SessionSpec {
        template: template.name.clone(),
        image: template.image.clone(),
        runtime: template.runtime.clone(),
        kernelspec: Some(template.kernelspec.clone()).filter(|k| !k.is_empty()),
        transport: template.transport,
        name: request.name.clone(),
        env,
        labels: request.labels.clone(),
        resources,
        timeouts,
        max_execution: template.max_timeouts.execution,
        max_lifetime: template.max_timeouts.lifetime,
        max_idle: template.max_timeouts.idle,
        output: template.output,
        network: NetworkOffer { initial: network, ..template.network.clone() },
        ports: template.ports.clone(),
        data: template.data.clone(),
        workdir: template.workdir.clone(),
        workspace,
        setup: [&template.setup].into_iter().chain(&request.setup).filter(|s| !s.trim().is_empty()).cloned().collect(),
        on_kernel_death: template.on_kernel_death,
        on_guest_lost: template.on_guest_lost,
        on_idle: request.on_idle.unwrap_or(template.on_idle),
        on_expiry: request.on_expiry,
        metadata: request.metadata.clone(),
    })
}

fn resolve_workspace(template: &Template, request: &SessionRequest) -> Result<Option<WorkspaceUse>, FieldError> {
    let Some(name) = &request.workspace else { return Ok(None) };
    let wrong = |message: String| FieldError::new("/workspace", message);
    let offer = template.workspace.ok_or_else(|| {
        wrong(format!(
            "template \"{}\" has no workspaces that outlive sessions; leave it out, or name a template whose `workspace` is \"volume\"",
            template.name
        ))
    })?;
    offer.choose(name).map(Some).map_err(wrong)
}

fn resolve_resources(template: &Template, request: &SessionRequest, errors: &mut Vec<FieldError>) -> Resources {
    let (default, max) = (&template.default_resources, &template.max_resources);
    let mut whole = |field: &str, asked: Option<u64>, unit: u64, default: u64, least: u64, most: u64| {
        let Some(asked) = asked else { return default };
        let (least, most) = (least / unit, most / unit);
        if asked < least || asked > most {
            errors.push(FieldError::new(
                format!("/resources/{field}"),
                format!("{asked} was asked for; template \"{}\" allows {least} to {most}", template.name),
            ));
        }
        asked.saturating_mul(unit)
    };
    let memory_bytes =
        whole("memory_mb", request.memory_mb, MIB, default.memory_bytes, KERNEL_FLOOR + 16 * MIB, max.memory_bytes);
    let disk_bytes = whole("disk_mb", request.disk_mb, MIB, default.disk_bytes, MIB, max.disk_bytes);
    let pids = whole("pids", request.pids, 1, default.pids.into(), 24, max.pids.into());
    let cpu_millis = resolve_cpu(template, request.cpu, errors);
    let asked_space = request.memory_mb.is_some() || request.disk_mb.is_some();
    let tmp_bytes = default.tmp_bytes.min(max.tmp_bytes);
    if asked_space && disk_bytes.saturating_add(tmp_bytes).saturating_add(KERNEL_FLOOR) > memory_bytes {
        errors.push(FieldError::new(
            "/resources/disk_mb",
            format!(
                "files are kept in memory: {} MiB of disk, {} MiB of temporary space and {} MiB for a kernel don't fit into {} MiB of memory",
                disk_bytes / MIB,
                tmp_bytes / MIB,
                KERNEL_FLOOR / MIB,
                memory_bytes / MIB
            ),
        ));
    }
    Resources {
        cpu_millis,
        memory_bytes,
        disk_bytes,
        tmp_bytes,
        pids: u32::try_from(pids).unwrap_or(u32::MAX),
        open_files: default.open_files,
    }
}

fn resolve_cpu(template: &Template, asked: Option<f64>, errors: &mut Vec<FieldError>) -> u32 {
    let Some(asked) = asked else { return template.default_resources.cpu_millis };
    let most = f64::from(template.max_resources.cpu_millis) / 1000.0;
    if !(0.05..=most).contains(&asked) {
        errors.push(FieldError::new(
            "/resources/cpu",
            format!("{asked} was asked for; template \"{}\" allows 0.05 to {most}", template.name),
        ));
        return template.default_resources.cpu_millis;
    }
    (asked * 1000.0).round() as u32
}

fn resolve_timeouts(template: &Template, request: &SessionRequest, errors: &mut Vec<FieldError>) -> Timeouts {
    let (default, max) = (&template.default_timeouts, &template.max_timeouts);
    let mut resolve = |field: &str, asked: Option<f64>, default: Duration, most: Duration| {
        let Some(asked) = asked else { return default };
        seconds_within(asked, most).unwrap_or_else(|message| {
            errors.push(FieldError::new(format!("/timeouts/{field}"), message));
            default
        })
    };
    Timeouts {
        idle: resolve("idle_seconds", request.idle_seconds, default.idle, max.idle),
        lifetime: resolve("lifetime_seconds", request.lifetime_seconds, default.lifetime, max.lifetime),
        execution: resolve("execution_seconds", request.execution_seconds, default.execution, max.execution),
        paused: resolve("paused_seconds", request.paused_seconds, default.paused, max.paused),
    }
}

/// A number of seconds as a duration, above zero and up to a ceiling.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn seconds_within(asked: f64, most: Duration) -> Result<Duration, String> {
    if asked > 0.0 && asked <= most.as_secs_f64() {
        Ok(Duration::from_secs_f64(asked))
    } else {
        Err(format!("{asked} was asked for; allowed is more than 0, up to {}", most.as_secs_f64()))
    }
}

/// Whether a text may name a session: 1 to 64 of letters, digits, `.`, `_` and `-`.
#[must_use]
pub fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

fn check_name(name: Option<&str>, errors: &mut Vec<FieldError>) {
    if name.is_some_and(|n| !is_name(n)) {
        errors.push(FieldError::new("/name", "allowed are 1 to 64 letters, digits, \".\", \"_\" and \"-\""));
    }
}

/// Whether a text is the path of a file in a session: names of at most 255 bytes between single slashes, none of them `.` or `..`. It is relative to the
/// working folder, or absolute.
#[must_use]
pub fn is_file_path(path: &str) -> bool {
    let names = path.strip_prefix('/').unwrap_or(path);
    let is_name = |name: &str| !matches!(name, "" | "." | "..") && name.len() <= 255;
    path.len() <= 4095 && !path.contains('\0') && names.split('/').all(is_name)
}

fn check_files(files: &[NewFile], (workdir, disk): (&str, u64), errors: &mut Vec<FieldError>) {
    let bytes: usize = files.iter().map(|file| file.content.len()).sum();
    let most = MAX_NEW_FILES.1.min(usize::try_from(disk).unwrap_or(usize::MAX));
    if files.len() > MAX_NEW_FILES.0 || bytes > most {
        let is = format!("{} files with {bytes} bytes in all", files.len());
        let allowed = format!("allowed are {} with {most}; send others once the session is ready", MAX_NEW_FILES.0);
        errors.push(FieldError::new("/files", format!("{is}; {allowed}")));
    }
    let mut seen = BTreeSet::new();
    for (number, file) in files.iter().enumerate() {
        let pointer = format!("/files/{number}/path");
        if !is_file_path(&file.path) {
            let allowed = "allowed are names of at most 255 bytes between single slashes, none of them \".\" or \"..\"";
            errors.push(FieldError::new(pointer, allowed));
        } else if file.path.starts_with('/') && ![workdir, "/tmp"].into_iter().any(|root| is_below(&file.path, root)) {
            errors.push(FieldError::new(pointer, format!("an absolute path is below {workdir} or /tmp")));
        } else if !seen.insert(&file.path) {
            errors.push(FieldError::new(pointer, "another file has the same path"));
        }
    }
}

fn is_below(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

/// Checks what a caller wants kept with a session.
fn check_metadata(metadata: &BTreeMap<String, String>, errors: &mut Vec<FieldError>) {
    let (longest_name, longest_value, most) = MAX_METADATA;
    let bytes: usize = metadata.iter().map(|(name, value)| name.len() + value.len()).sum();
    if metadata.len() > MAX_ENTRIES || bytes > most {
        let is = format!("{} entries with {bytes} bytes in all", metadata.len());
        errors.push(FieldError::new("/metadata", format!("{is}; allowed are {MAX_ENTRIES} with {most}")));
    }
    for (name, _) in metadata
        .iter()
        .filter(|(name, value)| !(1..=longest_name).contains(&name.len()) || value.len() > longest_value)
        .take(MAX_ENTRIES)
    {
        let pointer = format!("/metadata/{}", escape_pointer(&name[..name.floor_char_boundary(longest_name)]));
        let message = format!("a name has 1 to {longest_name} bytes, a value at most {longest_value}");
        errors.push(FieldError::new(pointer, message));
    }
}

/// Checks an environment that a caller gives.
pub fn check_env(env: &BTreeMap<String, String>, errors: &mut Vec<FieldError>) {
    if env.len() > MAX_ENTRIES {
        errors.push(FieldError::new("/env", format!("{} entries; allowed are {MAX_ENTRIES}", env.len())));
    }
    let bytes: usize = env.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > MAX_ENV {
        errors.push(FieldError::new("/env", format!("{bytes} bytes in all; allowed are {MAX_ENV}")));
    }
    for (name, value) in env {
        let well_formed = !name.is_empty()
            && name.len() <= 128
            && name
                .bytes()
                .enumerate()
                .all(|(i, b)| b == b'_' || b.is_ascii_alphabetic() || (i > 0 && b.is_ascii_digit()));
        let pointer = || format!("/env/{}", escape_pointer(name));
        if !well_formed {
            errors.push(FieldError::new(pointer(), "a name is letters, digits and \"_\", no digit first, at most 128"));
        } else if RESERVED_ENV.contains(&name.as_str()) {
            errors.push(FieldError::new(pointer(), "is reserved"));
        }
        if value.len() > MAX_ENV_VALUE || value.contains('\0') {
            errors.push(FieldError::new(
                pointer(),
                format!("a value has at most {MAX_ENV_VALUE} bytes, none of them zero"),
            ));
        }
    }
}

/// Checks the labels that a caller gives.
pub fn check_labels(labels: &BTreeMap<String, String>, errors: &mut Vec<FieldError>) {
    if labels.len() > MAX_ENTRIES {
        errors.push(FieldError::new("/labels", format!("{} entries; allowed are {MAX_ENTRIES}", labels.len())));
    }
    for (name, value) in labels {
        if !is_name(name) || value.len() > 256 || value.chars().any(char::is_control) {
            errors.push(FieldError::new(
                format!("/labels/{}", escape_pointer(name)),
                "a label's name is 1 to 64 letters, digits, \".\", \"_\" and \"-\", its value at most 256 bytes without control characters",
            ));
        }
    }
}

/// One reference token of a JSON pointer (RFC 6901, section 3).
#[must_use]
pub fn escape_pointer(token: &str) -> String {
    token.replace('~', "~0").replace('/', "~1")
}
