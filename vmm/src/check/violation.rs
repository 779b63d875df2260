//! What an oracle says.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A property every run is held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Oracle {
    /// A snapshot is the state at one instant.
    Cut,
    /// Nothing written after a snapshot shows in it.
    Isolation,
    /// Guest and devices see each other's writes through pins.
    Coherence,
    /// A restored guest runs on, and its own checks hold.
    Life,
    /// Dirty tracking tells of every page that changes.
    Tracking,
    /// No two copies of a guest draw the same random number.
    Identity,
    /// At the end every frame is free and no reference or pin is left.
    Accounting,
}

impl Oracle {
    /// Every oracle, in the order of the report.
    pub const ALL: [Self; 7] = [
        Self::Cut,
        Self::Isolation,
        Self::Coherence,
        Self::Life,
        Self::Tracking,
        Self::Identity,
        Self::Accounting,
    ];

    /// The oracle's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::Isolation => "isolation",
            Self::Coherence => "coherence",
            Self::Life => "life",
            Self::Tracking => "tracking",
            Self::Identity => "identity",
            Self::Accounting => "accounting",
        }
    }
}

impl fmt::Display for Oracle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One thing an oracle saw that must not be.
///
/// Fields that do not apply are `None` or empty, and are not displayed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The oracle that saw it.
    pub oracle: Oracle,
    /// The snapshot it was seen in, if in one.
    pub snapshot: Option<u64>,
    /// Guest-physical address of the first wrong byte.
    pub gpa: Option<u64>,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// Who wrote the place last, as far as the formulas tell.
    pub last_writer: String,
    /// State of the frame behind the page.
    pub frame: String,
    /// What is wrong, in words.
    pub detail: String,
}

impl Violation {
    /// A violation of which nothing but `detail` is known yet.
    pub fn new(oracle: Oracle, detail: impl Into<String>) -> Self {
        Self {
            oracle,
            snapshot: None,
            gpa: None,
            expected: String::new(),
            found: String::new(),
            last_writer: String::new(),
            frame: String::new(),
            detail: detail.into(),
        }
    }

    /// Number of the page that holds the first wrong byte.
    pub fn gfn(&self) -> Option<u64> {
        self.gpa.map(|gpa| gpa / guest::abi::PAGE_SIZE)
    }
}

/// A heading line, then one aligned line a field. Does not end in a newline.
impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "violation of {}: {}", self.oracle, self.detail)?;
        let mut line = |name, value: &dyn fmt::Display| write!(f, "\n  {name:<12} {value}");
        if let Some(snapshot) = self.snapshot {
            line("snapshot", &snapshot)?;
        }
        if let (Some(gfn), Some(gpa)) = (self.gfn(), self.gpa) {
            line("page", &format_args!("gfn {gfn:#x}, gpa {gpa:#x}"))?;
        }
        for (name, value) in [
            ("expected", &self.expected),
            ("found", &self.found),
            ("last writer", &self.last_writer),
            ("frame", &self.frame),
        ] {
            if !value.is_empty() {
                line(name, value)?;
            }
        }
        Ok(())
    }
}

/// How many violations each oracle saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViolationCounts {
    /// Of [`Oracle::Cut`].
    pub cut: u64,
    /// Of [`Oracle::Isolation`].
    pub isolation: u64,
    /// Of [`Oracle::Coherence`].
    pub coherence: u64,
    /// Of [`Oracle::Life`].
    pub life: u64,
    /// Of [`Oracle::Tracking`].
    // Reports of before it was there have none.
    #[serde(default)]
    pub tracking: u64,
    /// Of [`Oracle::Identity`].
    // As for tracking.
    #[serde(default)]
    pub identity: u64,
    /// Of [`Oracle::Accounting`].
    pub accounting: u64,
}

impl ViolationCounts {
    /// Counts one violation of `oracle`.
    pub fn add(&mut self, oracle: Oracle) {
        let count = match oracle {
            Oracle::Cut => &mut self.cut,
            Oracle::Isolation => &mut self.isolation,
            Oracle::Coherence => &mut self.coherence,
            Oracle::Life => &mut self.life,
            Oracle::Tracking => &mut self.tracking,
            Oracle::Identity => &mut self.identity,
            Oracle::Accounting => &mut self.accounting,
        };
        *count += 1;
    }

    /// Violations `oracle` saw.
    pub const fn of(&self, oracle: Oracle) -> u64 {
        match oracle {
            Oracle::Cut => self.cut,
            Oracle::Isolation => self.isolation,
            Oracle::Coherence => self.coherence,
            Oracle::Life => self.life,
            Oracle::Tracking => self.tracking,
            Oracle::Identity => self.identity,
            Oracle::Accounting => self.accounting,
        }
    }

    /// Violations all oracles saw.
    pub const fn total(&self) -> u64 {
        self.cut
            + self.isolation
            + self.coherence
            + self.life
            + self.tracking
            + self.identity
            + self.accounting
    }
}
