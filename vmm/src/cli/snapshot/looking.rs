//! Verbs that look at what is there.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use palimpsest::causes::chain;
use palimpsest::kept::Progress;
use palimpsest::kept::store::{self, CHUNK_BYTES, Store, StoreError};
use serde::Serialize;
use serde_json::json;

use super::args::{DiffArgs, InfoArgs, ListArgs, VerifyArgs};
use super::place::{Places, locate};
use super::transfer::Transfer;
use crate::cli::report_text::plural;
use crate::cli::screen::Screen;
use crate::cli::units::{bytes, count, time};
use crate::cli::{Failure, interrupt, print};
use crate::session::kept::obstacles;
use crate::session::report::Verdict;

/// As it is printed.
pub(super) fn json(value: &impl Serialize) -> Result<String, Failure> {
    let json = serde_json::to_string_pretty(value);
    Ok(json.map_err(|error| Failure::Print(io::Error::other(error)))? + "\n")
}

/// How long ago that was.
fn age(created_unix_s: u64) -> String {
    let created = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(created_unix_s));
    let age = created.and_then(|created| SystemTime::now().duration_since(created).ok());
    match age.map(|age| age.as_secs()) {
        None => "in the future".to_owned(),
        Some(seconds @ 0..120) => format!("{seconds} s ago"),
        Some(seconds @ 120..7200) => format!("{} min ago", seconds / 60),
        Some(seconds @ 7200..172_800) => format!("{} h ago", seconds / 3600),
        Some(seconds) => format!("{} days ago", seconds / 86_400),
    }
}

/// `vmm snapshot list`.
pub(super) fn list(args: &ListArgs) -> Result<Verdict, Failure> {
    let places = Places::new(&args.reach, Default::default());
    let store = places.store(&args.store)?;
    let entries = store::list(&store)?;
    let is_right = entries.iter().all(|entry| {
        entry
            .found
            .as_ref()
            .is_ok_and(|(_, usage)| usage.missing == 0)
    });
    let text = match args.json {
        true => json(&entries.iter().map(entry_json).collect::<Vec<_>>())?,
        false => entries.iter().fold(
            format!(
                "{:<24} {:>10} {:>10} {:>10}  {}\n",
                "name", "memory", "on disk", "its own", "saved"
            ),
            |text, entry| text + &entry_text(entry),
        ),
    };
    print(&text).map_err(Failure::Print)?;
    Ok(if is_right {
        Verdict::Ok
    } else {
        Verdict::Error
    })
}

fn entry_json(entry: &store::Entry) -> serde_json::Value {
    match &entry.found {
        Ok((manifest, usage)) => json!({
            "name": entry.name,
            "created_unix_s": manifest.created_unix_s,
            "parent": manifest.parent.as_ref().map(|parent| &parent.name),
            "memory_bytes": manifest.memory.bytes,
            "chunks": manifest.memory.chunks,
            "missing_chunks": usage.missing,
            "bytes": usage.bytes,
            "own_bytes": usage.own_bytes,
        }),
        Err(error) => json!({ "name": entry.name, "error": chain(error) }),
    }
}

fn entry_text(entry: &store::Entry) -> String {
    let name = &entry.name;
    match &entry.found {
        Ok((manifest, usage)) => {
            let mut text = format!(
                "{:<24} {:>10} {:>10} {:>10}  {}",
                name.as_str(),
                bytes(manifest.memory.bytes),
                bytes(usage.bytes),
                bytes(usage.own_bytes),
                age(manifest.created_unix_s)
            );
            if let Some(parent) = &manifest.parent {
                text.push_str(&format!(", after {}", parent.name));
            }
            if usage.missing > 0 {
                let missing = plural(usage.missing, "chunk").to_uppercase();
                text.push_str(&format!("; {missing} MISSING"));
            }
            text + "\n"
        }
        Err(error) => format!("{:<24} DAMAGED: {}\n", name.as_str(), chain(error)),
    }
}

/// `vmm snapshot info`.
pub(super) fn info(args: &InfoArgs) -> Result<Verdict, Failure> {
    let kept = Places::new(&args.reach, Default::default()).read(&args.path)?;
    let manifest = kept.manifest();
    let text = match args.json {
        true => json(manifest)?,
        false => {
            let machine = &manifest.machine;
            let parent = match &manifest.parent {
                Some(parent) => format!("{} ({})", parent.name, short(&parent.blake3.to_string())),
                None => "none".to_owned(),
            };
            let rows = [
                (
                    "snapshot",
                    format!("{} in {}", kept.name(), kept.store().path().display()),
                ),
                (
                    "saved",
                    format!(
                        "{}, by {}",
                        age(manifest.created_unix_s),
                        manifest.creator.escape_debug()
                    ),
                ),
                ("hash", kept.hash().to_string()),
                ("parent", parent),
                (
                    "memory",
                    format!(
                        "{}, {} of it in {} chunks",
                        bytes(manifest.memory.bytes),
                        bytes(kept.index().len() * CHUNK_BYTES),
                        count(manifest.memory.chunks)
                    ),
                ),
                (
                    "state",
                    format!(
                        "{} in {} parts",
                        bytes(manifest.state.bytes),
                        kept.parts().len()
                    ),
                ),
                (
                    "machine",
                    format!(
                        "{} vCPUs, {} devices, run by {} ({})",
                        machine.vcpus,
                        machine.devices,
                        machine.accelerator.escape_debug(),
                        machine.platform.escape_debug()
                    ),
                ),
                ("cpu", machine.cpu.brand.escape_debug().to_string()),
            ];
            rows.iter()
                .map(|(name, value)| format!("{name:<11} {value}\n"))
                .collect()
        }
    };
    print(&text).map_err(Failure::Print)?;
    Ok(Verdict::Ok)
}

