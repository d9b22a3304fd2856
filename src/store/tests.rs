//! The archive as its callers have it, and what the tests of its parts share.

use jiff::Timestamp;
use serde_json::Value;
use uuid::Uuid;

use super::*;
use crate::domain::output::{MimePart, ResultKind, RichOutput, TextStream};

/// A moment of these tests.
pub(super) fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + seconds).unwrap()
}

pub(super) fn kernel() -> NotebookKernel {
    NotebookKernel {
        kernelspec: "python3".to_owned(),
        display_name: "Python 3".to_owned(),
        language: "python".to_owned(),
        language_info: JsonText::object(),
    }
}

/// A cell that ended well and put out nothing.
pub(super) fn cell(n: u128, code: &str) -> NotebookCell {
    NotebookCell {
        execution: execution(n),
        context: ContextId::from_uuid(Uuid::nil()),
        code: code.to_owned(),
        language: "python".to_owned(),
        execution_count: Some(1),
        status: Status::Ok,
        shown: Vec::new(),
        updates: Vec::new(),
        detail: None,
        queued_at: at(0),
        started_at: Some(at(1)),
        finished_at: at(2),
    }
}

pub(super) fn bundle(text: &str) -> MimeBundle {
    let text = serde_json::to_string(text).unwrap();
    MimeBundle::from([("text/plain".to_owned(), MimePart::Inline(JsonText(text)))])
}

pub(super) fn rich(kind: ResultKind, display_id: Option<&str>, text: &str) -> Shown {
    let display_id = display_id.map(str::to_owned);
    Shown::Rich(RichOutput { kind, data: bundle(text), metadata: JsonText::object(), display_id })
}

