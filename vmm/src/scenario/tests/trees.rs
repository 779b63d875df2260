//! Trees of address spaces: forks that are refused, and trees that grow at random.

use std::sync::Arc;

use super::super::emulated::Emulated;
use super::super::engine::ScenarioOutcome;
use super::super::performer::Hold::{GetRead, PinRead, PinWrite};
use super::super::performer::Who::{C, D, G, P};
use super::super::performer::{Hold, Memory, NotDone, Page, Performer, Who};
use super::super::real::{ByThreads, RealStage};
use super::super::script::{Scenario, Step};
use super::super::soft::SoftStage;
use super::super::stage::Stage;
use super::super::table::find;
use super::super::verdict::Verdict;
use super::super::{ask_the_kernel, emulate};
use super::has_kvm;
use crate::policy::Policy;
use palimpsest::mm::Exclusive;

/// What pages 0 and 1 of everybody hold; who is not named is not there.
#[track_caller]
fn assert_family<S: Stage>(family: &mut Emulated<S>, words: &[(Who, [u64; 2])], held: u64) {
    for who in [P, C, D, G, Who::S] {
        let found = [0, 1].map(|page| family.read(who, page));
        match (words.iter().find(|(name, _)| *name == who), found) {
            (Some((_, words)), [Ok(first), Ok(second)]) => {
                assert_eq!([first, second], *words, "{who:?}");
            }
            (None, [Err(NotDone::Failed(_)), Err(NotDone::Failed(_))]) => {}
            (expected, found) => panic!("{who:?}: {expected:?}, and found {found:?}"),
        }
    }
    assert_eq!(family.read_hold(0).unwrap(), held);
}

