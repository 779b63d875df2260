//! A session in a program that lives on: when it is over, however it ended, the process is as it was.
//!
//! This test is alone in its binary: others would have threads and files of their own meanwhile.

mod support;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use guest::Misbehaviour;
use support::{PATIENCE, config, no_kvm, run, run_guest, run_until};
use vmm::session::config::{Config, RunLength};

/// What this process holds, once that `is_enough`, or in the end: a thread that was joined, or that only
/// reports a result, is in `/proc` a moment longer.
fn held_when(is_enough: impl Fn(Held) -> bool) -> Held {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let held = held();
        if is_enough(held) || Instant::now() > deadline {
            return held;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Threads, open files, and mappings of guest memory.
type Held = (usize, usize, usize);

/// What this process holds now.
fn held() -> Held {
    let count = |directory| fs::read_dir(directory).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let frames = maps
        .lines()
        .filter(|line| line.contains("palimpsest-frames"));
    (
        count("/proc/self/task"),
        count("/proc/self/fd"),
        frames.count(),
    )
}

#[test]
fn a_session_leaves_no_thread_file_or_mapping_behind() {
    if no_kvm() {
        return;
    }
    let short = || Config {
        length: RunLength::Snapshots(5),
        ..config()
    };
    let crash = || Config {
        seed: Misbehaviour::InvalidOpcode as u64,
        ..config()
    };
    let (threads, ..) = held();
    run(short()).assert_clean();
    // What is opened once and for all is open now. No thread is there once and for all.
    let before = held_when(|held| held.0 == threads);
    assert_eq!(before.0, threads, "threads");
    for _ in 0..3 {
        run(short()).assert_clean();
        run_until(config(), |seen| seen.now().snapshots >= 1).assert_clean();
        run_guest(crash(), guest::MISBEHAVE).unwrap();
        run_guest(short(), *b"not a guest").unwrap_err();
    }
    let after = held_when(|held| held == before);
    assert_eq!(after, before, "threads, files, mappings of frames");
}
