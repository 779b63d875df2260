//! What is run in a host, and how it must end.

use std::time::Duration;

use clap::ValueEnum;
use vmm::session::config::Injection;

use super::programs::{KEPT, LIBRARY};

/// A command to run in a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Task {
    /// The suite it is of; `None` for a command that was given by hand.
    pub(crate) suite: Option<Suite>,
    /// The program and its arguments, as they are in the host.
    pub(crate) command: Vec<String>,
    /// The exit code that is right.
    pub(crate) expected: i32,
    /// It is killed after that long, by the host's clock.
    pub(crate) limit: Duration,
}

/// A group of tasks that is asked for by one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Suite {
    /// The main job: one and two vCPUs, every pattern
    Main,
    /// A guest and clones of it, and a tree of them
    Fork,
    /// Every fault that can be injected
    Faults,
    /// The race of the policies, and the scenarios
    Compare,
    /// The tests of tests/, and the library's own of what touches KVM
    Tests,
}

impl Suite {
    pub(crate) const ALL: [Self; 5] = [
        Self::Main,
        Self::Fork,
        Self::Faults,
        Self::Compare,
        Self::Tests,
    ];
}

/// How much of `compare` and the tests there is time for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// All there is.
    Full,
    /// Every scenario, and no race, which depends on how fast the guest is; and tests that do not take long.
    Short,
    /// A scenario of each kind.
    Sample,
}

/// The tests that take a slow host long: of the screen, the command line, scenarios and families, which
/// are much the same on all.
const LONG: [&str; 3] = ["cli", "compare", "fork"];

/// The tests that talk to a server on the loopback device, which hosts here do not set up. What they show is the same
/// on all.
const NETWORK: [&str; 2] = ["remote", "s3"];

/// Tests of which the emulator of a processor is at fault if they fail, and why.
const EMULATOR: [(&str, &str); 1] = [(
    // QEMU 7.2 gives `rcl m64` its carry before the store faults: done again, it is of another carry.
    "guests",
    "every_kind_of_write_works_under_snapshots",
)];

/// The exit code of what was killed for taking too long.
pub(crate) const KILLED: i32 = 128 + 9;

/// The exit code of who has found a violation.
const FOUND: i32 = 3;

/// Nothing that is right takes longer, however slow the host.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

impl Task {
    /// A command given by hand.
    pub(crate) fn given(command: &[String]) -> Self {
        Self {
            suite: None,
            command: command.to_vec(),
            expected: 0,
            limit: LIMIT,
        }
    }

    fn of(suite: Suite, command: &[&str]) -> Self {
        let command = Vec::from_iter(command.iter().map(|&word| word.to_owned()));
        let suite = Some(suite);
        Self {
            suite,
            ..Self::given(&command)
        }
    }

    /// The same, with another exit code that is right.
    pub(crate) fn expecting(self, expected: i32) -> Self {
        Self { expected, ..self }
    }

