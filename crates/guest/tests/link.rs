//! The real guest over real pipes: the link, takeover, files, and kernels both faked and, where there is one, real.
//!
//! The fake kernel is `fake_kernel.py`, which needs nothing but Python. `make test-kernel` makes a Python with `ipykernel`.

#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

mod support;

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cellblock_wire::link::{
    Channel, CutStream, Event, FileEntry, Hello, KernelSpec, Numbered, OutputCap, Report, Stats, Transport,
};
use hyper::{Method, StatusCode};
use serde_json::json;
use support::{Cell, FAKE, execute, text_of};

const CAP: OutputCap = OutputCap { text_bytes: 64 * 1024, result_bytes: 1024 * 1024, messages: 1000 };

#[tokio::test]
async fn requests_that_need_no_kernel() {
    let mut cell = Cell::start();
    cell.attach().await;
    let hello: Hello = cell.init(600).await;
    assert_eq!((hello.generation, hello.last_seq), (1, 0));
    let report: Report = cell.get("/report").await;
    assert!(report.undumpable && !report.is_init && report.uids.len() == 4);
    let _: Stats = cell.get("/stats").await;
    let specs: Vec<KernelSpec> = cell.get("/kernelspecs").await;
    assert!(specs.iter().any(|spec| spec.name == FAKE));
    for (method, path, status, code) in [
        (Method::GET, "/nothing", 404, "not-found"),
        (Method::POST, "/kernels", 400, "invalid"),
        (Method::DELETE, "/kernels/none", 404, "not-found"),
        (Method::GET, "/events?after=x", 400, "invalid"),
        (Method::GET, "/files/../etc/passwd", 400, "invalid"),
        (Method::GET, "/files/none", 404, "not-found"),
    ] {
        let (got, refusal) = cell.refused(method, path, Bytes::new()).await;
        assert_eq!((got.as_u16(), refusal.code.as_str()), (status, code), "{path}");
    }
    assert_eq!(cell.refused(Method::POST, "/ack", r#"{"seq":1}"#.into()).await.1.code, "invalid");
    cell.end().await;
}

#[tokio::test]
async fn files_are_written_listed_and_read() {
    let mut cell = Cell::start();
    cell.attach().await;
    let bytes: Bytes = (0..3_000_000u32).map(|n| n as u8).collect();
    assert_eq!(cell.request(Method::PUT, "/files/a%20b/data.bin", bytes.clone()).await.0, StatusCode::NO_CONTENT);
    // Ends like a marker begins: the link holds such bytes back for a moment only.
    assert_eq!(cell.request(Method::PUT, "/files/end", Bytes::from_static(&[1, 0xce])).await.0, StatusCode::NO_CONTENT);
    let listed: Vec<FileEntry> = cell.get("/files").await;
    let listed: Vec<_> = listed.iter().map(|file| (file.path.as_str(), file.size_bytes)).collect();
    assert_eq!(listed, [("a b/data.bin", 3_000_000), ("end", 2)]);
    assert_eq!(cell.request(Method::GET, "/files/a%20b/data.bin", Bytes::new()).await.1, bytes);
    cell.end().await;
}

#[tokio::test]
async fn a_kernel_is_started_asked_and_deleted() {
    for transport in [Transport::Ipc, Transport::Tcp] {
        let mut cell = Cell::start();
        cell.attach().await;
        cell.start_kernel("k1", FAKE, transport, &[]).await;
        // Sent before the channels are connected.
        execute(&mut cell, "k1", "m1", "echo 1+1", CAP).await;
        cell.until(|event| *event == Event::KernelConnected).await;
        let messages = cell.until_done("m1").await;
        let types: Vec<_> = messages.iter().map(|message| message.msg_type.as_str()).collect();
        assert_eq!(types.iter().filter(|t| **t == "status").count(), 2);
        assert!(types.contains(&"execute_reply") && types.contains(&"stream"));
        assert_eq!(text_of(&messages), "1+1");
        let (status, refusal) = support::try_execute(&mut cell, "k1", "m1", "echo again", CAP).await;
        assert_eq!((status, refusal.code.as_str()), (StatusCode::CONFLICT, "exists"));
        assert_eq!(cell.request(Method::DELETE, "/kernels/k1", Bytes::new()).await.0, StatusCode::NO_CONTENT);
        assert_eq!(std::fs::read_dir(cell.state()).unwrap().count(), 0);
        assert_eq!(cell.try_start("k1", FAKE, transport, &[], 5000).await.unwrap_err().code, "exists");
        cell.end().await;
    }
}

#[tokio::test]
async fn output_above_the_cap_is_head_gap_tail_and_never_held() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    for (id, code, total) in [("m1", "one 60000000", 60_000_000), ("m2", "many 3000 1000", 3_000_000)] {
        execute(&mut cell, "k1", id, code, CAP).await;
        let events = cell.until_idle(id).await;
        let gap =
            events.iter().position(|e| matches!(e.head.event, Event::Gap { stream: CutStream::Stdout, .. })).unwrap();
        let Event::Gap { total_bytes, omitted_bytes, .. } = events[gap].head.event else { unreachable!() };
        let text = |events: &[_]| text_of(&support::messages(events));
        let (head, tail) = (text(&events[..gap]), text(&events[gap..]));
        assert_eq!(total_bytes, total);
        assert_eq!(omitted_bytes, total - (head.len() + tail.len()) as u64);
        assert_eq!((head.len(), tail.len()), (48 * 1024, 16 * 1024));
        assert!(tail.ends_with("end") && head.starts_with("begin"));
    }
    assert!(cell.memory_peak_kb() < 40_000, "the guest took {} kB", cell.memory_peak_kb());
    execute(&mut cell, "k1", "m3", "display 3000000", CAP).await;
    let events = cell.until_idle("m3").await;
    assert!(events.iter().any(|e| matches!(e.head.event, Event::Gap { stream: CutStream::Results, total_bytes, omitted_bytes, .. } if total_bytes == omitted_bytes && total_bytes > 3_000_000)));
    cell.end().await;
}

#[tokio::test]
async fn an_unacknowledged_flood_is_cut_and_still_ends() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.acknowledges = false;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    let cap = OutputCap { text_bytes: 1 << 30, result_bytes: 1 << 30, messages: 1 << 30 };
    for id in ["m1", "m2", "m3"] {
        execute(&mut cell, "k1", id, "display 4000000", cap).await;
        execute(&mut cell, "k1", &format!("{id}t"), "one 30000000", cap).await;
        cell.until_idle(&format!("{id}t")).await;
    }
    let gaps = cell.seen.iter().filter(|e| matches!(e.head.event, Event::Gap { .. })).count();
    assert!(gaps >= 4, "{gaps} gaps");
    assert!(cell.memory_peak_kb() < 60_000, "the guest took {} kB", cell.memory_peak_kb());
    cell.end().await;
}

