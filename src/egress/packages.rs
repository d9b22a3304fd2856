//! The index of packages as a session sees it: `http://packages.upstream/` on the proxy of its loopback, answered here. Pages of projects that its template's policy permits
//! are fetched from the operator's index and told with permitted wheels only; a file is fetched only if such a page has named it. Nothing is asked with what code
//! has sent but the name of a project.
//!
//! `/simple/NAME/` is a project's page (PEP 691, JSON), `/files/…` what pages name, and `/why` tells, once, why something was not given.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::{BodyExt, Either, Empty, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::Sha256;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::held::{Patience, Room, held};
use super::reach::Reached;
use super::{Egress, Refusal};
use crate::domain::egress::Host;
use crate::domain::packages::{Index, PackagePolicy, normal, of_wheel};
use crate::places::{self, Places};
use crate::task;

/// Bytes between the cell's connection and what reads it here.
const BETWEEN: usize = 64 * 1024;
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Largest page of a project that is read, in bytes: those of the largest projects have a few MiB.
const MAX_PAGE: usize = 32 * 1024 * 1024;
/// Pages that are fetched and read here at once, of all sessions.
const PAGES: usize = 8;
/// Bytes of pages that wait for cells to read them, of all sessions, …
const HELD: usize = 8 * MAX_PAGE;
/// … of one tenant's sessions …
const HELD_OF_TENANT: usize = HELD / 2;
/// … and of one, those that are being fetched for it included: each of these counts as the largest.
pub(super) const PAGES_OF_SESSION: usize = 2 * MAX_PAGE;
/// The index answers within this time, and has told a page within it.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// Connections to an index that are kept for the next page.
const MAX_SPARE: usize = 4;
/// Remarks that are kept for whoever asks why, and the longest, in characters.
const MAX_REMARKS: (usize, usize) = (20, 400);
/// How pages are told (PEP 691).
const JSON: &str = "application/vnd.pypi.simple.v1+json";

type Body = Either<Full<Bytes>, Incoming>;
type Asking = SendRequest<Empty<Bytes>>;

/// What is shared between the sessions.
pub(super) struct Shared {
    /// Proves that a page has named a file.
    key: Option<[u8; 32]>,
    spare: Mutex<HashMap<String, Vec<Asking>>>,
    pages: Arc<Semaphore>,
    held: Arc<Places<Arc<str>>>,
}

impl Shared {
    /// With a new key; without one, where there are no random numbers, nothing is given.
    pub(super) fn new() -> Self {
        let mut key = [0; 32];
        let key = getrandom::fill(&mut key).ok().map(|()| key);
        Self { key, spare: Mutex::default(), pages: Arc::new(Semaphore::new(PAGES)), held: Places::new(HELD) }
    }

    fn mac(&self, place: &str) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.key.as_ref()?).ok()?;
        mac.update(place.as_bytes());
        Some(mac)
    }

    /// The path that stands for a file at `host/port/path`.
    fn seal(&self, place: &str) -> Option<String> {
        let seal = self.mac(place)?.finalize().into_bytes();
        let seal: String = seal.iter().map(|b| format!("{b:02x}")).collect();
        Some(format!("/files/{seal}/{place}"))
    }

    /// Where a file is that a path stands for.
    fn unseal<'a>(&self, path: &'a str) -> Option<&'a str> {
        let (seal, place) = path.strip_prefix("/files/")?.split_once('/')?;
        let digit = |at: usize| seal.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
        let seal: Option<Vec<u8>> = (0..64).step_by(2).map(digit).collect();
        self.mac(place)?.verify_slice(&seal?).ok().map(|()| place)
    }

    fn spare(&self) -> MutexGuard<'_, HashMap<String, Vec<Asking>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why packages were not given, for whoever asks.
#[derive(Debug, Default)]
pub(super) struct Remarks(Mutex<VecDeque<String>>);

impl Remarks {
    fn note(&self, remark: &str) {
        let remark: String = remark.chars().filter(|c| !c.is_control()).take(MAX_REMARKS.1).collect();
        let mut remarks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !remarks.contains(&remark) {
            remarks.push_back(remark);
        }
        if remarks.len() > MAX_REMARKS.0 {
            remarks.pop_front();
        }
    }

    fn take(&self) -> String {
        let mut remarks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        remarks.drain(..).map(|remark| remark + "\n").collect()
    }
}

/// A project's page, as far as installers need it.
#[derive(Serialize, Deserialize)]
struct Page {
    meta: Value,
    name: String,
    files: Vec<File>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    filename: String,
    url: String,
    hashes: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    requires_python: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    core_metadata: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dist_info_metadata: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    yanked: Option<Value>,
}

