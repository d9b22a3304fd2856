//! The front door without a port, for whoever lives in the same process. The same routes, layers and keys.

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::http::{Request, Response, header};
use futures_util::{Stream, StreamExt};
use tower_service::Service as _;

use super::App;

/// The front door.
#[derive(Debug, Clone)]
pub struct Local(Router);

/// An answer, whose body is still to come.
#[derive(Debug)]
pub struct Answered(Response<Body>);

impl Local {
    /// That of this application.
    #[must_use]
    pub fn new(app: App) -> Self {
        Self(super::router(app))
    }

    /// Sends a body to a path.
    ///
    /// # Errors
    /// A header can't be one.
    pub async fn post(
        &self,
        path: &str,
        headers: impl IntoIterator<Item = (&'static str, String)>,
        body: Vec<u8>,
    ) -> Result<Answered, String> {
        let request = Request::post(path).header(header::HOST, "localhost");
        let request = headers.into_iter().fold(request, |request, (name, value)| request.header(name, value));
        let request = request.body(Body::from(body)).map_err(|error| error.to_string())?;
        // It is always ready.
        let response = self.0.clone().call(request).await;
        Ok(Answered(response.unwrap_or_else(|never| match never {})))
    }
}

impl Answered {
    /// The HTTP status.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.0.status().as_u16()
    }

    /// A header, if it is there as text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.0.headers().get(name)?.to_str().ok()
    }

    /// The body, as it comes. Dropping it hangs up.
    pub fn body(self) -> impl Stream<Item = Result<Vec<u8>, String>> + Send + 'static {
        let pieces: BodyDataStream = self.0.into_body().into_data_stream();
        pieces.map(|piece| piece.map(|piece| piece.to_vec()).map_err(|error| error.to_string()))
    }
}
