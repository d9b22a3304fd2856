//! What a client says to its kernel: code becomes an execution like any other, interrupts and the end are the session's, and the rest goes to the kernel.
//!
//! Each message is asked with the key as it is now, counts against the tenant's rate, and is an event of the audit where it changes something.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::extract::ws::close_code;
use serde::Deserialize;
use serde_json::{Value, json};

use super::asking::Refusal;
use super::codec::Incoming;
use super::talk::{Say, Shared, Talk};
use crate::domain::execution::AskedBy;
use crate::domain::ids::RequestId;
use crate::http::problem::Problem;
use crate::service::keys::Principal;
use crate::service::trail::{Answered, Origin, Trail};
use crate::service::{Error, ExecuteRequest, trail};
use crate::session::execution::Stdin;
use crate::session::tap::{Channel, Message};
use crate::session::{Aside, ClientHeader, fresh};
use crate::traces::Requested;

/// The route of a connection, as it is told.
const ROUTE: &str = "/api/kernels/{kernel}/channels";
/// A client that asks too often is not heard for so long at a time.
const PAUSE: Duration = Duration::from_secs(5);
/// What goes on to the kernel: questions, none of which runs what is sent along …
const QUESTIONS: [&str; 8] = [
    "kernel_info_request",
    "comm_info_request",
    "complete_request",
    "inspect_request",
    "is_complete_request",
    "history_request",
    "connect_request",
    "usage_request",
];
/// … and what is said to handlers that an execution has set up, which wait for their turn behind it.
const COMMS: [&str; 3] = ["comm_open", "comm_msg", "comm_close"];

