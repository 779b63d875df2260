//! When what was learnt is put to the proof.

/// Once in so many forks.
const PROBE: u64 = 8;

/// Whether it is time to look again at what is taken for granted.
pub(super) const fn is_probe(turn: u64) -> bool {
    turn.is_multiple_of(PROBE)
}
