//! Who asks, and under which path: keys in all places where Jupyter's clients put them, and what may be told of such a path. Bodies and refusals in Jupyter's form.

use axum::extract::{FromRequest, FromRequestParts, OriginalUri, RawPathParams, Request};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;

use crate::http::App;
use crate::http::extract::{Params, read};
use crate::http::problem::{self, Form, Problem};
use crate::http::rate::Slot;
use crate::service::Error;
use crate::service::keys::Principal;

/// What stands for a key where a path is told.
const HIDDEN: &str = "…";

/// A refusal as Jupyter's clients read it.
#[derive(Debug)]
pub struct Refusal(Problem);

impl<P: Into<Problem>> From<P> for Refusal {
    fn from(problem: P) -> Self {
        let problem = problem.into();
        let status = match problem.code {
            // Where the reference says so: clients take a 401 for a server that asks for a password.
            "unauthenticated" | "quota-exceeded" => StatusCode::FORBIDDEN.as_u16(),
            // What has ended is not there.
            "session-ended" => StatusCode::NOT_FOUND.as_u16(),
            "spec-rejected" | "unsupported-media-type" | "is-a-directory" | "not-a-directory" => {
                StatusCode::BAD_REQUEST.as_u16()
            }
            _ => problem.status,
        };
        Self(Problem { status, form: Form::Jupyter, ..problem })
    }
}

impl Refusal {
    /// The same with another status.
    #[must_use]
    pub fn with_status(self, status: StatusCode) -> Self {
        Self(Problem { status: status.as_u16(), ..self.0 })
    }

    /// A body that is not understood.
    pub fn malformed(detail: impl Into<String>) -> Self {
        Problem::new(problem::INVALID_REQUEST, detail).into()
    }

    /// Something that is not there.
    pub fn missing(detail: impl Into<String>) -> Self {
        Problem::new(problem::NOT_FOUND, detail).into()
    }

    /// Whether a field of the request is what is wrong.
    #[must_use]
    pub fn is_about(&self, pointer: &str) -> bool {
        self.0.errors.iter().any(|field| field.pointer == pointer)
    }

    /// Its word, and its status.
    #[must_use]
    pub fn outcome(&self) -> (&'static str, u16) {
        (self.0.code, self.0.status)
    }

    /// Word and sentence.
    #[must_use]
    pub fn words(&self) -> (&'static str, &str) {
        (self.0.code, &self.0.detail)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.0.into_response()
    }
}

/// Who asks, and where.
pub struct Asking {
    /// Everything that answers.
    pub app: App,
    /// Who stands behind the key.
    pub who: Principal,
    /// The key: that of a connection is looked at again.
    pub key: String,
    /// What the API's paths begin with in this request: nothing, `/jupyter`, or a key.
    pub base: String,
}

impl FromRequestParts<App> for Asking {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let (who, key) = admit(parts, app).await?;
        let OriginalUri(uri) = OriginalUri::from_request_parts(parts, app).await.unwrap_or_else(|never| match never {});
        Ok(Self { app: app.clone(), who, key, base: base(uri.path()).to_owned() })
    }
}

/// Who asks, by a key in any of the places in which one is looked for here; and the key.
///
/// # Errors
/// There is none, it is not valid, or two differ; or the tenant asks too often.
pub(in crate::http) async fn admit(parts: &mut Parts, app: &App) -> Result<(Principal, String), Problem> {
    let keys = keys_of(parts, app).await;
    let key = one(&keys);
    let who = app.door.admit_key(parts, key, !keys.is_empty())?;
    if let (Some(state), Some(slot)) = (app.service.request(&who)?, parts.extensions.get::<Slot>()) {
        // A request is read once.
        let _ = slot.set(state.into());
    }
    Ok((who, key.unwrap_or_default().to_owned()))
}

