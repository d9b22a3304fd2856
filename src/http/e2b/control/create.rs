//! A sandbox is made: what E2B's clients ask for, as what the service takes. What is asked for and can't be had is refused, with its field; nothing is left out quietly.

use std::collections::BTreeMap;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::Value;

use super::super::error::Refusal;
use super::super::sandbox::{Account, LABEL_AUTO_RESUME, LABEL_TEMPLATE};
use super::in_their_words;
use super::network::{NetworkConfig, no_way_out};
use super::view::SandboxView;
use crate::domain::egress::{NetworkMode, NetworkRequest};
use crate::domain::spec::{FieldError, OnExpiry, OnIdle, SessionRequest};
use crate::http::App;
use crate::http::extract::{Answer, Keyed};
use crate::http::problem::Problem;
use crate::http::v1::sessions::{First, begin};
use crate::service::Error;
use crate::service::keys::Principal;
use crate::session::registry::Created;

/// Our names of fields, and theirs.
const NAMES: [(&str, &str); 5] = [
    ("/template", "/templateID"),
    ("/timeouts/lifetime_seconds", "/timeout"),
    ("/env", "/envVars"),
    ("/network/allow", "/network/allowOut"),
    ("/network/mode", "/network/allowOut"),
];

/// What a sandbox is to be. Clients leave out what their callers do not say, or send null.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct NewSandbox {
    #[serde(rename = "templateID")]
    template: String,
    /// Seconds.
    timeout: Option<f64>,
    metadata: Option<BTreeMap<String, String>>,
    env_vars: Option<BTreeMap<String, String>>,
    /// Every sandbox has tokens, so there is nothing to choose.
    #[serde(rename = "secure")]
    _secure: Option<bool>,
    #[serde(rename = "allow_internet_access")]
    allow_internet_access: Option<bool>,
    auto_pause: Option<bool>,
    auto_pause_memory: Option<bool>,
    auto_resume: Option<AutoResume>,
    network: Option<NetworkConfig>,
    mcp: Option<Value>,
    iam: Option<Value>,
    volume_mounts: Option<Vec<Value>>,
}

/// Whether traffic resumes a paused sandbox.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AutoResume {
    #[serde(default)]
    enabled: bool,
}

/// `POST /sandboxes`. Its clients say that they want the internet where their callers have said nothing, so that is no wish.
pub(super) async fn create(account: Account, body: Result<Keyed<NewSandbox>, Problem>) -> Result<Response, Refusal> {
    let Keyed(mut asked, key) = body.map_err(Refusal::of_control)?;
    asked.allow_internet_access = asked.allow_internet_access.filter(|wanted| !wanted);
    make(account, Keyed(asked, key)).await
}

/// `POST /v2/sandboxes`.
pub(super) async fn create_secured(
    account: Account,
    body: Result<Keyed<NewSandbox>, Problem>,
) -> Result<Response, Refusal> {
    make(account, body.map_err(Refusal::of_control)?).await
}

async fn make(Account { app, who }: Account, Keyed(asked, key): Keyed<NewSandbox>) -> Result<Response, Refusal> {
    let request = asked.resolve(&app, &who).map_err(|wrong| in_their_words(Error::SpecRejected(wrong), &NAMES))?;
    let made = match begin(&app, &who, key).map_err(Refusal::of_control)? {
        First::New(once) => match app.service.create_session(&who, &request, true, once).await {
            Ok(Created::New(session) | Created::Reused(session)) => Ok(session),
            Err(error) => Err(error),
        },
        First::Made(made) => app.service.made_session(&who, made, true).await,
    };
    let session = made.map_err(refused)?;
    Ok((StatusCode::CREATED, Answer(SandboxView::of(&app, &session))).into_response())
}

/// A template that is not there is one to clients, too.
fn refused(error: Error) -> Refusal {
    let is_missing =
        matches!(&error, Error::SpecRejected(fields) if fields.iter().any(|field| field.pointer == "/template"));
    let refusal = in_their_words(error, &NAMES);
    if is_missing { refusal.with_status(StatusCode::NOT_FOUND) } else { refusal }
}

