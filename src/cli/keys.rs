//! `keys`: makes, lists and revokes API keys of a running server.

use reqwest::Method;
use serde_json::{Value, json};

use super::args::{CreateKeyArgs, KeysCommand, ListKeysArgs, RevokeKeysArgs};
use super::client::Client;
use super::commands::{each, print, print_json};
use super::problem::Failure;
use super::text::{escape_line, field, table};
use super::waiting::while_waiting;
use crate::config::Environment;
use crate::domain::access::{E2B_PREFIX, PREFIX};

const KEYS: [&str; 2] = ["v1", "keys"];

/// Performs what `keys` is to do.
///
/// # Errors
/// Those of the server and of printing.
pub async fn perform(command: &KeysCommand, json: bool, environment: &Environment) -> Result<u8, Failure> {
    match command {
        KeysCommand::Create(args) => create(args, json, environment).await,
        KeysCommand::List(args) => list(args, json, environment).await,
        KeysCommand::Revoke(args) => revoke(args, json, environment).await,
    }
}

/// Prints the key alone, so that it can be put into a file; what else there is to say goes to stderr.
async fn create(args: &CreateKeyArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, environment)?;
    let mut body = json!({ "name": args.name, "scopes": args.scopes });
    if let Some(tenant) = &args.tenant {
        body["tenant"] = json!(tenant);
    }
    if !args.templates.is_empty() {
        body["templates"] = json!(args.templates);
    }
    if let Some(time) = args.expires {
        body["expires_in_seconds"] = json!(time.as_secs_f64());
    }
    let request = client.request(Method::POST, &KEYS).json(&body);
    let mut made = while_waiting("making a key", client.send_json(request)).await?;
    if args.e2b {
        made["key"] = in_e2bs_words(&made["key"]);
    }
    if json {
        return print_json(&made);
    }
    let Some(key) = made["key"].as_str() else { return Err(Failure::Garbled("an answer without a key".to_owned())) };
    eprintln!("{} for tenant {}; the key is shown this once", field(&made, "id"), field(&made, "tenant"));
    print(&format!("{}\n", escape_line(key)))
}

/// The same key with the prefix that clients of E2B ask for; older ones send no other.
fn in_e2bs_words(key: &Value) -> Value {
    match key.as_str().and_then(|key| key.strip_prefix(PREFIX)) {
        Some(digits) => json!(format!("{E2B_PREFIX}{digits}")),
        None => key.clone(),
    }
}

async fn list(args: &ListKeysArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, environment)?;
    let query: Vec<(&str, String)> = args.tenant.iter().map(|tenant| ("tenant", tenant.clone())).collect();
    let keys = while_waiting("listing keys", client.list(&KEYS, &query)).await?;
    if json {
        return print_json(&Value::Array(keys));
    }
    let row = |key: &Value| {
        let words = |name: &str, none: &str| match key[name].as_array() {
            Some(words) => words.iter().filter_map(Value::as_str).map(escape_line).collect::<Vec<_>>().join(","),
            None => none.to_owned(),
        };
        let [id, name, tenant, expires, source] =
            ["id", "name", "tenant", "expires_at", "source"].map(|name| field(key, name));
        vec![id, name, tenant, words("scopes", "-"), words("templates", "all"), expires, source]
    };
    let rows: Vec<Vec<String>> = keys.iter().map(row).collect();
    print(&table(&["ID", "NAME", "TENANT", "SCOPES", "TEMPLATES", "EXPIRES", "FROM"], &rows))
}

async fn revoke(args: &RevokeKeysArgs, json: bool, environment: &Environment) -> Result<u8, Failure> {
    let client = Client::connect(&args.server, environment)?;
    let act = async |id: &str| {
        let request = client.request(Method::DELETE, &[KEYS[0], KEYS[1], id]);
        while_waiting(&format!("revoking {}", escape_line(id)), client.send_json(request)).await?;
        Ok(id.to_owned())
    };
    each(&args.ids, json.then_some("revoked"), act).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_for_clients_of_e2b_has_the_same_digits() {
        assert_eq!(in_e2bs_words(&json!("cb_0123456789abcdef")), json!("e2b_0123456789abcdef"));
        assert_eq!(in_e2bs_words(&Value::Null), Value::Null);
    }
}
