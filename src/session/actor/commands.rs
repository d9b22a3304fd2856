//! What callers ask of a session's task, and its answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::super::context::Action;
use super::super::execution::{Execution, ExecutionRequest};
use super::super::visits::{Visit, Weight};
use super::super::{Aside, Attributes, Claim, Command, ContextView, Patch, Refused};
use super::{Actor, Context, Line, Restart, Verdict, instant};
use crate::domain::ids::{ContextId, ExecutionId};
use crate::domain::lifecycle::{EndReason, Event, Phase};
use crate::domain::spec::MAX_ENTRIES;

/// Messages of clients that are no activity.
const LOOKS: [&str; 4] = ["kernel_info_request", "comm_info_request", "usage_request", "debug_request"];

impl Actor {
    pub(super) fn on_command(&mut self, command: Command) {
        if self.is_frozen() && command.needs_cell() {
            return self.freezing.hold(command);
        }
        match command {
            Command::Execute { id, context, request, reply } => {
                let answer = self.execute(id, context, *request);
                self.answer(reply, answer);
            }
            Command::Cancel { execution } => {
                let now = Instant::now();
                self.contexts.values_mut().for_each(|c| c.cancel(execution, now));
            }
            Command::Input { execution, line, reply } => self.give_input(execution, &line, reply),
            Command::Interrupt { context, reply } => {
                let answer = self.each(context, Context::interrupt);
                self.answer(reply, answer);
            }
            Command::Restart { context, reply } => match self.each(context, Context::restart) {
                Ok(()) => self.restarts.push(Restart { context, reply }),
                Err(refused) => self.answer(reply, Err(refused)),
            },
            Command::Contexts { reply } => {
                let views = || self.contexts.keys().filter_map(|id| self.view(*id)).collect();
                let answer = self.not_over().map(|()| views());
                self.answer(reply, answer);
            }
            Command::CreateContext { id, kernelspec, cwd, reply } => self.create_context(id, kernelspec, cwd, reply),
            Command::DeleteContext { context, reply } => {
                let answer = self.delete_context(context);
                self.answer(reply, answer);
            }
            Command::Ask { context, msg_type, content, answer, reply } => {
                let context = context.unwrap_or(self.default_context);
                let asked = self.live().and_then(|_| {
                    let context = self.contexts.get_mut(&context).ok_or(Refused::NoSuchContext)?;
                    context.ask(msg_type, &content, answer).map_err(|_| Refused::QueueFull)
                });
                self.answer(reply, asked);
            }
            Command::Pass { aside, reply } => {
                let answer = self.pass(*aside);
                self.answer(reply, answer);
            }
            Command::Patch { patch, reply } => {
                let answer = self.patch(patch);
                self.answer(reply, answer);
            }
            Command::KeepAlive { reply } => {
                let answer = self.not_over().map(|()| self.last_active = Instant::now());
                self.answer(reply, answer);
            }
            Command::Claim { claim, reply } => {
                let answer = self.claim(*claim);
                self.answer(reply, answer);
            }
            Command::Link { reply } => {
                let link = self.wiring.link().cloned().ok_or(Refused::NotReady);
                drop(reply.send(self.live().and(link)));
            }
            Command::Enter { weight, reply } => {
                let answer = self.enter(weight);
                // A caller that went away has left its visit with the answer.
                drop(reply.send(answer));
            }
            Command::Pause { reply } => self.ask_to_pause(reply),
            Command::Resume { reply } => {
                let answer = self.live().map(|now| self.last_active = now);
                self.answer(reply, answer);
            }
            Command::LookAtCell => match self.phase {
                Phase::Ready | Phase::Connecting | Phase::Pausing | Phase::Resuming => self.diagnose(Verdict::Well),
                Phase::Paused => self.diagnose(Verdict::Thawed),
                _ => {}
            },
        }
    }

