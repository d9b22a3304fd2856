//! Workspaces that outlive cells: a volume each, that belongs to a uid of its own. Who may have one, and for how long, is not decided here.
//!
//! Its uid stands in a label, which can't change, so it is reserved as long as the volume is there, whoever asks. The owner of the volume's own folder is set
//! through a container that is never started: as the one entry of an archive that is unpacked beside it, for the engine skips the entry `.`.

use std::collections::HashMap;

use bollard::Docker;
use bollard::models::Volume;
use bollard::query_parameters::{DownloadFromContainerOptionsBuilder, UploadToContainerOptionsBuilder};
use futures_util::StreamExt;

use super::super::{EngineError, WorkspaceName, WorkspaceVolume};
use super::client::{self, call};
use super::filling::{self, Filling};
use crate::engine::lockdown::{
    LABEL_INSTANCE, LABEL_ROLE, LABEL_UID, ROLE_QUOTA_TRIAL, ROLE_WORKSPACE, ROLE_WORKSPACE_HELPER,
};

pub(super) const ENSURE: &str = "making a workspace";
pub(super) const REMOVE: &str = "removing a workspace";
pub(super) const ATTACH: &str = "attaching a workspace to a cell";
const LIST: &str = "listing workspaces";
const TRY: &str = "trying whether volumes have quotas";

/// The name of the folder in which the volume is mounted in a container that sets its owner.
const FOLDER: &str = "cellblock-workspace";
/// The same with its path.
const TARGET: &str = "/cellblock-workspace";
/// Nobody but its owner looks into it.
const MODE: u32 = 0o700;
/// A helper is done in seconds; one of this age was left behind.
const OLD_SECONDS: i64 = 600;
/// Bytes of a header in an archive.
const HEADER: usize = 512;
/// A quota that is only tried.
const TRIED_BYTES: u64 = 1024 * 1024;

fn filling(instance: &str) -> Filling<'_> {
    Filling { attempt: ENSURE, instance, helper_role: ROLE_WORKSPACE_HELPER, target: TARGET }
}

