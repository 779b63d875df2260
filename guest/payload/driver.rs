//! Driver of a DMA device: a split virtqueue, found complete by polling.
//!
//! At every instant the driver's notes ([`DriverPage`]) say what its buffers hold, so that a snapshot can
//! be checked without knowing where the driver was stopped. That is a matter of order alone: a slot is
//! filled before it is noted as posted, noted before a device can see it, and noted as idle, after it was
//! checked, before anything in its buffer changes.

use core::hint::spin_loop;
use core::mem::offset_of;

use crate::abi::{
    AREA_AVAIL, AREA_DESC, AREA_DRIVER, AREA_HEADERS, AREA_STATUS, AREA_USED, BUFFER_LEN, BootInfo,
    DATA_LEN, DATA_OFFSET, DATA_SPLIT, DEVICE_STRIDE, DriverPage, DriverSlot, FailureKind,
    PAGE_SIZE, PORT_DOORBELL_EVENT, PORT_DOORBELL_EXIT, QUEUE_SIZE, RequestHeader, RequestKind,
    SLOT_IDLE, SLOT_POSTED, SLOT_STRIDE, STATUS_BAD_REQUEST, STATUS_MISMATCH, STATUS_OK,
    STATUS_PENDING, STREAM_SLOTS, Status, buffer_offset, slot_head, slot_of_head,
};
use crate::area::Area;
use crate::formula::{buffer_word_from_key, dma_key, dma_word, margin_key, poison_key};
use crate::port;
use crate::vcpu::{Finding, Vcpu};

/// Slots whose margins are rewritten in one poll.
const MARGINS_A_POLL: u64 = 4;

// Virtio 1.2, 2.7: the split virtqueue.
const DESC_SIZE: u64 = 16;
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const RING_INDEX: u64 = 2;
const RING_ENTRIES: u64 = 4;
const AVAIL_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;

/// The driver of one device.
pub struct Driver {
    seed: u64,
    device: u64,
    area: Area<DEVICE_STRIDE>,
    /// Slots in use: the streaming ones, then one a registered buffer.
    slots: u64,
    /// Entries put in the available ring.
    posted: u16,
    /// Slots that get requests, a bit each. A buffer that could not be registered is not among them.
    usable: u32,
    /// Where the rewriting of margins goes on.
    next_margin: u64,
    /// The used ring made no sense: the device is left alone.
    broken: bool,
}

impl Driver {
    /// Sets up device `device`, with nothing posted.
    ///
    /// # Safety
    /// Once a device: its area is the driver's, and the device's, alone.
    pub unsafe fn new(boot: &BootInfo, device: u64) -> Self {
        let slots = STREAM_SLOTS + boot.layout.registered;
        let driver = Self {
            seed: boot.seed,
            device,
            // SAFETY: the caller's promise.
            area: unsafe { Area::new(boot.layout.device_area(device)) },
            slots,
            posted: 0,
            usable: (1 << slots) - 1,
            next_margin: 0,
            broken: false,
        };
        for ring in [AREA_AVAIL, AREA_USED] {
            driver.area.write(ring, 0u16);
            driver.area.write(ring + RING_INDEX, 0u16);
        }
        let notes = driver.notes();
        notes.write(offset_of!(DriverPage, last_used) as u64, 0u64);
        notes.write(offset_of!(DriverPage, next_seq) as u64, 0u64);
        notes.write(offset_of!(DriverPage, completed) as u64, 0u64);
        for slot in 0..slots {
            let slot = driver.slot(slot);
            slot.write_state(SLOT_IDLE);
            slot.write_margin_count(0);
            slot.write_margins();
        }
        driver
    }

