//! Commands to a guest, and its answers.
//!
//! The guest asks for a command by an `out`, and its thread waits in the handler of that port until there is
//! one, puts it into the guest's mailbox and lets it go on. The next `out` is the answer. A vCPU that ends
//! instead answers with how it ended.
//!
//! ```text
//!   Line::ask ── Command ──> Ports::out ── mailbox, return from `out` ──> guest: one access
//!        <─── word, or Outcome ───┴── Ports::out, or `on_stop` <──── `out`, or its end
//! ```
//! When the [`Line`] is dropped, the handler stops the vCPU: it is what a machine would wait for otherwise.

use std::mem::offset_of;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use guest::abi::{MAIL_READ, MAIL_WRITE, Mail, PORT_MAIL, SAYS_DONE};

use super::words::{load, store};
use palimpsest::causes::chain;
use palimpsest::host::PhysMap;
use palimpsest::kvm::{
    CrashReason, CrashReport, OnStop, Outcome, PortAction, PortHandler, StopReason, VcpuRunError,
};
use palimpsest::mm::Pfn;

/// How long a guest may take for one access. It takes microseconds; the rest is the host being busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a CPU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The guest did what a guest must not do.
    #[error("the guest crashed: {reason}")]
    Crashed {
        /// What it did.
        reason: CrashReason,
        /// Where it was.
        report: Box<CrashReport>,
    },
    /// The VMM could not go on with the vCPU: a fault could not be resolved, most often.
    #[error("the vcpu failed")]
    Failed {
        /// Why.
        #[source]
        source: VcpuRunError,
    },
    /// The handler of the guest's port gave up.
    #[error("the vcpu was stopped")]
    Stopped {
        /// Why.
        #[source]
        source: StopReason,
    },
    /// The vCPU ended before.
    #[error("the vcpu has ended: {why}")]
    Ended {
        /// What it answered last.
        why: String,
    },
    /// No answer. Whatever the guest does now, nobody asks it again.
    #[error("the guest did not answer within {patience:?}")]
    Silent {
        /// How long it was waited for.
        patience: Duration,
    },
    /// The vCPU's thread is gone and left no word.
    #[error("the vcpu's thread is gone")]
    Gone,
}

impl From<Outcome> for CpuError {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Stopped(source) => Self::Stopped { source },
            Outcome::Crashed { reason, report } => Self::Crashed { reason, report },
            Outcome::Failed { error: source, .. } => Self::Failed { source },
        }
    }
}

/// One access to guest memory, at an address of its code.
#[derive(Clone, Copy, Debug)]
pub(super) enum Command {
    Read { address: u64 },
    Write { address: u64, value: u64 },
}

/// The word that was read or written, or how the vCPU ended.
type Answer = Result<u64, Outcome>;

/// The caller's end.
#[derive(Debug)]
pub(super) struct Line {
    commands: Sender<Command>,
    answers: Receiver<Answer>,
    patience: Duration,
    /// Why there will be no more answers.
    ended: Option<String>,
}

/// A new line: the caller's end, the guest's end, and what is to be called when the vCPU ends.
pub(super) fn connect(mailbox: Mailbox) -> (Line, Ports, OnStop) {
    let (commands, receiver) = mpsc::channel();
    let (sender, answers) = mpsc::channel();
    let last_word = sender.clone();
    let line = Line {
        commands,
        answers,
        patience: PATIENCE,
        ended: None,
    };
    let ports = Ports {
        mailbox,
        commands: Mutex::new(receiver),
        answers: sender,
    };
    let on_stop: OnStop = Box::new(move |_, outcome| {
        // Nobody listens any more: the actor is being dropped.
        let _ = last_word.send(Err(outcome));
    });
    (line, ports, on_stop)
}

impl Line {
    /// Has the guest do `command`, and waits until it has.
    pub(super) fn ask(&mut self, command: Command) -> Result<u64, CpuError> {
        if let Some(why) = &self.ended {
            return Err(CpuError::Ended { why: why.clone() });
        }
        // If nobody takes the command, the vCPU has ended: the answer is its last word then.
        let _ = self.commands.send(command);
        let patience = self.patience;
        let error = match self.answers.recv_timeout(patience) {
            Ok(Ok(word)) => return Ok(word),
            Ok(Err(outcome)) => CpuError::from(outcome),
            Err(RecvTimeoutError::Timeout) => CpuError::Silent { patience },
            Err(RecvTimeoutError::Disconnected) => CpuError::Gone,
        };
        self.ended = Some(chain(&error));
        Err(error)
    }
}

