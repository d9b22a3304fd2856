//! Notebooks of sessions, a file each, to which cells are appended. Runs on the writer's thread and waits for the disk.
//!
//! ```text
//! opened ──cells──▶ opened ──end──▶ ended ──retention, or room for others──▶ gone
//!    │                 └─ deleted, or room for others: begins anew with the next cell
//!    └─ found at the start without an end: it ends then
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

use super::cells::{self, Kept, Read, Why};
use super::files::{self, told};
use super::ipynb::{self, Beside};
use super::journal::{End, Header, Kernel, LONGEST_END, LONGEST_HEADER, Line, VERSION};
use super::ledger::{Ledger, Sums};
use super::moment::is_over;
use super::{NotebookCell, NotebookKernel};
use crate::domain::ids::SessionId;

/// What a name ends with.
const ENDING: &str = ".jsonl";
/// Room in each notebook for the lines about its end.
const RESERVE: u64 = 1024;

/// What one notebook, and all of them, may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub one: u64,
    pub all: u64,
    pub retention: Duration,
}

/// Ended ones go first, and among them the one that ended first; then the one that was opened first.
type Rank = (bool, Timestamp);

/// The notebooks that are kept, and those of sessions that live.
#[derive(Debug)]
pub(super) struct Notebooks {
    folder: PathBuf,
    bounds: Bounds,
    books: HashMap<SessionId, Book>,
    kept: Ledger<SessionId, Rank>,
}

#[derive(Debug)]
struct Book {
    tenant: String,
    /// Of those that have not ended.
    kernel: Option<Kernel>,
    /// Length of its file; nothing when there is none.
    length: u64,
    cells: u64,
    /// Cells of its session that are not in it.
    left_out: u64,
    full: bool,
    opened: Timestamp,
    ended: Option<Timestamp>,
}

impl Book {
    fn rank(&self) -> Rank {
        self.ended.map_or((true, self.opened), |ended| (false, ended))
    }
}

impl Notebooks {
    /// Looks through the folder. What has no end ends now; what is broken is removed.
    pub(super) fn open(folder: PathBuf, bounds: Bounds, now: Timestamp) -> io::Result<Self> {
        files::ensure_folder(&folder)?;
        let bounds = Bounds { one: bounds.one.min(bounds.all), ..bounds };
        let mut notebooks = Self { folder, bounds, books: HashMap::new(), kept: Ledger::new() };
        for entry in std::fs::read_dir(&notebooks.folder)? {
            notebooks.look_at(&entry?.path(), now);
        }
        notebooks.prune(now);
        notebooks.make_room(0, None);
        Ok(notebooks)
    }

    /// What is kept for each tenant.
    pub(super) fn sums(&self) -> Sums {
        self.kept.sums()
    }

    fn look_at(&mut self, path: &Path, now: Timestamp) {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let Some(session) = name.strip_suffix(ENDING).and_then(|id| id.parse().ok()) else {
            tracing::warn!(path = %path.display(), "a file among the notebooks is not ours; it is left alone");
            return;
        };
        match found(path, now) {
            Ok(Found::Book(book)) => {
                self.kept.set(session, book.rank(), &book.tenant, files::charge(book.length));
                self.books.insert(session, book);
            }
            Ok(Found::OtherVersion) => {
                tracing::warn!(path = %path.display(), "a notebook is of another version; it is left alone");
            }
            Ok(Found::Broken) => {
                tracing::warn!(path = %path.display(), "a notebook is broken; it is removed");
                told("remove a broken notebook", path, files::remove(path));
            }
            Err(error) => tracing::warn!(path = %path.display(), %error, "a notebook cannot be read; it is left alone"),
        }
    }

