//! Page tables of the guest's own whose accessed and dirty bits the CPU has to set.
//!
//! 512 addresses are mapped at once and touched one after the other, so that a snapshot comes while most are
//! untouched: it write-protects the tables, and the CPU, or a host that shadows the tables, has to write to
//! them all the same.

use super::tables::{ACCESSED, ANY_USE, Batch, DIRTY, ENTRIES, FRESH_TABLES, FreshAddresses};
use super::{Vcpu, read, write};
use crate::abi::PAGE_SIZE;
use crate::cpu::{self, Feature};
use crate::effect::execute;
use crate::{console, rt};

/// Pages of a piece: the first has the tables, the second is mapped.
const PIECE: u64 = 16;
const _: () = assert!(FRESH_TABLES <= PIECE);
/// The most addresses that a touch needs.
const MOST: u64 = 8;
/// `mov rax, rdi; ret`.
const CODE: u64 = 0xc3f8_8948;
const CODE_AT: u64 = 64;
/// Where on a page words are touched.
const WORD_AT: u64 = 1024;

/// A way to touch pages.
struct Touch {
    name: &'static str,
    /// Addresses it needs.
    pages: u64,
    /// Bits that it must set in the entry of the page with this number, of its own.
    sets: fn(u64) -> u64,
    /// What a CPU must have.
    needs: Option<Feature>,
    /// Touches pages that lie at the first address, and are mapped to the second; there is a number to write.
    /// Whether it did what it should.
    touch: fn(u64, u64, u64) -> bool,
}

const READ: fn(u64) -> u64 = |_| ACCESSED;
const WRITE: fn(u64) -> u64 = |_| ACCESSED | DIRTY;

const TOUCHES: [Touch; 10] = [
    Touch {
        name: "a load",
        pages: 1,
        sets: READ,
        needs: None,
        touch: |gva, page, _| read(gva + WORD_AT) == read(page + WORD_AT),
    },
    Touch {
        name: "a store",
        pages: 1,
        sets: WRITE,
        needs: None,
        touch: |gva, page, salt| {
            write(gva + WORD_AT, salt);
            read(page + WORD_AT) == salt
        },
    },
    Touch {
        name: "a fetch",
        pages: 1,
        sets: READ,
        needs: None,
        touch: |gva, _, salt| {
            let returned: u64;
            execute!("call {code}"; code = in(reg) gva + CODE_AT, in("rdi") salt, out("rax") returned);
            returned == salt
        },
    },
    Touch {
        name: "lock xadd",
        pages: 1,
        sets: WRITE,
        needs: None,
        touch: |gva, page, salt| {
            let (before, found) = (read(page + WORD_AT), salt);
            let mut found = found;
            execute!("lock xadd [{at}], {v}"; at = in(reg) gva + WORD_AT, v = inout(reg) found);
            found == before && read(page + WORD_AT) == before.wrapping_add(salt)
        },
    },
    Touch {
        name: "push",
        pages: 1,
        sets: WRITE,
        needs: None,
        touch: |gva, page, salt| {
            execute!("xchg rsp, {at}", "push {v}", "mov rsp, {at}";
                at = inout(reg) gva + WORD_AT + 8 => _, v = in(reg) salt);
            read(page + WORD_AT) == salt
        },
    },
    Touch {
        name: "a store across pages",
        pages: 2,
        sets: WRITE,
        needs: None,
        touch: |gva, page, salt| {
            let offset = PAGE_SIZE - 4;
            execute!("mov [{at}], {v}"; at = in(reg) gva + offset, v = in(reg) salt);
            let stored: u64;
            execute!("mov {v}, [{at}]"; at = in(reg) page + offset, v = out(reg) stored);
            stored == salt
        },
    },
    Touch {
        name: "rep movsq from page to page",
        pages: 2,
        sets: |page| {
            if page == 0 {
                ACCESSED
            } else {
                ACCESSED | DIRTY
            }
        },
        needs: None,
        touch: |gva, page, _| {
            let (from, to) = (gva + WORD_AT, gva + PAGE_SIZE + WORD_AT);
            execute!("rep movsq"; inout("rsi") from => _, inout("rdi") to => _, inout("rcx") 8u64 => _);
            (0..8).all(|word| {
                let at = page + WORD_AT + 8 * word;
                read(at) == read(at + PAGE_SIZE)
            })
        },
    },
    Touch {
        name: "fxsave64 across pages",
        pages: 2,
        sets: WRITE,
        needs: None,
        touch: |gva, page, salt| {
            const XMM3: u64 = 160 + 3 * 16;
            execute!("movq xmm3, {v}", "fxsave64 [{at}]";
                v = in(reg) salt, at = in(reg) gva + PAGE_SIZE - 128, out("xmm3") _);
            read(page + PAGE_SIZE - 128 + XMM3) == salt
        },
    },
    Touch {
        name: "vpgatherqq from 4 pages",
        pages: 4,
        sets: READ,
        needs: Some(Feature::Avx2),
        touch: |gva, page, _| {
            let offsets: [u64; 4] = core::array::from_fn(|page| page as u64 * PAGE_SIZE);
            let mut gathered = [0u64; 4];
            execute!("vmovdqu ymm2, [{o}]", "vpcmpeqd ymm3, ymm3, ymm3",
                "vpgatherqq ymm1, [{at} + ymm2], ymm3", "vmovdqu [{g}], ymm1";
                o = in(reg) &offsets, g = in(reg) &raw mut gathered, at = in(reg) gva + WORD_AT,
                out("xmm1") _, out("xmm2") _, out("xmm3") _);
            gathered == offsets.map(|offset| read(page + offset + WORD_AT))
        },
    },
    Touch {
        name: "vpscatterqq to 8 pages",
        pages: MOST,
        sets: WRITE,
        needs: Some(Feature::Avx512),
        touch: |gva, page, salt| {
            let offsets: [u64; 8] = core::array::from_fn(|page| page as u64 * PAGE_SIZE);
            let values = offsets.map(|offset| salt ^ offset);
            execute!("vmovdqu64 zmm1, [{v}]", "vmovdqu64 zmm2, [{o}]", "kxnorw k1, k1, k1",
                "vpscatterqq [{at} + zmm2]{{k1}}, zmm1";
                v = in(reg) &values, o = in(reg) &offsets, at = in(reg) gva + WORD_AT, out("xmm1") _,
                out("xmm2") _);
            values == offsets.map(|offset| read(page + offset + WORD_AT))
        },
    },
];

