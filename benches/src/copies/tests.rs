//! On real KVM: a way whose copies are not what the original was is no baseline.

use std::hash::{DefaultHasher, Hasher};
use std::sync::atomic::AtomicBool;

use guest::abi::PAGE_SIZE;

use super::{Original, Way, measure};
use crate::alone::beside_others;
use crate::clones::MeasureError;
use crate::clones::bare::Bare;
use crate::clones::program::{DATA_GPA, stamp_at};
use crate::technique::PageSize;
use crate::technique::tests::kvm;

const MEMORY: u64 = 32 << 20;
const WRITTEN: u64 = 4 << 20;

fn hashes(read: impl Fn(u64, &mut [u8]) -> Result<(), MeasureError>) -> Vec<u64> {
    let mut page = [0; PAGE_SIZE as usize];
    (0..MEMORY)
        .step_by(PAGE_SIZE as usize)
        .map(|gpa| {
            read(gpa, &mut page).unwrap();
            let mut hasher = DefaultHasher::new();
            hasher.write(&page);
            hasher.finish()
        })
        .collect()
}

/// Makes a few copies of a guest that writes all the while, and holds each against what the original was.
fn copies_memory(way: Way, pages: PageSize) {
    let Some(kvm) = kvm() else { return };
    let _beside = beside_others();
    let bare = Bare::open().unwrap();
    let original = Original::boot(&kvm, MEMORY, pages, WRITTEN).unwrap();
    for _ in 0..3 {
        let mut then = Vec::new();
        let look = || then = hashes(|gpa, page| original.read(gpa, page));
        let copied = original.copy_and(&bare, way, look).unwrap();
        // It runs on, and writes all that it does.
        original.wait_for_round().unwrap();
        let now = hashes(|gpa, page| original.read(gpa, page));
        let changed = then.iter().zip(&now).filter(|(then, now)| then != now);
        assert_eq!(
            changed.count() as u64,
            WRITTEN / PAGE_SIZE,
            "{way}: the original ran on"
        );

        let kept = hashes(|gpa, page| copied.read(gpa, page));
        let lost: Vec<usize> = (0..then.len()).filter(|&n| then[n] != kept[n]).collect();
        assert!(
            lost.is_empty(),
            "{way}: {} pages of the copy are not what they were, page {:#x} is the first",
            lost.len(),
            lost[0]
        );
        for page in 0..WRITTEN / PAGE_SIZE {
            let mut word = [0; 8];
            copied.read(DATA_GPA + page * PAGE_SIZE, &mut word).unwrap();
            let expected = stamp_at(&copied.state, WRITTEN / PAGE_SIZE, page);
            assert_eq!(
                u64::from_le_bytes(word),
                expected,
                "{way}: page {page} and registers"
            );
        }
        assert!(!copied.pause.is_zero() && !copied.first_instruction.is_zero());
        drop(copied);
        original.settle().unwrap();
    }
}

#[test]
fn fork_copies_memory() {
    copies_memory(Way::Fork, PageSize::Small);
    copies_memory(Way::ForkThp, PageSize::Huge);
}

#[test]
fn a_file_copies_memory() {
    copies_memory(Way::File, PageSize::Huge);
}

#[test]
fn a_copy_copies_memory() {
    copies_memory(Way::Copy, PageSize::Huge);
}

#[test]
fn every_way_can_be_measured() {
    let Some(kvm) = kvm() else { return };
    let _beside = beside_others();
    for way in Way::ALL {
        let cost = measure(&kvm, way, MEMORY, 2, &AtomicBool::new(false)).unwrap();
        assert_eq!(cost.pause_us.count, 2, "{way}");
        assert!(cost.first_instruction_us.p50 > 1.0, "{cost:?}");
    }
    let ended = measure(&kvm, Way::Ours, MEMORY, 2, &AtomicBool::new(true));
    assert!(matches!(ended, Err(MeasureError::Interrupted)));
}
