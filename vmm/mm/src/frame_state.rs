//! The state of a frame: the fields of its packed word, and what their values mean together.
//!
//! # States of a frame
//! | maps | gets | pins | exclusive | state |
//! |---|---|---|---|---|
//! | 0 | 0 | 0 | no | **free**, or allocated and not mapped yet |
//! | 1 | any | any | yes | **exclusive**: one address space owns it; COW is disabled; pins are granted |
//! | 1 or more | any | 0 | no | **possibly shared**: not to be written; a break reuses it if it is the last |
//! | 0 | any | any | no | **held**: an orphan, or a copy that is not mapped yet; freed by the last holder |
//!
//! Never: exclusive with `maps != 1`; a pin *granted* on a frame that is not exclusive (the weaker policies
//! do that, which is their bug).
//!
//! A frame may also be mapped as a part of a **huge folio** (`folio.rs`): its word has the *part* mark then,
//! which counts as one more mapping, and the folio's word says how many huge entries there are and whether
//! they are exclusive. Holds are counted here all the same, page by page.

use std::fmt;

/// A field of the packed word: `bits` bits from bit `shift` on.
pub(super) struct Field {
    shift: u32,
    bits: u32,
}

impl Field {
    #[inline]
    pub(super) const fn after(previous: &Field, bits: u32) -> Self {
        Self {
            shift: previous.shift + previous.bits,
            bits,
        }
    }
    #[inline]
    pub(super) const fn max(&self) -> u64 {
        (1 << self.bits) - 1
    }
    #[inline]
    pub(super) const fn one(&self) -> u64 {
        1 << self.shift
    }
    #[inline]
    pub(super) const fn of(&self, word: u64) -> u64 {
        (word >> self.shift) & self.max()
    }
}

pub(super) const MAPS: Field = Field { shift: 0, bits: 24 };
pub(super) const GETS: Field = Field::after(&MAPS, 16);
pub(super) const PINS: Field = Field::after(&GETS, 20);
const EXCLUSIVE: Field = Field::after(&PINS, 1);
/// Part of a huge folio that somebody maps by a huge entry.
const PART: Field = Field::after(&EXCLUSIVE, 1);
const _: () = assert!(PART.shift + PART.bits <= 64);

/// What is known of a frame at one instant: a value of its packed word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FrameState(u64);

impl FrameState {
    pub(super) const FREE: Self = Self(0);
    /// Part of a huge folio, and nothing else.
    pub(super) const FOLIO_PART: Self = Self(PART.one());

    #[inline]
    pub(super) const fn of_word(word: u64) -> Self {
        Self(word)
    }
    #[inline]
    pub(super) const fn word(self) -> u64 {
        self.0
    }

    /// Shadow page-table entries that map the frame, over all address spaces. While it is part of a folio
    /// that huge entries map, they count as one in the frame's own word.
    #[inline]
    pub const fn maps(self) -> u64 {
        MAPS.of(self.0) + PART.of(self.0)
    }
    /// Whether huge entries map it, among others perhaps.
    #[inline]
    pub(super) const fn is_part(self) -> bool {
        PART.of(self.0) != 0
    }
    /// The state of a page, from its own word and what its folio's says: `huge` entries map it, exclusively
    /// or not.
    #[inline]
    pub(super) const fn in_folio(self, huge: u64, exclusive: bool) -> Self {
        let maps = MAPS.of(self.0) + huge;
        let rest = self.0 & !(MAPS.max() << MAPS.shift) & !PART.one() & !EXCLUSIVE.one();
        Self(rest | maps | if exclusive { EXCLUSIVE.one() } else { 0 })
    }
    #[inline]
    pub(super) const fn part(self) -> Self {
        Self(self.0 | PART.one())
    }
    #[inline]
    pub(super) const fn whole(self) -> Self {
        Self(self.0 & !PART.one())
    }
    /// Transient readers (`FOLL_GET`).
    #[inline]
    pub const fn gets(self) -> u64 {
        GETS.of(self.0)
    }
    /// Device holds (`FOLL_PIN`), exact.
    #[inline]
    pub const fn pins(self) -> u64 {
        PINS.of(self.0)
    }
    /// All holds together: what the kernel calls the reference count.
    #[inline]
    pub const fn refs(self) -> u64 {
        self.maps() + self.gets() + self.pins()
    }
    /// The exclusive bit (`PageAnonExclusive`): one address space owns the frame, COW is disabled.
    #[inline]
    pub const fn is_exclusive(self) -> bool {
        EXCLUSIVE.of(self.0) != 0
    }

    /// The same with another number of pins.
    ///
    /// # Panics
    /// If the field does not hold so many.
    #[inline]
    pub const fn with_pins(self, pins: u64) -> Self {
        assert!(pins <= PINS.max());
        Self(self.0 & !(PINS.max() << PINS.shift) | pins << PINS.shift)
    }

    /// Possibly shared, with as many mappings as can be counted.
    #[cfg(test)]
    pub(super) const FULL: Self = Self(MAPS.max() << MAPS.shift);

    #[inline]
    pub(super) const fn exclusive(self) -> Self {
        Self(self.0 | EXCLUSIVE.one())
    }
    #[inline]
    pub(super) const fn possibly_shared(self) -> Self {
        Self(self.0 & !EXCLUSIVE.one())
    }
    /// Whether mappings are all that holds it.
    #[inline]
    pub(super) const fn is_idle(self) -> bool {
        self.gets() == 0 && self.pins() == 0
    }

    /// After a mapping went: what nobody maps belongs to no address space (I2).
    #[inline]
    pub(super) fn unmapped(self) -> Self {
        if self.maps() == 0 {
            self.possibly_shared()
        } else {
            self
        }
    }

    #[inline]
    pub(super) fn plus(self, field: &Field) -> Option<Self> {
        (field.of(self.0) < field.max()).then(|| Self(self.0 + field.one()))
    }
    #[inline]
    pub(super) fn minus(self, field: &Field) -> Self {
        debug_assert!(field.of(self.0) > 0, "count below zero: {self:?}");
        Self(self.0 - field.one())
    }
}

impl fmt::Debug for FrameState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{{maps {}, gets {}, pins {}, {}}}",
            self.maps(),
            self.gets(),
            self.pins(),
            if self.is_exclusive() {
                "exclusive"
            } else {
                "possibly shared"
            }
        )
    }
}
