//! A stage with vCPUs: scenarios on the real window, under real virtual machines.
//!
//! What it guarantees
//! - A CPU access of a scenario is one instruction of a guest. A write to a page that the window shows read-only is a write fault of
//!   KVM's, resolved on the vCPU's thread by [`AddressSpace::write_fault`], as in any other run.
//! - **Nothing but the scenario's pages is subject to the policy on the stage.** The guest program, its page tables and
//!   its mailbox are in the window, but not in the address space: no fork shares them, no write to them needs a
//!   frame. So a guest obeys even when there is no memory left, and whatever a wrong policy does to the pages it is tried on.
//! - What goes wrong is an error with the reason, and no access waits for ever: a vCPU that crashed, or whose fault could not be resolved, has
//!   ended, and says so from then on.
//!
//! ```text
//!   gpa 0x00000  ┐ the address space: pages of the scenario from FIRST on, the rest untouched
//!                │ (the page at 0x2000 is the zeros that allow ports)
//!   gpa 0x10000  ┘ page tables  ┐
//!   gpa 0x100000   mailbox      │ frames of the stage's own, which the pool does not know
//!   gpa 0x200000   program      ┘
//! ```
//!
//! | file | concept |
//! |---|---|
//! | `program` | what every guest of a stage has beside its address space |
//! | `line` | commands to a guest, and its answers |
//!
//! Not covered: address spaces with more than one vCPU.
#![expect(unsafe_code, reason = "promises KVM that the window is the guest's")]

mod line;
mod program;
#[cfg(test)]
mod tests;

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use guest::abi::{MAIL_GPA, PAGE_TABLES_GPA};

use self::line::{Command, Line, Mailbox};
use self::program::Program;
use super::performer::PAGES;
use super::stage::{Actor, Stage, StageError, Wrap};
use crate::host::{MappingBudget, PhysMap, Ram, Window};
use crate::kvm::{self, GuestRam, Image, Kvm, Machine, MemoryError};
use crate::mm::{
    AddressSpace, CowPolicy, FrameMemory, FramePool, Frozen, Gfn, Mmu, MmuError, PAGE_SIZE, Pfn,
    Protection, Resolution,
};

pub use self::line::CpuError;

/// Pages of every address space: all below the page tables.
const SPACE_PAGES: u64 = PAGE_TABLES_GPA / PAGE_SIZE;
/// The scenario's first page. Its pages have neighbours on both sides that nobody touches.
const FIRST: Gfn = Gfn(8);
const _: () = assert!(FIRST.0 + PAGES < SPACE_PAGES);

/// The most guests a stage ever has. A scenario needs two.
const GUESTS: u64 = 64;
/// Frames that may have memory: few, so that they are soon exhausted.
const FRAME_LIMIT: u64 = 256;
/// Frame numbers: enough for all homes, those of guests and some that are there to use up memory.
const FRAMES: u64 = (GUESTS * SPACE_PAGES + 8 * FRAME_LIMIT).next_multiple_of(64);

