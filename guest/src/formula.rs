//! What guest memory must contain, as closed formulas.
//!
//! The guest writes by them and checks itself by them; the VMM checks snapshots by them. Nothing is
//! replayed: the content of a page is a function of its last writer, and the last writer of a page after
//! `n` operations is a function of `n` ([`Schedule::last_writer`]).
//!
//! There are four families of content. A *key* is a 64-bit hash of the writer, and word `w` of what it
//! wrote is `key + w * STEP` for an odd `STEP`, so that a page costs one addition a word and any displaced,
//! stale or torn word shows:
//!
//! | family | key is of | words |
//! |---|---|---|
//! | page | (vCPU, operation) | 512, a whole page |
//! | dma | (device, sequence number) | the data of a request |
//! | poison | (device, sequence number) | the same bytes before a device has written them |
//! | margin | (device, slot, count) | the guest's own bytes around the data |
//!
//! A page key is a bijection of (vCPU, operation): [`identify`] names the writer of any page from its first
//! word. A page that was never written is all zero.
//!
//! Everything here is a pure function, without dependencies and without panics: the same source is
//! compiled into the guest, which has no standard library.

use core::num::NonZeroU64;

use crate::abi::Pattern;

/// 64-bit words in a page.
pub const PAGE_WORDS: u64 = crate::abi::PAGE_SIZE / 8;

/// Odd, so that the words of a page are all different.
const PAGE_STEP: u64 = 0xd1b5_4a32_d192_ed03;
/// Differs from [`PAGE_STEP`], so that a page and a buffer never agree in more than one word.
const BUFFER_STEP: u64 = 0xaef1_7502_108e_f2d9;

/// Bits of a page key's preimage that hold the operation; the vCPU is above them.
const OP_BITS: u32 = 56;
const OP_MASK: u64 = (1 << OP_BITS) - 1;

/// Increment of splitmix64 (Steele, Lea, Flood 2014); added before mixing because zero mixes to zero.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX_1: u64 = 0xbf58_476d_1ce4_e5b9;
const MIX_2: u64 = 0x94d0_49bb_1331_11eb;
const UNMIX_1: u64 = 0x96de_1b17_3f11_9089;
const UNMIX_2: u64 = 0x3196_42b2_d24d_8ec3;
const _: () = assert!(MIX_1.wrapping_mul(UNMIX_1) == 1);
const _: () = assert!(MIX_2.wrapping_mul(UNMIX_2) == 1);

const DMA: u64 = u64::from_le_bytes(*b"dma data");
const POISON: u64 = u64::from_le_bytes(*b"poisoned");
const MARGIN: u64 = u64::from_le_bytes(*b"a margin");
const ORDER: u64 = u64::from_le_bytes(*b"an order");
const REGISTERS: u64 = u64::from_le_bytes(*b"register");
const DRAWN: u64 = u64::from_le_bytes(*b"drawn no");
const GENERATION: u64 = u64::from_le_bytes(*b"generati");

/// splitmix64: a bijection in which every bit of the input changes about half of the output.
const fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(GAMMA);
    let x = (x ^ (x >> 30)).wrapping_mul(MIX_1);
    let x = (x ^ (x >> 27)).wrapping_mul(MIX_2);
    x ^ (x >> 31)
}

/// The inverse of [`mix`].
const fn unmix(x: u64) -> u64 {
    let x = (x ^ (x >> 31) ^ (x >> 62)).wrapping_mul(UNMIX_2);
    let x = (x ^ (x >> 27) ^ (x >> 54)).wrapping_mul(UNMIX_1);
    (x ^ (x >> 30) ^ (x >> 60)).wrapping_sub(GAMMA)
}

/// Key of the page written by operation `op` (below 2^56) of vCPU `vcpu` (below 2^8). It is also the
/// page's first word.
pub const fn page_key(seed: u64, vcpu: u64, op: u64) -> u64 {
    // The seed is mixed first: neighbouring seeds would else share most of their keys.
    mix(((vcpu << OP_BITS) | (op & OP_MASK)) ^ mix(seed))
}

