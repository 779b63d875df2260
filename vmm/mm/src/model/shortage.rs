//! Memory that does not suffice: a limit, and a host that refuses.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::super::soft::SoftMemory;
use super::super::*;
use super::FRAMES;

/// How much memory there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shortage {
    /// Frames that may have memory.
    limit: u64,
    /// Which of each 64 requests to the host it refuses, by their bits.
    refused: u64,
}

impl Shortage {
    /// More than anybody needs.
    pub(super) const NONE: Self = Self {
        limit: FRAMES,
        refused: 0,
    };

    /// A pool with so much memory.
    pub(super) fn pool(self, huge: Order) -> (Arc<FramePool>, Arc<SoftMemory>) {
        let memory = SoftMemory::new(FRAMES);
        let host = Arc::new(Host {
            memory: Arc::clone(&memory),
            refused: AtomicU64::new(0),
        });
        let bytes = Arc::clone(&host) as Arc<dyn FrameMemory>;
        let pool = FramePool::with_folios_of(huge, bytes, FRAMES, self.limit).unwrap();
        host.refused.store(self.refused, Ordering::Relaxed);
        (pool, memory)
    }

    /// What came of an operation: nothing, if there was no memory for it. There must have been a shortage
    /// then.
    pub(super) fn result<T, E: Error>(self, result: Result<T, E>) -> Option<T> {
        result
            .inspect_err(|error| {
                let is_memory = error.to_string().contains("out of memory")
                    || error
                        .source()
                        .is_some_and(|cause| cause.to_string().contains("out of memory"));
                assert!(is_memory && self != Self::NONE, "{error}");
            })
            .ok()
    }
}

/// From what suffices for most down to hardly any, and hosts that refuse nothing, now and then, or most of
/// the time.
pub(super) fn shortage(pages: u64) -> BoxedStrategy<Shortage> {
    let limit = prop_oneof![Just(FRAMES), (pages..8 * pages), (0..2 * pages),];
    let refused = prop_oneof![
        2 => Just(0),
        1 => any::<u64>().prop_flat_map(|a| any::<u64>().prop_map(move |b| a & b)),
        1 => any::<u64>(),
    ];
    (limit, refused)
        .prop_map(|(limit, refused)| Shortage { limit, refused })
        .boxed()
}

struct Host {
    memory: Arc<SoftMemory>,
    refused: AtomicU64,
}

impl Host {
    fn ask(&self) -> io::Result<()> {
        let pattern = self.refused.load(Ordering::Relaxed);
        self.refused
            .store(pattern.rotate_right(1), Ordering::Relaxed);
        if pattern & 1 == 0 {
            Ok(())
        } else {
            Err(io::ErrorKind::OutOfMemory.into())
        }
    }
}

impl FrameMemory for Host {
    fn commit(&self, _first: Pfn, _count: u64) -> io::Result<()> {
        self.ask()
    }
    fn copy(&self, from: Pfn, to: Pfn) {
        self.memory.copy(from, to);
    }
    fn zero(&self, frame: Pfn) {
        self.memory.zero(frame);
    }
    fn equal(&self, one: Pfn, other: Pfn) -> bool {
        self.memory.equal(one, other)
    }
    fn write(&self, frame: Pfn, offset: u64, bytes: &[u8]) {
        self.memory.write(frame, offset, bytes);
    }
    fn uncommit(&self, first: Pfn, count: u64) -> io::Result<()> {
        self.ask()?;
        self.memory.uncommit(first, count)
    }
}
