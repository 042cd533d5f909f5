//! Lines from standard input, every one of them run.

use std::io::{self, BufRead, Write};

use anyhow::{Context, Result, anyhow};

use super::screen::{Mode, Screen};
use super::{Chat, Flow};
use crate::Outcome;

/// Runs all lines; `Failed` if any of them did.
pub fn run(chat: &mut Chat, mode: Mode) -> Result<Outcome> {
    let (mut out, mut err) = (io::stdout(), io::stderr());
    run_lines(chat, &mut io::stdin().lock(), &mut Screen::new(mode, &mut out, &mut err))
}

fn run_lines(chat: &mut Chat, lines: &mut impl BufRead, screen: &mut Screen) -> Result<Outcome> {
    let mut outcome = Outcome::Done;
    let mut bytes = Vec::new();
    while lines.read_until(b'\n', &mut bytes).context("cannot read standard input")? > 0 {
        let flow = match std::str::from_utf8(&bytes) {
            Ok(line) => chat.line(line, screen)?,
            Err(_) => {
                screen.error(None, &anyhow!("a line of the input is not UTF-8"))?;
                Flow::Failed
            }
        };
        match flow {
            Flow::On => {}
            Flow::Failed => outcome = Outcome::Failed,
            Flow::Quit => break,
        }
        bytes.clear();
    }
    io::stdout().flush()?;
    Ok(outcome)
}
