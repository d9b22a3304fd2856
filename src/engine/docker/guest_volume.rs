//! The volume that holds the guest: named by its content, filled and read back through a container that never runs.
//!
//! The engine's archive API is used here and for data, and never on a container in which anything has run.

use std::collections::BTreeMap;
use std::io::Read;

use bollard::Docker;
use bollard::models::Volume;
use bollard::query_parameters::{DownloadFromContainerOptionsBuilder, UploadToContainerOptionsBuilder};
use cellblock_wire::link::GUEST_DIR;
use futures_util::StreamExt;
use sha2::{Digest, Sha256};

use super::super::EngineError;
use super::client::{self, call};
use super::filling::{self, Filling};
use crate::engine::lockdown::{ROLE_GUEST, ROLE_HELPER, hex};

const ATTEMPT: &str = "preparing the guest's volume";
/// A helper is done in seconds; one of this age was left behind.
const OLD_SECONDS: i64 = 600;

/// A file of the volume.
#[derive(Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// Its name in the volume's folder.
    pub name: String,
    /// Its permissions: 0o555 for a program, 0o444 for anything else.
    pub mode: u32,
    /// Its content.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for GuestFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({:o}, {} bytes)", self.name, self.mode, self.bytes.len())
    }
}

/// The files, and the name that follows from them.
#[derive(Debug)]
pub(super) struct GuestVolume {
    instance: String,
    name: String,
    files: Vec<GuestFile>,
    /// The uid and gid that root inside has outside, which is how archives name it.
    root: (u64, u64),
}

impl GuestVolume {
    pub(super) fn new(instance: &str, files: Vec<GuestFile>, root: (u64, u64)) -> Self {
        let name = format!("cellblock-guest-{instance}-{}", &content_hash(&files)[..12]);
        Self { instance: instance.to_owned(), name, files, root }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes sure that the volume holds exactly the files, and says which volume in which state that was.
    /// `image` is any image that the engine has.
    pub(super) async fn ensure(&self, docker: &Docker, image: &str) -> Result<String, EngineError> {
        let labels = self.filling().labels(ROLE_GUEST);
        let volume = filling::create_volume(docker, ATTEMPT, &self.name, labels).await?;
        let fill = async |helper: &str| self.fill(docker, helper, birth(&volume)).await;
        self.filling().through_a_helper(docker, &self.name, image, fill).await
    }

    fn filling(&self) -> Filling<'_> {
        Filling { attempt: ATTEMPT, instance: &self.instance, helper_role: ROLE_HELPER, target: GUEST_DIR }
    }

