//! The client of a running server: addresses, keys, requests, pages, streams of events. Prints nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde_json::Value;

use super::args::ServerArgs;
use super::problem::{Failure, Problem};
use crate::config::{self, Environment, Inputs};
use crate::domain::ids::SessionId;

/// Largest answer that is read as a whole, and largest line of a stream.
const MAX_ANSWER: usize = 64 << 20;
/// Most pages of a list.
const MAX_PAGES: usize = 10_000;
/// Requests that run no code; ending a container can take this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server and the key to it.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    key: Option<String>,
    own_key_file: Option<PathBuf>,
}

/// Where the key is that a server takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPlace {
    /// In the command line, or in the environment.
    Told(String),
    /// In a file.
    File {
        /// The file.
        path: PathBuf,
        /// Whether somebody has named it; if not it need not be there.
        is_named: bool,
    },
    /// There is none.
    Nowhere,
}

impl KeyPlace {
    /// Looks in the command line, the environment, and for the server's `own` file.
    #[must_use]
    pub fn find(args: &ServerArgs, environment: &Environment, own: Option<&Path>) -> Self {
        let told = |key: &str| Self::Told(key.trim().to_owned());
        let named = |path: &Path| Self::File { path: path.to_owned(), is_named: true };
        match (&args.key, &args.key_file) {
            (Some(key), _) => return told(key),
            (None, Some(file)) => return named(file),
            (None, None) => {}
        }
        match (environment.get("CELLBLOCK_API_KEY"), environment.get("CELLBLOCK_API_KEY_FILE"), own) {
            (Some(key), _, _) => told(key),
            (None, Some(file), _) => named(Path::new(file)),
            (None, None, Some(own)) => Self::File { path: own.to_owned(), is_named: false },
            (None, None, None) => Self::Nowhere,
        }
    }

    fn read(self) -> Result<Option<String>, Failure> {
        match self {
            Self::Told(key) => Ok(Some(key)),
            Self::File { path, is_named: true } => read_key(&path).map(Some),
            // If it can't be read, the server will say that a key is missing.
            Self::File { path, is_named: false } => Ok(read_key(&path).ok()),
            Self::Nowhere => Ok(None),
        }
    }
}

impl Client {
    /// Finds out which server is meant and which key it takes. The local server's key file is read only for a server on
    /// this machine: another one must not learn it.
    ///
    /// # Errors
    /// The URL is none, or a named key file can't be read.
    pub fn connect(args: &ServerArgs, environment: &Environment) -> Result<Self, Failure> {
        let local = config::load(&Inputs::usual(environment.clone())).ok().map(|loaded| loaded.config.server);
        let named = args.url.as_deref().or_else(|| environment.get("CELLBLOCK_URL"));
        let listen = local.as_ref().map_or_else(|| ([127, 0, 0, 1], 8080).into(), |server| server.listen);
        let base = parse_url(&named.map_or_else(|| own_url(listen), str::to_owned))?;
        let own_key_file = local.map(|server| server.key_file()).filter(|_| is_loopback(&base));
        let key = KeyPlace::find(args, environment, own_key_file.as_deref()).read()?;
        Ok(Self { http: build_http(&base)?, base, key, own_key_file })
    }

    /// The file of the server's own key, where the server is this machine's.
    #[must_use]
    pub fn own_key_file(&self) -> Option<&Path> {
        self.own_key_file.as_deref()
    }

    /// The server's URL.
    #[must_use]
    pub fn url(&self) -> &Url {
        &self.base
    }

    /// A request to a path such as `["v1", "sessions"]`, whose segments are escaped.
    pub fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        let request = self.ask_openly(method, path);
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// The same without the key.
    pub fn ask_openly(&self, method: Method, path: &[&str]) -> RequestBuilder {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        self.http.request(method, url)
    }

