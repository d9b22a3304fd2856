//! The real guest over real pipes: the link, takeover, files, and kernels both faked and, where there is one, real.
//!
//! The fake kernel is `fake_kernel.py`, which needs nothing but Python. `make test-kernel` makes a Python with `ipykernel`.

#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

mod support;

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cellblock_wire::files::{Listing, Written};
use cellblock_wire::link::{
    Change, Channel, CutStream, Effects, Event, FileChange, Hello, KernelDeleted, KernelSpec, Numbered, OutputCap,
    Process, Report, Stats, Transport,
};
use hyper::{Method, StatusCode};
use serde_json::json;
use support::{Cell, FAKE, execute, text_of};

const CAP: OutputCap = OutputCap {
    text_bytes: 64 * 1024,
    result_bytes: 1024 * 1024,
    total_bytes: u64::MAX,
    messages: 1000,
    messages_per_second: u64::MAX,
};

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
    assert_eq!(cell.get::<Vec<String>>("/kernels").await, [""; 0]);
    for (method, path, status, code) in [
        (Method::GET, "/nothing", 404, "not-found"),
        (Method::POST, "/kernels", 400, "invalid"),
        (Method::DELETE, "/kernels/none", 404, "not-found"),
        (Method::GET, "/events?after=x", 400, "invalid"),
        (Method::GET, "/files", 400, "invalid"),
        (Method::GET, "/files/stat?q=%7B%22path%22%3A%22..%2Fetc%2Fpasswd%22%7D", 400, "invalid"),
        (Method::GET, "/files/content?q=%7B%22path%22%3A%22none%22%7D", 404, "not-found"),
        (Method::POST, "/egress/1", 404, "not-found"),
        (Method::POST, "/egress/x", 400, "invalid"),
        (Method::DELETE, "/egress/1", 400, "invalid"),
        (Method::GET, "/egress/1", 404, "not-found"),
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
    let write = |path: &str| Cell::about("/files/content", &json!({"path": path}));
    let made = cell.request(Method::PUT, &write("a b/data.bin"), bytes.clone()).await;
    let made: Written = serde_json::from_slice(&made.1).unwrap();
    assert_eq!((made.is_new, made.received), (true, 3_000_000));
    // Ends like a marker begins: the link holds such bytes back for a moment only.
    assert_eq!(cell.request(Method::PUT, &write("end"), Bytes::from_static(&[1, 0xce])).await.0, StatusCode::OK);
    let all = Cell::about("/files", &json!({"depth": 9, "limit": 100}));
    let listed: Listing = cell.get(&all).await;
    let listed: Vec<_> = listed.entries.iter().map(|file| (file.path.as_str(), file.size)).collect();
    assert_eq!((listed.len(), listed[1], listed[2]), (3, ("a b/data.bin", 3_000_000), ("end", 2)));
    let read = Cell::about("/files/content", &json!({"path": "a b/data.bin"}));
    assert_eq!(cell.request(Method::GET, &read, Bytes::new()).await.1, bytes);
    let part = Cell::about("/files/content", &json!({"path": "a b/data.bin", "range": {"last": 5}}));
    assert_eq!(cell.request(Method::GET, &part, Bytes::new()).await.1, bytes[2_999_995..]);
    cell.end().await;
}

