//! Who waits while the host is asked for memory, and what goes back to it.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use super::super::allocator::Allocator;
use super::super::fresh::FreshFolio;
use super::super::stock::{COMMIT_FOLIOS, EPOCH};
use super::refusing::RefusingMemory;
use super::*;

/// Frames whose memory comes, or goes, when somebody lets it: at each call it says so, and waits for the
/// answer.
struct SlowHost {
    inner: Arc<SoftMemory>,
    asked: Mutex<Sender<(Pfn, u64)>>,
    answers: Mutex<Receiver<bool>>,
}

impl SlowHost {
    fn ask(&self, first: Pfn, count: u64) -> std::io::Result<()> {
        self.asked.lock().unwrap().send((first, count)).unwrap();
        match self.answers.lock().unwrap().recv() {
            Ok(true) => Ok(()),
            _ => Err(std::io::ErrorKind::OutOfMemory.into()),
        }
    }
}

impl FrameMemory for SlowHost {
    fn commit(&self, first: Pfn, count: u64) -> std::io::Result<()> {
        self.ask(first, count)
    }
    fn copy(&self, from: Pfn, to: Pfn) {
        self.inner.copy(from, to);
    }
    fn zero(&self, frame: Pfn) {
        self.inner.zero(frame);
    }
    fn equal(&self, one: Pfn, other: Pfn) -> bool {
        self.inner.equal(one, other)
    }
    fn write(&self, frame: Pfn, offset: u64, bytes: &[u8]) {
        self.inner.write(frame, offset, bytes);
    }
    fn uncommit(&self, first: Pfn, count: u64) -> std::io::Result<()> {
        self.ask(first, count)?;
        self.inner.uncommit(first, count)
    }
}

/// A pool of folios of four, and the host's end of it: what it is asked, and what it answers.
fn slow_pool(limit: u64) -> (Arc<FramePool>, Receiver<(Pfn, u64)>, Sender<bool>) {
    let ((asked, asks), (answer, answers)) = (channel(), channel());
    let host = Arc::new(SlowHost {
        inner: SoftMemory::new(64),
        asked: Mutex::new(asked),
        answers: Mutex::new(answers),
    });
    answer.send(true).unwrap();
    let pool = FramePool::with_folios_of(Order::new(2), host, 64, limit).unwrap();
    assert_eq!(asks.recv(), Ok((Pfn::ZERO, 1)));
    (pool, asks, answer)
}

/// The lock is not held meanwhile.
#[test]
fn nobody_waits_for_memory_that_others_get() {
    let (pool, asks, answer) = slow_pool(60);
    answer.send(true).unwrap();
    let ready = pool.allocate(&pool.payer()).unwrap();
    assert_eq!(asks.recv(), Ok((Pfn(1), 3)));
    let home = pool.reserve(8).unwrap();
    thread::scope(|scope| {
        let folio = scope.spawn(|| {
            pool.allocate_huge(&pool.payer(), &home, 0)
                .unwrap()
                .unwrap()
                .head()
        });
        let (first, count) = asks.recv().unwrap();
        assert_eq!((first, count), (home.frame(0), 8));
        // The host has been asked, and answers when all of this is done.
        beside(Answer(answer), || {
            let other = pool.allocate(&pool.payer()).unwrap();
            assert_eq!(other.pfn(), Pfn(2));
            drop(ready);
            let usage = pool.usage();
            assert_eq!((usage.in_use, usage.committed), (5, 11));
            assert_eq!(
                pool.leftovers(99).len(),
                1,
                "what the host is asked for is nobody's yet"
            );
            drop(pool.reserve(4).unwrap());
        });
        assert_eq!(folio.join().unwrap(), home.frame(0));
    });
    assert_eq!(pool.usage().in_use, 0);
}

/// The host gives what it was asked for when this is dropped.
struct Answer(Sender<bool>);

impl Drop for Answer {
    fn drop(&mut self) {
        self.0.send(true).unwrap();
    }
}