    /// Sends; an answer that isn't a success is a problem.
    ///
    /// # Errors
    /// No answer, or a problem.
    pub async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let response = request.send().await.map_err(|error| self.unreachable(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.read(response).await.unwrap_or_default();
        Err(Failure::Problem(Box::new(Problem::read(status, &body))))
    }

    /// Sends and reads a JSON answer; `null` where there is no body.
    ///
    /// # Errors
    /// No answer, a problem, or an answer that isn't JSON.
    pub async fn send_json(&self, request: RequestBuilder) -> Result<Value, Failure> {
        let response = self.send(request.timeout(PATIENCE)).await?;
        if response.status() == StatusCode::NO_CONTENT {
            return Ok(Value::Null);
        }
        match self.read(response).await?.as_slice() {
            [] => Ok(Value::Null),
            body => serde_json::from_slice(body).map_err(|error| Failure::Garbled(error.to_string())),
        }
    }

    /// The items of every page of a list.
    ///
    /// # Errors
    /// Those of [`Client::send_json`].
    pub async fn list(&self, path: &[&str], query: &[(&str, String)]) -> Result<Vec<Value>, Failure> {
        let (mut items, mut cursor): (Vec<Value>, Option<String>) = Default::default();
        for _ in 0..MAX_PAGES {
            let mut request = self.request(Method::GET, path).query(query);
            if let Some(cursor) = &cursor {
                request = request.query(&[("cursor", cursor)]);
            }
            let page = self.send_json(request).await?;
            items.extend(page_items(&page)?);
            let next = page["next_cursor"].as_str().filter(|next| !next.is_empty()).map(str::to_owned);
            if next.is_none() || next == cursor {
                return Ok(items);
            }
            cursor = next;
        }
        Err(Failure::Garbled("a list without end".to_owned()))
    }

    /// The id of a session that goes by an id or a name.
    ///
    /// # Errors
    /// There is none of that name, and those of [`Client::send_json`].
    pub async fn find_session(&self, text: &str) -> Result<String, Failure> {
        if let Ok(id) = text.parse::<SessionId>() {
            return Ok(id.to_string());
        }
        let found = self.list(&["v1", "sessions"], &[("name", text.to_owned())]).await?;
        let mut live = found.iter().filter(|session| session["name"] == text && session["state"] != "ended");
        let id = live.next().and_then(|session| session["id"].as_str());
        id.map(str::to_owned).ok_or_else(|| Failure::Usage(format!("there is no live session named {text:?}")))
    }

    /// Gives each object of an NDJSON answer to a function, as it comes.
    ///
    /// # Errors
    /// What the function returns, a line that isn't JSON or is too long. A connection that breaks just ends the stream:
    /// the receiver of the events knows whether the last one was there.
    pub async fn each_line(
        response: Response,
        mut take: impl FnMut(&Value) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut stream = response.bytes_stream();
        let mut pending: Vec<u8> = Vec::new();
        while let Some(Ok(chunk)) = stream.next().await {
            let mut rest = chunk.as_ref();
            while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                pending.extend_from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                take_line(&pending, &mut take)?;
                pending.clear();
            }
            pending.extend_from_slice(rest);
            if pending.len() > MAX_ANSWER {
                return Err(Failure::Garbled("a line of more than 64 MiB".to_owned()));
            }
        }
        // What a broken connection left behind is no event.
        if serde_json::from_slice::<Value>(&pending).is_ok() { take_line(&pending, &mut take) } else { Ok(()) }
    }

    /// Reads an answer's body, up to a limit.
    ///
    /// # Errors
    /// The connection breaks, or the answer is too long.
    pub async fn read(&self, mut response: Response) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(error))? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER {
                return Err(Failure::Garbled("an answer of more than 64 MiB".to_owned()));
            }
        }
        Ok(body)
    }

    fn unreachable(&self, source: reqwest::Error) -> Failure {
        Failure::Unreachable { url: self.base.to_string(), source }
    }
}

fn take_line(line: &[u8], take: &mut impl FnMut(&Value) -> Result<(), Failure>) -> Result<(), Failure> {
    if line.trim_ascii().is_empty() {
        return Ok(());
    }
    let event = serde_json::from_slice(line).map_err(|error| Failure::Garbled(error.to_string()))?;
    take(&event)
}

/// The one list in a page, whatever it is called.
fn page_items(page: &Value) -> Result<Vec<Value>, Failure> {
    let list = page.as_array().or_else(|| page.as_object()?.values().find_map(Value::as_array));
    list.cloned().ok_or_else(|| Failure::Garbled("a page without a list".to_owned()))
}

