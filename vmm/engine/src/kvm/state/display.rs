//! Registers in words.

use std::fmt;

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::VcpuState;

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

#[cfg(test)]
mod tests {
    use super::super::tests::state;

    #[test]
    fn display_has_every_register() {
        let text = state().to_string();
        for name in ["rip", "rsp", "r15", "cr3", "mm7"] {
            assert!(text.contains(name), "{name} in {text}");
        }
    }
}
