//! `snapshot.json`: what a snapshot is, and the hashes of its other files.
//!
//! It is one JSON object, written for people to read. Its last member is the hash of all bytes before that
//! member, so that whatever is changed in it, or cut off, is found:
//!
//! ```text
//!   {\n  "format": "palimpsest snapshot",\n  "version": 1,\n ... },\n  "blake3": "<64 digits>"\n}\n
//!   |<------------------- these bytes have this hash ------------>|
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::chunk::CHUNK_BYTES;
use crate::hash::Hash;
use crate::index::{self, MAX_MEMORY_BYTES};
use crate::name::SnapshotName;
use crate::parts::MAX_STATE_BYTES;

/// The version of the format that is written here, and the only one that is read.
pub const VERSION: u32 = 1;

/// What `format` says.
const FORMAT: &str = "palimpsest snapshot";
/// The most bytes of a manifest.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 1 << 20;
/// What comes before the hash, and after it.
const SEAL: (&str, &str) = ("  \"blake3\": \"", "\"\n}\n");
/// Bytes of a base page.
const PAGE_BYTES: u64 = 4096;

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub(crate) format: String,
    pub(crate) version: u32,
    /// When it was saved: seconds since 1970, UTC.
    pub created_unix_s: u64,
    /// The program that saved it.
    pub creator: String,
    /// The snapshot that it was saved as an increment of. It is not needed for anything: this one is whole.
    pub parent: Option<Parent>,
    /// Memory.
    pub memory: MemoryFacts,
    /// The file `state`.
    pub state: FileFacts,
    /// The machine that it is of.
    pub machine: Machine,
    /// What the program that saved it wants to know again. The store does not look at it.
    pub program: Map<String, Value>,
}

/// A snapshot that another is an increment of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its name when this one was saved.
    pub name: SnapshotName,
    /// The `blake3` of its manifest.
    pub blake3: Hash,
}

/// A file beside the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileFacts {
    /// How long it is.
    pub bytes: u64,
    /// What its bytes hash to.
    pub blake3: Hash,
}

/// The memory of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryFacts {
    /// How much there is, zeros included: a multiple of 4096.
    pub bytes: u64,
    /// Bytes of a region, and so of a chunk: 2097152.
    pub chunk_bytes: u64,
    /// Regions that are not all zero.
    pub chunks: u64,
    /// The file `memory`.
    pub index: FileFacts,
}

/// The machine that a snapshot is of: what must be so where it is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Number of devices.
    pub devices: u32,
    /// What ran the vCPUs: `kvm` or `user`.
    pub accelerator: String,
    /// The same in more words, for people.
    pub platform: String,
    /// Ticks of the guest's time-stamp counter in a millisecond; 0 if that is not known.
    pub tsc_khz: u32,
    /// The CPU that the guest saw.
    pub cpu: Cpu,
    /// MSRs that were saved, by number.
    pub msrs: Vec<u32>,
}

/// A CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// CPUID's vendor: 12 letters.
    pub vendor: String,
    /// CPUID's name of it, for people.
    pub brand: String,
    /// Words of CPUID in which each bit is a feature: `LEAF.SUBLEAF.REGISTER`, all but the register in
    /// hexadecimal, and the word as `0x` and hexadecimal digits.
    pub features: BTreeMap<String, String>,
}

/// Why bytes are no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// There is no hash at its end.
    #[error("it does not end in its hash: it is cut off, or no manifest")]
    NoHash,
    /// The hash is another.
    #[error("its bytes have the hash {found}, and it says {expected}: it was changed")]
    Hash {
        /// What the bytes have.
        found: Hash,
        /// What the file says.
        expected: Hash,
    },
    /// It is another version of the format, or another format.
    #[error("it is version {found} of the format, and {VERSION} is what can be read here")]
    Version {
        /// What it says.
        found: u64,
    },
    /// It is not written as a manifest is.
    #[error("it is not written as a manifest")]
    Json(#[source] serde_json::Error),
    /// What it says cannot be.
    #[error("{what}")]
    Value {
        /// What.
        what: String,
    },
}

