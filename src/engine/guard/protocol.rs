//! What crosses the guard's socket: a length of four bytes, then that much JSON, once for the request and once for the answer.
//!
//! A request has no field but those here. One more, one twice, one in other letters, or anything behind the end refuses it whole. Only a guest's report, which
//! is nothing but compared, may say more than is known. Nothing is decided here.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use cellblock_wire::link::Report;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::domain::data::DataMount;
use crate::domain::ids::InstallationId;
use crate::domain::spec::Resources;
use crate::engine::{
    CellName, CellSpec, CellState, EngineError, EngineEvent, EngineEventKind, Observed, Promised, Pull, WorkspaceName,
    WorkspaceSpec,
};

/// Both sides must have the same one.
pub(super) const VERSION: u32 = 2;
/// Most bytes of a request; a guest's report is the largest part of any.
pub(super) const MAX_REQUEST: u32 = 512 * 1024;
/// What is in hand of requests at one time, in bytes as they were announced: four of the longest, or two thousand ordinary ones.
pub(super) const ROOM: usize = 2 * 1024 * 1024;
/// A byte of a request takes up to this many while it is read: a text of one letter has four there, and takes 32 of the heap and 24 of a list that grows by
/// doubling.
pub(super) const READ_BYTES: usize = 28;
/// A request counts as no less than this many bytes.
const LEAST: u32 = 1024;
/// Most bytes of an answer; the longest lists ten thousand cells.
pub(super) const MAX_ANSWER: u32 = 8 * 1024 * 1024;

/// One call and who makes it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Request {
    /// [`VERSION`].
    pub(super) version: u32,
    /// The instance that the caller works for.
    pub(super) instance: String,
    /// What is asked.
    pub(super) call: Call,
}

/// The calls of [`Engine`](crate::engine::Engine).
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Call {
    Info,
    ResolveImage {
        reference: String,
        pull: Pull,
    },
    Prepare {
        image: String,
    },
    /// Behind the answer the connection is the cell's stream.
    Ensure {
        cell: Cell,
    },
    /// Behind the answer the connection is the cell's stream.
    Link {
        name: String,
    },
    Attest {
        cell: Cell,
        report: Box<Report>,
    },
    Pause {
        name: String,
    },
    Resume {
        name: String,
    },
    Remove {
        name: String,
    },
    Observe {
        name: String,
    },
    Claim {
        installation: String,
    },
    Release {
        installation: String,
    },
    Sweep,
    /// Data is put onto the engine and taken away where the engine is, and never through a guard.
    ListData,
    EnsureWorkspace {
        workspace: Workspace,
    },
    RemoveWorkspace {
        name: String,
    },
    ListWorkspaces,
    List,
    /// Behind the answer come [`Happened`]s, for as long as the connection lasts, from this many milliseconds after the beginning of 1970 on.
    Watch {
        since_ms: u64,
    },
}

/// A [`CellSpec`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Cell {
    name: String,
    session: String,
    image: String,
    runtime: String,
    cpu_millis: u32,
    memory_bytes: u64,
    disk_bytes: u64,
    tmp_bytes: u64,
    pids: u32,
    open_files: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    data: Vec<Data>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    workspace: Option<String>,
}

/// A [`WorkspaceSpec`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Workspace {
    name: String,
    image: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quota_bytes: Option<u64>,
}

impl From<&WorkspaceSpec> for Workspace {
    fn from(spec: &WorkspaceSpec) -> Self {
        let WorkspaceSpec { name, image, quota_bytes } = spec;
        Self { name: name.to_string(), image: image.clone(), quota_bytes: *quota_bytes }
    }
}

impl Workspace {
    /// The specification, if its name is one of this instance.
    pub(super) fn read(self, instance: &str) -> Option<WorkspaceSpec> {
        let Self { name, image, quota_bytes } = self;
        Some(WorkspaceSpec { name: workspace_name(name, instance)?, image, quota_bytes })
    }
}

/// The name of a workspace of this instance.
pub(super) fn workspace_name(text: String, instance: &str) -> Option<WorkspaceName> {
    let name = WorkspaceName::listed(text);
    name.id(instance).is_some().then_some(name)
}

/// A [`DataMount`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Data {
    name: String,
    path: String,
}

impl From<&CellSpec> for Cell {
    fn from(spec: &CellSpec) -> Self {
        let Resources { cpu_millis, memory_bytes, disk_bytes, tmp_bytes, pids, open_files } = spec.resources;
        Self {
            name: spec.name.to_string(),
            session: spec.session.to_string(),
            image: spec.image.clone(),
            runtime: spec.runtime.clone(),
            cpu_millis,
            memory_bytes,
            disk_bytes,
            tmp_bytes,
            pids,
            open_files,
            data: spec.data.iter().map(|m| Data { name: m.name.clone(), path: m.path.clone() }).collect(),
            workspace: spec.workspace.as_ref().map(ToString::to_string),
        }
    }
}

