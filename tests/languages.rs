//! Every language's image with its real kernel: what a session promises in Python holds in each of them, as far as its kernel can.

#[path = "support/server.rs"]
mod server;

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use server::{Cell, Server, text};

/// The same things said in one language.
struct Language {
    template: &'static str,
    /// As callers name it.
    name: &'static str,
    /// Prints 42, out of a variable that stays.
    sets: &'static str,
    /// Prints the variable's double.
    uses: &'static str,
    /// Prints the variable `COLOUR` of the environment and the working folder.
    looks: &'static str,
    /// Fails, and says `no such luck` in its error.
    fails: &'static str,
    /// Runs for ever, and can be interrupted.
    hangs: &'static str,
    /// Prints without end, or as much as the kernel gives away before its end, and how that ends.
    floods: &'static str,
    floods_to: &'static str,
    /// Prints the line that it asks for, where the kernel can ask.
    asks: Option<&'static str>,
    /// Ends its own kernel.
    dies: &'static str,
    /// Takes memory without end.
    eats: &'static str,
    /// Prints `no way` if neither a file can be put beside the system's nor a host be reached.
    escapes: &'static str,
}

const BASH: Language = Language {
    template: "bash",
    name: "bash",
    sets: "x=42; echo $x",
    uses: "echo $((x * 2))",
    looks: "echo $COLOUR; pwd",
    fails: "echo 'no such luck' >&2; false",
    hangs: "sleep 1000",
    floods: "yes 0123456789012345678901234567890123456789",
    floods_to: "timeout",
    asks: None,
    dies: "kill -9 $PPID",
    eats: "x=$(head -c 3000000000 /dev/zero | tr '\\0' x)",
    escapes: "touch /usr/bin/mine 2>/dev/null || (exec 3<>/dev/tcp/192.0.2.1/80) 2>/dev/null || echo no way",
};

const DENO: Language = Language {
    template: "deno",
    name: "typescript",
    sets: "let x: number = 42; console.log(x)",
    uses: "console.log(x * 2)",
    looks: "console.log(Deno.env.get('COLOUR')); console.log(Deno.cwd())",
    fails: "throw new Error('no such luck')",
    hangs: "while (true) {}",
    // A loop that never waits lets Deno send nothing, and all that it prints is kept in memory.
    floods: "while (true) { console.log('0123456789'.repeat(100)); await new Promise(r => setTimeout(r)); }",
    floods_to: "timeout",
    asks: Some("console.log(prompt('name?'))"),
    dies: "Deno.exit(3)",
    eats: "const all = []; while (true) all.push(new Uint8Array(1 << 24).fill(1))",
    escapes: "try { Deno.writeTextFileSync('/usr/bin/mine', ''); } catch { try { await Deno.connect({hostname: '192.0.2.1', port: 80}); } catch { console.log('no way') } }",
};

const R: Language = Language {
    template: "r",
    name: "r",
    sets: "x <- 42; cat(x)",
    uses: "cat(x * 2)",
    looks: "cat(Sys.getenv('COLOUR'), getwd(), sep = '\\n')",
    fails: "stop('no such luck')",
    hangs: "while (TRUE) {}",
    // What an expression prints is told at its end, line by line, and long texts slowly.
    floods: "cat(strrep('0123456789', 20000))",
    floods_to: "ok",
    asks: Some("cat(readline('name?'))"),
    dies: "quit('no', 3)",
    eats: "all <- list(); repeat all[[length(all) + 1]] <- rep(1, 1e7)",
    escapes: "if (!suppressWarnings(file.create('/usr/bin/mine'))) tryCatch(socketConnection('192.0.2.1', 80, timeout = 5), error = function(e) cat('no way'), warning = function(w) cat('no way'))",
};

