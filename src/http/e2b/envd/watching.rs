//! What changes in folders, by RPC: as an answer that streams, and kept for who comes for it. Names are told from the watched folder on.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::response::Response;
use axum::routing::post;
use cellblock_wire::files::{Event, Watch};
use futures_util::stream::{self, Stream};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::connect::{self, Envelopes, Serving};
use super::super::error::{Code, Fault, Refusal};
use super::super::sandbox::{ForRpc, Sandbox};
use super::filesystem::{asked, look, place};
use super::{Not, check_rpc_user, paths};
use crate::http::App;
use crate::service::watches::{Changes, WatchId};

/// A watch that ends with its sandbox is broken off instead: that is seen within this time.
const PARTING: Duration = Duration::from_secs(5);

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/filesystem.Filesystem/WatchDir", post(watch))
        .route("/filesystem.Filesystem/CreateWatcher", post(create))
        .route("/filesystem.Filesystem/GetWatcherEvents", post(events))
        .route("/filesystem.Filesystem/RemoveWatcher", post(remove))
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Watching {
    path: String,
    recursive: bool,
    include_entry: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Watcher {
    watcher_id: String,
}

/// How events of a watch are told.
#[derive(Clone)]
struct Telling {
    sandbox: Sandbox,
    /// The folder, absolute.
    folder: String,
    with_entries: bool,
}

/// A change in the words of the protocol: of what kind, and the path.
type Change = (&'static str, String);

fn told(event: Event) -> Vec<Change> {
    match event {
        Event::Watching { .. } | Event::Overflow => Vec::new(),
        // What was put there whole may have been another one before, and was written either way.
        Event::Created { path, is_whole: true, is_folder: false } => {
            vec![("EVENT_TYPE_CREATE", path.clone()), ("EVENT_TYPE_WRITE", path)]
        }
        Event::Created { path, .. } => vec![("EVENT_TYPE_CREATE", path)],
        Event::Modified { path } => vec![("EVENT_TYPE_WRITE", path)],
        Event::Deleted { path } => vec![("EVENT_TYPE_REMOVE", path)],
        Event::Moved { path, to } => vec![("EVENT_TYPE_RENAME", path), ("EVENT_TYPE_CREATE", to)],
    }
}

impl Telling {
    async fn tell(&self, (kind, path): Change) -> Value {
        let path = paths::shown(&self.sandbox.session.spec.workdir, &path);
        let name = path.strip_prefix(&self.folder).map_or(path.as_str(), |rest| rest.trim_start_matches('/'));
        let mut event = json!({"name": name, "type": kind});
        let is_there = !matches!(kind, "EVENT_TYPE_REMOVE" | "EVENT_TYPE_RENAME");
        // It may be gone by now.
        if self.with_entries
            && is_there
            && let Ok(entry) = look(&self.sandbox, path).await
        {
            event["entry"] = entry;
        }
        event
    }
}

fn lost() -> Fault {
    Fault::new(Code::ResourceExhausted, "more changed than could be told; list the folder, and watch it again")
}

async fn watch(ForRpc(sandbox): ForRpc, request: Request) -> Result<Response, Refusal> {
    let headers = request.headers().clone();
    let envelopes = Envelopes::of(request, sandbox.app.bounds.body_time)?;
    let begun = async {
        let Watching { path, recursive, include_entry } = envelopes.only().await?;
        check_rpc_user(&headers)?;
        let deadline = connect::deadline(&headers)?;
        let folder = place(&sandbox, &path)?;
        let asked = Watch { path: folder.clone(), recursive };
        let changes = sandbox.app.service.changes(&sandbox.who, sandbox.id(), &asked).await;
        let changes = changes.map_err(Not::of(&sandbox))?;
        Ok((deadline, changes, Telling { sandbox: sandbox.clone(), folder, with_entries: include_entry }))
    };
    match begun.await {
        Ok((deadline, changes, telling)) => {
            let keepalive = Some((connect::keepalive(&headers), json!({"keepalive": {}})));
            let serving = Serving { deadline, keepalive, ..Serving::until(sandbox.gone()) };
            Ok(connect::stream(serving, as_they_come(changes, telling)))
        }
        Err(not) => Not::streamed(not),
    }
}

fn as_they_come(changes: Changes, telling: Telling) -> impl Stream<Item = Result<Value, Fault>> + Send {
    stream::unfold((changes, telling, VecDeque::new()), |(mut changes, telling, mut ready)| async move {
        loop {
            if let Some(change) = ready.pop_front() {
                let event = json!({"filesystem": telling.tell(change).await});
                return Some((Ok(event), (changes, telling, ready)));
            }
            match changes.next().await {
                Some(Event::Watching { .. }) => return Some((Ok(json!({"start": {}})), (changes, telling, ready))),
                Some(Event::Overflow) => return Some((Err(lost()), (changes, telling, ready))),
                Some(event) => ready.extend(told(event)),
                None => {
                    let _ = tokio::time::timeout(PARTING, telling.sandbox.gone()).await;
                    let detail = "the folder is not watched any more: it is gone, or what watched it is";
                    return Some((Err(Fault::new(Code::Unavailable, detail)), (changes, telling, ready)));
                }
            }
        }
    })
}

async fn create(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let created = async {
        let Watching { path, recursive, include_entry } = asked(&sandbox, &headers, body).await?;
        let folder = place(&sandbox, &path)?;
        let watch = Watch { path: folder.clone(), recursive };
        let id =
            sandbox.app.service.begin_watch(&sandbox.who, sandbox.id(), &watch).await.map_err(Not::of(&sandbox))?;
        // What it is to be told by goes with its id, so that nothing but the watch itself is kept.
        let entries = if include_entry { "e" } else { "n" };
        Ok(json!({"watcherId": format!("{id}.{entries}.{folder}")}))
    };
    created.await.map(connect::answer).map_err(Not::plain)
}

/// What a caller calls a watch: its id, whether entries are told, and its folder.
fn known(id: &str) -> Result<(WatchId, bool, String), Fault> {
    let mut parts = id.splitn(3, '.');
    let watch = parts.next().and_then(|id| id.parse().ok());
    let (entries, folder) = (parts.next(), parts.next());
    match (watch, entries, folder) {
        (Some(watch), Some(entries @ ("e" | "n")), Some(folder)) => Ok((watch, entries == "e", folder.to_owned())),
        _ => Err(Fault::new(Code::NotFound, format!("watcher with id {id:.60?} not found"))),
    }
}

async fn events(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let heard = async {
        let asked: Watcher = asked(&sandbox, &headers, body).await?;
        let (watch, with_entries, folder) = known(&asked.watcher_id)?;
        let watched = sandbox.app.service.watched(&sandbox.who, sandbox.id(), watch);
        let (events, is_lost) = watched.map_err(Not::of(&sandbox))?;
        if is_lost {
            return Err(lost().into());
        }
        let telling = Telling { sandbox: sandbox.clone(), folder, with_entries };
        let mut told_events = Vec::new();
        for change in events.into_iter().flat_map(told) {
            told_events.push(telling.tell(change).await);
        }
        Ok(json!({"events": told_events}))
    };
    heard.await.map(connect::answer).map_err(Not::plain)
}

async fn remove(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let removed = async {
        let asked: Watcher = asked(&sandbox, &headers, body).await?;
        let (watch, ..) = known(&asked.watcher_id)?;
        sandbox.app.service.end_watch(&sandbox.who, sandbox.id(), watch).map_err(Not::of(&sandbox))?;
        Ok(json!({}))
    };
    removed.await.map(connect::answer).map_err(Not::plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_by_what_clients_know() {
        let path = || "a".to_owned();
        let kinds = |event| told(event).into_iter().map(|(kind, _)| kind).collect::<Vec<_>>();
        let whole = Event::Created { path: path(), is_folder: false, is_whole: true };
        assert_eq!(kinds(whole), ["EVENT_TYPE_CREATE", "EVENT_TYPE_WRITE"]);
        let made = Event::Created { path: path(), is_folder: true, is_whole: false };
        assert_eq!(kinds(made), ["EVENT_TYPE_CREATE"]);
        assert_eq!(kinds(Event::Moved { path: path(), to: path() }), ["EVENT_TYPE_RENAME", "EVENT_TYPE_CREATE"]);
        assert_eq!(kinds(Event::Overflow), [""; 0]);
    }

    #[test]
    fn watchers_are_known_by_what_they_were_called() {
        let id = "00000000000000000000000000000001";
        let (_, with_entries, folder) = known(&format!("{id}.e./home/user/a.b")).unwrap();
        assert_eq!((with_entries, folder.as_str()), (true, "/home/user/a.b"));
        for wrong in ["", "x", id, &format!("{id}.x./a"), &format!("{id}.e")] {
            assert_eq!(known(wrong).unwrap_err().code, Code::NotFound, "{wrong}");
        }
    }
}
