//! Cellblock beside what it stands on: `docker run`, Jupyter's own client, the stock kernel. `make bench`.
//!
//! Each comparison takes turns between its sides, in a new random order every time, so that what else the machine does befalls
//! all of them. The verdict on a target is the ratio of two medians. Words after `--` choose comparisons: `cargo bench
//! --bench compare -- starts executions`; without any, all are made.
//!
//! A missed target is said, and is no failure: it is for people to judge on a machine they know.

mod e2b;
mod engine;
mod far;
mod figures;
mod files;
mod jupyter;
mod measure;
mod report;
mod server;

use std::process::ExitCode;

use engine::Engine;
use figures::Figures;
use report::Machine;
use server::Server;
use tokio::signal::unix::{SignalKind, signal};

/// The name of the server's instance. Two benches at once would end each other's containers.
const INSTANCE: &str = "bench";
/// What sessions are made from …
const TEMPLATE: &str = "python";
/// … and its image.
const IMAGE: &str = "cellblock/python:latest";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[tokio::main]
async fn main() -> ExitCode {
    match until_signal(bench()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A signal drops the bench, which removes what it has made.
async fn until_signal(bench: impl Future<Output = Result<()>>) -> Result<()> {
    let (mut interrupted, mut terminated) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        done = bench => done,
        _ = interrupted.recv() => Err("interrupted".into()),
        _ = terminated.recv() => Err("terminated".into()),
    }
}

async fn bench() -> Result<()> {
    // Dropped in the reverse order: first the server, then what it has left on the engine.
    let engine = Engine::connect().await?;
    let server = Server::start("").await?;
    let machine = Machine::observe(&engine.docker).await?;
    let mut figures = Figures::default();
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let is_chosen = |name: &str| chosen.is_empty() || chosen.iter().any(|word| word == name);
    if is_chosen("starts") {
        measure::starts(&engine, &server, &mut figures).await?;
    }
    if is_chosen("executions") {
        measure::executions(&engine, &server, &mut figures).await?;
    }
    if is_chosen("commands") {
        measure::commands(&server, &mut figures).await?;
    }
    if is_chosen("boots") {
        measure::boots(&engine, &server, &mut figures).await?;
    }
    if is_chosen("crowd") {
        measure::crowd(&engine, &server, &mut figures).await?;
    }
    if is_chosen("files") {
        files::files(&engine, &server, &mut figures).await?;
    }
    // What follows has servers of its own: a pool takes time from all else, and a crowd needs room.
    server.stop().await?;
    if is_chosen("pool") {
        let server = Server::start(measure::POOL).await?;
        measure::pool(&server, &mut figures).await?;
        server.stop().await?;
    }
    if is_chosen("jupyter") {
        let server = Server::start(jupyter::SETTINGS).await?;
        jupyter::jupyter(&server, &mut figures).await?;
        server.stop().await?;
    }
    if is_chosen("hundreds") {
        let server = Server::start(measure::SMALL).await?;
        measure::hundreds(&server, &mut figures).await?;
        server.stop().await?;
    }
    if is_chosen("far") {
        far::far(&mut figures).await?;
    }
    if is_chosen("stream") {
        measure::stream(&engine, &mut figures).await?;
    }
    if is_chosen("e2b") {
        let server = Server::start(e2b::SETTINGS).await?;
        e2b::e2b(&server, &mut figures).await?;
        server.stop().await?;
    }
    report::tell(&machine, &figures)
}
