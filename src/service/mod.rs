//! Every command of the product, without HTTP: the [`Principal`] first, then what is wanted.
//!
//! Front doors translate; sessions run; what a caller may do and how much, is decided here. Errors are one closed enum.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_wire::link::Stats;
use serde_json::json;

use crate::domain::egress::{Network, NetworkRequest};
use crate::domain::ids::{ContextId, SessionId};
use crate::domain::lifecycle::{EndReason, Phase};
use crate::domain::output::JsonText;
use crate::domain::quota::{Exceeded, Held, Quota, Rate};
use crate::domain::spec::{self, FieldError, Resources, SessionRequest, SessionSpec, Template};
use crate::engine::{Engine, EngineError, ImageInfo, Pull};
use crate::kernel::link::LinkError;
use crate::metrics::Metrics;
use crate::places::Places;
use crate::session::capacity::Full;
use crate::session::once::{Begun, MAX_KEYS, Made, NotOnce, Once, Reservation};
use crate::session::pool::PoolView;
use crate::session::registry::{Asked, CreateRefused, Created, Registry};
use crate::session::workspaces::HoldRefused;
use crate::session::{ContextView, GateView, Patch, Refused, Session, StartFailure, StartFault, fresh};
use crate::store::Archive;
use crate::store::state::Lasting;
pub use crate::store::{Blob, BlobBody, content_text};
use crate::task;
use crate::traces::Traces;

pub mod admin;
pub mod audit;
pub mod bearer;
pub mod commands;
mod environment;
pub mod executions;
pub mod files;
pub mod issuing;
pub mod keys;
mod languages;
pub mod listening;
pub mod log;
pub mod notebooks;
pub mod offer;
pub mod packages;
pub mod ports;
pub mod quotas;
mod refusals;
pub mod trail;
pub mod transfer;
pub mod watches;
pub mod workspaces;

pub use executions::{ExecuteRequest, MAX_CODE, MAX_LINE};
pub use notebooks::Room;

use admin::Admin;
use audit::Audit;
use bearer::Tokens;
use executions::count;
use files::FileFault;
use keys::{KeyRing, Principal};
use log::LogLevel;
use notebooks::NOTEBOOK_ROOM;
use offer::Offer;
use quotas::{LATER, Quotas, RateState};
use watches::Watches;