/// Does `what` with each of its changes of page tables refused in turn, and looks at everybody in between.
/// Says how often it was refused until it was done.
fn refuse_each<S: Stage>(
    family: &mut Emulated<S>,
    what: impl Fn(&mut Emulated<S>) -> Result<(), NotDone>,
    look: impl Fn(&mut Emulated<S>),
) -> u64 {
    for granted in 0..100 {
        family.refuse_mmu(granted).unwrap();
        match what(family) {
            Ok(()) => {
                family.refuse_mmu(u64::MAX).unwrap();
                return granted;
            }
            Err(NotDone::Refused(_)) => look(family),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("it is refused whatever is granted");
}

/// P has children C and D. C has a pinned page, and S is a snapshot of it.
fn a_refused_fork_leaves_its_relatives_alone<S: Stage>() {
    let stage = S::new(Memory::Base).unwrap();
    let pool = Arc::clone(stage.pool());
    let mut family = Emulated::new(stage, Box::new(|| Box::new(Exclusive))).unwrap();
    family.write(P, 0, 1).unwrap();
    family.write(P, 1, 2).unwrap();
    family.fork(P, C).unwrap();
    family.fork(P, D).unwrap();
    family.write(C, 0, 3).unwrap();
    family.write(D, 1, 4).unwrap();
    family.take(0, C, 1, PinWrite).unwrap();
    family.snapshot(C).unwrap();
    let of = |who| match who {
        P => [1, 2],
        D => [1, 4],
        _ => [3, 2],
    };
    let all = [P, C, D, Who::S].map(|who| (who, of(who)));
    assert_family(&mut family, &all, 2);
    for parent in [P, C, D, Who::S] {
        let fork = |family: &mut Emulated<S>| family.fork(parent, G);
        let refusals = refuse_each(&mut family, fork, |family| assert_family(family, &all, 2));
        assert!(refusals > 0, "{parent:?}: nothing was refused");
        family.write(G, 1, 9).unwrap();
        let mut with_child = all.to_vec();
        with_child.push((G, [of(parent)[0], 9]));
        assert_family(&mut family, &with_child, 2);
        family.exit(G).unwrap();
    }
    // Only a page that is pinned is copied by a fork.
    family.exhaust_memory().unwrap();
    for parent in [P, C, D, Who::S] {
        match family.fork(parent, G) {
            Err(NotDone::Refused(why)) if parent == C => assert!(why.contains("memory"), "{why}"),
            result => {
                result.unwrap();
                assert_eq!(family.read(G, 1).unwrap(), of(parent)[1]);
                family.exit(G).unwrap();
            }
        }
        assert_family(&mut family, &all, 2);
    }
    family.free_memory().unwrap();
    // A snapshot, too, of what is not write-protected yet.
    family.exit(Who::S).unwrap();
    family.write(C, 0, 5).unwrap();
    let without = [(P, of(P)), (C, [5, 2]), (D, of(D))];
    let snapshot = |family: &mut Emulated<S>| family.snapshot(C);
    let refusals = refuse_each(&mut family, snapshot, |f| assert_family(f, &without, 2));
    assert!(refusals > 0, "no snapshot was refused");
    // And all of them write on, each for itself.
    for (who, value) in [(P, 11), (C, 12), (D, 13)] {
        family.write(who, 0, value).unwrap();
    }
    family.write_hold(0, 14).unwrap();
    let after = [(P, [11, 2]), (C, [12, 14]), (D, [13, 4]), (Who::S, [5, 2])];
    assert_family(&mut family, &after, 14);
    drop(family);
    assert_eq!(pool.leftovers(1), []);
}

#[test]
fn a_refused_fork_leaves_its_relatives_alone_in_a_model() {
    a_refused_fork_leaves_its_relatives_alone::<SoftStage>();
}

#[test]
fn a_refused_fork_leaves_its_relatives_alone_on_vcpus() {
    if has_kvm() {
        a_refused_fork_leaves_its_relatives_alone::<RealStage>();
    }
}

#[test]
fn a_refused_fork_leaves_its_relatives_alone_on_vcpus_without_kvm() {
    a_refused_fork_leaves_its_relatives_alone::<RealStage<ByThreads>>();
}

/// A tree that grows and dies at random, and is written, held and protected at random. It does nothing that
/// the exclusive policy refuses or does not promise.
struct Tree {
    random: u64,
    alive: Vec<Who>,
    /// Who, page, and kind of each hold that was taken; `None` when it was given back.
    holds: Vec<Option<(Who, Page, Hold)>>,
    forks: usize,
    /// Only what the living kernel can be asked for.
    is_for_the_kernel: bool,
}

impl Tree {
    /// Forks that the living kernel's performer has channels for, and holds of a kind.
    const LIMIT: usize = 8;

    fn steps(seed: u64, is_for_the_kernel: bool) -> &'static [Step] {
        let mut tree = Self {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            alive: vec![P],
            holds: Vec::new(),
            forks: 0,
            is_for_the_kernel,
        };
        let steps: Vec<_> = (0..400).filter_map(|_| tree.step()).take(60).collect();
        Vec::leak(steps)
    }

    /// Below `end`.
    fn draw(&mut self, end: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 33) as usize % end
    }

    fn one_of<T: Copy>(&mut self, these: &[T]) -> Option<T> {
        (!these.is_empty()).then(|| these[self.draw(these.len())])
    }

    /// Holds of whose page `are` says so, by number.
    fn held(&self, are: impl Fn(Who, Page, Hold) -> bool) -> Vec<usize> {
        let held = self.holds.iter().enumerate();
        held.filter_map(|(id, held)| held.filter(|&(w, p, h)| are(w, p, h)).map(|_| id))
            .collect()
    }

    /// The next step, if what was drawn can be done.
    fn step(&mut self) -> Option<Step> {
        let running: Vec<_> = self.alive.iter().copied().filter(|w| w.runs()).collect();
        let page = self.draw(2) as Page;
        let who = self.one_of(&running)?;
        let has_snapshot = self.alive.contains(&Who::S);
        Some(match self.draw(20) {
            0..6 => Step::Write(who, page),
            6..9 => {
                let absent = |w: &Who| !self.alive.contains(w);
                let free: Vec<_> = [P, C, D, G].into_iter().filter(absent).collect();
                let child = self.one_of(&free)?;
                let parent = self.one_of(&self.alive.clone())?;
                if self.is_for_the_kernel && self.forks == Self::LIMIT {
                    return None;
                }
                self.forks += 1;
                self.alive.push(child);
                Step::Fork(parent, child)
            }
            9..11 if running.len() > 1 => {
                let gone = self.one_of(&self.alive.clone())?;
                self.alive.retain(|&other| other != gone);
                Step::Exit(gone)
            }
            11..13 => {
                let kinds: &[Hold] = if self.is_for_the_kernel {
                    &[GetRead, PinWrite]
                } else {
                    &[GetRead, PinRead, PinWrite]
                };
                let kind = self.one_of(kinds)?;
                if self.held(|_, _, other| other == kind).len() == Self::LIMIT {
                    return None;
                }
                self.holds.push(Some((who, page, kind)));
                Step::Take(who, page, kind)
            }
            13 => Step::HoldWrites(self.one_of(&self.held(|_, _, kind| kind == PinWrite))?),
            14..16 => Step::HoldReads(self.one_of(&self.held(|_, _, _| true))?),
            16 => {
                let id = self.one_of(&self.held(|_, _, _| true))?;
                self.holds[id] = None;
                Step::Release(id)
            }
            17 => Step::Protect(who),
            18 => {
                let pinned = self.held(|w, p, kind| (w, p) == (who, page) && kind.is_pin());
                if !pinned.is_empty() {
                    return None;
                }
                Step::Discard(who, page)
            }
            19 if self.is_for_the_kernel => Step::Read(who, page),
            19 if has_snapshot => Step::Restore(who),
            19 => {
                self.alive.push(Who::S);
                Step::Snapshot(who)
            }
            _ => return None,
        })
    }
}

