//! What the numbers should be. All but a few are ratios of one run: they say something on any machine.
//!
//! A target that several settings of a run speak to is judged by the worst of them. Runs with a device are
//! not judged. Of several snapshots the median counts.

use crate::report::{Cell, Report, Setting};
use crate::technique::Kind;
use crate::verdict::{Bound, Verdict};

const GIB: u64 = 1 << 30;
/// What the sweep of the stall's target is.
const SWEEP: u64 = 128 << 20;

/// Judges a run.
pub fn judge(report: &Report) -> Vec<Verdict> {
    let judge = Judge { report };
    let pause = |cell: &Cell| Some(cell.pause_us.p50);
    let stall = |cell: &Cell| Some(cell.stall_us.p50);
    let gap = |cell: &Cell| Some(cell.gap_us.p50);
    let per_page = |cell: &Cell| Some(cell.per_page_us);
    let big_hot = |s: Setting<'_>| s.memory == 4 * GIB && s.pattern == "hot";
    let dense = |s: Setting<'_>| s.pattern == "dense";
    let sparse = |s: Setting<'_>| s.pattern == "sparse";
    let shared_out = |s: Setting<'_>| s.memory == GIB && s.pattern == "hot" && s.vcpus == 2;
    let mut verdicts = Vec::new();

    for (baseline, limit) in [
        (Kind::ForkThp, 1.0 / 10.0),
        (Kind::Fork, 1.0 / 300.0),
        (Kind::Uffd, 1.0 / 200.0),
    ] {
        verdicts.push(judge.ratio(
            &format!("pause, 4 GiB, hot: ours / {baseline}"),
            (Bound::AtMost, limit),
            big_hot,
            baseline,
            pause,
        ));
    }
    verdicts.push(judge.growth());
    verdicts.push(judge.ratio(
        "dense rewrite, per page: ours / fork",
        (Bound::AtMost, 1.0 / 20.0),
        dense,
        Kind::Fork,
        per_page,
    ));
    verdicts.push(judge.value(
        "dense rewrite, per page: ours / a plain copy",
        (Bound::AtMost, 1.6),
        dense,
        |cell| Some(cell.per_page_us / report.machine.copy_us_per_page),
    ));
    for (baseline, limit) in [(Kind::Uffd, 0.8), (Kind::Fork, 1.6)] {
        verdicts.push(judge.ratio(
            &format!("sparse rewrite, per page: ours / {baseline}"),
            (Bound::AtMost, limit),
            sparse,
            baseline,
            per_page,
        ));
    }
    let swept = |cell: &Cell| stall(cell).filter(|_| cell.sweep == SWEEP);
    for (baseline, limit) in [(Kind::ForkThp, 1.0 / 15.0), (Kind::Uffd, 1.0 / 25.0)] {
        verdicts.push(judge.ratio(
            &format!("stall, dense sweep of 128 MiB: ours / {baseline}"),
            (Bound::AtMost, limit),
            dense,
            baseline,
            swept,
        ));
    }
    verdicts.push(judge.value(
        "longest gap, dense sweep of 128 MiB, ms",
        (Bound::AtMost, 1.5),
        dense,
        |cell| gap(cell).filter(|_| cell.sweep == SWEEP).map(|us| us / 1e3),
    ));
    verdicts.push(judge.mix());
    verdicts.push(judge.value(
        "writes with 1 snapshot a second, hot, 1 GiB, 2 vcpus",
        (Bound::AtLeast, 0.8),
        shared_out,
        |cell| cell.rate(1.0).map(|rate| rate.share),
    ));
    verdicts.push(judge.throughput(shared_out));
    verdicts.push(judge.value(
        "first snapshot, pause: first / later",
        (Bound::AtMost, 2.0),
        |_| true,
        |cell| Some(cell.first?.pause_us.p50 / cell.pause_us.p50),
    ));
    verdicts.push(judge.value(
        "first snapshot, stall of a dense sweep: first / later",
        (Bound::AtMost, 1.5),
        dense,
        |cell| Some(cell.first?.stall_us.p50 / cell.stall_us.p50),
    ));
    verdicts.push(judge.ratio(
        "first snapshot, pause: ours / fork-thp",
        (Bound::AtMost, 1.0 / 5.0),
        |_| true,
        Kind::ForkThp,
        |cell| Some(cell.first?.pause_us.p50),
    ));
    verdicts.push(judge.ratio(
        "first snapshot, stall of a dense sweep: ours / fork-thp",
        (Bound::AtMost, 1.0 / 15.0),
        dense,
        Kind::ForkThp,
        |cell| Some(cell.first?.stall_us.p50),
    ));
    let machine = |what: &str, bound, limit, found| Verdict {
        what: what.to_owned(),
        bound,
        limit,
        found: Some(found),
        where_: "without a guest".to_owned(),
    };
    verdicts.push(machine(
        "pin and unpin a page, one thread, ns",
        Bound::AtMost,
        60.0,
        report.machine.pin_ns,
    ));
    verdicts.push(machine(
        "pins of two threads / one thread",
        Bound::AtLeast,
        1.7,
        report.machine.pin_two_threads,
    ));
    verdicts.push(judge.value(
        "shadow page table and frame table / guest memory",
        (Bound::AtMost, 0.005),
        |_| true,
        |cell| Some(cell.tables? as f64 / cell.memory as f64),
    ));
    verdicts
}

