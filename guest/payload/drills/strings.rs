//! Long string instructions. Each is interrupted many times in its middle, by faults and by kicks, and must
//! go on from there.

use core::arch::asm;

use super::{Vcpu, read, write};
use crate::abi::REGION_SIZE;

/// Words of a string.
const WORDS: u64 = 1 << 16;
const BYTES: u64 = 8 * WORDS;

/// Fills, copies and compares.
pub fn run(mut vcpu: Vcpu<'_>) -> ! {
    let layout = vcpu.layout();
    let share = (layout.memory - layout.hammer_base) / layout.vcpus / REGION_SIZE * REGION_SIZE;
    assert!(share >= 2 * REGION_SIZE, "too little memory for a string");
    // Across two regions, and behind it.
    let ours = layout.hammer_base + vcpu.index * share;
    let first = ours + REGION_SIZE - BYTES / 2;
    let second = ours + REGION_SIZE + BYTES;
    loop {
        let salt = vcpu.salt();
        // Every word is another one, so that a word copied twice, or not, shows.
        for word in 0..WORDS {
            write(first + 8 * word, salt.wrapping_add(word));
        }
        copy_words(second + 8, first, WORDS);
        check(&vcpu, "rep movsq", second + 8, |word| {
            salt.wrapping_add(word)
        });
        // Up by a word, the last word first, for source and destination overlap; then down again.
        copy_words_downwards(first + 8, first, WORDS - 1);
        check(&vcpu, "rep movsq downwards", first, |word| {
            salt.wrapping_add(word.saturating_sub(1))
        });
        copy_words(first, first + 8, WORDS - 1);
        copy_bytes(second + 3, first, BYTES - 8);
        for word in 0..WORDS - 1 {
            write(first + 8 * word, 0);
        }
        copy_bytes(first, second + 3, BYTES - 8);
        check(&vcpu, "rep movsb", first, |word| {
            salt.wrapping_add(word.min(WORDS - 2))
        });
        copy_words(second, first, WORDS);
        if !equal(first, second, WORDS) {
            vcpu.fail(format_args!(
                "repe cmpsq finds a difference between {first:#x} and {second:#x}"
            ));
        }
        fill(second, salt, WORDS);
        if !all_are(second, salt, WORDS) {
            vcpu.fail(format_args!("repe scasq finds another word at {second:#x}"));
        }
        check(&vcpu, "rep stosq", second, |_| salt);
        vcpu.round_done();
    }
}

/// Fails unless each word at `at` is what it `should_be`.
fn check(vcpu: &Vcpu<'_>, what: &str, at: u64, should_be: impl Fn(u64) -> u64) {
    for word in 0..WORDS {
        let (gva, expected) = (at + 8 * word, should_be(word));
        let found = read(gva);
        if found != expected {
            vcpu.fail(format_args!(
                "after {what} the word at {gva:#x} is {found:#x}, not {expected:#x}"
            ));
        }
    }
}

/// Executes a string instruction on hammered memory.
macro_rules! string {
    ($($code:literal),+; $($operands:tt)*) => {
        // SAFETY: memory that no Rust object lies in; the direction flag is clear at the end.
        unsafe { asm!($($code,)+ $($operands)*) }
    };
}

fn copy_words(to: u64, from: u64, words: u64) {
    string!("rep movsq"; inout("rdi") to => _, inout("rsi") from => _, inout("rcx") words => _)
}

fn copy_words_downwards(to: u64, from: u64, words: u64) {
    let last = 8 * (words - 1);
    string!("std", "rep movsq", "cld";
        inout("rdi") to + last => _, inout("rsi") from + last => _, inout("rcx") words => _)
}

fn copy_bytes(to: u64, from: u64, bytes: u64) {
    string!("rep movsb"; inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _)
}

fn fill(to: u64, word: u64, words: u64) {
    string!("rep stosq"; inout("rdi") to => _, in("rax") word, inout("rcx") words => _)
}

fn all_are(at: u64, word: u64, words: u64) -> bool {
    let equal: u8;
    string!("repe scasq", "sete {e}";
        inout("rdi") at => _, in("rax") word, inout("rcx") words => _, e = out(reg_byte) equal);
    equal != 0
}

fn equal(a: u64, b: u64, words: u64) -> bool {
    let equal: u8;
    string!("repe cmpsq", "sete {e}";
        inout("rdi") a => _, inout("rsi") b => _, inout("rcx") words => _, e = out(reg_byte) equal);
    equal != 0
}
