//! Places that many share, so that none of them has more than its part. Who that is and what a place is worth is the business of whoever gives them out.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

/// So many places, counted by who has them.
#[derive(Debug)]
pub struct Places<K: Hash + Eq> {
    most: usize,
    taken: Mutex<Taken<K>>,
    /// Places have come back.
    back: Notify,
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
        Arc::new(Self { most, taken: Mutex::new(Taken { all: 0, of: HashMap::new() }), back: Notify::new() })
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

    /// The same, which waits for so long until enough have come back. Of those who wait nobody has a turn.
    ///
    /// # Errors
    /// See [`Full`].
    pub async fn take_within(
        self: &Arc<Self>,
        whose: K,
        count: usize,
        most_of_one: usize,
        patience: Duration,
    ) -> Result<Place<K>, Full> {
        let mut late = std::pin::pin!(tokio::time::sleep(patience));
        loop {
            let mut back = std::pin::pin!(self.back.notified());
            // Before it is looked, so that none comes back unseen.
            back.as_mut().enable();
            match self.take(whose.clone(), count, most_of_one) {
                Ok(place) => return Ok(place),
                Err(full) => tokio::select! {
                    () = back => {}
                    () = &mut late => return Err(full),
                },
            }
        }
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
        drop(taken);
        self.places.back.notify_waiters();
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

    #[tokio::test(start_paused = true)]
    async fn who_waits_gets_what_comes_back_in_time() {
        let places = Places::new(1);
        let held = places.take("one", 1, 1).unwrap();
        let waits = |seconds| places.take_within("one", 1, 1, Duration::from_secs(seconds));
        assert_eq!(waits(5).await.unwrap_err(), Full::OfOne);
        let given_back = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            drop(held);
        };
        let (taken, ()) = tokio::join!(waits(5), given_back);
        assert!(taken.is_ok());
        assert_eq!(places.take_within("two", 1, 1, Duration::ZERO).await.unwrap_err(), Full::All);
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
