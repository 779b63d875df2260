//! Guests that do wrong, and files that are no guests: whatever a program does, its run ends with a verdict
//! and a reason, and everything is given back.

mod support;

use std::time::Duration;

use guest::Misbehaviour;
use guest::abi::{PORT_DOORBELL_EXIT, PORT_EXIT, PORT_FAILURE};
use support::program::{EHDR, program, put, talker};
use support::{Run, accel, config, no_kvm, run_guest, run_guest_until, times};
use vmm::accel::Accel;
use vmm::cli::chain;
use vmm::session::RunError;
use vmm::session::config::{Config, PageSize, RunLength};
use vmm::session::report::{EndedBy, Verdict};

/// Time for a guest that ends by itself to do so. The run ends with the guest, long before.
const LONG: RunLength = RunLength::Duration(Duration::from_secs(60));
/// Time for a guest that does not.
const SHORT: RunLength = RunLength::Duration(Duration::from_millis(700));

fn misbehave_as(misbehaviour: Misbehaviour, config: Config) -> Run {
    let seed = misbehaviour as u64;
    let run = run_guest(Config { seed, ..config }, guest::MISBEHAVE).unwrap();
    run.assert_all_told();
    run
}

/// One that ends by itself.
fn misbehave(misbehaviour: Misbehaviour) -> Run {
    misbehave_as(
        misbehaviour,
        Config {
            length: LONG,
            ..config()
        },
    )
}

/// One that ends by itself, with a snapshot that checked something. It is not there for long, and a busy host
/// may keep whoever takes snapshots waiting all the while: then it runs again.
fn misbehave_under_snapshots(misbehaviour: Misbehaviour, config: Config) -> Run {
    (0..20)
        .map(|_| misbehave_as(misbehaviour, config.clone()))
        .find(|run| run.report.checked_pages > 0)
        .expect("no snapshot of it checks a page")
}

/// Fails the test unless the run ended as a guest crash for `reason`, told with registers and code.
#[track_caller]
fn assert_crashed(run: &Run, reason: &str) {
    let report = &run.report;
    assert_eq!(report.verdict, Verdict::Error, "{report:?}");
    assert_eq!(report.ended_by, EndedBy::GuestCrash);
    assert_eq!(report.violations.total(), 0);
    let error = report.error.as_deref().unwrap();
    let (first, rest) = error.split_once('\n').unwrap();
    assert!(first.starts_with("vcpu 0: guest crashed: "), "{error}");
    assert!(first.contains(reason), "{error}");
    if loses_registers(run) && first.contains("triple fault") {
        assert!(
            rest.starts_with("where it was this host does not tell"),
            "{error}"
        );
        return;
    }
    assert!(rest.contains("rip 0") && rest.contains("cr2 0"), "{error}");
    assert!(rest.contains("\ncode at rip: "), "{error}");
}

/// What is said of an exception: which it was is known where no virtual machine hides it.
fn exception(which: &str) -> String {
    let which = match accel() {
        Accel::User => which,
        Accel::Kvm | Accel::Auto => "triple fault",
    };
    format!("an exception nobody handles ({which})")
}

/// Whether the host keeps no registers of a vCPU after a triple fault.
fn loses_registers(run: &Run) -> bool {
    run.report.platform.kvm == "svm"
}

/// Fails the test unless the guest ended its run of its own will and all was well.
#[track_caller]
fn assert_exited(run: &Run) {
    // One that is gone before the first snapshot leaves nothing to check.
    if run.report.snapshots.taken == 0 {
        assert_eq!(run.report.verdict, Verdict::NothingChecked, "{run:?}");
        assert_eq!(run.report.violations.total(), 0, "{run:?}");
    } else {
        run.assert_clean();
    }
    assert_eq!(run.report.ended_by, EndedBy::GuestExit);
}

#[test]
fn an_invalid_opcode_is_a_crash_that_shows_the_code() {
    if no_kvm() {
        return;
    }
    let run = misbehave(Misbehaviour::InvalidOpcode);
    assert_crashed(&run, &exception("an invalid opcode"));
    let error = run.report.error.as_deref().unwrap();
    assert!(loses_registers(&run) || error.contains("\ncode at rip: 0f 0b "));
}

#[test]
fn a_guest_that_spins_is_snapshotted_all_the_same() {
    if no_kvm() {
        return;
    }
    let run = misbehave_as(
        Misbehaviour::Spin,
        Config {
            length: RunLength::Snapshots(times(30)),
            ..config()
        },
    );
    run.assert_clean();
    assert_eq!(run.report.ended_by, EndedBy::Snapshots);
    assert_eq!(run.report.guest.ops, 0);
}

