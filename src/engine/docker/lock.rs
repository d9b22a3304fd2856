//! Whose an instance's name is: a container that is never started and says so in a label. The engine gives a name once, so two installations can't both
//! have made it.
//!
//! It knows nothing of cells, and what is done without the name is not decided here.

use std::collections::HashMap;
use std::time::Duration;

use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::ListImagesOptionsBuilder;
use tokio::time::Instant;

use super::super::EngineError;
use super::client::{self, call};
use super::{cells, never_started};
use crate::domain::ids::InstallationId;
use crate::engine::lockdown::{LABEL_INSTALLATION, LABEL_INSTANCE, LABEL_ROLE, ROLE_LOCK};

const ATTEMPT: &str = "taking the instance's name";
/// The engine gives a name away some time before it shows what has it.
const UNSEEN: Duration = client::CREATE;

/// The lock of one instance.
#[derive(Debug)]
pub(super) struct Lock {
    instance: String,
    name: String,
    remedy: String,
}

impl Lock {
    /// `host` is where the engine is, if that is not the usual place.
    pub(super) fn new(instance: &str, host: Option<&str>) -> Self {
        let name = format!("cellblock-{instance}-lock");
        let host = host.filter(|host| *host != client::DEFAULT_HOST);
        let remedy = match host {
            Some(host) => format!("docker --host {host} rm {name}"),
            None => format!("docker rm {name}"),
        };
        Self { instance: instance.to_owned(), name, remedy }
    }

    /// Takes it, or finds that this installation has it. `image` is one that the engine has; without it, any other is looked for.
    pub(super) async fn claim(
        &self,
        docker: &Docker,
        installation: InstallationId,
        image: Option<String>,
    ) -> Result<(), EngineError> {
        let (began, mut pause) = (Instant::now(), Duration::from_millis(10));
        loop {
            if let Some(found) = self.look(docker).await? {
                return self.judge(&found, installation);
            }
            let image = match &image {
                Some(image) => image.clone(),
                None => any_image(docker).await?,
            };
            let labels = [
                (LABEL_INSTANCE, self.instance.clone()),
                (LABEL_ROLE, ROLE_LOCK.to_owned()),
                (LABEL_INSTALLATION, installation.to_string()),
            ];
            let labels: HashMap<_, _> = labels.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            match never_started::create(docker, ATTEMPT, &self.name, &image, labels, vec![]).await {
                Ok(_) => return Ok(()),
                // Another is quicker. Whose it is shows soon, unless that one fails or goes.
                Err(EngineError::Conflict { .. }) if began.elapsed() < UNSEEN => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(500));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives it back, unless it is another's.
    pub(super) async fn release(&self, docker: &Docker, installation: InstallationId) -> Result<(), EngineError> {
        let Some(found) = self.look(docker).await? else { return Ok(()) };
        match (self.judge(&found, installation), found.id) {
            // By its id: whoever takes the name at this moment keeps it.
            (Ok(()), Some(id)) => never_started::remove(docker, "giving the instance's name back", &id).await,
            _ => Ok(()),
        }
    }

    async fn look(&self, docker: &Docker) -> Result<Option<ContainerInspectResponse>, EngineError> {
        match call(ATTEMPT, &self.name, client::INSPECT, docker.inspect_container(&self.name, None)).await {
            Ok(found) => Ok(Some(found)),
            Err(EngineError::Absent { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn judge(&self, found: &ContainerInspectResponse, installation: InstallationId) -> Result<(), EngineError> {
        let holder = cells::label(found, LABEL_INSTALLATION).and_then(|id| id.parse().ok());
        if holder == Some(installation) {
            return Ok(());
        }
        Err(EngineError::Claimed { holder, remedy: self.remedy.clone() })
    }
}

async fn any_image(docker: &Docker) -> Result<String, EngineError> {
    let options = ListImagesOptionsBuilder::default().build();
    let images = call(ATTEMPT, "images", client::INSPECT, docker.list_images(Some(options))).await?;
    let any = images.into_iter().next().map(|image| image.id);
    any.ok_or(EngineError::Absent { attempt: ATTEMPT, what: "any image".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_reaches_the_engine_that_is_meant() {
        let remedy = |host| Lock::new("one", host).remedy;
        assert_eq!(remedy(None), "docker rm cellblock-one-lock");
        assert_eq!(remedy(Some(client::DEFAULT_HOST)), "docker rm cellblock-one-lock");
        assert_eq!(remedy(Some("tcp://far:2376")), "docker --host tcp://far:2376 rm cellblock-one-lock");
    }
}