/// Word `word` (0 to 511) of the page with key `key`.
pub const fn page_word_from_key(key: u64, word: u64) -> u64 {
    key.wrapping_add(word.wrapping_mul(PAGE_STEP))
}

/// How many of `words`, those of a page from word `from` on, are as the page with key `key` has them,
/// before one that is not. A page without a key is all zero.
pub fn matching_words(key: Option<u64>, from: u64, words: &[u64]) -> usize {
    const CHUNK: usize = 8;
    let (mut due, step) = match key {
        Some(key) => (page_word_from_key(key, from), PAGE_STEP),
        None => (0, 0),
    };
    let mut count = 0;
    // Some at a time, as many as the compiler has room for in registers.
    for chunk in words.chunks_exact(CHUNK) {
        let mut differing = 0;
        let mut due_here = due;
        for &word in chunk {
            differing |= word ^ due_here;
            due_here = due_here.wrapping_add(step);
        }
        if differing != 0 {
            break;
        }
        due = due_here;
        count += CHUNK;
    }
    for &word in words.iter().skip(count) {
        if word != due {
            break;
        }
        due = due.wrapping_add(step);
        count += 1;
    }
    count
}

/// Word `word` (0 to 511) of the page written by operation `op` of vCPU `vcpu`.
///
/// For a whole page take [`page_key`] once and [`page_word_from_key`] for each word.
pub const fn page_word(seed: u64, vcpu: u64, op: u64, word: u64) -> u64 {
    page_word_from_key(page_key(seed, vcpu, op), word)
}

/// The `(vcpu, op)` that wrote the page whose first word is `word0`.
///
/// Every word is the key of *some* pair: one with a vCPU that does not exist, or an operation that is far
/// off, says that `word0` was not written by the payload at all. An all-zero page is one never written.
pub const fn identify(seed: u64, word0: u64) -> (u64, u64) {
    let writer = unmix(word0) ^ mix(seed);
    (writer >> OP_BITS, writer & OP_MASK)
}

/// Key of the buffer family `family` for writer `(who, number)`.
const fn buffer_key(family: u64, seed: u64, who: u64, number: u64) -> u64 {
    mix(mix(mix(seed ^ family) ^ who) ^ number)
}

/// Key of the data of request `seq` of device `device`.
pub const fn dma_key(seed: u64, device: u64, seq: u64) -> u64 {
    buffer_key(DMA, seed, device, seq)
}

/// Key of the poison of request `seq` of device `device`.
pub const fn poison_key(seed: u64, device: u64, seq: u64) -> u64 {
    buffer_key(POISON, seed, device, seq)
}

/// Key of the margins of the buffer of slot `slot` of device `device`, rewritten for the `count`th time.
pub const fn margin_key(seed: u64, device: u64, slot: u64, count: u64) -> u64 {
    buffer_key(MARGIN, seed, (device << 32) | slot, count)
}

/// Word `word` of what was written under a [`dma_key`], [`poison_key`] or [`margin_key`].
pub const fn buffer_word_from_key(key: u64, word: u64) -> u64 {
    key.wrapping_add(word.wrapping_mul(BUFFER_STEP))
}

/// Word `word` of the data of request `seq` of device `device`; words count from the start of the data.
pub const fn dma_word(seed: u64, device: u64, seq: u64, word: u64) -> u64 {
    buffer_word_from_key(dma_key(seed, device, seq), word)
}

/// Key of the registers of operation `op` of vCPU `vcpu`.
pub const fn register_key(seed: u64, vcpu: u64, op: u64) -> u64 {
    buffer_key(REGISTERS, seed, vcpu, op)
}

/// Word `word` of what registers hold under a [`register_key`].
pub const fn register_word(key: u64, word: u64) -> u64 {
    key.wrapping_add(word.wrapping_mul(BUFFER_STEP))
}

