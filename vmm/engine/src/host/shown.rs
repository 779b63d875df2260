//! What the pages of a window show, packed.

use std::iter;
use std::ops::Range;

use crate::mm::{Protection, REGION_PAGES};

/// What a page shows. Neighbours share a mapping if they show the same thing: frames that follow each other,
/// or zeros.
///
/// Packed, since a fork looks at that of every page: bit 0 says that there is a frame, bit 1 that it is
/// writable, the bits from 2 on are `pfn - gfn`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shown(pub(super) i64);

impl Shown {
    pub(super) const ZEROS: Self = Self(0);
    pub(super) const FRAME: i64 = 1;
    pub(super) const WRITABLE: i64 = 2;

    #[inline]
    pub(super) fn frames(distance: i64, protection: Protection) -> Self {
        Self(distance << 2 | Self::FRAME).protected(protection)
    }

    #[inline]
    pub(super) fn protected(self, protection: Protection) -> Self {
        match protection {
            _ if self == Self::ZEROS => self,
            Protection::ReadOnly => Self(self.0 & !Self::WRITABLE),
            Protection::ReadWrite => Self(self.0 | Self::WRITABLE),
        }
    }
}

/// What the pages of a region show: runs of pages that are alike. A fork of a large guest has to look at many
/// regions, nearly all of which have one or three.
#[derive(Clone, Debug)]
pub(super) enum ShownRegion {
    /// All of it one run.
    Alike(Shown),
    /// By the first page of each run, the first of which is page 0. Neighbours differ.
    Mixed(Box<[(u16, Shown)]>),
}

impl ShownRegion {
    /// The runs, with the pages they have.
    #[inline]
    pub(super) fn runs(&self) -> impl Iterator<Item = (Range<u64>, Shown)> {
        let (alike, mixed) = match self {
            Self::Alike(shown) => (Some((0..REGION_PAGES, *shown)), &[][..]),
            Self::Mixed(runs) => (None, &runs[..]),
        };
        let ends = mixed.iter().skip(1).map(|&(first, _)| u64::from(first));
        let mixed = mixed.iter().zip(ends.chain([REGION_PAGES]));
        let mixed = mixed.map(|(&(first, shown), end)| (u64::from(first)..end, shown));
        alike.into_iter().chain(mixed)
    }

    #[inline]
    pub(super) fn get(&self, index: u64) -> Shown {
        match self {
            Self::Alike(shown) => *shown,
            Self::Mixed(runs) => {
                let after = runs.partition_point(|&(first, _)| u64::from(first) <= index);
                runs[after - 1].1
            }
        }
    }

    /// What the runs show that pages `range` are in.
    #[inline]
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Shown> {
        self.runs_within(range).map(|(_, shown)| shown)
    }

    /// The same, with the pages of `range` that show it.
    #[inline]
    pub(super) fn runs_within(
        &self,
        range: Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, Shown)> {
        self.runs()
            .map(move |(run, shown)| (run.start.max(range.start)..run.end.min(range.end), shown))
            .skip_while(|(run, _)| run.is_empty())
            .take_while(|(run, _)| !run.is_empty())
    }

    /// Has the pages `range` show something else.
    #[inline]
    pub(super) fn change(&mut self, range: Range<u64>, shows: impl Fn(Shown) -> Shown) {
        let mut runs: Vec<(u16, Shown)> = Vec::new();
        let mut add = |pages: Range<u64>, shown| {
            if !pages.is_empty() && runs.last().is_none_or(|&(_, last)| last != shown) {
                runs.push((pages.start as u16, shown));
            }
        };
        for (run, shown) in self.runs() {
            let clip = |at: u64| at.clamp(run.start, run.end);
            let (start, end) = (clip(range.start), clip(range.end));
            add(run.start..start, shown);
            add(start..end, shows(shown));
            add(end..run.end, shown);
        }
        *self = match runs[..] {
            [(_, shown)] => Self::Alike(shown),
            _ => Self::Mixed(runs.into()),
        };
    }
}

/// The parts of a range of pages by region: the region, and which of its pages.
pub(super) fn by_region(pages: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> {
    let mut at = pages.start;
    iter::from_fn(move || {
        (at < pages.end).then(|| {
            let (region, first) = (at / REGION_PAGES, at % REGION_PAGES);
            let last = REGION_PAGES.min(first + pages.end - at);
            at += last - first;
            (region as usize, first..last)
        })
    })
}

/// Mappings that a run of pages takes.
pub(super) fn mappings(pages: impl Iterator<Item = Shown>) -> u64 {
    let mut last = None;
    pages.fold(0, |count, page| {
        let begins = last.replace(page) != Some(page);
        count + u64::from(begins)
    })
}
