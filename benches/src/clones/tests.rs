//! On real KVM: the guest does what its registers say, and clones begin where they are told to.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use guest::abi::PAGE_SIZE;
use palimpsest::kvm::{Kvm, VcpuState};
use palimpsest::vcpus::Capture;

use super::bare::{Bare, BareMachine, Registers, memory_with_code};
use super::parent::{Entries, Parent, ParentConfig};
use super::program::{Begins, Program, beginning, stamp_at};
use super::{MeasureError, crowd, idle, parse_memory, pause, price, rewrite};
use crate::alone::{alone, beside_others};
use crate::technique::PageSize;
use crate::technique::tests::kvm;

const MEMORY: u64 = 32 << 20;

fn parent(kvm: &Kvm, program: Program, entries: Entries) -> Parent {
    let config = ParentConfig {
        memory: MEMORY,
        entries,
        program,
        clones: 2,
        copies: 2 * MEMORY,
    };
    Parent::boot(kvm, &config).unwrap()
}

#[test]
fn half_of_the_regions_are_in_small_entries_if_asked_for() {
    let Some(kvm) = kvm() else { return };
    let _beside = beside_others();
    for (entries, half) in [(Entries::Huge, 0), (Entries::HalfSmall, MEMORY >> 22)] {
        let parent = parent(&kvm, Program::Count, entries);
        let (small, regions) = parent.small_regions().unwrap();
        assert_eq!(regions, MEMORY >> 21);
        // The guest has page tables and code of its own in small entries.
        assert!(
            (half..=half + 2).contains(&small),
            "{entries:?}: {small} of {regions}"
        );
        // A snapshot leaves them so, but for the one in which the guest counts.
        let _snapshot = parent.vm().snapshot().unwrap();
        let after = parent.small_regions().unwrap().0;
        assert!(
            (small..=small + 1).contains(&after),
            "{entries:?}: {small}, then {after}"
        );
    }
}

#[test]
fn a_clone_announces_itself_and_runs_on_where_the_snapshot_was_taken() {
    const PAGES: u64 = 64;
    let Some(kvm) = kvm() else { return };
    let _beside = beside_others();
    let parent = parent(&kvm, Program::Stamp(PAGES * PAGE_SIZE), Entries::Huge);
    parent.wait_for_word(0, 10 * PAGES).unwrap();
    let (taken, _) = parent.vm().snapshot().unwrap();
    let then = VcpuState::of_saved(&taken.vcpus()[0]).unwrap();
    let snapshot = beginning(&taken, Begins::Operations(1000)).unwrap();
    for with_shell in [false, true] {
        let shell = with_shell.then(|| parent.shell(&kvm).unwrap());
        let began = Instant::now();
        let clone = parent.start_clone(&kvm, &snapshot, shell).unwrap();
        clone.first_instruction(began).unwrap();
        for page in 0..PAGES {
            assert_eq!(
                clone.word(page).unwrap(),
                stamp_at(&then, PAGES, page),
                "page {page}"
            );
        }
        clone.gate().pass().unwrap();
        // It may have counted a number when the snapshot was taken, and not the operation.
        let last = (0..PAGES)
            .map(|page| clone.word(page).unwrap())
            .max()
            .unwrap();
        let then = then.regs().rax;
        assert!((then + 999..=then + 1000).contains(&last), "{then} {last}");
        clone.gate().let_on();
        let paused = clone.vm().machine().pause(Capture::Registers).unwrap();
        let now = paused.states().unwrap().remove(0);
        assert!(now.regs().rax >= last);
        for page in 0..PAGES {
            assert_eq!(
                clone.word(page).unwrap(),
                stamp_at(&now, PAGES, page),
                "page {page}"
            );
        }
        paused.resume();
    }
}

#[test]
fn a_bare_vm_runs_and_ends() {
    let Some(kvm) = kvm() else { return };
    let _beside = beside_others();
    let parent = parent(&kvm, Program::Count, Entries::Huge);
    let (taken, _) = parent.vm().snapshot().unwrap();
    let snapshot = beginning(&taken, Begins::Announcing).unwrap();
    let state = VcpuState::of_saved(&snapshot.vcpus()[0]).unwrap();
    let bare = Bare::open().unwrap();
    let memory = memory_with_code(MEMORY, PageSize::Small).unwrap();
    let begin = Instant::now();
    let machine = BareMachine::start(&bare, &memory, Registers::from(&state)).unwrap();
    machine.first_instruction(begin).unwrap();
    drop(machine);
    // Without its code it comes to nothing, and says so.
    let (mut regs, sregs) = (*state.regs(), *state.sregs());
    regs.rip = super::program::DATA_GPA;
    let lost = Registers::from(&state.with_registers(regs, sregs));
    let machine = BareMachine::start(&bare, &memory, lost).unwrap();
    let error = machine.first_instruction(begin).unwrap_err();
    assert!(matches!(error, MeasureError::Ended(_)), "{error}");
}

#[test]
fn everything_can_be_measured_and_is_of_this_world() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let stop = AtomicBool::new(false);
    for entries in [Entries::Huge, Entries::HalfSmall] {
        let price = price::measure(&kvm, MEMORY, entries, 2, &stop).unwrap();
        assert_eq!(price.clone_us.count, 2);
        for time in [
            price.bare_us,
            price.clone_us,
            price.pool_us,
            price.snapshot_and_clone_us,
        ] {
            assert!(time.p50 > 1.0 && time.max < 60e6, "{price:?}");
        }
    }
    let idle = idle::measure(&kvm, MEMORY, Entries::Huge, 4, &stop).unwrap();
    // A thread and its tables, and less than if it had all memory.
    assert!(
        idle.private > 4096.0 && idle.total() < MEMORY as f64 / 2.0,
        "{idle:?}"
    );
    let crowd = crowd::measure(&kvm, MEMORY, 5, &stop).unwrap();
    assert!(
        crowd.each_us > 1.0 && crowd.parent_before > 1000.0,
        "{crowd:?}"
    );
    let pause = pause::measure(&kvm, MEMORY, 2, &stop).unwrap();
    assert!(
        pause.with_us.count == 2 && pause.ratios().0 > 0.0 && pause.ratios().1 > 0.0,
        "{pause:?}"
    );
    let rewrite = rewrite::measure(&kvm, MEMORY, 2, &stop).unwrap();
    assert_eq!(
        rewrite.pages,
        (MEMORY - super::program::DATA_GPA) / PAGE_SIZE
    );
    assert!(
        rewrite.clone_us > rewrite.unshared_us && rewrite.unshared_us > 0.0,
        "{rewrite:?}"
    );
}

#[test]
fn guests_have_whole_regions_and_room_for_what_they_write() {
    assert_eq!(parse_memory("32M"), Ok(32 << 20));
    assert_eq!(parse_memory("8G"), Ok(8 << 30));
    for no in ["31M", "4K", "33M", "900G", "", "many"] {
        assert!(parse_memory(no).is_err(), "{no}");
    }
}

#[test]
fn measuring_ends_when_somebody_says_so() {
    let Some(kvm) = kvm() else { return };
    let _beside = beside_others();
    let stop = AtomicBool::new(true);
    let ended = price::measure(&kvm, MEMORY, Entries::Huge, 2, &stop);
    assert!(matches!(ended, Err(MeasureError::Interrupted)));
}
