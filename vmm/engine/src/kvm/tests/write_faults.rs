//! What a guest writes where it may not write yet.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ::guest::abi::{PAGE_SIZE, PAGE_TABLES_GPA};
use rustix::mm::MprotectFlags;

use super::code::{EXIT_42, RDI_DATA, SPIN};
use super::guest::{Guest, wait_until};
use super::memory::Faults;
use super::{DATA, need_kvm};
use crate::kvm::*;
use crate::vcpus::Capture;

#[test]
fn a_write_fault_a_page() {
    let kvm = need_kvm!();
    // mov ecx, 256; l: mov [rdi], rcx; add rdi, 4096; dec ecx; jnz l
    let code: &[u8] = &[
        0xb9, 0x00, 0x01, 0x00, 0x00, 0x48, 0x89, 0x0f, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,
        0xff, 0xc9, 0x75, 0xf2,
    ];
    let guest = Guest::new(kvm, 1, &[RDI_DATA, code, EXIT_42]);
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    assert_eq!(guest.ram.resolved(), 256);
    let stats = guest.machine.stats();
    assert_eq!(stats.rungs.of(Rung::Operand), 256);
    assert!((256..260).contains(&stats.write_faults), "{stats:?}");
    for page in 0..256 {
        assert_eq!(guest.ram.word(DATA + page * PAGE_SIZE), 256 - page);
    }
}

/// Every way of storing, from pages that are all read-only. What counts is that the guest gets through.
#[test]
fn every_kind_of_store_is_resolved() {
    let kvm = need_kvm!();
    // mov rdi, 0x400000, moved on by `page` pages and `offset`.
    let at = |page: u32, offset: u32| {
        let address = DATA as u32 + page * 4096 + offset;
        [&[0x48, 0xc7, 0xc7][..], &address.to_le_bytes()].concat()
    };
    let mut page = 0;
    let mut code = Vec::new();
    let mut expected = 0;
    // Offset in the page, instruction, pages written.
    let stores: &[(u32, &[u8], u64)] = &[
        (8, &[0x48, 0x89, 0x07], 1),                         // mov [rdi], rax
        (4092, &[0x48, 0x89, 0x07], 2),                      // the same across pages
        (4090, &[0xf3, 0x0f, 0x7f, 0x07], 2),                // movdqu [rdi], xmm0
        (0, &[0x66, 0x0f, 0x7f, 0x07], 1),                   // movdqa [rdi], xmm0
        (0, &[0xf0, 0x48, 0x0f, 0xc1, 0x07], 1),             // lock xadd [rdi], rax
        (0, &[0xf0, 0x48, 0x0f, 0xc7, 0x0f], 1),             // lock cmpxchg16b [rdi]
        (0, &[0xf0, 0x0f, 0xb1, 0x07], 1),                   // lock cmpxchg [rdi], eax
        (0, &[0x48, 0x87, 0x07], 1),                         // xchg [rdi], rax
        (0, &[0xff, 0x07], 1),                               // inc dword [rdi]
        (0, &[0x80, 0x27, 0x01], 1),                         // and byte [rdi], 1
        (0, &[0x0f, 0x94, 0x07], 1),                         // sete [rdi]
        (0, &[0x0f, 0xc3, 0x07], 1),                         // movnti [rdi], eax
        (4088, &[0x66, 0x0f, 0xf7, 0xc0], 0), // maskmovdqu xmm0, xmm0: all masked out
        (0, &[0xb9, 0x00, 0x30, 0x00, 0x00, 0xf3, 0xaa], 3), // mov ecx, 0x3000; rep stosb
        // mov esi, 0x200000; mov ecx, 0x400; rep movsq
        (
            0,
            &[0xbe, 0, 0, 0x20, 0, 0xb9, 0, 4, 0, 0, 0xf3, 0x48, 0xa5],
            2,
        ),
        // std; mov ecx, 0x201; rep stosq; cld: downwards, into the page below.
        (
            4096,
            &[0xfd, 0xb9, 0x01, 0x02, 0, 0, 0xf3, 0x48, 0xab, 0xfc],
            2,
        ),
        // mov ecx, 0x8000; bts [rdi], rcx: the page behind.
        (
            0,
            &[0xb9, 0x00, 0x80, 0x00, 0x00, 0x48, 0x0f, 0xab, 0x0f],
            1,
        ),
        // mov rcx, -1; lock btc [rdi], rcx: the page below.
        (
            4096,
            &[
                0x48, 0xc7, 0xc1, 0xff, 0xff, 0xff, 0xff, 0xf0, 0x48, 0x0f, 0xbb, 0x0f,
            ],
            1,
        ),
        // mov rsp, rdi; push rax; call $+5
        (4096 + 4, &[0x48, 0x89, 0xfc, 0x50, 0xe8, 0, 0, 0, 0], 2),
        // lea rsp, [rdi + 0x2008]; enter 0x1000, 0
        (
            0,
            &[0x48, 0x8d, 0xa7, 0x08, 0x20, 0, 0, 0xc8, 0x00, 0x10, 0x00],
            2,
        ),
        (0, &[0x0f, 0xae, 0x07], 1),                   // fxsave [rdi]
        (0, &[0xdd, 0x37], 1),                         // fnsave [rdi]
        (0, &[0x0f, 0xae, 0x1f], 1),                   // stmxcsr [rdi]
        (0, &[0xdb, 0xe3, 0xd9, 0xe8, 0xdb, 0x3f], 1), // fninit; fld1; fstp tbyte [rdi]
        (0, &[0x48, 0x0f, 0x7f, 0x3f], 1),             // movq [rdi], mm7
    ];
    for (offset, store, pages) in stores {
        code.push(at(page, *offset));
        code.push(store.to_vec());
        expected += pages;
        page += 4;
    }
    let code: Vec<&[u8]> = code.iter().map(Vec::as_slice).chain([EXIT_42]).collect();
    let guest = Guest::new(kvm, 1, &code);
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    // A masked-out store may fault or not, which is up to the CPU.
    let found = guest.ram.resolved();
    assert!(
        (expected..=expected + 2).contains(&found),
        "{found} pages, {expected} expected"
    );
}

