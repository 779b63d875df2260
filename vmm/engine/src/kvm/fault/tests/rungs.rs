//! The pages of each rung.

use kvm_bindings::{kvm_cpuid_entry2, kvm_xsave};

use super::*;
use crate::mm::PAGE_SIZE;

#[test]
fn plain_stores() {
    // mov [rdi], rax
    let mov = [0x48, 0x89, 0x07];
    assert_eq!(frames(&mov, |r| r.rdi = 0x30_0010), [0x300]);
    // Across a page boundary.
    assert_eq!(frames(&mov, |r| r.rdi = 0x30_0ffc), [0x300, 0x301]);
    assert_eq!(frames(&mov, |r| r.rdi = 0x30_0ff8), [0x300]);
    // mov byte ptr [rdi + rcx * 8 + 0x1000], 1
    let mov = [0xc6, 0x84, 0xcf, 0x00, 0x10, 0x00, 0x00, 0x01];
    let set = |r: &mut kvm_regs| (r.rdi, r.rcx) = (0x30_0000, 0x200);
    assert_eq!(frames(&mov, set), [0x302]);
    // mov [r12 - 8], r13d
    let mov = [0x45, 0x89, 0x6c, 0x24, 0xf8];
    assert_eq!(frames(&mov, |r| r.r12 = 0x30_0004), [0x2ff]);
    assert_eq!(frames(&mov, |r| r.r12 = 0x30_0006), [0x2ff, 0x300]);
    // mov [rip + 0x1000], eax: relative to the next instruction.
    let mov = [0x89, 0x05, 0x00, 0x10, 0x00, 0x00];
    assert_eq!(frames(&mov, |_| {}), [0x201]);
    // mov [edi], eax: the upper half of rdi does not count.
    let mov = [0x67, 0x89, 0x07];
    assert_eq!(frames(&mov, |r| r.rdi = 0xdead_0030_0000), [0x300]);
    // movdqu [rdi], xmm0, across a page boundary.
    let mov = [0xf3, 0x0f, 0x7f, 0x07];
    assert_eq!(frames(&mov, |r| r.rdi = 0x30_0ff8), [0x300, 0x301]);
    // movnti [rdi], eax
    let mov = [0x0f, 0xc3, 0x07];
    assert_eq!(frames(&mov, |r| r.rdi = 0x30_0000), [0x300]);
}

#[test]
fn the_stack() {
    let top = |r: &mut kvm_regs| r.rsp = 0x30_0000;
    assert_eq!(frames(&[0x50], top), [0x2ff], "push rax");
    assert_eq!(
        frames(&[0xe8, 0, 0, 0, 0], |r| r.rsp = 0x30_0004),
        [0x2ff, 0x300],
        "call"
    );
    // call [rdi]: the pointer is read, the return address written.
    let set = |r: &mut kvm_regs| (r.rsp, r.rdi) = (0x30_0000, 0x31_0000);
    assert_eq!(frames(&[0xff, 0x17], set), [0x2ff]);
    // pop [rdi]: read from the stack, written to memory.
    assert_eq!(frames(&[0x8f, 0x07], set), [0x310]);
    // push [rdi]
    assert_eq!(frames(&[0xff, 0x37], set), [0x2ff]);
    // pushfq
    assert_eq!(frames(&[0x9c], top), [0x2ff]);
    // enter 0x3000, 0: rbp is pushed, and the new top of the stack is checked.
    assert_eq!(frames(&[0xc8, 0x00, 0x30, 0x00], top), [0x2fc, 0x2ff]);
    // enter 16, 2
    assert_eq!(
        frames(&[0xc8, 0x10, 0x00, 0x02], |r| (r.rsp, r.rbp) =
            (0x30_0008, 0x31_0000)),
        [0x2ff, 0x300]
    );
}

