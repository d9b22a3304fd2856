//! The native API, version 1: its routes in one place.

use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::docs::Head;

pub mod admin;
pub mod audit;
pub mod commands;
pub mod contexts;
pub mod egress;
pub mod executions;
pub mod files;
pub mod keys;
pub mod metrics;
pub mod notebooks;
pub mod packages;
pub mod pools;
pub mod ports;
pub mod runs;
pub mod sessions;
pub mod stream;
pub mod templates;
pub mod terminal;
pub mod transfers;
pub mod usage;
pub mod workspaces;

/// All routes of the API, with the document they make.
pub fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Head::openapi())
        .routes(routes!(sessions::create_session, sessions::list_sessions, sessions::delete_sessions))
        .routes(routes!(sessions::get_session, sessions::patch_session, sessions::delete_session))
        .routes(routes!(sessions::wait_session))
        .routes(routes!(metrics::get_session_metrics))
        .routes(routes!(egress::get_session_egress))
        .routes(routes!(sessions::keepalive_session))
        .routes(routes!(sessions::pause_session))
        .routes(routes!(sessions::resume_session))
        .routes(routes!(sessions::interrupt_session))
        .routes(routes!(sessions::restart_session))
        .routes(routes!(executions::create_execution))
        .routes(routes!(executions::get_execution))
        .routes(routes!(executions::list_execution_events))
        .routes(routes!(executions::cancel_execution))
        .routes(routes!(executions::answer_input))
        .routes(routes!(executions::get_blob))
        .routes(routes!(runs::create_run))
        .routes(routes!(contexts::list_contexts, contexts::create_context))
        .routes(routes!(contexts::delete_context))
        .routes(routes!(contexts::interrupt_context))
        .routes(routes!(contexts::restart_context))
        .routes(routes!(contexts::complete_code))
        .routes(routes!(contexts::inspect_code))
        .routes(routes!(contexts::check_code))
        .routes(routes!(contexts::send_comm))
        .routes(routes!(commands::create_command, commands::list_commands))
        .routes(routes!(commands::get_command, commands::end_command))
        .routes(routes!(commands::list_command_events))
        .routes(routes!(commands::write_command))
        .routes(routes!(commands::signal_command))
        .routes(routes!(commands::resize_command))
        .routes(routes!(terminal::open_terminal))
        .routes(routes!(packages::install_packages, packages::list_packages))
        .routes(routes!(notebooks::get_notebook, notebooks::delete_notebook))
        .merge(ports::routes())
        .routes(routes!(files::list_files, transfers::upload_files))
        .routes(routes!(files::read_file, files::head_file, files::write_file, files::delete_file))
        .routes(routes!(files::make_folder))
        .routes(routes!(files::move_file))
        .routes(routes!(transfers::watch_files))
        .routes(routes!(transfers::pack_files, transfers::unpack_files))
        .routes(routes!(workspaces::list_workspaces))
        .routes(routes!(workspaces::get_workspace, workspaces::delete_workspace))
        .routes(routes!(templates::list_templates))
        .routes(routes!(pools::list_pools))
        .routes(routes!(keys::create_key, keys::list_keys))
        .routes(routes!(keys::revoke_key))
        .routes(routes!(usage::get_usage))
        .routes(routes!(audit::list_audit))
        .routes(routes!(admin::get_log_level, admin::set_log_level))
        .routes(routes!(admin::drain_server))
        .routes(routes!(admin::reconcile_server))
        .routes(routes!(admin::reload_server))
}
