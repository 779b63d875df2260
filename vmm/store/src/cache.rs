//! Chunks of stores elsewhere, kept on this host: so that what was read once is read from here the next time.
//!
//! ```text
//!   CACHE/ab/abcd....     a chunk as it is, sparse; as in a store, so it can be mapped
//!   CACHE/tmp/...         what is being written
//! ```
//! A cache is never trusted and never needed. Each chunk is checked when it is read, and one that is not what its name
//! says is taken away and fetched again. What cannot be read, written or made room for is gone without, and
//! [told](Cache::trouble). Nothing is made durable: what the power takes is fetched again.
//!
//! Processes share it, without holding it. A chunk has its name when it is whole (`rename`). When there is too much,
//! whoever notices takes away what was used longest ago (`flock`: one at a time); who has such a file open reads on.
//! A process looks at how much there is whenever it has added a sixteenth of what there may be, so `n` processes are
//! together over it by `n` sixteenths at most.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use crate::chunk;
use crate::disk::{Disk, Host, Kind, Lock};
use crate::error::StoreError;
use crate::hash::Hash;
use crate::save::Compression;
use crate::store::{Store, TMP, fresh_suffix};

/// What is being written for longer than that has no writer any more.
const STALE: Duration = Duration::from_secs(3600);
/// The part of what there may be that is left when there was too much.
const LEFT: (u64, u64) = (7, 8);
/// How often it is looked at how much there is: whenever this part of what there may be was added.
const LOOKS: u64 = 16;

/// Chunks that are kept on this host. It may be used by several threads, and the same directory by several processes.
#[derive(Debug)]
pub struct Cache {
    /// Only for how files are read and written there: it is no store.
    place: Store,
    most_bytes: u64,
    /// Bytes that were added since it was looked at how much there is. Nothing is ordered by these numbers.
    added: AtomicU64,
    hits: AtomicU64,
    kept: AtomicU64,
    damaged: AtomicU64,
    /// What went wrong first. Nothing is written from then on: each further try would take its time, too.
    trouble: OnceLock<StoreError>,
    evicting: Mutex<()>,
}

/// What has become of a cache in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Chunks that were there and right.
    pub hits: u64,
    /// Chunks that were put there.
    pub kept: u64,
    /// Chunks that were there and damaged: they were fetched again.
    pub damaged: u64,
}

impl Cache {
    /// The cache in the directory `path`, which is made if it is not there, with `most_bytes` in it at most.
    ///
    /// # Errors
    /// If the directory cannot be made or looked into.
    pub fn open(path: &Path, most_bytes: u64) -> Result<Self, StoreError> {
        Self::open_on(path, most_bytes, Arc::new(Host))
    }

