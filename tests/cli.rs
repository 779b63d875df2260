//! The `vmm` program as a person or a script meets it: exit codes, refusals, the report, signals.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, PipeWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use guest::Misbehaviour;
use palimpsest::host::Limits;
use rustix::fs::{CWD, Mode, OFlags, fcntl_getfl, fcntl_setfl, mkfifoat};
use rustix::process::{Pid, Signal, getuid, kill_process};
use serde_json::Value;
use support::program::{program, talker};
use support::{PATIENCE, no_kvm, say, within};
use vmm::session::config::Injection;

/// Far below the length of the run that is asked for: a program that takes longer has started it.
const AT_ONCE: Duration = Duration::from_secs(30);
/// So long that a run of it only ends if something ends it.
const FOR_EVER: [&str; 2] = ["--duration", "1h"];
/// The same, and by KVM alone.
const BY_KVM_FOR_EVER: [&str; 4] = ["--accel", "kvm", "--duration", "1h"];
/// A run that is over soon.
const SHORT: [&str; 6] = [
    "--snapshots",
    "10",
    "--snapshot-every",
    "5ms",
    "--memory",
    "32M",
];

fn vmm() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// What a program has said and how it ended.
#[derive(Debug)]
struct Said {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Said {
    /// Fails the test unless the program ended with exit code `code`, and not by a panic.
    #[track_caller]
    fn assert_code(&self, code: i32) {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}

/// Kills a program when its test fails: nobody else would end it.
struct KillOnPanic(Pid);

impl Drop for KillOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            // It may have ended.
            let _ = kill_process(self.0, Signal::KILL);
        }
    }
}

