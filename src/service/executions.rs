//! Executions: code that callers have run, answer, look for and take back. What is allowed to be asked is judged here; how it runs is the session's.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::keys::Principal;
use super::quotas::Running;
use super::{CPU_SLACK, Error, Service, carry_on, languages, trail};
use crate::domain::execution::AskedBy;
use crate::domain::ids::{ContextId, ExecutionId, SessionId};
use crate::domain::lifecycle::EndReason;
use crate::domain::output::Comm;
use crate::domain::spec::{self, FieldError, SessionRequest, SessionSpec};
use crate::metrics::Metrics;
use crate::session::execution::{Execution, ExecutionRequest, OnTimeout, Stdin};
use crate::session::once::{Made, Reservation};
use crate::session::registry::Created;
use crate::session::{Refused, Session, fresh};
use crate::store::Blob;
use crate::store::state::Lasting;
use crate::task;

/// Longest code of one execution, in bytes: written as JSON it fits into one frame of the link, whatever is in it.
pub const MAX_CODE: usize = 3 * 1024 * 1024;
/// Longest line of input, in bytes.
pub const MAX_LINE: usize = 64 * 1024;
/// Most lines of input that come with an execution, and most bytes of them.
const MAX_LINES: (usize, usize) = (1000, 1024 * 1024);
/// Most user expressions, and most bytes of one.
const MAX_EXPRESSIONS: (usize, usize) = (32, 64 * 1024);
/// Most buffers of a comm's message; a message of more parts is no message of Jupyter's for the guest.
const MAX_BUFFERS: usize = 32;

/// What is asked of an execution.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExecuteRequest {
    /// The code.
    pub code: String,
    /// Where it runs; the session's first context when absent.
    pub context: Option<ContextId>,
    /// In which language: where no context is named, that language's runs it, and is made if there is none.
    pub language: Option<String>,
    /// Its time limit; the session's when absent.
    pub timeout_seconds: Option<f64>,
    /// Nothing is shown and nothing is counted.
    pub silent: bool,
    /// It takes part in the kernel's count; yes when absent.
    pub store_history: Option<bool>,
    /// Bytes of stdout and of stderr, each; the template's limit when absent.
    pub max_output_bytes: Option<u64>,
    /// What it gets when it asks for a line.
    pub stdin: Stdin,
    /// Expressions that are evaluated after it, by name.
    pub user_expressions: BTreeMap<String, String>,
    /// What happens at its time limit first.
    pub on_timeout: OnTimeout,
    /// When it fails, what waits behind it and came from a Jupyter client does not run.
    pub stop_on_error: bool,
    /// The message of a Jupyter client that asks for it.
    pub asked_by: Option<AskedBy>,
    /// A message of a comm instead of code.
    pub comm: Option<Comm>,
}

