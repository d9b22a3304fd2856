//! API keys over HTTP. Commands of operators: their keys need the scope "admin".

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::sessions::page_limit;
use crate::domain::ids::KeyId;
use crate::http::App;
use crate::http::extract::{Answer, Body, Caller, Id, Params};
use crate::http::problem::Problem;
use crate::service::issuing::KeyRequest;
use crate::service::keys::{ApiKeyRecord, Key};

/// The key that is asked for.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateKey {
    /// For people: 1 to 64 letters, digits, ".", "_" and "-".
    name: String,
    /// Whose it is to be, in the same letters; your own tenant when absent. A tenant is there once it has a key.
    #[serde(default)]
    tenant: Option<String>,
    /// What it is to allow: `sessions` is everything with what its tenant has, `read` looking at it, `admin` the server itself and the keys of all
    /// tenants.
    scopes: Vec<String>,
    /// The templates that it is to allow; all when absent. Sessions of others are not there for it, nor what belongs to them.
    #[serde(default)]
    templates: Option<Vec<String>>,
    /// It is not valid any more after this long; it stays when absent.
    #[serde(default)]
    expires_in_seconds: Option<f64>,
}

/// A key, but for the key.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyView {
    /// Its id.
    id: String,
    /// For people.
    name: String,
    /// Whose it is.
    tenant: String,
    /// What it allows.
    scopes: Vec<&'static str>,
    /// The templates that it allows; nothing: all.
    templates: Option<Vec<String>>,
    /// `database`: made at run time. `configuration`: it comes from the server's files, and is removed there.
    source: &'static str,
    /// When it was made; nothing for one of the configuration.
    created_at: Option<String>,
    /// It is not valid any more from then on.
    expires_at: Option<String>,
}

/// A new key.
#[derive(Debug, Serialize, ToSchema)]
pub struct NewKey {
    /// The key itself. It is told this once: the server keeps its hash only.
    key: String,
    #[serde(flatten)]
    view: KeyView,
}

/// Some keys.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyPage {
    /// In the order of their ids.
    keys: Vec<KeyView>,
    /// Where to go on; nothing at the end.
    next_cursor: Option<String>,
}

impl From<Key> for KeyView {
    fn from(key: Key) -> Self {
        let ApiKeyRecord { id, tenant, name, scopes, templates, created_at, expires_at, .. } = key.record;
        Self {
            id: id.to_string(),
            name,
            tenant: tenant.to_string(),
            scopes: scopes.iter().map(|scope| scope.name()).collect(),
            templates: templates.map(|names| names.to_vec()),
            source: if key.is_configured { "configuration" } else { "database" },
            created_at: (!key.is_configured).then(|| format!("{created_at:.3}")),
            expires_at: expires_at.map(|at| format!("{at:.3}")),
        }
    }
}

/// Make an API key
///
/// The answer is the only place where the key itself is told, so an `Idempotency-Key` has no effect here: revoke a key whose answer was lost.
/// Needs the scope `admin`.
#[utoipa::path(post, path = "/v1/keys", operation_id = "create_key", tag = "keys", request_body = CreateKey,
    responses((status = 201, body = NewKey), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn create_key(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
    Body(body): Body<CreateKey>,
) -> Result<Response, Problem> {
    params.only(&[])?;
    let CreateKey { name, tenant, scopes, templates, expires_in_seconds } = body;
    let request = KeyRequest { name, tenant, scopes, templates, expires_in_seconds };
    let (made, key) = app.service.create_key(&who, request).await?;
    let location = format!("/v1/keys/{}", made.record.id);
    let answer = Answer(NewKey { key, view: made.into() });
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], answer).into_response())
}

/// List API keys
///
/// Of all tenants; the keys themselves are kept nowhere. Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/keys", operation_id = "list_keys", tag = "keys",
    params(("tenant" = Option<String>, Query), ("limit" = Option<usize>, Query, description = "1 to 200; 50 when absent"),
        ("cursor" = Option<String>, Query, description = "From `next_cursor`")),
    responses((status = 200, body = KeyPage), (status = "4XX", body = Problem)))]
pub async fn list_keys(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
) -> Result<Answer<KeyPage>, Problem> {
    let params = params.only(&["tenant", "limit", "cursor"])?;
    let limit = page_limit(&params)?;
    let after = params.parse::<KeyId>("cursor", "a value of next_cursor")?;
    let mut found = app.service.list_keys(&who, params.get("tenant"), after)?.into_iter();
    let keys: Vec<KeyView> = found.by_ref().take(limit).map(KeyView::from).collect();
    let next_cursor = found.next().and(keys.last()).map(|key| key.id.clone());
    Ok(Answer(KeyPage { keys, next_cursor }))
}

/// Revoke an API key
///
/// No request with it is accepted any more, and streams that it has opened break off; executions that it has begun go on. One of the server's
/// configuration is a `state-conflict`. Needs the scope `admin`.
#[utoipa::path(delete, path = "/v1/keys/{id}", operation_id = "revoke_key", tag = "keys", params(("id" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn revoke_key(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<KeyId>,
    params: Params,
) -> Result<StatusCode, Problem> {
    params.only(&[])?;
    app.service.revoke_key(&who, id).await?;
    Ok(StatusCode::NO_CONTENT)
}