/// Runs `command`, which must be over within `time`.
#[track_caller]
fn said_within(time: Duration, mut command: Command) -> Said {
    let child = command.spawn().unwrap();
    let guard = KillOnPanic(Pid::from_child(&child));
    let output = within(time, move || child.wait_with_output()).unwrap();
    drop(guard);
    Said {
        status: output.status,
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// What `vmm` says to `args`.
#[track_caller]
fn run(args: &[&str]) -> Said {
    let mut command = vmm();
    command.args(args);
    said_within(PATIENCE, command)
}

/// The same where no run may be started: it would be an endless one.
#[track_caller]
fn run_refused(args: &[&str]) -> Said {
    let mut command = vmm();
    // Last, and given once: what is tested may not be about the length.
    command.args(args).args(FOR_EVER);
    let said = said_within(AT_ONCE, command);
    assert_eq!(said.stdout, "", "the report's place: {said:?}");
    assert!(
        !said.stderr.contains("guest: "),
        "a guest was started: {said:?}"
    );
    said
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The names in a directory, sorted.
fn names(directory: &Path) -> Vec<String> {
    let mut names = Vec::from_iter(
        fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap()),
    );
    names.sort();
    names
}

/// The misbehaving guest as a file.
fn misbehaving_guest(directory: &Path) -> String {
    let path = directory.join("misbehave");
    fs::write(&path, guest::MISBEHAVE).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn help_says_what_there_is() {
    let said = run(&["--help"]);
    said.assert_code(0);
    for flag in [
        "--guest",
        "--memory",
        "--vcpus",
        "--duration",
        "--snapshots",
        "--snapshot-every",
        "--keep",
        "--restore-every",
        "--dma-devices",
        "--registered-buffers",
        "--pattern",
        "--seed",
        "--report",
        "--track-dirty",
        "--policy",
        "--inject",
        "-v, --verbose",
    ] {
        assert!(said.stdout.contains(flag), "{flag}");
    }
    for fault in Injection::ALL {
        assert!(said.stdout.contains(fault.name()), "{fault}");
    }
    for line in [
        "0  every snapshot taken was right",
        "1  the run could not start or finish, the guest crashed, or nothing was checked",
        "2  the command line makes no sense",
        "3  an oracle found a violation",
    ] {
        assert!(said.stdout.contains(line), "{line}");
    }
    let version = run(&["--version"]);
    version.assert_code(0);
    assert_eq!(
        version.stdout,
        format!("vmm {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn nonsense_is_refused_with_the_limit_named() {
    let refusals: &[(&[&str], &str)] = &[
        (&["--vcpus", "0"], "--vcpus 0: a guest has 1 to 256 vCPUs"),
        (
            &["--vcpus", "257"],
            "--vcpus 257: a guest has 1 to 256 vCPUs",
        ),
        (
            &["--vcpus", "256", "--memory", "64M"],
            "--memory 64 MiB: a guest of this shape needs at least 540 MiB (--vcpus 256",
        ),
        (&["--vcpus=-1"], "invalid value '-1' for '--vcpus <N>'"),
        (&["--vcpus", "two"], "invalid digit"),
        (
            &["--memory", "3K"],
            "--memory 3 KiB: a guest of this shape needs at least 12 MiB",
        ),
        (&["--memory", "0"], "needs at least 12 MiB"),
        (
            &["--memory", "33554433"],
            "--memory 33554433 B: must be a multiple of 4 KiB",
        ),
        (
            &["--memory", "65T"],
            "--memory 65 TiB: a guest has at most 64 TiB",
        ),
        (&["--memory", "99999999999T"], "is too large"),
        (&["--memory", "lots"], "must be a number and a unit"),
        (
            &["--dma-devices", "9"],
            "--dma-devices 9: a guest has at most 8 devices",
        ),
        (
            &["--registered-buffers", "17"],
            "--registered-buffers 17: a device registers at most 16 buffers",
        ),
        (
            &["--snapshot-every", "0s"],
            "--snapshot-every 0: must be more than zero",
        ),
        (
            &["--snapshot-every", "400000h"],
            "--snapshot-every: must be at most 365 days",
        ),
        (&["--snapshot-every", "20"], "write 20us, 20ms, 20s"),
        (
            &["--keep", "0"],
            "--keep 0: at least 1 snapshot must be kept",
        ),
        (
            &["--pattern", "zigzag"],
            "[possible values: dense, uniform, hot, sparse]",
        ),
        (&["--inject", "gremlins"], "share-pinned"),
        (
            &["--track-dirty", "0ms"],
            "--track-dirty 0: must be more than zero",
        ),
        (
            &["--inject", "forget-dirty"],
            "this fault needs --track-dirty",
        ),
        (
            &["--policy", "hope"],
            "[possible values: mapcount, mapcount-forced-break, refcount, seed, seed-recompute, exclusive]",
        ),
        (
            &["--policy", "refcount", "--inject", "share-pinned"],
            "this is a fault of --policy exclusive, and cannot be put into refcount",
        ),
        (
            &["--inject", "leak-pin", "--dma-devices", "0"],
            "this fault needs --dma-devices 1 or more",
        ),
        (
            &["--inject", "stale-page", "--restore-every", "0"],
            "this fault needs --restore-every 1 or more",
        ),
        (&["--guest", ""], "must be payload, or a path"),
        (&["--snapshots", "9"], "cannot be used with"),
        (&["--no-such-flag"], "unexpected argument '--no-such-flag'"),
        (&["stray"], "unrecognized subcommand 'stray'"),
    ];
    for (args, expected) in refusals {
        let said = run_refused(args);
        said.assert_code(2);
        assert!(said.stderr.contains(expected), "{args:?}: {said:?}");
    }
    let said = run(&["--snapshots", "0"]);
    said.assert_code(2);
    assert!(
        said.stderr
            .contains("--snapshots 0: must be more than zero"),
        "{said:?}"
    );
}

#[test]
fn more_memory_than_the_host_has_is_refused() {
    let available = Limits::detect().unwrap().memory().left;
    let asked = (available >> 30) + 8;
    // And the most that a guest may have, twice of which no host has.
    for (given, named) in [
        (format!("{asked}G"), format!("{asked} GiB")),
        ("64T".into(), "64 TiB".into()),
    ] {
        let said = run_refused(&["--memory", &given]);
        said.assert_code(1);
        let expected = format!("--memory {named}: this run needs ");
        assert!(said.stderr.contains(&expected), "{said:?}");
        assert!(said.stderr.contains("(guest "), "{said:?}");
        assert!(said.stderr.contains("hint: "), "{said:?}");
    }
}

#[test]
fn a_guest_that_cannot_be_read_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let missing = format!("{path}/missing.elf");
    for (guest, why) in [
        (missing.as_str(), "No such file or directory"),
        (path, "is a directory"),
        ("/dev/zero", "is a device, not a file"),
    ] {
        let said = run_refused(&["--guest", guest]);
        said.assert_code(1);
        let expected = format!("error: --guest {guest}: cannot read: {why}");
        assert!(said.stderr.contains(&expected), "{said:?}");
        assert!(
            said.stderr.contains("hint: --guest takes `payload`"),
            "{said:?}"
        );
    }
}

#[test]
fn a_file_that_is_no_guest_is_an_error_that_says_why() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    for (bytes, why) in [
        (b"".as_slice(), "not an ELF file"),
        (b"garbage", "not an ELF file"),
        (&guest::PAYLOAD[..1000], "truncated ELF file"),
    ] {
        fs::write(&path, bytes).unwrap();
        let said = run_refused(&["--guest", path.to_str().unwrap()]);
        said.assert_code(1);
        let expected = format!("error: --guest {}: cannot load it: {why}", path.display());
        assert!(said.stderr.contains(&expected), "{said:?}");
    }
}

#[test]
fn a_good_run_exits_with_0_and_says_so() {
    if no_kvm() {
        return;
    }
    let said = run(&[&SHORT[..], &["--seed", "77"]].concat());
    said.assert_code(0);
    assert!(
        said.stdout
            .starts_with("ok: 10 snapshots taken, every one checked bit for bit, no violation\n"),
        "{said:?}"
    );
    assert!(
        said.stdout
            .contains("seed        77 (repeat with --seed 77)\n"),
        "{said:?}"
    );
    assert!(
        said.stderr.contains(": seed 77\n"),
        "a run that is killed has a seed, too: {said:?}"
    );
    // Neither is a terminal.
    assert!(
        !said.stdout.contains('\x1b') && !said.stderr.contains('\x1b'),
        "{said:?}"
    );
}

#[test]
fn a_trace_has_a_row_for_each_thread_and_every_step_of_every_snapshot() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("trace.json");
    let trace = ["--restore-every", "5", "--trace", path.to_str().unwrap()];
    let said = run(&[&SHORT[..], &trace].concat());
    said.assert_code(0);
    assert_eq!(names(directory.path()), ["trace.json"]);
    let trace = json(&path);
    let events = trace["traceEvents"].as_array().unwrap();
    let rows = events.iter().filter(|event| event["ph"] == "M");
    let rows = Vec::from_iter(rows.map(|row| row["args"]["name"].as_str().unwrap()));
    for row in ["main", "vcpu0", "vcpu1", "checker"] {
        assert!(rows.contains(&row), "{row}: {rows:?}");
    }
    let named = |name: &str| events.iter().filter(|e| e["name"] == name).count();
    for step in ["snapshot", "fork", "registers", "first look", "last look"] {
        assert_eq!(named(step), 10, "{step}");
    }
    assert_eq!(named("restore"), 2);
    // A pause each for the snapshots, the restores, and to see that the guest follows the formula.
    assert!(named("parked") >= 2 * (10 + 2), "{}", named("parked"));
    let times = events.iter().filter(|event| event["ph"] == "X");
    assert!(
        times
            .into_iter()
            .all(|e| e["dur"].as_f64() >= Some(0.0) && e["ts"].is_f64())
    );
}

#[test]
fn a_violation_exits_with_3_and_shows_what_was_seen() {
    if no_kvm() {
        return;
    }
    // Accounting needs no race to see its fault.
    let said = run(&[&SHORT[..], &["--inject", "leak-pin"]].concat());
    said.assert_code(3);
    assert!(
        said.stdout
            .starts_with("VIOLATED: 1 violation in 10 snapshots\n"),
        "{said:?}"
    );
    assert!(
        said.stdout.contains("leak-pin: caught by accounting\n"),
        "{said:?}"
    );
    let seen = said
        .stderr
        .split_once("violation of accounting: ")
        .unwrap()
        .1;
    for line in ["\n  expected ", "\n  found ", "\n  frame "] {
        assert!(seen.contains(line), "{line}: {said:?}");
    }
}

#[test]
fn a_crashed_guest_exits_with_1_and_shows_its_registers() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let guest = misbehaving_guest(directory.path());
    let report = directory.path().join("report.json");
    let seed = (Misbehaviour::InvalidOpcode as u64).to_string();
    let mut args = vec![
        "--guest",
        &guest,
        "--seed",
        &seed,
        "--report",
        report.to_str().unwrap(),
    ];
    args.extend(FOR_EVER);
    let said = run(&args);
    said.assert_code(1);
    assert!(
        said.stdout
            .starts_with("could not finish: vcpu 0: guest crashed: "),
        "{said:?}"
    );
    let report = json(&report);
    // With SVM nothing is left of where it was.
    let svm = report["platform"]["kvm"] == "svm";
    let shown = said.stdout.contains("\n  rip 0") && said.stdout.contains("\n  code at rip: 0f 0b");
    let told = said.stdout.contains("where it was this host does not tell");
    assert!(if svm { told } else { shown }, "{said:?}");
    assert_eq!(report["verdict"], "error");
    assert_eq!(report["ended_by"], "guest crash");
    assert_eq!(report["violations"]["accounting"], 0);
}

#[test]
fn a_guest_that_spins_does_not_hold_the_program_up() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let guest = misbehaving_guest(directory.path());
    let seed = (Misbehaviour::Spin as u64).to_string();
    let said = run(&[
        "--guest",
        &guest,
        "--seed",
        &seed,
        "--duration",
        "500ms",
        "--memory",
        "32M",
    ]);
    said.assert_code(0);
}

