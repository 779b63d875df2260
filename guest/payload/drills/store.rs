//! Instructions that store, one after the other on page after page, for ever: sooner or later each meets a
//! page that a snapshot has just write-protected.

use super::Vcpu;
use crate::abi::PAGE_SIZE;

/// An instruction under test.
pub struct Store {
    name: &'static str,
    place: Place,
    /// Executes it for the given address, and says whether it did what it should. The number differs from
    /// time to time.
    test: fn(*mut u8, u64) -> bool,
}

/// The address a test is given. There are pages of the vCPU's own on both sides.
#[derive(Clone, Copy)]
enum Place {
    /// In the middle of a page.
    Inside,
    /// The first byte of a page: the test begins before it and ends behind.
    Across,
}

/// One that stays inside a page.
pub const fn inside(name: &'static str, test: fn(*mut u8, u64) -> bool) -> Store {
    let place = Place::Inside;
    Store { name, place, test }
}

/// One that lies across pages.
pub const fn across(name: &'static str, test: fn(*mut u8, u64) -> bool) -> Store {
    let place = Place::Across;
    Store { name, place, test }
}

/// Tests `stores` in turn, each time on another piece of `pages` pages.
pub fn repeat(mut vcpu: Vcpu<'_>, pages: u64, stores: &[Store]) -> ! {
    let ground = vcpu.ground(pages);
    loop {
        let round = vcpu.rounds;
        // Shifted by one with every lap, so that each store comes to each piece.
        let turn = round + round / ground.pieces;
        let store = &stores[turn as usize % stores.len()];
        let middle = ground.piece(round) + pages / 2 * PAGE_SIZE;
        let at = match store.place {
            Place::Inside => middle - PAGE_SIZE / 2,
            Place::Across => middle,
        };
        if !(store.test)(at as *mut u8, vcpu.salt()) {
            vcpu.fail(format_args!(
                "{} at {at:#x} did not do what it should",
                store.name
            ));
        }
        vcpu.round_done();
    }
}
