//! The exclusive policy with one safeguard left out.

use crate::mm::{Access, CowPolicy, Exclusive, FrameState, Safeguard};

/// [`Exclusive`], without the safeguard of number `N` in [`Safeguard::ALL`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Without<const N: u8>;

impl<const N: u8> CowPolicy for Without<N> {
    const NAME: &'static str = Exclusive::NAME;
    const GOES_BY_THE_BIT: bool = Exclusive::GOES_BY_THE_BIT;
    const WITHOUT: Option<Safeguard> = Some(Safeguard::ALL[N as usize]);

    fn may_share(&self, frame: FrameState) -> bool {
        Exclusive.may_share(frame)
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        Exclusive.may_reuse(frame)
    }

    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        Exclusive.may_pin(frame, access)
    }
}
