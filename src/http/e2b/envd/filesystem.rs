//! `filesystem.Filesystem`: looking at files and folders, making, moving and removing them, by RPC. What is told of one stands here; what changes, in `watching`.

use axum::Router;
use axum::body::Body;
use axum::http::HeaderMap;
use axum::response::Response;
use axum::routing::post;
use cellblock_wire::files::{At, Conditions, Delete, Kind, List, MAX_DEPTH, MAX_LISTED, Made, Move, Stat};
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::super::connect;
use super::super::error::{Code, Fault, Refusal};
use super::super::sandbox::{ForRpc, Sandbox};
use super::files::ATTRIBUTE;
use super::{Not, USER, check_rpc_user, paths, watching};
use crate::http::App;
use crate::service::Error;
use crate::service::files::FileFault;

/// Most entries of one answer.
const MAX_ENTRIES: usize = 20_000;

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/filesystem.Filesystem/Stat", post(stat))
        .route("/filesystem.Filesystem/ListDir", post(list))
        .route("/filesystem.Filesystem/MakeDir", post(make))
        .route("/filesystem.Filesystem/Move", post(rename))
        .route("/filesystem.Filesystem/Remove", post(remove))
        .merge(watching::routes())
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Path {
    path: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Listing {
    path: String,
    depth: usize,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Moving {
    source: String,
    destination: String,
}

/// Reads what an RPC asks for.
pub(super) async fn asked<T: DeserializeOwned>(sandbox: &Sandbox, headers: &HeaderMap, body: Body) -> Result<T, Fault> {
    // Read first: a connection with something unread on it is closed behind the answer.
    let asked = connect::unary(body, sandbox.app.bounds).await?;
    check_rpc_user(headers)?;
    Ok(asked)
}

/// Where a path leads.
pub(super) fn place(sandbox: &Sandbox, path: &str) -> Result<String, Fault> {
    let home = &sandbox.session.spec.workdir;
    paths::absolute(home, path).map_err(|detail| Fault::new(Code::InvalidArgument, detail))
}

async fn stat(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let told = async {
        let asked: Path = asked(&sandbox, &headers, body).await?;
        let entry = look(&sandbox, place(&sandbox, &asked.path)?).await?;
        Ok(json!({"entry": entry}))
    };
    told.await.map(connect::answer).map_err(Not::plain)
}

/// What is at an absolute path.
pub(super) async fn look(sandbox: &Sandbox, path: String) -> Result<Value, Not> {
    let asked = At { path, attributes: true };
    let stat = sandbox.app.service.stat_file_with(&sandbox.who, sandbox.id(), &asked).await;
    Ok(entry(&stat.map_err(Not::of(sandbox))?, asked.path))
}

async fn list(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let told = async {
        let asked: Listing = asked(&sandbox, &headers, body).await?;
        let path = place(&sandbox, &asked.path)?;
        if asked.depth > MAX_DEPTH {
            let detail = format!("depth is {}; allowed are 1 to {MAX_DEPTH}", asked.depth);
            return Err(Fault::new(Code::InvalidArgument, detail).into());
        }
        Ok(json!({"entries": entries(&sandbox, &path, asked.depth.max(1)).await?}))
    };
    told.await.map(connect::answer).map_err(Not::plain)
}

async fn entries(sandbox: &Sandbox, path: &str, depth: usize) -> Result<Vec<Value>, Not> {
    let home = &sandbox.session.spec.workdir;
    let mut asked = List { path: path.to_owned(), depth, limit: MAX_LISTED, after: None, attributes: true };
    let mut entries = Vec::new();
    loop {
        let listing = sandbox.app.service.list_files(&sandbox.who, sandbox.id(), &asked).await;
        let listing = listing.map_err(Not::of(sandbox))?;
        for stat in &listing.entries {
            let shown = paths::shown(home, &stat.path);
            // Of what is no folder, that itself is listed.
            if shown == path {
                return Err(Fault::new(Code::InvalidArgument, format!("path is not a directory: {path:.200?}")).into());
            }
            entries.push(entry(stat, shown));
        }
        asked.after = listing.entries.last().map(|last| last.path.clone());
        if !listing.truncated || asked.after.is_none() {
            return Ok(entries);
        }
        if entries.len() >= MAX_ENTRIES {
            let detail = format!("there are more than {MAX_ENTRIES} entries; list folders in it, or with less depth");
            return Err(Fault::new(Code::ResourceExhausted, detail).into());
        }
    }
}

async fn make(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let made = async {
        let asked: Path = asked(&sandbox, &headers, body).await?;
        let path = place(&sandbox, &asked.path)?;
        match sandbox.app.service.make_folder(&sandbox.who, sandbox.id(), &path).await {
            Ok(Made { stat, is_new: true }) => Ok(json!({"entry": entry(&stat, path)})),
            Ok(Made { is_new: false, .. }) => {
                Err(Fault::new(Code::AlreadyExists, format!("directory already exists: {path:.200?}")).into())
            }
            Err(Error::File(FileFault::Exists | FileFault::NotFolder, detail)) => {
                Err(Fault::new(Code::InvalidArgument, format!("{path:.200?}: {detail}")).into())
            }
            Err(error) => Err(Not::of(&sandbox)(error)),
        }
    };
    made.await.map(connect::answer).map_err(Not::plain)
}

/// Moves something. A file that stands there is replaced, as `rename` does it.
async fn rename(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let moved = async {
        let asked: Moving = asked(&sandbox, &headers, body).await?;
        let (from, to) = (place(&sandbox, &asked.source)?, place(&sandbox, &asked.destination)?);
        let asked = Move { from, to: to.clone(), overwrite: true };
        let made = sandbox.app.service.move_file(&sandbox.who, sandbox.id(), &asked).await;
        let Made { stat, .. } = made.map_err(Not::of(&sandbox))?;
        Ok(json!({"entry": entry(&stat, to)}))
    };
    moved.await.map(connect::answer).map_err(Not::plain)
}

/// Removes something, with all that is in it. What is not there is no error.
async fn remove(ForRpc(sandbox): ForRpc, headers: HeaderMap, body: Body) -> Result<Response, Refusal> {
    let removed = async {
        let asked: Path = asked(&sandbox, &headers, body).await?;
        let path = place(&sandbox, &asked.path)?;
        let delete = Delete { path, recursive: true, conditions: Conditions::default() };
        match sandbox.app.service.delete_file(&sandbox.who, sandbox.id(), &delete).await {
            Ok(()) | Err(Error::File(FileFault::Absent | FileFault::NotFolder, _)) => Ok(json!({})),
            Err(error) => Err(Not::of(&sandbox)(error)),
        }
    };
    removed.await.map(connect::answer).map_err(Not::plain)
}

/// What is told of something. Its owner is who everything in a sandbox belongs to.
fn entry(stat: &Stat, path: String) -> Value {
    let kind = if stat.kind == Kind::Symlink { stat.target_kind.unwrap_or(Kind::Symlink) } else { stat.kind };
    let modified = Timestamp::from_nanosecond(stat.modified.into()).unwrap_or(Timestamp::UNIX_EPOCH);
    let mut entry = json!({
        "name": paths::name(&path),
        "type": match kind {
            Kind::File => "FILE_TYPE_FILE",
            Kind::Directory => "FILE_TYPE_DIRECTORY",
            Kind::Symlink => "FILE_TYPE_SYMLINK",
            Kind::Other => "FILE_TYPE_UNSPECIFIED",
        },
        "size": stat.size.to_string(),
        "mode": stat.mode & 0o777,
        "permissions": permissions(stat),
        "owner": USER,
        "group": USER,
        "modifiedTime": modified.to_string(),
        "path": path,
    });
    if stat.kind == Kind::Symlink {
        entry["isSymlink"] = json!(true);
    }
    if let Some(target) = &stat.target {
        entry["symlinkTarget"] = json!(absolute_target(target, entry["path"].as_str().unwrap_or_default()));
    }
    let said = stat.attributes.iter().filter_map(|(name, value)| Some((name.strip_prefix(ATTRIBUTE)?, value)));
    let said: serde_json::Map<String, Value> = said.map(|(name, value)| (name.to_owned(), json!(value))).collect();
    if !said.is_empty() {
        entry["metadata"] = Value::Object(said);
    }
    entry
}

/// Where a link leads, as an absolute path: what it says itself begins at its own folder.
fn absolute_target(target: &str, link: &str) -> String {
    let folder = link.rsplit_once('/').map_or("", |(folder, _)| folder);
    paths::absolute(if folder.is_empty() { "/" } else { folder }, target).unwrap_or_else(|_| target.to_owned())
}

/// Permissions as Go writes them.
fn permissions(stat: &Stat) -> String {
    let kind = match stat.kind {
        Kind::Directory => 'd',
        Kind::Symlink => 'L',
        Kind::File | Kind::Other => '-',
    };
    let bits = (0..9).map(|at| if stat.mode & (0o400 >> at) == 0 { '-' } else { ['r', 'w', 'x'][at % 3] });
    std::iter::once(kind).chain(bits).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn entries_are_told_as_e2bs_agent_tells_them() {
        let stat =
            Stat { kind: Kind::File, size: 5_000_000_000, mode: 0o644, modified: 1_500_000_000, ..Stat::default() };
        let told = entry(&stat, "/home/user/a.txt".to_owned());
        let expected = json!({
            "name": "a.txt", "path": "/home/user/a.txt", "type": "FILE_TYPE_FILE", "size": "5000000000", "mode": 420,
            "permissions": "-rw-r--r--", "owner": "user", "group": "user", "modifiedTime": "1970-01-01T00:00:01.5Z",
        });
        assert_eq!(told, expected);
        let folder = entry(&Stat { kind: Kind::Directory, mode: 0o755, ..Stat::default() }, "/".to_owned());
        assert_eq!((&folder["type"], &folder["permissions"]), (&json!("FILE_TYPE_DIRECTORY"), &json!("drwxr-xr-x")));
    }

    #[test]
    fn links_are_told_by_what_is_there() {
        let link = Stat {
            kind: Kind::Symlink,
            mode: 0o777,
            target: Some("../b".to_owned()),
            target_kind: Some(Kind::Directory),
            attributes: BTreeMap::from([("e2b.a".to_owned(), "1".to_owned()), ("other".to_owned(), "2".to_owned())]),
            ..Stat::default()
        };
        let told = entry(&link, "/home/user/x/link".to_owned());
        assert_eq!((&told["type"], &told["symlinkTarget"]), (&json!("FILE_TYPE_DIRECTORY"), &json!("/home/user/b")));
        assert_eq!((&told["isSymlink"], &told["metadata"]), (&json!(true), &json!({"a": "1"})));
        assert_eq!(told["permissions"], "Lrwxrwxrwx");
        let dangling = entry(&Stat { target_kind: None, ..link }, "/link".to_owned());
        assert_eq!(dangling["type"], "FILE_TYPE_SYMLINK");
    }
}
