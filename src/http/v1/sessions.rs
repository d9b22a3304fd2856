//! Sessions over HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::{Timestamp, Unit};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::egress::{self, Network, NetworkMode};
use crate::domain::ids::SessionId;
use crate::domain::lifecycle::Phase;
use crate::domain::spec::{FieldError, MIB, NewFile, OnIdle, Resources, SessionRequest};
use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Id, Keyed, Params, object};
use crate::http::problem::{self, Problem};
use crate::service::keys::Principal;
use crate::service::{Filter, MAX_WAIT, SessionPatch};
use crate::session::once::{Begun, Made, Once, Reservation};
use crate::session::registry::Created;
use crate::session::{Session, Snapshot};

/// Sessions on one page when nothing is asked for, and at most.
const PAGE: (usize, usize) = (50, 200);

/// What a session is to be; everything is optional.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateSession {
    /// A template's name; the server's default when absent.
    pub(super) template: Option<String>,
    /// A name, unique among your live sessions.
    pub(super) name: Option<String>,
    /// What to do when a live session has that name.
    pub(super) if_exists: IfExists,
    /// Environment variables for everything that runs in it.
    pub(super) env: BTreeMap<String, String>,
    /// For finding it again.
    pub(super) labels: BTreeMap<String, String>,
    /// Code that prepares every kernel of the session, after the template's own, before it is ready. Its failure is the failure of
    /// the start.
    pub(super) setup: Option<String>,
    /// What it may use.
    #[serde(deserialize_with = "object")]
    pub(super) resources: ResourceRequest,
    /// How long things may take.
    #[serde(deserialize_with = "object")]
    pub(super) timeouts: TimeoutRequest,
    /// What happens when it was idle for its time; the template's word when absent.
    pub(super) on_idle: Option<OnIdleName>,
    /// The name of a workspace of yours, which is its working folder, outlives it, and is made at its first use; for templates that have them. One session has it
    /// at a time. A working folder of its own when absent.
    pub(super) workspace: Option<String>,
    /// What it may reach.
    #[serde(deserialize_with = "object")]
    pub(super) network: NetworkRequest,
    /// Packages that are installed before it is ready, after all setup code, as `POST …/packages` does; their failure is the failure of the create. Not into
    /// a session that is there already.
    pub(super) packages: Vec<String>,
    /// Files that are there before any code runs, the setup code included: at most 100, with 16 MiB in all. A live session that is reused keeps its own.
    pub(super) files: Vec<NewFileRequest>,
}

/// A file that a session begins with.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewFileRequest {
    /// Its path, relative to the working folder, or absolute and below it or `/tmp`.
    path: String,
    /// Its bytes.
    #[serde(deserialize_with = "base64_bytes", skip_serializing)]
    #[schema(value_type = String)]
    content_base64: Arc<[u8]>,
}

fn base64_bytes<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Arc<[u8]>, D::Error> {
    let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
    BASE64
        .decode(text.as_bytes())
        .map(Arc::from)
        .map_err(|error| serde::de::Error::custom(format!("no base64: {error}")))
}

/// What happens to a session that was idle for its time.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnIdleName {
    /// It ends.
    Delete,
    /// It is paused, and ends after `timeouts.paused_seconds` more.
    Pause,
}

impl From<OnIdleName> for OnIdle {
    fn from(name: OnIdleName) -> Self {
        match name {
            OnIdleName::Delete => Self::Delete,
            OnIdleName::Pause => Self::Pause,
        }
    }
}

impl From<OnIdle> for OnIdleName {
    fn from(on_idle: OnIdle) -> Self {
        match on_idle {
            OnIdle::Delete => Self::Delete,
            OnIdle::Pause => Self::Pause,
        }
    }
}

/// What to do when a live session has the name.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum IfExists {
    /// Refuse with `name-in-use`.
    #[default]
    Fail,
    /// Answer with that session.
    Reuse,
}

/// What a session may use; the template's defaults where absent.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ResourceRequest {
    /// CPUs.
    cpu: Option<f64>,
    /// Memory in MiB, with all files in it.
    memory_mb: Option<u64>,
    /// Working folder in MiB.
    disk_mb: Option<u64>,
    /// Processes and threads.
    pids: Option<u64>,
}

/// How long things may take; the template's defaults where absent.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TimeoutRequest {
    /// It ends after this long without work, or is paused (`on_idle`).
    idle_seconds: Option<f64>,
    /// It ends at this age.
    lifetime_seconds: Option<f64>,
    /// Its executions are interrupted after this long.
    execution_seconds: Option<f64>,
    /// It ends when it was paused for this long and nothing was asked of it.
    paused_seconds: Option<f64>,
}