fn scenario(steps: &'static [Step], memory: Memory) -> Scenario {
    Scenario {
        steps,
        memory,
        copies: None,
        ..*find("A1").unwrap()
    }
}

/// Nothing leaks and no pin diverges under the exclusive policy, whoever is whose child; and the others are
/// caught at what they do wrong.
#[test]
fn random_trees_are_right_under_exclusive_and_wrong_under_the_others() {
    let mut caught = [0; Policy::ALL.len()];
    for memory in [Memory::Base, Memory::Huge] {
        for seed in 1..=300 {
            let scenario = scenario(Tree::steps(seed, false), memory);
            for (policy, caught) in Policy::ALL.into_iter().zip(&mut caught) {
                let outcome = emulate::<SoftStage>(&scenario, policy, &mut |_| {});
                let verdict = outcome.verdict();
                if policy == Policy::Exclusive {
                    let steps = scenario.steps;
                    assert_eq!(verdict, Some(Verdict::Ok), "{seed}: {outcome:?} {steps:?}");
                }
                *caught += usize::from(verdict > Some(Verdict::Broken));
            }
        }
    }
    eprintln!("caught, by policy: {caught:?}");
    for (policy, caught) in Policy::ALL.into_iter().zip(caught) {
        assert_eq!(caught == 0, policy == Policy::Exclusive, "{policy}");
    }
}

/// Fewer: what `mm` does there is what it does in a model.
fn random_trees_are_right_on<S: Stage>() {
    for seed in 301..=310 {
        let scenario = scenario(Tree::steps(seed, false), Memory::Base);
        let outcome = emulate::<S>(&scenario, Policy::Exclusive, &mut |_| {});
        let steps = scenario.steps;
        assert_eq!(
            outcome.verdict(),
            Some(Verdict::Ok),
            "{seed}: {outcome:?} {steps:?}"
        );
    }
}

#[test]
fn random_trees_are_right_on_vcpus() {
    if has_kvm() {
        random_trees_are_right_on::<RealStage>();
    }
}

#[test]
fn random_trees_are_right_on_vcpus_without_kvm() {
    random_trees_are_right_on::<RealStage<ByThreads>>();
}

#[test]
fn random_trees_of_processes_are_right() {
    for seed in 1..=40 {
        let scenario = scenario(Tree::steps(seed, true), Memory::Base);
        let outcome = ask_the_kernel(&scenario, &mut |_| {});
        if let ScenarioOutcome::CannotAsk(why) = outcome {
            eprintln!("skipped: {why}");
            return;
        }
        let steps = scenario.steps;
        assert_eq!(
            outcome.verdict(),
            Some(Verdict::Ok),
            "{seed}: {outcome:?} {steps:?}"
        );
    }
}
