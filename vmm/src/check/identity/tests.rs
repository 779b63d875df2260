//! Guests that draw as the payload does, by its code, in memory that is words by address. Each wrong thing
//! must be found and said for what it is.

use std::cell::RefCell;
use std::collections::HashMap;
use std::mem::offset_of;
use std::sync::{Arc, Mutex};

use guest::abi::{IMAGE_GPA, PAGE_SIZE};
use guest::draws::{Drawer, Places};
use palimpsest::causes::Cause;
use palimpsest::kvm::GuestRam;

use super::*;
use crate::incarnation::{Entropy, Incarnations};

const VCPUS: u64 = 2;

fn layout() -> Layout {
    Layout::new(64 << 20, IMAGE_GPA, VCPUS, 0, 0).unwrap()
}

/// Guest memory: the words that were written.
#[derive(Debug, Default)]
struct Words(Mutex<HashMap<u64, u64>>);

impl Words {
    fn word(&self, gpa: u64) -> u64 {
        self.0.lock().unwrap().get(&gpa).copied().unwrap_or(0)
    }

    fn put(&self, gpa: u64, word: u64) {
        self.0.lock().unwrap().insert(gpa, word);
    }

    fn copied(&self) -> Self {
        Self(Mutex::new(self.0.lock().unwrap().clone()))
    }
}

impl GuestRam for Words {
    fn len(&self) -> u64 {
        layout().memory
    }
    fn write_fault(&self, _: u64) -> Result<bool, Cause> {
        Ok(false)
    }
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        for (word, bytes) in (gpa..).step_by(8).zip(buf.as_chunks_mut().0) {
            *bytes = self.word(word).to_le_bytes();
        }
        Ok(())
    }
    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        for (word, &bytes) in (gpa..).step_by(8).zip(buf.as_chunks().0) {
            self.put(word, u64::from_le_bytes(bytes));
        }
        Ok(())
    }
}

/// What vCPU `vcpu` draws in.
struct Of<'a>(&'a Words, u64);

impl Of<'_> {
    fn turn(&self) -> u64 {
        let turns = GENERATION_GPA + offset_of!(GenerationPage, turns) as u64;
        turns + self.1 * size_of::<Turn>() as u64
    }

    fn log_gpa(&self) -> u64 {
        layout().vcpu_page(self.1) + offset_of!(VcpuPage, draws) as u64
    }

    fn drawn(&self) -> u64 {
        self.0.word(self.turn() + offset_of!(Turn, count) as u64)
    }

    /// Where draw `index` is in the log.
    fn draw_gpa(&self, index: u64) -> u64 {
        let last = self.log_gpa() + offset_of!(DrawLog, last) as u64;
        last + index % DRAW_LOG * size_of::<Draw>() as u64
    }
}

impl Places for Of<'_> {
    fn generation(&self, offset: usize) -> u64 {
        self.0.word(GENERATION_GPA + offset as u64)
    }
    fn log(&self, offset: usize) -> u64 {
        self.0.word(self.log_gpa() + offset as u64)
    }
    fn write_log(&self, offset: usize, word: u64) {
        self.0.put(self.log_gpa() + offset as u64, word);
    }
    fn count(&self, from: Turn, to: Turn) -> bool {
        let found = Turn {
            generation: self
                .0
                .word(self.turn() + offset_of!(Turn, generation) as u64),
            count: self.drawn(),
        };
        if found == from {
            self.0
                .put(self.turn() + offset_of!(Turn, count) as u64, to.count);
        }
        found == from
    }
}

/// A guest, or a snapshot of one.
struct Guest {
    incarnation: Arc<Incarnation>,
    memory: Words,
    drawers: Vec<Drawer>,
}

/// Guests, and who looks at them.
struct World {
    incarnations: Incarnations,
    identities: RefCell<Identities>,
}

impl World {
    fn new() -> Self {
        Self {
            incarnations: Incarnations::new(Entropy::Seed(5)),
            identities: RefCell::default(),
        }
    }

    fn boot(&self) -> Guest {
        let memory = Words::default();
        Guest {
            incarnation: Arc::new(self.incarnations.boot(&memory, &layout()).unwrap()),
            memory,
            drawers: (0..VCPUS).map(Drawer::new).collect(),
        }
    }

