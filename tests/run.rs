//! Whole runs of the payload on real KVM: whatever the guest's shape, every snapshot is right, every one is
//! checked, everything is given back, and what is told along the way agrees with the report.

mod support;

use std::time::Duration;

use guest::abi::{MAX_DEVICES, MAX_REGISTERED, MAX_VCPUS, PAGE_SIZE, Pattern};
use support::{accel, config, no_kvm, run, run_until, times};
use vmm::accel::Accel;
use vmm::session::config::{Config, PageSize, RunLength};
use vmm::session::report::{EndedBy, Verdict};

#[test]
fn every_pattern_runs_clean() {
    if no_kvm() {
        return;
    }
    for pattern in [
        Pattern::Dense,
        Pattern::Uniform,
        Pattern::Hot,
        Pattern::Sparse,
    ] {
        let asked = Config {
            pattern,
            ..config()
        };
        let run = run_until(asked, |seen| {
            seen.now().snapshots >= times(40) && seen.now().ops > times(1000)
        });
        run.assert_clean();
        assert!(run.report.guest.ops > 0, "{pattern:?}");
        assert!(run.report.checked_pages > 0, "{pattern:?}");
    }
}

#[test]
fn any_number_of_vcpus_runs_clean() {
    if no_kvm() {
        return;
    }
    for vcpus in [1, 2, 3, 4, 16, 17] {
        let asked = Config {
            vcpus,
            memory: 64 << 20,
            ..config()
        };
        let run = run_until(asked, |seen| {
            seen.now().snapshots >= times(30) && seen.now().ops > 0
        });
        run.assert_clean();
        assert!(run.report.guest.ops > 0, "{vcpus} vcpus");
    }
}

/// Far more than any machine has CPUs for these tests: how many snapshots there are is a matter of patience.
#[test]
fn as_many_vcpus_as_there_can_be_run_clean() {
    if no_kvm() {
        return;
    }
    let asked = Config {
        vcpus: MAX_VCPUS,
        memory: 640 << 20,
        ..config()
    };
    let run = run_until(asked, |seen| {
        seen.now().snapshots >= 2 && seen.now().ops > 0
    });
    run.assert_clean();
    assert!(run.report.guest.ops > 0);
}

#[test]
fn any_number_of_devices_runs_clean() {
    if no_kvm() {
        return;
    }
    for (dma_devices, registered_buffers) in [(1, 0), (1, 1), (MAX_DEVICES, MAX_REGISTERED)] {
        let asked = Config {
            dma_devices,
            registered_buffers,
            ..config()
        };
        let run = run_until(asked, move |seen| {
            let is_registered = seen.progress.iter().any(|p| p.pins.registered > 0);
            let now = seen.now();
            // Two directions, and the guest takes turns.
            now.snapshots >= times(40)
                && now.dma_requests > 10
                && now.pins.fast > 0
                && is_registered == (registered_buffers > 0)
        });
        run.assert_clean();
        let (dma, pins) = (run.report.dma, run.report.pins);
        assert!(
            dma.to_guest > 0 && dma.from_guest > 0 && dma.bytes > 0,
            "{dma:?}"
        );
        // Rewound at the end, the guest may be about to register them.
        assert!(registered_buffers > 0 || pins.registered == 0, "{pins:?}");
    }
}

#[test]
fn a_guest_without_devices_does_no_dma() {
    if no_kvm() {
        return;
    }
    let asked = Config {
        dma_devices: 0,
        ..config()
    };
    let run = run_until(asked, |seen| {
        seen.now().snapshots >= times(40) && seen.now().ops > 0
    });
    run.assert_clean();
    assert_eq!(run.report.dma, Default::default());
    assert_eq!(run.report.pins.registered, 0);
    assert!(run.report.guest.ops > 0);
}

#[test]
fn a_run_ends_after_the_snapshots_asked_for() {
    if no_kvm() {
        return;
    }
    let run = run(Config {
        length: RunLength::Snapshots(17),
        restore_every: 5,
        ..config()
    });
    run.assert_clean();
    let report = &run.report;
    assert_eq!(report.ended_by, EndedBy::Snapshots);
    let counts = report.snapshots;
    assert_eq!((counts.taken, counts.checked, counts.restored), (17, 17, 3));
    assert!(run.seen.progress.iter().all(|p| p.total.is_none()));
    assert!(report.pause_us.p50.is_some() && report.pause_us.max >= report.pause_us.p50);
}

#[test]
fn a_run_ends_after_the_time_asked_for() {
    if no_kvm() {
        return;
    }
    // A busy host may let the guest do nothing for a while, but not for so long.
    let felt = [1200, 6000, 30_000].into_iter().any(|ms| {
        let time = Duration::from_millis(ms);
        let run = run(Config {
            length: RunLength::Duration(time),
            ..config()
        });
        run.assert_clean();
        assert_eq!(run.report.ended_by, EndedBy::Duration);
        assert!(run.report.duration_s >= time.as_secs_f64());
        assert!(run.seen.progress.iter().all(|p| p.total == Some(time)));
        run.report.snapshots.taken > 0 && run.report.stall_us.max.is_some()
    });
    assert!(felt, "the guest felt no snapshot");
}

