//! Filling a volume: through a container that mounts it, is never started, and is removed whatever happens. What is filled in is its caller's business.

use std::collections::{BTreeSet, HashMap};

use bollard::Docker;
use bollard::models::{Mount, MountType, MountVolumeOptions, Volume, VolumeCreateRequest};
use bollard::query_parameters::{ListContainersOptionsBuilder, ListVolumesOptionsBuilder, RemoveVolumeOptionsBuilder};

use super::super::EngineError;
use super::client::{self, call};
use super::{cells, never_started};
use crate::engine::lockdown::{LABEL_INSTANCE, LABEL_ROLE};

/// How a kind of volume is filled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filling<'a> {
    /// What is attempted, for errors.
    pub(super) attempt: &'static str,
    /// Whose it is.
    pub(super) instance: &'a str,
    /// The role of the container.
    pub(super) helper_role: &'static str,
    /// Where the volume is mounted in it.
    pub(super) target: &'static str,
}

impl Filling<'_> {
    /// Labels of this instance with a role.
    pub(super) fn labels(&self, role: &str) -> HashMap<String, String> {
        labels(self.instance, role)
    }

    /// Does something with a container through which the volume can be written and read. `image` is any image that the engine has.
    pub(super) async fn through_a_helper<T>(
        &self,
        docker: &Docker,
        volume: &str,
        image: &str,
        fill: impl AsyncFnOnce(&str) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        // Processes that share an instance's name may do this at the same time, each with a helper of its own.
        let helper = format!("cellblock-{}-helper-{}", self.instance, uuid::Uuid::new_v4().simple());
        let mount = Mount {
            typ: Some(MountType::VOLUME),
            source: Some(volume.to_owned()),
            target: Some(self.target.to_owned()),
            read_only: Some(false),
            volume_options: Some(MountVolumeOptions { no_copy: Some(true), ..MountVolumeOptions::default() }),
            ..Mount::default()
        };
        let labels = self.labels(self.helper_role);
        let made = never_started::create(docker, self.attempt, &helper, image, labels, vec![mount]).await;
        let filled = match made {
            Ok(_) => fill(&helper).await,
            Err(error) => Err(error),
        };
        // Whatever happened, and heard of or not: the helper does not stay.
        let removed = never_started::remove(docker, self.attempt, &helper).await;
        let done = filled?;
        removed?;
        Ok(done)
    }

    /// Removes the helpers of one volume, whatever their age. Nobody may be at it.
    pub(super) async fn remove_helpers_of(&self, docker: &Docker, volume: &str) -> Result<(), EngineError> {
        let filters =
            HashMap::from([("label", filter(&self.labels(self.helper_role))), ("volume", vec![volume.to_owned()])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let listed = call(self.attempt, "helpers", client::INSPECT, docker.list_containers(Some(options))).await?;
        for id in listed.into_iter().filter_map(|helper| helper.id) {
            never_started::remove(docker, self.attempt, &id).await?;
        }
        Ok(())
    }

    /// The volumes that helpers have, of whatever process.
    pub(super) async fn in_hand(&self, docker: &Docker) -> Result<BTreeSet<String>, EngineError> {
        let helpers = cells::list(docker, filter(&self.labels(self.helper_role))).await?;
        let mounts = helpers.into_iter().flat_map(|helper| helper.mounts.unwrap_or_default());
        Ok(mounts.filter_map(|mount| mount.name).collect())
    }

    /// Removes helpers that a killed process left behind. One that is young may be another process's.
    pub(super) async fn remove_old_helpers(&self, docker: &Docker, seconds: i64) -> Result<(), EngineError> {
        let labels = self.labels(self.helper_role);
        let old = jiff::Timestamp::now().as_second() - seconds;
        for helper in cells::list(docker, filter(&labels)).await? {
            if let (Some(id), Some(true)) = (&helper.id, helper.created.map(|at| at < old)) {
                never_started::remove(docker, self.attempt, id).await?;
            }
        }
        Ok(())
    }
}

pub(super) fn labels(instance: &str, role: &str) -> HashMap<String, String> {
    HashMap::from([(LABEL_INSTANCE.to_owned(), instance.to_owned()), (LABEL_ROLE.to_owned(), role.to_owned())])
}

fn filter(labels: &HashMap<String, String>) -> Vec<String> {
    labels.iter().map(|(name, value)| format!("{name}={value}")).collect()
}

/// Makes a volume of this name; one that is there is answered with as it is, whoever made it.
pub(super) async fn create_volume(
    docker: &Docker,
    attempt: &'static str,
    name: &str,
    labels: HashMap<String, String>,
) -> Result<Volume, EngineError> {
    create_sized_volume(docker, attempt, name, labels, None).await
}

/// The same with a quota in bytes. An engine that can't enforce one makes no volume, and answers with [`EngineError::Unexpected`].
pub(super) async fn create_sized_volume(
    docker: &Docker,
    attempt: &'static str,
    name: &str,
    labels: HashMap<String, String>,
    quota_bytes: Option<u64>,
) -> Result<Volume, EngineError> {
    let request = VolumeCreateRequest {
        name: Some(name.to_owned()),
        driver: Some("local".to_owned()),
        driver_opts: quota_bytes.map(|bytes| HashMap::from([("size".to_owned(), bytes.to_string())])),
        labels: Some(labels),
        ..VolumeCreateRequest::default()
    };
    call(attempt, name, client::CREATE, docker.create_volume(request)).await
}

/// All volumes with these labels.
pub(super) async fn list_volumes(
    docker: &Docker,
    attempt: &'static str,
    labels: &HashMap<String, String>,
) -> Result<Vec<Volume>, EngineError> {
    let filters = HashMap::from([("label", filter(labels))]);
    let options = ListVolumesOptionsBuilder::default().filters(&filters).build();
    let listed = call(attempt, "volumes", client::INSPECT, docker.list_volumes(Some(options))).await?;
    Ok(listed.volumes.unwrap_or_default())
}

/// Removes a volume that no container has; says whether it is gone.
pub(super) async fn remove_volume(docker: &Docker, attempt: &'static str, name: &str) -> Result<bool, EngineError> {
    let options = RemoveVolumeOptionsBuilder::default().force(false).build();
    match call(attempt, name, client::REMOVE, docker.remove_volume(name, Some(options))).await {
        Ok(()) | Err(EngineError::Absent { .. }) => Ok(true),
        // Of a cell that lives: the next round tries again.
        Err(EngineError::Conflict { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}
