//! Any bytes are an index that is written as it was read, or an error.

#![no_main]

use libfuzzer_sys::fuzz_target;
use palimpsest_store::ChunkIndex;

fuzz_target!(|bytes: &[u8]| {
    // Of the memory that it says it is of.
    let says = bytes.get(24..32).and_then(|word| word.try_into().ok());
    let memory = says.map_or(0, u64::from_le_bytes);
    if let Ok(index) = ChunkIndex::decode(bytes, memory) {
        assert_eq!(index.encode(), bytes);
        for (region, hash) in index.iter() {
            assert!(index.region_bytes(region) > 0);
            assert_eq!(index.get(region), Some(hash));
        }
    }
});
