//! With the protocol as it is, every race ends well.

use crate::explore::{holds, holds_bounded, holds_within_three, holds_within_two};
use crate::mm::Exclusive;
use crate::races;

macro_rules! hold {
    ($holds:ident: $($race:ident)*) => {$(
        #[test]
        fn $race() {
            $holds(races::$race::<Exclusive>);
        }
    )*};
}

hold! {
    holds:

    unpin_against_fork
    pin_against_unshare
    pin_against_break_that_moves_the_sharers
    pin_against_break_that_moves_the_writer
    pin_against_a_frame_that_becomes_a_clones

    get_against_migrate

    two_write_faults_on_a_page
    two_write_faults_on_a_shared_page
    two_write_faults_on_a_held_page
    break_against_drop_of_the_snapshot
    break_against_end_of_a_clone
    break_of_a_clone_against_break_of_its_parent
    read_of_a_snapshot_against_break
    break_for_two_snapshots_against_drop_of_the_older
    break_for_two_snapshots_against_drop_of_the_younger

    unshare_against_fork
    write_against_fork
    write_against_fork_of_a_run
    write_to_an_unchanged_region_against_fork
    two_writes_against_fork
    clone_against_break

    pin_against_migrate
    unpin_against_migrate
    write_against_migrate
    migrate_against_fork
    pin_against_discard
    write_against_discard
    discard_against_the_next_owner
    write_against_merge
    merge_against_merge

    write_against_take_dirty
    get_to_write_against_take_dirty
    force_write_against_take_dirty
}

// These take minutes and more without a bound: both sides look at the same words again and again without a
// lock.
hold! {
    holds_bounded:

    pin_to_write_against_fork
    pin_to_read_against_fork
    pin_after_the_clones_break_against_break
    pins_against_a_frame_that_becomes_a_clones

    get_through_a_snapshot_against_break
    get_against_a_frame_that_becomes_a_clones
    get_against_discard

    read_after_the_clones_break_against_break

    pin_to_read_against_merge
    pin_to_write_against_merge
    pin_to_write_against_merge_into_another
    unpin_against_merge

    pin_against_take_dirty

    pin_of_a_folios_page_against_fork
    pin_of_a_folios_page_against_split
    pin_against_the_making_of_a_folio
    break_of_a_folio_against_drop_of_the_snapshot
    whole_break_of_a_folio_against_drop_of_the_snapshot
    whole_break_of_a_folio_against_a_reader_of_the_snapshot
    end_of_a_folio_against_its_last_holder

    clone_against_whole_break_of_a_folio
    clone_against_break_of_a_folios_page
    end_of_a_clone_against_whole_break_of_its_sibling
    lending_against_break
    lending_against_whole_break
    lending_against_break_for_another_snapshot
    second_lending_against_break
    adoption_against_break
    adoption_against_drop_of_the_snapshot
    get_against_adoption
    pin_against_adoption

    touch_against_get
    touch_against_clone
    prefetch_against_drop_of_all
}

hold! {
    holds_within_three:

    write_against_gathering
    pin_against_gathering
    unpin_against_gathering
    adoption_against_adoption
    adoption_against_adoption_by_the_last_but_one
    touch_against_touch
    touch_against_touch_of_its_neighbour
    touch_against_pin
    touch_against_fork
    touch_against_reader_and_prefetch
    pins_of_a_folio_against_fork
    reader_of_a_folio_against_its_next_lives
    two_forks_that_need_the_last_memory
    two_breaks_on_the_last_frame_of_an_account
    two_forks_that_need_what_a_home_does_not_use
}

hold! {
    holds_within_two:

    whole_breaks_of_a_folio_by_parent_and_clone
    split_of_a_clone_against_reuse_by_its_parent
}
