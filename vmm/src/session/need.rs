//! What a run needs of the host's memory, and what it may take.
//!
//! The guest has its own memory once, in time. Between two snapshots it may write all of it, and each page it
//! writes is copied for the snapshot: that is as much again. With less than both a run would stop somewhere
//! in the middle, so it is refused at the start. With more, snapshots are kept for as long as there is room
//! for the guest to write all of its memory once more (`drive`).

use std::fmt;

use guest::abi::{PAGE_SIZE, REGION_SIZE};

use super::config::{Config, Size};
use palimpsest::host::{Limiter, Limits, MappingBudget, Room};

/// The program itself, its threads and what libraries take.
const PROGRAM: u64 = 16 << 20;
/// Addresses of a thread's stack, and private memory by the kernel's count though
/// hardly any of it is touched.
const STACK: u64 = 2 << 20;
/// Addresses that the C library takes for what a thread allocates, whether it does or not.
const ARENA: u64 = 64 << 20;
/// Threads besides those of vCPUs and devices: the main one, the checker, the one that copies ahead and the
/// one that fills the stock, and who gives the two their turns, the watch, two that save, and those that write
/// output.
const OTHER_THREADS: u64 = 12;
/// Private memory that a clone takes beside its threads: notes, tables, what they allocate.
const CLONE: u64 = 3 << 20;
/// Frames of the pool beyond those of guest and snapshots: the zero frame, and folios that are used in part.
const SPARE: u64 = 4 << 20;
/// Bytes of a frame's words, in tables of all frames.
const FRAME_WORDS: u64 = 16;
/// Bytes of a guest page's entries: in the shadow page table, in those of snapshots that differ in it, and in
/// the kernel's for window, physmap and guest.
const PAGE_ENTRIES: u64 = 48;
/// Bytes that the kernel takes for a mapping.
const MAPPING: u64 = 256;
/// Bytes that the checker knows of a page, of the snapshots that it looks at.
const CHECKED_PAGE: u64 = 16;
/// Snapshots beyond those kept that may have copies of their own: taken, but not checked yet, or no longer
/// kept, but not dropped yet.
pub(super) const ON_THE_WAY: u64 = 4;
/// What the frame pool has beyond that.
const EXTRA: u64 = 64 << 20;

/// Bytes that a run cannot do without, by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The guest's memory.
    pub guest: u64,
    /// Copies of one snapshot of it.
    pub copies: u64,
    /// Tables: of frames, entries, mappings.
    pub tables: u64,
    /// What the checker knows.
    pub checker: u64,
    /// The program.
    pub program: u64,
}

impl Need {
    /// The least that `config` runs with.
    pub fn of(config: &Config) -> Self {
        let pages = config.memory / PAGE_SIZE;
        let mappings = pages.min(MappingBudget::of_this_process().limit());
        let copies = config.memory.saturating_add(SPARE);
        Self {
            guest: config.memory,
            copies,
            tables: pages * PAGE_ENTRIES
                + mappings * MAPPING
                + tables_of_frames(config.memory.saturating_add(copies)),
            checker: pages * CHECKED_PAGE,
            program: PROGRAM,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.frames().saturating_add(self.besides())
    }

    /// What frames are for.
    fn frames(&self) -> u64 {
        self.guest.saturating_add(self.copies)
    }

    /// What is not in frames.
    fn besides(&self) -> u64 {
        self.tables + self.checker + self.program
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            guest,
            copies,
            tables,
            checker,
            program,
        } = *self;
        let [guest, copies, tables, checker, program] =
            [guest, copies, tables, checker, program].map(mib);
        write!(
            f,
            "guest {guest}, copies for one snapshot {copies}, tables {tables}, checker {checker}, \
             program {program}"
        )
    }
}

/// `bytes` in whole MiB, rounded up.
fn mib(bytes: u64) -> Size {
    Size(bytes.div_ceil(1 << 20) << 20)
}

/// `bytes` in whole MiB, rounded down; in KiB if it is less than one.
fn whole_mib(bytes: u64) -> Size {
    let shift = if bytes < 1 << 20 { 10 } else { 20 };
    Size(bytes >> shift << shift)
}

/// Who says how large a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Who runs it, by a flag.
    Flag,
    /// The snapshot that it is saved as.
    Snapshot,
}

impl Whose {
    /// A guest with so many bytes, in words.
    fn with(self, memory: u64) -> String {
        let size = Size(memory);
        match self {
            Self::Flag => format!("--memory {size}"),
            Self::Snapshot => format!("a guest that was saved with {size}"),
        }
    }
}

