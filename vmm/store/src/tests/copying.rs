//! Copies between directories and objects: whole or not there, whoever refuses, is cut or is quicker.

use std::num::NonZeroUsize;
use std::sync::mpsc;
use std::time::Duration;

use super::bucket::{Bucket, Happens, Trouble, Watched};
use super::memory::MemoryDisk;
use super::*;
use crate::copy::{Copied, CopyOptions, copy};
use crate::objects::Objects;
use crate::prune::prune;

const URL: &str = "mem://bucket/store";

/// A directory with `warm`, and `other`, which has a chunk in common with it.
fn directory() -> (MemoryDisk, Store) {
    let disk = MemoryDisk::new();
    let store = store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap();
    save(&store, "warm", &memory(1, 2)).unwrap();
    save_with(&store, "other", &memory(1, 3), zstd()).unwrap();
    (disk, store)
}

fn empty() -> Store {
    store_on(&(Arc::new(MemoryDisk::new()) as Arc<dyn Disk>)).unwrap()
}

fn open(objects: Arc<dyn Objects>) -> Result<Store, StoreError> {
    Store::open_objects(URL, objects)
}

fn on(bucket: &Bucket) -> Store {
    open(Arc::new(bucket.clone())).unwrap()
}

/// One at a time, so that operations come in one order.
fn one_by_one() -> CopyOptions {
    CopyOptions {
        at_once: NonZeroUsize::MIN,
        ..CopyOptions::default()
    }
}

fn push_with(
    store: &Store,
    named: &str,
    objects: Arc<dyn Objects>,
    options: CopyOptions,
) -> Result<Copied, StoreError> {
    let to = Store::open_or_create_objects(URL, objects)?;
    copy(
        &store.read(&name(named))?,
        &to,
        &name("there"),
        options,
        &mut |_| true,
    )
}

fn push(store: &Store, named: &str, objects: Arc<dyn Objects>) -> Result<Copied, StoreError> {
    push_with(store, named, objects, one_by_one())
}

fn pull(from: &Store, to: &Store) -> Result<Copied, StoreError> {
    let kept = from.read(&name("there"))?;
    copy(&kept, to, &name("back"), one_by_one(), &mut |_| true)
}

/// Nothing is there by the name that is not whole, and what is there is one of `store`'s.
fn is_whole_or_not_there(bucket: &Bucket, store: &Store, what: &str) -> Option<crate::Hash> {
    let keys = bucket.keys();
    if !keys.contains(&"there/snapshot.json".to_owned()) {
        // What is pushed or dropped is no snapshot.
        if keys.contains(&"store.json".to_owned()) {
            assert!(on(bucket).names().unwrap().is_empty(), "{what}");
        }
        return None;
    }
    let there = on(bucket);
    let found = wrong(&there, "there");
    assert!(found.is_empty(), "{what}: {found:?}");
    let hash = there.read(&name("there")).unwrap().hash();
    let ours = ["warm", "other"].map(|named| store.read(&name(named)).unwrap().hash());
    assert!(ours.contains(&hash), "{what}: it is of nobody");
    Some(hash)
}

