//! Which copy of a guest a machine is. Each copy has a generation of its own (see `guest::abi`).
//!
//! A guest is one *incarnation* from when it is booted, started as a clone, or rewound, until it is rewound
//! or gone. [`Incarnations`] begins each, while nothing runs: it writes the new generation to the guest's
//! memory, and remembers what the guest had drawn by then. That is all that is needed to know what it draws
//! from there.
//!
//! The generation is written by one write, to one page unless a guest has very many vCPUs. Memory that is
//! `host::Ram` pins all pages of a write before the first is written: either all of the generation is there or
//! it is an error, and then the guest must not run.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};

use guest::abi::{
    DRAW_LOG, Draw, DrawLog, GENERATION_GPA, GENERATION_MAGIC, Generation, GenerationPage, Layout,
    Turn, VcpuPage,
};
use guest::formula::generation_word;
use palimpsest::causes::Cause;
use palimpsest::kvm::GuestRam;
use rustix::rand::{GetRandomFlags, getrandom};

/// Why an incarnation could not begin.
#[derive(Debug, thiserror::Error)]
pub enum IncarnationError {
    /// The host has no random numbers.
    #[error("cannot get random numbers for a new generation")]
    Random(#[source] rustix::io::Errno),
    /// Guest memory could not be read or written.
    #[error("cannot access guest memory at {gpa:#x}")]
    Memory {
        /// Where.
        gpa: u64,
        /// Why.
        source: Cause,
    },
}

/// Where the ids and seeds of generations come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entropy {
    /// The host's random numbers.
    Host,
    /// A formula of this seed, and of how many generations there were before: runs repeat.
    Seed(u64),
}

/// What a vCPU has drawn since its guest was booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drawn {
    /// How many numbers.
    pub count: u64,
    /// Their `formula::draw_digest`.
    pub digest: u64,
}

/// A guest under one generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incarnation {
    /// Its number among all that [`Incarnations`] has begun, from 1.
    pub number: u64,
    /// What it has been given.
    pub generation: Generation,
    /// What it is a copy of; `None` if it was booted.
    pub origin: Option<Origin>,
}

/// What an incarnation is a copy of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Number of the incarnation.
    pub incarnation: u64,
    /// Its generation.
    pub generation: Generation,
    /// What each vCPU had drawn when the copy was made.
    pub drawn: Vec<Drawn>,
}

/// Begins all incarnations of a guest, in as many machines as there are.
#[derive(Debug)]
pub struct Incarnations {
    entropy: Entropy,
    begun: AtomicU64,
}

impl Incarnations {
    /// Those whose generations are of `entropy`. None has begun yet.
    pub fn new(entropy: Entropy) -> Self {
        Self {
            entropy,
            begun: AtomicU64::new(0),
        }
    }

    /// The same, of which `begun` have begun, in other processes.
    pub fn after(entropy: Entropy, begun: u64) -> Self {
        Self {
            entropy,
            begun: AtomicU64::new(begun),
        }
    }

    /// Begins that of a guest which has not run yet.
    ///
    /// # Errors
    /// If there are no random numbers, or guest memory can't be accessed. The guest must not run then.
    pub fn boot(
        &self,
        ram: &dyn GuestRam,
        layout: &Layout,
    ) -> Result<Incarnation, IncarnationError> {
        self.begin(ram, layout, None)
    }

    /// Begins that of a guest whose memory in `ram` is a copy of what `original` had when it was captured. It
    /// has not run since.
    ///
    /// # Errors
    /// As [`Incarnations::boot`]. The guest has the generation of `original` then, and must not run.
    pub fn copy(
        &self,
        ram: &dyn GuestRam,
        layout: &Layout,
        original: &Incarnation,
    ) -> Result<Incarnation, IncarnationError> {
        let drawn = (0..layout.vcpus).map(|vcpu| drawn(ram, layout, vcpu));
        let origin = Origin {
            incarnation: original.number,
            generation: original.generation,
            drawn: drawn.collect::<Result<_, _>>()?,
        };
        self.begin(ram, layout, Some(origin))
    }

