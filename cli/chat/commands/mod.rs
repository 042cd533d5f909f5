//! Slash commands: one enum, one table, one file per group.
//!
//! Parsing is pure. A command returns what it has to say as a [`Report`], once as text for
//! people and once as facts for programs, and never prints.

mod chunks;
mod conversation;
mod information;
mod load;
mod tiers;
mod words;

use anyhow::{Result, anyhow};
use serde_json::{Map, Value};

use super::Chat;
use load::Load;
use tiers::Save;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Load(Load),
    Context,
    Activate(Vec<String>),
    Deactivate(Vec<String>),
    Show(String),
    Populate(String),
    Compose(Vec<String>),
    Tag {
        chunk: String,
        tag: String,
    },
    Save(Save),
    Unload(String),
    Restore(String),
    Erase(String),
    Clear {
        saved: bool,
    },
    /// Shows the policy where none is named.
    Policy(Option<String>),
    /// Empty text removes the system text.
    System(String),
    Reset,
    History,
    Stats,
    Model,
    Help,
    Quit,
}

/// A command as `/help` tells it.
pub struct Entry {
    pub name: &'static str,
    pub arguments: &'static str,
    pub does: &'static str,
}

pub const TABLE: [Entry; 21] = [
    Entry {
        name: "/load",
        arguments: "<file>...",
        does: "read files as chunks, encode and activate them (--name N, --inactive)",
    },
    Entry { name: "/context", arguments: "", does: "show the chunks and what is free" },
    Entry { name: "/activate", arguments: "<chunk>...", does: "let answers see chunks" },
    Entry { name: "/deactivate", arguments: "<chunk>...", does: "hide chunks from answers" },
    Entry { name: "/show", arguments: "<chunk>", does: "show a chunk's text and where it is" },
    Entry { name: "/populate", arguments: "<chunk>", does: "bring a chunk's KV to the device" },
    Entry {
        name: "/compose",
        arguments: "<chunk> <chunk>...",
        does: "make a chunk of the contents of others",
    },
    Entry { name: "/tag", arguments: "<chunk> <tag>", does: "add a tag to a chunk" },
    Entry {
        name: "/save",
        arguments: "<chunk or all>",
        does: "write text and KV to disk (--codec raw, planes or int8)",
    },
    Entry { name: "/unload", arguments: "<chunk>", does: "move a chunk's KV to host memory" },
    Entry {
        name: "/restore",
        arguments: "<chunk>",
        does: "bring a chunk's KV back from host memory or disk",
    },
    Entry { name: "/erase", arguments: "<chunk>", does: "remove a chunk everywhere, disk too" },
    Entry {
        name: "/clear",
        arguments: "[--saved]",
        does: "remove all chunks (--saved: from disk too)",
    },
    Entry {
        name: "/policy",
        arguments: "[exact|independent|blend|mask]",
        does: "show or set what a chunk's KV depends on",
    },
    Entry {
        name: "/system",
        arguments: "<text>",
        does: "set the system text for the whole conversation (\"\" removes it)",
    },
    Entry { name: "/reset", arguments: "", does: "start a new conversation" },
    Entry { name: "/history", arguments: "", does: "show what was said" },
    Entry { name: "/stats", arguments: "", does: "show tokens, speed and memory" },
    Entry { name: "/model", arguments: "", does: "show the model and how it runs" },
    Entry { name: "/help", arguments: "", does: "show this" },
    Entry { name: "/quit", arguments: "", does: "leave (also /exit)" },
];

/// What a command has to say.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub command: &'static str,
    /// Lines for people.
    pub text: String,
    pub facts: Map<String, Value>,
}

impl Report {
    /// `facts` is an object.
    fn new(command: &'static str, text: impl Into<String>, facts: Value) -> Self {
        let Value::Object(facts) = facts else { unreachable!("facts are an object") };
        Self { command, text: text.into(), facts }
    }
}

/// Reads a line that begins with a slash; `None` for any other.
pub fn parse(line: &str) -> Option<Result<Command>> {
    let line = line.trim();
    line.starts_with('/').then(|| {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        known(name, rest.trim())
    })
}

