//! What the command line accepts, as clap reads it. It does nothing with it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Environment, Inputs};
use crate::connect::CLIENTS;
use crate::domain::ids::SessionId;

const EXAMPLES: &str = "\
Examples:
  cellblock serve                                 start the server on 127.0.0.1:8080
  cellblock exec --new --rm -c 'print(6 * 7)'     run code in a session of its own
  cellblock exec chat-42 analysis.py --out plots  run a file in a live session, save its images
  cellblock run -c 'import sys; sys.version'      the same without a server
  cellblock ps --label run=42                     list sessions
  cellblock data import ./maps maps               put data where templates can name it
  cellblock check-config --config cellblock.toml  find the mistakes in a configuration

Exit codes of exec and run:
  0 the code ended well    1 it raised an error     124 its time limit was reached
  130 it was cancelled     137 its kernel died or ran out of memory
  125 Cellblock refused or failed";

/// Runs untrusted code, each session in its own locked container with a real Jupyter kernel.
#[derive(Debug, Parser)]
#[command(name = "cellblock", version, after_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    /// Print JSON, for programs.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start the server.
    Serve(ServeArgs),
    /// Hold the engine for a server that does not: its engine.host is then guard:// and this one's socket.
    Guard(GuardArgs),
    /// List sessions.
    Ps(PsArgs),
    /// Run code in a session and show its output as it comes.
    Exec(ExecArgs),
    /// End sessions.
    Rm(RmArgs),
    /// Freeze sessions in which nothing runs; what is asked of them next resumes them.
    Pause(SessionsArgs),
    /// Resume paused sessions.
    Resume(SessionsArgs),
    /// List templates with their images.
    Images(ServerArgs),
    /// Make, list and revoke API keys; needs a key of scope admin.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Run code once, in a container that is thrown away; needs Docker but no server.
    Run(RunArgs),
    /// Serve a client of the Model Context Protocol on standard input and output, or set one up; without a server it needs Docker.
    Mcp(McpArgs),
    /// Show what to paste into clients of a server (curl, Python, JavaScript, E2B, Jupyter, MCP, Open WebUI), with its address and the key.
    Connect(ConnectArgs),
    /// Check the configuration; print every value and where it came from, or every mistake.
    CheckConfig(ConfigArgs),
    /// Try whether this host does what the configuration relies on; needs no server, and disturbs none.
    Doctor(DoctorArgs),
    /// Put folders of data onto the engine, for templates to give to their sessions, read-only.
    #[command(subcommand)]
    Data(DataCommand),
    /// Copy the database of sessions, while a server works with it or not.
    Backup(BackupArgs),
    /// Print the OpenAPI document.
    Openapi,
    /// Print a completion script for a shell, to be sourced by it.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Ask a server whether it is ready: exit code 0 or 1.
    Health(ServerArgs),
}

/// Where the configuration comes from.
#[derive(Debug, Clone, Default, Args)]
pub struct ConfigArgs {
    /// Read this file instead of /etc/cellblock/config.toml and ./cellblock.toml; may be repeated, later ones win.
    #[arg(long = "config", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Set one key, such as limits.sessions=20; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
}

impl ConfigArgs {
    /// The inputs of [`config::load`].
    #[must_use]
    pub fn inputs(&self, environment: &Environment) -> Inputs {
        let inputs = Inputs { files: self.files.clone(), ..Inputs::usual(environment.clone()) };
        self.set.iter().fold(inputs, |inputs, (key, value)| inputs.with("--set", key, value))
    }
}

/// Start the server.
#[derive(Debug, Clone, Default, Args)]
pub struct ServeArgs {
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Address and port to listen on; the key server.listen.
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,
    /// Folder of the database and the generated API key; the key server.data_dir.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
}

impl ServeArgs {
    /// The inputs of [`config::load`].
    #[must_use]
    pub fn inputs(&self, environment: &Environment) -> Inputs {
        let dedicated =
            [("--listen", "server.listen", &self.listen), ("--data-dir", "server.data_dir", &self.data_dir)];
        dedicated.into_iter().fold(self.config.inputs(environment), |inputs, (flag, key, value)| match value {
            Some(value) => inputs.with(flag, key, value),
            None => inputs,
        })
    }
}

