//! Machines that draw, and are copied between any two accesses to memory.
//!
//! | property | says |
//! |---|---|
//! | once | no number is counted twice, in whichever machines; what was counted before a copy was made counts once |
//! | closed | what a log holds is what its machine has counted, from boot on |
//!
//! What runs is the code of the guest. A vCPU that was stopped in the middle of a draw is run again from the
//! beginning of that draw, and given the answers that it had: memory has what it did by then.

use std::cell::RefCell;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::formula::generation_word;

const VCPUS: usize = 2;
const LOG_WORDS: usize = size_of::<DrawLog>() / 8;

/// How a draw is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counting {
    /// As it should be.
    AtOnce,
    /// The generation is looked at, and the count stored by the next instruction.
    LookThenStore,
    /// Nobody looks.
    Blindly,
}

/// What an access to memory has answered.
type Answer = u64;

#[derive(Clone)]
struct Vcpu {
    /// As it was before the draw that is being done.
    drawer: Drawer,
    /// The accesses of that draw which were done.
    done: Vec<Answer>,
    log: [u64; LOG_WORDS],
    /// All that was counted here since boot.
    counted: Vec<[u64; 2]>,
}

#[derive(Clone)]
struct Machine {
    generation: Generation,
    turns: [Turn; VCPUS],
    vcpus: [Vcpu; VCPUS],
}

/// A draw as one vCPU does it: what was done is answered again, one access more is carried out, and the next
/// stops it.
struct Played<'a> {
    counting: Counting,
    machine: RefCell<&'a mut Machine>,
    vcpu: usize,
    /// Accesses that were done when this began, and how many of them were answered.
    done: Vec<Answer>,
    answered: RefCell<usize>,
    is_through: RefCell<bool>,
}

struct Stopped;

impl Played<'_> {
    fn access(&self, carry_out: impl FnOnce(&mut Machine) -> Answer) -> Answer {
        let mut answered = self.answered.borrow_mut();
        if let Some(&answer) = self.done.get(*answered) {
            *answered += 1;
            return answer;
        }
        if self.is_through.replace(true) {
            // Not a panic: no message is printed.
            resume_unwind(Box::new(Stopped));
        }
        let mut machine = self.machine.borrow_mut();
        let answer = carry_out(&mut machine);
        machine.vcpus[self.vcpu].done.push(answer);
        answer
    }

    fn store_count(machine: &mut Machine, vcpu: usize, to: Turn) {
        machine.turns[vcpu].count = to.count;
        let log = &mut machine.vcpus[vcpu];
        let entry = (offset_of!(DrawLog, last) / 8)
            + ((to.count - 1) % DRAW_LOG) as usize * (size_of::<Draw>() / 8);
        let number = entry + offset_of!(Draw, number) / 8;
        log.counted.push([log.log[number], log.log[number + 1]]);
    }
}

impl Places for Played<'_> {
    fn generation(&self, offset: usize) -> u64 {
        self.access(|machine| machine.word(offset))
    }

    fn log(&self, offset: usize) -> u64 {
        self.access(|machine| machine.vcpus[self.vcpu].log[offset / 8])
    }

    fn write_log(&self, offset: usize, word: u64) {
        self.access(|machine| {
            machine.vcpus[self.vcpu].log[offset / 8] = word;
            0
        });
    }

    fn count(&self, from: Turn, to: Turn) -> bool {
        let vcpu = self.vcpu;
        match self.counting {
            Counting::AtOnce => {
                let counted = self.access(|machine| {
                    let is_from = machine.turns[vcpu] == from;
                    if is_from {
                        machine.turns[vcpu] = to;
                        Self::store_count(machine, vcpu, to);
                    }
                    u64::from(is_from)
                });
                counted != 0
            }
            Counting::LookThenStore => {
                let looked = self.access(|machine| machine.turns[vcpu].generation);
                if looked != from.generation {
                    return false;
                }
                self.access(|machine| {
                    Self::store_count(machine, vcpu, to);
                    0
                });
                true
            }
            Counting::Blindly => {
                self.access(|machine| {
                    Self::store_count(machine, vcpu, to);
                    0
                });
                true
            }
        }
    }
}

impl Machine {
    fn booted() -> Self {
        let vcpu = |vcpu| Vcpu {
            drawer: Drawer::new(vcpu),
            done: Vec::new(),
            log: [0; LOG_WORDS],
            counted: Vec::new(),
        };
        Self {
            generation: Generation::default(),
            turns: [Turn::default(); VCPUS],
            vcpus: [vcpu(0), vcpu(1)],
        }
    }

    fn word(&self, offset: usize) -> u64 {
        let turns = offset_of!(GenerationPage, turns);
        if let Some(offset) = offset.checked_sub(turns) {
            let turn = self.turns[offset / size_of::<Turn>()];
            return [turn.generation, turn.count][offset % size_of::<Turn>() / 8];
        }
        let seed = offset_of!(GenerationPage, generation) + offset_of!(Generation, seed);
        self.generation.seed[(offset - seed) / 8]
    }

    /// What a VMM does before the first instruction of a machine, the `number`th there is.
    fn renew(&mut self, number: u64) {
        self.generation.counter += 1;
        self.generation.seed = std::array::from_fn(|word| generation_word(1, number, word as u64));
        for turn in &mut self.turns {
            turn.generation = self.generation.counter;
        }
    }

