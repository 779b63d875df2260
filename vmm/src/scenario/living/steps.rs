//! What is done for each step.
//!
//! | step | what is done |
//! |---|---|
//! | write, read | in the process |
//! | fork | in the process; its child is the controller's, so that it may outlive whom it is a copy of |
//! | take, [`Hold::GetRead`] | `vmsplice` of the word into a pipe of the controller |
//! | take, [`Hold::PinWrite`] | the page becomes the registered buffer of a ring of the controller |
//! | protect | `mprotect` of all pages read-only, and back |
//! | discard | `MADV_DONTNEED` |
//! | migrate | a collapse into a huge page (`MADV_COLLAPSE`), which is split again |
//! | collapse, and pages in a huge page | `MADV_COLLAPSE` of 2 MiB |
//! | discard_rest | `MADV_DONTNEED` of the 2 MiB but the page |
//! | force_write | the controller writes `/proc/<pid>/mem` while the page is read-only |
//!
//! To protect pages that are in a huge page, they are protected one by one, which splits its entry. The
//! kernel may map exclusive dirty pages writable again at once (PROTOCOL.md T22).
//!
//! To migrate is not compaction, which is for root and for the whole host. After the collapse the page is in
//! another frame. A page that anything but one page table refers to is refused, as migration refuses it.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use super::super::performer::{Hold, HoldId, Memory, NotDone, Page, PageView, Performer, Who};
use super::actor::ActorCommand;
use super::process::{ActorError, Process};
use super::{Held, Living, failed, not_there};

impl Performer for Living {
    fn write(&mut self, who: Who, page: Page, value: u64) -> Result<(), NotDone> {
        self.command(who, ActorCommand::Write, page, value)?;
        Ok(())
    }

    fn read(&mut self, who: Who, page: Page) -> Result<u64, NotDone> {
        Ok(self.command(who, ActorCommand::Read, page, 0)?)
    }

