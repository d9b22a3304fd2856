//! An operator changes the configuration of a server that runs, with the program itself and real containers.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use server::{Cell, Reply, Server, text};

/// What the container itself says of its limit, in MiB.
const LIMIT: &str = "import os
v1, v2 = '/sys/fs/cgroup/memory/memory.limit_in_bytes', '/sys/fs/cgroup/memory.max'
int(open(v2 if os.path.exists(v2) else v1).read()) >> 20";

const FIRST: &str = "[limits]\nsessions = 3\ncreate_wait = \"100ms\"\n";

/// A server, and the files that its operator edits.
struct Story {
    server: Arc<Server>,
    pid: u32,
    templates: tempfile::TempDir,
}

impl Story {
    async fn begin() -> Self {
        let templates = tempfile::tempdir().unwrap();
        std::fs::write(templates.path().join("small.toml"), template("192MiB", "")).unwrap();
        let (server, pid) = Server::spawn(&main_file(&templates, FIRST)).await;
        Self { server, pid, templates }
    }

    fn template(&self, text: &str) {
        std::fs::write(self.templates.path().join("small.toml"), text).unwrap();
    }

    fn main(&self, text: &str) {
        std::fs::write(self.main_path(), main_file(&self.templates, text)).unwrap();
    }

    fn main_path(&self) -> PathBuf {
        self.server.data().parent().unwrap().join("test.toml")
    }

    async fn reload(&self) -> Reply {
        self.server.post("/v1/admin/reload", &Value::Null).await
    }

    fn hang_up(&self) {
        assert!(Command::new("kill").args(["-HUP", &self.pid.to_string()]).status().unwrap().success());
    }

    async fn create(&self) -> Reply {
        self.server.post("/v1/sessions", &json!({})).await
    }

    async fn cell(&self) -> Cell {
        let reply = self.create().await;
        assert_eq!((reply.status, &reply.json["state"]), (201, &json!("ready")), "{}", reply.text);
        Cell { server: Arc::clone(&self.server), id: text(&reply.json["id"]), view: reply.json }
    }

    async fn until(&self, what: &str, is_so: impl AsyncFn() -> bool) {
        let became = async {
            while !is_so().await {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), became).await.unwrap_or_else(|_| panic!("{what} never is so"));
    }
}

fn main_file(templates: &tempfile::TempDir, rest: &str) -> String {
    format!("default_template = \"small\"\ntemplates_dir = {:?}\n{rest}", templates.path())
}

fn template(memory: &str, rest: &str) -> String {
    format!(
        "image = \"cellblock/python:latest\"\n{rest}\n[default]\nmemory = \"{memory}\"\ndisk = \"16MiB\"\ntmp = \"16MiB\"\n"
    )
}

fn keys(reloaded: &Reply) -> Vec<String> {
    assert_eq!(reloaded.status, 200, "{}", reloaded.text);
    reloaded.json["changes"].as_array().unwrap().iter().map(|change| text(&change["key"])).collect()
}

/// The lines of a refusal.
fn refused(reloaded: &Reply) -> Vec<String> {
    let problem = reloaded.problem(422, "config-rejected");
    problem["errors"].as_array().unwrap().iter().map(|error| text(&error["message"])).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_changes_what_may_change_and_all_of_it_or_nothing() {
    let story = Story::begin().await;
    let old = story.cell().await;
    assert_eq!(old.value(LIMIT).await, "192");
    assert_eq!(keys(&story.reload().await), [""; 0], "nothing is different");

    // Less memory: new sessions have it, and those that are there keep theirs.
    story.template(&template("160MiB", ""));
    let reloaded = story.reload().await;
    assert_eq!(keys(&reloaded), ["templates.small.default.memory"]);
    let change = &reloaded.json["changes"][0];
    assert_eq!((&change["before"], &change["after"]), (&json!("\"192MiB\""), &json!("\"160MiB\"")));
    let new = story.cell().await;
    assert_eq!((new.value(LIMIT).await, old.value(LIMIT).await), ("160".to_owned(), "192".to_owned()));
    assert_eq!(
        (&new.look().await["resources"]["memory_mb"], &old.look().await["resources"]["memory_mb"]),
        (&json!(160), &json!(192))
    );
    new.delete().await;

    // Mistakes: each is a line, and what is right beside them is not taken over either.
    story.template(&template("1", "imaeg = \"x\""));
    story.main("[limits]\nsessions = 1\n");
    let lines = refused(&story.reload().await);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines.iter().any(|line| line.contains("small.toml:2") && line.contains("did you mean templates.small.image?")),
        "{lines:?}"
    );
    assert!(
        lines.iter().any(|line| line.contains("templates.small.default.memory") && line.contains("has no unit")),
        "{lines:?}"
    );
    // What needs a restart is refused with the rest, and a signal is no way around that.
    story.template(&template("176MiB", ""));
    story.main("[limits]\nsessions = 1\n[engine]\npull = \"missing\"\n");
    let lines = refused(&story.reload().await);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("engine.pull: \"never\" -> \"missing\"") && lines[0].contains("restart"), "{lines:?}");
    story.hang_up();
    let log = story.server.data().parent().unwrap().join("log");
    story
        .until("the refusal stands in the log", async || {
            std::fs::read_to_string(&log).unwrap().contains("was not taken over")
        })
        .await;
    let cell = story.cell().await;
    assert_eq!(cell.value(LIMIT).await, "160");
    cell.delete().await;

    // By a signal: fewer sessions than there are end nothing, and more make room at once.
    story.main("[limits]\nsessions = 1\ncreate_wait = \"100ms\"\n");
    story.hang_up();
    story.until("there is no place", async || story.create().await.status == 503).await;
    old.works().await;
    story.main("[limits]\nsessions = 5\ncreate_wait = \"100ms\"\n[log]\nlevel = \"info,cellblock::session=debug\"\n");
    story.hang_up();
    story.until("there is a place", async || story.create().await.status == 201).await;
    assert_eq!(story.server.get("/v1/admin/log").await.json["level"], "info,cellblock::session=debug");

    // Pools, and then quotas.
    story.template(&template("160MiB", "[pool]\nmin = 1\nmax = 1\n"));
    assert!(keys(&story.reload().await).contains(&"templates.small.pool.max".to_owned()));
    story.until("one is ready", async || story.server.get("/v1/pools").await.json["pools"][0]["ready"] == 1).await;
    let warm = story.cell().await;
    assert_eq!(warm.view["source"], "warm");
    story.template(&template("160MiB", ""));
    story.main("[limits]\nsessions = 5\ncreate_wait = \"100ms\"\n[classes.default]\nsessions = 1\n");
    assert_eq!(keys(&story.reload().await).last().unwrap(), "templates.small.pool.min");
    assert_eq!(story.server.get("/v1/pools").await.json["pools"], json!([]));
    story.create().await.problem(429, "quota-exceeded");
    warm.works().await;

    for session in story.server.get("/v1/sessions").await.json["sessions"].as_array().unwrap() {
        story.server.delete(&format!("/v1/sessions/{}", text(&session["id"]))).await;
    }
    story.until("no container is left", async || story.server.containers("").await.is_empty()).await;
    story.server.finish().await.unwrap();
}
