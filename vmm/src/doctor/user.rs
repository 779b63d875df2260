//! Running guests without KVM, as threads of a process.

use super::Finding;
use palimpsest::causes::chain;
use palimpsest::user::{User, has_protection_keys};

pub(super) fn examine() -> Finding {
    match User::open() {
        Ok(_) => {
            let keys = if has_protection_keys() {
                "this CPU has protection keys, which are not used yet"
            } else {
                "this CPU has no protection keys"
            };
            Finding::ok(
                "user",
                format!(
                    "guests can run without KVM (--accel user), as threads of the program, isolated from \
                     nothing in it; {keys}"
                ),
            )
        }
        Err(error) => Finding::worse(
            "user",
            format!("guests cannot run without KVM: {}", chain(&error)),
            "use KVM",
        ),
    }
}
