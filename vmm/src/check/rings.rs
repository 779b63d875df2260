//! Device areas: rings, data, statuses, margins and what the device itself says must agree.

use std::mem::offset_of;

use guest::abi::{
    AREA_AVAIL, AREA_DRIVER, AREA_STATUS, AREA_USED, BUFFER_LEN, DATA_LEN, DATA_OFFSET, DriverPage,
    DriverSlot, Layout, QUEUE_SIZE, RequestKind, SLOT_IDLE, SLOT_POSTED, SLOT_STRIDE, SLOTS,
    STATUS_OK, STATUS_PENDING, STREAM_SLOTS, Status, buffer_offset, slot_head,
};
use guest::formula::{buffer_word_from_key, dma_key, margin_key, poison_key};

use super::view::View;
use super::violation::{Oracle, Violation};
use crate::dma::DeviceState;

/// Checks one device's area of a snapshot. Returns the pages it has read.
pub(super) fn check(
    view: View<'_>,
    layout: &Layout,
    seed: u64,
    device: u64,
    state: &DeviceState,
    report: &mut dyn FnMut(Violation),
) -> u64 {
    let area = Area {
        view,
        base: layout.device_area(device),
        seed,
        device,
        state,
    };
    area.check_counts(report);
    let slots = (STREAM_SLOTS + layout.registered).min(SLOTS);
    area.check_notes(slots, report);
    let posted = (0..slots)
        .filter(|&slot| area.check_slot(slot, report))
        .count() as u64;
    // The rings, the driver's notes, the statuses.
    4 + posted * BUFFER_LEN / guest::abi::PAGE_SIZE
}

struct Area<'a> {
    view: View<'a>,
    base: u64,
    seed: u64,
    device: u64,
    state: &'a DeviceState,
}

/// How far a request is that the driver has posted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RequestStage {
    /// Not completed: nothing of it is done.
    Waiting,
    /// Being transferred: its data may be there in part.
    InFlight,
    /// Completed: all of it is done.
    Done,
}

