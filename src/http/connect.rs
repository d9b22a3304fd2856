//! `GET /connect`: what to paste into each client, for this server. A page without a script that asks for no key and holds none: it shows the examples, and the address
//! that it was asked under.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use base64::Engine as _;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::App;
use super::extract::Answer;
use super::problem::{self, Problem};
use crate::connect::{CLIENTS, Client, Door, Key, environment};

/// Where it is.
pub const PATH: &str = "/connect";
/// Longest name of a host, in bytes.
const MAX_NAME: usize = 253;
/// Longest part of one.
const MAX_LABEL: usize = 63;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}\
    pre{background:#f4f4f4;padding:.8rem;overflow:auto;font-size:13px;user-select:all}code{font-size:.9em}\
    @media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}pre{background:#262626}a{color:#8ab4f8}}";

/// Nothing but the page's own style, and nobody's frame.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let style = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(STYLE));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    // Base64 is text that a header can say.
    HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"))
});

/// Its route.
pub(super) fn routes() -> Router<App> {
    Router::new().route(PATH, get(show))
}

/// The page, or for programs which doors are open.
async fn show(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let (head, _) = request.into_parts();
    let open: Vec<Door> = Door::ALL.into_iter().filter(|door| is_open(&app, *door)).collect();
    let wants_json = head.headers.get(header::ACCEPT).is_some_and(|accept| accept == "application/json");
    if wants_json {
        let doors: Map<String, Value> =
            Door::ALL.iter().map(|door| (door.word().to_owned(), open.contains(door).into())).collect();
        return Ok(Answer(serde_json::json!({ "doors": doors })).into_response());
    }
    let Some(host) = host_of(&head) else {
        let detail = "Host has to name this server once, as a name or an address, with a port or without";
        return Err(Problem::new(problem::INVALID_REQUEST, detail));
    };
    let scheme = if app.is_tls(&head) { "https" } else { "http" };
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY.clone()),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    ];
    Ok((headers, Html(page(&format!("{scheme}://{host}"), &open))).into_response())
}

fn is_open(app: &App, door: Door) -> bool {
    match door {
        Door::Jupyter => app.jupyter.is_some(),
        Door::Mcp => app.mcp.is_some(),
        Door::E2b => app.e2b.is_some(),
        Door::Classic => app.classic.is_some(),
    }
}

/// The host that was asked, with its port, if it can be one. Of the target and the header the target counts, as HTTP has it; of two headers none does.
fn host_of(head: &Parts) -> Option<String> {
    let mut named = head.headers.get_all(header::HOST).iter();
    let (first, second) = (named.next(), named.next());
    let host = match head.uri.authority() {
        Some(authority) => authority.as_str(),
        None => first.filter(|_| second.is_none())?.to_str().ok()?,
    };
    is_host(host).then(|| host.to_ascii_lowercase())
}

/// Whether a text is a name or an address, and nothing else but a port: no character in it means anything to a shell or a browser.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, rest)) = rest.split_once(']') else { return false };
            let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':').unwrap_or_default()) };
            return address.parse::<Ipv6Addr>().is_ok() && port.is_none_or(is_port);
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    port.is_none_or(is_port) && (host.parse::<Ipv4Addr>().is_ok() || is_name(host))
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|port| port > 0)
}

/// Underscores are in no host's name by the book, and in those of containers.
fn is_name(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && !label.starts_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    text.len() <= MAX_NAME && text.strip_suffix('.').unwrap_or(text).split('.').all(is_label)
}

fn page(url: &str, open: &[Door]) -> String {
    let is_there = |client: &&Client| client.door.is_none_or(|door| open.contains(&door));
    let shown: String = CLIENTS.iter().filter(is_there).map(section).collect();
    let links: Vec<String> = CLIENTS.iter().filter(is_there).map(link).collect();
    let closed: Vec<String> = Door::ALL
        .iter()
        .filter(|door| !open.contains(door))
        .map(|door| format!("<code>{}</code>", door.key()))
        .collect();
    let closed = match closed.as_slice() {
        [] => String::new(),
        keys => format!("<p>Closed on this server by its configuration: {}.</p>", keys.join(", ")),
    };
    let variables = escape(&environment(url, &Key::Unknown, open.contains(&Door::E2b)));
    let links = links.join(" · ");
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Connect to Cellblock</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>\
         <h1>Connect</h1><p>Everything below reads where this server is, and a key of it, from the environment. Paste this into a shell and put your key in; \
         <code>cellblock keys create NAME</code> makes one.</p><pre>{variables}</pre>\
         <p>The same with your key filled in: <code>eval \"$(cellblock connect env)\"</code>. One file alone: <code>cellblock connect curl</code>. The whole API: \
         <a href=\"/docs\">/docs</a>.</p><p>{links}</p>{closed}{shown}</body></html>\n"
    )
}