impl Cell {
    /// The specification, if its name is one of this instance, and its session's.
    pub(super) fn read(self, instance: &str) -> Option<CellSpec> {
        let name = name(self.name, instance)?;
        let session = name.session(instance).filter(|session| session.to_string() == self.session)?;
        let workspace = match self.workspace {
            Some(name) => Some(workspace_name(name, instance)?),
            None => None,
        };
        let Self { image, runtime, cpu_millis, memory_bytes, disk_bytes, tmp_bytes, pids, open_files, data, .. } = self;
        let resources = Resources { cpu_millis, memory_bytes, disk_bytes, tmp_bytes, pids, open_files };
        let data = data.into_iter().map(|Data { name, path }| DataMount { name, path }).collect();
        Some(CellSpec { name, session, image, runtime, resources, data, workspace })
    }
}

/// A name of this instance.
pub(super) fn name(text: String, instance: &str) -> Option<CellName> {
    let name = CellName::listed(text);
    name.session(instance).is_some().then_some(name)
}

/// An [`Observed`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Seen {
    name: String,
    session: Option<String>,
    state: CellState,
    promised: Option<Promised>,
}

impl From<&Observed> for Seen {
    fn from(seen: &Observed) -> Self {
        let Observed { name, session, state, promised } = seen;
        let session = session.map(|session| session.to_string());
        Self { name: name.to_string(), session, state: *state, promised: *promised }
    }
}

impl Seen {
    pub(super) fn read(self, instance: &str) -> Option<Observed> {
        let session = self.session.and_then(|session| session.parse().ok());
        Some(Observed { name: name(self.name, instance)?, session, state: self.state, promised: self.promised })
    }
}

/// An [`EngineEvent`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Happened {
    name: String,
    kind: EngineEventKind,
}

impl From<&EngineEvent> for Happened {
    fn from(event: &EngineEvent) -> Self {
        Self { name: event.name.to_string(), kind: event.kind }
    }
}

impl Happened {
    pub(super) fn read(self, instance: &str) -> Option<EngineEvent> {
        Some(EngineEvent { name: name(self.name, instance)?, kind: self.kind })
    }
}

/// An [`EngineError`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Failure {
    Absent { attempt: String, what: String },
    Conflict { attempt: String, detail: String },
    Rejected { attempt: String, detail: String },
    Unavailable { attempt: String, detail: String },
    TimedOut { attempt: String, limit_ms: u64 },
    Claimed { holder: Option<String>, remedy: String },
    Unverified { mismatches: Vec<String> },
    Unexpected { attempt: String, detail: String },
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let text = str::to_owned;
        match error {
            EngineError::Absent { attempt, what } => Self::Absent { attempt: text(attempt), what },
            EngineError::Conflict { attempt, detail } => Self::Conflict { attempt: text(attempt), detail },
            EngineError::Rejected { attempt, detail } => Self::Rejected { attempt: text(attempt), detail },
            EngineError::Unavailable { attempt, detail } => Self::Unavailable { attempt: text(attempt), detail },
            EngineError::TimedOut { attempt, limit } => {
                let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                Self::TimedOut { attempt: text(attempt), limit_ms }
            }
            EngineError::Claimed { holder, remedy } => {
                Self::Claimed { holder: holder.map(|id| id.to_string()), remedy }
            }
            EngineError::Unverified { mismatches } => Self::Unverified { mismatches },
            EngineError::Unexpected { attempt, detail } => Self::Unexpected { attempt: text(attempt), detail },
        }
    }
}

impl Failure {
    /// The error, of the same class. `attempt` is what was asked for; the step of it that failed goes into the detail.
    pub(super) fn read(self, attempt: &'static str) -> EngineError {
        let whole = |step: String, detail: String| if step == attempt { detail } else { format!("{step}: {detail}") };
        match self {
            Self::Absent { what, .. } => EngineError::Absent { attempt, what },
            Self::Conflict { attempt: step, detail } => EngineError::Conflict { attempt, detail: whole(step, detail) },
            Self::Rejected { attempt: step, detail } => EngineError::Rejected { attempt, detail: whole(step, detail) },
            Self::Unavailable { attempt: step, detail } => {
                EngineError::Unavailable { attempt, detail: whole(step, detail) }
            }
            Self::TimedOut { limit_ms, .. } => {
                EngineError::TimedOut { attempt, limit: Duration::from_millis(limit_ms) }
            }
            Self::Claimed { holder, remedy } => {
                EngineError::Claimed { holder: holder.and_then(|id| id.parse::<InstallationId>().ok()), remedy }
            }
            Self::Unverified { mismatches } => EngineError::Unverified { mismatches },
            Self::Unexpected { attempt: step, detail } => {
                EngineError::Unexpected { attempt, detail: whole(step, detail) }
            }
        }
    }
}