    /// Registers the buffers, and waits until the device has.
    pub fn register_buffers(&mut self, vcpu: &mut Vcpu) {
        if self.slots == STREAM_SLOTS {
            return;
        }
        for slot in STREAM_SLOTS..self.slots {
            self.post(slot, self.slot(slot).registration());
        }
        self.ring_doorbell();
        while !self.broken
            && (STREAM_SLOTS..self.slots).any(|slot| self.slot(slot).state() == SLOT_POSTED)
        {
            self.take_completions(vcpu);
            spin_loop();
        }
    }

    /// Checks what is complete, posts new requests, and writes beside the data of those under way.
    pub fn poll(&mut self, vcpu: &mut Vcpu) {
        if self.broken {
            return;
        }
        self.take_completions(vcpu);
        self.post_idle_slots();
        self.rewrite_margins();
    }

    fn take_completions(&mut self, vcpu: &mut Vcpu) {
        let last_used_at = offset_of!(DriverPage, last_used) as u64;
        let completed_at = offset_of!(DriverPage, completed) as u64;
        let notes = self.notes();
        let mut last_used = notes.read::<u64>(last_used_at) as u16;
        // x86 does not let the loads of entries and statuses go before this one, nor does the compiler.
        let used: u16 = self.area.read(AREA_USED + RING_INDEX);
        if used.wrapping_sub(last_used) > QUEUE_SIZE {
            let gpa = self.area.gpa(AREA_USED + RING_INDEX);
            vcpu.report(self.ring_finding(gpa, last_used.into(), used.into()));
            self.broken = true;
            return;
        }
        while last_used != used {
            if let Err(finding) = self.take_completion(last_used) {
                vcpu.report(finding);
            }
            last_used = last_used.wrapping_add(1);
            notes.write(last_used_at, u64::from(last_used));
            notes.write(completed_at, notes.read::<u64>(completed_at) + 1);
        }
    }

    /// Checks the request in entry `index` of the used ring, and makes its slot idle.
    fn take_completion(&mut self, index: u16) -> Result<(), Finding> {
        let entry = AREA_USED + RING_ENTRIES + u64::from(index % QUEUE_SIZE) * USED_ENTRY;
        let head: u32 = self.area.read(entry);
        let known = slot_of_head(head.into())
            .filter(|&slot| slot < self.slots && self.slot(slot).state() == SLOT_POSTED);
        let Some(number) = known else {
            return Err(self.ring_finding(self.area.gpa(entry), u64::MAX, head.into()));
        };
        let slot = self.slot(number);
        let result = slot.check();
        if slot.kind().is_some_and(|kind| !kind.is_transfer()) && slot.was_refused() {
            self.usable &= !(1 << number);
        }
        slot.write_state(SLOT_IDLE);
        result
    }

    /// Gives every idle slot a request and rings once, if that is worth a doorbell:
    /// half of the slots are idle.
    fn post_idle_slots(&mut self) {
        let idle = (0..self.slots)
            .filter(|&slot| self.usable & (1 << slot) != 0)
            .filter(|&slot| self.slot(slot).state() == SLOT_IDLE)
            .fold(0u32, |set, slot| set | 1 << slot);
        if idle.count_ones() * 2 < self.usable.count_ones() {
            return;
        }
        for slot in (0..self.slots).filter(|slot| idle & (1 << slot) != 0) {
            self.post(slot, self.slot(slot).next_kind());
        }
        self.ring_doorbell();
    }

    fn post(&mut self, number: u64, kind: RequestKind) {
        let notes = self.notes();
        let next_seq_at = offset_of!(DriverPage, next_seq) as u64;
        let seq: u64 = notes.read(next_seq_at);
        notes.write(next_seq_at, seq + 1);

        let slot = self.slot(number);
        slot.fill(kind, seq);
        slot.write_status(seq);
        slot.write_header(kind, seq);
        slot.note_posted(kind, seq);
        slot.write_chain(kind);

        let entry = AREA_AVAIL + RING_ENTRIES + u64::from(self.posted % QUEUE_SIZE) * AVAIL_ENTRY;
        self.area.write(entry, slot_head(number) as u16);
        self.posted = self.posted.wrapping_add(1);
        // From here on the device sees it.
        self.area.write(AREA_AVAIL + RING_INDEX, self.posted);
    }

