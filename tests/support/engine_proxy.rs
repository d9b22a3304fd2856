//! A way to the engine's socket on which things go wrong: it can be cut, and chosen requests can be made to fail. Threads, because it must go
//! on while a test's runtime does something else.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The connection breaks, and the engine never hears of it.
    Break,
    /// The engine does it, and its answer never arrives.
    Swallow,
    /// The engine hears of it this much later, whether or not anybody waits.
    Late(Duration),
    /// The answer is an error of 500, and the engine never hears of it.
    Fail,
    /// The answer ends after so many bytes, while the way to the engine stays open.
    HalfClose(usize),
}

/// Passes connections on to the engine.
#[derive(Clone)]
pub struct Proxy {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    open: HashMap<usize, [UnixStream; 2]>,
    next: usize,
    rules: Vec<Rule>,
    /// Of a hundred requests so many go wrong, one way or another; and the state of what decides.
    at_random: Option<(u64, u64)>,
    hits: usize,
    /// What the engine answered to requests that it heard of late.
    late: Vec<u16>,
    /// Requests to which something is being done.
    busy: usize,
    /// Nothing is passed on, in either direction.
    stalled: bool,
}

struct Rule {
    what: &'static str,
    fault: Fault,
    times: usize,
}

impl Proxy {
    /// Listens at `path` and connects to `engine`.
    pub fn start(path: &Path, engine: &'static str) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        let proxy = Self { shared: Arc::default() };
        let serving = proxy.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let proxy = serving.clone();
                // A connection that breaks is what this is for.
                std::thread::spawn(move || drop(proxy.serve(client, engine)));
            }
        });
        proxy
    }

    /// Ends every connection at once; new ones are passed on as before. Says how many there were.
    pub fn cut(&self) -> usize {
        let open = std::mem::take(&mut self.shared().open);
        for stream in open.values().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        open.len()
    }

    /// Passes nothing on any more, on connections that are open and on those to come, as an engine that is stopped would; or all of it again.
    pub fn stall(&self, stalled: bool) {
        self.shared().stalled = stalled;
    }

    fn wait_while_stalled(&self) {
        while self.shared().stalled {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Does something to the next so many requests of a kind, such as `POST /containers/*/start`; `*` is any one part of a path, `** /…` any request.
    pub fn fault(&self, what: &'static str, fault: Fault, times: usize) {
        self.shared().rules.push(Rule { what, fault, times });
    }

    /// Lets so many of a hundred requests go wrong, one way or another.
    pub fn at_random(&self, seed: u64, percent: u64) {
        self.shared().at_random = Some((percent, seed | 1));
    }

    /// Passes everything on again, and says to how many requests something was done.
    pub fn calm(&self) -> usize {
        let mut shared = self.shared();
        shared.rules.clear();
        shared.at_random = None;
        std::mem::take(&mut shared.hits)
    }

    /// Waits until the engine is done with every request to which something was done. Answers with the status of each that it heard of late, since the last
    /// time.
    pub async fn settle(&self) -> Vec<u16> {
        while self.shared().busy > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        std::mem::take(&mut self.shared().late)
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("the state")
    }

    /// One request: the engine is asked to close the connection after it, so that the next one is looked at as well.
    fn serve(&self, mut client: UnixStream, engine: &str) -> io::Result<()> {
        let Some((head, body)) = read_request(&mut client)? else { return Ok(()) };
        self.wait_while_stalled();
        let fault = self.fault_of(&head);
        let served = self.serve_one(client, engine, &head, &body, fault);
        self.shared().busy -= usize::from(fault.is_some());
        served
    }

    fn serve_one(
        &self,
        client: UnixStream,
        engine: &str,
        head: &str,
        body: &[u8],
        fault: Option<Fault>,
    ) -> io::Result<()> {
        match fault {
            Some(Fault::Break) => return client.shutdown(Shutdown::Both),
            Some(Fault::Fail) => return fail(client),
            Some(Fault::Late(wait)) => std::thread::sleep(wait),
            _ => {}
        }
        let mut server = UnixStream::connect(engine)?;
        let id = {
            let mut shared = self.shared();
            shared.next += 1;
            let id = shared.next;
            shared.open.insert(id, [client.try_clone()?, server.try_clone()?]);
            id
        };
        let request = if is_stream(head) { head.as_bytes().to_vec() } else { closing(head) };
        server.write_all(&[&request, body].concat())?;
        let forth = is_stream(head).then_some((client.try_clone()?, server.try_clone()?));
        let forth = forth.map(|(client, server)| {
            let proxy = self.clone();
            std::thread::spawn(move || proxy.pass(client, server))
        });
        if let Some(status) = self.answer(client, &server, fault)
            && fault.is_some()
        {
            self.shared().late.push(status);
        }
        if let Some(forth) = forth {
            // It has no end of its own, but whoever asked goes.
            let _ = forth.join();
            server.shutdown(Shutdown::Both)?;
        }
        // The engine comes to its end of a request, heard or not.
        discard(server);
        self.shared().open.remove(&id);
        Ok(())
    }

    /// Passes the engine's answer on, as far as it is to arrive, and says its status if that is whole. Whoever asked may have gone.
    fn answer(&self, mut client: UnixStream, server: &UnixStream, fault: Option<Fault>) -> Option<u16> {
        let mut server = server;
        match fault {
            Some(Fault::Swallow) => {
                let _ = io::copy(&mut server, &mut io::sink());
                let _ = client.shutdown(Shutdown::Both);
                None
            }
            Some(Fault::HalfClose(bytes)) => {
                let _ = io::copy(&mut server.take(bytes as u64), &mut client);
                let _ = client.shutdown(Shutdown::Write);
                None
            }
            _ => {
                // "HTTP/1.1 201"
                let mut start = [0; 12];
                server.read_exact(&mut start).ok()?;
                if client.write_all(&start).is_ok() {
                    self.pass(server.try_clone().ok()?, client);
                }
                std::str::from_utf8(&start[9..]).ok()?.parse().ok()
            }
        }
    }

    fn pass(&self, mut from: UnixStream, mut to: UnixStream) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            self.wait_while_stalled();
            if to.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }

    fn fault_of(&self, head: &str) -> Option<Fault> {
        let mut shared = self.shared();
        let fault = match shared.rules.iter_mut().find(|rule| rule.times > 0 && is_meant(rule.what, head)) {
            Some(rule) => {
                rule.times -= 1;
                rule.fault
            }
            // A watch that is answered by nobody is given up after a minute, which is longer than a test waits.
            None if is_meant("GET /events", head) => return None,
            None => {
                let (percent, state) = shared.at_random.as_mut()?;
                let mut below = |bound: u64| {
                    // xorshift64
                    *state ^= *state << 13;
                    *state ^= *state >> 7;
                    *state ^= *state << 17;
                    *state % bound
                };
                if below(100) >= *percent {
                    return None;
                }
                match below(5) {
                    0 => Fault::Break,
                    1 => Fault::Swallow,
                    2 => Fault::Fail,
                    3 => Fault::HalfClose(below(4000) as usize),
                    _ => Fault::Late(Duration::from_millis(below(1500))),
                }
            }
        };
        shared.hits += 1;
        shared.busy += 1;
        Some(fault)
    }
}

