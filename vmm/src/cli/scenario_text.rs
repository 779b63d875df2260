//! Scenarios for people: the list, the table of verdicts, and one of them told step by step.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::policy::Policy;
use crate::scenario::engine::{Moment, ScenarioOutcome};
use crate::scenario::performer::{PageView, Who};
use crate::scenario::script::Scenario;
use crate::scenario::survey::{Row, Survey};
use crate::scenario::table::{NOT_HERE, SCENARIOS};
use crate::scenario::verdict::Verdict;

/// Columns of a title in the table.
const TITLE: usize = 43;

/// Short enough for a column.
const fn column(policy: Policy) -> &'static str {
    match policy {
        Policy::Mapcount => "mapcnt",
        Policy::MapcountForcedBreak => "forced",
        Policy::Refcount => "refcnt",
        Policy::Seed => "seed",
        Policy::SeedRecompute => "recomp",
        Policy::Exclusive => "excl",
    }
}

/// The scenarios, and those of PROTOCOL.md that are left out, with the reason.
pub(super) fn list() -> String {
    let mut text = String::new();
    for scenario in SCENARIOS {
        let _ = writeln!(text, "  {:<4} {}", scenario.id, scenario.title);
    }
    let _ = writeln!(text, "\nnot here:");
    for (ids, why) in NOT_HERE {
        let _ = writeln!(text, "  {ids}: {why}");
    }
    text
}

/// The table: a row a scenario, a column a policy, and the kernel's.
pub(super) fn table(survey: &Survey) -> String {
    let mut text = format!(
        "scenarios, on {}; the kernel is Linux {}\n  {:<4} {:<TITLE$}",
        survey.stage, survey.kernel, "", ""
    );
    for policy in Policy::ALL {
        let _ = write!(text, " {:<6}", column(policy));
    }
    let _ = writeln!(text, " kernel");
    let mut unasked: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut differing = unasked.clone();
    let mut wrong = String::new();
    for row in &survey.rows {
        let _ = write!(
            text,
            "  {:<4} {:<TITLE$}",
            row.id,
            shorten(row.title, TITLE)
        );
        let star = if row.beyond_promise { "*" } else { "" };
        for policy in Policy::ALL {
            let cell = row.under(policy);
            let shown = cell.map_or_else(
                || "-".to_owned(),
                |c| mark(&c.outcome, c.is_as_expected()) + star,
            );
            let _ = write!(text, " {shown:<6}");
            if let Some(cell) = cell.filter(|c| !c.is_as_expected()) {
                let _ = writeln!(
                    wrong,
                    "  {} under {policy}: should be {}, and is {}",
                    row.id,
                    cell.expected,
                    in_words(&cell.outcome)
                );
            }
        }
        let _ = writeln!(text, " {}", mark_of_kernel(row));
        if let Some(why) = row.kernel_differs {
            differing.entry(why).or_default().push(row.id);
        }
        if row.kernel_agrees == Some(false) {
            let _ = writeln!(
                wrong,
                "  {} on the kernel: {}",
                row.id,
                in_words(&row.kernel)
            );
        }
        if let ScenarioOutcome::CannotAsk(why) = &row.kernel {
            unasked.entry(why).or_default().push(row.id);
        }
    }
    let _ = writeln!(text);
    for verdict in [
        Verdict::Copied,
        Verdict::Diverged,
        Verdict::Leaked,
        Verdict::NotRefused,
        Verdict::Broken,
    ] {
        let _ = writeln!(text, "  {:<4} {}", verdict.name(), verdict.meaning());
    }
    let _ = writeln!(
        text,
        "  *    promised by no policy: a hold that is no pin (FOLL_GET) does not follow its page"
    );
    let differs = "~    the kernel is not as exclusive, and may be so:";
    let notes = [
        (differs, differing),
        ("-    the kernel cannot be asked:", unasked),
    ];
    for (head, reasons) in notes.into_iter().filter(|(_, r)| !r.is_empty()) {
        let _ = writeln!(text, "  {head}");
        for (why, ids) in reasons {
            let _ = writeln!(text, "       {}:\n         {why}", ids.join(", "));
        }
    }
    if !wrong.is_empty() {
        let _ = writeln!(text, "\n  ! NOT as the table says:\n{wrong}");
    }
    text
}

/// The verdict, marked if it is not the expected one.
fn mark(outcome: &ScenarioOutcome, as_expected: bool) -> String {
    let name = match outcome {
        ScenarioOutcome::Played { verdict, .. } => verdict.name(),
        ScenarioOutcome::CannotAsk(_) => "-",
        ScenarioOutcome::Failed(_) => "error",
    };
    format!("{name}{}", if as_expected { "" } else { "!" })
}

