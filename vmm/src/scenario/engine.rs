//! Runs a scenario with a performer and computes what came of it.
//!
//! The engine keeps, beside the performer, what each page of each address space *should* hold: the list of values it had. Every
//! write uses a value of its own, so a value that is read says who wrote it and when:
//! * what the page holds now: right;
//! * what the page held once: who reads it and the page have parted ([`Verdict::Diverged`]);
//! * what another page or address space was given after they parted: [`Verdict::Leaked`];
//! * anything else: [`Verdict::Broken`].
//!
//! After the last step every page of everybody, and every hold, is read once more.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::performer::{Hold, HoldId, NotDone, PAGES, Page, PageView, Performer, Who};
use super::script::{Scenario, Slot, Step};
use super::verdict::Verdict;
use palimpsest::mm::{FrameState, Pfn};

/// What came of a scenario.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was played to its end.
    Played {
        /// The worst that was seen.
        verdict: Verdict,
        /// What was seen.
        findings: Vec<String>,
        /// Pages that were copied, if they could be counted.
        copies: Option<u64>,
    },
    /// The performer has no means for one of the steps.
    CannotAsk(String),
    /// It could not be played.
    Failed(String),
}

impl Outcome {
    /// The verdict, if there is one.
    pub fn verdict(&self) -> Option<Verdict> {
        match self {
            Self::Played { verdict, .. } => Some(*verdict),
            Self::CannotAsk(_) | Self::Failed(_) => None,
        }
    }
}

/// A step that was just done.
#[derive(Debug)]
pub struct Moment<'a> {
    /// Its number, from 1 on; `None` for the last look at everything.
    pub number: Option<usize>,
    /// What was done, in words.
    pub text: String,
    /// What is wrong, if something is.
    pub findings: &'a [String],
    /// What is known of the pages that the scenario uses.
    pub views: Vec<(Who, Page, PageView)>,
}

