//! Windows that have nothing to show at first.
#![expect(unsafe_code, reason = "maps and unmaps addresses")]

use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use super::*;

const READ: Protection = Protection::ReadOnly;

fn vacant(pages: u64) -> (Window, Arc<MappingBudget>) {
    let budget = Arc::new(MappingBudget::with_limit(100));
    let window = Window::vacant(physmap(4 * pages), Arc::clone(&budget), pages).unwrap();
    (window, budget)
}

fn mappings_of(window: &Window) -> u64 {
    kernel_mappings(window.host_address(), window.len())
}

#[test]
fn nothing_is_mapped_before_it_is_told_and_then_just_that() {
    let (window, budget) = vacant(PAGES);
    assert_eq!((mappings_of(&window), budget.used()), (0, 0));
    window.map(Gfn(3), Pfn(7), 2, READ).unwrap();
    window.map(Gfn(5), Pfn(40), 1, READ).unwrap();
    assert_eq!((mappings_of(&window), budget.used()), (2, 2));
    let pages = window.pages_by_kernel();
    assert_eq!(pages.iter().flatten().count(), 3);
    window.settle().unwrap();
    let mut expected = vec![Some((Pfn::ZERO, READ)); PAGES as usize];
    for (page, pfn) in [(3, 7), (4, 8), (5, 40)] {
        expected[page] = Some((Pfn(pfn), READ));
    }
    assert_eq!(window.pages_by_kernel(), expected);
    assert_eq!((mappings_of(&window), budget.used()), (4, 4));
    // From here on it is a window like any other.
    window.settle().unwrap();
    window.map(Gfn(4), Pfn(9), 1, READ).unwrap();
    window.map(Gfn(0), Pfn::ZERO, PAGES, READ).unwrap();
    window
        .map(Gfn(1), Pfn(1), 1, Protection::ReadWrite)
        .unwrap();
    window.protect(Gfn(1), 1, READ).unwrap();
    expected = vec![Some((Pfn::ZERO, READ)); PAGES as usize];
    expected[1] = Some((Pfn(1), READ));
    assert_eq!(window.pages_by_kernel(), expected);
    let (start, len) = (window.host_address(), window.len());
    drop(window);
    assert_eq!((kernel_mappings(start, len), budget.used()), (0, 0));
}

/// Neither children nor core dumps have it.
#[test]
fn what_is_settled_is_kept_to_this_process() {
    let (window, _) = vacant(PAGES);
    window.map(Gfn(3), Pfn(7), 2, READ).unwrap();
    window.settle().unwrap();
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let range = window.host_address()..window.host_address() + window.len();
    let (mut is_in, mut flags) = (false, Vec::new());
    for line in smaps.lines() {
        let address = line
            .split_once('-')
            .map(|(from, _)| u64::from_str_radix(from, 16));
        if let Some(Ok(address)) = address {
            is_in = range.contains(&address);
        } else if let Some(of) = line.strip_prefix("VmFlags:")
            && is_in
        {
            flags.push(of.to_owned());
        }
    }
    assert_eq!(flags.len(), 3);
    for of in flags {
        let has = |flag| of.split(' ').any(|word| word == flag);
        assert!(has("dc") && has("dd"), "{of}");
    }
}

/// Somebody has mapped something where a window kept addresses: he keeps it, whatever becomes of the window.
#[test]
fn who_is_there_all_the_same_is_left_alone() {
    let (window, budget) = vacant(PAGES);
    let at = window.host_address() as usize + 5 * PAGE_SIZE as usize;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a mapping that replaces nothing.
    let theirs = unsafe {
        mmap_anonymous(
            ptr::with_exposed_provenance_mut(at),
            PAGE_SIZE as usize,
            rights,
            flags,
        )
    };
    let theirs = theirs.unwrap().cast::<u64>();
    // SAFETY: mapped just now.
    unsafe { theirs.write_volatile(7) };
    window.map(Gfn(0), Pfn(7), 2, READ).unwrap();
    for refused in [
        window.map(Gfn(2), Pfn(9), 5, READ),
        window.map(Gfn(5), Pfn(9), 1, READ),
        window.settle(),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, MmuError::Torn { .. }), "{error:?}");
    }
    assert_eq!(budget.used(), 1);
    let (start, len) = (window.host_address(), window.len());
    drop(window);
    assert_eq!(kernel_mappings(start, len), 1, "his");
    // SAFETY: it is there still.
    assert_eq!(unsafe { theirs.read_volatile() }, 7);
    // SAFETY: nobody uses it any more.
    unsafe { munmap(theirs.cast(), PAGE_SIZE as usize) }.unwrap();
}

/// The budget is asked here, too, and what it refuses is as it was.
#[test]
fn what_is_too_much_is_refused() {
    let budget = Arc::new(MappingBudget::with_limit(2));
    let window = Window::vacant(physmap(4 * PAGES), Arc::clone(&budget), PAGES).unwrap();
    window.map(Gfn(1), Pfn(7), 1, READ).unwrap();
    window.map(Gfn(3), Pfn(7), 1, READ).unwrap();
    for refused in [window.map(Gfn(5), Pfn(7), 1, READ), window.settle()] {
        let error = refused.unwrap_err();
        assert!(
            matches!(error, MmuError::MappingLimit { limit: 2 }),
            "{error:?}"
        );
    }
    assert_eq!((mappings_of(&window), budget.used()), (2, 2));
}
