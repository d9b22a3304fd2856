//! A finished execution as a line of a notebook's file: nbformat's outputs, made fit, within a bound. Pure but for the contents it asks for.

use std::collections::BTreeMap;
use std::io;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::content::{encoded, inlined};
use super::journal::{Cell, Line, Output, Update, start_of};
use super::moment::text;
use super::{Form, NotebookCell};
use crate::domain::output::{
    BlobRef, ErrorInfo, JsonText, MimeBundle, MimePart, ResultKind, RichOutput, Shown, Status, TextStream,
};
use crate::json::{Unfit, clean};

/// What is kept of code when there is no room for all of it, in bytes.
pub(super) const CODE_START: usize = 1024;
/// Longest sentence about how an execution ended, in bytes.
const LONGEST_DETAIL: usize = 4096;
/// Most parts that a cell names as left out.
const MOST_LEFT_OUT: usize = 32;

/// How much of a cell is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kept {
    /// All of it.
    All,
    /// Its code, but none of its outputs.
    Code,
    /// The start of its code.
    CodeStart,
}

/// Why not all of a cell is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Too much waited to be written.
    Waiting,
    /// The notebook would be larger than this.
    Larger { allowed: u64 },
}

/// There is no room for the cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoRoom;

/// Reads a long content of the cell.
pub(super) type Read<'a> = &'a dyn Fn(u32) -> Option<Vec<u8>>;

/// The line of a cell, no longer than `room`.
pub(super) fn line(cell: &NotebookCell, kept: (Kept, Why), room: u64, read: Read<'_>) -> Result<Vec<u8>, NoRoom> {
    let mut maker = Maker { room, read, left_out: Vec::new() };
    let (outputs, updates) = match kept {
        (Kept::All, _) => (maker.outputs(cell)?, maker.updates(cell)?),
        (kept, why) => (maker.note(cell, kept, why)?, Vec::new()),
    };
    let source = if kept.0 == Kept::CodeStart { start_of(&cell.code, CODE_START) } else { &cell.code };
    if source.len() as u64 > maker.room {
        return Err(NoRoom);
    }
    let metadata = maker.take(&metadata(cell, &maker.left_out))?;
    let execution_count = cell.execution_count;
    let (id, source) = (cell.execution.to_string(), source.to_owned());
    let cell = Line::Cell(Cell { id, execution_count, metadata, source, outputs, updates });
    let mut bytes = Bounded { bytes: Vec::new(), room };
    serde_json::to_writer(&mut bytes, &cell).map_err(|_| NoRoom)?;
    io::Write::write_all(&mut bytes, b"\n").map_err(|_| NoRoom)?;
    Ok(bytes.bytes)
}

/// Makes the pieces of one cell, as long as there is room.
struct Maker<'a> {
    room: u64,
    read: Read<'a>,
    left_out: Vec<String>,
}

