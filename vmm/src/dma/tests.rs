//! Devices against a driver written out by hand, on real memory and without KVM.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{
    AREA_AVAIL, AREA_DESC, AREA_HEADERS, AREA_STATUS, AREA_USED, IMAGE_GPA, Layout, QUEUE_SIZE,
    RequestHeader, RequestKind, SLOT_STRIDE, STATUS_BAD_REQUEST, STATUS_MISMATCH, STATUS_OK,
    STATUS_PENDING, Status,
};
use guest::formula::{dma_word, poison_word};

use super::*;
use palimpsest::device::{Quiesce, Stopped};
use palimpsest::host::{PhysMap, Ram};
use palimpsest::mm::{
    AddressSpace, Exclusive, FramePool, Frozen, Gfn, Mmu, MmuError, PAGE_SIZE, Pfn, Protection,
};
use palimpsest::saved::Saved;

const SEED: u64 = 42;
const MEMORY: u64 = 8 << 20;
const FRAMES: u64 = 4 * MEMORY / PAGE_SIZE;
/// The most data of a request.
const MAX_DATA: u64 = super::transfer::MAX_DATA;
/// Nothing waits longer than this for something that should happen.
const PATIENCE: Duration = Duration::from_secs(60);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// There is no window: only devices and the test reach memory.
struct NoWindow;

impl Mmu for NoWindow {
    fn map(&self, _: Gfn, _: Pfn, _: u64, _: Protection) -> Result<(), MmuError> {
        Ok(())
    }
    fn protect(&self, _: Gfn, _: u64, _: Protection) -> Result<(), MmuError> {
        Ok(())
    }
}

struct Rig {
    pool: Arc<FramePool>,
    space: Arc<AddressSpace<Exclusive>>,
    ram: Ram,
    layout: Layout,
    set: DeviceSet,
}

/// What snapshots and restores do with all devices.
impl DeviceSet {
    fn stop(&self, deadline: Instant) -> Stopped<'_> {
        let devices = self.devices().iter().map(|device| &**device as _);
        Stopped::stop(devices.collect(), deadline)
    }

    fn capture(&self) -> Vec<DeviceState> {
        self.devices().iter().map(|device| device.state()).collect()
    }

    fn release_streaming(&self) -> Result<(), DeviceRestoreError> {
        let mut devices = self.devices().iter();
        devices.try_for_each(|device| device.release().map_err(ours))
    }

    fn restore(&self, states: &[DeviceState]) -> Result<(), DeviceRestoreError> {
        let mut devices = self.devices().iter().zip(states);
        devices.try_for_each(|(device, state)| {
            let saved = Saved::new(state.clone());
            device.restore(&saved).map_err(ours)
        })
    }
}

/// What a device of ours says.
fn ours(error: palimpsest::causes::Cause) -> DeviceRestoreError {
    *error.downcast().unwrap()
}

impl Rig {
    fn new(devices: u64) -> Self {
        Self::with_limit(devices, FRAMES)
    }

    /// A guest with `devices` devices, in a pool that has memory for `limit` frames.
    fn with_limit(devices: u64, limit: u64) -> Self {
        let physmap = PhysMap::new(FRAMES).unwrap();
        let pool = FramePool::new(physmap.clone(), FRAMES, limit).unwrap();
        let pages = MEMORY / PAGE_SIZE;
        let space =
            AddressSpace::new(Arc::clone(&pool), Exclusive, Box::new(NoWindow), pages).unwrap();
        let space = Arc::new(space);
        let ram = Ram::new(Arc::clone(&space) as _, physmap);
        let layout = Layout::new(MEMORY, IMAGE_GPA, 1, devices, 0).unwrap();
        let set = DeviceSet::start(&ram, &layout, SEED).unwrap();
        Self {
            pool,
            space,
            ram,
            layout,
            set,
        }
    }

    fn driver(&self, device: u64) -> Driver {
        Driver {
            ram: self.ram.clone(),
            handle: Arc::clone(&self.set.devices()[device as usize]),
            device,
            area: self.layout.device_area(device),
            posted: 0,
            next_seq: 0,
        }
    }

    /// Bytes of test data begin here.
    fn heap(&self) -> u64 {
        self.layout.hammer_base
    }

    fn stop(&self) -> Stopped<'_> {
        let stopped = self.set.stop(Instant::now() + PATIENCE);
        assert!(stopped.all_reached());
        stopped
    }

    /// Does `post`, which gives every device at least one request, and stops them when each is in the middle of
    /// one. That one is published, and no other is begun.
    fn stop_in_the_middle(&self, post: impl FnOnce()) -> Stopped<'_> {
        let devices = self.set.devices();
        let gates: Vec<_> = devices.iter().map(|d| d.hold_transfers()).collect();
        post();
        devices.iter().for_each(|d| begun(d));
        // The stop below might come when the devices are through with everything; this one does not.
        devices.iter().for_each(|d| d.begin_stop());
        drop(gates);
        let stopped = self.stop();
        devices.iter().for_each(|d| d.resume());
        stopped
    }

    /// Has the only device, `device`, begin request `seq`, held, and stops it too early for the end of it.
    fn stop_too_early<'a>(
        &'a self,
        driver: &mut Driver,
        device: &'a Device,
        seq: u64,
    ) -> (MutexGuard<'a, ()>, Stopped<'a>) {
        let data = [(self.heap(), MAX_DATA as u32)];
        driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &data);
        driver.post(0);
        let held = device.hold_transfers();
        driver.ring(Doorbell::Exit);
        begun(device);
        let stopped = self.set.stop(Instant::now());
        assert_eq!(stopped.reached(), [false]);
        (held, stopped)
    }

    fn pfn(&self, gpa: u64) -> Pfn {
        self.space.entry(Gfn::of_gpa(gpa)).unwrap().pfn()
    }

    fn pins(&self, gpa: u64) -> u64 {
        self.pool.state(self.pfn(gpa)).pins()
    }

    fn read_frozen(&self, frozen: &Frozen, gpa: u64, len: u64) -> Vec<u8> {
        (gpa..gpa + len)
            .step_by(1)
            .fold((Vec::new(), None), |(mut bytes, page), at| {
                let gfn = Gfn::of_gpa(at);
                let page: Vec<u8> = match page {
                    Some((held, page)) if held == gfn => page,
                    _ => frozen
                        .with_frame(gfn, |pfn| {
                            let mut page = vec![0; PAGE_SIZE as usize];
                            self.ram
                                .physmap()
                                .slice(pfn, 0, PAGE_SIZE)
                                .copy_to(&mut page[..]);
                            page
                        })
                        .unwrap(),
                };
                bytes.push(page[(at % PAGE_SIZE) as usize]);
                (bytes, Some((gfn, page)))
            })
            .0
    }

    /// Ends the guest, whole, with its `drivers`. Nothing may be left.
    fn end<D>(self, drivers: D) {
        assert!(self.set.take_error().is_none());
        let Self {
            pool,
            space,
            ram,
            set,
            ..
        } = self;
        drop((set, ram, space, drivers));
        assert_eq!(pool.leftovers(16), []);
    }
}

