//! How a chat looks: in a terminal, through a pipe, as JSON.
//!
//! Answers and results go to standard output, errors and notes to standard error. Only a
//! terminal sees colour and figures after an answer. Control characters of a model or a file
//! don't reach a terminal.

use std::io::{self, Write};

use serde_json::json;
use strand_engine::Exactness;
use strand_models::Tokenizer;

use super::commands::Report;
use super::thinking::{Thinking, Voice};
use crate::answer::{self, Answer};
use crate::describe;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Terminal { colour: bool },
    Piped,
    Json,
}

pub struct Screen<'a> {
    mode: Mode,
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    thinking: Thinking,
    /// Something of the present answer was shown and its last line is open.
    open_line: bool,
}

impl<'a> Screen<'a> {
    pub fn new(mode: Mode, out: &'a mut dyn Write, err: &'a mut dyn Write) -> Self {
        Self { mode, out, err, thinking: Thinking::new(false), open_line: false }
    }

    /// An answer begins; `thinking` if its first words are thoughts.
    pub fn begin(&mut self, thinking: bool) {
        self.thinking = Thinking::new(thinking);
        self.open_line = false;
    }

    pub fn piece(&mut self, text: &str) -> io::Result<()> {
        match self.mode {
            Mode::Json => Ok(()),
            Mode::Piped => {
                self.open_line = true;
                self.out.write_all(text.as_bytes())?;
                self.out.flush()
            }
            Mode::Terminal { colour } => {
                let pieces = self.thinking.push(text);
                self.show(&pieces, colour)
            }
        }
    }

    fn show(&mut self, pieces: &[(Voice, String)], colour: bool) -> io::Result<()> {
        for (voice, text) in pieces {
            self.open_line = true;
            let text = printable(text);
            match voice {
                Voice::Thought if colour => write!(self.out, "\x1b[2m{text}\x1b[0m")?,
                _ => write!(self.out, "{text}")?,
            }
        }
        self.out.flush()
    }

    /// The answer has ended.
    pub fn end(&mut self, answer: &Answer, tokenizer: Option<&Tokenizer>) -> io::Result<()> {
        match self.mode {
            Mode::Json => writeln!(self.out, "{}", answer.to_json(tokenizer))?,
            Mode::Piped => writeln!(self.out)?,
            Mode::Terminal { colour } => {
                let rest = self.thinking.finish();
                self.show(&rest, colour)?;
                writeln!(self.out)?;
                self.dim(&figures(answer), colour)?;
            }
        }
        self.open_line = false;
        self.out.flush()
    }

    /// The answer broke off: what follows starts on a line of its own.
    pub fn cut(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.open_line) {
            writeln!(self.out)?;
        }
        self.out.flush()
    }

    /// What a command has to say.
    pub fn report(&mut self, report: &Report) -> io::Result<()> {
        match self.mode {
            Mode::Json => {
                let mut line = json!({"command": report.command, "ok": true});
                let object = line.as_object_mut().expect("an object was just made");
                object.extend(report.facts.clone());
                writeln!(self.out, "{line}")?;
            }
            Mode::Piped if !report.text.is_empty() => writeln!(self.out, "{}", report.text)?,
            Mode::Terminal { .. } if !report.text.is_empty() => {
                writeln!(self.out, "{}", printable(&report.text))?;
            }
            Mode::Piped | Mode::Terminal { .. } => {}
        }
        self.out.flush()
    }

    /// A line failed: the command's own words, or what kept the model from answering.
    pub fn error(&mut self, command: Option<&str>, error: &anyhow::Error) -> io::Result<()> {
        let text = describe(error);
        match (self.mode, command) {
            (Mode::Json, _) => {
                let line = json!({"command": command, "ok": false, "error": text});
                writeln!(self.out, "{line}")?;
                self.out.flush()
            }
            (_, Some(_)) => writeln!(self.err, "{text}"),
            (_, None) => writeln!(self.err, "error: {text}"),
        }
    }

    /// Something the user should know beside the answer.
    pub fn note(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.err, "note: {text}")
    }

    fn dim(&mut self, text: &str, colour: bool) -> io::Result<()> {
        if colour {
            writeln!(self.err, "\x1b[2m{text}\x1b[0m")
        } else {
            writeln!(self.err, "{text}")
        }
    }
}

/// Tokens, speed and reuse of an answer in a line.
fn figures(answer: &Answer) -> String {
    let tokens = answer.token_ids.len();
    let Some(reuse) = answer.reuse else {
        return format!("[stopped after {tokens} tokens; Ctrl-C again to leave]");
    };
    let speed = answer.decode_speed();
    let speed = speed.map_or(String::new(), |speed| format!(" at {speed:.1} tokens/s"));
    let approximate = match answer.exactness {
        Some(Exactness::Approximate) => "; approximate",
        _ => "",
    };
    format!(
        "[{tokens} tokens{speed}, first after {:.0} ms; prompt {}: {}{approximate}]",
        answer.timings.first_token.as_secs_f64() * 1e3,
        answer.prompt_tokens,
        answer::reuse_text(reuse),
    )
}

/// The text with U+FFFD for what would steer a terminal.
fn printable(text: &str) -> String {
    let steers = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    text.chars().map(|c| if steers(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What reaches standard output and standard error.
    fn shown(mode: Mode, pieces: &[&str]) -> (String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut screen = Screen::new(mode, &mut out, &mut err);
        screen.begin(false);
        for piece in pieces {
            screen.piece(piece).unwrap();
        }
        screen.end(&Answer::default(), None).unwrap();
        screen.error(Some("/x"), &anyhow::anyhow!("Unknown command: /x")).unwrap();
        screen.error(None, &anyhow::anyhow!("too long")).unwrap();
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    #[test]
    fn a_pipe_gets_the_answer_as_it_is() {
        let (out, err) = shown(Mode::Piped, &["<think>a</think>", "b\x1b[31m"]);
        assert_eq!(out, "<think>a</think>b\x1b[31m\n");
        assert_eq!(err, "Unknown command: /x\nerror: too long\n");
    }

    #[test]
    fn a_terminal_sees_thinking_dim_and_is_not_steered() {
        let pieces = ["<think>a</think>", "b\x1b[31m"];
        let (out, err) = shown(Mode::Terminal { colour: true }, &pieces);
        assert_eq!(
            out,
            "\x1b[2m<think>a</think>\x1b[0mb\u{fffd}[31m\n".replacen(
                "<think>",
                "<think>\x1b[0m\x1b[2m",
                1
            )
        );
        assert!(err.starts_with("\x1b[2m[stopped after 0 tokens"), "{err:?}");
        let (out, err) = shown(Mode::Terminal { colour: false }, &pieces);
        assert_eq!(out, "<think>a</think>b\u{fffd}[31m\n");
        assert!(!err.contains('\x1b'));
    }

    #[test]
    fn json_is_one_object_a_line() {
        let (out, err) = shown(Mode::Json, &["a"]);
        let lines: Vec<serde_json::Value> =
            out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["finish_reason"], "abort");
        assert_eq!(lines[1]["error"], "Unknown command: /x");
        assert_eq!(lines[2], json!({"command": null, "ok": false, "error": "too long"}));
        assert_eq!(err, "");
    }
}
