//! `vmm fork`: a guest and clones of it, all running, through the program.

#![expect(unsafe_code, reason = "sets a limit between fork and exec")]

mod support;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, setrlimit};
use serde_json::Value;

use crate::support::{stderr, stdout, times};

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("fork").args(args);
    command
}

/// Small machines that live shortly, where a host is not slow.
const SHORT: [&str; 6] = ["--memory", "32M", "--warm-up", "300ms", "--duration", "2s"];

fn vmm(args: &[&str]) -> Output {
    let mut command = command(&SHORT);
    command
        .args(args)
        .output()
        .expect("the program can be started")
}

/// Runs `command`, and reads the report that it writes.
fn report(args: &[&str]) -> (Output, Value) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("fork.json");
    let mut command = command(&SHORT);
    let output = command.args(args).arg("--report").arg(&path).output();
    let output = output.expect("the program can be started");
    let json = std::fs::read(&path).unwrap_or_else(|error| panic!("{error}: {}", stderr(&output)));
    (output, serde_json::from_slice(&json).expect("JSON"))
}

fn assert_good(output: &Output, report: &Value, machines: u64) {
    let said = || format!("{}\n{}", stdout(output), stderr(output));
    assert_eq!(output.status.code(), Some(0), "{}", said());
    assert_eq!(report["verdict"], "ok");
    assert_eq!(report["error"], Value::Null);
    let members = report["machines"].as_array().expect("machines");
    assert_eq!(members.len() as u64, machines, "{}", said());
    for (id, member) in members.iter().enumerate() {
        assert_eq!(member["id"], id);
        assert!(member["ops"].as_u64() > Some(0), "machine {id}: {}", said());
    }
    // To the frame.
    let shares = &report["shares"];
    assert_eq!(shares["unexplained_bytes"], 0, "{}", said());
    let holders = shares["holders"].as_array().expect("holders");
    let alone = |holder: &Value| holder["alone_bytes"].as_u64().expect("bytes");
    assert!(holders.iter().map(alone).sum::<u64>() > 0, "{}", said());
    // One of each at the end, at least, of those that were there.
    let (taken, checked) = (&report["snapshots"], &report["checked"]);
    assert_eq!(taken, checked, "{}", said());
    assert!(taken.as_u64() >= Some(machines * 2 / 3), "{}", said());
}

#[test]
fn clones_run_beside_their_parent_and_all_are_right() {
    if support::no_kvm() {
        return;
    }
    for pattern in ["hot", "uniform", "dense", "sparse"] {
        let (output, report) = report(&["-n", "3", "--pattern", pattern, "--vcpus", "2"]);
        assert_good(&output, &report, 4);
        let parents = report["machines"].as_array().expect("machines").iter();
        let parents: Vec<_> = parents.map(|member| member["parent"].as_u64()).collect();
        assert_eq!(parents, [None, Some(0), Some(0), Some(0)]);
        assert_eq!(report["forking"]["clones"], 3);
    }
}

#[test]
fn clones_of_clones_are_right_too() {
    if support::no_kvm() {
        return;
    }
    let (output, report) = report(&["--depth", "3", "--width", "2"]);
    assert_good(&output, &report, 15);
    let depths = report["machines"].as_array().expect("machines").iter();
    let mut depths: Vec<_> = depths
        .map(|member| member["depth"].as_u64().unwrap())
        .collect();
    depths.sort_unstable();
    assert_eq!(depths, [0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]);
}

