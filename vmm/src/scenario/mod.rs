//! Scenarios: the historical bugs of copy-on-write, acted out step by step (PROTOCOL.md 8).
//!
//! Nothing in here knows the outcome of a step: the table says what is done, a performer does it, and the
//! engine compares what memory holds with what was written.
//!
//! | file | concept |
//! |---|---|
//! | [`table`] | the scenarios, as data |
//! | [`script`] | what that data is made of |
//! | [`engine`] | plays one and computes the verdict |
//! | [`verdict`] | what it can come to |
//! | [`survey`] | all of them, side by side |
//! | [`performer`] | who acts a scenario out |
//! | [`emulated`] | ... our own `mm`, under any policy |
//! | [`living`] | ... the kernel this host runs on, with processes |
//! | [`stage`] | the machine around an emulated one |
//! | [`soft`] | ... a model of one |
//! | [`real`] | ... a real virtual machine: the window, and a vCPU |

pub mod emulated;
pub mod engine;
pub mod living;
pub mod performer;
pub mod real;
pub mod script;
pub mod soft;
pub mod stage;
pub mod survey;
pub mod table;
#[cfg(test)]
mod tests;
pub mod verdict;

use self::emulated::Emulated;
use self::engine::{Moment, ScenarioOutcome, play};
use self::living::{DirectRace, Disturbance, o_direct_race};
use self::performer::NotDone;
use self::script::Scenario;
use self::stage::Stage;
use self::verdict::Verdict;
use crate::policy::Policy;
use palimpsest::mm::{AnyPolicy, Biased};

/// Plays a scenario under `policy`, on a stage of its own. `watch` is told of every step.
pub fn emulate<S: Stage>(
    scenario: &Scenario,
    policy: Policy,
    watch: &mut dyn FnMut(&Moment<'_>),
) -> ScenarioOutcome {
    let make: Box<dyn Fn() -> AnyPolicy> = if scenario.kernels_pin_count {
        Box::new(move || Box::new(Biased::new(policy.make())))
    } else {
        Box::new(move || policy.make())
    };
    match S::new(scenario.memory).and_then(|stage| Emulated::new(stage, make)) {
        Ok(mut performer) => play(scenario, &mut performer, policy.goes_by_the_bit(), watch),
        Err(error) => ScenarioOutcome::Failed(palimpsest::causes::chain(&*error)),
    }
}

/// Plays a scenario on the kernel this host runs on, with processes. `watch` is told of every step.
pub fn ask_the_kernel(scenario: &Scenario, watch: &mut dyn FnMut(&Moment<'_>)) -> ScenarioOutcome {
    if let Some(disturbance) = scenario.kernel_races {
        return race_the_kernel(disturbance, watch);
    }
    match living::Living::new(scenario.memory) {
        Ok(mut kernel) => play(scenario, &mut kernel, false, watch),
        Err(error @ living::LivingError::NoHugePages(_)) => {
            ScenarioOutcome::CannotAsk(palimpsest::causes::chain(&error))
        }
        Err(error) => ScenarioOutcome::Failed(palimpsest::causes::chain(&error)),
    }
}

/// Rounds of a race of the living kernel. One alone shows the bug of old, if the device is not done too soon.
const ROUNDS: u64 = 200;

fn race_the_kernel(
    disturbance: Disturbance,
    watch: &mut dyn FnMut(&Moment<'_>),
) -> ScenarioOutcome {
    let race = match o_direct_race(ROUNDS, disturbance) {
        Ok(race) => race,
        Err(NotDone::CannotAsk(why)) => return ScenarioOutcome::CannotAsk(why.to_owned()),
        Err(error) => return ScenarioOutcome::Failed(error.to_string()),
    };
    let outcome = judge_race(race);
    if let ScenarioOutcome::Played { findings, .. } = &outcome {
        watch(&Moment {
            number: None,
            text: format!(
                "{} reads of {} were under way still when the CPU wrote beside them",
                race.raced, race.rounds
            ),
            findings,
            views: Vec::new(),
        });
    }
    outcome
}

/// What a race comes to. The device and the CPU write one page: what either lost went to a copy.
fn judge_race(race: DirectRace) -> ScenarioOutcome {
    if race.raced == 0 {
        return ScenarioOutcome::CannotAsk(
            "the disk is always done before the CPU writes".to_owned(),
        );
    }
    let mut findings = Vec::new();
    for (lost, whose) in [(race.lost_dma, "the device"), (race.lost_cpu, "the CPU")] {
        if lost > 0 {
            findings.push(format!("what {whose} wrote was lost in {lost} rounds"));
        }
    }
    ScenarioOutcome::Played {
        verdict: if findings.is_empty() {
            Verdict::Ok
        } else {
            Verdict::Diverged
        },
        findings,
        copies: None,
    }
}
