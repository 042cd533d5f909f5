//! One choice of one request on its way through the engine.

use std::sync::Arc;

use strand_layers::sampler::SamplingParams;

use crate::cache::{BlockHash, BlockId, Layout};
use crate::request::Request;

/// Names a sequence for its whole life; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Names a request for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Tokens of a choice and how far their KV is.
///
/// ```text
/// [0, computed)      KV is in the blocks of `table`
/// [computed, len)    waits to be computed
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
    pub table: Vec<BlockId>,
    pub computed: usize,
    /// How many blocks of `table` are known to the cache by name.
    pub named: usize,
    /// Prompt tokens found in the cache when it was first admitted; `None` before that.
    pub found: Option<usize>,
    /// How many prompt tokens' log-probabilities have been reported.
    pub reported: usize,
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
        Self {
            id,
            choice,
            priority: asked.priority,
            prompt_len: tokens.len(),
            tokens,
            layout: Layout::new(block_size, asked.prompt.iter().map(|s| s.tokens.len())),
            table: Vec::new(),
            computed: 0,
            named: 0,
            found: None,
            reported: 0,
            sampling: Arc::new(asked.sampling.clone()),
            rules: rules.clone(),
            hashes: Vec::new(),
            root: BlockHash::root(0),
        }
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

    /// Adds a generated token; its KV is computed by the next step.
    pub fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.layout.push();
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
            let parent = self.hashes.last().copied().unwrap_or(self.root);
            self.hashes.push(parent.child(&self.tokens[self.layout.tokens(next)]));
        }
        self.hashes[block]
    }

    /// Forgets the blocks, for recomputation. Returns them for release.
    pub fn take_table(&mut self) -> Vec<BlockId> {
        self.computed = 0;
        self.named = 0;
        std::mem::take(&mut self.table)
    }
}
