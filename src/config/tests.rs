//! Layers, mistakes and the two files that are shipped.

use std::io::Write as _;
use std::time::Duration;

use tempfile::NamedTempFile;

use super::merge::DEFAULTS;
use super::*;
use crate::domain::lock::Lock;
use crate::domain::spec::MIB;

fn environment(pairs: &[(&str, &str)]) -> Environment {
    [("HOME", "/home/ada")].iter().chain(pairs).map(|(n, v)| (*n, *v)).collect()
}

fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn inputs(text: &str, variables: &[(&str, &str)]) -> (Inputs, NamedTempFile) {
    let file = file(text);
    let inputs =
        Inputs { files: vec![file.path().to_owned()], environment: environment(variables), ..Inputs::default() };
    (inputs, file)
}

fn mistakes(text: &str, variables: &[(&str, &str)]) -> Vec<(String, String)> {
    let (inputs, _file) = inputs(text, variables);
    let Err(Mistakes(found)) = load(&inputs) else { return Vec::new() };
    found.into_iter().map(|m| (m.key, m.message)).collect()
}

fn one_mistake(text: &str) -> (String, String) {
    let found = mistakes(text, &[]);
    assert_eq!(found.len(), 1, "{found:#?}");
    found[0].clone()
}

fn loaded(text: &str, variables: &[(&str, &str)]) -> Loaded {
    let (inputs, _file) = inputs(text, variables);
    load(&inputs).unwrap()
}

#[test]
fn defaults_have_no_mistakes_and_are_as_documented() {
    let config = load(&Inputs { environment: environment(&[]), ..Inputs::default() }).unwrap().config;
    assert_eq!(config.default_template, "data");
    assert_eq!(config.server.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(config.server.data_dir, PathBuf::from("/home/ada/.local/share/cellblock"));
    assert_eq!(config.server.key_file(), PathBuf::from("/home/ada/.local/share/cellblock/api-key"));
    assert_eq!(config.engine.host, "unix:///var/run/docker.sock");
    assert_eq!(config.engine.docker_config, Some(PathBuf::from("/home/ada/.docker")));
    assert_eq!(config.guest.binary, None);
    assert_eq!((config.engine.guard(), config.guard.user), (None, None));
    let (python, data) = (&config.templates["python"], &config.templates["data"]);
    assert_eq!((python.default_resources.memory_bytes, data.default_resources.memory_bytes), (512 * MIB, 1024 * MIB));
    assert_eq!(python.default_resources.cpu_millis, 1000);
    assert_eq!(data.max_timeouts.execution, Duration::from_secs(3600));
    assert_eq!((python.image.as_str(), data.image.as_str()), ("cellblock/python:latest", "cellblock/data:latest"));
    assert_eq!((data.output.text_bytes, data.output.messages), (MIB, 2000));
}

/// No field has a default of serde's and unknown keys are refused, so reading the file alone holds both directions.
#[test]
fn default_file_and_sections_have_the_same_keys() {
    let merge = Merge::new();
    assert_eq!(merge.mistakes, []);
    let mut leaves = merge.leaves.clone();
    inherit(&mut leaves, &merge.templates);
    leaves.insert(key_of("server.listen"), leaves[&key_of("server.listen")].clone());
    read(&leaves).unwrap();
    for key in leaves.keys().filter(|key| key[0] != "templates") {
        let mut fewer = leaves.clone();
        fewer.remove(key);
        assert!(read(&fewer).is_err(), "{} has a default outside default.toml", dotted(key));
    }
}

#[test]
fn a_rootless_engine_is_found_where_there_is_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let (path, usual) = (folder.path().display().to_string(), folder.path().join("usual.sock"));
    let variables = environment(&[("XDG_RUNTIME_DIR", &path)]);
    let found = || super::layers::rootless_socket(&variables, &usual);
    assert_eq!(found(), None, "it does not run");
    std::fs::write(folder.path().join("docker.sock"), "").unwrap();
    assert_eq!(found(), Some(("XDG_RUNTIME_DIR".to_owned(), format!("unix://{path}/docker.sock"))));
    std::fs::write(&usual, "").unwrap();
    assert_eq!(found(), None, "the usual one is there");
}

