//! CPUs, mappings, threads, files and signals: what limits this process apart from memory.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc;
use std::{fs, io, thread};

use guest::abi::PAGE_SIZE;
use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::session::config::{Config, Size};
use palimpsest::host::MappingBudget;
use palimpsest::kvm::Platform;

/// Threads of a run besides those of vCPUs and devices.
const OTHER_THREADS: u64 = 4;
/// Files of a run besides those of vCPUs and devices, and those that it was started with: KVM, the VM, the
/// physmap, and one that is read or written now and then.
const OTHER_FILES: u64 = 4;
/// Files of a vCPU, or of a device.
const FILES_EACH: u64 = 1;
/// Mappings that windows may use where `vm.max_map_count` is what Linux makes it.
const USUAL_MAPPINGS: u64 = 60_000;
/// The least that a small guest gets along with.
const FEW_MAPPINGS: u64 = 400;

pub(super) fn cpus(platform: &Platform, config: &Config) -> Finding {
    let found = format!(
        "{} for {} vCPUs, devices and the checker",
        platform.cpus, config.vcpus
    );
    if platform.cpus as u64 >= config.vcpus.min(2) && platform.cpus > 1 {
        Finding::ok("cpus", found)
    } else {
        Finding::worse(
            "cpus",
            found,
            "they take turns: pauses are longer, and fewer snapshots are checked in a second; \
             `--vcpus 1` helps",
        )
    }
}

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let threads = config.vcpus + config.dma_devices + OTHER_THREADS;
    let files = OTHER_FILES + FILES_EACH * (config.vcpus + config.dma_devices);
    vec![
        mappings(&MappingBudget::of_this_process()),
        self::threads(threads, start_threads(threads)),
        self::files(
            limit_with_room(&open_files(), files),
            getrlimit(Resource::Nofile).current,
        ),
        signals(&status),
    ]
}

fn mappings(budget: &MappingBudget) -> Finding {
    let limit = budget.limit();
    let found = format!(
        "{limit} within vm.max_map_count, enough for {} of guest memory however it is written; \
         snapshots take none",
        Size((limit * PAGE_SIZE) >> 20 << 20)
    );
    let advice = "beyond that pages are copied together to save mappings: \
                  `sysctl -w vm.max_map_count=262144` has room for 1 GiB";
    match limit {
        0..FEW_MAPPINGS => Finding::no("mappings", found, advice),
        FEW_MAPPINGS..USUAL_MAPPINGS => Finding::worse("mappings", found, advice),
        _ => Finding::ok("mappings", found),
    }
}

/// Starts `count` threads that exist at the same time, and ends them.
fn start_threads(count: u64) -> io::Result<()> {
    let mut started = Vec::new();
    for _ in 0..count {
        // Each ends when its sender is gone.
        let (end, wait) = mpsc::channel::<()>();
        let thread = thread::Builder::new().spawn(move || wait.recv().is_ok())?;
        started.push((end, thread));
    }
    for (end, thread) in started {
        drop(end);
        // It does nothing that panics.
        let _ = thread.join();
    }
    Ok(())
}

fn threads(count: u64, started: io::Result<()>) -> Finding {
    match started {
        Ok(()) => Finding::ok(
            "threads",
            format!("{count} could be started, as many as a run has"),
        ),
        Err(error) => Finding::no(
            "threads",
            format!("cannot start the {count} that a run has: {error}"),
            "raise `ulimit -u`, or pids.max of the control group",
        ),
    }
}

/// Descriptors that are open here: the standard streams, and what the program was started with besides.
fn open_files() -> BTreeSet<u64> {
    let Ok(listed) = fs::read_dir("/proc/self/fd") else {
        return BTreeSet::from([0, 1, 2]);
    };
    let numbers = listed
        .flatten()
        .filter_map(|file| file.file_name().to_str()?.parse().ok());
    // Among them is the one that the folder was read by, which is closed by now.
    let mut open: BTreeSet<u64> = numbers.collect();
    open.retain(|file| Path::new(&format!("/proc/self/fd/{file}")).is_symlink());
    open
}

