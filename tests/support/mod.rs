//! What the integration tests share: sessions that cannot hang a test, an observer that remembers, and
//! skipping where there is no KVM.
//!
//! With `TEST_ACCEL=user` in the environment sessions run without KVM, as threads of the test: the same tests
//! then say whether guests behave there as under KVM.
#![allow(dead_code, reason = "every test binary uses a part of it")]

pub(crate) mod program;

use std::io::Write;
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use guest::abi::Pattern;
use palimpsest::kvm::{Kvm, PlatformError};
use vmm::accel::Accel;
use vmm::policy::Policy;
use vmm::session::config::{Config, GuestSource, PageSize, RunLength};
use vmm::session::progress::{Observer, Progress};
use vmm::session::report::{Oracle, Report, Verdict, Violation};
use vmm::session::{self, RunError};

/// Longer than any run here takes on a machine that is busy: what is not over by then hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// What runs the vCPUs of sessions here.
pub(crate) fn accel() -> Accel {
    match std::env::var("TEST_ACCEL").as_deref() {
        Ok("user") => Accel::User,
        _ => Accel::Kvm,
    }
}

/// Whether the test must be skipped for want of KVM, which is said then. Where sessions run without, it is
/// not wanted.
///
/// # Panics
/// In CI, where a run without these tests would look like a good one, and if there is a KVM but it is of no
/// use.
pub(crate) fn no_kvm() -> bool {
    if accel() == Accel::User {
        return false;
    }
    match Kvm::open() {
        Ok(_) => false,
        Err(error @ (PlatformError::Missing | PlatformError::Permission)) => {
            let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
            assert!(!ci, "CI must have KVM: {error}");
            say("skipped: no /dev/kvm");
            true
        }
        Err(error) => panic!("{error}"),
    }
}

/// Says something although the test will pass: the test harness swallows what is merely printed.
pub(crate) fn say(text: &str) {
    let name = thread::current().name().unwrap_or("?").to_owned();
    // Whoever does not listen misses it.
    let _ = writeln!(std::io::stderr(), "{name}: {text}");
}

/// What a program has printed.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What it has said beside that.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A short run with something of everything in it: two vCPUs, two devices, registered buffers, restores.
pub(crate) fn config() -> Config {
    Config {
        guest: GuestSource::Payload,
        accel: accel(),
        // Those of the tests do no harm.
        trust_guest: true,
        memory: 32 << 20,
        vcpus: 2,
        length: RunLength::Snapshots(times(40)),
        snapshot_every: Duration::from_millis(5),
        keep: 4,
        restore_every: 10,
        dma_devices: 2,
        registered_buffers: 2,
        pattern: Pattern::Uniform,
        seed: 1,
        track_dirty: None,
        policy: Policy::Exclusive,
        page_size: PageSize::Huge,
        copy_ahead: true,
        dump_guest_memory: false,
        inject: None,
    }
}

/// Remembers all a session says.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    pub(crate) progress: Vec<Progress>,
    pub(crate) console: String,
    pub(crate) violations: Vec<Violation>,
    pub(crate) notes: Vec<String>,
}

impl Recorder {
    /// How far the session was when it last said.
    pub(crate) fn now(&self) -> &Progress {
        self.progress
            .last()
            .expect("a session says it at least once")
    }
}

impl Observer for Recorder {
    fn progress(&mut self, progress: &Progress) {
        self.progress.push(*progress);
    }

    fn console(&mut self, text: &str) {
        self.console.push_str(text);
    }

    fn violation(&mut self, violation: &Violation) {
        self.violations.push(violation.clone());
    }

    fn note(&mut self, text: &str) {
        self.notes.push(text.to_owned());
    }
}

/// Passes on what a session says, and stops it when that is enough.
struct Until<'a, F> {
    enough: F,
    stop: &'a AtomicBool,
    seen: Recorder,
}

impl<F: Fn(&Recorder) -> bool + Send> Observer for Until<'_, F> {
    fn progress(&mut self, progress: &Progress) {
        self.seen.progress(progress);
        if (self.enough)(&self.seen) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn console(&mut self, text: &str) {
        self.seen.console(text);
    }

    fn violation(&mut self, violation: &Violation) {
        self.seen.violation(violation);
    }

    fn note(&mut self, text: &str) {
        self.seen.note(text);
    }
}

/// A session that is over.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) report: Report,
    pub(crate) seen: Recorder,
}

