//! Which session a call is about when its arguments leave it open: that which the client pins, that which an old client works in, or a new one.

use super::call::Call;
use crate::domain::ids::SessionId;
use crate::domain::lifecycle::EndReason;
use crate::domain::spec::SessionRequest;
use crate::http::problem::Problem;
use crate::service::{Error, trail};
use crate::session::Session;
use crate::session::registry::Created;

/// A session, and how it came to the call.
pub(super) struct Bound {
    /// The session.
    pub session: Session,
    /// It was made for this call, and nobody will find it who is not told its id.
    pub is_unnamed: bool,
}

/// The session of a call. One is made if there is none yet.
///
/// # Errors
/// There is none of that id, or none can be made.
pub(super) async fn session_for(call: &Call, named: Option<&str>) -> Result<Bound, Problem> {
    let asked = &call.asked;
    if let Some(named) = named {
        return Ok(Bound { session: find(call, named)?, is_unnamed: false });
    }
    let name = match &asked.pin {
        Some(pin) if pin.parse::<SessionId>().is_ok() => {
            return Ok(Bound { session: find(call, pin)?, is_unnamed: false });
        }
        Some(pin) => Some(pin.clone()),
        None => asked.bound.clone(),
    };
    let is_unnamed = name.is_none();
    let request = SessionRequest { reuse: name.is_some(), name, ..SessionRequest::default() };
    let created = call.service.create_session(&asked.who, &request, true, None).await?;
    let (Created::New(session) | Created::Reused(session)) = created;
    Ok(Bound { session, is_unnamed })
}

/// A session by its id.
///
/// # Errors
/// There is none.
pub(super) fn find(call: &Call, id: &str) -> Result<Session, Problem> {
    let id = id.parse::<SessionId>().map_err(|_| Error::NotFound("session"))?;
    Ok(call.service.session(&call.asked.who, id)?)
}

/// Makes a session that was asked for. The first one without a name becomes the one that an old client works in.
///
/// # Errors
/// None can be made.
pub(super) async fn create(call: &Call, request: &SessionRequest) -> Result<Session, Problem> {
    let asked = &call.asked;
    trail::note_action("create_session");
    if let (None, Some(bound)) = (&request.name, &asked.bound) {
        let own = SessionRequest { name: Some(bound.clone()), ..request.clone() };
        match call.service.create_session(&asked.who, &own, true, None).await {
            Err(Error::NameInUse(_)) => {}
            other => return Ok(session_of(other?)),
        }
    }
    Ok(session_of(call.service.create_session(&asked.who, request, true, None).await?))
}

fn session_of(created: Created) -> Session {
    let (Created::New(session) | Created::Reused(session)) = created;
    session
}

impl Bound {
    /// Its caller has left before it heard of the session: nobody else will use it.
    pub fn leave(&self) {
        if self.is_unnamed {
            self.session.end(EndReason::Deleted);
        }
    }
}