#[test]
fn rules_that_are_wrong_are_caught_in_a_family() {
    if support::no_kvm() {
        return;
    }
    for wrong in [
        ["--inject", "reuse-shared"],
        ["--inject", "share-pinned"],
        ["--inject", "same-generation"],
        ["--policy", "mapcount"],
    ] {
        // What shows is a matter of who is faster.
        let caught = (0..times(5)).any(|seed| {
            let output = vmm(&[&wrong[..], &["-n", "2", "--seed", &seed.to_string()]].concat());
            let code = output.status.code();
            // A guest whose memory is wrong may crash first.
            assert!(matches!(code, Some(0 | 1 | 3)), "{}", stderr(&output));
            code == Some(3)
        });
        assert!(caught, "{wrong:?}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason() {
    for (flags, code, why) in [
        (
            &["-n", "0"][..],
            2,
            "--clones 0: a family has at least 1 clone",
        ),
        (&["--depth", "0"], 2, "--depth 0: "),
        (&["--depth", "2", "--width", "0"], 2, "--width 0: "),
        (&["-n", "1024"], 2, "at most 1024 machines"),
        (&["--depth", "99"], 2, "at most 1024 machines"),
        (&["-n", "2", "--depth", "2"], 2, "cannot be used with"),
        (&["--width", "2"], 2, "--depth"),
        (&["--vcpus", "257"], 2, "--vcpus 257: "),
        (&["--inject", "stale-page"], 2, "reuse-shared, share-pinned"),
        (&["--keep", "0"], 2, "--keep 0"),
        (&["--accel", "user"], 1, "clones need KVM"),
        (&["--report", "/no/such/dir/x.json"], 1, "--report"),
    ] {
        let output = vmm(flags);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {said}");
        assert!(said.contains(why), "{flags:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

/// Clones that write all of their memory and may have a part of it: each ends alone, with a reason.
#[test]
fn a_clone_that_needs_more_than_its_quota_ends_alone() {
    if support::no_kvm() {
        return;
    }
    let few = ["-n", "3", "--quota", "4M", "--pattern", "dense"];
    let (output, report) = report(&few);
    let said = || format!("{}\n{}", stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(1), "{}", said());
    let error = report["error"].as_str().expect("an error");
    for machine in 1..=3 {
        let ended = |line: &str| {
            line.starts_with(&format!(
                "machine {machine} (--quota is what a clone may have): "
            )) && line
                .ends_with("out of quota: all 1024 frames that the account may have are in use")
        };
        assert_eq!(error.lines().filter(|l| ended(l)).count(), 1, "{}", said());
    }
    let ended = error.lines().filter(|line| line.starts_with("machine "));
    assert_eq!(ended.count(), 3, "the root goes on: {}", said());
    assert_eq!(report["ended_by"], "duration");
    let violations = report["violations"].as_object().expect("violations");
    assert!(violations.values().all(|count| count == 0), "{}", said());
    assert_eq!(report["shares"]["unexplained_bytes"], 0);
}

#[test]
fn where_memory_ends_the_next_clone_is_refused_and_nobody_else() {
    if support::no_kvm() {
        return;
    }
    let mut command = command(&SHORT);
    command.args(["-n", "20", "--keep", "1", "--seed", "3"]);
    // Addresses for all, and memory for some: 21 machines of 32 MiB, and 300 MiB.
    let most = (21 * 32 + 300) << 20;
    let limit = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    // SAFETY: between fork and exec, it calls one function that may be called there.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::Fsize, limit)?));
    }
    let output = command.output().expect("the program can be started");
    let (said, told) = (stdout(&output), stderr(&output));
    assert_eq!(output.status.code(), Some(1), "{said}\n{told}");
    let first = said.lines().next().unwrap_or_default();
    assert!(
        first.starts_with("could not finish: clone "),
        "{said}\n{told}"
    );
    assert!(
        first.contains(" was refused: cannot promise 32 MiB: "),
        "{first}"
    );
    let row = |name: &str| {
        said.lines()
            .find(|line| line.starts_with(name))
            .expect("a row")
    };
    let violations = row("violations");
    assert!(
        !violations.contains(|c: char| c.is_ascii_digit() && c != '0'),
        "{violations}"
    );
    let clones = row("forking").split_whitespace().nth(1).expect("a number");
    assert!(
        (1..20).contains(&clones.parse::<u64>().expect("a number")),
        "{said}"
    );
}

#[test]
fn ctrl_c_ends_a_family_with_its_report() {
    if support::no_kvm() {
        return;
    }
    let mut child = command(&["--memory", "32M", "-n", "3", "--duration", "10m"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program can be started");
    let mut errors = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    // It says so every two seconds.
    while !line.contains("all run") {
        line.clear();
        let read = errors.read_line(&mut line).expect("text");
        assert_ne!(read, 0, "it has ended");
    }
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::INT).expect("it runs");
    let mut rest = String::new();
    errors.read_to_string(&mut rest).expect("text");
    let mut said = String::new();
    child
        .stdout
        .take()
        .expect("piped")
        .read_to_string(&mut said)
        .expect("text");
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(0), "{said}\n{rest}");
    assert!(said.starts_with("ok: 4 machines, "), "{said}");
    assert!(said.contains("ended early by Ctrl-C or a signal"), "{said}");
}

/// Builds without debug assertions refuse nothing.
#[test]
fn system_calls_that_are_refused_end_a_machine_or_a_clone_and_break_no_promise() {
    if support::no_kvm() || !cfg!(debug_assertions) {
        return;
    }
    for seed in 0..times(6) {
        let output = command(&SHORT)
            .args(["-n", "4", "--seed", "5"])
            .env("PALIMPSEST_REFUSE", format!("400:{seed}"))
            .output()
            .expect("the program can be started");
        let said = format!("{}\n{}", stdout(&output), stderr(&output));
        assert!(matches!(output.status.code(), Some(0 | 1)), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}
