//! A rendered conversation, cut into segments at message borders.
//!
//! The rendering is the truth: it is tokenized as a whole and cut between tokens, so the segments'
//! ids joined are always those of `apply_chat_template(tokenize=True)`. Where messages begin and
//! end is found by rendering again with marks in place of their text, never by knowing the
//! template. A border that cannot be found, or does not sit at a special token (where the
//! tokens on one side cannot depend on the text of the other), is no border: its two sides are one
//! segment.
//!
//! A special token's name inside a message's text becomes that token, as in Hugging Face, unless
//! the conversation is told to keep text (`template_marks`). In a chunk it stays text: a file
//! cannot close the message that carries it.

use crate::chat_template::{ChatTemplate, Content, Conversation, Message};
use crate::error::Error;
use crate::template_marks::MarkedText;
use crate::tokenizer::{EncodedText, Tokenizer};
use serde_json::Value;
use std::collections::HashMap;
use std::ops::Range;

/// A run of the prompt that is kept and found again as one.
#[derive(Debug, Clone, PartialEq)]
pub struct TemplateSegment {
    pub kind: SegmentKind,
    /// The messages it holds; empty for an anchor, a header the template wrote by itself, and the
    /// generation prompt.
    pub messages: Range<usize>,
    pub ids: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// BOS, one token.
    Anchor,
    /// System text and tools.
    Header,
    /// One message with the tokens that close it, or several that cannot be told apart.
    Turn,
    /// What opens the assistant's turn.
    GenerationPrompt,
}

impl ChatTemplate {
    /// Renders the conversation and cuts its ids at the message borders.
    pub fn segments(
        &self,
        tokenizer: &Tokenizer,
        conversation: &Conversation,
    ) -> Result<Vec<TemplateSegment>, Error> {
        let layout = Layout::find(self, conversation)?;
        let MarkedText { encoded, cuts: asked } = match &conversation.marks {
            Some(marks) => marks.encode(tokenizer, &layout.text)?,
            None => MarkedText {
                encoded: tokenizer.encode_with_offsets(&layout.text)?,
                cuts: Vec::new(),
            },
        };
        let cuttable = SpecialBorders::new(tokenizer, &encoded);
        let anchor = self.anchor_tokens(tokenizer, &layout.text, &encoded.ids);

        // Each cut: (first token, first message) of a segment.
        let mut cuts = vec![(anchor, 0)];
        for (message, border) in layout.borders.iter().enumerate() {
            let Some(token) = border.and_then(|offset| cuttable.token_at(offset)) else {
                continue;
            };
            let last = cuts.last().expect("begins with one").0;
            if token > last && !inside_header(&conversation.messages, message) {
                cuts.push((token, message));
            }
        }
        let mut segments = Vec::with_capacity(cuts.len() + 1);
        if anchor > 0 {
            segments.push(TemplateSegment {
                kind: SegmentKind::Anchor,
                messages: 0..0,
                ids: encoded.ids[..anchor].to_vec(),
            });
        }
        let count = conversation.messages.len();
        for (index, &(token, message)) in cuts.iter().enumerate() {
            let next = cuts.get(index + 1).copied();
            let (end, last) = next.unwrap_or((encoded.ids.len(), count));
            let inside = asked.iter().copied().filter(|&cut| token < cut && cut < end);
            let mut start = token;
            for end in inside.chain([end]).filter(|&end| token < end) {
                segments.push(TemplateSegment {
                    kind: kind_of(&conversation.messages, message..last),
                    messages: message..last,
                    ids: encoded.ids[start..end].to_vec(),
                });
                start = end;
            }
        }
        Ok(segments)
    }

    /// One text as a message of its own: what a chunk of context is, whatever stands around it.
    ///
    /// A system message, where the template lets one stand alone behind others; else a user
    /// message. Tokenized alone, without BOS; special tokens named in the text stay text.
    pub fn chunk_ids(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
        for roles in CHUNK_PLACES {
            let mut conversation = Conversation::default();
            let position = roles.iter().position(|role| role.ends_with('!'));
            let position = position.expect("each place has its mark");
            for (index, role) in roles.iter().enumerate() {
                let said = if index == position { text } else { "a" };
                let role = role.trim_end_matches('!');
                conversation.messages.push(Message::new(role, said));
            }
            let Ok(layout) = Layout::find(self, &conversation) else {
                continue;
            };
            if let Some(ids) = chunk_of(tokenizer, &layout, position)? {
                return Ok(ids);
            }
        }
        Err(Error::ChatTemplate(
            "no message can be cut out of its renderings at special tokens, so it cannot carry \
             chunks; use another template"
                .into(),
        ))
    }

