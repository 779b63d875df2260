//! Into objects: chunks first, in any order, and then the name ([`Naming`]).

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

use super::{Copied, CopyOptions, in_order};
use crate::buffer::Buffer;
use crate::chunk::{self, CHUNKS};
use crate::error::StoreError;
use crate::hash::Hash;
use crate::name::SnapshotName;
use crate::objects::{Naming, Objects};
use crate::parts::encode_parts;
use crate::read::Kept;
use crate::save::Compression;
use crate::store::Store;

/// See [`copy`](super::copy).
pub(super) fn copy(
    kept: &Kept,
    to: &Store,
    objects: &dyn Objects,
    name: &SnapshotName,
    options: CopyOptions,
    mut copied: Copied,
    goes_on: &mut dyn FnMut(&Copied) -> bool,
) -> Result<Copied, StoreError> {
    let state = encode_parts(kept.parts()).map_err(|error| StoreError::NotOfFormat {
        what: error.to_string(),
    })?;
    let naming = Naming {
        store: to,
        objects,
        name,
        index: &kept.index().encode(),
        state: &state,
        manifest: kept.manifest_bytes(),
    };
    // Before anything is sent. What is there is looked at all the same: it may have lost a chunk.
    copied.was_there = naming.look()?;
    let mut chunks: Vec<(u64, Hash)> = kept.index().iter().collect();
    let mut seen = HashSet::new();
    // The last region may have the same content as another only if it is as long.
    chunks.retain(|(_, hash)| seen.insert(*hash));
    copied.done = copied.chunks - chunks.len() as u64;
    if !goes_on(&copied) {
        return Err(StoreError::CalledOff);
    }
    let sending = Sending {
        kept,
        to,
        objects,
        options,
        folders: [const { OnceLock::new() }; 256],
    };
    let send = |(region, hash): &(u64, Hash)| sending.send(*region, *hash);
    in_order(&chunks, options.at_once, send, |_, sent| {
        copied.done += 1;
        if let Some(bytes) = sent {
            copied.sent += 1;
            copied.bytes_sent += bytes;
        }
        match goes_on(&copied) {
            true => Ok(()),
            false => Err(StoreError::CalledOff),
        }
    })?;
    naming.give()?;
    Ok(copied)
}

/// What is there of a folder of chunks: bytes of each as it is, and compressed.
type Folder = HashMap<Hash, [Option<u64>; 2]>;

/// Sending chunks that are not there.
struct Sending<'a> {
    kept: &'a Kept,
    to: &'a Store,
    objects: &'a dyn Objects,
    options: CopyOptions,
    /// What there was in each folder when a chunk of it was first looked for.
    folders: [OnceLock<Folder>; 256],
}

impl Sending<'_> {
    /// Sends a chunk, unless it is there. Says how many bytes were sent.
    fn send(&self, region: u64, hash: Hash) -> Result<Option<u64>, StoreError> {
        let bytes = self.kept.index().region_bytes(region) as usize;
        let there = self.folder(hash.folder())?.get(&hash);
        let [plain, compressed] = there.copied().unwrap_or_default();
        // What readers would take.
        let is_there = match (plain, compressed) {
            (Some(len), _) => len == bytes as u64,
            (None, Some(len)) => len <= chunk::most_compressed(bytes),
            (None, None) => false,
        };
        let mut content = Buffer::new(bytes);
        if is_there && (!self.options.check || self.is_right(hash, &mut content)?) {
            return Ok(None);
        }
        self.kept.region(region, &mut content)?;
        let compression = match plain {
            // What is there as it is, and no good, is what readers take: it is replaced.
            Some(_) => Compression::None,
            None => self.options.compression,
        };
        let path = chunk::path_of(self.to, hash, compression);
        let encoded;
        let sent: &[u8] = match compression {
            Compression::None => &content,
            Compression::Zstd { level } => {
                let compressed = zstd::bulk::compress(&content, level);
                encoded = compressed.map_err(StoreError::file("compress", &path))?;
                &encoded
            }
        };
        let put = self.objects.put(&chunk::key_of(hash, compression), sent);
        put.map_err(StoreError::file("put", &path))?;
        let bytes = sent.len() as u64;
        if self.options.check && !self.is_right(hash, &mut content)? {
            return Err(StoreError::Damaged {
                path,
                offset: 0,
                what: "it was put there, and is not there as it was put".to_owned(),
            });
        }
        Ok(Some(bytes))
    }

    /// Whether the chunk is there and right. What cannot be found out is an error.
    fn is_right(&self, hash: Hash, content: &mut [u8]) -> Result<bool, StoreError> {
        match chunk::read(self.to, hash, content) {
            Err(StoreError::Damaged { .. }) => Ok(false),
            read => read,
        }
    }

    fn folder(&self, number: u8) -> Result<&Folder, StoreError> {
        let known = &self.folders[usize::from(number)];
        if let Some(folder) = known.get() {
            return Ok(folder);
        }
        let path = chunk::folder_of(self.to, number);
        let listed = self.objects.list_below(&format!("{CHUNKS}/{number:02x}"));
        let mut folder = Folder::new();
        for (name, bytes) in listed.map_err(StoreError::file("look into", &path))? {
            if let Some(hash) = chunk::hash_of(self.to, &path.join(&name)) {
                let is_compressed = name.ends_with(chunk::COMPRESSED);
                folder.entry(hash).or_default()[usize::from(is_compressed)] = Some(bytes);
            }
        }
        // Two that look at once have seen the same, or what is as good.
        Ok(known.get_or_init(|| folder))
    }
}
