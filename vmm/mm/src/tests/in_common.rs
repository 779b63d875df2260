//! What snapshots are said to have in common is the same in both, whatever was written, moved and restored
//! between them; and what nobody has written since is said to be.

use super::folio::{Huge, NEXT, REGION, huge, huge_with};
use super::*;

fn in_common(a: &Frozen, b: &Frozen, gfn: Gfn) -> bool {
    let ours = a.has_in_common(b, gfn).unwrap();
    assert_eq!(b.has_in_common(a, gfn), Ok(ours));
    ours
}

#[test]
fn regions_that_nobody_wrote_are_in_common_and_others_are_not() {
    let w = huge().written();
    let a = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 7).unwrap();
    let b = w.vm.space.fork().unwrap();
    assert_eq!(
        (in_common(&a, &b, P), in_common(&a, &b, NEXT)),
        (false, true)
    );
    // Both of their pages move; what is in them does not change.
    w.vm.cpu_write(NEXT, 8).unwrap();
    assert!(in_common(&a, &b, NEXT));
    let c = w.vm.space.fork().unwrap();
    assert_eq!(
        (in_common(&b, &c, P), in_common(&b, &c, NEXT)),
        (true, false)
    );
    drop((a, b, c));
    w.settle();
}

#[test]
fn untouched_regions_are_known_and_in_common() {
    let w = huge();
    let a = w.vm.space.fork().unwrap();
    w.vm.cpu_write(P, 7).unwrap();
    let b = w.vm.space.fork().unwrap();
    let untouched = |of: &Frozen| [P, NEXT].map(|gfn| of.is_untouched(gfn).unwrap());
    assert_eq!(
        (untouched(&a), untouched(&b)),
        ([true, true], [false, true])
    );
    assert_eq!(
        (in_common(&a, &b, P), in_common(&a, &b, NEXT)),
        (false, true)
    );
    let beyond = Gfn(2 * REGION);
    assert!(a.is_untouched(beyond).is_err() && a.has_in_common(&b, beyond).is_err());
    drop((a, b));
    w.settle();
}

/// Random writes, snapshots and restores: never wrong, and often enough right.
#[test]
fn what_is_in_common_is_the_same() {
    let mut found = 0;
    for seed in 1..40_u64 {
        let w: Huge = huge_with(8 * REGION, 512);
        let mut random = seed;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut snapshots: Vec<Arc<Frozen>> = Vec::new();
        for step in 0..120 {
            match next(8) {
                0 | 1 => {
                    snapshots.push(w.vm.space.fork().unwrap());
                    if snapshots.len() > 5 {
                        snapshots.remove(next(5) as usize);
                    }
                }
                2 if !snapshots.is_empty() => {
                    let to = next(snapshots.len() as u64) as usize;
                    w.vm.space.restore(&snapshots[to]).unwrap();
                }
                3 => w.vm.space.set_whole_price(1 + next(REGION) as u32),
                _ => w.vm.cpu_write(Gfn(next(8 * REGION)), step + 1).unwrap(),
            }
            for (a, b) in snapshots.iter().zip(snapshots.iter().skip(1)) {
                for first in (0..8).map(|region| region * REGION) {
                    if !in_common(a, b, Gfn(first)) {
                        continue;
                    }
                    found += 1;
                    for gfn in (first..first + REGION).map(Gfn) {
                        assert_eq!(w.read(a, gfn), w.read(b, gfn), "seed {seed}, step {step}");
                    }
                }
            }
        }
        drop(snapshots);
        w.settle();
    }
    assert!(found > 10_000, "{found}");
}
