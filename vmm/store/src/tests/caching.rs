//! The cache of chunks: never trusted, never needed, and never larger than it may be for long.

use super::bucket::{Bucket, Happens, Trouble, Watched};
use super::faulty::{EIO, ENOSPC, EROFS, Fault, FaultyDisk};
use super::memory::MemoryDisk;
use super::*;
use crate::cache::Cache;
use crate::copy::{CopyOptions, copy};

/// A bucket with a snapshot of so many chunks that are all different, and its memory.
fn bucket(chunks: u64) -> (Bucket, Vec<Vec<u8>>) {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
    let store = store_on(&disk).unwrap();
    let bytes = chunks * CHUNK_BYTES;
    let mut saving = Saving::begin(&store, &name("warm"), bytes, SaveOptions::default()).unwrap();
    let memory: Vec<_> = (0..chunks)
        .map(|n| vec![n as u8 + 1; CHUNK_BYTES as usize])
        .collect();
    for (region, content) in (0..).zip(&memory) {
        saving.region(region, content).unwrap();
    }
    saving.finish(Facts::default(), &parts()).unwrap();
    let bucket = Bucket::default();
    let to = Store::open_or_create_objects("mem://b", Arc::new(bucket.clone())).unwrap();
    let kept = store.read(&name("warm")).unwrap();
    copy(
        &kept,
        &to,
        &name("warm"),
        CopyOptions::default(),
        &mut |_| true,
    )
    .unwrap();
    (bucket, memory)
}

fn cached(bucket: Arc<dyn crate::objects::Objects>, cache: &Arc<Cache>) -> Store {
    let store = Store::open_objects("mem://b", bucket).unwrap();
    store.with_cache(Arc::clone(cache))
}

fn read_all(store: &Store, memory: &[Vec<u8>]) {
    let kept = store.read(&name("warm")).unwrap();
    let mut content = vec![0; CHUNK_BYTES as usize];
    for (region, expected) in (0..).zip(memory) {
        assert!(kept.region(region, &mut content).unwrap());
        assert!(content == *expected, "region {region}");
    }
}

const LARGE: u64 = 1 << 30;

#[test]
fn what_was_read_once_is_not_asked_for_again() {
    let (bucket, memory) = bucket(3);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("not/there/yet");
    let cache = Arc::new(Cache::open(&path, LARGE).unwrap());
    read_all(&cached(Arc::new(bucket.clone()), &cache), &memory);
    assert_eq!((cache.counts().hits, cache.counts().kept), (0, 3));
    // Another process, and a store whose chunks cannot be had: all that is asked for is what the snapshot is.
    bucket
        .objects()
        .retain(|key, _| !key.starts_with("chunks/"));
    let cache = Arc::new(Cache::open(&path, LARGE).unwrap());
    read_all(&cached(Arc::new(bucket), &cache), &memory);
    assert_eq!((cache.counts().hits, cache.counts().kept), (3, 0));
    assert!(cache.trouble().is_none());
}

#[test]
fn what_is_damaged_in_it_is_fetched_again() {
    let (bucket, memory) = bucket(1);
    let dir = tempfile::tempdir().unwrap();
    let cache = Arc::new(Cache::open(dir.path(), LARGE).unwrap());
    let store = cached(Arc::new(bucket), &cache);
    read_all(&store, &memory);
    let hash = crate::Hash::of(&memory[0]);
    let file = dir
        .path()
        .join(&hash.to_string()[..2])
        .join(hash.to_string());
    let right = std::fs::read(&file).unwrap();
    let damages: [fn(&std::path::Path, &[u8]); 5] = [
        |file, right| {
            let mut wrong = right.to_vec();
            wrong[1 << 20] ^= 1;
            std::fs::write(file, wrong).unwrap();
        },
        |file, right| std::fs::write(file, &right[..right.len() - 1]).unwrap(),
        |file, right| std::fs::write(file, [right, &[0]].concat()).unwrap(),
        |file, _| std::fs::write(file, "").unwrap(),
        |file, _| {
            std::fs::remove_file(file).unwrap();
            std::os::unix::fs::symlink("/dev/zero", file).unwrap();
        },
    ];
    for (number, damage) in (1..).zip(damages) {
        damage(&file, &right);
        read_all(&store, &memory);
        assert_eq!(cache.counts().kept, number + 1);
        assert!(std::fs::symlink_metadata(&file).unwrap().is_file());
        assert!(std::fs::read(&file).unwrap() == right);
    }
    assert_eq!((cache.counts().hits, cache.counts().damaged), (0, 4));
}

