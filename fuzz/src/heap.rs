//! Counts the heap, so that a target can say how much its decoder may hold at once.
//!
//! libFuzzer's own limit on single allocations needs a sanitizer, which stable Rust lacks; what is above [`MOST`] fails here instead,
//! and a failed allocation ends the process as any crash does.
#![allow(unsafe_code, reason = "an allocator can't be written without it")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Largest single allocation that succeeds, in bytes. No input is nearly as long, so only a declared length could ask for it.
const MOST: usize = 16 * 1024 * 1024;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static HEAP: Counting = Counting;

struct Counting;

impl Counting {
    fn grew(by: usize) {
        PEAK.fetch_max(LIVE.fetch_add(by, Relaxed) + by, Relaxed);
    }
}

// SAFETY: everything is left to the system's allocator; null is how an allocator refuses.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MOST {
            return std::ptr::null_mut();
        }
        Self::grew(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > MOST {
            return std::ptr::null_mut();
        }
        LIVE.fetch_sub(layout.size(), Relaxed);
        Self::grew(size);
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// Runs `work` and panics if more than `limit` bytes were held during it, beyond what was held before.
pub fn at_most<T>(limit: usize, work: impl FnOnce() -> T) -> T {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let value = work();
    let held = PEAK.load(Relaxed) - before;
    assert!(held <= limit, "{held} bytes were held at once, {limit} are allowed");
    value
}
