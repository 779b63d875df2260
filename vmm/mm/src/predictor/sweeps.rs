//! Sweeps: regions that are broken whole one after the other.
//!
//! A region that is new to the predictor is broken by the page first, until that has cost as much as all of it
//! would have (`breaks.rs`). A guest that writes all of its memory pays for that in each region: after the
//! first fork, in a clone, and wherever it has not been for long. But what it does it does in a row, so a
//! region is *trusted* to be like the one beside it: it is broken whole at its first fault.
//!
//! A region that is broken whole says nothing any more: whether trust was right is not known before the next
//! one has proved itself. So a sweep is trusted with as many regions as it has had until then, no more. What is
//! copied in vain when it ends is at most as much as was copied in it before, and of a row of n regions log n
//! prove themselves.

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

    /// Region number `region` was broken whole: because of what it had cost, or else because of those beside
    /// it.
    pub(super) fn note(&mut self, region: usize, has_proved: bool) {
        let goes_on = |sweep: &Option<Sweep>| sweep.is_some_and(|sweep| sweep.is_beside(region));
        let at = self.0.iter().position(goes_on);
        let before = at.and_then(|at| self.0[at]);
        let now = match (before, has_proved) {
            (Some(sweep), true) => Sweep {
                last: region,
                proved: sweep.proved + sweep.trusted + 1,
                trusted: 0,
            },
            (Some(sweep), false) => Sweep {
                last: region,
                trusted: sweep.trusted + 1,
                ..sweep
            },
            (None, true) => Sweep {
                last: region,
                proved: 1,
                trusted: 0,
            },
            // Mappings ran short: it says nothing of the guest.
            (None, false) => return,
        };
        let end = at.unwrap_or(SWEEPS - 1);
        self.0[..=end].rotate_right(1);
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
            let has_proved = !sweeps.trust(region);
            if has_proved {
                proofs.push(region);
            }
            sweeps.note(region, has_proved);
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
            (first..first + 5).for_each(|region| sweeps.note(region, true));
            for region in first + 5..first + 10 {
                assert!(sweeps.trust(region));
                sweeps.note(region, false);
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
        sweeps.note(1, false);
        assert!(!sweeps.trust(2));
    }
}