/// The kind of every value in `json`, by its path.
fn kinds(json: &Value, path: &str, kinds: &mut BTreeMap<String, &'static str>) {
    let kind = match json {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::String(_) => "text",
        Value::Number(number) if number.is_u64() => "count",
        Value::Number(_) => "number",
        Value::Array(_) => "array",
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                self::kinds(value, &path, kinds);
            }
            return;
        }
    };
    kinds.insert(path.to_owned(), kind);
}

/// Scripts read this: keys are added, never renamed or removed, and keep their type.
#[test]
fn the_json_report_has_these_keys_and_types() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    let report = path.to_str().unwrap();
    // Long enough for the guest to have felt a snapshot, however busy the host is.
    let felt = ["1500ms", "6s", "30s"].into_iter().find_map(|duration| {
        let args = ["--duration", duration, "--memory", "32M", "--seed", "5"];
        run(&[&args[..], &["--report", report]].concat()).assert_code(0);
        Some(json(&path)).filter(|report| !report["stall_us"]["max"].is_null())
    });
    let report = felt.expect("a snapshot that the guest has felt");
    let mut found = BTreeMap::new();
    kinds(&report, "", &mut found);
    let expected = [
        ("checked_draws", "count"),
        ("checked_pages", "count"),
        ("checkpoints", "null"),
        ("config.accel", "text"),
        ("config.copy_ahead", "bool"),
        ("config.dma_devices", "count"),
        ("config.dump_guest_memory", "bool"),
        ("config.guest", "text"),
        ("config.inject", "null"),
        ("config.keep", "count"),
        ("config.length.duration_s", "number"),
        ("config.memory_bytes", "count"),
        ("config.page_size", "text"),
        ("config.pattern", "text"),
        ("config.policy", "text"),
        ("config.registered_buffers", "count"),
        ("config.restore_every", "count"),
        ("config.seed", "count"),
        ("config.snapshot_every_s", "number"),
        ("config.track_dirty_s", "null"),
        ("config.trust_guest", "bool"),
        ("config.vcpus", "count"),
        ("dirty.pages", "count"),
        ("dirty.rounds", "count"),
        ("dma.bytes", "count"),
        ("dma.from_guest", "count"),
        ("dma.to_guest", "count"),
        ("duration_s", "number"),
        ("ended_by", "text"),
        ("error", "null"),
        ("faults.ahead", "count"),
        ("faults.by_all", "count"),
        ("faults.by_event", "count"),
        ("faults.by_kvm", "count"),
        ("faults.by_operand", "count"),
        ("faults.by_region", "count"),
        ("faults.by_signal", "count"),
        ("faults.by_walk", "count"),
        ("faults.copied", "count"),
        ("faults.eager_copied", "count"),
        ("faults.emulated", "count"),
        ("faults.neighbours", "count"),
        ("faults.reused", "count"),
        ("faults.split", "count"),
        ("faults.unshared", "count"),
        ("faults.whole", "count"),
        ("faults.zero_filled", "count"),
        ("guest.ops", "count"),
        ("guest.ops_per_s", "number"),
        ("lines_lost", "count"),
        ("loaded", "null"),
        ("memory.bytes_peak", "count"),
        ("memory.committed_peak", "count"),
        ("memory.frames_peak", "count"),
        ("memory.vmas_limit", "count"),
        ("memory.vmas_peak", "count"),
        ("pause_us.max", "number"),
        ("pause_us.p50", "number"),
        ("pause_us.p99", "number"),
        ("pins.fast", "count"),
        ("pins.registered", "count"),
        ("pins.slow", "count"),
        ("platform.accel", "text"),
        ("platform.cpus", "count"),
        ("platform.kernel", "text"),
        ("platform.kvm", "text"),
        ("platform.paging", "text"),
        ("policy", "text"),
        ("saved", "null"),
        ("snapshots.checked", "count"),
        ("snapshots.dropped", "count"),
        ("snapshots.in_flight", "count"),
        ("snapshots.restored", "count"),
        ("snapshots.taken", "count"),
        ("stall_us.max", "number"),
        ("stall_us.p50", "number"),
        ("stall_us.p99", "number"),
        ("steps_us.devices.max", "number"),
        ("steps_us.devices.p50", "number"),
        ("steps_us.devices.p99", "number"),
        ("steps_us.fork.max", "number"),
        ("steps_us.fork.p50", "number"),
        ("steps_us.fork.p99", "number"),
        ("steps_us.park.max", "number"),
        ("steps_us.park.p50", "number"),
        ("steps_us.park.p99", "number"),
        ("steps_us.prepare.max", "number"),
        ("steps_us.prepare.p50", "number"),
        ("steps_us.prepare.p99", "number"),
        ("steps_us.registers.max", "number"),
        ("steps_us.registers.p50", "number"),
        ("steps_us.registers.p99", "number"),
        ("steps_us.resume.max", "number"),
        ("steps_us.resume.p50", "number"),
        ("steps_us.resume.p99", "number"),
        ("unchecked", "array"),
        ("verdict", "text"),
        ("version", "text"),
        ("violations.accounting", "count"),
        ("violations.coherence", "count"),
        ("violations.cut", "count"),
        ("violations.identity", "count"),
        ("violations.isolation", "count"),
        ("violations.life", "count"),
        ("violations.tracking", "count"),
    ];
    assert_eq!(
        found,
        expected.map(|(path, kind)| (path.to_owned(), kind)).into()
    );
    assert_eq!(report["verdict"], "ok");
    assert_eq!(report["ended_by"], "duration");
    assert_eq!(report["config"]["seed"], 5);
    assert_eq!(report["config"]["memory_bytes"], 32 << 20);
    assert_eq!(report["snapshots"]["checked"], report["snapshots"]["taken"]);
    assert_eq!(names(directory.path()), ["report.json"]);
}

