//! Whoever copies ahead rests meanwhile.

use crate::host::Ahead;

/// Keeps who copies ahead from working: a fork would wait for it.
pub(super) struct Resting<'a>(Option<&'a Ahead>);

impl<'a> Resting<'a> {
    pub(super) fn of(ahead: Option<&'a Ahead>) -> Self {
        ahead.into_iter().for_each(Ahead::rest);
        Self(ahead)
    }
}

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.into_iter().for_each(Ahead::work);
    }
}