/// Hold the engine for a server.
#[derive(Debug, Clone, Default, Args)]
pub struct GuardArgs {
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Path of the socket to listen on; the key guard.socket.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
    /// Ask the guard that listens there whether it and its engine answer: exit code 0 or 125.
    #[arg(long)]
    pub check: bool,
}

impl GuardArgs {
    /// The inputs of [`config::load`].
    #[must_use]
    pub fn inputs(&self, environment: &Environment) -> Inputs {
        let inputs = self.config.inputs(environment);
        match &self.socket {
            Some(socket) => inputs.with("--socket", "guard.socket", socket),
            None => inputs,
        }
    }
}

/// Copy the database of sessions.
#[derive(Debug, Clone, Args)]
pub struct BackupArgs {
    /// Where the copy goes; nothing may be there yet. It holds environments of sessions and what opens their containers: keep it as private as the
    /// data folder.
    #[arg(value_name = "FILE")]
    pub to: PathBuf,
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The server's data folder; the key server.data_dir.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
}

impl BackupArgs {
    /// The inputs of [`config::load`].
    #[must_use]
    pub fn inputs(&self, environment: &Environment) -> Inputs {
        with_data_dir(self.config.inputs(environment), self.data_dir.as_deref())
    }
}

fn with_data_dir(inputs: Inputs, folder: Option<&str>) -> Inputs {
    match folder {
        Some(folder) => inputs.with("--data-dir", "server.data_dir", folder),
        None => inputs,
    }
}

/// What to do with data. It is done on the engine itself, where a guard's configuration is if there is one.
#[derive(Debug, Clone, Subcommand)]
pub enum DataCommand {
    /// Copy a folder onto the engine. Sessions that start later find it; those that have an earlier content of the name keep that.
    Import(DataImportArgs),
    /// List the data on the engine.
    List(ConfigArgs),
    /// Take data away. Sessions that have it keep it.
    Remove(DataRemoveArgs),
}

/// Copy a folder onto the engine.
#[derive(Debug, Clone, Args)]
pub struct DataImportArgs {
    /// The folder. Links in it must not lead out of it, and there must be no devices, sockets or pipes.
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// What templates name it by: 1 to 40 of a-z, 0-9 and "-".
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Take data away.
#[derive(Debug, Clone, Args)]
pub struct DataRemoveArgs {
    /// Its name.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Try this host.
#[derive(Debug, Clone, Default, Args)]
#[command(
    after_help = "Exit codes: 0 all is well, 1 something is weak, 2 something is broken, or the configuration has a mistake"
)]
pub struct DoctorArgs {
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// The server's data folder; the key server.data_dir.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
}

impl DoctorArgs {
    /// The inputs of [`config::load`].
    #[must_use]
    pub fn inputs(&self, environment: &Environment) -> Inputs {
        with_data_dir(self.config.inputs(environment), self.data_dir.as_deref())
    }
}

