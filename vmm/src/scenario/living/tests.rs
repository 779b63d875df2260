//! The performer does what it says, on whatever kernel this is: isolation and coherence as PROTOCOL.md
//! has them for a kernel of today. What an old kernel, or one that withholds an interface, can't be
//! asked is said and left out.

use std::fs;
use std::path::Path;

use super::super::performer::{Hold, PageView, Performer};
use super::actor::STRIDE;
use super::*;

const PAGE: Page = 1;

fn living() -> Living {
    Living::new(Memory::Base).expect("a process can be made")
}

/// A performer whose P may be pinned. `None` if this host has no io_uring, which is printed.
fn with_pins() -> Option<Living> {
    let living = living();
    match living.why_no_pins() {
        None => Some(living),
        Some(why) => {
            eprintln!("skipped: {why}");
            None
        }
    }
}

#[test]
fn memory_is_zero_at_first() {
    let mut living = living();
    for page in 0..PAGES {
        assert_eq!(living.read(Who::P, page).unwrap(), 0);
    }
}

/// A1, A2.
#[test]
fn a_fork_separates_both_ways() {
    let mut living = living();
    living.write(Who::P, 0, 1).unwrap();
    living.write(Who::P, 1, 2).unwrap();
    living.fork(Who::P, Who::C).unwrap();
    living.write(Who::P, 0, 3).unwrap();
    living.write(Who::C, 1, 4).unwrap();
    assert_eq!(living.read(Who::C, 0).unwrap(), 1);
    assert_eq!(living.read(Who::P, 0).unwrap(), 3);
    assert_eq!(living.read(Who::C, 1).unwrap(), 4);
    assert_eq!(living.read(Who::P, 1).unwrap(), 2);
}

/// P, its children C and D, and C's child G; all have 1 and 2 in pages 0 and 1.
fn family() -> Living {
    let mut living = living();
    living.write(Who::P, 0, 1).unwrap();
    living.write(Who::P, 1, 2).unwrap();
    living.fork(Who::P, Who::C).unwrap();
    living.fork(Who::C, Who::G).unwrap();
    living.fork(Who::P, Who::D).unwrap();
    living
}

const FAMILY: [Who; 4] = [Who::P, Who::C, Who::D, Who::G];

/// L1, L3: whoever writes or ends, the others have what they had.
#[test]
fn siblings_and_generations_are_separate() {
    for gone in FAMILY {
        let mut living = family();
        for (who, value) in FAMILY.into_iter().zip(10..) {
            living.write(who, 0, value).unwrap();
        }
        living.exit(gone).unwrap();
        for (who, value) in FAMILY.into_iter().zip(10..) {
            if who == gone {
                assert!(matches!(living.read(who, 0), Err(NotDone::Failed(_))));
                continue;
            }
            assert_eq!(living.read(who, 0).unwrap(), value, "{who:?}");
            assert_eq!(living.read(who, 1).unwrap(), 2, "{who:?}");
        }
        // Another of its name, forked by whoever is left.
        let parent = FAMILY.into_iter().find(|who| *who != gone).unwrap();
        living.fork(parent, gone).unwrap();
        living.write(gone, 1, 3).unwrap();
        assert_eq!(living.read(parent, 1).unwrap(), 2);
    }
}

/// B1: CVE-2020-29374 is closed.
#[test]
fn a_spliced_page_does_not_show_what_its_former_owner_writes() {
    let mut living = living();
    living.write(Who::P, PAGE, 7).unwrap();
    living.fork(Who::P, Who::C).unwrap();
    living.take(0, Who::C, PAGE, Hold::GetRead).unwrap();
    living.discard(Who::C, PAGE).unwrap();
    living.write(Who::P, PAGE, 8).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 7);
    assert_eq!(
        living.read_hold(0).unwrap(),
        7,
        "a hold is read as often as one likes"
    );
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 8);
    assert_eq!(living.read(Who::C, PAGE).unwrap(), 0);
    living.release(0).unwrap();
    assert!(matches!(living.read_hold(0), Err(NotDone::Failed(_))));
}