#[test]
fn a_panic_is_a_crash_that_names_file_and_line() {
    if no_kvm() {
        return;
    }
    let report = misbehave(Misbehaviour::Panic).report;
    assert_eq!(
        (report.verdict, report.ended_by),
        (Verdict::Error, EndedBy::GuestCrash)
    );
    let error = report.error.unwrap();
    assert!(error.starts_with("guest panicked: "), "{error}");
    assert!(error.contains("misbehave.rs:"), "{error}");
    assert!(error.ends_with(": asked to panic"), "{error}");
    assert_eq!(report.violations.total(), 0);
}

#[test]
fn a_nonzero_exit_status_is_an_error() {
    if no_kvm() {
        return;
    }
    let report = misbehave(Misbehaviour::ExitSeven).report;
    assert_eq!(
        (report.verdict, report.ended_by),
        (Verdict::Error, EndedBy::GuestExit)
    );
    assert_eq!(report.error.unwrap(), "guest exited with status 7");
    assert_eq!(report.violations.total(), 0);
}

#[test]
fn what_a_guest_prints_before_it_exits_is_not_lost() {
    if no_kvm() {
        return;
    }
    let run = misbehave(Misbehaviour::Bye);
    assert_exited(&run);
    assert_eq!(run.seen.console, "bye\n");
}

#[test]
fn a_store_where_there_is_no_memory_is_a_crash() {
    if no_kvm() {
        return;
    }
    assert_crashed(&misbehave(Misbehaviour::StoreBeyondMemory), "");
    // Memory that ends within 2 MiB, which the page tables map whole: the store leaves the guest.
    let run = misbehave_as(
        Misbehaviour::StoreBeyondMemory,
        Config {
            memory: 33 << 20,
            length: LONG,
            ..config()
        },
    );
    assert_crashed(&run, "wrote to gpa 0x2100000, where there is no memory");
}

#[test]
fn a_write_to_nobodys_port_is_a_crash() {
    if no_kvm() {
        return;
    }
    let run = misbehave(Misbehaviour::UnknownPort);
    assert_crashed(&run, "wrote 0x0 to port 0x999, where nothing listens");
}

#[test]
fn texts_outside_memory_are_told_and_do_no_harm() {
    if no_kvm() {
        return;
    }
    let run = misbehave(Misbehaviour::WildText);
    assert_exited(&run);
    let lines = Vec::from_iter(run.seen.console.lines());
    assert_eq!(lines.len(), 3, "{lines:?}");
    for line in lines {
        assert!(line.starts_with("[vmm: text at 0x"), "{line}");
        assert!(line.contains("guest memory has no "), "{line}");
    }
}

#[test]
fn doorbells_of_devices_that_are_not_there_are_told_and_do_no_harm() {
    if no_kvm() {
        return;
    }
    for dma_devices in [0, 2] {
        let run = misbehave_as(
            Misbehaviour::WildDoorbell,
            Config {
                dma_devices,
                length: LONG,
                ..config()
            },
        );
        assert_exited(&run);
        let line = format!("[vmm: rang device {dma_devices}, which does not exist]\n");
        assert_eq!(run.seen.console, line.repeat(2));
    }
}

#[test]
fn requests_that_make_no_sense_are_survived() {
    if no_kvm() {
        return;
    }
    let run = misbehave_under_snapshots(
        Misbehaviour::GarbageQueue,
        Config {
            length: LONG,
            ..config()
        },
    );
    assert_exited(&run);
    assert!(
        run.seen.console.contains("requests that make no sense"),
        "{}",
        run.seen.console
    );
}

#[test]
fn what_a_guest_says_is_wrong_is_a_violation() {
    if no_kvm() {
        return;
    }
    let asked = Config {
        seed: Misbehaviour::FalseFailure as u64,
        // Rewound, it would say so again.
        restore_every: 0,
        ..config()
    };
    let run = run_guest_until(asked, guest::MISBEHAVE, |seen| !seen.violations.is_empty());
    run.assert_all_told();
    assert_eq!(run.report.verdict, Verdict::Violated);
    assert_eq!(
        (run.report.violations.life, run.report.violations.total()),
        (1, 1)
    );
    let violation = &run.seen.violations[0];
    assert!(
        violation.detail.contains("vcpu 0, operation 11"),
        "{violation}"
    );
    assert_eq!(violation.expected, "0x1111111111111111");
    assert_eq!(violation.found, "0x2222222222222222");
    assert!(violation.gpa.is_some());
}

