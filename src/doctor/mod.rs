//! `cellblock doctor`: tries whether this host does what the configuration relies on, with no server needed and none disturbed. What each finding means is
//! decided in `locks` and `place`; how it is told, in `verdict`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::app::{self, StartError};
use crate::cli::{self, while_waiting};
use crate::config::Config;
use crate::domain::lock::Lock;
use crate::domain::spec::Template;
use crate::engine::docker::trial::{Facts, Host};
use crate::run::told_to_stop;
use verdict::{Check, Findings};

mod locks;
mod place;
pub mod verdict;

/// Looks at everything, prints what was found, and gives the exit status: 0 all is well, 1 something is weak, 2 something is broken.
pub async fn run(config: &Config, json: bool) -> u8 {
    let mut findings = Findings::default();
    findings.extend(place::checks(config).await);
    if let Some(socket) = config.engine.guard() {
        findings.extend(guard_checks(config, &socket).await);
        return tell(&findings, json);
    }
    let guest = app::guest_files(config.guest.binary.as_deref());
    findings.add(guest_check(&guest));
    let settings = app::engine_settings(config, guest.unwrap_or_default());
    let host = match while_waiting("asking the engine", Host::connect(settings)).await {
        Ok(host) => host,
        Err(error) => {
            let remedy = "start Docker and let this user reach it: `docker info` tells; engine.host says where it is";
            findings.add(Check::broken("engine", format!("{}: {error}", config.engine.host)).with(remedy));
            return tell(&findings, json);
        }
    };
    findings.extend(engine_checks(config, &host));
    let tried = tokio::select! {
        checks = while_waiting("trying this host's locks", try_host(config, &host)) => Some(checks),
        () = told_to_stop() => None,
    };
    let cleared = host.clear().await;
    let Some(checks) = tried else {
        return cli::CANCELLED;
    };
    findings.extend(checks);
    if let Err(error) = cleared {
        let remedy = "`make clean-containers` removes it, and so does a server after ten minutes";
        findings.add(Check::weak("leftovers", format!("what was tried could not be removed: {error}")).with(remedy));
    }
    tell(&findings, json)
}

fn tell(findings: &Findings, json: bool) -> u8 {
    let text = if json { format!("{:#}\n", findings.to_json()) } else { findings.to_text() };
    match std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()) {
        Ok(()) => findings.verdict().exit_status(),
        Err(error) => cli::complain(&error.into()),
    }
}

/// Where a guard has the engine, only it can try anything there.
async fn guard_checks(config: &Config, socket: &Path) -> Vec<Check> {
    let guard = match while_waiting("asking the guard", app::connect(config)).await {
        Ok(_) => Check::ok("guard", format!("the one at {} answers, and so does its engine", socket.display())),
        Err(error) => Check::broken("guard", error.to_string().replace('\n', ";")),
    };
    let remedy = "run this where the guard runs, with its configuration: engine.host is the engine's own address there";
    vec![guard, Check::weak("locks", "not tried: the guard has the engine").with(remedy)]
}

fn guest_check<T>(guest: &Result<T, StartError>) -> Check {
    match guest {
        Ok(_) => Check::ok("guest", "its binary can be read"),
        Err(error) => Check::broken("guest", error.to_string().replace('\n', ";")),
    }
}

/// What the engine says of itself.
fn engine_checks(config: &Config, host: &Host) -> Vec<Check> {
    let facts = host.facts();
    let mut checks = vec![
        Check::ok("engine", format!("Docker Engine {}, API {}, {}", facts.version, facts.api, facts.storage)),
        Check::ok("cgroups", format!("version {}, made by {}", facts.cgroup_version, facts.cgroup_driver)),
        Check::ok("users", users(&facts)),
        Check::ok("runtimes", format!("{}; the first is the default", facts.runtimes.join(", "))),
        place::clock(host.clock_ahead_ms),
    ];
    for missing in facts.missing {
        checks.push(Check::broken("host", missing).with("no server starts on it: use another machine, or mend that"));
    }
    for warning in facts.warnings {
        checks.push(
            Check::weak("host", format!("the engine warns: {warning}")).with("its own documentation says what to do"),
        );
    }
    let unmet =
        app::demands(config).into_iter().filter_map(|demand| host.unmet(&demand).map(|why| (demand.template, why)));
    checks.extend(unmet.map(|(template, why)| Check::broken(format!("template {template}"), why)));
    checks
}

fn users(facts: &Facts) -> &'static str {
    match (facts.is_rootless, facts.is_remapped) {
        (true, _) => "the engine runs without root, and uids inside are others outside",
        (false, true) => "uids inside are others outside",
        (false, false) => {
            "the engine runs as root, and uids inside are the same outside; each session has one of its own"
        }
    }
}

/// Images, and what needs a container.
async fn try_host(config: &Config, host: &Host) -> Vec<Check> {
    let mut checks = Vec::new();
    // Each runtime is tried once, with the first image of its templates that is there.
    let mut runtimes: BTreeMap<&str, Tryout<'_>> = BTreeMap::new();
    for template in config.templates.values() {
        let name = format!("image of {}", template.name);
        let tryout = runtimes.entry(host.runtime_name(&template.runtime)).or_default();
        tryout.templates.push(template);
        match host.image(&template.image).await {
            Ok(image) => {
                checks.push(Check::ok(name, format!("{} is {}", template.image, short(&image.id))));
                tryout.image.get_or_insert(image.id);
            }
            Err(error) => {
                let remedy =
                    "`make images` builds ours, `docker pull` fetches others; enabled = false hides the template";
                checks.push(Check::broken(name, error.to_string()).with(remedy));
            }
        }
    }
    let mut disk = None;
    for (runtime, tryout) in runtimes {
        let Some(image) = &tryout.image else {
            let seen = "no image of its templates is there to try them with";
            checks.push(Check::broken(format!("locks ({runtime})"), seen));
            continue;
        };
        let Some(unenforced) = host.unenforced(runtime) else { continue };
        match host.try_locks(image, runtime).await {
            Ok(found) => {
                disk = disk.or(found.machine.clone());
                checks.extend(locks::checks(runtime, &found, &unenforced, &tryout.accepted()));
            }
            Err(error) => checks.push(Check::broken(format!("locks ({runtime})"), error.to_string())),
        }
        if !checks.iter().any(|check: &Check| check.name == place::QUOTA) {
            checks.push(place::quota(host, image).await);
            checks.extend(place::workspace_quota(config, host).await);
        }
    }
    checks.extend(disk.map(|machine| place::engine_disk(machine.disk_free_bytes, machine.disk_bytes)));
    checks
}

/// A runtime's templates, and an image of theirs.
#[derive(Default)]
struct Tryout<'a> {
    templates: Vec<&'a Template>,
    image: Option<String>,
}

impl Tryout<'_> {
    /// What all of them do without.
    fn accepted(&self) -> BTreeSet<Lock> {
        let each = self.templates.iter().map(|template| template.accept_unenforced.clone());
        each.reduce(|all, one| &all & &one).unwrap_or_default()
    }
}

fn short(id: &str) -> &str {
    let id = id.strip_prefix("sha256:").unwrap_or(id);
    id.get(..12).unwrap_or(id)
}
