//! Rules are read, met and narrowed, and hosts are told apart.

use proptest::prelude::*;

use super::*;

fn rules(texts: &[&str]) -> Arc<[Rule]> {
    texts.iter().flat_map(|text| Rule::parse(text).unwrap_or_else(|why| panic!("{why}"))).collect()
}

fn offer(usual: &[&str], may_allow: &[&str]) -> NetworkOffer {
    NetworkOffer { usual: rules(usual), may_allow: rules(may_allow), ..NetworkOffer::default() }
}

fn asked(mode: Option<NetworkMode>, allow: Option<&[&str]>) -> NetworkRequest {
    NetworkRequest { mode, allow: allow.map(|allow| allow.iter().map(|text| (*text).to_owned()).collect()) }
}

fn admits(rule: &str, host: &str, port: u16) -> bool {
    rules(&[rule]).iter().any(|rule| rule.admits(&Host::parse(host).unwrap(), port))
}

#[test]
fn rules_admit_what_they_say_and_nothing_else() {
    for (rule, host, port, expected) in [
        ("example.org", "example.org", 443, true),
        ("example.org", "EXAMPLE.org.", 80, true),
        ("example.org", "example.org", 22, false),
        ("example.org", "www.example.org", 443, false),
        ("example.org", "example.org.evil.net", 443, false),
        ("example.org", "notexample.org", 443, false),
        ("example.org:8443", "example.org", 8443, true),
        ("example.org:8443", "example.org", 443, false),
        ("*.example.org", "a.example.org", 443, true),
        ("*.example.org", "a.b.example.org", 443, true),
        ("*.example.org", "example.org", 443, false),
        ("*.example.org", "aexample.org", 443, false),
        ("*", "anything.net", 443, true),
        ("*", "93.184.216.34", 443, false),
        ("*:443", "anything.net", 80, false),
        ("93.184.216.34", "93.184.216.34", 443, true),
        ("93.184.216.34", "0x5db8d822", 443, true),
        ("93.184.216.34", "[::ffff:93.184.216.34]", 443, true),
        ("93.184.216.34", "93.184.216.35", 443, false),
        ("[2606:4700::1111]:853", "[2606:4700::1111]", 853, true),
        ("2606:4700::1111", "2606:4700:0::1111", 443, true),
        ("pypi", "pypi.org", 443, true),
        ("pypi", "files.pythonhosted.org", 443, true),
        ("pypi", "pypi.org", 80, false),
        ("pypi", "evil.pythonhosted.org", 443, false),
        ("debian", "deb.debian.org", 80, true),
    ] {
        assert_eq!(admits(rule, host, port), expected, "{rule} {host} {port}");
    }
}

#[test]
fn what_is_no_rule_is_refused_with_what_is_allowed() {
    for text in [
        "",
        "pipy",
        "localhost",
        "*.local",
        "intranet",
        "127.0.0.1",
        "10.0.0.1:443",
        "0x7f.1",
        "[::1]:443",
        "fd00:ec2::254",
        "169.254.169.254",
        "*.169.254.169.254",
        "example.org:0",
        "example.org:65536",
        "example.org:",
        "example.org:+1",
        "https://example.org",
        "user@example.org",
        "ex*mple.org",
        "*example.org",
        "*.*.org",
        "example.org/path",
        "b\u{fc}cher.example",
        "metadata.google.internal",
        "llm.upstream",
        "**",
    ] {
        let why = Rule::parse(text).expect_err(text);
        assert!(why.contains("Allowed are") && why.contains("\"pypi\""), "{why}");
    }
}

