//! What `mm` asks of the outside: an MMU for each address space, and bytes for the frames.

use std::io;
use std::sync::Arc;

use super::addr::{Gfn, Pfn, Protection};

/// What vCPUs go through to reach frames: the window of a running VM, or a software model of one.
///
/// When a call returns, every vCPU sees its effect: flushing is implied.
///
/// **A call that fails has changed nothing, or says [`MmuError::Torn`].** Then each page of its range shows
/// what it did, or what it was to show, or cannot be reached at all; nobody knows which. A host that changes
/// mappings one after the other does so when the last one is too many. What becomes of it is the caller's to
/// decide (`mapped`): the same call may be tried again, and so may one that undoes it.
///
/// To show pages with less right than asked is safe for everybody but the vCPU, which faults and faults; to
/// show more is safe for nobody. So an implementation that is not sure says `Torn`.
pub trait Mmu: Send + Sync {
    /// Maps `count` pages from `first` on to the frames from `frame` on, one after the other. With
    /// [`Pfn::ZERO`] all of them read as zeros; `protection` is read-only then.
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError>;

    /// Changes the protection of `count` pages from `first` on that are mapped. Those of them that are hidden stay
    /// hidden.
    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError>;

    /// Hides `count` pages from `first` on: vCPUs see nothing there, so that a touch, a read too, is a fault. An MMU
    /// that cannot refuses; then there are no clones of what is backed.
    fn hide(&self, first: Gfn, count: u64) -> Result<(), MmuError> {
        Err(MmuError::Host {
            what: "hide",
            first,
            count,
            source: io::ErrorKind::Unsupported.into(),
        })
    }

    /// Whether mappings are running short, so that whole regions should be resolved at once: neighbours
    /// that are alike need one mapping between them.
    fn is_crowded(&self) -> bool {
        false
    }
}

/// For who looks at the MMU beside the address space that has it.
impl<M: Mmu + ?Sized> Mmu for Arc<M> {
    fn map(&self, first: Gfn, frame: Pfn, count: u64, to: Protection) -> Result<(), MmuError> {
        (**self).map(first, frame, count, to)
    }

    fn protect(&self, first: Gfn, count: u64, to: Protection) -> Result<(), MmuError> {
        (**self).protect(first, count, to)
    }

    fn hide(&self, first: Gfn, count: u64) -> Result<(), MmuError> {
        (**self).hide(first, count)
    }

    fn is_crowded(&self) -> bool {
        (**self).is_crowded()
    }
}

/// Why an [`Mmu`] could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum MmuError {
    /// The host allows a process only so many mappings. Nothing has changed.
    #[error(
        "the window needs more than {limit} memory mappings: raise vm.max_map_count (sysctl -w \
         vm.max_map_count=262144)"
    )]
    MappingLimit {
        /// How many this process may use for windows.
        limit: u64,
    },
    /// The host refused. Nothing has changed.
    #[error("cannot {what} {count} pages of the window from {first:?} on")]
    Host {
        /// What was tried.
        what: &'static str,
        /// First page.
        first: Gfn,
        /// How many.
        count: u64,
        /// The host's reason.
        source: io::Error,
    },
    /// The host refused when it had changed some of the pages, or may have.
    #[error(
        "cannot {what} all of {count} pages of the window from {first:?} on, and some are changed"
    )]
    Torn {
        /// What was tried.
        what: &'static str,
        /// First page.
        first: Gfn,
        /// How many.
        count: u64,
        /// The host's reason.
        source: io::Error,
    },
    /// A change could be neither finished nor undone, now or before: the guest may not see what it should,
    /// and must not run on.
    #[error("the window cannot be put right: this virtual machine must not run on")]
    Broken {
        /// The change.
        #[source]
        cause: Arc<MmuError>,
    },
}

impl MmuError {
    /// Whether some of the range may have changed.
    pub fn is_torn(&self) -> bool {
        matches!(self, Self::Torn { .. })
    }
}

/// Huge folios' worth of memory that is asked for at a time at most, where somebody needs less: where memory is
/// cheap, most of what it costs to make it huge is for the call.
pub const MOST_FOLIOS_AT_ONCE: u64 = 8;

/// The bytes behind the frames.
pub trait FrameMemory: Send + Sync {
    /// Makes sure that `count` frames from `first` on have memory behind them. Frames that had none read as
    /// zeros.
    fn commit(&self, first: Pfn, count: u64) -> io::Result<()>;

    /// As [`FrameMemory::commit`], for frames that nobody will map by huge entries of an MMU's: in base
    /// pages, since to make a huge one takes the host milliseconds while all CPUs are busy.
    fn commit_base_pages(&self, first: Pfn, count: u64) -> io::Result<()> {
        self.commit(first, count)
    }

    /// How many folios it is asked for at a time at most by somebody who needs one just now: as many as do not take
    /// much longer than that one.
    fn folios_at_once(&self) -> u64 {
        MOST_FOLIOS_AT_ONCE
    }

    /// Copies the frame `from` to the frame `to`. Nobody writes to either meanwhile, except a device that
    /// was not stopped and holds a pin on `from`: the copy may be torn then, and nothing else.
    fn copy(&self, from: Pfn, to: Pfn);

    /// Copies the `count` frames from `from` on to those from `to` on, as [`FrameMemory::copy`]. The two do
    /// not overlap.
    fn copy_run(&self, from: Pfn, to: Pfn, count: u64) {
        for (from, to) in from.run(count).zip(to.run(count)) {
            self.copy(from, to);
        }
    }

    /// Copies many frames to many others, each as by [`FrameMemory::copy`], in any order. No frame is there
    /// twice.
    fn copy_all(&self, pairs: &[(Pfn, Pfn)]) {
        pairs.iter().for_each(|&(from, to)| self.copy(from, to));
    }

    /// Fills a frame with zeros.
    fn zero(&self, frame: Pfn);

    /// Whether two frames hold the same bytes. Nobody writes to either meanwhile, or the answer means
    /// nothing.
    fn equal(&self, one: Pfn, other: Pfn) -> bool;

    /// Writes `bytes` into a frame, from byte `offset` on. They end within the frame.
    fn write(&self, frame: Pfn, offset: u64, bytes: &[u8]);

    /// Takes the memory behind `count` frames away again: they must be committed before they are used.
    fn uncommit(&self, first: Pfn, count: u64) -> io::Result<()>;
}
