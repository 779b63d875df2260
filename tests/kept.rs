//! `vmm snapshot` and `vmm fork --from`, through the program: what one process has saved runs on in the next.

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use palimpsest::kept::store::{Facts, Part, SaveOptions, Saving, SnapshotName, Store, verify};
use palimpsest::kvm::VcpuState;
use palimpsest::saved::Saved;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmm::accel::Accel;
use vmm::session::kept::Source;

use crate::support::{accel, no_kvm, stderr, stdout};

/// A store for one test.
struct Place {
    dir: tempfile::TempDir,
}

fn place() -> Place {
    Place {
        dir: tempfile::tempdir().unwrap(),
    }
}

fn vmm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.args(args);
    command
}

/// What a small machine under load is: two vCPUs, two devices that do DMA, restores.
const SMALL: [&str; 10] = [
    "--memory",
    "32M",
    "--snapshots",
    "12",
    "--snapshot-every",
    "10ms",
    "--restore-every",
    "5",
    "--seed",
    "7",
];

impl Place {
    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn path(&self, name: &str) -> String {
        self.store().join(name).display().to_string()
    }

    fn accel(&self) -> &'static str {
        match accel() {
            Accel::User => "user",
            _ => "kvm",
        }
    }

    fn save(&self, name: &str, flags: &[&str]) -> Output {
        let mut command = vmm(&[
            "snapshot",
            "save",
            &self.path(name),
            "--accel",
            self.accel(),
        ]);
        command.args(SMALL).args(flags).output().unwrap()
    }

    /// Runs `verb` of `vmm snapshot`, on what is at `name`.
    fn on(&self, verb: &str, name: &str, flags: &[&str]) -> Output {
        let mut command = vmm(&["snapshot", verb, &self.path(name)]);
        command.args(flags).output().unwrap()
    }

    /// The same, of a verb that writes a report.
    fn run(&self, name: &str, flags: &[&str]) -> (Output, Value) {
        let report = self.dir.path().join("report.json");
        let _ = fs::remove_file(&report);
        let mut command = vmm(&["snapshot", "run", &self.path(name), "--trust-guest"]);
        let command = command.args(flags).arg("--report").arg(&report);
        let output = command.output().unwrap();
        let json = fs::read(&report).unwrap_or_else(|_| panic!("{}", all(&output)));
        (output, serde_json::from_slice(&json).unwrap())
    }

    fn assert_whole(&self, name: &str) {
        let store = Store::open(&self.store()).unwrap();
        let name: SnapshotName = name.parse().unwrap();
        let verified = verify(&store, &name, &mut Default::default(), &mut |_, _| true).unwrap();
        assert!(verified.wrong.is_empty(), "{:?}", verified.wrong);
    }
}

fn all(output: &Output) -> String {
    format!("{}\n{}", stdout(output), stderr(output))
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&stdout(output)).unwrap_or_else(|error| panic!("{error}: {}", all(output)))
}

#[track_caller]
fn assert_exit(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", all(output));
}

const SHORT: [&str; 4] = ["--snapshots", "8", "--snapshot-every", "10ms"];

/// A chunk of the store.
fn chunk(store: &Path) -> PathBuf {
    let folder = fs::read_dir(store.join("chunks"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let file = fs::read_dir(folder.path()).unwrap().next().unwrap();
    file.unwrap().path()
}

#[test]
fn what_is_saved_under_load_runs_on_in_another_process_under_all_oracles() {
    if no_kvm() {
        return;
    }
    let place = place();
    let saved = place.save("warm", &[]);
    assert_exit(&saved, 0);
    assert!(
        stdout(&saved).contains("saved       warm in "),
        "{}",
        all(&saved)
    );
    place.assert_whole("warm");

    let loaded = place.on("load", "warm", &["--json"]);
    assert_exit(&loaded, 0);
    let loaded = json(&loaded);
    assert_eq!(
        (&loaded["follows_formula"], &loaded["violations"]),
        (&true.into(), &Value::Array(vec![]))
    );
    assert!(loaded["checked_pages"].as_u64() > Some(1000), "{loaded}");

    let (ran, report) = place.run("warm", &["--snapshots", "12", "--snapshot-every", "10ms"]);
    assert_exit(&ran, 0);
    assert_eq!(report["verdict"], "ok");
    assert_eq!(report["loaded"]["name"], "warm");
    assert_eq!(report["snapshots"]["taken"], 13);
    assert_eq!(report["snapshots"]["checked"], 13);
    assert_eq!(report["snapshots"]["restored"], 2);
    // Nothing that the guest felt took longer than the run, such as the time that it lay in the store.
    let longest = report["stall_us"]["max"].as_f64().unwrap_or(0.0);
    assert!(
        longest < report["duration_s"].as_f64().unwrap() * 1e6,
        "{}",
        all(&ran)
    );
    for what in [
        &report["guest"]["ops"],
        &report["dma"]["to_guest"],
        &report["checked_draws"],
    ] {
        assert!(what.as_u64() > Some(0), "{}", all(&ran));
    }
}

/// Each oracle that a fault can trip in a loaded guest is still awake.
#[test]
fn faults_are_caught_in_what_was_loaded() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    for fault in ["same-generation", "share-pinned", "skip-write-protect"] {
        let (ran, report) = place.run(
            "warm",
            &[
                "--inject",
                fault,
                "--restore-every",
                "3",
                "--duration",
                "1s",
            ],
        );
        assert_exit(&ran, 3);
        assert_eq!(report["verdict"], "violated", "{fault}: {}", all(&ran));
    }
}

#[test]
fn load_run_save_again_and_again_and_nothing_drifts() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("g0", &["--pattern", "sparse"]), 0);
    for generation in 1..=5 {
        let (from, to) = (format!("g{}", generation - 1), format!("g{generation}"));
        let zstd = if generation % 2 == 0 {
            "--zstd"
        } else {
            "--zstd=1"
        };
        let mut flags = vec!["--save", &to, zstd];
        flags.extend(SHORT);
        let (ran, report) = place.run(&from, &flags);
        assert_exit(&ran, 0);
        assert_eq!(
            (&report["verdict"], &report["saved"]["is_saved"]),
            (&"ok".into(), &true.into())
        );
        let info = json(&place.on("info", &to, &["--json"]));
        assert_eq!(info["parent"]["name"], from.as_str());
    }
    for generation in 0..=5 {
        place.assert_whole(&format!("g{generation}"));
    }
    // Each stands alone.
    let list = |place: &Place| json(&place.on("list", ".", &["--json"]));
    assert_eq!(list(&place).as_array().unwrap().len(), 6);
    let mut flags = vec!["--json"];
    let names = ["g0", "g1", "g2", "g3", "g4"];
    flags.extend(names.iter().flat_map(|name| ["--drop", name]));
    let pruned = place.on("prune", ".", &flags);
    assert_exit(&pruned, 0);
    assert!(json(&pruned)["chunks"].as_u64() > Some(0));
    let (ran, report) = place.run("g5", &SHORT);
    assert_exit(&ran, 0);
    assert_eq!(report["verdict"], "ok");
}

