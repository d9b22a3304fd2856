//! TLS with the operator's own certificate. Its files are read again while the server runs: certificates do not live long.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, aws_lc_rs};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert, ServerConfig};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

/// The files are looked at this often.
const LOOK: Duration = Duration::from_secs(10);

/// Why a certificate can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct TlsError {
    /// The file.
    pub path: PathBuf,
    /// Why, and what to do.
    pub reason: String,
}

/// A certificate with its key, and the files that they come from.
#[derive(Debug)]
pub struct Tls {
    certificate_file: PathBuf,
    key_file: PathBuf,
    provider: Arc<CryptoProvider>,
    current: Arc<Current>,
    /// Hash of what the files had when they were looked at last.
    seen: Mutex<[u8; 32]>,
    config: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// What the files have.
struct Files {
    certificates: Vec<u8>,
    key: Vec<u8>,
}

impl Files {
    fn hash(&self) -> [u8; 32] {
        Sha256::new().chain_update(Sha256::digest(&self.certificates)).chain_update(&self.key).finalize().into()
    }
}

impl Tls {
    /// Reads a certificate chain and its private key, both PEM. Blocks.
    ///
    /// # Errors
    /// When one of them can't be read, or others may read the key, or they don't belong together.
    pub fn load(certificate_file: &Path, key_file: &Path) -> Result<Self, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let files = read(certificate_file, key_file)?;
        let key = certified(&files, certificate_file, key_file, &provider)?;
        let current = Arc::new(Current(RwLock::new(Arc::new(key))));
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| wrong(certificate_file, error.to_string()))?;
        let mut config = builder.with_no_client_auth().with_cert_resolver(Arc::<Current>::clone(&current));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            certificate_file: certificate_file.to_owned(),
            key_file: key_file.to_owned(),
            provider,
            current,
            seen: Mutex::new(files.hash()),
            config: Arc::new(config),
        })
    }

    /// Reads the files again; new connections have what is in them. Whether anything has changed since they were looked at last. Blocks.
    ///
    /// # Errors
    /// As for [`Tls::load`]; what was in force stays so. A mistake is told once.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let files = read(&self.certificate_file, &self.key_file)?;
        let hash = files.hash();
        if std::mem::replace(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner), hash) == hash {
            return Ok(false);
        }
        let key = certified(&files, &self.certificate_file, &self.key_file, &self.provider)?;
        *self.current.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
        Ok(true)
    }

    /// Reads the files again when they have changed, until it is told to stop.
    pub(super) async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut missing = false;
        while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
            let own = Arc::clone(&self);
            // It reads two small files; a panic in it leaves the certificate as it is.
            let Ok(reloaded) = tokio::task::spawn_blocking(move || own.reload()).await else { continue };
            let failed = reloaded.is_err();
            match reloaded {
                Ok(true) => tracing::info!("the TLS certificate was read again"),
                Err(error) if !missing => tracing::error!(%error, "the TLS certificate stays as it was"),
                Ok(false) | Err(_) => {}
            }
            missing = failed;
        }
    }

    /// Shakes hands. Without a time limit.
    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        TlsAcceptor::from(Arc::clone(&self.config)).accept(stream).await
    }
}

fn wrong(path: &Path, reason: impl Into<String>) -> TlsError {
    TlsError { path: path.to_owned(), reason: reason.into() }
}

fn read(certificate_file: &Path, key_file: &Path) -> Result<Files, TlsError> {
    use std::os::unix::fs::PermissionsExt;
    let bytes = |path: &Path| std::fs::read(path).map_err(|error| wrong(path, error.to_string()));
    let metadata = std::fs::metadata(key_file).map_err(|error| wrong(key_file, error.to_string()))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(wrong(key_file, format!("everybody may read the private key (mode {mode:03o}): `chmod 640` it")));
    }
    Ok(Files { certificates: bytes(certificate_file)?, key: bytes(key_file)? })
}

fn certified(
    files: &Files,
    certificate_file: &Path,
    key_file: &Path,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&files.certificates).collect();
    let chain = chain.map_err(|error| wrong(certificate_file, format!("it is not PEM: {error}")))?;
    if chain.is_empty() {
        return Err(wrong(
            certificate_file,
            "there is no certificate in it; the chain is to stand there as PEM, the server's own first",
        ));
    }
    let key = PrivateKeyDer::from_pem_slice(&files.key)
        .map_err(|error| wrong(key_file, format!("there is no private key in it as PEM: {error}")))?;
    CertifiedKey::from_der(chain, key, provider)
        .map_err(|error| wrong(key_file, format!("it can't be used with {}: {error}", certificate_file.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn put(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(vec!["box".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn what_is_wrong_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let ((first, first_key), (second, second_key)) = (pair(), pair());
        let certificate = put(folder.path(), "cert.pem", &first);
        let key = put(folder.path(), "key.pem", &first_key);
        let tls = Tls::load(&certificate, &key).unwrap();
        let in_force = || tls.current.0.read().unwrap().cert[0].clone();
        let before = in_force();
        assert!(!tls.reload().unwrap(), "nothing has changed");
        put(folder.path(), "cert.pem", &second);
        let halfway = tls.reload().unwrap_err();
        assert_eq!((halfway.path.as_path(), in_force() == before), (key.as_path(), true), "{halfway}");
        assert!(!tls.reload().unwrap(), "it is told once");
        put(folder.path(), "key.pem", &second_key);
        assert!(tls.reload().unwrap());
        assert_ne!(in_force(), before);
    }

    #[test]
    fn each_mistake_names_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let (good, good_key) = pair();
        let (certificate, key) = (put(folder.path(), "cert.pem", &good), put(folder.path(), "key.pem", &good_key));
        let empty = put(folder.path(), "empty.pem", "");
        let absent = folder.path().join("absent.pem");
        let open = put(folder.path(), "open.pem", &good_key);
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o644)).unwrap();
        for (certificate, key, named, said) in [
            (&empty, &key, &empty, "no certificate"),
            (&absent, &key, &absent, "No such file"),
            (&certificate, &empty, &empty, "no private key"),
            (&certificate, &absent, &absent, "No such file"),
            (&certificate, &open, &open, "644"),
        ] {
            let error = Tls::load(certificate, key).unwrap_err();
            assert_eq!(&error.path, named);
            assert!(error.reason.contains(said), "{error}");
        }
    }
}
