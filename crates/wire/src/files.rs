//! Files over the link: requests and their bodies.
//!
//! What a request is about is JSON: of a GET or a PUT percent-encoded in its query (`?q=…`), since its body is a file; of a POST in its body. Paths are relative to
//! the working folder, or absolute and below it or [`TMP_DIR`].
//!
//! | request | about | body | answer |
//! |---|---|---|---|
//! | `GET /files` | [`List`] | | [`Listing`] |
//! | `GET /files/stat` | [`At`] | | [`Stat`] |
//! | `GET /files/content` | [`Read`] | | the file's bytes; [`Opened`] in the header [`OPENED`], as JSON |
//! | `PUT /files/content` | [`Write`] | the file's bytes | [`Written`] |
//! | `POST /files/known` | [`Known`] | | [`Stat`] or `null` |
//! | `GET /files/upload` | [`Upload`] | | [`Received`] |
//! | `POST /files/delete` | [`Delete`] | | [`Deleted`] |
//! | `POST /files/mkdir` | [`At`] | | [`Made`] |
//! | `POST /files/move` | [`Move`] | | [`Made`] |
//! | `GET /files/watch` | [`Watch`] | | lines of JSON: [`Event`] |
//! | `GET /files/archive` | [`Archive`] | | a tar archive |
//! | `PUT /files/archive` | [`Archive`] | a tar archive | [`Unpacked`] |
//!
//! A body that breaks off leaves nothing, unless its upload is one that can go on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where temporary files go in every container.
pub const TMP_DIR: &str = "/tmp";
/// Header of an answer with a file's bytes.
pub const OPENED: &str = "x-file";
/// Longest path, in bytes.
pub const MAX_PATH: usize = 4095;
/// Most entries of a listing.
pub const MAX_LISTED: usize = 2000;
/// Folders within each other that one look goes into.
pub const MAX_DEPTH: usize = 32;

/// What something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Directory,
    /// A symbolic link, which was not followed.
    Symlink,
    /// A FIFO, a socket, a device.
    #[default]
    Other,
}

/// Something in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stat {
    /// Its path; empty where whoever asked knows it.
    #[serde(default)]
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Its length in bytes.
    pub size: u64,
    /// Its permissions.
    pub mode: u32,
    /// When its bytes were written last, in nanoseconds since 1970.
    pub modified: i64,
    /// Tells this state of it from others: letters, digits and `-`.
    pub etag: String,
    /// Of a link: where it leads, as it says itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Of a link: what is there, as far as it stays below the folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_kind: Option<Kind>,
    /// Its attributes by name, where they were asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
}

/// What must be the case for something to be done.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Conditions {
    /// It has one of these tags; `*` is any.
    #[serde(default)]
    pub if_match: Option<Vec<String>>,
    /// It has none of these tags; `*`: it is not there.
    #[serde(default)]
    pub if_none_match: Option<Vec<String>>,
}

impl Conditions {
    /// Whether what must match does. `etag` is that of what is there.
    #[must_use]
    pub fn match_holds(&self, etag: Option<&str>) -> bool {
        self.if_match.as_ref().is_none_or(|tags| names(tags, etag))
    }

    /// Whether what must not match doesn't.
    #[must_use]
    pub fn none_match_holds(&self, etag: Option<&str>) -> bool {
        self.if_none_match.as_ref().is_none_or(|tags| !names(tags, etag))
    }

    /// Whether all of it is the case.
    #[must_use]
    pub fn hold(&self, etag: Option<&str>) -> bool {
        self.match_holds(etag) && self.none_match_holds(etag)
    }

    /// Whether nothing may be there yet.
    #[must_use]
    pub fn want_new(&self) -> bool {
        self.if_none_match.as_ref().is_some_and(|tags| tags.iter().any(|tag| tag == "*"))
    }
}

fn names(tags: &[String], etag: Option<&str>) -> bool {
    etag.is_some_and(|etag| tags.iter().any(|tag| tag == "*" || tag == etag))
}