#[test]
fn an_increment_does_not_read_what_was_not_written() {
    if no_kvm() {
        return;
    }
    let place = place();
    // Code, page tables and the like are in regions that the guest does not write, or not at once.
    let flags = ["--vcpus", "1", "--dma-devices", "0"];
    assert_exit(&place.save("a", &flags), 0);
    // At once: nothing has run in between but a few operations.
    let flags = [
        "--save",
        "b",
        "--snapshots",
        "1",
        "--snapshot-every",
        "1ms",
        "--restore-every",
        "0",
    ];
    let (ran, report) = place.run("a", &flags);
    assert_exit(&ran, 0);
    let saved = &report["saved"];
    let [written, found, same] =
        ["written", "found", "same"].map(|what| saved[what].as_u64().unwrap());
    assert!(same > 0, "{saved}");
    assert!(written + found + same <= 16, "{saved}");
    let diff = json(&{
        let (a, b) = (place.path("a"), place.path("b"));
        vmm(&["snapshot", "diff", &a, &b, "--json"])
            .output()
            .unwrap()
    });
    assert_eq!(
        diff["regions"].as_array().unwrap().len() as u64,
        written,
        "{diff}"
    );
}

#[test]
fn clones_of_what_was_saved_share_one_load() {
    // A process has guest addresses once.
    if no_kvm() || accel() == Accel::User {
        return;
    }
    let place = place();
    assert_exit(&place.save("template", &[]), 0);
    let report = place.dir.path().join("fork.json");
    let output = vmm(&[
        "fork",
        "--from",
        &place.path("template"),
        "-n",
        "6",
        "--warm-up",
        "100ms",
        "--duration",
        "1s",
    ])
    .arg("--report")
    .arg(&report)
    .output()
    .unwrap();
    assert_exit(&output, 0);
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(report["verdict"], "ok");
    assert_eq!(report["loaded"]["name"], "template");
    // One load for all: each chunk is read once at most.
    let loaded = &report["loaded"];
    assert_eq!(loaded["is_lazy"], true);
    let read: u64 = ["by_vcpus", "by_host", "by_readers", "prefetched"]
        .iter()
        .map(|of| loaded[of].as_u64().unwrap())
        .sum();
    assert!(read <= loaded["chunks"].as_u64().unwrap(), "{loaded}");
    assert_eq!(report["machines"].as_array().unwrap().len(), 7);
    assert_eq!(report["snapshots"], report["checked"]);
    assert_eq!(report["shares"]["unexplained_bytes"], 0);
    assert_eq!(report["config"]["guest"]["memory_bytes"], 32 << 20);
}

#[test]
fn another_accelerator_and_a_stranger_without_kvm_are_refused() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    let (ours, other) = match accel() {
        Accel::User => ("user", "kvm"),
        _ => ("kvm", "user"),
    };
    let refused = place.on("run", "warm", &["--accel", other, "--trust-guest"]);
    assert_exit(&refused, 1);
    let said = stderr(&refused);
    // Where there is no KVM there is nothing to refuse it.
    let has_reason = said.contains(&format!("run by {ours}, and here they would be by {other}"));
    assert!(has_reason || said.contains("/dev/kvm"), "{said}");
    let refused = place.on("run", "warm", &["--accel", "user"]);
    assert_exit(&refused, 1);
    assert!(
        stderr(&refused).contains("say --trust-guest"),
        "{}",
        all(&refused)
    );
    // Another policy, other pages: what was saved does not depend on them.
    for flags in [["--policy", "mapcount"], ["--page-size", "4K"]] {
        let flags = [&flags[..], &["--snapshots", "1"]].concat();
        let (ran, _) = place.run("warm", &flags);
        // An old policy may lose what devices write, which is found.
        assert!(matches!(ran.status.code(), Some(0 | 3)), "{}", all(&ran));
    }
}

