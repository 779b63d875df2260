//! Sets of small numbers: a bit for each.

/// A set of numbers below a bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BitSet(Vec<u64>);

impl BitSet {
    /// The empty set of numbers below `bound`.
    pub(super) fn new(bound: u64) -> Self {
        Self(vec![0; bound.div_ceil(64) as usize])
    }

    pub(super) fn get(&self, n: u64) -> bool {
        self.0[(n / 64) as usize] >> (n % 64) & 1 != 0
    }

    pub(super) fn set(&mut self, n: u64, value: bool) {
        self.set_run(n, 1, value);
    }

    pub(super) fn set_run(&mut self, first: u64, count: u64, value: bool) {
        for (word, mask) in words_of(first, count) {
            let word = &mut self.0[word];
            *word = if value { *word | mask } else { *word & !mask };
        }
    }

    /// How many of the `count` numbers from `first` on are in the set.
    pub(super) fn ones(&self, first: u64, count: u64) -> u64 {
        words_of(first, count)
            .map(|(word, mask)| u64::from((self.0[word] & mask).count_ones()))
            .sum()
    }

    /// How many are not.
    pub(super) fn zeros(&self, first: u64, count: u64) -> u64 {
        count - self.ones(first, count)
    }

    /// The numbers that are not in `other`, which has the same bound.
    pub(super) fn without(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| a & !b).collect())
    }

    /// The bits of 64 numbers.
    pub(super) fn word(&self, index: usize) -> u64 {
        self.0[index]
    }

    /// Its numbers, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> {
        numbers_of(self.0.iter().copied())
    }

    /// The numbers that are in both, in order.
    pub(super) fn iter_common(&self, other: &Self) -> impl Iterator<Item = u64> {
        numbers_of(self.0.iter().zip(&other.0).map(|(a, b)| a & b))
    }
}

/// The words that the bits of a run lie in, and which of their bits those are.
pub(super) fn words_of(first: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = first + count;
    let mut at = first;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let (word, bit) = (at / 64, at % 64);
            let bits = (64 - bit).min(end - at);
            at += bits;
            (word as usize, u64::MAX >> (64 - bits) << bit)
        })
    })
}

/// The numbers whose bits are set.
fn numbers_of(words: impl Iterator<Item = u64>) -> impl Iterator<Item = u64> {
    (0..)
        .step_by(64)
        .zip(words)
        .filter(|&(_, word)| word != 0)
        .flat_map(|(first, word)| (first..first + 64).filter(move |n| word >> (n - first) & 1 != 0))
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn runs_are_set_across_words_and_counted() {
        let mut set = BitSet::new(200);
        set.set_run(60, 70, true);
        set.set(100, false);
        assert_eq!(
            (set.ones(0, 200), set.zeros(60, 70), set.ones(60, 5)),
            (69, 1, 5)
        );
        assert!(set.get(60) && set.get(129) && !set.get(59) && !set.get(130) && !set.get(100));
        assert_eq!((set.word(0), set.word(3)), (0xf << 60, 0));
        assert!(set.iter().eq((60..130).filter(|&n| n != 100)));
        let mut other = BitSet::new(200);
        other.set_run(128, 72, true);
        assert!(set.iter_common(&other).eq(128..130));
        assert!(other.without(&set).iter().eq(130..200));
        assert_eq!(words_of(3, 0).count(), 0);
        assert!(words_of(63, 2).eq([(0, 1 << 63), (1, 1)]));
    }
}
