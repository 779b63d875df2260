//! The frame table: one packed word a frame.
//!
//! The word holds **everything that decides whether a frame may be written or shared**: how many entries
//! map it, how many transient readers and how many devices hold it, and the exclusive bit. Because it is
//! one word, "is it exclusive?" and "is it pinned?" are asked and answered in the same compare-and-swap:
//! a pin is granted only while the bit is set, the bit is cleared only while no pin is there, and whichever
//! comes second in the word's modification order sees the first. The kernel keeps the two apart (a flag in
//! `page->flags`, a bias in `_refcount`) and needs full barriers on both sides, a sequence count against
//! fork and a sticky `MMF_HAS_PINNED` flag to get the same (PROTOCOL.md 5.2, 5.3). See
//! `docs/decisions/0001-one-word-a-frame.md`.

use super::addr::{Access, Order, Pfn};
use super::frame_state::{FrameState, GETS, MAPS, PINS};
use super::policy::CowPolicy;
use super::safeguard::{Safeguard, is_left_out};
use super::sync::{AtomicU64, Ordering, zeroed};

/// Whether a hold that was given back was the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a frame without holders must go back to the allocator"]
pub(super) enum Released {
    /// Others still hold the frame.
    StillHeld,
    /// Nobody does.
    Last,
}

/// A change that was made to a word.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    pub(super) before: FrameState,
    pub(super) after: FrameState,
}

/// The orderings of a change and of the look before it.
const ORDERED: (Ordering, Ordering) = (Ordering::AcqRel, Ordering::Acquire);
const UNORDERED: (Ordering, Ordering) = (Ordering::Relaxed, Ordering::Relaxed);

/// [`ORDERED`], unless a model checker leaves `safeguard` out.
#[inline]
fn order(safeguard: Safeguard) -> (Ordering, Ordering) {
    if is_left_out(safeguard) {
        UNORDERED
    } else {
        ORDERED
    }
}

/// The packed words of all frames, and of all huge folios.
///
/// It is as long as there are frame numbers. What was never used of it costs no memory (`sync::zeroed`), a
/// page of the host for each folio's worth of frames.
pub(super) struct FrameTable {
    words: Box<[AtomicU64]>,
    /// One for each run of frames that could be a huge folio (`folio.rs`).
    pub(super) folios: Box<[AtomicU64]>,
    /// How large a huge folio is.
    pub(super) huge: Order,
}