/// The guest runs before its memory is read, or after, as is asked for; all oracles look either way; and what was
/// wanted is known the next time.
#[test]
fn memory_is_read_as_it_is_used_or_before() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    let touched = place.store().join("warm/touched");
    assert!(!touched.exists());
    let sum = |loaded: &Value| {
        let of = |what: &str| loaded[what].as_u64().unwrap();
        of("by_vcpus") + of("by_host") + of("by_readers") + of("prefetched")
    };
    for flags in [
        &[][..],
        &["--lazy", "always"],
        &["--prefetch", "all"],
        &["--prefetch", "none"],
    ] {
        let (output, report) = place.run("warm", &[flags, &SHORT].concat());
        assert_exit(&output, 0);
        let loaded = &report["loaded"];
        assert_eq!(loaded["is_lazy"], true, "{loaded}");
        // The checker reads all of it.
        assert_eq!(sum(loaded), loaded["chunks"].as_u64().unwrap(), "{loaded}");
        assert!(
            loaded["first_instruction_s"].as_f64().unwrap() > 0.0,
            "{loaded}"
        );
        assert!(loaded["by_vcpus"].as_u64().unwrap() + loaded["by_host"].as_u64().unwrap() > 0);
        assert!(stdout(&output).contains("read for "), "{}", all(&output));
        assert!(touched.exists());
        place.assert_whole("warm");
    }
    // Advice is advice.
    fs::write(&touched, b"PALTOUCH and nothing that makes sense").unwrap();
    let (output, _) = place.run("warm", &SHORT);
    assert_exit(&output, 0);
    let (output, report) = place.run("warm", &[&["--lazy", "never"][..], &SHORT].concat());
    assert_exit(&output, 0);
    let loaded = &report["loaded"];
    assert_eq!((&loaded["is_lazy"], sum(loaded)), (&Value::Bool(false), 0));
}

/// Whichever chunk it is, and whoever touches it: the run ends with the chunk's name, and nobody takes for the guest's
/// what is in it.
#[test]
fn a_chunk_that_is_damaged_under_a_lazy_load_ends_the_run_and_violates_nothing() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    let store = Store::open(&place.store()).unwrap();
    let kept = store.read(&"warm".parse().unwrap()).unwrap();
    let chunks = kept.index().iter().map(|(_, hash)| {
        let hash = hash.to_string();
        place.store().join("chunks").join(&hash[..2]).join(hash)
    });
    let chunks: Vec<_> = chunks.collect();
    drop(kept);
    for (n, chunk) in chunks.iter().enumerate().step_by(3) {
        let content = fs::read(chunk).unwrap();
        let damaged = match n % 2 {
            0 => {
                let mut damaged = content.clone();
                damaged[n * 4099] ^= 1;
                damaged
            }
            _ => content[..content.len() - 1 - n].to_vec(),
        };
        fs::write(chunk, damaged).unwrap();
        let output = place.on("run", "warm", &[&["--trust-guest"][..], &SHORT].concat());
        let named = chunk.file_name().unwrap().to_str().unwrap();
        let said = all(&output);
        assert_exit(&output, 1);
        assert!(said.contains(named), "{n}: {said}");
        assert!(
            !said.contains("panicked") && !said.contains("VIOLATED"),
            "{n}: {said}"
        );
        fs::write(chunk, content).unwrap();
    }
    let (output, _) = place.run("warm", &SHORT);
    assert_exit(&output, 0);
}

#[test]
fn a_damaged_chunk_is_named_and_nothing_runs() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    let chunk = chunk(&place.store());
    let mut bytes = fs::read(&chunk).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&chunk, bytes).unwrap();
    let named = chunk.file_name().unwrap().to_str().unwrap();
    for verb in ["verify", "load", "run"] {
        let output = place.on(verb, "warm", &[]);
        if verb == "run" && accel() == Accel::User {
            continue;
        }
        assert_exit(&output, 1);
        assert!(all(&output).contains(named), "{verb}: {}", all(&output));
        assert!(
            !all(&output).contains("guest: "),
            "{verb}: {}",
            all(&output)
        );
    }
    fs::remove_file(&chunk).unwrap();
    let output = place.on("verify", "warm", &[]);
    assert_exit(&output, 1);
    assert!(stdout(&output).contains("is not there"), "{}", all(&output));
    let list = place.on("list", ".", &[]);
    assert_exit(&list, 1);
    assert!(
        stdout(&list).contains("; 1 CHUNK MISSING\n"),
        "{}",
        all(&list)
    );
}

/// The run goes on to its end, and says that it was not saved, and why.
#[test]
fn a_save_that_fails_harms_nothing() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    // Files are in the way of chunks in folders that are not there yet.
    for folder in 0..=255 {
        let folder = place.store().join("chunks").join(format!("{folder:02x}"));
        if !folder.exists() {
            fs::write(&folder, "in the way").unwrap();
        }
    }
    let (ran, report) = place.run("warm", &["--save", "next", "--snapshots", "6"]);
    assert_exit(&ran, 1);
    assert_eq!(
        (&report["verdict"], &report["saved"]["is_saved"]),
        (&"error".into(), &false.into())
    );
    let error = report["error"].as_str().unwrap();
    assert!(
        error.contains("cannot name ") && error.contains("chunks/"),
        "{error}"
    );
    assert_eq!(report["snapshots"]["taken"], report["snapshots"]["checked"]);
    assert_eq!(report["violations"]["cut"], 0);
    let names = Store::open(&place.store()).unwrap().names().unwrap();
    assert_eq!(names, ["warm".parse().unwrap()]);
    assert_eq!(fs::read_dir(place.store().join("tmp")).unwrap().count(), 0);
    place.assert_whole("warm");
}

