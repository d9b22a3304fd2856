//! Whom the server trusts when it asks an upstream over TLS: the system's authorities, and those of the operator. Checks names and certificates as rustls does.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::Stream;
use crate::task;

/// Authorities. Those of the system are read when they are needed first.
#[derive(Default)]
pub struct Trust {
    own: Vec<CertificateDer<'static>>,
    connector: OnceCell<TlsConnector>,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("own", &self.own.len()).finish_non_exhaustive()
    }
}

impl Trust {
    /// Reads an operator's authorities, PEM, if there are any.
    ///
    /// # Errors
    /// When the file can't be read, or has no certificate in it.
    pub fn load(file: Option<&Path>) -> Result<Self, String> {
        let Some(file) = file else { return Ok(Self::default()) };
        let pem = std::fs::read(file).map_err(|error| error.to_string())?;
        let own: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let own = own.map_err(|error| format!("it is not PEM: {error}"))?;
        let is_certificate = |own: &CertificateDer<'static>| RootCertStore::empty().add(own.clone()).is_ok();
        match !own.is_empty() && own.iter().all(is_certificate) {
            true => Ok(Self { own, connector: OnceCell::new() }),
            false => Err("it holds no certificates of authorities".to_owned()),
        }
    }

    /// Speaks TLS to the server of a name, over a connection to it.
    ///
    /// # Errors
    /// When it is not that server, or can't speak it.
    pub(super) async fn secure(&self, name: &str, stream: Box<dyn Stream>) -> io::Result<impl Stream + 'static> {
        let connector = self.connector.get_or_init(|| self.connector()).await;
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        connector.connect(name, stream).await
    }

    async fn connector(&self) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        let found = task::blocking(rustls_native_certs::load_native_certs).await;
        let found = found.map(|found| found.certs).unwrap_or_default();
        let (added, ignored) = roots.add_parsable_certificates(found.into_iter().chain(self.own.iter().cloned()));
        tracing::debug!(added, ignored, "authorities that upstreams are trusted by");
        let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        TlsConnector::from(Arc::new(config))
    }
}
