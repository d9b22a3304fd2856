//! Messages of `process.Process`, as JSON has them. What they mean for a session is decided beside this.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use cellblock_wire::commands::Size;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::super::error::{Code, Fault};
use crate::service::commands::Command;

/// Starts a process.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Start {
    pub(super) process: Config,
    pub(super) stdin: Option<bool>,
    pub(super) pty: Option<Pty>,
    pub(super) tag: Option<String>,
}

/// What is started.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Config {
    pub(super) cmd: String,
    pub(super) args: Vec<String>,
    pub(super) envs: BTreeMap<String, String>,
    pub(super) cwd: Option<String>,
}

/// A terminal.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Pty {
    size: Option<Sides>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Sides {
    cols: u32,
    rows: u32,
}

impl Pty {
    /// Its size; the usual one where nothing is said.
    pub(super) fn size(self) -> Result<Size, Fault> {
        let Some(Sides { cols, rows }) = self.size else { return Ok(Size { cols: 80, rows: 24 }) };
        match (u16::try_from(cols), u16::try_from(rows)) {
            (Ok(cols), Ok(rows)) => Ok(Size { cols, rows }),
            _ => Err(Fault::new(Code::InvalidArgument, "pty.size: a terminal has at most 1000 columns and rows")),
        }
    }
}

/// Which process is meant.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Which {
    Pid(u32),
    Tag(String),
}

impl Which {
    pub(super) fn means(&self, command: &Command) -> bool {
        match self {
            Self::Pid(pid) => u32::try_from(command.told.pid).is_ok_and(|of| of == *pid),
            Self::Tag(tag) => command.told.tag.as_ref() == Some(tag),
        }
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "process with pid {pid}"),
            Self::Tag(tag) => write!(f, "process with tag {tag:.100?}"),
        }
    }
}

/// Joins a process, or closes its stdin.
#[derive(Debug, Deserialize)]
pub(super) struct Of {
    pub(super) process: Which,
}

pub(super) type Connect = Of;

#[derive(Debug, Deserialize)]
pub(super) struct SendInput {
    pub(super) process: Which,
    pub(super) input: Input,
}

/// Input in base64, for one of both kinds of processes.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Input {
    Stdin(String),
    Pty(String),
}

impl Input {
    /// Its bytes, if it is for such a process.
    pub(super) fn bytes(self, is_terminal: bool) -> Result<Bytes, Fault> {
        let wrong = |detail| Err(Fault::new(Code::InvalidArgument, detail));
        let text = match (self, is_terminal) {
            (Self::Stdin(text), false) | (Self::Pty(text), true) => text,
            (Self::Stdin(_), true) => return wrong("the process has a terminal: send input.pty"),
            (Self::Pty(_), false) => return wrong("the process has no terminal: send input.stdin"),
        };
        match BASE64.decode(text) {
            Ok(bytes) => Ok(bytes.into()),
            Err(_) => wrong("input is bytes in base64"),
        }
    }
}

/// A message of who streams input.
#[derive(Debug, Deserialize)]
pub(super) struct StreamInput {
    #[serde(flatten)]
    pub(super) piece: Piece,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Piece {
    Start { process: Which },
    Data { input: Input },
    Keepalive {},
}

#[derive(Debug, Deserialize)]
pub(super) struct SendSignal {
    pub(super) process: Which,
    #[serde(default)]
    pub(super) signal: Signal,
}

/// A signal by its name or its number; those of E2B's are two.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Signal {
    Name(String),
    Number(i64),
}

impl Default for Signal {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl Signal {
    pub(super) fn name(&self) -> Result<&'static str, Fault> {
        match self {
            Self::Name(name) if name == "SIGNAL_SIGKILL" => Ok("SIGKILL"),
            Self::Name(name) if name == "SIGNAL_SIGTERM" => Ok("SIGTERM"),
            Self::Number(9) => Ok("SIGKILL"),
            Self::Number(15) => Ok("SIGTERM"),
            _ => Err(Fault::new(Code::InvalidArgument, "signal: allowed are SIGNAL_SIGKILL and SIGNAL_SIGTERM")),
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Update {
    pub(super) process: Which,
    pub(super) pty: Option<Pty>,
}

/// A process of a list. Its environment is not told again.
pub(super) fn process(command: &Command) -> Value {
    let told = &command.told;
    let (cmd, args) = told.argv.split_first().map_or(("", &[][..]), |(cmd, args)| (cmd.as_str(), args));
    let mut process = json!({
        "config": {"cmd": cmd, "args": args, "envs": {}, "cwd": told.cwd},
        "pid": u32::try_from(told.pid).unwrap_or_default(),
    });
    if let Some(tag) = &told.tag {
        process["tag"] = json!(tag);
    }
    process
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_clients_write_them() {
        let start: Start = serde_json::from_value(json!({
            "process": {"cmd": "/bin/bash", "args": ["-l", "-c", "echo hi"]}, "stdin": false, "new": 1,
        }))
        .unwrap();
        assert_eq!((start.process.args.len(), start.stdin, start.tag), (3, Some(false), None));
        let input = |value| serde_json::from_value::<SendInput>(value).unwrap();
        let sent = input(json!({"process": {"pid": 7}, "input": {"stdin": "aGk="}}));
        assert!(matches!(sent.process, Which::Pid(7)));
        assert_eq!(sent.input.bytes(false).unwrap(), "hi");
        let typed = input(json!({"process": {"tag": "x"}, "input": {"pty": "aGk="}}));
        assert_eq!(typed.input.bytes(false).unwrap_err().code, Code::InvalidArgument);
        for piece in [
            json!({"start": {"process": {"pid": 7}}}),
            json!({"data": {"input": {"stdin": ""}}}),
            json!({"keepalive": {}}),
        ] {
            assert!(serde_json::from_value::<StreamInput>(piece).is_ok());
        }
        assert!(serde_json::from_value::<StreamInput>(json!({})).is_err());
        for wrong in [
            json!({}),
            json!({"process": {}}),
            json!({"process": {"pid": -1}}),
            json!({"process": {"pid": 1, "tag": "x"}}),
        ] {
            assert!(serde_json::from_value::<Of>(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn signals_are_those_of_the_protocol() {
        let signal = |value: Value| {
            let sent: SendSignal = serde_json::from_value(json!({"process": {"pid": 1}, "signal": value})).unwrap();
            sent.signal.name().ok()
        };
        assert_eq!(signal(json!("SIGNAL_SIGKILL")), Some("SIGKILL"));
        assert_eq!((signal(json!(15)), signal(json!("SIGHUP")), signal(json!(0))), (Some("SIGTERM"), None, None));
    }

    #[test]
    fn terminals_have_sizes_within_bounds() {
        let size = |value: Value| serde_json::from_value::<Pty>(value).unwrap().size();
        assert_eq!(size(json!({})).unwrap(), Size { cols: 80, rows: 24 });
        assert_eq!(size(json!({"size": {"cols": 100, "rows": 7}})).unwrap(), Size { cols: 100, rows: 7 });
        assert!(size(json!({"size": {"cols": 70_000, "rows": 7}})).is_err());
    }
}
