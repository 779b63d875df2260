//! Which tasks run on which hosts.

use super::host::{self, Host, Processor};
use super::task::{Extent, Part};

/// A host, and what of the tasks it is for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) host: &'static Host,
    pub(crate) parts: Vec<Part>,
    pub(crate) extent: Extent,
}

/// All that there is time for on `host`, of `parts` if any are named. Tests take as long as all the rest, and have an emulator of
/// their own.
pub(crate) fn by_hand(host: &'static Host, parts: &[Part]) -> Vec<Plan> {
    let (possible, extent) = match host.processor {
        Processor::Amd => (&Part::ALL[..], Extent::Full),
        // Slower by far: the tests would take hours.
        Processor::Intel => (
            &[Part::Main, Part::Faults, Part::Compare][..],
            Extent::Sample,
        ),
    };
    let parts = if parts.is_empty() { possible } else { parts };
    let is_test = |part: &&Part| **part == Part::Tests;
    let (tests, rest): (Vec<_>, Vec<_>) = parts.iter().partition(is_test);
    // All of them on one host: most are about the program, and the program is the same.
    let extent_of_tests = if host.name == "amd" {
        extent
    } else {
        Extent::Short
    };
    let plans = [(rest, extent), (tests, extent_of_tests)];
    let plans = plans.map(|(parts, extent)| Plan {
        host,
        parts,
        extent,
    });
    plans
        .into_iter()
        .filter(|plan| !plan.parts.is_empty())
        .collect()
}

/// A visit that has a command of somebody's own to run.
pub(crate) fn for_a_command(host: &'static Host) -> Plan {
    Plan {
        host,
        parts: Vec::new(),
        extent: Extent::Full,
    }
}

/// What a change must pass to land: all on the host that most machines are like, and a look at the other way to run a guest there.
pub(crate) fn for_every_change() -> Vec<Plan> {
    let plan = |name: &str, parts: &[Part]| {
        host::named(name).map(|host| Plan {
            host,
            parts: parts.to_vec(),
            extent: Extent::Short,
        })
    };
    // What takes longest goes first.
    let plans = [
        plan("amd", &[Part::Tests]),
        plan("amd", &[Part::Main, Part::Faults, Part::Compare]),
        plan("amd-npt0", &[Part::Main, Part::Faults, Part::Compare]),
    ];
    plans.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_meets_both_ways_of_paging() {
        let plans = for_every_change();
        let parts = |host: &str| {
            let those = plans.iter().filter(|plan| plan.host.name == host);
            let mut parts = Vec::from_iter(those.flat_map(|plan| &plan.parts).copied());
            parts.sort();
            parts
        };
        assert_eq!(parts("amd"), Part::ALL);
        assert_eq!(parts("amd-npt0"), Part::ALL[..3]);
    }

    #[test]
    fn parts_can_be_chosen() {
        let plans = by_hand(&host::ALL[0], &[Part::Faults]);
        let parts = Vec::from_iter(plans.iter().map(|plan| &plan.parts[..]));
        assert_eq!(parts, [[Part::Faults]]);
        for host in &host::ALL {
            let has_main = |plan: &Plan| plan.parts.contains(&Part::Main);
            assert!(by_hand(host, &[]).iter().any(has_main), "{}", host.name);
        }
    }

    #[test]
    fn tests_have_an_emulator_of_their_own() {
        let plans = by_hand(&host::ALL[0], &[]);
        let parts = Vec::from_iter(plans.iter().map(|plan| &plan.parts[..]));
        let rest = &Part::ALL[..3];
        assert_eq!(parts, [rest, &[Part::Tests]]);
        let of_tests = |host| by_hand(host, &[Part::Tests])[0].extent;
        assert_eq!(of_tests(&host::ALL[0]), Extent::Full);
        assert_eq!(of_tests(&host::ALL[1]), Extent::Short);
    }
}