/// What a session may reach; what the template gives where absent.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkRequest {
    /// How it is connected.
    mode: Option<NetworkModeName>,
    /// With `allowlist`: names (`example.org`, `*.example.org`), public addresses, or `pypi`, `npm`, `debian`, `github`, each name with a port or without (80
    /// and 443), within what the template permits. What the template gives where absent.
    allow: Option<Vec<String>>,
}

impl From<NetworkRequest> for egress::NetworkRequest {
    fn from(body: NetworkRequest) -> Self {
        Self { mode: body.mode.map(NetworkMode::from), allow: body.allow }
    }
}

/// How a session is connected. There is never a network device.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkModeName {
    /// Not at all.
    #[default]
    None,
    /// A proxy on its loopback reaches what `allow` says.
    Allowlist,
}

impl From<NetworkModeName> for NetworkMode {
    fn from(name: NetworkModeName) -> Self {
        match name {
            NetworkModeName::None => Self::None,
            NetworkModeName::Allowlist => Self::Allowlist,
        }
    }
}

impl From<&Network> for NetworkView {
    fn from(network: &Network) -> Self {
        Self {
            mode: match network.mode {
                NetworkMode::None => NetworkModeName::None,
                NetworkMode::Allowlist => NetworkModeName::Allowlist,
            },
            allow: network.allow.iter().map(ToString::to_string).collect(),
        }
    }
}

impl From<CreateSession> for SessionRequest {
    fn from(body: CreateSession) -> Self {
        Self {
            template: body.template,
            name: body.name,
            reuse: matches!(body.if_exists, IfExists::Reuse),
            env: body.env,
            labels: body.labels,
            setup: body.setup,
            cpu: body.resources.cpu,
            memory_mb: body.resources.memory_mb,
            disk_mb: body.resources.disk_mb,
            pids: body.resources.pids,
            idle_seconds: body.timeouts.idle_seconds,
            lifetime_seconds: body.timeouts.lifetime_seconds,
            execution_seconds: body.timeouts.execution_seconds,
            paused_seconds: body.timeouts.paused_seconds,
            on_idle: body.on_idle.map(OnIdle::from),
            files: body
                .files
                .into_iter()
                .map(|file| NewFile { path: file.path, content: file.content_base64 })
                .collect(),
            workspace: body.workspace,
            network: body.network.into(),
            packages: body.packages,
        }
    }
}

/// A session.
#[derive(Debug, Serialize, ToSchema)]
pub struct SessionView {
    /// Its id.
    id: String,
    /// `starting`, `ready`, `busy`, `paused`, `ending` or `ended`; more may come.
    state: &'static str,
    /// Its template.
    template: String,
    /// Its name.
    name: Option<String>,
    /// `cold`: its container was started for it; `warm`: it was there before, in its template's pool.
    source: &'static str,
    /// When it was created.
    created_at: String,
    /// When something was last asked of it.
    last_active_at: String,
    /// When it ends for its age.
    expires_at: String,
    /// When it ends or is paused for idleness, or ends after it was paused; nothing while something runs.
    idle_deadline: Option<String>,
    /// What it may use.
    resources: ResourcesView,
    /// How long things may take.
    timeouts: TimeoutsView,
    /// What happens when it was idle for its time.
    on_idle: OnIdleName,
    /// The workspace that is its working folder, if that outlives it.
    workspace: Option<String>,
    /// What it may reach.
    network: NetworkView,
    /// For finding it again.
    labels: BTreeMap<String, String>,
    /// Where executions run when they name no context.
    default_context: String,
    /// Rises with every change of what is shown here.
    generation: u64,
    /// Why it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    end_reason: Option<&'static str>,
    /// Why it never became ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    start_error: Option<String>,
    /// What became of its container, where that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    end_detail: Option<String>,
}

/// What a session may use.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResourcesView {
    /// CPUs.
    cpu: f64,
    /// Memory in MiB, with all files in it.
    memory_mb: u64,
    /// Working folder in MiB.
    disk_mb: u64,
    /// Processes and threads.
    pids: u32,
}

impl From<Resources> for ResourcesView {
    fn from(resources: Resources) -> Self {
        Self {
            cpu: f64::from(resources.cpu_millis) / 1000.0,
            memory_mb: resources.memory_bytes / MIB,
            disk_mb: resources.disk_bytes / MIB,
            pids: resources.pids,
        }
    }
}

