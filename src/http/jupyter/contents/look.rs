//! What is at a path, told within bounds: what an answer takes in memory is known before it is made, whatever the code inside has left there. Changes nothing.

use std::io;
use std::path::Path;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cellblock_wire::files::{Kind, List, Listing, MAX_LISTED, MAX_PATH, Read, Stat};
use cellblock_wire::link::escape_path;
use http_body_util::BodyExt;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::super::asking::{Asking, Refusal};
use super::super::kernels;
use super::model::{Format, Model};
use super::notebook::read_notebook;
use super::{At, Place, absent, folder_of, refused};
use crate::http::extract::{Answer, Params};
use crate::http::problem::{self, Problem};
use crate::service::Error;
use crate::service::files::FileFault;
use crate::service::transfer::Pieces;
use crate::session::Session;
use crate::task;

/// Longest file whose content is told, since it stands in one piece of JSON.
const MAX_CONTENT: u64 = 32 * 1024 * 1024;
/// What the answer about one file takes at most: itself, and its JSON.
const MAX_ROOM: u64 = 4 * MAX_CONTENT;
/// Most entries of a folder that are told, and what they take at most.
const MAX_ENTRIES: (usize, u64) = (10_000, 64 * 1024 * 1024);
/// What a model takes without its content, its name and its path.
const MODEL: u64 = 1024;
/// What a byte of a name or a text takes, with the six that a control character has in JSON.
const TEXT: u64 = 7;
/// What a byte of a file takes that is told in base64, or as a notebook, which is there twice where it is mended.
const BYTE: u64 = 4;

/// What of it is wanted.
struct Look {
    kind: Option<String>,
    format: Option<Format>,
    content: bool,
    hash: bool,
}

impl Look {
    fn of(params: &Params) -> Result<Self, Refusal> {
        let wrong =
            |name: &str, allowed: &str| Refusal::malformed(format!("{name} is not understood; allowed is {allowed}"));
        let flag = |name: &str, default: bool| match params.get(name) {
            None => Ok(default),
            Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(_) => Err(wrong(name, "0 or 1")),
        };
        let known = |kind: &str| ["directory", "notebook"].contains(&kind);
        let kind = params.get("type").map(|kind| if known(kind) { kind } else { "file" }.to_owned());
        let format = match params.get("format") {
            // Of a notebook or a folder there is no other.
            None | Some("json") => None,
            Some(word) => Some(Format::of(word).ok_or_else(|| wrong("format", "text or base64"))?),
        };
        Ok(Self { kind, format, content: flag("content", true)?, hash: flag("hash", false)? })
    }

    fn is_of_folder(&self) -> bool {
        self.kind.as_deref().is_none_or(|kind| kind == "directory")
    }
}

/// Something, with what is in it.
pub(in super::super) async fn get_contents(asking: Asking, At(path): At, params: Params) -> Result<Response, Refusal> {
    let look = Look::of(&params)?;
    let Some(place) = Place::of(&asking, &path)? else { return root(&asking, &look) };
    let stat = match place.stat(&asking).await {
        Err(Error::File(FileFault::Absent | FileFault::NotFolder, _)) => {
            let is_list = place.path.ends_with("/checkpoints") && place.is_of_checkpoints(&asking).await;
            return if is_list { Ok(Answer([0_u8; 0]).into_response()) } else { Err(absent(&path)) };
        }
        found => found.map_err(|error| refused(error, &path))?,
    };
    match stat.kind {
        Kind::Directory => folder(&asking, &place, &stat, &look).await,
        Kind::Other => Err(Refusal::malformed(format!("{path} is not a regular file"))),
        Kind::File | Kind::Symlink => match file(&asking, &place, &stat, &look).await {
            Err(refusal) if stat.kind == Kind::Symlink && refusal.words().0 == problem::IS_A_DIRECTORY.word() => {
                folder(&asking, &place, &Stat { kind: Kind::Directory, ..stat }, &look).await
            }
            answer => answer,
        },
    }
}

