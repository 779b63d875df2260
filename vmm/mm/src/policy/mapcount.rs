use super::super::addr::Access;
use super::super::frame_state::FrameState;
use super::CowPolicy;

/// Linux to v5.7: one mapping or a copy, and fork shares everything.
///
/// A reader that is not a mapping is not seen: a page it holds is written in place (**missed COW**,
/// CVE-2020-29374). Fork shares what devices hold: they write into the snapshot, or lose the page to a copy.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mapcount;

impl CowPolicy for Mapcount {
    fn name(&self) -> &'static str {
        "mapcount"
    }

    fn may_share(&self, _frame: FrameState) -> bool {
        true
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        frame.maps() == 1
    }

    fn may_pin(&self, _frame: FrameState, _access: Access) -> bool {
        true
    }
}

/// Linux v5.7.3 and v5.8: [`Mapcount`], and a reader from outside is looked up as a writer (17839856fd58), so
/// that it never holds a shared page. Dropped in v5.9 for what it did to userfaultfd and debuggers
/// (a308c71bf1e6).
#[derive(Clone, Copy, Debug, Default)]
pub struct MapcountForcedBreak;

impl CowPolicy for MapcountForcedBreak {
    fn name(&self) -> &'static str {
        "mapcount-forced-break"
    }

    fn may_share(&self, frame: FrameState) -> bool {
        Mapcount.may_share(frame)
    }

    fn may_reuse(&self, frame: FrameState) -> bool {
        Mapcount.may_reuse(frame)
    }

    fn may_pin(&self, frame: FrameState, access: Access) -> bool {
        Mapcount.may_pin(frame, access)
    }

    fn lookup(&self, _access: Access) -> Access {
        Access::Write
    }
}