/// How long things may take.
#[derive(Debug, Serialize, ToSchema)]
pub struct TimeoutsView {
    /// It ends after this long without work, or is paused (`on_idle`).
    idle_seconds: f64,
    /// It ends at this age.
    lifetime_seconds: f64,
    /// Its executions are interrupted after this long.
    execution_seconds: f64,
    /// It ends when it was paused for this long and nothing was asked of it.
    paused_seconds: f64,
}

/// What a session may reach.
#[derive(Debug, Serialize, ToSchema)]
pub struct NetworkView {
    /// How it is connected.
    mode: NetworkModeName,
    /// What the proxy on its loopback reaches.
    allow: Vec<String>,
}

/// A page of sessions.
#[derive(Debug, Serialize, ToSchema)]
pub struct SessionPage {
    /// In the order of their creation.
    sessions: Vec<SessionView>,
    /// Pass it as `cursor` for the next page; nothing on the last one.
    next_cursor: Option<String>,
}

/// A change of a live session.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PatchSession {
    /// It ends for its age this long from now.
    expires_in_seconds: Option<f64>,
    /// It ends after this long without work, or is paused (`on_idle`).
    idle_seconds: Option<f64>,
    /// Replaces all its labels.
    labels: Option<BTreeMap<String, String>>,
    /// What it may reach from the next connection on; connections that are open and not within it are broken off.
    #[serde(deserialize_with = "object")]
    network: NetworkRequest,
}

impl SessionView {
    pub(in crate::http) fn of(session: &Session) -> Self {
        let snapshot = session.snapshot();
        let spec = &session.spec;
        let over = match snapshot.phase {
            Phase::Aborting(reason) | Phase::Ending(reason) | Phase::Ended(reason) => Some(reason.word()),
            _ => None,
        };
        Self {
            id: session.id.to_string(),
            state: state(&snapshot),
            template: spec.template.clone(),
            name: spec.name.clone(),
            source: if session.is_warm { "warm" } else { "cold" },
            created_at: time(session.created_at),
            last_active_at: time(snapshot.last_active),
            expires_at: time(snapshot.expires_at),
            idle_deadline: snapshot.idle_deadline.map(time),
            resources: spec.resources.into(),
            timeouts: TimeoutsView {
                idle_seconds: snapshot.attributes.idle.as_secs_f64(),
                lifetime_seconds: spec.timeouts.lifetime.as_secs_f64(),
                execution_seconds: spec.timeouts.execution.as_secs_f64(),
                paused_seconds: spec.timeouts.paused.as_secs_f64(),
            },
            on_idle: spec.on_idle.into(),
            workspace: spec.workspace.as_ref().map(|workspace| workspace.name.clone()),
            network: NetworkView::from(&snapshot.attributes.network),
            labels: snapshot.attributes.labels.clone(),
            default_context: session.default_context.to_string(),
            generation: snapshot.generation,
            end_reason: over,
            start_error: snapshot.start_failure.map(|f| f.detail.clone()),
            end_detail: snapshot.loss.map(|loss| loss.to_string()),
        }
    }
}

/// The public word for where a session is in its life.
fn state(snapshot: &Snapshot) -> &'static str {
    match snapshot.phase {
        Phase::Provisioning | Phase::Connecting | Phase::Replacing => "starting",
        Phase::Ready if snapshot.busy => "busy",
        // Until it is frozen it may as well be called.
        Phase::Ready | Phase::Pausing => "ready",
        Phase::Paused | Phase::Resuming => "paused",
        Phase::Aborting(_) | Phase::Ending(_) => "ending",
        Phase::Ended(_) => "ended",
    }
}

const STATES: [&str; 6] = ["starting", "ready", "busy", "paused", "ending", "ended"];

/// RFC 3339 in UTC with milliseconds.
pub(super) fn time(at: Timestamp) -> String {
    at.round(Unit::Millisecond).unwrap_or(at).to_string()
}