#[test]
fn what_makes_no_sense_is_refused_at_once() {
    let place = place();
    let code = |output: &Output| output.status.code();
    for name in ["chunks", "a b", "-x", ".."] {
        let output = place.save(name, &[]);
        assert_eq!(code(&output), Some(2), "{name}: {}", all(&output));
    }
    fs::write(place.dir.path().join("mine"), "x").unwrap();
    let no_store = place.dir.path().join("warm").display().to_string();
    let output = vmm(&["snapshot", "save", &no_store]).output().unwrap();
    assert_eq!(code(&output), Some(1), "{}", all(&output));
    assert!(
        stderr(&output).contains("is no snapshot store"),
        "{}",
        all(&output)
    );
    let output = place.save("warm", &["--inject", "leak-pin"]);
    assert_eq!(code(&output), Some(2), "{}", all(&output));
    assert!(!place.store().exists());
    let none = place.on("run", "none", &[]);
    assert_exit(&none, 1);
    if no_kvm() {
        return;
    }
    assert_exit(&place.save("warm", &[]), 0);
    let twice = place.save("warm", &[]);
    assert_eq!(code(&twice), Some(2), "{}", all(&twice));
    assert!(
        stderr(&twice).contains("has a snapshot `warm` already"),
        "{}",
        all(&twice)
    );
    let orphan = place.save("other", &["--parent", "nobody"]);
    assert!(
        stderr(&orphan).contains("no snapshot `nobody`"),
        "{}",
        all(&orphan)
    );
}

/// One is taken for the save, when the time is up.
#[test]
fn a_run_that_is_over_before_its_first_snapshot_is_saved() {
    if no_kvm() {
        return;
    }
    let place = place();
    for (name, duration, every) in [("short", "1ms", "20ms"), ("between", "50ms", "1000s")] {
        let path = place.path(name);
        let mut command = vmm(&["snapshot", "save", &path, "--accel", place.accel()]);
        command.args(["--memory", "32M", "--duration", duration]);
        command.args(["--snapshot-every", every]);
        let output = support::within(support::PATIENCE, move || command.output().unwrap());
        assert_exit(&output, 0);
        assert!(
            stdout(&output).contains(&format!("saved       {name} in ")),
            "{}",
            all(&output)
        );
        place.assert_whole(name);
    }
}

/// Flags of a save without a save are a mistake; and what is always refused is not offered.
#[test]
fn flags_that_would_do_nothing_are_refused_and_not_offered() {
    let place = place();
    for flags in [
        &["--parent", "a"][..],
        &["--zstd"],
        &["--rate", "1M"],
        &["--every", "1s"],
    ] {
        let refused = place.on("run", "warm", flags);
        assert_exit(&refused, 2);
        assert!(stderr(&refused).contains("--save"), "{}", all(&refused));
        // With it they are taken, and it is the store that is missing.
        let missing = place.on("run", "warm", &[flags, &["--save", "b"]].concat());
        assert_exit(&missing, 1);
    }
    for flags in [
        &["--keep-last", "1"][..],
        &["--every", "0s"],
        &["--every", "1s", "--keep-last", "0"],
    ] {
        assert_exit(&place.save("warm", flags), 2);
    }
    let help = stdout(&vmm(&["snapshot", "save", "--help"]).output().unwrap());
    assert!(
        help.contains("--seed") && !help.contains("--inject <"),
        "{help}"
    );
    assert!(help.contains("but --trace and --inject"), "{help}");
}

#[test]
fn a_damaged_store_is_called_that_by_all_who_look() {
    let place = place();
    Store::open_or_create(&place.store()).unwrap();
    assert_exit(&place.on("verify", ".", &[]), 0);
    for marker in ["", "x"] {
        fs::write(place.store().join("store.json"), marker).unwrap();
        for verb in ["verify", "list"] {
            let output = place.on(verb, ".", &[]);
            assert_exit(&output, 1);
            let said = stderr(&output);
            assert!(said.contains("its store.json is damaged"), "{verb}: {said}");
        }
    }
}

/// Nothing runs before: it says so at once.
#[test]
fn a_save_that_cannot_be_made_is_refused_before_the_run() {
    if no_kvm() {
        return;
    }
    let place = place();
    Store::open_or_create(&place.store()).unwrap();
    fs::write(place.store().join("file"), "x").unwrap();
    let refused = place.save("file", &[]);
    assert_exit(&refused, 2);
    assert!(
        stderr(&refused).contains("is no snapshot"),
        "{}",
        all(&refused)
    );
    // As if it could not be written to: root may write anywhere.
    fs::write(place.store().join("tmp"), "in the way").unwrap();
    let refused = place.save("warm", &[]);
    assert_exit(&refused, 1);
    let said = stderr(&refused);
    assert!(
        said.contains("cannot make ") && said.contains("store/tmp/"),
        "{said}"
    );
    assert!(!said.contains("guest: "), "{said}");
}

