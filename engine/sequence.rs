//! One choice of one request on its way through the engine.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use strand_layers::sampler::SamplingParams;

use crate::cache::{BlockHash, BlockId, ChunkId, Layout};
use crate::request::{Request, Segment};

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
    /// Prompt tokens found in the cache when it was first admitted; `None` before that.
    pub found: Option<usize>,
    /// How many prompt tokens' log-probabilities have been reported.
    pub reported: usize,
    /// Chunks erased while it lives: their blocks are not to be found again.
    pub erased: Vec<ChunkId>,
    pub sampling: Arc<SamplingParams>,
    pub rules: Arc<Rules>,
    /// Names of the complete blocks so far, in order.
    hashes: Vec<BlockHash>,
    root: BlockHash,
}

/// What a request's limits mean for this model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Sequences end at this many tokens of output.
    pub max_tokens: usize,
    pub min_tokens: usize,
    /// Tokens that end a choice, the model's own included unless ignored.
    pub stop_token_ids: Vec<u32>,
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
}

impl Sequence {
    pub fn new(
        id: SequenceId,
        choice: u32,
        asked: &Request,
        rules: &Arc<Rules>,
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
            found: None,
            reported: 0,
            erased: Vec::new(),
            sampling: Arc::new(asked.sampling.clone()),
            rules: rules.clone(),
            hashes: Vec::new(),
            root: BlockHash::root(0),
        };
        sequence.take_table();
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

    /// True while rows of the prompt must be computed for their log-probabilities.
    pub fn owes_prompt_logprobs(&self) -> bool {
        let wanted = self.rules.prompt_logprobs.is_some() && self.choice == 0;
        wanted && self.reported + 1 < self.prompt_len
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

    /// Where a segment's chain starts: the names of the segments it sees, in order.
    fn segment_root(&self, segment: u16) -> BlockHash {
        (0..segment)
            .filter(|&other| self.layout.is_visible(segment, other))
            .map(|other| self.hashes[self.layout.blocks_of(other).end - 1])
            .fold(self.root, BlockHash::seeing)
    }

    /// Forgets the blocks, for recomputation. Returns them for release.
    pub fn take_table(&mut self) -> Vec<BlockId> {
        self.todo.clear();
        self.todo.push_back(0..self.len());
        let empty = vec![None; self.layout.num_blocks()];
        std::mem::replace(&mut self.table, empty).into_iter().flatten().collect()
    }
}
