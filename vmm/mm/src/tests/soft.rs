//! The software MMU, which the other tests and the model take for a machine.

use super::*;

#[test]
fn a_run_of_pages_is_mapped_to_a_run_of_frames_and_zeros_to_one() {
    let mmu = SoftMmu::new(6);
    mmu.map(Gfn(1), Pfn(7), 3, Protection::ReadWrite).unwrap();
    mmu.map(Gfn(4), Pfn::ZERO, 2, Protection::ReadOnly).unwrap();
    let pages: Vec<_> = (0..6).map(|n| mmu.page(Gfn(n))).collect();
    let zeros = (Pfn::ZERO, Protection::ReadOnly);
    let run = [7, 8, 9].map(|n| (Pfn(n), Protection::ReadWrite));
    assert_eq!(pages, [zeros, run[0], run[1], run[2], zeros, zeros]);
}

/// As `mprotect` on a window: there is nothing to write in a zero page.
#[test]
fn zeros_stay_read_only_when_a_run_around_them_is_made_writable() {
    let mmu = SoftMmu::new(4);
    mmu.map(Gfn(0), Pfn(7), 1, Protection::ReadOnly).unwrap();
    mmu.map(Gfn(2), Pfn(9), 2, Protection::ReadOnly).unwrap();
    mmu.protect(Gfn(0), 3, Protection::ReadWrite).unwrap();
    let pages: Vec<_> = (0..4).map(|n| mmu.page(Gfn(n)).1).collect();
    use Protection::{ReadOnly, ReadWrite};
    assert_eq!(pages, [ReadWrite, ReadOnly, ReadWrite, ReadOnly]);
}
