//! The window against what the kernel says of it, and guest memory as host code sees it.

mod refused;
mod vacant;

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mm::{
    Access, AddressSpace, Exclusive, FrameMemory, FramePool, Gfn, Mmu, MmuError, PAGE_SIZE, Pfn,
    Protection, REGION_PAGES,
};

const PAGES: u64 = 64;

fn physmap(frames: u64) -> Arc<PhysMap> {
    PhysMap::new(frames).unwrap()
}

fn window_of(pages: u64, limit: u64) -> (Window, Arc<MappingBudget>) {
    let budget = Arc::new(MappingBudget::with_limit(limit));
    let window = Window::new(physmap(4 * pages), Arc::clone(&budget), pages).unwrap();
    (window, budget)
}

/// How many mappings the kernel has for a window. A neighbour like its edge may be merged with it, so what
/// lies outside is cut off.
fn kernel_mappings(start: u64, len: u64) -> u64 {
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|line| {
            let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            hex(from) < start + len && hex(to) > start
        })
        .count() as u64
}

/// Guest memory, and what it is made of.
struct Rig {
    ram: Ram,
    space: Arc<AddressSpace<Exclusive>>,
    budget: Arc<MappingBudget>,
    pool: Arc<FramePool>,
}

fn rig(pages: u64, limit: u64) -> Rig {
    let physmap = physmap(4 * pages + 1024);
    let frames = 4 * pages + 1024;
    let pool = FramePool::new(Arc::clone(&physmap) as _, frames, frames).unwrap();
    let budget = Arc::new(MappingBudget::with_limit(limit));
    let window = Window::new(Arc::clone(&physmap), Arc::clone(&budget), pages).unwrap();
    let space = AddressSpace::new(Arc::clone(&pool), Exclusive, Box::new(window), pages).unwrap();
    let space = Arc::new(space);
    Rig {
        ram: Ram::new(Arc::clone(&space) as _, physmap),
        space,
        budget,
        pool,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_never_has_more_mappings_than_are_booked(
        changes in prop::collection::vec((0..PAGES, 1..8u64, 0..4u8, 1..3 * PAGES), 1..60)
    ) {
        let (window, budget) = window_of(PAGES, 10_000);
        for (first, count, what, frame) in changes {
            let count = count.min(PAGES - first);
            match what {
                0 => window.map(Gfn(first), Pfn(frame), count, Protection::ReadOnly).unwrap(),
                1 => window.map(Gfn(first), Pfn(first + PAGES), count, Protection::ReadWrite).unwrap(),
                2 => window.map(Gfn(first), Pfn::ZERO, count, Protection::ReadOnly).unwrap(),
                _ => window.protect(Gfn(first), count, Protection::ReadOnly).unwrap(),
            }
            let kernel = kernel_mappings(window.host_address(), window.len());
            // The kernel may leave two mappings unmerged; it never splits one of ours without need.
            prop_assert!(budget.used() <= kernel && kernel <= budget.used() + 2,
                "{} booked, {kernel} there", budget.used());
        }
        drop(window);
        prop_assert_eq!(budget.used(), 0);
    }
}

#[test]
fn running_out_of_mappings_names_the_setting_and_changes_nothing() {
    let (window, budget) = window_of(PAGES, 3);
    window
        .map(Gfn(10), Pfn(100), 1, Protection::ReadOnly)
        .unwrap();
    assert_eq!(budget.used(), 3);
    let before = kernel_mappings(window.host_address(), window.len());
    let error = window
        .map(Gfn(20), Pfn(100), 1, Protection::ReadOnly)
        .unwrap_err();
    assert!(matches!(error, MmuError::MappingLimit { limit: 3 }));
    assert!(error.to_string().contains("vm.max_map_count"), "{error}");
    assert_eq!(budget.used(), 3);
    assert_eq!(kernel_mappings(window.host_address(), window.len()), before);
    // A change that needs no more mappings goes through.
    window
        .map(Gfn(11), Pfn(101), 1, Protection::ReadOnly)
        .unwrap();
    window
        .map(Gfn(0), Pfn::ZERO, PAGES, Protection::ReadOnly)
        .unwrap();
    assert_eq!(budget.used(), 1);
}

#[test]
fn a_crowded_window_resolves_whole_regions_and_never_runs_out() {
    let pages = 16 * REGION_PAGES;
    let Rig { space, budget, .. } = rig(pages, 120);
    let mut snapshots = Vec::new();
    for round in 0..4u64 {
        for i in 0..pages / 4 {
            // Every other page or so, scattered: the worst there is for mappings.
            let gfn = (i * 2 * 2_654_435_761 + round) % pages;
            space.write_fault(Gfn(gfn)).unwrap();
            assert!(budget.used() <= budget.limit());
        }
        snapshots.push(space.fork().unwrap());
        let oldest = (snapshots.len() > 2).then(|| snapshots.remove(0));
        space
            .restore(oldest.as_ref().unwrap_or(&snapshots[0]))
            .unwrap();
    }
    assert!(budget.peak() > budget.limit() / 4 * 3, "it was crowded");
}

/// More than one thread copies them.
#[test]
fn many_pinned_pages_are_copied_each_to_its_own() {
    let pages = 4 * REGION_PAGES;
    let Rig { ram, space, .. } = rig(pages, 1000);
    let page = |n: u64, round: u64| [(n << 8 | round).to_le_bytes(); PAGE_SIZE as usize / 8];
    let write = |round| {
        (0..pages).for_each(|n| {
            let bytes = page(n, round);
            ram.write(n * PAGE_SIZE, bytes.as_flattened()).unwrap();
        });
    };
    write(1);
    // All but one of them.
    let pins = ram.pin(PAGE_SIZE, (pages - 1) * PAGE_SIZE, Access::Write);
    let frozen = space.fork().unwrap();
    assert_eq!(space.stats().eager_copied, pages - 1);
    write(2);
    for n in 0..pages {
        let expected = page(n, 1);
        let mut seen = [0; PAGE_SIZE as usize];
        frozen
            .with_frame(Gfn(n), |pfn| {
                ram.physmap().slice(pfn, 0, PAGE_SIZE).copy_to(&mut seen)
            })
            .unwrap();
        assert!(seen == *expected.as_flattened(), "page {n}");
    }
    drop(pins);
}

/// Bytes of the window at `start` that the kernel maps by huge pages, once all of it was looked at.
fn mapped_huge(start: u64, len: u64) -> u64 {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let memory = fs::File::open("/proc/self/mem").unwrap();
    for at in (start..start + len).step_by(PAGE_SIZE as usize) {
        memory.read_exact_at(&mut [0], at).unwrap();
    }
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut is_ours = false;
    let mut bytes = 0;
    for line in text.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some((from, to)) = word.split_once('-')
            && let (Some(from), Some(to)) = (hex(from), hex(to))
        {
            is_ours = from < start + len && to > start;
        } else if is_ours && word == "ShmemPmdMapped:" {
            let kib = rest.trim().trim_end_matches(" kB");
            bytes += kib.parse::<u64>().unwrap() << 10;
        }
    }
    bytes
}

