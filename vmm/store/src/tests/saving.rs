//! What is saved is what is loaded; chunks are shared; others may use the store meanwhile.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::disk::Host;
use crate::hash::Hash;
use crate::list::{chunk_paths, leftovers};
use crate::prune::prune;
use crate::store::locate;

pub(super) fn on_disk() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(&dir.path().join("store")).unwrap();
    (dir, store)
}

#[test]
fn what_is_saved_is_what_is_loaded() {
    let (_dir, store) = on_disk();
    for (named, options) in [("plain", SaveOptions::default()), ("zstd", zstd())] {
        let saved = save_with(&store, named, &memory(named.len() as u8, 7), options).unwrap();
        assert_eq!(saved.written + saved.found, 2);
        assert_eq!(load(&store, named).unwrap(), memory(named.len() as u8, 7));
        assert!(wrong(&store, named).is_empty());
    }
    assert_eq!(store.names().unwrap(), [name("plain"), name("zstd")]);
    // It is another store that is opened.
    let again = Store::open(store.path()).unwrap();
    assert_eq!(load(&again, "plain").unwrap(), memory(5, 7));
    assert!(leftovers(&store).unwrap().is_empty());
}

#[test]
fn equal_chunks_are_one_and_zeros_take_nothing() {
    let (_dir, store) = on_disk();
    let first = save(&store, "a", &memory(1, 2)).unwrap();
    assert_eq!((first.written, first.found), (2, 0));
    // Pages of zeros are holes: three pages and two are not.
    assert_eq!(first.bytes_written, 5 * 4096);
    let second = save(&store, "b", &memory(1, 3)).unwrap();
    assert_eq!((second.written, second.found), (1, 1));
    // Compressed or not, it is there.
    let third = save_with(&store, "c", &memory(1, 2), zstd()).unwrap();
    assert_eq!((third.written, third.found), (0, 2));
    let none = save(&store, "d", &memory(0, 0)).unwrap();
    assert_eq!((none.zeros, none.written, none.found), (2, 0, 0));
    assert_eq!(load(&store, "d").unwrap(), memory(0, 0));
    assert_eq!(chunk_paths(&store).unwrap().len(), 3);
    let entries = crate::list::list(&store).unwrap();
    let own: Vec<_> = entries
        .iter()
        .map(|entry| entry.found.as_ref().unwrap().1.own_bytes > 0)
        .collect();
    assert_eq!(own, [false, true, false, false]);
}

#[test]
fn two_equal_regions_of_one_snapshot_are_one_chunk() {
    let (_dir, store) = on_disk();
    let content = vec![9; CHUNK_BYTES as usize];
    let mut saving =
        Saving::begin(&store, &name("a"), 3 * CHUNK_BYTES, SaveOptions::default()).unwrap();
    saving.region(0, &content).unwrap();
    saving.region(2, &content).unwrap();
    let saved = saving.finish(Facts::default(), &[]).unwrap();
    assert_eq!((saved.written, saved.found), (1, 1));
    assert!(wrong(&store, "a").is_empty());
}

#[test]
fn an_increment_takes_the_parents_chunks_unread_and_stands_alone() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let parent = store.read(&name("a")).unwrap();
    let options = SaveOptions {
        parent: Some(store.parent(&name("a")).unwrap()),
        ..SaveOptions::default()
    };
    let mut saving = Saving::begin(&store, &name("b"), MEMORY, options).unwrap();
    let gone = Hash::of(b"nobody has it");
    assert!(!saving.same(0, gone).unwrap());
    assert!(saving.same(0, parent.index().get(0).unwrap()).unwrap());
    saving.region(1, &memory(1, 9)[&1]).unwrap();
    let saved = saving.finish(Facts::default(), &parts()).unwrap();
    assert_eq!((saved.same, saved.written, saved.found), (1, 1, 0));
    let child = store.read(&name("b")).unwrap();
    let named = child.manifest().parent.clone().unwrap();
    assert_eq!((named.name, named.blake3), (name("a"), parent.hash()));
    drop((parent, child));
    // It needs its parent for nothing.
    let pruned = prune(&store, &[name("a")], Duration::ZERO).unwrap();
    assert_eq!((pruned.chunks, pruned.kept), (1, 2));
    assert_eq!(load(&store, "b").unwrap(), memory(1, 9));
    let error = store.parent(&name("a")).unwrap_err();
    assert!(matches!(error, StoreError::NoSnapshot { .. }), "{error}");
}

/// Whoever has loaded it knows what it was. Another may have its name meanwhile, or none.
#[test]
fn a_parent_is_what_was_loaded_and_need_not_be_there_any_more() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let loaded = store.read(&name("a")).unwrap().as_parent();
    assert_eq!(store.parent(&name("a")).unwrap(), loaded);
    prune(&store, &[name("a")], Duration::ZERO).unwrap();
    for named in ["orphan", "of-another"] {
        let options = SaveOptions {
            parent: Some(loaded.clone()),
            ..SaveOptions::default()
        };
        save_with(&store, named, &memory(1, 9), options).unwrap();
        let child = store.read(&name(named)).unwrap();
        assert_eq!(child.manifest().parent.as_ref(), Some(&loaded));
        assert!(wrong(&store, named).is_empty());
        drop(child);
        if named == "orphan" {
            save(&store, "a", &memory(5, 6)).unwrap();
            assert_ne!(store.parent(&name("a")).unwrap(), loaded);
        }
    }
}

