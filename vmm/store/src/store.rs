//! A store: where things are in it, and who may use it meanwhile.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::cache::Cache;
use crate::chunk::CHUNKS;
use crate::disk::{self, Disk, File, Host, Kind, Lock, Locked};
use crate::error::StoreError;
use crate::name::SnapshotName;
use crate::objects::{Objects, is_called_off};
use crate::right::Right;
use crate::save::MANIFEST;

/// The file that says that a directory is a store.
pub(crate) const MARKER: &str = "store.json";
/// All that is in it.
pub(crate) const MARKER_TEXT: &str =
    "{\n  \"format\": \"palimpsest store\",\n  \"version\": 1\n}\n";
/// The folder of what is being written.
pub(crate) const TMP: &str = "tmp";
/// How long a save or a load waits for somebody who collects, which is short.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether a store can be had.
const LOOK: Duration = Duration::from_millis(5);

/// A store on disk. Clones are the same.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
    disk: Arc<dyn Disk>,
    right: Arc<Right>,
    /// What it is of, if it is of objects.
    objects: Option<Arc<dyn Objects>>,
    /// Where chunks are kept that were read.
    cache: Option<Arc<Cache>>,
    /// Whether the chunk that was found last was compressed. A guess for the next, and no more: nothing is ordered by it.
    were_compressed: Arc<AtomicBool>,
}

/// What a store is held for: nobody takes anything from it while somebody reads or writes there, in whichever
/// process. It ends with whoever has it, even if that is killed.
#[derive(Debug)]
pub struct Hold {
    _locked: Box<dyn Locked>,
}

/// The store and the name in it that `STORE/NAME` is.
///
/// # Errors
/// If there is no name at its end, or nothing else.
pub fn locate(path: &Path) -> Result<(PathBuf, SnapshotName), StoreError> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    // What has no name at its end is shown as it is.
    let name = name.unwrap_or_else(|| path.display().to_string());
    let name: SnapshotName = name.parse()?;
    match path.parent() {
        Some(store) if store != Path::new("") => Ok((store.to_owned(), name)),
        _ => Err(StoreError::NoPlace { name }),
    }
}

/// The directory that `path` is in.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