/// Longest wait that a caller may ask for.
pub const MAX_WAIT: Duration = Duration::from_secs(300);
/// What was seen of the engine counts for this long.
const READINESS: Duration = Duration::from_secs(1);
/// A kernel answers a question within this time; it has none while it runs code.
const QUESTION: Duration = Duration::from_secs(10);
/// A container may have used this much more than its time of CPUs: it is counted by other clocks, and in slices.
const CPU_SLACK: Duration = Duration::from_secs(1);
/// A deleted session is waited for this long; its removal goes on after that.
const END_WAIT: Duration = Duration::from_secs(30);

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// Fields of the request break a rule of the template.
    #[error("the request asks for what is not allowed")]
    SpecRejected(Vec<FieldError>),
    /// The configuration can't be taken over as it stands now; a line for each reason.
    #[error("the configuration was not taken over, and nothing has changed")]
    ConfigRejected(Vec<String>),
    /// There is no such thing, or it is somebody else's.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// The key has not the scope for this.
    #[error("the key lacks the scope \"{0}\"")]
    Forbidden(&'static str),
    /// The tenant has a live session of that name; which, if the key allows to know of it.
    #[error("a live session{} has that name", .0.map(|id| format!(", {id},")).unwrap_or_default())]
    NameInUse(Option<SessionId>),
    /// Another session has the workspace, or is about to; which, if it is one already.
    #[error("the workspace is in use by {}", .0.map_or_else(|| "a session that is being created".to_owned(), |id| format!("the session {id}")))]
    WorkspaceInUse(Option<SessionId>),
    /// The session is still starting.
    #[error("the session is still starting")]
    NotReady,
    /// The session has ended.
    #[error("the session has ended")]
    SessionEnded(EndReason),
    /// As many executions as allowed are waiting.
    #[error("too many executions are waiting in this session")]
    QueueFull,
    /// As many files, commands and connections of the session are under way as may be at once.
    #[error("as many files, commands and connections of this session are under way as may be at once")]
    VisitsFull,
    /// As many commands run as may, or too much waits for one.
    #[error("{0}")]
    CommandsFull(String),
    /// Packages can't be installed.
    #[error("the packages were not installed: {0}")]
    InstallFailed(String),
    /// The session has no room for another process.
    #[error("the command can't be started: {0}")]
    SpawnFailed(String),
    /// The state of the thing does not allow it now.
    #[error("{0}")]
    StateConflict(String),
    /// The request's key does not allow it.
    #[error("{}", not_once(*.0))]
    NotOnce(NotOnce),
    /// The tenant has as much as it may.
    #[error("the tenant has as much as it may of {}, {}", .exceeded.name, .exceeded.limit)]
    OverQuota {
        /// Of what.
        exceeded: Exceeded,
        /// When there may be more.
        retry_after: Duration,
    },
    /// The tenant asks too often.
    #[error("the tenant may send {} requests a second, and {} at once", .rate.per_second, .rate.burst)]
    RateLimited {
        /// How often it may.
        rate: Rate,
        /// When it may again.
        retry_after: Duration,
    },
    /// Too much is on its way to callers.
    #[error("too many notebooks and contents are being fetched")]
    NotebooksBusy,
    /// Too much is on its way to the tenant's callers.
    #[error("too many of the tenant's notebooks and contents are being fetched; read those first")]
    OwnNotebooksBusy,
    /// The kernel had no time for a question.
    #[error("the kernel did not answer within {0:?}; it may be running code")]
    KernelBusy(Duration),
    /// There is no place for another session.
    #[error("no place for another session, and none came free while it waited")]
    AtCapacity {
        /// When there may be one.
        retry_after: Duration,
    },
    /// All tenants together have as many workspaces as may be.
    #[error("the server holds as many workspaces as it may (limits.workspaces)")]
    WorkspacesFull,
    /// The server is stopping.
    #[error("the server is stopping")]
    Draining,
    /// The database can't be written, so what is asked would be lost with the process.
    #[error("the server can't write what it has to know of this after its own end; its log says why")]
    Unkept,
    /// A session could not be started.
    #[error("{}", .0.detail)]
    StartFailed(StartFailure),
    /// The template's image can't be used.
    #[error("the image of template \"{template}\" can't be used: {detail}")]
    ImageRejected {
        /// The template.
        template: String,
        /// Why, and what to do.
        detail: String,
    },
    /// The engine can't be reached.
    #[error("the container engine can't be reached")]
    EngineUnavailable,
    /// The guest did not answer.
    #[error("the session's container did not answer")]
    GuestUnreachable,
    /// The session's template does not allow the port.
    #[error("port {port} can't be reached in sessions of the template \"{template}\"; allowed: {allowed}")]
    PortNotAllowed {
        /// The port.
        port: u16,
        /// The template.
        template: String,
        /// What it allows.
        allowed: String,
    },
    /// Nothing listens on the port.
    #[error("nothing in the session listens on port {0} of 127.0.0.1 or ::1")]
    PortClosed(u16),
    /// What listens on the port takes no connection.
    #[error("what listens on port {0} in the session takes no more connections")]
    PortStuck(u16),
    /// Something can't be done with a file.
    #[error("{1}")]
    File(FileFault, String),
    /// As many files are on their way as may be, in all sessions.
    #[error("as many files and archives are on their way as may be at once")]
    TransfersBusy,
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NotReady => Self::NotReady,
            Refused::Ended(reason) => Self::SessionEnded(reason),
            Refused::Left => Self::Draining,
            Refused::QueueFull => Self::QueueFull,
            Refused::NoSuchContext => Self::NotFound("context"),
            Refused::KernelLost => Self::GuestUnreachable,
            Refused::KernelFailed(failure) => Self::StartFailed(failure),
            Refused::TooManyContexts(_) => Self::StateConflict(format!("{refused}; delete one of them")),
            Refused::TooManyLabels(_) => Self::SpecRejected(vec![FieldError::new("/labels", refused.to_string())]),
            Refused::DefaultContext => {
                Self::StateConflict(format!("{refused}; it goes with its session, and can be restarted"))
            }
            Refused::NothingAsked => Self::StateConflict("the execution does not ask for input now".to_owned()),
            Refused::Busy => {
                Self::StateConflict(format!("{refused}; it can be paused when that has ended, or was cancelled"))
            }
            Refused::Restless(_) => Self::StateConflict(format!("{refused}; try it again")),
            Refused::NotPaused => Self::EngineUnavailable,
            Refused::TooManyVisits => Self::VisitsFull,
        }
    }
}

impl From<CreateRefused> for Error {
    fn from(refused: CreateRefused) -> Self {
        match refused {
            CreateRefused::Full(Full { retry_after }) => Self::AtCapacity { retry_after },
            CreateRefused::TooLarge(errors) => Self::SpecRejected(errors),
            CreateRefused::OverShare(exceeded) => Self::OverQuota { exceeded, retry_after: LATER },
            // Who may know which, is decided where the key is known.
            CreateRefused::NameInUse(_) => Self::NameInUse(None),
            CreateRefused::Workspace(refused) => workspaces::not_held(refused),
            CreateRefused::Draining => Self::Draining,
        }
    }
}

/// What a context is to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContextRequest {
    /// One of the image's kernelspecs; that of the session when absent.
    pub kernelspec: Option<String>,
    /// Instead of it, a language that one of them runs.
    pub language: Option<String>,
    /// Working folder of its kernel; the session's when absent.
    pub cwd: Option<String>,
}

/// A question to a kernel about code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// How it may go on at a place, in Unicode characters from its beginning; its end when absent.
    Complete(Option<u64>),
    /// What stands at a place, and in how much detail (0 or 1).
    Inspect(Option<u64>, u8),
    /// Whether it is complete.
    IsComplete,
}

