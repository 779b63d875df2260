//! Numbers of bytes for people.

use std::fmt;

/// A number of bytes, displayed exactly, in the largest unit that divides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (3 << 10, "3 KiB"),
            (256 << 20, "256 MiB"),
            (1 << 40, "1 TiB"),
            ((1 << 30) + 512, "1073742336 B"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
