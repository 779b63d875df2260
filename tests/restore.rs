//! Rewinding a running guest on real KVM: guest and devices run on from there, and no other snapshot changes.
//!
//! The guest's own checks (life, coherence) and those of the next snapshots (cut, isolation) tell whether
//! memory, registers and devices are the snapshot's. Here all of them must be silent.

mod support;

use guest::Misbehaviour;
use guest::abi::{DRAW_EVERY, MAX_REGISTERED, Pattern};
use support::{config, no_kvm, run, run_guest, run_until, times};
use vmm::session::config::{Config, RunLength};

#[test]
fn a_guest_is_rewound_as_often_as_asked() {
    if no_kvm() {
        return;
    }
    let count = times(30);
    for (restore_every, expected) in [(0, 0), (1, count), (7, count / 7), (count + 1, 0)] {
        let run = run(Config {
            restore_every,
            length: RunLength::Snapshots(count),
            ..config()
        });
        run.assert_clean();
        assert_eq!(run.report.snapshots.restored, expected);
    }
}

#[test]
fn a_guest_rewound_after_every_snapshot_still_gets_on() {
    if no_kvm() {
        return;
    }
    let asked = Config {
        restore_every: 1,
        ..config()
    };
    let run = run_until(asked, |seen| {
        let now = seen.now();
        now.restored >= times(100) && now.ops > 0 && now.dma_bytes > 0
    });
    run.assert_clean();
}

#[test]
fn every_pattern_survives_restores() {
    if no_kvm() {
        return;
    }
    for pattern in [Pattern::Dense, Pattern::Hot, Pattern::Sparse] {
        run(Config {
            pattern,
            restore_every: 2,
            ..config()
        })
        .assert_clean();
    }
}

#[test]
fn the_only_snapshot_can_be_restored() {
    if no_kvm() {
        return;
    }
    let run = run(Config {
        keep: 1,
        restore_every: 1,
        ..config()
    });
    run.assert_clean();
    assert_eq!(run.report.snapshots.restored, times(40));
}

#[test]
fn snapshots_from_long_ago_can_be_restored() {
    if no_kvm() {
        return;
    }
    run(Config {
        keep: times(30) as usize,
        restore_every: 3,
        length: RunLength::Snapshots(times(60)),
        ..config()
    })
    .assert_clean();
}

#[test]
fn devices_go_on_with_their_registered_buffers_after_a_restore() {
    if no_kvm() {
        return;
    }
    let asked = Config {
        dma_devices: 4,
        registered_buffers: MAX_REGISTERED,
        restore_every: 2,
        ..config()
    };
    // Data moved, after restores, while buffers were registered before and after them.
    let run = run_until(asked, |seen| {
        let mut registered = seen.progress.iter().filter(|p| p.pins.registered > 0);
        let (first, now) = (registered.next(), seen.now());
        first.is_some_and(|first| {
            now.pins.registered > 0
                && now.restored > first.restored + times(10)
                && now.dma_bytes > first.dma_bytes
        })
    });
    run.assert_clean();
}

/// One that draws what it drew before, or what the guest drew that it was, breaks identity.
#[test]
fn a_rewound_guest_draws_random_numbers_of_its_own() {
    if no_kvm() {
        return;
    }
    let asked = config();
    let vcpus = asked.vcpus;
    // From some restore to the next, a vCPU has done operations enough to draw.
    let run = run_until(asked, move |seen| {
        let now = seen.now();
        now.restored > 2 && now.ops > 4 * DRAW_EVERY * vcpus * (now.restored + 1)
    });
    run.assert_clean();
    assert!(run.report.checked_draws > 0, "{:?}", run.report);
}

/// The life oracle waits for operations after a restore, but not of a guest that never does any.
#[test]
fn a_guest_that_counts_no_operations_can_be_rewound() {
    if no_kvm() {
        return;
    }
    let run = run_guest(
        Config {
            seed: Misbehaviour::Spin as u64,
            restore_every: 1,
            ..config()
        },
        guest::MISBEHAVE,
    )
    .unwrap();
    run.assert_clean();
    assert_eq!(run.report.snapshots.restored, times(40));
    assert_eq!(run.report.guest.ops, 0);
}
