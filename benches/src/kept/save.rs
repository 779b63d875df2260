//! A save beside a guest that runs, against what it cannot be without: writing as many bytes to the disk, and
//! copying and hashing them. Each beside the same guest.
//!
//! | number | what it is |
//! |---|---|
//! | save | from the call until all is durable, into a store that is empty |
//! | raw write | as many bytes to one file, and `fdatasync` |
//! | copy, hash | all of memory copied out of the snapshot and hashed, by one thread |
//! | speed | what the guest writes in a second, as a share of what it does without a snapshot |
//! | pause | for a snapshot that is not saved, for the one that is, and for one beside a save |
//!
//! The speed is that beside a snapshot that lives and is not saved, beside the save, the raw write, copy and
//! hash.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use guest::abi::{PAGE_SIZE, Pattern};
use palimpsest::kept::store::{Machine, Store};
use palimpsest::kvm::Kvm;
use palimpsest::memory::Frames;
use palimpsest::saved::Saved;
use palimpsest::snapshot::Snapshot;
use palimpsest::vm::By;
use serde::{Deserialize, Serialize};

use super::store::{copy_and_hash, has_room, raw_write, save};
use super::{KeptError, content, host};
use crate::clones::check;
use crate::footprint;
use crate::summary::{Summary, Times, median};
use crate::technique::Kind;
use crate::vm::{BenchVm, GuestConfig, MeasuredSnapshot, VmError};

/// Where what a guest boots with, and its notes, have ended.
const FILLED_FROM: u64 = 16 << 20;
/// How long the guest is watched without a snapshot.
const QUIET: Duration = Duration::from_millis(500);
/// How long it is left alone after a snapshot, or another thing that is measured.
const REST: Duration = Duration::from_millis(300);

/// What a save costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SaveCost {
    /// Bytes of memory.
    pub memory: u64,
    /// vCPUs of the guest.
    pub vcpus: u64,
    /// Bytes of chunks that a save has written.
    pub bytes: u64,
    /// A save.
    pub save_us: Summary,
    /// A raw write.
    pub raw_write_us: Summary,
    /// To copy and hash.
    pub hash_us: Summary,
    /// Writes of the guest a second without a snapshot.
    pub ops_per_s: f64,
    /// Of these beside a snapshot that is not saved, medians.
    pub speed_snapshot: f64,
    /// Beside a save.
    pub speed_save: f64,
    /// Beside a raw write.
    pub speed_raw_write: f64,
    /// Beside copy and hash.
    pub speed_hash: f64,
    /// For a snapshot.
    pub pause_us: Summary,
    /// For a snapshot that is saved.
    pub save_pause_us: Summary,
    /// For a snapshot in the middle of a save.
    pub pause_meanwhile_us: Summary,
}

impl SaveCost {
    /// What a save cannot be faster than: the slower of the two, medians.
    pub fn floor_us(&self) -> f64 {
        self.raw_write_us.p50.max(self.hash_us.p50)
    }
}

