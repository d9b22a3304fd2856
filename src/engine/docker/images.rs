//! Images: from a reference to the id of a content, with the policy that an image must meet.

use std::path::Path;
use std::time::Duration;

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::models::ImageInspect;
use bollard::query_parameters::CreateImageOptionsBuilder;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use futures_util::StreamExt;

use super::super::{EngineError, ImageInfo, Pull};
use super::client::{self, call};
use crate::engine::lockdown::LABEL_INSTANCE;

/// A whole pull.
const PULL: Duration = Duration::from_secs(30 * 60);
/// Between two signs of life of a pull.
const PULL_IDLE: Duration = Duration::from_secs(120);
/// The registry that a reference without one means, as credentials name it.
const DEFAULT_REGISTRY: &str = "https://index.docker.io/v1/";

const ATTEMPT: &str = "looking for an image";
const PULLING: &str = "pulling an image";

/// Finds an image, fetching it if that is allowed, and judges it.
pub(super) async fn resolve(
    docker: &Docker,
    credentials: Option<&Path>,
    architecture: &str,
    reference: &str,
    pull_if: Pull,
) -> Result<ImageInfo, EngineError> {
    let found = match inspect(docker, reference).await {
        Err(EngineError::Absent { .. }) if pull_if == Pull::Missing => {
            pull(docker, credentials, reference).await?;
            inspect(docker, reference).await?
        }
        other => other?,
    };
    accept(&found, architecture)
        .map_err(|why| EngineError::Rejected { attempt: ATTEMPT, detail: format!("{reference} {why}") })?;
    Ok(ImageInfo {
        id: found.id.unwrap_or_default(),
        reference: reference.to_owned(),
        size_bytes: found.size.and_then(|n| u64::try_from(n).ok()).unwrap_or(0),
        labels: found.config.and_then(|c| c.labels).unwrap_or_default().into_iter().collect(),
    })
}

async fn inspect(docker: &Docker, reference: &str) -> Result<ImageInspect, EngineError> {
    call(ATTEMPT, reference, client::INSPECT, docker.inspect_image(reference)).await
}

/// The policy. Entrypoint, command, user, working folder and health check need none: the lock overrides them all.
fn accept(image: &ImageInspect, engine_architecture: &str) -> Result<(), String> {
    let config = image.config.clone().unwrap_or_default();
    if image.id.as_deref().unwrap_or_default().is_empty() {
        return Err("has no id".to_owned());
    }
    if config.volumes.is_some_and(|v| !v.is_empty()) {
        // The engine would make a volume on its disk for each, past the read-only root.
        return Err("declares volumes, which would be writable space without a limit".to_owned());
    }
    if config.on_build.is_some_and(|v| !v.is_empty()) {
        return Err("has build triggers: it is meant to be built upon".to_owned());
    }
    if config.labels.is_some_and(|l| l.contains_key(LABEL_INSTANCE)) {
        // Containers inherit labels, and by this one cells are told from others.
        return Err(format!("carries the label {LABEL_INSTANCE}, as if it were a cell"));
    }
    let architecture = image.architecture.as_deref().unwrap_or_default();
    if canonical(architecture) != canonical(engine_architecture) {
        return Err(format!("is for {architecture}, the engine runs {engine_architecture}"));
    }
    Ok(())
}

