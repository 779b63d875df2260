//! What host code needs of an address space, whatever its copy-on-write policy.

use crate::mm::{
    Access, AddressSpace, CowPolicy, FaultError, FaultOutcome, Get, Gfn, Pin, PinError, PinnedRun,
    Touch,
};

/// An address space as devices and vCPUs see it: pages that can be held, pinned and made writable.
///
/// Each method is that of [`AddressSpace`] with the same name.
pub trait Space: Send + Sync {
    /// See [`AddressSpace::pages`].
    fn pages(&self) -> u64;

    /// See [`AddressSpace::resolve_write`].
    ///
    /// # Errors
    /// Its own.
    fn resolve_write(&self, gfn: Gfn) -> Result<FaultOutcome, FaultError>;

    /// See [`AddressSpace::touch`].
    ///
    /// # Errors
    /// Its own.
    fn touch(&self, gfn: Gfn) -> Result<Touch, FaultError>;

    /// See [`AddressSpace::hidden`].
    fn hidden(&self) -> u64;

    /// See [`AddressSpace::first_hidden`].
    fn first_hidden(&self, from: Gfn) -> Option<Gfn>;

    /// See [`AddressSpace::set_whole_price`].
    fn set_whole_price(&self, small: u32);

    /// See [`AddressSpace::pin`].
    ///
    /// # Errors
    /// Its own.
    fn pin(&self, gfn: Gfn, access: Access) -> Result<Pin, PinError>;

    /// See [`AddressSpace::pin_range`].
    ///
    /// # Errors
    /// Its own.
    fn pin_range(&self, first: Gfn, count: u64, access: Access)
    -> Result<Vec<PinnedRun>, PinError>;

    /// See [`AddressSpace::get`].
    ///
    /// # Errors
    /// Its own.
    fn get(&self, gfn: Gfn, access: Access) -> Result<Get, FaultError>;
}

impl<P: CowPolicy> Space for AddressSpace<P> {
    fn pages(&self) -> u64 {
        self.pages()
    }

    fn resolve_write(&self, gfn: Gfn) -> Result<FaultOutcome, FaultError> {
        self.resolve_write(gfn)
    }

    fn touch(&self, gfn: Gfn) -> Result<Touch, FaultError> {
        self.touch(gfn)
    }

    fn hidden(&self) -> u64 {
        self.hidden()
    }

    fn first_hidden(&self, from: Gfn) -> Option<Gfn> {
        self.first_hidden(from)
    }

    fn set_whole_price(&self, small: u32) {
        self.set_whole_price(small);
    }

    fn pin(&self, gfn: Gfn, access: Access) -> Result<Pin, PinError> {
        self.pin(gfn, access)
    }

    fn pin_range(
        &self,
        first: Gfn,
        count: u64,
        access: Access,
    ) -> Result<Vec<PinnedRun>, PinError> {
        self.pin_range(first, count, access)
    }

    fn get(&self, gfn: Gfn, access: Access) -> Result<Get, FaultError> {
        self.get(gfn, access)
    }
}