/// A close code, and why.
type Closing = (u16, &'static str);

/// Whether a message may go on to the kernel as it is. What is not known might run code that is no execution: without a limit, a record and an event of the audit,
/// as a debugger's does, and ipyparallel's.
fn may_pass(channel: Channel, header: &ClientHeader) -> Result<(), Refusal> {
    let kind = header.msg_type.as_str();
    if header.subshell_id.is_some() {
        return Err(Refusal::malformed("a kernel has no subshells here: what is said to it waits for its turn"));
    }
    if QUESTIONS.contains(&kind) || (channel == Channel::Shell && COMMS.contains(&kind)) {
        return Ok(());
    }
    Err(Refusal::malformed(format!(
        "{kind} does not go on to the kernel by this channel: code runs in executions only; what goes on is {}, and on the shell channel {}",
        QUESTIONS.join(", "),
        COMMS.join(", ")
    )))
}

impl Talk {
    /// Takes a message. An error ends the connection.
    pub(super) async fn on_message(&self, incoming: Incoming, shared: &Shared) -> Result<(), Closing> {
        let Incoming { channel: Some(channel), header, metadata, content, buffers } = incoming else {
            tracing::debug!(session = %self.session.id, "a client names a channel that there is not");
            return Ok(());
        };
        let Ok(header) = ClientHeader::read(&header) else {
            tracing::debug!(session = %self.session.id, "a client's message has no header that could be answered to");
            return Ok(());
        };
        let who = self.principal().await?;
        if self.asking.app.service.started(&self.session).await.is_err() {
            // Its end is told by the other half.
            return Ok(());
        }
        let outcome = match (channel, header.msg_type.as_str()) {
            (Channel::Stdin, "input_reply") => self.give_input(&who, &content, shared).await,
            (Channel::Stdin, _) => return Ok(()),
            (_, "execute_request") => self.execute(&who, channel, &header, &content).await,
            (_, "interrupt_request") => self.interrupt(&who, &header, shared).await,
            (_, "shutdown_request") => self.shut_down(&who, &header, &content, shared).await,
            _ => match may_pass(channel, &header) {
                Ok(()) => {
                    let (asker, header) = (self.asker.clone(), header.clone());
                    let aside = Aside { asker, channel, header, metadata, content, buffers };
                    self.asking.app.service.pass(&who, self.session.id, aside).await.map_err(Refusal::from)
                }
                Err(refused) => Err(refused),
            },
        };
        if let Err(refusal) = outcome {
            self.refuse(channel, &header, &refusal, shared).await;
        }
        Ok(())
    }

    /// Who asks, by the key as it is now; once the tenant may ask again.
    async fn principal(&self) -> Result<Principal, Closing> {
        let app = &self.asking.app;
        loop {
            let who =
                app.door.principal(&self.asking.key).ok_or((close_code::POLICY, "the key is not valid any more"))?;
            match app.service.request(&who) {
                Err(Error::RateLimited { retry_after, .. }) => tokio::time::sleep(retry_after.min(PAUSE)).await,
                // What else there is to say is said by what is asked.
                _ => return Ok(who),
            }
        }
    }

    async fn execute(
        &self,
        who: &Principal,
        channel: Channel,
        header: &ClientHeader,
        content: &[u8],
    ) -> Result<(), Refusal> {
        #[derive(Deserialize)]
        struct Content {
            code: String,
            #[serde(default)]
            silent: bool,
            #[serde(default)]
            store_history: Option<bool>,
            #[serde(default)]
            user_expressions: Option<BTreeMap<String, String>>,
            #[serde(default)]
            allow_stdin: bool,
            #[serde(default)]
            stop_on_error: Option<bool>,
        }
        if channel != Channel::Shell || header.subshell_id.is_some() {
            return Err(Refusal::malformed(
                "code runs on the shell channel, and not in a subshell: one after the other",
            ));
        }
        let content: Content = serde_json::from_slice(content).map_err(|error| {
            Refusal::malformed(format!("the content of an execute_request is not understood: {error}"))
        })?;
        let request = ExecuteRequest {
            code: content.code,
            silent: content.silent,
            store_history: content.store_history,
            stdin: if content.allow_stdin { Stdin::Interactive } else { Stdin::Deny },
            user_expressions: content.user_expressions.unwrap_or_default(),
            stop_on_error: content.stop_on_error.unwrap_or(true),
            asked_by: Some(AskedBy { asker: self.asker.clone(), header: header.text.clone() }),
            ..ExecuteRequest::default()
        };
        let service = &self.asking.app.service;
        let work = service.execute(who, self.session.id, request, None);
        self.noted(who, "create_execution", work).await.map(drop)
    }

    async fn give_input(&self, who: &Principal, content: &[u8], shared: &Shared) -> Result<(), Refusal> {
        #[derive(Deserialize)]
        struct Content {
            #[serde(default)]
            value: String,
        }
        // What is none leaves the question open.
        let content: Content = serde_json::from_slice(content)
            .map_err(|error| Refusal::malformed(format!("the content of an input_reply is not understood: {error}")))?;
        // What nobody has asked for is not an answer.
        let Some(execution) = shared.take_asking() else { return Ok(()) };
        let work = self.asking.app.service.answer_input(who, execution, content.value);
        self.noted(who, "answer_input", work).await.map(drop)
    }

    async fn interrupt(&self, who: &Principal, header: &ClientHeader, shared: &Shared) -> Result<(), Refusal> {
        let work = self.asking.app.service.interrupt(who, self.session.id, Some(self.session.default_context));
        self.noted(who, "interrupt_session", work).await?;
        self.reply(header, &json!({"status": "ok"}), shared).await;
        Ok(())
    }

    async fn shut_down(
        &self,
        who: &Principal,
        header: &ClientHeader,
        content: &[u8],
        shared: &Shared,
    ) -> Result<(), Refusal> {
        #[derive(Deserialize, Default)]
        struct Content {
            #[serde(default)]
            restart: bool,
        }
        let restart = serde_json::from_slice::<Content>(content).unwrap_or_default().restart;
        let (service, id, context) = (&self.asking.app.service, self.session.id, self.session.default_context);
        let said = json!({"status": "ok", "restart": restart});
        if restart {
            self.noted(who, "restart_session", service.restart(who, id, Some(context))).await?;
            self.reply(header, &said, shared).await;
        } else {
            who.require_sessions()?;
            self.reply(header, &said, shared).await;
            self.noted(who, "delete_session", service.delete_session(who, id)).await?;
        }
        Ok(())
    }

    /// Does something that changes something, and has it in the audit.
    async fn noted<T>(
        &self,
        who: &Principal,
        action: &'static str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Refusal> {
        let (service, began) = (&self.asking.app.service, Instant::now());
        let trace = service.traces().map(|traces| traces.begin(None, None));
        let request = fresh::<RequestId>().to_string();
        let origin = Origin { address: self.address, request, path: self.path.clone(), action: Some(action.into()) };
        let trail = Trail::new(origin, service.audit(), trace);
        let outcome = trail
            .follow(async {
                trail::note_caller(who);
                work.await.map_err(Problem::from)
            })
            .await;
        let (status, problem) = outcome.as_ref().map_or_else(|p| (p.status, Some(p.code)), |_| (200, None));
        if let Some(trace) = trail.trace() {
            let told = trail.told();
            trace.request_ended(&Requested {
                method: "GET",
                route: Some(ROUTE),
                status: Some(status),
                problem,
                took: began.elapsed(),
                session: told.session,
                execution: told.execution,
            });
        }
        trail.end(Answered { status, problem, is_key_refused: false, made: None });
        outcome.map_err(Refusal::from)
    }

    async fn reply(&self, header: &ClientHeader, content: &Value, shared: &Shared) {
        let Some(kind) = header.msg_type.strip_suffix("_request") else { return };
        let said = Message::made(Channel::Control, &format!("{kind}_reply"), Some(&header.text), content);
        shared.say(Say::Message(said)).await;
    }

    /// Answers what was not done in the words that clients wait for.
    async fn refuse(&self, channel: Channel, header: &ClientHeader, refusal: &Refusal, shared: &Shared) {
        let (name, value) = refusal.words();
        let mut content = json!({"ename": name, "evalue": value, "traceback": [format!("{name}: {value}")]});
        let Some(kind) = header.msg_type.strip_suffix("_request") else {
            // Of what is not answered, a client learns otherwise.
            let text = json!({"name": "stderr", "text": format!("[cellblock] {}: {value}\n", header.msg_type)});
            let said = Message::made(Channel::Iopub, "stream", Some(&header.text), &text);
            shared.say(Say::Message(said)).await;
            let idle = Message::made(Channel::Iopub, "status", Some(&header.text), &json!({"execution_state": "idle"}));
            return shared.say(Say::Message(idle)).await;
        };
        let made = |channel, msg_type: &str, content: &Value| {
            Say::Message(Message::made(channel, msg_type, Some(&header.text), content))
        };
        shared.say(made(Channel::Iopub, "status", &json!({"execution_state": "busy"}))).await;
        if kind == "execute" {
            shared.say(made(Channel::Iopub, "error", &content)).await;
        }
        content["status"] = "error".into();
        shared.say(made(channel, &format!("{kind}_reply"), &content)).await;
        shared.say(made(Channel::Iopub, "status", &json!({"execution_state": "idle"}))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_run_code_outside_of_executions_does_not_go_on() {
        let passes = |channel, header: &str| may_pass(channel, &ClientHeader::read(header.as_bytes()).unwrap()).is_ok();
        let of = |kind: &str| format!(r#"{{"msg_id": "a", "msg_type": "{kind}"}}"#);
        for kind in QUESTIONS {
            assert!(passes(Channel::Shell, &of(kind)) && passes(Channel::Control, &of(kind)), "{kind}");
        }
        for kind in COMMS {
            assert!(passes(Channel::Shell, &of(kind)) && !passes(Channel::Control, &of(kind)), "{kind}");
        }
        for kind in ["debug_request", "create_subshell_request", "apply_request", "abort_request", "input_reply", "x"] {
            assert!(!passes(Channel::Shell, &of(kind)) && !passes(Channel::Control, &of(kind)), "{kind}");
        }
        assert!(!passes(Channel::Shell, r#"{"msg_id": "a", "msg_type": "comm_msg", "subshell_id": "s"}"#));
    }
}
