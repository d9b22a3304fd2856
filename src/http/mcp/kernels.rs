//! The tools of the full set for what runs in a session, and what it has left: interrupt, restart, packages, executions looked up, and the notebook.

use std::convert::Infallible;

use futures_util::stream;
use rmcp::model::{CallToolResult, ContentBlock, JsonObject, Resource};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::{self, cut, structured};
use super::binding::find;
use super::call::{Call, alive, arguments};
use super::{files, resources, sessions};
use crate::domain::ids::ExecutionId;
use crate::http::problem::Problem;
use crate::service::files::WriteFile as Write;
use crate::service::packages::{Installed, Package};
use crate::service::{Error, trail};

/// Most packages that are told.
const MAX_PACKAGES: usize = 500;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OfSession {
    session_id: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct InstallPackages {
    session_id: String,
    packages: Vec<String>,
    #[serde(default)]
    upgrade: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GetExecution {
    execution_id: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExportNotebook {
    session_id: String,
    #[serde(default)]
    path: Option<String>,
}

/// Interrupts what runs in a session.
///
/// # Errors
/// There is none of that id.
pub(super) async fn interrupt(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let OfSession { session_id } = arguments(given)?;
    trail::note_action("interrupt_session");
    call.asked.who.require_sessions()?;
    let id = find(call, &session_id)?.id;
    let session = call.service.interrupt(&call.asked.who, id, None).await?;
    Ok(structured(format!("What ran in session {id} is interrupted; variables stay."), sessions::view(&session)))
}

/// Replaces a session's kernels.
///
/// # Errors
/// There is none of that id, or no new kernel begins.
pub(super) async fn restart(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let OfSession { session_id } = arguments(given)?;
    trail::note_action("restart_session");
    call.asked.who.require_sessions()?;
    let id = find(call, &session_id)?.id;
    let session = alive(call, call.service.restart(&call.asked.who, id, None)).await?;
    let text = format!("Session {id} has new kernels: variables are gone, files are still there.");
    Ok(structured(text, sessions::view(&session)))
}

/// Installs packages. They go on being installed when the call is taken back.
///
/// # Errors
/// They may not be installed, or can't be.
pub(super) async fn install(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let InstallPackages { session_id, packages, upgrade } = arguments(given)?;
    trail::note_action("install_packages");
    call.asked.who.require_sessions()?;
    let id = find(call, &session_id)?.id;
    let installing = async {
        let mut install = call.service.install_packages(&call.asked.who, id, (&packages, upgrade)).await?;
        install.finish().await
    };
    let Installed { added, failure, .. } = alive(call, installing).await?;
    if let Some(failure) = failure {
        return Err(Error::InstallFailed(failure).into());
    }
    let text = if added.is_empty() { "All of it was there.".to_owned() } else { format!("Added:\n{}", lines(&added)) };
    Ok(structured(cut(&text, answer::MAX_TEXT).0, json!({"added": views(&added)})))
}

/// Lists what is installed.
///
/// # Errors
/// The session has no Python.
pub(super) async fn packages(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let OfSession { session_id } = arguments(given)?;
    let id = find(call, &session_id)?.id;
    let packages = call.service.packages(&call.asked.who, id).await?;
    let omitted = packages.len().saturating_sub(MAX_PACKAGES);
    let told = json!({"packages": views(&packages), "omitted": omitted});
    Ok(structured(cut(&lines(&packages), answer::MAX_TEXT).0, told))
}

fn lines(packages: &[Package]) -> String {
    // Names come from the code inside.
    let plain = |text: &str| text.chars().filter(|c| !c.is_control()).take(100).collect::<String>();
    let line = |package: &Package| format!("{} {}", plain(&package.name), plain(&package.version));
    packages.iter().take(MAX_PACKAGES).map(line).collect::<Vec<_>>().join("\n")
}

fn views(packages: &[Package]) -> Vec<Value> {
    let view = |package: &Package| json!({"name": package.name, "version": package.version, "source": package.source});
    packages.iter().take(MAX_PACKAGES).map(view).collect()
}

/// Shows an execution as it is by now.
///
/// # Errors
/// There is none of that id.
pub(super) async fn execution(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let GetExecution { execution_id } = arguments(given)?;
    let id = execution_id.parse::<ExecutionId>().map_err(|_| Error::NotFound("execution"))?;
    let execution = call.service.execution(&call.asked.who, id)?;
    Ok(answer::of(call, &execution, false).await)
}

/// Links a session's notebook, and writes it into a file of the session.
///
/// # Errors
/// Nothing was run in it yet, or the file can't be written.
pub(super) async fn notebook(call: &Call, given: JsonObject) -> Result<CallToolResult, Problem> {
    let ExportNotebook { session_id, path } = arguments(given)?;
    let session = find(call, &session_id)?;
    if path.is_some() {
        trail::note_action("write_file");
        call.asked.who.require_sessions()?;
    }
    let notebook = call.service.notebook(&call.asked.who, session.id).await?;
    let size = notebook.len() as u64;
    let mut link = Resource::new(resources::notebook_uri(session.id), format!("notebook of {}", session.id));
    link.size = Some(size);
    link.mime_type = Some(resources::NOTEBOOK.to_owned());
    let mut told = json!({"session_id": session.id.to_string(), "size": size});
    let mut answer = match &path {
        None => structured(format!("The notebook has {size} bytes."), told),
        Some(path) => {
            let body = stream::iter([Ok::<_, Infallible>(notebook)]);
            let asked = Write { path: path.clone(), size: Some(size), ..Write::default() };
            call.service.write_file(&call.asked.who, session.id, asked, body).await?;
            told["path"] = json!(path);
            let mut answer = structured(format!("The notebook, of {size} bytes, is in \"{path}\"."), told);
            answer.content.push(files::link(session.id, path, size));
            answer
        }
    };
    answer.content.push(ContentBlock::resource_link(link));
    Ok(answer)
}