/// What a guest's driver does, by hand.
struct Driver {
    ram: Ram,
    handle: Arc<Device>,
    device: u64,
    area: u64,
    posted: u16,
    next_seq: u64,
}

#[derive(Clone, Copy)]
enum Doorbell {
    Exit,
    Event,
}

impl Driver {
    fn write<const N: usize>(&self, gpa: u64, bytes: [u8; N]) {
        self.ram.write(gpa, &bytes).unwrap();
    }

    fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(gpa, &mut bytes).unwrap();
        bytes
    }

    fn bytes(&self, gpa: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.ram.read(gpa, &mut bytes).unwrap();
        bytes
    }

    fn descriptor(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        write_descriptor(
            &self.ram,
            self.area + AREA_DESC,
            index,
            gpa,
            len,
            flags,
            next,
        );
    }

    fn header_gpa(&self, slot: u64) -> u64 {
        self.area + AREA_HEADERS + slot * SLOT_STRIDE
    }

    fn status_gpa(&self, slot: u64) -> u64 {
        self.area + AREA_STATUS + slot * SLOT_STRIDE
    }

    fn write_header(&self, slot: u64, header: RequestHeader) {
        let gpa = self.header_gpa(slot);
        self.write(gpa, header.kind.to_le_bytes());
        self.write(gpa + 4, header.buffer.to_le_bytes());
        self.write(gpa + 8, header.seq.to_le_bytes());
        self.write(gpa + 16, header.gpa.to_le_bytes());
        self.write(gpa + 24, header.len.to_le_bytes());
    }

    fn clear_status(&self, slot: u64) {
        self.write(self.status_gpa(slot), [0; 16]);
    }

    fn status(&self, slot: u64) -> Status {
        parse_status(&self.read::<16>(self.status_gpa(slot)))
    }

    /// Writes header, status and chain of a request in slot `slot`, whose descriptors begin at `head`.
    fn prepare(&mut self, slot: u64, head: u16, header: RequestHeader, data: &[(u64, u32)]) {
        self.write_header(slot, header);
        self.clear_status(slot);
        let data_flags = if header.kind == RequestKind::ToGuest as u32 {
            NEXT | WRITE
        } else {
            NEXT
        };
        self.descriptor(head, self.header_gpa(slot), 32, NEXT, head + 1);
        let mut index = head + 1;
        for &(gpa, len) in data {
            self.descriptor(index, gpa, len, data_flags, index + 1);
            index += 1;
        }
        self.descriptor(index, self.status_gpa(slot), 16, WRITE, 0);
    }

    /// Makes the chain at `head` available.
    fn post(&mut self, head: u16) {
        let entry = self.area + AREA_AVAIL + 4 + 2 * u64::from(self.posted % QUEUE_SIZE);
        self.write(entry, head.to_le_bytes());
        self.posted = self.posted.wrapping_add(1);
        self.write(self.area + AREA_AVAIL + 2, self.posted.to_le_bytes());
    }

    fn ring(&self, doorbell: Doorbell) {
        match doorbell {
            Doorbell::Exit => self.handle.ring_from_vcpu(),
            Doorbell::Event => self.handle.doorbell().write(1).unwrap(),
        }
    }

    fn used(&self) -> u16 {
        u16::from_le_bytes(self.read(self.area + AREA_USED + 2))
    }

    /// Head and length of entry `index` of the used ring.
    fn used_entry(&self, index: u16) -> (u32, u32) {
        let entry = self.area + AREA_USED + 4 + 8 * u64::from(index % QUEUE_SIZE);
        (
            u32::from_le_bytes(self.read(entry)),
            u32::from_le_bytes(self.read(entry + 4)),
        )
    }

    fn wait_used(&self, count: u16) {
        eventually("completions", || self.used() == count);
    }

    fn seq(&mut self) -> u64 {
        self.next_seq += 1;
        self.next_seq
    }

    /// Does one request in slot 0 and waits for it.
    fn request(
        &mut self,
        header: RequestHeader,
        data: &[(u64, u32)],
        doorbell: Doorbell,
    ) -> Status {
        self.prepare(0, 0, header, data);
        self.post(0);
        self.ring(doorbell);
        self.wait_used(self.posted);
        self.status(0)
    }

    fn stream(&mut self, kind: RequestKind, data: &[(u64, u32)]) -> (u64, Status) {
        let seq = self.seq();
        (seq, self.request(header(kind, seq), data, Doorbell::Exit))
    }

    fn register(&mut self, index: u32, gpa: u64, len: u64) -> Status {
        self.register_for(RequestKind::Register, index, gpa, len)
    }

    fn register_for(&mut self, kind: RequestKind, index: u32, gpa: u64, len: u64) -> Status {
        let seq = self.seq();
        let header = RequestHeader {
            buffer: index,
            gpa,
            len,
            ..header(kind, seq)
        };
        self.request(header, &[], Doorbell::Exit)
    }

    fn registered(&mut self, kind: RequestKind, index: u32) -> (u64, Status) {
        let seq = self.seq();
        let header = RequestHeader {
            buffer: index,
            ..header(kind, seq)
        };
        (seq, self.request(header, &[], Doorbell::Exit))
    }

    /// The data of request `seq`.
    fn data(&self, seq: u64, len: u64) -> Vec<u8> {
        words(len, |word| dma_word(SEED, self.device, seq, word))
    }
}

fn write_descriptor(ram: &Ram, table: u64, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&gpa.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    ram.write(table + 16 * u64::from(index), &bytes).unwrap();
}

fn header(kind: RequestKind, seq: u64) -> RequestHeader {
    RequestHeader {
        kind: kind as u32,
        buffer: 0,
        seq,
        gpa: 0,
        len: 0,
    }
}

fn ok(seq: u64) -> Status {
    answer(seq, STATUS_OK)
}

fn answer(seq: u64, code: u32) -> Status {
    Status {
        seq,
        code,
        offset: 0,
    }
}

fn parse_status(bytes: &[u8]) -> Status {
    let half = |at| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    Status {
        seq: u64::from(half(0)) | u64::from(half(4)) << 32,
        code: half(8),
        offset: half(12),
    }
}

fn words(len: u64, word: impl Fn(u64) -> u64) -> Vec<u8> {
    (0..len.div_ceil(8))
        .flat_map(|index| word(index).to_le_bytes())
        .take(len as usize)
        .collect()
}

#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::yield_now();
    }
}

