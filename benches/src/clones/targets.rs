//! What the numbers of clones should be. A target that several settings speak to is judged by the worst.
//! Medians count.

use super::parent::Entries;
use super::price::Price;
use super::report::CloneReport;
use crate::verdict::{Bound, Verdict, worst};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// How far a pause may be above the longer of two without clones and be called the same.
const SAME: f64 = 1.15;

/// Judges a run.
pub fn judge(report: &CloneReport) -> Vec<Verdict> {
    let of_bare =
        |number: fn(&Price) -> f64| move |price: &Price| number(price) / price.bare_us.p50;
    let mut verdicts = Vec::new();
    for (what, limit, number) in [
        (
            "clone / bare VM",
            1.5,
            of_bare(|price: &Price| price.clone_us.p50),
        ),
        (
            "clone in a shell that is ready / bare VM",
            0.5,
            of_bare(|price: &Price| price.pool_us.p50),
        ),
    ] {
        let found = report
            .prices
            .iter()
            .map(|price| (number(price), setting(price)));
        verdicts.push(worst(what, (Bound::AtMost, limit), found, "a price"));
    }
    for (what, number) in [
        ("clone", (|price| price.clone_us.p50) as fn(&Price) -> f64),
        ("clone in a shell that is ready", |price| price.pool_us.p50),
    ] {
        let grown = [Entries::Huge, Entries::HalfSmall]
            .into_iter()
            .filter_map(|entries| {
                let price = |memory| report.price(memory, entries.name()).map(number);
                let ratio = price(8 * GIB)? / price(256 * MIB)?;
                Some((ratio, entries.name().to_owned()))
            });
        let what = format!("growth: {what} at 8 GiB / at 256 MiB");
        verdicts.push(worst(
            &what,
            (Bound::AtMost, 1.2),
            grown,
            "256 MiB and 8 GiB",
        ));
    }
    let idle = |memory: u64| report.idle.iter().filter(move |idle| idle.memory == memory);
    verdicts.push(worst(
        "an idle clone at 256 MiB, MiB",
        (Bound::AtMost, 1.0),
        idle(256 * MIB).map(|idle| (idle.total() / MIB as f64, idle.entries.clone())),
        "idle clones of 256 MiB",
    ));
    verdicts.push(worst(
        "an idle clone at 4 GiB / guest memory",
        (Bound::AtMost, 0.004),
        idle(4 * GIB).map(|idle| (idle.total() / idle.memory as f64, idle.entries.clone())),
        "idle clones of 4 GiB",
    ));
    let size = |memory: u64| format!("{} MiB", memory / MIB);
    let pauses = report.pauses.iter();
    verdicts.push(worst(
        "pause with clones / the longer of two before",
        (Bound::AtMost, SAME),
        pauses
            .clone()
            .map(|pause| (pause.ratios().0, size(pause.memory))),
        "pauses",
    ));
    verdicts.push(worst(
        "pause after clones / the longer of two before",
        (Bound::AtMost, SAME),
        pauses.map(|pause| (pause.ratios().1, size(pause.memory))),
        "pauses",
    ));
    let crowds = report.crowds.iter().filter_map(|crowd| {
        let price = report.price(crowd.memory, Entries::Huge.name())?;
        let where_ = format!("{}, {} clones", size(crowd.memory), crowd.clones);
        Some((crowd.each_us / price.pool_us.p50, where_))
    });
    verdicts.push(worst(
        "each of a crowd / clone in a shell that is ready",
        (Bound::AtMost, 1.0),
        crowds,
        "a crowd and a price of the same size",
    ));
    verdicts.push(worst(
        "parent's speed while a crowd is made / before",
        (Bound::AtLeast, 0.5),
        report.crowds.iter().map(|crowd| {
            let where_ = format!("{}, {} clones", size(crowd.memory), crowd.clones);
            (crowd.parent_meanwhile / crowd.parent_before, where_)
        }),
        "a crowd",
    ));
    let rewrites = report.rewrites.iter();
    verdicts.push(worst(
        "dense rewrite, a page: clone / VM under a snapshot",
        (Bound::AtMost, 1.3),
        rewrites.clone().map(|rewrite| {
            let ratio = rewrite.clone_us / rewrite.under_snapshot_us;
            (ratio, size(rewrite.memory))
        }),
        "rewrites",
    ));
    verdicts.push(worst(
        "once more, a page: diverged clone / VM that never shared",
        (Bound::AtMost, 1.05),
        rewrites.map(|rewrite| {
            let ratio = rewrite.diverged_us / rewrite.unshared_us;
            (ratio, size(rewrite.memory))
        }),
        "rewrites",
    ));
    verdicts
}

fn setting(price: &Price) -> String {
    format!("{} MiB, {}", price.memory / MIB, price.entries)
}

