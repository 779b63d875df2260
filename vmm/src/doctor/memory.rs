//! Memory: whether there is enough, who limits it, and whether it comes in huge pages.

use std::io;

use super::Finding;
use crate::session::config::{Config, Size};
use crate::session::need::{MemoryPlan, Need, largest_guest};
use palimpsest::host::{Limits, PhysMap, Room};

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let room = match Limits::detect() {
        Ok(limits) => room(config, &limits),
        Err(error) => Finding::no(
            "memory",
            format!("cannot tell how much there is: {error}"),
            "mount /proc",
        ),
    };
    vec![room, huge(PhysMap::try_huge())]
}

fn room(config: &Config, limits: &Limits) -> Finding {
    let asked = Size(config.memory);
    let plan = match MemoryPlan::new(config, limits) {
        Ok(plan) => plan,
        Err(error) => {
            let advice = match largest_guest(config, limits) {
                Some(largest) => {
                    format!("run with --memory {}, or raise that limit", flag(largest))
                }
                None => {
                    "free some, or raise that limit: not even the smallest guest runs".to_owned()
                }
            };
            return Finding::no("memory", error.to_string(), advice);
        }
    };
    let (least, most) = (
        Need::of(config).total(),
        plan.frames * guest::abi::PAGE_SIZE,
    );
    let left_by = |room: &Room| format!("{} left by {}", rounded(room.left), room.by);
    let left = left_by(limits.memory());
    if plan.is_short(config) {
        let left = left_by(limits.tightest());
        return Finding::worse(
            "memory",
            format!(
                "{left}; a guest of {asked} needs {} and could use more",
                rounded(least)
            ),
            "snapshots will be dropped early to make room; `--keep 1` or a smaller `--memory` needs less",
        );
    }
    Finding::ok(
        "memory",
        format!(
            "{left}; a guest of {asked} needs {} and uses {} at most",
            rounded(least),
            rounded(most)
        ),
    )
}

/// `bytes` in MiB or GiB, as people say it.
fn rounded(bytes: u64) -> String {
    match bytes >> 20 {
        mib if mib >= 10 << 10 => format!("{} GiB", mib >> 10),
        mib => format!("{mib} MiB"),
    }
}

/// As a flag takes it.
fn flag(size: Size) -> String {
    format!("{}M", size.0 >> 20)
}

fn huge(tried: io::Result<()>) -> Finding {
    let Err(error) = tried else {
        return Finding::ok(
            "huge pages",
            "the host made one of 2 MiB when asked (MADV_COLLAPSE)",
        );
    };
    let (why, advice) = match error.raw_os_error() {
        Some(libc::EINVAL) => (
            "this kernel makes none for a file in memory",
            "use Linux 6.7 or newer, built with transparent huge pages; guests run in pages of \
             4 KiB, and snapshots stop them for longer",
        ),
        Some(libc::ENOMEM | libc::EAGAIN | libc::EBUSY) => (
            "the host had none to give just now",
            "its memory is in pieces or used up: `echo 1 > /proc/sys/vm/compact_memory` helps; guests run \
             all the same, in pages of 4 KiB",
        ),
        Some(libc::EFBIG) => (
            "RLIMIT_FSIZE does not let a file have 2 MiB",
            "raise `ulimit -f`",
        ),
        _ => (
            "they cannot be had",
            "guests run all the same, in pages of 4 KiB",
        ),
    };
    Finding::worse("huge pages", format!("{why} ({error})"), advice)
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;
    use crate::session::config::tests::example;
    use palimpsest::host::Limiter;

    #[test]
    fn memory_is_enough_or_scarce_or_too_little() {
        let graded = |mib: u64| room(&example(), &Limits::of_host(mib << 20));
        let plenty = graded(8 << 10);
        assert_eq!(plenty.grade, Grade::Ok, "{plenty:?}");
        assert!(
            plenty
                .found
                .starts_with("8192 MiB left by this host; a guest of 256 MiB needs ")
        );
        let scarce = graded(1 << 10);
        assert_eq!(scarce.grade, Grade::Worse, "{scarce:?}");
        let little = graded(200);
        assert_eq!(little.grade, Grade::No, "{little:?}");
        assert!(little.advice.unwrap().starts_with("run with --memory "));
        assert_eq!(graded(1).grade, Grade::No);
    }

    #[test]
    fn who_limits_it_is_named() {
        let group = Limiter::ControlGroup("/g/memory.max".into());
        let limits = Limits::of_host(8 << 30).and(Room {
            by: group,
            left: 120 << 20,
        });
        let found = room(&example(), &limits).found;
        assert!(found.contains("/g/memory.max"), "{found}");
        let limits = Limits::of_host(64 << 30).and(Room {
            by: Limiter::AddressSpace,
            left: 3 << 30,
        });
        let finding = room(&example(), &limits);
        assert_eq!(finding.grade, Grade::Worse);
        assert!(
            finding.found.starts_with("3072 MiB left by RLIMIT_AS"),
            "{finding:?}"
        );
    }

    #[test]
    fn huge_pages_are_had_or_it_is_said_why_not() {
        assert_eq!(huge(Ok(())).grade, Grade::Ok);
        for code in [libc::EINVAL, libc::EAGAIN, libc::EFBIG, libc::EPERM] {
            let finding = huge(Err(io::Error::from_raw_os_error(code)));
            assert_eq!(finding.grade, Grade::Worse);
            assert!(finding.found.contains("os error"), "{finding:?}");
        }
    }
}
