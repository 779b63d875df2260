//! Discard: memory the guest has no use for goes back to the host (a balloon; `MADV_DONTNEED`; PROTOCOL.md
//! T25).

use super::addr::Gfn;
use super::fresh::Isolated;
use super::policy::CowPolicy;
use super::rearrange::RearrangeError;
use super::space::AddressSpace;

impl<P: CowPolicy> AddressSpace<P> {
    /// Gives `count` pages from `first` on back: they read as zeros from now on, and cost nothing until they
    /// are written again. Frames that nobody else has lose their memory to the host. Says how many pages had
    /// one.
    ///
    /// Pages that a device holds are refused. Linux would leave the device an orphan, a frame that is
    /// nobody's page any more: a balloon that does so corrupts its guest. Readers keep what they hold.
    ///
    /// # Errors
    /// [`RearrangeError::Busy`] if a device holds one of them, or if the MMU refuses. Nothing has changed
    /// then, in any of them.
    pub fn discard(&self, first: Gfn, count: u64) -> Result<u64, RearrangeError> {
        let Some(last) = count.checked_sub(1) else {
            return Ok(0);
        };
        let last = Gfn(first.0.saturating_add(last));
        self.mapped.table.in_range(last)?;
        let _no_fork = self.mapped.enter()?;
        // In order, as `merge` takes its two. Everybody else has one at a time.
        let mut regions: Vec<_> = (self.mapped.table.region_of(first)
            ..=self.mapped.table.region_of(last))
            .map(|index| self.lock(index))
            .collect::<Result<_, _>>()?;

        for region in &mut regions {
            self.open_all(region);
            self.split(region);
        }
        let mut isolated: Vec<Isolated> = Vec::new();
        for region in &regions {
            for gfn in region.pages().filter(|g| (first..=last).contains(g)) {
                let entry = region.get(gfn);
                if !entry.is_present() {
                    continue;
                }
                match self.pool.isolate(entry.pfn(), |s| s.pins() == 0) {
                    Ok(frame) => isolated.push(frame),
                    Err(state) => {
                        isolated.into_iter().for_each(Isolated::put_back);
                        return Err(RearrangeError::Busy { gfn, state });
                    }
                }
            }
        }
        if let Err(error) = self.mapped.discard(&mut regions, first, count) {
            isolated.into_iter().for_each(Isolated::put_back);
            return Err(error.into());
        }
        let discarded = isolated.len() as u64;
        self.pool.give_to_host(isolated);
        Ok(discarded)
    }
}