/// The worst of `found`, which are numbers and where they are of.
#[cfg(test)]
mod tests {
    use super::super::crowd::Crowd;
    use super::super::idle::Idle;
    use super::super::pause::Pause;
    use super::super::rewrite::Rewrite;
    use super::*;
    use crate::report::Platform;
    use crate::summary::Summary;

    fn p50(p50: f64) -> Summary {
        Summary {
            count: 1,
            p50,
            p99: p50,
            max: p50,
        }
    }

    fn price(memory: u64, entries: Entries, scale: f64) -> Price {
        Price {
            memory,
            entries: entries.name().to_owned(),
            small_regions: 0,
            regions: 1,
            bare_us: p50(100.0),
            clone_us: p50(140.0 * scale),
            pool_us: p50(40.0 * scale),
            snapshot_and_clone_us: p50(300.0),
        }
    }

    fn report() -> CloneReport {
        let platform = Platform {
            kvm: "pvm".to_owned(),
            kernel: "6.18".to_owned(),
            cpus: 2,
            load: 0.0,
        };
        CloneReport::new(platform, 1)
    }

    fn found<'a>(verdicts: &'a [Verdict], what: &str) -> &'a Verdict {
        verdicts
            .iter()
            .find(|it| it.what.starts_with(what))
            .expect(what)
    }

    #[test]
    fn every_target_is_there_and_says_what_it_needs() {
        let verdicts = judge(&report());
        assert_eq!(verdicts.len(), 12);
        let says = |it: &Verdict| it.met().is_none() && it.where_.starts_with("needs ");
        assert!(verdicts.iter().all(says));
    }

    #[test]
    fn the_worst_price_counts() {
        let mut report = report();
        report.prices = vec![
            price(256 * MIB, Entries::Huge, 1.0),
            price(256 * MIB, Entries::HalfSmall, 2.0),
        ];
        let verdicts = judge(&report);
        let clone = found(&verdicts, "clone / bare VM");
        assert_eq!((clone.found, clone.met()), (Some(2.8), Some(false)));
        assert_eq!(clone.where_, "256 MiB, half-small");
        let pool = found(&verdicts, "clone in a shell that is ready / bare VM");
        assert_eq!(pool.found, Some(0.8));
        assert_eq!(found(&verdicts, "growth: clone at").found, None);
        report.prices.push(price(8 * GIB, Entries::Huge, 1.1));
        let verdicts = judge(&report);
        let growth = found(&verdicts, "growth: clone in a shell");
        assert!((growth.found.unwrap() - 1.1).abs() < 1e-9);
        assert_eq!(growth.met(), Some(true));
    }

    #[test]
    fn what_is_idle_is_judged_by_its_size() {
        let mut report = report();
        let idle = |memory, private, frames| Idle {
            memory,
            entries: "huge".to_owned(),
            clones: 32,
            private,
            frames,
            bare_private: 0.0,
        };
        report.idle = vec![idle(256 * MIB, 1e6, 0.5e6), idle(4 * GIB, 8e6, 1e6)];
        let verdicts = judge(&report);
        assert_eq!(found(&verdicts, "an idle clone at 256").met(), Some(false));
        assert_eq!(found(&verdicts, "an idle clone at 4 GiB").met(), Some(true));
    }

    #[test]
    fn crowds_pauses_and_rewrites_are_ratios_of_one_run() {
        let mut report = report();
        report.prices = vec![price(GIB, Entries::Huge, 1.0)];
        report.crowds = vec![Crowd {
            memory: GIB,
            clones: 100,
            each_us: 50.0,
            clone_us: p50(50.0),
            parent_before: 1e6,
            parent_meanwhile: 6e5,
        }];
        report.pauses = vec![Pause {
            memory: GIB,
            without_us: p50(90.0),
            again_us: p50(100.0),
            with_us: p50(110.0),
            after_us: p50(120.0),
        }];
        report.rewrites = vec![Rewrite {
            memory: GIB,
            pages: 1,
            unshared_us: 1.0,
            under_snapshot_us: 2.0,
            clone_us: 4.0,
            second_us: 1.5,
            diverged_us: 1.02,
        }];
        let verdicts = judge(&report);
        let is = |what| (found(&verdicts, what).found, found(&verdicts, what).met());
        assert_eq!(is("each of a crowd"), (Some(1.25), Some(false)));
        assert_eq!(is("parent's speed"), (Some(0.6), Some(true)));
        assert_eq!(is("pause with clones"), (Some(1.1), Some(true)));
        assert_eq!(is("pause after clones"), (Some(1.2), Some(false)));
        assert_eq!(is("dense rewrite"), (Some(2.0), Some(false)));
        assert_eq!(is("once more"), (Some(1.02), Some(true)));
    }
}
