//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use strand_engine::FinishReason;
use strand_models::Tokenizer;
use uuid::Uuid;

use super::asking;
use super::auth::Principal;
use super::error::ApiError;
use super::generation::{Generation, Piece};
use super::lenient::Fields;
use super::library::sight;
use super::logprobs::ChatLogprobs;
use super::prompt::{self, Chat};
use super::sse::{self, Message, Play, Script};
use super::state::{App, Server, now};
use super::structured;
use super::tools::{Said, Speech};
use super::usage::Tally;
use super::wire::chat::{ChatChoice, ChatChunk, ChatCompletion, ChatRequest, ChunkChoice, Delta};
use super::wire::common::{Common, StreamOptions};

pub async fn create(
    State(app): State<App>,
    principal: Principal,
    fields: Fields,
) -> Result<Response, ApiError> {
    let asked = ChatRequest::read(fields, &app.limits)?;
    let ChatRequest { common, messages, tools, form, ending, marks } = asked;
    app.model.check(common.model.as_deref())?;
    let shape = structured::shape(&app, form, &tools).await?;
    let chat = Chat { messages, tools: tools.offered(), ending, marks };
    let making = asking::prepare(&app, &principal, &common, move |server, sight| {
        sight::chat(server, sight, chat)
    });
    let (segments, sight) = making.await?;
    let mut request = asking::request(&app, &principal, &common, segments);
    request.limits.grammar = shape.grammar;
    let generation = Generation::start(&app, vec![request], sight).await?;
    let tally = Tally::new(&generation, common.n);
    let teller = Teller::new(&app, &common, || tools.speech(shape.style))?;
    match common.stream {
        Some(options) => {
            let script = Streamed { teller, tally, options };
            Ok(sse::response(Play::new(generation, script)))
        }
        None => whole(teller, tally, generation).await,
    }
}

/// Tells pieces as deltas of choices. Both ways to answer put these together.
struct Teller {
    server: Arc<Server>,
    tokenizer: Tokenizer,
    id: String,
    created: u64,
    n: usize,
    wants_logprobs: bool,
    wants_token_ids: bool,
    /// By choice.
    speeches: Vec<Speech>,
}

impl Teller {
    fn new(app: &App, common: &Common, speech: impl Fn() -> Speech) -> Result<Self, ApiError> {
        Ok(Self {
            server: app.clone(),
            tokenizer: prompt::tokenizer(app)?.clone(),
            id: format!("chatcmpl-{}", Uuid::new_v4().simple()),
            created: now(),
            n: common.n,
            wants_logprobs: common.sampling.logprobs.is_some(),
            wants_token_ids: common.return_token_ids,
            speeches: (0..common.n).map(|_| speech()).collect(),
        })
    }

    /// Who speaks, before anything is said.
    fn opening(&self) -> impl Iterator<Item = ChunkChoice> {
        let role = Delta { role: Some("assistant"), ..Delta::text(String::new()) };
        (0..self.n).map(move |index| ChunkChoice::new(index, role.clone()))
    }

    fn tell(&mut self, piece: Piece) -> Vec<ChunkChoice> {
        match piece {
            Piece::Prompt { .. } => Vec::new(),
            Piece::Token { choice, token, text, logprobs } => {
                let said = self.speeches[choice].push(&text);
                let mut told = deltas(choice, said);
                if told.is_empty() {
                    told.push(ChunkChoice::new(choice, Delta::text(String::new())));
                }
                told[0].token_ids = self.wants_token_ids.then(|| vec![token]);
                told[0].logprobs = logprobs.map(|one| {
                    let mut logprobs = ChatLogprobs::default();
                    logprobs.push(&self.tokenizer, &one);
                    logprobs
                });
                told
            }
            Piece::End { choice, reason, text, .. } => {
                let speech = &mut self.speeches[choice];
                let mut said = speech.push(&text);
                said.extend(speech.finish());
                let called = speech.has_called() && reason == FinishReason::Stop;
                let reason = if called { "tool_calls" } else { reason.as_str() };
                let mut told = deltas(choice, said);
                let end = ChunkChoice::new(choice, Delta::default());
                told.push(ChunkChoice { finish_reason: Some(reason), ..end });
                told
            }
        }
    }
}

fn deltas(choice: usize, said: Vec<Said>) -> Vec<ChunkChoice> {
    said.into_iter().map(|said| ChunkChoice::new(choice, Delta::said(said))).collect()
}

async fn whole(
    mut teller: Teller,
    mut tally: Tally,
    mut generation: Generation,
) -> Result<Response, ApiError> {
    let empty = |index| ChatChoice::new(index, teller.wants_logprobs, teller.wants_token_ids);
    let mut choices: Vec<ChatChoice> = (0..teller.n).map(empty).collect();
    while let Some(piece) = generation.next().await {
        let piece = piece?;
        tally.count(&piece);
        for told in teller.tell(piece) {
            choices[told.index].append(told);
        }
    }
    let completion = ChatCompletion {
        id: teller.id,
        object: "chat.completion",
        created: teller.created,
        model: teller.server.model.id.clone(),
        choices,
        usage: tally.usage(),
        system_fingerprint: None,
        service_tier: None,
        strand: tally.provenance(),
    };
    Ok(Json(completion).into_response())
}

/// The answer in events: the role, text as it becomes certain, the reason, the usage.
struct Streamed {
    teller: Teller,
    tally: Tally,
    options: StreamOptions,
}

impl Streamed {
    fn chunk(&self, choices: Vec<ChunkChoice>) -> ChatChunk {
        let StreamOptions { include_usage, continuous_usage } = self.options;
        ChatChunk {
            id: self.teller.id.clone(),
            object: "chat.completion.chunk",
            created: self.teller.created,
            model: self.teller.server.model.id.clone(),
            choices,
            usage: include_usage.then(|| continuous_usage.then(|| self.tally.usage())),
            strand: None,
        }
    }

    fn told(&self, choice: ChunkChoice) -> Message {
        let strand = choice.finish_reason.map(|_| self.tally.provenance());
        Message::new(&ChatChunk { strand, ..self.chunk(vec![choice]) })
    }
}

impl Script for Streamed {
    fn opening(&mut self) -> Vec<Message> {
        self.teller.opening().map(|choice| self.told(choice)).collect()
    }

    fn piece(&mut self, piece: Piece) -> Vec<Message> {
        self.tally.count(&piece);
        let told = self.teller.tell(piece);
        told.into_iter().filter(ChunkChoice::says_something).map(|told| self.told(told)).collect()
    }

    fn closing(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        if self.options.include_usage {
            let usage = Some(Some(self.tally.usage()));
            let strand = Some(self.tally.provenance());
            messages.push(Message::new(&ChatChunk { usage, strand, ..self.chunk(Vec::new()) }));
        }
        messages.push(Message::done());
        messages
    }
}
