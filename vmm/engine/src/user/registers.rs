//! A guest's registers: as the frame has them, and as a state has them.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::crossing::Crossing;
use super::frame::{FP_XSTATE_MAGIC1, Gpr, SW_RESERVED, XFEATURES, XSTATE_SIZE};
use super::signals;
use crate::kvm::{EntryState, StateError, StateKind, VcpuState};

/// RFLAGS before the first instruction: what is always set, and interrupts.
const RFLAGS: u64 = 1 << 1 | 1 << 9;
/// RFLAGS that a state may set: status flags, direction, NT, alignment checks, ID. Traps are the host's.
const RFLAGS_SETTABLE: u64 = 0x8d5 | 1 << 10 | 1 << 14 | 1 << 18 | 1 << 21;

/// x87 control word and MXCSR before the first instruction.
const FCW: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;
const MXCSR_AT: usize = 24;
/// Bits of MXCSR that exist on every x86-64.
const MXCSR_VALID: u32 = 0xffff;
/// The header of an XSAVE area: XSTATE_BV, XCOMP_BV, reserved words.
const HEADER: std::ops::Range<usize> = 512..576;

/// The general registers but RIP and RFLAGS, by their places in a frame.
const GENERAL: [Gpr; 16] = [
    Gpr::Rax,
    Gpr::Rbx,
    Gpr::Rcx,
    Gpr::Rdx,
    Gpr::Rsi,
    Gpr::Rdi,
    Gpr::Rsp,
    Gpr::Rbp,
    Gpr::R8,
    Gpr::R9,
    Gpr::R10,
    Gpr::R11,
    Gpr::R12,
    Gpr::R13,
    Gpr::R14,
    Gpr::R15,
];

/// What the kernel says of extended registers on this thread: how many bytes, and its own words.
#[derive(Clone, Debug)]
pub(super) struct XstateShape {
    len: usize,
    features: u64,
    reserved: [u8; SW_RESERVED.end - SW_RESERVED.start],
}

impl XstateShape {
    /// That of the frame which `crossing` has from the kernel. `None` if the kernel does not save them by
    /// XSAVE.
    pub(super) fn of(crossing: &Crossing) -> Option<Self> {
        let area = crossing.xstate();
        let word = |at: usize| Some(u32::from_le_bytes(area[at..at + 4].try_into().ok()?));
        if word(SW_RESERVED.start)? != FP_XSTATE_MAGIC1 {
            return None;
        }
        let len = word(XSTATE_SIZE)? as usize;
        let features = area[XFEATURES..XFEATURES + 8].try_into().ok()?;
        let fits = len >= HEADER.end && len.is_multiple_of(4) && len + 4 <= area.len();
        fits.then_some(Self {
            len,
            features: u64::from_le_bytes(features),
            reserved: area[SW_RESERVED].try_into().ok()?,
        })
    }
}

/// Sets the registers a guest starts with.
pub(super) fn enter(crossing: &mut Crossing, entry: &EntryState, shape: &XstateShape) {
    let frame = crossing.frame_mut();
    for register in GENERAL {
        frame.set(register, 0);
    }
    let [rdi, rsi] = entry.arguments;
    frame.set(Gpr::Rdi, rdi);
    frame.set(Gpr::Rsi, rsi);
    frame.set(Gpr::Rsp, entry.rsp);
    frame.set(Gpr::Rip, entry.rip);
    frame.set(Gpr::Rflags, RFLAGS);
    frame.blocked = signals::blocked_in_guest();
    crossing.set_bases([0; 2]);
    let area = crossing.xstate_mut();
    // A component that the header does not name is in its initial configuration.
    area[..shape.len].fill(0);
    area[..2].copy_from_slice(&FCW.to_le_bytes());
    area[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&MXCSR.to_le_bytes());
    area[SW_RESERVED].copy_from_slice(&shape.reserved);
}

