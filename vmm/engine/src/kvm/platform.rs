//! Opens KVM and says which kind it is.
//!
//! Everything that can be known before there is a VM is checked here, so that a machine that cannot run
//! guests says so in a sentence with something to do in it.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::OnceLock;
use std::{fmt, fs};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use rustix::io::Errno;
use serde::Serialize;
use vmm_sys_util::errno;

use super::error::KvmError;
use super::msr::MsrSet;
use super::registers::vcpu_cpuid;

/// Where this ran, for the head of every report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Platform {
    /// `"pvm"`, `"vmx"`, `"svm"` or `"unknown"`.
    pub kvm: &'static str,
    /// How a guest's memory is translated.
    pub paging: Paging,
    /// Release of the host's kernel.
    pub kernel: String,
    /// CPUs that this process may use.
    pub cpus: usize,
}

/// How guest-physical addresses become the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Paging {
    /// AMD's nested page tables.
    Npt,
    /// Intel's extended page tables, with accessed and dirty bits: a walk of the guest's tables counts as a
    /// write to them.
    EptAd,
    /// The same without these bits.
    Ept,
    /// By page tables that KVM makes of the guest's, in software.
    Shadow,
    /// The kernel does not say.
    Unknown,
}

impl Paging {
    /// Its name in a report.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Npt => "npt",
            Self::EptAd => "ept-ad",
            Self::Ept => "ept",
            Self::Shadow => "shadow",
            Self::Unknown => "unknown",
        }
    }
}

impl Platform {
    /// Looks at the machine this runs on. Works without KVM.
    pub fn detect() -> Self {
        let (kvm, paging) = kvm_of(Path::new("/sys/module"));
        Self {
            kvm,
            paging,
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// The kind of KVM, and how it translates, by the kernel modules in `modules` and their parameters.
fn kvm_of(modules: &Path) -> (&'static str, Paging) {
    // Booleans are Y or N, and were numbers once.
    let is_on = |parameter: &str| {
        let text = fs::read_to_string(modules.join(parameter)).ok()?;
        match text.trim() {
            "Y" | "1" => Some(true),
            "N" | "0" => Some(false),
            _ => None,
        }
    };
    let is_there = |module: &str| modules.join(module).exists();
    // kvm_pvm first: it may be loaded beside a vendor module, and then it is the one that owns /dev/kvm.
    if is_there("kvm_pvm") {
        return ("pvm", Paging::Shadow);
    }
    if is_there("kvm_intel") {
        let paging = match (
            is_on("kvm_intel/parameters/ept"),
            is_on("kvm_intel/parameters/eptad"),
        ) {
            (Some(true), Some(true)) => Paging::EptAd,
            (Some(true), _) => Paging::Ept,
            (Some(false), _) => Paging::Shadow,
            (None, _) => Paging::Unknown,
        };
        return ("vmx", paging);
    }
    if is_there("kvm_amd") {
        let paging = match is_on("kvm_amd/parameters/npt") {
            Some(true) => Paging::Npt,
            Some(false) => Paging::Shadow,
            None => Paging::Unknown,
        };
        return ("svm", paging);
    }
    ("unknown", Paging::Unknown)
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kvm,
            paging,
            kernel,
            cpus,
        } = self;
        let paging = paging.name();
        write!(f, "kvm {kvm} ({paging}), linux {kernel}, {cpus} cpus")
    }
}

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// There is no `/dev/kvm`, or nothing behind it.
    #[error(
        "no /dev/kvm: load the kvm module (`modprobe kvm_intel` or `kvm_amd`), and enable virtualisation \
         in the firmware, or nested virtualisation if this is a virtual machine; in a container, pass \
         `--device /dev/kvm`"
    )]
    Missing,
    /// `/dev/kvm` is there, but not for this user.
    #[error(
        "no permission to open /dev/kvm: add yourself to the group kvm (`sudo usermod -aG kvm $USER`) and \
         log in again"
    )]
    Permission,
    /// `/dev/kvm` is a file of another kind, or another device.
    #[error(
        "/dev/kvm is {found}, and not the device of KVM: remove it, load the kvm module again, and see \
         that nothing else makes it (`mknod -m 660 /dev/kvm c 10 232` makes it by hand)"
    )]
    NotKvm {
        /// What it is.
        found: &'static str,
    },
    /// Another module (VirtualBox, say) holds the CPU's virtualisation extensions, or the file cannot be
    /// opened.
    #[error("cannot open /dev/kvm")]
    Open {
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
    /// Not the stable KVM API.
    #[error(
        "/dev/kvm speaks version {found} of the KVM API, not {KVM_API_VERSION}: this kernel is too old"
    )]
    ApiVersion {
        /// The version found.
        found: i32,
    },
    /// Something this VMM cannot do without is not there.
    #[error("this kernel's KVM lacks {}", .missing.join(", "))]
    Capabilities {
        /// Names of what is missing, as the kernel spells them.
        missing: Vec<&'static str>,
    },
    /// The CPUID that KVM supports could not be read.
    #[error("cannot read the cpuid that kvm supports")]
    Cpuid {
        /// What the kernel said.
        #[source]
        source: errno::Error,
    },
}

