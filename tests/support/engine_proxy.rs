//! A way to the engine's socket that can be cut. Threads, because it must go on while a test's runtime does something else.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Passes connections on to the engine.
#[derive(Clone)]
pub struct Proxy {
    open: Arc<Mutex<Vec<UnixStream>>>,
}

impl Proxy {
    /// Listens at `path` and connects to `engine`.
    pub fn start(path: &Path, engine: &'static str) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        let proxy = Self { open: Arc::default() };
        let open = proxy.open.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = UnixStream::connect(engine) else { continue };
                let copies = [client.try_clone(), server.try_clone()].map(|copy| copy.expect("a descriptor"));
                let [back, forth] = [client.try_clone(), server.try_clone()].map(|copy| copy.expect("a descriptor"));
                open.lock().expect("the list").extend(copies);
                std::thread::spawn(move || pass(client, forth));
                std::thread::spawn(move || pass(server, back));
            }
        });
        proxy
    }

    /// Ends every connection at once; new ones are passed on as before. Says how many there were.
    pub fn cut(&self) -> usize {
        let open = std::mem::take(&mut *self.open.lock().expect("the list"));
        for stream in &open {
            let _ = stream.shutdown(Shutdown::Both);
        }
        open.len() / 2
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
