//! Packages in real containers, from an index on loopback that stands for a public one: installed by request, in a create and in a cell, under each policy; what breaks off,
//! is too much, or is not for installing; and that the kernel goes on, whatever was installed.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

#[path = "support/server.rs"]
mod server;
#[path = "support/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use serde_json::{Value, json};
use server::{Cell, Server, joined, text};
use world::{Authority, PUBLIC, World};

/// Templates with each policy, and little room.
const TEMPLATES: &str = r#"
default_template = "any"
packages.index_url = "https://index.example.org/simple"
packages.file_hosts = ["files.example.org"]
packages.timeout = "20s"
packages.size = "12MiB"
[template_defaults]
image = "cellblock/python:latest"
[template_defaults.default]
memory = "256MiB"
disk = "48MiB"
tmp = "16MiB"
[templates.any]
packages = "any"
[templates.tight]
packages = "any"
[templates.tight.default]
disk = "6MiB"
[templates.listed]
packages = ["tiny-cell<2", "needy"]
[templates.shut]
packages = "none"
"#;

/// CRC-32 as archives have it.
fn crc(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| (c >> 1) ^ (0xedb8_8320 & (c & 1).wrapping_neg()))
    };
    !bytes.iter().fold(u32::MAX, step)
}

/// A zip archive without compression.
fn zip(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut archive, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in files {
        let size = (content.len() as u32).to_le_bytes();
        let mut about = vec![20, 0, 0, 0, 0, 0, 0, 0, 33, 0];
        about.extend(
            [&crc(content).to_le_bytes()[..], &size, &size, &(name.len() as u16).to_le_bytes(), &[0, 0]].concat(),
        );
        let at = (archive.len() as u32).to_le_bytes();
        directory.extend([&b"PK\x01\x02\x14\0"[..], &about, &[0; 10], &at, name.as_bytes()].concat());
        archive.extend([&b"PK\x03\x04"[..], &about, name.as_bytes(), content].concat());
    }
    let (count, at) = ((files.len() as u16).to_le_bytes(), (archive.len() as u32).to_le_bytes());
    let size = (directory.len() as u32).to_le_bytes();
    let end = [&b"PK\x05\x06\0\0\0\0"[..], &count, &count, &size, &at, &[0, 0]].concat();
    [archive, directory, end].concat()
}

/// A wheel with one module, a program, and so many bytes of data: its name, and what is in it.
fn wheel(name: &str, version: &str, needs: &[&str], data: usize) -> (String, Vec<u8>) {
    let module = name.replace('-', "_");
    let info = format!("{module}-{version}.dist-info");
    let needs: String = needs.iter().map(|need| format!("Requires-Dist: {need}\n")).collect();
    let mut files = vec![
        (
            format!("{module}.py"),
            format!("answer = 42\nversion = '{version}'\ndef main(): print('ran')\n").into_bytes(),
        ),
        (
            format!("{info}/METADATA"),
            format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}").into_bytes(),
        ),
        (
            format!("{info}/WHEEL"),
            b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n".to_vec(),
        ),
        (format!("{info}/entry_points.txt"), format!("[console_scripts]\nrun-{name} = {module}:main\n").into_bytes()),
    ];
    if data > 0 {
        files.push((format!("{module}_data.bin"), vec![7; data]));
    }
    let record: String = files.iter().map(|(file, _)| format!("{file},,\n")).collect();
    files.push((format!("{info}/RECORD"), format!("{record}{info}/RECORD,,\n").into_bytes()));
    (format!("{module}-{version}-py3-none-any.whl"), zip(&files))
}

