//! What a session may reach outside: rules of names, addresses and ports, what a template offers and what a caller may choose of it. Pure; it knows no resolver.
//!
//! A rule says a name (`example.org`), the names below one (`*.example.org`, without that one itself), any name (`*`), or an address. A port may follow; without one, 80 and
//! 443 are meant. `pypi`, `npm`, `debian` and `github` stand for the rules that the tools of that name need. A caller chooses among what the rules of the
//! template cover.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use super::spec::FieldError;

pub mod address;
pub mod hello;
mod host;

pub use host::Host;

/// Ports that are meant where none is named.
const USUAL_PORTS: [u16; 2] = [80, 443];
/// Most rules that a caller may name, presets counted by their rules.
pub const MAX_RULES: usize = 64;
/// Names below this one are upstreams that an operator has named.
const UPSTREAM: &str = ".upstream";

/// Words that stand for rules.
const PRESETS: [(&str, &[&str]); 4] = [
    ("pypi", &["pypi.org:443", "files.pythonhosted.org:443"]),
    ("npm", &["registry.npmjs.org:443"]),
    ("debian", &["deb.debian.org", "security.debian.org"]),
    (
        "github",
        &[
            "github.com:443",
            "api.github.com:443",
            "codeload.github.com:443",
            "raw.githubusercontent.com:443",
            "objects.githubusercontent.com:443",
            "release-assets.githubusercontent.com:443",
            "github-cloud.githubusercontent.com:443",
            "media.githubusercontent.com:443",
        ],
    ),
];

/// How a session is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum NetworkMode {
    /// Not at all.
    #[default]
    None,
    /// What its rules allow is reached through the proxy on its loopback.
    Allowlist,
}

/// Which hosts a rule is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Pattern {
    /// Any name; no address.
    Any,
    /// This name.
    Name(String),
    /// Names below this one.
    Below(String),
    /// This address, where it is written as such.
    Address(IpAddr),
}

/// One thing that may be reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    pattern: Pattern,
    /// The usual ones where none is named.
    port: Option<u16>,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pattern {
            Pattern::Any => f.write_str("*"),
            Pattern::Name(name) => f.write_str(name),
            Pattern::Below(name) => write!(f, "*.{name}"),
            Pattern::Address(address) => Host::Address(*address).fmt(f),
        }?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl Rule {
    /// Reads a rule, or the rules that a preset stands for.
    ///
    /// # Errors
    /// What is wrong, and what is allowed.
    pub fn parse(text: &str) -> Result<Vec<Self>, String> {
        if let Some((_, rules)) = PRESETS.iter().find(|(name, _)| *name == text) {
            return rules.iter().map(|rule| Self::one(rule)).collect();
        }
        Self::one(text).map(|rule| vec![rule])
    }

    fn one(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            let presets = PRESETS.map(|(name, _)| format!("\"{name}\"")).join(", ");
            format!(
                "{text:?}: {why}. Allowed are {presets}, and \"example.org\", \"*.example.org\" or a public address, each with a port (\"example.org:8443\") \
                 or without (80 and 443)"
            )
        };
        let (host, port) = split_port(text).map_err(wrong)?;
        let pattern = match host.strip_prefix("*.") {
            _ if host == "*" => Pattern::Any,
            Some(below) => match Host::parse(below).map_err(wrong)? {
                Host::Name(name) => Pattern::Below(name),
                Host::Address(_) => return Err(wrong("there are no names below an address")),
            },
            None => match Host::parse(host).map_err(wrong)? {
                Host::Name(name) => Pattern::Name(name),
                Host::Address(address) => Pattern::Address(address),
            },
        };
        match &pattern {
            Pattern::Any => {}
            Pattern::Name(name) | Pattern::Below(name) => {
                if let Some(why) = Host::Name(name.clone()).why_not_outside() {
                    return Err(wrong(why));
                }
            }
            Pattern::Address(address) => {
                if let Some(what) = address::why_not_public(*address) {
                    return Err(wrong(&format!("this address is not public ({what})")));
                }
            }
        }
        Ok(Self { pattern, port })
    }

    fn has_port(&self, port: u16) -> bool {
        self.port.map_or_else(|| USUAL_PORTS.contains(&port), |own| own == port)
    }

    /// Whether a host at a port is meant.
    #[must_use]
    pub fn admits(&self, host: &Host, port: u16) -> bool {
        let is_meant = match (&self.pattern, host) {
            (Pattern::Any, Host::Name(_)) => true,
            (Pattern::Name(own), Host::Name(name)) => own == name,
            (Pattern::Below(own), Host::Name(name)) => is_below(name, own),
            (Pattern::Address(own), Host::Address(address)) => own == address,
            _ => false,
        };
        is_meant && self.has_port(port)
    }

    /// Whether all that the other admits is admitted.
    fn covers(&self, other: &Self) -> bool {
        let has_ports = match other.port {
            Some(port) => self.has_port(port),
            None => self.port.is_none(),
        };
        let has_hosts = match (&self.pattern, &other.pattern) {
            (Pattern::Any, Pattern::Any | Pattern::Name(_) | Pattern::Below(_)) => true,
            (Pattern::Below(own), Pattern::Name(name)) => is_below(name, own),
            (Pattern::Below(own), Pattern::Below(name)) => own == name || is_below(name, own),
            (own, other) => own == other,
        };
        has_ports && has_hosts
    }
}