/// Killed when so many chunks were written, which is another number each time.
#[test]
fn a_run_that_is_killed_while_it_saves_leaves_a_store_as_it_was() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("before", &[]), 0);
    let store = Store::open(&place.store()).unwrap();
    for round in 0..6 {
        let name = format!("killed{round}");
        let path = place.path(&name);
        let mut child: Child = vmm(&["snapshot", "save", &path, "--accel", place.accel()])
            .args(["--memory", "32M", "--snapshots", "1", "--seed"])
            .arg(format!("{round}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let tmp = place.store().join("tmp");
        let begun = || {
            let saves = fs::read_dir(&tmp).into_iter().flatten().flatten();
            let files = |save: fs::DirEntry| fs::read_dir(save.path()).map_or(0, Iterator::count);
            saves.map(files).sum::<usize>()
        };
        // It has begun, and written a few chunks that have no name; or has ended, which comes to the same.
        while begun() <= 2 * round && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        let _ = child.kill();
        child.wait().unwrap();
        if store.names().unwrap().contains(&name.parse().unwrap()) {
            place.assert_whole(&name);
        }
        place.assert_whole("before");
    }
    assert_exit(&place.on("prune", ".", &[]), 0);
    assert_eq!(fs::read_dir(place.store().join("tmp")).unwrap().count(), 0);
    assert_exit(&place.save("after", &[]), 0);
    for name in ["before", "after"] {
        place.assert_whole(name);
    }
}

/// A snapshot that is whole, hashes and all, and that somebody has made of another.
fn forge(place: &Place, to: &str, change: impl FnOnce(&mut Facts, &mut Vec<Part>)) {
    let store = Store::open(&place.store()).unwrap();
    let kept = store.read(&"warm".parse().unwrap()).unwrap();
    let (manifest, index) = (kept.manifest(), kept.index());
    let mut facts = Facts {
        creator: manifest.creator.clone(),
        machine: manifest.machine.clone(),
        program: manifest.program.clone(),
    };
    let mut parts = kept.parts().to_vec();
    change(&mut facts, &mut parts);
    let options = SaveOptions::default();
    let mut saving =
        Saving::begin(&store, &to.parse().unwrap(), index.memory_bytes(), options).unwrap();
    for (region, hash) in index.iter() {
        assert!(saving.same(region, hash).unwrap());
    }
    saving.finish(facts, &parts).unwrap();
}

/// What the program makes of it: an end, and no panic.
#[track_caller]
fn assert_survived(place: &Place, name: &str, what: &str) -> i32 {
    let mut command = vmm(&["snapshot", "run", &place.path(name)]);
    command.args([
        "--snapshots",
        "1",
        "--snapshot-every",
        "1ms",
        "--restore-every",
        "1",
    ]);
    let output = support::within(support::PATIENCE, move || command.output().unwrap());
    let code = output.status.code();
    assert!(
        matches!(code, Some(0..=3)),
        "{what}: {code:?} {}",
        all(&output)
    );
    assert!(
        !stderr(&output).contains("panicked"),
        "{what}: {}",
        all(&output)
    );
    code.unwrap()
}

/// Whoever can write to the store can have any state loaded. KVM and devices look at what they are given.
#[test]
fn states_that_somebody_made_up_end_a_run_and_not_the_program() {
    // Without KVM there is nothing that would keep it.
    if no_kvm() || accel() == Accel::User {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    let names: Vec<String> = {
        let store = Store::open(&place.store()).unwrap();
        let kept = store.read(&"warm".parse().unwrap()).unwrap();
        kept.parts().iter().map(|part| part.name.clone()).collect()
    };
    assert_eq!(names.len(), 2 + 2 + 2 + 1, "{names:?}");
    let mut random = 99_u64;
    let mut next = |below: usize| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    let mut number = 0;
    let mut refused = 0;
    for (at, name) in names.iter().enumerate() {
        for change in 0..9 {
            number += 1;
            let to = format!("made-up-{number}");
            forge(&place, &to, |_, parts| match change {
                0 => drop(parts.remove(at)),
                1 => parts[at].bytes.clear(),
                2 => parts[at].version += 1,
                3 => drop(parts[at].bytes.drain(10..)),
                4 => parts[at].bytes.fill(0xff),
                _ => {
                    // Mostly in front, where the registers are that matter.
                    for _ in 0..=change {
                        let len = parts[at].bytes.len();
                        let below = if next(2) == 0 { len } else { len.min(600) };
                        parts[at].bytes[next(below)] ^= 1 << next(8);
                    }
                }
            });
            let code = assert_survived(&place, &to, &format!("{name}, change {change}"));
            if change < 3 {
                assert_eq!(code, 1, "{name}, change {change}");
            }
            refused += u64::from(code != 0);
        }
    }
    assert!(refused > number / 2, "{refused} of {number}");
}

#[test]
fn facts_that_somebody_made_up_are_refused() {
    if no_kvm() || accel() == Accel::User {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    type Change = (&'static str, Value, i32);
    let mut number = 0;
    let config: [Change; 14] = [
        ("memory_bytes", 0.into(), 1),
        ("memory_bytes", u64::MAX.into(), 1),
        ("memory_bytes", (64 << 20).into(), 1),
        ("vcpus", 1.into(), 1),
        ("vcpus", u64::MAX.into(), 1),
        ("dma_devices", 0.into(), 1),
        ("dma_devices", u64::MAX.into(), 1),
        ("registered_buffers", u64::MAX.into(), 2),
        ("keep", 0.into(), 2),
        ("keep", u64::MAX.into(), 0),
        ("restore_every", u64::MAX.into(), 0),
        ("snapshot_every_s", 1e300.into(), 1),
        ("pattern", "none".into(), 1),
        ("seed", 8.into(), 3),
    ];
    for (key, value, code) in config {
        number += 1;
        let to = format!("facts-{number}");
        forge(&place, &to, |facts, _| {
            facts.program["config"][key] = value.clone()
        });
        let mut command = vmm(&["snapshot", "run", &place.path(&to), "--snapshots", "1"]);
        let output = support::within(support::PATIENCE, move || command.output().unwrap());
        let said = all(&output);
        assert!(!said.contains("panicked"), "{key} {value}: {said}");
        assert_eq!(output.status.code(), Some(code), "{key} {value}: {said}");
    }
    for (key, value) in [
        ("image_end", Value::from(u64::MAX)),
        ("image_end", 0.into()),
        ("image_end", (31 << 20).into()),
        ("follows_formula", false.into()),
        ("incarnation", Value::Null),
        ("more", 1.into()),
        ("abi", 2.into()),
    ] {
        number += 1;
        let to = format!("facts-{number}");
        forge(&place, &to, |facts, _| {
            drop(facts.program.insert(key.to_owned(), value.clone()))
        });
        assert_survived(&place, &to, &format!("{key} {value}"));
    }
    // Draws that were never made, and a generation that nobody has.
    for (number_of, count) in [(0, 0), (u64::MAX, u64::MAX)] {
        number += 1;
        let to = format!("facts-{number}");
        forge(&place, &to, |facts, _| {
            let incarnation = &mut facts.program["incarnation"];
            incarnation["number"] = number_of.into();
            incarnation["generation"]["counter"] = count.into();
            incarnation["origin"] = serde_json::json!({
                "incarnation": count,
                "generation": { "counter": count, "id": [0, 0], "seed": [0, 0, 0, 0] },
                "drawn": [[count, count]],
            });
        });
        assert_survived(&place, &to, &format!("incarnation {number_of} {count}"));
    }
}

/// A run that version 1 of the format was saved of, when there was no other. What is in it is right for ever; whether
/// it runs on is a matter of the CPU.
#[test]
fn a_run_that_was_saved_long_ago_is_read_and_runs_on_where_it_can() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v1");
    let store = Store::open(&golden).unwrap();
    let name: SnapshotName = "sparse".parse().unwrap();
    let verified = verify(&store, &name, &mut Default::default(), &mut |_, _| true).unwrap();
    assert!(verified.wrong.is_empty(), "{:?}", verified.wrong);
    let source = Source::of(store.read(&name).unwrap()).unwrap();
    let config = source.config();
    assert_eq!((config.memory, config.vcpus, config.seed), (16 << 20, 1, 3));
    let kept = store.read(&name).unwrap();
    for state in ["vcpu/0", "boot/0"] {
        let part = kept.part(state).unwrap();
        let saved = Saved::stored(part.version, part.bytes.clone());
        VcpuState::of_saved(&saved).unwrap();
    }
    if no_kvm() || accel() == Accel::User {
        return;
    }
    let path = golden.join("sparse").display().to_string();
    let ran = vmm(&["snapshot", "run", &path])
        .args(SHORT)
        .output()
        .unwrap();
    match ran.status.code() {
        Some(0) => {}
        // Another CPU, or another KVM.
        Some(1) => {
            let said = stderr(&ran);
            let is_refused = ["this is one of", "have not:", "cannot be set here:"];
            assert!(is_refused.iter().any(|why| said.contains(why)), "{said}");
            support::say(&said);
        }
        code => panic!("{code:?}: {}", all(&ran)),
    }
}

/// Fifty times, as `load_run_save_again_and_again_and_nothing_drifts` does a few: before a release.
#[test]
#[ignore = "takes minutes: before a release"]
fn load_run_save_fifty_times_and_nothing_drifts() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("g0", &[]), 0);
    for generation in 1..=50 {
        let (from, to) = (format!("g{}", generation - 1), format!("g{generation}"));
        let flags = ["--save", &to, "--snapshots", "4", "--snapshot-every", "5ms"];
        let (ran, report) = place.run(&from, &flags);
        assert_exit(&ran, 0);
        assert_eq!(report["verdict"], "ok", "generation {generation}");
        assert_exit(&place.on("prune", ".", &["--drop", &from]), 0);
    }
    place.assert_whole("g50");
}

/// Whatever is loaded twice has two generations: it draws no number twice, in whichever process.
#[test]
fn two_loads_are_two_incarnations() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    let mut ids = std::collections::HashSet::new();
    let mut note = |name: &str| {
        let info = json(&place.on("info", name, &["--json"]));
        let generation = &info["program"]["incarnation"]["generation"];
        assert!(
            ids.insert(generation["id"].to_string()),
            "{name}: {generation}"
        );
        generation["counter"].as_u64().unwrap()
    };
    let before = note("warm");
    for name in ["one", "other"] {
        let (ran, _) = place.run(
            "warm",
            &["--save", name, "--snapshots", "2", "--restore-every", "0"],
        );
        assert_exit(&ran, 0);
        assert_eq!(note(name), before + 1);
    }
}