/// What a session uses, and may use.
#[derive(Debug, Clone, Copy)]
pub struct SessionMetrics {
    /// When it was looked at.
    pub at: jiff::Timestamp,
    /// What it uses, by what its container shows.
    pub used: Stats,
    /// What it may use.
    pub limits: Resources,
}

/// Which sessions are meant.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    /// Labels that must all be there.
    pub labels: BTreeMap<String, String>,
    /// The name.
    pub name: Option<String>,
}

impl Filter {
    fn admits(&self, session: &Session) -> bool {
        let snapshot = session.snapshot();
        self.labels.iter().all(|(k, v)| snapshot.attributes.labels.get(k) == Some(v))
            && self.name.as_ref().is_none_or(|name| session.spec.name.as_ref() == Some(name))
    }
}

/// What a tenant uses, and how much it may.
#[derive(Debug, Clone)]
pub struct Usage {
    /// The tenant.
    pub tenant: Arc<str>,
    /// How much it may.
    pub quota: Quota,
    /// What it holds.
    pub held: Held,
    /// Its workspaces.
    pub workspaces: usize,
    /// Executions that run or wait.
    pub executions: u32,
    /// Bytes of its blobs and notebooks.
    pub stored_bytes: u64,
    /// CPU time of executions that have ended today.
    pub cpu_today: Duration,
    /// When today ends.
    pub day_ends_at: jiff::Timestamp,
}

/// A template and what the engine knows of its image.
#[derive(Debug, Clone)]
pub struct TemplateView {
    /// The template.
    pub template: Template,
    /// Its image; nothing when the engine has not got it.
    pub image: Option<ImageInfo>,
}

/// The product.
#[derive(Debug)]
pub struct Service {
    registry: Arc<Registry>,
    engine: Arc<dyn Engine>,
    offer: Offer,
    pull: Pull,
    archive: Option<Archive>,
    /// KiB of notebooks on their way, by tenant.
    notebook_room: Arc<Places<Arc<str>>>,
    /// Files and archives that may be on their way at once, in all sessions.
    transfers: Arc<Places<Arc<str>>>,
    /// When the engine was last asked whether it answers, and whether it did.
    engine_seen: tokio::sync::Mutex<Option<(Instant, bool)>>,
    /// What operators' commands work with, where there are any.
    admin: Option<Admin>,
    /// Who may ask.
    keys: Arc<KeyRing>,
    /// What tenants may have and do.
    quotas: Arc<Quotas>,
    /// Where events of requests go, if they are kept.
    audit: Option<Arc<Audit>>,
    /// How much the log tells, where that can be changed.
    log: Option<LogLevel>,
    /// Where requests and executions are told as traces, if they are.
    traces: Option<Traces>,
    /// What sessions' own tokens are derived from.
    tokens: Tokens,
    /// What has changed in folders and waits for who comes for it.
    watches: Watches,
}

impl std::fmt::Debug for dyn Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Engine")
    }
}

impl Service {
    /// Puts it together.
    #[must_use]
    pub fn new(
        registry: Arc<Registry>,
        engine: Arc<dyn Engine>,
        offer: Offer,
        pull: Pull,
        archive: Option<Archive>,
    ) -> Self {
        let (engine_seen, notebook_room) = (tokio::sync::Mutex::default(), Places::new(NOTEBOOK_ROOM.0));
        Self {
            registry,
            engine,
            offer,
            pull,
            archive,
            notebook_room,
            transfers: Places::new(transfer::MOST),
            engine_seen,
            admin: None,
            keys: Arc::default(),
            quotas: Arc::default(),
            audit: None,
            log: None,
            traces: None,
            tokens: Tokens::passing(),
            watches: Watches::default(),
        }
    }

    /// The same, which keeps events of requests.
    #[must_use]
    pub fn audited(self, audit: Arc<Audit>) -> Self {
        Self { audit: Some(audit), ..self }
    }

    /// Where events of requests go, if they are kept.
    #[must_use]
    pub fn audit(&self) -> Option<Arc<Audit>> {
        self.audit.clone()
    }

    /// The same, whose requests and executions are told as traces.
    #[must_use]
    pub fn traced(self, traces: Traces) -> Self {
        Self { traces: Some(traces), ..self }
    }

    /// Where they are told, if they are.
    #[must_use]
    pub fn traces(&self) -> Option<&Traces> {
        self.traces.as_ref()
    }

