//! Memory that is read from a store as somebody wants it: it is what was saved, or an error.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::*;
use crate::causes::chain;
use crate::host::Placement;
use crate::memory::MemoryOptions;
use crate::mm::{Exclusive, FaultError, FrozenError, Gfn, REGION_PAGES, Touch, Toucher};

/// A machine's memory out of a store, none of which is read yet.
struct Lazy {
    frames: Frames,
    frozen: Arc<Frozen>,
    chunks: Arc<Chunks>,
    memory: Memory,
}

fn lazy_in(kept: &Arc<Kept>, frames: Frames, options: LazyOptions) -> Lazy {
    let base_pages = options.base_pages;
    let (frozen, chunks) = lazily(kept, &frames, options).unwrap();
    let memory = memory_of(&frames, &frozen, base_pages);
    Lazy {
        frames,
        frozen,
        chunks,
        memory,
    }
}

fn memory_of(frames: &Frames, frozen: &Frozen, base_pages: bool) -> Memory {
    let bytes = frozen.pages() * PAGE_SIZE;
    let window = Arc::new(frames.window(bytes, Placement::Anywhere).unwrap());
    let options = MemoryOptions {
        base_pages,
        ..MemoryOptions::default()
    };
    let plain = |window| Box::new(window) as _;
    Memory::clone_of(frames, frozen, Exclusive, options, window, plain).unwrap()
}

fn lazy(kept: &Arc<Kept>) -> Lazy {
    lazy_in(
        kept,
        Frames::new(16 * REGION).unwrap(),
        LazyOptions::default(),
    )
}

impl Lazy {
    fn all(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.ram().read(0, &mut bytes).unwrap();
        bytes
    }

    /// Nothing is left of it.
    fn settle(self) {
        let Self {
            frames,
            frozen,
            memory,
            ..
        } = self;
        drop((memory, frozen));
        assert_eq!(frames.pool().leftovers(9), []);
        assert_eq!(frames.budget().used(), 0);
    }
}

/// Four regions: data, zeros, a page of data, data; and a page behind them.
fn saved() -> (tempfile::TempDir, Store, Host) {
    let (dir, store) = store();
    let host = host();
    for page in 0..REGION_PAGES {
        let word = (page * 0x9e37_79b9).to_le_bytes();
        host.memory
            .ram()
            .write(page * PAGE_SIZE + 8, &word)
            .unwrap();
    }
    host.write(2 * REGION + 5 * PAGE_SIZE, 7, 100);
    host.write(3 * REGION, 9, REGION);
    host.write(MEMORY - 1, 3, 1);
    save(&host, &store, "a", None).unwrap();
    (dir, store, host)
}

/// The files of a snapshot's chunks, with the regions they are of.
fn chunk_files(store: &Store, kept: &Kept) -> Vec<(u64, PathBuf)> {
    let file = |hash: super::store::Hash| {
        let name = hash.to_string();
        store.path().join("chunks").join(&name[..2]).join(name)
    };
    let regions = kept.index().iter();
    regions.map(|(region, hash)| (region, file(hash))).collect()
}

fn page(region: u64) -> Gfn {
    Gfn(region * REGION_PAGES)
}

#[test]
fn what_is_loaded_lazily_is_what_was_saved_and_what_is_loaded_at_once() {
    let (_dir, store, host) = saved();
    let kept = Arc::new(read(&store, "a"));
    for base_pages in [false, true] {
        let options = LazyOptions {
            base_pages,
            ..LazyOptions::default()
        };
        let loaded = lazy_in(&kept, Frames::new(16 * REGION).unwrap(), options);
        // The page at the end is no whole region: it is brought with the machine.
        assert_eq!(loaded.chunks.counts().brought(), 1);
        assert_eq!(loaded.memory.space().hidden(), 3);
        let in_use = loaded.frames.pool().usage().in_use;
        assert!(in_use <= 3, "{in_use}");
        assert!(loaded.all() == host.all());
        let (eager, _) = load(&store, "a");
        assert!(loaded.all() == eager.all());
        let counts = loaded.chunks.counts();
        assert_eq!(
            (counts.chunks, counts.by_host, counts.by_readers),
            (4, 3, 1)
        );
        if base_pages {
            assert_eq!(loaded.frames.pool().usage().in_use, 511 + 1 + 512 + 1);
        }
        // What is written is its own.
        loaded.memory.ram().write(5, &[0xaa; 3]).unwrap();
        let mut bytes = [0; 3];
        loaded.frames.read(&loaded.frozen, 5, &mut bytes).unwrap();
        assert_eq!(bytes, host.all()[5..8]);
        loaded.settle();
    }
}