impl NeedError {
    /// The same of a guest that is as it was saved: no flag makes it smaller.
    #[must_use]
    pub fn of_saved(mut self) -> Self {
        let (Self::Memory { whose, .. } | Self::Resource { whose, .. }) = &mut self;
        *whose = Whose::Snapshot;
        self
    }
}

/// Why a run has not enough of the host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NeedError {
    /// Less memory than the least.
    #[error(
        "{}: this run needs {} at least ({need}), and {by} leaves it {}",
        whose.with(need.guest),
        mib(need.total()),
        whole_mib(*usable)
    )]
    Memory {
        /// Who says how large the guest is.
        whose: Whose,
        /// What is needed.
        need: Need,
        /// Who limits it.
        by: Limiter,
        /// Bytes it may take.
        usable: u64,
    },
    /// Less of something else than the least.
    #[error(
        "{}: this run needs {what} of {} at least, and {by} leaves it {}",
        whose.with(*memory),
        mib(*least),
        whole_mib(*left)
    )]
    Resource {
        /// Who says how large the guest is.
        whose: Whose,
        /// Bytes of guest memory.
        memory: u64,
        /// Of what.
        what: &'static str,
        /// Bytes needed.
        least: u64,
        /// Who limits it.
        by: Limiter,
        /// Bytes left.
        left: u64,
    },
}

/// What a run takes of the host's memory at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Frames that may have memory at a time.
    pub frames: u64,
    /// Frames of the physmap: those, and the guest's home, which has addresses whether it has memory or not.
    pub physmap: u64,
}

impl MemoryPlan {
    /// What `config` may take within `limits`.
    ///
    /// # Errors
    /// If that is less than the run cannot do without.
    pub fn new(config: &Config, limits: &Limits) -> Result<Self, NeedError> {
        Self::with_clones(config, 0, 0, 0, limits)
    }

    /// The same with so many clones of it, which may have `each` bytes by themselves, of so many snapshots. Of
    /// memory there is enough for it alone: how
    /// many clones are made is a matter of how much there is.
    ///
    /// # Errors
    /// If that is less than it cannot do without, or there are not enough addresses for all.
    pub fn with_clones(
        config: &Config,
        clones: u64,
        each: u64,
        snapshots: u64,
        limits: &Limits,
    ) -> Result<Self, NeedError> {
        let (need, wanted) = (Need::of(config), wanted(config));
        Self::for_need(config, need, wanted, [clones, each, snapshots], limits)
    }

    /// What a guest may take that was saved as `config` says, is looked at, and does not run: nothing is copied.
    ///
    /// # Errors
    /// If that is less than it cannot do without.
    pub fn to_look(config: &Config, limits: &Limits) -> Result<Self, NeedError> {
        let need = Need {
            copies: SPARE,
            ..Need::of(config)
        };
        let wanted = config.memory.saturating_add(SPARE);
        Self::for_need(config, need, wanted, [0; 3], limits).map_err(NeedError::of_saved)
    }

    /// What may be taken if `need` is the least and `wanted` the most without clones.
    fn for_need(
        config: &Config,
        need: Need,
        wanted: u64,
        [clones, each, snapshots]: [u64; 3],
        limits: &Limits,
    ) -> Result<Self, NeedError> {
        let of_clones = clones.saturating_mul(config.memory);
        let of_snapshots = snapshots.saturating_mul(config.memory);
        let room = limits.memory();
        let usable = usable(room);
        if usable < need.total() {
            return Err(NeedError::Memory {
                whose: Whose::Flag,
                need,
                by: room.by.clone(),
                usable,
            });
        }
        // Frames beyond the least need tables, too.
        let beyond = usable - need.total();
        let most = need.frames() + (beyond - tables_of_frames(beyond));

        let others = clones.saturating_mul(each).saturating_add(of_snapshots);
        // The root has its own beside what its snapshots may need.
        let root = if clones > 0 { config.memory } else { 0 };
        let mut most = most.min(wanted.saturating_add(root).saturating_add(others));
        // A clone has no checker, nor anything else by itself.
        let threads = (1 + clones) * (config.vcpus + config.dma_devices) + OTHER_THREADS;
        let private = need.checker
            + need.tables
            + tables_of_frames(most)
            + PROGRAM / 2
            + threads * STACK
            + clones * CLONE;
        let refused = |what, least, room: &Room| NeedError::Resource {
            whose: Whose::Flag,
            memory: config.memory,
            what,
            least,
            by: room.by.clone(),
            left: room.left,
        };
        for (by, what, times, besides) in [
            (Limiter::FileSize, "a file", 1, 0),
            // The physmap is mapped twice. The window, and what is cut off to align the three.
            (
                Limiter::AddressSpace,
                "addresses",
                2,
                config.memory + of_clones + 3 * REGION_SIZE + private + PROGRAM + threads * ARENA,
            ),
        ] {
            let Some(room) = limits.resource(&by) else {
                continue;
            };
            // It is made of whole regions.
            let besides =
                besides + times * (physmap_bytes(config.memory + of_clones, 0) + REGION_SIZE);
            let least = besides.saturating_add(times * need.frames());
            if room.left < least {
                return Err(refused(what, least, room));
            }
            most = most.min((room.left - besides) / times);
        }
        if let Some(room) = limits.resource(&Limiter::Data)
            && room.left < private
        {
            return Err(refused("private memory", private, room));
        }
        Ok(Self {
            frames: most / PAGE_SIZE,
            physmap: physmap_bytes(config.memory.saturating_add(of_clones), most) / PAGE_SIZE,
        })
    }
}

