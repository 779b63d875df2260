//! Any bytes are a manifest that is written as it was read, or an error. The hash at the end is put right first, or
//! nothing would get past it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use palimpsest_store::{Hash, Manifest};

fuzz_target!(|bytes: &[u8]| {
    let _ = Manifest::decode(bytes);
    let hash = Hash::of(bytes);
    let sealed = [bytes, format!("  \"blake3\": \"{hash}\"\n}}\n").as_bytes()].concat();
    if let Ok((manifest, found)) = Manifest::decode(&sealed) {
        assert_eq!(found, hash);
        let (again, _) = manifest.encode().expect("what was read can be written");
        assert_eq!(Manifest::decode(&again).expect("and read again").0, manifest);
    }
});
