//! A short run of what `tests/fuzz` does for long: the seeds of its corpus, and those changed at random. Whatever comes
//! of it is a value that is written as it was read, or an error.

use std::path::PathBuf;

use crate::hash::Hash;
use crate::index::ChunkIndex;
use crate::manifest::Manifest;
use crate::parts::{decode_parts, encode_parts};

/// Changes of each seed.
const TIMES: u64 = 3_000;

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(&corpus).unwrap();
    let seeds: Vec<_> = files
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect();
    assert!(!seeds.is_empty(), "{}", corpus.display());
    seeds
}

/// Calls `look` with each seed of `target`, and with changes of it.
fn each(target: &str, mut look: impl FnMut(&[u8])) {
    let mut random = 7_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below.max(1) as u64) as usize
    };
    const WORDS: [u64; 6] = [0, 1, 0x7fff_ffff, 0xffff_ffff, 1 << 46, u64::MAX];
    for seed in seeds(target) {
        look(&seed);
        for _ in 0..TIMES {
            let mut bytes = seed.clone();
            for _ in 0..=next(4) {
                let at = next(bytes.len());
                match next(6) {
                    0 => bytes.truncate(at),
                    1 => bytes.insert(at, next(256) as u8),
                    2 => drop(bytes.drain(at..(at + next(16)).min(bytes.len()))),
                    3 if at + 8 <= bytes.len() => {
                        bytes[at..at + 8].copy_from_slice(&WORDS[next(WORDS.len())].to_le_bytes());
                    }
                    4 => {
                        let more = bytes[at..(at + next(64)).min(bytes.len())].to_vec();
                        bytes.extend(more);
                    }
                    _ if at < bytes.len() => bytes[at] ^= 1 << next(8),
                    _ => {}
                }
                if bytes.is_empty() {
                    break;
                }
            }
            look(&bytes);
        }
    }
}

#[test]
fn manifests() {
    let mut read = 0;
    each("manifest", |bytes| {
        let _ = Manifest::decode(bytes);
        let hash = Hash::of(bytes);
        let sealed = [bytes, format!("  \"blake3\": \"{hash}\"\n}}\n").as_bytes()].concat();
        if let Ok((manifest, found)) = Manifest::decode(&sealed) {
            read += 1;
            assert_eq!(found, hash);
            let (again, _) = manifest.encode().unwrap();
            assert_eq!(Manifest::decode(&again).unwrap().0, manifest);
        }
    });
    assert!(read > 10, "{read}: nothing gets past the hash");
}

#[test]
fn indices() {
    let mut read = 0;
    each("index", |bytes| {
        let memory = bytes.get(24..32).and_then(|word| word.try_into().ok());
        let memory = memory.map_or(0, u64::from_le_bytes);
        if let Ok(index) = ChunkIndex::decode(bytes, memory) {
            read += 1;
            assert_eq!(index.encode(), bytes);
            for (region, hash) in index.iter() {
                assert!(index.region_bytes(region) > 0);
                assert_eq!(index.get(region), Some(hash));
            }
        }
    });
    assert!(read > 10, "{read}");
}

#[test]
fn states() {
    let mut read = 0;
    each("state", |bytes| {
        if let Ok(parts) = decode_parts(bytes) {
            read += 1;
            assert_eq!(encode_parts(&parts).unwrap(), bytes);
        }
    });
    assert!(read > 10, "{read}");
}
