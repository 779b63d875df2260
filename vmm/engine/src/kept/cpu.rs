//! Which features a guest has seen, and which of them are not here.
//!
//! A guest looks at CPUID when it likes, and keeps what it has seen: it must find each feature for ever. More than
//! it has seen does not harm.

use std::arch::x86_64::__cpuid_count;
use std::collections::BTreeMap;

use kvm_bindings::CpuId;

use crate::kept::store::Cpu;

/// A register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

/// The words of CPUID each bit of which is something that a guest may use, without those bits that are not.
const WORDS: [(u32, u32, Register, u32); 11] = [
    // Without OSXSAVE, which says what a system has done, and the bit of hypervisors.
    (1, 0, Ecx, !(1 << 27 | 1 << 31)),
    // Without that of interrupts' controller, which a system may turn off.
    (1, 0, Edx, !(1 << 9)),
    (7, 0, Ebx, !0),
    // Without OSPKE.
    (7, 0, Ecx, !(1 << 4)),
    (7, 0, Edx, !0),
    (7, 1, Eax, !0),
    // What XCR0 may have.
    (0xd, 0, Eax, !0),
    (0xd, 1, Eax, !0),
    (0x8000_0001, 0, Ecx, !0),
    (0x8000_0001, 0, Edx, !0),
    (0x8000_0008, 0, Ebx, !0),
];

/// Features that people know by name.
const NAMES: [(&str, u32, &str); 38] = [
    ("1.0.ecx", 0, "sse3"),
    ("1.0.ecx", 1, "pclmulqdq"),
    ("1.0.ecx", 9, "ssse3"),
    ("1.0.ecx", 12, "fma"),
    ("1.0.ecx", 13, "cx16"),
    ("1.0.ecx", 17, "pcid"),
    ("1.0.ecx", 19, "sse4.1"),
    ("1.0.ecx", 20, "sse4.2"),
    ("1.0.ecx", 21, "x2apic"),
    ("1.0.ecx", 22, "movbe"),
    ("1.0.ecx", 23, "popcnt"),
    ("1.0.ecx", 24, "tsc-deadline"),
    ("1.0.ecx", 25, "aes"),
    ("1.0.ecx", 26, "xsave"),
    ("1.0.ecx", 28, "avx"),
    ("1.0.ecx", 29, "f16c"),
    ("1.0.ecx", 30, "rdrand"),
    ("7.0.ebx", 0, "fsgsbase"),
    ("7.0.ebx", 3, "bmi1"),
    ("7.0.ebx", 4, "hle"),
    ("7.0.ebx", 5, "avx2"),
    ("7.0.ebx", 8, "bmi2"),
    ("7.0.ebx", 9, "erms"),
    ("7.0.ebx", 10, "invpcid"),
    ("7.0.ebx", 11, "rtm"),
    ("7.0.ebx", 16, "avx512f"),
    ("7.0.ebx", 17, "avx512dq"),
    ("7.0.ebx", 18, "rdseed"),
    ("7.0.ebx", 19, "adx"),
    ("7.0.ebx", 29, "sha"),
    ("7.0.ebx", 30, "avx512bw"),
    ("7.0.ebx", 31, "avx512vl"),
    ("7.0.ecx", 8, "gfni"),
    ("7.0.ecx", 9, "vaes"),
    ("7.0.edx", 24, "amx-tile"),
    ("80000001.0.ecx", 6, "sse4a"),
    ("80000001.0.edx", 26, "1g-pages"),
    ("80000001.0.edx", 27, "rdtscp"),
];

/// CPUID as somebody sees it.
trait Cpuid {
    /// EAX, EBX, ECX and EDX of a leaf; zeros if there is none.
    fn leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4];
}

/// That of this CPU: of a guest that is code of this process.
struct Own;

impl Cpuid for Own {
    fn leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let most = __cpuid_count(leaf & 0x8000_0000, 0).eax;
        if leaf > most {
            return [0; 4];
        }
        let found = __cpuid_count(leaf, subleaf);
        [found.eax, found.ebx, found.ecx, found.edx]
    }
}

impl Cpuid for CpuId {
    fn leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let entries = self.as_slice().iter();
        let mut found = entries.filter(|entry| (entry.function, entry.index) == (leaf, subleaf));
        found
            .next()
            .map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    }
}

