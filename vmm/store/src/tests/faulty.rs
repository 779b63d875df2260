//! A disk that refuses, is short, or dies at its k-th operation.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::memory::MemoryDisk;
use crate::disk::{Disk, File, Kind, Lock, Locked, Stamp};

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is refused with this error, and those after it are not.
    Once(i32),
    /// It is refused with this error, and all after it.
    Always(i32),
    /// It is done in part, if there is a part of it.
    Short,
}

pub(super) const EIO: i32 = 5;
pub(super) const ENOSPC: i32 = 28;
pub(super) const EROFS: i32 = 30;

/// A disk whose operations go wrong from the `at`th on.
#[derive(Debug)]
pub(super) struct FaultyDisk {
    disk: MemoryDisk,
    faults: Arc<Faults>,
}

#[derive(Debug)]
struct Faults {
    fault: Fault,
    at: u64,
    done: AtomicU64,
}

impl FaultyDisk {
    pub(super) fn new(disk: &MemoryDisk, at: u64, fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            disk: disk.clone(),
            faults: Arc::new(Faults {
                fault,
                at,
                done: AtomicU64::new(0),
            }),
        })
    }

    /// Whether it has come so far that anything went wrong.
    pub(super) fn has_failed(&self) -> bool {
        self.faults.done.load(Ordering::Relaxed) > self.faults.at
    }
}

impl Faults {
    /// Whether the next operation is to be short; an error if it is refused.
    fn next(&self) -> io::Result<bool> {
        let number = self.done.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Fault::Once(errno) if number == self.at => Err(io::Error::from_raw_os_error(errno)),
            Fault::Always(errno) if number >= self.at => Err(io::Error::from_raw_os_error(errno)),
            Fault::Short => Ok(number >= self.at),
            _ => Ok(false),
        }
    }
}

#[derive(Debug)]
struct FaultyFile {
    file: Box<dyn File>,
    faults: Arc<Faults>,
}

impl FaultyDisk {
    fn faulty(&self, file: Box<dyn File>) -> Box<dyn File> {
        Box::new(FaultyFile {
            file,
            faults: Arc::clone(&self.faults),
        })
    }
}

impl Disk for FaultyDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        self.faults.next()?;
        Ok(self.faulty(self.disk.create(path)?))
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        self.faults.next()?;
        Ok(self.faulty(self.disk.open(path)?))
    }
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.faults.next()?;
        self.disk.make_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.faults.next()?;
        self.disk.sync_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.faults.next()?;
        self.disk.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.faults.next()?;
        self.disk.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.faults.next()?;
        self.disk.remove_dir(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<(String, Kind)>> {
        self.faults.next()?;
        self.disk.list(path)
    }
    fn kind(&self, path: &Path) -> io::Result<Option<Kind>> {
        self.faults.next()?;
        self.disk.kind(path)
    }
    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        self.faults.next()?;
        self.disk.len(path)
    }
    fn stamp(&self, path: &Path) -> io::Result<Option<Stamp>> {
        self.faults.next()?;
        self.disk.stamp(path)
    }
    fn real(&self, path: &Path) -> io::Result<PathBuf> {
        self.faults.next()?;
        self.disk.real(path)
    }
    fn allocated(&self, path: &Path) -> io::Result<u64> {
        self.faults.next()?;
        self.disk.allocated(path)
    }
    fn lock(&self, path: &Path, how: Lock) -> io::Result<Option<Box<dyn Locked>>> {
        self.faults.next()?;
        self.disk.lock(path, how)
    }
}

impl File for FaultyFile {
    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<usize> {
        let some = if self.faults.next()? {
            to.len().div_ceil(2)
        } else {
            to.len()
        };
        self.file.read_at(offset, &mut to[..some])
    }
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let some = if self.faults.next()? {
            bytes.len().div_ceil(2)
        } else {
            bytes.len()
        };
        self.file.write_at(offset, &bytes[..some])
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.faults.next()?;
        self.file.set_len(len)
    }
    fn len(&self) -> io::Result<u64> {
        self.faults.next()?;
        self.file.len()
    }
    fn stamp(&self) -> io::Result<Stamp> {
        self.faults.next()?;
        self.file.stamp()
    }
    fn sync(&self) -> io::Result<()> {
        self.faults.next()?;
        self.file.sync()
    }
}
