//! The virtqueue of a device, pinned while it is looked at.
//!
//! `virtio-queue` reaches the ring through pins of its own, one an access. Holding the whole ring around them
//! makes sure that none of these can fail halfway, where the crate would not say why: what lacks memory lacks
//! it before anything is taken or published.

use guest::abi::{AREA_AVAIL, AREA_DESC, AREA_USED, QUEUE_SIZE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueState, QueueT};

use crate::host::{PinnedBuffer, Ram, RamError};
use crate::mm::{Access, CowPolicy};

// Virtio 1.2, 2.7: each ring has two 16-bit words before its entries and one after them.
const RING_WORDS: u64 = 3 * 2;
const AVAIL_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;

/// A device's side of its virtqueue.
pub(super) struct Ring {
    queue: Queue,
}

/// Why nothing was taken.
#[derive(Debug)]
pub(super) enum TakeError {
    /// The available ring says that there are more chains than it has room for.
    Nonsense,
    /// The ring could not be pinned.
    Pin(RamError),
}

impl From<RamError> for TakeError {
    fn from(error: RamError) -> Self {
        Self::Pin(error)
    }
}

impl Ring {
    /// The ring at the beginning of the device area at `area`, empty.
    pub(super) fn new<P: CowPolicy>(ram: &Ram<P>, area: u64) -> Result<Self, Error> {
        let state = QueueState {
            max_size: QUEUE_SIZE,
            size: QUEUE_SIZE,
            ready: true,
            desc_table: area + AREA_DESC,
            avail_ring: area + AREA_AVAIL,
            used_ring: area + AREA_USED,
            ..QueueState::default()
        };
        Self::from_state(ram, state)
    }

    /// The ring that `state` describes. `state` is not trusted.
    pub(super) fn from_state<P: CowPolicy>(ram: &Ram<P>, state: QueueState) -> Result<Self, Error> {
        let queue = Queue::try_from(state)?;
        if queue.is_valid(ram) {
            Ok(Self { queue })
        } else {
            Err(Error::QueueNotReady)
        }
    }

    /// What a snapshot keeps of it.
    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Calls `each` with the next chains of the available ring, at most `most`. Says how many they were.
    pub(super) fn take<P: CowPolicy>(
        &mut self,
        ram: &Ram<P>,
        most: usize,
        each: impl FnMut(DescriptorChain<&Ram<P>>),
    ) -> Result<usize, TakeError> {
        let size = u64::from(self.queue.size());
        let descriptors = size_of::<RawDescriptor>() as u64 * size;
        let _descriptors = ram.pin(self.queue.desc_table(), descriptors, Access::Read)?;
        let avail = RING_WORDS + AVAIL_ENTRY * size;
        let _avail = ram.pin(self.queue.avail_ring(), avail, Access::Read)?;
        let before = self.queue.next_avail();
        let chains = self.queue.iter(ram).map_err(|_| TakeError::Nonsense)?;
        chains.take(most).for_each(each);
        let taken = self.queue.next_avail().wrapping_sub(before);
        Ok(taken.into())
    }

    /// Gives the last `count` chains that were taken back to the available ring.
    pub(super) fn give_back(&mut self, count: usize) {
        let next = self.queue.next_avail().wrapping_sub(count as u16);
        self.queue.set_next_avail(next);
    }

    /// Goes on behind entry `next_avail` of the available ring, whatever was taken.
    pub(super) fn go_on_at(&mut self, next_avail: u16) {
        self.queue.set_next_avail(next_avail);
    }

    /// Pins the used ring, as [`Ring::complete`] needs it.
    pub(super) fn pin_used<P: CowPolicy>(&self, ram: &Ram<P>) -> Result<UsedRing, RamError> {
        let len = RING_WORDS + USED_ENTRY * u64::from(self.queue.size());
        let pinned = ram.pin(self.queue.used_ring(), len, Access::Write)?;
        Ok(UsedRing { _pinned: pinned })
    }

    /// Puts the chain that begins at `head` into the used ring, with `len` bytes written. Whatever this thread
    /// wrote before is seen by a guest that sees the entry: the index is stored with release.
    ///
    /// A head that is no descriptor at all cannot be completed, and is passed over.
    pub(super) fn complete<P: CowPolicy>(
        &mut self,
        ram: &Ram<P>,
        _used: &UsedRing,
        head: u16,
        len: u32,
    ) {
        if head < self.queue.size()
            && let Err(error) = self.queue.add_used(ram, head, len)
        {
            // The ring is pinned, and was checked to be in memory.
            tracing::error!(%error, head, "a request could not be completed");
        }
    }
}

/// The used ring, held.
pub(super) struct UsedRing {
    _pinned: PinnedBuffer,
}
