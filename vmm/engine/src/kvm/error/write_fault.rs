//! Why the pages of a write fault could not be found.

use crate::causes::Cause;

/// Why the pages of a write fault could not be found.
#[derive(Debug, thiserror::Error)]
pub enum WriteFaultError {
    /// The fault comes back although everything it could be about is writable.
    #[error(
        "write fault at rip {rip:#x} ({instruction}) came back {times} times although all it could be \
         about is writable; tried: {tried}"
    )]
    Stuck {
        /// Where.
        rip: u64,
        /// The instruction, or why there is none.
        instruction: String,
        /// How many times in a row nothing was found to do.
        times: u32,
        /// Rungs, and how many pages each was about.
        tried: String,
    },
    /// Guest memory could not be read.
    #[error("cannot read guest memory for the write fault at rip {rip:#x}")]
    Memory {
        /// Where the instruction is.
        rip: u64,
        /// What went wrong.
        #[source]
        source: Cause,
    },
}
