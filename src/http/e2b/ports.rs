//! What code in a sandbox serves on its ports, asked as E2B's proxy is asked. Passed on as the native API does it: see [`v1::ports`](crate::http::v1::ports).

use axum::Router;
use axum::extract::{FromRequestParts, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;

use super::error::{Refusal, of_sandbox};
use super::sandbox::{ByTrafficToken, Sandbox, TRAFFIC_TOKEN};
use super::way::{PORT, PORTS, SANDBOX};
use crate::http::App;
use crate::http::v1::ports::{self, Unpassed};
use crate::service::Error;

pub(super) fn routes() -> Router<App> {
    // A nested router would not have what ends with the prefix and a slash.
    Router::new().route(&format!("{PORTS}/"), any(ask)).route(&format!("{PORTS}/{{*rest}}"), any(ask))
}

async fn ask(State(app): State<App>, request: Request) -> Result<Response, Refusal> {
    let (mut head, body) = request.into_parts();
    let ByTrafficToken(sandbox) = ByTrafficToken::from_request_parts(&mut head, &app).await?;
    // None of it is for the code.
    for name in [&TRAFFIC_TOKEN, &SANDBOX, &PORT] {
        head.headers.remove(name);
    }
    let Sandbox { who, session, port, .. } = &sandbox;
    let path = head.uri.path().strip_prefix(PORTS).filter(|rest| rest.starts_with('/')).unwrap_or("/").to_owned();
    let target = ports::Target::own_host(session.id, *port, path);
    let passed = ports::pass(&app, who, target, Request::from_parts(head, body)).await;
    passed.map(IntoResponse::into_response).map_err(|unpassed| match unpassed {
        Unpassed::Refused(Error::PortClosed(port)) => Refusal::port_closed(session.id, port),
        Unpassed::Refused(error) => of_sandbox(error, session.id, Refusal::of_interpreter),
        Unpassed::Problem(problem) => Refusal::of_interpreter(problem),
    })
}