/// Else the guest faults once for every page of it after each snapshot, whatever the entry says.
#[test]
fn the_host_maps_a_region_huge_again_that_was_broken_page_by_page() {
    let (pages, frames) = (2 * REGION_PAGES, 8 * REGION_PAGES);
    let physmap = physmap(frames);
    let pool = FramePool::new(Arc::clone(&physmap) as _, frames, frames).unwrap();
    let budget = Arc::new(MappingBudget::with_limit(100));
    let window = Window::new(Arc::clone(&physmap), budget, pages).unwrap();
    let (start, len) = (window.host_address(), pages * PAGE_SIZE);
    let space = AddressSpace::new(pool, Exclusive, Box::new(window), pages).unwrap();
    space.set_whole_price(4);
    for n in 0..pages {
        space.write_fault(Gfn(n)).unwrap();
    }
    if !physmap.is_huge() {
        eprintln!("skipped: the host gives no huge pages");
        return;
    }
    assert_eq!(mapped_huge(start, len), len);
    let frozen = space.fork().unwrap();
    for (gfn, huge) in [(7, len / 2), (9, len / 2), (300, len / 2), (8, len)] {
        space.write_fault(Gfn(gfn)).unwrap();
        assert_eq!(mapped_huge(start, len), huge, "after page {gfn}");
    }
    assert!(space.entry(Gfn(7)).unwrap().is_huge());
    drop(frozen);
}

