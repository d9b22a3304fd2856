//! E2B's own Python client beside the native API through the HTTP library that it stands on, both from one process: a create that a full pool serves, and `1+1`.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Result;
use crate::figures::Figures;
use crate::measure::say;
use crate::server::Server;

/// What the server has for it.
pub const SETTINGS: &str = "[templates.e2b.pool]\nmin = 2\nmax = 2\n";
const ROUNDS: &str = "20";
const SCRIPT: &str = include_str!("e2b.py");
/// A create that the pool serves takes a program no longer than this, in milliseconds.
const CREATE: f64 = 30.0;
/// What `run_code` may take of the time that the native API takes through the library alone, told line by line as well.
const RUN: f64 = 1.3;
const MS: &str = "ms";

/// Takes turns between both.
pub async fn e2b(server: &Server, figures: &mut Figures) -> Result<()> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/e2b/bin/python");
    if !python.exists() {
        say("E2B's client is not there; `make test-kernel` makes it");
        return Ok(());
    }
    say("E2B's client");
    let mut command = Command::new(python);
    command.args(["-c", SCRIPT, server.url(), server.key(), ROUNDS]).stdin(Stdio::null()).stderr(Stdio::inherit());
    let done = tokio::task::spawn_blocking(move || command.output()).await??;
    if !done.status.success() {
        return Err(format!("E2B's client ended with {}", done.status).into());
    }
    let taken: Value = serde_json::from_slice(&done.stdout)?;
    for (name, kind) in [
        ("E2B's client: Sandbox.create(), warm", "create, e2b"),
        ("httpx: POST /v1/sessions, warm", "create, native"),
        ("E2B's client: the first run_code(\"1+1\")", "first, e2b"),
        ("httpx: the first execution of 1+1", "first, native"),
        ("E2B's client: run_code(\"1+1\")", "run, e2b"),
        ("httpx: an execution of 1+1", "run, native"),
    ] {
        let values = taken[kind].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        figures.add(name, MS, values);
    }
    let (ours, native) = ("E2B's client: Sandbox.create(), warm", "httpx: POST /v1/sessions, warm");
    figures.compare("Sandbox.create() of E2B's client, warm : native", ours, native, None);
    figures.bound("Sandbox.create() of E2B's client, warm : 30 ms", ours, CREATE);
    let (ours, native) = ("E2B's client: run_code(\"1+1\")", "httpx: an execution of 1+1");
    figures.compare("run_code of E2B's client : native", ours, native, Some(RUN));
    Ok(())
}