#[test]
fn a_report_that_cannot_be_written_is_found_before_the_run() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    for (report, why) in [
        (path.to_owned(), "is a directory"),
        (format!("{path}/no/report.json"), "there is no directory"),
        ("/proc/report.json".to_owned(), "cannot write"),
    ] {
        for flag in ["--report", "--trace"] {
            let said = run_refused(&[flag, &report]);
            said.assert_code(1);
            let expected = format!("error: {flag} {report}: {why}");
            assert!(said.stderr.contains(&expected), "{said:?}");
        }
    }
    assert_eq!(names(directory.path()), Vec::<String>::new());
}

#[test]
fn a_file_is_not_both_report_and_trace() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name| directory.path().join(name).to_str().unwrap().to_owned();
    std::os::unix::fs::symlink("one", at("link")).unwrap();
    for (report, trace) in [("one", "one"), ("one", "link"), ("link", "one")] {
        let said = run_refused(&["--report", &at(report), "--trace", &at(trace)]);
        said.assert_code(2);
        assert!(said.stderr.contains("one file cannot be both"), "{said:?}");
    }
    fs::write(at("one"), "").unwrap();
    fs::hard_link(at("one"), at("other")).unwrap();
    run_refused(&["--report", &at("one"), "--trace", &at("other")]).assert_code(2);
}

#[test]
fn a_run_that_is_killed_leaves_the_old_report_whole() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    fs::write(&path, "old").unwrap();
    let mut started = Started::new(&["--report", path.to_str().unwrap()], Stdio::piped());
    started.wait_for("guest: payload: ");
    started.signal(Signal::KILL);
    assert_eq!(started.end().signal(), Some(Signal::KILL.as_raw()));
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    assert_eq!(names(directory.path()), ["report.json"]);
}

/// A run without an end, followed by what it says on standard error.
struct Started {
    child: Child,
    stderr: Receiver<String>,
    heard: String,
}

impl Started {
    fn new(args: &[&str], stdout: Stdio) -> Self {
        let mut command = vmm();
        command.stdout(stdout);
        Self::of(command, args)
    }

