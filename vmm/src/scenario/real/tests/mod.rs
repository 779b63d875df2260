//! Tests on real KVM.
//!
//! Without a usable `/dev/kvm` they say that they were skipped; with `CI=true` in the
//! environment that is a failure. `family` has several guests at once, without KVM too.

mod family;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{IMAGE_GPA, MAIL_GPA};

use super::*;
use palimpsest::causes::chain;
use palimpsest::kvm::CrashReason;
use palimpsest::mm::{Access, CowPolicy, Exclusive, FrameState, Mapcount};

/// A stage, or `None` if the test is to be skipped.
fn stage() -> Option<RealStage> {
    if let Err(error) = Kvm::open() {
        let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
        assert!(!in_ci, "kvm is needed in CI: {error}");
        eprintln!("skipped: {error}");
        return None;
    }
    Some(RealStage::new(Memory::Base).unwrap())
}

/// The stage of this test, or the test returns.
macro_rules! need_stage {
    () => {
        match stage() {
            Some(stage) => stage,
            None => return,
        }
    };
}

fn plain(mmu: Box<dyn Mmu>) -> Box<dyn Mmu> {
    mmu
}

fn parent(stage: &RealStage) -> RealActor {
    stage.parent(Box::new(Exclusive), &plain).unwrap()
}

/// What a snapshot holds in the first word of a page.
fn frozen_word(stage: &RealStage, frozen: &Frozen, page: u64) -> u64 {
    stage.load(frozen.frame(stage.gfn(page)).unwrap())
}

fn words(actor: &RealActor) -> [u64; PAGES as usize] {
    std::array::from_fn(|page| actor.cpu_read(page as u64).unwrap())
}

/// Says in words why a CPU did not do it.
fn reason<T: std::fmt::Debug>(result: Result<T, StageError>) -> String {
    chain(&*result.unwrap_err())
}

fn wait_until(what: &str, ready: impl Fn() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(60), "no {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// An MMU that refuses changes while it is told to, and knows which thread made the last.
struct Watched {
    mmu: Box<dyn Mmu>,
    watch: Arc<Watch>,
}

#[derive(Default)]
struct Watch {
    refuses: AtomicBool,
    thread: Mutex<Option<i32>>,
}

impl Watched {
    fn wrap(watch: &Arc<Watch>) -> impl Fn(Box<dyn Mmu>) -> Box<dyn Mmu> + '_ {
        move |mmu| {
            let watch = Arc::clone(watch);
            Box::new(Self { mmu, watch })
        }
    }

    fn look(&self) -> Result<(), MmuError> {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        *self.watch.thread.lock().unwrap() = Some(thread);
        if self.watch.refuses.load(Ordering::SeqCst) {
            return Err(MmuError::MappingLimit { limit: 77 });
        }
        Ok(())
    }
}

impl Mmu for Watched {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        self.look()?;
        self.mmu.map(first, frame, count, protection)
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        self.look()?;
        self.mmu.protect(first, count, protection)
    }
}

/// An MMU that nobody looks through.
struct Unseen;

impl Mmu for Unseen {
    fn map(&self, _: Gfn, _: Pfn, _: u64, _: Protection) -> Result<(), MmuError> {
        Ok(())
    }
    fn protect(&self, _: Gfn, _: u64, _: Protection) -> Result<(), MmuError> {
        Ok(())
    }
}

/// Uses up all memory for as long as the address spaces it returns live: first what was never used,
/// then what was given back.
fn exhaust(stage: &RealStage) -> Vec<AddressSpace<Exclusive>> {
    let pool = Arc::clone(stage.pool());
    let space =
        AddressSpace::new(Arc::clone(&pool), Exclusive, Box::new(Unseen), FRAME_LIMIT).unwrap();
    let filled = (0..FRAME_LIMIT)
        .map(Gfn)
        .take_while(|&gfn| space.write_fault(gfn).is_ok())
        .count() as u64;
    let frozen = space.fork().unwrap();
    let copies = AddressSpace::from_frozen(&frozen, Exclusive, Box::new(Unseen)).unwrap();
    drop(frozen);
    (0..filled)
        .map(Gfn)
        .take_while(|&gfn| space.write_fault(gfn).is_ok())
        .count();
    vec![space, copies]
}

