//! The figures of a load as a picture: an SVG file without scripts.
//!
//! Three panels: what share of answers had its first token by when, the same of gaps between
//! tokens, and when each request was sent against how long its first token took.

use std::fmt::Write;

use super::load::Run;
use super::report::Figures;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 220.0;
/// Around a panel, for what is written beside it.
const LEFT: f64 = 70.0;
const TOP: f64 = 40.0;
const MARGIN: f64 = 30.0;
/// Lines across a panel.
const TICKS: u32 = 4;

/// One panel: what it shows, its points, and how far its axes go.
struct Panel<'a> {
    title: &'a str,
    across: &'a str,
    /// Joined to a line, or dots.
    line: bool,
    points: Vec<(f64, f64)>,
    up: f64,
}

pub fn svg(title: &str, run: &Run, figures: &Figures) -> String {
    let sent: Vec<(f64, f64)> = (run.answers.iter())
        .filter_map(|answer| Some((answer.sent, answer.times.as_ref().ok()?.first() * 1e3)))
        .collect();
    let slowest = sent.iter().map(|point| point.1).fold(0.0, f64::max);
    let milliseconds = "milliseconds";
    let shares = |title, values: &[f64]| Panel {
        title,
        across: milliseconds,
        line: true,
        points: shares(values),
        up: 100.0,
    };
    let panels = [
        shares("first token: % of answers that had it", &figures.first),
        shares("between tokens: % of gaps that were over", &figures.gaps),
        Panel {
            title: "first token in milliseconds, by when it was asked for",
            across: "seconds since the first request",
            line: false,
            points: sent,
            up: slowest,
        },
    ];
    let height = TOP + panels.len() as f64 * (HEIGHT + TOP + MARGIN);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{}</text>\n",
        LEFT + WIDTH + MARGIN,
        escaped(title)
    );
    for (index, panel) in panels.iter().enumerate() {
        panel.draw(TOP + MARGIN + index as f64 * (HEIGHT + TOP + MARGIN), &mut out);
    }
    out.push_str("</svg>\n");
    out
}

impl Panel<'_> {
    fn draw(&self, top: f64, out: &mut String) {
        let far = |values: f64| if values > 0.0 { values } else { 1.0 };
        let across = far(self.points.iter().map(|point| point.0).fold(0.0, f64::max));
        let up = far(self.up);
        let x = |value: f64| LEFT + value / across * WIDTH;
        let y = |value: f64| top + HEIGHT - value / up * HEIGHT;
        text(out, (LEFT, top - 8.0), "start", self.title);
        text(out, (LEFT + WIDTH, top + HEIGHT + 30.0), "end", self.across);
        for tick in 0..=TICKS {
            let share = f64::from(tick) / f64::from(TICKS);
            let (at, value) = (y(up * share), short(up * share));
            line(out, "#ddd", &[(LEFT, at), (LEFT + WIDTH, at)]);
            text(out, (LEFT - 6.0, at + 4.0), "end", &value);
            text(out, (x(across * share), top + HEIGHT + 16.0), "middle", &short(across * share));
        }
        let points: Vec<(f64, f64)> = self.points.iter().map(|p| (x(p.0), y(p.1))).collect();
        if self.line {
            line(out, "#1f5fa8", &points);
            return;
        }
        for (x, y) in points {
            writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"#1f5fa8\"/>")
                .expect("text can be written to");
        }
    }
}

/// (milliseconds, percent of the values that are no larger), from the smallest on.
fn shares(values: &[f64]) -> Vec<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let count = sorted.len() as f64;
    let percent = |index: usize| (index + 1) as f64 / count * 100.0;
    sorted.iter().enumerate().map(|(index, value)| (value * 1e3, percent(index))).collect()
}

fn line(out: &mut String, colour: &str, points: &[(f64, f64)]) {
    let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    let points = points.join(" ");
    writeln!(out, "<polyline fill=\"none\" stroke=\"{colour}\" points=\"{points}\"/>")
        .expect("text can be written to");
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, text: &str) {
    let text = escaped(text);
    writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>")
        .expect("text can be written to");
}

/// A number with as many digits as it needs beside an axis.
fn short(value: f64) -> String {
    match value {
        _ if value == 0.0 => "0".to_owned(),
        _ if value < 10.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::load::{Answer, Times};
    use super::*;

    fn drawn(arrivals: &[Vec<f64>]) -> String {
        let answer = |arrivals: &Vec<f64>| Answer {
            sent: 0.5,
            times: Ok(Times { arrivals: arrivals.clone(), end: 3.0, tokens: 2 }),
        };
        let run = Run { answers: arrivals.iter().map(answer).collect(), seconds: 4.0 };
        svg("a <b> & c", &run, &Figures::of(&run))
    }

    #[test]
    fn every_answer_is_a_dot_and_a_step_of_the_curve() {
        let svg = drawn(&[vec![1.0, 1.5], vec![2.0, 2.1]]);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("a &lt;b&gt; &amp; c") && !svg.contains("NaN"), "{svg}");
        // half of the answers by the middle of the axis, all at its end
        assert!(svg.contains("points=\"430.0,180.0 790.0,70.0\""), "{svg}");
    }

    #[test]
    fn nothing_measured_is_still_a_picture() {
        let svg = drawn(&[]);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && !svg.contains("NaN"));
    }
}
