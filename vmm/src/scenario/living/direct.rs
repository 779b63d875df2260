//! A race that steps can't have: `O_DIRECT` into a page that the CPU writes while it is
//! write-protected (PROTOCOL.md C2, H5).
//!
//! A device reads from disk into the first 512 bytes of a page, at the end of a longer read that keeps it
//! busy. While it is at that, the page is write-protected and unprotected again, and the CPU writes the last
//! bytes of it. A kernel that takes the device's reference for a sharer copies the page for the CPU, and what
//! the device writes is lost. With a fork in between, the copy must go to the child.
//!
//! Before Linux 6.5 `O_DIRECT` took `FOLL_GET` and did not pin, so a fork in the race loses writes there, as
//! is documented (PROTOCOL.md D3).
#![expect(unsafe_code, reason = "a page that a device and the CPU write at once")]

use std::env;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, PipeWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr;

use io_uring::{IoUring, opcode, types};
use rustix::fs::{OFlags, fstatfs};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap,
};
use tempfile::NamedTempFile;

use super::super::performer::NotDone;
use super::actor::{self, PAGE_BYTES};
use super::process::Child;
use super::uring::{complete, ring, submit};

/// What a device reads into the page in a round.
const BLOCK: usize = 512;
/// What it reads before that, to be busy for a while: all but one of the pages that fit into one request,
/// since only a single request holds its pages from the start.
const AHEAD: usize = 255 * PAGE_BYTES as usize;
/// Blocks of the file that rounds end with, all different.
const BLOCKS: u64 = 128;
const READ: usize = AHEAD + BLOCK;
/// Where the CPU writes.
const LAST_WORD: usize = PAGE_BYTES as usize - size_of::<u64>();

/// What happens to the page while the device writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disturbance {
    /// `mprotect` read-only, and back.
    Protect,
    /// The same, and a fork. The child ends before the CPU's write in one round, after it in the next.
    ForkAndProtect,
}

/// How a race went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectRace {
    /// Rounds done.
    pub rounds: u64,
    /// Rounds in which the device was still at it when the CPU had written: the others say nothing.
    pub raced: u64,
    /// Rounds in which what the device wrote was not all there.
    pub lost_dma: u64,
    /// Rounds in which what the CPU wrote was not there.
    pub lost_cpu: u64,
}

/// Races a device with the CPU for `rounds` rounds, in this process.
///
/// # Errors
/// [`NotDone::CannotAsk`] if there is no io_uring, or no file system that does `O_DIRECT` to a disk
/// below the directory for temporary files, this one, or `/var/tmp`; [`NotDone::Failed`] if the host
/// has not enough of something.
pub fn o_direct_race(rounds: u64, disturbance: Disturbance) -> Result<DirectRace, NotDone> {
    let mut device = Device {
        ring: ring().map_err(NotDone::CannotAsk)?,
        page: TornPage::new().map_err(failed)?,
        file: None,
    };
    device.find_disk()?;
    let mut race = DirectRace::default();
    for round in 0..rounds {
        device
            .round(round, disturbance, &mut race)
            .map_err(failed)?;
    }
    Ok(race)
}

fn failed(error: io::Error) -> NotDone {
    NotDone::Failed(error.to_string())
}

/// What the block that a round ends with is full of. Never what the page is cleared to.
fn pattern(index: u64) -> u8 {
    index as u8 | 0x80
}

struct Device {
    ring: IoUring,
    page: TornPage,
    file: Option<File>,
}

impl Device {
    fn find_disk(&mut self) -> Result<(), NotDone> {
        let places = [
            env::temp_dir(),
            PathBuf::from("."),
            PathBuf::from("/var/tmp"),
        ];
        for place in places {
            if let Ok(Some(file)) = open(&place) {
                self.file = Some(file);
                // Some disks want larger blocks.
                if self.start(0).and_then(|()| self.finish()).is_ok() && self.page.has(pattern(0)) {
                    return Ok(());
                }
            }
        }
        Err(NotDone::CannotAsk(
            "no directory for temporary files is on a disk that reads 512 bytes with O_DIRECT",
        ))
    }

    fn round(
        &mut self,
        round: u64,
        disturbance: Disturbance,
        race: &mut DirectRace,
    ) -> io::Result<()> {
        let block = round % BLOCKS;
        let mark = !round;
        self.page.clear();
        self.start(block)?;
        let disturbed = self.disturb(round, disturbance, mark);
        let raced = self.ring.completion().is_empty();
        // Whether or not something failed, no request is under way after this.
        self.finish()?;
        disturbed?;
        race.rounds += 1;
        race.raced += u64::from(raced);
        race.lost_dma += u64::from(!self.page.has(pattern(block)));
        race.lost_cpu += u64::from(self.page.last_word() != mark);
        Ok(())
    }

