//! What runs in the processes of a scenario.
//!
//! An actor is a bare copy of a process with many threads, of which only the one that forked is left: a lock
//! that another thread held stays held for ever. So the code here **allocates nothing, takes no lock and does
//! not panic**. It has its stack, the arena and system calls, and it does one command after the other until
//! its channel ends, which is also what happens when the controller dies. `PR_SET_PDEATHSIG` would not do: it
//! goes by the thread that forked, not by its process.
//!
//! Signals are blocked, so that no handler of the controller runs here; a fault in spite
//! of that ends the process.
#![expect(
    unsafe_code,
    reason = "a process without a runtime: it has system calls and raw memory"
)]

use std::ffi::{c_int, c_long};
use std::io;
use std::mem::size_of;
use std::os::fd::RawFd;
use std::ptr;
use std::thread;
use std::time::Duration;

use super::super::performer::{Memory, PAGES, Page};

/// Holds of either kind that can be had at once.
pub(super) const HOLDS: usize = 8;
/// How often all of them together can fork.
pub(super) const FORKS: usize = 8;
/// Distance of two pages: each has a huge page's worth of addresses to itself, so that it can be moved
/// (see [`ActorCommand::Move`]).
pub(super) const STRIDE: u64 = 2 << 20;
/// Bytes of a page.
pub(super) const PAGE_BYTES: u64 = 4096;
/// A page that is read and never written, so that the kernel's zero page can be told from others.
pub(super) const ZERO: Page = PAGES;

/// Distance of two pages that are in one huge page.
const SPREAD: u64 = STRIDE / PAGES;

/// Where a page is in the arena.
pub(super) const fn place(memory: Memory, page: Page) -> u64 {
    match memory {
        Memory::Huge if page < PAGES => page * SPREAD,
        _ => page * STRIDE,
    }
}

const ARENA_BYTES: usize = ((PAGES + 1) * STRIDE) as usize;

/// What an actor can be told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum ActorCommand {
    /// Say whether the process is ready, and where its arena is.
    Begin,
    /// Write `value`.
    Write,
    /// Read.
    Read,
    /// Fork. The child takes its commands from channel `value`; the answer is its process id.
    Fork,
    /// Close the end of channel `value`: another actor's child uses it.
    Forget,
    /// End. The answer is the end of the channel.
    Exit,
    /// `vmsplice` into pipe `value`.
    Splice,
    /// Register as the buffer of ring `value`.
    Register,
    /// `mprotect` the whole arena read-only, and back.
    Protect,
    /// `mprotect` the page read-only.
    Forbid,
    /// `mprotect` the page back.
    Allow,
    /// `MADV_DONTNEED`.
    Discard,
    /// Move to another frame: collapse the 2 MiB around the page into a huge page, which copies it, split
    /// that again, and give back all of it but the page.
    Move,
    /// Collapse the first 2 MiB of the arena into a huge page.
    Collapse,
    /// `MADV_DONTNEED` for the first 2 MiB of the arena, but not for the page.
    DiscardRest,
}

impl ActorCommand {
    const ALL: [Self; 15] = [
        Self::Begin,
        Self::Write,
        Self::Read,
        Self::Fork,
        Self::Forget,
        Self::Exit,
        Self::Splice,
        Self::Register,
        Self::Protect,
        Self::Forbid,
        Self::Allow,
        Self::Discard,
        Self::Move,
        Self::Collapse,
        Self::DiscardRest,
    ];

    fn of(word: u64) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|command| *command as u64 == word)
    }
}

/// A command on its way: what, which page, which value.
pub(super) type Message = [u64; 3];
/// The answer: an `errno` or 0, and a value.
pub(super) type Reply = [u64; 2];

/// What an actor inherits. Plain numbers: who owns the files is no business of the copy.
#[derive(Clone, Debug)]
pub(super) struct Kit {
    /// What the pages are in.
    pub(super) memory: Memory,
    /// P's own channel.
    pub(super) commands: RawFd,
    /// Channels for children to come, of whomever.
    pub(super) channels: [RawFd; FORKS],
    /// Pipes to splice pages into.
    pub(super) pipes: [RawFd; HOLDS],
    /// Rings to register buffers with, if there are any.
    pub(super) rings: Option<[RawFd; HOLDS]>,
    /// All of these in ascending order. Everything else is closed.
    pub(super) keep: Vec<RawFd>,
}

