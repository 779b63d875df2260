//! Chunks that were seen to be right are not read again, unless their files have changed.

use std::path::PathBuf;
use std::sync::Arc;

use super::memory::MemoryDisk;
use super::*;
use crate::chunk;
use crate::hash::Hash;
use crate::right::Known;

/// A store with a snapshot `a`, the disk it is on, and its first region's chunk.
fn with_a(options: SaveOptions) -> (MemoryDisk, Store, Hash) {
    let disk = MemoryDisk::new();
    let store = store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap();
    save_with(&store, "a", &memory(1, 2), options).unwrap();
    let hash = store.read(&name("a")).unwrap().index().get(0).unwrap();
    (disk, store, hash)
}

/// The same store to another process, which has seen nothing.
fn another(disk: &MemoryDisk) -> Store {
    store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap()
}

fn is_named(store: &Store, hash: Hash) -> bool {
    let mut saving = Saving::begin(store, &name("b"), MEMORY, SaveOptions::default()).unwrap();
    saving.same(0, hash).unwrap()
}

fn found(store: &Store) -> u64 {
    let mut saving = Saving::begin(store, &name("b"), MEMORY, SaveOptions::default()).unwrap();
    saving.region(0, &memory(1, 2)[&0]).unwrap();
    saving.so_far().found
}

fn path(store: &Store, hash: Hash, options: &SaveOptions) -> PathBuf {
    chunk::path_of(store, hash, options.compression)
}

/// By whoever has written it, or has read it. That it is not read shows where the disk has rotted below its
/// files.
#[test]
fn what_was_seen_to_be_right_is_not_read_again() {
    for options in [SaveOptions::default, zstd] {
        let (disk, writer, hash) = with_a(options());
        let reader = another(&disk);
        load(&reader, "a").unwrap();
        let stranger = another(&disk);
        disk.rot(&path(&writer, hash, &options()), 3 * 4096 + 5);
        for store in [&writer, &reader] {
            assert!(is_named(store, hash));
            assert_eq!(found(store), 1);
            // A clone is the same store.
            assert!(is_named(&store.clone(), hash));
        }
        // Who uses it finds it, whatever was seen.
        assert!(load(&writer, "a").is_err() && !wrong(&writer, "a").is_empty());
        assert!(!is_named(&stranger, hash));
        // Who has its content writes it anew.
        assert_eq!(found(&stranger), 0);
        assert!(wrong(&writer, "a").is_empty());
    }
}

#[test]
fn a_file_that_was_changed_is_read_again() {
    for options in [SaveOptions::default, zstd] {
        for change in 0..4 {
            let (disk, store, hash) = with_a(options());
            let path = path(&store, hash, &options());
            let file = disk.open(&path).unwrap();
            let len = file.len().unwrap();
            match change {
                0 => drop(file.write_at(len / 2, &[0xa5]).unwrap()),
                1 => file.set_len(len - 1).unwrap(),
                2 => disk.remove_file(&path).unwrap(),
                // As it was, in another file.
                _ => {
                    let mut bytes = vec![0; len as usize];
                    crate::disk::read_all(&*file, &mut bytes).unwrap();
                    disk.remove_file(&path).unwrap();
                    let other = disk.create(&path).unwrap();
                    crate::disk::write_all(&*other, 0, &bytes).unwrap();
                }
            }
            assert!(store.known(hash, CHUNK_BYTES) == Known::Nothing, "{change}");
            assert_eq!(is_named(&store, hash), change == 3, "{change}");
            // It was read, and is right as it is now.
            assert_eq!(
                store.known(hash, CHUNK_BYTES) != Known::Nothing,
                change == 3
            );
        }
    }
}

/// Readers take the one that is not compressed, whatever is in it.
#[test]
fn a_file_beside_a_compressed_one_is_read() {
    let (disk, store, hash) = with_a(zstd());
    assert!(store.known(hash, CHUNK_BYTES) != Known::Nothing);
    disk.create(&path(&store, hash, &SaveOptions::default()))
        .unwrap();
    assert!(!is_named(&store, hash));
}

#[test]
fn a_chunk_of_another_length_was_not_seen() {
    let (_, store, hash) = with_a(SaveOptions::default());
    assert!(store.known(hash, CHUNK_BYTES) != Known::Nothing);
    assert!(store.known(hash, CHUNK_BYTES - 4096) == Known::Nothing);
    assert!(store.known(Hash::of(b"nobody has it"), CHUNK_BYTES) == Known::Nothing);
}

/// On the host's own files, whose stamps are the kernel's.
#[test]
fn files_of_the_host_are_told_apart() {
    let (_dir, store) = super::saving::on_disk();
    save(&store, "a", &memory(1, 2)).unwrap();
    let hash = store.read(&name("a")).unwrap().index().get(0).unwrap();
    assert!(store.known(hash, CHUNK_BYTES) != Known::Nothing);
    let path = path(&store, hash, &SaveOptions::default());
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    // What a write does, at a time that is not this one's for sure.
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    assert!(store.known(hash, CHUNK_BYTES) == Known::Nothing);
    assert!(is_named(&store, hash) && store.known(hash, CHUNK_BYTES) != Known::Nothing);
    std::fs::remove_file(&path).unwrap();
    assert!(store.known(hash, CHUNK_BYTES) == Known::Nothing && !is_named(&store, hash));
}

/// By who has made it durable, and not by who has only written or read it.
#[test]
fn a_name_that_is_known_to_be_durable_is_not_made_so_again() {
    let (disk, store, hash) = with_a(SaveOptions::default());
    assert_eq!(store.known(hash, CHUNK_BYTES), Known::RightAndDurable);
    let reader = another(&disk);
    load(&reader, "a").unwrap();
    assert_eq!(reader.known(hash, CHUNK_BYTES), Known::Right);
    // It is still what is known when it is read once more.
    load(&store, "a").unwrap();
    assert_eq!(store.known(hash, CHUNK_BYTES), Known::RightAndDurable);
    let mut unfinished = Saving::begin(&store, &name("b"), MEMORY, SaveOptions::default()).unwrap();
    unfinished.region(0, &memory(8, 9)[&0]).unwrap();
    unfinished.name_for_test();
    let other = Hash::of(&memory(8, 9)[&0]);
    assert_eq!(store.known(other, CHUNK_BYTES), Known::Right);
    drop(unfinished);
    save(&store, "c", &memory(8, 9)).unwrap();
    assert_eq!(store.known(other, CHUNK_BYTES), Known::RightAndDurable);
    // Another save has put another file there in between.
    let seen = store.right().stamps([hash].into_iter());
    disk.open(&path(&store, hash, &SaveOptions::default()))
        .unwrap()
        .write_at(0, &[0])
        .unwrap();
    load(&store, "a").unwrap();
    store.right().named_durably(&seen);
    assert_eq!(store.known(hash, CHUNK_BYTES), Known::Right);
    // Another file has that name now, and may not after a power cut.
    let path = path(&store, hash, &SaveOptions::default());
    disk.remove_file(&path).unwrap();
    save(&store, "d", &memory(1, 2)).unwrap();
    for cut in [super::memory::Cut::Lost, super::memory::Cut::NamesKept] {
        let left = store_on(&(Arc::new(disk.after(cut)) as Arc<dyn Disk>)).unwrap();
        for named in ["a", "c", "d"] {
            assert!(wrong(&left, named).is_empty(), "{named} {cut:?}");
        }
    }
}
