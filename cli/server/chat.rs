//! `POST /v1/chat/completions`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use strand_engine::FinishReason;

use super::asking;
use super::auth::Principal;
use super::body::Asked;
use super::error::ApiError;
use super::generation::{Generation, Piece};
use super::library::sight;
use super::logprobs::ChatLogprobs;
use super::prompt::Chat;
use super::sse::Message;
use super::state::App;
use super::structured;
use super::telling::{self, Cost, Head, Part, Teller};
use super::tools::{Said, Speech};
use super::usage::{Provenance, Usage};
use super::wire::chat::{ChatChoice, ChatChunk, ChatCompletion, ChatRequest, ChunkChoice, Delta};

pub async fn create(
    State(app): State<App>,
    principal: Principal,
    Asked(asked): Asked<ChatRequest>,
) -> Result<Response, ApiError> {
    let ChatRequest { common, messages, tools, form, ending, marks } = asked;
    app.model.check(common.model.as_deref())?;
    let shape = structured::shape(&app, form, &tools).await?;
    let chat = Chat { messages, tools: tools.offered(), ending, marks };
    let style = shape.style;
    let making = asking::prepare(&app, &principal, &common, move |server, sight| {
        sight::chat(server, sight, chat, style)
    });
    let (segments, sight) = making.await?;
    let mut request = asking::request(&app, &principal, &common, segments);
    request.limits.grammar = shape.grammar;
    let generation = Generation::start(&app, &principal, vec![request], sight).await?;
    let head = Head::new(&app, "chatcmpl", &common)?;
    let speeches = (0..common.n).map(|_| tools.speech(style)).collect();
    telling::answer(Deltas { head, speeches }, common.n, generation, common.stream).await
}

/// Tells pieces as deltas of choices.
struct Deltas {
    head: Head,
    /// By choice.
    speeches: Vec<Speech>,
}

impl Teller for Deltas {
    type Part = ChunkChoice;

    /// Who speaks.
    fn opening(&self) -> Vec<ChunkChoice> {
        let role = Delta { role: Some("assistant"), ..Delta::text(String::new()) };
        (0..self.head.n).map(move |index| ChunkChoice::new(index, role.clone())).collect()
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
                told[0].token_ids = self.head.wants_token_ids.then(|| vec![token]);
                told[0].logprobs = logprobs.map(|one| {
                    let mut logprobs = ChatLogprobs::default();
                    logprobs.push(&self.head.tokenizer, &one);
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

    fn whole(self, parts: Vec<ChunkChoice>, usage: Usage, strand: Provenance) -> Response {
        let Head { id, created, model, n, wants_logprobs, wants_token_ids, .. } = self.head;
        let empty = |index| ChatChoice::new(index, wants_logprobs, wants_token_ids);
        let mut choices: Vec<ChatChoice> = (0..n).map(empty).collect();
        parts.into_iter().for_each(|part| choices[part.index].append(part));
        let completion = ChatCompletion {
            id,
            object: "chat.completion",
            created,
            model,
            choices,
            usage,
            system_fingerprint: None,
            service_tier: None,
            strand,
        };
        Json(completion).into_response()
    }

    fn event(&self, part: Option<ChunkChoice>, cost: Cost) -> Message {
        Message::new(&ChatChunk {
            id: self.head.id.clone(),
            object: "chat.completion.chunk",
            created: self.head.created,
            model: self.head.model.clone(),
            choices: part.into_iter().collect(),
            usage: cost.usage,
            strand: cost.strand,
        })
    }
}

impl Part for ChunkChoice {
    fn says_something(&self) -> bool {
        let more = self.logprobs.is_some() || self.token_ids.is_some();
        let more = more || self.delta.tool_calls.is_some();
        let text = self.delta.content.as_ref().is_some_and(|text| !text.is_empty());
        text || more || self.finish_reason.is_some()
    }

    fn ends(&self) -> bool {
        self.finish_reason.is_some()
    }
}

fn deltas(choice: usize, said: Vec<Said>) -> Vec<ChunkChoice> {
    said.into_iter().map(|said| ChunkChoice::new(choice, Delta::said(said))).collect()
}
