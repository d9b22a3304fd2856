//! What a guest is asked about files, typed. Bodies go through as they come: whoever asks bounds them, and what the guest says is hostile.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use cellblock_wire::files::{
    Archive, At, Delete, Deleted, Known, List, Listing, MAX_LISTED, MAX_PATH, Made, Move, OPENED, Opened, Read,
    Received, Stat, Unpacked, Upload, Watch, Write, Written,
};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::{Body, Incoming};
use hyper::{Method, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::link::{Asked, Link, LinkError, escape_path};

/// A request whose work does not depend on how much there is, is answered within this time.
const SHORT: Duration = Duration::from_secs(15);
/// One that reads or removes much.
const LONG: Duration = Duration::from_secs(120);
/// Largest JSON answer, in bytes.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

fn about(path: &str, asked: &impl Serialize) -> String {
    // Structures of texts and numbers: writing them can't fail.
    let json = serde_json::to_string(asked).unwrap_or_default();
    format!("{path}?q={}", escape_path(&json))
}

impl Link {
    /// What is in a folder. Names are hostile text.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn list_files(&self, asked: &List) -> Result<Listing, LinkError> {
        let attempt = "list files";
        let listing: Listing = self.look(attempt, &about("/files", asked), SHORT).await?;
        let is_long = listing.entries.len() > MAX_LISTED || listing.entries.iter().any(|e| !is_plain(e));
        if is_long { Err(odd(attempt, "more or longer entries than there may be")) } else { Ok(listing) }
    }

    /// What is at a path.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn stat_file(&self, asked: &At) -> Result<Stat, LinkError> {
        let attempt = "look at a file";
        let stat = self.look(attempt, &about("/files/stat", asked), SHORT).await?;
        checked(attempt, stat)
    }

    /// A file's bytes as they come. The guest says how many.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn read_file(&self, asked: &Read) -> Result<(Opened, Incoming), LinkError> {
        let attempt = "read a file";
        let path = about("/files/content", asked);
        let response = self.get(attempt, &path, SHORT).await?;
        let told = response.headers().get(OPENED).and_then(|told| told.to_str().ok());
        let opened: Option<Opened> = told.and_then(|told| serde_json::from_str(told).ok());
        let is_whole = |o: &Opened| o.first.checked_add(o.length).is_some_and(|end| end <= o.stat.size);
        let opened = opened.filter(is_whole).ok_or_else(|| odd(attempt, "a file without its size"))?;
        checked(attempt, opened.stat.clone())?;
        Ok((opened, response.into_body()))
    }

    /// Writes a file, or a part of one.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn write_file<B>(&self, asked: &Write, body: B) -> Result<Written, LinkError>
    where
        B: Body<Data = Bytes, Error = io::Error> + Send + 'static,
    {
        let attempt = "write a file";
        let written: Written = self.put(attempt, &about("/files/content", asked), body).await?;
        if let Some(stat) = &written.stat {
            checked(attempt, stat.clone())?;
        }
        Ok(written)
    }

    /// Whether a file is there with this content.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn is_file_known(&self, asked: &Known) -> Result<Option<Stat>, LinkError> {
        let attempt = "compare a file";
        let known: Option<Stat> = self.order_file(attempt, "/files/known", asked, LONG).await?;
        known.map(|stat| checked(attempt, stat)).transpose()
    }

    /// How much of an upload is there.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn upload_received(&self, asked: &Upload) -> Result<u64, LinkError> {
        let received: Received = self.look("look at an upload", &about("/files/upload", asked), SHORT).await?;
        Ok(received.received)
    }

    /// Removes a file or a folder.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn delete_file(&self, asked: &Delete) -> Result<(), LinkError> {
        self.order_file::<Deleted>("remove a file", "/files/delete", asked, LONG).await.map(|Deleted {}| ())
    }

    /// Makes a folder.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn make_folder(&self, path: &str) -> Result<Made, LinkError> {
        let attempt = "make a folder";
        let made: Made =
            self.order_file(attempt, "/files/mkdir", &At { path: path.to_owned(), attributes: false }, SHORT).await?;
        checked(attempt, made.stat.clone())?;
        Ok(made)
    }

    /// Moves a file or a folder.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn move_file(&self, asked: &Move) -> Result<Made, LinkError> {
        let attempt = "move a file";
        let made: Made = self.order_file(attempt, "/files/move", asked, LONG).await?;
        checked(attempt, made.stat.clone())?;
        Ok(made)
    }

    /// What changes in a folder, a line of JSON each.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn watch_files(&self, asked: &Watch) -> Result<Incoming, LinkError> {
        Ok(self.get("watch a folder", &about("/files/watch", asked), SHORT).await?.into_body())
    }

    /// A folder as an archive, as it comes.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn pack_files(&self, asked: &Archive) -> Result<Incoming, LinkError> {
        Ok(self.get("pack a folder", &about("/files/archive", asked), SHORT).await?.into_body())
    }

    /// Unpacks an archive into a folder.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub async fn unpack_files<B>(&self, asked: &Archive, body: B) -> Result<Unpacked, LinkError>
    where
        B: Body<Data = Bytes, Error = io::Error> + Send + 'static,
    {
        self.put("unpack an archive", &about("/files/archive", asked), body).await
    }

    async fn get(&self, attempt: &str, path: &str, within: Duration) -> Result<Response<Incoming>, LinkError> {
        let asked = Asked { attempt, method: Method::GET, path, within: Some(within) };
        self.exchange(asked, Empty::new().map_err(|never| match never {})).await
    }

    async fn look<T: DeserializeOwned>(&self, attempt: &str, path: &str, within: Duration) -> Result<T, LinkError> {
        read_answer(attempt, self.get(attempt, path, within).await?, within).await
    }

    async fn order_file<T: DeserializeOwned>(
        &self,
        attempt: &str,
        path: &str,
        asked: &impl Serialize,
        within: Duration,
    ) -> Result<T, LinkError> {
        let json = serde_json::to_vec(asked).unwrap_or_default();
        let body = Full::new(Bytes::from(json)).map_err(|never| match never {});
        let response = self.exchange(Asked { attempt, method: Method::POST, path, within: Some(within) }, body).await?;
        read_answer(attempt, response, within).await
    }

    async fn put<T, B>(&self, attempt: &str, path: &str, body: B) -> Result<T, LinkError>
    where
        T: DeserializeOwned,
        B: Body<Data = Bytes, Error = io::Error> + Send + 'static,
    {
        // How long it takes depends on the body, whose pieces have their own time.
        let response = self.exchange(Asked { attempt, method: Method::PUT, path, within: None }, body).await?;
        read_answer(attempt, response, SHORT).await
    }
}

