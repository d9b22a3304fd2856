//! Every command of the product, without HTTP: the [`Principal`] first, then what is wanted.
//!
//! Front doors translate; sessions run; what a caller may do and how much, is decided here. Errors are one closed enum.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_wire::link::FileEntry;
use hyper::body::Incoming;

use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::lifecycle::{EndReason, Phase};
use crate::domain::spec::{self, FieldError, SessionRequest, Template};
use crate::engine::{Engine, EngineError, ImageInfo, Pull};
use crate::kernel::link::LinkError;
use crate::session::execution::{Execution, ExecutionRequest};
use crate::session::registry::{CreateRefused, Created, Registry};
use crate::session::{Patch, Refused, Session, StartFailure, StartFault};
use crate::task;

pub mod keys;

use keys::Principal;

/// Longest wait that a caller may ask for.
pub const MAX_WAIT: Duration = Duration::from_secs(300);
/// What was seen of the engine counts for this long.
const READINESS: Duration = Duration::from_secs(1);
/// Longest code of one execution, in bytes: written as JSON it fits into one frame of the link, whatever is in it.
pub const MAX_CODE: usize = 3 * 1024 * 1024;
/// A deleted session is waited for this long; its removal goes on after that.
const END_WAIT: Duration = Duration::from_secs(30);

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// Fields of the request break a rule of the template.
    #[error("the request asks for what is not allowed")]
    SpecRejected(Vec<FieldError>),
    /// There is no such thing, or it is somebody else's.
    #[error("there is no such {0}")]
    NotFound(&'static str),
    /// The key has not the scope for this.
    #[error("the key lacks the scope \"{0}\"")]
    Forbidden(&'static str),
    /// The tenant has a live session of that name.
    #[error("a live session, {0}, has that name")]
    NameInUse(SessionId),
    /// The session is still starting.
    #[error("the session is still starting")]
    NotReady,
    /// The session has ended.
    #[error("the session has ended")]
    SessionEnded(EndReason),
    /// As many executions as allowed are waiting.
    #[error("too many executions are waiting in this session")]
    QueueFull,
    /// As many sessions live as may.
    #[error("as many sessions live as this server may hold")]
    AtCapacity,
    /// The server is stopping.
    #[error("the server is stopping")]
    Draining,
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
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::NotReady => Self::NotReady,
            Refused::Ended(reason) => Self::SessionEnded(reason),
            Refused::QueueFull => Self::QueueFull,
            Refused::NoSuchContext => Self::NotFound("context"),
            Refused::KernelLost => Self::GuestUnreachable,
        }
    }
}

