//! Accounts: who is charged for what, and what becomes of who may have no more.

use std::sync::atomic::Ordering;

use super::super::soft::{SoftMmu, soft_pool_of};
use super::refusing::RefusingMemory;
use super::*;

const REGION: u64 = 4;
const PAGES: u64 = 2 * REGION;

/// Machines of two regions of four pages, on one pool.
struct Host {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
}

impl Host {
    fn new() -> Self {
        let (pool, memory) = soft_pool_of(Order::new(2), 256).unwrap();
        Self { pool, memory }
    }

    fn machine(&self, limit: Option<u64>) -> SoftVm<AnyPolicy> {
        self.with_account(self.pool.open_account(limit))
    }

    fn with_account(&self, account: Account) -> SoftVm<AnyPolicy> {
        let mut vm = SoftVm::new(&self.pool, &self.memory, right(), PAGES).unwrap();
        vm.space.leave_to_fork(0);
        vm.space = vm.space.with_account(account);
        vm
    }

    fn clone_of(&self, frozen: &Frozen, limit: Option<u64>) -> SoftVm<AnyPolicy> {
        let (mmu, account) = (SoftMmu::new(PAGES), self.pool.open_account(limit));
        let through = Box::new(Arc::clone(&mmu));
        let space = AddressSpace::from_frozen_with_account(frozen, right(), through, account);
        SoftVm::over(space.unwrap(), mmu, &self.memory)
    }

    /// Frames that accounts are charged with, which are those in use.
    fn charges(&self) -> (u64, u64) {
        let Charges { open, closed } = self.pool.charges();
        assert_eq!(open + closed, self.pool.usage().in_use);
        (open, closed)
    }

    fn settle(self) {
        assert_eq!(self.pool.leftovers(9), []);
        assert_eq!(self.charges(), (0, 0));
    }
}

fn charged(vm: &SoftVm<AnyPolicy>) -> u64 {
    vm.space.account().usage().charged
}

fn write_all(vm: &SoftVm<AnyPolicy>, value: u64) {
    (0..PAGES).for_each(|n| vm.cpu_write(Gfn(n), value + n).unwrap());
}

fn is_quota(error: &FaultError, expected: u64) -> bool {
    matches!(error, FaultError::Alloc(AllocError::Quota { limit }) if *limit == expected)
}

#[test]
fn a_machine_pays_for_what_it_touches() {
    let host = Host::new();
    let vm = host.machine(None);
    vm.cpu_write(P, 1).unwrap();
    assert_eq!(charged(&vm), REGION, "a folio");
    let pages = host.machine(None).with_base_pages();
    pages.cpu_write(P, 1).unwrap();
    pages.space.unshare(Q).unwrap();
    assert_eq!((charged(&pages), charged(&vm)), (2, REGION));
    // What is given memory by the way is nobody's.
    host.pool.provide();
    let usage = host.pool.usage();
    assert!(usage.committed > usage.in_use);
    assert_eq!(host.charges(), (REGION + 2, 0));
    vm.space.discard(P, 3).unwrap();
    let usage = AccountUsage {
        charged: 1,
        peak: REGION,
        limit: None,
    };
    assert_eq!(vm.space.account().usage(), usage);
    drop((vm, pages));
    host.settle();
}

#[test]
fn a_machine_pays_for_copies_that_its_snapshots_get() {
    let host = Host::new();
    let vm = host.machine(None);
    write_all(&vm, 1);
    let first = vm.space.fork().unwrap();
    assert_eq!(charged(&vm), PAGES, "a fork is free");
    vm.space.set_whole_price(u32::MAX);
    vm.cpu_write(P, 100).unwrap();
    assert_eq!(vm.space.stats().sharers_moved, 1);
    assert_eq!(charged(&vm), PAGES + 1);
    // A whole folio of copies.
    vm.space.set_whole_price(0);
    vm.cpu_write(Gfn(REGION), 100).unwrap();
    assert_eq!(charged(&vm), PAGES + 1 + REGION);
    // Eager copies.
    let pin = vm.space.pin(P, Access::Write).unwrap();
    let second = vm.space.fork().unwrap();
    assert_eq!(charged(&vm), PAGES + 2 + REGION);
    drop(first);
    assert_eq!(charged(&vm), PAGES + 1);
    drop((pin, second));
    assert_eq!(charged(&vm), PAGES);
    // It goes before its snapshot, which has its account.
    let third = vm.space.fork().unwrap();
    let account = vm.space.account().clone();
    drop(vm);
    assert_eq!(third.account().usage(), account.usage());
    drop(account);
    assert_eq!(host.charges(), (PAGES, 0));
    drop(third);
    host.settle();
}