/// The least `ulimit -n` under which `more` files can be opened where `open` are: it limits their numbers,
/// and each gets the lowest one that is free.
fn limit_with_room(open: &BTreeSet<u64>, more: u64) -> u64 {
    let mut free = (0..).filter(|number| !open.contains(number));
    free.nth(more as usize - 1).expect("numbers do not end") + 1
}

fn files(needed: u64, limit: Option<u64>) -> Finding {
    match limit {
        Some(limit) if limit < needed => Finding::no(
            "files",
            format!("{limit} may be open, and a run has up to {needed}"),
            format!(
                "raise it: `ulimit -n {}`",
                needed.next_power_of_two().max(1024)
            ),
        ),
        Some(limit) => Finding::ok(
            "files",
            format!("{limit} may be open, and a run has up to {needed}"),
        ),
        None => Finding::ok("files", "any number may be open"),
    }
}

/// What `/proc/self/status` says of signals.
fn signals(status: &str) -> Finding {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let is_ignored =
        |signal: &(i32, &str)| ignored.is_some_and(|mask| mask >> (signal.0 - 1) & 1 == 1);
    let ignored: Vec<&str> = [
        (libc::SIGINT, "SIGINT (Ctrl-C)"),
        (libc::SIGTERM, "SIGTERM"),
        (libc::SIGHUP, "SIGHUP"),
    ]
    .iter()
    .filter(|signal| is_ignored(signal))
    .map(|signal| signal.1)
    .collect();
    match ignored[..] {
        [] => Finding::ok(
            "signals",
            "SIGINT, SIGTERM and SIGHUP end a run with its report",
        ),
        // The program was started with the signal ignored, as `nohup` does: that is meant so.
        _ => Finding::ok(
            "signals",
            format!(
                "ignored, as whoever started this asked for: {}",
                ignored.join(", ")
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::super::Grade;
    use super::*;

    #[test]
    fn few_mappings_are_worse_and_hardly_any_are_no() {
        let graded = |limit| mappings(&MappingBudget::with_limit(limit));
        let usual = graded(63_530);
        assert_eq!(usual.grade, Grade::Ok);
        assert!(usual.found.contains("248 MiB"), "{usual:?}");
        assert_eq!(graded(6_000).grade, Grade::Worse);
        assert_eq!(graded(500).grade, Grade::Worse, "the payload takes 400");
        assert_eq!(graded(399).grade, Grade::No);
    }

    #[test]
    fn threads_are_really_started() {
        start_threads(6).unwrap();
        assert_eq!(threads(6, Ok(())).grade, Grade::Ok);
        let refused = threads(6, Err(io::Error::from_raw_os_error(libc::EAGAIN)));
        assert_eq!(refused.grade, Grade::No);
    }

    #[test]
    fn files_that_are_open_already_are_counted() {
        let inherited = BTreeSet::from([0, 1, 2, 5, 251]);
        assert_eq!(limit_with_room(&inherited, 1), 4);
        assert_eq!(limit_with_room(&inherited, 2), 5);
        assert_eq!(limit_with_room(&inherited, 3), 7, "5 is not free");
        let (ours, _theirs) = io::pipe().unwrap();
        let number = ours.as_raw_fd() as u64;
        assert!(open_files().contains(&number));
    }

    #[test]
    fn files_are_counted() {
        assert_eq!(files(28, Some(8)).grade, Grade::No);
        assert_eq!(files(28, Some(1024)).grade, Grade::Ok);
        assert_eq!(files(28, None).grade, Grade::Ok);
    }

    #[test]
    fn signals_that_cannot_come_are_told() {
        let ignored = |mask| format!("SigQ:\t0/0\nSigIgn:\t{mask}\n");
        let fine = signals(&ignored("0000000000001000"));
        assert!(fine.found.contains("end a run with its report"), "{fine:?}");
        let nohup = signals(&ignored("0000000000000003"));
        assert!(
            nohup.found.ends_with("SIGINT (Ctrl-C), SIGHUP"),
            "{nohup:?}"
        );
        assert_eq!((fine.grade, nohup.grade), (Grade::Ok, Grade::Ok));
        assert_eq!(signals("").grade, Grade::Ok);
    }
}
