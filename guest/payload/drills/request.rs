//! One request to a device at a time, and one doorbell for each.
//!
//! Nobody rings again, so a request that is on its way in a snapshot is done after a restore only if the
//! device comes back with it.

use core::arch::x86_64::_rdtsc;
use core::hint::spin_loop;
use core::mem::offset_of;

use super::Vcpu;
use crate::abi::{
    AREA_AVAIL, AREA_DESC, AREA_HEADERS, AREA_STATUS, AREA_USED, DEVICE_STRIDE, PAGE_SIZE,
    PORT_DOORBELL_EVENT, PORT_DOORBELL_EXIT, QUEUE_SIZE, RequestHeader, RequestKind, STATUS_OK,
    STATUS_PENDING, Status,
};
use crate::area::Area;
use crate::formula::dma_word;
use crate::port;

/// Bytes of data: as many as a request may have, so that it takes its time.
const DATA: u64 = 1 << 20;
/// Offset in a ring of its index, and of its entries.
const RING_INDEX: u64 = 2;
const RING_ENTRIES: u64 = 4;
/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Ticks of the clock that no request takes, on no host, by far.
const PATIENCE: u64 = 1 << 37;

/// Asks, rings, waits, and checks what came.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    let layout = vcpu.layout();
    assert!(layout.devices > 0, "this drill needs a device");
    let (area_gpa, data_gpa) = (layout.device_area(0), layout.hammer_base);
    // SAFETY: device 0's area is driven by this vCPU alone, and the data are hammered memory; no Rust object
    // lies in either.
    let (area, data) = unsafe {
        (
            Area::<DEVICE_STRIDE>::new(area_gpa),
            Area::<DATA>::new(data_gpa),
        )
    };
    let header = area.part::<{ size_of::<RequestHeader>() as u64 }>(AREA_HEADERS);
    let status = area.part::<{ size_of::<Status>() as u64 }>(AREA_STATUS);
    let chain = [
        (header.gpa(0), size_of::<RequestHeader>() as u64, NEXT),
        (data_gpa, DATA, NEXT | WRITE),
        (status.gpa(0), size_of::<Status>() as u64, WRITE),
    ];
    for (number, (gpa, len, flags)) in (0..).zip(chain) {
        let descriptor = AREA_DESC + number * 16;
        area.write(descriptor, gpa);
        area.write(descriptor + 8, len as u32);
        area.write(descriptor + 12, flags);
        area.write(descriptor + 14, number as u16 + 1);
    }
    header.write(
        offset_of!(RequestHeader, kind) as u64,
        RequestKind::ToGuest as u32,
    );
    loop {
        let seq = vcpu.rounds + 1;
        header.write(offset_of!(RequestHeader, seq) as u64, seq);
        status.write(offset_of!(Status, code) as u64, STATUS_PENDING);
        let entry = vcpu.rounds % u64::from(QUEUE_SIZE);
        area.write(AREA_AVAIL + RING_ENTRIES + 2 * entry, 0u16);
        area.write(AREA_AVAIL + RING_INDEX, seq as u16);
        // By turns the kind that exits and the kind that signals.
        let doorbell = if seq.is_multiple_of(2) {
            PORT_DOORBELL_EXIT
        } else {
            PORT_DOORBELL_EVENT
        };
        port::out(doorbell, 0);

        let since = now();
        while area.read::<u16>(AREA_USED + RING_INDEX) != seq as u16 {
            // A restored guest may find the clock set back.
            if now().saturating_sub(since) > PATIENCE {
                vcpu.fail(format_args!("request {seq} is not done"));
            }
            spin_loop();
        }
        let answer: (u64, u32) = (
            status.read(offset_of!(Status, seq) as u64),
            status.read(offset_of!(Status, code) as u64),
        );
        if answer != (seq, STATUS_OK) {
            vcpu.fail(format_args!(
                "request {seq} was answered with sequence number and status {answer:?}"
            ));
        }
        // A word of each page.
        for page in 0..DATA / PAGE_SIZE {
            let offset = page * PAGE_SIZE + page % 512 * 8;
            let found: u64 = data.read(offset);
            let expected = dma_word(vcpu.boot.seed, 0, seq, offset / 8);
            if found != expected {
                vcpu.fail(format_args!(
                    "request {seq} left {found:#x}, not {expected:#x}, at {:#x}",
                    data.gpa(offset)
                ));
            }
        }
        vcpu.round_done();
    }
}

fn now() -> u64 {
    // SAFETY: every x86-64 has the instruction, and nothing forbids it here.
    unsafe { _rdtsc() }
}
