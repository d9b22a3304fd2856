//! The program: reads the command line and the environment, and starts what was asked for.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use cellblock::cli::{self, Cli, Command};
use cellblock::config::{self, Config, Environment, Inputs, Log, LogFormat};
use cellblock::doctor::{self, verdict::Verdict};
use cellblock::{app, http, run, task};

/// The exit status for a configuration with mistakes.
const BAD_CONFIG: u8 = 1;

#[tokio::main]
async fn main() -> ExitCode {
    let environment = Environment::capture();
    let cli = Cli::parse();
    if let Some(code) = cli::perform(&cli, &environment).await {
        return code.into();
    }
    let code = match &cli.command {
        Command::Serve(args) => match load(&args.inputs(&environment)) {
            Ok(config) => serve(&config).await,
            Err(code) => code,
        },
        Command::Run(args) => match load(&args.config.inputs(&environment)) {
            Ok(config) => run_once(args, cli.json, config).await,
            Err(code) => code,
        },
        Command::Backup(args) => match load(&args.inputs(&environment)) {
            Ok(config) => backup(&config, &args.to),
            Err(code) => code,
        },
        Command::Doctor(args) => match load(&args.inputs(&environment)) {
            Ok(config) => doctor::run(&config, cli.json).await,
            Err(_) => Verdict::Broken.exit_status(),
        },
        Command::Openapi => openapi(),
        // `perform` did these.
        _ => cli::FAILED,
    };
    code.into()
}

fn load(inputs: &Inputs) -> Result<Config, u8> {
    config::load(inputs).map(|loaded| loaded.config).map_err(|mistakes| {
        eprintln!("{mistakes}");
        BAD_CONFIG
    })
}

async fn serve(config: &Config) -> u8 {
    if let Err(error) = start_log(&config.log) {
        eprintln!("cellblock: {error}");
        return BAD_CONFIG;
    }
    let stop = app::Stop::default();
    listen_to_signals(stop.clone());
    let ready = |address| {
        tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), "listening; GET /docs shows the API");
    };
    match app::serve(config, stop, ready).await {
        Ok(()) => cli::OK,
        Err(error) => {
            eprintln!("cellblock: {error}");
            cli::FAILED
        }
    }
}

async fn run_once(args: &cli::RunArgs, json: bool, config: Config) -> u8 {
    match run::run(args, json, config).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cellblock: {error}");
            cli::FAILED
        }
    }
}

fn backup(config: &Config, to: &Path) -> u8 {
    match app::backup(config, to) {
        Ok(()) => cli::OK,
        Err(error) => {
            eprintln!("cellblock: {error}");
            cli::FAILED
        }
    }
}

fn openapi() -> u8 {
    match http::docs::document().to_pretty_json() {
        Ok(document) => {
            println!("{document}");
            cli::OK
        }
        Err(error) => {
            eprintln!("cellblock: the document can't be written: {error}");
            cli::FAILED
        }
    }
}

/// The first signal asks for an orderly end, which from a terminal is quick; the second one ends at once.
fn listen_to_signals(stop: app::Stop) {
    task::spawn("signals", async move {
        let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
            tracing::error!("signals can't be received; stop the server with SIGKILL");
            return;
        };
        for last in [false, true] {
            let from_terminal = tokio::select! {
                _ = term.recv() => false,
                _ = int.recv() => true,
            };
            if last {
                std::process::exit(i32::from(cli::CANCELLED));
            }
            tracing::info!("stopping; a second signal stops at once");
            if from_terminal { stop.at_once() } else { stop.gently() }
        }
    });
}

fn start_log(log: &Log) -> Result<(), String> {
    let filter = EnvFilter::try_new(&log.level).map_err(|e| format!("log.level is not understood: {e}"))?;
    let to_terminal = std::io::stderr().is_terminal();
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(to_terminal).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    Ok(())
}
