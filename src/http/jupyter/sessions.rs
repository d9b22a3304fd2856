//! Jupyter's own sessions: which document a client has opened with which kernel. They are labels of the kernel's session, so they live and end with it, and
//! outlast this process.

use std::collections::BTreeMap;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::asking::{Asking, Loose, Named, Refusal};
use super::kernels::{self, Model, Wanted};
use super::{contents, kernelspecs};
use crate::http::extract::Answer;
use crate::service::{SessionPatch, trail};
use crate::session::{Session, fresh};

/// What the labels of such a session begin with; its id follows, and which of its words it is.
const PREFIX: &str = "jupyter.";
const WORDS: [&str; 3] = ["path", "name", "type"];

/// A session of Jupyter's.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Opened {
    id: Uuid,
    path: String,
    name: String,
    kind: String,
}

/// The same for clients.
#[derive(Debug, Serialize)]
pub struct View {
    id: String,
    path: String,
    name: String,
    #[serde(rename = "type")]
    kind: String,
    kernel: Model,
    #[serde(skip_serializing_if = "Option::is_none")]
    notebook: Option<Notebook>,
}

/// What older clients read.
#[derive(Debug, Serialize)]
struct Notebook {
    path: String,
    name: String,
}

impl Opened {
    fn labels(&self) -> [(String, String); 3] {
        let values = [&self.path, &self.name, &self.kind];
        let of = |at: usize| (format!("{PREFIX}{}.{}", self.id.simple(), WORDS[at]), values[at].clone());
        [of(0), of(1), of(2)]
    }

    /// All that a kernel's labels tell of.
    fn all(labels: &BTreeMap<String, String>) -> Vec<Self> {
        let ids = labels.keys().filter_map(|label| label.strip_prefix(PREFIX)?.strip_suffix(".path")?.parse().ok());
        let word = |id: Uuid, word: &str| labels.get(&format!("{PREFIX}{}.{word}", id.simple())).cloned();
        let of = |id: Uuid| {
            let [path, name, kind] = WORDS.map(|w| word(id, w).unwrap_or_default());
            Self { id, path, name, kind }
        };
        ids.map(of).collect()
    }

    fn view(self, kernel: &Session) -> View {
        let is_notebook = self.kind == "notebook";
        let notebook = is_notebook.then(|| Notebook { path: self.path.clone(), name: self.name.clone() });
        let Self { id, path, name, kind } = self;
        View { id: id.to_string(), path, name, kind, kernel: Model::of(kernel), notebook }
    }
}

fn all(asking: &Asking) -> Result<Vec<(Opened, Session)>, Refusal> {
    let kernels = kernels::all(asking)?.into_iter();
    let opened = kernels.flat_map(|kernel| {
        let opened = Opened::all(&kernel.snapshot().attributes.labels);
        opened.into_iter().map(move |opened| (opened, kernel.clone()))
    });
    Ok(opened.collect())
}

fn find(asking: &Asking, id: &str) -> Result<(Opened, Session), Refusal> {
    let found = all(asking)?.into_iter().find(|(opened, _)| opened.id.to_string() == id);
    found.ok_or_else(|| Refusal::missing(format!("Session not found: session_id={id:?}")))
}

pub(super) async fn list_sessions(asking: Asking) -> Result<Answer<Vec<View>>, Refusal> {
    Ok(Answer(all(&asking)?.into_iter().map(|(opened, kernel)| opened.view(&kernel)).collect()))
}

pub(super) async fn get_session(asking: Asking, Named(id): Named) -> Result<Answer<View>, Refusal> {
    let (opened, kernel) = find(&asking, &id)?;
    Ok(Answer(opened.view(&kernel)))
}

