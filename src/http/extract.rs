//! What comes in: bodies, query parameters, ids and keys, each read once, at the door, into what the service takes.
//!
//! A body that is not understood is answered with every field that is wrong, not the first one.

use std::marker::PhantomData;
use std::time::Duration;

use axum::body::{Body as RawBody, Bytes, HttpBody};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::problem::{self, Problem};
use super::rate::Slot;
use super::{App, Bounds};
use crate::domain::spec::{FieldError, escape_pointer};
use crate::service::keys::Principal;
use crate::service::trail;
use crate::session::once::Once;

/// Most mistakes told at once.
const MAX_MISTAKES: usize = 32;

/// Longest key that a caller gives a request.
const MAX_KEY: usize = 255;

/// Longest time in which what will not be read is taken all the same.
const DISCARDING: Duration = Duration::from_secs(1);

/// A JSON body. An empty one is an empty object.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        check_content_type(&request)?;
        let bytes = read(request.into_body(), app.bounds).await?;
        let bytes: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| Problem::new(problem::INVALID_REQUEST, format!("the body is not JSON: {e}")))?;
        from_value(value).map(Self).map_err(|mistakes| {
            Problem::new(problem::INVALID_REQUEST, "fields of the body are not understood").with_fields(mistakes)
        })
    }
}

/// A JSON body of a request that may come twice, and the caller's key for it (`Idempotency-Key`), if there is one.
#[derive(Debug)]
pub struct Keyed<T>(pub T, pub Option<Once>);

impl<T: DeserializeOwned> FromRequest<App> for Keyed<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let (head, body) = request.into_parts();
        let Some(key) = idempotency_key(&head)? else {
            let Body(body) = Body::from_request(Request::from_parts(head, body), app).await?;
            return Ok(Self(body, None));
        };
        let bytes = read(body, app.bounds).await?;
        let mut hasher = Sha256::new();
        for part in [head.method.as_str().as_bytes(), head.uri.to_string().as_bytes(), &bytes] {
            hasher.update((part.len() as u64).to_be_bytes());
            hasher.update(part);
        }
        let fingerprint = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let Body(body) = Body::from_request(Request::from_parts(head, bytes.into()), app).await?;
        Ok(Self(body, Some(Once { key, fingerprint })))
    }
}

fn idempotency_key(head: &Parts) -> Result<Option<String>, Problem> {
    let mut given = head.headers.get_all("idempotency-key").iter();
    let Some(key) = given.next() else { return Ok(None) };
    let key = key.to_str().ok().filter(|key| (1..=MAX_KEY).contains(&key.len()) && given.next().is_none());
    key.map(|key| Some(key.to_owned())).ok_or_else(|| {
        let allowed = format!("allowed is one, of 1 to {MAX_KEY} visible characters of ASCII");
        Problem::new(problem::INVALID_REQUEST, "a header is not understood")
            .with_fields(vec![FieldError::new("Idempotency-Key", allowed)])
    })
}

/// Reads a body within its bounds. One that declares too much is refused before it is read.
pub(super) async fn read(mut body: RawBody, bounds: Bounds) -> Result<Bytes, Problem> {
    let too_large = || Problem::new(problem::PAYLOAD_TOO_LARGE, format!("a body may have {} bytes", bounds.body));
    if body.size_hint().lower() > bounds.body as u64 {
        discard(&mut body, bounds).await;
        return Err(too_large());
    }
    let whole = tokio::time::timeout(bounds.body_time, Limited::new(&mut body, bounds.body).collect());
    match trail::arriving(whole).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            discard(&mut body, bounds).await;
            Err(too_large())
        }
        Ok(Err(_)) => Err(Problem::new(problem::INVALID_REQUEST, "the body could not be read to its end")),
        Err(_) => Err(Problem::new(
            problem::REQUEST_TIMEOUT,
            format!("the body did not arrive within {:?}", bounds.body_time),
        )),
    }
}

/// Lets a caller that does not look up while it sends come to its end, within bounds: a connection that is closed under it takes the answer along.
pub(super) async fn discard(body: &mut RawBody, bounds: Bounds) {
    let rest = Limited::new(body, bounds.body);
    let taken = rest.into_data_stream().take_while(|part| std::future::ready(part.is_ok())).for_each(|_| async {});
    // What is still to come is cut off with the connection.
    let _ = tokio::time::timeout(DISCARDING.min(bounds.body_time), taken).await;
}