/// A check that did not hold is one whatever there is to read of it.
#[test]
fn a_failure_that_cannot_be_read_is_a_failure() {
    if no_kvm() {
        return;
    }
    // mov edx, PORT_FAILURE; mov eax, beyond memory; out dx, eax;
    // mov edx, PORT_EXIT; xor eax, eax; out dx, eax
    let mut code = vec![0xba];
    code.extend(u32::from(PORT_FAILURE).to_le_bytes());
    code.extend(b"\xb8\xf0\xff\xff\xff\xef\xba");
    code.extend(u32::from(PORT_EXIT).to_le_bytes());
    code.extend(b"\x31\xc0\xef");
    let asked = Config {
        vcpus: 1,
        length: LONG,
        ..config()
    };
    let run = run_guest(asked, program(&code)).unwrap();
    run.assert_all_told();
    assert_eq!(run.report.verdict, Verdict::Violated, "{:?}", run.report);
    assert_eq!(run.report.violations.life, 1);
    let told = &run.seen.violations[0].detail;
    assert!(told.contains("cannot be read, at gpa 0xfffffff0"), "{told}");
}

/// Instructions of every kind fault on write-protected pages, again and again. The guest checks their effect
/// itself. It writes hammered memory by no formula and does not claim to, so it must not be checked by one.
#[test]
fn every_kind_of_write_works_under_snapshots() {
    if no_kvm() {
        return;
    }
    let run = misbehave_under_snapshots(
        Misbehaviour::WriteWithEverything,
        Config {
            memory: 12 << 20,
            // So that each kind faults often.
            page_size: PageSize::Base,
            snapshot_every: Duration::from_millis(3),
            restore_every: 0,
            length: LONG,
            ..config()
        },
    );
    assert_exited(&run);
    assert!(
        run.seen.console.contains(" kinds of write on "),
        "{}",
        run.seen.console
    );
}

#[test]
fn a_non_canonical_address_is_a_crash() {
    if no_kvm() {
        return;
    }
    let run = misbehave(Misbehaviour::StoreNonCanonical);
    assert_crashed(&run, &exception("general protection"));
}

fn run_code(code: &[u8], length: RunLength) -> Run {
    let run = run_guest(Config { length, ..config() }, program(code)).unwrap();
    run.assert_all_told();
    run
}

/// Fails the test if a guest's own folly was taken for a fault of snapshots, or something was not given back.
#[track_caller]
fn assert_no_violation(run: &Run, name: &str) {
    assert_eq!(
        run.report.violations.total(),
        0,
        "{name}: {:?}",
        run.seen.violations
    );
}

#[test]
fn what_a_guest_must_not_execute_is_a_crash() {
    if no_kvm() {
        return;
    }
    let programs: [(&str, &[u8]); 7] = [
        ("hlt", b"\xf4"),
        ("int3", b"\xcc"),
        ("int 0x80", b"\xcd\x80"),
        ("wrmsr", b"\x0f\x30"),
        ("mov cr3, rax", b"\x0f\x22\xd8"),
        ("in eax, dx", b"\xba\x34\x12\0\0\xed"),
        // Through zeros, over what the VMM has put below the program.
        ("jmp 0", b"\xff\xe0"),
    ];
    for (name, code) in programs {
        // Behind each of them: the guest spins, should it get there.
        let run = run_code(&[code, b"\xeb\xfe"].concat(), LONG);
        assert_no_violation(&run, name);
        assert_eq!(
            run.report.ended_by,
            EndedBy::GuestCrash,
            "{name}: {:?}",
            run.report
        );
        assert_eq!(run.report.verdict, Verdict::Error, "{name}");
    }
    let run = run_code(b"\xba\x34\x12\0\0\xed\xeb\xfe", LONG);
    assert!(run.report.error.unwrap().contains("read from port 0x1234"));
}

/// What such a guest does next is the CPU's business; the run ends, and leaves nothing behind.
#[test]
fn a_guest_that_wrecks_what_it_stands_on_ends_its_run() {
    if no_kvm() {
        return;
    }
    let programs: [(&str, &[u8]); 4] = [
        // mov edi, 0x10000; mov ecx, 0x3000; mov eax, -1; rep stosd; jmp $
        (
            "page tables filled with ones",
            b"\xbf\0\0\x01\0\xb9\0\x30\0\0\xb8\xff\xff\xff\xff\xf3\xab\xeb\xfe",
        ),
        // The same with zeros.
        (
            "page tables filled with zeros",
            b"\xbf\0\0\x01\0\xb9\0\x30\0\0\x31\xc0\xf3\xab\xeb\xfe",
        ),
        // xor edi, edi; mov ecx, 0x1000; mov al, 0xff; rep stosb; jmp $
        (
            "first page filled with ones",
            b"\x31\xff\xb9\0\x10\0\0\xb0\xff\xf3\xaa\xeb\xfe",
        ),
        // cli; jmp $
        ("interrupts off", b"\xfa\xeb\xfe"),
    ];
    for (name, code) in programs {
        let run = run_code(code, SHORT);
        assert_no_violation(&run, name);
        assert_ne!(run.report.ended_by, EndedBy::CtrlC, "{name}");
    }
}