#[test]
fn a_clone_pays_for_what_it_writes_and_its_parent_for_what_it_reads() {
    let host = Host::new();
    let parent = host.machine(None);
    write_all(&parent, 1);
    let frozen = parent.space.fork().unwrap();
    let clones = [host.clone_of(&frozen, None), host.clone_of(&frozen, None)];
    assert_eq!((charged(&parent), charged(&clones[0])), (PAGES, 0));
    clones[0].space.set_whole_price(u32::MAX);
    clones[0].cpu_write(P, 5).unwrap();
    assert_eq!(clones[0].space.stats().writer_moved, 1);
    assert_eq!([charged(&clones[0]), charged(&clones[1])], [1, 0]);
    // What a dead parent has allocated stays charged, to nobody who could take its number.
    let number = parent.space.account().number();
    drop((parent, frozen));
    assert_eq!(host.charges(), (1, PAGES));
    let other = host.machine(Some(3));
    assert_ne!(other.space.account().number(), number);
    assert_eq!(charged(&other), 0);
    let [first, second] = clones;
    drop(first);
    assert_eq!(host.charges(), (0, PAGES));
    assert_eq!(second.cpu_read(Gfn(7)), 8);
    drop(second);
    assert_eq!(host.charges(), (0, 0));
    // Now the number may be another's.
    let again = [host.pool.open_account(None), host.pool.open_account(None)];
    assert!(again.iter().any(|account| account.number() == number));
    drop(other);
    host.settle();
}

#[test]
fn whatever_goes_first_all_is_refunded() {
    let orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]];
    for order in orders {
        let host = Host::new();
        let parent = host.machine(None);
        write_all(&parent, 1);
        let pin = parent.space.pin(Q, Access::Write).unwrap();
        let frozen = parent.space.fork().unwrap();
        let clone = host.clone_of(&frozen, None);
        write_all(&clone, 50);
        write_all(&parent, 90);
        let get = clone.space.get(Gfn(6), Access::Read).unwrap();
        host.charges();
        let mut parent = Some(parent);
        let (mut frozen, mut clone, mut holds) = (Some(frozen), Some(clone), Some((pin, get)));
        for n in order {
            match n {
                0 => parent = None,
                1 => frozen = None,
                2 => clone = None,
                _ => holds = None,
            }
            host.charges();
        }
        assert!(parent.is_none() && frozen.is_none() && clone.is_none() && holds.is_none());
        host.settle();
    }
}

#[test]
fn a_pin_that_outlives_its_machine_keeps_one_frame_charged() {
    let host = Host::new();
    let vm = host.machine(None);
    write_all(&vm, 1);
    let pin = vm.space.pin(P, Access::Write).unwrap();
    drop(vm);
    assert_eq!(host.charges(), (0, 1));
    drop(pin);
    host.settle();
}

#[test]
fn an_account_may_be_of_several_machines() {
    let host = Host::new();
    let account = host.pool.open_account(Some(PAGES + 1));
    let [one, other] = [(); 2].map(|()| host.with_account(account.clone()).with_base_pages());
    write_all(&one, 1);
    other.cpu_write(P, 1).unwrap();
    assert_eq!(account.usage().charged, PAGES + 1);
    assert!(is_quota(&other.cpu_write(Q, 1).unwrap_err(), PAGES + 1));
    assert!(one.space.fork().is_ok());
    drop(one);
    other.cpu_write(Q, 1).unwrap();
    drop(other);
    let usage = account.usage();
    assert_eq!((usage.charged, usage.peak), (0, PAGES + 1));
    host.settle();
}

#[test]
#[should_panic(expected = "its own pool")]
fn an_account_of_another_pool_pays_for_nothing() {
    let (host, other) = (Host::new(), Host::new());
    drop(host.with_account(other.pool.open_account(None)));
}

