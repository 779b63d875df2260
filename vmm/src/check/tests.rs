//! The looks at hammered pages, with memory that is right but for one page: each wrong page must be found, and by the right oracle.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest::abi::{IMAGE_GPA, Layout, PAGE_SIZE, Pattern, REGION_SIZE};
use guest::formula::{PAGE_WORDS, Schedule, page_word};

use super::hammer::{At, Hammered};
use super::view::View;
use super::violation::{Oracle, Violation};
use crate::host::{MappingBudget, PhysMap, Ram, Window};
use crate::mm::{Access, AddressSpace, CowPolicy, Exclusive, FramePool, FrameState, Frozen};

const SEED: u64 = 11;
const PATTERNS: [Pattern; 4] = [
    Pattern::Dense,
    Pattern::Uniform,
    Pattern::Hot,
    Pattern::Sparse,
];

/// The exclusive policy, but for one write that takes a shared frame over: the next one after it was armed.
struct MissesOneCow(Arc<AtomicBool>);

impl CowPolicy for MissesOneCow {
    const NAME: &'static str = "misses-one-cow";
    fn may_share(&self, frame: FrameState) -> bool {
        Exclusive.may_share(frame)
    }
    fn may_reuse(&self, frame: FrameState) -> bool {
        Exclusive.may_reuse(frame) || (frame.maps() > 1 && self.0.swap(false, Ordering::Relaxed))
    }
    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        Exclusive.may_pin(frame, access)
    }
}

/// A guest of one vCPU that is played by the test.
struct Guest {
    pattern: Pattern,
    layout: Layout,
    schedule: Schedule,
    hammered: Hammered,
    ram: Ram<MissesOneCow>,
    pool: Arc<FramePool>,
    miss_one: Arc<AtomicBool>,
    ops: u64,
}

struct Taken {
    number: u64,
    memory: Arc<Frozen>,
    ops: [u64; 1],
}

impl Guest {
    fn new(pattern: Pattern) -> Self {
        let layout = Layout::new(IMAGE_GPA + 8 * REGION_SIZE, IMAGE_GPA, 1, 0, 0).unwrap();
        let pages = layout.memory / PAGE_SIZE;
        let frames = 6 * pages + 1024;
        let physmap = PhysMap::new(frames).unwrap();
        let pool = FramePool::new(Arc::clone(&physmap) as _, frames, frames).unwrap();
        let budget = Arc::new(MappingBudget::with_limit(30_000));
        let window = Window::new(Arc::clone(&physmap), budget, pages).unwrap();
        let miss_one = Arc::new(AtomicBool::new(false));
        let policy = MissesOneCow(Arc::clone(&miss_one));
        let space = AddressSpace::new(Arc::clone(&pool), policy, Box::new(window), pages)
            .unwrap()
            .with_base_pages();
        Self {
            pattern,
            layout,
            schedule: Schedule::new(pattern, layout.slots(pattern, 0), SEED, 0),
            hammered: Hammered::new(SEED, pattern, layout),
            ram: Ram::new(Arc::new(space), physmap),
            pool,
            miss_one,
            ops: 0,
        }
    }

    fn slots(&self) -> u64 {
        self.layout.slots(self.pattern, 0)
    }

    fn gpa(&self, op: u64) -> u64 {
        self.layout
            .slot_gpa(self.pattern, 0, self.schedule.slot_of(op))
    }

    /// The first `words` words of the page of operation `op`.
    fn write_words(&self, op: u64, words: u64) {
        let bytes: Vec<u8> = (0..words)
            .flat_map(|word| page_word(SEED, 0, op, word).to_le_bytes())
            .collect();
        self.ram.write(self.gpa(op), &bytes).unwrap();
    }

    fn run(&mut self, ops: u64) {
        for op in self.ops..self.ops + ops {
            self.write_words(op, PAGE_WORDS);
        }
        self.ops += ops;
    }

    fn snapshot(&self, number: u64) -> Taken {
        Taken {
            number,
            memory: self.ram.space().fork().unwrap(),
            ops: [self.ops],
        }
    }

    fn at<'a>(&'a self, taken: &'a Taken) -> At<'a> {
        At {
            view: View::new(taken.number, &taken.memory, self.ram.physmap(), &self.pool),
            ops: &taken.ops,
        }
    }

    fn first_look(&self, now: &Taken, parent: Option<&Taken>) -> (u64, Vec<Violation>) {
        let mut found = Vec::new();
        let parent = parent.map(|p| self.at(p));
        let report = &mut |v| found.push(v);
        let pages = self.hammered.first_look(self.at(now), parent, report);
        (pages, found)
    }

    fn last_look(&self, now: &Taken, heir: Option<&Taken>) -> Vec<Violation> {
        let mut found = Vec::new();
        let heir = heir.map(|h| self.at(h));
        self.hammered
            .last_look(self.at(now), heir, &mut |v| found.push(v));
        found
    }
}

