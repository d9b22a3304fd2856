//! What a sandbox may reach, in E2B's words and in ours. E2B's sandboxes reach everything that is not denied, ours nothing that is not allowed: what its rules say is taken
//! where it means something here, and refused where it does not.

use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::error::Refusal;
use super::{Named, in_their_words};
use crate::domain::egress::{Network, NetworkMode, NetworkOffer, NetworkRequest, Rule};
use crate::domain::spec::FieldError;
use crate::http::extract::Body;
use crate::http::problem::Problem;
use crate::service::{Error, SessionPatch};

/// Everything, as E2B has it.
const ALL: [&str; 2] = ["0.0.0.0/0", "::/0"];
/// The same as a rule of ours.
const ANY_NAME: &str = "*";
/// Our names of fields, and theirs.
const NAMES: [(&str, &str); 2] = [("/network/allow", "/allowOut"), ("/network/mode", "/allowOut")];

/// What a client asks for.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub(super) struct NetworkConfig {
    allow_out: Option<Vec<String>>,
    deny_out: Option<Vec<String>>,
    /// Only where it is changed; a create has it beside this.
    #[serde(rename = "allow_internet_access")]
    allow_internet_access: Option<bool>,
    allow_public_traffic: Option<bool>,
    mask_request_host: Option<String>,
    https_ports: Option<Vec<u32>>,
    dns_servers: Option<Vec<String>>,
    egress_proxy: Option<Value>,
    rules: Option<Map<String, Value>>,
}

