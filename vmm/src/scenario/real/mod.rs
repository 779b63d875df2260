//! A stage with vCPUs: scenarios on the real window, under real virtual machines.
//!
//! What it guarantees
//! - A CPU access of a scenario is one instruction of a guest. A write to a page that the window shows
//!   read-only is a write fault, resolved on the vCPU's thread by [`AddressSpace::write_fault`], as in any
//!   other run.
//! - **Nothing but the scenario's pages is subject to the policy on the stage.** The guest program, its page
//!   tables and its mailbox are in the window, but not in the address space: no fork shares them, no write to
//!   them needs a frame. So a guest obeys even when there is no memory left, and whatever a wrong policy does
//!   to the pages it is tried on.
//! - What goes wrong is an error with the reason, and no access waits for ever: a vCPU that crashed, or whose
//!   fault could not be resolved, has ended, and says so from then on.
//!
//! ```text
//!   gpa 0x00000  ┐ the address space: pages of the scenario from FIRST on, the rest untouched
//!                │ (the page at 0x2000 is the zeros that allow ports)
//!   gpa 0x10000  ┘ page tables  ┐
//!   gpa 0x100000   mailbox      │ frames of the stage's own, which the pool does not know
//!   gpa 0x200000   program      ┘
//!   gpa 0x400000   the address space, if it is of one huge folio: one region of the window, and pages of
//!                  the scenario at SPREAD
//! ```
//!
//! | file | concept |
//! |---|---|
//! | `program` | what every guest of a stage has beside its address space |
//! | `line` | commands to a guest, and its answers |
//! | `words` | the words of a frame |
//!
//! Not covered: address spaces with more than one vCPU.

mod line;
mod program;
#[cfg(test)]
mod tests;
mod words;

use std::any::Any;
use std::io;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use guest::abi::{MAIL_GPA, PAGE_TABLES_GPA};

use self::line::{Command, Line, Mailbox};
use self::program::Program;
use self::words::{load, store};
use super::performer::{Memory, PAGES};
use super::stage::{Actor, Stage, StageError, Wrap};
use crate::boot;
use palimpsest::causes::Cause;
use palimpsest::host::{Dumps, Placement, Ram, Window};
use palimpsest::kvm::{EntryState, GuestRam, Kvm};
use palimpsest::memory::{self, Frames};
use palimpsest::mm::{
    Access, AddressSpace, AnyPolicy, FrameMemory, FramePool, Frozen, Gfn, Mmu, MmuError, PAGE_SIZE,
    Pfn, Protection, REGION_PAGES, Resolution,
};
use palimpsest::user::User;
use palimpsest::vm::{Accelerator, Vm};

pub use self::line::CpuError;

/// Pages of an address space in base pages: all below the page tables.
const SPACE_PAGES: u64 = PAGE_TABLES_GPA / PAGE_SIZE;
/// The scenario's first page there. Its pages have neighbours on both sides that nobody touches.
const FIRST: Gfn = Gfn(8);
const _: () = assert!(FIRST.0 + PAGES < SPACE_PAGES);
/// Where the scenario's pages are in a huge folio: at both ends, side by side, and by themselves.
const SPREAD: [u64; PAGES as usize] = [0, 1, 300, REGION_PAGES - 1];

/// The most guests a stage ever has. A scenario needs four, and some more where it forks over and over.
const GUESTS: u64 = 64;
/// Frames that may have memory: few, so that they are soon exhausted.
const FRAME_LIMIT: u64 = 256;
/// As many huge folios. The zero frame keeps one of them from being whole.
const FOLIO_LIMIT: u64 = 8;

/// The memory of the guests of a stage.
#[derive(Clone, Copy, Debug)]
struct StageLayout {
    memory: Memory,
    /// The first page of the address space, in the window.
    first: Gfn,
    /// How many it has.
    pages: u64,
    /// Frames that may have memory.
    limit: u64,
    /// Frame numbers: enough for all homes, those of guests and some that are there to use up memory.
    frames: u64,
}

