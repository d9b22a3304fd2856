//! `cellblock mcp install`: the entry that a client's configuration needs. It is shown; the file is changed only when that was said.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::cli::args::{InstallArgs, McpClient};
use crate::cli::problem::Failure;
use crate::cli::render::OK;
use crate::config::Environment;

/// The name of the entry.
const NAME: &str = "cellblock";
/// Stands for the key where it is shown.
const HIDDEN: &str = "…";
/// The variable that clients read the key from.
const VARIABLE: &str = "CELLBLOCK_API_KEY";
/// What Visual Studio Code asks for by, and keeps in its own store.
const INPUT: &str = "cellblock-api-key";

/// How a client comes to the key.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    /// There is none.
    Unknown,
    /// It stands in the file.
    Written(String),
    /// The file says where it is, in the client's words: it may be one of a project, which others read.
    Referred(&'static str),
}

impl Key {
    /// As it stands in the file.
    fn text(&self) -> Option<&str> {
        match self {
            Self::Unknown => None,
            Self::Written(key) => Some(key),
            Self::Referred(words) => Some(words),
        }
    }

    /// As it is shown.
    fn hidden(&self) -> Self {
        match self {
            Self::Written(_) => Self::Written(HIDDEN.to_owned()),
            other => other.clone(),
        }
    }

    /// What there is to say of it.
    fn told(&self, client: McpClient) -> String {
        match (self, client) {
            (Self::Unknown, _) => String::new(),
            (Self::Written(_), _) => {
                format!("\"{HIDDEN}\" stands for the key, which will be in the file: keep it to yourself.\n")
            }
            (Self::Referred(_), McpClient::Vscode) => {
                "No key is in the file: Visual Studio Code asks for it once and keeps it in its own store.\n".to_owned()
            }
            (Self::Referred(words), _) => {
                format!(
                    "No key is in the file: \"{words}\" is read from the client's environment, so set {VARIABLE} where it is started.\n"
                )
            }
        }
    }
}

/// Shows what a client needs, and writes it if that was said.
///
/// # Errors
/// The file can't be read as what it is to be, or not be written.
pub(super) fn perform(args: &InstallArgs, environment: &Environment) -> Result<u8, Failure> {
    let path = match &args.file {
        Some(path) => path.clone(),
        None => usual_path(args.client, environment)?,
    };
    let url = args.server.url.clone().or_else(|| environment.get("CELLBLOCK_URL").map(str::to_owned));
    let key = match (&url, reference(args.client, args.file.is_some())) {
        // Without a server there is no key.
        (None, _) => Key::Unknown,
        (Some(_), Some(words)) => Key::Referred(words),
        (Some(_), None) => given_key(args, environment)?.map_or(Key::Unknown, Key::Written),
    };
    let program = std::env::current_exe()?.display().to_string();
    let entry = |key: &Key| entry(args.client, &program, url.as_deref(), key.text());
    let mut shown = json!({ root(args.client): { NAME: entry(&key.hidden()) } });
    let asks = args.client == McpClient::Vscode && matches!(key, Key::Referred(_));
    if asks {
        shown["inputs"] = json!([input()]);
    }
    let mut out = std::io::stdout();
    write!(out, "{}:\n{shown:#}\n{}", path.display(), key.told(args.client))?;
    if !args.yes {
        writeln!(out, "Nothing was written; --yes adds this to the file.")?;
        return Ok(OK);
    }
    let before = if path.exists() { read(&path)? } else { "{}".to_owned() };
    let after = with_entry(&before, root(args.client), entry(&key), asks)
        .map_err(|why| Failure::Usage(format!("{} is left as it is: {why}", path.display())))?;
    write(&path, &after)?;
    writeln!(out, "It was written; start the client again.")?;
    Ok(OK)
}

/// The words by which a client reads the key from elsewhere, if it can and its file may be a project's, which others see: those that always are, and any that
/// `is_named` on the command line. A person's own file, whose client is often started where no shell has set anything, has the key.
fn reference(client: McpClient, is_named: bool) -> Option<&'static str> {
    match client {
        McpClient::ClaudeCode => Some("${CELLBLOCK_API_KEY}"),
        McpClient::Vscode => Some("${input:cellblock-api-key}"),
        McpClient::Cursor | McpClient::Windsurf if is_named => Some("${env:CELLBLOCK_API_KEY}"),
        McpClient::Cursor | McpClient::Windsurf | McpClient::ClaudeDesktop => None,
    }
}

fn given_key(args: &InstallArgs, environment: &Environment) -> Result<Option<String>, Failure> {
    Ok(match (&args.server.key, &args.server.key_file) {
        (Some(key), _) => Some(key.trim().to_owned()),
        (None, Some(file)) => Some(read(file)?.trim().to_owned()),
        (None, None) => environment.get(VARIABLE).map(str::to_owned),
    })
}