    /// The same, with another limit.
    pub(crate) fn within(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// The command in one line.
    pub(crate) fn title(&self) -> String {
        self.command.join(" ")
    }
}

/// All tasks of `suite`. `tests` names the tests there are.
pub(crate) fn tasks(suite: Suite, extent: Extent, tests: &[String]) -> Vec<Task> {
    match suite {
        Suite::Main => main_job(),
        Suite::Fork => families(),
        Suite::Faults => faults(extent),
        Suite::Compare => compare(extent),
        Suite::Tests => tests
            .iter()
            .filter(|name| !NETWORK.contains(&name.as_str()))
            .filter(|name| extent == Extent::Full || !LONG.contains(&name.as_str()))
            .map(|name| test(name))
            .collect(),
    }
}

fn main_job() -> Vec<Task> {
    let job = |vcpus: &str, pattern: &str| {
        let command = format!(
            "vmm --memory 32M --snapshots 20 --seed 1 --track-dirty 50ms --vcpus {vcpus} --pattern {pattern}"
        );
        Task::of(Suite::Main, &Vec::from_iter(command.split(' ')))
    };
    let patterns = ["dense", "uniform", "hot", "sparse"];
    let jobs = |vcpus| patterns.map(|pattern| job(vcpus, pattern));
    ["1", "2"].into_iter().flat_map(jobs).collect()
}

/// Families: right ones of both shapes, and one that breaks the rules.
fn families() -> Vec<Task> {
    let family = |flags: &str| {
        let command = format!("vmm fork --memory 32M --warm-up 1s --duration 4s --seed 1 {flags}");
        Task::of(Suite::Fork, &Vec::from_iter(command.split(' ')))
    };
    vec![
        family("-n 3"),
        family("--depth 2 --width 2 --pattern uniform"),
        family("-n 2 --inject reuse-shared").expecting(FOUND),
    ]
}

/// Every injected fault, which an oracle must find.
fn faults(extent: Extent) -> Vec<Task> {
    // A run with a fault in it lasts until the fault could be seen, however few there are.
    let snapshots = if extent == Extent::Full { "40" } else { "6" };
    let fault = |fault: Injection| {
        let mut command = vec![
            "vmm",
            "--memory",
            "32M",
            "--snapshots",
            snapshots,
            "--seed",
            "1",
        ];
        if fault == Injection::ForgetDirty {
            command.extend(["--track-dirty", "50ms"]);
        }
        command.extend(["--inject", fault.name()]);
        Task::of(Suite::Faults, &command).expecting(FOUND)
    };
    Injection::ALL.into_iter().map(fault).collect()
}

fn compare(extent: Extent) -> Vec<Task> {
    let command = |flags: &str| {
        let command = format!("vmm compare {flags}");
        Task::of(Suite::Compare, &Vec::from_iter(command.split(' ')))
    };
    match extent {
        // A slow guest needs long to show what a wrong policy does to it.
        Extent::Full => vec![command("--duration 30s --memory 16M --seed 1").within(6 * LIMIT)],
        Extent::Short => vec![command("--no-race").within(2 * LIMIT)],
        Extent::Sample => ["A1", "B1", "C1", "D1", "F1", "S1", "S4"]
            .map(|id| command(&format!("--scenario {id}")))
            .to_vec(),
    }
}

fn test(name: &str) -> Task {
    let program = format!("/tests/{name}");
    let mut command = vec![program.as_str(), "--test-threads=1"];
    // The rest of the library's own has nothing to do with what it runs on.
    if name == LIBRARY {
        command.extend(["kvm::", "host::", "vm::tests::lazy"]);
    }
    // Nor has that of what is kept: registers that are set from bytes, and clones of a load.
    if name == KEPT {
        command.extend(["what_is_saved_under_load", "clones_of_what_was_saved"]);
    }
    let at_fault = EMULATOR.iter().filter(|(program, _)| *program == name);
    command.extend(at_fault.flat_map(|(_, test)| ["--skip", test]));
    Task::of(Suite::Tests, &command).within(5 * LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pattern_runs_on_one_vcpu_and_on_two() {
        let titles = Vec::from_iter(main_job().iter().map(Task::title));
        for vcpus in ["1", "2"] {
            for pattern in ["dense", "uniform", "hot", "sparse"] {
                let flags = format!("--vcpus {vcpus} --pattern {pattern}");
                let found = titles.iter().filter(|title| title.contains(&flags));
                assert_eq!(found.count(), 1, "{flags}");
            }
        }
    }

    #[test]
    fn there_is_time_for_some_tests_with_every_change_and_for_all_by_hand() {
        let names = ["cli", "leftovers", LIBRARY, KEPT, "remote", "s3"].map(str::to_owned);
        assert_eq!(tasks(Suite::Tests, Extent::Full, &names).len(), 4);
        let soon = tasks(Suite::Tests, Extent::Short, &names);
        let titles = Vec::from_iter(soon.iter().map(Task::title));
        assert_eq!(titles.len(), 3);
        assert!(
            titles[1].ends_with("--test-threads=1 kvm:: host:: vm::tests::lazy"),
            "{titles:?}"
        );
        assert!(
            titles[2].ends_with(" clones_of_what_was_saved"),
            "{titles:?}"
        );
    }

    #[test]
    fn every_fault_must_be_found() {
        let faults = faults(Extent::Full);
        assert_eq!(faults.len(), Injection::ALL.len());
        assert!(faults.iter().all(|task| task.expected == 3));
    }
}
