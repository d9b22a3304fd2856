//! Pools over HTTP: how many sessions are ready before anybody asks for them.

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::http::App;
use crate::http::extract::{Answer, Caller};
use crate::http::problem::Problem;
use crate::http::v1::sessions::ResourcesView;
use crate::session::pool;

/// All pools.
#[derive(Debug, Serialize, ToSchema)]
pub struct Pools {
    /// One for each template that has one, and for each other size of it that is kept ready.
    pools: Vec<PoolView>,
}

/// A pool.
#[derive(Debug, Serialize, ToSchema)]
pub struct PoolView {
    /// Its template.
    template: String,
    /// What each of its sessions may use.
    resources: ResourcesView,
    /// At least so many are kept ready.
    min: u32,
    /// At most so many, when many were asked for lately.
    max: u32,
    /// How many there should be now.
    target: usize,
    /// Those that can be claimed.
    ready: usize,
    /// Those that start.
    starting: usize,
    /// Creates that got one, since the server started.
    hits: u64,
    /// Creates that could have, and found none.
    misses: u64,
}

impl From<pool::PoolView> for PoolView {
    fn from(view: pool::PoolView) -> Self {
        let pool::PoolView { template, resources, size, target, ready, starting, hits, misses } = view;
        Self {
            template,
            resources: resources.into(),
            min: size.min,
            max: size.max,
            target,
            ready,
            starting,
            hits,
            misses,
        }
    }
}

/// List pools
///
/// Sessions that are made before anybody asks for them: a create that asks for the resources of one gets it at once (`source`: `warm`).
#[utoipa::path(get, path = "/v1/pools", operation_id = "list_pools", tag = "templates",
    responses((status = 200, body = Pools), (status = "4XX", body = Problem)))]
pub async fn list_pools(State(app): State<App>, Caller(who): Caller) -> Answer<Pools> {
    Answer(Pools { pools: app.service.pools(&who).into_iter().map(PoolView::from).collect() })
}