#[test]
fn templates_stand_in_files_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    std::fs::create_dir(folder.path().join("templates")).unwrap();
    file(
        "config.toml",
        "templates_dir = 'templates'\n[templates.small]\nimage = 'old'\n[templates.kept]\nimage = 'x'\n",
    );
    file("templates/small.toml", "image = 'small'\n[default]\npids = 40\n");
    file("templates/python.toml", "enabled = false\n");
    file("templates/notes.txt", "no template");
    let inputs = |variables| Inputs {
        files: vec![folder.path().join("config.toml")],
        environment: environment(variables),
        ..Inputs::default()
    };
    let config = load(&inputs(&[("CELLBLOCK__TEMPLATES__SMALL__DEFAULT__PIDS", "41")])).unwrap().config;
    assert_eq!(config.templates.keys().collect::<Vec<_>>(), ["bash", "data", "deno", "kept", "polyglot", "r", "small"]);
    let small = &config.templates["small"];
    assert_eq!((small.image.as_str(), small.default_resources.pids), ("small", 41));

    file("templates/wrong.toml", "imaeg = 'x'\n[default\n");
    let Err(Mistakes(found)) = load(&inputs(&[])) else { panic!("wrong.toml was taken") };
    let told: Vec<String> = found.iter().map(ToString::to_string).collect();
    let path = folder.path().join("templates/wrong.toml");
    let at = |text: &str| {
        format!("templates.wrong.imaeg ({}:1): there is no such key; did you mean {text}?", path.display())
    };
    assert!(told.contains(&at("templates.wrong.image")), "{told:?}");
    assert!(told.iter().any(|m| m.contains("wrong.toml:2") && m.contains("not TOML")), "{told:?}");

    let missing = load(&inputs(&[("CELLBLOCK__TEMPLATES_DIR", "/nowhere")])).unwrap_err();
    assert!(missing.to_string().contains("/nowhere"), "{missing}");
}

#[test]
fn every_key_of_the_default_file_is_explained() {
    let (mut explained, mut section) = (false, "");
    for line in DEFAULTS.lines() {
        match line.trim() {
            comment if comment.starts_with('#') => explained = true,
            "" => explained = false,
            head if head.starts_with('[') => section = head,
            key => {
                assert!(explained, "{section} {key} has no comment");
                explained = false;
            }
        }
    }
}

#[test]
fn the_production_example_has_no_mistakes() {
    let loaded = loaded(include_str!("../../config/production.example.toml"), &[]);
    assert_eq!(loaded.config.templates.keys().collect::<Vec<_>>(), ["data", "reports"]);
    let reports = &loaded.config.templates["reports"];
    assert_eq!((reports.runtime.as_str(), reports.default_resources.memory_bytes), ("runsc", 512 * MIB));
    assert_eq!(reports.env["OMP_NUM_THREADS"], "1");
    let accepted = [Lock::Pids, Lock::Seccomp, Lock::TmpfsInodes, Lock::MountFlags];
    assert_eq!(reports.accept_unenforced, accepted.into());
}

#[test]
fn each_layer_wins_over_the_one_before() {
    let first = file("limits.sessions = 11\nlimits.concurrent_starts = 5\nexecutions.interrupt_grace = '2s'");
    let second = file("limits.sessions = 12\nlimits.concurrent_starts = 6");
    let mut inputs = Inputs {
        files: vec![first.path().to_owned(), second.path().to_owned()],
        environment: environment(&[("CELLBLOCK__LIMITS__SESSIONS", "13")]),
        ..Inputs::default()
    };
    let config = load(&inputs).unwrap().config;
    assert_eq!((config.limits.sessions, config.limits.concurrent_starts), (13, 6));
    assert_eq!(config.executions.interrupt_grace, Duration::from_secs(2));
    inputs = inputs.with("--set", "limits.sessions", "14");
    assert_eq!(load(&inputs).unwrap().config.limits.sessions, 14);
}

#[test]
fn a_named_file_replaces_the_usual_places() {
    let (usual, named) = (file("limits.sessions = 21"), file("limits.concurrent_starts = 7"));
    let mut inputs = Inputs {
        search: vec![PathBuf::from("/no/such/file"), usual.path().to_owned()],
        environment: environment(&[]),
        ..Inputs::default()
    };
    assert_eq!(load(&inputs).unwrap().config.limits.sessions, 21);
    inputs.environment = environment(&[("CELLBLOCK_CONFIG", named.path().to_str().unwrap())]);
    let limits = load(&inputs).unwrap().config.limits;
    assert_eq!((limits.sessions, limits.concurrent_starts), (100, 7));
    inputs.files = vec![PathBuf::from("/no/such/file")];
    assert!(load(&inputs).unwrap_err().to_string().contains("/no/such/file: can't be read"));
}

