//! From a request to whose it is: the key of the control API, and the tokens of sandboxes. A sandbox is a session, whichever door it came by.
//!
//! What E2B keeps with a sandbox and a session has no field for stands in labels, as the Jupyter door's documents do.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName};

use super::error::Refusal;
use super::way::{AGENT_PORT, Aim};
use crate::domain::ids::SessionId;
use crate::domain::lifecycle::Phase;
use crate::http::App;
use crate::http::extract::Caller;
use crate::http::problem::{self, Problem};
use crate::http::rate::Slot;
use crate::service::bearer::Purpose;
use crate::service::keys::Principal;
use crate::service::trail;
use crate::session::{Session, Snapshot};

/// Label: the template as its creator named it.
pub(super) const LABEL_TEMPLATE: &str = "e2b.template";
/// Label, `true`: what is asked of it while it is paused resumes it.
pub(super) const LABEL_AUTO_RESUME: &str = "e2b.auto-resume";
/// The agent's token.
pub(super) const ACCESS_TOKEN: HeaderName = HeaderName::from_static("x-access-token");
/// The token for everything else that a sandbox serves.
pub(super) const TRAFFIC_TOKEN: HeaderName = HeaderName::from_static("e2b-traffic-access-token");

/// Who asks the control API.
pub(super) struct Account {
    pub(super) app: App,
    pub(super) who: Principal,
}

impl FromRequestParts<App> for Account {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let Caller(who) = Caller::from_request_parts(parts, app).await.map_err(Refusal::of_control)?;
        Ok(Self { app: app.clone(), who })
    }
}

/// A sandbox that is asked for, and runs; who asks is not known yet.
pub(super) struct Aimed {
    pub(super) app: App,
    pub(super) session: Session,
    pub(super) aim: Aim,
}

impl FromRequestParts<App> for Aimed {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let aim = parts.extensions.get::<Aim>().cloned().ok_or_else(no_aim)?;
        let id = aim.sandbox.parse::<SessionId>().ok();
        let session = id.and_then(|id| app.service.untold_session(id)).filter(is_there);
        let session = session.ok_or_else(|| Refusal::sandbox_missing(id))?;
        Ok(Self { app: app.clone(), session, aim })
    }
}

impl Aimed {
    /// One that was found by whose token has signed a request; nothing if it does not run.
    pub(super) fn signed(app: &App, session: Session) -> Result<Self, Refusal> {
        let aim = Aim { sandbox: session.id.to_string(), port: AGENT_PORT };
        let refusal = Refusal::sandbox_missing(Some(session.id));
        if is_there(&session) { Ok(Self { app: app.clone(), session, aim }) } else { Err(refusal) }
    }

    /// The same once a token was shown. `Err` is for its room to put into words.
    fn opened_by(self, parts: &Parts, purpose: Purpose, header: &HeaderName) -> Result<Sandbox, Problem> {
        let token = one(&parts.headers, header);
        let who = token.and_then(|token| self.app.service.bearer(&self.session, purpose, token));
        let Some(who) = who else {
            let detail = format!(
                "the header {header} does not hold the token that this sandbox's create or connect answered with"
            );
            return Err(unknown(&self.app, parts, parts.headers.contains_key(header), detail));
        };
        self.known(parts, who)
    }

    /// The same for somebody who is known otherwise.
    pub(super) fn known(self, parts: &Parts, who: Principal) -> Result<Sandbox, Problem> {
        let Self { app, session, aim } = self;
        trail::note_caller(&who);
        if let (Some(state), Some(slot)) = (app.service.request(&who)?, parts.extensions.get::<Slot>()) {
            // A request is read once.
            let _ = slot.set(state.into());
        }
        // Notes it for the audit, and looks once more whether it is theirs.
        let session = app.service.session(&who, session.id)?;
        Ok(Sandbox { app, who, session, port: aim.port })
    }
}

/// Why somebody is nobody. It counts as a key that was tried, if one was.
pub(super) fn unknown(app: &App, parts: &Parts, is_guess: bool, detail: impl Into<String>) -> Problem {
    let refused = app.door.admit_key(parts, None, is_guess).err();
    let refused = refused.unwrap_or_else(|| Problem::new(problem::UNAUTHENTICATED, ""));
    match refused.code {
        "unauthenticated" => Problem { detail: detail.into(), ..refused },
        _ => refused,
    }
}

