use std::collections::BTreeMap;
use std::task::{Context, Poll, Waker};

use futures_util::future::BoxFuture;
use proptest::prelude::*;

use super::*;

fn capacity(sessions: usize, memory_bytes: u64, waiting: usize) -> Capacity {
    let patience = Duration::from_secs(3600);
    let (cpu_millis, memory_bytes) = (None, Some(memory_bytes));
    Capacity::new(Ceilings { sessions, cpu_millis, memory_bytes, starts: usize::MAX, waiting, patience })
}

fn need(memory_bytes: u64) -> Need {
    Need { cpu_millis: 1000, memory_bytes }
}

fn tenant(name: &str) -> Arc<str> {
    Arc::from(name)
}

/// Somebody who has begun to wait, polled by hand.
struct Waits(BoxFuture<'static, Result<Place, Full>>);

impl Waits {
    fn new(capacity: &Capacity, name: &str, bytes: u64) -> Self {
        let (capacity, tenant) = (capacity.clone(), tenant(name));
        Self(Box::pin(async move { capacity.place(&tenant, need(bytes)).await }))
    }

    fn poll(&mut self) -> Option<Result<Place, Full>> {
        match self.0.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(ready) => Some(ready),
            Poll::Pending => None,
        }
    }

    fn place(&mut self) -> Option<Place> {
        self.poll().map(|given| given.expect("a place"))
    }
}

#[tokio::test]
async fn a_thousand_creates_of_one_delay_another_by_one_start() {
    let capacity = capacity(1, u64::MAX, 2000);
    let mut first = Waits::new(&capacity, "loud", 1);
    let first = first.place();
    let mut loud: Vec<Waits> = (0..1000).map(|_| Waits::new(&capacity, "loud", 1)).collect();
    assert!(loud.iter_mut().all(|waits| waits.place().is_none()));
    let mut quiet = Waits::new(&capacity, "quiet", 1);
    assert!(quiet.place().is_none());
    drop(first);
    let second = loud[0].place();
    assert!(second.is_some() && quiet.place().is_none());
    drop(second);
    assert!(quiet.place().is_some(), "one start of the other's was first");
}

#[tokio::test]
async fn nobody_fills_the_line_for_others() {
    let capacity = capacity(1, u64::MAX, 4);
    let held = Waits::new(&capacity, "loud", 1).place();
    let mut loud: Vec<Waits> = (0..5).map(|_| Waits::new(&capacity, "loud", 1)).collect();
    let refused = |waits: &mut Waits| matches!(waits.poll(), Some(Err(Full { .. })));
    assert_eq!(
        loud.iter_mut().map(refused).collect::<Vec<_>>(),
        [false, false, false, false, true],
        "all of it is its own"
    );
    let mut quiet: Vec<Waits> = (0..3).map(|_| Waits::new(&capacity, "quiet", 1)).collect();
    assert_eq!(quiet.iter_mut().map(refused).collect::<Vec<_>>(), [false, false, true], "half of it is the other's");
    assert_eq!(loud[..4].iter_mut().map(refused).collect::<Vec<_>>(), [false, false, true, true], "who came last goes");
    let mut third = Waits::new(&capacity, "third", 1);
    assert!(!refused(&mut third), "and so on");
    drop(held);
    let second = loud[0].place();
    assert!(second.is_some(), "who came first has not lost its turn");
    drop(second);
    assert!(quiet[0].place().is_some());
}

#[tokio::test]
async fn so_many_start_at_once_and_the_next_when_one_has() {
    let ceilings = Ceilings {
        sessions: 10,
        cpu_millis: None,
        memory_bytes: None,
        starts: 2,
        waiting: 10,
        patience: Duration::from_secs(3600),
    };
    let capacity = Capacity::new(ceilings);
    let mut waits: Vec<Waits> = (0..4).map(|_| Waits::new(&capacity, "one", 1)).collect();
    let mut places: Vec<Option<Place>> = waits.iter_mut().map(Waits::place).collect();
    assert_eq!(places.iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, false, false]);
    assert!(capacity.spare_place(need(1)).is_none(), "somebody waits");
    assert_eq!(capacity.short_of(need(1)), 0, "there is room, and only a start is waited for");
    let mut first = places[0].take().expect("a place");
    first.has_started();
    first.has_started();
    let third = waits[2].place().expect("the next");
    assert!(waits[3].place().is_none(), "one has started, whoever says so twice");
    drop((third, first));
    assert!(waits[3].place().is_some());
}