    fn ring_doorbell(&self) {
        let first = if self.device.is_multiple_of(2) {
            PORT_DOORBELL_EXIT
        } else {
            PORT_DOORBELL_EVENT
        };
        port::out(first + self.device as u16, 0);
    }

    /// Writes beside what the device reads or writes: whoever moves a page under DMA loses one or the other.
    fn rewrite_margins(&mut self) {
        let mut left = MARGINS_A_POLL;
        for _ in 0..self.slots {
            let slot = self.slot(self.next_margin);
            self.next_margin = (self.next_margin + 1) % self.slots;
            if slot.state() == SLOT_POSTED {
                slot.write_margin_count(slot.margin_count() + 1);
                slot.write_margins();
                left -= 1;
                if left == 0 {
                    return;
                }
            }
        }
    }

    fn notes(&self) -> Area<PAGE_SIZE> {
        self.area.part(AREA_DRIVER)
    }

    fn slot(&self, number: u64) -> Slot {
        let notes = offset_of!(DriverPage, slots) as u64 + number * size_of::<DriverSlot>() as u64;
        Slot {
            seed: self.seed,
            device: self.device,
            number,
            notes: self.area.part(AREA_DRIVER + notes),
            header: self.area.part(AREA_HEADERS + number * SLOT_STRIDE),
            status: self.area.part(AREA_STATUS + number * SLOT_STRIDE),
            chain: self.area.part(AREA_DESC + slot_head(number) * DESC_SIZE),
            buffer: self.area.part(buffer_offset(number)),
        }
    }

    fn ring_finding(&self, gpa: u64, expected: u64, found: u64) -> Finding {
        Finding {
            kind: FailureKind::Ring,
            gpa,
            expected,
            found,
            device: self.device,
            seq: 0,
        }
    }
}

/// One slot: its buffer, and all that describes it.
struct Slot {
    seed: u64,
    device: u64,
    number: u64,
    notes: Area<{ size_of::<DriverSlot>() as u64 }>,
    header: Area<SLOT_STRIDE>,
    status: Area<SLOT_STRIDE>,
    chain: Area<{ 4 * DESC_SIZE }>,
    buffer: Area<BUFFER_LEN>,
}

impl Slot {
    fn seq(&self) -> u64 {
        self.notes.read(offset_of!(DriverSlot, seq) as u64)
    }

    fn kind(&self) -> Option<RequestKind> {
        RequestKind::from_raw(self.notes.read(offset_of!(DriverSlot, kind) as u64))
    }

    fn state(&self) -> u32 {
        self.notes.read(offset_of!(DriverSlot, state) as u64)
    }

    fn write_state(&self, state: u32) {
        self.notes
            .write(offset_of!(DriverSlot, state) as u64, state);
    }

    fn margin_count(&self) -> u64 {
        self.notes.read(offset_of!(DriverSlot, margin) as u64)
    }

    fn write_margin_count(&self, count: u64) {
        self.notes
            .write(offset_of!(DriverSlot, margin) as u64, count);
    }

    /// Key of what the margins hold now.
    fn margin_key(&self) -> u64 {
        margin_key(self.seed, self.device, self.number, self.margin_count())
    }

    fn is_streaming(&self) -> bool {
        self.number < STREAM_SLOTS
    }

    /// How the buffer is registered: every second one for reading only.
    fn registration(&self) -> RequestKind {
        if (self.number - STREAM_SLOTS).is_multiple_of(2) {
            RequestKind::Register
        } else {
            RequestKind::RegisterForReading
        }
    }