#[test]
fn what_was_pushed_and_pulled_is_the_same_snapshot() {
    let (_, store) = directory();
    for compression in [Compression::None, Compression::Zstd { level: 3 }] {
        for at_once in [1, 8] {
            let bucket = Bucket::default();
            let options = CopyOptions {
                compression,
                at_once: NonZeroUsize::new(at_once).unwrap(),
                check: true,
            };
            let objects = || Arc::new(bucket.clone());
            let pushed = push_with(&store, "warm", objects(), options).unwrap();
            assert_eq!((pushed.done, pushed.sent, pushed.was_there), (2, 2, false));
            let there = on(&bucket);
            assert_eq!(
                load(&there, "there").unwrap(),
                load(&store, "warm").unwrap()
            );
            assert!(wrong(&there, "there").is_empty());
            let back = empty();
            let pulled = pull(&there, &back).unwrap();
            assert_eq!((pulled.done, pulled.sent), (2, 2));
            assert_eq!(load(&back, "back").unwrap(), load(&store, "warm").unwrap());
            let [hash, pushed, pulled] = [(&store, "warm"), (&there, "there"), (&back, "back")]
                .map(|(store, named)| store.read(&name(named)).unwrap().hash());
            assert_eq!((hash, hash), (pushed, pulled));

            // Again: nothing is sent, and nothing changes.
            let before = bucket.objects().clone();
            let again = push_with(&store, "warm", objects(), options).unwrap();
            assert_eq!((again.sent, again.was_there), (0, true));
            assert_eq!(*bucket.objects(), before);
            let again = pull(&there, &back).unwrap();
            assert_eq!((again.done, again.sent, again.was_there), (2, 0, true));

            // Another by the same name is refused; by another name it sends what is not there.
            let refused = push_with(&store, "other", objects(), options).unwrap_err();
            assert!(matches!(refused, StoreError::Exists { .. }), "{refused}");
            assert_eq!(*bucket.objects(), before);
            let other = store.read(&name("other")).unwrap();
            let copied = copy(&other, &there, &name("other"), options, &mut |_| true).unwrap();
            assert_eq!((copied.done, copied.sent), (2, 1));
            assert_eq!(there.names().unwrap(), [name("other"), name("there")]);
            let usage = crate::list::list(&there).unwrap();
            let usage = usage.iter().map(|entry| entry.found.as_ref().unwrap().1);
            assert!(
                usage
                    .clone()
                    .all(|usage| usage.missing == 0 && usage.own_bytes > 0)
            );
            assert!(
                usage.clone().all(|usage| usage.bytes > usage.own_bytes),
                "{usage:?}"
            );
        }
    }
}

#[test]
fn a_push_that_is_refused_anywhere_is_done_again() {
    let (_, store) = directory();
    for trouble in [Trouble::Refused, Trouble::Lost, Trouble::Twice] {
        for goes_on in [false, true] {
            for at in 0.. {
                let bucket = Bucket::default();
                let happens = match goes_on {
                    true => Happens::ToAll(trouble),
                    false => Happens::To(trouble),
                };
                let watched = Watched::new(&bucket, at, happens);
                let pushed = push(&store, "warm", Arc::<Watched>::clone(&watched));
                let what = format!("{trouble:?} at {at}, {goes_on}");
                if !watched.has_happened() {
                    assert!(at > 12, "{what}: that is too few operations");
                    break;
                }
                let there = is_whole_or_not_there(&bucket, &store, &what);
                match pushed {
                    Ok(_) => assert!(there.is_some(), "{what}"),
                    Err(error) => {
                        let text = error.to_string();
                        assert!(text.contains("mem://bucket/store"), "{what}: {text}");
                        // To be told is worth less than to be there.
                        assert!(
                            there.is_none() || trouble != Trouble::Twice,
                            "{what}: {text}"
                        );
                    }
                }
                // What was sent is not sent again.
                let chunks = |bucket: &Bucket| {
                    let keys = bucket.keys().into_iter();
                    keys.filter(|key| key.starts_with("chunks/")).count() as u64
                };
                let had = chunks(&bucket);
                let again = push(&store, "warm", Arc::new(bucket.clone())).unwrap();
                assert_eq!(again.sent, 2 - had, "{what}");
                assert!(is_whole_or_not_there(&bucket, &store, &what).is_some());
            }
        }
    }
    assert!(wrong(&store, "warm").is_empty());
}

#[test]
fn a_pull_that_is_refused_anywhere_is_done_again() {
    let (_, store) = directory();
    let bucket = Bucket::default();
    push(&store, "warm", Arc::new(bucket.clone())).unwrap();
    let before = bucket.objects().clone();
    for at in 0.. {
        let watched = Watched::new(&bucket, at, Happens::To(Trouble::Refused));
        let back = empty();
        let pulled = open(Arc::<Watched>::clone(&watched)).and_then(|there| pull(&there, &back));
        if !watched.has_happened() {
            assert!(at > 4, "{at}");
            break;
        }
        let error = pulled.unwrap_err();
        assert!(error.to_string().contains("mem://"), "{at}: {error}");
        assert!(back.names().unwrap().is_empty(), "{at}");
        pull(&on(&bucket), &back).unwrap();
        assert_eq!(load(&back, "back").unwrap(), load(&store, "warm").unwrap());
    }
    assert_eq!(*bucket.objects(), before, "who reads has written");
}

