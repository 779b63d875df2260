//! Steps and holds in words.

use super::super::performer::{Hold, Who};
use super::super::script::Step;

/// What a kind of hold is called.
pub const fn kind(hold: Hold) -> &'static str {
    match hold {
        Hold::GetRead => "a reader's hold",
        Hold::GetWrite => "a writer's hold",
        Hold::PinRead => "a pin for reading",
        Hold::PinWrite => "a pin for writing",
    }
}

/// How `parent` comes to have a child.
pub(super) fn fork(parent: Who) -> String {
    if parent.runs() {
        format!("{parent:?} forks")
    } else {
        format!("a clone starts from {parent:?}")
    }
}

/// A step that was not done.
pub(super) fn words(step: &Step) -> String {
    match step {
        Step::Fork(parent, _) => fork(*parent),
        Step::Discard(who, page) => format!("{who:?} gives page {page} back to the host"),
        Step::Migrate(who, page) => format!("page {page} of {who:?} moves to another frame"),
        Step::Merge((a, m), (b, n)) => {
            format!("page {m} of {a:?} and page {n} of {b:?} are merged")
        }
        other => format!("{other:?}"),
    }
}
