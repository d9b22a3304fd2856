//! E2B's control API: sandboxes made, found, changed and ended. Its routes, and whose sandbox a request names; what each does stands beside it.

use axum::Router;
use axum::extract::FromRequestParts;
use axum::http::Method;
use axum::http::request::Parts;
use axum::routing::{MethodRouter, any, delete, get, post, put};

use super::error::Refusal;
use super::sandbox::Account;
use super::{Change, nothing_there};
use crate::domain::ids::SessionId;
use crate::domain::lifecycle::Phase;
use crate::http::App;
use crate::http::extract::Id;
use crate::http::problem::{self, Problem};
use crate::service::keys::Principal;
use crate::session::Session;

mod create;
mod life;
mod list;
mod metrics;
mod network;
mod view;

/// What changes something here, and what that is to the audit.
pub(super) const CHANGES: [Change; 12] = [
    (Method::POST, "/sandboxes", "create_session"),
    (Method::POST, "/v2/sandboxes", "create_session"),
    (Method::POST, "/sandboxes/{id}/connect", "resume_session"),
    (Method::POST, "/v2/sandboxes/{id}/connect", "resume_session"),
    (Method::POST, "/sandboxes/{id}/resume", "resume_session"),
    (Method::DELETE, "/sandboxes/{id}", "delete_session"),
    (Method::POST, "/sandboxes/{id}/timeout", "patch_session"),
    (Method::POST, "/sandboxes/{id}/pause", "pause_session"),
    (Method::PUT, "/sandboxes/{id}/network", "patch_session"),
    (Method::POST, "/sandboxes/{id}/snapshots", "create_snapshot"),
    (Method::POST, "/sandboxes/{id}/fork", "fork_session"),
    (Method::DELETE, "/templates/{id}", "delete_snapshot"),
];

/// What a container can't do, and what is done instead.
const NO_COPIES: &str = "a sandbox here is a container, whose memory and processes can't be copied: neither snapshots nor forks are offered. Pause a sandbox to go on with it \
                         later, or take its files along (docs/E2B.md)";
const NO_BUILDS: &str =
    "templates are written by this server's operator, and none is built, changed or deleted by this API (docs/E2B.md)";
const NO_VOLUMES: &str = "this server has neither volumes nor secrets for E2B's clients; its native API has workspaces, which outlive sessions";

/// The routes, without the prefix that they have in one of their two places.
pub(super) fn routes() -> Router<App> {
    let routes: [(&str, MethodRouter<App>); 13] = [
        ("/sandboxes", get(list::running).post(create::create)),
        ("/v2/sandboxes", get(list::page).post(create::create_secured)),
        ("/sandboxes/{id}", get(view::get_one).delete(life::kill)),
        ("/sandboxes/{id}/connect", post(life::connect)),
        ("/v2/sandboxes/{id}/connect", post(life::connect)),
        ("/sandboxes/{id}/resume", post(life::resume)),
        ("/sandboxes/{id}/timeout", post(life::set_timeout)),
        ("/sandboxes/{id}/pause", post(life::pause)),
        ("/sandboxes/{id}/metrics", get(metrics::get_metrics)),
        ("/sandboxes/{id}/network", put(network::update)),
        ("/sandboxes/{id}/snapshots", post(async |_: Named| not_offered(NO_COPIES))),
        ("/sandboxes/{id}/fork", post(async |_: Named| not_offered(NO_COPIES))),
        ("/snapshots", get(async |_: Account| not_offered(NO_COPIES))),
    ];
    let with = |router: Router<App>, (path, methods): (&str, MethodRouter<App>)| {
        router.route(path, methods.fallback(no_method))
    };
    let routes = routes.into_iter().fold(Router::new(), with);
    // Where a snapshot is deleted, since clients take one for a template.
    let routes = routes.route("/templates/{id}", delete(async |_: Account| not_offered(NO_COPIES)).fallback(no_builds));
    let builds = ["/templates", "/templates/{id}/{*rest}", "/v2/templates", "/v2/templates/{*rest}"];
    let builds = builds.into_iter().chain(["/v3/templates", "/v3/templates/{*rest}"]);
    let routes = builds.fold(routes, |router, path| router.route(path, any(no_builds)));
    let volumes = ["/volumes", "/volumes/{*rest}", "/secrets", "/secrets/{*rest}"];
    let routes = volumes
        .into_iter()
        .fold(routes, |router, path| router.route(path, any(async |_: Account| not_offered(NO_VOLUMES))));
    // What else clients of E2B may ask for, so that they are told in words that they know.
    let others = ["/sandboxes/{id}/{*rest}", "/v2/{*rest}", "/v3/{*rest}"];
    others.into_iter().fold(routes, |router, path| router.route(path, any(nothing_there)))
}

