//! What an address space does with the answers of its predictor, whatever they are: here they are fixed.

use super::super::predictor::{Fixed, Leaf, Predictor};
use super::super::soft::soft_pool_of;
use super::*;

const REGION: u64 = 4;
const PAGES: u64 = 3 * REGION;
/// More forks than it takes until what was learnt is put to the proof.
const FORKS: u64 = 20;

/// Three regions, each of a huge folio of four pages, all written; and a predictor that gives these answers.
fn predicting(answers: Fixed) -> SoftVm<AnyPolicy> {
    let (pool, memory) = soft_pool_of(Order::new(2), 128).unwrap();
    let mut vm = SoftVm::new(&pool, &memory, right(), PAGES).unwrap();
    vm.space = vm.space.with_predictor(Predictor::fixed(answers));
    (0..PAGES).for_each(|n| vm.cpu_write(Gfn(n), n).unwrap());
    vm
}

fn writable(vm: &SoftVm<AnyPolicy>) -> Vec<u64> {
    let is_writable = |&n: &u64| vm.space.entry(Gfn(n)).unwrap().is_writable();
    (0..PAGES).filter(is_writable).collect()
}

#[test]
fn a_break_is_as_large_as_the_predictor_says() {
    for breaks_whole in [false, true] {
        let vm = predicting(Fixed {
            breaks_whole,
            ..Fixed::default()
        });
        vm.space
            .set_whole_price(if breaks_whole { u32::MAX } else { 0 });
        for fork in 0..FORKS {
            let frozen = vm.space.fork().unwrap();
            vm.cpu_write(Gfn(5), fork).unwrap();
            let broken = if breaks_whole { 4..8 } else { 5..6 };
            assert!(writable(&vm).into_iter().eq(broken), "after fork {fork}");
            drop(frozen);
        }
        assert_eq!(vm.space.stats().whole, if breaks_whole { FORKS } else { 0 });
    }
}

#[test]
fn a_fork_is_prepared_where_the_predictor_says_so() {
    for prepares in [false, true] {
        let vm = predicting(Fixed {
            prepares,
            ..Fixed::default()
        });
        for fork in 0..FORKS {
            let frozen = vm.space.fork().unwrap();
            // In vain each time: the page is written again.
            vm.cpu_write(Gfn(0), fork).unwrap();
            vm.space.prepare_fork();
            assert_eq!(writable(&vm).is_empty(), prepares, "after fork {fork}");
            vm.cpu_write(Gfn(0), fork).unwrap();
            assert!(writable(&vm).contains(&0));
            drop(frozen);
        }
    }
}

#[test]
fn what_is_broken_ahead_is_what_the_predictor_says() {
    let leaf = |first, is_huge| Leaf {
        first: Gfn(first),
        is_huge,
    };
    let vm = predicting(Fixed {
        ahead: vec![leaf(4, true), leaf(9, false)],
        ..Fixed::default()
    });
    vm.cpu_write(Gfn(8), 0).unwrap();
    for fork in 0..FORKS {
        let frozen = vm.space.fork().unwrap();
        if fork == 0 {
            // A leaf of another size than the entry is passed over: from here on the third region is in small
            // entries.
            vm.cpu_write(Gfn(8), 1).unwrap();
        }
        while vm.space.break_ahead() {}
        let mut expected = vec![4, 5, 6, 7, 9];
        if fork == 0 {
            expected.insert(4, 8);
        }
        assert_eq!(writable(&vm), expected, "after fork {fork}");
        drop(frozen);
    }
}
