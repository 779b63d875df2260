//! The looks at hammered pages, with memory that is right but for one page: each wrong page must be found,
//! and by the right oracle.

use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest::abi::{
    AREA_AVAIL, AREA_DRIVER, AREA_USED, BUFFER_LEN, DATA_LEN, DATA_OFFSET, DriverPage, DriverSlot,
    FOLLOWS_FORMULA, IMAGE_GPA, Layout, PAGE_SIZE, Pattern, REGION_SIZE, STREAM_SLOTS, VcpuPage,
    buffer_offset,
};
use guest::formula::{PAGE_WORDS, Schedule, margin_word, page_word};
use kvm_bindings::{kvm_regs, kvm_sregs};
use virtio_queue::QueueState;

use super::boot::{Boot, Declared, Reference};
use super::examiner::Examiner;
use super::examiner::Look;
use super::hammer::{At, Hammered};
use super::view::View;
use super::violation::{Oracle, Violation};
use crate::dma::DeviceState;
use palimpsest::saved::Saved;
use palimpsest::snapshot;

use crate::run_snapshot::RunSnapshot;
use palimpsest::host::{MappingBudget, PhysMap, Ram, Window};
use palimpsest::kvm::VcpuState;
use palimpsest::mm::{Access, AddressSpace, CowPolicy, Exclusive, FramePool, FrameState, Frozen};

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
    fn name(&self) -> &'static str {
        "misses-one-cow"
    }
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
    space: Arc<AddressSpace<MissesOneCow>>,
    ram: Ram,
    pool: Arc<FramePool>,
    miss_one: Arc<AtomicBool>,
    ops: u64,
}

struct MemorySnapshot {
    number: u64,
    memory: Arc<Frozen>,
    ops: [u64; 1],
}

impl Guest {
    fn new(pattern: Pattern) -> Self {
        Self::with_devices(pattern, 0)
    }