/// All keys that a request names, wherever. Some clients send an empty one.
async fn keys_of(parts: &mut Parts, app: &App) -> Vec<String> {
    let scheme = |text: &str| {
        let (scheme, key) = text.split_once(' ').unwrap_or((text, ""));
        let is_known = ["token", "bearer"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
        if is_known { key.trim().to_owned() } else { text.to_owned() }
    };
    // What is no text is a key that is not valid.
    let text = |value: &axum::http::HeaderValue| value.to_str().unwrap_or("?").to_owned();
    let mut keys: Vec<String> = parts.headers.get_all(AUTHORIZATION).iter().map(|value| scheme(&text(value))).collect();
    keys.extend(parts.headers.get_all("x-api-key").iter().map(text));
    if let Ok(params) = Params::from_request_parts(parts, app).await {
        keys.extend(params.all("token").map(str::to_owned));
    }
    if let Ok(params) = RawPathParams::from_request_parts(parts, app).await {
        keys.extend(params.iter().filter(|(name, _)| *name == "key").map(|(_, key)| key.to_owned()));
    }
    keys.retain(|key| !key.is_empty());
    keys
}

/// The key, if all that are named are the same one: nobody should have to guess which counts.
fn one(keys: &[String]) -> Option<&str> {
    let key = keys.first()?;
    keys.iter().all(|other| other == key).then_some(key)
}

fn base(path: &str) -> &str {
    let at = ["/api", "/kernelspecs"].iter().filter_map(|begin| path.find(begin)).min();
    &path[..at.unwrap_or_default()]
}

/// Whether a request's target names a key.
pub(crate) fn has_key(uri: &Uri) -> bool {
    // As the key is read, whichever way its name is written.
    let in_query = |query: &str| url::form_urlencoded::parse(query.as_bytes()).any(|(name, _)| name == "token");
    uri.path().starts_with("/t/") || uri.query().is_some_and(in_query)
}

/// A path as it may be told: a key that it begins with is hidden.
pub(crate) fn redacted(path: &str) -> String {
    match path.strip_prefix("/t/") {
        Some(rest) => format!("/t/{HIDDEN}{}", rest.find('/').map_or("", |at| &rest[at..])),
        None => path.to_owned(),
    }
}

/// A part of the path by its name in the route. What the path has not got names nothing.
pub struct Named(pub String);

impl FromRequestParts<App> for Named {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let missing = || Refusal::missing("there is nothing under that name");
        let params = RawPathParams::from_request_parts(parts, app).await.map_err(|_| missing())?;
        let named = params.iter().find(|(name, _)| ["kernel", "session", "name"].contains(name));
        named.map(|(_, text)| Self(text.to_owned())).ok_or_else(missing)
    }
}

/// A body, whatever its type is said to be: some clients say none. An empty one is an empty object; fields that are not known are others' business.
pub struct Loose<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Loose<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &App) -> Result<Self, Refusal> {
        let bytes = read(request.into_body(), app.bounds).await?;
        let text = bytes.trim_ascii();
        let text: &[u8] = if text.is_empty() || text == b"null" { b"{}" } else { text };
        let wrong = |error: serde_json::Error| Refusal::malformed(format!("Invalid JSON in body of request: {error}"));
        serde_json::from_slice(text).map(Self).map_err(wrong)
    }
}

/// What a session's end is to whoever asks for it here.
pub fn kernel_missing(id: &str) -> Refusal {
    Refusal::missing(format!("Kernel does not exist: {id}"))
}

/// The same refusal for a thing of another name.
pub fn renamed(error: Error, id: &str) -> Refusal {
    match error {
        Error::NotFound(_) | Error::SessionEnded(_) => kernel_missing(id),
        error => Refusal::from(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_in_a_path_or_query_is_seen_and_not_told() {
        for (path, told) in [
            ("/t/cb_12/api/kernels", "/t/…/api/kernels"),
            ("/t/cb_12", "/t/…"),
            ("/t/", "/t/…"),
            ("/api/kernels", "/api/kernels"),
            ("/v1/t/x", "/v1/t/x"),
        ] {
            assert_eq!(redacted(path), told);
        }
        let names = |uri: &str| has_key(&uri.parse().unwrap());
        assert!(names("/t/x/api") && names("/api/kernels?a=1&token=x") && !names("/api/kernels?tokens=1"));
        assert!(names("/api/kernels?%74oken=x") && names("/api/kernels?a&t%6Fken=x"));
        assert!(!names("/api/kernels?a=%26token=x"));
    }

    #[test]
    fn where_the_api_is_stands_before_it() {
        assert_eq!(base("/api/kernels"), "");
        assert_eq!(base("/t/k/jupyter/api/kernels/x"), "/t/k/jupyter");
        assert_eq!(base("/jupyter/kernelspecs/x/logo"), "/jupyter");
    }

    #[test]
    fn keys_that_differ_are_no_key() {
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        assert_eq!(one(&keys(&["a", "a"])), Some("a"));
        assert_eq!(one(&keys(&["a", "b"])), None);
        assert_eq!(one(&[]), None);
    }
}
