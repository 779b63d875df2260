//! Hammered pages: what they must hold after `n` operations of each vCPU, and whether they do.

use guest::abi::{Layout, Pattern};
use guest::formula::{Schedule, identify, page_key, page_word_from_key};

use super::view::{Page, View, WORDS};
use super::violation::{Oracle, Violation};
use crate::mm::Pfn;

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
        let word_of =
            |key: Option<u64>, w: usize| key.map_or(0, |k| page_word_from_key(k, w as u64));
        let done = self.in_progress.map_or(0, |key| {
            (0..WORDS)
                .take_while(|&w| page[w] == page_word_from_key(key, w as u64))
                .count()
        });
        match (done..WORDS).find(|&w| page[w] != word_of(self.complete, w)) {
            None => Ok(()),
            Some(word) => Err(Wrong {
                word,
                expected: word_of(self.complete, word),
                found: page[word],
            }),
        }
    }
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
    /// Returns the pages it has looked at.
    pub(super) fn first_look(
        &self,
        now: At<'_>,
        parent: Option<At<'_>>,
        report: &mut dyn FnMut(Violation),
    ) -> u64 {
        let mut pages = 0;
        for vcpu in 0..self.layout.vcpus {
            let slots = self.layout.slots(self.pattern, vcpu);
            let written = parent.and_then(|p| {
                let (from, to) = (p.ops[vcpu as usize], now.ops[vcpu as usize]);
                Written::between(&self.schedules[vcpu as usize], slots, from, to).map(|w| (p, w))
            });
            for slot in 0..slots {
                let gfn = self.gfn(vcpu, slot);
                let shared_with = written.as_ref().and_then(|(parent, written)| {
                    let frame = now.view.frame(gfn);
                    (frame == parent.view.frame(gfn)).then(|| (parent, written.slot(slot)))
                });
                pages += 1;
                match shared_with {
                    Some((_, When::Never)) => {}
                    Some((parent, When::Between)) if now.view.frame(gfn) != Pfn::ZERO => {
                        self.overwritten(now, *parent, vcpu, slot, report);
                    }
                    _ => {
                        if let Err(wrong) = self.look(now, vcpu, slot) {
                            let what = "a page is not what the registers say it is";
                            report(self.violation(Oracle::Cut, what, now, vcpu, slot, &wrong));
                        }
                    }
                }
            }
        }
        pages + self.untouched(now, Oracle::Cut, report)
    }

    /// The last look, before a snapshot is dropped: is it what it was? Pages that `heir`, whose parent it is,
    /// shares still are looked at with the heir. Returns the pages it has looked at.
    pub(super) fn last_look(
        &self,
        now: At<'_>,
        heir: Option<View<'_>>,
        report: &mut dyn FnMut(Violation),
    ) -> u64 {
        let mut pages = 0;
        for vcpu in 0..self.layout.vcpus {
            for slot in 0..self.layout.slots(self.pattern, vcpu) {
                let gfn = self.gfn(vcpu, slot);
                if heir.is_some_and(|h| h.frame(gfn) == now.view.frame(gfn)) {
                    continue;
                }
                pages += 1;
                if let Err(wrong) = self.look(now, vcpu, slot) {
                    let what = "a page has changed since the snapshot was taken";
                    report(self.violation(Oracle::Isolation, what, now, vcpu, slot, &wrong));
                }
            }
        }
        pages
    }

    /// Two snapshots share a page that was written between them. One of the two is wrong.
    fn overwritten(
        &self,
        now: At<'_>,
        parent: At<'_>,
        vcpu: u64,
        slot: u64,
        report: &mut dyn FnMut(Violation),
    ) {
        match (self.look(parent, vcpu, slot), self.look(now, vcpu, slot)) {
            (Err(wrong), _) => {
                let what = "a page was written after the snapshot was taken";
                report(self.violation(Oracle::Isolation, what, parent, vcpu, slot, &wrong));
            }
            (Ok(()), Err(wrong)) => {
                let what = "a page misses what was written since the snapshot before";
                report(self.violation(Oracle::Cut, what, now, vcpu, slot, &wrong));
            }
            // An operation that leaves a page as it was: a timeline that was rewound and repeated itself.
            (Ok(()), Ok(())) => {}
        }
    }

    /// Pages between the slots of a sparse pattern: nobody writes them.
    fn untouched(&self, now: At<'_>, oracle: Oracle, report: &mut dyn FnMut(Violation)) -> u64 {
        if self.pattern != Pattern::Sparse {
            return 0;
        }
        let mut page = [0; WORDS];
        let mut pages = 0;
        let slots: std::collections::HashSet<u64> = (0..self.layout.vcpus)
            .flat_map(|v| (0..self.layout.slots(self.pattern, v)).map(move |s| (v, s)))
            .map(|(v, s)| self.gfn(v, s))
            .collect();
        let first = self.layout.hammer_base / guest::abi::PAGE_SIZE;
        for gfn in first..self.layout.memory / guest::abi::PAGE_SIZE {
            if now.view.frame(gfn) == Pfn::ZERO || slots.contains(&gfn) {
                continue;
            }
            pages += 1;
            now.view.page(gfn, &mut page);
            if let Some(word) = page.iter().position(|&w| w != 0) {
                let mut v = Violation::new(oracle, "a page that nobody writes is not zero");
                v.snapshot = Some(now.view.snapshot.number());
                v.gpa = Some(gfn * guest::abi::PAGE_SIZE + word as u64 * 8);
                v.expected = "0".to_owned();
                v.found = format!("{:#018x}", page[word]);
                v.frame = now.view.describe_frame(gfn);
                report(v);
            }
        }
        pages
    }

    fn look(&self, at: At<'_>, vcpu: u64, slot: u64) -> Result<(), Wrong> {
        let mut page = [0; WORDS];
        at.view.page(self.gfn(vcpu, slot), &mut page);
        self.content(vcpu, slot, at.ops[vcpu as usize]).check(&page)
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
        self.layout.slot_gpa(self.pattern, vcpu, slot) / guest::abi::PAGE_SIZE
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
        violation.snapshot = Some(at.view.snapshot.number());
        violation.gpa = Some(gfn * guest::abi::PAGE_SIZE + wrong.word as u64 * 8);
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

/// Which slots were written between two snapshots.
struct Written {
    slots: Vec<bool>,
    /// Slots whose operation was being done at one of the two snapshots: their page may be either way.
    edges: [u64; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Never,
    Edge,
    Between,
}

impl Written {
    /// `None` if it is cheaper, or necessary, to look at every page.
    fn between(schedule: &Schedule, slots: u64, from: u64, to: u64) -> Option<Self> {
        let count = to.checked_sub(from)?;
        if count >= slots {
            return None;
        }
        let mut written = vec![false; slots as usize];
        for op in from..to {
            written[schedule.slot_of(op) as usize] = true;
        }
        Some(Self {
            slots: written,
            edges: [schedule.slot_of(from), schedule.slot_of(to)],
        })
    }

    fn slot(&self, slot: u64) -> When {
        if self.edges.contains(&slot) {
            When::Edge
        } else if self.slots[slot as usize] {
            When::Between
        } else {
            When::Never
        }
    }
}
