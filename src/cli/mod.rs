//! The command line: what it accepts, and every command that needs no control plane of its own. `serve`, `guard`, `run`, `data`, `doctor`
//! and `openapi` are only parsed here; the program's entry performs them.

mod args;
mod client;
mod commands;
mod connect;
mod images;
mod keys;
pub mod mcp;
mod problem;
mod render;
#[cfg(test)]
mod tests;
mod text;
mod waiting;

use std::io::Write as _;

use clap::CommandFactory as _;
use serde_json::json;

pub use args::{
    Cli, CodeSource, Command, ConfigArgs, ConnectArgs, DataCommand, DoctorArgs, ExecArgs, GuardArgs, InstallArgs,
    McpArgs, McpClient, McpCommand, Place, PsArgs, RmArgs, RunArgs, ServeArgs, ServerArgs, SessionsArgs,
};
pub use client::Client;
pub use images::{Blob, Images};
pub use problem::{Failure, Problem, ProblemField};
pub use render::{CANCELLED, CODE_ERROR, FAILED, KILLED, OK, Renderer, TIMED_OUT, exit_code};
pub use text::{escape, size, table};
pub use waiting::while_waiting;

use crate::config::{self, Environment};

/// Performs a command and gives its exit code; `None` for those that need the control plane: `serve`, `guard`, `run`, `data`, `backup`, `doctor`,
/// `openapi`, and `mcp` where no server is named.
pub async fn perform(cli: &Cli, environment: &Environment) -> Option<u8> {
    let done = match &cli.command {
        Command::Serve(_)
        | Command::Guard(_)
        | Command::Run(_)
        | Command::Data(_)
        | Command::Backup(_)
        | Command::Doctor(_)
        | Command::Openapi => {
            return None;
        }
        Command::Ps(args) => commands::ps(args, cli.json, environment).await,
        Command::Exec(args) => commands::exec(args, cli.json, environment).await,
        Command::Rm(args) => commands::rm(args, cli.json, environment).await,
        Command::Pause(args) => commands::pause(args, cli.json, environment).await,
        Command::Resume(args) => commands::resume(args, cli.json, environment).await,
        Command::Images(args) => commands::images(args, cli.json, environment).await,
        Command::Mcp(args) => mcp::perform(args, environment).await?,
        Command::Connect(args) => connect::perform(args, cli.json, environment).await,
        Command::Keys(command) => keys::perform(command, cli.json, environment).await,
        Command::Health(args) => commands::health(args, cli.json, environment).await,
        Command::CheckConfig(args) => check_config(args, cli.json, environment),
        Command::Completions { shell } => completions(*shell),
    };
    Some(done.unwrap_or_else(|failure| complain(&failure)))
}

/// Prints why a command failed and gives the exit code for it. A reader that went away isn't told so.
pub fn complain(failure: &Failure) -> u8 {
    if !matches!(failure, Failure::Print(error) if error.kind() == std::io::ErrorKind::BrokenPipe) {
        eprintln!("cellblock: {failure}");
    }
    FAILED
}

fn check_config(args: &ConfigArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let (text, code) = match (config::load(&args.inputs(environment)), json) {
        (Ok(loaded), false) => (loaded.describe(), OK),
        (Ok(loaded), true) => {
            let value = |v: &config::Effective| json!({"key": v.key, "value": v.value, "source": v.source.to_string()});
            let values: Vec<_> = loaded.values.iter().map(value).collect();
            (format!("{:#}\n", json!({ "values": values })), OK)
        }
        (Err(mistakes), false) => {
            eprintln!("{mistakes}");
            (String::new(), 1)
        }
        (Err(mistakes), true) => {
            let mistake =
                |m: &config::Mistake| json!({"key": m.key, "source": m.source.to_string(), "message": m.message});
            let found: Vec<_> = mistakes.0.iter().map(mistake).collect();
            (format!("{:#}\n", json!({ "mistakes": found })), 1)
        }
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(code)
}

fn completions(shell: clap_complete::Shell) -> Result<u8, Failure> {
    std::io::stdout().write_all(&completion_script(shell))?;
    Ok(OK)
}

/// Written into memory first: the generator panics where it can't write.
fn completion_script(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "cellblock", &mut script);
    script
}
