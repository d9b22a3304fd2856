//! The door for clients of the Model Context Protocol, at `/mcp`: who asks, which of their requests belong together, and what `rmcp` makes of the messages. What
//! tools do stands in the rooms below; nothing here runs anything.
//!
//! Both eras of the protocol are served without state of a connection: what an old client is given at `initialize` is a name, which its requests carry, and by
//! which the session that it works in is found again, also by the next server.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures_util::future::BoxFuture;
use rmcp::ServerHandler;
use rmcp::transport::streamable_http_server::session::never::NeverSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::App;
use super::extract::{Caller, read};
use super::problem::{self, Problem};
use crate::domain::ids::KeyId;
use crate::service::Service;
use crate::service::keys::Principal;
use crate::service::trail::{self, Trail};

mod answer;
mod binding;
mod call;
mod commands;
mod edits;
mod files;
mod kernels;
mod resources;
mod run;
mod server;
mod sessions;
mod tasks;
mod tools;

pub(super) use answer::cut;
pub use tools::ToolSet;

/// Where it is.
pub const PATH: &str = "/mcp";
/// What requests of an old client belong together by.
const MCP_SESSION: HeaderName = HeaderName::from_static("mcp-session-id");
/// Names the session that all calls are about.
const PIN: HeaderName = HeaderName::from_static("x-cellblock-session");
/// Longest name that a client gives back, in bytes.
const MAX_NAME: usize = 256;

/// What this door works with.
#[derive(Clone)]
pub struct Mcp {
    /// Names that it may be asked under, as the header `Host` has them, with a port or without; none: any.
    pub hosts: Arc<[String]>,
    calls: Calls,
    behind: Arc<Behind>,
}

/// Answers a request that was let in.
type Behind = dyn Fn(Arc<Service>, StreamableHttpServerConfig, Request) -> BoxFuture<'static, Response> + Send + Sync;

impl Mcp {
    /// One with these tools that may be asked under these names; any, if there are none.
    #[must_use]
    pub fn new(hosts: impl Into<Arc<[String]>>, tools: ToolSet) -> Self {
        Self::before(hosts, move |service| server::Cells { service, tools })
    }

    /// The same, before another handler of messages than the product's: it is asked, bounded and answered for in the same way.
    #[must_use]
    pub fn before<H: ServerHandler + Clone>(
        hosts: impl Into<Arc<[String]>>,
        handler: impl Fn(Arc<Service>) -> H + Send + Sync + 'static,
    ) -> Self {
        Self::answered_by(hosts, move |service, config, request| {
            let (handler, sessions) = (handler(service), Arc::new(NeverSessionManager::default()));
            let service = StreamableHttpService::new(move || Ok(handler.clone()), sessions, config);
            Box::pin(async move { service.handle(request).await.map(Body::new) })
        })
    }

    /// The same, where requests that were let in, whose bodies are whole and bounded, are answered in another way. The configuration is this door's.
    #[must_use]
    pub fn answered_by(
        hosts: impl Into<Arc<[String]>>,
        behind: impl Fn(Arc<Service>, StreamableHttpServerConfig, Request) -> BoxFuture<'static, Response>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self { hosts: hosts.into(), calls: Calls::default(), behind: Arc::new(behind) }
    }
}

impl fmt::Debug for Mcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mcp").field("hosts", &self.hosts).finish_non_exhaustive()
    }
}

/// Its route.
pub(super) fn routes() -> Router<App> {
    Router::new().route(PATH, post(answer).get(answer))
}

/// What is known of a call before its message is read. Tools find it in the extensions of the request's head.
#[derive(Debug, Clone)]
struct Asked {
    who: Principal,
    trail: Option<Arc<Trail>>,
    /// The session that all calls of this client are about: its id, or a name.
    pin: Option<String>,
    /// The name of the session that an old client works in when it names none.
    bound: Option<String>,
    /// Cancelled by a later message of an old client.
    call: Option<Arc<UnderWay>>,
}

/// As much of a message as this door has to know.
#[derive(Debug, Deserialize)]
struct Peek {
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    id: Option<Value>,
    #[serde(default)]
    params: Option<PeekParams>,
}

#[derive(Debug, Deserialize)]
struct PeekParams {
    #[serde(default, rename = "requestId")]
    request_id: Option<Value>,
}

