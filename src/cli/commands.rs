//! The commands that talk to a running server. Each returns its exit code; failures are printed by the caller.

use std::io::Write as _;

use jiff::Timestamp;
use reqwest::{Method, Response};
use serde_json::{Value, json};

use super::args::{ExecArgs, Place, PsArgs, RmArgs, ServerArgs, SessionsArgs};
use super::client::Client;
use super::images::Images;
use super::problem::Failure;
use super::render::{FAILED, OK, Renderer};
use super::text::{escape_line, field, size, span, table};
use super::waiting::while_waiting;
use crate::config::Environment;

const SESSIONS: [&str; 2] = ["v1", "sessions"];

/// `ps`: a table of sessions, or a JSON list.
///
/// # Errors
/// Those of the server and of printing.
pub async fn ps(args: &PsArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, environment)?;
    let mut sessions = while_waiting("listing sessions", client.list(&SESSIONS, &label_query(&args.labels))).await?;
    sessions.retain(|session| args.all || session["state"] != "ended");
    if json {
        return print_json(&Value::Array(sessions));
    }
    let now = Timestamp::now();
    let rows: Vec<Vec<String>> = sessions.iter().map(|session| session_row(session, now)).collect();
    print(&table(&["ID", "NAME", "STATE", "TEMPLATE", "AGE", "IDLE IN"], &rows))
}

fn session_row(session: &Value, now: Timestamp) -> Vec<String> {
    let time = |name: &str| session[name].as_str().and_then(|text| text.parse::<Timestamp>().ok());
    let seconds = |from: Timestamp, to: Timestamp| span(to.as_second() - from.as_second());
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let mut row: Vec<String> = ["id", "name", "state", "template"].map(|name| field(session, name)).to_vec();
    row.push(or_none(time("created_at").map(|created| seconds(created, now))));
    row.push(or_none(time("idle_deadline").map(|deadline| seconds(now, deadline))));
    row
}

/// `rm`: ends sessions, all of them even if one can't be.
///
/// # Errors
/// The server doesn't answer.
pub async fn rm(args: &RmArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, environment)?;
    let named = if args.all { live_sessions(&client, args).await? } else { args.sessions.clone() };
    each(&named, json.then_some("removed"), async |name| remove(&client, name).await).await
}

/// `pause`: freezes sessions, all that can be.
///
/// # Errors
/// The server doesn't answer.
pub async fn pause(args: &SessionsArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, environment)?;
    let act = async |name: &str| post(&client, name, "pause", "pausing").await;
    each(&args.sessions, json.then_some("paused"), act).await
}

/// `resume`: resumes sessions, all that can be.
///
/// # Errors
/// The server doesn't answer.
pub async fn resume(args: &SessionsArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, environment)?;
    let act = async |name: &str| post(&client, name, "resume", "resuming").await;
    each(&args.sessions, json.then_some("resumed"), act).await
}

/// Does something to each session, or key, and prints the ids of those it was done to: one a line, or as JSON under a name. The others go to stderr.
pub(super) async fn each(
    named: &[String],
    json: Option<&str>,
    act: impl AsyncFn(&str) -> Result<String, Failure>,
) -> Result<u8, Failure> {
    let (mut done, mut code) = (Vec::new(), OK);
    for name in named {
        match act(name).await {
            Ok(id) if json.is_some() => done.push(id),
            Ok(id) => {
                print(&format!("{}\n", escape_line(&id)))?;
            }
            Err(failure @ (Failure::Problem(_) | Failure::Usage(_))) => {
                code = FAILED;
                eprintln!("cellblock: {}: {failure}", escape_line(name));
            }
            Err(failure) => return Err(failure),
        }
    }
    if let Some(word) = json {
        print_json(&json!({ word: done }))?;
    }
    Ok(code)
}

async fn post(client: &Client, name: &str, action: &str, doing: &str) -> Result<String, Failure> {
    let id = client.find_session(name).await?;
    let request = client.request(Method::POST, &["v1", "sessions", &id, action]);
    while_waiting(&format!("{doing} {}", escape_line(name)), client.send_json(request)).await?;
    Ok(id)
}

async fn live_sessions(client: &Client, args: &RmArgs) -> Result<Vec<String>, Failure> {
    let sessions = client.list(&SESSIONS, &label_query(&args.labels)).await?;
    let live = sessions.iter().filter(|session| session["state"] != "ended" && session["state"] != "ending");
    Ok(live.filter_map(|session| session["id"].as_str().map(str::to_owned)).collect())
}

async fn remove(client: &Client, name: &str) -> Result<String, Failure> {
    let id = client.find_session(name).await?;
    let request = client.request(Method::DELETE, &["v1", "sessions", &id]);
    while_waiting(&format!("ending {}", escape_line(name)), client.send_json(request)).await?;
    Ok(id)
}

/// `images`: a table of templates.
///
/// # Errors
/// Those of the server and of printing.
pub async fn images(args: &ServerArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(args, environment)?;
    let templates = client.list(&["v1", "templates"], &[]).await?;
    if json {
        return print_json(&Value::Array(templates));
    }
    let row = |template: &Value| {
        let mut row: Vec<String> = ["name", "image", "image_id"].map(|name| field(template, name)).to_vec();
        row[2] = row[2].trim_start_matches("sha256:").chars().take(12).collect();
        row.push(field(template, "description"));
        row
    };
    let rows: Vec<Vec<String>> = templates.iter().map(row).collect();
    print(&table(&["TEMPLATE", "IMAGE", "IMAGE ID", "DESCRIPTION"], &rows))
}

