//! The comparisons. Each adds its rows and ratios to the figures and leaves the engine as it was.

use std::fs;
use std::time::{Duration, Instant};

use bollard::models::{ContainerCreateBody, HostConfig, HostConfigLogConfig};
use futures_util::future::try_join_all;
use serde_json::json;

use crate::engine::{Engine, Inside, docker_run};
use crate::figures::Figures;
use crate::server::Server;
use crate::{IMAGE, Result};

const STARTS: usize = 20;
/// Executions are measured in blocks, which take turns.
const BLOCKS: usize = 15;
const BLOCK: usize = 20;
const WARM_UP: usize = 30;
const BOOTS: usize = 20;
const CROWD: usize = 10;
const CROWDS: usize = 5;
const CLAIMS: usize = 200;
const SETTLE: Duration = Duration::from_millis(50);
const IN_A_ROW: usize = 50;
/// What the server has for [`pool`].
pub const POOL: &str = "default_template = \"python\"\n[templates.python.pool]\nmin = 10\nmax = 10\n";
const HUNDRED: usize = 100;
/// What the server has for [`hundreds`]: sessions of 96 MiB, files included.
pub const SMALL: &str = "[limits]\nsessions = 200\nqueued_creates = 200\ncreate_wait = \"10m\"\n\
    [templates.python.default]\nmemory = \"96MiB\"\ndisk = \"24MiB\"\ntmp = \"16MiB\"\n";
const STREAMS: usize = 5;
const STREAM_BYTES: usize = 256 << 20;

const MS: &str = "ms";
const MIB: &str = "MiB";

fn ms(elapsed: Duration) -> f64 {
    elapsed.as_secs_f64() * 1000.0
}

/// Says what is measured now.
pub fn say(what: &str) {
    eprintln!("==> {what}");
}

/// The same things in a random order.
pub fn shuffled<T: Copy, const N: usize>(mut things: [T; N]) -> Result<[T; N]> {
    for last in (1..N).rev() {
        let random = getrandom::u64().map_err(|error| error.to_string())?;
        things.swap(last, random as usize % (last + 1));
    }
    Ok(things)
}

#[derive(Clone, Copy)]
enum Start {
    Session,
    Run,
    RunWithoutNetwork,
    Api,
}

/// From nothing to the kernel's first answer; and the end of a session.
pub async fn starts(engine: &Engine, server: &Server, figures: &mut Figures) -> Result<()> {
    say("starts");
    let mut found = [const { Vec::new() }; 4];
    let mut ends = Vec::new();
    for round in 0..=STARTS {
        for start in shuffled([Start::Session, Start::Run, Start::RunWithoutNetwork, Start::Api])? {
            let elapsed = match start {
                Start::Session => {
                    let (started, ended) = session_life(server).await?;
                    ends.push(ended);
                    started
                }
                Start::Run => tokio::task::spawn_blocking(|| docker_run(&[])).await??,
                Start::RunWithoutNetwork => {
                    tokio::task::spawn_blocking(|| docker_run(&["--network", "none"])).await??
                }
                Start::Api => api_start(engine).await?,
            };
            // The first round warms up caches.
            if round > 0 {
                found[start as usize].push(ms(elapsed));
            }
        }
    }
    let [session, run, without_network, api] = found;
    figures.add("start: POST /v1/sessions until ready", MS, session);
    figures.add("start: docker run, kernel until first answer", MS, run);
    figures.add("start: docker run --network none, the same", MS, without_network);
    figures.add("start: bare engine API, no network, hurried client", MS, api);
    figures.add("end: DELETE until the container is gone", MS, ends.split_off(1).into_iter().map(ms).collect());
    let ours = "start: POST /v1/sessions until ready";
    figures.compare("session start : docker run", ours, "start: docker run, kernel until first answer", Some(1.3));
    figures.compare(
        "session start : docker run --network none",
        ours,
        "start: docker run --network none, the same",
        None,
    );
    figures.compare(
        "session start : bare engine API",
        ours,
        "start: bare engine API, no network, hurried client",
        None,
    );
    Ok(())
}