    /// How many tokens stand first as BOS: 0 or 1.
    fn anchor_tokens(&self, tokenizer: &Tokenizer, text: &str, ids: &[u32]) -> usize {
        let Some(bos) = self.leading_bos().filter(|bos| text.starts_with(bos)) else {
            return 0;
        };
        let first = ids.first().copied();
        let is_bos = first.is_some_and(|id| tokenizer.is_special(id));
        usize::from(is_bos && first == tokenizer.token_to_id(bos))
    }
}

/// Where a chunk's message (`!`) may stand, the best place first: a system message behind others
/// has no preamble of the template's own (a date, a default) around it.
const CHUNK_PLACES: [&[&str]; 4] = [
    &["system", "user", "assistant", "system!", "user"],
    &["system!", "user"],
    &["user", "assistant", "user!", "assistant"],
    &["user!"],
];

/// The ids of one message of a rendering alone, or None where it cannot be cut out.
fn chunk_of(
    tokenizer: &Tokenizer,
    layout: &Layout,
    position: usize,
) -> Result<Option<Vec<u32>>, Error> {
    let (Some(start), Some(region)) = (layout.borders[position], &layout.regions[position]) else {
        return Ok(None);
    };
    let after = layout.borders.get(position + 1).copied();
    let Some(end) = after.unwrap_or(Some(layout.text.len())) else {
        return Ok(None);
    };
    let whole = tokenizer.encode_with_offsets(&layout.text)?;
    let cuttable = SpecialBorders::new(tokenizer, &whole);
    let closed = end == layout.text.len() || cuttable.token_at(end).is_some();
    if !closed || cuttable.token_at(start).is_none() {
        return Ok(None);
    }
    let text = &layout.text[start..end];
    let region = region.start - start..region.end - start;
    let alone = tokenizer.encode_with_offsets(text)?;
    let special = || {
        let tokens = alone.ids.iter().zip(&alone.offsets);
        tokens.filter(|(id, _)| tokenizer.is_special(**id))
    };
    let (open, close) = (region.start, region.end);
    if !special().any(|(_, offset)| offset.0 < close && offset.1 > open) {
        return Ok(Some(alone.ids));
    }
    // [0, literal.start)    wrapper, up to its last special token before the text
    // [.., literal.end)     the text and what touches it: no token is special here
    // [literal.end, len)    wrapper again
    let before = special().map(|(_, offset)| offset.1);
    let before = before.filter(|&end| end <= open).max().unwrap_or(0);
    let behind = special().map(|(_, offset)| offset.0);
    let behind = behind.filter(|&start| start >= close).min();
    let behind = behind.unwrap_or(text.len());
    let mut ids = tokenizer.encode_plain(&text[..before])?;
    ids.extend(tokenizer.encode_text(&text[before..behind])?);
    ids.extend(tokenizer.encode_plain(&text[behind..])?);
    Ok(Some(ids))
}

/// Where tokens may be parted: next to special ones.
struct SpecialBorders(HashMap<usize, usize>);

impl SpecialBorders {
    fn new(tokenizer: &Tokenizer, encoded: &EncodedText) -> Self {
        let mut tokens = HashMap::new();
        for (index, (&id, &(start, end))) in encoded.ids.iter().zip(&encoded.offsets).enumerate() {
            if tokenizer.is_special(id) {
                tokens.insert(start, index);
                tokens.insert(end, index + 1);
            }
        }
        Self(tokens)
    }

    /// The first token after a byte of the text.
    fn token_at(&self, offset: usize) -> Option<usize> {
        self.0.get(&offset).copied()
    }
}

/// Where the messages are in a rendering.
struct Layout {
    text: String,
    /// What became of each message's content, in bytes of the text.
    regions: Vec<Option<Range<usize>>>,
    /// Where each message begins, closing tokens of the one before excluded; one more, behind the
    /// last message, where a generation prompt follows.
    borders: Vec<Option<usize>>,
}

impl Layout {
    fn find(template: &ChatTemplate, conversation: &Conversation) -> Result<Self, Error> {
        let text = template.render(conversation)?;
        let marks = Marks::new(template, conversation, &text);
        let regions = marks.regions(&text);
        let mut layout = Self { text, regions, borders: Vec::new() };
        let count = conversation.messages.len() + usize::from(conversation.add_generation_prompt);
        let mut closings = Closings::default();
        let opening = Opening::new(template, conversation);
        for index in 0..count {
            let closed = marks.closed_before(index, &layout, &mut closings);
            let border = closed.or_else(|| opening.before(index, &layout, conversation));
            layout.borders.push(border);
        }
        Ok(layout)
    }
}