#[test]
fn of_two_that_push_different_snapshots_by_one_name_one_is_first() {
    let (_, store) = directory();
    let mut winners = HashSet::new();
    for at in 0.. {
        let bucket = Bucket::default();
        let meanwhile = {
            let (store, bucket) = (store.clone(), bucket.clone());
            let done = Arc::new(std::sync::Mutex::new(None));
            let said = Arc::clone(&done);
            let act = move || {
                let pushed = push(&store, "other", Arc::new(bucket.clone()));
                *said.lock().unwrap() = Some(pushed);
            };
            (act, done)
        };
        let watched = Watched::before(&bucket, at, meanwhile.0);
        let ours = push(&store, "warm", Arc::<Watched>::clone(&watched));
        if !watched.has_happened() {
            break;
        }
        let theirs = meanwhile.1.lock().unwrap().take().unwrap();
        let hash = is_whole_or_not_there(&bucket, &store, &format!("at {at}")).unwrap();
        let of = |named| store.read(&name(named)).unwrap().hash();
        let (first, lost) = match hash == of("warm") {
            true => (ours, theirs),
            false => (theirs, ours),
        };
        first.unwrap();
        let lost = lost.unwrap_err();
        assert!(
            matches!(lost, StoreError::Exists { .. } | StoreError::Claimed { .. }),
            "at {at}: {lost}"
        );
        winners.insert(hash);
    }
    assert_eq!(winners.len(), 2, "it is always the same one that is first");
}

#[test]
fn two_that_push_the_same_are_both_right() {
    let (_, store) = directory();
    for at in 0.. {
        let bucket = Bucket::default();
        let (theirs, to) = (store.clone(), bucket.clone());
        let watched = Watched::before(&bucket, at, move || {
            push(&theirs, "warm", Arc::new(to.clone())).unwrap();
        });
        push(&store, "warm", Arc::<Watched>::clone(&watched)).unwrap();
        is_whole_or_not_there(&bucket, &store, &format!("at {at}")).unwrap();
        if !watched.has_happened() {
            break;
        }
    }
}

fn drop_there(objects: Arc<dyn Objects>) -> Result<(), StoreError> {
    prune(&open(objects)?, &[name("there")], Duration::ZERO).map(drop)
}

#[test]
fn a_push_and_a_drop_of_one_name_leave_it_whole_or_not_there() {
    let (_, store) = directory();
    let mut outcomes = HashSet::new();
    // A drop in the middle of a push, of what is there before and of what is not.
    for was_there in [false, true] {
        for at in 0.. {
            let bucket = Bucket::default();
            if was_there {
                push(&store, "warm", Arc::new(bucket.clone())).unwrap();
            }
            let to = bucket.clone();
            let watched = Watched::before(&bucket, at, move || {
                // There may be nothing to drop yet.
                let _ = drop_there(Arc::new(to.clone()));
            });
            let pushed = push(&store, "warm", Arc::<Watched>::clone(&watched));
            if !watched.has_happened() {
                break;
            }
            let there = is_whole_or_not_there(&bucket, &store, &format!("push, drop at {at}"));
            if let Err(error) = &pushed {
                assert!(
                    matches!(error, StoreError::BeingDropped { .. }),
                    "{at}: {error}"
                );
                assert!(there.is_none(), "{at}");
            }
            outcomes.insert((pushed.is_ok(), there.is_some()));
            push(&store, "warm", Arc::new(bucket.clone())).unwrap();
        }
    }
    // Pushed, dropped during the push so that it failed; before or after it.
    assert!(outcomes.contains(&(true, true)) && outcomes.contains(&(false, false)));

    // A push in the middle of a drop.
    for at in 0.. {
        let bucket = Bucket::default();
        push(&store, "warm", Arc::new(bucket.clone())).unwrap();
        let (theirs, to) = (store.clone(), bucket.clone());
        let pushed = Arc::new(std::sync::Mutex::new(None));
        let said = Arc::clone(&pushed);
        let watched = Watched::before(&bucket, at, move || {
            *said.lock().unwrap() = Some(push(&theirs, "warm", Arc::new(to.clone())));
        });
        drop_there(Arc::<Watched>::clone(&watched)).unwrap();
        if !watched.has_happened() {
            break;
        }
        let there = is_whole_or_not_there(&bucket, &store, &format!("drop, push at {at}"));
        if let Some(Err(error)) = pushed.lock().unwrap().take() {
            assert!(
                matches!(error, StoreError::BeingDropped { .. }),
                "{at}: {error}"
            );
            assert!(there.is_none(), "{at}");
        }
        push(&store, "warm", Arc::new(bucket.clone())).unwrap();
    }
}