/// What is asked of an execution.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExecuteRequest {
    /// The code.
    pub code: String,
    /// Where it runs; the session's first context when absent.
    pub context: Option<ContextId>,
    /// Its time limit; the session's when absent.
    pub timeout_seconds: Option<f64>,
    /// Nothing is shown and nothing is counted.
    pub silent: bool,
    /// It takes part in the kernel's count; yes when absent.
    pub store_history: Option<bool>,
    /// Bytes of stdout and of stderr, each; the template's limit when absent.
    pub max_output_bytes: Option<u64>,
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
    templates: BTreeMap<String, Template>,
    default_template: String,
    pull: Pull,
    /// When the engine was last asked whether it answers, and whether it did.
    engine_seen: tokio::sync::Mutex<Option<(Instant, bool)>>,
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
        templates: BTreeMap<String, Template>,
        default_template: String,
        pull: Pull,
    ) -> Self {
        Self { registry, engine, templates, default_template, pull, engine_seen: tokio::sync::Mutex::default() }
    }

    /// Creates a session, or finds the live one of that name. With `wait` it answers once the session is ready, or has failed
    /// and nothing of it is left.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn create_session(
        &self,
        who: &Principal,
        request: &SessionRequest,
        wait: bool,
    ) -> Result<Created, Error> {
        who.require_sessions()?;
        let name = request.template.as_ref().unwrap_or(&self.default_template);
        let template = self.templates.get(name).ok_or_else(|| {
            let known = self.templates.keys().map(|t| format!("\"{t}\"")).collect::<Vec<_>>().join(", ");
            Error::SpecRejected(vec![FieldError::new(
                "/template",
                format!("there is no template of that name; there are {known}"),
            )])
        })?;
        let mut spec = spec::resolve(template, request).map_err(Error::SpecRejected)?;
        spec.image = self.resolve_image(template).await?.id;
        let created = self.registry.create(&who.tenant, spec, request.reuse).map_err(|refused| match refused {
            CreateRefused::AtCapacity => Error::AtCapacity,
            CreateRefused::NameInUse(id) => Error::NameInUse(id),
            CreateRefused::Draining => Error::Draining,
        })?;
        if wait {
            let (Created::New(session) | Created::Reused(session)) = &created;
            self.wait_until_started(session).await?;
        }
        Ok(created)
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

    async fn wait_until_started(&self, session: &Session) -> Result<(), Error> {
        let started = |phase: Phase| !matches!(phase, Phase::Provisioning | Phase::Connecting);
        let snapshot = session.wait_for(|s| started(s.phase)).await;
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
    /// [`Error::NotFound`].
    pub fn session(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        self.registry.session(&who.tenant, id).ok_or(Error::NotFound("session"))
    }

    /// A tenant's sessions in the order of their creation, after one of them.
    #[must_use]
    pub fn list_sessions(&self, who: &Principal, filter: &Filter, after: Option<SessionId>) -> Vec<Session> {
        let sessions = self.registry.sessions(&who.tenant, after);
        sessions.into_iter().filter(|s| filter.admits(s)).collect()
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
        Ok(session)
    }

    /// Ends all live sessions that a filter admits; answers with them once their containers are gone.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn delete_sessions(&self, who: &Principal, filter: &Filter) -> Result<Vec<Session>, Error> {
        who.require_sessions()?;
        let sessions = self.list_sessions(who, filter, None);
        let live: Vec<_> = sessions.into_iter().filter(|s| !s.is_over()).collect();
        live.iter().for_each(|s| s.end(EndReason::Deleted));
        futures_util::future::join_all(live.iter().map(wait_for_end)).await;
        Ok(live)
    }

    /// Changes a live session.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn patch_session(&self, who: &Principal, id: SessionId, change: &SessionPatch) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.patch(change.resolve(&session)?).await?;
        Ok(session)
    }

    /// Counts as activity of a session.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn keep_alive(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.keep_alive().await?;
        Ok(session)
    }

    /// Interrupts what runs in a session.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn interrupt(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.interrupt().await?;
        Ok(session)
    }

    /// Replaces a session's kernels; answers once the new ones do.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn restart(&self, who: &Principal, id: SessionId) -> Result<Session, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        session.restart().await?;
        Ok(session)
    }

    /// Runs code in a session, or lets it wait for its turn. It goes on whether or not anybody listens.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn execute(
        &self,
        who: &Principal,
        id: SessionId,
        request: ExecuteRequest,
    ) -> Result<Arc<Execution>, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        if self.registry.is_draining() {
            return Err(Error::Draining);
        }
        let (context, request) = (request.context, resolve_execution(&session, request)?);
        let registry = Arc::clone(&self.registry);
        // What was accepted is kept even if its caller leaves at this moment.
        let accepted = carry_on("execute", async move {
            let execution = session.execute(context, request).await?;
            registry.keep(&execution);
            Ok(execution)
        });
        accepted.await.unwrap_or(Err(Error::GuestUnreachable))
    }

    /// An execution, running or kept.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn execution(&self, who: &Principal, id: ExecutionId) -> Result<Arc<Execution>, Error> {
        self.registry.execution(&who.tenant, id).ok_or(Error::NotFound("execution"))
    }

    /// Takes an execution back: out of the queue, or by an interrupt. One that has ended stays as it is.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn cancel(&self, who: &Principal, id: ExecutionId) -> Result<Arc<Execution>, Error> {
        who.require_sessions()?;
        let execution = self.execution(who, id)?;
        if !execution.status().is_final() {
            self.session(who, execution.session)?.cancel(id)?;
        }
        Ok(execution)
    }

    /// The regular files in a session's working folder. Names come from the code inside: they are hostile text.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn list_files(&self, who: &Principal, id: SessionId) -> Result<Vec<FileEntry>, Error> {
        let link = self.session(who, id)?.link().await?;
        link.files().await.map_err(|error| unreachable_guest(id, &error))
    }

    /// The bytes of a file in a session's working folder, as they come.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn read_file(&self, who: &Principal, id: SessionId, path: &str) -> Result<Incoming, Error> {
        let link = self.session(who, id)?.link().await?;
        link.read_file(path).await.map_err(|error| match error {
            LinkError::Refused { .. } => Error::NotFound("file"),
            error => unreachable_guest(id, &error),
        })
    }

    /// The templates, each with what the engine knows of its image.
    pub async fn templates(&self) -> Vec<TemplateView> {
        let looks = self.templates.values().map(|template| async move {
            let image = self.engine.resolve_image(&template.image, Pull::Never).await.ok();
            TemplateView { template: template.clone(), image }
        });
        futures_util::future::join_all(looks).await
    }

    /// The template that is used when none is named.
    #[must_use]
    pub fn default_template(&self) -> &str {
        &self.default_template
    }

    /// Whether new work is accepted and the engine answers.
    ///
    /// # Errors
    /// [`Error::Draining`] or [`Error::EngineUnavailable`].
    pub async fn ready(&self) -> Result<(), Error> {
        if self.registry.is_draining() {
            return Err(Error::Draining);
        }
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

/// A change of a live session, as a caller asks for it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SessionPatch {
    /// It ends for its age this long from now.
    pub expires_in_seconds: Option<f64>,
    /// It ends after this long without work.
    pub idle_seconds: Option<f64>,
    /// Replaces its labels.
    pub labels: Option<BTreeMap<String, String>>,
}

