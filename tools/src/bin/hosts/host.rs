//! The hosts there are.

use super::packages::{self, Set};

/// A host to be emulated: a processor, how its KVM is to use it, and a kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// What `--host` calls it.
    pub(crate) name: &'static str,
    /// What it is, for people.
    pub(crate) about: &'static str,
    pub(crate) processor: Processor,
    /// Where its kernel and modules come from.
    pub(crate) kernel: &'static Set,
    /// What the module of its KVM is told.
    pub(crate) parameter: &'static str,
}

/// Whose virtualization is emulated. It decides the emulator, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Processor {
    /// SVM, by QEMU.
    Amd,
    /// VMX, by Bochs.
    Intel,
}

impl Processor {
    /// The module that makes a KVM of it.
    pub(crate) const fn module(self) -> &'static str {
        match self {
            Self::Amd => "kvm-amd",
            Self::Intel => "kvm-intel",
        }
    }

    /// The packages its emulator comes in.
    pub(crate) const fn emulator(self) -> &'static [&'static Set] {
        match self {
            Self::Amd => &[&packages::QEMU],
            Self::Intel => &[&packages::BOCHS, &packages::GRUB],
        }
    }
}

/// Every host, in the order in which `--all` boots them.
pub(crate) const ALL: [Host; 5] = [
    Host {
        name: "amd",
        about: "AMD, nested paging",
        processor: Processor::Amd,
        kernel: &packages::LINUX_6_1,
        parameter: "npt=1",
    },
    Host {
        name: "amd-npt0",
        about: "AMD, shadow paging",
        processor: Processor::Amd,
        kernel: &packages::LINUX_6_1,
        parameter: "npt=0",
    },
    Host {
        name: "amd-6.12",
        about: "AMD, nested paging, a kernel with huge folios",
        processor: Processor::Amd,
        kernel: &packages::LINUX_6_12,
        parameter: "npt=1",
    },
    Host {
        name: "intel",
        about: "Intel, EPT with accessed and dirty bits",
        processor: Processor::Intel,
        kernel: &packages::LINUX_6_1,
        parameter: "eptad=1",
    },
    Host {
        name: "intel-eptad0",
        about: "Intel, EPT without accessed and dirty bits",
        processor: Processor::Intel,
        kernel: &packages::LINUX_6_1,
        parameter: "eptad=0",
    },
];

/// The host that is called `name`.
pub(crate) fn named(name: &str) -> Option<&'static Host> {
    const HOSTS: &[Host] = &ALL;
    HOSTS.iter().find(|host| host.name == name)
}