/// The kernel's and the registries' names for one architecture.
fn canonical(architecture: &str) -> &str {
    match architecture {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

async fn pull(docker: &Docker, credentials: Option<&Path>, reference: &str) -> Result<(), EngineError> {
    let credentials = match credentials {
        Some(file) => read_credentials(file, registry_of(reference)).await?,
        None => None,
    };
    tracing::info!(image = reference, signed_in = credentials.is_some(), "pulling");
    let options = CreateImageOptionsBuilder::default().from_image(&with_tag(reference)).build();
    let mut progress = docker.create_image(Some(options), None, credentials);
    let whole = async {
        let mut last = String::new();
        loop {
            let Ok(step) = tokio::time::timeout(PULL_IDLE, progress.next()).await else {
                return Err(EngineError::TimedOut { attempt: PULLING, limit: PULL_IDLE });
            };
            let Some(step) = step else { return Ok(()) };
            let step = step.map_err(|error| refused_pull(reference, error))?;
            let status = step.status.unwrap_or_default();
            if status != last {
                tracing::info!(image = reference, layer = step.id.as_deref().unwrap_or(""), status, "pulling");
                last = status;
            }
        }
    };
    let limit = PULL;
    tokio::time::timeout(limit, whole).await.unwrap_or(Err(EngineError::TimedOut { attempt: PULLING, limit }))
}

/// A registry's refusal arrives in the stream, or as an internal error of the engine.
fn refused_pull(reference: &str, error: bollard::errors::Error) -> EngineError {
    match error {
        bollard::errors::Error::DockerStreamError { error } => {
            EngineError::Rejected { attempt: PULLING, detail: error }
        }
        other => match client::classify(PULLING, reference, other) {
            EngineError::Unexpected { attempt, detail } => EngineError::Rejected { attempt, detail },
            classified => classified,
        },
    }
}

/// Without a tag the engine would pull all of them.
fn with_tag(reference: &str) -> String {
    let name = reference.rsplit('/').next().unwrap_or(reference);
    if name.contains([':', '@']) { reference.to_owned() } else { format!("{reference}:latest") }
}

/// The registry that a reference names, as `docker login` writes it down.
fn registry_of(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => DEFAULT_REGISTRY,
    }
}

/// The operator's credentials for a registry, if there are any. May run a credential helper, which can take its time.
async fn read_credentials(file: &Path, registry: &str) -> Result<Option<DockerCredentials>, EngineError> {
    let rejected =
        |detail: String| EngineError::Rejected { attempt: "reading the operator's registry credentials", detail };
    let text = match tokio::fs::read(file).await {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(rejected(error.to_string())),
    };
    let server = registry.to_owned();
    let found =
        tokio::task::spawn_blocking(move || docker_credential::get_credential_from_reader(text.as_slice(), &server));
    let mut credentials =
        DockerCredentials { serveraddress: Some(registry.to_owned()), ..DockerCredentials::default() };
    match found.await.map_err(|error| rejected(error.to_string()))? {
        Ok(DockerCredential::UsernamePassword(name, password)) => {
            credentials.username = Some(name);
            credentials.password = Some(password);
        }
        Ok(DockerCredential::IdentityToken(token)) => credentials.identitytoken = Some(token),
        Err(CredentialRetrievalError::NoCredentialConfigured) => return Ok(None),
        Err(error) => return Err(rejected(error.to_string())),
    }
    Ok(Some(credentials))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bollard::models::ImageConfig;

    fn image(config: ImageConfig) -> ImageInspect {
        ImageInspect {
            id: Some("sha256:0".to_owned()),
            architecture: Some("amd64".to_owned()),
            config: Some(config),
            ..ImageInspect::default()
        }
    }

    #[test]
    fn an_image_that_would_open_a_lock_is_refused() {
        assert_eq!(accept(&image(ImageConfig::default()), "x86_64"), Ok(()));
        assert!(accept(&image(ImageConfig::default()), "aarch64").is_err());
        let volumes = ImageConfig { volumes: Some(vec!["/data".to_owned()]), ..ImageConfig::default() };
        assert!(accept(&image(volumes), "x86_64").is_err());
        let triggers = ImageConfig { on_build: Some(vec!["RUN x".to_owned()]), ..ImageConfig::default() };
        assert!(accept(&image(triggers), "x86_64").is_err());
        let labels = Some([(LABEL_INSTANCE.to_owned(), String::new())].into());
        assert!(accept(&image(ImageConfig { labels, ..ImageConfig::default() }), "x86_64").is_err());
    }

    #[test]
    fn references_are_taken_apart_as_docker_does() {
        assert_eq!(registry_of("python"), DEFAULT_REGISTRY);
        assert_eq!(registry_of("cellblock/python:1"), DEFAULT_REGISTRY);
        assert_eq!(registry_of("localhost/x"), "localhost");
        assert_eq!(registry_of("127.0.0.1:5000/a/b@sha256:0"), "127.0.0.1:5000");
        assert_eq!(with_tag("127.0.0.1:5000/a"), "127.0.0.1:5000/a:latest");
        assert_eq!(with_tag("a:1"), "a:1");
        assert_eq!(with_tag("a@sha256:0"), "a@sha256:0");
    }
}