/// What is opened, or what is different about it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Body {
    path: Option<String>,
    name: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    kernel: Option<WithKernel>,
    notebook: Option<OldNotebook>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WithKernel {
    id: Option<String>,
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
struct OldNotebook {
    path: String,
}

pub(super) async fn create_session(asking: Asking, Loose(body): Loose<Body>) -> Result<Response, Refusal> {
    let is_old = body.notebook.is_some();
    let missing = |field: &str| Refusal::malformed(format!("Missing field in JSON data: {field}"));
    let path = body.path.or(body.notebook.map(|old| old.path)).ok_or_else(|| missing("path"))?;
    let kind = body.kind.or(is_old.then(|| "notebook".to_owned())).ok_or_else(|| missing("type"))?;
    if let Some((opened, kernel)) = all(&asking)?.into_iter().find(|(opened, _)| opened.path == path) {
        return Ok(created(&asking, opened, &kernel));
    }
    let opened = Opened { id: fresh(), path, name: body.name.unwrap_or_default(), kind };
    let wanted = beside_its_files(&asking, body.kernel.unwrap_or_default(), &opened.path)?;
    let kernel = with_kernel(&asking, wanted, &opened).await?;
    Ok(created(&asking, opened, &kernel))
}

/// A document that stands in a session's folder is opened with that session's kernel, where its files are, if it is one of the kind that is wanted.
fn beside_its_files(asking: &Asking, wanted: WithKernel, path: &str) -> Result<WithKernel, Refusal> {
    let Some((folder, _)) = path.split_once('/').filter(|_| wanted.id.is_none()) else { return Ok(wanted) };
    let template = wanted.name.as_ref().map(|name| kernelspecs::template_of(&asking.app.service, name));
    let is_meant = |session: &Session| template.as_ref().is_none_or(|template| *template == session.spec.template);
    let found = contents::session_of(asking, folder)?.filter(is_meant);
    Ok(found.map_or(wanted, |session| WithKernel { id: Some(kernels::id_of(&session)), name: None }))
}

fn created(asking: &Asking, opened: Opened, kernel: &Session) -> Response {
    let location = format!("{}/api/sessions/{}", asking.base, opened.id);
    (StatusCode::CREATED, [(header::LOCATION, location)], Answer(opened.view(kernel))).into_response()
}

/// The kernel that is meant, there or new, with the session among its labels.
async fn with_kernel(asking: &Asking, wanted: WithKernel, opened: &Opened) -> Result<Session, Refusal> {
    if let Some(id) = wanted.id {
        let gone = |_| Refusal::malformed(format!("No such kernel: {id}"));
        let kernel = kernels::find(asking, &id).map_err(gone)?;
        trail::note_action("patch_session");
        return relabel(asking, &kernel, opened).await;
    }
    let labels = opened.labels().into();
    let wanted = Wanted { name: wanted.name, id: None, env: BTreeMap::new(), labels };
    kernels::start(asking, wanted).await.map_err(|refusal| {
        let is_unknown = refusal.is_about("/template");
        // As the reference has it.
        if is_unknown { refusal.with_status(StatusCode::NOT_IMPLEMENTED) } else { refusal }
    })
}

/// Adds a document to those of a kernel, or says anew what it is.
async fn relabel(asking: &Asking, kernel: &Session, opened: &Opened) -> Result<Session, Refusal> {
    let patch = SessionPatch { more_labels: opened.labels().into(), ..SessionPatch::default() };
    Ok(asking.app.service.patch_session(&asking.who, kernel.id, &patch).await?)
}

pub(super) async fn patch_session(
    asking: Asking,
    Named(id): Named,
    Loose(body): Loose<Body>,
) -> Result<Answer<View>, Refusal> {
    let (before, kernel) = find(&asking, &id)?;
    let path = body.path.or(body.notebook.map(|old| old.path));
    let opened = Opened {
        id: before.id,
        path: path.unwrap_or(before.path),
        name: body.name.unwrap_or(before.name),
        kind: body.kind.unwrap_or(before.kind),
    };
    let wanted = body.kernel.unwrap_or_default();
    let is_same = wanted.id.as_ref().is_some_and(|id| *id == kernels::id_of(&kernel));
    if is_same || (wanted.id.is_none() && wanted.name.is_none()) {
        let kernel = relabel(&asking, &kernel, &opened).await?;
        return Ok(Answer(opened.view(&kernel)));
    }
    // What is done to each of the two kernels is in the audit by itself.
    let action = if wanted.id.is_some() { "patch_session" } else { "create_session" };
    let new = trail::apart(action, with_kernel(&asking, wanted, &opened), Refusal::outcome).await?;
    let end = async { Ok(asking.app.service.delete_session(&asking.who, kernel.id).await?) };
    match trail::apart("delete_session", end, Refusal::outcome).await {
        // It may have ended by itself.
        Err(refusal) if refusal.outcome().1 != StatusCode::NOT_FOUND.as_u16() => return Err(refusal),
        _ => {}
    }
    // The request itself is about the one that stays.
    let new = asking.app.service.session(&asking.who, new.id)?;
    Ok(Answer(opened.view(&new)))
}

/// Ends its kernel.
pub(super) async fn delete_session(asking: Asking, Named(id): Named) -> Result<StatusCode, Refusal> {
    let (_, kernel) = find(&asking, &id)?;
    asking.app.service.delete_session(&asking.who, kernel.id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_read_back_from_labels_among_others() {
        let opened = |n: u128| Opened {
            id: Uuid::from_u128(n),
            path: format!("a/{n}.ipynb"),
            name: String::new(),
            kind: "notebook".to_owned(),
        };
        let mut labels: BTreeMap<_, _> = opened(1).labels().into_iter().chain(opened(2).labels()).collect();
        labels.insert("jupyter.x.path".to_owned(), "no id".to_owned());
        labels.insert("jupyter.kernelspec".to_owned(), "python3".to_owned());
        assert_eq!(Opened::all(&labels), [opened(1), opened(2)]);
        assert!(labels.keys().all(|label| crate::domain::spec::is_name(label)));
    }
}