/// What is in a folder; of something else, that itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct List {
    /// Where; empty is the working folder.
    #[serde(default)]
    pub path: String,
    /// How many folders deep, from 1.
    pub depth: usize,
    /// Most entries.
    pub limit: usize,
    /// Only what comes after this path, which an earlier listing has ended with.
    #[serde(default)]
    pub after: Option<String>,
    /// With their attributes.
    #[serde(default)]
    pub attributes: bool,
}

/// What is in a folder: each folder before what is in it, names in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Listing {
    /// The entries.
    pub entries: Vec<Stat>,
    /// There are more.
    pub truncated: bool,
    /// Entries that were left out, because their names are no UTF-8 or too long, or because they can't be looked at.
    #[serde(default)]
    pub omitted: u64,
}

/// A path.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct At {
    /// The path.
    pub path: String,
    /// With its attributes.
    #[serde(default)]
    pub attributes: bool,
}

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Range {
    /// From a byte up to and with another one, or to the end.
    From(u64, Option<u64>),
    /// The last bytes, so many.
    Last(u64),
}

impl Range {
    /// First byte and length in a file of this size; nothing when none of it is there.
    #[must_use]
    pub fn within(self, size: u64) -> Option<(u64, u64)> {
        match self {
            Self::From(first, last) if first < size && last.is_none_or(|last| last >= first) => {
                Some((first, last.map_or(size, |last| last.saturating_add(1).min(size)) - first))
            }
            Self::Last(count) if count > 0 && size > 0 => Some((size - count.min(size), count.min(size))),
            _ => None,
        }
    }
}

/// A file's bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Read {
    /// Which file.
    pub path: String,
    /// Which part of it.
    #[serde(default)]
    pub range: Option<Range>,
    /// The part is meant only while the file has this tag; otherwise all of it.
    #[serde(default)]
    pub if_range: Option<String>,
    /// What must be the case.
    #[serde(default)]
    pub conditions: Conditions,
}

/// A file that was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Opened {
    /// The file, without its path.
    pub stat: Stat,
    /// The first byte that comes.
    pub first: u64,
    /// How many come.
    pub length: u64,
    /// A part was asked for and is meant.
    #[serde(default)]
    pub is_part: bool,
    /// Nothing comes: whoever asks has it.
    #[serde(default)]
    pub is_known: bool,
}

/// A file to be written.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Write {
    /// Where.
    pub path: String,
    /// Its permissions; those of the file that it replaces, or `rw-r--r--`, when absent.
    #[serde(default)]
    pub mode: Option<u32>,
    /// Its length, where it is known.
    #[serde(default)]
    pub size: Option<u64>,
    /// What must be the case, before and after.
    #[serde(default)]
    pub conditions: Conditions,
    /// It can go on when it breaks off.
    #[serde(default)]
    pub part: Option<Part>,
    /// All attributes that it has then, by name: extended attributes below `user.`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
}

/// A part of an upload that can go on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Part {
    /// The upload's name, chosen by whoever sends it.
    pub upload: String,
    /// Where in the file this part begins; 0 begins anew.
    pub offset: u64,
    /// It is the last one.
    pub is_last: bool,
    /// SHA-256 of the whole file in hex; a file of another one is not put in place.
    #[serde(default)]
    pub sha256: Option<String>,
}

/// A file is written, or a part of one has come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Written {
    /// The file; nothing when it is not complete.
    pub stat: Option<Stat>,
    /// There was none before.
    #[serde(default)]
    pub is_new: bool,
    /// Bytes that are there by now.
    pub received: u64,
    /// SHA-256 in hex, where it came in parts.
    #[serde(default)]
    pub sha256: Option<String>,
}

/// Whether a file is there with this content.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Known {
    /// Where.
    pub path: String,
    /// SHA-256 in hex.
    pub sha256: String,
    /// What must be the case, or it counts as another.
    #[serde(default)]
    pub conditions: Conditions,
}

/// An upload that can go on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Upload {
    /// Where its file is to be.
    pub path: String,
    /// Its name.
    pub upload: String,
}

