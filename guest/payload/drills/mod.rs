//! The drills, one idea a file, and what they share: pages to work on, a count of rounds, a way to fail.

mod areas;
mod bases;
mod bits;
mod code;
mod emulated;
mod fresh;
mod locked;
mod patched;
mod registers;
mod remapped;
mod request;
mod segments;
mod split;
mod stack;
mod store;
mod strings;
mod tables;
mod talk;
mod touch;
mod vectors;

use core::arch::asm;
use core::fmt;
use core::hint::spin_loop;

use crate::abi::{BootInfo, Layout, PAGE_SIZE, VcpuPage};
use crate::cpu::{self, Feature};
use crate::drill::Drill;
use crate::{console, rt};

/// Does `drill` on vCPU `index`.
pub fn run(drill: Drill, boot: &BootInfo, index: u64) -> ! {
    let vcpu = Vcpu {
        drill,
        boot,
        index,
        rounds: 0,
    };
    match drill {
        Drill::PatchedCode => patched::run(vcpu),
        Drill::Smsw => store::repeat(vcpu, 4, emulated::SMSW),
        Drill::Sldt => store::repeat(vcpu, 4, emulated::SLDT),
        Drill::Str => store::repeat(vcpu, 4, emulated::STR),
        Drill::Sgdt => store::repeat(vcpu, 4, emulated::SGDT),
        Drill::Sidt => store::repeat(vcpu, 4, emulated::SIDT),
        Drill::Registers => registers::run(vcpu),
        Drill::Bases => bases::run(vcpu),
        Drill::Strings => strings::run(vcpu),
        Drill::SplitCounter => split::run(vcpu),
        Drill::Segments => {
            vcpu.needs(Feature::FsGsBase, "wrfsbase");
            store::repeat(vcpu, 4, segments::STORES)
        }
        Drill::BitTests => store::repeat(vcpu, 4, bits::STORES),
        Drill::Stack => store::repeat(vcpu, 8, stack::STORES),
        Drill::ClearLine => {
            vcpu.needs(Feature::Clzero, "clzero");
            store::repeat(vcpu, 4, areas::CLEAR_LINE)
        }
        Drill::StateAreas => {
            vcpu.needs(Feature::Xsave, "xsave");
            store::repeat(vcpu, 4, areas::STATE)
        }
        Drill::MaskedStores => {
            vcpu.needs(Feature::Avx2, "AVX2");
            store::repeat(vcpu, 4, vectors::MASKED)
        }
        Drill::Scatter => {
            vcpu.needs(Feature::Avx512, "AVX-512");
            store::repeat(vcpu, vectors::SCATTERED_PAGES, vectors::SCATTER)
        }
        Drill::OneRequest => alone(vcpu, request::run),
        Drill::Talk => alone(vcpu, talk::run),
        Drill::CodeInTables => alone(vcpu, code::run),
        Drill::AccessedBits => fresh::run(vcpu),
        Drill::ClearedBits => touch::run(vcpu),
        Drill::Remapped => remapped::run(vcpu),
        Drill::LockedTables => alone(vcpu, locked::run),
    }
}

/// Does `drill` on vCPU 0; the others spin.
fn alone(vcpu: Vcpu<'_>, drill: fn(Vcpu<'_>) -> !) -> ! {
    if vcpu.index != 0 {
        spin();
    }
    drill(vcpu)
}

fn spin() -> ! {
    loop {
        spin_loop();
    }
}

/// A vCPU at its drill.
pub struct Vcpu<'a> {
    drill: Drill,
    boot: &'a BootInfo,
    index: u64,
    rounds: u64,
}

impl Vcpu<'_> {
    fn layout(&self) -> &Layout {
        &self.boot.layout
    }

    /// One round is done, and found good.
    fn round_done(&mut self) {
        self.rounds += 1;
        self.say_rounds();
    }

    /// Says how many rounds are done, where the VMM looks for operations.
    fn say_rounds(&self) {
        let page = self.layout().vcpu_page(self.index) as *mut VcpuPage;
        // SAFETY: no compiled code uses the MMX registers, and the page is this vCPU's alone. Volatile: the
        // VMM reads it meanwhile.
        unsafe {
            asm!("movq mm7, {}", in(reg) self.rounds, out("mm7") _, options(nostack, preserves_flags));
            (&raw mut (*page).ops).write_volatile(self.rounds);
        }
    }

    /// A number that differs from round to round, and from vCPU to vCPU, in all its bytes.
    fn salt(&self) -> u64 {
        (self.rounds * 16 + self.index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Ends the run, since something is not as it must be.
    #[cold]
    fn fail(&self, what: fmt::Arguments<'_>) -> ! {
        console::print(format_args!(
            "drill {:?}, vcpu {}, round {}: {what}",
            self.drill, self.index, self.rounds
        ));
        rt::exit(1)
    }

    /// Ends the run, well, if the CPU does not have `feature`.
    fn needs(&self, feature: Feature, name: &str) {
        if !cpu::has(feature) {
            console::print(format_args!(
                "drill {:?}: this CPU has no {name} for guests",
                self.drill
            ));
            rt::exit(0);
        }
    }

    /// This vCPU's part of the hammered memory, in pieces of `pages` pages.
    fn ground(&self, pages: u64) -> Ground {
        let layout = self.layout();
        let piece = pages * PAGE_SIZE;
        let stride = piece * layout.vcpus;
        Ground {
            base: layout.hammer_base + self.index * piece,
            stride,
            pieces: (layout.memory - layout.hammer_base) / stride,
        }
    }
}

/// Pieces of hammered memory that one vCPU has to itself. The vCPUs' pieces take turns, so that they meet in
/// the same 2 MiB.
#[derive(Clone, Copy)]
pub struct Ground {
    base: u64,
    stride: u64,
    pieces: u64,
}

impl Ground {
    /// Address of piece `number`, counted round and round.
    fn piece(&self, number: u64) -> u64 {
        self.base + number % self.pieces * self.stride
    }
}

/// The word at `gva`.
fn read(gva: u64) -> u64 {
    // SAFETY: drills read mapped memory that holds no Rust object, aligned. Volatile: it changes by other
    // addresses, too.
    unsafe { (gva as *const u64).read_volatile() }
}

/// Puts `word` at `gva`.
fn write(gva: u64, word: u64) {
    // SAFETY: as in `read`.
    unsafe { (gva as *mut u64).write_volatile(word) }
}
