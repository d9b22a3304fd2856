//! The front door as the configuration wants it. Opens nothing.

use std::sync::Arc;

use jiff::Timestamp;

use super::{Plane, StartError};
use crate::config::{Config, ForwardedHeader, McpTools};
use crate::http::door::{Door, Tries};
use crate::http::e2b::E2b;
use crate::http::e2b::way::Way;
use crate::http::listen::Connections;
use crate::http::origins::Origins;
use crate::http::remote::Proxies;
use crate::http::tls::Tls;
use crate::http::{App, Bounds, Ports, classic, jupyter, mcp};

/// What handlers work with.
#[must_use]
pub fn app(config: &Config, plane: &Plane) -> App {
    let server = &config.server;
    let tries = Tries { most: config.auth.failures, within: config.auth.failure_window };
    let header = match server.forwarded_header {
        ForwardedHeader::XForwardedFor => "x-forwarded-for",
        ForwardedHeader::Forwarded => "forwarded",
    };
    App {
        service: Arc::clone(&plane.service),
        door: Arc::new(Door::new(Arc::clone(&plane.keys), tries)),
        instance: Arc::from(config.engine.instance.as_str()),
        bounds: Bounds {
            body: usize::try_from(server.max_body).unwrap_or(usize::MAX),
            body_time: server.request_timeout,
        },
        proxies: Proxies::new(server.trusted_proxies.clone(), header),
        origins: Origins::new(&server.cors_origins),
        ports: Ports { within: server.ports_timeout, is_tls: server.tls_cert_file.is_some() },
        jupyter: config.doors.jupyter.then(|| jupyter::Bounds {
            message: usize::try_from(config.jupyter.max_message).unwrap_or(usize::MAX),
            of_session: config.jupyter.connections_per_session as usize,
            of_tenant: config.jupyter.connections_per_tenant as usize,
        }),
        sockets: jupyter::Sockets::default(),
        started: Timestamp::now(),
        mcp: config.doors.mcp.then(|| mcp::Mcp::new(config.doors.mcp_hosts.clone(), mcp_tools(config))),
        e2b: config.doors.e2b.then(|| {
            let templates = Arc::new(config.e2b.templates.clone());
            E2b { domain: e2b_domain(config), templates }
        }),
        classic: config.doors.classic.enabled.then(|| {
            let door = &config.doors.classic;
            let template = Some(door.template.clone()).filter(|template| !template.is_empty());
            Arc::new(classic::Classic { template, setup: door.setup(), idle: door.idle })
        }),
        connect: config.doors.connect,
    }
}

fn mcp_tools(config: &Config) -> mcp::ToolSet {
    match config.doors.mcp_tools {
        McpTools::Small => mcp::ToolSet::Small,
        McpTools::Full => mcp::ToolSet::Full,
    }
}

fn e2b_domain(config: &Config) -> Option<Arc<str>> {
    Some(config.e2b.domain.as_str()).filter(|domain| !domain.is_empty()).map(Arc::from)
}

/// What connections may take. Reads the certificate, where there is one.
///
/// # Errors
/// When the certificate can't be used.
pub fn connections(config: &Config) -> Result<Connections, StartError> {
    let server = &config.server;
    let tls = match (&server.tls_cert_file, &server.tls_key_file) {
        (Some(certificate), Some(key)) => Some(Arc::new(Tls::load(certificate, key)?)),
        _ => None,
    };
    Ok(Connections {
        most: server.connections as usize,
        most_of_one: server.connections_per_address as usize,
        head_time: server.header_timeout,
        head_bytes: usize::try_from(server.max_header).unwrap_or(usize::MAX),
        write_time: server.write_timeout,
        ports_domain: Some(server.ports_domain.as_str()).filter(|domain| !domain.is_empty()).map(Arc::from),
        e2b: config.doors.e2b.then(|| Way { domain: e2b_domain(config) }),
        plain_from_proxies_only: tls.is_none() && !server.allow_plain_http && !server.listen.ip().is_loopback(),
        tls,
    })
}
