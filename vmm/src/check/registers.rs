//! Registers must hold what the guest has put there, and what booting has.
//!
//! The guest fills registers by a formula of the operation (`guest::registers`). Those that no compiled code
//! of the guest uses hold its values always; the others while a page is checked and written, which is what a
//! vCPU does most of the time. Control registers, segments, descriptor tables, XCR0 and MSRs are set by
//! booting alone (ring 3 cannot), and must not have changed since.

use guest::registers::{FLAGS, HOLDS_BASES, HOLDS_REGISTERS, HOLDS_YMM, Held, MMX};

use super::boot::Declared;
use super::violation::{Oracle, Violation};
use palimpsest::kvm::VcpuState;

/// The registers of one vCPU in a snapshot.
#[derive(Clone, Copy)]
pub(super) struct Registers<'a> {
    pub(super) snapshot: u64,
    pub(super) seed: u64,
    pub(super) vcpu: u64,
    pub(super) state: &'a VcpuState,
    /// What it was at boot.
    pub(super) boot: &'a VcpuState,
    pub(super) declared: Declared,
}

impl Registers<'_> {
    /// Compares them.
    pub(super) fn check(self, report: &mut dyn FnMut(Violation)) {
        for (name, now, boot) in self.state.set_by_boot(self.boot) {
            report(self.violation(&name, format!("{boot} (since boot)"), now));
        }
        if self.declared.held & HOLDS_REGISTERS == 0 {
            return;
        }
        let op = self.state.mm7();
        let new = Held::new(self.seed, self.vcpu, op);
        let old = Held::new(self.seed, self.vcpu, op.saturating_sub(1));
        self.check_always(&new, &old, report);
        self.check_over_a_page(&new, report);
    }

    /// They are set in order, after the counter: from some register on they may be of the operation before.
    fn check_always(self, new: &Held, old: &Held, report: &mut dyn FnMut(Violation)) {
        let found = self.state.extended();
        let sregs = self.state.sregs();
        let mut registers: Vec<(String, u64, u64, u64)> = (0..MMX)
            .map(|n| (format!("mm{n}"), found.mmx[n], new.mmx[n], old.mmx[n]))
            .collect();
        registers.push((
            "the x87 control word".to_owned(),
            found.control.into(),
            new.control,
            old.control,
        ));
        registers.push(("mxcsr".to_owned(), found.mxcsr.into(), new.mxcsr, old.mxcsr));
        if self.declared.held & HOLDS_BASES != 0 {
            registers.push(("the base of fs".to_owned(), sregs.fs.base, new.fs, old.fs));
            registers.push(("the base of gs".to_owned(), sregs.gs.base, new.gs, old.gs));
        }
        if self.declared.held & HOLDS_YMM != 0 {
            let words = found.ymm.iter().zip(new.ymm.iter().zip(&old.ymm));
            registers.extend(words.enumerate().map(|(n, (&found, (&new, &old)))| {
                (format!("the upper half of ymm{}", n / 2), found, new, old)
            }));
        }
        let mut is_old = false;
        for (name, found, new, old) in registers {
            is_old |= found != new;
            let expected = if is_old { old } else { new };
            if found != expected {
                let expected = match is_old {
                    true => format!("{new:#x}, or {old:#x} of the operation before"),
                    false => format!("{new:#x}"),
                };
                report(self.violation(&name, expected, format!("{found:#x}")));
                return;
            }
        }
    }

    fn check_over_a_page(self, held: &Held, report: &mut dyn FnMut(Violation)) {
        let [check, write, end] = self.declared.holds;
        let regs = self.state.regs();
        if !(check..end).contains(&regs.rip) {
            return;
        }
        let general = [
            ("rbx", regs.rbx),
            ("rbp", regs.rbp),
            ("rdx", regs.rdx),
            ("r8", regs.r8),
            ("r9", regs.r9),
            ("r10", regs.r10),
            ("r11", regs.r11),
            ("r12", regs.r12),
            ("r13", regs.r13),
            ("r14", regs.r14),
            ("r15", regs.r15),
        ];
        // What comes between the two pieces uses RCX, RSI and the flags alone.
        for ((name, found), expected) in general.into_iter().zip(held.general) {
            if found != expected {
                report(self.violation(name, format!("{expected:#x}"), format!("{found:#x}")));
                return;
            }
        }
        let found = self.state.extended().xmm;
        if let Some(word) = (0..found.len()).find(|&word| found[word] != held.xmm[word]) {
            let name = format!("xmm{}", word / 2);
            let (expected, found) = (held.xmm[word], found[word]);
            report(self.violation(&name, format!("{expected:#x}"), format!("{found:#x}")));
        }
        let flags = regs.rflags & FLAGS;
        if (write..end).contains(&regs.rip) && flags != held.flags {
            let expected = format!("{:#x}", held.flags);
            report(self.violation("rflags", expected, format!("{flags:#x}")));
        }
    }

    fn violation(self, register: &str, expected: String, found: String) -> Violation {
        let mut v = Violation::new(
            Oracle::Cut,
            format!(
                "vcpu {}: {register} is not what it must be in operation {}",
                self.vcpu,
                self.state.mm7()
            ),
        );
        v.snapshot = Some(self.snapshot);
        v.expected = expected;
        v.found = found;
        v
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_sregs};

    use super::*;

    const SEED: u64 = 3;
    const OP: u64 = 77;
    const HOLDS: [u64; 3] = [0x1000, 0x1100, 0x1200];

    /// The words of an XSAVE area, and the other registers.
    #[derive(Clone)]
    struct Vcpu {
        regs: kvm_regs,
        sregs: kvm_sregs,
        area: Vec<u32>,
    }

    impl Vcpu {
        /// One in operation [`OP`], in the middle of writing a page, with all that `held` says.
        fn holding(held: &Held) -> Self {
            let mut vcpu = Self {
                regs: kvm_regs {
                    rip: HOLDS[1],
                    rflags: held.flags | 2,
                    ..Default::default()
                },
                sregs: kvm_sregs::default(),
                area: vec![0; 1024],
            };
            let [rbx, rbp, rdx, r8, r9, r10, r11, r12, r13, r14, r15] = held.general;
            let regs = &mut vcpu.regs;
            (regs.rbx, regs.rbp, regs.rdx) = (rbx, rbp, rdx);
            (regs.r8, regs.r9, regs.r10, regs.r11) = (r8, r9, r10, r11);
            (regs.r12, regs.r13, regs.r14, regs.r15) = (r12, r13, r14, r15);
            vcpu.area[0] = held.control as u32;
            vcpu.area[6] = held.mxcsr as u32;
            vcpu.area[128] = 0b111;
            for (n, &word) in held.mmx.iter().chain([&OP]).enumerate() {
                vcpu.put(32 + 16 * n, word);
            }
            for n in 0..32 {
                vcpu.put(160 + 8 * n, held.xmm[n]);
                vcpu.put(576 + 8 * n, held.ymm[n]);
            }
            (vcpu.sregs.fs.base, vcpu.sregs.gs.base) = (held.fs, held.gs);
            vcpu
        }

        fn put(&mut self, byte: usize, word: u64) {
            self.area[byte / 4] = word as u32;
            self.area[byte / 4 + 1] = (word >> 32) as u32;
        }

        fn state(&self) -> VcpuState {
            VcpuState::of(self.regs, self.sregs, self.area.clone())
        }

        fn wrong(&self) -> Vec<String> {
            let (state, boot) = (self.state(), self.state());
            let mut found = Vec::new();
            let registers = Registers {
                snapshot: 1,
                seed: SEED,
                vcpu: 1,
                state: &state,
                boot: &boot,
                declared: Declared {
                    held: HOLDS_REGISTERS | HOLDS_BASES | HOLDS_YMM,
                    holds: HOLDS,
                    draws: false,
                },
            };
            registers.check(&mut |v| found.push(v.to_string()));
            found
        }
    }

    fn held(op: u64) -> Held {
        Held::new(SEED, 1, op)
    }

    #[test]
    fn right_registers_pass_and_each_wrong_one_is_named() {
        let right = Vcpu::holding(&held(OP));
        assert_eq!(right.wrong(), Vec::<String>::new());
        type Change = fn(&mut Vcpu);
        let changes: [(&str, Change); 14] = [
            ("rbx", |v| v.regs.rbx ^= 1),
            ("rbp", |v| v.regs.rbp ^= 1),
            ("rdx", |v| v.regs.rdx ^= 1),
            ("r8", |v| v.regs.r8 ^= 1),
            ("r15", |v| v.regs.r15 ^= 1),
            ("rflags", |v| v.regs.rflags ^= 1 << 21),
            ("mm0", |v| v.area[8] ^= 1),
            ("mm6", |v| v.area[8 + 24] ^= 1),
            ("x87 control word", |v| v.area[0] ^= 1 << 10),
            ("mxcsr", |v| v.area[6] ^= 1 << 13),
            ("xmm15", |v| v.area[(160 + 248) / 4] ^= 1),
            ("ymm15", |v| v.area[(576 + 248) / 4] ^= 1),
            ("base of fs", |v| v.sregs.fs.base ^= 1),
            ("base of gs", |v| v.sregs.gs.base ^= 1),
        ];
        for (name, change) in changes {
            let mut vcpu = right.clone();
            change(&mut vcpu);
            let wrong = vcpu.wrong();
            assert_eq!(wrong.len(), 1, "{name}: {wrong:?}");
            assert!(wrong[0].contains(name), "{name}: {}", wrong[0]);
        }
    }

    #[test]
    fn registers_that_are_set_last_may_be_of_the_operation_before() {
        let (new, old) = (held(OP), held(OP - 1));
        let mut mixed = new;
        (mixed.ymm, mixed.gs, mixed.fs, mixed.mxcsr) = (old.ymm, old.gs, old.fs, old.mxcsr);
        assert_eq!(Vcpu::holding(&mixed).wrong(), Vec::<String>::new());
        // But not those that are set before them.
        mixed = new;
        mixed.mmx[3] = old.mmx[3];
        assert_eq!(Vcpu::holding(&mixed).wrong().len(), 1);
        assert_ne!(Vcpu::holding(&held(OP - 2)).wrong(), Vec::<String>::new());
    }

    #[test]
    fn outside_of_a_page_most_registers_are_anything() {
        let mut vcpu = Vcpu::holding(&held(OP));
        vcpu.regs.rbx ^= 1;
        vcpu.regs.rip = HOLDS[2];
        assert_eq!(vcpu.wrong(), Vec::<String>::new());
        // Flags are loaded with the page checked.
        let mut vcpu = Vcpu::holding(&held(OP));
        vcpu.regs.rflags ^= 1;
        vcpu.regs.rip = HOLDS[0];
        assert_eq!(vcpu.wrong(), Vec::<String>::new());
    }

    #[test]
    fn what_booting_sets_stays() {
        let vcpu = Vcpu::holding(&held(OP));
        let boot = vcpu.state();
        let mut changed = vcpu;
        changed.sregs.cr3 = 0x5000;
        changed.sregs.tr.base = 0x9000;
        let names: Vec<_> = changed
            .state()
            .set_by_boot(&boot)
            .into_iter()
            .map(|(name, ..)| name)
            .collect();
        assert_eq!(names, ["cr3", "tr"]);
    }
}
