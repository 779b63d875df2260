//! The census: what each has alone and what it shares, and why a frame is alive.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::soft::soft_pool_of;
use super::*;

const REGION: u64 = 4;
const PAGES: u64 = 2 * REGION;

struct Host {
    pool: Arc<FramePool>,
    memory: Arc<SoftMemory>,
}

impl Host {
    fn new() -> Self {
        let (pool, memory) = soft_pool_of(Order::new(2), 256).unwrap();
        Self { pool, memory }
    }

    /// A machine every page of which is written.
    fn machine(&self) -> SoftVm<AnyPolicy> {
        let vm = SoftVm::new(&self.pool, &self.memory, right(), PAGES).unwrap();
        vm.space.leave_to_fork(0);
        vm.space.set_whole_price(u32::MAX);
        write_all(&vm, 1);
        vm
    }

    fn clone_of(&self, frozen: &Frozen) -> SoftVm<AnyPolicy> {
        let vm = SoftVm::clone_of(frozen, &self.memory, right()).unwrap();
        vm.space.set_whole_price(u32::MAX);
        vm
    }

    /// A census of machines, from number 0 on, and of snapshots, from 10 on.
    fn census<'a>(
        &'a self,
        machines: &[&'a SoftVm<AnyPolicy>],
        snapshots: &[&'a Frozen],
    ) -> Census<'a> {
        let mut census = Census::new(&self.pool);
        for (label, vm) in (0..).zip(machines) {
            census.add_space(label, &vm.space).unwrap();
        }
        for (label, snapshot) in (10..).zip(snapshots) {
            census.add_snapshot(label, snapshot).unwrap();
        }
        census
    }

    /// Of each: pages, frames it alone has, and frames that it shares. It must add up.
    fn count(
        &self,
        machines: &[&SoftVm<AnyPolicy>],
        snapshots: &[&Frozen],
    ) -> Vec<(u64, u64, u64)> {
        let counts = self.census(machines, snapshots).count();
        assert!(counts.adds_up(), "{counts:?}");
        let shares: f64 = counts.holders.iter().map(Holding::fair_share).sum();
        assert!((shares - counts.shared() as f64).abs() < 1e-9);
        let alone: u64 = counts.holders.iter().map(Holding::alone).sum();
        assert_eq!(alone, counts.alone());
        assert_eq!(alone + counts.shared() + counts.held, counts.in_use);
        let each = counts.holders.iter();
        each.map(|h| (h.pages, h.alone(), h.shared())).collect()
    }
}

fn write_all(vm: &SoftVm<AnyPolicy>, value: u64) {
    (0..PAGES).for_each(|n| vm.cpu_write(Gfn(n), value + n).unwrap());
}

#[test]
fn what_is_shared_and_what_is_alone_adds_up_as_machines_diverge() {
    let host = Host::new();
    let vm = host.machine();
    assert_eq!(host.count(&[&vm], &[]), [(8, 8, 0)]);
    let first = vm.space.fork().unwrap();
    assert_eq!(host.count(&[&vm], &[&first]), [(8, 0, 8), (8, 0, 8)]);
    // Sharers move; the folio is split.
    vm.cpu_write(P, 50).unwrap();
    assert_eq!(host.count(&[&vm], &[&first]), [(8, 1, 7), (8, 1, 7)]);
    let second = vm.space.fork().unwrap();
    let all = [(8, 0, 8), (8, 1, 7), (8, 0, 8)];
    assert_eq!(host.count(&[&vm], &[&first, &second]), all);
    // The writer moves.
    let clone = host.clone_of(&first);
    clone.cpu_write(Gfn(REGION), 60).unwrap();
    let all = [(8, 0, 8), (8, 1, 7), (8, 0, 8), (8, 0, 8)];
    assert_eq!(host.count(&[&vm, &clone], &[&second, &first]), all);
    let counts = host.census(&[&vm, &clone], &[&second, &first]).count();
    let by_holders: Vec<_> = counts.frames.iter().collect();
    // The clone's own page; page 0 of either side and the page the clone left; the others.
    assert_eq!(by_holders, [(1, 1), (2, 2), (3, 1), (4, 6)]);
    let shares = counts.holders.iter().map(Holding::fair_share);
    let expected = [
        0.5 + 1.0 / 3.0 + 1.5,
        0.5 + 1.5,
        0.5 + 1.0 / 3.0 + 1.5,
        0.5 + 1.0 / 3.0 + 1.5,
    ];
    for (share, expected) in shares.zip(expected) {
        assert!((share - expected).abs() < 1e-9, "{counts:?}");
    }
    // Whoever goes, what it had alone comes back.
    drop(vm);
    host.count(&[&clone], &[&second, &first]);
    drop(first);
    assert_eq!(host.count(&[&clone], &[&second]), [(8, 2, 6), (8, 2, 6)]);
    drop(second);
    assert_eq!(host.count(&[&clone], &[]), [(8, 8, 0)]);
}

