//! What a scenario comes to.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What memory held in the end, and on the way, against what it should have held. The worse the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything as it should be.
    Ok,
    /// Right, but a page was copied that need not have been.
    Copied,
    /// An operation that must be refused was done; memory is right nevertheless.
    NotRefused,
    /// The protocol's own state is wrong: an entry, a bit; or memory holds what nobody wrote.
    Broken,
    /// A page and who holds it have parted: one does not see what the other wrote (*wrong COW*).
    Diverged,
    /// Somebody sees what another wrote after they parted (*missed COW*).
    Leaked,
}

impl Verdict {
    /// Its name in tables, at most five letters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Copied => "copy",
            Self::NotRefused => "done",
            Self::Broken => "BAD",
            Self::Diverged => "DIV",
            Self::Leaked => "LEAK",
        }
    }

    /// What it means, in a few words.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Ok => "as it should be",
            Self::Copied => "right, with a copy too many",
            Self::NotRefused => "done though it must be refused",
            Self::Broken => "the protocol's state is wrong",
            Self::Diverged => "a page and its holder have parted (wrong COW)",
            Self::Leaked => "somebody sees what is not theirs (missed COW)",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
