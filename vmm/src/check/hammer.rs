//! Hammered pages: what they must hold after `n` operations of each vCPU, and whether they do.

use guest::abi::{Layout, PAGE_SIZE, Pattern};
use guest::formula::{Schedule, identify, matching_words, page_key, page_word_from_key};

use super::view::{Page, View};
use super::violation::{Oracle, Violation};
use super::written::{When, WrittenSlots};
use palimpsest::mm::Pfn;

/// Knows the content of every hammered page at any number of operations.
#[derive(Debug)]
pub(super) struct Hammered {
    seed: u64,
    pattern: Pattern,
    layout: Layout,
    schedules: Vec<Schedule>,
}

/// The word that is wrong first.
struct Wrong {
    word: usize,
    expected: u64,
    found: u64,
}

/// What a look at a page compares it with.
#[derive(Clone, Copy)]
struct Content {
    /// Key of the last operation that was completed on it; `None` if it is all zeros.
    complete: Option<u64>,
    /// Key of the operation that is being done on it: some first words of the page may be its already.
    in_progress: Option<u64>,
}

impl Content {
    fn check(self, page: &Page) -> Result<(), Wrong> {
        let in_progress = self.in_progress;
        let done = in_progress.map_or(0, |_| matching_words(in_progress, 0, &page[..]));
        let word = done + matching_words(self.complete, done as u64, &page[done..]);
        match page.get(word) {
            None => Ok(()),
            Some(&found) => Err(Wrong {
                word,
                expected: self
                    .complete
                    .map_or(0, |key| page_word_from_key(key, word as u64)),
                found,
            }),
        }
    }
}

/// A page that was written, and by what.
pub(super) struct Write {
    pub(super) gfn: u64,
    pub(super) vcpu: u64,
    pub(super) op: u64,
}

/// A snapshot to look at, and what was found out about its vCPUs.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) view: View<'a>,
    /// Operations that each vCPU had completed.
    pub(super) ops: &'a [u64],
}

impl Hammered {
    pub(super) fn new(seed: u64, pattern: Pattern, layout: Layout) -> Self {
        let schedules = (0..layout.vcpus)
            .map(|v| Schedule::new(pattern, layout.slots(pattern, v), seed, v))
            .collect();
        Self {
            seed,
            pattern,
            layout,
            schedules,
        }
    }

    /// The first look at a snapshot. `parent` is the one the VM ran on from: a page whose frame both
    /// share, and which no operation in between was for, was compared then and is not again. A page that
    /// both share although an operation in between wrote it means that the write went into `parent`.
    ///
    /// Returns the pages it has read.
    pub(super) fn first_look(
        &self,
        now: At<'_>,
        parent: Option<At<'_>>,
        report: &mut dyn FnMut(Violation),
    ) -> u64 {
        let what = "a page is not what the registers say it is";
        let mut page = Page::zeros();
        let order = |parent, now| (parent, now);
        let pages = self.each_against(parent, now, order, |vcpu, slot, shared| {
            match (shared, parent) {
                (PageSharing::Written, Some(parent)) => {
                    self.overwritten(parent, now, vcpu, slot, report);
                }
                _ => {
                    if let Err(wrong) = self.look(now, vcpu, slot, &mut page) {
                        report(self.violation(Oracle::Cut, what, now, vcpu, slot, &wrong));
                    }
                }
            }
        });
        pages + self.untouched(now, parent, Oracle::Cut, report)
    }

    /// The last look, before a snapshot is dropped: checks that it has not changed. Pages that it shares with
    /// `heir`, whose parent it is, and that were not written in between, are left to the last look at the
    /// heir. Returns the pages it has read.
    pub(super) fn last_look(
        &self,
        now: At<'_>,
        heir: Option<At<'_>>,
        report: &mut dyn FnMut(Violation),
    ) -> u64 {
        let what = "a page has changed since the snapshot was taken";
        let mut page = Page::zeros();
        let order = |heir, now| (now, heir);
        let pages = self.each_against(heir, now, order, |vcpu, slot, shared| {
            match (shared, heir) {
                (PageSharing::Written, Some(heir)) => {
                    self.overwritten(now, heir, vcpu, slot, report);
                }
                _ => {
                    if let Err(wrong) = self.look(now, vcpu, slot, &mut page) {
                        report(self.violation(Oracle::Isolation, what, now, vcpu, slot, &wrong));
                    }
                }
            }
        });
        pages + self.untouched(now, heir, Oracle::Isolation, report)
    }

