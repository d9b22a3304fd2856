//! What this server says of itself to a client of the protocol, and which room answers which message. It does nothing of that itself.

use std::borrow::Cow;
use std::sync::Arc;

use axum::http::request::Parts;
use rmcp::ServerHandler;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, CancelTaskParams, ContentBlock, ErrorData, GetTaskParams,
    GetTaskResult, Implementation, ListResourceTemplatesResult, ListResourcesResult, ListToolsResult,
    PaginatedRequestParams, ProtocolVersion, ReadResourceRequestParams, ReadResourceResponse, ServerCapabilities,
    ServerConfig, Tool, UpdateTaskParams,
};
use rmcp::service::{RequestContext, RoleServer};

use super::call::{Call, describe};
use super::tools::ToolSet;
use super::{Asked, commands, edits, files, kernels, resources, run, sessions, tasks};
use crate::http::problem::Problem;
use crate::service::{Service, trail};

/// What a model is told of the server: how sessions, files and long work go together, and nothing else.
const INSTRUCTIONS: &str = "\
Runs code in sessions: containers of your own without a network, each with a Jupyter kernel that keeps variables and files between calls.
run_code makes a session if you name none; pass the session_id of its answer on to go on in the same one.
Paths are relative to the session's working folder; files that code writes come back as links, and read_file reads them.
What code prints is cut in the middle when it is long; the whole of it is at execution://{id}.
For work of minutes say background: true, and read execution://{id} later.
close_session ends a session with all that is in it; idle ones end by themselves.";

/// The revisions that are served.
const REVISIONS: &[ProtocolVersion] =
    &[ProtocolVersion::V_2025_06_18, ProtocolVersion::V_2025_11_25, ProtocolVersion::V_2026_07_28];

/// The product, as clients of the protocol see it.
#[derive(Debug, Clone)]
pub(super) struct Cells {
    /// Every command of the product.
    pub service: Arc<Service>,
    /// What of it clients are offered.
    pub tools: ToolSet,
}

impl Cells {
    /// Who asks, as the door has noted it.
    fn asked(context: &RequestContext<RoleServer>) -> Result<Asked, ErrorData> {
        let asked = context.extensions.get::<Parts>().and_then(|head| head.extensions.get::<Asked>());
        asked.cloned().ok_or_else(|| ErrorData::internal_error("nobody asks", None))
    }

    async fn call(&self, params: CallToolRequestParams, call: &Call) -> Result<CallToolResponse, ErrorData> {
        let arguments = params.arguments.unwrap_or_default();
        let offered = self.get_tool(&params.name).map(|tool| tool.name);
        let told = match offered.as_deref().unwrap_or_default() {
            "run_code" => {
                return Ok(run::run_code(call, arguments).await.unwrap_or_else(|problem| refusal(&problem).into()));
            }
            "run_command" => commands::run_command(call, arguments).await,
            "create_session" => sessions::create(call, arguments).await,
            "list_sessions" => sessions::list(call, arguments),
            "close_session" => sessions::close(call, arguments).await,
            "read_file" => files::read(call, arguments).await,
            "write_file" => files::write(call, arguments).await,
            "list_files" => edits::list(call, arguments).await,
            "edit_file" => edits::edit(call, arguments).await,
            "delete_file" => edits::delete(call, arguments).await,
            "interrupt_session" => kernels::interrupt(call, arguments).await,
            "restart_session" => kernels::restart(call, arguments).await,
            "install_packages" => kernels::install(call, arguments).await,
            "list_packages" => kernels::packages(call, arguments).await,
            "get_execution" => kernels::execution(call, arguments).await,
            "export_notebook" => kernels::notebook(call, arguments).await,
            _ => {
                let known: Vec<_> = self.tools.all().iter().map(|tool| tool.name.as_ref()).collect();
                let (shown, known) = (params.name.chars().take(100).collect::<String>(), known.join(", "));
                let message = format!("there is no tool \"{shown}\"; there are {known}");
                return Err(ErrorData::invalid_params(message, None));
            }
        };
        Ok(told.unwrap_or_else(|problem| refusal(&problem)).into())
    }

    /// Does something for who asks, in a task of the protocol's own, and has its trail followed.
    async fn of<T, F: Future<Output = Result<T, ErrorData>>>(
        &self,
        context: RequestContext<RoleServer>,
        work: impl FnOnce(Call) -> F,
    ) -> Result<T, ErrorData> {
        let asked = Self::asked(&context)?;
        let trail = asked.trail.clone();
        trail::follow(trail, work(Call::new(Arc::clone(&self.service), asked, context))).await
    }
}

/// A refusal is for the model, which may do better then.
fn refusal(problem: &Problem) -> CallToolResult {
    trail::note_refusal(problem.code, problem.status);
    CallToolResult::error(vec![ContentBlock::text(describe(problem))])
}

impl ServerHandler for Cells {
    fn get_info(&self) -> ServerConfig {
        let capabilities = ServerCapabilities::builder().enable_tools().enable_resources().enable_tasks().build();
        // Which version runs here helps nobody but an attacker; the protocol wants a text.
        ServerConfig::new(capabilities)
            .with_server_info(Implementation::new("cellblock", "1").with_title("Cellblock"))
            .with_instructions(INSTRUCTIONS)
    }

    fn supported_protocol_versions(&self) -> Cow<'static, [ProtocolVersion]> {
        Cow::Borrowed(REVISIONS)
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(self.tools.all().to_vec()))
    }

    fn get_tool(&self, name: &str) -> Option<Tool> {
        self.tools.all().iter().find(|tool| tool.name == name).cloned()
    }

    async fn call_tool(
        &self,
        params: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        self.of(context, |call| async move { self.call(params, &call).await }).await
    }

    async fn get_task(
        &self,
        params: GetTaskParams,
        context: RequestContext<RoleServer>,
    ) -> Result<GetTaskResult, ErrorData> {
        self.of(context, |call| async move { tasks::get(&call, &params.task_id).await }).await
    }

    /// No task asks its client for something.
    async fn update_task(
        &self,
        params: UpdateTaskParams,
        context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        self.of(context, |call| async move { tasks::find(&call, &params.task_id).map(drop) }).await
    }

    async fn cancel_task(
        &self,
        params: CancelTaskParams,
        context: RequestContext<RoleServer>,
    ) -> Result<(), ErrorData> {
        self.of(context, |call| async move { tasks::cancel(&call, &params.task_id) }).await
    }

    async fn list_resources(
        &self,
        _: Option<PaginatedRequestParams>,
        context: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        resources::list(&self.service, &Self::asked(&context)?.who)
    }

    async fn list_resource_templates(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        Ok(ListResourceTemplatesResult::with_all_items(resources::templates()))
    }

    async fn read_resource(
        &self,
        params: ReadResourceRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        let asked = Self::asked(&context)?;
        let read = resources::read(&self.service, &asked.who, &params.uri);
        trail::follow(asked.trail, read).await.map(ReadResourceResponse::from)
    }
}
