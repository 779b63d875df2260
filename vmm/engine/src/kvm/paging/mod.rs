//! The guest's page tables: builds the first ones, and walks whatever ones the guest has.
//!
//! What is built maps guest-virtual addresses one to one on guest-physical ones in 2 MiB pages, for ring 3,
//! with every accessed and dirty bit set. So the CPU never has to write to a page table, which keeps
//! page-table pages out of write faults where it honours the bits; with nested paging every walk counts as a
//! write, whatever they say. A walk therefore reports every table entry on its way, and which of them it
//! would have to change.
//!
//! | file | concept |
//! |---|---|
//! | `entry` | the bits of a page-table entry |
//! | `build` | the tables that a guest begins with |
//! | `walk` | a walk from the root to a page |

mod build;
mod entry;
#[cfg(test)]
pub(super) mod tests;
mod walk;

pub(super) use build::write_page_tables;
pub(super) use entry::{Page, has_bits_to_set};
pub(super) use walk::{Touch, Walker};
