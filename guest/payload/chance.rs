//! The random numbers of a vCPU: where they are drawn (`draws` has how).

use core::mem::offset_of;

use crate::abi::{
    DRAWS_BY_FORMULA, DrawLog, GENERATION_GPA, GenerationPage, Layout, Turn, VcpuPage,
};
use crate::area::Area;
use crate::draws::{Drawer, Places, count};

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
    page: Area<{ size_of::<GenerationPage>() as u64 }>,
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
        // SAFETY: mapped, and reached by this and as an area only.
        unsafe { count(self.turn as *mut Turn, from, to) }
    }
}
