//! What a guard permits: images and resources by its own templates, and ceilings over all cells that there are. Decides; does nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::domain::data::DataMount;
use crate::domain::spec::Resources;
use crate::engine::{CellName, CellSpec, EngineError, Observed, Promised, Pull, WorkspaceSpec};

const ATTEMPT: &str = "creating a cell";
const MAKE_WORKSPACE: &str = "making a workspace";
/// What was resolved is remembered for so many pairs of id and reference.
const RESOLVED: usize = 1000;
/// A minute's worth of creates comes back in this time.
const MINUTE: Duration = Duration::from_secs(60);

/// What a guard permits.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The instance whose cells it works with.
    pub instance: String,
    /// Images, and what a cell of each may have.
    pub templates: Vec<Permitted>,
    /// Whether an image that is missing may be pulled.
    pub pull: Pull,
    /// Cells that exist at one time.
    pub cells: usize,
    /// CPUs that they were all promised, in thousandths; none: no ceiling.
    pub cpu_millis: Option<u64>,
    /// Bytes of memory that they were all promised; none: no ceiling.
    pub memory_bytes: Option<u64>,
    /// Workspaces that exist at one time.
    pub workspaces: usize,
    /// Creates at once, and again in each minute, of cells and of workspaces; and looks at the engine for what would be refused otherwise.
    pub creates_per_minute: u32,
}

/// Cells of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct Permitted {
    /// The image's reference.
    pub image: String,
    /// The engine's runtime; its default when empty.
    pub runtime: String,
    /// The most that a cell may have of each.
    pub most: Resources,
    /// The data that it has: this, no more and no less.
    pub data: Vec<DataMount>,
    /// Its working folder.
    pub workdir: String,
    /// Whether it may have a workspace that outlives it, and with which quota.
    pub workspace: Option<WorkspaceQuota>,
}

/// The quota of a template's workspaces, in bytes; none where that is accepted.
pub type WorkspaceQuota = Option<u64>;

impl Policy {
    /// Whether an image may be asked about: one of a template's references, or an id that such a one had.
    pub(super) fn lists(&self, reference: &str) -> bool {
        self.templates.iter().any(|template| template.image == reference)
    }

