//! The OpenAPI document, made from the handlers, and a page to read it with nothing fetched from elsewhere.

use axum::Router;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa_swagger_ui::SwaggerUi;

use super::App;

/// The document's head; its paths come from the routers.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Cellblock",
        description = "Runs untrusted code, each session in its own locked container with a real Jupyter kernel.\n\n\
            200 whenever user code ran, however it ended; errors are `application/problem+json`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    modifiers(&Keys),
    security(("key" = []))
)]
pub(super) struct Head;

struct Keys;

impl utoipa::Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_with(Default::default);
        components.add_security_scheme("key", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

pub(super) fn routes(document: utoipa::openapi::OpenApi) -> Router<App> {
    SwaggerUi::new("/docs").url("/openapi.json", document).into()
}

/// The whole document.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    parts().1
}

/// The API's routes and their document, which has no word for "the rest of the path".
pub(super) fn parts() -> (Router<App>, utoipa::openapi::OpenApi) {
    let (routes, mut document) = super::v1::routes().split_for_parts();
    let paths = std::mem::take(&mut document.paths.paths);
    document.paths.paths = paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    (routes, document)
}
