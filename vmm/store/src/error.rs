//! What goes wrong with a store. Each says which file, and where in it.

use std::io;
use std::path::{Path, PathBuf};

use crate::index::IndexError;
use crate::manifest::ManifestError;
use crate::name::{NameError, SnapshotName};
use crate::objects::is_called_off;
use crate::parts::PartsError;

/// Why something could not be done with a store. Nothing is there under its final name that is not whole.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Bytes of a file could not be read or written.
    #[error("cannot {what} {} at byte {offset}", path.display())]
    Bytes {
        /// What was to be done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// A file or directory could not be made, opened, named, looked at or made durable.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was to be done.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{} is damaged at byte {offset}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it: the first byte of what is wrong.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// A manifest is of a version that is not known here, or makes no sense.
    #[error("{} cannot be read", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ManifestError,
    },
    /// An index of chunks makes no sense.
    #[error("{} makes no sense", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// Why.
        source: IndexError,
    },
    /// The parts of a machine make no sense.
    #[error("{} makes no sense", path.display())]
    Parts {
        /// The file.
        path: PathBuf,
        /// Why.
        source: PartsError,
    },
    /// A chunk is not there.
    #[error("chunk {} is not there: region {region} of `{snapshot}` is in it", path.display())]
    NoChunk {
        /// Where it should be.
        path: PathBuf,
        /// Number of the region of 2 MiB.
        region: u64,
        /// The snapshot.
        snapshot: SnapshotName,
    },
    /// A path is no store.
    #[error("{} is no snapshot store: {why}", path.display())]
    NoStore {
        /// The path.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A store would be in another one, which takes away what is not its own.
    #[error(
        "{} cannot be a store: it is in the store {}, where it would be taken away; save as {}/NAME",
        path.display(), outer.display(), outer.display()
    )]
    Nested {
        /// Where it would be.
        path: PathBuf,
        /// The store around it.
        outer: PathBuf,
    },
    /// There is no such snapshot.
    #[error("{} has no snapshot `{name}`", store.display())]
    NoSnapshot {
        /// The store.
        store: PathBuf,
        /// The name.
        name: SnapshotName,
    },
    /// There is such a snapshot.
    #[error("{} has a snapshot `{name}` already: choose another name, or drop that one first", store.display())]
    Exists {
        /// The store.
        store: PathBuf,
        /// The name.
        name: SnapshotName,
    },
    /// Something is there by that name, and is no snapshot.
    #[error(
        "{} is no snapshot, as it has no snapshot.json: choose another name, or move it away if it is nobody's",
        path.display()
    )]
    InTheWay {
        /// What is there.
        path: PathBuf,
    },
    /// A folder of a store is a link, to somewhere that may be anybody's.
    #[error("{} is a link, and nothing in a store is: put there what it leads to", path.display())]
    Link {
        /// The link.
        path: PathBuf,
    },
    /// Something is no name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A path has a name only, and no store.
    #[error("`{name}` says no store: say STORE/{name}, or ./{name} if this directory is the store")]
    NoPlace {
        /// The name.
        name: SnapshotName,
    },
    /// What is to be saved is not of the format.
    #[error("cannot save that: {what}")]
    NotOfFormat {
        /// What is wrong with it.
        what: String,
    },
    /// Others use the store.
    #[error("{} is in use: a save or a load goes on there", path.display())]
    Busy {
        /// The store.
        path: PathBuf,
    },
    /// It is not known which chunks are wanted.
    #[error(
        "nothing was collected: `{snapshot}` cannot be read, so it is not known which chunks it names (repair \
         it, drop it by name, or move it away if it is no snapshot)"
    )]
    Unknown {
        /// The snapshot.
        snapshot: String,
        /// Why not.
        source: Box<StoreError>,
    },
    /// Whoever wanted it does not want it any more.
    #[error("it was called off")]
    CalledOff,
    /// The host has no more threads.
    #[error("cannot start a thread to copy chunks")]
    Threads {
        /// What the host said.
        source: io::Error,
    },
    /// Something is to be written in place in a store of objects.
    #[error("{} is an object store: save to a directory, and push the snapshot from there", store.display())]
    ReadOnly {
        /// The store.
        store: PathBuf,
    },
    /// Somebody else has begun to push a snapshot by that name.
    #[error(
        "another push to {}/{name} goes on, or did not end: let that one end (the same push again goes on with it), \
         choose another name, or drop this one first", store.display()
    )]
    Claimed {
        /// The store.
        store: PathBuf,
        /// The name.
        name: SnapshotName,
    },
    /// It is taken away at this moment.
    #[error(
        "{}/{name} is being dropped, or that did not end: drop it again, and then push it", store.display()
    )]
    BeingDropped {
        /// The store.
        store: PathBuf,
        /// The name.
        name: SnapshotName,
    },
    /// An object store does not do what two that write there at once need.
    #[error(
        "{} cannot be pushed to: whoever keeps it replaces an object that was to be put only if nothing is there \
         (If-None-Match), so two pushes of one name could both be told that they were first", store.display()
    )]
    Replaces {
        /// The store.
        store: PathBuf,
    },
    /// A store of objects is not collected.
    #[error(
        "nothing was collected in {}: an object store has no locks, so a push that goes on could lose the chunks it \
         has found there; drop snapshots by name, and to have the room of their chunks back, push what is wanted to \
         another place and delete this one", store.display()
    )]
    NotCollected {
        /// The store.
        store: PathBuf,
    },
}

/// What writing in place to a store of objects ends with.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("an object store is not written to in place")]
pub(crate) struct ReadOnly;

impl StoreError {
    /// The error of an operation on a file as a whole.
    pub(crate) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match is_called_off(&source) {
            true => Self::CalledOff,
            false => Self::File { what, path, source },
        }
    }

    /// Whether the host refused, and it may not the next time; and not that what is there is wrong.
    pub fn is_of_host(&self) -> bool {
        matches!(self, Self::Bytes { .. } | Self::File { .. })
    }
}
