//! Why a guest program cannot be loaded.

use crate::causes::Cause;

/// Why a guest program cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// No ELF magic.
    #[error("not an ELF file")]
    NotElf,
    /// ELF class 32, or big-endian.
    #[error("not a 64-bit little-endian ELF file")]
    Not64Bit,
    /// Another CPU's program.
    #[error("not a program for x86-64: ELF machine {machine}")]
    NotX86_64 {
        /// `e_machine`.
        machine: u16,
    },
    /// A shared object, a position-independent executable, an object file.
    #[error("not a static executable (ET_EXEC): ELF type {kind}; link it with -static -no-pie")]
    NotExecutable {
        /// `e_type`.
        kind: u16,
    },
    /// The program wants a dynamic linker.
    #[error(
        "program header {header} asks for a dynamic linker; link the program with -static -no-pie"
    )]
    Dynamic {
        /// Index of the program header.
        header: usize,
    },
    /// The file ends before something it says it has.
    #[error("truncated ELF file: {what} reaches to byte {end}, the file has {len}")]
    Truncated {
        /// What is cut off.
        what: String,
        /// Where it would end.
        end: u64,
        /// Bytes in the file.
        len: u64,
    },
    /// The program headers have a size that is not theirs.
    #[error("malformed ELF file: program headers of {size} bytes each")]
    HeaderSize {
        /// `e_phentsize`.
        size: u16,
    },
    /// There is nothing to load.
    #[error("the ELF file has no segment to load")]
    Empty,
    /// A segment below the place for programs, where boot data and stacks are.
    #[error("segment {segment} is linked at {start:#x}, below {lowest:#x}")]
    SegmentTooLow {
        /// The lowest address that a program may have.
        lowest: u64,
        /// Index of the program header.
        segment: usize,
        /// Where it is linked.
        start: u64,
    },
    /// A segment that no guest has memory for, or larger in the file than in memory.
    #[error(
        "segment {segment} at {start:#x} has {file} bytes in the file, {memory} in memory: out of range"
    )]
    SegmentSize {
        /// Index of the program header.
        segment: usize,
        /// Where it is linked.
        start: u64,
        /// Bytes of it in the file.
        file: u64,
        /// Bytes of it in memory.
        memory: u64,
    },
    /// Physical and virtual addresses differ, and a guest's are the same.
    #[error(
        "segment {segment} is linked at {start:#x}, but to be loaded at {load:#x}: these must be the same"
    )]
    SegmentMoved {
        /// Index of the program header.
        segment: usize,
        /// Where it is linked.
        start: u64,
        /// Where it asks to be loaded.
        load: u64,
    },
    /// The first instruction would be somewhere else.
    #[error("entry point {entry:#x} lies in no segment")]
    Entry {
        /// The entry point.
        entry: u64,
    },
    /// The image does not fit.
    #[error("the program ends at {end:#x}, guest memory at {memory:#x}")]
    TooLarge {
        /// End of the image.
        end: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// Guest memory could not be written.
    #[error("cannot write guest memory at {gpa:#x}")]
    Memory {
        /// Where.
        gpa: u64,
        /// What went wrong.
        #[source]
        source: Cause,
    },
}
