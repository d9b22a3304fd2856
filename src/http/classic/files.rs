//! Files of a user: the upload, which is written as it comes, and the notebook.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use axum::body::{Body as RawBody, BodyDataStream};
use axum::extract::{FromRequestParts, RawPathParams, Request};
use axum::http::header;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use cellblock_wire::link::escape_path;
use futures_util::stream::{self, Stream};
use multer::{Field, Multipart};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::asking::{Asking, MAX_USER, Refusal, User, Wrong};
use super::sessions::{all, ready};
use crate::http::App;
use crate::http::extract::{Answer, discard};
use crate::http::problem::{self, Problem};
use crate::http::v1::transfers::{Sparing, broken, stalled, write_field};
use crate::service::Error;
use crate::service::files::WriteFile;
use crate::service::transfer::STALLED;

/// The working folder of sessions.
const FOLDER: &str = "/workspace";
/// Longest name of a file, in bytes.
const MAX_NAME: usize = 255;
/// Most fields of a form, with those that are not looked at.
const MAX_FIELDS: usize = 100;

/// Writes a file into the working folder of the user's session.
pub(super) async fn upload_file(asking: Asking, request: Request) -> Result<Answer<Value>, Refusal> {
    asking.who.require_sessions()?;
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let Ok(boundary) = multer::parse_boundary(kind) else {
        return Err(["user_id", "file"].map(|field| Wrong::missing(field, Value::Null)).to_vec().into());
    };
    let body = Shared(Arc::new(Mutex::new(request.into_body().into_data_stream())));
    let answer = take(&asking, RawBody::from_stream(body.clone()), boundary).await;
    if answer.is_err() {
        // These clients look for an answer once they have sent all.
        discard(&mut RawBody::from_stream(body), asking.app.bounds).await;
    }
    answer
}

/// A body of which another may take the rest.
#[derive(Clone)]
struct Shared(Arc<Mutex<BodyDataStream>>);

impl Stream for Shared {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // Only one reads at a time, and a body that has panicked is read no more.
        let mut body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Pin::new(&mut *body).poll_next(cx)
    }
}

async fn take(asking: &Asking, body: RawBody, boundary: String) -> Result<Answer<Value>, Refusal> {
    let untaken = Arc::new(AtomicUsize::new(0));
    let mut form = Multipart::new(Sparing::new(body, &untaken), boundary);
    let (mut user, mut early, mut written) = (None, None, None);
    let (mut fields, mut until) = (0, Instant::now() + asking.app.bounds.body_time);
    loop {
        let next = in_time(until, form.next_field()).await?;
        let Some(field) = next.map_err(|error| broken(&error))? else { break };
        fields += 1;
        if fields > MAX_FIELDS {
            let message = format!("Too many fields. Maximum number of fields is {MAX_FIELDS}.");
            return Err(vec![Wrong::body("form_invalid", None, message)].into());
        }
        untaken.store(0, Ordering::Relaxed);
        match (field.name(), &user) {
            (Some("user_id"), None) => {
                let text = collect(field, 4 * MAX_USER, &untaken, until).await?;
                let text = String::from_utf8(text.into()).map_err(|_| vec![Wrong::missing("user_id", Value::Null)])?;
                user = Some(User::parse(text).map_err(|wrong| vec![wrong])?);
            }
            (Some("file"), _) if early.is_some() || written.is_some() => {
                return Err(vec![Wrong::new("too_many", "file", "A form may have one file", Value::Null)].into());
            }
            (Some("file"), Some(user)) => {
                let name = file_name(&field)?;
                let began = Instant::now();
                let session = ready(asking, user).await?;
                write_field(&asking.app, &asking.who, session.id, name.clone(), field, &untaken).await?;
                // A file may be long: it has only to come on.
                until += began.elapsed();
                written = Some(name);
            }
            // Whose it is comes behind it: until then it is here, and no larger than any other body.
            (Some("file"), None) => {
                let name = file_name(&field)?;
                early = Some((name, collect(field, asking.app.bounds.body, &untaken, until).await?));
            }
            _ => {}
        }
    }
    let missing = [("user_id", user.is_none()), ("file", early.is_none() && written.is_none())];
    if let (Some((name, bytes)), Some(user)) = (early, &user) {
        write(asking, user, name.clone(), bytes).await?;
        written = Some(name);
    }
    let missing = missing.into_iter().filter(|(_, is_missing)| *is_missing);
    let missing: Vec<_> = missing.map(|(field, _)| Wrong::missing(field, Value::Null)).collect();
    match written {
        Some(name) if missing.is_empty() => {
            let path = format!("{FOLDER}/{name}");
            Ok(Answer(json!({"message": "File uploaded successfully", "filename": name, "file_path": path})))
        }
        _ => Err(missing.into()),
    }
}