/// Memory that came in pieces is asked for as one when all of it is needed: the host may join it. It is there
/// all the same if the host refuses; and who has it for a home next has it as it is.
#[test]
fn memory_in_pieces_is_joined_when_all_of_it_is_needed() {
    let (pool, asks, answer) = slow_pool(60);
    let home = pool.reserve(4).unwrap();
    let page = |index: u64| {
        answer.send(true).unwrap();
        let page = pool.allocate_at(&pool.payer(), &home, index, 1);
        assert_eq!(asks.recv(), Ok((home.frame(index), 1)));
        drop(page.unwrap().unwrap());
    };
    (0..4).for_each(page);
    for gives in [false, true] {
        assert!(home.is_in_pieces());
        answer.send(gives).unwrap();
        let folio = pool.allocate_huge(&pool.payer(), &home, 0).unwrap();
        assert_eq!(asks.recv(), Ok((home.frame(0), 4)));
        assert_eq!(folio.unwrap().head(), home.frame(0));
        assert!(!home.is_in_pieces());
        // At once: the host is not asked any more.
        let again = pool.allocate_huge(&pool.payer(), &home, 0).unwrap();
        drop(again.unwrap());
        let surplus = pool.supply().lock().take_unused_of_homes().unwrap();
        pool.supply().lock().give_back(surplus);
        (0..4).for_each(page);
    }
    let usage = pool.usage();
    assert_eq!((usage.in_use, usage.committed), (0, 4));
}

/// A home is where there is memory in one piece, before any that has none: and near, if near is such a place.
#[test]
fn a_home_is_made_where_memory_is_in_one_piece() {
    let mut allocator = Allocator::new(40, Order::new(2), 32);
    let payer = allocator.ledger_mut().open(None);
    let run = |first: Pfn| first.0 / 4;
    let mut home = |near| allocator.make_home_of_folio(near, 0, 1).map(run);
    // Run 0 has the zero frame.
    assert_eq!(home(None), Some(1));
    assert_eq!(home(Some(7)), Some(7));
    let mut fill = |run: u64, count| {
        let claim = allocator.claim_home(payer, Pfn(4 * run), count, 4).unwrap();
        allocator.finish(&claim);
        allocator.release(Pfn(4 * run), count);
        allocator.end_home(Pfn(4 * run), 4);
    };
    fill(7, 4);
    fill(1, 1);
    // All of run 1 was given, if only a page of it was needed: by the way is at a time, too.
    let mut home = |near| allocator.make_home_of_folio(near, 0, 1).map(run);
    assert_eq!(
        [home(None), home(None), home(None)],
        [Some(1), Some(7), Some(2)]
    );
    let claim = allocator.claim_home(payer, Pfn(8), 1, 1).unwrap();
    allocator.finish(&claim);
    allocator.release(Pfn(8), 1);
    allocator.end_home(Pfn(8), 4);
    // Run 2 is in pieces: others are better, as long as there is memory for them.
    let mut home = |near| allocator.make_home_of_folio(near, 0, 1).map(run);
    assert_eq!([home(Some(2)), home(Some(2))], [Some(3), Some(4)]);
}

/// Where there is no memory for a home any more, it is made where most is.
#[test]
fn a_home_for_which_there_is_no_memory_is_made_where_it_needs_none() {
    let mut allocator = Allocator::new(40, Order::new(2), 5);
    let payer = allocator.ledger_mut().open(None);
    for (run, pages) in [(1, 1), (2, 4)] {
        assert_eq!(allocator.make_home_of_folio(None, 0, 1), Some(Pfn(4 * run)));
        for pfn in (4 * run..4 * run + pages).map(Pfn) {
            let claim = allocator.claim_home(payer, pfn, 1, 1).unwrap();
            allocator.finish(&claim);
        }
    }
    for (run, pages) in [(1, 1), (2, 4)] {
        allocator.release(Pfn(4 * run), pages);
        allocator.end_home(Pfn(4 * run), 4);
    }
    let mut home = || allocator.make_home_of_folio(None, 0, 1);
    assert_eq!([home(), home()], [Some(Pfn(8)), Some(Pfn(4))]);
}

/// Who needs the very frames that the host is asked about gets them where they belong, and does not go
/// elsewhere.
#[test]
fn a_page_waits_for_its_home() {
    let (pool, asks, answer) = slow_pool(60);
    let home = pool.reserve(8).unwrap();
    thread::scope(|scope| {
        let folio = scope.spawn(|| {
            pool.allocate_huge(&pool.payer(), &home, 0)
                .unwrap()
                .unwrap()
        });
        asks.recv().unwrap();
        let second = scope.spawn(|| {
            pool.allocate_huge(&pool.payer(), &home, 4)
                .unwrap()
                .unwrap()
        });
        let page = scope.spawn(|| pool.allocate_near(&pool.payer(), &home, 0).unwrap());
        answer.send(true).unwrap();
        let (folio, second) = (folio.join().unwrap(), second.join().unwrap());
        assert_eq!(
            (folio.head(), second.head()),
            (home.frame(0), home.frame(4))
        );
        // The page came second: its home is taken, and it goes elsewhere after all.
        asks.recv().unwrap();
        answer.send(true).unwrap();
        assert!(page.join().unwrap().pfn() < home.frame(0));
    });
}