/// The same conversation with a mark in place of every message's text.
struct Marks<'a> {
    template: &'a ChatTemplate,
    conversation: &'a Conversation,
    prefix: String,
    /// As marked; a message without text is left as it is.
    messages: Vec<Option<Message>>,
    /// The rendering with all marks, if the template accepts it.
    rendering: Option<String>,
}

/// What follows the text of a message until it is closed, by its role.
type Closings = HashMap<String, Option<String>>;

impl<'a> Marks<'a> {
    fn new(template: &'a ChatTemplate, conversation: &'a Conversation, text: &str) -> Self {
        // A private-use character and a number that the text does not contain.
        let prefix = (0..)
            .map(|number| format!("\u{e000}{number}."))
            .find(|prefix| !text.contains(prefix.as_str()))
            .expect("a text is finite");
        let mut marks =
            Self { template, conversation, prefix, messages: Vec::new(), rendering: None };
        let messages = conversation.messages.iter().enumerate();
        let messages = messages.map(|(index, message)| marked(message, marks.mark(index)));
        marks.messages = messages.collect();
        marks.rendering = marks.render(conversation.messages.len(), true);
        marks
    }

    fn mark(&self, index: usize) -> String {
        format!("{}{index}\u{e001}", self.prefix)
    }

    /// The first `count` messages, marked.
    fn render(&self, count: usize, whole: bool) -> Option<String> {
        let original = &self.conversation.messages[..count];
        let messages = original.iter().zip(&self.messages);
        let conversation = Conversation {
            messages: messages
                .map(|(message, marked)| marked.as_ref().unwrap_or(message).clone())
                .collect(),
            add_generation_prompt: whole && self.conversation.add_generation_prompt,
            ..self.without_messages()
        };
        self.template.render(&conversation).ok()
    }

    fn without_messages(&self) -> Conversation {
        Conversation {
            messages: Vec::new(),
            tools: self.conversation.tools.clone(),
            add_generation_prompt: self.conversation.add_generation_prompt,
            extra: self.conversation.extra.clone(),
            date: self.conversation.date.clone(),
            marks: self.conversation.marks,
        }
    }

    /// What each message's text became. Almost always it stands there as it was written, between
    /// the same wrappers as the marks; a text that the template changed is looked for alone.
    fn regions(&self, text: &str) -> Vec<Option<Range<usize>>> {
        let gaps = self.gaps();
        // Where the gap before the next text starts, while it is known.
        let mut position = Some(0);
        let mut regions = Vec::with_capacity(self.messages.len());
        let mut gap = 0;
        for (index, marked) in self.messages.iter().enumerate() {
            if marked.is_none() {
                regions.push(None);
                continue;
            }
            let between = gaps.get(gap..).filter(|gaps| gaps.len() >= 2);
            gap += 1;
            let quick = position.zip(between).and_then(|(start, gaps)| {
                let content = &self.conversation.messages[index].content;
                find_text(text, start, gaps, content)
            });
            let region = quick.or_else(|| self.region_alone(index, text));
            position = region.as_ref().map(|region| region.end);
            regions.push(region);
        }
        regions
    }

    /// The text between the marks; empty if they don't come in order.
    fn gaps(&self) -> Vec<&str> {
        let Some(rendering) = &self.rendering else {
            return Vec::new();
        };
        let mut gaps = Vec::new();
        let mut start = 0;
        for index in (0..self.messages.len()).filter(|&index| self.messages[index].is_some()) {
            let mark = self.mark(index);
            let (Some(first), Some(last)) = (rendering.find(&mark), rendering.rfind(&mark)) else {
                return Vec::new();
            };
            if first < start {
                return Vec::new();
            }
            gaps.push(&rendering[start..first]);
            start = last + mark.len();
        }
        gaps.push(&rendering[start..]);
        gaps
    }

    /// Renders with this message alone marked: what stands before and behind the mark stands
    /// before and behind its text.
    fn region_alone(&self, index: usize, text: &str) -> Option<Range<usize>> {
        let mut conversation = self.conversation.clone();
        conversation.messages[index] = self.messages[index].clone()?;
        let rendering = self.template.render(&conversation).ok()?;
        let mark = self.mark(index);
        let before = &rendering[..rendering.find(&mark)?];
        let behind = &rendering[rendering.rfind(&mark)? + mark.len()..];
        let fits = text.starts_with(before)
            && text.ends_with(behind)
            && before.len() + behind.len() <= text.len();
        fits.then(|| before.len()..text.len() - behind.len())
    }

