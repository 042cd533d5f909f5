//! `POST /v1/completions`: prompts that the client has put together itself.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use strand_engine::{FinishReason, Segment, TokenLogprobs};

use super::asking::{self, request};
use super::auth::Principal;
use super::body::Asked;
use super::error::ApiError;
use super::generation::{Generation, Piece};
use super::logprobs::TextLogprobs;
use super::sse::Message;
use super::state::App;
use super::telling::{self, Cost, Head, Part, Teller};
use super::usage::{Provenance, Tally, Usage};
use super::wire::completions::{Prompt, TextChoice, TextCompletion, TextRequest};
use super::{prompt, tokenize};

pub async fn create(
    State(app): State<App>,
    principal: Principal,
    Asked(mut asked): Asked<TextRequest>,
) -> Result<Response, ApiError> {
    app.model.check(asked.common.model.as_deref())?;
    let (texts, special) = (std::mem::take(&mut asked.prompts), asked.add_special_tokens);
    if asked.common.selection.context.is_some() {
        let message = "a context is a conversation, which /v1/chat/completions goes on with";
        return Err(ApiError::invalid("context", message));
    }
    if asked.echo && asked.common.selection.chunks.is_some() {
        return Err(ApiError::invalid("echo", "a prompt behind chunks is not echoed"));
    }
    let making = asking::prepare(&app, &principal, &asked.common, move |server, mut sight| {
        let prompts = texts.into_iter().map(|prompt| {
            let ids = match prompt {
                Prompt::Text(text) => {
                    prompt::check_length(server, text.len(), "prompt")?;
                    prompt::of_text(server, &text, special)?
                }
                Prompt::Tokens(ids) => ids,
            };
            let segments = match &mut sight {
                Some(sight) => sight.text(server, &ids)?,
                None => vec![Segment::new(ids.clone())],
            };
            Ok((ids, segments))
        });
        prompts.collect::<Result<Vec<_>, ApiError>>()
    });
    let (prompts, sight) = making.await?;
    let (prompts, segments): (Vec<_>, Vec<_>) = prompts.into_iter().unzip();
    let requests = segments.into_iter().map(|segments| {
        let mut request = request(&app, &principal, &asked.common, segments);
        if asked.echo {
            request.limits.prompt_logprobs = request.limits.logprobs;
        }
        request
    });
    let generation = Generation::start(&app, &principal, requests.collect(), sight).await?;
    let (n, stream) = (asked.common.n, asked.common.stream);
    telling::answer(Texts::new(&app, &asked, prompts)?, n, generation, stream).await
}

/// Tells pieces as parts of choices.
struct Texts {
    head: Head,
    /// By prompt, where it is echoed.
    echoes: Vec<Echo>,
    /// Nothing of what is generated is told.
    prompt_only: bool,
    /// Where the next token of each choice begins, in characters of its text.
    offsets: Vec<usize>,
}

/// A prompt that stands before its answers, and answers that wait for its log-probabilities.
struct Echo {
    prompt: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    held: Vec<Piece>,
    told: bool,
}

impl Texts {
    fn new(app: &App, asked: &TextRequest, prompts: Vec<Vec<u32>>) -> Result<Self, ApiError> {
        let choices = asked.common.n * prompts.len();
        let echo = |prompt| Echo { prompt, logprobs: vec![], held: vec![], told: false };
        let echoed = if asked.echo { prompts } else { Vec::new() };
        Ok(Self {
            head: Head::new(app, "cmpl", &asked.common)?,
            echoes: echoed.into_iter().map(echo).collect(),
            prompt_only: asked.prompt_only,
            offsets: vec![0; choices],
        })
    }

    /// The prompt that a piece belongs to, where prompts are echoed.
    fn echoed(&self, piece: &Piece) -> Option<usize> {
        let prompt = match piece {
            Piece::Prompt { prompt, .. } => *prompt,
            Piece::Token { choice, .. } | Piece::End { choice, .. } => choice / self.head.n,
        };
        (prompt < self.echoes.len()).then_some(prompt)
    }

