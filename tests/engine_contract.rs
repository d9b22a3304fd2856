//! The Docker engine keeps the contract of [`Engine`], and some promises of its own.

#[path = "support/engine_docker.rs"]
mod engine_docker;
#[path = "support/engine_proxy.rs"]
mod engine_proxy;
#[path = "support/engine_registry.rs"]
mod engine_registry;
#[path = "support/engine_suite.rs"]
mod engine_suite;
#[path = "support/engine_tls.rs"]
mod engine_tls;

use std::time::{Duration, Instant};

use bollard::models::{ContainerConfig, ContainerUpdateBody};
use bollard::query_parameters::RemoveVolumeOptions;
use cellblock::engine::docker::{DockerEngine, DockerSettings};
use cellblock::engine::{ByteStream, CellName, Engine, EngineError, EngineEventKind, Pull};
use cellblock_wire::link::Report;
use engine_docker::{Bench, IMAGE, on_docker, real_guest, scripted_guest};
use engine_suite::{Subject, echo, secret};
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn subject<'a>(
    bench: &'a Bench,
    kill: &'a (dyn Fn(cellblock::engine::CellName) -> futures_util::future::BoxFuture<'static, ()> + Sync),
) -> Subject<'a> {
    Subject { engine: &bench.engine, operator: &bench.engine, instance: &bench.instance, image: IMAGE, kill }
}

#[tokio::test]
async fn the_contract_holds_with_the_real_guest() {
    on_docker(real_guest(), |bench| async move {
        let kill = bench.killer();
        engine_suite::run(&subject(&bench, &kill)).await;
    })
    .await;
}

/// The whole attestation: what the engine shows, and what a real guest reports from inside before anything else has run.
#[tokio::test]
async fn a_real_cell_is_confined_as_specified() {
    on_docker(real_guest(), |bench| async move {
        let kill = bench.killer();
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let mut stream = bench.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret()).await;
        let report = report(stream).await;
        assert_eq!(bench.engine.attest(&cell, &report).await, Ok(()));

        let mut other = cell.clone();
        other.resources.pids += 1;
        let refused = bench.engine.attest(&other, &report).await;
        let Err(EngineError::Unverified { mismatches }) = refused else { panic!("{refused:?}") };
        assert!(mismatches.iter().any(|m| m.starts_with("/HostConfig/PidsLimit")), "{mismatches:#?}");
        assert!(mismatches.iter().any(|m| m.starts_with("the guest's limit of processes")), "{mismatches:#?}");
        bench.engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

/// Asks a guest for its report, over HTTP/2 on a stream that was reset.
async fn report(stream: ByteStream) -> Report {
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    let exchange = async {
        let init = r#"{"generation": 1, "orphan_timeout_seconds": 600}"#;
        let mut answer = Bytes::new();
        for (method, path, body) in [("POST", "/init", init), ("GET", "/report", "")] {
            let request = hyper::Request::builder().method(method).uri(format!("http://guest{path}"));
            let request = request.body(Full::new(Bytes::from_static(body.as_bytes()))).expect("a request");
            let response = send.send_request(request).await.expect("an answer");
            let status = response.status();
            answer = response.into_body().collect().await.expect("a body").to_bytes();
            assert!(status.is_success(), "{method} {path}: {status}: {}", String::from_utf8_lossy(&answer));
        }
        answer
    };
    let answer = tokio::select! {
        answer = exchange => answer,
        ended = connection => panic!("the connection ended: {ended:?}"),
    };
    serde_json::from_slice(&answer).expect("a report")
}

#[tokio::test]
async fn the_contract_holds_with_a_scripted_guest() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        engine_suite::run(&subject(&bench, &kill)).await;
    })
    .await;
}

