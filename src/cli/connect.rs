//! `connect`: what to paste into each client, with the server's address and the key filled in. Asks the server which of its doors are open, without the key.

use reqwest::Method;
use serde_json::{Value, json};

use super::args::ConnectArgs;
use super::client::{Client, KeyPlace};
use super::commands::{print, print_json};
use super::problem::Failure;
use super::text::escape_line;
use crate::config::Environment;
use crate::connect::{self, CLIENTS, Door, Key, environment};

/// The word that asks for the variables alone.
pub(super) const VARIABLES: &str = "env";

/// Prints everything, the variables, or one client's file as it stands.
///
/// # Errors
/// The URL is none, a file can't be named, or printing fails.
pub(super) async fn perform(args: &ConnectArgs, json: bool, surroundings: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, surroundings)?;
    let url = client.url().as_str().trim_end_matches('/').to_owned();
    let open = open_doors(&client).await.unwrap_or_else(|why| {
        eprintln!("cellblock: {url} doesn't say which doors are open ({}); all are shown", escape_line(&why));
        Door::ALL.to_vec()
    });
    let is_open = |client: &connect::Client| client.door.is_none_or(|door| open.contains(&door));
    let key = key_of(KeyPlace::find(&args.server, surroundings, client.own_key_file()))?;
    let variables = environment(&url, &key, open.contains(&Door::E2b));
    let chosen = CLIENTS.iter().find(|client| args.client.as_deref() == Some(client.word));
    if let Some((client, door)) =
        chosen.and_then(|client| Some((client, client.door.filter(|door| !open.contains(door))?)))
    {
        let why = format!("{} is closed on this server: its configuration says {} = false", client.title, door.key());
        return Err(Failure::Usage(why));
    }
    let shown: Vec<&connect::Client> = match (chosen, args.client.as_deref()) {
        (Some(client), _) => vec![client],
        (None, Some(_)) => Vec::new(),
        (None, None) => CLIENTS.iter().filter(|client| is_open(client)).collect(),
    };
    if json {
        let closed: Vec<&str> = Door::ALL.iter().filter(|door| !open.contains(door)).map(|door| door.word()).collect();
        let clients: Vec<Value> = shown.into_iter().map(described).collect();
        return print_json(&json!({ "url": url, "environment": variables, "clients": clients, "closed": closed }));
    }
    match (chosen, args.client.is_some()) {
        (Some(client), _) => print(client.text),
        (None, true) => print(&variables),
        (None, false) => print(&all(&variables, &shown, &open)),
    }
}

/// Which doors the server says are open; an error says why it doesn't.
async fn open_doors(client: &Client) -> Result<Vec<Door>, String> {
    let told = client.ask_openly(Method::GET, &["connect"]).header("accept", "application/json");
    let told = client.send_json(told).await.map_err(|failure| failure.to_string())?;
    let doors = told["doors"].as_object().ok_or("there is no list of doors in its answer")?;
    Ok(Door::ALL.into_iter().filter(|door| doors.get(door.word()) == Some(&Value::Bool(true))).collect())
}

/// A key that was told is shown; one in a file stays there, and a shell reads it.
fn key_of(place: KeyPlace) -> Result<Key, Failure> {
    Ok(match place {
        KeyPlace::Nowhere => Key::Unknown,
        KeyPlace::Told(key) => Key::Told(key),
        KeyPlace::File { path, is_named } => match std::path::absolute(&path) {
            Ok(whole) if is_named || whole.exists() => Key::In(whole.display().to_string()),
            Ok(_) => Key::Unknown,
            Err(source) => return Err(Failure::File { attempted: "name", path, source }),
        },
    })
}

fn described(client: &connect::Client) -> Value {
    json!({
        "client": client.word, "title": client.title, "file": client.file, "how": client.how, "text": client.text,
        "door": client.door.map(Door::word),
    })
}

fn all(variables: &str, shown: &[&connect::Client], open: &[Door]) -> String {
    let mut out =
        format!("# Where the server is, and a key of it: eval \"$(cellblock connect {VARIABLES})\"\n{variables}");
    for client in shown {
        let connect::Client { word, title, file, how, text, .. } = client;
        out += &format!("\n--- {title}: {file}; {how} (this file alone: cellblock connect {word})\n{text}");
    }
    let closed: Vec<&str> = Door::ALL.iter().filter(|door| !open.contains(door)).map(|door| door.key()).collect();
    if !closed.is_empty() {
        out += &format!("\nClosed on this server by its configuration: {}\n", closed.join(", "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_the_variables_first_and_every_file_word_for_word() {
        let shown: Vec<_> = CLIENTS.iter().collect();
        let variables = environment("http://box", &Key::Told("cb_1".to_owned()), true);
        let text = all(&variables, &shown, &Door::ALL);
        assert!(text.lines().skip(1).collect::<Vec<_>>().join("\n").starts_with(variables.trim_end()), "{text}");
        for client in CLIENTS {
            assert!(text.contains(client.text), "{}", client.word);
        }
        assert!(!text.contains("Closed"));
        assert!(all(&variables, &shown, &[Door::Mcp]).contains("doors.jupyter, doors.e2b, doors.classic.enabled"));
    }

    #[test]
    fn a_key_in_a_file_stays_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api-key");
        let of = |is_named| key_of(KeyPlace::File { path: path.clone(), is_named }).unwrap();
        assert_eq!(of(false), Key::Unknown, "nobody has named it, and it is not there");
        std::fs::write(&path, "cb_secret").unwrap();
        for is_named in [false, true] {
            assert_eq!(of(is_named), Key::In(path.display().to_string()));
        }
    }
}
