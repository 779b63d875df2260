//! The system calls that change memory, by name.

/// Which call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Map,
    Protect,
    Allocate,
    PunchHole,
    Collapse,
}
