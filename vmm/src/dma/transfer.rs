//! Data words to and from pinned guest memory.
//!
//! The data of a request is a sequence of 64-bit words, given by a formula. It lies in buffers that may begin
//! and end at any byte, so a word may be cut between two of them, or between two pages. Whole words are moved
//! by one volatile access each; of a cut word every piece is moved for itself. The guest reads and writes
//! around, and at, the same bytes all the while.

use guest::formula::{buffer_word_from_key, dma_key};
use vm_memory::VolatileSlice;

use palimpsest::host::{PinnedBuffer, Ram, RamError};
use palimpsest::mm::Access;

/// The most bytes of data in a request, and in a registered buffer.
pub(super) const MAX_DATA: u64 = 1 << 20;
/// Words moved between two looks at the formula: enough to be fast, and few enough that a guest writing
/// beside them gets in between.
const CHUNK_WORDS: usize = 64;

/// Pinned bytes of guest memory, and where the guest sees them.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) gpa: u64,
    pub(super) access: Access,
    pinned: PinnedBuffer,
}

impl Buffer {
    pub(super) fn pin(ram: &Ram, gpa: u64, len: u64, access: Access) -> Result<Self, RamError> {
        let pinned = ram.pin(gpa, len, access)?;
        Ok(Self {
            gpa,
            access,
            pinned,
        })
    }

    pub(super) fn len(&self) -> u64 {
        self.pinned.len()
    }
}

/// The data of one request.
#[derive(Clone, Copy)]
pub(super) struct Words {
    key: u64,
}

/// The first word that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WrongWord {
    /// Byte offset of the word in the data.
    pub(super) offset: u64,
    /// Guest-physical address of it, or of the piece that is wrong.
    pub(super) gpa: u64,
    pub(super) expected: u64,
    /// The bytes of a cut word that were not looked at are as they should be.
    pub(super) found: u64,
}

impl Words {
    /// The data of request `seq` of device `device`.
    pub(super) fn new(seed: u64, device: u64, seq: u64) -> Self {
        Self {
            key: dma_key(seed, device, seq),
        }
    }

    fn word(self, index: u64) -> u64 {
        buffer_word_from_key(self.key, index)
    }

    /// Fills `buffers`, one after the other, with the data.
    pub(super) fn write(self, buffers: &[Buffer]) {
        let mut words = [0; CHUNK_WORDS];
        for piece in pieces(buffers) {
            match piece.shape {
                Shape::Whole => {
                    let words = &mut words[..piece.slice.len() / 8];
                    for (index, word) in (piece.word..).zip(words.iter_mut()) {
                        *word = self.word(index);
                    }
                    piece.slice.copy_from(words);
                }
                Shape::Cut { first, end } => {
                    piece
                        .slice
                        .copy_from(&self.word(piece.word).to_le_bytes()[first..end]);
                }
            }
        }
    }

    /// Reads all of `buffers` and compares it with the data.
    pub(super) fn compare(self, buffers: &[Buffer]) -> Option<WrongWord> {
        let mut words = [0; CHUNK_WORDS];
        pieces(buffers).find_map(|piece| {
            let wrong = |index: u64, found: u64| {
                let expected = self.word(index);
                (found != expected).then(|| WrongWord {
                    offset: 8 * index,
                    gpa: piece.gpa + 8 * (index - piece.word),
                    expected,
                    found,
                })
            };
            match piece.shape {
                Shape::Whole => {
                    let words = &mut words[..piece.slice.len() / 8];
                    piece.slice.copy_to(words);
                    (piece.word..)
                        .zip(words.iter())
                        .find_map(|(index, &found)| wrong(index, found))
                }
                Shape::Cut { first, end } => {
                    let mut bytes = self.word(piece.word).to_le_bytes();
                    piece.slice.copy_to(&mut bytes[first..end]);
                    wrong(piece.word, u64::from_le_bytes(bytes))
                }
            }
        })
    }
}

/// Bytes that lie together in host memory: up to [`CHUNK_WORDS`] whole words, or a part of one.
struct Piece<'a> {
    /// Index of the (first) word.
    word: u64,
    gpa: u64,
    slice: VolatileSlice<'a>,
    shape: Shape,
}

enum Shape {
    Whole,
    /// Bytes `first..end` of a word.
    Cut {
        first: usize,
        end: usize,
    },
}

fn pieces(buffers: &[Buffer]) -> impl Iterator<Item = Piece<'_>> {
    let slices = buffers.iter().flat_map(|buffer| {
        let mut gpa = buffer.gpa;
        buffer.pinned.slices().map(move |slice| {
            let at = gpa;
            gpa += slice.len() as u64;
            (at, slice)
        })
    });
    let mut offset = 0;
    slices.flat_map(move |(gpa, slice)| {
        let begin = offset;
        offset += slice.len() as u64;
        pieces_of_slice(begin, gpa, slice)
    })
}

/// The pieces of one slice, which begins at byte `offset` of the data.
fn pieces_of_slice(
    offset: u64,
    gpa: u64,
    slice: VolatileSlice<'_>,
) -> impl Iterator<Item = Piece<'_>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = slice.len() - at;
        if left == 0 {
            return None;
        }
        let position = offset + at as u64;
        let first = (position % 8) as usize;
        let (shape, len) = if first == 0 && left >= 8 {
            (Shape::Whole, (left / 8).min(CHUNK_WORDS) * 8)
        } else {
            let end = (first + left).min(8);
            (Shape::Cut { first, end }, end - first)
        };
        let piece = Piece {
            word: position / 8,
            gpa: gpa + at as u64,
            slice: slice.subslice(at, len).expect("inside the slice"),
            shape,
        };
        at += len;
        Some(piece)
    })
}
