//! Port output: how a guest speaks to the VMM.

use core::arch::asm;

/// Writes `value` to `port`. The VMM sees all that was written to memory before.
pub fn out(port: u16, value: u32) {
    // SAFETY: an exit to the VMM, which reads guest memory at most. Memory is clobbered by default, so
    // that the compiler has done all earlier stores.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    }
}

/// Writes the gpa of `object` to `port`; for objects on a stack, which are all below 4 GiB.
pub fn out_pointer<T>(port: u16, object: &T) {
    out(port, core::ptr::from_ref(object).addr() as u32);
}