/// The CPU that guests see who are code of this process.
pub(super) fn own() -> Cpu {
    seen(&Own)
}

/// The CPU that guests see who have this CPUID.
pub(super) fn of_cpuid(cpuid: &CpuId) -> Cpu {
    seen(cpuid)
}

fn seen(cpuid: &dyn Cpuid) -> Cpu {
    let text = |words: &[u32]| {
        let bytes = words.iter().flat_map(|word| word.to_le_bytes());
        let letters = bytes.filter(|byte| byte.is_ascii_graphic() || *byte == b' ');
        String::from_iter(letters.map(char::from)).trim().to_owned()
    };
    let [_, ebx, ecx, edx] = cpuid.leaf(0, 0);
    // For people, who know the host's: not every KVM gives it to guests.
    let brand = (0x8000_0002..=0x8000_0004).flat_map(|leaf| Own.leaf(leaf, 0));
    let features = WORDS.map(|(leaf, subleaf, register, mask)| {
        let [eax, ebx, ecx, edx] = cpuid.leaf(leaf, subleaf);
        let (name, word) = match register {
            Eax => ("eax", eax),
            Ebx => ("ebx", ebx),
            Ecx => ("ecx", ecx),
            Edx => ("edx", edx),
        };
        (
            format!("{leaf:x}.{subleaf:x}.{name}"),
            format!("{:#x}", word & mask),
        )
    });
    Cpu {
        vendor: text(&[ebx, edx, ecx]),
        brand: text(&Vec::from_iter(brand)),
        features: BTreeMap::from(features),
    }
}

/// The features that a guest has seen on `theirs` and would not find on `ours`. `None` if what was stored is no
/// words of features.
pub(super) fn missing(theirs: &Cpu, ours: &Cpu) -> Option<Vec<String>> {
    let mut missing = Vec::new();
    for (word, bits) in &theirs.features {
        let theirs = bits_of(bits)?;
        let ours = ours.features.get(word).and_then(|bits| bits_of(bits));
        let gone = theirs & !ours.unwrap_or(0);
        missing.extend((0..32).filter(|bit| gone & 1 << bit != 0).map(|bit| {
            let named = NAMES
                .iter()
                .find(|(in_word, at, _)| (*in_word, *at) == (word, bit));
            match named {
                Some((_, _, name)) => (*name).to_owned(),
                None => format!("bit {bit} of cpuid {}", word.escape_debug()),
            }
        }));
    }
    Some(missing)
}

fn bits_of(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_has_all_that_it_has() {
        let own = own();
        assert_eq!(missing(&own, &own), Some(Vec::new()));
        assert_eq!(own.features.len(), WORDS.len());
        assert!(!own.vendor.is_empty());
        // All guests here rely on it.
        let sse3 = bits_of(&own.features["1.0.ecx"]).unwrap() & 1;
        assert_eq!(sse3, 1);
    }

    #[test]
    fn what_is_missing_is_named_and_what_is_more_is_not() {
        let with = |words: &[(&str, &str)]| Cpu {
            features: words
                .iter()
                .map(|(w, b)| ((*w).to_owned(), (*b).to_owned()))
                .collect(),
            ..Cpu::default()
        };
        let ours = with(&[("7.0.ebx", "0x20")]);
        let theirs = with(&[("7.0.ebx", "0x10021"), ("9.0.eax", "0x2")]);
        let named = ["fsgsbase", "avx512f", "bit 1 of cpuid 9.0.eax"];
        assert_eq!(missing(&theirs, &ours).unwrap(), named);
        assert_eq!(
            missing(&ours, &with(&[("7.0.ebx", "0xff")])),
            Some(Vec::new())
        );
        for no_word in ["", "21", "0x", "0x123456789", "0x-1"] {
            assert_eq!(
                missing(&with(&[("7.0.ebx", no_word)]), &ours),
                None,
                "{no_word}"
            );
        }
    }

    #[test]
    fn names_are_of_words_that_are_kept() {
        let own = own();
        for (word, bit, name) in NAMES {
            assert!(own.features.contains_key(word) && bit < 32, "{name}");
        }
    }
}
