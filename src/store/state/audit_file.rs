//! The audit's copy in a file: from the last event that was copied on, each committed one is added to it as a line. The database has all of them, so a disk that was full
//! or a process that was killed costs none, unless the database has forgotten it by then. It decides nothing of when events go.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::{Connection, params};

/// How the table is made: of the last event that was copied, its number.
pub(super) const TABLE: &str = "CREATE TABLE audit_copy (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        last INTEGER NOT NULL
    ) STRICT;";

/// Events that are copied in one go, and bytes of them: commits wait that long.
const STRETCH: (usize, usize) = (1000, 4 * 1024 * 1024);
/// A file that can't be written is tried again after this long, with the next commit.
const RETRY: Duration = Duration::from_secs(5);

/// Why a stretch was not copied.
#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error("it can't be written: {0}")]
    File(#[from] io::Error),
    #[error("the database can't be asked what to copy: {0}")]
    Database(#[from] rusqlite::Error),
}

/// A file that events are copied to.
#[derive(Debug)]
pub(super) struct Copying {
    file: File,
    /// The number of the last event that is in it.
    last: i64,
    /// There may be later ones.
    is_behind: bool,
    /// It could not be written.
    retry_at: Option<Instant>,
}

impl Copying {
    /// Goes on after the event of this number.
    pub(super) fn new(file: File, last: i64) -> Self {
        Self { file, last, is_behind: true, retry_at: None }
    }

    /// Whether there may be something to copy now.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.is_behind && self.retry_at.is_none_or(|at| now >= at)
    }

    /// Copies a stretch of what is committed and not copied. With `has_new` there is more since the last time.
    pub(super) fn go_on(&mut self, has_new: bool, connection: &Connection, now: Instant) {
        self.is_behind |= has_new;
        if !self.is_due(now) {
            return;
        }
        match self.copy(connection) {
            Ok(has_more) => {
                self.is_behind = has_more;
                if self.retry_at.take().is_some() {
                    tracing::info!("audit.file is written again");
                }
            }
            Err(error) => {
                tracing::error!(%error, "audit.file is behind: events are in the database, and are copied once it can be written");
                self.retry_at = Some(now + RETRY);
            }
        }
    }

    /// Says whether there is more.
    fn copy(&mut self, connection: &Connection) -> Result<bool, CopyError> {
        let mut after = connection.prepare_cached("SELECT id, body FROM audit WHERE id > ?1 ORDER BY id LIMIT ?2")?;
        let mut rows = after.query(params![self.last, STRETCH.0 as i64])?;
        let (mut lines, mut found, mut last) = (String::new(), 0, self.last);
        while lines.len() < STRETCH.1
            && let Some(row) = rows.next()?
        {
            let (number, body): (i64, String) = (row.get(0)?, row.get(1)?);
            if found == 0 && number > last + 1 {
                let missing = number - last - 1;
                tracing::error!(missing, "audit events were forgotten before they could be copied to audit.file");
            }
            lines.push_str(&numbered(number, &body));
            (found, last) = (found + 1, number);
        }
        if found == 0 {
            return Ok(false);
        }
        self.add(&lines)?;
        self.last = last;
        let mut keep = connection.prepare_cached("UPDATE audit_copy SET last = ?1")?;
        keep.execute([last])?;
        Ok(found == STRETCH.0 || lines.len() >= STRETCH.1)
    }

    fn add(&mut self, lines: &str) -> io::Result<()> {
        let end = self.file.metadata()?.len();
        // What did not fit whole is no line that others could read, nor what came behind it.
        self.file.write_all(lines.as_bytes()).inspect_err(|_| drop(self.file.set_len(end)))
    }
}

/// The number of the last event that was copied to any file. Where none ever was, those that are there count as copied.
pub(super) fn last_copied(connection: &Connection) -> rusqlite::Result<i64> {
    connection.execute(
        "INSERT INTO audit_copy (one, last)
         SELECT 1, coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'audit'), 0)
         WHERE true ON CONFLICT (one) DO NOTHING",
        [],
    )?;
    connection.query_row("SELECT last FROM audit_copy", [], |row| row.get(0))
}

/// Has what is added begin with a line of its own, where a process was killed within one.
pub(super) fn begin_line(path: &Path, file: &mut File) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let about = file.metadata()?;
    if !about.is_file() || about.len() == 0 {
        return Ok(());
    }
    let mut last = [0];
    // One that may be written only says nothing of its end.
    let is_known = File::open(path).and_then(|known| known.read_exact_at(&mut last, about.len() - 1)).is_ok();
    if is_known && last != *b"\n" { file.write_all(b"\n") } else { Ok(()) }
}

