//! Finds calls in what a model says, as it is said.
//!
//! Two ways of speaking are known: `<tool_call>{..}</tool_call>` amid other text (Hermes, Qwen),
//! and an answer that is a JSON object and nothing else. In both the object has `name`, and
//! `arguments` or `parameters`. What turns out to be no call is text after all.

use serde_json::Value;
use uuid::Uuid;

/// How calls look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Between tags.
    Tagged,
    /// The whole answer.
    Object,
}

impl Style {
    /// How a template has its model speak. One that doesn't know tools is told to use tags.
    pub fn of(template: &str) -> Self {
        let tagged = template.contains(OPEN) || !template.contains("tools");
        if tagged { Self::Tagged } else { Self::Object }
    }
}

/// What was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    Text(String),
    /// A call begins. Calls are numbered from 0.
    Call {
        index: usize,
        id: String,
        name: String,
    },
    /// Its arguments go on.
    Arguments {
        index: usize,
        text: String,
    },
}

pub const OPEN: &str = "<tool_call>";
pub const CLOSE: &str = "</tool_call>";

/// One answer as it grows.
pub struct Speech {
    style: Option<Style>,
    names: Vec<String>,
    parallel: bool,
    calls: usize,
    /// Not yet told.
    held: String,
    /// The call that is being read.
    call: Option<Call>,
    /// Something was said, so that an object here is no call.
    has_spoken: bool,
}

/// A call in the middle of its text.
#[derive(Default)]
struct Call {
    text: String,
    /// Where the arguments begin, once the name before them is known.
    arguments: Option<Scan>,
}

/// How far a JSON value was read.
struct Scan {
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
    ended: bool,
}

impl Speech {
    /// An answer without calls.
    pub fn plain() -> Self {
        Self::new(None, Vec::new(), true)
    }

    /// An answer that may call these. Without `parallel` the first call is the only one.
    pub fn new(style: Option<Style>, names: Vec<String>, parallel: bool) -> Self {
        let (held, call) = (String::new(), None);
        Self { style, names, parallel, calls: 0, held, call, has_spoken: false }
    }

    pub fn has_called(&self) -> bool {
        self.calls > 0
    }

    pub fn push(&mut self, text: &str) -> Vec<Said> {
        let mut said = Vec::new();
        match self.style {
            None if text.is_empty() => {}
            None => said.push(Said::Text(text.to_owned())),
            Some(style) => {
                self.held.push_str(text);
                while self.advance(style, &mut said) {}
            }
        }
        said
    }

    /// What is left, once nothing follows.
    pub fn finish(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        if let Some(call) = self.call.take() {
            let tail = std::mem::take(&mut self.held);
            self.end_call(call, &tail, &mut said);
        }
        let held = std::mem::take(&mut self.held);
        self.speak(&held, &mut said);
        said
    }

    /// Takes one step through what is held; false where more must come first.
    fn advance(&mut self, style: Style, said: &mut Vec<Said>) -> bool {
        if let Some(call) = self.call.take() {
            return self.go_on(style, call, said);
        }
        match style {
            Style::Object => {
                let begins = self.held.trim_start().chars().next();
                if self.has_spoken || begins.is_some_and(|letter| letter != '{') {
                    let held = std::mem::take(&mut self.held);
                    self.speak(&held, said);
                    return false;
                }
                self.call = begins.map(|_| Call::default());
                self.call.is_some()
            }
            Style::Tagged => match self.held.find(OPEN) {
                Some(at) => {
                    let behind = self.held.split_off(at + OPEN.len());
                    let before = std::mem::replace(&mut self.held, behind);
                    self.speak(before[..at].trim_end(), said);
                    self.call = Some(Call::default());
                    true
                }
                None => {
                    let certain = self.held.len() - beginning_of(OPEN, &self.held);
                    let held = self.held.split_off(certain);
                    let text = std::mem::replace(&mut self.held, held);
                    self.speak(&text, said);
                    false
                }
            },
        }
    }