impl SessionPatch {
    fn resolve(&self, session: &Session) -> Result<Patch, Error> {
        let mut errors = Vec::new();
        if let Some(labels) = &self.labels {
            spec::check_labels(labels, &mut errors);
        }
        let mut seconds = |field: &str, asked: Option<f64>, most: Duration| {
            asked.and_then(|asked| {
                spec::seconds_within(asked, most).map_err(|m| errors.push(FieldError::new(field, m))).ok()
            })
        };
        let age = jiff::Timestamp::now().duration_since(session.created_at).unsigned_abs();
        let patch = Patch {
            expires_in: seconds(
                "/expires_in_seconds",
                self.expires_in_seconds,
                session.spec.max_lifetime.saturating_sub(age),
            ),
            idle: seconds("/idle_seconds", self.idle_seconds, session.spec.max_idle),
            labels: self.labels.clone(),
        };
        if errors.is_empty() { Ok(patch) } else { Err(Error::SpecRejected(errors)) }
    }
}

fn resolve_execution(session: &Session, request: ExecuteRequest) -> Result<ExecutionRequest, Error> {
    let spec = &session.spec;
    let mut errors = Vec::new();
    let timeout = match request.timeout_seconds {
        None => spec.timeouts.execution,
        Some(asked) => spec::seconds_within(asked, spec.max_execution).unwrap_or_else(|message| {
            errors.push(FieldError::new("/timeout_seconds", message));
            spec.timeouts.execution
        }),
    };
    if request.code.len() > MAX_CODE {
        let message = format!("{} bytes; allowed are {MAX_CODE}", request.code.len());
        errors.push(FieldError::new("/code", message));
    }
    let mut output = spec.output;
    if let Some(asked) = request.max_output_bytes {
        if asked == 0 || asked > output.text_bytes {
            let message = format!("{asked} was asked for; allowed are 1 to {}", output.text_bytes);
            errors.push(FieldError::new("/max_output_bytes", message));
        }
        output.text_bytes = asked;
    }
    if !errors.is_empty() {
        return Err(Error::SpecRejected(errors));
    }
    Ok(ExecutionRequest {
        code: request.code,
        timeout,
        silent: request.silent,
        store_history: request.store_history.unwrap_or(true),
        output,
    })
}

fn unreachable_guest(id: SessionId, error: &LinkError) -> Error {
    tracing::warn!(session = %id, %error, "a session's guest could not be asked");
    Error::GuestUnreachable
}

/// Performs something to its end, whether or not anybody waits for it. Nothing is answered only if it panicked.
async fn carry_on<T: Send + 'static>(name: &'static str, work: impl Future<Output = T> + Send + 'static) -> Option<T> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    task::spawn(name, async move {
        // Whoever asked may have left.
        let _ = answer.send(work.await);
    });
    answered.await.ok()
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
    !matches!(fault, StartFault::KernelFailed | StartFault::EngineRefused)
}
