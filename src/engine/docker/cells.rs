//! Cells as containers: made, attached to, looked at, removed. Each function is one idempotent step by name.
//!
//! What a container looks like is [`lockdown`](crate::engine::lockdown)'s business.

use std::collections::HashMap;
use std::time::Duration;

use bollard::Docker;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerStateStatusEnum, ContainerSummary,
    ContainerSummaryStateEnum,
};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, ListContainersOptionsBuilder,
    RemoveContainerOptionsBuilder,
};
use tokio::time::Instant;

use super::super::{ByteStream, CellName, CellState, EngineError, Observed, Promised};
use super::client::{self, call};
use super::stream::AttachStream;
use crate::engine::lockdown::{
    LABEL_CPU, LABEL_INSTANCE, LABEL_MEMORY, LABEL_ROLE, LABEL_SESSION, LABEL_UID, ROLE_CELL,
};

/// Makes a container and returns the engine's warnings.
pub(super) async fn create(
    docker: &Docker,
    name: &CellName,
    body: ContainerCreateBody,
) -> Result<Vec<String>, EngineError> {
    let image = body.image.clone().unwrap_or_default();
    let options = CreateContainerOptionsBuilder::default().name(name.as_str()).build();
    let answer = docker.create_container(Some(options), body);
    Ok(call("creating a cell", &format!("image {image}"), client::CREATE, answer).await?.warnings)
}

/// Starts a container; one that runs already is left alone.
pub(super) async fn start(docker: &Docker, name: &CellName) -> Result<(), EngineError> {
    call("starting a cell", name.as_str(), client::START, docker.start_container(name.as_str(), None)).await
}

/// Opens a container's stdin and stdout. Stderr stays closed: it would block the cell when nobody reads it.
pub(super) async fn attach(docker: &Docker, name: &CellName) -> Result<ByteStream, EngineError> {
    let options = AttachContainerOptionsBuilder::default().stream(true).stdin(true).stdout(true).build();
    let answer = docker.attach_container(name.as_str(), Some(options));
    let attached = call("attaching to a cell", name.as_str(), client::ATTACH, answer).await?;
    Ok(Box::new(AttachStream::new(attached)))
}

/// Freezes a running container; one that is frozen is left alone.
pub(super) async fn pause(docker: &Docker, name: &CellName) -> Result<(), EngineError> {
    const ATTEMPT: &str = "pausing a cell";
    if is_paused(docker, name, ATTEMPT).await? {
        return Ok(());
    }
    let paused = call(ATTEMPT, name.as_str(), client::PAUSE, docker.pause_container(name.as_str())).await;
    settled(docker, name, paused, CellState::Paused).await
}

/// Thaws a frozen container; one that runs is left alone.
pub(super) async fn unpause(docker: &Docker, name: &CellName) -> Result<(), EngineError> {
    const ATTEMPT: &str = "resuming a cell";
    if !is_paused(docker, name, ATTEMPT).await? {
        return Ok(());
    }
    let resumed = call(ATTEMPT, name.as_str(), client::PAUSE, docker.unpause_container(name.as_str())).await;
    settled(docker, name, resumed, CellState::Running).await
}

/// Whether a live container is frozen.
async fn is_paused(docker: &Docker, name: &CellName, attempt: &'static str) -> Result<bool, EngineError> {
    match state(&inspect(docker, name).await?) {
        CellState::Paused => Ok(true),
        CellState::Running => Ok(false),
        state => Err(EngineError::Conflict { attempt, detail: format!("{name} does not run: {state:?}") }),
    }
}

