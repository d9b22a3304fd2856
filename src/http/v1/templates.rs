//! Templates over HTTP.

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::spec::{MIB, Resources, Timeouts};
use crate::http::App;
use crate::http::extract::{Answer, Caller, Params};
use crate::http::problem::Problem;
use crate::service::TemplateView as Found;

/// The templates of this server.
#[derive(Debug, Serialize, ToSchema)]
pub struct TemplateList {
    /// In the order of their names.
    templates: Vec<TemplateView>,
}

/// A template: an image and its limits.
#[derive(Debug, Serialize, ToSchema)]
pub struct TemplateView {
    /// Its name.
    name: String,
    /// For people.
    description: String,
    /// Whether it is used when none is named.
    default: bool,
    /// Its image.
    image: ImageView,
    /// What a session gets when nothing is asked for.
    defaults: LimitsView,
    /// The ceilings.
    maximum: LimitsView,
    /// Data that every session of it finds in its container, read-only.
    data: Vec<DataView>,
    /// What its workspaces that outlive sessions are; nothing where it has none.
    workspace: Option<WorkspaceOfferView>,
    /// Ports in its containers that can be reached, such as "3000" and "8000-8010".
    ports: Vec<String>,
}

/// Data in the containers of a template.
#[derive(Debug, Serialize, ToSchema)]
pub struct DataView {
    /// Its name.
    name: String,
    /// The folder that it is in.
    path: String,
}

/// Workspaces of a template.
#[derive(Debug, Serialize, ToSchema)]
pub struct WorkspaceOfferView {
    /// One goes when no session has had it for this long.
    max_age_seconds: f64,
    /// The most bytes that one may hold; nothing where there is no quota.
    quota_bytes: Option<u64>,
}

/// A template's image.
#[derive(Debug, Serialize, ToSchema)]
pub struct ImageView {
    /// As the template names it.
    reference: String,
    /// The engine's id of its content; nothing when the engine has not got it.
    id: Option<String>,
    /// Its size.
    size_bytes: Option<u64>,
}

/// Limits of a template.
#[derive(Debug, Serialize, ToSchema)]
pub struct LimitsView {
    cpu: f64,
    memory_mb: u64,
    disk_mb: u64,
    pids: u32,
    idle_seconds: f64,
    lifetime_seconds: f64,
    execution_seconds: f64,
    paused_seconds: f64,
}

impl LimitsView {
    fn of(resources: &Resources, timeouts: &Timeouts) -> Self {
        Self {
            cpu: f64::from(resources.cpu_millis) / 1000.0,
            memory_mb: resources.memory_bytes / MIB,
            disk_mb: resources.disk_bytes / MIB,
            pids: resources.pids,
            idle_seconds: timeouts.idle.as_secs_f64(),
            lifetime_seconds: timeouts.lifetime.as_secs_f64(),
            execution_seconds: timeouts.execution.as_secs_f64(),
            paused_seconds: timeouts.paused.as_secs_f64(),
        }
    }
}

impl TemplateView {
    fn of(found: Found, default: &str) -> Self {
        let template = found.template;
        Self {
            default: template.name == default,
            image: ImageView {
                reference: template.image,
                id: found.image.as_ref().map(|i| i.id.clone()),
                size_bytes: found.image.map(|i| i.size_bytes),
            },
            defaults: LimitsView::of(&template.default_resources, &template.default_timeouts),
            maximum: LimitsView::of(&template.max_resources, &template.max_timeouts),
            data: template.data.into_iter().map(|mount| DataView { name: mount.name, path: mount.path }).collect(),
            workspace: template.workspace.map(|offer| WorkspaceOfferView {
                max_age_seconds: offer.max_age.as_secs_f64(),
                quota_bytes: offer.quota_bytes,
            }),
            ports: template.ports.texts(),
            name: template.name,
            description: template.description,
        }
    }
}

/// List the templates
#[utoipa::path(get, path = "/v1/templates", operation_id = "list_templates", tag = "templates",
    responses((status = 200, body = TemplateList), (status = "4XX", body = Problem)))]
pub async fn list_templates(
    State(app): State<App>,
    Caller(who): Caller,
    params: Params,
) -> Result<Answer<TemplateList>, Problem> {
    params.only(&[])?;
    let default = app.service.default_template();
    let templates = app.service.templates(&who).await.into_iter().map(|t| TemplateView::of(t, &default)).collect();
    Ok(Answer(TemplateList { templates }))
}
