//! TLS with the operator's own certificate. Its files are read again while the server runs: certificates do not live long.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
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
    config: Arc<ServerConfig>,
}

/// A certificate with its key that was read from the files, and can be used.
#[derive(Debug, Clone)]
pub struct Certificate {
    key: Arc<CertifiedKey>,
    /// Of both files.
    hash: [u8; 32],
    /// SHA-256 of the certificate's file, as `sha256sum` says it.
    pub sha256: String,
}

#[derive(Debug)]
struct Current(RwLock<Certificate>);

impl Current {
    fn get(&self) -> Certificate {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get().key)
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
        let certificate = certified(&files, certificate_file, key_file, &provider)?;
        let current = Arc::new(Current(RwLock::new(certificate)));
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| wrong(certificate_file, error.to_string()))?;
        let mut config = builder.with_no_client_auth().with_cert_resolver(Arc::<Current>::clone(&current));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            certificate_file: certificate_file.to_owned(),
            key_file: key_file.to_owned(),
            provider,
            current,
            config: Arc::new(config),
        })
    }

    /// What is in force.
    #[must_use]
    pub fn in_force(&self) -> Certificate {
        self.current.get()
    }

    /// Reads the files again, and changes nothing: what is in them, if it is not what is in force. Blocks.
    ///
    /// # Errors
    /// As for [`Tls::load`].
    pub fn look(&self) -> Result<Option<Certificate>, TlsError> {
        let files = read(&self.certificate_file, &self.key_file)?;
        if files.hash() == self.in_force().hash {
            return Ok(None);
        }
        certified(&files, &self.certificate_file, &self.key_file, &self.provider).map(Some)
    }

    /// New connections have this one.
    pub fn put_in_force(&self, certificate: Certificate) {
        *self.current.0.write().unwrap_or_else(PoisonError::into_inner) = certificate;
    }

    /// Reads the files again when they have changed, until it is told to stop.
    pub(super) async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let mut told = None;
        while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
            let own = Arc::clone(&self);
            // It reads two small files; a panic in it leaves the certificate as it is.
            let Ok(looked) = tokio::task::spawn_blocking(move || own.look()).await else { continue };
            let mistake = looked.as_ref().err().map(ToString::to_string);
            match (looked, &mistake) {
                (Ok(Some(certificate)), _) => {
                    tracing::info!(sha256 = certificate.sha256, "the TLS certificate was read again");
                    self.put_in_force(certificate);
                }
                // Once, not each time.
                (_, Some(error)) if mistake != told => tracing::error!(error, "the TLS certificate stays as it was"),
                _ => {}
            }
            told = mistake;
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
) -> Result<Certificate, TlsError> {
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
    let key = CertifiedKey::from_der(chain, key, provider)
        .map_err(|error| wrong(key_file, format!("it can't be used with {}: {error}", certificate_file.display())))?;
    let sha256 = Sha256::digest(&files.certificates).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Certificate { key: Arc::new(key), hash: files.hash(), sha256 })
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
        let in_force = || tls.in_force().key.cert[0].clone();
        let before = in_force();
        assert!(tls.look().unwrap().is_none(), "nothing has changed");
        put(folder.path(), "cert.pem", &second);
        for _ in 0..2 {
            let halfway = tls.look().unwrap_err();
            assert_eq!((halfway.path.as_path(), in_force() == before), (key.as_path(), true), "{halfway}");
        }
        put(folder.path(), "key.pem", &second_key);
        let fresh = tls.look().unwrap().unwrap();
        assert_eq!(in_force(), before, "a look changes nothing");
        tls.put_in_force(fresh);
        assert_ne!(in_force(), before);
        assert!(tls.look().unwrap().is_none());
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
