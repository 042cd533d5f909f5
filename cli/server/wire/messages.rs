//! The messages of a chat, as OpenAI's clients send them.

use serde_json::{Map, Value, json};
use strand_models::{Content, Marks, Message};

use crate::server::error::ApiError;
use crate::server::lenient::{Fields, wrong_type};
use crate::server::tools::{self, Style};

/// One message, checked; its text is put together once the marks are known.
#[derive(Debug)]
pub struct ChatMessage {
    role: &'static str,
    parts: Vec<TextPart>,
    tool_calls: Option<Value>,
    /// `name`, `tool_call_id`, `reasoning_content`.
    extra: Map<String, Value>,
}

#[derive(Debug)]
struct TextPart {
    text: String,
    /// `prompt_cache_breakpoint`: a reusable prefix ends behind it.
    is_prefix_end: bool,
}

const MESSAGES: usize = 4096;

/// Reads all messages, at least one.
pub fn read(fields: &mut Fields, name: &str) -> Result<Vec<ChatMessage>, ApiError> {
    let values = fields.list(name)?.ok_or_else(|| fields.missing(name))?;
    let path = fields.path(name);
    if values.is_empty() {
        return Err(ApiError::invalid(path, "there must be at least one message"));
    }
    if values.len() > MESSAGES {
        let message =
            format!("there are {} messages, at most {MESSAGES} are allowed", values.len());
        return Err(ApiError::invalid(path, message));
    }
    let messages = values.into_iter().enumerate();
    messages.map(|(index, value)| ChatMessage::read(&format!("{path}[{index}]"), value)).collect()
}

impl ChatMessage {
    pub fn role(&self) -> &'static str {
        self.role
    }

    fn read(path: &str, value: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::of_value(path, value)?;
        let role = role(&mut fields)?;
        let content = fields.value("content");
        let may_be_silent = matches!(role, "assistant" | "tool");
        if content.is_none() && !may_be_silent {
            return Err(fields.missing("content"));
        }
        let parts = parts(&fields.path("content"), content)?;
        let mut extra = Map::new();
        for name in ["name", "tool_call_id", "reasoning_content"] {
            if let Some(text) = fields.text(name)? {
                extra.insert(name.to_owned(), text.into());
            }
        }
        if role == "tool" && !extra.contains_key("tool_call_id") {
            return Err(fields.missing("tool_call_id"));
        }
        let calls = fields.list("tool_calls")?.filter(|calls| !calls.is_empty());
        let path = fields.path("tool_calls");
        let tool_calls = calls.map(|calls| tool_calls(&path, calls)).transpose()?;
        Ok(Self { role, parts, tool_calls, extra })
    }

    /// Who speaks and what is said, calls as a model of this style says them.
    pub fn into_words(self, style: Style) -> (&'static str, String) {
        let parts: Vec<String> = self.parts.into_iter().map(|part| part.text).collect();
        let calls = self.tool_calls.map(|calls| tools::spelt(&calls, style));
        (self.role, parts.join("\n") + &calls.unwrap_or_default())
    }

    /// The message as the template gets it; `ends`: the prompt ends with it.
    pub fn into_message(self, marks: Marks, ends: bool) -> Message {
        let mut text = String::new();
        for (index, part) in self.parts.into_iter().enumerate() {
            // as vLLM joins parts for templates that take one text
            if index > 0 {
                text.push('\n');
            }
            text.push_str(&part.text);
            if part.is_prefix_end {
                text.push(marks.cut);
            }
        }
        if ends {
            text.push(marks.end);
        }
        Message {
            role: self.role.to_owned(),
            content: Content::Text(text),
            tool_calls: self.tool_calls,
            extra: self.extra,
        }
    }
}

fn role(fields: &mut Fields) -> Result<&'static str, ApiError> {
    const ROLES: [(&str, &str); 6] = [
        ("system", "system"),
        // the same in words that templates know
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
        ("tool", "tool"),
        ("function", "tool"),
    ];
    let asked = fields.required_text("role")?;
    let known = ROLES.into_iter().find(|(name, _)| *name == asked).map(|(_, role)| role);
    known.ok_or_else(|| {
        let names = ROLES.map(|(name, _)| name).join(", ");
        let path = fields.path("role");
        ApiError::invalid(&path, format!("{path} is {asked:?}, it must be one of {names}"))
    })
}

fn parts(path: &str, content: Option<Value>) -> Result<Vec<TextPart>, ApiError> {
    match content {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![TextPart { text, is_prefix_end: false }]),
        Some(Value::Array(values)) => {
            let parts = values.into_iter().enumerate();
            parts.map(|(index, value)| part(&format!("{path}[{index}]"), value)).collect()
        }
        Some(other) => Err(wrong_type(path, "a string or a list of parts", &other)),
    }
}

fn part(path: &str, value: Value) -> Result<TextPart, ApiError> {
    let mut fields = Fields::of_value(path, value)?;
    let kind = fields.required_text("type")?;
    let text = match kind.as_str() {
        "text" | "input_text" | "output_text" => fields.required_text("text")?,
        "refusal" => fields.required_text("refusal")?,
        _ => {
            let path = fields.path("type");
            let message = format!("{path} is {kind:?}; this model reads text alone");
            return Err(ApiError::invalid(path, message));
        }
    };
    let breakpoint = fields.object("prompt_cache_breakpoint")?;
    Ok(TextPart { text, is_prefix_end: breakpoint.is_some() })
}

/// Calls as templates take them: arguments as an object, where they are one.
fn tool_calls(path: &str, calls: Vec<Value>) -> Result<Value, ApiError> {
    let calls = calls.into_iter().enumerate().map(|(index, call)| {
        let mut call = Fields::of_value(&format!("{path}[{index}]"), call)?;
        let id = call.text("id")?;
        let mut function = call.object("function")?.ok_or_else(|| call.missing("function"))?;
        let name = function.required_text("name")?;
        let arguments = match function.value("arguments") {
            None => json!({}),
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(Value::Object(map)) => Value::Object(map),
                _ => Value::String(text),
            },
            Some(Value::Object(map)) => Value::Object(map),
            Some(other) => {
                let path = function.path("arguments");
                return Err(wrong_type(&path, "a string of JSON", &other));
            }
        };
        let function = json!({"name": name, "arguments": arguments});
        Ok(json!({"id": id, "type": "function", "function": function}))
    });
    Ok(Value::Array(calls.collect::<Result<_, ApiError>>()?))
}
