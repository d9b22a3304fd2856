//! What one session uses, over HTTP: once, or again and again as server-sent events. The metrics of the server as a whole are on the admin listener.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream};
use serde::Serialize;
use utoipa::ToSchema;

use super::sessions::time;
use super::stream::Format;
use crate::domain::ids::SessionId;
use crate::domain::lifecycle::Phase;
use crate::domain::spec::FieldError;
use crate::http::App;
use crate::http::extract::{Answer, Caller, Id, Params};
use crate::http::problem::{self, Problem};
use crate::service::keys::Principal;
use crate::service::{Service, SessionMetrics};

/// Seconds between two events: without a wish, at least, and at most.
const INTERVAL: (u64, u64, u64) = (2, 1, 60);

/// What a session uses at a moment. What its machine does not tell is null.
#[derive(Debug, Serialize, ToSchema)]
pub struct MetricsView {
    /// The moment.
    at: String,
    /// Memory in use, with files in the working folder and temporary ones.
    memory_bytes: Option<u64>,
    /// Most memory in use at any time.
    memory_peak_bytes: Option<u64>,
    /// What it may use.
    memory_limit_bytes: u64,
    /// CPU time used since its container began.
    cpu_seconds: Option<f64>,
    /// CPUs that it may use.
    cpu_limit: f64,
    /// Processes and threads.
    pids: Option<u64>,
    /// What it may have of them.
    pids_limit: u32,
    /// Bytes of the working folder in use.
    disk_bytes: Option<u64>,
    /// What there may be in it.
    disk_limit_bytes: u64,
    /// Processes that were ended because memory ran out.
    oom_kills: u64,
}

impl From<SessionMetrics> for MetricsView {
    fn from(metrics: SessionMetrics) -> Self {
        let SessionMetrics { at, used, limits } = metrics;
        Self {
            at: time(at),
            memory_bytes: used.memory_bytes,
            memory_peak_bytes: used.memory_peak_bytes,
            memory_limit_bytes: limits.memory_bytes,
            cpu_seconds: used.cpu_usec.map(|usec| usec as f64 / 1e6),
            cpu_limit: f64::from(limits.cpu_millis) / 1000.0,
            pids: used.pids,
            pids_limit: limits.pids,
            disk_bytes: used.disk_bytes,
            disk_limit_bytes: limits.disk_bytes,
            oom_kills: used.oom_kills,
        }
    }
}

/// Look at what a session uses
///
/// With `Accept: text/event-stream` again and again, as events `metrics`, until the session is paused or over; none comes while its container
/// can't be asked. It is no activity of the session, and a paused one is not resumed for it (`state-conflict`).
#[utoipa::path(get, path = "/v1/sessions/{id}/metrics", operation_id = "get_session_metrics", tag = "sessions",
    params(("id" = String, Path), ("interval_seconds" = Option<u64>, Query, description = "Between two events: 1 to 60; 2 when absent")),
    responses((status = 200, body = MetricsView), (status = "4XX", body = Problem), (status = "5XX", body = Problem)))]
pub async fn get_session_metrics(
    State(app): State<App>,
    Caller(who): Caller,
    Id(id): Id<SessionId>,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let params = params.only(&["interval_seconds"])?;
    let (usual, least, most) = INTERVAL;
    let interval = params.parse::<u64>("interval_seconds", "1 to 60")?.unwrap_or(usual);
    if !(least..=most).contains(&interval) {
        return Err(Problem::new(problem::INVALID_REQUEST, "a query parameter is not understood")
            .with_fields(vec![FieldError::new("?interval_seconds", "allowed is 1 to 60")]));
    }
    let first = app.service.session_metrics(&who, id).await?;
    if Format::wanted(&headers) != Some(Format::Sse) {
        return Ok(Answer(MetricsView::from(first)).into_response());
    }
    let looks = looks(app.service, who, id, first, Duration::from_secs(interval));
    Ok(Sse::new(looks).keep_alive(KeepAlive::default()).into_response())
}

/// Events with what a session uses, the first at once, until it is paused or over.
fn looks(
    service: Arc<Service>,
    who: Principal,
    id: SessionId,
    first: SessionMetrics,
    interval: Duration,
) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold((service, who, Some(first)), move |(service, who, first)| async move {
        let metrics = match first {
            Some(first) => first,
            None => next_look(&service, &who, id, interval).await?,
        };
        // Texts and numbers: writing them can't fail.
        let text = serde_json::to_string(&MetricsView::from(metrics)).unwrap_or_default();
        Some((Ok(Event::default().event("metrics").data(text)), (service, who, None)))
    })
}

/// Looks again after the interval. Where nothing can be told, since the link is lost or the container is being replaced, the next interval may.
async fn next_look(service: &Service, who: &Principal, id: SessionId, interval: Duration) -> Option<SessionMetrics> {
    loop {
        let session = service.session(who, id).ok()?;
        let leaves = session.wait_for(|snapshot| !goes_on(snapshot.phase));
        if tokio::time::timeout(interval, leaves).await.is_ok() {
            return None;
        }
        if let Ok(metrics) = service.session_metrics(who, id).await {
            return Some(metrics);
        }
    }
}

fn goes_on(phase: Phase) -> bool {
    match phase {
        Phase::Provisioning | Phase::Connecting | Phase::Ready | Phase::Resuming | Phase::Replacing => true,
        Phase::Pausing | Phase::Paused | Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_) => false,
    }
}