#[tokio::test]
async fn a_kernels_end_is_told_after_its_last_words() {
    let mut cell = Cell::start();
    cell.attach().await;
    for (name, code, status, signal) in [("k1", "exit 3", Some(3), None), ("k2", "abort", None, Some(6))] {
        cell.start_kernel(name, FAKE, Transport::Ipc, &[]).await;
        execute(&mut cell, name, &format!("{name}m"), code, CAP).await;
        let events = cell.until(|event| matches!(event, Event::KernelExited { .. })).await;
        let Event::KernelExited { status: got, signal: by, stderr_tail, .. } = &events.last().unwrap().head.event
        else {
            unreachable!()
        };
        assert_eq!((*got, *by), (status, signal));
        assert!(stderr_tail.ends_with("last words\n"), "{stderr_tail}");
        assert_eq!(text_of(&support::messages(&events)), "going");
        let (status, _) = support::try_execute(&mut cell, name, "late", "echo", CAP).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert_eq!(
            cell.request(Method::DELETE, &format!("/kernels/{name}"), Bytes::new()).await.0,
            StatusCode::NO_CONTENT
        );
    }
    cell.start_kernel("k3", FAKE, Transport::Ipc, &[]).await;
    cell.until(|event| *event == Event::KernelConnected).await;
    assert_eq!(
        cell.request(Method::POST, "/kernels/k3/signal", r#"{"signal":"SIGKILL"}"#.into()).await.0,
        StatusCode::NO_CONTENT
    );
    let events = cell.until(|event| matches!(event, Event::KernelExited { .. })).await;
    assert!(matches!(events.last().unwrap().head.event, Event::KernelExited { status: None, signal: Some(9), .. }));
    cell.end().await;
}

#[tokio::test]
async fn deleting_a_kernel_ends_what_it_started() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    execute(&mut cell, "k1", "m1", "daemon", CAP).await;
    let pid = text_of(&cell.until_done("m1").await);
    assert!(support::is_alive(&pid));
    assert_eq!(cell.request(Method::DELETE, "/kernels/k1", Bytes::new()).await.0, StatusCode::NO_CONTENT);
    assert!(!support::is_alive(&pid));
    cell.end().await;
}

