//! Each operation on files refused in turn, by every error and in part: what was asked for fails with a reason
//! that names a file, or is done; nothing has a final name that is not whole; nothing is lost that was there; and
//! the next one who tries finds the way free.

use std::sync::Arc;
use std::time::Duration;

use super::faulty::{EIO, ENOSPC, EROFS, Fault, FaultyDisk};
use super::memory::MemoryDisk;
use super::*;
use crate::list::{chunk_paths, leftovers, list};
use crate::prune::prune;

const FAULTS: [Fault; 6] = [
    Fault::Once(EIO),
    Fault::Once(ENOSPC),
    Fault::Always(EIO),
    Fault::Always(ENOSPC),
    Fault::Always(EROFS),
    Fault::Short,
];

/// A disk with a store and a snapshot `a` in it.
fn with_a() -> (MemoryDisk, Store) {
    let disk = MemoryDisk::new();
    let store = store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap();
    save(&store, "a", &memory(1, 2)).unwrap();
    (disk, store)
}

/// Does `job` with its k-th operation refused, for all k, and has `look` look at what comes of it each time.
fn walk<T>(
    make: impl Fn() -> MemoryDisk,
    job: impl Fn(Arc<dyn Disk>) -> Result<T, StoreError>,
    look: impl Fn(&MemoryDisk, Result<T, StoreError>, &str),
) {
    for fault in FAULTS {
        let mut refused = 0;
        for at in 0.. {
            let disk = make();
            let faulty = FaultyDisk::new(&disk, at, fault);
            let done = job(Arc::clone(&faulty) as _);
            let what = format!("{fault:?} at {at}");
            if let Err(error) = &done {
                refused += 1;
                let text = chain(error);
                assert!(text.contains('/'), "{what}: {text} names no file");
                assert_ne!(fault, Fault::Short, "{what}: {text}");
            }
            look(&disk, done, &what);
            if !faulty.has_failed() {
                break;
            }
        }
        let is_refused = refused > 3;
        assert_eq!(is_refused, fault != Fault::Short, "{fault:?}: {refused}");
    }
}

/// An error, and what has led to it.
fn chain(error: &dyn std::error::Error) -> String {
    let source = error.source().map(|source| format!(": {}", chain(source)));
    format!("{error}{}", source.unwrap_or_default())
}

fn whole(disk: &MemoryDisk) -> Store {
    store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap()
}

#[test]
fn making_a_store() {
    walk(
        MemoryDisk::new,
        |disk| store_on(&disk),
        |disk, _, what| {
            let store = whole(disk);
            save(&store, "a", &memory(1, 2)).unwrap();
            assert_eq!(load(&store, "a").unwrap(), memory(1, 2), "{what}");
        },
    );
}

#[test]
fn saving() {
    for options in [SaveOptions::default, zstd] {
        walk(
            || with_a().0,
            |disk| save_with(&store_on(&disk)?, "b", &memory(1, 3), options()),
            |disk, saved, what| {
                let store = whole(disk);
                assert_eq!(load(&store, "a").unwrap(), memory(1, 2), "{what}");
                match (&saved, store.read(&name("b"))) {
                    (_, Ok(_)) => assert_eq!(load(&store, "b").unwrap(), memory(1, 3), "{what}"),
                    (Err(_), Err(StoreError::NoSnapshot { .. })) => {
                        save(&store, "b", &memory(1, 3)).unwrap();
                    }
                    (_, Err(error)) => panic!("{what}: {error}"),
                }
                assert!(wrong(&store, "b").is_empty(), "{what}");
                prune(&store, &[], Duration::ZERO).unwrap();
                assert!(leftovers(&store).unwrap().is_empty(), "{what}");
                assert_eq!(chunk_paths(&store).unwrap().len(), 3, "{what}");
                assert_eq!(load(&store, "b").unwrap(), memory(1, 3), "{what}");
            },
        );
    }
}

/// One refusal alone, whose traces can be taken away, leaves none.
#[test]
fn a_save_that_is_refused_once_leaves_no_name_and_no_file() {
    for at in 0.. {
        let (disk, _) = with_a();
        let faulty = FaultyDisk::new(&disk, at, Fault::Once(ENOSPC));
        let store = store_on(&(Arc::clone(&faulty) as Arc<dyn Disk>));
        let saved = store.and_then(|store| save(&store, "b", &memory(1, 3)));
        if !faulty.has_failed() {
            break;
        }
        if saved.is_err() {
            let store = whole(&disk);
            assert_eq!(store.names().unwrap(), [name("a")], "{at}");
            assert!(leftovers(&store).unwrap().is_empty(), "{at}");
        }
    }
}

