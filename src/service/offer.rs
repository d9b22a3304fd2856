//! What callers can choose from: the templates, which an operator may change while the server runs.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::domain::spec::Template;

/// Templates, and which of them is meant by a caller who names none.
#[derive(Debug, Clone)]
pub struct Choice {
    /// By name.
    pub templates: BTreeMap<String, Template>,
    /// Always one of them.
    pub default: String,
}

/// What is offered now. Clones are the same.
#[derive(Debug, Clone)]
pub struct Offer(Arc<RwLock<Arc<Choice>>>);

impl Offer {
    /// Offers this.
    #[must_use]
    pub fn new(choice: Choice) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(choice))))
    }

    /// What is offered at this moment.
    #[must_use]
    pub fn now(&self) -> Arc<Choice> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Offers something else from now on; sessions that are there keep what they have.
    pub fn change(&self, choice: Choice) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(choice);
    }
}