#[test]
fn a_caller_chooses_within_what_the_template_permits() {
    let offer = offer(&["pypi"], &["*.example.org", "github.com:443"]);
    let none = Network::default();
    let chosen = |request: &NetworkRequest| offer.choose(&none, request);
    assert_eq!(chosen(&asked(None, None)), Ok(none.clone()));
    assert_eq!(chosen(&asked(Some(NetworkMode::None), None)), Ok(none.clone()));
    let usual = chosen(&asked(Some(NetworkMode::Allowlist), None)).unwrap();
    assert_eq!(usual, Network { mode: NetworkMode::Allowlist, allow: rules(&["pypi"]) });
    for permitted in ["pypi", "pypi.org:443", "*.example.org", "*.b.example.org:80", "a.example.org", "github.com:443"]
    {
        let network = chosen(&asked(None, Some(&[permitted]))).unwrap_or_else(|e| panic!("{permitted}: {e:?}"));
        assert!(network.is_open());
    }
    for refused in
        ["github.com", "pypi.org", "example.org", "*", "a.example.org:22", "npm", "93.184.216.34", "localhost"]
    {
        let errors = chosen(&asked(Some(NetworkMode::Allowlist), Some(&["pypi", refused]))).unwrap_err();
        assert_eq!(errors.len(), 1, "{refused}");
        assert_eq!(errors[0].pointer, "/network/allow/1", "{refused}");
    }
    let errors = chosen(&asked(Some(NetworkMode::None), Some(&["pypi"]))).unwrap_err();
    assert_eq!(errors[0].pointer, "/network/allow");
    let many: Vec<String> = (0..=MAX_RULES).map(|n| format!("n{n}.example.org")).collect();
    let errors = chosen(&NetworkRequest { mode: None, allow: Some(many) }).unwrap_err();
    assert_eq!(errors[0].pointer, "/network/allow");
    // What it has stays where nothing else is asked for.
    let only = chosen(&asked(None, Some(&["a.example.org"]))).unwrap();
    assert_eq!(offer.choose(&only, &asked(Some(NetworkMode::Allowlist), None)), Ok(only.clone()));
    assert_eq!(offer.choose(&only, &asked(None, None)), Ok(only));
}

#[test]
fn a_template_that_permits_nothing_permits_nothing() {
    let offer = NetworkOffer::default();
    for request in [asked(Some(NetworkMode::Allowlist), None), asked(None, Some(&["pypi"])), asked(None, Some(&[]))] {
        let errors = offer.choose(&Network::default(), &request).unwrap_err();
        assert_eq!(errors[0].pointer, "/network/mode");
    }
}

#[test]
fn a_closed_session_admits_nothing_whatever_its_rules() {
    let network = Network { mode: NetworkMode::None, allow: rules(&["*"]) };
    assert!(!network.admits(&Host::parse("example.org").unwrap(), 443));
}

#[test]
fn an_upstream_is_named_by_its_own_kind_of_name() {
    let named = |host: &str| Upstream::named_by(&Host::parse(host).unwrap()).map(str::to_owned);
    assert_eq!(named("llm.upstream").as_deref(), Some("llm"));
    assert_eq!(named("LLM.Upstream.").as_deref(), Some("llm"));
    assert_eq!(named("a.llm.upstream"), None);
    assert_eq!(named("upstream"), None);
    assert_eq!(named("llm.upstream.example.org"), None);
    let read = |url: &str| Upstream::parse_url(url).map_err(|_| ());
    assert_eq!(read("https://api.example.org"), Ok(("api.example.org".into(), 443, String::new())));
    assert_eq!(read("https://API.example.org:8443/v1/"), Ok(("api.example.org".into(), 8443, "/v1".into())));
    for wrong in [
        "http://api.example.org",
        "https://",
        "https://user@api.example.org",
        "https://api.example.org?x=1",
        "https://10.0.0.1/",
        "https://localhost/",
        "https://api.example.org/a/../b",
        "https://api.example.org/a%2fb",
        "https://api.example.org//b",
        "ftp://api.example.org",
    ] {
        assert_eq!(read(wrong), Err(()), "{wrong}");
    }
}

proptest! {
    #[test]
    fn a_rule_is_read_again_as_itself(name in "[a-z]{1,8}\\.[a-z]{2,6}", port: Option<u16>, below: bool) {
        let port = port.filter(|port| *port > 0);
        let text = format!("{}{name}{}", if below { "*." } else { "" }, port.map(|p| format!(":{p}")).unwrap_or_default());
        if let Ok(read) = Rule::parse(&text) {
            prop_assert_eq!(read[0].to_string(), text);
            prop_assert_eq!(Rule::parse(&read[0].to_string()).unwrap(), read);
        }
    }

    #[test]
    fn what_is_covered_admits_nothing_more(
        (one, other) in ("[ab*](\\.[ab]){1,3}(:80|:443)?", "[ab*](\\.[ab]){1,3}(:80|:443)?"),
        host in "[abc](\\.[abc]){1,4}", port in prop_oneof![Just(80), Just(443), Just(22)],
    ) {
        let (Ok(one), Ok(other)) = (Rule::parse(&one), Rule::parse(&other)) else { return Ok(()) };
        let host = Host::parse(&host).unwrap();
        if one[0].covers(&other[0]) && other[0].admits(&host, port) {
            prop_assert!(one[0].admits(&host, port));
        }
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,60}") {
        let _ = (Rule::parse(&text), Upstream::parse_url(&text));
    }
}
