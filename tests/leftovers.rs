//! A session in a program that lives on: when it is over, however it ended, the process is as it was.
//!
//! This test is alone in its binary: others would have threads and files of their own meanwhile.

mod support;

use std::fs;
use std::thread;
use std::time::Duration;

use guest::Misbehaviour;
use palimpsest::session::config::{Config, RunLength};
use support::{config, no_kvm, run, run_and_stop, run_guest};

/// The least this process holds in a while: a thread that was joined, or that only reports a result, is in `/proc` a moment longer.
fn held() -> (usize, usize, usize) {
    (0..30)
        .map(|_| {
            thread::sleep(Duration::from_millis(10));
            held_now()
        })
        .min()
        .unwrap_or_default()
}

/// Threads, open files, and mappings of guest memory of this process.
fn held_now() -> (usize, usize, usize) {
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
    // What is opened once and for all is open then.
    run(short()).assert_clean();
    let before = held();
    for _ in 0..3 {
        run(short()).assert_clean();
        run_and_stop(config(), 1).assert_clean();
        run_guest(crash(), guest::MISBEHAVE).unwrap();
        run_guest(short(), *b"not a guest").unwrap_err();
    }
    assert_eq!(held(), before, "threads, files, mappings of frames");
}
