//! Pages that follow no formula: only that they do not change can be checked.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::ops::Range;

use xxhash_rust::xxh3::Xxh3Default;

use super::view::{Page, View, WORDS};
use super::violation::{Oracle, Violation};
use palimpsest::mm::Pfn;

/// What pages hashed to when a snapshot was first looked at. Untouched pages are not in it.
pub(super) type Hashes = HashMap<u64, u64>;

/// Hashes the touched pages of `gfns`, and counts them. Of pages that are in the same frame as in `parent`
/// the hash is taken over.
pub(super) fn first_look(
    view: View<'_>,
    gfns: Range<u64>,
    parent: Option<(View<'_>, &Hashes)>,
) -> (Hashes, u64) {
    let mut pages = 0;
    let hashes = gfns
        .filter_map(|gfn| {
            let frame = view.frame(gfn);
            if frame == Pfn::ZERO {
                return None;
            }
            let inherited = parent
                .filter(|(parent, _)| parent.frame(gfn) == frame)
                .and_then(|(_, hashes)| hashes.get(&gfn).copied());
            let hash = inherited.unwrap_or_else(|| {
                pages += 1;
                hash(view, gfn)
            });
            Some((gfn, hash))
        })
        .collect();
    (hashes, pages)
}

/// Hashes the pages again and compares. Pages that are in the same frame as in `heir`, whose parent this
/// snapshot is, are left to the last look at `heir`. Returns the pages it has looked at.
pub(super) fn last_look(
    view: View<'_>,
    hashes: &Hashes,
    heir: Option<View<'_>>,
    report: &mut dyn FnMut(Violation),
) -> u64 {
    let mut pages = 0;
    for (&gfn, &expected) in hashes {
        if heir.is_some_and(|h| h.frame(gfn) == view.frame(gfn)) {
            continue;
        }
        pages += 1;
        let found = hash(view, gfn);
        if found != expected {
            let mut v = Violation::new(
                Oracle::Isolation,
                "a page has changed since the snapshot was taken",
            );
            v.snapshot = Some(view.number);
            v.gpa = Some(gfn * guest::abi::PAGE_SIZE);
            v.expected = format!("hash {expected:#018x}");
            v.found = format!("hash {found:#018x}");
            v.frame = view.describe_frame(gfn);
            report(v);
        }
    }
    pages
}

/// What an untouched page would hash to.
pub(super) fn of_zeros() -> u64 {
    of(&[0; WORDS])
}

fn hash(view: View<'_>, gfn: u64) -> u64 {
    let mut page = [0; WORDS];
    view.page(gfn, &mut page);
    of(&page)
}

/// What a page of these words hashes to.
pub(super) fn of(page: &Page) -> u64 {
    let mut hasher = Xxh3Default::new();
    page.hash(&mut hasher);
    hasher.finish()
}
