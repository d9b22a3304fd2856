//! Containers that are made and never started: what one is made of, and how it is made and removed.
//!
//! What one is good for is its maker's business: a way into a volume, or a name that is taken.

use std::collections::HashMap;

use bollard::Docker;
use bollard::models::{ContainerCreateBody, HostConfig, Mount};
use bollard::query_parameters::{CreateContainerOptionsBuilder, RemoveContainerOptionsBuilder};
use cellblock_wire::link::GUEST_PATH;

use super::super::EngineError;
use super::client::{self, call};

/// Makes one, and answers with its id. A name that is taken is a [`EngineError::Conflict`].
pub(super) async fn create(
    docker: &Docker,
    attempt: &'static str,
    name: &str,
    image: &str,
    labels: HashMap<String, String>,
    mounts: Vec<Mount>,
) -> Result<String, EngineError> {
    let body = ContainerCreateBody {
        image: Some(image.to_owned()),
        // It is never started; if somebody else does, it has nothing but the guest, which finds no link and ends.
        entrypoint: Some(vec![GUEST_PATH.to_owned()]),
        user: Some("65534:65534".to_owned()),
        network_disabled: Some(true),
        labels: Some(labels),
        host_config: Some(HostConfig {
            network_mode: Some("none".to_owned()),
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
            mounts: Some(mounts),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    };
    let options = CreateContainerOptionsBuilder::default().name(name).build();
    let answer = docker.create_container(Some(options), body);
    Ok(call(attempt, &format!("image {image}"), client::CREATE, answer).await?.id)
}

/// Removes one. One that is not there is removed.
pub(super) async fn remove(docker: &Docker, attempt: &'static str, id: &str) -> Result<(), EngineError> {
    let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
    match call(attempt, id, client::REMOVE, docker.remove_container(id, Some(options))).await {
        Ok(()) | Err(EngineError::Absent { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