/// Waits until `device` is in the middle of a transfer. If its transfers are held, it stays there.
fn begun(device: &Device) {
    eventually("the transfer to begin", || {
        device.state().in_flight.is_some()
    });
}

/// Descriptors of uneven lengths, at uneven places and out of order, on pages of their own or shared.
fn uneven(heap: u64) -> Vec<(u64, u32)> {
    vec![
        (heap + 3 * PAGE_SIZE + 5, 1),
        (heap + 3 * PAGE_SIZE + 9, 3),
        (heap + PAGE_SIZE - 4, 9),
        (heap + 8 * PAGE_SIZE - 3, 2 * PAGE_SIZE as u32 + 7),
        (heap + 4 * PAGE_SIZE, 8),
        (heap + 5 * PAGE_SIZE + 1, 1003),
    ]
}

fn total(data: &[(u64, u32)]) -> u64 {
    data.iter().map(|&(_, len)| u64::from(len)).sum()
}

fn gather(driver: &Driver, data: &[(u64, u32)]) -> Vec<u8> {
    data.iter()
        .flat_map(|&(gpa, len)| driver.bytes(gpa, len.into()))
        .collect()
}

fn scatter(driver: &Driver, data: &[(u64, u32)], bytes: &[u8]) {
    let mut done = 0;
    for &(gpa, len) in data {
        let next = done + len as usize;
        driver.ram.write(gpa, &bytes[done..next]).unwrap();
        done = next;
    }
}

#[test]
fn to_guest_writes_the_data_and_nothing_beside_it() {
    let rig = Rig::new(2);
    for device in 0..2 {
        let mut driver = rig.driver(device);
        let (gpa, len) = (rig.heap() + 512, 2 * PAGE_SIZE + 40);
        driver
            .ram
            .write(rig.heap(), &vec![0xee; 4 * PAGE_SIZE as usize])
            .unwrap();
        let (seq, status) = driver.stream(RequestKind::ToGuest, &[(gpa, len as u32)]);
        assert_eq!(status, ok(seq));
        assert_eq!(driver.used_entry(0), (0, len as u32 + 16));
        assert_eq!(driver.bytes(gpa, len), driver.data(seq, len));
        assert!(driver.bytes(rig.heap(), 512).iter().all(|&b| b == 0xee));
        let after = driver.bytes(gpa + len, 4 * PAGE_SIZE - 512 - len);
        assert!(after.iter().all(|&b| b == 0xee));
    }
    let stats = rig.set.stats();
    assert_eq!((stats.to_guest, stats.bytes), (2, 2 * (2 * PAGE_SIZE + 40)));
    rig.end(());
}

#[test]
fn from_guest_finds_the_first_wrong_word() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let (gpa, len) = (rig.heap() + 64, 3 * PAGE_SIZE);
    let data = [(gpa, len as u32)];
    let fill = |driver: &Driver, seq| driver.ram.write(gpa, &driver.data(seq, len)).unwrap();

    fill(&driver, 1);
    assert_eq!(driver.stream(RequestKind::FromGuest, &data), (1, ok(1)));
    assert_eq!(driver.used_entry(0), (0, 16));
    assert_eq!(rig.set.take_mismatches(), []);

    fill(&driver, 2);
    let right = dma_word(SEED, 0, 2, 700);
    driver.write(gpa + 5600, (right ^ 0x100).to_le_bytes());
    driver.write(gpa + 8000, [0xff; 8]);
    let (seq, status) = driver.stream(RequestKind::FromGuest, &data);
    assert_eq!(
        (seq, status.code, status.offset),
        (2, STATUS_MISMATCH, 5600)
    );
    let found = Mismatch {
        device: 0,
        seq: 2,
        offset: 5600,
        gpa: gpa + 5600,
        expected: right,
        found: right ^ 0x100,
    };
    assert_eq!(rig.set.take_mismatches(), [found]);
    assert_eq!(rig.set.take_mismatches(), []);
    let stats = rig.set.stats();
    assert_eq!((stats.from_guest, stats.mismatches), (2, 1));
    rig.end(driver);
}

#[test]
fn words_may_be_cut_anywhere() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let data = uneven(rig.heap());
    let len = total(&data);
    let (seq, status) = driver.stream(RequestKind::ToGuest, &data);
    assert_eq!(status, ok(seq));
    assert_eq!(gather(&driver, &data), driver.data(seq, len));

    // Any single wrong byte is seen, wherever the cuts are.
    for wrong in (0..len).filter(|at| *at < 40 || at % 97 == 0 || len - at < 20) {
        let seq = driver.next_seq + 1;
        let mut bytes = driver.data(seq, len);
        scatter(&driver, &data, &bytes);
        assert_eq!(driver.stream(RequestKind::FromGuest, &data).1, ok(seq));

        let seq = driver.next_seq + 1;
        bytes = driver.data(seq, len);
        bytes[wrong as usize] ^= 0x40;
        scatter(&driver, &data, &bytes);
        let (_, status) = driver.stream(RequestKind::FromGuest, &data);
        let expected = (STATUS_MISMATCH, (wrong / 8 * 8) as u32);
        assert_eq!((status.code, status.offset), expected, "byte {wrong}");
        let mismatch = rig.set.take_mismatches()[0];
        let bit = 0x40 << (8 * (wrong % 8));
        assert_eq!(mismatch.expected ^ mismatch.found, bit, "byte {wrong}");
    }
    rig.end(driver);
}

#[test]
fn both_doorbells_serve_and_the_vcpu_takes_at_once() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    for (doorbell, slot) in [
        (Doorbell::Exit, 0),
        (Doorbell::Event, 1),
        (Doorbell::Exit, 2),
    ] {
        let seq = driver.seq();
        let data = [(rig.heap(), MAX_DATA as u32)];
        let head = 4 * slot as u16;
        driver.prepare(slot, head, header(RequestKind::ToGuest, seq), &data);
        driver.post(head);
        thread::sleep(Duration::from_millis(5));
        assert_eq!(driver.used(), driver.posted - 1, "nobody rang");
        driver.ring(doorbell);
        if let Doorbell::Exit = doorbell {
            assert_eq!(rig.set.capture()[0].queue.next_avail, driver.posted);
        }
        driver.wait_used(driver.posted);
        assert_eq!(driver.status(slot), ok(seq));
    }
    rig.end(driver);
}

