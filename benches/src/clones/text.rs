//! A report of `benches/clone.rs` for people.

use vmm::cli::units::{bytes, micros};

use super::report::CloneReport;
use crate::text::{caveats, fields, ratio, targets, titled};

/// All of `report`.
pub fn report(report: &CloneReport) -> String {
    let platform = &report.platform;
    let mut text = format!(
        "clones of a running VM: {} KVM, Linux {}, {} CPUs; {} rounds each; medians, and the longest\n",
        platform.kvm, platform.kernel, platform.cpus, report.rounds
    );
    text.push_str(&caveats(platform, &report.skipped));
    let tables = [
        (
            "from the wish to the first instruction; ratios to a bare VM",
            prices(report),
        ),
        ("an idle clone takes", idle(report)),
        ("many clones of a parent that runs", crowds(report)),
        ("pause of the parent for a snapshot", pauses(report)),
        (
            "all of memory is written, a word a page: time of a page",
            rewrites(report),
        ),
    ];
    for (title, lines) in tables {
        text.push_str(&titled(title, &lines));
    }
    text.push('\n');
    text.push_str(&targets(&report.targets));
    text
}

fn prices(report: &CloneReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "small",
        "bare",
        "max",
        "clone",
        "",
        "max",
        "in a shell",
        "",
        "max",
        "snapshot+",
        "",
        "max",
    ];
    let mut lines = vec![fields(header)];
    for price in &report.prices {
        let mut fields = vec![
            format!("{}, {}", bytes(price.memory), price.entries),
            format!("{}/{}", price.small_regions, price.regions),
            micros(price.bare_us.p50),
            micros(price.bare_us.max),
        ];
        for time in [price.clone_us, price.pool_us, price.snapshot_and_clone_us] {
            let ratio = ratio(time.p50, price.bare_us.p50);
            fields.extend([micros(time.p50), ratio, micros(time.max)]);
        }
        lines.push(fields);
    }
    lines
}

fn idle(report: &CloneReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "clones",
        "in all",
        "private",
        "frames",
        "bare VM, private",
    ];
    let mut lines = vec![fields(header)];
    for idle in &report.idle {
        lines.push(vec![
            format!("{}, {}", bytes(idle.memory), idle.entries),
            idle.clones.to_string(),
            bytes(idle.total() as u64),
            bytes(idle.private as u64),
            bytes(idle.frames as u64),
            bytes(idle.bare_private as u64),
        ]);
    }
    lines
}

fn crowds(report: &CloneReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "clones",
        "each",
        "alone",
        "p99",
        "max",
        "parent's speed",
    ];
    let mut lines = vec![fields(header)];
    for crowd in &report.crowds {
        let speed = crowd.parent_meanwhile / crowd.parent_before;
        lines.push(vec![
            bytes(crowd.memory),
            crowd.clones.to_string(),
            micros(crowd.each_us),
            micros(crowd.clone_us.p50),
            micros(crowd.clone_us.p99),
            micros(crowd.clone_us.max),
            format!("{:.0}%", speed * 100.0),
        ]);
    }
    lines
}

fn pauses(report: &CloneReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "before clones",
        "max",
        "again",
        "max",
        "with clones",
        "",
        "max",
        "after",
        "",
        "max",
    ];
    let mut lines = vec![fields(header)];
    for pause in &report.pauses {
        let mut fields = vec![bytes(pause.memory)];
        for time in [pause.without_us, pause.again_us] {
            fields.extend([micros(time.p50), micros(time.max)]);
        }
        let before = pause.without_us.p50.max(pause.again_us.p50);
        for time in [pause.with_us, pause.after_us] {
            fields.extend([micros(time.p50), ratio(time.p50, before), micros(time.max)]);
        }
        lines.push(fields);
    }
    lines
}

fn rewrites(report: &CloneReport) -> Vec<Vec<String>> {
    let header = [
        "",
        "never shared",
        "under a snapshot",
        "clone",
        "",
        "second time",
        "",
        "later",
        "",
    ];
    let mut lines = vec![fields(header)];
    for rewrite in &report.rewrites {
        let (unshared, snapshot) = (rewrite.unshared_us, rewrite.under_snapshot_us);
        lines.push(vec![
            bytes(rewrite.memory),
            nanos(unshared),
            nanos(snapshot),
            nanos(rewrite.clone_us),
            ratio(rewrite.clone_us, snapshot),
            nanos(rewrite.second_us),
            ratio(rewrite.second_us, unshared),
            nanos(rewrite.diverged_us),
            ratio(rewrite.diverged_us, unshared),
        ]);
    }
    lines
}

/// A time of a page: a few nanoseconds, or some microseconds.
fn nanos(micros: f64) -> String {
    format!("{:.0} ns", micros * 1e3)
}

#[cfg(test)]
mod tests {
    use super::super::price::Price;
    use super::super::rewrite::Rewrite;
    use super::*;
    use crate::report::Platform;
    use crate::summary::Summary;

    #[test]
    fn tables_are_those_of_what_was_measured() {
        let platform = Platform {
            kvm: "pvm".to_owned(),
            kernel: "6.18".to_owned(),
            cpus: 2,
            load: 0.0,
        };
        let mut it = CloneReport::new(platform, 20);
        assert!(it.is_empty());
        let time = |p50| Summary {
            count: 20,
            p50,
            p99: p50,
            max: 3.0 * p50,
        };
        it.prices.push(Price {
            memory: 1 << 30,
            entries: "half-small".to_owned(),
            small_regions: 256,
            regions: 512,
            bare_us: time(1000.0),
            clone_us: time(1500.0),
            pool_us: time(400.0),
            snapshot_and_clone_us: time(800.0),
        });
        it.rewrites.push(Rewrite {
            memory: 1 << 30,
            pages: 1,
            unshared_us: 0.01,
            under_snapshot_us: 2.0,
            clone_us: 3.0,
            second_us: 0.3,
            diverged_us: 0.02,
        });
        let text = report(&it);
        let line = |begin: &str| {
            let mut lines = text.lines();
            let line = lines.find(|line| line.starts_with(begin)).unwrap();
            line.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            line("1.00 GiB, half-small"),
            "1.00 GiB, half-small 256/512 1.00 ms 3.00 ms 1.50 ms x1.50 4.50 ms 400 µs x0.40 1.20 ms \
             800 µs x0.80 2.40 ms"
        );
        assert_eq!(
            line("1.00 GiB  "),
            "1.00 GiB 10 ns 2000 ns 3000 ns x1.50 300 ns x30.0 20 ns x2.00"
        );
        assert!(!text.contains("an idle clone takes"), "{text}");
    }
}
