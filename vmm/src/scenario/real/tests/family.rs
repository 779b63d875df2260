//! Several guests at once, of each other's snapshots, that go in any order.

use std::collections::BTreeSet;

use super::*;

/// Each has its own vCPU, and takes it along.
fn a_family_is_isolated_and_goes_in_any_order<R: RunBy>(stage: &RealStage<R>) {
    let owners = || {
        (
            Arc::strong_count(stage.frames.physmap()),
            stage.frames.budget().used(),
        )
    };
    let before = owners();
    for first in 0..4 {
        let watches: [Arc<Watch>; 4] = Default::default();
        let wraps = watches.each_ref().map(Watched::wrap);
        let policy = || Box::new(Exclusive);
        let parent = stage.parent(policy(), &wraps[0]).unwrap();
        (0..PAGES).for_each(|page| parent.cpu_write(page, 1).unwrap());
        let frozen = parent.space().fork().unwrap();
        let children = [1, 2].map(|n| stage.child(&frozen, policy(), &wraps[n]).unwrap());
        children[0].cpu_write(1, 2).unwrap();
        let of_child = children[0].space().fork().unwrap();
        let grandchild = stage.child(&of_child, policy(), &wraps[3]).unwrap();
        drop(of_child);
        let [child, sibling] = children;
        let mut family = vec![
            (parent, [10, 1, 1, 1]),
            (child, [11, 2, 1, 1]),
            (sibling, [12, 1, 1, 1]),
            (grandchild, [13, 2, 1, 1]),
        ];
        for (actor, expected) in &family {
            actor.cpu_write(0, expected[0]).unwrap();
        }
        let threads = watches
            .each_ref()
            .map(|watch| watch.thread.lock().unwrap().unwrap());
        let different = BTreeSet::from(threads).len();
        assert_eq!(different, 4, "each has a thread of its own");
        // From each of them on, round.
        family.rotate_left(first);
        while !family.is_empty() {
            for (actor, expected) in &family {
                assert_eq!(words(actor), *expected);
            }
            family.remove(0);
        }
        assert_eq!(stage.load(frozen.frame(stage.gfn(0)).unwrap()), 1);
        drop(frozen);
        assert_eq!(owners(), before, "owners of the physmap, and mappings");
        assert_eq!(stage.pool().leftovers(1), []);
        for thread in threads {
            let task = format!("/proc/self/task/{thread}");
            wait_until("end of the thread", || !Path::new(&task).exists());
        }
    }
}

#[test]
fn a_family_is_isolated_and_goes_in_any_order_on_kvm() {
    if let Some(stage) = stage() {
        a_family_is_isolated_and_goes_in_any_order(&stage);
    }
}

#[test]
fn a_family_is_isolated_and_goes_in_any_order_without_kvm() {
    let stage = RealStage::<ByThreads>::new(Memory::Base).unwrap();
    a_family_is_isolated_and_goes_in_any_order(&stage);
}
