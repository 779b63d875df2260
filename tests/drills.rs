//! Drills: guests that do one thing over and over which is hard on a VMM, and check themselves. They run
//! under snapshots, by the page and by 2 MiB, on one vCPU and on several, and are rewound where that may
//! bring something to light.
//!
//! A drill runs until it has done enough, and has been found where it should be: the report says how the page
//! of each write fault was found. What a drill finds wrong it says, and that is the test's failure.

mod support;

use std::fs;
use std::time::Duration;

use guest::Drill;
use support::{Recorder, Run, accel, config, no_kvm, run_guest_until, say, times};
use vmm::accel::Accel;
use vmm::session::config::{Config, PageSize};
use vmm::session::report::{EndedBy, FaultCounts};

/// Snapshots that a drill is to see at least, and restores if it is rewound.
const SNAPSHOTS: u64 = 20;
const RESTORES: u64 = 4;
/// Rounds of all vCPUs.
const ROUNDS: u64 = 200;
/// Write faults: more than would come by what surrounds a drill's own stores.
const FAULTS: u64 = 80;

/// What a drill runs under.
fn drilled(drill: Drill, page_size: PageSize, vcpus: u64) -> Config {
    Config {
        memory: 16 << 20,
        vcpus,
        seed: drill as u64,
        page_size,
        snapshot_every: Duration::from_millis(5),
        restore_every: 0,
        dma_devices: 0,
        registered_buffers: 0,
        ..config()
    }
}

/// Runs a drill until `enough`. `None` if the CPU does not have what it is about, which is said.
fn run(config: Config, enough: impl Fn(&Recorder) -> bool + Send + 'static) -> Option<Run> {
    let run = run_guest_until(config, guest::DRILL, enough);
    let report = &run.report;
    let told = run.seen.console.trim();
    assert_eq!(report.error, None, "{told}\n{:?}", report.config);
    if report.ended_by == EndedBy::GuestExit {
        assert_eq!(run.seen.violations, []);
        say(told);
        return None;
    }
    run.assert_clean();
    assert_eq!(report.ended_by, EndedBy::CtrlC);
    Some(run)
}

/// Faults of vCPUs that were not about page tables or events. Those that took whole regions count here, and
/// fail a test later.
fn resolved(faults: &FaultCounts) -> u64 {
    named(faults) + faults.emulated + faults.by_region + faults.by_all
}

/// Faults of vCPUs that were about what their instruction wrote, however that was known.
fn named(faults: &FaultCounts) -> u64 {
    faults.by_operand + faults.by_signal
}

/// Whether the test must be skipped because the guest's page tables mean nothing: they do not where its code
/// is code of this process.
fn no_page_tables() -> bool {
    let none = accel() == Accel::User;
    if none {
        say("skipped: without KVM a guest has no page tables of its own");
    }
    none
}

/// Runs a drill under snapshots: by the page, on two vCPUs that meet in the same regions, and by 2 MiB. Every
/// fault must be found by what the instruction is about: what was found by making whole regions writable was
/// not found.
fn drill(drill: Drill) -> Vec<Run> {
    let shapes = [(PageSize::Base, 2, times(FAULTS)), (PageSize::Huge, 1, 1)];
    let runs = shapes.into_iter().filter_map(|(page_size, vcpus, least)| {
        run(drilled(drill, page_size, vcpus), move |seen| {
            let now = seen.now();
            now.snapshots >= times(SNAPSHOTS)
                && now.ops >= times(ROUNDS)
                && resolved(&now.faults) >= least
        })
    });
    let runs = Vec::from_iter(runs);
    for run in &runs {
        let faults = run.report.faults;
        assert_eq!((faults.by_region, faults.by_all), (0, 0), "{faults:?}");
    }
    runs
}

/// Runs a drill that is rewound over and over, in pages of both sizes.
fn drill_rewound(drill: Drill, vcpus: u64, dma_devices: u64) {
    for page_size in [PageSize::Base, PageSize::Huge] {
        let asked = Config {
            restore_every: 2,
            dma_devices,
            ..drilled(drill, page_size, vcpus)
        };
        run(asked, |seen| {
            let now = seen.now();
            now.restored >= times(RESTORES) && now.ops > 0
        });
    }
}

/// What stands at RIP when the VMM looks may be another instruction than the one that faulted.
#[test]
fn code_that_another_vcpu_patches_is_executed_as_it_was() {
    if no_kvm() {
        return;
    }
    for page_size in [PageSize::Base, PageSize::Huge] {
        run(drilled(Drill::PatchedCode, page_size, 2), |seen| {
            let now = seen.now();
            now.snapshots >= times(2 * SNAPSHOTS)
                && now.ops >= times(ROUNDS)
                && named(&now.faults) > 0
        });
    }
    drill_rewound(Drill::PatchedCode, 2, 0);
}

#[test]
fn stores_that_kvm_may_have_to_emulate_arrive() {
    if no_kvm() {
        return;
    }
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let umip = flags.split_whitespace().any(|flag| flag == "umip");
    for drill in [Drill::Smsw, Drill::Sldt, Drill::Str] {
        for run in self::drill(drill) {
            let report = &run.report;
            // PVM runs ring 3 on the bare CPU, which refuses them. Other KVMs have a CPU that does them.
            if report.platform.kvm == "pvm" && umip {
                assert!(report.faults.emulated > 0, "{drill:?}: {report:?}");
            }
        }
    }
}

