//! Usage over HTTP: what the caller's tenant uses, and how much it may.

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::spec::MIB;
use crate::http::App;
use crate::http::extract::{Answer, Caller, Params};
use crate::http::problem::Problem;
use crate::service::Usage;

/// What your tenant uses, and how much it may. A limit that is nothing is only the server's own.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageView {
    /// Your tenant.
    tenant: String,
    /// Sessions that have not ended.
    sessions: AmountView,
    /// CPUs that they were promised.
    cpu: FractionView,
    /// Memory that they were promised.
    memory_mb: AmountView,
    /// Workspaces that outlive sessions, those included whose files are still being removed.
    workspaces: AmountView,
    /// Executions that run or wait.
    executions: AmountView,
    /// Bytes of blobs and notebooks, with what their files take of the disk; nothing runs any more where they are too many, until some are deleted or gone.
    stored_bytes: AmountView,
    /// CPU time of the executions that have ended today.
    cpu_seconds_today: CpuTimeView,
    /// Requests.
    requests: RequestsView,
}

/// A whole number.
#[derive(Debug, Serialize, ToSchema)]
pub struct AmountView {
    /// How much it may be.
    limit: Option<u64>,
    /// How much it is.
    used: u64,
}

/// A number.
#[derive(Debug, Serialize, ToSchema)]
pub struct FractionView {
    /// How much it may be.
    limit: Option<f64>,
    /// How much it is.
    used: f64,
}

/// CPU time of a day.
#[derive(Debug, Serialize, ToSchema)]
pub struct CpuTimeView {
    /// How much it may be; nothing runs any more that day once it is used up.
    limit: Option<u64>,
    /// How much it is.
    used: f64,
    /// When the day ends, and counting begins anew.
    resets_at: String,
}

/// A rate.
#[derive(Debug, Serialize, ToSchema)]
pub struct RequestsView {
    /// So many a second on average.
    per_second: Option<f64>,
    /// So many at once.
    burst: Option<u32>,
}

impl From<Usage> for UsageView {
    fn from(usage: Usage) -> Self {
        let Usage { tenant, quota, held, workspaces, executions, stored_bytes, cpu_today, day_ends_at } = usage;
        let share = quota.share;
        let cpus = |millis: u64| millis as f64 / 1000.0;
        Self {
            tenant: tenant.to_string(),
            sessions: AmountView { limit: share.sessions.map(u64::from), used: held.sessions.into() },
            cpu: FractionView { limit: share.cpu_millis.map(cpus), used: cpus(held.cpu_millis) },
            memory_mb: AmountView {
                limit: share.memory_bytes.map(|bytes| bytes / MIB),
                used: held.memory_bytes.div_ceil(MIB),
            },
            workspaces: AmountView { limit: quota.workspaces.map(u64::from), used: workspaces as u64 },
            executions: AmountView { limit: quota.executions.map(u64::from), used: executions.into() },
            stored_bytes: AmountView { limit: quota.stored_bytes, used: stored_bytes },
            cpu_seconds_today: CpuTimeView {
                limit: quota.cpu_seconds_a_day,
                used: cpu_today.as_secs_f64(),
                resets_at: day_ends_at.to_string(),
            },
            requests: RequestsView {
                per_second: quota.requests.map(|rate| rate.per_second),
                burst: quota.requests.map(|rate| rate.burst),
            },
        }
    }
}

/// What your tenant uses
///
/// Each quota with its limit. With any key of the tenant.
#[utoipa::path(get, path = "/v1/usage", operation_id = "get_usage", tag = "keys",
    responses((status = 200, body = UsageView), (status = "4XX", body = Problem)))]
pub async fn get_usage(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
) -> Result<Answer<UsageView>, Problem> {
    params.only(&[])?;
    Ok(Answer(app.service.usage(&who).into()))
}