#[test]
fn a_frame_that_a_machine_shows_twice_is_one_frame() {
    let host = Host::new();
    let vm = host.machine();
    vm.cpu_write(Q, 1).unwrap();
    vm.space.merge(P, &vm.space, Q).unwrap();
    assert_eq!(host.count(&[&vm], &[]), [(8, 7, 0)]);
    let frozen = vm.space.fork().unwrap();
    assert_eq!(host.count(&[&vm], &[&frozen]), [(8, 0, 7), (8, 0, 7)]);
    let why = host
        .census(&[&vm], &[&frozen])
        .why(vm.space.entry(P).unwrap().pfn());
    let entries = |how, label| {
        let it = why
            .mapped
            .iter()
            .filter(move |m| (m.how, m.label) == (how, label));
        it.map(|m| m.gfn).collect::<Vec<_>>()
    };
    assert_eq!(entries(How::Entry, 0), [P, Q]);
    assert_eq!(entries(How::Snapshot, 10), [P, Q]);
    // In common with the snapshot.
    assert_eq!(entries(How::Kept, 0), [P, Q]);
    assert_eq!((why.state.maps(), why.others), (4, 0));
}

#[test]
fn frames_that_only_holds_keep_are_held() {
    let host = Host::new();
    let vm = host.machine();
    let pin = vm.space.pin(P, Access::Write).unwrap();
    let frozen = vm.space.fork().unwrap();
    let get = frozen.get(P).unwrap();
    // The eager copy is the snapshot's alone.
    assert_eq!(host.count(&[&vm], &[&frozen]), [(8, 1, 7), (8, 1, 7)]);
    drop((vm, frozen));
    assert_eq!(host.count(&[], &[]), []);
    let census = host.census(&[], &[]);
    assert_eq!(census.count().held, 2);
    let why = census.why(pin.pfn());
    assert_eq!((why.state.pins(), why.state.gets()), (1, 0));
    assert!(why.is_in_use && why.mapped.is_empty() && why.others == 0);
    assert_eq!(census.why(get.pfn()).state.gets(), 1);
    let pfn = pin.pfn();
    drop((pin, get));
    let why = census.why(pfn);
    assert!(!why.is_in_use && why.state.refs() == 0);
}

#[test]
fn what_nobody_accounts_for_is_unexplained() {
    let host = Host::new();
    let (vm, other) = (host.machine(), host.machine());
    let frozen = vm.space.fork().unwrap();
    let counts = host.census(&[&vm], &[&frozen]).count();
    assert_eq!((counts.unexplained, counts.adds_up()), (PAGES, false));
    assert_eq!(counts.unexplained_frames.len() as u64, PAGES);
    assert!(counts.unexplained_frames.iter().all(|(_, s)| s.maps() == 1));
    let pfn = other.space.entry(P).unwrap().pfn();
    let census = host.census(&[&vm], &[]);
    assert_eq!(
        (census.why(pfn).mapped, census.why(pfn).others),
        (vec![], 1)
    );
    // Somebody else shares it, too. What is kept is the snapshot's mapping.
    let shared = vm.space.entry(P).unwrap().pfn();
    assert_eq!(host.census(&[], &[&frozen]).why(shared).others, 1);
    assert_eq!(host.census(&[&vm], &[]).why(shared).others, 0);
    // What two snapshots and the space have in common is one mapping, which stands for a clone's, too, until
    // that does something with the region; then it has one of its own.
    let (again, clone) = (vm.space.fork().unwrap(), host.clone_of(&frozen));
    let borrowed = host.census(&[&vm, &clone], &[&frozen, &again]).why(shared);
    let seen = (
        borrowed.state.maps(),
        borrowed.mapped.len(),
        borrowed.others,
    );
    assert_eq!(seen, (2, 6, 0));
    let why = || host.census(&[&vm], &[&frozen, &again]).why(shared);
    assert_eq!((why().state.maps(), why().others), (2, 0));
    clone.space.unshare(Gfn(P.0 + 1)).unwrap();
    let why = why();
    assert_eq!((why.state.maps(), why.mapped.len(), why.others), (3, 4, 1));
    drop((again, clone));
    // A frame that was allocated, and that nothing has yet.
    let fresh = host.pool.allocate(&host.pool.payer()).unwrap();
    let counts = host.census(&[&vm, &other], &[&frozen]).count();
    let named = [(fresh.pfn(), FrameState::FREE)];
    assert_eq!(
        (counts.unexplained, &counts.unexplained_frames[..]),
        (1, &named[..])
    );
    assert!(!counts.adds_up());
    // No more of them are named than somebody would read.
    let many: Vec<_> = (0..30)
        .map(|_| host.pool.allocate(&host.pool.payer()))
        .collect();
    let counts = host.census(&[&vm, &other], &[&frozen]).count();
    assert_eq!(
        (counts.unexplained, counts.unexplained_frames.len()),
        (31, 16)
    );
    drop((fresh, many));
    host.count(&[&vm, &other], &[&frozen]);
}

