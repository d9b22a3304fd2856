//! One call of a tool: who asks, whether it was taken back, its arguments, and how its client hears that it goes on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rmcp::model::{JsonObject, ProgressNotificationParam, ProgressToken, ProtocolVersion};
use rmcp::service::{Peer, RequestContext, RoleServer};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::Asked;
use crate::http::extract::from_value;
use crate::http::problem::{self, Problem};
use crate::service::Service;

/// Progress is told no more often than this …
const STEP: Duration = Duration::from_millis(260);
/// … and this often where nothing is new, so that clients that wait for a sign of life go on waiting.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);
/// A client that takes no message for this long goes without it.
const TAKING: Duration = Duration::from_secs(1);
/// Longest line that is told, in characters.
const MAX_LINE: usize = 200;

/// A call of a tool.
pub(super) struct Call {
    /// Every command of the product.
    pub service: Arc<Service>,
    /// Who asks, and what for.
    pub asked: Asked,
    /// The client speaks the protocol without sessions, so that what it hangs up on is taken back.
    pub is_modern: bool,
    /// The client takes tasks for answers.
    pub knows_tasks: bool,
    hung_up: CancellationToken,
    peer: Peer<RoleServer>,
    token: Option<ProgressToken>,
}

impl Call {
    /// A call that has come with this request.
    pub fn new(service: Arc<Service>, asked: Asked, context: RequestContext<RoleServer>) -> Self {
        let is_modern =
            context.protocol_version().is_some_and(|v| v.as_str() >= ProtocolVersion::V_2026_07_28.as_str());
        let token = context.meta.get_progress_token();
        let knows_tasks = context.client_capabilities().is_some_and(|capabilities| capabilities.supports_tasks());
        Self { service, asked, is_modern, knows_tasks, hung_up: context.ct, peer: context.peer, token }
    }

    /// Waits until the caller takes it back: by a message, or, where that is what hanging up means, by hanging up.
    pub async fn taken_back(&self) {
        let told = async {
            match &self.asked.call {
                Some(call) => call.cancelled.cancelled().await,
                None => std::future::pending().await,
            }
        };
        let left = async { if self.is_modern { self.hung_up.cancelled().await } else { std::future::pending().await } };
        tokio::select! {
            () = told => {}
            () = left => {}
        }
    }

    /// Whether nobody hears an answer.
    pub fn is_left(&self) -> bool {
        self.hung_up.is_cancelled()
    }

    /// How its client hears that it goes on.
    pub fn progress(&self) -> Progress<'_> {
        let now = Instant::now();
        Progress { call: self, began: now, told: None, line: None }
    }
}

/// Does a work of which nothing is heard until its end; a client that asks for it is told that it goes on.
pub(super) async fn alive<T>(call: &Call, work: impl Future<Output = T>) -> T {
    let mut progress = call.progress();
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = progress.due() => progress.tell().await,
        }
    }
}

/// Reads a tool's arguments. What is wrong is told with every field.
pub(super) fn arguments<T: DeserializeOwned>(arguments: JsonObject) -> Result<T, Problem> {
    from_value(Value::Object(arguments)).map_err(|mistakes| {
        Problem::new(problem::INVALID_REQUEST, "arguments of the tool are not understood").with_fields(mistakes)
    })
}

/// A problem as a model reads it: what is wrong, in which field, and whether to try again.
pub(super) fn describe(problem: &Problem) -> String {
    let mut text = format!("{} ({}): {}", problem.title, problem.code, problem.detail);
    for field in &problem.errors {
        text.push_str(&format!("\n- {}: {}", field.pointer, field.message));
    }
    if let Some(seconds) = problem.retry_after_seconds {
        text.push_str(&format!("\nTry again in {seconds} s."));
    }
    text
}

/// The last line of a text that says something, without what only a terminal understands.
pub(super) fn last_line(text: &str) -> Option<String> {
    let plain = anstream::adapter::strip_str(text).to_string();
    let line = plain.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    Some(line.chars().filter(|c| !c.is_control()).take(MAX_LINE).collect())
}

/// Tells a client that asks for it that its call goes on: the last line of output, so many seconds after its begin.
pub(super) struct Progress<'a> {
    call: &'a Call,
    began: Instant,
    told: Option<Instant>,
    /// The newest line that was not told.
    line: Option<String>,
}

impl Progress<'_> {
    /// Output has come.
    pub fn saw(&mut self, text: &str) {
        if self.call.token.is_none() {
            return;
        }
        if let Some(line) = last_line(text) {
            self.line = Some(line);
        }
    }

    /// Waits until there is something to tell; for ever where nobody asks.
    pub async fn due(&self) {
        if self.call.token.is_none() {
            return std::future::pending().await;
        }
        let pause = if self.line.is_some() { STEP } else { SIGN_OF_LIFE };
        let last = self.told.unwrap_or(self.began);
        tokio::time::sleep_until((last + pause).into()).await;
    }

    /// Tells it.
    pub async fn tell(&mut self) {
        let Some(token) = self.call.token.clone() else { return };
        let now = Instant::now();
        // Two are never told at one moment, so this rises.
        let seconds = (now - self.began).as_secs_f64();
        self.told = Some(now);
        let message = self.line.take().unwrap_or_else(|| format!("running for {seconds:.0} s"));
        let progress = ProgressNotificationParam::new(token, seconds).with_message(message);
        // A client that is gone, or reads nothing, goes without; what runs does not wait for it.
        let _ = tokio::time::timeout(TAKING, self.call.peer.notify_progress(progress)).await;
    }
}
