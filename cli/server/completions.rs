//! `POST /v1/completions`: prompts that the client has put together itself.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use strand_engine::{FinishReason, Segment, TokenLogprobs};
use strand_models::Tokenizer;
use uuid::Uuid;

use super::asking::{self, request};
use super::auth::Principal;
use super::error::ApiError;
use super::generation::{Generation, Piece};
use super::lenient::Fields;
use super::logprobs::TextLogprobs;
use super::sse::{self, Message, Play, Script};
use super::state::{App, Server, now};
use super::usage::{Tally, Usage};
use super::wire::common::StreamOptions;
use super::wire::completions::{Prompt, TextChoice, TextCompletion, TextRequest};
use super::{prompt, tokenize};

pub async fn create(
    State(app): State<App>,
    principal: Principal,
    fields: Fields,
) -> Result<Response, ApiError> {
    let mut asked = TextRequest::read(fields, &app.limits)?;
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
                Prompt::Text(text) => prompt::of_text(server, &text, special)?,
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
    let generation = Generation::start(&app, requests.collect(), sight).await?;
    let tally = Tally::new(&generation, asked.common.n);
    let teller = Teller::new(&app, &asked, prompts)?;
    match asked.common.stream {
        Some(options) => {
            let script = Streamed { teller, tally, options };
            Ok(sse::response(Play::new(generation, script)))
        }
        None => whole(teller, tally, generation).await,
    }
}

/// Tells pieces as parts of choices. Both ways to answer put these together.
struct Teller {
    server: Arc<Server>,
    tokenizer: Tokenizer,
    id: String,
    created: u64,
    n: usize,
    /// By prompt, where it is echoed.
    echoes: Vec<Echo>,
    /// Nothing of what is generated is told.
    prompt_only: bool,
    wants_logprobs: bool,
    wants_token_ids: bool,
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

impl Teller {
    fn new(app: &App, asked: &TextRequest, prompts: Vec<Vec<u32>>) -> Result<Self, ApiError> {
        let common = &asked.common;
        let choices = common.n * prompts.len();
        let echo = |prompt| Echo { prompt, logprobs: vec![], held: vec![], told: false };
        let echoed = if asked.echo { prompts } else { Vec::new() };
        Ok(Self {
            server: app.clone(),
            tokenizer: prompt::tokenizer(app)?.clone(),
            id: format!("cmpl-{}", Uuid::new_v4().simple()),
            created: now(),
            n: common.n,
            echoes: echoed.into_iter().map(echo).collect(),
            prompt_only: asked.prompt_only,
            wants_logprobs: common.sampling.logprobs.is_some(),
            wants_token_ids: common.return_token_ids,
            offsets: vec![0; choices],
        })
    }

    fn tell(&mut self, piece: Piece) -> Vec<TextChoice> {
        let Some(prompt) = self.echoed(&piece) else { return vec![self.told(piece)] };
        let wants_logprobs = self.wants_logprobs;
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
        let choices = prompt * self.n..(prompt + 1) * self.n;
        let mut told: Vec<TextChoice> = choices.map(|choice| self.echo(prompt, choice)).collect();
        told.extend(held.into_iter().map(|piece| self.told(piece)));
        told
    }

    /// The prompt that a piece belongs to, where prompts are echoed.
    fn echoed(&self, piece: &Piece) -> Option<usize> {
        let prompt = match piece {
            Piece::Prompt { prompt, .. } => *prompt,
            Piece::Token { choice, .. } | Piece::End { choice, .. } => choice / self.n,
        };
        (prompt < self.echoes.len()).then_some(prompt)
    }

    /// The prompt as the beginning of a choice.
    fn echo(&mut self, prompt: usize, choice: usize) -> TextChoice {
        let (tokenizer, echo) = (&self.tokenizer, &self.echoes[prompt]);
        let offset = &mut self.offsets[choice];
        let logprobs = self.wants_logprobs.then(|| {
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
                told.token_ids = self.wants_token_ids.then(|| vec![token]);
                told.logprobs = logprobs.map(|one| {
                    let mut logprobs = TextLogprobs::default();
                    logprobs.push(&self.tokenizer, &one, &mut self.offsets[choice]);
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

    /// The usage so far, without tokens that nobody asked for.
    fn usage(&self, tally: &Tally) -> Usage {
        let usage = tally.usage();
        if self.prompt_only { usage.without_completion() } else { usage }
    }

    fn completion(&self, choices: Vec<TextChoice>) -> TextCompletion {
        TextCompletion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.server.model.id.clone(),
            choices,
            usage: None,
            strand: None,
        }
    }
}

async fn whole(
    mut teller: Teller,
    mut tally: Tally,
    mut generation: Generation,
) -> Result<Response, ApiError> {
    let mut choices: Vec<TextChoice> = (0..teller.offsets.len())
        .map(|index| TextChoice { index, ..TextChoice::default() })
        .collect();
    while let Some(piece) = generation.next().await {
        let piece = piece?;
        tally.count(&piece);
        for told in teller.tell(piece) {
            choices[told.index].append(told);
        }
    }
    let completion = TextCompletion {
        usage: Some(Some(teller.usage(&tally))),
        strand: Some(tally.provenance()),
        ..teller.completion(choices)
    };
    Ok(Json(completion).into_response())
}

struct Streamed {
    teller: Teller,
    tally: Tally,
    options: StreamOptions,
}

impl Streamed {
    fn told(&self, choice: TextChoice) -> Message {
        let StreamOptions { include_usage, continuous_usage } = self.options;
        let usage = || continuous_usage.then(|| self.teller.usage(&self.tally));
        let strand = choice.finish_reason.map(|_| self.tally.provenance());
        let usage = include_usage.then(usage);
        Message::new(&TextCompletion { usage, strand, ..self.teller.completion(vec![choice]) })
    }
}

impl Script for Streamed {
    fn opening(&mut self) -> Vec<Message> {
        Vec::new()
    }

    fn piece(&mut self, piece: Piece) -> Vec<Message> {
        self.tally.count(&piece);
        let told = self.teller.tell(piece);
        told.into_iter().filter(TextChoice::says_something).map(|told| self.told(told)).collect()
    }

    fn closing(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        if self.options.include_usage {
            let completion = TextCompletion {
                usage: Some(Some(self.teller.usage(&self.tally))),
                strand: Some(self.tally.provenance()),
                ..self.teller.completion(Vec::new())
            };
            messages.push(Message::new(&completion));
        }
        messages.push(Message::done());
        messages
    }
}
