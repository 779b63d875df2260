//! Identity: no number is drawn twice, whichever copies of a guest there are.
//!
//! What an incarnation draws is a closed formula of its generation and of what its guest had drawn before
//! ([`Incarnation`]), and how much it has drawn is in its memory, and follows from its operations. So its
//! memory tells:
//!
//! - whether it has the generation that it was given, and draws by it from the first number on: not by that
//!   of
//!   the guest it is a copy of;
//! - whether all that it has drawn is what it should be: the log has the last numbers, and a digest of all;
//! - whether it goes on where it was, whatever copies are made of it.
//!
//! What each has drawn is noted as *claims*: these numbers of this seed. Two incarnations that claim the same
//! number have drawn it twice. Numbers that were drawn before a copy was made are claimed by one alone: each
//! claims from its beginning on.
//!
//! There is no tolerance: a draw is counted in one instruction, so at any instant it has been drawn or it has
//! not. What is written in the log and not counted is void.
//!
//! Not covered: an incarnation of which nobody has a snapshot any more. Nothing can be copied from it, and
//! its claims are dropped.

use std::collections::HashMap;
use std::mem::offset_of;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Weak};

use guest::abi::{
    DRAW_EVERY, DRAW_LOG, Draw, DrawLog, GENERATION_GPA, GENERATION_MAGIC, Generation,
    GenerationPage, Layout, Turn, VcpuPage,
};
use guest::formula::{DrawKey, draw_digest};

use super::violation::{Oracle, Violation};
use crate::incarnation::{Drawn, Incarnation, Origin};

/// What the memory of a guest says of its identity.
#[derive(Clone, Debug)]
pub struct Found {
    /// The generation, if there is one.
    generation: Option<Generation>,
    /// By vCPU.
    vcpus: Vec<FoundVcpu>,
}

/// What memory says of one vCPU.
#[derive(Clone, Debug)]
struct FoundVcpu {
    turn: Turn,
    last: [Draw; DRAW_LOG as usize],
    log_gpa: u64,
}

impl Found {
    /// What is there in memory of which `word` says the words, by gpa. Nothing runs meanwhile.
    pub fn read(layout: &Layout, word: impl Fn(u64) -> u64) -> Self {
        let page = |offset: usize| word(GENERATION_GPA + offset as u64);
        let in_generation = |offset: usize| page(offset_of!(GenerationPage, generation) + offset);
        let generation = Generation {
            counter: in_generation(offset_of!(Generation, counter)),
            id: std::array::from_fn(|n| in_generation(offset_of!(Generation, id) + 8 * n)),
            seed: std::array::from_fn(|n| in_generation(offset_of!(Generation, seed) + 8 * n)),
        };
        let is_written = page(offset_of!(GenerationPage, magic)) == GENERATION_MAGIC;
        let vcpus = (0..layout.vcpus).map(|vcpu| {
            let turn = offset_of!(GenerationPage, turns) + vcpu as usize * size_of::<Turn>();
            let log_gpa = layout.vcpu_page(vcpu) + offset_of!(VcpuPage, draws) as u64;
            let draw = |n: usize| {
                let draw = log_gpa + (offset_of!(DrawLog, last) + n * size_of::<Draw>()) as u64;
                let word = |offset: usize| word(draw + offset as u64);
                Draw {
                    generation: word(offset_of!(Draw, generation)),
                    index: word(offset_of!(Draw, index)),
                    number: std::array::from_fn(|n| word(offset_of!(Draw, number) + 8 * n)),
                    digest: word(offset_of!(Draw, digest)),
                }
            };
            FoundVcpu {
                turn: Turn {
                    generation: page(turn + offset_of!(Turn, generation)),
                    count: page(turn + offset_of!(Turn, count)),
                },
                last: std::array::from_fn(draw),
                log_gpa,
            }
        });
        Self {
            generation: is_written.then_some(generation),
            vcpus: vcpus.collect(),
        }
    }
}

impl FoundVcpu {
    /// Draw `index`, if the log still has it.
    fn draw(&self, index: u64) -> Option<&Draw> {
        let is_in = index < self.turn.count && index + DRAW_LOG > self.turn.count;
        self.last.get((index % DRAW_LOG) as usize).filter(|_| is_in)
    }

    /// Where that is.
    fn gpa(&self, index: u64) -> u64 {
        let draw = index % DRAW_LOG * size_of::<Draw>() as u64;
        self.log_gpa + offset_of!(DrawLog, last) as u64 + draw
    }
}

/// How many numbers a vCPU has drawn that has done so many operations: the last of them may be still to draw.
pub(super) fn due(ops: RangeInclusive<u64>) -> RangeInclusive<u64> {
    let (least, most) = ops.into_inner();
    least.saturating_sub(1) / DRAW_EVERY..=most / DRAW_EVERY
}

/// What is found of a guest at one instant.
#[derive(Clone, Debug)]
pub struct Observation {
    /// The snapshot, if it is that of one.
    pub snapshot: Option<u64>,
    /// What memory says.
    pub found: Found,
    /// How many numbers each vCPU has drawn by its operations; `None` if it says of itself that it draws
    /// none.
    pub due: Vec<Option<RangeInclusive<u64>>>,
}

