//! How much memory there was when, and whether that grew.
//!
//! What a loop takes goes up and down with every round. So the least of the looks after the first tenth of
//! them is held against the least of the last third: what leaks shows in the least, and what is only kept for
//! a while does not.

use std::io;

use serde::{Deserialize, Serialize};

use crate::footprint;

/// From this share of the looks on, up to this one, is the beginning.
const BEGINNING: (f64, f64) = (0.1, 0.4);
/// From this share on is the end.
const END: f64 = 0.66;
/// What the end may be above the beginning: this share, and this many bytes.
const SHARE: f64 = 0.1;
const SLACK: u64 = 8 << 20;
/// Looks that the beginning and the end have at least, or nothing is said.
const LEAST: usize = 3;

/// Memory at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Level {
    /// Private memory of this process, and its page tables, in bytes.
    pub private: u64,
    /// Bytes of frames in use.
    pub frames: u64,
}

/// Memory at many moments, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Levels(Vec<Level>);

/// What became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flatness {
    /// The least after the first tenth. `None` if there were too few looks to say.
    pub beginning: Option<Level>,
    /// The least of the last third. `None` likewise.
    pub end: Option<Level>,
    /// What grew, in words. Nothing, if all is well.
    pub grown: Vec<String>,
}

impl Levels {
    /// Looks at memory, of which `frames` bytes are frames in use.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn look(&mut self, frames: u64) -> io::Result<()> {
        let private = footprint::private()?;
        self.0.push(Level { private, frames });
        Ok(())
    }

    /// What became of it.
    pub fn flatness(&self) -> Flatness {
        let least = |from: f64, to: f64| {
            let at = |share: f64| (self.0.len() as f64 * share) as usize;
            let levels = &self.0[at(from)..at(to)];
            (levels.len() >= LEAST).then(|| Level {
                private: levels.iter().map(|level| level.private).min().unwrap_or(0),
                frames: levels.iter().map(|level| level.frames).min().unwrap_or(0),
            })
        };
        let beginning = least(BEGINNING.0, BEGINNING.1);
        let end = least(END, 1.0);
        let mut grown = Vec::new();
        if let (Some(beginning), Some(end)) = (beginning, end) {
            let mut compare = |what: &str, before: u64, after: u64| {
                let allowed = before + (before as f64 * SHARE) as u64 + SLACK;
                if after > allowed {
                    grown.push(format!(
                        "{what}: {} MiB after the first tenth, {} MiB at the end",
                        before >> 20,
                        after >> 20
                    ));
                }
            };
            compare("private memory", beginning.private, end.private);
            compare("frames in use", beginning.frames, end.frames);
        }
        Flatness {
            beginning,
            end,
            grown,
        }
    }
}

impl Flatness {
    /// Whether it was long enough to say something, and nothing grew.
    pub fn is_flat(&self) -> bool {
        self.beginning.is_some() && self.end.is_some() && self.grown.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn levels(level: impl Fn(u64) -> (u64, u64)) -> Flatness {
        let mut levels = Levels::default();
        for at in 0..100 {
            let (private, frames) = level(at);
            let (private, frames) = (private * MIB, frames * MIB);
            levels.0.push(Level { private, frames });
        }
        levels.flatness()
    }

    #[test]
    fn what_goes_up_and_down_is_flat() {
        let flat = levels(|at| (100 + at % 7, 300 + 50 * (at % 5)));
        assert!(flat.is_flat(), "{flat:?}");
        assert_eq!(flat.end.unwrap().frames, 300 * MIB);
    }

    #[test]
    fn what_is_taken_at_first_and_kept_is_flat() {
        assert!(levels(|at| (100 * (at / 5).min(2), 300)).is_flat());
    }

    #[test]
    fn what_grows_is_said() {
        let leak = levels(|at| (100, 300 + at));
        assert_eq!(
            leak.grown,
            ["frames in use: 310 MiB after the first tenth, 366 MiB at the end"]
        );
        let private = levels(|at| (100 + at, 300));
        assert!(
            private.grown[0].starts_with("private memory: 110 MiB"),
            "{private:?}"
        );
        assert!(!leak.is_flat() && !private.is_flat());
    }

    #[test]
    fn too_few_looks_say_nothing() {
        let mut few = Levels::default();
        for _ in 0..5 {
            few.look(0).unwrap();
        }
        let flatness = few.flatness();
        assert!(
            !flatness.is_flat() && flatness.grown.is_empty(),
            "{flatness:?}"
        );
    }
}