/// What machines that run leave in a count.
#[test]
fn a_count_whose_parts_do_not_agree_does_not_add_up() {
    let host = Host::new();
    let vm = host.machine();
    let frozen = vm.space.fork().unwrap();
    let exact = host.census(&[&vm], &[&frozen]).count();
    let changed = |change: fn(&mut Counts)| {
        let mut counts = exact.clone();
        change(&mut counts);
        counts.adds_up()
    };
    assert!(changed(|_| ()));
    assert!(!changed(|counts| counts.in_use += 1));
    assert!(!changed(|counts| counts.unexplained = 1));
    assert!(!changed(|counts| counts.held = 1));
    assert!(!changed(|counts| drop(counts.holders.pop())));
}

#[test]
fn there_is_no_reason_for_what_is_not_in_use() {
    let host = Host::new();
    let vm = host.machine();
    let census = host.census(&[&vm], &[]);
    for pfn in [Pfn::ZERO, Pfn(1 << 40), Pfn(255)] {
        let why = census.why(pfn);
        assert!(!why.is_in_use && why.mapped.is_empty() && why.others == 0);
    }
    let why = census.why(vm.space.entry(Gfn(6)).unwrap().pfn());
    let mapped = MappedBy {
        label: 0,
        gfn: Gfn(6),
        how: How::Entry,
    };
    assert_eq!((why.mapped, why.is_in_use), (vec![mapped], true));
}

#[test]
fn frames_of_another_pool_are_not_counted() {
    let (host, other) = (Host::new(), Host::new());
    let vm = other.machine();
    let frozen = vm.space.fork().unwrap();
    let mut census = Census::new(&host.pool);
    assert_eq!(census.add_space(3, &vm.space), Err(OtherPool { label: 3 }));
    let error = census.add_snapshot(4, &frozen).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the frames of holder 4 are of another pool"
    );
    assert_eq!(format!("{census:?}"), "Census []");
    assert_eq!(census.count().holders, []);
}

/// Memory that was never touched, and that was given back.
#[test]
fn pages_without_a_frame_are_no_pages() {
    let host = Host::new();
    let vm = host.machine();
    vm.space.discard(Q, 2).unwrap();
    assert_eq!(host.count(&[&vm], &[]), [(6, 6, 0)]);
    let frozen = vm.space.fork().unwrap();
    assert_eq!(host.count(&[&vm], &[&frozen]), [(6, 0, 6), (6, 0, 6)]);
    let untouched = SoftVm::new(&host.pool, &host.memory, right(), PAGES).unwrap();
    assert_eq!(host.count(&[&vm, &untouched], &[&frozen])[1], (0, 0, 0));
}

/// What is reported is of no use then, but whoever asks does no harm, and afterwards it is exact.
#[test]
fn a_census_beside_running_machines_waits_for_nobody_and_harms_nobody() {
    let host = Host::new();
    let machines = [host.machine(), host.machine()];
    let frozen = machines[0].space.fork().unwrap();
    let clone = host.clone_of(&frozen);
    let all = [&machines[0], &machines[1], &clone];
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let runs = all.map(|vm| {
            scope.spawn(move || {
                let mut kept = None;
                for round in 0..300 {
                    write_all(vm, round);
                    let snapshot = vm.space.fork().unwrap();
                    let pin = vm.space.pin(Gfn(round % PAGES), Access::Write).unwrap();
                    write_all(vm, round + 1);
                    assert_eq!(vm.read_frozen(&snapshot, P), round);
                    kept = Some(snapshot);
                    vm.space.discard(Gfn((round + 3) % PAGES), 1).unwrap_or(0);
                    vm.space.prepare_fork();
                    drop(pin);
                }
                drop(kept);
            })
        });
        let (host, frozen, is_done) = (&host, &frozen, &is_done);
        let asking = scope.spawn(move || {
            let census = host.census(&all, &[frozen]);
            let mut asked = 0;
            while !is_done.load(Ordering::Acquire) || asked == 0 {
                let counts = census.count();
                assert_eq!(counts.holders.len(), 4);
                census.why(Pfn(1 + asked % 255));
                asked += 1;
            }
        });
        runs.into_iter().for_each(|run| run.join().unwrap());
        is_done.store(true, Ordering::Release);
        asking.join().unwrap();
    });
    host.count(&all, &[&frozen]);
}

/// A census waits for one region at a time, and for no fork.
#[test]
fn a_census_does_not_wait_for_a_fork() {
    let host = Host::new();
    let vm = host.machine();
    let alone = vm.space.mapped.enter_alone().unwrap();
    let counts = beside(alone, || host.count(&[&vm], &[]));
    assert_eq!(counts, [(8, 8, 0)]);
}