    /// By way of `command`.
    fn of(mut command: Command, args: &[&str]) -> Self {
        command
            .args(args)
            .args(["--memory", "32M"])
            .args(FOR_EVER)
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (sender, stderr) = mpsc::channel();
        // Ends with the program.
        thread::spawn(move || {
            lines
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self {
            child,
            stderr,
            heard: String::new(),
        }
    }

    /// Waits for a line with `text` in it.
    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.stderr.recv_timeout(left) else {
                panic!("no {text:?} in {:?}", self.heard);
            };
            self.heard.push_str(&line);
            self.heard.push('\n');
            if line.contains(text) {
                return;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end. It is the test's to bring that about.
    #[track_caller]
    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.heard
                    .extend(self.stderr.iter().map(|line| line + "\n"));
                assert!(!self.heard.contains("panicked"), "{}", self.heard);
                return status;
            }
            assert!(Instant::now() < deadline, "does not end: {}", self.heard);
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// What it has printed, to its end. Standard output must be a pipe, and all that was printed fit in it.
    fn screen(&mut self) -> String {
        let mut screen = String::new();
        let stdout = self.child.stdout.as_mut().unwrap();
        stdout.read_to_string(&mut screen).unwrap();
        screen
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // Of a test that has failed. A child that has ended is not there to be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn one_signal_ends_the_run_early_with_its_report() {
    if no_kvm() {
        return;
    }
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.json");
        let mut started = Started::new(&["--report", path.to_str().unwrap()], Stdio::piped());
        // Not the first line about how it goes, if there was no snapshot by then.
        started.wait_for(" snapshots, ");
        while started
            .heard
            .lines()
            .last()
            .unwrap()
            .contains(" 0 snapshots, ")
        {
            started.wait_for(" snapshots, ");
        }
        started.signal(signal);
        let status = started.end();
        assert_eq!(status.code(), Some(0), "{}", started.heard);
        let stdout = started.screen();
        assert!(
            stdout.starts_with("ok: ") && stdout.contains("ended early by Ctrl-C"),
            "{stdout}"
        );
        let report = json(&path);
        assert_eq!(report["verdict"], "ok");
        assert_eq!(report["ended_by"], "ctrl-c");
        assert_eq!(report["violations"]["accounting"], 0);
        assert!(report["snapshots"]["taken"].as_u64() > Some(0));
        assert_eq!(report["snapshots"]["checked"], report["snapshots"]["taken"]);
    }
}

/// A pipe with no room left, so that whoever prints to it waits. The reader must be kept.
fn full_pipe() -> (io::PipeReader, PipeWriter) {
    let (reader, mut writer) = io::pipe().unwrap();
    let flags = fcntl_getfl(&writer).unwrap();
    fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
    while writer.write(&[b' '; 4096]).is_ok() {}
    while writer.write(b" ").is_ok() {}
    fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

#[test]
fn a_second_signal_kills() {
    if no_kvm() {
        return;
    }
    // It cannot print its report, and so would not end soon after the first.
    let (_reader, writer) = full_pipe();
    let mut started = Started::new(&[], writer.into());
    started.wait_for("guest: payload: ");
    started.signal(Signal::INT);
    // Else the second one might find the first one pending, and they would be one.
    started.wait_for("Ctrl-C again kills");
    assert_eq!(
        started.child.try_wait().unwrap(),
        None,
        "the first one does not kill"
    );
    started.signal(Signal::INT);
    assert_eq!(started.end().signal(), Some(Signal::INT.as_raw()));
}

#[test]
fn nobody_who_listens_is_no_reason_to_panic() {
    if no_kvm() {
        return;
    }
    // A pipe to a program that has ended, as `| head` leaves it.
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut command = vmm();
    command.args(SHORT).stdout(writer);
    said_within(PATIENCE, command).assert_code(0);

    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut command = vmm();
    command.args(SHORT).stderr(writer);
    let said = said_within(PATIENCE, command);
    said.assert_code(0);
    assert!(said.stdout.starts_with("ok: "), "{said:?}");

    // Standard streams that are not there at all.
    let mut command = Command::new("sh");
    let script = r#"exec "$0" "$@" >&- 2>&- <&-"#;
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_vmm")])
        .args(SHORT);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    said_within(PATIENCE, command).assert_code(0);
}

#[test]
fn a_report_that_cannot_be_printed_is_an_error() {
    if no_kvm() {
        return;
    }
    let mut command = vmm();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    command.args(SHORT).stdout(full);
    let said = said_within(PATIENCE, command);
    said.assert_code(1);
    assert!(
        said.stderr
            .contains("error: cannot print the report: No space left"),
        "{said:?}"
    );
}

#[test]
fn two_runs_at_once_do_not_disturb_each_other() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let runs = ["one", "two"].map(|name| {
        let path = directory.path().join(name);
        let mut command = vmm();
        command
            .args(["--snapshots", "100", "--memory", "64M", "--report"])
            .arg(&path);
        (path, thread::spawn(move || said_within(PATIENCE, command)))
    });
    for (path, run) in runs {
        run.join().unwrap().assert_code(0);
        let report = json(&path);
        assert_eq!(report["verdict"], "ok");
        assert_eq!(report["snapshots"]["checked"], 100);
    }
}

#[test]
fn four_gibibytes_run() {
    if no_kvm() {
        return;
    }
    let available = Limits::detect().unwrap().memory().left;
    if available < 5 << 30 {
        return say("skipped: this host has less than 5 GiB available");
    }
    let said = run(&["--memory", "4G", "--snapshots", "8"]);
    said.assert_code(0);
    assert!(said.stdout.contains("4 GiB"), "{said:?}");
}

#[test]
fn without_permission_for_kvm_the_program_says_what_to_do() {
    if !getuid().is_root() {
        return say("skipped: only root can become somebody else");
    }
    let Ok(kvm) = fs::metadata("/dev/kvm") else {
        return say("skipped: no /dev/kvm");
    };
    if kvm.permissions().mode() & 0o006 != 0 {
        return say("skipped: everybody may open /dev/kvm");
    }
    // Where everybody can execute it, wherever this was built.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let path = directory.path().join("vmm");
    fs::copy(env!("CARGO_BIN_EXE_vmm"), &path).unwrap();
    const NOBODY: u32 = 65534;
    let mut command = Command::new(&path);
    // Also drops the supplementary groups of root.
    command
        .uid(NOBODY)
        .gid(NOBODY)
        .args(["--accel", "kvm"])
        .args(FOR_EVER);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    match command.spawn() {
        Ok(mut child) => drop((child.kill(), child.wait())),
        Err(error) => return say(&format!("skipped: cannot run it as nobody: {error}")),
    }
    let said = said_within(AT_ONCE, command);
    said.assert_code(1);
    assert!(
        said.stderr.contains("no permission to open /dev/kvm"),
        "{said:?}"
    );
    assert!(said.stderr.contains("usermod -aG kvm"), "{said:?}");
    assert_eq!(said.stdout, "");
}

/// `vmm` in a mount namespace of its own, in which `script` was run before: what it mounts nobody else sees,
/// and it is gone with it.
fn in_a_namespace(script: &str) -> Command {
    let mut unshare = Command::new("unshare");
    let script = format!("{script} && exec \"$0\" \"$@\"");
    unshare.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    unshare.arg(env!("CARGO_BIN_EXE_vmm"));
    unshare
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    unshare
}

/// Whether the test must be skipped for want of such namespaces, which is said then.
fn no_namespaces() -> bool {
    let mut command = in_a_namespace("mount -t tmpfs none /mnt");
    let can = command
        .arg("--version")
        .status()
        .is_ok_and(|status| status.success());
    if !can {
        say("skipped: cannot mount in a namespace");
    }
    !can
}

/// The kernel's limit is where it always is, but the program believes in another.
#[test]
fn a_kernel_that_has_no_more_mappings_ends_the_run_with_the_reason() {
    if no_kvm() || no_namespaces() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let limit = directory.path().join("limit");
    fs::write(&limit, "100000000\n").unwrap();
    let mount = "mount --bind \"$LIMIT\" /proc/sys/vm/max_map_count";
    let mut command = in_a_namespace(mount);
    command.env("LIMIT", &limit);
    // More pages than it has mappings for, each of which takes one.
    command.args("--memory 1G --page-size 4K --snapshot-every 10ms --duration 100s".split(' '));
    let said = said_within(PATIENCE, command);
    said.assert_code(1);
    let reason = said.stdout.lines().next().unwrap_or_default();
    assert!(reason.starts_with("could not finish: "), "{said:?}");
    assert!(
        reason.contains("mappings: raise vm.max_map_count"),
        "{reason}"
    );
    assert!(!reason.contains("99998000"), "{reason}");
    assert!(said.stdout.contains("isolation 0, coherence 0"), "{said:?}");
}

/// Runs `command`, which must refuse at once.
#[track_caller]
fn said_refused(mut command: Command, args: &[&str]) -> Said {
    command.args(args);
    let said = said_within(AT_ONCE, command);
    said.assert_code(1);
    said
}

#[test]
fn without_kvm_the_program_says_what_to_do() {
    if no_namespaces() {
        return;
    }
    let hidden = || in_a_namespace("mount -t tmpfs none /dev");
    let said = said_refused(hidden(), &BY_KVM_FOR_EVER);
    assert!(
        said.stderr.contains("no /dev/kvm: load the kvm module"),
        "{said:?}"
    );
    assert!(said.stderr.contains("hint: `vmm doctor` says"), "{said:?}");
    assert_eq!(said.stdout, "");
    let mut doctor = hidden();
    doctor.arg("doctor");
    let said = said_within(AT_ONCE, doctor);
    // It runs all the same: without KVM.
    said.assert_code(0);
    assert!(
        said.stdout.contains("\nworse  kvm        no /dev/kvm\n"),
        "{said:?}"
    );
    assert!(said.stdout.contains("-> load the kvm module"), "{said:?}");
    assert!(
        said.stdout
            .contains("\nok     user       guests can run without KVM"),
        "{said:?}"
    );
}

#[test]
fn without_kvm_the_main_job_runs_and_says_so() {
    if no_namespaces() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("report.json");
    // As in a container: no /dev/kvm, nothing in /sys, and /proc as it is for others to read.
    let mut hidden = in_a_namespace(
        "mount -t tmpfs none /dev && mount -t tmpfs none /sys && mount -t proc -o ro none /proc",
    );
    hidden.args(SHORT).arg("--report").arg(&report);
    let said = said_within(PATIENCE, hidden);
    said.assert_code(0);
    let why = "threads of this process (user), isolated from nothing in it: no /dev/kvm: load ";
    assert!(said.stderr.contains(why), "{said:?}");
    assert!(
        said.stdout.starts_with("ok: 10 snapshots taken"),
        "{said:?}"
    );
    let row = "\nplatform    threads of this process (no KVM, no isolation), Linux ";
    assert!(said.stdout.contains(row), "{said:?}");
    let report = json(&report);
    assert_eq!(report["config"]["accel"], "auto");
    assert_eq!(report["platform"]["accel"], "user");
    assert_eq!(report["platform"]["kvm"], "none");
}

#[test]
fn a_program_that_nobody_trusts_does_not_run_without_kvm() {
    let directory = tempfile::tempdir().unwrap();
    let guest = misbehaving_guest(directory.path());
    let seed = (Misbehaviour::Bye as u64).to_string();
    let args = ["--accel", "user", "--guest", &guest, "--seed", &seed];
    let said = run_refused(&args);
    said.assert_code(2);
    let what_to_do = "if you trust this program, say --trust-guest";
    assert!(said.stderr.contains(what_to_do), "{said:?}");
    let said = run(&[&args[..], &["--trust-guest"], &FOR_EVER].concat());
    assert!(said.stderr.contains("guest: bye"), "{said:?}");
    assert!(said.stdout.contains("until the guest exited"), "{said:?}");
}

#[test]
fn a_scenario_is_played_on_vcpus_without_kvm() {
    for (policy, verdict) in [("exclusive", "verdict: ok"), ("mapcount", "verdict: LEAK")] {
        let told = [
            "compare",
            "--scenario",
            "B1",
            "--accel",
            "user",
            "--policy",
            policy,
        ];
        let said = run(&told);
        said.assert_code(0);
        assert!(
            said.stdout.contains("on a real vCPU without KVM"),
            "{said:?}"
        );
        assert!(said.stdout.contains(verdict), "{said:?}");
    }
}

#[test]
fn what_is_not_kvm_is_said_to_be_that() {
    if no_namespaces() {
        return;
    }
    for (made, what) in [
        ("touch /dev/kvm", "a regular file"),
        ("mkdir /dev/kvm", "a directory"),
        ("mknod /dev/kvm c 1 3", "another device"),
    ] {
        let other = || in_a_namespace(&format!("mount -t tmpfs none /dev && {made}"));
        let said = said_refused(other(), &BY_KVM_FOR_EVER);
        let expected = format!("error: /dev/kvm is {what}, and not the device of KVM");
        assert!(said.stderr.contains(&expected), "{said:?}");
        let mut doctor = other();
        doctor.arg("doctor");
        let said = said_within(AT_ONCE, doctor);
        said.assert_code(0);
        assert!(
            said.stdout.contains(&format!("/dev/kvm is {what}")),
            "{said:?}"
        );
    }
}

#[test]
fn the_doctor_says_that_a_run_can_go_where_one_does() {
    if no_kvm() {
        return;
    }
    let said = run(&["doctor"]);
    said.assert_code(0);
    assert!(said.stdout.ends_with("\n`vmm` can run here.\n"), "{said:?}");
    assert!(!said.stdout.contains('\x1b'), "{said:?}");
    let said = run(&["doctor", "--json"]);
    said.assert_code(0);
    let json: Value = serde_json::from_str(&said.stdout).unwrap();
    assert_eq!(json["can_run"], true);
    let names = Vec::from_iter(
        json["findings"]
            .as_array()
            .unwrap()
            .iter()
            .map(|f| &f["name"]),
    );
    for name in [
        "kvm",
        "registers",
        "cpus",
        "memory",
        "huge pages",
        "mappings",
        "signals",
    ] {
        assert!(names.contains(&&Value::from(name)), "{name}: {names:?}");
    }
    for finding in json["findings"].as_array().unwrap() {
        assert!(
            ["ok", "worse"].contains(&finding["grade"].as_str().unwrap()),
            "{finding}"
        );
    }
}

/// `vmm` on a host that says that it has `mib` MiB of memory to give.
fn on_a_host_of(mib: u64, directory: &Path) -> Command {
    let meminfo = directory.join("meminfo");
    fs::write(&meminfo, format!("MemAvailable: {} kB\n", mib << 10)).unwrap();
    in_a_namespace(&format!("mount --bind {} /proc/meminfo", meminfo.display()))
}

#[test]
fn a_host_with_too_little_memory_refuses_with_the_numbers() {
    if no_namespaces() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = on_a_host_of(100, directory.path());
    command.args(["--memory", "64M"]).args(FOR_EVER);
    let said = said_within(AT_ONCE, command);
    said.assert_code(1);
    for part in [
        "error: --memory 64 MiB: this run needs ",
        "(guest 64 MiB, copies for one snapshot 68 MiB, tables ",
        "and this host leaves it 90 MiB",
        "hint: `vmm doctor` says",
    ] {
        assert!(said.stderr.contains(part), "{part}: {said:?}");
    }
    let mut command = on_a_host_of(100, directory.path());
    command.arg("doctor");
    let said = said_within(AT_ONCE, command);
    said.assert_code(1);
    assert!(said.stdout.contains("-> run with --memory "), "{said:?}");
}

#[test]
fn a_host_with_little_memory_drops_snapshots_and_goes_on() {
    if no_kvm() || no_namespaces() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("report.json");
    let command = on_a_host_of(115, directory.path());
    let mut started = Started::of(command, &["--report", report.to_str().unwrap()]);
    started.wait_for("snapshots go early to make room");
    // It goes on: these come only as long as the guest runs.
    started.wait_for(" snapshots, ");
    started.wait_for(" snapshots, ");
    started.signal(Signal::INT);
    assert_eq!(started.end().code(), Some(0), "{}", started.heard);
    let screen = started.screen();
    let early = " early, to make room for the guest's writes\n";
    assert!(screen.contains(early), "{screen}");
    let report = json(&report);
    let snapshots = &report["snapshots"];
    assert!(snapshots["dropped"].as_u64() > Some(0), "{report}");
    assert!(snapshots["checked"].as_u64() > Some(0), "{report}");
}

#[test]
fn limits_of_a_shell_are_named_and_not_run_into() {
    let limited = |limit: &str, args: &[&str]| {
        let mut command = Command::new("sh");
        let script = format!("ulimit {limit} && exec \"$0\" \"$@\"");
        command
            .args(["-c", &script, env!("CARGO_BIN_EXE_vmm")])
            .args(args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        said_within(AT_ONCE, command)
    };
    for (limit, name) in [
        ("-f 2000", "RLIMIT_FSIZE (ulimit -f)"),
        ("-v 400000", "RLIMIT_AS (ulimit -v)"),
        ("-d 10000", "RLIMIT_DATA (ulimit -d)"),
    ] {
        let said = limited(limit, &FOR_EVER);
        said.assert_code(1);
        assert!(said.stderr.contains(name), "{said:?}");
        assert!(said.stderr.contains("needs "), "{said:?}");
    }
    if no_kvm() {
        return;
    }
    let said = limited("-n 8", &["compare", "--scenario", "A1"]);
    said.assert_code(1);
    assert!(said.stderr.contains("Too many open files"), "{said:?}");
}

/// `doctor` says how many files a run has, and so many are enough. One of them is open now and then only, and
/// some runs do without.
#[test]
fn a_run_has_no_more_files_than_the_doctor_says() {
    if no_kvm() {
        return;
    }
    let mut doctor = vmm();
    doctor.arg("doctor");
    let said = said_within(AT_ONCE, doctor);
    let text = said.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    let (_, number) = text.split_once("and a run has up to ").unwrap();
    let number: u64 = number.split(' ').next().unwrap().parse().unwrap();
    let run = |files| {
        let mut command = Command::new("sh");
        let script = format!("ulimit -n {files} && exec \"$0\" \"$@\"");
        command
            .args(["-c", &script, env!("CARGO_BIN_EXE_vmm")])
            .args(["--snapshots", "2", "--memory", "64M"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        said_within(PATIENCE, command)
    };
    run(number).assert_code(0);
    run(number - 2).assert_code(1);
}

#[test]
fn no_number_of_snapshots_to_keep_is_too_large() {
    if no_kvm() {
        return;
    }
    let most = usize::MAX.to_string();
    run(&[&SHORT[..], &["--keep", &most]].concat()).assert_code(0);
}

#[test]
fn a_run_that_checked_nothing_is_not_ok() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("report.json");
    let said = run(&[
        "--duration",
        "10ms",
        "--snapshot-every",
        "1h",
        "--memory",
        "32M",
        "--report",
        report.to_str().unwrap(),
    ]);
    said.assert_code(1);
    assert!(
        said.stdout
            .starts_with("nothing checked: no snapshot was taken: run for longer (--duration)"),
        "{said:?}"
    );
    let report = json(&report);
    assert_eq!(report["verdict"], "nothing-checked");
    assert_eq!(report["unchecked"].as_array().unwrap().len(), 1);
    assert_eq!(report["error"], Value::Null);
}

#[test]
fn a_fault_that_no_foreign_guest_shows_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let guest = misbehaving_guest(directory.path());
    for fault in ["late-registers", "reuse-shared"] {
        let said = run_refused(&["--guest", &guest, "--inject", fault]);
        said.assert_code(2);
        let why = "only --guest payload can show this fault";
        assert!(said.stderr.contains(why), "{said:?}");
    }
}

/// What a fault needs is done when the time is over, however seldom it was asked for; and a run that somebody
/// ends before is not a good one.
#[test]
fn a_fault_has_its_occasion_or_the_run_is_not_ok() {
    if no_kvm() {
        return;
    }
    let seldom = ["--snapshot-every", "1h", "--inject"];
    let short = ["reuse-shared", "--duration", "200ms", "--memory", "32M"];
    let said = run(&[&seldom[..], &short].concat());
    said.assert_code(3);
    let goes_on = "goes on until the injected reuse-shared has had its occasion";
    assert!(said.stderr.contains(goes_on), "{said:?}");

    let args = [&seldom[..], &["stale-page"]].concat();
    let mut started = Started::new(&args, Stdio::piped());
    started.wait_for(" snapshots, ");
    started.signal(Signal::INT);
    assert_eq!(started.end().code(), Some(1), "{}", started.heard);
    let screen = started.screen();
    let ended = "the run was ended before life could catch the injected stale-page";
    assert!(screen.starts_with("nothing checked: "), "{screen}");
    assert!(screen.contains(ended), "{screen}");
}

/// Scenarios need next to nothing: the race's guests are what a small host has no room for.
#[test]
fn scenarios_are_played_where_there_is_no_room_for_the_race() {
    if no_kvm() || no_namespaces() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = on_a_host_of(100, directory.path());
    command.args(["compare", "--no-race"]);
    said_within(PATIENCE, command).assert_code(0);
    let mut command = on_a_host_of(100, directory.path());
    command.arg("compare");
    let said = said_within(AT_ONCE, command);
    said.assert_code(1);
    assert!(said.stderr.contains("this run needs "), "{said:?}");
}

#[test]
fn a_guest_is_read_from_a_file_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    mkfifoat(CWD, &pipe, Mode::from_raw_mode(0o600)).unwrap();
    let pipe = pipe.to_str().unwrap();
    let mut guests = vec![(pipe, "cannot read: is a pipe, not a file")];
    if !no_kvm() {
        // As root it could be read, and that would wait for the kernel to say something.
        guests.push(("/proc/kmsg", "cannot load it: not an ELF file"));
    }
    for (guest, why) in guests {
        let said = run_refused(&["--guest", guest]);
        said.assert_code(1);
        let expected = format!("error: --guest {guest}: {why}");
        assert!(said.stderr.contains(&expected), "{said:?}");
    }
}

/// A guest that talks without end, to somebody who does not read.
#[test]
fn a_run_ends_on_time_though_nobody_reads_what_it_says() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (guest, report) = (
        directory.path().join("talker"),
        directory.path().join("report.json"),
    );
    fs::write(&guest, talker()).unwrap();
    let (_reader, writer) = full_pipe();
    let mut command = vmm();
    command
        .arg("--guest")
        .arg(&guest)
        .args([
            "--duration",
            "2s",
            "--snapshot-every",
            "5ms",
            "--memory",
            "32M",
        ])
        .stderr(writer);
    command.arg("--report").arg(&report);
    let said = said_within(PATIENCE, command);
    said.assert_code(0);
    let lost = json(&report)["lines_lost"].as_u64().unwrap();
    assert!(lost > 0, "{said:?}");
    assert!(said.stdout.contains("\noutput      "), "{said:?}");
}

/// As `nohup` starts programs, and a shell those in the background.
#[test]
fn a_signal_that_was_ignored_stays_ignored() {
    if no_kvm() {
        return;
    }
    let mut shell = Command::new("sh");
    let script = "trap '' HUP TERM; exec \"$0\" \"$@\"";
    shell.args(["-c", script, env!("CARGO_BIN_EXE_vmm")]);
    shell.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut started = Started::of(shell, &[]);
    started.wait_for(" snapshots, ");
    started.signal(Signal::HUP);
    started.signal(Signal::TERM);
    // Twice: had they been heard, the second of these lines would not come.
    started.wait_for(" snapshots, ");
    started.wait_for(" snapshots, ");
    assert!(!started.heard.contains("stopping"), "{}", started.heard);
    started.signal(Signal::INT);
    assert_eq!(started.end().code(), Some(0), "{}", started.heard);
}

#[test]
fn a_report_goes_to_what_a_descriptor_is_open_on() {
    if no_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out");
    let mut command = vmm();
    let out = fs::File::create(&path).unwrap();
    command
        .args(SHORT)
        .args(["--report", "/dev/stdout"])
        .stdout(out);
    said_within(PATIENCE, command).assert_code(0);
    // Both are there, one after the other.
    let text = fs::read_to_string(&path).unwrap();
    let (screen, report) = text.split_at(text.find("\n{").unwrap());
    assert!(screen.starts_with("ok: 10 snapshots taken"), "{text}");
    let report: Value = serde_json::from_str(report).unwrap();
    assert_eq!(report["verdict"], "ok");
    assert_eq!(names(directory.path()), ["out"]);

    let said = run(&[&SHORT[..], &["--report", "/dev/stderr"]].concat());
    said.assert_code(0);
    assert!(said.stderr.contains("\n  \"verdict\": \"ok\","), "{said:?}");
}

/// The flags that `/proc/PID/smaps` gives the mappings of guest memory.
fn flags_of_guest_memory(pid: u32) -> Vec<String> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut is_guests = false;
    let mut flags = Vec::new();
    for line in maps.lines() {
        if let Some(found) = line.strip_prefix("VmFlags: ") {
            if is_guests {
                flags.push(found.to_owned());
            }
        } else if line
            .split(' ')
            .next()
            .is_some_and(|word| !word.ends_with(':'))
        {
            // The addresses of the next mapping, and its name.
            is_guests = line.contains("palimpsest-frames");
        }
    }
    flags
}