#[test]
fn the_vcpu_reads_zeros_and_then_what_it_wrote() {
    let stage = need_stage!();
    let actor = parent(&stage);
    assert_eq!(words(&actor), [0; 4]);
    assert_eq!(actor.write_faults(), 0);
    for page in 0..PAGES {
        actor.cpu_write(page, u64::MAX - page).unwrap();
        assert_eq!(actor.cpu_read(page).unwrap(), u64::MAX - page);
        let entry = actor.space().entry(stage.gfn(page)).unwrap();
        assert!(entry.is_writable());
        assert_eq!(stage.load(entry.pfn()), u64::MAX - page);
        stage.store(entry.pfn(), page);
    }
    assert_eq!(words(&actor), [0, 1, 2, 3]);
    assert_eq!(actor.write_faults(), PAGES);
    actor.cpu_write(0, 5).unwrap();
    assert_eq!(actor.write_faults(), PAGES, "the page was writable");
}

#[test]
fn only_the_scenario_has_frames() {
    let stage = need_stage!();
    let actor = parent(&stage);
    assert_eq!(stage.pool().usage().in_use, 0);
    actor.cpu_read(1).unwrap();
    assert_eq!(stage.pool().usage().in_use, 0);
    actor.cpu_write(1, 1).unwrap();
    assert_eq!(stage.pool().usage().in_use, 1);
    let frozen = actor.space().fork().unwrap();
    let child = stage.child(&frozen, Box::new(Exclusive), &plain).unwrap();
    child.cpu_write(1, 2).unwrap();
    assert_eq!(stage.pool().usage().in_use, 2);
}

#[test]
fn a_write_after_a_fork_leaves_the_snapshot_as_it_was() {
    let stage = need_stage!();
    let actor = parent(&stage);
    actor.cpu_write(2, 1).unwrap();
    for old in 1..20 {
        let frozen = actor.space().fork().unwrap();
        let faults = actor.write_faults();
        actor.cpu_write(2, old + 1).unwrap();
        assert_eq!(actor.write_faults(), faults + 1);
        assert_eq!(actor.cpu_read(2).unwrap(), old + 1);
        assert_eq!(frozen_word(&stage, &frozen, 2), old);
    }
}

#[test]
fn a_child_and_its_parent_are_isolated_both_ways() {
    let stage = need_stage!();
    let parent = parent(&stage);
    parent.cpu_write(0, 10).unwrap();
    parent.cpu_write(1, 11).unwrap();
    let frozen = parent.space().fork().unwrap();
    let child = stage.child(&frozen, Box::new(Exclusive), &plain).unwrap();
    drop(frozen);
    assert_eq!(words(&child), [10, 11, 0, 0]);
    child.cpu_write(0, 20).unwrap();
    parent.cpu_write(1, 31).unwrap();
    parent.cpu_write(2, 32).unwrap();
    child.cpu_write(3, 23).unwrap();
    assert_eq!(words(&parent), [10, 31, 32, 0]);
    assert_eq!(words(&child), [20, 11, 0, 23]);

    let frozen = child.space().fork().unwrap();
    let grandchild = stage.child(&frozen, Box::new(Exclusive), &plain).unwrap();
    drop(parent);
    drop(child);
    grandchild.cpu_write(1, 41).unwrap();
    assert_eq!(words(&grandchild), [20, 41, 0, 23]);
    assert_eq!(frozen_word(&stage, &frozen, 1), 11);
}