impl Service {
    /// Gives an execution the line of input that it asks for.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn answer_input(&self, who: &Principal, id: ExecutionId, line: String) -> Result<Arc<Execution>, Error> {
        who.require_sessions()?;
        if line.len() > MAX_LINE {
            let message = format!("{} bytes; allowed are {MAX_LINE}", line.len());
            return Err(Error::SpecRejected(vec![FieldError::new("/text", message)]));
        }
        let execution = self.execution(who, id)?;
        if execution.status().is_final() {
            return Err(Refused::NothingAsked.into());
        }
        self.session(who, execution.place.session)?.answer_input(id, line).await?;
        Ok(execution)
    }

    /// Runs code in a session of its own, which ends with it. It goes on whether or not anybody listens, unless it was abandoned
    /// before the session was ready.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn run(
        self: &Arc<Self>,
        who: &Principal,
        session: SessionRequest,
        request: ExecuteRequest,
        abandoned: CancellationToken,
        once: Option<Reservation>,
    ) -> Result<Arc<Execution>, Error> {
        who.require_sessions()?;
        // Before anything starts: the session's specification is what the request is held against.
        let spec = self.specify(who, &session)?.1;
        resolve_execution(&spec, request.clone())?;
        self.quotas.check_execution(&who.tenant, self.stored(&who.tenant), jiff::Timestamp::now())?;
        let (service, who) = (Arc::clone(self), who.clone());
        let accepted = carry_on("run", async move {
            let created = service.create(&who, &session, true, Lasting::Never, None).await?;
            let (Created::New(session) | Created::Reused(session)) = created;
            let accepted = match abandoned.is_cancelled() {
                true => Err(Error::SessionEnded(EndReason::Deleted)),
                false => service.execute(&who, session.id, request, once).await,
            };
            let execution = accepted.inspect_err(|_| session.end(EndReason::Deleted))?;
            session.end_after(Arc::clone(&execution));
            Ok(execution)
        });
        accepted.await.unwrap_or(Err(Error::GuestUnreachable))
    }

    /// A long content of an execution's result.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Forbidden`].
    pub async fn blob(&self, who: &Principal, id: ExecutionId, number: u32) -> Result<Blob, Error> {
        who.require_read()?;
        // What is not known of it any more is not known to be of a template that the key allows.
        if who.templates.is_some() {
            self.execution(who, id).map_err(|_| Error::NotFound("blob"))?;
        }
        let archive = self.archive.as_ref().ok_or(Error::NotFound("blob"))?;
        archive.blob(&who.tenant, id, number).await.ok_or(Error::NotFound("blob"))
    }

    /// Runs code in a session, or lets it wait for its turn. It goes on whether or not anybody listens.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn execute(
        self: &Arc<Self>,
        who: &Principal,
        id: SessionId,
        request: ExecuteRequest,
        once: Option<Reservation>,
    ) -> Result<Arc<Execution>, Error> {
        who.require_sessions()?;
        let session = self.session(who, id)?;
        self.accepts()?;
        trail::note_code(&all_code(&request));
        let (context, language) = (request.context, request.language.clone());
        let request = resolve_execution(&session.spec, request)?;
        let running = self.quotas.begin_execution(&who.tenant, self.stored(&who.tenant), jiff::Timestamp::now())?;
        let service = Arc::clone(self);
        // What was accepted is kept even if its caller leaves at this moment.
        let accepted = carry_on("execute", async move {
            let id = fresh();
            if let Some(once) = &once {
                once.will_be(Made::Execution(id));
            }
            let context = match language {
                Some(language) => languages::context_for(&session, &language).await.map(Some),
                None => Ok(context),
            };
            let accepted = match context {
                Ok(context) => session.execute(id, context, request).await.map_err(Error::from),
                Err(error) => Err(error),
            };
            if let Ok(execution) = &accepted {
                trail::note_execution(id);
                trail::note_context(execution.place.context);
                trail::trace(execution, &session.spec.template);
                service.registry.keep(execution);
                count(running, service.metrics(), &session, Arc::clone(execution));
            }
            let kept = match once {
                Some(once) => service.settle_key(once, &accepted).await,
                None => service.kept().await,
            };
            if kept.is_err() && accepted.is_ok() {
                // Nobody is told of it, so it is not to run.
                session.cancel_unheard(id);
            }
            kept.and(accepted)
        });
        accepted.await.unwrap_or(Err(Error::GuestUnreachable))
    }

    /// An execution, running or kept.
    ///
    /// # Errors
    /// [`Error::NotFound`] or [`Error::Forbidden`].
    pub fn execution(&self, who: &Principal, id: ExecutionId) -> Result<Arc<Execution>, Error> {
        trail::note_execution(id);
        who.require_read()?;
        let execution = self.registry.execution(&who.tenant, id);
        let is_meant = |execution: &Arc<Execution>| self.session(who, execution.place.session).is_ok();
        execution.filter(is_meant).ok_or(Error::NotFound("execution"))
    }

    /// For how long an execution can be looked for after its end, at most.
    #[must_use]
    pub fn executions_are_kept(&self) -> Duration {
        self.registry.executions_are_kept()
    }

    /// Takes an execution back: out of the queue, or by an interrupt. One that has ended stays as it is.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn cancel(&self, who: &Principal, id: ExecutionId) -> Result<Arc<Execution>, Error> {
        who.require_sessions()?;
        let execution = self.execution(who, id)?;
        if !execution.status().is_final() {
            self.session(who, execution.place.session)?.cancel(id)?;
        }
        Ok(execution)
    }

    /// Takes an execution back whose caller has hung up; nobody is there to hear an answer.
    pub fn cancel_unheard(&self, who: &Principal, execution: &Execution) {
        if let Ok(session) = self.session(who, execution.place.session)
            && !execution.status().is_final()
        {
            session.cancel_unheard(execution.id);
        }
    }
}

