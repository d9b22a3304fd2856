//! Packages over HTTP: installing them, as one JSON answer, as server-sent events or as lines of JSON, and what is installed.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::stream::{Format, write};
use crate::domain::ids::SessionId;
use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Id, Params};
use crate::http::problem::Problem;
use crate::service::Error;
use crate::service::commands::stream_word;
use crate::service::packages::{Install, InstallEvent, Installed, Package};

/// Packages that are to be installed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InstallPackages {
    /// 1 to 64 names, with extras and versions or without: `polars`, `numpy>=2,<3`, `httpx[http2]==0.28.1`. No URLs, paths, options, markers or spaces.
    packages: Vec<String>,
    /// Take the newest version of those that are there already.
    #[serde(default)]
    upgrade: bool,
}

/// A package.
#[derive(Debug, Serialize, ToSchema)]
pub struct PackageView {
    /// Its name.
    name: String,
    /// Its version.
    version: String,
}

/// An installation that has succeeded.
#[derive(Debug, Serialize, ToSchema)]
pub struct InstallView {
    /// What was added, with what it needs; nothing where all was there.
    added: Vec<PackageView>,
    /// How long it took.
    duration_ms: u64,
    /// The command that it ran as: `GET …/commands/{command_id}` has its output.
    command_id: String,
}

/// What is installed in a session.
#[derive(Debug, Serialize, ToSchema)]
pub struct PackageList {
    /// By name.
    packages: Vec<InstalledPackage>,
}

/// A package that is installed.
#[derive(Debug, Serialize, ToSchema)]
pub struct InstalledPackage {
    /// Its name.
    name: String,
    /// Its version.
    version: String,
    /// `session` if the session has installed it, `image` if its image has it.
    source: String,
}

fn views(added: Vec<Package>) -> Vec<PackageView> {
    added.into_iter().map(|Package { name, version, .. }| PackageView { name, version }).collect()
}

/// Install packages
///
/// From the server's index into the session's own environment, under its template's policy; never over what the image has, and from wheels only. Running
/// kernels can import them at once. With `Accept: text/event-stream` or `application/x-ndjson`, with its progress, of which `install.completed` is the last event.
#[utoipa::path(post, path = "/v1/sessions/{id}/packages", operation_id = "install_packages", tag = "packages",
    params(("id" = String, Path)), request_body = InstallPackages,
    responses((status = 200, body = InstallView), (status = 422, body = Problem, description = "`install-failed`, or a name that is not allowed"),
        (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn install_packages(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    headers: HeaderMap,
    Body(body): Body<InstallPackages>,
) -> Result<Response, Problem> {
    let mut install = app.service.install_packages(&who, id, (&body.packages, body.upgrade)).await?;
    if let Some(format) = Format::wanted(&headers) {
        return Ok(write(events(install), format));
    }
    let Installed { added, duration, failure } = install.finish().await?;
    if let Some(failure) = failure {
        return Err(Error::InstallFailed(failure).into());
    }
    let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Ok(Answer(InstallView { added: views(added), duration_ms, command_id: install.command().to_string() })
        .into_response())
}

/// What an event says beside its type and number.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Said {
    Text {
        text: String,
    },
    Truncated {
        bytes: u64,
    },
    Completed {
        status: &'static str,
        added: Vec<PackageView>,
        duration_ms: u64,
        detail: Option<String>,
        command_id: String,
    },
}

fn events(install: Install) -> impl Stream<Item = (u64, &'static str, impl Serialize)> {
    stream::unfold(install, |mut install| async move {
        // A stream that breaks off without an end says that nobody knows.
        let event = install.next().await.ok()??;
        let told = match event {
            InstallEvent::Output(seq, stream, bytes) => {
                (seq, stream_word(stream), Said::Text { text: String::from_utf8_lossy(&bytes).into_owned() })
            }
            InstallEvent::Gap(seq, bytes) => (seq, "output.truncated", Said::Truncated { bytes }),
            InstallEvent::Done(seq, Installed { added, duration, failure }) => {
                let said = Said::Completed {
                    status: if failure.is_some() { "failed" } else { "ok" },
                    added: views(added),
                    duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
                    detail: failure,
                    command_id: install.command().to_string(),
                };
                (seq, "install.completed", said)
            }
        };
        Some((told, install))
    })
}

/// List packages
///
/// Those of the image and those that the session has installed, as its Python tells of them.
#[utoipa::path(get, path = "/v1/sessions/{id}/packages", operation_id = "list_packages", tag = "packages",
    params(("id" = String, Path)), responses((status = 200, body = PackageList), (status = "4XX", body = Problem)))]
pub async fn list_packages(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
) -> Result<Answer<PackageList>, Problem> {
    params.only(&[])?;
    let packages = app.service.packages(&who, id).await?.into_iter();
    let packages =
        packages.map(|Package { name, version, source }| InstalledPackage { name, version, source }).collect();
    Ok(Answer(PackageList { packages }))
}