struct Judge<'a> {
    report: &'a Report,
}

impl<'a> Judge<'a> {
    /// The worst of what `value` says of a setting, over those that `which` names.
    fn worst(
        &self,
        what: &str,
        (bound, limit): (Bound, f64),
        which: impl Fn(Setting<'a>) -> bool,
        value: impl Fn(Setting<'a>) -> Option<f64>,
        needs: &str,
    ) -> Verdict {
        let found = self
            .report
            .settings()
            .into_iter()
            .filter(|setting| !setting.dma && which(*setting))
            .filter_map(|setting| value(setting).map(|value| (value, setting)))
            .filter(|(value, _)| value.is_finite())
            .reduce(|a, b| match bound {
                Bound::AtMost if b.0 > a.0 => b,
                Bound::AtLeast if b.0 < a.0 => b,
                _ => a,
            });
        Verdict {
            what: what.to_owned(),
            bound,
            limit,
            found: found.map(|(value, _)| value),
            where_: match found {
                Some((_, s)) => format!("{} MiB, {}, {} vcpus", s.memory >> 20, s.pattern, s.vcpus),
                None => format!("needs {needs}"),
            },
        }
    }

    fn ours(&self, setting: Setting<'a>) -> Option<&'a Cell> {
        self.report.cell(Kind::Ours.name(), setting)
    }

    /// A number of ours by the same of `baseline`.
    fn ratio(
        &self,
        what: &str,
        limit: (Bound, f64),
        which: impl Fn(Setting<'a>) -> bool,
        baseline: Kind,
        number: impl Fn(&Cell) -> Option<f64>,
    ) -> Verdict {
        let value = |setting| {
            let ours = number(self.ours(setting)?)?;
            Some(ours / number(self.report.cell(baseline.name(), setting)?)?)
        };
        let needs = format!("ours and {baseline} in that setting");
        self.worst(what, limit, which, value, &needs)
    }

    /// A number of ours alone.
    fn value(
        &self,
        what: &str,
        limit: (Bound, f64),
        which: impl Fn(Setting<'a>) -> bool,
        number: impl Fn(&Cell) -> Option<f64>,
    ) -> Verdict {
        let value = |setting| number(self.ours(setting)?);
        self.worst(what, limit, which, value, "ours in that setting")
    }

    fn growth(&self) -> Verdict {
        let value = |small: Setting<'a>| {
            let large = Setting {
                memory: 8 * GIB,
                ..small
            };
            Some(self.ours(large)?.pause_us.p50 / self.ours(small)?.pause_us.p50)
        };
        self.worst(
            "growth: pause at 8 GiB / pause at 1 GiB, hot",
            (Bound::AtMost, 1.3),
            |s| s.memory == GIB && s.pattern == "hot",
            value,
            "ours, hot, with 1 and 8 GiB",
        )
    }

    fn mix(&self) -> Verdict {
        let stall = |kind: Kind, setting| {
            Some(self.report.cell(kind.name(), setting)?.stall_us.p50).filter(|us| *us > 0.0)
        };
        let value = |setting| {
            let best = stall(Kind::Ours4k, setting)?.min(stall(Kind::Ours2m, setting)?);
            Some(stall(Kind::Ours, setting)? / best)
        };
        self.worst(
            "any mix, stall: ours / the better of 4 KiB and 2 MiB",
            (Bound::AtMost, 2.2),
            |_| true,
            value,
            "ours, ours-4k and ours-2m",
        )
    }

    fn throughput(&self, which: impl Fn(Setting<'a>) -> bool) -> Verdict {
        let share =
            |kind: Kind, setting| Some(self.report.cell(kind.name(), setting)?.rate(10.0)?.share);
        let value = |setting| {
            let best = Kind::ALL
                .into_iter()
                .filter(|kind| !kind.is_ours())
                .filter_map(|kind| share(kind, setting))
                .reduce(f64::max)?;
            Some(share(Kind::Ours, setting)? / best)
        };
        self.worst(
            "writes with 10 snapshots a second, hot, 1 GiB, 2 vcpus: ours / best other",
            (Bound::AtLeast, 3.0),
            which,
            value,
            "ours and another in that setting, with 10 snapshots a second",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::First;
    use crate::report::tests::{cell, report};

    fn found<'a>(verdicts: &'a [Verdict], what: &str) -> &'a Verdict {
        let mut of_that_name = verdicts
            .iter()
            .filter(|verdict| verdict.what.starts_with(what));
        let verdict = of_that_name.next().expect(what);
        assert_eq!(of_that_name.next(), None, "{what}");
        verdict
    }

    #[test]
    fn every_target_is_there_and_says_what_it_needs() {
        let verdicts = judge(&report(vec![]));
        assert_eq!(verdicts.len(), 21);
        let measured = verdicts.iter().filter(|verdict| verdict.met().is_some());
        assert_eq!(measured.count(), 2, "the pins need no guest");
        assert!(
            verdicts
                .iter()
                .filter(|verdict| verdict.met().is_none())
                .all(|verdict| verdict.where_.starts_with("needs ours"))
        );
    }

    #[test]
    fn ratios_are_those_of_the_cells() {
        let report = report(vec![
            cell("ours", 4 * GIB, "hot", 1.0),
            cell("fork", 4 * GIB, "hot", 400.0),
            cell("fork-thp", 4 * GIB, "hot", 5.0),
        ]);
        let verdicts = judge(&report);
        let fork = found(&verdicts, "pause, 4 GiB, hot: ours / fork-thp");
        assert_eq!((fork.found, fork.met()), (Some(0.2), Some(false)));
        assert_eq!(fork.missed_by(), Some(2.0));
        assert_eq!(fork.where_, "4096 MiB, hot, 1 vcpus");
        let uffd = found(&verdicts, "pause, 4 GiB, hot: ours / uffd-wp");
        assert_eq!(uffd.met(), None);
        let pauses = verdicts.iter().filter(|v| v.what.ends_with("ours / fork"));
        let met: Vec<_> = pauses.map(Verdict::met).collect();
        assert_eq!(met, [Some(true), None, None]);
    }

    #[test]
    fn the_worst_setting_counts() {
        let report = report(vec![
            cell("ours", GIB, "dense", 1.0),
            cell("fork", GIB, "dense", 50.0),
            cell("ours", 256 << 20, "dense", 1.0),
            cell("fork", 256 << 20, "dense", 10.0),
        ]);
        let verdicts = judge(&report);
        let dense = found(&verdicts, "dense rewrite, per page: ours / fork");
        assert_eq!((dense.found, dense.met()), (Some(0.1), Some(false)));
        assert_eq!(dense.where_, "256 MiB, dense, 1 vcpus");
    }

    #[test]
    fn runs_with_a_device_are_not_judged() {
        let mut cells = vec![
            cell("ours", GIB, "dense", 1.0),
            cell("fork", GIB, "dense", 50.0),
        ];
        cells.iter_mut().for_each(|cell| cell.dma = true);
        let verdicts = judge(&report(cells));
        assert_eq!(
            found(&verdicts, "dense rewrite, per page: ours / fork").met(),
            None
        );
    }

    #[test]
    fn growth_compares_two_sizes() {
        let report = report(vec![
            cell("ours", GIB, "hot", 1.0),
            cell("ours", 8 * GIB, "hot", 1.25),
        ]);
        let verdicts = judge(&report);
        let growth = found(&verdicts, "growth");
        assert_eq!((growth.found, growth.met()), (Some(1.25), Some(true)));
    }

    #[test]
    fn the_stall_is_that_of_a_sweep_of_128_mib() {
        let mut cells = vec![
            cell("ours", GIB, "dense", 1.0),
            cell("uffd-wp", GIB, "dense", 50.0),
        ];
        let what = "stall, dense sweep of 128 MiB: ours / uffd-wp";
        assert_eq!(
            found(&judge(&report(cells.clone())), what).found,
            Some(1.0 / 50.0)
        );
        cells[0].sweep = 64 << 20;
        assert_eq!(found(&judge(&report(cells)), what).found, None);
    }

    #[test]
    fn a_mix_is_compared_with_the_better_of_the_two() {
        let report = report(vec![
            cell("ours", GIB, "hot", 3.0),
            cell("ours-4k", GIB, "hot", 9.0),
            cell("ours-2m", GIB, "hot", 1.0),
        ]);
        let verdicts = judge(&report);
        assert_eq!(found(&verdicts, "any mix").found, Some(3.0));
        assert_eq!(found(&verdicts, "any mix").met(), Some(false));
    }

    #[test]
    fn throughput_is_compared_with_the_best_of_the_others() {
        let mut cells = vec![
            cell("ours", GIB, "hot", 1.0),
            cell("ours-4k", GIB, "hot", 1.0),
            cell("fork", GIB, "hot", 7.0),
            cell("copy", GIB, "hot", 5.0),
        ];
        cells.iter_mut().for_each(|cell| cell.vcpus = 2);
        let verdicts = judge(&report(cells));
        let share = found(&verdicts, "writes with 10 snapshots a second");
        assert!((share.found.unwrap() - 5.0).abs() < 1e-9);
        assert_eq!(share.met(), Some(true));
        let alone = found(&verdicts, "writes with 1 snapshot a second");
        assert_eq!((alone.found, alone.met()), (Some(0.95), Some(true)));
    }

    #[test]
    fn first_snapshots_are_compared_with_later_ones_and_with_others() {
        let first = |cell: &mut Cell, factor: f64| {
            let (mut pause_us, mut stall_us) = (cell.pause_us, cell.stall_us);
            pause_us.p50 *= factor;
            stall_us.p50 *= factor;
            cell.first = Some(First {
                guests: 1,
                pause_us,
                stall_us,
            });
        };
        let mut cells = vec![
            cell("ours", GIB, "dense", 1.0),
            cell("fork-thp", GIB, "dense", 20.0),
        ];
        let of = |cells: &[Cell], what: &str| found(&judge(&report(cells.to_vec())), what).found;
        let names = [
            "first snapshot, pause: first / later",
            "first snapshot, stall of a dense sweep: first / later",
            "first snapshot, pause: ours / fork-thp",
            "first snapshot, stall of a dense sweep: ours / fork-thp",
        ];
        assert_eq!(names.map(|what| of(&cells, what)), [None; 4]);
        first(&mut cells[0], 3.0);
        first(&mut cells[1], 1.0);
        let found = names.map(|what| of(&cells, what).unwrap());
        let expected = [3.0, 3.0, 0.15, 0.15];
        for (found, expected) in found.into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-9, "{found} for {expected}");
        }
    }

    #[test]
    fn tables_are_a_share_of_memory() {
        let mut cells = vec![cell("ours", GIB, "hot", 1.0)];
        cells[0].tables = Some(GIB / 100);
        let verdicts = judge(&report(cells));
        let tables = found(&verdicts, "shadow page table");
        assert_eq!(tables.met(), Some(false));
        assert!((tables.missed_by().unwrap() - 2.0).abs() < 0.01);
    }
}