#[test]
fn registered_buffer_stays_the_guests_across_forks() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let (gpa, len) = (rig.heap() + 512, 2 * PAGE_SIZE);
    assert_eq!(driver.register(3, gpa, len).code, STATUS_OK);
    assert_eq!(rig.set.stats().registered, 1);
    assert_eq!(rig.pins(gpa), 1);
    let frame = rig.pfn(gpa);

    let mut frozen = Vec::new();
    for _ in 0..3 {
        let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 3);
        assert_eq!(status, ok(seq));
        assert_eq!(driver.bytes(gpa, len), driver.data(seq, len));
        let stopped = rig.stop();
        frozen.push((seq, rig.space.fork().unwrap()));
        stopped.resume();
        assert_eq!(rig.pfn(gpa), frame);
    }
    // What the guest wrote after a fork, the device reads.
    let seq = driver.next_seq + 1;
    driver.ram.write(gpa, &driver.data(seq, len)).unwrap();
    let read = driver.registered(RequestKind::RegisteredFromGuest, 3);
    assert_eq!(read, (seq, ok(seq)));
    for (seq, child) in &frozen {
        assert_ne!(child.frame(Gfn::of_gpa(gpa)).unwrap(), frame);
        assert_eq!(rig.read_frozen(child, gpa, len), driver.data(*seq, len));
    }
    drop(frozen);
    rig.end(driver);
}

#[test]
fn stopped_devices_leave_doorbells_for_later() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    for doorbell in [Doorbell::Exit, Doorbell::Event] {
        let outer = rig.stop();
        // An idle device is stopped without waiting, and stops may be nested.
        let inner = rig.set.stop(Instant::now());
        assert_eq!(inner.reached(), [true]);
        let seq = driver.seq();
        driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &[(rig.heap(), 64)]);
        driver.post(0);
        driver.ring(doorbell);
        thread::sleep(Duration::from_millis(10));
        inner.resume();
        thread::sleep(Duration::from_millis(10));
        let state = &rig.set.capture()[0];
        assert_eq!(state.queue.next_avail, driver.posted - 1);
        assert_eq!(driver.status(0).code, STATUS_PENDING);
        outer.resume();
        driver.wait_used(driver.posted);
        assert_eq!(driver.status(0), ok(seq));
    }
    rig.end(driver);
}

#[test]
fn a_stop_waits_for_one_request_and_begins_no_other() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let device = Arc::clone(&driver.handle);
    let seq = driver.seq();
    let data = [(rig.heap(), MAX_DATA as u32)];
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &data);
    let held = device.hold_transfers();
    (0..16).for_each(|_| driver.post(0));
    driver.ring(Doorbell::Exit);
    begun(&device);
    // By hand, so that it is not for the scheduler to say which comes first: the stop, or the end of the transfer.
    device.begin_stop();
    thread::scope(|scope| {
        // Longer than anyone waits below: only the end of the transfer is in time.
        let stop = scope.spawn(|| rig.set.stop(Instant::now() + 2 * PATIENCE));
        thread::sleep(Duration::from_millis(20));
        assert!(!stop.is_finished(), "the transfer is held");
        assert_eq!(driver.used(), 0);
        drop(held);
        eventually("the end of the transfer to be noticed", || {
            stop.is_finished()
        });
        let stopped = stop.join().unwrap();
        assert_eq!(stopped.reached(), [true]);
        device.resume();
        thread::sleep(Duration::from_millis(1));
        let state = &rig.set.capture()[0];
        assert_eq!((state.in_flight, state.pending.len()), (None, 15));
        assert_eq!((driver.used(), driver.status(0)), (1, ok(seq)));
        stopped.resume();
    });
    driver.wait_used(driver.posted);
    drop(device);
    rig.end(driver);
}

/// A guest thread that keeps both directions busy, and can be parked.
struct Load {
    driver: Driver,
    base: u64,
    doorbell: Doorbell,
    /// What each slot's outstanding request is.
    outstanding: BTreeMap<u16, (u64, RequestKind)>,
    last_used: u16,
}

const LOAD_SLOTS: u64 = 8;
const LOAD_LEN: u64 = 2 * PAGE_SIZE + 24;

impl Load {
    fn buffer(&self, slot: u64) -> u64 {
        self.base + slot * 4 * PAGE_SIZE + 72
    }

    fn step(&mut self) {
        let used = self.driver.used();
        while self.last_used != used {
            let head = self.driver.used_entry(self.last_used).0 as u16;
            let (seq, kind) = self
                .outstanding
                .remove(&head)
                .expect("an outstanding request");
            let slot = u64::from(head / 4);
            assert_eq!(self.driver.status(slot), ok(seq));
            if kind == RequestKind::ToGuest {
                let data = self.driver.bytes(self.buffer(slot), LOAD_LEN);
                assert!(data == self.driver.data(seq, LOAD_LEN), "data of {seq}");
            }
            self.last_used = self.last_used.wrapping_add(1);
        }
        for slot in 0..LOAD_SLOTS {
            let head = 4 * slot as u16;
            if self.outstanding.contains_key(&head) {
                continue;
            }
            let seq = self.driver.seq();
            let (kind, bytes) = if seq.is_multiple_of(3) {
                (RequestKind::FromGuest, self.driver.data(seq, LOAD_LEN))
            } else {
                (RequestKind::ToGuest, self.poison(seq))
            };
            let gpa = self.buffer(slot);
            self.driver.ram.write(gpa, &bytes).unwrap();
            let data = [(gpa, 5001), (gpa + 5001, LOAD_LEN as u32 - 5001)];
            self.driver.prepare(slot, head, header(kind, seq), &data);
            self.outstanding.insert(head, (seq, kind));
            self.driver.post(head);
        }
        self.driver.ring(self.doorbell);
    }

    fn poison(&self, seq: u64) -> Vec<u8> {
        words(LOAD_LEN, |word| {
            poison_word(SEED, self.driver.device, seq, word)
        })
    }

    /// Every request is all done in `frozen`, or none of it.
    fn check(&self, rig: &Rig, frozen: &Frozen, state: &DeviceState) -> [u64; 2] {
        let used_at = self.driver.area + AREA_USED;
        let used = rig.read_frozen(frozen, used_at, 4 + 8 * u64::from(QUEUE_SIZE));
        let index = u16::from_le_bytes([used[2], used[3]]);
        assert_eq!(index, state.queue.next_used);
        assert_eq!(state.in_flight, None);
        let done: Vec<u16> = (0..index.wrapping_sub(self.last_used))
            .map(|n| {
                let at = 4 + 8 * usize::from(self.last_used.wrapping_add(n) % QUEUE_SIZE);
                u16::from_le_bytes([used[at], used[at + 1]])
            })
            .collect();
        assert!(done.iter().all(|head| !state.pending.contains(head)));
        let mut seen = [0, 0];
        for (&head, &(seq, kind)) in &self.outstanding {
            let slot = u64::from(head / 4);
            let status = parse_status(&rig.read_frozen(frozen, self.driver.status_gpa(slot), 16));
            let data = rig.read_frozen(frozen, self.buffer(slot), LOAD_LEN);
            if done.contains(&head) {
                assert_eq!(status, ok(seq));
                assert!(data == self.driver.data(seq, LOAD_LEN), "data of {seq}");
                seen[0] += 1;
            } else {
                assert_eq!(status.code, STATUS_PENDING);
                let before = match kind {
                    RequestKind::ToGuest => self.poison(seq),
                    _ => self.driver.data(seq, LOAD_LEN),
                };
                assert!(data == before, "data of {seq}, which is not done");
                seen[1] += 1;
            }
        }
        seen
    }
}