/// What Visual Studio Code asks a person for.
fn input() -> Value {
    json!({"type": "promptString", "id": INPUT, "description": "API key of Cellblock", "password": true})
}

/// Where the client looks.
fn usual_path(client: McpClient, environment: &Environment) -> Result<PathBuf, Failure> {
    let home = || {
        let home = environment.get("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        home.ok_or_else(|| Failure::Usage("HOME is not set; name the client's file with --file".to_owned()))
    };
    Ok(match client {
        McpClient::ClaudeDesktop if cfg!(target_os = "macos") => {
            home()?.join("Library/Application Support/Claude/claude_desktop_config.json")
        }
        McpClient::ClaudeDesktop => home()?.join(".config/Claude/claude_desktop_config.json"),
        McpClient::Cursor => home()?.join(".cursor/mcp.json"),
        McpClient::Windsurf => home()?.join(".codeium/windsurf/mcp_config.json"),
        // These belong to the project that one is in.
        McpClient::ClaudeCode => ".mcp.json".into(),
        McpClient::Vscode => ".vscode/mcp.json".into(),
    })
}

/// The object of the file that has a client's servers.
fn root(client: McpClient) -> &'static str {
    match client {
        McpClient::Vscode => "servers",
        _ => "mcpServers",
    }
}

/// What the client is told: the server's address where it speaks HTTP, otherwise this program.
fn entry(client: McpClient, program: &str, url: Option<&str>, key: Option<&str>) -> Value {
    let Some(url) = url else {
        return json!({"command": program, "args": ["mcp", "--stdio"]});
    };
    let address = format!("{}/mcp", url.trim_end_matches('/'));
    let headers = key.map(|key| json!({"Authorization": format!("Bearer {key}")}));
    let mut entry = match client {
        McpClient::ClaudeDesktop => json!({"command": program, "args": ["mcp", "--stdio", "--url", url]}),
        McpClient::Cursor => json!({ "url": address }),
        McpClient::Windsurf => json!({ "serverUrl": address }),
        McpClient::ClaudeCode | McpClient::Vscode => json!({"type": "http", "url": address}),
    };
    match (client, key) {
        (McpClient::ClaudeDesktop, Some(key)) => entry["env"] = json!({ VARIABLE: key }),
        (_, Some(_)) => entry["headers"] = headers.unwrap_or_default(),
        (_, None) => {}
    }
    entry
}

/// A file's text with the entry in it, and what it asks for; all else stays.
fn with_entry(text: &str, root: &str, entry: Value, asks: bool) -> Result<String, String> {
    let text = if text.trim().is_empty() { "{}" } else { text };
    let mut document: Value =
        serde_json::from_str(text).map_err(|error| format!("it is not plain JSON ({error}); add the entry by hand"))?;
    let object = document.as_object_mut().ok_or("it is no object")?;
    let servers = object.entry(root).or_insert_with(|| Value::Object(Map::new()));
    let servers = servers.as_object_mut().ok_or_else(|| format!("\"{root}\" in it is no object"))?;
    servers.insert(NAME.to_owned(), entry);
    if asks {
        let inputs = object.entry("inputs").or_insert_with(|| json!([]));
        let inputs = inputs.as_array_mut().ok_or("\"inputs\" in it is no list")?;
        inputs.retain(|input| input["id"] != INPUT);
        inputs.push(input());
    }
    Ok(format!("{document:#}\n"))
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|source| Failure::File { attempted: "read", path: path.to_owned(), source })
}