/// How long a session took to start, and to end.
async fn session_life(server: &Server) -> Result<(Duration, Duration)> {
    let asked = Instant::now();
    let session = server.create().await?;
    let (started, asked) = (asked.elapsed(), Instant::now());
    server.delete(&session).await?;
    Ok((started, asked.elapsed()))
}

async fn api_start(engine: &Engine) -> Result<Duration> {
    let asked = Instant::now();
    let mut inside = engine.plain("race").await?;
    inside.line().await?;
    let elapsed = asked.elapsed();
    inside.end().await?;
    Ok(elapsed)
}

/// The round trip of `1+1`: through the server, and with Jupyter's client beside a kernel in a cell that is limited alike.
pub async fn executions(engine: &Engine, server: &Server, figures: &mut Figures) -> Result<()> {
    say("executions");
    let session = server.create().await?;
    let mut inside = engine.like(&session, "serve").await?;
    let sides = [None, Some("stock"), Some("ours")];
    for side in sides {
        round_trips(server, &session, &mut inside, side, WARM_UP).await?;
    }
    let mut found = [const { Vec::new() }; 3];
    for _ in 0..BLOCKS {
        for place in shuffled([0, 1, 2])? {
            found[place].extend(round_trips(server, &session, &mut inside, sides[place], BLOCK).await?);
        }
    }
    inside.end().await?;
    server.delete(&session).await?;
    let [http, stock, ours] = found;
    figures.add("1+1: POST …/executions", MS, http);
    figures.add("1+1: jupyter_client, stock kernel, ipc, same limits", MS, stock);
    figures.add("1+1: jupyter_client, our launcher, ipc, same limits", MS, ours);
    let http = "1+1: POST …/executions";
    figures.compare(
        "execution : jupyter_client",
        http,
        "1+1: jupyter_client, stock kernel, ipc, same limits",
        Some(1.0),
    );
    figures.compare(
        "execution : jupyter_client with our launcher",
        http,
        "1+1: jupyter_client, our launcher, ipc, same limits",
        None,
    );
    Ok(())
}

/// Milliseconds of each of `rounds` executions, over HTTP or by a kernel inside.
async fn round_trips(
    server: &Server,
    session: &str,
    inside: &mut Inside,
    kernel: Option<&str>,
    rounds: usize,
) -> Result<Vec<f64>> {
    if let Some(kernel) = kernel {
        let seconds: Vec<f64> = inside.ask(&json!({"rounds": rounds, "kernel": kernel})).await?;
        return Ok(seconds.into_iter().map(|seconds| seconds * 1000.0).collect());
    }
    let mut found = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let asked = Instant::now();
        server.execute(session).await?;
        found.push(ms(asked.elapsed()));
    }
    Ok(found)
}

/// A program that does nothing, from its start to its known end: as a command over HTTP, and by a parent that does nothing else beside it.
pub async fn commands(server: &Server, figures: &mut Figures) -> Result<()> {
    say("commands");
    let session = server.create().await?;
    let spawn = format!(
        "import json, os, time\ntook = []\nfor _ in range({BLOCK}):\n    began = time.perf_counter()\n    \
         os.waitpid(os.posix_spawn('/bin/true', ['true'], os.environ), 0)\n    took.append((time.perf_counter() - began) * 1000)\n\
         print(json.dumps(took))"
    );
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..WARM_UP {
        server.command(&session, &["/bin/true"]).await?;
    }
    for _ in 0..BLOCKS {
        for place in shuffled([0, 1])? {
            if place == 0 {
                let took: Vec<f64> = serde_json::from_value(server.printed(&session, &spawn).await?)?;
                theirs.extend(took);
                continue;
            }
            for _ in 0..BLOCK {
                let asked = Instant::now();
                server.command(&session, &["/bin/true"]).await?;
                ours.push(ms(asked.elapsed()));
            }
        }
    }
    server.delete(&session).await?;
    let mut sorted = theirs.clone();
    sorted.sort_by(f64::total_cmp);
    let process = sorted[sorted.len() / 2];
    figures.add("true: POST …/commands until its end", MS, ours.clone());
    figures.add("true: posix_spawn and waitpid in the same cell", MS, theirs);
    figures.add("true: what the command takes beyond the process", MS, ours.into_iter().map(|o| o - process).collect());
    figures.bound("command beyond its process : 5 ms", "true: what the command takes beyond the process", 5.0);
    Ok(())
}

