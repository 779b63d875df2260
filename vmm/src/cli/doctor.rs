//! `vmm doctor`: what this machine can and cannot do, on one screen.

use std::io;

use super::args::DoctorArgs;
use super::screen::Colours;
use super::{Failure, print};
use crate::doctor::{Examination, Finding, Grade, examine};
use crate::session::config::Config;
use crate::session::report::Verdict;

/// Columns of the text.
const WIDTH: usize = 80;
/// Columns of grade and name.
const INDENT: usize = 18;

/// [`Verdict::Error`] if a run as `config` says cannot go here.
pub(super) fn run(args: &DoctorArgs, config: &Config) -> Result<Verdict, Failure> {
    let examination = examine(config);
    let text = if args.json {
        let json = serde_json::to_string_pretty(&examination);
        json.map_err(|e| Failure::Print(io::Error::other(e)))? + "\n"
    } else {
        render(&examination, Colours::on(&io::stdout()))
    };
    print(&text).map_err(Failure::Print)?;
    Ok(if examination.can_run {
        Verdict::Ok
    } else {
        Verdict::Error
    })
}

fn render(examination: &Examination, colours: Colours) -> String {
    let Examination {
        version, platform, ..
    } = examination;
    let mut text = format!("vmm {version} on Linux {}\n\n", platform.kernel);
    for finding in &examination.findings {
        text.push_str(&row(finding, colours));
    }
    text.push('\n');
    text.push_str(if examination.can_run {
        "`vmm` can run here.\n"
    } else {
        "`vmm` cannot run here: see each `no` above.\n"
    });
    text
}

fn row(finding: &Finding, colours: Colours) -> String {
    let (grade, colour) = match finding.grade {
        Grade::Ok => ("ok", 32),
        Grade::Worse => ("worse", 33),
        Grade::No => ("no", 31),
    };
    // Padded before it is coloured: escape sequences would count as width.
    let grade = match colours {
        Colours::On => format!("\x1b[{colour}m{grade:<5}\x1b[0m"),
        Colours::Off => format!("{grade:<5}"),
    };
    let mut lines = wrap(&finding.found, WIDTH - INDENT);
    if let Some(advice) = &finding.advice {
        let advice = wrap(advice, WIDTH - INDENT - 3);
        let arrows = std::iter::once("-> ").chain(std::iter::repeat("   "));
        lines.extend(
            arrows
                .zip(advice)
                .map(|(arrow, line)| arrow.to_owned() + &line),
        );
    }
    let name = finding.name;
    let head = format!("{grade}  {name:<11}");
    let heads = std::iter::once(head).chain(std::iter::repeat(" ".repeat(INDENT)));
    heads
        .zip(lines)
        .map(|(head, line)| head + &line + "\n")
        .collect()
}

/// `text` in lines of at most `width` columns, broken between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use palimpsest::kvm::Platform;

    fn example() -> Examination {
        let finding = |name, grade, found: &str, advice: Option<&str>| Finding {
            name,
            grade,
            found: found.to_owned(),
            advice: advice.map(str::to_owned),
        };
        Examination {
            version: "0.1.0",
            platform: Platform {
                kernel: "6.12.0".to_owned(),
                ..Platform::detect()
            },
            can_run: false,
            findings: vec![
                finding("cpus", Grade::Ok, "2 for 2 vCPUs", None),
                finding(
                    "huge pages",
                    Grade::Worse,
                    "this kernel makes none for a file in memory (Invalid argument (os error 22))",
                    Some("use Linux 6.7 or newer"),
                ),
                finding("kvm", Grade::No, "no /dev/kvm", Some("load the kvm module")),
            ],
        }
    }

    #[test]
    fn each_line_says_what_was_found_and_what_to_do() {
        assert_eq!(
            render(&example(), Colours::Off),
            "\
vmm 0.1.0 on Linux 6.12.0

ok     cpus       2 for 2 vCPUs
worse  huge pages this kernel makes none for a file in memory (Invalid argument
                  (os error 22))
                  -> use Linux 6.7 or newer
no     kvm        no /dev/kvm
                  -> load the kvm module

`vmm` cannot run here: see each `no` above.
"
        );
    }

    #[test]
    fn colours_change_nothing_else() {
        let coloured = render(&example(), Colours::On);
        let plain = ["\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"]
            .iter()
            .fold(coloured.clone(), |text, code| text.replace(code, ""));
        assert_ne!(coloured, plain);
        assert_eq!(plain, render(&example(), Colours::Off));
    }

    #[test]
    fn this_machine_fits_a_screen() {
        let config = crate::session::config::tests::example();
        let text = render(&examine(&config), Colours::Off);
        assert!(text.lines().count() <= 36, "{text}");
        assert!(
            text.lines().all(|line| line.chars().count() <= WIDTH),
            "{text}"
        );
    }
}