/// A second snapshot, of a machine that has touched little: it is whole, and what was not touched is not read for it.
#[test]
fn a_snapshot_of_what_was_loaded_lazily_is_complete_at_once() {
    let (_dir, store, host) = saved();
    let kept = Arc::new(read(&store, "a"));
    let loaded = lazy(&kept);
    loaded
        .memory
        .ram()
        .write(3 * REGION + 100, &[1, 2, 3])
        .unwrap();
    assert_eq!(loaded.chunks.counts().brought(), 2);
    let base = Base::new(&kept, Arc::clone(&loaded.frozen));
    let taken = snapshot(loaded.memory.space().fork().unwrap());
    let save_as = |name: &str, base: Option<&Base>| {
        let saver = Saver {
            store: &store,
            name: name.parse().unwrap(),
            snapshot: &taken,
            frames: &loaded.frames,
            base,
            parent: None,
            compression: Compression::None,
            aside: None,
            most_a_second: None,
            facts: Facts {
                machine: machine_of_two(),
                ..Facts::default()
            },
            parts: Vec::new(),
        };
        saver.save(&mut |_| true).unwrap()
    };
    let done = save_as("increment", Some(&base));
    // The region at the end is too short to be had in common: it is compared.
    assert_eq!((done.same, done.found, done.written), (2, 1, 1), "{done:?}");
    // It names chunks, and has read none.
    assert_eq!(loaded.chunks.counts().by_readers, 1);
    // The machine may go, and all that was loaded with it: the snapshot is whole by itself.
    let Lazy {
        frames,
        frozen,
        chunks,
        memory,
    } = loaded;
    drop((memory, frozen, base));
    let mut expected = host.all();
    expected[(3 * REGION + 100) as usize..][..3].copy_from_slice(&[1, 2, 3]);
    let mut bytes = vec![0; MEMORY as usize];
    frames.read(taken.memory(), 0, &mut bytes).unwrap();
    assert!(bytes == expected);
    assert_eq!(chunks.counts().brought(), 4);
    let again = |name| {
        let (eager, _) = load(&store, name);
        let lazily = lazy(&Arc::new(read(&store, name)));
        assert!(
            eager.all() == expected && lazily.all() == expected,
            "{name}"
        );
    };
    again("increment");
    drop(taken);
    assert_eq!(frames.pool().leftovers(9), []);
}

/// Whatever is wrong with a chunk, and whenever it came to be, nobody sees a byte of it, and what others have is as it
/// was. It is said which file it is.
fn assert_refused(loaded: &Lazy, region: u64, file: &Path, what: &str) {
    let mut bytes = [0x5a; 64];
    let ram = loaded.memory.ram();
    let error = ram.read(region * REGION, &mut bytes).unwrap_err();
    let said = chain(&error);
    assert!(
        said.contains(file.to_str().unwrap()) && said.contains("snapshot `a`"),
        "{what}: {said}"
    );
    assert_eq!(bytes, [0x5a; 64], "{what}");
    let touched = loaded.memory.space().touch(page(region));
    assert!(matches!(touched, Err(FaultError::Bring(_))), "{what}");
    let read = loaded.frozen.with_frame(page(region), |_| ());
    assert!(matches!(read, Err(FrozenError::Bring(_))), "{what}");
    let space = loaded.memory.space();
    assert!(space.is_hidden(page(region)).unwrap(), "{what}");
    assert!(space.check().is_ok());
}

