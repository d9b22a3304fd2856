//! The deployment with docker compose: it comes up as the README says, works, shows callers no engine, and goes without a trace.
//!
//! It runs the real scripts with the server that was built for tests, under a project, an instance and a port of its own.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bollard::Docker;
use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::{
    ListContainersOptionsBuilder, ListImagesOptionsBuilder, ListNetworksOptionsBuilder, ListVolumesOptionsBuilder,
    RemoveImageOptionsBuilder, TagImageOptionsBuilder,
};
use cellblock::config::{self, Config, Inputs, MOST_SESSIONS};
use cellblock::engine::guard::Needs;
use futures_util::FutureExt;
use serde_json::{Value, json};

/// How long anything may take before it counts as never.
const NEVER: Duration = Duration::from_secs(240);
/// The image that the scripts build.
const SERVER: &str = "cellblock/server";

/// What somebody inside the server's container says to the guard, each a refusal; and what they do to its socket.
const PROBE: &str = r#"
import json, os, socket, struct, sys
PATH = "/run/cellblock/guard.sock"
def say(data):
    s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(PATH); s.sendall(data)
    answer = b""
    try:
        while piece := s.recv(65536):
            answer += piece
    except ConnectionResetError:
        pass  # It has not read all of it.
    return answer[4:].decode(errors="replace")
def call(call, **more):
    data = json.dumps({"version": 2, "instance": sys.argv[1], "call": call, **more}).encode()
    return say(struct.pack(">I", len(data)) + data)
def may(act):
    try:
        act(); return True
    except OSError:
        return False
print(json.dumps({
    "list": call("list"),
    "exec": call({"exec": {"name": "x"}}),
    "remove": call({"remove": {"name": sys.argv[2]}}),
    "image": call({"resolve-image": {"reference": "cellblock/base:latest", "pull": "Missing"}}),
    "more": call("list", HostConfig={"Privileged": True}),
    "http": say(b"GET /v1.41/containers/json HTTP/1.1\r\nHost: x\r\n\r\n"),
    "replaces": may(lambda: os.unlink(PATH)),
    "writes": may(lambda: open("/usr/local/bin/cellblock", "ab")),
    "engine": os.path.lexists("/var/run/docker.sock"),
}))
"#;

struct Deployment {
    project: String,
    instance: String,
    port: u16,
    docker: Docker,
}

impl Deployment {
    /// Runs a script of the repository as an operator would, and answers with what it printed; an error is all that it said.
    async fn try_run(&self, program: &str, arguments: &[&str]) -> Result<String, String> {
        let profile = Path::new(env!("CARGO_BIN_EXE_cellblock")).parent().and_then(Path::file_name).unwrap();
        let mut command = Command::new("timeout");
        command
            .arg(NEVER.as_secs().to_string())
            .arg(program)
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("SERVER_PROFILE", profile)
            .env("COMPOSE_PROJECT_NAME", &self.project)
            .env("CELLBLOCK_INSTANCE", &self.instance)
            .env("PORT", self.port.to_string());
        let output = tokio::task::spawn_blocking(move || command.output()).await.expect("an end").expect("a program");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        match output.status.success() {
            true => Ok(out.into_owned()),
            false => Err(format!("{program} {arguments:?}: {}\n{out}\n{err}", output.status)),
        }
    }

    async fn compose(&self, arguments: &[&str]) -> String {
        self.try_run("scripts/compose", arguments).await.unwrap_or_else(|said| panic!("{said}"))
    }

    fn labels(&self) -> [String; 2] {
        [format!("com.docker.compose.project={}", self.project), format!("io.cellblock.instance={}", self.instance)]
    }

    /// Names of containers, volumes and networks of the deployment, its sessions' included.
    async fn left(&self) -> BTreeSet<String> {
        let mut left = BTreeSet::new();
        for label in self.labels() {
            let filters = HashMap::from([("label", vec![label])]);
            let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
            let containers = self.docker.list_containers(Some(options)).await.unwrap();
            left.extend(containers.into_iter().flat_map(|container| container.names.unwrap_or_default()));
            let options = ListVolumesOptionsBuilder::default().filters(&filters).build();
            let volumes = self.docker.list_volumes(Some(options)).await.unwrap().volumes;
            left.extend(volumes.into_iter().flatten().map(|volume| volume.name));
            let options = ListNetworksOptionsBuilder::default().filters(&filters).build();
            let networks = self.docker.list_networks(Some(options)).await.unwrap();
            left.extend(networks.into_iter().filter_map(|network| network.name));
        }
        left
    }

    async fn inspect(&self, service: &str) -> ContainerInspectResponse {
        let id = self.compose(&["ps", "--quiet", service]).await;
        self.docker.inspect_container(id.trim(), None).await.unwrap()
    }

    /// Names of the server's images, and the id of the newest.
    async fn images(&self) -> (BTreeSet<String>, Option<String>) {
        let filters = HashMap::from([("reference", vec![SERVER.to_owned()])]);
        let options = ListImagesOptionsBuilder::default().filters(&filters).build();
        let images = self.docker.list_images(Some(options)).await.unwrap();
        let latest = format!("{SERVER}:latest");
        let newest = images.iter().find(|image| image.repo_tags.contains(&latest)).map(|image| image.id.clone());
        (images.into_iter().flat_map(|image| image.repo_tags).collect(), newest)
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}"))
}