impl StageLayout {
    /// Beside a program that ends before page `end`.
    fn new(memory: Memory, end: Gfn) -> Self {
        let (first, pages, limit) = match memory {
            Memory::Base => (Gfn(0), SPACE_PAGES, FRAME_LIMIT),
            Memory::Huge => (
                Gfn(end.0.next_multiple_of(REGION_PAGES)),
                REGION_PAGES,
                FOLIO_LIMIT * REGION_PAGES,
            ),
        };
        Self {
            memory,
            first,
            pages,
            limit,
            frames: (GUESTS * pages + 8 * limit).next_multiple_of(64),
        }
    }

    /// The page behind all that a guest has.
    fn end(self, program: Gfn) -> Gfn {
        Gfn(program.0.max(self.first.0 + self.pages))
    }

    /// Page `page` of the scenario, in the address space.
    fn gfn(self, page: u64) -> Gfn {
        match self.memory {
            Memory::Base => Gfn(FIRST.0 + page),
            Memory::Huge => Gfn(SPREAD[page as usize]),
        }
    }

    /// Page `page` of the scenario, for the guest.
    fn gpa(self, page: u64) -> Result<u64, RealError> {
        if page < PAGES {
            Ok(self.first.gpa() + self.gfn(page).gpa())
        } else {
            Err(RealError::Page { page })
        }
    }

    /// The page of the address space that the guest has at its page `gfn`.
    fn page_of(self, gfn: u64) -> Option<Gfn> {
        let page = gfn.checked_sub(self.first.0)?;
        (page < self.pages).then_some(Gfn(page))
    }
}

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
    #[error("a snapshot of {pages} pages: guests of this stage have {space}")]
    Foreign {
        /// Pages of the snapshot.
        pages: u64,
        /// Pages of an address space here.
        space: u64,
    },
    /// No such page in a scenario.
    #[error("a scenario has {PAGES} pages, no page {page}")]
    Page {
        /// What was asked for.
        page: u64,
    },
}

/// Who runs the vCPUs of a stage.
pub trait RunBy {
    /// The stage's name in reports.
    const NAME: &'static str;
    /// Where windows are.
    const PLACEMENT: Placement;

    /// What runs them.
    ///
    /// # Errors
    /// If it cannot be had here.
    fn open() -> Result<Accelerator, StageError>;
}

/// KVM does.
#[derive(Debug)]
pub enum ByKvm {}

impl RunBy for ByKvm {
    const NAME: &'static str = "a real vCPU";
    const PLACEMENT: Placement = Placement::Anywhere;

    fn open() -> Result<Accelerator, StageError> {
        Ok(Accelerator::Kvm(Kvm::open()?))
    }
}

/// Threads of this process do. The guest is told addresses of its window, wherever the host has put it: so
/// there can be several at once.
#[derive(Debug)]
pub enum ByThreads {}

impl RunBy for ByThreads {
    const NAME: &'static str = "a real vCPU without KVM";
    const PLACEMENT: Placement = Placement::Executable;

    fn open() -> Result<Accelerator, StageError> {
        Ok(Accelerator::User(User::open()?))
    }
}

/// A stage whose actors are virtual machines of one vCPU. It is for one scenario: frames and homes are few,
/// and not used again. There is none where `R` runs nothing.
#[derive(Debug)]
pub struct RealStage<R = ByKvm> {
    accelerator: Accelerator,
    run_by: PhantomData<R>,
    frames: Frames,
    program: Arc<Program>,
    layout: StageLayout,
    /// The first guest's mailbox; those of the others follow.
    mailboxes: Pfn,
    /// Guests there ever were.
    guests: AtomicU64,
}