    /// Begins a session's notebook, or takes what more is known of its kernel.
    pub(super) fn open_one(&mut self, tenant: &str, session: SessionId, kernel: NotebookKernel, now: Timestamp) {
        let kernel = Kernel::new(kernel);
        let Some(book) = self.books.get_mut(&session) else {
            let tenant = tenant.to_owned();
            let book = Book {
                tenant,
                kernel: Some(kernel),
                length: 0,
                cells: 0,
                left_out: 0,
                full: false,
                opened: now,
                ended: None,
            };
            self.books.insert(session, book);
            let path = self.path(session);
            told("begin a notebook", &path, self.begin(session, now));
            return;
        };
        if book.tenant != tenant {
            tracing::error!(%session, "a notebook is of another tenant; nothing is changed");
            return;
        }
        if book.kernel.as_ref().is_some_and(|known| known.is_same(&kernel)) {
            return;
        }
        book.ended = None;
        book.kernel = Some(kernel.clone());
        if book.length > 0 {
            let length = book.length;
            self.grown(session, length);
            told("write into a notebook", &self.path(session), self.add_kernel(session, kernel));
        }
    }

    fn add_kernel(&mut self, session: SessionId, kernel: Kernel) -> io::Result<()> {
        let line = Line::Kernel(kernel).to_bytes()?;
        if line.len() as u64 > self.room(session) { Ok(()) } else { self.append(session, &line) }
    }

    /// Whose a session's notebook is.
    pub(super) fn tenant(&self, session: SessionId) -> Option<&str> {
        self.books.get(&session).map(|book| book.tenant.as_str())
    }

    /// Adds a cell, or as much of it as there is room for.
    pub(super) fn add(&mut self, session: SessionId, cell: &NotebookCell, kept: Kept, read: Read<'_>, now: Timestamp) {
        let Some(book) = self.books.get(&session) else {
            tracing::debug!(%session, execution = %cell.execution, "there is no notebook for a cell");
            return;
        };
        if book.full {
            self.leave_out(session, 1);
            return;
        }
        let begun = if book.length == 0 { self.begin(session, now) } else { Ok(()) };
        let written = begun.and_then(|()| self.add_fitting(session, cell, kept, read));
        if let Err(error) = written {
            tracing::error!(%session, execution = %cell.execution, %error, "a cell could not be written into its notebook");
            self.leave_out(session, 1);
        }
    }

    fn add_fitting(&mut self, session: SessionId, cell: &NotebookCell, kept: Kept, read: Read<'_>) -> io::Result<()> {
        let (room, larger) = (self.room(session), Why::Larger { allowed: self.bounds.one });
        let first = if kept == Kept::All { larger } else { Why::Waiting };
        let attempts = [(kept, first), (Kept::Code, larger), (Kept::CodeStart, larger)];
        let fitting =
            attempts.into_iter().filter(|(k, _)| *k >= kept).find_map(|a| cells::line(cell, a, room, read).ok());
        let fits = fitting.is_some();
        let line = fitting.map_or_else(|| Line::Full {}.to_bytes(), Ok)?;
        self.append(session, &line)?;
        let Some(book) = self.books.get_mut(&session) else { return Ok(()) };
        if fits {
            book.cells += 1;
        } else {
            book.full = true;
            book.left_out = book.left_out.saturating_add(1);
        }
        // The end stays the last line, for that is where it is looked for.
        if book.ended.is_some() { self.append_end(session) } else { Ok(()) }
    }

    /// Counts cells that are not in a session's notebook.
    pub(super) fn leave_out(&mut self, session: SessionId, cells: u64) {
        if let Some(book) = self.books.get_mut(&session) {
            book.left_out = book.left_out.saturating_add(cells);
        }
    }

    /// Its session has ended: from now on it is kept for the retention.
    pub(super) fn end(&mut self, session: SessionId, now: Timestamp) {
        let Some(book) = self.books.get_mut(&session).filter(|book| book.ended.is_none()) else { return };
        book.ended = Some(now);
        book.kernel = None;
        let length = book.length;
        if length == 0 {
            self.books.remove(&session);
            return;
        }
        self.grown(session, length);
        told("end a notebook", &self.path(session), self.append_end(session));
    }