/// What is set for a process: bytes of memory, threads, open files.
#[derive(Debug)]
struct Room {
    memory: usize,
    tasks: usize,
    files: usize,
}

impl Room {
    /// What stands behind these words in a unit or a service of compose.
    fn read(text: &str, words: [&str; 3]) -> Self {
        let [memory, tasks, files] = words.map(|word| {
            let values: Vec<&str> = text.lines().filter_map(|line| line.trim().strip_prefix(word)).collect();
            assert_eq!(values.len(), 1, "{word} in {text}");
            let digits = values[0].trim_end_matches(['}', 'g', 'G', 'm', 'M']);
            let shift = match values[0].trim_end_matches('}').to_lowercase().pop() {
                Some('g') => 30,
                Some('m') => 20,
                _ => 0,
            };
            digits.parse::<usize>().unwrap_or_else(|_| panic!("{word}{}", values[0])) << shift
        });
        Self { memory, tasks, files }
    }

    fn unit(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/systemd").join(name);
        Self::read(&std::fs::read_to_string(path).unwrap(), ["MemoryMax=", "TasksMax=", "LimitNOFILE="])
    }

    /// A service, which has what stands for both.
    fn service(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker-compose.yml");
        let text = std::fs::read_to_string(path).unwrap();
        let (both, services) = text.split_once("\nservices:\n").unwrap();
        let own = services.split_once(&format!("  {name}:\n")).unwrap().1;
        let own: String =
            own.lines().take_while(|line| line.starts_with("   ") || line.is_empty()).collect::<Vec<_>>().join("\n");
        assert_eq!(own.matches("<<: *both").count(), 1, "{own}");
        Self::read(&format!("{both}\n{own}"), ["mem_limit: ", "pids_limit: ", "ulimits: {nofile: "])
    }
}

/// What a server may come to need for so many sessions, as its unit says it.
fn needs_of_server(config: &Config, sessions: usize, connections: usize) -> Room {
    let kept = usize::try_from(config.executions.retention_size).unwrap();
    let bodies = 64 * usize::try_from(config.server.max_body).unwrap();
    let memory = (256 << 20) + sessions * (256 << 10) + kept + connections * (20 << 10) + bodies;
    Room { memory, tasks: 0, files: 2 * (sessions + connections) }
}

/// Threads on a machine that is larger than most.
const THREADS: usize = 1024 + cellblock::task::BLOCKING_THREADS + 64;

