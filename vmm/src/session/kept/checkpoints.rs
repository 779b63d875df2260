//! Checkpoints: a snapshot of the run is saved every so often, each an increment of the last.
//!
//! One is saved at a time. When the next is due and the last is not durable yet, it is saved when that is. One that
//! could not be saved is said, and the run goes on: the next has all that changed since the last one that was. Those
//! that are no longer wanted are dropped by the thread that has saved one more, when it has its name. Only what
//! this run has saved is dropped.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use palimpsest::kept::Base;
use palimpsest::kept::store::{NameError, SnapshotName, Store, StoreError};

use super::saving::Keep;
use crate::session::report::CheckpointCounts;

/// How often a run is saved, under which names, and how many of them are wanted.
#[derive(Clone, Debug)]
pub struct Every {
    /// From one to the next.
    pub interval: Duration,
    /// The number of the first one.
    pub first: u64,
    /// The last so many are kept; nothing: all.
    pub keep_last: Option<NonZeroUsize>,
}

/// The name of checkpoint `number` of those that begin with `prefix`.
///
/// # Errors
/// If it is too long.
pub fn checkpoint_name(prefix: &SnapshotName, number: u64) -> Result<SnapshotName, NameError> {
    format!("{prefix}-{number:06}").parse()
}

/// The number that no checkpoint of `store` has yet, nor any after it, of those that begin with `prefix`.
///
/// # Errors
/// If the store cannot be looked into.
pub fn next_number(store: &Store, prefix: &SnapshotName) -> Result<u64, StoreError> {
    let number = |name: &SnapshotName| {
        let digits = name.as_str().strip_prefix(prefix.as_str())?;
        let digits = digits.strip_prefix('-')?;
        let is_number = digits.bytes().all(|c| c.is_ascii_digit());
        is_number.then(|| digits.parse::<u64>().ok()).flatten()
    };
    let last = store.names()?.iter().filter_map(number).max();
    Ok(last.map_or(1, |last| last.saturating_add(1)))
}

/// The checkpoints of a run that goes on. The save that goes on is whoever's this is.
#[derive(Debug)]
pub(in crate::session) struct Checkpoints {
    keep: Keep,
    every: Every,
    next: Instant,
    number: u64,
    /// The snapshot of the run that was saved last, or is being, by its number.
    saved: Option<u64>,
    /// What the next has in common with the last.
    base: Option<Base>,
    /// Those that are there, oldest first.
    names: VecDeque<SnapshotName>,
    counts: CheckpointCounts,
    /// Why the last could not be saved, if it could not.
    failed: Option<String>,
    end: Ending,
}

/// What is still to be done when the run is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// It is not.
    Running,
    /// It is, and its last snapshot is to be saved.
    Due,
    /// That is, or is being.
    Done,
}

/// What came of a checkpoint.
#[derive(Debug, Default)]
pub(in crate::session) struct Checkpointed {
    /// What the next has in common with it.
    pub(super) base: Option<Base>,
    /// Those that were dropped since.
    pub(super) dropped: Vec<SnapshotName>,
    /// Why they were not, if they were to be.
    pub(super) not_dropped: Option<String>,
}

impl Checkpoints {
    /// Of a run that begins now.
    pub(in crate::session) fn new(keep: Keep, every: Every) -> Self {
        Self {
            next: Instant::now() + every.interval,
            number: every.first,
            saved: None,
            base: None,
            names: VecDeque::new(),
            counts: CheckpointCounts {
                store: keep.store.path().display().to_string(),
                name: keep.name.to_string(),
                ..CheckpointCounts::default()
            },
            failed: None,
            end: Ending::Running,
            keep,
            every,
        }
    }

    /// Whether none was saved yet.
    pub(in crate::session) fn has_none(&self) -> bool {
        self.counts.saved == 0
    }

    /// One could not even be begun, for the reason `why`. Says so.
    pub(in crate::session) fn cannot_begin(&mut self, why: String) -> String {
        self.counts.failed += 1;
        self.counts.last_failure = Some(why.clone());
        let told = format!("no checkpoint was saved, the run goes on: {why}");
        self.failed = Some(why);
        told
    }

    /// The run began with what was loaded as `base`.
    pub(in crate::session) fn begin_with(&mut self, base: Base) {
        self.base = Some(base);
    }

