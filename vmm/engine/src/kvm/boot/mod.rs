//! Puts a guest program, and page tables for it, into guest memory.
//!
//! | file | concept |
//! |---|---|
//! | `image` | a program that was checked, and loading it |
//! | `elf` | what of an ELF file is read |
//! | `error` | why a program cannot be loaded |
//! | `page_tables` | tables that map all of memory to itself |

mod elf;
mod error;
mod image;
mod page_tables;

pub use error::BootError;
pub use image::Image;
pub use page_tables::write_page_tables;