#[test]
fn string_instructions_give_the_current_element() {
    let set = |r: &mut kvm_regs| {
        (r.rdi, r.rsi, r.rcx) = (0x30_0ffc, 0x31_0000, 0x1000);
    };
    assert_eq!(frames(&[0xf3, 0xaa], set), [0x300], "rep stosb");
    assert_eq!(frames(&[0xf3, 0xa4], set), [0x300], "rep movsb");
    assert_eq!(
        frames(&[0xf3, 0x48, 0xab], set),
        [0x300, 0x301],
        "rep stosq"
    );
    assert_eq!(frames(&[0x48, 0xa5], set), [0x300, 0x301], "movsq");
    // Downwards the element is still the one at rdi.
    let down = |r: &mut kvm_regs| {
        set(r);
        r.rflags |= 1 << 10;
    };
    assert_eq!(frames(&[0xf3, 0xaa], down), [0x300]);
    assert_eq!(frames(&[0xf3, 0x48, 0xab], down), [0x300, 0x301]);
}

#[test]
fn read_modify_write() {
    let set = |r: &mut kvm_regs| r.rdi = 0x30_0000;
    assert_eq!(
        frames(&[0xf0, 0x48, 0x0f, 0xc1, 0x07], set),
        [0x300],
        "lock xadd"
    );
    assert_eq!(
        frames(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f], set),
        [0x300],
        "lock cmpxchg16b"
    );
    assert_eq!(
        frames(&[0xf0, 0x0f, 0xb1, 0x0f], set),
        [0x300],
        "lock cmpxchg"
    );
    assert_eq!(frames(&[0x48, 0x87, 0x07], set), [0x300], "xchg");
    assert_eq!(frames(&[0x80, 0x27, 0x01], set), [0x300], "and");
    assert_eq!(frames(&[0x48, 0xff, 0x07], set), [0x300], "inc");
    assert_eq!(frames(&[0x0f, 0x94, 0x07], set), [0x300], "sete");
}

#[test]
fn bit_tests_reach_beyond_their_operand() {
    // bts [rdi], rcx
    let bts = [0x48, 0x0f, 0xab, 0x0f];
    let at = |bit: i64| move |r: &mut kvm_regs| (r.rdi, r.rcx) = (0x30_0000, bit as u64);
    assert_eq!(frames(&bts, at(63)), [0x300]);
    assert_eq!(frames(&bts, at(4096 * 8)), [0x301]);
    assert_eq!(frames(&bts, at(-1)), [0x2ff]);
    // lock btr [rdi], ecx: only 32 bits of the register, with their sign.
    let btr = [0xf0, 0x0f, 0xb3, 0x0f];
    assert_eq!(frames(&btr, at(0xffff_ffff)), [0x2ff]);
    // btc word ptr [rdi], cx
    let btc = [0x66, 0x0f, 0xbb, 0x0f];
    assert_eq!(frames(&btc, at(0x1_0000 + 0x7fff)), [0x300]);
    // bts qword ptr [rdi], 5
    assert_eq!(
        frames(&[0x48, 0x0f, 0xba, 0x2f, 0x05], at(1 << 20)),
        [0x300]
    );
}

#[test]
fn segments_have_bases() {
    // mov fs:[0x10], eax
    let mov = [0x64, 0x89, 0x04, 0x25, 0x10, 0x00, 0x00, 0x00];
    let mut sregs = sregs();
    sregs.fs.base = 0x30_0000;
    sregs.gs.base = 0x31_0000;
    let mut regs = entry_regs(&entry(CODE, 0));
    let frames = |code: &[u8], regs: &kvm_regs| pages(Rung::Operand, regs, &sregs, &guest(code));
    assert_eq!(frames(&mov, &regs), [0x300]);
    // mov gs:[edi], eax: the base is added to 32 bits of the address.
    regs.rdi = 0xdead_0000_2000;
    assert_eq!(frames(&[0x65, 0x67, 0x89, 0x07], &regs), [0x312]);
}