async fn read_answer<T: DeserializeOwned>(
    attempt: &str,
    response: Response<Incoming>,
    within: Duration,
) -> Result<T, LinkError> {
    let collected = tokio::time::timeout(within, Limited::new(response.into_body(), MAX_ANSWER).collect()).await;
    let late = |_| LinkError::TimedOut { attempt: attempt.to_owned(), limit: within };
    let bytes = collected.map_err(late)?.map_err(|e| odd(attempt, &e.to_string()))?.to_bytes();
    serde_json::from_slice(&bytes).map_err(|e| odd(attempt, &e.to_string()))
}

fn odd(attempt: &str, detail: &str) -> LinkError {
    LinkError::Protocol { attempt: attempt.to_owned(), detail: detail.to_owned() }
}

/// Whether an entry is what a guest may tell. Tags go into headers.
fn is_plain(stat: &Stat) -> bool {
    let is_tag = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let is_long = |text: &String| text.len() > MAX_PATH;
    !is_long(&stat.path)
        && !stat.target.as_ref().is_some_and(is_long)
        && (1..=128).contains(&stat.etag.len())
        && stat.etag.bytes().all(is_tag)
}

fn checked(attempt: &str, stat: Stat) -> Result<Stat, LinkError> {
    if is_plain(&stat) { Ok(stat) } else { Err(odd(attempt, "a file with a tag or a path that is none")) }
}
