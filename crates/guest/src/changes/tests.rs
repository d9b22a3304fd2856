//! A folder is changed, and the changes are found.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::files::{Roots, Upload};
use cellblock_wire::files::Conditions;

struct Room {
    root: PathBuf,
    files: Files,
}

impl Room {
    fn new(name: &str) -> Self {
        let root = std::env::temp_dir().join(format!("cellblock-changes-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        Self { files: Files::new(&root), root }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn upload(&self, path: &str, text: &str) {
        let none = Conditions::default();
        let mut upload = Upload::create(&Roots::new(&self.root).place(path).unwrap(), &none).unwrap();
        upload.write(text.as_bytes()).unwrap();
        let (stat, ..) = upload.finish(None, &none).unwrap();
        self.files.uploaded([(PathBuf::from(path), Stamp::from(&stat))]);
    }

    /// The changes in short: a sign, the path, and whether there is a hash.
    async fn short(&self, since: &Since) -> (Vec<String>, u64) {
        let changes = self.files.changes(since).await;
        let short = |file: &FileChange| {
            let sign = match file.change {
                Change::Created => '+',
                Change::Changed => '~',
                Change::Deleted => '-',
            };
            format!("{sign}{}{}", file.path, if file.sha256.is_some() { "#" } else { "" })
        };
        (changes.told.iter().map(short).collect(), changes.omitted)
    }
}

/// Polls once.
async fn is_pending(future: std::pin::Pin<&mut impl Future>) -> bool {
    tokio::select! {
        biased;
        _ = future => false,
        () = std::future::ready(()) => true,
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

#[tokio::test]
async fn created_changed_and_deleted_files_are_told_with_their_hashes() {
    let room = Room::new("kinds");
    for path in ["same", "changed", "a/deleted", "touched"] {
        room.write(path, "before");
    }
    room.files.look().await;
    let since = room.files.since_now();
    assert_eq!(room.short(&since).await, (vec![], 0));
    room.write("changed", "after");
    room.write("a/b/new", "hello");
    room.write(".hidden/empty", "");
    fs::remove_file(room.root.join("a/deleted")).unwrap();
    fs::set_permissions(room.root.join("touched"), fs::Permissions::from_mode(0o600)).unwrap();
    let changes = room.files.changes(&since).await;
    let hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    let new = changes.told.iter().find(|file| file.path == "a/b/new").unwrap();
    assert_eq!((new.change, new.size_bytes, new.sha256.as_deref()), (Change::Created, Some(5), Some(hello)));
    let short = room.short(&since).await;
    let all = ["+.hidden/empty#", "+a/b/new#", "-a/deleted", "~changed#", "~touched#"].map(str::to_owned);
    assert_eq!(short, (all.to_vec(), 0), "looking changes nothing");
    assert_eq!(room.short(&room.files.since_now()).await, (vec![], 0));
}

#[tokio::test]
async fn uploads_are_nobodys_change_until_code_changes_them() {
    let room = Room::new("uploads");
    room.upload("before", "x");
    let since = room.files.since_now();
    room.upload("during", "x");
    room.upload("before", "y");
    let half = Upload::create(&Roots::new(&room.root).place("half").unwrap(), &Conditions::default()).unwrap();
    room.write("own", "x");
    assert_eq!(room.short(&since).await.0, ["+own#"]);
    // Looks of others in between change nothing of it.
    room.files.look().await;
    assert_eq!(room.short(&since).await.0, ["+own#"]);
    room.write("during", "changed");
    room.write("before", "changed");
    assert_eq!(room.short(&since).await.0, ["~before#", "+during#", "+own#"]);
    drop(half);
    fs::create_dir(room.root.join("empty")).unwrap();
    let looking = room.files.look();
    tokio::pin!(looking);
    assert!(is_pending(looking.as_mut()).await);
    room.upload("meanwhile", "x");
    looking.await;
    assert_eq!(room.short(&room.files.since_now()).await.0, Vec::<String>::new());
}

#[tokio::test]
async fn what_is_no_plain_file_is_neither_told_nor_opened() {
    let room = Room::new("kinds-of-files");
    let since = room.files.since_now();
    symlink("/etc/passwd", room.root.join("link")).unwrap();
    symlink("/", room.root.join("root")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, room.root.join("fifo"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    fs::write(room.root.join(std::ffi::OsStr::from_bytes(b"\xff")), "x").unwrap();
    room.write("plain", "x");
    assert_eq!(room.short(&since).await.0, ["+plain#"]);
    // Where a file becomes a pipe or another file between the look and the hash.
    let stamp = Stamp { size: 1, modified: 0, changed: 0, inode: 1 };
    for path in ["fifo", "link", "plain", "gone"] {
        assert_eq!(room.files.hash(path, stamp, &mut 99).await, None, "{path}");
    }
}

#[tokio::test]
async fn hashes_stop_at_their_budget_and_for_files_that_change_meanwhile() {
    let room = Room::new("hashes");
    let since = room.files.since_now();
    let file = |path: &str, size: u64| {
        fs::File::create(room.root.join(path)).unwrap().set_len(size).unwrap();
    };
    file("a", MAX_HASHED / 2);
    file("b", MAX_HASHED);
    file("c", MAX_HASHED / 2);
    file("d", 1);
    assert_eq!(room.short(&since).await.0, ["+a#", "+b", "+c#", "+d"]);
    let look = room.files.look().await;
    let stamp = look.files["a"].stamp;
    let mut hashable = u64::MAX;
    let hashing = room.files.hash("a", stamp, &mut hashable);
    tokio::pin!(hashing);
    assert!(is_pending(hashing.as_mut()).await);
    room.write("a", "other");
    assert_eq!(hashing.await, None);
}

#[tokio::test]
async fn more_changes_than_are_told_are_counted_and_the_head_of_a_frame_bears_them() {
    let room = Room::new("many");
    let since = room.files.since_now();
    for number in 0..300 {
        room.write(&format!("deep/{number}"), "");
    }
    room.write("result.png", "x");
    let (told, omitted) = room.short(&since).await;
    assert_eq!((told.len(), omitted), (MAX_CHANGES, 101));
    assert!(told.contains(&"+result.png#".to_owned()), "what is near the top comes first");
    // Six bytes of JSON for one of the name.
    let since = room.files.since_now();
    for number in 0..300 {
        room.write(&format!("{}{number}", "\u{1}".repeat(200)), "");
    }
    let changes = room.files.changes(&since).await;
    assert_eq!(changes.told.len() as u64 + changes.omitted, 300);
    let size = serde_json::to_string(&changes.told).unwrap().len();
    assert!(size > MAX_TOLD && size < 160 * 1024, "{size} bytes");
}

#[tokio::test]
async fn where_not_all_is_seen_nothing_is_said_to_be_gone_or_new_that_is_not() {
    let room = Room::new("partial");
    room.write("here", "x");
    room.write("gone", "x");
    room.write("old", "x");
    let look = room.files.look().await;
    let mut before = (*look).clone();
    before.partial = true;
    before.files.remove("old");
    fs::remove_file(room.root.join("gone")).unwrap();
    let later = Since { files: Arc::new(before.clone()), time: i64::MAX };
    assert_eq!(room.short(&later).await, (vec!["-gone".to_owned()], 1));
    let mut now = (*look).clone();
    now.files.clear();
    now.partial = true;
    let found = compare(&Since { files: look, time: 0 }, &now).await;
    assert_eq!(found.len(), 3, "to be looked after one by one");
    assert!(is_absent(&room.root, "gone") && !is_absent(&room.root, "here"));
}

#[tokio::test]
async fn a_folder_that_is_gone_leaves_what_was_known() {
    let room = Room::new("unreadable");
    room.write("x", "x");
    room.files.look().await;
    let since = room.files.since_now();
    fs::rename(&room.root, room.root.with_extension("away")).unwrap();
    assert_eq!(room.short(&since).await, (vec![], 1));
    fs::rename(room.root.with_extension("away"), &room.root).unwrap();
    assert_eq!(room.short(&since).await, (vec![], 0));
}

/// Not a test of anything but time: `cargo test --release -p cellblock-guest --lib -- --ignored --nocapture cost`.
#[tokio::test]
#[ignore = "measures"]
async fn cost_of_a_look() {
    for count in [0, 100, 1000, 10_000] {
        let room = Room::new("cost");
        (0..count).for_each(|number| room.write(&format!("{}/{number}", number / 100), ""));
        room.files.look().await;
        let (rounds, began) = (20_000 / (count + 20), std::time::Instant::now());
        for _ in 0..rounds {
            room.files.changes(&room.files.since_now()).await;
        }
        println!("{count} files: {:?}", began.elapsed() / rounds);
    }
}

#[tokio::test]
async fn what_callers_take_away_or_move_is_nobodys_change() {
    let room = Room::new("taken");
    for path in ["a/one", "a/two", "gone", "stays"] {
        room.write(path, path);
    }
    room.files.look().await;
    let since = room.files.since_now();
    fs::rename(room.root.join("a"), room.root.join("b")).unwrap();
    room.files.taken(Path::new("a"), Some(Path::new("b")));
    fs::remove_file(room.root.join("gone")).unwrap();
    room.files.taken(Path::new("gone"), None);
    fs::remove_file(room.root.join("stays")).unwrap();
    assert_eq!(room.short(&since).await, (vec!["-stays".to_owned()], 0));
    // Later it is the code's affair again.
    room.write("gone", "again");
    let since = room.files.since_now();
    room.files.look().await;
    fs::remove_file(room.root.join("gone")).unwrap();
    fs::remove_file(room.root.join("b/one")).unwrap();
    let told = room.short(&since).await.0;
    assert!(told.contains(&"-b/one".to_owned()), "{told:?}");
}