/// Measures it over `rounds` saves.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    kvm: &Kvm,
    dir: &Path,
    config: &GuestConfig,
    rounds: u64,
    stop: &AtomicBool,
    step: &mut dyn FnMut(&str),
) -> Result<SaveCost, KeptError> {
    let memory = config.memory;
    has_room(dir, 2 * memory + (1 << 30))?;
    let available = footprint::available().map_err(host("tell how much memory there is"))?;
    // The guest, what it writes meanwhile, and files that are not on disk yet.
    let needed = 4 * memory + (1 << 30);
    if available < needed {
        return Err(VmError::NoMemory { needed, available }.into());
    }
    step("boot");
    let technique = Kind::Ours.start(memory).map_err(VmError::from)?;
    let ram = technique.ram();
    content::fill(1, FILLED_FROM, memory, |gpa, bytes| ram.write(gpa, bytes))
        .map_err(|error| VmError::Technique(crate::technique::TechniqueError::Memory(error)))?;
    let vm = BenchVm::boot(By::Kvm(kvm), technique, config)?;
    vm.wait("touching its memory", stop, |_, vcpu| Ok(vcpu.resident))?;
    let run = Run { vm: &vm, stop };

    let mut times: [Times; 6] = Default::default();
    let [saves, raw, hashes, pauses, save_pauses, pauses_meanwhile] = &mut times;
    let mut quiet = Vec::new();
    let mut speeds: [Vec<f64>; 4] = Default::default();
    let mut bytes = 0;
    for round in 0..rounds {
        check(stop)?;
        step(&format!("save {} of {rounds}", round + 1));
        let scratch = tempfile::tempdir_in(dir).map_err(host("make a directory"))?;
        let store = Store::open_or_create(&scratch.path().join("store"))?;
        run.rest();
        let before = run.speed(|| wait(QUIET))?.1;
        quiet.push(before);
        let snapshot = run.snapshot()?;
        save_pauses.record(snapshot.pause);
        let ((saved, took), speed) = run.speed(|| {
            save(
                &store,
                "a",
                &snapshot.it,
                run.frames(),
                None,
                Machine::default(),
            )
        })?;
        saves.record(took);
        bytes = saved.bytes_written;
        speeds[1].push(speed / before);

        step("writing, hashing");
        let (took, speed) = run.speed(|| raw_write(scratch.path(), memory))?;
        raw.record(took);
        speeds[2].push(speed / before);
        let (took, speed) = run.speed(|| copy_and_hash(&snapshot.it, run.frames(), memory))?;
        hashes.record(took);
        speeds[3].push(speed / before);
        drop(snapshot);

        step("a snapshot, not saved");
        run.rest();
        let snapshot = run.snapshot()?;
        pauses.record(snapshot.pause);
        // As long as the save was.
        let length = saves.summary().unwrap_or_default().p50;
        let length = Duration::from_secs_f64(length / 1e6);
        let (_, speed) = run.speed(|| wait(length))?;
        speeds[0].push(speed / before);
        drop(snapshot);

        step("a snapshot beside a save");
        run.rest();
        let snapshot = run.snapshot()?;
        thread::scope(|scope| {
            let saver = scope.spawn(|| {
                save(
                    &store,
                    "b",
                    &snapshot.it,
                    run.frames(),
                    None,
                    Machine::default(),
                )
            });
            thread::sleep(length / 4);
            let mut after = Ok(());
            while !saver.is_finished() && after.is_ok() {
                match run.snapshot() {
                    Ok(snapshot) if !saver.is_finished() => pauses_meanwhile.record(snapshot.pause),
                    Ok(_) => {}
                    Err(error) => after = Err(error),
                }
                thread::sleep(Duration::from_millis(100));
            }
            let saved = saver
                .join()
                .map_err(|_| KeptError::Wrong("a save has panicked".to_owned()))?;
            saved.and(after)
        })?;
    }
    vm.check()?;
    let [saves, raw, hashes, pauses, save_pauses, pauses_meanwhile] =
        times.map(|times| times.summary().unwrap_or_default());
    let [snapshot, saving, writing, hashing] =
        speeds.map(|speeds| median(speeds).unwrap_or_default());
    Ok(SaveCost {
        memory,
        vcpus: config.vcpus,
        bytes,
        save_us: saves,
        raw_write_us: raw,
        hash_us: hashes,
        ops_per_s: median(quiet).unwrap_or_default(),
        speed_snapshot: snapshot,
        speed_save: saving,
        speed_raw_write: writing,
        speed_hash: hashing,
        pause_us: pauses,
        save_pause_us: save_pauses,
        pause_meanwhile_us: pauses_meanwhile,
    })
}

/// The guest that is measured: one word a page in what is hot, and one write of many elsewhere.
pub fn guest(memory: u64, vcpus: u64) -> GuestConfig {
    GuestConfig {
        memory,
        vcpus,
        pattern: Pattern::Hot,
        sweep: (128 << 20).min(memory / 4),
        hot: (memory / 16).min(64 << 20),
        cold_every: 10_000,
        dma: false,
    }
}

fn wait(time: Duration) -> Result<(), KeptError> {
    thread::sleep(time);
    Ok(())
}

/// A snapshot as a store takes it. The frozen memory is the measured snapshot's.
struct Taken {
    it: Snapshot,
    pause: Duration,
}

struct Run<'a> {
    vm: &'a BenchVm,
    stop: &'a AtomicBool,
}

impl Run<'_> {
    fn frames(&self) -> &Frames {
        // The technique is one of ours.
        self.vm.technique().frames().expect("ours has frames")
    }

    fn rest(&self) {
        thread::sleep(REST);
    }

    fn snapshot(&self) -> Result<Taken, KeptError> {
        check(self.stop)?;
        let MeasuredSnapshot {
            memory,
            vcpus,
            pause,
            ..
        } = self.vm.snapshot()?;
        let frozen = memory.frozen().expect("a snapshot of ours is frozen");
        let vcpus = vcpus.into_iter().map(Saved::new).collect();
        Ok(Taken {
            it: Snapshot::new(Arc::clone(frozen), vcpus, Vec::new()),
            pause,
        })
    }

    /// What `job` says, and how many writes a second the guest did meanwhile.
    fn speed<T>(&self, job: impl FnOnce() -> Result<T, KeptError>) -> Result<(T, f64), KeptError> {
        let (began, before) = (Instant::now(), self.vm.ops()?);
        let done = job()?;
        let writes = (self.vm.ops()? - before) as f64;
        Ok((done, writes / began.elapsed().as_secs_f64()))
    }
}

const _: () = assert!(FILLED_FROM.is_multiple_of(PAGE_SIZE));