    /// What to ask for next: the other direction. A buffer that is registered for reading is read
    /// once, released and registered again: a snapshot may come in between, and then the device is to
    /// hold a page that is shared.
    fn next_kind(&self) -> RequestKind {
        match self.kind() {
            Some(RequestKind::RegisterForReading) => return RequestKind::RegisteredFromGuest,
            Some(RequestKind::Unregister) => return RequestKind::RegisterForReading,
            Some(RequestKind::RegisteredFromGuest)
                if self.registration() == RequestKind::RegisterForReading =>
            {
                return RequestKind::Unregister;
            }
            _ => {}
        }
        let from_guest = match self.kind() {
            Some(RequestKind::ToGuest | RequestKind::RegisteredToGuest) => true,
            Some(RequestKind::FromGuest | RequestKind::RegisteredFromGuest) => false,
            _ => !self.number.is_multiple_of(2),
        };
        match (self.is_streaming(), from_guest) {
            (true, false) => RequestKind::ToGuest,
            (true, true) => RequestKind::FromGuest,
            (false, false) => RequestKind::RegisteredToGuest,
            (false, true) => RequestKind::RegisteredFromGuest,
        }
    }

    /// Writes what the buffer holds while the request is under way.
    fn fill(&self, kind: RequestKind, seq: u64) {
        let key = match kind {
            RequestKind::ToGuest | RequestKind::RegisteredToGuest => {
                poison_key(self.seed, self.device, seq)
            }
            RequestKind::FromGuest | RequestKind::RegisteredFromGuest => {
                dma_key(self.seed, self.device, seq)
            }
            // The bytes stay as they are, on the page as it is: this is no write.
            RequestKind::Register | RequestKind::RegisterForReading | RequestKind::Unregister => {
                return;
            }
        };
        for word in 0..DATA_LEN / 8 {
            self.buffer
                .write(DATA_OFFSET + 8 * word, buffer_word_from_key(key, word));
        }
    }

    fn write_status(&self, seq: u64) {
        self.status.write(offset_of!(Status, seq) as u64, seq);
        self.status
            .write(offset_of!(Status, code) as u64, STATUS_PENDING);
        self.status.write(offset_of!(Status, offset) as u64, 0u32);
    }

    fn write_header(&self, kind: RequestKind, seq: u64) {
        let buffer = self.number.saturating_sub(STREAM_SLOTS) as u32;
        let (gpa, len) = match kind {
            RequestKind::Register | RequestKind::RegisterForReading => {
                (self.buffer.gpa(DATA_OFFSET), DATA_LEN)
            }
            _ => (0, 0),
        };
        self.header
            .write(offset_of!(RequestHeader, kind) as u64, kind as u32);
        self.header
            .write(offset_of!(RequestHeader, buffer) as u64, buffer);
        self.header
            .write(offset_of!(RequestHeader, seq) as u64, seq);
        self.header
            .write(offset_of!(RequestHeader, gpa) as u64, gpa);
        self.header
            .write(offset_of!(RequestHeader, len) as u64, len);
    }

    fn note_posted(&self, kind: RequestKind, seq: u64) {
        self.notes.write(offset_of!(DriverSlot, seq) as u64, seq);
        self.notes
            .write(offset_of!(DriverSlot, kind) as u64, kind as u32);
        // Last: it makes a promise of the other two, and of the buffer.
        self.write_state(SLOT_POSTED);
    }

    /// Writes the descriptors: header, data if it streams, status.
    fn write_chain(&self, kind: RequestKind) {
        let data_flags = match kind {
            RequestKind::ToGuest => DESC_NEXT | DESC_WRITE,
            _ => DESC_NEXT,
        };
        let header = (
            self.header.gpa(0),
            size_of::<RequestHeader>() as u64,
            DESC_NEXT,
        );
        let status = (self.status.gpa(0), size_of::<Status>() as u64, DESC_WRITE);
        if self.is_streaming() {
            let first = (self.buffer.gpa(DATA_OFFSET), DATA_SPLIT, data_flags);
            let second = (
                self.buffer.gpa(DATA_OFFSET + DATA_SPLIT),
                DATA_LEN - DATA_SPLIT,
                data_flags,
            );
            self.write_descriptors([header, first, second, status]);
        } else {
            self.write_descriptors([header, status]);
        }
    }

