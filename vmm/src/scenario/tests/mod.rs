//! | file | what |
//! |---|---|
//! | here | what steps come to, and that every verdict of the table is what is computed |
//! | `liar` | the verdict is what memory holds |
//! | `trees` | forks that are refused in a tree of address spaces; trees that grow at random |

mod liar;
mod trees;

use super::engine::ScenarioOutcome;
use super::performer::Hold::{GetRead, PinRead, PinWrite};
use super::performer::Memory;
use super::performer::Who::{C, D, G, P, S};
use super::real::{ByThreads, RealStage};
use super::script::{Expected, Scenario, Slot, Step};
use super::soft::SoftStage;
use super::stage::Stage;
use super::table::{NOT_HERE, SCENARIOS, find};
use super::verdict::Verdict;
use super::*;

/// What comes of steps under the exclusive policy, on the software MMU.
fn outcome(steps: &'static [Step], copies: Option<u64>) -> ScenarioOutcome {
    let scenario = Scenario {
        id: "X",
        title: "",
        about: "",
        memory: Memory::Base,
        steps,
        copies,
        gets_must_follow: false,
        kernels_pin_count: false,
        expected: Expected::all(Verdict::Ok),
        kernel_races: None,
        kernel_may: None,
    };
    emulate::<SoftStage>(&scenario, Policy::Exclusive, &mut |_| {})
}

#[track_caller]
fn assert_verdict(steps: &'static [Step], copies: Option<u64>, verdict: Verdict) {
    let outcome = outcome(steps, copies);
    assert_eq!(outcome.verdict(), Some(verdict), "{outcome:?}");
}

#[test]
fn a_copy_too_many_is_seen() {
    const STEPS: &[Step] = &[Step::Write(P, 0), Step::Fork(P, C), Step::Write(P, 0)];
    assert_verdict(STEPS, Some(0), Verdict::Copied);
    assert_verdict(STEPS, Some(1), Verdict::Ok);
    // The fork's own copies count.
    const PINNED: &[Step] = &[
        Step::Write(P, 0),
        Step::Take(P, 0, PinWrite),
        Step::Fork(P, C),
    ];
    assert_verdict(PINNED, Some(0), Verdict::Copied);
    // A page that is moved is not copied for anybody.
    const MOVED: &[Step] = &[Step::Write(P, 0), Step::Migrate(P, 0)];
    assert_verdict(MOVED, Some(0), Verdict::Ok);
}

/// A page is compared with that of whom its address space was forked from, not with P's.
#[test]
fn copies_of_a_tree_are_counted_once() {
    const GRANDCHILD: &[Step] = &[
        Step::Write(P, 0),
        Step::Fork(P, C),
        Step::Write(C, 0),
        Step::Fork(C, G),
    ];
    assert_verdict(GRANDCHILD, Some(0), Verdict::Copied);
    assert_verdict(GRANDCHILD, Some(1), Verdict::Ok);
    const PINNED: &[Step] = &[
        Step::Write(P, 0),
        Step::Fork(P, C),
        Step::Take(C, 0, PinWrite),
        Step::Fork(C, G),
        Step::Fork(C, D),
    ];
    assert_verdict(PINNED, Some(2), Verdict::Copied);
    assert_verdict(PINNED, Some(3), Verdict::Ok);
    const CLONE: &[Step] = &[
        Step::Write(P, 0),
        Step::Snapshot(P),
        Step::Write(P, 0),
        Step::Fork(S, C),
    ];
    assert_verdict(CLONE, Some(0), Verdict::Copied);
    assert_verdict(CLONE, Some(1), Verdict::Ok);
    // A name that is used again is another address space.
    const AGAIN: &[Step] = &[
        Step::Write(P, 0),
        Step::Fork(P, C),
        Step::Write(C, 0),
        Step::Fork(C, D),
        Step::Exit(C),
        Step::Fork(P, C),
    ];
    assert_verdict(AGAIN, Some(1), Verdict::Ok);
}

#[test]
fn an_operation_that_should_be_refused_and_is_not_is_seen() {
    const STEPS: &[Step] = &[Step::Write(P, 0), Step::Refused(&Step::Migrate(P, 0))];
    assert_verdict(STEPS, None, Verdict::NotRefused);
}

#[test]
fn a_wrong_state_is_seen() {
    const STEPS: &[Step] = &[Step::Write(P, 0), Step::Is(P, 0, Slot::RX)];
    assert_verdict(STEPS, None, Verdict::Broken);
    const DIRTY: &[Step] = &[Step::Write(P, 0), Step::IsClean(P, 0)];
    assert_verdict(DIRTY, None, Verdict::Broken);
}

