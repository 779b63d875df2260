//! What the drilling guest does, so that what a guest may do to a VMM is tested one mechanism at a time.

/// What [`DRILL`](crate::DRILL) does; [`BootInfo::seed`](crate::abi::BootInfo::seed) has it as a number.
///
/// A drill does the same over and over until the run is stopped, checks itself every time, and counts the
/// rounds as operations. When something is not as it must be, it prints a line that says what and where, and
/// exits with status 1. Where the CPU has no such instructions, it says so and exits with status 0. Where
/// nothing else is said, each vCPU works on pages of its own.
#[repr(u64)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drill {
    /// vCPU 1 swaps an instruction between two different stores and a `nop`, while vCPU 0 executes it.
    PatchedCode = 1,
    /// `smsw` to memory: ring 3 may not execute it where the host has UMIP, and KVM emulates it then.
    Smsw = 2,
    /// The same with `sldt`.
    Sldt = 3,
    /// The same with `str`.
    Str = 4,
    /// The same with `sgdt`, which stores 10 bytes.
    Sgdt = 5,
    /// The same with `sidt`.
    Sidt = 6,
    /// Registers that live nowhere in memory: vectors with their upper lanes, masks, MMX, MXCSR, the x87
    /// control word, flags.
    Registers = 7,
    /// The bases of FS and GS.
    Bases = 8,
    /// Long string instructions, with faults and kicks in their middle.
    Strings = 9,
    /// All vCPUs add to counters that lie across pages, with a bus lock.
    SplitCounter = 10,
    /// Stores by FS and GS, some with 32-bit addresses.
    Segments = 11,
    /// Bit tests whose operand is far away from their address.
    BitTests = 12,
    /// The stack is on pages of which snapshots are taken: nested `enter`, recursion, calls across pages.
    Stack = 13,
    /// `clzero`.
    ClearLine = 14,
    /// Areas of state that lie across two pages: `xsave` and its like.
    StateAreas = 15,
    /// AVX stores under a mask, across pages.
    MaskedStores = 16,
    /// AVX-512 scatters to eight pages and sixteen, gathers, stores under a mask.
    Scatter = 17,
    /// One request at a time to device 0, and one doorbell each, never a second: what is on its way in a
    /// snapshot must be done after a restore although nobody rings again. vCPU 0 alone; needs a device.
    OneRequest = 18,
    /// Prints for ever, at length, with control characters and lines that look like the VMM's own. vCPU 0
    /// alone.
    Talk = 19,
    /// Code that lies in unused entries of the page tables, and beside them, and stores there. vCPU 0 alone.
    CodeInTables = 20,
    /// Page tables of the guest's own, in which the CPU must set accessed and dirty bits for accesses of many
    /// kinds.
    AccessedBits = 21,
    /// Clears accessed and dirty bits of the page tables that the VMM built, and waits for the CPU to set all
    /// of them again.
    ClearedBits = 22,
    /// Maps fresh addresses to frames chosen by chance, and reads by old mappings: after a restore these must
    /// be those of the tables that were restored.
    Remapped = 23,
    /// Locked instructions on the page tables, as kernels change them. vCPU 0 alone.
    LockedTables = 24,
}

impl Drill {
    /// All of them, by number.
    pub const ALL: [Self; 24] = [
        Self::PatchedCode,
        Self::Smsw,
        Self::Sldt,
        Self::Str,
        Self::Sgdt,
        Self::Sidt,
        Self::Registers,
        Self::Bases,
        Self::Strings,
        Self::SplitCounter,
        Self::Segments,
        Self::BitTests,
        Self::Stack,
        Self::ClearLine,
        Self::StateAreas,
        Self::MaskedStores,
        Self::Scatter,
        Self::OneRequest,
        Self::Talk,
        Self::CodeInTables,
        Self::AccessedBits,
        Self::ClearedBits,
        Self::Remapped,
        Self::LockedTables,
    ];

    /// The drill with number `raw`, if there is one.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        if raw == 0 || raw > Self::ALL.len() as u64 {
            return None;
        }
        Some(Self::ALL[raw as usize - 1])
    }
}