/// What a VM here cannot do without.
const REQUIRED: [(Cap, &str); 10] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    // Moving a page of the window under a running guest relies on KVM following the host's mappings.
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
];

/// Opened KVM, and what is the same for every VM on it.
#[derive(Debug)]
pub struct Kvm {
    pub(super) fd: kvm_ioctls::Kvm,
    pub(super) cpuid: CpuId,
    /// Which MSRs can be saved, probed with the first vCPU: it takes two system calls an MSR.
    pub(super) msrs: OnceLock<MsrSet>,
    platform: Platform,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that it can do what is needed.
    pub fn open() -> Result<Self, PlatformError> {
        let device = Path::new("/dev/kvm");
        let fd = kvm_ioctls::Kvm::new().map_err(|source| match something_else(device) {
            Some(found) => PlatformError::NotKvm { found },
            None => open_error(source),
        })?;
        let found = fd.get_api_version();
        // Whatever it is, it does not know the question.
        if found < 0 {
            let found = something_else(device).unwrap_or("another device");
            return Err(PlatformError::NotKvm { found });
        }
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(PlatformError::ApiVersion { found });
        }
        let missing: Vec<_> = REQUIRED
            .into_iter()
            .filter(|(cap, _)| !fd.check_extension(*cap))
            .map(|(_, name)| name)
            .collect();
        if !missing.is_empty() {
            return Err(PlatformError::Capabilities { missing });
        }
        let cpuid = fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| PlatformError::Cpuid { source })?;
        Ok(Self {
            fd,
            cpuid,
            msrs: OnceLock::new(),
            platform: Platform::detect(),
        })
    }

    /// MSRs that can't be saved or set back here: snapshots are without them. Makes a virtual machine to find
    /// out.
    ///
    /// # Errors
    /// If it can't be made.
    pub fn unsaved_msrs(&self) -> Result<Vec<u32>, KvmError> {
        let vm = create_vm(self)?;
        let vcpu = create_vcpu(&vm, 0, &vcpu_cpuid(&self.cpuid, 0))?;
        Ok(msr_set(self, &vcpu, 0)?.left_out)
    }

    /// Where this runs.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }
}

/// Creates the VM. The call allocates much, and gives up with `EINTR` when a signal comes in between.
pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.fd.create_vm() {
            Ok(vm) => return Ok(vm),
            Err(error) if error.errno() == Errno::INTR.raw_os_error() => {}
            Err(source) => return Err(KvmError::CreateVm { source }),
        }
    }
}

/// Creates vCPU `vcpu`.
pub(super) fn create_vcpu(
    vm: &VmFd,
    vcpu: usize,
    cpuid: &kvm_bindings::CpuId,
) -> Result<VcpuFd, KvmError> {
    let error = |source| KvmError::CreateVcpu { vcpu, source };
    let fd = vm.create_vcpu(vcpu as u64).map_err(error)?;
    fd.set_cpuid2(cpuid).map_err(error)?;
    Ok(fd)
}