/// All sessions.
fn root(asking: &Asking, look: &Look) -> Result<Response, Refusal> {
    if !look.is_of_folder() {
        return Err(Refusal::malformed("the root is a directory"));
    }
    let sessions = kernels::all(asking)?;
    let of = |session: &Session| Model::folder(&folder_of(session), session.snapshot().last_active);
    let mut model = Model::folder("", Timestamp::now());
    model.writable = false;
    if look.content {
        model = model.with_entries(sessions.iter().take(MAX_ENTRIES.0).map(of).collect());
    }
    Ok(Answer(model).into_response())
}

async fn folder(asking: &Asking, place: &Place, stat: &Stat, look: &Look) -> Result<Response, Refusal> {
    let path = place.told(&place.path);
    if !look.is_of_folder() {
        let kind = look.kind.as_deref().unwrap_or_default();
        return Err(Refusal::malformed(format!("{path} is a directory, not a {kind}")));
    }
    let model = place.model(stat);
    if !look.content {
        return Ok(Answer(model).into_response());
    }
    let service = &asking.app.service;
    let (mut entries, mut room) = (Entries::default(), service.room(&asking.who, MODEL)?);
    let mut asked = List { path: place.path.clone(), depth: 1, limit: MAX_LISTED, after: None };
    loop {
        let listing = service.list_files(&asking.who, place.session.id, &asked).await;
        let (before, listing) = (entries.size, listing.map_err(|error| refused(error, &path))?);
        asked.after = entries.take(&path, listing, asked.after);
        if entries.size > MAX_ENTRIES.1 {
            let id = place.session.id;
            let detail = format!(
                "the names in {path} are too long to be told at once; GET /v1/sessions/{id}/files tells them in parts"
            );
            return Err(Problem::new(problem::TOO_LARGE, detail).into());
        }
        room.join(service.room(&asking.who, entries.size - before)?);
        if asked.after.is_none() {
            break;
        }
    }
    let model = model.with_entries(entries.models);
    let made = task::blocking(move || json(&model, MAX_ROOM).map(|json| room.with(json)));
    made.await.flatten().map(answer).ok_or_else(untold)
}

/// What is told of a folder so far.
#[derive(Default)]
struct Entries {
    models: Vec<Model>,
    /// All that were listed, also those that are not told.
    seen: usize,
    /// What they and their JSON take.
    size: u64,
}

impl Entries {
    /// Takes a part of a listing of the folder with this path. Answers what the next part is to come after; nothing where this was the last one, where there is no place
    /// for more, or where the listing does not get on.
    fn take(&mut self, path: &str, mut listing: Listing, after: Option<String>) -> Option<String> {
        listing.entries.truncate(MAX_ENTRIES.0 - self.seen);
        self.seen += listing.entries.len();
        for entry in listing.entries.iter().filter(|entry| entry.kind != Kind::Other) {
            let name = entry.path.rsplit('/').next().unwrap_or_default();
            self.size += MODEL + TEXT * (path.len() + 1 + 2 * name.len()) as u64;
            self.models.push(Model::of(&format!("{path}/{name}"), entry));
        }
        let last = listing.entries.pop().map(|entry| entry.path);
        let is_further = |last: &String| after.is_none_or(|after| Path::new(last) > Path::new(&after));
        last.filter(|last| listing.truncated && self.seen < MAX_ENTRIES.0 && is_further(last))
    }
}

