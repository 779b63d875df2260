//! The protocol alone: no window, no guest.

use std::hint::black_box;
use std::time::{Duration, Instant};

use benches::bare::{space_without_window, time_forks, write_all};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use palimpsest::mm::{Access, Gfn};

/// 64 MiB.
const PAGES: u64 = 1 << 14;

fn pin(c: &mut Criterion) {
    let space = space_without_window(64).expect("memory");
    let mut group = c.benchmark_group("pin and unpin");
    for (name, access) in [("read", Access::Read), ("write", Access::Write)] {
        group.bench_function(BenchmarkId::new("fast path, one page", name), |b| {
            b.iter(|| black_box(space.pin(black_box(Gfn(7)), access)));
        });
    }
    for threads in [1u64, 2] {
        group.bench_function(BenchmarkId::new("different pages, threads", threads), |b| {
            b.iter_custom(|rounds| {
                let start = Instant::now();
                std::thread::scope(|scope| {
                    for thread in 0..threads {
                        let space = &space;
                        scope.spawn(move || {
                            for _ in 0..rounds {
                                let _ = black_box(space.pin(Gfn(16 * thread), Access::Write));
                            }
                        });
                    }
                });
                start.elapsed() / threads as u32
            });
        });
    }
    group.finish();
}

fn fork(c: &mut Criterion) {
    let mut group = c.benchmark_group("fork");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(20);
    group.bench_function("all pages writable", |b| {
        let space = space_without_window(PAGES).expect("memory");
        b.iter_custom(|rounds| time_forks(&space, rounds).expect("fork"));
    });
    group.bench_function("nothing written since the last one", |b| {
        let space = space_without_window(PAGES).expect("memory");
        let _last = space.fork().expect("fork");
        b.iter(|| black_box(space.fork().expect("fork")));
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
                    write_all(&space).expect("write");
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
