//! Images among results: named for a terminal, saved into a folder if there is one. File names are ours, never the
//! kernel's, and nothing that exists is overwritten.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use super::render::text;
use super::text::{escape_line, size};

/// What was done with images so far.
#[derive(Debug)]
pub struct Images {
    folder: Option<PathBuf>,
    next: u32,
    blobs: Vec<Blob>,
}

/// An image that isn't in its event but has an address of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// A path of the API: `/v1/executions/{id}/blobs/{n}`.
    pub path: String,
    folder: PathBuf,
    extension: &'static str,
}

impl Blob {
    /// Saves the fetched content and gives its file's name.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn save(&self, content: &[u8]) -> io::Result<PathBuf> {
        write_new(&self.folder, &mut 1, self.extension, content)
    }
}

impl Images {
    /// Saves images into a folder, which is made; without one they are only named.
    #[must_use]
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, next: 1, blobs: Vec::new() }
    }

    /// The images of a MIME bundle, a line each.
    ///
    /// # Errors
    /// A file can't be written.
    pub(super) fn take(&mut self, data: &Value) -> io::Result<Vec<String>> {
        let parts = data.as_object().into_iter().flatten().filter(|(mime, _)| mime.starts_with("image/"));
        parts.map(|(mime, part)| self.line(mime, part)).collect()
    }

    pub(super) fn take_blobs(&mut self) -> Vec<Blob> {
        std::mem::take(&mut self.blobs)
    }

    fn line(&mut self, mime: &str, part: &Value) -> io::Result<String> {
        let named = escape_line(mime);
        if let Some(path) = part["$ref"].as_str() {
            self.note_blob(mime, path);
            return Ok(format!("[{named} {}]", size(part["bytes"].as_u64().unwrap_or(0))));
        }
        let content = decode(mime, &text(part));
        let bytes = size(content.len() as u64);
        match &self.folder {
            Some(folder) => {
                let file = write_new(folder, &mut self.next, extension(mime), &content)?;
                Ok(format!("[{named} {bytes}, {}]", file.display()))
            }
            None => Ok(format!("[{named} {bytes}]")),
        }
    }

    fn note_blob(&mut self, mime: &str, path: &str) {
        let segments: Vec<&str> = path.split('/').collect();
        let plain = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric());
        if let (Some(folder), ["", "v1", "executions", id, "blobs", number]) = (&self.folder, segments.as_slice())
            && plain(id)
            && plain(number)
        {
            self.blobs.push(Blob { path: path.to_owned(), folder: folder.clone(), extension: extension(mime) });
        }
    }
}

/// SVG is text in a MIME bundle, other images are base64 with line ends in it.
fn decode(mime: &str, text: &str) -> Vec<u8> {
    if mime == "image/svg+xml" {
        return text.as_bytes().to_vec();
    }
    let dense: String = text.split_ascii_whitespace().collect();
    STANDARD.decode(dense).unwrap_or_else(|_| text.as_bytes().to_vec())
}

fn extension(mime: &str) -> &'static str {
    match mime {
        "image/png" => "png",
        "image/jpeg" => "jpg",
        "image/gif" => "gif",
        "image/svg+xml" => "svg",
        "image/webp" => "webp",
        _ => "img",
    }
}

/// Writes to the first free name, counting from `next`.
fn write_new(folder: &Path, next: &mut u32, extension: &str, content: &[u8]) -> io::Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    loop {
        let path = folder.join(format!("image-{next}.{extension}"));
        *next = next.checked_add(1).ok_or_else(|| io::Error::other("no free file name is left"))?;
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(mut file) => return file.write_all(content).map(|()| path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn images_are_named_and_saved_under_names_of_ours() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("image-1.png"), "mine").unwrap();
        let mut images = Images::new(Some(folder.path().to_owned()));
        let mut take = |mime: &str, content: &str| images.take(&json!({"text/plain": "x", mime: content})).unwrap();
        let lines =
            [take("image/../../x", "y"), take("image/png", "aGVs\nbG8=\n"), take("image/svg+xml", "<svg/>")].concat();
        assert!(lines[1].starts_with("[image/png 5 B, "), "{lines:?}");
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!([read("image-1.png"), read("image-1.img")], ["mine", "y"]);
        assert_eq!([read("image-2.png"), read("image-3.svg")], ["hello", "<svg/>"]);
    }

    #[test]
    fn without_a_folder_they_are_only_named() {
        let data = json!({"image/png": "aGVsbG8="});
        assert_eq!(Images::new(None).take(&data).unwrap(), ["[image/png 5 B]"]);
    }

    #[test]
    fn only_addresses_of_blobs_are_fetched() {
        let mut images = Images::new(Some("out".into()));
        for path in
            ["/v1/executions/exe1/blobs/3", "/v1/keys", "//evil/v1", "/v1/executions/../blobs/3", "http://evil/"]
        {
            let lines = images.take(&json!({"image/png": {"$ref": path, "bytes": 12_000}})).unwrap();
            assert_eq!(lines, ["[image/png 12 kB]"]);
        }
        let paths: Vec<String> = images.take_blobs().into_iter().map(|b| b.path).collect();
        assert_eq!(paths, ["/v1/executions/exe1/blobs/3"]);
    }
}