/// The kernel's verdict, marked if it is not that of `exclusive`.
fn mark_of_kernel(row: &Row) -> String {
    let differs = if row.kernel_differs.is_some() {
        "~"
    } else {
        ""
    };
    mark(&row.kernel, row.kernel_agrees != Some(false)) + differs
}

fn in_words(outcome: &ScenarioOutcome) -> String {
    match outcome {
        ScenarioOutcome::Played {
            verdict, findings, ..
        } => format!("{verdict}: {}", findings.join("; ")),
        ScenarioOutcome::CannotAsk(why) | ScenarioOutcome::Failed(why) => why.clone(),
    }
}

fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let kept: String = text.chars().take(most - 1).collect();
    format!("{}…", kept.trim_end())
}

/// The head of a story.
pub(super) fn head(scenario: &Scenario, by: &str) -> String {
    format!(
        "{}: {}\n  {}\n  played by: {by}\n\n",
        scenario.id, scenario.title, scenario.about
    )
}

/// One step of a story, with what became of the pages. `by_the_bit` says whether the bit means anything.
pub(super) fn step(moment: &Moment<'_>, by_the_bit: bool) -> String {
    let number = moment.number.map_or_else(String::new, |n| n.to_string());
    let mut text = format!("{number:>3}  {}\n", moment.text);
    for (who, page, view) in &moment.views {
        let _ = writeln!(text, "       {}", describe(*who, *page, view, by_the_bit));
    }
    for finding in moment.findings {
        let _ = writeln!(text, "     ! {finding}");
    }
    text
}

fn describe(who: Who, page: u64, view: &PageView, by_the_bit: bool) -> String {
    let place = format!("{who:?} page {page}");
    let Some(frame) = view.frame else {
        return format!("{place}   untouched: reads as zeros, no frame");
    };
    let Some((entry, state)) = view.inside else {
        return format!("{place}   frame {:#x}", frame.0);
    };
    let right = if entry.is_writable() { "rw" } else { "ro" };
    let huge = if entry.is_huge() { "   huge" } else { "" };
    let bit = match (by_the_bit, state.is_exclusive()) {
        (false, _) => "",
        (true, true) => "   exclusive",
        (true, false) => "   possibly shared",
    };
    format!(
        "{place}   {right}{huge}   frame {:<4} maps {}  gets {}  pins {}{bit}",
        frame.0,
        state.maps(),
        state.gets(),
        state.pins()
    )
}

/// The end of a story. `may` says why it may be another end than the expected one, if it may.
pub(super) fn moral(
    outcome: &ScenarioOutcome,
    expected: Option<Verdict>,
    may: Option<&str>,
) -> String {
    match outcome {
        ScenarioOutcome::Played {
            verdict, copies, ..
        } => {
            let copies = copies.map_or_else(String::new, |n| format!(", {n} pages copied"));
            let agrees = match (expected, may) {
                (Some(expected), _) if expected == *verdict => "as the table says".to_owned(),
                (Some(expected), Some(why)) => {
                    format!("exclusive: {expected}; the kernel may: {why}")
                }
                (Some(expected), None) => format!("NOT as the table says: {expected}"),
                (None, _) => "the table has no word on it".to_owned(),
            };
            format!(
                "\nverdict: {verdict}, {}{copies} ({agrees})\n",
                verdict.meaning()
            )
        }
        ScenarioOutcome::CannotAsk(why) => format!("\nno verdict: it cannot be asked: {why}\n"),
        ScenarioOutcome::Failed(why) => format!("\nno verdict: {why}\n"),
    }
}

