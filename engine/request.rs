//! What goes in and what comes out: the engine's door.

use crate::cache::{ChunkId, KvVariant, Layout, Sees, SegmentLayout};
use crate::error::Error;
use crate::grammar::Grammar;
use strand_layers::sampler::{SamplingParams, TokenLogprobs};

/// One run of the prompt, the unit of reuse. Starts a fresh KV block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub tokens: Vec<u32>,
    pub sees: Sees,
    /// So many of its first rows are seen by the segment itself and by those that list it alone;
    /// all of them where it is switched off.
    pub hidden: usize,
    /// True for a first segment (a BOS token) that chunks see too.
    pub is_anchor: bool,
    /// The chunk it is, if it is one: its KV can be saved and erased by that name.
    pub chunk: Option<ChunkId>,
    /// Its rows stand in for the first rows of the chunk, seeing what is before them.
    pub recomputed: bool,
    /// Whether its rows are those of a lossy file; the engine decides, if
    /// [`Request::allow_lossy`].
    pub variant: KvVariant,
}

impl Segment {
    /// A segment that sees all before it.
    pub fn new(tokens: Vec<u32>) -> Self {
        Self {
            tokens,
            sees: Sees::Everything,
            hidden: 0,
            is_anchor: false,
            chunk: None,
            recomputed: false,
            variant: KvVariant::Lossless,
        }
    }

    /// The first segment, which even independent chunks see.
    pub fn anchor(tokens: Vec<u32>) -> Self {
        Self { is_anchor: true, ..Self::new(tokens) }
    }

    /// A chunk that sees the anchor and itself.
    pub fn independent(tokens: Vec<u32>) -> Self {
        Self { sees: Sees::Anchor, ..Self::new(tokens) }
    }

    /// How many of its tokens the end of the prompt sees.
    pub fn num_shown(&self) -> usize {
        self.tokens.len() - self.hidden
    }

    pub(crate) fn layout(&self) -> SegmentLayout {
        SegmentLayout {
            len: self.tokens.len(),
            sees: self.sees.clone(),
            hidden: self.hidden,
            is_anchor: self.is_anchor,
            chunk: self.chunk,
            recomputed: self.recomputed,
            variant: self.variant,
        }
    }
}

/// Blocks that a prompt needs at most: those that its end sees, and what it takes to compute them.
pub fn num_blocks(prompt: &[Segment], block_size: usize) -> usize {
    if prompt.is_empty() {
        return 0;
    }
    let layout = Layout::new(block_size, prompt.iter().map(Segment::layout));
    let needed = (0..).zip(layout.needed(|_| true)).filter(|(_, needed)| *needed);
    needed.map(|(segment, _)| layout.blocks_of(segment).len()).sum()
}

/// The most keys that a row which may have to be computed has up to its own.
pub(crate) fn longest_view(prompt: &[Segment], block_size: usize) -> usize {
    let layout = Layout::new(block_size, prompt.iter().map(Segment::layout));
    let needed = (0..).zip(layout.needed(|_| true)).filter(|(_, needed)| *needed);
    let view = |segment| layout.stored_start(segment) + layout.facts(segment).len;
    needed.map(|(segment, _)| view(segment)).max().unwrap_or(0)
}

/// When a request's chunks are fetched from the disk rather than encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Restore {
    /// Where loading is expected to take less time than encoding.
    #[default]
    Auto,
    Always,
    Never,
}

impl Restore {
    pub const ALL: [Self; 3] = [Self::Auto, Self::Always, Self::Never];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|restore| restore.as_str() == text)
    }
}

/// A prompt and what to do with it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub prompt: Vec<Segment>,
    pub sampling: SamplingParams,
    pub limits: Limits,
    /// Lower goes first; equal ones in order of arrival.
    pub priority: i32,
    /// Requests find each other's KV only where their salts are the same.
    pub salt: String,
    pub restore: Restore,
    /// Lossy KV is taken where there is no other.
    pub allow_lossy: bool,
}