/// The MSRs to save, probed with the first vCPU of this KVM.
pub(super) fn msr_set(kvm: &Kvm, fd: &VcpuFd, vcpu: usize) -> Result<MsrSet, KvmError> {
    if let Some(msrs) = kvm.msrs.get() {
        return Ok(msrs.clone());
    }
    let msrs = MsrSet::probe(&kvm.fd, fd).map_err(|source| KvmError::State { vcpu, source })?;
    Ok(kvm.msrs.get_or_init(|| msrs).clone())
}

/// What is at `path`, if it is not a character device.
fn something_else(path: &Path) -> Option<&'static str> {
    let kind = fs::metadata(path).ok()?.file_type();
    match kind {
        _ if kind.is_char_device() => None,
        _ if kind.is_file() => Some("a regular file"),
        _ if kind.is_dir() => Some("a directory"),
        _ if kind.is_fifo() => Some("a pipe"),
        _ if kind.is_socket() => Some("a socket"),
        _ => Some("a block device"),
    }
}

/// What it means that `/dev/kvm` could not be opened.
fn open_error(source: errno::Error) -> PlatformError {
    match Errno::from_raw_os_error(source.errno()) {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => PlatformError::Missing,
        Errno::ACCESS | Errno::PERM => PlatformError::Permission,
        _ => PlatformError::Open { source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        let text = |errno| open_error(errno::Error::new(errno)).to_string();
        assert!(text(2).contains("load the kvm module"));
        assert!(text(19).contains("load the kvm module"));
        assert!(text(13).contains("group kvm"));
        assert_eq!(text(16), "cannot open /dev/kvm");
        let missing = PlatformError::Capabilities {
            missing: vec!["KVM_CAP_XSAVE", "KVM_CAP_XCRS"],
        };
        assert_eq!(
            missing.to_string(),
            "this kernel's KVM lacks KVM_CAP_XSAVE, KVM_CAP_XCRS"
        );
    }

    #[test]
    fn what_is_not_kvm_is_said_to_be_that() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kvm");
        fs::write(&file, "").unwrap();
        assert_eq!(something_else(&file), Some("a regular file"));
        assert_eq!(something_else(directory.path()), Some("a directory"));
        assert_eq!(something_else(Path::new("/dev/null")), None);
        assert_eq!(something_else(&directory.path().join("none")), None);
    }

    #[test]
    fn modules_and_their_parameters_say_which_kvm_it_is() {
        let kvm = |files: &[(&str, &str)]| {
            let modules = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = modules.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            kvm_of(modules.path())
        };
        let [ept, ad] = ["kvm_intel/parameters/ept", "kvm_intel/parameters/eptad"];
        assert_eq!(kvm(&[(ept, "Y\n"), (ad, "Y\n")]), ("vmx", Paging::EptAd));
        assert_eq!(kvm(&[(ept, "Y\n"), (ad, "N\n")]), ("vmx", Paging::Ept));
        assert_eq!(kvm(&[(ept, "N\n"), (ad, "N\n")]), ("vmx", Paging::Shadow));
        let npt = "kvm_amd/parameters/npt";
        assert_eq!(kvm(&[(npt, "Y\n")]), ("svm", Paging::Npt));
        assert_eq!(kvm(&[(npt, "1\n")]), ("svm", Paging::Npt));
        assert_eq!(kvm(&[(npt, "0\n")]), ("svm", Paging::Shadow));
        assert_eq!(kvm(&[("kvm_amd/refcnt", "0")]), ("svm", Paging::Unknown));
        assert_eq!(
            kvm(&[("kvm_pvm/refcnt", "0"), (npt, "1")]),
            ("pvm", Paging::Shadow)
        );
        assert_eq!(kvm(&[]), ("unknown", Paging::Unknown));
    }

    #[test]
    fn a_paging_has_one_name() {
        for paging in [
            Paging::Npt,
            Paging::EptAd,
            Paging::Ept,
            Paging::Shadow,
            Paging::Unknown,
        ] {
            assert_eq!(serde_json::to_value(paging).unwrap(), paging.name());
        }
    }

    #[test]
    fn platform_is_one_line() {
        let platform = Platform::detect();
        assert!(["pvm", "vmx", "svm", "unknown"].contains(&platform.kvm));
        assert!(platform.cpus > 0 && !platform.kernel.is_empty());
        assert!(!platform.to_string().contains('\n'));
    }
}
