//! What a session may reach, as JSON: the form only. A rule that can't be read any more is left out, which allows less.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::domain::egress::{Network, NetworkMode, NetworkOffer, Rule, Upstream};

#[derive(Serialize, Deserialize)]
#[serde(remote = "NetworkMode", rename_all = "snake_case")]
enum ModeForm {
    None,
    Allowlist,
}

/// What a session may reach.
#[derive(Serialize, Deserialize)]
pub(super) struct NetworkForm {
    #[serde(with = "ModeForm")]
    mode: NetworkMode,
    allow: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct OfferForm {
    initial: NetworkForm,
    usual: Vec<String>,
    may_allow: Vec<String>,
    upstreams: Vec<UpstreamForm>,
}

#[derive(Serialize, Deserialize)]
struct UpstreamForm {
    name: String,
    host: String,
    port: u16,
    path: String,
    header: String,
    secret_file: PathBuf,
}

/// What a record holds; a word in those of servers that knew no way out.
#[derive(Deserialize)]
#[serde(untagged)]
enum Kept {
    Offer(OfferForm),
    Word(#[serde(with = "ModeForm")] NetworkMode),
}

fn texts(rules: &[Rule]) -> Vec<String> {
    rules.iter().map(ToString::to_string).collect()
}

fn rules(texts: &[String]) -> Arc<[Rule]> {
    texts.iter().filter_map(|text| Rule::parse(text).ok()).flatten().collect()
}

impl From<&Network> for NetworkForm {
    fn from(network: &Network) -> Self {
        Self { mode: network.mode, allow: texts(&network.allow) }
    }
}

impl From<NetworkForm> for Network {
    fn from(form: NetworkForm) -> Self {
        Self { mode: form.mode, allow: rules(&form.allow) }
    }
}

impl From<&Upstream> for UpstreamForm {
    fn from(upstream: &Upstream) -> Self {
        let Upstream { name, host, port, path, header, secret_file } = upstream.clone();
        Self { name, host, port, path, header, secret_file }
    }
}

impl From<UpstreamForm> for Upstream {
    fn from(form: UpstreamForm) -> Self {
        let UpstreamForm { name, host, port, path, header, secret_file } = form;
        Self { name, host, port, path, header, secret_file }
    }
}

pub(super) fn serialize<S: Serializer>(offer: &NetworkOffer, to: S) -> Result<S::Ok, S::Error> {
    let form = OfferForm {
        initial: NetworkForm::from(&offer.initial),
        usual: texts(&offer.usual),
        may_allow: texts(&offer.may_allow),
        upstreams: offer.upstreams.iter().map(UpstreamForm::from).collect(),
    };
    form.serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<NetworkOffer, D::Error> {
    Ok(match Kept::deserialize(from)? {
        Kept::Word(mode) => NetworkOffer { initial: Network { mode, ..Network::default() }, ..NetworkOffer::default() },
        Kept::Offer(form) => NetworkOffer {
            initial: form.initial.into(),
            usual: rules(&form.usual),
            may_allow: rules(&form.may_allow),
            upstreams: form.upstreams.into_iter().map(Upstream::from).collect(),
        },
    })
}
