//! Memory that does not suffice: a limit of the pool or of some accounts, and a host that refuses.

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
    quota: Option<Quota>,
}

/// What some accounts may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Quota {
    frames: u64,
    /// Which spaces have a limit, of those with an account of their own, in the order they are made in.
    limited: u64,
    /// Which have the account of the space that was made before them.
    sharing: u64,
}

impl Shortage {
    /// More than anybody needs.
    pub(super) const NONE: Self = Self {
        limit: FRAMES,
        refused: 0,
        quota: None,
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

    /// What space `nth` of all that are ever made has: whether it has the account of the one before it, and
    /// if not, its own shortage and limit.
    pub(super) fn of_space(self, nth: u64) -> Option<(Self, Option<u64>)> {
        let is_in = |set: u64| set >> (nth % 64) & 1 != 0;
        match self.quota {
            Some(quota) if nth > 0 && is_in(quota.sharing) => None,
            Some(quota) if is_in(quota.limited) => Some((self, Some(quota.frames))),
            _ => Some((
                Self {
                    quota: None,
                    ..self
                },
                None,
            )),
        }
    }

    /// What came of an operation of a space: nothing, if there was no memory for it, or its account was at
    /// its limit. There must have been a shortage then.
    pub(super) fn result<T, E: Error>(self, result: Result<T, E>) -> Option<T> {
        result
            .inspect_err(|error| {
                let says = |what| {
                    let cause = error.source().map(|cause| cause.to_string());
                    error.to_string().contains(what) || cause.is_some_and(|c| c.contains(what))
                };
                let is_short = (self.limit, self.refused) != (FRAMES, 0);
                assert!(
                    says("out of memory") && is_short
                        || says("out of quota") && self.quota.is_some(),
                    "{error}"
                );
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
        .prop_map(|(limit, refused)| Shortage {
            limit,
            refused,
            quota: None,
        })
        .boxed()
}

/// More memory than anybody needs, and limits for some accounts: from what suffices down to nothing.
pub(super) fn quotas(pages: u64) -> BoxedStrategy<Shortage> {
    let frames = prop_oneof![(pages..4 * pages), (0..2 * pages)];
    (frames, any::<u64>(), any::<u64>(), any::<u64>())
        .prop_map(|(frames, limited, a, b)| Shortage {
            quota: Some(Quota {
                frames,
                limited,
                sharing: a & b,
            }),
            ..Shortage::NONE
        })
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
