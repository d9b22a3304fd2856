//! What stands for the world outside: names that lead to public-looking addresses, and addresses that lead to servers on loopback. What was resolved and dialled is
//! noted. Nothing is sent to any other machine.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use axum::Router;
use cellblock::egress::{Dialer, Outside, Resolver, Stream};
use cellblock::task;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

/// The address of the server that is asked most.
pub const PUBLIC: &str = "93.184.216.34";

/// The world. Clones are the same.
#[derive(Clone, Default)]
pub struct World(Arc<Mutex<Map>>);

#[derive(Default)]
struct Map {
    /// What a name leads to, the first time, the second time, and so on; the last one stays.
    names: HashMap<String, Vec<Vec<IpAddr>>>,
    servers: HashMap<SocketAddr, SocketAddr>,
    own: Vec<IpAddr>,
    resolved: Vec<String>,
    dialled: Vec<SocketAddr>,
}

impl World {
    /// As a server takes it.
    pub fn outside(&self) -> Outside {
        Outside { resolver: Arc::new(self.clone()), dialer: Arc::new(self.clone()) }
    }

    /// A name leads to these addresses.
    pub fn name(&self, name: &str, addresses: &[&str]) -> &Self {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        self.0.lock().unwrap().names.entry(name.to_owned()).or_default().push(addresses);
        self
    }

    /// An address and port lead to a server on loopback.
    pub fn server(&self, address: &str, port: u16, to: SocketAddr) -> &Self {
        assert!(to.ip().is_loopback());
        self.0.lock().unwrap().servers.insert(SocketAddr::new(address.parse().unwrap(), port), to);
        self
    }

    /// An address is the server's own.
    pub fn own(&self, address: &str) -> &Self {
        self.0.lock().unwrap().own.push(address.parse().unwrap());
        self
    }

    /// Everything that was dialled.
    pub fn dialled(&self) -> Vec<SocketAddr> {
        self.0.lock().unwrap().dialled.clone()
    }

    /// Every name that was resolved.
    pub fn resolved(&self) -> Vec<String> {
        self.0.lock().unwrap().resolved.clone()
    }
}

#[async_trait]
impl Resolver for World {
    async fn resolve(&self, name: &str, _: &Arc<str>) -> io::Result<Vec<IpAddr>> {
        let mut map = self.0.lock().unwrap();
        map.resolved.push(name.to_owned());
        let known = map.names.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(if known.len() > 1 { known.remove(0) } else { known[0].clone() })
    }
}

#[async_trait]
impl Dialer for World {
    async fn dial(&self, address: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let server = {
            let mut map = self.0.lock().unwrap();
            map.dialled.push(address);
            map.servers.get(&address).copied()
        };
        Ok(Box::new(TcpStream::connect(server.ok_or(io::ErrorKind::ConnectionRefused)?).await?))
    }

    fn is_own(&self, address: IpAddr) -> bool {
        self.0.lock().unwrap().own.contains(&address)
    }
}

/// An authority and the certificates that it gives.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// A new one.
    pub fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        // Else it has the name of what it signs, which then looks as if it had signed itself.
        params.distinguished_name.push(DnType::CommonName, "the authority of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Its own certificate.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    fn acceptor(&self, names: &[&str]) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.0).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder().with_no_client_auth();
        TlsAcceptor::from(Arc::new(config.with_single_cert(vec![certificate.der().clone()], key).unwrap()))
    }

    /// Serves over TLS on loopback, under these names.
    pub async fn serve(&self, names: &[&str], router: Router) -> SocketAddr {
        let acceptor = self.acceptor(names);
        listen(move |stream| {
            let (acceptor, router) = (acceptor.clone(), router.clone());
            async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    answer(stream, router).await;
                }
            }
        })
        .await
    }
}

/// Serves in plain HTTP on loopback.
pub async fn serve(router: Router) -> SocketAddr {
    listen(move |stream| answer(stream, router.clone())).await
}

/// Listens on loopback; each connection is handed over.
pub async fn listen<F>(connection: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    task::spawn("world", async move {
        while let Ok((stream, _)) = listener.accept().await {
            task::spawn("world's connection", connection(stream));
        }
    });
    address
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, router: Router) {
    let service = TowerToHyperService::new(router);
    // Whoever asks may break it off.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}