/// A drop that begins in the middle of a push, is in the middle itself while the push goes on to its end, and goes on
/// then, to its end or until it is killed.
#[test]
fn a_push_and_a_drop_that_overlap_leave_the_name_whole_or_not_there() {
    let (_, store) = directory();
    let mut failed = 0;
    for was_there in [false, true] {
        for at in 0.. {
            let mut has_happened = false;
            for dropped in 1..9 {
                for dies_at in [dropped, dropped + 1, dropped + 2, dropped + 3, u64::MAX] {
                    let bucket = Bucket::default();
                    if was_there {
                        push(&store, "warm", Arc::new(bucket.clone())).unwrap();
                    }
                    let (pushed, happened) = overlap(&store, &bucket, at, dropped, dies_at);
                    has_happened = happened;
                    let what = format!("drop at {at}, on from {dropped}, dead at {dies_at}");
                    let there = is_whole_or_not_there(&bucket, &store, &what);
                    if let Err(error) = pushed {
                        let is_right = matches!(error, StoreError::BeingDropped { .. });
                        assert!(is_right, "{what}: {error}");
                        // Who drops it was killed before what was there was gone.
                        assert!(there.is_none() || was_there, "{what}");
                        failed += 1;
                    }
                    // There may be nothing left.
                    let _ = drop_there(Arc::new(bucket.clone()));
                    push(&store, "warm", Arc::new(bucket.clone())).unwrap();
                }
            }
            if !has_happened {
                assert!(at > 12, "{at}");
                break;
            }
        }
    }
    assert!(failed > 20, "{failed}");
}

/// A push, at whose operation `at` a drop begins that waits before its operation `dropped` for the end of the push, and
/// dies at `dies_at`. What came of the push, and whether it had so many operations.
fn overlap(
    store: &Store,
    bucket: &Bucket,
    at: u64,
    dropped: u64,
    dies_at: u64,
) -> (Result<Copied, StoreError>, bool) {
    let (go_on, may_go_on) = mpsc::channel();
    let (reached, has_reached) = mpsc::channel();
    let wait = move || {
        reached.send(()).unwrap();
        may_go_on.recv().unwrap();
    };
    let theirs = Watched::before_and_dies(bucket, dropped, wait, dies_at);
    let mut dropping = Some(move || drop_there(theirs));
    let (thread, threads) = mpsc::channel();
    let begin = move || {
        thread
            .send(std::thread::spawn(dropping.take().unwrap()))
            .unwrap();
        // Or it has ended before.
        let _ = has_reached.recv();
    };
    let watched = Watched::before(bucket, at, begin);
    let pushed = push(store, "warm", Arc::<Watched>::clone(&watched));
    let _ = go_on.send(());
    // There may have been nothing to drop, or it was killed.
    let drops = threads.try_iter().map(|thread| thread.join().unwrap());
    let _ = drops.count();
    (pushed, watched.has_happened())
}

#[test]
fn a_drop_that_is_refused_anywhere_is_done_again() {
    let (_, store) = directory();
    for trouble in [Trouble::Refused, Trouble::Lost] {
        for at in 0.. {
            let bucket = Bucket::default();
            push(&store, "warm", Arc::new(bucket.clone())).unwrap();
            let watched = Watched::new(&bucket, at, Happens::ToAll(trouble));
            let dropped = drop_there(Arc::<Watched>::clone(&watched));
            if !watched.has_happened() {
                assert!(at > 6, "{at}");
                dropped.unwrap();
                break;
            }
            dropped.unwrap_err();
            is_whole_or_not_there(&bucket, &store, &format!("{trouble:?} at {at}"));
            match drop_there(Arc::new(bucket.clone())) {
                // It was done, and nobody was told.
                Err(StoreError::NoSnapshot { .. }) => assert_eq!(trouble, Trouble::Lost),
                dropped => dropped.unwrap(),
            }
            assert!(on(&bucket).names().unwrap().is_empty());
            let keys = bucket.keys();
            assert!(
                keys.iter().all(|key| !key.starts_with("there/")),
                "{keys:?}"
            );
            let again = push(&store, "warm", Arc::new(bucket.clone())).unwrap();
            assert_eq!(again.sent, 0, "chunks stay");
        }
    }
}