/// What a machine at its limit may still do, and what not; that nothing has changed then; and that another
/// machine does not notice.
#[test]
fn a_machine_at_its_limit_fails_alone() {
    let w = world_of(4, 64);
    let sibling = w.neighbour();
    w.vm.cpu_write(P, 1).unwrap();
    let frozen = w.vm.space.fork().unwrap();
    let account = w.vm.space.account();
    account.set_limit(Some(1));
    let before = Picture::of(&w.pool, &[&w, &sibling]);
    let same = || assert_eq!(Picture::of(&w.pool, &[&w, &sibling]), before);

    assert!(is_quota(&w.vm.cpu_write(P, 2).unwrap_err(), 1));
    same();
    assert!(is_quota(&w.vm.cpu_write(Q, 2).unwrap_err(), 1));
    assert!(is_quota(&w.vm.space.unshare(Q).unwrap_err(), 1));
    assert!(is_quota(
        &w.vm.space.force_write(P, 0, &[1]).unwrap_err(),
        1
    ));
    assert!(w.vm.space.pin(P, Access::Read).is_err());
    assert!(w.vm.space.get(Q, Access::Write).is_err());
    same();
    let text = w.vm.space.write_fault(Q).unwrap_err().to_string();
    assert_eq!(
        text,
        "out of quota: all 1 frames that the account may have are in use"
    );
    w.vm.space.prepare_fork();
    assert!(!w.vm.space.break_ahead());
    // What needs no frame goes on.
    drop(w.vm.space.get(P, Access::Read).unwrap());
    drop(w.vm.space.fork().unwrap());
    sibling.vm.cpu_write(P, 3).unwrap();
    drop(sibling);
    // As soon as there is room it can have more.
    drop(frozen);
    w.vm.cpu_write(P, 2).unwrap();
    account.set_limit(Some(2));
    w.vm.cpu_write(Q, 2).unwrap();
    assert!(is_quota(&w.vm.cpu_write(Gfn(2), 2).unwrap_err(), 2));
    // Nobody takes away what it has.
    account.set_limit(Some(0));
    w.vm.cpu_write(Q, 3).unwrap();
    assert!(w.vm.space.migrate(Q).is_err());
    assert_eq!((w.vm.cpu_read(P), w.vm.cpu_read(Q)), (2, 3));
}

