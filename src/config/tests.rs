//! Layers, mistakes and the two files that are shipped.

use std::collections::BTreeSet;
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
fn every_key_of_the_default_file_is_explained() {
    let sections: BTreeSet<&str> = ["[templates.python]", "[templates.data]"].into();
    let (mut explained, mut section) = (false, "");
    for line in DEFAULTS.lines() {
        match line.trim() {
            comment if comment.starts_with('#') => explained = true,
            "" => explained = false,
            head if head.starts_with('[') => section = head,
            key => {
                assert!(explained || sections.contains(section), "{section} {key} has no comment");
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
}

#[test]
fn rules_between_keys() {
    for (text, key, words) in [
        ("default_template = 'none'", "default_template", "enabled templates: data, python"),
        ("templates.data.enabled = false", "default_template", "enabled templates: python"),
        ("engine.uid_last = 40009", "engine.uid_last", "40000 to 40009 are 10 users"),
        ("engine.host = 'ssh://x'", "engine.host", "is none of unix:///path"),
        ("engine.tls_cert_dir = '/c'", "engine.tls_cert_dir", "for an engine over TCP"),
        ("templates.data.env.'1A' = 'x'", "templates.data.env.1A", "no digit first"),
        ("templates.data.env.LD_PRELOAD = 'x'", "templates.data.env.LD_PRELOAD", "is reserved"),
        ("[templates.Mine]\nimage = 'x'", "templates.Mine", "a template's name"),
        ("templates.data.default.cpu = nan", "templates.data.default.cpu", "not within 0.05"),
        ("limits.queued_executions = 0", "limits.queued_executions", "not within 1"),
        ("limits.sessions = -1", "limits.sessions", "a whole number from 0"),
        ("engine.orphan_timeout = '10s'", "engine.orphan_timeout", "at least 15s"),
        ("templates.data.pool.min = 3", "templates.data.pool.min", "at most (pool.max)"),
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
fn effective_values_name_their_source() {
    let (inputs, file) = inputs("[template_defaults]\nruntime = 'runsc'\n", &[("DOCKER_HOST", "tcp://h:1")]);
    let text = load(&inputs).unwrap().describe();
    let has = |start: &str, end: &str| text.lines().any(|l| l.starts_with(start) && l.ends_with(end));
    assert!(has("engine.host = \"tcp://h:1\"", "# environment DOCKER_HOST"), "{text}");
    assert!(has("limits.sessions = 100", "# default"), "{text}");
    assert!(has("templates.data.runtime", &format!("# {}:2, template_defaults", file.path().display())), "{text}");
}
