//! The choice of a copy-on-write policy when the program runs. The policies themselves are
//! in [`mm`](palimpsest::mm).

use std::fmt;

use serde::{Deserialize, Serialize};

use palimpsest::mm::{
    AnyPolicy, CowPolicy, Exclusive, Mapcount, MapcountForcedBreak, Refcount, Seed, SeedRecompute,
};

/// A policy by name.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Linux to v5.7: one mapping or a copy [fails: isolation, coherence]
    Mapcount,
    /// Linux v5.7.3 and v5.8: mapcount, and readers from outside break COW like writers
    /// [fails: isolation, coherence]
    MapcountForcedBreak,
    /// Linux v5.9 to v5.18: one reference or a copy [fails: coherence]
    Refcount,
    /// The sketch of December 2021: the exclusive bit, and pins that do not look at it [fails: coherence]
    Seed,
    /// The same, and the split of a huge page computes the bit from reference counts [fails: coherence]
    SeedRecompute,
    /// Linux since v5.19: the exclusive bit
    #[default]
    Exclusive,
}

impl Policy {
    /// Every policy, the oldest first.
    pub const ALL: [Self; 6] = [
        Self::Mapcount,
        Self::MapcountForcedBreak,
        Self::Refcount,
        Self::Seed,
        Self::SeedRecompute,
        Self::Exclusive,
    ];

    /// The policy itself: a new one for each address space.
    pub fn make(self) -> AnyPolicy {
        match self {
            Self::Mapcount => Box::new(Mapcount),
            Self::MapcountForcedBreak => Box::new(MapcountForcedBreak),
            Self::Refcount => Box::new(Refcount),
            Self::Seed => Box::new(Seed),
            Self::SeedRecompute => Box::new(SeedRecompute),
            Self::Exclusive => Box::new(Exclusive),
        }
    }

    /// Its name, as `--policy` takes it.
    pub fn name(self) -> &'static str {
        self.make().name()
    }

    /// Whether the exclusive bit means anything to it.
    pub fn goes_by_the_bit(self) -> bool {
        self.make().goes_by_the_bit()
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn a_policy_has_one_name_everywhere() {
        for policy in Policy::ALL {
            let value = policy.to_possible_value().map(|v| v.get_name().to_owned());
            assert_eq!(value.as_deref(), Some(policy.name()));
            let json = serde_json::to_value(policy).unwrap();
            assert_eq!(json, policy.name());
        }
    }
}
