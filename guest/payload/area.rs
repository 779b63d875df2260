//! Access to guest memory that others read or write meanwhile.
//!
//! A snapshot may be taken between any two instructions and a device may write at any time, so every
//! access is volatile: none is invented, dropped, merged or moved across another by the compiler, and x86
//! keeps stores in program order for every observer.

/// `BYTES` bytes of guest memory.
#[derive(Clone, Copy)]
pub struct Area<const BYTES: u64> {
    gpa: u64,
}

/// A plain number, of which every bit pattern is a value.
///
/// # Safety
/// That must be so.
pub unsafe trait Number: Copy {}
// SAFETY: unsigned integers have no invalid values.
unsafe impl Number for u16 {}
// SAFETY: as above.
unsafe impl Number for u32 {}
// SAFETY: as above.
unsafe impl Number for u64 {}

impl<const BYTES: u64> Area<BYTES> {
    /// The area at `gpa`, a multiple of 8.
    ///
    /// # Safety
    /// `gpa..gpa + BYTES` must be mapped guest memory that is reached through areas only:
    /// no Rust object lies there.
    pub const unsafe fn new(gpa: u64) -> Self {
        Self { gpa }
    }

    /// Where the byte at `offset` is.
    pub const fn gpa(self, offset: u64) -> u64 {
        self.gpa + offset
    }

    /// The `PART` bytes at `offset`, a multiple of 8.
    pub const fn part<const PART: u64>(self, offset: u64) -> Area<PART> {
        assert!(offset.is_multiple_of(8) && PART <= BYTES && offset <= BYTES - PART);
        Area {
            gpa: self.gpa + offset,
        }
    }

    /// The number at `offset`, a multiple of its size.
    #[inline(always)]
    pub fn read<T: Number>(self, offset: u64) -> T {
        Self::check::<T>(offset);
        // SAFETY: inside the area and aligned, as checked; the area is mapped, as `new` demands.
        unsafe { ((self.gpa + offset) as *const T).read_volatile() }
    }

    /// Puts `value` at `offset`, a multiple of its size.
    #[inline(always)]
    pub fn write<T: Number>(self, offset: u64, value: T) {
        Self::check::<T>(offset);
        // SAFETY: as in `read`; no Rust object can be hit, as `new` demands.
        unsafe { ((self.gpa + offset) as *mut T).write_volatile(value) }
    }

    // Folds to nothing where the offset is a constant, or a loop's with constant bounds.
    #[inline(always)]
    fn check<T>(offset: u64) {
        let size = size_of::<T>() as u64;
        assert!(offset.is_multiple_of(size) && size <= BYTES && offset <= BYTES - size);
    }
}