/// Which server to talk to, and as whom.
#[derive(Debug, Clone, Default, Args)]
pub struct ServerArgs {
    /// The server's URL. Default: CELLBLOCK_URL, else the configured address, else http://127.0.0.1:8080.
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// The API key. Default: CELLBLOCK_API_KEY. Other users of this machine can see it among the processes.
    #[arg(long, value_name = "KEY", conflicts_with = "key_file")]
    pub key: Option<String>,
    /// A file with the API key. Default: CELLBLOCK_API_KEY_FILE, else the local server's own.
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// List sessions.
#[derive(Debug, Clone, Args)]
pub struct PsArgs {
    /// Ended sessions too, as long as the server remembers them.
    #[arg(short, long)]
    pub all: bool,
    /// Only sessions with this label; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub labels: Vec<(String, String)>,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// End sessions.
#[derive(Debug, Clone, Args)]
pub struct RmArgs {
    /// Ids or names.
    #[arg(value_name = "SESSION", required_unless_present = "all", conflicts_with = "all")]
    pub sessions: Vec<String>,
    /// Every live session, or every one with the given labels.
    #[arg(long)]
    pub all: bool,
    /// With --all: only sessions with this label; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair, requires = "all", conflicts_with = "sessions")]
    pub labels: Vec<(String, String)>,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Some sessions.
#[derive(Debug, Clone, Args)]
pub struct SessionsArgs {
    /// Ids or names.
    #[arg(value_name = "SESSION", required = true)]
    pub sessions: Vec<String>,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// What to do with API keys.
#[derive(Debug, Clone, Subcommand)]
pub enum KeysCommand {
    /// Make a key and print it: it is shown this once.
    Create(CreateKeyArgs),
    /// List keys, of all tenants.
    List(ListKeysArgs),
    /// Revoke keys: no request with them is accepted any more.
    Revoke(RevokeKeysArgs),
}

/// Make a key.
#[derive(Debug, Clone, Args)]
pub struct CreateKeyArgs {
    /// A name for people.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Whose it is to be; the tenant of the key that asks without it.
    #[arg(long, value_name = "TENANT")]
    pub tenant: Option<String>,
    /// What it is to allow: sessions, read or admin; may be repeated.
    #[arg(long = "scope", value_name = "SCOPE", value_parser = ["sessions", "read", "admin"], default_value = "sessions")]
    pub scopes: Vec<String>,
    /// Allow this template only; may be repeated.
    #[arg(long = "template", value_name = "NAME")]
    pub templates: Vec<String>,
    /// It is not valid any more after this long, such as 12h or 90d.
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub expires: Option<Duration>,
    /// Write it as clients of E2B want it, with "e2b_" before the same digits. It is the same key, for all doors.
    #[arg(long)]
    pub e2b: bool,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// List keys.
#[derive(Debug, Clone, Args)]
pub struct ListKeysArgs {
    /// Only this tenant's.
    #[arg(long, value_name = "TENANT")]
    pub tenant: Option<String>,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Revoke keys.
#[derive(Debug, Clone, Args)]
pub struct RevokeKeysArgs {
    /// Ids.
    #[arg(value_name = "ID", required = true)]
    pub ids: Vec<String>,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Run code in a session.
#[derive(Debug, Clone, Args)]
#[command(after_help = "SESSION is an id or a name. FILE may be - for standard input.\n\
    With --new there is no SESSION: cellblock exec --new script.py")]
pub struct ExecArgs {
    /// The session, unless --new makes one; then a file with code, unless -c gives it.
    #[arg(value_name = "SESSION|FILE", num_args = 0..=2)]
    pub places: Vec<String>,
    /// The code itself.
    #[arg(short = 'c', long = "code", value_name = "CODE")]
    pub code: Option<String>,
    /// Make a session for it, and say its id.
    #[arg(long)]
    pub new: bool,
    /// End the session afterwards.
    #[arg(long)]
    pub rm: bool,
    /// The new session's template.
    #[arg(long, value_name = "NAME", requires = "new")]
    pub template: Option<String>,
    /// Time limit of the code, such as 30, 30s or 5m.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// Save images here.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Run code once.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// A file with code; - is standard input.
    #[arg(value_name = "FILE", required_unless_present = "code", conflicts_with = "code")]
    pub file: Option<PathBuf>,
    /// The code itself.
    #[arg(short = 'c', long = "code", value_name = "CODE")]
    pub code: Option<String>,
    /// The template; the configuration's default without it.
    #[arg(long, value_name = "NAME")]
    pub template: Option<String>,
    /// Time limit of the code, such as 30, 30s or 5m.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// Memory in MiB, files included.
    #[arg(long, value_name = "MIB")]
    pub memory_mb: Option<u64>,
    /// Set for the code's process; may be repeated.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    pub env: Vec<(String, String)>,
    /// Save images here.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Configuration.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// Show what clients need.
#[derive(Debug, Clone, Default, Args)]
#[command(after_help = "Examples:\n  eval \"$(cellblock connect env)\"\n  cellblock connect curl | bash\n\n\
    A key that is given by --key or CELLBLOCK_API_KEY is printed; one in a file stays there, and the shell reads it.")]
pub struct ConnectArgs {
    /// Only this client's file, as it stands; "env" is the lines that set the variables it reads. Everything without it.
    #[arg(value_parser = clients())]
    pub client: Option<String>,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
}

fn clients() -> clap::builder::PossibleValuesParser {
    std::iter::once(super::connect::VARIABLES)
        .chain(CLIENTS.iter().map(|client| client.word))
        .collect::<Vec<_>>()
        .into()
}

/// Serve clients of the Model Context Protocol.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct McpArgs {
    /// What else to do.
    #[command(subcommand)]
    pub command: Option<McpCommand>,
    /// Serve the client that has started this program. The server is --url or CELLBLOCK_URL; without either, one lives in this program.
    #[arg(long)]
    pub stdio: bool,
    /// The server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Configuration, where no server is named.
    #[command(flatten)]
    pub config: ConfigArgs,
}

/// What to do for clients.
#[derive(Debug, Clone, Subcommand)]
pub enum McpCommand {
    /// Show what a client's configuration needs; --yes writes it.
    Install(InstallArgs),
}

/// Set a client up.
#[derive(Debug, Clone, Args)]
pub struct InstallArgs {
    /// The client.
    #[arg(value_enum)]
    pub client: McpClient,
    /// Write it into the client's file, beside what is there.
    #[arg(long)]
    pub yes: bool,
    /// The client's file, if it is not where it usually is.
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// The server that the client is to use; without a URL, the program without a server.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Clients that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum McpClient {
    /// Claude's application.
    ClaudeDesktop,
    /// Claude Code, in this project.
    ClaudeCode,
    /// Cursor.
    Cursor,
    /// Visual Studio Code, in this folder.
    Vscode,
    /// Windsurf.
    Windsurf,
}

/// The session that code runs in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// One that is made for it.
    New,
    /// A live one.
    Id(SessionId),
    /// A live one, by its name.
    Name(String),
}

/// Where code comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CodeSource {
    /// The command line.
    Text(String),
    /// Standard input.
    Stdin,
    /// A file.
    File(PathBuf),
}

impl CodeSource {
    fn of_file(path: PathBuf) -> Self {
        if path.as_os_str() == "-" { Self::Stdin } else { Self::File(path) }
    }

