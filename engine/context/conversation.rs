//! A conversation, and the prompt that asks for its next answer.
//!
//! The template renders the whole conversation; its segments' ids are the prompt. Where an
//! answer was generated here, its own ids are kept instead of those its text would get now, so
//! that its KV is found again. When the room is too small the oldest exchanges are left out, as
//! few as possible, never the system text nor the last message.
//!
//! Pure: knows a tokenizer and a template, no engine, no clock and no storage.

use serde_json::Value;
use strand_models::{
    ChatTemplate, Conversation as Messages, Marks, Message, SegmentKind, TemplateSegment, Tokenizer,
};

use crate::ChunkId;
use crate::error::Error;
use crate::request::Segment;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    User,
    Assistant,
    /// What a function that was called has answered.
    Tool,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::User, Self::Assistant, Self::Tool];

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == text)
    }

    /// As templates spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message of the conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    pub role: Role,
    /// Calls of functions too are text, as the model spells them.
    pub text: String,
    /// Of an answer made here: what opened it and what was generated.
    pub ids: Vec<u32>,
    /// Under `mask`, the chunks that were active when it was said; `None`: those active now.
    pub seen: Option<Vec<ChunkId>>,
}

/// System text and turns.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    system: Option<String>,
    /// Functions that may be called now, for a template that speaks of them; not kept.
    pub tools: Option<Value>,
    turns: Vec<Turn>,
    /// What a template that asks for the date is told.
    date: Option<String>,
    /// Special tokens' names in what is said stay text.
    is_literal: bool,
}

/// What to send to the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    pub segments: Vec<Segment>,
    /// The tokens that open the answer, the last of the prompt.
    pub opening: Vec<u32>,
    pub dropped: Dropped,
}

/// The oldest turns, left out of a prompt because the room is too small.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    pub turns: usize,
    pub tokens: usize,
}

impl Prompt {
    /// Tokens that the answer sees.
    pub fn tokens(&self) -> usize {
        self.segments.iter().map(Segment::num_shown).sum()
    }
}

/// A conversation cut into its segments, and what of it was left out.
pub(super) struct Rendered {
    pub segments: Vec<TemplateSegment>,
    pub dropped: Dropped,
}

impl Rendered {
    /// The last message that each segment holds, as an index into all turns: the first for what
    /// stands before them, one past them for what opens the answer.
    pub fn turns_of<'a>(&'a self, talk: &'a Conversation) -> impl Iterator<Item = usize> + 'a {
        let first = usize::from(talk.system.is_some());
        self.segments.iter().map(move |segment| match segment.kind {
            SegmentKind::Anchor | SegmentKind::Header => 0,
            SegmentKind::Turn => self.dropped.turns + segment.messages.end - 1 - first,
            SegmentKind::GenerationPrompt => talk.turns.len(),
        })
    }

    /// The tokens that open the answer.
    pub fn opening(&self) -> Vec<u32> {
        let last = self.segments.last();
        let last = last.filter(|last| last.kind == SegmentKind::GenerationPrompt);
        last.map_or(Vec::new(), |last| last.ids.clone())
    }
}

impl Conversation {
    /// `date` is `YYYY-MM-DD`, for templates that print one.
    pub fn new(date: Option<String>) -> Self {
        Self { date, ..Self::default() }
    }

    /// The same with people who are not to be trusted: what they say closes no message and opens
    /// none, whatever special tokens it names.
    pub fn of_strangers(date: Option<String>) -> Self {
        Self { is_literal: true, ..Self::new(date) }
    }

    /// Holds for the whole conversation, what was said before included.
    pub fn set_system(&mut self, text: Option<String>) {
        self.system = text;
    }

    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    pub fn turns(&self) -> &[Turn] {
        &self.turns
    }

    pub fn push_user(&mut self, text: impl Into<String>) {
        self.push(Turn { role: Role::User, text: text.into(), ids: Vec::new(), seen: None });
    }