#[test]
fn a_fork_under_load_has_no_half_done_request() {
    let rig = Rig::new(2);
    let loads: Vec<_> = [(0, Doorbell::Exit), (1, Doorbell::Event)]
        .map(|(device, doorbell)| {
            Mutex::new(Load {
                driver: rig.driver(device),
                base: rig.heap() + device * (1 << 20),
                doorbell,
                outstanding: BTreeMap::new(),
                last_used: 0,
            })
        })
        .into();
    let over = AtomicBool::new(false);
    let mut seen = [0, 0];
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                loads.iter().for_each(|load| load.lock().unwrap().step());
                thread::yield_now();
            }
        });
        // Whatever happens below, the thread above must end.
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..300 {
                thread::sleep(Duration::from_micros(100 + round * 7));
                let mut parked: Vec<_> = loads.iter().map(|load| load.lock().unwrap()).collect();
                // Whatever the scheduler does, some rounds find requests that are done beside others that are not.
                let stopped = if round % 10 == 0 {
                    rig.stop_in_the_middle(|| parked.iter_mut().for_each(|load| load.step()))
                } else {
                    rig.stop()
                };
                let frozen = rig.space.fork().unwrap();
                let states = rig.set.capture();
                stopped.resume();
                for (load, state) in parked.iter().zip(&states) {
                    let [done, open] = load.check(&rig, &frozen, state);
                    seen = [seen[0] + done, seen[1] + open];
                }
            }
        }));
        over.store(true, Ordering::Relaxed);
        checked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    assert!(
        seen[0] > 20 && seen[1] > 20,
        "both cases must occur: {seen:?}"
    );
    let stats = rig.set.stats();
    assert_eq!(
        (stats.mismatches, stats.bad_requests, stats.bad_doorbells),
        (0, 0, 0)
    );
    rig.end(loads);
}

#[test]
fn a_device_that_stops_too_late_is_in_flight_and_publishes_nothing() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let device = Arc::clone(&driver.handle);
    for is_restored in [false, true, false, true] {
        let seq = driver.seq();
        let (held, stopped) = rig.stop_too_early(&mut driver, &device, seq);
        let state = rig.set.capture().remove(0);
        assert_eq!((state.in_flight, state.pending.len()), (Some(0), 0));
        assert_eq!(state.queue.next_avail, driver.posted);
        // Its memory is the device's until the transfer ends.
        assert!(matches!(
            rig.set.release_streaming(),
            Err(DeviceRestoreError::NotStopped { device: 0 })
        ));
        assert!(rig.pins(rig.heap()) > 0);
        drop(held);
        // The transfer ends, and nothing is said of it.
        eventually("the device to be quiet", || {
            rig.set.release_streaming().is_ok()
        });
        assert_eq!(rig.pins(rig.heap()), 0);
        assert_eq!(driver.used(), driver.posted - 1);
        assert_eq!(driver.status(0).code, STATUS_PENDING);
        // It is done again from the start.
        driver.ram.write(rig.heap(), &[0; 64]).unwrap();
        if is_restored {
            rig.set.restore(&[state]).unwrap();
        }
        stopped.resume();
        driver.wait_used(driver.posted);
        assert_eq!(driver.status(0), ok(seq));
        assert_eq!(driver.bytes(rig.heap(), 64), driver.data(seq, 64));
    }
    drop(device);
    rig.end(driver);
}

#[test]
fn what_is_late_is_published_on_resume() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let device = Arc::clone(&driver.handle);
    let seq = driver.seq();
    let (held, stopped) = rig.stop_too_early(&mut driver, &device, seq);
    drop(held);
    eventually("the transfer to end", || device.is_quiet());
    assert_eq!(driver.bytes(rig.heap(), 64), driver.data(seq, 64));
    assert_eq!(rig.set.capture()[0].in_flight, Some(0));
    assert_eq!(driver.used(), 0);
    assert_eq!(driver.status(0).code, STATUS_PENDING);
    // Published as it is, not done again.
    driver.ram.write(rig.heap(), &[0; 64]).unwrap();
    stopped.resume();
    driver.wait_used(1);
    assert_eq!(driver.status(0), ok(seq));
    assert_eq!(driver.bytes(rig.heap(), 64), [0; 64]);
    drop(device);
    rig.end(driver);
}

#[test]
fn restore_takes_pending_requests_again() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let len = MAX_DATA / 8;
    // Every slot has a buffer of its own.
    let buffer = |slot: u64| rig.heap() + slot * 2 * len;
    let kept = rig.heap() - PAGE_SIZE;
    assert_eq!(driver.register(0, kept, 100).code, STATUS_OK);
    // Positions in the rings are about to wrap.
    for _ in 0..60 {
        driver.stream(RequestKind::ToGuest, &[(buffer(0), 8)]);
    }
    let seqs = [(); 8].map(|()| driver.seq());
    for (slot, &seq) in (0..).zip(&seqs) {
        let head = 4 * slot as u16;
        let data = [(buffer(slot), len as u32)];
        driver.prepare(slot, head, header(RequestKind::ToGuest, seq), &data);
        driver
            .ram
            .write(buffer(slot), &vec![1; len as usize])
            .unwrap();
        driver.post(head);
        if slot == 5 {
            // No chain. It has its place among the pending ones, and never completes.
            driver.post(u16::MAX);
        }
    }
    let stopped = rig.stop_in_the_middle(|| driver.ring(Doorbell::Exit));
    let states = rig.set.capture();
    let frozen = rig.space.fork().unwrap();
    let done_then = driver.used();
    stopped.resume();
    let all_done = driver.posted - 1;
    driver.wait_used(all_done);
    assert_eq!((states[0].in_flight, states[0].pending.len()), (None, 8));
    assert_eq!(states[0].queue.next_avail, driver.posted);
    assert_eq!(done_then, all_done - 7);

    // The guest goes on, and does other things in the same slots.
    let seq = driver.seq();
    let more = rig.heap() - 2 * PAGE_SIZE;
    let registration = RequestHeader {
        buffer: 5,
        gpa: more,
        len: 100,
        ..header(RequestKind::Register, seq)
    };
    driver.prepare(1, 4, registration, &[]);
    driver.post(4);
    driver.ring(Doorbell::Event);
    driver.wait_used(all_done + 1);
    assert_eq!(driver.status(1), ok(seq));
    assert_eq!(rig.set.stats().registered, 2);
    let kept_frame = rig.pfn(kept);

    for round in 0..3 {
        let stopped = rig.stop();
        rig.set.release_streaming().unwrap();
        assert_eq!(rig.pins(kept), 1);
        rig.space.restore(&frozen).unwrap();
        rig.set.restore(&states).unwrap();
        assert_eq!(rig.set.capture(), states);
        assert_eq!(driver.used(), done_then);
        // Held across the restore; released; taken again with their pins.
        assert_eq!((rig.pfn(kept), rig.pins(kept)), (kept_frame, 1));
        assert_eq!(rig.pins(more), 0, "round {round}");
        assert_eq!(rig.pins(buffer(7)), 1);
        assert!(driver.bytes(buffer(7), len).iter().all(|&byte| byte == 1));
        stopped.resume();
        driver.wait_used(all_done);
        for (slot, &seq) in (0..).zip(&seqs) {
            assert_eq!(driver.status(slot), ok(seq));
            let data = driver.bytes(buffer(slot), len);
            assert!(
                data == driver.data(seq, len),
                "slot {slot} in round {round}"
            );
        }
    }
    assert_eq!(rig.set.stats().registered, 1);
    drop(frozen);
    rig.end(driver);
}