#[test]
fn avx_and_xsave_stores_are_resolved() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[SPIN]);
    guest.start();
    let paused = guest.machine.pause(Capture::Nothing).unwrap();
    let osxsave = paused.states().unwrap()[0].sregs().cr4 & (1 << 18) != 0;
    paused.resume();
    drop(guest);
    if !osxsave {
        eprintln!("skipped: guests have no xsave");
        return;
    }
    let code: &[u8] = &[
        0x31, 0xc9, 0x0f, 0x01, 0xd0, // xor ecx, ecx; xgetbv
        0x66, 0xba, 0x00, 0x05, 0xef, // mov dx, 0x500; out dx, eax
        0xb8, 0x03, 0x00, 0x00, 0x00, 0x31, 0xd2, // mov eax, 3; xor edx, edx
        0x0f, 0xae, 0x27, // xsave [rdi]
        0x48, 0x81, 0xc7, 0xf0, 0x2f, 0x00, 0x00, // add rdi, 0x2ff0
        0xf3, 0x0f, 0x7f, 0x07, // movdqu [rdi], xmm0
    ];
    let guest = Guest::new(kvm, 1, &[RDI_DATA, code, EXIT_42]);
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    let xcr0 = guest.ports.written()[0].2;
    eprintln!("guest xcr0: {xcr0:#x}");
    assert_eq!(xcr0 & 3, 3);
    assert_ne!(
        guest.ram.word(DATA + 24) as u32,
        0,
        "mxcsr in the xsave area"
    );
    if xcr0 & 4 == 0 {
        return;
    }
    // lea rax, [rdi - 8]; vpcmpeqd ymm0, ymm0, ymm0; vmovdqu [rax + 4096], ymm0; vmaskmovps [rax + 0x4000],
    // ymm0, ymm0
    let code: &[u8] = &[
        0x48, 0x8d, 0x47, 0xf8, 0xc5, 0xfd, 0x76, 0xc0, 0xc5, 0xfe, 0x7f, 0x80, 0x00, 0x10, 0x00,
        0x00, 0xc4, 0xe2, 0x7d, 0x2e, 0x80, 0x00, 0x40, 0x00, 0x00,
    ];
    let guest = Guest::new(kvm, 1, &[RDI_DATA, code, EXIT_42]);
    guest.ram.write_protect(0);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    assert_eq!(guest.ram.resolved(), 4);
}

