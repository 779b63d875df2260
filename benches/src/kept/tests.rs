//! The report, its targets and its text, of numbers that are known; and each measurement once, on little
//! memory.

use std::sync::atomic::AtomicBool;

use palimpsest::kvm::Kvm;

use super::clones::ClonesCost;
use super::increment::{IncrementCost, Written};
use super::load::{LoadCost, Loading};
use super::report::KeptReport;
use super::save::SaveCost;
use super::verify::VerifyCost;
use super::*;
use crate::alone::beside_others;
use crate::report::Platform;
use crate::summary::Summary;

const GIB: u64 = 1 << 30;

fn time(p50: f64) -> Summary {
    Summary {
        count: 5,
        p50,
        p99: 2.0 * p50,
        max: 2.0 * p50,
    }
}

fn load_of(memory: u64, first: f64) -> LoadCost {
    let loading = |scale: f64| Loading {
        first_instruction_us: time(first * scale),
        read_pass_us: time(10_000.0 * scale),
        write_pass_us: time(40_000.0),
    };
    LoadCost {
        memory,
        pass: 128 << 20,
        ours: loading(2.0),
        whole: loading(3.0),
        mapped: loading(1.0),
    }
}

fn save_of(vcpus: u64, speed: f64) -> SaveCost {
    SaveCost {
        memory: GIB,
        vcpus,
        bytes: GIB,
        save_us: time(1_500_000.0),
        raw_write_us: time(500_000.0),
        hash_us: time(1_000_000.0),
        ops_per_s: 5e7,
        speed_snapshot: 0.95,
        speed_save: speed,
        speed_raw_write: 0.9,
        speed_hash: 0.8,
        pause_us: time(200.0),
        save_pause_us: time(210.0),
        pause_meanwhile_us: time(400.0),
    }
}

fn report() -> KeptReport {
    let platform = Platform {
        kvm: "pvm".to_owned(),
        kernel: "6.18".to_owned(),
        cpus: 2,
        load: 0.0,
    };
    let written = |bytes: u64, p50: f64| Written {
        bytes,
        us: time(p50),
    };
    let mut it = KeptReport::new(platform, 5);
    it.loads = vec![load_of(GIB, 1000.0), load_of(8 * GIB, 1100.0)];
    it.saves = vec![save_of(1, 0.9), save_of(2, 0.5)];
    it.increments.push(IncrementCost {
        memory: GIB,
        changed: GIB / 100,
        full: written(1000, 1000.0),
        nothing: written(1, 5.0),
        stretch: written(20, 40.0),
        scattered: written(900, 1000.0),
    });
    it.verifies.push(VerifyCost {
        bytes: 1_000_000_000,
        verify_us: time(400_000.0),
        verify_cpu_us: time(500_000.0),
        file_us: time(360_000.0),
        b3sum_us: None,
    });
    it.clones.push(ClonesCost {
        memory: 1000,
        clones: 100,
        written: 10,
        copy: 1000,
        in_use: 2010,
        private: 5,
        us: 7.0,
    });
    it.targets = targets::judge(&it);
    it
}

#[test]
fn targets_are_judged_by_the_numbers() {
    let report = report();
    let judged = |what: &str| {
        let mut found = report
            .targets
            .iter()
            .filter(|verdict| verdict.what.starts_with(what));
        let verdict = found.next().expect(what);
        assert_eq!(found.next(), None, "{what}");
        let found = verdict.found.map(|found| (found * 1e6).round() / 1e6);
        (found, verdict.met())
    };
    for (what, expected) in [
        (
            "load of 1 GiB to the first instruction, ms",
            (Some(2.0), Some(true)),
        ),
        (
            "load of 1 GiB to the first instruction /",
            (Some(2.0), Some(false)),
        ),
        ("growth: load of 8 GiB", (Some(1.1), Some(true))),
        ("first pass, reading", (Some(2.0), Some(false))),
        ("first pass, writing", (Some(1.0), Some(true))),
        ("save, guest running", (Some(1.5), Some(false))),
        (
            "speed kept beside a save, a CPU to spare",
            (Some(0.9), Some(true)),
        ),
        (
            "speed kept beside a save, all CPUs busy",
            (Some(0.5), Some(false)),
        ),
        ("pause for a save", (Some(1.05), Some(true))),
        (
            "increment after 1% changed, one stretch: bytes",
            (Some(0.02), Some(true)),
        ),
        (
            "increment after 1% changed, one stretch: time",
            (Some(0.04), Some(false)),
        ),
        (
            "increment after 1% changed, pages anywhere: bytes",
            (Some(0.9), Some(false)),
        ),
        (
            "increment after 1% changed, pages anywhere: time",
            (Some(1.0), Some(false)),
        ),
        ("verify, GB/s of a core", (Some(2.0), Some(true))),
        (
            "verify / reading and hashing one file",
            (Some(0.9), Some(true)),
        ),
        ("verify / b3sum", (None, None)),
        ("clones of one load", (Some(1.01), Some(true))),
    ] {
        assert_eq!(judged(what), expected, "{what}");
    }
    assert_eq!(report.targets.len(), 17);
}

