//! The local engine behind TLS, with certificates made on the spot. Clients must show one, as with `dockerd --tlsverify`.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tokio::net::{TcpListener, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

/// Listens on loopback, passes what comes over TLS on to the engine's socket, and leaves `ca.pem`, `cert.pem` and `key.pem` of a
/// client in `folder`.
pub async fn open(folder: &Path, socket: &'static str) -> SocketAddr {
    let mut authority = CertificateParams::new(vec![]).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().expect("a key")).expect("an authority");
    let issue = |usage| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("parameters");
        params.extended_key_usages = vec![usage];
        (params.signed_by(&key, &authority).expect("a certificate"), key)
    };
    let (client, client_key) = issue(ExtendedKeyUsagePurpose::ClientAuth);
    for (name, text) in
        [("ca.pem", authority.pem()), ("cert.pem", client.pem()), ("key.pem", client_key.serialize_pem())]
    {
        std::fs::write(folder.join(name), text).expect("a file");
    }
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone()).expect("a root");
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().expect("a verifier");
    let (server, server_key) = issue(ExtendedKeyUsagePurpose::ServerAuth);
    let key = PrivateKeyDer::try_from(server_key.serialize_der()).expect("a key");
    let config =
        ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(vec![server.der().clone()], key);
    let acceptor = TlsAcceptor::from(Arc::new(config.expect("a configuration")));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    cellblock::task::spawn("tls", async move {
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            cellblock::task::spawn("tls connection", async move {
                if let (Ok(mut client), Ok(mut engine)) =
                    (acceptor.accept(client).await, UnixStream::connect(socket).await)
                {
                    // Either side may hang up.
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut engine).await;
                }
            });
        }
    });
    address
}