    /// Creates a session, or finds the live one of that name. With `wait` it answers once the session is ready, or has failed
    /// and nothing of it is left.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn create_session(
        self: &Arc<Self>,
        who: &Principal,
        request: &SessionRequest,
        wait: bool,
        once: Option<Reservation>,
    ) -> Result<Created, Error> {
        // Whoever has a key for it comes back for it.
        let lasting = if wait && once.is_none() { Lasting::OnceReady } else { Lasting::Always };
        if !request.packages.is_empty() && !wait {
            let message = "packages go with waiting for the session: leave wait=false out";
            return Err(Error::SpecRejected(vec![FieldError::new("/packages", message)]));
        }
        if once.is_none() && request.files.is_empty() && request.packages.is_empty() {
            return self.create(who, request, wait, lasting, None).await;
        }
        let (service, who, request) = (Arc::clone(self), who.clone(), request.clone());
        // To its end: between its files and its claim a session is nobody's.
        let created = carry_on("create", async move {
            let created = service.create(&who, &request, wait, lasting, once.as_ref()).await;
            let created = match created {
                // One that was there before has had its packages.
                Ok(Created::New(session)) if !request.packages.is_empty() => {
                    let installed = service.install_first(&who, &session, &request.packages).await;
                    installed.map(|()| Created::New(session))
                }
                created => created,
            };
            match once {
                Some(once) => service.settle_key(once, &created).await.and(created),
                None => created,
            }
        });
        created.await.unwrap_or(Err(Error::GuestUnreachable))
    }

    /// The session that the first create with a key has made; with `wait` once it is ready.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn made_session(&self, who: &Principal, made: Made, wait: bool) -> Result<Session, Error> {
        let Made::Session(id) = made else { return Err(Error::NotFound("session")) };
        let session = self.session(who, id)?;
        if wait {
            self.wait_until_started(&session).await?;
        }
        Ok(session)
    }

    /// Begins a request that its caller has given a key.
    ///
    /// # Errors
    /// When it can't be taken because of the key.
    pub fn begin(&self, who: &Principal, once: Once) -> Result<Begun, Error> {
        who.require_sessions()?;
        self.registry.requests().begin(&who.tenant, once).map_err(Error::NotOnce)
    }

    /// What was made is to be found under its key from now on; a key under which nothing is, is free.
    async fn settle_key<T>(&self, once: Reservation, outcome: &Result<T, Error>) -> Result<(), Error> {
        match outcome {
            Ok(_) => once.keep(),
            // It may go on with the next server.
            Err(Error::Draining) => drop(once),
            Err(_) => once.release(),
        }
        self.kept().await
    }

    /// Whether anything new is accepted: not while the server stops, nor while what is accepted could be lost with it.
    fn accepts(&self) -> Result<(), Error> {
        match (self.registry.is_draining(), self.registry.is_written()) {
            (true, _) => Err(Error::Draining),
            (false, false) => Err(Error::Unkept),
            (false, true) => Ok(()),
        }
    }

    /// Waits until what was told of sessions before is committed.
    async fn kept(&self) -> Result<(), Error> {
        if self.registry.settle().await { Ok(()) } else { Err(Error::Unkept) }
    }

    async fn create(
        &self,
        who: &Principal,
        request: &SessionRequest,
        wait: bool,
        lasting: Lasting,
        once: Option<&Reservation>,
    ) -> Result<Created, Error> {
        who.require_sessions()?;
        self.accepts()?;
        let (template, mut spec) = self.specify(who, request)?;
        // What is there already needs nothing of the engine.
        let quota = self.quotas.of(&who.tenant);
        check_size(&quota, &spec)?;
        let tenant = (&who.tenant, &quota.share);
        // Files are nowhere but in the request: the next process could not begin with them.
        let lasting = match lasting {
            Lasting::Always if !request.files.is_empty() => Lasting::OnceReady,
            lasting => lasting,
        };
        let refused = |refused| self.not_created(who, refused);
        let workspaces = quota.workspaces;
        let asked = Asked { reuse: request.reuse, lasting, once, files: &request.files, workspaces };
        let created = match self.registry.find(tenant, &spec, asked).await.map_err(refused)? {
            Some(created) => created,
            None => {
                spec.image = self.resolve_image(&template).await?.id;
                self.registry.create(tenant, spec, asked).await.map_err(refused)?
            }
        };
        let (Created::New(session) | Created::Reused(session)) = &created;
        trail::note_session(session.id);
        match &created {
            Created::New(_) => trail::note_change(),
            Created::Reused(session) if !who.admits(&session.spec.template) => return Err(Error::NameInUse(None)),
            // It counts as activity, and comes after what its task is about to do: it may have been claimed at this moment.
            Created::Reused(session) => session.keep_alive().await?,
        }
        if wait {
            self.wait_until_started(session).await?;
        }
        self.kept().await?;
        Ok(created)
    }

    /// Why a caller gets no session. Of one that has the name already it is told where its key allows to know of it.
    fn not_created(&self, who: &Principal, refused: CreateRefused) -> Error {
        match refused {
            CreateRefused::NameInUse(id) => {
                let session = self.registry.session(&who.tenant, id);
                Error::NameInUse(session.filter(|session| who.admits(&session.spec.template)).map(|session| session.id))
            }
            CreateRefused::Workspace(HoldRefused::OfTemplate(template)) if !who.admits(&template) => {
                workspaces::of_another_template()
            }
            refused => refused.into(),
        }
    }

    /// What a session would be, but for its image.
    fn specify(&self, who: &Principal, request: &SessionRequest) -> Result<(Template, SessionSpec), Error> {
        let choice = self.offer.now();
        let name = request.template.as_ref().unwrap_or(&choice.default);
        let template = choice.templates.get(name).filter(|template| who.admits(&template.name)).ok_or_else(|| {
            let known = choice.templates.keys().filter(|name| who.admits(name));
            let known = known.map(|t| format!("\"{t}\"")).collect::<Vec<_>>().join(", ");
            let message = match request.template {
                Some(_) => format!("there is no template of that name; there are {known}"),
                None => format!("the key does not allow the default template; name one of {known}"),
            };
            Error::SpecRejected(vec![FieldError::new("/template", message)])
        })?;
        Ok((template.clone(), spec::resolve(template, request).map_err(Error::SpecRejected)?))
    }

    async fn resolve_image(&self, template: &Template) -> Result<ImageInfo, Error> {
        let (engine, reference, pull) = (Arc::clone(&self.engine), template.image.clone(), self.pull);
        // A pull takes its time, and serves the next caller even if this one leaves.
        let resolved = carry_on("image", async move { engine.resolve_image(&reference, pull).await });
        resolved.await.ok_or(Error::EngineUnavailable)?.map_err(|error| {
            tracing::warn!(template = template.name, %error, "a template's image can't be used");
            match error {
                EngineError::Unavailable { .. } | EngineError::TimedOut { .. } => Error::EngineUnavailable,
                EngineError::Absent { .. } => Error::ImageRejected {
                    template: template.name.clone(),
                    detail: format!(
                        "the engine has no image \"{}\"; build it with `make images`, or pull it",
                        template.image
                    ),
                },
                EngineError::Rejected { .. } => Error::ImageRejected {
                    template: template.name.clone(),
                    detail: "it could not be pulled, or declares what is not allowed; the server's log says what"
                        .to_owned(),
                },
                _ => Error::EngineUnavailable,
            }
        })
    }

    /// Waits until a session is ready.
    ///
    /// # Errors
    /// Why it will not be; nothing of it is left then.
    pub async fn started(&self, session: &Session) -> Result<(), Error> {
        self.wait_until_started(session).await
    }

    async fn wait_until_started(&self, session: &Session) -> Result<(), Error> {
        let started = |phase: Phase| !matches!(phase, Phase::Provisioning | Phase::Connecting | Phase::Replacing);
        let snapshot = session.wait_for(|s| started(s.phase)).await;
        if !started(snapshot.phase) {
            return Err(Error::Draining);
        }
        let (Phase::Aborting(reason) | Phase::Ending(reason) | Phase::Ended(reason)) = snapshot.phase else {
            return Ok(());
        };
        wait_for_end(session).await;
        Err(match session.snapshot().start_failure {
            Some(failure) => Error::StartFailed(StartFailure::clone(&failure)),
            None => Error::SessionEnded(reason),
        })
    }

    /// A tenant's session, live or kept.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Forbidden`].
    pub fn session(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        trail::note_session(id);
        who.require_read()?;
        let session = self.registry.session(&who.tenant, id).filter(|session| who.admits(&session.spec.template));
        session.ok_or(Error::NotFound("session"))
    }

    /// A tenant's sessions in the order of their creation, after one of them.
    ///
    /// # Errors
    /// [`Error::Forbidden`].
    pub fn list_sessions(
        &self,
        who: &Principal,
        filter: &Filter,
        after: Option<SessionId>,
    ) -> Result<Vec<Session>, Error> {
        who.require_read()?;
        let sessions = self.registry.sessions(&who.tenant, after);
        Ok(sessions.into_iter().filter(|s| who.admits(&s.spec.template) && filter.admits(s)).collect())
    }

    /// Ends a session; answers once its container is gone. Ending one that has ended is no error.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_session(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.end(EndReason::Deleted);
        wait_for_end(&session).await;
        self.registry.settle().await;
        // The next server has it, and has not heard of this.
        if session.is_over() { Ok(session) } else { Err(Error::Draining) }
    }

    /// Ends all live sessions that a filter admits; answers with them once their containers are gone.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_sessions(&self, who: &Principal, filter: &Filter) -> Result<Vec<Session>, Error> {
        who.require_sessions()?;
        let sessions = self.list_sessions(who, filter, None)?;
        let live: Vec<_> = sessions.into_iter().filter(|s| !s.is_over()).collect();
        trail::note_sessions(live.iter().map(|session| session.id));
        live.iter().for_each(|s| s.end(EndReason::Deleted));
        futures_util::future::join_all(live.iter().map(wait_for_end)).await;
        self.registry.settle().await;
        // The next server has those, and has not heard of this.
        if live.iter().all(Session::is_over) { Ok(live) } else { Err(Error::Draining) }
    }

    /// Changes a live session.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn patch_session(&self, who: &Principal, id: SessionId, change: &SessionPatch) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.patch(change.resolve(&session)?).await?;
        self.kept().await?;
        Ok(session)
    }

    /// What can be seen of a session's way out.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn session_egress(&self, who: &Principal, id: SessionId) -> Result<(Network, GateView), Error> {
        let session = self.session(who, id)?;
        Ok((session.snapshot().attributes.network.clone(), session.egress()))
    }

    /// Counts as activity of a session.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn keep_alive(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.keep_alive().await?;
        self.kept().await?;
        Ok(session)
    }

    /// Freezes a session in which nothing runs; answers once it is paused. What is asked of it later resumes it.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pause(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.pause().await?;
        self.kept().await?;
        Ok(session)
    }

    /// Resumes a session if it is paused; answers once it is ready.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn resume(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.resume().await?;
        self.kept().await?;
        Ok(session)
    }

    /// Interrupts what runs in a session, or in one of its contexts.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn interrupt(
        &self,
        who: &Principal,
        id: SessionId,
        context: Option<ContextId>,
    ) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        context.into_iter().for_each(trail::note_context);
        session.interrupt(context).await?;
        Ok(session)
    }

    /// Replaces a session's kernels, or that of one context; answers once the new ones do.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn restart(&self, who: &Principal, id: SessionId, context: Option<ContextId>) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        context.into_iter().for_each(trail::note_context);
        session.restart(context).await?;
        Ok(session)
    }

    /// The contexts of a session.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn contexts(&self, who: &Principal, id: SessionId) -> Result<Vec<ContextView>, Error> {
        Ok(self.session(who, id)?.contexts().await?)
    }

    /// Adds a context to a session; answers once its kernel does.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn create_context(
        self: &Arc<Self>,
        who: &Principal,
        id: SessionId,
        wanted: ContextRequest,
        once: Option<Reservation>,
    ) -> Result<ContextView, Error> {
        who.require_sessions()?;
        self.accepts()?;
        let session = self.session(who, id)?;
        let ContextRequest { mut kernelspec, language, cwd } = wanted;
        let mut errors = Vec::new();
        for (pointer, name) in [("/kernelspec", &kernelspec), ("/language", &language)] {
            if name.as_deref().is_some_and(|name| !spec::is_name(name)) {
                let allowed = "allowed are 1 to 64 letters, digits, \".\", \"_\" and \"-\"";
                errors.push(FieldError::new(pointer, allowed));
            }
        }
        if kernelspec.is_some() && language.is_some() {
            errors.push(FieldError::new("/language", "the kernelspec has its language; name one of the two"));
        }
        if cwd.as_deref().is_some_and(|c| c.is_empty() || c.len() > 4096 || c.contains('\0')) {
            errors.push(FieldError::new("/cwd", "allowed is a path of at most 4096 bytes"));
        }
        if !errors.is_empty() {
            return Err(Error::SpecRejected(errors));
        }
        if let Some(language) = &language {
            kernelspec = Some(languages::kernelspec_for(&session, language).await?);
        } else if let Some(wanted) = &kernelspec {
            let specs = session.link().await?.kernelspecs().await.map_err(|error| unreachable_guest(id, &error))?;
            // Names come from the image, which is as trusted as its operator makes it.
            let names: Vec<_> = specs.iter().map(|s| s.name.as_str()).filter(|name| spec::is_name(name)).collect();
            if !names.contains(&wanted.as_str()) {
                let message = format!("the image has no such kernelspec; it has {}", names.join(", "));
                return Err(Error::SpecRejected(vec![FieldError::new("/kernelspec", message)]));
            }
        }
        let (service, context) = (Arc::clone(self), fresh());
        let created = carry_on("context", async move {
            if let Some(once) = &once {
                once.will_be(Made::Context(id, context));
            }
            trail::note_context(context);
            let created = session.create_context(context, kernelspec, cwd).await.map_err(Error::from);
            match once {
                Some(once) => service.settle_key(once, &created).await.and(created),
                None => created,
            }
        });
        created.await.unwrap_or(Err(Error::GuestUnreachable))
    }

    /// Ends a context that is not the default one.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_context(
        &self,
        who: &Principal,
        id: SessionId,
        context: ContextId,
    ) -> Result<ContextView, Error> {
        who.require_sessions()?;
        trail::note_context(context);
        let deleted = self.session(who, id)?.delete_context(context).await?;
        self.kept().await?;
        Ok(deleted)
    }

    /// Asks a context's kernel about code; its answer as it is.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn ask_kernel(
        &self,
        who: &Principal,
        (id, context): (SessionId, ContextId),
        question: &Question,
        code: &str,
    ) -> Result<JsonText, Error> {
        who.require_sessions()?;
        if code.len() > MAX_CODE {
            let message = format!("{} bytes; allowed are {MAX_CODE}", code.len());
            return Err(Error::SpecRejected(vec![FieldError::new("/code", message)]));
        }
        let end = || code.chars().count() as u64;
        if let Question::Complete(Some(at)) | Question::Inspect(Some(at), _) = question
            && *at > end()
        {
            // Some kernels never answer such a question.
            let message = format!("{at} is beyond the end of the code; allowed are 0 to {}", end());
            return Err(Error::SpecRejected(vec![FieldError::new("/cursor", message)]));
        }
        let (msg_type, content) = match question {
            Question::Complete(at) => ("complete_request", json!({"code": code, "cursor_pos": at.unwrap_or_else(end)})),
            Question::Inspect(at, detail) => {
                let at = at.unwrap_or_else(end);
                ("inspect_request", json!({"code": code, "cursor_pos": at, "detail_level": detail}))
            }
            Question::IsComplete => ("is_complete_request", json!({"code": code})),
        };
        let answer = self.session(who, id)?.ask_kernel(Some(context), msg_type, content).await?;
        match tokio::time::timeout(QUESTION, answer).await {
            Ok(Ok(content)) => Ok(content),
            Ok(Err(_)) => Err(Error::GuestUnreachable),
            Err(_) => Err(Error::KernelBusy(QUESTION)),
        }
    }

    /// Holds tenants to these quotas, with what an earlier process has left going on.
    #[must_use]
    pub fn with_quotas(self, quotas: Arc<Quotas>) -> Self {
        for (session, execution) in self.registry.unfinished_executions() {
            count(quotas.go_on(&session.tenant), self.metrics(), &session, execution);
        }
        Self { quotas, ..self }
    }

    /// Counts a request of a tenant's. Says what is left, where there is a limit.
    ///
    /// # Errors
    /// [`Error::RateLimited`].
    pub fn request(&self, who: &Principal) -> Result<Option<RateState>, Error> {
        self.quotas.request(&who.tenant, Instant::now())
    }

    /// What the caller's tenant uses, and how much it may.
    #[must_use]
    pub fn usage(&self, who: &Principal) -> Usage {
        let now = jiff::Timestamp::now();
        let used = self.quotas.used(&who.tenant, now);
        Usage {
            tenant: Arc::clone(&who.tenant),
            quota: self.quotas.of(&who.tenant),
            held: self.registry.held(&who.tenant),
            workspaces: self.registry.workspaces().count(&who.tenant),
            executions: used.executions,
            stored_bytes: self.stored(&who.tenant),
            cpu_today: used.cpu,
            day_ends_at: quotas::midnight_after(now),
        }
    }

    fn stored(&self, tenant: &str) -> u64 {
        self.archive.as_ref().map_or(0, |archive| archive.stored(tenant))
    }

    /// What a session uses at this moment. A paused one is not resumed for it, and it is no activity.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn session_metrics(&self, who: &Principal, id: SessionId) -> Result<SessionMetrics, Error> {
        let session = self.session(who, id)?;
        if matches!(session.phase(), Phase::Pausing | Phase::Paused) {
            let message = "the session is paused, and looking into it would resume it; POST …/resume does";
            return Err(Error::StateConflict(message.to_owned()));
        }
        let used = session.link().await?.stats().await.map_err(|error| unreachable_guest(id, &error))?;
        Ok(SessionMetrics { at: jiff::Timestamp::now(), used, limits: session.spec.resources })
    }

    /// The templates that a key allows, each with what the engine knows of its image.
    pub async fn templates(&self, who: &Principal) -> Vec<TemplateView> {
        let choice = self.offer.now();
        let looks =
            choice.templates.values().filter(|template| who.admits(&template.name)).map(|template| async move {
                let image = self.engine.resolve_image(&template.image, Pull::Never).await.ok();
                TemplateView { template: template.clone(), image }
            });
        futures_util::future::join_all(looks).await
    }

    /// The pools of sessions that are made before anybody asks, of the templates that a key allows.
    #[must_use]
    pub fn pools(&self, who: &Principal) -> Vec<PoolView> {
        self.registry.pool().views().into_iter().filter(|pool| who.admits(&pool.template)).collect()
    }

    /// The templates that a key allows.
    #[must_use]
    pub fn offered(&self, who: &Principal) -> Vec<Template> {
        self.offer.now().templates.values().filter(|template| who.admits(&template.name)).cloned().collect()
    }

    /// A template by its name.
    #[must_use]
    pub fn template(&self, name: &str) -> Option<Template> {
        self.offer.now().templates.get(name).cloned()
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        self.registry.metrics()
    }

    /// All figures of the server, in the text format of Prometheus.
    #[must_use]
    pub fn exposition(&self) -> String {
        self.metrics().render(&self.registry.levels())
    }

    /// The template that is used when none is named.
    #[must_use]
    pub fn default_template(&self) -> String {
        self.offer.now().default.clone()
    }

    /// Whether new work is accepted and the engine answers.
    ///
    /// # Errors
    /// [`Error::Draining`] or [`Error::EngineUnavailable`].
    pub async fn ready(&self) -> Result<(), Error> {
        self.accepts()?;
        // Anybody may ask, without a key, so the engine is asked once for all who ask at the same time.
        let mut seen = self.engine_seen.lock().await;
        let answers = match *seen {
            Some((at, answers)) if at.elapsed() < READINESS => answers,
            _ => {
                let answers = self.engine.info().await.is_ok();
                *seen = Some((Instant::now(), answers));
                answers
            }
        };
        if answers { Ok(()) } else { Err(Error::EngineUnavailable) }
    }
}