/// What the host refuses is nobody's and not counted, and who waited for it hears that there is none, or gets
/// what there is.
#[test]
fn who_waits_for_the_last_memory_gets_it_or_an_error() {
    let (pool, asks, answer) = slow_pool(3);
    thread::scope(|scope| {
        let first = scope.spawn(|| pool.allocate(&pool.payer()).map(|fresh| fresh.into_held()));
        assert_eq!(asks.recv(), Ok((Pfn(1), 3)), "all that there may be");
        let second = scope.spawn(|| pool.allocate(&pool.payer()).map(|fresh| fresh.into_held()));
        answer.send(false).unwrap();
        // Without what would have been by the way: one for the first. The second may ask for the rest now.
        let mut asked = vec![asks.recv().unwrap()];
        answer.send(true).unwrap();
        asked.push(asks.recv().unwrap());
        answer.send(true).unwrap();
        let (first, second) = (first.join().unwrap(), second.join().unwrap());
        let mut pfns = [first.unwrap().pfn(), second.unwrap().pfn()];
        pfns.sort_unstable();
        assert!(pfns[0] < pfns[1], "{asked:?}");
    });
    assert_eq!(pool.usage().in_use, 0);
}

/// A space that comes after others have gone finds room where they were.
#[test]
fn homes_are_recycled() {
    let (pool, memory) = soft_pool(4 * 512).unwrap();
    let mut kept = Vec::new();
    for round in 0..100 {
        let vm = SoftVm::new(&pool, &memory, right(), 2 * 512).unwrap();
        assert!(
            SoftVm::new(&pool, &memory, right(), 2 * 512).is_err(),
            "there is room for one"
        );
        vm.cpu_write(Gfn(700), round).unwrap();
        assert_eq!((vm.cpu_read(Gfn(700)), vm.cpu_read(Gfn(701))), (round, 0));
        kept = vec![vm.space.fork().unwrap()];
        if round < 99 {
            kept.clear();
        }
    }
    // What a snapshot still has is in the way, until it goes.
    let another = || SoftVm::new(&pool, &memory, right(), 2 * 512);
    assert!(another().is_err());
    kept.clear();
    assert!(another().is_ok());
    assert_eq!((pool.leftovers(9), pool.usage().in_use), (vec![], 0));
}

fn folios(pool: &Arc<FramePool>, count: u64) -> Vec<FreshFolio> {
    let folio = |_| pool.allocate_folio(&pool.payer()).unwrap().unwrap();
    (0..count).map(folio).collect()
}

/// A pool of folios of four, whose host refuses when it is told to.
fn refusing_pool() -> (Arc<FramePool>, Arc<RefusingMemory>) {
    let memory = RefusingMemory::new(64);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 64, 60).unwrap();
    memory.committed.lock().unwrap().clear();
    (pool, memory)
}

#[test]
fn memory_that_is_there_is_not_asked_for_again() {
    let (pool, memory) = refusing_pool();
    // With what would be there by the way.
    memory.refusals.at(0);
    drop(pool.allocate(&pool.payer()).unwrap());
    let asked = || memory.committed.lock().unwrap().clone();
    assert_eq!(asked(), [(1, 1)]);
    assert_eq!(pool.allocate(&pool.payer()).unwrap().pfn(), Pfn(1));
    assert_eq!(asked(), [(1, 1)]);
}

#[test]
fn what_nobody_waits_for_yet_is_asked_for_once() {
    let (pool, memory) = refusing_pool();
    memory.refusals.from(0);
    pool.supply().provide();
    assert_eq!(memory.refusals.calls(), 2, "a frame, and folios");
    assert_eq!(pool.usage().committed, 0);
}