    pub(crate) fn open_on(
        path: &Path,
        most_bytes: u64,
        disk: Arc<dyn Disk>,
    ) -> Result<Self, StoreError> {
        let place = Store::at(path, disk);
        // Its parents too: nobody makes ~/.cache by hand.
        for part in parents(path) {
            let listed = place.disk().list(part);
            if listed.is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                place.make_dir(part)?;
            }
        }
        place.list(path)?;
        let cache = Self {
            place,
            most_bytes,
            added: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            trouble: OnceLock::new(),
            evicting: Mutex::new(()),
        };
        // Somebody may have had more room for it.
        cache.make_room();
        Ok(cache)
    }

    /// Where the user's caches are, by `XDG_CACHE_HOME` or `HOME`: a directory in there. `None` if neither says.
    pub fn default_path() -> Option<PathBuf> {
        let absolute = |name| {
            let path = PathBuf::from(std::env::var_os(name)?);
            path.is_absolute().then_some(path)
        };
        let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        Some(caches?.join("palimpsest").join("chunks"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.place.path()
    }

    /// What has become of it so far.
    pub fn counts(&self) -> CacheCounts {
        CacheCounts {
            hits: self.hits.load(Ordering::Relaxed),
            kept: self.kept.load(Ordering::Relaxed),
            damaged: self.damaged.load(Ordering::Relaxed),
        }
    }

    /// Why nothing more is kept in it, if that is so.
    pub fn trouble(&self) -> Option<&StoreError> {
        self.trouble.get()
    }

    /// Reads the chunk `hash` into `to`, if it is there and right. Nothing in `to` is to be used otherwise.
    pub(crate) fn read(&self, hash: Hash, to: &mut [u8]) -> bool {
        let path = self.path_of(hash);
        // Where there is none it need not be looked at.
        let Ok(file) = self.place.disk().open(&path) else {
            return false;
        };
        let is_long = file.len().is_ok_and(|len| len == to.len() as u64);
        let is_right = is_long
            && crate::disk::read_all(&*file, to).is_ok_and(|read| read == to.len())
            && Hash::of(to) == hash;
        if is_right {
            // So that it is not among the oldest. If it does not go it is one of them.
            let _ = self.place.disk().touch(&path);
            self.hits.fetch_add(1, Ordering::Relaxed);
        } else {
            let _ = self.place.disk().remove_file(&path);
            self.damaged.fetch_add(1, Ordering::Relaxed);
        }
        is_right
    }

    /// Keeps the chunk `hash`, which is `content`.
    pub(crate) fn keep(&self, hash: Hash, content: &[u8]) {
        let bytes = content.len() as u64;
        if bytes > self.most_bytes || self.trouble.get().is_some() {
            return;
        }
        match self.write(hash, content) {
            Ok(written) => {
                self.kept.fetch_add(1, Ordering::Relaxed);
                let added = self.added.fetch_add(written, Ordering::Relaxed) + written;
                if added > self.most_bytes / LOOKS {
                    self.make_room();
                }
            }
            // The first is told.
            Err(error) => drop(self.trouble.set(error)),
        }
    }

    fn write(&self, hash: Hash, content: &[u8]) -> Result<u64, StoreError> {
        let (path, tmp) = (self.path_of(hash), self.path().join(TMP));
        self.place.make_dir(&tmp)?;
        let fresh = tmp.join(format!("{hash}.{}", fresh_suffix()));
        let written = chunk::write(&self.place, &fresh, content, Compression::None);
        let named = written.and_then(|(_, written)| {
            if let Some(folder) = path.parent() {
                self.place.make_dir(folder)?;
            }
            let named = self.place.disk().rename(&fresh, &path);
            named.map_err(StoreError::file("name", &path))?;
            Ok(written)
        });
        if named.is_err() {
            let _ = self.place.disk().remove_file(&fresh);
        }
        named
    }

    fn path_of(&self, hash: Hash) -> PathBuf {
        let folder = format!("{:02x}", hash.folder());
        self.path().join(folder).join(hash.to_string())
    }

    /// Takes away what was used longest ago, if there is too much. What cannot be looked at or taken away stays.
    fn make_room(&self) {
        let Ok(_one_of_this_process) = self.evicting.try_lock() else {
            return;
        };
        self.added.store(0, Ordering::Relaxed);
        // Another process is at it, or it cannot be done here.
        let Ok(Some(_held)) = self.place.disk().lock(self.path(), Lock::Exclusive) else {
            return;
        };
        let mut chunks = self.chunks();
        let bytes: u64 = chunks.iter().map(|chunk| chunk.bytes).sum();
        let Some(mut too_many) = bytes.checked_sub(self.most_bytes) else {
            return;
        };
        too_many += self.most_bytes - self.most_bytes / LEFT.1 * LEFT.0;
        chunks.sort_unstable_by(|a, b| (a.touched, &a.path).cmp(&(b.touched, &b.path)));
        for chunk in chunks {
            if too_many == 0 {
                break;
            }
            if self.place.disk().remove_file(&chunk.path).is_ok() {
                too_many = too_many.saturating_sub(chunk.bytes);
            }
        }
    }

    /// The chunks that there are. What was being written by who is no more goes. What else is there is nobody's.
    fn chunks(&self) -> Vec<Found> {
        let disk = self.place.disk();
        let mut chunks = Vec::new();
        for (folder, kind) in self.place.list_if_there(self.path()).unwrap_or_default() {
            if kind != Kind::Directory || !(folder.len() == 2 || folder == TMP) {
                continue;
            }
            let place = self.path().join(&folder);
            for (name, kind) in self.place.list_if_there(&place).unwrap_or_default() {
                let path = place.join(&name);
                let (Kind::File, Ok(touched)) = (kind, disk.touched(&path)) else {
                    continue;
                };
                let is_written = folder == TMP;
                let is_stale = || touched.elapsed().is_ok_and(|age| age > STALE);
                if is_written && is_stale() {
                    let _ = disk.remove_file(&path);
                }
                let hash: Option<Hash> = name.parse().ok();
                if !is_written && hash.is_some_and(|hash| self.path_of(hash) == path) {
                    let bytes = disk.allocated(&path).unwrap_or(0);
                    chunks.push(Found {
                        path,
                        bytes,
                        touched,
                    });
                }
            }
        }
        chunks
    }
}

/// A chunk in a cache.
#[derive(Debug)]
struct Found {
    path: PathBuf,
    bytes: u64,
    touched: SystemTime,
}

/// The directories that `path` is in, and itself, from the outermost on.
fn parents(path: &Path) -> impl Iterator<Item = &Path> {
    let parts: Vec<_> = path
        .ancestors()
        .filter(|part| *part != Path::new(""))
        .collect();
    parts.into_iter().rev()
}
