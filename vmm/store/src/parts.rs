//! `state`: registers and devices, each as its own part of the machine has written it.
//!
//! ```text
//!   byte  0  "PALSTATE"
//!         8  version: 1   u32         all numbers little-endian
//!        12  parts        u32
//!        16  each: bytes of its name u32, its version u32, its bytes u64, the name, the bytes
//! ```

const MAGIC: &[u8; 8] = b"PALSTATE";
const VERSION: u32 = 1;
/// The most parts, the most bytes of a name, and the most bytes of all.
const MOST_PARTS: usize = 4096;
const MOST_NAME: usize = 64;
pub(crate) const MAX_STATE_BYTES: u64 = 256 << 20;

/// A part of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What it is: 1 to 64 printable characters of ASCII, such as `vcpu/0`.
    pub name: String,
    /// Which form its bytes have.
    pub version: u32,
    /// Its bytes. Only the part itself knows what they are.
    pub bytes: Vec<u8>,
}

/// Why bytes are no parts, or parts cannot be bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartsError {
    /// They do not begin as such, or are of another version.
    #[error("it does not begin as a state of version {VERSION}")]
    Header,
    /// There are too many, or they have too many bytes.
    #[error("it has more than {MOST_PARTS} parts, or than {MAX_STATE_BYTES} bytes")]
    TooMany,
    /// A part is cut off.
    #[error("part {part} is cut off at byte {offset}")]
    Cut {
        /// Its number.
        part: usize,
        /// Where.
        offset: usize,
    },
    /// A name is none.
    #[error("part {part} has no name of 1 to {MOST_NAME} printable characters")]
    Name {
        /// Its number.
        part: usize,
    },
    /// Two parts have one name.
    #[error("there are two parts of the name `{name}`")]
    Twice {
        /// The name.
        name: String,
    },
    /// Something comes behind the last.
    #[error("there are bytes behind the last part, from byte {offset} on")]
    Trailing {
        /// Where.
        offset: usize,
    },
}

fn is_name(name: &str) -> bool {
    (1..=MOST_NAME).contains(&name.len()) && name.bytes().all(|c| c.is_ascii_graphic())
}

/// The bytes of parts.
///
/// # Errors
/// If they would not be read again: a name is none or there twice, or they are too many.
pub fn encode_parts(parts: &[Part]) -> Result<Vec<u8>, PartsError> {
    let mut bytes = Vec::new();
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((parts.len() as u32).to_le_bytes());
    for (number, part) in parts.iter().enumerate() {
        check_name(&parts[..number], number, &part.name)?;
        bytes.extend((part.name.len() as u32).to_le_bytes());
        bytes.extend(part.version.to_le_bytes());
        bytes.extend((part.bytes.len() as u64).to_le_bytes());
        bytes.extend(part.name.as_bytes());
        bytes.extend(&part.bytes);
    }
    match parts.len() <= MOST_PARTS && bytes.len() as u64 <= MAX_STATE_BYTES {
        true => Ok(bytes),
        false => Err(PartsError::TooMany),
    }
}

/// The parts that `bytes` are.
///
/// # Errors
/// See [`PartsError`].
pub fn decode_parts(bytes: &[u8]) -> Result<Vec<Part>, PartsError> {
    let mut rest = Rest { bytes, at: 0 };
    let header = rest.take(8).zip(rest.u32()).ok_or(PartsError::Header)?;
    if header != (&MAGIC[..], VERSION) {
        return Err(PartsError::Header);
    }
    let count = rest.u32().ok_or(PartsError::Header)? as usize;
    if count > MOST_PARTS || bytes.len() as u64 > MAX_STATE_BYTES {
        return Err(PartsError::TooMany);
    }
    let mut parts = Vec::with_capacity(count);
    for part in 0..count {
        let cut = PartsError::Cut {
            part,
            offset: rest.at,
        };
        let Some(one) = rest.part() else {
            return Err(cut);
        };
        let one = one.ok_or(PartsError::Name { part })?;
        check_name(&parts, part, &one.name)?;
        parts.push(one);
    }
    match rest.at == bytes.len() {
        true => Ok(parts),
        false => Err(PartsError::Trailing { offset: rest.at }),
    }
}

fn check_name(before: &[Part], part: usize, name: &str) -> Result<(), PartsError> {
    if !is_name(name) {
        return Err(PartsError::Name { part });
    }
    match before.iter().any(|other| other.name == name) {
        true => Err(PartsError::Twice {
            name: name.to_owned(),
        }),
        false => Ok(()),
    }
}

/// Bytes that were not looked at.
struct Rest<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        let (bytes, _) = self.take(4)?.split_first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self) -> Option<u64> {
        let (bytes, _) = self.take(8)?.split_first_chunk()?;
        Some(u64::from_le_bytes(*bytes))
    }

    /// The next part. `None` if it is cut off, and nothing in that if its name is none.
    fn part(&mut self) -> Option<Option<Part>> {
        let (name, version, bytes) = (self.u32()?, self.u32()?, self.u64()?);
        let name = self.take(name as usize)?;
        let bytes = self.take(usize::try_from(bytes).ok()?)?;
        let name = str::from_utf8(name).ok();
        Some(name.map(|name| Part {
            name: name.to_owned(),
            version,
            bytes: bytes.to_vec(),
        }))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Vec<Part> {
        let part = |name: &str, version, bytes: &[u8]| Part {
            name: name.to_owned(),
            version,
            bytes: bytes.to_vec(),
        };
        vec![
            part("vcpu/0", 2, b"registers"),
            part("device/0", 1, b""),
            part("program", 7, &[0, 255]),
        ]
    }

    #[test]
    fn parts_are_read_as_they_were_written() {
        for parts in [Vec::new(), example()] {
            assert_eq!(decode_parts(&encode_parts(&parts).unwrap()), Ok(parts));
        }
    }

    #[test]
    fn what_is_cut_off_or_goes_on_is_refused() {
        let right = encode_parts(&example()).unwrap();
        for at in 0..right.len() {
            assert!(decode_parts(&right[..at]).is_err(), "cut at {at}");
        }
        let more = [&right[..], &[0]].concat();
        let offset = right.len();
        assert_eq!(decode_parts(&more), Err(PartsError::Trailing { offset }));
    }

    #[test]
    fn lengths_that_cannot_be_are_refused_without_asking_for_memory() {
        let mut bytes = encode_parts(&example()).unwrap();
        bytes[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(
            decode_parts(&bytes),
            Err(PartsError::Cut { part: 0, .. })
        ));
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode_parts(&bytes), Err(PartsError::TooMany));
    }

    #[test]
    fn names_that_are_none_and_names_twice_are_refused() {
        for name in ["", "a b", "ä", &"n".repeat(65)] {
            let mut parts = example();
            parts[1].name = name.to_owned();
            assert_eq!(
                encode_parts(&parts),
                Err(PartsError::Name { part: 1 }),
                "{name}"
            );
        }
        let mut parts = example();
        parts[2].name = "vcpu/0".to_owned();
        assert!(matches!(
            encode_parts(&parts),
            Err(PartsError::Twice { .. })
        ));
        let mut bytes = encode_parts(&example()).unwrap();
        let at = bytes
            .windows(8)
            .position(|name| name == b"device/0")
            .unwrap();
        bytes[at] = 0xff;
        assert_eq!(decode_parts(&bytes), Err(PartsError::Name { part: 1 }));
    }
}
