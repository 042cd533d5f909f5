//! One choice of one request on its way through the engine.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use strand_layers::sampler::SamplingParams;

use crate::cache::{
    BlockHash, BlockId, ChunkId, KvId, KvIdentity, KvRoot, KvSegment, KvVariant, Layout, Sees,
};
use crate::request::{Exactness, Request, Reuse, Segment};
use crate::tenant::tenant_of;

/// Names a sequence for its whole life; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Names a request for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Tokens of a choice and how far their KV is.
///
/// Blocks found in the cache may lie anywhere: a chunk is found although the one before it is
/// new. What is left is a list of ranges, computed in order.
///
/// ```text
/// tokens    [0 ............................. len)
/// cached    [0, 32)          [48, 80)
/// todo              [32, 48)          [80, len)
/// ```
#[derive(Debug)]
pub struct Sequence {
    pub id: SequenceId,
    pub choice: u32,
    pub priority: i32,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    pub layout: Layout,
    /// One entry a block of the layout; absent until its rows are cached or scheduled.
    pub table: Vec<Option<BlockId>>,
    /// Ranges of tokens whose KV is to be computed; not empty while the sequence lives.
    pub todo: VecDeque<Range<usize>>,
    /// Where the prompt's tokens came from when it was first admitted; `None` before that.
    pub reuse: Option<Reuse>,
    /// KV that is being fetched for it: it waits for these, and for nobody else's.
    pub loading: HashSet<KvId>,
    /// KV that was fetched from the disk for it.
    pub fetched: HashSet<KvId>,
    /// Of that, what is leased in the host for its life.
    pub leased: HashSet<KvId>,
    /// How many of the prompt's rows have been reported on: by the log-probabilities of their
    /// successors, or by their hidden states.
    pub reported: usize,
    /// Chunks erased while it lives: their blocks are not to be found again.
    pub erased: Vec<ChunkId>,
    pub sampling: Arc<SamplingParams>,
    pub rules: Arc<Rules>,
    /// Names of the complete blocks so far, in order.
    pub hashes: Vec<BlockHash>,
    root: BlockHash,
    /// Of its request.
    pub salt: Arc<[u8]>,
    /// By segment, those whose KV other tiers may hold.
    pub kv: Vec<Option<Arc<KvSegment>>>,
}

/// What the names of a request's KV start from.
#[derive(Debug, Clone)]
pub struct Roots {
    blocks: BlockHash,
    identity: Arc<KvIdentity>,
    lossless: KvRoot,
    int8: KvRoot,
}

impl Roots {
    /// `base` is what holds for every request; anchor and salt are the request's own.
    pub fn new(base: &KvIdentity, asked: &Request) -> Self {
        let anchor = asked.prompt.first().filter(|first| first.is_anchor);
        let anchor = anchor.map_or(Vec::new(), |anchor| anchor.tokens.clone());
        let salt = asked.salt.as_bytes().to_vec();
        let blocks = BlockHash::root(&salt);
        let identity = Arc::new(KvIdentity { anchor, salt, ..base.clone() });
        let [lossless, int8] =
            [KvVariant::Lossless, KvVariant::Int8].map(|variant| identity.root(variant));
        Self { blocks, identity, lossless, int8 }
    }
}

/// What a request's limits mean for this model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules {
    /// Sequences end at this many tokens of output.
    pub max_tokens: usize,
    pub min_tokens: usize,
    /// Tokens that end a choice, the model's own included unless ignored.
    pub stop_token_ids: Vec<u32>,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    pub embed: bool,
}

impl Sequence {
    pub fn new(
        id: SequenceId,
        choice: u32,
        asked: &Request,
        rules: &Arc<Rules>,
        roots: &Roots,
        block_size: usize,
    ) -> Self {
        let tokens: Vec<u32> =
            asked.prompt.iter().flat_map(|segment| segment.tokens.iter().copied()).collect();
        let mut sequence = Self {
            id,
            choice,
            priority: asked.priority,
            prompt_len: tokens.len(),
            tokens,
            layout: Layout::new(block_size, asked.prompt.iter().map(Segment::layout)),
            table: Vec::new(),
            todo: VecDeque::new(),
            reuse: None,
            loading: HashSet::new(),
            fetched: HashSet::new(),
            leased: HashSet::new(),
            reported: 0,
            erased: Vec::new(),
            sampling: Arc::new(asked.sampling.clone()),
            rules: rules.clone(),
            hashes: Vec::new(),
            root: roots.blocks,
            salt: roots.identity.salt.as_slice().into(),
            kv: Vec::new(),
        };
        sequence.take_table();
        sequence.kv = sequence.name_segments(roots);
        sequence
    }

    #[expect(clippy::len_without_is_empty, reason = "a sequence is never empty")]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn output(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// Who goes first: lower priority values, then earlier arrival.
    pub fn rank(&self) -> (i32, SequenceId) {
        (self.priority, self.id)
    }

