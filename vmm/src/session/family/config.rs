//! What a family is asked to be.

use std::time::Duration;

use guest::abi::REGION_SIZE;
use serde::{Deserialize, Serialize};

use crate::session::config::{Config, ConfigError, Size};
use crate::session::need::{MemoryPlan, NeedError, ON_THE_WAY};
use palimpsest::host::Limits;

/// The most machines of a family.
pub const MAX_MACHINES: u64 = 1024;

/// Which machines there are to be beside the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// So many clones of the root, of one snapshot.
    Clones(u64),
    /// Clones, clones of those, and so on.
    Tree {
        /// Generations below the root.
        depth: u64,
        /// Clones of each machine that is not of the last generation.
        width: u64,
    },
}

impl Shape {
    /// How many machines that are, with the root; `None` if there is no number for it.
    pub fn machines(self) -> Option<u64> {
        match self {
            Self::Clones(clones) => clones.checked_add(1),
            Self::Tree { depth, width } => {
                let (mut all, mut generation) = (1u64, 1u64);
                for _ in 0..depth {
                    generation = generation.checked_mul(width)?;
                    all = all.checked_add(generation)?;
                    if all > MAX_MACHINES {
                        return None;
                    }
                }
                Some(all)
            }
        }
    }

    /// How many of them have clones.
    pub(super) fn parents(self) -> u64 {
        match self {
            Self::Clones(_) => 1,
            Self::Tree { depth, width } => {
                let above = Self::Tree {
                    depth: depth.saturating_sub(1),
                    width,
                };
                above.machines().unwrap_or(MAX_MACHINES)
            }
        }
    }

    /// Generations below the root, and how many clones each machine has that is not of the last.
    pub(super) fn generations(self) -> (u64, u64) {
        match self {
            Self::Clones(clones) => (1, clones),
            Self::Tree { depth, width } => (depth, width),
        }
    }
}

/// Everything that decides how a family lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FamilyConfig {
    /// The guest. Of its length the run makes no use: see [`FamilyConfig::duration`]. A snapshot of some machine
    /// is taken every `snapshot_every`.
    pub guest: Config,
    /// Which machines there are to be.
    pub shape: Shape,
    /// Bytes of frames that a clone may have by itself, copies for its snapshots among them; nothing: as many as
    /// it has memory, and as many for each snapshot that there may be.
    #[serde(default)]
    pub quota: Option<u64>,
    /// How long the root runs by itself.
    #[serde(rename = "warm_up_s", with = "crate::session::config::seconds")]
    pub warm_up: Duration,
    /// How long all of them run, once they are there.
    #[serde(rename = "duration_s", with = "crate::session::config::seconds")]
    pub duration: Duration,
}

/// Why a [`FamilyConfig`] is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FamilyConfigError {
    /// The guest is.
    #[error(transparent)]
    Guest(#[from] ConfigError),
    /// There would be no clone.
    #[error("{flag} 0: a family has at least 1 clone")]
    NoClones {
        /// The flag.
        flag: &'static str,
    },
    /// A clone could not do anything with it, or all that it could is less.
    #[error(
        "--quota {quota}: a clone may have from 2 MiB to {most}, its memory and that of snapshots"
    )]
    Quota {
        /// What was asked for.
        quota: Size,
        /// What it can use.
        most: Size,
    },
    /// There would be too many.
    #[error("{what}: a family has at most {MAX_MACHINES} machines, the root among them")]
    TooMany {
        /// The flags.
        what: String,
    },
}

impl FamilyConfig {
    /// How many machines there are to be, with the root.
    pub fn machines(&self) -> u64 {
        self.shape.machines().unwrap_or(MAX_MACHINES)
    }

