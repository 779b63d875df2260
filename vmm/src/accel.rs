//! What runs vCPUs: KVM, or threads of this process where there is none.
//!
//! A guest that runs without KVM is code of this process: it is kept from nothing that the process has. So a
//! program that somebody names is not run so unless that is asked for in so many words: see
//! [`Untrusted`](crate::session::config::Untrusted).

use std::fmt;

use palimpsest::causes::chain;
use palimpsest::kvm::{Kvm, KvmError, PlatformError};
use palimpsest::user::{User, UserError};
use palimpsest::vm::Accelerator;
use serde::{Deserialize, Serialize};

/// What is asked to run vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM if it can be used, else `user`
    #[default]
    Auto,
    /// KVM
    Kvm,
    /// Threads of this process, in which the guest's code runs: without isolation, but anywhere
    User,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::User => "user",
        })
    }
}

/// Why nothing runs vCPUs.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// KVM is asked for, and cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmUnusable),
    /// Threads are asked for, and cannot be.
    #[error("--accel user cannot run here")]
    User(#[from] UserError),
    /// Neither can.
    #[error("{kvm}; and without KVM: {user}")]
    Neither {
        /// Why not KVM.
        kvm: KvmUnusable,
        /// Why not threads.
        user: UserError,
    },
}

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmUnusable {
    /// It cannot be opened.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// It makes no machine.
    #[error("kvm makes no virtual machine here")]
    Machine(#[from] KvmError),
}

/// What runs vCPUs, opened, and what is to be said of it.
#[derive(Debug)]
pub struct Opened {
    /// What runs them.
    pub accelerator: Accelerator,
    /// What whoever looks on should know.
    pub note: Option<String>,
}

/// What is said whenever a guest runs without KVM.
const NOT_ISOLATED: &str =
    "the guest runs as threads of this process (user), isolated from nothing in it";

/// Opens what `accel` asks for.
///
/// # Errors
/// If it cannot run here.
pub fn open(accel: Accel) -> Result<Opened, AccelError> {
    let by_user = |user, note| Opened {
        accelerator: Accelerator::User(user),
        note: Some(note),
    };
    let by_kvm = |kvm| Opened {
        accelerator: Accelerator::Kvm(kvm),
        note: None,
    };
    match accel {
        // That it makes machines is seen when it does.
        Accel::Kvm => Ok(by_kvm(Kvm::open().map_err(KvmUnusable::from)?)),
        Accel::User => Ok(by_user(User::open()?, NOT_ISOLATED.to_owned())),
        Accel::Auto => match usable_kvm() {
            Ok(kvm) => Ok(by_kvm(kvm)),
            Err(kvm) => match User::open() {
                Ok(user) => Ok(by_user(user, format!("{NOT_ISOLATED}: {}", chain(&kvm)))),
                Err(user) => Err(AccelError::Neither { kvm, user }),
            },
        },
    }
}

/// KVM, if it makes virtual machines.
fn usable_kvm() -> Result<Kvm, KvmUnusable> {
    let kvm = Kvm::open()?;
    // What it finds out is kept, and needed when a machine is made.
    kvm.unsaved_msrs()?;
    Ok(kvm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_what_runs_and_what_is_not_isolated_is_said() {
        let opened = open(Accel::User).unwrap();
        assert!(matches!(opened.accelerator, Accelerator::User(_)));
        assert_eq!(opened.note.as_deref(), Some(NOT_ISOLATED));
        match (open(Accel::Kvm), open(Accel::Auto).unwrap()) {
            (Ok(kvm), auto) => {
                for opened in [kvm, auto] {
                    assert!(matches!(opened.accelerator, Accelerator::Kvm(_)));
                    assert_eq!(opened.note, None);
                }
            }
            (Err(error), auto) => {
                assert!(matches!(auto.accelerator, Accelerator::User(_)));
                let why = format!("{NOT_ISOLATED}: {}", chain(&error));
                assert_eq!(auto.note, Some(why));
            }
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        use clap::ValueEnum;
        for accel in Accel::value_variants() {
            let value = accel.to_possible_value().unwrap();
            assert_eq!(value.get_name(), accel.to_string());
            assert_eq!(serde_json::to_value(accel).unwrap(), accel.to_string());
        }
    }
}