/// The engine holds a lock for each open attach, so a connection that stays half open would wedge the cell for good.
#[tokio::test]
async fn a_dropped_stream_is_closed_whole_even_with_output_in_flight() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let secret = secret();
        let mut stream = bench.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret).await;
        let mut slowest = Duration::ZERO;
        for round in 0..10 {
            stream.write_all(b"flood 3\n").await.expect("writing to a cell");
            stream.flush().await.expect("writing to a cell");
            // Sometimes nothing of it is read, sometimes a part.
            if round % 2 == 0 {
                stream.read_exact(&mut vec![0; 10_000]).await.expect("reading from a cell");
            }
            drop(stream);
            let began = Instant::now();
            stream = bench.engine.link(&cell.name).await.expect("a link after one that was dropped");
            echo(&mut stream, secret).await;
            slowest = slowest.max(began.elapsed());
        }
        assert!(slowest < Duration::from_secs(2), "{slowest:?}");
        println!("slowest takeover: {slowest:?}");
        drop(stream);
        bench.engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

/// Whatever became of an attach that came too early: once the stream before it is closed, the next one answers.
#[tokio::test]
async fn an_attach_that_came_too_early_wedges_nothing() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let secret = secret();
        let mut first = bench.engine.ensure(&cell).await.expect("a cell");
        echo(&mut first, secret).await;
        first.write_all(b"flood 8\n").await.expect("writing to a cell");
        first.flush().await.expect("writing to a cell");
        let early = bench.engine.link(&cell.name).await;
        assert!(matches!(&early, Ok(_) | Err(EngineError::TimedOut { .. })), "{:?}", early.err());
        drop(early);
        drop(first);
        let link = tokio::time::timeout(Duration::from_secs(3), bench.engine.link(&cell.name)).await;
        let mut stream = link.expect("a link answers at once").expect("a link");
        echo(&mut stream, secret).await;
        bench.engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

#[tokio::test]
async fn a_stream_is_fast_enough_for_files() {
    const MEBIBYTES: usize = 256;
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let mut stream = bench.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret()).await;

        let began = Instant::now();
        stream.write_all(format!("flood {MEBIBYTES}\n").as_bytes()).await.expect("writing to a cell");
        stream.flush().await.expect("writing to a cell");
        let mut left = MEBIBYTES << 20;
        let mut buffer = vec![0; 256 * 1024];
        while left > 0 {
            left -= stream.read(&mut buffer).await.expect("reading from a cell");
        }
        let down = MEBIBYTES as f64 / began.elapsed().as_secs_f64();

        let began = Instant::now();
        stream.write_all(format!("swallow {MEBIBYTES}\n").as_bytes()).await.expect("writing to a cell");
        let block = vec![0; 1 << 20];
        for _ in 0..MEBIBYTES {
            stream.write_all(&block).await.expect("writing to a cell");
        }
        stream.flush().await.expect("writing to a cell");
        stream.read_exact(&mut [0; 4]).await.expect("reading from a cell");
        let up = MEBIBYTES as f64 / began.elapsed().as_secs_f64();
        println!("out {down:.0} MiB/s, in {up:.0} MiB/s");
        assert!(down > 20.0 && up > 20.0, "out {down:.0} MiB/s, in {up:.0} MiB/s");
        drop(stream);
        bench.engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

#[tokio::test]
async fn the_engines_side_of_the_attestation_agrees_until_somebody_changes_the_container() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let mut stream = bench.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret()).await;
        // The guest's side is empty here; what begins with a slash is the engine's.
        let mismatches = |outcome| match outcome {
            Err(EngineError::Unverified { mismatches }) => {
                mismatches.into_iter().filter(|m: &String| m.starts_with('/')).collect()
            }
            other => panic!("{other:?}"),
        };
        let before: Vec<String> = mismatches(bench.engine.attest(&cell, &Report::default()).await);
        assert!(before.is_empty(), "{before:#?}");
        let update = ContainerUpdateBody { pids_limit: Some(1000), ..ContainerUpdateBody::default() };
        bench.docker.update_container(cell.name.as_str(), update).await.expect("an update");
        let after: Vec<String> = mismatches(bench.engine.attest(&cell, &Report::default()).await);
        assert!(matches!(after.as_slice(), [one] if one.starts_with("/HostConfig/PidsLimit")), "{after:#?}");
        bench.engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

