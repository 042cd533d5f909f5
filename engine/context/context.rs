//! An ordered set of chunks with flags, a reuse policy, and a conversation.
//!
//! Switching a chunk changes a flag and nothing else. What a prompt then costs follows from the
//! policy: which segments the engine finds in its pool is the engine's business.
//!
//! The order of a prompt: anchor, active chunks, header (system text), turns.

use strand_models::{ChatTemplate, Tokenizer};

use super::chunk::Chunk;
use super::conversation::{Conversation, Prompt};
use crate::ChunkId;
use crate::error::Error;
use crate::request::{Request, Segment};

/// What a chunk's KV depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReusePolicy {
    /// Every segment before it: classic prefix caching, the reference.
    #[default]
    Exact,
    /// The anchor and itself (block attention): for models trained so.
    Independent,
}

impl ReusePolicy {
    pub const ALL: [Self; 2] = [Self::Exact, Self::Independent];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Independent => "independent",
        }
    }

    /// A chunk's tokens as a segment that sees what the policy lets it see.
    pub fn segment(self, tokens: Vec<u32>) -> Segment {
        match self {
            Self::Exact => Segment::new(tokens),
            Self::Independent => Segment::independent(tokens),
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == text)
    }
}

/// A chunk in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub chunk: Chunk,
    pub active: bool,
}

/// Chunks, policy and conversation.
#[derive(Debug, Clone, Default)]
pub struct Context {
    entries: Vec<Entry>,
    pub policy: ReusePolicy,
    pub conversation: Conversation,
    /// Tokens that every prompt of the model's template starts with.
    anchor: Vec<u32>,
}

/// Whether `load` found the content there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loaded {
    New(usize),
    Already(usize),
}

/// Fewest digits that name a chunk.
const SHORTEST_PREFIX: usize = 4;

impl Context {
    pub fn new(policy: ReusePolicy, conversation: Conversation, anchor: Vec<u32>) -> Self {
        Self { entries: Vec::new(), policy, conversation, anchor }
    }

    /// The anchor of a template: what stands first in any conversation, if it is BOS.
    pub fn anchor_of(template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        let mut any = Conversation::default();
        any.push_user("a");
        let prompt = any.prompt(template, tokenizer, usize::MAX)?;
        let first = prompt.segments.into_iter().next().filter(|segment| segment.is_anchor);
        Ok(first.map_or(Vec::new(), |anchor| anchor.tokens))
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub fn anchor(&self) -> &[u32] {
        &self.anchor
    }

    /// Adds a chunk behind the others. Content that is there keeps its name and place.
    pub fn load(&mut self, chunk: Chunk, active: bool) -> Loaded {
        let there = self.entries.iter().position(|entry| entry.chunk.id == chunk.id);
        if let Some(index) = there {
            self.entries[index].active |= active;
            return Loaded::Already(index);
        }
        self.entries.push(Entry { chunk, active });
        Loaded::New(self.entries.len() - 1)
    }

    /// Finds a chunk by a prefix of its hash, its name, or `#n` counted from 1.
    pub fn find(&self, text: &str) -> Result<usize, Error> {
        let unknown = || Error::UnknownChunk { text: text.to_owned() };
        if let Some(number) = text.strip_prefix('#') {
            let number: usize = number.parse().map_err(|_| unknown())?;
            return number.checked_sub(1).filter(|&n| n < self.entries.len()).ok_or_else(unknown);
        }
        let named = self.entries.iter().position(|entry| entry.chunk.name == text);
        if let Some(index) = named {
            return Ok(index);
        }
        let prefix = text.to_ascii_lowercase();
        let is_prefix = prefix.len() >= SHORTEST_PREFIX;
        let matches: Vec<usize> = (0..self.entries.len())
            .filter(|&n| is_prefix && self.id(n).to_string().starts_with(&prefix))
            .collect();
        match matches[..] {
            [] => Err(unknown()),
            [one] => Ok(one),
            _ => Err(Error::AmbiguousChunk {
                text: text.to_owned(),
                matches: matches.iter().map(|&n| self.id(n).short()).collect(),
            }),
        }
    }

    fn id(&self, index: usize) -> ChunkId {
        self.entries[index].chunk.id
    }

    /// Flips the flag; nothing is encoded and nothing moves.
    pub fn set_active(&mut self, index: usize, active: bool) {
        self.entries[index].active = active;
    }

    /// Forgets a chunk.
    pub fn remove(&mut self, index: usize) -> Chunk {
        self.entries.remove(index).chunk
    }

    /// Forgets all chunks.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// Tokens of the active chunks.
    pub fn active_tokens(&self) -> usize {
        self.entries.iter().filter(|entry| entry.active).map(|entry| entry.chunk.ids.len()).sum()
    }

    /// First and last position of a chunk in the active layout; `None` while it is inactive.
    pub fn position(&self, index: usize) -> Option<(usize, usize)> {
        let entry = &self.entries[index];
        let before = self.entries[..index].iter().filter(|entry| entry.active);
        let first: usize =
            self.anchor.len() + before.map(|entry| entry.chunk.ids.len()).sum::<usize>();
        entry.active.then(|| (first, first + entry.chunk.ids.len() - 1))
    }

    /// The prompt for the next answer, in at most `room` tokens. Turns may be dropped, chunks
    /// never are.
    pub fn prompt(
        &self,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
        room: usize,
    ) -> Result<Prompt, Error> {
        let chunks = self.active_tokens();
        if chunks >= room {
            return Err(Error::ChunksTooLong { chunks, room });
        }
        let mut prompt = self.conversation.prompt(template, tokenizer, room - chunks)?;
        let anchors = usize::from(prompt.segments.first().is_some_and(|first| first.is_anchor));
        let active = self.entries.iter().filter(|entry| entry.active);
        let segments = active.map(|entry| self.segment(&entry.chunk));
        prompt.segments.splice(anchors..anchors, segments);
        Ok(prompt)
    }

    fn segment(&self, chunk: &Chunk) -> Segment {
        Segment { chunk: Some(chunk.id), ..self.policy.segment(chunk.ids.clone()) }
    }

    /// What stands before a chunk's end in a prompt that encodes it now: the anchor, the active
    /// chunks before it, the chunk.
    pub fn segments_to(&self, index: usize) -> Vec<Segment> {
        let mut segments = Vec::new();
        if !self.anchor.is_empty() {
            segments.push(Segment::anchor(self.anchor.clone()));
        }
        if self.policy == ReusePolicy::Exact {
            let before = self.entries[..index].iter().filter(|entry| entry.active);
            segments.extend(before.map(|entry| self.segment(&entry.chunk)));
        }
        segments.push(self.segment(&self.entries[index].chunk));
        segments
    }

    /// A request that leaves a chunk's KV in the pool. One row is computed behind the chunk, so
    /// that its last block is complete too.
    pub fn encode(&self, index: usize) -> Request {
        let mut segments = self.segments_to(index);
        let last = *segments.last().and_then(|chunk| chunk.tokens.last()).expect("not empty");
        segments.push(Segment::new(vec![last]));
        let mut request = Request::new(Vec::new());
        request.prompt = segments;
        request.limits.max_tokens = Some(1);
        request
    }
}

#[cfg(test)]
mod tests {
    use super::super::chunk::ChunkKind;
    use super::*;

