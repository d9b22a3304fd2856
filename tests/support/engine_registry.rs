//! A registry on this machine's loopback that wants a password. Ends with the value.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Chosen so that, with everything around it, both letters appear in which the alphabets of base 64 differ.
pub const PASSWORD: &str = "???>>>~~~ pull";
/// Who may pull and push.
pub const USER: &str = "puller";
/// [`PASSWORD`] by bcrypt.
const HASH: &str = "$2b$04$EkJuPcy5.VFGClrDpL5jSeb7P3AeM4H1b1m.XRCC1LjSwHx3n/Mni";

/// A running registry.
pub struct Registry {
    process: Child,
    _folder: tempfile::TempDir,
    /// Its host and port.
    pub address: String,
}

impl Registry {
    /// Starts one; `None` when there is no `docker-registry` on this machine.
    pub async fn start() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        // Nobody else gets a port that was free a moment ago, most of the time.
        let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
        let address = format!("127.0.0.1:{port}");
        let (passwords, settings) = (folder.path().join("htpasswd"), folder.path().join("config.yml"));
        std::fs::write(&passwords, format!("{USER}:{HASH}\n")).expect("a file");
        std::fs::write(&settings, configuration(&address, folder.path(), &passwords)).expect("a file");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&settings).stdout(Stdio::null()).stderr(Stdio::null());
        let process = match command.spawn() {
            Ok(process) => process,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => panic!("docker-registry: {error}"),
        };
        let registry = Self { process, _folder: folder, address };
        for _ in 0..200 {
            if tokio::net::TcpStream::connect(&registry.address).await.is_ok() {
                return Some(registry);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the registry does not listen");
    }

    /// What `docker login` would have written.
    pub fn credentials(&self) -> String {
        use base64::Engine;
        let pair = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
        format!(r#"{{"auths": {{"{}": {{"auth": "{pair}"}}}}}}"#, self.address)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn configuration(address: &str, folder: &Path, passwords: &Path) -> String {
    format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n  secret: for-tests\n\
         auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
        folder.display(),
        passwords.display()
    )
}
