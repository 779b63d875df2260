//! What this machine does without a guest, to compare measurements with.
#![expect(unsafe_code, reason = "copies memory it has mapped")]

use std::hint::black_box;
use std::io;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use palimpsest::mm::{Access, Gfn};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use serde::{Deserialize, Serialize};

use crate::bare::space_without_window;

const PAGE: usize = 4096;
/// Bytes of the plain copy: more than caches hold.
const COPIED: usize = 256 << 20;
/// Pins of one measurement.
const PINS: u32 = 200_000;
/// Measurements, of which the best counts: the others met somebody else's work.
const TRIES: usize = 5;

/// What the machine does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Copying memory that is there already to memory that is there already, one thread, 2
    /// MiB at a time: µs for 4 KiB.
    pub copy_us_per_page: f64,
    /// Pinning and unpinning a page on the fast path, one thread: ns.
    pub pin_ns: f64,
    /// Pins a second of two threads on pages of different regions, as a multiple of one thread's.
    pub pin_two_threads: f64,
}

impl Machine {
    /// Measures it.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn measure() -> io::Result<Self> {
        let (pin, two) = pins()?;
        Ok(Self {
            copy_us_per_page: copy()?.as_secs_f64() * 1e6 / (COPIED / PAGE) as f64,
            pin_ns: pin * 1e9,
            pin_two_threads: pin / two,
        })
    }
}

fn best(mut measure: impl FnMut() -> Duration) -> Duration {
    (0..TRIES).map(|_| measure()).min().unwrap_or_default()
}

/// Time of the plain copy.
fn copy() -> io::Result<Duration> {
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let memory = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            2 * COPIED,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::POPULATE,
        )
    }?;
    let from = memory.cast::<u8>();
    let step = 2 << 20;
    let time = best(|| {
        let begin = Instant::now();
        for offset in (0..COPIED).step_by(step) {
            // SAFETY: both halves are in the mapping just made, and do not overlap.
            unsafe {
                let to = from.add(COPIED + offset);
                ptr::copy_nonoverlapping(black_box(from.add(offset)), black_box(to), step);
            }
        }
        begin.elapsed()
    });
    // SAFETY: the mapping just made, of which nothing is left.
    unsafe { munmap(memory, 2 * COPIED) }?;
    Ok(time)
}

/// Seconds of a pin and unpin with one thread, and with two at once. Their pages are two regions
/// apart, as the buffers of two devices are: what pages have side by side in a table, eight to a
/// cache line, is not shared.
fn pins() -> io::Result<(f64, f64)> {
    let space = space_without_window(2048)?;
    let pin = |gfn: u64| {
        for _ in 0..PINS {
            let _ = black_box(space.pin(black_box(Gfn(gfn)), Access::Write));
        }
    };
    let one = best(|| {
        let begin = Instant::now();
        pin(7);
        begin.elapsed()
    });
    let two = best(|| {
        thread::scope(|scope| {
            let begin = Instant::now();
            let other = scope.spawn(|| pin(1031));
            pin(7);
            let _ = other.join();
            begin.elapsed()
        })
    });
    let each = |time: Duration, pins: u32| time.as_secs_f64() / f64::from(pins);
    Ok((each(one, PINS), each(two, 2 * PINS)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alone::beside_others;

    #[test]
    fn numbers_are_of_this_world() {
        let _beside = beside_others();
        let machine = Machine::measure().unwrap();
        // A page in 4 ns would be a terabyte a second.
        assert!(machine.copy_us_per_page > 0.004 && machine.copy_us_per_page < 1000.0);
        assert!(machine.pin_ns > 0.3 && machine.pin_ns < 1e6);
        assert!(machine.pin_two_threads > 0.001 && machine.pin_two_threads < 16.0);
    }
}
