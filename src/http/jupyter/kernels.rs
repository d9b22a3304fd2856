//! Kernels over REST: sessions as Jupyter's clients see them. Decides nothing that the service decides.

use std::collections::BTreeMap;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::asking::{Asking, Loose, Named, Refusal, kernel_missing, renamed};
use super::{READY_WITHIN, kernelspecs};
use crate::domain::ids::SessionId;
use crate::domain::lifecycle::Phase;
use crate::domain::spec::SessionRequest;
use crate::http::extract::Answer;
use crate::http::problem::{self, Problem};
use crate::service::Filter;
use crate::session::Session;
use crate::session::registry::Created;

/// The label of a session with the name under which its template was asked for, where that is another one.
const ASKED_LABEL: &str = "jupyter.kernelspec";

/// A kernel.
#[derive(Debug, Clone, Serialize)]
pub struct Model {
    pub(super) id: String,
    name: String,
    pub(super) last_activity: String,
    execution_state: &'static str,
    pub(super) connections: usize,
}

impl Model {
    pub(super) fn of(session: &Session) -> Self {
        let snapshot = session.snapshot();
        let execution_state = match snapshot.phase {
            Phase::Provisioning | Phase::Connecting | Phase::Replacing => "starting",
            Phase::Ready if snapshot.busy => "busy",
            Phase::Ready | Phase::Pausing | Phase::Paused | Phase::Resuming => "idle",
            Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_) => "dead",
        };
        let asked = snapshot.attributes.labels.get(ASKED_LABEL);
        Self {
            id: id_of(session),
            name: asked.unwrap_or(&session.spec.template).clone(),
            last_activity: time(snapshot.last_active),
            execution_state,
            connections: session.tap.listeners(),
        }
    }
}

/// A moment in the one form that all clients read: some want a fraction, of six digits at most.
pub(super) fn time(at: Timestamp) -> String {
    format!("{at:.6}")
}

/// What a session is called here: its own id, or the one that a client has given it, which is its name then.
pub(super) fn id_of(session: &Session) -> String {
    let given = session.spec.name.as_deref().filter(|name| is_id(name));
    given.map_or_else(|| session.id.uuid().to_string(), str::to_owned)
}

/// Whether a text is a UUID as clients write it, so that it is one kernel's only.
fn is_id(text: &str) -> bool {
    text.len() == 36 && text.parse::<Uuid>().is_ok_and(|id| id.to_string() == text)
}

/// All kernels of whoever asks.
pub(super) fn all(asking: &Asking) -> Result<Vec<Session>, Refusal> {
    let sessions = asking.app.service.list_sessions(&asking.who, &Filter::default(), None)?;
    Ok(sessions.into_iter().filter(|session| !session.is_over()).collect())
}

/// A kernel by its id.
pub(super) fn find(asking: &Asking, id: &str) -> Result<Session, Refusal> {
    let service = &asking.app.service;
    let missing = || kernel_missing(id);
    let uuid = Some(id).filter(|id| is_id(id)).and_then(|id| id.parse::<Uuid>().ok()).ok_or_else(missing)?;
    let filter = Filter { name: Some(id.to_owned()), ..Filter::default() };
    let named = service.list_sessions(&asking.who, &filter, None)?.into_iter().find(|session| !session.is_over());
    let id = named.map_or(SessionId::from_uuid(uuid), |session| session.id);
    let found = service.session(&asking.who, id).map_err(|error| renamed(error, &uuid.to_string()))?;
    // Under its own id only if it has no other.
    if found.is_over() || id_of(&found) != uuid.to_string() { Err(missing()) } else { Ok(found) }
}

pub(super) async fn list_kernels(asking: Asking) -> Result<Answer<Vec<Model>>, Refusal> {
    Ok(Answer(all(&asking)?.iter().map(Model::of).collect()))
}

pub(super) async fn get_kernel(asking: Asking, Named(id): Named) -> Result<Answer<Model>, Refusal> {
    Ok(Answer(Model::of(&find(&asking, &id)?)))
}

/// What a kernel is to be; everything is optional, and more is sent than is read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct CreateKernel {
    name: Option<String>,
    kernel_id: Option<String>,
    env: Option<BTreeMap<String, String>>,
}

