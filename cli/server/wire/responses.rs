//! `/v1/responses`: what is asked, as the chat that it means.

use serde::Serialize;
use serde_json::{Map, Value, json};
use strand_models::Marks;
use utoipa::ToSchema;

use super::common::{self, Common, StreamOptions};
use super::messages::{self, ChatMessage};
use crate::server::body::FromFields;
use crate::server::error::ApiError;
use crate::server::lenient::{Fields, wrong_type};
use crate::server::state::ServerLimits;
use crate::server::structured::Form;
use crate::server::tools::Tools;
use crate::server::usage::{CompletionDetails, PromptDetails, Provenance};

/// A request, checked as far as it can be without the model.
pub struct ResponseRequest {
    pub common: Common,
    /// The conversation in the shape of chat completions, without instructions.
    pub said: Vec<Value>,
    pub instructions: Option<String>,
    pub tools: Tools,
    pub form: Option<Form>,
    pub previous: Option<String>,
    /// What the answer repeats of its request.
    pub echo: Map<String, Value>,
}

/// An answer, which grows field by field: this is what becomes of it. What it repeats of its
/// request stands there too.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResponseObject {
    id: String,
    /// `response`
    object: &'static str,
    created_at: u64,
    completed_at: u64,
    /// `completed`, or `incomplete` where `incomplete_details` says why
    status: &'static str,
    model: String,
    /// Messages with text, and calls of functions.
    output: Vec<Map<String, Value>>,
    usage: ResponseUsage,
    error: Option<Map<String, Value>>,
    incomplete_details: Option<Map<String, Value>>,
    tools: Vec<Value>,
    tool_choice: Value,
    parallel_tool_calls: bool,
    metadata: Map<String, Value>,
    text: Map<String, Value>,
    truncation: &'static str,
    store: bool,
    background: bool,
    strand: Provenance,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ResponseUsage {
    input_tokens: usize,
    input_tokens_details: PromptDetails,
    output_tokens: usize,
    output_tokens_details: CompletionDetails,
    total_tokens: usize,
}

/// Fields that an answer repeats, and what stands there by default.
const ECHOED: [(&str, Value); 13] = [
    ("instructions", Value::Null),
    ("max_output_tokens", Value::Null),
    ("metadata", Value::Null),
    ("parallel_tool_calls", Value::Bool(true)),
    ("previous_response_id", Value::Null),
    ("prompt_cache_key", Value::Null),
    ("reasoning", Value::Null),
    ("safety_identifier", Value::Null),
    ("temperature", Value::Null),
    ("text", Value::Null),
    ("tools", Value::Null),
    ("top_p", Value::Null),
    ("user", Value::Null),
];

impl FromFields for ResponseRequest {
    fn read(fields: &mut Fields, limits: &ServerLimits) -> Result<Self, ApiError> {
        let echo = echo(fields);
        refuse_what_is_not_done(fields)?;
        let streams = fields.flag("stream")?.unwrap_or(false);
        let mut common = Common {
            model: fields.text("model")?,
            n: 1,
            sampling: common::sampling(fields)?,
            stream: streams.then(StreamOptions::default),
            cache_salt: common::cache_salt(fields)?,
            ..Common::default()
        };
        common.sampling.max_tokens = fields.count("max_output_tokens", 1..=usize::MAX)?;
        common.sampling.logprobs = logprobs(fields)?;
        let mut text = fields.object("text")?;
        let format = text.as_mut().map(|text| text.object("format")).transpose()?.flatten();
        let form = format.map(|format| Form::of_format("text.format", format)).transpose()?;
        // an empty list is what some clients send for none
        let tools = match fields.peek("tools").and_then(Value::as_array) {
            Some(list) if list.is_empty() => Tools::default(),
            _ => Tools::read(fields)?,
        };
        Ok(Self {
            said: said(fields, limits)?,
            instructions: fields.text("instructions")?,
            previous: fields.text("previous_response_id")?,
            form: form.flatten(),
            common,
            tools,
            echo,
        })
    }
}

