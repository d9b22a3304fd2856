//! Sandboxes are looked for: all that run, or a page of them by state, metadata, template and time. A sandbox is a session, whichever door it came by.

use std::collections::BTreeMap;

use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;

use super::super::error::Refusal;
use super::super::sandbox::Account;
use super::rests;
use super::view::{ListedView, alias};
use crate::domain::ids::SessionId;
use crate::domain::spec::FieldError;
use crate::http::extract::{Answer, Params};
use crate::http::problem::{self, Problem};
use crate::service::Filter;
use crate::session::Session;

/// Where the next page begins.
const NEXT: HeaderName = HeaderName::from_static("x-next-token");
/// Sandboxes on a page when nothing is asked for, and at most.
const PAGE: usize = 100;

/// Which sandboxes are meant.
#[derive(Debug, Default, PartialEq)]
struct Wanted {
    running: bool,
    paused: bool,
    metadata: BTreeMap<String, String>,
    template: Option<String>,
    started_after: Option<Timestamp>,
}

/// A place in the order of their beginnings: the moment in nanoseconds, and which of those that began then.
type Place = (i128, SessionId);

/// All that run, the newest first; without pages, since their clients know none.
pub(super) async fn running(account: Account, params: Result<Params, Problem>) -> Result<Response, Refusal> {
    let params = params.and_then(|params| params.only(&["metadata"])).map_err(Refusal::of_control)?;
    let metadata = params.get("metadata").map(metadata).transpose().map_err(Refusal::of_control)?.unwrap_or_default();
    let wanted = Wanted { running: true, metadata, ..Wanted::default() };
    let mut found = found(&account, &wanted)?;
    found.reverse();
    Ok(Answer(views(&found)).into_response())
}

/// A page.
pub(super) async fn page(account: Account, params: Result<Params, Problem>) -> Result<Response, Refusal> {
    let known = ["state", "metadata", "template", "startedAfter", "order", "limit", "nextToken"];
    let params = params.and_then(|params| params.only(&known)).map_err(Refusal::of_control)?;
    let wanted = Wanted::read(&params).map_err(Refusal::of_control)?;
    let (is_ascending, limit, after) = shape(&params).map_err(Refusal::of_control)?;
    let mut found = found(&account, &wanted)?;
    if !is_ascending {
        found.reverse();
    }
    let is_behind = |session: &Session| after.is_none_or(|after| is_ascending == (place(session) > after));
    let mut rest = found.into_iter().filter(|session| is_behind(session) && Some(place(session)) != after);
    let page: Vec<_> = rest.by_ref().take(limit).collect();
    let next = rest.next().and(page.last()).map(|last| token(place(last)));
    let mut answer = Answer(views(&page)).into_response();
    if let Some(next) = next.and_then(|next| HeaderValue::try_from(next).ok()) {
        answer.headers_mut().insert(NEXT, next);
    }
    Ok(answer)
}

fn views(sessions: &[Session]) -> Vec<ListedView> {
    sessions.iter().map(ListedView::of).collect()
}

/// Those that are meant, the oldest first.
fn found(Account { app, who }: &Account, wanted: &Wanted) -> Result<Vec<Session>, Refusal> {
    let sessions = app.service.list_sessions(who, &Filter::default(), None).map_err(Refusal::of_control)?;
    let mut found: Vec<_> = sessions.into_iter().filter(|session| wanted.admits(session)).collect();
    found.sort_by_key(place);
    Ok(found)
}

impl Wanted {
    fn read(params: &Params) -> Result<Self, Problem> {
        let mut wanted = Self {
            metadata: params.get("metadata").map(metadata).transpose()?.unwrap_or_default(),
            template: params.get("template").map(str::to_owned),
            started_after: params.parse("startedAfter", "a time such as 2026-01-31T12:00:00Z")?,
            ..Self::default()
        };
        let states: Vec<_> = params.all("state").flat_map(|states| states.split(',')).collect();
        for state in &states {
            match *state {
                "running" => wanted.running = true,
                "paused" => wanted.paused = true,
                _ => return Err(wrong("state", "allowed is running or paused, or both with a comma between them")),
            }
        }
        if states.is_empty() {
            (wanted.running, wanted.paused) = (true, true);
        }
        Ok(wanted)
    }

    fn admits(&self, session: &Session) -> bool {
        let is_meant = if rests(session) { self.paused } else { self.running };
        let has_name = |name: &String| {
            session.spec.template == *name || alias(&session.snapshot()).is_some_and(|alias| alias == *name)
        };
        !session.is_over()
            && is_meant
            && self.metadata.iter().all(|(name, value)| session.spec.metadata.get(name) == Some(value))
            && self.template.as_ref().is_none_or(has_name)
            && self.started_after.is_none_or(|after| session.created_at >= after)
    }
}

/// The order, how many, and behind which.
fn shape(params: &Params) -> Result<(bool, usize, Option<Place>), Problem> {
    let is_ascending = match params.get("order").unwrap_or("desc") {
        "asc" => true,
        "desc" => false,
        _ => return Err(wrong("order", "allowed is asc or desc")),
    };
    let limit = params.parse::<usize>("limit", "1 to 100")?.unwrap_or(PAGE);
    if !(1..=PAGE).contains(&limit) {
        return Err(wrong("limit", "allowed is 1 to 100"));
    }
    let given = params.get("nextToken").filter(|token| !token.is_empty());
    let after = given.map(|token| {
        let place = token.split_once('-').and_then(|(at, id)| Some((at.parse().ok()?, id.parse().ok()?)));
        place.ok_or_else(|| wrong("nextToken", "allowed is a value of the header x-next-token"))
    });
    Ok((is_ascending, limit, after.transpose()?))
}

fn place(session: &Session) -> Place {
    (session.created_at.as_nanosecond(), session.id)
}

fn token((at, id): Place) -> String {
    format!("{at}-{id}")
}

/// Metadata in a query: pairs as in a form, whose names and values were escaped once before.
fn metadata(text: &str) -> Result<BTreeMap<String, String>, Problem> {
    let plain = |text: &str| percent_decode_str(text).decode_utf8().ok().map(String::from);
    let twice = |text: &str| plain(&text.replace('+', " ")).and_then(|text| plain(&text));
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        Some((twice(name)?, twice(value)?))
    };
    let pairs = text.split('&').filter(|pair| !pair.is_empty()).map(pair).collect::<Option<_>>();
    pairs.ok_or_else(|| wrong("metadata", "allowed are pairs as in a form, name=value&name=value"))
}

fn wrong(name: &str, message: &str) -> Problem {
    Problem::new(problem::INVALID_REQUEST, "a query parameter is not understood")
        .with_fields(vec![FieldError::new(format!("?{name}"), message)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn metadata_are_escaped_twice() {
        let pair = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        // As clients send it, once the query is read.
        assert_eq!(metadata("a%2520b=c%2526d").unwrap(), pair("a b", "c&d"));
        assert_eq!(metadata("user=ada").unwrap(), pair("user", "ada"));
        assert_eq!(metadata("p=50%2525").unwrap(), pair("p", "50%"));
        assert_eq!(metadata("").unwrap(), BTreeMap::new());
        assert_eq!(metadata("a=1&b=").unwrap().len(), 2);
        for none in ["a", "a=1&b", "a=%FF"] {
            assert!(metadata(none).is_err(), "{none}");
        }
    }

    proptest! {
        #[test]
        fn no_query_makes_it_panic(text in any::<String>()) {
            let _ = metadata(&text);
        }
    }
}
