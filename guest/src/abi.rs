//! The contract between the VMM and a guest program.
//!
//! A guest is a static, non-relocatable 64-bit ELF (`ET_EXEC`) linked at [`IMAGE_GPA`]. There is no
//! kernel in it: it runs in **ring 3 from its first instruction**, in 64-bit mode, under page tables
//! that map guest-virtual addresses one to one on guest-physical ones (`gva == gpa`).
//!
//! # Entry state
//! Every vCPU starts at the ELF's entry point, at the same time, with
//!
//! | register | value |
//! |---|---|
//! | `rdi` | gpa of [`BootInfo`] ([`BOOT_INFO_GPA`]) |
//! | `rsi` | index of this vCPU, from 0 |
//! | `rsp` | top of this vCPU's stack ([`Layout::stack_top`]), 16-byte aligned, with nothing on it |
//! | `rflags` | IOPL 3, interrupts on |
//! | others | 0 |
//!
//! SSE is on. No interrupt ever comes. `syscall` and `int` are not available, there is no IDT: any
//! exception is a triple fault and ends the run as a guest crash. A guest ends by writing to
//! [`PORT_EXIT`], never by `hlt`.
//!
//! # Memory map
//! ```text
//! 0x0000_0000  not the guest's: it touches nothing here. On KVM it would read zeros; see below
//! 0x0000_2000  the I/O bitmap that allows `out` where IOPL is not kept: a page that must stay zero
//! 0x0001_0000  page tables, built by the VMM with accessed and dirty bits set; read-only to the guest by
//!              agreement. Those of more memory than LOW_MEMORY are above the image
//! 0x000f_0000  BootInfo
//! 0x000f_1000  GenerationPage, which the VMM writes anew before a copy of the guest runs: a page, and more
//!              with more than 63 vCPUs
//! 0x0010_0000  stacks, 64 KiB a vCPU, of the first LOW_STACKS vCPUs. Those of others are above the image
//! 0x0020_0000  the ELF image
//! Layout       vCPU pages, device areas, stacks and page tables that have no room below, hammered memory:
//!              see Layout, which is computed by the VMM and handed over in BootInfo
//! ```
//!
//! Guest memory begins at 0, but a guest uses nothing below [`LOWEST_GPA`]: where guest addresses are
//! addresses of a host process, nothing can be mapped there (`vm.mmap_min_addr`).
//!
//! The page at 0x2000 is there for PVM, which does not honour IOPL in ring 3 but looks into the I/O bitmap
//! of the task-state segment. The task register has its base there and a limit of a page: zeros are a
//! bitmap that allows the ports.
//!
//! # Ports
//! All are written with a 32-bit `out`; a pointer is a gpa below 4 GiB.
//!
//! | port | meaning of the value |
//! |---|---|
//! | [`PORT_CONSOLE`] | gpa of a [`Text`] to print as a line; it has no newline of its own |
//! | [`PORT_EXIT`] | exit status; 0 is success. Ends this run for all vCPUs |
//! | [`PORT_PANIC`] | gpa of a [`Text`] that says where and why; ends the run as a guest crash |
//! | [`PORT_FAILURE`] | gpa of a [`Failure`]: a check of the guest did not hold. The guest runs on |
//! | [`PORT_DOORBELL_EXIT`]` + d` | rings device `d`; the vCPU thread takes requests and pins their buffers |
//! | [`PORT_DOORBELL_EVENT`]` + d` | rings device `d` through an ioeventfd; the device thread does the same |
//!
//! # Devices
//! A device is a DMA engine with one split virtqueue of [`QUEUE_SIZE`] descriptors. A request is a chain:
//! a [`RequestHeader`] (device-readable), the data descriptors if the request streams, a [`Status`]
//! (device-writable). The guest finds completions by polling the used ring; there are no interrupts.
//!
//! # Identity
//! A guest that is cloned or rewound is not alone with what it remembers: the machine it was copied from has
//! the same seeds in its memory, and would draw the same random numbers from them. So the VMM gives each copy
//! a new [`Generation`] before its first instruction, as ACPI's VM Generation ID does, with fresh seed
//! material in it. It lies in a page of its own ([`GENERATION_GPA`]): [`BootInfo`] stays what it was at boot,
//! which snapshots are checked for, and the VMM needs to know no more of the guest to write it than how many
//! vCPUs it has.
//!
//! There are no interrupts, and so there is no notice: a guest *polls*. To read the generation, to draw, and
//! to read it again is not enough: a copy that is made after the second reading has both. The drawing must
//! end in **one instruction** that looks and acts, and each vCPU has a [`Turn`] for that, two words side by
//! side: the VMM writes the generation, the guest how much it has drawn, and `cmpxchg16b` of both is such an
//! instruction. So a guest
//!
//! 1. reads its turn;
//! 2. reads the seed, if the generation in the turn is not the one whose seed it has;
//! 3. draws, and writes down what has been drawn, where it does not count yet;
//! 4. counts it by `cmpxchg16b`. If that fails it is in a new generation: what it drew is void, and it begins
//!    again.
//!
//! All of it is voluntary. A guest that ignores the page runs as it did before there was one; under a VMM
//! that does not write it all of it is zero, and so is the seed.
//!
//! # The operation counter
//! A hammering guest keeps the number of the operation it is doing in **MM7**. No compiler uses the MMX
//! registers, so it is there whatever the vCPU was doing when it was stopped, and every snapshot's
//! XSAVE area has it: when MM7 is `n`, operations `0..n` are complete, `n` may be done in part, and
//! none beyond it has begun.

