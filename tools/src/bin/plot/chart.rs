//! A line chart as SVG: a title, two axes, a line and a marker a series, a legend.
//!
//! Plain shapes and text only, so that every viewer and converter shows the same.

use std::fmt::Write;

use crate::svg::{line, open, text};

const WIDTH: f64 = 820.0;
const HEIGHT: f64 = 480.0;
/// The part lines are drawn in.
const LEFT: f64 = 84.0;
const RIGHT: f64 = 640.0;
const TOP: f64 = 78.0;
const BOTTOM: f64 = 412.0;
/// Room at the sides of it, so that markers do not lie on the frame.
const MARGIN: f64 = 28.0;
/// From one line of the legend to the next.
const LEGEND_STEP: f64 = 22.0;

/// Colours that people who see few of them can tell apart (Okabe and Ito), and a shape
/// each for those who see none.
const STYLES: [(&str, Shape); 8] = [
    ("#0072b2", Shape::Circle),
    ("#56b4e9", Shape::Square),
    ("#009e73", Shape::Triangle),
    ("#d55e00", Shape::Circle),
    ("#e69f00", Shape::Square),
    ("#cc79a7", Shape::Triangle),
    ("#8c5a78", Shape::Diamond),
    ("#555555", Shape::Diamond),
];

#[derive(Clone, Copy)]
enum Shape {
    Circle,
    Square,
    Triangle,
    Diamond,
}

/// What is drawn.
#[derive(Clone, Debug)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) subtitle: String,
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) series: Vec<Series>,
}

/// A line.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// Which of the styles it has: the same in every chart.
    pub(crate) style: usize,
    pub(crate) points: Vec<(f64, f64)>,
}

/// An axis with its ticks, from the first to the last.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) name: String,
    pub(crate) scale: Scale,
    /// Where, and what is written there; without words it is a line alone.
    pub(crate) ticks: Vec<(f64, String)>,
}

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    Linear,
    Log,
}

impl Axis {
    /// A logarithmic axis with a tick for each of `values`.
    pub(crate) fn of_values(
        name: &str,
        values: impl IntoIterator<Item = f64>,
        label: impl Fn(f64) -> String,
    ) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        Self {
            name: name.to_owned(),
            scale: Scale::Log,
            ticks: values.into_iter().map(|v| (v, label(v))).collect(),
        }
    }

    /// A logarithmic axis from the power of ten below the least of `values` to the one above the largest.
    pub(crate) fn decades(
        name: &str,
        values: impl IntoIterator<Item = f64>,
        label: impl Fn(f64) -> String,
    ) -> Self {
        let (mut low, mut high) = (f64::INFINITY, 0.0f64);
        for value in values.into_iter().filter(|v| v.is_finite() && *v > 0.0) {
            low = low.min(value);
            high = high.max(value);
        }
        let (first, last) = if high > 0.0 {
            let first = low.log10().floor() as i32;
            (first, (high.log10().ceil() as i32).max(first + 1))
        } else {
            (0, 1)
        };
        let mut ticks = Vec::new();
        for power in first..=last {
            let decade = 10f64.powi(power);
            ticks.push((decade, label(decade)));
            if power < last {
                ticks.extend((2..10).map(|n| (decade * f64::from(n), String::new())));
            }
        }
        Self {
            name: name.to_owned(),
            scale: Scale::Log,
            ticks,
        }
    }

    /// Where `value` is, from 0 at the first tick to 1 at the last.
    fn place(&self, value: f64) -> f64 {
        let scaled = |v: f64| match self.scale {
            Scale::Linear => v,
            Scale::Log => v.max(f64::MIN_POSITIVE).log10(),
        };
        let ends = self.ticks.first().zip(self.ticks.last());
        let Some(((first, _), (last, _))) = ends else {
            return 0.5;
        };
        let length = scaled(*last) - scaled(*first);
        if length > 0.0 {
            (scaled(value) - scaled(*first)) / length
        } else {
            0.5
        }
    }
}

impl Chart {
    /// The chart as an SVG document.
    pub(crate) fn svg(&self) -> String {
        let mut svg = open(WIDTH, HEIGHT, LEFT, &self.title, &self.subtitle);
        self.draw_axes(&mut svg);
        for series in &self.series {
            self.draw(series, &mut svg);
        }
        self.draw_legend(&mut svg);
        svg.push_str("</svg>\n");
        svg
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + MARGIN + self.x.place(value) * (RIGHT - LEFT - 2.0 * MARGIN)
    }

    fn y(&self, value: f64) -> f64 {
        BOTTOM - self.y.place(value).clamp(0.0, 1.0) * (BOTTOM - TOP)
    }