    fn with_devices(pattern: Pattern, devices: u64) -> Self {
        let regions = 8 + 2 * devices;
        let memory = IMAGE_GPA + regions * REGION_SIZE;
        let layout = Layout::new(memory, IMAGE_GPA, 1, devices, 0).unwrap();
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
        let space = Arc::new(space);
        Self {
            pattern,
            layout,
            schedule: Schedule::new(pattern, layout.slots(pattern, 0), SEED, 0),
            hammered: Hammered::new(SEED, pattern, layout),
            ram: Ram::new(Arc::clone(&space) as _, physmap),
            space,
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

    fn snapshot(&self, number: u64) -> MemorySnapshot {
        MemorySnapshot {
            number,
            memory: self.space.fork().unwrap(),
            ops: [self.ops],
        }
    }

    fn at<'a>(&'a self, taken: &'a MemorySnapshot) -> At<'a> {
        At {
            view: View::new(taken.number, &taken.memory, self.ram.physmap(), &self.pool),
            ops: &taken.ops,
        }
    }

    fn first_look(
        &self,
        now: &MemorySnapshot,
        parent: Option<&MemorySnapshot>,
    ) -> (u64, Vec<Violation>) {
        let mut found = Vec::new();
        let parent = parent.map(|p| self.at(p));
        let report = &mut |v| found.push(v);
        let pages = self.hammered.first_look(self.at(now), parent, report);
        (pages, found)
    }

    fn last_look(&self, now: &MemorySnapshot, heir: Option<&MemorySnapshot>) -> Vec<Violation> {
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
            .with_frame(palimpsest::mm::Gfn::of_gpa(at), |pfn| {
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

impl Guest {
    fn put(&self, gpa: u64, word: u64) {
        self.ram.write(gpa, &word.to_le_bytes()).unwrap();
    }

    /// What the payload says of itself: that it follows the formula, and how far it is.
    fn declare(&self) {
        let page = self.layout.vcpu_page(0);
        self.put(page + offset_of!(VcpuPage, formula) as u64, FOLLOWS_FORMULA);
        self.put(page + offset_of!(VcpuPage, ops) as u64, self.ops);
    }

    /// Registers of a vCPU that has done as many operations.
    fn state(&self) -> VcpuState {
        let mut area = vec![0; 1024];
        // MM7, and that there is x87 state.
        area[(32 + 7 * 16) / 4] = self.ops as u32;
        area[128] = 1;
        VcpuState::of(kvm_regs::default(), kvm_sregs::default(), area)
    }

    fn examiner(&self) -> Examiner {
        let (physmap, pool) = (Arc::clone(self.ram.physmap()), Arc::clone(&self.pool));
        Examiner::new(SEED, self.pattern, self.layout, physmap, pool)
    }

    fn taken(&self, number: u64) -> RunSnapshot {
        let vcpus = vec![Saved::new(self.state())];
        let taken = snapshot::Snapshot::new(self.space.fork().unwrap(), vcpus, Vec::new());
        RunSnapshot::new(number, None, taken).unwrap()
    }
}

#[test]
fn a_guest_that_has_once_followed_the_formula_follows_it() {
    let mut guest = Guest::new(Pattern::Uniform);
    let reference = Reference::new(&guest.ram, &guest.layout, &[]);
    let latch = |guest: &Guest| {
        let registers = || Ok::<_, ()>(vec![guest.state()]);
        Boot::latch(&guest.ram, &guest.layout, &reference, registers).unwrap()
    };
    assert!(latch(&guest).is_none(), "it has said nothing yet");
    guest.run(10);
    guest.declare();
    let look = Look {
        boot: latch(&guest).map(Arc::new),
        ..Look::default()
    };
    assert_eq!(look.boot.as_ref().unwrap().vcpus, [Declared::default()]);
    let found = guest.examiner().first_look(&guest.taken(1), &look);
    assert_eq!(found.violations, []);
    // The page is lost, and with it the word that says so.
    let page = guest.layout.vcpu_page(0);
    guest.ram.write(page, &[0; PAGE_SIZE as usize]).unwrap();
    let found = guest.examiner().first_look(&guest.taken(2), &look);
    let has_lost = |v: &Violation| v.detail.contains("has lost what it has said");
    assert!(found.violations.iter().any(has_lost), "{found:?}");
}

#[test]
fn a_page_that_nobody_writes_must_be_what_it_was() {
    let mut guest = Guest::new(Pattern::Uniform);
    let code = 0x3000;
    guest.put(code, 0x90);
    let reference = Reference::new(&guest.ram, &guest.layout, &[]);
    guest.run(10);
    guest.declare();
    let registers = || Ok::<_, ()>(vec![guest.state()]);
    let boot = Boot::latch(&guest.ram, &guest.layout, &reference, registers).unwrap();
    let look = Look {
        boot: boot.map(Arc::new),
        ..Look::default()
    };
    for (gpa, before) in [(code, 0x90), (0x5000, 0)] {
        guest.put(gpa, 1);
        let found = guest
            .examiner()
            .first_look(&guest.taken(1), &look)
            .violations;
        assert_eq!((found.len(), found[0].gpa), (1, Some(gpa)), "{found:?}");
        assert_eq!(found[0].oracle, Oracle::Cut);
        guest.put(gpa, before);
    }
    let found = guest.examiner().first_look(&guest.taken(2), &look);
    assert_eq!(found.violations, []);
}

#[test]
fn a_page_that_a_restore_has_not_set_back_is_found() {
    let guest = Guest::new(Pattern::Uniform);
    guest.put(0x10_0008, 5);
    let taken = guest.taken(4);
    guest.put(0x10_0008, 6);
    let look = || super::restored(&guest.ram, &taken, &guest.layout, &guest.pool);
    let found = look().unwrap();
    assert_eq!((found.oracle, found.gpa), (Oracle::Life, Some(0x10_0008)));
    guest.space.restore(taken.memory()).unwrap();
    assert_eq!(look(), None);
}

#[test]
fn a_driver_that_has_lost_its_notes_is_found() {
    const DONE: u16 = 3;
    let guest = Guest::with_devices(Pattern::Uniform, 1);
    let area = guest.layout.device_area(0);
    let notes = area + AREA_DRIVER;
    for ring in [AREA_AVAIL, AREA_USED] {
        guest
            .ram
            .write(area + ring + 2, &DONE.to_le_bytes())
            .unwrap();
    }
    for offset in [
        offset_of!(DriverPage, next_seq),
        offset_of!(DriverPage, last_used),
        offset_of!(DriverPage, completed),
    ] {
        guest.put(notes + offset as u64, DONE.into());
    }
    let margins = (0..DATA_OFFSET / 8).chain((DATA_OFFSET + DATA_LEN) / 8..BUFFER_LEN / 8);
    for (slot, word) in (0..STREAM_SLOTS).flat_map(|s| margins.clone().map(move |w| (s, w))) {
        let at = area + buffer_offset(slot) + 8 * word;
        guest.put(at, margin_word(SEED, 0, slot, 0, word));
    }
    let state = DeviceState {
        queue: QueueState {
            next_avail: DONE,
            next_used: DONE,
            ..QueueState::default()
        },
        pending: Vec::new(),
        in_flight: None,
        registered: Vec::new(),
    };
    let look = || {
        let memory = guest.space.fork().unwrap();
        let view = View::new(1, &memory, guest.ram.physmap(), &guest.pool);
        let mut found = Vec::new();
        super::rings::check(view, &guest.layout, SEED, 0, &state, &mut |v| found.push(v));
        found
    };
    assert_eq!(look(), []);
    let slot = notes + (offset_of!(DriverPage, slots) + offset_of!(DriverSlot, state)) as u64;
    guest.ram.write(slot, &7u32.to_le_bytes()).unwrap();
    let found = look();
    assert!(found[0].detail.contains("makes no sense"), "{found:?}");
    guest.ram.write(slot, &0u32.to_le_bytes()).unwrap();
    let margin = area + buffer_offset(2);
    guest.put(margin, 1);
    assert_eq!(look()[0].gpa, Some(margin), "of an idle slot, too");
    guest.put(margin, margin_word(SEED, 0, 2, 0, 0));
    guest.ram.write(notes, &[0; PAGE_SIZE as usize]).unwrap();
    let found = look();
    assert!(found[0].detail.contains("requests posted"), "{found:?}");
}
