//! Files over Jupyter's contents API: which session a path means, and what is changed of its files. How they are told is in `look`, how contents stand in JSON in `model`.
//!
//! The root has a folder for each session of the tenant's, called as the session or, if it has no name, as its kernel; below it are the files of its working folder. A
//! folder of the root is made by starting a kernel, and goes with it.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cellblock_wire::files::{Conditions, Delete, Kind, Move, Read, Stat, Upload};
use cellblock_wire::link::escape_path;
use futures_util::stream;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::asking::{Asking, Loose, Refusal};
use super::kernels;
use crate::http::App;
use crate::http::extract::Answer;
use crate::http::problem::{self, Problem};
use crate::service::files::{FileFault, WriteFile};
use crate::service::{Error, Filter, trail};
use crate::session::Session;

mod look;
mod model;
mod notebook;

pub(super) use look::get_contents;
use model::{Format, Model};
use notebook::EMPTY_NOTEBOOK;

/// Names that are tried for something new.
const MAX_NAMES: u32 = 1000;
/// The upload of a file that comes in pieces.
const UPLOAD: &str = "jupyter";

/// The path of a request below the contents.
pub(super) struct At(String);

impl FromRequestParts<App> for At {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let params = RawPathParams::from_request_parts(parts, app).await;
        let params = params.map_err(|_| Refusal::malformed("the path is no UTF-8, percent-encoded"))?;
        let path = params.iter().find(|(name, _)| *name == "path").map(|(_, path)| path.trim_matches('/'));
        Ok(Self(path.unwrap_or_default().to_owned()))
    }
}

/// A session's folder, and a path in it; an empty one is the folder itself.
struct Place {
    session: Session,
    folder: String,
    path: String,
}

impl Place {
    /// What a path means; nothing where it is the root.
    fn of(asking: &Asking, path: &str) -> Result<Option<Self>, Refusal> {
        let path = path.trim_matches('/');
        let (folder, rest) = path.split_once('/').unwrap_or((path, ""));
        if folder.is_empty() {
            return Ok(None);
        }
        let session = session_of(asking, folder)?.ok_or_else(|| absent(path))?;
        Ok(Some(Self { session, folder: folder.to_owned(), path: rest.trim_matches('/').to_owned() }))
    }

    /// One that is to be changed: something in a session's folder.
    fn to_change(asking: &Asking, path: &str) -> Result<Self, Refusal> {
        asking.who.require_sessions()?;
        let place = Self::of(asking, path)?.filter(|place| !place.path.is_empty());
        place.ok_or_else(|| {
            Refusal::malformed(format!(
                "{path:?} is no file of a session; the folders at the root are sessions, which begin and end with their kernels"
            ))
        })
    }

    /// The whole path of something in the session's folder.
    fn told(&self, path: &str) -> String {
        if path.is_empty() { self.folder.clone() } else { format!("{}/{path}", self.folder) }
    }

    fn child(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}/{name}", self.path) }
    }

    async fn stat(&self, asking: &Asking) -> Result<Stat, Error> {
        if self.path.is_empty() {
            return Ok(Stat { kind: Kind::Directory, ..Stat::default() });
        }
        asking.app.service.stat_file(&asking.who, self.session.id, &self.path).await
    }

    /// What is at its path, for its caller.
    fn model(&self, stat: &Stat) -> Model {
        match self.path.as_str() {
            "" => Model::folder(&self.folder, self.session.snapshot().last_active),
            path => Model::of(&self.told(path), stat),
        }
    }

    /// Whether this names the checkpoints of a file. A folder may have that name, too.
    async fn is_of_checkpoints(&self, asking: &Asking) -> bool {
        let Some((file, _)) = self.path.rsplit_once("/checkpoints") else { return false };
        let stat = asking.app.service.stat_file(&asking.who, self.session.id, file).await;
        stat.is_ok_and(|stat| stat.kind == Kind::File)
    }
}