/// The structure of nbformat 4.5, as its schema has it.
pub(super) fn assert_valid(notebook: &Value) {
    assert_keys(notebook, &["nbformat", "nbformat_minor", "metadata", "cells"]);
    assert_eq!((&notebook["nbformat"], &notebook["nbformat_minor"]), (&Value::from(4), &Value::from(5)));
    let metadata = &notebook["metadata"];
    assert!(metadata["kernelspec"]["name"].is_string() && metadata["kernelspec"]["display_name"].is_string());
    assert!(metadata["language_info"]["name"].is_string());
    let mut ids = std::collections::BTreeSet::new();
    for cell in notebook["cells"].as_array().unwrap() {
        assert_keys(cell, &["id", "cell_type", "metadata", "source", "outputs", "execution_count"]);
        let id = cell["id"].as_str().unwrap();
        assert!(ids.insert(id) && (1..=64).contains(&id.len()));
        assert!(id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
        assert!(cell["cell_type"] == "code" && cell["source"].is_string() && is_count(&cell["execution_count"]));
        assert!(cell["metadata"]["execution"].as_object().unwrap().values().all(Value::is_string));
        cell["outputs"].as_array().unwrap().iter().for_each(assert_valid_output);
    }
}

fn assert_valid_output(output: &Value) {
    match output["output_type"].as_str().unwrap() {
        "stream" => {
            assert_keys(output, &["output_type", "name", "text"]);
            assert!(output["name"].is_string() && output["text"].is_string());
        }
        "error" => {
            assert_keys(output, &["output_type", "ename", "evalue", "traceback"]);
            assert!(output["ename"].is_string() && output["evalue"].is_string());
            assert!(output["traceback"].as_array().unwrap().iter().all(Value::is_string));
        }
        kind => {
            if kind == "execute_result" {
                assert_keys(output, &["output_type", "data", "metadata", "execution_count"]);
                assert!(is_count(&output["execution_count"]));
            } else {
                assert_eq!(kind, "display_data");
                assert_keys(output, &["output_type", "data", "metadata"]);
            }
            assert!(output["metadata"].is_object());
            let data = output["data"].as_object().unwrap();
            assert!(data.iter().all(|(mime, value)| value.is_string() || Form::of(mime) == Form::Json));
        }
    }
}

fn assert_keys(value: &Value, keys: &[&str]) {
    let object = value.as_object().unwrap();
    assert!(object.len() == keys.len() && keys.iter().all(|key| object.contains_key(*key)), "{object:?}");
}

fn is_count(value: &Value) -> bool {
    value.is_null() || value.is_u64()
}

fn execution(n: u128) -> ExecutionId {
    ExecutionId::from_uuid(Uuid::from_u128(n))
}

fn session(n: u128) -> SessionId {
    SessionId::from_uuid(Uuid::from_u128(n))
}

fn owner(n: u128) -> Owner {
    Owner { tenant: Arc::from("t"), session: session(1), execution: execution(n) }
}

fn limits() -> ArchiveLimits {
    ArchiveLimits {
        blob_bytes: 1 << 30,
        blob_retention: Duration::from_secs(3600),
        notebook_bytes: 1 << 20,
        notebooks_bytes: 1 << 24,
        notebook_retention: Duration::from_secs(3600),
    }
}

async fn bytes_of(blob: Blob) -> Vec<u8> {
    match blob.body {
        BlobBody::Memory(bytes) => bytes.to_vec(),
        BlobBody::File(mut file) => {
            let mut bytes = Vec::new();
            tokio::io::AsyncReadExt::read_to_end(&mut file, &mut bytes).await.unwrap();
            bytes
        }
    }
}

async fn notebook(archive: &Archive, n: u128) -> Value {
    let notebook = serde_json::from_slice(&archive.notebook("t", session(n)).await.unwrap()).unwrap();
    assert_valid(&notebook);
    notebook
}

#[tokio::test]
async fn what_was_added_before_is_seen_by_what_is_read_after_and_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let archive = Archive::open(folder.path(), limits()).unwrap();
    archive.open_notebook("t", session(1), kernel());
    for n in 0..200 {
        archive.add_cell(session(1), cell(n, &n.to_string()));
    }
    let before = notebook(&archive, 1).await;
    let sources: Vec<_> = before["cells"].as_array().unwrap().iter().map(|c| c["source"].as_str().unwrap()).collect();
    assert_eq!(sources, (0..200).map(|n| n.to_string()).collect::<Vec<_>>());
    let kept = archive.put_blob(&owner(1), 1, "image/png", Bytes::from_static(b"png")).unwrap();
    assert_eq!(kept.sha256, "8f8cbb7dcf46e0bc7d53265749a6c17d116093a6ba95e442764060c76fd4a86c");
    archive.flush().await;
    drop(archive);
    let archive = Archive::open(folder.path(), limits()).unwrap();
    let mut after = notebook(&archive, 1).await;
    assert!(after["metadata"]["cellblock"]["ended_at"].is_string());
    after["metadata"]["cellblock"]["ended_at"] = Value::Null;
    assert_eq!(after, before);
    let blob = archive.blob("t", execution(1), 1).await.unwrap();
    assert!(blob.mime == "image/png" && blob.bytes == 3 && blob.sha256 == kept.sha256);
    assert_eq!(bytes_of(blob).await, b"png");
    assert!(archive.blob("other", execution(1), 1).await.is_none());
    assert!(archive.blob("t", execution(1), 2).await.is_none());
}

#[tokio::test]
async fn a_blob_can_be_read_while_it_waits_and_by_its_tenant_only() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, mut writer, mut commands) = Archive::parts(folder.path(), &limits()).unwrap();
    archive.put_blob(&owner(1), 1, "text/html", Bytes::from_static(b"old")).unwrap();
    archive.put_blob(&owner(1), 1, "text/html", Bytes::from_static(b"new")).unwrap();
    assert!(archive.waiting_blob("other", (execution(1), 1)).is_none());
    let blob = archive.blob("t", execution(1), 1).await.unwrap();
    assert!(matches!(blob.body, BlobBody::Memory(_)));
    assert_eq!(bytes_of(blob).await, b"new");
    while let Ok(command) = commands.try_recv() {
        writer.obey(command, Timestamp::now());
    }
    assert!(writer.shared.waiting().is_empty());
    assert_eq!(archive.blob_shares.available_permits(), WAITING_BYTES as usize);
    std::thread::spawn(move || writer.run(commands));
    assert_eq!(bytes_of(archive.blob("t", execution(1), 1).await.unwrap()).await, b"new");
}

