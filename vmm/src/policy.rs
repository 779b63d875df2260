//! The choice of a copy-on-write policy when the program runs. The policies themselves are
//! in [`mm`](palimpsest::mm).

use std::fmt;

use serde::{Deserialize, Serialize};

use palimpsest::mm::{
    CowPolicy, Exclusive, Mapcount, MapcountForcedBreak, Refcount, Seed, SeedRecompute,
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

/// Something to be done under a policy that is chosen when the program runs.
pub trait UnderPolicy {
    /// What comes of it.
    type Output;

    /// Does it. `make` gives one policy for each address space.
    fn under<P: CowPolicy>(self, make: fn() -> P) -> Self::Output;
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

    /// Its name, as `--policy` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mapcount => Mapcount::NAME,
            Self::MapcountForcedBreak => MapcountForcedBreak::NAME,
            Self::Refcount => Refcount::NAME,
            Self::Seed => Seed::NAME,
            Self::SeedRecompute => SeedRecompute::NAME,
            Self::Exclusive => Exclusive::NAME,
        }
    }

    /// Whether the exclusive bit means anything to it.
    pub fn goes_by_the_bit(self) -> bool {
        struct Asked;
        impl UnderPolicy for Asked {
            type Output = bool;
            fn under<P: CowPolicy>(self, _make: fn() -> P) -> bool {
                P::GOES_BY_THE_BIT
            }
        }
        self.apply(Asked)
    }

    /// Does `what` under it.
    pub fn apply<W: UnderPolicy>(self, what: W) -> W::Output {
        match self {
            Self::Mapcount => what.under(|| Mapcount),
            Self::MapcountForcedBreak => what.under(|| MapcountForcedBreak),
            Self::Refcount => what.under(|| Refcount),
            Self::Seed => what.under(|| Seed),
            Self::SeedRecompute => what.under(|| SeedRecompute),
            Self::Exclusive => what.under(|| Exclusive),
        }
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
        struct Name;
        impl UnderPolicy for Name {
            type Output = &'static str;
            fn under<P: CowPolicy>(self, _make: fn() -> P) -> &'static str {
                P::NAME
            }
        }
        for policy in Policy::ALL {
            assert_eq!(policy.apply(Name), policy.name());
            let value = policy.to_possible_value().map(|v| v.get_name().to_owned());
            assert_eq!(value.as_deref(), Some(policy.name()));
            let json = serde_json::to_value(policy).unwrap();
            assert_eq!(json, policy.name());
        }
    }
}