/// Word `word` of id and seed of the `number`th generation that a VMM gives, where runs are to be repeatable.
pub const fn generation_word(seed: u64, number: u64, word: u64) -> u64 {
    mix(buffer_key(GENERATION, seed, number, word))
}

/// What the numbers of one generation are made by.
///
/// It stands for a cipher, and is none: it mixes well, and what it gives can be told apart by whoever looks
/// for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrawKey([u64; 2]);

impl DrawKey {
    /// The key of the generation with this seed.
    pub const fn new(seed: [u64; 4]) -> Self {
        const fn fold([a, b, c, d]: [u64; 4], half: u64) -> u64 {
            mix(mix(mix(mix(mix(DRAWN ^ half) ^ a) ^ b) ^ c) ^ d)
        }
        Self([fold(seed, 0), fold(seed, 1)])
    }

    /// What vCPU `vcpu` (below 2^8) draws when it has drawn `index` numbers (below 2^56) before. No two of
    /// one key are the same, since each half is a bijection of vCPU and index.
    pub const fn number(self, vcpu: u64, index: u64) -> [u64; 2] {
        let place = (vcpu << OP_BITS) | (index & OP_MASK);
        [mix(place ^ self.0[0]), mix(place ^ self.0[1])]
    }
}

/// Digest of all numbers up to `number`, when that of those before it is `before`; 0 if there is none before.
pub const fn draw_digest(before: u64, number: [u64; 2]) -> u64 {
    mix(mix(before ^ number[0]) ^ number[1])
}

/// The vCPU in whose page vCPU `from` leaves its mark when it has done `ops`
/// operations. `None` if it is alone.
///
/// All others in turn, so that every two know of each other after as many operations as there are vCPUs.
pub const fn mark_target(vcpus: u64, from: u64, ops: u64) -> Option<u64> {
    match vcpus {
        0 | 1 => None,
        _ => Some((from + 1 + ops % (vcpus - 1)) % vcpus),
    }
}

/// The mark of vCPU `from`, which has done `ops` operations, in the page of vCPU `to`: how many it had done
/// when it left one there. 0 if it has not.
pub const fn last_mark(vcpus: u64, from: u64, to: u64, ops: u64) -> u64 {
    if vcpus < 2 || from == to {
        return 0;
    }
    let others = vcpus - 1;
    let place = (to + vcpus - from - 1) % vcpus;
    let since = (ops + others - place) % others;
    ops.saturating_sub(since)
}

/// What the guest puts in the place of [`dma_word`] before a device writes there.
pub const fn poison_word(seed: u64, device: u64, seq: u64, word: u64) -> u64 {
    buffer_word_from_key(poison_key(seed, device, seq), word)
}

/// Word `word` of the buffer of slot `slot` of device `device`, where it is margin, after it was rewritten
/// for the `count`th time; words count from the start of the buffer, not of the margin.
pub const fn margin_word(seed: u64, device: u64, slot: u64, count: u64, word: u64) -> u64 {
    buffer_word_from_key(margin_key(seed, device, slot, count), word)
}

/// Which slot each operation of a vCPU writes, and so who wrote a slot last.
///
/// Both directions are closed formulas: their cost does not depend on the number of operations.
#[derive(Clone, Debug)]
pub struct Schedule {
    order: SlotOrder,
}

/// In which order slots are written.
#[derive(Clone, Debug)]
enum SlotOrder {
    /// Slot after slot: [`Pattern::Dense`] and [`Pattern::Sparse`], which differ in where the slots lie.
    InTurn(NonZeroU64),
    /// [`Pattern::Uniform`].
    Shuffled(Shuffle),
    /// [`Pattern::Hot`]: the first tenth of the slots, and the rest.
    HotCold { hot: Shuffle, cold: Shuffle },
}

