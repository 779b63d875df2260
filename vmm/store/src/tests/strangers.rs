//! What is no store, no snapshot, or one of another version, and is left alone.

use std::time::Duration;

use super::saving::on_disk;
use super::*;
use crate::list::leftovers;
use crate::prune::prune;

#[test]
fn a_directory_of_somebody_else_is_no_store() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mine"), "x").unwrap();
    for open in [Store::open, Store::open_or_create] {
        let error = open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::NoStore { .. }), "{error}");
    }
    let (_dir, store) = on_disk();
    std::fs::write(
        store.path().join("store.json"),
        "{\"format\": \"palimpsest store\", \"version\": 2}",
    )
    .unwrap();
    let error = Store::open(store.path()).unwrap_err();
    assert!(matches!(error, StoreError::NoStore { .. }), "{error}");
}

/// What is in a store and not of it is taken away some time, or dropped as a snapshot.
#[test]
fn no_store_is_made_in_a_store() {
    let (dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let outer = std::fs::canonicalize(store.path()).unwrap();
    std::os::unix::fs::symlink(store.path().join("tmp"), dir.path().join("link")).unwrap();
    for nested in [
        "store/tmp",
        "store/x",
        "store/a/x",
        "store/../store/x",
        "link",
        "link/x",
    ] {
        let error = Store::open_or_create(&dir.path().join(nested)).unwrap_err();
        assert!(
            matches!(&error, StoreError::Nested { outer: of, .. } if *of == outer),
            "{nested}: {error}"
        );
        assert!(
            error
                .to_string()
                .contains(&format!("{}/NAME", outer.display()))
        );
    }
    assert!(leftovers(&store).unwrap().is_empty() && !store.path().join("x").exists());
    // Nor is one that is there taken for one.
    let other = dir.path().join("other");
    let moved = store.path().join("moved");
    Store::open_or_create(&other).unwrap();
    std::fs::rename(other, &moved).unwrap();
    let error = Store::open_or_create(&moved).unwrap_err();
    assert!(matches!(error, StoreError::Nested { .. }), "{error}");
    Store::open_or_create(&dir.path().join("beside")).unwrap();
    Store::open_or_create(store.path()).unwrap();
}

/// Only a directory that is not empty is a snapshot; only what was saved is dropped.
#[test]
fn what_is_no_snapshot_is_neither_listed_nor_dropped_nor_replaced() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let at = |name: &str| store.path().join(name);
    std::fs::create_dir(at("empty")).unwrap();
    std::fs::write(at("file"), "x").unwrap();
    std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
    assert_eq!(store.names().unwrap(), [name("a")]);
    assert_eq!(crate::list::list(&store).unwrap().len(), 1);
    let error = prune(&store, &[name("empty")], Duration::ZERO).unwrap_err();
    assert!(matches!(error, StoreError::NoSnapshot { .. }), "{error}");
    std::fs::create_dir(at("notes")).unwrap();
    std::fs::write(at("notes/mine"), "x").unwrap();
    let error = prune(&store, &[name("a"), name("notes")], Duration::ZERO).unwrap_err();
    assert!(
        matches!(&error, StoreError::InTheWay { path } if *path == at("notes")),
        "{error}"
    );
    assert!(at("notes/mine").exists() && at("a").exists());
    for taken in ["file", "link", "notes"] {
        let late = store.may_save(&name(taken)).unwrap_err();
        let error = save(&store, taken, &memory(1, 2)).unwrap_err();
        for error in [late, error] {
            assert!(matches!(error, StoreError::InTheWay { .. }), "{error}");
        }
    }
    let error = store.may_save(&name("a")).unwrap_err();
    assert!(matches!(error, StoreError::Exists { .. }), "{error}");
    // An empty one is in nobody's way.
    store.may_save(&name("empty")).unwrap();
    save(&store, "empty", &memory(3, 4)).unwrap();
    assert_eq!(load(&store, "empty").unwrap(), memory(3, 4));
}

