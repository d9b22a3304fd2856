//! A notebook's file made into nbformat 4.5. Pure: text in, text out. Lines that cannot be read are left out.

use std::collections::HashSet;
use std::collections::hash_map::{Entry, HashMap};

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};

use super::cells::Rich;
use super::journal::{Cell, End, Header, Kernel, Line, Update, VERSION};
use super::moment::text;

/// What the file does not say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beside {
    /// Cells that are known not to be in it.
    pub cells_left_out: u64,
    /// Longest notebook. Updates that would make it longer are not applied.
    pub allowed: u64,
}

/// The notebook of a file; none when its first line is not a header of this version.
pub(super) fn assemble(file: &[u8], beside: Beside) -> Option<Vec<u8>> {
    let book = Book::read(file)?;
    let (mut cells, end) = (book.cells, book.end);
    let updates_left_out = apply_updates(&mut cells, file.len() as u64, beside.allowed);
    let said = end.as_ref().map_or(book.header.cells_left_out, |end| end.cells_left_out);
    let ours = json!({
        "session": book.header.session,
        "began_at": text(book.header.began_at),
        "ended_at": end.map(|end| text(end.at)),
        "full": book.full,
        "cells_left_out": said.max(beside.cells_left_out),
        "updates_left_out": updates_left_out,
    });
    let mut seen = HashSet::new();
    let cells = cells.iter().filter(|cell| seen.insert(cell.id.as_str())).map(NotebookCell::new).collect();
    let notebook = Notebook { nbformat: 4, nbformat_minor: 5, metadata: Metadata::new(&book.kernel, ours), cells };
    serde_json::to_vec(&notebook).ok()
}

/// A file's lines, sorted by what they are.
struct Book {
    header: Header,
    kernel: Kernel,
    cells: Vec<Cell>,
    full: bool,
    end: Option<End>,
}

impl Book {
    fn read(file: &[u8]) -> Option<Self> {
        // What follows the last end of a line is not whole.
        let whole = &file[..file.iter().rposition(|b| *b == b'\n')?];
        let mut lines = whole.split(|b| *b == b'\n');
        let Ok(Line::Notebook(header)) = serde_json::from_slice(lines.next()?) else { return None };
        if header.version != VERSION {
            return None;
        }
        let mut book = Self { kernel: header.kernel.clone(), header, cells: Vec::new(), full: false, end: None };
        for line in lines.filter_map(|line| serde_json::from_slice(line).ok()) {
            match line {
                Line::Notebook(_) => {}
                Line::Kernel(kernel) => {
                    book.kernel = kernel;
                    book.end = None;
                }
                Line::Cell(cell) => book.cells.push(cell),
                Line::Full {} => book.full = true,
                Line::End(end) => book.end = Some(end),
            }
        }
        Some(book)
    }
}

/// Gives outputs the content of the last update after their cell, and counts those that there is no room for.
fn apply_updates(cells: &mut [Cell], length: u64, allowed: u64) -> u64 {
    let size = |update: &Update| (update.data.get().len() + update.metadata.get().len()) as u64;
    let own: u64 = cells.iter().flat_map(|cell| &cell.updates).map(size).sum();
    let (mut total, mut left_out) = (length.saturating_sub(own), 0);
    let mut latest: HashMap<String, Update> = HashMap::new();
    for cell in cells.iter_mut().rev() {
        for output in &mut cell.outputs {
            let Some(update) = output.display_id.as_ref().and_then(|id| latest.get(id)) else { continue };
            let (old, new) = (output.output.get().len() as u64, size(update));
            if total.saturating_sub(old).saturating_add(new) > allowed {
                left_out += 1;
            } else if let Some(updated) = updated(&output.output, update) {
                total = total.saturating_sub(old).saturating_add(new);
                output.output = updated;
            }
        }
        for update in cell.updates.drain(..).rev() {
            if let Entry::Vacant(place) = latest.entry(update.display_id.clone()) {
                place.insert(update);
            }
        }
    }
    left_out
}

fn updated(output: &RawValue, update: &Update) -> Option<Box<RawValue>> {
    let mut rich: Rich = serde_json::from_str(output.get()).ok()?;
    rich.data.clone_from(&update.data);
    rich.metadata.clone_from(&update.metadata);
    to_raw_value(&rich).ok()
}

#[derive(Serialize)]
struct Notebook<'a> {
    nbformat: u32,
    nbformat_minor: u32,
    metadata: Metadata<'a>,
    cells: Vec<NotebookCell<'a>>,
}

#[derive(Serialize)]
struct Metadata<'a> {
    kernelspec: KernelSpec<'a>,
    language_info: &'a RawValue,
    cellblock: Value,
}

#[derive(Serialize)]
struct KernelSpec<'a> {
    name: &'a str,
    display_name: &'a str,
    language: &'a str,
}

impl<'a> Metadata<'a> {
    fn new(kernel: &'a Kernel, cellblock: Value) -> Self {
        let Kernel { name, display_name, language, language_info } = kernel;
        Self { kernelspec: KernelSpec { name, display_name, language }, language_info, cellblock }
    }
}

#[derive(Serialize)]
struct NotebookCell<'a> {
    id: &'a str,
    cell_type: &'static str,
    execution_count: Option<u64>,
    metadata: &'a RawValue,
    source: &'a str,
    outputs: Vec<&'a RawValue>,
}

