//! What each safeguard is for: left out, a race ends badly that ends well with it (`hold` has the same race).

use crate::explore::fails;
use crate::mm::{Exclusive, Safeguard};
use crate::races;

/// Each line: the test, the safeguard it leaves out, the race, and what the assertion says that trips.
macro_rules! safeguards {
    ($($test:ident: $safeguard:ident, $race:ident, $how:literal;)*) => {
        $(
            #[test]
            fn $test() {
                fails(
                    concat!(module_path!(), "::", stringify!($test)),
                    Some(Safeguard::$safeguard),
                    races::$race::<Exclusive>,
                    $how,
                );
            }
        )*

        #[test]
        fn none_is_forgotten() {
            let tried = [$(Safeguard::$safeguard),*];
            for safeguard in Safeguard::ALL {
                assert!(tried.contains(&safeguard), "{safeguard:?}");
            }
        }
    };
}

safeguards! {
    pin_rereads_entry: PinRereadsEntry, pin_against_a_frame_that_becomes_a_clones, "coherence";
    pin_of_a_run_rereads_entries: PinRereadsEntry, pins_against_a_frame_that_becomes_a_clones, "coherence";
    pin_acquires: PinAcquires, pin_against_a_frame_that_becomes_a_clones, "coherence";
    pin_tests_in_the_word: PinTestsInTheWord, pin_to_read_against_fork, "isolation";
    pin_tests_in_the_word_for_merge: PinTestsInTheWord, pin_to_read_against_merge, "coherence";
    share_tests_in_the_word: ShareTestsInTheWord, pin_to_read_against_fork, "isolation";
    share_acquires: ShareAcquires, unpin_against_fork, "isolation";
    get_rereads_entry: GetRereadsEntry, get_against_a_frame_that_becomes_a_clones, "isolation";
    get_acquires: GetAcquires, get_against_a_frame_that_becomes_a_clones, "isolation";
    get_only_of_mapped: GetOnlyOfMapped, get_against_migrate, "freed twice";
    fault_looks_under_lock: FaultLooksUnderLock, two_write_faults_on_a_held_page, "once";
    fault_waits_for_fork: FaultWaitsForFork, write_to_an_unchanged_region_against_fork, "lost";
    copied_before_mapped: CopiedBeforeMapped, read_after_the_clones_break_against_break, "isolation";
    mmu_before_unmap: MmuBeforeUnmap, read_after_the_clones_break_against_break, "isolation";
    entry_before_unmap: EntryBeforeUnmap, pin_after_the_clones_break_against_break, "coherence";
    unmap_releases: UnmapReleases, pin_after_the_clones_break_against_break, "coherence";
    copy_is_held: CopyIsHeld, break_for_two_snapshots_against_drop_of_the_older, "is not held";
    reuse_proved_again: ReuseProvedAgain, get_through_a_snapshot_against_break, "isolation";
    protected_before_shared: ProtectedBeforeShared, two_writes_against_fork, "torn";
    clone_under_lock: CloneUnderLock, clone_against_break, "isolation";
    isolated_before_copy: IsolatedBeforeCopy, pin_against_migrate, "coherence";
    isolate_tests_in_the_word: IsolateTestsInTheWord, pin_against_discard, "coherence";
    isolate_acquires: IsolateAcquires, unpin_against_migrate, "lost";
    writers_stopped_before_copy: WritersStoppedBeforeCopy, write_against_migrate, "lost";
    isolated_before_gathering: IsolatedBeforeCopy, pin_against_gathering, "coherence";
    isolate_acquires_for_gathering: IsolateAcquires, unpin_against_gathering, "lost";
    writers_stopped_before_gathering: WritersStoppedBeforeCopy, write_against_gathering, "lost";
    compared_when_still: ComparedWhenStill, write_against_merge, "lost";
    compared_when_still_for_pins: ComparedWhenStill, unpin_against_merge, "lost";
    merge_locks_in_order: MergeLocksInOrder, merge_against_merge, "deadlock";
    uncommitted_before_free: UncommittedBeforeFree, discard_against_the_next_owner, "isolation";
    pins_counted_in_order: PinsCountedInOrder, pin_against_take_dirty, "tracking";
    folio_pages_looked_at: FolioPagesLookedAt, pin_of_a_folios_page_against_fork, "isolation";
    folio_barrier: FolioBarrier, pin_of_a_folios_page_against_fork, "isolation";
    folio_barrier_for_a_run: FolioBarrier, pins_of_a_folio_against_fork, "isolation";
    folio_looked_at_again: FolioLookedAtAgain, pin_of_a_folios_page_against_fork, "isolation";
    dissolved_in_the_word: DissolvedInTheWord, reader_of_a_folio_against_its_next_lives, "count below zero";
    folio_pages_looked_at_for_a_clone: FolioPagesLookedAt, split_of_a_clone_against_reuse_by_its_parent, "isolation";
    folio_left_last: FolioLeftLast, whole_breaks_of_a_folio_by_parent_and_clone, "isolation";
    split_counts_pages_first: SplitCountsPagesFirst, split_of_a_clone_against_reuse_by_its_parent, "freed twice";
    lent_stays: LentStays, lending_against_break, "isolation";
    lent_stays_whole: LentStays, lending_against_whole_break, "isolation";
    lent_stays_by_chunk: LentStays, lending_against_break_for_another_snapshot, "isolation";
    loan_ends_with_move: LoanEndsWithMove, second_lending_against_break, "isolation";
    adopted_before_given_back: AdoptedBeforeGivenBack, adoption_against_break, "isolation";
    borrowed_before_entry: BorrowedBeforeEntry, get_against_adoption, "isolation";
    brought_in_turn: BroughtInTurn, touch_against_touch, "once";
    folio_looked_at_again_for_a_run: FolioLookedAtAgain, pins_of_a_folio_against_fork, "isolation";
}

/// The lock of a snapshot's region is part of how it is read. There is nothing to leave out of the code: who
/// does not take it has `Frozen::frame`, which is a hint.
#[test]
fn snapshot_read_under_its_lock() {
    fails(
        concat!(module_path!(), "::snapshot_read_under_its_lock"),
        None,
        races::read_of_a_snapshot_without_its_lock_against_break::<Exclusive>,
        "isolation",
    );
}