/// PVM tries these again and again inside `KVM_RUN` while the page is read-only.
#[test]
fn stores_that_kvm_retries_for_ever_are_helped_along() {
    if no_kvm() {
        return;
    }
    for drill in [Drill::Sgdt, Drill::Sidt] {
        for page_size in [PageSize::Base, PageSize::Huge] {
            run(drilled(drill, page_size, 1), |seen| {
                let now = seen.now();
                now.snapshots >= times(SNAPSHOTS)
                    && now.ops >= times(ROUNDS)
                    && named(&now.faults) > 0
            });
        }
    }
}

#[test]
fn registers_that_live_nowhere_in_memory_are_kept() {
    if no_kvm() {
        return;
    }
    for drill in [Drill::Registers, Drill::Bases] {
        self::drill(drill);
        drill_rewound(drill, 2, 0);
    }
}

#[test]
fn string_instructions_go_on_where_they_were_interrupted() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        for page_size in [PageSize::Base, PageSize::Huge] {
            run(drilled(Drill::Strings, page_size, vcpus), |seen| {
                let now = seen.now();
                now.snapshots >= times(SNAPSHOTS) && now.ops >= 4 && resolved(&now.faults) > 0
            });
        }
    }
    drill_rewound(Drill::Strings, 1, 0);
}

#[test]
fn a_counter_on_two_pages_counts_everything_once() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 2] {
        for page_size in [PageSize::Base, PageSize::Huge] {
            run(drilled(Drill::SplitCounter, page_size, vcpus), |seen| {
                let now = seen.now();
                now.snapshots >= times(2 * SNAPSHOTS)
                    && now.ops >= times(ROUNDS)
                    && resolved(&now.faults) > 0
            });
        }
    }
    drill_rewound(Drill::SplitCounter, 2, 0);
}

#[test]
fn stores_by_fs_and_gs_are_found() {
    if no_kvm() {
        return;
    }
    drill(Drill::Segments);
}

#[test]
fn bit_tests_far_from_their_address_are_found() {
    if no_kvm() {
        return;
    }
    drill(Drill::BitTests);
}

#[test]
fn a_stack_on_shared_pages_is_found() {
    if no_kvm() {
        return;
    }
    drill(Drill::Stack);
    drill_rewound(Drill::Stack, 2, 0);
}

#[test]
fn cleared_cache_lines_are_found() {
    if no_kvm() {
        return;
    }
    drill(Drill::ClearLine);
}

#[test]
fn areas_of_state_on_two_pages_are_found() {
    if no_kvm() {
        return;
    }
    drill(Drill::StateAreas);
}

#[test]
fn stores_of_vectors_are_found_element_by_element() {
    if no_kvm() {
        return;
    }
    drill(Drill::MaskedStores);
    drill(Drill::Scatter);
}

/// A snapshot may come while a request is on its way, and nobody rings again for it.
#[test]
fn a_request_on_its_way_is_done_after_a_restore() {
    if no_kvm() {
        return;
    }
    drill_rewound(Drill::OneRequest, 1, 1);
}

#[test]
fn a_guest_that_talks_for_ever_is_listened_to_and_snapshotted() {
    if no_kvm() {
        return;
    }
    let run = run(drilled(Drill::Talk, PageSize::Huge, 1), |seen| {
        seen.now().snapshots >= times(SNAPSHOTS) && !seen.console.is_empty()
    });
    let run = run.expect("every CPU can talk");
    assert!(run.seen.console.starts_with("drill Talk 0\n"));
    assert!(run.seen.console.contains("violation of isolation: forged"));
}

/// The tables are write-protected by a fork like all memory, and what is executed, walked and written may be
/// one page.
#[test]
fn code_in_page_tables_runs() {
    if no_kvm() {
        return;
    }
    drill(Drill::CodeInTables);
    drill_rewound(Drill::CodeInTables, 1, 0);
}

#[test]
fn accessed_and_dirty_bits_of_fresh_pages_are_set() {
    if no_kvm() || no_page_tables() {
        return;
    }
    drill_on_tables(Drill::AccessedBits);
}

#[test]
fn accessed_and_dirty_bits_that_a_guest_clears_come_back() {
    if no_kvm() || no_page_tables() {
        return;
    }
    drill_on_tables(Drill::ClearedBits);
}

/// Runs a drill that is about few pages, the page tables among them.
fn drill_on_tables(drill: Drill) {
    for vcpus in [1, 2] {
        for page_size in [PageSize::Base, PageSize::Huge] {
            let run = run(drilled(drill, page_size, vcpus), |seen| {
                let now = seen.now();
                now.snapshots >= times(2 * SNAPSHOTS) && now.ops >= times(SNAPSHOTS)
            });
            let faults = run.expect("every CPU has page tables").report.faults;
            assert_eq!((faults.by_region, faults.by_all), (0, 0), "{faults:?}");
        }
    }
    drill_rewound(drill, 2, 0);
}

/// What the guest reads through its page tables after a restore is what the restored tables say, whatever was
/// mapped before.
#[test]
fn page_tables_are_those_of_the_snapshot_after_a_restore() {
    if no_kvm() || no_page_tables() {
        return;
    }
    for vcpus in [1, 2] {
        for page_size in [PageSize::Base, PageSize::Huge] {
            let asked = Config {
                restore_every: 1,
                ..drilled(Drill::Remapped, page_size, vcpus)
            };
            run(asked, |seen| {
                let now = seen.now();
                now.restored >= times(3 * RESTORES) && now.ops >= times(ROUNDS)
            });
        }
    }
}

/// A host that shadows the tables emulates these, in another way than plain stores.
#[test]
fn locked_instructions_on_page_tables_are_carried_out() {
    if no_kvm() {
        return;
    }
    drill_on_tables(Drill::LockedTables);
}
