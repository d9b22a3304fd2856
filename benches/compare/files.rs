//! Files through the whole of it, beside the engine's bare attach stream: in turns, in both directions.

use std::time::Instant;

use bollard::models::{ContainerCreateBody, HostConfig};

use crate::engine::{Engine, Inside};
use crate::figures::Figures;
use crate::measure::{no_log, say};
use crate::server::Server;
use crate::{IMAGE, Result};

const ROUNDS: usize = 5;
const BYTES: usize = 256 << 20;
/// What a file may take at most of what the stream takes.
const TARGET: f64 = 2.0;

/// A file of 256 MiB into a session and out of it again, and as much over a bare stream.
pub async fn files(engine: &Engine, server: &Server, figures: &mut Figures) -> Result<()> {
    say("files");
    let session = server.create_with(1024, 600).await?;
    let mut found = [const { Vec::new() }; 4];
    for round in 0..=ROUNDS {
        let rates = [
            rate(server.put_file(&session, BYTES)).await?,
            rate(server.get_file(&session, BYTES)).await?,
            stream(engine, &format!("head -c {BYTES} > /dev/null; echo done"), BYTES).await?,
            stream(engine, &format!("read line; head -c {BYTES} /dev/zero"), 0).await?,
        ];
        // The first round warms up caches.
        if round > 0 {
            found.iter_mut().zip(rates).for_each(|(found, rate)| found.push(rate));
        }
    }
    server.delete(&session).await?;
    let names = ["file, into a session", "file, out of a session", "bare attach stream, in", "bare attach stream, out"];
    for (name, rates) in names.into_iter().zip(found) {
        figures.add(name, "MB/s", rates);
    }
    figures.compare("attach stream : file, in", names[2], names[0], Some(TARGET));
    figures.compare("attach stream : file, out", names[3], names[1], Some(TARGET));
    Ok(())
}

async fn rate(work: impl Future<Output = Result<()>>) -> Result<f64> {
    let started = Instant::now();
    work.await?;
    Ok(BYTES as f64 / 1e6 / started.elapsed().as_secs_f64())
}

/// Sends so many bytes to a container, or a line, and reads what it says.
async fn stream(engine: &Engine, script: &str, send: usize) -> Result<f64> {
    let body = ContainerCreateBody {
        image: Some(IMAGE.to_owned()),
        host_config: Some(HostConfig { log_config: Some(no_log()), ..HostConfig::default() }),
        network_disabled: Some(true),
        ..ContainerCreateBody::default()
    };
    let command = ["sh", "-c", script].map(str::to_owned).to_vec();
    let mut inside = Inside::start(engine.docker.clone(), body, command).await?;
    let measured = rate(async {
        inside.send(send).await?;
        let expected = if send == 0 { BYTES } else { "done\n".len() };
        let mut read = 0;
        while read < expected {
            read += inside.chunk().await?.ok_or("the container's output ended early")?.len();
        }
        Ok(())
    });
    let rate = measured.await?;
    inside.end().await?;
    Ok(rate)
}