#[test]
fn names_that_are_there_are_refused_early_and_late() {
    let (_dir, store) = on_disk();
    let late = Saving::begin(&store, &name("a"), MEMORY, SaveOptions::default()).unwrap();
    save(&store, "a", &memory(1, 2)).unwrap();
    let error = save(&store, "a", &memory(3, 4)).unwrap_err();
    assert!(matches!(error, StoreError::Exists { .. }), "{error}");
    let error = late.finish(Facts::default(), &[]).unwrap_err();
    assert!(matches!(error, StoreError::Exists { .. }), "{error}");
    assert_eq!(load(&store, "a").unwrap(), memory(1, 2));
    assert!(leftovers(&store).unwrap().is_empty());
}

#[test]
fn regions_out_of_order_or_of_another_length_are_refused() {
    let (_dir, store) = on_disk();
    let mut saving = Saving::begin(&store, &name("a"), MEMORY, SaveOptions::default()).unwrap();
    saving.region(1, &[1; 2 * 4096]).unwrap();
    for (region, bytes) in [(0, CHUNK_BYTES), (1, 2 * 4096), (2, 4096), (u64::MAX, 0)] {
        let error = saving.region(region, &vec![1; bytes as usize]).unwrap_err();
        assert!(matches!(error, StoreError::NotOfFormat { .. }), "{error}");
    }
    for memory in [0, 4095, 4097, u64::MAX] {
        let error = Saving::begin(&store, &name("b"), memory, SaveOptions::default()).unwrap_err();
        assert!(matches!(error, StoreError::NotOfFormat { .. }), "{error}");
    }
}

#[test]
fn a_save_that_is_given_up_leaves_nothing_and_one_that_is_killed_what_prune_collects() {
    let (_dir, store) = on_disk();
    let begin = |named: &str| {
        let mut saving =
            Saving::begin(&store, &name(named), MEMORY, SaveOptions::default()).unwrap();
        saving.region(0, &memory(1, 2)[&0]).unwrap();
        saving
    };
    drop(begin("a"));
    assert!(leftovers(&store).unwrap().is_empty());
    // As if it had been killed.
    std::fs::create_dir(store.path().join("tmp/b.1-2-3")).unwrap();
    std::fs::write(store.path().join("tmp/b.1-2-3/chunk-0"), "half").unwrap();
    let pruned = prune(&store, &[], Duration::ZERO).unwrap();
    assert_eq!((pruned.leftovers, pruned.dropped.len()), (1, 0));
    assert!(leftovers(&store).unwrap().is_empty());
}

/// What a link in `tmp` leads to is not the store's.
#[test]
fn links_are_not_followed() {
    let (dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let mine = dir.path().join("mine");
    std::fs::create_dir(&mine).unwrap();
    std::fs::write(mine.join("file"), "x").unwrap();
    std::os::unix::fs::symlink(&mine, store.path().join("tmp/link")).unwrap();
    std::os::unix::fs::symlink(&mine, store.path().join("linked")).unwrap();
    prune(&store, &[], Duration::ZERO).unwrap();
    assert!(mine.join("file").exists());
    assert!(!store.path().join("tmp/link").exists());
    assert_eq!(store.names().unwrap(), [name("a")]);
}

#[test]
fn nobody_collects_while_others_read_or_write() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let busy = || prune(&store, &[name("a")], Duration::ZERO).unwrap_err();
    let kept = store.read(&name("a")).unwrap();
    assert!(matches!(busy(), StoreError::Busy { .. }));
    drop(kept);
    let saving = Saving::begin(&store, &name("b"), MEMORY, SaveOptions::default()).unwrap();
    assert!(matches!(busy(), StoreError::Busy { .. }));
    drop(saving);
    prune(&store, &[name("a")], Duration::ZERO).unwrap();
    assert_eq!(store.names().unwrap(), []);
    let error = prune(&store, &[name("a")], Duration::ZERO).unwrap_err();
    assert!(matches!(error, StoreError::NoSnapshot { .. }), "{error}");
}

#[test]
fn nothing_is_collected_while_it_is_not_known_what_is_wanted() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    save(&store, "b", &memory(3, 4)).unwrap();
    std::fs::write(store.path().join("a/memory"), "no index").unwrap();
    let error = prune(&store, &[], Duration::ZERO).unwrap_err();
    assert!(
        matches!(&error, StoreError::Unknown { snapshot, .. } if snapshot == "a"),
        "{error}"
    );
    assert_eq!(chunk_paths(&store).unwrap().len(), 4);
    let pruned = prune(&store, &[name("a")], Duration::ZERO).unwrap();
    assert_eq!((pruned.chunks, pruned.kept), (2, 2));
    assert!(wrong(&store, "b").is_empty());
}

