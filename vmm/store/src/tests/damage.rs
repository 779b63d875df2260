//! Every byte of a small snapshot changed, and every file of it cut at every length: an error, or nothing that
//! matters. Never other bytes than were saved.

use std::path::{Path, PathBuf};

use super::*;

/// A snapshot of one small region, and all of its files.
fn small(options: SaveOptions) -> (tempfile::TempDir, Store, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(&dir.path().join("store")).unwrap();
    let mut saving = Saving::begin(&store, &name("a"), 4096, options).unwrap();
    saving.region(0, &content()).unwrap();
    saving.finish(Facts::default(), &parts()).unwrap();
    let mut files = Vec::new();
    collect(store.path(), &mut files);
    assert_eq!(files.len(), 5, "{files:?}");
    (dir, store, files)
}

/// What compresses a bit.
fn content() -> Vec<u8> {
    (0..4096_u32).map(|n| (n * n / 7) as u8 & 0xf3).collect()
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => collect(&path, files),
            false => files.push(path),
        }
    }
}

/// What comes of reading it: an error that names a file, or just what was saved.
fn read(path: &Path) -> Result<(), StoreError> {
    let store = Store::open(path)?;
    let kept = store.read(&name("a"))?;
    let mut found = vec![0; 4096];
    kept.region(0, &mut found)?;
    assert!(found == content(), "other bytes than were saved");
    assert_eq!(kept.parts(), parts());
    Ok(())
}

fn check(store: &Store, file: &Path, what: &str, harmless: &mut u64) {
    match read(store.path()) {
        Ok(()) => *harmless += 1,
        Err(error) => {
            let text = error.to_string();
            let names = text.contains(&file.display().to_string())
                || text.contains(&store.path().display().to_string());
            assert!(names, "{what}: {text}");
        }
    }
}

fn change_each_byte(options: SaveOptions) -> u64 {
    let (_dir, store, files) = small(options);
    let mut harmless = 0;
    for file in files {
        let right = std::fs::read(&file).unwrap();
        for at in 0..right.len() {
            let mut changed = right.clone();
            changed[at] ^= 1 << (at % 8);
            std::fs::write(&file, &changed).unwrap();
            check(&store, &file, &format!("byte {at}"), &mut harmless);
        }
        std::fs::write(&file, &right).unwrap();
        read(store.path()).unwrap();
    }
    harmless
}

fn cut_each_length(options: SaveOptions) {
    let (_dir, store, files) = small(options);
    for file in files {
        let right = std::fs::read(&file).unwrap();
        let mut harmless = 0;
        for at in 0..right.len() {
            std::fs::write(&file, &right[..at]).unwrap();
            check(&store, &file, &format!("cut at {at}"), &mut harmless);
        }
        assert_eq!(harmless, 0, "{}", file.display());
        for longer in [&right[..], b"\0"]
            .concat()
            .repeat(2)
            .chunks(right.len() + 1)
            .take(1)
        {
            std::fs::write(&file, longer).unwrap();
            check(&store, &file, "longer", &mut harmless);
        }
        std::fs::remove_file(&file).unwrap();
        let error = read(store.path()).unwrap_err();
        assert!(!error.to_string().is_empty());
        std::fs::write(&file, &right).unwrap();
        read(store.path()).unwrap();
    }
}

#[test]
fn every_changed_byte_is_found() {
    assert_eq!(change_each_byte(SaveOptions::default()), 0);
}

/// Some bits of a zstd frame do not matter for what is in it.
#[test]
fn every_changed_byte_of_what_is_compressed_is_found_or_harmless() {
    let harmless = change_each_byte(zstd());
    assert!(harmless < 64, "{harmless}");
}

#[test]
fn every_cut_is_found() {
    cut_each_length(SaveOptions::default());
    cut_each_length(zstd());
}

/// What is no file, or is large: neither waited for nor read into memory.
#[test]
fn what_is_no_file_is_refused_at_once() {
    for make in [
        (|path: &Path| std::fs::create_dir(path).unwrap()) as fn(&Path),
        |path| {
            let fifo = rustix::fs::mknodat(
                rustix::fs::CWD,
                path,
                rustix::fs::FileType::Fifo,
                0o600.into(),
                0,
            );
            fifo.unwrap();
        },
        |path| {
            std::fs::File::create(path)
                .unwrap()
                .set_len(1 << 40)
                .unwrap()
        },
        |path| std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
        |path| std::os::unix::fs::symlink(path, path).unwrap(),
    ] {
        let (_dir, store, files) = small(SaveOptions::default());
        for file in files {
            let right = std::fs::read(&file).unwrap();
            std::fs::remove_file(&file).unwrap();
            make(&file);
            read(store.path()).unwrap_err();
            match file.is_dir() {
                true => std::fs::remove_dir(&file).unwrap(),
                false => std::fs::remove_file(&file).unwrap(),
            }
            std::fs::write(&file, right).unwrap();
            read(store.path()).unwrap();
        }
    }
}