/// The next of a form, which comes on, and is there by then.
async fn in_time<T>(until: Instant, next: impl Future<Output = T>) -> Result<T, Refusal> {
    let stalls = Instant::now() + STALLED;
    tokio::time::timeout_at(until.min(stalls), next).await.map_err(|_| match until < stalls {
        true => Problem::new(
            problem::REQUEST_TIMEOUT,
            "the form did not arrive in time; a file that comes behind its user_id may take longer",
        )
        .into(),
        false => stalled().into(),
    })
}

/// The bytes of a field that may have so many, and are there by then.
async fn collect(mut field: Field<'_>, most: usize, untaken: &AtomicUsize, until: Instant) -> Result<Bytes, Refusal> {
    let mut bytes = BytesMut::new();
    loop {
        let piece = in_time(until, field.chunk()).await?;
        let Some(piece) = piece.map_err(|error| broken(&error))? else { return Ok(bytes.freeze()) };
        untaken.store(0, Ordering::Relaxed);
        if bytes.len() + piece.len() > most {
            let detail =
                format!("this field may have {most} bytes here; a file that comes behind its user_id may have more");
            return Err(Problem::new(problem::PAYLOAD_TOO_LARGE, detail).into());
        }
        bytes.extend_from_slice(&piece);
    }
}

async fn write(asking: &Asking, user: &User, path: String, bytes: Bytes) -> Result<(), Refusal> {
    let session = ready(asking, user).await?;
    let asked = WriteFile { path, size: Some(bytes.len() as u64), ..WriteFile::default() };
    let pieces = stream::iter([Ok::<_, std::convert::Infallible>(bytes)]);
    asking.app.service.write_file(&asking.who, session.id, asked, pieces).await?;
    Ok(())
}

/// The name of a form's file: one of a file, without a folder.
fn file_name(field: &Field<'_>) -> Result<String, Refusal> {
    let name = field.file_name().unwrap_or_default();
    if name.is_empty() {
        let message = "Value error, expected a file: a part with a file name";
        return Err(vec![Wrong::new("value_error", "file", message, Value::Null)].into());
    }
    if is_file_name(name) {
        return Ok(name.to_owned());
    }
    let message =
        format!("Value error, a file's name has 1 to {MAX_NAME} bytes, and no slash, backslash or control character");
    Err(vec![Wrong::new("value_error", "file", message, name.into())].into())
}

fn is_file_name(name: &str) -> bool {
    let is_refused = |c: char| matches!(c, '/' | '\\') || c.is_control();
    (1..=MAX_NAME).contains(&name.len()) && !matches!(name, "." | "..") && !name.contains(is_refused)
}

/// The user that a path names.
pub(super) struct Named(User);

impl FromRequestParts<App> for Named {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let missing = || Refusal::from(Error::NotFound("session"));
        let params = RawPathParams::from_request_parts(parts, app).await.map_err(|_| missing())?;
        let user = params.iter().find(|(name, _)| *name == "user_id").map(|(_, user)| user.to_owned());
        user.and_then(|user| User::parse(user).ok()).map(Self).ok_or_else(missing)
    }
}

/// The notebook of the user's session, or of the last one as long as that is known. After that, a session's id leads to it.
pub(super) async fn get_notebook(asking: Asking, Named(user): Named) -> Result<Response, Refusal> {
    let id = match all(&asking, &user)?.pop() {
        Some(session) => session.id,
        None => user.0.parse().map_err(|_| Error::NotFound("session"))?,
    };
    let bytes = asking.app.service.notebook(&asking.who, id).await?;
    let name = format!("attachment; filename*=UTF-8''notebook_{}.ipynb", escape_path(&user.0).replace('/', "%2F"));
    let headers = [(header::CONTENT_TYPE, "application/x-ipynb+json".to_owned()), (header::CONTENT_DISPOSITION, name)];
    Ok((headers, bytes).into_response())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_form_comes_on_and_comes_to_its_end() {
        let began = Instant::now();
        let waits = |until| in_time(until, std::future::pending::<()>());
        assert!(waits(began + Duration::from_secs(3600)).await.is_err());
        assert_eq!(began.elapsed().as_secs(), STALLED.as_secs());
        assert!(waits(began + STALLED + Duration::from_secs(5)).await.is_err());
        assert_eq!(began.elapsed().as_secs(), STALLED.as_secs() + 5);
    }

    #[test]
    fn a_name_of_a_file_is_in_no_folder() {
        for name in ["a.csv", "ä b.txt", "..a", "-rf", ".hidden"] {
            assert!(is_file_name(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\\b", "a\0", "a\nb", &"x".repeat(256)] {
            assert!(!is_file_name(name), "{name}");
        }
    }
}
