//! The bridge's way to a server over HTTP.

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use reqwest::Method;

use super::bridge::{Door, Reply};
use crate::cli::client::Client;

impl Door for Client {
    fn post(&self, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> BoxFuture<'static, Result<Reply, String>> {
        let mut request = self.request(Method::POST, &["mcp"]).body(body);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let url = self.url().clone();
        async move {
            let response = request.send().await.map_err(|error| format!("{url} can't be reached: {error}"))?;
            let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
            let (status, session, kind) =
                (response.status().as_u16(), header("mcp-session-id"), header("content-type"));
            let body =
                response.bytes_stream().map(|piece| piece.map(|piece| piece.to_vec()).map_err(|e| e.to_string()));
            Ok(Reply { status, session, kind: kind.unwrap_or_default(), body: body.boxed() })
        }
        .boxed()
    }
}