#[tokio::test]
async fn a_new_control_plane_takes_over_the_cells_of_the_old_one() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let secret = secret();
        let mut stream = bench.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret).await;
        drop(stream);

        let successor = DockerEngine::connect(bench.settings.clone()).await.expect("a connection");
        let listed: Vec<_> = successor.list().await.expect("a list").into_iter().map(|o| o.name).collect();
        assert_eq!(listed, std::slice::from_ref(&cell.name));
        let mut stream = successor.link(&cell.name).await.expect("a link");
        echo(&mut stream, secret).await;
        successor.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

#[tokio::test]
async fn no_uid_is_given_twice_not_even_by_two_control_planes() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        // The range is this test's own: three uids, and two engines that were both connected before any was taken.
        let first = 300_000 + (std::process::id() % 1000) * 10;
        let settings = DockerSettings { uids: first..=first + 2, ..bench.settings.clone() };
        let mut engines = Vec::new();
        for _ in 0..2 {
            let engine = DockerEngine::connect(settings.clone()).await.expect("a connection");
            engine.prepare(&bench.image).await.expect("a volume");
            engines.push(engine);
        }
        let mut made = Vec::new();
        for n in 0..3 {
            let cell = engine_suite::spec(&subject(&bench, &kill)).await;
            drop(engines[n % 2].ensure(&cell).await.expect("a cell"));
            made.push(cell.name);
        }
        let mut uids = Vec::new();
        for name in &made {
            let found = bench.docker.inspect_container(name.as_str(), None).await.expect("a cell");
            uids.push(found.config.and_then(|c| c.user).expect("a user"));
        }
        uids.sort();
        uids.dedup();
        assert_eq!(uids.len(), 3, "{uids:?}");

        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let refused = engines[0].ensure(&cell).await.err();
        assert!(matches!(refused, Some(EngineError::Unavailable { .. })), "{refused:?}");
        made.push(cell.name);
        for name in &made {
            engines[0].remove(name).await.expect("a removal");
        }
    })
    .await;
}

#[tokio::test]
async fn the_guests_volume_is_repaired_when_it_was_tampered_with_or_pruned() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        // Tampered with: another file in it.
        let name = format!("cellblock-{}-tamper", bench.instance);
        engine_docker::put_into_volume(&bench, &name, "guest", b"#!/bin/false\n").await;
        bench.engine.prepare(&bench.image).await.expect("a volume that is written again");
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let mut stream = bench.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret()).await;
        bench.engine.remove(&cell.name).await.expect("a removal");

        // Pruned away between two sessions, without a word.
        let volume = bench.engine.guest_volume().to_owned();
        bench.docker.remove_volume(&volume, None::<RemoveVolumeOptions>).await.expect("a removal");
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let mut stream = bench.engine.ensure(&cell).await.expect("a cell");
        echo(&mut stream, secret()).await;
        bench.engine.remove(&cell.name).await.expect("a removal");

        // A later guest has a volume of its own, and the earlier one goes.
        let mut settings = bench.settings.clone();
        settings.guest_files[0].bytes.extend_from_slice(b"# later\n");
        let later = DockerEngine::connect(settings).await.expect("a connection");
        later.prepare(&bench.image).await.expect("a volume");
        assert_ne!(later.guest_volume(), volume);
        assert!(bench.docker.inspect_volume(&volume).await.is_err(), "the earlier volume stayed");
    })
    .await;
}

