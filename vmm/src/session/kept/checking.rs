//! A snapshot loaded and looked at, and no more: no vCPU runs.

use std::sync::Arc;
use std::time::Instant;

use palimpsest::host::Limits;
use palimpsest::kept::Progress;
use palimpsest::kept::store::{CHUNK_BYTES, StoreError};
use palimpsest::mm::Toucher;
use palimpsest::vm::Accelerator;
use serde::Serialize;

use super::loading::{LoadError, Loaded, Purpose, load};
use super::source::Source;
use crate::accel::{self, Opened};
use crate::check::{Examiner, Look, Violation};
use crate::session::RunError;
use crate::session::config::Config;
use crate::session::need::MemoryPlan;
use crate::session::ports::events;
use crate::session::report::LoadCounts;

/// What was found of a snapshot that was loaded.
#[derive(Debug, Serialize)]
pub struct CheckedKept {
    /// What was loaded.
    pub loaded: LoadCounts,
    /// Whether its guest follows the formula, by which its memory is checked.
    pub follows_formula: bool,
    /// Pages that were compared with what they must hold.
    pub checked_pages: u64,
    /// What is not as it was, and does not keep it from running on here.
    pub notes: Vec<String>,
    /// What is wrong, in words.
    pub violations: Vec<String>,
    /// The same.
    #[serde(skip)]
    pub found: Vec<Violation>,
}

/// Loads `source` into a VM as `config` says, which is put together and does not run, and has the oracles look at it.
///
/// # Errors
/// If it cannot be loaded here.
pub fn check(
    config: &Config,
    source: &Source,
    watch: &mut dyn FnMut(&Progress) -> bool,
) -> Result<CheckedKept, RunError> {
    let Opened { accelerator, .. } = accel::open(config.accel)?;
    let limits = Limits::detect().map_err(RunError::Limits)?;
    let plan = MemoryPlan::to_look(config, &limits)?;
    let (sender, _inbox) = events();
    let name = source.name().to_string();
    let loaded = load(
        &accelerator,
        config,
        source,
        plan,
        sender,
        Purpose::Look,
        watch,
    )?;
    bring_all(source, &loaded, watch)?;
    let vm = &loaded.vm;
    let mut notes = loaded.notes;
    match &accelerator {
        // As when it is started.
        Accelerator::Kvm(kvm) => {
            let tried = kvm.try_states(loaded.snapshot.vcpus());
            tried.map_err(|source| LoadError::States { name, source })?;
        }
        Accelerator::User(_) if !config.trust_guest => {
            notes.push("to run it here takes --trust-guest, since nothing isolates it".to_owned());
        }
        Accelerator::User(_) => {}
    }
    let mut examiner = Examiner::new(
        config.seed,
        config.pattern,
        vm.layout,
        Arc::clone(vm.frames().physmap()),
        Arc::clone(vm.frames().pool()),
    );
    let follows_formula = loaded.boot.is_some();
    let look = Look {
        boot: loaded.boot.map(Arc::new),
        ..Look::default()
    };
    let mut findings = examiner.first_look(&loaded.snapshot, &look);
    let more = examiner.last_look(&loaded.snapshot, None);
    findings.violations.extend(more.violations);
    Ok(CheckedKept {
        loaded: loaded.counts,
        follows_formula,
        checked_pages: findings.pages,
        notes,
        violations: findings
            .violations
            .iter()
            .map(Violation::to_string)
            .collect(),
        found: findings.violations,
    })
}

/// Has all of its memory read. No vCPU runs that could want it.
fn bring_all(
    source: &Source,
    loaded: &Loaded,
    watch: &mut dyn FnMut(&Progress) -> bool,
) -> Result<(), LoadError> {
    let name = || source.name().to_string();
    let began = Instant::now();
    let regions = loaded.snapshot.memory().backed_regions();
    let bytes = regions.len() as u64 * CHUNK_BYTES;
    for (done, region) in (0..).zip(regions.iter()) {
        let progress = Progress {
            done: done * CHUNK_BYTES,
            bytes,
            elapsed: began.elapsed(),
            ..Progress::default()
        };
        if !watch(&progress) {
            return Err(LoadError::Load {
                name: name(),
                source: StoreError::CalledOff.into(),
            });
        }
        let brought = regions.bring(region, Toucher::Reader);
        brought.map_err(|source| LoadError::Bring {
            name: name(),
            source,
        })?;
    }
    Ok(())
}