/// All that runs: the code, and after it the expressions that are evaluated, a line each in the order of their names.
fn all_code(request: &ExecuteRequest) -> Cow<'_, str> {
    let expressions = request.user_expressions.values();
    match request.user_expressions.is_empty() {
        true => Cow::Borrowed(&request.code),
        false => std::iter::once(&request.code).chain(expressions).cloned().collect::<Vec<_>>().join("\n").into(),
    }
}

fn resolve_execution(spec: &SessionSpec, request: ExecuteRequest) -> Result<ExecutionRequest, Error> {
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
    if let Some(language) = &request.language {
        if !spec::is_name(language) {
            errors.push(FieldError::new("/language", "allowed are 1 to 64 letters, digits, \".\", \"_\" and \"-\""));
        } else if request.context.is_some() {
            errors.push(FieldError::new("/language", "the context has its language; name one of the two"));
        }
    }
    check_input(&request, &mut errors);
    if !errors.is_empty() {
        return Err(Error::SpecRejected(errors));
    }
    Ok(ExecutionRequest {
        code: request.code,
        timeout,
        silent: request.silent,
        store_history: request.store_history.unwrap_or(true),
        output,
        stdin: request.stdin,
        user_expressions: request.user_expressions,
        on_timeout: request.on_timeout,
        stop_on_error: request.stop_on_error,
        asked_by: request.asked_by,
        comm: request.comm,
    })
}

fn check_input(request: &ExecuteRequest, errors: &mut Vec<FieldError>) {
    if let Some(comm) = &request.comm
        && (comm.len() > MAX_CODE || comm.buffers.len() > MAX_BUFFERS)
    {
        let (bytes, buffers) = (comm.len(), comm.buffers.len());
        let message =
            format!("{bytes} bytes and {buffers} buffers; allowed are {MAX_CODE} bytes and {MAX_BUFFERS} buffers");
        errors.push(FieldError::new("/content", message));
    }
    if let Stdin::Lines(lines) = &request.stdin {
        let bytes: usize = lines.iter().map(String::len).sum();
        if lines.len() > MAX_LINES.0 || bytes > MAX_LINES.1 {
            let message = format!(
                "{} lines of {bytes} bytes in all; allowed are {} of {} bytes in all",
                lines.len(),
                MAX_LINES.0,
                MAX_LINES.1
            );
            errors.push(FieldError::new("/stdin", message));
        }
        for (at, line) in lines.iter().enumerate().filter(|(_, line)| line.len() > MAX_LINE) {
            let message = format!("{} bytes; allowed are {MAX_LINE}", line.len());
            errors.push(FieldError::new(format!("/stdin/{at}"), message));
        }
    }
    let (count, longest) = MAX_EXPRESSIONS;
    if request.user_expressions.len() > count {
        let message = format!("{} expressions; allowed are {count}", request.user_expressions.len());
        errors.push(FieldError::new("/user_expressions", message));
    }
    for (name, expression) in &request.user_expressions {
        if !spec::is_name(name) || expression.len() > longest {
            let pointer = format!("/user_expressions/{}", spec::escape_pointer(name));
            let message = format!(
                "a name is 1 to 64 letters, digits, \".\", \"_\" and \"-\", an expression at most {longest} bytes"
            );
            errors.push(FieldError::new(pointer, message));
        }
    }
}

/// Counts an execution until it ends, and what it has used of CPUs then.
pub(super) fn count(running: Running, metrics: &Metrics, session: &Session, execution: Arc<Execution>) {
    let (cpu_millis, metrics, tenant) =
        (session.spec.resources.cpu_millis, metrics.clone(), Arc::clone(&session.tenant));
    task::spawn("usage", async move {
        execution.ended().await;
        // The next process counts what goes on there.
        if execution.status().is_final() {
            let (told, duration) = execution.cpu_and_duration();
            // What nobody has told is as much as it can have been.
            let most = duration.mul_f64(f64::from(cpu_millis) / 1000.0);
            let used = told.map_or(most, |told| told.min(most.saturating_add(CPU_SLACK)));
            running.used(used, jiff::Timestamp::now());
            metrics.execution_of_tenant_ended(&tenant, execution.status(), used);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_that_is_told_has_the_expressions_behind_it() {
        let expressions = [("b", "open('b')"), ("a", "1 + 1")];
        let user_expressions = expressions.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
        let request = ExecuteRequest { code: "x = 1".to_owned(), ..ExecuteRequest::default() };
        assert_eq!(all_code(&request), "x = 1");
        assert_eq!(all_code(&ExecuteRequest { user_expressions, ..request }), "x = 1\n1 + 1\nopen('b')");
    }
}