#[tokio::test]
async fn what_is_full_says_when_to_come_again_and_who_left_takes_no_place() {
    let capacity = capacity(1, u64::MAX, 1);
    let held = Waits::new(&capacity, "a", 1).place();
    let mut gone = Waits::new(&capacity, "a", 1);
    assert!(gone.place().is_none());
    let refused = capacity.place(&tenant("b"), need(1)).await.unwrap_err();
    assert!((1..=60).contains(&refused.retry_after.as_secs()));
    drop(gone);
    let mut next = Waits::new(&capacity, "b", 1);
    assert!(next.place().is_none());
    drop(held);
    assert!(next.place().is_some());
}

#[tokio::test]
async fn nobody_waits_for_ever() {
    let ceilings = Ceilings {
        sessions: 0,
        cpu_millis: None,
        memory_bytes: None,
        starts: 1,
        waiting: 1,
        patience: Duration::from_millis(30),
    };
    let capacity = Capacity::new(ceilings);
    assert!(capacity.place(&tenant("a"), need(1)).await.is_err());
    assert_eq!(capacity.book().sessions, 0);
}

#[tokio::test]
async fn a_large_one_is_not_overtaken_and_one_larger_than_all_is_refused() {
    let capacity = capacity(10, 100, 10);
    let small = Waits::new(&capacity, "a", 60).place();
    let mut large = Waits::new(&capacity, "b", 80);
    let mut next = Waits::new(&capacity, "a", 10);
    assert!(large.place().is_none() && next.place().is_none());
    drop(small);
    let held = (large.place(), next.place());
    assert!(held.0.is_some() && held.1.is_some());
    drop(held);
    let errors = capacity.can_ever_hold(need(101)).unwrap_err();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].pointer == "/resources/memory_mb" && capacity.can_ever_hold(need(100)).is_ok());
}

#[tokio::test]
async fn whoever_stops_waiting_lets_those_behind_pass_and_keeps_no_turn() {
    let capacity = capacity(10, 100, 10);
    let held = Waits::new(&capacity, "a", 50).place();
    let mut large = Waits::new(&capacity, "a", 80);
    let mut another = Waits::new(&capacity, "a", 80);
    let mut small = Waits::new(&capacity, "b", 10);
    assert!(large.place().is_none() && another.place().is_none() && small.place().is_none());
    drop(large);
    assert!(small.place().is_some());
    drop(held);
}

proptest! {
    #[test]
    fn what_is_taken_is_what_is_held_and_never_more_than_may_be(
        steps in proptest::collection::vec((0..3u8, 0..3usize, 1..60u64, 0..8usize), 1..120)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        let capacity = capacity(4, 100, 6);
        let mut waiting: Vec<(Waits, u64)> = Vec::new();
        let mut held: BTreeMap<usize, (Place, u64)> = BTreeMap::new();
        let mut number = 0;
        for (what, who, bytes, which) in steps {
            match what {
                0 => waiting.push((Waits::new(&capacity, ["a", "b", "c"][who], bytes), bytes)),
                1 if !waiting.is_empty() => drop(waiting.remove(which % waiting.len())),
                _ => drop(held.keys().nth(which).copied().and_then(|key| held.remove(&key))),
            }
            // Whoever stops waiting may make room for one that was looked at before.
            for _ in 0..=waiting.len() {
                waiting.retain_mut(|(waits, bytes)| match waits.poll() {
                    Some(Ok(place)) => {
                        number += 1;
                        held.insert(number, (place, *bytes));
                        false
                    }
                    Some(Err(_)) => false,
                    None => true,
                });
            }
            let bytes: u64 = held.values().map(|(_, bytes)| bytes).sum();
            let book = capacity.book();
            prop_assert_eq!((book.sessions, book.taken.memory_bytes), (held.len(), bytes));
            prop_assert!(held.len() <= 4 && bytes <= 100);
            prop_assert!(book.waiting() <= 6);
        }
        drop((held, waiting));
        let mut book = capacity.book();
        book.leave_out_the_gone();
        prop_assert!(book.sessions == 0 && book.taken == Need::default() && book.lines.is_empty() && book.turns.is_empty());
    }
}
