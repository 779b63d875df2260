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
//! A fault that comes back after the last rung is an error of ours
//! ([`WriteFaultError::Stuck`](super::WriteFaultError::Stuck)), not a loop.
//!
//! Not covered: code outside of 64-bit mode with paging on is not decoded; its faults begin with the regions.
//!
//! | file | concept |
//! |---|---|
//! | `cause` | a write fault as it comes out of the guest |
//! | `rung` | the rungs, and how often each was taken |
//! | `ladder` | a vCPU's place on the ladder, and climbing it |
//! | `inspection` | what can be known of a fault: the pages of each rung |
//! | `decode`, `vector` | the instruction at RIP, and what it reads and writes |
//! | `event` | what delivering an event needs |
//! | `pages` | collects pages |
//! | `unseen` | what a vCPU could not even see, because it was not loaded yet |
//! | `stalled` | vCPUs that KVM keeps from getting on without a write fault |

mod cause;
mod decode;
mod event;
mod inspection;
mod ladder;
mod pages;
mod rung;
mod stalled;
mod unseen;
mod vector;

#[cfg(test)]
mod tests;

pub(super) use cause::WriteFault;
pub(super) use decode::{StoredBy, code_at};
pub(super) use ladder::{Ladder, resolve};
pub(super) use rung::RungCounters;
pub use rung::{Rung, RungCounts};
pub(super) use stalled::{page_fault_is_over, stalled_on, tables_to_update};
pub(super) use unseen::{show, show_all_that_kvm_reads};