/// What a call of [`duplicate`] returned to.
pub(super) enum Duplicate {
    /// The caller; the process id is that of the copy.
    Original(u64),
    /// The copy.
    Copy,
}

/// `fork()` without the C library's part in it, with more `flags`.
///
/// # Safety
/// The copy must stay within what the module's documentation allows, and must not
/// return to code that does not.
pub(super) unsafe fn duplicate(flags: c_int) -> io::Result<Duplicate> {
    let flags = c_long::from(flags | libc::SIGCHLD);
    // SAFETY: without CLONE_VM the copy has memory and a stack of its own; the rest is the caller's promise.
    // The arguments but the flags are zero, so their order, which differs between machines, does not matter.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize) };
    match check(pid)? {
        0 => Ok(Duplicate::Copy),
        pid => Ok(Duplicate::Original(pid)),
    }
}

/// Ends this process at once: nothing of Rust's or the C library's runs any more.
pub(super) fn vanish() -> ! {
    // SAFETY: a plain system call.
    unsafe { libc::_exit(0) }
}

/// The result of a system call. Making the error of an `errno` does not allocate.
fn check(result: impl Into<i64>) -> io::Result<u64> {
    u64::try_from(result.into()).map_err(|_| io::Error::last_os_error())
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// The life of P, and of its descendants after it. To be called in the copy that [`duplicate`] made.
///
/// `extern "C"`, so that a panic, which must not happen, aborts instead of unwinding
/// into the controller's code.
pub(super) extern "C" fn live(kit: &Kit) {
    let mut actor = Actor {
        kit,
        commands: kit.commands,
        arena: ptr::null_mut(),
    };
    let ready = close_all_but(&kit.keep).and_then(|()| actor.begin());
    while let Some([command, page, value]) = receive(actor.commands) {
        let outcome = match ActorCommand::of(command) {
            Some(ActorCommand::Begin) => match &ready {
                Ok(()) => Ok(actor.arena.addr() as u64),
                Err(error) => Err(io::Error::from_raw_os_error(
                    error.raw_os_error().unwrap_or(libc::EIO),
                )),
            },
            Some(ActorCommand::Exit) => break,
            // The child has nothing to answer: it was asked nothing yet.
            Some(ActorCommand::Fork) => match actor.fork(value) {
                Ok(Duplicate::Copy) => continue,
                Ok(Duplicate::Original(pid)) => Ok(pid),
                Err(error) => Err(error),
            },
            Some(command) => actor.obey(command, page, value),
            None => Err(invalid()),
        };
        let reply = match outcome {
            Ok(value) => [0, value],
            Err(error) => [error.raw_os_error().unwrap_or(libc::EIO) as u64, 0],
        };
        if !send(actor.commands, &reply) {
            break;
        }
    }
}

/// The life of a process that is just there until all other ends of the pipe `gate` are closed.
pub(super) extern "C" fn stand_by(gate: RawFd) {
    if close_all_but(&[gate]).is_ok() {
        let _ = receive(gate);
    }
}

struct Actor<'a> {
    kit: &'a Kit,
    commands: RawFd,
    arena: *mut u8,
}

