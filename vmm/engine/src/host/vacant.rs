//! Addresses at which nothing is mapped, kept for a window that has nothing to show yet.
//!
//! Whatever is mapped over other mappings takes those away first, and the kernel has every KVM of the process
//! forget what it knew of them. Where KVM makes the guest's page tables itself it looks through all pages of the
//! memslot for that, though none of them was ever used: 0.1 ms for each GiB, most of what a clone takes in a shell
//! (`kvm_mmu_notifier_invalidate_range_start` in `virt/kvm/kvm_main.c`, `slot_rmap_walk_*` in
//! `arch/x86/kvm/mmu/mmu.c`). Where nothing was mapped, nothing is taken away.
//!
//! But addresses at which nothing is mapped are anybody's. So they are where the kernel gives none to who does not
//! ask for just these: it goes from the top downwards, and this is far below. And what is mapped there is mapped
//! without replacing anything: somebody who is there all the same keeps what he has, and the window cannot be used.
#![expect(unsafe_code, reason = "tries whether addresses are free")]

use std::collections::BTreeMap;
use std::io;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, munmap};

use super::aligned::HUGE_PAGE;
use super::syscalls::mmap_anonymous;

/// Above what programs that must be low have, and below programs that may be anywhere, their heaps, and all that
/// the kernel chooses the address of.
const FIRST: usize = 0x2000_0000_0000;
const END: usize = 0x5000_0000_0000;

/// What this process has of them: where each range begins and ends.
static KEPT: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

fn kept() -> MutexGuard<'static, BTreeMap<usize, usize>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A range that nobody else in this process is given. Dropping it gives it back; by then nothing of its owner's is
/// mapped there.
#[derive(Debug)]
pub(super) struct Vacant {
    start: usize,
}

impl Vacant {
    /// `len` bytes, aligned to 2 MiB, and nothing beside them.
    ///
    /// # Errors
    /// If there are none, or the host refuses to look.
    pub(super) fn find(len: u64) -> io::Result<Self> {
        let align = HUGE_PAGE as usize;
        let len = (len as usize).next_multiple_of(align);
        let mut kept = kept();
        let mut start = FIRST;
        while start.checked_add(len).is_some_and(|end| end <= END) {
            // The last range that begins before this one would end.
            let in_the_way = kept.range(..start + len).next_back();
            match in_the_way.filter(|&(_, &end)| end > start) {
                Some((_, &end)) => start = end,
                None if is_free(start, len)? => {
                    // A page beyond, so that no mapping of two windows is one.
                    kept.insert(start, start + len + align);
                    return Ok(Self { start });
                }
                None => start += len,
            }
        }
        Err(io::ErrorKind::OutOfMemory.into())
    }

    pub(super) fn start(&self) -> usize {
        self.start
    }
}

impl Drop for Vacant {
    fn drop(&mut self) {
        kept().remove(&self.start);
    }
}

/// Whether nothing is mapped there.
fn is_free(start: usize, len: usize) -> io::Result<bool> {
    let at = ptr::with_exposed_provenance_mut(start);
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: a mapping that replaces nothing, and which nobody else knows of.
    let made = match unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) } {
        Ok(made) => made,
        Err(Errno::EXIST) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    // SAFETY: the mapping just made.
    unsafe { munmap(made, len) }?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overlap_and_are_given_again() {
        let len = 5 * HUGE_PAGE + 4096;
        let ranges: Vec<_> = (0..8).map(|_| Vacant::find(len).unwrap()).collect();
        let mut starts: Vec<_> = ranges.iter().map(Vacant::start).collect();
        assert!(starts.iter().all(|start| start % HUGE_PAGE as usize == 0));
        starts.sort_unstable();
        assert!(starts.windows(2).all(|two| two[1] - two[0] > len as usize));
        let middle = starts[3];
        drop(ranges.into_iter().filter(|range| range.start() == middle));
        assert!(Vacant::find(u64::MAX / 2).is_err());
    }

    #[test]
    fn where_something_is_mapped_is_no_range() {
        let free = Vacant::find(HUGE_PAGE).unwrap();
        let at = ptr::with_exposed_provenance_mut(free.start());
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: addresses that were free just now.
        let made = unsafe { mmap_anonymous(at, 4096, ProtFlags::empty(), flags) }.unwrap();
        assert!(!is_free(free.start(), HUGE_PAGE as usize).unwrap());
        // SAFETY: what was mapped just now.
        unsafe { munmap(made, 4096) }.unwrap();
        assert!(is_free(free.start(), HUGE_PAGE as usize).unwrap());
    }
}
