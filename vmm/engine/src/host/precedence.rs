//! Whose change of mappings comes first.
//!
//! Every change of any window takes one lock of the kernel's, the process's `mmap_lock`, which is handed to
//! whoever happens to come. With dozens of machines in a process that all break pages, one that is to be
//! forked has hundreds of changes to make, and waits at each of them behind the others: seconds, with its
//! vCPUs stopped. So who forks, makes a clone or drops one takes *precedence*, and breaks of other machines
//! wait at the door, before they have locked anything, until that is over.
//!
//! It is no lock. Nothing rests on it: who has passed already goes on beside, and who waits does so for one of
//! those alone that had precedence when he came, however often somebody forks, and for [`MOST`] at most. Breaks
//! of a machine that has it do not wait, whoever else has it, too: its fork may wait for them. Nor does a thread
//! that has taken it, whatever it does to other machines meanwhile.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::timeline::span;

/// The longest that anybody waits: many times what a fork takes, and what is lost if whoever has precedence
/// waits for somebody who gives way to him.
const MOST: Duration = Duration::from_millis(100);

thread_local! {
    /// How often this thread has taken it.
    static TAKEN: Cell<u32> = const { Cell::new(0) };
}

/// Who has precedence in this process.
static PROCESS: Board = Board::new(MOST);

#[derive(Debug)]
struct Board {
    state: Mutex<State>,
    ended: Condvar,
    /// `State::takers`. A hint: who misses a change comes in between, or asks in vain.
    takers: AtomicU32,
    /// The longest that anybody waits.
    most: Duration,
}

#[derive(Debug)]
struct State {
    /// How many have it.
    takers: u32,
    /// How many have had it.
    ended: u64,
}

impl Board {
    const fn new(most: Duration) -> Self {
        Self {
            state: Mutex::new(State {
                takers: 0,
                ended: 0,
            }),
            ended: Condvar::new(),
            takers: AtomicU32::new(0),
            most,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One machine's part in it.
#[derive(Debug)]
pub struct Precedence {
    board: &'static Board,
    /// How often this machine has it.
    own: AtomicU32,
}

impl Default for Precedence {
    fn default() -> Self {
        Self::on(&PROCESS)
    }
}

impl Precedence {
    const fn on(board: &'static Board) -> Self {
        Self {
            board,
            own: AtomicU32::new(0),
        }
    }

    /// Has breaks of other machines wait that have not begun, until what this gives is dropped. Those of this
    /// machine that wait go on.
    #[must_use = "it is over when this is dropped"]
    pub fn take(&self) -> Taken<'_> {
        let mut state = self.board.lock();
        state.takers += 1;
        self.own.fetch_add(1, Ordering::Relaxed);
        self.board.takers.store(state.takers, Ordering::Relaxed);
        drop(state);
        self.board.ended.notify_all();
        TAKEN.set(TAKEN.get() + 1);
        Taken(self, PhantomData)
    }

    /// Whether this machine has it.
    #[cfg(test)]
    pub(crate) fn is_taken(&self) -> bool {
        self.own.load(Ordering::Relaxed) > 0
    }

    /// Waits for one of the other machines that have it now to be through, if this one has not, nor this thread.
    /// To be called with no lock held.
    #[inline]
    pub fn give_way(&self) {
        // Relaxed: nothing is ordered by it.
        if self.board.takers.load(Ordering::Relaxed) > 0 && !self.is_ours() {
            self.wait();
        }
    }

    fn is_ours(&self) -> bool {
        self.own.load(Ordering::Relaxed) > 0 || TAKEN.get() > 0
    }

    #[cold]
    fn wait(&self) {
        let _span = span!("gives way");
        let state = self.board.lock();
        let ended_before = state.ended;
        let is_in_the_way =
            |state: &mut State| state.takers > 0 && !self.is_ours() && state.ended == ended_before;
        // Whether it is over or has taken too long, he goes on.
        let Board { ended, most, .. } = self.board;
        drop(ended.wait_timeout_while(state, *most, is_in_the_way));
    }
}

/// While it lives, its machine comes first. It stays on its thread.
#[derive(Debug)]
pub struct Taken<'a>(&'a Precedence, PhantomData<*const ()>);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let Self(Precedence { board, own }, _) = self;
        TAKEN.set(TAKEN.get() - 1);
        let mut state = board.lock();
        state.takers -= 1;
        state.ended += 1;
        own.fetch_sub(1, Ordering::Relaxed);
        board.takers.store(state.takers, Ordering::Relaxed);
        drop(state);
        board.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::memory::{Frames, Memory};
    use crate::mm::{Access, Gfn};

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(3600);