#[test]
fn dockers_own_variables_are_weaker_than_files() {
    let tls = [("DOCKER_HOST", "tcp://builder:2376"), ("DOCKER_TLS_VERIFY", "1"), ("DOCKER_CERT_PATH", "/certs")];
    let engine = loaded("", &tls).config.engine;
    assert_eq!((engine.host.as_str(), engine.tls_cert_dir), ("tcp://builder:2376", Some(PathBuf::from("/certs"))));
    let engine = loaded("engine.host = 'tcp://other:2376'", &tls).config.engine;
    assert_eq!((engine.host.as_str(), engine.tls_cert_dir), ("tcp://other:2376", None));
    assert_eq!(mistakes("engine.host = 'unix:///run/docker.sock'", &tls), []);
}

#[test]
fn a_value_may_stand_in_a_file_of_its_own() {
    let value = file("  hushed\n");
    let path = value.path().to_str().unwrap();
    let loaded = loaded("", &[("CELLBLOCK__ENGINE__INSTANCE_FILE", path)]);
    assert_eq!(loaded.config.engine.instance, "hushed");
    assert!(!loaded.describe().contains("hushed"));
    let both = [("CELLBLOCK__ENGINE__INSTANCE_FILE", path), ("CELLBLOCK__ENGINE__INSTANCE", "x")];
    assert!(mistakes("", &both)[0].1.contains("keep one of them"));
    let missing = mistakes("", &[("CELLBLOCK__ENGINE__INSTANCE_FILE", "/no/such/file")]);
    assert!(missing[0].1.contains("can't be read"), "{missing:?}");
}

#[test]
fn a_key_that_ends_in_file_is_itself() {
    let config = loaded("", &[("CELLBLOCK__SERVER__API_KEY_FILE", "/keys/one")]).config;
    assert_eq!(config.server.api_key_file, Some(PathBuf::from("/keys/one")));
}

#[test]
fn variables_reach_templates_and_keep_the_case_of_their_environment() {
    let config = loaded(
        "",
        &[
            ("CELLBLOCK__TEMPLATES__SMALL__IMAGE", "small:1"),
            ("CELLBLOCK__TEMPLATES__SMALL__DEFAULT__CPU", "0.5"),
            ("CELLBLOCK__TEMPLATES__SMALL__ENV__Some__Name", "yes"),
        ],
    )
    .config;
    let small = &config.templates["small"];
    assert_eq!((small.default_resources.cpu_millis, small.env["Some__Name"].as_str()), (500, "yes"));
    assert_eq!(small.default_resources.memory_bytes, 512 * MIB);
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let (inputs, file) = inputs(
        "[server]\nlisten = 'localhost'\nmax_body = 16\nlistne = 1\n[engine]\ninstance = 'No!'\npull = 'always'\n\
         [templates.mine.default]\nmemory = '64MiB'\n[servr]\nlisten = 1\nother = 2\n",
        &[("CELLBLOCK__LIMITS__SESSIONS", "many"), ("CELLBLOCK__LOG__LEVEL", "loud")],
    );
    let inputs = inputs.with("--set", "executions.interrupt_grace", "5");
    let text = load(&inputs).unwrap_err().to_string();
    let path = file.path().display();
    for line in [
        "the configuration has 11 mistakes:".to_owned(),
        format!("server.listen ({path}:2): \"localhost\" is not an IP address and a port, such as"),
        format!("server.max_body ({path}:3): a bare number has no unit; write \"16MiB\" or \"16GiB\""),
        format!("server.listne ({path}:4): there is no such key; did you mean server.listen?"),
        format!("engine.instance ({path}:6): \"No!\" is not 1 to 20 of a-z"),
        format!("engine.pull ({path}:7): is not known: `always`, expected `never` or `missing`"),
        format!("servr ({path}:10): there is no such key; did you mean server?"),
        "limits.sessions (environment CELLBLOCK__LIMITS__SESSIONS): invalid type: string \"many\", expected a whole number"
            .to_owned(),
        "log.level (environment CELLBLOCK__LOG__LEVEL): \"loud\" is not made of off".to_owned(),
        "executions.interrupt_grace (--set): \"5\" has no unit; write \"5s\" or \"5m\"".to_owned(),
        "templates.mine.image (default): every template names an image".to_owned(),
        format!("templates.mine.default.memory ({path}:9): files are kept in memory: disk 256MiB, tmp 64MiB and 48MiB"),
    ] {
        assert!(text.contains(&line), "{line}\nis missing in\n{text}");
    }
}

