//! Objects in memory, whose k-th operation goes wrong, or is when somebody else does something.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::objects::{Listing, Objects, Piece};

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// It is refused.
    Refused,
    /// It is done, and said to have failed.
    Lost,
    /// It is done twice, as by who gets no answer the first time.
    Twice,
}

/// The objects. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Bucket {
    objects: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    /// Whether what is there is replaced by who wanted to put something new.
    replaces: bool,
}

impl Bucket {
    pub(super) fn that_replaces() -> Self {
        Self {
            replaces: true,
            ..Self::default()
        }
    }

    pub(super) fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.objects.lock().unwrap()
    }

    pub(super) fn keys(&self) -> Vec<String> {
        self.objects().keys().cloned().collect()
    }
}

fn prefix(folder: &str) -> String {
    match folder {
        "" => String::new(),
        folder => format!("{folder}/"),
    }
}

impl Objects for Bucket {
    fn get(&self, key: &str, range: Range<u64>) -> io::Result<Option<Piece>> {
        let objects = self.objects();
        Ok(objects.get(key).map(|bytes| {
            let (from, to) = (range.start as usize, (range.end as usize).min(bytes.len()));
            Piece {
                bytes: bytes.get(from..to).unwrap_or_default().to_vec(),
                len: bytes.len() as u64,
            }
        }))
    }

    fn len(&self, key: &str) -> io::Result<Option<u64>> {
        Ok(self.objects().get(key).map(|bytes| bytes.len() as u64))
    }

    fn put(&self, key: &str, bytes: &[u8]) -> io::Result<()> {
        self.objects().insert(key.to_owned(), bytes.to_vec());
        Ok(())
    }

    fn put_new(&self, key: &str, bytes: &[u8]) -> io::Result<bool> {
        let mut objects = self.objects();
        if objects.contains_key(key) && !self.replaces {
            return Ok(false);
        }
        objects.insert(key.to_owned(), bytes.to_vec());
        Ok(true)
    }

    fn delete(&self, key: &str) -> io::Result<()> {
        self.objects().remove(key);
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Listing> {
        let mut folders = BTreeSet::new();
        let mut objects = Vec::new();
        for (key, bytes) in self.list_below(folder)? {
            match key.split_once('/') {
                Some((folder, _)) => drop(folders.insert(folder.to_owned())),
                None => objects.push((key, bytes)),
            }
        }
        let folders = folders.into_iter().collect();
        Ok(Listing { folders, objects })
    }

    fn list_below(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        let objects = self.objects();
        let below = objects.iter().filter_map(|(key, bytes)| {
            let key = key.strip_prefix(&prefix(folder))?;
            Some((key.to_owned(), bytes.len() as u64))
        });
        Ok(below.collect())
    }
}

/// Objects that count operations, and at one of which something happens.
pub(super) struct Watched {
    bucket: Bucket,
    operations: AtomicU64,
    at: u64,
    happens: Happens,
    /// From which one on nothing is done any more: whoever did it was killed.
    dies_at: u64,
}

/// What happens before the operation that it is about, or to it.
pub(super) enum Happens {
    To(Trouble),
    /// To it and all after it.
    ToAll(Trouble),
    Before(Mutex<Box<dyn FnMut() + Send>>),
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watched")
    }
}

impl Watched {
    pub(super) fn new(bucket: &Bucket, at: u64, happens: Happens) -> Arc<Self> {
        Arc::new(Self {
            bucket: bucket.clone(),
            operations: AtomicU64::new(0),
            at,
            happens,
            dies_at: u64::MAX,
        })
    }

    /// The same as [`before`](Self::before), of somebody who is killed before operation `dies_at`.
    pub(super) fn before_and_dies(
        bucket: &Bucket,
        at: u64,
        act: impl FnMut() + Send + 'static,
        dies_at: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            bucket: bucket.clone(),
            operations: AtomicU64::new(0),
            at,
            happens: Happens::Before(Mutex::new(Box::new(act))),
            dies_at,
        })
    }

    /// Has `act` called before the `at`th operation.
    pub(super) fn before(
        bucket: &Bucket,
        at: u64,
        act: impl FnMut() + Send + 'static,
    ) -> Arc<Self> {
        Self::new(bucket, at, Happens::Before(Mutex::new(Box::new(act))))
    }

    pub(super) fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// Whether it has come so far.
    pub(super) fn has_happened(&self) -> bool {
        self.operations() > self.at
    }

    fn next<T>(&self, operation: impl Fn() -> io::Result<T>) -> io::Result<T> {
        let number = self.operations.fetch_add(1, Ordering::Relaxed);
        let trouble = match &self.happens {
            Happens::To(trouble) if number == self.at => Some(*trouble),
            Happens::ToAll(trouble) if number >= self.at => Some(*trouble),
            Happens::Before(act) if number == self.at => {
                (act.lock().unwrap())();
                None
            }
            _ => None,
        };
        if number >= self.dies_at {
            return Err(io::Error::other("killed on purpose"));
        }
        match trouble {
            None => operation(),
            Some(Trouble::Refused) => Err(io::Error::other("refused on purpose")),
            Some(Trouble::Lost) => operation().and(Err(io::Error::other("lost on purpose"))),
            Some(Trouble::Twice) => operation().and_then(|_| operation()),
        }
    }
}

impl Objects for Watched {
    fn get(&self, key: &str, range: Range<u64>) -> io::Result<Option<Piece>> {
        self.next(|| self.bucket.get(key, range.clone()))
    }
    fn len(&self, key: &str) -> io::Result<Option<u64>> {
        self.next(|| self.bucket.len(key))
    }
    fn put(&self, key: &str, bytes: &[u8]) -> io::Result<()> {
        self.next(|| self.bucket.put(key, bytes))
    }
    fn put_new(&self, key: &str, bytes: &[u8]) -> io::Result<bool> {
        self.next(|| self.bucket.put_new(key, bytes))
    }
    fn delete(&self, key: &str) -> io::Result<()> {
        self.next(|| self.bucket.delete(key))
    }
    fn list(&self, folder: &str) -> io::Result<Listing> {
        self.next(|| self.bucket.list(folder))
    }
    fn list_below(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        self.next(|| self.bucket.list_below(folder))
    }
}