#[test]
fn a_scatter_reaches_read_only_pages() {
    let kvm = need_kvm!();
    if !std::arch::is_x86_feature_detected!("avx512f") {
        eprintln!("skipped: this cpu has no scatter");
        return;
    }
    // kxnorw k1, k1, k1; vmovdqu32 zmm1, [rdi + 0x100]; vpbroadcastd zmm0, edi; vpscatterdd [rdi + zmm1]
    // {k1}, zmm0
    let code: &[u8] = &[
        0xc5, 0xf4, 0x46, 0xc9, 0x62, 0xf1, 0x7e, 0x48, 0x6f, 0x4f, 0x04, 0x62, 0xf2, 0x7d, 0x48,
        0x7c, 0xc7, 0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x04, 0x0f,
    ];
    let guest = Guest::new(kvm, 1, &[RDI_DATA, code, EXIT_42]);
    for index in 0..16_u64 {
        let offset = (index * 3 * PAGE_SIZE) as u32;
        guest
            .ram
            .write(DATA + 0x100 + index * 4, &offset.to_le_bytes())
            .unwrap();
    }
    guest.ram.write_protect(DATA);
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    for index in 0..16 {
        let gpa = DATA + index * 3 * PAGE_SIZE;
        assert_eq!(guest.ram.word(gpa) as u32, DATA as u32, "element {index}");
    }
    assert_eq!(guest.ram.resolved(), 16);
}

/// A CPU, or the shadow MMU in its place, that must set accessed and dirty bits in tables that are read-only.
#[test]
fn accessed_and_dirty_bits_are_set_in_read_only_tables() {
    let kvm = need_kvm!();
    // mov eax, [rdi]; mov [rdi + 8], eax
    let guest = Guest::new(
        kvm,
        1,
        &[RDI_DATA, &[0x8b, 0x07, 0x89, 0x47, 0x08], EXIT_42],
    );
    let slot = PAGE_TABLES_GPA + 0x2000 + 2 * 8;
    let clear = guest.ram.word(slot) & !0b110_0000;
    guest.ram.write(slot, &clear.to_le_bytes()).unwrap();
    guest.ram.write_protect(0);
    if !guest.machine.may_lose_write_access() {
        // As a fork does there before the vCPUs run on.
        let pages = 0..GuestRam::len(&*guest.ram) / PAGE_SIZE;
        crate::kvm::table_bits::keep_writable(&*guest.ram, pages).unwrap();
    }
    guest.start();
    assert_eq!(guest.exit_status(), 42);
    assert_eq!(guest.ram.word(slot), clear | 0b110_0000);
}

/// Instructions that ring 3 may not execute where the host has UMIP, and that KVM then emulates: stores of 2
/// bytes come to the VMM as MMIO at an address that is memory, those of descriptor tables are tried again
/// inside `KVM_RUN` until the page is writable.
#[test]
fn stores_that_kvm_emulates_are_carried_out() {
    let kvm = need_kvm!();
    let stores: [(&str, &[u8], u64); 5] = [
        ("sldt", &[0x66, 0x0f, 0x00, 0x07], 2),
        ("str", &[0x66, 0x0f, 0x00, 0x0f], 2),
        ("smsw", &[0x66, 0x0f, 0x01, 0x27], 2),
        ("sgdt", &[0x0f, 0x01, 0x07], 10),
        ("sidt", &[0x0f, 0x01, 0x0f], 10),
    ];
    for (name, store, len) in stores {
        let guest = Guest::new(kvm, 1, &[RDI_DATA, store, EXIT_42]);
        let before = 0x5555_5555_5555_5555_u64;
        for word in 0..3 {
            guest
                .ram
                .write(DATA + word * 8, &before.to_le_bytes())
                .unwrap();
        }
        guest.ram.write_protect(DATA);
        guest.start();
        assert_eq!(guest.exit_status(), 42, "{name}");
        assert!(guest.ram.resolved() > 0, "{name}");
        let mut stored = [0; 24];
        guest.ram.read(DATA, &mut stored).unwrap();
        let (stored, rest) = stored.split_at(len as usize);
        assert_ne!(
            stored,
            &before.to_le_bytes().repeat(2)[..len as usize],
            "{name}"
        );
        assert!(rest.iter().all(|byte| *byte == 0x55), "{name}: {rest:x?}");
        let stats = guest.machine.stats();
        let found = stats.emulated_stores + stats.rungs.of(Rung::Operand);
        assert!(found > 0, "{name}: {stats:?}");
    }
}

