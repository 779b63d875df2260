//! A signal frame, as the kernel lays it out: all registers that a thread has, but for the bases of FS and
//! GS.
//!
//! `struct ucontext` and `struct sigcontext_64` of `arch/x86/include/uapi/asm/sigcontext.h`, which are ABI.

#![expect(unsafe_code, reason = "reads words of the kernel's frame")]

/// How the area of the extended registers is aligned.
pub(super) const FRAME_XSTATE_ALIGN: usize = 64;
/// Says that the extended registers are more than FXSAVE's.
pub(super) const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;

/// Where the kernel's own words are in the area of extended registers (`struct _fpx_sw_bytes`), and how many
/// bytes they are.
pub(super) const SW_RESERVED: std::ops::Range<usize> = 464..512;
const MAGIC1: usize = SW_RESERVED.start;
const EXTENDED_SIZE: usize = MAGIC1 + 4;
pub(super) const XFEATURES: usize = MAGIC1 + 8;
pub(super) const XSTATE_SIZE: usize = MAGIC1 + 16;

/// A register's place in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Gpr {
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    Rdi,
    Rsi,
    Rbp,
    Rbx,
    Rdx,
    Rax,
    Rcx,
    Rsp,
    Rip,
    Rflags,
    /// Selectors of CS, GS, FS and SS, 16 bits each, the first the lowest.
    Selectors,
    /// Error code of the exception.
    Error,
    /// Its vector.
    Vector,
    /// Address of the page fault. Before it is a word that nobody uses.
    Cr2 = 22,
}

/// `struct ucontext`.
#[repr(C)]
#[derive(Clone, Debug, Default)]
pub(super) struct Frame {
    flags: u64,
    link: u64,
    pub(super) stack_sp: u64,
    stack_flags: u64,
    pub(super) stack_size: u64,
    gprs: [u64; 23],
    /// Where the extended registers are.
    pub(super) xstate: u64,
    reserved: [u64; 8],
    /// Signals that are blocked: bit `n - 1` is signal `n`.
    pub(super) blocked: u64,
}

const _: () = assert!(size_of::<Frame>() == 304);

impl Frame {
    /// A register.
    pub(super) fn gpr(&self, gpr: Gpr) -> u64 {
        self.gprs[gpr as usize]
    }

    /// Sets a register.
    pub(super) fn set(&mut self, gpr: Gpr, value: u64) {
        self.gprs[gpr as usize] = value;
    }
}

/// The word that says how the extended registers are laid out.
///
/// # Safety
/// `xstate` is a frame's.
pub(super) unsafe fn fx_magic(xstate: *const u8) -> u32 {
    // SAFETY: the caller's: a frame has at least 512 bytes of them.
    unsafe { xstate.add(MAGIC1).cast::<u32>().read_unaligned() }
}

/// Bytes of them, with what the kernel puts behind.
///
/// # Safety
/// `xstate` is a frame's that has [`FP_XSTATE_MAGIC1`].
pub(super) unsafe fn fx_size(xstate: *const u8) -> usize {
    // SAFETY: as above.
    unsafe { xstate.add(EXTENDED_SIZE).cast::<u32>().read_unaligned() as usize }
}
