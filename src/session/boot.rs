//! Brings a running cell to the point where its kernels can be started: the link, the attestation, the stream of events.
//!
//! Also says what a failed start is to a caller: whose fault, in words that are not the engine's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cellblock_wire::GENERATION;
use cellblock_wire::link::Init;
use cellblock_wire::marker::LinkSecret;
use cellblock_wire::packages::{PACKAGES_BYTES_VARIABLE, PACKAGES_VARIABLE};

use super::actor::{self, Verdict};
use super::{Settings, StartFailure, StartFault, first_files};
use crate::domain::packages::PackagePolicy;
use crate::domain::spec::NewFile;
use crate::engine::{ByteStream, CellName, CellSpec, Engine, EngineError};
use crate::kernel::link::{Events, Link, LinkError};

/// A cell that could not be linked is tried again after this long.
const ADOPT_AGAIN: Duration = Duration::from_secs(1);

/// What a booted guest gives.
pub(super) struct Booted {
    pub(super) link: Link,
    pub(super) events: Events,
    /// The names of kernels that are there, as the guest has them: hostile text.
    pub(super) kernels: Vec<String>,
}

/// Opens the link, attests the cell, puts its first files in place, and subscribes to its events. No kernel runs before this has succeeded.
pub(super) async fn boot(
    engine: Arc<dyn Engine>,
    cell: CellSpec,
    stream: ByteStream,
    secret: LinkSecret,
    init: Init,
    files: Arc<[NewFile]>,
) -> Result<Booted, StartFailure> {
    let (link, _hello) = Link::open(stream, secret, &init).await.map_err(|e| link_failure(&cell, &e))?;
    let report = link.report().await.map_err(|e| link_failure(&cell, &e))?;
    engine.attest(&cell, &report).await.map_err(|e| engine_failure(&cell, &e))?;
    first_files::put(&link, &files).await?;
    let events = link.events(0).await.map_err(|e| link_failure(&cell, &e))?;
    Ok(Booted { link, events, kernels: Vec::new() })
}

/// A cell that is there already, and how long its link is waited for.
pub(super) struct Adoption {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) name: CellName,
    pub(super) secret: LinkSecret,
    pub(super) init: Init,
    /// Its guest answers within this time, once the engine does.
    pub(super) guest_patience: Duration,
    /// The engine answers within this time; after that the cell's lease has ended it.
    pub(super) engine_patience: Duration,
    /// What is said where the guest does not answer.
    pub(super) words: &'static str,
}

impl Adoption {
    /// Opens the link to a cell that was paused, whose link broke, or that an earlier process has left, and subscribes to what its guest was not told to
    /// forget. It is thawed first if it is frozen; it was attested before anything ran in it.
    pub(super) async fn adopt(self) -> Result<Booted, Verdict> {
        let began = Instant::now();
        let mut answers_since = None;
        loop {
            let why = match self.link().await {
                Ok(booted) => return Ok(booted),
                Err(why) => why,
            };
            tracing::warn!(cell = %self.name, why, "a cell could not be linked again");
            let verdict = actor::look_at(self.engine.as_ref(), &self.name, Verdict::Unreachable(self.words)).await;
            let is_hopeless = match verdict {
                Verdict::EngineAway => {
                    answers_since = None;
                    began.elapsed() >= self.engine_patience
                }
                // A guest that is busy may answer the next time.
                Verdict::Unreachable(_) | Verdict::Frozen => {
                    answers_since.get_or_insert_with(Instant::now).elapsed() >= self.guest_patience
                }
                _ => true,
            };
            match verdict {
                _ if !is_hopeless => tokio::time::sleep(ADOPT_AGAIN).await,
                Verdict::Frozen => return Err(Verdict::Unreachable("its container could not be resumed")),
                verdict => return Err(verdict),
            }
        }
    }

    async fn link(&self) -> Result<Booted, String> {
        self.engine.resume(&self.name).await.map_err(|e| e.to_string())?;
        let stream = self.engine.link(&self.name).await.map_err(|e| e.to_string())?;
        let (link, _hello) = Link::open(stream, self.secret, &self.init).await.map_err(|e| e.to_string())?;
        let kernels = link.kernels().await.map_err(|e| e.to_string())?;
        let events = link.events(0).await.map_err(|e| e.to_string())?;
        Ok(Booted { link, events, kernels })
    }
}

/// Tells code which packages may be installed. It is for messages only: what is given is decided where the index is asked.
pub(super) fn with_packages(
    mut env: BTreeMap<String, String>,
    policy: &PackagePolicy,
    bytes: u64,
) -> BTreeMap<String, String> {
    env.insert(PACKAGES_VARIABLE.to_owned(), policy.to_string());
    env.insert(PACKAGES_BYTES_VARIABLE.to_owned(), bytes.to_string());
    env
}

/// What a guest is told first.
pub(super) fn init(settings: Settings, env: BTreeMap<String, String>, egress: bool) -> Init {
    Init { generation: GENERATION, orphan_timeout_seconds: settings.orphan_timeout.as_secs(), env, egress }
}

fn link_failure(cell: &CellSpec, error: &LinkError) -> StartFailure {
    tracing::warn!(cell = %cell.name, %error, "a cell's guest could not be reached");
    StartFailure {
        fault: StartFault::GuestUnreachable,
        detail: "the container started, but the program inside that runs its kernels did not answer".to_owned(),
    }
}

/// Says a failed engine call to a caller; the engine's own words go to the log.
pub(super) fn engine_failure(cell: &CellSpec, error: &EngineError) -> StartFailure {
    tracing::warn!(cell = %cell.name, %error, "a cell could not be started");
    let (fault, detail) = match error {
        EngineError::Unavailable { .. } => (StartFault::EngineUnavailable, "the container engine can't be reached"),
        EngineError::TimedOut { .. } => (StartFault::EngineUnavailable, "the container engine did not answer in time"),
        EngineError::Absent { .. } => (
            StartFault::EngineRefused,
            "the template's image, or data or a workspace that it names, is not there any more",
        ),
        EngineError::Unverified { .. } => {
            (StartFault::Unverified, "the container was not confined as specified, so nothing was run in it")
        }
        EngineError::Rejected { .. }
        | EngineError::Conflict { .. }
        | EngineError::Claimed { .. }
        | EngineError::Unexpected { .. } => {
            (StartFault::EngineRefused, "the container engine would not start a container of this template")
        }
    };
    StartFailure { fault, detail: detail.to_owned() }
}