#[test]
fn a_mistake_in_an_inherited_value_is_told_once() {
    assert_eq!(one_mistake("template_defaults.default.memory = '1GB'").0, "template_defaults.default.memory");
}

#[test]
fn syntax_errors_name_their_line() {
    let (inputs, file) = inputs("a = \n[server]\nmax_body = '1MiB'\n", &[]);
    let text = load(&inputs).unwrap_err().to_string();
    assert!(text.contains(&format!("{}:1: not TOML", file.path().display())), "{text}");
}

#[test]
fn defaults_stay_below_ceilings() {
    let (key, message) = one_mistake("[templates.data.default]\npids = 600");
    assert_eq!(key, "templates.data.default.pids");
    assert_eq!(message, "600 is above its ceiling, templates.data.maximum.pids = 512 (default)");
}

#[test]
fn files_in_memory_must_fit() {
    let message = one_mistake("[templates.python.default]\ndisk = '448MiB'").1;
    assert!(message.contains("set memory to at least 560MiB, or disk and tmp to at most 464MiB together"), "{message}");
}

#[test]
fn listening_beyond_loopback_must_be_meant() {
    let found = mistakes("server.listen = '0.0.0.0:80'", &[]);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].1.contains("server.allow_plain_http = true"));
    assert!(found[1].1.contains("server.api_key_file"));
    let meant = "[server]\nlisten = '0.0.0.0:80'\nallow_plain_http = true\napi_key_file = '/run/secrets/key'";
    assert_eq!(mistakes(meant, &[]), []);
    assert_eq!(mistakes("server.listen = '[::1]:80'", &[]), []);
    let otherwise = ["tls_cert_file = '/c'\ntls_key_file = '/k'", "trusted_proxies = ['10.0.0.1']"];
    for private in otherwise {
        let text = format!("[server]\nlisten = '0.0.0.0:80'\napi_key_file = '/run/secrets/key'\n{private}");
        assert_eq!(mistakes(&text, &[]), [], "{private}");
        let found = mistakes(&text.replace("api_key_file = '/run/secrets/key'", ""), &[]);
        assert_eq!(found.len(), 1, "{private}: {found:?}");
    }
}

#[test]
fn lists_may_come_as_one_text() {
    let variables =
        [("CELLBLOCK__SERVER__TRUSTED_PROXIES", "10.0.0.0/8, ::1"), ("CELLBLOCK__SERVER__CORS_ORIGINS", "")];
    let server = loaded("", &variables).config.server;
    let networks: Vec<_> = server.trusted_proxies.iter().map(ToString::to_string).collect();
    assert_eq!((networks, server.cors_origins), (vec!["10.0.0.0/8".to_owned(), "::1/128".to_owned()], vec![]));
    let server = loaded("server.cors_origins = ['https://a.example', 'http://localhost:3000']", &[]).config.server;
    assert_eq!(server.cors_origins, ["https://a.example", "http://localhost:3000"]);
}

#[test]
fn an_admin_listener_beyond_loopback_must_be_meant_and_is_apart() {
    let (key, message) = one_mistake("server.admin_listen = '0.0.0.0:9090'");
    assert_eq!(key, "server.admin_listen");
    assert!(message.contains("server.admin_allow_remote = true"), "{message}");
    assert_eq!(mistakes("[server]\nadmin_listen = '0.0.0.0:9090'\nadmin_allow_remote = true", &[]), []);
    let (_, message) = one_mistake("server.admin_listen = '127.0.0.1:8080'");
    assert!(message.contains("a port of its own"), "{message}");
    let loaded = loaded("server.admin_listen = '[::1]:9090'", &[]);
    assert_eq!(loaded.config.server.admin_listen, "[::1]:9090".parse().ok());
    assert_eq!(self::loaded("", &[]).config.server.admin_listen, None);
}

