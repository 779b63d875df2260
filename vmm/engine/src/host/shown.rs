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
    /// Nothing is mapped: what is written without being a frame.
    pub(super) const NOTHING: Self = Self(Self::WRITABLE);
    /// Nothing may be seen: what is mapped may not be touched.
    pub(super) const HIDDEN: Self = Self(1 << 2);
    pub(super) const FRAME: i64 = 1;
    pub(super) const WRITABLE: i64 = 2;

    #[inline]
    pub(super) fn frames(distance: i64, protection: Protection) -> Self {
        Self(distance << 2 | Self::FRAME).protected(protection)
    }

    #[inline]
    pub(super) fn protected(self, protection: Protection) -> Self {
        match protection {
            _ if self.0 & Self::FRAME == 0 => self,
            Protection::ReadOnly => Self(self.0 & !Self::WRITABLE),
            Protection::ReadWrite => Self(self.0 | Self::WRITABLE),
        }
    }
}

/// Regions of a group.
const GROUP: u64 = 64;
/// Pages of a group.
const GROUP_PAGES: u64 = GROUP * REGION_PAGES;

/// What all pages of a window show. Regions are noted in groups, so that what is alike over many of them, as
/// all of a clone's memory may be, takes few looks.
#[derive(Debug)]
pub(super) struct ShownPages {
    groups: Box<[ShownGroup]>,
}

/// What the regions of a group show; the last group may be shorter.
#[derive(Clone, Debug)]
enum ShownGroup {
    /// All of them one run.
    Alike(Shown),
    Regions(Box<[ShownRegion]>),
}

impl ShownPages {
    /// So many pages that show this.
    pub(super) fn all(pages: u64, shown: Shown) -> Self {
        let groups = pages.div_ceil(GROUP_PAGES) as usize;
        Self {
            groups: vec![ShownGroup::Alike(shown); groups].into(),
        }
    }

    /// What one page shows.
    #[inline]
    pub(super) fn get(&self, page: u64) -> Shown {
        match &self.groups[(page / GROUP_PAGES) as usize] {
            ShownGroup::Alike(shown) => *shown,
            ShownGroup::Regions(regions) => {
                let page = page % GROUP_PAGES;
                regions[(page / REGION_PAGES) as usize].get(page % REGION_PAGES)
            }
        }
    }

    /// What pages `range` show, run by run. Runs that follow each other may be alike.
    #[inline]
    pub(super) fn runs_within(
        &self,
        range: Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, Shown)> {
        parts(range, GROUP_PAGES).flat_map(|(group, pages)| {
            let start = group as u64 * GROUP_PAGES;
            let (alike, regions) = match &self.groups[group] {
                ShownGroup::Alike(shown) => (Some((pages.clone(), *shown)), &[][..]),
                ShownGroup::Regions(regions) => (None, &regions[..]),
            };
            // Nobody looks at the regions of a group without any.
            let pages = if regions.is_empty() { 0..0 } else { pages };
            let mixed = parts(pages, REGION_PAGES).flat_map(move |(region, pages)| {
                let first = region as u64 * REGION_PAGES;
                let runs = regions[region].runs_within(pages);
                runs.map(move |(run, shown)| (first + run.start..first + run.end, shown))
            });
            let runs = alike.into_iter().chain(mixed);
            runs.map(move |(run, shown)| (start + run.start..start + run.end, shown))
        })
    }

    /// Has the pages `range` show something else.
    #[inline]
    pub(super) fn change(&mut self, range: Range<u64>, shows: impl Fn(Shown) -> Shown) {
        for (group, pages) in parts(range, GROUP_PAGES) {
            self.groups[group].change(pages, &shows);
        }
    }

    /// Bytes of memory that this takes.
    pub(super) fn size(&self) -> usize {
        let of_region = |region: &ShownRegion| match region {
            ShownRegion::Alike(_) => 0,
            ShownRegion::Mixed(runs) => size_of_val::<[(u16, Shown)]>(runs),
        };
        let of_group = |group: &ShownGroup| match group {
            ShownGroup::Alike(_) => 0,
            ShownGroup::Regions(regions) => {
                size_of_val::<[ShownRegion]>(regions) + regions.iter().map(of_region).sum::<usize>()
            }
        };
        size_of_val::<[ShownGroup]>(&self.groups) + self.groups.iter().map(of_group).sum::<usize>()
    }
}

impl ShownGroup {
    fn change(&mut self, range: Range<u64>, shows: impl Fn(Shown) -> Shown) {
        let is_all = range == (0..GROUP_PAGES);
        let regions = match self {
            Self::Alike(shown) if is_all => return *shown = shows(*shown),
            Self::Alike(shown) => {
                let regions = vec![ShownRegion::Alike(*shown); GROUP as usize];
                *self = Self::Regions(regions.into());
                return self.change(range, shows);
            }
            Self::Regions(regions) => regions,
        };
        for (region, pages) in parts(range, REGION_PAGES) {
            regions[region].change(pages, &shows);
        }
        let alike = |region: &ShownRegion| match region {
            ShownRegion::Alike(shown) => Some(*shown),
            ShownRegion::Mixed(_) => None,
        };
        // They may have become alike in other ways: that is not worth a look at each change.
        if is_all
            && let Some(first) = alike(&regions[0])
            && regions.iter().all(|region| alike(region) == Some(first))
        {
            *self = Self::Alike(first);
        }
    }
}