/// The living session that a folder at the root stands for: by its kernel's id, or its name.
pub(super) fn session_of(asking: &Asking, folder: &str) -> Result<Option<Session>, Refusal> {
    if let Ok(session) = kernels::find(asking, folder) {
        return Ok(Some(session));
    }
    let filter = Filter { name: Some(folder.to_owned()), ..Filter::default() };
    let named = asking.app.service.list_sessions(&asking.who, &filter, None)?;
    Ok(named.into_iter().find(|session| !session.is_over()))
}

fn folder_of(session: &Session) -> String {
    session.spec.name.clone().unwrap_or_else(|| kernels::id_of(session))
}

fn absent(path: &str) -> Refusal {
    Refusal::missing(format!("file or directory {path:?} does not exist"))
}

fn refused(error: Error, path: &str) -> Refusal {
    match error {
        Error::File(FileFault::Absent, _) => absent(path),
        error => error.into(),
    }
}

/// What is saved, made, copied or moved. More is sent than is read.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Sent {
    #[serde(rename = "type")]
    kind: Option<String>,
    format: Option<String>,
    content: Option<Box<RawValue>>,
    chunk: Option<i64>,
    ext: Option<String>,
    copy_from: Option<String>,
    path: Option<String>,
}

/// Saves a file or a notebook, or makes a folder.
pub(super) async fn put_contents(asking: Asking, At(path): At, Loose(sent): Loose<Sent>) -> Result<Response, Refusal> {
    let place = Place::to_change(&asking, &path)?;
    if sent.copy_from.is_some() {
        return Err(Refusal::malformed("Cannot copy with PUT, only POST"));
    }
    let kind = sent.kind.as_deref().ok_or_else(|| Refusal::malformed("No file type provided"))?;
    if kind == "directory" {
        return make_folder(&asking, &place, &place.path).await.map(|(is_new, model)| saved(&asking, is_new, model));
    }
    let content = sent.content.as_deref().ok_or_else(|| Refusal::malformed("No file content provided"))?;
    let bytes = match (kind, sent.format.as_deref().map(Format::of)) {
        ("notebook", _) => notebook::write_notebook(content),
        (_, Some(Some(format))) => format.read(content),
        (_, _) => Err("Must specify format of file contents as 'text' or 'base64'"),
    };
    let bytes = bytes.map_err(Refusal::malformed)?;
    let part = match sent.chunk {
        None => None,
        Some(chunk) => Some(part(&asking, &place, chunk).await?),
    };
    let asked = WriteFile { path: place.path.clone(), part, ..WriteFile::default() };
    let (is_new, model) = write(&asking, &place, asked, bytes).await.map_err(|error| refused(error, &path))?;
    Ok(saved(&asking, is_new, model))
}

/// Which part of a file a chunk is: they are numbered from 1, and the last is -1. Nothing of the file is there before.
async fn part(asking: &Asking, place: &Place, chunk: i64) -> Result<(String, u64, bool), Refusal> {
    if chunk == 1 {
        return Ok((UPLOAD.to_owned(), 0, false));
    }
    let asked = Upload { path: place.path.clone(), upload: UPLOAD.to_owned() };
    let service = &asking.app.service;
    match service.upload_received(&asking.who, place.session.id, &asked).await {
        Ok(received) if chunk == -1 || chunk > 1 => Ok((UPLOAD.to_owned(), received, chunk == -1)),
        Err(error) if !matches!(error, Error::File(FileFault::Absent, _)) => Err(error.into()),
        _ => Err(Refusal::malformed(format!(
            "chunk {chunk} follows none: the first is 1, the last -1, and those before wait for ten minutes"
        ))),
    }
}

/// Writes; says whether it is new, and what is there.
async fn write(asking: &Asking, place: &Place, asked: WriteFile, bytes: Vec<u8>) -> Result<(bool, Model), Error> {
    let size = asked.part.is_none().then_some(bytes.len() as u64);
    let (path, asked) = (asked.path.clone(), WriteFile { size, ..asked });
    let body = stream::iter([Ok::<_, Infallible>(Bytes::from(bytes))]);
    let written = asking.app.service.write_file(&asking.who, place.session.id, asked, body).await?;
    let now = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or_default();
    let made_up = || Stat { kind: Kind::File, size: written.received, modified: now, ..Stat::default() };
    Ok((written.is_new, Model::of(&place.told(&path), &written.stat.clone().unwrap_or_else(made_up))))
}