    /// A tenant's notebook as nbformat has it.
    pub(super) fn read(&self, tenant: &str, session: SessionId, now: Timestamp) -> Option<Vec<u8>> {
        let book = self.books.get(&session).filter(|book| book.tenant == tenant && book.length > 0)?;
        if book.ended.is_some_and(|ended| is_over(ended, self.bounds.retention, now)) {
            return None;
        }
        let beside = Beside { cells_left_out: book.left_out, allowed: self.bounds.one };
        match std::fs::read(self.path(session)) {
            Ok(file) => ipynb::assemble(&file, beside),
            Err(error) => {
                tracing::error!(%session, %error, "a notebook cannot be read");
                None
            }
        }
    }

    /// Removes a tenant's notebook. Whether there was one.
    pub(super) fn delete(&mut self, tenant: &str, session: SessionId) -> bool {
        let found = self.books.get(&session).is_some_and(|book| book.tenant == tenant && book.length > 0);
        if !found || !self.drop_file(session) {
            return false;
        }
        if let Some(book) = self.books.get_mut(&session) {
            book.left_out = 0;
        }
        true
    }

    /// Removes what has been kept for long enough.
    pub(super) fn prune(&mut self, now: Timestamp) {
        let retention = self.bounds.retention;
        for session in self.kept.first_while(|(lives, ended)| !lives && is_over(ended, retention, now)) {
            self.drop_file(session);
        }
    }

    /// Writes the first line.
    fn begin(&mut self, session: SessionId, now: Timestamp) -> io::Result<()> {
        let Some(book) = self.books.get(&session) else { return Ok(()) };
        let Some(kernel) = book.kernel.clone() else { return Err(io::Error::other("it has ended")) };
        let header = Header {
            version: VERSION,
            tenant: book.tenant.clone(),
            session: session.to_string(),
            kernel,
            began_at: now,
            cells_left_out: book.left_out,
        };
        let line = Line::Notebook(header).to_bytes()?;
        if line.len() as u64 > LONGEST_HEADER {
            return Err(io::Error::other("what is to be said of it is too long"));
        }
        self.make_room(files::charge(line.len() as u64), Some(session));
        let path = self.path(session);
        files::write_new(&path, &line)?;
        self.grown(session, line.len() as u64);
        Ok(())
    }

    fn append_end(&mut self, session: SessionId) -> io::Result<()> {
        let Some((at, cells_left_out)) = self.books.get(&session).and_then(|b| Some((b.ended?, b.left_out))) else {
            return Ok(());
        };
        let line = Line::End(End { at, cells_left_out }).to_bytes()?;
        self.append(session, &line)
    }

    fn append(&mut self, session: SessionId, line: &[u8]) -> io::Result<()> {
        let Some(length) = self.books.get(&session).map(|book| book.length) else { return Ok(()) };
        let longer = length + line.len() as u64;
        self.make_room(files::charge(longer) - files::charge(length), Some(session));
        let appended = files::append(&self.path(session), length, line);
        match &appended {
            Ok(()) => self.grown(session, longer),
            // Somebody has removed it: the next cell begins a new one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => drop(self.drop_file(session)),
            Err(_) => {}
        }
        appended
    }

    /// States how long a notebook is now.
    fn grown(&mut self, session: SessionId, length: u64) {
        if let Some(book) = self.books.get_mut(&session) {
            book.length = length;
            self.kept.set(session, book.rank(), &book.tenant, files::charge(length));
        }
    }

    /// What a cell's line may take.
    fn room(&self, session: SessionId) -> u64 {
        let length = self.books.get(&session).map_or(0, |book| book.length);
        self.bounds.one.saturating_sub(length).saturating_sub(RESERVE)
    }

