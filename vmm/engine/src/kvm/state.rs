//! All registers of a vCPU: capture, restore, and what crash reports print of them.
//!
//! There is no interrupt controller, and so no APIC state. MSRs that the host cannot save or set back are
//! left out and named: see [`VcpuState::left_out`].

#![expect(unsafe_code, reason = "KVM_SET_XSAVE, whose size the kernel decides")]

use std::fmt;

use kvm_bindings::{
    kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_sync_regs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::error::{StateError, XSAVE_BYTES, XSAVE_WORDS};
use super::extended::Extended;
use super::msr::{self, MsrSet};
use super::tables::Confined;
use crate::saved::{Saved, State};

/// What restoring does with the guest's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The time-stamp counter runs on: for rewinding a machine in place. A guest that measures its own gaps
    /// then sees how long it stood still, and never sees time run backwards.
    Keep,
    /// The time-stamp counter goes back to where it was captured: for a new machine, whose own counter begins
    /// at zero. Hosts that run the guest on their own counter (PVM) accept this without effect: there the
    /// counter is the host's.
    Rewind,
}

/// CR4: global pages.
const CR4_PGE: u64 = 1 << 7;

/// All registers of a vCPU, as plain data. What is deserialised is not trusted: KVM checks what it is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    msrs: Vec<kvm_msr_entry>,
    left_out: Vec<u32>,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    mp_state: kvm_mp_state,
}

/// The form that [`VcpuState::to_bytes`] has.
const VERSION: u32 = 1;

impl State for VcpuState {
    fn version(&self) -> u32 {
        VERSION
    }

    fn to_bytes(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("plain data always has a form")
    }
}

impl VcpuState {
    /// The state that was saved.
    ///
    /// # Errors
    /// If it was stored, and its bytes make no sense.
    pub fn of_saved(saved: &Saved) -> Result<Self, StateError> {
        if let Some(state) = saved.get::<Self>() {
            return Ok(state.clone());
        }
        let version = saved.version();
        let stored = |source| StateError::Stored { version, source };
        if version != VERSION {
            return Err(stored(None));
        }
        postcard::from_bytes(&saved.to_bytes()).map_err(|error| stored(Some(error)))
    }