    fn disturb(&self, round: u64, disturbance: Disturbance, mark: u64) -> io::Result<()> {
        let mut bystander = match disturbance {
            Disturbance::Protect => None,
            Disturbance::ForkAndProtect => Some(Bystander::new()?),
        };
        if round.is_multiple_of(2) {
            bystander = None;
        }
        self.page.protect(MprotectFlags::READ)?;
        self.page
            .protect(MprotectFlags::READ | MprotectFlags::WRITE)?;
        self.page.write_last_word(mark);
        drop(bystander);
        Ok(())
    }

    fn start(&mut self, block: u64) -> io::Result<()> {
        let file = self.file.as_ref().ok_or(ErrorKind::NotFound)?;
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), self.page.target(), READ as u32)
            .offset(block * BLOCK as u64)
            .build();
        // SAFETY: every caller waits for the end of it, and nothing of Rust's points into the target.
        unsafe { submit(&mut self.ring, &entry) }
    }

    fn finish(&mut self) -> io::Result<()> {
        match complete(&mut self.ring)? as usize {
            READ => Ok(()),
            count => Err(io::Error::other(format!("{count} of {READ} bytes came"))),
        }
    }
}

/// A file of blocks below `place`, opened for `O_DIRECT`; `None` if it is not on a
/// disk. It has no name any more.
fn open(place: &Path) -> io::Result<Option<File>> {
    const TMPFS: u32 = 0x0102_1994;
    const RAMFS: u32 = 0x8584_58f6;
    let mut named = NamedTempFile::new_in(place)?;
    named.write_all(&vec![0; AHEAD])?;
    for index in 0..BLOCKS {
        named.write_all(&[pattern(index); BLOCK])?;
    }
    named.as_file().sync_all()?;
    let kind = fstatfs(&named)?.f_type as u32;
    if matches!(kind, TMPFS | RAMFS) {
        return Ok(None);
    }
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(named.path())
        .map(Some)
}

/// A process that shares all memory with this one, copy-on-write, and does nothing. It is
/// gone when this is dropped.
struct Bystander {
    gate: Option<PipeWriter>,
    child: Child,
}

impl Bystander {
    fn new() -> io::Result<Self> {
        let (gate_end, gate) = io::pipe()?;
        let gate_end = OwnedFd::from(gate_end);
        let fd = gate_end.as_raw_fd();
        // SAFETY: `stand_by` keeps to the rules.
        let child = unsafe { Child::living(|| actor::stand_by(fd)) }?;
        Ok(Self {
            gate: Some(gate),
            child,
        })
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.gate = None;
        self.child.wait();
    }
}

/// A page that a device writes at one end and the CPU at the other; and before it, memory for
/// what is read ahead of it.
struct TornPage(*mut u8);

impl TornPage {
    const LEN: usize = AHEAD + PAGE_BYTES as usize;

    fn new() -> io::Result<Self> {
        // SAFETY: a new mapping where there is room for one; and it is told to be of small pages, and not to
        // be copied by forks but for the page.
        unsafe {
            let start = mmap_anonymous(
                ptr::null_mut(),
                Self::LEN,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?;
            let page = Self(start.cast());
            madvise(start, Self::LEN, Advice::LinuxNoHugepage)?;
            madvise(start, AHEAD, Advice::LinuxDontFork)?;
            Ok(page)
        }
    }

    /// What the device reads into.
    fn target(&self) -> *mut u8 {
        self.0
    }

    fn word(&self, offset: usize) -> *mut u64 {
        self.0.wrapping_add(AHEAD + offset).cast()
    }

    fn clear(&self) {
        for offset in (0..PAGE_BYTES as usize).step_by(size_of::<u64>()) {
            // SAFETY: a word of the page, which is writable between rounds.
            unsafe { self.word(offset).write_volatile(0) };
        }
    }

    fn write_last_word(&self, value: u64) {
        // SAFETY: as in `clear`; the device writes other bytes.
        unsafe { self.word(LAST_WORD).write_volatile(value) };
    }

    fn last_word(&self) -> u64 {
        // SAFETY: as in `clear`.
        unsafe { self.word(LAST_WORD).read_volatile() }
    }

    /// Whether the device's part is full of `byte`.
    fn has(&self, byte: u8) -> bool {
        (0..BLOCK).step_by(size_of::<u64>()).all(|offset| {
            // SAFETY: as in `clear`; the device is done.
            unsafe { self.word(offset).read_volatile() == u64::from_ne_bytes([byte; 8]) }
        })
    }

    fn protect(&self, flags: MprotectFlags) -> io::Result<()> {
        // SAFETY: the page is this object's; whoever writes it unprotects it first.
        Ok(unsafe { mprotect(self.word(0).cast(), PAGE_BYTES as usize, flags) }?)
    }
}

impl Drop for TornPage {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let _ = unsafe { munmap(self.0.cast(), Self::LEN) };
    }
}