    /// Reads on in a call.
    fn go_on(&mut self, style: Style, mut call: Call, said: &mut Vec<Said>) -> bool {
        let end = match style {
            Style::Tagged => self.held.find(CLOSE),
            Style::Object => None,
        };
        let certain = match style {
            Style::Tagged => end.unwrap_or(self.held.len() - beginning_of(CLOSE, &self.held)),
            Style::Object => self.held.len(),
        };
        let rest = self.held.split_off(certain);
        call.text.push_str(&std::mem::replace(&mut self.held, rest));
        self.tell(&mut call, said);
        if end.is_none() {
            self.call = Some(call);
            return false;
        }
        self.held.drain(..CLOSE.len());
        self.end_call(call, "", said);
        true
    }

    /// Tells what is certain of a call by now.
    fn tell(&mut self, call: &mut Call, said: &mut Vec<Said>) {
        if call.arguments.is_none()
            && let Some((name, at)) = head(&call.text)
            && self.names.contains(&name)
        {
            self.begin(name, said);
            call.arguments = Some(Scan::new(at));
        }
        if let Some(scan) = &mut call.arguments {
            let text = scan.read(&call.text);
            if !text.is_empty() && self.counts() {
                said.push(Said::Arguments { index: self.calls - 1, text: text.to_owned() });
            }
        }
    }

    /// A call has ended; what can't be read as one was text.
    fn end_call(&mut self, call: Call, tail: &str, said: &mut Vec<Said>) {
        if call.arguments.is_some() {
            return;
        }
        let text = call.text + tail;
        match whole(&text).filter(|(name, _)| self.names.contains(name)) {
            Some((name, arguments)) => {
                self.begin(name, said);
                if self.counts() {
                    said.push(Said::Arguments { index: self.calls - 1, text: arguments });
                }
            }
            None => {
                let tag = if self.style == Some(Style::Tagged) { OPEN } else { "" };
                self.speak(&format!("{tag}{text}"), said);
            }
        }
    }

    fn begin(&mut self, name: String, said: &mut Vec<Said>) {
        self.calls += 1;
        if self.counts() {
            let id = format!("call_{}", Uuid::new_v4().simple());
            said.push(Said::Call { index: self.calls - 1, id, name });
        }
    }

    /// Whether the newest call is told.
    fn counts(&self) -> bool {
        self.parallel || self.calls == 1
    }

    fn speak(&mut self, text: &str, said: &mut Vec<Said>) {
        // blanks between calls say nothing
        if text.is_empty() || (self.calls > 0 && text.trim().is_empty()) {
            return;
        }
        self.has_spoken |= !text.trim().is_empty();
        said.push(Said::Text(text.to_owned()));
    }
}

impl Scan {
    fn new(at: usize) -> Self {
        Self { at, depth: 0, in_string: false, escaped: false, ended: false }
    }

    /// What of the value came since.
    fn read<'a>(&mut self, text: &'a str) -> &'a str {
        let start = self.at;
        for letter in text[start..].chars() {
            if self.ended {
                break;
            }
            self.at += letter.len_utf8();
            self.pass(letter);
        }
        &text[start..self.at]
    }

    fn pass(&mut self, letter: char) {
        match letter {
            _ if self.escaped => self.escaped = false,
            '\\' if self.in_string => self.escaped = true,
            '"' => self.in_string = !self.in_string,
            '{' | '[' if !self.in_string => self.depth += 1,
            '}' | ']' if !self.in_string => {
                self.depth -= 1;
                self.ended = self.depth == 0;
            }
            _ => {}
        }
    }
}

/// The name of a call that begins with it, and where its arguments begin: an object.
fn head(text: &str) -> Option<(String, usize)> {
    let rest = text.trim_start().strip_prefix('{')?.trim_start().strip_prefix("\"name\"")?;
    let rest = rest.trim_start().strip_prefix(':')?.trim_start();
    let mut names = serde_json::Deserializer::from_str(rest).into_iter::<String>();
    let name = names.next()?.ok()?;
    let rest = rest[names.byte_offset()..].trim_start().strip_prefix(',')?.trim_start();
    let fields = ["\"arguments\"", "\"parameters\""];
    let rest = fields.iter().find_map(|field| rest.strip_prefix(field))?;
    let rest = rest.trim_start().strip_prefix(':')?.trim_start();
    rest.starts_with('{').then(|| (name, text.len() - rest.len()))
}