#[test]
fn rules_between_keys() {
    for (text, key, words) in [
        ("default_template = 'none'", "default_template", "enabled templates: bash, data, deno, polyglot, python, r"),
        ("templates.data.enabled = false", "default_template", "enabled templates: bash, deno, polyglot, python, r"),
        ("engine.uid_last = 40009", "engine.uid_last", "40000 to 40009 are 10 users"),
        ("engine.host = 'ssh://x'", "engine.host", "is none of unix:///path"),
        ("engine.tls_cert_dir = '/c'", "engine.tls_cert_dir", "for an engine over TCP"),
        ("engine.host = 'guard://x'", "engine.host", "guard:///path"),
        ("guard.socket = 'guard.sock'", "guard.socket", "not an absolute path"),
        ("guard.user = 'ada'", "guard.user", "is not a whole number"),
        ("guard.creates_per_minute = 0", "guard.creates_per_minute", "not within 1"),
        ("templates.data.env.'1A' = 'x'", "templates.data.env.1A", "no digit first"),
        ("templates.data.env.LD_PRELOAD = 'x'", "templates.data.env.LD_PRELOAD", "is reserved"),
        ("[templates.Mine]\nimage = 'x'", "templates.Mine", "a template's name"),
        ("templates.data.default.cpu = nan", "templates.data.default.cpu", "not within 0.05"),
        ("limits.queued_executions = 0", "limits.queued_executions", "not within 1"),
        ("limits.sessions = -1", "limits.sessions", "a whole number from 0"),
        ("server.tls_cert_file = '/c'", "server.tls_cert_file", "go together"),
        ("server.tls_key_file = '/k'", "server.tls_cert_file", "go together"),
        ("server.trusted_proxies = ['0.0.0.0/0']", "server.trusted_proxies", "is everybody"),
        ("server.trusted_proxies = ['proxy']", "server.trusted_proxies", "not a network or an address"),
        ("server.cors_origins = ['*']", "server.cors_origins", "not an origin"),
        ("server.cors_origins = ['https://a.example/']", "server.cors_origins", "no path"),
        ("server.cors_origins = ['https://A.example']", "server.cors_origins", "lower case"),
        ("server.connections_per_address = 1001", "server.connections_per_address", "server.connections, 1000"),
        ("server.connections = 0", "server.connections", "not within 1"),
        ("server.max_header = '1KiB'", "server.max_header", "8KiB to 1MiB"),
        ("server.header_timeout = '0s'", "server.header_timeout", "longer than zero"),
        ("engine.orphan_timeout = '10s'", "engine.orphan_timeout", "at least 15s"),
        ("templates.data.pool.min = 3", "templates.data.pool.min", "at most (pool.max)"),
        ("templates.data.ports = ['80', '90-80']", "templates.data.ports", "90-80"),
        ("server.ports_domain = 'Ports.example'", "server.ports_domain", "lower case"),
        ("server.ports_domain = '.example'", "server.ports_domain", "lower case"),
        ("server.ports_timeout = '0s'", "server.ports_timeout", "longer than zero"),
        ("templates.data.data = [{name = 'a', path = '/usr/x'}]", "templates.data.data", "system's"),
        ("templates.data.data = [{name = 'a b', path = '/mnt/x'}]", "templates.data.data", "not the name"),
        ("templates.data.data = [{name = 'a', path = '/mnt/x', mode = 'rw'}]", "templates.data.data", "mode"),
        ("templates.data.pool.max = 101", "templates.data.pool.max", "limits.sessions"),
        (
            "templates.data.pool.other = [{memory = '64GiB', max = 1}]",
            "templates.data.pool.other",
            "number 1, resources/memory_mb",
        ),
        (
            "templates.data.pool.other = [{cpu = 1, max = 1}, {cpu = 1.0, max = 1}]",
            "templates.data.pool.other",
            "number 2 has",
        ),
        (
            "templates.data.pool.other = [{cpu = 0.5, min = 2, max = 1}]",
            "templates.data.pool.other",
            "number 1 is to hold 2 to 1",
        ),
        ("templates.data.pool.other = [{cpu = 0.5, most = 1}]", "templates.data.pool.other", "most"),
        (
            "tenants.acme.class = 'none'",
            "tenants.acme.class",
            "none of the classes that have a key of their own: default",
        ),
        ("tenants.acme.sesions = 1", "tenants.acme.sesions", "did you mean tenants.acme.sessions?"),
        ("classes.trial.class = 'default'", "classes.trial.class", "no such key"),
        ("classes.trial.cpu = 0.01", "classes.trial.cpu", "not within 0.05"),
        ("classes.default.requests_per_second = -1.0", "classes.default.requests_per_second", "not within 0.001"),
        ("tenants.acme.memory = 5", "tenants.acme.memory", "has no unit"),
        ("tenants.'a b'.sessions = 1", "tenants.a b", "1 to 64 letters"),
        ("tenants.acme = 5", "tenants.acme", "is a section"),
        ("server = 1", "server", "is a section, not a value"),
        ("server.listen.host = 'x'", "server.listen", "is a value, not a section"),
        ("templates.data.memory = '1GiB'", "templates.data.memory", "did you mean templates.data.default.memory?"),
        ("listen = 'x'", "listen", "did you mean server.listen?"),
        ("zzzzzzzz = 1", "zzzzzzzz", "no such key"),
    ] {
        let found = mistakes(text, &[]);
        assert!(found.iter().any(|(k, m)| k == key && m.contains(words)), "{text}: {found:#?}");
    }
}