    /// Answers a command that changed something. Whoever looks after the answer sees the change, and whoever waits for the database then waits
    /// for it.
    pub(super) fn answer<T>(&mut self, reply: oneshot::Sender<Result<T, Refused>>, answer: Result<T, Refused>) {
        self.save();
        self.publish();
        // A caller that went away needs no answer.
        let _ = reply.send(answer);
    }

    fn execute(
        &mut self,
        id: ExecutionId,
        context: Option<ContextId>,
        request: ExecutionRequest,
    ) -> Result<Arc<Execution>, Refused> {
        let now = self.live()?;
        let context = context.unwrap_or(self.default_context);
        let context = self.contexts.get_mut(&context).ok_or(Refused::NoSuchContext)?;
        let execution = context.enqueue(id, request, now).map_err(|_| Refused::QueueFull)?;
        self.leaving.follow(&execution);
        self.last_active = now;
        Ok(execution)
    }

    fn pass(&mut self, aside: Aside) -> Result<(), Refused> {
        let now = self.live()?;
        // Clients look at a kernel again and again, which is no work.
        let is_work = !LOOKS.contains(&aside.header.msg_type.as_str());
        let context = self.contexts.get_mut(&self.default_context).ok_or(Refused::NoSuchContext)?;
        context.pass(aside, now).map_err(|_| Refused::QueueFull)?;
        if is_work {
            self.last_active = now;
        }
        Ok(())
    }

    fn enter(&mut self, weight: Weight) -> Result<Visit, Refused> {
        self.last_active = self.live()?;
        let link = self.wiring.link().cloned().ok_or(Refused::NotReady)?;
        self.visits.try_enter(weight, link).ok_or(Refused::TooManyVisits)
    }

    /// Becomes somebody's.
    fn claim(&mut self, claim: Claim) -> Result<(), Refused> {
        let now = self.live()?;
        // One whose link has just broken would keep its caller waiting.
        if !self.is_unclaimed || self.wiring.link().is_none() {
            return Err(Refused::NotReady);
        }
        let Claim { tenant, spec, env, lasting, keeping, settings, created_at } = claim;
        let changed: BTreeMap<_, _> =
            env.iter().filter(|(name, value)| self.env.get(*name) != Some(value)).map(own).collect();
        self.is_unclaimed = false;
        (self.spec, self.keeping, self.settings) = (spec, keeping, settings);
        let (id, kernelspec) = (self.default_context, self.spec.kernelspec.clone());
        let making = self.making(id, kernelspec, None);
        let within = self.settings.start_timeout.mul_f64(0.9);
        // Before the code that has prepared the kernel stands in it.
        self.open_notebook();
        if !self.contexts.get_mut(&id).is_some_and(|context| context.claim(making, &changed, within, now)) {
            // It is neither nobody's nor this caller's.
            self.step(Event::EndRequested(EndReason::Drained));
            return Err(Refused::NotReady);
        }
        self.env = env;
        let network = self.spec.network.initial.clone();
        self.gate.claim(Arc::clone(&tenant), network.clone(), &self.spec.network);
        let (labels, idle) = (self.spec.labels.clone(), self.spec.timeouts.idle);
        self.attributes = Arc::new(Attributes { labels, idle, network });
        if !changed.is_empty() {
            self.wiring.plan(vec![Action::SetUp(self.init())]);
        }
        (self.created_at, self.starting_since, self.last_active) = (created_at, now, now);
        self.expires = now + self.spec.timeouts.lifetime;
        self.leaving.claim(tenant, lasting);
        self.step(Event::Claimed);
        self.take_from_contexts();
        Ok(())
    }