    /// Each reference once.
    pub(super) fn references(&self) -> Vec<&str> {
        let mut all: Vec<_> = self.templates.iter().map(|template| template.image.as_str()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// One cell by itself. `references` are those that have resolved to its image.
    fn check(&self, cell: &CellSpec, references: &[&str]) -> Result<(), EngineError> {
        let rejected = |detail: String| Err(EngineError::Rejected { attempt: ATTEMPT, detail });
        let of_image: Vec<_> = self.templates.iter().filter(|t| references.contains(&t.image.as_str())).collect();
        if of_image.is_empty() {
            let what = format!("image {} among those of the guard's templates", cell.image);
            return Err(EngineError::Absent { attempt: ATTEMPT, what });
        }
        let of_runtime: Vec<_> = of_image.into_iter().filter(|t| t.runtime == cell.runtime).collect();
        if of_runtime.is_empty() {
            return rejected(format!("the guard has no template with this image and runtime {:?}", cell.runtime));
        }
        let of_data: Vec<_> =
            of_runtime.into_iter().filter(|t| t.data == cell.data && t.workdir == cell.workdir).collect();
        if of_data.is_empty() {
            return rejected("the guard has no template with this image, runtime, data and working folder".to_owned());
        }
        let of_workspace: Vec<_> =
            of_data.into_iter().filter(|t| cell.workspace.is_none() || t.workspace.is_some()).collect();
        if of_workspace.is_empty() {
            return rejected("the guard has no template with this image that has workspaces".to_owned());
        }
        let complaints: Vec<_> = of_workspace.iter().map(|template| above(&cell.resources, &template.most)).collect();
        match complaints.into_iter().min_by_key(Vec::len) {
            Some(complaint) if !complaint.is_empty() => {
                rejected(format!("the guard's ceilings of this image: {}", complaint.join(", ")))
            }
            _ => Ok(()),
        }
    }
}

/// A workspace by itself. `references` are those that have resolved to its image.
fn check_workspace(policy: &Policy, workspace: &WorkspaceSpec, references: &[&str]) -> Result<(), EngineError> {
    let of_image = policy.templates.iter().filter(|t| references.contains(&t.image.as_str()));
    let mut quotas = of_image.filter_map(|template| template.workspace);
    if quotas.any(|quota| quota == workspace.quota_bytes) {
        return Ok(());
    }
    let detail = "the guard has no template with this image that has workspaces with this quota".to_owned();
    Err(EngineError::Rejected { attempt: MAKE_WORKSPACE, detail })
}

/// Each amount that is above what is allowed, or none at all, which an engine takes for no limit.
fn above(asked: &Resources, most: &Resources) -> Vec<String> {
    let pairs = [
        ("cpu_millis", u64::from(asked.cpu_millis), u64::from(most.cpu_millis)),
        ("memory_bytes", asked.memory_bytes, most.memory_bytes),
        ("disk_bytes", asked.disk_bytes, most.disk_bytes),
        ("tmp_bytes", asked.tmp_bytes, most.tmp_bytes),
        ("pids", asked.pids.into(), most.pids.into()),
        ("open_files", asked.open_files.into(), most.open_files.into()),
    ];
    let wrong = pairs.into_iter().filter(|(_, asked, most)| *asked == 0 || asked > most);
    wrong.map(|(field, asked, most)| format!("{field} is {asked}, allowed are 1 to {most}")).collect()
}

/// A cell that is there or may be.
#[derive(Debug)]
struct Entry {
    promised: Promised,
    /// Creations of it that are under way.
    under_way: usize,
    /// When the last one ended.
    settled: Instant,
}

/// What a guard knows of its cells. The labels of containers are the truth that it is brought up to date from.
#[derive(Debug)]
pub(super) struct Books {
    cells: BTreeMap<CellName, Entry>,
    /// Ids and the references that they were found under, oldest first.
    resolved: Vec<(String, String)>,
    creates: Tokens,
    looks: Tokens,
    workspaces: Tokens,
}

/// What may be done so many times at once, and again in each minute.
#[derive(Debug)]
struct Tokens {
    left: f64,
    counted: Instant,
}

impl Tokens {
    fn new(most: u32, now: Instant) -> Self {
        Self { left: most.into(), counted: now }
    }

    fn is_there_one(&mut self, most: u32, now: Instant) -> bool {
        let most = f64::from(most);
        let back = now.saturating_duration_since(self.counted).as_secs_f64() / MINUTE.as_secs_f64() * most;
        (self.left, self.counted) = ((self.left + back).min(most), now);
        self.left >= 1.0
    }

    fn take(&mut self, most: u32, now: Instant) -> bool {
        let is_there_one = self.is_there_one(most, now);
        self.left -= f64::from(u8::from(is_there_one));
        is_there_one
    }
}

/// Why a cell gets no place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Refusal {
    pub(super) error: EngineError,
    /// What may be otherwise than the books have it.
    pub(super) doubt: Option<Doubt>,
}

impl From<EngineError> for Refusal {
    fn from(error: EngineError) -> Self {
        Self { error, doubt: None }
    }
}

/// What only the engine knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// A listed reference may mean another image by now.
    Images,
    /// Others than the guard may have removed cells.
    Cells,
}

impl Books {
    pub(super) fn new(policy: &Policy, now: Instant) -> Self {
        let tokens = || Tokens::new(policy.creates_per_minute, now);
        Self { cells: BTreeMap::new(), resolved: Vec::new(), creates: tokens(), looks: tokens(), workspaces: tokens() }
    }

    /// A reference was found to mean this content.
    pub(super) fn note_image(&mut self, id: &str, reference: &str) {
        let pair = (id.to_owned(), reference.to_owned());
        if !self.resolved.contains(&pair) {
            self.resolved.push(pair);
            let surplus = self.resolved.len().saturating_sub(RESOLVED);
            self.resolved.drain(..surplus);
        }
    }