#[test]
fn a_run_of_which_nothing_is_left_to_do_takes_no_snapshot() {
    if no_kvm() {
        return;
    }
    let run = run(Config {
        length: RunLength::Duration(Duration::from_micros(1)),
        ..config()
    });
    assert_eq!(run.report.verdict, Verdict::NothingChecked);
    assert_eq!(run.report.error, None);
    assert_eq!(run.report.snapshots, Default::default());
    assert_eq!(run.report.pause_us, Default::default());
}

#[test]
fn a_run_can_be_stopped_early_and_gives_everything_back() {
    if no_kvm() {
        return;
    }
    for snapshots in [0, 5] {
        let run = run_until(config(), move |seen| seen.now().snapshots >= snapshots);
        run.assert_clean();
        assert_eq!(run.report.ended_by, EndedBy::CtrlC);
        assert!(run.report.snapshots.taken >= snapshots);
    }
}

#[test]
fn progress_never_goes_back_and_ends_where_the_report_does() {
    if no_kvm() {
        return;
    }
    let run = run(Config {
        length: RunLength::Snapshots(times(60)),
        ..config()
    });
    run.assert_clean();
    for pair in run.seen.progress.windows(2) {
        let [before, after] = pair else {
            unreachable!()
        };
        assert!(before.elapsed <= after.elapsed);
        assert!(before.snapshots <= after.snapshots);
        assert!(before.checked <= after.checked && after.checked <= after.snapshots);
        assert!(before.restored <= after.restored);
        assert!(before.worst_pause <= after.worst_pause);
        assert!(before.faults.total() <= after.faults.total());
        assert!(before.pins.total() <= after.pins.total());
        assert!(before.dma_requests <= after.dma_requests);
        assert!(before.dma_bytes <= after.dma_bytes);
    }
    // The session tells once more when the run is over.
    let (last, report) = (run.seen.progress.last().unwrap(), &run.report);
    assert_eq!(last.snapshots, report.snapshots.taken);
    assert_eq!(last.restored, report.snapshots.restored);
    assert!(last.ops <= report.guest.ops);
    assert!(last.dma_bytes <= report.dma.bytes);
    assert!(last.frames_in_use <= report.memory.frames_peak);
    assert!(last.vmas <= report.memory.vmas_peak);
    assert!(report.memory.vmas_peak <= report.memory.vmas_limit);
    assert!(
        run.seen
            .console
            .contains("payload: pattern uniform, 2 vcpus, 2 devices")
    );
    // Without KVM it is said that nothing is isolated, and nothing else.
    let notes = usize::from(accel() == Accel::User);
    assert_eq!(run.seen.notes.len(), notes, "{:?}", run.seen.notes);
}

#[test]
fn the_report_says_what_was_asked_for() {
    if no_kvm() {
        return;
    }
    // The formulas are of the seed: any seed must be the same one to the guest and to the checks.
    for seed in [0, 1 << 63, u64::MAX] {
        let asked = Config {
            seed,
            length: RunLength::Snapshots(10),
            ..config()
        };
        let run = run(asked.clone());
        run.assert_clean();
        assert_eq!(run.report.config, asked);
        assert_eq!(run.report.policy, "exclusive");
        assert!(run.report.platform.cpus > 0 && !run.report.platform.kernel.is_empty());
    }
}

#[test]
fn many_snapshots_can_be_alive_at_once() {
    if no_kvm() {
        return;
    }
    let run = run(Config {
        keep: times(50) as usize,
        length: RunLength::Snapshots(times(60)),
        ..config()
    });
    run.assert_clean();
}

#[test]
fn memory_that_is_not_touched_costs_nothing() {
    if no_kvm() {
        return;
    }
    let memory = 1 << 30;
    let run = run(Config {
        memory,
        page_size: PageSize::Base,
        pattern: Pattern::Sparse,
        length: RunLength::Snapshots(times(20)),
        ..config()
    });
    run.assert_clean();
    // One page of every 2 MiB, as often as there are snapshots that still need it.
    let touched = memory / (2 << 20) * PAGE_SIZE;
    let copies = run.report.config.keep as u64 + 4;
    let rest = 16 << 20;
    assert!(
        run.report.memory.bytes_peak <= touched * copies + rest,
        "{:?}",
        run.report.memory
    );
}

#[test]
fn frames_of_dropped_snapshots_are_used_again() {
    if no_kvm() {
        return;
    }
    // All pages are written again soon after a snapshot: without reuse each would need a copy of all memory.
    let asked = Config {
        memory: 16 << 20,
        pattern: Pattern::Dense,
        keep: 1,
        restore_every: 0,
        snapshot_every: Duration::from_millis(10),
        ..config()
    };
    // The guest, the snapshot kept, and those that wait for the checker.
    let bound = 8 * asked.memory;
    let run = run_until(asked, move |seen| {
        let faults = seen.now().faults;
        let copied = (faults.copied + faults.neighbours + faults.ahead) * PAGE_SIZE;
        seen.now().snapshots >= times(60) && copied > 2 * bound
    });
    run.assert_clean();
    assert!(
        run.report.memory.bytes_peak <= bound,
        "{:?}",
        run.report.memory
    );
}