    fn begin(
        &self,
        ram: &dyn GuestRam,
        layout: &Layout,
        origin: Option<Origin>,
    ) -> Result<Incarnation, IncarnationError> {
        // What is counted is all: nothing is ordered by it.
        let number = self.begun.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let [id_low, id_high, seed @ ..] = self.entropy.words(number)?;
        let mut page = read_words(ram, GENERATION_GPA, words_for(layout))?;
        let generation = Generation {
            // A guest may have written whatever it likes.
            counter: counter_in(&page).wrapping_add(1),
            id: [id_low, id_high],
            seed,
        };
        put(&mut page, &generation);
        let bytes: Vec<u8> = page.iter().flat_map(|word| word.to_le_bytes()).collect();
        ram.write(GENERATION_GPA, &bytes)
            .map_err(|source| IncarnationError::Memory {
                gpa: GENERATION_GPA,
                source,
            })?;
        Ok(Incarnation {
            number,
            generation,
            origin,
        })
    }
}

/// Words of an id and a seed.
const FRESH: usize = 6;

impl Entropy {
    /// The id and the seed of the `number`th generation.
    fn words(self, number: u64) -> Result<[u64; FRESH], IncarnationError> {
        match self {
            Self::Seed(seed) => Ok(std::array::from_fn(|word| {
                generation_word(seed, number, word as u64)
            })),
            Self::Host => {
                let mut bytes = [0; 8 * FRESH];
                let mut done = 0;
                // Up to 256 bytes come at once, unless a signal comes first.
                while done < bytes.len() {
                    match getrandom(&mut bytes[done..], GetRandomFlags::empty()) {
                        Ok(more) => done += more,
                        Err(rustix::io::Errno::INTR) => {}
                        Err(error) => return Err(IncarnationError::Random(error)),
                    }
                }
                Ok(words(&bytes))
            }
        }
    }
}

/// Words of a [`GenerationPage`] that a guest has.
fn words_for(layout: &Layout) -> usize {
    GenerationPage::len_for(layout.vcpus) as usize / 8
}

/// Word of a [`GenerationPage`] with which its [`Generation`] begins.
const GENERATION_WORD: usize = offset_of!(GenerationPage, generation) / 8;

/// The counter in `page`; 0 if nobody has written it.
fn counter_in(page: &[u64]) -> u64 {
    if page[offset_of!(GenerationPage, magic) / 8] != GENERATION_MAGIC {
        return 0;
    }
    page[GENERATION_WORD + offset_of!(Generation, counter) / 8]
}

/// Puts `generation` into `page`, and leaves what is the guest's.
fn put(page: &mut [u64], generation: &Generation) {
    // Taken apart by name: a field that is added does not compile here.
    let &Generation { counter, id, seed } = generation;
    let at = |offset: usize| GENERATION_WORD + offset / 8;
    page[offset_of!(GenerationPage, magic) / 8] = GENERATION_MAGIC;
    page[at(offset_of!(Generation, counter))] = counter;
    page[at(offset_of!(Generation, id))..][..2].copy_from_slice(&id);
    page[at(offset_of!(Generation, seed))..][..4].copy_from_slice(&seed);
    let turns = &mut page[offset_of!(GenerationPage, turns) / 8..];
    for turn in turns.chunks_exact_mut(size_of::<Turn>() / 8) {
        turn[offset_of!(Turn, generation) / 8] = counter;
    }
}

/// What vCPU `vcpu` has drawn, as memory has it.
fn drawn(ram: &dyn GuestRam, layout: &Layout, vcpu: u64) -> Result<Drawn, IncarnationError> {
    let turns = GENERATION_GPA + offset_of!(GenerationPage, turns) as u64;
    let turn = turns + vcpu * size_of::<Turn>() as u64;
    let [count] = read(ram, turn + offset_of!(Turn, count) as u64)?;
    let Some(last) = count.checked_sub(1) else {
        return Ok(Drawn::default());
    };
    let log = layout.vcpu_page(vcpu) + offset_of!(VcpuPage, draws) as u64;
    let entry = offset_of!(DrawLog, last) as u64 + last % DRAW_LOG * size_of::<Draw>() as u64;
    let [digest] = read(ram, log + entry + offset_of!(Draw, digest) as u64)?;
    Ok(Drawn { count, digest })
}

