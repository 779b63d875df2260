//! A timeline as SVG: a row a thread, a bar for what it did, one under the other where one was part of another.

use crate::svg::{bar, line, open, text};
use crate::trace::{Span, Thread};

const WIDTH: f64 = 980.0;
const LEFT: f64 = 96.0;
const RIGHT: f64 = 956.0;
const TOP: f64 = 78.0;
/// Of a bar, and of a row that has one layer of them.
const BAR: f64 = 18.0;
const GAP: f64 = 10.0;
/// What is narrower has no words in it, in pixels a letter and altogether.
const LETTER: f64 = 7.6;
/// The least that is seen.
const THINNEST: f64 = 0.8;
/// Layers that are drawn; what is deeper is left out.
const LAYERS: usize = 2;
const LEGEND_STEP: f64 = 96.0;

/// Colours for what is seen most, and one for all else (Okabe and Ito).
const COLOURS: [(&str, &str); 12] = [
    ("snapshot", "#bbbbbb"),
    ("prepare", "#8fb8de"),
    ("park", "#e69f00"),
    ("parked", "#f2cf7d"),
    ("devices", "#8c5a78"),
    ("fork", "#d55e00"),
    ("registers", "#cc79a7"),
    ("resume", "#009e73"),
    ("fault", "#c23b22"),
    ("copy ahead", "#0072b2"),
    ("first look", "#a6cf9c"),
    ("last look", "#7fb07f"),
];
const OTHER: &str = "#999999";
/// A vCPU that does nothing else is in the guest.
const GUEST: &str = "#e4f1fa";

/// What is drawn: a part of a run, from the first microsecond to the second, and the part of that which is
/// pointed out.
pub(crate) struct Timeline<'a> {
    pub(crate) title: String,
    pub(crate) subtitle: String,
    pub(crate) threads: &'a [Thread],
    pub(crate) from: f64,
    pub(crate) to: f64,
    pub(crate) pause: (f64, f64),
}

impl Timeline<'_> {
    /// As an SVG document. Times are said from the beginning of what is pointed out.
    pub(crate) fn svg(&self) -> String {
        let rows: Vec<(&Thread, Vec<(usize, &Span)>)> = self
            .order()
            .into_iter()
            .map(|thread| (thread, self.layers(thread)))
            .filter(|(_, bars)| !bars.is_empty())
            .collect();
        let height_of = |bars: &[(usize, &Span)]| {
            let layers = 1 + bars.iter().map(|(layer, _)| *layer).max().unwrap_or(0);
            layers as f64 * BAR + GAP
        };
        let bottom = TOP + rows.iter().map(|(_, bars)| height_of(bars)).sum::<f64>();
        let mut svg = open(WIDTH, bottom + 84.0, LEFT, &self.title, &self.subtitle);
        let (begin, end) = (self.x(self.pause.0), self.x(self.pause.1));
        bar(
            &mut svg,
            (begin, TOP - 6.0),
            (end - begin, bottom - TOP + 6.0),
            "#fdf3dc",
        );
        let mut y = TOP;
        let mut named: Vec<&str> = Vec::new();
        for (thread, bars) in &rows {
            svg.push_str(&text(LEFT - 8.0, y + 13.0, "end", "", &thread.name));
            if thread.name.starts_with("vcpu") {
                self.draw_guest(&mut svg, bars, y);
            }
            for (layer, span) in bars {
                let colour = COLOURS.iter().find(|(name, _)| *name == span.name);
                if let Some((name, _)) = colour.filter(|(name, _)| !named.contains(name)) {
                    named.push(name);
                }
                let colour = colour.map_or(OTHER, |(_, colour)| colour);
                self.draw(&mut svg, span, y + *layer as f64 * BAR, colour);
            }
            y += height_of(bars);
        }
        self.draw_axis(&mut svg, bottom);
        for (n, (name, colour)) in COLOURS
            .iter()
            .filter(|(name, _)| named.contains(name))
            .enumerate()
        {
            let per_line = ((RIGHT - LEFT) / LEGEND_STEP) as usize;
            let x = LEFT + (n % per_line) as f64 * LEGEND_STEP;
            let y = bottom + 44.0 + (n / per_line) as f64 * 20.0;
            bar(&mut svg, (x, y), (12.0, 12.0), colour);
            svg.push_str(&text(x + 17.0, y + 11.0, "start", "", name));
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// Who takes the snapshot first, then who is stopped for it.
    fn order(&self) -> Vec<&Thread> {
        let mut threads: Vec<&Thread> = self.threads.iter().collect();
        let rank = |thread: &Thread| {
            let takes = thread.spans.iter().any(|span| span.name == "snapshot");
            (!takes, !thread.name.starts_with("vcpu"))
        };
        threads.sort_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| a.name.cmp(&b.name)));
        threads
    }

    /// What of a thread is seen, and how many of the others each is in.
    fn layers<'t>(&self, thread: &'t Thread) -> Vec<(usize, &'t Span)> {
        let mut open: Vec<&Span> = Vec::new();
        let mut bars = Vec::new();
        for span in &thread.spans {
            open.retain(|outer| outer.end > span.begin);
            let layer = open.len();
            open.push(span);
            if layer < LAYERS && span.end > self.from && span.begin < self.to {
                bars.push((layer, span));
            }
        }
        bars
    }

    fn x(&self, at: f64) -> f64 {
        let part = (at - self.from) / (self.to - self.from);
        LEFT + part.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    fn draw(&self, svg: &mut String, span: &Span, y: f64, colour: &str) {
        let (begin, end) = (self.x(span.begin), self.x(span.end));
        let width = (end - begin).max(THINNEST);
        bar(svg, (begin, y), (width, BAR - 1.0), colour);
        if width > span.name.chars().count() as f64 * LETTER {
            let middle = begin + width / 2.0;
            svg.push_str(&text(
                middle,
                y + 13.0,
                "middle",
                "font-size=\"12\"",
                &span.name,
            ));
        }
    }

    /// Where a vCPU's thread does nothing of ours.
    fn draw_guest(&self, svg: &mut String, bars: &[(usize, &Span)], y: f64) {
        let mut at = self.from;
        let mut draw = |from: f64, to: f64| {
            let (begin, end) = (self.x(from), self.x(to));
            if end > begin {
                bar(svg, (begin, y), (end - begin, BAR - 1.0), GUEST);
            }
        };
        for (_, span) in bars.iter().filter(|(layer, _)| *layer == 0) {
            draw(at, span.begin);
            at = at.max(span.end);
        }
        draw(at, self.to);
    }

    fn draw_axis(&self, svg: &mut String, bottom: f64) {
        line(svg, (LEFT, bottom), (RIGHT, bottom), "#222222");
        let step = step(self.to - self.from);
        let first = ((self.from - self.pause.0) / step).ceil() as i64;
        let last = ((self.to - self.pause.0) / step).floor() as i64;
        for n in first..=last {
            let at = n as f64 * step;
            let x = self.x(self.pause.0 + at);
            line(svg, (x, bottom), (x, bottom + 5.0), "#222222");
            let label = match step {
                step if step < 1000.0 => format!("{at:.0} µs"),
                _ => format!("{:.0} ms", at / 1000.0),
            };
            svg.push_str(&text(
                x,
                bottom + 20.0,
                "middle",
                "font-size=\"12\"",
                &label,
            ));
        }
    }
}