use core::ops::Range;

/// Bytes in a page, and in a frame.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes in a region: what one huge page would map.
pub const REGION_SIZE: u64 = 2 << 20;
/// The lowest address that a guest uses: the least that Linux lets a process map, as it is configured
/// everywhere (`vm.mmap_min_addr`).
pub const LOWEST_GPA: u64 = 0x1_0000;
/// Where [`BootInfo`] is.
pub const BOOT_INFO_GPA: u64 = 0xf_0000;
/// Where the [`GenerationPage`] is.
pub const GENERATION_GPA: u64 = BOOT_INFO_GPA + PAGE_SIZE;
/// Where the page tables of a guest of up to [`LOW_MEMORY`] begin: PML4, PDPT, then one page directory a GiB.
pub const PAGE_TABLES_GPA: u64 = 0x1_0000;
/// The most memory, in bytes, that there is room for page tables of below the image.
pub const LOW_MEMORY: u64 = 128 << 30;
/// Where the stacks of the first [`LOW_STACKS`] vCPUs begin.
pub const STACKS_GPA: u64 = 0x10_0000;
/// How many stacks there is room for below the image.
pub const LOW_STACKS: u64 = 16;
/// Bytes of stack a vCPU has.
pub const STACK_SIZE: u64 = 0x1_0000;
/// Where the ELF is linked and loaded. Every segment must lie at or above it.
pub const IMAGE_GPA: u64 = 0x20_0000;
/// Which ABI this is. A guest that was saved is looked at by the one that it was built for: another layout of what is
/// in memory, or another formula, is another number.
pub const ABI_VERSION: u32 = 1;
/// The most vCPUs a guest may have: what a page key has bits for, and an APIC id.
pub const MAX_VCPUS: u64 = 256;
/// The most DMA devices a guest may have.
pub const MAX_DEVICES: u64 = 8;
/// The most memory a guest may have, in bytes: half of what a process has addresses for, since without KVM
/// guest addresses are addresses of one.
pub const MAX_MEMORY: u64 = 64 << 40;

/// Console port.
pub const PORT_CONSOLE: u16 = 0x500;
/// Exit port.
pub const PORT_EXIT: u16 = 0x501;
/// Panic port.
pub const PORT_PANIC: u16 = 0x502;
/// Port for failed checks.
pub const PORT_FAILURE: u16 = 0x503;
/// First doorbell port of the kind that exits to the vCPU thread.
pub const PORT_DOORBELL_EXIT: u16 = 0x510;
/// First doorbell port of the kind that signals an ioeventfd.
pub const PORT_DOORBELL_EVENT: u16 = 0x520;

/// First word of a [`BootInfo`].
pub const BOOT_MAGIC: u64 = u64::from_le_bytes(*b"PALIMPS1");

/// Gpa just above the stack of vCPU `vcpu`, one of the first [`LOW_STACKS`]: it is there in each layout.
pub const fn stack_top(vcpu: u64) -> u64 {
    STACKS_GPA + (vcpu + 1) * STACK_SIZE
}

/// What the VMM tells the guest. Lies at [`BOOT_INFO_GPA`]; written once, before the first instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BootInfo {
    /// [`BOOT_MAGIC`].
    pub magic: u64,
    /// Seed of every formula.
    pub seed: u64,
    /// Where things are, and how many.
    pub layout: Layout,
    /// A [`Pattern`] as a number.
    pub pattern: u64,
}

/// First word of a [`GenerationPage`] that the VMM has written, in this layout.
pub const GENERATION_MAGIC: u64 = u64::from_le_bytes(*b"GENERAT1");

/// What tells copies of a guest apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Generation {
    /// One more than the memory that it is written to had before: it is another one than the guest can have
    /// seen. Two copies of one guest have the same; their ids and seeds differ.
    pub counter: u64,
    /// No other generation anywhere has it.
    pub id: [u64; 2],
    /// Seed material that nobody else is given.
    pub seed: [u64; 4],
}

/// The generation and what a vCPU has drawn, to be compared and changed as one.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// [`Generation::counter`], of the VMM.
    pub generation: u64,
    /// Numbers that the vCPU has drawn since the guest was booted, of the guest. The VMM leaves it as it is.
    pub count: u64,
}

/// What lies at [`GENERATION_GPA`]. The VMM writes it while no vCPU runs: before the guest's first
/// instruction, and before the first instruction of each copy of it. What lies behind the turns of a guest's
/// vCPUs it leaves alone: a guest of up to 63 vCPUs has one page of it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GenerationPage {
    /// [`GENERATION_MAGIC`]; 0 if the VMM knows of no generations.
    pub magic: u64,
    /// The generation.
    pub generation: Generation,
    /// By vCPU; a cache line each, so that nobody waits.
    pub turns: [Turn; MAX_VCPUS as usize],
}