/// What decides whether the rest can be read.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
}

/// The whole of what is in the file.
#[derive(Deserialize)]
struct Sealed {
    #[serde(flatten)]
    manifest: Value,
    blake3: Hash,
}

impl Manifest {
    /// One of this version.
    pub(crate) fn new(memory: MemoryFacts, state: FileFacts, machine: Machine) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            created_unix_s: 0,
            creator: String::new(),
            parent: None,
            memory,
            state,
            machine,
            program: Map::new(),
        }
    }

    /// Its bytes, and its hash.
    ///
    /// # Errors
    /// If they are more than a manifest may have, or it would not be read again.
    pub fn encode(&self) -> Result<(Vec<u8>, Hash), ManifestError> {
        self.check()?;
        let text = serde_json::to_string_pretty(self).map_err(ManifestError::Json)?;
        let Some(open) = text.strip_suffix("\n}") else {
            return Err(ManifestError::NoHash);
        };
        let sealed = format!("{open},\n");
        let hash = Hash::of(sealed.as_bytes());
        let (before, after) = SEAL;
        let bytes = format!("{sealed}{before}{hash}{after}").into_bytes();
        match bytes.len() as u64 <= MAX_MANIFEST_BYTES {
            true => Ok((bytes, hash)),
            false => Err(value(format!(
                "it has more than {MAX_MANIFEST_BYTES} bytes"
            ))),
        }
    }

    /// What `bytes` say, and their hash.
    ///
    /// # Errors
    /// If they are no manifest of a version that is known here, or were changed.
    pub fn decode(bytes: &[u8]) -> Result<(Self, Hash), ManifestError> {
        if let Ok(head) = serde_json::from_slice::<Head>(bytes)
            && head.format == FORMAT
            && head.version != u64::from(VERSION)
        {
            return Err(ManifestError::Version {
                found: head.version,
            });
        }
        let (before, after) = SEAL;
        let seal = before.len() + Hash::DIGITS + after.len();
        let split = bytes.len().checked_sub(seal).ok_or(ManifestError::NoHash)?;
        let (sealed, seal) = bytes.split_at(split);
        let seal = str::from_utf8(seal).map_err(|_| ManifestError::NoHash)?;
        let hash = seal
            .strip_prefix(before)
            .and_then(|seal| seal.strip_suffix(after));
        let hash = hash.ok_or(ManifestError::NoHash)?;
        let expected: Hash = hash.parse().map_err(|_| ManifestError::NoHash)?;
        let found = Hash::of(sealed);
        if found != expected {
            return Err(ManifestError::Hash { found, expected });
        }
        let Sealed { manifest, blake3 } =
            serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        let manifest: Self = serde_json::from_value(manifest).map_err(ManifestError::Json)?;
        manifest.check()?;
        match blake3 == expected {
            true => Ok((manifest, expected)),
            false => Err(ManifestError::NoHash),
        }
    }

    fn check(&self) -> Result<(), ManifestError> {
        let memory = &self.memory;
        if self.format != FORMAT || self.version != VERSION {
            return Err(value(format!(
                "its format is `{}`",
                self.format.escape_debug()
            )));
        }
        if memory.chunk_bytes != CHUNK_BYTES {
            let chunk = memory.chunk_bytes;
            return Err(value(format!(
                "its chunks have {chunk} bytes, not {CHUNK_BYTES}"
            )));
        }
        let is_memory = (PAGE_BYTES..=MAX_MEMORY_BYTES).contains(&memory.bytes);
        if !is_memory || !memory.bytes.is_multiple_of(PAGE_BYTES) {
            return Err(value(format!("its memory has {} bytes", memory.bytes)));
        }
        if memory.chunks > memory.bytes.div_ceil(CHUNK_BYTES) {
            return Err(value(format!(
                "it has {} chunks, more than memory",
                memory.chunks
            )));
        }
        if memory.index.bytes != index::bytes_of(memory.chunks) {
            let (chunks, bytes) = (memory.chunks, memory.index.bytes);
            return Err(value(format!(
                "its index of {chunks} chunks has {bytes} bytes"
            )));
        }
        if self.state.bytes > MAX_STATE_BYTES {
            return Err(value(format!("its state has {} bytes", self.state.bytes)));
        }
        Ok(())
    }
}

