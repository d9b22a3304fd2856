//! What a sandbox uses, as E2B's clients read it. Nothing is recorded here: there is one measurement, of this moment.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::super::error::Refusal;
use super::view::cpus;
use super::{Named, rests};
use crate::http::extract::{Answer, Params};
use crate::http::problem::Problem;
use crate::http::v1::sessions::time;
use crate::service::SessionMetrics;

/// CPU time is measured over this long.
const SPAN: Duration = Duration::from_millis(250);

/// What a sandbox uses at a moment. What its machine does not tell is 0.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct MetricView {
    timestamp: String,
    timestamp_unix: i64,
    cpu_count: u32,
    /// Of all that it may have.
    cpu_used_pct: f64,
    mem_used: u64,
    mem_total: u64,
    /// It is part of what is used.
    mem_cache: u64,
    disk_used: u64,
    disk_total: u64,
}

/// One measurement, if this moment is within what is asked for and the sandbox runs.
pub(super) async fn get_metrics(
    Named { app, who, session }: Named,
    params: Result<Params, Problem>,
) -> Result<Answer<Vec<MetricView>>, Refusal> {
    let params = params.and_then(|params| params.only(&["start", "end"])).map_err(Refusal::of_control)?;
    let bound = |name: &str| params.parse::<i64>(name, "a number of seconds since 1970").map_err(Refusal::of_control);
    let (start, end) = (bound("start")?, bound("end")?);
    let now = Timestamp::now().as_second();
    if rests(&session) || start.is_some_and(|start| start > now) || end.is_some_and(|end| end < now) {
        return Ok(Answer(Vec::new()));
    }
    let before = app.service.session_metrics(&who, session.id).await.map_err(Refusal::of_control)?;
    tokio::time::sleep(SPAN).await;
    let after = app.service.session_metrics(&who, session.id).await.map_err(Refusal::of_control)?;
    let limits = after.limits;
    Ok(Answer(vec![MetricView {
        // The moment that was asked about.
        timestamp: time(before.at),
        timestamp_unix: before.at.as_second(),
        cpu_count: cpus(&session),
        cpu_used_pct: cpu_used(&before, &after),
        mem_used: after.used.memory_bytes.unwrap_or_default(),
        mem_total: limits.memory_bytes,
        mem_cache: 0,
        disk_used: after.used.disk_bytes.unwrap_or_default(),
        disk_total: limits.disk_bytes,
    }]))
}

/// Percent of the CPUs that it may use.
fn cpu_used(before: &SessionMetrics, after: &SessionMetrics) -> f64 {
    let (Some(earlier), Some(later)) = (before.used.cpu_usec, after.used.cpu_usec) else { return 0.0 };
    let span = after.at.duration_since(before.at).as_secs_f64() * f64::from(after.limits.cpu_millis) / 1000.0;
    if span <= 0.0 {
        return 0.0;
    }
    let used = later.saturating_sub(earlier) as f64 / 1e6;
    ((used / span * 10_000.0).round() / 100.0).min(100.0)
}
