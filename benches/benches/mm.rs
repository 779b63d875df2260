//! The protocol alone: no window, no guest.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use benches::bare::{
    NoMmu, base_pages_without_window, frames, space_without_window, time_forks, write,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use palimpsest::mm::soft::soft_pool;
use palimpsest::mm::{Access, AddressSpace, Census, Exclusive, FramePool, Frozen, Gfn};

/// 64 MiB.
const PAGES: u64 = 1 << 14;

/// Pages that devices hold.
const PINNED: u64 = 4096;

/// Pages of a region.
const REGION: u64 = 512;

fn pin(c: &mut Criterion) {
    let huge = space_without_window(4 * REGION).expect("memory");
    let small = base_pages_without_window(4 * REGION).expect("memory");
    let mut group = c.benchmark_group("pin and unpin");
    for (name, access) in [("read", Access::Read), ("write", Access::Write)] {
        group.bench_function(BenchmarkId::new("fast path, one page", name), |b| {
            b.iter(|| black_box(huge.pin(black_box(Gfn(7)), access)));
        });
    }
    // Time of a call, over all threads: with two that do not disturb each other it is half of that with one.
    //
    // Each thread has a region of its own, as the buffers of two devices are in different places. Pages side
    // by side have their words side by side, eight to a cache line: what that costs is the last bench.
    for (name, space) in [("huge folio", &huge), ("base pages", &small)] {
        for pages in [1, 16, REGION] {
            group.throughput(Throughput::Elements(pages));
            for threads in [1, 2] {
                let id = BenchmarkId::new(format!("{name}, {pages} at once"), threads);
                group.bench_function(id, |b| {
                    b.iter_custom(|rounds| {
                        on_threads(threads, |thread| {
                            for _ in 0..rounds {
                                let first = black_box(Gfn(2 * REGION * thread));
                                let _ = black_box(space.pin_range(first, pages, Access::Write));
                            }
                        })
                    });
                });
            }
        }
    }
    group.throughput(Throughput::Elements(1));
    for (name, apart) in [
        ("pages side by side", 1),
        ("pages of different regions", REGION),
    ] {
        for threads in [1, 2] {
            group.bench_function(BenchmarkId::new(name, threads), |b| {
                b.iter_custom(|rounds| {
                    on_threads(threads, |thread| {
                        for _ in 0..rounds {
                            let page = black_box(Gfn(8 + apart * thread));
                            let _ = black_box(huge.pin(page, Access::Write));
                        }
                    })
                });
            });
        }
    }
    group.finish();
}

/// How long `threads` threads take for `work` at once, divided by how many they are.
fn on_threads(threads: u64, work: impl Fn(u64) + Sync) -> Duration {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let work = &work;
        (1..threads).for_each(|thread| drop(scope.spawn(move || work(thread))));
        work(0);
    });
    start.elapsed() / threads as u32
}

fn fork(c: &mut Criterion) {
    let mut group = c.benchmark_group("fork");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(20);
    for (name, written) in [
        ("all written since the last one", 0..PAGES),
        ("one region written since the last one", 0..REGION),
        ("nothing written since the last one", 0..0),
    ] {
        group.bench_function(name, |b| {
            let space = space_without_window(PAGES).expect("memory");
            b.iter_custom(|rounds| time_forks(&space, rounds, written.clone()).expect("fork"));
        });
    }
    // Under `taskset -c 0`: by one CPU alone.
    group.throughput(Throughput::Elements(PINNED));
    group.bench_function("many pages pinned", |b| {
        let space = space_without_window(PAGES).expect("memory");
        let _pins = space
            .pin_range(Gfn(0), PINNED, Access::Write)
            .expect("pins");
        b.iter_custom(|rounds| time_forks(&space, rounds, 0..0).expect("fork"));
    });
    group.finish();
}

