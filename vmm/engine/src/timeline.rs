//! What happens when, for whoever draws it.
//!
//! The engine's threads say what they are doing by `tracing` spans of one target. Nobody else need be
//! interested in them, and then they cost a load each.
//!
//! | thread | spans |
//! |---|---|
//! | whoever takes snapshots | `snapshot`: `prepare`, `park`, `devices`, `fork`, `registers`, `resume` |
//! | | `restore`: `park`, `devices`, `memory`, `resume` |
//! | a vCPU's | `parked`; in it `capture` and `set registers`; `fault`, without KVM with its address |
//! | the one that copies ahead | `copy ahead` |
//! | who steps [`aside`](crate::aside) | `aside` |

/// The target of all spans of a timeline.
pub const TARGET: &str = "palimpsest::timeline";

/// Begins a span of the timeline, which ends when what this gives is dropped.
macro_rules! span {
    ($name:literal $(, $field:ident = $value:expr)*) => {
        tracing::trace_span!(target: $crate::timeline::TARGET, $name $(, $field = $value)*).entered()
    };
}

pub(crate) use span;
