//! The door for programs written for E2B, which move by environment variables: its control API, and behind it what its sandboxes answer. Its routes in one place, and
//! what is audited of them. `docs/E2B.md` has the wire, and what is otherwise here.
//!
//! A sandbox is a session, and nothing is behind this that the native API has not got. Whose a request is and which part it is for is told in [`way`] (before any
//! route) and `sandbox`; how refusals are written in `error`; how RPCs are framed in `connect`; what a refused request still sends in `leftover`. Each part is a room of its own:
//!
//! | part | is asked by | who may | room |
//! |---|---|---|---|
//! | control API | `/sandboxes…`, `/v2/…`, `/templates…`, `/snapshots…`, below `/e2b/api` too; host `api.<domain>` | a key (`X-API-KEY`) | `control` |
//! | agent (envd) | port 49983 | its agent token (`X-Access-Token`) | `envd` |
//! | code interpreter | port 49999 | its traffic token | `interpreter` |
//! | what code serves | any other port | its traffic token | `ports` |
//!
//! **Where a sandbox's home is.** E2B's programs take `/home/user` for home and working folder, and write it into code and paths alike. So it is one: a template has a
//! `workdir`, which is mounted there, is `HOME`, and is where everything starts; the template `e2b`, which the names `base` and `code-interpreter-v1` stand for, has
//! `/home/user`, and an image in which whatever uid a session has is called `user`. Nothing is rewritten, in code or in answers. A template with another `workdir`
//! works too, with another home.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::any;

use super::problem::{self, Problem};
use super::{App, Bounds};

mod connect;
mod control;
mod envd;
pub mod error;
mod interpreter;
mod leftover;
mod ports;
mod sandbox;
pub mod way;

use error::Refusal;

/// What this door works with.
#[derive(Debug, Clone, Default)]
pub struct E2b {
    /// The domain whose hosts are the API and sandboxes; clients are told of it.
    pub domain: Option<Arc<str>>,
    /// Templates by the names that clients have for them.
    pub templates: Arc<BTreeMap<String, String>>,
}

impl E2b {
    /// The template that a client means.
    fn template<'a>(&'a self, name: &'a str) -> &'a str {
        self.templates.get(name).map_or(name, String::as_str)
    }
}

/// All routes, wherever they are.
pub(super) fn routes(bounds: Bounds) -> Router<App> {
    Router::new()
        .merge(control::routes())
        .nest(way::CONTROL, control::routes().route("/{*rest}", any(nothing_there)))
        .nest(way::AGENT, envd::routes())
        .merge(envd::signed_routes())
        .nest(way::INTERPRETER, interpreter::routes())
        .merge(ports::routes())
        // Nested routers do not have what ends with their prefix and a slash.
        .route(&format!("{}/", way::CONTROL), any(nothing_there))
        .route(&format!("{}/", way::AGENT), any(envd::nothing_there))
        .route(&format!("{}/", way::INTERPRETER), any(interpreter::nothing_there))
        .route(&format!("{}/", way::SANDBOXES), any(async || sandbox::no_aim()))
        .route(&format!("{}/{{*rest}}", way::SANDBOXES), any(async || sandbox::no_aim()))
        .layer(middleware::from_fn(say_whether_to_retry))
        .layer(middleware::from_fn_with_state(bounds, leftover::take))
}

/// Requests that change something: method, route and what is done.
pub(super) fn changes() -> impl Iterator<Item = (Method, String, &'static str)> {
    let control = ["", way::CONTROL].into_iter().flat_map(|place| below(place, &control::CHANGES));
    let agent = below(way::AGENT, &envd::CHANGES).chain(below("", &envd::SIGNED_CHANGES));
    control.chain(agent).chain(below(way::INTERPRETER, &interpreter::CHANGES))
}

/// Something that a request changes: method, route below its part, and what is done.
type Change = (Method, &'static str, &'static str);

fn below(place: &str, changes: &[Change]) -> impl Iterator<Item = (Method, String, &'static str)> {
    changes.iter().map(move |(method, route, action)| (method.clone(), format!("{place}{route}"), *action))
}

async fn nothing_there() -> Refusal {
    let detail = "there is no such path in this server's E2B API; docs/E2B.md lists all";
    Refusal::of_control(Problem::new(problem::NOT_FOUND, detail))
}

/// Keeps clients from sending again by themselves what may have begun: left alone they do that with each 429, 502, 503 and 504, whatever it was.
async fn say_whether_to_retry(request: Request, next: Next) -> Response {
    let is_idempotent = request.method().is_idempotent();
    let mut response = next.run(request).await;
    let status = response.status();
    let is_tempting = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
    let begins_nothing = || response.extensions().get::<Arc<Problem>>().is_some_and(|p| error::begins_nothing(p));
    if is_tempting && !is_idempotent && !begins_nothing() {
        response.headers_mut().insert(error::SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How a client is told whether to send again by itself what was answered so.
    async fn told(method: Method, problem: Problem) -> Option<String> {
        let router = Router::<()>::new()
            .route("/", any(async move || Refusal::of_control(problem)))
            .layer(middleware::from_fn(say_whether_to_retry));
        let request = Request::builder().method(method).uri("/").body(axum::body::Body::empty()).unwrap();
        let answer = tower_service::Service::call(&mut router.clone(), request).await.unwrap();
        answer.headers().get(error::SHOULD_RETRY).map(|value| value.to_str().unwrap().to_owned())
    }

    #[tokio::test]
    async fn clients_send_again_by_themselves_what_has_begun_nothing() {
        let of = |kind| Problem::new(kind, "no");
        let no = Some("false".to_owned());
        for kind in [problem::INTERNAL, problem::GUEST_UNREACHABLE, problem::QUOTA_EXCEEDED, problem::NOT_IMPLEMENTED] {
            assert_eq!(told(Method::POST, of(kind)).await, no, "{kind:?}");
            assert_eq!(told(Method::GET, of(kind)).await, None, "{kind:?}");
        }
        for kind in [problem::AT_CAPACITY, problem::RATE_LIMITED, problem::NOT_FOUND] {
            assert_eq!(told(Method::POST, of(kind)).await, None, "{kind:?}");
        }
    }

    #[test]
    fn names_of_templates_are_what_the_configuration_says_or_their_own() {
        let templates = BTreeMap::from([("base".to_owned(), "e2b".to_owned())]);
        let door = E2b { domain: None, templates: Arc::new(templates) };
        assert_eq!((door.template("base"), door.template("data")), ("e2b", "data"));
    }

    #[test]
    fn what_changes_something_is_named_at_each_of_its_places() {
        let changes: Vec<_> = changes().collect();
        for (method, route, action) in [
            (Method::POST, "/v2/sandboxes", "create_session"),
            (Method::POST, "/e2b/api/v2/sandboxes", "create_session"),
            (Method::DELETE, "/sandboxes/{id}", "delete_session"),
            (Method::POST, "/files", "write_file"),
            (Method::POST, "/e2b/envd/process.Process/Start", "create_command"),
            (Method::POST, "/e2b/interpreter/execute", "create_execution"),
        ] {
            assert!(changes.contains(&(method, route.to_owned(), action)), "{route}");
        }
    }
}