/// Of this many operations under [`Pattern::Hot`] ...
const HOT_CYCLE: u64 = 10;
/// ... so many go to the hot slots. The last one of a cycle goes to the cold ones.
const HOT_SHARE: u64 = 9;

impl Schedule {
    /// The schedule of vCPU `vcpu`, which owns `slots` slots. There is at least one: 0 is taken for 1.
    pub fn new(pattern: Pattern, slots: u64, seed: u64, vcpu: u64) -> Self {
        let slots = NonZeroU64::new(slots).unwrap_or(NonZeroU64::MIN);
        let shuffle = |slots, set| Shuffle::new(slots, buffer_key(ORDER, seed, vcpu, set));
        let order = match pattern {
            Pattern::Dense | Pattern::Sparse => SlotOrder::InTurn(slots),
            Pattern::Uniform => SlotOrder::Shuffled(shuffle(slots, 0)),
            Pattern::Hot => {
                let hot = NonZeroU64::new(slots.get() / HOT_CYCLE).unwrap_or(NonZeroU64::MIN);
                match NonZeroU64::new(slots.get() - hot.get()) {
                    Some(cold) => SlotOrder::HotCold {
                        hot: shuffle(hot, 1),
                        cold: shuffle(cold, 2),
                    },
                    // A single slot: there is nothing to be cold.
                    None => SlotOrder::Shuffled(shuffle(hot, 1)),
                }
            }
        };
        Self { order }
    }

    /// The slot that operation `op` writes.
    pub fn slot_of(&self, op: u64) -> u64 {
        match &self.order {
            SlotOrder::InTurn(slots) => op % *slots,
            SlotOrder::Shuffled(shuffle) => shuffle.slot_of(op),
            SlotOrder::HotCold { hot, cold } => {
                let (cycle, turn) = (op / HOT_CYCLE, op % HOT_CYCLE);
                if turn < HOT_SHARE {
                    hot.slot_of(cycle * HOT_SHARE + turn)
                } else {
                    hot.slots.get() + cold.slot_of(cycle)
                }
            }
        }
    }

    /// The last of the operations `0..ops` that wrote `slot`. `None` if none did, as for a slot that
    /// the vCPU does not own.
    pub fn last_writer(&self, slot: u64, ops: u64) -> Option<u64> {
        match &self.order {
            SlotOrder::InTurn(slots) => {
                if slot >= slots.get() {
                    return None;
                }
                let since_first = ops.checked_sub(slot + 1)?;
                Some(slot + since_first / *slots * slots.get())
            }
            SlotOrder::Shuffled(shuffle) => shuffle.last_writer(slot, ops),
            SlotOrder::HotCold { hot, cold } => {
                let (cycles, turns) = (ops / HOT_CYCLE, ops % HOT_CYCLE);
                match slot.checked_sub(hot.slots.get()) {
                    None => {
                        // `turns` is below HOT_CYCLE: none of them was the cold one.
                        let index = hot.last_writer(slot, cycles * HOT_SHARE + turns)?;
                        Some(index / HOT_SHARE * HOT_CYCLE + index % HOT_SHARE)
                    }
                    Some(slot) => {
                        let index = cold.last_writer(slot, cycles)?;
                        Some(index * HOT_CYCLE + HOT_SHARE)
                    }
                }
            }
        }
    }
}

/// A set of slots in which index after index writes every slot once an epoch, each
/// epoch in an order of its own.
///
/// The order is a keyed permutation of the next power of two, walked until it falls inside the set. Each
/// of its rounds can be undone (addition, multiplication by an odd number, and an xor with a shift of at
/// least half the width), which is what gives [`Shuffle::last_writer`] without replay.
#[derive(Clone, Debug)]
struct Shuffle {
    slots: NonZeroU64,
    key: u64,
    mask: u64,
    shift: u32,
}