/// PROTOCOL.md E1.
#[test]
fn a_buffer_registered_for_reading_while_a_snapshot_shares_it_is_still_the_guests() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let (gpa, len) = (rig.heap() + 512, 2 * PAGE_SIZE);
    driver.ram.write(gpa, &vec![7; len as usize]).unwrap();
    let snapshot = rig.space.fork().unwrap();
    let kind = RequestKind::RegisterForReading;
    assert_eq!(driver.register_for(kind, 3, gpa, len).code, STATUS_OK);

    let seq = driver.next_seq + 1;
    driver.ram.write(gpa, &driver.data(seq, len)).unwrap();
    let read = driver.registered(RequestKind::RegisteredFromGuest, 3);
    assert_eq!(read, (seq, ok(seq)));
    assert_eq!(rig.read_frozen(&snapshot, gpa, len), vec![7; len as usize]);

    // A restore does not forget what it is registered for.
    let stopped = rig.stop();
    let states = rig.set.capture();
    assert!(states[0].registered[0].for_reading);
    rig.set.restore(&states).unwrap();
    stopped.resume();
    let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 3);
    assert_eq!(
        status,
        answer(seq, STATUS_BAD_REQUEST),
        "the device must not write"
    );
    drop(snapshot);
    rig.end(driver);
}

#[test]
fn a_released_buffer_is_held_no_more_and_its_index_is_free() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let gpa = rig.heap();
    for kind in [RequestKind::Register, RequestKind::RegisterForReading] {
        assert_eq!(driver.register_for(kind, 5, gpa, 64).code, STATUS_OK);
        assert_eq!((rig.pins(gpa), rig.set.stats().registered), (1, 1));
        let (seq, status) = driver.registered(RequestKind::Unregister, 5);
        assert_eq!(status, ok(seq));
        assert_eq!((rig.pins(gpa), rig.set.stats().registered), (0, 0));
    }
    let (seq, status) = driver.registered(RequestKind::Unregister, 5);
    assert_eq!(status, answer(seq, STATUS_BAD_REQUEST));
    rig.end(driver);
}

#[test]
fn restore_pins_registered_buffers_of_the_snapshot() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let gpa = rig.heap();
    driver.ram.write(gpa, &[7; 64]).unwrap();
    let snapshot = || {
        let stopped = rig.stop();
        let taken = (rig.space.fork().unwrap(), rig.set.capture());
        stopped.resume();
        taken
    };
    let restore = |(memory, states): &(Arc<Frozen>, Vec<DeviceState>)| {
        let stopped = rig.stop();
        rig.set.release_streaming().unwrap();
        rig.space.restore(memory).unwrap();
        rig.set.restore(states).unwrap();
        stopped.resume();
    };
    let without = snapshot();
    let posted_without = driver.posted;
    assert_eq!(driver.register(2, gpa, 64).code, STATUS_OK);
    let with = snapshot();
    let posted_with = driver.posted;

    restore(&without);
    driver.posted = posted_without;
    assert_eq!((rig.pins(gpa), rig.set.stats().registered), (0, 0));
    let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 2);
    assert_eq!(status, answer(seq, STATUS_BAD_REQUEST));

    restore(&with);
    driver.posted = posted_with;
    assert_eq!((rig.pins(gpa), rig.set.stats().registered), (1, 1));
    let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 2);
    assert_eq!(status, ok(seq));
    assert_eq!(driver.bytes(gpa, 64), driver.data(seq, 64));
    // Neither snapshot has seen that.
    for (memory, _) in [&without, &with] {
        assert_eq!(rig.read_frozen(memory, gpa, 64), [7; 64]);
    }
    drop((with, without));
    rig.end(driver);
}

#[test]
fn a_doorbell_rung_just_before_a_snapshot_is_not_lost_in_a_restore() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let stopped = rig.stop();
    let seq = driver.seq();
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &[(rig.heap(), 64)]);
    driver.post(0);
    driver.ring(Doorbell::Event);
    let (memory, states) = (rig.space.fork().unwrap(), rig.set.capture());
    stopped.resume();
    driver.wait_used(1);

    let stopped = rig.stop();
    rig.set.release_streaming().unwrap();
    rig.space.restore(&memory).unwrap();
    rig.set.restore(&states).unwrap();
    assert_eq!(driver.used(), 0);
    stopped.resume();
    driver.wait_used(1);
    assert_eq!(driver.status(0), ok(seq));
    drop(memory);
    rig.end(driver);
}

