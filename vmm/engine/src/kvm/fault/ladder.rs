//! A vCPU's place on the ladder, and climbing it.

use kvm_bindings::kvm_regs;

use super::cause::{WriteFault, frames};
use super::inspection::Inspection;
use super::rung::Rung;
use crate::kvm::error::{VcpuRunError, WriteFaultError};
use crate::kvm::memory::GuestRam;
use crate::mm::REGION_PAGES;

/// A vCPU's place on the ladder: remembers the last fault, so that one that comes back is met one rung
/// higher.
#[derive(Debug)]
pub(in crate::kvm) struct Ladder {
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
    pub(super) const LIMIT: u32 = 100;
    /// How often a look must find nothing before it goes beyond what the instruction is about.
    pub(super) const TRIES: u32 = 3;

    pub(in crate::kvm) fn new() -> Self {
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
    pub(in crate::kvm) fn step_down(&mut self) {
        self.height = Rung::Operand;
        self.last = None;
        self.swept = 0;
    }

    /// Whether a fault has come back so often with nothing to be done about it that it is not for another vCPU that was
    /// first: then it is about what no look finds.
    pub(in crate::kvm) fn is_at_a_loss(&self) -> bool {
        self.barren > Self::TRIES
    }

    /// Something was done all the same. If the fault comes back there is more to be done, and it is no failure yet.
    pub(in crate::kvm) fn was_helped(&mut self) {
        self.barren = self.barren.min(Self::TRIES + 1);
    }

    /// Makes writable what the fault is about, by the first rung that finds something to do. `None` if there
    /// was nothing: then another vCPU was first, or the fault will come back.
    pub(in crate::kvm) fn climb(
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
pub(in crate::kvm) fn resolve(gfns: &[u64], ram: &dyn GuestRam) -> Result<bool, VcpuRunError> {
    let mut resolved = false;
    for &gfn in gfns {
        let first = ram.write_fault(gfn);
        resolved |= first.map_err(|source| VcpuRunError::Memory { gfn, source })?;
    }
    Ok(resolved)
}