/// Numbers that an incarnation has drawn: those of these indices, by vCPU and seed.
#[derive(Clone, Debug)]
struct Claim {
    vcpu: u64,
    seed: [u64; 4],
    numbers: Range<u64>,
}

/// What is known of an incarnation.
#[derive(Debug)]
struct Known {
    incarnation: Weak<Incarnation>,
    /// What vCPUs had drawn when they were last looked at.
    drawn: HashMap<u64, Drawn>,
    claims: Vec<Claim>,
}

impl Known {
    /// `incarnation`, which nobody has looked at.
    fn beginning(incarnation: &Arc<Incarnation>) -> Self {
        Self {
            incarnation: Arc::downgrade(incarnation),
            drawn: HashMap::new(),
            claims: Vec::new(),
        }
    }
}

/// Knows what all incarnations have drawn.
#[derive(Debug, Default)]
pub struct Identities {
    known: HashMap<u64, Known>,
}

impl Identities {
    /// Looks at what `incarnation` has drawn. Returns how many numbers were compared.
    ///
    /// The instants of one incarnation are looked at in their order.
    pub fn look(
        &mut self,
        incarnation: &Arc<Incarnation>,
        now: &Observation,
        report: &mut dyn FnMut(Violation),
    ) -> u64 {
        self.known
            .retain(|_, known| known.incarnation.strong_count() > 0);
        check_generation(incarnation, now, report);
        let mut compared = 0;
        for ((vcpu, found), due) in (0..).zip(&now.found.vcpus).zip(&now.due) {
            let Some(due) = due else { continue };
            let known = self.known.entry(incarnation.number);
            let known = known.or_insert_with(|| Known::beginning(incarnation));
            let from = known.drawn.get(&vcpu).copied();
            let from = from.unwrap_or_else(|| start(incarnation, vcpu));
            let look = VcpuLook {
                now,
                incarnation,
                vcpu,
                found,
            };
            let Some((drawn, seed)) = look.follow(from, due, report) else {
                continue;
            };
            compared += drawn.count - from.count;
            known.drawn.insert(vcpu, drawn);
            let claim = Claim {
                vcpu,
                seed,
                numbers: from.count..drawn.count,
            };
            self.claim(incarnation.number, claim, now, report);
        }
        compared
    }

    /// Notes a claim, unless somebody else has it.
    fn claim(
        &mut self,
        number: u64,
        claim: Claim,
        now: &Observation,
        report: &mut dyn FnMut(Violation),
    ) {
        for (&other, known) in self.known.iter().filter(|(other, _)| **other != number) {
            for theirs in &known.claims {
                let both = common(&claim, theirs);
                if both.is_empty() {
                    continue;
                }
                let mut v = Violation::new(
                    Oracle::Identity,
                    format!(
                        "vcpu {} has drawn numbers {} to {}, which were drawn before",
                        claim.vcpu,
                        both.start,
                        both.end - 1
                    ),
                );
                v.snapshot = now.snapshot;
                v.expected = format!("numbers of its own (incarnation {number})");
                v.found = format!("those of incarnation {other}");
                report(v);
            }
        }
        let Some(known) = self.known.get_mut(&number) else {
            return;
        };
        let ours = known.claims.iter_mut().find(|ours| {
            (ours.vcpu, ours.seed, ours.numbers.end)
                == (claim.vcpu, claim.seed, claim.numbers.start)
        });
        match ours {
            Some(ours) => ours.numbers.end = claim.numbers.end,
            None => known.claims.push(claim),
        }
    }
}

/// Indices of the numbers that are in both claims.
fn common(some: &Claim, others: &Claim) -> Range<u64> {
    if (some.vcpu, some.seed) != (others.vcpu, others.seed) {
        return 0..0;
    }
    let (some, others) = (&some.numbers, &others.numbers);
    some.start.max(others.start)..some.end.min(others.end)
}

/// What vCPU `vcpu` had drawn when `incarnation` began.
fn start(incarnation: &Incarnation, vcpu: u64) -> Drawn {
    let origin = incarnation.origin.as_ref();
    let drawn = origin.and_then(|origin| origin.drawn.get(vcpu as usize));
    drawn.copied().unwrap_or_default()
}