#[tokio::test]
async fn a_channel_that_does_not_answer_fails_the_kernel_by_name() {
    for transport in [Transport::Ipc, Transport::Tcp] {
        let mut cell = Cell::start();
        cell.attach().await;
        for how in ["closed", "silent", "garbage"] {
            let channels = ["shell", "iopub", "stdin", "control", "heartbeat"];
            for channel in channels {
                let env = format!("FAKE_{}", how.to_uppercase());
                cell.try_start(&format!("{how}{channel}"), FAKE, transport, &[(&env, channel)], 4000).await.unwrap();
            }
            for _ in channels {
                let events = cell.until(|event| matches!(event, Event::KernelFailed { .. })).await;
                let Numbered { kernel, event: Event::KernelFailed { channel, reason, .. }, .. } =
                    &events.last().unwrap().head
                else {
                    unreachable!()
                };
                assert_eq!(Some(kernel.trim_start_matches(how)), channel.as_deref(), "{how} {transport:?}: {reason}");
            }
            for channel in channels {
                cell.request(Method::DELETE, &format!("/kernels/{how}{channel}"), Bytes::new()).await;
            }
            assert!(cell.fake_kernels().is_empty());
        }
        cell.end().await;
    }
}

#[tokio::test]
async fn a_channel_that_breaks_later_fails_the_kernel_by_name() {
    let mut cell = Cell::start();
    cell.attach().await;
    for (number, channel) in ["shell", "iopub", "stdin", "control"].into_iter().enumerate() {
        let name = format!("k{number}");
        cell.start_kernel(&name, FAKE, Transport::Ipc, &[]).await;
        execute(&mut cell, &name, &format!("m{number}"), &format!("break {channel}"), CAP).await;
        let events = cell.until(|event| matches!(event, Event::KernelFailed { .. })).await;
        let Event::KernelFailed { channel: blamed, .. } = &events.last().unwrap().head.event else { unreachable!() };
        assert_eq!(blamed.as_deref(), Some(channel));
    }
    cell.end().await;
}

#[tokio::test]
async fn wrong_signatures_and_the_welcome_are_not_passed_on() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    execute(&mut cell, "k1", "m1", "forge", CAP).await;
    let messages = cell.until_done("m1").await;
    assert_eq!(text_of(&messages), "genuine");
    assert!(messages.iter().all(|message| message.msg_type != "iopub_welcome"));
    cell.end().await;
}

#[tokio::test]
async fn another_control_plane_takes_over_in_the_middle_of_anything() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    execute(&mut cell, "k1", "m1", "many 20000 100", OutputCap { text_bytes: 4 << 20, messages: 1 << 20, ..CAP }).await;
    cell.until(|event| matches!(event, Event::Message { msg_type, .. } if msg_type == "stream")).await;
    for _ in 0..10 {
        let seen = cell.last_seen();
        let started = Instant::now();
        cell.attach_after_garbage(seen).await;
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }
    let hello: Hello = cell.init(600).await;
    assert!(hello.last_seq >= cell.last_seen());
    cell.until_idle("m1").await;
    let numbers: Vec<u64> = cell.seen.iter().map(|event| event.head.seq).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    assert_eq!(text_of(&support::messages(&cell.seen)).len(), 2_000_000);
    cell.end().await;
}

#[tokio::test]
async fn a_marker_with_another_secret_changes_nothing() {
    let mut cell = Cell::start();
    cell.attach().await;
    assert!(!cell.stranger_is_echoed().await);
    cell.attach_after_garbage(0).await;
    let _: Hello = cell.init(600).await;
    cell.end().await;
}

