//! `vmm snapshot` on stores by URL, through the program: an S3 server on loopback, started here.

mod support;

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use palimpsest::kept::store::{Facts, Part, SaveOptions, Saving, SnapshotName, Store};
use rustix::process::{Pid, Signal, kill_process};
use s3_server::{BUCKET, Fault, Faults, Request, SECRET_KEY, Server, environment};
use serde_json::Value;
use vmm::accel::Accel;

use crate::support::{accel, no_kvm, stderr, stdout};

/// A directory for one test, and a server.
struct Place {
    dir: tempfile::TempDir,
    server: Server,
}

impl Place {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            server: Server::start(),
        }
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn path(&self, name: &str) -> String {
        self.store().join(name).display().to_string()
    }

    fn cache(&self) -> String {
        self.dir.path().join("cache").display().to_string()
    }

    /// A snapshot of no machine: a region of `seed`, and one that is the same in all.
    fn make(&self, name: &str, seed: u8) {
        let store = Store::open_or_create(&self.store()).unwrap();
        let name: SnapshotName = name.parse().unwrap();
        let saving = Saving::begin(&store, &name, 4 << 20, SaveOptions::default());
        let mut saving = saving.unwrap();
        saving.region(0, &vec![7; 2 << 20]).unwrap();
        saving.region(1, &vec![seed; 2 << 20]).unwrap();
        let part = Part {
            name: "vcpu/0".to_owned(),
            version: 1,
            bytes: vec![seed],
        };
        saving.finish(Facts::default(), &[part]).unwrap();
    }

    fn command(&self, endpoint: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command
            .arg("snapshot")
            .args(args)
            .envs(environment(endpoint));
        command.env("XDG_CACHE_HOME", self.dir.path().join("caches"));
        command
    }

    fn vmm(&self, args: &[&str]) -> Output {
        let output = self
            .command(&self.server.endpoint(), args)
            .output()
            .unwrap();
        assert!(!all(&output).contains(SECRET_KEY), "{}", all(&output));
        output
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.vmm(&[args, &["--json"]].concat());
        assert_exit(&output, 0);
        serde_json::from_str(&stdout(&output)).unwrap()
    }
}

fn url(path: &str) -> String {
    format!("s3://{BUCKET}/snaps{path}")
}

fn all(output: &Output) -> String {
    format!("{}\n{}", stdout(output), stderr(output))
}

#[track_caller]
fn assert_exit(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", all(output));
}

#[test]
fn what_is_pushed_is_looked_at_and_pulled_by_url() {
    let place = Place::new();
    place.make("warm", 1);
    place.make("other", 2);
    let pushed = place.json(&["push", &place.path("warm"), &url("")]);
    assert_eq!(
        (&pushed["sent"], &pushed["was_there"]),
        (&2.into(), &false.into())
    );
    let pushed = place.json(&["push", &place.path("other"), &url("/"), "--check"]);
    assert_eq!((&pushed["chunks"], &pushed["sent"]), (&2.into(), &1.into()));
    let again = place.vmm(&["push", &place.path("warm"), &url("")]);
    assert_exit(&again, 0);
    assert!(stdout(&again).contains("had it already"), "{}", all(&again));

    let listed = place.json(&["list", &url("")]);
    let names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| &entry["name"])
        .collect();
    assert_eq!(names, ["other", "warm"]);
    let info = place.vmm(&["info", &url("/warm")]);
    assert!(
        stdout(&info).contains(&format!("warm in {}", url(""))),
        "{}",
        all(&info)
    );
    for path in [url(""), url("/warm")] {
        assert_exit(&place.vmm(&["verify", &path]), 0);
    }
    // One of them by URL, and both.
    for other in [url("/other"), place.path("other")] {
        let diff = place.json(&["diff", &url("/warm"), &other]);
        assert_eq!(diff["regions"], Value::Array(vec![1.into()]));
    }

    let back = place.dir.path().join("back").display().to_string();
    let pulled = place.json(&["pull", &url("/warm"), &back, "--as", "again"]);
    assert_eq!(
        (&pulled["sent"], &pulled["hash"]),
        (&2.into(), &again_hash(&place))
    );
    let pulled = place.json(&["pull", &url("/other"), &back, "--zstd"]);
    assert_eq!(pulled["sent"], 1);
    assert_exit(&place.vmm(&["verify", &back]), 0);
    // From directory to directory, too.
    let third = place.dir.path().join("third").display().to_string();
    assert_eq!(
        place.json(&["push", &format!("{back}/again"), &third])["sent"],
        2
    );

    assert_exit(&place.vmm(&["prune", &url(""), "--drop", "warm"]), 0);
    assert_exit(&place.vmm(&["verify", &url("")]), 0);
    let gone = place.vmm(&["info", &url("/warm")]);
    assert_exit(&gone, 1);
    assert!(
        stderr(&gone).contains("has no snapshot `warm`"),
        "{}",
        all(&gone)
    );
}