fn read<const WORDS: usize>(
    ram: &dyn GuestRam,
    gpa: u64,
) -> Result<[u64; WORDS], IncarnationError> {
    let words = read_words(ram, gpa, WORDS)?;
    Ok(std::array::from_fn(|word| {
        words.get(word).copied().unwrap_or(0)
    }))
}

fn read_words(ram: &dyn GuestRam, gpa: u64, count: usize) -> Result<Vec<u64>, IncarnationError> {
    let mut bytes = vec![0; 8 * count];
    ram.read(gpa, &mut bytes)
        .map_err(|source| IncarnationError::Memory { gpa, source })?;
    let words = bytes.as_chunks().0.iter().copied();
    Ok(words.map(u64::from_le_bytes).collect())
}

/// The words of as many bytes.
fn words<const WORDS: usize>(bytes: &[u8]) -> [u64; WORDS] {
    let chunks = bytes.as_chunks().0;
    std::array::from_fn(|word| {
        chunks
            .get(word)
            .map_or(0, |&bytes| u64::from_le_bytes(bytes))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Mutex;

    use guest::abi::{IMAGE_GPA, MAX_VCPUS};

    use super::*;

    const MEMORY: u64 = 64 << 20;

    fn layout() -> Layout {
        Layout::new(MEMORY, IMAGE_GPA, 2, 0, 0).unwrap()
    }

    /// Guest memory that is only bytes, of which the `refused`th access is refused.
    struct Bytes {
        bytes: Mutex<Vec<u8>>,
        accesses: AtomicU64,
        refused: Option<u64>,
    }

    impl Bytes {
        fn new() -> Self {
            Self {
                bytes: Mutex::new(vec![0; MEMORY as usize]),
                accesses: AtomicU64::new(0),
                refused: None,
            }
        }

        fn access(&self) -> Result<(), Cause> {
            let number = self.accesses.fetch_add(1, Ordering::Relaxed);
            match self.refused == Some(number) {
                true => Err("refused".into()),
                false => Ok(()),
            }
        }

        fn word(&self, gpa: u64) -> u64 {
            let bytes = self.bytes.lock().unwrap();
            u64::from_le_bytes(bytes[gpa as usize..][..8].try_into().unwrap())
        }

        fn put(&self, gpa: u64, word: u64) {
            self.bytes.lock().unwrap()[gpa as usize..][..8].copy_from_slice(&word.to_le_bytes());
        }

        fn turn(vcpu: u64) -> u64 {
            let turns = GENERATION_GPA + offset_of!(GenerationPage, turns) as u64;
            turns + vcpu * size_of::<Turn>() as u64
        }

        /// As if vCPU 0 had drawn `count` numbers, the digest of which is `digest`.
        fn draw(&self, count: u64, digest: u64) {
            self.put(Self::turn(0) + offset_of!(Turn, count) as u64, count);
            let log = layout().vcpu_page(0) + offset_of!(VcpuPage, draws) as u64;
            let entry = (count - 1) % DRAW_LOG * size_of::<Draw>() as u64;
            let at = offset_of!(DrawLog, last) as u64 + entry + offset_of!(Draw, digest) as u64;
            self.put(log + at, digest);
        }
    }

    impl GuestRam for Bytes {
        fn len(&self) -> u64 {
            MEMORY
        }
        fn write_fault(&self, _: u64) -> Result<bool, Cause> {
            Ok(false)
        }
        fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
            self.access()?;
            buf.copy_from_slice(&self.bytes.lock().unwrap()[gpa as usize..][..buf.len()]);
            Ok(())
        }
        fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
            self.access()?;
            self.bytes.lock().unwrap()[gpa as usize..][..buf.len()].copy_from_slice(buf);
            Ok(())
        }
    }

    #[test]
    fn a_generation_is_laid_out_as_the_guest_reads_it() {
        let ram = Bytes::new();
        let booted = Incarnations::new(Entropy::Seed(7))
            .boot(&ram, &layout())
            .unwrap();
        let given = booted.generation;
        assert_eq!((booted.number, given.counter, booted.origin), (1, 1, None));
        let word = |offset: usize| ram.word(GENERATION_GPA + offset as u64);
        assert_eq!(word(offset_of!(GenerationPage, magic)), GENERATION_MAGIC);
        let generation = offset_of!(GenerationPage, generation);
        assert_eq!(word(generation + offset_of!(Generation, counter)), 1);
        let id = generation + offset_of!(Generation, id);
        assert_eq!([word(id), word(id + 8)], given.id);
        let seed = generation + offset_of!(Generation, seed);
        assert_eq!(
            [0, 8, 16, 24].map(|word_at| word(seed + word_at)),
            given.seed
        );
        for vcpu in 0..2 {
            assert_eq!(ram.word(Bytes::turn(vcpu)), 1);
        }
        // No vCPU has it, and so nobody writes it.
        assert_eq!(ram.word(Bytes::turn(2)), 0);
    }

    #[test]
    fn each_of_very_many_vcpus_is_told() {
        let ram = Bytes::new();
        let memory = 1 << 30;
        let layout = Layout::new(memory, IMAGE_GPA, MAX_VCPUS, 0, 0).unwrap();
        let incarnations = Incarnations::new(Entropy::Seed(7));
        incarnations.boot(&ram, &layout).unwrap();
        for vcpu in 0..MAX_VCPUS {
            assert_eq!(ram.word(Bytes::turn(vcpu)), 1, "vcpu {vcpu}");
        }
        assert_eq!(ram.word(Bytes::turn(MAX_VCPUS)), 0);
    }

    #[test]
    fn a_copy_has_another_generation_and_knows_what_was_drawn() {
        let ram = Bytes::new();
        let incarnations = Incarnations::new(Entropy::Seed(7));
        let booted = incarnations.boot(&ram, &layout()).unwrap();
        ram.draw(37, 99);
        let mut known = HashSet::from([booted.generation.id, [0; 2]]);
        for number in 2..5 {
            let copy = incarnations.copy(&ram, &layout(), &booted).unwrap();
            assert_eq!((copy.number, copy.generation.counter), (number, number));
            assert!(known.insert(copy.generation.id));
            let origin = copy.origin.unwrap();
            assert_eq!(
                (origin.incarnation, origin.generation),
                (1, booted.generation)
            );
            let of_0 = Drawn {
                count: 37,
                digest: 99,
            };
            assert_eq!(origin.drawn, [of_0, Drawn::default()]);
            // What the guest has counted stays.
            assert_eq!(ram.word(Bytes::turn(0)), number);
            assert_eq!(
                ram.word(Bytes::turn(0) + offset_of!(Turn, count) as u64),
                37
            );
        }
    }

    #[test]
    fn seeds_repeat_generations_and_the_host_does_not() {
        let words = |entropy: Entropy, number| entropy.words(number).unwrap();
        assert_eq!(words(Entropy::Seed(1), 2), words(Entropy::Seed(1), 2));
        let mut seen = HashSet::from([0]);
        for [some, others] in [
            [words(Entropy::Seed(1), 1), words(Entropy::Seed(1), 2)],
            [words(Entropy::Seed(2), 1), words(Entropy::Seed(2), 2)],
            [words(Entropy::Host, 1), words(Entropy::Host, 1)],
        ] {
            for word in some.into_iter().chain(others) {
                assert!(seen.insert(word), "{word:#x} twice");
            }
        }
    }

    /// Whatever is refused, memory has all of the new generation or nothing of it.
    #[test]
    fn an_access_that_is_refused_begins_nothing() {
        let incarnations = Incarnations::new(Entropy::Seed(7));
        let mut ram = Bytes::new();
        let booted = incarnations.boot(&ram, &layout()).unwrap();
        ram.draw(3, 4);
        let before = ram.bytes.lock().unwrap().clone();
        let mut refusals = 0;
        loop {
            ram.refused = Some(refusals);
            ram.accesses.store(0, Ordering::Relaxed);
            match incarnations.copy(&ram, &layout(), &booted) {
                Ok(_) => break,
                Err(error) => {
                    assert!(matches!(error, IncarnationError::Memory { .. }), "{error}");
                    assert!(*ram.bytes.lock().unwrap() == before, "access {refusals}");
                }
            }
            refusals += 1;
        }
        // Two turns, one digest, the page read and written.
        assert_eq!(refusals, 5);
    }
}
