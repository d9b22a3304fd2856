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
    let key = match (&args.server.key, &args.server.key_file) {
        (Some(key), _) => Some(key.trim().to_owned()),
        (None, Some(file)) => Some(read(file)?.trim().to_owned()),
        (None, None) => environment.get("CELLBLOCK_API_KEY").map(str::to_owned),
    };
    let program = std::env::current_exe()?.display().to_string();
    let entry = |key: Option<&str>| entry(args.client, &program, url.as_deref(), key);
    let shown = json!({ root(args.client): { NAME: entry(key.as_deref().map(|_| HIDDEN)) } });
    let mut out = std::io::stdout();
    writeln!(out, "{}:\n{shown:#}", path.display())?;
    if key.is_some() {
        writeln!(out, "\"{HIDDEN}\" stands for the key.")?;
    }
    if !args.yes {
        writeln!(out, "Nothing was written; --yes adds this to the file.")?;
        return Ok(OK);
    }
    let before = if path.exists() { read(&path)? } else { "{}".to_owned() };
    let after = with_entry(&before, root(args.client), entry(key.as_deref()))
        .map_err(|why| Failure::Usage(format!("{} is left as it is: {why}", path.display())))?;
    write(&path, &after)?;
    writeln!(out, "It was written; start the client again.")?;
    Ok(OK)
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
        (McpClient::ClaudeDesktop, Some(key)) => entry["env"] = json!({ "CELLBLOCK_API_KEY": key }),
        (_, Some(_)) => entry["headers"] = headers.unwrap_or_default(),
        (_, None) => {}
    }
    entry
}

/// A file's text with the entry in it; all else stays.
fn with_entry(text: &str, root: &str, entry: Value) -> Result<String, String> {
    let text = if text.trim().is_empty() { "{}" } else { text };
    let mut document: Value =
        serde_json::from_str(text).map_err(|error| format!("it is not plain JSON ({error}); add the entry by hand"))?;
    let object = document.as_object_mut().ok_or("it is no object")?;
    let servers = object.entry(root).or_insert_with(|| Value::Object(Map::new()));
    let servers = servers.as_object_mut().ok_or_else(|| format!("\"{root}\" in it is no object"))?;
    servers.insert(NAME.to_owned(), entry);
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

    #[test]
    fn a_file_is_written_only_when_that_is_said_and_keeps_what_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/mcp.json");
        let environment = Environment::default();
        perform(&args(McpClient::Cursor, path.clone(), false), &environment).unwrap();
        assert!(!path.exists());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, r#"{"other": 1, "mcpServers": {"mine": {}}}"#).unwrap();
        perform(&args(McpClient::Cursor, path.clone(), true), &environment).unwrap();
        let written: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let entry = json!({"url": "http://box:8080/mcp", "headers": {"Authorization": "Bearer cb_1"}});
        assert_eq!(written, json!({"other": 1, "mcpServers": {"mine": {}, "cellblock": entry}}));
        std::fs::write(&path, "// comments\n{}").unwrap();
        let failed = perform(&args(McpClient::Cursor, path.clone(), true), &environment).unwrap_err();
        assert!(failed.to_string().contains("by hand"), "{failed}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "// comments\n{}");
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
