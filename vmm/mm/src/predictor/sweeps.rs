//! Sweeps: regions that are broken whole one after the other.
//!
//! A region that is new to the predictor is broken by the page first, until that has cost as much as all of it
//! would have (`breaks.rs`). A guest that writes all of its memory pays for that in each region: after the
//! first fork, in a clone, and wherever it has not been for long. But what it does it does in a row, so a
//! region is *trusted* to be like the one beside it: it is broken whole at its first fault.
//!
//! A region that is broken whole says nothing any more: whether trust was right is not known before the next
//! one has proved itself, by what it has cost; that it was whole the last times is no proof. So a sweep is
//! trusted with as many regions as it has had until then, no more. What is copied in vain when it ends is at
//! most as much as was copied in it before, and of a row of n regions log n prove themselves.

/// Sweeps that go on at a time: one for each vCPU, of not too many.
const SWEEPS: usize = 8;

/// The sweeps of one address space, those that went on last first.
#[derive(Clone, Debug, Default)]
pub(super) struct Sweeps([Option<Sweep>; SWEEPS]);

#[derive(Clone, Copy, Debug)]
struct Sweep {
    /// The last region.
    last: usize,
    /// Regions up to the last one that came to be broken whole by what it had cost.
    proved: u32,
    /// Regions since then, which were trusted.
    trusted: u32,
}

impl Sweep {
    fn is_beside(&self, region: usize) -> bool {
        self.last.abs_diff(region) == 1
    }
}

impl Sweeps {
    /// Whether region number `region` is to be broken whole because of those beside it.
    pub(super) fn trust(&self, region: usize) -> bool {
        let mut sweeps = self.0.iter().flatten();
        sweeps.any(|sweep| sweep.is_beside(region) && sweep.trusted < sweep.proved)
    }

    /// Region number `region` was broken whole because of what it had cost.
    pub(super) fn note_proof(&mut self, region: usize) {
        let at = self.beside(region);
        let before = at.and_then(|at| self.0[at]);
        let proved = before.map_or(0, |sweep| sweep.proved + sweep.trusted);
        let now = Sweep {
            last: region,
            proved: proved + 1,
            trusted: 0,
        };
        self.go_on(at.unwrap_or(SWEEPS - 1), now);
    }

    /// Region number `region` was broken whole, and not because of anything that is known of it. Says whether it
    /// was because of those beside it.
    pub(super) fn note_trust(&mut self, region: usize) -> bool {
        let Some((at, sweep)) = self.beside(region).and_then(|at| Some((at, self.0[at]?))) else {
            return false;
        };
        let now = Sweep {
            last: region,
            trusted: sweep.trusted + 1,
            ..sweep
        };
        self.go_on(at, now);
        true
    }

    /// Which sweep ended beside a region, last.
    fn beside(&self, region: usize) -> Option<usize> {
        let is_beside = |sweep: &Option<Sweep>| sweep.is_some_and(|sweep| sweep.is_beside(region));
        self.0.iter().position(is_beside)
    }

    /// Sweep number `at` is `now`, and the one that went on last.
    fn go_on(&mut self, at: usize, now: Sweep) {
        self.0[..=at].rotate_right(1);
        self.0[0] = Some(now);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Which of `regions` prove themselves.
    fn proofs(sweeps: &mut Sweeps, regions: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let mut proofs = Vec::new();
        for region in regions {
            if sweeps.trust(region) {
                assert!(sweeps.note_trust(region));
            } else {
                proofs.push(region);
                sweeps.note_proof(region);
            }
        }
        proofs
    }

    #[test]
    fn few_of_a_row_prove_themselves_forwards_and_backwards() {
        let proved = proofs(&mut Sweeps::default(), 0..128);
        assert_eq!(proved, [0, 2, 6, 14, 30, 62, 126]);
        let proved = proofs(&mut Sweeps::default(), (0..128).rev());
        assert_eq!(proved, [127, 125, 121, 113, 97, 65, 1]);
    }

    #[test]
    fn as_many_are_trusted_as_have_proved_themselves_and_no_more() {
        let mut sweeps = Sweeps::default();
        for first in [0, 100, 200] {
            (first..first + 5).for_each(|region| sweeps.note_proof(region));
            for region in first + 5..first + 10 {
                assert!(sweeps.trust(region));
                assert!(sweeps.note_trust(region));
            }
            assert!(!sweeps.trust(first + 10), "it has to prove itself");
        }
    }

    #[test]
    fn regions_far_from_each_other_prove_themselves() {
        let apart = || (0..100).map(|n| 2 * n);
        assert_eq!(
            proofs(&mut Sweeps::default(), apart()),
            Vec::from_iter(apart())
        );
    }

    #[test]
    fn as_many_sweeps_go_on_as_there_is_room_for() {
        let by_turns = |sweeps: usize| {
            let row = move |n| (0..sweeps).map(move |sweep| 1000 * sweep + n);
            proofs(&mut Sweeps::default(), (0..16).flat_map(row)).len()
        };
        assert_eq!(by_turns(SWEEPS), 4 * SWEEPS);
        assert_eq!(by_turns(SWEEPS + 1), 16 * (SWEEPS + 1));
    }

    #[test]
    fn whole_breaks_for_want_of_mappings_begin_no_sweep() {
        let mut sweeps = Sweeps::default();
        assert!(!sweeps.note_trust(1));
        assert!(!sweeps.trust(2));
    }
}
