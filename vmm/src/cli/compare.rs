//! `vmm compare`: the policies side by side, in the live race and in the scenarios.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::args::{CompareArgs, PlayedOn};
use super::scenario_text;
use super::screen::Screen;
use super::units::exact_time;
use super::{Failure, interrupt, print, race_text};
use crate::accel::{self, Accel, Opened};
use crate::policy::Policy;
use crate::scenario::engine::{Moment, ScenarioOutcome};
use crate::scenario::real::{ByKvm, ByThreads, RealStage};
use crate::scenario::script::Scenario;
use crate::scenario::soft::SoftStage;
use crate::scenario::stage::Stage;
use crate::scenario::survey::{Row, Survey};
use crate::scenario::{ask_the_kernel, emulate, table};
use crate::session::compare::{Race, Raced};
use crate::session::progress::{Observer, Progress};
use crate::session::report::{Verdict, Violation};
use palimpsest::host::Limits;
use palimpsest::vm::Accelerator;

/// Everything that was compared: the format of `--json`.
#[derive(Debug, Serialize)]
struct Comparison {
    version: &'static str,
    as_expected: bool,
    races: Vec<Raced>,
    scenarios: Survey,
}

/// What the comparison comes to: [`Verdict::Violated`] if a policy behaved as its table does not say.
pub(super) fn run(args: &CompareArgs, screen: &Screen) -> Result<Verdict, Failure> {
    if args.list {
        print(&scenario_text::list()).map_err(Failure::Print)?;
        return Ok(Verdict::Ok);
    }
    if let Some(id) = &args.scenario {
        let scenario = table::find(id).ok_or_else(|| Failure::NoScenario { id: id.clone() })?;
        return narrate(scenario, args);
    }
    compare(args, screen)
}

fn compare(args: &CompareArgs, screen: &Screen) -> Result<Verdict, Failure> {
    let Opened { accelerator, note } = open(args)?;
    if let Some(note) = note {
        screen.line(&note);
    }
    let accel = match accelerator {
        Accelerator::Kvm(_) => Accel::Kvm,
        Accelerator::User(_) => Accel::User,
    };
    let race = Race {
        accel,
        ..args.race()
    };
    let racing = if args.no_race { &[][..] } else { &Policy::ALL };
    if !args.no_race {
        // Any policy's configuration is as good as another's.
        let limits = Limits::detect().map_err(Failure::Limits)?;
        race.config(Policy::Exclusive).validate(&limits)?;
    }
    let stop = interrupt::stop_flag().map_err(Failure::Signals)?;
    let steps = racing.len() + 1;
    let mut races = Vec::new();
    for (&policy, number) in racing.iter().zip(1..) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        screen.line(&format!(
            "{number}/{steps}: racing under {policy} for {}",
            exact_time(race.duration)
        ));
        races.push(race.run(policy, &stop, &mut Quiet { screen })?);
    }
    if !stop.load(Ordering::Relaxed) {
        screen.line(&format!(
            "{steps}/{steps}: {} scenarios under each, and on the living kernel",
            table::SCENARIOS.len()
        ));
    }
    let mut go_on = |_: &Scenario| !stop.load(Ordering::Relaxed);
    let scenarios = match accel {
        Accel::User => Survey::take::<RealStage<ByThreads>>(&mut go_on),
        Accel::Kvm | Accel::Auto => Survey::take::<RealStage>(&mut go_on),
    };
    finish(args, screen, race, races, scenarios, &stop)
}

/// What runs vCPUs here.
fn open(args: &CompareArgs) -> Result<Opened, Failure> {
    accel::open(args.accel).map_err(|error| Failure::Run(error.into()))
}

fn finish(
    args: &CompareArgs,
    screen: &Screen,
    race: Race,
    races: Vec<Raced>,
    scenarios: Survey,
    stop: &Arc<AtomicBool>,
) -> Result<Verdict, Failure> {
    let interrupted = stop.load(Ordering::Relaxed);
    let comparison = Comparison {
        version: env!("CARGO_PKG_VERSION"),
        as_expected: !interrupted
            && races.iter().all(Raced::is_as_expected)
            && scenarios.is_as_expected(),
        races,
        scenarios,
    };
    let text = if args.json {
        serde_json::to_string_pretty(&comparison)
            .map_err(|e| Failure::Print(io::Error::other(e)))?
            + "\n"
    } else {
        let mut text = String::new();
        if !args.no_race {
            text += &race_text::render(&race, &comparison.races);
            text += "\n";
        }
        text += &scenario_text::table(&comparison.scenarios);
        text += if interrupted {
            "\nnot finished: interrupted\n"
        } else if comparison.as_expected {
            "\nok: every policy behaved as its table says\n"
        } else if comparison.misbehaved() {
            "\nNOT ok: something is not as the table says (marked !)\n"
        } else {
            "\nnot finished: something could not be played (marked !)\n"
        };
        text
    };
    // Both may go to the same terminal.
    screen.finish();
    print(&text).map_err(Failure::Print)?;
    if interrupted {
        return Ok(Verdict::Error);
    }
    match (comparison.as_expected, comparison.misbehaved()) {
        (true, _) => Ok(Verdict::Ok),
        (false, true) => Ok(Verdict::Violated),
        (false, false) => Err(Failure::NotPlayed {
            why: comparison.why_not_played(),
        }),
    }
}

