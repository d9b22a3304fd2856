//! The link's requests about files: what is asked, read out of queries and bodies, and bodies within time. What is done, is done in the rooms beside this.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::files::{self as wire, Deleted, Kind, OPENED, Received, Written};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::{Method, Response};
use rustix::fs::{FileType, OFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::change::{make_folder, move_to, remove};
use super::path::{Links, Place, Roots};
use super::unpack::Unpacking;
use super::write::Upload;
use super::{Download, FileError, Stamp, free_bytes, list, pack, resume, watch};
use crate::api::{Answer, Answered, Guest, Refused, json, percent_decode, read_json};

/// A body that brings nothing for this long has broken off. Longer than the control plane waits, which knows more.
const STALLED: Duration = Duration::from_secs(45);

impl Guest {
    /// Answers a request about files.
    ///
    /// # Errors
    /// A refusal.
    pub(crate) async fn route_files(&self, method: &Method, rest: &str, query: &str, body: Incoming) -> Answered {
        match (method, rest) {
            (&Method::GET, "") => {
                let asked: wire::List = about(query)?;
                Ok(json(&list::list(&self.place(&asked.path)?, &asked).await?))
            }
            (&Method::GET, "stat") => {
                let asked: wire::At = about(query)?;
                Ok(json(&list::stat_of(&self.place(&asked.path)?, asked.attributes)?))
            }
            (&Method::GET, "content") => self.read_file(&about(query)?),
            (&Method::PUT, "content") => self.write_file(about(query)?, body).await,
            (&Method::POST, "known") => self.is_known(read_json(body).await?).await,
            (&Method::GET, "upload") => {
                let asked: wire::Upload = about(query)?;
                let received = self.uploads.received(&self.place(&asked.path)?, &asked.upload)?;
                Ok(json(&Received { received }))
            }
            (&Method::POST, "delete") => self.delete_file(read_json(body).await?).await,
            (&Method::POST, "mkdir") => Ok(json(&make_folder(&self.place(&read_json::<wire::At>(body).await?.path)?)?)),
            (&Method::POST, "move") => self.move_file(read_json(body).await?).await,
            (&Method::GET, "watch") => {
                let asked: wire::Watch = about(query)?;
                let events = watch::watch(self.place(&asked.path)?, asked.recursive)?;
                Ok(Response::new(Answer::Pieces(events)))
            }
            (&Method::GET, "archive") => {
                let asked: wire::Archive = about(query)?;
                let archive = pack::pack(&self.place(&asked.path)?, asked.gzip).await?;
                Ok(Response::new(Answer::Pieces(archive)))
            }
            (&Method::PUT, "archive") => self.unpack(about(query)?, body).await,
            _ => Err(Refused::not_found("request")),
        }
    }

    fn place(&self, path: &str) -> Result<Place, FileError> {
        Roots::new(&self.places.workdir).place(path)
    }

    fn read_file(&self, asked: &wire::Read) -> Answered {
        let (download, opened) = Download::asked(&self.place(&asked.path)?, asked)?;
        let mut response = Response::new(Answer::File(download));
        response.headers_mut().insert(OPENED, header(&opened));
        Ok(response)
    }

    async fn write_file(&self, asked: wire::Write, mut body: Incoming) -> Answered {
        let place = self.place(&asked.path)?;
        let Some(part) = &asked.part else {
            let mut upload = Upload::create(&place, &asked.conditions)?;
            fits(upload.folder(), asked.size)?;
            while let Some(data) = piece(&mut body).await? {
                if let Err(error) = upload.write(&data) {
                    drop(upload);
                    return Err(with_left(error, &place).into());
                }
            }
            return self.put_in_place(&place, upload, &asked, None);
        };
        let mut receiving = self.uploads.receive(&place, part, &asked.conditions)?;
        fits(receiving.upload()?.folder(), asked.size)?;
        while let Some(data) = piece(&mut body).await? {
            if let Err(error) = receiving.upload()?.write(&data) {
                drop(receiving.take());
                return Err(with_left(error, &place).into());
            }
        }
        let received = receiving.upload()?.size;
        if !part.is_last {
            return Ok(json(&Written { received, ..Written::default() }));
        }
        let upload = receiving.take()?;
        let sha256 = resume::hash(upload.reopen()?).await?;
        if part.sha256.as_ref().is_some_and(|expected| *expected != sha256) {
            return Err(FileError::Digest.into());
        }
        self.put_in_place(&place, upload, &asked, Some(sha256))
    }

    fn put_in_place(&self, place: &Place, upload: Upload, asked: &wire::Write, sha256: Option<String>) -> Answered {
        let received = upload.size;
        upload.describe(&asked.attributes)?;
        let (stat, entry, is_new) = upload.finish(asked.mode, &asked.conditions)?;
        if let Some(path) = place.in_workdir() {
            self.kernels.files().uploaded([(path.to_owned(), Stamp::from(&stat))]);
        }
        Ok(json(&Written { stat: Some(entry), is_new, received, sha256 }))
    }

    async fn is_known(&self, asked: wire::Known) -> Answered {
        let place = self.place(&asked.path)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let Ok(file) = place.open(flags, Links::Refuse) else { return Ok(json(&None::<wire::Stat>)) };
        let look = || rustix::fs::fstat(&file).map_err(super::failed("read"));
        let before = look()?;
        if FileType::from_raw_mode(before.st_mode) != FileType::RegularFile {
            return Ok(json(&None::<wire::Stat>));
        }
        let entry = list::entry(place.shown(&place.path).unwrap_or_default(), &before);
        let is_same = asked.conditions.hold(Some(&entry.etag)) && resume::hash(&file).await? == asked.sha256;
        // What changes meanwhile is not known.
        let is_known = is_same && Stamp::from(&look()?) == Stamp::from(&before);
        Ok(json(&is_known.then_some(entry)))
    }

    async fn delete_file(&self, asked: wire::Delete) -> Answered {
        let place = self.place(&asked.path)?;
        let removal = remove(&place, asked.recursive, &asked.conditions)?;
        if let Some(path) = place.in_workdir() {
            self.kernels.files().taken(path, None);
        }
        // To its end, whoever waits for it.
        let removed = tokio::spawn(removal.finish()).await;
        removed.map_err(|_| FileError::Failed("removed", rustix::io::Errno::IO))??;
        Ok(json(&Deleted {}))
    }

    async fn move_file(&self, asked: wire::Move) -> Answered {
        let (from, to) = (self.place(&asked.from)?, self.place(&asked.to)?);
        let made = move_to(&from, &to, asked.overwrite).await.map_err(|error| with_left(error, &to))?;
        let files = self.kernels.files();
        if let Some(path) = from.in_workdir() {
            files.taken(path, to.in_workdir());
        }
        if let (Some(path), Kind::File) = (to.in_workdir(), made.stat.kind)
            && let Ok(file) = to.open(OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Links::Refuse)
            && let Ok(stat) = rustix::fs::fstat(file)
        {
            files.uploaded([(path.to_owned(), Stamp::from(&stat))]);
        }
        Ok(json(&made))
    }

    async fn unpack(&self, asked: wire::Archive, mut body: Incoming) -> Answered {
        let place = self.place(&asked.path)?;
        let mut unpacking = Unpacking::begin(&place, asked.gzip)?;
        let taken = async {
            while let Some(data) = piece(&mut body).await? {
                unpacking.push(&data).await?;
            }
            Ok(())
        };
        if let Err(error) = taken.await {
            unpacking.abandon().await;
            return Err(with_left(error, &place).into());
        }
        let (unpacked, files) = unpacking.finish().await.map_err(|error| with_left(error, &place))?;
        if let Some(folder) = place.in_workdir() {
            let whole = |path: &Path| if place.is_root() { path.to_owned() } else { folder.join(path) };
            self.kernels.files().uploaded(files.iter().map(|(path, stamp)| (whole(path), *stamp)));
        }
        Ok(json(&unpacked))
    }
}

/// What a query asks about.
fn about<T: DeserializeOwned>(query: &str) -> Result<T, Refused> {
    let asked = query.strip_prefix("q=").unwrap_or_default();
    serde_json::from_slice(&percent_decode(asked))
        .map_err(|error| Refused::invalid(&format!("the query is not understood: {error}")))
}

/// The next bytes of a body; nothing at its end.
async fn piece(body: &mut Incoming) -> Result<Option<Bytes>, FileError> {
    // What waits for the one thread there is has its turn.
    tokio::task::yield_now().await;
    loop {
        match tokio::time::timeout(STALLED, body.frame()).await {
            Ok(None) => return Ok(None),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Ok(Some(Err(_))) | Err(_) => return Err(FileError::BrokeOff),
        }
    }
}

/// Refuses what is known not to fit.
fn fits(folder: impl std::os::fd::AsFd, size: Option<u64>) -> Result<(), FileError> {
    match (size, free_bytes(folder)) {
        (Some(size), Some(left)) if size > left => Err(FileError::NoSpace(Some(left))),
        _ => Ok(()),
    }
}

/// Adds what is left to a refusal for want of room.
fn with_left(error: FileError, place: &Place) -> FileError {
    match error {
        FileError::NoSpace(None) => FileError::NoSpace(place.root().ok().and_then(free_bytes)),
        other => other,
    }
}

/// A structure as a header's value.
fn header(value: &impl Serialize) -> HeaderValue {
    // Numbers and ASCII: the path is not in it.
    let text = serde_json::to_string(value).unwrap_or_default();
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("{}"))
}
