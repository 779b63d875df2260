//! `vmm compare`: real races and scenarios, through the program.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, geteuid, kill_process};

use crate::support::{stderr, stdout};

fn vmm(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmm"))
        .arg("compare")
        .args(args)
        .output()
        .expect("the program can be started")
}

/// Whether all that is not as expected is a race that was not caught.
fn is_only_missed(output: &Output) -> bool {
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let races = json["races"].as_array().expect("races");
    let seen = |race: &serde_json::Value, oracle: &serde_json::Value| {
        let oracle = oracle.as_str().expect("an oracle");
        race["report"]["violations"][oracle].as_u64() > Some(0)
    };
    let is_missed = |race: &serde_json::Value| {
        let must_show = race["must_show"].as_array().expect("oracles");
        !must_show.iter().all(|oracle| seen(race, oracle))
    };
    let right = races.iter().find(|race| race["policy"] == "exclusive");
    let is_right = right.is_some_and(|race| race["report"]["verdict"] == "ok");
    is_right && races.iter().any(is_missed)
}

#[test]
fn every_policy_behaves_as_its_table_says() {
    if support::no_kvm() {
        return;
    }
    // What the wrong ones must show is a race. If it was not seen, which a busy or slow host can bring about,
    // the run was too short; the program says so itself if it sees that.
    let compare = |duration| vmm(&["--json", "--duration", duration, "--seed", "7"]);
    let mut output = compare("4s");
    for longer in ["20s", "60s"] {
        if output.status.success() || !is_only_missed(&output) {
            break;
        }
        output = compare(longer);
    }
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}\n{}",
        stdout(&output),
        stderr(&output)
    );
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["as_expected"], true);
    let races = json["races"].as_array().expect("races");
    let of = |policy: &str, oracle: &str| {
        let race = races.iter().find(|r| r["policy"] == policy).expect(policy);
        race["report"]["violations"][oracle].as_u64().expect(oracle)
    };
    assert!(of("mapcount", "isolation") > 0);
    assert!(of("refcount", "coherence") > 0);
    assert_eq!(
        of("refcount", "isolation"),
        0,
        "refcount copies too much, never too little"
    );
    for oracle in [
        "cut",
        "isolation",
        "coherence",
        "life",
        "tracking",
        "identity",
        "accounting",
    ] {
        assert_eq!(of("exclusive", oracle), 0, "{oracle}");
    }
    // Wrong policies lose pages, never frames.
    for policy in [
        "mapcount",
        "mapcount-forced-break",
        "refcount",
        "seed",
        "seed-recompute",
    ] {
        assert_eq!(of(policy, "accounting"), 0, "{policy}");
    }
    let rows = json["scenarios"]["rows"].as_array().expect("rows");
    let b1 = rows.iter().find(|r| r["id"] == "B1").expect("B1");
    assert_eq!(b1["policies"][0]["outcome"]["played"]["verdict"], "leaked");
    assert_eq!(b1["kernel"]["played"]["verdict"], "ok");
}

/// A race that is over before there was a snapshot says nothing of any policy: it was not played.
#[test]
fn a_race_without_a_snapshot_ends_with_exit_code_1() {
    if support::no_kvm() {
        return;
    }
    let output = vmm(&["--duration", "1ms", "--seed", "7"]);
    let screen = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{screen}{}", stderr(&output));
    assert!(screen.contains("! did not finish"), "{screen}");
    assert!(!screen.contains("not caught"), "{screen}");
}