    /// Sets all registers. `xsave_fits` is the caller's word that the kernel takes no more than 4 KiB of
    /// XSAVE area.
    pub(super) fn restore(
        &self,
        vcpu: &VcpuFd,
        clock: Clock,
        _xsave_fits: XsaveFits,
    ) -> Result<(), StateError> {
        let mut xsave = kvm_xsave::default();
        if self.xsave.len() != XSAVE_WORDS {
            return Err(StateError::XsaveSize {
                words: self.xsave.len(),
            });
        }
        xsave.region.copy_from_slice(&self.xsave);

        vcpu.set_mp_state(self.mp_state)
            .map_err(StateError::of("multiprocessing state"))?;
        // Memory was set back by the host's hand, page tables with it, and KVM flushes what the CPU keeps of
        // them only when a control register changes (`__set_sregs_common` in `arch/x86/kvm/x86.c`). So one
        // does, there and back.
        let mut other = self.sregs;
        other.cr4 ^= CR4_PGE;
        vcpu.set_sregs(&other)
            .map_err(StateError::of("system registers"))?;
        // System registers before XCRs and XSAVE: CR4.OSXSAVE governs them.
        vcpu.set_sregs(&self.sregs)
            .map_err(StateError::of("system registers"))?;
        vcpu.set_regs(&self.regs)
            .map_err(StateError::of("registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(StateError::of("xcrs"))?;
        // SAFETY: the kernel reads the size it gave for KVM_CAP_XSAVE2, which `XsaveFits` says is no more
        // than what `kvm_xsave` has.
        unsafe { vcpu.set_xsave(&xsave) }.map_err(StateError::of("xsave area"))?;
        let msrs: Vec<_> = self
            .msrs
            .iter()
            .filter(|msr| clock == Clock::Rewind || !msr::is_clock(msr.index))
            .copied()
            .collect();
        msr::write(vcpu, &msrs)?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(StateError::of("debug registers"))?;
        // Last: setting the general registers drops a pending exception.
        vcpu.set_vcpu_events(&self.events)
            .map_err(StateError::of("events"))
    }

    /// The general registers.
    pub fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    /// The same with other registers. They are not trusted: KVM checks what it is given.
    #[must_use]
    pub fn with_registers(mut self, regs: kvm_regs, sregs: kvm_sregs) -> Self {
        (self.regs, self.sregs) = (regs, sregs);
        self
    }

    /// Its MSRs.
    pub(super) fn msrs(&self) -> &[kvm_msr_entry] {
        &self.msrs
    }

    /// Segment and control registers.
    pub fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    /// Address of the next instruction.
    pub fn rip(&self) -> u64 {
        self.regs.rip
    }

    /// Whether these are the registers that INIT leaves, which no guest here ever has: SVM leaves the vCPU's
    /// undefined after a triple fault, and KVM resets it (`shutdown_interception` in
    /// `arch/x86/kvm/svm/svm.c`).
    pub(super) fn is_as_after_init(&self) -> bool {
        const RESET_RIP: u64 = 0xfff0;
        const RESET_CS_BASE: u64 = 0xffff_0000;
        const PROTECTED_MODE: u64 = 1;
        self.regs.rip == RESET_RIP
            && self.sregs.cs.base == RESET_CS_BASE
            && self.sregs.cr0 & PROTECTED_MODE == 0
    }

    /// The time-stamp counter when it was captured, if the host gives it.
    pub fn tsc(&self) -> Option<u64> {
        let tsc = self.msrs.iter().find(|msr| msr.index == 0x10);
        tsc.map(|msr| msr.data)
    }

    /// MSRs of KVM's list that this host could not save or set back.
    pub fn left_out(&self) -> &[u32] {
        &self.left_out
    }

    /// As [`VcpuState::is_confined_to_ring_3`].
    pub(super) fn confined(&self) -> Confined {
        if self.is_confined_to_ring_3() {
            Confined::Yes
        } else {
            Confined::No
        }
    }

    /// Whether nothing that the guest can do changes its privilege: ring 3, no gates, no system calls.
    pub(super) fn is_confined_to_ring_3(&self) -> bool {
        const SYSTEM_CALLS: u64 = 1;
        const IA32_SYSENTER_CS: u32 = 0x174;
        let sregs = &self.sregs;
        let sysenter = |msr: &kvm_msr_entry| msr.index == IA32_SYSENTER_CS && msr.data != 0;
        sregs.ss.dpl == 3
            && sregs.gdt.limit == 0
            && sregs.idt.limit == 0
            && sregs.ldt.unusable != 0
            && sregs.efer & SYSTEM_CALLS == 0
            && !self.msrs.iter().any(sysenter)
    }

    /// One with these registers, and all others zero. `xsave` is cut, or filled with zeros.
    pub fn of(regs: kvm_regs, sregs: kvm_sregs, mut xsave: Vec<u32>) -> Self {
        xsave.resize(XSAVE_WORDS, 0);
        Self {
            regs,
            sregs,
            xsave,
            xcrs: kvm_xcrs::default(),
            msrs: Vec::new(),
            left_out: Vec::new(),
            events: kvm_vcpu_events::default(),
            debug: kvm_debugregs::default(),
            mp_state: kvm_mp_state::default(),
        }
    }

    /// Extended registers.
    pub fn extended(&self) -> Extended {
        Extended::of(&self.xsave)
    }

    /// The low 64 bits of MM7; 0 if the x87 state is in its initial configuration.
    pub fn mm7(&self) -> u64 {
        self.extended().mmx[7]
    }

    /// The area of the extended registers, in 32-bit words, as `KVM_GET_XSAVE` has it.
    pub fn xsave(&self) -> &[u32] {
        &self.xsave
    }

    /// The same with another area. It is not trusted: KVM checks what it is given.
    #[must_use]
    pub fn with_xsave(mut self, xsave: Vec<u32>) -> Self {
        self.xsave = xsave;
        self
    }

    /// Registers that ring 3 cannot set, and that differ from those of `boot`: what they are called, what
    /// they are, what they were.
    pub fn set_by_boot(&self, boot: &Self) -> Vec<(String, String, String)> {
        let (now, then) = (self.set_once(), boot.set_once());
        let mut differ: Vec<_> = now
            .into_iter()
            .zip(then)
            .filter(|(now, then)| now != then)
            .map(|((name, now), (_, then))| (name.to_owned(), now, then))
            .collect();
        let was = |index| boot.msrs.iter().find(|msr| msr.index == index);
        let hex = |msr: &kvm_msr_entry| format!("{:#x}", msr.data);
        differ.extend(
            self.msrs
                .iter()
                .filter(|msr| !msr::is_clock(msr.index))
                .filter(|msr| was(msr.index).is_none_or(|was| was.data != msr.data))
                .map(|msr| {
                    let name = format!("msr {:#x}", msr.index);
                    (
                        name,
                        hex(msr),
                        was(msr.index).map_or("none".to_owned(), hex),
                    )
                }),
        );
        differ
    }

    fn set_once(&self) -> [(&'static str, String); 11] {
        let s = &self.sregs;
        let segment =
            |s: &kvm_segment| format!("{:#x} of level {}, limit {:#x}", s.selector, s.dpl, s.limit);
        [
            ("cr0", format!("{:#x}", s.cr0)),
            ("cr3", format!("{:#x}", s.cr3)),
            ("cr4", format!("{:#x}", s.cr4)),
            ("efer", format!("{:#x}", s.efer)),
            ("cs", segment(&s.cs)),
            ("ss", segment(&s.ss)),
            ("tr", format!("{} at {:#x}", segment(&s.tr), s.tr.base)),
            ("gdt", format!("{:#x} at {:#x}", s.gdt.limit, s.gdt.base)),
            ("idt", format!("{:#x} at {:#x}", s.idt.limit, s.idt.base)),
            ("xcr0", format!("{:#x}", self.xcrs.xcrs[0].value)),
            ("debug registers", format!("{:x?}", self.debug)),
        ]
    }
}

/// Registers that only code in ring 0 can change.
#[derive(Clone, Debug)]
struct Privileged {
    xcrs: kvm_xcrs,
    /// Without the clock's.
    msrs: Vec<kvm_msr_entry>,
    debug: kvm_debugregs,
    mp_state: kvm_mp_state,
}

impl Privileged {
    fn read(vcpu: &VcpuFd, msrs: &MsrSet) -> Result<Self, StateError> {
        let (_, steady) = split_clock(&msrs.kept);
        Ok(Self {
            // First: reading it moves a pending event to where the event registers show it.
            mp_state: vcpu
                .get_mp_state()
                .map_err(StateError::of("multiprocessing state"))?,
            xcrs: vcpu.get_xcrs().map_err(StateError::of("xcrs"))?,
            msrs: msr::read(vcpu, &steady)?,
            debug: vcpu
                .get_debug_regs()
                .map_err(StateError::of("debug registers"))?,
        })
    }
}

/// Captures the registers of one vCPU, again and again.
///
/// Every KVM call for a vCPU costs microseconds (about 7 on PVM), in which the guest stands still. So
/// registers that came with the last exit are taken from there, and those that ring 3 cannot change are read
/// once and kept until they are set: a guest without descriptor tables and system call entry points has no
/// way out of ring 3.
#[derive(Debug)]
pub(super) struct Capturer {
    msrs: MsrSet,
    clock: Vec<u32>,
    privileged: Option<Privileged>,
}

impl Capturer {
    /// A capturer of the MSRs in `msrs`.
    pub(super) fn new(msrs: MsrSet) -> Self {
        Self {
            clock: split_clock(&msrs.kept).0,
            msrs,
            privileged: None,
        }
    }

    /// Reads all registers. `exit` is what came with the last exit, if nothing was set since. The vCPU must
    /// have no port access half done.
    pub(super) fn capture(
        &mut self,
        vcpu: &VcpuFd,
        exit: Option<kvm_sync_regs>,
    ) -> Result<VcpuState, StateError> {
        let privileged = match self.privileged.take() {
            Some(privileged) => privileged,
            None => Privileged::read(vcpu, &self.msrs)?,
        };
        let exit = match exit {
            Some(exit) => exit,
            None => kvm_sync_regs {
                regs: vcpu.get_regs().map_err(StateError::of("registers"))?,
                sregs: vcpu
                    .get_sregs()
                    .map_err(StateError::of("system registers"))?,
                events: vcpu.get_vcpu_events().map_err(StateError::of("events"))?,
            },
        };
        let mut msrs = msr::read(vcpu, &self.clock)?;
        msrs.extend_from_slice(&privileged.msrs);
        let state = VcpuState {
            regs: exit.regs,
            sregs: exit.sregs,
            xsave: vcpu
                .get_xsave()
                .map_err(StateError::of("xsave area"))?
                .region
                .to_vec(),
            xcrs: privileged.xcrs,
            msrs,
            left_out: self.msrs.left_out.clone(),
            events: exit.events,
            debug: privileged.debug,
            mp_state: privileged.mp_state,
        };
        if state.is_confined_to_ring_3() {
            self.privileged = Some(privileged);
        }
        Ok(state)
    }

    /// Registers were set: what was kept of them holds no longer.
    pub(super) fn forget(&mut self) {
        self.privileged = None;
    }
}

/// Splits MSRs into those of the clock and the others.
fn split_clock(indices: &[u32]) -> (Vec<u32>, Vec<u32>) {
    indices.iter().partition(|index| msr::is_clock(**index))
}

impl fmt::Display for VcpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_registers(f, &self.regs, &self.sregs)?;
        write!(f, "\nmm7 {:016x}", self.mm7())
    }
}

/// Writes registers in rows of four.
fn write_registers(f: &mut fmt::Formatter<'_>, r: &kvm_regs, s: &kvm_sregs) -> fmt::Result {
    let rows = [
        [
            ("rip", r.rip),
            ("rsp", r.rsp),
            ("rbp", r.rbp),
            ("rfl", r.rflags),
        ],
        [
            ("rax", r.rax),
            ("rbx", r.rbx),
            ("rcx", r.rcx),
            ("rdx", r.rdx),
        ],
        [("rsi", r.rsi), ("rdi", r.rdi), ("r8 ", r.r8), ("r9 ", r.r9)],
        [
            ("r10", r.r10),
            ("r11", r.r11),
            ("r12", r.r12),
            ("r13", r.r13),
        ],
        [
            ("r14", r.r14),
            ("r15", r.r15),
            ("fsb", s.fs.base),
            ("gsb", s.gs.base),
        ],
        [
            ("cr0", s.cr0),
            ("cr2", s.cr2),
            ("cr3", s.cr3),
            ("cr4", s.cr4),
        ],
    ];
    for (index, row) in rows.iter().enumerate() {
        if index > 0 {
            writeln!(f)?;
        }
        let [a, b, c, d] = row.map(|(name, value)| format!("{name} {value:016x}"));
        write!(f, "{a}  {b}  {c}  {d}")?;
    }
    Ok(())
}

/// Proof that the kernel's XSAVE area is no larger than [`XSAVE_BYTES`], so that `KVM_SET_XSAVE` stays inside
/// `kvm_xsave`.
///
/// It is larger only where a process has asked the kernel for dynamically enabled state (AMX), which this one
/// does not.
#[derive(Clone, Copy, Debug)]
pub(super) struct XsaveFits(());

impl XsaveFits {
    /// `xsave2` is what the VM answers for `KVM_CAP_XSAVE2`; 0 on kernels that only know the fixed size.
    pub(super) fn check(xsave2: i32) -> Option<Self> {
        (xsave2 <= XSAVE_BYTES as i32).then_some(Self(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> VcpuState {
        VcpuState {
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: vec![0; XSAVE_WORDS],
            xcrs: kvm_xcrs::default(),
            msrs: vec![kvm_msr_entry {
                index: 0x10,
                data: 99,
                ..Default::default()
            }],
            left_out: vec![0x1234],
            events: kvm_vcpu_events::default(),
            debug: kvm_debugregs::default(),
            mp_state: kvm_mp_state::default(),
        }
    }

    #[test]
    fn mm7_is_the_last_slot_while_the_stack_top_is_0() {
        let mut state = state();
        let slot = (32 + 7 * 16) / 4;
        state.xsave[slot] = 0x5566_7788;
        state.xsave[slot + 1] = 0x1122_3344;
        assert_eq!(state.mm7(), 0, "x87 state in its initial configuration");
        state.xsave[128] = 1;
        assert_eq!(state.mm7(), 0x1122_3344_5566_7788);
    }

    #[test]
    fn mm7_follows_the_stack_top() {
        for top in 0..8_u32 {
            let mut state = state();
            state.xsave[128] = 1;
            state.xsave[0] = top << 11 << 16;
            // Physical register 7 is ST(7 - top).
            let slot = 8 + ((7 + 8 - top) % 8) as usize * 4;
            state.xsave[slot] = 77;
            assert_eq!(state.mm7(), 77, "top {top}");
        }
    }

    #[test]
    fn confined_to_ring_3_only_without_a_way_out() {
        let with = |change: fn(&mut VcpuState)| {
            let mut state = state();
            state.sregs.ss.dpl = 3;
            state.sregs.ldt.unusable = 1;
            change(&mut state);
            state.is_confined_to_ring_3()
        };
        assert!(with(|_| {}));
        assert!(!with(|state| state.sregs.ss.dpl = 0));
        assert!(!with(|state| state.sregs.idt.limit = 4095));
        assert!(!with(|state| state.sregs.gdt.limit = 15));
        assert!(!with(|state| state.sregs.ldt.unusable = 0));
        assert!(!with(|state| state.sregs.efer = 1));
        assert!(!with(
            |state| (state.msrs[0].index, state.msrs[0].data) = (0x174, 8)
        ));
    }

    #[test]
    fn survives_serialisation() {
        let mut before = state();
        before.regs.rip = 0x1234;
        before.xsave[5] = 6;
        let text = serde_json::to_string(&before).unwrap();
        let after: VcpuState = serde_json::from_str(&text).unwrap();
        assert_eq!(before, after);
        assert_eq!((after.rip(), after.tsc()), (0x1234, Some(99)));
        assert_eq!(after.left_out(), [0x1234]);
    }

    #[test]
    fn a_short_xsave_area_reads_as_zero() {
        let mut state = state();
        state.xsave = vec![];
        assert_eq!(state.mm7(), 0);
    }

    #[test]
    fn what_init_leaves_is_recognised() {
        let mut reset = state();
        reset.regs.rip = 0xfff0;
        reset.sregs.cs.base = 0xffff_0000;
        assert!(reset.is_as_after_init());
        // A guest may have code there.
        reset.sregs.cr0 = 1;
        assert!(!reset.is_as_after_init());
        assert!(!state().is_as_after_init());
    }

    #[test]
    fn display_has_every_register() {
        let text = state().to_string();
        for name in ["rip", "rsp", "r15", "cr3", "mm7"] {
            assert!(text.contains(name), "{name} in {text}");
        }
    }
}
