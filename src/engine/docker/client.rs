//! The connection to the engine: a time limit on every call, and the one place where Docker's errors become ours.
//!
//! It knows nothing of cells.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use bollard::errors::Error;
use bollard::{API_DEFAULT_VERSION, ClientVersion, Docker};

use super::super::EngineError;

/// Is it there?
pub(super) const PING: Duration = Duration::from_secs(2);
/// Reading.
pub(super) const INSPECT: Duration = Duration::from_secs(5);
/// Making a container or a volume.
pub(super) const CREATE: Duration = Duration::from_secs(10);
/// Starting a container.
pub(super) const START: Duration = Duration::from_secs(20);
/// Freezing a container, or thawing it.
pub(super) const PAUSE: Duration = Duration::from_secs(10);
/// Ending and removing one.
pub(super) const REMOVE: Duration = Duration::from_secs(20);
/// Opening a stream: while another one is open, the engine never answers.
pub(super) const ATTACH: Duration = Duration::from_secs(5);
/// Bytes to or from a volume.
pub(super) const ARCHIVE: Duration = Duration::from_secs(60);

/// The library's own limit, far above ours: it covers the head of an answer only.
const LIBRARY_LIMIT_SECONDS: u64 = 3600;

/// Docker Engine 20.10.
const OLDEST_API: ClientVersion = ClientVersion { major_version: 1, minor_version: 41 };

/// Where the engine listens when nothing is said.
pub(super) const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

/// Connects and agrees on a version of the API.
pub(super) async fn connect(host: Option<&str>, tls: Option<&PathBuf>) -> Result<Docker, EngineError> {
    const ATTEMPT: &str = "connecting to the engine";
    let docker = dial(host.unwrap_or(DEFAULT_HOST), tls).map_err(|e| classify(ATTEMPT, "the engine", e))?;
    let docker = docker.with_request_modifier(with_url_safe_credentials);
    let docker = call(ATTEMPT, "the engine", PING, docker.negotiate_version()).await?;
    let version = docker.client_version();
    if (version.major_version, version.minor_version) < (OLDEST_API.major_version, OLDEST_API.minor_version) {
        let detail = format!("its API is {version}; the oldest one that works here is {OLDEST_API}");
        return Err(EngineError::Rejected { attempt: ATTEMPT, detail });
    }
    Ok(docker)
}

fn dial(host: &str, tls: Option<&PathBuf>) -> Result<Docker, Error> {
    let scheme = host.split_once("://").map_or("", |(scheme, _)| scheme);
    match (scheme, tls) {
        ("unix", _) => Docker::connect_with_unix(host, LIBRARY_LIMIT_SECONDS, API_DEFAULT_VERSION),
        ("tcp" | "https", Some(folder)) => Docker::connect_with_ssl(
            host,
            &folder.join("key.pem"),
            &folder.join("cert.pem"),
            &folder.join("ca.pem"),
            LIBRARY_LIMIT_SECONDS,
            API_DEFAULT_VERSION,
        ),
        ("tcp" | "http", None) => Docker::connect_with_http(host, LIBRARY_LIMIT_SECONDS, API_DEFAULT_VERSION),
        _ => Err(Error::UnsupportedURISchemeError { uri: host.to_owned() }),
    }
}

/// The engine reads credentials in the URL's alphabet of base 64 and takes others for none; the library writes the other one.
fn with_url_safe_credentials(mut request: bollard::BollardRequest) -> bollard::BollardRequest {
    if let Some(value) = request.headers_mut().get_mut("x-registry-auth")
        && let Ok(safe) = value.to_str().unwrap_or_default().replace('+', "-").replace('/', "_").parse()
    {
        *value = safe;
        value.set_sensitive(true);
    }
    request
}

/// One call with its limit. `what` names the thing that an answer of 404 says is not there.
pub(super) async fn call<T>(
    attempt: &'static str,
    what: &str,
    limit: Duration,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, EngineError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer.map_err(|error| classify(attempt, what, error)),
        Err(_) => Err(EngineError::TimedOut { attempt, limit }),
    }
}

/// What an error of the engine or of the way to it means for us.
pub(super) fn classify(attempt: &'static str, what: &str, error: Error) -> EngineError {
    match error {
        Error::DockerResponseServerError { status_code, message: detail } => match status_code {
            404 => EngineError::Absent { attempt, what: what.to_owned() },
            409 => EngineError::Conflict { attempt, detail },
            400..=499 => EngineError::Rejected { attempt, detail },
            503 => EngineError::Unavailable { attempt, detail },
            _ => EngineError::Unexpected { attempt, detail },
        },
        Error::RequestTimeoutError => {
            EngineError::TimedOut { attempt, limit: Duration::from_secs(LIBRARY_LIMIT_SECONDS) }
        }
        Error::SocketNotFoundError(_)
        | Error::IOError { .. }
        | Error::HyperResponseError { .. }
        | Error::HyperLegacyError { .. } => EngineError::Unavailable { attempt, detail: whole_story(&error) },
        Error::UnsupportedURISchemeError { .. }
        | Error::CertPathError { .. }
        | Error::CertParseError { .. }
        | Error::CertMultipleKeys { .. } => EngineError::Rejected { attempt, detail: error.to_string() },
        error => EngineError::Unexpected { attempt, detail: whole_story(&error) },
    }
}

/// An error with its sources: "client error (Connect)" alone helps nobody.
fn whole_story(error: &dyn std::error::Error) -> String {
    let mut story = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !story.contains(&text) {
            story = format!("{story}: {text}");
        }
        source = cause.source();
    }
    story
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(status_code: u16) -> EngineError {
        let message = "words".to_owned();
        classify("trying", "the thing", Error::DockerResponseServerError { status_code, message })
    }

    #[test]
    fn answers_are_told_apart() {
        assert!(matches!(answered(404), EngineError::Absent { what, .. } if what == "the thing"));
        assert!(matches!(answered(409), EngineError::Conflict { detail, .. } if detail == "words"));
        assert!(matches!(answered(400), EngineError::Rejected { .. }));
        assert!(matches!(answered(500), EngineError::Unexpected { .. }));
    }

    #[tokio::test]
    async fn a_host_that_is_not_there_is_unavailable_and_a_strange_one_rejected() {
        let absent = connect(Some("unix:///nonexistent/docker.sock"), None).await;
        assert!(matches!(absent, Err(EngineError::Unavailable { .. })), "{absent:?}");
        let strange = connect(Some("gopher://x"), None).await;
        assert!(matches!(strange, Err(EngineError::Rejected { .. })), "{strange:?}");
    }

    #[tokio::test]
    async fn no_call_waits_for_ever() {
        let limit = Duration::from_millis(10);
        let outcome = call::<()>("waiting", "", limit, std::future::pending()).await;
        assert_eq!(outcome, Err(EngineError::TimedOut { attempt: "waiting", limit }));
    }
}
