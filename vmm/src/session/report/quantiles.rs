//! Quantiles of many times.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use palimpsest::snapshot::Steps;

/// Quantiles of a time, in microseconds with one decimal; `None`, and `null` in
/// JSON, if nothing was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// The median.
    pub p50: Option<f64>,
    /// What 99 of 100 do not exceed.
    pub p99: Option<f64>,
    /// The longest.
    pub max: Option<f64>,
}

impl Quantiles {
    /// Quantiles of a histogram of **nanoseconds**, such as [`nanoseconds`] makes.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        if histogram.is_empty() {
            return Self::default();
        }
        let micros = |nanos: u64| Some((nanos as f64 / 100.0).round() / 10.0);
        Self {
            p50: micros(histogram.value_at_quantile(0.5)),
            p99: micros(histogram.value_at_quantile(0.99)),
            max: micros(histogram.max()),
        }
    }
}

/// What the steps of snapshots took, in microseconds. All but the first are the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepQuantiles {
    /// What was done of a snapshot while the guest ran still.
    pub prepare: Quantiles,
    /// From the kick until all vCPUs stood still.
    pub park: Quantiles,
    /// Until devices did.
    pub devices: Quantiles,
    /// To fork memory.
    pub fork: Quantiles,
    /// To collect registers.
    pub registers: Quantiles,
    /// Until the last vCPU was about to run again.
    pub resume: Quantiles,
}

/// What the steps of many snapshots took.
#[derive(Debug)]
pub struct StepTimes([Histogram<u64>; 6]);

impl StepTimes {
    /// Of none.
    pub fn none() -> Self {
        Self(std::array::from_fn(|_| nanoseconds()))
    }

    /// Adds those of one.
    pub fn record(&mut self, steps: Steps) {
        let Steps {
            prepare,
            park,
            devices,
            memory,
            registers,
            resume,
        } = steps;
        let steps = [prepare, park, devices, memory, registers, resume];
        for (histogram, step) in self.0.iter_mut().zip(steps) {
            histogram.saturating_record(step.as_nanos() as u64);
        }
    }

    /// Their quantiles.
    pub fn quantiles(&self) -> StepQuantiles {
        let [prepare, park, devices, fork, registers, resume] =
            self.0.each_ref().map(Quantiles::of);
        StepQuantiles {
            prepare,
            park,
            devices,
            fork,
            registers,
            resume,
        }
    }
}

/// An empty histogram of nanoseconds up to an hour, three digits of each kept. Record with
/// [`Histogram::saturating_record`]; [`Quantiles::of`] reads it.
pub fn nanoseconds() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000_000, 3).expect("constant bounds are valid")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_step_has_its_own_quantiles() {
        let mut times = StepTimes::none();
        assert_eq!(times.quantiles(), StepQuantiles::default());
        times.record(Steps {
            prepare: Duration::from_micros(1),
            park: Duration::from_micros(2),
            devices: Duration::from_micros(3),
            memory: Duration::from_micros(4),
            registers: Duration::from_micros(5),
            resume: Duration::from_micros(6),
        });
        let of = times.quantiles();
        let steps = [
            of.prepare,
            of.park,
            of.devices,
            of.fork,
            of.registers,
            of.resume,
        ];
        assert_eq!(
            steps.map(|step| step.max),
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0].map(Some)
        );
    }

    #[test]
    fn quantiles_are_microseconds_with_one_decimal() {
        let mut histogram = nanoseconds();
        assert_eq!(Quantiles::of(&histogram), Quantiles::default());
        for _ in 0..98 {
            histogram.saturating_record(12_300);
        }
        histogram.saturating_record(50_000);
        histogram.saturating_record(2_000_000);
        let quantiles = Quantiles::of(&histogram);
        assert_eq!(quantiles.p50, Some(12.3));
        assert_eq!(quantiles.p99, Some(50.0));
        // A histogram rounds up to the end of its bucket, a thousandth at most.
        let max = quantiles.max.unwrap();
        assert!((2_000.0..2_002.0).contains(&max), "{max}");
    }
}