impl Maker<'_> {
    fn outputs(&mut self, cell: &NotebookCell) -> Result<Vec<Output>, NoRoom> {
        let mut outputs = Vec::new();
        for shown in &cell.shown {
            outputs.push(match shown {
                Shown::Text { stream, text } => self.text(*stream, text)?,
                Shown::Rich(rich) => self.rich(rich, cell.execution_count)?,
                Shown::Error(error) => self.error(error)?,
            });
        }
        if !cell.shown.iter().any(|shown| matches!(shown, Shown::Error(_))) {
            outputs.extend(self.ending(cell)?);
        }
        Ok(outputs)
    }

    fn updates(&mut self, cell: &NotebookCell) -> Result<Vec<Update>, NoRoom> {
        let update = |(display_id, data, metadata): &(String, MimeBundle, JsonText)| {
            let (data, metadata) = (self.bundle(data)?, self.metadata(metadata)?);
            Ok(Update { display_id: display_id.clone(), data, metadata })
        };
        cell.updates.iter().map(update).collect()
    }

    /// What stands in place of outputs that are left out.
    fn note(&mut self, cell: &NotebookCell, kept: Kept, why: Why) -> Result<Vec<Output>, NoRoom> {
        let what = match kept {
            Kept::CodeStart => "its outputs and the rest of its code",
            Kept::All | Kept::Code => "its outputs",
        };
        let why = match why {
            Why::Waiting => "too much waited to be written".to_owned(),
            Why::Larger { allowed } => format!("the notebook would be larger than {allowed} bytes"),
        };
        self.left_out.push(format!("{what}: {why}"));
        let mut outputs = vec![self.text(TextStream::Stderr, &format!("[… {what} were left out: {why} …]\n"))?];
        outputs.extend(self.ending(cell)?);
        Ok(outputs)
    }

    fn text(&mut self, stream: TextStream, text: &str) -> Result<Output, NoRoom> {
        #[derive(Serialize)]
        struct Stream<'a> {
            output_type: &'static str,
            name: &'static str,
            text: &'a str,
        }
        let name = match stream {
            TextStream::Stdout => "stdout",
            TextStream::Stderr => "stderr",
        };
        self.output(&Stream { output_type: "stream", name, text })
    }

    fn error(&mut self, error: &ErrorInfo) -> Result<Output, NoRoom> {
        #[derive(Serialize)]
        struct Error<'a> {
            output_type: &'static str,
            ename: &'a str,
            evalue: &'a str,
            traceback: &'a [String],
        }
        let ErrorInfo { name, value, traceback } = error;
        self.output(&Error { output_type: "error", ename: name, evalue: value, traceback })
    }

    fn rich(&mut self, rich: &RichOutput, count: Option<u64>) -> Result<Output, NoRoom> {
        let (data, metadata) = (self.bundle(&rich.data)?, self.metadata(&rich.metadata)?);
        let (output_type, execution_count) = match rich.kind {
            ResultKind::DisplayData => ("display_data", None),
            ResultKind::ExecuteResult => ("execute_result", Some(count)),
        };
        self.give_back(&data);
        self.give_back(&metadata);
        let output = Rich { output_type: output_type.to_owned(), execution_count, data, metadata };
        Ok(Output { display_id: rich.display_id.clone(), ..self.output(&output)? })
    }

    fn output(&mut self, output: &impl Serialize) -> Result<Output, NoRoom> {
        Ok(Output { display_id: None, output: self.take(output)? })
    }

    fn bundle(&mut self, bundle: &MimeBundle) -> Result<Box<RawValue>, NoRoom> {
        let mut data = BTreeMap::new();
        for (mime, part) in bundle {
            match self.part(mime, part)? {
                Ok(raw) => drop(data.insert(mime.as_str(), raw)),
                Err(unfit) => self.leave_out(mime, unfit),
            }
        }
        if data.is_empty() && !bundle.is_empty() {
            let types: Vec<_> = bundle.keys().map(String::as_str).collect();
            let note = format!("[… {} left out …]", types.join(", "));
            data.insert("text/plain", self.take(&note)?);
        }
        data.values().for_each(|raw| self.give_back(raw));
        self.take(&data)
    }

    fn part(&mut self, mime: &str, part: &MimePart) -> Result<Result<Box<RawValue>, Unfit>, NoRoom> {
        let raw = match part {
            MimePart::Inline(text) if text.0.len() as u64 > self.room => return Err(NoRoom),
            MimePart::Inline(text) => inlined(mime, text),
            MimePart::Blob(blob) if length(mime, blob) > self.room => return Err(NoRoom),
            MimePart::Blob(blob) => (self.read)(blob.number).ok_or(Unfit::Gone).and_then(|bytes| encoded(mime, bytes)),
        };
        if let Ok(raw) = &raw {
            self.room = self.room.checked_sub(raw.get().len() as u64).ok_or(NoRoom)?;
        }
        Ok(raw)
    }

    fn metadata(&mut self, metadata: &JsonText) -> Result<Box<RawValue>, NoRoom> {
        if metadata.0.len() as u64 > self.room {
            return Err(NoRoom);
        }
        match clean(&metadata.0) {
            Ok(raw) if raw.get().starts_with('{') => self.take(&raw),
            Ok(_) => self.take(&Map::new()),
            Err(unfit) => {
                self.leave_out("metadata", unfit);
                self.take(&Map::new())
            }
        }
    }

    fn leave_out(&mut self, what: &str, unfit: Unfit) {
        let said = format!("{what}: {unfit}");
        if self.left_out.len() < MOST_LEFT_OUT && !self.left_out.contains(&said) {
            self.left_out.push(said);
        }
    }

    /// An error output for an execution that did not end by itself: notebooks have no other word for it.
    fn ending(&mut self, cell: &NotebookCell) -> Result<Option<Output>, NoRoom> {
        let Some((name, sentence)) = ending_of(cell.status) else { return Ok(None) };
        let value = start_of(cell.detail.as_deref().unwrap_or(sentence), LONGEST_DETAIL).to_owned();
        let traceback = vec![format!("{name}: {value}")];
        self.error(&ErrorInfo { name: name.to_owned(), value, traceback }).map(Some)
    }

    /// A piece is going to be taken again as a part of something else.
    fn give_back(&mut self, piece: &RawValue) {
        self.room = self.room.saturating_add(piece.get().len() as u64);
    }

    fn take(&mut self, value: &impl Serialize) -> Result<Box<RawValue>, NoRoom> {
        let mut bytes = Bounded { bytes: Vec::new(), room: self.room };
        serde_json::to_writer(&mut bytes, value).map_err(|_| NoRoom)?;
        self.room = bytes.room;
        let text = String::from_utf8(bytes.bytes).map_err(|_| NoRoom)?;
        RawValue::from_string(text).map_err(|_| NoRoom)
    }
}

