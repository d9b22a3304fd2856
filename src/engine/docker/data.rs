//! Data volumes: filled once from an archive, never changed, attached to cells read-only. Which of them a template has is not decided here.
//!
//! Every import fills a volume of its own. When it is whole, an empty volume beside it says so, and from then on it is what its name means; labels of volumes
//! can't change, so there is no other mark that is all there or not at all. What a cell has stays as it is, and goes when no cell has it and its name means
//! another:
//!
//! ```text
//! cellblock-data-<instance>-<name>.<version>          the data
//! cellblock-data-<instance>-<name>.<version>.whole    it is whole
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bollard::Docker;
use bollard::models::Volume;
use bollard::query_parameters::UploadToContainerOptionsBuilder;
use futures_util::StreamExt;
use sha2::{Digest, Sha256};

use super::super::{ArchiveStream, CellName, CellSpec, DataVolume, EngineError};
use super::client::call;
use super::filling::{self, Filling};
use crate::domain::data;
use crate::engine::lockdown::{
    LABEL_BYTES, LABEL_DATA, LABEL_ROLE, LABEL_SHA256, LABEL_VERSION, LABEL_WHOLE_AT, ROLE_DATA, ROLE_DATA_HELPER,
    ROLE_DATA_WHOLE, hex,
};

const IMPORT: &str = "importing data";
const ATTACH: &str = "attaching data to a cell";
const LIST: &str = "listing data";
const REMOVE: &str = "removing data";

/// Where the volume is mounted in the container that it is filled through.
const TARGET: &str = "/cellblock-data";
/// An import is done within this time.
const LONGEST: Duration = Duration::from_secs(6 * 3600);
/// A container through which an import goes was left behind after this time.
const LEFT_SECONDS: i64 = 7 * 3600;
/// A volume of this age that nothing says is whole, and no container has, was left behind.
const YOUNG_SECONDS: i64 = 600;
/// What the name of a mark has more than that of its volume.
const MARK: &str = ".whole";

/// The data of one instance.
#[derive(Debug)]
pub(super) struct Data {
    instance: String,
    /// What cells were made with, since a name may mean another volume by now.
    held: Mutex<BTreeMap<String, Vec<String>>>,
}

/// A volume that is whole.
struct Whole {
    at: u64,
    volume: String,
    data: DataVolume,
}