/// Why something is not given: what code is answered.
struct NotGiven(StatusCode, String);

/// One session's view of the index, for one connection.
struct Asked {
    egress: Egress,
    tenant: Arc<str>,
    policy: PackagePolicy,
    remarks: Arc<Remarks>,
    /// For pages that the session has not read.
    room: Room,
    patience: Patience,
}

impl Egress {
    /// A connection to the index for a session of this tenant, as a policy lets it be seen. What comes back for the cell takes HTTP/1.1 requests
    /// in the clear.
    pub(super) fn reach_packages(
        &self,
        tenant: Arc<str>,
        policy: PackagePolicy,
        remarks: Arc<Remarks>,
        room: Room,
    ) -> Reached {
        let (cell, here) = tokio::io::duplex(BETWEEN);
        let patience = Patience::default();
        let asked = Arc::new(Asked { egress: self.clone(), tenant, policy, remarks, room, patience: patience.clone() });
        let over = CancellationToken::new();
        let is_over = over.clone();
        // It ends with the cell's connection, even while it waits for the index, and with a cell that does not read.
        task::spawn("packages", async move {
            tokio::select! {
                () = serve(asked, here) => {}
                () = is_over.cancelled() => {}
                () = patience.is_over() => {}
            }
        });
        Reached { stream: Box::new(cell), address: None, until: Some(over.drop_guard()) }
    }
}

async fn serve(asked: Arc<Asked>, cell: tokio::io::DuplexStream) {
    let service = service_fn(move |request| {
        let asked = Arc::clone(&asked);
        async move { Ok::<_, Infallible>(asked.answer(request).await) }
    });
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).max_buf_size(MAX_HEAD);
    // Code that breaks its connection off need not be told.
    let _ = server.serve_connection(TokioIo::new(cell), service).await;
}

impl Asked {
    async fn answer(self: &Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        if request.method() != Method::GET {
            return said(StatusCode::METHOD_NOT_ALLOWED, "the index of packages is asked with GET");
        }
        let path = request.uri().path();
        let given = match path.strip_prefix("/simple/").map(|name| name.strip_suffix('/').unwrap_or(name)) {
            Some(name) => self.page(name).await,
            None if path == "/why" => return written("text/plain; charset=utf-8", self.remarks.take()),
            None => self.file(path).await,
        };
        given.unwrap_or_else(|NotGiven(status, reason)| {
            self.remarks.note(&reason);
            said(status, &reason)
        })
    }