    /// Forgets what was saved, whose memory is wanted. The next is compared with what is in the store.
    pub(in crate::session) fn forget(&mut self) {
        self.base = None;
    }

    /// Whether one is to be begun at `now`, where `newest` is the snapshot that the run has taken last.
    pub(in crate::session) fn is_due(&self, now: Instant, newest: u64) -> bool {
        let has_come = now >= self.next || self.end == Ending::Due;
        has_come && self.end != Ending::Done && self.saved != Some(newest)
    }

    /// The run is over, and `newest` is its last snapshot. Whether there is nothing to begin any more; a last one is
    /// due at once otherwise.
    pub(in crate::session) fn is_over(&mut self, newest: Option<u64>) -> bool {
        if self.end == Ending::Running {
            self.end = Ending::Due;
        }
        self.end == Ending::Done || newest.is_some() && self.saved == newest
    }

    /// What is to be saved next, of snapshot `newest`, how, and what is dropped after it.
    pub(in crate::session) fn begin(
        &mut self,
        now: Instant,
        newest: u64,
    ) -> Result<(Keep, Option<Base>, Vec<SnapshotName>), NameError> {
        let name = checkpoint_name(&self.keep.name, self.number)?;
        // Late ones are not made up for.
        self.next = now + self.every.interval;
        self.saved = Some(newest);
        if self.end == Ending::Due {
            self.end = Ending::Done;
        }
        let keep = Keep {
            name,
            ..self.keep.clone()
        };
        let most = self.every.keep_last.map_or(usize::MAX, NonZeroUsize::get);
        // This one is there then, too.
        let drops = (self.names.len() + 1).saturating_sub(most);
        let drops = self.names.iter().take(drops).cloned().collect();
        Ok((keep, self.base.clone(), drops))
    }

    /// What came of one: what it has written, or why it was not saved. Says what is worth a line.
    pub(in crate::session) fn end(
        &mut self,
        name: SnapshotName,
        written: u64,
        done: Result<Checkpointed, String>,
        is_taken: bool,
    ) -> Option<String> {
        match done {
            Ok(done) => {
                self.counts.saved += 1;
                self.counts.bytes_written += written;
                self.counts.dropped += done.dropped.len() as u64;
                self.names.retain(|name| !done.dropped.contains(name));
                self.counts.last = Some(name.to_string());
                self.names.push_back(name);
                self.counts.kept = self.names.len() as u64;
                self.number = self.number.saturating_add(1);
                self.base = done.base;
                self.failed = None;
                let why = done.not_dropped?;
                Some(format!(
                    "older checkpoints were not dropped, which is tried again: {why}"
                ))
            }
            Err(why) => {
                self.counts.failed += 1;
                self.counts.last_failure = Some(why.clone());
                // Somebody else has it.
                self.number = self.number.saturating_add(u64::from(is_taken));
                let told = format!("checkpoint `{name}` was not saved, the run goes on: {why}");
                self.failed = Some(why);
                Some(told)
            }
        }
    }

    /// The end of the run: what was saved in all, and what keeps that from being well.
    pub(in crate::session) fn finish(self) -> (CheckpointCounts, Option<String>) {
        let why = match (self.failed, self.counts.saved) {
            (Some(why), _) => Some(format!("the last checkpoint was not saved: {why}")),
            (None, 0) => Some("no checkpoint was saved: the run was ended before".to_owned()),
            (None, _) => None,
        };
        (self.counts, why)
    }
}