impl Data {
    pub(super) fn new(instance: &str) -> Self {
        Self { instance: instance.to_owned(), held: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<String, Vec<String>>> {
        // Every change is complete in itself.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn filling(&self) -> Filling<'_> {
        Filling { attempt: IMPORT, instance: &self.instance, helper_role: ROLE_DATA_HELPER, target: TARGET }
    }

    /// Fills a volume, and has the name mean it.
    pub(super) async fn import(
        &self,
        docker: &Docker,
        name: &str,
        image: &str,
        archive: ArchiveStream,
    ) -> Result<DataVolume, EngineError> {
        data::check_name(name).map_err(|detail| EngineError::Rejected { attempt: IMPORT, detail })?;
        let version = uuid::Uuid::new_v4().simple().to_string();
        let volume = format!("cellblock-data-{}-{name}.{version}", self.instance);
        let labels = |role| {
            let mut labels = self.filling().labels(role);
            labels.insert(LABEL_DATA.to_owned(), name.to_owned());
            labels.insert(LABEL_VERSION.to_owned(), version.clone());
            labels
        };
        filling::create_volume(docker, IMPORT, &volume, labels(ROLE_DATA)).await?;
        let mark = format!("{volume}{MARK}");
        let fill = async |helper: &str| {
            let (bytes, sha256) = fill(docker, helper, archive).await?;
            // While the helper still keeps the volume: a sweep between its end and the mark would take one that was filled for long.
            let at = jiff::Timestamp::now().as_millisecond().to_string();
            let mut whole = labels(ROLE_DATA_WHOLE);
            let about = [(LABEL_WHOLE_AT, at), (LABEL_BYTES, bytes.to_string()), (LABEL_SHA256, sha256.clone())];
            whole.extend(about.map(|(label, value)| (label.to_owned(), value)));
            filling::create_volume(docker, IMPORT, &mark, whole).await?;
            Ok((bytes, sha256))
        };
        let filled = self.filling().through_a_helper(docker, &volume, image, fill).await;
        let (bytes, sha256) = match filled {
            Ok(filled) => filled,
            Err(error) => {
                // Its maker is told that the name means what it meant before.
                if let Err(left) = filling::remove_volume(docker, IMPORT, &mark).await {
                    tracing::warn!(mark, %left, "the mark of data whose import has failed is left behind");
                }
                if let Err(left) = filling::remove_volume(docker, IMPORT, &volume).await {
                    tracing::warn!(volume, %left, "a volume that was not filled is left behind until the next sweep");
                }
                return Err(error);
            }
        };
        Ok(DataVolume { name: name.to_owned(), version, bytes, sha256 })
    }

    /// What each name means.
    pub(super) async fn list(&self, docker: &Docker) -> Result<Vec<DataVolume>, EngineError> {
        let current = current(&self.volumes(docker, LIST).await?);
        Ok(current.into_values().map(|whole| whole.data).collect())
    }

    /// Takes a name its meaning, and removes what no cell has.
    pub(super) async fn remove(&self, docker: &Docker, name: &str) -> Result<(), EngineError> {
        let marks: Vec<_> = self
            .volumes(docker, REMOVE)
            .await?
            .into_iter()
            .filter(|v| is_mark(v) && label(v, LABEL_DATA) == Some(name))
            .collect();
        if marks.is_empty() {
            return Err(EngineError::Absent { attempt: REMOVE, what: format!("data volume {name:.80}") });
        }
        // First all marks: an older one must not come to be what the name means.
        for mark in &marks {
            filling::remove_volume(docker, REMOVE, &mark.name).await?;
        }
        for mark in &marks {
            filling::remove_volume(docker, REMOVE, content_of(mark)).await?;
        }
        Ok(())
    }

    /// The volumes of a cell's data, in their order: those that it was made with, or what the names mean now.
    pub(super) async fn of_cell(&self, docker: &Docker, cell: &CellSpec) -> Result<Vec<String>, EngineError> {
        if cell.data.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(held) = self.held().get(cell.name.as_str()) {
            return Ok(held.clone());
        }
        let current = current(&self.volumes(docker, ATTACH).await?);
        let volume = |name: &String| {
            let what = || format!("data volume {name}, which `cellblock data import DIR {name}` makes,");
            let found = current.get(name).map(|whole| whole.volume.clone());
            found.ok_or_else(|| EngineError::Absent { attempt: ATTACH, what: what() })
        };
        let volumes: Vec<_> = cell.data.iter().map(|mount| volume(&mount.name)).collect::<Result<_, _>>()?;
        self.held().insert(cell.name.to_string(), volumes.clone());
        Ok(volumes)
    }

    /// The cell is gone: its absence was seen.
    pub(super) fn release(&self, cell: &CellName) {
        self.held().remove(cell.as_str());
    }

    /// Removes what no name means and no cell has, and what was begun and not finished. Says what it was.
    pub(super) async fn sweep(&self, docker: &Docker) -> Result<Vec<String>, EngineError> {
        self.filling().remove_old_helpers(docker, LEFT_SECONDS).await?;
        // Before all else: of what is in nobody's hands now, the mark is there by now if there will ever be one.
        let in_hand = self.filling().in_hand(docker).await?;
        let volumes = self.volumes(docker, REMOVE).await?;
        let current = current(&volumes);
        let is_meant = |content: &str| current.values().any(|whole| whole.volume == content);
        let (marks, contents): (Vec<&Volume>, Vec<&Volume>) = volumes.iter().partition(|v| is_mark(v));
        let mut there: BTreeSet<&str> = contents.iter().map(|v| v.name.as_str()).collect();
        let mut removed = Vec::new();
        for content in contents.into_iter().filter(|v| !is_meant(&v.name) && !in_hand.contains(&v.name)) {
            let is_marked = marks.iter().any(|mark| content_of(mark) == content.name);
            // Of one that is being filled, its helper keeps it; this is for the moments before and after.
            let may_go = is_marked || !is_young(content);
            if may_go && filling::remove_volume(docker, REMOVE, &content.name).await? {
                there.remove(content.name.as_str());
                removed.push(content.name.clone());
            }
        }
        // The volume of a young one may have been made after the volumes were listed.
        let is_left = |mark: &&Volume| {
            let content = content_of(mark);
            !there.contains(content) && (removed.iter().any(|gone| gone == content) || !is_young(mark))
        };
        for mark in marks.into_iter().filter(is_left) {
            filling::remove_volume(docker, REMOVE, &mark.name).await?;
        }
        Ok(removed)
    }

    async fn volumes(&self, docker: &Docker, attempt: &'static str) -> Result<Vec<Volume>, EngineError> {
        let mut all = Vec::new();
        for role in [ROLE_DATA, ROLE_DATA_WHOLE] {
            all.extend(filling::list_volumes(docker, attempt, &filling::labels(&self.instance, role)).await?);
        }
        Ok(all)
    }
}

/// Sends the archive into the volume; says how long it was, and its hash.
async fn fill(docker: &Docker, helper: &str, archive: ArchiveStream) -> Result<(u64, String), EngineError> {
    let seen = std::sync::Arc::new(Mutex::new((0_u64, Sha256::new())));
    let counter = std::sync::Arc::clone(&seen);
    let counted = archive.inspect(move |piece| {
        if let Ok(piece) = piece {
            let mut seen = counter.lock().unwrap_or_else(PoisonError::into_inner);
            seen.0 += piece.len() as u64;
            seen.1.update(piece);
        }
    });
    let options = UploadToContainerOptionsBuilder::default().path(TARGET).build();
    let body = bollard::body_try_stream(counted);
    call(IMPORT, TARGET, LONGEST, docker.upload_to_container(helper, Some(options), body)).await?;
    let (bytes, hash) = {
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        (seen.0, seen.1.clone())
    };
    Ok((bytes, hex(&hash.finalize())))
}

fn label<'a>(volume: &'a Volume, name: &str) -> Option<&'a str> {
    volume.labels.get(name).map(String::as_str)
}

