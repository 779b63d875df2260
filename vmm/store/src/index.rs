//! `memory`: which region of memory is in which chunk.
//!
//! ```text
//!   byte  0  "PALINDEX"
//!         8  version: 1        u32    all numbers little-endian
//!        12  bytes of a region u32
//!        16  records           u64
//!        24  bytes of memory   u64
//!        32  records of 40 bytes, by ascending number: number of the region u64, hash of its chunk
//! ```
//! A region that is not there is zeros.

use crate::chunk::CHUNK_BYTES;
use crate::hash::Hash;

const MAGIC: &[u8; 8] = b"PALINDEX";
const VERSION: u32 = 1;
const HEADER: u64 = 32;
const RECORD: u64 = 8 + Hash::BYTES as u64;

/// The most bytes of memory that a snapshot may have: what a guest can address.
pub const MAX_MEMORY_BYTES: u64 = 1 << 46;

/// How long the index of so many chunks is.
pub(crate) fn bytes_of(chunks: u64) -> u64 {
    chunks.saturating_mul(RECORD).saturating_add(HEADER)
}

/// Which region of memory is in which chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkIndex {
    memory_bytes: u64,
    chunks: Vec<(u64, Hash)>,
}

/// Why bytes are no index.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// They do not begin as one, or are of another version.
    #[error("it does not begin as an index of version {VERSION}")]
    Header,
    /// They are of other memory.
    #[error("it is of memory of {found} bytes, and the manifest says {expected}")]
    Memory {
        /// What the index says.
        found: u64,
        /// What the manifest says.
        expected: u64,
    },
    /// They are not as many as their header says.
    #[error("it has {found} bytes, and {expected} by its header")]
    Length {
        /// How many there are.
        found: u64,
        /// How many there should be.
        expected: u64,
    },
    /// A record makes no sense.
    #[error(
        "record {record} is of region {region}, which is behind memory, or not behind that before"
    )]
    Region {
        /// Number of the record.
        record: u64,
        /// Number of its region.
        region: u64,
    },
}

impl ChunkIndex {
    /// One of memory of so many bytes, all of it zeros.
    pub(crate) fn new(memory_bytes: u64) -> Self {
        Self {
            memory_bytes,
            chunks: Vec::new(),
        }
    }

    /// Adds a region, which is behind all others.
    pub(crate) fn push(&mut self, region: u64, hash: Hash) {
        debug_assert!(self.may_push(region));
        self.chunks.push((region, hash));
    }

    /// Whether a region is in memory, and behind all others.
    pub(crate) fn may_push(&self, region: u64) -> bool {
        let is_next = self.chunks.last().is_none_or(|(last, _)| *last < region);
        is_next && region < self.regions()
    }

    /// Bytes of memory, zeros included.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Regions of memory, zeros included. The last may be shorter than others.
    pub fn regions(&self) -> u64 {
        self.memory_bytes.div_ceil(CHUNK_BYTES)
    }

    /// Bytes of a region.
    pub fn region_bytes(&self, region: u64) -> u64 {
        let left = region
            .checked_mul(CHUNK_BYTES)
            .map_or(0, |before| self.memory_bytes.saturating_sub(before));
        left.min(CHUNK_BYTES)
    }

    /// The chunk of a region; `None` if it is all zeros.
    pub fn get(&self, region: u64) -> Option<Hash> {
        let at = self
            .chunks
            .binary_search_by_key(&region, |(region, _)| *region)
            .ok()?;
        Some(self.chunks[at].1)
    }

