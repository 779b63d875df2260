//! Quantiles of many times.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

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

/// An empty histogram of nanoseconds up to an hour, three digits of each kept. Record with
/// [`Histogram::saturating_record`]; [`Quantiles::of`] reads it.
pub fn nanoseconds() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000_000, 3).expect("constant bounds are valid")
}

#[cfg(test)]
mod tests {
    use super::*;

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
