//! Transient readers: a page in a pipe, by reference.
#![expect(unsafe_code, reason = "tee, for which there is no safe function")]

use std::io::{self, PipeReader, PipeWriter, Read};
use std::mem::size_of;
use std::os::fd::{AsRawFd, RawFd};

const WORD: usize = size_of::<u64>();

/// A pipe that an actor may `vmsplice` the first word of a page into: `FOLL_GET` for reading, for
/// as long as it is not read. The controller has the only reading end, so the hold outlives the
/// process it was taken through.
#[derive(Debug)]
pub(super) struct Splice {
    reader: PipeReader,
    /// For the actors. Kept, so that the numbers in their kit mean nothing else here.
    writer: PipeWriter,
}

impl Splice {
    pub(super) fn new() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        Ok(Self { reader, writer })
    }

    /// The end for actors.
    pub(super) fn actors_end(&self) -> RawFd {
        self.writer.as_raw_fd()
    }

    /// What the page holds now. Reading takes a page out of a pipe, so it is done in a second
    /// pipe that refers to it too.
    pub(super) fn peek(&self) -> io::Result<u64> {
        let (mut reader, writer) = io::pipe()?;
        // SAFETY: both are pipes that live for the call; memory is not touched.
        let done = unsafe {
            libc::tee(
                self.reader.as_raw_fd(),
                writer.as_raw_fd(),
                WORD,
                libc::SPLICE_F_NONBLOCK,
            )
        };
        match usize::try_from(done) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(WORD) => word(&mut reader),
            Ok(count) => Err(io::Error::other(format!("a pipe holds {count} bytes of 8"))),
        }
    }

    /// Lets go of the page.
    pub(super) fn empty(&mut self) -> io::Result<()> {
        word(&mut self.reader).map(drop)
    }
}

pub(super) fn word(reader: &mut PipeReader) -> io::Result<u64> {
    let mut bytes = [0; WORD];
    reader.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}
