//! A chunk's file: a region of memory, named by the hash of its content.
//!
//! As it is, it can be mapped: it has no header, begins at a page of the file, and pages of zeros are holes in
//! it that take no space. Compressed, it has `.zst` behind its name. The name is that of the content in either
//! case, so the two are one chunk, and whoever looks for it takes what is there.

use std::io;
use std::path::{Path, PathBuf};

use crate::buffer::Buffer;
use crate::disk::{self, File, Stamp};
use crate::error::StoreError;
use crate::hash::Hash;
use crate::save::Compression;
use crate::store::Store;

/// Bytes of a region of memory, and so of its chunk; the last region of memory may have fewer.
pub const CHUNK_BYTES: u64 = 2 << 20;

/// Bytes that are zeros, or are not, as a whole in a chunk's file.
const PAGE: usize = 4096;
/// The folder of chunks.
pub(crate) const CHUNKS: &str = "chunks";
/// What a compressed chunk's name ends in.
pub(crate) const COMPRESSED: &str = ".zst";
const ZEROS: [u8; PAGE] = [0; PAGE];

/// Whether `bytes` are all zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(PAGE).all(|page| page == &ZEROS[..page.len()])
}

/// The file of a chunk.
pub(crate) fn path_of(store: &Store, hash: Hash, compression: Compression) -> PathBuf {
    store.path().join(key_of(hash, compression))
}

/// The same from the store on.
pub(crate) fn key_of(hash: Hash, compression: Compression) -> String {
    let end = match compression {
        Compression::None => "",
        Compression::Zstd { .. } => COMPRESSED,
    };
    format!("{CHUNKS}/{:02x}/{hash}{end}", hash.folder())
}

/// Whether there is a chunk of that name, right or not. What cannot be looked at is not.
pub(crate) fn is_there(store: &Store, hash: Hash) -> bool {
    [Compression::None, Compression::ANY]
        .into_iter()
        .any(|form| matches!(store.disk().len(&path_of(store, hash, form)), Ok(Some(_))))
}

/// The chunk whose file `path` is, in whichever form; `None` if it is none.
pub(crate) fn hash_of(store: &Store, path: &Path) -> Option<Hash> {
    let name = path.file_name()?.to_str()?;
    let hash: Hash = name.strip_suffix(COMPRESSED).unwrap_or(name).parse().ok()?;
    (path.parent()? == folder_of(store, hash.folder())).then_some(hash)
}

/// The folder of those whose hashes begin with `folder`.
pub(crate) fn folder_of(store: &Store, folder: u8) -> PathBuf {
    store.path().join(CHUNKS).join(format!("{folder:02x}"))
}

/// Writes `content` into a new file at `path`, which is not durable before it is synced. Says how many bytes
/// were written.
pub(crate) fn write(
    store: &Store,
    path: &Path,
    content: &[u8],
    compression: Compression,
) -> Result<(Box<dyn File>, u64), StoreError> {
    let file = store
        .disk()
        .create(path)
        .map_err(store.file("make", path))?;
    let at = |(offset, source)| store.bytes("write", path)(offset, source);
    let written = match compression {
        Compression::None => {
            let len = file.set_len(content.len() as u64);
            len.map_err(store.file("set the length of", path))?;
            let mut written = 0;
            for (offset, run) in data_runs(content) {
                disk::write_all(&*file, offset as u64, run).map_err(at)?;
                written += run.len();
            }
            written
        }
        Compression::Zstd { level } => {
            let bytes =
                zstd::bulk::compress(content, level).map_err(store.file("compress", path))?;
            disk::write_all(&*file, 0, &bytes).map_err(at)?;
            bytes.len()
        }
    };
    Ok((file, written as u64))
}

/// The most bytes of a compressed chunk of so many bytes: what zstd needs for what cannot be compressed.
pub(crate) fn most_compressed(bytes: usize) -> u64 {
    zstd::zstd_safe::compress_bound(bytes) as u64
}

/// The longest runs of pages of 4 KiB that are not zeros, and where they are, in bytes: what of a region takes
/// room, on disk and in memory.
pub fn data_runs(content: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let is_zero = |at: usize| is_zero(&content[at..content.len().min(at + PAGE)]);
        while at < content.len() && is_zero(at) {
            at += PAGE;
        }
        let first = at;
        while at < content.len() && !is_zero(at) {
            at += PAGE;
        }
        (first < at).then(|| (first, &content[first..at.min(content.len())]))
    })
}

/// Reads the chunk `hash` into `to`, which is as long as its content. `false` if it is not there; nothing of
/// `to` is to be used unless this is `true`.
///
/// # Errors
/// If it cannot be read, or is not what its name says.
pub(crate) fn read(store: &Store, hash: Hash, to: &mut [u8]) -> Result<bool, StoreError> {
    if let Some(cache) = store.cache() {
        if cache.read(hash, to) {
            return Ok(true);
        }
        let is_there = read_past_cache(store, hash, to)?;
        if is_there {
            cache.keep(hash, to);
        }
        return Ok(is_there);
    }
    read_past_cache(store, hash, to)
}