/// A call in any order of its fields.
fn whole(text: &str) -> Option<(String, String)> {
    let value: Value = serde_json::from_str(text.trim()).ok()?;
    let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
    let arguments = match arguments {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    Some((value["name"].as_str()?.to_owned(), arguments))
}

/// Length of the longest end of `text` that begins `tag`.
fn beginning_of(tag: &str, text: &str) -> usize {
    let lengths = (1..tag.len()).rev();
    lengths.into_iter().find(|&length| text.ends_with(&tag[..length])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is told when the text comes letter by letter, neighbours joined, ids left out.
    fn told(style: Style, parallel: bool, text: &str) -> Vec<Said> {
        let names = vec!["f".to_owned(), "g".to_owned()];
        let mut speech = Speech::new(Some(style), names, parallel);
        let mut all: Vec<Said> = Vec::new();
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let pieces = letters.iter().flat_map(|letter| speech.push(letter));
        let mut pieces: Vec<Said> = pieces.collect();
        pieces.extend(speech.finish());
        for said in pieces {
            match (all.last_mut(), said) {
                (Some(Said::Text(before)), Said::Text(more)) => before.push_str(&more),
                (Some(Said::Arguments { text: before, .. }), Said::Arguments { text, .. }) => {
                    before.push_str(&text);
                }
                (_, Said::Call { index, name, .. }) => {
                    all.push(Said::Call { index, id: String::new(), name });
                }
                (_, said) => all.push(said),
            }
        }
        all
    }

    fn call(index: usize, name: &str, arguments: &str) -> [Said; 2] {
        let begin = Said::Call { index, id: String::new(), name: name.into() };
        [begin, Said::Arguments { index, text: arguments.into() }]
    }

    #[test]
    fn calls_between_tags_are_told_apart_from_text() {
        let text = "Let me see.\n<tool_call>\n\
                    {\"name\": \"f\", \"arguments\": {\"a\": \"}<\\\"\"}}\n\
                    </tool_call>\n<tool_call>{\"arguments\": {}, \"name\": \"g\"}</tool_call>";
        let all = told(Style::Tagged, true, text);
        assert_eq!(all[0], Said::Text("Let me see.\n".into()));
        assert_eq!(all[1..3], call(0, "f", "{\"a\": \"}<\\\"\"}"));
        assert_eq!(all[3..], call(1, "g", "{}"));
        let first = told(Style::Tagged, false, text);
        assert_eq!(first, all[..3]);
    }

    #[test]
    fn what_only_looks_like_a_call_is_text() {
        for text in [
            "a < b and <tool",
            "<tool_call>nonsense",
            "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}",
            "{\"name\": \"f\"}",
            "",
        ] {
            let said = told(Style::Tagged, true, text);
            let texts: Vec<Said> =
                Some(Said::Text(text.into())).filter(|_| !text.is_empty()).into_iter().collect();
            assert_eq!(said, texts);
        }
    }

    #[test]
    fn an_answer_that_is_an_object_is_a_call() {
        let spoken = " {\"name\": \"g\", \"parameters\": {\"x\": [1, {}]}} ";
        assert_eq!(told(Style::Object, true, spoken), call(0, "g", "{\"x\": [1, {}]}"));
        for text in ["{\"answer\": 3}", "The object {\"name\": \"f\", \"arguments\": {}}"] {
            assert_eq!(told(Style::Object, true, text), [Said::Text(text.into())]);
        }
    }

    #[test]
    fn arguments_are_told_as_they_come() {
        let mut speech = Speech::new(Some(Style::Object), vec!["f".into()], true);
        assert!(speech.push("{\"name\": \"f\", \"argu").is_empty());
        let said = speech.push("ments\": {\"city\": \"Lis");
        assert!(matches!(&said[0], Said::Call { name, .. } if name == "f"));
        assert_eq!(said[1], Said::Arguments { index: 0, text: "{\"city\": \"Lis".into() });
        let said = speech.push("bon\"}}");
        assert_eq!(said, [Said::Arguments { index: 0, text: "bon\"}".into() }]);
        assert!(speech.finish().is_empty() && speech.has_called());
    }
}
