//! Where a guest says that it runs, and waits until it is let on.
//!
//! The first instruction of a clone is an `out`: when it came here it has run. It is held here, on its own
//! thread, and takes no CPU time. A vCPU that is held cannot be paused.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use palimpsest::kvm::{PortAction, PortHandler, StopReason};

use super::MeasureError;

/// How long a guest may take to come here.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// The gate of one vCPU.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How often the guest has come here, and when it last did.
    arrivals: u64,
    arrived: Option<Instant>,
    /// How often it may go on, and when it last did.
    passes: u64,
    passed: Option<Instant>,
    /// Why its vCPU has ended.
    ended: Option<String>,
    is_over: bool,
}

impl PortHandler for Gate {
    fn out(&self, _vcpu: usize, _port: u16, _value: u32) -> PortAction {
        match self.arrive() {
            true => PortAction::Continue,
            false => PortAction::Stop(StopReason::Exit { status: 0 }),
        }
    }
}

impl Gate {
    /// One that nobody has come to.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Comes here, on the guest's thread, and waits. Whether it is to go on; not, when all is over.
    pub fn arrive(&self) -> bool {
        let now = Instant::now();
        let mut state = self.lock();
        state.arrivals += 1;
        state.arrived = Some(now);
        self.changed.notify_all();
        let held = |state: &mut State| state.passes == 0 && !state.is_over;
        let waited = self.changed.wait_while(state, held);
        state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.is_over {
            return false;
        }
        state.passes -= 1;
        state.passed = Some(Instant::now());
        true
    }

    /// Its vCPU has ended.
    pub fn has_ended(&self, why: String) {
        self.lock().ended = Some(why);
        self.changed.notify_all();
    }

    /// Fails if its vCPU has ended.
    ///
    /// # Errors
    /// That says why.
    pub fn check(&self) -> Result<(), MeasureError> {
        match &self.lock().ended {
            Some(why) => Err(MeasureError::Ended(why.clone())),
            None => Ok(()),
        }
    }

    /// Waits until the guest has come here `times` in all. When it last did.
    ///
    /// # Errors
    /// If its vCPU has ended, or it takes longer than [`PATIENCE`].
    pub fn wait(&self, times: u64) -> Result<Instant, MeasureError> {
        let awaits = |state: &mut State| state.arrivals < times && state.ended.is_none();
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, awaits);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match (&state.ended, state.arrived) {
            (Some(why), _) => Err(MeasureError::Ended(why.clone())),
            (None, Some(arrived)) if state.arrivals >= times => Ok(arrived),
            _ => Err(MeasureError::Silent),
        }
    }

    /// Lets the guest go on.
    pub fn let_on(&self) {
        self.lock().passes += 1;
        self.changed.notify_all();
    }

    /// Lets the guest, which must be held here, go on, and waits until it is here again. How long that took.
    ///
    /// # Errors
    /// As [`Gate::wait`].
    pub fn pass(&self) -> Result<Duration, MeasureError> {
        let arrivals = self.lock().arrivals;
        self.let_on();
        let arrived = self.wait(arrivals + 1)?;
        let passed = self.lock().passed.unwrap_or(arrived);
        Ok(arrived.saturating_duration_since(passed))
    }

    /// Ends the guest when it is here, or comes.
    pub fn end(&self) {
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
