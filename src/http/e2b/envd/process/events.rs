//! What a process does, as messages of an answer that streams: its start first, output as it comes, its end last.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use cellblock_wire::commands::{CommandEnd, CommandEvent, CommandStream};
use futures_util::stream::{self, Stream};
use serde_json::{Value, json};

use super::super::super::error::{Code, Fault};
use crate::service::Error;
use crate::service::commands::{Command, CommandFollow, Followed, Heard};

enum Next {
    Start,
    Event,
    Over,
}

/// What a command does from where it is followed on.
pub(super) fn of(command: &Command, follow: CommandFollow) -> impl Stream<Item = Result<Value, Fault>> + Send + use<> {
    let (pid, is_terminal) = (u32::try_from(command.told.pid).unwrap_or_default(), command.told.tty);
    stream::unfold((follow, Next::Start), move |(mut follow, next)| async move {
        match next {
            Next::Start => Some((Ok(event(json!({"start": {"pid": pid}}))), (follow, Next::Event))),
            Next::Event => {
                let told = heard(&mut follow, is_terminal).await;
                let is_over = told.as_ref().map_or(true, |told| told["event"].get("end").is_some());
                Some((told, (follow, if is_over { Next::Over } else { Next::Event })))
            }
            Next::Over => None,
        }
    })
}

fn event(of: Value) -> Value {
    json!({"event": of})
}

async fn heard(follow: &mut CommandFollow, is_terminal: bool) -> Result<Value, Fault> {
    loop {
        match follow.next().await {
            Ok(Heard::Event(followed)) => {
                if let Some(told) = told(followed, is_terminal) {
                    return Ok(event(told));
                }
            }
            Ok(Heard::End | Heard::Lost) => {
                return Err(Fault::new(Code::Unavailable, "nobody knows any more how the process ended"));
            }
            // The answer is broken off for that, by whoever sends it.
            Err(Error::SessionEnded(_) | Error::NotFound("session")) => std::future::pending().await,
            Err(error) => return Err(error.into()),
        }
    }
}

fn told(Followed { event, bytes, .. }: Followed, is_terminal: bool) -> Option<Value> {
    match event {
        CommandEvent::Started { .. } => None,
        CommandEvent::Output { stream } => Some(output(stream, is_terminal, &bytes)),
        CommandEvent::Gap { stream, omitted_bytes, .. } => {
            let words = format!("\n[… {omitted_bytes} bytes are left out …]\n");
            Some(output(stream, is_terminal, &Bytes::from(words)))
        }
        CommandEvent::Ended { end, .. } => Some(json!({"end": ended(&end)})),
    }
}

fn output(stream: CommandStream, is_terminal: bool, bytes: &Bytes) -> Value {
    let name = match (stream, is_terminal) {
        (_, true) => "pty",
        (CommandStream::Stdout, false) => "stdout",
        (CommandStream::Stderr, false) => "stderr",
    };
    json!({"data": {name: BASE64.encode(bytes)}})
}

/// How it ended, in the words of Go, in which E2B's agent is written.
fn ended(end: &CommandEnd) -> Value {
    let (code, status) = match (end.status, end.signal) {
        (Some(code), _) => (code, format!("exit status {code}")),
        (None, Some(signal)) => (-1, format!("signal: {}", signal_words(signal))),
        (None, None) => (-1, "ended".to_owned()),
    };
    let mut told = json!({"exitCode": code, "exited": end.status.is_some(), "status": status});
    if code != 0 {
        let why = if end.oom { " (no memory left)" } else { "" };
        told["error"] = json!(format!("{status}{why}"));
    }
    told
}

fn signal_words(signal: i32) -> String {
    let words = match signal {
        1 => "hangup",
        2 => "interrupt",
        3 => "quit",
        4 => "illegal instruction",
        5 => "trace/breakpoint trap",
        6 => "aborted",
        7 => "bus error",
        8 => "floating point exception",
        9 => "killed",
        10 => "user defined signal 1",
        11 => "segmentation fault",
        12 => "user defined signal 2",
        13 => "broken pipe",
        14 => "alarm clock",
        15 => "terminated",
        other => return format!("signal {other}"),
    };
    words.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_as_e2bs_agent_tells_them() {
        let of = |status, signal| ended(&CommandEnd { status, signal, ..CommandEnd::default() });
        assert_eq!(of(Some(0), None), json!({"exitCode": 0, "exited": true, "status": "exit status 0"}));
        let failed = json!({"exitCode": 3, "exited": true, "status": "exit status 3", "error": "exit status 3"});
        assert_eq!(of(Some(3), None), failed);
        let killed = json!({"exitCode": -1, "exited": false, "status": "signal: killed", "error": "signal: killed"});
        assert_eq!(of(None, Some(9)), killed);
        assert_eq!(of(None, Some(40))["status"], "signal: signal 40");
    }

    #[test]
    fn output_is_of_its_stream() {
        let told = |stream, is_terminal| output(stream, is_terminal, &Bytes::from_static(b"hi"));
        assert_eq!(told(CommandStream::Stdout, false), json!({"data": {"stdout": "aGk="}}));
        assert_eq!(told(CommandStream::Stderr, false), json!({"data": {"stderr": "aGk="}}));
        assert_eq!(told(CommandStream::Stdout, true), json!({"data": {"pty": "aGk="}}));
    }
}