#[test]
fn what_was_not_measured_says_what_it_needs() {
    let empty = KeptReport::new(report().platform, 1);
    assert!(empty.is_empty() && !report().is_empty());
    let targets = targets::judge(&empty);
    assert_eq!(targets.len(), 17);
    assert!(
        targets
            .iter()
            .all(|t| t.met().is_none() && t.where_.starts_with("needs "))
    );
}

#[test]
fn tables_are_those_of_what_was_measured() {
    let text = text::report(&report());
    let line = |begin: &str| {
        let mut lines = text.lines().filter(|line| line.starts_with(begin));
        let line = lines.next().unwrap_or_else(|| panic!("{begin}: {text}"));
        Vec::from_iter(line.split_whitespace()).join(" ")
    };
    assert_eq!(
        line("1.00 GiB  "),
        "1.00 GiB 1.00 ms 2.00 ms 2.00 ms x2.00 4.00 ms 3.00 ms 10.0 ms 20.0 ms x2.00 40.0 ms 40.0 ms x1.00"
    );
    assert_eq!(
        line("1.00 GiB, 2 vcpus"),
        "1.00 GiB, 2 vcpus 500 ms 1.00 s 1.00 s 2.00 s 1.50 s x1.50 3.00 s"
    );
    assert!(text.contains("50.0M"), "{text}");
    assert_eq!(
        line("one stretch of 10.2 MiB"),
        "one stretch of 10.2 MiB 20 B x0.020 40.0 µs x0.040 80.0 µs"
    );
    assert_eq!(line("954 MiB"), "954 MiB 400 ms 500 ms 2.00 360 ms -");
    assert_eq!(
        line("1000 B"),
        "1000 B 100 1000 B 10 B 1.96 KiB 1.010 5 B 7.00 µs"
    );
    let none = text::report(&KeptReport::new(report().platform, 1));
    assert!(!none.contains("clones of one load\n"), "{none}");
}

#[test]
fn a_report_is_read_as_it_was_written() {
    let written = report();
    let json = serde_json::to_vec(&written).unwrap();
    assert_eq!(
        serde_json::from_slice::<KeptReport>(&json).unwrap(),
        written
    );
}

#[test]
fn increments_and_verifies_are_of_what_they_say() {
    let _beside = beside_others();
    let (dir, stop) = (tempfile::tempdir().unwrap(), AtomicBool::new(false));
    let memory = 64 << 20;
    let cost = increment::measure(dir.path(), memory, 1, &stop).unwrap();
    assert!(cost.full.bytes >= memory, "{cost:?}");
    // Index and state.
    assert!(cost.nothing.bytes < 64 << 10, "{cost:?}");
    // 164 pages of one stretch are in two regions at most, anywhere they are in nearly all.
    assert!((2 << 20..5 << 20).contains(&cost.stretch.bytes), "{cost:?}");
    assert!(cost.scattered.bytes >= cost.changed, "{cost:?}");
    let cost = verify::measure(dir.path(), memory, 1, &stop).unwrap();
    assert_eq!((cost.bytes, cost.verify_us.count), (memory, 1));
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing is left"
    );
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = increment::measure(dir.path(), memory, 1, &stop).unwrap_err();
    assert!(error.is_interruption() && !error.is_of_size(), "{error}");
}

#[test]
fn loads_saves_and_clones_are_of_guests_that_run() {
    let Ok(kvm) = Kvm::open() else {
        return eprintln!("skipped: there is no KVM");
    };
    let _beside = beside_others();
    let (dir, stop) = (tempfile::tempdir().unwrap(), AtomicBool::new(false));
    let memory = 64 << 20;
    let cost = load::measure(&kvm, dir.path(), memory, 1, &stop).unwrap();
    for loading in [cost.ours, cost.whole, cost.mapped] {
        // Both guests, of one round.
        assert_eq!(loading.first_instruction_us.count, 2);
        assert_eq!(
            (loading.read_pass_us.count, loading.write_pass_us.count),
            (1, 1)
        );
        assert!(loading.read_pass_us.p50 > 0.0 && loading.write_pass_us.p50 > 0.0);
    }
    let config = save::guest(memory, 1);
    let cost = save::measure(&kvm, dir.path(), &config, 1, &stop, &mut |_| ()).unwrap();
    assert!(cost.bytes > memory / 2 && cost.ops_per_s > 0.0, "{cost:?}");
    assert_eq!(
        (
            cost.save_us.count,
            cost.save_pause_us.count,
            cost.pause_us.count
        ),
        (1, 1, 1)
    );
    let (count, written) = (4, 4 << 20);
    let cost = clones::measure(&kvm, dir.path(), memory, count, written, &stop).unwrap();
    assert!(
        cost.copy >= memory - (4 << 20) && cost.copy <= memory,
        "{cost:?}"
    );
    // Each has what it has written by itself, and little else.
    assert!(cost.in_use >= cost.copy + count * written, "{cost:?}");
    assert!(cost.copies() < 1.5, "{cost:?}");
}