/// What became of a change of state: another may have made it first, which the engine refuses in words of its own.
async fn settled(
    docker: &Docker,
    name: &CellName,
    outcome: Result<(), EngineError>,
    wanted: CellState,
) -> Result<(), EngineError> {
    match outcome {
        Err(EngineError::Conflict { .. } | EngineError::Unexpected { .. })
            if state(&inspect(docker, name).await?) == wanted =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

/// Everything the engine says of a container.
pub(super) async fn inspect(docker: &Docker, name: &CellName) -> Result<ContainerInspectResponse, EngineError> {
    call("inspecting a cell", name.as_str(), client::INSPECT, docker.inspect_container(name.as_str(), None)).await
}

/// Removes a container with all that is in it, and waits until it is not there any more.
pub(super) async fn remove(docker: &Docker, name: &CellName) -> Result<(), EngineError> {
    const ATTEMPT: &str = "removing a cell";
    let deadline = Instant::now() + client::REMOVE;
    let mut pause = Duration::from_millis(10);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(EngineError::TimedOut { attempt: ATTEMPT, limit: client::REMOVE });
        }
        // With force, the engine kills first, whatever the container does, paused or not.
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let removal = call(ATTEMPT, name.as_str(), left, docker.remove_container(name.as_str(), Some(options))).await;
        match removal {
            // A conflict is a removal that is under way already. An error inside may leave nothing, or need another try.
            Ok(())
            | Err(EngineError::Absent { .. } | EngineError::Conflict { .. } | EngineError::Unexpected { .. }) => {}
            Err(error) => return Err(error),
        }
        if let Err(EngineError::Absent { .. }) = inspect(docker, name).await {
            return Ok(());
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

/// All cells with these labels, and the uid each was given.
pub(super) async fn list(docker: &Docker, labels: Vec<String>) -> Result<Vec<ContainerSummary>, EngineError> {
    let filters = HashMap::from([("label", labels)]);
    let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    call("listing cells", "cells", client::INSPECT, docker.list_containers(Some(options))).await
}

/// The filter that finds an instance's cells and nothing else.
pub(super) fn labels_of(instance: &str) -> Vec<String> {
    vec![format!("{LABEL_INSTANCE}={instance}"), format!("{LABEL_ROLE}={ROLE_CELL}")]
}

/// A listed container's name.
pub(super) fn listed_name(summary: &ContainerSummary) -> Option<CellName> {
    let name = summary.names.iter().flatten().next()?;
    Some(CellName::listed(name.trim_start_matches('/').to_owned()))
}

/// A listed container's uid, from its label.
pub(super) fn listed_uid(summary: &ContainerSummary) -> Option<u32> {
    summary.labels.as_ref()?.get(LABEL_UID)?.parse().ok()
}

/// A listed container's state, if the list tells it all.
pub(super) fn listed(summary: &ContainerSummary) -> Option<Observed> {
    let state = match summary.state? {
        ContainerSummaryStateEnum::CREATED => CellState::Created,
        ContainerSummaryStateEnum::RUNNING => CellState::Running,
        ContainerSummaryStateEnum::PAUSED => CellState::Paused,
        _ => return None,
    };
    Some(labelled(listed_name(summary)?, state, |label| summary.labels.as_ref()?.get(label).map(String::as_str)))
}

/// A cell, with what its labels say of it.
fn labelled<'a>(name: CellName, state: CellState, label: impl Fn(&str) -> Option<&'a str>) -> Observed {
    let session = label(LABEL_SESSION).and_then(|s| s.parse().ok());
    let number = |name| label(name)?.parse::<u64>().ok();
    let promised = number(LABEL_CPU)
        .zip(number(LABEL_MEMORY))
        .and_then(|(cpu, memory_bytes)| Some(Promised { cpu_millis: u32::try_from(cpu).ok()?, memory_bytes }));
    Observed { name, session, state, promised }
}

/// One label of an inspected container.
pub(super) fn label<'a>(inspected: &'a ContainerInspectResponse, name: &str) -> Option<&'a str> {
    inspected.config.as_ref()?.labels.as_ref()?.get(name).map(String::as_str)
}

/// An inspected container as a cell.
pub(super) fn observed(name: &CellName, inspected: &ContainerInspectResponse) -> Observed {
    labelled(name.clone(), state(inspected), |name| label(inspected, name))
}

fn state(inspected: &ContainerInspectResponse) -> CellState {
    let state = inspected.state.clone().unwrap_or_default();
    match state.status {
        Some(ContainerStateStatusEnum::CREATED) => CellState::Created,
        Some(ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::RESTARTING) => CellState::Running,
        Some(ContainerStateStatusEnum::PAUSED) => CellState::Paused,
        _ => CellState::Exited { status: state.exit_code.unwrap_or(-1), oom: state.oom_killed.unwrap_or(false) },
    }
}
