//! A snapshot in a store, to begin with.

use std::sync::Arc;

use guest::abi::ABI_VERSION;
use palimpsest::kept::store::{Kept, SnapshotName, Store};

use super::facts::Facts;
use super::lazily::Loading;
use crate::accel::Accel;
use crate::incarnation::Incarnation;
use crate::session::config::{Config, Size};

/// A snapshot in a store. The store keeps what it names while this is there.
#[derive(Debug)]
pub struct Source {
    pub(super) kept: Arc<Kept>,
    pub(super) facts: Facts,
    /// How it is to be loaded.
    pub loading: Loading,
}

/// Why a snapshot cannot be begun with.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It was not saved by this program.
    #[error(
        "`{name}` was saved by another program ({creator}): this one does not know what to check of it"
    )]
    Foreign {
        /// The snapshot.
        name: SnapshotName,
        /// Who says to have saved it.
        creator: String,
        /// What is missing.
        source: serde_json::Error,
    },
    /// Its guest is of another ABI: where what is in its memory is not known here.
    #[error(
        "`{name}` is of a guest of ABI {found}, and this program knows ABI {ABI_VERSION}: run it with the one that \
         saved it ({creator})"
    )]
    Abi {
        /// The snapshot.
        name: SnapshotName,
        /// Its ABI.
        found: u32,
        /// Who says to have saved it.
        creator: String,
    },
    /// It contradicts itself.
    #[error("`{name}` says {said} of {what}, and is of {is}: it cannot be run")]
    Contradiction {
        /// The snapshot.
        name: SnapshotName,
        /// Of what.
        what: &'static str,
        /// What it says for the program.
        said: String,
        /// What the rest of it says.
        is: String,
    },
}

impl Source {
    /// A snapshot that was read, of this program's.
    ///
    /// # Errors
    /// If it is not of this program's.
    pub fn of(kept: Kept) -> Result<Self, SourceError> {
        let manifest = kept.manifest();
        let name = || kept.name().clone();
        let facts = Facts::of_json(&manifest.program).map_err(|source| SourceError::Foreign {
            name: name(),
            creator: manifest.creator.escape_debug().to_string(),
            source,
        })?;
        if facts.abi != ABI_VERSION {
            return Err(SourceError::Abi {
                name: name(),
                found: facts.abi,
                creator: manifest.creator.escape_debug().to_string(),
            });
        }
        let (config, machine) = (&facts.config, &manifest.machine);
        let contradiction = |what, said: String, is: String| SourceError::Contradiction {
            name: name(),
            what,
            said,
            is,
        };
        if config.memory != manifest.memory.bytes {
            let (said, is) = (Size(config.memory), Size(manifest.memory.bytes));
            return Err(contradiction("memory", said.to_string(), is.to_string()));
        }
        for (what, said, is) in [
            ("vcpus", config.vcpus, machine.vcpus),
            ("devices", config.dma_devices, machine.devices),
        ] {
            if said != u64::from(is) {
                return Err(contradiction(what, said.to_string(), is.to_string()));
            }
        }
        Ok(Self {
            kept: Arc::new(kept),
            facts,
            loading: Loading::default(),
        })
    }

    /// Its name.
    pub fn name(&self) -> &SnapshotName {
        self.kept.name()
    }

    /// The store that it is in.
    pub fn store(&self) -> &Store {
        self.kept.store()
    }

    /// What the run was asked to do that it is of, and what runs its vCPUs: what ran them then. It is not trusted:
    /// validate it.
    pub fn config(&self) -> Config {
        Config {
            accel: match self.kept.manifest().machine.accelerator.as_str() {
                "user" => Accel::User,
                _ => Accel::Kvm,
            },
            trust_guest: false,
            inject: None,
            track_dirty: None,
            ..self.facts.config.clone()
        }
    }

    /// Bytes of its chunks.
    pub fn bytes(&self) -> u64 {
        self.kept.index().len() * palimpsest::kept::store::CHUNK_BYTES
    }

    /// The incarnation that its guest was in.
    pub(super) fn incarnation(&self) -> Incarnation {
        self.facts.incarnation.clone().into()
    }
}
