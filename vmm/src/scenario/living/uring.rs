//! Devices: a page that is the registered buffer of an io_uring.
//!
//! The controller makes the rings before P is there, and the actors inherit them, since a ring can't be sent
//! to another process. An actor registers a page of its own; from then on whoever submits a fixed operation
//! to the ring reads or writes that page, named by its address in the actor, whatever becomes of the actor's
//! memory. A ring has one table of buffers, so each hold has a ring.
#![expect(unsafe_code, reason = "submits operations on another process's memory")]

use std::io::{self, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};

use super::pipe::word;

const WORD: u32 = size_of::<u64>() as u32;
/// The position of a file that has none.
const NO_POSITION: u64 = u64::MAX;

/// A ring that an actor may register a page with: `FOLL_PIN | FOLL_LONGTERM | FOLL_WRITE`
/// (`io_pin_pages`, `io_uring/memmap.c`).
pub(super) struct PinRing(IoUring);

impl PinRing {
    /// # Errors
    /// Why there are no rings, in plain words.
    pub(super) fn new() -> Result<Self, &'static str> {
        ring().map(Self)
    }

    /// What actors register with.
    pub(super) fn file(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// The device reads the word at `address` of the actor that registered it.
    pub(super) fn load(&mut self, address: u64) -> io::Result<u64> {
        let (mut reader, writer) = io::pipe()?;
        let device = types::Fd(writer.as_raw_fd());
        let entry = opcode::WriteFixed::new(device, address as *const u8, WORD, 0);
        self.transfer(&entry.offset(NO_POSITION).build())?;
        word(&mut reader)
    }

    /// The device writes it.
    pub(super) fn store(&mut self, address: u64, value: u64) -> io::Result<()> {
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(&value.to_ne_bytes())?;
        let device = types::Fd(reader.as_raw_fd());
        let entry = opcode::ReadFixed::new(device, address as *mut u8, WORD, 0);
        self.transfer(&entry.offset(NO_POSITION).build())
    }

    fn transfer(&mut self, entry: &Entry) -> io::Result<()> {
        // SAFETY: the kernel takes the address for a place in the registered buffer and refuses any
        // other; that page is held by the ring and is no memory of this process. The file is open
        // until the operation is done.
        unsafe { submit(&mut self.0, entry)? };
        match complete(&mut self.0)? {
            count if count == WORD => Ok(()),
            count => Err(io::Error::other(format!(
                "a device moved {count} bytes of 8"
            ))),
        }
    }

    /// Gives the page back. Nothing is under way, so it is unpinned when this returns.
    pub(super) fn unregister(&self) -> io::Result<()> {
        self.0.submitter().unregister_buffers()
    }
}

impl std::fmt::Debug for PinRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PinRing").field(&self.file()).finish()
    }
}

/// A small ring.
///
/// # Errors
/// Why there is none, in plain words.
pub(super) fn ring() -> Result<IoUring, &'static str> {
    IoUring::new(2).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring, or a seccomp filter hides it",
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is switched off here (sysctl kernel.io_uring_disabled, or a seccomp filter)"
        }
        Some(libc::ENOMEM) => "no memory may be locked for an io_uring (ulimit -l)",
        Some(libc::EMFILE | libc::ENFILE) => "no more files can be opened for an io_uring",
        _ => "the kernel refuses to set up an io_uring",
    })
}

/// Starts an operation.
///
/// # Safety
/// What `entry` names must stay until it is done, and may be written if it writes.
pub(super) unsafe fn submit(ring: &mut IoUring, entry: &Entry) -> io::Result<()> {
    // SAFETY: the caller's promise.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    retry(|| ring.submit()).map(drop)
}

/// Waits for the operation that was started. Says how many bytes it moved.
pub(super) fn complete(ring: &mut IoUring) -> io::Result<u32> {
    loop {
        if let Some(entry) = ring.completion().next() {
            return u32::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        }
        retry(|| ring.submit_and_wait(1))?;
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
