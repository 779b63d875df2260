//! `touched`: which regions of a snapshot were wanted first when it was last loaded, so that the next to load it may
//! read them before they are wanted.
//!
//! It is advice. What is damaged, absent or about another snapshot makes a load slower, and nothing else: a reader
//! takes of it what are regions of the snapshot, and a writer that cannot write it lets it be.

use std::collections::HashSet;
use std::path::Path;

use crate::disk;
use crate::error::StoreError;
use crate::hash::Hash;
use crate::read::Kept;
use crate::store::{TMP, fresh_suffix};

/// The file, beside the manifest.
pub(crate) const TOUCHED: &str = "touched";
const MAGIC: &[u8; 8] = b"PALTOUCH";
const VERSION: u32 = 1;
/// Bytes before the numbers.
const HEADER: usize = 16;
/// Bytes of a number, and of the hash at the end.
const NUMBER: usize = 4;
const HASH: usize = 32;

impl Kept {
    /// The regions that were wanted when it was loaded before, the first first; only such as are in a chunk, and each
    /// once. None if that is not known.
    pub fn touched(&self) -> Vec<u32> {
        let path = self.touched_path();
        let store = self.store();
        let most = (HEADER + HASH) as u64 + self.index().len() * NUMBER as u64;
        let Ok(file) = store.disk().open(&path) else {
            return Vec::new();
        };
        let bytes = store.read_file(&path, &*file, most);
        let numbers = bytes.ok().and_then(|bytes| decode(&bytes));
        self.known(numbers.unwrap_or_default())
    }

    /// Notes which regions were wanted, the first first, in the place of what was known before. What is no region in a
    /// chunk is left out.
    ///
    /// # Errors
    /// If it cannot be written. What was known before is known still, or nothing is.
    pub fn note_touched(&self, regions: &[u32]) -> Result<(), StoreError> {
        let store = self.store();
        let bytes = encode(&self.known(regions.iter().copied()));
        let tmp = store.path().join(TMP);
        store.make_dir(&tmp)?;
        let staged = tmp.join(format!("{}.{}.{TOUCHED}", self.name(), fresh_suffix()));
        let written = self.write(&staged, &bytes);
        if written.is_err() {
            let _ = store.disk().remove_file(&staged);
        }
        written
    }

    fn write(&self, staged: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let (store, path) = (self.store(), self.touched_path());
        let made = store.disk().create(staged);
        let file = made.map_err(store.file("make", staged))?;
        disk::write_all(&*file, 0, bytes)
            .map_err(|(offset, source)| store.bytes("write", staged)(offset, source))?;
        // Not half of it under its name, if the power goes.
        file.sync().map_err(store.file("make durable", staged))?;
        let renamed = store.disk().rename(staged, &path);
        renamed.map_err(store.file("name", &path))
    }

    fn touched_path(&self) -> std::path::PathBuf {
        self.store().directory_of(self.name()).join(TOUCHED)
    }

    fn known(&self, regions: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let mut seen = HashSet::new();
        let is_known = |&region: &u32| self.index().get(region.into()).is_some();
        let known = regions.into_iter().filter(is_known);
        known.filter(|&region| seen.insert(region)).collect()
    }
}

fn encode(regions: &[u32]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((regions.len() as u32).to_le_bytes());
    regions
        .iter()
        .for_each(|region| bytes.extend(region.to_le_bytes()));
    let hash = Hash::of(&bytes);
    bytes.extend(hash.as_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Vec<u32>> {
    let (body, hash) = bytes.split_at_checked(bytes.len().checked_sub(HASH)?)?;
    if Hash::of(body).as_bytes() != hash {
        return None;
    }
    let (header, numbers) = body.split_at_checked(HEADER)?;
    let number = |bytes: &[u8]| bytes.try_into().ok().map(u32::from_le_bytes);
    let is_ours = header.starts_with(MAGIC) && number(&header[8..12])? == VERSION;
    let count = number(&header[12..16])? as usize;
    let (numbers, rest) = numbers.as_chunks::<NUMBER>();
    let is_whole = numbers.len() == count && rest.is_empty();
    (is_ours && is_whole).then(|| numbers.iter().map(|&n| u32::from_le_bytes(n)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_changed_anywhere_or_cut_is_no_advice() {
        let regions = [5, 0, 7, u32::MAX];
        let bytes = encode(&regions);
        assert_eq!(decode(&bytes).as_deref(), Some(&regions[..]));
        assert_eq!(decode(&encode(&[])), Some(vec![]));
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), None, "{len}");
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert_eq!(decode(&changed), None, "{at}");
            }
        }
        // Under a hash that is right.
        let wrong = |change: fn(&mut Vec<u8>)| {
            let mut body = bytes[..bytes.len() - HASH].to_vec();
            change(&mut body);
            let hash = Hash::of(&body);
            body.extend(hash.as_bytes());
            decode(&body)
        };
        assert!(wrong(|_| ()).is_some());
        assert_eq!(wrong(|body| body[0] ^= 1), None);
        assert_eq!(wrong(|body| body[8] = 2), None);
        assert_eq!(wrong(|body| body[12] += 1), None);
        assert_eq!(wrong(|body| body.push(0)), None);
    }
}