/// Memory has the generation that the machine was given, and so has each vCPU's turn.
fn check_generation(
    incarnation: &Incarnation,
    now: &Observation,
    report: &mut dyn FnMut(Violation),
) {
    let given = incarnation.generation;
    let origin = incarnation.origin.as_ref();
    let wrong = |gpa: u64, expected: String, found: String, of_origin: Option<&Origin>| {
        let mut v = Violation::new(
            Oracle::Identity,
            match of_origin {
                Some(origin) => format!(
                    "the guest still has the generation of what it is a copy of (incarnation {})",
                    origin.incarnation
                ),
                None => "the guest has another generation than it was given".to_owned(),
            },
        );
        v.snapshot = now.snapshot;
        v.gpa = Some(gpa);
        v.expected = format!("{expected} (incarnation {})", incarnation.number);
        v.found = found;
        v
    };
    if now.found.generation != Some(given) {
        let told = |generation: Generation| {
            let [low, high] = generation.id;
            format!(
                "generation {}, id {high:016x}{low:016x}",
                generation.counter
            )
        };
        let found = now.found.generation;
        report(wrong(
            GENERATION_GPA,
            told(given),
            found.map_or("none".to_owned(), told),
            origin.filter(|origin| Some(origin.generation) == found),
        ));
        return;
    }
    let turns = GENERATION_GPA + offset_of!(GenerationPage, turns) as u64;
    for (vcpu, found) in (0..).zip(&now.found.vcpus) {
        let counter = found.turn.generation;
        if counter != given.counter {
            report(wrong(
                turns + vcpu * size_of::<Turn>() as u64,
                format!("{} in the turn of vcpu {vcpu}", given.counter),
                counter.to_string(),
                origin.filter(|origin| origin.generation.counter == counter),
            ));
        }
    }
}

/// A look at one vCPU.
struct VcpuLook<'a> {
    now: &'a Observation,
    incarnation: &'a Incarnation,
    vcpu: u64,
    found: &'a FoundVcpu,
}

impl VcpuLook<'_> {
    /// Follows the formula from what the vCPU had drawn before to what it has drawn now. Says what that is,
    /// and by which seed; `None` if it is by none.
    fn follow(
        &self,
        from: Drawn,
        due: &RangeInclusive<u64>,
        report: &mut dyn FnMut(Violation),
    ) -> Option<(Drawn, [u64; 4])> {
        let (vcpu, count) = (self.vcpu, self.found.turn.count);
        if count < from.count {
            let what = format!("numbers that vcpu {vcpu} has drawn are not there any more");
            report(self.wrong_count(what, format!("{} or more", from.count)));
            return None;
        }
        if !due.contains(&count) {
            let what =
                format!("vcpu {vcpu} has not drawn as many numbers as it has done operations for");
            let (least, most) = due.clone().into_inner();
            report(self.wrong_count(what, format!("{least} to {most}")));
            return None;
        }
        let own = self.incarnation.generation;
        match self.by(own, from) {
            Ok(drawn) => Some((drawn, own.seed)),
            Err(wrong) => {
                let origin = self.incarnation.origin.as_ref();
                // Its numbers, whatever it says of which generation they are.
                let by_origin = origin.and_then(|origin| {
                    let theirs = origin.generation;
                    let as_own = Generation {
                        counter: own.counter,
                        ..theirs
                    };
                    let mut drawn = [theirs, as_own].into_iter().map(|by| self.by(by, from));
                    Some((origin, drawn.find_map(Result::ok)?))
                });
                let what = match &by_origin {
                    Some((origin, _)) => format!(
                        "vcpu {vcpu} goes on drawing the numbers of what it is a copy of (incarnation {})",
                        origin.incarnation
                    ),
                    None => format!("what vcpu {vcpu} has drawn is not of its generation"),
                };
                let mut v = Violation::new(Oracle::Identity, what);
                v.snapshot = self.now.snapshot;
                v.gpa = Some(self.found.gpa(wrong.index));
                v.expected = told(&wrong);
                v.found = self.found.draw(wrong.index).map_or(String::new(), told);
                report(v);
                by_origin.map(|(origin, drawn)| (drawn, origin.generation.seed))
            }
        }
    }

    /// What the vCPU has drawn now, if all since `from` was drawn by `generation`. Else the first draw that
    /// the log has otherwise, as it should be.
    fn by(&self, generation: Generation, from: Drawn) -> Result<Drawn, Draw> {
        let key = DrawKey::new(generation.seed);
        let mut digest = from.digest;
        // The last one from before is in the log of a copy, too.
        if let Some(last) = from.count.checked_sub(1)
            && let Some(found) = self.found.draw(last)
            && found.digest != digest
        {
            return Err(Draw { digest, ..*found });
        }
        for index in from.count..self.found.turn.count {
            let number = key.number(self.vcpu, index);
            digest = draw_digest(digest, number);
            let due = Draw {
                generation: generation.counter,
                index,
                number,
                digest,
            };
            if self.found.draw(index).is_some_and(|found| *found != due) {
                return Err(due);
            }
        }
        Ok(Drawn {
            count: self.found.turn.count,
            digest,
        })
    }

    fn wrong_count(&self, what: String, expected: String) -> Violation {
        let turn = offset_of!(GenerationPage, turns) as u64 + self.vcpu * size_of::<Turn>() as u64;
        let mut v = Violation::new(Oracle::Identity, what);
        v.snapshot = self.now.snapshot;
        v.gpa = Some(GENERATION_GPA + turn + offset_of!(Turn, count) as u64);
        v.expected = expected;
        v.found = self.found.turn.count.to_string();
        v
    }
}

fn told(draw: &Draw) -> String {
    let [low, high] = draw.number;
    format!(
        "number {} is {high:016x}{low:016x} of generation {}, digest {:016x}",
        draw.index, draw.generation, draw.digest
    )
}

#[cfg(test)]
mod tests;