impl MemoryPlan {
    /// Whether it is less than `config` has a use for: snapshots may have to go early.
    pub fn is_short(&self, config: &Config) -> bool {
        self.frames < wanted(config) / PAGE_SIZE
    }
}

/// The largest guest, in whole regions, that runs within `limits` if all else is as `config` says, which asks
/// for more; `None` if none does.
pub fn largest_guest(config: &Config, limits: &Limits) -> Option<Size> {
    let runs = |regions: u64| {
        let memory = regions * REGION_SIZE;
        let config = Config {
            memory,
            ..config.clone()
        };
        MemoryPlan::new(&config, limits).is_ok()
    };
    let smallest = config.smallest_guest().div_ceil(REGION_SIZE);
    let mut largest = smallest..(config.memory / REGION_SIZE).max(smallest) + 1;
    if !runs(largest.start) {
        return None;
    }
    while largest.end - largest.start > 1 {
        let middle = largest.start.midpoint(largest.end);
        if runs(middle) {
            largest.start = middle;
        } else {
            largest.end = middle;
        }
    }
    Some(Size(largest.start * REGION_SIZE))
}

/// What may be taken of `room`: others take of it, too.
fn usable(room: &Room) -> u64 {
    room.left / 10 * 9
}

/// Bytes of frames that guest and snapshots could need.
fn wanted(config: &Config) -> u64 {
    (config.keep as u64)
        .saturating_add(ON_THE_WAY)
        .saturating_mul(config.memory)
        .saturating_add(EXTRA)
}

fn tables_of_frames(bytes: u64) -> u64 {
    bytes / PAGE_SIZE * FRAME_WORDS
}

/// Bytes of a physmap that has `frames` bytes of frames and the home of `memory` bytes.
fn physmap_bytes(memory: u64, frames: u64) -> u64 {
    (memory + frames).next_multiple_of(REGION_SIZE) + 2 * REGION_SIZE
}

#[cfg(test)]
mod tests {
    use super::super::config::tests::example;
    use super::*;

    fn guest_of(mib: u64) -> Config {
        Config {
            memory: mib << 20,
            ..example()
        }
    }

    fn bound(by: Limiter, left: u64) -> Limits {
        Limits::of_host(64 << 30).and(Room { by, left })
    }

    #[test]
    fn a_large_host_gives_what_is_wanted() {
        let plan = MemoryPlan::new(&guest_of(256), &Limits::of_host(64 << 30)).unwrap();
        assert_eq!(plan.frames * PAGE_SIZE, 8 * (256 << 20) + EXTRA);
        assert!(plan.physmap * PAGE_SIZE >= plan.frames * PAGE_SIZE + (256 << 20));
    }

    #[test]
    fn too_little_memory_is_refused_with_the_numbers() {
        let group = Limiter::ControlGroup("/g/memory.max".into());
        let error = MemoryPlan::new(&guest_of(256), &bound(group, 120 << 20)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("--memory 256 MiB: this run needs ")
                && text.contains("(guest 256 MiB, copies for one snapshot 260 MiB, tables ")
                && text.ends_with("and the control group's /g/memory.max leaves it 108 MiB"),
            "{text}"
        );
    }

