//! Registers that are captured and restored.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ::guest::abi::IMAGE_GPA;

use super::code::COUNT;
use super::guest::{Guest, Ports, machine, wait_until};
use super::memory::{Faults, TestRam};
use super::{DATA, MEMORY, need_kvm};
use crate::kvm::*;
use crate::vcpus::Capture;

#[test]
fn pause_captures_and_restore_rewinds() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    guest.start();
    wait_until("counting", || guest.ram.word(DATA) > 1000);

    let paused = guest.machine.pause(Capture::Registers).unwrap();
    let first = paused.states().unwrap();
    let memory = guest.ram.word(DATA);
    let (rax, mm7) = (first[0].regs().rax, first[0].mm7());
    assert!(rax > 1000);
    assert!(mm7 == rax || mm7 == rax - 1, "mm7 {mm7}, rax {rax}");
    assert!(
        memory == mm7 || memory == mm7 - 1,
        "memory {memory}, mm7 {mm7}"
    );
    thread::sleep(Duration::from_millis(20));
    assert_eq!(
        guest.ram.word(DATA),
        memory,
        "the guest ran while it was paused"
    );
    assert!(paused.kicked() <= paused.parked());
    let running = paused.resume();
    assert!(running <= Instant::now());

    wait_until("running on", || guest.ram.word(DATA) > rax + 1000);
    let paused = guest.machine.pause(Capture::Nothing).unwrap();
    let later = paused.states().unwrap();
    assert!(later[0].mm7() > mm7);
    let tables = paused.page_tables().unwrap();
    paused.restore(&first, Clock::Keep, &tables).unwrap();
    let again = paused.states().unwrap();
    assert_eq!(again[0].regs(), first[0].regs());
    assert_eq!(again[0].sregs(), first[0].sregs());
    assert_eq!(again[0].mm7(), mm7);
    assert!(again[0].tsc() > later[0].tsc() || later[0].tsc().is_none());
    // `later` was captured with the privileged registers kept from `first`, `again` with all of them read.
    let steady = |state: &VcpuState| {
        let value = serde_json::to_value(state).unwrap();
        ["xcrs", "debug", "mp_state", "events", "left_out"].map(|name| value[name].clone())
    };
    assert_eq!(steady(&again[0]), steady(&later[0]));
    guest.ram.write(DATA, &0_u64.to_le_bytes()).unwrap();
    drop(paused);
    // It counts on from where it was rewound to.
    wait_until("counting again", || guest.ram.word(DATA) > 0);
    assert!(guest.ram.word(DATA) >= mm7);

    assert!(matches!(
        guest.machine.pause(Capture::Nothing).unwrap().restore(
            &[],
            Clock::Keep,
            &PageTables::default()
        ),
        Err(KvmError::StateCount {
            states: 0,
            vcpus: 1
        })
    ));
}

#[test]
fn a_captured_guest_runs_on_in_another_machine() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 2, &[COUNT]);
    guest.start();
    wait_until("counting", || guest.ram.word(DATA) > 1000);
    let paused = guest.machine.pause(Capture::Registers).unwrap();
    let states = paused.states().unwrap();
    let text = serde_json::to_string(&states).unwrap();
    let states: Vec<VcpuState> = serde_json::from_str(&text).unwrap();
    let ram = TestRam::new(MEMORY, Faults::Resolve);
    let mut bytes = vec![0; MEMORY as usize];
    guest.ram.read(0, &mut bytes).unwrap();
    ram.write(0, &bytes).unwrap();

    let (clone, _outcomes) = machine(kvm, &ram, 2, Arc::new(Ports::default()));
    assert!(matches!(
        clone.start_from(&states[..1], Clock::Rewind),
        Err(KvmError::StateCount { .. })
    ));
    clone.start_from(&states, Clock::Rewind).unwrap();
    let before = states.iter().map(VcpuState::mm7).max().unwrap();
    wait_until("the clone's counting", || ram.word(DATA) > before + 1000);
    // Both write the same word, so that it says nothing of the slower one.
    wait_until("both vcpus' counting", || {
        let now = clone.pause(Capture::Registers).unwrap().states().unwrap();
        let mut pairs = states.iter().zip(&now);
        pairs.all(|(state, now)| now.mm7() > state.mm7() && now.tsc() >= state.tsc())
    });
}

#[test]
fn a_state_that_kvm_refuses_stops_the_machine() {
    let kvm = need_kvm!();
    let guest = Guest::new(kvm, 1, &[COUNT]);
    guest.start();
    let paused = guest.machine.pause(Capture::Registers).unwrap();
    let text = serde_json::to_string(&paused.states().unwrap()).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value[0]["xsave"] = serde_json::json!([1, 2, 3]);
    let states: Vec<VcpuState> = serde_json::from_value(value).unwrap();
    let error = paused
        .restore(&states, Clock::Keep, &PageTables::default())
        .unwrap_err();
    assert!(matches!(
        error,
        KvmError::State {
            vcpu: 0,
            source: StateError::XsaveSize { words: 3 }
        }
    ));
    drop(paused);
    wait_until("end", || {
        matches!(
            guest.machine.pause(Capture::Nothing),
            Err(KvmError::Stopped { vcpu: 0 })
        )
    });
}

/// A vCPU that is stopped at an `out` has done all of it or nothing: after every pause, and after every
/// restore of what was just captured, the numbers go on without a gap or a repeat.
#[test]
fn no_port_write_is_lost_or_repeated() {
    let kvm = need_kvm!();
    // mov dx, 0x500; l: out dx, eax; inc eax; jmp l
    let code: &[u8] = &[0x66, 0xba, 0x00, 0x05, 0xef, 0xff, 0xc0, 0xeb, 0xfb];
    let guest = Guest::new(kvm, 1, &[code]);
    guest.start();
    for round in 0..200 {
        let paused = guest.machine.pause(Capture::Registers).unwrap();
        let states = paused.states().unwrap();
        let written = guest.ports.written().len() as u64;
        let past_out = states[0].rip() == IMAGE_GPA + 5;
        assert_eq!(states[0].regs().rax + u64::from(past_out), written);
        if round % 2 == 0 {
            paused
                .restore(&states, Clock::Keep, &PageTables::default())
                .unwrap();
        }
        drop(paused);
        thread::sleep(Duration::from_micros(200));
    }
    for (index, (_, _, value)) in guest.ports.written().into_iter().enumerate() {
        assert_eq!(value as usize, index);
    }
}
