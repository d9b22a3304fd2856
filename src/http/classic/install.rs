//! A package of a user: installed by the service under the template's policy, then imported in the kernel under its own names. Decides nothing about what may be installed.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::asking::{Asking, Refusal};
use super::body::Json;
use super::run::{ended, failure};
use super::sessions::ready;
use crate::http::extract::Answer;
use crate::service::packages::{Install, InstallEvent, Installed};
use crate::service::{Error, ExecuteRequest};
use crate::session::Session;

/// The end of pip's output that is answered, in bytes.
const MAX_OUTPUT: usize = 64 * 1024;

/// Imports what a distribution has under its own names, which need not be its own: `scikit-learn` is `sklearn`. What has none that can be found is imported by the
/// distribution's name. No name stays but those of the modules.
const IMPORT: &str = r#"
def _cellblock_import(wanted):
    import importlib, importlib.metadata, re
    importlib.invalidate_caches()
    plain = lambda name: re.sub(r"[-_.]+", "_", name).lower()
    owners = importlib.metadata.packages_distributions()
    names = [name for name, of in owners.items() if name.isidentifier() and not name.startswith("_") and plain(wanted) in map(plain, of)]
    for name in names or [wanted.replace("-", "_")]:
        globals()[name] = importlib.import_module(name)
try:
    _cellblock_import(WANTED)
finally:
    del _cellblock_import
"#;

/// Installs a package and imports it.
pub(super) async fn install_package(asking: Asking, body: Json) -> Result<Response, Refusal> {
    let (user, package) = body.user_and("package_name")?;
    asking.who.require_sessions()?;
    let session = ready(&asking, &user).await?;
    let asked = std::slice::from_ref(&package);
    let install = asking.app.service.install_packages(&asking.who, session.id, (asked, false)).await;
    let mut install = install.map_err(|error| match error {
        error @ Error::SpecRejected(_) => Refusal::from(error).with_status(StatusCode::FORBIDDEN),
        error => error.into(),
    })?;
    let (output, installed) = follow(&mut install).await?;
    if let Some(failure) = installed.failure {
        return Err(Error::InstallFailed(format!("Failed to install {package}: {failure}")).into());
    }
    if let Some(failed) = import(&asking, &session, &package).await? {
        return Ok(failed);
    }
    let message = format!("Successfully installed and imported {package}");
    Ok(Answer(json!({"message": message, "output": output})).into_response())
}

/// Waits for the end of an installation; the end of its output too.
async fn follow(install: &mut Install) -> Result<(String, Installed), Refusal> {
    let mut output = Vec::new();
    while let Some(event) = install.next().await? {
        match event {
            InstallEvent::Output(_, _, bytes) => output.extend_from_slice(&bytes),
            InstallEvent::Gap(..) => output.clear(),
            InstallEvent::Done(_, installed) => return Ok((text(&output), installed)),
        }
        if output.len() > 2 * MAX_OUTPUT {
            output.drain(..output.len() - MAX_OUTPUT);
        }
    }
    Err(Error::GuestUnreachable.into())
}

/// What pip has said. The last line is for programs, and not its.
fn text(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(&output[output.len().saturating_sub(MAX_OUTPUT)..]);
    text.split_inclusive('\n').filter(|line| !line.starts_with("{\"added\":")).collect()
}

/// Imports it; nothing is answered if that went well.
async fn import(asking: &Asking, session: &Session, package: &str) -> Result<Option<Response>, Refusal> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name = package.split(|c| !is_of_name(c)).next().unwrap_or_default();
    // A JSON text of such characters is one of Python's.
    let code = IMPORT.replace("WANTED", &Value::from(name).to_string());
    let request = ExecuteRequest { code, silent: true, store_history: Some(false), ..ExecuteRequest::default() };
    let execution = asking.app.service.execute(&asking.who, session.id, request, None).await?;
    ended(&execution).await?;
    let Some(error) = execution.outcome().error else { return failure(&execution) };
    let detail = format!("{package} was installed, but can't be imported: {}: {}", error.name, error.value);
    Ok(Some((StatusCode::INTERNAL_SERVER_ERROR, Answer(json!({"detail": detail}))).into_response()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pip_has_said_is_told_and_bounded() {
        assert_eq!(text(b"Collecting x\n{\"added\": []}\n"), "Collecting x\n");
        assert_eq!(text(&vec![b'x'; 3 * MAX_OUTPUT]).len(), MAX_OUTPUT);
    }
}