    /// Adds the answer to [`Prompt`]: what opened it, its ids, its text. It saw what its question
    /// saw.
    pub fn push_answer(&mut self, opening: &[u32], ids: &[u32], text: impl Into<String>) {
        let (text, ids) = (text.into(), [opening, ids].concat());
        let seen = self.turns.last().and_then(|question| question.seen.clone());
        self.turns.push(Turn { role: Role::Assistant, text, ids, seen });
    }

    /// Adds a turn as it was.
    pub fn push(&mut self, turn: Turn) {
        self.turns.push(turn);
    }

    /// Takes the last turn back.
    pub fn pop(&mut self) -> Option<Turn> {
        self.turns.pop()
    }

    /// Forgets the turns; the system text stays.
    pub fn clear(&mut self) {
        self.turns.clear();
    }

    pub(super) fn turns_mut(&mut self) -> &mut [Turn] {
        &mut self.turns
    }

    /// The prompt for the next answer, in at most `room` tokens.
    pub fn prompt(
        &self,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
        room: usize,
    ) -> Result<Prompt, Error> {
        let rendered = self.render(template, tokenizer, 0, room)?;
        let (opening, dropped) = (rendered.opening(), rendered.dropped);
        let segments = rendered.segments.into_iter().map(into_segment).collect();
        Ok(Prompt { segments, opening, dropped })
    }

    /// The newest turns that fit, with `chunks` tokens beside them, into `room`.
    pub(super) fn render(
        &self,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
        chunks: usize,
        room: usize,
    ) -> Result<Rendered, Error> {
        let (mut turns, mut whole) = (0, None);
        loop {
            let rest = &self.turns[turns..];
            let segments = self.segments(rest, template, tokenizer)?;
            let tokens: usize = segments.iter().map(|segment| segment.ids.len()).sum();
            // a template may write more where less was said: nothing is dropped then
            let tokens_dropped = whole.get_or_insert(tokens).saturating_sub(tokens);
            let dropped = Dropped { turns, tokens: tokens_dropped };
            let Some(excess) = (chunks + tokens).checked_sub(room).filter(|&excess| excess > 0)
            else {
                return Ok(Rendered { segments, dropped });
            };
            let sizes = turn_sizes(&segments, rest, usize::from(self.system.is_some()));
            let Some(more) = oldest_to_drop(&sizes, excess) else {
                let last = sizes.iter().rposition(|turn| turn.0 == Role::User).unwrap_or(0);
                let message: usize = sizes[last..].iter().map(|turn| turn.1).sum();
                let header = tokens - sizes.iter().map(|turn| turn.1).sum::<usize>();
                return Err(Error::ContextTooLong { chunks, header, message, room });
            };
            turns += more;
        }
    }

    /// Marks that nobody has said.
    fn marks(&self, turns: &[Turn]) -> Marks {
        let said = turns.iter().map(|turn| &turn.text).chain(&self.system);
        let said: Vec<Value> = said.map(|text| Value::String(text.clone())).collect();
        Marks::absent_from(&said.iter().chain(&self.tools).collect::<Vec<_>>())
    }

    fn segments(
        &self,
        turns: &[Turn],
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<TemplateSegment>, Error> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        let said = turns.iter().map(|turn| Message::new(turn.role.as_str(), &turn.text));
        let mut messages = Messages {
            messages: system.chain(said).collect(),
            tools: self.tools.clone(),
            add_generation_prompt: true,
            date: self.date.clone(),
            ..Messages::default()
        };
        if self.is_literal {
            messages.keep_text(self.marks(turns), tokenizer);
        }
        let mut segments = template.segments(tokenizer, &messages)?;
        let first = usize::from(self.system.is_some());
        for segment in &mut segments {
            let one = segment.messages.len() == 1 && segment.messages.start >= first;
            if segment.kind == SegmentKind::Turn && one {
                let turn = &turns[segment.messages.start - first];
                let bytes_of = |id| tokenizer.token_bytes(id);
                if let Some(ids) = with_generated(&segment.ids, &turn.ids, bytes_of) {
                    segment.ids = ids;
                }
            }
        }
        Ok(segments)
    }
}