#[cfg(test)]
mod tests {
    use palimpsest::kept::store::{Compression, Facts, SaveOptions, Saving};

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("store")).unwrap();
        (dir, store)
    }

    fn save(store: &Store, name: &str) {
        let saving = Saving::begin(store, &name.parse().unwrap(), 4096, SaveOptions::default());
        saving.unwrap().finish(Facts::default(), &[]).unwrap();
    }

    fn checkpoints(store: &Store, keep_last: Option<usize>) -> Checkpoints {
        let keep = Keep {
            store: store.clone(),
            name: "run".parse().unwrap(),
            parent: None,
            compression: Compression::None,
            most_a_second: None,
            every: None,
        };
        let every = Every {
            interval: Duration::from_secs(60),
            first: 7,
            keep_last: keep_last.map(|n| NonZeroUsize::new(n).unwrap()),
        };
        Checkpoints::new(keep, every)
    }

    #[test]
    fn numbers_go_on_where_they_ended() {
        let (_dir, store) = store();
        let next = |prefix: &str| next_number(&store, &prefix.parse().unwrap()).unwrap();
        assert_eq!(next("run"), 1);
        for name in [
            "run",
            "run-000004",
            "run-12",
            "run-x9",
            "run-",
            "run-3a",
            "other-000099",
        ] {
            save(&store, name);
        }
        assert_eq!((next("run"), next("other"), next("ru")), (13, 100, 1));
        let name = checkpoint_name(&"run".parse().unwrap(), 13).unwrap();
        assert_eq!(name.as_str(), "run-000013");
        let long = "n".repeat(122).parse().unwrap();
        assert!(checkpoint_name(&long, 1).is_err());
    }

    #[test]
    fn one_is_due_when_its_time_has_come_or_the_run_is_over_and_of_a_snapshot_once() {
        let (_dir, store) = store();
        let mut it = checkpoints(&store, None);
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(61));
        assert!(!it.is_due(now, 1) && it.is_due(later, 1));
        let (keep, ..) = it.begin(later, 1).unwrap();
        assert_eq!(keep.name.as_str(), "run-000007");
        // The same snapshot again would be of no use, even if it could not be saved.
        let latest = later + Duration::from_secs(60);
        assert!(!it.is_due(latest, 1) && !it.is_due(later, 2) && it.is_due(latest, 2));
        // The run is over: if there is no other snapshot, that was all. If there is, that is the last.
        assert!(!it.is_over(None) && it.is_over(Some(1)) && !it.is_over(Some(2)));
        assert!(!it.is_due(now, 1) && it.is_due(now, 2));
        it.begin(later, 2).unwrap();
        assert!(it.is_over(Some(3)) && !it.is_due(latest, 3));
    }

    #[test]
    fn the_last_are_kept_and_what_was_not_dropped_is_dropped_later() {
        let (_dir, store) = store();
        let mut it = checkpoints(&store, Some(2));
        let now = Instant::now();
        let names =
            |drops: &[SnapshotName]| drops.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut expected: Vec<(&[&str], bool)> = vec![
            (&[], true),
            (&[], true),
            // Somebody uses the store.
            (&["run-000007"], false),
            (&["run-000007", "run-000008"], true),
            (&["run-000009"], true),
        ];
        for (newest, (drops, is_dropped)) in (1..).zip(expected.drain(..)) {
            let (keep, _, dropped) = it.begin(now, newest).unwrap();
            assert_eq!(names(&dropped), drops);
            let done = match is_dropped {
                true => Checkpointed {
                    dropped,
                    ..Checkpointed::default()
                },
                false => Checkpointed {
                    not_dropped: Some("busy".to_owned()),
                    ..Checkpointed::default()
                },
            };
            let told = it.end(keep.name, 10, Ok(done), false);
            assert_eq!(told.is_none(), is_dropped, "{told:?}");
        }
        let (counts, why) = it.finish();
        assert_eq!(why, None);
        assert_eq!((counts.saved, counts.dropped, counts.kept), (5, 3, 2));
        assert_eq!(
            (counts.bytes_written, counts.last.as_deref()),
            (50, Some("run-000011"))
        );
    }

    #[test]
    fn one_that_fails_is_told_and_its_number_is_the_next_ones_unless_it_is_taken() {
        let (_dir, store) = store();
        let mut it = checkpoints(&store, None);
        let now = Instant::now();
        for (newest, is_taken) in [(1, false), (2, true)] {
            let (keep, ..) = it.begin(now, newest).unwrap();
            assert_eq!(keep.name.as_str(), "run-000007");
            let told = it
                .end(keep.name, 0, Err("the disk is full".to_owned()), is_taken)
                .unwrap();
            assert!(
                told.contains("`run-000007` was not saved") && told.ends_with("the disk is full")
            );
        }
        let (keep, ..) = it.begin(now, 3).unwrap();
        assert_eq!(keep.name.as_str(), "run-000008");
        let (counts, why) = it.finish();
        assert_eq!((counts.saved, counts.failed), (0, 2));
        assert!(
            why.unwrap()
                .starts_with("the last checkpoint was not saved: ")
        );
        let (_, why) = checkpoints(&store, None).finish();
        assert!(why.unwrap().starts_with("no checkpoint was saved"));
    }
}