fn read_past_cache(store: &Store, hash: Hash, to: &mut [u8]) -> Result<bool, StoreError> {
    // To look for what is not there takes time where objects are: what chunks were like before is looked for first.
    // What has the hash is the chunk, whatever is beside it.
    if store.is_remote() && store.were_compressed() {
        let path = path_of(store, hash, Compression::ANY);
        if let Some(file) = open(store, &path)?
            && read_compressed(store, &path, &*file, to).is_ok()
            && Hash::of(to) == hash
        {
            return Ok(true);
        }
    }
    let path = path_of(store, hash, Compression::None);
    let found = match open(store, &path)? {
        Some(file) => {
            store.note_compressed(false);
            read_plain(store, &path, &*file, to)
        }
        None => {
            let path = path_of(store, hash, Compression::ANY);
            match open(store, &path)? {
                Some(file) => {
                    store.note_compressed(true);
                    read_compressed(store, &path, &*file, to)
                }
                None => return Ok(false),
            }
        }
    };
    let (path, compression, stamp) = found?;
    let found = Hash::of(to);
    if found != hash {
        return Err(StoreError::Damaged {
            path,
            offset: 0,
            what: format!("its content has the hash {found}, which is not its name"),
        });
    }
    // An object has nothing by which it is known again.
    if !store.is_remote() {
        let bytes = to.len() as u64;
        store.right().saw_as(hash, bytes, compression, stamp);
    }
    Ok(true)
}

/// A chunk's file that was read, how it is kept, and what it was before that.
type ReadFile = (PathBuf, Compression, Stamp);

fn open(store: &Store, path: &Path) -> Result<Option<Box<dyn File>>, StoreError> {
    match store.disk().open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(store.file("open", path)(error)),
    }
}

fn read_plain(
    store: &Store,
    path: &Path,
    file: &dyn File,
    to: &mut [u8],
) -> Result<ReadFile, StoreError> {
    let stamp = file.stamp().map_err(store.file("look at", path))?;
    let len = stamp.bytes;
    if len != to.len() as u64 {
        return Err(StoreError::Damaged {
            path: path.to_owned(),
            offset: len.min(to.len() as u64),
            what: format!("it has {len} bytes, and should have {}", to.len()),
        });
    }
    let read = disk::read_all(file, to);
    let read = read.map_err(|(offset, source)| store.bytes("read", path)(offset, source))?;
    cut_off(path, read, to.len())?;
    Ok((path.to_owned(), Compression::None, stamp))
}

fn read_compressed(
    store: &Store,
    path: &Path,
    file: &dyn File,
    to: &mut [u8],
) -> Result<ReadFile, StoreError> {
    let damaged = |what| StoreError::Damaged {
        path: path.to_owned(),
        offset: 0,
        what,
    };
    let stamp = file.stamp().map_err(store.file("look at", path))?;
    let len = stamp.bytes;
    let most = most_compressed(to.len());
    if len > most {
        return Err(damaged(format!(
            "it has {len} bytes, more than {} need",
            to.len()
        )));
    }
    let mut bytes = Buffer::new(len as usize);
    let read = disk::read_all(file, &mut bytes);
    let read = read.map_err(|(offset, source)| store.bytes("read", path)(offset, source))?;
    cut_off(path, read, bytes.len())?;
    let content = zstd::bulk::decompress_to_buffer(&bytes, to);
    let content =
        content.map_err(|error| damaged(format!("it cannot be decompressed: {error}")))?;
    match content == to.len() {
        true => Ok((path.to_owned(), Compression::ANY, stamp)),
        false => Err(damaged(format!(
            "it has {content} bytes of content, and should have {}",
            to.len()
        ))),
    }
}

fn cut_off(path: &Path, read: usize, wanted: usize) -> Result<(), StoreError> {
    match read == wanted {
        true => Ok(()),
        false => Err(StoreError::Damaged {
            path: path.to_owned(),
            offset: read as u64,
            what: format!("it ends there, and should have {wanted} bytes"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_all_that_is_not_zero() {
        let mut content = vec![0; 10 * PAGE + 100];
        assert_eq!(data_runs(&content).count(), 0);
        assert!(is_zero(&content));
        content[PAGE] = 1;
        content[3 * PAGE - 1] = 1;
        content[5 * PAGE + 7] = 1;
        content[10 * PAGE + 99] = 1;
        let found: Vec<_> = data_runs(&content)
            .map(|(at, run)| (at, run.len()))
            .collect();
        assert_eq!(
            found,
            [(PAGE, 2 * PAGE), (5 * PAGE, PAGE), (10 * PAGE, 100)]
        );
        assert!(!is_zero(&content));
    }
}