#[test]
fn an_interrupt_while_it_saves_ends_the_run_and_leaves_no_name() {
    if no_kvm() {
        return;
    }
    let place = place();
    let mut child = vmm(&[
        "snapshot",
        "save",
        &place.path("warm"),
        "--accel",
        place.accel(),
    ])
    .args(SMALL)
    // It would take half a minute.
    .args(["--rate", "1M"])
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("saving ") {
        line.clear();
        assert_ne!(
            said.read_line(&mut line).unwrap(),
            0,
            "it ended before it saved"
        );
    }
    let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    // Else it waits for somebody to read.
    let rest = std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    let output = support::within(support::PATIENCE, move || child.wait_with_output().unwrap());
    rest.join().unwrap().unwrap();
    let printed = stdout(&output);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(
        printed.contains("saving `warm` was called off"),
        "{printed}"
    );
    assert!(printed.contains("saved       NOT warm"), "{printed}");
    assert!(
        printed.contains("cut 0, isolation 0, coherence 0"),
        "{printed}"
    );
    assert_eq!(Store::open(&place.store()).unwrap().names().unwrap(), []);
    assert_eq!(fs::read_dir(place.store().join("tmp")).unwrap().count(), 0);
    // The way is free.
    assert_exit(&place.save("warm", &[]), 0);
}