async fn answer(State(app): State<App>, Caller(who): Caller, request: Request) -> Result<Response, Problem> {
    let Some(mcp) = app.mcp.clone() else {
        return Err(Problem::new(problem::NOT_FOUND, "there is no such path"));
    };
    let (mut head, body) = request.into_parts();
    check_page(&app, &mcp, &head)?;
    // It was admitted; nobody behind this needs its key.
    head.headers.remove(header::AUTHORIZATION);
    head.headers.remove("x-api-key");
    if head.method == Method::GET {
        // Who has sessions of the protocol tells there what is no answer; the product has none, and refuses.
        return Ok(serve(&app, &mcp, Request::from_parts(head, Body::empty())).await);
    }
    let body = read(body, app.bounds).await?;
    let message = match serde_json::from_slice::<Value>(&body) {
        Ok(message @ Value::Object(_)) => message,
        Ok(_) => return Ok(refuse(-32600, "a message is one object; batches are not taken")),
        Err(error) => return Ok(refuse(-32700, &format!("the body is not JSON: {error}"))),
    };
    // What has other types there is told so by the reader of the whole message.
    let peek = Peek::deserialize(&message).ok();
    let method = peek.as_ref().and_then(|peek| peek.method.as_deref()).unwrap_or_default();
    let client = client_of(&head.headers);
    let of_client = |id: Option<&Value>| Some(CallKey::of(&who, client.as_deref()?, id?));
    if method == "notifications/cancelled" {
        let id = peek.as_ref().and_then(|peek| peek.params.as_ref()?.request_id.as_ref());
        of_client(id).into_iter().for_each(|key| mcp.calls.cancel(&key));
    }
    // An answer of a client has the id of who has asked it.
    let id = peek.as_ref().filter(|peek| peek.method.is_some()).and_then(|peek| peek.id.as_ref());
    let call = match of_client(id).map(|key| mcp.calls.begin(key)) {
        // Two answers with one id could not be told apart, nor could one of them be taken back.
        Some(None) => return Ok(refuse_id(id, -32600, "a request with this id is under way; take another id")),
        Some(begun) => begun,
        None => None,
    };
    let bound = client.as_deref().map(bound_name);
    let pin = pin_of(&head.headers, &head.uri);
    head.extensions.insert(Asked { who, trail: trail::current(), pin, bound, call });
    let is_greeting = method == "initialize";
    let mut response = serve(&app, &mcp, Request::from_parts(head, Body::from(body))).await;
    if is_greeting && response.status() == StatusCode::OK {
        // Letters, digits and dashes: it is a header's value.
        if let Ok(name) = HeaderValue::from_str(&Uuid::new_v4().to_string()) {
            response.headers_mut().entry(MCP_SESSION).or_insert(name);
        }
    }
    Ok(response)
}

/// Refuses a page that has this server under a name of its own: a name that points here only since a while ago is one's own to a browser. Pages under addresses, and
/// under names that the configuration lists, are what they say.
fn check_page(app: &App, mcp: &Mcp, head: &Parts) -> Result<(), Problem> {
    let Some(origin) = head.headers.get(header::ORIGIN) else { return Ok(()) };
    let host = head.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let host = host.or_else(|| head.uri.authority().map(Authority::as_str)).unwrap_or_default();
    // Those that are listed, `rmcp` holds it to.
    if !mcp.hosts.is_empty() || app.origins.lists(origin) || is_no_name(host) {
        return Ok(());
    }
    let detail = "pages under this name may not use this server; doors.mcp_hosts lists the names of its own, server.cors_origins other pages";
    Err(Problem::new(problem::FORBIDDEN, detail))
}

/// Whether a host, with its port or without, is an address, or this machine's own name: nobody can have it point elsewhere.
fn is_no_name(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let host = authority.host().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
}

/// Has the message read, and answered by what stands behind the door.
async fn serve(app: &App, mcp: &Mcp, request: Request) -> Response {
    // Origins are checked before any door, by the server's own rules; a body was bounded when it was read.
    let config = StreamableHttpServerConfig::default()
        .with_legacy_session_mode(false)
        .with_json_response(true)
        .with_sse_retry(None)
        .with_allowed_hosts(mcp.hosts.iter().cloned())
        .with_max_request_body_bytes(app.bounds.body);
    (mcp.behind)(Arc::clone(&app.service), config, request).await
}

/// A message that is none, in this protocol's form.
fn refuse(code: i32, message: &str) -> Response {
    refuse_id(None, code, message)
}