    /// Whether an id is one that a template's reference was found to mean.
    pub(super) fn knows_image(&self, id: &str) -> bool {
        self.resolved.iter().any(|(known, _)| known == id)
    }

    /// Takes a place for a cell, until [`Books::settle`] and then as long as it is seen. What no look at the engine could change is refused first: a cell that
    /// is never permitted, and then any above the rate.
    ///
    /// # Errors
    /// [`EngineError::Absent`] for an image that is not listed, [`EngineError::Rejected`] for a cell that is never permitted, [`EngineError::Unavailable`] for
    /// one that may be later.
    pub(super) fn reserve(&mut self, policy: &Policy, cell: &CellSpec, now: Instant) -> Result<(), Refusal> {
        let found = self.resolved.iter().filter(|(id, _)| *id == cell.image);
        let references: Vec<_> = found.map(|(_, reference)| reference.as_str()).collect();
        let unlisted = match policy.check(cell, &references) {
            Ok(()) => None,
            Err(error @ EngineError::Absent { .. }) => Some(Refusal { error, doubt: Some(Doubt::Images) }),
            Err(error) => return Err(error.into()),
        };
        if !self.creates.is_there_one(policy.creates_per_minute, now) {
            let detail = format!("the guard permits {} creates a minute", policy.creates_per_minute);
            return Err(EngineError::Unavailable { attempt: ATTEMPT, detail }.into());
        }
        if let Some(unlisted) = unlisted {
            return Err(unlisted);
        }
        self.fits(policy, cell)?;
        self.creates.take(policy.creates_per_minute, now);
        let asked = Promised::from(&cell.resources);
        let entry = self.cells.entry(cell.name.clone());
        let entry = entry.or_insert(Entry { promised: Promised::default(), under_way: 0, settled: now });
        // One of this name may be there already, made from another specification.
        entry.promised.cpu_millis = entry.promised.cpu_millis.max(asked.cpu_millis);
        entry.promised.memory_bytes = entry.promised.memory_bytes.max(asked.memory_bytes);
        entry.under_way += 1;
        Ok(())
    }

    /// Whether a workspace may be made, or looked for, which is paid for.
    ///
    /// # Errors
    /// [`EngineError::Rejected`] for one that is never permitted, [`EngineError::Unavailable`] for one that may be later.
    pub(super) fn admit_workspace(
        &mut self,
        policy: &Policy,
        workspace: &WorkspaceSpec,
        now: Instant,
    ) -> Result<(), EngineError> {
        let found = self.resolved.iter().filter(|(id, _)| *id == workspace.image);
        let references: Vec<_> = found.map(|(_, reference)| reference.as_str()).collect();
        check_workspace(policy, workspace, &references)?;
        if self.workspaces.take(policy.creates_per_minute, now) {
            return Ok(());
        }
        let detail = format!("the guard permits {} workspaces a minute", policy.creates_per_minute);
        Err(EngineError::Unavailable { attempt: MAKE_WORKSPACE, detail })
    }

    /// Pays for a look at the engine, which would be free otherwise for whoever asks for what is refused. There are as many as creates.
    pub(super) fn may_look(&mut self, policy: &Policy, now: Instant) -> bool {
        self.looks.take(policy.creates_per_minute, now)
    }

    /// Whether a cell fits into the ceilings, beside those that are there or may be.
    fn fits(&self, policy: &Policy, cell: &CellSpec) -> Result<(), Refusal> {
        let later = |detail: String| {
            let error = EngineError::Unavailable { attempt: ATTEMPT, detail };
            Err(Refusal { error, doubt: Some(Doubt::Cells) })
        };
        let asked = Promised::from(&cell.resources);
        let others = self.cells.iter().filter(|(name, _)| **name != cell.name);
        let (mut cells, mut cpu, mut memory) = (1, u64::from(asked.cpu_millis), asked.memory_bytes);
        for (_, entry) in others {
            cells += 1;
            cpu = cpu.saturating_add(entry.promised.cpu_millis.into());
            memory = memory.saturating_add(entry.promised.memory_bytes);
        }
        if cells > policy.cells {
            return later(format!("the guard permits {} cells at one time", policy.cells));
        }
        if let Some(most) = policy.cpu_millis.filter(|most| cpu > *most) {
            return later(format!("all cells would have {cpu} thousandths of a CPU; the guard permits {most}"));
        }
        if let Some(most) = policy.memory_bytes.filter(|most| memory > *most) {
            return later(format!("all cells would have {memory} bytes of memory; the guard permits {most}"));
        }
        Ok(())
    }