#[tokio::test]
async fn a_kernel_is_started_asked_and_deleted() {
    for transport in [Transport::Ipc, Transport::Tcp] {
        let mut cell = Cell::start();
        cell.attach().await;
        cell.start_kernel("k1", FAKE, transport, &[]).await;
        // Said again because the answer was not heard: it is the same kernel.
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
        assert_eq!(cell.delete("k1").await, KernelDeleted::default());
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
    let cap = OutputCap { text_bytes: 1 << 30, result_bytes: 1 << 30, messages: 1 << 30, ..CAP };
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
        assert_eq!(cell.delete(name).await, KernelDeleted::default(), "its effects were told before");
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
async fn what_was_held_back_is_told_before_a_kernel_is_gone() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    let cap = OutputCap { text_bytes: 400, ..CAP };
    execute(&mut cell, "k1", "m1", "spill 20 100", cap).await;
    cell.until(|event| matches!(event, Event::Message { msg_type, .. } if msg_type == "stream")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(cell.get::<Vec<String>>("/kernels").await, ["k1"]);
    let (status, body) = cell.request(Method::DELETE, "/kernels/k1", "".into()).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(cell.get::<Vec<String>>("/kernels").await, [""; 0]);
    let gone: KernelDeleted = serde_json::from_slice(&body).unwrap();
    let events = cell.until(|event| matches!(event, Event::Gap { .. })).await;
    assert!(gone.last_seq >= events.last().unwrap().head.seq);
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
    assert_eq!(cell.delete("k1").await, KernelDeleted::default());
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
async fn time_in_which_the_guest_is_stopped_does_not_count_against_its_lease() {
    let mut cell = Cell::start();
    cell.attach().await;
    let _: Hello = cell.init(10).await;
    cell.signal_guest(&["STOP"]);
    // There is nothing to wait for but the time itself: more than the lease.
    tokio::time::sleep(Duration::from_secs(12)).await;
    cell.signal_guest(&["CONT"]);
    let went_on = Instant::now();
    assert!(cell.wait_exit(Duration::from_secs(15)).await.success());
    assert!(went_on.elapsed() > Duration::from_secs(3), "it ended {:?} after it went on", went_on.elapsed());
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

#[tokio::test]
async fn what_an_execution_has_done_is_told_before_its_reply() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    assert_eq!(
        cell.request(Method::PUT, &Cell::about("/files/content", &json!({"path": "mine"})), Bytes::from("x")).await.0,
        StatusCode::OK
    );
    let effects = Cell::effects(&cell.run("k1", "m1", "write new 5", CAP).await, "m1");
    assert_eq!(effects.files.len(), 1, "the upload is not its change");
    let FileChange { path, change, size_bytes, sha256 } = &effects.files[0];
    assert_eq!((path.as_str(), *change, *size_bytes), ("new", Change::Created, Some(5)));
    let of_five_x = "eaf16bc07968e013f3f94ab1342472434a39fc3475f11cf341a6c3965974f8e9";
    assert_eq!(sha256.as_deref(), Some(of_five_x));
    assert!(!effects.approximate && effects.peak_memory_bytes.unwrap() > 1 << 20 && effects.processes.is_empty());
    let quiet = Cell::effects(&cell.run("k1", "m2", "echo", CAP).await, "m2");
    assert_eq!((quiet.files, quiet.files_omitted), (vec![], 0));
    cell.start_kernel("k2", FAKE, Transport::Ipc, &[]).await;
    assert!(Cell::effects(&cell.run("k1", "m3", "write mine 9", CAP).await, "m3").approximate);
    // A kernel that ends has done something too, and what waited behind it has not.
    execute(&mut cell, "k1", "m4", "later write last 1", CAP).await;
    execute(&mut cell, "k1", "m5", "exit 3", CAP).await;
    execute(&mut cell, "k1", "m6", "write never 1", CAP).await;
    let told = cell.until(|event| matches!(event, Event::KernelExited { swept: false, .. })).await;
    assert_eq!(Cell::effects(&told, "m4").files[0].path, "last");
    assert_eq!(Cell::effects(&told, "m5").files, []);
    assert_eq!(Cell::effects(&told, "m6").files, []);
    cell.end().await;
}

#[tokio::test]
async fn deleting_a_kernel_answers_with_what_was_under_way() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    std::fs::write(cell.workdir().join("by-nobody"), "x").unwrap();
    execute(&mut cell, "k1", "m1", "hang", CAP).await;
    cell.until(|event| matches!(event, Event::Message { msg_type, .. } if msg_type == "stream")).await;
    let deleted = cell.delete("k1").await;
    assert!(!deleted.swept && deleted.ended_kernels.is_empty());
    let effects = deleted.effects.unwrap();
    assert_eq!((effects.files.len(), effects.processes.len()), (1, 0));
    assert!(effects.peak_memory_bytes.is_some(), "looked at before the end");
    assert!(cell.fake_kernels().is_empty());
    cell.end().await;
}

#[tokio::test]
async fn a_kernel_that_is_alone_in_its_cell_takes_everything_with_it() {
    let Some(mut cell) = Cell::start_as_init() else { return };
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    execute(&mut cell, "k1", "m1", "hop 100 0.02", CAP).await;
    cell.until(|event| matches!(event, Event::Message { msg_type, .. } if msg_type == "stream")).await;
    assert!(cell.neighbours() > 100);
    let began = Instant::now();
    let deleted = cell.delete("k1").await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(!deleted.swept && deleted.effects.is_some(), "nobody else was there");
    assert_eq!(cell.neighbours(), 0);
    cell.start_kernel("k2", FAKE, Transport::Ipc, &[]).await;
    assert_eq!(text_of(&support::messages(&cell.run("k2", "m2", "echo again", CAP).await)), "again");
    cell.end().await;
}

#[tokio::test]
async fn beside_others_only_a_kernels_own_processes_are_ended() {
    let Some(mut cell) = Cell::start_as_init() else { return };
    cell.attach().await;
    for name in ["k1", "k2", "k3"] {
        cell.start_kernel(name, FAKE, Transport::Ipc, &[]).await;
        cell.run(name, &format!("{name}a"), "daemon", CAP).await;
    }
    assert_eq!(cell.delete("k1").await, KernelDeleted::default());
    assert_eq!(cell.neighbours(), 4, "two kernels, each with its daemon");
    assert_eq!(text_of(&support::messages(&cell.run("k2", "k2b", "echo here", CAP).await)), "here");
    cell.end().await;
}

#[tokio::test]
async fn in_a_cell_full_of_processes_nobody_is_searched_for() {
    let Some(mut cell) = Cell::start_as_init() else { return };
    cell.attach().await;
    for name in ["k1", "k2"] {
        cell.start_kernel(name, FAKE, Transport::Ipc, &[]).await;
    }
    execute(&mut cell, "k2", "k2a", "hang", CAP).await;
    execute(&mut cell, "k1", "k1a", "hop 40 0.02", CAP).await;
    cell.until(|event| matches!(event, Event::Message { msg_type, .. } if msg_type == "stream")).await;
    cell.figure("pids.current", "128\n");
    cell.figure("pids.events", "max 9\n");
    cell.figure("memory.events", "oom 1\noom_kill 1\n");
    cell.figure("cpu.stat", "usage_usec 9000000\n");
    let began = Instant::now();
    let deleted = cell.delete("k1").await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let effects = deleted.effects.unwrap();
    assert!(effects.pids_hit && effects.memory_hit && effects.approximate && effects.oom_kills == 1, "{effects:?}");
    assert!((7_000_000..8_000_001).contains(&effects.cpu_usec.unwrap()), "{effects:?}");
    assert!(deleted.swept && deleted.ended_kernels == ["k2"]);
    assert_eq!(cell.neighbours(), 0);
    let told = cell.until(|event| matches!(event, Event::KernelExited { swept: true, .. })).await;
    assert!(Cell::effects(&told, "k2a").approximate);
    cell.end().await;
}

#[tokio::test]
async fn text_and_results_share_their_total() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    let cap = OutputCap { total_bytes: 10_000, ..CAP };
    let told = cell.run("k1", "m1", "one 20000", cap).await;
    let text = text_of(&support::messages(&told));
    assert!(text.starts_with("begin") && text.ends_with("end") && text.len() == 10_000);
    assert!(told.iter().any(|e| matches!(e.head.event, Event::Gap { total_bytes: 20_000, omitted_bytes: 10_000, .. })));
    let told = cell.run("k1", "m2", "display 20000", cap).await;
    assert!(told.iter().any(|e| matches!(e.head.event, Event::Gap { stream: CutStream::Results, .. })));
    cell.end().await;
}

#[tokio::test]
async fn messages_above_the_rate_wait_until_none_are_left() {
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    cell.run("k1", "m0", "echo", CAP).await;
    let began = Instant::now();
    let cap = OutputCap { messages_per_second: 20, ..CAP };
    let told = cell.run("k1", "m1", "many 40 1000", cap).await;
    assert_eq!(text_of(&support::messages(&told)).len(), 40_000);
    assert!(began.elapsed() >= Duration::from_millis(950), "{:?}", began.elapsed());
    let began = Instant::now();
    cell.run("k1", "m2", "many 3000 10", OutputCap { messages: 25, ..cap }).await;
    assert!(began.elapsed() < Duration::from_secs(30), "at the rate it would be 150 s: {:?}", began.elapsed());
    // One that has ended is not slowed down any more: what it said is all there is.
    execute(&mut cell, "k1", "m3", "many 60 10", cap).await;
    execute(&mut cell, "k1", "m4", "exit 0", cap).await;
    let told = cell.until(|event| matches!(event, Event::KernelExited { .. })).await;
    assert_eq!(text_of(&support::messages(&told)).len(), 600 + "going".len());
    cell.end().await;
}

#[tokio::test]
async fn the_guests_room_is_emptied_of_what_is_not_its_own() {
    use std::os::unix::fs::PermissionsExt;
    let mut cell = Cell::start();
    cell.attach().await;
    cell.start_kernel("k1", FAKE, Transport::Ipc, &[]).await;
    cell.until(|event| *event == Event::KernelConnected).await;
    let state = cell.state();
    let deep = state.join("litter/a/b/c");
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::create_dir(state.join("k2")).unwrap();
    std::fs::write(deep.join("file"), "x").unwrap();
    std::fs::write(state.join("file"), "x").unwrap();
    std::os::unix::fs::symlink(cell.workdir(), state.join("link")).unwrap();
    std::fs::write(cell.workdir().join("kept"), "x").unwrap();
    for closed in [deep.as_path(), &state.join("litter"), &state] {
        std::fs::set_permissions(closed, std::fs::Permissions::from_mode(0o000)).unwrap();
    }
    cell.start_kernel("k2", FAKE, Transport::Ipc, &[]).await;
    let mut names: Vec<_> = std::fs::read_dir(&state).unwrap().flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names, ["k1", "k2"]);
    assert!(cell.workdir().join("kept").exists());
    cell.run("k1", "m1", "echo", CAP).await;
    cell.run("k2", "m2", "echo", CAP).await;
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

#[tokio::test]
async fn real_ipykernel_tells_what_was_printed_past_python_before_its_cell_ends() {
    let python = python_with_ipykernel();
    let mut cell = Cell::start_with(&python);
    cell.attach().await;
    cell.start_kernel("k1", "real", Transport::Ipc, &[]).await;
    // The thread that takes up such text comes last, and there is always somebody before it.
    let starve = "
import os, subprocess, sys
os.sched_setscheduler(sys.stdout.watch_fd_thread.native_id, os.SCHED_IDLE, os.sched_param(0))
work = 'import time\\nend = time.time() + 60\\nwhile time.time() < end: pass'
busy = [subprocess.Popen([sys.executable, '-c', work]) for _ in range(2 * os.cpu_count())]
";
    cell.run("k1", "m0", starve, CAP).await;
    for n in 1..=5 {
        let id = format!("m{n}");
        execute(&mut cell, "k1", &id, &format!("_ = os.system('echo ü{n}')"), CAP).await;
        assert_eq!(text_of(&cell.until_done(&id).await), format!("ü{n}\n"));
    }
    // What is not there any more is not taken up, and costs nobody an answer.
    execute(&mut cell, "k1", "m6", "os.close(1); os.close(2)\nfor one in busy: one.kill()\nprint('still there')", CAP)
        .await;
    assert_eq!(text_of(&cell.until_done("m6").await), "still there\n");
    execute(&mut cell, "k1", "m7", "sys.stdout.close()", CAP).await;
    cell.until_done("m7").await;
    cell.end().await;
}

#[tokio::test]
async fn real_ipykernels_executions_are_measured() {
    let python = python_with_ipykernel();
    let mut cell = Cell::start_with(&python);
    cell.attach().await;
    cell.start_kernel("k1", "real", Transport::Ipc, &[]).await;
    let first = Cell::effects(&cell.run("k1", "m1", "1+1", CAP).await, "m1");
    assert!(first.files.is_empty() && first.processes.is_empty(), "{first:?}");
    let work = "
import hashlib, os, subprocess, sys
open('gone', 'w').write('x')
open('kept', 'w').write('x')
";
    let files = |effects: &Effects| -> Vec<(String, Change)> {
        effects.files.iter().map(|file| (file.path.clone(), file.change)).collect()
    };
    let created = Cell::effects(&cell.run("k1", "m2", work, CAP).await, "m2");
    let both = [("gone".to_owned(), Change::Created), ("kept".to_owned(), Change::Created)];
    assert_eq!(files(&created), both);
    let work = "
os.remove('gone')
open('kept', 'a').write('y')
os.makedirs('deep/er')
open('deep/er/new.bin', 'wb').write(bytes(5_000_000))
big = bytearray(os.urandom(1)) * 150_000_000
del big
for n in range(3_000_000): n * n
left = subprocess.Popen(['sleep', '1000'], start_new_session=True)
print(hashlib.sha256(bytes(5_000_000)).hexdigest(), left.pid)
";
    let told = cell.run("k1", "m3", work, CAP).await;
    let effects = Cell::effects(&told, "m3");
    let said = text_of(&support::messages(&told));
    let (hash, pid) = said.trim().split_once(' ').unwrap();
    let new = ("deep/er/new.bin".to_owned(), Change::Created);
    assert_eq!(files(&effects), [new, ("gone".to_owned(), Change::Deleted), ("kept".to_owned(), Change::Changed)]);
    assert_eq!((effects.files[0].sha256.as_deref(), effects.files[0].size_bytes), (Some(hash), Some(5_000_000)));
    let process = Process { pid: pid.parse().unwrap(), command: "sleep 1000".to_owned() };
    assert_eq!((effects.processes, effects.processes_omitted), (vec![process], 0));
    let peak = effects.peak_memory_bytes.unwrap();
    assert!((150_000_000..600_000_000).contains(&peak), "{peak}");
    if let Some(cpu) = effects.cpu_usec {
        assert!(cpu > 30_000, "{cpu}");
    }
    let quiet = Cell::effects(&cell.run("k1", "m4", "1+1", CAP).await, "m4");
    assert!(quiet.files.is_empty() && quiet.processes.is_empty() && !quiet.disk_hit, "{quiet:?}");
    assert!(quiet.peak_memory_bytes.unwrap() < peak - 100_000_000, "counted anew");
    cell.delete("k1").await;
    assert!(!support::is_alive(pid));
    cell.end().await;
}

#[tokio::test]
async fn real_ipykernel_needs_no_room_to_find_its_temporary_folder() {
    let python = python_with_ipykernel();
    let mut cell = Cell::start_with(&python);
    cell.attach().await;
    for (name, env, folder) in [("k1", "OTHER", "/tmp"), ("k2", "TMPDIR", "/nonexistent")] {
        cell.start_kernel(name, "real", Transport::Ipc, &[(env, "/nonexistent")]).await;
        let told = cell.run(name, &format!("{name}a"), "import tempfile; print(tempfile.gettempdir())", CAP).await;
        assert_eq!(text_of(&support::messages(&told)).trim(), folder);
    }
    cell.end().await;
}
