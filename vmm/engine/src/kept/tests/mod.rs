//! What is saved of memory and parts is what is loaded, increments among it; and what cannot run here is refused by
//! name. Whole VMs are in the program's `tests/kept.rs`.

mod lazy;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::store::{Compression, Cpu, Facts, Kept, Machine, Part, Saved, Store, StoreError, prune};
use super::*;
use crate::kvm::{Kvm, StateKind};
use crate::memory::{Frames, Memory};
use crate::mm::{Frozen, PAGE_SIZE};
use crate::saved;
use crate::snapshot::Snapshot;
use crate::user::User;

const REGION: u64 = 2 << 20;
/// Four regions and a bit.
const MEMORY: u64 = 4 * REGION + 3 * PAGE_SIZE;

struct Host {
    frames: Frames,
    memory: Memory,
}

fn host() -> Host {
    let frames = Frames::new(16 * REGION).unwrap();
    let memory = Memory::new(&frames, MEMORY).unwrap();
    Host { frames, memory }
}

impl Host {
    fn write(&self, gpa: u64, byte: u8, len: u64) {
        self.memory
            .ram()
            .write(gpa, &vec![byte; len as usize])
            .unwrap();
    }

    fn freeze(&self) -> Arc<Frozen> {
        self.memory.space().fork().unwrap()
    }