pub(super) fn into_segment(segment: TemplateSegment) -> Segment {
    match segment.kind {
        SegmentKind::Anchor => Segment::anchor(segment.ids),
        _ => Segment::new(segment.ids),
    }
}

/// Tokens of each turn; those of a segment that holds several count for its first.
fn turn_sizes(
    segments: &[TemplateSegment],
    turns: &[Turn],
    first_turn: usize,
) -> Vec<(Role, usize)> {
    let mut sizes: Vec<(Role, usize)> = turns.iter().map(|turn| (turn.role, 0)).collect();
    for segment in segments.iter().filter(|segment| segment.kind == SegmentKind::Turn) {
        if let Some(turn) = sizes.get_mut(segment.messages.start.saturating_sub(first_turn)) {
            turn.1 += segment.ids.len();
        }
    }
    sizes
}

/// The fewest turns whose leaving frees `excess` tokens and lets a user begin; `None` if the last
/// message would have to go too.
fn oldest_to_drop(turns: &[(Role, usize)], excess: usize) -> Option<usize> {
    let mut freed = 0;
    for (index, &(role, tokens)) in turns.iter().enumerate() {
        if index > 0 && role == Role::User && freed >= excess {
            return Some(index);
        }
        freed += tokens;
    }
    None
}

/// The rendered ids with the `generated` ones in place of those that spell the same bytes; `None`
/// where the rendering doesn't begin with these bytes or has no token border behind them.
fn with_generated(
    rendered: &[u32],
    generated: &[u32],
    bytes_of: impl Fn(u32) -> Option<Vec<u8>>,
) -> Option<Vec<u32>> {
    let mut left: Vec<u8> = Vec::new();
    for &id in generated {
        left.extend(bytes_of(id)?);
    }
    let mut left = left.as_slice();
    let mut covered = 0;
    while !left.is_empty() {
        left = left.strip_prefix(bytes_of(*rendered.get(covered)?)?.as_slice())?;
        covered += 1;
    }
    Some([generated, &rendered[covered..]].concat())
}

#[cfg(test)]
mod tests {
    use strand_models::{ModelFiles, ModelSource};

    use super::*;

    const USER: Role = Role::User;
    const ASSISTANT: Role = Role::Assistant;

    #[test]
    fn the_fewest_oldest_exchanges_are_dropped() {
        let turns = [(USER, 10), (ASSISTANT, 20), (USER, 5), (ASSISTANT, 5), (USER, 8)];
        assert_eq!(oldest_to_drop(&turns, 1), Some(2));
        assert_eq!(oldest_to_drop(&turns, 30), Some(2));
        assert_eq!(oldest_to_drop(&turns, 31), Some(4));
        assert_eq!(oldest_to_drop(&turns, 40), Some(4));
        assert_eq!(oldest_to_drop(&turns, 41), None);
        assert_eq!(oldest_to_drop(&[(USER, 10)], 1), None);
        assert_eq!(oldest_to_drop(&[], 1), None);
    }

    /// One byte a token, and 100 + n for n times `a`.
    fn bytes_of(id: u32) -> Option<Vec<u8>> {
        Some(match id {
            100.. => vec![b'a'; id as usize - 100],
            _ => vec![id as u8],
        })
    }

    #[test]
    fn generated_ids_stand_for_the_text_they_spell() {
        // rendered: < aaa > newline; generated: < a aa >
        let rendered = [60, 103, 62, 10];
        let kept = with_generated(&rendered, &[60, 101, 102, 62], bytes_of);
        assert_eq!(kept, Some(vec![60, 101, 102, 62, 10]));
        // nothing generated changes nothing
        assert_eq!(with_generated(&rendered, &[], bytes_of), Some(rendered.to_vec()));
    }

    #[test]
    fn ids_that_spell_something_else_are_not_kept() {
        let rendered = [60, 103, 62, 10];
        assert_eq!(with_generated(&rendered, &[60, 104, 62], bytes_of), None);
        assert_eq!(with_generated(&rendered, &[60, 101], bytes_of), None, "no border there");
        assert_eq!(with_generated(&rendered, &[60, 103, 62, 10, 10], bytes_of), None);
        assert_eq!(with_generated(&rendered, &[60, 7], |id| (id != 7).then(|| vec![60])), None);
    }