/// The uid of a workspace, if it is there.
///
/// # Errors
/// [`EngineError::Conflict`] where something else has its name.
pub(super) async fn uid_of(
    docker: &Docker,
    attempt: &'static str,
    instance: &str,
    name: &WorkspaceName,
) -> Result<Option<u32>, EngineError> {
    let found = match call(attempt, name.as_str(), client::INSPECT, docker.inspect_volume(name.as_str())).await {
        Ok(found) => found,
        Err(EngineError::Absent { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    own_uid(&found, instance).map(Some).ok_or_else(|| not_ours(attempt, name))
}

/// Makes the volume of a workspace, whose uid it says. One that came to be there meanwhile is taken as it is.
pub(super) async fn create(
    docker: &Docker,
    instance: &str,
    name: &WorkspaceName,
    uid: u32,
    quota_bytes: Option<u64>,
) -> Result<u32, EngineError> {
    let mut labels = filling::labels(instance, ROLE_WORKSPACE);
    labels.insert(LABEL_UID.to_owned(), uid.to_string());
    let made = filling::create_sized_volume(docker, ENSURE, name.as_str(), labels, quota_bytes).await?;
    own_uid(&made, instance).ok_or_else(|| not_ours(ENSURE, name))
}

/// Gives a volume's own folder to its uid. Of a new one it is seen that it has got it: to say so the engine reads all names in the volume. `offset` is what is
/// added to a uid inside to have it outside.
pub(super) async fn give_to(
    docker: &Docker,
    instance: &str,
    name: &WorkspaceName,
    image: &str,
    (made, offset): (WorkspaceVolume, u32),
) -> Result<(), EngineError> {
    let uid = made.uid;
    let give = async |helper: &str| {
        let archive = folder_of(uid).map_err(|e| unexpected(&e.to_string()))?;
        let options = UploadToContainerOptionsBuilder::default().path("/").build();
        let upload = docker.upload_to_container(helper, Some(options), bollard::body_full(archive.into()));
        call(ENSURE, TARGET, client::ARCHIVE, upload).await?;
        if !made.is_new {
            return Ok(());
        }
        let outside = u64::from(uid.saturating_add(offset));
        match owner(docker, helper).await? {
            Some(found) if found == (outside, outside, MODE) => Ok(()),
            found => Err(unexpected(&format!("the folder of {name} is not its uid's, {outside}: found {found:?}"))),
        }
    };
    filling(instance).through_a_helper(docker, name.as_str(), image, give).await
}

/// An archive of one folder that belongs to a uid.
fn folder_of(uid: u32) -> std::io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    header.set_mode(MODE);
    header.set_uid(uid.into());
    header.set_gid(uid.into());
    header.set_mtime(0);
    builder.append_data(&mut header, format!("{FOLDER}/"), std::io::empty())?;
    builder.into_inner()
}

/// Uid, gid and mode of the volume's own folder: the first entry of an archive of it. What is in it is not read.
async fn owner(docker: &Docker, helper: &str) -> Result<Option<(u64, u64, u32)>, EngineError> {
    let options = DownloadFromContainerOptionsBuilder::default().path(TARGET).build();
    let mut download = docker.download_from_container(helper, Some(options));
    let first = async {
        let mut bytes = Vec::new();
        while bytes.len() < HEADER {
            let Some(piece) = download.next().await else { break };
            bytes.extend_from_slice(&piece?);
        }
        Ok(bytes)
    };
    let bytes = call(ENSURE, TARGET, client::ARCHIVE, first).await?;
    let header = bytes.first_chunk::<HEADER>().map(|first| tar::Header::from_byte_slice(first).clone());
    let read = |header: tar::Header| Some((header.uid().ok()?, header.gid().ok()?, header.mode().ok()? & 0o7777));
    Ok(header.filter(|header| header.entry_type().is_dir()).and_then(read))
}

/// Removes a workspace. One that a container has is a [`EngineError::Conflict`].
pub(super) async fn remove(docker: &Docker, instance: &str, name: &WorkspaceName) -> Result<(), EngineError> {
    if uid_of(docker, REMOVE, instance, name).await?.is_none() {
        return Ok(());
    }
    if filling::remove_volume(docker, REMOVE, name.as_str()).await? {
        return Ok(());
    }
    // Who was killed while it was being made has left the helper, which nobody is at any more: what is being made is not removed.
    filling(instance).remove_helpers_of(docker, name.as_str()).await?;
    if filling::remove_volume(docker, REMOVE, name.as_str()).await? {
        return Ok(());
    }
    Err(EngineError::Conflict { attempt: REMOVE, detail: format!("a cell has {name}") })
}

/// All of an instance.
pub(super) async fn list(docker: &Docker, instance: &str) -> Result<Vec<WorkspaceName>, EngineError> {
    let listed = filling::list_volumes(docker, LIST, &filling::labels(instance, ROLE_WORKSPACE)).await?;
    let names = listed.into_iter().map(|volume| WorkspaceName::listed(volume.name));
    // What carries our label under another name is nothing that anybody here could touch.
    Ok(names.filter(|name| name.id(instance).is_some()).collect())
}

/// Every workspace on the engine, whoever made it, with its uid.
pub(super) async fn uids(docker: &Docker) -> Result<Vec<(WorkspaceName, u32)>, EngineError> {
    let labels = HashMap::from([(LABEL_ROLE.to_owned(), ROLE_WORKSPACE.to_owned())]);
    let listed = filling::list_volumes(docker, LIST, &labels).await?;
    let with_uid = |volume: Volume| Some((volume.labels.get(LABEL_UID)?.parse().ok()?, volume.name));
    Ok(listed.into_iter().filter_map(with_uid).map(|(uid, name)| (WorkspaceName::listed(name), uid)).collect())
}

/// Workspaces that have this uid, whoever made them.
pub(super) async fn with_uid(docker: &Docker, uid: u32) -> Result<Vec<WorkspaceName>, EngineError> {
    let labels =
        HashMap::from([(LABEL_ROLE.to_owned(), ROLE_WORKSPACE.to_owned()), (LABEL_UID.to_owned(), uid.to_string())]);
    let listed = filling::list_volumes(docker, LIST, &labels).await?;
    Ok(listed.into_iter().map(|volume| WorkspaceName::listed(volume.name)).collect())
}

/// Removes what a killed process has left of its helpers and trials.
pub(super) async fn sweep(docker: &Docker, instance: &str) -> Result<(), EngineError> {
    filling(instance).remove_old_helpers(docker, OLD_SECONDS).await?;
    for volume in filling::list_volumes(docker, TRY, &filling::labels(instance, ROLE_QUOTA_TRIAL)).await? {
        filling::remove_volume(docker, TRY, &volume.name).await?;
    }
    Ok(())
}

/// Why the engine enforces no quota of a volume, in its own words; nothing where it does. Makes a volume with one, and removes it.
pub(super) async fn try_quota(docker: &Docker, instance: &str) -> Result<Option<String>, EngineError> {
    let name = format!("cellblock-quota-{instance}-{}", uuid::Uuid::new_v4().simple());
    let labels = filling::labels(instance, ROLE_QUOTA_TRIAL);
    let made = filling::create_sized_volume(docker, TRY, &name, labels, Some(TRIED_BYTES)).await;
    match made {
        Ok(_) => {
            filling::remove_volume(docker, TRY, &name).await?;
            Ok(None)
        }
        // Nothing is left of one that it did not make.
        Err(error) => no_quota(error).map(Some),
    }
}

/// The engine's words that it has no quotas. Any other error says nothing about them, and may be over the next time.
fn no_quota(error: EngineError) -> Result<String, EngineError> {
    match error {
        EngineError::Unexpected { detail, .. } | EngineError::Rejected { detail, .. }
            if ["quota", "size"].iter().any(|word| detail.to_lowercase().contains(word)) =>
        {
            Ok(detail)
        }
        error => Err(error),
    }
}

fn own_uid(volume: &Volume, instance: &str) -> Option<u32> {
    let label = |name: &str| volume.labels.get(name).map(String::as_str);
    let is_ours = label(LABEL_INSTANCE) == Some(instance) && label(LABEL_ROLE) == Some(ROLE_WORKSPACE);
    if is_ours { label(LABEL_UID)?.parse().ok() } else { None }
}

fn not_ours(attempt: &'static str, name: &WorkspaceName) -> EngineError {
    EngineError::Conflict { attempt, detail: format!("{name} exists and does not carry this instance's labels") }
}

fn unexpected(detail: &str) -> EngineError {
    EngineError::Unexpected { attempt: ENSURE, detail: detail.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_speaks_of_quotas_says_that_there_are_none() {
        let detail = "create cellblock-quota-x: quota size requested but no quota support".to_owned();
        let none = |error: EngineError| no_quota(error).ok();
        assert_eq!(none(EngineError::Unexpected { attempt: TRY, detail: detail.clone() }), Some(detail.clone()));
        assert_eq!(
            none(EngineError::Rejected { attempt: TRY, detail: "invalid option: \"size\"".to_owned() }).as_deref(),
            Some("invalid option: \"size\"")
        );
        assert_eq!(none(EngineError::Unavailable { attempt: TRY, detail }), None);
        let full = "no space left on device".to_owned();
        assert_eq!(none(EngineError::Unexpected { attempt: TRY, detail: full }), None);
    }
}