impl<R: RunBy> RealStage<R> {
    /// A guest whose address space `make` makes over the window it is given, wrapped.
    fn actor(
        &self,
        wrap: Wrap<'_>,
        make: impl FnOnce(Box<dyn Mmu>) -> Result<AddressSpace<AnyPolicy>, StageError>,
    ) -> Result<RealActor, StageError> {
        let mailbox = self.mailbox()?;
        let reserve = |source| RealError::Reserve {
            what: "a guest's window",
            source,
        };
        let window = Window::placed(
            Arc::clone(self.frames.physmap()),
            Arc::clone(self.frames.budget()),
            self.program.len() / PAGE_SIZE,
            R::PLACEMENT,
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
        // Where the guest's code has gpa 0.
        let base = match R::PLACEMENT {
            Placement::Executable => window.host_address(),
            Placement::Anywhere | Placement::AtGuestAddresses => 0,
        };
        let shown = OffsetWindow {
            window: Arc::clone(&window),
            first: self.layout.first,
        };
        let space = make(wrap(Box::new(shown)))?;
        let memory = memory::Memory::over(&self.frames, space, window);
        let guest_ram = GuestMemory {
            ram: memory.ram().clone(),
            space: Arc::clone(memory.space()),
            program: Arc::clone(&self.program),
            layout: self.layout,
        };
        let (line, ports, on_stop) = line::connect(mailbox);
        let vm = Vm::builder(memory)
            .guest_ram(Arc::new(guest_ram))
            .ports(Arc::new(ports))
            .on_stop(on_stop)
            .copy_ahead(false)
            .build(&self.accelerator, 1)?;
        // Before it starts: if it does not, the line is dropped first.
        let actor = RealActor {
            line: Mutex::new(line),
            vm,
            layout: self.layout,
            base,
        };
        let entry = boot::low_entry(self.program.entry(), 0);
        let entry = EntryState {
            rip: base + entry.rip,
            rsp: base + entry.rsp,
            arguments: [base + MAIL_GPA, 0],
            ..entry
        };
        actor.vm.start(|_| entry)?;
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
        self.frames.physmap().commit(frame, 1).map_err(reserve)?;
        Ok(Mailbox::new(Arc::clone(self.frames.physmap()), frame))
    }
}

impl<R: RunBy> Stage for RealStage<R> {
    const NAME: &'static str = R::NAME;
    type Actor = RealActor;

    fn new(memory: Memory) -> Result<Self, StageError> {
        let accelerator = R::open()?;
        let image = boot::parse(guest::PUPPET)?;
        let programs = Program::frames(&image);
        let layout = StageLayout::new(memory, Program::end_of(&image));
        // Behind the pool's frames are those of the stage itself.
        let (first, of_stage) = (Pfn(layout.frames), programs + GUESTS);
        let dumps = Dumps::WithoutGuest;
        let frames = Frames::with_more_behind(layout.frames, of_stage, layout.limit, dumps)?;
        let physmap = frames.physmap();
        physmap
            .commit(first, programs)
            .map_err(|source| RealError::Reserve {
                what: "frames",
                source,
            })?;
        let end = layout.end(Program::end_of(&image));
        let program = Program::load(Arc::clone(physmap), first, &image, end)?;
        Ok(Self {
            accelerator,
            run_by: PhantomData,
            frames,
            program: Arc::new(program),
            layout,
            mailboxes: Pfn(first.0 + programs),
            guests: AtomicU64::new(0),
        })
    }

    fn pool(&self) -> &Arc<FramePool> {
        self.frames.pool()
    }

    fn parent(&self, policy: AnyPolicy, wrap: Wrap<'_>) -> Result<Self::Actor, StageError> {
        let (pool, pages) = (Arc::clone(self.pool()), self.layout.pages);
        self.actor(wrap, |mmu| Ok(AddressSpace::new(pool, policy, mmu, pages)?))
    }

    fn child(
        &self,
        frozen: &Frozen,
        policy: AnyPolicy,
        wrap: Wrap<'_>,
    ) -> Result<Self::Actor, StageError> {
        let (pages, space) = (frozen.pages(), self.layout.pages);
        if pages != space {
            return Err(RealError::Foreign { pages, space }.into());
        }
        self.actor(wrap, |mmu| {
            Ok(AddressSpace::from_frozen(frozen, policy, mmu)?)
        })
    }

    fn gfn(&self, page: u64) -> Gfn {
        self.layout.gfn(page)
    }

    fn load(&self, frame: Pfn) -> u64 {
        load(self.frames.physmap(), frame, 0)
    }

