//! Room for the content of a chunk, that begins at a page.
//!
//! What a large `Vec` has begins 16 bytes behind a page, and the kernel, which copies by `rep movsb`, may take ten times
//! as long to read a file to there: 1.5 µs a page, where it takes 0.15.

use std::ops::{Deref, DerefMut};

const PAGE: usize = 4096;

/// Bytes, the first of which is the first of a page.
#[derive(Debug, Default)]
pub struct Buffer {
    /// The buffer and what is before it.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Room for `len` bytes, which are zeros.
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + PAGE - 1];
        Self {
            start: bytes.as_ptr().align_offset(PAGE),
            bytes,
            len,
        }
    }

    /// Has room for `len` bytes, with anything in them.
    pub(crate) fn resize(&mut self, len: usize) {
        match self.start + len <= self.bytes.len() {
            true => self.len = len,
            false => *self = Self::new(len),
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_page_and_has_the_length_that_was_asked_for() {
        let mut buffer = Buffer::default();
        assert!(buffer.is_empty());
        // On the heap and in mappings of their own; longer, shorter, and longer again.
        for len in [1, 100, 4096, 2 << 20, 5000, 4 << 20, 0, 17] {
            buffer.resize(len);
            assert_eq!((buffer.len(), buffer.as_ptr().addr() % PAGE), (len, 0));
            buffer.fill(7);
            let new = Buffer::new(len);
            assert_eq!((new.len(), new.as_ptr().addr() % PAGE), (len, 0));
            assert!(new.iter().all(|&byte| byte == 0));
            // Where it is moved to it begins at a page still.
            let moved = Box::new(new);
            assert_eq!(moved.as_ptr().addr() % PAGE, 0);
        }
    }
}
