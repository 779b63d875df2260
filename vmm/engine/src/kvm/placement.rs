//! On which CPU each vCPU runs on after a pause.
//!
//! A pause ends when the last vCPU is about to run. The scheduler wakes a thread where it ran last, or on an
//! idle CPU if it looks for one; and on a machine whose CPUs have been busy it does not look (`SIS_UTIL`,
//! `select_idle_cpu` in `kernel/sched/fair.c`). Threads that ran on CPUs of their own do not park there: the
//! one that stops them takes one of these CPUs meanwhile. So two vCPUs are often woken on one CPU, the second
//! runs when the first has had its slice (milliseconds), and a CPU is idle beside them: what has just run is
//! not moved soon either (`sched_migration_cost`).
//!
//! So each is told where to run first, on a CPU that one of the vCPUs had, or that of the thread that wakes
//! them, which it leaves. As soon as it runs it may run anywhere that it might before.

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

/// The CPUs that a vCPU's thread was on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cpus {
    /// When it parked.
    pub(super) parked: usize,
    /// When it ran on after the pause before that.
    pub(super) ran: usize,
}

/// A CPU for each of the vCPUs that are to run, as far as there are; `here` is that of the thread which wakes
/// them. `None` for those that need not be told, or for which there is none.
pub(super) fn places(vcpus: &[Option<Cpus>], here: usize) -> Vec<Option<usize>> {
    let mut taken = Vec::with_capacity(vcpus.len());
    let mut take = |cpu: usize| {
        let is_free = !taken.contains(&cpu);
        if is_free {
            taken.push(cpu);
        }
        is_free
    };
    let stays = |cpus: &Option<Cpus>| cpus.is_some_and(|cpus| take(cpus.parked));
    let stays = Vec::from_iter(vcpus.iter().map(stays));
    let known = || vcpus.iter().flatten().map(|cpus| cpus.ran);
    let places = vcpus.iter().zip(stays).map(|(cpus, stays)| {
        let cpus = (*cpus)?;
        if stays {
            // It is found busy, by this thread.
            return (cpus.parked == here).then_some(here);
        }
        [cpus.ran, here]
            .into_iter()
            .chain(known())
            .find(|cpu| take(*cpu))
    });
    places.collect()
}

/// A thread that may run on one CPU only, until this is dropped.
#[derive(Debug)]
pub(super) struct CpuPin {
    thread: Pid,
    to: CpuSet,
    before: CpuSet,
}

impl CpuPin {
    /// Pins `thread` to `cpu`. `None` if it may not run there, or the host refuses.
    pub(super) fn to(thread: Pid, cpu: usize) -> Option<Self> {
        let before = sched_getaffinity(Some(thread)).ok()?;
        if cpu >= CpuSet::MAX_CPU || !before.is_set(cpu) {
            return None;
        }
        let mut to = CpuSet::new();
        to.set(cpu);
        sched_setaffinity(Some(thread), &to).ok()?;
        Some(Self { thread, to, before })
    }
}

impl Drop for CpuPin {
    fn drop(&mut self) {
        // Unless somebody else has said meanwhile where it may run.
        if sched_getaffinity(Some(self.thread)).is_ok_and(|now| now == self.to) {
            let _ = sched_setaffinity(Some(self.thread), &self.before);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::gettid;

    use super::*;

    fn at(parked: usize, ran: usize) -> Option<Cpus> {
        Some(Cpus { parked, ran })
    }

    #[test]
    fn each_has_a_cpu_of_its_own_among_those_they_had() {
        // Both where they were, and this thread elsewhere.
        assert_eq!(places(&[at(1, 1), at(2, 2)], 0), [None, None]);
        // This thread is where one parked.
        assert_eq!(places(&[at(0, 0), at(1, 1)], 0), [Some(0), None]);
        // Both on one CPU: the second goes back, here, or where another one was.
        assert_eq!(places(&[at(1, 1), at(1, 2)], 0), [None, Some(2)]);
        assert_eq!(places(&[at(1, 1), at(1, 1)], 0), [None, Some(0)]);
        assert_eq!(places(&[at(0, 1), at(0, 0)], 0), [Some(0), Some(1)]);
        // No third CPU is known.
        assert_eq!(
            places(&[at(0, 0), at(1, 1), at(0, 1)], 0),
            [Some(0), None, None]
        );
        assert_eq!(places(&[None, at(3, 3), None], 3), [None, Some(3), None]);
    }

    #[test]
    fn a_thread_is_pinned_for_as_long_as_it_is() {
        let (me, before) = (gettid(), sched_getaffinity(None).unwrap());
        let cpus = || (0..CpuSet::MAX_CPU).filter(|cpu| before.is_set(*cpu));
        let cpu = cpus().next_back().unwrap();
        let pin = CpuPin::to(me, cpu).unwrap();
        let now = sched_getaffinity(None).unwrap();
        assert_eq!((now.count(), now.is_set(cpu)), (1, true));
        drop(pin);
        assert_eq!(sched_getaffinity(None).unwrap(), before);
        // Where it may not run it is not pinned.
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(None, &one).unwrap();
        assert!(
            cpus()
                .filter(|other| *other != cpu)
                .all(|other| CpuPin::to(me, other).is_none())
        );
        assert!(CpuPin::to(me, usize::MAX).is_none());
        sched_setaffinity(None, &before).unwrap();
        // What somebody else says meanwhile holds.
        let pin = CpuPin::to(me, cpu).unwrap();
        sched_setaffinity(None, &before).unwrap();
        drop(pin);
        assert_eq!(sched_getaffinity(None).unwrap(), before);
    }
}