    fn all(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.ram().read(0, &mut bytes).unwrap();
        bytes
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(&dir.path().join("store")).unwrap();
    (dir, store)
}

fn snapshot(memory: Arc<Frozen>) -> Snapshot {
    let state = |version, byte| saved::Saved::stored(version, vec![byte; 3]);
    Snapshot::new(memory, vec![state(2, 1), state(2, 9)], vec![state(1, 4)])
}

fn machine_of_two() -> Machine {
    Machine {
        vcpus: 2,
        devices: 1,
        ..Machine::default()
    }
}

fn save(host: &Host, store: &Store, name: &str, base: Option<&Base>) -> Result<Saved, SaveError> {
    let snapshot = snapshot(host.freeze());
    let saver = Saver {
        store,
        name: name.parse().unwrap(),
        snapshot: &snapshot,
        frames: &host.frames,
        base,
        parent: None,
        compression: Compression::None,
        aside: None,
        most_a_second: None,
        facts: Facts {
            machine: machine_of_two(),
            ..Facts::default()
        },
        parts: vec![Part {
            name: "program".to_owned(),
            version: 7,
            bytes: vec![3],
        }],
    };
    saver.save(&mut |_| true)
}

fn read(store: &Store, name: &str) -> Kept {
    store.read(&name.parse().unwrap()).unwrap()
}

fn load(store: &Store, name: &str) -> (Host, Kept) {
    let (host, kept) = (host(), read(store, name));
    fill(&kept, host.memory.ram(), &mut |_| true).unwrap();
    (host, kept)
}

#[test]
fn what_is_saved_is_what_is_loaded_and_zeros_take_no_frames() {
    let (_dir, store) = store();
    let saved = host();
    saved.write(5, 7, 9000);
    saved.write(2 * REGION - 100, 8, 200);
    saved.write(MEMORY - 1, 9, 1);
    // Written, and zeros all the same.
    saved.write(3 * REGION, 0, REGION);
    let done = save(&saved, &store, "a", None).unwrap();
    // The last page of region 1 and the first of region 2 are in two.
    assert_eq!((done.written, done.zeros, done.same), (4, 1, 0));
    let (loaded, kept) = load(&store, "a");
    assert!(loaded.all() == saved.all());
    // Three regions are huge, the last is one page; what is all zeros is nowhere.
    assert_eq!(loaded.frames.pool().usage().in_use, 3 * 512 + 1);
    let frozen = loaded.freeze();
    let again = snapshot_of(&kept, frozen).unwrap();
    let states = |snapshot: &Snapshot| {
        let all = snapshot.vcpus().iter().chain(snapshot.devices());
        Vec::from_iter(all.map(|state| (state.version(), state.to_bytes())))
    };
    assert_eq!(states(&again), states(&snapshot(saved.freeze())));
    assert_eq!(kept.part("program").unwrap().bytes, [3]);
}

#[test]
fn an_increment_reads_what_was_written_since_and_is_whole() {
    let (_dir, store) = store();
    let first = host();
    for region in 0..4 {
        first.write(region * REGION, region as u8 + 1, REGION);
    }
    save(&first, &store, "a", None).unwrap();
    let (loaded, kept) = load(&store, "a");
    let base = Base::new(&kept, loaded.freeze());
    let snapshots = [loaded.freeze(), loaded.freeze()];
    loaded.write(REGION + 77, 99, 1);
    loaded.write(4 * REGION, 98, 1);
    let done = save(&loaded, &store, "b", Some(&base)).unwrap();
    assert_eq!((done.same, done.written, done.found), (3, 2, 0));
    drop(snapshots);
    let (again, kept) = load(&store, "b");
    assert!(again.all() == loaded.all());
    let parent = kept.manifest().parent.clone().unwrap();
    assert_eq!(&parent.name, base.name());
    assert_eq!(parent, read(&store, "a").as_parent());
    // A chunk that is gone is written once more: what is in it is here.
    let hash = read(&store, "a").index().get(0).unwrap().to_string();
    std::fs::remove_file(store.path().join("chunks").join(&hash[..2]).join(&hash)).unwrap();
    let done = save(&loaded, &store, "c", Some(&base)).unwrap();
    assert_eq!((done.same, done.written), (2, 1));
    assert!(load(&store, "c").0.all() == loaded.all());
}

/// What a store says is not made a flag that there is not.
#[test]
fn only_an_accelerator_that_there_is_is_advised() {
    let said = |theirs: &str| {
        let (theirs, ours) = (theirs.to_owned(), StateKind::Kvm);
        Refusal::Accelerator { theirs, ours }.to_string()
    };
    assert!(said("user").ends_with("; it runs on under user only"));
    assert!(said("foo").ends_with("they have not the same registers"));
}

/// What was loaded is here, whatever the store has of it.
#[test]
fn an_increment_of_what_was_dropped_meanwhile_is_whole() {
    let (_dir, store) = store();
    let first = host();
    first.write(0, 5, REGION);
    first.write(REGION, 4, REGION);
    save(&first, &store, "a", None).unwrap();
    let (loaded, kept) = load(&store, "a");
    let base = Base::new(&kept, loaded.freeze());
    let parent = kept.as_parent();
    drop(kept);
    loaded.write(77, 6, 1);
    prune(&store, &["a".parse().unwrap()], Duration::ZERO).unwrap();
    let done = save(&loaded, &store, "b", Some(&base)).unwrap();
    assert_eq!((done.same, done.written), (0, 2));
    let (again, kept) = load(&store, "b");
    assert!(again.all() == loaded.all());
    assert_eq!(kept.manifest().parent.as_ref(), Some(&parent));
}

/// Nor does it hand on what is damaged in the store.
#[test]
fn an_increment_mends_the_chunk_it_would_name() {
    let (_dir, store) = store();
    let first = host();
    first.write(0, 5, REGION);
    save(&first, &store, "a", None).unwrap();
    let (loaded, kept) = load(&store, "a");
    let base = Base::new(&kept, loaded.freeze());
    let hash = kept.index().get(0).unwrap().to_string();
    let chunk = store.path().join("chunks").join(&hash[..2]).join(&hash);
    let mut bytes = std::fs::read(&chunk).unwrap();
    bytes[77] ^= 1;
    std::fs::write(&chunk, bytes).unwrap();
    let done = save(&loaded, &store, "b", Some(&base)).unwrap();
    assert_eq!((done.same, done.written), (0, 1));
    assert!(load(&store, "b").0.all() == first.all());
    assert!(load(&store, "a").0.all() == first.all());
}

#[test]
fn a_save_that_is_called_off_leaves_no_name() {
    let (_dir, store) = store();
    let host = host();
    host.write(0, 1, MEMORY);
    let snapshot = snapshot(host.freeze());
    for after in 0..4 {
        let saver = Saver {
            store: &store,
            name: "a".parse().unwrap(),
            snapshot: &snapshot,
            frames: &host.frames,
            base: None,
            parent: None,
            compression: Compression::Zstd { level: 1 },
            aside: None,
            most_a_second: None,
            facts: Facts::default(),
            parts: Vec::new(),
        };
        let mut calls = 0;
        let called_off = saver.save(&mut |progress| {
            calls += 1;
            assert_eq!(progress.bytes, MEMORY);
            calls <= after
        });
        let error = called_off.unwrap_err();
        assert!(
            matches!(error, SaveError::Store(StoreError::CalledOff)),
            "{error}"
        );
        assert_eq!(store.names().unwrap(), []);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (_dir, store) = store();
    let saved = host();
    saved.write(0, 1, 1);
    save(&saved, &store, "a", None).unwrap();
    let kept = read(&store, "a");
    let small = Memory::new(&saved.frames, REGION).unwrap();
    let error = fill(&kept, small.ram(), &mut |_| true).unwrap_err();
    assert!(matches!(error, LoadError::Size { .. }), "{error}");
    // There is not a frame for it.
    let none = Frames::with_limit(64, 0, crate::host::Dumps::WithoutGuest);
    let none = Memory::new(&none.unwrap(), MEMORY);
    if let Ok(none) = none {
        let error = fill(&kept, none.ram(), &mut |_| true).unwrap_err();
        assert!(matches!(error, LoadError::Memory { gpa: 0, .. }), "{error}");
    }
}

/// Manifests that are whole, and say what is not so.
#[test]
fn parts_that_are_not_there_are_named() {
    let (_dir, store) = store();
    let host = host();
    let refused = |name: &str, machine: Machine| {
        let mut saving =
            store::Saving::begin(&store, &name.parse().unwrap(), MEMORY, Default::default())
                .unwrap();
        saving.region(0, &vec![1; REGION as usize]).unwrap();
        let facts = Facts {
            machine,
            ..Facts::default()
        };
        saving.finish(facts, &[]).unwrap();
        snapshot_of(&read(&store, name), host.freeze())
            .unwrap_err()
            .to_string()
    };
    let machine = Machine {
        devices: 0,
        ..machine_of_two()
    };
    assert!(refused("a", machine).contains("no part `vcpu/0`"));
    for (n, vcpus) in [0, 257, u32::MAX].into_iter().enumerate() {
        let machine = Machine {
            vcpus,
            ..machine_of_two()
        };
        assert!(refused(&format!("v{n}"), machine).contains("a machine has 1 to 256"));
    }
    let devices = u32::MAX;
    let machine = Machine {
        devices,
        ..machine_of_two()
    };
    assert!(refused("d", machine).contains("more than there are parts"));
}

#[test]
fn a_machine_runs_on_where_it_ran_and_what_is_missing_elsewhere_is_named() {
    let user = User::open().unwrap();
    let host = host();
    let ours = machine(&user, &Snapshot::new(host.freeze(), vec![], vec![]), 1000).unwrap();
    assert_eq!(ours.accelerator, StateKind::User.to_string());
    assert_eq!(check(&user, &ours, 1000).unwrap(), Vec::<String>::new());
    let notes = check(&user, &ours, 1100).unwrap();
    assert!(notes[0].contains("1000 kHz"), "{notes:?}");

    let refused = |change: &dyn Fn(&mut Machine)| {
        let mut theirs = ours.clone();
        change(&mut theirs);
        check(&user, &theirs, 1000).unwrap_err().to_string()
    };
    let other = refused(&|m| m.accelerator = "kvm".to_owned());
    assert!(
        other.contains("run by kvm, and here they would be by user"),
        "{other}"
    );
    let other = refused(&|m| m.cpu.vendor = "SomebodyElse".to_owned());
    assert!(other.contains("a CPU of SomebodyElse"), "{other}");
    let more = |m: &mut Machine| {
        drop(
            m.cpu
                .features
                .insert("24.0.eax".to_owned(), "0x3".to_owned()),
        )
    };
    let other = refused(&more);
    assert!(other.contains("bit 0 of cpuid 24.0.eax, bit 1"), "{other}");
    let other = refused(&|m| {
        m.cpu = Cpu {
            vendor: m.cpu.vendor.clone(),
            features: [("x".into(), "y".into())].into(),
            ..Cpu::default()
        }
    });
    assert!(other.contains("makes no sense"), "{other}");
}

#[test]
fn msrs_that_cannot_be_set_are_named() {
    let Some(kvm) = Kvm::open().ok() else {
        eprintln!("skipped: no KVM");
        return;
    };
    let host = host();
    let mut ours = machine(&kvm, &Snapshot::new(host.freeze(), vec![], vec![]), 0).unwrap();
    assert_eq!(check(&kvm, &ours, 0).unwrap(), Vec::<String>::new());
    ours.msrs = kvm.saved_msrs().unwrap();
    check(&kvm, &ours, 0).unwrap();
    ours.msrs.push(0xdead_beef);
    let error = check(&kvm, &ours, 0).unwrap_err();
    assert!(
        matches!(&error, Refusal::Msrs { missing } if missing == &[0xdead_beef]),
        "{error}"
    );
    assert!(error.to_string().ends_with("0xdeadbeef"), "{error}");
}

/// No faster than it is told, and called off at once all the same.
#[test]
fn a_save_keeps_the_pace_that_it_is_given() {
    let (_dir, store) = store();
    let host = host();
    host.write(0, 1, MEMORY);
    let snapshot = snapshot(host.freeze());
    let save = |name: &str, most: u64, watch: &mut dyn FnMut(&Progress) -> bool| {
        let saver = Saver {
            store: &store,
            name: name.parse().unwrap(),
            snapshot: &snapshot,
            frames: &host.frames,
            base: None,
            parent: None,
            compression: Compression::None,
            aside: None,
            most_a_second: NonZeroU64::new(most),
            facts: Facts::default(),
            parts: Vec::new(),
        };
        let began = Instant::now();
        (saver.save(watch), began.elapsed())
    };
    let (saved, took) = save("slow", 20 * REGION, &mut |_| true);
    saved.unwrap();
    // Four regions, at twenty a second.
    assert!(took >= Duration::from_millis(200), "{took:?}");
    // Hours, if it were not for the second look.
    let mut looks = 0;
    let (saved, _) = save("off", 1, &mut |_| {
        looks += 1;
        looks < 3
    });
    assert!(matches!(
        saved,
        Err(SaveError::Store(StoreError::CalledOff))
    ));
}
