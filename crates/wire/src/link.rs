//! The requests of the link, and their bodies.
//!
//! The guest is an HTTP/2 server on the container's stdin and stdout, the control plane its client. Bodies are JSON unless a
//! [`frame`](crate::frame) is named. A refusal is a status of 400 or above with a [`Refusal`].
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /init` | [`Init`] | [`Hello`] |
//! | `GET /report` | | [`Report`] |
//! | `GET /kernelspecs` | | `[`[`KernelSpec`]`]` |
//! | `GET /kernels` | | names of the kernels that are there, as an array |
//! | `POST /kernels` | [`StartKernel`] | [`KernelStarted`] |
//! | `POST /kernels/{kernel}/messages` | one frame: [`Outbound`] and the message's parts | 204 |
//! | `POST /kernels/{kernel}/signal` | [`Signal`] | 204 |
//! | `DELETE /kernels/{kernel}` | | [`KernelDeleted`], once its processes are gone |
//! | `GET /events?after={seq}` | | an endless stream of frames: [`Numbered`] and the message's parts |
//! | `POST /ack` | [`Ack`] | 204 |
//! | `GET /stats` | | [`Stats`] |
//! | `… /files…` | | see [`files`](crate::files) |
//! | `POST /egress/{id}`, `DELETE /egress/{id}` | see [`egress`](crate::egress) | |
//!
//! A kernel's name is chosen by the control plane and never used again: a restart is a delete and a start under a new name, so
//! no message of the old kernel can be taken for one of the new.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where the guest's volume is mounted in every container.
pub const GUEST_DIR: &str = "/cellblock";
/// The guest's path in the container.
pub const GUEST_PATH: &str = "/cellblock/guest";
/// Our launcher for `ipykernel`, beside the guest.
pub const IPYKERNEL_LAUNCHER_PATH: &str = "/cellblock/ipykernel_launcher.py";
/// The working folder of a session.
pub const WORKDIR: &str = "/workspace";
/// Where the guest keeps the kernels' sockets and connection files: a room of its own, which no file of the code's fills.
pub const STATE_DIR: &str = "/run/cellblock";

/// The first request on every connection; says who speaks, and how the cell is set up. May come again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Init {
    /// The control plane's [`GENERATION`](crate::GENERATION).
    pub generation: u32,
    /// The guest exits after hearing nothing for this long.
    pub orphan_timeout_seconds: u64,
    /// Set for every process that the guest starts from now on. Secrets may be among them: they never stand in the container's own settings.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Whether there is a way out, so that the guest offers its proxy ([`egress`](crate::egress)) and names it in the environment.
    #[serde(default)]
    pub egress: bool,
}

/// Who answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    /// The guest's [`GENERATION`](crate::GENERATION).
    pub generation: u32,
    /// The guest's version, for people.
    pub version: String,
    /// The number of the newest event.
    pub last_seq: u64,
}

/// A refusal by the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refusal {
    /// A word for programs: `not-found`, `exists`, `invalid`, `no-kernelspec`, `spawn-failed`, `too-large`, `busy`, `failed`; of files also
    /// `is-a-directory`, `not-a-directory`, `no-space`, `permission-denied`, `precondition`, `range`, `offset`, `digest`, `archive`.
    pub code: String,
    /// A sentence for people.
    pub message: String,
    /// What goes with the code: bytes left (`no-space`), the file's size (`range`), bytes that are there (`offset`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
}

/// What the guest sees of its own confinement, for the attestation before any user code runs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Real, effective, saved and file-system uid, from `/proc/self/status`.
    pub uids: Vec<u32>,
    /// The same for groups.
    pub gids: Vec<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// `CapInh`, `CapPrm`, `CapEff`, `CapBnd`, `CapAmb`, as numbers.
    pub capabilities: BTreeMap<String, u64>,
    /// `NoNewPrivs`.
    pub no_new_privs: Option<u32>,
    /// `Seccomp` mode; 2 is a filter.
    pub seccomp: Option<u32>,
    /// Names of network interfaces.
    pub interfaces: Vec<String>,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// Soft and hard limit by name as in `/proc/self/limits` (`Max open files`, …); `None` is unlimited.
    pub rlimits: BTreeMap<String, (Option<u64>, Option<u64>)>,
    /// `memory.limit_in_bytes` or `memory.max`, where it can be read.
    pub memory_limit_bytes: Option<u64>,
    /// `pids.max`, where it can be read.
    pub pids_limit: Option<u64>,
    /// CPU time a second in thousandths of a CPU, from the cgroup's quota, where it can be read.
    pub cpu_millis: Option<u64>,
    /// Whether the guest is PID 1.
    pub is_init: bool,
    /// Whether the guest's memory and descriptors are closed to others of its uid.
    pub undumpable: bool,
    /// Errno by probed call (`socket(AF_VSOCK)`, `pidfd_getfd`, …); 0 is success.
    pub probes: BTreeMap<String, i32>,
}

/// One mount of the container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Mount {
    /// Where it is mounted.
    pub point: String,
    /// Its file system's type.
    pub fstype: String,
    /// Mount options and superblock options together.
    pub options: Vec<String>,
}

/// A kernel the image offers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KernelSpec {
    /// Its folder's name (`python3`, `ir`, `deno`, …).
    pub name: String,
    /// Its language.
    pub language: String,
    /// Its name for people.
    pub display_name: String,
    /// What other languages it runs.
    #[serde(default)]
    pub also: Vec<String>,
}

/// How the guest reaches a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Unix sockets in a private folder.
    #[default]
    Ipc,
    /// TCP on the container's loopback, for kernels that know nothing else.
    Tcp,
}

/// Starts a kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StartKernel {
    /// The control plane's name for it; lower-case letters and digits, at most 64.
    pub kernel: String,
    /// The image's kernelspec; the first one found (`python3` before others) when absent.
    #[serde(default)]
    pub kernelspec: Option<String>,
    /// How to reach it.
    #[serde(default)]
    pub transport: Transport,
    /// Added to [`Init::env`].
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working folder; [`WORKDIR`] when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// All five channels must have answered within this time, else [`Event::KernelFailed`].
    pub connect_timeout_ms: u64,
}

/// A kernel's process runs; its channels are not connected yet.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KernelStarted {
    /// The kernelspec that was used.
    pub kernelspec: String,
    /// Its language.
    pub language: String,
    /// Its name for people.
    #[serde(default)]
    pub display_name: String,
}

/// A channel of the Jupyter protocol that carries messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// Requests and their replies.
    Shell,
    /// Outputs and status.
    Iopub,
    /// Requests for input, and the answers.
    Stdin,
    /// Requests that overtake those on shell.
    Control,
}

/// The head of a message to a kernel. Parts: header, parent header, metadata, content, then buffers; the guest signs.
///
/// Messages that are sent before the channels are connected wait, in order, in a bounded queue.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outbound {
    /// Shell, stdin or control.
    pub channel: Channel,
    /// The message's id, which the guest refuses to send twice.
    pub msg_id: String,
    /// For an execution: what its outputs may cost.
    #[serde(default)]
    pub cap: Option<OutputCap>,
    /// It has a cap, and is no execution: what it does is not measured.
    #[serde(default)]
    pub is_aside: bool,
}

/// What one execution may put out. Beyond it, the guest keeps head and tail of the text and counts the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputCap {
    /// Bytes of text, for stdout and for stderr each.
    pub text_bytes: u64,
    /// Bytes of rich results and displays (their `content`), all together.
    pub result_bytes: u64,
    /// Bytes of text and results, all together.
    #[serde(default = "no_limit")]
    pub total_bytes: u64,
    /// Messages of any kind.
    pub messages: u64,
    /// Messages a second, once as many came at once: faster ones wait, and the kernel with them.
    #[serde(default = "no_limit")]
    pub messages_per_second: u64,
}

fn no_limit() -> u64 {
    u64::MAX
}

/// A kernel is gone with all its processes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelDeleted {
    /// What the execution that was under way has done, if one was.
    #[serde(default)]
    pub effects: Option<Effects>,
    /// Every process of the cell was ended, because those of the kernel could not be told from others.
    #[serde(default)]
    pub swept: bool,
    /// Other kernels that were ended with it.
    #[serde(default)]
    pub ended_kernels: Vec<String>,
    /// The number of the newest event: with it, all that the kernel has said is told.
    #[serde(default)]
    pub last_seq: u64,
}

/// What an execution has cost and changed, as far as the guest can see it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effects {
    /// Files below the working folder that are not as they were, by path; bounded.
    #[serde(default)]
    pub files: Vec<FileChange>,
    /// How many more there are, or may be.
    #[serde(default)]
    pub files_omitted: u64,
    /// Processes of the kernel that were started in the execution and still run; bounded.
    #[serde(default)]
    pub processes: Vec<Process>,
    /// How many more there are.
    #[serde(default)]
    pub processes_omitted: u64,
    /// CPU time of the kernel with all it started.
    #[serde(default)]
    pub cpu_usec: Option<u64>,
    /// Sum of the most memory that each of the kernel's living processes held.
    #[serde(default)]
    pub peak_memory_bytes: Option<u64>,
    /// Others in the cell are, or may be, counted in.
    #[serde(default)]
    pub approximate: bool,
    /// A process or thread could not be started because the cell has as many as it may.
    #[serde(default)]
    pub pids_hit: bool,
    /// A folder that can be written is full.
    #[serde(default)]
    pub disk_hit: bool,
    /// A process was ended for want of memory.
    #[serde(default)]
    pub memory_hit: bool,
    /// How many processes of the cell have been ended for want of memory since the cell began.
    #[serde(default)]
    pub oom_kills: u64,
}

/// A file that an execution has changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// Its path relative to the working folder.
    pub path: String,
    /// What became of it.
    pub change: Change,
    /// Its size; nothing when it was deleted.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// SHA-256 of its bytes in hex; nothing when it was deleted, or is too long, or changed meanwhile.
    #[serde(default)]
    pub sha256: Option<String>,
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It is new.
    Created,
    /// It is another one, or has other content.
    Changed,
    /// It is gone.
    Deleted,
}

/// A running process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id inside the cell.
    pub pid: i32,
    /// Its command line, cut.
    pub command: String,
}

/// A signal for a kernel's process group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Signal {
    /// `SIGINT`, `SIGTERM` or `SIGKILL`.
    pub signal: String,
}

/// All events up to and with this one were taken over; the guest may forget them.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Ack {
    /// The number of the newest event taken over.
    pub seq: u64,
}

/// An event and its number. Numbers rise by one from 1 in each guest's life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Numbered {
    /// The event's number.
    pub seq: u64,
    /// The kernel it is about.
    pub kernel: String,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What happens inside, in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// A message of the kernel. Parts: header, parent header, metadata, content, then buffers. Its signature was right.
    Message {
        /// Where it came from.
        channel: Channel,
        /// From its header.
        msg_type: String,
        /// From its parent header; empty where there is none.
        parent_id: String,
    },
    /// Text of a stream was left out here; what follows of this stream, before the execution's idle status, is its tail.
    Gap {
        /// The execution's `msg_id`.
        parent_id: String,
        /// What was cut.
        stream: CutStream,
        /// Bytes in all, with those left out.
        total_bytes: u64,
        /// Bytes (text) or messages' content bytes (results) left out.
        omitted_bytes: u64,
    },
    /// What an execution has done. Comes before its reply, or before the kernel's end; once for each execution.
    Effects {
        /// The execution's `msg_id`.
        parent_id: String,
        /// What it has done.
        effects: Box<Effects>,
    },
    /// Code wants a connection to the outside: see [`egress`](crate::egress). It is about no kernel.
    Egress {
        /// The guest's number for it, never used twice.
        id: u64,
        /// The host, as the code wrote it.
        host: String,
        /// The port.
        port: u16,
    },
    /// All five channels are connected, and the heartbeat came back.
    KernelConnected,
    /// A channel did not answer in time, or broke, or what came over it was no Jupyter message. The kernel was ended.
    KernelFailed {
        /// `shell`, `iopub`, `stdin`, `control` or `heartbeat`, where one of them is to blame.
        channel: Option<String>,
        /// A sentence for people.
        reason: String,
        /// The last lines of the kernel's stderr.
        stderr_tail: String,
    },
    /// The kernel's process is gone.
    KernelExited {
        /// Its exit status, if it exited.
        status: Option<i32>,
        /// The signal that ended it, if one did.
        signal: Option<i32>,
        /// How many processes of the cell the kernel's OOM killer has ended since the cell began.
        oom_kills: u64,
        /// It was ended together with another kernel, because that one's processes could not be told from others.
        #[serde(default)]
        swept: bool,
        /// The last lines of its stderr.
        stderr_tail: String,
    },
}

/// What an [`Event::Gap`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CutStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Results and displays.
    Results,
}

/// Figures of the cell's cgroup and working folder; `None` where the host shows none.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Memory in use.
    pub memory_bytes: Option<u64>,
    /// Most memory in use at any time.
    pub memory_peak_bytes: Option<u64>,
    /// CPU time used so far.
    pub cpu_usec: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Processes ended by the OOM killer.
    pub oom_kills: u64,
    /// Bytes of the working folder in use. Guests of earlier versions do not tell it.
    pub disk_bytes: Option<u64>,
}

/// Makes text fit for a path or a query; slashes stay.
#[must_use]
pub fn escape_path(path: &str) -> String {
    use std::fmt::Write as _;
    path.bytes().fold(String::new(), |mut escaped, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
        escaped
    })
}
