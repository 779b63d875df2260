//! The controller's side of a process: commands, answers, and its end.
#![expect(unsafe_code, reason = "makes a process that is no program")]

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::super::performer::{NotDone, Page, Who};
use super::actor::{self, ActorCommand, Duplicate, Kit, Message, Reply};

/// How long an answer may take. Nothing that is asked for takes a thousandth of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Both ends of a channel: the controller's, and the actor's.
pub(super) fn channel() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(PATIENCE))?;
    ours.set_write_timeout(Some(PATIENCE))?;
    Ok((ours, theirs.into()))
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActorError {
    /// The system call it stands for failed.
    #[error(transparent)]
    Call(io::Error),
    /// There is no process any more.
    #[error("{who:?} {how}")]
    Gone { who: Who, how: String },
}

impl From<ActorError> for NotDone {
    fn from(error: ActorError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// How a process ends that was told to.
const ENDED_WELL: &str = "has ended";

/// A process. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Process {
    who: Who,
    child: Child,
    channel: UnixStream,
}

impl Process {
    /// P: a copy of this process that does nothing but obey.
    pub(super) fn first(channel: UnixStream, kit: &Kit) -> io::Result<Self> {
        // SAFETY: `live` keeps to the rules.
        let child = unsafe { Child::living(|| actor::live(kit)) }?;
        Ok(Self {
            who: Who::P,
            child,
            channel,
        })
    }

    /// `who`: a child that another actor has made, for this process.
    pub(super) fn child(who: Who, pid: u64, channel: UnixStream) -> io::Result<Self> {
        Ok(Self {
            who,
            child: Child::known(pid)?,
            channel,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Opens a file of its directory in `/proc`.
    pub(super) fn open(&self, name: &str, options: &fs::OpenOptions) -> io::Result<fs::File> {
        options.open(format!("/proc/{}/{name}", self.pid()))
    }

    /// Has it do `command`.
    pub(super) fn ask(
        &mut self,
        command: ActorCommand,
        page: Page,
        value: u64,
    ) -> Result<u64, ActorError> {
        if let Some(how) = &self.child.ended {
            return Err(self.gone(how.clone()));
        }
        match self.exchange([command as u64, page, value]) {
            Ok([0, value]) => Ok(value),
            Ok([errno, _]) => Err(ActorError::Call(io::Error::from_raw_os_error(
                i32::try_from(errno).unwrap_or(i32::MAX),
            ))),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                self.child.kill();
                Err(self.gone(format!("did not answer for {PATIENCE:?} and was killed")))
            }
            // The channel ends with the process.
            Err(_) => {
                let how = self.child.wait();
                Err(self.gone(how))
            }
        }
    }

    /// Has it end, and waits for that: its memory is gone when this returns.
    pub(super) fn end(mut self) -> Result<(), ActorError> {
        match self.ask(ActorCommand::Exit, 0, 0) {
            Err(ActorError::Gone { how, .. }) if how == ENDED_WELL => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(self.gone("did not end when told to".to_owned())),
        }
    }

    /// Closes the channel, as if the controller were dead, and waits.
    #[cfg(test)]
    pub(super) fn abandon(&mut self) -> String {
        self.channel
            .shutdown(std::net::Shutdown::Both)
            .expect("a socket can be shut down");
        self.child.wait()
    }

    fn gone(&self, how: String) -> ActorError {
        ActorError::Gone { who: self.who, how }
    }

    fn exchange(&mut self, message: Message) -> io::Result<Reply> {
        self.channel
            .write_all(message.map(u64::to_ne_bytes).as_flattened())?;
        let mut reply = [[0; size_of::<u64>()]; 2];
        self.channel.read_exact(reply.as_flattened_mut())?;
        Ok(reply.map(u64::from_ne_bytes))
    }
}

/// A child process of this one that was not waited for yet. Dropping it kills it, and waits.
#[derive(Debug)]
pub(super) struct Child {
    pid: Pid,
    /// How it ended, once it was waited for. Until then its id is nobody else's.
    ended: Option<String>,
}

impl Child {
    /// A copy of this process that does `life` and nothing else.
    ///
    /// # Safety
    /// `life` must keep to what [`actor`] says about code in such a copy.
    pub(super) unsafe fn living(life: impl FnOnce()) -> io::Result<Self> {
        let before = block_signals()?;
        // SAFETY: the copy does `life`, which the caller vouches for, and vanishes.
        let side = match unsafe { actor::duplicate(0) } {
            Ok(Duplicate::Copy) => {
                life();
                actor::vanish()
            }
            Ok(Duplicate::Original(pid)) => Ok(pid),
            Err(error) => Err(error),
        };
        set_signals(&before)?;
        Self::known(side?)
    }

    fn known(pid: u64) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        Ok(Self {
            pid: pid.ok_or(Errno::SRCH)?,
            ended: None,
        })
    }

    /// Waits for its end, and helps if that takes too long. Says how it ended.
    pub(super) fn wait(&mut self) -> String {
        if !self.try_wait() {
            self.kill();
        }
        self.ended
            .clone()
            .unwrap_or_else(|| "can't be killed".to_owned())
    }

    fn kill(&mut self) {
        if self.ended.is_none() {
            // It was not waited for, so the id is still its own.
            let _ = kill_process(self.pid, Signal::KILL);
            self.try_wait();
        }
    }

    /// Waits for as long as patience lasts. Says whether it has ended.
    fn try_wait(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while self.ended.is_none() && Instant::now() < deadline {
            match waitpid(Some(self.pid), WaitOptions::NOHANG) {
                Ok(None) => thread::sleep(Duration::from_micros(100)),
                Ok(Some((_, status))) => {
                    self.ended = Some(match (status.exit_status(), status.terminating_signal()) {
                        (Some(0), _) => ENDED_WELL.to_owned(),
                        (Some(code), _) => format!("has ended with code {code}"),
                        (None, signal) => {
                            format!("was killed by signal {}", signal.unwrap_or_default())
                        }
                    });
                }
                Err(Errno::INTR) => {}
                Err(error) => self.ended = Some(format!("can't be waited for: {error}")),
            }
        }
        self.ended.is_some()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Blocks all signals of this thread, and says which were blocked.
fn block_signals() -> io::Result<libc::sigset_t> {
    let mut all = MaybeUninit::uninit();
    let mut before = MaybeUninit::uninit();
    // SAFETY: `sigfillset` fills in `all`, and `pthread_sigmask` fills in `before` if it succeeds.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        match libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) {
            0 => Ok(before.assume_init()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn set_signals(mask: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: `mask` is one that `block_signals` got from the system.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}
