//! The verdict is what memory holds: a performer that does all it is asked and lies about what it reads.

use std::collections::BTreeMap;

use super::super::engine::{ScenarioOutcome, play};
use super::super::performer::Hold::{GetRead, PinWrite};
use super::super::performer::Who::{C, D, G, P, S};
use super::super::performer::{Hold, HoldId, NotDone, PAGES, Page, PageView, Performer, Who};
use super::super::script::{Scenario, Step};
use super::super::table::find;
use super::super::verdict::Verdict;

/// A performer that keeps what it is given, and says `answer` when it is asked for page 0 of `of`, or for
/// what is seen through a hold.
struct Liar {
    of: Who,
    answer: u64,
    memory: BTreeMap<(Who, Page), u64>,
}

impl Liar {
    fn copy(&mut self, from: Who, to: Who) {
        for page in 0..PAGES {
            let value = self.memory.get(&(from, page)).copied().unwrap_or(0);
            self.memory.insert((to, page), value);
        }
    }
}

impl Performer for Liar {
    fn write(&mut self, who: Who, page: Page, value: u64) -> Result<(), NotDone> {
        self.memory.insert((who, page), value);
        Ok(())
    }
    fn read(&mut self, who: Who, page: Page) -> Result<u64, NotDone> {
        Ok(if (who, page) == (self.of, 0) {
            self.answer
        } else {
            self.memory.get(&(who, page)).copied().unwrap_or(0)
        })
    }
    fn fork(&mut self, parent: Who, child: Who) -> Result<(), NotDone> {
        self.copy(parent, child);
        Ok(())
    }
    fn snapshot(&mut self, who: Who) -> Result<(), NotDone> {
        self.copy(who, S);
        Ok(())
    }
    fn restore(&mut self, who: Who) -> Result<(), NotDone> {
        self.copy(S, who);
        Ok(())
    }
    fn exit(&mut self, _: Who) -> Result<(), NotDone> {
        Ok(())
    }
    fn take(&mut self, _: HoldId, _: Who, _: Page, _: Hold) -> Result<(), NotDone> {
        Ok(())
    }
    fn read_hold(&mut self, _: HoldId) -> Result<u64, NotDone> {
        Ok(self.answer)
    }
    fn write_hold(&mut self, _: HoldId, _: u64) -> Result<(), NotDone> {
        Ok(())
    }
    fn release(&mut self, _: HoldId) -> Result<(), NotDone> {
        Ok(())
    }
    fn protect(&mut self, _: Who) -> Result<(), NotDone> {
        Ok(())
    }
    fn discard(&mut self, _: Who, _: Page) -> Result<(), NotDone> {
        Ok(())
    }
    fn discard_rest(&mut self, _: Who, _: Page) -> Result<(), NotDone> {
        Ok(())
    }
    fn collapse(&mut self, _: Who, _: Page) -> Result<(), NotDone> {
        Ok(())
    }
    fn migrate(&mut self, _: Who, _: Page) -> Result<(), NotDone> {
        Err(NotDone::CannotAsk("it lies"))
    }
    fn merge(&mut self, _: (Who, Page), _: (Who, Page)) -> Result<(), NotDone> {
        Ok(())
    }
    fn force_write(&mut self, _: Who, _: Page, _: u64) -> Result<(), NotDone> {
        Ok(())
    }
    fn exhaust_memory(&mut self) -> Result<(), NotDone> {
        Ok(())
    }
    fn free_memory(&mut self) -> Result<(), NotDone> {
        Ok(())
    }
    fn refuse_mmu(&mut self, _: u64) -> Result<(), NotDone> {
        Ok(())
    }
    fn view(&mut self, _: Who, _: Page) -> Option<PageView> {
        None
    }
}

fn play_liar(of: Who, answer: u64, steps: &'static [Step]) -> ScenarioOutcome {
    let scenario = Scenario {
        steps,
        copies: Some(0),
        ..*find("A1").unwrap()
    };
    let memory = BTreeMap::new();
    let mut liar = Liar { of, answer, memory };
    play(&scenario, &mut liar, true, &mut |_| {})
}

