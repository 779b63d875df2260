//! Where a guest's memory is for its code.

use std::ops::Range;

use crate::host::{LOWEST, Placement, Window};

/// The addresses by which guest code reaches its memory: those of its window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    /// That of gpa 0, whether anything is there or not.
    base: u64,
    /// Those that something is at.
    mapped: Range<u64>,
}

impl Addresses {
    /// Those of `window`. `None` if code cannot be executed there.
    pub(super) fn of(window: &Window) -> Option<Self> {
        let (base, len) = (window.host_address(), window.len());
        match window.placement() {
            Placement::Anywhere => None,
            Placement::AtGuestAddresses => Some(Self {
                base: 0,
                mapped: LOWEST..len,
            }),
            Placement::Executable => Some(Self {
                base,
                mapped: base..base + len,
            }),
        }
    }

    /// Where `address` is in guest memory, if it is.
    pub(super) fn gpa(&self, address: u64) -> Option<u64> {
        let is_mapped = self.mapped.contains(&address);
        is_mapped.then(|| address - self.base)
    }

    /// From where to where nothing but guest code is.
    pub(super) fn code(&self) -> Range<u64> {
        // Nobody has anything below guest addresses, wherever they begin.
        let start = if self.base == 0 { 0 } else { self.mapped.start };
        start..self.mapped.end
    }

    #[cfg(test)]
    pub(super) fn at_guest_addresses(len: u64) -> Self {
        Self {
            base: 0,
            mapped: LOWEST..len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_the_window() {
        let there = Addresses::at_guest_addresses(1 << 20);
        assert_eq!(there.gpa(LOWEST - 1), None);
        assert_eq!(there.gpa(LOWEST), Some(LOWEST));
        assert_eq!(there.gpa(1 << 20), None);
        assert_eq!(there.code(), 0..1 << 20);
        let base = 7 << 40;
        let elsewhere = Addresses {
            base,
            mapped: base..base + (1 << 20),
        };
        assert_eq!(elsewhere.gpa(base - 1), None);
        assert_eq!(elsewhere.gpa(base + 5), Some(5));
        assert_eq!(elsewhere.gpa(5), None);
        assert_eq!(elsewhere.code(), base..base + (1 << 20));
    }
}
