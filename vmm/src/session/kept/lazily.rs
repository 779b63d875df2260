//! How a snapshot is loaded: all of it before the guest runs, or what it uses as it uses it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use palimpsest::causes::chain;
use palimpsest::kept::{Chunks, Prefetcher};
use palimpsest::memory::Frames;
use palimpsest::mm::BackedRegions;

use crate::session::report::LoadCounts;

/// When memory is read that was saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Lazy {
    /// As the guest uses it, where that is right; else before it runs
    #[default]
    Auto,
    /// As the guest uses it; if that is not right here, not at all
    Always,
    /// All of it before the guest runs
    Never,
}

/// What is read before the guest wants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Prefetch {
    /// What earlier loads have wanted, in that order
    #[default]
    Earlier,
    /// That, and then all the rest
    All,
    /// Nothing
    None,
}

impl fmt::Display for Lazy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
}

/// How a snapshot is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loading {
    /// When its memory is read.
    pub lazy: Lazy,
    /// What of it before somebody wants it.
    pub prefetch: Prefetch,
}

/// A load that goes on while the guest runs.
#[derive(Debug)]
pub(in crate::session) struct Going {
    chunks: Arc<Chunks>,
    /// What was there to be prefetched, until that begins.
    backed: Option<BackedRegions>,
    prefetch: Prefetch,
    prefetcher: Option<Prefetcher>,
}

impl Going {
    pub(super) fn new(chunks: Arc<Chunks>, backed: BackedRegions, prefetch: Prefetch) -> Self {
        Self {
            chunks,
            backed: Some(backed),
            prefetch,
            prefetcher: None,
        }
    }

    /// Begins to prefetch, now that the guest runs. Says why not, in words, if it cannot.
    pub(in crate::session) fn prefetch(&mut self, frames: &Frames) -> Result<(), String> {
        let Some(backed) = self.backed.take() else {
            return Ok(());
        };
        let mut order = match self.prefetch {
            Prefetch::None => return Ok(()),
            Prefetch::Earlier | Prefetch::All => self.chunks.kept().touched(),
        };
        if self.prefetch == Prefetch::All {
            // What is there twice is brought once.
            order.extend(backed.iter().map(|region| region as u32));
        }
        if order.is_empty() {
            return Ok(());
        }
        let started = Prefetcher::start(backed, order, frames);
        self.prefetcher = Some(
            started.map_err(|error| format!("cannot prefetch what earlier runs used: {error}"))?,
        );
        Ok(())
    }

    /// Ends it: nothing is prefetched any more, what this run has wanted is noted for the next, and `counts` are told.
    pub(in crate::session) fn finish(mut self, counts: &mut LoadCounts) {
        self.prefetcher = None;
        let brought = self.chunks.counts();
        let seconds = |time: Duration| time.as_secs_f64();
        counts.by_vcpus = brought.by_vcpus;
        counts.by_host = brought.by_host;
        counts.by_readers = brought.by_readers;
        counts.prefetched = brought.ahead;
        counts.waited_s = seconds(brought.waited);
        counts.waited_most_s = seconds(brought.waited_most);
        self.note_touched();
    }

    /// Advice for the next load. It does not matter if it cannot be kept, as in a store that is read-only.
    fn note_touched(&self) {
        let kept = self.chunks.kept();
        let (touched, before) = (self.chunks.touched(), kept.touched());
        let order: Vec<u32> = touched.into_iter().chain(before.iter().copied()).collect();
        if order.iter().all(|region| before.contains(region)) {
            return;
        }
        if let Err(error) = kept.note_touched(&order) {
            tracing::debug!(error = chain(&error), "what was used is not noted");
        }
    }
}