#[test]
fn what_is_of_others_stays_when_a_name_is_dropped() {
    let (_, store) = directory();
    let bucket = Bucket::default();
    push(&store, "warm", Arc::new(bucket.clone())).unwrap();
    let missing = prune(&on(&bucket), &[name("nobody")], Duration::ZERO).unwrap_err();
    assert!(
        matches!(missing, StoreError::NoSnapshot { .. }),
        "{missing}"
    );
    let refused = prune(&on(&bucket), &[], Duration::ZERO).unwrap_err();
    assert!(
        matches!(refused, StoreError::NotCollected { .. }),
        "{refused}"
    );
    bucket.put("there/theirs", b"a note").unwrap();
    drop_there(Arc::new(bucket.clone())).unwrap();
    let keys = bucket.keys().into_iter();
    let left: Vec<_> = keys.filter(|key| !key.starts_with("chunks/")).collect();
    assert_eq!(left, ["store.json", "there/theirs"]);
}

#[test]
fn nothing_is_saved_in_place() {
    let (_, store) = directory();
    let bucket = Bucket::default();
    push(&store, "warm", Arc::new(bucket.clone())).unwrap();
    let before = bucket.objects().clone();
    let there = on(&bucket);
    assert!(there.is_remote() && !store.is_remote());
    let refused = [
        there.may_save(&name("new")).unwrap_err(),
        save(&there, "new", &memory(1, 2)).unwrap_err(),
    ];
    for error in refused {
        assert!(matches!(error, StoreError::ReadOnly { .. }), "{error}");
    }
    assert_eq!(*bucket.objects(), before);
}

#[test]
fn what_is_no_store_is_left_alone() {
    let (_, store) = directory();
    let bucket = Bucket::default();
    bucket.put("photos/1.jpg", b"jpeg").unwrap();
    let error = push(&store, "warm", Arc::new(bucket.clone())).unwrap_err();
    assert!(matches!(error, StoreError::NoStore { .. }), "{error}");
    assert_eq!(bucket.keys(), ["photos/1.jpg"]);
    // One that takes no notice of "if nothing is there" is found out before anything is sent.
    let replaces = Bucket::that_replaces();
    let error = push(&store, "warm", Arc::new(replaces.clone())).unwrap_err();
    assert!(matches!(error, StoreError::Replaces { .. }), "{error}");
    assert_eq!(replaces.keys(), ["store.json"]);
}

#[test]
fn chunks_that_are_damaged_there_are_sent_again() {
    let (_, store) = directory();
    for (compression, damage, is_seen_without_check) in [
        (
            Compression::None,
            (|bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 1)) as fn(&mut Vec<u8>),
            true,
        ),
        (Compression::None, |bytes| bytes[0] ^= 1, false),
        (Compression::ANY, |bytes| bytes[12] ^= 1, false),
        (Compression::ANY, |bytes| bytes.resize(3 << 20, 0), true),
    ] {
        let bucket = Bucket::default();
        let options = CopyOptions {
            compression,
            ..one_by_one()
        };
        let objects = || Arc::new(bucket.clone());
        push_with(&store, "warm", objects(), options).unwrap();
        let keys = bucket.keys();
        let chunk = keys.iter().find(|key| key.starts_with("chunks/")).unwrap();
        damage(bucket.objects().get_mut(chunk).unwrap());
        assert_eq!(wrong(&on(&bucket), "there").len(), 1);
        let again = push_with(&store, "warm", objects(), options).unwrap();
        assert_eq!(again.sent, u64::from(is_seen_without_check), "{chunk}");
        let options = CopyOptions {
            check: true,
            ..options
        };
        let again = push_with(&store, "warm", objects(), options).unwrap();
        assert_eq!(again.sent, u64::from(!is_seen_without_check), "{chunk}");
        assert!(wrong(&on(&bucket), "there").is_empty());
    }
}

#[test]
fn a_chunk_that_is_damaged_here_is_fetched_again() {
    let (_, store) = directory();
    let bucket = Bucket::default();
    push(&store, "warm", Arc::new(bucket.clone())).unwrap();
    let disk = MemoryDisk::new();
    let back = store_on(&(Arc::new(disk.clone()) as Arc<dyn Disk>)).unwrap();
    pull(&on(&bucket), &back).unwrap();
    let hash = back.read(&name("back")).unwrap().index().get(0).unwrap();
    let chunk = crate::chunk::path_of(&back, hash, Compression::None);
    disk.open(&chunk).unwrap().write_at(5, b"!").unwrap();
    assert_eq!(wrong(&back, "back").len(), 1);
    let kept = on(&bucket).read(&name("there")).unwrap();
    let copied = copy(&kept, &back, &name("again"), one_by_one(), &mut |_| true).unwrap();
    assert_eq!((copied.done, copied.sent), (2, 1));
    assert!(wrong(&back, "back").is_empty() && wrong(&back, "again").is_empty());
}

