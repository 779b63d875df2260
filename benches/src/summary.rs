//! Percentiles of times.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Times as they come in. All are kept: there are hundreds at most.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<Duration>);

/// Times in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many there were.
    pub count: u64,
    /// Half of them were no longer.
    pub p50: f64,
    /// 99 of 100 were no longer: with fewer than 100 of them, the longest.
    pub p99: f64,
    /// None was longer.
    pub max: f64,
}

impl Times {
    /// None yet.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// One more.
    pub fn record(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// How many.
    pub fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What they were. `None` if there were none.
    pub fn summary(&self) -> Option<Summary> {
        let mut times = self.0.clone();
        times.sort_unstable();
        // The smallest time that as many of a hundred do not exceed.
        let percentile = |of_100: usize| {
            let rank = (times.len() * of_100).div_ceil(100);
            times.get(rank.saturating_sub(1)).map(micros)
        };
        Some(Summary {
            count: times.len() as u64,
            p50: percentile(50)?,
            p99: percentile(99)?,
            max: percentile(100)?,
        })
    }
}

fn micros(time: &Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

/// The middle one, or the mean of the middle two. `None` if there are none.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 0 => Some((values[middle - 1] + values[middle]) / 2.0),
        _ => Some(values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(micros: impl IntoIterator<Item = u64>) -> Option<Summary> {
        let mut times = Times::default();
        for micros in micros {
            times.record(Duration::from_micros(micros));
        }
        times.summary()
    }

    fn summary(count: u64, p50: f64, p99: f64, max: f64) -> Option<Summary> {
        Some(Summary {
            count,
            p50,
            p99,
            max,
        })
    }

    #[test]
    fn percentiles_are_those_of_the_times() {
        assert_eq!(of([]), None);
        assert_eq!(of((1..=1000).rev()), summary(1000, 500.0, 990.0, 1000.0));
    }

    #[test]
    fn a_few_times_have_their_longest_as_p99() {
        assert_eq!(of([7]), summary(1, 7.0, 7.0, 7.0));
        assert_eq!(of([90, 10, 20]), summary(3, 20.0, 90.0, 90.0));
        assert_eq!(of([90, 10]), summary(2, 10.0, 90.0, 90.0));
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }
}
