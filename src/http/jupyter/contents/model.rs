//! Contents as Jupyter's clients read and write them: models with all their keys, texts and bytes in JSON. Asks nobody for files; how a notebook is read is in `notebook`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use cellblock_wire::files::{Kind, Stat};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;

use super::super::kernels::time;

/// Something at a path.
#[derive(Debug, Serialize)]
pub(super) struct Model {
    pub(super) name: String,
    pub(super) path: String,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) writable: bool,
    created: String,
    last_modified: String,
    pub(super) mimetype: Option<String>,
    pub(super) content: Option<Content>,
    pub(super) format: Option<&'static str>,
    pub(super) size: Option<u64>,
    pub(super) hash: Option<String>,
    pub(super) hash_algorithm: Option<&'static str>,
}

/// What is in it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Content {
    Text(String),
    Notebook(Box<RawValue>),
    Folder(Vec<Model>),
}

impl Model {
    /// One without its content. `path` is the whole one.
    pub(super) fn of(path: &str, stat: &Stat) -> Self {
        let name = path.rsplit('/').next().unwrap_or_default();
        let modified = Timestamp::from_nanosecond(stat.modified.into()).unwrap_or(Timestamp::UNIX_EPOCH);
        let kind = match stat.kind {
            Kind::Directory => "directory",
            _ if name.ends_with(".ipynb") => "notebook",
            _ => "file",
        };
        let mimetype = if kind == "file" { mime_guess::from_path(name).first_raw().map(str::to_owned) } else { None };
        Self {
            name: name.to_owned(),
            path: path.to_owned(),
            kind,
            writable: true,
            // Nobody keeps when that was.
            created: time(modified),
            last_modified: time(modified),
            mimetype,
            content: None,
            format: None,
            size: (kind != "directory").then_some(stat.size),
            hash: None,
            hash_algorithm: None,
        }
    }

    /// A folder that is no file's, but a session, or all of them.
    pub(super) fn folder(path: &str, at: Timestamp) -> Self {
        let modified = i64::try_from(at.as_nanosecond()).unwrap_or_default();
        Self::of(path, &Stat { kind: Kind::Directory, modified, ..Stat::default() })
    }

    /// With what is in a folder.
    pub(super) fn with_entries(self, entries: Vec<Self>) -> Self {
        Self { content: Some(Content::Folder(entries)), format: Some("json"), ..self }
    }

    /// With what is in a file, in the wanted format; without one as text if it is any. Nothing where it is to be text and is none.
    pub(super) fn with_bytes(self, bytes: Vec<u8>, format: Option<Format>) -> Option<Self> {
        let (text, format) = match (format, String::from_utf8(bytes)) {
            (None | Some(Format::Text), Ok(text)) => (text, "text"),
            (Some(Format::Text), Err(_)) => return None,
            (Some(Format::Base64), Ok(text)) => (BASE64.encode(text), "base64"),
            (_, Err(error)) => (BASE64.encode(error.as_bytes()), "base64"),
        };
        let otherwise = if format == "text" { "text/plain" } else { "application/octet-stream" };
        let mimetype = self.mimetype.or_else(|| Some(otherwise.to_owned()));
        Some(Self { kind: "file", mimetype, content: Some(Content::Text(text)), format: Some(format), ..self })
    }

    /// With a notebook.
    pub(super) fn with_notebook(self, notebook: Box<RawValue>) -> Self {
        let (content, format) = (Some(Content::Notebook(notebook)), Some("json"));
        Self { kind: "notebook", mimetype: None, content, format, ..self }
    }

    pub(super) fn with_hash(self, sha256: String) -> Self {
        Self { hash: Some(sha256), hash_algorithm: Some("sha256"), ..self }
    }
}

/// How the bytes of a file stand in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    Base64,
}

impl Format {
    pub(super) fn of(word: &str) -> Option<Self> {
        match word {
            "text" => Some(Self::Text),
            "base64" => Some(Self::Base64),
            _ => None,
        }
    }

    /// The bytes of a content that is saved; else what is wrong with it.
    pub(super) fn read(self, content: &RawValue) -> Result<Vec<u8>, &'static str> {
        let text: String = serde_json::from_str(content.get()).map_err(|_| "the content of a file is a text")?;
        match self {
            Self::Text => Ok(text.into_bytes()),
            // Some clients break its lines.
            Self::Base64 => BASE64
                .decode(text.bytes().filter(|b| !b.is_ascii_whitespace()).collect::<Vec<_>>())
                .map_err(|_| "the content is no base64"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn stat(kind: Kind) -> Stat {
        Stat { kind, size: 3, modified: 1_000_000_000, ..Stat::default() }
    }

    #[test]
    fn a_model_has_all_keys_and_no_other() {
        let keys = [
            "content",
            "created",
            "format",
            "hash",
            "hash_algorithm",
            "last_modified",
            "mimetype",
            "name",
            "path",
            "size",
            "type",
            "writable",
        ];
        let models = [
            Model::of("k/a.txt", &stat(Kind::File)),
            Model::of("k/a.ipynb", &stat(Kind::File)),
            Model::folder("k", Timestamp::UNIX_EPOCH),
        ];
        for model in models {
            let model = serde_json::to_value(model).unwrap();
            assert_eq!(model.as_object().unwrap().keys().collect::<Vec<_>>(), keys);
            assert_eq!((&model["content"], &model["format"]), (&Value::Null, &Value::Null));
        }
    }

    #[test]
    fn bytes_are_text_where_they_are_any_and_not_otherwise_asked_for() {
        let of = |bytes: &[u8], format| Model::of("k/x", &stat(Kind::File)).with_bytes(bytes.to_vec(), format);
        let told = |model: Model| serde_json::to_value(model).unwrap();
        let text = told(of("é".as_bytes(), None).unwrap());
        assert_eq!((&text["content"], &text["format"]), (&json!("é"), &json!("text")));
        assert_eq!(text["mimetype"], "text/plain");
        let bytes = told(of(b"\xff", None).unwrap());
        assert_eq!((&bytes["content"], &bytes["mimetype"]), (&json!("/w=="), &json!("application/octet-stream")));
        assert_eq!(told(of(b"a", Some(Format::Base64)).unwrap())["content"], "YQ==");
        assert!(of(b"\xff", Some(Format::Text)).is_none());
        let raw = |text: &str| RawValue::from_string(text.to_owned()).unwrap();
        assert_eq!(Format::Base64.read(&raw(r#""YQ==\n""#)).unwrap(), b"a");
        assert!(Format::Base64.read(&raw(r#""!""#)).is_err() && Format::Text.read(&raw("1")).is_err());
    }
}
