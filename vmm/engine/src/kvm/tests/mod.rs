//! Tests on real KVM, with guests of a few hand-assembled instructions.
//!
//! Without a usable `/dev/kvm` they say that they were skipped; with `CI=true` in the environment that is a
//! failure.
//!
//! | file | what is tested |
//! |---|---|
//! | `memory`, `guest`, `code` | nothing: memory, guests and their code |
//! | `entry` | how a guest begins, and what comes out of it |
//! | `write_faults` | what a guest writes where it may not write yet |
//! | `states` | registers that are captured and restored |
//! | `page_tables` | page tables that are restored |
//! | `pauses` | kicks and pauses |
//! | `handlers` | port handlers that are stuck or panic |
//! | `ends` | how vCPUs end |

pub(crate) mod code;
mod ends;
mod entry;
pub(crate) mod guest;
mod handlers;
mod memory;
mod page_tables;
mod pauses;
mod states;
mod write_faults;

use std::sync::OnceLock;
use std::time::Duration;

use super::*;

/// Memory of most guests here. Not a multiple of 2 MiB: the page tables map 3 MiB more than there is.
const MEMORY: u64 = 9 << 20;

/// Where guests here have their data.
pub(crate) const DATA: u64 = 0x40_0000;

pub(crate) const PORT_EXIT: u16 = 0x501;
const PORT_DATA: u16 = 0x500;
pub(crate) const PORT_EVENT: u16 = 0x520;

/// Longer than anything here takes.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// KVM, or `None` if the test is to be skipped.
pub(crate) fn kvm() -> Option<&'static Kvm> {
    static KVM: OnceLock<Result<Kvm, PlatformError>> = OnceLock::new();
    match KVM.get_or_init(Kvm::open) {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            let in_ci = std::env::var("CI").is_ok_and(|value| value == "true");
            assert!(!in_ci, "kvm is needed in CI: {error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// The KVM of this test, or the test returns.
macro_rules! need_kvm {
    () => {
        match $crate::kvm::tests::kvm() {
            Some(kvm) => kvm,
            None => return,
        }
    };
}

pub(crate) use need_kvm;