/// By no verb: a link to a snapshot is none, and one in place of a file or a folder is not what it leads to.
#[test]
fn nothing_in_a_store_is_a_link() {
    let (dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let link = |from: &str, to: &std::path::Path| {
        let from = store.path().join(from);
        let aside = dir.path().join("aside");
        let _ = std::fs::rename(&from, &aside);
        std::os::unix::fs::symlink(to, &from).unwrap();
        move || {
            std::fs::remove_file(&from).unwrap();
            let _ = std::fs::rename(&aside, &from);
        }
    };
    let no_snapshot = |error: StoreError| matches!(error, StoreError::NoSnapshot { .. });
    let back = link("b", &store.path().join("a"));
    assert_eq!(store.names().unwrap(), [name("a")]);
    assert_eq!(crate::list::list(&store).unwrap().len(), 1);
    assert!(no_snapshot(store.read(&name("b")).unwrap_err()));
    assert!(no_snapshot(store.parent(&name("b")).unwrap_err()));
    assert!(no_snapshot(
        prune(&store, &[name("b")], Duration::ZERO).unwrap_err()
    ));
    let taken = save(&store, "b", &memory(1, 2)).unwrap_err();
    assert!(matches!(taken, StoreError::InTheWay { .. }), "{taken}");
    assert_eq!(wrong(&store, "b").len(), 1);
    back();
    // Files: where they have gone to they are as they were.
    let (_, chunk) = crate::list::chunk_paths(&store)
        .unwrap()
        .into_iter()
        .next()
        .unwrap();
    let chunk = chunk
        .strip_prefix(store.path())
        .unwrap()
        .display()
        .to_string();
    for file in ["a/snapshot.json", "a/memory", "a/state", &chunk] {
        let back = link(file, &dir.path().join("aside"));
        let error = load(&store, "a").unwrap_err();
        assert!(
            causes(&error).contains("it is a link"),
            "{file}: {}",
            causes(&error)
        );
        assert_eq!(wrong(&store, "a").len(), 1, "{file}");
        let listed = crate::list::list(&store).unwrap();
        let is_whole = |entry: &crate::list::Entry| {
            entry
                .found
                .as_ref()
                .is_ok_and(|(_, usage)| usage.missing == 0)
        };
        assert!(!is_whole(&listed[0]), "{file}");
        back();
    }
    let back = link("store.json", &dir.path().join("aside"));
    let error = Store::open(store.path()).unwrap_err();
    assert!(
        causes(&error).contains("it is a link"),
        "{}",
        causes(&error)
    );
    back();
    // Folders: nothing is read, written or collected there.
    let folder = chunk.rsplit_once('/').unwrap().0.to_owned();
    for folder in ["tmp", "chunks", &folder] {
        let back = link(folder, &dir.path().join("aside"));
        let is_link = |error: StoreError| matches!(&error, StoreError::Link { path } if path.ends_with(folder));
        assert!(is_link(load(&store, "a").unwrap_err()), "{folder}");
        assert!(
            is_link(save(&store, "c", &memory(1, 2)).unwrap_err()),
            "{folder}"
        );
        assert!(is_link(crate::list::list(&store).unwrap_err()), "{folder}");
        assert!(
            is_link(prune(&store, &[], Duration::ZERO).unwrap_err()),
            "{folder}"
        );
        assert!(is_link(wrong(&store, "a").remove(0)), "{folder}");
        back();
    }
    assert_eq!(load(&store, "a").unwrap(), memory(1, 2));
    // The way to a store is not in it.
    std::os::unix::fs::symlink(store.path(), dir.path().join("way")).unwrap();
    let store = Store::open(&dir.path().join("way")).unwrap();
    save(&store, "c", &memory(1, 2)).unwrap();
    assert_eq!(load(&store, "c").unwrap(), memory(1, 2));
}

fn causes(error: &StoreError) -> String {
    let source = std::error::Error::source(error);
    format!(
        "{error}: {}",
        source.map(ToString::to_string).unwrap_or_default()
    )
}

/// It is not damaged: who has a later program can read it.
#[test]
fn a_snapshot_of_a_later_version_is_refused_by_that() {
    let (_dir, store) = on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let path = store.path().join("a/snapshot.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
    let error = store.read(&name("a")).unwrap_err();
    let why = std::error::Error::source(&error).unwrap().to_string();
    assert!(error.to_string().ends_with("cannot be read"), "{error}");
    assert!(why.starts_with("it is version 2"), "{why}");
}