impl<'a> NotebookCell<'a> {
    fn new(cell: &'a Cell) -> Self {
        Self {
            id: &cell.id,
            cell_type: "code",
            execution_count: cell.execution_count,
            metadata: &cell.metadata,
            source: &cell.source,
            outputs: cell.outputs.iter().map(|output| &*output.output).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cells::{Kept, Why, line};
    use super::super::tests::{bundle, cell, kernel, rich};
    use super::*;
    use crate::domain::ids::SessionId;
    use crate::domain::output::{JsonText, ResultKind};
    use jiff::Timestamp;
    use uuid::Uuid;

    fn header(version: u32) -> Vec<u8> {
        let header = Header {
            version,
            tenant: "t".to_owned(),
            session: SessionId::from_uuid(Uuid::nil()).to_string(),
            kernel: Kernel::new(kernel()),
            began_at: Timestamp::UNIX_EPOCH,
            cells_left_out: 0,
        };
        Line::Notebook(header).to_bytes().unwrap()
    }

    /// A cell that shows texts under names, and changes texts under names.
    fn add(file: &mut Vec<u8>, n: u128, shows: &[(&str, &str)], updates: &[(&str, &str)]) {
        let mut cell = cell(n, "x");
        cell.shown = shows.iter().map(|(id, text)| rich(ResultKind::ExecuteResult, Some(id), text)).collect();
        cell.updates = updates.iter().map(|(id, text)| ((*id).to_owned(), bundle(text), JsonText::object())).collect();
        file.extend(line(&cell, (Kept::All, Why::Waiting), u64::MAX, &|_| None).unwrap());
    }

    fn assembled(file: &[u8], allowed: u64) -> Option<Value> {
        assemble(file, Beside { cells_left_out: 0, allowed }).map(|bytes| serde_json::from_slice(&bytes).unwrap())
    }

    fn texts(notebook: &Value) -> Vec<Vec<&str>> {
        let outputs = |cell: &'_ Value| cell["outputs"].as_array().map(Vec::len).unwrap_or_default();
        let cells = notebook["cells"].as_array().unwrap();
        let text = |cell: usize, n: usize| cells[cell]["outputs"][n]["data"]["text/plain"].as_str().unwrap();
        (0..cells.len()).map(|c| (0..outputs(&cells[c])).map(|n| text(c, n)).collect()).collect()
    }

    #[test]
    fn an_update_changes_cells_before_it_and_the_last_one_counts() {
        let mut file = header(VERSION);
        add(&mut file, 1, &[("d", "1d"), ("e", "1e"), ("d", "1d")], &[]);
        add(&mut file, 2, &[("d", "2d")], &[("d", "by 2, first"), ("d", "by 2")]);
        add(&mut file, 3, &[("e", "3e")], &[("e", "by 3")]);
        add(&mut file, 4, &[("d", "4d")], &[("unknown", "by 4")]);
        let notebook = assembled(&file, 100_000).unwrap();
        assert_eq!(texts(&notebook), [vec!["by 2", "by 3", "by 2"], vec!["2d"], vec!["3e"], vec!["4d"]]);
        assert_eq!(notebook["cells"][0]["outputs"][0]["execution_count"], 1);
        add(&mut file, 5, &[], &[("d", "by 5")]);
        let notebook = assembled(&file, 100_000).unwrap();
        assert_eq!(texts(&notebook)[..4], [vec!["by 5", "by 3", "by 5"], vec!["by 5"], vec!["3e"], vec!["by 5"]]);
    }

    #[test]
    fn one_update_of_many_outputs_cannot_make_a_notebook_longer_than_it_may_be() {
        let mut file = header(VERSION);
        add(&mut file, 1, &vec![("d", "small"); 1000], &[]);
        let large = "x".repeat(50_000);
        add(&mut file, 2, &[], &[("d", &large)]);
        let allowed = file.len() as u64;
        let notebook = assembled(&file, allowed).unwrap();
        assert!(notebook.to_string().len() as u64 <= allowed + 1024);
        assert_eq!(texts(&notebook)[0].iter().filter(|text| **text == large).count(), 1);
        assert_eq!(notebook["metadata"]["cellblock"]["updates_left_out"], 999);
    }

    #[test]
    fn torn_and_broken_lines_are_left_out() {
        let mut file = header(VERSION);
        add(&mut file, 1, &[], &[]);
        let first = file.len();
        add(&mut file, 2, &[], &[]);
        let whole = file.len();
        for end in first..whole {
            assert_eq!(texts(&assembled(&file[..end], 100_000).unwrap()).len(), 1, "{end} of {whole}");
        }
        file[first + 20..first + 30].fill(0);
        add(&mut file, 3, &[], &[]);
        file.extend(b"\n{\"end\":7}\n[]\n{\"later\":{}}\n\xff\n");
        assert_eq!(texts(&assembled(&file, 100_000).unwrap()).len(), 2);
    }

    #[test]
    fn what_does_not_begin_with_a_header_is_no_notebook() {
        let mut cell = Vec::new();
        add(&mut cell, 1, &[], &[]);
        for file in [&b""[..], b"\n", b"{}\n", &header(VERSION)[..20], &header(VERSION + 1), &cell] {
            assert!(assembled(file, 100_000).is_none());
        }
        assert!(assembled(&header(VERSION), 100_000).is_some());
    }

    #[test]
    fn an_execution_is_one_cell() {
        let mut file = header(VERSION);
        add(&mut file, 1, &[], &[]);
        add(&mut file, 1, &[], &[]);
        assert_eq!(texts(&assembled(&file, 100_000).unwrap()).len(), 1);
    }
}