/// Descriptors of process `pid` that programs inherit which it starts, by number.
fn descriptors_left_to_children(pid: &str) -> Vec<u32> {
    let files = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let left = |file: fs::DirEntry| {
        // It may have been closed by now.
        let info = fs::read_to_string(file.path()).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
        let number = file.file_name().to_str()?.parse().ok()?;
        (flags & OFlags::CLOEXEC.bits() == 0).then_some(number)
    };
    files.filter_map(|file| left(file.unwrap())).collect()
}

#[test]
fn guest_memory_is_kept_from_children_and_core_dumps() {
    if no_kvm() {
        return;
    }
    // The program has these from us, and we from whoever started us.
    let inherited = descriptors_left_to_children("self");
    for (args, dumped) in [(&[][..], false), (&["--dump-guest-memory"], true)] {
        let mut started = Started::new(args, Stdio::piped());
        started.wait_for(" snapshots, ");
        let pid = started.child.id();
        let mappings = flags_of_guest_memory(pid);
        // The physmap, and more than one of the window.
        assert!(mappings.len() > 2, "{mappings:?}");
        for flags in mappings {
            let has = |flag| flags.split(' ').any(|word| word == flag);
            assert!(has("dc"), "inherited by a child: {flags}");
            assert_eq!(has("dd"), !dumped, "in a core dump: {flags}");
        }
        let mut left = descriptors_left_to_children(&pid.to_string());
        left.retain(|number| *number > 2 && !inherited.contains(number));
        assert_eq!(left, [0; 0]);
        started.signal(Signal::INT);
        assert_eq!(started.end().code(), Some(0), "{}", started.heard);
    }
}