    /// Pages that differ between two instants, at which the vCPUs had done `some` and `others` operations,
    /// and who wrote them. Either may be the earlier one: the guest may have been rewound.
    pub(super) fn between<'a>(
        &'a self,
        some: &'a [u64],
        others: &'a [u64],
    ) -> impl Iterator<Item = Write> + 'a {
        (0..).zip(some.iter().zip(others)).flat_map(
            move |(vcpu, (&some, &others)): (u64, (&u64, &u64))| {
                // The first and the last of them may have been under way at either instant.
                (some.min(others) + 1..some.max(others)).map(move |op| {
                    let slot = self.schedules[vcpu as usize].slot_of(op);
                    let gfn = self.gfn(vcpu, slot);
                    Write { gfn, vcpu, op }
                })
            },
        )
    }

    /// Calls `look` with each slot to look at in `now`, and what its page has in common with that of `other`:
    /// all of them if there is no other, else those that are in another frame and those that were written in
    /// between. Whatever is neither is one frame in both, and was written by nobody: what holds for one
    /// snapshot holds for the other. `in_order` says which of the two is older. Returns how many slots it was.
    ///
    /// What it costs follows what was written between the two.
    fn each_against<'a>(
        &self,
        other: Option<At<'a>>,
        now: At<'a>,
        in_order: impl Fn(At<'a>, At<'a>) -> (At<'a>, At<'a>),
        mut look: impl FnMut(u64, u64, PageSharing),
    ) -> u64 {
        let mut slots = 0;
        let mut look = |vcpu, slot, shared| {
            slots += 1;
            look(vcpu, slot, shared);
        };
        let written: Option<Vec<_>> = other.and_then(|other| {
            let (old, new) = in_order(other, now);
            let of = |(vcpu, schedule)| {
                let (from, to) = (old.ops[vcpu], new.ops[vcpu]);
                WrittenSlots::between(schedule, self.slots(vcpu as u64), from, to)
            };
            (0..).zip(&self.schedules).map(of).collect()
        });
        let (Some(other), Some(written)) = (other, written) else {
            for vcpu in 0..self.layout.vcpus {
                (0..self.slots(vcpu)).for_each(|slot| look(vcpu, slot, PageSharing::No));
            }
            return slots;
        };
        let all = self.layout.hammer_base / PAGE_SIZE..self.layout.memory / PAGE_SIZE;
        let differing = now.view.differing(&other.view, all);
        for &gfn in &differing {
            if let Some((vcpu, slot)) = self.layout.slot_at(self.pattern, gfn * PAGE_SIZE) {
                look(vcpu, slot, PageSharing::No);
            }
        }
        for (vcpu, written) in (0..).zip(&written) {
            written.each(|slot| {
                let gfn = self.gfn(vcpu, slot);
                if differing.binary_search(&gfn).is_ok() {
                    return;
                }
                match written.when(slot) {
                    When::Never => {}
                    When::Between if now.view.frame(gfn) != Pfn::ZERO => {
                        look(vcpu, slot, PageSharing::Written);
                    }
                    When::Between | When::Edge => look(vcpu, slot, PageSharing::No),
                }
            });
        }
        slots
    }

    /// Two snapshots share a page that was written between them. One of the two is wrong, since every
    /// operation writes something else; both may look right until the wrong write is done.
    fn overwritten(
        &self,
        old: At<'_>,
        new: At<'_>,
        vcpu: u64,
        slot: u64,
        report: &mut dyn FnMut(Violation),
    ) {
        let mut page = Page::zeros();
        let mut look = |at| self.look(at, vcpu, slot, &mut page);
        match (look(old), look(new)) {
            (Ok(()), Err(wrong)) => {
                let what = "a page misses what was written since the snapshot before";
                report(self.violation(Oracle::Cut, what, new, vcpu, slot, &wrong));
            }
            (looked, _) => {
                let what = "a page was written after the snapshot was taken";
                let wrong = looked.err().unwrap_or(Wrong {
                    word: 0,
                    expected: 0,
                    found: 0,
                });
                report(self.violation(Oracle::Isolation, what, old, vcpu, slot, &wrong));
            }
        }
    }

    /// Pages between the slots of a sparse pattern: nobody writes them. Those that are in one frame with
    /// `other`'s are left to the look at that. Returns the pages it has read.
    fn untouched(
        &self,
        now: At<'_>,
        other: Option<At<'_>>,
        oracle: Oracle,
        report: &mut dyn FnMut(Violation),
    ) -> u64 {
        if self.pattern != Pattern::Sparse {
            return 0;
        }
        let all = self.layout.hammer_base / PAGE_SIZE..self.layout.memory / PAGE_SIZE;
        let gfns = match other {
            Some(other) => now.view.differing(&other.view, all),
            None => all.collect(),
        };
        let is_slot = |gfn| self.layout.slot_at(self.pattern, gfn * PAGE_SIZE).is_some();
        let mut page = Page::zeros();
        let mut pages = 0;
        for gfn in gfns {
            if now.view.frame(gfn) == Pfn::ZERO || is_slot(gfn) {
                continue;
            }
            pages += 1;
            now.view.page(gfn, &mut page);
            let word = matching_words(None, 0, &page[..]);
            if let Some(found) = page.get(word) {
                let mut v = Violation::new(oracle, "a page that nobody writes is not zero");
                v.snapshot = Some(now.view.number);
                v.gpa = Some(gfn * PAGE_SIZE + word as u64 * 8);
                v.expected = "0".to_owned();
                v.found = format!("{found:#018x}");
                v.frame = now.view.describe_frame(gfn);
                report(v);
            }
        }
        pages
    }

    fn slots(&self, vcpu: u64) -> u64 {
        self.layout.slots(self.pattern, vcpu)
    }

    /// Compares a page, of which `page` is left with a copy.
    fn look(&self, at: At<'_>, vcpu: u64, slot: u64, page: &mut Page) -> Result<(), Wrong> {
        at.view.page(self.gfn(vcpu, slot), page);
        self.content(vcpu, slot, at.ops[vcpu as usize]).check(page)
    }

    fn content(&self, vcpu: u64, slot: u64, ops: u64) -> Content {
        let schedule = &self.schedules[vcpu as usize];
        let key = |op| page_key(self.seed, vcpu, op);
        Content {
            complete: schedule.last_writer(slot, ops).map(key),
            in_progress: (schedule.slot_of(ops) == slot).then(|| key(ops)),
        }
    }

    fn gfn(&self, vcpu: u64, slot: u64) -> u64 {
        self.layout.slot_gpa(self.pattern, vcpu, slot) / PAGE_SIZE
    }

    fn violation(
        &self,
        oracle: Oracle,
        what: &str,
        at: At<'_>,
        vcpu: u64,
        slot: u64,
        wrong: &Wrong,
    ) -> Violation {
        let gfn = self.gfn(vcpu, slot);
        let ops = at.ops[vcpu as usize];
        let mut violation = Violation::new(oracle, what);
        violation.snapshot = Some(at.view.number);
        violation.gpa = Some(gfn * PAGE_SIZE + wrong.word as u64 * 8);
        let due = self.schedules[vcpu as usize]
            .last_writer(slot, ops)
            .map_or("nobody".to_owned(), |op| {
                format!("vcpu {vcpu}, operation {op}")
            });
        violation.expected = format!(
            "{:#018x} (by {due}; the vcpu has done {ops})",
            wrong.expected
        );
        violation.found = format!("{:#018x}", wrong.found);
        violation.last_writer = self.name_writer(wrong);
        violation.frame = at.view.describe_frame(gfn);
        violation
    }

    /// Who wrote the wrong word, if the formula tells.
    fn name_writer(&self, wrong: &Wrong) -> String {
        let step = page_word_from_key(0, wrong.word as u64);
        let (vcpu, op) = identify(self.seed, wrong.found.wrapping_sub(step));
        if wrong.found == 0 {
            "nobody".to_owned()
        } else if vcpu < self.layout.vcpus && op < 1 << 48 {
            format!("vcpu {vcpu}, operation {op}")
        } else {
            "unknown: no operation writes this".to_owned()
        }
    }
}

/// What two snapshots have in common of a page that is to be looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PageSharing {
    /// Different frames, or it can't be told: the page must be read.
    No,
    /// One frame, although the page was written between the two.
    Written,
}
