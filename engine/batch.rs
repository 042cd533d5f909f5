//! What one forward computes, as a value.

use std::ops::Range;
use std::sync::Arc;

use strand_kernels::PageEntry;
use strand_layers::sampler::{SamplingParams, TokenLogprobs};

use crate::cache::{KvId, KvSegment};
use crate::error::Error;
use crate::grammar::PendingMask;
use crate::segment_kv::SegmentKv;
use crate::sequence::SequenceId;

/// The sequences of one step, those that decode and those that prefill alike.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// To be carried out in order, before the forward.
    pub moves: Vec<BlockMove>,
    pub rows: Vec<BatchRow>,
}

/// KV on its way between the pool and the host.
#[derive(Debug, Clone)]
pub enum BlockMove {
    /// A copy of these physical rows goes to the host: all rows of the segment, in order.
    Offload { segment: Arc<KvSegment>, slots: Vec<u32> },
    /// Rows of the host's copy, from `first_row` on, go to these physical rows.
    Onboard { kv: KvId, first_row: usize, slots: Vec<u32> },
    /// The host's copy goes, to the disk unless that has it.
    Discard { segment: Arc<KvSegment>, on_disk: bool },
}

impl Batch {
    pub fn num_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.tokens.len()).sum()
    }
}

/// A run of one sequence's tokens that see the same segments. A sequence may have several in a
/// step, in order.
#[derive(Debug, Clone)]
pub struct BatchRow {
    pub id: SequenceId,
    pub tokens: Vec<u32>,
    /// How many keys the first of them sees before its own; the others follow. Also the position
    /// their keys are rotated at.
    pub start: u32,
    /// Physical KV row of each token: block x block size + offset.
    pub slot_mapping: Vec<u32>,
    /// All blocks the tokens see, their own included.
    pub view: Vec<PageEntry>,
    /// Present when this run ends in the sequence's last token.
    pub sample: Option<SampleRequest>,
    /// Present when the prompt's own log-probabilities were asked for.
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Indices into the run's tokens whose hidden states were asked for.
    pub hidden: Range<usize>,
}

/// How to choose the token after the run.
#[derive(Debug, Clone)]
pub struct SampleRequest {
    pub params: Arc<SamplingParams>,
    pub choice: u32,
    pub position: u32,
    /// Prompt and output, where penalties need them.
    pub history: Vec<u32>,
    /// How much of the history is prompt.
    pub prompt_len: usize,
    pub suppressed: Vec<u32>,
    /// The tokens a grammar allows; to be waited for when it is time to choose.
    pub allowed: Option<PendingMask>,
    pub logprobs: Option<usize>,
}

/// Rows whose successor is a prompt token, and those successors.
#[derive(Debug, Clone)]
pub struct PromptLogprobs {
    /// Indices into the run's tokens.
    pub rows: Range<usize>,
    pub next: Vec<u32>,
    pub top: usize,
}

/// What a forward says of one row.
#[derive(Debug, Clone)]
pub struct RowOutput {
    pub id: SequenceId,
    /// The chosen token, where one was asked for.
    pub sampled: Option<Sampled>,
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Behind the last norm, one vector a row.
    pub hidden: Vec<Vec<f32>>,
}

#[derive(Debug, Clone)]
pub struct Sampled {
    pub token: u32,
    pub logprobs: Option<TokenLogprobs>,
}

/// Carries a batch out.
///
/// A row that can't be computed fails alone; an error of the whole call fails every row.
pub trait Runner {
    /// One result a row, in the order of the batch.
    fn run(&mut self, batch: &Batch) -> Result<Vec<Result<RowOutput, Error>>, Error>;

    /// A copy of physical rows of the pool, in this order.
    fn gather(&mut self, slots: &[u32]) -> Result<SegmentKv, Error>;

    /// Writes rows of a copy, from `first_row` on, to physical rows of the pool.
    fn scatter(&mut self, kv: &SegmentKv, first_row: usize, slots: &[u32]) -> Result<(), Error>;
}