#[test]
fn the_verdict_is_what_memory_holds() {
    let play_with = |answer, steps| play_liar(P, answer, steps);
    let verdict = |answer, steps| play_with(answer, steps).verdict();
    const TWO_WRITES: &[Step] = &[Step::Write(P, 0), Step::Write(P, 0), Step::Read(P, 0)];
    assert_eq!(verdict(2, TWO_WRITES), Some(Verdict::Ok));
    assert_eq!(verdict(1, TWO_WRITES), Some(Verdict::Diverged));
    assert_eq!(verdict(7, TWO_WRITES), Some(Verdict::Broken));
    // What another address space was given after they parted.
    const PARTED: &[Step] = &[Step::Write(P, 0), Step::Fork(P, C), Step::Write(C, 1)];
    assert_eq!(verdict(2, PARTED), Some(Verdict::Leaked));
    // Without a look at the frames nothing is said about copies.
    let ScenarioOutcome::Played { copies, .. } = play_with(2, TWO_WRITES) else {
        panic!("played");
    };
    assert_eq!(copies, None);
    const CANNOT: &[Step] = &[Step::Migrate(P, 0)];
    assert_eq!(
        play_with(0, CANNOT),
        ScenarioOutcome::CannotAsk("it lies".to_owned())
    );
}

/// What each of a family should hold is told by when it parted from whom.
#[test]
fn siblings_and_generations_are_told_apart() {
    const STEPS: &[Step] = &[
        Step::Write(P, 0),
        Step::Fork(P, C),
        Step::Write(C, 0),
        Step::Fork(C, G),
        Step::Write(C, 0),
        Step::Fork(P, D),
        Step::Write(D, 0),
        Step::Write(P, 0),
    ];
    use Verdict::{Broken, Diverged, Leaked, Ok};
    // 1 is everybody's; C writes 2 before G is there, and 3 after it; D writes 4, and P 5.
    for (of, verdicts) in [
        (P, [Diverged, Leaked, Leaked, Leaked, Ok, Broken]),
        (C, [Diverged, Diverged, Ok, Leaked, Leaked, Broken]),
        (D, [Diverged, Leaked, Leaked, Ok, Leaked, Broken]),
        (G, [Diverged, Ok, Leaked, Leaked, Leaked, Broken]),
    ] {
        for (answer, verdict) in (1..).zip(verdicts) {
            let outcome = play_liar(of, answer, STEPS);
            assert_eq!(outcome.verdict(), Some(verdict), "{of:?} {answer}");
        }
    }
    // Who wrote it is said, not who has it from there.
    const INHERITED: &[Step] = &[
        Step::Fork(P, G),
        Step::Write(G, 0),
        Step::Fork(G, C),
        Step::Exit(G),
    ];
    let ScenarioOutcome::Played { findings, .. } = play_liar(P, 1, INHERITED) else {
        panic!("played");
    };
    assert_eq!(
        findings,
        ["P's page 0 sees 1, which is G's, of page 0; it should see 0"]
    );
    // Back in the snapshot's time.
    const RESTORED: &[Step] = &[
        Step::Fork(P, C),
        Step::Write(C, 0),
        Step::Snapshot(C),
        Step::Write(C, 0),
        Step::Fork(S, D),
        Step::Write(D, 0),
        Step::Restore(D),
    ];
    for (of, verdicts) in [
        (C, [Diverged, Ok, Leaked]),
        (D, [Ok, Leaked, Diverged]),
        (S, [Ok, Leaked, Leaked]),
    ] {
        for (answer, verdict) in (1..).zip(verdicts) {
            let outcome = play_liar(of, answer, RESTORED);
            assert_eq!(outcome.verdict(), Some(verdict), "{of:?} {answer}");
        }
    }
}

/// Whoever has the name later.
#[test]
fn a_hold_is_of_the_page_it_was_taken_through() {
    const STEPS: &[Step] = &[
        Step::Write(P, 1),
        Step::Fork(P, C),
        Step::Write(C, 0),
        Step::Write(C, 0),
        Step::Take(C, 0, PinWrite),
        Step::Exit(C),
        Step::Fork(P, C),
        Step::Write(C, 0),
        Step::HoldReads(0),
    ];
    use Verdict::{Broken, Diverged, Leaked, Ok};
    // P's page 0 is untouched, so it is read as zero where nobody lies.
    let verdicts = [Leaked, Diverged, Ok, Leaked, Broken];
    for (answer, verdict) in (1..).zip(verdicts) {
        // Nobody asks for a page of G, who is not there.
        let outcome = play_liar(G, answer, STEPS);
        assert_eq!(outcome.verdict(), Some(verdict), "{answer}");
    }
    // What a device writes when the page's owner has ended is the hold's, and no other's.
    const WRITTEN: &[Step] = &[
        Step::Fork(P, C),
        Step::Take(C, 0, PinWrite),
        Step::Take(C, 0, GetRead),
        Step::Exit(C),
        Step::HoldWrites(0),
        Step::HoldReads(1),
    ];
    assert_eq!(play_liar(G, 1, WRITTEN).verdict(), Some(Ok));
    assert_eq!(play_liar(P, 1, WRITTEN).verdict(), Some(Leaked));
}