#[test]
fn users_are_too_few_for_sessions_or_for_workspaces_beside_them() {
    let workspaces = "[templates.python.workspace]\nkind = 'volume'\naccept_unenforced = true\n[engine]\nuid_last = ";
    let found = |text: &str| mistakes(text, &[]).into_iter().map(|(_, message)| message).collect::<Vec<_>>();
    for (text, words) in [
        ("engine.uid_last = 40009", "limits.sessions needs one of its own"),
        (&format!("{workspaces}40009"), "limits.sessions needs one of its own"),
        (&format!("{workspaces}40999"), "so does each of the 1000 of limits.workspaces"),
    ] {
        let found = found(text);
        let about_users = found.iter().filter(|message| message.contains("users; each")).collect::<Vec<_>>();
        assert!(!about_users.is_empty() && about_users.iter().all(|message| message.ends_with(words)), "{found:#?}");
    }
    assert_eq!(found("engine.uid_last = 40999"), Vec::<String>::new());
}

#[test]
fn rules_of_the_classic_door() {
    for (text, key, words) in [
        ("doors.classic.imports = ['os; x()']", "doors.classic.imports", "\"os; x()\" can't stand behind"),
        ("doors.classic.imports = ['a as b as c']", "doors.classic.imports", "can't stand behind"),
        ("doors.classic.imports = ['1a']", "doors.classic.imports", "can't stand behind"),
        ("doors.classic = {enabled = true, template = 'none'}", "doors.classic.template", "none of the enabled"),
        ("doors.classic = {enabled = true, idle = '5h'}", "doors.classic.idle", "allows, 14400s"),
        ("doors.classic = {enabled = true, idle = '0s'}", "doors.classic.idle", "not above 0"),
        ("doors.classic.enable = true", "doors.classic.enable", "did you mean doors.classic.enabled?"),
    ] {
        let found = mistakes(text, &[]);
        assert!(found.iter().any(|(k, m)| k == key && m.contains(words)), "{text}: {found:#?}");
    }
    assert_eq!(loaded("", &[]).config.doors.classic.setup(), None);
    // As it is told to operators.
    let told =
        include_str!("../../docs/CLASSIC.md").split("```toml\n").nth(1).and_then(|rest| rest.split("```").next());
    let door = loaded(told.unwrap(), &[]).config.doors.classic;
    let setup = "import pandas as pd\nimport numpy as np\nimport matplotlib.pyplot as plt\n";
    assert_eq!((door.enabled, door.setup().as_deref()), (true, Some(setup)));
}

