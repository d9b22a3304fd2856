//! `cellblock run`: one execution in a container of its own, with no server running. The control plane lives inside the command
//! for as long as the code runs.

mod mcp;

use std::io;
use std::path::{Component, Path, PathBuf};

use cellblock_wire::files::{Kind, List, MAX_DEPTH, MAX_LISTED, Read};
use http_body_util::BodyExt;
use tokio::io::AsyncWriteExt;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::{Plane, StartError};
use crate::cli::{self, Images, Renderer, RunArgs, while_waiting};
use crate::config::Config;
use crate::domain::ids::SessionId;
use crate::domain::spec::SessionRequest;
use crate::http::v1::stream::event_line;
use crate::service::keys::{Principal, Scope};
use crate::service::transfer::Pieces;
use crate::service::{Error, ExecuteRequest};
use crate::session::execution::Execution;
use crate::session::registry::Created;

pub use mcp::serve as serve_mcp;

/// The instance of all such commands. Each removes its own container; what a killed one leaves ends by its lease, and is removed by
/// the next one.
const INSTANCE: &str = "run";
/// Most files that are saved, and most bytes in all.
const MAX_FILES: (usize, u64) = (1000, 4 * 1024 * 1024 * 1024);

/// Why a run did not come to an end of its own.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The control plane did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The code can't be read.
    #[error("{0}")]
    Code(String),
    /// The session or the execution was refused, or failed.
    #[error("{source}{}", fields(source))]
    Refused {
        /// Why.
        #[from]
        source: Error,
    },
    /// Output could not be written.
    #[error("output can't be written: {0}")]
    Write(#[from] io::Error),
}

/// Each field that was refused, a line each.
fn fields(error: &Error) -> String {
    match error {
        Error::SpecRejected(fields) => fields.iter().map(|f| format!("\n  {}: {}", f.pointer, f.message)).collect(),
        _ => String::new(),
    }
}

/// Runs code once and gives the exit status. Nothing is left behind, unless the process is killed: then the container ends by its
/// lease, and the next run removes it.
///
/// # Errors
/// See [`RunError`].
pub async fn run(args: &RunArgs, json: bool, mut config: Config) -> Result<u8, RunError> {
    let code = args.source().read().map_err(RunError::Code)?;
    INSTANCE.clone_into(&mut config.engine.instance);
    let plane = while_waiting("connecting to the engine", Plane::start(&config, false)).await?;
    let who = Principal::new(INSTANCE, [Scope::Sessions]);
    let result = tokio::select! {
        result = run_in(&plane, &who, args, json, code) => result,
        () = told_to_stop() => Ok(cli::CANCELLED),
    };
    let left = plane.stop(std::future::ready(())).await;
    if left > 0 {
        eprintln!("cellblock: the container could not be removed; `make clean-containers` does it");
    }
    result
}

/// Waits for a signal that asks the command to end: from a terminal, from `timeout(1)`, or because the terminal is gone.
pub(crate) async fn told_to_stop() {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let signals = kinds.into_iter().filter_map(|kind| signal(kind).ok()).map(|mut signal| {
        Box::pin(async move {
            signal.recv().await;
        })
    });
    futures_util::future::select_all(signals).await;
}

async fn run_in(plane: &Plane, who: &Principal, args: &RunArgs, json: bool, code: String) -> Result<u8, RunError> {
    let request = SessionRequest {
        template: args.template.clone(),
        memory_mb: args.memory_mb,
        env: args.env.iter().cloned().collect(),
        ..SessionRequest::default()
    };
    let creating = plane.service.create_session(who, &request, true, None);
    let (Created::New(session) | Created::Reused(session)) = while_waiting("starting a container", creating).await?;
    let timeout_seconds = args.timeout.map(|t| t.as_secs_f64());
    let request = ExecuteRequest { code, timeout_seconds, ..ExecuteRequest::default() };
    let execution = plane.service.execute(who, session.id, request, None).await?;
    let mut renderer = Renderer::to_terminal(json, Images::new(args.out.clone()));
    follow(&execution, |event| renderer.event(&event)).await?;
    if let Some(folder) = &args.out {
        save_files(plane, who, session.id, folder).await?;
    }
    Ok(renderer.finish()?)
}

async fn follow(execution: &Execution, mut show: impl FnMut(serde_json::Value) -> io::Result<()>) -> io::Result<()> {
    let mut version = execution.subscribe();
    let mut seq = 0;
    loop {
        version.mark_unchanged();
        let events = execution.events_after(seq);
        for logged in &events {
            seq = logged.seq;
            // What a kernel calls JSON may be more than a reader takes; then only its type is shown.
            let line = event_line(execution, logged);
            show(serde_json::from_str(&line).unwrap_or(serde_json::Value::Null))?;
        }
        if events.is_empty() && execution.status().is_final() {
            return Ok(());
        }
        if events.is_empty() {
            // The sender lives in the execution, so this can't fail.
            let _ = version.changed().await;
        }
    }
}

/// Saves what the code left in its working folder. Names are hostile: only plain relative paths are taken, nothing that exists is
/// overwritten, and no link is followed because the folders below are made here.
async fn save_files(plane: &Plane, who: &Principal, session: SessionId, folder: &Path) -> Result<(), RunError> {
    let mut budget = MAX_FILES.1;
    let mut files = Vec::new();
    let mut asked = List { depth: MAX_DEPTH, limit: MAX_LISTED, ..List::default() };
    let is_more = loop {
        let page = plane.service.list_files(who, session, &asked).await?;
        asked.after = page.entries.last().map(|entry| entry.path.clone());
        files.extend(page.entries.into_iter().filter(|entry| entry.kind == Kind::File));
        if !page.truncated || asked.after.is_none() || files.len() > MAX_FILES.0 {
            break page.truncated;
        }
    };
    if files.len() > MAX_FILES.0 || is_more {
        eprintln!("cellblock: of more files the first {} are saved", files.len().min(MAX_FILES.0));
    }
    for entry in files.iter().take(MAX_FILES.0) {
        let Some(path) = harmless(&entry.path) else {
            eprintln!("cellblock: a file with the name \"{}\" is not saved", cli::escape(&entry.path));
            continue;
        };
        let asked = Read { path: entry.path.clone(), ..Read::default() };
        let (_, body) = plane.service.read_file(who, session, &asked).await?;
        match save(&folder.join(&path), body, &mut budget).await {
            Ok(()) => {}
            Err(error) => eprintln!("cellblock: {} is not saved: {error}", cli::escape(&path.display().to_string())),
        }
    }
    Ok(())
}

/// A path of plain names below the folder, or nothing.
fn harmless(path: &str) -> Option<PathBuf> {
    let relative = Path::new(path);
    let plain = relative.components().all(|c| matches!(c, Component::Normal(_)));
    (plain && !path.is_empty() && !path.chars().any(char::is_control)).then(|| relative.to_path_buf())
}

async fn save(path: &Path, mut body: Pieces, budget: &mut u64) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent).await?;
    }
    let mut file = tokio::fs::OpenOptions::new().write(true).create_new(true).open(path).await?;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(io::Error::other)?.into_data() else { continue };
        *budget = budget.checked_sub(data.len() as u64).ok_or_else(|| io::Error::other("too much to save"))?;
        file.write_all(&data).await?;
    }
    file.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_paths_are_saved() {
        for path in ["../x", "/etc/passwd", "a/../../x", "", "a\nb", "."] {
            assert_eq!(harmless(path), None, "{path:?}");
        }
        assert_eq!(harmless("a/b c.png"), Some(PathBuf::from("a/b c.png")));
    }
}