fn parse_url(text: &str) -> Result<Url, Failure> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    url.ok_or_else(|| Failure::Usage(format!("{text:?} is not a URL such as http://127.0.0.1:8080")))
}

/// The URL at which a server that listens here can be reached from this machine.
fn own_url(listen: std::net::SocketAddr) -> String {
    match (listen.ip().is_unspecified(), listen.is_ipv4()) {
        (true, true) => format!("http://127.0.0.1:{}", listen.port()),
        (true, false) => format!("http://[::1]:{}", listen.port()),
        (false, _) => format!("http://{listen}"),
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn read_key(file: &Path) -> Result<String, Failure> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(Failure::File { attempted: "read the API key in", path: file.to_owned(), source }),
    }
}

/// Redirects aren't followed: the API has none, and a key must not travel.
fn build_http(base: &Url) -> Result<reqwest::Client, Failure> {
    let builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(Duration::from_secs(10))
        .user_agent(concat!("cellblock/", env!("CARGO_PKG_VERSION")));
    let builder = match base.scheme() {
        // There is no TLS on this way, so nothing is verified; without this line the client can't be built in a
        // container that has no certificates of authorities, such as that of the server's own health check.
        "http" => builder.no_proxy().tls_danger_accept_invalid_certs(true),
        _ => builder,
    };
    builder.build().map_err(|source| Failure::Unreachable { url: base.to_string(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> Environment {
        pairs.iter().copied().chain([("CELLBLOCK_CONFIG", "/dev/null")]).collect()
    }

    #[test]
    fn addresses_come_from_flag_variable_and_configuration() {
        let url = |args: &ServerArgs, pairs: &[(&str, &str)]| {
            Client::connect(args, &with(pairs)).map(|c| c.base.to_string()).map_err(|e| e.to_string())
        };
        let flag = ServerArgs { url: Some("https://cells.example/x".to_owned()), ..ServerArgs::default() };
        let named = [("CELLBLOCK_URL", "http://other:1")];
        assert_eq!(url(&flag, &named).unwrap(), "https://cells.example/x");
        assert_eq!(url(&ServerArgs::default(), &named).unwrap(), "http://other:1/");
        let configured = [("HOME", "/h"), ("CELLBLOCK__SERVER__LISTEN", "127.0.0.1:99")];
        assert_eq!(url(&ServerArgs::default(), &configured).unwrap(), "http://127.0.0.1:99/");
        assert_eq!(url(&ServerArgs::default(), &[]).unwrap(), "http://127.0.0.1:8080/");
        assert_eq!(own_url("0.0.0.0:80".parse().unwrap()), "http://127.0.0.1:80");
        assert_eq!(own_url("[::]:80".parse().unwrap()), "http://[::1]:80");
        let wrong = ServerArgs { url: Some("cells:80".to_owned()), ..ServerArgs::default() };
        assert!(url(&wrong, &[]).unwrap_err().contains("is not a URL"));
    }

    #[test]
    fn the_local_key_stays_on_this_machine() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("api-key"), "cb_1\n").unwrap();
        let environment = with(&[("CELLBLOCK__SERVER__DATA_DIR", folder.path().to_str().unwrap())]);
        let key = |url: &str| {
            let args = ServerArgs { url: Some(url.to_owned()), ..ServerArgs::default() };
            Client::connect(&args, &environment).unwrap().key
        };
        assert_eq!(key("http://127.0.0.1:1"), Some("cb_1".to_owned()));
        assert_eq!(key("http://[::1]:1"), Some("cb_1".to_owned()));
        assert_eq!(key("https://cells.example"), None);
        assert_eq!(key("http://127.0.0.1.example"), None);
    }

    #[test]
    fn a_named_key_file_must_be_there() {
        let error =
            Client::connect(&ServerArgs::default(), &with(&[("CELLBLOCK_API_KEY_FILE", "/no/such")])).unwrap_err();
        assert!(error.to_string().starts_with("can't read the API key in /no/such"), "{error}");
    }
}