    fn make_room(&mut self, bytes: u64, keep: Option<SessionId>) {
        while self.kept.total().saturating_add(bytes) > self.bounds.all {
            let first = keep.map_or_else(|| self.kept.first(), |session| self.kept.first_but(session));
            let Some(session) = first else { return };
            tracing::debug!(%session, "a notebook makes room for others");
            if !self.drop_file(session) {
                return;
            }
        }
    }

    /// Removes a notebook's file. A session that lives begins a new one with its next cell.
    fn drop_file(&mut self, session: SessionId) -> bool {
        let path = self.path(session);
        let removed = files::remove(&path);
        if removed.is_err() {
            told("remove a notebook", &path, removed);
            return false;
        }
        self.kept.remove(session);
        if let Some(book) = self.books.get_mut(&session).filter(|book| book.ended.is_none()) {
            book.left_out = book.left_out.saturating_add(book.cells);
            (book.length, book.cells, book.full) = (0, 0, false);
        } else {
            self.books.remove(&session);
        }
        true
    }

    fn path(&self, session: SessionId) -> PathBuf {
        self.folder.join(format!("{session}{ENDING}"))
    }
}

/// What a file turned out to be.
enum Found {
    Book(Book),
    OtherVersion,
    Broken,
}

/// Reads the first line and the last, for files are long and there may be many of them.
fn found(path: &Path, now: Timestamp) -> io::Result<Found> {
    let mut file = File::open(path)?;
    let length = files::whole_lines(&mut file)?;
    let Some(first) = files::first_line(&mut file, LONGEST_HEADER)? else { return Ok(Found::Broken) };
    let header = match serde_json::from_slice(&first) {
        Ok(Line::Notebook(header)) if header.version == VERSION => header,
        _ => return Ok(if is_of_other_version(&first) { Found::OtherVersion } else { Found::Broken }),
    };
    files::cut(path, length)?;
    let last = files::last_line(&mut file, length, LONGEST_END)?;
    let (opened, left_out) = (header.began_at, header.cells_left_out);
    let mut book =
        Book { tenant: header.tenant, kernel: None, length, cells: 0, left_out, full: false, opened, ended: None };
    match last.and_then(|line| serde_json::from_slice(&line).ok()) {
        Some(Line::End(end)) => {
            book.ended = Some(end.at);
            book.left_out = end.cells_left_out;
        }
        _ => {
            book.ended = Some(now);
            let line = Line::End(End { at: now, cells_left_out: left_out }).to_bytes()?;
            files::append(path, length, &line)?;
            book.length += line.len() as u64;
        }
    }
    Ok(Found::Book(book))
}