fn known(name: &str, rest: &str) -> Result<Command> {
    let name = if name == "/exit" { "/quit" } else { name };
    let Some(entry) = TABLE.iter().find(|entry| entry.name == name) else {
        return Err(anyhow!("Unknown command: {name}\nType /help for available commands"));
    };
    let is_optional = entry.arguments.starts_with('[');
    if entry.arguments.is_empty() != rest.is_empty() && !is_optional {
        return Err(usage(entry));
    }
    let words = words::split(rest);
    let one = |words| only(words).ok_or_else(|| usage(entry));
    Ok(match entry.name {
        "/load" => Command::Load(Load::parse(words).ok_or_else(|| usage(entry))?),
        "/context" => Command::Context,
        "/activate" => Command::Activate(words),
        "/deactivate" => Command::Deactivate(words),
        "/show" => Command::Show(one(words)?),
        "/populate" => Command::Populate(one(words)?),
        "/compose" if words.len() < 2 => return Err(usage(entry)),
        "/compose" => Command::Compose(words),
        "/tag" => {
            let [chunk, tag] = <[String; 2]>::try_from(words).map_err(|_| usage(entry))?;
            if tag.is_empty() {
                return Err(usage(entry));
            }
            Command::Tag { chunk, tag }
        }
        "/save" => Command::Save(Save::parse(words).ok_or_else(|| usage(entry))?),
        "/unload" => Command::Unload(one(words)?),
        "/restore" => Command::Restore(one(words)?),
        "/erase" => Command::Erase(one(words)?),
        "/clear" if rest.is_empty() => Command::Clear { saved: false },
        "/clear" if rest == "--saved" => Command::Clear { saved: true },
        "/clear" => return Err(usage(entry)),
        "/policy" if rest.is_empty() => Command::Policy(None),
        "/policy" => Command::Policy(Some(one(words)?)),
        "/system" => Command::System(if rest == "\"\"" { "" } else { rest }.to_owned()),
        "/reset" => Command::Reset,
        "/history" => Command::History,
        "/stats" => Command::Stats,
        "/model" => Command::Model,
        "/help" => Command::Help,
        "/quit" => Command::Quit,
        other => unreachable!("{other} is in the table and not in the enum"),
    })
}

fn only(mut words: Vec<String>) -> Option<String> {
    (words.len() == 1).then(|| words.remove(0))
}

fn usage(entry: &Entry) -> anyhow::Error {
    anyhow!("{}", format!("Usage: {} {}", entry.name, entry.arguments).trim_end().to_owned())
}

impl Command {
    pub(super) fn obey(&self, chat: &mut Chat) -> Result<Report> {
        match self {
            Self::Load(load) => load::load(chat, load),
            Self::Context => chunks::context(chat),
            Self::Activate(names) => chunks::switch(chat, names, true),
            Self::Deactivate(names) => chunks::switch(chat, names, false),
            Self::Show(name) => chunks::show(chat, name),
            Self::Populate(name) => tiers::populate(chat, name),
            Self::Compose(names) => load::compose(chat, names),
            Self::Tag { chunk, tag } => chunks::tag(chat, chunk, tag),
            Self::Save(save) => tiers::save(chat, save),
            Self::Unload(name) => tiers::unload(chat, name),
            Self::Restore(name) => tiers::restore(chat, name),
            Self::Erase(name) => tiers::erase(chat, name),
            Self::Clear { saved } => tiers::clear(chat, *saved),
            Self::Policy(name) => chunks::policy(chat, name.as_deref()),
            Self::System(text) => Ok(conversation::system(chat, text)),
            Self::Reset => Ok(conversation::reset(chat)),
            Self::History => Ok(conversation::history(chat)),
            Self::Stats => information::stats(chat),
            Self::Model => Ok(information::model(chat)),
            Self::Help => Ok(information::help()),
            Self::Quit => Ok(Report::new("/quit", "", Value::Object(Map::new()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line).expect("it begins with a slash").map_err(|error| error.to_string())
    }

    #[test]
    fn every_command_of_the_table_can_be_given() {
        for entry in &TABLE {
            let line = if entry.arguments.is_empty() {
                entry.name.to_owned()
            } else {
                let words = entry.arguments.trim_end_matches("...").replace(" or ", "-");
                format!("{} {}", entry.name, words.trim_matches(['[', ']']))
            };
            assert!(parsed(&line).is_ok(), "{line}");
        }
        assert_eq!(parsed("/exit"), Ok(Command::Quit));
    }

    #[test]
    fn a_line_without_a_slash_is_no_command() {
        assert!(parse("hello /help").is_none());
        assert!(parse("").is_none());
    }

    #[test]
    fn arguments_are_kept_as_written() {
        assert_eq!(parsed("/system  Be  brief. "), Ok(Command::System("Be  brief.".into())));
        assert_eq!(parsed("/system a\nb"), Ok(Command::System("a\nb".into())));
        assert_eq!(parsed("/system \"\""), Ok(Command::System(String::new())));
    }

    #[test]
    fn mistakes_are_answered_with_the_way_out() {
        let unknown = "Unknown command: /x\nType /help for available commands";
        assert_eq!(parsed("/x y").unwrap_err(), unknown);
        assert_eq!(
            parsed("/System y").unwrap_err().lines().next(),
            Some("Unknown command: /System")
        );
        assert_eq!(parsed("/system").unwrap_err(), "Usage: /system <text>");
        assert_eq!(parsed("/reset now").unwrap_err(), "Usage: /reset");
        assert_eq!(parsed("/compose a").unwrap_err(), "Usage: /compose <chunk> <chunk>...");
        assert_eq!(parsed("/tag a").unwrap_err(), "Usage: /tag <chunk> <tag>");
        assert_eq!(parsed("/tag a ''").unwrap_err(), "Usage: /tag <chunk> <tag>");
        assert_eq!(parsed("/clear all").unwrap_err(), "Usage: /clear [--saved]");
        assert_eq!(parsed("/save a b").unwrap_err(), "Usage: /save <chunk or all>");
    }
}
