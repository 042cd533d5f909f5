//! Tells a model's thinking (`<think>` to `</think>`) from what it says, as text arrives.
//!
//! Pure. Text goes out as soon as it is certain on which side it is; the tags belong to the
//! thinking. All pieces joined are the text that came in.

pub const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voice {
    Thought,
    Said,
}

/// Where in the text we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thinking {
    inside: bool,
    /// What may be the beginning of the tag that comes next.
    held: String,
}

impl Thinking {
    /// `inside`: the prompt has opened the thinking already.
    pub fn new(inside: bool) -> Self {
        Self { inside, held: String::new() }
    }

    /// Takes the next piece of text; returns what is certain now.
    pub fn push(&mut self, text: &str) -> Vec<(Voice, String)> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        loop {
            let tag = if self.inside { CLOSE } else { OPEN };
            let Some(at) = self.held.find(tag) else { break };
            // the opening tag is where thinking begins, the closing one is still part of it
            let end = if self.inside { at + tag.len() } else { at };
            let before: String = self.held.drain(..end).collect();
            self.keep(before, &mut pieces);
            self.inside = !self.inside;
            if self.inside {
                let tag: String = self.held.drain(..tag.len()).collect();
                self.keep(tag, &mut pieces);
            }
        }
        let certain = self.held.len() - self.longest_beginning();
        let before: String = self.held.drain(..certain).collect();
        self.keep(before, &mut pieces);
        pieces
    }

    /// The rest, once no text will follow.
    pub fn finish(&mut self) -> Vec<(Voice, String)> {
        let mut pieces = Vec::new();
        let rest = std::mem::take(&mut self.held);
        self.keep(rest, &mut pieces);
        pieces
    }

    fn keep(&self, text: String, pieces: &mut Vec<(Voice, String)>) {
        if !text.is_empty() {
            let voice = if self.inside { Voice::Thought } else { Voice::Said };
            pieces.push((voice, text));
        }
    }

    /// Length of the longest end of the held text that begins the next tag.
    fn longest_beginning(&self) -> usize {
        let tag = if self.inside { CLOSE } else { OPEN };
        let fits = |&len: &usize| self.held.ends_with(&tag[..len]);
        (1..tag.len()).rev().find(fits).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said and what is thought, with `[]` around thoughts.
    fn marked(inside: bool, pieces: &[&str]) -> String {
        let mut thinking = Thinking::new(inside);
        let mut all: Vec<(Voice, String)> =
            pieces.iter().flat_map(|piece| thinking.push(piece)).collect();
        all.extend(thinking.finish());
        all.into_iter()
            .map(|(voice, text)| match voice {
                Voice::Thought => format!("[{text}]"),
                Voice::Said => text,
            })
            .collect::<String>()
            .replace("][", "")
    }

    #[test]
    fn thoughts_are_told_from_speech_however_the_text_is_cut() {
        let text = "a<think>b</think>c < d<thin";
        let expected = "a[<think>b</think>]c < d<thin";
        assert_eq!(marked(false, &[text]), expected);
        for cut in 0..text.len() {
            let (left, right) = text.split_at(cut);
            assert_eq!(marked(false, &[left, right]), expected, "cut at {cut}");
        }
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(marked(false, &letters), expected);
    }

    #[test]
    fn a_template_may_have_opened_the_thinking() {
        assert_eq!(marked(true, &["why</thi", "nk>so"]), "[why</think>]so");
        assert_eq!(marked(true, &["never ends"]), "[never ends]");
    }

    #[test]
    fn text_that_begins_no_tag_goes_out_at_once() {
        let mut thinking = Thinking::new(false);
        assert_eq!(thinking.push("hé"), [(Voice::Said, "hé".to_owned())]);
        assert_eq!(thinking.push("<t"), []);
        assert_eq!(thinking.push("o"), [(Voice::Said, "<to".to_owned())]);
    }
}