/// The folio of a guest in huge memory is one of the window's regions, and stays so for parent and child.
#[test]
fn huge_memory_is_one_folio_of_the_window() {
    drop(need_stage!());
    let stage = RealStage::new(Memory::Huge).unwrap();
    let parent = parent(&stage);
    parent.cpu_write(2, 12).unwrap();
    for page in 0..PAGES {
        let entry = parent.space().entry(stage.gfn(page)).unwrap();
        assert!(entry.is_huge() && entry.is_writable(), "{entry:?}");
        assert_eq!(entry.pfn().0 % REGION_PAGES, stage.gfn(page).0);
    }
    assert_eq!(parent.write_faults(), 1);
    (0..PAGES).for_each(|page| parent.cpu_write(page, 10 + page).unwrap());
    assert_eq!(parent.write_faults(), 1, "the fault was of all of it");

    let frozen = parent.space().fork().unwrap();
    let child = stage.child(&frozen, Box::new(Exclusive), &plain).unwrap();
    drop(frozen);
    assert!(child.space().entry(stage.gfn(3)).unwrap().is_huge());
    child.cpu_write(3, 23).unwrap();
    parent.cpu_write(0, 30).unwrap();
    assert_eq!(words(&parent), [30, 11, 12, 13]);
    assert_eq!(words(&child), [10, 11, 12, 23]);
    // The neighbours of the scenario's pages, too.
    let frame = |actor: &RealActor, n| actor.space().entry(Gfn(n)).unwrap().pfn();
    assert_eq!(frame(&parent, 2), frame(&child, 2));
    assert_ne!(frame(&parent, 0), frame(&child, 0));
}

#[test]
fn a_write_that_the_mmu_refuses_is_an_error() {
    let stage = need_stage!();
    let watch = Arc::new(Watch::default());
    let wrap = Watched::wrap(&watch);
    let parent = stage.parent(Box::new(Exclusive), &wrap).unwrap();
    parent.cpu_write(0, 1).unwrap();
    let frozen = parent.space().fork().unwrap();

    watch.refuses.store(true, Ordering::SeqCst);
    assert_eq!(
        reason(stage.child(&frozen, Box::new(Exclusive), &wrap)),
        "cannot map the clone's memory: the window needs more than 77 memory mappings: \
         raise vm.max_map_count (sysctl -w vm.max_map_count=262144)"
    );
    assert_eq!(parent.cpu_read(0).unwrap(), 1, "that was not its refusal");
    let refusal = reason(parent.cpu_write(0, 2));
    assert!(
        refusal.starts_with(
            "the vcpu failed: cannot make frame 0x8 writable for the guest: \
                 the window needs more than 77"
        ),
        "{refusal}"
    );
    watch.refuses.store(false, Ordering::SeqCst);
    for _ in 0..2 {
        assert_eq!(
            reason(parent.cpu_read(0)),
            format!("the vcpu has ended: {refusal}")
        );
    }
    assert_eq!(frozen_word(&stage, &frozen, 0), 1);
    // The address space is whole, and a new guest can run on in it.
    let child = stage.child(&frozen, Box::new(Exclusive), &wrap).unwrap();
    child.cpu_write(0, 3).unwrap();
    assert_eq!(words(&child), [3, 0, 0, 0]);
}

#[test]
fn without_memory_writes_that_need_some_are_errors_and_nothing_else_is() {
    let stage = need_stage!();
    let actor = parent(&stage);
    for page in 0..3 {
        actor.cpu_write(page, page + 1).unwrap();
    }
    let gone = exhaust(&stage);
    assert_eq!(words(&actor), [1, 2, 3, 0]);
    actor.cpu_write(0, 7).unwrap();
    // Nothing of the puppet's is shared, so a fork with nothing pinned needs no memory.
    drop(actor.space().fork().unwrap());
    actor.cpu_write(1, 8).unwrap();
    // One with a pinned page does, and is refused; the guest runs on.
    let pin = actor.space().pin(stage.gfn(0), Access::Write).unwrap();
    let refused = chain(&actor.space().fork().unwrap_err());
    assert!(refused.contains("out of memory"), "{refused}");
    for page in 0..3 {
        actor.cpu_write(page, 20 + page).unwrap();
    }
    assert_eq!(words(&actor), [20, 21, 22, 0]);
    drop(pin);
    let refused = reason(actor.cpu_write(3, 1));
    assert!(refused.contains("out of memory"), "{refused}");
    drop(gone);
}