#[test]
fn there_is_no_more_in_it_than_there_may_be_and_what_is_used_stays() {
    let (bucket, memory) = bucket(20);
    let dir = tempfile::tempdir().unwrap();
    let most = 8 * CHUNK_BYTES;
    let cache = Arc::new(Cache::open(dir.path(), most).unwrap());
    let store = cached(Arc::new(bucket), &cache);
    let kept = store.read(&name("warm")).unwrap();
    let mut content = vec![0; CHUNK_BYTES as usize];
    let first = crate::Hash::of(&memory[0]);
    for (region, expected) in (0..).zip(&memory) {
        kept.region(region, &mut content).unwrap();
        assert!(content == *expected);
        // Used all the time.
        assert!(cache.read(first, &mut content), "after region {region}");
        let mut found = Vec::new();
        files(dir.path(), &mut found);
        let bytes: u64 = found.iter().map(|(_, bytes)| bytes).sum();
        assert!(bytes <= most + most / 16, "{bytes} after region {region}");
        // Time is what the host's files have: two in one tick are of one age.
        std::thread::sleep(std::time::Duration::from_millis(12));
    }
    let mut found = Vec::new();
    files(dir.path(), &mut found);
    assert!(found.len() >= 5, "{found:?}");
    // With less room there is less; nothing that is not a chunk goes.
    std::fs::write(dir.path().join("ab.txt"), "mine").unwrap();
    std::fs::create_dir_all(dir.path().join("ab")).unwrap();
    std::fs::write(dir.path().join("ab").join("mine"), vec![1; 3 << 20]).unwrap();
    let cache = Cache::open(dir.path(), CHUNK_BYTES).unwrap();
    drop(cache);
    let mut found = Vec::new();
    files(dir.path(), &mut found);
    let mine = found
        .iter()
        .filter(|(path, _)| path.to_string_lossy().ends_with("mine"));
    assert_eq!(mine.count(), 1);
    assert!(found.len() <= 3, "{found:?}");
    // What is larger than all of it is not kept.
    let cache = Cache::open(dir.path(), 1 << 20).unwrap();
    cache.keep(crate::Hash::of(&memory[1]), &memory[1]);
    assert_eq!(cache.counts().kept, 0);
}

fn files(path: &std::path::Path, found: &mut Vec<(std::path::PathBuf, u64)>) {
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files(&path, found),
            false => {
                let bytes = std::fs::metadata(&path).unwrap().len();
                found.push((path, bytes));
            }
        }
    }
}

#[test]
fn a_disk_that_refuses_is_gone_without() {
    let (bucket, memory) = bucket(2);
    let mut troubled = 0;
    for fault in [
        Fault::Always(ENOSPC),
        Fault::Always(EIO),
        Fault::Always(EROFS),
        Fault::Once(ENOSPC),
        Fault::Once(EIO),
        Fault::Short,
    ] {
        for at in 0.. {
            let disk = MemoryDisk::new();
            let faulty = FaultyDisk::new(&disk, at, fault);
            let place = std::path::Path::new("/cache");
            let cache = match Cache::open_on(place, LARGE, Arc::<FaultyDisk>::clone(&faulty)) {
                Ok(cache) => Arc::new(cache),
                // It is said at once that there can be none.
                Err(error) => {
                    assert!(error.to_string().contains("/cache"), "{error}");
                    continue;
                }
            };
            let store = cached(Arc::new(bucket.clone()), &cache);
            read_all(&store, &memory);
            read_all(&store, &memory);
            troubled += u64::from(cache.trouble().is_some());
            if !faulty.has_failed() {
                assert!(at > 20, "{fault:?} at {at}");
                break;
            }
            if let (Fault::Once(_), Ok(left)) = (fault, disk.list(&place.join("tmp"))) {
                assert!(left.is_empty(), "{fault:?} at {at}: {left:?}");
            }
            // Whatever is left there does no harm to the next.
            let cache = Arc::new(Cache::open_on(place, LARGE, Arc::new(disk)).unwrap());
            read_all(&cached(Arc::new(bucket.clone()), &cache), &memory);
            assert!(cache.trouble().is_none());
        }
    }
    assert!(troubled > 20, "{troubled}");
}