/// As [`outcome`], in a huge folio.
#[track_caller]
fn assert_verdict_of_huge(steps: &'static [Step], copies: Option<u64>, verdict: Verdict) {
    let scenario = Scenario {
        steps,
        copies,
        memory: Memory::Huge,
        expected: Expected::all(Verdict::Ok),
        ..*find("A1").unwrap()
    };
    let outcome = emulate::<SoftStage>(&scenario, Policy::Exclusive, &mut |_| {});
    assert_eq!(outcome.verdict(), Some(verdict), "{outcome:?}");
}

#[test]
fn a_wrong_size_is_seen() {
    const HUGE: &[Step] = &[Step::Write(P, 0), Step::IsHuge(P, 3)];
    assert_verdict_of_huge(HUGE, None, Verdict::Ok);
    assert_verdict(HUGE, None, Verdict::Broken);
    const SMALL: &[Step] = &[Step::Write(P, 0), Step::IsSmall(P, 0)];
    assert_verdict_of_huge(SMALL, None, Verdict::Broken);
    // Of a folio that is collapsed no page moves.
    const MADE: &[Step] = &[
        Step::Write(P, 0),
        Step::Snapshot(P),
        Step::Write(P, 0),
        Step::IsSmall(P, 1),
        Step::Collapse(P, 1),
        Step::IsHuge(P, 1),
    ];
    assert_verdict_of_huge(MADE, Some(4), Verdict::Ok);
    assert_verdict_of_huge(MADE, Some(3), Verdict::Copied);
}

#[test]
fn what_is_left_of_a_folio_is_one_page() {
    const STEPS: &[Step] = &[
        Step::Write(P, 0),
        Step::Write(P, 1),
        Step::Take(P, 0, GetRead),
        Step::DiscardRest(P, 1),
        Step::Read(P, 0),
        Step::Read(P, 1),
        Step::IsSmall(P, 1),
        Step::Is(P, 1, Slot::WX),
        Step::Is(P, 0, Slot::Zero),
        Step::Is(P, 3, Slot::Zero),
    ];
    assert_verdict_of_huge(STEPS, Some(0), Verdict::Ok);
    // All but one: that one is not zeros.
    const OTHER: &[Step] = &[
        Step::Write(P, 0),
        Step::DiscardRest(P, 0),
        Step::Is(P, 0, Slot::Zero),
    ];
    assert_verdict_of_huge(OTHER, None, Verdict::Broken);
}

#[test]
fn a_refused_operation_may_split_and_nothing_else() {
    const SPLIT: &[Step] = &[
        Step::Write(P, 0),
        Step::Take(P, 0, PinWrite),
        Step::IsHuge(P, 0),
        Step::Refused(&Step::Migrate(P, 0)),
        Step::IsSmall(P, 0),
    ];
    assert_verdict_of_huge(SPLIT, Some(0), Verdict::Ok);
}

#[test]
fn a_step_that_fails_unexpectedly_is_no_verdict() {
    const STEPS: &[Step] = &[
        Step::Write(P, 0),
        Step::Take(P, 0, PinRead),
        Step::Migrate(P, 0),
    ];
    assert!(matches!(outcome(STEPS, None), ScenarioOutcome::Failed(why) if why.contains("busy")));
    const NOBODY: &[Step] = &[Step::Write(C, 0)];
    assert!(
        matches!(outcome(NOBODY, None), ScenarioOutcome::Failed(why) if why.contains("does not run"))
    );
}