/// To make them huge can take long: that is for who has the time, or for what is shown to guests.
#[test]
fn what_somebody_waits_for_outside_homes_is_asked_for_in_base_pages() {
    let (pool, memory) = refusing_pool();
    let home = pool.reserve(8).unwrap();
    let single = pool.allocate(&pool.payer()).unwrap();
    let folio = pool
        .allocate_huge(&pool.payer(), &home, 0)
        .unwrap()
        .unwrap();
    let copy = pool.allocate_folio(&pool.payer()).unwrap().unwrap();
    assert_eq!(folio.head(), home.frame(0));
    let in_base_pages = || memory.in_base_pages.lock().unwrap().clone();
    assert_eq!(in_base_pages(), [single.pfn().0, copy.head().0]);
    let asked = memory.committed.lock().unwrap().clone();
    assert!(asked.contains(&(home.frame(0).0, 8)), "{asked:?}");
    assert!(!pool.supply().lock().is_in_pieces(folio.head()));
    assert!(pool.supply().lock().is_in_pieces(copy.head()));
    pool.supply().provide();
    let next = pool.allocate_folio(&pool.payer()).unwrap().unwrap();
    assert_eq!(in_base_pages().len(), 2, "what was provided is not");
    assert!(!pool.supply().lock().is_in_pieces(next.head()));
}

/// A pool of folios of four with `used` of them in use.
fn stocked_pool(used: u64, limit: u64) -> (Arc<FramePool>, Arc<RefusingMemory>, Vec<FreshFolio>) {
    let memory = RefusingMemory::new(4096);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 4096, limit).unwrap();
    let used = folios(&pool, used);
    memory.committed.lock().unwrap().clear();
    (pool, memory, used)
}

/// Runs that are in stock.
fn in_stock(pool: &FramePool) -> u64 {
    let usage = pool.usage();
    (usage.committed - usage.in_use) / 4
}

#[test]
fn a_part_of_what_is_in_use_is_in_stock_before_the_first_fork() {
    let (pool, memory, used) = stocked_pool(80, 4000);
    while pool.stock_up() {}
    assert_eq!(in_stock(&pool), 20);
    let pieces = memory.committed.lock().unwrap().clone();
    let expected: Vec<_> = (81..101).step_by(2).map(|run| (4 * run, 4 * 2)).collect();
    assert_eq!(pieces, expected);
    assert_eq!(
        memory.in_base_pages.lock().unwrap().len(),
        80,
        "in no piece"
    );
    let copies = folios(&pool, 20);
    assert_eq!(
        memory.committed.lock().unwrap().len(),
        10,
        "nobody has to wait"
    );
    drop((used, copies));
}

/// While the first fork's copies are made nothing is, but for a few; after the second, as many as were needed.
#[test]
fn what_is_taken_between_two_forks_is_put_in_stock_again() {
    let (pool, _memory, used) = stocked_pool(80, 4000);
    let fill = || while pool.stock_up() {};
    fill();
    pool.provide();
    let first = folios(&pool, 12);
    fill();
    assert_eq!(in_stock(&pool), 8);
    pool.provide();
    fill();
    assert_eq!(in_stock(&pool), 12);
    let second = folios(&pool, 15);
    fill();
    assert_eq!(in_stock(&pool), 9, "three may come back");
    pool.provide();
    fill();
    assert_eq!(in_stock(&pool), 15);
    drop((used, first, second));
}

#[test]
fn a_pool_that_is_nearly_full_has_no_stock() {
    let (pool, memory, used) = stocked_pool(80, 4 * 80 * 4 / 3);
    assert!(!pool.stock_up());
    assert_eq!((in_stock(&pool), memory.refusals.calls()), (0, 81));
    drop(used);
}

#[test]
fn a_host_that_refuses_to_fill_the_stock_is_not_asked_for_ever() {
    let (pool, memory, used) = stocked_pool(80, 4000);
    memory.refusals.from(0);
    assert!(!pool.stock_up() && !pool.stock_up());
    assert_eq!(memory.refusals.calls(), 1);
    memory.refusals.never();
    assert!(!pool.stock_up());
    pool.provide();
    let copies = folios(&pool, 30);
    pool.provide();
    while pool.stock_up() {}
    assert_eq!(in_stock(&pool), 30);
    drop((used, copies));
}

/// The stock may be filled while somebody looks whether all is free.
#[test]
fn what_the_host_is_asked_for_is_not_left_over() {
    let (pool, asks, answer) = slow_pool(60);
    thread::scope(|scope| {
        let provider = scope.spawn(|| pool.provide());
        // Looked at when the host has answered, or nobody would.
        let seen = [(); 2].map(|()| {
            let (first, _) = asks.recv().unwrap();
            let seen = (pool.is_allocated(first), pool.leftovers(9));
            answer.send(true).unwrap();
            seen
        });
        provider.join().unwrap();
        assert_eq!(seen, [(true, vec![]), (true, vec![])]);
        assert_eq!(pool.leftovers(9), []);
    });
}