#[test]
fn a_guest_that_never_stops_talking_is_snapshotted_all_the_same() {
    if no_kvm() {
        return;
    }
    let run = run_guest_until(config(), talker(), |seen| {
        seen.now().snapshots >= 40 && !seen.console.is_empty()
    });
    run.assert_clean();
}

#[test]
fn a_guest_that_never_stops_ringing_is_snapshotted_all_the_same() {
    if no_kvm() {
        return;
    }
    // mov edx, port; out dx, eax; jmp to the out
    let mut code = vec![0xba];
    code.extend(u32::from(PORT_DOORBELL_EXIT).to_le_bytes());
    code.extend(b"\xef\xeb\xfd");
    let run = run_code(&code, RunLength::Snapshots(times(40)));
    run.assert_clean();
    assert_eq!(run.report.ended_by, EndedBy::Snapshots);
}

/// Why `image` is refused, causes included.
fn refusal(image: impl Into<Vec<u8>>) -> String {
    let error = run_guest(config(), image).unwrap_err();
    assert!(matches!(error, RunError::Build(_)), "{error:?}");
    chain(&error)
}

/// Why the spinning program is refused once `bytes` are put at `offset` of its file.
fn refusal_with<const N: usize>(offset: usize, bytes: [u8; N]) -> String {
    let mut file = program(b"\xeb\xfe");
    put(&mut file, offset, bytes);
    refusal(file)
}

#[test]
fn a_file_that_is_no_guest_is_refused_by_name_of_what_is_wrong() {
    if no_kvm() {
        return;
    }
    let refusals = [
        (refusal(*b""), "not an ELF file"),
        (refusal(*b"#!/bin/sh\n"), "not an ELF file"),
        (
            refusal(&guest::PAYLOAD[..40]),
            "truncated ELF file: the ELF header reaches to byte 64, the file has 40",
        ),
        (
            refusal(&guest::PAYLOAD[..guest::PAYLOAD.len() / 2]),
            "truncated ELF file: program header",
        ),
        (refusal_with(4, [1]), "not a 64-bit little-endian ELF file"),
        (refusal_with(5, [2]), "not a 64-bit little-endian ELF file"),
        (
            refusal_with(16, [3, 0]),
            "not a static executable (ET_EXEC): ELF type 3; link it with -static -no-pie",
        ),
        (
            refusal_with(18, [183, 0]),
            "not a program for x86-64: ELF machine 183",
        ),
        (
            refusal_with(24, [0; 8]),
            "entry point 0x0 lies in no segment",
        ),
        (
            refusal_with(54, [1, 0]),
            "malformed ELF file: program headers of 1 bytes each",
        ),
        (
            refusal_with(56, [0, 0]),
            "the ELF file has no segment to load",
        ),
        (
            refusal_with(EHDR, [2]),
            "program header 0 asks for a dynamic linker",
        ),
        (
            refusal_with(EHDR, [3]),
            "program header 0 asks for a dynamic linker",
        ),
        (
            refusal_with(EHDR + 24, [1]),
            "segment 0 is linked at 0x200000, but to be loaded at 0x200001",
        ),
        (
            refusal_with(EHDR + 40, [1, 0]),
            "segment 0 at 0x200000 has 2 bytes in the file, 1 in memory: out of range",
        ),
        (refusal_with(EHDR + 40, [0xff; 8]), "out of range"),
    ];
    for (refusal, expected) in refusals {
        let start = "--guest guest-of-this-test: cannot load it: ";
        let all = format!("{start}{expected}");
        assert!(refusal.starts_with(start), "{refusal}");
        assert!(refusal.contains(expected), "{refusal:?} is not {all:?}");
    }

    let mut low = program(b"\xeb\xfe");
    for field in [24, EHDR + 16, EHDR + 24] {
        put(&mut low, field, 0x10_0000u64.to_le_bytes());
    }
    let refusal = refusal(low);
    assert!(
        refusal.contains("segment 0 is linked at 0x100000, below 0x200000"),
        "{refusal}"
    );
}

#[test]
fn a_program_that_leaves_no_room_is_refused_with_both_sizes() {
    if no_kvm() {
        return;
    }
    let refusal = refusal_with(EHDR + 40, (31u64 << 20).to_le_bytes());
    let expected = "--memory 32 MiB is too small: the guest program ends at 0x2100000, \
                    and 2 vcpus and 2 devices must fit above it";
    assert_eq!(refusal, expected);
}

#[test]
fn a_program_of_one_instruction_boots() {
    if no_kvm() {
        return;
    }
    let run = run_code(b"\xeb\xfe", RunLength::Snapshots(5));
    run.assert_clean();
    assert_eq!(run.report.ended_by, EndedBy::Snapshots);
}
