//! An execution's records as JSON: the form only. What later servers add is optional. A kernel's JSON stands in it as a text, as it came.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::executions::{Birth, Progress, RunningRecord};
use super::form::OutputForm;
use crate::domain::execution::{AskedBy, Asker, ExecutionRequest, OnTimeout, Stdin};
use crate::domain::output::{
    BlobRef, Change, Comm, CommKind, Effects, ErrorInfo, ExecutionEvent, FileChange, JsonText, MimeBundle, MimePart,
    Process, Report, RestartCause, ResultKind, RichOutput, Status, Stop, StopStep, TextStream, Truncated,
};
use crate::domain::spec::OutputLimits;
use crate::store::moment;

pub(super) fn birth_text(birth: &Birth) -> serde_json::Result<String> {
    serde_json::to_string(&BirthForm {
        context: birth.context.to_string(),
        language: birth.language.clone(),
        created_at: birth.created_at,
        request: RequestItem(ExecutionRequest::clone(&birth.request)),
    })
}

pub(super) fn read_birth(text: &str) -> serde_json::Result<Birth> {
    let BirthForm { context, language, created_at, request } = serde_json::from_str(text)?;
    Ok(Birth { context: parsed(&context)?, language, created_at, request: Arc::new(request.0) })
}

pub(super) fn progress_text(progress: &Progress) -> serde_json::Result<String> {
    let mut text = Vec::new();
    ProgressForm::serialize(progress, &mut serde_json::Serializer::new(&mut text))?;
    String::from_utf8(text).map_err(de::Error::custom)
}

pub(super) fn read_progress(text: &str) -> serde_json::Result<Progress> {
    ProgressForm::deserialize(&mut serde_json::Deserializer::from_str(text))
}

pub(super) fn running_text(running: &RunningRecord) -> serde_json::Result<String> {
    let mut text = Vec::new();
    RunningForm::serialize(running, &mut serde_json::Serializer::new(&mut text))?;
    String::from_utf8(text).map_err(de::Error::custom)
}

pub(super) fn read_running(text: &str) -> serde_json::Result<RunningRecord> {
    RunningForm::deserialize(&mut serde_json::Deserializer::from_str(text))
}

pub(super) fn event_text(event: &ExecutionEvent) -> serde_json::Result<String> {
    let mut text = Vec::new();
    EventForm::serialize(event, &mut serde_json::Serializer::new(&mut text))?;
    String::from_utf8(text).map_err(de::Error::custom)
}

pub(super) fn read_event(text: &str) -> serde_json::Result<ExecutionEvent> {
    EventForm::deserialize(&mut serde_json::Deserializer::from_str(text))
}

pub(super) fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> serde_json::Result<T> {
    text.parse().map_err(de::Error::custom)
}

