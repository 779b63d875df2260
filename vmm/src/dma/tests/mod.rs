//! Devices against a driver written out by hand, on real memory and without KVM.
//!
//! | file | what is tested |
//! |---|---|
//! | `transferring` | what of guest memory is written and read, down to the byte |
//! | `registered` | registered buffers: pins over forks, purpose, release |
//! | `stopping` | stops between two requests, in the middle of one, and too late |
//! | `load` | forks while both directions are busy |
//! | `restoring` | requests taken again, buffers pinned again, bad states refused |
//! | `malformed` | chains that are wrong in one way each |
//! | `rings` | available rings that no right driver would write |
//! | `accounts` | what devices hold, and give back |

mod accounts;
mod load;
mod malformed;
mod registered;
mod restoring;
mod rings;
mod stopping;
mod transferring;

use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{
    AREA_AVAIL, AREA_DESC, AREA_HEADERS, AREA_STATUS, AREA_USED, IMAGE_GPA, Layout, QUEUE_SIZE,
    RequestHeader, RequestKind, SLOT_STRIDE, STATUS_OK, Status,
};
use guest::formula::dma_word;

use super::{Device, DeviceRestoreError, DeviceSet, DeviceState};
use palimpsest::causes::Cause;
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
fn ours(error: Cause) -> DeviceRestoreError {
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

    /// Does `post`, which gives every device at least one request, and stops them when each is in the middle
    /// of one. That one is published, and no other is begun.
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