fn is_of_other_version(first: &[u8]) -> bool {
    let line: Option<serde_json::Value> = serde_json::from_slice(first).ok();
    line.and_then(|line| line["notebook"]["version"].as_u64()).is_some_and(|version| version != u64::from(VERSION))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_valid, at, cell, kernel};
    use super::*;
    use crate::domain::output::{
        ErrorInfo, JsonText, MimeBundle, MimePart, ResultKind, RichOutput, Shown, Status, TextStream,
    };
    use proptest::prelude::*;
    use serde_json::Value;
    use uuid::Uuid;

    const BOUNDS: Bounds = Bounds { one: 16 * 4096, all: 64 * 4096, retention: Duration::from_secs(3600) };

    fn session(n: u128) -> SessionId {
        SessionId::from_uuid(Uuid::from_u128(n))
    }

    struct World {
        folder: tempfile::TempDir,
        notebooks: Notebooks,
        bounds: Bounds,
    }

    impl World {
        fn new(bounds: Bounds) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let notebooks = Notebooks::open(folder.path().to_owned(), bounds, at(0)).unwrap();
            Self { folder, notebooks, bounds }
        }

        fn again(&mut self, now: Timestamp) {
            self.notebooks = Notebooks::open(self.folder.path().to_owned(), self.bounds, now).unwrap();
        }

        fn open(&mut self, n: u128) {
            self.notebooks.open_one("t", session(n), kernel(), at(n as i64));
        }

        fn add(&mut self, n: u128, cell: &NotebookCell) {
            self.notebooks.add(session(n), cell, Kept::All, &|_| None, at(50));
        }

        fn read(&self, n: u128) -> Option<Value> {
            let bytes = self.notebooks.read("t", session(n), at(100))?;
            let notebook = serde_json::from_slice(&bytes).unwrap();
            assert_valid(&notebook);
            Some(notebook)
        }

        fn sources(&self, n: u128) -> Option<Vec<String>> {
            let notebook = self.read(n)?;
            let cells = notebook["cells"].as_array().unwrap().iter();
            Some(cells.map(|cell| cell["source"].as_str().unwrap().to_owned()).collect())
        }

        fn said(&self, n: u128) -> Value {
            self.read(n).unwrap()["metadata"]["cellblock"].take()
        }

        fn file(&self, n: u128) -> PathBuf {
            self.notebooks.path(session(n))
        }
    }

    #[test]
    fn cells_stand_in_their_order_and_what_is_known_of_the_kernel_last_counts() {
        let mut world = World::new(BOUNDS);
        world.open(1);
        world.open(1);
        assert_eq!(world.sources(1).unwrap().len(), 0);
        world.add(1, &cell(1, "first"));
        let more = NotebookKernel {
            language_info: JsonText("{\"name\":\"python\",\"version\":\"3\"}".to_owned()),
            ..kernel()
        };
        world.notebooks.open_one("t", session(1), more.clone(), at(9));
        world.notebooks.open_one("other", session(1), kernel(), at(9));
        world.add(1, &cell(2, "second"));
        assert_eq!(world.sources(1).unwrap(), ["first", "second"]);
        assert_eq!(world.read(1).unwrap()["metadata"]["language_info"]["version"], "3");
        let length = std::fs::metadata(world.file(1)).unwrap().len();
        world.notebooks.open_one("t", session(1), more, at(9));
        assert_eq!(std::fs::metadata(world.file(1)).unwrap().len(), length, "saying the same again adds nothing");
        world.add(2, &cell(1, "of no session"));
        assert!(world.sources(2).is_none());
    }

    #[test]
    fn another_tenant_neither_reads_nor_deletes() {
        let mut world = World::new(BOUNDS);
        world.open(1);
        world.add(1, &cell(1, "secret"));
        assert!(world.notebooks.read("other", session(1), at(1)).is_none());
        assert!(!world.notebooks.delete("other", session(1)));
        world.again(at(2));
        assert!(world.notebooks.read("other", session(1), at(1)).is_none());
        assert!(!world.notebooks.delete("other", session(1)));
        assert_eq!(world.sources(1).unwrap(), ["secret"]);
    }

    #[test]
    fn a_notebook_is_found_again_and_ends_when_it_had_no_end() {
        let mut world = World::new(BOUNDS);
        (1..=3).for_each(|n| world.open(n));
        (1..=3).for_each(|n| world.add(n, &cell(n, "x")));
        world.notebooks.end(session(1), at(5));
        let ended = std::fs::read(world.file(1)).unwrap();
        for n in [1, 3] {
            let whole = std::fs::read(world.file(n)).unwrap();
            std::fs::write(world.file(n), [&whole[..], b"{\"cell\":{\"id\":\"torn"].concat()).unwrap();
        }
        world.again(at(3000));
        assert_eq!(std::fs::read(world.file(1)).unwrap(), ended, "what is torn is cut off");
        for n in 1..=3 {
            assert_eq!(world.sources(n).unwrap(), ["x"]);
        }
        assert_eq!(world.said(1)["ended_at"], "1970-01-12T13:46:45.000000Z");
        assert_eq!(world.said(3)["ended_at"], "1970-01-12T14:36:40.000000Z");
        world.again(at(3700));
        assert!(world.sources(1).is_none(), "its retention began with its own end");
        assert!(!world.file(1).exists());
        assert_eq!(world.sources(3).unwrap(), ["x"]);
        world.again(at(6600));
        assert!(world.sources(3).is_none());
        assert_eq!(world.notebooks.kept.total(), 0);
    }

    #[test]
    fn what_is_broken_is_removed_at_the_start_and_what_is_not_ours_stays() {
        let mut world = World::new(BOUNDS);
        (1..=4).for_each(|n| world.open(n));
        let header = std::fs::read_to_string(world.file(1)).unwrap();
        std::fs::write(world.file(1), "").unwrap();
        std::fs::write(world.file(2), &header[..header.len() / 2]).unwrap();
        std::fs::write(world.file(3), header.replace("\"version\":1", "\"version\":2")).unwrap();
        std::fs::write(world.file(4), vec![0; 200_000]).unwrap();
        std::fs::write(world.folder.path().join("README"), "").unwrap();
        world.again(at(1));
        assert_eq!([1, 2, 3, 4].map(|n| world.file(n).exists()), [false, false, true, false]);
        assert!(world.folder.path().join("README").exists());
        assert!(world.read(3).is_none());
    }

    #[test]
    fn a_retention_begins_with_the_end_and_holds_even_before_anything_is_removed() {
        let mut world = World::new(BOUNDS);
        (1..=2).for_each(|n| world.open(n));
        world.notebooks.end(session(1), at(10));
        world.notebooks.end(session(1), at(2000));
        let over = at(3610);
        assert!(world.notebooks.read("t", session(1), at(3609)).is_some());
        assert!(world.notebooks.read("t", session(1), over).is_none());
        assert!(world.notebooks.read("t", session(2), over).is_some());
        world.notebooks.prune(over);
        assert_eq!([1, 2].map(|n| world.file(n).exists()), [false, true]);
    }

    #[test]
    fn a_cell_after_the_end_leaves_the_end_the_last_line() {
        let mut world = World::new(BOUNDS);
        world.open(1);
        world.notebooks.end(session(1), at(10));
        world.add(1, &cell(1, "late"));
        world.again(at(3000));
        assert_eq!(world.sources(1).unwrap(), ["late"]);
        assert_eq!(world.said(1)["ended_at"], "1970-01-12T13:46:50.000000Z");
    }

    #[test]
    fn a_deleted_notebook_is_gone_for_good_and_begins_anew_with_the_next_cell() {
        let mut world = World::new(BOUNDS);
        world.open(1);
        world.add(1, &cell(1, "before"));
        assert!(world.notebooks.delete("t", session(1)));
        assert!(!world.file(1).exists());
        assert!(world.sources(1).is_none());
        assert!(!world.notebooks.delete("t", session(1)));
        world.add(1, &cell(2, "after"));
        assert_eq!(world.sources(1).unwrap(), ["after"]);
        assert_eq!(world.said(1)["cells_left_out"], 0);
        world.notebooks.end(session(1), at(1));
        assert!(world.notebooks.delete("t", session(1)));
        world.add(1, &cell(3, "too late"));
        assert!(world.sources(1).is_none());
        assert!(world.notebooks.books.is_empty());
    }

    #[test]
    fn a_notebook_that_grows_too_long_keeps_less_of_each_cell_and_then_says_that_it_is_full() {
        let mut world = World::new(BOUNDS);
        world.open(1);
        let mut long = cell(1, "long output");
        long.shown = vec![Shown::Text { stream: TextStream::Stdout, text: "x".repeat(40_000) }];
        world.add(1, &long);
        world.add(1, &NotebookCell { execution: cell(2, "").execution, ..long.clone() });
        world.add(1, &cell(3, &"c".repeat(30_000)));
        let notebook = world.read(1).unwrap();
        let output = |n: usize| notebook["cells"][n]["outputs"][0]["text"].as_str().unwrap().to_owned();
        assert_eq!(output(0).len(), 40_000);
        assert_eq!(output(1), "[… its outputs were left out: the notebook would be larger than 65536 bytes …]\n");
        assert!(output(2).contains("the rest of its code"));
        assert_eq!(notebook["cells"][2]["source"].as_str().unwrap().len(), cells::CODE_START);
        for n in 4..100 {
            world.add(1, &cell(n, &"d".repeat(1000)));
        }
        let said = world.said(1);
        assert_eq!(said["full"], true);
        assert_eq!(said["cells_left_out"], 99 - world.sources(1).unwrap().len());
        assert!(std::fs::metadata(world.file(1)).unwrap().len() <= BOUNDS.one);
        world.notebooks.end(session(1), at(1));
        world.again(at(2));
        assert_eq!(world.said(1)["cells_left_out"], said["cells_left_out"]);
    }

    #[test]
    fn ended_notebooks_make_room_first_and_the_one_that_ended_first_before_others() {
        let mut world = World::new(Bounds { one: 3 * 4096, all: 4 * 4096, ..BOUNDS });
        (1..=4).for_each(|n| world.open(n));
        world.notebooks.end(session(3), at(10));
        world.notebooks.end(session(2), at(20));
        let exist = |world: &World| (1..=6).filter(|n| world.file(*n).exists()).collect::<Vec<_>>();
        world.open(5);
        assert_eq!(exist(&world), [1, 2, 4, 5]);
        world.add(5, &cell(1, &"x".repeat(4096)));
        assert_eq!(exist(&world), [1, 4, 5]);
        world.open(6);
        assert_eq!(exist(&world), [4, 5, 6], "then the one that was opened first");
        world.add(1, &cell(2, "again"));
        assert_eq!(world.sources(1).unwrap(), ["again"]);
        assert_eq!(exist(&world).len(), 3);
    }

    #[test]
    fn a_notebook_that_made_room_says_what_it_misses() {
        let mut world = World::new(Bounds { one: 4096, all: 4096, ..BOUNDS });
        (1..=2).for_each(|n| world.open(n));
        world.add(1, &cell(1, "x"));
        world.add(1, &cell(2, "x"));
        world.add(2, &cell(3, "x"));
        assert!(world.sources(1).is_none());
        world.add(1, &cell(4, "y"));
        assert_eq!(world.sources(1).unwrap(), ["y"]);
        assert_eq!(world.said(1)["cells_left_out"], 2);
    }

    #[test]
    fn a_file_that_somebody_removed_or_that_cannot_be_written_costs_cells_and_nothing_else() {
        let mut world = World::new(BOUNDS);
        world.open(1);
        world.add(1, &cell(1, "x"));
        std::fs::remove_file(world.file(1)).unwrap();
        world.add(1, &cell(2, "lost"));
        world.add(1, &cell(3, "y"));
        assert_eq!(world.sources(1).unwrap(), ["y"]);
        assert_eq!(world.said(1)["cells_left_out"], 2);
        assert_eq!(mode(&world.file(1)), 0o600);
        assert_eq!(mode(world.folder.path()), 0o700);
    }

    fn mode(path: &Path) -> u32 {
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions()) & 0o777
    }

    /// JSON as a kernel may send it, well-formed or not.
    fn hostile() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<String>().prop_map(|text| serde_json::to_string(&text).unwrap()),
            "[\\[\\]{}\",:\\\\ud8c0-9e.\\- \n]{0,30}",
            (0..300_usize).prop_map(|n| "[".repeat(n) + &"]".repeat(n)),
            Just("{\"a\":\n[1e999]}".to_owned()),
            Just("\"\\ud800\"".to_owned()),
            Just("[\"a\\n\", \"b\"]".to_owned()),
            Just("{\"needs_background\": \"light\"}".to_owned()),
            (0..6_000_usize).prop_map(|n| format!("\"{}\"", "x".repeat(n))),
        ]
    }

    fn hostile_bundle() -> impl Strategy<Value = MimeBundle> {
        let mimes = vec!["text/plain", "text/html", "image/png", "application/json", "application/a+json", "nonsense"];
        let mime = prop::sample::select(mimes).prop_map(str::to_owned);
        prop::collection::btree_map(mime, hostile().prop_map(|j| MimePart::Inline(JsonText(j))), 0..4)
    }

    fn shown() -> impl Strategy<Value = Shown> {
        let data = hostile_bundle();
        let kind = prop::sample::select(vec![ResultKind::DisplayData, ResultKind::ExecuteResult]);
        prop_oneof![
            any::<String>().prop_map(|text| Shown::Text { stream: TextStream::Stdout, text }),
            (kind, data, hostile(), prop::option::of("[de]")).prop_map(|(kind, data, metadata, display_id)| {
                let metadata = JsonText(metadata);
                Shown::Rich(RichOutput { kind, data, metadata, display_id })
            }),
            any::<(String, String, Vec<String>)>()
                .prop_map(|(name, value, traceback)| { Shown::Error(ErrorInfo { name, value, traceback }) }),
        ]
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(u128, Box<NotebookCell>),
        Open(u128),
        End(u128),
        Delete(u128),
        Tear(u128, usize),
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        let status = prop::sample::select(vec![Status::Ok, Status::Error, Status::Timeout, Status::Lost]);
        let updates = prop::collection::vec(("[de]", hostile_bundle(), hostile().prop_map(JsonText)), 0..3);
        let cells = (1..200_u128, any::<String>(), status, prop::collection::vec(shown(), 0..4), updates);
        let cells = cells.prop_map(|(n, code, status, shown, updates)| {
            Box::new(NotebookCell { status, shown, updates, ..cell(n, &code) })
        });
        prop_oneof![
            12 => (1..4_u128, cells).prop_map(|(n, cell)| Step::Add(n, cell)),
            3 => (1..4_u128).prop_map(Step::Open),
            1 => (1..4_u128).prop_map(Step::End),
            1 => (1..4_u128).prop_map(Step::Delete),
            1 => (1..4_u128, 0..500_usize).prop_map(|(n, cut)| Step::Tear(n, cut)),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_sequence_of_cells_gives_a_notebook_that_can_be_read_within_its_bounds(steps in prop::collection::vec(step(), 0..25)) {
            let mut world = World::new(Bounds { one: 12 * 1024, all: 20 * 1024, ..BOUNDS });
            (1..=3).for_each(|n| world.open(n));
            for step in steps {
                match step {
                    Step::Add(n, cell) => world.add(n, &cell),
                    Step::Open(n) => world.open(n),
                    Step::End(n) => world.notebooks.end(session(n), at(60)),
                    Step::Delete(n) => drop(world.notebooks.delete("t", session(n))),
                    Step::Tear(n, cut) => {
                        if let Ok(file) = std::fs::read(world.file(n)) {
                            std::fs::write(world.file(n), &file[..file.len().saturating_sub(cut)]).unwrap();
                            world.again(at(70));
                        }
                    }
                    Step::Restart => world.again(at(70)),
                }
                let lengths = (1..=3).filter_map(|n| std::fs::metadata(world.file(n)).ok()).map(|m| m.len());
                let lengths: Vec<_> = lengths.collect();
                prop_assert!(lengths.iter().all(|length| *length <= 12 * 1024) && lengths.iter().sum::<u64>() <= 20 * 1024);
                let charged: u64 = lengths.iter().map(|length| files::charge(*length)).sum();
                prop_assert_eq!(world.notebooks.kept.total(), charged);
                for n in 1..=3 {
                    if let Some(notebook) = world.read(n) {
                        prop_assert!(notebook.to_string().len() <= 13 * 1024);
                    }
                }
            }
        }
    }
}