async fn file(asking: &Asking, place: &Place, stat: &Stat, look: &Look) -> Result<Response, Refusal> {
    let path = place.told(&place.path);
    if look.kind.as_deref() == Some("directory") {
        return Err(Refusal::malformed(format!("{path} is not a directory")));
    }
    let mut model = place.model(stat);
    let is_notebook = look.kind.as_deref().map_or(model.kind == "notebook", |kind| kind == "notebook");
    model.kind = if is_notebook { "notebook" } else { "file" };
    if !look.content && !look.hash && stat.kind == Kind::File {
        return Ok(Answer(model).into_response());
    }
    let service = &asking.app.service;
    let read = Read { path: place.path.clone(), ..Read::default() };
    let opened = service.read_file(&asking.who, place.session.id, &read).await;
    let (opened, pieces) = opened.map_err(|error| refused(error, &path))?;
    // As many bytes may come, whatever else is said of the file.
    let size = opened.length;
    let refuse = |why: String| {
        let (id, at) = (place.session.id, escape_path(&place.path));
        let detail = format!("{path} {why}; GET /v1/sessions/{id}/files/{at} tells all, or a part");
        Refusal::from(Problem::new(problem::TOO_LARGE, detail))
    };
    if (look.content || look.hash) && size > MAX_CONTENT {
        return Err(refuse(format!("has {size} bytes, and contents and hashes of at most {MAX_CONTENT} are told")));
    }
    if !look.content {
        let model = if look.hash { model.with_hash(hashed(pieces).await?) } else { model };
        return Ok(Answer(model).into_response());
    }
    let most = room_of(size, is_notebook || look.format == Some(Format::Base64));
    let room = service.room(&asking.who, most)?;
    let bytes = whole(pieces, size).await?;
    let (format, wants_hash) = (look.format, look.hash);
    // The room goes along: whoever hangs up does not end what is being done.
    let made = task::blocking(move || {
        let model = if wants_hash { model.with_hash(hex(Sha256::digest(&bytes))) } else { model };
        let model = match is_notebook {
            true => read_notebook(bytes).map(|notebook| model.with_notebook(notebook)),
            false => model.with_bytes(bytes, format),
        };
        model.map(|model| json(&model, most - size).map(|json| room.with(json)))
    });
    let why = if is_notebook { "Unreadable Notebook: it is no JSON of nbformat" } else { "is not UTF-8 encoded" };
    match made.await {
        Some(Some(Some(json))) => Ok(answer(json)),
        Some(Some(None)) => Err(refuse("takes too much in JSON; format=base64 takes less".to_owned())),
        Some(None) => Err(Refusal::malformed(format!("{path}: {why}"))),
        None => Err(untold()),
    }
}

/// What the answer about a file of so many bytes takes at most, with the file.
fn room_of(size: u64, is_compact: bool) -> u64 {
    let of_path = 2 * TEXT * MAX_PATH as u64;
    MODEL + of_path + (size * if is_compact { BYTE } else { TEXT }).min(MAX_ROOM)
}

/// A model in JSON, if that has no more bytes.
fn json(model: &Model, most: u64) -> Option<Vec<u8>> {
    let mut json = Bounded { bytes: Vec::new(), most };
    serde_json::to_writer(&mut json, model).ok()?;
    Some(json.bytes)
}

struct Bounded {
    bytes: Vec<u8>,
    most: u64,
}

impl io::Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if (self.bytes.len() + piece.len()) as u64 > self.most {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn answer(json: Bytes) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

fn untold() -> Refusal {
    Problem::new(problem::INTERNAL, "the content could not be told").into()
}

/// All of what comes, whose length is known and bounded.
async fn whole(mut pieces: Pieces, length: u64) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
    while let Some(frame) = pieces.frame().await {
        if let Ok(data) = frame.map_err(|_| broke_off())?.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes)
}

