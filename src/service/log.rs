//! How much the log tells, which an operator may change while the server runs. Where lines go, and what writes them, is the business of whoever started the process.

use std::sync::{Arc, Mutex, PoisonError};

use super::keys::Principal;
use super::{Error, Service};
use crate::domain::spec::FieldError;

/// Makes a level the one in force; the error says what is not understood.
type Set = dyn Fn(&str) -> Result<(), String> + Send + Sync;

/// What is in force, and how it is changed. Clones are the same.
#[derive(Clone)]
pub struct LogLevel {
    now: Arc<Mutex<String>>,
    set: Arc<Set>,
}

impl std::fmt::Debug for LogLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LogLevel").field(&self.level()).finish()
    }
}

impl LogLevel {
    /// The level of a log that `set` changes.
    #[must_use]
    pub fn new(now: String, set: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self { now: Arc::new(Mutex::new(now)), set: Arc::new(set) }
    }

    /// What is in force.
    #[must_use]
    pub fn level(&self) -> String {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts a level in force: "info", or "info,cellblock::engine=debug".
    ///
    /// # Errors
    /// When it is not understood; then nothing has changed.
    pub fn change(&self, level: &str) -> Result<(), String> {
        // Held over both, so that what is told is what is in force.
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        (self.set)(level)?;
        level.clone_into(&mut now);
        Ok(())
    }
}

impl Service {
    /// The same, whose log can be changed.
    #[must_use]
    pub fn logging(self, log: LogLevel) -> Self {
        Self { log: Some(log), ..self }
    }

    /// How much the log tells.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn log_level(&self, who: &Principal) -> Result<String, Error> {
        Ok(self.log(who)?.level())
    }

    /// Has the log tell more or less, until the server ends.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn set_log_level(&self, who: &Principal, level: &str) -> Result<String, Error> {
        let log = self.log(who)?;
        log.change(level).map_err(|message| Error::SpecRejected(vec![FieldError::new("/level", message)]))?;
        tracing::info!(level, "an operator has changed what the log tells");
        Ok(log.level())
    }

    fn log(&self, who: &Principal) -> Result<&LogLevel, Error> {
        who.require_admin()?;
        self.log.as_ref().ok_or_else(|| Error::StateConflict("this server does not write the log itself".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_is_not_understood_changes_nothing() {
        let log =
            LogLevel::new("info".to_owned(), |level| if level == "debug" { Ok(()) } else { Err("no".to_owned()) });
        assert_eq!((log.change("loud"), log.level()), (Err("no".to_owned()), "info".to_owned()));
        assert_eq!((log.change("debug"), log.clone().level()), (Ok(()), "debug".to_owned()));
    }
}