    /// Answered once the guest has the line: one that is lost with this process was not taken.
    fn give_input(&mut self, execution: ExecutionId, line: &str, reply: oneshot::Sender<Result<(), Refused>>) {
        let is_live = if self.is_frozen() { Err(Refused::NothingAsked) } else { self.live() };
        match is_live {
            Ok(now) => self.last_active = now,
            Err(refused) => return self.answer(reply, Err(refused)),
        }
        let given = self.contexts.values_mut().find_map(|c| c.answer_input(execution, line));
        match given {
            Some((kernel, msg_id)) => self.lines.push(Line { kernel, msg_id, reply }),
            None => self.answer(reply, Err(Refused::NothingAsked)),
        }
    }

    /// Does something to a context, or to all.
    fn each(&mut self, only: Option<ContextId>, act: impl Fn(&mut Context, Instant)) -> Result<(), Refused> {
        let now = self.live()?;
        match only {
            Some(id) => act(self.contexts.get_mut(&id).ok_or(Refused::NoSuchContext)?, now),
            None => self.contexts.values_mut().for_each(|c| act(c, now)),
        }
        self.last_active = now;
        Ok(())
    }

    fn create_context(
        &mut self,
        id: ContextId,
        kernelspec: Option<String>,
        cwd: Option<String>,
        reply: oneshot::Sender<Result<ContextView, Refused>>,
    ) {
        let now = match self.live() {
            Ok(now) if self.contexts.len() < self.settings.contexts => now,
            Ok(_) => return self.answer(reply, Err(Refused::TooManyContexts(self.settings.contexts))),
            Err(refused) => return self.answer(reply, Err(refused)),
        };
        self.last_active = now;
        let kernelspec = kernelspec.or_else(|| self.spec.kernelspec.clone());
        let mut context = Context::new(self.making(id, kernelspec, cwd));
        context.boot(now, self.settings.start_timeout);
        self.contexts.insert(id, context);
        self.creating.insert(id, reply);
    }

    fn delete_context(&mut self, id: ContextId) -> Result<ContextView, Refused> {
        self.live()?;
        let view = self.view(id).ok_or(Refused::NoSuchContext)?;
        if view.is_default {
            return Err(Refused::DefaultContext);
        }
        if let Some(mut context) = self.contexts.remove(&id) {
            for line in self.lines.extract_if(.., |line| context.owns(&line.kernel)) {
                // A caller that went away needs no answer.
                let _ = line.reply.send(Err(Refused::NothingAsked));
            }
            context.close();
            let (actions, _) = context.take();
            self.wiring.plan(actions);
        }
        if let Some(creating) = self.creating.remove(&id) {
            // A caller that went away needs no answer.
            let _ = creating.send(Err(Refused::NoSuchContext));
        }
        for restart in self.restarts.extract_if(.., |r| r.context == Some(id)) {
            let _ = restart.reply.send(Err(Refused::NoSuchContext));
        }
        Ok(view)
    }

    fn patch(&mut self, patch: Patch) -> Result<(), Refused> {
        self.not_over()?;
        let mut labels = patch.labels.unwrap_or_else(|| self.attributes.labels.clone());
        labels.extend(patch.more_labels);
        if labels.len() > MAX_ENTRIES {
            return Err(Refused::TooManyLabels(MAX_ENTRIES));
        }
        let now = Instant::now();
        self.last_active = now;
        if let Some(expires_in) = patch.expires_in {
            let most = self.created_at.saturating_add(self.spec.max_lifetime).unwrap_or(Timestamp::MAX);
            self.expires = (now + expires_in).min(instant(most));
        }
        let attributes = Arc::make_mut(&mut self.attributes);
        attributes.idle = patch.idle.unwrap_or(attributes.idle);
        attributes.labels = labels;
        if let Some(network) = patch.network {
            let was_open = attributes.network.is_open();
            attributes.network = network.clone();
            self.gate.change(network);
            if was_open != self.attributes.network.is_open() {
                // Kernels that run keep their environment; the proxy is there for them all the same.
                self.wiring.plan(vec![Action::SetUp(self.init())]);
            }
        }
        Ok(())
    }
}

fn own((name, value): (&String, &String)) -> (String, String) {
    (name.clone(), value.clone())
}