/// Why a guest could not be put on the stage.
#[derive(Debug, thiserror::Error)]
pub enum RealError {
    /// The host has no room.
    #[error("cannot reserve {what}")]
    Reserve {
        /// For what.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// Homes and mailboxes are not used again.
    #[error("this stage has had {GUESTS} guests: take a new one")]
    Full,
    /// Not a snapshot of an actor of this stage.
    #[error("a snapshot of {pages} pages: guests of this stage have {SPACE_PAGES}")]
    Foreign {
        /// Pages of the snapshot.
        pages: u64,
    },
    /// No such page in a scenario.
    #[error("a scenario has {PAGES} pages, no page {page}")]
    Page {
        /// What was asked for.
        page: u64,
    },
}

/// A stage whose actors are virtual machines of one vCPU. It is for one scenario: frames and homes are few, and not used again.
#[derive(Debug)]
pub struct RealStage {
    kvm: Kvm,
    pool: Arc<FramePool>,
    physmap: Arc<PhysMap>,
    budget: Arc<MappingBudget>,
    program: Arc<Program>,
    /// The first guest's mailbox; those of the others follow.
    mailboxes: Pfn,
    /// Guests there ever were.
    guests: AtomicU64,
}

impl RealStage {
    /// An empty stage.
    ///
    /// # Errors
    /// If there is no KVM that can be used, or no memory.
    pub fn new() -> Result<Self, StageError> {
        let kvm = Kvm::open()?;
        let image = Image::parse(guest::PUPPET)?;
        let programs = Program::frames(&image);
        let reserve = |source| RealError::Reserve {
            what: "frames",
            source,
        };
        // Behind the pool's frames are those of the stage itself.
        let physmap = PhysMap::new(FRAMES + programs + GUESTS).map_err(reserve)?;
        physmap.commit(Pfn(FRAMES), programs).map_err(reserve)?;
        let pool = FramePool::new(Arc::clone(&physmap) as _, FRAMES, FRAME_LIMIT)?;
        let program = Program::load(Arc::clone(&physmap), Pfn(FRAMES), &image)?;
        Ok(Self {
            kvm,
            pool,
            physmap,
            budget: Arc::new(MappingBudget::of_this_process()),
            program: Arc::new(program),
            mailboxes: Pfn(FRAMES + programs),
            guests: AtomicU64::new(0),
        })
    }