#[tokio::test]
async fn the_guest_exits_when_its_lease_is_over_even_with_stdin_closed() {
    let mut cell = Cell::start();
    cell.attach().await;
    let _: Hello = cell.init(1).await;
    let started = Instant::now();
    cell.close_stdin();
    assert!(cell.wait_exit(Duration::from_secs(5)).await.success());
    assert!(started.elapsed() > Duration::from_millis(800));
}

#[tokio::test]
async fn at_rest_the_guest_is_small() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    execute(&mut cell, "k1", "m1", "one 30000000", CAP).await;
    cell.until_done("m1").await;
    let resident = cell.memory_kb("VmRSS:");
    println!("{resident} kB resident, {} kB of it not of its file", cell.memory_kb("RssAnon:"));
    // Only the file that is shipped is small.
    let limit = if std::env::var_os(support::GUEST).is_some() { 5000 } else { 20_000 };
    assert!(resident < limit, "{resident} kB");
    cell.end().await;
}

#[tokio::test]
async fn signals_mean_nothing() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.signal_guest(&["TERM", "INT", "HUP", "QUIT", "PIPE"]);
    let _: Hello = cell.init(600).await;
    cell.end().await;
}

/// The one that `make test` makes.
fn python_with_ipykernel() -> OsString {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/ipykernel/bin/python");
    assert!(python.exists(), "{} is not there; `make test-kernel` makes it", python.display());
    python.into_os_string()
}

#[tokio::test]
async fn real_ipykernel_runs_code_and_loses_nothing() {
    let python = python_with_ipykernel();
    let mut cell = Cell::start_with(&python);
    cell.attach().await;
    for (name, transport) in [("k1", Transport::Ipc), ("k2", Transport::Tcp)] {
        cell.start_kernel(name, "real", transport, &[]).await;
        execute(&mut cell, name, &format!("{name}a"), "1+1", CAP).await;
        let messages = cell.until_done(&format!("{name}a")).await;
        let result = messages.iter().find(|message| message.msg_type == "execute_result").unwrap();
        assert_eq!(result.content["data"]["text/plain"], json!("2"));
        let big = OutputCap { text_bytes: 8 << 20, messages: 1 << 20, ..CAP };
        execute(&mut cell, name, &format!("{name}b"), "for n in range(4000): print('x'*1023, flush=True)", big).await;
        assert_eq!(text_of(&cell.until_done(&format!("{name}b")).await).len(), 4_096_000);
        execute(&mut cell, name, &format!("{name}c"), "print('begin' + 'y'*50_000_000 + 'end')", CAP).await;
        let events = cell.until_idle(&format!("{name}c")).await;
        assert!(events.iter().any(|e| matches!(e.head.event, Event::Gap { total_bytes: 50_000_009, .. })));
        execute(&mut cell, name, &format!("{name}d"), "raise ValueError('z'*20_000_000)", CAP).await;
        let messages = cell.until_done(&format!("{name}d")).await;
        let error = messages.iter().find(|message| message.msg_type == "error").unwrap();
        assert_eq!(error.content["ename"], json!("ValueError"));
        let reply = messages.iter().find(|message| message.msg_type == "execute_reply").unwrap();
        assert_eq!((&reply.content["status"], &reply.content["ename"]), (&json!("error"), &json!("ValueError")));
        execute(&mut cell, name, &format!("{name}e"), "import os; os._exit(7)", CAP).await;
        cell.until(|event| matches!(event, Event::KernelExited { status: Some(7), .. })).await;
    }
    assert!(cell.memory_peak_kb() < 60_000, "the guest took {} kB", cell.memory_peak_kb());
    cell.end().await;
}

#[tokio::test]
async fn real_ipykernel_asks_for_input_on_the_stdin_channel() {
    let python = python_with_ipykernel();
    let mut cell = Cell::start_with(&python);
    cell.attach().await;
    cell.start_kernel("k1", "real", Transport::Ipc, &[]).await;
    execute(&mut cell, "k1", "m1", "print('hello', input('who? '))", CAP).await;
    cell.until(|event| matches!(event, Event::Message { channel: Channel::Stdin, msg_type, .. } if msg_type == "input_request")).await;
    support::send(&mut cell, "k1", Channel::Stdin, "input_reply", "m2", &json!({"value": "you"}), None).await;
    assert_eq!(text_of(&cell.until_done("m1").await), "hello you\n");
    cell.end().await;
}
