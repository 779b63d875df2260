//! `vmm snapshot`: snapshots that are kept as files.
//!
//! | file | concept |
//! |---|---|
//! | `args` | its verbs and their flags |
//! | `running` | verbs that run a guest: save, run, load |
//! | `looking` | verbs that look at what is there: list, info, verify, diff |
//! | `copying` | push and pull: from one store to another |
//! | `place` | where a snapshot is: a directory, or a URL |
//! | `pruning` | dropping and collecting |
//! | `transfer` | how far a save or a load is |

mod args;
mod copying;
mod looking;
mod place;
mod pruning;
mod running;
mod transfer;

use self::args::Verb;
pub(super) use self::args::{LoadingArgs, SnapshotArgs};
pub(super) use self::place::{CacheArgs, PlaceError, Places, ReachArgs};
pub(super) use self::transfer::Transfer;
use super::Failure;
use super::screen::Screen;
use crate::session::report::Verdict;

/// What came of it.
pub(super) fn run(args: &SnapshotArgs, screen: &Screen) -> Result<Verdict, Failure> {
    match &args.verb {
        Verb::Save(save) => running::save(save, screen),
        Verb::Run(run) => running::run(run, screen),
        Verb::Load(load) => running::load(load, screen),
        Verb::List(list) => looking::list(list),
        Verb::Info(info) => looking::info(info),
        Verb::Verify(verify) => looking::verify(verify, screen),
        Verb::Diff(diff) => looking::diff(diff, screen),
        Verb::Prune(prune) => pruning::run(prune, screen),
        Verb::Push(push) => copying::push(push, screen),
        Verb::Pull(pull) => copying::pull(pull, screen),
    }
}