    /// Runs `meanwhile` while a thread gives way for `machine`. It can ask whether that is through.
    fn passes(machine: &Precedence, meanwhile: impl FnOnce(&dyn Fn() -> bool)) {
        gets_through(|| machine.give_way(), meanwhile);
    }

    fn gets_through(what: impl Fn() + Send + Sync, meanwhile: impl FnOnce(&dyn Fn() -> bool)) {
        let (say, heard) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                say.send("comes").unwrap();
                what();
                say.send("passed").unwrap();
            });
            assert_eq!(heard.recv(), Ok("comes"));
            meanwhile(&|| {
                (0..100).for_each(|_| thread::yield_now());
                heard.try_recv().is_ok()
            });
            assert_eq!(heard.recv(), Ok("passed"));
        });
    }

    #[test]
    fn others_wait_and_the_machine_itself_does_not() {
        static BOARD: Board = Board::new(LONG);
        let (forked, other) = (Precedence::on(&BOARD), Precedence::on(&BOARD));
        other.give_way();
        let first = forked.take();
        forked.give_way();
        passes(&other, |has_passed| {
            assert!(!has_passed());
            drop(first);
        });
        other.give_way();
        assert_eq!(BOARD.takers.load(Ordering::Relaxed), 0);
    }

    /// Two that fork at once: neither waits for a vCPU of his own that gives way to the other.
    #[test]
    fn who_waits_goes_on_when_his_own_machine_has_it_too() {
        static BOARD: Board = Board::new(LONG);
        let (first, second) = (Precedence::on(&BOARD), Precedence::on(&BOARD));
        let one = first.take();
        let mut other = None;
        passes(&second, |has_passed| {
            assert!(!has_passed());
            other = Some(second.take());
        });
        passes(&second, |_| {});
        passes(&first, |_| {});
        drop((one, other));
    }

    /// What it writes to other machines meanwhile does not wait for itself.
    #[test]
    fn a_thread_that_has_it_never_waits() {
        static BOARD: Board = Board::new(LONG);
        let (forked, other) = (Precedence::on(&BOARD), Precedence::on(&BOARD));
        let _first = forked.take();
        other.give_way();
    }

    /// Somebody always has it: who waits does so once.
    #[test]
    fn nobody_waits_for_who_came_later() {
        // Who comes late himself waits for the second, and no longer than that.
        static BOARD: Board = Board::new(Duration::from_secs(5));
        let (forked, again, other) = (
            Precedence::on(&BOARD),
            Precedence::on(&BOARD),
            Precedence::on(&BOARD),
        );
        let first = forked.take();
        let mut second = None;
        passes(&other, |has_passed| {
            assert!(!has_passed());
            second = Some(again.take());
            drop(first);
        });
        drop(second);
    }

    #[test]
    fn breaks_and_pins_give_way() {
        static BOARD: Board = Board::new(LONG);
        let forked = Precedence::on(&BOARD);
        let frames = Frames::new(8 << 20).unwrap();
        let memory = Memory::new(&frames, 1 << 20).unwrap();
        let ram = memory.ram().clone().with_precedence(Precedence::on(&BOARD));
        let fault = || {
            ram.write_fault(Gfn(0)).unwrap();
        };
        let pin = || drop(ram.pin(0, 8, Access::Write).unwrap());
        for what in [&fault as &(dyn Fn() + Sync), &pin] {
            let first = forked.take();
            gets_through(what, |has_passed| {
                assert!(!has_passed());
                drop(first);
            });
        }
    }

    /// Who has it, and needs something of who gives way to him, gets it.
    #[test]
    fn nobody_waits_for_ever() {
        static BOARD: Board = Board::new(Duration::from_millis(1));
        let (forked, other) = (Precedence::on(&BOARD), Precedence::on(&BOARD));
        let _first = forked.take();
        passes(&other, |_| {});
    }

    #[test]
    fn it_is_taken_as_often_as_it_is_given() {
        static BOARD: Board = Board::new(LONG);
        let (forked, other) = (Precedence::on(&BOARD), Precedence::on(&BOARD));
        let (first, second) = (forked.take(), forked.take());
        drop(first);
        forked.give_way();
        passes(&other, |has_passed| {
            assert!(!has_passed());
            drop(second);
        });
    }
}