    /// Who looks at a snapshot needs no room for copies, and no flag would make its guest smaller.
    #[test]
    fn to_look_takes_half_and_blames_no_flag() {
        let config = guest_of(256);
        let host = Limits::of_host(400 << 20);
        let error = MemoryPlan::new(&config, &host).unwrap_err();
        assert!(
            error.to_string().starts_with("--memory 256 MiB: "),
            "{error}"
        );
        let saved = error.of_saved().to_string();
        assert!(
            saved.starts_with("a guest that was saved with 256 MiB: this run needs "),
            "{saved}"
        );
        let plan = MemoryPlan::to_look(&config, &host).unwrap();
        assert!(plan.frames * PAGE_SIZE >= 256 << 20, "{plan:?}");
        let error = MemoryPlan::to_look(&config, &Limits::of_host(200 << 20)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("with 256 MiB: ") && text.contains("one snapshot 4 MiB"),
            "{text}"
        );
    }

    #[test]
    fn the_least_is_enough_and_a_page_less_is_not() {
        for mib in [16, 64, 256, 4096] {
            let config = guest_of(mib);
            let need = Need::of(&config);
            let least = (need.total().div_ceil(9) + 1) * 10;
            let plan = MemoryPlan::new(&config, &Limits::of_host(least)).unwrap();
            assert!(plan.frames * PAGE_SIZE >= need.guest + need.copies);
            let less = Limits::of_host(least - 2 * PAGE_SIZE);
            assert!(MemoryPlan::new(&config, &less).is_err());
        }
    }

    #[test]
    fn tables_of_more_frames_are_paid_for() {
        let config = Config {
            keep: 1000,
            ..guest_of(64)
        };
        let room = 4 << 30;
        let plan = MemoryPlan::new(&config, &Limits::of_host(room)).unwrap();
        let taken = plan.frames * (PAGE_SIZE + FRAME_WORDS) + PROGRAM;
        assert!(taken < room / 10 * 9, "{taken}");
        assert!(taken > room / 10 * 8, "{taken}");
    }

    #[test]
    fn no_number_of_snapshots_wraps() {
        let config = Config {
            keep: usize::MAX,
            ..guest_of(256)
        };
        let plan = MemoryPlan::new(&config, &Limits::of_host(2 << 30)).unwrap();
        assert!((512 << 20..2 << 30).contains(&(plan.frames * PAGE_SIZE)));
    }

    #[test]
    fn resource_limits_take_part() {
        for (by, what) in [
            (
                Limiter::FileSize,
                "needs a file of 778 MiB at least, and RLIMIT_FSIZE (ulimit -f)",
            ),
            (
                Limiter::AddressSpace,
                "RLIMIT_AS (ulimit -v) leaves it 100 MiB",
            ),
            (Limiter::Data, "needs private memory of "),
        ] {
            let small = bound(
                by.clone(),
                if by == Limiter::Data {
                    1 << 20
                } else {
                    100 << 20
                },
            );
            let error = MemoryPlan::new(&guest_of(256), &small)
                .unwrap_err()
                .to_string();
            assert!(error.contains(what), "{error}");
            // Enough for the least, not for all that is wanted.
            let mapped = if by == Limiter::AddressSpace { 2 } else { 1 };
            let enough = bound(by.clone(), mapped << 31);
            let plan = MemoryPlan::new(&guest_of(256), &enough).unwrap();
            let all = MemoryPlan::new(&guest_of(256), &Limits::of_host(64 << 30)).unwrap();
            assert_eq!(plan.frames < all.frames, by != Limiter::Data);
            assert!(by == Limiter::Data || plan.physmap * PAGE_SIZE <= 2 << 30);
        }
    }

    /// To the byte: the host refuses a file that is longer.
    #[test]
    fn what_is_planned_is_never_longer_than_a_file_may_be() {
        for left in ((800 << 20)..(1300 << 20)).step_by((7 << 20) + 12_345) {
            let limits = bound(Limiter::FileSize, left);
            let plan = MemoryPlan::new(&guest_of(256), &limits).unwrap();
            assert!(plan.physmap * PAGE_SIZE <= left, "{left}: {plan:?}");
        }
    }

    #[test]
    fn the_largest_guest_is_named() {
        let config = guest_of(256);
        let limits = Limits::of_host(200 << 20);
        let largest = largest_guest(&config, &limits).unwrap().0;
        assert!(largest < 100 << 20, "{largest}");
        assert!(MemoryPlan::new(&guest_of(largest >> 20), &limits).is_ok());
        assert!(MemoryPlan::new(&guest_of((largest >> 20) + 2), &limits).is_err());
        assert_eq!(largest_guest(&config, &Limits::of_host(1 << 20)), None);
    }
}