impl Request {
    /// A request of one segment with default sampling (greedy) and limits.
    pub fn new(tokens: Vec<u32>) -> Self {
        Self {
            prompt: vec![Segment::new(tokens)],
            sampling: SamplingParams::default(),
            limits: Limits::default(),
            priority: 0,
            salt: String::new(),
            restore: Restore::default(),
            allow_lossy: false,
        }
    }

    /// A request for the mean of a text's hidden states behind the last norm. All its rows are
    /// computed, whatever is cached, and none that is generated.
    pub fn embedding(tokens: Vec<u32>) -> Self {
        let limits = Limits { embed: true, ..Limits::default() };
        Self { limits, ..Self::new(tokens) }
    }

    /// Tokens that the answer sees.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.iter().map(Segment::num_shown).sum()
    }
}

/// Where a request ends and what it reports.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// `None`: the room left in the model's length.
    pub max_tokens: Option<usize>,
    /// Stop tokens can't be chosen, nor stop strings met, before this many tokens.
    pub min_tokens: usize,
    /// Text that ends the answer and is not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer, besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Don't end at the model's own stop tokens; those of a grammar end it all the same.
    pub ignore_eos: bool,
    /// How many answers.
    pub n: u32,
    /// Report each token's log-probability and so many alternatives.
    pub logprobs: Option<u32>,
    /// The same for the prompt; its rows are then computed without prefix hits.
    pub prompt_logprobs: Option<u32>,
    /// Instead of an answer, the mean of the prompt's hidden states; see [`Request::embedding`].
    pub embed: bool,
    /// What the answer must be; where it is complete the answer ends, `min_tokens` or not.
    pub grammar: Option<Grammar>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_tokens: None,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            n: 1,
            logprobs: None,
            prompt_logprobs: None,
            embed: false,
            grammar: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, a stop string or the end of a grammar.
    Stop,
    /// `max_tokens` or the model's length.
    Length,
}

impl FinishReason {
    /// OpenAI's spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Where the tokens of a prompt came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reuse {
    /// Found in the KV pool.
    pub device: usize,
    /// Brought back from the host.
    pub host: usize,
    /// Brought back from the disk.
    pub disk: usize,
    /// Computed for this answer, rows that it doesn't see included.
    pub encoded: usize,
    /// First rows of chunks computed again behind the chunks before them.
    pub recomputed: usize,
}

impl Reuse {
    /// Tokens whose KV was there.
    pub fn cached(&self) -> usize {
        self.device + self.host + self.disk
    }
}

impl std::ops::AddAssign for Reuse {
    fn add_assign(&mut self, other: Self) {
        self.device += other.device;
        self.host += other.host;
        self.disk += other.disk;
        self.encoded += other.encoded;
        self.recomputed += other.recomputed;
    }
}

/// How the logits of an answer compare with those of a fresh engine given the same prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exactness {
    /// The same bits.
    Bitwise,
    /// Near them: chunks were switched by mask alone, or KV came from a lossy file.
    Approximate,
}

impl Exactness {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bitwise => "bitwise",
            Self::Approximate => "approximate",
        }
    }
}

/// What a request tells its owner, in order. Every choice ends in `Finished`, an embedding in
/// `Embedding`, or the whole request in one `Failed`; nothing follows any of them.
#[derive(Debug, Clone)]
pub enum Event {
    /// Log-probabilities of the prompt's tokens from the second on, when asked for; in order,
    /// possibly in several pieces.
    Prompt {
        logprobs: Vec<TokenLogprobs>,
    },
    Token {
        choice: u32,
        token: u32,
        /// Text that is certain by now: never half a character, never part of a stop string.
        text: String,
        logprobs: Option<TokenLogprobs>,
    },
    Finished {
        choice: u32,
        reason: FinishReason,
        /// Text held back until the end was known.
        text: String,
        reuse: Reuse,
        exactness: Exactness,
    },
    /// Not normalized, as long as the model's hidden states.
    Embedding {
        vector: Vec<f32>,
    },
    Failed(Error),
}
