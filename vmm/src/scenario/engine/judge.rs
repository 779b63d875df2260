//! What a value, an entry or a bit says, against what it should.

use super::super::performer::{HoldId, Page, Who};
use super::super::script::Slot;
use super::super::verdict::Verdict;
use super::Play;
use palimpsest::mm::{Entry, FrameState};

impl Play<'_> {
    /// What `value` says about who reads it where `who`'s page `page` is what should be seen.
    fn judge(&mut self, reader: &str, who: Who, page: Page, value: u64, stale_is_fine: bool) {
        let own = self.truth.get(&(who, page));
        let own: &[u64] = own.map_or(&[], |v| v.as_slice());
        let now = own.last().copied().unwrap_or_default();
        if value == now {
            return;
        }
        if own.contains(&value) {
            if !stale_is_fine {
                let what =
                    format!("{reader} sees {value}, which was there once; it should see {now}");
                self.find(Verdict::Diverged, what);
            }
            return;
        }
        let wrote = |(_, values): &(&(Who, Page), &Vec<u64>)| values.contains(&value);
        let found = match self.truth.iter().find(wrote) {
            Some(((other, at), _)) => (
                Verdict::Leaked,
                format!(
                    "{reader} sees {value}, which is {other:?}'s, of page {at}; it should see {now}"
                ),
            ),
            None => (
                Verdict::Broken,
                format!("{reader} sees {value}, which nobody wrote there; it should see {now}"),
            ),
        };
        self.find(found.0, found.1);
    }

    pub(super) fn judge_page(&mut self, who: Who, page: Page, value: u64) {
        self.judge(&format!("{who:?}'s page {page}"), who, page, value, false);
    }

    pub(super) fn judge_hold(&mut self, id: HoldId, value: u64) {
        let Some(held) = self.holds.get(&id) else {
            return;
        };
        let follows = held.hold.is_pin() || self.scenario.gets_must_follow;
        let (who, page, stale_is_fine) = (held.who, held.page, !(follows && held.attached));
        let since_taken = |v: &Vec<u64>| v[held.since..].contains(&value);
        let too_old = !self.truth.get(&(who, page)).is_some_and(since_taken);
        let reader = self.name_of(id);
        self.judge(&reader, who, page, value, stale_is_fine && !too_old);
    }

    /// I3: a pinned page is exclusive until it is unpinned or gone.
    pub(super) fn judge_release(&mut self, id: HoldId) {
        let Some(held) = self.holds.get(&id) else {
            return;
        };
        if !(self.by_the_bit && held.hold.is_pin() && held.attached) {
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
