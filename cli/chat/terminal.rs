//! Lines typed by a person: editing, history, completion, several lines with a trailing `\`.
//!
//! The history is kept across runs in the data folder; a line that begins with a blank is not.
//! Ctrl-C at the prompt drops the line, twice in a row leaves; Ctrl-D leaves.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{CompletionType, Config, Context, Editor, Helper};
use strand_engine::ChunkId;

use super::screen::{Mode, Screen};
use super::{Chat, Flow, commands};
use crate::args::CommonArgs;
use crate::{Outcome, data_dir};

pub fn run(chat: &mut Chat, common: &CommonArgs) -> Result<Outcome> {
    eprintln!("strand {} with {}", env!("CARGO_PKG_VERSION"), chat.engine.model_name());
    eprintln!("{}", chat.engine.plan());
    eprintln!("Type /help for commands, Ctrl-D to leave.");
    let config =
        Config::builder().completion_type(CompletionType::List).history_ignore_space(true).build();
    let mut editor = Editor::<Assistant, DefaultHistory>::with_config(config)?;
    let (paths, chunks) = (FilenameCompleter::new(), chunk_names(chat));
    editor.set_helper(Some(Assistant { paths, chunks }));
    let history = open_history(&mut editor, common);
    let colour = colour_wanted();
    let (mut out, mut err) = (io::stdout(), io::stderr());
    let mut screen = Screen::new(Mode::Terminal { colour }, &mut out, &mut err);
    let mut interrupted = false;
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                chat.interrupt.disarm();
                let line = join_lines(&line);
                if !line.trim().is_empty() && editor.add_history_entry(line.as_ref())? {
                    history.as_ref().map(|path| editor.append_history(path)).transpose()?;
                }
                if chat.line(&line, &mut screen)? == Flow::Quit {
                    return Ok(Outcome::Done);
                }
                if let Some(assistant) = editor.helper_mut() {
                    assistant.chunks = chunk_names(chat);
                }
                // the press that ended an answer counts as the first
                interrupted = chat.interrupt.armed();
            }
            Err(ReadlineError::Interrupted) if interrupted => return Ok(Outcome::Interrupted),
            Err(ReadlineError::Interrupted) => {
                interrupted = true;
                eprintln!("(Ctrl-C again to leave)");
            }
            Err(ReadlineError::Eof) => return Ok(Outcome::Done),
            Err(error) => return Err(error.into()),
        }
    }
}

/// What a chunk can be called, here and in the store: its name, its hash.
fn chunk_names(chat: &Chat) -> Vec<String> {
    let here = chat.context.entries().iter();
    let here = here.map(|entry| (entry.chunk.id, entry.chunk.name.clone()));
    // a store that fails says so where it is needed
    let kept = chat.keeper.chunks().unwrap_or_default().into_iter();
    let kept = kept.map(|info| (info.id, info.name));
    let all: BTreeMap<ChunkId, String> = kept.chain(here).collect();
    all.into_iter().flat_map(|(id, name)| [name, id.short()]).collect()
}

/// Reads the history; its path, if more can be written to it.
fn open_history(
    editor: &mut Editor<Assistant, DefaultHistory>,
    common: &CommonArgs,
) -> Option<PathBuf> {
    let folder = data_dir::path(common)?;
    let path = folder.join("history");
    let opened = fs::create_dir_all(&folder)
        .map_err(ReadlineError::from)
        .and_then(|()| if path.exists() { editor.load_history(&path) } else { Ok(()) });
    match opened {
        Ok(()) => Some(path),
        Err(error) => {
            eprintln!("note: no history, {} can't be used: {error}", path.display());
            None
        }
    }
}

/// <https://no-color.org>: any value but the empty one switches colour off.
fn colour_wanted() -> bool {
    let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = env::var_os("TERM").is_some_and(|value| value == Path::new("dumb").as_os_str());
    !refused && !dumb && io::stderr().is_terminal()
}

/// A trailing `\` goes on in the next line and is not part of the text.
fn join_lines(line: &str) -> Cow<'_, str> {
    if line.contains("\\\n") { line.replace("\\\n", "\n").into() } else { line.into() }
}