#[test]
fn the_race_can_be_left_out() {
    if support::no_kvm() {
        return;
    }
    let output = vmm(&["--no-race"]);
    let screen = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{screen}{}", stderr(&output));
    assert!(screen.starts_with("scenarios, on a real vCPU"), "{screen}");
    assert!(
        screen.ends_with("\nok: every policy behaved as its table says\n"),
        "{screen}"
    );
    assert!(!stderr(&output).contains("racing"), "{}", stderr(&output));

    // What the race would be is of no interest then.
    let output = vmm(&["--no-race", "--duration", "1s"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn ctrl_c_ends_it_with_what_there_is() {
    if support::no_kvm() {
        return;
    }
    let mut started = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["compare", "--duration", "60s"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program can be started");
    // It listens before it says what it does first.
    let mut said = BufReader::new(started.stderr.take().expect("a pipe"));
    let mut line = String::new();
    while !line.contains("racing under mapcount ") {
        line.clear();
        let read = said.read_line(&mut line).expect("text");
        assert_ne!(read, 0, "it ended before it raced");
    }
    let pid = Pid::from_raw(started.id().cast_signed()).expect("a process has a number");
    kill_process(pid, Signal::INT).expect("it runs still");
    let mut rest = String::new();
    said.read_to_string(&mut rest).expect("text");
    let output = started.wait_with_output().expect("it ends");
    let screen = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{screen}{rest}");
    assert!(screen.contains("\n  mapcount "), "{screen}");
    assert!(!screen.contains("\n  refcount "), "{screen}");
    assert!(
        screen.ends_with("\nnot finished: interrupted\n"),
        "{screen}"
    );
    assert!(!rest.contains("scenarios"), "{rest}");
}

#[test]
fn a_scenario_is_told_step_by_step_without_kvm() {
    let output = vmm(&["--scenario", "d1", "--policy", "mapcount", "--on", "soft"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let story = stdout(&output);
    for part in [
        "D1: a device holds a page over a fork",
        "  3  P forks: C is there",
        "P page 0   ro   frame 1    maps 2  gets 0  pins 1",
        "     ! hold 0",
        "verdict: DIV",
        "under: mapcount DIV, mapcount-forced-break DIV, refcount ok, seed ok, seed-recompute ok, \
         exclusive ok, kernel",
    ] {
        assert!(story.contains(part), "{part}\n{story}");
    }
}

#[test]
fn a_family_is_told_by_name() {
    for (args, parts) in [
        (
            &["--scenario", "L3", "--on", "soft"][..],
            &[
                "  3  P forks: C is there",
                "  5  C forks: G is there",
                "  6  C ends",
                "G page 1   rw   frame ",
                "verdict: ok, as it should be, 2 pages copied (as the table says)",
            ][..],
        ),
        (
            &["--scenario", "L4", "--on", "soft", "--policy", "mapcount"],
            &[
                "  3  P forks: D is there",
                "     ! hold 0 (a reader's hold of C's page 0) sees 3, which is D's, of page 0; it should see 1",
                "verdict: LEAK",
            ],
        ),
        (
            &["--scenario", "L16", "--on", "soft"],
            &["  6  a clone starts from S: D is there", "verdict: ok"],
        ),
        (
            &["--scenario", "L16", "--on", "kernel"],
            &["cannot be asked: a process has no frozen fork"],
        ),
        (
            &["--scenario", "L2", "--on", "kernel"],
            &["  3  C forks: G is there", "  4  P ends", "verdict: "],
        ),
    ] {
        let output = vmm(args);
        let story = stdout(&output);
        assert_eq!(output.status.code(), Some(0), "{story}{}", stderr(&output));
        for part in parts {
            assert!(story.contains(part), "{part}\n{story}");
        }
    }
}

#[test]
fn a_scenario_can_be_played_by_the_kernel() {
    let output = vmm(&["--scenario", "A1", "--on", "kernel"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("played by: Linux "));
    // What it cannot be asked is said, and is no failure.
    let output = vmm(&["--scenario", "S1", "--on", "kernel"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("cannot be asked: a process has no frozen fork"));
}

/// A registered buffer in a huge page locks all of it, and a user may lock a few MiB at most: what one
/// performer has locked must be given back before the next begins, and to be refused is no failure.
#[test]
fn a_scenario_can_be_played_by_the_kernel_for_a_user_who_may_lock_little_memory() {
    let place = tempfile::tempdir().expect("a directory for temporary files");
    let program = place.path().join("vmm");
    fs::copy(env!("CARGO_BIN_EXE_vmm"), &program).expect("room for a copy");
    for path in [place.path(), &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    }
    // KiB: no huge page, or two of them.
    for (may_lock, may_be_refused, times) in [("64", true, 1), ("4096", false, 8)] {
        for _ in 0..times {
            let mut command = Command::new("sh");
            command
                .args(["-c", "ulimit -l $0 || exit 99; exec \"$@\"", may_lock])
                .arg(&program)
                .args(["compare", "--scenario", "F4", "--on", "kernel"])
                .current_dir(&place);
            if geteuid().is_root() {
                // Root may lock what it likes.
                command.uid(65534).gid(65534);
            }
            let output = command.output().expect("there is a shell");
            let story = stdout(&output);
            if output.status.code() == Some(99) {
                support::say("skipped: less than that may be locked here");
                return;
            }
            assert_eq!(output.status.code(), Some(0), "{story}{}", stderr(&output));
            assert!(!story.contains("error"), "{story}");
            assert!(may_be_refused || !story.contains("ulimit -l"), "{story}");
        }
    }
}

#[test]
fn the_list_needs_nothing() {
    let output = vmm(&["--list"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("  B1   the child holds a page as a reader"));
    assert!(stdout(&output).contains("  L1   a parent and two clones write the same page\n"));
}

#[test]
fn mistakes_are_told_with_exit_code_2() {
    let output = vmm(&["--scenario", "Z9"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        stderr(&output),
        "error: --scenario Z9: there is none of that name\nhint: vmm compare --list has them all\n"
    );
    for args in [
        &["--policy", "mapcount"][..],
        &["--list", "--scenario", "A1"],
        &["--vcpus", "0"],
        &["--duration", "0s"],
    ] {
        let output = vmm(args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(stdout(&output).is_empty(), "{args:?}");
    }
}