/// The guest's end, on its vCPU's thread.
#[derive(Debug)]
pub(super) struct Ports {
    mailbox: Mailbox,
    commands: Mutex<Receiver<Command>>,
    answers: Sender<Answer>,
}

impl PortHandler for Ports {
    fn out(&self, _vcpu: usize, port: u16, value: u32) -> PortAction {
        if port != PORT_MAIL {
            return PortAction::Unknown;
        }
        if value == SAYS_DONE {
            // Nobody listens any more if the line was dropped: the next line sees that.
            let _ = self.answers.send(Ok(self.mailbox.word()));
        }
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        match commands.recv() {
            Ok(command) => {
                self.mailbox.put(command);
                PortAction::Continue
            }
            Err(mpsc::RecvError) => PortAction::Stop(StopReason::Exit { status: 0 }),
        }
    }
}

/// A guest's [`Mail`], in a frame that only the guest and its line know.
///
/// Both access it by turns: the guest is in an `out` while the host does.
#[derive(Debug)]
pub(super) struct Mailbox {
    physmap: Arc<PhysMap>,
    frame: Pfn,
}

impl Mailbox {
    /// The mailbox in `frame`, which has memory.
    pub(super) fn new(physmap: Arc<PhysMap>, frame: Pfn) -> Self {
        Self { physmap, frame }
    }

    pub(super) fn frame(&self) -> Pfn {
        self.frame
    }

    fn put(&self, command: Command) {
        let (kind, at, word) = match command {
            Command::Read { address } => (MAIL_READ, address, 0),
            Command::Write { address, value } => (MAIL_WRITE, address, value),
        };
        let put = |offset, word| store(&self.physmap, self.frame, offset, word);
        put(offset_of!(Mail, command), kind);
        put(offset_of!(Mail, address), at);
        put(offset_of!(Mail, word), word);
    }

    fn word(&self) -> u64 {
        load(&self.physmap, self.frame, offset_of!(Mail, word))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use palimpsest::mm::FrameMemory;

    /// A line and its other end, with nobody there yet. No KVM is needed.
    fn line() -> (Line, Ports, OnStop) {
        let physmap = PhysMap::new(1).unwrap();
        physmap.commit(Pfn(0), 1).unwrap();
        connect(Mailbox::new(physmap, Pfn(0)))
    }

    fn ask(line: &mut Line) -> Result<u64, CpuError> {
        line.ask(Command::Read { address: 0 })
    }

    #[test]
    fn a_silent_guest_is_given_up() {
        let (mut line, ports, _on_stop) = line();
        line.patience = Duration::from_millis(20);
        let silent = ask(&mut line).unwrap_err().to_string();
        assert_eq!(silent, "the guest did not answer within 20ms");
        // What it says later is the answer to nothing.
        ports.answers.send(Ok(1)).unwrap();
        let ended = ask(&mut line).unwrap_err().to_string();
        assert_eq!(ended, format!("the vcpu has ended: {silent}"));
    }

    #[test]
    fn a_guest_that_is_gone_is_not_waited_for() {
        let (mut line, ports, on_stop) = line();
        drop((ports, on_stop));
        assert!(matches!(ask(&mut line), Err(CpuError::Gone)));
    }

    #[test]
    fn a_guest_that_ended_unasked_says_why_when_asked() {
        let (mut line, ports, on_stop) = line();
        drop(ports);
        on_stop(0, Outcome::Stopped(StopReason::Exit { status: 3 }));
        let error = chain(&ask(&mut line).unwrap_err());
        assert_eq!(error, "the vcpu was stopped: guest exited with status 3");
    }

    #[test]
    fn a_dropped_line_stops_its_vcpu() {
        let (line, ports, _on_stop) = line();
        drop(line);
        let action = ports.out(0, PORT_MAIL, SAYS_DONE);
        assert!(matches!(action, PortAction::Stop(_)));
        assert!(matches!(ports.out(0, 0x999, 0), PortAction::Unknown));
    }
}
