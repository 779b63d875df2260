//! Which pages does a vCPU want to write? A ladder of answers.
//!
//! KVM says that a vCPU could not write, but not where (`EFAULT`, `exit_reason` 0; see `kvm_handle_error_pfn`
//! in `arch/x86/kvm/mmu/mmu.c`). RIP is at the instruction that faulted, and the ladder is what it may be
//! about, the likely and cheap first:
//!
//! | rung | pages |
//! |---|---|
//! | [`Rung::Kvm`] | what KVM itself names (`KVM_EXIT_MEMORY_FAULT`) |
//! | [`Rung::Operand`] | what the instruction at RIP writes, and page tables in which it sets bits |
//! | [`Rung::Walk`] | every page-table page on the way to its code, its operands and its stack |
//! | [`Rung::Event`] | what delivering an exception or interrupt writes and walks: stacks, TSS, IDT, GDT |
//! | [`Rung::Region`] | the 2 MiB around the code, the stack and the operands |
//! | [`Rung::All`] | all of guest memory, 2 MiB at a time |
//!
//! Walks are a rung because with nested paging (NPT, EPT with accessed and dirty bits) the CPU's walk of the
//! guest's tables counts as a write to them, even where no bit in them has to change.
//!
//! The vCPU enters again as soon as a page was made writable, or when a look found nothing: what stands at
//! RIP may have been another instruction a moment ago, which another vCPU has patched, or another vCPU has
//! resolved the page first. Only when the fault comes back with the same registers is the next rung tried;
//! those that are not about the instruction itself only when it comes back three times, since a page may be
//! protected again, and resolved by another vCPU, before the vCPU gets to its write. So a host that needs no
//! rung but the first does not pay for the others. Making a page writable that was not to be written costs a
//! copy and nothing else.
//!
//! A fault that comes back after the last rung is an error of ours ([`WriteFaultError::Stuck`]), not a loop.
//!
//! Not covered: code outside of 64-bit mode with paging on is not decoded; its faults begin with the regions.

mod cause;
mod decode;
mod event;
mod pages;
mod vector;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::error::{VcpuRunError, WriteFaultError};
use super::memory::GuestRam;
use crate::causes::Cause;
use crate::mm::{PAGE_SIZE, REGION_PAGES};
pub(super) use cause::WriteFault;
use cause::frames;
use decode::Decoded;
pub(super) use decode::StoredBy;
use pages::Pages;

/// A kind of answer to where a vCPU wanted to write. See the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rung {
    /// KVM named the pages.
    Kvm,
    /// The instruction's own operands.
    Operand,
    /// The page tables walked for it.
    Walk,
    /// What the delivery of an event needs.
    Event,
    /// The regions around it.
    Region,
    /// All of memory.
    All,
}

impl Rung {
    /// From the first to the last.
    pub const ALL: [Self; 6] = [
        Self::Kvm,
        Self::Operand,
        Self::Walk,
        Self::Event,
        Self::Region,
        Self::All,
    ];

    /// The rung above; the last one's is itself.
    fn next(self) -> Self {
        let above = Self::ALL.into_iter().find(|rung| *rung > self);
        above.unwrap_or(Self::All)
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm's word",
            Self::Operand => "operands",
            Self::Walk => "page tables",
            Self::Event => "event delivery",
            Self::Region => "regions",
            Self::All => "all of memory",
        })
    }
}

/// How many faults each rung has resolved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RungCounts([u64; Rung::ALL.len()]);

impl RungCounts {
    /// Faults that `rung` has resolved.
    pub fn of(&self, rung: Rung) -> u64 {
        self.0[rung as usize]
    }
}

/// The same, while vCPUs count.
#[derive(Debug, Default)]
pub(super) struct RungCounters([AtomicU64; Rung::ALL.len()]);