    /// Refuses what makes no sense, and what `host` cannot give.
    ///
    /// # Errors
    /// See [`FamilyConfigError`].
    pub fn validate(&self, host: &Limits) -> Result<(), FamilyConfigError> {
        let none = |flag| Err(FamilyConfigError::NoClones { flag });
        let what = match self.shape {
            Shape::Clones(0) => return none("--clones"),
            Shape::Tree { depth: 0, .. } => return none("--depth"),
            Shape::Tree { width: 0, .. } => return none("--width"),
            Shape::Clones(clones) => format!("--clones {clones}"),
            Shape::Tree { depth, width } => format!("--depth {depth} --width {width}"),
        };
        match self.shape.machines() {
            Some(1..=MAX_MACHINES) => {}
            _ => return Err(FamilyConfigError::TooMany { what }),
        }
        let most = self.most_of_a_clone();
        if let Some(quota) = self.quota
            && !(REGION_SIZE..=most).contains(&quota)
        {
            let (quota, most) = (Size(quota), Size(most));
            return Err(FamilyConfigError::Quota { quota, most });
        }
        // What a restore is to a run, a clone is to a family.
        let guest = Config {
            restore_every: 1,
            ..self.guest.clone()
        };
        guest.validate(host)?;
        self.plan(host).map_err(ConfigError::from)?;
        Ok(())
    }

    /// What it may take of `host`.
    pub(super) fn plan(&self, host: &Limits) -> Result<MemoryPlan, NeedError> {
        let clones = self.machines() - 1;
        let each = self.promised();
        MemoryPlan::with_clones(&self.guest, clones, each, self.shape.parents(), host)
    }

    /// Bytes of memory that are kept for all clones, and for the snapshots that they are made of.
    pub(super) fn of_clones_and_origins(&self) -> u64 {
        let clones = (self.machines() - 1).saturating_mul(self.promised());
        clones.saturating_add(self.shape.parents().saturating_mul(self.guest.memory))
    }

    /// Bytes of memory that are kept for each clone.
    pub(super) fn promised(&self) -> u64 {
        self.quota
            .map_or(self.guest.memory, |quota| quota.min(self.guest.memory))
    }

    /// All that a clone can have by itself: its memory, and a copy of it for each snapshot: those that are kept or
    /// on their way to the checker, and one that clones of its own are made of.
    fn most_of_a_clone(&self) -> u64 {
        let snapshots = self.guest.keep as u64 + ON_THE_WAY + 1;
        self.guest.memory.saturating_mul(1 + snapshots)
    }

