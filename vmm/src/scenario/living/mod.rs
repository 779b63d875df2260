//! The kernel this host runs on as a performer: P and its descendants are processes, and the
//! copy-on-write is the kernel's own.
//!
//! Nothing is played here: an address space is a process's, a fork is `clone` without `CLONE_VM`, and what a
//! step cannot be done with is [`NotDone::CannotAsk`].
//!
//! ```text
//!   controller ── commands ──> P ── clone ──> C ── clone ──> G <── commands ── controller
//!       │                      │ vmsplice     │              │
//!       ├─ pipes <─────────────┴──────────────┴──────────────┤        transient readers
//!       └─ rings <──────────── register a page ──────────────┘        devices
//! ```
//! All of them are children of the controller, whoever forked them: each may outlive the others, and the
//! controller waits for each. The actors' ends of channels are made before P is there, and inherited: one
//! that is in use is open in one actor alone, so that its channel ends when the actor does.
//!
//! | file | concept |
//! |---|---|
//! | `steps` | what is done for each step |
//! | `actor` | what runs in the processes |
//! | `process` | the controller's side of one: commands, answers, its end |
//! | `pipe` | transient readers |
//! | `uring` | devices |
//! | `pagemap` | which frame a page is in |
//! | `direct` | a race of `O_DIRECT` with the CPU, which is how the kernel plays C2: [`o_direct_race`] |
//!
//! Nothing here needs privilege; without it [`super::performer::Performer::view`] knows no frames that are
//! there, as the kernel hides their numbers.

mod actor;
mod direct;
mod pagemap;
mod pipe;
mod process;
mod steps;
mod uring;

#[cfg(test)]
mod tests;

use std::array;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use self::actor::{ActorCommand, FORKS, HOLDS, Kit, ZERO, place};
use self::pagemap::Entry;
use self::pipe::Splice;
use self::process::{ActorError, Process, channel};
use self::uring::PinRing;
use super::performer::{HoldId, Memory, NotDone, PAGES, Page, Who};
use palimpsest::mm::Pfn;

pub use self::direct::{DirectRace, Disturbance, o_direct_race};