fn fault(c: &mut Criterion) {
    let mut group = c.benchmark_group("write fault");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(20);
    for (name, keep) in [("reuse", false), ("copy to the snapshot", true)] {
        group.bench_function(name, |b| {
            let space = space_without_window(PAGES).expect("memory");
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let frozen = Some(space.fork().expect("fork")).filter(|_| keep);
                    let start = Instant::now();
                    write(&space, 0..PAGES).expect("write");
                    spent += start.elapsed();
                    drop(frozen);
                }
                spent
            });
        });
    }
    // Each fault needs a frame of its own.
    group.bench_function("copy of one page to the snapshot", |b| {
        let space = base_pages_without_window(PAGES).expect("memory");
        b.iter_custom(|rounds| {
            let mut spent = Duration::ZERO;
            for _ in 0..rounds {
                let frozen = space.fork().expect("fork");
                let start = Instant::now();
                write(&space, 0..PAGES).expect("write");
                spent += start.elapsed();
                drop(frozen);
            }
            spent
        });
    });
    group.finish();
}

/// Faults of threads whose pages are in different regions, in frames of one word, so that what is measured is
/// what they share. Time of a fault over all threads: with two that do not disturb each other it is half of
/// that with one.
fn faults_apart(c: &mut Criterion) {
    /// Pages of a thread.
    const EACH: u64 = 8 * REGION;
    let mut group = c.benchmark_group("write faults of different regions");
    group.throughput(Throughput::Elements(EACH)).sample_size(30);
    for (name, forks, keeps) in [
        ("writable already", false, false),
        ("reuse", true, false),
        ("copy to the snapshot", true, true),
    ] {
        for threads in [1, 2] {
            group.bench_function(BenchmarkId::new(name, threads), |b| {
                let pool = words(2 * EACH, 4);
                let space = AddressSpace::new(pool, Exclusive, Box::new(NoMmu), 2 * EACH);
                let space = space.expect("memory").with_base_pages();
                // Page by page, whatever is seen.
                space.set_whole_price(u32::MAX);
                let write_own = |thread: u64| {
                    for page in EACH * thread..EACH * (thread + 1) {
                        black_box(space.write_fault(Gfn(page))).expect("write");
                    }
                };
                (0..2).for_each(write_own);
                b.iter_custom(|rounds| {
                    let mut spent = Duration::ZERO;
                    for _ in 0..rounds {
                        let frozen = forks.then(|| space.fork().expect("fork"));
                        let frozen = frozen.filter(|_| keeps);
                        spent += on_threads(threads, write_own);
                        drop(frozen);
                    }
                    spent
                });
            });
        }
    }
    group.finish();
}

/// A machine, a snapshot of it, and clones that have written a page of every eighth region, or every eighth page.
fn census(c: &mut Criterion) {
    const CLONES: u64 = 16;
    let mut group = c.benchmark_group("census");
    group
        .throughput(Throughput::Elements((2 + CLONES) * PAGES))
        .sample_size(20);
    for (name, step) in [
        ("clones in huge entries", REGION),
        ("clones in small ones", 1),
    ] {
        group.bench_function(name, |b| {
            let (_, pool) = frames((2 + CLONES) * PAGES).expect("memory");
            let space = AddressSpace::new(Arc::clone(&pool), Exclusive, Box::new(NoMmu), PAGES);
            let space = space.expect("room");
            write(&space, 0..PAGES).expect("write");
            let frozen = space.fork().expect("fork");
            let mut clones = Vec::new();
            for _ in 0..CLONES {
                let clone = AddressSpace::from_frozen(&frozen, Exclusive, Box::new(NoMmu));
                let clone = clone.expect("clone");
                // Page by page: a write splits its region.
                clone.set_whole_price(u32::MAX);
                for page in (0..PAGES).step_by(8 * step as usize) {
                    write(&clone, page..page + 1).expect("write");
                }
                clones.push(clone);
            }
            let mut census = Census::new(&pool);
            census.add_space(0, &space).expect("its pool");
            census.add_snapshot(1, &frozen).expect("its pool");
            for (label, clone) in (2..).zip(&clones) {
                census.add_space(label, clone).expect("its pool");
            }
            assert!(census.count().adds_up());
            b.iter(|| black_box(census.count()));
        });
    }
    group.finish();
}

