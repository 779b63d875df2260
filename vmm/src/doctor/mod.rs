//! What this machine can and cannot do for a run, found out by trying wherever that is possible.
//!
//! Each check is a [`Finding`]: fine, worse than it could be, or the reason why nothing will run;
//! with what to do about it. Nothing that is found is kept: a VM, a file in memory and some
//! threads are made and gone again.
//!
//! | file | asks |
//! |---|---|
//! | `kvm` | which KVM is it, does it make a virtual machine, which registers can it not save? |
//! | `user` | can a guest run without it? |
//! | `memory` | is there enough of it, who limits it, is it huge? |
//! | `process` | CPUs, mappings, threads, files, signals |
//!
//! Not covered: whether a run will go well. The oracles say that.

mod kvm;
mod memory;
mod process;
mod user;

use serde::Serialize;

use crate::session::config::Config;
use palimpsest::kvm::Platform;

/// How good something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// As it should be.
    Ok,
    /// Runs go, but slower or with less.
    Worse,
    /// No run will go.
    No,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, in a word.
    pub name: &'static str,
    /// Whether it is fine, worse than it could be, or in the way of any run.
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub advice: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            grade: Grade::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn worse(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            grade: Grade::Worse,
            advice: Some(advice.into()),
            ..Self::ok(name, found)
        }
    }

    fn no(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            grade: Grade::No,
            ..Self::worse(name, found, advice)
        }
    }
}

/// All that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Examination {
    /// Version of the program.
    pub version: &'static str,
    /// The machine.
    pub platform: Platform,
    /// Whether the run that was asked about can go here.
    pub can_run: bool,
    /// By what was looked at.
    pub findings: Vec<Finding>,
}

/// Finds out whether `config` can run here, and how well.
pub fn examine(config: &Config) -> Examination {
    let platform = Platform::detect();
    let (mut findings, user) = (kvm::examine(&platform), user::examine());
    if user.grade == Grade::Ok {
        // Runs go without KVM too.
        let no = |finding: &&mut Finding| finding.grade == Grade::No;
        findings
            .iter_mut()
            .filter(no)
            .for_each(|finding| finding.grade = Grade::Worse);
    }
    findings.push(user);
    findings.push(process::cpus(&platform, config));
    findings.extend(memory::examine(config));
    findings.extend(process::examine(config));
    Examination {
        version: env!("CARGO_PKG_VERSION"),
        platform,
        can_run: findings.iter().all(|finding| finding.grade != Grade::No),
        findings,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::config::tests::example;

    #[test]
    fn what_is_not_fine_comes_with_what_to_do() {
        let examination = examine(&example());
        for finding in &examination.findings {
            assert_eq!(
                finding.advice.is_none(),
                finding.grade == Grade::Ok,
                "{finding:?}"
            );
        }
        let names = examination.findings.iter().map(|finding| finding.name);
        let once: std::collections::BTreeSet<_> = names.clone().collect();
        assert_eq!(once.len(), names.count(), "{examination:?}");
    }

    #[test]
    fn a_guest_that_has_no_room_cannot_run() {
        let mut config = example();
        config.memory = 128 << 30;
        let examination = examine(&config);
        let memory = examination
            .findings
            .iter()
            .find(|finding| finding.name == "memory")
            .unwrap();
        // Nobody tests on a machine with half a tebibyte. Should somebody, this guest runs there.
        if memory.grade == Grade::No {
            assert!(!examination.can_run);
            assert!(memory.found.contains("needs "), "{memory:?}");
        }
    }
}