#[test]
fn right_memory_passes_and_is_read_only_where_it_was_written() {
    for pattern in PATTERNS {
        let mut guest = Guest::new(pattern);
        guest.run(guest.slots() + 3);
        let mut parent = guest.snapshot(1);
        let (read, found) = guest.first_look(&parent, None);
        assert_eq!((read, found), (guest.slots(), vec![]), "{pattern:?}");
        for number in 2..6 {
            // Fewer operations than slots, as many, more.
            let ops = guest.slots() * (number - 1) / 3;
            guest.run(ops.max(1));
            let now = guest.snapshot(number);
            let (read, found) = guest.first_look(&now, Some(&parent));
            assert_eq!(found, [], "{pattern:?}");
            assert!(read <= ops + 2, "{pattern:?}: {read} read for {ops}");
            assert_eq!(guest.last_look(&parent, Some(&now)), [], "{pattern:?}");
            parent = now;
        }
        assert_eq!(guest.last_look(&parent, None), [], "{pattern:?}");
    }
}

#[test]
fn one_missed_copy_is_found_however_much_was_written_since() {
    for pattern in PATTERNS {
        for share_of_slots in [1, 3, 10] {
            let mut guest = Guest::new(pattern);
            guest.run(2 * guest.slots());
            let parent = guest.snapshot(1);
            assert_eq!(guest.first_look(&parent, None).1, []);
            guest.run(2);
            guest.miss_one.store(true, Ordering::Relaxed);
            guest.run((guest.slots() * share_of_slots / 3).max(1));
            assert!(!guest.miss_one.load(Ordering::Relaxed), "a copy was missed");
            let now = guest.snapshot(2);
            let mut found = guest.first_look(&now, Some(&parent)).1;
            found.extend(guest.last_look(&parent, Some(&now)));
            found.extend(guest.last_look(&now, None));
            assert!(
                found
                    .iter()
                    .any(|v| v.oracle == Oracle::Isolation && v.snapshot == Some(1)),
                "{pattern:?}, {share_of_slots} thirds: {found:?}"
            );
        }
    }
}

#[test]
fn one_lost_write_is_a_cut_violation() {
    for pattern in PATTERNS {
        let mut guest = Guest::new(pattern);
        guest.run(2 * guest.slots());
        let parent = guest.snapshot(1);
        // Counted, and not done.
        guest.ops += 1;
        guest.run(3);
        let now = guest.snapshot(2);
        let found = guest.first_look(&now, Some(&parent)).1;
        assert_eq!(found.len(), 1, "{pattern:?}: {found:?}");
        assert_eq!((found[0].oracle, found[0].snapshot), (Oracle::Cut, Some(2)));
    }
}

#[test]
fn one_changed_word_is_found_at_either_look() {
    let mut guest = Guest::new(Pattern::Uniform);
    guest.run(guest.slots() / 2);
    let taken = guest.snapshot(1);
    let at = guest.gpa(7) + 8 * 100;
    let flip = || {
        taken
            .memory
            .with_frame(crate::mm::Gfn::of_gpa(at), |pfn| {
                let slice = guest.ram.physmap().slice(pfn, at % PAGE_SIZE, 1);
                let mut byte = [0u8];
                slice.copy_to(&mut byte[..]);
                slice.copy_from(&[byte[0] ^ 1]);
            })
            .unwrap();
    };
    flip();
    let found = guest.first_look(&taken, None).1;
    assert_eq!((found.len(), found[0].gpa), (1, Some(at)));
    flip();
    assert_eq!(guest.first_look(&taken, None).1, []);
    flip();
    let found = guest.last_look(&taken, None);
    assert_eq!((found.len(), found[0].oracle), (1, Oracle::Isolation));
    assert!(found[0].expected.contains("operation 7"), "{}", found[0]);
}

#[test]
fn the_operation_that_is_being_done_may_have_written_a_beginning() {
    let mut guest = Guest::new(Pattern::Uniform);
    guest.run(2 * guest.slots());
    for words in [0, 1, 200, PAGE_WORDS] {
        guest.write_words(guest.ops, words);
        let taken = guest.snapshot(1);
        assert_eq!(guest.first_look(&taken, None).1, [], "{words} words");
    }
    // An end without the beginning is torn.
    let last = page_word(SEED, 0, guest.ops, PAGE_WORDS - 1);
    guest.run(1);
    guest.write_words(guest.ops, 10);
    let torn = guest.gpa(guest.ops) + PAGE_SIZE - 8;
    guest.ram.write(torn, &last.to_le_bytes()).unwrap();
    let found = guest.first_look(&guest.snapshot(2), None).1;
    assert_eq!((found.len(), found[0].gpa), (1, Some(torn)));
}

#[test]
fn a_page_between_sparse_slots_must_stay_zero() {
    let mut guest = Guest::new(Pattern::Sparse);
    guest.run(guest.slots());
    let stray = guest.gpa(0) + PAGE_SIZE;
    guest.ram.write(stray, &[1]).unwrap();
    let taken = guest.snapshot(1);
    let found = guest.first_look(&taken, None).1;
    assert_eq!((found.len(), found[0].gpa), (1, Some(stray)));
    assert_eq!(guest.last_look(&taken, None).len(), 1);
}
