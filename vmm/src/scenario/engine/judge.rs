//! What a value, an entry or a bit says, against what it should.

use super::super::performer::{HoldId, Page, Who};
use super::super::script::Slot;
use super::super::verdict::Verdict;
use super::Play;
use palimpsest::mm::{Entry, FrameState};

impl Play<'_> {
    /// What `value` says of `reader`, who should see the last value of `own` and may see an earlier one
    /// if `stale_is_fine`.
    fn weigh(
        &self,
        reader: &str,
        own: &[u64],
        value: u64,
        stale_is_fine: bool,
    ) -> Option<(Verdict, String)> {
        let now = own.last().copied().unwrap_or_default();
        if value == now {
            return None;
        }
        if own.contains(&value) {
            let what = format!("{reader} sees {value}, which was there once; it should see {now}");
            return (!stale_is_fine).then_some((Verdict::Diverged, what));
        }
        Some(match self.truth.origin(value) {
            Some((other, at)) => (
                Verdict::Leaked,
                format!(
                    "{reader} sees {value}, which is {other:?}'s, of page {at}; it should see {now}"
                ),
            ),
            None => (
                Verdict::Broken,
                format!("{reader} sees {value}, which nobody wrote there; it should see {now}"),
            ),
        })
    }

    pub(super) fn judge_page(&mut self, who: Who, page: Page, value: u64) {
        let reader = format!("{who:?}'s page {page}");
        let found = self.weigh(&reader, self.truth.history(who, page), value, false);
        self.find_if(found);
    }

    pub(super) fn judge_hold(&mut self, id: HoldId, value: u64) {
        let Some(held) = self.holds.get(&id) else {
            return;
        };
        let follows = held.hold.is_pin() || self.scenario.gets_must_follow;
        let must_follow = follows && held.orphan.is_none();
        let own = match held.orphan {
            None => self.truth.history(held.who, held.page),
            Some(orphan) => &self.orphans[orphan],
        };
        let since_taken = own[held.since..].contains(&value);
        let found = self.weigh(&self.name_of(id), own, value, !must_follow && since_taken);
        self.find_if(found);
    }

    /// I3: a pinned page is exclusive until it is unpinned or gone.
    pub(super) fn judge_release(&mut self, id: HoldId) {
        let Some(held) = self.holds.get(&id) else {
            return;
        };
        if !(self.by_the_bit && held.hold.is_pin() && held.orphan.is_none()) {
            return;
        }
        let (who, page) = (held.who, held.page);
        if let Some((_, state)) = self.performer.view(who, page).and_then(|v| v.inside)
            && !state.is_exclusive()
        {
            let what = format!(
                "{} is given back, and the frame is not exclusive",
                self.name_of(id)
            );
            self.find(Verdict::Broken, what);
        }
    }

    pub(super) fn judge_slot(&mut self, who: Who, page: Page, slot: Slot) {
        let Some((entry, state)) = self.inside(who, page) else {
            return;
        };
        let found = match (
            entry.is_present(),
            entry.is_writable(),
            state.is_exclusive(),
        ) {
            (false, ..) => Slot::Zero,
            (_, true, true) => Slot::WX,
            (_, false, true) => Slot::RX,
            (_, false, false) => Slot::RS,
            (_, true, false) => Slot::WS,
        };
        if found != slot {
            let what = format!("page {page} of {who:?} is {found:?}, and should be {slot:?}");
            self.find(Verdict::Broken, what);
        }
    }

    pub(super) fn judge_size(&mut self, who: Who, page: Page, is_huge: bool) {
        let Some((entry, _)) = self.inside(who, page) else {
            return;
        };
        if entry.is_huge() != is_huge {
            let kind = |is_huge| if is_huge { "a huge" } else { "a small" };
            let what = format!(
                "{} entry maps page {page} of {who:?}, and {} one should",
                kind(entry.is_huge()),
                kind(is_huge)
            );
            self.find(Verdict::Broken, what);
        }
    }

    pub(super) fn judge_clean(&mut self, who: Who, page: Page) {
        if self
            .inside(who, page)
            .is_some_and(|(entry, _)| entry.is_dirty())
        {
            let what = format!("page {page} of {who:?} counts as written, and was not");
            self.find(Verdict::Broken, what);
        }
    }

    fn inside(&mut self, who: Who, page: Page) -> Option<(Entry, FrameState)> {
        if !self.by_the_bit {
            return None;
        }
        self.performer.view(who, page)?.inside
    }
}