impl FrameTable {
    pub(super) fn new(frames: u64, huge: Order) -> Self {
        Self {
            words: zeroed(frames as usize),
            folios: zeroed(frames.div_ceil(huge.pages()) as usize),
            huge,
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.words.len() as u64
    }

    /// What is known of a frame, by whatever entries it is mapped. If that is being changed from huge to
    /// small or back, a mixture.
    #[inline]
    pub(super) fn state(&self, pfn: Pfn) -> FrameState {
        let own = self.own_state(pfn);
        if own.is_part() {
            let folio = self.folio_state(pfn);
            own.in_folio(folio.maps(), folio.is_exclusive())
        } else {
            own
        }
    }

    /// The frame's own word.
    #[inline]
    pub(super) fn own_state(&self, pfn: Pfn) -> FrameState {
        FrameState::of_word(self.words[pfn.0 as usize].load(Ordering::Acquire))
    }

    /// Replaces the word of a frame that nobody else can be changing.
    pub(super) fn set_own(&self, pfn: Pfn, state: FrameState) {
        self.words[pfn.0 as usize].store(state.word(), Ordering::Release);
    }

    /// Replaces the state by `next(state)` until that succeeds or `next` declines.
    ///
    /// # Ordering
    /// Every change of a word is an `AcqRel` read-modify-write, so the changes of one frame form a single
    /// release sequence: who sees a change sees all that the earlier ones' makers did before them. What that
    /// buys, by partner:
    /// * *pin* against *share* (fork): the later of the two sees the earlier in the word itself.
    /// * *pin* against *an entry moved away from the frame*: the mover stores the entry, then gives its
    ///   mapping back here. A pin that finds the frame exclusive again for somebody else comes after that in
    ///   the word's order, so its re-read of the entry (`pin.rs`) sees the new entry. Without acquire here
    ///   it could read the old one and grant a pin on another's frame.
    /// * *reuse* against *the last other mapping going away*: a space unmaps its readers' window before it
    ///   gives the mapping back (PROTOCOL.md 5.4), so a writer that finds itself alone has no reader left.
    #[inline]
    pub(super) fn update(
        &self,
        pfn: Pfn,
        next: impl Fn(FrameState) -> Option<FrameState>,
    ) -> Result<Change, FrameState> {
        self.update_ordered(pfn, ORDERED, next)
    }

    #[inline]
    fn update_ordered(
        &self,
        pfn: Pfn,
        (success, look): (Ordering, Ordering),
        next: impl Fn(FrameState) -> Option<FrameState>,
    ) -> Result<Change, FrameState> {
        let word = &self.words[pfn.0 as usize];
        let mut seen = word.load(look);
        loop {
            let before = FrameState::of_word(seen);
            let Some(after) = next(before) else {
                return Err(before);
            };
            match word.compare_exchange_weak(seen, after.word(), success, look) {
                Ok(_) => return Ok(Change { before, after }),
                Err(now) => seen = now,
            }
        }
    }

    /// The state at the end of all changes so far: a change made later sees all that the caller did before.
    ///
    /// A load will not do where the caller has changed an entry and asks who pinned the frame through it: the
    /// load may be done before the store is seen, and the pin's re-read before the pin is (PROTOCOL.md 5.2).
    #[inline]
    pub(super) fn settled(&self, pfn: Pfn) -> FrameState {
        if is_left_out(Safeguard::PinsCountedInOrder) {
            return self.state(pfn);
        }
        FrameState::of_word(self.words[pfn.0 as usize].fetch_or(0, Ordering::AcqRel))
    }

    /// The first mapping of a frame that was just allocated: exclusive from birth (PROTOCOL.md T1, I4).
    pub(super) fn map_fresh(&self, pfn: Pfn) {
        let result = self.update(pfn, |s| s.plus(&MAPS).map(FrameState::exclusive));
        debug_assert_eq!(
            result.map(|c| c.after.maps()),
            Ok(1),
            "{pfn:?} was not fresh"
        );
    }

    /// `try_dup`: shares the frame with one more mapping if `policy` allows it, and makes it possibly
    /// shared. Refused, with nothing changed, if it may be pinned (PROTOCOL.md 4.1;
    /// `folio_try_dup_anon_rmap_pte`, `include/linux/rmap.h`).
    pub(super) fn try_share<P: CowPolicy>(&self, pfn: Pfn, policy: &P) -> Result<(), FrameState> {
        let stale = self.stale(Safeguard::ShareTestsInTheWord, pfn);
        self.update_ordered(pfn, order(Safeguard::ShareAcquires), |s| {
            policy
                .may_share(stale.unwrap_or(s))
                .then(|| s.possibly_shared().plus(&MAPS))
                .flatten()
        })
        .map(drop)
    }

    /// What a test outside the compare-and-swap would go by: nothing, unless a model checker asks for it.
    #[inline]
    fn stale(&self, safeguard: Safeguard, pfn: Pfn) -> Option<FrameState> {
        is_left_out(safeguard).then(|| self.state(pfn))
    }

    /// One more mapping, possibly shared, of a frame that nobody but mappings holds. Says whether it was
    /// exclusive.
    pub(super) fn try_share_idle(&self, pfn: Pfn) -> Result<bool, FrameState> {
        self.update(pfn, |s| {
            s.is_idle()
                .then(|| s.possibly_shared().plus(&MAPS))
                .flatten()
        })
        .map(|c| c.before.is_exclusive())
        .map_err(|_| self.state(pfn))
    }

    /// Undoes [`FrameTable::try_share_idle`], whose answer `was_exclusive` is.
    pub(super) fn unshare_idle(&self, pfn: Pfn, was_exclusive: bool) {
        let result = self.update(pfn, |s| {
            let s = s.minus(&MAPS);
            Some(if was_exclusive { s.exclusive() } else { s })
        });
        debug_assert!(result.is_ok());
    }

    /// Turns the caller's mapping into a hold if `may` agrees. A frame that nothing maps can neither be
    /// pinned nor held, so if it was the only mapping the frame is nobody's until [`FrameTable::put_back`]:
    /// what the kernel does by freezing the reference count. Says whether it was exclusive.
    pub(super) fn try_isolate(
        &self,
        pfn: Pfn,
        may: impl Fn(FrameState) -> bool,
    ) -> Result<bool, FrameState> {
        let stale = self.stale(Safeguard::IsolateTestsInTheWord, pfn);
        self.update_ordered(pfn, order(Safeguard::IsolateAcquires), |s| {
            may(stale.unwrap_or(s))
                .then(|| s.plus(&GETS).map(|s| s.minus(&MAPS).unmapped()))
                .flatten()
        })
        .map(|c| c.before.is_exclusive())
        .map_err(|_| self.state(pfn))
    }

    /// Undoes [`FrameTable::try_isolate`], whose answer `was_exclusive` is.
    pub(super) fn put_back(&self, pfn: Pfn, was_exclusive: bool) {
        let result = self.update(pfn, |s| {
            let s = s.minus(&GETS).plus(&MAPS)?;
            Some(if was_exclusive { s.exclusive() } else { s })
        });
        debug_assert!(result.is_ok(), "the counter had room for it a moment ago");
    }

    /// The first hold of a frame that was just allocated and that nothing maps yet.
    pub(super) fn hold_fresh(&self, pfn: Pfn) {
        let result = self.update(pfn, |s| s.plus(&GETS));
        debug_assert_eq!(
            result.map(|c| c.after.refs()),
            Ok(1),
            "{pfn:?} was not fresh"
        );
    }

    /// One more mapping, possibly shared, of a frame that is mapped possibly shared, and stays so while this
    /// is called. Refused if the counter is full.
    pub(super) fn try_map_again(&self, pfn: Pfn) -> Result<(), FrameState> {
        self.update(pfn, |s| {
            debug_assert!(s.maps() > 0, "{pfn:?} is not mapped");
            s.possibly_shared().plus(&MAPS)
        })
        .map(drop)
    }

    /// One more mapping, possibly shared, of a frame the caller holds. Refused if the counter is full.
    pub(super) fn try_map_held(&self, pfn: Pfn) -> Result<(), FrameState> {
        self.update(pfn, |s| {
            debug_assert!(s.gets() > 0, "{pfn:?} is not held");
            s.possibly_shared().plus(&MAPS)
        })
        .map(drop)
    }

    /// Makes the frame exclusive to the one mapping the caller holds, if `policy` says that it may be written
    /// in place (PROTOCOL.md T3, T4, T7).
    pub(super) fn try_reuse(&self, pfn: Pfn, policy: &impl CowPolicy) -> Result<(), FrameState> {
        // What is part of a folio is mapped by a huge entry too: not ours, which would not come here.
        self.update(pfn, |s| {
            (policy.may_reuse(s) && !s.is_part()).then(|| s.exclusive())
        })
        .map(drop)
    }

    /// Takes a pin if `policy` grants one on the frame as it is (PROTOCOL.md 3: a pin may only be taken on an
    /// exclusive frame).
    #[inline]
    pub(super) fn try_pin<P: CowPolicy>(
        &self,
        pfn: Pfn,
        access: Access,
        policy: &P,
    ) -> Result<(), FrameState> {
        let stale = self.stale(Safeguard::PinTestsInTheWord, pfn);
        self.update_ordered(pfn, order(Safeguard::PinAcquires), |s| {
            (s.maps() > 0 && policy.may_pin(stale.unwrap_or(s), access))
                .then(|| s.plus(&PINS))
                .flatten()
        })
        .map(drop)
    }

    /// Takes a transient hold, unless the frame is not mapped (`folio_try_get`).
    #[inline]
    pub(super) fn try_get(&self, pfn: Pfn) -> Result<(), FrameState> {
        self.update_ordered(pfn, order(Safeguard::GetAcquires), |s| {
            (s.maps() > 0 || is_left_out(Safeguard::GetOnlyOfMapped))
                .then(|| s.plus(&GETS))
                .flatten()
        })
        .map(drop)
    }

    #[inline]
    pub(super) fn unmap(&self, pfn: Pfn) -> Released {
        self.give_back(pfn, |s| s.minus(&MAPS).unmapped())
    }

    /// For model checkers: as [`FrameTable::unmap`], without an order.
    pub(super) fn unmap_unordered(&self, pfn: Pfn) -> Released {
        let change = self.update_ordered(pfn, UNORDERED, |s| Some(s.minus(&MAPS).unmapped()));
        if change.is_ok_and(|c| c.after == FrameState::FREE) {
            Released::Last
        } else {
            Released::StillHeld
        }
    }

    #[inline]
    pub(super) fn unpin(&self, pfn: Pfn) -> Released {
        self.give_back(pfn, |s| s.minus(&PINS))
    }

    #[inline]
    pub(super) fn put(&self, pfn: Pfn) -> Released {
        self.give_back(pfn, |s| s.minus(&GETS))
    }

    #[inline]
    pub(super) fn give_back(&self, pfn: Pfn, less: impl Fn(FrameState) -> FrameState) -> Released {
        match self.update(pfn, |s| Some(less(s))) {
            Ok(change) if change.after == FrameState::FREE => Released::Last,
            _ => Released::StillHeld,
        }
    }
}
