//! Guest memory that keeps nothing of what is written to it.

use palimpsest::causes::Cause;
use palimpsest::kvm::GuestRam;

/// Memory that says it has what was written, and has not: whoever gives a guest a new generation by it leaves
/// it the old one.
pub(in crate::session) struct Forgetful<'a>(pub(in crate::session) &'a dyn GuestRam);

impl GuestRam for Forgetful<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn write_fault(&self, gfn: u64) -> Result<bool, Cause> {
        self.0.write_fault(gfn)
    }

    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
        self.0.read(gpa, buf)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Cause> {
        Ok(())
    }
}