/// Whole or not at all, and for this user only: a key may be in it.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |source| Failure::File { attempted: "write", path: path.to_owned(), source };
    // A link's target is what the client reads.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if let Some(folder) = target.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    // A name that nobody knows before, and a file that was not there: what others have put beside it is neither followed nor written to.
    let mut beside = target.clone().into_os_string();
    beside.push(format!(".{}", uuid::Uuid::new_v4()));
    let beside = PathBuf::from(beside);
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside).map_err(failed)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.and_then(|()| std::fs::rename(&beside, &target)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(client: McpClient, file: PathBuf, yes: bool) -> InstallArgs {
        let server = crate::cli::ServerArgs {
            url: Some("http://box:8080/".to_owned()),
            key: Some("cb_1".to_owned()),
            key_file: None,
        };
        InstallArgs { client, yes, file: Some(file), server }
    }

    fn written(path: &Path) -> Value {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn a_file_is_written_only_when_that_is_said_and_keeps_what_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/mcp.json");
        let environment = Environment::default();
        perform(&args(McpClient::ClaudeDesktop, path.clone(), false), &environment).unwrap();
        assert!(!path.exists());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, r#"{"other": 1, "mcpServers": {"mine": {}}}"#).unwrap();
        perform(&args(McpClient::ClaudeDesktop, path.clone(), true), &environment).unwrap();
        let written = written(&path);
        assert_eq!((&written["other"], &written["mcpServers"]["mine"]), (&json!(1), &json!({})));
        assert_eq!(written["mcpServers"]["cellblock"]["env"], json!({"CELLBLOCK_API_KEY": "cb_1"}));
        std::fs::write(&path, "// comments\n{}").unwrap();
        let failed = perform(&args(McpClient::ClaudeDesktop, path.clone(), true), &environment).unwrap_err();
        assert!(failed.to_string().contains("by hand"), "{failed}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "// comments\n{}");
    }

    #[test]
    fn a_file_of_a_project_says_where_the_key_is_and_never_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let environment: Environment = [("CELLBLOCK_API_KEY", "cb_1")].into_iter().collect();
        for (client, root, words) in [
            (McpClient::ClaudeCode, "mcpServers", "Bearer ${CELLBLOCK_API_KEY}"),
            (McpClient::Vscode, "servers", "Bearer ${input:cellblock-api-key}"),
            (McpClient::Cursor, "mcpServers", "Bearer ${env:CELLBLOCK_API_KEY}"),
            (McpClient::Windsurf, "mcpServers", "Bearer ${env:CELLBLOCK_API_KEY}"),
        ] {
            let path = folder.path().join(format!("{client:?}"));
            for before in ["{}", r#"{"mcpServers": {"cellblock": {"headers": {"Authorization": "Bearer cb_1"}}}}"#] {
                let before = before.replace("mcpServers", root);
                std::fs::write(&path, before).unwrap();
                perform(&args(client, path.clone(), true), &environment).unwrap();
                let text = std::fs::read_to_string(&path).unwrap();
                assert!(!text.contains("cb_1"), "{client:?}: {text}");
                assert_eq!(written(&path)[root]["cellblock"]["headers"]["Authorization"], words, "{client:?}");
            }
        }
        // Twice is as once, and what others ask for stays.
        let path = folder.path().join("inputs");
        std::fs::write(&path, r#"{"inputs": [{"id": "mine"}]}"#).unwrap();
        for _ in 0..2 {
            perform(&args(McpClient::Vscode, path.clone(), true), &environment).unwrap();
        }
        assert_eq!(written(&path)["inputs"], json!([{"id": "mine"}, input()]));
        assert_eq!(reference(McpClient::Vscode, false), Some(format!("${{input:{INPUT}}}").as_str()));
        std::fs::write(&path, r#"{"inputs": {}}"#).unwrap();
        let failed = perform(&args(McpClient::Vscode, path.clone(), true), &environment).unwrap_err();
        assert!(failed.to_string().contains("is left as it is"), "{failed}");
    }

    #[test]
    fn only_a_persons_own_file_has_the_key_and_that_is_said() {
        let clients = [
            McpClient::ClaudeDesktop,
            McpClient::ClaudeCode,
            McpClient::Cursor,
            McpClient::Vscode,
            McpClient::Windsurf,
        ];
        for client in clients {
            let is_of_home = usual_path(client, &[("HOME", "/h")].into_iter().collect()).unwrap().starts_with("/h");
            assert_eq!(reference(client, false).is_none(), is_of_home, "{client:?}");
        }
        let key = Key::Written("cb_1".to_owned());
        assert_eq!(key.hidden().text(), Some(HIDDEN));
        assert!(key.told(McpClient::Cursor).contains("will be in the file"));
        let referred = Key::Referred("${env:CELLBLOCK_API_KEY}");
        assert!(referred.told(McpClient::Cursor).contains("set CELLBLOCK_API_KEY"));
        assert!(referred.told(McpClient::Vscode).contains("asks for it once"));
    }

    #[test]
    fn a_client_is_told_the_address_or_the_program() {
        let of = |client, url| entry(client, "/bin/cellblock", url, Some("cb_1"));
        assert_eq!(of(McpClient::Vscode, None), json!({"command": "/bin/cellblock", "args": ["mcp", "--stdio"]}));
        let desktop = of(McpClient::ClaudeDesktop, Some("http://box"));
        assert_eq!(desktop["args"], json!(["mcp", "--stdio", "--url", "http://box"]));
        assert_eq!(desktop["env"]["CELLBLOCK_API_KEY"], "cb_1");
        assert_eq!(of(McpClient::ClaudeCode, Some("http://box"))["url"], "http://box/mcp");
    }
}
