//! An ordered set of chunks with flags, a reuse policy, and a conversation.
//!
//! Switching a chunk changes a flag and nothing else. What a prompt then costs follows from the
//! policy: which segments the engine finds in its pool is the engine's business.
//!
//! The order of a prompt: anchor, active chunks, header (system text), turns.

use std::sync::Arc;

use strand_models::{ChatTemplate, Tokenizer};

use super::chunk::Chunk;
use super::conversation::{Conversation, Prompt, Role, Turn};
use super::policy::{DEFAULT_BLEND_TOKENS, ReusePolicy};
use crate::ChunkId;
use crate::error::Error;

/// A chunk in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Shared by all contexts that have it.
    pub chunk: Arc<Chunk>,
    pub active: bool,
    /// Under `mask`, the chunks that were active when it was loaded; `None`: those active now.
    pub seen: Option<Vec<ChunkId>>,
}

/// Chunks, policy and conversation.
#[derive(Debug, Clone)]
pub struct Context {
    entries: Vec<Entry>,
    policy: ReusePolicy,
    /// Under `blend`, so many rows of a chunk are computed again.
    pub blend_tokens: usize,
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
        let blend_tokens = DEFAULT_BLEND_TOKENS;
        Self { entries: Vec::new(), policy, blend_tokens, conversation, anchor }
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

    pub fn policy(&self) -> ReusePolicy {
        self.policy
    }

    /// Chooses what KV depends on. Under `mask`, all that is there has seen what is active now.
    pub fn set_policy(&mut self, policy: ReusePolicy) {
        self.policy = policy;
        let seen = (policy == ReusePolicy::Mask).then(|| self.active_ids());
        self.entries.iter_mut().for_each(|entry| entry.seen = seen.clone());
        self.conversation.turns_mut().iter_mut().for_each(|turn| turn.seen = seen.clone());
    }

    /// The active chunks, in order.
    pub(super) fn active_ids(&self) -> Vec<ChunkId> {
        let active = self.entries.iter().filter(|entry| entry.active);
        active.map(|entry| entry.chunk.id).collect()
    }

    /// Adds a chunk behind the others. Content that is there keeps its name and place.
    pub fn load(&mut self, chunk: impl Into<Arc<Chunk>>, active: bool) -> Loaded {
        let chunk = chunk.into();
        let there = self.entries.iter().position(|entry| entry.chunk.id == chunk.id);
        if let Some(index) = there {
            self.entries[index].active |= active;
            return Loaded::Already(index);
        }
        let seen = (self.policy == ReusePolicy::Mask).then(|| self.active_ids());
        self.push(Entry { chunk, active, seen });
        Loaded::New(self.entries.len() - 1)
    }

    /// Adds a chunk, which is not there yet, as it was.
    pub fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// The user says something, with the chunks that are active now in view.
    pub fn say(&mut self, text: impl Into<String>) {
        self.say_as(Role::User, text.into());
    }

    /// The same for what a function answers.
    pub fn say_as(&mut self, role: Role, text: String) {
        let seen = (self.policy == ReusePolicy::Mask).then(|| self.active_ids());
        self.conversation.push(Turn { role, text, ids: Vec::new(), seen });
    }

    /// Finds a chunk by a prefix of its hash, its name, or `#n` counted from 1.
    pub fn find(&self, text: &str) -> Result<usize, Error> {
        let unknown = || Error::UnknownChunk { text: text.to_owned() };
        if let Some(number) = text.strip_prefix('#') {
            let number: usize = number.parse().map_err(|_| unknown())?;
            return number.checked_sub(1).filter(|&n| n < self.entries.len()).ok_or_else(unknown);
        }
        let all = 0..self.entries.len();
        let mut matches: Vec<usize> =
            all.clone().filter(|&n| self.entries[n].chunk.name == text).collect();
        let digits = text.as_bytes();
        if matches.is_empty() && digits.len() >= SHORTEST_PREFIX {
            matches = all.filter(|&n| self.id(n).starts_with(digits)).collect();
        }
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

    /// Puts a chunk before the one at `to`, counted without itself, or behind all.
    pub fn reorder(&mut self, index: usize, to: usize) {
        let entry = self.entries.remove(index);
        self.entries.insert(to.min(self.entries.len()), entry);
    }

    /// Forgets a chunk, and that anything saw it.
    pub fn remove(&mut self, index: usize) -> Arc<Chunk> {
        let chunk = self.entries.remove(index).chunk;
        for seen in self.all_seen() {
            seen.retain(|&other| other != chunk.id);
        }
        chunk
    }

    /// Forgets all chunks.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.all_seen().for_each(Vec::clear);
    }