#[test]
fn large_and_masked_stores() {
    let set = |r: &mut kvm_regs| r.rdi = 0x30_0ff8;
    assert_eq!(
        frames(&[0x66, 0x0f, 0xf7, 0xc1], set),
        [0x300, 0x301],
        "maskmovdqu"
    );
    // vmaskmovps [rdi], ymm0, ymm1
    assert_eq!(frames(&[0xc4, 0xe2, 0x7d, 0x2e, 0x0f], set), [0x300, 0x301]);
    // fxsave [rdi]
    assert_eq!(
        frames(&[0x0f, 0xae, 0x07], |r| r.rdi = 0x30_0e80),
        [0x300, 0x301]
    );
    // xsave [rdi]: taken for as large as it can be.
    assert_eq!(
        frames(&[0x0f, 0xae, 0x27], |r| r.rdi = 0x30_0040),
        [0x300, 0x301]
    );
    // vmovdqu64 [rdi], zmm0
    assert_eq!(
        frames(&[0x62, 0xf1, 0xfe, 0x48, 0x7f, 0x07], set),
        [0x300, 0x301]
    );
    // fnsave [rdi]
    assert_eq!(frames(&[0xdd, 0x37], |r| r.rdi = 0x30_0fa0), [0x300, 0x301]);
    // movdir64b rdi, [rsi]: written at the register, 64 bytes.
    let set = |r: &mut kvm_regs| (r.rdi, r.rsi) = (0x30_0000, 0x31_0000);
    assert_eq!(frames(&[0x66, 0x0f, 0x38, 0xf8, 0x3e], set), [0x300]);
}

#[test]
fn what_iced_does_not_list() {
    // clzero, and by eax with the base of fs: the cache line that the register is in.
    assert_eq!(frames(&[0x0f, 0x01, 0xfc], |r| r.rax = 0x30_0fff), [0x300]);
    let mut sregs = sregs();
    sregs.fs.base = 0x30_0000;
    let regs = kvm_regs {
        rax: 0xdead_0000_2fff,
        ..entry_regs(&entry(CODE, 0))
    };
    let ram = guest(&[0x64, 0x67, 0x0f, 0x01, 0xfc]);
    assert_eq!(pages(Rung::Operand, &regs, &sregs, &ram), [0x302]);
    // tilestored [rdi + rcx], tmm0: 16 rows of 64 bytes, rcx apart.
    let tile = [0xc4, 0xe2, 0x7a, 0x4b, 0x04, 0x0f];
    let set = |r: &mut kvm_regs| (r.rdi, r.rcx) = (0x30_0000, 0x800);
    assert_eq!(frames(&tile, set), Vec::from_iter(0x300..=0x307));
}

/// CPUID and an XSAVE area in which vector register `register` holds `words`.
fn vectors(register: usize, words: &[u32]) -> (CpuId, kvm_xsave) {
    let component = |index, ebx| kvm_cpuid_entry2 {
        function: 0xd,
        index,
        eax: 64,
        ebx,
        ..Default::default()
    };
    let cpuid = [component(2, 576), component(6, 1152), component(7, 1664)];
    let mut xsave = kvm_xsave::default();
    xsave.region[128] = 0b1110_0110;
    for (index, word) in words.iter().enumerate() {
        let byte = match (register, index * 4) {
            (0..16, at @ 0..16) => 160 + register * 16 + at,
            (0..16, at @ 16..32) => 576 + register * 16 + at - 16,
            (0..16, at) => 1152 + register * 32 + at - 32,
            (_, at) => 1664 + (register - 16) * 64 + at,
        };
        xsave.region[byte / 4] = *word;
    }
    (CpuId::from_entries(&cpuid).unwrap(), xsave)
}

