//! How often something may be: so much at once, and so much a second. Does not wait for anything.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A bucket of tokens that fills itself.
#[derive(Debug)]
pub(super) struct Bucket {
    most: f64,
    per_second: f64,
    level: Mutex<(f64, Instant)>,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(most: f64, per_second: f64) -> Self {
        Self { most, per_second, level: Mutex::new((most, Instant::now())) }
    }

    /// Takes a token, if there is one.
    pub(super) fn take(&self) -> bool {
        self.take_at(Instant::now())
    }

    /// Whether as much is in it as there can be.
    pub(super) fn is_full(&self) -> bool {
        let level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        level.0 + level.1.elapsed().as_secs_f64() * self.per_second >= self.most
    }

    fn take_at(&self, now: Instant) -> bool {
        // Every change is a single assignment, so a panic leaves nothing half done.
        let mut level = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        let filled = level.0 + now.saturating_duration_since(level.1).as_secs_f64() * self.per_second;
        let filled = filled.min(self.most);
        let has = filled >= 1.0;
        *level = (if has { filled - 1.0 } else { filled }, now);
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn it_gives_what_is_in_it_and_fills_itself_up_to_its_size() {
        let bucket = Bucket::new(3.0, 2.0);
        let now = Instant::now();
        assert_eq!([(); 4].map(|()| bucket.take_at(now)), [true, true, true, false]);
        let later = now + Duration::from_secs(1);
        assert_eq!([(); 3].map(|()| bucket.take_at(later)), [true, true, false]);
        let much_later = now + Duration::from_secs(1000);
        assert_eq!([(); 4].map(|()| bucket.take_at(much_later)), [true, true, true, false]);
    }
}
