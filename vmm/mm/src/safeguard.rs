//! The orderings and re-checks that the protocol rests on, by name.
//!
//! Each can be left out where a model checker compiles this (`Safeguard::leave_out`). `tests/loom` leaves out
//! one after the other: each time loom must find a race that ends badly. `docs/protocol.md` has the table of
//! which race that is.

/// Something that must be done, or be done in this order, for a race to end well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Safeguard {
    /// `pin.rs`: a pin taken without a lock reads its entry again. Partner: the frame leaves the page and
    /// becomes another's, exclusive again, between the first look and the pin.
    PinRereadsEntry,
    /// `frame.rs`: the compare-and-swap that takes a pin acquires. Partner: the release of whoever gave
    /// the frame's mapping back after it changed the entry; without, the re-read may still see the old entry.
    PinAcquires,
    /// `frame.rs`: a pin is granted by the bit *in the word that it changes*. Partner: fork clearing the bit.
    PinTestsInTheWord,
    /// `frame.rs`: a frame is shared by the pin count *in the word that it changes*. Partner: a pin.
    ShareTestsInTheWord,
    /// `frame.rs`: the compare-and-swap that shares a frame acquires. Partner: the release of a device that
    /// wrote the frame and let go of it; without, the child may be seen as it was before the device wrote,
    /// and later as after.
    ShareAcquires,
    /// `get.rs`: a hold taken without a lock reads its entry again. Partner: as for a pin.
    GetRereadsEntry,
    /// `frame.rs`: the compare-and-swap that takes a hold acquires. Partner: as for a pin.
    GetAcquires,
    /// `frame.rs`: a hold is only taken of a frame that something maps. Partner: the frame was freed after
    /// the first look at the entry; to give the hold back would free it once more.
    GetOnlyOfMapped,
    /// `fault.rs`: a fault looks at the entry under the region's lock. Partner: another fault on the page.
    FaultLooksUnderLock,
    /// `fault.rs`: a fault and a fork exclude each other. Partner: a fork, which takes over regions that have
    /// not changed, and protects runs of pages across them.
    FaultWaitsForFork,
    /// `fault.rs`: the copy is made before the MMU maps it. Partner: a vCPU that reads.
    CopiedBeforeMapped,
    /// `fault.rs`: the MMU is switched to the copy before the old frame's mapping is given back. Partner: the
    /// next to find itself the frame's last holder, who writes it while our vCPUs still read it.
    MmuBeforeUnmap,
    /// `fault.rs`: the entry is changed before the old frame's mapping is given back. Partner: a pin or a
    /// hold taken without a lock, whose re-read must see the change.
    EntryBeforeUnmap,
    /// `frame.rs`: giving a mapping back releases. Partner: the acquire of a pin or a hold
    /// ([`Safeguard::PinAcquires`] from the other side).
    UnmapReleases,
    /// `fault.rs`: the copy for the snapshots is held until all of them have it. Partner: the drop of the
    /// first.
    CopyIsHeld,
    /// `fault.rs`: after the snapshots have moved, the writer still must prove that it is the last. Partner:
    /// a reader that took a hold on the frame through a snapshot meanwhile.
    ReuseProvedAgain,
    /// `fork.rs`: pages are write-protected before any is shared or copied. Partner: a vCPU that was not
    /// stopped: the child would have its later write and not the earlier.
    ProtectedBeforeShared,
    /// `fork.rs`: a clone is made under the locks of its snapshot's regions. Partner: a break that moves the
    /// snapshot.
    CloneUnderLock,
    /// `migrate.rs`: the frame is made nobody's before it is copied. Partner: a pin or a hold taken without a
    /// lock.
    IsolatedBeforeCopy,
    /// `frame.rs`: a frame is isolated by the counts *in the word that it changes*. Partner: a pin.
    IsolateTestsInTheWord,
    /// `frame.rs`: the compare-and-swap that isolates a frame acquires. Partner: the release of a device that
    /// wrote the frame and let go of it; without, the frame may be copied as it was before.
    IsolateAcquires,
    /// `migrate.rs`: the MMU is write-protected before the frame is copied. Partner: a vCPU that writes.
    WritersStoppedBeforeCopy,
    /// `merge.rs`: contents are compared after both pages have stopped changing. Partner: a vCPU that writes.
    ComparedWhenStill,
    /// `merge.rs`: the locks of two address spaces are taken in one order. Partner: a merge the other way
    /// round.
    MergeLocksInOrder,
    /// `pool.rs`: memory goes back to the host before its frames are free. Partner: who allocates them next.
    UncommittedBeforeFree,
    /// `dirty.rs`: pins are counted in the frame's word by a read-modify-write, after the entry was cleaned.
    /// Partner: a pin for writing taken without a lock (the store-buffering pair of PROTOCOL.md 5.2: entry
    /// store and pin load against pin store and entry load).
    PinsCountedInOrder,
    /// `folio.rs`: who shares a folio, or takes it over, looks at its pages *after* it has changed, or noted,
    /// the folio's word. Partner: a hold on a page through a huge entry, which is counted in the page's word.
    FolioPagesLookedAt,
    /// `folio.rs`: a full barrier between the change of the folio's word and the look at its pages. Partner:
    /// the one between the count of a hold and the second look at the folio (the store-buffering pair of
    /// PROTOCOL.md 5.2).
    FolioBarrier,
    /// `folio.rs`: a hold on a page of a folio looks at the folio's word again after it was counted. Partner:
    /// fork, which cleared the bit before it looked at the pages.
    FolioLookedAtAgain,
    /// `folio.rs`: a folio's end takes the part mark off each frame's word by compare-and-swap. Partner: a
    /// hold that was begun on the folio that was in the same frames before, and is counted now and taken
    /// back.
    DissolvedInTheWord,
    /// `whole.rs`: a folio's mapping is given back after it was copied and the MMU was switched. Partner:
    /// another machine that finds itself the last to have the folio, and writes it.
    FolioLeftLast,
    /// `folio.rs`: who splits a huge entry counts the small ones before it gives the huge one back. Partner:
    /// another machine that has the folio by a huge entry, and asks whether it is the last.
    SplitCountsPagesFirst,
    /// `lent.rs`: what is lent is not moved. Partner: a break that would give a snapshot the copy whose frame
    /// a clone's window shows.
    LentStays,
    /// `lent.rs`: a loan whose regions have moved is not lent again. Partner: the next clone, which maps
    /// where they were.
    LoanEndsWithMove,
    /// `adopt.rs`: a region's mappings are counted before it is given back. Partner: a break that moves the
    /// snapshot as soon as nobody borrows it.
    AdoptedBeforeGivenBack,
    /// `get.rs`: who looks without a lock asks whether a page is borrowed before he reads its entry. Partner:
    /// who adopts it in between: it would be taken for untouched.
    BorrowedBeforeEntry,
    /// `frozen.rs`: a backed region is brought by one at a time, who looks again whether it is backed. Partner:
    /// another who wants it: he may have mapped the frames that it came to by then.
    BroughtInTurn,
}