impl GenerationPage {
    /// Bytes of it that a guest of so many vCPUs has: they end behind the last turn.
    pub const fn len_for(vcpus: u64) -> u64 {
        (core::mem::offset_of!(Self, turns) + vcpus as usize * core::mem::size_of::<Turn>()) as u64
    }
}

/// How a vCPU chooses the page of its next operation.
#[repr(u64)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Page after page, over and over.
    Dense = 0,
    /// Every page once an epoch, in an order that differs from epoch to epoch.
    Uniform = 1,
    /// Nine operations of ten in a tenth of the pages, each set in the manner of [`Pattern::Uniform`].
    Hot = 2,
    /// One page of every 2 MiB region, region after region.
    Sparse = 3,
}

impl Pattern {
    /// The pattern with number `raw`, if there is one.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        Some(match raw {
            0 => Self::Dense,
            1 => Self::Uniform,
            2 => Self::Hot,
            3 => Self::Sparse,
            _ => return None,
        })
    }
}

/// Where the parts of guest memory above the image are.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of guest memory, from gpa 0.
    pub memory: u64,
    /// Number of vCPUs.
    pub vcpus: u64,
    /// Number of devices.
    pub devices: u64,
    /// Registered buffers of each device.
    pub registered: u64,
    /// Gpa of the first vCPU's [`VcpuPage`]; they lie [`VCPU_STRIDE`] apart. They have a region of their own,
    /// in which nothing is pinned.
    pub vcpu_base: u64,
    /// Gpa of the first device area; they lie [`DEVICE_STRIDE`] apart.
    pub device_base: u64,
    /// Gpa at which the stack of vCPU [`LOW_STACKS`] begins, if there is one. Those of the vCPUs after it
    /// follow. In the first 4 GiB, as all that a guest points a port at.
    pub stacks_base: u64,
    /// Gpa of the page tables: [`PAGE_TABLES_GPA`], or above the image if there is no room there.
    pub page_tables: u64,
    /// Gpa of the hammered memory, aligned to [`REGION_SIZE`]; it reaches to the end of memory.
    pub hammer_base: u64,
}

impl Layout {
    /// Lays out a guest whose image ends at `image_end`. `None` if `memory` does not leave at least one
    /// whole 2 MiB region a vCPU to hammer, or a count is out of range.
    pub const fn new(
        memory: u64,
        image_end: u64,
        vcpus: u64,
        devices: u64,
        registered: u64,
    ) -> Option<Self> {
        if vcpus == 0
            || vcpus > MAX_VCPUS
            || devices > MAX_DEVICES
            || registered > MAX_REGISTERED
            || memory > MAX_MEMORY
            || !memory.is_multiple_of(PAGE_SIZE)
            || image_end < IMAGE_GPA
            || image_end > memory
        {
            return None;
        }
        let vcpu_base = image_end.next_multiple_of(REGION_SIZE);
        let device_base = (vcpu_base + vcpus * VCPU_STRIDE).next_multiple_of(REGION_SIZE);
        let stacks_base = device_base + devices * DEVICE_STRIDE;
        let stacks_end = stacks_base + vcpus.saturating_sub(LOW_STACKS) * STACK_SIZE;
        let (page_tables, end) = if memory <= LOW_MEMORY {
            (PAGE_TABLES_GPA, stacks_end)
        } else {
            let first = stacks_end.next_multiple_of(REGION_SIZE);
            (first, first + page_tables_size(memory))
        };
        let hammer_base = end.next_multiple_of(REGION_SIZE);
        if hammer_base + vcpus * REGION_SIZE > memory {
            return None;
        }
        Some(Self {
            memory,
            vcpus,
            devices,
            registered,
            vcpu_base,
            device_base,
            stacks_base,
            page_tables,
            hammer_base,
        })
    }

    /// Gpa just above the stack of vCPU `vcpu`.
    pub const fn stack_top(&self, vcpu: u64) -> u64 {
        if vcpu < LOW_STACKS {
            stack_top(vcpu)
        } else {
            self.stacks_base + (vcpu - LOW_STACKS + 1) * STACK_SIZE
        }
    }

    /// Where the stacks are: those below the image, and the others.
    pub const fn stacks(&self) -> [Range<u64>; 2] {
        let low = if self.vcpus < LOW_STACKS {
            self.vcpus
        } else {
            LOW_STACKS
        };
        let high = (self.vcpus - low) * STACK_SIZE;
        [
            STACKS_GPA..STACKS_GPA + low * STACK_SIZE,
            self.stacks_base..self.stacks_base + high,
        ]
    }

    /// Gpa of the [`VcpuPage`] of vCPU `vcpu`.
    pub const fn vcpu_page(&self, vcpu: u64) -> u64 {
        self.vcpu_base + vcpu * VCPU_STRIDE
    }

