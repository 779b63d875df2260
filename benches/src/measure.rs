//! One technique, one guest: how long it stands still for a snapshot, what it loses, and what it costs.
//!
//! | number | what it is |
//! |---|---|
//! | pause | from the kick to the last vCPU about to run again |
//! | stall | what the guest lost, the pause with it (below); of several vCPUs, the one that lost most |
//! | longest gap | the longest time between two writes, by the guest's own clock; usually the pause |
//! | per page | what all vCPUs lost without the pause, by the number of different pages they wrote |
//! | share | writes a second with a snapshot every so often, as a share of those before the first snapshot |
//!
//! A snapshot is felt from the lap in which the technique begins to prepare for it to the end of the lap
//! after the one in which it is taken. The stall is the time of these laps, less as many usual ones; the
//! longest gap is looked for in them. Time per page counts the pages written from the snapshot to the end of
//! them: it is the time to touch a page again.
//!
//! The usual lap is the median before the first snapshot: a technique that leaves the guest slower than it
//! was pays for that. Between two snapshots the guest does a few laps, whatever time they take it. Memory is
//! brought back to its best between two snapshots
//! ([`Technique::settle`](crate::technique::Technique::settle)), except while writes a second are counted.
//!
//! All of that is of one guest, which has been snapshotted a few times. People fork a guest once: if it is asked
//! for, the first snapshot of each of some fresh guests is measured, too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest::sweep::Lap;
use palimpsest::vm::By;

use crate::footprint;
use crate::report::{Cell, First, Rate};
use crate::summary::{Times, median};
use crate::technique::{Kind, TechniqueError};
use crate::vm::{BenchVm, GuestConfig, MeasuredSnapshot, VcpuProgress, VmError};

/// Memory that is left to others.
const MARGIN: u64 = 1 << 30;
/// Laps without a snapshot before one.
const REST: u64 = 3;
/// Laps the usual one is the median of, at least.
const USUAL: u64 = 8;
/// And how long they are watched, at least.
const USUAL_TIME: Duration = Duration::from_millis(50);
/// Pauses without a snapshot.
const EMPTY: u64 = 5;
/// Snapshots of a guest whose laps the host may miss before it gives up.
const MISSED: u64 = 20;
/// How often somebody who waits for the next snapshot looks up.
const SLICE: Duration = Duration::from_millis(20);

/// How much is measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Snapshots whose pause and stall are measured.
    pub rounds: u64,
    /// Fresh guests whose first snapshot is measured.
    pub first: u64,
    /// How long the guest is watched without a snapshot, at least.
    pub quiet: Duration,
    /// Snapshots a second, one measurement of the guest's writes each.
    pub rates: Vec<f64>,
    /// How long one of these is.
    pub rate_time: Duration,
}