#[test]
fn rules_of_the_way_out() {
    for (text, key, words) in [
        ("templates.data.network = 'none'", "templates.data.network", "is a section, not a value"),
        ("templates.data.network.mode = 'bridge'", "templates.data.network.mode", "is not known"),
        ("templates.data.network.allow = ['pipy']", "templates.data.network.allow", "a name without a dot"),
        ("templates.data.network.may_allow = ['10.0.0.1']", "templates.data.network.may_allow", "not public (private)"),
        (
            "templates.data.network.upstreams = [{name = 'a', url = 'http://a.org', header = 'X', secret_file = '/x'}]",
            "templates.data.network.upstreams",
            "number 1, url: \"http://a.org\": the secret is sent over TLS only",
        ),
        (
            "templates.data.network.upstreams = [{name = 'a', url = 'https://a.org', header = 'Host', secret_file = 'x'}]",
            "templates.data.network.upstreams",
            "number 1, secret_file: name a file by its absolute path",
        ),
        (
            "templates.data.network.upstreams = [{name = 'a', url = 'https://a.org', header = 'Host', secret_file = '/x'}]",
            "templates.data.network.upstreams",
            "number 1, header: allowed is",
        ),
        ("egress.proxy = 'http://me:pw@proxy:1'", "egress.proxy", "without a user"),
        ("egress.session_connections = 65", "egress.session_connections", "not within 1 to 64"),
        ("egress.connect_timeout = '1m'", "egress.connect_timeout", "100ms to 30s"),
    ] {
        let found = mistakes(text, &[]);
        assert!(found.iter().any(|(k, m)| k == key && m.contains(words)), "{text}: {found:#?}");
    }
    let good = "[templates.python.network]\nmode = 'allowlist'\nallow = ['pypi']\nmay_allow = ['*.example.org']\nupstreams = [{name = 'llm', url = 'https://api.example.org/v1', header = 'X-Key', secret_file = '/run/key'}]";
    let network = &loaded(good, &[]).config.templates["python"].network;
    assert!(network.initial.is_open() && network.initial.allow.len() == 2 && network.may_allow.len() == 1);
    assert_eq!((network.upstreams[0].host.as_str(), network.upstreams[0].path.as_str()), ("api.example.org", "/v1"));
}

#[test]
fn keys_are_sections_and_their_mistakes_are_told_with_their_names() {
    let hash = format!("sha256:{}", "0a".repeat(32));
    let key = |name: &str, rest: &str| format!("[[keys]]\nname = '{name}'\ntenant = 't'\nscopes = ['read']\n{rest}\n");
    let good = key("ci", &format!("hash = '{hash}'\ntemplates = ['python']\nexpires_at = '2027-01-01T00:00:00Z'"))
        + &key("ops", "file = '/run/secrets/ops'");
    let keys = loaded(&good, &[]).config.keys;
    assert_eq!(keys.iter().map(|key| key.name.as_str()).collect::<Vec<_>>(), ["ci", "ops"]);
    assert_eq!(keys[0].hash.map(|hash| hash.to_string()), Some(hash.clone()));
    assert_eq!((keys[0].expires_at.is_some(), keys[1].file.is_some()), (true, true));
    let hashed = format!("hash = '{hash}'");
    for (text, words) in [
        (key("a b", &hashed), "key 1 (\"a b\"): name: allowed are"),
        (key("ci", ""), "either hash or file"),
        (key("ci", &format!("{hashed}\nfile = '/x'")), "either hash or file"),
        (key("ci", "hash = 'cb_00'"), "a hash is \"sha256:\""),
        (key("ci", &hashed) + &key("ci", "file = '/x'"), "key 2 (\"ci\"): another key has this name"),
        (key("ci", &hashed) + &key("other", &hashed), "another key has this hash"),
        (key("ci", &format!("{hashed}\ntemplates = ['none']")), "\"none\" is none of the enabled templates"),
        (key("ci", &format!("{hashed}\ntemplates = []")), "name one, or leave it out"),
        (key("ci", &format!("{hashed}\nexpires_at = 'soon'")), "is not a moment such as"),
        (key("ci", &hashed).replace("'read'", "'root'"), "\"root\" is no scope"),
        (key("ci", &hashed).replace("'read'", ""), "scopes: name one"),
        (key("ci", &format!("{hashed}\ntenat = 't'")), "unknown field `tenat`"),
    ] {
        let found = mistakes(&text, &[]);
        assert!(found.iter().any(|(k, m)| k == "keys" && m.contains(words)), "{text}: {found:#?}");
    }
}