#[test]
fn a_program_whose_notes_are_nonsense_runs() {
    if no_kvm() {
        return;
    }
    // jmp $
    let mut file = program(b"\xeb\xfe");
    // A program header more: a note that is all beyond the end of the file.
    let segment = file[64..120].to_vec();
    file[56] = 2;
    let end = file.len() as u64;
    file[32..40].copy_from_slice(&end.to_le_bytes());
    file.extend(segment);
    file.extend([4, 0, 0, 0]);
    file.extend([0xff; 52]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notes");
    fs::write(&path, file).unwrap();
    run(&[&SHORT[..], &["--guest", path.to_str().unwrap()]].concat()).assert_code(0);
}

/// By builds with debug assertions, which this one is unless it is measured.
#[test]
fn a_run_whose_system_calls_are_refused_ends_well_or_says_why() {
    if no_kvm() || !cfg!(debug_assertions) {
        return;
    }
    let (mut failed, mut snapshots) = (0, 0);
    for refused in ["40:1", "200:2", "1000:4", "5000:6"] {
        let mut command = vmm();
        command
            .env("PALIMPSEST_REFUSE", refused)
            .args([
                "--memory",
                "32M",
                "--snapshots",
                "20",
                "--restore-every",
                "2",
            ])
            .args(["--snapshot-every", "10ms", "--keep", "2"]);
        let said = said_within(PATIENCE, command);
        if said.status.code() == Some(0) {
            snapshots += 1;
            continue;
        }
        said.assert_code(1);
        let all = said.stdout.clone() + &said.stderr;
        let why = ["memory mappings", "Cannot allocate memory", "No space left"];
        assert!(why.iter().any(|why| all.contains(why)), "{said:?}");
        failed += 1;
    }
    assert!(
        failed > 0,
        "nothing was refused: {snapshots} runs ended well"
    );
}
