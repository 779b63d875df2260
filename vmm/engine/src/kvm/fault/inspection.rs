//! What can be known of a write fault.

use super::cause::{WriteFault, frames};
use super::decode::{self, Decoded};
use super::event;
use super::pages::Pages;
use super::rung::Rung;
use crate::causes::Cause;
use crate::kvm::memory::GuestRam;
use crate::mm::PAGE_SIZE;

/// What can be known of a fault.
pub(super) struct Inspection<'a> {
    fault: &'a WriteFault<'a>,
    ram: &'a dyn GuestRam,
    pub(super) decoded: Decoded,
}

impl<'a> Inspection<'a> {
    pub(super) fn new(fault: &'a WriteFault<'a>, ram: &'a dyn GuestRam) -> Result<Self, Cause> {
        let decoded = Decoded::at(fault, ram)?;
        Ok(Self {
            fault,
            ram,
            decoded,
        })
    }

    /// The pages that `rung` is about, without repeats.
    pub(super) fn pages(&self, rung: Rung) -> Result<Vec<u64>, Cause> {
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