/// Somebody else saves under its name while the run goes on: as if it had been taken before.
#[test]
fn a_name_that_is_taken_late_is_a_name_that_is_taken() {
    if no_kvm() {
        return;
    }
    let place = place();
    Store::open_or_create(&place.store()).unwrap();
    let path = place.path("late");
    let mut command = vmm(&["snapshot", "save", &path, "--accel", place.accel()]);
    command.args(["--memory", "32M", "--snapshots", "20"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // The name was free when it said so.
    let first = lines.next().unwrap().unwrap();
    assert!(first.contains("seed"), "{first}");
    fs::create_dir(&path).unwrap();
    fs::write(Path::new(&path).join("snapshot.json"), "another's").unwrap();
    let said: Vec<_> = lines.map_while(Result::ok).collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{said:?}");
    let why = "has a snapshot `late` already: choose another name, or drop that one first";
    assert!(said.iter().any(|line| line.contains(why)), "{said:?}");
    assert!(
        stdout(&output).contains("saved       NOT late in "),
        "{}",
        stdout(&output)
    );
    let there = fs::read_to_string(Path::new(&path).join("snapshot.json")).unwrap();
    assert_eq!(there, "another's");
    assert_eq!(fs::read_dir(place.store().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_name_without_a_store_is_refused_with_what_to_say() {
    for verb in ["save", "run", "load", "info", "verify"] {
        let output = vmm(&["snapshot", verb, "warm"]).output().unwrap();
        assert_exit(&output, 2);
        assert!(
            stderr(&output).contains("say STORE/warm"),
            "{verb}: {}",
            all(&output)
        );
    }
}

fn names(place: &Place) -> Vec<String> {
    let store = Store::open(&place.store()).unwrap();
    store
        .names()
        .unwrap()
        .iter()
        .map(ToString::to_string)
        .collect()
}

/// All that are there are whole, each is an increment of one before it, and nothing is left over.
fn assert_checkpoints(place: &Place, names: &[String]) {
    for name in names {
        place.assert_whole(name);
        let info = json(&place.on("info", name, &["--json"]));
        if let Some(parent) = info["parent"]["name"].as_str() {
            assert!(parent < name.as_str(), "{parent} {name}");
        }
    }
    assert_eq!(fs::read_dir(place.store().join("tmp")).unwrap().count(), 0);
}

#[test]
fn checkpoints_are_increments_of_which_the_last_are_kept() {
    if no_kvm() {
        return;
    }
    let place = place();
    let report = place.dir.path().join("report.json");
    let file = report.display().to_string();
    let flags = ["--every", "1ms", "--keep-last", "2", "--report", &file];
    let saved = place.save("run", &[&flags[..], &["--pattern", "sparse"]].concat());
    assert_exit(&saved, 0);
    let counts: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let counts = &counts["checkpoints"];
    let of = |what: &str| counts[what].as_u64().unwrap();
    // One of the first snapshot, and one at the end.
    assert!(of("saved") >= 2, "{counts}");
    assert_eq!((of("kept"), of("failed")), (2, 0), "{counts}");
    assert_eq!(of("dropped"), of("saved") - 2, "{counts}");
    let there = names(&place);
    let last = of("saved");
    assert_eq!(there, [last - 1, last].map(|n| format!("run-{n:06}")));
    assert_eq!(counts["last"], there[1].as_str());
    assert!(stdout(&saved).contains("saved       "), "{}", all(&saved));
    assert_checkpoints(&place, &there);
    let info = json(&place.on("info", &there[1], &["--json"]));
    assert_eq!(info["parent"]["name"], there[0].as_str());
    // The next run goes on with the numbers, and drops nothing that it has not saved.
    let (ran, report) = place.run(
        &there[1],
        &[
            "--save",
            "run",
            "--every",
            "1ms",
            "--keep-last",
            "1",
            "--snapshots",
            "6",
        ],
    );
    assert_exit(&ran, 0);
    // While what it began with is read as it is used, it uses the store itself, and nothing can be dropped.
    let of = |what: &str| report["checkpoints"][what].as_u64().unwrap();
    let kept = of("kept");
    assert_eq!(kept, of("saved") - of("dropped"), "{report}");
    let now = names(&place);
    assert_eq!((now.len() as u64, &now[..2]), (2 + kept, &there[..]));
    assert!(now[2] > there[1], "{now:?}");
    assert_checkpoints(&place, &now);
    let (ran, report) = place.run(&now[2], &SHORT);
    assert_exit(&ran, 0);
    assert_eq!(report["verdict"], "ok");
}

/// A run that saves checkpoints until it is told to stop, and what it says.
fn checkpointing(place: &Place) -> (Child, std::sync::mpsc::Receiver<String>) {
    let path = place.path("run");
    let mut command = vmm(&["snapshot", "save", &path, "--accel", place.accel()]);
    command.args([
        "--memory",
        "32M",
        "--every",
        "10ms",
        "--snapshot-every",
        "10ms",
    ]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let (sender, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    (child, said)
}

fn interrupted(child: Child) -> Output {
    let pid = Pid::from_raw(child.id() as i32).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    support::within(support::PATIENCE, move || child.wait_with_output().unwrap())
}

#[test]
fn checkpoints_go_on_until_ctrl_c_which_leaves_those_that_are_there() {
    if no_kvm() {
        return;
    }
    let place = place();
    Store::open_or_create(&place.store()).unwrap();
    let (mut child, said) = checkpointing(&place);
    while names(&place).len() < 3 {
        assert!(
            child.try_wait().unwrap().is_none(),
            "{:?}",
            Vec::from_iter(said)
        );
        std::thread::yield_now();
    }
    let output = interrupted(child);
    assert_exit(&output, 0);
    let text = stdout(&output);
    assert!(text.contains(", ended by Ctrl-C or a signal\n"), "{text}");
    assert!(text.contains(" checkpoints of run in "), "{text}");
    assert_checkpoints(&place, &names(&place));
}

/// It is said, the run goes on, and so do checkpoints when the disk takes them again.
#[test]
fn a_checkpoint_that_is_refused_is_told_and_the_next_is_saved() {
    if no_kvm() {
        return;
    }
    let place = place();
    Store::open_or_create(&place.store()).unwrap();
    // As a full disk: no chunk can be named.
    let chunks = place.store().join("chunks");
    fs::create_dir(&chunks).unwrap();
    let folders = || (0..=255).map(|folder| chunks.join(format!("{folder:02x}")));
    folders().for_each(|folder| fs::write(folder, "in the way").unwrap());
    let (mut child, said) = checkpointing(&place);
    let refused = said
        .iter()
        .find(|line| line.contains("was not saved, the run goes on"));
    let refused = refused.unwrap();
    assert!(refused.contains("checkpoint `run-000001`"), "{refused}");
    assert!(
        refused.contains("cannot name ") && refused.contains("chunks/"),
        "{refused}"
    );
    assert_eq!(names(&place), [""; 0]);
    folders().for_each(|folder| fs::remove_file(folder).unwrap());
    while names(&place).is_empty() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "{:?}",
            Vec::from_iter(said)
        );
        std::thread::yield_now();
    }
    let output = interrupted(child);
    // One that was begun before the files were away may have failed after the first that was saved.
    assert_exit(&output, 0);
    assert!(
        stdout(&output).contains(" NOT saved\n"),
        "{}",
        stdout(&output)
    );
    assert_checkpoints(&place, &names(&place));
}

#[test]
fn a_run_whose_last_checkpoint_is_refused_says_so_at_its_end() {
    if no_kvm() {
        return;
    }
    let place = place();
    Store::open_or_create(&place.store()).unwrap();
    fs::write(place.store().join("chunks"), "in the way").unwrap();
    let report = place.dir.path().join("report.json");
    let file = report.display().to_string();
    let ran = place.save("run", &["--every", "1ms", "--report", &file]);
    assert_exit(&ran, 1);
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let error = report["error"].as_str().unwrap();
    assert!(
        error.starts_with("the last checkpoint was not saved: "),
        "{error}"
    );
    assert!(
        report["checkpoints"]["failed"].as_u64() > Some(1),
        "{report}"
    );
    assert_eq!(report["snapshots"]["taken"], report["snapshots"]["checked"]);
    assert_eq!(names(&place), [""; 0]);
}

/// Whole, hashes and all: nothing is damaged, and it is no snapshot that this program can run.
#[test]
fn what_is_whole_and_cannot_be_run_is_told_in_a_note() {
    if no_kvm() {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    let plain = place.on("verify", "warm", &["--json"]);
    assert_exit(&plain, 0);
    assert_eq!(json(&plain)[0]["notes"], Value::Array(vec![]));
    type Change = fn(&mut Facts, &mut Vec<Part>);
    let changes: [(&str, Change, &str); 6] = [
        (
            "vcpu",
            |_, parts| parts[0].version += 1,
            "its part `vcpu/0` makes no sense",
        ),
        (
            "device",
            |_, parts| parts[2].bytes.clear(),
            "its part `device/0` makes no sense",
        ),
        (
            "boot",
            |_, parts| parts.retain(|part| part.name != "boot/1"),
            "it has no part `boot/1`",
        ),
        (
            "reference",
            |_, parts| drop(parts.pop()),
            "which pages its guest never writes",
        ),
        (
            "abi",
            |facts, _| drop(facts.program.insert("abi".to_owned(), 9999.into())),
            "ABI 9999",
        ),
        (
            "cpu",
            |facts, _| facts.machine.cpu.vendor = "Nobody".to_owned(),
            "CPU of Nobody",
        ),
    ];
    for (name, change, why) in changes {
        forge(&place, name, change);
        let verified = place.on("verify", name, &[]);
        assert_exit(&verified, 0);
        let text = stdout(&verified);
        assert!(
            text.contains("note: ") && text.contains(why),
            "{name}: {text}"
        );
        let notes = json(&place.on("verify", name, &["--json"]));
        assert_eq!(notes[0]["wrong"], Value::Array(vec![]));
        assert!(
            notes[0]["notes"].to_string().contains(why),
            "{name}: {notes}"
        );
    }
}

/// Not by running it: KVM is asked whether it takes them.
#[test]
fn registers_that_cannot_be_set_here_are_no_load() {
    if no_kvm() || accel() == Accel::User {
        return;
    }
    let place = place();
    assert_exit(&place.save("warm", &[]), 0);
    assert_exit(&place.on("load", "warm", &[]), 0);
    forge(&place, "made-up", |_, parts| {
        let part = &mut parts[1];
        let saved = Saved::stored(part.version, part.bytes.clone());
        let state = VcpuState::of_saved(&saved).unwrap();
        let (regs, mut sregs) = (*state.regs(), *state.sregs());
        // No CPU has it.
        sregs.cr4 |= 1 << 63;
        part.bytes = Saved::new(state.with_registers(regs, sregs)).to_bytes();
    });
    for verb in ["load", "run"] {
        let refused = place.on(verb, "made-up", &[]);
        assert_exit(&refused, 1);
        assert!(
            stderr(&refused).contains("vcpu 1"),
            "{verb}: {}",
            all(&refused)
        );
    }
    assert!(stderr(&place.on("load", "made-up", &[])).contains("cannot be set here"));
}
