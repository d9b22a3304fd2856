//! Where a value came from, and the mistakes that name it. Formats them; finds none.

use std::fmt;
use std::path::PathBuf;

/// A key's segments: `["server", "listen"]`.
pub(super) type Key = Vec<String>;

/// The key as people write it: `server.listen`.
pub(super) fn dotted(key: &[String]) -> String {
    key.join(".")
}

/// The key of a text such as `server.listen`.
pub(super) fn key_of(text: &str) -> Key {
    text.split('.').map(|segment| segment.trim().to_owned()).collect()
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The compiled-in defaults.
    Default,
    /// A line of a file; lines count from 1, line 0 is the file as a whole.
    File(PathBuf, usize),
    /// An environment variable.
    Variable(String),
    /// A file that an environment variable names; its values aren't shown.
    Secret(String),
    /// A flag of the command line.
    Flag(String),
    /// A section that this one inherits from, and where that has it from.
    Inherited(Box<Source>, String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path, 0) => write!(f, "{}", path.display()),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) | Self::Secret(name) => write!(f, "environment {name}"),
            Self::Flag(flag) => f.write_str(flag),
            Self::Inherited(source, section) => write!(f, "{source}, {section}"),
        }
    }
}

/// One mistake in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The key, such as `server.listen`; empty where a whole file is meant.
    pub key: String,
    /// Where its value came from.
    pub source: Source,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "{}: {}", self.source, self.message),
            key => write!(f, "{key} ({}): {}", self.source, self.message),
        }
    }
}

/// Every mistake that was found; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistakes(pub Vec<Mistake>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.len() {
            1 => write!(f, "the configuration has a mistake:")?,
            count => write!(f, "the configuration has {count} mistakes:")?,
        }
        self.0.iter().try_for_each(|mistake| write!(f, "\n  {mistake}"))
    }
}

impl std::error::Error for Mistakes {}
