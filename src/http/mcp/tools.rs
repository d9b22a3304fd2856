//! The tools as clients see them: names, arguments, hints. Few, in an order that stays, with plain types that every client takes.

use std::sync::{Arc, LazyLock};

use rmcp::model::{JsonObject, Tool, ToolAnnotations};
use serde_json::{Value, json};

/// How many tools there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ToolSet {
    /// Those that most work is done with.
    #[default]
    Small,
    /// Those, and what else a session can do.
    Full,
}

/// As many as the small set has stand before the others.
const SMALL: usize = 7;

static TOOLS: LazyLock<Vec<Tool>> = LazyLock::new(|| {
    vec![
        run_code(),
        run_command(),
        create_session(),
        list_sessions(),
        close_session(),
        read_file(),
        write_file(),
        list_files(),
        edit_file(),
        delete_file(),
        interrupt_session(),
        restart_session(),
        install_packages(),
        list_packages(),
        get_execution(),
        export_notebook(),
    ]
});

impl ToolSet {
    /// All of its tools.
    pub(super) fn all(self) -> &'static [Tool] {
        match self {
            Self::Small => &TOOLS[..SMALL],
            Self::Full => &TOOLS,
        }
    }
}

/// Marked, so that proxies can route a call without reading its body.
fn session_id(description: &str) -> Value {
    json!({"type": "string", "description": description, "x-mcp-header": "Session-Id"})
}

fn text(description: &str) -> Value {
    json!({"type": "string", "description": description})
}

fn texts(description: &str) -> Value {
    json!({"type": "array", "items": {"type": "string"}, "description": description})
}

fn seconds(description: &str) -> Value {
    json!({"type": "number", "exclusiveMinimum": 0, "description": description})
}

fn object(value: Value) -> Arc<JsonObject> {
    // Written as an object above and below.
    Arc::new(value.as_object().cloned().unwrap_or_default())
}

fn tool(name: &'static str, title: &str, description: &'static str, (properties, required): (Value, &[&str])) -> Tool {
    let schema = json!({
        "type": "object", "properties": properties, "required": required, "additionalProperties": false,
    });
    Tool::new(name, description, object(schema)).with_title(title)
}

/// What it does to the world: nothing that reaches out of a session.
fn hints(read_only: bool, destructive: bool, idempotent: bool) -> ToolAnnotations {
    ToolAnnotations::new().read_only(read_only).destructive(destructive).idempotent(idempotent).open_world(false)
}

fn told(properties: Value, required: &[&str]) -> Arc<JsonObject> {
    object(json!({"type": "object", "properties": properties, "required": required}))
}

fn run_code() -> Tool {
    let properties = json!({
        "code": text("The code. The value of its last expression is shown, as in a notebook"),
        "session_id": session_id("The session to run it in, from an earlier answer; without it, a new one, or the one that this connection works in"),
        "language": text("Its language, such as python, bash, r or typescript, if not the session's own"),
        "timeout_seconds": seconds("It is interrupted after this long"),
        "background": {"type": "boolean", "description": "Answer at once; read execution://{id} later"},
    });
    let output = json!({
        "id": text("The execution"), "session_id": text("Its session"), "context_id": text("Its context"),
        "status": text("ok, error, timeout, cancelled, oom, kernel_died, input_denied, lost, queued or running"),
        "stdout": text("Standard output, cut"), "stderr": text("Standard error, cut"),
    });
    tool(
        "run_code",
        "Run code",
        "Runs code in a session's Jupyter kernel, which keeps variables and files between calls, and shows its output, result, pictures and the files that it has changed.",
        (properties, &["code"]),
    )
    .with_raw_output_schema(told(output, &["id", "session_id", "status"]))
    .with_annotations(hints(false, true, false))
}