#[test]
fn a_byte_that_was_changed_anywhere_is_an_error_and_seen_by_nobody() {
    let (_dir, store, host) = saved();
    let kept = Arc::new(read(&store, "a"));
    let loaded = lazy(&kept);
    let files = chunk_files(&store, &kept);
    for (region, file) in files.iter().filter(|(region, _)| *region < 4) {
        let content = fs::read(file).unwrap();
        let open = File::options().write(true).open(file).unwrap();
        // Both ends of pages, holes among them, and what lies between.
        let places = (0..REGION)
            .step_by(REGION as usize / 31)
            .flat_map(|at| [at, at | 4095]);
        for at in places.chain([REGION - 1]) {
            let changed = content[at as usize] ^ 1 << (at % 8);
            open.write_all_at(&[changed], at).unwrap();
            assert_refused(&loaded, *region, file, &format!("byte {at}"));
            open.write_all_at(&content[at as usize..][..1], at).unwrap();
        }
    }
    // Mended, it is there.
    assert!(loaded.all() == host.all());
    loaded.settle();
}

#[test]
fn a_chunk_that_was_cut_or_is_gone_or_another_is_an_error() {
    let (_dir, store, host) = saved();
    let kept = Arc::new(read(&store, "a"));
    let loaded = lazy(&kept);
    let files = chunk_files(&store, &kept);
    let (region, file) = &files[0];
    let content = fs::read(file).unwrap();
    let put = |bytes: &[u8]| File::create(file).unwrap().write_all(bytes).unwrap();
    for len in [0, 1, 4095, 4096, REGION / 2, REGION - 1] {
        put(&content[..len as usize]);
        assert_refused(&loaded, *region, file, &format!("{len} bytes"));
    }
    put(&[&content[..], &[0]].concat());
    assert_refused(&loaded, *region, file, "a byte more");
    // Another chunk that is whole, by this one's name.
    fs::copy(&files[2].1, file).unwrap();
    assert_refused(&loaded, *region, file, "another");
    fs::remove_file(file).unwrap();
    assert_refused(&loaded, *region, file, "none");
    fs::create_dir(file).unwrap();
    assert_refused(&loaded, *region, file, "a directory");
    fs::remove_dir(file).unwrap();
    put(&content);
    assert!(loaded.all() == host.all());
    // What was brought is in frames: the files may become what they will.
    for (_, file) in &files {
        File::create(file).unwrap().write_all(b"other").unwrap();
    }
    assert!(loaded.all() == host.all());
    let twin = memory_of(&loaded.frames, &loaded.frozen, false);
    let mut bytes = vec![0; MEMORY as usize];
    twin.ram().read(0, &mut bytes).unwrap();
    assert!(bytes == host.all());
    drop(twin);
    loaded.settle();
}

/// While somebody changes the file and changes it back, all the time: right, or an error.
#[test]
fn a_chunk_that_changes_while_it_is_read_is_right_or_an_error() {
    let (_dir, store, host) = saved();
    let kept = Arc::new(read(&store, "a"));
    let (region, file) = chunk_files(&store, &kept).swap_remove(0);
    let content = fs::read(&file).unwrap();
    let expected = host.all();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let open = File::options().write(true).open(&file).unwrap();
            let mut at = 0;
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                at = (at + 65_537) % REGION;
                open.write_all_at(&[content[at as usize] ^ 0xff], at)
                    .unwrap();
                open.write_all_at(&content[at as usize..][..1], at).unwrap();
            }
        });
        let (mut right, mut wrong) = (0, 0);
        for _ in 0..40 {
            let loaded = lazy(&kept);
            let mut bytes = vec![0; REGION as usize];
            match loaded.memory.ram().read(region * REGION, &mut bytes) {
                Ok(()) => {
                    assert!(bytes == expected[(region * REGION) as usize..][..REGION as usize]);
                    right += 1;
                }
                Err(_) => wrong += 1,
            }
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(right + wrong, 40);
    });
}

