//! Rules that a type can't hold: floors, ceilings, names, and what must hold between two keys. Judges values; reads none.

use std::time::Duration;

use super::merge::Merge;
use super::sections::{Bounds, Data, Document, PackageRule, Server, TemplateSection, Workspace, WorkspaceKind};
use super::source::{Key, Mistake, Source, dotted, key_of};
use crate::domain::data;
use crate::domain::egress::{self, Rule};
use crate::domain::packages::{self, Requirement};
use crate::domain::ports::Ports;
use crate::domain::spec::{self, KERNEL_FLOOR, MIB, PoolSize};

/// A container lives at least so long without hearing of a server, which it does when it is asked whether it lives.
const LEAST_LEASE: Duration = Duration::from_secs(15);
/// What names of keys, tenants and services are.
const NAME: &str = "allowed are 1 to 64 letters, digits, \".\", \"_\" and \"-\"";

/// What is named like this is removed once it is old.
const RESERVED_INSTANCES: &str = "doctor-";

/// Checks everything, each rule by itself.
pub(super) fn check(document: &Document, merge: &Merge) -> Vec<Mistake> {
    let mut checker = Checker { merge, mistakes: Vec::new() };
    checker.server(document);
    checker.keys(document);
    checker.engine(document);
    checker.amounts(document);
    checker.quotas(document);
    checker.egress(document);
    checker.packages(document);
    checker.traces(document);
    checker.log(document);
    checker.default_template(document);
    let least: u32 =
        document.templates.values().filter(|t| t.enabled).flat_map(|t| t.pool.plans()).map(|p| p.size.min).sum();
    checker.require(least <= document.limits.sessions, &["limits.sessions"], || {
        format!("the pools of all templates are to hold {least} sessions at least, which is more: lower pool.min")
    });
    for (name, template) in &document.templates {
        checker.template(name, template, document.limits.sessions);
    }
    checker.classic(document);
    checker.mistakes
}

/// Whether a text is what may stand behind `import`: a module, and another name for it or none.
fn is_import(text: &str) -> bool {
    let is_identifier = |name: &str| {
        !name.starts_with(|c: char| c.is_ascii_digit())
            && !name.is_empty()
            && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
    };
    let (module, name) = text.split_once(" as ").map_or((text, None), |(module, name)| (module, Some(name)));
    text.len() <= LONGEST_IMPORT && module.split('.').all(is_identifier) && name.is_none_or(is_identifier)
}

/// Most that `limits.sessions` may be.
pub const MOST_SESSIONS: u32 = 10_000;
/// Most that `limits.workspaces` may be.
const MOST_WORKSPACES: u32 = 10_000;
/// The longest import, in bytes, and most of them.
const LONGEST_IMPORT: usize = 200;
const MOST_IMPORTS: usize = 64;
/// The longest path of a unix socket.
const LONGEST_SOCKET: usize = 107;

struct Checker<'a> {
    merge: &'a Merge,
    mistakes: Vec<Mistake>,
}

