//! The guest's ports, and what becomes of what it writes to them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use guest::abi::{
    self, Failure, MAX_TEXT, PORT_CONSOLE, PORT_DOORBELL_EVENT, PORT_DOORBELL_EXIT, PORT_EXIT,
    PORT_FAILURE, PORT_PANIC,
};

use crate::dma::DeviceSet;
use palimpsest::host::{Ram, RamError};
use palimpsest::kvm::{Outcome, PortAction, PortHandler, StopReason};

/// Lines of the guest that wait to be printed, at most; what it says beyond that is lost, and counted.
const MOST_WAITING: usize = 4096;
/// The same for failed checks. So many need no more.
const MOST_FAILURES: usize = 1 << 16;

/// Something a vCPU's thread has to tell.
#[derive(Debug)]
pub(super) enum Event {
    /// The guest printed a line.
    Console(String),
    /// A check of the guest did not hold.
    Failure(Failure),
    /// A check of the guest did not hold, and what it was cannot be read, for this reason.
    UnreadableFailure(String),
    /// A vCPU has ended.
    Ended(usize, Outcome),
}

/// The sending end, for vCPU threads: never blocks, so that a vCPU can always be paused.
#[derive(Clone, Debug)]
pub(super) struct Events {
    sender: Sender<Event>,
    waiting: Arc<AtomicUsize>,
    lost: Arc<AtomicUsize>,
}

/// The receiving end.
#[derive(Debug)]
pub(super) struct Inbox {
    receiver: Receiver<Event>,
    waiting: Arc<AtomicUsize>,
    lost: Arc<AtomicUsize>,
}

pub(super) fn events() -> (Events, Inbox) {
    let (sender, receiver) = mpsc::channel();
    let (waiting, lost) = (Arc::default(), Arc::default());
    let events = Events {
        sender,
        waiting: Arc::clone(&waiting),
        lost: Arc::clone(&lost),
    };
    let inbox = Inbox {
        receiver,
        waiting,
        lost,
    };
    (events, inbox)
}

impl Events {
    pub(super) fn send(&self, event: Event) {
        let most = match event {
            Event::Console(_) => MOST_WAITING,
            Event::Failure(_) | Event::UnreadableFailure(_) => MOST_FAILURES,
            Event::Ended(..) => usize::MAX,
        };
        if self.waiting.load(Ordering::Relaxed) >= most {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // Nobody listens any more: the run is over.
        let _ = self.sender.send(event);
    }
}

impl Inbox {
    pub(super) fn wait(&self, time: Duration) -> Option<Event> {
        let event = self.receiver.recv_timeout(time).ok()?;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Some(event)
    }

    /// Events lost since the last call.
    pub(super) fn take_lost(&self) -> usize {
        self.lost.swap(0, Ordering::Relaxed)
    }
}

/// Listens to a guest's ports.
pub(super) struct Ports {
    pub(super) ram: Ram,
    pub(super) devices: Arc<DeviceSet>,
    pub(super) events: Events,
}

impl PortHandler for Ports {
    fn out(&self, _vcpu: usize, port: u16, value: u32) -> PortAction {
        let gpa = u64::from(value);
        match port {
            PORT_CONSOLE => self.events.send(Event::Console(self.text(gpa))),
            PORT_EXIT => return PortAction::Stop(StopReason::Exit { status: value }),
            PORT_PANIC => {
                let message = self.text(gpa);
                return PortAction::Stop(StopReason::Panic { message });
            }
            PORT_FAILURE => match self.failure(gpa) {
                Ok(failure) => self.events.send(Event::Failure(failure)),
                Err(error) => {
                    let why = format!("at gpa {gpa:#x}: {error}");
                    self.events.send(Event::UnreadableFailure(why));
                }
            },
            _ => return self.doorbell(port),
        }
        PortAction::Continue
    }
}

impl Ports {
    fn doorbell(&self, port: u16) -> PortAction {
        let device_of = |first: u16| {
            let device = port.checked_sub(first)?;
            (u64::from(device) < abi::MAX_DEVICES).then_some(usize::from(device))
        };
        if let Some(device) = device_of(PORT_DOORBELL_EXIT) {
            match self.devices.devices().get(device) {
                Some(device) => device.ring_from_vcpu(),
                None => self.complain(&format!("rang device {device}, which does not exist")),
            }
        } else if let Some(device) = device_of(PORT_DOORBELL_EVENT) {
            // An existing device's ioeventfd never comes here.
            self.complain(&format!("rang device {device}, which does not exist"));
        } else {
            return PortAction::Unknown;
        }
        PortAction::Continue
    }

    fn complain(&self, what: &str) {
        self.events.send(Event::Console(format!("[vmm: {what}]")));
    }

    /// The [`abi::Text`] at `gpa`, or a note that it can't be read.
    fn text(&self, gpa: u64) -> String {
        let read = || -> Result<String, RamError> {
            let [at, len] = self.words(gpa)?;
            let mut bytes = vec![0; len.min(MAX_TEXT) as usize];
            self.ram.read(at, &mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_else(|error| format!("[vmm: text at {gpa:#x}: {error}]"))
    }

    fn failure(&self, gpa: u64) -> Result<Failure, RamError> {
        let [kind, vcpu, op, at, expected, found, device, seq] = self.words(gpa)?;
        Ok(Failure {
            kind,
            vcpu,
            op,
            gpa: at,
            expected,
            found,
            device,
            seq,
        })
    }

    /// The `N` words at `gpa`, in the order of the ABI's fields.
    fn words<const N: usize>(&self, gpa: u64) -> Result<[u64; N], RamError> {
        let mut bytes = vec![0; N * 8];
        self.ram.read(gpa, &mut bytes)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
        }
        Ok(words)
    }
}