/// The engine tells a volume's last change as the time of its making, to the second: writing the guest takes it into another one.
#[tokio::test]
async fn a_guest_that_was_just_written_is_not_looked_at_again() {
    on_docker(scripted_guest(), |bench| async move {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("docker.sock");
        let proxy = engine_proxy::Proxy::start(&socket, "/var/run/docker.sock");
        let mut settings = bench.settings.clone();
        settings.host = Some(format!("unix://{}", socket.display()));
        settings.guest_files[0].bytes.extend_from_slice(b"# another\n");
        let engine = DockerEngine::connect(settings).await.expect("a connection");
        proxy.fault("PUT /containers/*/archive", engine_proxy::Fault::Late(Duration::from_millis(1100)), 1);
        engine.prepare(&bench.image).await.expect("a volume");
        assert_eq!(proxy.calm(), 1, "it was written");

        let kill = bench.killer();
        let subject = Subject { engine: &engine, operator: &engine, ..subject(&bench, &kill) };
        let cell = engine_suite::spec(&subject).await;
        proxy.fault("POST /containers/create", engine_proxy::Fault::Late(Duration::ZERO), usize::MAX);
        drop(engine.ensure(&cell).await.expect("a cell"));
        assert_eq!(proxy.calm(), 1, "nothing but the cell is made");
        engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}

#[tokio::test]
async fn an_image_that_would_open_a_lock_is_refused() {
    on_docker(scripted_guest(), |bench| async move {
        let config = ContainerConfig { volumes: Some(vec!["/data".to_owned()]), ..ContainerConfig::default() };
        let image = engine_docker::commit(&bench, config).await;
        let refused = bench.engine.resolve_image(&image, Pull::Never).await;
        assert!(
            matches!(&refused, Err(EngineError::Rejected { detail, .. }) if detail.contains("volumes")),
            "{refused:?}"
        );
        engine_docker::forget(&bench, &image).await;
    })
    .await;
}

#[tokio::test]
async fn nothing_is_done_to_what_is_not_this_instances() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        let mut cell = engine_suite::spec(&subject(&bench, &kill)).await;
        cell.name = CellName::new("another", cell.session, 0);
        assert!(matches!(bench.engine.remove(&cell.name).await, Err(EngineError::Rejected { .. })));
        assert!(matches!(bench.engine.ensure(&cell).await.err(), Some(EngineError::Rejected { .. })));
        assert!(matches!(bench.engine.link(&cell.name).await.err(), Some(EngineError::Rejected { .. })));
        assert!(matches!(bench.engine.observe(&cell.name).await, Err(EngineError::Rejected { .. })));
    })
    .await;
}

#[tokio::test]
async fn many_cells_at_once_come_and_go() {
    on_docker(scripted_guest(), |bench| async move {
        let kill = bench.killer();
        let subject = subject(&bench, &kill);
        let one = || async {
            let cell = engine_suite::spec(&subject).await;
            let began = Instant::now();
            let mut stream = bench.engine.ensure(&cell).await.expect("a cell");
            let made = began.elapsed();
            echo(&mut stream, secret()).await;
            drop(stream);
            let began = Instant::now();
            bench.engine.remove(&cell.name).await.expect("a removal");
            (made, began.elapsed())
        };
        let (made, gone) = one().await;
        println!("alone: ensure {made:?}, remove {gone:?}");
        let all = futures_util::future::join_all((0..12).map(|_| one())).await;
        let slowest = all.iter().map(|(made, _)| *made).max();
        println!("of twelve at once: slowest ensure {slowest:?}");
        assert_eq!(bench.engine.list().await, Ok(vec![]));
    })
    .await;
}