#[test]
fn a_copy_is_called_off_between_chunks() {
    let (_, store) = directory();
    let bucket = Bucket::default();
    let to = Store::open_or_create_objects(URL, Arc::new(bucket.clone())).unwrap();
    let back = empty();
    let kept = store.read(&name("warm")).unwrap();
    for to in [&to, &back] {
        for calls in 1..=3 {
            let mut left = calls;
            let copied = copy(&kept, to, &name("there"), one_by_one(), &mut |_| {
                left -= 1;
                left > 0
            });
            assert!(matches!(copied, Err(StoreError::CalledOff)), "{copied:?}");
            assert!(to.names().unwrap().is_empty());
        }
    }
}

/// Every byte of every object of a small snapshot changed, and every length.
#[test]
fn no_wrong_byte_of_an_object_is_handed_out() {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
    let store = store_on(&disk).unwrap();
    let content: Vec<u8> = (0..4096_u32).map(|n| (n * n / 7) as u8 & 0xf3).collect();
    let mut saving = Saving::begin(&store, &name("warm"), 4096, SaveOptions::default()).unwrap();
    saving.region(0, &content).unwrap();
    saving.finish(Facts::default(), &parts()).unwrap();
    for compression in [Compression::None, Compression::ANY] {
        let bucket = Bucket::default();
        let options = CopyOptions {
            compression,
            ..one_by_one()
        };
        push_with(&store, "warm", Arc::new(bucket.clone()), options).unwrap();
        let read = || -> Result<(), StoreError> {
            let kept = open(Arc::new(bucket.clone()))?.read(&name("there"))?;
            let mut found = vec![0; 4096];
            kept.region(0, &mut found)?;
            assert!(found == content, "other bytes than were saved");
            assert_eq!(kept.parts(), parts());
            Ok(())
        };
        let keys = bucket.keys();
        assert_eq!(keys.len(), 5, "{keys:?}");
        let mut harmless = 0;
        for key in keys {
            let right = bucket.objects()[&key].clone();
            for at in 0..right.len() {
                let mut changed = right.clone();
                changed[at] ^= 1 << (at % 8);
                bucket.put(&key, &changed).unwrap();
                harmless += u64::from(read().is_ok());
                bucket.put(&key, &right[..at]).unwrap();
                read().unwrap_err();
            }
            bucket.put(&key, &[&right[..], &[0]].concat()).unwrap();
            read().unwrap_err();
            bucket.delete(&key).unwrap();
            read().unwrap_err();
            bucket.put(&key, &right).unwrap();
            read().unwrap();
        }
        // Some bits of a zstd frame do not matter.
        let most = if compression == Compression::None {
            0
        } else {
            64
        };
        assert!(harmless <= most, "{harmless}");
    }
}

#[test]
fn what_is_larger_than_what_is_asked_for_at_once_is_read_in_pieces() {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new());
    let store = store_on(&disk).unwrap();
    let large = crate::parts::Part {
        bytes: (0..11_u32 << 20).map(|n| (n / 1000) as u8).collect(),
        ..parts()[0].clone()
    };
    let saving = Saving::begin(&store, &name("warm"), 4096, SaveOptions::default()).unwrap();
    saving
        .finish(Facts::default(), std::slice::from_ref(&large))
        .unwrap();
    let bucket = Bucket::default();
    let push = || push(&store, "warm", Arc::new(bucket.clone()));
    push().unwrap();
    let kept = on(&bucket).read(&name("there")).unwrap();
    assert!(kept.parts() == [large]);
    // Also where it is compared, to its last byte.
    assert!(push().unwrap().was_there);
    let mut state = bucket.objects()["there/state"].clone();
    *state.last_mut().unwrap() ^= 1;
    bucket.put("there/state", &state).unwrap();
    let error = push().unwrap_err();
    assert!(matches!(error, StoreError::Exists { .. }), "{error}");
    // One that did not come so far as to have its name.
    bucket.delete("there/snapshot.json").unwrap();
    let error = push().unwrap_err();
    assert!(matches!(error, StoreError::Claimed { .. }), "{error}");
}
