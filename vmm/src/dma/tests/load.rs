//! Forks while both directions are busy: every request is all done in the fork, or none of it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use guest::abi::{AREA_USED, QUEUE_SIZE, RequestKind, STATUS_PENDING};
use guest::formula::poison_word;

use super::*;

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
                // Whatever the scheduler does, some rounds find requests that are done beside others
                // that are not.
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