    /// Whose it is.
    pub fn tenant(&self) -> &str {
        tenant_of(std::str::from_utf8(&self.salt).expect("a request's salt is text"))
    }

    /// How many tokens are to be computed.
    pub fn num_todo(&self) -> usize {
        self.todo.iter().map(Range::len).sum()
    }

    /// True when the whole prompt has been computed.
    pub fn has_prompt(&self) -> bool {
        self.todo.front().is_none_or(|range| range.start >= self.prompt_len)
    }

    /// The next `count` tokens to compute, as runs whose rows see the same segments.
    pub fn next_runs(&self, mut count: usize) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        for range in &self.todo {
            let mut left = range.start..range.end.min(range.start + count);
            count -= left.len();
            while !left.is_empty() {
                let run = self.layout.cut(left.clone());
                left.start = run.end;
                runs.push(run);
            }
        }
        runs
    }

    /// Books the next `count` tokens as computed.
    pub fn advance(&mut self, mut count: usize) {
        while count > 0 {
            let next = self.todo.front_mut().expect("no more computed than there is");
            let step = count.min(next.len());
            next.start += step;
            count -= step;
            if next.start == next.end {
                self.todo.pop_front();
            }
        }
    }

    /// Adds a generated token; its KV is computed by the next step.
    pub fn push(&mut self, token: u32) {
        assert!(self.todo.is_empty(), "a token is sampled when all before it are computed");
        self.todo.push_back(self.len()..self.len() + 1);
        self.tokens.push(token);
        self.layout.push();
        self.table.resize(self.layout.num_blocks(), None);
    }

    /// True while rows of the prompt must be computed to be reported on.
    pub fn owes_rows(&self) -> bool {
        let wanted = self.rules.prompt_logprobs.is_some() || self.rules.embed;
        wanted && self.choice == 0 && self.reported < self.num_reported()
    }

    /// How many of the prompt's rows are reported on in the end: the last one has no successor in
    /// the prompt.
    pub fn num_reported(&self) -> usize {
        self.prompt_len - usize::from(!self.rules.embed)
    }

    /// Name of a complete block.
    pub fn hash(&mut self, block: usize) -> BlockHash {
        assert!(self.layout.is_complete(block), "a growing block has no name yet");
        while self.hashes.len() <= block {
            let next = self.hashes.len();
            let segment = self.layout.segment(next);
            let parent = if next == self.layout.blocks_of(segment).start {
                self.segment_root(segment)
            } else {
                self.hashes[next - 1]
            };
            self.hashes.push(parent.child(&self.tokens[self.layout.tokens(next)]));
        }
        self.hashes[block]
    }

    /// Names all blocks that are complete.
    pub fn name_blocks(&mut self) {
        let last = self.layout.num_blocks() - 1;
        let complete = if self.layout.is_complete(last) { Some(last) } else { last.checked_sub(1) };
        if let Some(block) = complete {
            self.hash(block);
        }
    }

    /// Where a segment's chain starts: the names of the segments it sees, in order.
    fn segment_root(&self, segment: u16) -> BlockHash {
        let layout = &self.layout;
        let seen = layout.seen_segments(segment).into_iter().fold(self.root, |root, other| {
            let hidden = layout.tokens_of(other).len() - layout.seen_rows(segment, other).len();
            root.seeing(self.hashes[layout.blocks_of(other).end - 1], hidden)
        });
        match layout.facts(segment).variant {
            KvVariant::Lossless => seen,
            KvVariant::Int8 => seen.approximated(),
        }
    }

    /// The KV of a segment as other tiers know it; `None` for what lives in the pool alone.
    pub fn kv(&self, segment: u16) -> Option<&Arc<KvSegment>> {
        self.kv.get(usize::from(segment)).and_then(Option::as_ref)
    }

    /// Names the KV of all segments up to the last chunk, and describes that of the chunks.
    fn name_segments(&mut self, roots: &Roots) -> Vec<Option<Arc<KvSegment>>> {
        let named = |layout: &Layout, segment: u16| {
            let facts = layout.facts(segment);
            facts.chunk.filter(|_| !facts.recomputed)
        };
        let count = self.layout.num_segments();
        let mut chunks = (0..count - 1).filter(|&segment| named(&self.layout, segment).is_some());
        let Some(last) = chunks.next_back() else { return Vec::new() };
        // As computed, whatever the variant: a lossy file was made from such rows.
        let mut computed: Vec<KvId> = Vec::new();
        // What has no name of its own has none in a name, and what sees an approximation is one.
        let (mut has_name, mut is_exact) = (Vec::new(), Vec::new());
        let mut found = Vec::new();
        for segment in 0..=last {
            let is_whole = |&other: &u16| self.layout.facts(other).hidden == 0;
            // A name knows no parts, and no doing without the anchor.
            let list = self.layout.seen_segments(segment);
            let sees_whole = match self.layout.facts(segment).sees {
                Sees::Listed(_) => list.contains(&0) || !self.layout.facts(0).is_anchor,
                Sees::Everything | Sees::Anchor => list.iter().all(is_whole),
            };
            let behind = list.iter().filter(|&&other| !self.layout.facts(other).is_anchor);
            let seen: Vec<KvId> = behind.map(|&other| computed[usize::from(other)]).collect();
            let tokens = &self.tokens[self.layout.tokens_of(segment)];
            computed.push(roots.lossless.kv_id(tokens, &seen));
            let all_seen = |flags: &[bool]| list.iter().all(|&other| flags[usize::from(other)]);
            has_name.push(sees_whole && all_seen(&has_name));
            let is_lossless = self.layout.facts(segment).variant == KvVariant::Lossless;
            let sees_exact = all_seen(&is_exact);
            is_exact.push(is_lossless && sees_exact);
            let is_named = has_name[usize::from(segment)] && (sees_exact || !is_lossless);
            let chunk = named(&self.layout, segment).filter(|_| is_named);
            found.push(chunk.map(|chunk| self.describe(segment, chunk, &seen, roots)));
        }
        found
    }

    fn describe(
        &mut self,
        segment: u16,
        chunk: ChunkId,
        seen: &[KvId],
        roots: &Roots,
    ) -> Arc<KvSegment> {
        let blocks = self.layout.blocks_of(segment);
        let hashes = blocks.map(|block| self.hash(block)).collect();
        let tokens = &self.tokens[self.layout.tokens_of(segment)];
        let variant = self.layout.facts(segment).variant;
        let root = match variant {
            KvVariant::Lossless => &roots.lossless,
            KvVariant::Int8 => &roots.int8,
        };
        Arc::new(KvSegment {
            kv: root.kv_id(tokens, seen),
            chunk,
            variant,
            identity: roots.identity.clone(),
            tokens: tokens.into(),
            seen: seen.into(),
            first_position: self.layout.stored_start(segment),
            hashes,
        })
    }

    /// The tokens that the end of the sequence sees.
    pub fn shown_tokens(&self) -> Vec<u32> {
        let shown = (0..self.layout.num_segments()).map(|segment| self.layout.shown(segment));
        shown.flat_map(|range| &self.tokens[range]).copied().collect()
    }

    /// What can be said of its logits against those of a fresh engine.
    pub fn exactness(&self) -> Exactness {
        let approximates = |segment| {
            let facts = self.layout.facts(segment);
            matches!(facts.sees, Sees::Listed(_)) || facts.variant == KvVariant::Int8
        };
        match (0..self.layout.num_segments()).any(approximates) {
            true => Exactness::Approximate,
            false => Exactness::Bitwise,
        }
    }

    /// Forgets the blocks, for recomputation. Returns them for release.
    pub fn take_table(&mut self) -> Vec<BlockId> {
        self.todo.clear();
        self.todo.push_back(0..self.len());
        let empty = vec![None; self.layout.num_blocks()];
        std::mem::replace(&mut self.table, empty).into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Segment;

    /// Which of some chunks have a name in other tiers.
    fn named(chunks: &[Segment]) -> Vec<bool> {
        let mut request = Request::new(vec![9]);
        request.prompt.splice(0..0, chunks.iter().cloned());
        let roots = Roots::new(&KvIdentity::default(), &request);
        let rules = Arc::new(Rules::default());
        let sequence = Sequence::new(SequenceId(0), 0, &request, &rules, &roots, 16);
        (0..chunks.len() as u16).map(|segment| sequence.kv(segment).is_some()).collect()
    }

    fn chunk(token: u32, variant: KvVariant) -> Segment {
        let chunk = Some(ChunkId::of(&token.to_le_bytes()));
        Segment { chunk, variant, ..Segment::new(vec![token; 20]) }
    }

    #[test]
    fn what_saw_an_approximation_is_not_named_as_exact() {
        use KvVariant::{Int8, Lossless};
        assert_eq!(named(&[chunk(1, Lossless), chunk(2, Lossless)]), [true, true]);
        let mixed = [chunk(1, Int8), chunk(2, Lossless), chunk(3, Int8)];
        assert_eq!(named(&mixed), [true, false, true]);
        // not by what it lists alone: that saw an approximation too
        let listing = |list: &[u16]| Sees::Listed(list.into());
        let second = Segment { sees: listing(&[0]), ..chunk(2, Lossless) };
        let third = Segment { sees: listing(&[1]), ..chunk(3, Lossless) };
        assert_eq!(named(&[chunk(1, Int8), second, third]), [true, false, false]);
    }
}
