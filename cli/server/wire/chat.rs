//! `/v1/chat/completions`: what is asked and what is answered.

use serde::Serialize;
use strand_models::Marks;
use utoipa::ToSchema;

use super::common::Common;
use super::messages::{self, ChatMessage};
use crate::server::body::FromFields;
use crate::server::error::ApiError;
use crate::server::lenient::Fields;
use crate::server::logprobs::ChatLogprobs;
use crate::server::prompt::Ending;
use crate::server::state::ServerLimits;
use crate::server::structured::Form;
use crate::server::tools::{Said, Tools};
use crate::server::usage::{Provenance, Usage};

/// A request, checked as far as it can be without the model.
pub struct ChatRequest {
    pub common: Common,
    pub messages: Vec<ChatMessage>,
    pub tools: Tools,
    pub form: Option<Form>,
    pub ending: Ending,
    pub marks: Marks,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    /// `chat.completion`
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    pub system_fingerprint: Option<String>,
    pub service_tier: Option<String>,
    pub strand: Provenance,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: AnswerMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct AnswerMessage {
    /// `assistant`
    pub role: &'static str,
    pub content: Option<String>,
    pub refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
}

/// A call as a whole.
#[derive(Debug, Serialize, ToSchema)]
pub struct ToolCall {
    pub id: String,
    /// `function`
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: CalledFunction,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct CalledFunction {
    pub name: String,
    /// JSON, as text.
    pub arguments: String,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatChunk {
    pub id: String,
    /// `chat.completion.chunk`
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChunkChoice>,
    /// Null but in the last one, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strand: Option<Provenance>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChunkChoice {
    pub index: usize,
    pub delta: Delta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCallDelta>>,
}

/// A call's beginning, or more of its arguments.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ToolCallDelta {
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    pub function: FunctionDelta,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub arguments: String,
}

impl ChatChoice {
    pub fn new(index: usize, logprobs: bool, token_ids: bool) -> Self {
        let (content, role) = (Some(String::new()), "assistant");
        Self {
            index,
            message: AnswerMessage { role, content, refusal: None, tool_calls: None },
            logprobs: logprobs.then(ChatLogprobs::default),
            finish_reason: None,
            token_ids: token_ids.then(Vec::new),
        }
    }

    /// Adds what follows of the same choice.
    pub fn append(&mut self, next: ChunkChoice) {
        if let Some(more) = next.delta.content.filter(|text| !text.is_empty()) {
            self.message.content.get_or_insert_default().push_str(&more);
        }
        for delta in next.delta.tool_calls.into_iter().flatten() {
            self.message.call(delta);
        }
        if let Some(more) = next.logprobs {
            self.logprobs.get_or_insert_default().content.extend(more.content);
        }
        if let Some(more) = next.token_ids {
            self.token_ids.get_or_insert_default().extend(more);
        }
        self.finish_reason = self.finish_reason.or(next.finish_reason);
    }
}

impl AnswerMessage {
    fn call(&mut self, delta: ToolCallDelta) {
        let calls = self.tool_calls.get_or_insert_default();
        if let Some((id, name)) = delta.id.zip(delta.function.name) {
            let function = CalledFunction { name, arguments: String::new() };
            calls.push(ToolCall { id, kind: "function", function });
            // OpenAI has null where nothing but calls was said
            self.content = self.content.take().filter(|text| !text.is_empty());
        }
        if let Some(call) = calls.get_mut(delta.index) {
            call.function.arguments.push_str(&delta.function.arguments);
        }
    }
}

impl ChunkChoice {
    pub fn new(index: usize, delta: Delta) -> Self {
        Self { index, delta, logprobs: None, finish_reason: None, token_ids: None }
    }
}

impl Delta {
    pub fn text(text: String) -> Self {
        Self { content: Some(text), ..Self::default() }
    }

    pub fn said(said: Said) -> Self {
        let call = match said {
            Said::Text(text) => return Self::text(text),
            Said::Call { index, id, name } => ToolCallDelta {
                index,
                id: Some(id),
                kind: Some("function"),
                function: FunctionDelta { name: Some(name), arguments: String::new() },
            },
            Said::Arguments { index, text } => ToolCallDelta {
                index,
                id: None,
                kind: None,
                function: FunctionDelta { name: None, arguments: text },
            },
        };
        Self { tool_calls: Some(vec![call]), ..Self::default() }
    }
}

impl FromFields for ChatRequest {
    fn read(fields: &mut Fields, limits: &ServerLimits) -> Result<Self, ApiError> {
        let marks = fields.marks();
        let mut common = Common::read(fields, limits)?;
        common.sampling.max_tokens = max_tokens(fields)?;
        common.sampling.logprobs = logprobs(fields)?;
        let messages = messages::read(fields, "messages")?;
        let ending = ending(fields, &messages)?;
        let tools = Tools::read(fields)?;
        let form = Form::read(fields)?;
        Ok(Self { common, messages, tools, form, ending, marks })
    }
}

/// The newer name first.
fn max_tokens(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let older = fields.count("max_tokens", 1..=usize::MAX)?;
    Ok(fields.count("max_completion_tokens", 1..=usize::MAX)?.or(older))
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0..=ServerLimits::LOGPROBS)?;
    match top {
        Some(top) if top > 0 && !wanted => {
            let message = "top_logprobs is allowed with logprobs: true alone";
            Err(ApiError::invalid("top_logprobs", message))
        }
        _ => Ok(wanted.then(|| top.unwrap_or(0) as u32)),
    }
}

pub fn ending(fields: &mut Fields, messages: &[ChatMessage]) -> Result<Ending, ApiError> {
    let goes_on = fields.flag("continue_final_message")?.unwrap_or(false);
    let opens = fields.flag("add_generation_prompt")?;
    if !goes_on {
        return Ok(if opens.unwrap_or(true) { Ending::Opening } else { Ending::Nothing });
    }
    let refused = |message| Err(ApiError::invalid("continue_final_message", message));
    if opens == Some(true) {
        return refused("either the final message goes on, or the next one is opened");
    }
    if messages.last().map(ChatMessage::role) != Some("assistant") {
        return refused("the final message must be the assistant's to go on");
    }
    Ok(Ending::LastText)
}
