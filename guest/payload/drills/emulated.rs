//! Stores that ring 3 may not execute itself where the host has UMIP. KVM emulates them there, and finds a
//! page that it may not write.

use super::store::{Store, across, inside};
use crate::effect::{execute, puts};

/// `smsw`.
pub const SMSW: &[Store] = &[
    inside("smsw m16", |at, salt| shows(at, salt, smsw)),
    across("smsw m16 across pages", |at, salt| {
        shows(at.wrapping_sub(1), salt, smsw)
    }),
];

/// `sldt`.
pub const SLDT: &[Store] = &[
    inside("sldt m16", |at, salt| shows(at, salt, sldt)),
    across("sldt m16 across pages", |at, salt| {
        shows(at.wrapping_sub(1), salt, sldt)
    }),
];

/// `str`.
pub const STR: &[Store] = &[
    inside("str m16", |at, salt| shows(at, salt, str)),
    across("str m16 across pages", |at, salt| {
        shows(at.wrapping_sub(1), salt, str)
    }),
];

/// `sgdt`.
pub const SGDT: &[Store] = &[
    inside("sgdt m80", |at, salt| shows(at, salt, sgdt)),
    across("sgdt m80 across pages", |at, salt| {
        shows(at.wrapping_sub(5), salt, sgdt)
    }),
];

/// `sidt`.
pub const SIDT: &[Store] = &[
    inside("sidt m80", |at, salt| shows(at, salt, sidt)),
    across("sidt m80 across pages", |at, salt| {
        shows(at.wrapping_sub(5), salt, sidt)
    }),
];

fn smsw(at: *mut [u8; 2]) {
    execute!("smsw word ptr [{at}]"; at = in(reg) at)
}

fn sldt(at: *mut [u8; 2]) {
    execute!("sldt word ptr [{at}]"; at = in(reg) at)
}

fn str(at: *mut [u8; 2]) {
    execute!("str word ptr [{at}]"; at = in(reg) at)
}

fn sgdt(at: *mut [u8; 10]) {
    execute!("sgdt [{at}]"; at = in(reg) at)
}

fn sidt(at: *mut [u8; 10]) {
    execute!("sidt [{at}]"; at = in(reg) at)
}

/// Whether `store` puts at `at` what it puts elsewhere. Every second time an ordinary store makes the page
/// writable before.
fn shows<const LEN: usize>(at: *mut u8, salt: u64, store: fn(*mut [u8; LEN])) -> bool {
    let mut shown = [0; LEN];
    store(&raw mut shown);
    if salt & 1 != 0 {
        // SAFETY: a page of this vCPU's own lies behind `at`.
        unsafe { at.add(1024).write_volatile(salt as u8) };
    }
    let good = puts(at, shown, |at| store(at.cast()));
    for (place, byte) in shown.into_iter().enumerate() {
        // What the store always puts there is gone, so that the next one can be seen.
        // SAFETY: what was just stored, and read, by the test.
        unsafe { at.add(place).write_volatile(!byte) };
    }
    good
}
