//! Lasting workspaces: what templates offer of them, and what a name may be. Where one is kept, and who has it, is not decided here.

use std::time::Duration;

use super::spec::is_name;

/// What a template offers to sessions whose working folder is to outlive them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkspaceOffer {
    /// It goes when no session has had it for this long.
    pub max_age: Duration,
    /// The most bytes that it may hold, where a host enforces that.
    pub quota_bytes: Option<u64>,
}

/// The lasting workspace that a session is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceUse {
    /// Its name, which is its tenant's own.
    pub name: String,
    /// What the template says of such.
    pub offer: WorkspaceOffer,
}

impl WorkspaceOffer {
    /// What is to be had under a name.
    ///
    /// # Errors
    /// A sentence that says what is allowed.
    pub fn choose(&self, name: &str) -> Result<WorkspaceUse, String> {
        if is_name(name) {
            return Ok(WorkspaceUse { name: name.to_owned(), offer: *self });
        }
        Err("allowed are 1 to 64 letters, digits, \".\", \"_\" and \"-\"".to_owned())
    }
}