async fn hashed(mut pieces: Pieces) -> Result<String, Refusal> {
    let mut hash = Sha256::new();
    while let Some(frame) = pieces.frame().await {
        if let Ok(data) = frame.map_err(|_| broke_off())?.into_data() {
            hash.update(&data);
        }
    }
    Ok(hex(hash.finalize()))
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn broke_off() -> Refusal {
    Problem::new(problem::GUEST_UNREACHABLE, "the session's container did not send all of the file").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: std::ops::Range<usize>, kind: Kind) -> Listing {
        let of = |n| Stat { kind, path: format!("d/{n:06}"), ..Stat::default() };
        Listing { entries: names.map(of).collect(), truncated: true, omitted: 0 }
    }

    #[test]
    fn a_listing_comes_to_its_end_whatever_it_says() {
        let mut entries = Entries::default();
        let mut after = entries.take("k/d", listing(0..2000, Kind::File), None);
        assert_eq!(after.as_deref(), Some("d/001999"));
        assert_eq!(entries.take("k/d", listing(0..2000, Kind::File), after), None, "it does not get on");
        assert_eq!(entries.take("k/d", listing(0..0, Kind::File), None), None, "there is nothing in it");
        // What is not told counts.
        let (mut entries, mut parts) = (Entries::default(), 0);
        after = None;
        loop {
            after = entries.take("k/d", listing(parts * 3000..(parts + 1) * 3000, Kind::Other), after);
            parts += 1;
            if after.is_none() || parts == 9 {
                break;
            }
        }
        assert_eq!((parts, entries.seen, entries.models.len()), (4, 10_000, 0));
        let last = Listing { truncated: false, ..listing(0..1, Kind::File) };
        assert_eq!(Entries::default().take("k/d", last, None), None);
    }

    #[test]
    fn what_a_folder_takes_is_no_less_than_its_models_and_their_json() {
        for (path, name) in [("k", "a"), ("k", "\u{1}"), ("k/\u{1}\u{2}", &*"\u{1}".repeat(255))] {
            let entry =
                Stat { kind: Kind::File, path: name.to_owned(), size: u64::MAX, modified: i64::MAX, ..Stat::default() };
            let mut entries = Entries::default();
            entries.take(path, Listing { entries: vec![entry], ..Listing::default() }, None);
            let model = entries.models.pop().unwrap();
            let held = size_of::<Model>() + model.name.len() + model.path.len() + 200;
            let json = json(&model, u64::MAX).unwrap();
            assert!((held + json.len()) as u64 <= entries.size, "{held} + {} > {}", json.len(), entries.size);
        }
    }

    #[test]
    fn what_a_file_takes_is_no_less_than_it_and_its_json() {
        let path = "\u{1}".repeat(MAX_PATH);
        let model = Model::of(&path, &Stat { kind: Kind::File, ..Stat::default() });
        for (byte, length, format) in
            [(1, 100_000, None), (1, 100_000, Some(Format::Base64)), (0xff, 100_000, None), (1, 0, None)]
        {
            let most = room_of(length, format == Some(Format::Base64)) - length;
            let bytes = vec![byte; usize::try_from(length).unwrap()];
            let model = Model::of(&path, &Stat::default()).with_bytes(bytes, format).unwrap();
            assert!(json(&model, most).is_some(), "{byte} {length} {format:?}");
        }
        let cells = vec!["{\"cell_type\":\"code\",\"metadata\":{}}"; 10_000].join(",");
        let file = format!("{{\"nbformat\":4,\"cells\":[{cells}]}}").into_bytes();
        let length = file.len() as u64;
        let told = json(&model.with_notebook(read_notebook(file).unwrap()), u64::MAX).unwrap();
        // With what it is made of.
        assert!(length + 2 * told.len() as u64 <= room_of(length, true), "{length} {}", told.len());
    }

    #[test]
    fn what_would_take_more_than_there_is_room_for_is_not_told() {
        let most = room_of(MAX_CONTENT, false);
        assert!(most < MAX_ROOM + 64 * 1024, "{most}");
        let model = Model::of("k/x", &Stat::default()).with_bytes(vec![1; 10_000], None).unwrap();
        assert!(json(&model, 60_000).is_none() && json(&model, 60_000 + MODEL).is_some());
    }
}