    fn all_seen(&mut self) -> impl Iterator<Item = &mut Vec<ChunkId>> {
        let of_chunks = self.entries.iter_mut().filter_map(|entry| entry.seen.as_mut());
        let turns = self.conversation.turns_mut().iter_mut();
        of_chunks.chain(turns.filter_map(|turn| turn.seen.as_mut()))
    }

    /// Tokens of the active chunks.
    pub fn active_tokens(&self) -> usize {
        self.entries.iter().filter(|entry| entry.active).map(|entry| entry.chunk.ids.len()).sum()
    }

    /// First and last position of each chunk in the active layout; `None` while it is inactive.
    pub fn positions(&self) -> Vec<Option<(usize, usize)>> {
        let mut next = self.anchor.len();
        let mut place = |entry: &Entry| {
            let first = next;
            entry.active.then(|| {
                next += entry.chunk.ids.len();
                (first, next - 1)
            })
        };
        self.entries.iter().map(&mut place).collect()
    }

    /// Tokens of the anchor, the active chunks, the system text and the turns.
    pub fn used_tokens(
        &self,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
    ) -> Result<usize, Error> {
        if self.conversation.turns().is_empty() && self.conversation.system().is_none() {
            return Ok(self.anchor.len() + self.active_tokens());
        }
        let prompt = self.prompt(template, tokenizer, usize::MAX)?;
        Ok(prompt.tokens() - prompt.opening.len())
    }

    /// The prompt for the next answer, in at most `room` tokens: active chunks, system text and
    /// the newest turns. The oldest ones are left out where they don't fit, chunks never are.
    pub fn prompt(
        &self,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
        room: usize,
    ) -> Result<Prompt, Error> {
        let chunks = self.active_tokens();
        let rendered = self.conversation.render(template, tokenizer, chunks, room)?;
        let (opening, dropped) = (rendered.opening(), rendered.dropped);
        Ok(Prompt { segments: self.place(rendered), opening, dropped })
    }
}

#[cfg(test)]
mod tests {
    use strand_models::{ModelFiles, ModelSource};

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
        assert_eq!(context.positions(), [Some((1, 10)), Some((11, 15)), Some((16, 18))]);
        context.set_active(1, false);
        assert_eq!(context.positions(), [Some((1, 10)), None, Some((11, 13))]);
        assert_eq!(context.active_tokens(), 13);
    }

    #[test]
    fn a_chunk_is_put_elsewhere() {
        let mut context = context();
        let mut names = |index, to| {
            context.reorder(index, to);
            let names = context.entries().iter().map(|entry| entry.chunk.name.clone());
            names.collect::<String>()
        };
        assert_eq!([names(0, 1), names(2, 0), names(0, 9)], ["bac", "cba", "bac"]);
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
    fn a_name_that_two_chunks_have_names_neither() {
        let mut context = context();
        let twin = Chunk { name: "b".into(), ..chunk("d", 4) };
        context.load(twin, true);
        let Err(Error::AmbiguousChunk { text, matches }) = context.find("b") else {
            panic!("there are two")
        };
        let ids = [b"b", b"d"].map(|content| ChunkId::of(content).short());
        assert_eq!((text.as_str(), matches), ("b", ids.to_vec()));
    }

    #[test]
    fn what_does_not_fit_beside_the_chunks_is_told_with_all_sizes() {
        let files = ModelFiles::open(&ModelSource::Demo).expect("it is part of the program");
        let template = files.chat_template.expect("it has one");
        let tokenizer = files.tokenizer.expect("it has one");
        let mut context = Context::new(ReusePolicy::Exact, Conversation::default(), Vec::new());
        context.load(chunk("a", 100), true);
        context.load(chunk("b", 50), false);
        context.conversation.set_system(Some("Be brief.".into()));
        for text in ["One?", "Two?", "Three?"] {
            context.say(text);
            context.conversation.push_answer(&[], &[], "Yes.");
        }
        context.say("Four?");
        let prompt = |room| context.prompt(&template, &tokenizer, room);
        let all = prompt(usize::MAX).expect("it fits").tokens();
        let fewer = prompt(all - 1).expect("turns go first");
        assert_eq!(fewer.dropped.turns, 2);
        assert_eq!(fewer.dropped.tokens + fewer.tokens(), all);
        assert_eq!(fewer.segments[0].tokens.len(), 100, "chunks stay");
        for room in [0, 99, 100, 110] {
            let Err(Error::ContextTooLong { chunks, header, message, room: told }) = prompt(room)
            else {
                panic!("nothing fits into {room}")
            };
            assert_eq!((chunks, told), (100, room));
            let least = prompt(chunks + header + message).expect("that is what is needed");
            assert_eq!((least.dropped.turns, least.tokens()), (6, chunks + header + message));
            assert!(prompt(chunks + header + message - 1).is_err());
        }
    }
}