#[tokio::test]
async fn a_content_is_refused_when_too_much_waits_or_it_is_too_large() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, _writer, _commands) = Archive::parts(folder.path(), &limits()).unwrap();
    let _others = share_of(&archive.blob_shares, 63 << 20).unwrap();
    let kib = Bytes::from(vec![0; 100 << 10]);
    let taken = (0..100).take_while(|n| archive.put_blob(&owner(*n), 1, "image/png", kib.clone()).is_ok()).count();
    assert_eq!(taken, 8, "each with its least share beside it");
    assert_eq!(archive.put_blob(&owner(200), 1, "image/png", kib), Err(Full::Waiting));
    assert!(archive.waiting_blob("t", (execution(200), 1)).is_none());
    let small = ArchiveLimits { blob_bytes: 16 << 10, ..limits() };
    let (archive, _writer, _commands) = Archive::parts(folder.path(), &small).unwrap();
    let large = Bytes::from(vec![0; 9 << 10]);
    assert_eq!(archive.put_blob(&owner(1), 1, "a/b", large), Err(Full::Larger { bytes: 9 << 10, allowed: 8 << 10 }));
    assert!(archive.put_blob(&owner(1), 1, "a/b", Bytes::from(vec![0; 8 << 10])).is_ok());
}

#[tokio::test]
async fn the_largest_content_that_is_taken_can_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let small = ArchiveLimits { blob_bytes: 16 << 10, ..limits() };
    let archive = Archive::open(folder.path(), small).unwrap();
    let large = vec![7; 8 << 10];
    archive.put_blob(&owner(1), 1, "a/b", Bytes::from(large.clone())).unwrap();
    archive.flush().await;
    let blob = archive.blob("t", execution(1), 1).await.unwrap();
    assert!(matches!(blob.body, BlobBody::File(_)));
    assert_eq!(bytes_of(blob).await, large);
}

#[tokio::test]
async fn cells_lose_their_outputs_then_their_code_and_then_are_counted_when_too_much_waits() {
    let folder = tempfile::tempdir().unwrap();
    let wide = ArchiveLimits { notebook_bytes: 1 << 24, ..limits() };
    let (archive, writer, commands) = Archive::parts(folder.path(), &wide).unwrap();
    archive.open_notebook("t", session(1), kernel());
    let others = share_of(&archive.cell_shares, 63 << 20).unwrap();
    let text = "x".repeat(400 << 10);
    for n in 0..4 {
        let shown = vec![Shown::Text { stream: TextStream::Stdout, text: text.clone() }];
        let updates = vec![("d".to_owned(), bundle("x"), JsonText::object())];
        archive.add_cell(session(1), NotebookCell { shown, updates, ..cell(n, "short") });
    }
    archive.add_cell(session(1), cell(4, &"c".repeat(archive.cell_shares.available_permits() - 20_000)));
    let code = "c".repeat(10_000);
    for n in 5..5 + SPARE_CELLS as u128 + 7 {
        archive.add_cell(session(1), cell(n, &code));
    }
    drop(others);
    std::thread::spawn(move || writer.run(commands));
    let notebook = notebook(&archive, 1).await;
    let output = |n: usize| notebook["cells"][n]["outputs"][0]["text"].as_str().unwrap_or_default();
    assert_eq!([output(0).len(), output(1).len()], [text.len(); 2]);
    let note = "[… its outputs were left out: too much waited to be written …]\n";
    assert_eq!([output(2), output(3)], [note; 2]);
    assert!(output(5).contains("the rest of its code"));
    assert_eq!(notebook["cells"][5]["source"].as_str().unwrap().len(), CODE_START);
    assert_eq!(notebook["cells"].as_array().unwrap().len(), 5 + SPARE_CELLS);
    assert_eq!(notebook["metadata"]["cellblock"]["cells_left_out"], 7);
    archive.flush().await;
    assert_eq!(archive.cell_shares.available_permits(), WAITING_BYTES as usize);
    assert_eq!(archive.spare_cells.available_permits(), SPARE_CELLS);
}