fn check_content_type(request: &Request) -> Result<(), Problem> {
    let Some(given) = request.headers().get(CONTENT_TYPE) else { return Ok(()) };
    let essence = given.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || essence.ends_with("+json") {
        Ok(())
    } else {
        Err(Problem::new(problem::UNSUPPORTED_MEDIA_TYPE, "send the body as application/json"))
    }
}

/// Reads a structure and collects its mistakes: each wrong field is noted, taken out, and the rest is tried again.
pub(super) fn from_value<T: DeserializeOwned>(mut value: Value) -> Result<T, Vec<FieldError>> {
    let mut mistakes = Vec::new();
    loop {
        match serde_path_to_error::deserialize::<_, Object<T>>(&value) {
            Ok(Object(read)) if mistakes.is_empty() => return Ok(read),
            Ok(_) => return Err(mistakes),
            Err(error) => {
                let (pointer, message) = mistake(&error);
                // A field that was taken out is missed, which is no mistake of its own.
                if mistakes.iter().any(|m: &FieldError| m.pointer == pointer) {
                    return Err(mistakes);
                }
                let removed = remove(&mut value, &pointer);
                mistakes.push(FieldError::new(pointer, message));
                if !removed || mistakes.len() == MAX_MISTAKES {
                    return Err(mistakes);
                }
            }
        }
    }
}

/// A structure that is written as an object.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        object(deserializer).map(Self)
    }
}

/// Reads a structure from an object only. Left to itself, serde takes a list of its fields' values as well.
///
/// # Errors
/// When it is written otherwise, or a field of it is wrong.
pub fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct Reader<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Reader<T> {
        type Value = T;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_map(Reader(PhantomData))
}

fn mistake(error: &serde_path_to_error::Error<serde_json::Error>) -> (String, String) {
    use serde_path_to_error::Segment;
    let message = error.inner().to_string();
    let rest = message.strip_prefix("unknown field `").or_else(|| message.strip_prefix("missing field `"));
    let named = rest.and_then(|rest| rest.split('`').next());
    let mut pointer = String::new();
    for segment in error.path() {
        match segment {
            Segment::Map { key } => pointer = format!("{pointer}/{}", escape_pointer(key)),
            Segment::Seq { index } => pointer = format!("{pointer}/{index}"),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    if let Some(field) = named {
        let at = format!("/{}", escape_pointer(field));
        if !pointer.ends_with(&at) {
            pointer.push_str(&at);
        }
    }
    (pointer, message)
}

fn remove(value: &mut Value, pointer: &str) -> bool {
    let Some((parent, token)) = pointer.rsplit_once('/') else { return false };
    let token = token.replace("~1", "/").replace("~0", "~");
    match value.pointer_mut(parent) {
        Some(Value::Object(map)) => map.remove(&token).is_some(),
        Some(Value::Array(items)) => {
            token.parse().ok().filter(|i| *i < items.len()).map(|i: usize| items.remove(i)).is_some()
        }
        _ => false,
    }
}

/// Query parameters. What is not known is refused; a name may come more than once where the reader allows it.
#[derive(Debug)]
pub struct Params {
    pairs: Vec<(String, String)>,
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let axum::extract::Query(pairs) = axum::extract::Query::from_request_parts(parts, state)
            .await
            .map_err(|_| Problem::new(problem::INVALID_REQUEST, "the query is not understood"))?;
        Ok(Self { pairs })
    }
}

impl Params {
    /// Refuses parameters of other names.
    ///
    /// # Errors
    /// A problem that names them.
    pub fn only(self, known: &[&str]) -> Result<Self, Problem> {
        let unknown: Vec<_> = self
            .pairs
            .iter()
            .filter(|(name, _)| !known.contains(&name.as_str()))
            .map(|(name, _)| {
                FieldError::new(format!("?{name}"), format!("is not known; known are {}", known.join(", ")))
            })
            .take(MAX_MISTAKES)
            .collect();
        if unknown.is_empty() {
            Ok(self)
        } else {
            Err(Problem::new(problem::INVALID_REQUEST, "the query has unknown parameters").with_fields(unknown))
        }
    }

    /// All values of a name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.pairs.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The value of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.pairs.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The value of a name, read as something.
    ///
    /// # Errors
    /// A problem that says what is allowed.
    pub fn parse<T: std::str::FromStr>(&self, name: &str, allowed: &str) -> Result<Option<T>, Problem> {
        self.get(name)
            .map(|text| {
                text.parse().map_err(|_| {
                    Problem::new(problem::INVALID_REQUEST, "a query parameter is not understood")
                        .with_fields(vec![FieldError::new(format!("?{name}"), format!("allowed is {allowed}"))])
                })
            })
            .transpose()
    }
}

/// Who asks: the principal behind the request's key.
#[derive(Debug)]
pub struct Caller(pub Principal);

impl FromRequestParts<App> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let who = app.door.admit(parts)?;
        if let (Some(state), Some(slot)) = (app.service.request(&who)?, parts.extensions.get::<Slot>()) {
            // A request is read once.
            let _ = slot.set(state.into());
        }
        Ok(Self(who))
    }
}