/// What the pages of a region show: runs of pages that are alike. A fork of a large guest has to look at many
/// regions, nearly all of which have one or three.
#[derive(Clone, Debug)]
enum ShownRegion {
    /// All of it one run.
    Alike(Shown),
    /// By the first page of each run, the first of which is page 0. Neighbours differ.
    Mixed(Box<[(u16, Shown)]>),
}

impl ShownRegion {
    /// The runs, with the pages they have.
    #[inline]
    fn runs(&self) -> impl Iterator<Item = (Range<u64>, Shown)> {
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
    fn get(&self, index: u64) -> Shown {
        match self {
            Self::Alike(shown) => *shown,
            Self::Mixed(runs) => {
                let after = runs.partition_point(|&(first, _)| u64::from(first) <= index);
                runs[after - 1].1
            }
        }
    }

    /// What the runs show that pages `range` are in, with the pages of `range` that show it.
    #[inline]
    fn runs_within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Shown)> {
        self.runs()
            .map(move |(run, shown)| (run.start.max(range.start)..run.end.min(range.end), shown))
            .skip_while(|(run, _)| run.is_empty())
            .take_while(|(run, _)| !run.is_empty())
    }

    /// Has the pages `range` show something else.
    #[inline]
    fn change(&mut self, range: Range<u64>, shows: impl Fn(Shown) -> Shown) {
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

/// The parts of a range of pages by units of so many pages: the unit, and which of its pages.
#[inline]
fn parts(pages: Range<u64>, each: u64) -> impl Iterator<Item = (usize, Range<u64>)> {
    let mut at = pages.start;
    iter::from_fn(move || {
        (at < pages.end).then(|| {
            let (unit, first) = (at / each, at % each);
            let last = each.min(first + pages.end - at);
            at += last - first;
            (unit as usize, first..last)
        })
    })
}

/// Mappings that a run of pages takes.
pub(super) fn mappings(pages: impl Iterator<Item = Shown>) -> u64 {
    let mut last = None;
    pages.fold(0, |count, page| {
        let begins = last.replace(page) != Some(page) && page != Shown::NOTHING;
        count + u64::from(begins)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 2 * GROUP_PAGES + 3 * REGION_PAGES + 7;

    /// All pages, one by one.
    fn each(shown: &ShownPages) -> Vec<Shown> {
        (0..PAGES).map(|page| shown.get(page)).collect()
    }

    #[test]
    fn what_is_noted_in_groups_is_what_each_page_shows() {
        let mut pages = ShownPages::all(PAGES, Shown::ZEROS);
        let mut model = vec![Shown::ZEROS; PAGES as usize];
        let frames = |distance| move |_| Shown::frames(distance, Protection::ReadOnly);
        let writable = |shown: Shown| shown.protected(Protection::ReadWrite);
        type Change<'a> = (Range<u64>, &'a dyn Fn(Shown) -> Shown);
        let changes: [Change<'_>; 8] = [
            (0..PAGES, &frames(5)),
            (GROUP_PAGES + 3..GROUP_PAGES + 4, &writable),
            (GROUP_PAGES - 1..GROUP_PAGES + 2, &writable),
            (7..PAGES - 1, &writable),
            (REGION_PAGES..2 * GROUP_PAGES, &|_| Shown::ZEROS),
            (0..GROUP_PAGES, &frames(-3)),
            (PAGES - 1..PAGES, &frames(9)),
            (0..PAGES, &frames(6)),
        ];
        for (range, shows) in changes {
            pages.change(range.clone(), shows);
            for page in range.clone() {
                model[page as usize] = shows(model[page as usize]);
            }
            assert_eq!(each(&pages), model, "{range:?}");
            for within in [0..PAGES, 1..GROUP_PAGES + 2, PAGES - 9..PAGES, 6..7] {
                let runs = pages.runs_within(within.clone());
                let found: Vec<_> = runs
                    .flat_map(|(run, s)| run.map(move |page| (page, s)))
                    .collect();
                let expected: Vec<_> = within.map(|page| (page, model[page as usize])).collect();
                assert_eq!(found, expected, "{range:?}");
            }
        }
    }

    /// As much as is needed for pages that are alike, and again once they are.
    #[test]
    fn pages_that_are_alike_take_little() {
        let frames = |_| Shown::frames(5, Protection::ReadOnly);
        let mut pages = ShownPages::all(2 * GROUP_PAGES, Shown::ZEROS);
        let least = pages.size();
        pages.change(0..2 * GROUP_PAGES, frames);
        assert_eq!(pages.size(), least);
        assert_eq!(pages.runs_within(0..2 * GROUP_PAGES).count(), 2);
        pages.change(3..4, |_| Shown::ZEROS);
        assert!(pages.size() > least);
        assert_eq!(
            pages.runs_within(0..GROUP_PAGES).count(),
            GROUP as usize + 2
        );
        pages.change(0..GROUP_PAGES, frames);
        assert_eq!(pages.size(), least);
    }
}
