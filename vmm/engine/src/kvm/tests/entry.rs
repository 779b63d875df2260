//! How a guest begins, and what comes out of it.

use ::guest::abi::IMAGE_GPA;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::code::{EXIT_42, SPIN};
use super::guest::{Guest, from};
use super::{PORT_DATA, PORT_EVENT, PORT_EXIT, need_kvm};
use crate::kvm::*;
use crate::vcpus::Capture;

#[test]
fn boots_in_ring_3_and_exits() {
    let kvm = need_kvm!();
    eprintln!("{}", kvm.platform());
    // mov ax, cs; mov dx, 0x500; out dx, ax; mov al, 0xfe; out dx, al
    let code: &[u8] = &[
        0x66, 0x8c, 0xc8, 0x66, 0xba, 0x00, 0x05, 0x66, 0xef, 0xb0, 0xfe, 0xee,
    ];
    let guest = Guest::new(kvm, 1, &[code, EXIT_42]);
    eprintln!("msrs left out: {:x?}", guest.machine.left_out());
    assert!(matches!(
        guest.machine.pause(Capture::Nothing),
        Err(KvmError::NotStarted)
    ));
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    let written = guest.ports.written();
    let [(0, PORT_DATA, cs), (0, PORT_DATA, 0xfe), (0, PORT_EXIT, 42)] = written[..] else {
        panic!("{written:x?}");
    };
    assert_eq!(cs & 3, 3, "ring of the code segment");
    assert_eq!(guest.machine.stats().port_exits, 3);
    assert!(matches!(
        guest.machine.start(from(IMAGE_GPA)),
        Err(KvmError::AlreadyStarted)
    ));
    assert!(matches!(
        guest.machine.pause(Capture::Nothing),
        Err(KvmError::Stopped { vcpu: 0 })
    ));
}

#[test]
fn entry_state_is_what_the_abi_says() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[SPIN]);
    guest.start();
    let states = guest.machine.pause(Capture::Registers).unwrap().states();
    for (vcpu, state) in states.unwrap().iter().enumerate() {
        assert_eq!(state.rip(), IMAGE_GPA);
        let regs = state.regs();
        assert_eq!(regs.rdi, ::guest::abi::BOOT_INFO_GPA);
        assert_eq!(regs.rsi, vcpu as u64);
        assert_eq!(regs.rsp, ::guest::abi::stack_top(vcpu as u64));
        // Interrupts on. The I/O privilege level is not looked at: PVM does not keep it.
        assert_eq!(regs.rflags & 0x202, 0x202, "{:x}", regs.rflags);
        let rest = [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rbp, regs.r8, regs.r15,
        ];
        assert_eq!(rest, [0; 7]);
        assert_eq!(state.mm7(), 0);
        assert!(
            state.is_confined_to_ring_3(),
            "captures would read everything every time"
        );
    }
}

#[test]
fn a_doorbell_signals_an_event() {
    let kvm = need_kvm!();
    // mov dx, 0x520; mov ecx, 5; l: out dx, eax; dec ecx; jnz l
    let code: &[u8] = &[
        0x66, 0xba, 0x20, 0x05, 0xb9, 0x05, 0x00, 0x00, 0x00, 0xef, 0xff, 0xc9, 0x75, 0xfb,
    ];
    let guest = Guest::new(kvm, 1, &[code, EXIT_42]);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.machine.register_doorbell(PORT_EVENT, &event).unwrap();
    assert!(matches!(
        guest.machine.register_doorbell(PORT_EVENT, &event),
        Err(KvmError::Doorbell {
            port: PORT_EVENT,
            ..
        })
    ));
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    assert_eq!(event.read().unwrap(), 5);
    assert_eq!(guest.ports.written(), [(0, PORT_EXIT, 42)]);
}