/// The machine that finds none is told; nothing is held then, and with room it goes on.
#[test]
fn without_room_for_what_is_brought_there_is_an_error() {
    let (_dir, store, host) = saved();
    let kept = Arc::new(read(&store, "a"));
    let frames = Frames::new(16 * REGION).unwrap();
    let account = frames.pool().open_account(Some(REGION_PAGES + 3));
    let options = LazyOptions {
        account: Some(account),
        ..LazyOptions::default()
    };
    let loaded = lazy_in(&kept, frames, options);
    assert_eq!(loaded.memory.space().touch(page(0)).unwrap(), Touch::Shown);
    let mut byte = [0];
    let error = loaded.memory.ram().read(3 * REGION, &mut byte).unwrap_err();
    let said = chain(&error);
    assert!(said.contains("out of quota"), "{said}");
    let other = lazy_in(&kept, loaded.frames.clone(), LazyOptions::default());
    assert!(other.all() == host.all());
    drop(other);
    loaded.settle();
}

#[test]
fn what_was_wanted_is_noted_and_prefetched_the_next_time() {
    let (_dir, store, host) = saved();
    let kept = Arc::new(read(&store, "a"));
    assert!(kept.touched().is_empty());
    let loaded = lazy(&kept);
    for region in [3, 0] {
        loaded.memory.space().touch(page(region)).unwrap();
    }
    assert_eq!(loaded.chunks.touched(), [3, 0]);
    // A number of no region, one twice.
    kept.note_touched(&[3, 0, 77, 3, 1]).unwrap();
    assert_eq!(read(&store, "a").touched(), [3, 0]);
    loaded.settle();

    let loaded = lazy(&kept);
    let regions = loaded.frozen.backed_regions();
    let prefetcher = Prefetcher::start(regions, kept.touched(), &loaded.frames).unwrap();
    while !prefetcher.is_finished() {
        std::thread::yield_now();
    }
    drop(prefetcher);
    assert_eq!(loaded.chunks.counts().ahead, 2);
    assert_eq!(loaded.memory.space().hidden(), 3);
    assert!(loaded.all() == host.all());
    let counts = loaded.chunks.counts();
    assert_eq!((counts.by_host, counts.brought()), (1, 4));
    // It ends with whoever has it, and keeps nothing there.
    let next = lazy(&kept);
    let regions = next.frozen.backed_regions();
    let prefetcher = Prefetcher::start(regions, vec![0, 2, 3, 99], &next.frames).unwrap();
    next.settle();
    drop(prefetcher);
    loaded.settle();
    drop(kept);
    prune(&store, &[], Duration::ZERO).unwrap();
    assert_eq!(read(&store, "a").touched(), [3, 0]);
    let name = "a".parse().unwrap();
    prune(&store, &[name], Duration::ZERO).unwrap();
    assert!(fs::read_dir(store.path().join("tmp")).is_ok_and(|mut left| left.next().is_none()));
}

/// A bad one is left to who touches it.
#[test]
fn what_cannot_be_prefetched_is_passed_over() {
    let (_dir, store, _host) = saved();
    let kept = Arc::new(read(&store, "a"));
    let files = chunk_files(&store, &kept);
    fs::remove_file(&files[0].1).unwrap();
    let loaded = lazy(&kept);
    let regions = loaded.frozen.backed_regions();
    let prefetcher = Prefetcher::start(regions, vec![0, 3], &loaded.frames).unwrap();
    while !prefetcher.is_finished() {
        std::thread::yield_now();
    }
    assert_eq!(loaded.chunks.counts().ahead, 1);
    drop(prefetcher);
    assert_refused(&loaded, 0, &files[0].1, "gone");
    let regions = loaded.frozen.backed_regions();
    assert!(regions.bring(0, Toucher::Prefetch).is_err());
    loaded.settle();
}