fn run_command() -> Tool {
    let properties = json!({
        "command": text("A line for the shell"),
        "session_id": session_id("The session to run it in, from an earlier answer; without it, a new one, or the one that this connection works in"),
        "cwd": text("Where; the session's working folder when absent"),
        "timeout_seconds": seconds("It is ended after this long"),
    });
    let output = json!({
        "id": text("The command"), "session_id": text("Its session"), "duration_ms": {"type": "integer"},
        "stdout": text("Standard output, cut"), "stderr": text("Standard error, cut"),
    });
    tool(
        "run_command",
        "Run a command",
        "Runs a shell command in a session and shows its output and exit code.",
        (properties, &["command"]),
    )
    .with_raw_output_schema(told(output, &["id", "session_id", "duration_ms"]))
    .with_annotations(hints(false, true, false))
}

fn create_session() -> Tool {
    let properties = json!({
        "template": text("What is installed in it; the server's default when absent"),
        "name": text("A name, unique among your live sessions"),
        "env": {"type": "object", "additionalProperties": {"type": "string"}, "description": "Environment variables"},
        "ttl_seconds": seconds("It ends at this age"),
        "packages": texts("Python packages that are installed before it is ready, such as polars or numpy>=2,<3, where the template allows it"),
        "network": {
            "type": "object",
            "properties": {
                "mode": {"type": "string", "enum": ["none", "allowlist"], "description": "How it is connected"},
                "allow": texts("With allowlist: names such as example.org or *.example.org, or pypi, npm, debian, github"),
            },
            "additionalProperties": false,
            "description": "What it may reach, within what the template permits; the template's own when absent",
        },
    });
    let output =
        json!({"id": text("Pass it on as session_id"), "state": text("ready"), "template": text("Its template")});
    tool(
        "create_session",
        "Create a session",
        "Makes a session, where one with a template, a name, variables, packages or a network of its own is needed; otherwise run_code makes one.",
        (properties, &[]),
    )
    .with_raw_output_schema(told(output, &["id", "state", "template"]))
    .with_annotations(hints(false, false, false))
}

fn list_sessions() -> Tool {
    let output = json!({"sessions": {"type": "array", "items": {"type": "object"}}, "omitted": {"type": "integer"}});
    tool("list_sessions", "List sessions", "Lists your live sessions, newest first.", (json!({}), &[]))
        .with_raw_output_schema(told(output, &["sessions", "omitted"]))
        .with_annotations(hints(true, false, true))
}

fn close_session() -> Tool {
    let properties = json!({"session_id": session_id("The session")});
    tool(
        "close_session",
        "Close a session",
        "Ends a session with its variables and files.",
        (properties, &["session_id"]),
    )
    .with_annotations(hints(false, true, true))
}

fn read_file() -> Tool {
    let properties = json!({
        "session_id": session_id("The session"),
        "path": text("Relative to the working folder; of a folder, what is in it is listed"),
        "offset": {"type": "integer", "minimum": 0, "description": "First byte; 0 when absent"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 262_144, "description": "Most bytes; 32000 when absent"},
    });
    tool(
        "read_file",
        "Read a file",
        "Reads a text file or a part of one, shows a picture, or lists a folder.",
        (properties, &["session_id", "path"]),
    )
    .with_annotations(hints(true, false, true))
}

fn write_file() -> Tool {
    let properties = json!({
        "session_id": session_id("The session"),
        "path": text("Relative to the working folder; folders on the way are made"),
        "content": text("What is to be in it"),
        "encoding": {"type": "string", "enum": ["utf-8", "base64"], "description": "How the content is written; utf-8 when absent"},
        "append": {"type": "boolean", "description": "Add to what is there"},
    });
    tool(
        "write_file",
        "Write a file",
        "Writes a file, whole or not at all.",
        (properties, &["session_id", "path", "content"]),
    )
    .with_annotations(hints(false, true, false))
}

fn list_files() -> Tool {
    let properties = json!({
        "session_id": session_id("The session"),
        "path": text("A folder, relative to the working folder; that itself when absent"),
        "depth": {"type": "integer", "minimum": 1, "maximum": 16, "description": "How many folders deep; 1 when absent"},
        "after": text("Only what comes after this path, with which an earlier list has ended"),
    });
    tool("list_files", "List files", "Lists a folder, and folders in it.", (properties, &["session_id"]))
        .with_annotations(hints(true, false, true))
}