/// Measures `kind`, run by `by`, with the guest of `config`. Calls `step` with what it is at.
///
/// # Errors
/// If the technique or the guest fails, or `stop` is set.
pub fn measure(
    by: By<'_>,
    kind: Kind,
    config: &GuestConfig,
    sampling: &Sampling,
    stop: &AtomicBool,
    step: &mut dyn FnMut(&str),
) -> Result<Cell, VmError> {
    let base = pss([])?;
    let available = footprint::available().map_err(|source| TechniqueError::Host {
        what: "tell how much memory there is",
        source,
    })?;
    // The guest, and a snapshot that shares nothing with it.
    let needed = 2 * config.memory + MARGIN;
    if available < needed {
        return Err(VmError::NoMemory { needed, available });
    }
    let first = first_of_fresh_guests(by, kind, config, sampling, stop, step)?;
    step("boot");
    let vm = BenchVm::boot(by, kind.start(config.memory)?, config)?;
    let run = Run { vm: &vm, stop };
    step("first touch");
    vm.wait("touching its memory", stop, |_, vcpu| Ok(vcpu.resident))?;
    step("quiet");
    run.rest(REST)?;
    let quiet = run.speed(|| run.pause_until(Instant::now() + sampling.quiet))?;
    let usual = run.usual()?;
    let mut empty = Vec::new();
    for _ in 0..EMPTY {
        run.rest(REST)?;
        empty.push(micros(vm.stop_and_go()?));
    }

    let mut pauses = Times::default();
    let mut stalls = Times::default();
    let mut gaps = Times::default();
    let mut per_page = Vec::new();
    let mut touched = Vec::new();
    let mut copied = Vec::new();
    let mut missed = 0;
    while pauses.len() < sampling.rounds {
        step(&format!(
            "snapshot {} of {}",
            pauses.len() + 1,
            sampling.rounds
        ));
        vm.technique().settle()?;
        run.rest(REST)?;
        let copied_before = vm.technique().copied();
        let snapshot = vm.snapshot()?;
        let Some(felt) = run.felt(&snapshot, &usual)? else {
            missed += 1;
            if missed > MISSED {
                return Err(VmError::Missed);
            }
            continue;
        };
        if let (Some(before), Some(after)) = (copied_before, vm.technique().copied()) {
            copied.push((after - before) as f64);
        }
        pauses.record(snapshot.pause);
        stalls.record(felt.lost_most);
        gaps.record(felt.longest_gap);
        touched.push(felt.touched as f64);
        let paused = snapshot.pause * config.vcpus as u32;
        let touching = felt.lost_all.saturating_sub(paused);
        per_page.push(micros(touching) / felt.touched.max(1) as f64);
    }

    // Once more, for what takes too long to look at in a measurement.
    step("memory");
    vm.technique().settle()?;
    run.rest(REST)?;
    let before = pss([])?;
    let snapshot = vm.snapshot()?;
    run.wait_laps("its first sweep after a snapshot", &snapshot.at, 2)?;
    let after = pss(snapshot.memory.process())?;
    // Now, with what copies need of them.
    let tables = vm.technique().tables();
    drop(snapshot);
    if copied.is_empty() {
        copied.push(after.saturating_sub(before) as f64);
    }

    let mut rates = Vec::new();
    for &rate in &sampling.rates {
        step(&format!("{rate} snapshots a second"));
        vm.technique().settle()?;
        run.rest(REST)?;
        rates.push(run.at_rate(rate, quiet, sampling)?);
    }
    vm.check()?;
    Ok(Cell {
        technique: kind.name().to_owned(),
        memory: config.memory,
        pattern: crate::report::pattern_name(config.pattern).to_owned(),
        vcpus: config.vcpus,
        dma: config.dma,
        sweep: config.sweep,
        usual_lap_us: usual
            .iter()
            .map(|usual| micros(usual.lap))
            .fold(0.0, f64::max),
        quiet_gap_us: usual
            .iter()
            .map(|usual| micros(usual.longest_gap))
            .fold(0.0, f64::max),
        ops_per_s: quiet,
        empty_pause_us: median(empty).unwrap_or_default(),
        pause_us: pauses.summary().unwrap_or_default(),
        stall_us: stalls.summary().unwrap_or_default(),
        gap_us: gaps.summary().unwrap_or_default(),
        per_page_us: median(per_page).unwrap_or_default(),
        pages: median(touched).unwrap_or_default() as u64,
        copied: median(copied).unwrap_or_default() as u64,
        peak_memory: after.saturating_sub(base),
        tables,
        rates,
        first,
    })
}