/// A rich output as nbformat has it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Rich {
    pub output_type: String,
    /// Of results only, and there it may be unknown.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    pub execution_count: Option<Option<u64>>,
    pub data: Box<RawValue>,
    pub metadata: Box<RawValue>,
}

/// Tells null from absent.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<u64>>, D::Error> {
    Deserialize::deserialize(from).map(Some)
}

/// Bytes up to a bound.
struct Bounded {
    bytes: Vec<u8>,
    room: u64,
}

impl io::Write for Bounded {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        self.room = self.room.checked_sub(more.len() as u64).ok_or(io::ErrorKind::StorageFull)?;
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The least that a content takes in a notebook.
fn length(mime: &str, blob: &BlobRef) -> u64 {
    match Form::of(mime) {
        Form::Base64 => blob.bytes.div_ceil(3).saturating_mul(4),
        Form::Json | Form::Text => blob.bytes,
    }
}

fn metadata(cell: &NotebookCell, left_out: &[String]) -> Value {
    let mut ours = json!({
        "execution": cell.execution.to_string(),
        "context": cell.context.to_string(),
        "status": cell.status.word(),
        "language": start_of(&cell.language, 64),
        "queued_at": text(cell.queued_at),
    });
    if let Some(detail) = &cell.detail {
        ours["detail"] = Value::from(start_of(detail, LONGEST_DETAIL));
    }
    if !left_out.is_empty() {
        ours["left_out"] = Value::from(left_out);
    }
    json!({"execution": times(cell.status, cell.started_at, cell.finished_at), "cellblock": ours})
}

/// Times under the names that JupyterLab records them by.
fn times(status: Status, started: Option<Timestamp>, finished: Timestamp) -> Value {
    let mut times = Map::new();
    if let Some(started) = started {
        for name in ["iopub.status.busy", "iopub.execute_input", "shell.execute_reply.started"] {
            times.insert(name.to_owned(), Value::from(text(started)));
        }
    }
    let ended: &[&str] = match status {
        Status::Ok | Status::Error | Status::InputDenied => &["shell.execute_reply", "iopub.status.idle"],
        _ => &["execution_failed"],
    };
    for name in ended {
        times.insert((*name).to_owned(), Value::from(text(finished)));
    }
    Value::Object(times)
}

fn ending_of(status: Status) -> Option<(&'static str, &'static str)> {
    Some(match status {
        Status::Queued | Status::Running | Status::Ok => return None,
        Status::Error => ("Error", "The code ended with an exception."),
        Status::Timeout => ("Timeout", "The code reached its time limit."),
        Status::Cancelled => ("Cancelled", "The execution was taken back."),
        Status::Oom => ("OutOfMemory", "Memory ran out, and the kernel was ended."),
        Status::KernelDied => ("KernelDied", "The kernel's process ended."),
        Status::InputDenied => ("InputDenied", "The code asked for input that nobody would give."),
        Status::Lost => ("SessionLost", "The session went away."),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{cell, rich};
    use super::*;

    const LARGER: Why = Why::Larger { allowed: 9 };

    fn made(cell: &NotebookCell) -> Value {
        serde_json::from_slice(&line(cell, (Kept::All, LARGER), u64::MAX, &|_| None).unwrap()).unwrap()
    }

    fn outputs(cell: &NotebookCell) -> Vec<Value> {
        made(cell)["cell"]["outputs"].as_array().unwrap().iter().map(|o| o["output"].clone()).collect()
    }

    fn inline(text: &str) -> MimePart {
        MimePart::Inline(JsonText(text.to_owned()))
    }

    #[test]
    fn outputs_are_as_nbformat_has_them() {
        let error =
            ErrorInfo { name: "E".to_owned(), value: "v".to_owned(), traceback: vec!["\u{1b}[31mE".to_owned()] };
        let stderr = Shown::Text { stream: TextStream::Stderr, text: "a\r\nb\u{0}\u{2028}".to_owned() };
        let mut cell = cell(1, "1/0\r\n");
        cell.shown = vec![
            stderr,
            rich(ResultKind::ExecuteResult, None, "4"),
            rich(ResultKind::DisplayData, Some("d"), "5"),
            Shown::Error(error),
        ];
        cell.status = Status::Error;
        assert_eq!(
            outputs(&cell),
            [
                json!({"output_type": "stream", "name": "stderr", "text": "a\r\nb\u{0}\u{2028}"}),
                json!({"output_type": "execute_result", "execution_count": 1, "data": {"text/plain": "4"}, "metadata": {}}),
                json!({"output_type": "display_data", "data": {"text/plain": "5"}, "metadata": {}}),
                json!({"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\u{1b}[31mE"]}),
            ]
        );
        let line = made(&cell);
        assert_eq!(line["cell"]["source"], "1/0\r\n");
        assert_eq!(line["cell"]["outputs"][2]["display_id"], "d");
        assert_eq!(line["cell"]["metadata"]["cellblock"]["status"], "error");
    }

    #[test]
    fn times_stand_under_the_names_of_jupyterlab() {
        let cell = cell(1, "");
        let times = &made(&cell)["cell"]["metadata"]["execution"];
        assert_eq!(times["iopub.execute_input"], "1970-01-12T13:46:41.000000Z");
        assert_eq!(times["shell.execute_reply"], "1970-01-12T13:46:42.000000Z");
        let died = NotebookCell { status: Status::KernelDied, started_at: None, ..cell };
        let times = made(&died)["cell"]["metadata"]["execution"].clone();
        assert_eq!(times, json!({"execution_failed": "1970-01-12T13:46:42.000000Z"}));
    }

    #[test]
    fn what_did_not_end_by_itself_says_so_once() {
        for status in [
            Status::Error,
            Status::Timeout,
            Status::Cancelled,
            Status::Oom,
            Status::KernelDied,
            Status::InputDenied,
            Status::Lost,
        ] {
            let mut cell = NotebookCell { status, ..cell(1, "x") };
            let [output] = &outputs(&cell)[..] else { panic!("{status:?}") };
            assert_eq!(output["output_type"], "error");
            cell.detail = Some("It took too long.".to_owned());
            assert_eq!(outputs(&cell)[0]["evalue"], "It took too long.");
            cell.shown =
                vec![Shown::Error(ErrorInfo { name: "K".to_owned(), value: String::new(), traceback: vec![] })];
            assert_eq!(outputs(&cell).len(), 1);
        }
        assert!(outputs(&cell(1, "x")).is_empty());
    }

    #[test]
    fn hostile_json_is_left_out_and_named_and_what_stands_beside_it_stays() {
        let deep = "[".repeat(90_000) + &"]".repeat(90_000);
        let data = MimeBundle::from([
            ("application/json".to_owned(), inline(&deep)),
            ("application/geo+json".to_owned(), inline("[1e999]")),
            ("application/a+json".to_owned(), inline("{\"a\":\r\n\"\\ud800\"}")),
            ("text/plain".to_owned(), inline("\"stays\"")),
            ("text/html".to_owned(), inline("{}")),
        ]);
        let alone = MimeBundle::from([("application/json".to_owned(), inline("NaN"))]);
        let show = |data, metadata: &str| {
            let metadata = JsonText(metadata.to_owned());
            Shown::Rich(RichOutput { kind: ResultKind::DisplayData, data, metadata, display_id: None })
        };
        let mut cell = cell(1, "x");
        cell.shown = vec![show(data, "[]"), show(alone, &deep), show(MimeBundle::new(), "{\"a\": {\"b\": 1}}")];
        let outputs = outputs(&cell);
        let data = json!({"application/a+json": {"a": "\u{fffd}"}, "text/plain": "stays", "text/html": "{}"});
        assert_eq!(outputs[0], json!({"output_type": "display_data", "data": data, "metadata": {}}));
        assert_eq!(outputs[1]["data"], json!({"text/plain": "[… application/json left out …]"}));
        assert_eq!(outputs[1]["metadata"], json!({}));
        assert_eq!(outputs[2], json!({"output_type": "display_data", "data": {}, "metadata": {"a": {"b": 1}}}));
        let left_out = made(&cell)["cell"]["metadata"]["cellblock"]["left_out"].clone();
        assert_eq!(left_out.as_array().unwrap().len(), 4, "{left_out}");
        assert_eq!(left_out[0], "application/geo+json: a number in it is too large");
    }

    #[test]
    fn long_contents_are_put_back_where_they_belong() {
        let blob = |number, bytes| MimePart::Blob(BlobRef { number, bytes, sha256: String::new() });
        let data = MimeBundle::from([
            ("image/png".to_owned(), blob(1, 2)),
            ("text/html".to_owned(), blob(2, 3)),
            ("application/json".to_owned(), blob(3, 9)),
            ("text/plain".to_owned(), blob(4, 9)),
        ]);
        let mut cell = cell(1, "x");
        let rich = RichOutput {
            kind: ResultKind::DisplayData,
            data: data.clone(),
            metadata: JsonText::object(),
            display_id: None,
        };
        cell.shown = vec![Shown::Rich(rich)];
        cell.updates = vec![("d".to_owned(), data, JsonText::object())];
        let read = |number| match number {
            1 => Some(b"hi".to_vec()),
            2 => Some(b"<p>".to_vec()),
            3 => Some(b"{\"a\": [1]}".to_vec()),
            _ => None,
        };
        let made: Value = serde_json::from_slice(&line(&cell, (Kept::All, LARGER), 10_000, &read).unwrap()).unwrap();
        let data = json!({"image/png": "aGk=", "text/html": "<p>", "application/json": {"a": [1]}});
        assert_eq!(made["cell"]["outputs"][0]["output"]["data"], data);
        assert_eq!(made["cell"]["updates"][0]["data"], data);
        let never = |_| -> Option<Vec<u8>> { panic!("what has no room is not even read") };
        assert_eq!(line(&cell, (Kept::All, LARGER), 5, &never), Err(NoRoom));
    }

    #[test]
    fn a_line_never_takes_more_than_its_room_and_needs_no_more_than_its_length() {
        let mut cell = cell(1, &"code\n".repeat(1000));
        cell.status = Status::Timeout;
        let text = Shown::Text { stream: TextStream::Stdout, text: "\u{1}".repeat(500) };
        cell.shown = vec![text, rich(ResultKind::DisplayData, Some("d"), "some text")];
        cell.updates =
            vec![("d".to_owned(), MimeBundle::from([("text/plain".to_owned(), inline("\"x\""))]), JsonText::object())];
        let mut lengths = Vec::new();
        for kept in [Kept::All, Kept::Code, Kept::CodeStart] {
            let whole = line(&cell, (kept, LARGER), u64::MAX, &|_| None).unwrap().len() as u64;
            assert_eq!(line(&cell, (kept, LARGER), whole, &|_| None).unwrap().len() as u64, whole);
            assert_eq!(line(&cell, (kept, LARGER), whole - 1, &|_| None), Err(NoRoom));
            lengths.push(whole);
        }
        assert!(lengths[0] > lengths[1] && lengths[1] > lengths[2] && lengths[2] < 3000, "{lengths:?}");
    }

    #[test]
    fn a_cell_without_its_outputs_says_why() {
        let mut cell = cell(1, &"é".repeat(CODE_START));
        cell.status = Status::Oom;
        let bytes = line(&cell, (Kept::CodeStart, Why::Waiting), u64::MAX, &|_| None).unwrap();
        let made: Value = serde_json::from_slice(&bytes).unwrap();
        let text = made["cell"]["outputs"][0]["output"]["text"].as_str().unwrap();
        assert_eq!(text, "[… its outputs and the rest of its code were left out: too much waited to be written …]\n");
        assert_eq!(made["cell"]["outputs"][1]["output"]["ename"], "OutOfMemory");
        assert_eq!(made["cell"]["source"].as_str().unwrap().len(), CODE_START);
    }
}
