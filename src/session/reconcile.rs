//! Compares what the engine has with what should exist, and acts. It takes no input: it looks at the world.
//!
//! Runs at start, on a timer, when an operator wants it, and whenever the engine tells that something happened to a cell.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio_util::sync::CancellationToken;

use super::Session;
use super::registry::Registry;
use super::workspaces::{self, Tidied};
use crate::domain::ids::{InstallationId, SessionId};
use crate::domain::lifecycle::Phase;
use crate::engine::{CellName, CellState, Engine, EngineError, EngineEventKind, Observed};
use crate::metrics::Reconciled;

/// The world is looked at this often, whatever events say.
const INTERVAL: Duration = Duration::from_secs(30);
/// Cells that are removed at one time. The engine does not get faster with more.
const REMOVALS: usize = 8;

/// Keeps the world and the registry in agreement.
pub struct Reconciler {
    engine: Arc<dyn Engine>,
    registry: Arc<Registry>,
    installation: InstallationId,
    /// One round at a time, and none once this says that it is over.
    over: tokio::sync::Mutex<bool>,
}

/// What a round has found and done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Cells that the engine has.
    pub seen: usize,
    /// Those that no session knows, and that are gone now.
    pub removed: Vec<CellName>,
    /// Sessions whose cell is not there, or has ended: they were told to look.
    pub told: Vec<SessionId>,
    /// What was left beside cells, and is gone now.
    pub swept: Vec<String>,
    /// What could not be removed. It is tried again in the next round.
    pub errors: Vec<EngineError>,
}

impl std::fmt::Debug for Reconciler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reconciler").field("installation", &self.installation).finish_non_exhaustive()
    }
}

impl Reconciler {
    /// One that acts for an installation.
    #[must_use]
    pub fn new(engine: Arc<dyn Engine>, registry: Arc<Registry>, installation: InstallationId) -> Self {
        Self { engine, registry, installation, over: tokio::sync::Mutex::default() }
    }

    /// Whom it acts for.
    #[must_use]
    pub fn installation(&self) -> InstallationId {
        self.installation
    }

