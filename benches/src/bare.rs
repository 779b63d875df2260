//! Memory without a guest: what the benches of `mm` and of the window are run on.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use palimpsest::host::{MappingBudget, PhysMap, Window};
use palimpsest::mm::{
    AddressSpace, AllocError, Exclusive, FramePool, Gfn, Mmu, MmuError, Pfn, Protection,
};

/// An MMU that does nothing: what is left is the cost of the protocol itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMmu;

impl Mmu for NoMmu {
    fn map(&self, _: Gfn, _: Pfn, _: u64, _: Protection) -> Result<(), MmuError> {
        Ok(())
    }
    fn protect(&self, _: Gfn, _: u64, _: Protection) -> Result<(), MmuError> {
        Ok(())
    }
}

/// A real physmap with room for `pages` pages and as many copies, and its pool.
///
/// # Errors
/// The host's, if it has no memory.
pub fn frames(pages: u64) -> io::Result<(Arc<PhysMap>, Arc<FramePool>)> {
    let frames = 3 * pages + 1024;
    let physmap = PhysMap::new(frames)?;
    let pool =
        FramePool::new(Arc::clone(&physmap) as _, frames, frames).map_err(io::Error::other)?;
    Ok((physmap, pool))
}

/// An address space of `pages` pages without a window, all of them written.
///
/// # Errors
/// The host's, if it has no memory.
pub fn space_without_window(pages: u64) -> io::Result<AddressSpace<Exclusive>> {
    let (_, pool) = frames(pages)?;
    written(AddressSpace::new(pool, Exclusive, Box::new(NoMmu), pages))
}

/// The same, in which every page has an entry of its own.
///
/// # Errors
/// The host's, if it has no memory.
pub fn base_pages_without_window(pages: u64) -> io::Result<AddressSpace<Exclusive>> {
    let (_, pool) = frames(pages)?;
    let space = AddressSpace::new(pool, Exclusive, Box::new(NoMmu), pages);
    written(space.map(AddressSpace::with_base_pages))
}

/// An address space of `pages` pages with a real window, all of them written.
///
/// # Errors
/// The host's, if it has no memory.
pub fn space_with_window(pages: u64) -> io::Result<AddressSpace<Exclusive>> {
    let (physmap, pool) = frames(pages)?;
    let window = Window::new(physmap, Arc::new(MappingBudget::of_this_process()), pages)?;
    written(AddressSpace::new(pool, Exclusive, Box::new(window), pages))
}

fn written(
    space: Result<AddressSpace<Exclusive>, AllocError>,
) -> io::Result<AddressSpace<Exclusive>> {
    let space = space.map_err(io::Error::other)?;
    write(&space, 0..space.pages())?;
    Ok(space)
}

/// Makes `pages` writable, as a guest that writes them would.
///
/// # Errors
/// If a fault can't be resolved.
pub fn write(space: &AddressSpace<Exclusive>, pages: Range<u64>) -> io::Result<()> {
    pages
        .map(Gfn)
        .try_for_each(|gfn| space.write_fault(gfn).map(drop).map_err(io::Error::other))
}

/// Forks the address space `rounds` times, each time with the pages of `written` writable and all others as
/// the fork before left them, and says how long the forks took. One fork before them is not counted.
///
/// # Errors
/// If a fork fails, or a fault can't be resolved.
pub fn time_forks(
    space: &AddressSpace<Exclusive>,
    rounds: u64,
    written: Range<u64>,
) -> io::Result<Duration> {
    let mut last = space.fork().map_err(io::Error::other)?;
    let mut spent = Duration::ZERO;
    for _ in 0..rounds {
        write(space, written.clone())?;
        let start = Instant::now();
        let frozen = space.fork().map_err(io::Error::other)?;
        spent += start.elapsed();
        // The one before went on sharing what was not written.
        last = frozen;
    }
    drop(last);
    Ok(spent)
}
