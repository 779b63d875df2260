//! Reading all of a snapshot, against hashing as much: the same bytes in one file, and with `b3sum` where it
//! is.

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use guest::abi::REGION_SIZE;
use palimpsest::kept::store::{self, Facts, SaveOptions, Saving, Store};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::store::{has_room, name, read_and_hash};
use super::{KeptError, content, host};
use crate::clones::check;
use crate::summary::{Summary, Times};

/// What verifying costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VerifyCost {
    /// Bytes that are read and hashed.
    pub bytes: u64,
    /// To verify a snapshot of as many.
    pub verify_us: Summary,
    /// CPU time of that, of all threads.
    pub verify_cpu_us: Summary,
    /// To read and hash one file with as many, one thread.
    pub file_us: Summary,
    /// `b3sum` of that file, one thread, its start among it. Nothing: there is none here.
    pub b3sum_us: Option<Summary>,
}

impl VerifyCost {
    /// Bytes that verifying does in a second of one core.
    pub fn a_core(&self) -> f64 {
        self.bytes as f64 / self.verify_cpu_us.p50 * 1e6
    }
}

/// Measures it over `rounds` of each.
///
/// # Errors
/// If something cannot be made, or `stop` is set.
pub fn measure(
    dir: &Path,
    bytes: u64,
    rounds: u64,
    stop: &AtomicBool,
) -> Result<VerifyCost, KeptError> {
    has_room(dir, 2 * bytes + (1 << 30))?;
    let scratch = tempfile::tempdir_in(dir).map_err(host("make a directory"))?;
    let store = Store::open_or_create(&scratch.path().join("store"))?;
    let mut saving = Saving::begin(&store, &name("a"), bytes, SaveOptions::default())?;
    let path = scratch.path().join("memory");
    let file = std::fs::File::create_new(&path).map_err(host("make a file"))?;
    content::fill(1, 0, bytes, |gpa, content| {
        check(stop)?;
        saving.region(gpa / REGION_SIZE, content)?;
        let written = std::os::unix::fs::FileExt::write_all_at(&file, content, gpa);
        written.map_err(host("write a file"))
    })?;
    saving.finish(Facts::default(), &[])?;
    file.sync_data().map_err(host("make a file durable"))?;
    let mut file = std::fs::File::open(&path).map_err(host("open a file"))?;
    let has_b3sum = b3sum(Path::new("/dev/null")).is_some();
    let mut times: [Times; 4] = Default::default();
    let [verifies, cpus, files, b3sums] = &mut times;
    for _ in 0..rounds {
        check(stop)?;
        let (began, cpu) = (Instant::now(), cpu_time());
        let verified = store::verify(&store, &name("a"), &mut HashSet::new(), &mut |_, _| true)?;
        verifies.record(began.elapsed());
        cpus.record(cpu_time() - cpu);
        if !verified.wrong.is_empty() || verified.bytes != bytes {
            return Err(KeptError::Wrong(
                "a snapshot that was just saved is damaged".to_owned(),
            ));
        }
        files.record(read_and_hash(&mut file, bytes)?);
        if let Some(time) = has_b3sum.then(|| b3sum(&path)).flatten() {
            b3sums.record(time);
        }
    }
    let b3sum_us = b3sums.summary();
    let [verify_us, verify_cpu_us, file_us, _] =
        times.map(|times| times.summary().unwrap_or_default());
    Ok(VerifyCost {
        bytes,
        verify_us,
        verify_cpu_us,
        file_us,
        b3sum_us,
    })
}

/// CPU time of all threads of this process.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// How long `b3sum` takes for a file, with one thread. Nothing if there is none that does it.
fn b3sum(path: &Path) -> Option<Duration> {
    let began = Instant::now();
    let mut command = Command::new("b3sum");
    command.args(["--num-threads", "1"]).arg(path);
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status
        .is_ok_and(|status| status.success())
        .then(|| began.elapsed())
}