/// An id in a path. A text that is no id names nothing, so it is not found.
#[derive(Debug)]
pub struct Id<T>(pub T);

impl<T, S> FromRequestParts<S> for Id<T>
where
    T: std::str::FromStr,
    S: Send + Sync,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let missing = || Problem::new(problem::NOT_FOUND, "there is nothing under that id");
        let axum::extract::Path(text) =
            axum::extract::Path::<String>::from_request_parts(parts, state).await.map_err(|_| missing())?;
        text.parse().map(Self).map_err(|_| missing())
    }
}

/// Two ids in a path.
#[derive(Debug)]
pub struct Ids<A, B>(pub A, pub B);

impl<A, B, S> FromRequestParts<S> for Ids<A, B>
where
    A: std::str::FromStr,
    B: std::str::FromStr,
    S: Send + Sync,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let missing = || Problem::new(problem::NOT_FOUND, "there is nothing under that id");
        let axum::extract::Path((first, second)) =
            axum::extract::Path::<(String, String)>::from_request_parts(parts, state).await.map_err(|_| missing())?;
        match (first.parse(), second.parse()) {
            (Ok(first), Ok(second)) => Ok(Self(first, second)),
            _ => Err(missing()),
        }
    }
}

/// A JSON answer.
#[derive(Debug)]
pub struct Answer<T>(pub T);

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(CONTENT_TYPE, "application/json")], body).into_response(),
            Err(error) => {
                tracing::error!(%error, "an answer could not be written");
                Problem::new(problem::INTERNAL, "the answer could not be written").into_response()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Outer {
        #[serde(default)]
        name: Option<String>,
        #[serde(default)]
        inner: Option<Inner>,
        #[serde(default)]
        list: Vec<u8>,
    }

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Needy {
        code: String,
    }

    #[test]
    fn a_field_that_is_missing_is_named_and_one_that_is_wrong_is_not_missing() {
        let mistakes = |json: &str| {
            let errors = from_value::<Needy>(serde_json::from_str(json).unwrap()).unwrap_err();
            errors.into_iter().map(|e| e.pointer).collect::<Vec<_>>()
        };
        assert_eq!(mistakes("{}"), ["/code"]);
        assert_eq!(mistakes(r#"{"code": 1}"#), ["/code"]);
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        #[serde(default)]
        size: Option<u64>,
    }

    fn mistakes(json: &str) -> Vec<String> {
        let errors = from_value::<Outer>(serde_json::from_str(json).unwrap()).unwrap_err();
        errors.into_iter().map(|e| e.pointer).collect()
    }

    #[test]
    fn all_mistakes_are_told_at_once_with_their_pointers() {
        let mut pointers =
            mistakes(r#"{"name": 3, "inner": {"size": "x", "privileged": true}, "list": [1, 999], "a/b": 1}"#);
        pointers.sort();
        assert_eq!(pointers, ["/a~1b", "/inner/privileged", "/inner/size", "/list/1", "/name"]);
    }

    #[test]
    fn a_body_of_another_kind_is_one_mistake() {
        assert_eq!(mistakes("[1, 2]").len(), 1);
        assert_eq!(mistakes("null").len(), 1);
        assert_eq!(mistakes("[]").len(), 1);
        assert_eq!(mistakes(r#"["name"]"#).len(), 1);
    }
}