fn link(client: &Client) -> String {
    format!("<a href=\"#{}\">{}</a>", escape(client.word), escape(client.title))
}

fn section(client: &Client) -> String {
    let Client { word, title, file, how, text, .. } = client;
    let [word, title, file, how, text] = [word, title, file, how, text].map(|part| escape(part));
    format!(
        "<h2 id=\"{word}\">{title}</h2><p><code>{file}</code>: {how} (<code>cellblock connect {word}</code>)</p><pre>{text}</pre>"
    )
}

/// Text that is nothing but text, in a page and in its quotes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;

    /// What a browser makes of it.
    fn unescape(html: &str) -> String {
        let html = html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&#39;", "'");
        html.replace("&amp;", "&")
    }

    #[test]
    fn a_host_is_a_name_or_an_address_and_nothing_else() {
        for host in ["box", "box:8080", "Cells.Example.com", "a_b.c.", "192.0.2.1:1", "[::1]", "[2001:db8::1]:8080"] {
            assert!(is_host(host), "{host}");
        }
        for host in [
            "",
            ":80",
            "box:",
            "box:0",
            "box:65536",
            "box:+1",
            "box:80:80",
            "a..b",
            ".",
            "-a",
            "::1",
            "[::1",
            "[::1]80",
            "[::1]:",
            "[box]",
            "<script>",
            "box\"",
            "box'",
            "a b",
            "a/b",
            "a?b",
            "a#b",
            "user@box",
            "$(id)",
            "`id`",
            "a;b",
            "a&b",
            "bö",
            "a\\b",
            "a%2fb",
        ] {
            assert!(!is_host(host), "{host}");
        }
        assert!(!is_host(&"a".repeat(64)) && is_host(&"a".repeat(63)) && !is_host(&"a.".repeat(127)));
    }

    #[test]
    fn the_target_counts_and_of_two_headers_none() {
        let of = |uri: &str, hosts: &[&str]| {
            let request = hosts.iter().fold(Request::builder().uri(uri), |request, host| request.header("host", *host));
            host_of(&request.body(()).unwrap().into_parts().0)
        };
        assert_eq!(of(PATH, &["Box:8080"]).as_deref(), Some("box:8080"));
        assert_eq!(of("https://real/connect", &["other"]).as_deref(), Some("real"));
        assert_eq!(of(PATH, &["a", "b"]), None);
        assert_eq!(of(PATH, &[]), None);
        assert_eq!(of("http://me@real/connect", &["real"]), None);
    }

    #[test]
    fn each_file_stands_in_the_page_word_for_word() {
        let whole = page("http://box:8080", &Door::ALL);
        for client in CLIENTS {
            let begin = format!("id=\"{}\"", client.word);
            let section = whole.split(&begin).nth(1).unwrap();
            let shown = section.split("<pre>").nth(1).unwrap().split("</pre>").next().unwrap();
            assert_eq!(unescape(shown), client.text, "{}", client.word);
        }
        assert_eq!(escape("&lt;<b a='\"'>"), "&amp;lt;&lt;b a=&#39;&quot;&#39;&gt;");
        assert!(!whole.contains("<script") && !whole.contains("Closed on") && !whole.contains("http-equiv"));
        let variables = unescape(whole.split("<pre>").nth(1).unwrap().split("</pre>").next().unwrap());
        assert_eq!(variables, environment("http://box:8080", &Key::Unknown, true));
    }

    #[test]
    fn what_is_closed_is_said_and_not_shown() {
        let bare = page("http://box", &[]);
        for door in Door::ALL {
            assert!(bare.contains(door.key()), "{}", door.key());
        }
        for client in CLIENTS {
            let is_shown = bare.contains(&format!("id=\"{}\"", client.word));
            assert_eq!(is_shown, client.door.is_none(), "{}", client.word);
        }
        assert!(!bare.contains("E2B_API_KEY"));
    }
}
