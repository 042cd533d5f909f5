//! A bar on standard error for what takes long: in a terminal only, and only after a second.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is faster than this is not worth a bar.
const QUIET: Duration = Duration::from_secs(1);

pub struct Progress {
    started: Instant,
    in_terminal: bool,
    template: &'static str,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// For bytes of a model.
    pub fn loading() -> Self {
        Self::new("loading {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}")
    }

    /// For tokens of chunks.
    pub fn encoding() -> Self {
        Self::new("encoding {wide_bar} {human_pos}/{human_len} tokens {eta}")
    }

    fn new(template: &'static str) -> Self {
        let in_terminal = io::stderr().is_terminal();
        Self { started: Instant::now(), in_terminal, template, bar: None }
    }

    pub fn update(&mut self, done: u64, total: u64) {
        if !self.in_terminal || self.started.elapsed() < QUIET {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(self.template).expect("it is valid");
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            bar.set_style(style);
            bar
        });
        bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