/// Touches one or more fresh pages every round, and looks what became of their entries.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    let ground = vcpu.ground(PIECE);
    let mut addresses = FreshAddresses::new(vcpu.index, ground.piece(0));
    let frames = ground.piece(1);
    let frame = |slot: u64| frames + slot % PIECE * PAGE_SIZE;
    for slot in 0..PIECE {
        write(frame(slot) + CODE_AT, CODE);
    }
    let untouched = |slot| frame(slot) | ANY_USE;
    while let Some(batch) = addresses.next_pages(0, untouched) {
        let mut slot = 0;
        while slot < ENTRIES {
            let touch = &TOUCHES[vcpu.rounds as usize % TOUCHES.len()];
            // Its frames lie one after the other.
            let first = slot.next_multiple_of(touch.pages.next_power_of_two());
            if first + touch.pages <= ENTRIES && touch.needs.is_none_or(cpu::has) {
                touch_pages(&vcpu, &batch, touch, first, untouched);
                slot = first + touch.pages;
            } else if touch.needs.is_none() {
                slot = ENTRIES;
            }
            vcpu.round_done();
        }
    }
    console::print(format_args!(
        "drill {:?}: no fresh addresses are left",
        vcpu.drill
    ));
    rt::exit(0)
}

/// Touches the pages from `first` on, which nobody has, and checks their entries.
fn touch_pages(
    vcpu: &Vcpu<'_>,
    batch: &Batch,
    touch: &Touch,
    first: u64,
    untouched: impl Fn(u64) -> u64,
) {
    let page = untouched(first) & !(PAGE_SIZE - 1);
    let gva = batch.gva(first);
    if !(touch.touch)(gva, page, vcpu.salt()) {
        vcpu.fail(format_args!(
            "{} at {gva:#x}, mapped to {page:#x}, did not do what it should",
            touch.name
        ));
    }
    for number in 0..touch.pages {
        let slot = first + number;
        let (found, expected) = (batch.entry(slot), untouched(slot) | (touch.sets)(number));
        if found != expected {
            vcpu.fail(format_args!(
                "{} at {:#x} left {found:#x}, not {expected:#x}, in the page table",
                touch.name,
                batch.gva(slot)
            ));
        }
    }
    if batch.parent() & ACCESSED == 0 {
        vcpu.fail(format_args!(
            "{} at {gva:#x} left its table's entry as if not accessed: {:#x}",
            touch.name,
            batch.parent()
        ));
    }
}