const ROUNDS: u32 = 4;
const STIR: u64 = 0x5851_f42d_4c95_7f2d;
const UNSTIR: u64 = 0xc097_ef87_329e_28a5;
const _: () = assert!(STIR.wrapping_mul(UNSTIR) == 1);

impl Shuffle {
    fn new(slots: NonZeroU64, key: u64) -> Self {
        let bits = u64::BITS - (slots.get() - 1).leading_zeros();
        Self {
            slots,
            key,
            mask: u64::MAX.checked_shr(u64::BITS - bits).unwrap_or(0),
            shift: bits.div_ceil(2).max(1),
        }
    }

    fn slot_of(&self, index: u64) -> u64 {
        self.permute(index / self.slots, index % self.slots)
    }

    fn last_writer(&self, slot: u64, count: u64) -> Option<u64> {
        if slot >= self.slots.get() {
            return None;
        }
        let (epoch, begun) = (count / self.slots, count % self.slots);
        let place = self.unpermute(epoch, slot);
        if place < begun {
            return Some(epoch * self.slots.get() + place);
        }
        let epoch = epoch.checked_sub(1)?;
        Some(epoch * self.slots.get() + self.unpermute(epoch, slot))
    }

    fn epoch_key(&self, epoch: u64) -> u64 {
        mix(self.key ^ epoch)
    }

    /// The slot at place `place`, which is inside the set, of epoch `epoch`.
    fn permute(&self, epoch: u64, place: u64) -> u64 {
        let key = self.epoch_key(epoch);
        let mut x = place;
        // Ends: the walk follows a cycle of a permutation, and began inside the set.
        loop {
            for round in 0..ROUNDS {
                x = x.wrapping_add(key.rotate_left(16 * round)) & self.mask;
                x = x.wrapping_mul(STIR) & self.mask;
                x ^= x >> self.shift;
            }
            if x < self.slots.get() {
                return x;
            }
        }
    }

