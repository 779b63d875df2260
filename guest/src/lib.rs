//! Guest programs for Palimpsest, and the contract they share with the VMM.
//!
//! A guest here is a static ELF that runs in ring 3 with no kernel under it. There are five:
//!
//! - [`PAYLOAD`] fills its memory by a formula and checks it by the same formula, while it drives DMA
//!   devices. What its memory must hold at any instant follows from a few numbers, so a snapshot of it can be
//!   checked bit for bit.
//! - [`MISBEHAVE`] does one of the wrong things a guest can do, to test how the VMM takes it.
//! - [`PUPPET`] does one access to memory after another, as the VMM tells it, for scenarios.
//! - [`SWEEP`] writes its memory in a pattern and times itself, for measurements: see [`sweep`].
//! - [`DRILL`] does one thing over and over which is hard on a VMM, and checks itself: see [`Drill`].
//!
//! [`abi`] is how a guest is entered, where its things are and how it speaks to the VMM; [`formula`] is what
//! it writes, and [`draws`] how it draws random numbers. All are compiled into the guests from the same
//! source as into this crate. The build script compiles the guests with the same compiler as the rest, for
//! `x86_64-unknown-linux-gnu`, whatever flags or profile the rest is built with.

/// The example of the README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}

pub mod abi;
pub mod draws;
mod drill;
pub mod formula;
mod misbehaviour;
pub mod registers;
pub mod sweep;

pub use drill::Drill;
pub use misbehaviour::Misbehaviour;

/// Gives `bytes` the alignment that an ELF's headers have.
#[repr(C, align(8))]
struct Aligned<Bytes: ?Sized> {
    bytes: Bytes,
}

/// The ELF of the payload.
pub const PAYLOAD: &[u8] = {
    const FILE: &Aligned<[u8]> = &Aligned {
        bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/payload")),
    };
    &FILE.bytes
};

/// The ELF of the guest that does one of [`Misbehaviour`].
pub const MISBEHAVE: &[u8] = {
    const FILE: &Aligned<[u8]> = &Aligned {
        bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/misbehave")),
    };
    &FILE.bytes
};

/// The ELF of the guest that does what it is told: see [`abi::Mail`].
pub const PUPPET: &[u8] = {
    const FILE: &Aligned<[u8]> = &Aligned {
        bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/puppet")),
    };
    &FILE.bytes
};

/// The ELF of the guest that measures: see [`sweep`].
pub const SWEEP: &[u8] = {
    const FILE: &Aligned<[u8]> = &Aligned {
        bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/sweep")),
    };
    &FILE.bytes
};

/// The ELF of the guest that does one [`Drill`].
pub const DRILL: &[u8] = {
    const FILE: &Aligned<[u8]> = &Aligned {
        bytes: *include_bytes!(concat!(env!("OUT_DIR"), "/drill")),
    };
    &FILE.bytes
};

#[cfg(test)]
mod tests {
    use super::*;
    use abi::{IMAGE_GPA, PAGE_SIZE};

    const GUESTS: [(&str, &[u8]); 5] = [
        ("payload", PAYLOAD),
        ("misbehave", MISBEHAVE),
        ("puppet", PUPPET),
        ("sweep", SWEEP),
        ("drill", DRILL),
    ];

    const PT_LOAD: u64 = 1;
    const PT_DYNAMIC: u64 = 2;
    const PT_INTERP: u64 = 3;
    const SHT_RELA: u64 = 4;
    const SHT_DYNAMIC: u64 = 6;
    const SHT_REL: u64 = 9;
    const PF_X: u64 = 1;
    const PF_W: u64 = 2;

    /// The little-endian number of `size` bytes at `offset`.
    fn number(file: &[u8], offset: u64, size: u64) -> u64 {
        file[offset as usize..(offset + size) as usize]
            .iter()
            .rev()
            .fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// Offsets of the headers in a table, from where the ELF header keeps its offset, entry size and length.
    fn table(file: &[u8], offset: u64, size: u64, len: u64) -> impl Iterator<Item = u64> {
        let (offset, size, len) = (
            number(file, offset, 8),
            number(file, size, 2),
            number(file, len, 2),
        );
        (0..len).map(move |index| offset + index * size)
    }

    fn segments(file: &[u8]) -> impl Iterator<Item = u64> {
        table(file, 32, 54, 56)
    }

    #[test]
    fn guests_are_static_64_bit_elves() {
        for (name, file) in GUESTS {
            assert_eq!(file.as_ptr().addr() % 8, 0, "{name}");
            assert_eq!(
                file[..7],
                *b"\x7fELF\x02\x01\x01",
                "{name}: 64-bit, little-endian"
            );
            assert_eq!(number(file, 16, 2), 2, "{name}: ET_EXEC");
            assert_eq!(number(file, 18, 2), 62, "{name}: x86-64");
            assert!(number(file, 24, 8) >= IMAGE_GPA, "{name}: entry point");
            for segment in segments(file) {
                let kind = number(file, segment, 4);
                assert!(kind != PT_DYNAMIC && kind != PT_INTERP, "{name}");
            }
            for section in table(file, 40, 58, 60) {
                let kind = number(file, section + 4, 4);
                assert!(![SHT_RELA, SHT_DYNAMIC, SHT_REL].contains(&kind), "{name}");
            }
        }
    }

    #[test]
    fn segments_lie_where_the_abi_says() {
        for (name, file) in GUESTS {
            let entry = number(file, 24, 8);
            let mut has_entry = false;
            for segment in segments(file).filter(|&at| number(file, at, 4) == PT_LOAD) {
                let flags = number(file, segment + 4, 4);
                let gva = number(file, segment + 16, 8);
                let gpa = number(file, segment + 24, 8);
                let file_len = number(file, segment + 32, 8);
                let len = number(file, segment + 40, 8);
                assert_eq!(gva, gpa, "{name}");
                assert!(
                    gpa >= IMAGE_GPA && gpa.is_multiple_of(PAGE_SIZE),
                    "{name}: {gpa:#x}"
                );
                assert!(len > 0 && file_len <= len, "{name}");
                assert_ne!(flags & (PF_W | PF_X), PF_W | PF_X, "{name}: {gpa:#x}");
                has_entry |= flags & PF_X != 0 && (gva..gva + len).contains(&entry);
            }
            assert!(has_entry, "{name}");
        }
    }

    #[test]
    fn drills_have_their_numbers() {
        for drill in Drill::ALL {
            assert_eq!(Drill::from_raw(drill as u64), Some(drill));
        }
        let known = (0..100).filter_map(Drill::from_raw).count();
        assert_eq!(known, Drill::ALL.len());
    }

    #[test]
    fn misbehaviours_have_their_numbers() {
        for raw in 0..100 {
            match Misbehaviour::from_raw(raw) {
                Some(misbehaviour) => assert_eq!(misbehaviour as u64, raw),
                None => assert!(raw == 0 || raw > 13),
            }
        }
    }
}