#[test]
fn scatters_and_gathers_have_their_addresses_in_vectors() {
    let mut regs = entry_regs(&entry(CODE, 0));
    regs.rdi = 0x30_0000;
    let look = |code: &[u8], rung, register, words: &[u32]| {
        let (cpuid, xsave) = vectors(register, words);
        let fault = WriteFault {
            regs: &regs,
            sregs: &sregs(),
            gpas: None,
            cpuid: &cpuid,
            xsave: &|| {
                let region = xsave.region;
                Some(kvm_xsave {
                    region,
                    ..Default::default()
                })
            },
        };
        let ram = guest(code);
        // Accessed bit of the entry that maps the operands clear.
        let slot = PAGE_TABLES_GPA + 0x2000 + 8;
        let mut word = [0; 8];
        ram.read(slot, &mut word).unwrap();
        ram.put(slot, u64::from_le_bytes(word) & !(1 << 5));
        let mut gfns = Inspection::new(&fault, &ram).unwrap().pages(rung).unwrap();
        gfns.sort_unstable();
        gfns
    };
    // vpscatterdd [rdi + zmm1], zmm0 {k1}: 16 indices, with their sign.
    let scatter = [0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x04, 0x0f];
    let mut words = [0; 16];
    (words[3], words[7], words[15]) = (0x1ffe, 0x5000, (-0x1000_i32) as u32);
    assert_eq!(
        look(&scatter, Rung::Operand, 1, &words),
        [0x12, 0x2ff, 0x300, 0x301, 0x302, 0x305]
    );
    // vpscatterqd [rdi + zmm31 * 8], ymm0 {k1}: 8 indices of 64 bits.
    let scatter = [0x62, 0xb2, 0x7d, 0x41, 0xa1, 0x04, 0xff];
    let mut words = [0; 16];
    (words[2], words[14]) = (0x200, 0x400);
    assert_eq!(
        look(&scatter, Rung::Operand, 31, &words),
        [0x12, 0x300, 0x301, 0x302]
    );
    // vpgatherdd ymm0, [rdi + ymm1], ymm2 only reads: its tables must be told.
    let gather = [0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x0f];
    assert_eq!(look(&gather, Rung::Operand, 1, &[0; 8]), [0x12]);
    assert_eq!(look(&gather, Rung::Walk, 1, &[0; 8]), TABLES);
}

#[test]
fn what_writes_nothing_has_no_operands_but_walks() {
    // nop; mov rax, [rdi]; lea; bt [rdi], rcx
    for code in [
        &[0x90][..],
        &[0x48, 0x8b, 0x07],
        &[0x48, 0x8d, 0x07],
        &[0x48, 0x0f, 0xa3, 0x0f],
    ] {
        let set = |r: &mut kvm_regs| r.rdi = 0x30_0000;
        assert_eq!(frames(code, set), [0; 0]);
        assert_eq!(frames_of(Rung::Walk, code, set), TABLES);
    }
    // A store to what is not mapped, and to what is no memory.
    let mov = [0x48, 0x89, 0x07];
    for gva in [1 << 40, MEMORY, u64::MAX - 7] {
        assert_eq!(frames(&mov, |r| r.rdi = gva), [0; 0], "{gva:#x}");
    }
}

#[test]
fn walks_are_of_code_operands_and_stack() {
    let ram = guest(&[0x48, 0x8b, 0x07]); // mov rax, [rdi]
    // Other tables in the same PML4: by slot 1 for the operand, by slot 2 for the stack.
    let bits = 0b10_0111;
    for (slot, table) in [(1, 0x30_0000), (2, 0x31_0000)] {
        ram.put(PAGE_TABLES_GPA + slot * 8, table | bits);
        ram.put(table, (table + 0x1000) | bits);
        ram.put(table + 0x1000, (table + 0x2000) | bits);
        ram.put(table + 0x2000, 0x32_0000 | bits);
    }
    let regs = kvm_regs {
        rdi: 1 << 39,
        rsp: (2 << 39) + 0x800,
        ..entry_regs(&entry(CODE, 0))
    };
    assert_eq!(
        pages(Rung::Walk, &regs, &sregs(), &ram),
        [&TABLES[..], &[0x300, 0x301, 0x302, 0x310, 0x311, 0x312]].concat()
    );
}

