//! Opens KVM.
//!
//! Everything that can be known before there is a VM is checked here, so that a machine that cannot run
//! guests says so in a sentence with something to do in it.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::OnceLock;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;
use rustix::io::Errno;
use vmm_sys_util::errno;

use super::msr::MsrSet;
use super::platform::Platform;

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
    ///
    /// # Errors
    /// If there is none, or not for this user, or it lacks something: see [`PlatformError`].
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

    /// Where this runs.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// The CPUID that it supports.
    pub(crate) fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }
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
}