    /// The border before message `index`: the end of what the messages before it are when they
    /// are rendered without it.
    fn closed_before(
        &self,
        index: usize,
        layout: &Layout,
        closings: &mut Closings,
    ) -> Option<usize> {
        let base = (0..index).rev().find(|&i| self.messages[i].is_some())?;
        let start = layout.regions[base].as_ref()?.end;
        let message = &self.conversation.messages[base];
        let closing = if base + 1 == index && message.tool_calls.is_none() {
            let closing = || self.closing(base, index);
            let known = closings.entry(message.role.clone());
            known.or_insert_with(closing).clone()
        } else {
            self.closing(base, index)
        }?;
        layout.text[start..].starts_with(&closing).then_some(start + closing.len())
    }

    fn closing(&self, base: usize, index: usize) -> Option<String> {
        let rendering = self.render(index, false)?;
        let mark = self.mark(base);
        let end = rendering.rfind(&mark)? + mark.len();
        Some(rendering[end..].to_owned())
    }
}

/// What opens a user's message. Finds the border that no message closes: behind a header that the
/// template writes by itself, or behind a system message it won't render alone.
struct Opening(Option<String>);

impl Opening {
    fn new(template: &ChatTemplate, conversation: &Conversation) -> Self {
        let roles = ["user", "assistant", "user"];
        let probe = Conversation {
            messages: roles.map(|role| Message::new(role, "a")).to_vec(),
            date: conversation.date.clone(),
            ..Conversation::default()
        };
        let render = || {
            let text = template.render(&probe).ok()?;
            let marks = Marks::new(template, &probe, &text);
            let regions = marks.regions(&text);
            let layout = Layout { text, regions, borders: Vec::new() };
            let border = marks.closed_before(2, &layout, &mut Closings::new())?;
            let user = layout.regions[2].as_ref()?;
            let opening = layout.text.get(border..user.start)?;
            (!opening.is_empty()).then(|| opening.to_owned())
        };
        Self(render())
    }

    fn before(&self, index: usize, layout: &Layout, conversation: &Conversation) -> Option<usize> {
        let user = conversation.messages.get(index)?.role == "user";
        let opening = self.0.as_deref().filter(|_| user)?;
        let start = layout.regions[index].as_ref()?.start;
        let previous = layout.regions[..index].iter().flatten().last();
        let border = layout.text[..start].strip_suffix(opening)?.len();
        (previous.is_none_or(|region| region.end <= border)).then_some(border)
    }
}

/// A message with a mark for its text, or None where it has no text.
fn marked(message: &Message, mark: String) -> Option<Message> {
    let content = match &message.content {
        Content::Text(text) if !text.is_empty() => Content::Text(mark),
        Content::Parts(parts) => {
            let mut parts = parts.clone();
            let texts: Vec<&mut Value> =
                parts.iter_mut().filter_map(|part| part.get_mut("text")).collect();
            if texts.is_empty() {
                return None;
            }
            for text in texts {
                *text = Value::from(mark.as_str());
            }
            Content::Parts(parts)
        }
        _ => return None,
    };
    Some(Message { content, ..message.clone() })
}

/// Finds a message's text right behind the gap that starts at `start`, with the next gap behind
/// it, which is the end of the text if it is the last: as written, trimmed, or without thinking.
fn find_text(text: &str, start: usize, gaps: &[&str], content: &Content) -> Option<Range<usize>> {
    let Content::Text(written) = content else {
        return None;
    };
    let rest = text[start..].strip_prefix(gaps[0])?;
    let start = text.len() - rest.len();
    let answer = written.rsplit("</think>").next().unwrap_or(written);
    let spellings = [
        written.as_str(),
        written.trim(),
        written.trim_start(),
        written.trim_end(),
        answer.trim_start_matches('\n'),
        answer.trim(),
    ];
    spellings
        .iter()
        .find(|spelling| {
            let behind = rest.strip_prefix(**spelling);
            behind.is_some_and(|behind| match gaps.len() {
                2 => behind == gaps[1],
                _ => behind.starts_with(gaps[1]),
            })
        })
        .map(|spelling| start..start + spelling.len())
}

/// Whether the border before `message` parts two of the system messages that stand first.
fn inside_header(messages: &[Message], message: usize) -> bool {
    message > 0 && message < messages.len() && messages[..=message].iter().all(is_system)
}

fn kind_of(messages: &[Message], range: Range<usize>) -> SegmentKind {
    let count = messages.len();
    if range.is_empty() && range.start == count && count > 0 {
        SegmentKind::GenerationPrompt
    } else if range.is_empty() || (range.start == 0 && messages[range].iter().all(is_system)) {
        SegmentKind::Header
    } else {
        SegmentKind::Turn
    }
}

fn is_system(message: &Message) -> bool {
    matches!(message.role.as_str(), "system" | "developer")
}

#[cfg(test)]
mod tests;
