//! Sessions by their user: started, found, reset and ended. Decides nothing that the service decides.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::http::HeaderName;
use axum::response::{IntoResponse, Response};
use cellblock_wire::link::escape_path;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::asking::{Asking, Refusal, User};
use super::body::UserForm;
use crate::domain::lifecycle::{EndReason, Phase};
use crate::domain::spec::SessionRequest;
use crate::http::extract::Answer;
use crate::http::problem::{self, Problem};
use crate::service::{Error, Filter};
use crate::session::Session;
use crate::session::registry::Created;

/// The label of a session with its user, where the user's name can stand in one.
const USER_LABEL: &str = "classic.user_id";
/// Tells the id of a session that was started: with it the native API knows the session, and its notebook is found when its user is forgotten.
const SESSION: HeaderName = HeaderName::from_static("x-cellblock-session");
/// How often a start looks again whose session was ended by another one of the same user, or had its name taken by that.
const TRIES: usize = 20;
/// And for how long another try may begin.
const TRYING: Duration = Duration::from_secs(60);

/// The name of a user's session. Any text is a user; a name is short, and of few characters.
pub(super) fn name_of(user: &User) -> String {
    let digest = Sha256::digest(user.0.as_bytes());
    digest[..20].iter().fold("classic-".to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// Where a user's notebook is, below the client's base URL.
fn notebook_path(user: &User) -> String {
    let id = escape_path(&user.0).replace('/', "%2F");
    format!("/notebook/{id}/notebook_{id}.ipynb")
}

/// All sessions of a user, the newest last.
pub(super) fn all(asking: &Asking, user: &User) -> Result<Vec<Session>, Refusal> {
    let filter = Filter { name: Some(name_of(user)), ..Filter::default() };
    Ok(asking.app.service.list_sessions(&asking.who, &filter, None)?)
}

fn find(asking: &Asking, user: &User) -> Result<Option<Session>, Refusal> {
    Ok(all(asking, user)?.into_iter().find(|session| !session.is_over()))
}

/// The session of a user, once it is ready.
///
/// # Errors
/// There is none.
pub(super) async fn ready(asking: &Asking, user: &User) -> Result<Session, Refusal> {
    let session = find(asking, user)?.ok_or(Error::NotFound("session"))?;
    asking.app.service.started(&session).await?;
    Ok(session)
}

/// Starts a session. The one that the user has is ended first.
pub(super) async fn start_session(asking: Asking, UserForm(user): UserForm) -> Result<Response, Refusal> {
    asking.who.require_sessions()?;
    let until = Instant::now() + TRYING;
    for _ in (0..TRIES).take_while(|_| Instant::now() < until) {
        if let Some(session) = start(&asking, &user).await? {
            let told = json!({"message": "Session started successfully", "notebook_path": notebook_path(&user)});
            return Ok(([(SESSION, session.id.to_string())], Answer(told)).into_response());
        }
    }
    let detail =
        "other requests start and end sessions of this user all the time; try again once they have come to an end";
    Err(Problem::new(problem::STATE_CONFLICT, detail).into())
}

/// One attempt; nothing has come of it where another request was quicker. Requests that come while a session of the user starts all get that one.
async fn start(asking: &Asking, user: &User) -> Result<Option<Session>, Refusal> {
    let service = &asking.app.service;
    let started = match find(asking, user)? {
        Some(session) if matches!(session.phase(), Phase::Provisioning | Phase::Connecting) => {
            service.started(&session).await.map(|()| session)
        }
        Some(session) => {
            service.delete_session(&asking.who, session.id).await?;
            return Ok(None);
        }
        None => create(asking, user).await,
    };
    match started {
        Ok(session) => Ok(Some(session)),
        Err(Error::NameInUse(_) | Error::SessionEnded(EndReason::Deleted)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn create(asking: &Asking, user: &User) -> Result<Session, Error> {
    let Some(door) = &asking.app.classic else { return Err(Error::NotFound("session")) };
    let is_label = !user.0.chars().any(char::is_control);
    let labels = is_label.then(|| (USER_LABEL.to_owned(), user.0.clone()));
    let request = SessionRequest {
        template: door.template.clone(),
        name: Some(name_of(user)),
        setup: door.setup.clone(),
        labels: labels.into_iter().collect::<BTreeMap<_, _>>(),
        idle_seconds: Some(door.idle.as_secs_f64()),
        ..SessionRequest::default()
    };
    let created = asking.app.service.create_session(&asking.who, &request, true, None).await?;
    let (Created::New(session) | Created::Reused(session)) = created;
    Ok(session)
}

/// Gives a session a new kernel; its files stay.
pub(super) async fn reset(asking: Asking, UserForm(user): UserForm) -> Result<Answer<Value>, Refusal> {
    asking.who.require_sessions()?;
    let session = ready(&asking, &user).await?;
    asking.app.service.restart(&asking.who, session.id, Some(session.default_context)).await?;
    Ok(Answer(json!({"message": "Kernel reset successful"})))
}

/// Ends a session; answers once its container is gone.
pub(super) async fn end_session(asking: Asking, UserForm(user): UserForm) -> Result<Answer<Value>, Refusal> {
    asking.who.require_sessions()?;
    let session = find(&asking, &user)?.ok_or(Error::NotFound("session"))?;
    asking.app.service.delete_session(&asking.who, session.id).await?;
    Ok(Answer(json!({"message": "Session ended successfully"})))
}

/// What is not as it was for a reason that its caller knows.
pub(super) fn conflict(detail: impl Into<String>) -> Refusal {
    Problem::new(problem::STATE_CONFLICT, detail).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::spec::is_name;
    use proptest::prelude::*;

    #[test]
    fn a_path_of_a_notebook_is_one_of_a_url() {
        let path = |user: &str| notebook_path(&User(user.to_owned()));
        assert_eq!(path("user_test"), "/notebook/user_test/notebook_user_test.ipynb");
        let hostile = path("../a b/é?#%");
        assert!(hostile.starts_with("/notebook/..%2Fa%20b%2F%C3%A9%3F%23%25/notebook_"), "{hostile}");
    }

    proptest! {
        #[test]
        fn every_user_has_a_name_of_a_session(one in ".{1,64}", other in ".{1,64}") {
            let (first, second) = (name_of(&User(one.clone())), name_of(&User(other.clone())));
            prop_assert!(is_name(&first));
            prop_assert_eq!(first == second, one == other);
        }
    }
}
