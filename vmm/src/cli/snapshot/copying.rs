//! `vmm snapshot push` and `vmm snapshot pull`.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use palimpsest::kept::Progress;
use palimpsest::kept::store::{self, CHUNK_BYTES, Compression, CopyOptions, Saved};
use serde_json::json;

use super::args::{CopyArgs, PullArgs, PushArgs};
use super::looking::json;
use super::place::{Places, locate};
use super::transfer::Transfer;
use crate::cli::screen::Screen;
use crate::cli::units::{bytes, count, time};
use crate::cli::{Failure, interrupt, print};
use crate::session::report::Verdict;

/// What is being done, and what was.
struct Words {
    doing: &'static str,
    done: &'static str,
}

/// `vmm snapshot push`.
pub(super) fn push(args: &PushArgs, screen: &Screen) -> Result<Verdict, Failure> {
    let options = CopyOptions {
        compression: match args.zstd {
            0 => Compression::None,
            level => Compression::Zstd { level },
        },
        check: args.check,
        at_once: args.copy.at_once,
    };
    let words = Words {
        doing: "pushing",
        done: "pushed",
    };
    copy(&args.from, &args.to, &args.copy, options, &words, screen)
}

/// `vmm snapshot pull`.
pub(super) fn pull(args: &PullArgs, screen: &Screen) -> Result<Verdict, Failure> {
    let options = CopyOptions {
        compression: args
            .zstd
            .map_or(Compression::None, |level| Compression::Zstd { level }),
        check: false,
        at_once: args.copy.at_once,
    };
    let words = Words {
        doing: "pulling",
        done: "pulled",
    };
    copy(&args.from, &args.to, &args.copy, options, &words, screen)
}

fn copy(
    from: &Path,
    to: &Path,
    args: &CopyArgs,
    options: CopyOptions,
    words: &Words,
    screen: &Screen,
) -> Result<Verdict, Failure> {
    let (from, name) = locate(from)?;
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;
    // What is copied is not wanted here.
    let places = Places::new(&args.reach, stop.clone());
    let kept = places.store(&from)?.read(&name)?;
    let to = places.store_or_new(to)?;
    let name = args.name.as_ref().unwrap_or(&name);
    let began = Instant::now();
    let mut transfer = Transfer::default();
    let copied = store::copy(&kept, &to, name, options, &mut |copied| {
        let progress = Progress {
            done: copied.done * CHUNK_BYTES,
            bytes: copied.chunks * CHUNK_BYTES,
            elapsed: began.elapsed(),
            saved: Saved {
                written: copied.sent,
                bytes_written: copied.bytes_sent,
                ..Saved::default()
            },
        };
        transfer.tell(words.doing, &progress, screen);
        !stop.load(Ordering::Relaxed)
    });
    screen.clear_block();
    let copied = copied?;
    let place = to.path().display();
    let text = match args.json {
        true => json(&json!({
            "store": to.path(),
            "name": name,
            "hash": kept.hash(),
            "chunks": copied.chunks,
            "sent": copied.sent,
            "bytes_sent": copied.bytes_sent,
            "was_there": copied.was_there,
            "seconds": began.elapsed().as_secs_f64(),
        }))?,
        false => {
            let was_there = match copied.was_there {
                true => ", which had it already",
                false => "",
            };
            format!(
                "{:<11} {name} to {place}{was_there}\n{:<11} {} of {}, {} in {}; the others were there\n{:<11} {}\n",
                words.done,
                "chunks",
                count(copied.sent),
                count(copied.chunks),
                bytes(copied.bytes_sent),
                time(began.elapsed()),
                "hash",
                kept.hash()
            )
        }
    };
    print(&text).map_err(Failure::Print)?;
    Ok(Verdict::Ok)
}