/// A sandbox that runs, or did a moment ago, and somebody who may work with it.
#[derive(Clone)]
pub(super) struct Sandbox {
    pub(super) app: App,
    pub(super) who: Principal,
    pub(super) session: Session,
    pub(super) port: u16,
}

impl Sandbox {
    pub(super) fn id(&self) -> SessionId {
        self.session.id
    }

    /// Waits until it does not run any more: it is ending, or paused. Answers that are still being made are broken off then, for clients tell such an end from
    /// an orderly one, and ask whether the sandbox is there.
    pub(super) fn gone(&self) -> impl Future<Output = ()> + Send + 'static {
        let session = self.session.clone();
        async move {
            session.wait_for(|snapshot| !runs(snapshot)).await;
        }
    }
}

async fn by_agent_token(
    parts: &mut Parts,
    app: &App,
    refusal: impl FnOnce(Problem) -> Refusal,
) -> Result<Sandbox, Refusal> {
    let aimed = Aimed::from_request_parts(parts, app).await?;
    let id = aimed.session.id;
    aimed.opened_by(parts, Purpose::Agent, &ACCESS_TOKEN).map_err(|problem| gone_or(problem, id, refusal))
}

/// A sandbox by its agent's token: files outside of RPC. Refused in the agent's words.
pub(super) struct ByAgentToken(pub(super) Sandbox);

impl FromRequestParts<App> for ByAgentToken {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        by_agent_token(parts, app, Refusal::of_agent).await.map(Self)
    }
}

/// The same for RPCs. A refusal is an answer with a status, for streams too: they have not begun.
pub(super) struct ForRpc(pub(super) Sandbox);

impl FromRequestParts<App> for ForRpc {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        by_agent_token(parts, app, Refusal::of_rpc).await.map(Self)
    }
}

/// A sandbox by its traffic token: its code interpreter, and what code in it serves.
pub(super) struct ByTrafficToken(pub(super) Sandbox);

impl FromRequestParts<App> for ByTrafficToken {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Refusal> {
        let aimed = Aimed::from_request_parts(parts, app).await?;
        let id = aimed.session.id;
        let opened = aimed.opened_by(parts, Purpose::Traffic, &TRAFFIC_TOKEN);
        opened.map(Self).map_err(|problem| {
            // As E2B's proxy has it.
            let is_unknown = problem.code == problem::UNAUTHENTICATED.word();
            let refusal = gone_or(problem, id, Refusal::of_interpreter);
            if is_unknown { refusal.with_status(axum::http::StatusCode::FORBIDDEN) } else { refusal }
        })
    }
}

pub(super) fn gone_or(problem: Problem, id: SessionId, otherwise: impl FnOnce(Problem) -> Refusal) -> Refusal {
    match problem.code {
        "not-found" | "session-ended" => Refusal::sandbox_missing(Some(id)),
        _ => otherwise(problem),
    }
}

/// Why a request for a sandbox is none.
pub(super) fn no_aim() -> Refusal {
    let detail = "name the sandbox by the headers E2b-Sandbox-Id and E2b-Sandbox-Port, both of them and each once";
    Refusal::of_control(Problem::new(problem::INVALID_REQUEST, detail))
}

/// Whether a sandbox is one to whoever is outside: it runs, or is made to by being asked.
fn is_there(session: &Session) -> bool {
    let snapshot = session.snapshot();
    let resumes = snapshot.attributes.labels.get(LABEL_AUTO_RESUME).is_some_and(|value| value == "true");
    runs(&snapshot) || (resumes && matches!(snapshot.phase, Phase::Pausing | Phase::Paused))
}

fn runs(snapshot: &Snapshot) -> bool {
    match snapshot.phase {
        Phase::Provisioning | Phase::Connecting | Phase::Ready | Phase::Resuming | Phase::Replacing => true,
        Phase::Pausing | Phase::Paused | Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_) => false,
    }
}

/// A header's value if it is there once.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())?.to_str().ok()
}
