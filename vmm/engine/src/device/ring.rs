//! The virtqueue of a device, pinned while it is looked at.
//!
//! `virtio-queue` reaches the ring through pins of its own, one an access. Holding the whole ring around them
//! makes sure that none of these can fail halfway, where the crate would not say why: what lacks memory lacks
//! it before anything is taken or published.

use virtio_queue::desc::RawDescriptor;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueState, QueueT};

use crate::host::{PinnedBuffer, Ram, RamError};
use crate::mm::Access;

// Virtio 1.2, 2.7: each ring has two 16-bit words before its entries and one after them.
const RING_WORDS: u64 = 3 * 2;
const AVAIL_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;

/// Where a virtqueue lies in guest memory, as virtio 1.2, 2.7, has its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// How many descriptors: a power of two, 32768 at most.
    pub size: u16,
    /// The gpa of the descriptor table.
    pub descriptors: u64,
    /// The gpa of the available ring.
    pub available: u64,
    /// The gpa of the used ring.
    pub used: u64,
}

/// A device's side of its virtqueue.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
}

/// Why nothing was taken.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The available ring says that there are more chains than it has room for.
    #[error("the available ring has more entries than descriptors")]
    Nonsense,
    /// The ring could not be pinned.
    #[error("cannot pin the ring")]
    Pin(#[from] RamError),
}

impl Ring {
    /// The ring that lies as `layout` says, empty.
    ///
    /// # Errors
    /// If its size is no power of two, or its parts are not aligned, or not all in guest memory.
    pub fn new(ram: &Ram, layout: RingLayout) -> Result<Self, Error> {
        let state = QueueState {
            max_size: layout.size,
            size: layout.size,
            ready: true,
            desc_table: layout.descriptors,
            avail_ring: layout.available,
            used_ring: layout.used,
            ..QueueState::default()
        };
        Self::from_state(ram, state)
    }

    /// The ring that `state` describes. `state` is not trusted.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn from_state(ram: &Ram, state: QueueState) -> Result<Self, Error> {
        let queue = Queue::try_from(state)?;
        if queue.is_valid(ram) {
            Ok(Self { queue })
        } else {
            Err(Error::QueueNotReady)
        }
    }

    /// What a snapshot keeps of it.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Calls `each` with the next chains of the available ring, at most `most`. Says how many they were.
    ///
    /// # Errors
    /// If the ring makes no sense, or cannot be pinned.
    pub fn take(
        &mut self,
        ram: &Ram,
        most: usize,
        each: impl FnMut(DescriptorChain<&Ram>),
    ) -> Result<usize, RingError> {
        let size = u64::from(self.queue.size());
        let descriptors = size_of::<RawDescriptor>() as u64 * size;
        let _descriptors = ram.pin(self.queue.desc_table(), descriptors, Access::Read)?;
        let avail = RING_WORDS + AVAIL_ENTRY * size;
        let _avail = ram.pin(self.queue.avail_ring(), avail, Access::Read)?;
        let before = self.queue.next_avail();
        let chains = self.queue.iter(ram).map_err(|_| RingError::Nonsense)?;
        chains.take(most).for_each(each);
        let taken = self.queue.next_avail().wrapping_sub(before);
        Ok(taken.into())
    }

    /// Gives the last `count` chains that were taken back to the available ring. They must not be more than
    /// were taken and not completed.
    pub fn give_back(&mut self, count: usize) {
        let next = self.queue.next_avail().wrapping_sub(count as u16);
        self.queue.set_next_avail(next);
    }

    /// Goes on behind entry `next_avail` of the available ring, whatever was taken.
    pub fn go_on_at(&mut self, next_avail: u16) {
        self.queue.set_next_avail(next_avail);
    }

    /// Pins the used ring, as [`Ring::complete`] needs it.
    ///
    /// # Errors
    /// If it cannot be pinned.
    pub fn pin_used(&self, ram: &Ram) -> Result<UsedRing, RamError> {
        let len = RING_WORDS + USED_ENTRY * u64::from(self.queue.size());
        let pinned = ram.pin(self.queue.used_ring(), len, Access::Write)?;
        Ok(UsedRing { _pinned: pinned })
    }

    /// Puts the chain that begins at `head` into the used ring, with `len` bytes written. Whatever this
    /// thread wrote before is seen by a guest that sees the entry: the index is stored with release.
    ///
    /// A head that is no descriptor at all cannot be completed, and is passed over.
    pub fn complete(&mut self, ram: &Ram, _used: &UsedRing, head: u16, len: u32) {
        if head < self.queue.size()
            && let Err(error) = self.queue.add_used(ram, head, len)
        {
            // The ring is pinned, and was checked to be in memory.
            tracing::error!(%error, head, "a request could not be completed");
        }
    }
}

/// The used ring, held.
#[derive(Debug)]
pub struct UsedRing {
    _pinned: PinnedBuffer,
}