/// A splice takes a reference, not a copy: what is written before anything is shared is seen through it.
#[test]
fn a_spliced_page_is_the_page() {
    let mut living = living();
    living.write(Who::P, PAGE, 1).unwrap();
    living.take(0, Who::P, PAGE, Hold::GetRead).unwrap();
    living.write(Who::P, PAGE, 2).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 2);
    assert!(living.write_hold(0, 3).is_err(), "a reader can't write");
}

/// D1, D2.
#[test]
fn a_pinned_page_stays_the_parents_across_a_fork() {
    let Some(mut living) = with_pins() else {
        return;
    };
    living.write(Who::P, PAGE, 1).unwrap();
    living.take(0, Who::P, PAGE, Hold::PinWrite).unwrap();
    living.fork(Who::P, Who::C).unwrap();
    living.write(Who::P, PAGE, 2).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 2);
    assert_eq!(living.read(Who::C, PAGE).unwrap(), 1);
    living.write_hold(0, 3).unwrap();
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 3);
    assert_eq!(living.read(Who::C, PAGE).unwrap(), 1);
}

/// The same with a child that pins, and that ends before the device is done.
#[test]
fn a_hold_outlives_the_process_it_was_taken_through() {
    let Some(mut living) = with_pins() else {
        return;
    };
    living.write(Who::P, 0, 1).unwrap();
    living.write(Who::P, 1, 2).unwrap();
    living.fork(Who::P, Who::C).unwrap();
    living.take(0, Who::C, 0, Hold::PinWrite).unwrap();
    living.take(1, Who::C, 1, Hold::GetRead).unwrap();
    living.exit(Who::C).unwrap();
    living.write(Who::P, 0, 3).unwrap();
    living.write(Who::P, 1, 4).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 1);
    assert_eq!(living.read_hold(1).unwrap(), 2);
    living.write_hold(0, 5).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 5);
    assert_eq!(living.read(Who::P, 0).unwrap(), 3);
    living.release(0).unwrap();
    living.release(1).unwrap();
}

/// A process with a huge page, or `None` if this kernel makes none, which is said.
fn living_huge() -> Option<Living> {
    match Living::new(Memory::Huge) {
        Ok(living) => Some(living),
        Err(error @ LivingError::NoHugePages(_)) => {
            eprintln!("skipped: {}", palimpsest::causes::chain(&error));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Kilobytes of a process's pages that are in huge pages. What it has of the controller besides, which is a
/// copy of everything, is the kernel's to make huge and split at any time.
fn huge_kib(living: &Living, who: Who) -> u64 {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let pid = living.process_id(who).unwrap();
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut is_ours, mut kib) = (false, 0);
    for line in text.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some((from, to)) = word.split_once('-')
            && let (Some(from), Some(to)) = (hex(from), hex(to))
        {
            is_ours = from < living.arena + STRIDE && to > living.arena;
        } else if is_ours && word == "AnonHugePages:" {
            let number = rest.trim().trim_end_matches(" kB");
            kib += number.parse::<u64>().unwrap();
        }
    }
    kib
}

/// What F1, F2 and F14 begin with.
#[test]
fn pages_are_in_a_huge_page_until_it_is_split() {
    let Some(mut living) = living_huge() else {
        return;
    };
    assert_eq!(huge_kib(&living, Who::P), 2048);
    (0..PAGES).for_each(|page| living.write(Who::P, page, 10 + page).unwrap());
    living.fork(Who::P, Who::C).unwrap();
    assert_eq!(huge_kib(&living, Who::C), 2048);
    living.exit(Who::C).unwrap();
    living.protect(Who::P).unwrap();
    assert_eq!(huge_kib(&living, Who::P), 0);
    living.collapse(Who::P, 0).unwrap();
    assert_eq!(huge_kib(&living, Who::P), 2048);
    (0..PAGES).for_each(|page| assert_eq!(living.read(Who::P, page).unwrap(), 10 + page));
    living.discard_rest(Who::P, 2).unwrap();
    assert_eq!(huge_kib(&living, Who::P), 0);
    let words: Vec<_> = (0..PAGES)
        .map(|page| living.read(Who::P, page).unwrap())
        .collect();
    assert_eq!(words, [0, 0, 12, 0]);
    assert!(matches!(
        living.migrate(Who::P, 2),
        Err(NotDone::CannotAsk(_))
    ));
}

/// F10: where ours does not.
#[test]
fn a_collapse_is_refused_while_a_page_is_held() {
    let Some(mut living) = living_huge() else {
        return;
    };
    living.write(Who::P, PAGE, 1).unwrap();
    living.protect(Who::P).unwrap();
    living.take(0, Who::P, PAGE, Hold::GetRead).unwrap();
    assert!(matches!(
        living.collapse(Who::P, 0),
        Err(NotDone::Refused(_))
    ));
    living.release(0).unwrap();
    living.collapse(Who::P, 0).unwrap();
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 1);
}