    fn draw_axes(&self, svg: &mut String) {
        for (value, label) in &self.y.ticks {
            let y = self.y(*value);
            let colour = if label.is_empty() {
                "#eeeeee"
            } else {
                "#c8c8c8"
            };
            line(svg, (LEFT, y), (RIGHT, y), colour);
            if !label.is_empty() {
                svg.push_str(&text(LEFT - 8.0, y + 4.5, "end", "", label));
            }
        }
        for (value, label) in &self.x.ticks {
            let x = self.x(*value);
            line(svg, (x, BOTTOM), (x, BOTTOM + 6.0), "#222222");
            svg.push_str(&text(x, BOTTOM + 22.0, "middle", "", label));
        }
        line(svg, (LEFT, BOTTOM), (RIGHT, BOTTOM), "#222222");
        let middle = (LEFT + RIGHT) / 2.0;
        svg.push_str(&text(middle, BOTTOM + 46.0, "middle", "", &self.x.name));
        let (x, y) = (20.0, (TOP + BOTTOM) / 2.0);
        let turned = format!("transform=\"rotate(-90 {x} {y})\"");
        svg.push_str(&text(x, y, "middle", &turned, &self.y.name));
    }

    fn draw(&self, series: &Series, svg: &mut String) {
        let (colour, shape) = STYLES[series.style % STYLES.len()];
        let places: Vec<(f64, f64)> = series
            .points
            .iter()
            .map(|(x, y)| (self.x(*x), self.y(*y)))
            .collect();
        let path: Vec<String> = places
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for (x, y) in places {
            mark(svg, shape, colour, x, y);
        }
    }

    /// In the order in which the lines end on the right, so that the eye finds them.
    fn draw_legend(&self, svg: &mut String) {
        let last = |series: &Series| series.points.last().map_or(0.0, |(_, y)| *y);
        let mut order: Vec<&Series> = self.series.iter().collect();
        order.sort_by(|a, b| last(b).total_cmp(&last(a)));
        for (row, series) in order.into_iter().enumerate() {
            let (colour, shape) = STYLES[series.style % STYLES.len()];
            let (x, y) = (RIGHT + 24.0, TOP + 10.0 + row as f64 * LEGEND_STEP);
            let _ = writeln!(
                svg,
                "<line x1=\"{}\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke=\"{colour}\" stroke-width=\"2\"/>",
                x - 12.0,
                x + 12.0
            );
            mark(svg, shape, colour, x, y);
            svg.push_str(&text(x + 20.0, y + 4.5, "start", "", &series.name));
        }
    }
}

fn mark(svg: &mut String, shape: Shape, colour: &str, x: f64, y: f64) {
    let polygon = |corners: &[(f64, f64)]| {
        let corners: Vec<String> = corners
            .iter()
            .map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy))
            .collect();
        format!("<polygon points=\"{}\"", corners.join(" "))
    };
    let element = match shape {
        Shape::Circle => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\""),
        Shape::Square => polygon(&[(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)]),
        Shape::Triangle => polygon(&[(0.0, -5.5), (5.0, 4.0), (-5.0, 4.0)]),
        Shape::Diamond => polygon(&[(0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)]),
    };
    let _ = writeln!(
        svg,
        "{element} fill=\"{colour}\" stroke=\"#ffffff\" stroke-width=\"1\"/>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::svg::tests::assert_well_formed;

    fn chart(series: Vec<Series>) -> Chart {
        Chart {
            title: "a < b & c > d".to_owned(),
            subtitle: "sub".to_owned(),
            x: Axis::of_values("x", [4.0, 1.0, 1.0], |v| v.to_string()),
            y: Axis::decades("y", [30.0, 4000.0], |v| v.to_string()),
            series,
        }
    }

    #[test]
    fn a_chart_is_well_formed() {
        let series = Series {
            name: "<ours>".to_owned(),
            style: 0,
            points: vec![(1.0, 30.0), (4.0, 4000.0)],
        };
        let svg = chart(vec![series]).svg();
        assert_well_formed(&svg);
        assert_eq!(svg.matches("<circle").count(), 3, "two points and a legend");
        assert!(svg.contains("&lt;ours&gt;") && svg.contains("a &lt; b &amp; c &gt; d"));
    }

    #[test]
    fn a_chart_of_nothing_is_well_formed() {
        let mut empty = chart(vec![]);
        assert_well_formed(&empty.svg());
        empty.x.ticks.clear();
        empty.y = Axis::decades("y", [], |v| v.to_string());
        empty.series.push(Series {
            name: "one point".to_owned(),
            style: 12,
            points: vec![(0.0, 0.0)],
        });
        assert_well_formed(&empty.svg());
    }

    #[test]
    fn decades_hold_all_values() {
        let axis = Axis::decades("y", [30.0, 4000.0], |v| v.to_string());
        let named: Vec<_> = axis.ticks.iter().filter(|(_, l)| !l.is_empty()).collect();
        assert_eq!(named.len(), 4, "10 to 10,000");
        assert_eq!(axis.place(10.0), 0.0);
        assert_eq!(axis.place(10_000.0), 1.0);
        assert!((axis.place(316.227_766) - 0.5).abs() < 1e-6);
    }

    #[test]
    fn ticks_are_in_order_and_once() {
        let axis = Axis::of_values("x", [8.0, 1.0, 8.0, 4.0], |v| v.to_string());
        let at: Vec<f64> = axis.ticks.iter().map(|(v, _)| *v).collect();
        assert_eq!(at, [1.0, 4.0, 8.0]);
    }
}
