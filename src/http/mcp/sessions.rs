//! The tools that make, list and end sessions.

use std::collections::BTreeMap;

use rmcp::model::{CallToolResult, ContentBlock, JsonObject};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::structured;
use super::binding;
use super::call::{Call, alive, arguments};
use crate::domain::spec::SessionRequest;
use crate::http::extract::object;
use crate::http::problem::Problem;
use crate::http::v1::sessions::{NetworkRequest, SessionView};
use crate::service::{Filter, trail};
use crate::session::Session;

/// Most sessions that are listed.
const MAX_LISTED: usize = 100;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateSession {
    #[serde(default)]
    template: Option<String>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    ttl_seconds: Option<f64>,
    #[serde(default)]
    packages: Vec<String>,
    #[serde(default, deserialize_with = "object")]
    network: NetworkRequest,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CloseSession {
    session_id: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// Makes a session.
///
/// # Errors
/// None can be made.
pub(super) async fn create(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let CreateSession { template, name, env, ttl_seconds, packages, network } = arguments(given)?;
    let request = SessionRequest {
        template,
        name,
        env,
        lifetime_seconds: ttl_seconds,
        packages,
        network: network.into(),
        ..SessionRequest::default()
    };
    // Packages take their time.
    let session = alive(call, binding::create(call, &request)).await?;
    let text =
        format!("Session {} of template {} is ready. Pass it on as session_id.", session.id, session.spec.template);
    Ok(structured(text, view(&session)))
}

/// Lists what lives.
///
/// # Errors
/// The key may not look.
pub(super) fn list(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let Nothing {} = arguments(given)?;
    let sessions = call.service.list_sessions(&call.asked.who, &Filter::default(), None)?;
    // The newest are those that a model is about.
    let live: Vec<_> = sessions.iter().rev().filter(|session| !session.is_over()).collect();
    let shown: Vec<_> = live.iter().take(MAX_LISTED).map(|session| view(session)).collect();
    let mut lines: Vec<_> = shown.iter().map(line).collect();
    if lines.is_empty() {
        lines.push("There is no session; run_code makes one.".to_owned());
    }
    if live.len() > MAX_LISTED {
        lines.push(format!("… and {} older ones.", live.len() - MAX_LISTED));
    }
    Ok(structured(lines.join("\n"), json!({"sessions": shown, "omitted": live.len().saturating_sub(MAX_LISTED)})))
}

/// Ends a session.
///
/// # Errors
/// There is none of that id.
pub(super) async fn close(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let CloseSession { session_id } = arguments(given)?;
    trail::note_action("delete_session");
    call.asked.who.require_sessions()?;
    let id = binding::find(call, &session_id)?.id;
    let session = call.service.delete_session(&call.asked.who, id).await?;
    let mut told = CallToolResult::success(vec![ContentBlock::text(format!("Session {id} has ended."))]);
    told.structured_content = Some(view(&session));
    Ok(told)
}

/// A session as a model needs it.
pub(super) fn view(session: &Session) -> Value {
    let all = serde_json::to_value(SessionView::of(session)).unwrap_or_default();
    let kept = ["id", "state", "template", "name", "created_at", "expires_at", "idle_deadline", "network"];
    Value::Object(kept.iter().map(|key| ((*key).to_owned(), all[*key].clone())).collect())
}

fn line(view: &Value) -> String {
    let text = |key: &str| view[key].as_str().unwrap_or("-").to_owned();
    format!("{}  {}  {}  {}", text("id"), text("state"), text("template"), text("name"))
}