async fn make_folder(asking: &Asking, place: &Place, path: &str) -> Result<(bool, Model), Refusal> {
    trail::note_action("make_folder");
    let made = asking.app.service.make_folder(&asking.who, place.session.id, path).await?;
    Ok((made.is_new, Model::of(&place.told(path), &made.stat)))
}

fn saved(asking: &Asking, is_new: bool, model: Model) -> Response {
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    let location = format!("{}/api/contents/{}", asking.base, escape_path(&model.path));
    (status, [(header::LOCATION, location)], Answer(model)).into_response()
}

/// Makes something new in a folder, under a name that is free: something empty, or a copy.
pub(super) async fn post_contents(asking: Asking, At(path): At, Loose(sent): Loose<Sent>) -> Result<Response, Refusal> {
    asking.who.require_sessions()?;
    let Some(place) = Place::of(&asking, &path)? else {
        let detail = "a folder at the root is a session; start a kernel, and make files in its folder";
        return Err(Problem::new(problem::FORBIDDEN, detail).into());
    };
    match place.stat(&asking).await {
        Ok(stat) if stat.kind == Kind::File => {
            return Err(Refusal::malformed("Cannot POST to files, use PUT instead."));
        }
        Ok(_) => {}
        Err(Error::File(FileFault::Absent | FileFault::NotFolder, _)) if place.is_of_checkpoints(&asking).await => {
            // As clients take it that go on without.
            return Err(Problem::new(problem::FORBIDDEN, "there are no checkpoints here; copy the file").into());
        }
        Err(error) => return Err(refused(error, &path)),
    }
    let model = match &sent.copy_from {
        Some(from) => copy(&asking, &place, from).await?,
        None => untitled(&asking, &place, &sent).await?,
    };
    Ok(saved(&asking, true, model))
}

/// Something empty, called as the reference calls it.
async fn untitled(asking: &Asking, place: &Place, sent: &Sent) -> Result<Model, Refusal> {
    let ext = sent.ext.as_deref().unwrap_or_default();
    if ext.contains('/') {
        return Err(Refusal::malformed(format!("{ext:?} can't be the end of a name")));
    }
    let is_notebook = ext == ".ipynb";
    let kind = sent.kind.as_deref().unwrap_or(if is_notebook { "notebook" } else { "file" });
    let (begin, insert, end) = match kind {
        "directory" => ("Untitled Folder", " ", ""),
        "notebook" => ("Untitled", "", ".ipynb"),
        _ => ("untitled", "", ext),
    };
    let bytes = if end == ".ipynb" { EMPTY_NOTEBOOK } else { "" };
    for number in 0..MAX_NAMES {
        let path = place.child(&numbered((begin, insert, end), number));
        if kind == "directory" {
            let (is_new, model) = make_folder(asking, place, &path).await?;
            if is_new {
                return Ok(model);
            }
            continue;
        }
        let asked = WriteFile { path, conditions: new(), ..WriteFile::default() };
        match write(asking, place, asked, bytes.into()).await {
            Err(Error::File(FileFault::Precondition | FileFault::Exists | FileFault::IsFolder, _)) => {}
            written => return Ok(written?.1),
        }
    }
    Err(taken())
}

/// A copy in a folder of a file, maybe of another session's.
async fn copy(asking: &Asking, place: &Place, from: &str) -> Result<Model, Refusal> {
    let source = Place::of(asking, from)?.filter(|source| !source.path.is_empty());
    let source = source.ok_or_else(|| Refusal::malformed("a session can't be copied; its files can"))?;
    let service = &asking.app.service;
    let (begin, end) = parted(source.path.rsplit('/').next().unwrap_or_default());
    for number in 0..MAX_NAMES {
        let path = place.child(&numbered((begin, "-Copy", end), number));
        match service.stat_file(&asking.who, place.session.id, &path).await {
            Ok(_) => continue,
            Err(Error::File(FileFault::Absent, _)) => {}
            Err(error) => return Err(error.into()),
        }
        let read = Read { path: source.path.clone(), ..Read::default() };
        let opened = service.read_file(&asking.who, source.session.id, &read).await;
        let (opened, pieces) = opened.map_err(|error| refused(error, from))?;
        let asked =
            WriteFile { path: path.clone(), size: Some(opened.length), conditions: new(), ..WriteFile::default() };
        let body = Body::new(pieces).into_data_stream();
        match service.write_file(&asking.who, place.session.id, asked, body).await {
            // Somebody else was quicker.
            Err(Error::File(FileFault::Precondition | FileFault::Exists | FileFault::IsFolder, _)) => {}
            written => return Ok(Model::of(&place.told(&path), &written?.stat.unwrap_or(opened.stat))),
        }
    }
    Err(taken())
}

