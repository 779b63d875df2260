//! The power lost at each operation in turn, with what was not made durable lost, half lost, or in another order:
//! the store needs no repair, what has a final name is whole, and no chunk is lost that somebody names.

use std::sync::Arc;
use std::time::Duration;

use super::faulty::{EIO, Fault, FaultyDisk};
use super::memory::{Cut, MemoryDisk};
use super::*;
use crate::list::{chunk_paths, leftovers};
use crate::prune::prune;

fn cuts() -> impl Iterator<Item = Cut> {
    let by_chance = (0..3_u64).map(|seed| Cut::ByChance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    [Cut::Lost, Cut::NamesKept].into_iter().chain(by_chance)
}

/// Has `job` lose its power at each of its operations, on what `make` makes, and `look` at what is left.
fn walk(
    make: impl Fn() -> MemoryDisk,
    job: impl Fn(Arc<dyn Disk>) -> Result<(), StoreError>,
    look: impl Fn(&Store, bool, &str),
) {
    for at in 0.. {
        let disk = make();
        // A dead machine does nothing any more, not even take away what it has begun.
        let faulty = FaultyDisk::new(&disk, at, Fault::Always(EIO));
        let is_done = job(Arc::clone(&faulty) as _).is_ok();
        for cut in cuts() {
            let left = disk.after(cut);
            let what = format!("{cut:?} at {at}");
            let store = store_on(&(Arc::new(left) as Arc<dyn Disk>));
            look(&store.unwrap(), is_done, &what);
        }
        if !faulty.has_failed() {
            break;
        }
    }
}

fn with_a() -> MemoryDisk {
    let disk = MemoryDisk::new();
    let store = store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap();
    save(&store, "a", &memory(1, 2)).unwrap();
    disk
}

#[test]
fn while_a_store_is_made_and_first_saved_to() {
    walk(
        MemoryDisk::new,
        |disk| save(&store_on(&disk)?, "a", &memory(1, 2)).map(drop),
        |store, is_done, what| {
            if is_done || store.names().unwrap() == [name("a")] {
                assert_eq!(load(store, "a").unwrap(), memory(1, 2), "{what}");
            } else {
                save(store, "a", &memory(1, 2)).unwrap();
            }
            assert!(wrong(store, "a").is_empty(), "{what}");
        },
    );
}

#[test]
fn while_an_increment_is_saved() {
    walk(
        with_a,
        |disk| {
            let store = store_on(&disk)?;
            let options = SaveOptions {
                parent: Some(store.parent(&name("a"))?),
                ..SaveOptions::default()
            };
            let mut saving = Saving::begin(&store, &name("b"), MEMORY, options)?;
            let same = store.read(&name("a"))?.index().get(0).unwrap();
            // A disk that is dead gives nothing, and takes nothing either.
            if !saving.same(0, same)? {
                saving.region(0, &memory(1, 2)[&0])?;
            }
            saving.region(1, &memory(1, 3)[&1])?;
            saving.finish(Facts::default(), &parts()).map(drop)
        },
        |store, is_done, what| {
            assert_eq!(load(store, "a").unwrap(), memory(1, 2), "{what}");
            let has_b = store.names().unwrap().contains(&name("b"));
            assert!(has_b || !is_done, "{what}: it was said to be durable");
            let prunes = prune(store, &[], Duration::ZERO).unwrap();
            assert_eq!(prunes.kept, 2 + u64::from(has_b), "{what}");
            assert!(leftovers(store).unwrap().is_empty(), "{what}");
            if !has_b {
                save(store, "b", &memory(1, 3)).unwrap();
            }
            assert_eq!(load(store, "b").unwrap(), memory(1, 3), "{what}");
            assert_eq!(load(store, "a").unwrap(), memory(1, 2), "{what}");
        },
    );
}

/// Who names a chunk that another has written, and not made durable, makes it so.
#[test]
fn a_chunk_of_a_save_that_did_not_end_is_durable_for_who_names_it() {
    let disk = with_a();
    let store = store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap();
    let mut unfinished = Saving::begin(&store, &name("b"), MEMORY, SaveOptions::default()).unwrap();
    unfinished.region(0, &memory(8, 9)[&0]).unwrap();
    unfinished.region(1, &memory(8, 9)[&1]).unwrap();
    // It has named its chunks, and no more.
    unfinished.name_for_test();
    save(&store, "c", &memory(8, 9)).unwrap();
    for cut in cuts() {
        let left = store_on(&(Arc::new(disk.after(cut)) as Arc<dyn Disk>)).unwrap();
        assert_eq!(load(&left, "c").unwrap(), memory(8, 9), "{cut:?}");
    }
}

#[test]
fn while_a_snapshot_is_dropped_and_its_chunks_are_collected() {
    walk(
        || {
            let disk = with_a();
            let store = store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap();
            save(&store, "b", &memory(1, 3)).unwrap();
            disk
        },
        |disk| prune(&store_on(&disk)?, &[name("a")], Duration::ZERO).map(drop),
        |store, is_done, what| {
            assert_eq!(load(store, "b").unwrap(), memory(1, 3), "{what}");
            // What is still there by its name is whole.
            if store.names().unwrap().contains(&name("a")) {
                assert!(!is_done, "{what}");
                assert_eq!(load(store, "a").unwrap(), memory(1, 2), "{what}");
            }
            prune(store, &[], Duration::ZERO).unwrap();
            assert_eq!(load(store, "b").unwrap(), memory(1, 3), "{what}");
            assert!(chunk_paths(store).unwrap().len() <= 3, "{what}");
        },
    );
}