    /// Gpa of the area of device `device`.
    pub const fn device_area(&self, device: u64) -> u64 {
        self.device_base + device * DEVICE_STRIDE
    }

    /// Number of hammered pages vCPU `vcpu` owns under `pattern`: the range of its slots.
    ///
    /// vCPUs interleave page by page (region by region under [`Pattern::Sparse`]), so that they collide in
    /// the same 2 MiB.
    pub const fn slots(&self, pattern: Pattern, vcpu: u64) -> u64 {
        let unit = match pattern {
            Pattern::Sparse => REGION_SIZE,
            _ => PAGE_SIZE,
        };
        ((self.memory - self.hammer_base) / unit + self.vcpus - 1 - vcpu) / self.vcpus
    }

    /// The vCPU and its slot whose page is at `gpa`, if one is.
    pub const fn slot_at(&self, pattern: Pattern, gpa: u64) -> Option<(u64, u64)> {
        if gpa < self.hammer_base {
            return None;
        }
        let unit = match pattern {
            Pattern::Sparse => (gpa - self.hammer_base) / REGION_SIZE,
            _ => (gpa - self.hammer_base) / PAGE_SIZE,
        };
        let (vcpu, slot) = (unit % self.vcpus, unit / self.vcpus);
        if slot < self.slots(pattern, vcpu) && self.slot_gpa(pattern, vcpu, slot) == gpa {
            Some((vcpu, slot))
        } else {
            None
        }
    }

    /// Gpa of slot `slot` of vCPU `vcpu`.
    pub const fn slot_gpa(&self, pattern: Pattern, vcpu: u64, slot: u64) -> u64 {
        let unit = slot * self.vcpus + vcpu;
        match pattern {
            // A page that differs from region to region, so that not all of them share cache sets.
            Pattern::Sparse => {
                self.hammer_base + unit * REGION_SIZE + (unit * 37 % 512) * PAGE_SIZE
            }
            _ => self.hammer_base + unit * PAGE_SIZE,
        }
    }
}

/// Bytes of the page tables of a guest of `memory` bytes, which map it in pages of 2 MiB: one table of the
/// fourth level, one of the third for each 512 GiB, one of the second for each GiB.
pub const fn page_tables_size(memory: u64) -> u64 {
    (1 + memory.div_ceil(512 << 30) + memory.div_ceil(1 << 30)) * PAGE_SIZE
}

/// Bytes from one [`VcpuPage`] to the next.
pub const VCPU_STRIDE: u64 = 8 * PAGE_SIZE;
/// Buckets in [`VcpuPage::gaps`].
pub const GAP_BUCKETS: usize = 1024;
/// A gap that ended at TSC value `t` is kept in the bucket with tag `t >> GAP_SHIFT`.
pub const GAP_SHIFT: u32 = 22;

/// What [`VcpuPage::formula`] holds when it holds.
pub const FOLLOWS_FORMULA: u64 = u64::from_le_bytes(*b"FORMULA1");

/// What a vCPU says of itself, for the VMM to read. Spans several pages.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct VcpuPage {
    /// Operations complete. MM7 is the truth; this is for the live display.
    pub ops: u64,
    /// TSC when the last operation was complete.
    pub last_tsc: u64,
    /// Checks of the guest's own that did not hold.
    pub failures: u64,
    /// [`FOLLOWS_FORMULA`] once this vCPU's hammered pages and devices follow `guest::formula`: the VMM then
    /// checks them in every snapshot. Else it only checks that snapshots do not change.
    pub formula: u64,
    /// Which registers this vCPU holds by formula: the bits that `guest::registers` has. 0 is none.
    pub held: u64,
    /// Gpas of the code that holds them over a page: where the check of the page begins, where writing it
    /// begins, and where that ends.
    pub holds: [u64; 3],
    /// What the others have left here: see [`mark_offset`].
    pub marks: [MarkLine; MARK_LINES as usize],
    /// What the vCPU has drawn.
    pub draws: DrawLog,
    /// Unused by the payload.
    pub reserved: [u64; 8],
    /// The longest gap between two operations, by the time it ended.
    /// Bucket `tag % GAP_BUCKETS`; a bucket whose tag differs is stale.
    pub gaps: [Gap; GAP_BUCKETS],
}

/// Cache lines of marks: as many vCPUs leave them without waiting for each other.
pub const MARK_LINES: u64 = 32;

/// Marks that vCPUs leave in another's page, so that it can be told whether both were captured at one
/// instant: at no instant is there a mark of an operation that its vCPU has not done yet (Lamport, 1978). With
/// up to [`MARK_LINES`] vCPUs each has a cache line for its own, so that nobody waits.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct MarkLine {
    /// Operations that a vCPU had done: `formula::last_mark` of what it has done now, or of one less.
    pub ops: [u64; (MAX_VCPUS / MARK_LINES) as usize],
}