fn wheels() -> Files {
    const MIB: usize = 1024 * 1024;
    Arc::new(BTreeMap::from([
        wheel("tiny-cell", "1.0", &[], 0),
        wheel("tiny-cell", "1.1", &[], 0),
        wheel("tiny-cell", "2.0", &[], 0),
        wheel("needy", "1.0", &["tiny-cell", "unlisted"], 0),
        wheel("unlisted", "1.0", &[], 0),
        // Older than what the image's kernel works with, and broken besides.
        wheel("traitlets", "4.0", &[], 0),
        // Two copies of it are more than the small disk has: the download, and what is unpacked.
        wheel("big", "1.0", &[], 4 * MIB),
        // No file is too large, but both are together.
        wheel("bigger", "1.0", &["more"], 7 * MIB),
        wheel("more", "1.0", &[], 7 * MIB),
        wheel("biggest", "1.0", &[], 13 * MIB),
        wheel("slow", "1.0", &[], 0),
    ]))
}

/// What the index has: files by their names.
type Files = Arc<BTreeMap<String, Vec<u8>>>;

fn index(files: &Files) -> Router {
    let (pages, files) = (Arc::clone(files), Arc::clone(files));
    let page = move |Path(name): Path<String>| {
        let module = format!("{}-", name.replace('-', "_"));
        let file = |file: &String| json!({"filename": file, "url": format!("https://files.example.org/packages/{file}"), "hashes": {}, "requires-python": null, "size": 1});
        let mut found: Vec<Value> = pages.keys().filter(|file| file.starts_with(&module)).map(file).collect();
        if name == "sourced" {
            found.push(json!({"filename": "sourced-1.0.tar.gz", "url": "../../sourced-1.0.tar.gz", "hashes": {}}));
        }
        let kind = [(header::CONTENT_TYPE, "application/vnd.pypi.simple.v1+json")];
        let body = json!({"meta": {"api-version": "1.1"}, "name": name, "versions": [], "files": found});
        let status = if found.is_empty() { StatusCode::NOT_FOUND } else { StatusCode::OK };
        async move { (status, kind, body.to_string()) }
    };
    let file = move |Path(name): Path<String>| {
        let content = files.get(&name).cloned();
        async move {
            if name.starts_with("slow") {
                std::future::pending::<()>().await;
            }
            content.map_or(StatusCode::NOT_FOUND.into_response(), IntoResponse::into_response)
        }
    };
    Router::new().route("/simple/{name}/", get(page)).route("/packages/{file}", get(file))
}

/// A server with an index.
async fn shop() -> (Arc<Server>, World, tempfile::TempDir) {
    let (authority, folder, world) = (Authority::new(), tempfile::tempdir().unwrap(), World::default());
    let names = ["index.example.org", "files.example.org"];
    let to = authority.serve(&names, index(&wheels())).await;
    world.server(PUBLIC, 443, to).name(names[0], &[PUBLIC]).name(names[1], &[PUBLIC]);
    let ca = folder.path().join("ca.pem");
    std::fs::write(&ca, authority.pem()).unwrap();
    let settings = TEMPLATES.replace("packages.size", &format!("egress.ca_file = {ca:?}\npackages.size"));
    (Server::start_within(&settings, world.outside()).await, world, folder)
}

async fn install(cell: &Cell, packages: &[&str]) -> server::Reply {
    cell.server.post(&cell.path("/packages"), &json!({"packages": packages})).await
}