/// Longer than it takes to wake a thread on any host.
const LONG: Duration = Duration::from_secs(60);

/// Whoever fills it sleeps while there is enough, and is woken when there is not, and when it is over.
#[test]
fn who_fills_the_stock_waits_for_something_to_do() {
    let (pool, _memory, used) = stocked_pool(80, 4000);
    thread::scope(|scope| {
        let (done, pieces) = channel();
        let keeper = Arc::clone(&pool);
        let keeper = scope.spawn(move || {
            while keeper.wait_for_want() {
                keeper.stock_up();
                done.send(in_stock(&keeper)).unwrap();
            }
        });
        // If it sleeps for ever it is ended all the same.
        let heard = || {
            let mut said = std::iter::from_fn(|| pieces.recv_timeout(LONG).ok());
            said.any(|there| there == 20)
        };
        let first = heard();
        let taken = folios(&pool, 1);
        let second = heard();
        pool.close_stock();
        keeper.join().unwrap();
        assert_eq!((first, second), (true, true));
        drop((used, taken));
    });
}

#[test]
fn a_home_is_where_no_memory_is_if_there_is_such_a_place() {
    let (pool, _memory) = refusing_pool();
    drop(pool.allocate_folio(&pool.payer()).unwrap().unwrap());
    assert_eq!(
        pool.reserve(8).unwrap().frame(0),
        Pfn(8),
        "4 to 7 have some"
    );
}

/// Room for a home may be where the host is being asked about frames.
#[test]
fn who_wants_a_home_waits_for_the_hosts_answer() {
    let (pool, asks, answer) = slow_pool(60);
    thread::scope(|scope| {
        let frame = scope.spawn(|| pool.allocate(&pool.payer()).map(drop));
        assert_eq!(asks.recv(), Ok((Pfn(1), 3)));
        answer.send(true).unwrap();
        frame.join().unwrap().unwrap();
        // Of a run that is in the way of any home of that size.
        let folio = scope.spawn(|| pool.allocate_folio(&pool.payer()).is_err());
        let (first, _) = asks.recv().unwrap();
        assert_eq!(first, Pfn(4));
        let home = scope.spawn(|| pool.reserve(60).map(|home| home.frame(0)));
        for _ in 0..1000 {
            assert!(!home.is_finished(), "it is known yet whether there is room");
            thread::yield_now();
        }
        answer.send(false).unwrap();
        assert!(folio.join().unwrap());
        assert_eq!(home.join().unwrap().unwrap(), Pfn(4));
    });
}

/// What was free over many calls goes back, but for a few; what was used now and then stays.
#[test]
fn memory_that_nobody_has_used_for_a_while_goes_back_to_the_host() {
    let memory = RefusingMemory::new(1024);
    let bytes = Arc::clone(&memory) as Arc<dyn FrameMemory>;
    let pool = FramePool::with_folios_of(Order::new(2), bytes, 1024, 1000).unwrap();
    let most = COMMIT_FOLIOS + 10;
    drop(folios(&pool, most));
    let give_back = || pool.supply().give_back_surplus();
    let committed = || pool.usage().committed / 4;
    for _ in 1..2 * EPOCH {
        give_back();
        assert_eq!(committed(), most, "they were in use not long ago");
    }
    drop(folios(&pool, most - 4));
    give_back();
    assert_eq!(committed(), most, "four were idle, which is not too much");
    for _ in 1..2 * EPOCH {
        drop(folios(&pool, 3));
        give_back();
    }
    assert_eq!(committed(), most, "they were in use not long ago");
    drop(folios(&pool, 3));
    give_back();
    assert_eq!(committed(), most - 7, "all but three were idle");
    let runs = memory.uncommitted.lock().unwrap().clone();
    assert_eq!(runs, [(4 * (most - 6), 4 * 7)], "the last, in one piece");
    for _ in 0..3 * EPOCH {
        give_back();
    }
    assert_eq!(committed(), COMMIT_FOLIOS);
    // What the host will not have back is there still, and is offered again.
    drop(folios(&pool, most));
    memory.refusals.from(0);
    for _ in 0..3 * EPOCH {
        give_back();
    }
    assert_eq!(committed(), most);
    memory.refusals.never();
    for _ in 0..3 * EPOCH {
        give_back();
    }
    assert_eq!(committed(), COMMIT_FOLIOS);
    let all = folios(&pool, most);
    assert_eq!((pool.usage().in_use, committed()), (4 * most, most));
    drop(all);
    assert_eq!(pool.leftovers(9), []);
}
