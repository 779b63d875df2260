//! Which tasks run on which hosts.

use super::host::{self, Host, Processor};
use super::task::{Extent, Suite};

/// A host, and the tasks that are run on it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Assignment {
    pub(crate) host: &'static Host,
    pub(crate) suites: Vec<Suite>,
    pub(crate) extent: Extent,
}

/// All that there is time for on `host`, of `suites` if any are named. Tests take as long as all the rest,
/// and have an emulator of their own.
pub(crate) fn by_hand(host: &'static Host, suites: &[Suite]) -> Vec<Assignment> {
    let (possible, extent) = match host.processor {
        Processor::Amd => (&Suite::ALL[..], Extent::Full),
        // Slower by far: the tests would take hours.
        Processor::Intel => (
            &[Suite::Main, Suite::Fork, Suite::Faults, Suite::Compare][..],
            Extent::Sample,
        ),
    };
    let suites = if suites.is_empty() { possible } else { suites };
    let is_test = |suite: &&Suite| **suite == Suite::Tests;
    let (tests, rest): (Vec<_>, Vec<_>) = suites.iter().partition(is_test);
    // All of them on one host: most are about the program, and the program is the same.
    let extent_of_tests = if host.name == "amd" {
        extent
    } else {
        Extent::Short
    };
    let assignments = [(rest, extent), (tests, extent_of_tests)];
    let assignments = assignments.map(|(suites, extent)| Assignment {
        host,
        suites,
        extent,
    });
    assignments
        .into_iter()
        .filter(|assignment| !assignment.suites.is_empty())
        .collect()
}

/// `host` without any of our tasks, for a command that the user gave.
pub(crate) fn for_a_command(host: &'static Host) -> Assignment {
    Assignment {
        host,
        suites: Vec::new(),
        extent: Extent::Full,
    }
}

/// What a change must pass to land: all on the host that most machines are like, and a look at the other
/// way to run a guest there.
pub(crate) fn for_every_change() -> Vec<Assignment> {
    let assignment = |name: &str, suites: &[Suite]| {
        host::named(name).map(|host| Assignment {
            host,
            suites: suites.to_vec(),
            extent: Extent::Short,
        })
    };
    // What takes longest goes first.
    let assignments = [
        assignment("amd", &[Suite::Tests]),
        assignment(
            "amd",
            &[Suite::Main, Suite::Fork, Suite::Faults, Suite::Compare],
        ),
        assignment(
            "amd-npt0",
            &[Suite::Main, Suite::Fork, Suite::Faults, Suite::Compare],
        ),
    ];
    assignments.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_meets_both_ways_of_paging() {
        let assignments = for_every_change();
        let suites = |host: &str| {
            let those = assignments
                .iter()
                .filter(|assignment| assignment.host.name == host);
            let mut suites =
                Vec::from_iter(those.flat_map(|assignment| &assignment.suites).copied());
            suites.sort();
            suites
        };
        assert_eq!(suites("amd"), Suite::ALL);
        assert_eq!(suites("amd-npt0"), Suite::ALL[..4]);
    }

    #[test]
    fn parts_can_be_chosen() {
        let assignments = by_hand(&host::ALL[0], &[Suite::Faults]);
        let suites = Vec::from_iter(assignments.iter().map(|assignment| &assignment.suites[..]));
        assert_eq!(suites, [[Suite::Faults]]);
        for host in &host::ALL {
            let has_main = |assignment: &Assignment| assignment.suites.contains(&Suite::Main);
            assert!(by_hand(host, &[]).iter().any(has_main), "{}", host.name);
        }
    }

    #[test]
    fn tests_have_an_emulator_of_their_own() {
        let assignments = by_hand(&host::ALL[0], &[]);
        let suites = Vec::from_iter(assignments.iter().map(|assignment| &assignment.suites[..]));
        let rest = &Suite::ALL[..4];
        assert_eq!(suites, [rest, &[Suite::Tests]]);
        let of_tests = |host| by_hand(host, &[Suite::Tests])[0].extent;
        assert_eq!(of_tests(&host::ALL[0]), Extent::Full);
        assert_eq!(of_tests(&host::ALL[1]), Extent::Short);
    }
}