impl Run {
    /// Fails the test unless all went well and every snapshot was checked.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        let report = &self.report;
        let violations = Vec::from_iter(self.seen.violations.iter().map(ToString::to_string));
        assert_eq!(violations.join("\n"), "", "{:?}", report.config);
        let told = &self.seen.console;
        assert_eq!(report.verdict, Verdict::Ok, "{told}{report:?}");
        assert_eq!(report.error, None);
        assert_eq!(report.violations.total(), 0);
        assert_eq!(report.snapshots.checked, report.snapshots.taken);
    }

    /// Fails the test unless the observer was told of every violation that the report counts.
    #[track_caller]
    pub(crate) fn assert_all_told(&self) {
        for oracle in Oracle::ALL {
            let told = self.seen.violations.iter().filter(|v| v.oracle == oracle);
            assert_eq!(
                told.count() as u64,
                self.report.violations.of(oracle),
                "{oracle}"
            );
        }
    }
}

/// Runs the payload as `config` says.
pub(crate) fn run(config: Config) -> Run {
    run_guest(config, guest::PAYLOAD).unwrap()
}

/// Runs the payload until what the session has said is `enough`, and stops it then as Ctrl-C does. For what a
/// guest or device does sooner or later, but not by a snapshot or a time that anyone could name.
pub(crate) fn run_until(
    config: Config,
    enough: impl Fn(&Recorder) -> bool + Send + 'static,
) -> Run {
    run_guest_until(config, guest::PAYLOAD, enough)
}

/// Runs `image` until what the session has said is `enough`.
pub(crate) fn run_guest_until(
    config: Config,
    image: impl Into<Vec<u8>>,
    enough: impl Fn(&Recorder) -> bool + Send + 'static,
) -> Run {
    let length = RunLength::Duration(10 * PATIENCE);
    watched(Config { length, ..config }, image.into(), enough).unwrap()
}

/// Runs `image` as `config` says.
pub(crate) fn run_guest(config: Config, image: impl Into<Vec<u8>>) -> Result<Run, RunError> {
    watched(config, image.into(), |_| false)
}

/// A session on a thread of its own, so that one that hangs fails the test instead of blocking it.
fn watched(
    config: Config,
    image: Vec<u8>,
    enough: impl Fn(&Recorder) -> bool + Send + 'static,
) -> Result<Run, RunError> {
    // Whoever is not the payload is not waited for to follow its formula.
    let guest = if image == guest::PAYLOAD {
        GuestSource::Payload
    } else {
        GuestSource::File("guest-of-this-test".into())
    };
    let config = Config { guest, ..config };
    // Guest addresses are there once in a process.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone =
        (config.accel == Accel::User).then(|| ALONE.lock().unwrap_or_else(PoisonError::into_inner));
    within(PATIENCE, move || {
        let stop = AtomicBool::new(false);
        let mut until = Until {
            enough,
            stop: &stop,
            seen: Recorder::default(),
        };
        let report = session::run(&config, image, &stop, &mut until)?;
        let seen = until.seen;
        Ok(Run { report, seen })
    })
}

/// How much longer everything may take here than on a machine of its own: what the environment says
/// (`TEST_SLOWNESS`), on a host that is emulated.
fn slowness() -> u32 {
    let said = std::env::var("TEST_SLOWNESS").ok();
    said.and_then(|said| said.parse().ok()).unwrap_or(1)
}

/// `count`, or a quarter of it where everything takes longer. What counts much of something is there to meet
/// what is rare, and does so on a machine of its own; on another it is about what is different there.
pub(crate) fn times(count: u64) -> u64 {
    if slowness() > 1 {
        count.div_ceil(4)
    } else {
        count
    }
}

/// What `work` returns, if it does within `time`, or as much longer as this host may take.
///
/// # Panics
/// If it does not, or panics.
#[track_caller]
pub(crate) fn within<R: Send + 'static>(
    time: Duration,
    work: impl FnOnce() -> R + Send + 'static,
) -> R {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::spawn(move || {
        // Nobody listens any more if this took too long.
        let _ = sender.send(work());
    });
    let time = time * slowness();
    match receiver.recv_timeout(time) {
        Ok(result) => {
            thread.join().unwrap();
            result
        }
        Err(RecvTimeoutError::Timeout) => panic!("not over after {time:?}: it hangs"),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("the thread sends before it ends"),
        },
    }
}
