//! How a vCPU draws random numbers that no other machine draws, wherever and whenever it is copied.
//!
//! Number `i` of vCPU `v` is a function of (seed of the generation, `v`, `i`), so what a machine has drawn
//! follows from its generations and from how many it had drawn when each of them began. A number is *drawn*
//! when it is counted, by the one instruction that raises [`Turn::count`].
//!
//! # Why no number is drawn twice
//! A copy is made between two instructions, and is of all memory and registers at that instant. Its
//! generation is new: of the two, memory and registers differ in nothing else. Let the vCPU be anywhere in
//! [`Drawer::draw`] then, with generation `g` in its turn and `n` numbers counted:
//!
//! | copied after | the original | the copy, now in generation `h` |
//! |---|---|---|
//! | the turn was read, or half of it | counts number `n` of `g` | fails to count: its turn says `h` and not `g` |
//! | some words of the seed were read | likewise | reads the rest from `h`'s. Fails to count, and reads them all again: what it has kept is for `g` |
//! | some words of the log were written | likewise | fails to count, and writes them again |
//! | it was counted | goes on with `n + 1` of `g` | goes on with `n + 1` of `h`. Number `n` was drawn before there were two |
//!
//! So a number of `g` is counted only while `g` is in memory, and `g` is in the memory of one machine: each
//! copy has another before its first instruction. A machine counts each `n` once, since to count it raises
//! `n`. The next failure to count can only come from the next copy.
//!
//! That it is one instruction matters. With a second reading of the generation, and a store of the count
//! after it, a copy made between the two would count the same number as the original: the tests find that,
//! too.
//!
//! # Order
//! For whoever stops the vCPU, all stores of the instructions before are in memory, and none of those behind:
//! x86 is in order for that observer, and no other writes or looks. So no fence is needed, and the
//! instruction that counts needs no lock. The compiler is kept from moving accesses by [`Places`], all of
//! which are volatile, and the one that counts clobbers memory.

mod count;
#[cfg(test)]
mod tests;

use core::mem::offset_of;

pub use self::count::count;
use crate::abi::{DRAW_LOG, Draw, DrawLog, Generation, GenerationPage, Turn};
use crate::formula::{DrawKey, draw_digest};

/// The memory that a vCPU draws in.
pub trait Places {
    /// The word at `offset` of the [`GenerationPage`].
    fn generation(&self, offset: usize) -> u64;

    /// The word at `offset` of this vCPU's [`DrawLog`].
    fn log(&self, offset: usize) -> u64;

    /// Puts a word at `offset` of this vCPU's [`DrawLog`].
    fn write_log(&self, offset: usize, word: u64);

    /// If this vCPU's turn is `from`, makes it `to`, in one instruction ([`count()`]). Says whether it was.
    fn count(&self, from: Turn, to: Turn) -> bool;
}

/// A vCPU that draws.
#[derive(Clone, Debug)]
pub struct Drawer {
    vcpu: u64,
    /// What has been read of a generation, and which.
    known: Option<(u64, DrawKey)>,
}

impl Drawer {
    /// vCPU `vcpu`, which has read no seed yet.
    pub const fn new(vcpu: u64) -> Self {
        Self { vcpu, known: None }
    }

    /// Draws the next number.
    pub fn draw(&mut self, places: &impl Places) -> [u64; 2] {
        loop {
            let word = |offset| {
                let turns =
                    offset_of!(GenerationPage, turns) + self.vcpu as usize * size_of::<Turn>();
                places.generation(turns + offset)
            };
            let turn = Turn {
                generation: word(offset_of!(Turn, generation)),
                count: word(offset_of!(Turn, count)),
            };
            let key = match self.known {
                Some((generation, key)) if generation == turn.generation => key,
                _ => read_key(places),
            };
            // Even if it is of two generations: then this is not the one that the turn says next.
            self.known = Some((turn.generation, key));
            let number = key.number(self.vcpu, turn.count);
            write_down(places, turn, number);
            let next = Turn {
                count: turn.count + 1,
                ..turn
            };
            if places.count(turn, next) {
                return number;
            }
        }
    }
}

fn read_key(places: &impl Places) -> DrawKey {
    let seed = offset_of!(GenerationPage, generation) + offset_of!(Generation, seed);
    let word = |word: usize| places.generation(seed + 8 * word);
    DrawKey::new([word(0), word(1), word(2), word(3)])
}

/// Writes down `number`, which is not counted yet, where the next draw belongs.
fn write_down(places: &impl Places, turn: Turn, number: [u64; 2]) {
    let entry =
        |index: u64| offset_of!(DrawLog, last) + (index % DRAW_LOG) as usize * size_of::<Draw>();
    let before = match turn.count.checked_sub(1) {
        Some(last) => places.log(entry(last) + offset_of!(Draw, digest)),
        None => 0,
    };
    let put = |offset, word| places.write_log(entry(turn.count) + offset, word);
    put(offset_of!(Draw, generation), turn.generation);
    put(offset_of!(Draw, index), turn.count);
    put(offset_of!(Draw, number), number[0]);
    put(offset_of!(Draw, number) + 8, number[1]);
    put(offset_of!(Draw, digest), draw_digest(before, number));
}
