//! Dirty tracking: does it report every page that changed?
//!
//! Two snapshots in a row are compared: a page that differs between them was written, or restored, in the
//! time between, and so must be in one of the answers of that time. For that to be exact the last of them is
//! taken at the instant of the younger snapshot. Pages that were reported and do not differ are no mistake: a
//! device holds them, or a restore undid what was written.

use std::sync::Arc;

use guest::abi::PAGE_SIZE;

use super::hammer::Write;
use super::hashes::{self, Hashes};
use super::violation::{Oracle, Violation};
use crate::run_snapshot::RunSnapshot;
use palimpsest::mm::{Gfn, PageSet};

/// What a snapshot is compared with.
#[derive(Debug)]
pub struct Tracked {
    /// The snapshot taken before it, which has been looked at once and not for the last time.
    pub since: Arc<RunSnapshot>,
    /// What was reported from that one to this.
    pub reported: ReportedDirty,
}

/// The pages that dirty tracking has reported since a snapshot: all of its answers together.
#[derive(Clone, Debug)]
pub struct ReportedDirty {
    pages: Vec<bool>,
    len: u64,
}

impl ReportedDirty {
    /// None of the `pages` pages of a guest.
    pub fn nothing(pages: u64) -> Self {
        Self {
            pages: vec![false; pages as usize],
            len: 0,
        }
    }

    /// Adds an answer.
    pub fn add(&mut self, answer: &PageSet) {
        answer.iter().for_each(|gfn| self.insert(gfn));
    }

    /// Adds all of an answer but page `forgotten`, if that is in it: an injected fault.
    pub fn add_all_but(&mut self, answer: &PageSet, forgotten: Gfn) {
        answer
            .iter()
            .filter(|&gfn| gfn != forgotten)
            .for_each(|gfn| self.insert(gfn));
    }

    fn insert(&mut self, gfn: Gfn) {
        let reported = &mut self.pages[gfn.0 as usize];
        self.len += u64::from(!*reported);
        *reported = true;
    }

    fn contains(&self, gfn: u64) -> bool {
        self.pages
            .get(gfn as usize)
            .is_some_and(|&reported| reported)
    }
}

/// Looks for pages that differ between two snapshots, and were not reported.
pub(super) struct UnreportedDirty<'a> {
    pub(super) reported: &'a ReportedDirty,
    /// Number of the older snapshot.
    pub(super) since: u64,
    /// Number of the younger.
    pub(super) snapshot: u64,
}

impl UnreportedDirty<'_> {
    /// Looks at pages that must differ, by what wrote them.
    pub(super) fn among(
        &self,
        written: impl Iterator<Item = Write>,
        report: &mut dyn FnMut(Violation),
    ) {
        for Write { gfn, vcpu, op } in written {
            self.look(gfn, || format!("vcpu {vcpu}, operation {op}"), report);
        }
    }

    /// Looks at pages of which there are only hashes.
    pub(super) fn hashed(&self, old: &Hashes, new: &Hashes, report: &mut dyn FnMut(Violation)) {
        let zeros = hashes::of_zeros();
        let of = |hashes: &Hashes, gfn| hashes.get(&gfn).copied().unwrap_or(zeros);
        let gone = old.keys().filter(|gfn| !new.contains_key(gfn));
        for &gfn in new.keys().chain(gone) {
            if of(old, gfn) != of(new, gfn) {
                self.look(gfn, String::new, report);
            }
        }
    }

    fn look(&self, gfn: u64, writer: impl FnOnce() -> String, report: &mut dyn FnMut(Violation)) {
        if self.reported.contains(gfn) {
            return;
        }
        let mut v = Violation::new(
            Oracle::Tracking,
            format!(
                "a page differs from snapshot {} and was not told of as dirty",
                self.since
            ),
        );
        v.snapshot = Some(self.snapshot);
        v.gpa = Some(gfn * PAGE_SIZE);
        v.expected = "in an answer since".to_owned();
        v.found = format!("{} pages in the answers, without it", self.reported.len);
        v.last_writer = writer();
        report(v);
    }
}
