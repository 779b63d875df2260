//! What a machine needs of a host to run on there.

use super::cpu;
use super::store::Machine;
use crate::kvm::registers::vcpu_cpuid;
use crate::kvm::{KvmError, StateError, StateKind, VcpuState};
use crate::snapshot::Snapshot;
use crate::vm::By;

/// Why a machine cannot run on here.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Something else ran its vCPUs.
    #[error(
        "its vcpus were run by {theirs}, and here they would be by {ours}: they have not the same registers{}",
        advice(theirs)
    )]
    Accelerator {
        /// What did.
        theirs: String,
        /// What does here.
        ours: StateKind,
    },
    /// The CPU is another maker's.
    #[error("it ran on a CPU of {theirs}, and this is one of {ours}: they do not do the same")]
    Vendor {
        /// Whose it was.
        theirs: String,
        /// Whose it is here.
        ours: String,
    },
    /// The CPU, or KVM on it, lacks what the guest has seen.
    #[error(
        "its guest has seen what this CPU and accelerator have not: {}", .missing.join(", ")
    )]
    Features {
        /// What.
        missing: Vec<String>,
    },
    /// What was stored as features is none.
    #[error("what it says of its CPU makes no sense")]
    NoCpu,
    /// MSRs that were saved cannot be set.
    #[error("it has MSRs that cannot be set here: {}", in_hex(.missing))]
    Msrs {
        /// Their numbers.
        missing: Vec<u32>,
    },
    /// KVM does not say what it can do.
    #[error("cannot find out what can be set here")]
    Kvm(#[from] KvmError),
}

/// What was saved may say anything: only what there is is advised.
fn advice(theirs: &str) -> String {
    match theirs {
        "kvm" | "user" => format!("; it runs on under {theirs} only"),
        _ => String::new(),
    }
}

fn in_hex(numbers: &[u32]) -> String {
    let words: Vec<_> = numbers.iter().map(|n| format!("{n:#x}")).collect();
    words.join(", ")
}

/// How much slower or faster a guest's time may go than where it was saved before that is said: in thousandths.
const CLOCK_TOLERANCE: u64 = 1;

/// What is to be known of the machine that `snapshot` is of, which `by` runs. `tsc_khz` is how fast its guests'
/// time-stamp counter is; 0 if that is not known.
///
/// # Errors
/// If the state of a vCPU is none.
pub fn machine<'a>(
    by: impl Into<By<'a>>,
    snapshot: &Snapshot,
    tsc_khz: u32,
) -> Result<Machine, StateError> {
    let by = by.into();
    let first = snapshot.vcpus().first().map(VcpuState::of_saved);
    let msrs = first.transpose()?.map(|state| state.msr_indices());
    let platform = match by {
        By::Kvm(kvm) => kvm.platform(),
        By::User(user) => user.platform(),
    };
    Ok(Machine {
        vcpus: snapshot.vcpus().len() as u32,
        devices: snapshot.devices().len() as u32,
        accelerator: kind(by).to_string(),
        platform: format!("{}, Linux {}", platform.kvm, platform.kernel),
        tsc_khz,
        cpu: seen_under(by),
        msrs: msrs.unwrap_or_default(),
    })
}

/// Whether a machine can run on here, where `by` would run it. Says what is not as it was, and does not keep it from
/// that.
///
/// # Errors
/// See [`Refusal`].
pub fn check<'a>(
    by: impl Into<By<'a>>,
    machine: &Machine,
    tsc_khz: u32,
) -> Result<Vec<String>, Refusal> {
    let by = by.into();
    let ours = kind(by);
    if machine.accelerator != ours.to_string() {
        let theirs = machine.accelerator.escape_debug().to_string();
        return Err(Refusal::Accelerator { theirs, ours });
    }
    let cpu = seen_under(by);
    if machine.cpu.vendor != cpu.vendor {
        return Err(Refusal::Vendor {
            theirs: machine.cpu.vendor.escape_debug().to_string(),
            ours: cpu.vendor,
        });
    }
    let missing = cpu::missing(&machine.cpu, &cpu).ok_or(Refusal::NoCpu)?;
    if !missing.is_empty() {
        return Err(Refusal::Features { missing });
    }
    if let By::Kvm(kvm) = by {
        let settable = kvm.saved_msrs()?;
        let missing = machine.msrs.iter().copied();
        let missing = Vec::from_iter(missing.filter(|msr| !settable.contains(msr)));
        if !missing.is_empty() {
            return Err(Refusal::Msrs { missing });
        }
    }
    let mut notes = Vec::new();
    if machine.cpu.brand != cpu.brand {
        notes.push(format!(
            "it ran on `{}`, and goes on on `{}`",
            machine.cpu.brand.escape_debug(),
            cpu.brand
        ));
    }
    let (theirs, ours) = (u64::from(machine.tsc_khz), u64::from(tsc_khz));
    let is_other = theirs.abs_diff(ours) > theirs * CLOCK_TOLERANCE / 1000;
    if theirs != 0 && ours != 0 && is_other {
        notes.push(format!(
            "its time-stamp counter went at {theirs} kHz, and goes at {ours} kHz here"
        ));
    }
    Ok(notes)
}

fn kind(by: By<'_>) -> StateKind {
    match by {
        By::Kvm(_) => StateKind::Kvm,
        By::User(_) => StateKind::User,
    }
}

fn seen_under(by: By<'_>) -> super::store::Cpu {
    match by {
        By::Kvm(kvm) => cpu::of_cpuid(&vcpu_cpuid(kvm.cpuid(), 0)),
        By::User(_) => cpu::own(),
    }
}