/// Why there can be no living performer.
#[derive(Debug, thiserror::Error)]
pub enum LivingError {
    /// The pipes and channels to the processes can't be had.
    #[error("no pipes or sockets to talk to a process with")]
    Files(#[source] io::Error),
    /// There can be no process.
    #[error("the kernel makes no process")]
    Process(#[source] io::Error),
    /// There is one, but it can't do its part.
    #[error("the process did not get ready: {0}")]
    NotReady(String),
    /// There is one, and it has no huge page.
    #[error("this kernel makes no huge pages of a process's memory (MADV_COLLAPSE, Linux 6.1)")]
    NoHugePages(#[source] io::Error),
}

/// The version of the kernel that is asked, as `uname -r` says it.
pub fn kernel_release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// P, from the start, and its descendants, each from its fork on. Dropping it ends all of them; they end too
/// if this process dies.
#[derive(Debug)]
pub struct Living {
    processes: BTreeMap<Who, Process>,
    /// Channels for children to come, by their index in the kit.
    channels: BTreeMap<u64, UnixStream>,
    /// What the pages are in.
    memory: Memory,
    /// Address of the first page, in all processes.
    arena: u64,
    /// The kernel's zero page, if its number can be seen.
    zero_frame: Option<Pfn>,
    pipes: Vec<Splice>,
    /// Or why there are none.
    rings: Result<Vec<PinRing>, &'static str>,
    holds: BTreeMap<HoldId, Held>,
}

/// A hold that was taken: which of the pipes or rings it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Spliced { pipe: usize },
    Registered { ring: usize, address: u64 },
}

impl Living {
    /// P, with memory of zeros: untouched, or in a huge page.
    ///
    /// # Errors
    /// What this host does not let a process have. That there is no io_uring is no error:
    /// see [`Living::why_no_pins`].
    pub fn new(memory: Memory) -> Result<Self, LivingError> {
        let (commands, commands_end) = channel().map_err(LivingError::Files)?;
        let (channels, ends): (Vec<UnixStream>, Vec<OwnedFd>) = (0..FORKS)
            .map(|_| channel())
            .collect::<io::Result<Vec<_>>>()
            .map_err(LivingError::Files)?
            .into_iter()
            .unzip();
        let pipes = (0..HOLDS)
            .map(|_| Splice::new())
            .collect::<io::Result<Vec<_>>>()
            .map_err(LivingError::Files)?;
        let rings: Result<Vec<_>, _> = (0..HOLDS).map(|_| PinRing::new()).collect();
        let kit = kit(memory, &commands_end, &ends, &pipes, rings.as_deref().ok());

        let mut parent = Process::first(commands, &kit).map_err(LivingError::Process)?;
        // From here on a channel ends with the process that has its other end.
        drop((commands_end, ends));
        let arena = parent
            .ask(ActorCommand::Begin, 0, 0)
            .map_err(|error| LivingError::NotReady(error.to_string()))?;
        if memory == Memory::Huge {
            // There must be a page to begin with.
            let made = parent
                .ask(ActorCommand::Write, 0, 0)
                .and_then(|_| parent.ask(ActorCommand::Collapse, 0, 0));
            match made {
                Ok(_) => {}
                Err(ActorError::Call(error)) => return Err(LivingError::NoHugePages(error)),
                Err(error) => return Err(LivingError::NotReady(error.to_string())),
            }
        }
        let zero_frame = Entry::of(&parent, arena + place(memory, ZERO))
            .ok()
            .and_then(Entry::frame);
        Ok(Self {
            processes: BTreeMap::from([(Who::P, parent)]),
            channels: (0..).zip(channels).collect(),
            memory,
            arena,
            zero_frame,
            pipes,
            rings,
            holds: BTreeMap::new(),
        })
    }

    /// Why no pin can be taken here, `None` if pins can be. All other steps work without them.
    pub fn why_no_pins(&self) -> Option<&'static str> {
        self.rings.as_ref().err().copied()
    }

    /// The process that is `who`, if it is there.
    pub fn process_id(&self, who: Who) -> Option<u32> {
        self.processes.get(&who).map(Process::pid)
    }

    /// Whether one page table alone maps the page's frame, `None` if that can't be seen. A frame that is not
    /// shared need not be exclusive: the kernel shows its exclusive bit to nobody.
    pub fn is_mapped_once(&self, who: Who, page: Page) -> Option<bool> {
        self.entry(who, page).map(Entry::is_mapped_once)
    }

    fn entry(&self, who: Who, page: Page) -> Option<Entry> {
        let process = self.processes.get(&who)?;
        Entry::of(process, self.address(page).ok()?).ok()
    }

    fn address(&self, page: Page) -> io::Result<u64> {
        if page < PAGES {
            Ok(self.arena + place(self.memory, page))
        } else {
            Err(io::Error::other(format!("there is no page {page}")))
        }
    }

    fn process(&mut self, who: Who) -> Result<&mut Process, ActorError> {
        self.processes.get_mut(&who).ok_or_else(|| not_there(who))
    }

    fn command(
        &mut self,
        who: Who,
        command: ActorCommand,
        page: Page,
        value: u64,
    ) -> Result<u64, ActorError> {
        self.address(page).map_err(ActorError::Call)?;
        self.process(who)?.ask(command, page, value)
    }

    /// The first of the pipes or rings, as `place` says, that no hold is in.
    fn vacant(&self, place: impl Fn(&Held) -> Option<usize>) -> Result<usize, NotDone> {
        (0..HOLDS)
            .find(|index| self.holds.values().all(|held| place(held) != Some(*index)))
            .ok_or(NotDone::CannotAsk(
                "there are pipes and rings for only eight holds of a kind at once",
            ))
    }

    fn held(&self, id: HoldId) -> Result<Held, NotDone> {
        self.holds
            .get(&id)
            .copied()
            .ok_or_else(|| NotDone::Failed(format!("hold {id} is not held")))
    }

    fn ring(&mut self, index: usize) -> Result<&mut PinRing, NotDone> {
        match &mut self.rings {
            Ok(rings) => Ok(&mut rings[index]),
            Err(why) => Err(NotDone::CannotAsk(why)),
        }
    }
}

impl Drop for Living {
    /// Gives registered buffers back. A ring that is closed with one does so when the kernel
    /// finds the time, and until then its pages count against what the user may lock: the next
    /// performer would be short of it.
    fn drop(&mut self) {
        let Ok(rings) = &self.rings else { return };
        for held in self.holds.values() {
            if let Held::Registered { ring, .. } = held {
                // Should it fail, closing the ring does it.
                let _ = rings[*ring].unregister();
            }
        }
    }
}

/// What the actors inherit.
fn kit(
    memory: Memory,
    commands: &OwnedFd,
    channels: &[OwnedFd],
    pipes: &[Splice],
    rings: Option<&[PinRing]>,
) -> Kit {
    let mut kit = Kit {
        memory,
        commands: commands.as_raw_fd(),
        channels: array::from_fn(|index| channels[index].as_raw_fd()),
        pipes: array::from_fn(|index| pipes[index].actors_end()),
        rings: rings.map(|rings| array::from_fn(|index| rings[index].file())),
        keep: Vec::new(),
    };
    kit.keep.push(kit.commands);
    kit.keep.extend(kit.channels);
    kit.keep.extend(kit.pipes);
    kit.keep.extend(kit.rings.into_iter().flatten());
    kit.keep.sort_unstable();
    kit
}

fn not_there(who: Who) -> ActorError {
    ActorError::Gone {
        who,
        how: "is not there".to_owned(),
    }
}

fn failed(error: io::Error) -> NotDone {
    NotDone::Failed(error.to_string())
}