/// `health`: 0 if the server says that it is ready, else 1.
///
/// # Errors
/// Only those of printing and of the command line: a server that doesn't answer isn't ready.
pub async fn health(args: &ServerArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(args, environment)?;
    let request = client.request(Method::GET, &["readyz"]).timeout(std::time::Duration::from_secs(5));
    let answer = client.send(request).await;
    match (&answer, json) {
        (_, true) => print_json(&json!({ "ready": answer.is_ok(), "url": client.url().as_str() }))?,
        (Ok(_), false) => print("ready\n")?,
        (Err(failure), false) => {
            eprintln!("cellblock: not ready: {failure}");
            OK
        }
    };
    Ok(u8::from(answer.is_err()))
}

/// `exec`: runs code and shows its output as it comes.
///
/// # Errors
/// Those of the server, of files and of printing.
pub async fn exec(args: &ExecArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let (place, source) = args.target().map_err(Failure::Usage)?;
    let code = source.read().map_err(Failure::Usage)?;
    let client = Client::connect(&args.server, environment)?;
    let session = session_at(&client, &place, args).await?;
    let outcome = run_code(&client, &session, &code, args, json).await;
    if !args.rm {
        return outcome;
    }
    // The outcome of the code is what the caller wants to know first.
    match (outcome, remove(&client, &session).await) {
        (Ok(OK), Err(failure)) => Err(failure),
        (outcome, Err(failure)) => {
            eprintln!("cellblock: {session} was not ended: {failure}");
            outcome
        }
        (outcome, Ok(_)) => outcome,
    }
}

async fn session_at(client: &Client, place: &Place, args: &ExecArgs) -> Result<String, Failure> {
    match place {
        Place::Id(id) => return Ok(id.to_string()),
        Place::Name(name) => return client.find_session(name).await,
        Place::New => {}
    }
    let body = match &args.template {
        Some(template) => json!({ "template": template }),
        None => json!({}),
    };
    let request = client.request(Method::POST, &SESSIONS).json(&body);
    let session = while_waiting("starting a session", client.send_json(request)).await?;
    let Some(id) = session["id"].as_str() else {
        return Err(Failure::Garbled("a session without an id".to_owned()));
    };
    if !args.rm {
        eprintln!("session {}", escape_line(id));
    }
    Ok(id.to_owned())
}

async fn run_code(client: &Client, session: &str, code: &str, args: &ExecArgs, json: bool) -> Result<u8, Failure> {
    let mut body = json!({ "code": code });
    if let Some(limit) = args.timeout {
        body["timeout_seconds"] = json!(limit.as_secs_f64());
    }
    let request = client.request(Method::POST, &["v1", "sessions", session, "executions"]).json(&body);
    let request = request.header("accept", "application/x-ndjson");
    let mut renderer = Renderer::to_terminal(json, Images::new(args.out.clone()));
    let streamed = async {
        let response = while_waiting("waiting for the session", client.send(request)).await?;
        stream(response, &mut renderer).await
    };
    interruptible(client, session, streamed).await?;
    for blob in renderer.take_blobs() {
        let path: Vec<&str> = blob.path.trim_start_matches('/').split('/').collect();
        let content = client.read(client.send(client.request(Method::GET, &path)).await?).await?;
        let file = blob.save(&content)?;
        eprintln!("[{}, {}]", size(content.len() as u64), file.display());
    }
    Ok(renderer.finish()?)
}

async fn stream<O: std::io::Write, E: std::io::Write>(
    response: Response,
    renderer: &mut Renderer<O, E>,
) -> Result<(), Failure> {
    Client::each_line(response, |event| Ok(renderer.event(event)?)).await
}

/// The first Ctrl-C interrupts the code and goes on to show how it ends; the second one stops waiting for that.
async fn interruptible(
    client: &Client,
    session: &str,
    running: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let mut running = std::pin::pin!(running);
    tokio::select! {
        ended = &mut running => return ended,
        _ = tokio::signal::ctrl_c() => {}
    }
    eprintln!("[interrupting the code; once more to stop waiting]");
    let interrupt = client.send_json(client.request(Method::POST, &["v1", "sessions", session, "interrupt"]));
    let both = async { tokio::join!(&mut running, interrupt) };
    tokio::select! {
        (ended, interrupted) = both => ended.and(interrupted.map(|_| ())),
        _ = tokio::signal::ctrl_c() => Err(Failure::Usage("stopped waiting; the code may go on".to_owned())),
    }
}

fn label_query(labels: &[(String, String)]) -> Vec<(&'static str, String)> {
    labels.iter().map(|(name, value)| ("label", format!("{name}:{value}"))).collect()
}

pub(super) fn print_json(value: &Value) -> Result<u8, Failure> {
    print(&format!("{value:#}\n"))
}

pub(super) fn print(text: &str) -> Result<u8, Failure> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(OK)
}