    /// A guest that is started from what `original` is now.
    fn copy(&self, original: &Guest) -> Guest {
        let mut copy = original.snapshot();
        let incarnations = &self.incarnations;
        let begun = incarnations.copy(&copy.memory, &layout(), &original.incarnation);
        copy.incarnation = Arc::new(begun.unwrap());
        copy
    }

    /// One that keeps the generation of the original, though it was to have another.
    fn copy_that_keeps_its_generation(&self, original: &Guest) -> Guest {
        let copy = self.copy(original);
        for gpa in (GENERATION_GPA..GENERATION_GPA + PAGE_SIZE).step_by(8) {
            copy.memory.put(gpa, original.memory.word(gpa));
        }
        copy
    }

    /// What there is to say of a guest, and how many numbers were compared.
    fn look(&self, guest: &Guest) -> (Vec<Violation>, u64) {
        let due = (0..VCPUS).map(|vcpu| guest.drawn(vcpu)).collect::<Vec<_>>();
        self.look_for(
            guest,
            due.iter().map(|&drawn| Some(drawn..=drawn)).collect(),
        )
    }

    fn look_for(
        &self,
        guest: &Guest,
        due: Vec<Option<RangeInclusive<u64>>>,
    ) -> (Vec<Violation>, u64) {
        let now = Observation {
            snapshot: Some(9),
            found: Found::read(&layout(), |gpa| guest.memory.word(gpa)),
            due,
        };
        let mut said = Vec::new();
        let mut identities = self.identities.borrow_mut();
        let compared = identities.look(&guest.incarnation, &now, &mut |v| said.push(v));
        for violation in &said {
            assert_eq!(violation.oracle, Oracle::Identity);
            assert_eq!(violation.snapshot, Some(9));
            assert_ne!(violation.expected, violation.found, "{violation}");
        }
        (said, compared)
    }

    #[track_caller]
    fn assert_clean(&self, guest: &Guest) -> u64 {
        let (said, compared) = self.look(guest);
        assert_eq!(said, []);
        compared
    }

    /// What is said of a guest, in words.
    fn said(&self, guest: &Guest) -> Vec<String> {
        self.look(guest).0.into_iter().map(|v| v.detail).collect()
    }
}

impl Guest {
    fn draw(&mut self, vcpu: u64, times: u64) {
        for _ in 0..times {
            self.drawers[vcpu as usize].draw(&Of(&self.memory, vcpu));
        }
    }

    fn drawn(&self, vcpu: u64) -> u64 {
        Of(&self.memory, vcpu).drawn()
    }

    /// The same guest, as it is now.
    fn snapshot(&self) -> Self {
        Self {
            incarnation: Arc::clone(&self.incarnation),
            memory: self.memory.copied(),
            drawers: self.drawers.clone(),
        }
    }
}

#[test]
fn numbers_are_due_by_operations() {
    for (ops, least, most) in [
        (0, 0, 0),
        (1, 0, 0),
        (15, 0, 0),
        (16, 0, 1),
        (17, 1, 1),
        (31, 1, 1),
        (32, 1, 2),
        (33, 2, 2),
    ] {
        assert_eq!(due(ops..=ops), least..=most, "{ops}");
    }
    assert_eq!(due(15..=16), 0..=1);
    assert_eq!(due(16..=17), 0..=1);
    assert_eq!(due(32..=u64::MAX), 1..=u64::MAX / DRAW_EVERY);
}

#[test]
fn all_that_is_drawn_is_compared_once() {
    let world = World::new();
    let mut guest = world.boot();
    assert_eq!(world.assert_clean(&guest), 0);
    for round in 0..6 {
        // Fewer than a log has room for, as many, more.
        let (some, others) = (5 * round, 40 - 3 * round);
        guest.draw(0, some);
        guest.draw(1, others);
        assert_eq!(world.assert_clean(&guest), some + others);
        assert_eq!(world.assert_clean(&guest), 0);
    }
}

