//! Entering the guest, and why it came out.

#![expect(unsafe_code, reason = "the union of exit data in kvm_run")]

use std::ops::Range;

use kvm_ioctls::VcpuExit;
use rustix::io::Errno;
use vmm_sys_util::errno;

use super::Vcpu;
use crate::causes::Cause;
use crate::kvm::memory::GuestRam;
use crate::kvm::outcome::CrashReason;

/// An exit from the guest, without the borrows of KVM's.
pub(super) enum Exit {
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// A port was written.
    Out { port: u16, value: u32 },
    /// KVM emulates a store to memory that it may not write, and was given it to carry out: see
    /// [`Vcpu::store`].
    Store { gpa: u64, data: [u8; 8], len: usize },
    /// KVM emulates a load from memory, and has been given what is there.
    Loaded,
    /// The same, and what is there cannot be had.
    NotLoaded { gpa: u64, source: Cause },
    /// The guest wants to set an MSR by which KVM writes to memory.
    SetMsr { index: u32, value: u64 },
    /// A write fault, with the gpas it is about if KVM says so.
    WriteFault(Option<Range<u64>>),
    /// What a guest must not do.
    Crash(CrashReason),
    /// `KVM_RUN` failed.
    Error(errno::Error),
}

impl Vcpu {
    /// Runs the guest until it exits.
    pub(super) fn enter_guest(&mut self) -> Exit {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => match *data {
                [a] => Exit::Out {
                    port,
                    value: a.into(),
                },
                [a, b] => Exit::Out {
                    port,
                    value: u16::from_le_bytes([a, b]).into(),
                },
                [a, b, c, d] => Exit::Out {
                    port,
                    value: u32::from_le_bytes([a, b, c, d]),
                },
                _ => Exit::Crash(CrashReason::PortString {
                    port,
                    len: data.len(),
                }),
            },
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                Exit::WriteFault(Some(gpa..gpa.saturating_add(size.max(1))))
            }
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => Exit::Crash(CrashReason::Shutdown),
            Ok(VcpuExit::Hlt) => Exit::Crash(CrashReason::Halt),
            Ok(VcpuExit::IoIn(port, _)) => Exit::Crash(CrashReason::PortRead { port }),
            Ok(VcpuExit::MmioRead(gpa, data)) => match self.ram.read(gpa, data) {
                Ok(()) => Exit::Loaded,
                Err(source) if is_memory(&*self.ram, gpa, data.len()) => {
                    Exit::NotLoaded { gpa, source }
                }
                Err(_) => Exit::Crash(CrashReason::Mmio { gpa, write: false }),
            },
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                let len = data.len();
                let mut bytes = [0; 8];
                match bytes.get_mut(..len) {
                    Some(bytes) if is_memory(&*self.ram, gpa, len) => bytes.copy_from_slice(data),
                    _ => return Exit::Crash(CrashReason::Mmio { gpa, write: true }),
                }
                Exit::Store {
                    gpa,
                    data: bytes,
                    len,
                }
            }
            Ok(VcpuExit::X86Wrmsr(msr)) => Exit::SetMsr {
                index: msr.index,
                value: msr.data,
            },
            Ok(VcpuExit::FailEntry(reason, _)) => Exit::Crash(CrashReason::FailEntry { reason }),
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit is KVM_EXIT_INTERNAL_ERROR, so this is the field of the union that KVM
                // filled.
                let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
                Exit::Crash(CrashReason::InternalError { suberror })
            }
            Ok(_) => {
                let reason = self.fd.get_kvm_run().exit_reason;
                Exit::Crash(CrashReason::Unexpected { reason })
            }
            Err(error) => match Errno::from_raw_os_error(error.errno()) {
                Errno::INTR => Exit::Interrupted,
                Errno::FAULT => Exit::WriteFault(None),
                _ => Exit::Error(error),
            },
        }
    }
}

/// Whether guest memory has `len` bytes at `gpa`.
fn is_memory(ram: &dyn GuestRam, gpa: u64, len: usize) -> bool {
    gpa.checked_add(len as u64)
        .is_some_and(|end| end <= ram.len())
}
