//! What a guest tells that was started to try its own confinement, instead of to serve a link: one JSON object a line on stdout.

use serde::{Deserialize, Serialize};

use crate::link::Report;

/// The guest's first argument for a trial; the second is the name of a [`Step`].
pub const TRIAL: &str = "try";

/// One trial. Each takes a container of its own, since some runtimes end all of it where a limit is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// What harms nothing: looks, and fills folders.
    Calm,
    /// Starts threads until none more can be.
    Pids,
    /// Has a child use twice the memory that there is.
    Memory,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Calm, Self::Pids, Self::Memory];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Calm => "calm",
            Self::Pids => "pids",
            Self::Memory => "memory",
        }
    }
}

/// A line of a trial.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "line")]
pub enum Line {
    /// What the guest sees of its confinement.
    Report(Box<Report>),
    /// What it sees of the machine.
    Machine(Machine),
    /// It begins to try something that may end it.
    Begins,
    /// It has tried something.
    Tried(Tried),
}

/// What a guest sees of its machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// `/proc/self/uid_map`: which ids outside are those inside.
    pub uid_map: String,
    /// Bytes of swap that the machine has, where that can be read.
    pub swap_bytes: Option<u64>,
    /// Bytes that are free on the disk with the engine's volumes.
    pub disk_free_bytes: u64,
    /// Bytes that this disk has.
    pub disk_bytes: u64,
}

/// Something that a lock should have prevented.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tried {
    /// The lock's name.
    pub lock: String,
    /// Whether it held.
    pub held: bool,
    /// What was seen.
    pub seen: String,
}