/// A refusal of the request with this id, in this protocol's form.
fn refuse_id(id: Option<&Value>, code: i32, message: &str) -> Response {
    let body = json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}}).to_string();
    (StatusCode::BAD_REQUEST, [(header::CONTENT_TYPE, "application/json")], Bytes::from(body)).into_response()
}

/// The name that an old client gives back.
fn client_of(headers: &HeaderMap) -> Option<String> {
    let name = headers.get(MCP_SESSION)?.to_str().ok()?;
    (1..=MAX_NAME).contains(&name.len()).then(|| name.to_owned())
}

/// The name of the session that a client works in: no more can be learnt from it than that it is one's own.
fn bound_name(client: &str) -> String {
    let digest = Sha256::digest(client.as_bytes());
    digest[..10].iter().fold("mcp-".to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// The session that a header, or `?session=`, names for all calls.
fn pin_of(headers: &HeaderMap, uri: &Uri) -> Option<String> {
    let pair = |pair: &str| pair.strip_prefix("session=").map(str::to_owned);
    let in_query = || uri.query()?.split('&').find_map(pair);
    headers
        .get(PIN)
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned)
        .or_else(in_query)
        .filter(|p| !p.is_empty())
}

/// Requests of old clients that are under way, so that they can be taken back by a message of their own. No more than the server answers at once.
#[derive(Debug, Clone, Default)]
struct Calls(Arc<Mutex<HashMap<CallKey, CancellationToken>>>);

/// Which call: nobody can name one of somebody else's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct CallKey {
    tenant: Arc<str>,
    key: Option<KeyId>,
    client: String,
    id: String,
}

impl CallKey {
    fn of(who: &Principal, client: &str, id: &Value) -> Self {
        Self { tenant: Arc::clone(&who.tenant), key: who.key, client: client.to_owned(), id: id.to_string() }
    }
}

/// A call that is under way for as long as this lives.
#[derive(Debug)]
struct UnderWay {
    calls: Calls,
    key: CallKey,
    cancelled: CancellationToken,
}

impl Calls {
    /// Begins a call, if there is none of that id.
    fn begin(&self, key: CallKey) -> Option<Arc<UnderWay>> {
        let cancelled = CancellationToken::new();
        match self.lock().entry(key.clone()) {
            Entry::Occupied(_) => return None,
            Entry::Vacant(entry) => entry.insert(cancelled.clone()),
        };
        Some(Arc::new(UnderWay { calls: self.clone(), key, cancelled }))
    }

    fn cancel(&self, key: &CallKey) {
        if let Some(cancelled) = self.lock().get(key) {
            cancelled.cancel();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<CallKey, CancellationToken>> {
        // Every change is a single call, so a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.calls.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::keys::Scope;

    #[test]
    fn a_call_is_taken_back_by_its_own_client_only_and_is_forgotten_with_its_end() {
        let calls = Calls::default();
        let who = |tenant: &str| Principal::new(tenant, [Scope::Sessions]);
        let key = |tenant: &str, client: &str, id: Value| CallKey::of(&who(tenant), client, &id);
        let call = calls.begin(key("one", "c", json!(7))).unwrap();
        assert!(calls.begin(key("one", "c", json!(7))).is_none(), "two of one id");
        for other in [key("two", "c", json!(7)), key("one", "d", json!(7)), key("one", "c", json!("7"))] {
            calls.cancel(&other);
            assert!(!call.cancelled.is_cancelled(), "{other:?}");
        }
        calls.cancel(&key("one", "c", json!(7)));
        assert!(call.cancelled.is_cancelled());
        drop(call);
        assert!(calls.lock().is_empty());
    }

    #[test]
    fn only_addresses_and_this_machine_are_no_names() {
        for host in ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "192.0.2.1"] {
            assert!(is_no_name(host), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example:8080", "", "localhost.evil.example", "a b"] {
            assert!(!is_no_name(host), "{host}");
        }
    }

    #[test]
    fn a_session_is_pinned_by_a_header_first() {
        let uri: Uri = "/mcp?x=1&session=chat".parse().unwrap();
        let mut headers = HeaderMap::new();
        assert_eq!(pin_of(&headers, &uri).as_deref(), Some("chat"));
        assert_eq!(pin_of(&headers, &"/mcp?session=".parse().unwrap()), None);
        headers.insert(PIN, HeaderValue::from_static("other"));
        assert_eq!(pin_of(&headers, &uri).as_deref(), Some("other"));
    }
}
