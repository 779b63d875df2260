//! The protocol with a real window: what `mprotect` and `mmap` add. No guest, so no flush of its TLBs.

use std::time::{Duration, Instant};

use benches::bare::{space_with_window, time_forks, write};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use palimpsest::mm::{Frozen, Gfn};

/// 64 MiB.
const PAGES: u64 = 1 << 14;

fn window(c: &mut Criterion) {
    let mut group = c.benchmark_group("window");
    group
        .throughput(Throughput::Elements(PAGES))
        .sample_size(10);
    group.bench_function("fork, all pages writable", |b| {
        let space = space_with_window(PAGES).expect("memory");
        b.iter_custom(|rounds| time_forks(&space, rounds, 0..PAGES).expect("fork"));
    });
    // A reader's hold on every page of the snapshot is what makes the writer move.
    for (name, held) in [
        ("fault, sharers move", false),
        ("fault, writer moves", true),
    ] {
        group.bench_function(name, |b| {
            let space = space_with_window(PAGES).expect("memory");
            b.iter_custom(|rounds| {
                let mut spent = Duration::ZERO;
                for _ in 0..rounds {
                    let frozen = space.fork().expect("fork");
                    let holds = if held { hold_all(&frozen) } else { Vec::new() };
                    let start = Instant::now();
                    write(&space, 0..PAGES).expect("write");
                    spent += start.elapsed();
                    drop((frozen, holds));
                }
                spent
            });
        });
    }
    group.finish();
}

fn hold_all(frozen: &Frozen) -> Vec<palimpsest::mm::Get> {
    (0..frozen.pages())
        .map(|gfn| frozen.get(Gfn(gfn)).expect("in range"))
        .collect()
}

criterion_group!(benches, window);
criterion_main!(benches);
