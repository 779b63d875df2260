//! Which kind of KVM this host has, and how it translates a guest's addresses.
//!
//! It is told by the kernel modules that are loaded and their parameters, and works without KVM.

use std::path::Path;
use std::{fmt, fs};

use serde::Serialize;

/// Where this ran, for the head of every report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Platform {
    /// `"pvm"`, `"vmx"`, `"svm"` or `"unknown"`; `"none"` if guest code runs without it.
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
    /// Not at all: they are the same.
    Host,
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
            Self::Host => "host",
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

#[cfg(test)]
mod tests {
    use super::*;

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
            Paging::Host,
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
