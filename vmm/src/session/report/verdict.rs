//! What a run amounts to.

use serde::{Deserialize, Serialize};

use crate::check::ViolationCounts;

/// What a run amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything asked for was done and no oracle saw a violation.
    Ok,
    /// An oracle saw a violation.
    Violated,
    /// The run could not finish.
    Error,
    /// There was nothing that an oracle could have seen a violation in, or not enough.
    #[serde(rename = "nothing-checked")]
    NothingChecked,
}

impl Verdict {
    /// The verdict on a run. A violation outweighs an error: memory gone wrong is what makes a guest crash.
    /// `unchecked` says what was not looked at though it must be.
    pub const fn of(
        violations: &ViolationCounts,
        error: Option<&str>,
        unchecked: &[String],
    ) -> Self {
        if violations.total() > 0 {
            Self::Violated
        } else if error.is_some() {
            Self::Error
        } else if !unchecked.is_empty() {
            Self::NothingChecked
        } else {
            Self::Ok
        }
    }

    /// The verdict's name in the report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Violated => "violated",
            Self::Error => "error",
            Self::NothingChecked => "nothing-checked",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Oracle;

    #[test]
    fn a_violation_outweighs_an_error() {
        let clean = ViolationCounts::default();
        let mut seen = clean;
        seen.add(Oracle::Life);
        let unchecked = ["no snapshot was taken".to_owned()];
        assert_eq!(Verdict::of(&clean, None, &[]), Verdict::Ok);
        assert_eq!(Verdict::of(&clean, Some("crash"), &[]), Verdict::Error);
        assert_eq!(Verdict::of(&seen, None, &[]), Verdict::Violated);
        assert_eq!(
            Verdict::of(&seen, Some("crash"), &unchecked),
            Verdict::Violated
        );
        // What was not checked is news only if all else went well.
        assert_eq!(
            Verdict::of(&clean, Some("crash"), &unchecked),
            Verdict::Error
        );
        assert_eq!(
            Verdict::of(&clean, None, &unchecked),
            Verdict::NothingChecked
        );
    }
}
