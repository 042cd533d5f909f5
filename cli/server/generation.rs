//! From engine requests to one stream of pieces, whatever API tells them.
//!
//! A generation has a request for each prompt and numbers all choices through. Dropping it
//! cancels what is left of it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use strand_engine::{Event, Exactness, FinishReason, Request, Reuse, TokenLogprobs};

use super::auth::Principal;
use super::error::ApiError;
use super::library::Sight;
use super::library::sight::Told;
use super::metrics::Metrics;
use super::quota::Meter;
use super::state::Server;

/// What a generation has to tell, in order within a choice.
#[derive(Debug)]
pub enum Piece {
    /// Log-probabilities of a prompt, from its second token on.
    Prompt {
        prompt: usize,
        logprobs: Vec<TokenLogprobs>,
    },
    Token {
        choice: usize,
        token: u32,
        text: String,
        logprobs: Option<TokenLogprobs>,
    },
    /// Nothing of this choice follows.
    End {
        choice: usize,
        reason: FinishReason,
        text: String,
        reuse: Reuse,
        exactness: Exactness,
    },
}

/// The engine's answers to the prompts of one HTTP request.
pub struct Generation {
    events: SelectAll<BoxStream<'static, (usize, Event)>>,
    /// Choices of a prompt.
    n: usize,
    /// Choices that have not ended.
    open: usize,
    /// Came before anybody asked.
    early: VecDeque<Piece>,
    metrics: Metrics,
    meter: Meter,
    started: Instant,
    /// When each choice had its last token.
    last_token: Vec<Option<Instant>>,
    pub prompt_tokens: usize,
    /// What it sees of the library, until all choices have ended.
    sight: Option<Sight>,
    pub told: Told,
}

/// After so long without a word the request counts as accepted.
const ACCEPTED_AFTER: Duration = Duration::from_secs(10);

impl Generation {
    /// Sends all requests, and waits until they run or are refused: what is refused is told
    /// before any event is.
    pub async fn start(
        server: &Server,
        principal: &Principal,
        requests: Vec<Request>,
        sight: Option<Sight>,
    ) -> Result<Self, ApiError> {
        let meter = server.quotas.meter(&principal.payer)?;
        let n = requests.first().map_or(1, |request| request.limits.n as usize);
        let open = n * requests.len();
        let prompt_tokens = requests.iter().map(Request::prompt_tokens).sum();
        let mut events = SelectAll::new();
        for (index, request) in requests.into_iter().enumerate() {
            let stream = server.engine.submit(request)?;
            let numbered = stream::unfold(stream, move |mut stream| async move {
                let event = stream.next().await?;
                Some(((index, event), stream))
            });
            events.push(numbered.boxed());
        }
        meter.count(prompt_tokens);
        let told = sight.as_ref().map(Sight::told).unwrap_or_default();
        let mut generation = Self {
            events,
            n,
            open,
            early: VecDeque::new(),
            metrics: server.metrics.clone(),
            meter,
            started: Instant::now(),
            last_token: vec![None; open],
            prompt_tokens,
            sight,
            told,
        };
        let first = tokio::time::timeout(ACCEPTED_AFTER, generation.next()).await;
        if let Ok(Some(first)) = first {
            generation.early.push_back(first?);
        }
        Ok(generation)
    }

    /// The next piece; `None` after the last one.
    pub async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        if let Some(piece) = self.early.pop_front() {
            return Some(Ok(piece));
        }
        if self.open == 0 {
            return None;
        }
        let Some((prompt, event)) = self.events.next().await else {
            // the engine's thread ended in the middle of an answer
            self.open = 0;
            return Some(Err(ApiError::from(strand_engine::Error::Stopped)));
        };
        match self.piece(prompt, event) {
            Ok(piece) => Some(self.heard(piece).await),
            failed => Some(failed),
        }
    }

    /// What is complete is kept before its end is told.
    async fn heard(&mut self, piece: Piece) -> Result<Piece, ApiError> {
        let Some(sight) = &mut self.sight else { return Ok(piece) };
        sight.hear(&piece);
        if self.open > 0 {
            return Ok(piece);
        }
        let sight = self.sight.take().expect("looked at above");
        // found again should nobody wait for this any more
        self.early.push_back(piece);
        sight.complete().await?;
        Ok(self.early.pop_back().expect("pushed above"))
    }

    fn piece(&mut self, prompt: usize, event: Event) -> Result<Piece, ApiError> {
        let number = |choice: u32| prompt * self.n + choice as usize;
        Ok(match event {
            Event::Prompt { logprobs } => Piece::Prompt { prompt, logprobs },
            Event::Embedding { .. } => unreachable!("an answer was asked for"),
            Event::Token { choice, token, text, logprobs } => {
                let choice = number(choice);
                self.meter.count(1);
                self.measure(choice);
                Piece::Token { choice, token, text, logprobs }
            }
            Event::Finished { choice, reason, text, reuse, exactness } => {
                self.open -= 1;
                self.metrics.finished(reason, self.started.elapsed());
                Piece::End { choice: number(choice), reason, text, reuse, exactness }
            }
            Event::Failed(error) => {
                self.open = 0;
                return Err(error.into());
            }
        })
    }

    /// Notes that a token came.
    fn measure(&mut self, choice: usize) {
        let now = Instant::now();
        match self.last_token[choice].replace(now) {
            None => self.metrics.first_token(now - self.started),
            Some(last) => self.metrics.next_token(now - last),
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.open > 0 {
            self.metrics.cancelled();
        }
    }
}
