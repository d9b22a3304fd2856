//! What is to be run, with every limit decided. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use super::output::{Comm, JsonText};
use super::spec::OutputLimits;

/// What is to be run, with every limit decided.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecutionRequest {
    /// The code.
    pub code: String,
    /// It is interrupted after this long.
    pub timeout: Duration,
    /// Nothing is shown and nothing is counted.
    pub silent: bool,
    /// It takes part in the kernel's count.
    pub store_history: bool,
    /// What it may put out.
    pub output: OutputLimits,
    /// What it gets when it asks for a line.
    pub stdin: Stdin,
    /// Expressions that are evaluated after it, by name.
    pub user_expressions: BTreeMap<String, String>,
    /// What happens at its time limit first.
    pub on_timeout: OnTimeout,
    /// When it fails, what waits behind it and came in by the same door does not run.
    pub stop_on_error: bool,
    /// The message of a Jupyter client that asks for it.
    pub asked_by: Option<AskedBy>,
    /// A message of a comm instead of code: the kernel works on it like on code, and it ends when the kernel has.
    pub comm: Option<Comm>,
}

impl ExecutionRequest {
    /// Bytes of what is to be run, about.
    #[must_use]
    pub fn len(&self) -> usize {
        let lines = match &self.stdin {
            Stdin::Lines(lines) => lines.iter().map(String::len).sum(),
            Stdin::Deny | Stdin::Interactive => 0,
        };
        let expressions = self.user_expressions.iter().map(|(name, code)| name.len() + code.len()).sum::<usize>();
        let asked = self.asked_by.as_ref().map_or(0, |asked| asked.header.0.len());
        self.code.len() + lines + expressions + asked + self.comm.as_ref().map_or(0, Comm::len)
    }

    /// Whether there is nothing to be run.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A message of a Jupyter client that asks for code to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AskedBy {
    /// Who gets the reply.
    pub asker: Asker,
    /// Its header as it came, which stands in all that is answered.
    pub header: JsonText,
}

/// One end of a connection to a kernel's messages.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Asker {
    /// A client that has given itself a name, and may come back under it.
    Named(String),
    /// A connection of this process.
    Nameless(u64),
}

/// What code gets that asks for a line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Stdin {
    /// An exception, at once.
    #[default]
    Deny,
    /// These lines in order, and then the end of its input.
    Lines(Vec<String>),
    /// What a caller answers, within the time limit.
    Interactive,
}

/// What happens at the time limit first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It is interrupted, so that variables may survive.
    #[default]
    Interrupt,
    /// Its kernel is replaced.
    Restart,
}

#[cfg(test)]
impl ExecutionRequest {
    /// Nothing.
    pub(crate) fn for_tests(output: OutputLimits) -> Self {
        Self {
            code: String::new(),
            timeout: Duration::from_secs(1),
            silent: false,
            store_history: true,
            output,
            stdin: Stdin::Deny,
            user_expressions: BTreeMap::new(),
            on_timeout: OnTimeout::Interrupt,
            stop_on_error: false,
            asked_by: None,
            comm: None,
        }
    }
}
