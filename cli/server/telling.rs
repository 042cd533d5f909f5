//! Answers with choices: as a whole, or in events as they come to be.
//!
//! Chat and text completions differ in what a part of a choice looks like, and in nothing else.

use axum::response::Response;
use strand_models::Tokenizer;
use uuid::Uuid;

use super::error::ApiError;
use super::generation::{Generation, Piece};
use super::prompt;
use super::sse::{self, Message, Play, Script};
use super::state::{App, now};
use super::usage::{Provenance, Tally, Usage};
use super::wire::common::{Common, StreamOptions};

/// One API's way to tell pieces as parts of choices.
pub trait Teller: Send + 'static {
    type Part: Part;

    /// Before anything is said.
    fn opening(&self) -> Vec<Self::Part> {
        Vec::new()
    }

    fn tell(&mut self, piece: Piece) -> Vec<Self::Part>;

    /// What it has cost so far, as this API counts.
    fn usage(&self, tally: &Tally) -> Usage {
        tally.usage()
    }

    /// All parts as one answer.
    fn whole(self, parts: Vec<Self::Part>, usage: Usage, strand: Provenance) -> Response;

    /// A part, or none, as an event.
    fn event(&self, part: Option<Self::Part>, cost: Cost) -> Message;
}

/// A part of a choice.
pub trait Part {
    fn says_something(&self) -> bool;
    /// Nothing of this choice follows.
    fn ends(&self) -> bool;
}

/// What an event tells of the answer's cost.
pub struct Cost {
    /// `None`: nobody asked for it. Null: it follows later.
    pub usage: Option<Option<Usage>>,
    pub strand: Option<Provenance>,
}

/// What every teller knows of its answer.
pub struct Head {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub tokenizer: Tokenizer,
    /// Choices of a prompt.
    pub n: usize,
    pub wants_logprobs: bool,
    pub wants_token_ids: bool,
}

impl Head {
    pub fn new(app: &App, prefix: &str, common: &Common) -> Result<Self, ApiError> {
        Ok(Self {
            id: format!("{prefix}-{}", Uuid::new_v4().simple()),
            created: now(),
            model: app.model.id.clone(),
            tokenizer: prompt::tokenizer(app)?.clone(),
            n: common.n,
            wants_logprobs: common.sampling.logprobs.is_some(),
            wants_token_ids: common.return_token_ids,
        })
    }
}

/// Answers in the way that was asked for.
pub async fn answer<T: Teller>(
    mut teller: T,
    n: usize,
    mut generation: Generation,
    stream: Option<StreamOptions>,
) -> Result<Response, ApiError> {
    let mut tally = Tally::new(&generation, n);
    if let Some(options) = stream {
        return Ok(sse::response(Play::new(generation, Streamed { teller, tally, options })));
    }
    let mut parts = Vec::new();
    while let Some(piece) = generation.next().await {
        let piece = piece?;
        tally.count(&piece);
        parts.extend(teller.tell(piece));
    }
    let usage = teller.usage(&tally);
    Ok(teller.whole(parts, usage, tally.provenance()))
}

/// The answer in events: text as it becomes certain, the reason, the usage.
struct Streamed<T> {
    teller: T,
    tally: Tally,
    options: StreamOptions,
}

impl<T: Teller> Streamed<T> {
    fn told(&self, part: T::Part) -> Message {
        let StreamOptions { include_usage, continuous_usage } = self.options;
        let usage = || continuous_usage.then(|| self.teller.usage(&self.tally));
        let strand = part.ends().then(|| self.tally.provenance());
        self.teller.event(Some(part), Cost { usage: include_usage.then(usage), strand })
    }
}

impl<T: Teller> Script for Streamed<T> {
    fn opening(&mut self) -> Vec<Message> {
        self.teller.opening().into_iter().map(|part| self.told(part)).collect()
    }

    fn piece(&mut self, piece: Piece) -> Vec<Message> {
        self.tally.count(&piece);
        let parts = self.teller.tell(piece).into_iter();
        parts.filter(Part::says_something).map(|part| self.told(part)).collect()
    }

    fn closing(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        if self.options.include_usage {
            let usage = Some(Some(self.teller.usage(&self.tally)));
            let strand = Some(self.tally.provenance());
            messages.push(self.teller.event(None, Cost { usage, strand }));
        }
        messages.push(Message::done());
        messages
    }
}
