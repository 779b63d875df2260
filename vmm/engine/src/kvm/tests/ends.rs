//! How vCPUs end, and machines that never begin.

use std::sync::Arc;

use ::guest::abi::IMAGE_GPA;

use super::code::SPIN;
use super::guest::{Guest, Ports};
use super::memory::{Faults, TestRam};
use super::{MEMORY, need_kvm};
use crate::kvm::*;

#[test]
fn an_exception_is_a_crash_with_its_code() {
    let kvm = need_kvm!();
    // nop; ud2
    let guest = Guest::new(kvm, 1, &[&[0x90, 0x0f, 0x0b, 0x48, 0x89, 0x07]]);
    guest.start();
    let (reason, report) = guest.crash();
    assert_eq!(reason, CrashReason::Shutdown);
    if kvm.platform().kvm == "svm" {
        let text = report.to_string();
        assert!(
            text.starts_with("where it was this host does not tell"),
            "{text}"
        );
        return;
    }
    let state = report.state.as_ref().unwrap();
    assert_eq!(state.rip(), IMAGE_GPA + 1);
    assert_eq!(report.code.len(), 16);
    assert_eq!(report.code[..5], [0x0f, 0x0b, 0x48, 0x89, 0x07]);
    let text = report.to_string();
    assert!(text.contains("rip 0000000000200001"), "{text}");
    assert!(text.contains("code at rip: 0f 0b 48"), "{text}");
}

#[test]
fn what_guests_must_not_do_is_a_crash() {
    let kvm = need_kvm!();
    let crash = |code: &[u8]| {
        let guest = Guest::new(kvm, 1, &[code, SPIN]);
        guest.start();
        guest.crash().0
    };
    // in al, 0x60
    assert_eq!(crash(&[0xe4, 0x60]), CrashReason::PortRead { port: 0x60 });
    // mov [0x9f0000], eax; mov eax, [0x9f0000]: mapped, but behind the end of memory.
    let gpa = MEMORY + 0xf_0000;
    assert_eq!(
        crash(&[0x89, 0x04, 0x25, 0x00, 0x00, 0x9f, 0x00]),
        CrashReason::Mmio { gpa, write: true }
    );
    assert_eq!(
        crash(&[0x8b, 0x04, 0x25, 0x00, 0x00, 0x9f, 0x00]),
        CrashReason::Mmio { gpa, write: false }
    );
    // hlt is for ring 0; a load from what is not mapped; a jump to nowhere.
    assert_eq!(crash(&[0xf4]), CrashReason::Shutdown);
    assert_eq!(
        crash(&[0x8b, 0x04, 0x25, 0, 0, 0, 0x70]),
        CrashReason::Shutdown
    );
    assert_eq!(
        crash(&[0x31, 0xc0, 0x48, 0xf7, 0xd0, 0xff, 0xe0]),
        CrashReason::Shutdown
    );
}

#[test]
fn machines_that_never_start_are_dropped() {
    let kvm = need_kvm!();
    for vcpus in [1, 2, 16] {
        drop(Guest::new(kvm, vcpus, &[SPIN]));
    }
    let ram = TestRam::new(MEMORY, Faults::Resolve);
    for vcpus in [0, MAX_VCPUS + 1] {
        let ram: Arc<TestRam> = Arc::clone(&ram);
        let ports = Arc::new(Ports::default());
        let error = Machine::new(
            kvm,
            Arc::clone(&ram) as _,
            ram,
            vcpus,
            ports,
            Box::new(|_, _| {}),
        )
        .unwrap_err();
        assert!(matches!(error, KvmError::VcpuCount { .. }));
    }
}

#[test]
fn vcpus_that_end_are_waited_for() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[SPIN]);
    guest.start();
    guest.machine.stop();
    guest.machine.wait_until_stopped().unwrap();
}