/// A pool of frames of one word, with room for `homes` spaces of so many pages.
fn words(pages: u64, homes: u64) -> Arc<FramePool> {
    soft_pool(REGION + homes * pages).expect("memory").0
}

/// A space over such frames, all of whose pages are written, in huge entries.
fn space_of_words(pool: &Arc<FramePool>, pages: u64) -> AddressSpace<Exclusive> {
    let space = AddressSpace::new(Arc::clone(pool), Exclusive, Box::new(NoMmu), pages);
    let space = space.expect("memory");
    for first in (0..pages).step_by(REGION as usize) {
        space.write_fault(Gfn(first)).expect("write");
    }
    space
}

fn clone_of(frozen: &Frozen) -> AddressSpace<Exclusive> {
    AddressSpace::from_frozen(frozen, Exclusive, Box::new(NoMmu)).expect("clone")
}

/// Regions of a node of a snapshot's tree, which are lent together.
const NODE: u64 = 64;

/// Clones are made of memory in huge entries, and dropped: the first of a snapshot, for which what is to be
/// mapped is worked out in all nodes, and those after it.
fn clone(c: &mut Criterion) {
    let mut group = c.benchmark_group("clone");
    let sizes = [
        ("256 MiB", 256),
        ("1 GiB", 1 << 10),
        ("4 GiB", 4 << 10),
        ("8 GiB", 8 << 10),
    ];
    for (name, mib) in sizes {
        let pages = mib << 8;
        let pool = words(pages, 2);
        let space = space_of_words(&pool, pages);
        group.bench_function(BenchmarkId::new("made first", name), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    for first in (0..pages).step_by((NODE * REGION) as usize) {
                        space.write_fault(Gfn(first)).expect("write");
                    }
                    let frozen = space.fork().expect("fork");
                    let start = Instant::now();
                    let clone = black_box(clone_of(&frozen));
                    spent += start.elapsed();
                    drop(clone);
                }
                spent
            });
        });
        let frozen = space.fork().expect("fork");
        group.bench_function(BenchmarkId::new("made", name), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let start = Instant::now();
                    let clone = black_box(clone_of(&frozen));
                    spent += start.elapsed();
                    drop(clone);
                }
                spent
            });
        });
        group.bench_function(BenchmarkId::new("dropped", name), |b| {
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let clone = black_box(clone_of(&frozen));
                    let start = Instant::now();
                    drop(clone);
                    spent += start.elapsed();
                }
                spent
            });
        });
    }
    group.finish();
}

/// Makes every `step`th page writable.
fn write_each(space: &AddressSpace<Exclusive>, step: u64) {
    for page in (0..PAGES).step_by(step as usize) {
        space.write_fault(Gfn(page)).expect("write");
    }
}

/// What a clone rewrites is copied for it; what a space under a snapshot does, for the snapshot.
fn rewrite(c: &mut Criterion) {
    let mut group = c.benchmark_group("rewrite");
    group.sample_size(20);
    for (name, step) in [("dense", 1), ("eight pages of a region", REGION / 8)] {
        group.throughput(Throughput::Elements(PAGES / step));
        group.bench_function(BenchmarkId::new(name, "clone"), |b| {
            let space = space_without_window(PAGES).expect("memory");
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let clone = clone_of(&space.fork().expect("fork"));
                    let start = Instant::now();
                    write_each(&clone, step);
                    spent += start.elapsed();
                    drop(clone);
                }
                spent
            });
        });
        group.bench_function(BenchmarkId::new(name, "under a snapshot"), |b| {
            let space = space_without_window(PAGES).expect("memory");
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let frozen = space.fork().expect("fork");
                    let start = Instant::now();
                    write_each(&space, step);
                    spent += start.elapsed();
                    drop(frozen);
                }
                spent
            });
        });
    }
    group.finish();
}

criterion_group!(
    benches,
    pin,
    fork,
    fault,
    faults_apart,
    clone,
    rewrite,
    census
);
criterion_main!(benches);