    async fn page(self: &Arc<Self>, name: &str) -> Result<Response<Body>, NotGiven> {
        let name =
            normal(name).ok_or_else(|| NotGiven(StatusCode::NOT_FOUND, "this is no name of a package".to_owned()))?;
        if !self.policy.admits(&name) {
            let reason = format!("{name} is not among what the template's packages policy permits: {}", self.policy);
            return Err(NotGiven(StatusCode::FORBIDDEN, reason));
        }
        let index = &self.egress.0.settings.index;
        let busy = |what: &str| NotGiven(StatusCode::SERVICE_UNAVAILABLE, what.to_owned());
        let late = |_| self.failed("did not answer in time");
        let own = tokio::time::timeout(ANSWER_TIME, self.room.take(MAX_PAGE)).await.ok().flatten();
        let mut own = own.ok_or_else(|| busy("pages that the session has asked for before are not read"))?;
        let place = Arc::clone(&self.egress.0.packages.pages).acquire_owned();
        let place = tokio::time::timeout(ANSWER_TIME, place).await.ok().and_then(Result::ok);
        let place = place.ok_or_else(|| busy("the server is fetching as many pages of the index as it may at once"))?;
        let bytes = tokio::time::timeout(ANSWER_TIME, self.fetch_page(index, &name)).await.map_err(late)??;
        let asked = Arc::clone(self);
        // It goes on, and needs what it has, whether or not anybody waits for it any more.
        let told = task::blocking(move || {
            let text = asked.told(&name, &bytes)?;
            drop((bytes, place));
            own.shrink(text.len());
            Ok((text, own))
        });
        let (text, own) = told.await.unwrap_or_else(|| Err(self.failed("sent what can't be read")))?;
        let all = self.egress.0.packages.held.take(Arc::clone(&self.tenant), text.len(), HELD_OF_TENANT);
        let all = all.map_err(|full| match full {
            places::Full::OfOne => busy("pages that the tenant's sessions have asked for before are not read"),
            places::Full::All => busy("pages that others have asked for before are not read"),
        })?;
        let mut response = Response::new(Either::Left(Full::new(held(text, self.patience.clone(), own, all))));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(JSON));
        Ok(response)
    }

    /// A page of the index as it is told. One of many megabytes keeps a CPU busy.
    fn told(&self, name: &str, page: &[u8]) -> Result<String, NotGiven> {
        let no_page = |_| self.failed("sent what is no page of a project");
        let page = self.filter(&self.egress.0.settings.index, name, serde_json::from_slice(page).map_err(no_page)?)?;
        let text = serde_json::to_string(&page).map_err(no_page)?;
        if text.len() > MAX_PAGE { Err(self.failed("has a page that is too long")) } else { Ok(text) }
    }

    async fn fetch_page(&self, index: &Index, name: &str) -> Result<Bytes, NotGiven> {
        let place = format!("{}:{}", index.host, index.port);
        let mut server = match self.spare_connection(&place).await {
            Some(server) => server,
            None => self.connect(&index.host, index.port).await?,
        };
        let request = self.request(&index.host, index.port, &format!("{}/{name}/", index.path), JSON)?;
        let response = server.send_request(request).await.map_err(|_| self.failed("broke the connection off"))?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => {
                return Err(NotGiven(StatusCode::NOT_FOUND, format!("the index {} has no package {name}", index.host)));
            }
            status => return Err(self.failed(&format!("answered {status} when it was asked for {name}"))),
        }
        let kind = response.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if kind.split(';').next().map(str::trim) != Some(JSON) {
            return Err(self.failed("does not speak JSON (PEP 691)"));
        }
        let body = Limited::new(response.into_body(), MAX_PAGE).collect().await;
        let bytes = body.map_err(|_| self.failed("sent a page that is too long, or broke off"))?.to_bytes();
        // Not before all was read: nobody waits for somebody else's page.
        let mut spare = self.egress.0.packages.spare();
        let kept = spare.entry(place).or_default();
        if kept.len() < MAX_SPARE {
            kept.push(server);
        }
        Ok(bytes)
    }

    async fn spare_connection(&self, place: &str) -> Option<Asking> {
        loop {
            let mut server = self.egress.0.packages.spare().get_mut(place)?.pop()?;
            if server.ready().await.is_ok() {
                return Some(server);
            }
        }
    }

    /// What of a page may be told: wheels of the project itself, in permitted versions, at hosts where files may be.
    fn filter(&self, index: &Index, name: &str, page: Page) -> Result<Page, NotGiven> {
        let base = format!("https://{}:{}{}/{name}/", index.host, index.port, index.path);
        let base = Url::parse(&base).map_err(|_| self.failed("is at no address"))?;
        let had = page.files.len();
        let (mut wheels, mut files) = (0, Vec::new());
        for mut file in page.files {
            let Some((of, version)) = of_wheel(&file.filename).filter(|(of, _)| of == name) else { continue };
            wheels += 1;
            if !self.policy.admits_version(&of, &version) {
                continue;
            }
            let Some(place) = base.join(&file.url).ok().and_then(|url| place_of(index, &url, &file.filename)) else {
                continue;
            };
            let Some(path) = self.egress.0.packages.seal(&place) else { continue };
            file.url = format!("http://packages.upstream{path}");
            files.push(file);
        }
        if had > 0 && wheels == 0 {
            self.remarks.note(&format!(
                "{name} is offered as source code only, which needs a compiler; only what is built already (a wheel) is installed"
            ));
        } else if wheels > 0 && files.is_empty() {
            self.remarks
                .note(&format!("{name} has no version that the template's packages policy permits: {}", self.policy));
        }
        Ok(Page { meta: serde_json::json!({"api-version": "1.0"}), name: name.to_owned(), files })
    }

    async fn file(&self, path: &str) -> Result<Response<Body>, NotGiven> {
        let unknown = || NotGiven(StatusCode::FORBIDDEN, "no page of the index has named this file".to_owned());
        let packages = &self.egress.0.packages;
        let path = &plain(path).ok_or_else(unknown)?;
        // What describes a wheel is beside it (PEP 658).
        let bare = path.strip_suffix(".metadata").unwrap_or(path);
        let place = packages.unseal(bare).ok_or_else(unknown)?;
        let wheel = bare.rsplit('/').next().and_then(of_wheel).ok_or_else(unknown)?;
        if !self.policy.admits_version(&wheel.0, &wheel.1) {
            return Err(unknown());
        }
        let (host, rest) = place.split_once('/').ok_or_else(unknown)?;
        let (port, file) = rest.split_once('/').ok_or_else(unknown)?;
        let port = port.parse().map_err(|_| unknown())?;
        let file = format!("/{file}{}", &path[bare.len()..]).replace('+', "%2B");
        let fetching = async {
            let mut server = self.connect(host, port).await?;
            let request = self.request(host, port, &file, "*/*")?;
            server.send_request(request).await.map_err(|_| self.failed("broke the connection off"))
        };
        let late = |_| self.failed("did not answer in time");
        let response = tokio::time::timeout(ANSWER_TIME, fetching).await.map_err(late)??;
        if response.status() != StatusCode::OK {
            return Err(self.failed(&format!(
                "answered {} when it was asked for a file of {}",
                response.status(),
                wheel.0
            )));
        }
        let (size, most) = (response.body().size_hint().exact(), self.egress.0.settings.package_bytes);
        if size.is_none_or(|size| size > most) {
            let size = size.map_or("does not say how long it is".to_owned(), |size| format!("has {size} bytes"));
            let reason = format!("the file of {} {} {size}; allowed are {most} (packages.size)", wheel.0, wheel.1);
            return Err(NotGiven(StatusCode::FORBIDDEN, reason));
        }
        let mut told = Response::new(Either::Right(response.into_body()));
        told.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        Ok(told)
    }

    async fn connect(&self, host: &str, port: u16) -> Result<Asking, NotGiven> {
        let reached = self.egress.reach(&self.tenant, &Host::Name(host.to_owned()), port).await;
        let reached = reached.map_err(|not| self.unreached(&not.refusal))?;
        let speaking = async {
            let stream = self.egress.0.trust.secure(host, reached.stream).await?;
            let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
            shaken.map_err(io::Error::other)
        };
        let (sender, connection) = speaking.await.map_err(|error| {
            tracing::warn!(host, %error, "an index of packages can't be asked");
            self.failed("can't be asked over TLS")
        })?;
        task::spawn("packages connection", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to an index of packages broke");
            }
        });
        Ok(sender)
    }

    fn request(
        &self,
        host: &str,
        port: u16,
        path: &str,
        accept: &'static str,
    ) -> Result<Request<Empty<Bytes>>, NotGiven> {
        let host = if port == 443 { host.to_owned() } else { format!("{host}:{port}") };
        Request::get(path)
            .header(header::HOST, host)
            .header(header::ACCEPT, accept)
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::USER_AGENT, concat!("cellblock/", env!("CARGO_PKG_VERSION")))
            .body(Empty::new())
            .map_err(|_| self.failed("can't be asked for this"))
    }

    fn failed(&self, what: &str) -> NotGiven {
        NotGiven(
            StatusCode::BAD_GATEWAY,
            format!("the index of packages at {} {what}", self.egress.0.settings.index.host),
        )
    }

    fn unreached(&self, refusal: &Refusal) -> NotGiven {
        NotGiven(StatusCode::BAD_GATEWAY, format!("the index of packages is not reached: {refusal}"))
    }
}