fn is_below(name: &str, above: &str) -> bool {
    name.strip_suffix(above).and_then(|rest| rest.strip_suffix('.')).is_some_and(|rest| !rest.is_empty())
}

/// Parts a port from what stands before it; an address of IPv6 without brackets has none.
fn split_port(text: &str) -> Result<(&str, Option<u16>), &'static str> {
    let after_host = text.rfind(']').map_or(0, |at| at + 1);
    let is_bare_v6 = after_host == 0 && text.matches(':').count() > 1;
    let Some(colon) = text[after_host..].rfind(':').filter(|_| !is_bare_v6) else { return Ok((text, None)) };
    let (host, port) = (&text[..after_host + colon], &text[after_host + colon + 1..]);
    let is_number = port.bytes().all(|b| b.is_ascii_digit());
    let port = port.parse().ok().filter(|port| *port > 0 && is_number).ok_or("a port is a number from 1 to 65535")?;
    Ok((host, Some(port)))
}

/// What a session may reach now.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub struct Network {
    /// How it is connected.
    pub mode: NetworkMode,
    /// What its connections may lead to.
    pub allow: Arc<[Rule]>,
}

impl Network {
    /// Whether a connection may lead to a host at a port, as far as the name goes.
    #[must_use]
    pub fn admits(&self, host: &Host, port: u16) -> bool {
        self.mode == NetworkMode::Allowlist && self.allow.iter().any(|rule| rule.admits(host, port))
    }

    /// Whether there is a way out.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.mode == NetworkMode::Allowlist
    }
}

/// A server that code may ask without knowing what is shown to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Upstream {
    /// Code asks `http://NAME.upstream/`.
    pub name: String,
    /// The server's name.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// What comes before each path; empty, or from a slash on, without one at its end.
    pub path: String,
    /// The header that is added.
    pub header: String,
    /// The file with its value.
    pub secret_file: PathBuf,
}

impl Upstream {
    /// Reads where an upstream is: `https://host`, `https://host:port/path`.
    ///
    /// # Errors
    /// What is wrong, and what is allowed.
    pub fn parse_url(url: &str) -> Result<(String, u16, String), String> {
        let wrong = |why: &str| format!("{url:?}: {why}. Allowed is https://host, with a port and a path or without");
        let rest = url.strip_prefix("https://").ok_or_else(|| wrong("the secret is sent over TLS only"))?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = split_port(authority).map_err(wrong)?;
        let host = match Host::parse(host).map_err(wrong)? {
            Host::Name(name) => name,
            Host::Address(_) => return Err(wrong("it has no name")),
        };
        if let Some(why) = Host::Name(host.clone()).why_not_outside() {
            return Err(wrong(why));
        }
        let path = path.trim_end_matches('/');
        let is_plain = path.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~/".contains(&b));
        let has_dots = path.split('/').any(|part| part == "." || part == "..");
        match is_plain && !has_dots && !path.contains("//") {
            true => Ok((host, port.unwrap_or(443), path.to_owned())),
            false => Err(wrong("the path has what a path of an upstream has not")),
        }
    }

