//! Names of snapshots: they are names of directories, beside those that the store has for itself.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The most bytes of a name.
const MOST_BYTES: usize = 128;
/// Names that mean something else in a store.
const RESERVED: [&str; 3] = ["chunks", "tmp", "store.json"];

/// The name of a snapshot in its store: 1 to 128 letters, digits, `.`, `_` and `-` of ASCII, the first of which
/// is a letter or a digit; and none of the store's own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName(String);

/// Why something is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is reserved.
    #[error("`{name}` cannot be the name of a snapshot: the store has something else by it")]
    Reserved {
        /// The name.
        name: String,
    },
    /// It has other characters, or too many.
    #[error(
        "`{}` cannot be the name of a snapshot: 1 to {MOST_BYTES} letters, digits, `.`, `_` and `-`, of which \
         the first is a letter or a digit", name.escape_debug()
    )]
    Characters {
        /// The name.
        name: String,
    },
}

impl SnapshotName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        let of_name = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        let is_name = name.len() <= MOST_BYTES
            && name.bytes().all(of_name)
            && name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !is_name {
            let name = name.chars().take(2 * MOST_BYTES).collect();
            return Err(NameError::Characters { name });
        }
        let name = name.to_owned();
        match RESERVED.contains(&&*name) || name.starts_with("store.json.") {
            true => Err(NameError::Reserved { name }),
            false => Ok(Self(name)),
        }
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> Self {
        name.0
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_can_be_one_directory_and_is_not_the_stores() {
        for name in ["a", "warm-1.2_x", "9", &"n".repeat(128)] {
            assert_eq!(name.parse::<SnapshotName>().unwrap().as_str(), name);
        }
        let long = "n".repeat(129);
        for name in [
            "", ".", "..", ".hidden", "-n", "a/b", "a b", "ä", "a\0", &long,
        ] {
            let error = name.parse::<SnapshotName>().unwrap_err();
            assert!(
                matches!(error, NameError::Characters { .. }),
                "{name}: {error}"
            );
        }
        for name in ["chunks", "tmp", "store.json", "store.json.new"] {
            let error = name.parse::<SnapshotName>().unwrap_err();
            assert!(
                matches!(error, NameError::Reserved { .. }),
                "{name}: {error}"
            );
        }
    }
}