/// Create a session
///
/// Answers once it is ready; with `?wait=false` at once, `starting`.
#[utoipa::path(post, path = "/v1/sessions", operation_id = "create_session", tag = "sessions",
    params(("wait" = Option<bool>, Query, description = "Answer only once it is ready; yes when absent"),
        ("Idempotency-Key" = Option<String>, Header, description = "With it the request can be sent again within a day and makes nothing twice")),
    request_body(content = CreateSession, description = "Everything is optional; an empty body works"),
    responses((status = 201, body = SessionView), (status = 200, body = SessionView, description = "The live session of that name"),
        (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn create_session(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
    Keyed(body, key): Keyed<CreateSession>,
) -> Result<Response, Problem> {
    let wait = params.only(&["wait"])?.parse::<bool>("wait", "true or false")?.unwrap_or(true);
    let once = match begin(&app, &who, key)? {
        First::New(once) => once,
        First::Made(made) => {
            return Ok(created(StatusCode::CREATED, &app.service.made_session(&who, made, wait).await?));
        }
    };
    let (status, session) = match app.service.create_session(&who, &body.into(), wait, once).await? {
        Created::New(session) => (StatusCode::CREATED, session),
        Created::Reused(session) => (StatusCode::OK, session),
    };
    Ok(created(status, &session))
}

fn created(status: StatusCode, session: &Session) -> Response {
    let location = format!("/v1/sessions/{}", session.id);
    (status, [(header::LOCATION, location)], Answer(SessionView::of(session))).into_response()
}

/// Whether a request is the first with its key.
pub(super) enum First {
    /// It is, or has none.
    New(Option<Reservation>),
    /// It is not; this is what the first has made.
    Made(Made),
}

/// Begins a request that may come twice.
pub(super) fn begin(app: &App, who: &Principal, key: Option<Once>) -> Result<First, Problem> {
    let Some(key) = key else { return Ok(First::New(None)) };
    Ok(match app.service.begin(who, key)? {
        Begun::First(reservation) => First::New(Some(reservation)),
        Begun::Again(made) => First::Made(made),
    })
}

/// List your sessions
#[utoipa::path(get, path = "/v1/sessions", operation_id = "list_sessions", tag = "sessions",
    params(("state" = Option<String>, Query, description = "One of the states"),
        ("label" = Option<String>, Query, description = "`name:value`; may come more than once"),
        ("name" = Option<String>, Query), ("limit" = Option<usize>, Query, description = "1 to 200; 50 when absent"),
        ("cursor" = Option<String>, Query, description = "From `next_cursor`")),
    responses((status = 200, body = SessionPage), (status = "4XX", body = Problem)))]
pub async fn list_sessions(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
) -> Result<Answer<SessionPage>, Problem> {
    let params = params.only(&["state", "label", "name", "limit", "cursor"])?;
    let wanted = params.get("state").map(check_state).transpose()?;
    let limit = page_limit(&params)?;
    let after = params.parse::<SessionId>("cursor", "a value of next_cursor")?;
    let sessions = app.service.list_sessions(&who, &filter(&params)?, after)?;
    let mut found = sessions.iter().filter(|s| wanted.is_none_or(|w| state(&s.snapshot()) == w));
    let page: Vec<_> = found.by_ref().take(limit).collect();
    let next_cursor = found.next().and(page.last()).map(|s| s.id.to_string());
    Ok(Answer(SessionPage { sessions: page.into_iter().map(SessionView::of).collect(), next_cursor }))
}

/// End many sessions
///
/// A filter is required. Answers with them once their containers are gone.
#[utoipa::path(delete, path = "/v1/sessions", operation_id = "delete_sessions", tag = "sessions",
    params(("label" = Option<String>, Query, description = "`name:value`; may come more than once"), ("name" = Option<String>, Query)),
    responses((status = 200, body = SessionPage), (status = "4XX", body = Problem)))]
pub async fn delete_sessions(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
) -> Result<Answer<SessionPage>, Problem> {
    let filter = filter(&params.only(&["label", "name"])?)?;
    if filter == Filter::default() {
        return Err(bad_parameter("label", "a filter is required: label=name:value or name="));
    }
    let ended = app.service.delete_sessions(&who, &filter).await?;
    Ok(Answer(SessionPage { sessions: ended.iter().map(SessionView::of).collect(), next_cursor: None }))
}

/// Look at a session
#[utoipa::path(get, path = "/v1/sessions/{id}", operation_id = "get_session", tag = "sessions", params(("id" = String, Path)),
    responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn get_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.session(&who, id)?)))
}

/// Change a live session
#[utoipa::path(patch, path = "/v1/sessions/{id}", operation_id = "patch_session", tag = "sessions", params(("id" = String, Path)),
    request_body = PatchSession, responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn patch_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    Body(body): Body<PatchSession>,
) -> Result<Answer<SessionView>, Problem> {
    let patch = SessionPatch {
        expires_in_seconds: body.expires_in_seconds,
        idle_seconds: body.idle_seconds,
        labels: body.labels,
        network: body.network.into(),
        ..SessionPatch::default()
    };
    Ok(Answer(SessionView::of(&app.service.patch_session(&who, id, &patch).await?)))
}

/// End a session
///
/// Answers once its container is gone. Ending one that has ended is no error.
#[utoipa::path(delete, path = "/v1/sessions/{id}", operation_id = "delete_session", tag = "sessions", params(("id" = String, Path)),
    responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn delete_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.delete_session(&who, id).await?)))
}