impl Safeguard {
    /// All of them, each at its own number.
    pub const ALL: [Self; 37] = [
        Self::PinRereadsEntry,
        Self::PinAcquires,
        Self::PinTestsInTheWord,
        Self::ShareTestsInTheWord,
        Self::ShareAcquires,
        Self::GetRereadsEntry,
        Self::GetAcquires,
        Self::GetOnlyOfMapped,
        Self::FaultLooksUnderLock,
        Self::FaultWaitsForFork,
        Self::CopiedBeforeMapped,
        Self::MmuBeforeUnmap,
        Self::EntryBeforeUnmap,
        Self::UnmapReleases,
        Self::CopyIsHeld,
        Self::ReuseProvedAgain,
        Self::ProtectedBeforeShared,
        Self::CloneUnderLock,
        Self::IsolatedBeforeCopy,
        Self::IsolateTestsInTheWord,
        Self::IsolateAcquires,
        Self::WritersStoppedBeforeCopy,
        Self::ComparedWhenStill,
        Self::MergeLocksInOrder,
        Self::UncommittedBeforeFree,
        Self::PinsCountedInOrder,
        Self::FolioPagesLookedAt,
        Self::FolioBarrier,
        Self::FolioLookedAtAgain,
        Self::DissolvedInTheWord,
        Self::FolioLeftLast,
        Self::SplitCountsPagesFirst,
        Self::LentStays,
        Self::LoanEndsWithMove,
        Self::AdoptedBeforeGivenBack,
        Self::BorrowedBeforeEntry,
        Self::BroughtInTurn,
    ];
}

const _: () = {
    let mut n = 0;
    while n < Safeguard::ALL.len() {
        assert!(Safeguard::ALL[n] as usize == n);
        n += 1;
    }
};

#[cfg(any(loom, shuttle))]
static LEFT_OUT: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(u8::MAX);

#[cfg(any(loom, shuttle))]
impl Safeguard {
    /// Leaves it out from now on, in the whole process: a model checker tries one thing in each.
    pub fn leave_out(self) {
        LEFT_OUT.store(self as u8, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Whether `safeguard` is left out. Never outside of model checkers, where this is known when the program is
/// built.
#[cfg(any(loom, shuttle))]
pub(super) fn is_left_out(safeguard: Safeguard) -> bool {
    LEFT_OUT.load(std::sync::atomic::Ordering::Relaxed) == safeguard as u8
}

/// Whether `safeguard` is left out. Never outside of model checkers.
#[cfg(not(any(loom, shuttle)))]
#[inline(always)]
pub(super) const fn is_left_out(_safeguard: Safeguard) -> bool {
    false
}
