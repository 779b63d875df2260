//! vCPUs that KVM keeps from getting on.

use super::*;

#[test]
fn a_stalled_vcpu_is_given_what_it_writes() {
    let stalled = |code: &[u8]| {
        let regs = kvm_regs {
            rdi: 0x30_0000,
            ..entry_regs(&entry(CODE, 0))
        };
        let fault = WriteFault {
            regs: &regs,
            sregs: &sregs(),
            gpas: None,
            cpuid: &no_cpuid(),
            xsave: &|| None,
        };
        stalled_on(&fault, &guest(code)).unwrap()
    };
    assert_eq!(stalled(STORE), (vec![0x300], StoredBy::Cpu));
    assert_eq!(stalled(&[0xeb, 0xfe]), (vec![], StoredBy::Cpu));
    // sgdt, sidt, sldt, smsw, str: KVM emulates them, and their region is given.
    let region = Vec::from_iter(0x200..0x400);
    for code in [
        &[0x0f, 0x01, 0x07][..],
        &[0x0f, 0x01, 0x0f],
        &[0x0f, 0x00, 0x07],
        &[0x0f, 0x01, 0x27],
        &[0x0f, 0x00, 0x0f],
    ] {
        assert_eq!(stalled(code), (region.clone(), StoredBy::Kvm));
    }
}

#[test]
fn a_page_fault_without_a_reason_is_over() {
    let regs = kvm_regs {
        rdi: 0x30_0ffc,
        ..entry_regs(&entry(CODE, 0))
    };
    let is_over = |code: &[u8], cr2| {
        let sregs = kvm_sregs { cr2, ..sregs() };
        let fault = WriteFault {
            regs: &regs,
            sregs: &sregs,
            gpas: None,
            cpuid: &no_cpuid(),
            xsave: &|| None,
        };
        page_fault_is_over(&fault, &guest(code)).unwrap()
    };
    // Of the operand, on both of its pages, and of the code.
    for cr2 in [0x30_0ffc, 0x30_1003, CODE + 2] {
        assert!(is_over(STORE, cr2), "{cr2:#x}");
    }
    // Elsewhere it is of another time.
    for cr2 in [0x30_0ffb, 0x30_1004, CODE + 3, MEMORY, 0] {
        assert!(!is_over(STORE, cr2), "{cr2:#x}");
    }
    // What is no instruction has its code, which is there.
    assert!(is_over(&[0x06], CODE));
}