fn edit_file() -> Tool {
    let properties = json!({
        "session_id": session_id("The session"),
        "path": text("Relative to the working folder"),
        "old": text("What is to be replaced, exactly as it stands there"),
        "new": text("What is to stand there instead"),
        "all": {"type": "boolean", "description": "Wherever it stands; without, it must stand there once"},
    });
    tool(
        "edit_file",
        "Edit a file",
        "Replaces a text in a file by another, whole or not at all.",
        (properties, &["session_id", "path", "old", "new"]),
    )
    .with_annotations(hints(false, true, false))
}

fn delete_file() -> Tool {
    let properties = json!({
        "session_id": session_id("The session"),
        "path": text("Relative to the working folder"),
        "recursive": {"type": "boolean", "description": "A folder with all that is in it"},
    });
    tool("delete_file", "Delete a file", "Removes a file or a folder.", (properties, &["session_id", "path"]))
        .with_annotations(hints(false, true, true))
}

fn interrupt_session() -> Tool {
    let properties = json!({"session_id": session_id("The session")});
    tool(
        "interrupt_session",
        "Interrupt a session",
        "Interrupts the code that runs in a session; variables stay.",
        (properties, &["session_id"]),
    )
    .with_annotations(hints(false, true, true))
}

fn restart_session() -> Tool {
    let properties = json!({"session_id": session_id("The session")});
    tool(
        "restart_session",
        "Restart a session",
        "Replaces a session's kernels by new ones: variables are gone, files stay.",
        (properties, &["session_id"]),
    )
    .with_annotations(hints(false, true, true))
}

fn install_packages() -> Tool {
    let properties = json!({
        "session_id": session_id("The session"),
        "packages": texts("Names, with versions or without, such as polars or numpy>=2,<3"),
        "upgrade": {"type": "boolean", "description": "Take the newest version of those that are there already"},
    });
    tool(
        "install_packages",
        "Install packages",
        "Installs Python packages into a session, where its template allows it; code can import them at once.",
        (properties, &["session_id", "packages"]),
    )
    .with_annotations(hints(false, false, true))
}

fn list_packages() -> Tool {
    let properties = json!({"session_id": session_id("The session")});
    tool("list_packages", "List packages", "Lists the Python packages of a session.", (properties, &["session_id"]))
        .with_annotations(hints(true, false, true))
}

fn get_execution() -> Tool {
    let properties = json!({"execution_id": text("The execution, from an earlier answer")});
    let output = json!({"id": text("The execution"), "session_id": text("Its session"), "status": text("How it ended, or how far it is")});
    tool(
        "get_execution",
        "Look an execution up",
        "Shows what an execution has put out by now, as run_code does.",
        (properties, &["execution_id"]),
    )
    .with_raw_output_schema(told(output, &["id", "session_id", "status"]))
    .with_annotations(hints(true, false, true))
}

fn export_notebook() -> Tool {
    let properties = json!({
        "session_id": session_id("The session"),
        "path": text("Also write it there, relative to the working folder"),
    });
    tool(
        "export_notebook",
        "Export the notebook",
        "Links the notebook of what was run in a session, with all that came of it, and writes it into a file if asked.",
        (properties, &["session_id"]),
    )
    .with_annotations(hints(false, true, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tool_is_plain_and_has_its_hints() {
        assert_eq!(ToolSet::default().all().len(), SMALL);
        for tool in ToolSet::Full.all() {
            let schema = tool.schema_as_json_value();
            assert_eq!(schema["type"], "object", "{}", tool.name);
            for (name, property) in schema["properties"].as_object().unwrap() {
                // One type each: not every client takes a list of them.
                assert!(property["type"].is_string(), "{}: {name}", tool.name);
                assert_eq!(property.get("x-mcp-header").is_some(), name == "session_id", "{}: {name}", tool.name);
            }
            for name in schema["required"].as_array().unwrap() {
                assert!(schema["properties"].get(name.as_str().unwrap()).is_some(), "{}: {name}", tool.name);
            }
            let hints = tool.annotations.as_ref().unwrap();
            assert!(hints.read_only_hint.is_some() && hints.open_world_hint == Some(false), "{}", tool.name);
            assert!(tool.title.is_some() && tool.description.is_some());
        }
    }
}
