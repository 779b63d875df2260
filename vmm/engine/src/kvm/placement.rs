//! On which CPU each vCPU runs on after a pause.
//!
//! A pause ends when the last vCPU is about to run. The scheduler wakes a thread where it ran last, or on an
//! idle CPU if it looks for one; and on a machine whose CPUs have been busy it does not look (`SIS_UTIL`,
//! `select_idle_cpu` in `kernel/sched/fair.c`). Threads that ran on CPUs of their own do not park there: the
//! one that stops them takes one of these CPUs meanwhile. So two vCPUs are often woken on one CPU, the second
//! runs when the first has had its slice (milliseconds), and a CPU is idle beside them: what has just run is
//! not moved soon either (`sched_migration_cost`).
//!
//! So those that would be woken on a busy CPU are told where to run first, on a CPU that one of the vCPUs
//! had, or that of the thread that wakes them, which it leaves. As soon as it runs, and at the latest a
//! moment later (`Machine::run_all`), each may run anywhere that it might before: on a CPU that somebody else
//! needs it would wait for its share there, seconds perhaps.
//!
//! A thread that somebody has told where to run (`taskset`, `pthread_setaffinity_np`) is left alone: the
//! kernel has one mask for what is asked of a thread, and does not say whether there is one.

use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_setaffinity};

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

/// A thread of which nobody has asked that it run on certain CPUs.
#[derive(Clone, Copy, Debug)]
pub(super) struct FreeThread {
    thread: Pid,
    /// Where its control group lets it run.
    may: CpuSet,
}

impl FreeThread {
    /// This thread, if it is one and the host lets it be told where to run.
    pub(super) fn this() -> Option<Self> {
        let before = sched_getaffinity(None).ok()?;
        sched_setaffinity(None, &everywhere()).ok()?;
        let may = sched_getaffinity(None).ok()?;
        if may != before {
            let _ = sched_setaffinity(None, &before);
            return None;
        }
        let thread = gettid();
        Some(Self { thread, may })
    }

    /// Has it run on `cpu` until what this gives is dropped. `None` if it may not run there, somebody has
    /// said meanwhile where it may, or the host refuses.
    pub(super) fn pin(&self, cpu: usize) -> Option<CpuPin> {
        let now = sched_getaffinity(Some(self.thread)).ok()?;
        if now != self.may || cpu >= CpuSet::MAX_CPU || !now.is_set(cpu) {
            return None;
        }
        let mut to = CpuSet::new();
        to.set(cpu);
        sched_setaffinity(Some(self.thread), &to).ok()?;
        let thread = self.thread;
        Some(CpuPin { thread, to })
    }
}

/// All CPUs that there can be: what is asked of a thread of which nothing is asked. Where its control group
/// lets it run it may then, and where that will let it.
fn everywhere() -> CpuSet {
    let mut all = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| all.set(cpu));
    all
}

/// A thread that may run on one CPU only, until this is dropped.
#[derive(Debug)]
pub(super) struct CpuPin {
    thread: Pid,
    to: CpuSet,
}

impl Drop for CpuPin {
    fn drop(&mut self) {
        // Unless somebody else has said meanwhile where it may run.
        if sched_getaffinity(Some(self.thread)).is_ok_and(|now| now == self.to) {
            let _ = sched_setaffinity(Some(self.thread), &everywhere());
        }
    }
}

#[cfg(test)]
mod tests {
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
    fn a_thread_is_pinned_for_as_long_as_it_is_and_only_if_nobody_says_where_it_runs() {
        let before = sched_getaffinity(None).unwrap();
        sched_setaffinity(None, &everywhere()).unwrap();
        let all = sched_getaffinity(None).unwrap();
        let cpus = || (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu));
        let cpu = cpus().next_back().unwrap();
        let free = FreeThread::this().unwrap();
        let pin = free.pin(cpu).unwrap();
        let now = sched_getaffinity(None).unwrap();
        assert_eq!((now.count(), now.is_set(cpu)), (1, true));
        drop(pin);
        assert_eq!(sched_getaffinity(None).unwrap(), all);
        assert!(free.pin(usize::MAX).is_none());
        // What somebody else says meanwhile holds.
        let pin = free.pin(cpu).unwrap();
        sched_setaffinity(None, &all).unwrap();
        drop(pin);
        assert_eq!(sched_getaffinity(None).unwrap(), all);
        if all.count() > 1 {
            let mut one = CpuSet::new();
            one.set(cpu);
            sched_setaffinity(None, &one).unwrap();
            assert!(free.pin(cpu).is_none());
            assert!(FreeThread::this().is_none());
            assert_eq!(sched_getaffinity(None).unwrap(), one);
        }
        sched_setaffinity(None, &before).unwrap();
    }
}