#[test]
fn untouched_memory_costs_one_mapping_and_no_frame() {
    let Rig {
        ram, budget, pool, ..
    } = rig(1 << 20, 100);
    let mut bytes = [1u8; 3 * PAGE_SIZE as usize];
    ram.read(5 * PAGE_SIZE + 7, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&b| b == 0));
    assert_eq!((budget.used(), pool.usage().in_use), (1, 0));
}

#[test]
fn bytes_cross_pages_and_ends_are_refused() {
    let Rig { ram, .. } = rig(4, 100);
    let text: Vec<u8> = (0..=255).cycle().take(9000).collect();
    ram.write(100, &text).unwrap();
    let mut back = vec![0; 9000];
    ram.read(100, &mut back).unwrap();
    assert_eq!(back, text);
    for (gpa, len) in [(4 * PAGE_SIZE - 1, 2), (u64::MAX, 1), (5 * PAGE_SIZE, 1)] {
        let error = ram.read(gpa, &mut vec![0; len]).unwrap_err();
        assert!(matches!(error, RamError::OutOfRange { .. }), "{error}");
        assert!(ram.pin(gpa, len as u64, Access::Read).is_err());
        assert!(ram.write(gpa, &vec![0; len]).is_err());
    }
}

#[test]
fn a_slice_is_pinned_for_as_long_as_any_part_of_it_lives() {
    use vm_memory::{GuestMemory, Permissions};
    let Rig {
        ram, space, pool, ..
    } = rig(4, 100);
    ram.write_obj(7u64, GuestAddress(64)).unwrap();
    let pfn = space.entry(Gfn(0)).unwrap().pfn();
    assert_eq!(pool.state(pfn).pins(), 0, "only while it is used");
    let slice = ram
        .get_slices(GuestAddress(64), 8, Permissions::Read)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let part = slice.subslice(0, 4).unwrap();
    assert_eq!(pool.state(pfn).pins(), 1);
    drop(slice);
    assert_eq!(pool.state(pfn).pins(), 1);
    // So a fork copies the page, and the slice stays the guest's.
    let frozen = space.fork().unwrap();
    assert_ne!(frozen.frame(Gfn(0)).unwrap(), pfn);
    drop(part);
    assert_eq!(pool.state(pfn).pins(), 0);
}

/// Bytes of slices, one after the other, and how many slices there were.
fn bytes_of<'a>(slices: impl Iterator<Item = vm_memory::VolatileSlice<'a>>) -> (Vec<u8>, usize) {
    let mut bytes = Vec::new();
    let mut count = 0;
    for slice in slices {
        let from = bytes.len();
        bytes.resize(from + slice.len(), 0);
        slice.copy_to(&mut bytes[from..]);
        count += 1;
    }
    (bytes, count)
}

#[test]
fn a_pinned_buffer_is_runs_of_host_addresses() {
    let Rig { ram, space, .. } = rig(8, 100);
    let text: Vec<u8> = (0..=250).cycle().take(5 * PAGE_SIZE as usize).collect();
    // Pages in an order that leaves no run of more than some.
    for page in [3, 1, 2, 5, 4] {
        ram.write_obj(1u64, GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    ram.write(PAGE_SIZE + 100, &text).unwrap();
    let buffer = ram
        .pin(PAGE_SIZE + 100, text.len() as u64, Access::Write)
        .unwrap();
    let pfns: Vec<u64> = (1..7)
        .map(|gfn| space.entry(Gfn(gfn)).unwrap().pfn().0)
        .collect();
    let runs = |pfns: &[u64]| pfns.chunk_by(|a, b| a + 1 == *b).count();
    assert_eq!(bytes_of(buffer.slices()), (text.clone(), runs(&pfns)));
    for (start, end) in [
        (0, 0),
        (0, 1),
        (3995, 3997),
        (3996, 8092),
        (5000, 20_000),
        (1, 20_480),
    ] {
        let (first, last) = ((start + 100) / PAGE_SIZE, (end + 99) / PAGE_SIZE);
        let expected = if start == end {
            0
        } else {
            runs(&pfns[first as usize..=last as usize])
        };
        let part = text[start as usize..end as usize].to_vec();
        assert_eq!(
            bytes_of(buffer.part(start..end)),
            (part, expected),
            "{start}..{end}"
        );
    }
    let beyond = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        buffer.part(0..text.len() as u64 + 1).count()
    }));
    assert!(beyond.is_err());
}

