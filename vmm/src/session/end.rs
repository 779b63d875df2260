//! How a run ended, and why.

use crate::session::report::EndedBy;
use palimpsest::causes::chain;
use palimpsest::kvm::{Outcome, StopReason};

/// How a run ended.
pub(in crate::session) struct End {
    pub(in crate::session) by: EndedBy,
    pub(in crate::session) error: Option<String>,
}

impl End {
    /// As it should.
    pub(in crate::session) fn fine(by: EndedBy) -> Self {
        Self { by, error: None }
    }

    /// The run cannot go on.
    pub(in crate::session) fn failed(why: String) -> Self {
        Self {
            by: EndedBy::Error,
            error: Some(why),
        }
    }

    /// The run cannot go on, because of `error`.
    pub(in crate::session) fn error(error: &dyn std::error::Error) -> Self {
        Self::failed(chain(error))
    }

    /// vCPU `vcpu` has ended with `outcome`.
    pub(in crate::session) fn of_vcpu(vcpu: usize, outcome: &Outcome) -> Self {
        let crash = |error: String| Self {
            by: EndedBy::GuestCrash,
            error: Some(error),
        };
        match outcome {
            Outcome::Stopped(StopReason::Exit { status: 0 }) => Self::fine(EndedBy::GuestExit),
            Outcome::Stopped(reason @ StopReason::Exit { .. }) => Self {
                by: EndedBy::GuestExit,
                error: Some(reason.to_string()),
            },
            Outcome::Stopped(reason @ StopReason::Panic { .. }) => crash(reason.to_string()),
            Outcome::Crashed { .. } => crash(format!("vcpu {vcpu}: {outcome}")),
            Outcome::Stopped(StopReason::Failed { .. }) | Outcome::Failed { .. } => {
                Self::failed(format!("vcpu {vcpu}: {outcome}"))
            }
        }
    }
}
