//! The words of a frame, as a device or a reader sees them.

use palimpsest::host::PhysMap;
use palimpsest::mm::Pfn;

/// The word at byte `offset` of a frame.
pub(super) fn load(physmap: &PhysMap, frame: Pfn, offset: usize) -> u64 {
    let mut word = [0u64];
    physmap.slice(frame, offset as u64, 8).copy_to(&mut word);
    word[0]
}

/// Writes the word at byte `offset` of a frame.
pub(super) fn store(physmap: &PhysMap, frame: Pfn, offset: usize, word: u64) {
    physmap.slice(frame, offset as u64, 8).copy_from(&[word]);
}
