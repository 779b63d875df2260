//! Pages that follow no formula: only that they do not change can be checked.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::ops::Range;

use xxhash_rust::xxh3::Xxh3Default;

use super::view::{Page, View};
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
    let mut hash_of = |gfn| {
        pages += 1;
        hash(view, gfn)
    };
    let Some((parent, known)) = parent else {
        let touched = gfns.filter(|&gfn| view.frame(gfn) != Pfn::ZERO);
        let hashes = touched.map(|gfn| (gfn, hash_of(gfn))).collect();
        return (hashes, pages);
    };
    let differing = view.differing(&parent, gfns.clone());
    // What the parent knows may be of more pages: of all, before the guest followed a formula.
    let mut hashes: Hashes = known
        .iter()
        .filter(|(gfn, _)| gfns.contains(gfn))
        .map(|(&gfn, &hash)| (gfn, hash))
        .collect();
    for gfn in differing {
        match view.frame(gfn) {
            Pfn::ZERO => hashes.remove(&gfn),
            _ => hashes.insert(gfn, hash_of(gfn)),
        };
    }
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
    let known = |gfn: u64| Some((gfn, *hashes.get(&gfn)?));
    let to_look_at: Vec<(u64, u64)> = match heir {
        Some(heir) => {
            let end = hashes.keys().max().map_or(0, |last| last + 1);
            let differing = view.differing(&heir, 0..end);
            differing.into_iter().filter_map(known).collect()
        }
        None => hashes.iter().map(|(&gfn, &hash)| (gfn, hash)).collect(),
    };
    for (gfn, expected) in to_look_at {
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
    of(&Page::zeros())
}

fn hash(view: View<'_>, gfn: u64) -> u64 {
    let mut page = Page::zeros();
    view.page(gfn, &mut page);
    of(&page)
}

/// What a page of these words hashes to.
pub(super) fn of(page: &Page) -> u64 {
    let mut hasher = Xxh3Default::new();
    page.hash(&mut hasher);
    hasher.finish()
}