/// What is meant by an end that a caller names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NewEnd {
    /// That one; refused where the session would be older than its template allows.
    #[default]
    Exactly,
    /// That one, or the last that its template allows if that comes first.
    Within,
    /// The same, but never sooner than it would end anyway.
    Later,
}

/// A change of a live session, as a caller asks for it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SessionPatch {
    /// It ends for its age this long from now.
    pub expires_in_seconds: Option<f64>,
    /// What is meant by that.
    pub end: NewEnd,
    /// It ends after this long without work.
    pub idle_seconds: Option<f64>,
    /// Replaces its labels.
    pub labels: Option<BTreeMap<String, String>>,
    /// Are among its labels from then on: who adds some takes none from others who do the same.
    pub more_labels: BTreeMap<String, String>,
    /// What it is to reach.
    pub network: NetworkRequest,
}

impl SessionPatch {
    fn resolve(&self, session: &Session) -> Result<Patch, Error> {
        let mut errors = Vec::new();
        if let Some(labels) = &self.labels {
            spec::check_labels(labels, &mut errors);
        }
        spec::check_labels(&self.more_labels, &mut errors);
        let mut seconds = |field: &str, asked: Option<f64>, most: Duration| {
            asked.and_then(|asked| {
                spec::seconds_within(asked, most).map_err(|m| errors.push(FieldError::new(field, m))).ok()
            })
        };
        let age = jiff::Timestamp::now().duration_since(session.created_at).unsigned_abs();
        let now = session.snapshot().attributes.network.clone();
        let network = session.spec.network.choose(&now, &self.network);
        let most = match self.end {
            NewEnd::Exactly => session.spec.max_lifetime.saturating_sub(age),
            NewEnd::Within | NewEnd::Later => session.spec.max_lifetime,
        };
        let patch = Patch {
            network: network.as_ref().ok().filter(|network| **network != now).cloned(),
            expires_in: seconds("/expires_in_seconds", self.expires_in_seconds, most),
            only_later: self.end == NewEnd::Later,
            idle: seconds("/idle_seconds", self.idle_seconds, session.spec.max_idle),
            labels: self.labels.clone(),
            more_labels: self.more_labels.clone(),
        };
        errors.extend(network.err().unwrap_or_default());
        if errors.is_empty() { Ok(patch) } else { Err(Error::SpecRejected(errors)) }
    }
}

