//! Places that many share, so that none of them has more than its part. Who that is and what a place is worth is the business of whoever gives them out.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// So many places, counted by who has them.
#[derive(Debug)]
pub struct Places<K: Hash + Eq> {
    most: usize,
    taken: Mutex<Taken<K>>,
}

#[derive(Debug)]
struct Taken<K> {
    all: usize,
    of: HashMap<K, usize>,
}

/// Somebody's places, for as long as this lives.
#[derive(Debug)]
pub struct Place<K: Hash + Eq> {
    places: Arc<Places<K>>,
    whose: K,
    count: usize,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// Who asks has as many as one may have.
    OfOne,
    /// All are taken.
    All,
}

impl<K: Hash + Eq + Clone> Places<K> {
    /// So many, all free.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::new(Taken { all: 0, of: HashMap::new() }) })
    }

    /// Takes `count` of them at once, if whoever it is then has at most `most_of_one`. Never waits.
    ///
    /// # Errors
    /// See [`Full`].
    pub fn take(self: &Arc<Self>, whose: K, count: usize, most_of_one: usize) -> Result<Place<K>, Full> {
        // No step can panic halfway.
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.of.get(&whose).copied().unwrap_or_default();
        if own.saturating_add(count) > most_of_one {
            return Err(Full::OfOne);
        }
        if taken.all.saturating_add(count) > self.most {
            return Err(Full::All);
        }
        taken.all += count;
        taken.of.insert(whose.clone(), own + count);
        drop(taken);
        Ok(Place { places: Arc::clone(self), whose, count })
    }
}

impl<K: Hash + Eq> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= self.count;
        match taken.of.get_mut(&self.whose) {
            Some(own) if *own > self.count => *own -= self.count,
            _ => drop(taken.of.remove(&self.whose)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back_and_leave_nothing() {
        let places = Places::new(3);
        let take = |whose| places.take(whose, 1, 2);
        let (first, second) = (take("one").unwrap(), take("one").unwrap());
        assert_eq!(take("one").unwrap_err(), Full::OfOne);
        let third = take("two").unwrap();
        assert_eq!(take("three").unwrap_err(), Full::All);
        drop(first);
        let fourth = take("three").unwrap();
        drop((second, third, fourth));
        let taken = places.taken.lock().unwrap();
        assert_eq!((taken.all, taken.of.len()), (0, 0));
    }

    #[test]
    fn several_are_taken_at_once_or_none() {
        let places = Places::new(10);
        let held = places.take("one", 4, 5).unwrap();
        assert_eq!(places.take("one", 2, 5).unwrap_err(), Full::OfOne);
        let other = places.take("two", 5, 5).unwrap();
        assert_eq!(places.take("three", 2, 5).unwrap_err(), Full::All);
        drop(held);
        let again = places.take("three", 5, 5).unwrap();
        assert_eq!(places.take("one", 1, 5).unwrap_err(), Full::All);
        drop((other, again));
        assert!(places.taken.lock().unwrap().of.is_empty());
    }
}
