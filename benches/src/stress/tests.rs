//! The loops, for a few seconds each: nothing is wrong, and memory is flat, or it is said.

use std::sync::atomic::AtomicBool;

use palimpsest::mm::PAGE_SIZE;
use vmm::session::config::Injection;

use super::level::Flatness;
use super::{Going, Length, churn, payload, rewinds, storms};
use crate::alone::alone;
use crate::technique::tests::kvm;

const MEMORY: u64 = 64 << 20;

fn for_so_long<R>(length: Length, run: impl FnOnce(&mut Going<'_>) -> R) -> R {
    let stop = AtomicBool::new(false);
    let mut told = 0;
    let mut tell = |_: &str| told += 1;
    let result = run(&mut Going {
        length,
        stop: &stop,
        tell: &mut tell,
    });
    assert!(told > 0, "it says how far it is");
    result
}

fn is_fine(wrong: &[String], flatness: &Flatness) {
    assert_eq!(wrong, [""; 0]);
    assert!(flatness.grown.is_empty(), "{flatness:?}");
}

#[test]
fn snapshots_and_restores_leave_nothing_behind() {
    let Some(_) = kvm() else { return };
    let _alone = alone();
    let rewinds = for_so_long(Length::Rounds(60), |going| rewinds::run(MEMORY, going));
    let rewinds = rewinds.unwrap();
    assert_eq!(rewinds.wrong, [""; 0]);
    // On a machine that is busy the checker falls behind, and more snapshots live at once: of frames a few
    // rounds say nothing, but that all of them were given back, or it would be wrong.
    let grown = rewinds.flatness.grown.join("\n");
    assert!(!grown.contains("private memory"), "{grown}");
    assert!(rewinds.snapshots > 0 && rewinds.restores > 0, "{rewinds:?}");
}

#[test]
fn a_fault_that_is_put_in_is_said() {
    let Some(_) = kvm() else { return };
    let _alone = alone();
    let rewinds = for_so_long(Length::Rounds(60), |going| {
        let mut config = payload(MEMORY, 2, 2, going.length);
        config.restore_every = 0;
        config.inject = Some(Injection::SkipWriteProtect);
        rewinds::run_as(&config, going)
    });
    assert!(!rewinds.unwrap().wrong.is_empty());
}

#[test]
fn clones_that_come_and_go_leave_nothing_behind() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let churn = for_so_long(Length::Rounds(40), |going| {
        churn::run(&kvm, MEMORY, going, &mut drop)
    });
    let churn = churn.unwrap();
    is_fine(&churn.wrong, &churn.flatness);
    assert!(churn.flatness.is_flat(), "{churn:?}");
    assert!(churn.clones > 0 && churn.checked > churn.clones && churn.device_pages > 0);
}

/// Of five snapshots one is never dropped.
#[test]
fn snapshots_that_are_kept_are_said() {
    let Some(kvm) = kvm() else { return };
    let _alone = alone();
    let (mut rounds, mut kept) = (0, Vec::new());
    let mut keep = |snapshot| {
        rounds += 1;
        if rounds % 5 == 0 {
            kept.push(snapshot);
        }
    };
    let churn = for_so_long(Length::Rounds(60), |going| {
        churn::run(&kvm, MEMORY, going, &mut keep)
    });
    let churn = churn.unwrap();
    assert!(!churn.flatness.is_flat());
    let grown = churn.flatness.grown.join("\n");
    assert!(grown.contains("frames in use: "), "{grown}");
    assert!(
        churn.wrong.iter().any(|what| what.contains("still held")),
        "{:?}",
        churn.wrong
    );
    drop(kept);
}

#[test]
fn a_clone_that_sees_what_its_parent_writes_is_found() {
    let mut checker = churn::Checker::default();
    let state = palimpsest::kvm::VcpuState::of(Default::default(), Default::default(), Vec::new());
    // Nobody has written anything: all is zero, but for a word that somebody else has.
    let seen_at = churn::DEVICE_GPA + 5 * PAGE_SIZE;
    let read = |gpa: u64, word: &mut [u8]| {
        word.fill(u8::from(gpa / PAGE_SIZE == seen_at / PAGE_SIZE));
        Ok(())
    };
    checker.check("clone", 1, &state, 0, read).unwrap();
    assert_eq!(checker.wrong.len(), 1);
    assert!(
        checker.wrong[0].starts_with("clone of round 1: "),
        "{:?}",
        checker.wrong
    );
}

#[test]
fn storms_leave_nothing_behind() {
    let Some(_) = kvm() else { return };
    let _alone = alone();
    let storms = for_so_long(Length::Rounds(1), |going| storms::run(MEMORY, 4, going));
    let storms = storms.unwrap();
    is_fine(&storms.wrong, &storms.flatness);
    assert!(
        storms.storms > 0 && storms.first_instruction_p99_us > Some(1.0),
        "{storms:?}"
    );
}
