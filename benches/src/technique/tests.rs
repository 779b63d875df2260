//! On real KVM: a technique that does not keep memory as it was is not a baseline.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{PAGE_SIZE, Pattern};
use palimpsest::kvm::{Kvm, PlatformError};
use palimpsest::user::User;
use palimpsest::vm::Accelerator;

use super::{Kind, TechniqueError};
use crate::alone::beside_others;
use crate::vm::{BenchVm, GuestConfig};

const MEMORY: u64 = 32 << 20;
const SWEEP: u64 = 8 << 20;
/// Pages of that.
const SWEPT: usize = (SWEEP / PAGE_SIZE) as usize;

/// KVM, or nothing where the test must be skipped for want of it, which is said then.
pub(crate) fn kvm() -> Option<Kvm> {
    match Kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error @ (PlatformError::Missing | PlatformError::Permission)) => {
            let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
            assert!(!ci, "CI must have KVM: {error}");
            say("skipped: no /dev/kvm");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Says something although the test will pass: the test harness swallows what is merely printed.
fn say(text: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    // Whoever does not listen misses it.
    let _ = writeln!(std::io::stderr(), "{name}: {text}");
}

/// The hash of every page that `read` gives.
fn hashes(mut read: impl FnMut(u64, &mut [u8])) -> Vec<u64> {
    let mut page = [0; PAGE_SIZE as usize];
    (0..MEMORY)
        .step_by(PAGE_SIZE as usize)
        .map(|gpa| {
            read(gpa, &mut page);
            let mut hasher = DefaultHasher::new();
            hasher.write(&page);
            hasher.finish()
        })
        .collect()
}

/// What runs the guest of `kind`, or nothing where the test must be skipped, which is said then.
fn accelerator(kind: Kind) -> Option<Accelerator> {
    if kind.needs_kvm() {
        kvm().map(Accelerator::Kvm)
    } else {
        Some(Accelerator::User(User::open().unwrap()))
    }
}

/// Takes a few snapshots of a guest that writes all the while, and holds each against what memory was.
fn keeps_memory(kind: Kind, dma: bool) {
    let Some(accelerator) = accelerator(kind) else {
        return;
    };
    let _beside = beside_others();
    let technique = match kind.start(MEMORY) {
        Err(TechniqueError::Unavailable { why }) => return say(&format!("skipped: {why}")),
        started => started.unwrap(),
    };
    let config = GuestConfig {
        memory: MEMORY,
        vcpus: 2,
        pattern: Pattern::Uniform,
        sweep: SWEEP,
        hot: 0,
        cold_every: 2,
        dma,
    };
    let vm = BenchVm::boot((&accelerator).into(), technique, &config).unwrap();
    let stop = AtomicBool::new(false);
    vm.wait("touching its memory", &stop, |_, vcpu| Ok(vcpu.laps > 0))
        .unwrap();
    for _ in 0..3 {
        let mut then = Vec::new();
        let snapshot = vm
            .snapshot_and(|ram| then = hashes(|gpa, page| ram.read(gpa, page).unwrap()))
            .unwrap();
        let (at, device_pages) = (snapshot.at.clone(), vm.device_pages());
        vm.wait("a few sweeps", &stop, |vcpu, progress| {
            let dma_done = !dma || vm.device_pages() > device_pages + 2 * 128;
            Ok(dma_done && progress.laps > at[vcpu].laps + 2)
        })
        .unwrap();

        let now = hashes(|gpa, page| vm.ram().read(gpa, page).unwrap());
        let changed = then.iter().zip(&now).filter(|(then, now)| then != now);
        // Of the sweep each page was written; of a device's memory too.
        let expected = SWEPT + if dma { 128 } else { 0 };
        assert!(changed.count() >= expected, "{kind}: the guest ran on");

        let kept = hashes(|gpa, page| snapshot.memory.read(gpa, page).unwrap());
        let lost: Vec<usize> = (0..then.len()).filter(|&n| then[n] != kept[n]).collect();
        assert!(
            lost.is_empty(),
            "{kind}: {} pages of the snapshot are not what they were, page {:#x} is the first",
            lost.len(),
            lost[0]
        );
        drop(snapshot);
        vm.technique().settle().unwrap();
    }
    vm.check().unwrap();
}

/// Whoever asks for a page that the host's own fault handler gives must not hear that it is an error.
#[test]
fn memory_that_is_always_writable_says_so() {
    let _beside = beside_others();
    for kind in [Kind::Uffd, Kind::Copy, Kind::Fork] {
        let technique = match kind.start(MEMORY) {
            Err(TechniqueError::Unavailable { why }) => return say(&format!("skipped: {why}")),
            started => started.unwrap(),
        };
        let ram = technique.ram();
        let pages = MEMORY / PAGE_SIZE;
        assert!(!ram.write_fault(0).unwrap());
        assert!(!ram.write_fault(pages - 1).unwrap());
        for beyond in [pages, u64::MAX] {
            assert!(ram.write_fault(beyond).is_err(), "{kind}: {beyond:#x}");
        }
    }
}

#[test]
fn ours_keeps_memory() {
    keeps_memory(Kind::Ours, false);
    keeps_memory(Kind::Ours, true);
}

#[test]
fn ours_keeps_memory_without_kvm() {
    keeps_memory(Kind::OursUser, false);
    keeps_memory(Kind::OursUser, true);
}

#[test]
fn ours_held_to_4k_keeps_memory() {
    keeps_memory(Kind::Ours4k, false);
}

#[test]
fn ours_held_to_2m_keeps_memory() {
    keeps_memory(Kind::Ours2m, false);
}

#[test]
fn fork_keeps_memory() {
    keeps_memory(Kind::Fork, false);
    keeps_memory(Kind::Fork, true);
}

#[test]
fn fork_with_huge_pages_keeps_memory() {
    keeps_memory(Kind::ForkThp, false);
}

#[test]
fn userfaultfd_keeps_memory() {
    keeps_memory(Kind::Uffd, false);
    keeps_memory(Kind::Uffd, true);
}

#[test]
fn userfaultfd_with_huge_pages_keeps_memory() {
    keeps_memory(Kind::UffdThp, false);
}

#[test]
fn stop_and_copy_keeps_memory() {
    keeps_memory(Kind::Copy, false);
    keeps_memory(Kind::Copy, true);
}

#[test]
fn one_snapshot_lives_at_a_time() {
    let _beside = beside_others();
    for kind in [Kind::Uffd, Kind::Copy] {
        let technique = match kind.start(MEMORY) {
            Err(TechniqueError::Unavailable { why }) => return say(&format!("skipped: {why}")),
            started => started.unwrap(),
        };
        let first = technique.snapshot().unwrap();
        assert!(matches!(technique.snapshot(), Err(TechniqueError::Busy)));
        drop(first);
        drop(technique.snapshot().unwrap());
    }
}

#[test]
fn a_snapshot_that_is_a_process_ends_with_its_handle() {
    let _beside = beside_others();
    let technique = Kind::Fork.start(MEMORY).unwrap();
    let snapshot = technique.snapshot().unwrap();
    let process = PathBuf::from(format!("/proc/{}", snapshot.process().unwrap()));
    // It holds memory and nothing else: no pipe or VM stays open because of it.
    let files = || fs::read_dir(process.join("fd")).unwrap().count();
    let deadline = Instant::now() + Duration::from_secs(60);
    while files() > 0 {
        assert!(Instant::now() < deadline, "it still has files open");
        thread::sleep(Duration::from_millis(1));
    }
    drop(snapshot);
    assert!(!process.exists());
}

#[test]
fn techniques_have_names() {
    for kind in Kind::ALL {
        assert_eq!(kind.name().parse::<Kind>().unwrap(), kind);
    }
    let error = "xor".parse::<Kind>().unwrap_err().to_string();
    assert!(
        error.contains("ours, ours-user, ours-alone, ours-4k"),
        "{error}"
    );
}