/// A name before and behind where a number goes. A copy's own number goes.
fn parted(name: &str) -> (&str, &str) {
    let dot = if name.ends_with(".ipynb") { name.rfind('.') } else { name.find('.') };
    let (begin, end) = name.split_at(dot.unwrap_or(name.len()));
    let copied = begin.rfind("-Copy").filter(|at| begin[at + 5..].bytes().all(|b| b.is_ascii_digit()));
    (copied.filter(|_| dot.is_some()).map_or(begin, |at| &begin[..at]), end)
}

fn numbered((begin, insert, end): (&str, &str, &str), number: u32) -> String {
    if number == 0 { format!("{begin}{end}") } else { format!("{begin}{insert}{number}{end}") }
}

fn new() -> Conditions {
    Conditions { if_match: None, if_none_match: Some(vec!["*".to_owned()]) }
}

fn taken() -> Refusal {
    Problem::new(problem::EXISTS, format!("{MAX_NAMES} names are taken; remove some, or name it with PUT")).into()
}

/// Moves something within its session.
pub(super) async fn patch_contents(
    asking: Asking,
    At(path): At,
    Loose(sent): Loose<Sent>,
) -> Result<Response, Refusal> {
    let from = Place::to_change(&asking, &path)?;
    let new = sent.path.ok_or_else(|| Refusal::malformed("Missing field in JSON data: path"))?;
    let to = Place::to_change(&asking, &new)?;
    if from.session.id != to.session.id {
        return Err(Refusal::malformed("a file is moved within its session; copy it to another"));
    }
    let asked = Move { from: from.path, to: to.path.clone(), overwrite: false };
    let moved = asking.app.service.move_file(&asking.who, to.session.id, &asked).await;
    let moved = moved.map_err(|error| refused(error, &path))?;
    Ok(saved(&asking, false, Model::of(&to.told(&to.path), &moved.stat)))
}

/// Removes a file, or an empty folder.
pub(super) async fn delete_contents(asking: Asking, At(path): At) -> Result<StatusCode, Refusal> {
    let place = Place::to_change(&asking, &path)?;
    let asked = Delete { path: place.path.clone(), ..Delete::default() };
    let deleted = asking.app.service.delete_file(&asking.who, place.session.id, &asked).await;
    deleted.map_err(|error| match error {
        Error::File(FileFault::IsFolder, _) => Refusal::malformed(format!("Directory {path} not empty")),
        error => refused(error, &path),
    })?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_names_are_the_references() {
        for (name, number, expected) in [
            ("a.ipynb", 0, "a.ipynb"),
            ("a.ipynb", 1, "a-Copy1.ipynb"),
            ("a-Copy1.ipynb", 2, "a-Copy2.ipynb"),
            ("a.b.ipynb", 1, "a.b-Copy1.ipynb"),
            ("a.tar.gz", 1, "a-Copy1.tar.gz"),
            ("Makefile", 1, "Makefile-Copy1"),
            ("a-Copycat.txt", 1, "a-Copycat-Copy1.txt"),
            ("é", 1, "é-Copy1"),
        ] {
            let (begin, end) = parted(name);
            assert_eq!(numbered((begin, "-Copy", end), number), expected);
        }
        assert_eq!(numbered(("Untitled Folder", " ", ""), 2), "Untitled Folder 2");
        assert_eq!(numbered(("Untitled", "", ".ipynb"), 1), "Untitled1.ipynb");
    }
}