    /// A creation has ended, well or not: the cell may be there.
    pub(super) fn settle(&mut self, name: &CellName, now: Instant) {
        if let Some(entry) = self.cells.get_mut(name) {
            entry.under_way = entry.under_way.saturating_sub(1);
            entry.settled = now;
        }
    }

    /// Whether the engine may still be at the creation of a cell, so that its absence proves nothing.
    pub(super) fn is_being_made(&self, name: &CellName) -> bool {
        self.cells.get(name).is_some_and(|entry| entry.under_way > 0)
    }

    /// A cell's absence was seen.
    pub(super) fn forget(&mut self, name: &CellName) {
        if self.cells.get(name).is_some_and(|entry| entry.under_way == 0) {
            self.cells.remove(name);
        }
    }

    /// All cells were looked at, at a moment not before `began`.
    pub(super) fn bring_up_to_date(&mut self, listed: &[Observed], began: Instant) {
        let is_there = |name: &CellName| listed.iter().any(|seen| seen.name == *name);
        self.cells.retain(|name, entry| entry.under_way > 0 || entry.settled >= began || is_there(name));
        for seen in listed {
            // One without labels is an earlier version's. It counts as a cell.
            let promised = seen.promised.unwrap_or_default();
            self.cells.entry(seen.name.clone()).or_insert(Entry { promised, under_way: 0, settled: began });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::SessionId;
    use crate::domain::spec::MIB;
    use crate::engine::CellState;
    use uuid::Uuid;

    fn most() -> Resources {
        Resources {
            cpu_millis: 1000,
            memory_bytes: 512 * MIB,
            disk_bytes: 64 * MIB,
            tmp_bytes: 32 * MIB,
            pids: 128,
            open_files: 1024,
        }
    }

    fn maps() -> DataMount {
        DataMount { name: "maps".to_owned(), path: "/mnt/maps".to_owned() }
    }

    fn policy() -> Policy {
        Policy {
            instance: "one".to_owned(),
            templates: vec![Permitted {
                image: "listed:1".to_owned(),
                runtime: String::new(),
                most: most(),
                data: vec![maps()],
                workdir: "/workspace".to_owned(),
                workspace: None,
            }],
            pull: Pull::Never,
            cells: 3,
            cpu_millis: None,
            memory_bytes: None,
            workspaces: 2,
            creates_per_minute: 60,
        }
    }

    fn cell(n: u128) -> CellSpec {
        let session = SessionId::from_uuid(Uuid::from_u128(n));
        let name = CellName::new("one", session, 0);
        CellSpec {
            name,
            session,
            image: "sha256:a".to_owned(),
            runtime: String::new(),
            resources: most(),
            data: vec![maps()],
            workdir: "/workspace".to_owned(),
            workspace: None,
        }
    }

    fn workspace() -> WorkspaceSpec {
        let name = crate::engine::WorkspaceName::new("one", Uuid::from_u128(5).into());
        WorkspaceSpec { name, image: "sha256:a".to_owned(), quota_bytes: Some(MIB) }
    }

    #[test]
    fn a_workspace_is_of_a_template_that_has_them_with_its_quota_and_not_too_often() {
        let mut policy = Policy { creates_per_minute: 2, ..policy() };
        policy.templates[0].workspace = Some(Some(MIB));
        let (mut books, now) = books(&policy);
        assert_eq!(books.reserve(&policy, &CellSpec { workspace: Some(workspace().name), ..cell(1) }, now), Ok(()));
        for (quota_bytes, image) in [(None, "sha256:a"), (Some(2 * MIB), "sha256:a"), (Some(MIB), "sha256:b")] {
            let asked = WorkspaceSpec { quota_bytes, image: image.to_owned(), ..workspace() };
            let refused = books.admit_workspace(&policy, &asked, now);
            assert!(matches!(refused, Err(EngineError::Rejected { .. })), "{quota_bytes:?} {image}: {refused:?}");
        }
        let mut admit = |at| books.admit_workspace(&policy, &workspace(), at);
        assert_eq!([admit(now), admit(now)], [Ok(()), Ok(())]);
        assert!(matches!(admit(now), Err(EngineError::Unavailable { .. })), "as many as permitted at once");
        assert_eq!(admit(now + MINUTE), Ok(()));
    }

    fn books(policy: &Policy) -> (Books, Instant) {
        let now = Instant::now();
        let mut books = Books::new(policy, now);
        books.note_image("sha256:a", "listed:1");
        (books, now)
    }

    fn seen(cell: &CellSpec) -> Observed {
        let promised = Some((&cell.resources).into());
        Observed { name: cell.name.clone(), session: Some(cell.session), state: CellState::Running, promised }
    }

    #[test]
    fn a_cell_has_a_listed_image_a_listed_runtime_and_no_more_than_its_template_permits() {
        let policy = policy();
        let (mut books, now) = books(&policy);
        let mut outcome = |change: &dyn Fn(&mut CellSpec)| {
            let mut cell = cell(1);
            change(&mut cell);
            books.reserve(&policy, &cell, now).map_err(|refusal| refusal.error)
        };
        assert_eq!(outcome(&|_| {}), Ok(()));
        let absent = outcome(&|c| c.image = "sha256:b".to_owned());
        assert!(matches!(absent, Err(EngineError::Absent { .. })), "{absent:?}");
        type Change = fn(&mut CellSpec);
        let changes: [(Change, &str); 13] = [
            (|c| c.workspace = Some(workspace().name), "workspaces"),
            (|c| c.data.clear(), "data"),
            (|c| c.data[0].name = "others".to_owned(), "data"),
            (|c| c.data[0].path = "/usr".to_owned(), "data"),
            (|c| c.data.push(maps()), "data"),
            (|c| c.runtime = "other".to_owned(), "runtime"),
            (|c| c.resources.cpu_millis += 1, "cpu_millis"),
            (|c| c.resources.memory_bytes += 1, "memory_bytes"),
            (|c| c.resources.disk_bytes = u64::MAX, "disk_bytes"),
            (|c| c.resources.tmp_bytes += 1, "tmp_bytes"),
            (|c| c.resources.pids = 0, "pids"),
            (|c| c.resources.memory_bytes = 0, "memory_bytes"),
            (|c| c.resources.open_files += 1, "open_files"),
        ];
        for (change, word) in changes {
            let refused = outcome(&change);
            assert!(
                matches!(&refused, Err(EngineError::Rejected { detail, .. }) if detail.contains(word)),
                "{word}: {refused:?}"
            );
        }
    }

    #[test]
    fn there_are_never_more_cells_than_permitted() {
        let policy = policy();
        let (mut books, now) = books(&policy);
        for n in 0..3 {
            assert_eq!(books.reserve(&policy, &cell(n), now), Ok(()));
            assert_eq!(books.reserve(&policy, &cell(n), now), Ok(()), "asked for twice is one cell");
        }
        let refused = books.reserve(&policy, &cell(3), now).unwrap_err();
        assert!(matches!(refused.error, EngineError::Unavailable { .. }), "{refused:?}");
        assert_eq!(refused.doubt, Some(Doubt::Cells), "others may have removed some");
        let name = cell(0).name;
        books.settle(&name, now);
        books.forget(&name);
        assert!(books.reserve(&policy, &cell(3), now).is_err(), "one of two creations is still under way");
        books.settle(&name, now);
        books.forget(&name);
        assert_eq!(books.reserve(&policy, &cell(3), now), Ok(()));
    }

    #[test]
    fn what_all_cells_may_have_together_is_a_ceiling_over_those_found_there_too() {
        let policy = Policy { memory_bytes: Some(1024 * MIB), cpu_millis: Some(2500), ..policy() };
        let (mut books, now) = books(&policy);
        books.bring_up_to_date(&[seen(&cell(1))], now);
        assert_eq!(books.reserve(&policy, &cell(2), now), Ok(()));
        let refused = books.reserve(&policy, &cell(3), now);
        assert!(
            matches!(&refused, Err(Refusal { error: EngineError::Unavailable { detail, .. }, .. }) if detail.contains("CPU")),
            "{refused:?}"
        );
        let mut small = cell(3);
        small.resources.cpu_millis = 1;
        let refused = books.reserve(&policy, &small, now);
        assert!(
            matches!(&refused, Err(Refusal { error: EngineError::Unavailable { detail, .. }, .. }) if detail.contains("memory")),
            "{refused:?}"
        );
        // The first one is gone; the second one is not, though nobody has seen it yet.
        books.bring_up_to_date(&[], now + Duration::from_secs(1));
        assert_eq!(books.reserve(&policy, &cell(3), now), Ok(()));
        assert!(books.reserve(&policy, &cell(4), now).is_err());
    }

    #[test]
    fn a_list_that_began_before_a_cell_was_made_does_not_undo_it() {
        let policy = Policy { cells: 1, ..policy() };
        let (mut books, now) = books(&policy);
        assert_eq!(books.reserve(&policy, &cell(1), now), Ok(()));
        books.settle(&cell(1).name, now + Duration::from_secs(2));
        books.bring_up_to_date(&[], now + Duration::from_secs(1));
        assert!(books.reserve(&policy, &cell(2), now).is_err());
        books.bring_up_to_date(&[], now + Duration::from_secs(3));
        assert_eq!(books.reserve(&policy, &cell(2), now), Ok(()));
    }

    #[test]
    fn looks_at_the_engine_for_what_is_refused_are_counted_apart_from_creates() {
        let policy = Policy { creates_per_minute: 2, ..policy() };
        let (mut books, now) = books(&policy);
        assert_eq!([(); 4].map(|()| books.may_look(&policy, now)), [true, true, false, false]);
        assert_eq!(books.reserve(&policy, &cell(1), now), Ok(()), "whoever is permitted does not pay for others");
        assert!(books.may_look(&policy, now + Duration::from_secs(31)));
    }

    #[test]
    fn creates_come_back_with_time() {
        let policy = Policy { cells: 1000, creates_per_minute: 60, ..policy() };
        let (mut books, now) = books(&policy);
        for n in 0..60 {
            assert_eq!(books.reserve(&policy, &cell(n), now), Ok(()));
        }
        let refused = books.reserve(&policy, &cell(60), now);
        assert!(
            matches!(&refused, Err(Refusal { error: EngineError::Unavailable { detail, .. }, .. }) if detail.contains("60")),
            "{refused:?}"
        );
        assert_eq!(refused.unwrap_err().doubt, None, "no look at the engine changes that");
        // Nor is there one for an image that is not listed, or a cell above the ceilings.
        let unlisted = CellSpec { image: "sha256:b".to_owned(), ..cell(60) };
        let full = Policy { cells: 1, ..policy.clone() };
        for (policy, cell) in [(&policy, &unlisted), (&full, &cell(60))] {
            assert_eq!(books.reserve(policy, cell, now).unwrap_err().doubt, None);
        }
        let later = now + Duration::from_secs(2);
        assert_eq!(books.reserve(&policy, &unlisted, later).unwrap_err().doubt, Some(Doubt::Images));
        assert_eq!(books.reserve(&policy, &cell(61), later), Ok(()));
        assert_eq!(books.reserve(&policy, &cell(62), later), Ok(()));
        assert!(books.reserve(&policy, &cell(63), later).is_err());
    }
}
