//! The way into guest code and out of it, on one thread.
//!
//! ```text
//!   enter ── bases of FS and GS, rt_sigreturn with the guest's frame ──> guest code
//!     ^                                                                     │ a signal
//!     └── VMM's stack, rest of its registers ── came_out <── signal_entry <─┘ on the alternate stack
//! ```
//! Going in is one system call: `rt_sigreturn` sets all registers from a *frame* as the kernel lays it out
//! for signal handlers (`arch/x86/include/uapi/asm/sigcontext.h`), and the signal mask with them. So a kick
//! is blocked whenever the VMM runs and let in as the guest is entered: one that comes between the last look
//! at the command and the guest's first instruction is not lost, but delivered there.
//!
//! Coming out is a signal, whose handler begins on the thread's alternate stack. At the base of that stack is
//! the thread's [`Block`], which the handler finds by what the kernel says of the stack in the frame: neither
//! the guest's stack nor its FS base, and so no thread-local variable, is used before the VMM's are back. The
//! frame is copied, and the handler does not return: it goes on where [`enter`](Crossing::enter) was called.
//! No register can be lost on the way, since the kernel saves and sets all of them that a thread has; the
//! bases of FS and GS, which are not in a frame, are read and written here.
//!
//! A signal that does not find the thread in guest code is somebody else's: see `signals`.
//!
//! Not covered: the selectors of DS, ES, FS and GS, which a guest can load: they stay as they are in the
//! thread. Their bases do not matter in 64-bit mode, or are saved.

#![expect(
    unsafe_code,
    reason = "guest code runs on this thread: its registers are set, its stack and FS base exchanged"
)]

use std::alloc::{self, Layout};
use std::arch::global_asm;
use std::arch::x86_64::__cpuid_count;
use std::ffi::c_void;
use std::io;
use std::mem::offset_of;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use super::frame::{FP_XSTATE_MAGIC1, FRAME_XSTATE_ALIGN, Frame, Gpr, fx_magic, fx_size};
use super::signals::{self, Handler};
use crate::mm::PAGE_SIZE;

/// First word of a [`Block`].
const MAGIC: u64 = u64::from_le_bytes(*b"PALIMP-U");
/// RFLAGS of VMM code: what is always set, and interrupts.
const RFLAGS_PLAIN: u64 = 1 << 1 | 1 << 9;
/// RFLAGS that `rt_sigreturn` leaves as they are (`FIX_EFLAGS` in `arch/x86/kernel/signal.c`), and ring 3 can
/// set: NT, ID. They are set before it.
const RFLAGS_NOT_IN_FRAME: u64 = 1 << 14 | 1 << 21;

/// Bytes of an alternate stack, its block included: the same for all threads. The handler tells by it that a
/// thread's alternate stack may have a block.
pub(super) static STACK_BYTES: AtomicU64 = AtomicU64::new(0);

/// What the two sides of the crossing know of each other. It lies at the base of the thread's alternate
/// stack.
#[repr(C)]
struct Block {
    magic: u64,
    /// 1 from before the guest's registers are set until the VMM's are back.
    in_guest: u64,
    /// The VMM's stack pointer, with its callee-saved registers on the stack.
    host_sp: u64,
    host_fs: u64,
    host_gs: u64,
    guest_fs: u64,
    guest_gs: u64,
    /// The frame to enter with; 0 to come out at once, for a frame of the kernel's making.
    frame: u64,
    /// Flags that the frame does not set.
    flags: u64,
    exit: RawExit,
    copy_to: *mut Frame,
    xstate_to: *mut u8,
    xstate_room: usize,
}

/// Why the guest came out, as the kernel says it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawExit {
    /// The signal.
    pub(super) signal: i32,
    /// `si_code`.
    pub(super) code: i32,
    /// `si_addr`, for signals that have one.
    pub(super) address: u64,
    /// Whether the extended registers had no room. The state is not whole then.
    pub(super) overflow: bool,
    /// Whether it was not the guest's: the host has refused to enter.
    pub(super) refused: bool,
}