#[test]
fn states_are_plain_data_and_not_trusted() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    driver.register(1, rig.heap(), 64);
    let good = rig.set.capture();
    let text = serde_json::to_string(&good).unwrap();
    assert_eq!(
        serde_json::from_str::<Vec<DeviceState>>(&text).unwrap(),
        good
    );
    let running = rig.set.restore(&good).unwrap_err();
    assert!(matches!(
        running,
        DeviceRestoreError::NotStopped { device: 0 }
    ));

    let stopped = rig.stop();
    let with = |change: fn(&mut DeviceState)| {
        let mut state = good[0].clone();
        change(&mut state);
        rig.set.restore(&[state]).unwrap_err()
    };
    assert!(matches!(
        with(|s| s.queue.size = 3),
        DeviceRestoreError::Queue(_)
    ));
    assert!(matches!(
        with(|s| s.queue.used_ring = MEMORY - 4),
        DeviceRestoreError::Queue(_)
    ));
    assert!(matches!(
        with(|s| s.queue.desc_table = u64::MAX - 15),
        DeviceRestoreError::Queue(_)
    ));
    assert!(matches!(
        with(|s| s.pending = vec![0; 65]),
        DeviceRestoreError::Pending { pending: 65, .. }
    ));
    assert!(matches!(
        with(|s| s.registered.push(s.registered[0])),
        DeviceRestoreError::Registered { index: 1 }
    ));
    assert!(matches!(
        with(|s| s.registered[0].index = 16),
        DeviceRestoreError::Registered { index: 16 }
    ));
    assert!(matches!(
        with(|s| s.registered[0].gpa = MEMORY),
        DeviceRestoreError::Pin(_)
    ));
    assert!(matches!(
        with(|s| s.registered[0].len = u64::MAX),
        DeviceRestoreError::Registered { .. } | DeviceRestoreError::Pin(_)
    ));
    // A ring that has fewer chains than are pending: there is nothing to take again, and that is that.
    let index = driver.area + AREA_AVAIL + 2;
    for lost in [5, 20] {
        let mut state = good[0].clone();
        state.pending = vec![0; 10];
        driver.write(index, driver.posted.wrapping_sub(lost).to_le_bytes());
        rig.set.restore(&[state]).unwrap();
        let after = &rig.set.capture()[0];
        assert_eq!(after.queue, good[0].queue);
        assert_eq!(after.pending.len(), if lost < 10 { 5 } else { 0 });
    }
    driver.write(index, driver.posted.to_le_bytes());
    // The same index for another buffer.
    let (here, there) = (rig.heap(), rig.heap() + PAGE_SIZE);
    let mut state = good[0].clone();
    state.registered[0].gpa = there;
    rig.set.restore(&[state]).unwrap();
    assert_eq!((rig.pins(here), rig.pins(there)), (0, 1));
    rig.set.restore(&good).unwrap();
    assert_eq!(rig.set.capture(), good);
    stopped.resume();
    let (seq, status) = driver.registered(RequestKind::RegisteredToGuest, 1);
    assert_eq!(status, ok(seq));
    rig.end(driver);
}