#[tokio::test]
async fn blobs_of_a_cell_are_put_back_into_its_notebook_and_outlive_themselves_there() {
    let folder = tempfile::tempdir().unwrap();
    let short = ArchiveLimits { blob_retention: Duration::from_secs(3600), ..limits() };
    let archive = Archive::open(folder.path(), short).unwrap();
    archive.open_notebook("t", session(1), kernel());
    let part = JsonText("\"aGk=\\n\"".to_owned());
    let png = archive.put_blob(&owner(1), 1, "image/png", decoded("image/png", &part).unwrap()).unwrap();
    let of_another = Owner { tenant: Arc::from("other"), ..owner(1) };
    let secret = archive.put_blob(&of_another, 2, "text/plain", Bytes::from_static(b"secret")).unwrap();
    let data = MimeBundle::from([
        ("image/png".to_owned(), MimePart::Blob(png)),
        ("text/plain".to_owned(), MimePart::Blob(secret)),
    ]);
    let rich = RichOutput { kind: ResultKind::DisplayData, data, metadata: JsonText::object(), display_id: None };
    archive.add_cell(session(1), NotebookCell { shown: vec![Shown::Rich(rich)], ..cell(1, "x") });
    archive.flush().await;
    std::fs::remove_dir_all(folder.path().join("blobs")).unwrap();
    let notebook = notebook(&archive, 1).await;
    assert_eq!(notebook["cells"][0]["outputs"][0]["data"], serde_json::json!({"image/png": "aGk="}));
    assert!(archive.blob("t", execution(1), 1).await.is_none());
}

#[tokio::test]
async fn a_notebook_is_deleted_in_its_turn_and_kept_for_its_tenant_only() {
    let folder = tempfile::tempdir().unwrap();
    let archive = Archive::open(folder.path(), limits()).unwrap();
    archive.open_notebook("t", session(1), kernel());
    archive.add_cell(session(1), cell(1, "x"));
    assert!(archive.notebook("other", session(1)).await.is_none());
    assert!(!archive.delete_notebook("other", session(1)).await);
    assert!(archive.delete_notebook("t", session(1)).await);
    assert!(archive.notebook("t", session(1)).await.is_none());
    archive.add_cell(session(1), cell(2, "y"));
    assert_eq!(notebook(&archive, 1).await["cells"][0]["source"], "y");
    archive.end_notebook(session(1));
    archive.prune();
    assert!(notebook(&archive, 1).await["metadata"]["cellblock"]["ended_at"].is_string());
}

#[tokio::test]
async fn what_is_over_is_gone_with_the_next_look() {
    let folder = tempfile::tempdir().unwrap();
    let at_once = ArchiveLimits { blob_retention: Duration::ZERO, notebook_retention: Duration::ZERO, ..limits() };
    let archive = Archive::open(folder.path(), at_once).unwrap();
    archive.put_blob(&owner(1), 1, "a/b", Bytes::from_static(b"x")).unwrap();
    archive.open_notebook("t", session(1), kernel());
    archive.flush().await;
    let count = |name: &str| std::fs::read_dir(folder.path().join(name)).unwrap().count();
    assert_eq!([count("blobs"), count("notebooks")], [1, 1]);
    archive.end_notebook(session(1));
    archive.prune();
    archive.flush().await;
    assert_eq!([count("blobs"), count("notebooks")], [0, 0]);
}

#[tokio::test]
async fn a_disk_that_gives_no_answer_is_not_waited_for_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let (mut archive, _writer, _commands) = Archive::parts(folder.path(), &limits()).unwrap();
    archive.patience = Duration::from_millis(20);
    archive.open_notebook("t", session(1), kernel());
    assert!(archive.notebook("t", session(1)).await.is_none());
    assert!(!archive.delete_notebook("t", session(1)).await);
}

#[tokio::test]
async fn the_queue_has_place_for_all_that_may_wait() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, mut writer, mut commands) = Archive::parts(folder.path(), &limits()).unwrap();
    archive.open_notebook("t", session(1), kernel());
    for n in 0..20_000 {
        archive.add_cell(session(1), cell(n, ""));
        let _ = archive.put_blob(&owner(n), 1, "a/b", Bytes::new());
    }
    assert!(archive.commands.capacity() >= READS + 4000, "{}", archive.commands.capacity());
    assert!(archive.shared.missed()[&session(1)] > 10_000);
    writer.obey(commands.try_recv().unwrap(), Timestamp::now());
    assert_eq!(writer.notebooks.tenant(session(1)), Some("t"));
}
