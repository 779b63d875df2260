//! The orderings and re-checks that the protocol rests on, by name.
//!
//! Each can be left out with [`CowPolicy::WITHOUT`](super::CowPolicy::WITHOUT), a constant of a type parameter,
//! so that a model checker can show what it is for. `tests/loom` does not do so yet.

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
    /// `space.rs`: a hold taken without a lock reads its entry again. Partner: as for a pin.
    GetRereadsEntry,
    /// `fault.rs`: a fault looks at the entry under the region's lock. Partner: another fault on the page.
    FaultLooksUnderLock,
    /// `fault.rs`: the MMU is switched to the copy before the old frame's mapping is given back. Partner: the
    /// next to find itself the frame's last holder, who writes it while our vCPUs still read it.
    MmuBeforeUnmap,
    /// `fault.rs`: the entry is changed before the old frame's mapping is given back. Partner: a pin or a hold
    /// taken without a lock, whose re-read must see the change.
    EntryBeforeUnmap,
    /// `fault.rs`: the copy for the snapshots is held until all of them have it. Partner: the drop of the first.
    CopyIsHeld,
    /// `fault.rs`: a snapshot's entry is looked at again under its lock. Partner: the drop of the snapshot.
    SharersLookedAtAgain,
    /// `fault.rs`: after the snapshots have moved, the writer still must prove that it is the last. Partner: a
    /// reader that took a hold on the frame through a snapshot meanwhile.
    ReuseProvedAgain,
    /// `migrate.rs`: the frame is made nobody's before it is copied. Partner: a pin or a hold taken without a lock.
    IsolatedBeforeCopy,
    /// `merge.rs`: contents are compared after both pages have stopped changing. Partner: a vCPU that writes.
    ComparedWhenStill,
    /// `dirty.rs`: pins are counted in the frame's word by a read-modify-write, after the entry was cleaned. Partner: a pin for
    /// writing taken without a lock (the store-buffering pair of PROTOCOL.md 5.2: entry store and pin load
    /// against pin store and entry load).
    PinsCountedInOrder,
}