impl Store {
    /// The store at `path`.
    ///
    /// # Errors
    /// If there is none, or one of another version.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_on(path, Arc::new(Host))
    }

    /// Whether there is something at `path` that says it is a store, good or not.
    pub fn is_marked(path: &Path) -> bool {
        // What cannot be found out is found by who opens it.
        matches!(Host.len(&path.join(MARKER)), Ok(Some(_)))
    }

    /// The same, which is made if there is nothing at `path`, or an empty directory.
    ///
    /// # Errors
    /// If there is something else, or it is in another store, or it cannot be made.
    pub fn open_or_create(path: &Path) -> Result<Self, StoreError> {
        Self::open_or_create_on(path, Arc::new(Host))
    }

    /// What is at `path`, whatever that is.
    pub(crate) fn at(path: &Path, disk: Arc<dyn Disk>) -> Self {
        Self {
            path: path.to_owned(),
            disk,
            right: Arc::default(),
            objects: None,
            cache: None,
            were_compressed: Arc::default(),
        }
    }

    pub(crate) fn open_on(path: &Path, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        let store = Self::at(path, disk);
        let marker = store.path.join(MARKER);
        let text = match store.disk.open(&marker) {
            Ok(file) => store.read_file(&marker, &*file, 2 * MARKER_TEXT.len() as u64)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(store.none("it has no store.json"));
            }
            Err(error) => return Err(store.file("open", &marker)(error)),
        };
        match text == MARKER_TEXT.as_bytes() {
            true => Ok(store),
            false => {
                Err(store.none("its store.json is damaged, or of a version that is not known here"))
            }
        }
    }

    pub(crate) fn open_or_create_on(path: &Path, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        let store = Self::at(path, disk);
        store.is_in_no_other()?;
        let none = match Self::open_on(path, Arc::clone(&store.disk)) {
            Err(none @ StoreError::NoStore { .. }) => none,
            opened => return opened,
        };
        match store.disk.list(path) {
            // What a maker has left that was killed, or another is about to name.
            Ok(names)
                if names
                    .iter()
                    .all(|(name, _)| name.starts_with("store.json.")) => {}
            Ok(_) => return Err(none),
            Err(error) if error.kind() == io::ErrorKind::NotFound => store.make_dir(path)?,
            Err(error) => return Err(store.file("look into", path)(error)),
        }
        // Two that make it at once write the same.
        let fresh = path.join(format!("store.json.{}", fresh_suffix()));
        let made = store
            .write_durable(&fresh, MARKER_TEXT.as_bytes())
            .and_then(|()| {
                let marker = path.join(MARKER);
                let named = store.disk.rename(&fresh, &marker);
                named.map_err(store.file("name", &marker))
            });
        if let Err(error) = made {
            let _ = store.disk.remove_file(&fresh);
            return Err(error);
        }
        store.sync_dir(path)?;
        store.sync_dir(parent_of(path))?;
        Ok(store)
    }

    /// Refuses a place in another store: what is there is a snapshot to that one, or left over.
    fn is_in_no_other(&self) -> Result<(), StoreError> {
        // Of what is there, links and `..` resolved, or of where it would be made.
        let (there, is_made) = match self.disk.real(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = parent_of(&self.path);
                (self.disk.real(parent), false)
            }
            real => (real, true),
        };
        let there = there.map_err(self.file("look at", &self.path))?;
        for outer in there.ancestors().skip(usize::from(is_made)) {
            let marker = outer.join(MARKER);
            let found = self.disk.len(&marker);
            if found.map_err(self.file("look at", &marker))?.is_some() {
                return Err(StoreError::Nested {
                    path: self.path.clone(),
                    outer: outer.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Where it is: a directory, or the URL of a store of objects.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same, which is of `objects`.
    pub(crate) fn of_objects(self, objects: Arc<dyn Objects>) -> Self {
        Self {
            objects: Some(objects),
            ..self
        }
    }

    /// The same, whose chunks are looked for in `cache` first and kept there when they were read.
    pub fn with_cache(self, cache: Arc<Cache>) -> Self {
        Self {
            cache: Some(cache),
            ..self
        }
    }

    /// The same as it is, whatever is in a cache of it.
    pub(crate) fn without_cache(&self) -> Self {
        Self {
            cache: None,
            ..self.clone()
        }
    }

    /// Whether it is of objects somewhere else, and no directory: it can be read, and copied to, and nothing is saved
    /// there in place.
    pub fn is_remote(&self) -> bool {
        self.objects.is_some()
    }

    /// What it is of, if it is of objects.
    pub(crate) fn objects(&self) -> Option<&Arc<dyn Objects>> {
        self.objects.as_ref()
    }

    /// Where chunks are kept that were read, if they are.
    pub(crate) fn cache(&self) -> Option<&Cache> {
        self.cache.as_deref()
    }

    pub(crate) fn were_compressed(&self) -> bool {
        self.were_compressed.load(Ordering::Relaxed)
    }

    pub(crate) fn note_compressed(&self, is_compressed: bool) {
        self.were_compressed.store(is_compressed, Ordering::Relaxed);
    }

    /// Refuses what is written in place.
    pub(crate) fn is_directory(&self) -> Result<(), StoreError> {
        match self.is_remote() {
            false => Ok(()),
            true => Err(StoreError::ReadOnly {
                store: self.path.clone(),
            }),
        }
    }

    /// Holds it with others who read and write there. Waits for somebody who collects.
    ///
    /// # Errors
    /// If it cannot be had within a minute.
    pub fn hold(&self) -> Result<Hold, StoreError> {
        self.lock(Lock::Shared, PATIENCE)
    }

    pub(crate) fn lock(&self, how: Lock, patience: Duration) -> Result<Hold, StoreError> {
        let until = Instant::now() + patience;
        loop {
            let locked = self.disk.lock(&self.path, how);
            if let Some(locked) = locked.map_err(self.file("lock", &self.path))? {
                // Objects have none.
                if !self.is_remote() {
                    self.has_no_links()?;
                }
                return Ok(Hold { _locked: locked });
            }
            if Instant::now() >= until {
                return Err(StoreError::Busy {
                    path: self.path.clone(),
                });
            }
            thread::sleep(LOOK);
        }
    }

    /// Refuses a store of which a folder is elsewhere: chunks there are nobody's, or somebody else's.
    fn has_no_links(&self) -> Result<(), StoreError> {
        let chunks = self.path.join(CHUNKS);
        let kind = |path: &Path| match self.disk.kind(path) {
            Ok(Some(Kind::Link)) => Err(StoreError::Link {
                path: path.to_owned(),
            }),
            kind => kind.map_err(self.file("look at", path)),
        };
        kind(&self.path.join(TMP))?;
        if kind(&chunks)? != Some(Kind::Directory) {
            return Ok(());
        }
        let folders = self.list_if_there(&chunks)?;
        match folders.into_iter().find(|(_, kind)| *kind == Kind::Link) {
            Some((name, _)) => Err(StoreError::Link {
                path: chunks.join(name),
            }),
            None => Ok(()),
        }
    }

    /// The names of its snapshots, in order: every directory by such a name that is not empty, whole or not.
    ///
    /// # Errors
    /// If it cannot be looked into.
    pub fn names(&self) -> Result<Vec<SnapshotName>, StoreError> {
        let mut names = Vec::new();
        for (name, kind) in self.list(&self.path)? {
            let (Ok(name), Kind::Directory) = (name.parse(), kind) else {
                continue;
            };
            // What cannot be looked into may be one. What is not there any more is dropped at this moment.
            let inside = self.list_if_there(&self.directory_of(&name));
            let is_one = inside.map_or(true, |inside| match self.is_remote() {
                false => !inside.is_empty(),
                // What is pushed there, or dropped, is in sight meanwhile.
                true => inside.iter().any(|(file, _)| file == MANIFEST),
            });
            if is_one {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Whether `name` could be saved now: nothing is there by it but an empty directory, and files can be made. It is
    /// for who has much to do before a save, which looks once more.
    ///
    /// # Errors
    /// If not.
    pub fn may_save(&self, name: &SnapshotName) -> Result<(), StoreError> {
        self.is_directory()?;
        let _hold = self.hold()?;
        self.is_free_held(name)?;
        let tmp = self.path.join(TMP);
        self.make_dir(&tmp)?;
        let probe = tmp.join(format!("{name}.{}", fresh_suffix()));
        let made = self.disk.make_dir(&probe);
        made.map_err(self.file("make", &probe))?;
        let removed = self.disk.remove_dir(&probe);
        removed.map_err(self.file("take away", &probe))
    }

    /// The same of the name alone, for who holds the store.
    pub(crate) fn is_free_held(&self, name: &SnapshotName) -> Result<(), StoreError> {
        let names = self.list(&self.path)?;
        let there = names.iter().find(|(there, _)| there == name.as_str());
        let path = self.directory_of(name);
        match there {
            None => Ok(()),
            Some((_, Kind::Directory)) if self.list_if_there(&path)?.is_empty() => Ok(()),
            Some((_, Kind::Directory)) if self.has_manifest(name)? => Err(StoreError::Exists {
                store: self.path.clone(),
                name: name.clone(),
            }),
            Some(_) => Err(StoreError::InTheWay { path }),
        }
    }

    /// Whether a snapshot was saved by that name, whole or not.
    pub(crate) fn has_manifest(&self, name: &SnapshotName) -> Result<bool, StoreError> {
        let path = self.directory_of(name).join(MANIFEST);
        let len = self.disk.len(&path).map_err(self.file("look at", &path))?;
        Ok(len.is_some())
    }

    /// The directory of a snapshot.
    pub fn directory_of(&self, name: &SnapshotName) -> PathBuf {
        self.path.join(name.as_str())
    }

    pub(crate) fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// The chunks that were seen to be right by this, or a clone of it.
    pub(crate) fn right(&self) -> &Right {
        &self.right
    }

    fn none(&self, why: &str) -> StoreError {
        StoreError::NoStore {
            path: self.path.clone(),
            why: why.to_owned(),
        }
    }

    /// The error of an operation on a file as a whole.
    pub(crate) fn file(
        &self,
        what: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> StoreError {
        StoreError::file(what, path)
    }

    /// The error of an operation on bytes of a file.
    pub(crate) fn bytes(
        &self,
        what: &'static str,
        path: &Path,
    ) -> impl FnOnce(u64, io::Error) -> StoreError {
        let path = path.to_owned();
        move |offset, source| match is_called_off(&source) {
            true => StoreError::CalledOff,
            false => StoreError::Bytes {
                what,
                path,
                offset,
                source,
            },
        }
    }

    pub(crate) fn list(&self, path: &Path) -> Result<Vec<(String, Kind)>, StoreError> {
        self.disk.list(path).map_err(self.file("look into", path))
    }

    /// The same of a folder that need not be there.
    pub(crate) fn list_if_there(&self, path: &Path) -> Result<Vec<(String, Kind)>, StoreError> {
        match self.disk.list(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            listed => listed.map_err(self.file("look into", path)),
        }
    }

    /// Makes a directory, unless it is there.
    pub(crate) fn make_dir(&self, path: &Path) -> Result<(), StoreError> {
        match self.disk.make_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(self.file("make", path)),
        }
    }

    pub(crate) fn sync_dir(&self, path: &Path) -> Result<(), StoreError> {
        let synced = self.disk.sync_dir(path);
        synced.map_err(self.file("make durable", path))
    }

    /// Writes a new file, all of it durable but for its name.
    pub(crate) fn write_durable(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let file = self.disk.create(path).map_err(self.file("make", path))?;
        let written = disk::write_all(&*file, 0, bytes);
        written.map_err(|(offset, source)| self.bytes("write", path)(offset, source))?;
        file.sync().map_err(self.file("make durable", path))
    }

    /// All of a file that has at most `most` bytes.
    pub(crate) fn read_file(
        &self,
        path: &Path,
        file: &dyn File,
        most: u64,
    ) -> Result<Vec<u8>, StoreError> {
        let len = file.len().map_err(self.file("look at", path))?;
        if len > most {
            return Err(StoreError::Damaged {
                path: path.to_owned(),
                offset: most,
                what: format!("it has {len} bytes, and should have {most} at most"),
            });
        }
        let mut bytes = vec![0; len as usize];
        let read = disk::read_all(file, &mut bytes);
        let read = read.map_err(|(offset, source)| self.bytes("read", path)(offset, source))?;
        bytes.truncate(read);
        Ok(bytes)
    }
}

/// Something for a name that nobody has had, in this process or in others that run.
pub(crate) fn fresh_suffix() -> String {
    use std::sync::atomic::AtomicU64;
    use std::time::SystemTime;
    static MADE: AtomicU64 = AtomicU64::new(0);
    // Only that it is another each time matters: nothing is ordered by it.
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let nanos = time.map_or(0, |time| time.as_nanos());
    format!("{}-{nanos:x}-{number}", std::process::id())
}
