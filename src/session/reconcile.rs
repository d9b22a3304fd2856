//! Compares what the engine has with what should exist, and acts. It takes no input: it looks at the world.
//!
//! Runs at start, on a timer, and whenever the engine tells that something happened to a cell.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use super::registry::Registry;
use crate::domain::lifecycle::Phase;
use crate::engine::{CellState, Engine, EngineError, EngineEvent, EngineEventKind, Observed};

/// The world is looked at this often, whatever events say.
const INTERVAL: Duration = Duration::from_secs(30);

/// Keeps the world and the registry in agreement until it is told to stop.
pub async fn run(engine: Arc<dyn Engine>, registry: Arc<Registry>, stop: CancellationToken) {
    let mut events = engine.watch();
    let mut timer = tokio::time::interval(INTERVAL);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(event) = events.next() => on_event(&registry, &event),
            _ = timer.tick() => {
                registry.prune();
                if let Err(error) = round(engine.as_ref(), &registry).await {
                    tracing::warn!(%error, "the engine's cells could not be compared with the sessions; it will be tried again");
                }
            }
        }
    }
}

fn on_event(registry: &Registry, event: &EngineEvent) {
    let matters = !matches!(event.kind, EngineEventKind::OutOfMemory);
    let owner = registry.all().into_iter().find(|s| event.name.as_str().contains(&s.id.to_string()));
    if let (true, Some(session)) = (matters, owner) {
        session.look_at_cell();
    }
}

/// One round: cells without a live session are removed, sessions whose cell is not there, or is frozen or not against their will, are told to look. Returns how many were removed.
///
/// # Errors
/// When the engine can't list its cells. A cell that can't be removed is left for the next round.
pub async fn round(engine: &dyn Engine, registry: &Registry) -> Result<usize, EngineError> {
    let cells = engine.list().await?;
    let mut removed = 0;
    for cell in cells.iter().filter(|cell| is_orphan(cell, registry)) {
        match engine.remove(&cell.name).await {
            Ok(()) => {
                tracing::info!(cell = %cell.name, "removed a cell without a session");
                removed += 1;
            }
            Err(error) => tracing::warn!(cell = %cell.name, %error, "a cell without a session could not be removed"),
        }
    }
    for session in registry.all() {
        let own: Vec<_> = cells.iter().filter(|cell| cell.session == Some(session.id)).collect();
        let is_frozen = own.iter().any(|cell| cell.state == CellState::Paused);
        let differs = match session.phase() {
            Phase::Ready => own.is_empty() || is_frozen,
            Phase::Paused => own.is_empty() || !is_frozen,
            _ => false,
        };
        if differs {
            session.look_at_cell();
        }
    }
    Ok(removed)
}

/// Removes cells that have ended, for a process that shares its instance's name with others: whoever owned one of these is gone.
///
/// # Errors
/// When the engine can't list its cells. A cell that can't be removed is left for the next time.
pub async fn remove_ended(engine: &dyn Engine) -> Result<(), EngineError> {
    for cell in engine.list().await?.iter().filter(|cell| matches!(cell.state, CellState::Exited { .. })) {
        if let Err(error) = engine.remove(&cell.name).await {
            tracing::warn!(cell = %cell.name, %error, "a cell that has ended could not be removed");
        }
    }
    Ok(())
}

/// A session that is not known was made by an earlier process, or by nobody; and an earlier cell of one that is known may appear when the engine
/// comes to a call whose caller is gone. A session's cells have rising numbers, and the list is older than what is known here.
fn is_orphan(cell: &Observed, registry: &Registry) -> bool {
    cell.session.and_then(|id| registry.cell_of(id)).is_none_or(|own| own != cell.name)
}