impl Checker<'_> {
    /// A mistake at the first key, which the others have a part in. Says nothing if one of them is a mistake already.
    fn require(&mut self, holds: bool, keys: &[&str], message: impl FnOnce() -> String) {
        let keys: Vec<Key> = keys.iter().map(|key| key_of(key)).collect();
        if !holds && !keys.iter().any(|key| self.has_failed(key)) {
            let (key, source) = (dotted(&keys[0]), self.source(&keys[0]));
            self.mistakes.push(Mistake { key, source, message: message() });
        }
    }

    fn has_failed(&self, key: &Key) -> bool {
        let below = |key: &[String]| self.merge.failed.iter().any(|failed| key.starts_with(failed));
        below(key) || (key[0] == "templates" && below(&[&["template_defaults".to_owned()], &key[2..]].concat()))
    }

    fn source(&self, key: &Key) -> Source {
        self.merge.leaves.get(key).map_or(Source::Default, |leaf| leaf.source.clone())
    }

    fn server(&mut self, document: &Document) {
        let server = &document.server;
        let (listen, keys) = (server.listen, "server.listen");
        if !listen.ip().is_loopback() {
            let is_private =
                server.allow_plain_http || server.tls_cert_file.is_some() || !server.trusted_proxies.is_empty();
            self.require(is_private, &[keys, "server.allow_plain_http", "server.tls_cert_file", "server.trusted_proxies"], || {
                format!(
                    "{listen} is reachable from other machines, over HTTP without TLS: keys and code could be read on \
                     the way. Set server.tls_cert_file and server.tls_key_file, name the proxies that end TLS in \
                     server.trusted_proxies, listen on loopback (127.0.0.1:{0}), or accept it with \
                     server.allow_plain_http = true",
                    listen.port()
                )
            });
            self.require(server.api_key_file.is_some(), &[keys, "server.api_key_file"], || {
                format!(
                    "{listen} is reachable from other machines, so the API key must be one that you chose: set \
                     server.api_key_file to a file with the key that only its owner may read, or listen on 127.0.0.1:{}",
                    listen.port()
                )
            });
        }
        self.admin(server);
        self.require(!server.data_dir.as_os_str().is_empty(), &["server.data_dir"], || {
            "name a folder: there is neither HOME nor XDG_DATA_HOME to derive one from".to_owned()
        });
        self.require((4096..=64 * MIB).contains(&server.max_body), &["server.max_body"], || {
            "allowed are 4KiB to 64MiB".to_owned()
        });
        self.positive(server.request_timeout, "server.request_timeout");
        self.positive(server.ports_timeout, "server.ports_timeout");
        let domain = server.ports_domain.as_str();
        let is_domain = domain.len() <= 180 && domain.split('.').all(|label| is_label(label, 63));
        self.require(domain.is_empty() || is_domain, &["server.ports_domain"], || {
            format!("{domain:?} is not a domain in lower case without a port, such as \"ports.example.com\"")
        });
        self.connections(document);
        self.callers(document);
    }

    fn connections(&mut self, document: &Document) {
        let server = &document.server;
        self.require(
            server.tls_cert_file.is_some() == server.tls_key_file.is_some(),
            &["server.tls_cert_file", "server.tls_key_file"],
            || {
                "a certificate and its key go together: set both server.tls_cert_file and server.tls_key_file, or none"
                    .to_owned()
            },
        );
        self.require((1..=1_000_000).contains(&server.connections), &["server.connections"], || {
            format!("{} is not within 1 to 1000000", server.connections)
        });
        let of_one = server.connections_per_address;
        self.require(
            (1..=server.connections).contains(&of_one),
            &["server.connections_per_address", "server.connections"],
            || format!("{of_one} is not within 1 to server.connections, {}", server.connections),
        );
        self.positive(server.header_timeout, "server.header_timeout");
        self.positive(server.write_timeout, "server.write_timeout");
        self.require((8192..=MIB).contains(&server.max_header), &["server.max_header"], || {
            "allowed are 8KiB to 1MiB".to_owned()
        });
    }

    fn callers(&mut self, document: &Document) {
        let server = &document.server;
        if let Some(all) = server.trusted_proxies.iter().find(|network| network.prefix_len() == 0) {
            self.require(false, &["server.trusted_proxies"], || {
                format!("{all} is everybody, and whoever is trusted can give any address as its own: name the proxies")
            });
        }
        if let Some(wrong) = server.cors_origins.iter().find(|origin| !is_origin(origin)) {
            self.require(false, &["server.cors_origins"], || {
                format!(
                    "{wrong:?} is not an origin as browsers write it, such as \"https://app.example.com\" or \
                     \"http://localhost:3000\": scheme and host in lower case, a port if it is not the usual one, no path"
                )
            });
        }
    }

    fn classic(&mut self, document: &Document) {
        let door = &document.doors.classic;
        let wrong = door.imports.iter().find(|text| !is_import(text));
        self.require(
            wrong.is_none() && door.imports.len() <= MOST_IMPORTS,
            &["doors.classic.imports"],
            || match wrong {
                Some(wrong) => format!("{wrong:?} can't stand behind \"import\": write \"json\" or \"pandas as pd\""),
                None => format!("{} of them; allowed are {MOST_IMPORTS}", door.imports.len()),
            },
        );
        if !door.enabled {
            return;
        }
        let name = Some(&door.template).filter(|name| !name.is_empty()).unwrap_or(&document.default_template);
        let template = document.templates.get(name).filter(|template| template.enabled);
        self.require(template.is_some(), &["doors.classic.template", "default_template"], || {
            format!("{name:?} is none of the enabled templates")
        });
        let Some(most) = template.map(|template| template.maximum.idle) else { return };
        self.require(!door.idle.is_zero() && door.idle <= most, &["doors.classic.idle"], || {
            format!("{:?} is not above 0, and up to the most that the template {name:?} allows, {most:?}", door.idle)
        });
    }

    fn keys(&mut self, document: &Document) {
        let auth = &document.auth;
        self.require((1..=1_000_000).contains(&auth.failures), &["auth.failures"], || {
            format!("{} is not within 1 to 1000000", auth.failures)
        });
        self.positive(auth.failure_window, "auth.failure_window");
        let offered = |name: &String| document.templates.get(name).is_some_and(|template| template.enabled);
        for (at, key) in document.keys.iter().enumerate() {
            let before = &document.keys[..at];
            let unknown = key.templates.iter().flatten().find(|name| !offered(name));
            let mistakes = [
                (!spec::is_name(&key.name)).then(|| format!("name: {NAME}")),
                (!spec::is_name(&key.tenant)).then(|| format!("tenant: {NAME}")),
                key.scopes.is_empty().then(|| "scopes: name one at least".to_owned()),
                key.templates
                    .as_ref()
                    .is_some_and(Vec::is_empty)
                    .then(|| "templates: name one, or leave it out".to_owned()),
                unknown.map(|name| format!("templates: {name:?} is none of the enabled templates")),
                (key.hash.is_some() == key.file.is_some()).then(|| "give either hash or file".to_owned()),
                before.iter().any(|other| other.name == key.name).then(|| "another key has this name".to_owned()),
                before
                    .iter()
                    .any(|other| other.hash.is_some() && other.hash == key.hash)
                    .then(|| "another key has this hash".to_owned()),
            ];
            for mistake in mistakes.into_iter().flatten() {
                self.require(false, &["keys"], || format!("key {} ({:?}): {mistake}", at + 1, key.name));
            }
        }
    }

    fn admin(&mut self, server: &Server) {
        let Some(admin) = server.admin_listen else { return };
        let key = "server.admin_listen";
        let may_be = admin.ip().is_loopback() || server.admin_allow_remote;
        self.require(may_be, &[key, "server.admin_allow_remote"], || {
            format!(
                "{admin} is reachable from other machines, and the admin listener asks for no key. Listen on loopback \
                 (127.0.0.1:{}), or accept it with server.admin_allow_remote = true",
                admin.port()
            )
        });
        // Port 0 is any free one.
        self.require(admin != server.listen || admin.port() == 0, &[key, "server.listen"], || {
            format!("{admin} is where the API listens (server.listen): the admin listener needs a port of its own")
        });
    }

    fn engine(&mut self, document: &Document) {
        let engine = &document.engine;
        let host = engine.host.as_str();
        let over_tcp = ["tcp://", "http://", "https://"].iter().find_map(|scheme| host.strip_prefix(scheme));
        let is_local = host.starts_with("unix:///") || host.starts_with("guard:///");
        let is_host = over_tcp.is_some_and(|rest| !rest.is_empty()) || is_local;
        self.require(is_host, &["engine.host"], || {
            format!(
                "{host:?} is none of unix:///path, tcp://host:port, http://host:port, https://host:port and \
                 guard:///path"
            )
        });
        let certificates = engine.tls_cert_dir.as_deref().map(|dir| dir.display().to_string());
        self.require(certificates.is_none() || over_tcp.is_some(), &["engine.tls_cert_dir", "engine.host"], || {
            format!("certificates are for an engine over TCP; engine.host is {host:?}")
        });
        self.require(certificates.is_some() || !host.starts_with("https://"), &["engine.tls_cert_dir"], || {
            format!("name the folder with ca.pem, cert.pem and key.pem; engine.host is {host:?}")
        });
        self.require(is_label(&engine.instance, 20), &["engine.instance"], || {
            format!("{:?} is not 1 to 20 of a-z, 0-9 and \"-\", with a letter or digit at both ends", engine.instance)
        });
        self.require(!engine.instance.starts_with(RESERVED_INSTANCES), &["engine.instance"], || {
            format!("{:?} begins with {RESERVED_INSTANCES:?}, as what `cellblock doctor` makes does", engine.instance)
        });
        self.require(engine.orphan_timeout >= LEAST_LEASE, &["engine.orphan_timeout"], || {
            format!(
                "allowed is at least {LEAST_LEASE:?}: a quiet session's container hears of its server every 10 s only"
            )
        });
        self.positive(engine.start_timeout, "engine.start_timeout");
        self.uids(document);
        let (guard, socket) = (&document.guard, document.guard.socket.as_os_str());
        self.require(guard.socket.is_absolute() && socket.len() <= LONGEST_SOCKET, &["guard.socket"], || {
            format!("{socket:?} is not an absolute path of at most {LONGEST_SOCKET} bytes")
        });
        self.require((1..=1_000_000).contains(&guard.creates_per_minute), &["guard.creates_per_minute"], || {
            format!("{} is not within 1 to 1000000", guard.creates_per_minute)
        });
    }

    fn uids(&mut self, document: &Document) {
        let (first, last) = (document.engine.uid_first, document.engine.uid_last);
        self.require(first >= 1000, &["engine.uid_first"], || {
            format!("{first} is among the users of the system; allowed are 1000 and above")
        });
        self.require(last < 65_536, &["engine.uid_last"], || {
            format!("{last} doesn't exist under a rootless engine; allowed are up to 65535")
        });
        let sessions = document.limits.sessions;
        let users = (u64::from(last) + 1).saturating_sub(first.into());
        self.require(users >= sessions.into(), &["engine.uid_last", "engine.uid_first", "limits.sessions"], || {
            format!(
                "{first} to {last} are {users} users; each of the {sessions} of limits.sessions needs one of its own"
            )
        });
        let has_workspaces =
            document.templates.values().any(|t| t.enabled && t.workspace.kind == WorkspaceKind::Volume);
        let workspaces = document.limits.workspaces;
        let needed = u64::from(sessions) + u64::from(workspaces);
        // Too few for the sessions are told of already.
        let is_of_workspaces = has_workspaces && users >= sessions.into();
        self.require(!is_of_workspaces || users >= needed, &["engine.uid_last", "engine.uid_first", "limits.workspaces"], || {
            format!(
                "{first} to {last} are {users} users; each of the {sessions} of limits.sessions needs one of its own, and so does each of the {workspaces} of \
                 limits.workspaces"
            )
        });
    }

    fn amounts(&mut self, document: &Document) {
        let (limits, executions) = (&document.limits, &document.executions);
        for (key, value, most) in [
            ("limits.sessions", limits.sessions, MOST_SESSIONS),
            ("limits.queued_executions", limits.queued_executions, 10_000),
            ("limits.queued_creates", limits.queued_creates, 10_000),
            ("limits.concurrent_starts", limits.concurrent_starts, 256),
            // The guest starts no more kernels than that.
            ("limits.contexts", limits.contexts, 32),
            ("limits.workspaces", limits.workspaces, MOST_WORKSPACES),
            ("executions.retention_count", executions.retention_count, 10_000_000),
            ("audit.retention_count", document.audit.retention_count, 100_000_000),
            ("jupyter.connections_per_session", document.jupyter.connections_per_session, 1000),
            ("jupyter.connections_per_tenant", document.jupyter.connections_per_tenant, 100_000),
        ] {
            self.require((1..=most).contains(&value), &[key], || format!("{value} is not within 1 to {most}"));
        }
        self.require(limits.cpu == 0.0 || (0.05..=1e6).contains(&limits.cpu), &["limits.cpu"], || {
            format!("{} is not within 0.05 to 1000000, nor 0 for no ceiling", limits.cpu)
        });
        self.positive(limits.create_wait, "limits.create_wait");
        self.positive(executions.interrupt_grace, "executions.interrupt_grace");
        self.positive(executions.queue_timeout, "executions.queue_timeout");
        self.positive(executions.retention_time, "executions.retention_time");
        self.positive(document.audit.retention_time, "audit.retention_time");
        self.positive(document.jupyter.buffer_time, "jupyter.buffer_time");
        for (key, bytes) in [
            ("jupyter.buffer_size", document.jupyter.buffer_size),
            ("jupyter.max_message", document.jupyter.max_message),
        ] {
            self.require((64 * 1024..=64 * MIB).contains(&bytes), &[key], || "allowed are 64KiB to 64MiB".to_owned());
        }
        self.positive(executions.blob_retention, "executions.blob_retention");
        self.positive(executions.notebook_retention, "executions.notebook_retention");
        self.require((1024..=64 * MIB).contains(&executions.inline), &["executions.inline"], || {
            "allowed are 1KiB to 64MiB".to_owned()
        });
        self.require(executions.blob_size >= 16 * MIB, &["executions.blob_size"], || {
            "allowed is 16MiB and more".to_owned()
        });
        let (one, all) = (executions.notebook_size, executions.notebooks_size);
        self.require(one >= MIB, &["executions.notebook_size"], || "allowed is 1MiB and more".to_owned());
        self.require(one <= all, &["executions.notebook_size", "executions.notebooks_size"], || {
            format!("{} is above executions.notebooks_size, {}", mib(one), mib(all))
        });
    }

    fn quotas(&mut self, document: &Document) {
        let classes = document.classes.iter().map(|(name, class)| ("classes", name, class));
        let tenants = document.tenants.iter().map(|(name, tenant)| ("tenants", name, &tenant.quota));
        for (kind, name, quota) in classes.chain(tenants) {
            let key = |field: &str| format!("{kind}.{name}.{field}");
            self.require(spec::is_name(name), &[&format!("{kind}.{name}")], || NAME.to_owned());
            self.require(quota.cpu == 0.0 || (0.05..=1e6).contains(&quota.cpu), &[&key("cpu")], || {
                format!("{} is not within 0.05 to 1000000, nor 0 for no limit", quota.cpu)
            });
            let rate = quota.requests_per_second;
            self.require(rate == 0.0 || (0.001..=1e6).contains(&rate), &[&key("requests_per_second")], || {
                format!("{rate} is not within 0.001 to 1000000, nor 0 for no limit")
            });
            self.require(quota.request_burst <= 1_000_000, &[&key("request_burst")], || {
                format!("{} is above 1000000", quota.request_burst)
            });
        }
        let known = document.classes.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        for (name, tenant) in &document.tenants {
            let class = &tenant.class;
            self.require(document.classes.contains_key(class), &[&format!("tenants.{name}.class")], || {
                format!("{class:?} is none of the classes that have a key of their own: {known}")
            });
        }
    }

    fn egress(&mut self, document: &Document) {
        let egress = &document.egress;
        for (key, value, most) in [
            ("egress.connections", egress.connections, 100_000),
            // More of them do not fit beside the rest on a session's link.
            ("egress.session_connections", egress.session_connections, 64),
            ("egress.session_connections_per_minute", egress.session_connections_per_minute, 100_000),
        ] {
            self.require((1..=most).contains(&value), &[key], || format!("{value} is not within 1 to {most}"));
        }
        let (shortest, longest) = (Duration::from_millis(100), Duration::from_secs(30));
        self.require((shortest..=longest).contains(&egress.connect_timeout), &["egress.connect_timeout"], || {
            "allowed are 100ms to 30s: code is told after 45s that nobody has decided".to_owned()
        });
        self.positive(egress.idle_timeout, "egress.idle_timeout");
        let proxy = egress.proxy.as_str();
        self.require(proxy.is_empty() || proxy_of(proxy).is_some(), &["egress.proxy"], || {
            "name the proxy as \"http://proxy.example.org:3128\", with its port and without a user".to_owned()
        });
    }

    fn packages(&mut self, document: &Document) {
        let packages = &document.packages;
        let index = egress::Upstream::parse_url(&packages.index_url);
        self.require(index.is_ok(), &["packages.index_url"], || {
            format!("{:?} is no index of packages: name it as https://host/path", packages.index_url)
        });
        for wrong in packages.file_hosts.iter().filter_map(|host| packages::file_host(host).err()) {
            self.require(false, &["packages.file_hosts"], || wrong.clone());
        }
        self.positive(packages.timeout, "packages.timeout");
        self.require(packages.size > 0, &["packages.size"], || "0 bytes would be no package".to_owned());
    }

    fn package_rule(&mut self, name: &str, template: &TemplateSection) {
        let PackageRule::Listed(texts) = &template.packages else { return };
        let key = format!("templates.{name}.packages");
        for wrong in texts.iter().filter_map(|text| Requirement::parse(text).err()) {
            self.require(false, &[&key], || wrong.clone());
        }
        let count = texts.len();
        self.require((1..=packages::MAX_REQUIREMENTS).contains(&count), &[&key], || {
            format!("{count} packages; allowed are \"none\", \"any\" or 1 to {}", packages::MAX_REQUIREMENTS)
        });
    }

    fn network(&mut self, name: &str, template: &TemplateSection) {
        let network = &template.network;
        let key = |field: &str| format!("templates.{name}.network.{field}");
        for (field, texts) in [("allow", &network.allow), ("may_allow", &network.may_allow)] {
            let rules: Vec<_> = texts.iter().map(|text| Rule::parse(text)).collect();
            for wrong in rules.iter().filter_map(|rule| rule.as_ref().err()) {
                self.require(false, &[&key(field)], || wrong.clone());
            }
            let count = rules.iter().flatten().map(Vec::len).sum::<usize>();
            self.require(count <= egress::MAX_RULES, &[&key(field)], || {
                format!("{count} rules; allowed are {}", egress::MAX_RULES)
            });
        }
        for (at, upstream) in network.upstreams.iter().enumerate() {
            let is_header =
                |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            let is_framing = ["host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer"]
                .contains(&upstream.header.to_ascii_lowercase().as_str());
            let mistakes = [
                (!is_label(&upstream.name, 40)).then(|| {
                    "name: allowed are 1 to 40 of a-z, 0-9 and \"-\", with a letter or digit at both ends".to_owned()
                }),
                (upstream.name == egress::PACKAGES).then(|| "name: \"packages\" is the index of packages".to_owned()),
                network.upstreams[..at]
                    .iter()
                    .any(|other| other.name == upstream.name)
                    .then(|| "name: another upstream has it".to_owned()),
                egress::Upstream::parse_url(&upstream.url).err().map(|why| format!("url: {why}")),
                (!is_header(&upstream.header) || is_framing).then(|| {
                    "header: allowed is the name of a header that says who asks, such as \"Authorization\"".to_owned()
                }),
                (!upstream.secret_file.is_absolute())
                    .then(|| "secret_file: name a file by its absolute path; it holds the header's value".to_owned()),
            ];
            for mistake in mistakes.into_iter().flatten() {
                self.require(false, &[&key("upstreams")], || format!("number {}, {mistake}", at + 1));
            }
        }
    }

    fn traces(&mut self, document: &Document) {
        let traces = &document.traces;
        let endpoint = traces.endpoint.as_str();
        let (rest, is_https) = match (endpoint.strip_prefix("http://"), endpoint.strip_prefix("https://")) {
            (Some(rest), _) => (rest, false),
            (None, rest) => (rest.unwrap_or_default(), rest.is_some()),
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._~:/[]%".contains(c);
        let is_url = !rest.is_empty() && !rest.starts_with(['/', ':']) && rest.chars().all(is_plain);
        // What is wrong may be a key, so it is not repeated.
        self.require(endpoint.is_empty() || is_url, &["traces.endpoint"], || {
            "name a collector's base URL, such as \"http://127.0.0.1:4318\", without a user, a query or a fragment; keys \
             belong into traces.headers_file"
                .to_owned()
        });
        let host = rest.split('/').next().unwrap_or_default();
        let is_here = ["localhost", "127.0.0.1", "[::1]"]
            .iter()
            .any(|here| host.strip_prefix(here).is_some_and(|port| port.is_empty() || port.starts_with(':')));
        let may_be_sent = traces.headers_file.is_none() || endpoint.is_empty() || is_https || is_here;
        self.require(may_be_sent, &["traces.endpoint", "traces.headers_file"], || {
            "the secrets of traces.headers_file could be read on the way: name an https:// URL, or a collector on loopback"
                .to_owned()
        });
        self.require((0.0..=1.0).contains(&traces.sample_ratio), &["traces.sample_ratio"], || {
            format!("{} is not within 0.0 to 1.0", traces.sample_ratio)
        });
        self.require(spec::is_name(&traces.service_name), &["traces.service_name"], || NAME.to_owned());
        let (shortest, longest) = (Duration::from_millis(100), Duration::from_secs(60));
        self.require((shortest..=longest).contains(&traces.timeout), &["traces.timeout"], || {
            "allowed are 100ms to 60s".to_owned()
        });
        self.require((1..=1_000_000).contains(&traces.queue), &["traces.queue"], || {
            format!("{} is not within 1 to 1000000", traces.queue)
        });
    }

    fn log(&mut self, document: &Document) {
        let level = &document.log.level;
        self.require(check_log_level(level).is_ok(), &["log.level"], || {
            check_log_level(level).err().unwrap_or_default()
        });
    }

    fn default_template(&mut self, document: &Document) {
        let name = &document.default_template;
        let offered: Vec<&str> =
            document.templates.iter().filter(|(_, t)| t.enabled).map(|(name, _)| name.as_str()).collect();
        let own = format!("templates.{name}");
        self.require(offered.contains(&name.as_str()), &["default_template", own.as_str()], || {
            format!("{name:?} is none of the enabled templates: {}", offered.join(", "))
        });
    }

    fn pool(&mut self, name: &str, template: &TemplateSection, sessions: u32) {
        let (min, max) = (template.pool.min, template.pool.max);
        let keys = [format!("templates.{name}.pool.min"), format!("templates.{name}.pool.max")];
        self.require(min <= max, &[&keys[0], &keys[1]], || {
            format!("{min} are to be kept at least, and {max} at most (pool.max): raise one or lower the other")
        });
        self.require(max <= sessions, &[&keys[1], "limits.sessions"], || {
            format!("{max} don't fit into the {sessions} of limits.sessions, which callers need too")
        });
        self.other_pools(name, template, sessions);
    }

    /// Pools of other resources: what a caller could ask for, and each something else.
    fn other_pools(&mut self, name: &str, template: &TemplateSection, sessions: u32) {
        let key = format!("templates.{name}.pool.other");
        let resolved = template.clone().into_template(name.to_owned());
        let mut kinds = Vec::new();
        for (at, plan) in resolved.pools.iter().enumerate() {
            let number = at.max(1);
            match spec::resolve(&resolved, &plan.request) {
                Ok(spec) if kinds.contains(&spec.resources) => self.require(false, &[&key], || {
                    format!("number {number} has the resources of another pool: give it others, or leave it out")
                }),
                Ok(spec) => kinds.push(spec.resources),
                // Of the first, the template's own resources are the mistake, which is told there.
                Err(errors) if at > 0 => errors.into_iter().for_each(|error| {
                    self.require(false, &[&key], || {
                        format!("number {number}, {}: {}", &error.pointer[1..], error.message)
                    })
                }),
                Err(_) => {}
            }
            let PoolSize { min, max } = plan.size;
            self.require(at == 0 || (min <= max && max <= sessions), &[&key, "limits.sessions"], || {
                format!("number {number} is to hold {min} to {max}: min is at most max, and max at most limits.sessions, {sessions}")
            });
        }
        let sizes = template.pool.other.iter().flat_map(|pool| [pool.memory, pool.disk]).flatten();
        self.require(sizes.into_iter().all(|size| size.0 % MIB == 0), &[&key], || {
            "memory and disk are whole MiB, as callers ask for them".to_owned()
        });
    }

    fn template(&mut self, name: &str, template: &TemplateSection, sessions: u32) {
        let key = |rest: &str| format!("templates.{name}.{rest}");
        let section = format!("templates.{name}");
        self.require(is_label(&name.replace('_', "-"), 40), &[&section], || {
            "a template's name is 1 to 40 of a-z, 0-9, \"-\" and \"_\", with a letter or digit at both ends".to_owned()
        });
        if !template.enabled {
            return;
        }
        self.require(!template.image.trim().is_empty(), &[&key("image")], || {
            "every template names an image, such as \"cellblock/python:latest\"".to_owned()
        });
        self.env(name, template);
        let mounts: Vec<_> = template.data.iter().map(Data::mount).collect();
        self.require(data::check_mounts(&mounts).is_ok(), &[&key("data")], || {
            data::check_mounts(&mounts).err().unwrap_or_default()
        });
        self.require(Ports::parse(&template.ports).is_ok(), &[&key("ports")], || {
            Ports::parse(&template.ports).err().unwrap_or_default()
        });
        self.workspace(name, template);
        self.network(name, template);
        self.package_rule(name, template);
        self.floors(name, "default", &template.default);
        self.floors(name, "maximum", &template.maximum);
        self.ceilings(name, template);
        self.pool(name, template, sessions);
        // The guest holds the tail of the text, and all of what it has not yet got rid of.
        for (field, bytes, most) in
            [("output.text", template.output.text, 8), ("output.results", template.output.results, 64)]
        {
            self.require((1024..=most * MIB).contains(&bytes), &[&key(field)], || {
                format!("allowed are 1KiB to {most}MiB")
            });
        }
        let total = template.output.total;
        self.require((2048..=80 * MIB).contains(&total), &[&key("output.total")], || {
            "allowed are 2KiB to 80MiB".to_owned()
        });
        let rate = template.output.messages_per_second;
        self.require((1..=1_000_000).contains(&rate), &[&key("output.messages_per_second")], || {
            format!("{rate} is not within 1 to 1000000")
        });
        self.require(template.setup.len() <= spec::MAX_SETUP, &[&key("setup")], || {
            format!("{} bytes; allowed are {}", template.setup.len(), spec::MAX_SETUP)
        });
        let messages = template.output.messages;
        self.require((10..=1_000_000).contains(&messages), &[&key("output.messages")], || {
            format!("{messages} is not within 10 to 1000000")
        });
    }

    fn workspace(&mut self, name: &str, template: &TemplateSection) {
        let Workspace { kind, max_age, quota, accept_unenforced } = template.workspace;
        let key = |field: &str| format!("templates.{name}.workspace.{field}");
        self.require(quota == 0 || quota >= MIB, &[&key("quota")], || {
            "allowed is 1MiB and more, or \"0MiB\" for none".to_owned()
        });
        self.require(!max_age.is_zero(), &[&key("max_age")], || {
            "allowed is more than nothing, such as \"30d\"".to_owned()
        });
        let is_bounded = kind == WorkspaceKind::Tmpfs || quota > 0 || accept_unenforced;
        self.require(is_bounded, &[&key("quota"), &key("accept_unenforced")], || {
            "a workspace of kind \"volume\" without a quota can fill the engine's disk: set quota, such as \"2GiB\", where the host enforces one, or \
             accept_unenforced = true to do without"
                .to_owned()
        });
    }

    fn env(&mut self, name: &str, template: &TemplateSection) {
        let mut errors = Vec::new();
        spec::check_env(&template.env, &mut errors);
        for error in errors {
            let key = format!("templates.{name}{}", error.pointer.replace('/', "."));
            self.require(false, &[&key], || error.message);
        }
    }

    /// What every session needs, whatever its template.
    fn floors(&mut self, name: &str, which: &str, bounds: &Bounds) {
        let key = |field: &str| format!("templates.{name}.{which}.{field}");
        self.require((0.05..=1024.0).contains(&bounds.cpu), &[&key("cpu")], || {
            format!("{} is not within 0.05 to 1024 CPUs", bounds.cpu)
        });
        let least = KERNEL_FLOOR + 16 * MIB;
        self.require(bounds.memory >= least, &[&key("memory")], || {
            format!("{} is less than a kernel needs, {}", mib(bounds.memory), mib(least))
        });
        for (field, bytes) in [("disk", bounds.disk), ("tmp", bounds.tmp)] {
            self.require(bytes >= MIB, &[&key(field)], || "allowed is 1MiB and more".to_owned());
        }
        let files = bounds.disk.saturating_add(bounds.tmp);
        let needed = files.saturating_add(KERNEL_FLOOR);
        self.require(needed <= bounds.memory, &[&key("memory"), &key("disk"), &key("tmp")], || {
            format!(
                "files are kept in memory: disk {}, tmp {} and {} for a kernel don't fit into {}; set memory to at \
                 least {}, or disk and tmp to at most {} together",
                mib(bounds.disk),
                mib(bounds.tmp),
                mib(KERNEL_FLOOR),
                mib(bounds.memory),
                mib(needed.next_multiple_of(MIB)),
                mib(bounds.memory.saturating_sub(KERNEL_FLOOR)),
            )
        });
        self.require((24..=32_768).contains(&bounds.pids), &[&key("pids")], || {
            format!("{} is not within 24 to 32768", bounds.pids)
        });
        self.require((64..=1_048_576).contains(&bounds.open_files), &[&key("open_files")], || {
            format!("{} is not within 64 to 1048576", bounds.open_files)
        });
        for (field, time) in [
            ("idle", bounds.idle),
            ("lifetime", bounds.lifetime),
            ("execution", bounds.execution),
            ("paused", bounds.paused),
        ] {
            self.positive(time, &key(field));
        }
    }

    fn ceilings(&mut self, name: &str, template: &TemplateSection) {
        let (default, maximum) = (&template.default, &template.maximum);
        let seconds = |time: Duration| format!("{}s", time.as_secs_f64());
        for (field, holds, default, maximum) in [
            ("cpu", default.cpu <= maximum.cpu, default.cpu.to_string(), maximum.cpu.to_string()),
            ("memory", default.memory <= maximum.memory, mib(default.memory), mib(maximum.memory)),
            ("disk", default.disk <= maximum.disk, mib(default.disk), mib(maximum.disk)),
            ("tmp", default.tmp <= maximum.tmp, mib(default.tmp), mib(maximum.tmp)),
            ("pids", default.pids <= maximum.pids, default.pids.to_string(), maximum.pids.to_string()),
            (
                "open_files",
                default.open_files <= maximum.open_files,
                default.open_files.to_string(),
                maximum.open_files.to_string(),
            ),
            ("idle", default.idle <= maximum.idle, seconds(default.idle), seconds(maximum.idle)),
            ("lifetime", default.lifetime <= maximum.lifetime, seconds(default.lifetime), seconds(maximum.lifetime)),
            (
                "execution",
                default.execution <= maximum.execution,
                seconds(default.execution),
                seconds(maximum.execution),
            ),
            ("paused", default.paused <= maximum.paused, seconds(default.paused), seconds(maximum.paused)),
        ] {
            let (low, high) =
                (format!("templates.{name}.default.{field}"), format!("templates.{name}.maximum.{field}"));
            let source = self.source(&key_of(&high));
            self.require(holds, &[&low, &high], || {
                format!("{default} is above its ceiling, {high} = {maximum} ({source})")
            });
        }
    }

    fn positive(&mut self, time: Duration, key: &str) {
        self.require(!time.is_zero(), &[key], || "must be longer than zero".to_owned());
    }
}