/// Offset in a [`VcpuPage`] of the mark that vCPU `from` leaves there.
pub const fn mark_offset(from: u64) -> u64 {
    let line = from % MARK_LINES * core::mem::size_of::<MarkLine>() as u64;
    core::mem::offset_of!(VcpuPage, marks) as u64 + line + from / MARK_LINES * 8
}

/// What [`DrawLog::draws`] holds when it holds.
pub const DRAWS_BY_FORMULA: u64 = u64::from_le_bytes(*b"DRAWING1");
/// Operations from one draw to the next: a vCPU that has done `n` operations has drawn `n / DRAW_EVERY`
/// numbers, or has the last of them still to draw.
pub const DRAW_EVERY: u64 = 16;
/// Draws that a [`DrawLog`] has room for.
pub const DRAW_LOG: u64 = 16;

/// The random numbers that a vCPU has drawn last. How many they are says its [`Turn`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DrawLog {
    /// [`DRAWS_BY_FORMULA`] if this vCPU draws numbers as `guest::draws` says: the VMM then checks them.
    pub draws: u64,
    /// Draw `i` is at `i % DRAW_LOG`. The place of the next one may hold anything.
    pub last: [Draw; DRAW_LOG as usize],
}

/// A number that was drawn.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draw {
    /// [`Generation::counter`] of the generation it is of.
    pub generation: u64,
    /// How many the vCPU had drawn before it since the guest was booted.
    pub index: u64,
    /// The number.
    pub number: [u64; 2],
    /// `formula::draw_digest` of all numbers up to this one.
    pub digest: u64,
}

/// One bucket of [`VcpuPage::gaps`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Gap {
    /// `tsc >> GAP_SHIFT` of the gaps counted here.
    pub tag: u64,
    /// The longest of them, in TSC ticks.
    pub ticks: u64,
}

/// A string in guest memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Text {
    /// Gpa of the first byte.
    pub gpa: u64,
    /// Bytes, at most [`MAX_TEXT`]; the VMM cuts what is longer.
    pub len: u64,
}

/// The longest [`Text`] the VMM reads, in bytes.
pub const MAX_TEXT: u64 = 4096;

/// A check of the guest that did not hold.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    /// A [`FailureKind`] as a number.
    pub kind: u64,
    /// The vCPU that found it.
    pub vcpu: u64,
    /// Its operation at the time.
    pub op: u64,
    /// Gpa of the word that is wrong.
    pub gpa: u64,
    /// What it should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
    /// Device of a DMA failure, else 0.
    pub device: u64,
    /// Sequence number of a DMA failure's request, else 0.
    pub seq: u64,
}

/// What a [`Failure`] is about.
#[repr(u64)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// A hammered page does not hold what its last writer wrote.
    Page = 1,
    /// What a device wrote is not in the buffer.
    DmaToGuest = 2,
    /// The device says that what it read from the buffer is not what the guest wrote there.
    DmaFromGuest = 3,
    /// The guest's own bytes beside a DMA buffer, on the same page, were lost.
    Margin = 4,
    /// A completion that makes no sense: unknown descriptor, wrong sequence number or status.
    Ring = 5,
    /// A register does not hold what the vCPU put there. There is no gpa.
    Register = 6,
}

impl FailureKind {
    /// The kind with number `raw`, if there is one.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        Some(match raw {
            1 => Self::Page,
            2 => Self::DmaToGuest,
            3 => Self::DmaFromGuest,
            4 => Self::Margin,
            5 => Self::Ring,
            6 => Self::Register,
            _ => return None,
        })
    }
}

/// Descriptors in a device's queue.
pub const QUEUE_SIZE: u16 = 64;
/// Streaming request slots of a device. Slot `s` uses descriptors `4 * s .. 4 * s + 4`.
pub const STREAM_SLOTS: u64 = 8;
/// The most registered buffers a device may have at once; buffer `b` is slot `STREAM_SLOTS + b` and uses
/// descriptors `32 + 2 * b .. 32 + 2 * b + 2`.
pub const MAX_REGISTERED: u64 = 16;
/// All slots of a device.
pub const SLOTS: u64 = STREAM_SLOTS + MAX_REGISTERED;

/// Bytes from one device area to the next.
pub const DEVICE_STRIDE: u64 = 128 * PAGE_SIZE;
/// Offset of the descriptor table in a device area.
pub const AREA_DESC: u64 = 0;
/// Offset of the available ring.
pub const AREA_AVAIL: u64 = PAGE_SIZE;
/// Offset of the used ring.
pub const AREA_USED: u64 = 2 * PAGE_SIZE;
/// Offset of the [`DriverPage`].
pub const AREA_DRIVER: u64 = 3 * PAGE_SIZE;
/// Offset of the [`RequestHeader`]s, one a slot, 64 bytes apart.
pub const AREA_HEADERS: u64 = 4 * PAGE_SIZE;
/// Offset of the [`Status`]es, one a slot, 64 bytes apart.
pub const AREA_STATUS: u64 = 5 * PAGE_SIZE;
/// Bytes from one header, or status, to the next.
pub const SLOT_STRIDE: u64 = 64;
/// Offset of the buffers, one a slot, [`BUFFER_STRIDE`] apart.
pub const AREA_BUFFERS: u64 = 8 * PAGE_SIZE;
/// Bytes from one buffer to the next: its pages are its own.
pub const BUFFER_STRIDE: u64 = 4 * PAGE_SIZE;
/// Offset of the bytes a device transfers in a buffer. What lies before them on the page is
/// the guest's: the *margin*.
pub const DATA_OFFSET: u64 = 512;
/// Bytes a device transfers. They end in the middle of the last page; the rest of that page is margin too.
pub const DATA_LEN: u64 = 3 * PAGE_SIZE - 1024;
/// A streaming request's data is two descriptors; this many bytes are in the first.
pub const DATA_SPLIT: u64 = 5000;
/// Bytes of a buffer that are used, margins included.
pub const BUFFER_LEN: u64 = 3 * PAGE_SIZE;