/// Makes a type of which containers can be written from one that is written with a form.
macro_rules! item {
    ($item:ident, $of:ty, $form:literal) => {
        #[derive(Serialize, Deserialize)]
        pub(super) struct $item(#[serde(with = $form)] $of);

        impl From<$of> for $item {
            fn from(of: $of) -> Self {
                Self(of)
            }
        }

        impl From<$item> for $of {
            fn from(item: $item) -> Self {
                item.0
            }
        }
    };
}

item!(RequestItem, ExecutionRequest, "RequestForm");
item!(AskedItem, AskedBy, "AskedForm");
item!(CommItem, Comm, "CommForm");
item!(JsonItem, JsonText, "JsonForm");
item!(CauseItem, RestartCause, "CauseForm");
item!(StopItem, Stop, "StopForm");
item!(FileItem, FileChange, "FileForm");
item!(ProcessItem, Process, "ProcessForm");
item!(PartItem, MimePart, "PartForm");
item!(MomentItem, Timestamp, "moment");
item!(StatusItem, Status, "StatusForm");

/// Several, each in its form.
struct Each<I>(PhantomData<I>);

impl<I> Each<I> {
    fn serialize<T: Clone, S: Serializer>(each: &[T], to: S) -> Result<S::Ok, S::Error>
    where
        I: From<T> + Serialize,
    {
        to.collect_seq(each.iter().cloned().map(I::from))
    }

    fn deserialize<'de, T, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error>
    where
        I: Into<T> + Deserialize<'de>,
    {
        Ok(Vec::<I>::deserialize(from)?.into_iter().map(I::into).collect())
    }
}

/// One or none, in its form.
pub(super) struct Maybe<I>(PhantomData<I>);

impl<I> Maybe<I> {
    pub(super) fn serialize<T: Clone, S: Serializer>(one: &Option<T>, to: S) -> Result<S::Ok, S::Error>
    where
        I: From<T> + Serialize,
    {
        one.clone().map(I::from).serialize(to)
    }

    pub(super) fn deserialize<'de, T, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error>
    where
        I: Into<T> + Deserialize<'de>,
    {
        Ok(Option::<I>::deserialize(from)?.map(I::into))
    }
}

/// Several by name, each in its form.
struct Named<I>(PhantomData<I>);

impl<I> Named<I> {
    fn serialize<T: Clone, S: Serializer>(named: &BTreeMap<String, T>, to: S) -> Result<S::Ok, S::Error>
    where
        I: From<T> + Serialize,
    {
        to.collect_map(named.iter().map(|(name, one)| (name, I::from(one.clone()))))
    }

    fn deserialize<'de, T, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, T>, D::Error>
    where
        I: Into<T> + Deserialize<'de>,
    {
        Ok(BTreeMap::<String, I>::deserialize(from)?.into_iter().map(|(name, item)| (name, item.into())).collect())
    }
}

/// Ids as texts.
mod ids {
    use super::{Deserialize, Deserializer, Serialize, Serializer, de};
    use crate::domain::ids::ContextId;

    pub(super) fn serialize<S: Serializer>(ids: &[ContextId], to: S) -> Result<S::Ok, S::Error> {
        ids.iter().map(ToString::to_string).collect::<Vec<_>>().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<ContextId>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        texts.iter().map(|text| text.parse().map_err(de::Error::custom)).collect()
    }
}

/// Bytes as texts.
mod buffers {
    use super::{BASE64, Deserialize, Deserializer, Serialize, Serializer, de};
    use base64::Engine as _;

    pub(super) fn serialize<S: Serializer>(buffers: &[Vec<u8>], to: S) -> Result<S::Ok, S::Error> {
        buffers.iter().map(|buffer| BASE64.encode(buffer)).collect::<Vec<_>>().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Vec<u8>>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        texts.iter().map(|text| BASE64.decode(text).map_err(de::Error::custom)).collect()
    }
}

#[derive(Serialize, Deserialize)]
struct BirthForm {
    context: String,
    language: String,
    #[serde(with = "moment")]
    created_at: Timestamp,
    request: RequestItem,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ExecutionRequest")]
struct RequestForm {
    code: String,
    timeout: Duration,
    silent: bool,
    store_history: bool,
    #[serde(with = "OutputForm")]
    output: OutputLimits,
    #[serde(with = "StdinForm")]
    stdin: Stdin,
    user_expressions: BTreeMap<String, String>,
    #[serde(with = "OnTimeoutForm")]
    on_timeout: OnTimeout,
    #[serde(default)]
    stop_on_error: bool,
    #[serde(default, with = "Maybe::<AskedItem>")]
    asked_by: Option<AskedBy>,
    #[serde(with = "Maybe::<CommItem>")]
    comm: Option<Comm>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "AskedBy")]
struct AskedForm {
    #[serde(with = "AskerForm")]
    asker: Asker,
    #[serde(with = "JsonForm")]
    header: JsonText,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Asker", rename_all = "snake_case")]
enum AskerForm {
    Named(String),
    Nameless(u64),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Stdin", rename_all = "snake_case")]
enum StdinForm {
    Deny,
    Lines(Vec<String>),
    Interactive,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "OnTimeout", rename_all = "snake_case")]
enum OnTimeoutForm {
    Interrupt,
    Restart,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Comm")]
struct CommForm {
    #[serde(with = "CommKindForm")]
    kind: CommKind,
    #[serde(with = "JsonForm")]
    content: JsonText,
    #[serde(with = "JsonForm")]
    metadata: JsonText,
    #[serde(with = "buffers")]
    buffers: Vec<Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "CommKind", rename_all = "snake_case")]
enum CommKindForm {
    Open,
    Message,
    Close,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "JsonText")]
struct JsonForm(String);

#[derive(Serialize, Deserialize)]
#[serde(remote = "Progress")]
struct ProgressForm {
    #[serde(with = "StatusForm")]
    status: Status,
    #[serde(with = "Maybe::<MomentItem>")]
    started_at: Option<Timestamp>,
    #[serde(with = "Maybe::<MomentItem>")]
    finished_at: Option<Timestamp>,
    #[serde(with = "ReportForm")]
    report: Report,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Status", rename_all = "snake_case")]
enum StatusForm {
    Queued,
    Running,
    Ok,
    Error,
    Timeout,
    Cancelled,
    Oom,
    KernelDied,
    InputDenied,
    Lost,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Report")]
struct ReportForm {
    execution_count: Option<u64>,
    #[serde(with = "Maybe::<CauseItem>")]
    kernel_end: Option<RestartCause>,
    #[serde(with = "Maybe::<StopItem>")]
    stop: Option<Stop>,
    detail: Option<String>,
    #[serde(with = "EffectsForm")]
    effects: Effects,
    #[serde(with = "Named::<JsonItem>")]
    user_expressions: BTreeMap<String, JsonText>,
    #[serde(with = "Each::<JsonItem>")]
    payloads: Vec<JsonText>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Stop")]
struct StopForm {
    #[serde(with = "StopStepForm")]
    step: StopStep,
    took: Duration,
    #[serde(with = "ids")]
    also_ended: Vec<crate::domain::ids::ContextId>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "StopStep", rename_all = "snake_case")]
enum StopStepForm {
    Interrupt,
    Restart,
    Replace,
    End,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Effects")]
struct EffectsForm {
    #[serde(with = "Each::<FileItem>")]
    files: Vec<FileChange>,
    files_omitted: u64,
    #[serde(with = "Each::<ProcessItem>")]
    processes: Vec<Process>,
    processes_omitted: u64,
    cpu: Option<Duration>,
    peak_memory_bytes: Option<u64>,
    approximate: bool,
    pids_hit: bool,
    disk_hit: bool,
    memory_hit: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "FileChange")]
struct FileForm {
    path: String,
    #[serde(with = "ChangeForm")]
    change: Change,
    bytes: Option<u64>,
    sha256: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Change", rename_all = "snake_case")]
enum ChangeForm {
    Created,
    Changed,
    Deleted,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Process")]
struct ProcessForm {
    pid: i32,
    command: String,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "RestartCause", rename_all = "snake_case")]
enum CauseForm {
    Timeout,
    Oom,
    Died { status: Option<i32>, signal: Option<i32> },
    Requested,
    Swept,
    GuestLost,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "RunningRecord")]
struct RunningForm {
    reply: Option<String>,
    is_idle: bool,
    lines_given: usize,
    ends_told: u32,
    asked: Option<String>,
    error_told: bool,
    memory_hit: bool,
    #[serde(with = "Maybe::<VerdictForm>")]
    verdict: Option<(Status, Timestamp)>,
    #[serde(with = "Maybe::<ReplacingForm>")]
    replacing: Option<(Status, RestartCause, String)>,
}

#[derive(Serialize, Deserialize)]
struct VerdictForm(StatusItem, MomentItem);

impl From<(Status, Timestamp)> for VerdictForm {
    fn from((status, since): (Status, Timestamp)) -> Self {
        Self(StatusItem(status), MomentItem(since))
    }
}

impl From<VerdictForm> for (Status, Timestamp) {
    fn from(VerdictForm(status, since): VerdictForm) -> Self {
        (status.0, since.0)
    }
}

#[derive(Serialize, Deserialize)]
struct ReplacingForm(StatusItem, CauseItem, String);

impl From<(Status, RestartCause, String)> for ReplacingForm {
    fn from((status, cause, words): (Status, RestartCause, String)) -> Self {
        Self(StatusItem(status), CauseItem(cause), words)
    }
}

impl From<ReplacingForm> for (Status, RestartCause, String) {
    fn from(ReplacingForm(status, cause, words): ReplacingForm) -> Self {
        (status.0, cause.0, words)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ExecutionEvent", rename_all = "snake_case")]
enum EventForm {
    Queued {
        position: usize,
    },
    Started,
    Text {
        #[serde(with = "StreamForm")]
        stream: TextStream,
        text: String,
    },
    Result(#[serde(with = "RichForm")] RichOutput),
    ResultUpdate {
        display_id: String,
        #[serde(with = "Named::<PartItem>")]
        data: MimeBundle,
        #[serde(with = "JsonForm")]
        metadata: JsonText,
    },
    OutputClear {
        wait: bool,
    },
    InputRequested {
        prompt: String,
        password: bool,
    },
    Error(#[serde(with = "ErrorForm")] ErrorInfo),
    OutputTruncated {
        #[serde(with = "TruncatedForm")]
        what: Truncated,
        omitted_bytes: u64,
        total_bytes: u64,
    },
    KernelRestarted {
        #[serde(with = "CauseForm")]
        cause: RestartCause,
    },
    Comm(#[serde(with = "CommForm")] Comm),
    Completed,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "TextStream", rename_all = "snake_case")]
enum StreamForm {
    Stdout,
    Stderr,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "RichOutput")]
struct RichForm {
    #[serde(with = "KindForm")]
    kind: ResultKind,
    #[serde(with = "Named::<PartItem>")]
    data: MimeBundle,
    #[serde(with = "JsonForm")]
    metadata: JsonText,
    display_id: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ResultKind", rename_all = "snake_case")]
enum KindForm {
    ExecuteResult,
    DisplayData,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "MimePart", rename_all = "snake_case")]
enum PartForm {
    Inline(#[serde(with = "JsonForm")] JsonText),
    Blob(#[serde(with = "BlobForm")] BlobRef),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "BlobRef")]
struct BlobForm {
    number: u32,
    bytes: u64,
    sha256: String,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ErrorInfo")]
struct ErrorForm {
    name: String,
    value: String,
    traceback: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Truncated", rename_all = "snake_case")]
enum TruncatedForm {
    Stdout,
    Stderr,
    Results,
}
