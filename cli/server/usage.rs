//! What an answer cost, in OpenAI's shape and in ours.

use serde::Serialize;
use strand_engine::context::Dropped;
use strand_engine::{Exactness, Reuse};
use utoipa::ToSchema;

use super::generation::{Generation, Piece};
use super::library::sight::Told;
use super::wire::chunks::SeenChunk;

/// Tokens of a request, counted as its pieces pass.
#[derive(Debug, Clone)]
pub struct Tally {
    prompt_tokens: usize,
    completion_tokens: usize,
    /// Choices of a prompt: the first one's reuse is the prompt's.
    n: usize,
    reuse: Reuse,
    exactness: Exactness,
    told: Told,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptDetails,
    pub completion_tokens_details: CompletionDetails,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct PromptDetails {
    /// Tokens whose KV was there.
    pub cached_tokens: usize,
    /// Tokens whose KV was computed, and can now be found.
    pub cache_write_tokens: usize,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct CompletionDetails {
    pub reasoning_tokens: usize,
}

/// What no other server tells.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Provenance {
    pub reuse: ReuseCounts,
    /// How the logits compare with those of a fresh engine: `bitwise` or `approximate`.
    pub exactness: &'static str,
    /// Chunks that the answer saw.
    pub chunks: Vec<SeenChunk>,
    /// The oldest turns of a context, where they no longer fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped: Option<DroppedTurns>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct DroppedTurns {
    pub turns: usize,
    pub tokens: usize,
}

/// Tokens of the prompt by where their KV came from.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ReuseCounts {
    pub device: usize,
    pub host: usize,
    pub disk: usize,
    pub encoded: usize,
    pub recomputed: usize,
}

impl Usage {
    /// Without tokens that had to be generated and that nobody asked for.
    pub fn without_completion(self) -> Self {
        Self { completion_tokens: 0, total_tokens: self.prompt_tokens, ..self }
    }
}

impl Tally {
    /// Of a generation with so many choices of a prompt.
    pub fn new(generation: &Generation, n: usize) -> Self {
        let (reuse, exactness) = (Reuse::default(), Exactness::Bitwise);
        let (prompt_tokens, told) = (generation.prompt_tokens, generation.told.clone());
        Self { prompt_tokens, completion_tokens: 0, n, reuse, exactness, told }
    }

    pub fn count(&mut self, piece: &Piece) {
        match piece {
            Piece::Prompt { .. } => {}
            Piece::Token { .. } => self.completion_tokens += 1,
            Piece::End { choice, reuse, exactness, .. } => {
                if choice.is_multiple_of(self.n) {
                    self.reuse.device += reuse.device;
                    self.reuse.host += reuse.host;
                    self.reuse.disk += reuse.disk;
                    self.reuse.encoded += reuse.encoded;
                    self.reuse.recomputed += reuse.recomputed;
                }
                if *exactness == Exactness::Approximate {
                    self.exactness = Exactness::Approximate;
                }
            }
        }
    }

    pub fn usage(&self) -> Usage {
        let Self { prompt_tokens, completion_tokens, .. } = *self;
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails {
                cached_tokens: self.reuse.cached(),
                cache_write_tokens: self.reuse.encoded,
            },
            completion_tokens_details: CompletionDetails { reasoning_tokens: 0 },
        }
    }

    pub fn provenance(&self) -> Provenance {
        let Reuse { device, host, disk, encoded, recomputed } = self.reuse;
        let Dropped { turns, tokens } = self.told.dropped;
        Provenance {
            reuse: ReuseCounts { device, host, disk, encoded, recomputed },
            exactness: self.exactness.as_str(),
            chunks: self.told.chunks(&self.reuse),
            dropped: (turns > 0).then_some(DroppedTurns { turns, tokens }),
        }
    }
}