fn not_once(why: NotOnce) -> String {
    match why {
        NotOnce::InFlight => "the first request with this Idempotency-Key is still being answered".to_owned(),
        NotOnce::Mismatch => "another request had this Idempotency-Key; take a new key for each request".to_owned(),
        NotOnce::TooMany(_) => format!("{MAX_KEYS} keys were given to requests within a day, which is all that may be"),
    }
}

fn unreachable_guest(id: SessionId, error: &LinkError) -> Error {
    tracing::warn!(session = %id, %error, "a session's guest could not be asked");
    Error::GuestUnreachable
}

/// Performs something to its end, whether or not anybody waits for it. Nothing is answered only if it panicked.
async fn carry_on<T: Send + 'static>(name: &'static str, work: impl Future<Output = T> + Send + 'static) -> Option<T> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let trail = trail::current();
    task::spawn(name, async move {
        // Whoever asked may have left.
        let _ = answer.send(trail::follow(trail, work).await);
    });
    answered.await.ok()
}

/// Refuses a session that alone is more than its tenant may have.
fn check_size(quota: &Quota, spec: &SessionSpec) -> Result<(), Error> {
    let (cpu_millis, memory_bytes) = (spec.resources.cpu_millis.into(), spec.resources.memory_bytes);
    quota.share.admits(&Held::default(), cpu_millis, memory_bytes).map_err(|Exceeded { name, limit }| {
        let (field, most) = match name {
            "cpu" => ("/resources/cpu", (limit as f64 / 1000.0).to_string()),
            _ => ("/resources/memory_mb", (limit / spec::MIB).to_string()),
        };
        let message = format!("it is more than all sessions of the tenant may have together, {most}");
        Error::SpecRejected(vec![FieldError::new(field, message)])
    })
}

/// Waits until a session's container is gone. Its removal goes on by itself if that takes too long.
async fn wait_for_end(session: &Session) {
    let ended = session.wait_for(|s| matches!(s.phase, Phase::Ended(_)));
    if tokio::time::timeout(END_WAIT, ended).await.is_err() {
        tracing::warn!(session = %session.id, "a session's container is not gone yet; its removal goes on");
    }
}

/// What a fault of a start means for a caller: whether trying again may help.
#[must_use]
pub fn is_retryable(fault: StartFault) -> bool {
    !matches!(fault, StartFault::KernelFailed | StartFault::SetupFailed | StartFault::EngineRefused)
}