impl Area<'_> {
    fn violation(&self, what: String, gpa: u64, expected: String, found: String) -> Violation {
        let mut v = Violation::new(Oracle::Cut, format!("device {}: {what}", self.device));
        v.snapshot = Some(self.view.number);
        v.gpa = Some(gpa);
        v.expected = expected;
        v.found = found;
        v.frame = self.view.describe_frame(gpa / guest::abi::PAGE_SIZE);
        v
    }

    fn ring_index(&self, ring: u64) -> u16 {
        self.view.u16(self.base + ring + 2)
    }

    /// Entry `position` of the used ring: the head of the chain that was completed.
    fn used_entry(&self, position: u16) -> u32 {
        let entry = u64::from(position % QUEUE_SIZE);
        self.view.u32(self.base + AREA_USED + 4 + 8 * entry)
    }

    /// The device's own account against the rings'.
    fn check_counts(&self, report: &mut dyn FnMut(Violation)) {
        let queue = &self.state.queue;
        let used = self.ring_index(AREA_USED);
        if used != queue.next_used {
            report(self.violation(
                "the used ring and the device disagree on how many requests are done".to_owned(),
                self.base + AREA_USED + 2,
                format!("{} (by the device)", queue.next_used),
                format!("{used} (in memory)"),
            ));
        }
        let taken = self.state.pending.len() + usize::from(self.state.in_flight.is_some());
        let done = queue.next_avail.wrapping_sub(taken as u16);
        if done != queue.next_used {
            report(self.violation(
                format!(
                    "{taken} requests are taken and not done, and the queue's indices do not say so"
                ),
                self.base + AREA_USED + 2,
                format!("{done}"),
                format!("{}", queue.next_used),
            ));
        }
        let posted = self.ring_index(AREA_AVAIL);
        if posted.wrapping_sub(queue.next_avail) > QUEUE_SIZE {
            report(self.violation(
                "the device has taken requests that are not in the ring".to_owned(),
                self.base + AREA_AVAIL + 2,
                format!("at least {}", queue.next_avail),
                format!("{posted}"),
            ));
        }
    }

    /// Compares the driver's notes with the rings. What else is checked goes by these notes: if they were
    /// lost, nothing would be.
    fn check_notes(&self, slots: u64, report: &mut dyn FnMut(Violation)) {
        let notes = self.base + AREA_DRIVER;
        let note = |offset: usize| (notes + offset as u64, self.view.u64(notes + offset as u64));
        let posted = self.ring_index(AREA_AVAIL);
        let last_used = note(offset_of!(DriverPage, last_used)).1 as u16;
        let is_posted = |&slot: &u64| self.view.u32(self.slot_state(slot)) == SLOT_POSTED;
        let on_their_way = (0..slots).filter(is_posted).count() as u16;
        // Of each pair one is written before the other, and a vCPU may have been stopped in between.
        let pairs = [
            (
                "requests posted",
                note(offset_of!(DriverPage, next_seq)),
                posted,
                [0, 1, 0],
            ),
            (
                "requests completed",
                note(offset_of!(DriverPage, completed)),
                last_used,
                [0, u16::MAX, 0],
            ),
            (
                "requests on their way",
                (self.slot_state(0), on_their_way.into()),
                posted.wrapping_sub(last_used),
                [0, 1, u16::MAX],
            ),
        ];
        for (what, (gpa, found), expected, apart) in pairs {
            if !apart.contains(&(found as u16).wrapping_sub(expected)) {
                report(self.violation(
                    format!("the driver's notes and the rings disagree on {what}"),
                    gpa,
                    format!("{expected}, by the rings"),
                    format!("{found}"),
                ));
            }
        }
    }

    fn slot_notes(&self, slot: u64) -> u64 {
        self.base
            + AREA_DRIVER
            + offset_of!(DriverPage, slots) as u64
            + slot * size_of::<DriverSlot>() as u64
    }

    fn slot_state(&self, slot: u64) -> u64 {
        self.slot_notes(slot) + offset_of!(DriverSlot, state) as u64
    }

    /// Says whether its data was checked.
    fn check_slot(&self, slot: u64, report: &mut dyn FnMut(Violation)) -> bool {
        let notes = self.slot_notes(slot);
        let seq = self.view.u64(notes + offset_of!(DriverSlot, seq) as u64);
        let kind = self.view.u32(notes + offset_of!(DriverSlot, kind) as u64);
        let state = self.view.u32(notes + offset_of!(DriverSlot, state) as u64);
        let margin = self.view.u64(notes + offset_of!(DriverSlot, margin) as u64);
        self.check_margins(slot, margin, report);
        let kind = match (state, RequestKind::from_raw(kind)) {
            (SLOT_IDLE, _) => return false,
            (SLOT_POSTED, Some(kind)) => kind,
            _ => {
                report(self.violation(
                    format!("what slot {slot} is doing makes no sense"),
                    self.slot_state(slot),
                    format!("state {SLOT_IDLE} or {SLOT_POSTED}, and a kind of request"),
                    format!("state {state}, kind {kind}"),
                ));
                return false;
            }
        };
        if !kind.is_transfer() {
            return false;
        }
        let stage = self.stage(slot);
        self.check_status(slot, seq, stage, report);
        self.check_data(slot, seq, kind, stage, report);
        true
    }

    fn stage(&self, slot: u64) -> RequestStage {
        let head = slot_head(slot);
        if self.state.in_flight.map(u64::from) == Some(head) {
            return RequestStage::InFlight;
        }
        // Completions the driver has not dealt with yet. One it has dealt with, but not noted so, is of a
        // request that is still posted: looking one further back covers it, since its slot is idle before it
        // counts on.
        let last = self.base + AREA_DRIVER + offset_of!(DriverPage, last_used) as u64;
        let (mut at, end) = (self.view.u64(last) as u16, self.ring_index(AREA_USED));
        while at != end {
            if u64::from(self.used_entry(at)) == head {
                return RequestStage::Done;
            }
            at = at.wrapping_add(1);
        }
        RequestStage::Waiting
    }

    fn check_status(
        &self,
        slot: u64,
        seq: u64,
        stage: RequestStage,
        report: &mut dyn FnMut(Violation),
    ) {
        let expected = match stage {
            RequestStage::Done => STATUS_OK,
            RequestStage::Waiting => STATUS_PENDING,
            RequestStage::InFlight => return,
        };
        let status = self.base + AREA_STATUS + slot * SLOT_STRIDE;
        let code = self.view.u32(status + offset_of!(Status, code) as u64);
        let of = self.view.u64(status + offset_of!(Status, seq) as u64);
        if (code, of) != (expected, seq) {
            report(self.violation(
                format!("the status of request {seq} and the used ring disagree"),
                status,
                format!("code {expected} of request {seq}"),
                format!("code {code} of request {of}"),
            ));
        }
    }

    fn check_data(
        &self,
        slot: u64,
        seq: u64,
        kind: RequestKind,
        stage: RequestStage,
        report: &mut dyn FnMut(Violation),
    ) {
        let to_guest = matches!(kind, RequestKind::ToGuest | RequestKind::RegisteredToGuest);
        let (key, whose) = match (to_guest, stage) {
            (true, RequestStage::InFlight) => return,
            (true, RequestStage::Waiting) => (poison_key(self.seed, self.device, seq), "the guest"),
            _ => (dma_key(self.seed, self.device, seq), "the request"),
        };
        let data = self.base + buffer_offset(slot) + DATA_OFFSET;
        for word in 0..DATA_LEN / 8 {
            let (expected, found) = (
                buffer_word_from_key(key, word),
                self.view.u64(data + 8 * word),
            );
            if expected != found {
                let what = match stage {
                    RequestStage::Done => {
                        format!("request {seq} is completed and its data is not there")
                    }
                    _ => format!("request {seq} is not completed and its buffer was written"),
                };
                let expected = format!("{expected:#018x} (by {whose})");
                let mut v =
                    self.violation(what, data + 8 * word, expected, format!("{found:#018x}"));
                v.last_writer = self.name_writer(seq, word, found);
                report(v);
                return;
            }
        }
    }

    /// Who wrote word `word` of the data of request `seq`, if the formula tells.
    fn name_writer(&self, seq: u64, word: u64, found: u64) -> String {
        let is = |key| found == buffer_word_from_key(key, word);
        if is(dma_key(self.seed, self.device, seq)) {
            format!("device {} or the guest, for request {seq}", self.device)
        } else if is(poison_key(self.seed, self.device, seq)) {
            format!("the guest, before it posted request {seq}")
        } else {
            "unknown: neither is for this request".to_owned()
        }
    }

    /// The guest rewrites its margins from the first word to the last: up to some word they are of the newest
    /// count, from there on of the one before.
    fn check_margins(&self, slot: u64, count: u64, report: &mut dyn FnMut(Violation)) {
        let buffer = self.base + buffer_offset(slot);
        let new = margin_key(self.seed, self.device, slot, count);
        let old = margin_key(self.seed, self.device, slot, count.wrapping_sub(1));
        let words = (0..DATA_OFFSET / 8).chain((DATA_OFFSET + DATA_LEN) / 8..BUFFER_LEN / 8);
        let mut key = new;
        for word in words {
            let found = self.view.u64(buffer + 8 * word);
            if found != buffer_word_from_key(key, word) {
                key = old;
            }
            let expected = buffer_word_from_key(key, word);
            if found != expected {
                report(self.violation(
                    format!("the guest's own bytes beside slot {slot} are lost"),
                    buffer + 8 * word,
                    format!("{expected:#018x} (by the guest, count {count} or the one before)"),
                    format!("{found:#018x}"),
                ));
                return;
            }
        }
    }
}
