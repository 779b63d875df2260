//! KVM: which one it is, whether it makes a virtual machine, and which registers it cannot save.

use super::Finding;
use palimpsest::causes::chain;
use palimpsest::kvm::{Kvm, Paging, Platform, PlatformError};

/// MSRs that are named; the others are counted.
const NAMED: usize = 4;

pub(super) fn examine(platform: &Platform) -> Vec<Finding> {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return vec![cannot_open(&error)],
    };
    let unsaved = match kvm.unsaved_msrs() {
        Ok(unsaved) => unsaved,
        Err(error) => {
            let advice = "see what `dmesg` says, and whether the limits below let it";
            return vec![Finding::no("kvm", chain(&error), advice)];
        }
    };
    vec![which(platform), registers(&unsaved)]
}

/// What the error says of what there is, and of what to do.
fn cannot_open(error: &PlatformError) -> Finding {
    let text = chain(error);
    match text.split_once(": ") {
        Some((found, advice)) if has_advice(error) => Finding::no("kvm", found, advice),
        _ => Finding::no("kvm", text, "see what `dmesg` says of kvm"),
    }
}

/// Whether what follows the colon is what to do.
fn has_advice(error: &PlatformError) -> bool {
    matches!(
        error,
        PlatformError::Missing | PlatformError::Permission | PlatformError::NotKvm { .. }
    )
}

fn which(platform: &Platform) -> Finding {
    let found = match (platform.kvm, platform.paging) {
        ("pvm", _) => "PVM: KVM in software, without VMX or SVM".to_owned(),
        ("svm", Paging::Npt) => "SVM with nested paging (NPT)".to_owned(),
        ("svm", Paging::Shadow) => "SVM without nested paging: shadow page tables".to_owned(),
        ("vmx", Paging::EptAd) => "VMX with EPT, with accessed and dirty bits".to_owned(),
        ("vmx", Paging::Ept) => "VMX with EPT, without accessed and dirty bits".to_owned(),
        ("vmx", Paging::Shadow) => "VMX without EPT: shadow page tables".to_owned(),
        (kvm, _) => format!("{kvm}; the kernel does not say how it pages"),
    };
    match (platform.kvm, platform.paging) {
        ("pvm", _) => Finding::worse(
            "kvm",
            found,
            "every exit and fault costs more than in hardware: where there is VMX or SVM, use it",
        ),
        (module @ ("svm" | "vmx"), Paging::Shadow) => {
            let parameter = if module == "svm" {
                "kvm_amd npt=1"
            } else {
                "kvm_intel ept=1"
            };
            let advice =
                format!("load it as `modprobe {parameter}`, if the CPU can: faults cost less");
            Finding::worse("kvm", found, advice)
        }
        _ => Finding::ok("kvm", found),
    }
}

fn registers(unsaved: &[u32]) -> Finding {
    if unsaved.is_empty() {
        return Finding::ok("registers", "all that KVM lists can be saved and restored");
    }
    let named: Vec<String> = unsaved
        .iter()
        .take(NAMED)
        .map(|msr| format!("{msr:#x}"))
        .collect();
    let more = match unsaved.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Finding::worse(
        "registers",
        format!("MSRs that cannot be saved here: {}{more}", named.join(", ")),
        "a restore leaves them as they are; the payload uses none of them, yours should not (`vmm -v` \
         names all)",
    )
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;

    fn platform(kvm: &'static str, paging: Paging) -> Platform {
        Platform {
            kvm,
            paging,
            kernel: "6.12.0".to_owned(),
            cpus: 2,
        }
    }

    #[test]
    fn every_kvm_is_graded() {
        use Paging::{Ept, EptAd, Npt, Shadow, Unknown};
        for (kvm, paging, grade) in [
            ("pvm", Shadow, Grade::Worse),
            ("svm", Npt, Grade::Ok),
            ("svm", Shadow, Grade::Worse),
            ("vmx", EptAd, Grade::Ok),
            ("vmx", Ept, Grade::Ok),
            ("vmx", Shadow, Grade::Worse),
            ("unknown", Unknown, Grade::Ok),
        ] {
            let finding = which(&platform(kvm, paging));
            assert_eq!(finding.grade, grade, "{finding:?}");
        }
        let advice = which(&platform("svm", Shadow)).advice.unwrap();
        assert!(advice.contains("kvm_amd npt=1"), "{advice}");
    }

    #[test]
    fn what_cannot_be_opened_says_what_to_do() {
        let finding = cannot_open(&PlatformError::Permission);
        assert_eq!(finding.found, "no permission to open /dev/kvm");
        assert!(finding.advice.unwrap().contains("group kvm"));
        let finding = cannot_open(&PlatformError::NotKvm {
            found: "a regular file",
        });
        assert!(finding.found.contains("is a regular file"), "{finding:?}");
        let finding = cannot_open(&PlatformError::Capabilities {
            missing: vec!["KVM_CAP_XSAVE"],
        });
        assert_eq!(finding.found, "this kernel's KVM lacks KVM_CAP_XSAVE");
    }

    #[test]
    fn registers_that_are_lost_are_named() {
        assert_eq!(registers(&[]).grade, Grade::Ok);
        let finding = registers(&[0x10, 0x11]);
        assert_eq!(finding.found, "MSRs that cannot be saved here: 0x10, 0x11");
        let finding = registers(&[1, 2, 3, 4, 5, 6]);
        assert!(finding.found.ends_with("0x4 and 2 more"), "{finding:?}");
    }
}