/// An image that is nowhere but in a registry with a password. Says so and ends early where there is no `docker-registry`.
#[tokio::test]
async fn a_missing_image_is_pulled_with_the_operators_credentials() {
    let Some(registry) = engine_registry::Registry::start().await else {
        eprintln!("skipped: there is no docker-registry on this machine");
        return;
    };
    on_docker(scripted_guest(), |bench| async move {
        let name = format!("{}/team/{}", registry.address, bench.instance);
        let reference = format!("{name}:1");
        engine_docker::push_tiny_image(&bench, &name, engine_registry::USER, engine_registry::PASSWORD).await;

        let without = bench.engine.resolve_image(&reference, Pull::Missing).await;
        assert!(matches!(without, Err(EngineError::Rejected { .. } | EngineError::Absent { .. })), "{without:?}");

        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("config.json");
        std::fs::write(&file, registry.credentials()).expect("a file");
        let settings = DockerSettings { credentials_file: Some(file), ..bench.settings.clone() };
        let engine = DockerEngine::connect(settings).await.expect("a connection");
        let never = engine.resolve_image(&reference, Pull::Never).await;
        assert!(matches!(never, Err(EngineError::Absent { .. })), "{never:?}");
        let pulled = engine.resolve_image(&reference, Pull::Missing).await.expect("a pull");
        assert_eq!(engine.resolve_image(&pulled.id, Pull::Never).await.expect("it is there now").id, pulled.id);
        engine_docker::forget(&bench, &reference).await;

        let unknown = engine.resolve_image(&format!("{name}:2"), Pull::Missing).await;
        assert!(matches!(unknown, Err(EngineError::Absent { .. } | EngineError::Rejected { .. })), "{unknown:?}");
    })
    .await;
}

#[tokio::test]
async fn a_watch_survives_the_way_to_the_engine() {
    on_docker(scripted_guest(), |bench| async move {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("docker.sock");
        let proxy = engine_proxy::Proxy::start(&socket, "/var/run/docker.sock");
        let host = Some(format!("unix://{}", socket.display()));
        let engine =
            DockerEngine::connect(DockerSettings { host, ..bench.settings.clone() }).await.expect("a connection");
        let kill = bench.killer();
        let mut events = engine.watch();
        let mut cut = 0;
        for _ in 0..3 {
            let cell = engine_suite::spec(&subject(&bench, &kill)).await;
            drop(bench.engine.ensure(&cell).await.expect("a cell"));
            let removed = async {
                loop {
                    let event = events.next().await.expect("a watch never ends");
                    if event.name == cell.name && event.kind == EngineEventKind::Removed {
                        return;
                    }
                }
            };
            let removal = async {
                tokio::time::sleep(Duration::from_millis(500)).await;
                // What happens while the connection is gone is told by the next one.
                cut += proxy.cut();
                bench.engine.remove(&cell.name).await.expect("a removal");
            };
            let both = async { tokio::join!(removed, removal) };
            tokio::time::timeout(Duration::from_secs(15), both).await.expect("an event");
        }
        assert!(cut >= 3, "the watch was cut {cut} times only");
    })
    .await;
}

#[tokio::test]
async fn an_engine_over_tls_is_like_any_other() {
    on_docker(real_guest(), |bench| async move {
        let folder = tempfile::tempdir().expect("a folder");
        let address = engine_tls::open(folder.path(), "/var/run/docker.sock").await;
        let host = Some(format!("tcp://{address}"));
        let plain = DockerEngine::connect(DockerSettings { host: host.clone(), ..bench.settings.clone() }).await.err();
        assert!(matches!(plain, Some(EngineError::Unavailable { .. })), "without TLS nobody answers: {plain:?}");
        let tls_folder = Some(folder.path().to_owned());
        let settings = DockerSettings { host, tls_folder, ..bench.settings.clone() };
        let engine = DockerEngine::connect(settings).await.expect("an engine");
        let kill = bench.killer();
        let cell = engine_suite::spec(&subject(&bench, &kill)).await;
        let mut stream = engine.ensure(&cell).await.expect("a cell");
        let secret = secret();
        echo(&mut stream, secret).await;
        drop(stream);
        let mut stream = engine.link(&cell.name).await.expect("a link");
        echo(&mut stream, secret).await;
        engine.remove(&cell.name).await.expect("a removal");
    })
    .await;
}