/// Reads one frame and what is in it. Memory is taken as bytes come, not as a length promises.
///
/// # Errors
/// Those of the connection; `InvalidData` where the frame is too long or is not what is expected.
pub(super) async fn read<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin), most: u32) -> io::Result<T> {
    let length = length(from, most).await?;
    body(from, length).await
}

/// Reads one frame once there is room for it, which it takes until the permit is dropped. Without a time limit, also for that.
///
/// # Errors
/// As for [`read`].
pub(super) async fn read_into_room<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
    most: u32,
    room: &Arc<Semaphore>,
) -> io::Result<(T, OwnedSemaphorePermit)> {
    let length = length(from, most).await?;
    let taken = Arc::clone(room).acquire_many_owned(length.max(LEAST)).await.map_err(io::Error::other)?;
    Ok((body(from, length).await?, taken))
}

async fn length(from: &mut (impl AsyncRead + Unpin), most: u32) -> io::Result<u32> {
    let length = from.read_u32().await?;
    if length > most {
        return Err(invalid(format!("a frame of {length} bytes; allowed are {most}")));
    }
    Ok(length)
}

async fn body<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin), length: u32) -> io::Result<T> {
    let mut body = vec![0; length as usize];
    from.read_exact(&mut body).await?;
    serde_json::from_slice(&body).map_err(|error| invalid(error.to_string()))
}