unsafe extern "C" {
    /// Enters the guest, and returns when it has come out.
    fn palimpsest_user_enter(block: *mut Block);
    /// Behind the last instruction of that function that is before the guest's first.
    static palimpsest_user_enter_end: u8;
    /// The handler of all signals by which a guest comes out.
    fn palimpsest_user_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void);
}

/// What is to handle the signals by which a guest comes out.
pub(super) fn handler() -> Handler {
    palimpsest_user_signal
}

global_asm!(
    ".text",
    ".balign 16",
    ".hidden palimpsest_user_enter",
    ".globl palimpsest_user_enter",
    "palimpsest_user_enter:",
    "push rbp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "rdfsbase rax",
    "mov [rdi + {host_fs}], rax",
    "rdgsbase rax",
    "mov [rdi + {host_gs}], rax",
    "mov [rdi + {host_sp}], rsp",
    "mov qword ptr [rdi + {in_guest}], 1",
    "mov rcx, [rdi + {frame}]",
    "test rcx, rcx",
    "jz 2f",
    "mov rax, [rdi + {guest_gs}]",
    "wrgsbase rax",
    "mov rax, [rdi + {guest_fs}]",
    "wrfsbase rax",
    "push qword ptr [rdi + {flags}]",
    "popfq",
    "mov rsp, rcx",
    "mov eax, 15", // rt_sigreturn
    "syscall",
    ".hidden palimpsest_user_enter_end",
    ".globl palimpsest_user_enter_end",
    "palimpsest_user_enter_end:",
    // It does not return here. And for want of a frame:
    "2:",
    "ud2",
    "",
    ".balign 16",
    ".hidden palimpsest_user_signal",
    ".globl palimpsest_user_signal",
    // RDI: signal, RSI: siginfo, RDX: ucontext. Flags are the guest's, but for the direction: among them may
    // be that for checks of alignment.
    "palimpsest_user_signal:",
    "push {plain}",
    "popfq",
    "mov rax, [rdx + {stack_sp}]",
    "test rax, rax",
    "jz 3f",
    "mov rcx, [rdx + {stack_size}]",
    "cmp rcx, [rip + {stack_bytes}]",
    "jne 3f",
    "movabs rcx, {magic_word}",
    "cmp [rax + {magic}], rcx",
    "jne 3f",
    "cmp qword ptr [rax + {in_guest}], 1",
    "jne 3f",
    "rdfsbase rcx",
    "mov [rax + {guest_fs}], rcx",
    "rdgsbase rcx",
    "mov [rax + {guest_gs}], rcx",
    "mov rcx, [rax + {host_fs}]",
    "wrfsbase rcx",
    "mov rcx, [rax + {host_gs}]",
    "wrgsbase rcx",
    "mov qword ptr [rax + {in_guest}], 0",
    "mov rbx, rax",
    "mov rcx, rax",
    "sub rsp, 8",
    "call {came_out}",
    "mov rsp, [rbx + {host_sp}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    "3:",
    "jmp {not_ours}",
    in_guest = const offset_of!(Block, in_guest),
    host_sp = const offset_of!(Block, host_sp),
    host_fs = const offset_of!(Block, host_fs),
    host_gs = const offset_of!(Block, host_gs),
    guest_fs = const offset_of!(Block, guest_fs),
    guest_gs = const offset_of!(Block, guest_gs),
    frame = const offset_of!(Block, frame),
    flags = const offset_of!(Block, flags),
    magic = const offset_of!(Block, magic),
    magic_word = const MAGIC,
    plain = const RFLAGS_PLAIN,
    stack_sp = const offset_of!(Frame, stack_sp),
    stack_size = const offset_of!(Frame, stack_size),
    stack_bytes = sym STACK_BYTES,
    came_out = sym came_out,
    not_ours = sym signals::not_the_guests,
);

