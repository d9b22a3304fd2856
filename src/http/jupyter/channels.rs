//! Opening a connection to a kernel's channels: all that can be refused is refused here, before there is one.

use axum::extract::Request;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::response::Response;

use super::asking::{Asking, Named, Refusal, kernel_missing, redacted};
use super::codec::{Form, V1};
use super::kernels;
use super::talk::{Talk, talk};
use crate::http::extract::Params;
use crate::http::listen::Held;
use crate::http::problem::{self, Problem};
use crate::http::remote::Remote;

/// Longest name that a client gives itself.
const MAX_NAME: usize = 256;

/// Opens a WebSocket to a kernel.
pub(super) async fn open_channels(
    asking: Asking,
    Named(id): Named,
    params: Params,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    request: Request,
) -> Result<Response, Refusal> {
    if !asking.app.origins.may_change(request.headers(), request.uri()) {
        let detail = "pages of this origin may not use this server; server.cors_origins lists those that may";
        return Err(Problem::new(problem::FORBIDDEN, detail).into());
    }
    let session = kernels::find(&asking, &id)?;
    asking.who.require_sessions()?;
    let upgrade = upgrade.map_err(|_| Refusal::malformed("Can \"Upgrade\" only to \"WebSocket\"."))?;
    let Some(bounds) = asking.app.jupyter else { return Err(kernel_missing(&id)) };
    let full = |what: &str, most| {
        Problem::new(problem::RATE_LIMITED, format!("{what} has {most} connections, as many as it may; close some"))
    };
    let place = asking.app.sockets.take(&asking.who.tenant, bounds.of_tenant);
    let place = place.ok_or_else(|| full("the tenant", bounds.of_tenant))?;
    let name = params.get("session_id").filter(|name| (1..=MAX_NAME).contains(&name.len()));
    let listener = asking.app.service.listen(&asking.who, session.id, name, bounds.of_session)?;
    let listener = listener.ok_or_else(|| full("the kernel", bounds.of_session))?;
    let upgrade = upgrade.protocols([V1]).max_message_size(bounds.message).max_frame_size(bounds.message);
    let is_v1 = upgrade.selected_protocol().is_some();
    let talking = Talk {
        form: if is_v1 { Form::V1 } else { Form::Default },
        asker: listener.asker.clone(),
        address: request.extensions().get::<Remote>().map(|Remote(address)| *address),
        path: redacted(&format!("{}/api/kernels/{id}/channels", asking.base)),
        asking,
        session,
    };
    let held = Held::by(request.extensions());
    Ok(upgrade.on_upgrade(move |socket| async move {
        let sockets = talking.asking.app.sockets.clone();
        sockets.serve(talk(talking, listener, socket)).await;
        drop((place, held));
    }))
}