impl RungCounters {
    pub(super) fn count(&self, rung: Rung) {
        self.0[rung as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn now(&self) -> RungCounts {
        RungCounts(std::array::from_fn(|rung| {
            self.0[rung].load(Ordering::Relaxed)
        }))
    }
}

/// A vCPU's place on the ladder: remembers the last fault, so that one that comes back is met one rung
/// higher.
#[derive(Debug)]
pub(super) struct Ladder {
    /// Registers at the last fault.
    place: Option<kvm_regs>,
    /// The highest rung tried for it.
    height: Rung,
    /// What became of the look at it, if the vCPU came straight back from there.
    last: Option<Inspected>,
    /// Looks in a row, at the same registers, that found nothing to do.
    barren: u32,
    /// First page of the region that [`Rung::All`] looks at next.
    swept: u64,
}

/// What became of a look.
#[derive(Clone, Copy, Debug)]
enum Inspected {
    /// A page was made writable.
    Resolved,
    /// All it could be about was writable.
    InVain,
}

impl Ladder {
    /// How often a fault may come back after the last rung.
    const LIMIT: u32 = 100;
    /// How often a look must find nothing before it goes beyond what the instruction is about.
    const TRIES: u32 = 3;

    pub(super) fn new() -> Self {
        Self {
            place: None,
            height: Rung::Operand,
            last: None,
            barren: 0,
            swept: 0,
        }
    }

    /// The vCPU has left the guest for another reason: it got on, or was not given the time to. A fault at
    /// the same place begins at the first rung again.
    pub(super) fn step_down(&mut self) {
        self.height = Rung::Operand;
        self.last = None;
        self.swept = 0;
    }

    /// Makes writable what the fault is about, by the first rung that finds something to do. `None` if there
    /// was nothing: then another vCPU was first, or the fault will come back.
    pub(super) fn climb(
        &mut self,
        fault: &WriteFault<'_>,
        ram: &dyn GuestRam,
    ) -> Result<Option<Rung>, VcpuRunError> {
        if self.place.as_ref() != Some(fault.regs) {
            *self = Self::new();
            self.place = Some(*fault.regs);
        }
        self.height = match self.last {
            None => self.height,
            // It was not what the instruction writes, or not all of it.
            Some(Inspected::Resolved) => self.height.max(Rung::Walk),
            Some(Inspected::InVain)
                if self.height < Rung::Walk || self.barren.is_multiple_of(Self::TRIES) =>
            {
                self.height.next()
            }
            Some(Inspected::InVain) => self.height,
        };
        let rip = fault.regs.rip;
        let memory = |source| VcpuRunError::Fault {
            source: WriteFaultError::Memory { rip, source },
        };
        let look = Inspection::new(fault, ram).map_err(memory)?;
        let mut tried = String::new();
        for rung in Rung::ALL {
            if rung > self.height {
                break;
            }
            let resolved = if rung == Rung::All {
                self.sweep(ram)?
            } else {
                let gfns = look.pages(rung).map_err(memory)?;
                tried += &format!("{rung} ({} pages), ", gfns.len());
                resolve(&gfns, ram)?
            };
            if resolved {
                self.last = Some(Inspected::Resolved);
                self.barren = 0;
                return Ok(Some(rung));
            }
        }
        self.last = Some(Inspected::InVain);
        self.barren += 1;
        let times = self.barren;
        if times > Self::LIMIT {
            let instruction = look.decoded.to_string();
            tried += &format!("{} ({} pages)", Rung::All, self.swept);
            return Err(VcpuRunError::Fault {
                source: WriteFaultError::Stuck {
                    rip,
                    instruction,
                    times,
                    tried,
                },
            });
        }
        // Whoever was first may still be at it, on the CPU this thread holds.
        if times > 1 {
            std::thread::yield_now();
        }
        Ok(None)
    }

    /// Makes the next region writable that is not. `false` if all of memory is.
    fn sweep(&mut self, ram: &dyn GuestRam) -> Result<bool, VcpuRunError> {
        let end = frames(ram);
        while self.swept < end {
            let first = self.swept;
            self.swept = (first + REGION_PAGES).min(end);
            let region = Vec::from_iter(first..self.swept);
            if resolve(&region, ram)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Makes the pages `gfns` writable; whether one of them was not.
pub(super) fn resolve(gfns: &[u64], ram: &dyn GuestRam) -> Result<bool, VcpuRunError> {
    let mut resolved = false;
    for &gfn in gfns {
        let first = ram.write_fault(gfn);
        resolved |= first.map_err(|source| VcpuRunError::Memory { gfn, source })?;
    }
    Ok(resolved)
}

/// What can be known of a fault.
struct Inspection<'a> {
    fault: &'a WriteFault<'a>,
    ram: &'a dyn GuestRam,
    decoded: Decoded,
}

impl<'a> Inspection<'a> {
    fn new(fault: &'a WriteFault<'a>, ram: &'a dyn GuestRam) -> Result<Self, Cause> {
        let decoded = Decoded::at(fault, ram)?;
        Ok(Self {
            fault,
            ram,
            decoded,
        })
    }

    /// The pages that `rung` is about, without repeats.
    fn pages(&self, rung: Rung) -> Result<Vec<u64>, Cause> {
        let mut pages = Pages::new(self.ram, self.fault.sregs);
        let accesses = || self.decoded.accesses.iter();
        match rung {
            Rung::Kvm => {
                if let Some(gpas) = &self.fault.gpas {
                    pages.add_all(gpas.start / PAGE_SIZE..gpas.end.div_ceil(PAGE_SIZE));
                }
            }
            Rung::Operand => {
                for access in accesses() {
                    pages.written(access)?;
                }
            }
            Rung::Walk => {
                for access in accesses().chain([&decode::stack(self.fault)]) {
                    pages.walked(access)?;
                }
            }
            Rung::Event => event::delivery(self.fault, self.ram, &mut pages)?,
            Rung::Region => {
                for access in accesses().chain([&decode::stack(self.fault)]) {
                    pages.around(access)?;
                }
            }
            Rung::All => pages.add_all(0..frames(self.ram)),
        }
        Ok(pages.into_gfns())
    }
}

/// What a vCPU that KVM keeps from getting on wants to write, by the instruction at RIP. Nothing if that
/// writes no memory.
///
/// KVM retries for ever inside `KVM_RUN` an instruction whose store it emulates to a page that it may not
/// write (`sgdt` on PVM). Of such a store the whole region is named: the next of them would be stuck as well.
pub(super) fn stalled_on(
    fault: &WriteFault<'_>,
    ram: &dyn GuestRam,
) -> Result<(Vec<u64>, StoredBy), WriteFaultError> {
    let rip = fault.regs.rip;
    let memory = |source| WriteFaultError::Memory { rip, source };
    let look = Inspection::new(fault, ram).map_err(memory)?;
    let written = look.pages(Rung::Operand).map_err(memory)?;
    let by = look.decoded.stored_by;
    let gfns = match by {
        StoredBy::Cpu => written,
        StoredBy::Kvm => written
            .into_iter()
            .flat_map(|gfn| {
                let first = gfn - gfn % REGION_PAGES;
                first..(first + REGION_PAGES).min(frames(ram))
            })
            .collect(),
    };
    Ok((gfns, by))
}

/// The page tables in which the instruction at RIP sets accessed or dirty bits.
pub(super) fn tables_to_update(
    fault: &WriteFault<'_>,
    ram: &dyn GuestRam,
) -> Result<Vec<u64>, WriteFaultError> {
    let rip = fault.regs.rip;
    let memory = |source| WriteFaultError::Memory { rip, source };
    let look = Inspection::new(fault, ram).map_err(memory)?;
    let mut pages = Pages::new(ram, fault.sregs);
    for access in &look.decoded.accesses {
        pages.told(access).map_err(memory)?;
    }
    Ok(pages.into_gfns())
}

/// Whether the page fault at CR2 is one of the instruction at RIP that the page tables have no reason for:
/// whatever was missing when it was raised is there now.
pub(super) fn page_fault_is_over(
    fault: &WriteFault<'_>,
    ram: &dyn GuestRam,
) -> Result<bool, WriteFaultError> {
    let (rip, at) = (fault.regs.rip, fault.sregs.cr2);
    let memory = |source| WriteFaultError::Memory { rip, source };
    let look = Inspection::new(fault, ram).map_err(memory)?;
    let walker = super::paging::Walker::new(ram, fault.sregs);
    for access in &look.decoded.accesses {
        let touched = at.wrapping_sub(access.gva) < access.len;
        if touched && walker.allows(at, access.touch).map_err(memory)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Up to `len` bytes of code at RIP, for crash reports. Empty if there are none.
pub(super) fn code_at(
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    ram: &dyn GuestRam,
    len: usize,
) -> Vec<u8> {
    let mut code = vec![0; len];
    let at = decode::linear_rip(regs, sregs);
    let walker = super::paging::Walker::new(ram, sregs);
    let count = walker.read(at, &mut code).unwrap_or(0);
    code.truncate(count);
    code
}
