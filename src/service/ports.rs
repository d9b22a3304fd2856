//! Connections to what code in a session listens on: who may have one, and to which port. What is spoken on one is its front door's business.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use cellblock_wire::ports::{PORT_CLOSED, PORT_STUCK};
use cellblock_wire::tunnel::Tunnel;
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Error, Principal, Service, unreachable_guest};
use crate::domain::ids::SessionId;
use crate::kernel::link::LinkError;
use crate::session::visits::{Visit, Weight};

/// A connection to a port of a session, which is in use as long as it is open.
#[derive(Debug)]
pub struct PortStream {
    stream: Tunnel<Incoming>,
    _visit: Visit,
}

impl Service {
    /// Connects to a port in a session. One that is paused is resumed for it.
    ///
    /// # Errors
    /// [`Error::PortNotAllowed`], [`Error::PortClosed`], [`Error::PortStuck`], and those of every command on a session.
    pub async fn open_port(&self, who: &Principal, id: SessionId, port: u16) -> Result<PortStream, Error> {
        // Whatever the method is: code inside does what it likes with it.
        who.require_sessions()?;
        let session = self.session(who, id)?;
        let allowed = &session.spec.ports;
        if !allowed.allow(port) {
            return Err(Error::PortNotAllowed {
                port,
                template: session.spec.template.clone(),
                allowed: allowed.to_string(),
            });
        }
        let visit = session.enter(Weight::Light).await?;
        let stream = visit.link.port(port).await.map_err(|error| match &error {
            LinkError::Refused { refusal, .. } if refusal.code == PORT_CLOSED => Error::PortClosed(port),
            LinkError::Refused { refusal, .. } if refusal.code == PORT_STUCK => Error::PortStuck(port),
            _ => unreachable_guest(id, &error),
        })?;
        Ok(PortStream { stream, _visit: visit })
    }
}

impl AsyncRead for PortStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
