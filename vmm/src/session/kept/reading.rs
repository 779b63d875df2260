//! Whether this program can make something of a snapshot, found out without memory and without a VM.

use guest::abi::Layout;
use palimpsest::causes::chain;
use palimpsest::kept;
use palimpsest::kept::store::Kept;
use palimpsest::kvm::VcpuState;
use palimpsest::saved::Saved;

use super::facts;
use super::source::Source;
use crate::accel::{self, Opened};
use crate::dma::DeviceState;
use crate::session::config::Config;

/// What keeps this program, or this host, from running a snapshot that was read whole, in words: none if nothing does
/// that can be seen before it is tried.
pub fn obstacles(kept: Kept) -> Vec<String> {
    let source = match Source::of(kept) {
        Ok(source) => source,
        Err(error) => return vec![chain(&error)],
    };
    let mut obstacles = unreadable(&source);
    let machine = &source.kept.manifest().machine;
    let checked = match accel::open(source.config().accel) {
        Ok(Opened { accelerator, .. }) => {
            kept::check(&accelerator, machine, 0).map_err(|error| chain(&error))
        }
        Err(error) => Err(chain(&error)),
    };
    if let Err(why) = checked {
        obstacles.push(format!("it cannot run here: {why}"));
    }
    obstacles
}

/// What of it makes no sense to this program.
fn unreadable(source: &Source) -> Vec<String> {
    let (kept, config): (_, Config) = (&source.kept, source.config());
    let mut wrong = Vec::new();
    for part in kept.parts() {
        let saved = Saved::stored(part.version, part.bytes.clone());
        let state = match part.name.split_once('/') {
            Some(("vcpu" | "boot", _)) => VcpuState::of_saved(&saved)
                .map(drop)
                .map_err(|error| chain(&error)),
            Some(("device", _)) => DeviceState::of_saved(&saved)
                .map(drop)
                .map_err(|error| chain(&error)),
            _ => Ok(()),
        };
        if let Err(why) = state {
            wrong.push(format!("its part `{}` makes no sense: {why}", part.name));
        }
    }
    let machine = &kept.manifest().machine;
    let missing = |what: &str, count: u32| {
        let names = (0..count).map(|number| format!("{what}/{number}"));
        names
            .filter(|name| kept.part(name).is_none())
            .collect::<Vec<_>>()
    };
    // Counts are those of the configuration, which was compared with them, and more parts cannot be.
    let mut names = missing("vcpu", machine.vcpus);
    names.extend(missing("device", machine.devices));
    if source.facts.follows_formula {
        names.extend(missing("boot", machine.vcpus));
    }
    wrong.extend(names.iter().map(|name| format!("it has no part `{name}`")));
    if facts::reference(kept).is_none() {
        wrong.push("it does not say which pages its guest never writes".to_owned());
    }
    let image_end = source.facts.image_end;
    let layout = Layout::new(
        config.memory,
        image_end,
        config.vcpus,
        config.dma_devices,
        config.registered_buffers,
    );
    if layout.is_none() {
        wrong.push(format!(
            "it says that its program ends at {image_end:#x}, where no memory of its size is laid out so"
        ));
    }
    wrong
}