/// How much of an upload is there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Received {
    /// Bytes.
    pub received: u64,
}

/// Something to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Delete {
    /// What.
    pub path: String,
    /// A folder goes with all that is in it.
    #[serde(default)]
    pub recursive: bool,
    /// What must be the case.
    #[serde(default)]
    pub conditions: Conditions,
}

/// It is gone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Deleted {}

/// Something to be moved.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Move {
    /// From here …
    pub from: String,
    /// … to here.
    pub to: String,
    /// A file that stands there is replaced.
    #[serde(default)]
    pub overwrite: bool,
}

/// Something is where it was wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Made {
    /// It.
    pub stat: Stat,
    /// There was nothing before.
    #[serde(default)]
    pub is_new: bool,
}

/// A folder whose changes are told.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Watch {
    /// Which.
    #[serde(default)]
    pub path: String,
    /// Folders in it too.
    #[serde(default)]
    pub recursive: bool,
}

/// What happens in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// From now on changes are told.
    Watching {
        /// They are looked for every so many milliseconds; at once when absent.
        #[serde(default)]
        polls_ms: Option<u64>,
    },
    /// Something is there that was not.
    Created {
        /// Where.
        path: String,
        /// It is a folder.
        #[serde(default)]
        is_folder: bool,
        /// It came with all that is in it, and may have taken another one's place.
        #[serde(default)]
        is_whole: bool,
    },
    /// Something has changed.
    Modified {
        /// Where.
        path: String,
    },
    /// Something is gone.
    Deleted {
        /// From where.
        path: String,
    },
    /// Something has another path.
    Moved {
        /// From where.
        path: String,
        /// To where.
        to: String,
    },
    /// Events were lost: look at the folder again.
    Overflow,
}

/// A folder as a tar archive.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Archive {
    /// Which folder; empty is the working folder.
    #[serde(default)]
    pub path: String,
    /// Compressed with gzip.
    #[serde(default)]
    pub gzip: bool,
}

/// An archive is unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Unpacked {
    /// Entries of it.
    pub entries: u64,
    /// Bytes of its files.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_within_the_file() {
        for (range, size, expected) in [
            (Range::From(0, None), 10, Some((0, 10))),
            (Range::From(3, Some(3)), 10, Some((3, 1))),
            (Range::From(3, Some(u64::MAX)), 10, Some((3, 7))),
            (Range::From(10, None), 10, None),
            (Range::From(5, Some(4)), 10, None),
            (Range::Last(4), 10, Some((6, 4))),
            (Range::Last(40), 10, Some((0, 10))),
            (Range::Last(0), 10, None),
            (Range::From(0, None), 0, None),
            (Range::Last(1), 0, None),
        ] {
            assert_eq!(range.within(size), expected, "{range:?} of {size}");
        }
    }

    #[test]
    fn conditions_hold_for_what_is_there() {
        let one = |tag: &str| Some(vec![tag.to_owned()]);
        let wants = |if_match, if_none_match| Conditions { if_match, if_none_match };
        for (conditions, etag, expected) in [
            (wants(None, None), None, true),
            (wants(one("*"), None), None, false),
            (wants(one("*"), None), Some("a"), true),
            (wants(one("a"), None), Some("a"), true),
            (wants(one("a"), None), Some("b"), false),
            (wants(None, one("*")), Some("a"), false),
            (wants(None, one("*")), None, true),
            (wants(None, one("a")), Some("b"), true),
            (wants(None, one("a")), Some("a"), false),
        ] {
            assert_eq!(conditions.hold(etag), expected, "{conditions:?} with {etag:?}");
        }
    }

    proptest! {
        #[test]
        fn no_range_leaves_the_file(first: u64, last: Option<u64>, count: u64, size: u64) {
            for range in [Range::From(first, last), Range::Last(count)] {
                if let Some((at, length)) = range.within(size) {
                    prop_assert!(length > 0 && at.checked_add(length).is_some_and(|end| end <= size));
                }
            }
        }
    }
}