/// Copies of copies, of snapshots that are old, and guests that are rewound.
#[test]
fn no_copy_of_a_guest_draws_what_another_does() {
    let world = World::new();
    let mut guests = vec![world.boot()];
    let mut snapshots = Vec::new();
    let mut total = 0;
    for round in 0..200_usize {
        let at = round * 7 % guests.len();
        let guest = &mut guests[at];
        guest.draw(0, round as u64 % 5);
        guest.draw(1, round as u64 % 23);
        total += world.assert_clean(guest);
        snapshots.push(guest.snapshot());
        if snapshots.len() > 6 {
            snapshots.remove(round % 6);
        }
        let snapshot = &snapshots[round % snapshots.len()];
        match round % 5 {
            0 if guests.len() < 8 => guests.push(world.copy(snapshot)),
            3 => guests[at] = world.copy(snapshot),
            _ => {}
        }
    }
    assert_eq!(guests.len(), 8);
    assert!(total > 1000, "{total}");
}

/// Its log is that of the original still, and its vCPUs had drawn by then.
#[test]
fn a_copy_is_right_before_it_has_drawn_and_after() {
    let world = World::new();
    let mut guest = world.boot();
    guest.draw(0, 3);
    guest.draw(1, 50);
    world.assert_clean(&guest);
    for drawn in [0, 1, DRAW_LOG - 1, DRAW_LOG, 3 * DRAW_LOG] {
        let mut copy = world.copy(&guest);
        copy.draw(1, drawn);
        assert_eq!(world.assert_clean(&copy), drawn);
    }
    guest.draw(0, 1);
    assert_eq!(world.assert_clean(&guest), 1, "undisturbed");
}

#[test]
fn a_copy_that_keeps_its_generation_is_found_and_so_is_what_it_draws_again() {
    let world = World::new();
    let mut guest = world.boot();
    guest.draw(0, 10);
    guest.draw(1, 3);
    world.assert_clean(&guest);
    let mut copy = world.copy_that_keeps_its_generation(&guest);
    // Who draws first does not matter.
    guest.draw(0, 4);
    world.assert_clean(&guest);
    copy.draw(0, 6);
    copy.draw(1, 2);
    assert_eq!(
        world.said(&copy),
        [
            "the guest still has the generation of what it is a copy of (incarnation 1)",
            "vcpu 0 goes on drawing the numbers of what it is a copy of (incarnation 1)",
            "vcpu 0 has drawn numbers 10 to 13, which were drawn before",
            "vcpu 1 goes on drawing the numbers of what it is a copy of (incarnation 1)",
        ]
    );
    guest.draw(0, 1);
    guest.draw(1, 1);
    assert_eq!(
        world.said(&guest),
        [
            "vcpu 0 has drawn numbers 14 to 14, which were drawn before",
            "vcpu 1 has drawn numbers 3 to 3, which were drawn before",
        ]
    );
}

/// The new generation is there, and the guest does not take its seed.
#[test]
fn a_guest_that_keeps_the_seed_is_found() {
    let world = World::new();
    let mut guest = world.boot();
    guest.draw(0, 10);
    world.assert_clean(&guest);
    let mut copy = world.copy(&guest);
    let seed = GENERATION_GPA
        + (offset_of!(GenerationPage, generation) + offset_of!(Generation, seed)) as u64;
    let fresh: Vec<u64> = (0..4).map(|n| copy.memory.word(seed + 8 * n)).collect();
    let old = |n| guest.memory.word(seed + 8 * n);
    (0..4).for_each(|n| copy.memory.put(seed + 8 * n, old(n)));
    copy.draw(0, 2);
    (0..4).for_each(|n| copy.memory.put(seed + 8 * n, fresh[n as usize]));
    assert_eq!(
        world.said(&copy),
        ["vcpu 0 goes on drawing the numbers of what it is a copy of (incarnation 1)"]
    );
}

#[test]
fn each_word_of_the_log_matters() {
    let words = size_of::<Draw>() as u64 / 8;
    for drawn in [1, 5, DRAW_LOG, 40] {
        for back in 1..drawn.min(DRAW_LOG) {
            for word in 0..words {
                let world = World::new();
                let mut guest = world.boot();
                guest.draw(0, drawn);
                let gpa = Of(&guest.memory, 0).draw_gpa(drawn - back) + 8 * word;
                guest.memory.put(gpa, guest.memory.word(gpa) ^ 1);
                let (said, compared) = world.look(&guest);
                assert_eq!((said.len(), compared), (1, 0), "{drawn} {back} {word}");
                assert_eq!(
                    said[0].detail,
                    "what vcpu 0 has drawn is not of its generation"
                );
                assert_eq!(said[0].gpa, Some(gpa - 8 * word), "{}", said[0]);
            }
        }
    }
}