const _: () = assert!(AREA_BUFFERS + SLOTS * BUFFER_STRIDE <= DEVICE_STRIDE);
const _: () = assert!(core::mem::size_of::<VcpuPage>() as u64 <= VCPU_STRIDE);
const _: () = assert!(core::mem::size_of::<DriverPage>() as u64 <= PAGE_SIZE);
const _: () = assert!(LOWEST_GPA <= PAGE_TABLES_GPA);
const _: () = assert!(PAGE_TABLES_GPA + page_tables_size(LOW_MEMORY) <= BOOT_INFO_GPA);
const _: () = assert!(GENERATION_GPA + GenerationPage::len_for(MAX_VCPUS) <= STACKS_GPA);
// So that one page is all that is written for a guest of so many.
const _: () = assert!(GenerationPage::len_for(63) <= PAGE_SIZE);
const _: () =
    assert!(core::mem::size_of::<MarkLine>() == 64 && MAX_VCPUS.is_multiple_of(MARK_LINES));
// So that what each operation writes is on one page.
const _: () = assert!(core::mem::offset_of!(VcpuPage, reserved) as u64 <= PAGE_SIZE);
const _: () = assert!(STACKS_GPA + LOW_STACKS * STACK_SIZE <= IMAGE_GPA);
const _: () = assert!(DATA_OFFSET + DATA_LEN <= BUFFER_LEN && DATA_SPLIT.is_multiple_of(8));

/// Offset in a device area of the buffer of slot `slot`.
pub const fn buffer_offset(slot: u64) -> u64 {
    AREA_BUFFERS + slot * BUFFER_STRIDE
}

/// First descriptor of slot `slot`: the head of its chain.
pub const fn slot_head(slot: u64) -> u64 {
    if slot < STREAM_SLOTS {
        4 * slot
    } else {
        4 * STREAM_SLOTS + 2 * (slot - STREAM_SLOTS)
    }
}

/// The slot whose chain begins at descriptor `head`, if one does.
pub const fn slot_of_head(head: u64) -> Option<u64> {
    let streaming = 4 * STREAM_SLOTS;
    if head < streaming && head.is_multiple_of(4) {
        Some(head / 4)
    } else if head >= streaming && head < streaming + 2 * MAX_REGISTERED && head.is_multiple_of(2) {
        Some(STREAM_SLOTS + (head - streaming) / 2)
    } else {
        None
    }
}

/// What a request asks for. Device-readable.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RequestHeader {
    /// A [`RequestKind`] as a number.
    pub kind: u32,
    /// Registered buffer the request is about, from 0; 0 for streaming requests.
    pub buffer: u32,
    /// Number of the request, unique on its device. It names the data.
    pub seq: u64,
    /// To register: gpa of the bytes. Else 0.
    pub gpa: u64,
    /// To register: how many they are. Else 0.
    pub len: u64,
}

/// What a request is.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Write the data of `seq` to the chain's data descriptors.
    ToGuest = 1,
    /// Read the chain's data descriptors and compare them with the data of `seq`.
    FromGuest = 2,
    /// Pin `gpa..gpa + len`, for reading and writing, and hold it as registered buffer `buffer`.
    Register = 3,
    /// [`RequestKind::ToGuest`], with the registered buffer for data.
    RegisteredToGuest = 4,
    /// [`RequestKind::FromGuest`], with the registered buffer for data.
    RegisteredFromGuest = 5,
    /// [`RequestKind::Register`], for reading only.
    RegisterForReading = 6,
    /// Release registered buffer `buffer`.
    Unregister = 7,
}

impl RequestKind {
    /// The kind with number `raw`, if there is one.
    pub const fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            1 => Self::ToGuest,
            2 => Self::FromGuest,
            3 => Self::Register,
            4 => Self::RegisteredToGuest,
            5 => Self::RegisteredFromGuest,
            6 => Self::RegisterForReading,
            7 => Self::Unregister,
            _ => return None,
        })
    }

    /// Whether it moves data. The others are about registered buffers, whose bytes they leave as they are.
    pub const fn is_transfer(self) -> bool {
        match self {
            Self::ToGuest
            | Self::FromGuest
            | Self::RegisteredToGuest
            | Self::RegisteredFromGuest => true,
            Self::Register | Self::RegisterForReading | Self::Unregister => false,
        }
    }
}