    fn store(&self, frame: Pfn, value: u64) {
        store(self.frames.physmap(), frame, 0, value);
    }
}

/// A virtual machine of one vCPU.
// In the order they must be dropped in: a vCPU waits for commands until its line is gone, and the VM for the
// vCPU.
#[derive(Debug)]
pub struct RealActor {
    line: Mutex<Line>,
    vm: Vm<AnyPolicy>,
    layout: StageLayout,
    /// Where the guest's code has gpa 0.
    base: u64,
}

impl RealActor {
    /// Write faults that the vCPU has had.
    pub fn write_faults(&self) -> u64 {
        self.vm.machine().stats().write_faults
    }

    fn ask(&self, command: Command) -> Result<u64, CpuError> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.ask(command)
    }
}

impl Actor for RealActor {
    fn space(&self) -> &AddressSpace<AnyPolicy> {
        self.vm.memory().space()
    }

    fn cpu_write(&self, page: u64, value: u64) -> Result<(), StageError> {
        let address = self.base + self.layout.gpa(page)?;
        self.ask(Command::Write { address, value })?;
        Ok(())
    }

    fn cpu_read(&self, page: u64) -> Result<u64, StageError> {
        let address = self.base + self.layout.gpa(page)?;
        Ok(self.ask(Command::Read { address })?)
    }
}

/// The part of a window that is an address space's, from page `first` on. `wrap` may do with it as it likes:
/// the actor keeps the window mapped.
struct OffsetWindow {
    window: Arc<Window>,
    first: Gfn,
}

impl OffsetWindow {
    fn at(&self, gfn: Gfn) -> Gfn {
        Gfn(self.first.0 + gfn.0)
    }
}

impl Mmu for OffsetWindow {
    fn map(
        &self,
        first: Gfn,
        frame: Pfn,
        count: u64,
        protection: Protection,
    ) -> Result<(), MmuError> {
        self.window.map(self.at(first), frame, count, protection)
    }

    fn protect(&self, first: Gfn, count: u64, protection: Protection) -> Result<(), MmuError> {
        self.window.protect(self.at(first), count, protection)
    }

    fn is_crowded(&self) -> bool {
        self.window.is_crowded()
    }
}

/// All memory of a guest: its address space, and the program beside it.
struct GuestMemory {
    space: Arc<AddressSpace<AnyPolicy>>,
    ram: Ram,
    program: Arc<Program>,
    layout: StageLayout,
}

impl GuestMemory {
    /// Where `gpa` is in the address space, if it is there.
    fn in_space(&self, gpa: u64) -> Option<u64> {
        let page = self.layout.page_of(Gfn::of_gpa(gpa).0)?;
        Some(page.gpa() + gpa % PAGE_SIZE)
    }
}

impl GuestRam for GuestMemory {
    fn len(&self) -> u64 {
        self.program.len()
    }

    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        match self.layout.page_of(gfn) {
            Some(page) => Ok(self.space.write_fault(page)? != Resolution::AlreadyWritable),
            // Nothing becomes writable there.
            None if self.program.is_writable(Gfn(gfn)) => Ok(false),
            None => {
                let (gfn, pages) = (Gfn(gfn), self.layout.pages);
                Err(format!("{gfn:?} is beside the address space, which has {pages} pages").into())
            }
        }
    }

    fn pin(&self, gpa: u64, len: u64) -> Result<Box<dyn Any + Send>, Cause> {
        match self.in_space(gpa) {
            Some(at) => Ok(Box::new(self.ram.pin(at, len, Access::Write)?)),
            // It is never shared, and never moves.
            None if self.program.is_writable(Gfn::of_gpa(gpa)) => Ok(Box::new(())),
            None => Err(format!("{len} bytes at {gpa:#x} are not the guest's to write").into()),
        }
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        match self.in_space(gpa) {
            Some(at) => Ok(self.ram.read(at, buf)?),
            None => self.program.read(gpa, buf),
        }
    }

    fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
        match self.in_space(gpa) {
            Some(at) => Ok(self.ram.write(at, buf)?),
            None => Err(format!("{} bytes at {gpa:#x} are not guest memory", buf.len()).into()),
        }
    }
}
