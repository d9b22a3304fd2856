//! The lines of a notebook's file: what it is of, then its cells as they came. The form only; who writes and reads files is not known here.

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

use jiff::Timestamp;

use super::{NotebookKernel, moment};
use crate::json::clean;

/// The version of this form. Files of another are left alone.
pub(super) const VERSION: u32 = 1;
/// Longest header line that is read.
pub(super) const LONGEST_HEADER: u64 = 64 * 1024;
/// Longest line that ends a file.
pub(super) const LONGEST_END: u64 = 256;
/// Longest name of a kernel, in bytes.
const LONGEST_NAME: usize = 256;
/// Longest `language_info` that is kept, in bytes.
const LONGEST_INFO: usize = 16 * 1024;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    /// The first one.
    Notebook(Header),
    /// More is known of the kernel.
    Kernel(Kernel),
    /// A cell.
    Cell(Cell),
    /// The bound is reached: no cell follows.
    Full {},
    /// The session has ended.
    End(End),
}

/// What a notebook is of.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Header {
    pub version: u32,
    pub tenant: String,
    pub session: String,
    pub kernel: Kernel,
    #[serde(with = "moment")]
    pub began_at: Timestamp,
    /// Cells of the same session that were there before and had to make room.
    pub cells_left_out: u64,
}

/// The end of its session.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct End {
    #[serde(with = "moment")]
    pub at: Timestamp,
    /// Cells that are not in it.
    pub cells_left_out: u64,
}

/// A kernel as a notebook's metadata tells of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Kernel {
    pub name: String,
    pub display_name: String,
    pub language: String,
    pub language_info: Box<RawValue>,
}

/// A cell: its own fields, and what later lines may change.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Cell {
    pub id: String,
    pub execution_count: Option<u64>,
    pub metadata: Box<RawValue>,
    pub source: String,
    pub outputs: Vec<Output>,
    /// What it changed in cells before it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub updates: Vec<Update>,
}

/// An output as nbformat has it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Output {
    /// The name for later changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_id: Option<String>,
    pub output: Box<RawValue>,
}

/// New content of all outputs of that name in cells before.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Update {
    pub display_id: String,
    pub data: Box<RawValue>,
    pub metadata: Box<RawValue>,
}

impl Line {
    /// As it stands in the file.
    pub(super) fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

impl Kernel {
    /// Bounded, and as nbformat's schema has it.
    pub(super) fn new(kernel: NotebookKernel) -> Self {
        let NotebookKernel { kernelspec, display_name, language, language_info } = kernel;
        let [name, display_name, language] =
            [kernelspec, display_name, language].map(|name| start_of(&name, LONGEST_NAME).to_owned());
        let told = (language_info.0.len() <= LONGEST_INFO).then(|| clean(&language_info.0).ok()).flatten();
        let told = told.and_then(|info| serde_json::from_str(info.get()).ok());
        let info = Value::Object(valid_info(told.unwrap_or_default(), &language));
        // Text is all it could fail for, and there is none that could.
        let language_info = to_raw_value(&info).unwrap_or_else(|_| RawValue::NULL.to_owned());
        Self { name, display_name, language, language_info }
    }

    /// Whether both say the same.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let texts = |kernel: &Self| [kernel.name.clone(), kernel.display_name.clone(), kernel.language.clone()];
        texts(self) == texts(other) && self.language_info.get() == other.language_info.get()
    }
}

/// Without what the schema would refuse.
fn valid_info(mut info: Map<String, Value>, language: &str) -> Map<String, Value> {
    info.retain(|name, value| match name.as_str() {
        "name" | "file_extension" | "mimetype" | "pygments_lexer" => value.is_string(),
        "codemirror_mode" => value.is_string() || value.is_object(),
        _ => true,
    });
    info.entry("name").or_insert_with(|| Value::from(language));
    info
}

/// The start of a text, at most so many bytes.
pub(super) fn start_of(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::output::JsonText;

    fn info(text: &str) -> Value {
        let kernel = NotebookKernel {
            kernelspec: "k".to_owned(),
            display_name: "é".repeat(200),
            language: "python".to_owned(),
            language_info: JsonText(text.to_owned()),
        };
        let kernel = Kernel::new(kernel);
        assert_eq!(kernel.display_name, "é".repeat(128));
        serde_json::from_str(kernel.language_info.get()).unwrap()
    }

    #[test]
    fn what_a_kernel_says_of_its_language_is_kept_where_the_schema_takes_it() {
        let told =
            r#"{"name": "R", "codemirror_mode": {"name": "r"}, "version": "4", "mimetype": 7, "pygments_lexer": null}"#;
        assert_eq!(info(told), serde_json::json!({"name": "R", "codemirror_mode": {"name": "r"}, "version": "4"}));
        let long = format!("{{\"name\": \"{}\"}}", "x".repeat(LONGEST_INFO));
        let deep = format!("{{\"name\": {}", "[".repeat(90_000));
        for hostile in ["", "[]", "7", "{\"name\": 1}", "{\"a\": 1e999}", &long, &deep] {
            assert_eq!(info(hostile), serde_json::json!({"name": "python"}));
        }
    }
}