/// Two vCPUs write the same pages while these are write-protected again and again. At every pause registers
/// and memory agree on how often.
#[test]
fn two_vcpus_lose_no_increment() {
    let kvm = need_kvm!();
    // l: mov eax, ecx; and eax, 0x3f; shl eax, 12; lock inc qword [rdi + rax]; inc rcx; jmp l
    let code: &[u8] = &[
        0x89, 0xc8, 0x83, 0xe0, 0x3f, 0xc1, 0xe0, 0x0c, 0xf0, 0x48, 0xff, 0x04, 0x07, 0x48, 0xff,
        0xc1, 0xeb, 0xee,
    ];
    let guest = Guest::new(kvm, 2, &[RDI_DATA, code]);
    guest.start();
    for _ in 0..200 {
        let paused = guest.machine.pause(Capture::Registers).unwrap();
        let states = paused.states().unwrap();
        let counted: u64 = states.iter().map(|state| state.regs().rcx).sum();
        let done: u64 = (0..64)
            .map(|page| guest.ram.word(DATA + page * PAGE_SIZE))
            .sum();
        // Each vCPU may stand between its increment of memory and that of its register.
        assert!(
            (counted..=counted + 2).contains(&done),
            "{done} done, {counted} counted"
        );
        guest.ram.write_protect(DATA);
        let resolved = guest.ram.resolved();
        drop(paused);
        thread::sleep(Duration::from_millis(1));
        // On a busy host that may not have been enough for a single store.
        wait_until("fault", || guest.ram.resolved() > resolved);
    }
    let stats = guest.machine.stats();
    assert!(stats.write_faults >= guest.ram.resolved() / 2 && guest.ram.resolved() >= 200);
    // A vCPU that is still parked is not kicked, which here is none of them.
    assert_eq!(stats.kicks, 400);
}

#[test]
fn a_fault_that_is_no_write_is_a_failure() {
    let kvm = need_kvm!();
    // mov rax, [rdi]
    let guest = Guest::new(kvm, 1, &[RDI_DATA, &[0x48, 0x8b, 0x07], SPIN]);
    guest.ram.protect(DATA, PAGE_SIZE, MprotectFlags::empty());
    guest.start();
    assert!(matches!(
        guest.failure(),
        VcpuRunError::Fault { source: WriteFaultError::Stuck { instruction, .. } } if instruction == "mov"
    ));
}

#[test]
fn a_fault_that_comes_back_for_ever_is_a_failure() {
    let kvm = need_kvm!();
    let store = [RDI_DATA, &[0x48, 0x89, 0x07], SPIN];
    let guest = Guest::with(kvm, 1, &store, Faults::SayWritable, Arc::default());
    guest.ram.write_protect(DATA);
    guest.start();
    assert!(matches!(
        guest.failure(),
        VcpuRunError::Fault { source: WriteFaultError::Stuck { tried, .. } }
            if tried.contains("operands (1 pages)")
    ));
    let guest = Guest::with(kvm, 1, &store, Faults::Fail, Arc::default());
    guest.ram.write_protect(DATA);
    guest.start();
    assert!(matches!(
        guest.failure(),
        VcpuRunError::Memory { gfn, .. } if gfn == DATA / PAGE_SIZE
    ));
}