fn mib(bytes: u64) -> String {
    match bytes % MIB {
        0 => format!("{}MiB", bytes / MIB),
        _ => format!("{bytes}B"),
    }
}

/// The `host:port` of a proxy's URL.
pub fn proxy_of(url: &str) -> Option<&str> {
    let authority = url.strip_prefix("http://")?.trim_end_matches('/');
    let (host, port) = authority.rsplit_once(':')?;
    let is_host = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b));
    (is_host && port.parse::<u16>().is_ok_and(|port| port > 0)).then_some(authority)
}

/// Checks a level of the log.
///
/// # Errors
/// A sentence that says what is allowed.
pub fn check_log_level(level: &str) -> Result<(), String> {
    if level.split(',').all(is_directive) {
        return Ok(());
    }
    Err(format!(
        "{level:?} is not made of off, error, warn, info, debug and trace, such as \"info,cellblock::engine=debug\""
    ))
}

/// Whether a text may be part of a container's name and of a DNS label.
fn is_label(text: &str, longest: usize) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=longest).contains(&text.len()) && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// Whether a text is an origin as browsers write it.
fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else { return false };
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._:[]".contains(&b);
    !scheme.is_empty()
        && scheme.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
        && !host.is_empty()
        && host.bytes().all(inner)
}

fn is_directive(directive: &str) -> bool {
    let (target, level) = directive.trim().rsplit_once('=').unwrap_or(("cellblock", directive.trim()));
    let is_target = !target.is_empty() && target.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '-'));
    is_target && ["off", "error", "warn", "info", "debug", "trace"].contains(&level.to_ascii_lowercase().as_str())
}