#[test]
fn units_and_compose_have_room_for_what_may_be_configured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    std::fs::write(&file, "[server]\ndata_dir = \"/var/lib/cellblock\"\n").unwrap();
    let config = config::load(&Inputs { files: vec![file], ..Inputs::default() }).unwrap().config;
    let (most, usual) = (MOST_SESSIONS as usize, config.limits.sessions as usize);
    let guard = |sessions: usize| {
        let Needs { memory, files } = Needs::of(sessions);
        Room { memory, tasks: 0, files }
    };
    let server = |sessions: usize, connections: u32| needs_of_server(&config, sessions, connections as usize);
    for (what, room, needs) in [
        ("the guard's unit", Room::unit("cellblock-guard.service"), guard(most)),
        ("the server's unit", Room::unit("cellblock.service"), server(most, 2000)),
        // What is configured unless somebody mounts more, and what the comments say beside that.
        ("the guard in compose", Room::service("guard"), guard(usual.max(300))),
        ("the server in compose", Room::service("cellblock"), server(usual.max(2000), config.server.connections)),
    ] {
        assert!(room.memory >= needs.memory, "{what}: {room:?} {needs:?}");
        assert!(room.files >= needs.files && room.tasks >= THREADS, "{what}: {room:?} {needs:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_deployment_comes_up_works_and_goes() {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).unwrap();
    let deployment = Deployment {
        project: format!("cellblock-{}", &id[..12]),
        instance: format!("t{}", &id[..12]),
        port: free.port(),
        docker: Docker::connect_with_socket_defaults().unwrap(),
    };
    let (before, newest) = deployment.images().await;
    match deployment.try_run("scripts/images", &["base", "python", "data", "server"]).await {
        Ok(_) => {}
        Err(said) if said.contains("doesn't run in its image") => {
            eprintln!("skipped: what is built on this machine needs a newer C library than the server's image has");
            return;
        }
        Err(said) => panic!("{said}"),
    }
    let outcome = AssertUnwindSafe(comes_up_and_works(&deployment)).catch_unwind().await;
    if outcome.is_err() {
        eprintln!("{}", deployment.compose(&["logs", "--no-color"]).await);
    }
    deployment.compose(&["down", "--volumes"]).await;
    let left = deployment.left().await;

    // The image with the build for tests goes too, unless it was there.
    let (after, _) = deployment.images().await;
    if let Some(newest) = newest {
        let options = TagImageOptionsBuilder::default().repo(SERVER).tag("latest").build();
        deployment.docker.tag_image(&newest, Some(options)).await.unwrap();
    }
    for name in after.difference(&before) {
        let options = RemoveImageOptionsBuilder::default().build();
        deployment.docker.remove_image(name, Some(options), None).await.unwrap();
    }
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    assert!(left.is_empty(), "it has left {left:?}");
}

async fn comes_up_and_works(deployment: &Deployment) {
    deployment.compose(&["up", "--detach"]).await;
    let url = format!("http://127.0.0.1:{}", deployment.port);
    let http = reqwest::Client::builder().timeout(NEVER).no_proxy().build().unwrap();
    let began = Instant::now();
    while !http.get(format!("{url}/readyz")).send().await.is_ok_and(|answer| answer.status() == 200) {
        assert!(began.elapsed() < NEVER, "the server does not get ready");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let key = deployment.compose(&["exec", "-T", "cellblock", "cat", "/var/lib/cellblock/api-key"]).await;
    let ask = async |request: reqwest::RequestBuilder, status: u16| -> Value {
        let answer = request.bearer_auth(key.trim()).send().await.unwrap();
        let (got, body) = (answer.status().as_u16(), answer.text().await.unwrap());
        assert_eq!(got, status, "{body}");
        serde_json::from_str(&body).unwrap_or(Value::Null)
    };

    let sessions = format!("{url}/v1/sessions");
    let session = ask(http.post(&sessions).json(&json!({"template": "python"})), 201).await;
    let session = format!("{sessions}/{}", text(&session["id"]));
    let ran = ask(http.post(format!("{session}/executions")).json(&json!({"code": "6 * 7"})), 200).await;
    assert_eq!(ran["results"][0]["data"]["text/plain"], "42", "{ran}");
    faces_callers_without_an_engine(deployment).await;
    ask(http.delete(&session), 200).await;
    // One is left for `down` to find.
    ask(http.post(&sessions).json(&json!({"template": "python"})), 201).await;
}

async fn faces_callers_without_an_engine(deployment: &Deployment) {
    let (server, guard) = (deployment.inspect("cellblock").await, deployment.inspect("guard").await);
    for (name, found, uid) in [("cellblock", &server, 65532), ("guard", &guard, 65533)] {
        let host = found.host_config.as_ref().unwrap();
        assert_eq!(host.readonly_rootfs, Some(true), "{name}");
        assert_eq!(host.cap_drop.as_deref(), Some(["ALL".to_owned()].as_slice()), "{name}");
        assert_eq!(host.privileged, Some(false), "{name}");
        assert!(host.security_opt.iter().flatten().any(|o| o.starts_with("no-new-privileges")), "{name}");
        assert!(host.memory > Some(0) && host.memory_swap == host.memory && host.pids_limit > Some(0), "{name}");
        // What the kernel says of the process itself.
        let status = deployment.compose(&["exec", "-T", name, "cat", "/proc/1/status"]).await;
        let line =
            |field: &str| status.lines().find_map(|l| l.strip_prefix(field)).unwrap_or_default().trim().to_owned();
        assert_eq!(line("Uid:"), format!("{uid}\t{uid}\t{uid}\t{uid}"), "{name}");
        assert_eq!((line("CapPrm:"), line("CapBnd:")), ("0".repeat(16), "0".repeat(16)), "{name}");
        assert_eq!(line("NoNewPrivs:"), "1", "{name}");
    }
    let mounted = |found: &ContainerInspectResponse| -> Vec<String> {
        let mounts = found.mounts.iter().flatten();
        mounts.flat_map(|m| [m.source.clone(), m.destination.clone()]).flatten().collect()
    };
    assert!(mounted(&guard).iter().any(|path| path.ends_with("docker.sock")), "the probe is not blind");
    assert!(!mounted(&server).iter().any(|path| path.ends_with("docker.sock")), "{:?}", mounted(&server));
    assert_eq!(guard.host_config.as_ref().unwrap().network_mode.as_deref(), Some("none"));
    let bindings = server.host_config.unwrap().port_bindings.unwrap_or_default();
    let addresses: Vec<_> = bindings.into_values().flatten().flatten().filter_map(|binding| binding.host_ip).collect();
    assert_eq!(addresses, ["127.0.0.1"]);

    // Whoever has taken over the server's process has the guard's verbs, on cells of this instance, and nothing else.
    let victim = guard.name.unwrap();
    let arguments =
        ["exec", "-T", "cellblock", "/usr/bin/python3.11", "-c", PROBE, &deployment.instance, victim.trim_matches('/')];
    let found: Value = serde_json::from_str(&deployment.compose(&arguments).await).unwrap();
    assert!(text(&found["list"]).starts_with(r#"{"Ok":[{"name":"cellblock-"#), "the probe is understood: {found}");
    for refused in ["exec", "remove", "image", "more", "http"] {
        assert!(text(&found[refused]).starts_with(r#"{"Err":{"rejected""#), "{refused}: {found}");
    }
    for may in ["replaces", "writes", "engine"] {
        assert_eq!(found[may], json!(false), "{may}");
    }
}
