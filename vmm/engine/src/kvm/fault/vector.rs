//! Elements of vector registers, which gathers and scatters have their addresses in.
//!
//! They are in the XSAVE area as `KVM_GET_XSAVE` gives it: the standard format, in which each component lies
//! where CPUID leaf 0xd says (Intel SDM volume 1, 13.4).

use iced_x86::Register;
use kvm_bindings::{CpuId, kvm_xsave};

/// Components of the XSAVE area.
const YMM_HIGH: u32 = 2;
const ZMM_HIGH: u32 = 6;
const ZMM_16_TO_31: u32 = 7;
/// Where the 16 bytes of XMM0 are; they lie one after the other.
const XMM: usize = 160;
/// Where XSTATE_BV is: which components are in the area. Others are zero.
const XSTATE_BV: usize = 512;

/// Element `index` of vector register `register`, of `size` bytes each. `None` if it has no such element, or
/// the CPU no such register.
pub(super) fn element(
    xsave: &kvm_xsave,
    cpuid: &CpuId,
    register: Register,
    index: usize,
    size: usize,
) -> Option<u64> {
    let at = index * size;
    if !register.is_vector_register() || size == 0 || size > 8 || at + size > register.size() {
        return None;
    }
    let number = register.number();
    let component = |id: u32| {
        let entries = cpuid.as_slice();
        let leaf = entries
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (0xd, id));
        leaf.filter(|leaf| leaf.eax != 0)
            .map(|leaf| (id, leaf.ebx as usize))
    };
    // The component, and where in it the byte at `at` of the register is.
    let ((id, start), offset) = match (number, at) {
        (0..16, 0..16) => ((1, XMM), number * 16 + at),
        (0..16, 16..32) => (component(YMM_HIGH)?, number * 16 + at - 16),
        (0..16, _) => (component(ZMM_HIGH)?, number * 32 + at - 32),
        _ => (component(ZMM_16_TO_31)?, (number - 16) * 64 + at),
    };
    let byte = |at: usize| {
        let word = xsave.region.get(at / 4)?;
        word.to_le_bytes().get(at % 4).copied()
    };
    if byte(XSTATE_BV)? & 1 << id == 0 {
        return Some(0);
    }
    let mut bytes = [0; 8];
    for (place, slot) in bytes[..size].iter_mut().enumerate() {
        *slot = byte(start + offset + place)?;
    }
    Some(u64::from_le_bytes(bytes))
}