/// The first snapshot of each of some guests, which are booted for it and have done a few laps.
fn first_of_fresh_guests(
    by: By<'_>,
    kind: Kind,
    config: &GuestConfig,
    sampling: &Sampling,
    stop: &AtomicBool,
    step: &mut dyn FnMut(&str),
) -> Result<Option<First>, VmError> {
    let (mut pauses, mut stalls) = (Times::default(), Times::default());
    let mut missed = 0;
    while pauses.len() < sampling.first {
        step(&format!(
            "first snapshot {} of {}",
            pauses.len() + 1,
            sampling.first
        ));
        let vm = BenchVm::boot(by, kind.start(config.memory)?, config)?;
        let run = Run { vm: &vm, stop };
        vm.wait("touching its memory", stop, |_, vcpu| Ok(vcpu.resident))?;
        run.rest(REST)?;
        let usual = run.usual()?;
        let snapshot = vm.snapshot()?;
        match run.felt(&snapshot, &usual)? {
            Some(felt) => {
                pauses.record(snapshot.pause);
                stalls.record(felt.lost_most);
            }
            None if missed == MISSED => return Err(VmError::Missed),
            None => missed += 1,
        }
        drop(snapshot);
        vm.check()?;
    }
    let (pauses, stalls) = (pauses.summary(), stalls.summary());
    Ok(pauses.zip(stalls).map(|(pause_us, stall_us)| First {
        guests: sampling.first,
        pause_us,
        stall_us,
    }))
}

/// A vCPU without snapshots.
#[derive(Clone, Copy, Debug)]
struct Usual {
    lap: Duration,
    longest_gap: Duration,
}

/// What vCPUs felt of a snapshot.
#[derive(Clone, Copy, Debug, Default)]
struct Felt {
    lost_most: Duration,
    lost_all: Duration,
    longest_gap: Duration,
    touched: u64,
}

/// A guest that is being measured.
struct Run<'a> {
    vm: &'a BenchVm,
    stop: &'a AtomicBool,
}

