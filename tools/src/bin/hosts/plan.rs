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

/// All that there is time for on `host`, of `parts` if any are named.
pub(crate) fn by_hand(host: &'static Host, parts: &[Part]) -> Plan {
    let (possible, extent) = match host.processor {
        Processor::Amd => (&Part::ALL[..], Extent::Full),
        // Slower by far: the tests would take hours.
        Processor::Intel => (
            &[Part::Main, Part::Faults, Part::Compare][..],
            Extent::Sample,
        ),
    };
    let parts = if parts.is_empty() { possible } else { parts };
    Plan {
        host,
        parts: parts.to_vec(),
        extent,
    }
}

/// What a change must pass to land: all on the host that most machines are like, and a look at the other way to run a guest there.
pub(crate) fn for_every_change() -> Vec<Plan> {
    let plan = |name: &str, parts: &[Part], extent| {
        host::named(name).map(|host| Plan {
            host,
            parts: parts.to_vec(),
            extent,
        })
    };
    let plans = [
        plan("amd", &Part::ALL, Extent::Short),
        plan("amd-npt0", &[Part::Main, Part::Faults], Extent::Short),
    ];
    plans.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_meets_both_ways_of_paging() {
        let plans = for_every_change();
        let names = Vec::from_iter(plans.iter().map(|plan| plan.host.name));
        assert_eq!(names, ["amd", "amd-npt0"]);
        assert_eq!(plans[0].parts, Part::ALL);
    }

    #[test]
    fn parts_can_be_chosen() {
        let plan = by_hand(&host::ALL[0], &[Part::Faults]);
        assert_eq!(plan.parts, [Part::Faults]);
        for host in &host::ALL {
            assert!(
                by_hand(host, &[]).parts.contains(&Part::Main),
                "{}",
                host.name
            );
        }
    }
}
