//! What is asked of a run, and whether it was met.

use serde::{Deserialize, Serialize};

/// A target, and what was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The number that the target is about.
    pub what: String,
    /// Which side of the limit is good.
    pub bound: Bound,
    /// The limit.
    pub limit: f64,
    /// What was found. `None` if the run does not say.
    pub found: Option<f64>,
    /// Where it was found, or what a run must have to say.
    pub where_: String,
}

/// Which side of a limit is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The limit and below.
    AtMost,
    /// The limit and above.
    AtLeast,
}

impl Verdict {
    /// Whether it was met. `None` if the run does not say.
    pub fn met(&self) -> Option<bool> {
        self.found.map(|found| match self.bound {
            Bound::AtMost => found <= self.limit,
            Bound::AtLeast => found >= self.limit,
        })
    }

    /// By what factor it was missed, if it was.
    pub fn missed_by(&self) -> Option<f64> {
        let found = self.found.filter(|_| self.met() == Some(false))?;
        Some(match self.bound {
            Bound::AtMost => found / self.limit,
            Bound::AtLeast => self.limit / found,
        })
    }
}

/// Judges the worst of what was `found`, each number with where.
pub(crate) fn worst(
    what: &str,
    (bound, limit): (Bound, f64),
    found: impl Iterator<Item = (f64, String)>,
    needs: &str,
) -> Verdict {
    let found = found
        .filter(|(value, _)| value.is_finite())
        .reduce(|a, b| match bound {
            Bound::AtMost if b.0 > a.0 => b,
            Bound::AtLeast if b.0 < a.0 => b,
            _ => a,
        });
    let (found, where_) = match found {
        Some((value, where_)) => (Some(value), where_),
        None => (None, format!("needs {needs}")),
    };
    Verdict {
        what: what.to_owned(),
        bound,
        limit,
        found,
        where_,
    }
}