/// C1.
#[test]
fn a_pinned_page_is_not_copied_after_write_protection() {
    let Some(mut living) = with_pins() else {
        return;
    };
    living.write(Who::P, PAGE, 1).unwrap();
    living.take(0, Who::P, PAGE, Hold::PinWrite).unwrap();
    let before = living.view(Who::P, PAGE);
    living.protect(Who::P).unwrap();
    living.write(Who::P, PAGE, 2).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 2);
    living.write_hold(0, 3).unwrap();
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 3);
    assert_eq!(living.view(Who::P, PAGE), before);
}

/// C13: the contract ends with the page.
#[test]
fn a_discarded_page_is_new_and_the_device_keeps_the_old_one() {
    let Some(mut living) = with_pins() else {
        return;
    };
    living.write(Who::P, PAGE, 1).unwrap();
    living.take(0, Who::P, PAGE, Hold::PinWrite).unwrap();
    living.discard(Who::P, PAGE).unwrap();
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 0);
    living.write(Who::P, PAGE, 2).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 1);
    living.write_hold(0, 3).unwrap();
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 2);
}

/// C12, and that a ring can be used again.
#[test]
fn a_released_page_is_shared_again() {
    let Some(mut living) = with_pins() else {
        return;
    };
    living.write(Who::P, PAGE, 1).unwrap();
    for id in 0..2 * HOLDS {
        living.take(id, Who::P, PAGE, Hold::PinWrite).unwrap();
        living.release(id).unwrap();
    }
    living.fork(Who::P, Who::C).unwrap();
    assert_eq!(living.view(Who::P, PAGE), living.view(Who::C, PAGE));
    assert_eq!(living.is_mapped_once(Who::P, PAGE), Some(false));
    living.exit(Who::C).unwrap();
    assert_eq!(living.is_mapped_once(Who::P, PAGE), Some(true));
}

/// C7, C8.
#[test]
fn a_page_moves_unless_it_is_held() {
    let mut living = living();
    living.write(Who::P, PAGE, 1).unwrap();
    let before = living.view(Who::P, PAGE);
    match living.migrate(Who::P, PAGE) {
        Err(NotDone::CannotAsk(why)) => return eprintln!("skipped: {why}"),
        result => result.unwrap(),
    }
    assert!(before.is_none() || living.view(Who::P, PAGE) != before);
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 1);

    living.take(0, Who::P, PAGE, Hold::GetRead).unwrap();
    let before = living.view(Who::P, PAGE);
    assert!(matches!(
        living.migrate(Who::P, PAGE),
        Err(NotDone::Refused(_))
    ));
    assert_eq!(living.view(Who::P, PAGE), before);
    living.write(Who::P, PAGE, 2).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 2);
    living.release(0).unwrap();

    living.fork(Who::P, Who::C).unwrap();
    assert!(matches!(
        living.migrate(Who::P, PAGE),
        Err(NotDone::CannotAsk(_))
    ));
}

/// C7.
#[test]
fn a_pinned_page_does_not_move() {
    let Some(mut living) = with_pins() else {
        return;
    };
    living.write(Who::P, PAGE, 1).unwrap();
    living.take(0, Who::P, PAGE, Hold::PinWrite).unwrap();
    match living.migrate(Who::P, PAGE) {
        Err(NotDone::CannotAsk(why)) => return eprintln!("skipped: {why}"),
        result => assert!(matches!(result, Err(NotDone::Refused(_)))),
    }
    living.write(Who::P, PAGE, 2).unwrap();
    assert_eq!(living.read_hold(0).unwrap(), 2);
    living.release(0).unwrap();
    living.migrate(Who::P, PAGE).unwrap();
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 2);
}