impl Actor<'_> {
    /// Maps the arena, in pages of 4 KiB, and touches none but [`ZERO`], for reading.
    fn begin(&mut self) -> io::Result<()> {
        let len = ARENA_BYTES + STRIDE as usize;
        // SAFETY: a new mapping where there is room for one.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast::<u8>();
        let up = start.addr().wrapping_neg() % STRIDE as usize;
        self.arena = start.wrapping_add(up);
        self.advise(0, ARENA_BYTES, libc::MADV_NOHUGEPAGE)?;
        self.obey(ActorCommand::Read, ZERO, 0).map(drop)
    }

    fn word(&self, page: Page) -> io::Result<*mut u64> {
        if page > ZERO {
            return Err(invalid());
        }
        Ok(self.arena.wrapping_add(self.offset(page)).cast())
    }

    fn offset(&self, page: Page) -> usize {
        place(self.kit.memory, page) as usize
    }

    fn obey(&mut self, command: ActorCommand, page: Page, value: u64) -> io::Result<u64> {
        let word = self.word(page)?;
        let offset = self.offset(page);
        let one = PAGE_BYTES as usize;
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        match command {
            // SAFETY: a word of the arena, which is mapped readable and writable between commands and which
            // no Rust reference points to.
            ActorCommand::Write => unsafe { word.write_volatile(value) },
            // SAFETY: as above.
            ActorCommand::Read => return Ok(unsafe { word.read_volatile() }),
            ActorCommand::Splice => self.splice(word, value)?,
            ActorCommand::Register => self.register(word, value)?,
            ActorCommand::Protect => match self.kit.memory {
                Memory::Base => {
                    self.protect(0, ARENA_BYTES, libc::PROT_READ)?;
                    self.protect(0, ARENA_BYTES, read_write)?;
                }
                // One by one, which takes small entries.
                Memory::Huge => {
                    for page in 0..PAGES {
                        self.protect(self.offset(page), one, libc::PROT_READ)?;
                    }
                    for page in 0..PAGES {
                        self.protect(self.offset(page), one, read_write)?;
                    }
                }
            },
            ActorCommand::Forbid => self.protect(offset, one, libc::PROT_READ)?,
            ActorCommand::Allow => self.protect(offset, one, read_write)?,
            ActorCommand::Discard => self.advise(offset, one, libc::MADV_DONTNEED)?,
            ActorCommand::Move => self.relocate(offset)?,
            ActorCommand::Collapse => {
                let huge = STRIDE as usize;
                self.advise(0, huge, libc::MADV_HUGEPAGE)?;
                self.collapse(0, huge)?;
            }
            ActorCommand::DiscardRest => {
                let behind = offset + one;
                if offset > 0 {
                    self.advise(0, offset, libc::MADV_DONTNEED)?;
                }
                self.advise(behind, STRIDE as usize - behind, libc::MADV_DONTNEED)?;
            }
            ActorCommand::Forget => {
                let fd = pick(&self.kit.channels, value)?;
                close(fd);
            }
            ActorCommand::Begin | ActorCommand::Fork | ActorCommand::Exit => return Err(invalid()),
        }
        Ok(0)
    }

    /// Forks. The child is the controller's child, not this process's, so that it can be waited for when this
    /// one is gone, and closes its parent's channel, so that the parent's end is seen.
    fn fork(&mut self, channel: u64) -> io::Result<Duplicate> {
        let fd = pick(&self.kit.channels, channel)?;
        // SAFETY: the copy goes on in `live`, which keeps to the module's rules.
        let side = unsafe { duplicate(libc::CLONE_PARENT)? };
        match side {
            Duplicate::Copy => {
                close(self.commands);
                self.commands = fd;
            }
            Duplicate::Original(_) => close(fd),
        }
        Ok(side)
    }

    /// `FOLL_GET` for reading: the page goes into a pipe by reference.
    fn splice(&self, word: *mut u64, pipe: u64) -> io::Result<()> {
        let pipe = pick(&self.kit.pipes, pipe)?;
        let part = iovec(word, size_of::<u64>());
        // SAFETY: the kernel reads `part` and takes a reference to the page it names; nothing is written.
        let done =
            check(unsafe { libc::vmsplice(pipe, &part, 1, libc::SPLICE_F_NONBLOCK) } as i64)?;
        if done == size_of::<u64>() as u64 {
            Ok(())
        } else {
            Err(invalid())
        }
    }

    /// `FOLL_PIN | FOLL_LONGTERM | FOLL_WRITE`: the page becomes the one buffer of a ring.
    fn register(&self, word: *mut u64, ring: u64) -> io::Result<()> {
        /// `IORING_REGISTER_BUFFERS` of `linux/io_uring.h`.
        const REGISTER_BUFFERS: c_int = 0;
        let rings = self.kit.rings.as_ref().ok_or_else(invalid)?;
        let ring = pick(rings, ring)?;
        let part = iovec(word, PAGE_BYTES as usize);
        let part = &raw const part;
        // SAFETY: the kernel reads the one iovec. That devices may write the page from now on is what was
        // asked for: nobody has a reference to it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring,
                REGISTER_BUFFERS,
                part,
                1_usize,
            )
        };
        check(result).map(drop)
    }

    fn protect(&self, offset: usize, len: usize, protection: c_int) -> io::Result<()> {
        let start = self.arena.wrapping_add(offset).cast();
        // SAFETY: a part of the arena, which nothing but `obey` reads and writes.
        check(unsafe { libc::mprotect(start, len, protection) }).map(drop)
    }

    fn advise(&self, offset: usize, len: usize, advice: c_int) -> io::Result<()> {
        let start = self.arena.wrapping_add(offset).cast();
        // SAFETY: a part of the arena, which nothing but `obey` reads and writes.
        check(unsafe { libc::madvise(start, len, advice) }).map(drop)
    }

    /// See [`ActorCommand::Move`]. A collapse refuses a page that anything but page tables
    /// refers to, as migration does.
    fn relocate(&self, offset: usize) -> io::Result<()> {
        let (one, huge) = (PAGE_BYTES as usize, STRIDE as usize);
        self.advise(offset, huge, libc::MADV_HUGEPAGE)?;
        let moved = self.collapse(offset, huge);
        let split = match moved {
            // For a part of a huge page only: this splits it.
            Ok(()) => self.advise(offset, one, libc::MADV_COLD),
            Err(_) => Ok(()),
        };
        let rest = self.advise(offset + one, huge - one, libc::MADV_DONTNEED);
        let small = self.advise(offset, huge, libc::MADV_NOHUGEPAGE);
        moved.and(split).and(rest).and(small)
    }

    /// Tries a few times: a reference that only the kernel's own lists hold goes away, when another CPU has
    /// got round to it.
    fn collapse(&self, offset: usize, len: usize) -> io::Result<()> {
        let mut tries = 20;
        loop {
            tries -= 1;
            match self.advise(offset, len, libc::MADV_COLLAPSE) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && tries > 0 => {
                    thread::sleep(Duration::from_micros(500));
                }
                result => return result,
            }
        }
    }
}