impl NewSandbox {
    fn resolve(self, app: &App, who: &Principal) -> Result<SessionRequest, Vec<FieldError>> {
        let mut errors = self.not_had();
        let door = app.e2b.clone().unwrap_or_default();
        let template = door.template(&self.template).to_owned();
        let network = self.network.unwrap_or_default().resolve(self.allow_internet_access);
        let network = network.unwrap_or_else(|wrong| {
            errors.extend(
                wrong.into_iter().map(|field| FieldError { pointer: format!("/network{}", field.pointer), ..field }),
            );
            NetworkRequest::default()
        });
        if self.allow_internet_access == Some(true)
            && (network.mode, &network.allow) == (Some(NetworkMode::Allowlist), &None)
        {
            // A template that is not there is told by the service.
            let offered = app.service.offered(who).into_iter().find(|offered| offered.name == template);
            errors.extend(offered.and_then(|offered| no_way_out(&offered.network)));
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let resumes = self.auto_resume.is_some_and(|auto_resume| auto_resume.enabled);
        let labels = [(LABEL_TEMPLATE, Some(self.template)), (LABEL_AUTO_RESUME, resumes.then(|| "true".to_owned()))];
        Ok(SessionRequest {
            template: Some(template),
            env: self.env_vars.unwrap_or_default(),
            labels: labels.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect(),
            metadata: self.metadata.unwrap_or_default(),
            lifetime_seconds: self.timeout,
            // Its time is its life, whichever template it has.
            on_idle: Some(OnIdle::Keep),
            on_expiry: if self.auto_pause == Some(true) { OnExpiry::Pause } else { OnExpiry::Delete },
            network,
            ..SessionRequest::default()
        })
    }

    /// What is asked for and is not here.
    fn not_had(&self) -> Vec<FieldError> {
        let is_there = |value: &Option<Value>| match value {
            None | Some(Value::Null) => false,
            Some(Value::Object(fields)) => !fields.is_empty(),
            Some(_) => true,
        };
        let resumes = self.auto_resume.as_ref().is_some_and(|auto_resume| auto_resume.enabled);
        [
            ("/mcp", is_there(&self.mcp), "no server of the Model Context Protocol is started in a sandbox"),
            ("/iam", is_there(&self.iam), "sandboxes have no identities at other services"),
            ("/volumeMounts", self.volume_mounts.as_ref().is_some_and(|all| !all.is_empty()), "there are no volumes"),
            ("/autoPauseMemory", self.auto_pause_memory == Some(false), super::life::KEEPS_MEMORY),
            ("/autoResume", resumes && self.auto_pause != Some(true), "it goes with autoPause only"),
        ]
        .into_iter()
        .filter(|(_, is_asked, _)| *is_asked)
        .map(|(pointer, _, message)| FieldError::new(pointer, message))
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Value) -> NewSandbox {
        crate::http::extract::from_value(body).unwrap()
    }

    #[test]
    fn what_clients_send_by_themselves_asks_for_nothing() {
        let usual = [
            json!({"templateID": "base", "metadata": {}, "envVars": {}}),
            json!({"templateID": "base", "secure": true, "mcp": null, "iam": {}, "volumeMounts": [], "autoResume": {"enabled": false}}),
        ];
        for body in usual {
            assert_eq!(read(body.clone()).not_had(), [], "{body}");
        }
    }

    #[test]
    fn what_is_not_here_is_told_by_its_field() {
        let asked = json!({
            "templateID": "base", "mcp": {"a": {}}, "iam": {"tokens": {"t": 1}}, "volumeMounts": [{"name": "v", "path": "/v"}],
            "autoPauseMemory": false, "autoResume": {"enabled": true}
        });
        let told: Vec<_> = read(asked).not_had().into_iter().map(|field| field.pointer).collect();
        assert_eq!(told, ["/mcp", "/iam", "/volumeMounts", "/autoPauseMemory", "/autoResume"]);
        let unknown = crate::http::extract::from_value::<NewSandbox>(json!({"templateID": "base", "gpu": 1}));
        assert_eq!(unknown.unwrap_err()[0].pointer, "/gpu");
    }
}