    /// Reads the code.
    ///
    /// # Errors
    /// The file can't be read, or isn't UTF-8.
    pub fn read(&self) -> Result<String, String> {
        match self {
            Self::Text(code) => Ok(code.clone()),
            Self::Stdin => std::io::read_to_string(std::io::stdin())
                .map_err(|error| format!("can't read code from standard input: {error}")),
            Self::File(path) => std::fs::read_to_string(path)
                .map_err(|error| format!("can't read code from {}: {error}", path.display())),
        }
    }
}

impl Place {
    /// A session as people name it.
    #[must_use]
    pub fn of(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Id)
    }
}

impl ExecArgs {
    /// Tells session and code apart.
    ///
    /// # Errors
    /// A sentence about what is missing or too much.
    pub fn target(&self) -> Result<(Place, CodeSource), String> {
        let (place, rest) = match (self.new, self.places.split_first()) {
            (true, _) => (Place::New, self.places.as_slice()),
            (false, Some((session, rest))) => (Place::of(session), rest),
            (false, None) => return Err("name a session, or make one with --new".to_owned()),
        };
        let code = match (&self.code, rest) {
            (Some(code), []) => CodeSource::Text(code.clone()),
            (None, [file]) => CodeSource::of_file(file.into()),
            (None, []) => return Err("give code: -c CODE, a file, or - for standard input".to_owned()),
            (_, [.., last]) => return Err(format!("{last:?} is one too many: code comes from one place")),
        };
        Ok((place, code))
    }
}

impl RunArgs {
    /// Where the code comes from; clap has seen to it that there is exactly one place.
    #[must_use]
    pub fn source(&self) -> CodeSource {
        match (&self.code, &self.file) {
            (Some(code), _) => CodeSource::Text(code.clone()),
            (None, Some(file)) => CodeSource::of_file(file.clone()),
            (None, None) => CodeSource::Stdin,
        }
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not of the form KEY=VALUE")),
    }
}

/// Seconds, or a duration with its unit.
fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let time = number.map_or_else(|| config::parse_duration(text), Ok)?;
    if time.is_zero() { Err("must be longer than zero".to_owned()) } else { Ok(time) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn exec(line: &str) -> Result<(Place, CodeSource), String> {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Exec(args) = cli.command else { panic!("not exec") };
        args.target()
    }

    #[test]
    fn the_definition_is_sound_and_every_command_has_help() {
        let mut command = Cli::command();
        command.clone().debug_assert();
        assert!(command.render_long_help().to_string().contains("Exit codes"));
        assert!(command.get_subcommands().all(|sub| sub.get_about().is_some()));
    }

    #[test]
    fn exec_tells_sessions_from_files() {
        let text = |code: &str| CodeSource::Text(code.to_owned());
        assert_eq!(exec("cellblock exec chat -c 1"), Ok((Place::Name("chat".to_owned()), text("1"))));
        assert_eq!(exec("cellblock exec --new -c 1"), Ok((Place::New, text("1"))));
        assert_eq!(exec("cellblock exec --new a.py"), Ok((Place::New, CodeSource::File("a.py".into()))));
        assert_eq!(exec("cellblock exec chat -"), Ok((Place::Name("chat".to_owned()), CodeSource::Stdin)));
        let id = SessionId::from_uuid(uuid::Uuid::nil());
        assert_eq!(exec(&format!("cellblock exec {id} a.py")).unwrap().0, Place::Id(id));
        assert!(exec("cellblock exec -c 1").unwrap_err().contains("--new"));
        assert!(exec("cellblock exec chat").unwrap_err().contains("give code"));
        assert!(exec("cellblock exec --new a.py b.py").unwrap_err().contains("one too many"));
        assert!(exec("cellblock exec chat a.py -c 1").unwrap_err().contains("one too many"));
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "cellblock rm",
            "cellblock pause",
            "cellblock resume",
            "cellblock keys",
            "cellblock keys create",
            "cellblock keys create ci --scope root",
            "cellblock keys revoke",
            "cellblock rm chat --all",
            "cellblock rm chat --label a=b",
            "cellblock rm --label a=b",
            "cellblock exec chat -c 1 --template x",
            "cellblock exec chat -c 1 --timeout 0",
            "cellblock exec chat -c 1 --timeout -5",
            "cellblock exec chat -c 1 --key a --key-file b",
            "cellblock run",
            "cellblock run a.py -c 1",
            "cellblock run -c 1 --env NAME",
            "cellblock serve --set limits",
        ] {
            assert!(Cli::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
    }

    #[test]
    fn timeouts_are_seconds_or_have_a_unit() {
        assert_eq!(seconds("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(seconds("5m"), Ok(Duration::from_secs(300)));
        assert!(seconds("soon").is_err());
    }

    #[test]
    fn flags_of_serve_win_and_are_named_in_mistakes() {
        let cli = Cli::try_parse_from(["cellblock", "serve", "--set", "server.listen=127.0.0.1:1", "--listen", "here"]);
        let Command::Serve(args) = cli.unwrap().command else { panic!("not serve") };
        let environment: Environment = [("HOME", "/home/ada"), ("CELLBLOCK_CONFIG", "/dev/null")].into_iter().collect();
        let found = config::load(&args.inputs(&environment)).unwrap_err().0;
        assert_eq!((found.len(), found[0].source.to_string().as_str()), (1, "--listen"));
    }
}