/// Copies what the kernel has saved of the guest. On the alternate stack, with the VMM's FS base; signals
/// that are not about an instruction are blocked.
///
/// # Safety
/// `info` and `frame` are what the kernel gave to a handler on the thread that has `block`, whose places to
/// copy to are there.
unsafe extern "C" fn came_out(
    signal: i32,
    info: *const libc::siginfo_t,
    frame: *const Frame,
    block: *mut Block,
) {
    // SAFETY: the caller's. The kernel's frame has the extended registers that it says it has.
    unsafe {
        let rip = (*frame).gpr(Gpr::Rip);
        let start = palimpsest_user_enter as *const () as u64;
        let end = (&raw const palimpsest_user_enter_end) as u64;
        let xstate = (*frame).xstate as *const u8;
        let len = match fx_magic(xstate) {
            FP_XSTATE_MAGIC1 => fx_size(xstate),
            _ => 512,
        };
        let overflow = len > (*block).xstate_room;
        ptr::copy_nonoverlapping(frame, (*block).copy_to, 1);
        if !overflow {
            ptr::copy_nonoverlapping(xstate, (*block).xstate_to, len);
        }
        (*(*block).copy_to).xstate = (*block).xstate_to as u64;
        (*block).exit = RawExit {
            signal,
            code: (*info).si_code,
            address: (*info).si_addr() as u64,
            overflow,
            refused: (start..=end).contains(&rip) && (*block).frame != 0,
        };
    }
}

/// Bytes that an alternate stack needs on this host: what the kernel puts there, and the handler.
fn stack_bytes() -> u64 {
    // SAFETY: it has no conditions; what is not known is 0.
    let frame = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) };
    (frame.max(8192) * 2 + (64 << 10)).next_multiple_of(PAGE_SIZE)
}

/// Bytes that extended registers may take in a frame, and what the kernel puts behind them.
fn xstate_bytes() -> usize {
    // The largest for all that this CPU has.
    let most = __cpuid_count(0xd, 0).ecx as usize;
    (most + 64).next_multiple_of(FRAME_XSTATE_ALIGN)
}

/// Memory of this process's own, which goes when this is dropped.
struct Mapping {
    at: NonNull<c_void>,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let at = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let at = NonNull::new(at).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and whoever has it is done with it.
        let _ = unsafe { munmap(self.at.as_ptr(), self.bytes) };
    }
}

/// Room for extended registers as the kernel lays them out, aligned as it asks for.
struct XstateArea {
    at: NonNull<u8>,
    layout: Layout,
}

impl XstateArea {
    fn new(bytes: usize) -> io::Result<Self> {
        let layout = Layout::from_size_align(bytes, FRAME_XSTATE_ALIGN)
            .map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: the layout has a size.
        let at = NonNull::new(unsafe { alloc::alloc_zeroed(layout) });
        let at = at.ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, layout })
    }
}

impl Drop for XstateArea {
    fn drop(&mut self) {
        // SAFETY: made by `new`, with this layout.
        unsafe { alloc::dealloc(self.at.as_ptr(), self.layout) };
    }
}

/// The crossing of one thread. It is made, used and dropped on that thread.
pub(super) struct Crossing {
    block: NonNull<Block>,
    frame: NonNull<Frame>,
    xstate: XstateArea,
    /// The alternate stack that the thread had, once it has ours.
    before: Option<libc::stack_t>,
    /// The alternate stack, behind a page that nobody may touch.
    _stack: Mapping,
}

