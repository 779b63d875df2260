//! All scenarios under all policies and on the living kernel, side by side.

use serde::Serialize;

use super::engine::ScenarioOutcome;
use super::script::Scenario;
use super::stage::Stage;
use super::table::SCENARIOS;
use super::verdict::Verdict;
use super::{ask_the_kernel, emulate};
use crate::policy::Policy;

/// What came of every scenario.
#[derive(Clone, Debug, Serialize)]
pub struct Survey {
    /// What the emulated ones were played on.
    pub stage: &'static str,
    /// Release of the living kernel.
    pub kernel: String,
    /// One a scenario, in the order of the table.
    pub rows: Vec<Row>,
}

/// What came of one.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub id: &'static str,
    /// What happens in it.
    pub title: &'static str,
    /// Whether it shows something that no policy promises.
    pub beyond_promise: bool,
    /// Under each policy it is for.
    pub policies: Vec<Cell>,
    /// On the living kernel.
    pub kernel: ScenarioOutcome,
    /// Whether the kernel came to what it may; `None` if it can't be asked.
    pub kernel_agrees: Option<bool>,
    /// Why the kernel may come to something else than our `exclusive`, if it did.
    pub kernel_differs: Option<&'static str>,
}

/// What came of one scenario under one policy.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// The policy.
    pub policy: Policy,
    /// What the table says.
    pub expected: Verdict,
    /// What was computed.
    pub outcome: ScenarioOutcome,
}

impl Cell {
    /// Whether the policy behaved as its table says.
    pub fn is_as_expected(&self) -> bool {
        self.outcome.verdict() == Some(self.expected)
    }

    /// Whether it came to something else. What could not be played came to nothing.
    pub fn misbehaved(&self) -> bool {
        self.outcome.verdict().is_some() && !self.is_as_expected()
    }
}

impl Row {
    /// Plays `scenario` under every policy it is for, and on the living kernel.
    pub fn of<S: Stage>(scenario: &Scenario) -> Self {
        let cell = |policy: Policy| {
            let expected = scenario.expected.under(policy)?;
            let outcome = emulate::<S>(scenario, policy, &mut |_| {});
            Some(Cell {
                policy,
                expected,
                outcome,
            })
        };
        let kernel = ask_the_kernel(scenario, &mut |_| {});
        let kernel_agrees = match &kernel {
            ScenarioOutcome::Played { verdict, .. } => Some(scenario.kernel_agrees(*verdict)),
            ScenarioOutcome::CannotAsk(_) => None,
            ScenarioOutcome::Failed(_) => Some(false),
        };
        let kernel_differs = kernel.verdict().and_then(|v| scenario.why_kernel_may(v));
        Self {
            id: scenario.id,
            title: scenario.title,
            beyond_promise: scenario.is_beyond_promise(),
            policies: Policy::ALL.into_iter().filter_map(cell).collect(),
            kernel,
            kernel_agrees,
            kernel_differs,
        }
    }

    /// What came of it under `policy`.
    pub fn under(&self, policy: Policy) -> Option<&Cell> {
        self.policies.iter().find(|cell| cell.policy == policy)
    }

    /// Whether every policy behaved as its table says, and the kernel as it may.
    pub fn is_as_expected(&self) -> bool {
        self.policies.iter().all(Cell::is_as_expected) && self.kernel_agrees != Some(false)
    }
}

impl Row {
    /// Whether a policy did what its table does not say, or the kernel what it may not.
    pub fn misbehaved(&self) -> bool {
        let kernel = self.kernel.verdict().is_some() && self.kernel_agrees == Some(false);
        kernel || self.policies.iter().any(Cell::misbehaved)
    }

    /// Why it could not be played somewhere, if it could not.
    pub fn failure(&self) -> Option<String> {
        let policies = self.policies.iter();
        let policies = policies.map(|cell| (cell.policy.name(), &cell.outcome));
        policies
            .chain([("the kernel", &self.kernel)])
            .find_map(|(by, outcome)| match outcome {
                ScenarioOutcome::Failed(why) => Some(format!("{} under {by}: {why}", self.id)),
                _ => None,
            })
    }
}

impl Survey {
    /// Plays every scenario, each on a new stage. `tick` is told which one is next; if it says
    /// `false` the survey ends there.
    pub fn take<S: Stage>(tick: &mut dyn FnMut(&Scenario) -> bool) -> Self {
        Self {
            stage: S::NAME,
            kernel: super::living::kernel_release(),
            rows: SCENARIOS
                .iter()
                .take_while(|scenario| tick(scenario))
                .map(Row::of::<S>)
                .collect(),
        }
    }

    /// Whether something in it came out as it should not.
    pub fn misbehaved(&self) -> bool {
        self.rows.iter().any(Row::misbehaved)
    }

    /// Why rows could not be played, one reason each.
    pub fn failures(&self) -> impl Iterator<Item = String> {
        self.rows.iter().filter_map(Row::failure)
    }

    /// Whether everything in it came out as it should.
    pub fn is_as_expected(&self) -> bool {
        self.rows.iter().all(Row::is_as_expected)
    }
}