/// A chunk that is damaged is not named once more: who has the right bytes writes them.
#[test]
fn a_damaged_chunk_is_written_anew_by_who_has_its_content() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let (_, path) = chunk_paths(&store).unwrap().into_iter().next().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(wrong(&store, "a").len(), 1);
    let store = Store::open(store.path()).unwrap();
    let saved = save(&store, "b", &memory(1, 2)).unwrap();
    assert_eq!((saved.written, saved.found), (1, 1));
    assert!(wrong(&store, "a").is_empty() && wrong(&store, "b").is_empty());
}

/// Nor is it by an increment, which knows it by name only: plain or compressed, changed, cut or of another length.
#[test]
fn an_increment_does_not_name_a_damaged_chunk() {
    for options in [SaveOptions::default, zstd] {
        for damage in 0..3 {
            let (_dir, store) = on_disk();
            save_with(&store, "a", &memory(1, 2), options()).unwrap();
            let hash = store.read(&name("a")).unwrap().index().get(0).unwrap();
            let paths = chunk_paths(&store).unwrap();
            let (_, path) = paths.into_iter().find(|(of, _)| *of == hash).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            match damage {
                0 => bytes[middle] ^= 1,
                1 => bytes.truncate(middle),
                _ => bytes.push(0),
            }
            std::fs::write(&path, bytes).unwrap();
            // Another process, which knows nothing of it.
            let store = Store::open(store.path()).unwrap();
            let mut saving = Saving::begin(&store, &name("b"), 2 * CHUNK_BYTES, options()).unwrap();
            assert!(!saving.same(0, hash).unwrap(), "{damage}");
            saving.region(0, &memory(1, 2)[&0]).unwrap();
            // It is right now, and need not be read again.
            assert!(saving.same(1, hash).unwrap());
            let saved = saving.finish(Facts::default(), &parts()).unwrap();
            assert_eq!((saved.written, saved.same), (1, 1), "{damage}");
            assert!(wrong(&store, "b").is_empty(), "{damage}");
            assert!(wrong(&store, "a").is_empty(), "{damage}");
        }
    }
}

/// A record of a whole region cannot have a shorter one's chunk, whatever was read before.
#[test]
fn a_chunk_of_another_length_is_not_named() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let kept = store.read(&name("a")).unwrap();
    let [whole, short] = [0, 1].map(|region| kept.index().get(region).unwrap());
    let mut saving = Saving::begin(&store, &name("b"), MEMORY, SaveOptions::default()).unwrap();
    assert!(!saving.same(0, short).unwrap());
    assert!(saving.same(0, whole).unwrap());
    assert!(!saving.same(1, whole).unwrap());
    assert!(saving.same(1, short).unwrap());
}

#[test]
fn differences_are_found_by_page() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    save(&store, "b", &memory(5, 2)).unwrap();
    let [a, b] = ["a", "b"].map(|named| store.read(&name(named)).unwrap());
    let found = crate::diff::diff(&a, &b, &mut |_, _| true).unwrap();
    assert_eq!((found.same, found.regions, found.pages), (1, vec![0], 3));
    assert!(found.parts.is_empty());
    let none = crate::diff::diff(&a, &a, &mut |_, _| true).unwrap();
    assert_eq!((none.same, none.regions.len()), (2, 0));
    let off = crate::diff::diff(&a, &b, &mut |_, _| false).unwrap_err();
    assert!(matches!(off, StoreError::CalledOff), "{off}");
}

#[test]
fn a_path_is_a_store_and_a_name() {
    let located = |path: &str| {
        locate(Path::new(path)).map(|(store, name)| (store.display().to_string(), name.to_string()))
    };
    let of = |store: &str, name: &str| (store.to_owned(), name.to_owned());
    assert_eq!(located("s/a").unwrap(), of("s", "a"));
    assert_eq!(located("/x/s/a/").unwrap(), of("/x/s", "a"));
    assert_eq!(located("./a").unwrap(), of(".", "a"));
    let bare = located("a").unwrap_err().to_string();
    assert!(bare.contains("say STORE/a"), "{bare}");
    for none in ["", "/", "..", "s/..", "s/chunks", "s/a b"] {
        assert!(located(none).is_err(), "{none}");
    }
    for none in ["/", "..", "s/.."] {
        let error = located(none).unwrap_err().to_string();
        assert!(error.starts_with(&format!("`{none}` cannot")), "{error}");
    }
}

#[test]
fn files_are_their_owners() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o077;
    let (_, chunk) = chunk_paths(&store).unwrap().into_iter().next().unwrap();
    for path in [store.path(), &chunk, &store.path().join("a/state")] {
        assert_eq!(mode(path), 0, "{}", path.display());
    }
    let _: Arc<dyn Disk> = Arc::new(Host);
}