    /// When the volume was made or last changed, if it is there: tells whether it is still as it was verified.
    pub(super) async fn observe(&self, docker: &Docker) -> Result<Option<String>, EngineError> {
        match call(ATTEMPT, &self.name, client::INSPECT, docker.inspect_volume(&self.name)).await {
            Ok(volume) => Ok(Some(birth(&volume))),
            Err(EngineError::Absent { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes volumes of this instance with other guests, as far as no cell uses them, and helpers that were left behind. Says which volumes.
    pub(super) async fn remove_others(&self, docker: &Docker) -> Result<Vec<String>, EngineError> {
        self.filling().remove_old_helpers(docker, OLD_SECONDS).await?;
        let mut removed = Vec::new();
        let all = filling::list_volumes(docker, ATTEMPT, &self.filling().labels(ROLE_GUEST)).await?;
        for volume in all.into_iter().filter(|v| v.name != self.name) {
            if filling::remove_volume(docker, ATTEMPT, &volume.name).await? {
                removed.push(volume.name);
            }
        }
        Ok(removed)
    }

    /// Writes the files unless they are there; says which state of the volume was read back.
    async fn fill(&self, docker: &Docker, helper: &str, found: String) -> Result<String, EngineError> {
        if self.reads_back(docker, helper).await? {
            return Ok(found);
        }
        tracing::info!(volume = self.name, "writing the guest into its volume");
        let options = UploadToContainerOptionsBuilder::default().path(GUEST_DIR).build();
        let archive = bollard::body_full(archive(&self.files).map_err(unexpected)?.into());
        call(ATTEMPT, GUEST_DIR, client::ARCHIVE, docker.upload_to_container(helper, Some(options), archive)).await?;
        // What the engine calls the time of its making is that of the last change.
        match self.observe(docker).await? {
            Some(written) if self.reads_back(docker, helper).await? => Ok(written),
            _ => Err(unexpected(format!("volume {} does not hold what was written to it", self.name))),
        }
    }

    /// Whether the volume holds the files, all of them, nothing else, and with the right owners and permissions.
    async fn reads_back(&self, docker: &Docker, helper: &str) -> Result<bool, EngineError> {
        let most = self.files.iter().map(|f| f.bytes.len() + 4096).sum::<usize>() + 64 * 1024;
        let options = DownloadFromContainerOptionsBuilder::default().path(GUEST_DIR).build();
        let mut download = docker.download_from_container(helper, Some(options));
        let whole = async {
            let mut bytes = Vec::new();
            while let Some(piece) = download.next().await {
                bytes.extend_from_slice(&piece?);
                if bytes.len() > most {
                    return Ok(None);
                }
            }
            Ok(Some(bytes))
        };
        let archive = call(ATTEMPT, GUEST_DIR, client::ARCHIVE, whole).await?;
        Ok(archive.is_some_and(|bytes| holds(&bytes, &self.files, self.root)))
    }
}

fn unexpected(detail: impl ToString) -> EngineError {
    EngineError::Unexpected { attempt: ATTEMPT, detail: detail.to_string() }
}

/// To the second, which is enough: what is made and read back within one is not made again within it.
fn birth(volume: &Volume) -> String {
    volume.created_at.as_ref().map(ToString::to_string).unwrap_or_default()
}

fn content_hash(files: &[GuestFile]) -> String {
    let mut hash = Sha256::new();
    for file in files {
        hash.update(format!("{} {:o} {}\n", file.name, file.mode, file.bytes.len()));
        hash.update(&file.bytes);
    }
    hex(&hash.finalize())
}

fn archive(files: &[GuestFile]) -> std::io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for file in files {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(file.bytes.len() as u64);
        header.set_mode(file.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder.append_data(&mut header, &file.name, file.bytes.as_slice())?;
    }
    builder.into_inner()
}

/// Whether an archive of the volume's folder holds exactly these files.
fn holds(archive: &[u8], files: &[GuestFile], root: (u64, u64)) -> bool {
    let folder = GUEST_DIR.trim_start_matches('/');
    let mut wanted: BTreeMap<String, &GuestFile> = files.iter().map(|f| (format!("{folder}/{}", f.name), f)).collect();
    let mut reader = tar::Archive::new(archive);
    let Ok(entries) = reader.entries() else { return false };
    for entry in entries {
        let Ok(mut entry) = entry else { return false };
        let path = entry.path().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let header = entry.header();
        let owned_by_root = header.uid().ok() == Some(root.0) && header.gid().ok() == Some(root.1);
        let mode = header.mode().unwrap_or(0o7777) & 0o7777;
        if entry.header().entry_type().is_dir() {
            if path.trim_end_matches('/') != folder || !owned_by_root || mode & 0o7022 != 0 {
                return false;
            }
            continue;
        }
        let Some(file) = wanted.remove(&path) else { return false };
        let mut bytes = Vec::new();
        if entry.read_to_end(&mut bytes).is_err() {
            return false;
        }
        let regular = entry.header().entry_type().is_file();
        if !regular || !owned_by_root || mode != file.mode || bytes != file.bytes {
            return false;
        }
    }
    wanted.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, mode: u32, bytes: &[u8]) -> GuestFile {
        GuestFile { name: name.to_owned(), mode, bytes: bytes.to_vec() }
    }

    fn in_folder(files: &[GuestFile]) -> Vec<u8> {
        let moved: Vec<_> = files.iter().map(|f| file(&format!("cellblock/{}", f.name), f.mode, &f.bytes)).collect();
        archive(&moved).expect("an archive in memory")
    }

    #[test]
    fn exactly_the_files_are_accepted() {
        let files = [file("guest", 0o555, b"program"), file("launcher.py", 0o444, b"text")];
        let root = (0, 0);
        assert!(holds(&in_folder(&files), &files, root));
        assert!(!holds(&in_folder(&files), &files, (100_000, 100_000)), "another owner");
        assert!(!holds(&in_folder(&files[..1]), &files, root), "one is missing");
        assert!(!holds(&in_folder(&files), &files[..1], root), "one too many");
        assert!(
            !holds(&in_folder(&[file("guest", 0o555, b"pr0gram"), files[1].clone()]), &files, root),
            "other content"
        );
        assert!(!holds(&in_folder(&[file("guest", 0o755, b"program"), files[1].clone()]), &files, root), "other mode");
        assert!(!holds(b"no archive at all", &files, root));
    }

    #[test]
    fn the_name_follows_from_the_content() {
        let name = |files| GuestVolume::new("i", files, (0, 0)).name().to_owned();
        let one = name(vec![file("guest", 0o555, b"1")]);
        assert!(one.starts_with("cellblock-guest-i-"), "{one}");
        assert_eq!(one, name(vec![file("guest", 0o555, b"1")]));
        assert_ne!(one, name(vec![file("guest", 0o555, b"2")]));
        assert_ne!(one, name(vec![file("guest", 0o444, b"1")]));
    }
}