/// From one tick to the next, where eight or so are seen.
fn step(length: f64) -> f64 {
    let least = (length / 9.0).max(1.0);
    let decade = 10f64.powf(least.log10().floor());
    let fits = |factor: &f64| factor * decade >= least;
    [1.0, 2.0, 5.0].into_iter().find(fits).unwrap_or(10.0) * decade
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::svg::tests::assert_well_formed;
    use crate::trace::{tests::example, threads};

    fn timeline(threads: &[Thread], from: f64, to: f64) -> Timeline<'_> {
        Timeline {
            title: "a < b".to_owned(),
            subtitle: String::new(),
            threads,
            from,
            to,
            pause: (1050.0, 1350.0),
        }
    }

    #[test]
    fn what_happened_is_drawn_and_nothing_else() {
        let threads = threads(&example()).unwrap();
        let svg = timeline(&threads, 900.0, 1700.0).svg();
        assert_well_formed(&svg);
        let bars = |name| {
            let (_, colour) = COLOURS.iter().find(|(n, _)| *n == name).unwrap();
            svg.matches(&format!("fill=\"{colour}\"")).count()
        };
        // Each once more in the legend.
        for name in ["snapshot", "park", "resume", "parked", "fault"] {
            assert_eq!(bars(name), 2, "{name}");
        }
        assert_eq!(bars("fork"), 0);
        assert_eq!(
            svg.matches(&format!("fill=\"{GUEST}\"")).count(),
            3,
            "around two spans"
        );
        assert!(svg.find(">main<").unwrap() < svg.find(">vcpu0<").unwrap());
    }

    #[test]
    fn a_part_in_which_nothing_happened_is_well_formed() {
        let threads = threads(&example()).unwrap();
        assert_well_formed(&timeline(&threads, 0.0, 10.0).svg());
        assert_well_formed(&timeline(&[], 0.0, 1e6).svg());
    }

    #[test]
    fn ticks_are_round_and_few() {
        for (length, expected) in [
            (800.0, 100.0),
            (5000.0, 1000.0),
            (9.0, 1.0),
            (1e6, 200_000.0),
        ] {
            assert_eq!(step(length), expected, "{length}");
            let ticks = length / expected;
            assert!((4.0..=9.0).contains(&ticks), "{ticks}");
        }
    }
}