    fn chunk(name: &str, tokens: usize) -> Chunk {
        Chunk {
            id: ChunkId::of(name.as_bytes()),
            name: name.into(),
            kind: ChunkKind::File,
            text: name.into(),
            ids: vec![7; tokens],
        }
    }

    fn context() -> Context {
        let mut context = Context::new(ReusePolicy::Exact, Conversation::default(), vec![1]);
        context.load(chunk("a", 10), true);
        context.load(chunk("b", 5), true);
        context.load(chunk("c", 3), true);
        context
    }

    #[test]
    fn positions_close_up_when_a_chunk_is_switched_off() {
        let mut context = context();
        let positions = |context: &Context| [0, 1, 2].map(|n| context.position(n));
        assert_eq!(positions(&context), [Some((1, 10)), Some((11, 15)), Some((16, 18))]);
        context.set_active(1, false);
        assert_eq!(positions(&context), [Some((1, 10)), None, Some((11, 13))]);
        assert_eq!(context.active_tokens(), 13);
    }

    #[test]
    fn the_same_content_is_one_chunk_and_keeps_its_name() {
        let mut context = context();
        context.set_active(1, false);
        let again = Chunk { name: "other".into(), ..chunk("b", 5) };
        assert_eq!(context.load(again, true), Loaded::Already(1));
        assert_eq!(context.entries()[1].chunk.name, "b");
        assert!(context.entries()[1].active);
    }

    #[test]
    fn a_chunk_is_named_by_prefix_name_or_number() {
        let context = context();
        let hash = ChunkId::of(b"b").to_string();
        for text in ["b", "#2", &hash, &hash[..4], &hash.to_uppercase()] {
            assert_eq!(context.find(text).ok(), Some(1), "{text}");
        }
        for text in ["#0", "#4", "#x", "nothing", &hash[..3]] {
            let error = context.find(text).expect_err("there is no such chunk");
            assert_eq!(error.to_string(), format!("No chunk found matching: {text}"));
        }
    }

    #[test]
    fn encoding_under_exact_stands_behind_the_active_chunks_before_it() {
        let mut context = context();
        context.set_active(0, false);
        let lens = |context: &Context| -> Vec<usize> {
            context.segments_to(2).iter().map(|segment| segment.tokens.len()).collect()
        };
        assert_eq!(lens(&context), [1, 5, 3]);
        context.policy = ReusePolicy::Independent;
        assert_eq!(lens(&context), [1, 3]);
    }
}