async fn no_method() -> Refusal {
    Refusal::of_control(Problem::new(problem::METHOD_NOT_ALLOWED, "the path does not know this method"))
}

async fn no_builds(_: Account) -> Refusal {
    not_offered(NO_BUILDS)
}

fn not_offered(why: &str) -> Refusal {
    Refusal::of_control(Problem::new(problem::NOT_IMPLEMENTED, why))
}

/// A sandbox that a path names: one of whoever asks, and not over.
struct Named {
    app: App,
    who: Principal,
    session: Session,
}

impl FromRequestParts<App> for Named {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let Account { app, who } = Account::from_request_parts(parts, app).await?;
        let id = Id::<SessionId>::from_request_parts(parts, &app).await;
        let session = match id {
            Ok(Id(id)) => Some(app.service.session(&who, id)),
            Err(_) => None,
        };
        match session {
            Some(Ok(session)) if !session.is_over() => Ok(Self { app, who, session }),
            Some(Err(error)) if !matches!(error, crate::service::Error::NotFound(_)) => Err(Refusal::of_control(error)),
            _ => Err(missing("there is no such sandbox, or it has ended")),
        }
    }
}

fn missing(detail: &str) -> Refusal {
    Refusal::of_control(Problem::new(problem::NOT_FOUND, detail))
}

/// Whether a sandbox is paused, or about to be, to whoever is outside.
fn rests(session: &Session) -> bool {
    matches!(session.phase(), Phase::Pausing | Phase::Paused)
}

/// A refusal whose fields have the names that clients of E2B have for them.
fn in_their_words(problem: impl Into<Problem>, names: &[(&str, &str)]) -> Refusal {
    let mut problem: Problem = problem.into();
    for field in &mut problem.errors {
        let theirs = names.iter().find_map(|(ours, theirs)| {
            let rest = field.pointer.strip_prefix(ours)?;
            (rest.is_empty() || rest.starts_with('/')).then(|| format!("{theirs}{rest}"))
        });
        field.pointer = theirs.unwrap_or_else(|| std::mem::take(&mut field.pointer));
    }
    Refusal::of_control(problem)
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;
    use crate::domain::spec::FieldError;
    use crate::service::Error;

    #[tokio::test]
    async fn fields_have_the_names_that_clients_know() {
        let fields =
            ["/network/allow/0", "/env/1x", "/environment", "/network"].map(|field| FieldError::new(field, "no"));
        let names = [("/network/allow", "/network/allowOut"), ("/env", "/envVars")];
        let refused = in_their_words(Error::SpecRejected(fields.to_vec()), &names).into_response();
        assert_eq!(refused.status(), 400);
        let body = axum::body::to_bytes(refused.into_body(), 4096).await.unwrap();
        let body = String::from_utf8(body.to_vec()).unwrap();
        for told in ["/network/allowOut/0: no", "/envVars/1x: no", "/environment: no", "/network: no"] {
            assert!(body.contains(told), "{told}: {body}");
        }
    }
}