#[test]
fn looking_whether_a_save_may_begin() {
    walk(
        || with_a().0,
        |disk| store_on(&disk)?.may_save(&name("b")),
        |disk, _, what| {
            let store = whole(disk);
            assert_eq!(store.names().unwrap(), [name("a")], "{what}");
            prune(&store, &[], Duration::ZERO).unwrap();
            assert!(leftovers(&store).unwrap().is_empty(), "{what}");
        },
    );
    // What is found at once is what a save would find late.
    let (disk, store) = with_a();
    store.may_save(&name("b")).unwrap();
    assert!(leftovers(&store).unwrap().is_empty());
    let error = store.may_save(&name("a")).unwrap_err();
    assert!(matches!(error, StoreError::Exists { .. }), "{error}");
    let mut refused = 0;
    for at in 0.. {
        let faulty = FaultyDisk::new(&disk, at, Fault::Always(EROFS));
        let store = Store::open_on(Path::new("/store"), Arc::clone(&faulty) as _);
        match store.and_then(|store| store.may_save(&name("b"))) {
            Ok(()) => break,
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 4, "{refused}");
}

#[test]
fn reading() {
    walk(
        || with_a().0,
        |disk| {
            let store = store_on(&disk)?;
            store.names()?;
            load(&store, "a")
        },
        |_, loaded, what| {
            if let Ok(loaded) = loaded {
                assert_eq!(loaded, memory(1, 2), "{what}");
            }
        },
    );
}

#[test]
fn looking() {
    walk(
        || {
            let (disk, store) = with_a();
            save(&store, "b", &memory(1, 3)).unwrap();
            disk
        },
        |disk| {
            let store = store_on(&disk)?;
            let verified = verify(&store, &name("a"), &mut HashSet::new(), &mut |_, _| true)?;
            verified.wrong.into_iter().next().map_or(Ok(()), Err)?;
            let entries = list(&store)?;
            assert_eq!(entries.len(), 2);
            for entry in entries {
                entry.found?;
            }
            let [a, b] = [store.read(&name("a"))?, store.read(&name("b"))?];
            crate::diff::diff(&a, &b, &mut |_, _| true)
        },
        |_, found, what| {
            if let Ok(found) = found {
                assert_eq!((found.same, found.pages), (1, 2), "{what}");
            }
        },
    );
}

#[test]
fn pruning() {
    walk(
        || {
            let (disk, store) = with_a();
            save(&store, "b", &memory(1, 3)).unwrap();
            disk.make_dir(Path::new("/store/tmp/killed")).unwrap();
            disk.create(Path::new("/store/tmp/killed/chunk-0")).unwrap();
            disk
        },
        |disk| prune(&store_on(&disk)?, &[name("a")], Duration::ZERO),
        |disk, pruned, what| {
            let store = whole(disk);
            assert_eq!(load(&store, "b").unwrap(), memory(1, 3), "{what}");
            if pruned.is_err() {
                let rest = store
                    .names()
                    .unwrap()
                    .into_iter()
                    .filter(|there| *there == name("a"));
                for there in rest {
                    assert!(wrong(&store, there.as_str()).is_empty(), "{what}");
                }
                prune(&store, &[], Duration::ZERO).unwrap();
            }
            assert!(wrong(&store, "b").is_empty(), "{what}");
            assert!(leftovers(&store).unwrap().is_empty(), "{what}");
        },
    );
}

/// Advice that cannot be written leaves what was there before, or none; the snapshot is whole, and read as it was.
#[test]
fn advice_that_is_refused_harms_nothing() {
    let before = [1, 0];
    let make = || {
        let (disk, store) = with_a();
        store
            .read(&name("a"))
            .unwrap()
            .note_touched(&before)
            .unwrap();
        disk
    };
    walk(
        make,
        |disk| store_on(&disk)?.read(&name("a"))?.note_touched(&[0]),
        |disk, done, what| {
            let store = store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap();
            let kept = store.read(&name("a")).unwrap();
            let (touched, known) = (kept.touched(), kept.index().get(0).is_some());
            let (old, new) = match known {
                true => (vec![1, 0], vec![0]),
                false => (vec![1], vec![]),
            };
            match done {
                Ok(()) => assert_eq!(touched, new, "{what}"),
                Err(_) => assert!(touched == old || touched == new, "{what}: {touched:?}"),
            }
            let mut content = vec![0; crate::CHUNK_BYTES as usize];
            for (region, _) in kept.index().iter() {
                let bytes = kept.index().region_bytes(region) as usize;
                assert!(
                    kept.region(region, &mut content[..bytes]).unwrap(),
                    "{what}"
                );
            }
        },
    );
}

/// A reader whose disk refuses to give the advice does without.
#[test]
fn advice_that_cannot_be_read_is_none() {
    for fault in FAULTS {
        for at in 0..6 {
            let (disk, store) = with_a();
            let kept = store.read(&name("a")).unwrap();
            kept.note_touched(&[0, 1]).unwrap();
            let told = kept.touched();
            assert!(!told.is_empty());
            let faulty = FaultyDisk::new(&disk, at, fault);
            let Ok(kept) = store_on(&(Arc::clone(&faulty) as Arc<dyn Disk>))
                .and_then(|store| store.read(&name("a")))
            else {
                continue;
            };
            let touched = kept.touched();
            assert!(touched == told || touched.is_empty(), "{fault:?} at {at}");
        }
    }
}