    /// The place of slot `slot`, which is inside the set, in epoch `epoch`.
    fn unpermute(&self, epoch: u64, slot: u64) -> u64 {
        let key = self.epoch_key(epoch);
        let mut x = slot;
        loop {
            for round in (0..ROUNDS).rev() {
                x ^= x >> self.shift;
                x = x.wrapping_mul(UNSTIR) & self.mask;
                x = x.wrapping_sub(key.rotate_left(16 * round)) & self.mask;
            }
            if x < self.slots.get() {
                return x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const PATTERNS: [Pattern; 4] = [
        Pattern::Dense,
        Pattern::Uniform,
        Pattern::Hot,
        Pattern::Sparse,
    ];
    const SLOTS: [u64; 12] = [1, 2, 3, 7, 9, 10, 11, 20, 64, 100, 513, 1000];

    #[test]
    fn last_writer_agrees_with_replay() {
        for pattern in PATTERNS {
            for slots in SLOTS {
                for (seed, vcpu) in [(0, 0), (1, 0), (1, 1), (u64::MAX, 15)] {
                    let schedule = Schedule::new(pattern, slots, seed, vcpu);
                    let mut last = vec![None; slots as usize];
                    let checked = [0, 1, 2, 9, 10, 11, 19, 20, 99, slots - 1, slots, slots + 1];
                    let total = 3 * slots + 25;
                    for ops in 0..=total {
                        if checked.contains(&ops) || ops.is_multiple_of(37) || ops + 12 > total {
                            for (slot, last) in last.iter().enumerate() {
                                assert_eq!(
                                    schedule.last_writer(slot as u64, ops),
                                    *last,
                                    "{pattern:?}, {slots} slots, slot {slot}, {ops} operations"
                                );
                            }
                        }
                        last[schedule.slot_of(ops) as usize] = Some(ops);
                    }
                }
            }
        }
    }

    #[test]
    fn last_writer_is_right_far_out() {
        for pattern in PATTERNS {
            for slots in [1, 3, 10, 513, 32_768, 1_000_003] {
                let schedule = Schedule::new(pattern, slots, 42, 3);
                for op in (1 << 40)..(1 << 40) + 200 {
                    let slot = schedule.slot_of(op);
                    assert!(slot < slots);
                    assert_eq!(schedule.last_writer(slot, op + 1), Some(op));
                    let before = schedule.last_writer(slot, op).unwrap();
                    assert!(before < op);
                    assert_eq!(schedule.slot_of(before), slot);
                }
            }
        }
    }

    #[test]
    fn slots_outside_have_no_writer() {
        for pattern in PATTERNS {
            let schedule = Schedule::new(pattern, 100, 1, 0);
            for slot in [100, 101, 127, 128, u64::MAX] {
                assert_eq!(schedule.last_writer(slot, 1_000_000), None);
            }
        }
    }

    #[test]
    fn no_slots_is_one_slot() {
        for pattern in PATTERNS {
            let schedule = Schedule::new(pattern, 0, 1, 0);
            assert_eq!(schedule.slot_of(12_345), 0);
            assert_eq!(schedule.last_writer(0, 12_345), Some(12_344));
        }
    }

    #[test]
    fn uniform_writes_every_slot_once_an_epoch() {
        for slots in SLOTS {
            let schedule = Schedule::new(Pattern::Uniform, slots, 5, 2);
            for epoch in 0..4 {
                let written: HashSet<_> = (epoch * slots..(epoch + 1) * slots)
                    .map(|op| schedule.slot_of(op))
                    .collect();
                assert_eq!(written.len() as u64, slots);
                assert!(written.iter().all(|&slot| slot < slots));
            }
        }
    }

    #[test]
    fn uniform_orders_look_random() {
        let slots = 20_000;
        let schedule = Schedule::new(Pattern::Uniform, slots, 5, 2);
        let other = Schedule::new(Pattern::Uniform, slots, 5, 3);
        // Each of these counts is about 1 for random orders; 2 is expected of the first,
        // which has two neighbours.
        let neighbours = (1..slots)
            .filter(|&op| schedule.slot_of(op).abs_diff(schedule.slot_of(op - 1)) == 1)
            .count();
        let same_next_epoch = (0..slots)
            .filter(|&op| schedule.slot_of(op) == schedule.slot_of(op + slots))
            .count();
        let same_other_vcpu = (0..slots)
            .filter(|&op| schedule.slot_of(op) == other.slot_of(op))
            .count();
        assert!(neighbours < 12, "{neighbours} neighbours");
        assert!(same_next_epoch < 8, "{same_next_epoch} in the same place");
        assert!(same_other_vcpu < 8, "{same_other_vcpu} in the same place");
    }

    #[test]
    fn hot_tenth_gets_nine_operations_of_ten() {
        for slots in [2, 9, 10, 100, 513] {
            let schedule = Schedule::new(Pattern::Hot, slots, 5, 0);
            let hot = (slots / 10).max(1);
            for first in (0..5000).step_by(10) {
                let in_hot = (first..first + 10)
                    .filter(|&op| schedule.slot_of(op) < hot)
                    .count();
                assert_eq!(in_hot, 9);
            }
            let written: HashSet<_> = (0..10 * slots).map(|op| schedule.slot_of(op)).collect();
            assert_eq!(written.len() as u64, slots);
        }
    }

    #[test]
    fn dense_goes_in_turn() {
        let schedule = Schedule::new(Pattern::Dense, 7, 5, 0);
        assert_eq!(
            (0..9).map(|op| schedule.slot_of(op)).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5, 6, 0, 1]
        );
    }

    #[test]
    fn mix_is_undone_by_unmix() {
        let mut x = 0;
        for _ in 0..1000 {
            assert_eq!(unmix(mix(x)), x);
            assert_eq!(mix(unmix(x)), x);
            x = mix(x);
        }
    }

    #[test]
    fn matching_words_end_before_the_first_that_is_another() {
        let key = page_key(5, 1, 9);
        let mut page: Vec<u64> = (0..PAGE_WORDS).map(|w| page_word(5, 1, 9, w)).collect();
        assert_eq!(matching_words(Some(key), 0, &page), 512);
        assert_eq!(matching_words(Some(key), 100, &page[100..]), 412);
        assert_eq!(matching_words(Some(key), 1, &page), 0, "displaced");
        assert_eq!(matching_words(None, 0, &page), 0);
        for wrong in [0, 1, 7, 8, 100, 511] {
            let right = std::mem::replace(&mut page[wrong], 7);
            assert_eq!(matching_words(Some(key), 0, &page), wrong);
            page[wrong] = right;
        }
        assert_eq!(matching_words(None, 3, &[0, 0, 1]), 2);
        assert_eq!(matching_words(None, 512, &[]), 0);
    }

    #[test]
    fn identify_names_the_writer() {
        for seed in [0, 1, 0x1234_5678_9abc_def0, u64::MAX] {
            for vcpu in [0, 1, 15, 255] {
                for op in [0, 1, 511, 1 << 32, OP_MASK] {
                    let first = page_word(seed, vcpu, op, 0);
                    assert_eq!(first, page_key(seed, vcpu, op));
                    assert_eq!(identify(seed, first), (vcpu, op));
                }
            }
        }
    }

    #[test]
    fn marks_agree_with_replay() {
        for vcpus in 1..=5 {
            for from in 0..vcpus {
                let mut left = vec![0; vcpus as usize];
                for ops in 0..30 {
                    if let Some(to) = mark_target(vcpus, from, ops)
                        && ops > 0
                    {
                        assert_ne!(to, from);
                        left[to as usize] = ops;
                    }
                    for (to, &mark) in (0..).zip(&left) {
                        assert_eq!(last_mark(vcpus, from, to, ops), mark, "{vcpus} {from} {to}");
                    }
                }
            }
        }
    }

    #[test]
    fn no_number_is_drawn_twice() {
        let mut seen = HashSet::new();
        let mut seeds = Vec::from([[0; 4]]);
        // Seeds that differ in one bit, in the order of their words, and those of neighbouring generations.
        seeds.extend((0..4).map(|word| std::array::from_fn(|w| u64::from(w == word))));
        seeds.extend(
            (1..20).map(|number| std::array::from_fn(|w| generation_word(1, number, w as u64))),
        );
        for seed in seeds {
            let key = DrawKey::new(seed);
            for vcpu in [0, 1, 15, 255] {
                for index in (0..200).chain([OP_MASK]) {
                    for half in key.number(vcpu, index) {
                        assert!(seen.insert(half), "{seed:?} {vcpu} {index}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_digest_tells_what_was_drawn_and_in_which_order() {
        let numbers: Vec<_> = (0..3).map(|n| DrawKey::new([7; 4]).number(0, n)).collect();
        let digest = |order: &[usize]| {
            let numbers = order.iter().map(|&n| numbers[n]);
            numbers.fold(0, draw_digest)
        };
        let orders: [&[usize]; 6] = [&[], &[0], &[0, 1], &[1, 0], &[0, 1, 2], &[0, 2, 1]];
        let digests: HashSet<_> = orders.map(digest).into();
        assert_eq!(digests.len(), orders.len());
    }

    #[test]
    fn families_share_no_words() {
        let mut seen = HashSet::from([0]);
        for seed in [0, 1, 7] {
            for who in 0..3 {
                for number in 0..5 {
                    for word in 0..PAGE_WORDS {
                        assert!(seen.insert(page_word(seed, who, number, word)));
                        assert!(seen.insert(dma_word(seed, who, number, word)));
                        assert!(seen.insert(poison_word(seed, who, number, word)));
                        for slot in 0..2 {
                            assert!(seen.insert(margin_word(seed, who, slot, number, word)));
                        }
                    }
                }
            }
        }
    }
}
