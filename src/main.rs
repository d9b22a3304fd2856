//! The program: reads the command line and the environment, and starts what was asked for.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tracing_subscriber::EnvFilter;

use cellblock::app::StartError;
use cellblock::app::data::{self as data_volumes, DataError};
use cellblock::cli::{self, Cli, Command, DataCommand};
use cellblock::config::{self, Config, Environment, Inputs, Loaded, Log, LogFormat};
use cellblock::doctor::{self, verdict::Verdict};
use cellblock::service::log::LogLevel;
use cellblock::{app, http, run, task};

/// The exit status for a configuration with mistakes.
const BAD_CONFIG: u8 = 1;

fn main() -> ExitCode {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().max_blocking_threads(task::BLOCKING_THREADS).build();
    match runtime {
        Ok(runtime) => runtime.block_on(perform()),
        Err(error) => {
            eprintln!("cellblock: threads can't be started: {error}");
            cli::FAILED.into()
        }
    }
}

async fn perform() -> ExitCode {
    let environment = Environment::capture();
    let cli = Cli::parse();
    if let Some(code) = cli::perform(&cli, &environment).await {
        return match &cli.command {
            Command::CheckConfig(args) if code == cli::OK => look_for_data(&args.inputs(&environment)).await,
            _ => code,
        }
        .into();
    }
    let code = match &cli.command {
        Command::Serve(args) => {
            let inputs = args.inputs(&environment);
            match read(&inputs) {
                Ok(loaded) => serve(inputs, loaded).await,
                Err(code) => code,
            }
        }
        Command::Guard(args) => {
            let inputs = args.inputs(&environment);
            match read(&inputs) {
                Ok(loaded) => guard(inputs, loaded, args.check).await,
                Err(code) => code,
            }
        }
        Command::Run(args) => match load(&args.config.inputs(&environment)) {
            Ok(config) => run_once(args, cli.json, config).await,
            Err(code) => code,
        },
        Command::Data(command) => {
            let args = match command {
                DataCommand::Import(args) => &args.config,
                DataCommand::List(args) => args,
                DataCommand::Remove(args) => &args.config,
            };
            match load(&args.inputs(&environment)) {
                Ok(config) => data(command, cli.json, &config).await,
                Err(code) => code,
            }
        }
        Command::Mcp(args) => match load(&args.config.inputs(&environment)) {
            Ok(config) => serve_mcp(config).await,
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
    read(inputs).map(|loaded| loaded.config)
}

fn read(inputs: &Inputs) -> Result<Loaded, u8> {
    config::load(inputs).map_err(|mistakes| {
        eprintln!("{mistakes}");
        BAD_CONFIG
    })
}

async fn serve(inputs: Inputs, loaded: Loaded) -> u8 {
    let config = loaded.config.clone();
    let log = match start_log(&config.log) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("cellblock: {error}");
            return BAD_CONFIG;
        }
    };
    let process = app::Process { log: Some(log), read: Some((inputs, loaded)), ..app::Process::default() };
    listen_to_signals(process.stop.clone());
    listen_to_hangups(Arc::clone(&process.reload));
    let ready = |address| {
        tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), "listening; GET /docs shows the API");
    };
    exit_code(app::serve(&config, process, ready).await)
}