impl Crossing {
    /// Makes this thread one that can enter guest code: gives it an alternate stack with a block. The frame
    /// is that of the VMM's own code here.
    ///
    /// # Errors
    /// If the host has no memory, or refuses.
    pub(super) fn new() -> io::Result<Self> {
        let size = stack_bytes();
        STACK_BYTES.store(size, Ordering::SeqCst);
        let guard = PAGE_SIZE as usize;
        let bytes = size as usize + guard;
        let stack = Mapping::new(bytes)?;
        let xstate = XstateArea::new(xstate_bytes())?;
        let guarded = stack.at;
        // SAFETY: inside the mapping just made.
        let base = unsafe { guarded.byte_add(guard) };
        let mut crossing = Self {
            block: base.cast(),
            frame: NonNull::from(Box::leak(Box::<Frame>::default())),
            xstate,
            before: None,
            _stack: stack,
        };
        let block = Block {
            magic: MAGIC,
            in_guest: 0,
            host_sp: 0,
            host_fs: 0,
            host_gs: 0,
            guest_fs: 0,
            guest_gs: 0,
            frame: 0,
            flags: RFLAGS_PLAIN,
            exit: RawExit::default(),
            copy_to: crossing.frame.as_ptr(),
            xstate_to: crossing.xstate.at.as_ptr(),
            xstate_room: crossing.xstate.layout.size(),
        };
        let ours = libc::stack_t {
            ss_sp: base.as_ptr(),
            ss_flags: 0,
            ss_size: size as usize,
        };
        // SAFETY: the guard is the first page of the mapping just made, and the block the begin of the
        // second. The stack is mapped until `drop`, which gives the thread back what it had.
        unsafe {
            mprotect(guarded.as_ptr(), guard, MprotectFlags::empty())?;
            crossing.block.write(block);
            let mut before = std::mem::zeroed();
            if libc::sigaltstack(&ours, &mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            crossing.before = Some(before);
        }
        // Without a frame it comes out at once, and the kernel has made one.
        // SAFETY: the block was made for this thread. The bases of FS and GS are the VMM's.
        unsafe { palimpsest_user_enter(crossing.block.as_ptr()) };
        if crossing.exit().overflow {
            return Err(io::Error::other("extended registers have no room"));
        }
        Ok(crossing)
    }

    /// Why the guest came out last.
    fn exit(&self) -> RawExit {
        // SAFETY: the block is there as long as `self`, and nobody else uses it while this thread is here.
        unsafe { (*self.block.as_ptr()).exit }
    }

    /// Runs guest code with the registers in the frame, until a signal. They are those of the guest then.
    ///
    /// # Safety
    /// What they point to is the guest's: it can do to this process whatever the registers let it do.
    pub(super) unsafe fn enter(&mut self) -> RawExit {
        let block = self.block.as_ptr();
        let xstate = self.xstate.at.as_ptr() as u64;
        self.frame_mut().xstate = xstate;
        let flags = RFLAGS_PLAIN | self.frame().gpr(Gpr::Rflags) & RFLAGS_NOT_IN_FRAME;
        // SAFETY: the block and the frame are this thread's, and there. What runs is the caller's to answer
        // for.
        unsafe {
            (*block).frame = self.frame.as_ptr() as u64;
            (*block).flags = flags;
            palimpsest_user_enter(block);
        }
        self.exit()
    }

    /// The guest's registers.
    pub(super) fn frame(&self) -> &Frame {
        // SAFETY: it is there as long as `self`, and nobody else uses it while this thread is here.
        unsafe { self.frame.as_ref() }
    }

    /// The same, to be changed.
    pub(super) fn frame_mut(&mut self) -> &mut Frame {
        // SAFETY: as above.
        unsafe { self.frame.as_mut() }
    }

    /// The guest's extended registers as the kernel lays them out, and what it puts behind them.
    pub(super) fn xstate(&self) -> &[u8] {
        // SAFETY: the allocation, of which a frame's extended registers are a part.
        unsafe { std::slice::from_raw_parts(self.xstate.at.as_ptr(), self.xstate.layout.size()) }
    }

    /// The same, to be changed.
    pub(super) fn xstate_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; nobody else has it.
        unsafe {
            std::slice::from_raw_parts_mut(self.xstate.at.as_ptr(), self.xstate.layout.size())
        }
    }

    /// Bases of FS and GS.
    pub(super) fn bases(&self) -> [u64; 2] {
        // SAFETY: as in `exit`.
        unsafe {
            [
                (*self.block.as_ptr()).guest_fs,
                (*self.block.as_ptr()).guest_gs,
            ]
        }
    }

    /// Sets them. They are canonical addresses.
    pub(super) fn set_bases(&mut self, [fs, gs]: [u64; 2]) {
        // SAFETY: as in `exit`.
        unsafe {
            (*self.block.as_ptr()).guest_fs = fs;
            (*self.block.as_ptr()).guest_gs = gs;
        }
    }
}

impl Drop for Crossing {
    fn drop(&mut self) {
        // SAFETY: the thread gets back what it had, before ours goes. Nobody else has the frame.
        unsafe {
            if let Some(before) = &self.before {
                libc::sigaltstack(before, ptr::null_mut());
            }
            drop(Box::from_raw(self.frame.as_ptr()));
        }
    }
}