fn pick(files: &[RawFd], index: u64) -> io::Result<RawFd> {
    usize::try_from(index)
        .ok()
        .and_then(|index| files.get(index).copied())
        .ok_or_else(invalid)
}

fn iovec(word: *mut u64, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: word.cast(),
        iov_len: len,
    }
}

fn close(fd: RawFd) {
    // SAFETY: a file of the kit, which this process has no other use for.
    unsafe { libc::close(fd) };
}

/// Closes every file but `keep`, which is sorted. Above all the controller's ends of channels: while an actor
/// has one, the controller's death is not seen.
fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut first = 0_u32;
    for &fd in keep {
        let fd = fd as u32;
        if first < fd {
            close_range(first, fd - 1)?;
        }
        first = fd.wrapping_add(1);
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: files of the controller's, which this copy never uses.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) }).map(drop)
}

/// The next command, `None` at the end of the channel.
fn receive(commands: RawFd) -> Option<Message> {
    let mut message: Message = [0; 3];
    let len = size_of::<Message>();
    let mut done = 0;
    while done < len {
        let at = message.as_mut_ptr().cast::<u8>().wrapping_add(done);
        // SAFETY: the rest of `message`, which any bytes are valid for.
        match check(unsafe { libc::read(commands, at.cast(), len - done) } as i64) {
            Ok(0) => return None,
            Ok(count) => done += count as usize,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(_) => return None,
        }
    }
    Some(message)
}

/// Answers. `false` if the controller has closed its end.
fn send(commands: RawFd, reply: &Reply) -> bool {
    let len = size_of::<Reply>();
    let mut done = 0;
    while done < len {
        let at = reply.as_ptr().cast::<u8>().wrapping_add(done);
        // SAFETY: the rest of `reply`.
        match check(unsafe { libc::write(commands, at.cast(), len - done) } as i64) {
            Ok(count) => done += count as usize,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(_) => return false,
        }
    }
    true
}