/// Who is there when, and whose child anybody can be.
#[test]
fn mistakes_in_a_tree_are_no_verdict() {
    let mistakes: [(&'static [Step], &str); 11] = [
        (&[Step::Fork(C, G)], "C does not run"),
        (&[Step::Fork(P, P)], "P is no name for a child"),
        (&[Step::Fork(P, S)], "S is no name for a child"),
        (
            &[Step::Fork(P, C), Step::Fork(P, C)],
            "C is no name for a child",
        ),
        (&[Step::Fork(S, C)], "there is no snapshot"),
        (
            &[Step::Fork(P, C), Step::Exit(P), Step::Fork(P, D)],
            "P does not run",
        ),
        (&[Step::Exit(D)], "D does not run"),
        (&[Step::Exit(S)], "there is no snapshot"),
        (&[Step::Restore(P)], "there is no snapshot"),
        (&[Step::Snapshot(D)], "D does not run"),
        (
            &[Step::Snapshot(P), Step::Snapshot(P)],
            "there is a snapshot already",
        ),
    ];
    for (steps, expected) in mistakes {
        let outcome = outcome(steps, None);
        assert_eq!(
            outcome,
            ScenarioOutcome::Failed(format!("failed: {expected}")),
            "{steps:?}"
        );
    }
    // P's name is as good as any, and the snapshot is read when nobody is left that ran.
    const LEGAL: &[Step] = &[
        Step::Write(P, 0),
        Step::Fork(P, C),
        Step::Exit(P),
        Step::Fork(C, P),
        Step::Write(P, 1),
        Step::Snapshot(P),
        Step::Exit(C),
        Step::Exit(P),
        Step::Read(S, 0),
        Step::Read(S, 1),
        Step::Fork(S, G),
        Step::Exit(S),
        Step::Snapshot(G),
    ];
    assert_verdict(LEGAL, Some(0), Verdict::Ok);
}

#[test]
fn a_reader_may_see_what_was_there_since_it_looked_and_nothing_older() {
    const STEPS: &[Step] = &[
        Step::Write(P, 0),
        Step::Fork(P, C),
        Step::Take(P, 0, GetRead),
        Step::Write(P, 0),
        Step::HoldReads(0),
    ];
    assert_verdict(STEPS, None, Verdict::Ok);
}

/// Says so if there is none, which is a failure in CI.
fn has_kvm() -> bool {
    let has_kvm = std::path::Path::new("/dev/kvm").exists();
    if !has_kvm {
        let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
        assert!(!ci, "CI must have KVM");
        eprintln!("skipped: no /dev/kvm");
    }
    has_kvm
}

/// Plays every scenario under every policy it is for; says where the computed verdict is not the table's.
fn against_the_table<S: Stage>() -> Vec<String> {
    let mut wrong = Vec::new();
    for scenario in SCENARIOS {
        for policy in Policy::ALL {
            let Some(expected) = scenario.expected.under(policy) else {
                continue;
            };
            let outcome = emulate::<S>(scenario, policy, &mut |_| {});
            if outcome.verdict() != Some(expected) {
                wrong.push(format!(
                    "{} under {policy}: expected {expected}, got {outcome:?}",
                    scenario.id
                ));
            }
        }
    }
    wrong
}

#[test]
fn every_verdict_on_the_software_mmu_is_the_tables() {
    let wrong = against_the_table::<SoftStage>();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_verdict_on_a_real_vcpu_is_the_tables() {
    if !has_kvm() {
        return;
    }
    let wrong = against_the_table::<RealStage>();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_verdict_on_a_real_vcpu_without_kvm_is_the_tables() {
    let wrong = against_the_table::<RealStage<ByThreads>>();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The kernel must agree with our `exclusive`, but for what is said of it in the table.
#[test]
fn the_living_kernel_agrees_with_exclusive() {
    let (mut played, mut wrong) = (0, Vec::new());
    for scenario in SCENARIOS {
        let outcome = ask_the_kernel(scenario, &mut |_| {});
        println!("{}: {outcome:?}", scenario.id);
        match &outcome {
            ScenarioOutcome::CannotAsk(_) => {}
            ScenarioOutcome::Played { verdict, .. } if scenario.kernel_agrees(*verdict) => {
                played += 1
            }
            _ => wrong.push(format!("{}: {outcome:?}", scenario.id)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Nothing but plain processes is needed for these.
    assert!(played >= 8, "only {played} could be asked");
}

#[test]
fn a_race_says_what_was_lost_and_nothing_if_there_was_none() {
    let race = DirectRace {
        rounds: 9,
        raced: 8,
        ..DirectRace::default()
    };
    assert_eq!(judge_race(race).verdict(), Some(Verdict::Ok));
    for lost in [
        DirectRace {
            lost_dma: 1,
            ..race
        },
        DirectRace {
            lost_cpu: 1,
            ..race
        },
    ] {
        assert_eq!(judge_race(lost).verdict(), Some(Verdict::Diverged));
    }
    let too_fast = DirectRace { raced: 0, ..race };
    assert!(matches!(
        judge_race(too_fast),
        ScenarioOutcome::CannotAsk(_)
    ));
}

#[test]
fn every_id_is_there_once() {
    for scenario in SCENARIOS {
        let same = SCENARIOS.iter().filter(|s| s.id == scenario.id).count();
        assert_eq!(same, 1, "{}", scenario.id);
        assert!(!scenario.title.is_empty() && !scenario.about.is_empty());
        assert_eq!(
            find(&scenario.id.to_lowercase()).map(|s| s.id),
            Some(scenario.id)
        );
        assert!(
            NOT_HERE
                .iter()
                .all(|(ids, _)| ids.split(", ").all(|id| id != scenario.id))
        );
    }
    assert!(find("Z9").is_none());
}