    /// A guest whose address space `make` makes over the window it is given, wrapped.
    fn actor<P: CowPolicy>(
        &self,
        wrap: Wrap<'_>,
        make: impl FnOnce(Box<dyn Mmu>) -> Result<AddressSpace<P>, StageError>,
    ) -> Result<RealActor<P>, StageError> {
        let mailbox = self.mailbox()?;
        let reserve = |source| RealError::Reserve {
            what: "a guest's window",
            source,
        };
        let window = Window::new(
            Arc::clone(&self.physmap),
            Arc::clone(&self.budget),
            self.program.end().0,
        )
        .map_err(reserve)?;
        self.program.show(&window)?;
        window.map(
            Gfn::of_gpa(MAIL_GPA),
            mailbox.frame(),
            1,
            Protection::ReadWrite,
        )?;
        let window = Arc::new(window);
        let space = make(wrap(Box::new(Shared(Arc::clone(&window)))))?;
        let ram = Ram::new(Arc::new(space), Arc::clone(&self.physmap));
        let memory = Memory {
            ram: ram.clone(),
            program: Arc::clone(&self.program),
        };

        let host = NonNull::new(std::ptr::with_exposed_provenance_mut(
            window.host_address() as usize
        ))
        .ok_or_else(|| reserve(io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: the window is mapped until the actor has dropped it, which is after the machine (order of fields, and of the
        // variables here); `wrap` has only a share of it. Nothing but guest memory is ever mapped there. No
        // reference points into it.
        let slot = unsafe { kvm::Window::new(host, window.len()) };
        let (line, ports, on_stop) = line::connect(mailbox);
        let machine = Machine::new(
            &self.kvm,
            slot,
            Arc::new(memory),
            1,
            Arc::new(ports),
            on_stop,
        )?;
        // Before it starts: if it does not, the line is dropped first.
        let actor = RealActor {
            line: Mutex::new(line),
            machine,
            ram,
            _window: window,
        };
        actor.machine.start(self.program.entry())?;
        Ok(actor)
    }

    /// A mailbox that no guest has had.
    fn mailbox(&self) -> Result<Mailbox, StageError> {
        // Relaxed: only the number matters.
        let number = self.guests.fetch_add(1, Ordering::Relaxed);
        if number >= GUESTS {
            return Err(RealError::Full.into());
        }
        let frame = Pfn(self.mailboxes.0 + number);
        let reserve = |source| RealError::Reserve {
            what: "a mailbox",
            source,
        };
        self.physmap.commit(frame, 1).map_err(reserve)?;
        Ok(Mailbox::new(Arc::clone(&self.physmap), frame))
    }
}

impl Stage for RealStage {
    const NAME: &'static str = "a real vCPU";
    type Actor<P: CowPolicy> = RealActor<P>;

    fn pool(&self) -> &Arc<FramePool> {
        &self.pool
    }

    fn parent<P: CowPolicy>(
        &self,
        policy: P,
        wrap: Wrap<'_>,
    ) -> Result<Self::Actor<P>, StageError> {
        let pool = Arc::clone(&self.pool);
        self.actor(wrap, |mmu| {
            Ok(AddressSpace::new(pool, policy, mmu, SPACE_PAGES)?)
        })
    }

    fn child<P: CowPolicy>(
        &self,
        frozen: &Frozen,
        policy: P,
        wrap: Wrap<'_>,
    ) -> Result<Self::Actor<P>, StageError> {
        let pages = frozen.pages();
        if pages != SPACE_PAGES {
            return Err(RealError::Foreign { pages }.into());
        }
        self.actor(wrap, |mmu| {
            Ok(AddressSpace::from_frozen(frozen, policy, mmu)?)
        })
    }

    fn load(&self, frame: Pfn) -> u64 {
        load(&self.physmap, frame, 0)
    }

    fn store(&self, frame: Pfn, value: u64) {
        store(&self.physmap, frame, 0, value);
    }
}

/// A virtual machine of one vCPU, and its address space.
// In the order they must be dropped in: a vCPU waits for commands until its line is gone, and the machine for the vCPU;
// the machine's memory is last.
#[derive(Debug)]
pub struct RealActor<P> {
    line: Mutex<Line>,
    machine: Machine,
    ram: Ram<P>,
    _window: Arc<Window>,
}

impl<P> RealActor<P> {
    /// Write faults that the vCPU has had.
    pub fn write_faults(&self) -> u64 {
        self.machine.stats().write_faults
    }

    fn ask(&self, command: Command) -> Result<u64, CpuError> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.ask(command)
    }
}

impl<P: CowPolicy> Actor<P> for RealActor<P> {
    fn space(&self) -> &AddressSpace<P> {
        self.ram.space()
    }

    fn gfn(&self, page: u64) -> Gfn {
        Gfn(FIRST.0 + page)
    }

    fn cpu_write(&self, page: u64, value: u64) -> Result<(), StageError> {
        let gpa = gpa_of(page)?;
        self.ask(Command::Write { gpa, value })?;
        Ok(())
    }

    fn cpu_read(&self, page: u64) -> Result<u64, StageError> {
        let gpa = gpa_of(page)?;
        Ok(self.ask(Command::Read { gpa })?)
    }
}

fn gpa_of(page: u64) -> Result<u64, RealError> {
    if page < PAGES {
        Ok(Gfn(FIRST.0 + page).gpa())
    } else {
        Err(RealError::Page { page })
    }
}

/// A window that `wrap` may do with as it likes: the actor keeps it mapped.
struct Shared(Arc<Window>);

impl Mmu for Shared {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        self.0.map(first, frame, count, protection)
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        self.0.protect(first, count, protection)
    }

    fn is_crowded(&self) -> bool {
        self.0.is_crowded()
    }
}

/// All memory of a guest: its address space, and the program beside it.
struct Memory<P> {
    ram: Ram<P>,
    program: Arc<Program>,
}

impl<P: CowPolicy> GuestRam for Memory<P> {
    fn len(&self) -> u64 {
        self.program.len()
    }

    fn write_fault(&self, gfn: u64) -> Result<bool, MemoryError> {
        // Beside the address space nothing becomes writable: that is an error like any page out of range.
        Ok(self.ram.space().write_fault(Gfn(gfn))? != Resolution::AlreadyWritable)
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        if gpa < self.ram.size() {
            Ok(self.ram.read(gpa, buf)?)
        } else {
            self.program.read(gpa, buf)
        }
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), MemoryError> {
        Ok(self.ram.write(gpa, buf)?)
    }
}

/// The word at byte `offset` of a frame.
fn load(physmap: &PhysMap, frame: Pfn, offset: usize) -> u64 {
    let mut word = [0u64];
    physmap.slice(frame, offset as u64, 8).copy_to(&mut word);
    word[0]
}

/// Writes the word at byte `offset` of a frame.
fn store(physmap: &PhysMap, frame: Pfn, offset: usize, word: u64) {
    physmap.slice(frame, offset as u64, 8).copy_from(&[word]);
}