/// What the line editor asks while a line is typed.
struct Assistant {
    paths: FilenameCompleter,
    /// Names and hashes of the chunks there are.
    chunks: Vec<String>,
}

impl Helper for Assistant {}
impl Highlighter for Assistant {}
impl Hinter for Assistant {
    type Hint = String;
}

impl Validator for Assistant {
    fn validate(&self, context: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        Ok(if context.input().ends_with('\\') {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Completer for Assistant {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let typed = &line[..position];
        let found = complete_command(typed).map(|pairs| (0, pairs));
        match found.or_else(|| complete_argument(typed, &self.chunks)) {
            Some(completion) => Ok(completion),
            None => self.paths.complete_path(line, position),
        }
    }
}

/// Commands that a line can still become; `None` once it is past its first word.
fn complete_command(typed: &str) -> Option<Vec<Pair>> {
    let is_command = typed.starts_with('/') && !typed.contains(char::is_whitespace);
    is_command.then(|| {
        let names = commands::TABLE.iter().filter(|entry| entry.name.starts_with(typed));
        names
            .map(|entry| Pair {
                display: entry.name.to_owned(),
                replacement: match entry.arguments {
                    "" => entry.name.to_owned(),
                    _ => format!("{} ", entry.name),
                },
            })
            .collect()
    })
}

/// What the last word can still become, and where it starts: a chunk, or a choice of those that
/// the command names; `None` for commands that take neither.
fn complete_argument(typed: &str, chunks: &[String]) -> Option<(usize, Vec<Pair>)> {
    let (name, _) = typed.split_once(char::is_whitespace)?;
    let entry = commands::TABLE.iter().find(|entry| entry.name == name)?;
    let start = typed.rfind(char::is_whitespace).map_or(0, |at| at + 1);
    let pair = |text: &str| {
        let quoted = text.contains(char::is_whitespace).then(|| format!("\"{text}\""));
        Pair { display: text.to_owned(), replacement: quoted.unwrap_or(text.to_owned()) }
    };
    let choices = entry.arguments.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let candidates: Vec<&str> = match choices {
        Some(choices) => choices.split('|').collect(),
        None if entry.arguments.starts_with("<chunk") => {
            chunks.iter().map(String::as_str).collect()
        }
        None => return None,
    };
    let matching = candidates.into_iter().filter(|text| text.starts_with(&typed[start..]));
    Some((start, matching.map(pair).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completions(typed: &str) -> Option<Vec<String>> {
        let pairs = complete_command(typed)?;
        Some(pairs.into_iter().map(|pair| pair.replacement).collect())
    }

    #[test]
    fn commands_are_completed_at_the_start_of_a_line() {
        assert_eq!(completions("/sy"), Some(vec!["/system ".to_owned()]));
        assert_eq!(completions("/h").unwrap(), ["/history", "/help"]);
        assert_eq!(completions("/system a"), None);
        assert_eq!(completions("look at /h"), None);
    }

    #[test]
    fn chunks_are_completed_where_a_command_takes_them() {
        let chunks = ["notes.txt", "ba7816bf8f01cfea", "my notes"].map(str::to_owned);
        let complete = |typed: &str| {
            let (start, pairs) = complete_argument(typed, &chunks)?;
            Some((start, pairs.into_iter().map(|pair| pair.replacement).collect::<Vec<_>>()))
        };
        assert_eq!(complete("/activate no"), Some((10, vec!["notes.txt".to_owned()])));
        assert_eq!(complete("/show my"), Some((6, vec!["\"my notes\"".to_owned()])));
        assert_eq!(complete("/deactivate #1 ba").map(|found| found.0), Some(15));
        assert_eq!(complete("/save no"), Some((6, vec!["notes.txt".to_owned()])));
        assert_eq!(complete("/policy in"), Some((8, vec!["independent".to_owned()])));
        assert_eq!(complete("/clear --"), Some((7, vec!["--saved".to_owned()])));
        assert_eq!(complete("/load no"), None);
        assert_eq!(complete("what about no"), None);
    }

    #[test]
    fn a_trailing_backslash_joins_lines() {
        assert_eq!(join_lines("a\\\nb\\\n\\\nc"), "a\nb\n\nc");
        assert_eq!(join_lines("C:\\dir"), "C:\\dir");
    }
}