#[test]
fn what_cannot_be_decoded_still_has_walks_and_regions() {
    // No instruction, and code that is not mapped.
    assert_eq!(frames(&[0x06], |_| {}), [0; 0]);
    assert_eq!(frames_of(Rung::Walk, &[0x06], |_| {}), TABLES);
    assert_eq!(frames_of(Rung::Walk, &[], |r| r.rip = 1 << 40), TABLES);
    let regions = frames_of(Rung::Region, &[0x06], |_| {});
    // The stack's and the code's.
    assert_eq!(regions, Vec::from_iter(0..0x400));
    // In 32-bit paging nothing is translated.
    let mut sregs = sregs();
    sregs.efer = 0;
    let (regs, ram) = (entry_regs(&entry(CODE, 0)), guest(&[0x50]));
    for rung in [Rung::Operand, Rung::Walk, Rung::Region] {
        assert_eq!(pages(rung, &regs, &sregs, &ram), [0; 0]);
    }
    assert_eq!(pages(Rung::All, &regs, &sregs, &ram).len(), 0x400);
}

#[test]
fn without_paging_16_bit_code_is_decoded() {
    // mov [bx], ax, at cs:0x10 with bases.
    let ram = Bytes::new(MEMORY);
    ram.write(0x5_0010, &[0x89, 0x07]).unwrap();
    let mut sregs = kvm_sregs::default();
    sregs.cs.base = 0x5_0000;
    sregs.ds.base = 0x6_0000;
    let regs = kvm_regs {
        rip: 0x10,
        rbx: 0x2000,
        ..Default::default()
    };
    assert_eq!(pages(Rung::Operand, &regs, &sregs, &ram), [0x62]);
}

#[test]
fn event_delivery_needs_stacks_and_descriptors() {
    let ram = guest(&[0x90]);
    let mut sregs = sregs();
    (sregs.gdt.base, sregs.gdt.limit) = (0x30_0ff8, 15);
    (sregs.idt.base, sregs.idt.limit) = (0x31_0000, 0xfff);
    sregs.tr.base = 0x32_0000;
    ram.put(0x32_0004, 0x33_0010); // RSP0
    ram.put(0x32_0024, 0x34_1000); // IST1
    let regs = kvm_regs {
        rsp: 0x35_0800,
        ..entry_regs(&entry(CODE, 0))
    };
    let all = [0x300, 0x301, 0x310, 0x320, 0x32f, 0x330, 0x340, 0x350];
    assert_eq!(
        pages(Rung::Event, &regs, &sregs, &ram),
        [&TABLES[..], &all].concat()
    );
}

#[test]
fn code_at_the_end_of_mapped_memory_is_decoded() {
    // push rax, in the last byte of memory.
    let ram = guest(&[]);
    ram.write(MEMORY - 1, &[0x50]).unwrap();
    let mut regs = entry_regs(&entry(MEMORY - 1, 0));
    regs.rsp = 0x30_0000;
    assert_eq!(pages(Rung::Operand, &regs, &sregs(), &ram), [0x2ff]);
}

#[test]
fn page_tables_without_accessed_and_dirty_bits_are_written_too() {
    // mov [rdi], rax
    let ram = guest(&[0x48, 0x89, 0x07]);
    let mut word = [0; 8];
    // The directory entry that maps 0x20_0000..0x40_0000, where code and data are.
    let slot = PAGE_TABLES_GPA + 0x2000 + 8;
    ram.read(slot, &mut word).unwrap();
    let clear_dirty = u64::from_le_bytes(word) & !(1 << 6);
    ram.put(slot, clear_dirty);
    let mut regs = entry_regs(&entry(CODE, 0));
    regs.rdi = 0x30_0000;
    let frames = pages(Rung::Operand, &regs, &sregs(), &ram);
    assert_eq!(frames, [slot / PAGE_SIZE, 0x300]);
}
