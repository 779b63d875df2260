//! Any bytes are parts that are written as they were read, or an error; and what they have of a vCPU is a state or
//! an error.

#![no_main]

use libfuzzer_sys::fuzz_target;
use palimpsest::kvm::VcpuState;
use palimpsest::saved::Saved;
use palimpsest_store::{decode_parts, encode_parts};

fuzz_target!(|bytes: &[u8]| {
    let Ok(parts) = decode_parts(bytes) else {
        return;
    };
    assert_eq!(encode_parts(&parts).expect("what was read can be written"), bytes);
    for part in parts {
        if let Ok(state) = VcpuState::of_saved(&Saved::stored(part.version, part.bytes)) {
            // What oracles and reports look at.
            let _ = (state.to_string(), state.mm7(), state.tsc(), state.set_by_boot(&state));
        }
    }
});
