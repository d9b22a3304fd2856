//! How a session's cell comes to be, and the kernels in it, and what it means when one of them does not. What is made for whom is decided in `boot`.

use std::sync::Arc;
use std::time::Instant;

use cellblock_wire::link::{Init, Transport};
use futures_util::FutureExt;

use super::super::boot::{self, Booted};
use super::super::{Refused, StartFailure, StartFault};
use super::{Actor, Context, Done};
use crate::domain::ids::{ContextId, SessionId};
use crate::domain::lifecycle::{EndReason, Event, Phase};
use crate::domain::output::{JsonText, RestartCause};
use crate::domain::spec::{KernelTransport, SessionSpec};
use crate::engine::{ByteStream, CellName, CellSpec};
use crate::store::NotebookKernel;

impl Actor {
    pub(super) fn ensure_cell(&mut self) {
        self.cell.name = CellName::new(&self.instance, self.cell.session, self.cells);
        self.starting_since = Instant::now();
        self.save();
        let (engine, cell, state) = (Arc::clone(&self.engine), self.cell.clone(), self.leaving.state.clone());
        let workspace = self.tenure.as_ref().map(|tenure| tenure.making(Arc::clone(&engine), &cell.image));
        self.start(async move {
            // A cell that no record tells of is removed by the next process, and its guest would not know that one.
            if let Some(state) = state
                && let Err(error) = state.settle().await
            {
                tracing::error!(cell = %cell.name, %error, "a session can't be kept");
                let detail = "the server can't write what it has to know of the session afterwards".to_owned();
                return Done::Ensured(Err(StartFailure { fault: StartFault::Unkept, detail }));
            }
            let ensured = async {
                if let Some(workspace) = workspace {
                    workspace.await?;
                }
                engine.ensure(&cell).await
            };
            Done::Ensured(ensured.await.map_err(|e| boot::engine_failure(&cell, &e)))
        });
    }

    /// What its guest is told.
    pub(super) fn init(&self) -> Init {
        let needs_proxy = self.spec.network.needs_proxy(&self.attributes.network);
        let env = boot::with_packages(self.env.clone(), &self.spec.network.packages, self.settings.package_bytes);
        boot::init(self.settings, env, needs_proxy)
    }

    pub(super) fn boot_guest(&mut self, stream: ByteStream) {
        let booting = boot::boot(
            Arc::clone(&self.engine),
            self.cell.clone(),
            stream,
            self.secret,
            self.init(),
            std::mem::take(&mut self.files),
        );
        self.start(booting.map(Done::Booted));
    }

    pub(super) fn fail_start(&mut self, failure: StartFailure) {
        let is_first = self.cells == 1 && self.start_failure.is_none();
        if is_first && matches!(self.phase, Phase::Provisioning | Phase::Connecting) {
            self.start_failure = Some(Arc::new(failure));
        }
    }

    pub(super) fn start_kernels(&mut self, booted: Booted) {
        self.connect(booted, 0);
        let now = Instant::now();
        // Less than the session's own time, so that a kernel's last words, or a setup's, are heard.
        let left = (self.starting_since + self.settings.start_timeout).saturating_duration_since(now).mul_f64(0.9);
        for context in self.contexts.values_mut() {
            context.move_to_new_cell(now, left);
            if self.cells > 1 {
                context.tell_replaced(RestartCause::GuestLost);
            }
        }
    }

    pub(super) fn on_ready(&mut self, context: ContextId) {
        if self.phase == Phase::Connecting {
            // Starting is not idling.
            self.last_active = Instant::now();
        }
        if let Some(reply) = self.creating.remove(&context) {
            let view = self.view(context);
            // A caller that went away needs no answer.
            let _ = reply.send(view.ok_or(Refused::NoSuchContext));
        }
        if context == self.default_context {
            self.leaving.is_ready();
            self.step(Event::KernelReady);
        }
        let is_up = |id: &ContextId| self.contexts.get(id).is_none_or(Context::is_up);
        let all_up = self.contexts.values().all(Context::is_up);
        for restart in self.restarts.extract_if(.., |r| r.context.as_ref().map_or(all_up, is_up)) {
            let _ = restart.reply.send(Ok(()));
        }
    }

    pub(super) fn open_notebook(&self) {
        let Some(context) = self.contexts.get(&self.default_context) else { return };
        self.keeping.open_notebook(NotebookKernel {
            kernelspec: context.kernelspec.clone(),
            display_name: context.display_name.clone(),
            language: context.language().to_owned(),
            language_info: context.language_info.clone().unwrap_or_else(JsonText::object),
        });
    }

    /// A context's kernel will not come up: a further context goes, and the session with its default one.
    pub(super) fn on_boot_failed(&mut self, context: ContextId, failure: StartFailure) {
        if context != self.default_context {
            self.contexts.remove(&context);
            for restart in self.restarts.extract_if(.., |r| r.context.is_none_or(|id| id == context)) {
                let _ = restart.reply.send(Err(Refused::KernelLost));
            }
            if let Some(reply) = self.creating.remove(&context) {
                let _ = reply.send(Err(Refused::KernelFailed(failure)));
            }
            return;
        }
        self.refuse_waiting(&Refused::KernelLost);
        if self.phase == Phase::Connecting {
            self.fail_start(failure);
            self.lose_replacement();
            self.step(Event::BootFailed);
        } else {
            self.step(Event::CellLost(EndReason::KernelDied));
        }
    }
}

/// What the engine is to know of a session's cell.
pub(super) fn cell(name: CellName, session: SessionId, spec: &SessionSpec) -> CellSpec {
    let (image, runtime, data) = (spec.image.clone(), spec.runtime.clone(), spec.data.clone());
    CellSpec { name, session, image, runtime, resources: spec.resources, data, workspace: None }
}

/// How the guest reaches a session's kernels.
pub(super) fn transport(spec: &SessionSpec) -> Transport {
    match spec.transport {
        KernelTransport::Ipc => Transport::Ipc,
        KernelTransport::Tcp => Transport::Tcp,
    }
}
