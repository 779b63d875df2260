//! What the numbers of kept snapshots should be. A target that several settings speak to is judged by the
//! worst. Medians count.

use vmm::cli::units::bytes;

use super::increment::{IncrementCost, Written};
use super::load::LoadCost;
use super::report::KeptReport;
use super::save::SaveCost;
use crate::verdict::{Bound, Verdict, worst};

const GIB: u64 = 1 << 30;
/// How far a pause may be above another and be called the same.
const SAME: f64 = 1.15;

/// Judges a run, on a machine with `cpus` CPUs.
pub fn judge(report: &KeptReport) -> Vec<Verdict> {
    let first = |load: &LoadCost| load.ours.first_instruction_us.p50;
    let loads = |number: fn(&LoadCost) -> f64| {
        let loads = report.loads.iter();
        loads.map(move |load| (number(load), bytes(load.memory)))
    };
    let of_1_gib = || report.load(GIB).into_iter();
    let mut verdicts = vec![
        worst(
            "load of 1 GiB to the first instruction, ms",
            (Bound::AtMost, 3.0),
            of_1_gib().map(|load| (first(load) / 1e3, bytes(GIB))),
            "a load of 1 GiB",
        ),
        worst(
            "load of 1 GiB to the first instruction / a file mapped privately",
            (Bound::AtMost, 1.0 / 3.0),
            of_1_gib().map(|load| {
                (
                    first(load) / load.mapped.first_instruction_us.p50,
                    bytes(GIB),
                )
            }),
            "a load of 1 GiB",
        ),
        worst(
            "growth: load of 8 GiB / of 1 GiB",
            (Bound::AtMost, 1.2),
            report
                .load(8 * GIB)
                .zip(report.load(GIB))
                .into_iter()
                .map(|(large, small)| {
                    (
                        first(large) / first(small),
                        "to the first instruction".to_owned(),
                    )
                }),
            "loads of 1 and of 8 GiB",
        ),
        worst(
            "first pass, reading / a file mapped privately",
            (Bound::AtMost, 1.5),
            loads(|load| load.ours.read_pass_us.p50 / load.mapped.read_pass_us.p50),
            "a load",
        ),
        worst(
            "first pass, writing / a file mapped privately",
            (Bound::AtMost, 1.5),
            loads(|load| load.ours.write_pass_us.p50 / load.mapped.write_pass_us.p50),
            "a load",
        ),
    ];
    let saves = |number: fn(&SaveCost) -> f64| {
        report.saves.iter().map(move |save| {
            let where_ = format!("{}, {} vcpus", bytes(save.memory), save.vcpus);
            (number(save), where_)
        })
    };
    verdicts.push(worst(
        "save, guest running / the slower of a raw write and copy + hash",
        (Bound::AtMost, 1.3),
        saves(|save| save.save_us.p50 / save.floor_us()),
        "a save",
    ));
    for (what, limit, has_spare) in [
        ("speed kept beside a save, a CPU to spare", 0.85, true),
        ("speed kept beside a save, all CPUs busy", 0.6, false),
    ] {
        let cpus = report.platform.cpus as u64;
        let is_of = move |save: &&SaveCost| (save.vcpus < cpus) == has_spare;
        verdicts.push(worst(
            what,
            (Bound::AtLeast, limit),
            report.saves.iter().filter(is_of).map(|save| {
                let where_ = format!("{}, {} vcpus", bytes(save.memory), save.vcpus);
                (save.speed_save, where_)
            }),
            "a save",
        ));
    }
    verdicts.push(worst(
        "pause for a save / for a snapshot",
        (Bound::AtMost, SAME),
        saves(|save| save.save_pause_us.p50 / save.pause_us.p50),
        "a save",
    ));
    for (what, part) in [
        (
            "one stretch",
            (|cost| cost.stretch) as fn(&IncrementCost) -> Written,
        ),
        ("pages anywhere", |cost| cost.scattered),
    ] {
        let increments = |number: fn(&IncrementCost, Written) -> f64| {
            let increments = report.increments.iter();
            increments.map(move |cost| (number(cost, part(cost)), bytes(cost.memory)))
        };
        verdicts.push(worst(
            &format!("increment after 1% changed, {what}: bytes / the full save's"),
            (Bound::AtMost, 0.03),
            increments(|cost, part| part.bytes as f64 / cost.full.bytes as f64),
            "increments",
        ));
        verdicts.push(worst(
            &format!("increment after 1% changed, {what}: time / the full save's"),
            (Bound::AtMost, 0.03),
            increments(|cost, part| part.us.p50 / cost.full.us.p50),
            "increments",
        ));
    }
    let verifies = report.verifies.iter();
    verdicts.push(worst(
        "verify, GB/s of a core",
        (Bound::AtLeast, 2.0),
        verifies
            .clone()
            .map(|cost| (cost.a_core() / 1e9, bytes(cost.bytes))),
        "a verify",
    ));
    verdicts.push(worst(
        "verify / reading and hashing one file, speed",
        (Bound::AtLeast, 0.7),
        verifies
            .clone()
            .map(|cost| (cost.file_us.p50 / cost.verify_us.p50, bytes(cost.bytes))),
        "a verify",
    ));
    verdicts.push(worst(
        "verify / b3sum, speed",
        (Bound::AtLeast, 0.7),
        verifies
            .filter_map(|cost| Some((cost.b3sum_us?.p50 / cost.verify_us.p50, bytes(cost.bytes)))),
        "b3sum",
    ));
    verdicts.push(worst(
        "clones of one load: memory beyond their own writes, copies",
        (Bound::AtMost, 1.02),
        report.clones.iter().map(|cost| {
            let where_ = format!("{} clones of {}", cost.clones, bytes(cost.memory));
            (cost.copies(), where_)
        }),
        "clones",
    ));
    verdicts
}