/// What is being drawn is in its place in the log already, and does not count yet.
#[test]
fn a_number_that_is_not_counted_is_void() {
    let world = World::new();
    let mut guest = world.boot();
    guest.draw(0, 20);
    let next = Of(&guest.memory, 0).draw_gpa(20);
    (0..3).for_each(|word| guest.memory.put(next + 8 * word, 7));
    assert_eq!(world.assert_clean(&guest), 20);
}

/// A number that the log has no more is in the digest still.
#[test]
fn a_number_that_was_wrong_long_ago_is_found() {
    let world = World::new();
    let mut guest = world.boot();
    guest.draw(0, 3);
    let digest = Of(&guest.memory, 0).draw_gpa(2) + offset_of!(Draw, digest) as u64;
    guest.memory.put(digest, 1);
    guest.draw(0, 2 * DRAW_LOG);
    assert_eq!(
        world.said(&guest),
        ["what vcpu 0 has drawn is not of its generation"]
    );
}

#[test]
fn the_log_of_a_copy_must_be_that_of_the_original() {
    let world = World::new();
    let mut guest = world.boot();
    guest.draw(0, 3);
    world.assert_clean(&guest);
    let copy = world.copy(&guest);
    let digest = Of(&copy.memory, 0).draw_gpa(2) + offset_of!(Draw, digest) as u64;
    copy.memory.put(digest, 1);
    assert_eq!(
        world.said(&copy),
        ["what vcpu 0 has drawn is not of its generation"]
    );
}

#[test]
fn numbers_that_are_lost_or_that_nobody_should_have_drawn_are_found() {
    let world = World::new();
    let mut guest = world.boot();
    guest.draw(0, 20);
    world.assert_clean(&guest);
    let before = guest.snapshot();
    guest.draw(0, 1);
    world.assert_clean(&guest);
    // The same incarnation, set back.
    assert_eq!(
        world.said(&before),
        ["numbers that vcpu 0 has drawn are not there any more"]
    );
    guest.draw(0, 2);
    for due in [22, 24] {
        let (said, compared) = world.look_for(&guest, vec![Some(due..=due), Some(0..=0)]);
        assert_eq!((said.len(), compared), (1, 0));
        let what = "vcpu 0 has not drawn as many numbers as it has done operations for";
        assert_eq!(said[0].detail, what);
    }
    // However many it says it has drawn.
    let count = Of(&guest.memory, 0).turn() + offset_of!(Turn, count) as u64;
    guest.memory.put(count, u64::MAX);
    let (said, _) = world.look_for(&guest, vec![Some(23..=23), Some(0..=0)]);
    assert_eq!(said.len(), 1);
}

#[test]
fn a_generation_that_is_lost_is_found() {
    let world = World::new();
    let guest = world.boot();
    let lost = |gpa: u64| {
        let guest = guest.snapshot();
        guest.memory.put(gpa, 77);
        world.said(&guest)
    };
    let what = "the guest has another generation than it was given";
    let generation = offset_of!(GenerationPage, generation) as u64;
    for word in (0..8).map(|word| 8 * word) {
        let magic = offset_of!(GenerationPage, magic) as u64;
        let at = if word == 0 {
            magic
        } else {
            generation + word - 8
        };
        assert_eq!(lost(GENERATION_GPA + at), [what], "{at}");
    }
    for vcpu in 0..VCPUS {
        let turn = Of(&guest.memory, vcpu).turn();
        assert_eq!(lost(turn + offset_of!(Turn, generation) as u64), [what]);
    }
}

#[test]
fn a_vcpu_that_says_it_draws_nothing_is_not_looked_at() {
    let world = World::new();
    let mut guest = world.boot();
    guest.draw(0, 5);
    guest.draw(1, 5);
    let (said, compared) = world.look_for(&guest, vec![None, Some(5..=5)]);
    assert_eq!((said, compared), (vec![], 5));
}

/// Of what nobody can be copied from nothing is kept.
#[test]
fn incarnations_that_are_gone_are_forgotten() {
    let world = World::new();
    let mut guest = world.boot();
    for _ in 0..50 {
        guest.draw(0, 2);
        world.assert_clean(&guest);
        guest = world.copy(&guest);
    }
    world.assert_clean(&guest);
    assert!(world.identities.borrow().known.len() <= 2);
}