/// A huge folio is one run, and the zero frame none of more than a page.
#[test]
fn a_pinned_folio_is_one_run() {
    let Rig { ram, space, .. } = rig(2 * REGION_PAGES, 100);
    let len = REGION_PAGES * PAGE_SIZE;
    ram.write_obj(7u64, GuestAddress(0)).unwrap();
    if space.entry(Gfn(0)).unwrap().is_huge() {
        let buffer = ram.pin(0, len, Access::Write).unwrap();
        let lens: Vec<_> = buffer.slices().map(|slice| slice.len() as u64).collect();
        assert_eq!(lens, [len]);
    }
    let zeros = ram.pin(len, 3 * PAGE_SIZE, Access::Read).unwrap();
    let (bytes, _) = bytes_of(zeros.slices());
    assert_eq!(bytes, vec![0; 3 * PAGE_SIZE as usize]);
}

#[test]
fn a_slice_of_a_shared_page_is_of_its_own_copy() {
    let Rig { ram, space, .. } = rig(4, 100);
    ram.write_obj(7u64, GuestAddress(64)).unwrap();
    let frozen = space.fork().unwrap();
    ram.write_obj(8u64, GuestAddress(64)).unwrap();
    let old = frozen
        .with_frame(Gfn(0), |pfn| {
            ram.physmap().slice(pfn, 64, 8).read_obj::<u64>(0).unwrap()
        })
        .unwrap();
    assert_eq!(
        (old, ram.read_obj::<u64>(GuestAddress(64)).unwrap()),
        (7, 8)
    );
}

/// No byte of a frame that has no memory can be had: to touch it could be a SIGBUS.
#[test]
fn a_frame_without_memory_cannot_be_reached() {
    let physmap = physmap(200);
    fn is_refused<T>(use_it: impl FnOnce() -> T) -> bool {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(use_it)).is_err()
    }
    let reach = |pfn| is_refused(|| physmap.slice(pfn, 0, 8));
    physmap.commit(Pfn(60), 70).unwrap();
    assert!(reach(Pfn(59)) && reach(Pfn(130)) && reach(Pfn(200)) && reach(Pfn(u64::MAX)));
    assert!(!reach(Pfn(60)) && !reach(Pfn(64)) && !reach(Pfn(129)));
    physmap.uncommit(Pfn(100), 3).unwrap();
    assert!(reach(Pfn(100)) && reach(Pfn(102)) && !reach(Pfn(99)) && !reach(Pfn(103)));
    assert!(is_refused(|| physmap.copy(Pfn(100), Pfn(60))));
    assert!(is_refused(|| physmap.copy_run(Pfn(60), Pfn(98), 3)));
    assert!(is_refused(|| physmap.zero(Pfn(101))));
    assert!(is_refused(|| physmap.write(Pfn(101), 0, &[1])));
    assert!(is_refused(|| physmap.equal(Pfn(60), Pfn(101))));
    physmap.commit_base_pages(Pfn(100), 1).unwrap();
    assert!(!reach(Pfn(100)) && reach(Pfn(101)));
}

/// The word that nobody else of this process has guest addresses.
pub(crate) fn alone_at_guest_addresses() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A window at guest addresses.
fn placed(pages: u64) -> std::io::Result<Window> {
    let budget = Arc::new(MappingBudget::with_limit(10_000));
    Window::placed(
        physmap(4 * pages),
        budget,
        pages,
        Placement::AtGuestAddresses,
    )
}