/// Writes one frame.
///
/// # Errors
/// Those of the connection; `InvalidData` where it would be too long.
pub(super) async fn write(to: &mut (impl AsyncWrite + Unpin), most: u32, content: &impl Serialize) -> io::Result<()> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, content).map_err(|error| invalid(error.to_string()))?;
    let length = u32::try_from(frame.len() - 4).ok().filter(|length| *length <= most);
    let length = length.ok_or_else(|| invalid(format!("{} bytes; allowed are {most}", frame.len() - 4)))?;
    frame[..4].copy_from_slice(&length.to_be_bytes());
    to.write_all(&frame).await?;
    to.flush().await
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::SessionId;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn spec() -> CellSpec {
        let session = SessionId::from_uuid(Uuid::from_u128(9));
        let resources = Resources {
            cpu_millis: 500,
            memory_bytes: 1 << 28,
            disk_bytes: 1 << 20,
            tmp_bytes: 1 << 20,
            pids: 64,
            open_files: 1024,
        };
        CellSpec {
            name: CellName::new("one", session, 3),
            session,
            image: "sha256:0".to_owned(),
            runtime: "runc".to_owned(),
            resources,
            data: vec![DataMount { name: "maps".to_owned(), path: "/mnt/maps".to_owned() }],
            workspace: Some(workspace("one")),
        }
    }

    fn workspace(instance: &str) -> WorkspaceName {
        WorkspaceName::new(instance, Uuid::from_u128(5).into())
    }

    fn parsed(text: &str) -> Result<Request, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_cell_crosses_as_it_is_and_only_under_its_own_instance_and_session() {
        let cell = Cell::from(&spec());
        let text = serde_json::to_string(&cell).unwrap();
        let read: Cell = serde_json::from_str(&text).unwrap();
        assert_eq!(read.clone().read("one"), Some(spec()));
        assert_eq!(read.clone().read("two"), None);
        let other = SessionId::from_uuid(Uuid::from_u128(10)).to_string();
        assert_eq!(Cell { session: other, ..read.clone() }.read("one"), None);
        let foreign = Some(workspace("two").to_string());
        assert_eq!(Cell { workspace: foreign, ..read }.read("one"), None, "another instance's workspace");
    }

    #[test]
    fn a_request_has_no_field_too_many_none_twice_and_none_in_other_letters() {
        let good = r#"{"version":1,"instance":"one","call":{"link":{"name":"x"}}}"#;
        assert!(parsed(good).is_ok());
        for bad in [
            r#"{"version":1,"instance":"one","call":{"link":{"name":"x","Name":"y"}}}"#,
            r#"{"version":1,"instance":"one","call":{"link":{"Name":"x"}}}"#,
            r#"{"version":1,"instance":"one","call":{"link":{"name":"x","name":"y"}}}"#,
            r#"{"version":1,"instance":"one","instance":"two","call":"list"}"#,
            r#"{"version":1,"instance":"one","call":"list","HostConfig":{"Privileged":true}}"#,
            r#"{"version":1,"instance":"one","call":{"link":{"name":"x"},"list":null}}"#,
            r#"{"version":1,"instance":"one","call":{"exec":{"name":"x"}}}"#,
            r#"{"version":1,"instance":"one","call":"LIST"}"#,
            r#"{"version":1,"instance":"one","call":"list"} {}"#,
            r#"{"version":-1,"instance":"one","call":"list"}"#,
            r#"{"version":1,"call":"list"}"#,
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
        let cell = serde_json::to_string(&Cell::from(&spec())).unwrap();
        for (from, to) in
            [("{", r#"{"privileged":true,"#), ("\"pids\":64", "\"pids\":64,\"Pids\":0"), ("64", "64,\"pids\":0")]
        {
            let bad = cell.replacen(from, to, 1);
            assert!(bad != cell && serde_json::from_str::<Cell>(&bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_frame_that_says_too_much_or_ends_early_is_refused() {
        let mut giant = (MAX_REQUEST + 1).to_be_bytes().to_vec();
        giant.extend_from_slice(b"{}");
        let refused = read::<Request>(&mut giant.as_slice(), MAX_REQUEST).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        let mut short = 100_u32.to_be_bytes().to_vec();
        short.extend_from_slice(b"{}");
        let cut = read::<Request>(&mut short.as_slice(), MAX_REQUEST).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        let long = "x".repeat(MAX_REQUEST as usize);
        let unsaid = write(&mut Vec::new(), MAX_REQUEST, &long).await.unwrap_err();
        assert_eq!(unsaid.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn requests_in_hand_have_room_for_so_many_bytes_and_wait_for_more() {
        let room = Arc::new(Semaphore::new(ROOM));
        let longest = {
            let mut frame = MAX_REQUEST.to_be_bytes().to_vec();
            let text = "x".repeat(MAX_REQUEST as usize - 2);
            frame.extend_from_slice(format!("\"{text}\"").as_bytes());
            frame
        };
        let mut held = Vec::new();
        for _ in 0..ROOM / MAX_REQUEST as usize {
            held.push(read_into_room::<String>(&mut longest.as_slice(), MAX_REQUEST, &room).await.unwrap().1);
        }
        // Who has said how much is to come waits, and nothing was taken for the rest of it.
        let (mut ours, theirs) = tokio::io::duplex(MAX_REQUEST as usize + 4);
        tokio::io::AsyncWriteExt::write_all(&mut ours, &longest).await.unwrap();
        let mut theirs = theirs;
        let mut waiting = std::pin::pin!(read_into_room::<String>(&mut theirs, MAX_REQUEST, &room));
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut waiting).await.is_err());
        held.pop();
        assert_eq!(waiting.await.unwrap().0.len(), MAX_REQUEST as usize - 2);
    }

    /// What a list of short texts takes, which is the worst that a report can be made of.
    #[test]
    fn a_byte_of_a_request_takes_no_more_than_was_reckoned() {
        for (text, heap) in [("\"\",", 0), ("\"x\",", 32), ("\"xx\",", 32)] {
            // One more than a list of this length holds.
            let texts = (1 << 16) + 1;
            let request = format!("[{}", text.repeat(texts));
            let list: Vec<String> = serde_json::from_str(&format!("{}]", request.trim_end_matches(','))).unwrap();
            // While it grows, there are the list as it was and the one of twice its length; and the request's own bytes.
            let most = list.capacity() * size_of::<String>() * 3 / 2 + texts * heap + request.len();
            assert!(request.len() <= MAX_REQUEST as usize && list.len() == texts);
            assert!(most <= READ_BYTES * request.len(), "{text}: {}", most / request.len());
        }
    }

    #[test]
    fn errors_keep_their_class_and_what_they_say() {
        let (attempt, detail) = ("creating a cell", "words".to_owned());
        let holder = Some(InstallationId::from_uuid(Uuid::from_u128(5)));
        for error in [
            EngineError::Absent { attempt, what: "image x".to_owned() },
            EngineError::Conflict { attempt, detail: detail.clone() },
            EngineError::Rejected { attempt, detail: detail.clone() },
            EngineError::Unavailable { attempt, detail: detail.clone() },
            EngineError::TimedOut { attempt, limit: Duration::from_millis(1500) },
            EngineError::Claimed { holder, remedy: detail.clone() },
            EngineError::Unverified { mismatches: vec![detail.clone()] },
            EngineError::Unexpected { attempt, detail },
        ] {
            let text = serde_json::to_string(&Failure::from(error.clone())).unwrap();
            assert_eq!(serde_json::from_str::<Failure>(&text).unwrap().read(attempt), error);
        }
        let step = Failure::Rejected { attempt: "starting a cell".to_owned(), detail: "no".to_owned() };
        assert_eq!(step.read(attempt).to_string(), "creating a cell: the engine refused: starting a cell: no");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(read::<Request>(&mut bytes.as_slice(), MAX_REQUEST));
        }
    }
}
