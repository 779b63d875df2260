//! Copies of 2 MiB, in the ways there are: what `FrameMemory::copy_run` is to use. From memory that is in no
//! cache to memory that is in none.
#![expect(unsafe_code, reason = "instructions that have no safe name")]

use std::arch::x86_64::{
    __m128i, _MM_HINT_T0, _mm_load_si128, _mm_prefetch, _mm_sfence, _mm_stream_si128,
};
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// A huge folio.
const FOLIO: usize = 2 << 20;
/// Enough of them that none is in a cache when its turn comes again.
const FOLIOS: usize = 128;
/// Bytes of a cache line, and of what one instruction moves.
const LINE: usize = 64;
const WORD: usize = size_of::<__m128i>();
/// How far ahead of the copy memory is asked for.
const AHEAD: usize = 8 * LINE;

/// Memory that begins at the border of a page, all of it touched.
struct Memory {
    bytes: Vec<u8>,
    first: usize,
}

impl Memory {
    fn new() -> Self {
        let bytes = vec![1; FOLIO * FOLIOS + 4096];
        let first = bytes.as_ptr().align_offset(4096);
        Self { bytes, first }
    }

    fn folio(&mut self, n: usize) -> &mut [u8] {
        let at = self.first + n % FOLIOS * FOLIO;
        &mut self.bytes[at..at + FOLIO]
    }
}

fn plain(from: &[u8], to: &mut [u8]) {
    to.copy_from_slice(from);
}

/// Stores that go past the caches, and loads that are asked for ahead or not.
fn streamed(from: &[u8], to: &mut [u8], prefetches: bool) {
    assert!(from.len() == to.len() && from.len().is_multiple_of(LINE));
    assert!(from.as_ptr().addr().is_multiple_of(WORD) && to.as_ptr().addr().is_multiple_of(WORD));
    for at in (0..from.len()).step_by(LINE) {
        // SAFETY: all of the line lies in both slices, which are aligned: just checked. What is asked for
        // ahead may lie beyond them: that is a hint and never a fault. The stores are ordered before whatever
        // follows by the fence below.
        unsafe {
            let (from, to) = (from.as_ptr().add(at), to.as_mut_ptr().add(at));
            if prefetches {
                _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD).cast());
            }
            for word in 0..LINE / WORD {
                let value = _mm_load_si128(from.cast::<__m128i>().add(word));
                _mm_stream_si128(to.cast::<__m128i>().add(word), value);
            }
        }
    }
    // SAFETY: it has no conditions.
    unsafe { _mm_sfence() };
}

fn copy(c: &mut Criterion) {
    let (mut from, mut to) = (Memory::new(), Memory::new());
    let mut group = c.benchmark_group("copy of 2 MiB");
    group.throughput(Throughput::Bytes(FOLIO as u64));
    let mut turn = 0;
    let mut bench = |name: &str, copy: &dyn Fn(&[u8], &mut [u8])| {
        group.bench_function(name, |b| {
            b.iter(|| {
                turn += 1;
                copy(black_box(from.folio(turn)), black_box(to.folio(turn)));
            });
        });
    };
    bench("memcpy", &plain);
    bench("non-temporal stores", &|from, to| streamed(from, to, false));
    bench("non-temporal stores, prefetched", &|from, to| {
        streamed(from, to, true);
    });
    bench("memcpy, two threads", &|from, to| {
        let (first, second) = to.split_at_mut(FOLIO / 2);
        std::thread::scope(|scope| {
            scope.spawn(|| plain(&from[FOLIO / 2..], second));
            plain(&from[..FOLIO / 2], first);
        });
    });
    group.finish();
}

criterion_group!(benches, copy);
criterion_main!(benches);
