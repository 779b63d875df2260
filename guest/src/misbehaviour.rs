//! What the misbehaving guest does, so that the VMM's answers to it can be tested.

/// What [`MISBEHAVE`](crate::MISBEHAVE) does on vCPU 0; [`BootInfo::seed`](crate::abi::BootInfo::seed) has
/// it as a number. The other vCPUs spin.
#[repr(u64)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misbehaviour {
    /// Executes `ud2`: a triple fault, for want of an IDT.
    InvalidOpcode = 1,
    /// Spins for ever, without an exit.
    Spin = 2,
    /// Panics with the message "asked to panic".
    Panic = 3,
    /// Exits with status 7.
    ExitSeven = 4,
    /// Prints "bye" and exits with status 0.
    Bye = 5,
    /// Stores just beyond guest memory if the page tables map that, else 16 MiB farther.
    StoreBeyondMemory = 6,
    /// Writes to port 0x999, which is nobody's; exits with status 0 if it can.
    UnknownPort = 7,
    /// Prints a text that begins beyond memory and has a huge length, one that begins inside and ends beyond,
    /// and one whose [`Text`](crate::abi::Text) is beyond memory itself; exits with status 0 if it can.
    WildText = 8,
    /// Rings both doorbells of a device that there is not; exits with status 0 if it can.
    WildDoorbell = 9,
    /// Posts requests that make no sense to device 0, ring after ring and with both doorbells, and exits
    /// with status 0 after a while. Needs a device to be of use.
    GarbageQueue = 10,
    /// Reports one failure of kind `Page`, with vCPU 0, operation 11 and made-up words, and spins.
    FalseFailure = 11,
    /// Writes to the hammered memory page after page, once each, with every kind of instruction that writes
    /// memory, some of them across pages. Prints a line and exits with status 0; with status 1 and the name
    /// of the instruction if one did not do what it should.
    WriteWithEverything = 12,
    /// Stores through a non-canonical address: #GP, and so a triple fault.
    StoreNonCanonical = 13,
}

impl Misbehaviour {
    /// The misbehaviour with number `raw`, if there is one.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        Some(match raw {
            1 => Self::InvalidOpcode,
            2 => Self::Spin,
            3 => Self::Panic,
            4 => Self::ExitSeven,
            5 => Self::Bye,
            6 => Self::StoreBeyondMemory,
            7 => Self::UnknownPort,
            8 => Self::WildText,
            9 => Self::WildDoorbell,
            10 => Self::GarbageQueue,
            11 => Self::FalseFailure,
            12 => Self::WriteWithEverything,
            13 => Self::StoreNonCanonical,
            _ => return None,
        })
    }
}
