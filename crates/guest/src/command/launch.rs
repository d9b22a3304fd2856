//! Starts a command's process. Reads none of its output and ends nothing.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cellblock_wire::commands::StartCommand;
use hyper::StatusCode;
use rustix::fs::OFlags;
use tokio::net::unix::pipe::{Receiver, Sender};

use super::tty::{PROGRAM, Terminal};
use crate::api::Refused;
use crate::kernel::launch::is_env;
use crate::kernel::tree::{COMMAND_MARK, Tree};

const BASH: &str = "/bin/bash";
const SH: &str = "/bin/sh";
/// What a terminal is called where nobody says otherwise.
const TERM: &str = "xterm-256color";

/// A command's running process.
pub struct Launched {
    /// Its processes.
    pub tree: Tree,
    /// What is written to it; nothing where its stdin is at its end.
    pub stdin: Option<Sender>,
    /// What it puts out; of a terminal, both are one.
    pub stdout: Option<Receiver>,
    /// The same for stderr.
    pub stderr: Option<Receiver>,
    /// The terminal, if it has one.
    pub terminal: Option<OwnedFd>,
}

/// The program and its arguments, with the shell where one is needed.
#[must_use]
pub fn argv(request: &StartCommand) -> Vec<String> {
    let shell = || if Path::new(BASH).exists() { BASH } else { SH }.to_owned();
    match &request.shell {
        Some(line) => vec![shell(), "-c".to_owned(), line.clone()],
        None if request.argv.is_empty() => vec![shell(), "-i".to_owned()],
        None => request.argv.clone(),
    }
}

/// Where it is to run.
///
/// # Errors
/// When there is no such folder.
pub fn folder(request: &StartCommand, workdir: &Path) -> Result<PathBuf, Refused> {
    let folder = request.cwd.as_ref().map_or_else(|| workdir.to_owned(), |cwd| workdir.join(cwd));
    match folder.is_dir() {
        true => Ok(folder),
        false => Err(Refused::no_folder(&folder.to_string_lossy())),
    }
}

/// Starts the process, leader of its own group.
///
/// # Errors
/// When there is no such program, or no process can be started.
pub fn start(
    request: &StartCommand,
    argv: &[String],
    folder: &Path,
    session_env: &BTreeMap<String, String>,
    needs_stdin: bool,
) -> Result<Launched, Refused> {
    let terminal = request.tty.map(Terminal::open).transpose().map_err(|error| failed(&argv[0], &error))?;
    let mut command = match &terminal {
        None => Command::new(&argv[0]),
        Some(_) => {
            let guest = std::env::current_exe().unwrap_or_else(|_| cellblock_wire::link::GUEST_PATH.into());
            let mut command = Command::new(guest);
            command.args([PROGRAM, &argv[0]]);
            if !session_env.contains_key("TERM") {
                command.env("TERM", TERM);
            }
            command
        }
    };
    command.args(&argv[1..]).current_dir(folder);
    for env in [session_env, &request.env] {
        command.envs(env.iter().filter(|(name, value)| is_env(name) && !value.contains('\0')));
    }
    command.env(COMMAND_MARK, &request.id);
    let Some(terminal) = terminal else {
        command.process_group(0);
        command.stdin(if needs_stdin { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        return spawn(&mut command, request, &argv[0], None);
    };
    let their = || terminal.theirs.try_clone().map(Stdio::from).map_err(|error| failed(&argv[0], &error));
    command.stdin(their()?).stdout(their()?).stderr(their()?);
    spawn(&mut command, request, &argv[0], Some(terminal.ours))
}

fn spawn(
    command: &mut Command,
    request: &StartCommand,
    program: &str,
    terminal: Option<OwnedFd>,
) -> Result<Launched, Refused> {
    let refused = |error: io::Error| failed(program, &error);
    // What could still fail is done before there is a process.
    let ends = match &terminal {
        Some(ours) => {
            let ours = || ours.try_clone().map_err(refused);
            Some((writer(ours()?).map_err(refused)?, reader(ours()?).map_err(refused)?))
        }
        None => None,
    };
    let mut child = command.spawn().map_err(refused)?;
    let pid = child.id() as i32;
    // As kernels: the first to go when memory runs out.
    let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "1000");
    let tree = Tree::of_command(pid, &request.id);
    if let Some((input, output)) = ends {
        return Ok(Launched { tree, stdin: Some(input), stdout: Some(output), stderr: None, terminal });
    }
    let stdin = child.stdin.take().and_then(|pipe| writer(pipe.into()).ok());
    let stdout = child.stdout.take().and_then(|pipe| reader(pipe.into()).ok());
    let stderr = child.stderr.take().and_then(|pipe| reader(pipe.into()).ok());
    Ok(Launched { tree, stdin, stdout, stderr, terminal: None })
}

// Unchecked: a terminal is read and written as a pipe is.
fn reader(fd: OwnedFd) -> io::Result<Receiver> {
    never_wait(&fd)?;
    Receiver::from_owned_fd_unchecked(fd)
}

fn writer(fd: OwnedFd) -> io::Result<Sender> {
    never_wait(&fd)?;
    Sender::from_owned_fd_unchecked(fd)
}

fn never_wait(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

fn failed(program: &str, error: &io::Error) -> Refused {
    let program: String = program.chars().take(200).collect();
    match error.kind() {
        io::ErrorKind::NotFound => Refused::no_program(&format!("there is no program `{program}`")),
        io::ErrorKind::PermissionDenied => Refused::no_program(&format!("`{program}` may not be executed")),
        io::ErrorKind::ArgumentListTooLong => Refused::invalid("arguments and environment are too long for a process"),
        io::ErrorKind::WouldBlock => {
            let message = "the session has as many processes and threads as it may, so that no other can be started";
            Refused::with(StatusCode::SERVICE_UNAVAILABLE, "spawn-failed", message)
        }
        _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => {
            Refused::no_program(&format!("`{program}` is no program"))
        }
        _ => {
            let message = format!("`{program}` can't be started: {error}");
            Refused::with(StatusCode::SERVICE_UNAVAILABLE, "spawn-failed", message)
        }
    }
}