/// A kernel from its exec to its first answer: the stock one, and by our launcher.
pub async fn boots(engine: &Engine, server: &Server, figures: &mut Figures) -> Result<()> {
    say("boots");
    let session = server.create().await?;
    let mut inside = engine.like(&session, "serve").await?;
    let sides = [("stock", false), ("ours", false), ("stock", true), ("ours", true)];
    let mut found = [const { Vec::new() }; 4];
    for round in 0..=BOOTS {
        for place in shuffled([0, 1, 2, 3])? {
            let (launcher, fresh) = sides[place];
            let seconds: f64 = inside.ask(&json!({"boot": launcher, "fresh": fresh})).await?;
            if round > 0 {
                found[place].push(seconds * 1000.0);
            }
        }
    }
    inside.end().await?;
    server.delete(&session).await?;
    let [stock, ours, stock_fresh, ours_fresh] = found;
    figures.add("boot: python -m ipykernel_launcher", MS, stock);
    figures.add("boot: our launcher", MS, ours);
    figures.add("boot: python -m ipykernel_launcher, new IPython folder", MS, stock_fresh);
    figures.add("boot: our launcher, new IPython folder", MS, ours_fresh);
    figures.compare("kernel boot", "boot: our launcher", "boot: python -m ipykernel_launcher", Some(0.75));
    let stock = "boot: python -m ipykernel_launcher, new IPython folder";
    figures.compare("kernel boot, new IPython folder", "boot: our launcher, new IPython folder", stock, None);
    Ok(())
}

/// Many sessions at once, and what they and the server hold in memory.
pub async fn crowd(engine: &Engine, server: &Server, figures: &mut Figures) -> Result<()> {
    say("ten at once");
    let (mut sessions, mut runs) = (Vec::new(), Vec::new());
    let (mut guests, mut planes) = (Vec::new(), Vec::new());
    for _ in 0..CROWDS {
        let asked = Instant::now();
        let ids = try_join_all((0..CROWD).map(|_| server.create())).await?;
        sessions.push(ms(asked.elapsed()));
        planes.extend(resident(server.pid()));
        for id in &ids {
            let state = engine.inspect(id).await?.state;
            guests.extend(state.and_then(|state| state.pid).and_then(resident));
        }
        try_join_all(ids.iter().map(|id| server.delete(id))).await?;
        let starts = (0..CROWD).map(|_| tokio::task::spawn_blocking(|| docker_run(&["--network", "none"])));
        let each = try_join_all(starts).await?.into_iter().collect::<Result<Vec<Duration>>>()?;
        // Ends are not part of it: until the last one had its answer.
        runs.extend(each.into_iter().max().map(ms));
    }
    figures.add("ten sessions at once, until all are ready", MS, sessions);
    figures.add("ten docker run --network none at once, the same", MS, runs);
    let theirs = "ten docker run --network none at once, the same";
    figures.compare("ten at once", "ten sessions at once, until all are ready", theirs, None);
    figures.add("memory: a guest (VmRSS of PID 1, at rest)", MIB, guests);
    figures.add("memory: the control plane with ten sessions (VmRSS)", MIB, planes);
    Ok(())
}