    /// The most bytes that a clone may have by itself.
    pub(super) fn limit(&self) -> u64 {
        self.quota.unwrap_or_else(|| self.most_of_a_clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::config::tests::example;
    use palimpsest::mm::PAGE_SIZE;

    fn family(shape: Shape) -> FamilyConfig {
        FamilyConfig {
            guest: example(),
            shape,
            quota: None,
            warm_up: Duration::from_secs(1),
            duration: Duration::from_secs(5),
        }
    }

    #[test]
    fn machines_are_counted_with_the_root() {
        for (shape, machines) in [
            (Shape::Clones(1), Some(2)),
            (Shape::Clones(100), Some(101)),
            (Shape::Clones(u64::MAX), None),
            (Shape::Tree { depth: 3, width: 4 }, Some(1 + 4 + 16 + 64)),
            (Shape::Tree { depth: 5, width: 1 }, Some(6)),
            (
                Shape::Tree {
                    depth: u64::MAX,
                    width: 1,
                },
                None,
            ),
            (
                Shape::Tree {
                    depth: 2,
                    width: u64::MAX,
                },
                None,
            ),
        ] {
            assert_eq!(shape.machines(), machines, "{shape:?}");
        }
        assert_eq!(Shape::Clones(7).parents(), 1);
        assert_eq!(Shape::Tree { depth: 3, width: 4 }.parents(), 1 + 4 + 16);
    }

    #[test]
    fn families_of_none_and_of_too_many_are_refused() {
        let refusal = |shape| {
            let refused = family(shape).validate(&Limits::of_host(8 << 30));
            refused.unwrap_err().to_string()
        };
        assert_eq!(
            refusal(Shape::Clones(0)),
            "--clones 0: a family has at least 1 clone"
        );
        assert!(refusal(Shape::Tree { depth: 0, width: 2 }).starts_with("--depth 0: "));
        assert!(refusal(Shape::Tree { depth: 2, width: 0 }).starts_with("--width 0: "));
        assert_eq!(
            refusal(Shape::Clones(1024)),
            "--clones 1024: a family has at most 1024 machines, the root among them"
        );
        let tree = refusal(Shape::Tree { depth: 9, width: 9 });
        assert!(tree.starts_with("--depth 9 --width 9: "), "{tree}");
        let fine = family(Shape::Clones(1023)).validate(&Limits::of_host(8 << 30));
        assert_eq!(fine, Ok(()));
    }

    #[test]
    fn quotas_of_nothing_and_of_too_much_are_refused() {
        let refusal = |quota| {
            let family = FamilyConfig {
                quota: Some(quota),
                ..family(Shape::Clones(3))
            };
            let refused = family.validate(&Limits::of_host(8 << 30));
            refused.err().map(|error| error.to_string())
        };
        let memory = example().memory;
        let most = memory * (2 + ON_THE_WAY + example().keep as u64);
        let why = |quota| {
            let most = Size(most);
            Some(format!(
                "--quota {quota}: a clone may have from 2 MiB to {most}, its memory and that of snapshots"
            ))
        };
        assert_eq!(refusal(0), why("0 B"));
        assert_eq!(refusal((2 << 20) - 1), why("2097151 B"));
        assert_eq!(refusal(2 * most), why(&Size(2 * most).to_string()));
        assert_eq!((refusal(2 << 20), refusal(memory)), (None, None));
        assert_eq!(refusal(most), None);
    }

    /// What is kept for clones decides how many there is memory for.
    #[test]
    fn a_quota_makes_room_for_more_clones() {
        let with = |quota| FamilyConfig {
            quota,
            ..family(Shape::Clones(200))
        };
        let plan = |quota| with(quota).plan(&Limits::of_host(64 << 30)).unwrap();
        let memory = example().memory;
        let (all, some) = (plan(None), plan(Some(memory / 4)));
        let less = 200 * (memory - memory / 4) / PAGE_SIZE;
        assert_eq!(all.frames - some.frames, less);
        assert_eq!(with(Some(memory / 4)).limit(), memory / 4);
        // What is said to be the default is it.
        let most = with(None).limit();
        assert_eq!(with(Some(most)).limit(), most);
        assert_eq!(with(Some(most)).promised(), with(None).promised());
    }

    /// Where there is memory for all that was planned, nothing of it is refused: the root, all clones, what they are
    /// made of, and as many other snapshots as there may be.
    #[test]
    fn what_a_family_promises_is_planned() {
        let shapes = [
            Shape::Clones(1),
            Shape::Clones(10),
            Shape::Tree { depth: 2, width: 2 },
        ];
        for mib in [32, 64, 66, 256, 1024] {
            for (shape, quota) in shapes
                .into_iter()
                .flat_map(|s| [(s, None), (s, Some(4 << 20))])
            {
                let mut family = FamilyConfig {
                    quota,
                    ..family(shape)
                };
                family.guest.memory = mib << 20;
                let plan = family.plan(&Limits::of_host(256 << 30)).unwrap();
                let snapshots = (family.guest.keep as u64 + ON_THE_WAY) * family.guest.memory;
                let all = family.guest.memory + snapshots + family.of_clones_and_origins();
                assert!(plan.frames * PAGE_SIZE >= all, "{family:?}: {plan:?}");
            }
        }
    }

    #[test]
    fn a_family_survives_json() {
        for shape in [Shape::Clones(3), Shape::Tree { depth: 3, width: 2 }] {
            for quota in [None, Some(4 << 20)] {
                let family = FamilyConfig {
                    quota,
                    ..family(shape)
                };
                let json = serde_json::to_string(&family).unwrap();
                let back: FamilyConfig = serde_json::from_str(&json).unwrap();
                assert_eq!(back, family);
            }
        }
    }
}