/// Names and versions of what a session has installed itself.
async fn own(cell: &Cell) -> Vec<String> {
    let listed = cell.server.get(&cell.path("/packages")).await;
    assert_eq!(listed.status, 200, "{}", listed.text);
    let of = |row: &Value| format!("{} {}", text(&row["name"]), text(&row["version"]));
    let rows = listed.json["packages"].as_array().unwrap();
    assert!(rows.iter().any(|row| row["name"] == "ipykernel" && row["source"] == "image"), "{}", listed.text);
    rows.iter().filter(|row| row["source"] == "session").map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packages_are_installed_by_request_in_a_create_and_in_a_cell() {
    let (server, world, _folder) = shop().await;
    let cell = server.create(json!({"packages": ["tiny_cell==1.0"]})).await;
    assert_eq!(cell.value("import tiny_cell; tiny_cell.version").await, "'1.0'");
    assert_eq!(own(&cell).await, ["tiny-cell 1.0"]);
    an_agent_asks_for_packages(&server).await;
    // A kernel that runs finds what comes later, and commands do.
    let added = install(&cell, &["Unlisted"]).await;
    assert_eq!(added.status, 200, "{}", added.text);
    assert_eq!(added.json["added"], json!([{"name": "unlisted", "version": "1.0"}]));
    assert!(added.json["duration_ms"].as_u64().is_some_and(|ms| ms > 0));
    assert_eq!(cell.value("import unlisted; unlisted.answer").await, "42");
    assert_eq!(cell.value("!run-unlisted").await, "ran");
    let ran =
        server.post(&cell.path("/commands"), &json!({"command": "python -c 'import unlisted' && run-unlisted"})).await;
    assert_eq!((ran.json["stdout"].as_str(), ran.json["exit_code"].as_i64()), (Some("ran\n"), Some(0)), "{}", ran.text);
    // A newer one takes the place of the older; what is there already is not installed again.
    assert_eq!(install(&cell, &["tiny-cell"]).await.json["added"], json!([]));
    let request = json!({"packages": ["tiny-cell<2"], "upgrade": true});
    let upgraded = server.post(&cell.path("/packages"), &request).await;
    assert_eq!(upgraded.json["added"], json!([{"name": "tiny-cell", "version": "1.1"}]), "{}", upgraded.text);
    assert_eq!(own(&cell).await, ["tiny-cell 1.1", "unlisted 1.0"]);
    // It is no file of the session's own.
    let ran = cell.run("open('mine.txt', 'w').close()").await;
    assert!(ran.to_string().contains("mine.txt") && !ran.to_string().contains(".packages"), "{ran}");

    // With progress.
    let request = server.request(reqwest::Method::POST, &cell.path("/packages"));
    let request = request.header("accept", "text/event-stream").json(&json!({"packages": ["needy"]}));
    let seen = server.events_of(request).await.rest().await;
    assert!(joined(&seen, "stdout").contains("Successfully installed"), "{}", joined(&seen, "stdout"));
    let last = seen.last().unwrap();
    assert_eq!((last.kind.as_str(), &last.data["status"]), ("install.completed", &json!("ok")), "{}", last.data);
    assert_eq!(last.data["added"], json!([{"name": "needy", "version": "1.0"}]));

    // In cells, each in its way.
    for line in ["%pip install tiny-cell==2.0", "!pip install tiny-cell==1.0", "!python -m pip install tiny-cell==2.0"]
    {
        let ran = cell.run(line).await;
        assert!(text(&ran["stdout"]).contains("Successfully installed tiny-cell"), "{line}: {ran}");
    }
    assert_eq!(cell.value("!python -c 'import tiny_cell; print(tiny_cell.version)'").await, "2.0");
    assert!(cell.value("!pip list").await.contains("needy"));
    let told = cell.value("!pip uninstall -y needy").await;
    assert!(told.contains("Removed needy 1.0"), "{told}");
    assert_eq!(own(&cell).await, ["tiny-cell 2.0", "unlisted 1.0"]);

    // Nothing else has become reachable by it.
    let closed = cell.value("import urllib.request, urllib.error\ntry: urllib.request.urlopen('http://index.example.org/')\nexcept urllib.error.HTTPError as e: print(e.code, e.read().decode())").await;
    assert!(closed.contains("403") && closed.contains("this session has no way out"), "{closed}");
    assert!(world.resolved().iter().all(|name| ["index.example.org", "files.example.org"].contains(&name.as_str())));
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_goes_on_whatever_is_installed() {
    let (server, _, _folder) = shop().await;
    let cell = server.create(json!({})).await;
    let refused = install(&cell, &["traitlets==4.0"]).await;
    let detail = text(&refused.problem(422, "install-failed")["detail"]);
    assert!(detail.contains("traitlets==4.0"), "{detail}");
    // By force, into the very folder.
    let forced = "!pip install --no-deps --target /workspace/.packages/lib/python3.11/site-packages traitlets==4.0";
    let ran = cell.run(forced).await;
    assert!(text(&ran["stdout"]).contains("Successfully installed traitlets-4.0"), "{ran}");
    let reply = server.post(&cell.path("/restart"), &json!({})).await;
    assert!((200..300).contains(&reply.status), "{}", reply.text);
    cell.wait("ready").await;
    assert_eq!(cell.value("1+1").await, "2");
    assert_eq!(cell.value("import traitlets; traitlets.__version__ > '5'").await, "True");
    let listed = server.get(&cell.path("/packages")).await.json;
    let row = listed["packages"].as_array().unwrap().iter().find(|row| row["name"] == "traitlets").unwrap();
    assert_eq!(row["source"], "image", "{row}");
    // What the image is made of is not taken out either.
    cell.run("!pip uninstall -y ipykernel traitlets").await;
    server.post(&cell.path("/restart"), &json!({})).await;
    cell.wait("ready").await;
    assert_eq!(cell.value("1+1").await, "2");
    server.finish().await.unwrap();
}

/// The same by the Model Context Protocol.
async fn an_agent_asks_for_packages(server: &Server) {
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}});
    let params = json!({"name": "create_session", "arguments": {"packages": ["tiny_cell==1.0"]}, "_meta": meta});
    let message = json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params});
    let asked = server.request(reqwest::Method::POST, "/mcp").header("accept", "application/json, text/event-stream");
    let asked = asked.header("mcp-protocol-version", "2026-07-28").header("mcp-method", "tools/call");
    let answer = server.send(asked.header("mcp-name", "create_session").json(&message)).await;
    let made = &answer.json["result"]["structuredContent"];
    assert_eq!(made["state"], "ready", "{}", answer.text);
    let run = json!({"code": "import tiny_cell; tiny_cell.version"});
    let ran = server.post(&format!("/v1/sessions/{}/executions", text(&made["id"])), &run).await;
    assert!(ran.text.contains("'1.0'"), "{}", ran.text);
    server.delete(&format!("/v1/sessions/{}", text(&made["id"]))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_is_kept_to_and_none_is_explained() {
    let (server, _, _folder) = shop().await;
    let cell = server.create(json!({"template": "listed", "packages": ["tiny-cell"]})).await;
    assert_eq!(own(&cell).await, ["tiny-cell 1.1"], "the newest that is permitted");
    for (name, why) in [
        ("unlisted", "not among what the template's packages policy permits: tiny-cell<2 needy"),
        ("--index-url=https://index.example.org/simple", "Allowed is a package's name"),
        ("-r/etc/passwd", "Allowed is a package's name"),
        ("tiny-cell --pre", "Allowed is a package's name"),
        ("https://files.example.org/packages/unlisted-1.0-py3-none-any.whl", "Allowed is a package's name"),
        ("tiny-cell @ file:///workspace", "Allowed is a package's name"),
    ] {
        let refused = install(&cell, &[name]).await;
        let problem = refused.problem(422, "spec-rejected");
        assert!(text(&problem["errors"][0]["message"]).contains(why), "{name}: {}", refused.text);
        assert_eq!(refused.pointers(), ["/packages/0"]);
    }
    // What is needed in turn, and a version that is not listed.
    let refused = install(&cell, &["needy"]).await;
    assert!(
        text(&refused.problem(422, "install-failed")["detail"]).contains("unlisted is not among"),
        "{}",
        refused.text
    );
    let refused = install(&cell, &["tiny-cell==2.0"]).await;
    assert!(text(&refused.problem(422, "install-failed")["detail"]).contains("tiny-cell==2.0"), "{}", refused.text);
    // Code that asks for itself gets no more.
    let told = cell.run("!pip install unlisted").await;
    assert!(told.to_string().contains("unlisted is not among what the template's packages policy permits"), "{told}");
    let asked = r#"
import urllib.request, urllib.error, json
def get(path):
    try:
        with urllib.request.urlopen("http://packages.upstream" + path) as r: return r.status, r.read().decode()
    except urllib.error.HTTPError as e: return e.code, e.read().decode()
page = json.loads(get("/simple/tiny-cell/")[1]); url = page["files"][0]["url"].split("packages.upstream")[1]
print(json.dumps([[f["filename"] for f in page["files"]], get("/simple/unlisted/")[0], get("/simple/../simple/unlisted/")[0], get("/files/x/files.example.org/443/a.whl")[0],
    get(url.replace("tiny_cell-1.0", "unlisted-1.0"))[0], get("/")[0], get(url + ".metadata")[0], len(get("/why")[1]) > 20, get("/why")[1]]))"#;
    let told = cell.json(asked).await;
    let files = json!(["tiny_cell-1.0-py3-none-any.whl", "tiny_cell-1.1-py3-none-any.whl"]);
    assert_eq!(told, json!([files, 403, 404, 403, 403, 403, 502, true, ""]));

    let shut = server.create(json!({"template": "shut"})).await;
    let refused = install(&shut, &["tiny-cell"]).await;
    assert!(
        text(&refused.problem(422, "spec-rejected")["errors"][0]["message"]).contains("policy is \"none\""),
        "{}",
        refused.text
    );
    let refused = server.post("/v1/sessions", &json!({"template": "shut", "packages": ["tiny-cell"]})).await;
    assert_eq!((refused.status, refused.pointers()), (422, vec!["/packages".to_owned()]));
    for line in ["%pip install tiny-cell", "!pip install tiny-cell", "!python -m pip install tiny-cell"] {
        let began = Instant::now();
        let told = shut.run(line).await;
        let took = began.elapsed();
        assert!(
            told.to_string().contains("the packages policy of this session's template is \\\"none\\\""),
            "{line}: {told}"
        );
        assert!(took < Duration::from_secs(3), "{line}: {took:?}");
    }
    server.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_much_or_can_not_be_installed_says_so_and_leaves_nothing() {
    let (server, _, _folder) = shop().await;
    let cell = server.create(json!({})).await;
    for (name, why) in [
        ("sourced", "sourced is offered as source code only, which needs a compiler"),
        ("missing", "the index index.example.org has no package missing"),
        ("bigger", "would add more than 12582912 bytes (packages.size)"),
        ("biggest", "allowed are 12582912 (packages.size)"),
    ] {
        let refused = install(&cell, &[name]).await;
        let detail = text(&refused.problem(422, "install-failed")["detail"]);
        assert!(detail.contains(why), "{name}: {detail}");
    }
    let began = Instant::now();
    let refused = install(&cell, &["slow"]).await;
    let detail = text(&refused.problem(422, "install-failed")["detail"]);
    assert!(detail.contains("it took longer than 20 s"), "{detail}");
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    // The next one is not held up by it.
    assert_eq!(install(&cell, &["tiny-cell"]).await.status, 200);
    assert_eq!(own(&cell).await, ["tiny-cell 2.0"]);
    assert_eq!(
        cell.value("import os; [n for n in os.listdir('/workspace/.packages') if n.startswith('.new')]").await,
        "[]"
    );

    let tight = server.create(json!({"template": "tight"})).await;
    let refused = install(&tight, &["big"]).await;
    let detail = text(&refused.problem(422, "install-failed")["detail"]);
    assert!(detail.starts_with("the packages were not installed: the session's disk is full"), "{detail}");
    assert_eq!(tight.value("n = open('/workspace/x', 'wb').write(b'x' * (5 << 20)); n").await, "5242880");
    assert_eq!(tight.value("1+1").await, "2");
    tight.value("os = __import__('os'); os.unlink('/workspace/x')").await;
    assert_eq!(install(&tight, &["tiny-cell"]).await.status, 200);

    let refused = server.post("/v1/sessions", &json!({"name": "first", "packages": ["sourced"]})).await;
    assert!(text(&refused.problem(422, "install-failed")["detail"]).contains("source code only"), "{}", refused.text);
    let live = server.get("/v1/sessions").await.json;
    assert!(
        !live["sessions"].as_array().unwrap().iter().any(|s| s["name"] == "first" && s["state"] != "ended"),
        "{live}"
    );
    server.finish().await.unwrap();
}