    /// The bundled model's template and tokenizer.
    fn demo() -> (ChatTemplate, Tokenizer) {
        let files = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
        (files.chat_template.expect("it has one"), files.tokenizer.expect("it has one"))
    }

    fn talk(turns: usize) -> Conversation {
        let mut talk = Conversation::default();
        talk.set_system(Some("Be brief.".to_owned()));
        for turn in 0..turns {
            talk.push_user(format!("This is question {turn}?"));
            talk.push_answer(&[], &[], format!("This is answer {turn}."));
        }
        talk.push_user("And now?");
        talk
    }

    #[test]
    fn a_prompt_is_the_rendering_cut_at_its_messages() {
        let (template, tokenizer) = demo();
        let prompt = talk(1).prompt(&template, &tokenizer, usize::MAX).unwrap();
        let texts: Vec<String> = prompt
            .segments
            .iter()
            .map(|segment| segment.tokens.iter().map(|&id| tokenizer.token_text(id).unwrap()))
            .map(Iterator::collect)
            .collect();
        let expected = [
            "<|im_start|>system\nBe brief.<|im_end|>\n",
            "<|im_start|>user\nThis is question 0?<|im_end|>\n",
            "<|im_start|>assistant\nThis is answer 0.<|im_end|>\n",
            "<|im_start|>user\nAnd now?<|im_end|>\n",
            "<|im_start|>assistant\n",
        ];
        assert_eq!(texts, expected);
        assert_eq!(prompt.opening, prompt.segments[4].tokens);
        assert_eq!(prompt.dropped, Dropped::default());
    }

    #[test]
    fn a_smaller_room_holds_fewer_turns_and_always_the_last() {
        let (template, tokenizer) = demo();
        let (talk, alone) = (talk(5), talk(0));
        let all = talk.prompt(&template, &tokenizer, usize::MAX).unwrap().tokens();
        let least = alone.prompt(&template, &tokenizer, usize::MAX).unwrap();
        let mut dropped = 0;
        for room in (least.tokens()..=all).rev() {
            let prompt = talk.prompt(&template, &tokenizer, room).unwrap();
            assert!(prompt.tokens() <= room);
            let Dropped { turns, tokens } = prompt.dropped;
            assert!(turns >= dropped && turns.is_multiple_of(2));
            assert_eq!(tokens + prompt.tokens(), all);
            dropped = turns;
        }
        assert_eq!(dropped, 10);
        assert_eq!(
            talk.prompt(&template, &tokenizer, least.tokens()).unwrap().segments,
            least.segments
        );
        let error = talk.prompt(&template, &tokenizer, least.tokens() - 1).unwrap_err();
        let Error::ContextTooLong { chunks, header, message, room } = error else {
            panic!("{error}")
        };
        assert_eq!((header + message, room), (least.tokens(), least.tokens() - 1));
        assert_eq!(chunks, 0);
    }

    #[test]
    fn an_answer_keeps_the_ids_it_was_generated_with() {
        let (template, tokenizer) = demo();
        let mut talk = talk(0);
        let before = talk.prompt(&template, &tokenizer, usize::MAX).unwrap();
        // letter by letter, as no tokenizer would cut it
        let id = |text: &str| tokenizer.token_to_id(text).expect("it is a token");
        let spelt = [id("O"), id("k"), id("."), id("<|im_end|>")];
        talk.push_answer(&before.opening, &spelt, "Ok.");
        talk.push_user("Why?");
        let after = talk.prompt(&template, &tokenizer, usize::MAX).unwrap();
        let turns = before.segments.len() - 1;
        assert_eq!(after.segments[..turns], before.segments[..turns]);
        let answer = &after.segments[turns].tokens;
        assert!(answer.starts_with(&[&before.opening[..], &spelt[..]].concat()), "{answer:?}");
    }
}