#[test]
fn a_fork_that_would_copy_beyond_the_limit_fails_as_a_whole() {
    let host = Host::new();
    let vm = host.machine(Some(PAGES + 1));
    write_all(&vm, 1);
    let pins = vm.space.pin_range(P, 2, Access::Write).unwrap();
    let error = vm.space.fork().unwrap_err();
    assert!(
        matches!(
            error,
            ForkError::EagerCopy {
                source: AllocError::Quota { limit: 9 },
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(charged(&vm), PAGES);
    vm.space.account().set_limit(Some(PAGES + 2));
    let frozen = vm.space.fork().unwrap();
    assert_eq!(charged(&vm), PAGES + 2);
    drop((pins, vm, frozen));
    host.settle();
}

/// The first touch, and copies: a folio where there is room for one, else a page at a time.
#[test]
fn near_its_limit_a_machine_goes_on_by_the_page() {
    let host = Host::new();
    let vm = host.machine(Some(REGION + 1));
    vm.cpu_write(P, 1).unwrap();
    assert!(vm.space.entry(P).unwrap().is_huge());
    vm.cpu_write(Gfn(REGION), 1).unwrap();
    assert!(!vm.space.entry(Gfn(REGION)).unwrap().is_huge());
    assert_eq!(charged(&vm), REGION + 1);
    assert!(is_quota(
        &vm.cpu_write(Gfn(REGION + 1), 1).unwrap_err(),
        REGION + 1
    ));

    // Breaks of whole regions are wanted, of which there is room for one page.
    let frozen = vm.space.fork().unwrap();
    vm.space.account().set_limit(Some(REGION + 2));
    vm.space.set_whole_price(0);
    vm.cpu_write(P, 2).unwrap();
    assert_eq!(
        (vm.space.stats().sharers_moved, vm.space.stats().whole),
        (1, 0)
    );
    assert_eq!(charged(&vm), REGION + 2);
    assert!(is_quota(&vm.cpu_write(Q, 2).unwrap_err(), REGION + 2));
    assert_eq!(
        (vm.read_frozen(&frozen, P), vm.read_frozen(&frozen, Q)),
        (1, 0)
    );
    // With room for all of it, it is done.
    vm.space.account().set_limit(None);
    vm.cpu_write(Q, 2).unwrap();
    assert_eq!(vm.space.stats().whole, 1);
    drop((vm, frozen));
    host.settle();
}

/// Where mappings are short every break is of a whole region, if the account has room for it.
#[test]
fn near_its_limit_a_machine_goes_on_by_the_page_though_mappings_are_short() {
    let host = Host::new();
    let mmu = Arc::new(Refusals::default());
    let mut vm = SoftVm::with_mmu(&host.pool, &host.memory, right(), REGION, |inner| {
        Box::new(RefusingMmu {
            inner,
            refusals: Arc::clone(&mmu),
        })
    })
    .unwrap();
    vm.space = vm
        .space
        .with_account(host.pool.open_account(Some(REGION + 1)));
    vm.cpu_write(Q, 1).unwrap();
    let frozen = vm.space.fork().unwrap();
    mmu.crowded.store(1, Ordering::Relaxed);
    vm.cpu_write(Q, 2).unwrap();
    assert_eq!((vm.read_frozen(&frozen, Q), charged(&vm)), (1, REGION + 1));
    drop((vm, frozen));
    host.settle();
}

/// A clone whose region nobody else may be moved for.
#[test]
fn near_its_limit_a_clone_moves_by_the_page() {
    let host = Host::new();
    let parent = host.machine(None);
    write_all(&parent, 1);
    let frozen = parent.space.fork().unwrap();
    let clone = host.clone_of(&frozen, Some(REGION - 1));
    clone.space.set_whole_price(0);
    for n in 0..REGION - 1 {
        clone.cpu_write(Gfn(n), 9).unwrap();
    }
    assert!(is_quota(
        &clone.cpu_write(Gfn(REGION - 1), 9).unwrap_err(),
        REGION - 1
    ));
    assert_eq!(clone.cpu_read(Gfn(REGION - 1)), REGION);
    write_all(&parent, 50);
    clone.space.account().set_limit(None);
    write_all(&clone, 70);
    drop((parent, frozen, clone));
    host.settle();
}

/// What nobody asked for does not spend what is left for what somebody asks for.
#[test]
fn copies_ahead_leave_the_last_frames_to_faults() {
    let host = Host::new();
    let vm = host.machine(None);
    vm.space.notes_writes();
    vm.space.set_whole_price(u32::MAX);
    write_all(&vm, 1);
    let mut frozen = vec![];
    for round in 0..2 {
        frozen = vec![vm.space.fork().unwrap()];
        vm.cpu_write(P, round).unwrap();
    }
    frozen.push(vm.space.fork().unwrap());
    let at_limit = charged(&vm) + REGION - 1;
    vm.space.account().set_limit(Some(at_limit));
    assert!(!vm.space.break_ahead());
    assert_eq!(vm.space.stats().ahead, 0);
    vm.cpu_write(P, 7).unwrap();
    drop((vm, frozen));
    host.settle();
}

#[test]
fn a_restore_beyond_the_limit_fails_and_leaves_the_snapshot() {
    let host = Host::new();
    let vm = host.machine(None);
    write_all(&vm, 1);
    let first = vm.space.fork().unwrap();
    write_all(&vm, 50);
    let second = vm.space.fork().unwrap();
    vm.space.account().set_limit(Some(charged(&vm)));
    let error = vm.space.restore(&first).unwrap_err();
    assert!(
        matches!(&error, RestoreError::Fault(fault) if is_quota(fault, 2 * PAGES)),
        "{error}"
    );
    // With room for the pages that differ there is enough.
    vm.space.account().set_limit(Some(3 * PAGES));
    vm.space.restore(&first).unwrap();
    assert_eq!((vm.cpu_read(P), vm.read_frozen(&second, P)), (1, 50));
    drop((vm, first, second));
    host.settle();
}

#[test]
fn a_folio_for_which_there_is_no_room_is_done_without() {
    let host = Host::new();
    let home = host.pool.reserve(PAGES).unwrap();
    let account = host.pool.open_account(Some(REGION - 1));
    assert!(host.pool.allocate_folio(&account).unwrap().is_none());
    assert!(
        host.pool
            .allocate_huge(&account, &home, 0)
            .unwrap()
            .is_none()
    );
    let page = host.pool.allocate_near(&account, &home, 0).unwrap();
    account.set_limit(Some(REGION + 1));
    let folio = host.pool.allocate_folio(&account).unwrap();
    assert!(folio.is_some());
    assert_eq!(account.usage().charged, REGION + 1);
    assert!(host.pool.allocate_near(&account, &home, 1).is_err());
    drop((page, folio, home));
    host.settle();
}

/// What the host has refused is charged to nobody, and has never been.
#[test]
fn what_the_host_refuses_is_refunded() {
    let memory = RefusingMemory::new(64);
    let pool = memory.pool(64, 64);
    let account = pool.open_account(Some(8));
    let home = pool.reserve(8).unwrap();
    memory.refusals.from(0);
    assert!(pool.allocate(&account).is_err());
    assert!(pool.allocate_near(&account, &home, 1).is_err());
    let never = AccountUsage {
        charged: 0,
        peak: 0,
        limit: Some(8),
    };
    assert_eq!(account.usage(), never);
    memory.refusals.never();
    let fresh = pool.allocate(&account).unwrap();
    assert_eq!((account.usage().charged, account.usage().peak), (1, 1));
    drop(fresh);
    assert_eq!(pool.charges(), Charges::default());
}

/// Who may have no more does not have room made for it at others' cost, nor waits for the host.
#[test]
fn whose_account_is_exhausted_takes_nothing_from_homes() {
    let memory = RefusingMemory::new(64);
    let pool = memory.pool(64, 4);
    let home = pool.reserve(4).unwrap();
    let rich = pool.open_account(None);
    drop(pool.allocate_near(&rich, &home, 0).unwrap());
    let held: Vec<_> = std::iter::from_fn(|| pool.allocate(&rich).ok()).collect();
    drop(held);
    memory.uncommitted.lock().unwrap().clear();
    let poor = pool.open_account(Some(0));
    let error = pool.allocate(&poor).map(drop).unwrap_err();
    assert!(matches!(error, AllocError::Quota { limit: 0 }));
    assert!(pool.allocate_near(&poor, &home, 1).is_err());
    assert!(memory.uncommitted.lock().unwrap().is_empty());
}

#[test]
fn machines_that_run_at_once_are_charged_to_the_frame() {
    let host = Host::new();
    let template = host.machine(None);
    write_all(&template, 1);
    let frozen = template.space.fork().unwrap();
    std::thread::scope(|scope| {
        for n in 0..4 {
            let (host, frozen) = (&host, &frozen);
            scope.spawn(move || {
                for round in 0..200 {
                    let clone = host.clone_of(frozen, Some(3 * PAGES));
                    write_all(&clone, n);
                    let snapshot = clone.space.fork().unwrap();
                    clone.cpu_write(Gfn(round % PAGES), n).unwrap();
                    assert!(charged(&clone) > PAGES);
                    drop(clone);
                    drop(snapshot);
                }
            });
        }
    });
    assert_eq!(host.charges(), (PAGES, 0));
    drop((template, frozen));
    host.settle();
}

#[test]
fn no_more_is_promised_than_there_may_be() {
    let (pool, _memory) = soft_pool(100).unwrap();
    let first = pool.try_promise(60).unwrap();
    let error = pool.try_promise(41).unwrap_err();
    let expected = PromiseError {
        asked: 41,
        promised: 60,
        limit: 100,
    };
    assert_eq!((error, pool.promised()), (expected, 60));
    let second = pool.try_promise(40).unwrap();
    assert_eq!((second.frames(), pool.promised()), (40, 100));
    assert!(pool.try_promise(0).is_ok() && pool.try_promise(u64::MAX).is_err());
    drop(first);
    assert_eq!(pool.promised(), 40);
    // Nothing is allocated, and what is allocated is promised to nobody.
    assert_eq!(pool.usage().in_use, 0);
    let held = pool.allocate(&pool.payer()).unwrap();
    assert_eq!(pool.promised(), 40);
    drop((second, held));
    assert_eq!(pool.promised(), 0);
}

#[test]
fn promises_and_accounts_spell_what_they_are() {
    let (pool, _memory) = soft_pool(2048).unwrap();
    let promise = pool.try_promise(1024).unwrap();
    assert_eq!(format!("{promise:?}"), "Promise { frames: 1024 }");
    let error = pool.try_promise(1025).unwrap_err();
    let text = "cannot promise 5 MiB: 4 of 8 MiB are promised already";
    assert_eq!(error.to_string(), text);
    let account = pool.open_account(None);
    assert_eq!(format!("{account:?}"), "Account(AccountNumber(0))");
}
