//! What clients of a server are given to begin with: the files of `examples/`, word for word, which `tests/examples.rs` runs, and the variables that they read. It
//! asks nothing and prints nothing; a page (`http::connect`) and a command (`cli::connect`) show it.

/// A door that a client comes in by, where it is not the native API's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// Jupyter Server's API.
    Jupyter,
    /// The Model Context Protocol.
    Mcp,
    /// E2B's API.
    E2b,
    /// The classic routes.
    Classic,
}

impl Door {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Jupyter, Self::Mcp, Self::E2b, Self::Classic];

    /// A word for programs.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Jupyter => "jupyter",
            Self::Mcp => "mcp",
            Self::E2b => "e2b",
            Self::Classic => "classic",
        }
    }

    /// The key of the configuration that opens it.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Jupyter => "doors.jupyter",
            Self::Mcp => "doors.mcp",
            Self::E2b => "doors.e2b",
            Self::Classic => "doors.classic.enabled",
        }
    }
}

/// What one kind of client is given.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    /// A word for programs.
    pub word: &'static str,
    /// For people.
    pub title: &'static str,
    /// The door that it needs; none: the native API is always there.
    pub door: Option<Door>,
    /// The file's name in `examples/`.
    pub file: &'static str,
    /// What is in it.
    pub text: &'static str,
    /// What it needs beside it, and what is done with it.
    pub how: &'static str,
}

/// A file of `examples/`, as it stands.
macro_rules! client {
    ($word:literal $title:literal $door:expr, $file:literal $how:literal) => {
        Client {
            word: $word,
            title: $title,
            door: $door,
            file: $file,
            text: include_str!(concat!("../examples/", $file)),
            how: $how,
        }
    };
}

/// All clients, in the order in which they are shown.
pub const CLIENTS: [Client; 11] = [
    client!("curl" "curl" None, "curl.sh" "bash curl.sh"),
    client!("python" "Python" None, "httpx_sync.py" "pip install httpx; python httpx_sync.py"),
    client!("javascript" "JavaScript" None, "fetch.mjs" "node fetch.mjs"),
    client!("e2b-python" "E2B, Python" Some(Door::E2b), "e2b.py" "pip install e2b-code-interpreter; python e2b.py"),
    client!("e2b-javascript" "E2B, JavaScript" Some(Door::E2b), "e2b.mjs" "npm install @e2b/code-interpreter; node e2b.mjs"),
    client!("jupyter" "Jupyter, from Python" Some(Door::Jupyter), "kernel_client.py" "pip install jupyter-kernel-client; python kernel_client.py"),
    client!("jupyterlab" "JupyterLab" Some(Door::Jupyter), "jupyterlab.sh" "pip install jupyterlab; bash jupyterlab.sh"),
    client!("mcp" "MCP clients" Some(Door::Mcp), "mcp.json" "the .mcp.json of a project, as Claude Code reads it; for others: cellblock mcp install CLIENT"),
    client!("mcp-python" "MCP, from Python" Some(Door::Mcp), "mcp_client.py" "pip install mcp; python mcp_client.py"),
    client!("open-webui" "Open WebUI" Some(Door::Jupyter), "open-webui.env" "an env_file of Docker Compose; the address is as its container reaches this server"),
    client!("classic" "Classic routes" Some(Door::Classic), "classic.py" "pip install requests; python classic.py"),
];

/// The key, as a shell is told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// Not known: a word stands where it is to be written.
    Unknown,
    /// This one.
    Told(String),
    /// What is in this file.
    In(String),
}

/// Stands where a key is to be written.
pub const PLACEHOLDER: &str = "YOUR-KEY";

/// What clients of E2B read, by the variables of [`environment`].
const OF_E2B: &str = "export E2B_API_URL=\"$CELLBLOCK_URL\" E2B_SANDBOX_URL=\"$CELLBLOCK_URL\" E2B_API_KEY=\"e2b_${CELLBLOCK_API_KEY#cb_}\"\n";

/// Lines of a shell that set what the files read: where the server is, its key, and the same in E2B's words for its clients.
#[must_use]
pub fn environment(url: &str, key: &Key, for_e2b: bool) -> String {
    let key = match key {
        Key::Unknown => quoted(PLACEHOLDER),
        // The form in which E2B's clients have it is made of this one.
        Key::Told(key) => {
            quoted(&key.strip_prefix("e2b_").map_or_else(|| key.clone(), |digits| format!("cb_{digits}")))
        }
        Key::In(file) => format!("\"$(cat {})\"", quoted(file)),
    };
    let url = quoted(url.trim_end_matches('/'));
    let of_e2b = if for_e2b { OF_E2B } else { "" };
    format!("export CELLBLOCK_URL={url}\nexport CELLBLOCK_API_KEY={key}\n{of_e2b}")
}

/// A word of a shell, whatever is in it.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_is_shown_is_what_the_examples_are() {
        for client in CLIENTS {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(client.file);
            assert_eq!(std::fs::read_to_string(path).unwrap(), client.text, "{}", client.file);
            let reads = ["CELLBLOCK_URL", "E2B_API_URL"].iter().any(|name| client.text.contains(name));
            assert!(reads, "{} says where the server is by itself", client.file);
        }
        let words: BTreeSet<_> = CLIENTS.iter().map(|client| client.word).collect();
        assert_eq!(words.len(), CLIENTS.len());
        assert!(!words.contains("env"));
    }

    #[test]
    fn a_shell_takes_the_lines_for_what_they_say() {
        let of = |url: &str, key: &Key| {
            let lines = environment(url, key, true);
            let asked = "printf '%s|' \"$CELLBLOCK_URL\" \"$CELLBLOCK_API_KEY\" \"$E2B_API_URL\" \"$E2B_API_KEY\"";
            let ran = std::process::Command::new("sh").args(["-c", &format!("{lines}{asked}")]).output().unwrap();
            String::from_utf8(ran.stdout).unwrap()
        };
        let told = |key: &str| Key::Told(key.to_owned());
        assert_eq!(of("http://box:8080/", &told("cb_1")), "http://box:8080|cb_1|http://box:8080|e2b_1|");
        assert_eq!(of("http://box", &told("e2b_1")), "http://box|cb_1|http://box|e2b_1|");
        let odd = "a'$(id)`id`\"\\";
        assert_eq!(of("http://box", &told(odd)), format!("http://box|{odd}|http://box|e2b_{odd}|"));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("it's a key");
        std::fs::write(&file, "cb_2\n").unwrap();
        assert_eq!(of("http://box", &Key::In(file.display().to_string())), "http://box|cb_2|http://box|e2b_2|");
        assert!(environment("http://box", &Key::Unknown, false).ends_with("='YOUR-KEY'\n"));
    }
}