/// H-a.
#[test]
fn a_debugger_breaks_the_sharing_first() {
    let mut living = living();
    living.write(Who::P, PAGE, 1).unwrap();
    living.fork(Who::P, Who::C).unwrap();
    match living.force_write(Who::C, PAGE, 2) {
        Err(NotDone::CannotAsk(why)) => return eprintln!("skipped: {why}"),
        result => result.unwrap(),
    }
    assert_eq!(living.read(Who::P, PAGE).unwrap(), 1);
    assert_eq!(living.read(Who::C, PAGE).unwrap(), 2);
    living.write(Who::C, PAGE, 3).unwrap();
    assert_eq!(living.read(Who::C, PAGE).unwrap(), 3);
}

#[test]
fn frames_tell_copies_apart() {
    let mut living = living();
    let untouched = PageView {
        frame: None,
        inside: None,
    };
    assert_eq!(living.view(Who::P, PAGE), Some(untouched));
    living.write(Who::P, PAGE, 1).unwrap();
    let Some(written) = living.view(Who::P, PAGE) else {
        return eprintln!("skipped: frame numbers are for CAP_SYS_ADMIN");
    };
    assert!(written.frame.is_some());
    assert_eq!(living.read(Who::P, 0).unwrap(), 0);
    assert_eq!(living.view(Who::P, 0), Some(untouched), "the zero page");
    living.fork(Who::P, Who::C).unwrap();
    assert_eq!(living.view(Who::C, PAGE), Some(written));
    living.write(Who::C, PAGE, 2).unwrap();
    assert_ne!(living.view(Who::C, PAGE), Some(written));
    assert_eq!(living.view(Who::P, PAGE), Some(written));
}

#[test]
fn a_child_outlives_its_parent_and_makes_way_for_the_next() {
    let mut living = living();
    living.write(Who::P, PAGE, 1).unwrap();
    for _ in 0..FORKS {
        living.fork(Who::P, Who::C).unwrap();
        let again = living.fork(Who::P, Who::C);
        assert!(matches!(again, Err(NotDone::Failed(_))), "there is one C");
        living.exit(Who::C).unwrap();
        assert!(matches!(living.read(Who::C, PAGE), Err(NotDone::Failed(_))));
    }
    assert!(matches!(
        living.fork(Who::P, Who::C),
        Err(NotDone::CannotAsk(_))
    ));
    let mut living = self::living();
    living.write(Who::P, PAGE, 1).unwrap();
    living.fork(Who::P, Who::C).unwrap();
    living.exit(Who::P).unwrap();
    assert_eq!(living.read(Who::C, PAGE).unwrap(), 1);
    living.write(Who::C, PAGE, 2).unwrap();
    assert_eq!(living.read(Who::C, PAGE).unwrap(), 2);
    assert!(living.exit(Who::P).is_err());
}

#[test]
fn mistakes_and_what_cannot_be_asked_are_told_apart() {
    let mut living = living();
    assert!(matches!(living.read(Who::S, 0), Err(NotDone::Failed(_))));
    assert!(matches!(living.read(Who::C, 0), Err(NotDone::Failed(_))));
    assert!(matches!(
        living.read(Who::P, PAGES),
        Err(NotDone::Failed(_))
    ));
    assert!(matches!(living.release(3), Err(NotDone::Failed(_))));
    assert!(matches!(
        living.fork(Who::C, Who::G),
        Err(NotDone::Failed(_))
    ));
    assert!(matches!(
        living.fork(Who::P, Who::P),
        Err(NotDone::Failed(_))
    ));
    assert!(matches!(
        living.fork(Who::P, Who::S),
        Err(NotDone::Failed(_))
    ));
    assert!(matches!(
        living.fork(Who::S, Who::C),
        Err(NotDone::CannotAsk(_))
    ));
    assert_eq!(living.channels.len(), FORKS, "no fork was begun");
    assert!(matches!(
        living.snapshot(Who::P),
        Err(NotDone::CannotAsk(_))
    ));
    assert!(matches!(living.restore(Who::P), Err(NotDone::CannotAsk(_))));
    for hold in [Hold::PinRead, Hold::GetWrite] {
        let result = living.take(0, Who::P, 0, hold);
        assert!(matches!(result, Err(NotDone::CannotAsk(_))), "{hold:?}");
    }
    assert!(!kernel_release().is_empty());
}

fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn nothing_is_left_behind() {
    let mut living = family();
    let pids = FAMILY.map(|who| living.process_id(who).unwrap());
    assert!(pids.into_iter().all(is_there));
    living.exit(Who::C).unwrap();
    assert_eq!(pids.map(is_there), [true, false, true, true]);
    drop(living);
    assert!(!pids.into_iter().any(is_there));
}

#[test]
fn actors_have_no_files_but_their_own() {
    let stray = fs::File::open("/dev/null").unwrap();
    let living = living();
    let count = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let rings = living.rings.as_ref().map_or(0, Vec::len);
    let expected = 1 + FORKS + HOLDS + rings;
    assert_eq!(count(living.process_id(Who::P).unwrap()), expected);
    // Of a channel that is used nobody has an end but who is asked by it.
    let living = family();
    for who in FAMILY {
        let files = count(living.process_id(who).unwrap());
        assert_eq!(files, expected - 3, "{who:?}");
    }
    drop(stray);
}

#[test]
fn a_killed_process_is_an_error() {
    let mut living = family();
    // The one in the middle first: its parent, sibling and child are there still.
    for who in [Who::C, Who::P, Who::G, Who::D] {
        kill(&living, who);
        let error = living.read(who, 0).unwrap_err().to_string();
        assert_eq!(error, format!("failed: {who:?} was killed by signal 9"));
        assert!(living.write(who, 0, 1).is_err());
        assert!(living.exit(who).is_err());
    }
}

fn kill(living: &Living, who: Who) {
    let pid = living.process_id(who).unwrap() as i32;
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_fork_beside_or_by_a_killed_process() {
    let mut living = family();
    living.exit(Who::G).unwrap();
    kill(&living, Who::C);
    // It does not have to forget the channel of another's child.
    living.fork(Who::P, Who::G).unwrap();
    assert_eq!(living.read(Who::G, 1).unwrap(), 2);
    living.exit(Who::G).unwrap();
    let error = living.fork(Who::C, Who::G).unwrap_err().to_string();
    assert_eq!(error, "failed: C was killed by signal 9");
    assert!(living.process_id(Who::G).is_none());
    living.fork(Who::D, Who::G).unwrap();
    let pid = living.process_id(Who::G).unwrap();
    assert!(is_there(pid));
    drop(living);
    assert!(!is_there(pid));
}

/// The channel is what tells an actor that its controller is gone.
#[test]
fn an_actor_ends_with_its_channel() {
    let mut living = family();
    for who in [Who::C, Who::G, Who::P] {
        let process = living.processes.get_mut(&who).unwrap();
        assert_eq!(process.abandon(), "has ended", "{who:?}");
        assert_eq!(living.read(Who::D, 0).unwrap(), 1, "D has its own");
    }
}

/// What became of its fork was never heard, so nobody knows of it.
#[test]
fn a_child_that_nobody_asks_ends_with_its_channel() {
    let mut living = family();
    let (index, commands) = living.channels.pop_first().unwrap();
    let forked = living.command(Who::D, ActorCommand::Fork, 0, index);
    let mut child = Process::child(Who::G, forked.unwrap(), commands).unwrap();
    assert_eq!(child.abandon(), "has ended");
}

/// C2, H5; D3 with what `O_DIRECT` does today.
#[test]
fn o_direct_and_the_cpu_share_a_page() {
    for disturbance in [Disturbance::Protect, Disturbance::ForkAndProtect] {
        let race = match o_direct_race(200, disturbance) {
            Err(NotDone::CannotAsk(why)) => return eprintln!("skipped: {why}"),
            result => result.unwrap(),
        };
        eprintln!("{disturbance:?}: {race:?}");
        assert_eq!((race.rounds, race.lost_cpu), (200, 0));
        assert_eq!(race.lost_dma, 0, "{disturbance:?}");
    }
}
