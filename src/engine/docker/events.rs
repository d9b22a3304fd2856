//! The engine's events of one instance's cells, as a stream that survives the engine.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use bollard::Docker;
use bollard::models::EventMessage;
use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::stream::{self, BoxStream, StreamExt};

use super::super::{CellName, EngineEvent, EngineEventKind};
use super::cells;

const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A connection that is silent for so long is opened anew: a half of it may be gone without a word.
const SILENCE: Duration = Duration::from_secs(60);

type Messages = BoxStream<'static, Result<EventMessage, bollard::errors::Error>>;

struct Watch {
    docker: Docker,
    instance: String,
    messages: Option<Messages>,
    /// The engine's own time of the last event, so that none is missed between two connections.
    since: Option<String>,
    pause: Option<Duration>,
}

/// Watches for ever, from a moment on.
pub(super) fn watch(docker: Docker, instance: String, began: SystemTime) -> BoxStream<'static, EngineEvent> {
    // Our own time until the engine has told its own: a connection that breaks before the first event loses none either.
    let began = began.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    let began = i64::try_from(began).map(since).ok();
    let watch = Watch { docker, instance, messages: None, since: began, pause: None };
    stream::unfold(watch, |mut watch| async move {
        let event = watch.next().await;
        Some((event, watch))
    })
    .boxed()
}

impl Watch {
    async fn next(&mut self) -> EngineEvent {
        loop {
            let messages = match &mut self.messages {
                Some(messages) => messages,
                None => {
                    if let Some(pause) = self.pause {
                        tokio::time::sleep(pause).await;
                    }
                    self.messages.insert(open(&self.docker, &self.instance, self.since.as_deref()))
                }
            };
            match tokio::time::timeout(SILENCE, messages.next()).await {
                Ok(Some(Ok(message))) => {
                    self.pause = None;
                    // An event at exactly this time comes again: they are hints, and once too often does no harm.
                    self.since = message.time_nano.map(since).or(self.since.take());
                    if let Some(event) = translated(message) {
                        return event;
                    }
                }
                Ok(Some(Err(error))) => self.reopen_later(&error.to_string()),
                Ok(None) => self.reopen_later("it ended"),
                Err(_) => self.messages = None,
            }
        }
    }

    fn reopen_later(&mut self, why: &str) {
        let pause = self.pause.map_or(SHORTEST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
        tracing::debug!(why, ?pause, "the engine's event stream broke off");
        self.pause = Some(pause);
        self.messages = None;
    }
}

fn open(docker: &Docker, instance: &str, since: Option<&str>) -> Messages {
    let actions = ["create", "die", "oom", "destroy", "pause", "unpause"].map(str::to_owned).to_vec();
    let filters = HashMap::from([
        ("type", vec!["container".to_owned()]),
        ("label", cells::labels_of(instance)),
        ("event", actions),
    ]);
    let mut options = EventsOptionsBuilder::default().filters(&filters);
    if let Some(since) = since {
        options = options.since(since);
    }
    docker.events(Some(options.build())).boxed()
}

/// Seconds and nanoseconds, as the engine reads them.
fn since(nanoseconds: i64) -> String {
    format!("{}.{:09}", nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000)
}

fn translated(message: EventMessage) -> Option<EngineEvent> {
    let kind = match message.action?.as_str() {
        "create" => EngineEventKind::Created,
        "die" => EngineEventKind::Exited,
        "oom" => EngineEventKind::OutOfMemory,
        "destroy" => EngineEventKind::Removed,
        "pause" => EngineEventKind::Paused,
        "unpause" => EngineEventKind::Resumed,
        _ => return None,
    };
    let name = message.actor?.attributes?.remove("name")?;
    Some(EngineEvent { name: CellName::listed(name), kind })
}
