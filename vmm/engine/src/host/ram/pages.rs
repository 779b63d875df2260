//! A range of bytes, page by page.

use crate::mm::{Gfn, PAGE_SIZE};

/// The part of a byte range that lies in one page.
#[derive(Clone, Copy)]
pub(super) struct PagePart {
    pub(super) gfn: Gfn,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Splits the `len` bytes at `gpa` at page borders. The range does not wrap.
#[inline]
pub(super) fn pages(gpa: u64, len: u64) -> impl Iterator<Item = PagePart> {
    let end = gpa + len;
    let mut at = gpa;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let offset = at % PAGE_SIZE;
            let len = (PAGE_SIZE - offset).min(end - at);
            let part = PagePart {
                gfn: Gfn::of_gpa(at),
                offset,
                len,
            };
            at += len;
            part
        })
    })
}