/// An event's line with its number, by which one that is there twice can be told.
fn numbered(number: i64, body: &str) -> String {
    match body.strip_prefix('{') {
        Some(fields) => format!("{{\"number\":{number},{fields}\n"),
        None => format!("{body}\n"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::{AuditEvent, AuditQuery, State, path_in};
    use super::*;

    struct Bench {
        folder: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            Self { folder: tempfile::tempdir().unwrap() }
        }

        fn file(&self) -> std::path::PathBuf {
            self.folder.path().join("audit.jsonl")
        }

        /// A process that copies to a file, if it does, and puts these events.
        async fn process(&self, copy: Option<&Path>, requests: std::ops::Range<usize>) -> State {
            let state = State::open(self.folder.path(), None).unwrap().0;
            if let Some(copy) = copy {
                state.copy_audit_to(copy).unwrap();
            }
            for request in requests {
                let event = AuditEvent { request: request.to_string(), ..AuditEvent::now("create_run", "ok") };
                assert!(state.put_audit(event));
            }
            state.settle().await.unwrap();
            state
        }

        /// What is copied: the requests and the numbers.
        fn copied(&self) -> (Vec<usize>, Vec<i64>) {
            let text = std::fs::read_to_string(self.file()).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            lines
                .map(|l| (l["request"].as_str().unwrap().parse::<usize>().unwrap(), l["number"].as_i64().unwrap()))
                .unzip()
        }
    }

    #[tokio::test]
    async fn a_copy_begins_with_what_comes_and_goes_on_after_a_process_that_did_not_copy() {
        let bench = Bench::new();
        drop(bench.process(None, 0..3).await);
        drop(bench.process(Some(&bench.file()), 3..5).await);
        assert_eq!(bench.copied(), (vec![3, 4], vec![4, 5]));
        // Killed before it could copy what was committed.
        drop(bench.process(None, 5..7).await);
        drop(bench.process(Some(&bench.file()), 7..8).await);
        assert_eq!(bench.copied(), (vec![3, 4, 5, 6, 7], vec![4, 5, 6, 7, 8]));
    }

    #[tokio::test]
    async fn a_disk_that_is_full_costs_no_event() {
        let bench = Bench::new();
        let state = bench.process(Some(Path::new("/dev/full")), 0..3).await;
        state.copy_audit_to(&bench.file()).unwrap();
        state.settle().await.unwrap();
        assert_eq!(bench.copied().0, [0, 1, 2]);
        drop(state);
        drop(bench.process(Some(Path::new("/dev/full")), 3..5).await);
        drop(bench.process(Some(&bench.file()), 5..6).await);
        assert_eq!(bench.copied().0, [0, 1, 2, 3, 4, 5]);
    }

    #[tokio::test]
    async fn a_file_that_failed_is_tried_again_after_a_while() {
        let bench = Bench::new();
        drop(bench.process(Some(Path::new("/dev/full")), 0..3).await);
        let connection = Connection::open(path_in(bench.folder.path())).unwrap();
        let full = std::fs::OpenOptions::new().append(true).open("/dev/full").unwrap();
        let (mut copying, start) = (Copying::new(full, last_copied(&connection).unwrap()), Instant::now());
        copying.go_on(false, &connection, start);
        copying.file = std::fs::OpenOptions::new().create(true).append(true).open(bench.file()).unwrap();
        copying.go_on(true, &connection, start + RETRY / 2);
        assert!(bench.copied().0.is_empty() && !copying.is_due(start + RETRY / 2));
        copying.go_on(false, &connection, start + RETRY);
        assert_eq!(bench.copied().0, [0, 1, 2]);
        assert!(!copying.is_due(start + 2 * RETRY), "there is nothing more");
        assert_eq!(last_copied(&connection).unwrap(), 3);
    }

    #[tokio::test]
    async fn a_long_absence_is_made_up_for_piece_by_piece() {
        let bench = Bench::new();
        drop(bench.process(Some(&bench.file()), 0..1).await);
        let many = 3 * STRETCH.0;
        drop(bench.process(None, 1..many).await);
        let state = bench.process(Some(&bench.file()), many..many + 1).await;
        while bench.copied().0.len() <= many {
            state.settle().await.unwrap();
        }
        assert_eq!(bench.copied().0, (0..=many).collect::<Vec<_>>());
        let query = AuditQuery { limit: many, ..AuditQuery::default() };
        assert!(state.audit(query).await.unwrap().has_more);
    }

    #[tokio::test]
    async fn what_a_killed_process_has_left_of_a_line_spoils_no_other() {
        let bench = Bench::new();
        std::fs::write(bench.file(), "{\"number\":1,\"at").unwrap();
        drop(bench.process(Some(&bench.file()), 0..1).await);
        let text = std::fs::read_to_string(bench.file()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines.len(), lines[0]), (2, "{\"number\":1,\"at"));
        assert!(serde_json::from_str::<Value>(lines[1]).is_ok());
    }
}