    /// Has vCPU `vcpu` do its next access to memory, and a number that is counted by it.
    fn step(&mut self, counting: Counting, vcpu: usize) -> Option<[u64; 2]> {
        let before = self.vcpus[vcpu].counted.len();
        let mut drawer = self.vcpus[vcpu].drawer.clone();
        let places = Played {
            counting,
            vcpu,
            done: self.vcpus[vcpu].done.clone(),
            machine: RefCell::new(self),
            answered: RefCell::new(0),
            is_through: RefCell::new(false),
        };
        match catch_unwind(AssertUnwindSafe(|| drawer.draw(&places))) {
            Ok(_) => {
                let vcpu = &mut self.vcpus[vcpu];
                vcpu.drawer = drawer;
                vcpu.done.clear();
            }
            Err(why) if why.is::<Stopped>() => {}
            Err(panic) => resume_unwind(panic),
        }
        let counted = &self.vcpus[vcpu].counted;
        counted.get(before).copied()
    }

    fn assert_closed(&self) {
        for (vcpu, turn) in self.vcpus.iter().zip(&self.turns) {
            assert_eq!(vcpu.counted.len() as u64, turn.count, "closed");
            let counted = vcpu.counted.iter().enumerate();
            let mut digest = 0;
            for (index, &number) in counted {
                digest = draw_digest(digest, number);
                // The place of the next one may hold anything.
                if index as u64 + DRAW_LOG <= turn.count {
                    continue;
                }
                let entry = index % DRAW_LOG as usize * (size_of::<Draw>() / 8) + 1;
                let [_, at, low, high, found] = vcpu.log[entry..entry + 5] else {
                    unreachable!("a draw is five words");
                };
                assert_eq!((at, [low, high]), (index as u64, number), "closed");
                assert_eq!(found, digest, "closed");
            }
        }
    }
}

/// All machines there are.
struct World {
    counting: Counting,
    machines: Vec<Machine>,
    counted: HashSet<[u64; 2]>,
    is_once: bool,
}

impl World {
    fn new(counting: Counting) -> Self {
        let mut world = Self {
            counting,
            machines: vec![Machine::booted()],
            counted: HashSet::new(),
            is_once: true,
        };
        world.machines[0].renew(0);
        world
    }

    fn step(&mut self, machine: usize, vcpu: usize) {
        if let Some(number) = self.machines[machine].step(self.counting, vcpu) {
            self.is_once &= self.counted.insert(number);
        }
    }

    fn copy(&mut self, machine: usize) {
        let mut copy = self.machines[machine].clone();
        copy.renew(self.machines.len() as u64);
        self.machines.push(copy);
    }
}

/// Accesses of the first draw of a generation.
const ACCESSES: usize = 13;

/// Whether no number is counted twice when a machine is copied after each number of accesses in turn, and its
/// copies are copied after some more.
fn is_once_wherever_it_is_copied(counting: Counting) -> bool {
    (0..2 * ACCESSES).all(|accesses| {
        (0..ACCESSES).all(|more| {
            let mut world = World::new(counting);
            (0..accesses).for_each(|_| world.step(0, 0));
            world.copy(0);
            world.copy(0);
            (0..more).for_each(|_| world.step(1, 0));
            world.copy(1);
            world.copy(1);
            for machine in 0..world.machines.len() {
                (0..4 * ACCESSES).for_each(|_| world.step(machine, 0));
                assert!(world.machines[machine].vcpus[0].counted.len() > 2);
            }
            if counting == Counting::AtOnce {
                world.machines.iter().for_each(Machine::assert_closed);
            }
            world.is_once
        })
    })
}

#[test]
fn no_number_is_drawn_twice_wherever_a_machine_is_copied() {
    assert!(is_once_wherever_it_is_copied(Counting::AtOnce));
}

#[test]
fn who_does_not_look_draws_numbers_twice() {
    assert!(!is_once_wherever_it_is_copied(Counting::Blindly));
}

/// Two instructions leave room for a copy in between.
#[test]
fn to_look_and_then_to_count_is_not_enough() {
    assert!(!is_once_wherever_it_is_copied(Counting::LookThenStore));
}

#[derive(Clone, Copy, Debug)]
enum Op {
    /// A vCPU of a machine does so many accesses.
    Run(usize, usize, usize),
    /// A machine is copied.
    Copy(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0..8usize, 0..VCPUS, 1..2 * ACCESSES).prop_map(|(m, v, n)| Op::Run(m, v, n)),
        1 => (0..8usize).prop_map(Op::Copy),
    ];
    prop::collection::vec(op, 1..80)
}

/// Whether no number is counted twice in `ops`.
fn is_once(counting: Counting, ops: &[Op]) -> bool {
    let mut world = World::new(counting);
    for &op in ops {
        let count = world.machines.len();
        match op {
            Op::Run(machine, vcpu, accesses) => {
                (0..accesses).for_each(|_| world.step(machine % count, vcpu));
            }
            Op::Copy(machine) => world.copy(machine % count),
        }
    }
    if counting == Counting::AtOnce {
        world.machines.iter().for_each(Machine::assert_closed);
    }
    world.is_once
}

#[test]
fn no_number_is_drawn_twice_in_any_tree_of_machines() {
    let mut runner = TestRunner::new(Config::with_cases(300));
    let once = |ops: Vec<Op>| {
        prop_assert!(is_once(Counting::AtOnce, &ops), "once");
        Ok(())
    };
    runner.run(&ops(), once).unwrap();
}

#[test]
fn any_tree_shows_wrong_ways_to_count() {
    for counting in [Counting::Blindly, Counting::LookThenStore] {
        let mut runner = TestRunner::deterministic();
        let once = |ops: Vec<Op>| {
            prop_assert!(is_once(counting, &ops), "once");
            Ok(())
        };
        assert!(runner.run(&ops(), once).is_err(), "{counting:?}");
    }
}
