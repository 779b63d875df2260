//! The KVM layer's view of guest memory.

#![expect(
    unsafe_code,
    reason = "who says that a range of host memory is the guest's"
)]

use std::any::Any;
use std::ptr::{self, NonNull};
use std::time::Duration;

use crate::causes::Cause;
use crate::host::{Ram, Window};
use crate::mm::{Access, Gfn, Resolution, Touch};

/// What the KVM layer needs of guest memory.
///
/// Addresses are guest-physical; memory begins at 0 and has no holes. vCPUs reach it through the window that
/// the memslot points at, not through this.
pub trait GuestRam: Send + Sync {
    /// Bytes of guest memory.
    fn len(&self) -> u64;

    /// Whether there is no guest memory at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes the page at guest frame `gfn` writable for the guest: a vCPU faulted writing it. `false` if it
    /// was writable already, because somebody else was first.
    ///
    /// # Errors
    /// If there is no such page, or no memory for its copy. The vCPU ends.
    fn write_fault(&self, gfn: u64) -> Result<bool, Cause>;

    /// Shows the page at guest frame `gfn` to the guest: a vCPU has touched it. `false` if it was shown already, as all
    /// of memory is that is not loaded lazily.
    ///
    /// # Errors
    /// If there is no such page, or what is to be there cannot be had. The vCPU ends.
    fn touch(&self, _gfn: u64) -> Result<bool, Cause> {
        Ok(false)
    }

    /// How many regions of 2 MiB are hidden from the guest, which becomes less and never more. 0 of memory that is not
    /// loaded lazily.
    fn hidden(&self) -> u64 {
        0
    }

    /// The first guest frame that is hidden, of those from `from` on and those beside it. None if none is, as in
    /// memory that is not loaded lazily.
    fn first_hidden(&self, _from: u64) -> Option<u64> {
        None
    }

    /// Notes that a vCPU was in the guest for so long, from entry to exit: the shortest time is what entry
    /// and exit cost.
    fn was_entered(&self, _time: Duration) {}

    /// Notes that a vCPU's write fault took so long from its exit to where it can enter again, decoding and
    /// registers included.
    fn was_handled(&self, _time: Duration) {}

    /// Pins the `len` bytes at `gpa` for writing, until what is returned is dropped: the hypervisor writes
    /// there behind everybody's back. Memory that has no pins says so; then the guest cannot have the
    /// hypervisor write.
    ///
    /// # Errors
    /// If the bytes are not all guest memory, or cannot be pinned.
    fn pin(&self, _gpa: u64, _len: u64) -> Result<Box<dyn Any + Send>, Cause> {
        Err("this memory cannot be pinned".into())
    }

    /// Copies guest memory at `gpa` out, as a transient reader.
    ///
    /// # Errors
    /// If the bytes are not all guest memory.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause>;

    /// Copies `buf` into guest memory at `gpa`.
    ///
    /// # Errors
    /// If the bytes are not all guest memory, or there is no memory for a copy.
    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause>;
}

impl GuestRam for Ram {
    fn len(&self) -> u64 {
        self.size()
    }

    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        Ok(Self::write_fault(self, Gfn(gfn))? != Resolution::AlreadyWritable)
    }

    fn touch(&self, gfn: u64) -> Result<bool, Cause> {
        Ok(Self::touch(self, Gfn(gfn))? == Touch::Shown)
    }

    fn hidden(&self) -> u64 {
        Self::hidden(self)
    }

    fn first_hidden(&self, from: u64) -> Option<u64> {
        Self::first_hidden(self, Gfn(from)).map(|gfn| gfn.0)
    }

    fn was_entered(&self, time: Duration) {
        self.prices().entered(time);
    }

    fn was_handled(&self, time: Duration) {
        self.prices().handled(time);
    }

    fn pin(&self, gpa: u64, len: u64) -> Result<Box<dyn Any + Send>, Cause> {
        Ok(Box::new(Self::pin(self, gpa, len, Access::Write)?))
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        Ok(Self::read(self, gpa, buf)?)
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        Ok(Self::write(self, gpa, buf)?)
    }
}

/// Host memory that a guest has as its own, from gpa 0: what a memslot points at.
///
/// # Safety
/// For as long as the value lives the range is mapped, and is the guest's: no Rust reference points into it,
/// and nothing else than guest memory is mapped there. Protections and the pages behind it may change at any
/// time.
pub unsafe trait Memslot: Send + Sync {
    /// The first byte, at a page boundary.
    fn host_address(&self) -> NonNull<u8>;

    /// Bytes, a multiple of the page size.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Not of one at guest addresses, which begins at 0: [`vm`](crate::vm) refuses it.
// SAFETY: a window owns its range, which is unmapped when it is dropped, hands out no references into it, and
// changes it only as an MMU does.
unsafe impl Memslot for Window {
    fn host_address(&self) -> NonNull<u8> {
        let address = ptr::with_exposed_provenance_mut(Self::host_address(self) as usize);
        NonNull::new(address).expect("a window at guest addresses is no memslot")
    }

    fn len(&self) -> u64 {
        Self::len(self)
    }
}