/// From a create to the answer where a session is ready, on a machine that does nothing else; and a pool that more is asked of than it holds.
pub async fn pool(server: &Server, figures: &mut Figures) -> Result<()> {
    say("a pool of ten");
    let (mut claims, mut refills) = (Vec::new(), Vec::new());
    for _ in 0..CLAIMS {
        server.pool_is_full().await?;
        // What is made for the pool has just ended; its last traces settle.
        tokio::time::sleep(SETTLE).await;
        let asked = Instant::now();
        let id = server.create().await?;
        let elapsed = asked.elapsed();
        if !server.is_warm(&id).await? {
            return Err("a full pool gave nothing".into());
        }
        claims.push(ms(elapsed));
        server.delete(&id).await?;
    }
    let (mut row, mut warm) = (Vec::new(), 0.0);
    server.pool_is_full().await?;
    let mut made = Vec::new();
    for _ in 0..IN_A_ROW {
        let asked = Instant::now();
        let id = server.create().await?;
        row.push(ms(asked.elapsed()));
        warm += f64::from(u8::from(server.is_warm(&id).await?));
        made.push(id);
    }
    let emptied = Instant::now();
    try_join_all(made.iter().map(|id| server.delete(id))).await?;
    server.pool_is_full().await?;
    refills.push(emptied.elapsed().as_secs_f64());
    figures.add("warm create: POST /v1/sessions until ready", MS, claims);
    figures.add("fifty creates in a row, a pool of ten: each", MS, row);
    figures.add("of these warm", "of 50", vec![warm]);
    figures.add("until the pool is full again", "s", refills);
    Ok(())
}

/// A hundred creates in the same moment, and as many more; then all of them live side by side.
pub async fn hundreds(server: &Server, figures: &mut Figures) -> Result<()> {
    say("a hundred at once, and two hundred that live");
    let before = available()?;
    let mut ids = Vec::new();
    for round in 0..2 {
        let asked = Instant::now();
        ids.extend(try_join_all((0..HUNDRED).map(|_| server.create())).await?);
        if round == 0 {
            figures.add("a hundred creates at once, until all are ready", "s", vec![asked.elapsed().as_secs_f64()]);
            figures.add(
                "memory: the control plane with a hundred sessions (VmRSS)",
                MIB,
                resident(server.pid()).into_iter().collect(),
            );
        }
    }
    for id in &ids {
        server.execute(id).await?;
    }
    let each = (before - available()?) / ids.len() as f64;
    figures.add("memory: each of two hundred sessions, with shim and kernel", MIB, vec![each]);
    figures.add(
        "memory: the control plane with two hundred (VmRSS)",
        MIB,
        resident(server.pid()).into_iter().collect(),
    );
    for some in ids.chunks(8) {
        try_join_all(some.iter().map(|id| server.delete(id))).await?;
    }
    Ok(())
}

/// Memory of the machine that can still be had, in MiB.
fn available() -> Result<f64> {
    let figures = fs::read_to_string("/proc/meminfo")?;
    let line = figures.lines().find_map(|line| line.strip_prefix("MemAvailable:")).ok_or("no MemAvailable")?;
    let kib: f64 = line.split_whitespace().next().ok_or("no figure")?.parse()?;
    Ok(kib / 1024.0)
}

/// Resident memory in MiB; nothing where the process is on another machine.
fn resident(pid: i64) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

/// What an attach stream carries, which is the wire of every session.
pub async fn stream(engine: &Engine, figures: &mut Figures) -> Result<()> {
    say("attach stream");
    let mut found = Vec::new();
    for _ in 0..STREAMS {
        let body = ContainerCreateBody {
            image: Some(IMAGE.to_owned()),
            // As a session's is: a log would be what is measured.
            host_config: Some(HostConfig { log_config: Some(no_log()), ..HostConfig::default() }),
            network_disabled: Some(true),
            ..ContainerCreateBody::default()
        };
        let command = ["head", "-c", &STREAM_BYTES.to_string(), "/dev/zero"].map(str::to_owned).to_vec();
        let mut inside = Inside::start(engine.docker.clone(), body, command).await?;
        let mut read = inside.chunk().await?.map_or(0, |chunk| chunk.len());
        let (started, early) = (Instant::now(), read);
        while let Some(chunk) = inside.chunk().await? {
            read += chunk.len();
        }
        found.push((read - early) as f64 / 1e6 / started.elapsed().as_secs_f64());
        inside.end().await?;
    }
    figures.add("attach stream, from the container", "MB/s", found);
    Ok(())
}

/// No log: it would be what is measured.
pub fn no_log() -> HostConfigLogConfig {
    HostConfigLogConfig { typ: Some("none".to_owned()), config: None }
}