#[test]
fn processes_that_share_it_and_evict_do_each_other_no_harm() {
    let (bucket, memory) = bucket(12);
    let dir = tempfile::tempdir().unwrap();
    // Each with room for half of it, so that somebody evicts all the time.
    let caches: Vec<_> = (0..4)
        .map(|_| Arc::new(Cache::open(dir.path(), 6 * CHUNK_BYTES).unwrap()))
        .collect();
    std::thread::scope(|scope| {
        for cache in &caches {
            let (store, memory) = (cached(Arc::new(bucket.clone()), cache), &memory);
            scope.spawn(move || (0..6).for_each(|_| read_all(&store, memory)));
        }
    });
    for cache in caches {
        assert!(cache.trouble().is_none(), "{:?}", cache.trouble());
        assert_eq!(cache.counts().damaged, 0, "somebody saw half a chunk");
    }
    let left = std::fs::read_dir(dir.path().join("tmp")).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn a_region_is_read_from_several_threads_at_once() {
    let (bucket, memory) = bucket(6);
    let dir = tempfile::tempdir().unwrap();
    let cache = Arc::new(Cache::open(dir.path(), LARGE).unwrap());
    let kept = cached(Arc::new(bucket), &cache)
        .read(&name("warm"))
        .unwrap();
    fn is_sync<T: Sync + Send>(_: &T) {}
    is_sync(&kept);
    std::thread::scope(|scope| {
        for first in 0..4 {
            let (kept, memory) = (&kept, &memory);
            scope.spawn(move || {
                let mut content = vec![0; CHUNK_BYTES as usize];
                for n in 0..6 {
                    let region = (first + n) % 6;
                    kept.region(region, &mut content).unwrap();
                    assert!(content == memory[region as usize]);
                }
            });
        }
    });
}

#[test]
fn an_error_of_the_store_is_not_kept() {
    let (bucket, memory) = bucket(1);
    let dir = tempfile::tempdir().unwrap();
    let cache = Arc::new(Cache::open(dir.path(), LARGE).unwrap());
    // The marker, the manifest, the index, the state, and then the chunk.
    let watched = Watched::new(&bucket, 4, Happens::To(Trouble::Refused));
    let store = cached(watched, &cache);
    let kept = store.read(&name("warm")).unwrap();
    let mut content = vec![0; CHUNK_BYTES as usize];
    let error = kept.region(0, &mut content).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("mem://b/chunks/") && error.is_of_host(),
        "{text}"
    );
    assert_eq!(cache.counts().kept, 0);
    read_all(&store, &memory);
    // What is there, and is not the chunk, is not kept either.
    bucket.objects().values_mut().for_each(|bytes| {
        if bytes.len() as u64 == CHUNK_BYTES {
            bytes[7] ^= 1;
        }
    });
    let fresh = tempfile::tempdir().unwrap();
    let cache = Arc::new(Cache::open(fresh.path(), LARGE).unwrap());
    let kept = cached(Arc::new(bucket), &cache)
        .read(&name("warm"))
        .unwrap();
    let error = kept.region(0, &mut content).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert_eq!(cache.counts(), Default::default());
}

#[test]
fn what_is_verified_is_what_is_there_and_not_what_is_cached() {
    let (bucket, memory) = bucket(1);
    let dir = tempfile::tempdir().unwrap();
    let cache = Arc::new(Cache::open(dir.path(), LARGE).unwrap());
    let store = cached(Arc::new(bucket.clone()), &cache);
    read_all(&store, &memory);
    assert!(wrong(&store, "warm").is_empty());
    bucket
        .objects()
        .retain(|key, _| !key.starts_with("chunks/"));
    read_all(&store, &memory);
    assert_eq!(wrong(&store, "warm").len(), 1);
}

#[test]
fn where_there_is_no_directory_for_it_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    for path in [file.clone(), file.join("below")] {
        let error = Cache::open(&path, LARGE).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
}