#[test]
fn a_tenant_has_what_its_class_has_and_a_class_what_the_default_one_has() {
    let text = "[classes.default]\nexecutions = 9\n[classes.trial]\nsessions = 2\nrequests_per_second = 2.5\n\
                [tenants.acme]\nclass = 'trial'\ncpu = 1.5\n[tenants.'a.b']\nmemory = '1GiB'\n";
    let loaded = loaded(text, &[("CELLBLOCK__TENANTS__ACME__CPU_SECONDS_A_DAY", "60")]);
    let of = |tenant: &str| loaded.config.quotas.of(tenant);
    let acme = of("acme");
    assert_eq!((acme.share.sessions, acme.share.cpu_millis, acme.share.memory_bytes), (Some(2), Some(1500), None));
    assert_eq!((acme.executions, acme.cpu_seconds_a_day), (Some(9), Some(60)));
    assert_eq!(acme.requests.map(|rate| (rate.per_second, rate.burst)), Some((2.5, 3)));
    assert_eq!((of("a.b").share.memory_bytes, of("a.b").share.sessions), (Some(1024 * MIB), None));
    assert_eq!((of("anybody").executions, of("anybody").requests), (Some(9), None));
    let told = loaded.describe();
    let line = told.lines().find(|line| line.starts_with("tenants.acme.executions = 9")).expect("a line");
    assert!(line.ends_with(":2, classes.default"), "{line}");
    assert!(
        told.lines().any(|line| line.starts_with("tenants.acme.sessions = 2") && line.ends_with(":4, classes.trial")),
        "{told}"
    );
}

#[test]
fn a_guard_is_named_by_its_socket_and_its_caller_by_number() {
    let text = "engine.host = 'guard:///run/x.sock'\n[guard]\nuser = '65532'";
    let config = loaded(text, &[("CELLBLOCK__GUARD__SOCKET", "/run/y.sock")]).config;
    assert_eq!(config.engine.guard(), Some(PathBuf::from("/run/x.sock")));
    assert_eq!((config.guard.user, config.guard.socket), (Some(65_532), PathBuf::from("/run/y.sock")));
}

#[test]
fn effective_values_name_their_source() {
    let (inputs, file) = inputs("[template_defaults]\nruntime = 'runsc'\n", &[("DOCKER_HOST", "tcp://h:1")]);
    let text = load(&inputs).unwrap().describe();
    let has = |start: &str, end: &str| text.lines().any(|l| l.starts_with(start) && l.ends_with(end));
    assert!(has("engine.host = \"tcp://h:1\"", "# environment DOCKER_HOST"), "{text}");
    assert!(has("limits.sessions = 100", "# default"), "{text}");
    assert!(has("templates.data.runtime", &format!("# {}:2, template_defaults", file.path().display())), "{text}");
}

#[test]
fn a_collector_is_a_plain_url_and_its_secrets_stay_private_on_the_way() {
    for endpoint in
        ["", "http://127.0.0.1:4318", "https://otel.example/base/", "http://[::1]:4318", "http://collector:4318"]
    {
        assert_eq!(mistakes(&format!("traces.endpoint = {endpoint:?}"), &[]), [], "{endpoint}");
    }
    for endpoint in [
        "127.0.0.1:4318",
        "grpc://h:4317",
        "http://",
        "http:///v1",
        "https://me:s3cret@h",
        "http://h?key=s3cret",
        "http://h#x",
        "http://h o",
    ] {
        let (key, message) = one_mistake(&format!("traces.endpoint = {endpoint:?}"));
        assert_eq!((key.as_str(), message.contains("s3cret")), ("traces.endpoint", false), "{endpoint}");
    }
    let with_secret =
        |endpoint| mistakes(&format!("[traces]\nendpoint = {endpoint:?}\nheaders_file = \"/secret\""), &[]);
    for endpoint in ["", "https://h", "http://localhost:4318", "http://127.0.0.1/x", "http://[::1]"] {
        assert_eq!(with_secret(endpoint), [], "{endpoint}");
    }
    for endpoint in ["http://h", "http://localhost.example", "http://127.0.0.1.example:4318"] {
        assert!(with_secret(endpoint)[0].1.contains("could be read on the way"), "{endpoint}");
    }
    for wrong in ["sample_ratio = 1.5", "sample_ratio = nan", "service_name = \"a b\"", "timeout = \"0s\"", "queue = 0"]
    {
        let key = wrong.split(' ').next().unwrap();
        assert_eq!(one_mistake(&format!("traces.{wrong}")).0, format!("traces.{key}"));
    }
}