async fn guard(inputs: Inputs, loaded: Loaded, check: bool) -> u8 {
    let config = loaded.config.clone();
    if check {
        return exit_code(app::check_guard(&config).await);
    }
    if let Err(error) = start_log(&config.log) {
        eprintln!("cellblock: {error}");
        return BAD_CONFIG;
    }
    let process = app::Process { read: Some((inputs, loaded)), ..app::Process::default() };
    listen_to_signals(process.stop.clone());
    listen_to_hangups(Arc::clone(&process.reload));
    let ready = |socket: &Path| {
        let (socket, instance) = (socket.display(), &config.engine.instance);
        tracing::info!(%socket, instance, version = env!("CARGO_PKG_VERSION"), "guarding the engine");
    };
    exit_code(app::guard(&config, process, ready).await)
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

/// Does not come back: a read of standard input that nobody ends would hold the program.
async fn serve_mcp(config: Config) -> u8 {
    let code = run::serve_mcp(config).await.unwrap_or_else(|error| {
        eprintln!("cellblock: {error}");
        cli::FAILED
    });
    std::process::exit(i32::from(code))
}

fn backup(config: &Config, to: &Path) -> u8 {
    exit_code(app::backup(config, to))
}

/// What is named by templates and missing on the engine is a mistake of a configuration too, where the engine can be asked.
async fn look_for_data(inputs: &Inputs) -> u8 {
    let Ok(config) = load(inputs) else { return BAD_CONFIG };
    match data_volumes::check(&config).await {
        Ok(()) => cli::OK,
        Err(error @ StartError::NoData { .. }) => {
            eprintln!("{error}");
            BAD_CONFIG
        }
        Err(error) => {
            eprintln!("cellblock: whether the data of templates is there was not looked for: {error}");
            cli::OK
        }
    }
}

async fn data(command: &DataCommand, json: bool, config: &Config) -> u8 {
    let done = match command {
        DataCommand::Import(args) => import_data(&args.folder, &args.name, json, config).await,
        DataCommand::List(_) => list_data(json, config).await,
        DataCommand::Remove(args) => remove_data(&args.name, config).await,
    };
    match done {
        Ok(text) => {
            print!("{text}");
            cli::OK
        }
        Err(error) => {
            eprintln!("cellblock: {error}");
            cli::FAILED
        }
    }
}

async fn import_data(folder: &Path, name: &str, json: bool, config: &Config) -> Result<String, DataError> {
    let done = data_volumes::import(config, folder, name).await?;
    let (files, bytes) = (done.packed.files, done.packed.bytes);
    if json {
        let told = serde_json::json!({ "files": files, "bytes": bytes, "volume": done.volume });
        return Ok(format!("{told:#}\n"));
    }
    Ok(format!("{name}: {files} files, {}; version {}\n", cli::size(bytes), done.volume.version))
}

async fn list_data(json: bool, config: &Config) -> Result<String, DataError> {
    let all = data_volumes::list(config).await?;
    if json {
        return Ok(format!("{:#}\n", serde_json::json!(all)));
    }
    let rows: Vec<_> = all.into_iter().map(|v| vec![v.name, cli::size(v.bytes), v.version, v.sha256]).collect();
    Ok(cli::table(&["NAME", "SIZE", "VERSION", "SHA256"], &rows))
}

async fn remove_data(name: &str, config: &Config) -> Result<String, DataError> {
    let templates = data_volumes::remove(config, name).await?;
    if !templates.is_empty() {
        eprintln!(
            "cellblock: sessions of these templates do not start any more, as they name it: {}",
            templates.join(", ")
        );
    }
    Ok(format!("{name}\n"))
}

fn exit_code(outcome: Result<(), app::StartError>) -> u8 {
    match outcome {
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

/// SIGHUP has the configuration read again.
fn listen_to_hangups(reload: Arc<Notify>) {
    task::spawn("hangups", async move {
        let Ok(mut hangup) = signal(SignalKind::hangup()) else {
            tracing::error!("SIGHUP can't be received; POST /v1/admin/reload does the same");
            return;
        };
        while hangup.recv().await.is_some() {
            reload.notify_one();
        }
    });
}

/// Begins to write the log, and says how its level is changed.
fn start_log(log: &Log) -> Result<LogLevel, String> {
    let to_terminal = std::io::stderr().is_terminal();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter(&log.level)?)
        .with_ansi(to_terminal)
        .with_writer(std::io::stderr);
    // Each form of line has a handle of its own type.
    match log.format {
        LogFormat::Text => {
            let subscriber = subscriber.with_filter_reloading();
            let handle = subscriber.reload_handle();
            subscriber.init();
            Ok(LogLevel::new(log.level.clone(), move |level| handle.reload(filter(level)?).map_err(|e| e.to_string())))
        }
        LogFormat::Json => {
            let subscriber = subscriber.json().flatten_event(true).with_filter_reloading();
            let handle = subscriber.reload_handle();
            subscriber.init();
            Ok(LogLevel::new(log.level.clone(), move |level| handle.reload(filter(level)?).map_err(|e| e.to_string())))
        }
    }
}

fn filter(level: &str) -> Result<EnvFilter, String> {
    config::check_log_level(level)?;
    // That crate tells whole messages, with the code in them. What there is to tell of one stands in the line of its request.
    EnvFilter::try_new(format!("{level},rmcp=off")).map_err(|e| format!("{level:?} is not understood: {e}"))
}