fn short(hash: &str) -> &str {
    &hash[..hash.len().min(12)]
}

/// `vmm snapshot verify`.
pub(super) fn verify(args: &VerifyArgs, screen: &Screen) -> Result<Verdict, Failure> {
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;
    // What is in a cache says nothing of what is in the store.
    let places = Places::new(&args.reach, stop.clone());
    // A store has a marker, and a snapshot has none.
    let (store, names) = match places.store(&args.path) {
        Ok(store) => {
            let names = store.names()?;
            (store, names)
        }
        Err(Failure::Store(StoreError::NoStore { .. })) if !Store::is_marked(&args.path) => {
            let (path, name) = locate(&args.path)?;
            let store = places.store(&path)?;
            if !store.names()?.contains(&name) {
                let store = store.path().to_owned();
                return Err(StoreError::NoSnapshot { store, name }.into());
            }
            (store, vec![name])
        }
        Err(failure) => return Err(failure),
    };
    let (began, mut right) = (Instant::now(), HashSet::new());
    let (mut wrong, mut snapshots, mut text) = (0, Vec::new(), String::new());
    for name in &names {
        let mut watch = watch_chunks("verifying", began, &stop, screen);
        let verified = store::verify(&store, name, &mut right, &mut watch);
        screen.clear_block();
        let verified = verified?;
        wrong += verified.wrong.len();
        match verified.wrong.is_empty() {
            true => text.push_str(&format!(
                "ok       {name}: {} chunks, {} read\n",
                count(verified.chunks),
                bytes(verified.bytes)
            )),
            false => text.push_str(&format!("DAMAGED  {name}\n")),
        }
        for error in &verified.wrong {
            text.push_str(&format!("         {}\n", chain(error)));
        }
        // What is whole may still be nothing that runs.
        let notes = match verified.wrong.is_empty() {
            true => obstacles(store.read(name)?),
            false => Vec::new(),
        };
        for note in &notes {
            text.push_str(&format!("         note: {note}\n"));
        }
        snapshots.push(json!({
            "name": name,
            "chunks": verified.chunks,
            "bytes_read": verified.bytes,
            "wrong": verified.wrong.iter().map(|error| chain(error)).collect::<Vec<_>>(),
            "notes": notes,
        }));
    }
    let text = match args.json {
        true => json(&snapshots)?,
        false => {
            text + &format!(
                "\n{} in {}, {wrong} wrong\n",
                plural(names.len() as u64, "snapshot"),
                time(began.elapsed())
            )
        }
    };
    print(&text).map_err(Failure::Print)?;
    Ok(if wrong == 0 {
        Verdict::Ok
    } else {
        Verdict::Error
    })
}

/// `vmm snapshot diff`.
pub(super) fn diff(args: &DiffArgs, screen: &Screen) -> Result<Verdict, Failure> {
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;
    let places = Places::new(&args.reach, stop.clone()).with_cache(&args.cache);
    let [one, other] = [places.read(&args.one)?, places.read(&args.other)?];
    let mut watch = watch_chunks("comparing", Instant::now(), &stop, screen);
    let found = store::diff(&one, &other, &mut watch);
    screen.clear_block();
    places.tell_trouble(screen);
    let found = found?;
    let text = match args.json {
        true => json(&json!({
            "same_regions": found.same,
            "regions": found.regions,
            "pages": found.pages,
            "parts": found.parts,
        }))?,
        false => {
            let parts = match found.parts.is_empty() {
                true => "none".to_owned(),
                false => found.parts.join(", "),
            };
            format!(
                "regions     {} differ, {} are the same\npages       {} differ, {}\nparts       {parts}\n",
                count(found.regions.len() as u64),
                count(found.same),
                count(found.pages),
                bytes(found.pages * 4096)
            )
        }
    };
    print(&text).map_err(Failure::Print)?;
    Ok(Verdict::Ok)
}

/// Tells how many chunks are done, of how many, since `began`; and says whether to go on.
fn watch_chunks<'a>(
    what: &'a str,
    began: Instant,
    stop: &'a AtomicBool,
    screen: &'a Screen,
) -> impl FnMut(u64, u64) -> bool + 'a {
    let mut transfer = Transfer::default();
    move |done, all| {
        let progress = Progress {
            done: done * CHUNK_BYTES,
            bytes: all * CHUNK_BYTES,
            elapsed: began.elapsed(),
            ..Progress::default()
        };
        transfer.tell(what, &progress, screen);
        !stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_told_in_the_unit_that_fits() {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        for (ago, told) in [
            (130, "2 min ago"),
            (7300, "2 h ago"),
            (3 * 86_400, "3 days ago"),
        ] {
            assert_eq!(age(now - ago), told);
        }
        assert_eq!(age(now + 1000), "in the future");
        assert_eq!(age(u64::MAX), "in the future");
    }
}