/// Whether a request is of a kind. The version that a path begins with does not count.
fn is_meant(what: &str, head: &str) -> bool {
    let (method, pattern) = what.split_once(' ').expect("a method and a path");
    let mut words = head.split(' ');
    let (asked, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default().trim_start_matches('/');
    let path = path.split_once('/').filter(|(version, _)| version.starts_with("v1.")).map_or(path, |(_, rest)| rest);
    let (wanted, parts): (Vec<_>, Vec<_>) =
        (pattern.trim_start_matches('/').split('/').collect(), path.split('/').collect());
    method == "**"
        || method == asked
            && wanted.len() == parts.len()
            && wanted.iter().zip(&parts).all(|(wanted, part)| *wanted == "*" || wanted == part)
}

/// A request's head and body; nothing when the connection ends before.
fn read_request(client: &mut UnixStream) -> io::Result<Option<(String, Vec<u8>)>> {
    const END: &[u8] = b"\r\n\r\n";
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    let end = loop {
        let read = client.read(&mut buffer)?;
        if read == 0 {
            return Ok(None);
        }
        bytes.extend_from_slice(&buffer[..read]);
        if let Some(at) = bytes.windows(END.len()).position(|part| part == END) {
            break at + END.len();
        }
    };
    let mut body = bytes.split_off(end);
    let head = String::from_utf8_lossy(&bytes).into_owned();
    let length =
        head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
    let left = length.unwrap_or(0_usize).saturating_sub(body.len());
    client.take(left as u64).read_to_end(&mut body)?;
    Ok(Some((head, body)))
}

fn is_named(line: &str, name: &str) -> bool {
    line.to_ascii_lowercase().starts_with(&format!("{name}:"))
}

/// Whether what follows has no end of its own.
fn is_stream(head: &str) -> bool {
    is_meant("GET /events", head) || head.lines().any(|line| is_named(line, "upgrade"))
}

/// The head with the wish that the connection be closed after the answer.
fn closing(head: &str) -> Vec<u8> {
    let lines = head.trim_end().lines().filter(|line| !is_named(line, "connection"));
    let mut asked: String = lines.flat_map(|line| [line, "\r\n"]).collect();
    asked.push_str("Connection: close\r\n\r\n");
    asked.into_bytes()
}

fn fail(mut client: UnixStream) -> io::Result<()> {
    let body = r#"{"message": "told to fail"}"#;
    let length = body.len();
    write!(
        client,
        "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )?;
    client.shutdown(Shutdown::Both)
}

fn discard(mut from: UnixStream) {
    let _ = io::copy(&mut from, &mut io::sink());
}