fn again_hash(place: &Place) -> Value {
    let store = Store::open(&place.store()).unwrap();
    let kept = store.read(&"warm".parse().unwrap()).unwrap();
    kept.hash().to_string().into()
}

#[test]
fn what_is_not_done_by_url_is_refused_with_what_is() {
    let place = Place::new();
    place.make("warm", 1);
    place.make("other", 2);
    assert_exit(&place.vmm(&["push", &place.path("warm"), &url("")]), 0);
    let (warm, other, store, missing) = (url("/warm"), place.path("other"), url(""), url("/no"));
    let refusals: [(&[&str], i32, &str); 9] = [
        (&["save", &url("/new")], 2, "save to a directory, and push"),
        (&["prune", &store], 2, "an object store has no locks"),
        (
            &["prune", &store, "--drop", "no"],
            1,
            "has no snapshot `no`",
        ),
        (
            &["push", &other, &store, "--as", "warm"],
            2,
            "has a snapshot `warm` already",
        ),
        (&["verify", &missing], 1, "has no snapshot `no`"),
        (
            &["list", "ftp://bucket/snaps"],
            2,
            "nothing that is known here",
        ),
        (
            &["info", "s3://me:hush@bucket/warm"],
            2,
            "credentials are in the environment",
        ),
        (
            &["list", "s3://bucket/elsewhere"],
            1,
            "is no snapshot store",
        ),
        (
            &["pull", &warm, &store, "--as", "chunks"],
            2,
            "cannot be the name of a snapshot",
        ),
    ];
    for (args, code, said) in refusals {
        let output = place.vmm(args);
        assert_exit(&output, code);
        assert!(stderr(&output).contains(said), "{args:?}: {}", all(&output));
        assert!(!all(&output).contains("hush"), "{}", all(&output));
    }
    // Nobody has said that it may be reached without encryption.
    let mut command = place.command(&place.server.endpoint(), &["list", &store]);
    let output = command.env_remove("AWS_ALLOW_HTTP").output().unwrap();
    assert_exit(&output, 2);
    assert!(stderr(&output).contains("--allow-http"), "{}", all(&output));
    let mut command = place.command(&place.server.endpoint(), &["list", &store, "--allow-http"]);
    assert_exit(&command.env_remove("AWS_ALLOW_HTTP").output().unwrap(), 0);
    // There is no place for a cache.
    let mut command = place.command(&place.server.endpoint(), &["diff", &warm, &other]);
    command.env_remove("XDG_CACHE_HOME").env_remove("HOME");
    let output = command.output().unwrap();
    assert_exit(&output, 2);
    assert!(stderr(&output).contains("--cache"), "{}", all(&output));
    assert_exit(&command.args(["--cache-size", "0"]).output().unwrap(), 0);
}

