//! What the kernel says is mapped where: `/proc/self/maps`.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;

/// A part of a mapping of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MappedPart {
    /// Host addresses.
    pub(super) addresses: Range<u64>,
    pub(super) is_readable: bool,
    pub(super) is_writable: bool,
    pub(super) is_shared: bool,
    /// Which byte of the file the first one is.
    pub(super) offset: u64,
}

/// What is mapped within `range`, in order, cut off at its ends. Neighbours that are alike may be one part or
/// two.
///
/// It takes little memory: who asks is at the end of what it may map.
pub(super) fn within(range: Range<u64>) -> io::Result<Vec<MappedPart>> {
    let mut lines = BufReader::new(File::open("/proc/self/maps")?);
    let (mut parts, mut line) = (Vec::new(), String::new());
    loop {
        line.clear();
        if lines.read_line(&mut line)? == 0 {
            return Ok(parts);
        }
        let part = parse(&line).ok_or(io::ErrorKind::InvalidData)?;
        if part.addresses.start >= range.end {
            return Ok(parts);
        }
        let start = part.addresses.start.max(range.start);
        let end = part.addresses.end.min(range.end);
        if start < end {
            parts.push(MappedPart {
                offset: part.offset + (start - part.addresses.start),
                addresses: start..end,
                ..part
            });
        }
    }
}

/// What the first mapping within `range` is, in words: its addresses, and what is mapped there.
pub(super) fn first_in(range: Range<u64>) -> io::Result<Option<String>> {
    for line in BufReader::new(File::open("/proc/self/maps")?).lines() {
        let line = line?;
        let part = parse(&line).ok_or(io::ErrorKind::InvalidData)?;
        if part.addresses.start < range.end && part.addresses.end > range.start {
            // Behind the fifth word is what is mapped, if that has a name.
            let name = line.split_ascii_whitespace().skip(5);
            let name = name.collect::<Vec<_>>().join(" ");
            let name = match &*name {
                "" => "memory without a name",
                name => name,
            };
            let Range { start, end } = part.addresses;
            return Ok(Some(format!("{name} at {start:#x} to {end:#x}")));
        }
    }
    Ok(None)
}

/// `start-end rwxs offset ...`
fn parse(line: &str) -> Option<MappedPart> {
    let mut words = line.split_ascii_whitespace();
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?.as_bytes();
    Some(MappedPart {
        addresses: hex(start)?..hex(end)?,
        is_readable: *rights.first()? == b'r',
        is_writable: *rights.get(1)? == b'w',
        is_shared: *rights.get(3)? == b's',
        offset: hex(words.next()?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_addresses_rights_and_where_in_the_file() {
        let line = "7f01-7f0a rw-s 00003000 00:01 1066  /memfd:palimpsest-frames (deleted)\n";
        let part = MappedPart {
            addresses: 0x7f01..0x7f0a,
            is_readable: true,
            is_writable: true,
            is_shared: true,
            offset: 0x3000,
        };
        assert_eq!(parse(line), Some(part));
        for line in [
            "",
            "7f01",
            "7f01-7f0a",
            "7f01-7f0a rw",
            "7f01-x rw-p 0",
            "7f01-7f0a rw-p",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn the_first_mapping_in_a_range_is_named() {
        let address = first_in as *const () as u64;
        let exe = std::env::current_exe().unwrap();
        let named = first_in(address..address + 1).unwrap().unwrap();
        assert!(named.starts_with(exe.to_str().unwrap()), "{named}");
        assert_eq!(first_in(0..1).unwrap(), None);
    }

    #[test]
    fn the_code_that_asks_is_mapped() {
        let address = within as *const () as u64;
        let parts = within(address..address + 1).unwrap();
        assert_eq!(parts.len(), 1);
        assert_eq!(parts[0].addresses, address..address + 1);
        assert!(!parts[0].is_writable && !parts[0].is_shared);
        assert_eq!(within(0..1).unwrap(), []);
    }
}