    /// The prompt as the beginning of a choice.
    fn echo(&mut self, prompt: usize, choice: usize) -> TextChoice {
        let (tokenizer, echo) = (&self.head.tokenizer, &self.echoes[prompt]);
        let offset = &mut self.offsets[choice];
        let logprobs = self.head.wants_logprobs.then(|| {
            let mut all = TextLogprobs::default();
            all.push_first(tokenizer, echo.prompt[0], offset);
            echo.logprobs.iter().for_each(|one| all.push(tokenizer, one, offset));
            all
        });
        let text = tokenize::with_special(tokenizer, &echo.prompt);
        TextChoice { index: choice, text, logprobs, ..TextChoice::default() }
    }

    /// One piece of what is generated.
    fn told(&mut self, piece: Piece) -> TextChoice {
        let mut told = TextChoice::default();
        match piece {
            Piece::Prompt { .. } => {}
            Piece::Token { choice, token, text, logprobs } => {
                told.index = choice;
                if self.prompt_only {
                    return told;
                }
                told.text = text;
                told.token_ids = self.head.wants_token_ids.then(|| vec![token]);
                told.logprobs = logprobs.map(|one| {
                    let mut logprobs = TextLogprobs::default();
                    logprobs.push(&self.head.tokenizer, &one, &mut self.offsets[choice]);
                    logprobs
                });
            }
            Piece::End { choice, reason, text, .. } => {
                told.index = choice;
                let reason = if self.prompt_only { FinishReason::Length } else { reason };
                told.text = if self.prompt_only { String::new() } else { text };
                told.finish_reason = Some(reason.as_str());
            }
        }
        told
    }

    fn completion(&self, choices: Vec<TextChoice>, cost: Cost) -> TextCompletion {
        TextCompletion {
            id: self.head.id.clone(),
            object: "text_completion",
            created: self.head.created,
            model: self.head.model.clone(),
            choices,
            usage: cost.usage,
            strand: cost.strand,
        }
    }
}

impl Teller for Texts {
    type Part = TextChoice;

    fn tell(&mut self, piece: Piece) -> Vec<TextChoice> {
        let Some(prompt) = self.echoed(&piece) else { return vec![self.told(piece)] };
        let wants_logprobs = self.head.wants_logprobs;
        let echo = &mut self.echoes[prompt];
        if echo.told {
            return vec![self.told(piece)];
        }
        match piece {
            Piece::Prompt { logprobs, .. } => echo.logprobs.extend(logprobs),
            other => echo.held.push(other),
        }
        if wants_logprobs && echo.logprobs.len() + 1 < echo.prompt.len() {
            return Vec::new();
        }
        echo.told = true;
        let held = std::mem::take(&mut echo.held);
        let choices = prompt * self.head.n..(prompt + 1) * self.head.n;
        let mut told: Vec<TextChoice> = choices.map(|choice| self.echo(prompt, choice)).collect();
        told.extend(held.into_iter().map(|piece| self.told(piece)));
        told
    }

    /// Without tokens that nobody asked for.
    fn usage(&self, tally: &Tally) -> Usage {
        let usage = tally.usage();
        if self.prompt_only { usage.without_completion() } else { usage }
    }

    fn whole(self, parts: Vec<TextChoice>, usage: Usage, strand: Provenance) -> Response {
        let empty = |index| TextChoice { index, ..TextChoice::default() };
        let mut choices: Vec<TextChoice> = (0..self.offsets.len()).map(empty).collect();
        parts.into_iter().for_each(|part| choices[part.index].append(part));
        let cost = Cost { usage: Some(Some(usage)), strand: Some(strand) };
        Json(self.completion(choices, cost)).into_response()
    }

    fn event(&self, part: Option<TextChoice>, cost: Cost) -> Message {
        Message::new(&self.completion(part.into_iter().collect(), cost))
    }
}

impl Part for TextChoice {
    fn says_something(&self) -> bool {
        let more = self.logprobs.is_some() || self.token_ids.is_some();
        !self.text.is_empty() || more || self.finish_reason.is_some()
    }

    fn ends(&self) -> bool {
        self.finish_reason.is_some()
    }
}