impl Comparison {
    /// Whether something came to what the table does not say. What could not be played has come to nothing.
    fn misbehaved(&self) -> bool {
        self.races.iter().any(Raced::misbehaved) || self.scenarios.misbehaved()
    }

    /// Why something could not be played, one reason of perhaps many.
    fn why_not_played(&self) -> String {
        let races = self.races.iter().filter(|raced| !raced.is_as_expected());
        let race = races.filter_map(|raced| {
            let report = &raced.report;
            let first = if raced.was_too_short() {
                "too few snapshots to tell: run for longer (--duration)"
            } else {
                let why = report.error.as_ref().or(report.unchecked.first())?;
                why.lines().next().unwrap_or_default()
            };
            Some(format!("the race under {}: {first}", raced.policy))
        });
        let scenarios = self.scenarios.failures();
        race.chain(scenarios).next().unwrap_or_default()
    }
}

/// Tells one scenario step by step, and its verdict under every other policy and on the kernel.
fn narrate(scenario: &Scenario, args: &CompareArgs) -> Result<Verdict, Failure> {
    let policy = args.policy;
    let by_the_bit = args.on != PlayedOn::Kernel && policy.goes_by_the_bit();
    let mut story = String::new();
    let mut watch = |moment: &Moment<'_>| story += &scenario_text::step(moment, by_the_bit);
    let (by, outcome, expected) = match args.on {
        PlayedOn::Vcpu => {
            let (on, outcome) = match open(args)?.accelerator {
                Accelerator::Kvm(_) => (
                    RealStage::<ByKvm>::NAME,
                    emulate::<RealStage>(scenario, policy, &mut watch),
                ),
                Accelerator::User(_) => (
                    RealStage::<ByThreads>::NAME,
                    emulate::<RealStage<ByThreads>>(scenario, policy, &mut watch),
                ),
            };
            let expected = scenario.expected.under(policy);
            (format!("{policy}, on {on}"), outcome, expected)
        }
        PlayedOn::Soft => (
            format!("{policy}, on the software MMU"),
            emulate::<SoftStage>(scenario, policy, &mut watch),
            scenario.expected.under(policy),
        ),
        PlayedOn::Kernel => (
            format!("Linux {}", crate::scenario::living::kernel_release()),
            ask_the_kernel(scenario, &mut watch),
            scenario.expected.exclusive,
        ),
    };
    let row = Row::of::<SoftStage>(scenario);
    let may = match args.on {
        PlayedOn::Kernel => outcome.verdict().and_then(|v| scenario.why_kernel_may(v)),
        PlayedOn::Vcpu | PlayedOn::Soft => None,
    };
    let text = scenario_text::head(scenario, &by)
        + &story
        + &scenario_text::moral(&outcome, expected, may)
        + &scenario_text::elsewhere(&row);
    let as_expected = match (&outcome, args.on) {
        (ScenarioOutcome::CannotAsk(_), _) => true,
        (ScenarioOutcome::Played { verdict, .. }, PlayedOn::Kernel) => {
            scenario.kernel_agrees(*verdict)
        }
        (outcome, _) => expected.is_none() || outcome.verdict() == expected,
    };
    if args.json {
        let json = serde_json::json!({ "scenario": scenario.id, "by": by, "outcome": outcome, "all": row });
        print(&format!("{json:#}\n")).map_err(Failure::Print)?;
    } else {
        print(&text).map_err(Failure::Print)?;
    }
    if as_expected && row.is_as_expected() {
        return Ok(Verdict::Ok);
    }
    match outcome {
        ScenarioOutcome::Failed(why) if !row.misbehaved() => Err(Failure::NotPlayed { why }),
        ScenarioOutcome::Played { .. } | ScenarioOutcome::CannotAsk(_)
            if as_expected && !row.misbehaved() =>
        {
            let why = row.failure().unwrap_or_default();
            Err(Failure::NotPlayed { why })
        }
        _ => Ok(Verdict::Violated),
    }
}

/// Nobody wants to read every violation of a policy that is there to be violated: the report counts them.
struct Quiet<'a> {
    screen: &'a Screen,
}

impl Observer for Quiet<'_> {
    fn progress(&mut self, _: &Progress) {}
    fn console(&mut self, _: &str) {}
    fn violation(&mut self, violation: &Violation) {
        tracing::debug!(%violation, "seen");
    }
    fn note(&mut self, text: &str) {
        self.screen.line(text);
    }
}
