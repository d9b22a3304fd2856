//! The tool `run_code`: from arguments to an execution, and what its client hears until it has ended.

use std::sync::Arc;
use std::time::Instant;

use rmcp::model::{CallToolResponse, JsonObject};
use serde::Deserialize;

use super::binding::session_for;
use super::call::{Call, arguments};
use super::{answer, tasks};
use crate::domain::output::ExecutionEvent;
use crate::http::problem::Problem;
use crate::service::{ExecuteRequest, trail};
use crate::session::execution::Execution;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunCode {
    code: String,
    #[serde(default)]
    session_id: Option<String>,
    #[serde(default)]
    language: Option<String>,
    #[serde(default)]
    timeout_seconds: Option<f64>,
    #[serde(default)]
    background: bool,
}

/// Runs code. A call that is taken back interrupts it; one that takes long is answered as a task, where its client knows them.
///
/// # Errors
/// What was refused before anything ran.
pub(super) async fn run_code(call: &Call, given: JsonObject) -> Result<CallToolResponse, Problem> {
    let RunCode { code, session_id, language, timeout_seconds, background } = arguments(given)?;
    trail::note_action("create_execution");
    call.asked.who.require_sessions()?;
    let bound = session_for(call, session_id.as_deref()).await?;
    let request = ExecuteRequest { code, language, timeout_seconds, ..ExecuteRequest::default() };
    let begun = call.service.execute(&call.asked.who, bound.session.id, request, None).await;
    let execution = begun.inspect_err(|_| bound.leave())?;
    if background && !call.knows_tasks {
        return Ok(answer::begun(&execution).into());
    }
    let patience = call.knows_tasks.then(|| if background { Instant::now() } else { Instant::now() + tasks::PATIENCE });
    if !follow(call, &execution, patience).await {
        return Ok(tasks::made(call, &execution).into());
    }
    if call.is_left() && call.is_modern {
        bound.leave();
    }
    Ok(answer::of(call, &execution, bound.is_unnamed).await.into())
}

/// Waits until an execution has ended, or goes on with the next server; says that it goes on here where it does after all patience.
async fn follow(call: &Call, execution: &Arc<Execution>, patience: Option<Instant>) -> bool {
    let over = async {
        match patience {
            Some(until) => tokio::time::sleep_until(until.into()).await,
            None => std::future::pending().await,
        }
    };
    let mut over = std::pin::pin!(over);
    let mut version = execution.subscribe();
    let (mut seq, mut is_taken_back) = (0, false);
    let mut progress = call.progress();
    loop {
        // Looked at before the events, so that one which comes in between wakes us.
        version.mark_unchanged();
        for logged in execution.events_after(seq) {
            seq = logged.seq;
            if let ExecutionEvent::Text { text, .. } = &logged.event {
                progress.saw(text);
            }
        }
        if !execution.is_followed() {
            return true;
        }
        tokio::select! {
            changed = version.changed() => if changed.is_err() { return true },
            () = progress.due() => progress.tell().await,
            () = &mut over, if !is_taken_back => return false,
            () = call.taken_back(), if !is_taken_back => {
                is_taken_back = true;
                call.service.cancel_unheard(&call.asked.who, execution);
            }
        }
    }
}