pub(super) async fn create_kernel(asking: Asking, Loose(body): Loose<CreateKernel>) -> Result<Response, Refusal> {
    let wanted =
        Wanted { name: body.name, id: body.kernel_id, env: body.env.unwrap_or_default(), labels: BTreeMap::new() };
    let session = start(&asking, wanted).await?;
    let model = Model::of(&session);
    let location = format!("{}/api/kernels/{}", asking.base, model.id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Answer(model)).into_response())
}

/// What a kernel is to be.
pub(super) struct Wanted {
    /// Its kernelspec.
    pub(super) name: Option<String>,
    pub(super) id: Option<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) labels: BTreeMap<String, String>,
}

/// Starts a kernel. It is ready, or takes so long that its caller is not to wait for it.
pub(super) async fn start(asking: &Asking, wanted: Wanted) -> Result<Session, Refusal> {
    let service = &asking.app.service;
    let Wanted { name, id, env, mut labels } = wanted;
    if let Some(id) = &id {
        check_given_id(asking, id)?;
    }
    let template = name.as_ref().map(|name| kernelspecs::template_of(service, name));
    if let (Some(name), Some(template)) = (&name, &template)
        && name != template
    {
        labels.insert(ASKED_LABEL.to_owned(), name.clone());
    }
    let request = SessionRequest { template, name: id, env, labels, ..SessionRequest::default() };
    let created = service.create_session(&asking.who, &request, false, None).await;
    let (Created::New(session) | Created::Reused(session)) = created.map_err(|error| {
        let refusal = Refusal::from(error);
        let is_unknown = name.is_some() && refusal.is_about("/template");
        if is_unknown { refusal.with_status(StatusCode::NOT_FOUND) } else { refusal }
    })?;
    // It goes on starting if that takes longer.
    if let Ok(started) = tokio::time::timeout(READY_WITHIN, service.started(&session)).await {
        started?;
    }
    Ok(session)
}

/// A client may name a kernel, if nothing else of its tenant's is called that.
fn check_given_id(asking: &Asking, id: &str) -> Result<(), Refusal> {
    if !is_id(id) {
        let detail = format!("{id:?} can't be a kernel_id; allowed is a UUID in lower case with dashes, or none");
        return Err(Refusal::malformed(detail));
    }
    let is_taken = find(asking, id).is_ok()
        || id.parse::<Uuid>().is_ok_and(|id| asking.app.service.session(&asking.who, id.into()).is_ok());
    let taken = || Problem::new(problem::NAME_IN_USE, format!("Kernel already exists: {id}"));
    if is_taken { Err(taken().into()) } else { Ok(()) }
}

pub(super) async fn delete_kernel(asking: Asking, Named(id): Named) -> Result<StatusCode, Refusal> {
    let session = find(&asking, &id)?;
    asking.app.service.delete_session(&asking.who, session.id).await.map_err(|error| renamed(error, &id))?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn interrupt_kernel(asking: Asking, Named(id): Named) -> Result<StatusCode, Refusal> {
    let session = find(&asking, &id)?;
    let context = Some(session.default_context);
    asking.app.service.interrupt(&asking.who, session.id, context).await.map_err(|error| renamed(error, &id))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Answers once the new kernel does.
pub(super) async fn restart_kernel(asking: Asking, Named(id): Named) -> Result<Answer<Model>, Refusal> {
    let session = find(&asking, &id)?;
    let context = Some(session.default_context);
    let again = asking.app.service.restart(&asking.who, session.id, context).await;
    Ok(Answer(Model::of(&again.map_err(|error| renamed(error, &id))?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_six_digits_after_the_point() {
        assert_eq!(time("2026-01-02T03:04:05Z".parse().unwrap()), "2026-01-02T03:04:05.000000Z");
        assert_eq!(time("2026-01-02T03:04:05.123456789Z".parse().unwrap()), "2026-01-02T03:04:05.123456Z");
    }

    #[test]
    fn an_id_has_one_spelling() {
        assert!(is_id("0190b5a5-1234-7abc-8def-0123456789ab"));
        for wrong in [
            "0190B5A5-1234-7abc-8def-0123456789ab",
            "0190b5a512347abc8def0123456789ab",
            "{0190b5a5-1234-7abc-8def-0123456789ab}",
            "../../x",
            "",
        ] {
            assert!(!is_id(wrong), "{wrong}");
        }
    }
}