    /// The regions that are not all zeros, in order, and their chunks.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u64, Hash)> + '_ {
        self.chunks.iter().copied()
    }

    /// How many regions are not all zeros.
    pub fn len(&self) -> u64 {
        self.chunks.len() as u64
    }

    /// Whether all is zeros.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(bytes_of(self.len()) as usize);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((CHUNK_BYTES as u32).to_le_bytes());
        bytes.extend(self.len().to_le_bytes());
        bytes.extend(self.memory_bytes.to_le_bytes());
        for (region, hash) in &self.chunks {
            bytes.extend(region.to_le_bytes());
            bytes.extend(hash.as_bytes());
        }
        bytes
    }

    /// What `bytes` say, which must be of memory of `memory_bytes` bytes.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn decode(bytes: &[u8], memory_bytes: u64) -> Result<Self, IndexError> {
        let (header, records) = bytes
            .split_first_chunk::<{ HEADER as usize }>()
            .ok_or(IndexError::Header)?;
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let kind = u64::from(VERSION) | CHUNK_BYTES << 32;
        if &header[..8] != MAGIC || word(8) != kind {
            return Err(IndexError::Header);
        }
        let (count, found) = (word(16), word(24));
        if found != memory_bytes {
            let expected = memory_bytes;
            return Err(IndexError::Memory { found, expected });
        }
        let (expected, found) = (bytes_of(count), bytes.len() as u64);
        if expected != found {
            return Err(IndexError::Length { found, expected });
        }
        let mut index = Self::new(memory_bytes);
        let (records, _) = records.as_chunks::<{ RECORD as usize }>();
        index.chunks.reserve(records.len());
        for (record, bytes) in (0..).zip(records) {
            let (mut region, mut hash) = ([0; 8], [0; Hash::BYTES]);
            region.copy_from_slice(&bytes[..8]);
            hash.copy_from_slice(&bytes[8..]);
            let region = u64::from_le_bytes(region);
            if !index.may_push(region) {
                return Err(IndexError::Region { record, region });
            }
            index.push(region, Hash::from_bytes(hash));
        }
        Ok(index)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const MEMORY: u64 = 7 * CHUNK_BYTES + 4096;

    pub(crate) fn example() -> ChunkIndex {
        let mut index = ChunkIndex::new(MEMORY);
        index.push(0, Hash::of(b"0"));
        index.push(3, Hash::of(b"3"));
        index.push(7, Hash::of(b"7"));
        index
    }

    #[test]
    fn an_index_is_read_as_it_was_written() {
        let index = example();
        let bytes = index.encode();
        assert_eq!(bytes.len() as u64, bytes_of(3));
        assert_eq!(ChunkIndex::decode(&bytes, MEMORY), Ok(index.clone()));
        assert_eq!(index.get(3), Some(Hash::of(b"3")));
        assert_eq!(
            (index.get(1), index.get(8), index.get(u64::MAX)),
            (None, None, None)
        );
        let bytes = [0, 6, 7, 8, u64::MAX].map(|region| index.region_bytes(region));
        assert_eq!(bytes, [CHUNK_BYTES, CHUNK_BYTES, 4096, 0, 0]);
        let empty = ChunkIndex::new(4096);
        assert_eq!(ChunkIndex::decode(&empty.encode(), 4096), Ok(empty));
    }

    #[test]
    fn what_is_no_index_is_refused() {
        let right = example().encode();
        let decode = |bytes: &[u8]| ChunkIndex::decode(bytes, MEMORY).unwrap_err();
        for at in 0..right.len() {
            decode(&right[..at]);
        }
        decode(&[&right[..], &[0]].concat());
        let with = |at: usize, value: u64| {
            let mut bytes = right.clone();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            decode(&bytes)
        };
        assert_eq!(with(0, 0), IndexError::Header);
        assert_eq!(with(8, 1 | 4096 << 32), IndexError::Header);
        assert!(matches!(with(16, 2), IndexError::Length { .. }));
        assert!(matches!(with(16, u64::MAX), IndexError::Length { .. }));
        assert!(matches!(with(24, MEMORY - 4096), IndexError::Memory { .. }));
        // Not in order, twice, behind the end.
        for region in [0, 7, 8, u64::MAX] {
            let error = with(32 + 40, region);
            assert!(matches!(error, IndexError::Region { .. }), "{error}");
        }
    }
}
