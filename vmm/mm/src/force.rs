//! A debugger's write: into a page the guest may not write (`FOLL_FORCE`; PROTOCOL.md 4.7, H-a).

use super::addr::{Gfn, PAGE_SIZE};
use super::fault::{FaultError, Intent};
use super::policy::CowPolicy;
use super::space::AddressSpace;

impl<P: CowPolicy> AddressSpace<P> {
    /// Writes `bytes` into page `gfn`, from byte `offset` on, as a debugger does to set a breakpoint: COW is
    /// broken, but the page does not become writable for the guest.
    ///
    /// The page must be **exclusive** before it is written: that is the proof that COW was broken. Linux once
    /// took "dirty" for it, which others can set (5535be309971). vCPUs that run may see half of the bytes.
    ///
    /// # Errors
    /// As [`AddressSpace::write_fault`].
    ///
    /// # Panics
    /// If the bytes do not end within the page.
    pub fn force_write(&self, gfn: Gfn, offset: u64, bytes: &[u8]) -> Result<(), FaultError> {
        assert!(
            offset <= PAGE_SIZE && bytes.len() as u64 <= PAGE_SIZE - offset,
            "{} bytes at offset {offset} are not in a page",
            bytes.len()
        );
        self.mapped.table.in_range(gfn)?;
        let _no_fork = self.mapped.enter()?;
        let mut region = self.lock_of(gfn)?;
        let resolution = self.resolve(&mut region, gfn, Intent::Unshare)?;
        self.count(Intent::Unshare, resolution);
        let pfn = region.get(gfn).pfn();
        self.pool.memory().write(pfn, offset, bytes);
        self.mark_dirty_page(&mut region, gfn);
        Ok(())
    }
}