#[test]
fn a_guest_obeys_whatever_the_policy() {
    /// Everything is allowed.
    struct Careless;
    impl CowPolicy for Careless {
        fn name(&self) -> &'static str {
            "careless"
        }
        fn may_share(&self, _: FrameState) -> bool {
            true
        }
        fn may_reuse(&self, _: FrameState) -> bool {
            true
        }
        fn may_pin(&self, _: FrameState, _: Access) -> bool {
            true
        }
    }
    let stage = need_stage!();
    let parent = stage.parent(Box::new(Careless), &plain).unwrap();
    parent.cpu_write(0, 1).unwrap();
    let frozen = parent.space().fork().unwrap();
    let child = stage.child(&frozen, Box::new(Careless), &plain).unwrap();
    for value in 2..10 {
        parent.cpu_write(0, value).unwrap();
        assert_eq!(child.cpu_read(0).unwrap(), value, "the policy's own bug");
        child.cpu_write(1, value).unwrap();
        assert_eq!(parent.cpu_read(1).unwrap(), 0);
    }

    let parent = stage.parent(Box::new(Mapcount), &plain).unwrap();
    parent.cpu_write(0, 1).unwrap();
    let pin = parent.space().pin(stage.gfn(0), Access::Write).unwrap();
    let frozen = parent.space().fork().unwrap();
    let child = stage.child(&frozen, Box::new(Mapcount), &plain).unwrap();
    parent.cpu_write(0, 2).unwrap();
    assert_eq!(
        stage.load(pin.pfn()),
        1,
        "the device has lost the guest's page"
    );
    assert_eq!(child.cpu_read(0).unwrap(), 1);
}

#[test]
fn an_access_out_of_range_is_an_error() {
    let stage = need_stage!();
    let actor = parent(&stage);
    assert_eq!(
        reason(actor.cpu_write(PAGES, 1)),
        "a scenario has 4 pages, no page 4"
    );
    assert_eq!(
        reason(actor.cpu_read(u64::MAX)),
        "a scenario has 4 pages, no page 18446744073709551615"
    );
    actor.cpu_write(0, 1).unwrap();

    let crash = |command| {
        let actor = parent(&stage);
        match actor.ask(command).unwrap_err() {
            CpuError::Crashed { reason, .. } => {
                assert!(matches!(
                    actor.ask(Command::Read { address: 0 }),
                    Err(CpuError::Ended { .. })
                ));
                reason
            }
            other => panic!("{other}"),
        }
    };
    // Mapped by the page tables, whose pages are of 2 MiB, but not memory.
    let gpa = stage.program.len();
    let (read, write) = (
        Command::Read { address: gpa },
        Command::Write {
            address: gpa,
            value: 1,
        },
    );
    assert_eq!(crash(read), CrashReason::Mmio { gpa, write: false });
    assert_eq!(crash(write), CrashReason::Mmio { gpa, write: true });
    let gpa = 1 << 40;
    assert_eq!(crash(Command::Read { address: gpa }), CrashReason::Shutdown);
    assert_eq!(
        crash(Command::Write {
            address: gpa,
            value: 1
        }),
        CrashReason::Shutdown
    );
}

#[test]
fn a_guest_cannot_write_its_program() {
    let stage = need_stage!();
    for gpa in [IMAGE_GPA, MAIL_GPA - PAGE_SIZE, MAIL_GPA + PAGE_SIZE] {
        let actor = parent(&stage);
        let error = actor
            .ask(Command::Write {
                address: gpa,
                value: 0,
            })
            .unwrap_err();
        let (gfn, text) = (Gfn::of_gpa(gpa), chain(&error));
        assert!(
            text.ends_with(&format!(
                "{gfn:?} is beside the address space, which has 16 pages"
            )),
            "{text}"
        );
    }
    assert_eq!(words(&parent(&stage)), [0; 4]);
}

#[test]
fn a_walk_of_page_tables_may_count_as_a_write_to_them() {
    let stage = need_stage!();
    let actor = parent(&stage);
    // An entry that no address needs, as it was: what is asked is whether the page can be written.
    let gpa = PAGE_TABLES_GPA + 8 * 100;
    actor
        .ask(Command::Write {
            address: gpa,
            value: 0,
        })
        .unwrap();
    assert!(stage.program.is_writable(Gfn::of_gpa(PAGE_TABLES_GPA)));
    assert!(!stage.program.is_writable(Gfn::of_gpa(IMAGE_GPA)));
    assert_eq!(words(&actor), [0; 4]);
}