/// How a request ended. Device-writable; 16 bytes, 16-byte aligned.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The request's `seq`.
    pub seq: u64,
    /// [`STATUS_PENDING`] (written by the guest), [`STATUS_OK`], [`STATUS_MISMATCH`]
    /// or [`STATUS_BAD_REQUEST`].
    pub code: u32,
    /// [`STATUS_MISMATCH`]: byte offset in the data of the first wrong word.
    pub offset: u32,
}

/// The device has not written this status yet.
pub const STATUS_PENDING: u32 = 0;
/// The request was done.
pub const STATUS_OK: u32 = 1;
/// The data the device read is not the data of `seq`.
pub const STATUS_MISMATCH: u32 = 2;
/// The request makes no sense.
pub const STATUS_BAD_REQUEST: u32 = 3;

/// The driver's own notes, in guest memory so that a snapshot has them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DriverPage {
    /// Entries of the used ring the driver has dealt with, as the ring counts (wraps at 2^16).
    pub last_used: u64,
    /// Next sequence number.
    pub next_seq: u64,
    /// Requests completed and checked.
    pub completed: u64,
    /// Unused.
    pub reserved: u64,
    /// What each slot is doing.
    pub slots: [DriverSlot; SLOTS as usize],
}

/// What one slot is doing.
///
/// While `state` is [`SLOT_POSTED`] the buffer's content is known: the *poison* of `seq` until a device has
/// done a to-guest request, the *data* of `seq` from then on, and from the start for a from-guest request. Of
/// a request that is no transfer it is not: the bytes are as they were.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DriverSlot {
    /// Sequence number of the slot's request.
    pub seq: u64,
    /// The [`RequestKind`] as a number.
    pub kind: u32,
    /// [`SLOT_IDLE`] or [`SLOT_POSTED`].
    pub state: u32,
    /// How many times the guest has begun to rewrite the slot's margins: their words are of this
    /// count or of the one before.
    pub margin: u64,
    /// Unused.
    pub reserved: u64,
}

/// The slot's buffer is the driver's, and may hold anything.
pub const SLOT_IDLE: u32 = 0;
/// The slot's request is on its way: content as [`DriverSlot`] says.
pub const SLOT_POSTED: u32 = 1;

/// Port by which the puppet says how far it is ([`SAYS_READY`], [`SAYS_DONE`]) and asks for its next command.
/// The `out` returns when a command is in its mailbox.
pub const PORT_MAIL: u16 = 0x530;
/// Where the puppet has its mailbox, a [`Mail`]: where others have stacks, since it has none.
pub const MAIL_GPA: u64 = STACKS_GPA;
/// The puppet was started and has done nothing yet.
pub const SAYS_READY: u32 = 0;
/// The puppet has done the last command.
pub const SAYS_DONE: u32 = 1;
/// Command: read the word at [`Mail::address`] into [`Mail::word`].
pub const MAIL_READ: u64 = 1;
/// Command: write [`Mail::word`] to [`Mail::address`].
pub const MAIL_WRITE: u64 = 2;

