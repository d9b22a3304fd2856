//! The tool `run_command`: a line for a shell, and what it puts out.

use rmcp::model::{CallToolResult, ContentBlock, JsonObject};
use serde::Deserialize;
use serde_json::{Value, json};

use cellblock_wire::commands::{CommandEnd, CommandEvent, CommandStream, EndedBy, Totals};

use super::answer::{self, cut};
use super::binding::session_for;
use super::call::{Call, arguments};
use crate::http::problem::Problem;
use crate::service::commands::{CommandFollow, CommandRequest, Followed, Heard, Program};
use crate::service::trail;

/// Most bytes of a stream that are held here, whatever the guest sends.
const MAX_HELD: usize = 2 * 1024 * 1024;
/// Longest text of each stream in what programs are told, in characters.
const MAX_STRUCTURED: usize = 32_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RunCommand {
    command: String,
    #[serde(default)]
    session_id: Option<String>,
    #[serde(default)]
    cwd: Option<String>,
    #[serde(default)]
    timeout_seconds: Option<f64>,
}

/// What has come of a command.
#[derive(Debug, Default)]
struct Told {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    omitted: [u64; 2],
    end: Option<(CommandEnd, Totals, Totals)>,
}

/// Runs a command. A call that is taken back ends it.
///
/// # Errors
/// What was refused before anything ran, and a session that went away.
pub(super) async fn run_command(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let RunCommand { command, session_id, cwd, timeout_seconds } = arguments(given)?;
    trail::note_action("create_command");
    call.asked.who.require_sessions()?;
    let bound = session_for(call, session_id.as_deref()).await?;
    let request = CommandRequest { program: Program::Line(command), cwd, timeout_seconds, ..CommandRequest::default() };
    let begun = call.service.start_command(&call.asked.who, bound.session.id, request, None).await;
    let (started, follow) = begun.inspect_err(|_| bound.leave())?;
    let told = listen(call, follow).await?;
    if call.is_left() && call.is_modern {
        bound.leave();
    }
    let ids = (started.id.to_string(), bound.session.id.to_string());
    Ok(told.answer(&ids, bound.is_unnamed))
}

/// Hears of a command until it has ended.
async fn listen(call: &Call, mut follow: CommandFollow) -> Result<Told, Problem> {
    let (mut told, mut is_taken_back) = (Told::default(), false);
    let mut progress = call.progress();
    let (session, command) = (follow.session(), follow.id());
    loop {
        tokio::select! {
            heard = follow.next() => match heard? {
                Heard::Event(event) => {
                    if matches!(event.event, CommandEvent::Output { .. }) {
                        progress.saw(&String::from_utf8_lossy(&event.bytes));
                    }
                    told.take(event);
                }
                Heard::End | Heard::Lost => return Ok(told),
            },
            () = progress.due() => progress.tell().await,
            () = call.taken_back(), if !is_taken_back => {
                is_taken_back = true;
                call.service.end_command_unheard(&call.asked.who, session, command);
            }
        }
    }
}

impl Told {
    fn take(&mut self, event: Followed) {
        match event.event {
            CommandEvent::Output { stream } => {
                let is_err = stream == CommandStream::Stderr;
                let (held, omitted) = if is_err {
                    (&mut self.stderr, &mut self.omitted[1])
                } else {
                    (&mut self.stdout, &mut self.omitted[0])
                };
                let taken = event.bytes.len().min(MAX_HELD.saturating_sub(held.len()));
                held.extend_from_slice(&event.bytes[..taken]);
                *omitted += (event.bytes.len() - taken) as u64;
            }
            CommandEvent::Gap { stream, omitted_bytes, .. } => {
                let held = if stream == CommandStream::Stderr { &mut self.stderr } else { &mut self.stdout };
                held.extend_from_slice(format!("\n[… {omitted_bytes} bytes are left out …]\n").as_bytes());
            }
            CommandEvent::Ended { end, stdout, stderr } => self.end = Some((end, stdout, stderr)),
            CommandEvent::Started { .. } => {}
        }
    }