const PYTHON: Language = Language {
    template: "python",
    name: "python",
    sets: "x = 42; print(x)",
    uses: "print(x * 2)",
    looks: "import os; print(os.environ['COLOUR'], os.getcwd(), sep='\\n')",
    fails: "raise ValueError('no such luck')",
    hangs: "while True: pass",
    floods: "while True: print('0123456789012345678901234567890123456789')",
    floods_to: "timeout",
    asks: Some("print(input('name?'))"),
    dies: "import os; os._exit(3)",
    eats: "all = []\nwhile True: all.append(b'x' * (1 << 24))",
    escapes: "import socket\ntry: open('/usr/bin/mine', 'w')\nexcept OSError:\n    try: socket.create_connection(('192.0.2.1', 80), 5)\n    except OSError: print('no way')",
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn languages() {
    let recipe = build_recipe().await;
    let server = Server::start(&format!("[templates.mine]\nimage = \"{recipe}\"\n")).await;
    let cases = cases![server; bash, typescript, r, python, many_languages_share_a_session, a_language_that_is_not_there, an_image_made_by_the_recipe];
    server.run_and_finish(2, cases).await;
}

async fn bash(server: Arc<Server>) {
    holds(&server, &BASH).await;
}

async fn typescript(server: Arc<Server>) {
    holds(&server, &DENO).await;
}

async fn r(server: Arc<Server>) {
    holds(&server, &R).await;
}

async fn python(server: Arc<Server>) {
    holds(&server, &PYTHON).await;
}

async fn holds(server: &Arc<Server>, language: &Language) {
    let cell = server.create(json!({"template": language.template, "env": {"COLOUR": "teal"}})).await;
    prints(&cell, language.sets, "42", "first").await;
    prints(&cell, language.uses, "84", "second").await;
    let looks = text(&cell.run(language.looks).await["stdout"]);
    assert_eq!(looks.split_whitespace().collect::<Vec<_>>(), ["teal", "/workspace"], "{}", language.name);

    let failed = cell.run(language.fails).await;
    assert_eq!(failed["status"], "error", "{failed}");
    assert!(failed.to_string().contains("no such luck"), "{failed}");

    let escaped = cell.run(language.escapes).await;
    assert_eq!(escaped["stdout"].as_str().map(str::trim), Some("no way"), "{escaped}");

    let stopped = cell.execute(json!({"code": language.hangs, "timeout_seconds": 1})).await;
    assert_eq!(stopped["status"], "timeout", "{stopped}");
    let kept = &stopped["stop"]["variables_kept"];
    assert_eq!(*kept, stopped["stop"]["step"] == "interrupt", "{}: {stopped}", language.name);
    if *kept == true {
        prints(&cell, language.uses, "84", "after an interrupt").await;
    }

    let flooded =
        cell.execute(json!({"code": language.floods, "timeout_seconds": 2, "max_output_bytes": 10_000})).await;
    assert_eq!(flooded["status"], language.floods_to, "{}: {flooded}", language.name);
    assert_eq!(flooded["output"]["stdout"]["truncated"], true, "{}: {flooded}", language.name);
    assert!(text(&flooded["stdout"]).len() < 20_000);

    if let Some(asks) = language.asks {
        let asked = cell.execute(json!({"code": asks, "stdin": ["Hanna"], "timeout_seconds": 10})).await;
        assert_eq!(asked["stdout"].as_str().map(str::trim), Some("Hanna"), "{}: {asked}", language.name);
        let denied = cell.execute(json!({"code": asks, "timeout_seconds": 10})).await;
        assert_ne!(denied["status"], "timeout", "{}: {denied}", language.name);
    }

    let died = cell.run(language.dies).await;
    assert!(["kernel_died", "error", "ok"].contains(&died["status"].as_str().unwrap_or("")), "{died}");
    prints(&cell, language.sets, "42", &format!("after {died}")).await;

    let restarted = server.post(&cell.path("/restart"), &json!({})).await;
    assert_eq!(restarted.status, 200, "{}", restarted.json);
    prints(&cell, language.sets, "42", "after a restart").await;

    let ate = cell.execute(json!({"code": language.eats, "timeout_seconds": 60})).await;
    // Bash's kernel is another process than Bash, and starts a new one by itself.
    let is_known = ["oom", "error", "kernel_died", "timeout"].contains(&ate["status"].as_str().unwrap_or(""));
    assert!(is_known || ate["limits_hit"] == json!(["memory"]), "{ate}");
    prints(&cell, language.sets, "42", &format!("after {ate}")).await;
    cell.delete().await;
}

async fn prints(cell: &Cell, code: &str, printed: &str, when: &str) {
    let execution = cell.run(code).await;
    assert_eq!(execution["stdout"].as_str().map(str::trim), Some(printed), "{code}, {when}: {execution}");
}

async fn many_languages_share_a_session(server: Arc<Server>) {
    let cell = server.create(json!({"template": "polyglot"})).await;
    for language in [&PYTHON, &BASH, &R, &DENO] {
        let name = language.name;
        let (first, second) = tokio::join!(
            cell.execute(json!({"code": language.sets, "language": name})),
            cell.execute(json!({"code": "", "language": name.to_uppercase()}))
        );
        assert_eq!(first["stdout"].as_str().map(str::trim), Some("42"), "{name}: {first}");
        assert_eq!(first["context_id"], second["context_id"], "{name}: two at once share one kernel");
        let used = cell.execute(json!({"code": language.uses, "language": name})).await;
        assert_eq!(used["stdout"].as_str().map(str::trim), Some("84"), "{name}: {used}");
    }
    let script = cell.execute(json!({"code": "console.log(x)", "language": "js"})).await;
    assert_eq!(
        script["stdout"].as_str().map(str::trim),
        Some("42"),
        "the kernel of TypeScript runs JavaScript too: {script}"
    );
    let contexts = server.get(&cell.path("/contexts")).await.json;
    let contexts: Vec<_> =
        contexts["contexts"].as_array().expect("contexts").iter().map(|c| text(&c["kernelspec"])).collect();
    assert_eq!(contexts, ["python3", "bash", "ir", "deno"]);
    let context = server.post(&cell.path("/contexts"), &json!({"language": "R"})).await;
    assert_eq!((context.status, &context.json["kernelspec"]), (201, &json!("ir")), "{}", context.json);
    // Files are the session's, whatever language writes them.
    cell.execute(json!({"code": "echo from bash > note.txt", "language": "sh"})).await;
    assert_eq!(cell.value("open('note.txt').read().strip()").await, "'from bash'");
    cell.delete().await;
}

async fn a_language_that_is_not_there(server: Arc<Server>) {
    let cell = server.cell().await;
    for (path, body) in [
        ("/executions", json!({"code": "1", "language": "fortran"})),
        ("/contexts", json!({"language": "fortran"})),
        ("/executions", json!({"code": "1", "language": "no name"})),
        ("/executions", json!({"code": "1", "language": "python", "context_id": text(&cell.view["default_context"])})),
        ("/contexts", json!({"language": "python", "kernelspec": "python3"})),
    ] {
        let refused = server.post(&cell.path(path), &body).await;
        let problem = refused.problem(422, "spec-rejected");
        assert_eq!(refused.pointers(), ["/language"], "{problem}");
    }
    let refused = server.post(&cell.path("/contexts"), &json!({"language": "fortran"})).await;
    assert!(refused.json.to_string().contains("it has kernels for python"), "{}", refused.json);
    cell.works().await;
    cell.delete().await;
}

/// Builds the image that the page on languages tells how to make, and gives its name.
async fn build_recipe() -> &'static str {
    const PAGE: &str = include_str!("../docs/LANGUAGES.md");
    const NAME: &str = "cellblock-test-recipe:latest";
    let (_, recipe) = PAGE.split_once("```dockerfile\n").expect("a recipe");
    let (recipe, _) = recipe.split_once("```").expect("its end");
    let mut build = Command::new("docker");
    build.args(["build", "--quiet", "--build-arg", "BASE=cellblock/base:latest", "--tag", NAME, "-"]);
    build.env("DOCKER_BUILDKIT", "0").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let built = tokio::task::spawn_blocking(move || {
        let mut child = build.spawn().expect("docker");
        // Closed with this, so that the build begins.
        child.stdin.take().expect("a pipe").write_all(recipe.as_bytes()).expect("a recipe that is taken");
        child.wait_with_output().expect("a build")
    });
    let built =
        tokio::time::timeout(Duration::from_secs(300), built).await.expect("a build in time").expect("no panic");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    NAME
}

async fn an_image_made_by_the_recipe(server: Arc<Server>) {
    let cell = server.create(json!({"template": "mine"})).await;
    cell.works().await;
    let version = cell.value("__import__('ipykernel').version_info[0]").await;
    assert_eq!(version, "6", "an older generation of the kernel than our own image's");
    cell.delete().await;
}
