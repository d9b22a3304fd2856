//! Files on a real disk: what stays below the folder, what is put in place whole, and archives of all kinds.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

use cellblock_wire::files::{Conditions, List, Part, Read};
use proptest::prelude::*;
use rustix::fs::{FileType, Mode, OFlags};
use tar::{Builder, EntryType, Header};

use cellblock_wire::files as wire;

use super::change::{make_folder, move_to, remove};
use super::path::open_by_steps;
use super::unpack::Unpacking;
use super::*;

/// A folder with another one in it, and a secret beside that.
struct Room {
    base: PathBuf,
    roots: Roots,
}

impl Room {
    fn new(name: &str) -> Self {
        // Not below /tmp, which is a root itself.
        let base = PathBuf::from(format!("/var/tmp/cellblock-files-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(base.join("work")).unwrap();
        fs::write(base.join("secret"), "s").unwrap();
        Self { roots: Roots::new(&base.join("work")), base }
    }

    fn work(&self) -> PathBuf {
        self.base.join("work")
    }

    fn place(&self, path: &str) -> Place {
        self.roots.place(path).unwrap()
    }

    fn put(&self, path: &str, bytes: &[u8]) -> Result<(), FileError> {
        let none = Conditions::default();
        let mut upload = Upload::create(&self.place(path), &none)?;
        upload.write(bytes)?;
        upload.finish(None, &none).map(drop)
    }

    fn get(&self, path: &str) -> Result<Vec<u8>, FileError> {
        let (mut download, _) = Download::asked(&self.place(path), &Read::default())?;
        let mut all = Vec::new();
        loop {
            let chunk = download.read().map_err(failed("read"))?;
            if chunk.is_empty() {
                return Ok(all);
            }
            all.extend(chunk);
        }
    }

    async fn listed(&self) -> Vec<String> {
        let asked = List { depth: 32, limit: 2000, ..List::default() };
        list::list(&self.place(""), &asked).await.unwrap().entries.into_iter().map(|entry| entry.path).collect()
    }

    async fn unpack(&self, path: &str, archive: &[u8], gzip: bool) -> Result<u64, FileError> {
        let mut unpacking = Unpacking::begin(&self.place(path), gzip)?;
        for piece in archive.chunks(700) {
            if let Err(error) = unpacking.push(piece).await {
                unpacking.abandon().await;
                return Err(error);
            }
        }
        unpacking.finish().await.map(|(done, _)| done.entries)
    }

    /// Everything that is there, hidden things too.
    fn raw(&self) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(self.work()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.base);
    }
}

/// An entry's type, name, link and content.
type Entry<'a> = (EntryType, &'a str, &'a str, &'a [u8]);

fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, path, link, content) in entries {
        let mut head = Header::new_gnu();
        head.set_entry_type(*kind);
        head.set_size(content.len() as u64);
        head.set_mode(0o4755);
        // By hand: the library itself refuses what is tried here.
        let name = &mut head.as_old_mut().name;
        name[..path.len()].copy_from_slice(path.as_bytes());
        let name = &mut head.as_old_mut().linkname;
        name[..link.len()].copy_from_slice(link.as_bytes());
        head.set_cksum();
        builder.append(&head, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

#[tokio::test]
async fn files_stay_below_the_folder_and_no_link_leads_out() {
    let room = Room::new("stay");
    let big = vec![7; 600_000];
    room.put("a/b/c.bin", &big).unwrap();
    room.put("a/b/c.bin", &big[1..]).unwrap();
    assert_eq!(room.get("a/b/c.bin").unwrap(), &big[1..]);
    symlink(room.base.join("secret"), room.work().join("link")).unwrap();
    symlink("../secret", room.work().join("up")).unwrap();
    symlink(&room.base, room.work().join("out")).unwrap();
    symlink("a/b", room.work().join("in")).unwrap();
    symlink("/proc/self/root", room.work().join("magic")).unwrap();
    for path in ["link", "up", "out/secret", "magic/etc/passwd"] {
        assert!(matches!(room.get(path), Err(FileError::Denied(_))), "{path}: {:?}", room.get(path));
        assert!(!matches!(list::stat(&room.place(path)), Ok(stat) if stat.kind == wire::Kind::File), "{path}");
    }
    assert_eq!(room.get("in/c.bin").unwrap().len(), 599_999, "a link that stays inside is followed");
    for path in ["out/new", "in/new", "magic/new"] {
        assert!(matches!(room.put(path, b""), Err(FileError::Denied(_) | FileError::NotFolder)), "{path}");
    }
    assert!(matches!(room.put("a/b", b""), Err(FileError::IsFolder)));
    assert!(matches!(room.put("a/b/c.bin/d", b""), Err(FileError::NotFolder)));
    assert!(matches!(room.get("a"), Err(FileError::IsFolder)));
    assert!(matches!(room.get("no"), Err(FileError::Absent)));
    room.put("link", b"mine").unwrap();
    assert_eq!(fs::read(room.base.join("secret")).unwrap(), b"s");
    let by_steps = open_by_steps(room.place("").root().unwrap(), Path::new("out/secret"), OFlags::RDONLY);
    assert!(matches!(by_steps, Err(Errno::NOTDIR | Errno::LOOP)));
    drop(Upload::create(&room.place("a/unfinished"), &Conditions::default()).unwrap());
    rustix::fs::mknodat(rustix::fs::CWD, room.work().join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    assert!(matches!(room.get("fifo"), Err(FileError::Invalid(_))));
    let found = look(&room.work()).await.unwrap();
    let mut found: Vec<_> = found.files.into_iter().map(|(path, stamp)| (path, stamp.size)).collect();
    found.sort();
    assert_eq!(found, [("a/b/c.bin".to_owned(), 599_999), ("link".to_owned(), 4)]);
    assert_eq!(room.listed().await, ["a", "a/b", "a/b/c.bin", "fifo", "in", "link", "magic", "out", "up"]);
}

#[tokio::test]
async fn a_page_goes_on_where_the_last_one_ended() {
    let room = Room::new("pages");
    for path in ["a/1", "a/2", "a-b", "b/c/1", "b/c/2", "b.x", "c", "é", "new\nline"] {
        room.put(path, b"x").unwrap();
    }
    let all = room.listed().await;
    assert_eq!(all.len(), 12, "{all:?}");
    for limit in 1..6 {
        let (mut told, mut after) = (Vec::new(), None);
        loop {
            let asked = List { depth: 9, limit, after, ..List::default() };
            let page = list::list(&room.place(""), &asked).await.unwrap();
            assert!(page.entries.len() <= limit);
            told.extend(page.entries.into_iter().map(|entry| entry.path));
            after = told.last().cloned();
            if !page.truncated {
                break;
            }
        }
        assert_eq!(told, all, "{limit} at a time");
    }
}

#[tokio::test]
async fn conditions_are_about_what_stands_there() {
    let room = Room::new("conditions");
    let new = Conditions { if_none_match: Some(vec!["*".to_owned()]), ..Conditions::default() };
    let upload = Upload::create(&room.place("f"), &new).unwrap();
    room.put("f", b"came first").unwrap();
    assert!(matches!(upload.finish(None, &new), Err(FileError::Precondition)), "it is looked at again at the end");
    assert_eq!(room.get("f").unwrap(), b"came first");
    let etag = list::stat(&room.place("f")).unwrap().etag;
    let same = Conditions { if_match: Some(vec![etag]), ..Conditions::default() };
    Upload::create(&room.place("f"), &same).unwrap();
    room.put("f", b"came again").unwrap();
    assert!(matches!(Upload::create(&room.place("f"), &same), Err(FileError::Precondition)));
    assert!(matches!(remove(&room.place("f"), false, &same), Err(FileError::Precondition)));
    assert!(matches!(Upload::create(&room.place("none"), &same), Err(FileError::Precondition)));
    assert_eq!(room.raw(), ["f"]);
}

#[tokio::test]
async fn folders_go_with_all_that_is_in_them_however_deep() {
    let room = Room::new("remove");
    let mut deep = room.place("").root().unwrap();
    rustix::fs::mkdirat(&deep, "deep", Mode::RWXU).unwrap();
    deep = rustix::fs::openat(&deep, "deep", OFlags::RDONLY, Mode::empty()).unwrap();
    for _ in 0..3000 {
        rustix::fs::mkdirat(&deep, "d", Mode::RWXU).unwrap();
        deep = rustix::fs::openat(&deep, "d", OFlags::RDONLY, Mode::empty()).unwrap();
    }
    room.put("deep/x/y", b"1").unwrap();
    symlink(&room.base, room.work().join("deep/out")).unwrap();
    fs::set_permissions(room.work().join("deep/x"), fs::Permissions::from_mode(0o000)).unwrap();
    assert!(matches!(remove(&room.place("deep"), false, &Conditions::default()), Err(FileError::IsFolder)));
    let removal = remove(&room.place("deep"), true, &Conditions::default()).unwrap();
    assert_eq!(room.listed().await, Vec::<String>::new(), "it is out of sight at once");
    removal.finish().await.unwrap();
    assert_eq!(room.raw(), Vec::<String>::new());
    assert_eq!(fs::read(room.base.join("secret")).unwrap(), b"s");
    assert!(matches!(remove(&room.place(""), true, &Conditions::default()), Err(FileError::Denied(_))));
}

#[tokio::test]
async fn things_are_moved_over_what_may_be_replaced() {
    let room = Room::new("move");
    room.put("a/f", b"1").unwrap();
    room.put("g", b"2").unwrap();
    assert!(matches!(move_to(&room.place("a/f"), &room.place("g"), false).await, Err(FileError::Exists(_))));
    assert!(!move_to(&room.place("a/f"), &room.place("g"), true).await.unwrap().is_new);
    assert_eq!(room.get("g").unwrap(), b"1");
    assert!(move_to(&room.place("g"), &room.place("new/place/h"), false).await.unwrap().is_new);
    assert!(matches!(move_to(&room.place("new"), &room.place("new/place/n"), false).await, Err(FileError::Invalid(_))));
    assert!(matches!(move_to(&room.place("none"), &room.place("n"), false).await, Err(FileError::Absent)));
    assert!(make_folder(&room.place("x/y")).unwrap().is_new);
    assert!(!make_folder(&room.place("x/y")).unwrap().is_new);
    assert!(matches!(make_folder(&room.place("new/place/h")), Err(FileError::Exists(_))));
    let away = format!("/tmp/cellblock-moved-{}", std::process::id());
    move_to(&room.place("new/place/h"), &room.place(&away), false).await.unwrap();
    assert_eq!(fs::read(&away).unwrap(), b"1");
    fs::remove_file(&away).unwrap();
    assert_eq!(room.listed().await, ["a", "new", "new/place", "x", "x/y"]);
}

#[tokio::test]
async fn an_upload_goes_on_where_it_broke_off() {
    let (room, uploads) = (Room::new("resume"), resume::Resumable::default());
    let (place, none) = (room.place("f"), Conditions::default());
    let part = |offset, is_last| Part { upload: "u1".to_owned(), offset, is_last, sha256: None };
    let mut first = uploads.receive(&place, &part(0, true), &none).unwrap();
    first.upload().unwrap().write(b"hello ").unwrap();
    drop(first);
    assert_eq!(uploads.received(&place, "u1").unwrap(), 6);
    assert_eq!(room.listed().await, Vec::<String>::new());
    let wrong = uploads.receive(&place, &part(5, true), &none).err().unwrap();
    assert!(matches!(wrong, FileError::Offset { received: 6 }));
    let mut rest = uploads.receive(&place, &part(6, true), &none).unwrap();
    rest.upload().unwrap().write(b"world").unwrap();
    let upload = rest.take().unwrap();
    let hash = resume::hash(upload.reopen().unwrap()).await.unwrap();
    assert_eq!(hash, "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9");
    upload.finish(None, &none).unwrap();
    assert_eq!(room.get("f").unwrap(), b"hello world");
    assert!(matches!(uploads.received(&place, "u1"), Err(FileError::Absent)));
    assert_eq!(room.raw(), ["f"]);
}

#[tokio::test]
async fn archives_come_back_as_they_were() {
    let room = Room::new("tar");
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    for path in ["plain", "a b/new\nline", "é/😀", &long] {
        room.put(&format!("from/{path}"), path.repeat(1000).as_bytes()).unwrap();
    }
    room.put("from/empty", b"").unwrap();
    symlink("../plain", room.work().join("from/a b/link")).unwrap();
    fs::set_permissions(room.work().join("from/plain"), fs::Permissions::from_mode(0o755)).unwrap();
    for gzip in [false, true] {
        let mut pieces = pack::pack(&room.place("from"), gzip).await.unwrap();
        let mut whole = Vec::new();
        while let Some(piece) = pieces.recv().await {
            whole.extend(piece.unwrap());
        }
        let to = format!("to-{gzip}");
        assert_eq!(room.unpack(&to, &whole, gzip).await.unwrap(), 9);
        for path in ["plain", "a b/new\nline", "é/😀", &long] {
            assert_eq!(room.get(&format!("{to}/{path}")).unwrap(), path.repeat(1000).as_bytes());
        }
        assert_eq!(room.get(&format!("{to}/a b/link")).unwrap(), "plain".repeat(1000).as_bytes());
        let mode = fs::metadata(room.work().join(&to).join("plain")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
        assert!(matches!(room.unpack("cut", &whole[..whole.len() / 2], gzip).await, Err(FileError::Archive(_))));
        assert!(!room.work().join("cut").exists(), "a folder that was made for it goes with it");
    }
    assert!(matches!(room.unpack("x", b"no archive", false).await, Err(FileError::Archive(_))));
    assert!(matches!(room.unpack("x", b"", false).await, Err(FileError::Archive(_))));
}

#[tokio::test]
async fn what_an_archive_may_not_hold_leaves_nothing() {
    use EntryType::{Block, Char, Directory, Fifo, GNUSparse, Link, Regular, Symlink};
    let room = Room::new("refused");
    room.put("there/file", b"1").unwrap();
    symlink(&room.base, room.work().join("there/out")).unwrap();
    let good = (Regular, "good", "", &b"x"[..]);
    let cases: &[(&str, &[Entry<'_>])] = &[
        ("up", &[(Regular, "../evil", "", b"x")]),
        ("up in the middle", &[(Regular, "a/../../evil", "", b"x")]),
        ("absolute", &[(Regular, "/tmp/evil", "", b"x")]),
        ("a link out", &[(Symlink, "l", "/etc/passwd", b"")]),
        ("a link up", &[(Symlink, "l", "../secret", b"")]),
        ("a link up later", &[(Symlink, "l", "a/../../secret", b"")]),
        (
            "through a link of its own",
            &[(Directory, "d", "", b""), (Symlink, "l", "d", b""), (Regular, "l/evil", "", b"x")],
        ),
        ("through a link that is there", &[(Regular, "out/evil", "", b"x")]),
        ("a hard link out", &[(Link, "l", "../secret", b"")]),
        ("a hard link to what is there", &[(Link, "l", "file", b"")]),
        ("a hard link to a link", &[(Symlink, "s", "good", b""), (Link, "l", "s", b"")]),
        ("a fifo", &[(Fifo, "f", "", b"")]),
        ("a device", &[(Char, "c", "", b"")]),
        ("a disk", &[(Block, "b", "", b"")]),
        ("sparse", &[(GNUSparse, "s", "", b"")]),
        ("a file over a folder", &[(Regular, "sub", "", b"x")]),
        ("a folder over a file", &[(Directory, "file", "", b"")]),
        ("a hidden name", &[(Regular, ".cellblock-upload-0123456789abcdef", "", b"x")]),
    ];
    room.put("there/sub/x", b"1").unwrap();
    let before = room.listed().await;
    for (what, entries) in cases {
        let all: Vec<_> = [good].iter().chain(*entries).copied().collect();
        let error = room.unpack("there", &archive(&all), false).await.expect_err(what);
        let is_told = matches!(error, FileError::Archive(_) | FileError::IsFolder | FileError::NotFolder);
        assert!(is_told, "{what}: {error}");
        assert_eq!(room.listed().await, before, "{what}");
        assert_eq!(fs::read_dir(room.work().join("there")).unwrap().count(), 3, "{what}: something is left");
    }
    assert_eq!(fs::read_dir(&room.base).unwrap().count(), 2);
    let linked = archive(&[good, (Link, "again", "good", b""), (Symlink, "s/l", "../good", b"")]);
    assert_eq!(room.unpack("there", &linked, false).await.unwrap(), 3);
    assert_eq!(room.get("there/again").unwrap(), b"x");
    assert_eq!(room.get("there/s/l").unwrap(), b"x");
    let mode = fs::metadata(room.work().join("there/good")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755, "setuid is nothing that a caller gives");
    let mut lies = archive(&[good]);
    lies[124..136].copy_from_slice(b"\x80\0\0\0\0\0\0\0\xff\xff\xff\xff");
    let sum: u32 = lies[..148].iter().chain(&lies[156..512]).map(|b| u32::from(*b)).sum::<u32>() + 256;
    lies[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let refused = room.unpack("there", &lies, false).await.unwrap_err();
    assert!(matches!(refused, FileError::Archive(_) | FileError::NoSpace(Some(_))), "{refused}");
}

#[tokio::test]
async fn changes_of_a_folder_are_told() {
    let room = Room::new("watch");
    room.put("before/x", b"1").unwrap();
    let mut lines = watch::watch(room.place(""), true).unwrap();
    let mut seen = String::new();
    let mut next = async |until: &str| {
        seen.clear();
        while !seen.contains(until) {
            let line = tokio::time::timeout(std::time::Duration::from_secs(10), lines.recv()).await;
            seen.push_str(
                std::str::from_utf8(&line.unwrap_or_else(|_| panic!("{until} after {seen}")).unwrap().unwrap())
                    .unwrap(),
            );
        }
        seen.clone()
    };
    next("watching").await;
    room.put("up", b"1").unwrap();
    next(r#"{"event":"created","path":"up","is_folder":false,"is_whole":true}"#).await;
    fs::write(room.work().join("before/x"), "2").unwrap();
    next(r#"{"event":"modified","path":"before/x"}"#).await;
    fs::create_dir_all(room.work().join("n/e/w")).unwrap();
    next(r#""path":"n/e/w""#).await;
    fs::write(room.work().join("n/e/w/é\n"), "2").unwrap();
    next(r#"{"event":"created","path":"n/e/w/é\n","is_folder":false,"is_whole":false}"#).await;
    fs::rename(room.work().join("up"), room.work().join("n/up")).unwrap();
    next(r#"{"event":"moved","path":"up","to":"n/up"}"#).await;
    fs::remove_file(room.work().join("n/up")).unwrap();
    let seen = next(r#"{"event":"deleted","path":"n/up"}"#).await;
    assert!(!seen.contains("cellblock-upload"), "{seen}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_archive_writes_outside_or_leaves_what_is_not_finished(
        names in proptest::collection::vec("[a./]{1,8}", 1..6),
        links in proptest::collection::vec("[a./]{0,8}", 6),
        kinds in proptest::collection::vec(0..5usize, 6),
        broken in proptest::option::of((0..4096usize, any::<u8>())),
    ) {
        let kinds = kinds.into_iter().map(|n| [EntryType::Regular, EntryType::Symlink, EntryType::Link, EntryType::Directory, EntryType::XHeader][n]);
        let entries: Vec<_> = names.iter().zip(&links).zip(kinds).map(|((n, l), kind)| (kind, n.as_str(), l.as_str(), &b"12 path=a/b\n"[..])).collect();
        let mut bytes = archive(&entries);
        if let Some((at, byte)) = broken {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let room = Room::new("any");
        runtime.block_on(async {
            let done = room.unpack("in/here", &bytes, false).await;
            let raw = room.raw();
            assert_eq!(raw, ["in"]);
            assert!(done.is_ok() || !room.work().join("in/here").exists(), "{done:?}, and something is left");
        });
        prop_assert_eq!(fs::read_dir(&room.base).unwrap().count(), 2);
    }
}

#[tokio::test]
async fn what_replaces_a_file_while_it_is_moved_away_stays() {
    let room = Room::new("replaced");
    let away = format!("/tmp/cellblock-moved-{}", std::process::id());
    for is_replaced in [true, false] {
        fs::write(room.work().join("from"), vec![1; 4 << 20]).unwrap();
        let replacing = async {
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
            if is_replaced {
                fs::write(room.work().join("new"), "new").unwrap();
                fs::rename(room.work().join("new"), room.work().join("from")).unwrap();
            }
        };
        let (from, to) = (room.place("from"), room.place(&away));
        let (moved, ()) = tokio::join!(move_to(&from, &to, true), replacing);
        moved.unwrap();
        assert_eq!(fs::read(&away).unwrap().len(), 4 << 20);
        let left = fs::read_to_string(room.work().join("from")).ok();
        assert_eq!(left.as_deref(), is_replaced.then_some("new"));
        assert_eq!(room.raw().len(), usize::from(is_replaced), "{:?}", room.raw());
    }
    fs::remove_file(&away).unwrap();
}

#[tokio::test(start_paused = true)]
async fn uploads_that_wait_are_forgotten_in_time_by_one_task() {
    let (room, uploads) = (Room::new("forgotten"), resume::Resumable::default());
    let place = room.place("a");
    let part = |offset| Part { upload: "one".to_owned(), offset, ..Part::default() };
    for _ in 0..500 {
        drop(uploads.receive(&place, &part(0), &Conditions::default()).unwrap());
    }
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert!(tasks <= 2, "{tasks} tasks");
    assert_eq!(uploads.received(&place, "one").unwrap(), 0);
    tokio::time::sleep(std::time::Duration::from_secs(601)).await;
    assert!(uploads.received(&place, "one").is_err() && room.raw().is_empty(), "{:?}", room.raw());
    // Another one, after the task was done.
    drop(uploads.receive(&place, &part(0), &Conditions::default()).unwrap());
    tokio::time::sleep(std::time::Duration::from_secs(601)).await;
    assert!(uploads.received(&place, "one").is_err());
}