#[test]
fn a_window_at_guest_addresses_shows_and_lets_execute_what_it_is_told_from_the_lowest_on() {
    let _alone = alone_at_guest_addresses();
    let window = placed(PAGES).unwrap();
    let lowest = LOWEST / PAGE_SIZE;
    assert_eq!(
        (window.host_address(), window.len()),
        (0, PAGES * PAGE_SIZE)
    );
    let (read, write) = (Protection::ReadOnly, Protection::ReadWrite);
    // Over the lowest page, below it alone, and above it.
    window.map(Gfn(0), Pfn(1), 32, write).unwrap();
    window.map(Gfn(3), Pfn(100), 4, write).unwrap();
    window.map(Gfn(40), Pfn(70), 8, read).unwrap();
    window.protect(Gfn(8), 12, read).unwrap();
    window.map(Gfn(24), Pfn::ZERO, 2, read).unwrap();
    let shown = window.pages_by_kernel();
    for (page, shown) in (0..).zip(shown) {
        let expected = match page {
            _ if page < lowest => None,
            24 | 25 | 32..40 | 48.. => Some((Pfn::ZERO, read)),
            16..20 => Some((Pfn(page + 1), read)),
            20..32 => Some((Pfn(page + 1), write)),
            _ => Some((Pfn(page + 30), read)),
        };
        assert_eq!(shown, expected, "page {page}");
    }
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let ours = maps.lines().filter(|line| {
        let start = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        start < PAGES * PAGE_SIZE
    });
    let rights = Vec::from_iter(ours.map(|line| line.split(' ').nth(1).unwrap()));
    assert!(
        rights.len() > 4 && rights.iter().all(|rights| rights.contains('x')),
        "{rights:?}"
    );
    drop(window);
    assert_eq!(maps::first_in(0..PAGES * PAGE_SIZE).unwrap(), None);
}

#[test]
fn guest_addresses_that_are_taken_are_refused_and_it_is_said_by_what() {
    let _alone = alone_at_guest_addresses();
    let window = placed(PAGES).unwrap();
    window
        .map(Gfn(16), Pfn(1), 1, Protection::ReadOnly)
        .unwrap();
    let refused = placed(PAGES).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::AddrInUse);
    let said = refused.to_string();
    assert!(
        said.contains("taken, by /memfd:palimpsest-frames"),
        "{said}"
    );
    drop(window);
    placed(PAGES).unwrap();
    let none = placed(LOWEST / PAGE_SIZE).unwrap_err().to_string();
    assert_eq!(none, "there is no memory above 0x10000");
}

/// What is hidden is a mapping that nothing may be seen of, whatever rights its neighbours get, until it is shown.
#[test]
fn what_is_hidden_stays_hidden_until_it_is_shown() {
    let (window, budget) = window_of(PAGES, 100);
    let used = budget.used();
    window
        .map(Gfn(0), Pfn(1), PAGES, Protection::ReadOnly)
        .unwrap();
    window.hide(Gfn(10), 5).unwrap();
    window.hide(Gfn(20), 1).unwrap();
    let shown = |gfn: u64| window.pages_by_kernel()[gfn as usize];
    let is_hidden = |gfn: u64| shown(gfn).is_none();
    for to in [Protection::ReadWrite, Protection::ReadOnly] {
        window.protect(Gfn(5), 30, to).unwrap();
        for gfn in 0..PAGES {
            let hidden = (10..15).contains(&gfn) || gfn == 20;
            assert_eq!(is_hidden(gfn), hidden, "page {gfn}, {to:?}");
            let changed = (5..35).contains(&gfn) && !hidden;
            let right = if changed { to } else { Protection::ReadOnly };
            assert!(
                hidden || shown(gfn) == Some((Pfn(1 + gfn), right)),
                "page {gfn}"
            );
        }
    }
    // All of it, and nothing but it.
    window.protect(Gfn(10), 5, Protection::ReadWrite).unwrap();
    assert!((10..15).all(is_hidden));
    window
        .map(Gfn(10), Pfn(40), 5, Protection::ReadOnly)
        .unwrap();
    window
        .map(Gfn(20), Pfn::ZERO, 1, Protection::ReadOnly)
        .unwrap();
    assert_eq!(shown(12), Some((Pfn(42), Protection::ReadOnly)));
    assert_eq!(shown(20), Some((Pfn::ZERO, Protection::ReadOnly)));
    assert!(budget.used() > used);
    drop(window);
    assert_eq!(budget.used(), 0);
}