    /// Goes on until it is told to stop.
    pub async fn run(&self, stop: CancellationToken) {
        let mut events = self.engine.watch();
        let mut timer = tokio::time::interval(INTERVAL);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut strays = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(event) = events.next() => match event.kind {
                    EngineEventKind::Exited
                    | EngineEventKind::Removed
                    | EngineEventKind::Paused
                    | EngineEventKind::Resumed => self.tell_owner(&event.name),
                    EngineEventKind::Created if self.is_stray(&event.name) => strays.push(self.remove_stray(event.name)),
                    _ => {}
                },
                Some(()) = strays.next() => {}
                _ = timer.tick() => {
                    self.registry.prune();
                    if let Err(error) = self.round().await {
                        tell(&error);
                    }
                }
            }
        }
    }

    fn owner(&self, name: &CellName) -> Option<Session> {
        self.registry.all().into_iter().find(|s| name.as_str().contains(&s.id.to_string()))
    }

    fn tell_owner(&self, name: &CellName) {
        if let Some(session) = self.owner(name) {
            session.look_at_cell();
        }
    }

    /// Whether nobody waits for a cell that was just made: the engine may come to a call long after its caller has given it up, and has seen the cell's
    /// absence.
    fn is_stray(&self, name: &CellName) -> bool {
        let is_wanted = |session: Session| {
            self.registry.cell_of(session.id).as_ref() == Some(name)
                && !matches!(session.phase(), Phase::Aborting(_) | Phase::Ending(_) | Phase::Ended(_))
        };
        !self.owner(name).is_some_and(is_wanted)
    }

    async fn remove_stray(&self, name: CellName) {
        let over = self.over.lock().await;
        if *over {
            return;
        }
        let removal = async {
            // What is made under a name that is another's is not ours.
            self.engine.claim(self.installation).await?;
            self.engine.remove(&name).await
        };
        match removal.await {
            Ok(()) => {
                self.registry.metrics().reconciled(Reconciled::StrayRemoved, 1);
                tracing::info!(cell = %name, "removed a cell that was made after its session had given it up");
            }
            // The next round tries again.
            Err(error) => tell(&error),
        }
    }

    /// One round: cells without a live session are removed, sessions without a cell are told to look, what earlier versions have left is
    /// removed, and so are workspaces that are too old or that nobody knows.
    ///
    /// # Errors
    /// When the engine can't list its cells, or the instance's name is another installation's: then nothing is touched. What can't be removed stands in the
    /// report.
    pub async fn round(&self) -> Result<Report, EngineError> {
        let over = self.over.lock().await;
        if *over {
            return Ok(Report::default());
        }
        let outcome = self.look_and_act().await;
        self.count(&outcome);
        outcome
    }

    fn count(&self, outcome: &Result<Report, EngineError>) {
        let metrics = self.registry.metrics();
        metrics.reconcile_round(outcome.is_ok());
        let Ok(report) = outcome else { return };
        metrics.reconciled(Reconciled::OrphanRemoved, report.removed.len());
        metrics.reconciled(Reconciled::SessionTold, report.told.len());
        metrics.reconciled(Reconciled::LeftoverRemoved, report.swept.len());
        metrics.reconciled(Reconciled::Failed, report.errors.len());
    }

    /// The end of an installation's work that goes on with the next process: no round begins after this.
    pub async fn leave(&self) {
        *self.over.lock().await = true;
    }

    /// The end of an installation's work of which nothing is to stay: a last round, and the instance's name is free if no cell is left.
    ///
    /// # Errors
    /// When the engine does not do it; the name stays taken then.
    pub async fn clear(&self) -> Result<(), EngineError> {
        let mut over = self.over.lock().await;
        if std::mem::replace(&mut *over, true) {
            return Ok(());
        }
        self.look_and_act().await?;
        // Whoever has the name next would take workspaces for what nobody knows.
        let is_empty = self.engine.list().await?.is_empty() && self.engine.list_workspaces().await?.is_empty();
        if is_empty { self.engine.release(self.installation).await } else { Ok(()) }
    }

    async fn look_and_act(&self) -> Result<Report, EngineError> {
        match self.engine.claim(self.installation).await {
            // Without an image there are no cells either, nor can there be any.
            Ok(()) | Err(EngineError::Absent { .. }) => {}
            Err(error) => return Err(error),
        }
        let cells = self.engine.list().await?;
        let mut report = Report { seen: cells.len(), ..Report::default() };
        self.remove_orphans(&cells, &mut report).await;
        for session in self.registry.all().into_iter().filter(|session| self.misses_its_cell(session, &cells)) {
            session.look_at_cell();
            report.told.push(session.id);
        }
        match self.engine.sweep().await {
            Ok(swept) => report.swept = swept,
            Err(error) => report.note(error, "what earlier versions have left could not be removed"),
        }
        let Tidied { removed, errors } = workspaces::tidy(self.registry.workspaces(), self.engine.as_ref()).await;
        report.swept.extend(removed);
        for error in errors {
            report.note(error, "a workspace that nobody has any more could not be removed");
        }
        Ok(report)
    }

    async fn remove_orphans(&self, cells: &[Observed], report: &mut Report) {
        let orphans: Vec<_> = cells.iter().filter(|cell| is_orphan(cell, &self.registry)).collect();
        for some in orphans.chunks(REMOVALS) {
            let is_away = |e: &EngineError| matches!(e, EngineError::Unavailable { .. } | EngineError::TimedOut { .. });
            if report.errors.iter().any(is_away) {
                // Each of the others would take its whole time as well.
                return;
            }
            let removals = some.iter().map(|cell| self.engine.remove(&cell.name));
            for (cell, removed) in some.iter().zip(futures_util::future::join_all(removals).await) {
                match removed {
                    Ok(()) => {
                        tracing::info!(cell = %cell.name, "removed a cell without a session");
                        report.removed.push(cell.name.clone());
                    }
                    Err(error) => report.note(error, "a cell without a session could not be removed"),
                }
            }
        }
    }

    /// Whether a session that works has no cell that does, or one that is frozen or not against its will. A session that is about to change is looked after by
    /// itself.
    fn misses_its_cell(&self, session: &Session, cells: &[Observed]) -> bool {
        let own = self.registry.cell_of(session.id);
        let state = cells.iter().find(|cell| Some(&cell.name) == own.as_ref()).map(|cell| cell.state);
        let is_frozen = state == Some(CellState::Paused);
        let works = state.is_some_and(|state| !matches!(state, CellState::Exited { .. }));
        match session.phase() {
            Phase::Ready => !works || is_frozen,
            Phase::Paused => !works || !is_frozen,
            _ => false,
        }
    }
}

impl Report {
    fn note(&mut self, error: EngineError, what: &'static str) {
        tracing::warn!(%error, "{what}");
        self.errors.push(error);
    }
}

fn tell(error: &EngineError) {
    if matches!(error, EngineError::Claimed { .. }) {
        tracing::error!(
            %error,
            "another installation has taken this instance's name; its server will end what this one starts"
        );
    } else {
        tracing::warn!(
            %error,
            "the engine's cells could not be compared with the sessions; it will be tried again"
        );
    }
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
