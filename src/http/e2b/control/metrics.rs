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

#[cfg(test)]
mod tests {
    use cellblock_wire::link::Stats;
    use jiff::SignedDuration;

    use super::*;
    use crate::domain::spec::Resources;

    #[test]
    fn cpu_time_is_told_as_a_part_of_what_there_is() {
        let (memory_bytes, disk_bytes, tmp_bytes) = (1, 1, 1);
        let limits = Resources { cpu_millis: 2000, memory_bytes, disk_bytes, tmp_bytes, pids: 1, open_files: 1 };
        let at = |millis: i64, cpu_usec: Option<u64>| SessionMetrics {
            at: Timestamp::UNIX_EPOCH + SignedDuration::from_millis(millis),
            used: Stats { cpu_usec, ..Stats::default() },
            limits,
        };
        let used = |later: Option<u64>| cpu_used(&at(0, Some(1_000_000)), &at(250, later));
        let told = [Some(1_000_000), Some(1_125_000), Some(1_500_000), Some(1_900_000), Some(0), None].map(used);
        assert_eq!(told, [0.0, 25.0, 100.0, 100.0, 0.0, 0.0]);
        assert_eq!(cpu_used(&at(250, Some(0)), &at(250, Some(9))).to_bits(), 0.0_f64.to_bits(), "no time has passed");
    }
}
