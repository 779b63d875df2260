//! Threads that are to run as soon as they are woken.
//!
//! A pause ends when the last vCPU runs, and a clone begins with its first instruction; both wait for a CPU.
//! Who is woken on a busy one waits until whoever runs there has had his slice: milliseconds, and as many
//! times that as there are others. Unless its own slice is shorter: then it takes the CPU at once (Linux
//! 6.12, `PREEMPT_SHORT` in `kernel/sched/features.h`), and soon gives it back. It gets no more of the CPU
//! than before; it gets it in smaller pieces.
//!
//! So a vCPU that stands still has a short slice, and goes on with it until it first comes out of the guest: to
//! have it always would be to change threads all the time. No privilege is needed. Where the kernel does not know
//! slices nothing changes.

#![expect(unsafe_code, reason = "system calls that no crate has")]

use std::cell::Cell;
use std::mem;

/// The shortest slice that there is, in nanoseconds (`kernel/sched/syscalls.c`).
const SHORT: u64 = 100_000;

thread_local! {
    static IS_URGENT: Cell<bool> = const { Cell::new(false) };
}

/// Has this thread run as soon as it is woken, from now on.
pub(crate) fn begin() {
    if !IS_URGENT.get() {
        IS_URGENT.set(set_slice(SHORT));
    }
}

/// Has it wait for its turn again.
#[inline]
pub(crate) fn end() {
    if IS_URGENT.get() {
        IS_URGENT.set(false);
        // 0: that of everybody.
        set_slice(0);
    }
}

/// Whether the slice of this thread is another now. Who is scheduled in another way than most is left alone.
fn set_slice(nanoseconds: u64) -> bool {
    let Some(mut attributes) = attributes() else {
        return false;
    };
    let is_fair = [libc::SCHED_OTHER, libc::SCHED_BATCH].map(|policy| policy as u32);
    if !is_fair.contains(&attributes.sched_policy) {
        return false;
    }
    attributes.sched_runtime = nanoseconds;
    // SAFETY: `attributes` has the size that it says, and is only read.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    set == 0
}

/// How this thread is scheduled.
fn attributes() -> Option<libc::sched_attr> {
    // SAFETY: all zeros are a value of this plain C type.
    let mut attributes: libc::sched_attr = unsafe { mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: `attributes` has room for as many bytes as the kernel is told.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    (got == 0).then_some(attributes)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_slice_is_short_for_as_long_as_it_is_asked_for() {
        let seen = thread::spawn(|| {
            let slice = || attributes().map_or(0, |attributes| attributes.sched_runtime);
            let before = slice();
            begin();
            begin();
            let meanwhile = slice();
            end();
            end();
            (before, meanwhile, slice())
        });
        let (before, meanwhile, after) = seen.join().unwrap();
        assert_eq!(before, after);
        // A kernel that does not know slices says 0.
        if before > 0 {
            assert_eq!(meanwhile, SHORT);
            assert!(before > SHORT);
        }
    }

    #[test]
    fn who_is_scheduled_in_another_way_is_left_alone() {
        let seen = thread::spawn(|| {
            let mut idle = attributes().unwrap();
            idle.sched_policy = libc::SCHED_IDLE as u32;
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const idle, 0) };
            begin();
            let policy = attributes().unwrap().sched_policy;
            (policy, IS_URGENT.get())
        });
        assert_eq!(seen.join().unwrap(), (libc::SCHED_IDLE as u32, false));
    }

    /// A nice value that is not 0 is not lost: to get it back may take a privilege.
    #[test]
    fn how_nice_a_thread_is_stays_as_it_was() {
        let (expected, seen) = thread::spawn(|| {
            let mut nice = attributes().unwrap();
            // Nicer than the tests are: that needs no privilege.
            nice.sched_nice = (nice.sched_nice + 1).min(19);
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const nice, 0) };
            begin();
            let meanwhile = attributes().unwrap().sched_nice;
            end();
            let after = attributes().unwrap().sched_nice;
            (nice.sched_nice, (meanwhile, after))
        })
        .join()
        .unwrap();
        assert_eq!(seen, (expected, expected));
    }
}