fn is_mark(volume: &Volume) -> bool {
    label(volume, LABEL_ROLE) == Some(ROLE_DATA_WHOLE)
}

/// The volume that a mark speaks of.
fn content_of(mark: &Volume) -> &str {
    mark.name.strip_suffix(MARK).unwrap_or_default()
}

/// Whether an import may still be at it. What the engine calls the time of its making is that of its last change.
fn is_young(volume: &Volume) -> bool {
    let made = volume.created_at.as_ref().and_then(|at| at.to_string().parse::<jiff::Timestamp>().ok());
    made.is_none_or(|made| made.as_second() > jiff::Timestamp::now().as_second() - YOUNG_SECONDS)
}

/// What each name means: of those that are whole and there, the last one.
fn current(volumes: &[Volume]) -> BTreeMap<String, Whole> {
    let contents: HashMap<&str, &Volume> =
        volumes.iter().filter(|v| !is_mark(v)).map(|v| (v.name.as_str(), v)).collect();
    let mut current: BTreeMap<String, Whole> = BTreeMap::new();
    for whole in volumes.iter().filter(|v| is_mark(v)).filter_map(whole) {
        // One that was pruned away is there no more, and a volume of that name without our labels is not it.
        let is_there = contents.get(whole.volume.as_str()).is_some_and(|content| {
            label(content, LABEL_DATA) == Some(&whole.data.name)
                && label(content, LABEL_VERSION) == Some(&whole.data.version)
        });
        let known = current.get(&whole.data.name);
        let is_later = known.is_none_or(|known| (known.at, &known.data.version) < (whole.at, &whole.data.version));
        if is_there && is_later {
            current.insert(whole.data.name.clone(), whole);
        }
    }
    current
}

fn whole(mark: &Volume) -> Option<Whole> {
    let data = DataVolume {
        name: label(mark, LABEL_DATA)?.to_owned(),
        version: label(mark, LABEL_VERSION)?.to_owned(),
        bytes: label(mark, LABEL_BYTES)?.parse().ok()?,
        sha256: label(mark, LABEL_SHA256)?.to_owned(),
    };
    Some(Whole {
        at: label(mark, LABEL_WHOLE_AT)?.parse().ok()?,
        volume: mark.name.strip_suffix(MARK)?.to_owned(),
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(version: &str) -> Volume {
        let labels = [(LABEL_ROLE, ROLE_DATA), (LABEL_DATA, "maps"), (LABEL_VERSION, version)];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Volume { name: format!("v.{version}"), labels, ..Volume::default() }
    }

    fn mark(version: &str, at: u64) -> Volume {
        let mut mark = content(version);
        mark.name.push_str(MARK);
        for (name, value) in
            [(LABEL_ROLE, ROLE_DATA_WHOLE), (LABEL_WHOLE_AT, &*at.to_string()), (LABEL_BYTES, "3"), (LABEL_SHA256, "x")]
        {
            mark.labels.insert(name.to_owned(), value.to_owned());
        }
        mark
    }

    fn meant(volumes: &[Volume]) -> Option<String> {
        current(volumes).remove("maps").map(|whole| whole.data.version)
    }

    #[test]
    fn a_name_means_what_was_whole_last_and_is_there() {
        assert_eq!(meant(&[content("a")]), None, "half filled");
        assert_eq!(meant(&[content("a"), mark("a", 5)]).as_deref(), Some("a"));
        let both = [content("b"), mark("b", 7), content("a"), mark("a", 5)];
        assert_eq!(meant(&both).as_deref(), Some("b"));
        assert_eq!(meant(&both[1..]).as_deref(), Some("a"), "the later one was pruned away");
        let emptied = Volume { labels: HashMap::new(), ..content("a") };
        assert_eq!(meant(&[emptied, mark("a", 5)]), None, "the engine made another of that name");
    }
}
