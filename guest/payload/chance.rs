//! The random numbers of a vCPU: where they are drawn (`draws` has how).

use core::arch::asm;
use core::mem::offset_of;

use crate::abi::{
    DRAWS_BY_FORMULA, DrawLog, GENERATION_GPA, GenerationPage, Layout, PAGE_SIZE, Turn, VcpuPage,
};
use crate::area::Area;
use crate::draws::{Drawer, Places};

/// What a vCPU draws with.
pub struct Chance {
    drawer: Drawer,
    places: Memory,
}

impl Chance {
    /// That of vCPU `vcpu`, which has drawn nothing yet.
    ///
    /// # Safety
    /// Only on that vCPU, and once: its turn and its log are written through this alone.
    pub unsafe fn new(layout: &Layout, vcpu: u64) -> Self {
        let log = layout.vcpu_page(vcpu) + offset_of!(VcpuPage, draws) as u64;
        let turns = offset_of!(GenerationPage, turns) as u64;
        Self {
            drawer: Drawer::new(vcpu),
            places: Memory {
                // SAFETY: mapped, and no Rust object lies there.
                page: unsafe { Area::new(GENERATION_GPA) },
                // SAFETY: the same, and written by the caller's vCPU alone.
                log: unsafe { Area::new(log) },
                turn: GENERATION_GPA + turns + vcpu * size_of::<Turn>() as u64,
            },
        }
    }

    /// Says that this vCPU draws by the formula.
    pub fn announce(&self) {
        let log = &self.places.log;
        log.write(offset_of!(DrawLog, draws) as u64, DRAWS_BY_FORMULA);
    }

    /// Draws a number. Nobody needs it: that it was drawn, and by whom, is what is looked at.
    pub fn draw(&mut self) {
        self.drawer.draw(&self.places);
    }
}

/// The memory of a vCPU that draws.
struct Memory {
    page: Area<PAGE_SIZE>,
    log: Area<{ size_of::<DrawLog>() as u64 }>,
    /// Gpa of its [`Turn`].
    turn: u64,
}

impl Places for Memory {
    fn generation(&self, offset: usize) -> u64 {
        self.page.read(offset as u64)
    }

    fn log(&self, offset: usize) -> u64 {
        self.log.read(offset as u64)
    }

    fn write_log(&self, offset: usize, word: u64) {
        self.log.write(offset as u64, word);
    }

    fn count(&self, from: Turn, to: Turn) -> bool {
        let counted: u8;
        // SAFETY: the turn is mapped, aligned to more than 16 bytes, and reached by this and as an area only.
        // RBX, which can't be named as an operand, is swapped in and restored. Memory is clobbered by default,
        // so that the compiler has done all earlier stores and none of the later ones.
        unsafe {
            asm!(
                "xchg rbx, rsi",
                "cmpxchg16b [rdi]",
                "sete r8b",
                "mov rbx, rsi",
                in("rdi") self.turn,
                inout("rax") from.generation => _,
                inout("rdx") from.count => _,
                inout("rsi") to.generation => _,
                in("rcx") to.count,
                out("r8b") counted,
                options(nostack)
            );
        }
        counted != 0
    }
}
