//! The page tables that a guest begins with.

use super::BootError;
use crate::kvm::memory::GuestRam;
use crate::kvm::paging;

/// Writes page tables for `memory` bytes of guest memory at `gpa`, and returns the gpa behind them.
///
/// They map every address to itself in 2 MiB pages, for ring 3, accessed and dirty bits set. A last partial 2
/// MiB is mapped whole: what the guest touches beyond its memory is MMIO, and so a crash.
///
/// # Errors
/// If memory cannot be written. Part of the tables may have been.
pub fn write_page_tables(ram: &dyn GuestRam, gpa: u64, memory: u64) -> Result<u64, BootError> {
    paging::write_page_tables(ram, gpa, memory).map_err(|source| BootError::Memory { gpa, source })
}
