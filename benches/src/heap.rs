//! How much memory the program's tables take: what was allocated, and how much of that has memory behind it.
//!
//! A program that wants to know makes [`Counting`] its global allocator. Memory that is mapped (guest memory,
//! frames) is not counted. Of what was allocated small all is taken to be there. What was allocated large
//! (tables for all of guest memory and every copy there could be) gets memory from the kernel page by page
//! when it is first touched: the kernel is asked how many pages that are.
#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// From this size on the kernel's pages are counted. The system's allocator gives what is as large mappings
/// of its own ([`keep_large_apart`]).
const LARGE: usize = 128 << 10;
const PAGE: usize = 4096;

static SMALL: AtomicU64 = AtomicU64::new(0);
static INSTALLED: AtomicBool = AtomicBool::new(false);
/// Large allocations: first address, 0 for a place that is free, and length. What finds no
/// place is counted as small.
static PLACES: [(AtomicUsize, AtomicUsize); 256] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; 256];

/// The system's allocator, counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counting;

/// Has what is large be a mapping of its own each time. Else the system's allocator learns from the first
/// that is freed to keep such memory, and what was touched for one guest would count for the next.
pub fn keep_large_apart() {
    // SAFETY: it changes a setting of the allocator, under its own lock.
    let set = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE as libc::c_int) };
    debug_assert_eq!(set, 1);
}

/// What was allocated at one moment.
#[derive(Debug)]
pub struct Mark {
    small: u64,
    large: Vec<Range<usize>>,
}

/// Bytes that are allocated now. `None` where [`Counting`] is not the global allocator.
pub fn mark() -> Option<Mark> {
    INSTALLED.load(Ordering::Relaxed).then(|| Mark {
        small: SMALL.load(Ordering::Relaxed),
        large: large().collect(),
    })
}

fn large() -> impl Iterator<Item = Range<usize>> {
    PLACES.iter().filter_map(|(start, len)| {
        let start = start.load(Ordering::Acquire);
        (start != 0).then(|| start..start + len.load(Ordering::Relaxed))
    })
}

/// What was allocated between two moments, and is expected to live as long as this.
#[derive(Debug, Default)]
pub struct Made {
    small: u64,
    large: Vec<Range<usize>>,
}

impl Mark {
    /// What was allocated since.
    pub fn made(&self) -> Made {
        Made {
            small: SMALL.load(Ordering::Relaxed).saturating_sub(self.small),
            large: large().filter(|it| !self.large.contains(it)).collect(),
        }
    }
}

impl Made {
    /// Both.
    pub fn append(&mut self, mut more: Self) {
        self.small += more.small;
        self.large.append(&mut more.large);
    }

    /// Bytes of it that have memory behind them now.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn resident(&self) -> io::Result<u64> {
        let mut bytes = self.small;
        for range in &self.large {
            bytes += resident(range)?;
        }
        Ok(bytes)
    }
}

/// Bytes of the pages of `range` that have memory behind them, or had and are swapped out. A page that was
/// only read counts, though the kernel has the same zeros behind all of those.
fn resident(range: &Range<usize>) -> io::Result<u64> {
    let pages = range.start / PAGE..range.end.div_ceil(PAGE);
    // Eight bytes a page; bit 63 says present, bit 62 swapped (Documentation/admin-guide/mm/pagemap.rst).
    let mut map = vec![0; pages.len() * 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut map, pages.start as u64 * 8)?;
    let (words, _) = map.as_chunks::<8>();
    let there = words.iter().filter(|&&w| u64::from_ne_bytes(w) >> 62 != 0);
    Ok((there.count() * PAGE) as u64)
}

fn grew(start: *mut u8, size: usize) {
    INSTALLED.store(true, Ordering::Relaxed);
    if size >= LARGE && !start.is_null() {
        for (place, len) in &PLACES {
            let taken = place.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
            if taken.is_ok() {
                len.store(size, Ordering::Relaxed);
                place.store(start.addr(), Ordering::Release);
                return;
            }
        }
    }
    SMALL.fetch_add(size as u64, Ordering::Relaxed);
}

fn shrank(start: *mut u8, size: usize) {
    if size >= LARGE {
        for (place, _) in &PLACES {
            if place.load(Ordering::Relaxed) == start.addr() {
                place.store(0, Ordering::Release);
                return;
            }
        }
    }
    SMALL.fetch_sub(size as u64, Ordering::Relaxed);
}

// SAFETY: everything is the system allocator's, with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is the same.
        let start = unsafe { System.alloc(layout) };
        grew(start, layout.size());
        start
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        let start = unsafe { System.alloc_zeroed(layout) };
        grew(start, layout.size());
        start
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        shrank(ptr, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        shrank(ptr, layout.size());
        // SAFETY: as above.
        let start = unsafe { System.realloc(ptr, layout, new_size) };
        if start.is_null() {
            grew(ptr, layout.size());
        } else {
            grew(start, new_size);
        }
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone::alone;

    #[global_allocator]
    static HEAP: Counting = Counting;

    #[test]
    fn memory_counts_when_it_is_touched() {
        const PAGES: usize = 8192;
        let _alone = alone();
        let before = mark().unwrap();
        // Larger than what the system's allocator would recycle.
        let mut memory = vec![0u8; PAGES * PAGE];
        let range = memory.as_ptr_range();
        let range = range.start.addr()..range.end.addr();
        let made = before.made();
        let made = made.large.iter().filter(|it| **it == range).count();
        assert_eq!(made, 1);
        let (few, at) = (resident(&range).unwrap(), 100 * PAGE);
        assert!(few <= 2 * PAGE as u64, "{few}");
        memory[at..at + 50 * PAGE].fill(1);
        let grown = resident(&range).unwrap() - few;
        assert!((49..=52).contains(&(grown / PAGE as u64)), "{grown}");
        drop(std::hint::black_box(memory));
        assert!(large().all(|it| it != range));
    }

    #[test]
    fn what_is_small_counts_at_once() {
        let _alone = alone();
        let before = mark().unwrap();
        let small: Vec<_> = (0..1000).map(|_| vec![0u8; 10_000]).collect();
        // Other tests allocate and free a little meanwhile.
        assert!(before.made().resident().unwrap() > 9_000_000);
        drop(small);
    }
}
