//! Long work as tasks, where a client knows that extension of the protocol (`io.modelcontextprotocol/tasks`): a task is an execution under its own id, which outlives
//! connections and the server. Nothing is kept here.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rmcp::model::{CreateTaskResult, DetailedTask, ErrorData, GetTaskResult, Task, TaskPayload, TaskStatus};
use serde_json::Value;

use super::answer;
use super::call::{Call, describe, last_line};
use crate::domain::ids::ExecutionId;
use crate::domain::output::{ExecutionEvent, Status};
use crate::http::problem::Problem;
use crate::service::{Error, trail};
use crate::session::execution::Execution;

/// A call that has not ended after this long is answered as a task.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How often a client is to look, in milliseconds.
const LOOK: u64 = 1000;
/// Events that are looked through for the last line of output.
const NEWEST: u64 = 20;

/// The answer of a call whose work goes on.
pub(super) fn made(call: &Call, execution: &Execution) -> CreateTaskResult {
    CreateTaskResult::new(task(call, execution, TaskStatus::Working))
}

/// A task as it is by now; what it has come to is what its call would have answered.
///
/// # Errors
/// There is none of that id, or it is not the caller's.
pub(super) async fn get(call: &Call, id: &str) -> Result<GetTaskResult, ErrorData> {
    let execution = find(call, id)?;
    let payload = match execution.status() {
        Status::Queued | Status::Running => TaskPayload::Working,
        Status::Cancelled => TaskPayload::Cancelled,
        _ => {
            let told = serde_json::to_value(answer::of(call, &execution, false).await);
            let Ok(Value::Object(result)) = told else {
                return Err(ErrorData::internal_error("the result could not be told", None));
            };
            TaskPayload::Completed { result }
        }
    };
    Ok(GetTaskResult::new(DetailedTask::new(task(call, &execution, payload.status()), payload)))
}

/// Takes a task back. It ends a moment later, unless it has ended by itself.
///
/// # Errors
/// As [`get`].
pub(super) fn cancel(call: &Call, id: &str) -> Result<(), ErrorData> {
    trail::note_action("cancel_execution");
    let execution = find(call, id)?;
    call.service.cancel(&call.asked.who, execution.id).map(drop).map_err(refused)
}

/// The execution that is the task of this id.
///
/// # Errors
/// As [`get`].
pub(super) fn find(call: &Call, id: &str) -> Result<Arc<Execution>, ErrorData> {
    let id: Result<ExecutionId, _> = id.parse();
    let found = id.map_err(|_| Error::NotFound("task")).and_then(|id| call.service.execution(&call.asked.who, id));
    found.map_err(refused)
}

fn refused(error: Error) -> ErrorData {
    let problem = Problem::from(error);
    trail::note_refusal(problem.code, problem.status);
    ErrorData::invalid_params(describe(&problem), None)
}

fn task(call: &Call, execution: &Execution, status: TaskStatus) -> Task {
    let ended = execution.finished().map(|at| Timestamp::now() - signed(at.elapsed()));
    let updated = ended.unwrap_or_else(Timestamp::now);
    let mut task = Task::new(execution.id.to_string(), status, execution.created_at.to_string(), updated.to_string());
    if let Some(ended) = ended {
        let kept = ended.duration_since(execution.created_at) + signed(call.service.executions_are_kept());
        task = task.with_ttl_ms(u64::try_from(kept.as_millis()).unwrap_or_default());
    }
    match status {
        TaskStatus::Working => task.with_poll_interval_ms(LOOK).with_status_message(said(execution)),
        _ => task,
    }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

/// What is told of one that works: its last line of output.
fn said(execution: &Execution) -> String {
    let newest = execution.events_after(execution.last_seq().saturating_sub(NEWEST));
    let line = newest.iter().rev().find_map(|logged| match &logged.event {
        ExecutionEvent::Text { text, .. } => last_line(text),
        _ => None,
    });
    line.unwrap_or_else(|| {
        if execution.status() == Status::Queued { "it waits for its turn" } else { "it runs" }.to_owned()
    })
}
