//! All registers of a vCPU, as plain data.
//!
//! | file | concept |
//! |---|---|
//! | `capture` | reads them, and keeps those that cannot change |
//! | `restore` | sets them |
//! | `display` | in words, for crash reports |
//! | `boot` | which of them differ from those of the boot |
//!
//! There is no interrupt controller, and so no APIC state. MSRs that the host cannot save or set back are
//! left out and named: see [`VcpuState::left_out`].

mod boot;
mod capture;
mod display;
mod restore;

use std::fmt;

use kvm_bindings::{
    kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

pub(super) use self::capture::Capturer;
pub use self::restore::Clock;
pub(super) use self::restore::XsaveFits;
use super::error::StateError;
use super::extended::{Extended, XSAVE_WORDS};
use super::tables::Confined;
use crate::saved::{Saved, State};

/// Who ran the vCPU that a state is of. A state is set by its own kind alone: the others have not the same
/// registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StateKind {
    /// KVM.
    Kvm,
    /// A thread of the host ([`user`](crate::user)). Of the system registers there are the selectors of code
    /// and stack, the bases of FS and GS, and CR2.
    User,
}

impl fmt::Display for StateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::User => "user",
        })
    }
}

/// All registers of a vCPU, as plain data. What is deserialised is not trusted: KVM checks what it is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    kind: StateKind,
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

const IA32_TSC: u32 = 0x10;

/// The form that [`VcpuState::to_bytes`] has.
const VERSION: u32 = 2;

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
    /// If it was stored, and its version is not known here, or its bytes are cut, too many or no state. What
    /// the registers are is not looked at: KVM checks them when they are set.
    pub fn of_saved(saved: &Saved) -> Result<Self, StateError> {
        if let Some(state) = saved.get::<Self>() {
            return Ok(state.clone());
        }
        let version = saved.version();
        let stored = |source| StateError::Stored { version, source };
        if version != VERSION {
            return Err(stored(None));
        }
        match postcard::take_from_bytes(&saved.to_bytes()) {
            Ok((state, [])) => Ok(state),
            Ok(_) => Err(stored(Some(postcard::Error::DeserializeBadEncoding))),
            Err(error) => Err(stored(Some(error))),
        }
    }

    /// One with these registers, and all others zero. `xsave` is cut, or filled with zeros.
    pub fn of(regs: kvm_regs, sregs: kvm_sregs, mut xsave: Vec<u32>) -> Self {
        xsave.resize(XSAVE_WORDS, 0);
        Self {
            kind: StateKind::Kvm,
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

    /// That of a thread of the host, with its time-stamp counter.
    pub(crate) fn of_user(regs: kvm_regs, sregs: kvm_sregs, xsave: Vec<u32>, tsc: u64) -> Self {
        let tsc = kvm_msr_entry {
            index: IA32_TSC,
            data: tsc,
            ..Default::default()
        };
        Self {
            kind: StateKind::User,
            xsave,
            msrs: vec![tsc],
            ..Self::of(regs, sregs, Vec::new())
        }
    }

    /// Who ran the vCPU.
    pub fn kind(&self) -> StateKind {
        self.kind
    }

    /// Fails if another than `kind` ran the vCPU.
    ///
    /// # Errors
    /// That says who did.
    pub(crate) fn must_be(&self, kind: StateKind) -> Result<(), StateError> {
        if self.kind == kind {
            return Ok(());
        }
        let (found, wanted) = (self.kind, kind);
        Err(StateError::Kind { found, wanted })
    }

    /// The same with other registers. They are not trusted: KVM checks what it is given.
    #[must_use]
    pub fn with_registers(mut self, regs: kvm_regs, sregs: kvm_sregs) -> Self {
        (self.regs, self.sregs) = (regs, sregs);
        self
    }

    /// The same with another area. It is not trusted: KVM checks what it is given.
    #[must_use]
    pub fn with_xsave(mut self, xsave: Vec<u32>) -> Self {
        self.xsave = xsave;
        self
    }

    /// The general registers.
    pub fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    /// Segment and control registers.
    pub fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    /// Its MSRs.
    pub(super) fn msrs(&self) -> &[kvm_msr_entry] {
        &self.msrs
    }

    /// The numbers of its MSRs.
    pub fn msr_indices(&self) -> Vec<u32> {
        self.msrs.iter().map(|msr| msr.index).collect()
    }

    /// The area of the extended registers, in 32-bit words, as `KVM_GET_XSAVE` has it.
    pub fn xsave(&self) -> &[u32] {
        &self.xsave
    }

    /// Address of the next instruction.
    pub fn rip(&self) -> u64 {
        self.regs.rip
    }

    /// The time-stamp counter when it was captured, if the host gives it.
    pub fn tsc(&self) -> Option<u64> {
        let tsc = self.msrs.iter().find(|msr| msr.index == IA32_TSC);
        tsc.map(|msr| msr.data)
    }

    /// Extended registers.
    pub fn extended(&self) -> Extended {
        Extended::of(&self.xsave)
    }

    /// The low 64 bits of MM7; 0 if the x87 state is in its initial configuration.
    pub fn mm7(&self) -> u64 {
        self.extended().mmx[7]
    }

    /// MSRs of KVM's list that this host could not save or set back.
    pub fn left_out(&self) -> &[u32] {
        &self.left_out
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
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn state() -> VcpuState {
        VcpuState {
            kind: StateKind::Kvm,
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
}