    fn write_descriptors<const N: usize>(&self, descriptors: [(u64, u64, u16); N]) {
        let first = slot_head(self.number);
        for (place, (gpa, len, flags)) in (0..).zip(descriptors) {
            let at = place * DESC_SIZE;
            self.chain.write(at, gpa);
            self.chain.write(at + 8, len as u32);
            self.chain.write(at + 12, flags);
            self.chain.write(at + 14, (first + place + 1) as u16);
        }
    }

    fn write_margins(&self) {
        let key = self.margin_key();
        for word in margin_words() {
            self.buffer.write(8 * word, buffer_word_from_key(key, word));
        }
    }

    /// Whether the device says that the request makes no sense.
    fn was_refused(&self) -> bool {
        let code: u32 = self.status.read(offset_of!(Status, code) as u64);
        code == STATUS_BAD_REQUEST
    }

    /// Checks a request that the device says is complete: its status, its data, and the margins.
    fn check(&self) -> Result<(), Finding> {
        let (seq, kind) = (self.seq(), self.kind());
        let status_seq: u64 = self.status.read(offset_of!(Status, seq) as u64);
        if status_seq != seq {
            let gpa = self.status.gpa(offset_of!(Status, seq) as u64);
            return Err(self.finding(FailureKind::Ring, gpa, seq, status_seq));
        }
        let code: u32 = self.status.read(offset_of!(Status, code) as u64);
        if code == STATUS_MISMATCH {
            let offset: u32 = self.status.read(offset_of!(Status, offset) as u64);
            let word = u64::from(offset) / 8;
            if word < DATA_LEN / 8 {
                let at = DATA_OFFSET + 8 * word;
                let expected = dma_word(self.seed, self.device, seq, word);
                let found = self.buffer.read(at);
                let gpa = self.buffer.gpa(at);
                return Err(self.finding(FailureKind::DmaFromGuest, gpa, expected, found));
            }
        }
        if code != STATUS_OK {
            let gpa = self.status.gpa(offset_of!(Status, code) as u64);
            return Err(self.finding(FailureKind::Ring, gpa, STATUS_OK.into(), code.into()));
        }
        if let Some(RequestKind::ToGuest | RequestKind::RegisteredToGuest) = kind {
            let key = dma_key(self.seed, self.device, seq);
            for word in 0..DATA_LEN / 8 {
                let at = DATA_OFFSET + 8 * word;
                let expected = buffer_word_from_key(key, word);
                self.expect(FailureKind::DmaToGuest, at, expected)?;
            }
        }
        let key = self.margin_key();
        for word in margin_words() {
            let expected = buffer_word_from_key(key, word);
            self.expect(FailureKind::Margin, 8 * word, expected)?;
        }
        Ok(())
    }

    /// Checks the buffer's word at offset `at`.
    fn expect(&self, kind: FailureKind, at: u64, expected: u64) -> Result<(), Finding> {
        let found: u64 = self.buffer.read(at);
        if found == expected {
            Ok(())
        } else {
            Err(self.finding(kind, self.buffer.gpa(at), expected, found))
        }
    }

    fn finding(&self, kind: FailureKind, gpa: u64, expected: u64, found: u64) -> Finding {
        Finding {
            kind,
            gpa,
            expected,
            found,
            device: self.device,
            seq: self.seq(),
        }
    }
}

/// The words of a buffer that no device touches: before the data, and behind it.
fn margin_words() -> impl Iterator<Item = u64> {
    (0..DATA_OFFSET / 8).chain((DATA_OFFSET + DATA_LEN) / 8..BUFFER_LEN / 8)
}