impl Run<'_> {
    /// Waits for `laps` laps.
    fn rest(&self, laps: u64) -> Result<(), VmError> {
        self.wait_laps("a sweep", &self.vm.progress()?, laps)
    }

    /// Waits until every vCPU has done `laps` laps more than at `since`, the one it
    /// was in then being the first.
    fn wait_laps(
        &self,
        what: &'static str,
        since: &[VcpuProgress],
        laps: u64,
    ) -> Result<(), VmError> {
        self.vm.wait(what, self.stop, |vcpu, progress| {
            Ok(progress.laps >= since[vcpu].laps + laps)
        })
    }

    fn time(&self, ticks: u64) -> Duration {
        ticks_to_time(ticks, self.vm.tsc_khz())
    }

    /// Watches the guest for a few laps, those it keeps at most.
    fn usual(&self) -> Result<Vec<Usual>, VmError> {
        let since = self.vm.progress()?;
        self.pause_until(Instant::now() + USUAL_TIME)?;
        self.wait_laps("a few sweeps", &since, USUAL)?;
        (0..since.len())
            .map(|vcpu| {
                // The first of them had begun before.
                let laps = self.vm.laps(vcpu, since[vcpu].laps + 1..u64::MAX)?;
                let times = laps.iter().map(|lap| (lap.end - lap.start) as f64);
                let lap = self.time(median(times.collect()).unwrap_or_default() as u64);
                let longest_gap = laps.iter().map(|lap| lap.longest_gap).max();
                Ok(Usual {
                    lap,
                    longest_gap: self.time(longest_gap.unwrap_or_default()),
                })
            })
            .collect()
    }

    /// Waits for the laps that a snapshot is felt in, and says what the vCPUs felt of it. `None` if the host
    /// was too late to see one of them: it has other things to do too.
    fn felt(
        &self,
        snapshot: &MeasuredSnapshot<'_>,
        usual: &[Usual],
    ) -> Result<Option<Felt>, VmError> {
        let what = "its first sweep after a snapshot";
        // Each vCPU's are kept as soon as they are there: another may take a thousand times as long.
        let MeasuredSnapshot { since, at, .. } = snapshot;
        let mut seen: Vec<Option<Vec<Lap>>> = vec![None; at.len()];
        self.vm.wait(what, self.stop, |vcpu, progress| {
            let laps = since[vcpu].laps..at[vcpu].laps + 2;
            if seen[vcpu].is_none() && progress.laps >= laps.end {
                seen[vcpu] = Some(self.vm.laps(vcpu, laps)?);
            }
            Ok(seen[vcpu].is_some())
        })?;
        let mut felt = Felt::default();
        for (vcpu, (at, usual)) in at.iter().zip(usual).enumerate() {
            let laps = seen[vcpu].as_deref().unwrap_or_default();
            let (Some(first), Some(last)) = (laps.first(), laps.last()) else {
                return Ok(None);
            };
            let count = at.laps + 2 - since[vcpu].laps;
            if laps.len() as u64 != count {
                return Ok(None);
            }
            let lost = self
                .time(last.end - first.start)
                .saturating_sub(count as u32 * usual.lap);
            let longest_gap = laps.iter().map(|lap| lap.longest_gap).max().unwrap_or(0);
            felt.lost_most = felt.lost_most.max(lost);
            felt.lost_all += lost;
            felt.longest_gap = felt.longest_gap.max(self.time(longest_gap));
            felt.touched += self.vm.orders()[vcpu].choice.distinct(at.ops, last.ops);
        }
        Ok(Some(felt))
    }

    /// How fast the guest writes with `rate` snapshots a second, `quiet` being its writes a second without.
    fn at_rate(&self, rate: f64, quiet: f64, sampling: &Sampling) -> Result<Rate, VmError> {
        let mut pauses = Times::default();
        let mut taken = 0;
        let begin = Instant::now();
        let end = begin + sampling.rate_time;
        let with = self.speed(|| {
            let mut due = begin;
            let mut last = None;
            while Instant::now() < end {
                // One lives at a time, whatever the technique could do.
                drop(last.take());
                let snapshot = self.vm.snapshot()?;
                pauses.record(snapshot.pause);
                taken += 1;
                last = Some(snapshot);
                // One that is late moves those after it: there are no two at once.
                due = (due + Duration::from_secs_f64(1.0 / rate)).max(Instant::now());
                self.pause_until(due.min(end))?;
            }
            Ok(())
        })?;
        Ok(Rate {
            asked: rate,
            taken: f64::from(taken) / begin.elapsed().as_secs_f64(),
            share: with / quiet,
            pause_us: pauses.summary().unwrap_or_default(),
        })
    }

    /// Writes a second while `work` runs.
    fn speed(&self, work: impl FnOnce() -> Result<(), VmError>) -> Result<f64, VmError> {
        let (begin, ops) = (Instant::now(), self.vm.ops()?);
        work()?;
        let ops = self.vm.ops()? - ops;
        Ok(ops as f64 / begin.elapsed().as_secs_f64())
    }

    fn pause_until(&self, end: Instant) -> Result<(), VmError> {
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(VmError::Interrupted);
            }
            self.vm.check()?;
            match end.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => thread::sleep(left.min(SLICE)),
                _ => return Ok(()),
            }
        }
    }
}

fn pss(others: impl IntoIterator<Item = i32>) -> Result<u64, VmError> {
    let pss = footprint::of_this_process_and(others);
    Ok(pss.map_err(|source| TechniqueError::Host {
        what: "tell how much memory processes have",
        source,
    })?)
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The time that `ticks` of a clock of `khz` take. None, if the clock's frequency is not known.
fn ticks_to_time(ticks: u64, khz: u32) -> Duration {
    let nanos = (u128::from(ticks) * 1_000_000).checked_div(khz.into());
    Duration::from_nanos(nanos.unwrap_or_default() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_time() {
        assert_eq!(
            ticks_to_time(2_500_000, 2_500_000),
            Duration::from_millis(1)
        );
        assert_eq!(
            ticks_to_time(u64::MAX, 3_000_000).as_secs(),
            u64::MAX / 3_000_000_000
        );
        assert_eq!(ticks_to_time(1, 0), Duration::ZERO);
    }
}