#[test]
fn a_dropped_actor_leaves_nothing_and_faults_were_its_own_threads() {
    let stage = need_stage!();
    let watch = Arc::new(Watch::default());
    let wrap = Watched::wrap(&watch);
    let owners = || {
        (
            Arc::strong_count(stage.frames.physmap()),
            stage.frames.budget().used(),
        )
    };
    let before = owners();
    let here = rustix::thread::gettid().as_raw_nonzero().get();
    // Whether an end was quick.
    let is_quick = |end| {
        let actor = stage.parent(Box::new(Exclusive), &wrap).unwrap();
        let child = {
            let frozen = actor.space().fork().unwrap();
            stage.child(&frozen, Box::new(Exclusive), &wrap).unwrap()
        };
        let mut thread = None;
        if end != "never asked" {
            actor.cpu_write(0, 1).unwrap();
            child.cpu_write(0, 2).unwrap();
            thread = watch.thread.lock().unwrap().take();
            assert!(thread.is_some_and(|thread| thread != here));
        }
        match end {
            "crashed" => drop(actor.ask(Command::Read { address: 1 << 40 }).unwrap_err()),
            "refused" => {
                watch.refuses.store(true, Ordering::SeqCst);
                actor.cpu_write(1, 1).unwrap_err();
                watch.refuses.store(false, Ordering::SeqCst);
            }
            _ => {}
        }
        let start = Instant::now();
        drop(actor);
        drop(child);
        let took = start.elapsed();
        assert_eq!(
            owners(),
            before,
            "{end}: owners of the physmap, and mappings"
        );
        assert_eq!(stage.pool().leftovers(1), [], "{end}");
        if let Some(thread) = thread {
            let task = format!("/proc/self/task/{thread}");
            wait_until("end of the thread", || !Path::new(&task).exists());
        }
        took < Duration::from_secs(4)
    };
    for end in ["idle", "crashed", "refused", "never asked"] {
        // A busy host may hold it up once, but what waits for something waits every time.
        assert!((0..4).any(|_| is_quick(end)), "{end}: it was waited for");
    }
}

#[test]
fn a_stage_says_when_it_has_had_its_guests() {
    let stage = need_stage!();
    for _ in 0..GUESTS {
        parent(&stage).cpu_write(0, 1).unwrap();
    }
    assert_eq!(
        reason(stage.parent(Box::new(Exclusive), &plain)),
        "this stage has had 64 guests: take a new one"
    );
    let other = <RealStage>::new(Memory::Base).unwrap();
    let pool = Arc::clone(other.pool());
    let small = AddressSpace::new(pool, Exclusive, Box::new(Unseen), 3).unwrap();
    assert_eq!(
        reason(other.child(&small.fork().unwrap(), Box::new(Exclusive), &plain)),
        "a snapshot of 3 pages: guests of this stage have 16"
    );
}

/// What guests cost here. Not a check: the numbers are for whoever reads them.
#[test]
fn costs() {
    let stage = need_stage!();
    drop(stage);
    let mut times: [Vec<Duration>; 8] = Default::default();
    for _ in 0..50 {
        let mut at = Instant::now();
        let mut note = |what: usize| {
            let now = Instant::now();
            times[what].push(now - at);
            at = now;
        };
        let stage = RealStage::new(Memory::Base).unwrap();
        note(0);
        let parent = parent(&stage);
        note(1);
        parent.cpu_write(0, 1).unwrap();
        note(2);
        parent.cpu_read(0).unwrap();
        note(3);
        let frozen = parent.space().fork().unwrap();
        let child = stage.child(&frozen, Box::new(Exclusive), &plain).unwrap();
        note(4);
        child.cpu_write(0, 2).unwrap();
        note(5);
        let gone = exhaust(&stage);
        drop(gone);
        note(6);
        drop((parent, child, frozen));
        drop(stage);
        note(7);
    }
    let names = [
        "stage",
        "parent",
        "first write",
        "read",
        "fork and child",
        "its write",
        "exhaust memory",
        "drop of all",
    ];
    for (name, times) in names.iter().zip(&mut times) {
        times.sort();
        eprintln!(
            "{name}: median {:?}, worst {:?}",
            times[times.len() / 2],
            times[times.len() - 1]
        );
    }
}