    /// The name of the upstream that a host stands for, if it is one.
    #[must_use]
    pub fn named_by(host: &Host) -> Option<&str> {
        match host {
            Host::Name(name) => name.strip_suffix(UPSTREAM).filter(|name| !name.contains('.')),
            Host::Address(_) => None,
        }
    }
}

/// What a template offers, or what a session has of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkOffer {
    /// What a session gets that asks for nothing.
    pub initial: Network,
    /// What `allowlist` without rules means.
    pub usual: Arc<[Rule]>,
    /// What may be chosen beside that.
    pub may_allow: Arc<[Rule]>,
    /// Servers that are asked with a secret of the operator's.
    pub upstreams: Arc<[Upstream]>,
}

/// What a caller asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NetworkRequest {
    /// How the session is to be connected.
    pub mode: Option<NetworkMode>,
    /// What it is to reach.
    pub allow: Option<Vec<String>>,
}

impl NetworkOffer {
    /// Whether a session may have a way out at all.
    fn has_way_out(&self) -> bool {
        self.initial.is_open() || !self.usual.is_empty() || !self.may_allow.is_empty() || !self.upstreams.is_empty()
    }

    /// What a request comes to, for a session that has `now`.
    ///
    /// # Errors
    /// Each mistake with its field.
    pub fn choose(&self, now: &Network, asked: &NetworkRequest) -> Result<Network, Vec<FieldError>> {
        let mode = match (asked.mode, &asked.allow) {
            (Some(mode), _) => mode,
            (None, Some(_)) => NetworkMode::Allowlist,
            (None, None) => return Ok(now.clone()),
        };
        let error = |pointer: &str, message: String| Err(vec![FieldError::new(pointer, message)]);
        match (mode, &asked.allow) {
            (NetworkMode::None, None) => Ok(Network::default()),
            (NetworkMode::None, Some(_)) => error("/network/allow", "rules go with mode \"allowlist\" only".to_owned()),
            (NetworkMode::Allowlist, _) if !self.has_way_out() => error(
                "/network/mode",
                "the template allows \"none\" only; its network.may_allow names what may be chosen".to_owned(),
            ),
            (NetworkMode::Allowlist, None) if now.is_open() => Ok(now.clone()),
            (NetworkMode::Allowlist, None) => Ok(Network { mode, allow: Arc::clone(&self.usual) }),
            (NetworkMode::Allowlist, Some(texts)) => self.rules(texts).map(|allow| Network { mode, allow }),
        }
    }

    fn rules(&self, texts: &[String]) -> Result<Arc<[Rule]>, Vec<FieldError>> {
        let (mut errors, mut rules) = (Vec::new(), BTreeSet::new());
        for (at, text) in texts.iter().take(MAX_RULES).enumerate() {
            let pointer = || format!("/network/allow/{at}");
            match Rule::parse(text) {
                Err(message) => errors.push(FieldError::new(pointer(), message)),
                Ok(parsed) => match parsed.iter().find(|rule| !self.covers(rule)) {
                    Some(rule) => errors.push(FieldError::new(pointer(), self.why_not(rule))),
                    None => rules.extend(parsed),
                },
            }
        }
        if texts.len() > MAX_RULES || rules.len() > MAX_RULES {
            errors.push(FieldError::new("/network/allow", format!("allowed are {MAX_RULES} rules")));
        }
        if errors.is_empty() { Ok(rules.into_iter().collect()) } else { Err(errors) }
    }

    fn covers(&self, asked: &Rule) -> bool {
        self.usual.iter().chain(&*self.may_allow).any(|rule| rule.covers(asked))
    }

    fn why_not(&self, rule: &Rule) -> String {
        let known: Vec<String> = self.usual.iter().chain(&*self.may_allow).map(ToString::to_string).collect();
        match known.is_empty() {
            true => format!("\"{rule}\" is not among what the template permits, which is nothing but its upstreams"),
            false => format!("\"{rule}\" is not within what the template permits: {}", known.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests;