fn value(what: String) -> ManifestError {
    ManifestError::Value { what }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Manifest {
        let empty = FileFacts {
            bytes: index::bytes_of(1),
            blake3: Hash::of(b"x"),
        };
        let memory = MemoryFacts {
            bytes: 4 << 20,
            chunk_bytes: CHUNK_BYTES,
            chunks: 1,
            index: empty,
        };
        let machine = Machine {
            vcpus: 2,
            ..Machine::default()
        };
        Manifest {
            created_unix_s: 17,
            creator: "test \"quoted\"".to_owned(),
            parent: Some(Parent {
                name: "before".parse().unwrap(),
                blake3: Hash::of(b"y"),
            }),
            program: [("seed".to_owned(), Value::from(u64::MAX))]
                .into_iter()
                .collect(),
            ..Manifest::new(memory, empty, machine)
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let manifest = example();
        let (bytes, hash) = manifest.encode().unwrap();
        assert_eq!(Manifest::decode(&bytes).unwrap(), (manifest, hash));
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_found() {
        let (bytes, _) = example().encode().unwrap();
        for at in 0..bytes.len() {
            for flip in [1, 0x20, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= flip;
                assert!(Manifest::decode(&changed).is_err(), "byte {at} ^ {flip:#x}");
            }
            assert!(Manifest::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(Manifest::decode(&[&bytes[..], b"\n"].concat()).is_err());
    }

    #[test]
    fn other_versions_are_named() {
        let (bytes, _) = example().encode().unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let newer = text.replace("\"version\": 1", "\"version\": 2");
        let error = Manifest::decode(newer.as_bytes()).unwrap_err();
        assert!(
            matches!(error, ManifestError::Version { found: 2 }),
            "{error}"
        );
    }

    /// With a hash that is right, too.
    #[test]
    fn what_cannot_be_is_refused() {
        let resealed = |change: &dyn Fn(&mut Manifest)| {
            let mut manifest = example();
            change(&mut manifest);
            manifest.encode().map(drop).unwrap_err().to_string()
        };
        for (change, says) in [
            (
                &(|m: &mut Manifest| m.memory.bytes = 0) as &dyn Fn(&mut Manifest),
                "memory has 0",
            ),
            (&|m| m.memory.bytes = 4097, "memory has 4097"),
            (&|m| m.memory.bytes = u64::MAX, "memory has"),
            (&|m| m.memory.chunk_bytes = 4096, "chunks have 4096"),
            (&|m| m.memory.chunks = 3, "3 chunks, more"),
            (&|m| m.memory.index.bytes += 1, "index of 1 chunks"),
            (&|m| m.state.bytes = u64::MAX, "state has"),
            (
                &|m| m.creator = "x".repeat(2 << 20),
                "more than 1048576 bytes",
            ),
        ] {
            let error = resealed(change);
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn members_that_nobody_knows_are_refused() {
        let (bytes, _) = example().encode().unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let end = text.rfind("  \"blake3\"").unwrap();
        let sealed = text[..end].replacen("{\n", "{\n  \"other\": 1,\n", 1);
        let hash = Hash::of(sealed.as_bytes());
        let text = format!("{sealed}{}{hash}{}", SEAL.0, SEAL.1);
        let error = Manifest::decode(text.as_bytes()).unwrap_err();
        assert!(matches!(error, ManifestError::Json(_)), "{error}");
    }
}