/// The registers as they are.
pub(super) fn capture(crossing: &Crossing, shape: &XstateShape, tsc: u64) -> VcpuState {
    let frame = crossing.frame();
    let get = |register| frame.gpr(register);
    let regs = kvm_regs {
        rax: get(Gpr::Rax),
        rbx: get(Gpr::Rbx),
        rcx: get(Gpr::Rcx),
        rdx: get(Gpr::Rdx),
        rsi: get(Gpr::Rsi),
        rdi: get(Gpr::Rdi),
        rsp: get(Gpr::Rsp),
        rbp: get(Gpr::Rbp),
        r8: get(Gpr::R8),
        r9: get(Gpr::R9),
        r10: get(Gpr::R10),
        r11: get(Gpr::R11),
        r12: get(Gpr::R12),
        r13: get(Gpr::R13),
        r14: get(Gpr::R14),
        r15: get(Gpr::R15),
        rip: get(Gpr::Rip),
        rflags: get(Gpr::Rflags),
    };
    let [fs, gs] = crossing.bases();
    let selectors = get(Gpr::Selectors);
    let segment = |selector: u64, base| kvm_segment {
        selector: selector as u16,
        base,
        dpl: 3,
        ..Default::default()
    };
    let sregs = kvm_sregs {
        cs: segment(selectors, 0),
        ss: segment(selectors >> 48, 0),
        fs: segment(0, fs),
        gs: segment(0, gs),
        cr2: get(Gpr::Cr2),
        ..Default::default()
    };
    let mut area = crossing.xstate()[..shape.len].to_vec();
    area[SW_RESERVED].fill(0);
    let words = area
        .as_chunks()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word));
    VcpuState::of_user(regs, sregs, words.collect(), tsc)
}

/// Sets them. A state is not trusted: one that the host would not enter with is refused.
///
/// # Errors
/// If it is not one of these, or makes no sense here. Nothing has changed then.
pub(super) fn restore(
    crossing: &mut Crossing,
    state: &VcpuState,
    shape: &XstateShape,
) -> Result<(), StateError> {
    state.must_be(StateKind::User)?;
    let area = checked_area(state.xsave(), shape)?;
    let (regs, sregs) = (state.regs(), state.sregs());
    for (what, base) in [("fs", sregs.fs.base), ("gs", sregs.gs.base)] {
        if !is_canonical(base) {
            return Err(StateError::Base { what, base });
        }
    }
    let values = [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    let frame = crossing.frame_mut();
    for (register, value) in GENERAL.into_iter().zip(values) {
        frame.set(register, value);
    }
    frame.set(Gpr::Rip, regs.rip);
    frame.set(Gpr::Rflags, RFLAGS | regs.rflags & RFLAGS_SETTABLE);
    frame.blocked = signals::blocked_in_guest();
    crossing.set_bases([sregs.fs.base, sregs.gs.base]);
    crossing.xstate_mut()[..shape.len].copy_from_slice(&area);
    Ok(())
}

/// The XSAVE area of a state as the kernel takes it.
fn checked_area(words: &[u32], shape: &XstateShape) -> Result<Vec<u8>, StateError> {
    let refused = |why| Err(StateError::Xsave { why });
    if words.len() * 4 != shape.len {
        return refused("it has another size");
    }
    let mut area: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (components, rest) = area[HEADER].split_at(8);
    let components = components.try_into().map_or(0, u64::from_le_bytes);
    if components & !shape.features != 0 {
        return refused("it has registers that this CPU has not");
    }
    if rest.iter().any(|byte| *byte != 0) {
        return refused("it is not in the standard format");
    }
    let mxcsr = words[MXCSR_AT / 4] & MXCSR_VALID;
    area[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&mxcsr.to_le_bytes());
    area[SW_RESERVED].copy_from_slice(&shape.reserved);
    Ok(area)
}

/// Whether the CPU takes `address` as a base, with 48 bits of address.
fn is_canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> XstateShape {
        XstateShape {
            len: 832,
            features: 0b111,
            reserved: [7; 48],
        }
    }

    #[test]
    fn an_area_that_the_kernel_would_not_take_is_refused() {
        let good = vec![0; 208];
        let area = checked_area(&good, &shape()).unwrap();
        assert_eq!(area[SW_RESERVED], [7; 48]);
        let with = |at: usize, word| {
            let mut words = good.clone();
            words[at] = word;
            checked_area(&words, &shape())
        };
        assert!(checked_area(&good[1..], &shape()).is_err());
        assert!(with(HEADER.start / 4, 0b111).is_ok());
        assert!(with(HEADER.start / 4, 0b1000).is_err());
        assert!(with(HEADER.start / 4 + 3, 1 << 31).is_err(), "compacted");
        assert!(with(HEADER.end / 4 - 1, 1).is_err());
        let area = with(MXCSR_AT / 4, u32::MAX).unwrap();
        assert_eq!(area[MXCSR_AT..MXCSR_AT + 4], 0xffff_u32.to_le_bytes());
    }

    #[test]
    fn bases_are_canonical() {
        for base in [0, 1, (1 << 47) - 1, !0, 0xffff_8000_0000_0000] {
            assert!(is_canonical(base), "{base:#x}");
        }
        for base in [1 << 47, 1 << 63, 0xffff_7fff_ffff_ffff] {
            assert!(!is_canonical(base), "{base:#x}");
        }
    }
}
