//! Which frames have memory.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::mm::Pfn;

/// Which frames have memory, a bit each.
///
/// Nothing is ordered by them: whoever has a frame has it from who gave it memory, by the pool's lock.
#[derive(Debug)]
pub(super) struct Backed {
    words: Box<[AtomicU64]>,
    pub(super) frames: u64,
}

impl Backed {
    pub(super) fn none(frames: u64) -> Self {
        Self {
            words: (0..frames.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            frames,
        }
    }

    /// The words that the bits of a run lie in, and a mask of these bits in each. Frames beyond the end are
    /// left out.
    #[inline]
    fn words(&self, first: Pfn, count: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let end = first.0.saturating_add(count).min(self.frames);
        let mut at = first.0;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let (word, bit) = (at / 64, at % 64);
                let bits = (64 - bit).min(end - at);
                at += bits;
                (&self.words[word as usize], u64::MAX >> (64 - bits) << bit)
            })
        })
    }

    pub(super) fn set(&self, first: Pfn, count: u64) {
        for (word, mask) in self.words(first, count) {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    pub(super) fn clear(&self, first: Pfn, count: u64) {
        for (word, mask) in self.words(first, count) {
            word.fetch_and(!mask, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(super) fn are_all(&self, first: Pfn, count: u64) -> bool {
        let is_inside = first
            .0
            .checked_add(count)
            .is_some_and(|end| end <= self.frames);
        let mut words = self.words(first, count);
        is_inside && words.all(|(word, mask)| word.load(Ordering::Relaxed) & mask == mask)
    }
}
