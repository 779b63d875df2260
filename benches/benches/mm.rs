//! The protocol alone: no window, no guest.

use std::hint::black_box;
use std::time::{Duration, Instant};

use benches::bare::{space_without_window, time_forks, write};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use palimpsest::mm::{Access, Gfn};

/// 64 MiB.
const PAGES: u64 = 1 << 14;

/// Pages of a region.
const REGION: u64 = 512;

fn pin(c: &mut Criterion) {
    let space = space_without_window(4 * REGION).expect("memory");
    let mut group = c.benchmark_group("pin and unpin");
    for (name, access) in [("read", Access::Read), ("write", Access::Write)] {
        group.bench_function(BenchmarkId::new("fast path, one page", name), |b| {
            b.iter(|| black_box(space.pin(black_box(Gfn(7)), access)));
        });
    }
    // Time of a pin, over all threads: with two that do not disturb each other it is half of that with one.
    for (name, apart) in [
        ("pages of one region", 16),
        ("pages of different regions", REGION),
    ] {
        for threads in [1u64, 2] {
            group.bench_function(BenchmarkId::new(name, format!("{threads} at once")), |b| {
                b.iter_custom(|rounds| {
                    let pin = |thread: u64| {
                        for _ in 0..rounds {
                            let _ = black_box(space.pin(Gfn(7 + apart * thread), Access::Write));
                        }
                    };
                    let start = Instant::now();
                    std::thread::scope(|scope| {
                        let pin = &pin;
                        (1..threads).for_each(|thread| drop(scope.spawn(move || pin(thread))));
                        pin(0);
                    });
                    start.elapsed() / threads as u32
                });
            });
        }
    }
    group.finish();
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
    group.finish();
}

criterion_group!(benches, pin, fork, fault);
criterion_main!(benches);