/// Begins a push, and has it killed by `signal` when its `at`th request comes, which is never answered. `None` if there
/// are not so many.
fn killed(place: &Place, at: u64, signal: Signal) -> Option<Output> {
    let (came, has_come) = mpsc::channel();
    let faults = Faults::start(place.server.address(), move |request: &Request| {
        match request.number == at {
            true => {
                // Who has ended since does not listen.
                let _ = came.send(());
                Fault::Never
            }
            false => Fault::None,
        }
    });
    let args = ["push", &place.path("warm"), &url(""), "--at-once", "2"];
    let mut command = place.command(&faults.endpoint(), &args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child: Child = command.spawn().unwrap();
    loop {
        if has_come.recv_timeout(Duration::from_millis(20)).is_ok() {
            kill_process(Pid::from_child(&child), signal).unwrap();
            return Some(child.wait_with_output().unwrap());
        }
        if child.try_wait().unwrap().is_some() {
            assert_exit(&child.wait_with_output().unwrap(), 0);
            return None;
        }
    }
}

#[test]
fn a_push_that_is_killed_at_any_request_leaves_nothing_by_the_name_and_goes_on() {
    let place = Place::new();
    place.make("warm", 1);
    let manifest = place.server.file("snaps/warm/snapshot.json");
    let mut sent = Vec::new();
    for at in 0.. {
        let Some(output) = killed(&place, at, Signal::KILL) else {
            assert!(at > 12, "{at}: that is too few requests");
            break;
        };
        assert_eq!(output.status.code(), None);
        if manifest.exists() {
            assert_exit(&place.vmm(&["verify", &url("/warm")]), 0);
        }
        let again = place.json(&["push", &place.path("warm"), &url("")]);
        sent.push(again["sent"].as_u64().unwrap());
        assert_exit(&place.vmm(&["verify", &url("/warm")]), 0);
        std::fs::remove_dir_all(place.server.file("snaps")).unwrap();
    }
    assert!(sent.contains(&2) && sent.contains(&0), "{sent:?}");
}

#[test]
fn a_push_that_is_interrupted_ends_at_once_and_says_so() {
    let place = Place::new();
    place.make("warm", 1);
    // While it looks whether there is a store, and while it sends.
    for at in [0, 12] {
        let output = killed(&place, at, Signal::INT).unwrap();
        assert_exit(&output, 1);
        assert!(
            stderr(&output).contains("it was called off"),
            "{}",
            all(&output)
        );
    }
    assert_exit(&place.vmm(&["push", &place.path("warm"), &url("")]), 0);
}

#[test]
fn a_guest_runs_from_a_url_and_from_the_cache() {
    if no_kvm() {
        return;
    }
    let place = Place::new();
    let accel = match accel() {
        Accel::User => "user",
        _ => "kvm",
    };
    let (warm, there) = (place.path("warm"), url("/warm"));
    let small = [
        "--memory",
        "16M",
        "--snapshots",
        "4",
        "--snapshot-every",
        "10ms",
    ];
    let saved = place.vmm(&[&["save", &warm, "--accel", accel][..], &small].concat());
    assert_exit(&saved, 0);
    assert_exit(&place.vmm(&["push", &warm, &url("")]), 0);

    let cache = place.cache();
    let kept = ["--trust-guest", "--cache", &cache];
    let loaded = place.json(&[&["load", &there][..], &kept].concat());
    assert_eq!(
        (&loaded["follows_formula"], &loaded["violations"]),
        (&true.into(), &Value::Array(vec![]))
    );
    // It is all here now: what is there is not wanted any more.
    std::fs::remove_dir_all(place.server.file("snaps/chunks")).unwrap();
    let run = ["--snapshots", "4", "--snapshot-every", "10ms"];
    let ran = place.vmm(&[&["run", &there][..], &kept, &run].concat());
    assert_exit(&ran, 0);
    let without = place.vmm(&["load", &there, "--trust-guest", "--cache-size", "0"]);
    assert_exit(&without, 1);
    assert!(
        stderr(&without).contains("s3://bucket/snaps/chunks/"),
        "{}",
        all(&without)
    );
    // What began elsewhere is saved here.
    let refused = place.vmm(&[&["run", &there, "--save", "next"][..], &kept].concat());
    assert_exit(&refused, 2);
    assert!(
        stderr(&refused).contains("is an object store"),
        "{}",
        all(&refused)
    );
    // Without KVM there is one of them a process.
    if accel == "kvm" {
        let clones = Command::new(env!("CARGO_BIN_EXE_vmm"))
            .args([
                "fork",
                "--from",
                &there,
                "-n",
                "2",
                "--duration",
                "1s",
                "--cache",
                &cache,
            ])
            .envs(environment(&place.server.endpoint()))
            .output()
            .unwrap();
        assert_exit(&clones, 0);
    }
}
