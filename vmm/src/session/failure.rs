//! What a guest says that it has seen go wrong, as a violation.

use guest::abi::{Failure, FailureKind};

use super::vm::PayloadVm;
use crate::check::{Oracle, Violation};
use crate::dma::Mismatch;
use palimpsest::mm::Gfn;

/// What `failure`, of the guest in `vm`, amounts to. `mismatches` are what its devices have read and should not
/// have, in order: the guest cannot know what a device saw.
pub(super) fn violation<'a>(
    failure: &Failure,
    vm: &PayloadVm,
    mismatches: impl DoubleEndedIterator<Item = &'a Mismatch>,
) -> Violation {
    let kind = FailureKind::from_raw(failure.kind);
    let (oracle, what) = match kind {
        Some(FailureKind::Page) => (Oracle::Life, "a page is not what the guest left there"),
        Some(FailureKind::DmaToGuest) => (
            Oracle::Coherence,
            "the guest does not see what a device wrote",
        ),
        Some(FailureKind::DmaFromGuest) => (
            Oracle::Coherence,
            "a device does not see what the guest wrote",
        ),
        Some(FailureKind::Margin) => (
            Oracle::Coherence,
            "the guest's own bytes beside a DMA buffer are lost",
        ),
        Some(FailureKind::Ring) => (
            Oracle::Coherence,
            "a completion makes no sense to the guest",
        ),
        Some(FailureKind::Register) => (Oracle::Life, "a register is not what the vcpu left there"),
        None => (Oracle::Life, "the guest reports a failure of unknown kind"),
    };
    let mut v = Violation::new(
        oracle,
        format!("{what} (vcpu {}, operation {})", failure.vcpu, failure.op),
    );
    v.expected = format!("{:#018x}", failure.expected);
    v.found = match kind {
        Some(FailureKind::DmaFromGuest) => seen_by_device(failure, mismatches),
        _ => format!("{:#018x}", failure.found),
    };
    if kind == Some(FailureKind::Register) {
        return v;
    }
    v.gpa = Some(failure.gpa);
    if failure.seq != 0 || failure.device != 0 {
        v.last_writer = format!("device {}, request {}", failure.device, failure.seq);
    }
    if let Ok(entry) = vm.space().entry(Gfn::of_gpa(failure.gpa)) {
        let state = vm.frames().pool().state(entry.pfn());
        v.frame = format!("{entry:?} {state:?}");
    }
    v
}

/// A failure that the guest reports, and that cannot be read for the reason `why`.
pub(super) fn unreadable(why: &str) -> Violation {
    let what = format!("the guest reports a failure that cannot be read, {why}");
    Violation::new(Oracle::Life, what)
}

/// What the device saw of the request that `failure` is about.
fn seen_by_device<'a>(
    failure: &Failure,
    mismatches: impl DoubleEndedIterator<Item = &'a Mismatch>,
) -> String {
    let of_request = |m: &&Mismatch| (m.device, m.seq) == (failure.device, failure.seq);
    match mismatches.rev().find(of_request) {
        Some(mismatch) => format!("{:#018x}", mismatch.found),
        None => format!("{:#018x} by the guest, else by the device", failure.found),
    }
}
