//! How much memory processes have.

use std::fs;
use std::io;

/// Bytes of memory that this process and `others` have together, each page counted once (the kernel's PSS).
///
/// It walks all page tables: not for the middle of a measurement. Page tables and what KVM has are not in it.
///
/// # Errors
/// If the kernel does not tell.
pub fn of_this_process_and(others: impl IntoIterator<Item = i32>) -> io::Result<u64> {
    let mut bytes = pss("self")?;
    for pid in others {
        bytes += pss(&pid.to_string())?;
    }
    Ok(bytes)
}

/// Bytes of memory that this machine can give without taking them from somebody.
///
/// # Errors
/// If the kernel does not tell.
pub fn available() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    parse(&text, "MemAvailable:").ok_or_else(|| io::Error::other("meminfo has no MemAvailable"))
}

/// Bytes of memory that are this process's alone, and of the kernel's page tables for it. What it shares by
/// files, as guest memory is here, is not in it, nor what KVM has.
///
/// # Errors
/// If the kernel does not tell.
pub fn private() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let of = |name: &str| {
        let missing = || io::Error::other(format!("the status has no {name}"));
        parse(&text, name).ok_or_else(missing)
    };
    Ok(of("RssAnon:")? + of("VmPTE:")?)
}

fn pss(process: &str) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    parse(&text, "Pss:").ok_or_else(|| io::Error::other("smaps_rollup has no Pss"))
}

/// The size that `name` has in one of the kernel's lists, in bytes.
fn parse(list: &str, name: &str) -> Option<u64> {
    let value = list.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone::alone;

    #[test]
    fn pss_is_found() {
        let text =
            "55-7f ---p 00000000 00:00 0 [rollup]\nRss:  948 kB\nPss:   323 kB\nPss_Dirty: 7 kB\n";
        assert_eq!(parse(text, "Pss:"), Some(323 << 10));
        assert_eq!(parse("Rss: 948 kB\n", "Pss:"), None);
    }

    #[test]
    fn some_memory_is_available() {
        assert!(available().unwrap() > 1 << 20);
    }

    #[test]
    fn memory_that_is_touched_is_seen() {
        let _alone = alone();
        let before = of_this_process_and([]).unwrap();
        let memory = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = of_this_process_and([]).unwrap();
        assert!(after >= before + (60 << 20), "{before} {after}");
        drop(memory);
    }

    #[test]
    fn private_memory_is_seen_and_shared_memory_is_not() {
        let _alone = alone();
        let before = private().unwrap();
        let memory = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = private().unwrap();
        assert!(after >= before + (60 << 20), "{before} {after}");
        drop(memory);
        let before = private().unwrap();
        let space = crate::bare::space_without_window(16384).unwrap();
        let after = private().unwrap();
        assert!(after < before + (16 << 20), "{before} {after}");
        drop(space);
    }
}