    fn fork(&mut self, parent: Who, child: Who) -> Result<(), NotDone> {
        if !parent.runs() {
            return Err(NotDone::CannotAsk("a process has no frozen fork"));
        }
        if !child.runs() || self.processes.contains_key(&child) {
            return Err(NotDone::Failed(format!("{child:?} is no name for a child")));
        }
        self.process(parent)?;
        let (index, commands) = self.channels.pop_first().ok_or(NotDone::CannotAsk(
            "there are channels for only eight forks",
        ))?;
        let pid = match self.command(parent, ActorCommand::Fork, 0, index) {
            Ok(pid) => pid,
            Err(ActorError::Call(error)) if is_shortage(&error) => {
                self.channels.insert(index, commands);
                return Err(NotDone::Refused(error.to_string()));
            }
            Err(error) => return Err(error.into()),
        };
        let mut process = Process::child(child, pid, commands).map_err(failed)?;
        // They have inherited the end that the child uses. Who has ended has it no more.
        let others = self.processes.iter_mut().filter(|(who, _)| **who != parent);
        for (_, other) in others {
            match other.ask(ActorCommand::Forget, 0, index) {
                Ok(_) | Err(ActorError::Gone { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        process.ask(ActorCommand::Begin, 0, 0)?;
        self.processes.insert(child, process);
        Ok(())
    }

    fn snapshot(&mut self, _who: Who) -> Result<(), NotDone> {
        Err(NotDone::CannotAsk("a process has no frozen fork"))
    }

    fn restore(&mut self, _who: Who) -> Result<(), NotDone> {
        Err(NotDone::CannotAsk("a process has no frozen fork"))
    }

    fn exit(&mut self, who: Who) -> Result<(), NotDone> {
        let process = self.processes.remove(&who);
        Ok(process.ok_or_else(|| not_there(who))?.end()?)
    }

    fn take(&mut self, id: HoldId, who: Who, page: Page, hold: Hold) -> Result<(), NotDone> {
        if self.holds.contains_key(&id) {
            return Err(NotDone::Failed(format!("hold {id} is held already")));
        }
        let held = match hold {
            Hold::GetRead => {
                let pipe = self.vacant(|held| match held {
                    Held::Spliced { pipe } => Some(*pipe),
                    Held::Registered { .. } => None,
                })?;
                self.command(who, ActorCommand::Splice, page, pipe as u64)?;
                Held::Spliced { pipe }
            }
            Hold::PinWrite => {
                let ring = self.vacant(|held| match held {
                    Held::Spliced { .. } => None,
                    Held::Registered { ring, .. } => Some(*ring),
                })?;
                let address = self.address(page).map_err(failed)?;
                self.ring(ring)?;
                match self.command(who, ActorCommand::Register, page, ring as u64) {
                    Ok(_) => Held::Registered { ring, address },
                    Err(ActorError::Call(error)) if is_shortage(&error) => {
                        return Err(NotDone::CannotAsk(
                            "this user may not lock the memory that a registered buffer is in (ulimit -l)",
                        ));
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Hold::PinRead => {
                return Err(NotDone::CannotAsk(
                    "only RDMA, VFIO, vDPA and video devices take a long-term pin for reading; \
                     io_uring always pins for writing",
                ));
            }
            Hold::GetWrite => {
                return Err(NotDone::CannotAsk(
                    "O_DIRECT pins since Linux 6.5 (see C2); \
                     what still takes FOLL_GET for writing is direct I/O on network file systems",
                ));
            }
        };
        self.holds.insert(id, held);
        Ok(())
    }

    fn read_hold(&mut self, id: HoldId) -> Result<u64, NotDone> {
        match self.held(id)? {
            Held::Spliced { pipe } => self.pipes[pipe].peek(),
            Held::Registered { ring, address } => self.ring(ring)?.load(address),
        }
        .map_err(failed)
    }

    fn write_hold(&mut self, id: HoldId, value: u64) -> Result<(), NotDone> {
        match self.held(id)? {
            Held::Spliced { .. } => Err(NotDone::Failed(format!("hold {id} is for reading"))),
            Held::Registered { ring, address } => {
                self.ring(ring)?.store(address, value).map_err(failed)
            }
        }
    }

    fn release(&mut self, id: HoldId) -> Result<(), NotDone> {
        match self.held(id)? {
            Held::Spliced { pipe } => self.pipes[pipe].empty(),
            Held::Registered { ring, .. } => self.ring(ring)?.unregister(),
        }
        .map_err(failed)?;
        self.holds.remove(&id);
        Ok(())
    }

    fn protect(&mut self, who: Who) -> Result<(), NotDone> {
        self.command(who, ActorCommand::Protect, 0, 0)?;
        Ok(())
    }

    fn discard(&mut self, who: Who, page: Page) -> Result<(), NotDone> {
        self.command(who, ActorCommand::Discard, page, 0)?;
        Ok(())
    }

    fn discard_rest(&mut self, who: Who, page: Page) -> Result<(), NotDone> {
        self.command(who, ActorCommand::DiscardRest, page, 0)?;
        Ok(())
    }

    fn collapse(&mut self, who: Who, page: Page) -> Result<(), NotDone> {
        match self.command(who, ActorCommand::Collapse, page, 0) {
            Ok(_) => Ok(()),
            Err(ActorError::Call(error)) if is_refusal(&error) => {
                Err(NotDone::Refused(error.to_string()))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn migrate(&mut self, who: Who, page: Page) -> Result<(), NotDone> {
        self.address(page).map_err(failed)?;
        if self.memory == Memory::Huge {
            return Err(NotDone::CannotAsk(
                "only compaction, which is for root and for the whole host, moves a page out of a huge one",
            ));
        }
        self.process(who)?;
        let Some(entry) = self.entry(who, page) else {
            return Err(NotDone::CannotAsk(
                "the kernel does not show whose pages are shared (/proc/<pid>/pagemap)",
            ));
        };
        if entry.is_empty() || entry.frame().is_some() && entry.frame() == self.zero_frame {
            return Err(NotDone::Refused("there is nothing to move".to_owned()));
        }
        if !entry.is_mapped_once() {
            // A collapse would make a copy of it.
            return Err(NotDone::CannotAsk(
                "only compaction, which is for root and for the whole host, moves a page that is shared",
            ));
        }
        match self.command(who, ActorCommand::Move, page, 0) {
            Ok(_) => Ok(()),
            Err(ActorError::Call(error)) => match error.raw_os_error() {
                Some(libc::EAGAIN) => {
                    Err(NotDone::Refused("something refers to the page".to_owned()))
                }
                Some(libc::EINVAL) => Err(NotDone::CannotAsk(
                    "this kernel has no MADV_COLLAPSE (Linux 6.1, with transparent huge pages)",
                )),
                _ => Err(failed(error)),
            },
            Err(error) => Err(error.into()),
        }
    }

    fn merge(&mut self, _one: (Who, Page), _other: (Who, Page)) -> Result<(), NotDone> {
        Err(NotDone::CannotAsk(
            "KSM is switched on by root, for the whole host, and merges when it likes",
        ))
    }

    fn force_write(&mut self, who: Who, page: Page, value: u64) -> Result<(), NotDone> {
        let address = self.address(page).map_err(failed)?;
        let memory = self
            .process(who)?
            .open("mem", OpenOptions::new().write(true))
            .map_err(|error| match error.kind() {
                ErrorKind::PermissionDenied => NotDone::CannotAsk(
                    "this process may not write its child's memory (ptrace scope, or a security module)",
                ),
                _ => failed(error),
            })?;
        self.command(who, ActorCommand::Forbid, page, 0)?;
        let written = memory.write_all_at(&value.to_ne_bytes(), address);
        self.command(who, ActorCommand::Allow, page, 0)?;
        written.map_err(|error| match error.raw_os_error() {
            Some(libc::EIO) => NotDone::CannotAsk(
                "this kernel does not override protections for /proc/<pid>/mem (proc_mem.force_override)",
            ),
            _ => failed(error),
        })
    }

    fn exhaust_memory(&mut self) -> Result<(), NotDone> {
        Err(NotDone::CannotAsk(
            "no limit on a process makes just the copy of a page fail",
        ))
    }

    fn free_memory(&mut self) -> Result<(), NotDone> {
        Err(NotDone::CannotAsk(
            "no limit on a process makes just the copy of a page fail",
        ))
    }

    fn refuse_mmu(&mut self, _after: u64) -> Result<(), NotDone> {
        Err(NotDone::CannotAsk(
            "a processor does not refuse a change of page tables",
        ))
    }

    fn view(&mut self, who: Who, page: Page) -> Option<PageView> {
        let entry = self.entry(who, page)?;
        let frame = match entry.frame() {
            _ if entry.is_empty() => None,
            // Read and never written.
            Some(frame) if Some(frame) == self.zero_frame => None,
            Some(frame) => Some(frame),
            // Hidden, or in swap.
            None => return None,
        };
        Some(PageView {
            frame,
            inside: None,
        })
    }
}

/// Whether a collapse was refused: something refers to a page, or there is no huge page to be had.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM | libc::EINVAL)
    )
}

/// Whether something was refused for want of memory, or of leave to have more of it.
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN))
}
