//! What the oracles need to know of a guest, as it is saved.

use guest::abi::{Generation, PAGE_SIZE};
use palimpsest::kept::store::{Kept, Part};
use palimpsest::kvm::{StateError, VcpuState};
use palimpsest::saved::{Saved, State};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::check::{Boot, Reference};
use crate::incarnation::{Drawn, Incarnation, Origin};
use crate::session::config::Config;

/// Parts of the program: registers as booting has set them, by vCPU, and pages that nobody writes.
const BOOT: &str = "boot";
const REFERENCE: &str = "reference";
const REFERENCE_VERSION: u32 = 1;

/// What is in a manifest for the program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Facts {
    /// The ABI of its guest (`guest::abi::ABI_VERSION`).
    pub(super) abi: u32,
    /// What the run was asked to do.
    pub(super) config: Config,
    /// Where the guest's program ends: memory is laid out behind it.
    pub(super) image_end: u64,
    /// Whether the guest follows the formula. The registers that booting has set are there then.
    pub(super) follows_formula: bool,
    /// The incarnation that the guest was in.
    pub(super) incarnation: SavedIncarnation,
}

/// An [`Incarnation`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedIncarnation {
    number: u64,
    generation: SavedGeneration,
    origin: Option<SavedOrigin>,
}

/// A [`Generation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedGeneration {
    counter: u64,
    id: [u64; 2],
    seed: [u64; 4],
}

/// An [`Origin`]: what an incarnation draws follows from what had been drawn when it began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedOrigin {
    incarnation: u64,
    generation: SavedGeneration,
    /// Count and digest, by vCPU.
    drawn: Vec<[u64; 2]>,
}

impl From<Generation> for SavedGeneration {
    fn from(generation: Generation) -> Self {
        let Generation { counter, id, seed } = generation;
        Self { counter, id, seed }
    }
}

impl From<SavedGeneration> for Generation {
    fn from(saved: SavedGeneration) -> Self {
        let SavedGeneration { counter, id, seed } = saved;
        Self { counter, id, seed }
    }
}

impl From<&Incarnation> for SavedIncarnation {
    fn from(incarnation: &Incarnation) -> Self {
        let origin = incarnation.origin.as_ref().map(|origin| SavedOrigin {
            incarnation: origin.incarnation,
            generation: origin.generation.into(),
            drawn: origin.drawn.iter().map(|d| [d.count, d.digest]).collect(),
        });
        Self {
            number: incarnation.number,
            generation: incarnation.generation.into(),
            origin,
        }
    }
}

impl From<SavedIncarnation> for Incarnation {
    fn from(saved: SavedIncarnation) -> Self {
        let drawn = |[count, digest]: [u64; 2]| Drawn { count, digest };
        Self {
            number: saved.number,
            generation: saved.generation.into(),
            origin: saved.origin.map(|origin| Origin {
                incarnation: origin.incarnation,
                generation: origin.generation.into(),
                drawn: origin.drawn.into_iter().map(drawn).collect(),
            }),
        }
    }
}

impl Facts {
    /// As a manifest has it.
    pub(super) fn to_json(&self) -> Result<Map<String, Value>, serde_json::Error> {
        serde_json::from_value(serde_json::to_value(self)?)
    }

    /// Of a manifest.
    pub(super) fn of_json(json: &Map<String, Value>) -> Result<Self, serde_json::Error> {
        serde_json::from_value(Value::Object(json.clone()))
    }
}

/// The parts of the program.
pub(super) fn parts(boot: Option<&Boot>, reference: &Reference) -> Vec<Part> {
    let registers = boot.into_iter().flat_map(Boot::registers).enumerate();
    let registers = registers.map(|(vcpu, state)| Part {
        name: format!("{BOOT}/{vcpu}"),
        version: state.version(),
        bytes: state.to_bytes(),
    });
    let pages = reference.pages();
    let bytes = pages.iter().flat_map(|(gfn, hash)| [gfn, hash]);
    let reference = Part {
        name: REFERENCE.to_owned(),
        version: REFERENCE_VERSION,
        bytes: bytes.flat_map(|word| word.to_le_bytes()).collect(),
    };
    registers.chain([reference]).collect()
}

/// The registers that booting has set, of each of `vcpus` vCPUs. `None` if one is not there.
pub(super) fn registers(kept: &Kept, vcpus: u64) -> Result<Option<Vec<VcpuState>>, StateError> {
    let states = (0..vcpus).map(|vcpu| {
        let part = kept.part(&format!("{BOOT}/{vcpu}"));
        part.map(|part| VcpuState::of_saved(&Saved::stored(part.version, part.bytes.clone())))
    });
    let states: Option<Vec<_>> = states.collect();
    states
        .map(|states| states.into_iter().collect())
        .transpose()
}

/// The pages that nobody writes. `None` if what was saved is none.
pub(super) fn reference(kept: &Kept) -> Option<Reference> {
    let part = kept.part(REFERENCE)?;
    let (words, []) = part.bytes.as_chunks::<8>() else {
        return None;
    };
    let (pages, []) = words.as_chunks::<2>() else {
        return None;
    };
    let pages = pages.iter().map(|page| page.map(u64::from_le_bytes));
    // There is always some: a guest has page tables.
    let all = kept.index().memory_bytes() / PAGE_SIZE;
    let is_known = part.version == REFERENCE_VERSION
        && pages.len() > 0
        && pages.clone().all(|[gfn, _]| gfn < all);
    is_known.then(|| Reference::of_pages(pages.map(|[gfn, hash]| (gfn, hash))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::config::tests::example;

    #[test]
    fn facts_survive_a_manifest() {
        let incarnation = Incarnation {
            number: 7,
            generation: Generation {
                counter: 3,
                id: [u64::MAX, 1],
                seed: [2, 3, 4, u64::MAX],
            },
            origin: Some(Origin {
                incarnation: 6,
                generation: Generation {
                    counter: 2,
                    ..Generation::default()
                },
                drawn: vec![Drawn {
                    count: 9,
                    digest: u64::MAX,
                }],
            }),
        };
        let facts = Facts {
            abi: 1,
            config: example(),
            image_end: 1 << 20,
            follows_formula: true,
            incarnation: (&incarnation).into(),
        };
        let json = facts.to_json().unwrap();
        let back = Facts::of_json(&json).unwrap();
        assert_eq!(back, facts);
        assert_eq!(Incarnation::from(back.incarnation), incarnation);
        let mut other = json;
        other.insert("more".to_owned(), Value::Null);
        assert!(Facts::of_json(&other).is_err());
    }
}