    fn answer(&self, (id, session): &(String, String), is_new: bool) -> CallToolResult {
        let plain = |bytes: &[u8]| anstream::adapter::strip_str(&String::from_utf8_lossy(bytes)).to_string();
        let (stdout, stderr) = (plain(&self.stdout), plain(&self.stderr));
        let mut body = stdout.clone();
        if !stderr.is_empty() {
            let separator = if body.is_empty() || body.ends_with('\n') { "" } else { "\n" };
            body.push_str(&format!("{separator}[stderr]\n{stderr}"));
        }
        let mut footer = format!("[{}, session {session}]", self.how());
        if is_new {
            footer.push_str(&format!("\nPass session_id \"{session}\" on to go on with these files."));
        }
        let (text, is_cut) = cut(&body, answer::MAX_TEXT.saturating_sub(footer.chars().count() + 100));
        let separator = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
        let hint = if is_cut { "Write long output into a file, and read that.\n" } else { "" };
        let mut answer = CallToolResult::success(vec![ContentBlock::text(format!("{text}{separator}{hint}{footer}"))]);
        let is_well = self.end.is_some_and(|(end, ..)| end.status == Some(0) && end.by == EndedBy::Itself);
        answer.is_error = Some(!is_well);
        answer.structured_content = Some(self.view(id, session, &stdout, &stderr));
        answer
    }

    fn how(&self) -> String {
        let Some((end, ..)) = self.end else { return "the command is lost with its container".to_owned() };
        let how = match (end.by, end.status, end.signal) {
            (EndedBy::Timeout, ..) => "ended at its time limit".to_owned(),
            (EndedBy::Request, ..) => "cancelled".to_owned(),
            _ if end.oom => "ended for want of memory".to_owned(),
            (_, Some(status), _) => format!("exit code {status}"),
            (_, None, Some(signal)) => format!("ended by signal {signal}"),
            _ => "ended".to_owned(),
        };
        format!("{how}, {} ms", end.duration_ms)
    }

    fn view(&self, id: &str, session: &str, stdout: &str, stderr: &str) -> Value {
        let end = self.end.map(|(end, ..)| end);
        let bytes = |stream: usize, held: &[u8]| match (&self.end, stream) {
            (Some((_, stdout, _)), 0) => stdout.bytes,
            (Some((_, _, stderr)), _) => stderr.bytes,
            (None, _) => held.len() as u64 + self.omitted[stream],
        };
        json!({
            "id": id,
            "session_id": session,
            "exit_code": end.and_then(|end| end.status),
            "signal": end.and_then(|end| end.signal),
            "timed_out": end.is_some_and(|end| end.by == EndedBy::Timeout),
            "out_of_memory": end.is_some_and(|end| end.oom),
            "duration_ms": end.map_or(0, |end| end.duration_ms),
            "stdout": cut(stdout, MAX_STRUCTURED).0,
            "stderr": cut(stderr, MAX_STRUCTURED).0,
            "stdout_bytes": bytes(0, &self.stdout),
            "stderr_bytes": bytes(1, &self.stderr),
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn no_more_is_held_than_may_be_whatever_comes() {
        let mut told = Told::default();
        for _ in 0..5 {
            let event = CommandEvent::Output { stream: CommandStream::Stdout };
            told.take(Followed { seq: 1, event, bytes: Bytes::from(vec![b'x'; MAX_HELD / 2]) });
        }
        assert_eq!((told.stdout.len(), told.omitted[0]), (MAX_HELD, (MAX_HELD + MAX_HELD / 2) as u64));
        let answer = told.answer(&("cmd1".to_owned(), "ses1".to_owned()), true);
        let text = answer.content[0].as_text().map(|t| t.text.clone()).unwrap_or_default();
        assert!(text.chars().count() <= answer::MAX_TEXT && text.contains("ses1"), "{}", text.len());
        assert_eq!(answer.is_error, Some(true), "it has not ended");
    }
}