/// What the puppet is to do, and what came of it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Mail {
    /// [`MAIL_READ`] or [`MAIL_WRITE`]; anything else is a crash.
    pub command: u64,
    /// Where, as the puppet sees memory.
    pub address: u64,
    /// The word to write, or the word that was read.
    pub word: u64,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn numbers_name_what_they_are() {
        for raw in 0..10 {
            if let Some(pattern) = Pattern::from_raw(raw) {
                assert_eq!(pattern as u64, raw);
            }
            if let Some(kind) = FailureKind::from_raw(raw) {
                assert_eq!(kind as u64, raw);
            }
            if let Some(kind) = RequestKind::from_raw(raw as u32) {
                assert_eq!(u64::from(kind as u32), raw);
            }
        }
        assert_eq!((0..100).filter_map(Pattern::from_raw).count(), 4);
        assert_eq!((0..100).filter_map(FailureKind::from_raw).count(), 6);
        assert_eq!((0..100).filter_map(RequestKind::from_raw).count(), 7);
    }

    #[test]
    fn slots_have_chains_of_their_own() {
        let heads: Vec<_> = (0..SLOTS).map(slot_head).collect();
        for (slot, &head) in heads.iter().enumerate() {
            assert_eq!(slot_of_head(head), Some(slot as u64));
        }
        let known = (0..1000).filter(|&head| slot_of_head(head).is_some());
        assert_eq!(known.collect::<Vec<_>>(), heads);
        assert!(heads[SLOTS as usize - 1] + 2 <= u64::from(QUEUE_SIZE));
    }

    #[test]
    fn vcpus_share_out_the_hammered_memory() {
        for vcpus in (1..=17).chain([64, 255, MAX_VCPUS]) {
            // An end in the middle of a region.
            let memory = (64 + 2 * vcpus) * REGION_SIZE + 37 * PAGE_SIZE;
            let layout = Layout::new(memory, IMAGE_GPA + 12_345, vcpus, 2, 3).unwrap();
            for pattern in [Pattern::Dense, Pattern::Sparse] {
                let mut pages = HashSet::new();
                for vcpu in 0..vcpus {
                    let slots = layout.slots(pattern, vcpu);
                    assert!(slots > 0);
                    for slot in 0..slots {
                        let gpa = layout.slot_gpa(pattern, vcpu, slot);
                        assert!(gpa.is_multiple_of(PAGE_SIZE));
                        assert!(gpa >= layout.hammer_base && gpa + PAGE_SIZE <= memory);
                        assert!(pages.insert(gpa));
                        assert_eq!(layout.slot_at(pattern, gpa), Some((vcpu, slot)));
                    }
                }
                let unit = match pattern {
                    Pattern::Sparse => REGION_SIZE,
                    _ => PAGE_SIZE,
                };
                assert_eq!(pages.len() as u64, (memory - layout.hammer_base) / unit);
                // No other page is anybody's.
                let others = (0..memory + REGION_SIZE).step_by(PAGE_SIZE as usize);
                assert!(
                    others
                        .filter(|gpa| !pages.contains(gpa))
                        .all(|gpa| layout.slot_at(pattern, gpa).is_none())
                );
            }
        }
    }

    #[test]
    fn parts_of_a_layout_do_not_overlap() {
        let layout = Layout::new(64 << 20, IMAGE_GPA + 12_345, 3, 2, 0).unwrap();
        assert!(layout.vcpu_base >= IMAGE_GPA + 12_345);
        assert!(layout.vcpu_base.is_multiple_of(REGION_SIZE));
        assert!(layout.vcpu_page(3) <= layout.device_area(0));
        assert_ne!(
            layout.vcpu_page(2) / REGION_SIZE,
            layout.device_area(0) / REGION_SIZE
        );
        assert!(layout.device_area(2) <= layout.hammer_base);
        assert!(layout.hammer_base.is_multiple_of(REGION_SIZE));
    }

    #[test]
    fn a_layout_of_few_vcpus_and_little_memory_has_nothing_of_the_others() {
        for vcpus in [1, LOW_STACKS] {
            for memory in [64 << 20, LOW_MEMORY] {
                let layout = Layout::new(memory, IMAGE_GPA + 12_345, vcpus, 2, 0).unwrap();
                let [low, high] = layout.stacks();
                assert_eq!(low.end, stack_top(vcpus - 1));
                assert!(high.is_empty());
                assert_eq!(layout.page_tables, PAGE_TABLES_GPA);
                let devices_end = layout.device_base + 2 * DEVICE_STRIDE;
                assert_eq!(
                    layout.hammer_base,
                    devices_end.next_multiple_of(REGION_SIZE)
                );
            }
        }
    }

    #[test]
    fn marks_of_vcpus_do_not_overlap_and_few_share_no_line() {
        let marks: Vec<_> = (0..MAX_VCPUS).map(mark_offset).collect();
        let first = core::mem::offset_of!(VcpuPage, marks) as u64;
        let end = first + MARK_LINES * 64;
        assert!(
            marks
                .iter()
                .all(|at| (first..end).contains(at) && at % 8 == 0)
        );
        assert_eq!(marks.iter().collect::<HashSet<_>>().len(), 256);
        let lines: HashSet<_> = marks[..MARK_LINES as usize]
            .iter()
            .map(|at| at / 64)
            .collect();
        assert_eq!(lines.len() as u64, MARK_LINES);
    }

    #[test]
    fn impossible_layouts_are_refused() {
        let fits = |memory, image_end, vcpus, devices, registered| {
            Layout::new(memory, image_end, vcpus, devices, registered).is_some()
        };
        assert!(fits(64 << 20, IMAGE_GPA, 1, 0, 0));
        assert!(fits(MAX_MEMORY, IMAGE_GPA, MAX_VCPUS, MAX_DEVICES, 0));
        assert!(!fits(64 << 20, IMAGE_GPA, MAX_VCPUS, 0, 0));
        assert!(!fits(64 << 20, IMAGE_GPA, 0, 0, 0));
        assert!(!fits(64 << 20, IMAGE_GPA, MAX_VCPUS + 1, 0, 0));
        assert!(!fits(64 << 20, IMAGE_GPA, 1, MAX_DEVICES + 1, 0));
        assert!(!fits(64 << 20, IMAGE_GPA, 1, 1, MAX_REGISTERED + 1));
        assert!(!fits((64 << 20) + 1, IMAGE_GPA, 1, 0, 0));
        assert!(!fits(MAX_MEMORY + PAGE_SIZE, IMAGE_GPA, 1, 0, 0));
        assert!(!fits(64 << 20, IMAGE_GPA - 1, 1, 0, 0));
        assert!(!fits(64 << 20, u64::MAX, 1, 0, 0));
        assert!(!fits(0, IMAGE_GPA, 1, 0, 0));
        assert!(!fits(4 << 20, IMAGE_GPA, 1, 0, 0));
    }
}