impl NetworkConfig {
    /// What it asks for here; nothing where it leaves all as it is. `internet` is what is said beside it.
    ///
    /// # Errors
    /// What can't be had, by its field in this.
    pub(super) fn resolve(self, internet: Option<bool>) -> Result<NetworkRequest, Vec<FieldError>> {
        let mut errors = self.not_had();
        let denied = self.deny_out.unwrap_or_default();
        for (at, what) in denied.iter().enumerate().filter(|(_, what)| !ALL.contains(&what.as_str())) {
            let message = format!(
                "{what:?}: what is not allowed is denied here, so there is nothing to take out; allowed is \"{}\"",
                ALL[0]
            );
            errors.push(FieldError::new(format!("/denyOut/{at}"), message));
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let internet = internet.or(self.allow_internet_access);
        let allow = self.allow_out.filter(|rules| !rules.is_empty());
        Ok(match (allow, internet) {
            (Some(rules), _) => {
                NetworkRequest { mode: None, allow: Some(rules.iter().map(|rule| rule_of(rule)).collect()) }
            }
            (None, Some(true)) if denied.is_empty() => {
                NetworkRequest { mode: Some(NetworkMode::Allowlist), allow: None }
            }
            (None, None) if denied.is_empty() => NetworkRequest::default(),
            (None, _) => NetworkRequest { mode: Some(NetworkMode::None), allow: None },
        })
    }

    fn not_had(&self) -> Vec<FieldError> {
        let public = "nothing in a sandbox answers without its traffic token here, which clients send by themselves";
        let own = "a sandbox's traffic goes through this server's own proxy as it is";
        let is_proxied = self.egress_proxy.as_ref().is_some_and(|proxy| !proxy.is_null());
        [
            ("/allowPublicTraffic", self.allow_public_traffic == Some(true), public),
            ("/maskRequestHost", self.mask_request_host.is_some(), "the host of a request stays as it came"),
            ("/httpsPorts", self.https_ports.as_ref().is_some_and(|ports| !ports.is_empty()), own),
            ("/dnsServers", self.dns_servers.is_some(), "names are resolved by this server"),
            ("/egressProxy", is_proxied, own),
            ("/rules", self.rules.as_ref().is_some_and(|rules| !rules.is_empty()), own),
        ]
        .into_iter()
        .filter(|(_, is_asked, _)| *is_asked)
        .map(|(pointer, _, message)| FieldError::new(pointer, message))
        .collect()
    }
}

/// A rule of E2B's as one of ours, where it is written otherwise.
fn rule_of(rule: &str) -> String {
    if ALL.contains(&rule) {
        return ANY_NAME.to_owned();
    }
    rule.strip_suffix("/32").or_else(|| rule.strip_suffix("/128")).unwrap_or(rule).to_owned()
}

/// Why a sandbox has no way out that asks for one and names nothing.
pub(super) fn no_way_out(offer: &NetworkOffer) -> Option<FieldError> {
    let message = "the template gives no way out by itself; name in allowOut what is to be reached, as far as the template permits it, or leave this out";
    offer.usual.is_empty().then(|| FieldError::new("/allow_internet_access", message))
}

/// What a sandbox may reach, for clients.
pub(super) fn told(network: &Network) -> Value {
    let allow: Vec<String> = network.allow.iter().map(ToString::to_string).collect();
    json!({"allowOut": allow, "denyOut": [ALL[0]]})
}

/// Replaces what a sandbox may reach. Without rules that is what its template gives to whoever names none.
pub(super) async fn update(
    Named { app, who, session }: Named,
    body: Result<Body<NetworkConfig>, Problem>,
) -> Result<StatusCode, Refusal> {
    let Body(asked) = body.map_err(Refusal::of_control)?;
    let asked = asked.resolve(None).map_err(|wrong| in_their_words(Error::SpecRejected(wrong), &NAMES))?;
    let offer = &session.spec.network;
    if let (Some(NetworkMode::Allowlist), None, Some(wrong)) = (asked.mode, &asked.allow, no_way_out(offer)) {
        return Err(Refusal::of_control(Error::SpecRejected(vec![wrong])));
    }
    let network = match (asked.mode, &asked.allow) {
        (Some(NetworkMode::None), _) | (_, Some(_)) => asked,
        // What it has now is not to stay, so the rules are named.
        (Some(NetworkMode::Allowlist), None) => open_to(&offer.usual),
        (None, None) => {
            let offered = app.service.offered(&who).into_iter().find(|offered| offered.name == session.spec.template);
            let initial = offered.map(|offered| offered.network.initial).unwrap_or_default();
            match initial.mode {
                NetworkMode::None => NetworkRequest { mode: Some(NetworkMode::None), allow: None },
                NetworkMode::Allowlist => open_to(&initial.allow),
            }
        }
    };
    let patch = SessionPatch { network, ..SessionPatch::default() };
    app.service.patch_session(&who, session.id, &patch).await.map_err(|error| in_their_words(error, &NAMES))?;
    Ok(StatusCode::NO_CONTENT)
}

fn open_to(rules: &[Rule]) -> NetworkRequest {
    let rules = rules.iter().map(ToString::to_string).collect();
    NetworkRequest { mode: Some(NetworkMode::Allowlist), allow: Some(rules) }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Asked = (Option<NetworkMode>, Option<Vec<String>>);

    fn asked(config: Value, internet: Option<bool>) -> Result<Asked, Vec<String>> {
        let config: NetworkConfig = serde_json::from_value(config).unwrap();
        let resolved = config.resolve(internet);
        resolved
            .map(|request| (request.mode, request.allow))
            .map_err(|wrong| wrong.into_iter().map(|field| field.pointer).collect())
    }

    #[test]
    fn rules_mean_what_they_mean_at_e2b_or_are_refused() {
        let (none, all) = (Some(NetworkMode::None), Some(NetworkMode::Allowlist));
        assert_eq!(asked(json!({}), None), Ok((None, None)));
        assert_eq!(asked(json!({"allowOut": [], "denyOut": []}), None), Ok((None, None)));
        assert_eq!(asked(json!({}), Some(false)), Ok((none, None)));
        assert_eq!(asked(json!({}), Some(true)), Ok((all, None)));
        assert_eq!(asked(json!({"allow_internet_access": false}), None), Ok((none, None)));
        assert_eq!(asked(json!({"denyOut": ["0.0.0.0/0"]}), Some(true)), Ok((none, None)));
        let rules = Some(vec!["pypi.org".to_owned(), "8.8.8.8".to_owned(), "*".to_owned()]);
        let allow = json!({"allowOut": ["pypi.org", "8.8.8.8/32", "0.0.0.0/0"], "denyOut": ["0.0.0.0/0"]});
        for internet in [None, Some(false), Some(true)] {
            assert_eq!(asked(allow.clone(), internet), Ok((None, rules.clone())));
        }
        assert_eq!(asked(json!({"denyOut": ["0.0.0.0/0", "10.0.0.0/8"]}), None), Err(vec!["/denyOut/1".to_owned()]));
    }

    #[test]
    fn what_is_not_here_is_told_by_its_field() {
        let config = json!({
            "allowPublicTraffic": true, "maskRequestHost": "a", "httpsPorts": [8443], "dnsServers": [], "egressProxy": {"address": "a:1"},
            "rules": {"a": []}
        });
        let fields = ["allowPublicTraffic", "maskRequestHost", "httpsPorts", "dnsServers", "egressProxy", "rules"];
        assert_eq!(asked(config, None), Err(fields.map(|field| format!("/{field}")).to_vec()));
        let usual = json!({"allowPublicTraffic": false, "maskRequestHost": null, "egressProxy": null, "rules": {}});
        assert_eq!(asked(usual, None), Ok((None, None)));
    }
}
