//! Runs a scenario with a performer and computes what came of it.
//!
//! The engine keeps, beside the performer, what each page of each address space *should* hold: the list of
//! values it had, and before they parted its parent's. Every write uses a value of its own, so a value that
//! is read says who wrote it and when:
//! * what the page holds now: right;
//! * what the page held once: who reads it and the page have parted ([`Verdict::Diverged`]);
//! * what another page or address space was given after they parted: [`Verdict::Leaked`];
//! * anything else: [`Verdict::Broken`].
//!
//! After the last step every page of everybody, and every hold, is read once more.
//!
//! | file | concept |
//! |---|---|
//! | `truth` | what each page should hold |
//! | `judge` | what a value, an entry or a bit says, against what it should |
//! | `copies` | pages that were copied |
//! | `words` | steps and holds in words |

mod copies;
mod judge;
mod truth;
mod words;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use self::truth::{History, Truth};
pub use self::words::kind;
use self::words::{fork, words};
use super::performer::{Hold, HoldId, NotDone, PAGES, Page, PageView, Performer, Who};
use super::script::{Scenario, Step};
use super::verdict::Verdict;
use palimpsest::mm::{FrameState, Pfn};

/// What came of a scenario.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScenarioOutcome {
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

impl ScenarioOutcome {
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

/// Plays `scenario`. `by_the_bit` says whether the exclusive bit means anything;
/// `watch` is told of every step.
pub fn play(
    scenario: &Scenario,
    performer: &mut dyn Performer,
    by_the_bit: bool,
    watch: &mut dyn FnMut(&Moment<'_>),
) -> ScenarioOutcome {
    let mut play = Play {
        scenario,
        performer,
        by_the_bit,
        truth: Truth::new(),
        alive: vec![Who::P],
        parents: BTreeMap::new(),
        holds: BTreeMap::new(),
        orphans: Vec::new(),
        holds_taken: 0,
        next_value: 0,
        frames: BTreeMap::new(),
        copies: Some(0),
        verdict: Verdict::Ok,
        findings: Vec::new(),
    };
    match play.run(watch) {
        Ok(()) => ScenarioOutcome::Played {
            verdict: play.verdict,
            findings: play.findings,
            copies: play.copies,
        },
        Err(NotDone::CannotAsk(reason)) => ScenarioOutcome::CannotAsk(reason.to_owned()),
        Err(error) => ScenarioOutcome::Failed(error.to_string()),
    }
}

struct Play<'a> {
    scenario: &'a Scenario,
    performer: &'a mut dyn Performer,
    by_the_bit: bool,
    truth: Truth,
    alive: Vec<Who>,
    /// Whom each was forked from, or cloned.
    parents: BTreeMap<Who, Who>,
    holds: BTreeMap<HoldId, Held>,
    /// Pages that are gone from their address spaces.
    orphans: Vec<History>,
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
    /// Which of the orphans the page is, if it is not there any more.
    orphan: Option<usize>,
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

    fn find_if(&mut self, found: Option<(Verdict, String)>) {
        if let Some((verdict, what)) = found {
            self.find(verdict, what);
        }
    }

    fn find(&mut self, verdict: Verdict, what: String) {
        self.verdict = self.verdict.max(verdict);
        self.findings.push(what);
    }

    fn fresh_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    /// A page is gone from an address space, and is zeros there from now on.
    fn forget(&mut self, who: Who, page: Page) {
        self.orphan(who, page);
        self.truth.set(who, page, 0);
    }

    /// A page is gone from an address space. Who holds it has it still, with the history it had.
    fn orphan(&mut self, who: Who, page: Page) {
        let index = self.orphans.len();
        let here = |h: &&mut Held| (h.who, h.page) == (who, page) && h.orphan.is_none();
        for held in self.holds.values_mut().filter(here) {
            held.orphan = Some(index);
        }
        self.orphans.push(self.truth.history(who, page).to_vec());
    }

    /// A device has written `value` through a hold.
    fn set_through(&mut self, id: HoldId, value: u64) {
        let Some(held) = self.holds.get(&id) else {
            return;
        };
        match held.orphan {
            None => self.truth.set(held.who, held.page, value),
            Some(orphan) => {
                self.truth.note_origin(held.who, held.page, value);
                self.orphans[orphan].push(value);
            }
        }
    }

    /// Does a step, and says what it did.
    fn step(&mut self, step: &Step) -> Result<String, NotDone> {
        Ok(match *step {
            Step::Write(who, page) => {
                let value = self.fresh_value();
                self.performer.write(who, page, value)?;
                self.truth.set(who, page, value);
                format!("{who:?} writes {value} to page {page}")
            }
            Step::WriteSame(who, page, of) => {
                let value = self.truth.now(who, of);
                self.performer.write(who, page, value)?;
                self.truth.set(who, page, value);
                format!("{who:?} writes {value} to page {page}, as to page {of}")
            }
            Step::Read(who, page) => {
                let value = self.performer.read(who, page)?;
                self.judge_page(who, page, value);
                format!("{who:?} reads page {page}: {value}")
            }
            Step::Fork(parent, child) => {
                self.performer.fork(parent, child)?;
                self.part(parent, child);
                format!("{}: {child:?} is there", fork(parent))
            }
            Step::Snapshot(who) => {
                self.performer.snapshot(who)?;
                self.part(who, Who::S);
                format!("a snapshot is taken of {who:?}: S is there")
            }
            Step::Restore(who) => {
                self.performer.restore(who)?;
                for page in 0..PAGES {
                    self.truth.set(who, page, self.truth.now(Who::S, page));
                }
                format!("{who:?} goes back to S")
            }
            Step::Exit(who) => {
                self.performer.exit(who)?;
                self.alive.retain(|&w| w != who);
                (0..PAGES).for_each(|page| self.orphan(who, page));
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
                self.set_through(id, value);
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
                self.truth.set(who, page, value);
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
                if !matches!(step, Step::Fork(..)) && self.essence() != before {
                    let what = format!("{step:?} was refused and yet changed something");
                    self.find(Verdict::Broken, what);
                }
                Ok(format!("{}: refused ({reason})", words(step)))
            }
            Err(other) => Err(other),
        }
    }

    /// What an operation that is refused must not change: all that is known of pages, but how many of them an
    /// entry maps. A huge folio may be in small entries then (PROTOCOL.md F5).
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

    fn part(&mut self, parent: Who, child: Who) {
        self.truth.part(parent, child);
        self.parents.insert(child, parent);
        self.alive.push(child);
    }

    fn take(&mut self, count: u64, who: Who, page: Page, hold: Hold) -> Result<String, NotDone> {
        let first = self.holds_taken;
        self.performer.take_many(first, count, who, page, hold)?;
        let since = self.truth.history(who, page).len().saturating_sub(1);
        for id in (first..).take(count as usize) {
            let held = Held {
                who,
                page,
                hold,
                since,
                orphan: None,
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