impl ResponseRequest {
    /// The messages of the chat, which begins with `before`, and marks that none of them has.
    pub fn messages(&self, before: &[Value]) -> Result<(Vec<ChatMessage>, Marks), ApiError> {
        let instructions = self.instructions.iter();
        let instructions = instructions.map(|text| json!({"role": "system", "content": text}));
        let all: Vec<Value> =
            instructions.chain(before.iter().chain(&self.said).cloned()).collect();
        let tools = self.tools.offered().unwrap_or_default();
        let marks = Marks::absent_from(&all.iter().chain([&tools]).collect::<Vec<_>>());
        let mut fields = Fields::of_value("input", json!({"messages": all}))?;
        Ok((messages::read(&mut fields, "messages")?, marks))
    }
}

fn echo(fields: &Fields) -> Map<String, Value> {
    let mut echo: Map<String, Value> = ECHOED
        .iter()
        .map(|(name, default)| ((*name).to_owned(), fields.peek(name).unwrap_or(default).clone()))
        .collect();
    let default = |echo: &mut Map<String, Value>, name: &str, value: Value| {
        if echo.get(name).is_none_or(Value::is_null) {
            echo.insert(name.to_owned(), value);
        }
    };
    default(&mut echo, "metadata", json!({}));
    default(&mut echo, "text", json!({"format": {"type": "text"}}));
    default(&mut echo, "tools", json!([]));
    default(&mut echo, "parallel_tool_calls", json!(true));
    let choice = fields.peek("tool_choice").cloned().unwrap_or_else(|| json!("auto"));
    echo.insert("tool_choice".to_owned(), choice);
    echo.insert("truncation".to_owned(), json!("disabled"));
    echo.insert("store".to_owned(), json!(false));
    echo.insert("background".to_owned(), json!(false));
    echo
}

/// Ignoring these would answer another question.
fn refuse_what_is_not_done(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["conversation", "prompt"] {
        if fields.value(name).is_some() {
            return Err(ApiError::invalid(name, format!("{name} is not kept here; send input")));
        }
    }
    if fields.flag("background")?.unwrap_or(false) {
        return Err(ApiError::invalid("background", "answers are given at once, not later"));
    }
    if fields.text("truncation")?.is_some_and(|how| how != "disabled") {
        let message = "truncation must be \"disabled\": nothing is left out of an input";
        return Err(ApiError::invalid("truncation", message));
    }
    Ok(())
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let top = fields.count("top_logprobs", 0..=ServerLimits::LOGPROBS)?;
    let included = fields.texts("include")?;
    let wanted = included.iter().any(|name| name == "message.output_text.logprobs");
    Ok((wanted || top.is_some_and(|top| top > 0)).then(|| top.unwrap_or(0) as u32))
}

/// The input as messages of a chat.
fn said(fields: &mut Fields, limits: &ServerLimits) -> Result<Vec<Value>, ApiError> {
    let items = match fields.value("input") {
        None => return Err(fields.missing("input")),
        Some(Value::String(text)) => return Ok(vec![json!({"role": "user", "content": text})]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("input", "a string or a list of items", &other)),
    };
    if items.is_empty() || items.len() > limits.body {
        return Err(ApiError::invalid("input", "input must have at least one item"));
    }
    let mut messages = Vec::new();
    for (index, item) in items.into_iter().enumerate() {
        add_item(&format!("input[{index}]"), item, &mut messages)?;
    }
    Ok(messages)
}

/// Adds an item, as the message that it is in a chat.
pub fn add_item(path: &str, item: Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::of_value(path, item.clone())?;
    let kind = fields.text("type")?.unwrap_or_else(|| "message".to_owned());
    match kind.as_str() {
        "message" => messages.push(item),
        "function_call" => {
            let call = json!({"id": fields.required_text("call_id")?, "type": "function",
                "function": {"name": fields.required_text("name")?,
                             "arguments": fields.required_text("arguments")?}});
            let last = messages.last_mut().and_then(|last| last["tool_calls"].as_array_mut());
            match last {
                Some(calls) => calls.push(call),
                None => messages
                    .push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
            }
        }
        "function_call_output" => messages.push(json!({
            "role": "tool",
            "tool_call_id": fields.required_text("call_id")?,
            "content": fields.value("output").ok_or_else(|| fields.missing("output"))?,
        })),
        // what a model thought before is not shown to it again
        "reasoning" => {}
        other => {
            let message = format!("{path}.type is {other:?}, which this model can't read");
            return Err(ApiError::invalid(format!("{path}.type"), message));
        }
    }
    Ok(())
}