/// Where a file is, as `host/port/path`; nothing where files may not be.
fn place_of(index: &Index, url: &Url, filename: &str) -> Option<String> {
    let (host, port) = (url.host_str()?, url.port_or_known_default()?);
    let is_plain = url.scheme() == "https" && url.query().is_none() && url.username().is_empty();
    let path = plain(url.path())?;
    let is_it = path.rsplit('/').next() == Some(filename);
    (is_plain && is_it && index.has_files_at(host, port)).then(|| format!("{host}/{port}{path}"))
}

/// A path without escapes; nothing if it needs them. Installers escape a plus sign as they like.
fn plain(path: &str) -> Option<String> {
    let path = path.replace("%2B", "+").replace("%2b", "+");
    (!path.contains('%')).then_some(path)
}

fn written(kind: &'static str, text: String) -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::from(text)));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn said(status: StatusCode, reason: &str) -> Response<Body> {
    let mut response = written("text/plain; charset=utf-8", format!("cellblock: {reason}\n"));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_given_under_its_seal_only() {
        let (one, other) = (Shared::new(), Shared::new());
        let path = one.seal("files.example.org/443/a/b-1.0-py3-none-any.whl").unwrap();
        assert_eq!(one.unseal(&path), Some("files.example.org/443/a/b-1.0-py3-none-any.whl"));
        assert_eq!(other.unseal(&path), None);
        assert_eq!(one.unseal(&path.replace("/b-1.0", "/c-1.0")), None);
        for wrong in ["/files/", "/files//x", "/files/zz/x", "/simple/x/", "", "/files/é/x"] {
            assert_eq!(one.unseal(wrong), None, "{wrong}");
        }
    }

    /// A world in which every connection is made, and nobody says anything on it.
    #[derive(Default)]
    struct Silence(Mutex<Vec<tokio::io::DuplexStream>>);

    #[async_trait::async_trait]
    impl crate::egress::Dialer for Silence {
        async fn dial(&self, _: std::net::SocketAddr) -> io::Result<Box<dyn crate::egress::Stream>> {
            let (near, far) = tokio::io::duplex(BETWEEN);
            self.0.lock().unwrap().push(far);
            Ok(Box::new(near))
        }

        fn is_own(&self, _: std::net::IpAddr) -> bool {
            false
        }
    }

    #[tokio::test]
    async fn what_is_done_for_a_connection_ends_with_it() {
        use tokio::io::AsyncWriteExt;
        let settings = crate::egress::Settings {
            index: Index {
                host: "index.example.org".to_owned(),
                port: 443,
                path: String::new(),
                file_hosts: Vec::new(),
            },
            connect_timeout: Duration::from_secs(60),
            ..Egress::none().0.settings.clone()
        };
        let silence = Arc::new(Silence::default());
        let outside = crate::egress::Outside { resolver: Arc::new(Fixed), dialer: Arc::clone(&silence) as _ };
        let egress = Egress::new(settings, Default::default(), outside, crate::metrics::Metrics::new(), None);
        let (remarks, room) = (Arc::<Remarks>::default(), Room::of(PAGES_OF_SESSION));
        let mut reached = egress.reach_packages("one".into(), PackagePolicy::Any, Arc::clone(&remarks), room.clone());
        // A second request behind the first one: a server that has it does not look whether the connection is still there.
        let request = b"GET /simple/numpy/ HTTP/1.1\r\nhost: packages.upstream\r\n\r\n";
        reached.stream.write_all(&request.repeat(2)).await.unwrap();
        while silence.0.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(is_taken(&room).await, "a page is on its way");
        drop(reached);
        let ended = async {
            while Arc::strong_count(&remarks) > 1 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        assert!(tokio::time::timeout(ANSWER_TIME / 3, ended).await.is_ok(), "it goes on without anybody");
        assert!(!is_taken(&room).await);
    }

    async fn is_taken(room: &Room) -> bool {
        tokio::time::timeout(Duration::from_millis(5), room.take(PAGES_OF_SESSION)).await.is_err()
    }

    /// Every name has one address.
    struct Fixed;

    #[async_trait::async_trait]
    impl crate::egress::Resolver for Fixed {
        async fn resolve(&self, _: &str, _: &Arc<str>) -> io::Result<Vec<std::net::IpAddr>> {
            Ok(vec![[93, 184, 216, 34].into()])
        }
    }

    #[test]
    fn files_are_where_they_may_be() {
        let file_hosts = vec!["files.example.org".to_owned()];
        let index = Index { host: "index.example.org".to_owned(), port: 8443, path: "/simple".to_owned(), file_hosts };
        let place = |url: &str| place_of(&index, &Url::parse(url).unwrap(), "a-1.whl");
        assert_eq!(
            place("https://files.example.org/x/a-1.whl#sha256=0").as_deref(),
            Some("files.example.org/443/x/a-1.whl")
        );
        assert_eq!(
            place("https://index.example.org:8443/../a-1.whl").as_deref(),
            Some("index.example.org/8443/a-1.whl")
        );
        for url in [
            "http://files.example.org/a-1.whl",
            "https://other.example.org/a-1.whl",
            "https://files.example.org:8443/a-1.whl",
            "https://index.example.org/a-1.whl",
            "https://files.example.org/b-1.whl",
            "https://files.example.org/x%20y/a-1.whl",
            "https://files.example.org/a-1.whl?x=1",
            "https://u@files.example.org/a-1.whl",
        ] {
            assert_eq!(place(url), None, "{url}");
        }
    }

    #[test]
    fn remarks_are_bounded_and_told_once() {
        let remarks = Remarks::default();
        (0..50).for_each(|n| remarks.note(&format!("{n}\n{}", "x".repeat(1000))));
        remarks.note("last");
        remarks.note("last");
        let told = remarks.take();
        assert_eq!(told.lines().count(), MAX_REMARKS.0);
        assert!(told.lines().all(|line| line.len() <= MAX_REMARKS.1) && told.ends_with("\nlast\n"));
        assert_eq!(remarks.take(), "");
    }
}