/// What a scenario comes to under every policy and on the kernel.
pub(super) fn elsewhere(row: &Row) -> String {
    let mut text = "under: ".to_owned();
    for cell in &row.policies {
        let shown = mark(&cell.outcome, cell.is_as_expected());
        let _ = write!(text, "{} {shown}, ", cell.policy);
    }
    let _ = writeln!(text, "kernel {}", mark_of_kernel(row));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::emulate;
    use crate::scenario::soft::SoftStage;
    use crate::scenario::table::find;

    fn survey(ids: &[&str]) -> Survey {
        Survey {
            stage: "the software MMU",
            kernel: "6.0".to_owned(),
            rows: ids
                .iter()
                .map(|id| Row::of::<SoftStage>(find(id).unwrap()))
                .collect(),
        }
    }

    #[test]
    fn the_list_has_every_scenario_and_says_what_is_missing() {
        let list = list();
        for scenario in SCENARIOS {
            assert!(list.contains(&format!("  {:<4} {}", scenario.id, scenario.title)));
        }
        assert!(list.contains("needs a huge zero page"));
    }

    #[test]
    fn the_table_has_a_verdict_a_policy() {
        let table = table(&survey(&["B1", "E5"]));
        let row = |id: &str| {
            let start = format!("  {id} ");
            let line = table.lines().find(|l| l.starts_with(&start)).unwrap();
            let verdicts = line.chars().skip(2 + 4 + 1 + TITLE).collect::<String>();
            verdicts
                .split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(row("B1")[..6], ["LEAK", "ok", "ok", "ok", "ok", "ok"]);
        assert_eq!(row("E5"), ["DIV", "ok", "DIV", "DIV", "DIV", "ok", "-"]);
        assert!(table.contains("E5:\n         only RDMA"), "{table}");
        assert!(!table.contains("NOT as the table"), "{table}");
        assert!(
            table
                .lines()
                .all(|l| l.starts_with("    ") || l.chars().count() <= 100 + 60)
        );
    }

    #[test]
    fn a_verdict_that_is_not_the_tables_is_marked() {
        let mut survey = survey(&["B1"]);
        survey.rows[0].policies[0].expected = Verdict::Ok;
        survey.rows[0].kernel_agrees = Some(false);
        assert!(!survey.is_as_expected());
        let table = table(&survey);
        assert!(table.contains("LEAK!"), "{table}");
        assert!(
            table.contains("B1 under mapcount: should be ok, and is LEAK: hold 0"),
            "{table}"
        );
        assert!(table.contains("B1 on the kernel"), "{table}");
    }

    #[test]
    fn a_kernel_that_differs_as_it_may_is_marked_and_says_why() {
        let mut survey = survey(&["C13"]);
        // Whatever the kernel here does: one that grants it.
        survey.rows[0].kernel = ScenarioOutcome::Played {
            verdict: Verdict::NotRefused,
            findings: vec![],
            copies: None,
        };
        survey.rows[0].kernel_differs = find("C13").unwrap().why_kernel_may(Verdict::NotRefused);
        let table = table(&survey);
        assert!(table.contains(" done~\n"), "{table}");
        assert!(
            table.contains("may be so:\n       C13:\n         MADV_DONTNEED"),
            "{table}"
        );
        assert!(elsewhere(&survey.rows[0]).ends_with("kernel done~\n"));
        assert!(survey.is_as_expected());
    }

    #[test]
    fn a_story_shows_entry_bit_counts_and_frame() {
        let (scenario, policy) = (find("D1").unwrap(), Policy::Exclusive);
        let mut story = head(scenario, policy.name());
        let outcome = emulate::<SoftStage>(scenario, policy, &mut |moment| {
            story += &step(moment, true);
        });
        story += &moral(&outcome, scenario.expected.under(policy), None);
        story += &elsewhere(&Row::of::<SoftStage>(scenario));
        assert!(story.contains("\nunder: mapcount DIV, mapcount-forced-break DIV, refcount ok, "));
        assert!(story.contains("  3  P forks: C is there\n"), "{story}");
        let state = "P page 0   rw   frame 1    maps 1  gets 0  pins 1   exclusive";
        assert!(story.contains(state), "{story}");
        assert!(story.contains("verdict: ok, as it should be, 1 pages copied (as the table says)"));
        let scenario = find("F4").unwrap();
        emulate::<SoftStage>(scenario, Policy::SeedRecompute, &mut |moment| {
            story += &step(moment, false);
        });
        assert!(story.contains("P page 1   rw   huge   frame 5    maps 1  gets 0  pins 1\n"));
        assert!(story.contains("P page 1   ro   frame 5    maps 1  gets 0  pins 1\n"));
        let scenario = find("D1").unwrap();
        let bug = Policy::Mapcount;
        let outcome = emulate::<SoftStage>(scenario, bug, &mut |moment| {
            story += &step(moment, false);
        });
        assert!(story.contains("     ! hold 0"), "{story}");
        let moral = |may| moral(&outcome, Some(Verdict::Ok), may);
        assert!(moral(None).contains("(NOT as the table says: ok)"));
        assert!(moral(Some("of old")).contains("(exclusive: ok; the kernel may: of old)"));
    }

    #[test]
    fn long_titles_are_cut() {
        assert_eq!(shorten("abcdef", 6), "abcdef");
        assert_eq!(shorten("abcdefg", 6), "abcde…");
    }
}
