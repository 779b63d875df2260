//! Whoever saves is killed, at moments that nobody chooses: what has a final name is whole, the rest is not there, and
//! the store needs no repair.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use palimpsest_store::{Facts, Part, SaveOptions, Saving, SnapshotName, Store, prune, verify};

const REGION: usize = 2 << 20;
const REGIONS: u64 = 12;
/// In the environment of the one who is killed: the store, and the name of the snapshot.
const STORE: &str = "KILLED_STORE";
const NAME: &str = "KILLED_NAME";

/// What is in a region: half of the regions are those of every snapshot.
fn content(name: &str, region: u64) -> Vec<u8> {
    let own = match region % 2 {
        0 => 0,
        _ => name
            .bytes()
            .fold(7_u64, |hash, byte| hash * 31 + u64::from(byte)),
    };
    let mut bytes = vec![0; REGION];
    for (page, at) in (own + region..).zip((0..REGION).step_by(64 << 10)) {
        bytes[at..at + 8].copy_from_slice(&(page + 1).to_le_bytes());
    }
    bytes
}

fn save(store: &Store, name: &str, mut after: impl FnMut()) {
    let of: SnapshotName = name.parse().unwrap();
    let memory = REGIONS * REGION as u64;
    let mut saving = Saving::begin(store, &of, memory, SaveOptions::default()).unwrap();
    for region in 0..REGIONS {
        saving.region(region, &content(name, region)).unwrap();
        after();
    }
    let part = Part {
        name: "part".to_owned(),
        version: 1,
        bytes: name.as_bytes().to_vec(),
    };
    saving.finish(Facts::default(), &[part]).unwrap();
    after();
}

#[test]
#[ignore = "is started, and killed, by the others"]
fn the_one_who_is_killed() {
    let Some(store) = std::env::var_os(STORE) else {
        return;
    };
    let store = Store::open(Path::new(&store)).unwrap();
    let name = std::env::var(NAME).unwrap();
    save(&store, &name, || {
        let mut out = std::io::stdout();
        writeln!(out, "step").and_then(|()| out.flush()).unwrap();
    });
}

fn assert_whole(store: &Store, name: &str) {
    let name: SnapshotName = name.parse().unwrap();
    let verified = verify(store, &name, &mut HashSet::new(), &mut |_, _| true).unwrap();
    assert!(verified.wrong.is_empty(), "{name}: {:?}", verified.wrong);
    let kept = store.read(&name).unwrap();
    let mut found = vec![0; REGION];
    for region in 0..REGIONS {
        assert!(kept.region(region, &mut found).unwrap());
        assert!(
            found == content(name.as_str(), region),
            "{name}, region {region}"
        );
    }
}

/// Kills `times` savers, each after some number of its steps and a moment more.
fn kill(times: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::open_or_create(&path).unwrap();
    save(&store, "before", || ());
    let mut random = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(std::process::id());
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let (mut named, mut unfinished) = (0, 0);
    for round in 0..times {
        let name = format!("killed-{round}");
        let mut saver = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "the_one_who_is_killed",
                "--include-ignored",
                "--nocapture",
            ])
            .env(STORE, &path)
            .env(NAME, &name)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let steps = BufReader::new(saver.stdout.take().unwrap()).lines();
        let wanted = next(REGIONS + 2);
        let seen = steps
            .map_while(Result::ok)
            .filter(|line| line.ends_with("step"))
            .take(wanted as usize)
            .count();
        assert_eq!(seen as u64, wanted, "round {round}");
        // Somewhere in what it does next.
        (0..next(1 << 16)).for_each(|_| std::hint::spin_loop());
        saver.kill().unwrap();
        saver.wait().unwrap();
        let names = store.names().unwrap();
        match names.iter().any(|there| there.as_str() == name) {
            true => {
                named += 1;
                assert_whole(&store, &name);
            }
            false => unfinished += 1,
        }
        assert_whole(&store, "before");
        // Without repair.
        if round % 5 == 4 {
            let again = format!("again-{round}");
            save(&store, &again, || ());
            prune(&store, &[], Duration::from_secs(10)).unwrap();
            assert_whole(&store, &again);
            assert_eq!(std::fs::read_dir(path.join("tmp")).unwrap().count(), 0);
            let drop: Vec<_> = store.names().unwrap();
            let drop: Vec<_> = drop
                .into_iter()
                .filter(|name| name.as_str() != "before")
                .collect();
            prune(&store, &drop, Duration::from_secs(10)).unwrap();
            assert_whole(&store, "before");
        }
    }
    assert!(unfinished > times / 4, "{named} named, {unfinished} not");
}

#[test]
fn a_few_who_save_are_killed() {
    kill(30);
}

#[test]
#[ignore = "takes a while: before a release"]
fn two_hundred_who_save_are_killed() {
    kill(200);
}