/// Plays `scenario`. `by_the_bit` says whether the exclusive bit means anything; `watch` is told of every step.
pub fn play(
    scenario: &Scenario,
    performer: &mut dyn Performer,
    by_the_bit: bool,
    watch: &mut dyn FnMut(&Moment<'_>),
) -> Outcome {
    let mut play = Play {
        scenario,
        performer,
        by_the_bit,
        truth: (0..PAGES).map(|page| ((Who::P, page), vec![0])).collect(),
        alive: vec![Who::P],
        holds: BTreeMap::new(),
        holds_taken: 0,
        next_value: 0,
        frames: BTreeMap::new(),
        copies: Some(0),
        verdict: Verdict::Ok,
        findings: Vec::new(),
    };
    match play.run(watch) {
        Ok(()) => Outcome::Played {
            verdict: play.verdict,
            findings: play.findings,
            copies: play.copies,
        },
        Err(NotDone::CannotAsk(reason)) => Outcome::CannotAsk(reason.to_owned()),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

struct Play<'a> {
    scenario: &'a Scenario,
    performer: &'a mut dyn Performer,
    by_the_bit: bool,
    /// The values each page had, the present one last.
    truth: BTreeMap<(Who, Page), Vec<u64>>,
    alive: Vec<Who>,
    holds: BTreeMap<HoldId, Held>,
    holds_taken: HoldId,
    next_value: u64,
    frames: BTreeMap<(Who, Page), Option<Pfn>>,
    copies: Option<u64>,
    verdict: Verdict,
    findings: Vec<String>,
}

struct Held {
    who: Who,
    page: Page,
    hold: Hold,
    /// Values the page had had when it was taken.
    since: usize,
    /// The page is still there.
    attached: bool,
}

/// A page, its frame, what its entry says of it, and the state of its frame.
type Essence = (Who, Page, Option<Pfn>, Option<([bool; 3], FrameState)>);

impl Play<'_> {
    fn run(&mut self, watch: &mut dyn FnMut(&Moment<'_>)) -> Result<(), NotDone> {
        self.note_frames(None);
        for (index, step) in self.scenario.steps.iter().enumerate() {
            let seen = self.findings.len();
            let text = match *step {
                Step::Refused(inner) => self.must_be_refused(inner)?,
                step => self.step(&step)?,
            };
            self.note_frames(Some(step));
            watch(&self.moment(Some(index + 1), text, seen));
        }
        let seen = self.findings.len();
        self.look_at_everything()?;
        if let (Some(copies), Some(most)) = (self.copies, self.scenario.copies)
            && copies > most
        {
            self.find(
                Verdict::Copied,
                format!("{copies} pages copied, where {most} would do"),
            );
        }
        watch(&self.moment(None, "at the end".to_owned(), seen));
        Ok(())
    }

    fn moment(&mut self, number: Option<usize>, text: String, seen: usize) -> Moment<'_> {
        let views = self.views();
        Moment {
            number,
            text,
            findings: &self.findings[seen..],
            views,
        }
    }

    fn views(&mut self) -> Vec<(Who, Page, PageView)> {
        let used = self.scenario.steps.iter().flat_map(pages_of).max();
        let mut views = Vec::new();
        for &who in &self.alive {
            for page in 0..=used.unwrap_or(0) {
                if let Some(view) = self.performer.view(who, page) {
                    views.push((who, page, view));
                }
            }
        }
        views
    }

    fn find(&mut self, verdict: Verdict, what: String) {
        self.verdict = self.verdict.max(verdict);
        self.findings.push(what);
    }

    fn fresh_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    fn now(&self, who: Who, page: Page) -> u64 {
        let values = self.truth.get(&(who, page));
        values.and_then(|v| v.last()).copied().unwrap_or_default()
    }

    fn set(&mut self, who: Who, page: Page, value: u64) {
        self.truth.entry((who, page)).or_default().push(value);
    }

    /// A page is gone from an address space, and is zeros there from now on.
    fn forget(&mut self, who: Who, page: Page) {
        self.set(who, page, 0);
        let here = |h: &&mut Held| (h.who, h.page) == (who, page);
        for held in self.holds.values_mut().filter(here) {
            held.attached = false;
        }
    }

    /// Does a step, and says what it did.
    fn step(&mut self, step: &Step) -> Result<String, NotDone> {
        Ok(match *step {
            Step::Write(who, page) => {
                let value = self.fresh_value();
                self.performer.write(who, page, value)?;
                self.set(who, page, value);
                format!("{who:?} writes {value} to page {page}")
            }
            Step::WriteSame(who, page, of) => {
                let value = self.now(who, of);
                self.performer.write(who, page, value)?;
                self.set(who, page, value);
                format!("{who:?} writes {value} to page {page}, as to page {of}")
            }
            Step::Read(who, page) => {
                let value = self.performer.read(who, page)?;
                self.judge_page(who, page, value);
                format!("{who:?} reads page {page}: {value}")
            }
            Step::Fork => {
                self.performer.fork()?;
                self.part(Who::C);
                "P forks: C is there".to_owned()
            }
            Step::Snapshot => {
                self.performer.snapshot()?;
                self.part(Who::S);
                "a snapshot is taken of P: S is there".to_owned()
            }
            Step::Restore => {
                self.performer.restore()?;
                for page in 0..PAGES {
                    self.set(Who::P, page, self.now(Who::S, page));
                }
                "P goes back to S".to_owned()
            }
            Step::Exit(who) => {
                self.performer.exit(who)?;
                self.alive.retain(|&w| w != who);
                for held in self.holds.values_mut().filter(|h| h.who == who) {
                    held.attached = false;
                }
                format!("{who:?} ends")
            }
            Step::Take(who, page, hold) => self.take(1, who, page, hold)?,
            Step::TakeMany(count, who, page, hold) => self.take(count, who, page, hold)?,
            Step::HoldReads(id) => {
                let value = self.performer.read_hold(id)?;
                self.judge_hold(id, value);
                format!("{}: reads {value}", self.name_of(id))
            }
            Step::HoldWrites(id) => {
                let value = self.fresh_value();
                self.performer.write_hold(id, value)?;
                if let Some(held) = self.holds.get(&id).filter(|h| h.attached) {
                    let (who, page) = (held.who, held.page);
                    self.set(who, page, value);
                }
                format!("{}: writes {value}", self.name_of(id))
            }
            Step::Release(id) => {
                let name = self.name_of(id);
                self.judge_release(id);
                self.performer.release(id)?;
                self.holds.remove(&id);
                format!("{name}: given back")
            }
            Step::Protect(who) => {
                self.performer.protect(who)?;
                format!("{who:?}'s pages are write-protected, without intent to copy")
            }
            Step::Discard(who, page) => {
                self.performer.discard(who, page)?;
                self.forget(who, page);
                format!("{who:?} gives page {page} back to the host")
            }
            Step::DiscardRest(who, page) => {
                self.performer.discard_rest(who, page)?;
                for other in (0..PAGES).filter(|&other| other != page) {
                    self.forget(who, other);
                }
                format!("{who:?} gives all of the folio of page {page} back, but the page")
            }
            Step::Collapse(who, page) => match self.performer.collapse(who, page) {
                Ok(()) => format!("the folio of {who:?}'s page {page} is mapped as one again"),
                Err(NotDone::Refused(reason)) => {
                    format!("the folio of {who:?}'s page {page} stays in small pages ({reason})")
                }
                Err(error) => return Err(error),
            },
            Step::Migrate(who, page) => {
                self.performer.migrate(who, page)?;
                format!("page {page} of {who:?} moves to another frame")
            }
            Step::Merge(one, other) => {
                self.performer.merge(one, other)?;
                let ((a, m), (b, n)) = (one, other);
                format!("page {m} of {a:?} and page {n} of {b:?} are merged")
            }
            Step::ForceWrite(who, page) => {
                let value = self.fresh_value();
                self.performer.force_write(who, page, value)?;
                self.set(who, page, value);
                format!("a debugger writes {value} to page {page} of {who:?}")
            }
            Step::ExhaustMemory => {
                self.performer.exhaust_memory()?;
                "there is no memory for copies any more".to_owned()
            }
            Step::FreeMemory => {
                self.performer.free_memory()?;
                "there is memory again".to_owned()
            }
            Step::RefuseMmu(after) => {
                self.performer.refuse_mmu(after)?;
                format!("the machine will refuse the change of page tables after the next {after}")
            }
            Step::Is(who, page, slot) => {
                self.judge_slot(who, page, slot);
                self.should(format!("page {page} of {who:?} should be {slot:?}"))
            }
            Step::IsHuge(who, page) => {
                self.judge_size(who, page, true);
                self.should(format!("a huge entry should map page {page} of {who:?}"))
            }
            Step::IsSmall(who, page) => {
                self.judge_size(who, page, false);
                self.should(format!(
                    "page {page} of {who:?} should have an entry of its own"
                ))
            }
            Step::IsClean(who, page) => {
                self.judge_clean(who, page);
                self.should(format!(
                    "page {page} of {who:?} should have nothing to report as written"
                ))
            }
            Step::Refused(inner) => self.must_be_refused(inner)?,
        })
    }

    /// A step that only looks at entry and bit.
    fn should(&self, text: String) -> String {
        if self.by_the_bit {
            text
        } else {
            format!("{text} (where the bit counts: not looked at here)")
        }
    }

    fn must_be_refused(&mut self, step: &Step) -> Result<String, NotDone> {
        let before = self.essence();
        match self.step(step) {
            Ok(text) => {
                self.find(Verdict::NotRefused, format!("{text}: must be refused"));
                Ok(text)
            }
            Err(NotDone::Refused(reason)) => {
                // A fork that was refused may leave pages write-protected, which is legal and costs a fault.
                if *step != Step::Fork && self.essence() != before {
                    let what = format!("{step:?} was refused and yet changed something");
                    self.find(Verdict::Broken, what);
                }
                Ok(format!("{}: refused ({reason})", words(step)))
            }
            Err(other) => Err(other),
        }
    }

    /// What an operation that is refused must not change: all that is known of pages, but how many of them an entry maps. A huge folio may be
    /// in small entries then (PROTOCOL.md F5).
    fn essence(&mut self) -> Vec<Essence> {
        let inside = |view: PageView| {
            let (entry, state) = view.inside?;
            let present = [entry.is_present(), entry.is_writable(), entry.is_dirty()];
            Some((present, state))
        };
        let views = self.views().into_iter();
        views
            .map(|(who, page, view)| (who, page, view.frame, inside(view)))
            .collect()
    }

    fn part(&mut self, child: Who) {
        for page in 0..PAGES {
            if let Some(values) = self.truth.get(&(Who::P, page)).cloned() {
                self.truth.insert((child, page), values);
            }
        }
        self.alive.push(child);
    }

    fn take(&mut self, count: u64, who: Who, page: Page, hold: Hold) -> Result<String, NotDone> {
        let first = self.holds_taken;
        self.performer.take_many(first, count, who, page, hold)?;
        let since = self.truth.get(&(who, page)).map_or(0, |v| v.len() - 1);
        for id in (first..).take(count as usize) {
            let held = Held {
                who,
                page,
                hold,
                since,
                attached: true,
            };
            self.holds.insert(id, held);
            self.holds_taken = id + 1;
        }
        Ok(match count {
            1 => format!("{} is taken", self.name_of(first)),
            _ => format!("{} and {} more are taken", self.name_of(first), count - 1),
        })
    }

    fn name_of(&self, id: HoldId) -> String {
        match self.holds.get(&id) {
            Some(h) => format!(
                "hold {id} ({} of {:?}'s page {})",
                kind(h.hold),
                h.who,
                h.page
            ),
            None => format!("hold {id}"),
        }
    }

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

    fn judge_page(&mut self, who: Who, page: Page, value: u64) {
        self.judge(&format!("{who:?}'s page {page}"), who, page, value, false);
    }

    fn judge_hold(&mut self, id: HoldId, value: u64) {
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
    fn judge_release(&mut self, id: HoldId) {
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

    fn judge_slot(&mut self, who: Who, page: Page, slot: Slot) {
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

    fn judge_size(&mut self, who: Who, page: Page, is_huge: bool) {
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

    fn judge_clean(&mut self, who: Who, page: Page) {
        if self
            .inside(who, page)
            .is_some_and(|(entry, _)| entry.is_dirty())
        {
            let what = format!("page {page} of {who:?} counts as written, and was not");
            self.find(Verdict::Broken, what);
        }
    }

    fn inside(
        &mut self,
        who: Who,
        page: Page,
    ) -> Option<(palimpsest::mm::Entry, palimpsest::mm::FrameState)> {
        if !self.by_the_bit {
            return None;
        }
        self.performer.view(who, page)?.inside
    }

    /// Counts the pages that are in another frame than before: each is a copy, unless the step moved it there.
    fn note_frames(&mut self, step: Option<&Step>) {
        let mut frames = BTreeMap::new();
        for who in self.alive.clone() {
            for page in 0..PAGES {
                let Some(view) = self.performer.view(who, page) else {
                    self.copies = None;
                    return;
                };
                frames.insert((who, page), view.frame);
            }
        }
        let moved = |at: &(Who, Page)| match step {
            Some(Step::Migrate(who, page)) => *at == (*who, *page),
            // The kernel's moves all of it. Ours moves nothing.
            Some(Step::Collapse(who, _)) => at.0 == *who,
            Some(Step::Merge(one, other)) => at == one || at == other,
            _ => false,
        };
        let mut copied = 0;
        for (at, &frame) in &frames {
            let before = match self.frames.get(at) {
                Some(&before) => before,
                // A child's page that is not in its parent's frame was copied by the fork.
                None => frames.get(&(Who::P, at.1)).copied().flatten(),
            };
            let differs = matches!((before, frame), (Some(a), Some(b)) if a != b);
            copied += u64::from(differs && !moved(at));
        }
        if let Some(copies) = &mut self.copies {
            *copies += copied;
        }
        self.frames = frames;
    }

    fn look_at_everything(&mut self) -> Result<(), NotDone> {
        for who in self.alive.clone() {
            for page in 0..PAGES {
                let value = self.performer.read(who, page)?;
                self.judge_page(who, page, value);
            }
        }
        let ids: Vec<_> = self.holds.keys().copied().collect();
        for id in ids {
            let value = self.performer.read_hold(id)?;
            self.judge_hold(id, value);
        }
        Ok(())
    }
}

/// What a kind of hold is called.
pub const fn kind(hold: Hold) -> &'static str {
    match hold {
        Hold::GetRead => "a reader's hold",
        Hold::GetWrite => "a writer's hold",
        Hold::PinRead => "a pin for reading",
        Hold::PinWrite => "a pin for writing",
    }
}

fn words(step: &Step) -> String {
    match step {
        Step::Fork => "P forks".to_owned(),
        Step::Discard(who, page) => format!("{who:?} gives page {page} back to the host"),
        Step::Migrate(who, page) => format!("page {page} of {who:?} moves to another frame"),
        Step::Merge((a, m), (b, n)) => {
            format!("page {m} of {a:?} and page {n} of {b:?} are merged")
        }
        other => format!("{other:?}"),
    }
}

fn pages_of(step: &Step) -> Vec<Page> {
    match *step {
        Step::Write(_, page)
        | Step::Read(_, page)
        | Step::Take(_, page, _)
        | Step::TakeMany(_, _, page, _)
        | Step::Discard(_, page)
        | Step::Migrate(_, page)
        | Step::ForceWrite(_, page)
        | Step::Collapse(_, page)
        | Step::IsHuge(_, page)
        | Step::IsSmall(_, page)
        | Step::Is(_, page, _)
        | Step::IsClean(_, page) => vec![page],
        Step::WriteSame(_, one, other) | Step::Merge((_, one), (_, other)) => vec![one, other],
        Step::DiscardRest(..) => vec![PAGES - 1],
        Step::Refused(inner) => pages_of(inner),
        _ => vec![],
    }
}
