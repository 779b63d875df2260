//! What memory is filled with: a formula that leaves nothing to be gained by zeros, equal chunks or
//! compression.

use guest::abi::REGION_SIZE;

/// What is in the region of 2 MiB that begins at `gpa`, of the memory that has this `seed`.
pub fn region(seed: u64, gpa: u64, to: &mut [u8]) {
    let mut state = seed.wrapping_mul(0xd134_2543_de82_ef95) ^ gpa;
    for word in to.as_chunks_mut::<8>().0 {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        *word = (mixed ^ (mixed >> 31)).to_le_bytes();
    }
}

/// Calls `write` with each region from `first` up to `end`, and what is in it.
///
/// # Errors
/// The first of `write`'s.
pub fn fill<E>(
    seed: u64,
    first: u64,
    end: u64,
    mut write: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut bytes = vec![0; REGION_SIZE as usize];
    (first..end)
        .step_by(REGION_SIZE as usize)
        .try_for_each(|gpa| {
            region(seed, gpa, &mut bytes);
            write(gpa, &bytes[..(end - gpa).min(REGION_SIZE) as usize])
        })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn no_word_is_there_twice() {
        let mut words = HashSet::new();
        let mut regions = Vec::new();
        let filled = fill(1, REGION_SIZE, 2 * REGION_SIZE + 4096, |gpa, bytes| {
            regions.push((gpa, bytes.len() as u64));
            words.extend(bytes.as_chunks::<8>().0.iter().copied());
            Ok::<_, Infallible>(())
        });
        assert_eq!(filled, Ok(()));
        assert_eq!(
            regions,
            [(REGION_SIZE, REGION_SIZE), (2 * REGION_SIZE, 4096)]
        );
        assert_eq!(words.len() as u64, (REGION_SIZE + 4096) / 8);
    }
}