/// Wait for a state
///
/// Answers as soon as the session has that state, at once if it already has; and when the time is over or the state can't come
/// any more, with the state it has then.
#[utoipa::path(get, path = "/v1/sessions/{id}/wait", operation_id = "wait_session", tag = "sessions",
    params(("id" = String, Path), ("state" = Option<String>, Query, description = "`ready` when absent"),
        ("timeout_seconds" = Option<f64>, Query, description = "Up to 300; 30 when absent")),
    responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn wait_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
) -> Result<Answer<SessionView>, Problem> {
    let params = params.only(&["state", "timeout_seconds"])?;
    let wanted = check_state(params.get("state").unwrap_or("ready"))?;
    let seconds = params.parse::<f64>("timeout_seconds", "a number of seconds up to 300")?.unwrap_or(30.0);
    let limit = Duration::try_from_secs_f64(seconds).ok().filter(|d| *d <= MAX_WAIT);
    let limit = limit.ok_or_else(|| bad_parameter("timeout_seconds", "allowed is 0 to 300"))?;
    let session = app.service.session(&who, id)?;
    let settled = session.wait_for(|s| state(s) == wanted || matches!(s.phase, Phase::Ended(_)));
    // Either way the answer is what is the case now.
    let _ = tokio::time::timeout(limit, settled).await;
    Ok(Answer(SessionView::of(&session)))
}

/// Count as activity
#[utoipa::path(post, path = "/v1/sessions/{id}/keepalive", operation_id = "keepalive_session", tag = "sessions",
    params(("id" = String, Path)), responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn keepalive_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.keep_alive(&who, id).await?)))
}

/// Pause a session
///
/// It uses no CPU and keeps its memory and files; what is asked of it next resumes it. Answers once it is paused; `state-conflict`
/// while something runs or waits.
#[utoipa::path(post, path = "/v1/sessions/{id}/pause", operation_id = "pause_session", tag = "sessions",
    params(("id" = String, Path)),
    responses((status = 200, body = SessionView), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn pause_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.pause(&who, id).await?)))
}

/// Resume a session
///
/// Answers once it is ready. Resuming one that is not paused is no error.
#[utoipa::path(post, path = "/v1/sessions/{id}/resume", operation_id = "resume_session", tag = "sessions",
    params(("id" = String, Path)), responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn resume_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.resume(&who, id).await?)))
}

/// Interrupt what runs
///
/// The code sees `KeyboardInterrupt`, or what its language has for that; variables stay.
#[utoipa::path(post, path = "/v1/sessions/{id}/interrupt", operation_id = "interrupt_session", tag = "sessions",
    params(("id" = String, Path)), responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn interrupt_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.interrupt(&who, id, None).await?)))
}

/// Replace the kernels
///
/// Files stay, variables go; what runs or waits is cancelled. Answers once the new kernels do.
#[utoipa::path(post, path = "/v1/sessions/{id}/restart", operation_id = "restart_session", tag = "sessions",
    params(("id" = String, Path)), responses((status = 200, body = SessionView), (status = "4XX", body = Problem)))]
pub async fn restart_session(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
) -> Result<Answer<SessionView>, Problem> {
    Ok(Answer(SessionView::of(&app.service.restart(&who, id, None).await?)))
}

/// How many a page of a list has at most.
pub(super) fn page_limit(params: &Params) -> Result<usize, Problem> {
    let limit = params.parse::<usize>("limit", "1 to 200")?.unwrap_or(PAGE.0);
    if limit == 0 || limit > PAGE.1 {
        return Err(bad_parameter("limit", "allowed is 1 to 200"));
    }
    Ok(limit)
}

fn filter(params: &Params) -> Result<Filter, Problem> {
    let label = |text: &str| {
        text.split_once(':')
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .ok_or_else(|| bad_parameter("label", "allowed is name:value"))
    };
    let labels = params.all("label").map(label).collect::<Result<_, _>>()?;
    Ok(Filter { labels, name: params.get("name").map(str::to_owned) })
}

fn check_state(text: &str) -> Result<&'static str, Problem> {
    let found = STATES.iter().find(|s| **s == text).copied();
    found.ok_or_else(|| bad_parameter("state", &format!("allowed is one of {}", STATES.join(", "))))
}

pub(super) fn bad_parameter(name: &str, message: &str) -> Problem {
    Problem::new(problem::INVALID_REQUEST, "a query parameter is not understood")
        .with_fields(vec![FieldError::new(format!("?{name}"), message)])
}