/// Writes a chain to slot 0 that is wrong in one way. `None`: there is no place for a status.
type Malformed = (&'static str, fn(&mut Driver, u64), Option<u32>);

fn good_chain(driver: &mut Driver, heap: u64) {
    driver.prepare(
        0,
        0,
        header(RequestKind::ToGuest, 9),
        &[(heap, 64), (heap + 64, 64)],
    );
}

fn with_header(driver: &mut Driver, header: RequestHeader) {
    driver.prepare(0, 0, header, &[]);
}

const MALFORMED: &[Malformed] = &[
    (
        "a loop",
        |d, h| {
            good_chain(d, h);
            d.descriptor(2, h, 8, NEXT | WRITE, 1);
        },
        None,
    ),
    (
        "a descriptor that is its own next",
        |d, _| {
            d.descriptor(0, d.header_gpa(0), 32, NEXT, 0);
        },
        None,
    ),
    (
        "a next that is no descriptor",
        |d, h| {
            good_chain(d, h);
            d.descriptor(2, h, 8, NEXT | WRITE, QUEUE_SIZE);
        },
        None,
    ),
    (
        "no status",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, d.status_gpa(0), 16, 0, 0);
        },
        None,
    ),
    (
        "a short status",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, d.status_gpa(0), 15, WRITE, 0);
        },
        None,
    ),
    (
        "an unaligned status",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, h + PAGE_SIZE - 8, 16, WRITE, 0);
        },
        None,
    ),
    (
        "a status beyond memory",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, MEMORY, 16, WRITE, 0);
        },
        None,
    ),
    (
        "a status at the end of all addresses",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, u64::MAX - 15, 16, WRITE, 0);
        },
        None,
    ),
    (
        "nothing but a status",
        |d, _| {
            d.clear_status(0);
            d.descriptor(0, d.status_gpa(0), 16, WRITE, 0);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "data beyond memory",
        |d, h| {
            good_chain(d, h);
            d.descriptor(2, MEMORY - 8, 16, NEXT | WRITE, 3);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "data at the end of all addresses",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, u64::MAX - 99, 100, NEXT | WRITE, 2);
            d.descriptor(2, u64::MAX, 100, NEXT | WRITE, 3);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "data of no length",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, h, 0, NEXT | WRITE, 2);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "no data",
        |d, _| {
            with_header(d, header(RequestKind::ToGuest, 9));
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "too much data",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, h, MAX_DATA as u32 - 63, NEXT | WRITE, 2);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "more than 2^32 bytes",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, h, u32::MAX, NEXT | WRITE, 2);
            d.descriptor(2, h, u32::MAX, NEXT | WRITE, 3);
        },
        None,
    ),
    (
        "data for the wrong direction",
        |d, h| {
            good_chain(d, h);
            d.descriptor(2, h, 8, NEXT, 3);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a header that is writable",
        |d, h| {
            good_chain(d, h);
            d.descriptor(0, d.header_gpa(0), 32, NEXT | WRITE, 1);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a short header",
        |d, h| {
            good_chain(d, h);
            d.descriptor(0, d.header_gpa(0), 31, NEXT, 1);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a header beyond memory",
        |d, h| {
            good_chain(d, h);
            d.descriptor(0, MEMORY - 16, 32, NEXT, 1);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "an unknown kind",
        |d, h| {
            good_chain(d, h);
            d.write(d.header_gpa(0), 77u32.to_le_bytes());
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "data where there should be none",
        |d, h| {
            good_chain(d, h);
            d.write(
                d.header_gpa(0),
                (RequestKind::RegisteredToGuest as u32).to_le_bytes(),
            );
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a buffer that is not registered",
        |d, _| {
            with_header(d, header(RequestKind::RegisteredFromGuest, 9));
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a registration with too high an index",
        |d, h| {
            let header = RequestHeader {
                buffer: 16,
                gpa: h,
                len: 64,
                ..header(RequestKind::Register, 9)
            };
            with_header(d, header);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a registration of nothing",
        |d, h| {
            with_header(
                d,
                RequestHeader {
                    gpa: h,
                    ..header(RequestKind::Register, 9)
                },
            );
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a registration of all addresses",
        |d, h| {
            with_header(
                d,
                RequestHeader {
                    gpa: h,
                    len: u64::MAX,
                    ..header(RequestKind::Register, 9)
                },
            );
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a registration beyond memory",
        |d, _| {
            let header = RequestHeader {
                gpa: u64::MAX - 4,
                len: 64,
                ..header(RequestKind::Register, 9)
            };
            with_header(d, header);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "a second registration",
        |d, h| {
            assert_eq!(d.register(7, h, 64).code, STATUS_OK);
            let header = RequestHeader {
                buffer: 7,
                gpa: h,
                len: 64,
                ..header(RequestKind::Register, 9)
            };
            with_header(d, header);
        },
        Some(STATUS_BAD_REQUEST),
    ),
    (
        "an indirect table beyond memory",
        |d, h| {
            good_chain(d, h);
            d.descriptor(1, MEMORY - 16, 64, NEXT | INDIRECT, 2);
        },
        None,
    ),
    (
        "an indirect table longer than the ring",
        |d, h| {
            d.write_header(0, header(RequestKind::FromGuest, 9));
            let (header, status) = (d.header_gpa(0), d.status_gpa(0));
            write_descriptor(&d.ram, h, 0, header, 32, NEXT, 1);
            for index in 1..999 {
                write_descriptor(&d.ram, h, index, h, 1, NEXT, index + 1);
            }
            write_descriptor(&d.ram, h, 999, status, 16, WRITE, 0);
            d.descriptor(0, h, 16 * 1000, INDIRECT, 0);
        },
        None,
    ),
    (
        "a status that is not the last",
        |d, h| {
            good_chain(d, h);
            d.descriptor(3, d.status_gpa(0), 16, NEXT | WRITE, QUEUE_SIZE);
        },
        None,
    ),
];

#[test]
fn malformed_chains_are_answered_and_nothing_is_held() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    for (count, &(what, write, expected)) in (1..).zip(MALFORMED) {
        for doorbell in [Doorbell::Exit, Doorbell::Event] {
            if what == "a second registration" && matches!(doorbell, Doorbell::Event) {
                continue;
            }
            driver.clear_status(0);
            write(&mut driver, rig.heap());
            let before = rig.set.stats().bad_requests;
            driver.post(0);
            driver.ring(doorbell);
            driver.wait_used(driver.posted);
            let (head, len) = driver.used_entry(driver.posted - 1);
            assert_eq!(head, 0, "{what}");
            assert_eq!(len, if expected.is_some() { 16 } else { 0 }, "{what}");
            let code = driver.status(0).code;
            assert_eq!(code, expected.unwrap_or(STATUS_PENDING), "{what}");
            assert_eq!(rig.set.stats().bad_requests, before + 1, "{what}");
            let (seq, status) = driver.stream(RequestKind::ToGuest, &[(rig.heap(), 64)]);
            assert_eq!(status, ok(seq), "after {what}, chain {count}");
        }
    }
    assert_eq!(rig.set.stats().bad_doorbells, 0);
    rig.end(driver);
}

#[test]
fn heads_that_are_no_descriptors_keep_their_place_and_get_no_answer() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    driver.post(u16::MAX);
    driver.ring(Doorbell::Event);
    eventually("the bad request", || rig.set.stats().bad_requests == 1);
    let seq = driver.seq();
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &[(rig.heap(), 64)]);
    driver.post(QUEUE_SIZE);
    driver.post(0);
    driver.ring(Doorbell::Exit);
    driver.wait_used(1);
    assert_eq!(driver.used_entry(0), (0, 64 + 16));
    assert_eq!(rig.set.stats().bad_requests, 2);
    rig.end(driver);
}

#[test]
fn a_ring_that_makes_no_sense_is_left_alone() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let index = driver.area + AREA_AVAIL + 2;
    for (count, doorbell) in [(1, Doorbell::Exit), (2, Doorbell::Event)] {
        driver.write(index, (driver.posted + QUEUE_SIZE + 1).to_le_bytes());
        driver.ring(doorbell);
        eventually("the bad doorbell", || {
            rig.set.stats().bad_doorbells == count
        });
        driver.write(index, driver.posted.to_le_bytes());
        let (seq, status) = driver.stream(RequestKind::ToGuest, &[(rig.heap(), 64)]);
        assert_eq!(status, ok(seq));
    }
    rig.end(driver);
}

#[test]
fn an_overrun_ring_bounds_what_is_outstanding() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    let seq = driver.seq();
    let data = [(rig.heap(), MAX_DATA as u32)];
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &data);
    for _ in 0..4 {
        for _ in 0..QUEUE_SIZE / 2 {
            driver.post(0);
        }
        driver.ring(Doorbell::Exit);
        let state = &rig.set.capture()[0];
        let outstanding = state.pending.len() + usize::from(state.in_flight.is_some());
        assert!(outstanding <= usize::from(QUEUE_SIZE));
    }
    // What found no room is taken without another doorbell.
    driver.wait_used(2 * QUEUE_SIZE);
    assert_eq!(rig.set.stats().to_guest, 2 * u64::from(QUEUE_SIZE));
    rig.end(driver);
}

#[test]
fn lack_of_memory_is_an_error_of_the_device_and_not_the_guests() {
    let rig = Rig::with_limit(1, 64);
    let mut driver = rig.driver(0);
    let seq = driver.seq();
    let data = [(rig.heap(), MAX_DATA as u32)];
    driver.prepare(0, 0, header(RequestKind::ToGuest, seq), &data);
    driver.post(0);
    driver.ring(Doorbell::Exit);
    let error = rig.set.take_error().unwrap();
    assert!(matches!(error, DeviceError::Request { device: 0, .. }));
    assert!(rig.set.take_error().is_none());
    thread::sleep(Duration::from_millis(5));
    assert_eq!((driver.used(), driver.status(0).code), (0, STATUS_PENDING));
    assert_eq!(rig.set.stats().bad_requests, 0);
    rig.end(driver);
}

#[test]
fn a_leaked_pin_shows_in_the_accounts() {
    let rig = Rig::new(1);
    rig.set.leak_one_pin().unwrap();
    let Rig {
        pool,
        space,
        ram,
        set,
        ..
    } = rig;
    drop((set, ram, space));
    let left = pool.leftovers(16);
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].1.pins(), 1);
}

#[test]
fn dropping_the_set_releases_everything_whoever_holds_a_device() {
    let rig = Rig::new(1);
    let mut driver = rig.driver(0);
    driver.register(0, rig.heap(), 64);
    for slot in 1..9 {
        let seq = driver.seq();
        let data = [(rig.heap(), MAX_DATA as u32)];
        driver.prepare(
            slot,
            4 * slot as u16,
            header(RequestKind::ToGuest, seq),
            &data,
        );
        driver.post(4 * slot as u16);
    }
    driver.ring(Doorbell::Exit);
    let device = Arc::clone(&driver.handle);
    let gpa = rig.heap();
    let frame = rig.pfn(gpa);
    let Rig {
        pool,
        space,
        ram,
        set,
        ..
    } = rig;
    drop(set);
    assert_eq!(pool.state(frame).pins(), 0);
    device.ring_from_vcpu();
    assert_eq!(device.stats().registered, 0);
    drop((ram, space, driver, device));
    assert_eq!(pool.leftovers(16), []);
}
