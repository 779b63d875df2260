//! `vmm snapshot prune`.

use palimpsest::kept::store;
use serde_json::json;

use super::args::PruneArgs;
use super::looking::json;
use super::place::Places;
use crate::cli::screen::Screen;
use crate::cli::units::{bytes, count};
use crate::cli::{Failure, print};
use crate::session::report::Verdict;

pub(super) fn run(args: &PruneArgs, _screen: &Screen) -> Result<Verdict, Failure> {
    // It ends by itself soon after it is called off: what is under way then is one step.
    let places = Places::new(&args.reach, Default::default());
    let store = places.store(&args.store)?;
    let pruned = store::prune(&store, &args.drop, args.wait)?;
    let text = match args.json {
        true => json(&json!({
            "dropped": pruned.dropped,
            "chunks": pruned.chunks,
            "bytes": pruned.bytes,
            "leftovers": pruned.leftovers,
            "kept_chunks": pruned.kept,
        }))?,
        false => {
            let dropped: String = pruned
                .dropped
                .iter()
                .map(|name| format!("dropped     {name}\n"))
                .collect();
            if store.is_remote() {
                return print(&format!(
                    "{dropped}kept        all chunks, as in any store by URL\n"
                ))
                .map_err(Failure::Print)
                .map(|()| Verdict::Ok);
            }
            format!(
                "{dropped}collected   {} chunks and {} unfinished saves, {}\nkept        {} chunks\n",
                count(pruned.chunks),
                count(pruned.leftovers),
                bytes(pruned.bytes),
                count(pruned.kept)
            )
        }
    };
    print(&text).map_err(Failure::Print)?;
    Ok(Verdict::Ok)
}
