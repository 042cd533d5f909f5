//! From what a client wrote to the segments of a prompt. Blocking: templates and tokenizers.

use serde_json::Value;
use strand_engine::Segment;
use strand_models::{ChatTemplate, Content, Conversation, Marks, Message, SegmentKind, Tokenizer};

use super::error::ApiError;
use super::state::Server;
use super::tools;
use super::wire::messages::ChatMessage;
use crate::date;

/// A chat whose next message is wanted.
pub struct Chat {
    pub messages: Vec<ChatMessage>,
    pub tools: Option<Value>,
    pub ending: Ending,
    pub marks: Marks,
}

/// What the prompt ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// What opens the assistant's message.
    Opening,
    /// The text of the last message, which goes on.
    LastText,
    /// The last message.
    Nothing,
}

/// The prompt of a chat. What its words name stays text: nobody can close a message or open one.
pub fn of_chat(server: &Server, chat: Chat) -> Result<Vec<Segment>, ApiError> {
    let tokenizer = tokenizer(server)?;
    let marks = chat.marks;
    let last = chat.messages.len() - 1;
    let messages = chat.messages.into_iter().enumerate();
    let messages = messages.map(|(index, message)| {
        message.into_message(marks, index == last && chat.ending == Ending::LastText)
    });
    let mut messages: Vec<Message> = messages.collect();
    if server.model.needs_telling {
        tell(&mut messages, chat.tools.as_ref());
    }
    let mut conversation = Conversation {
        messages,
        tools: chat.tools,
        add_generation_prompt: chat.ending == Ending::Opening,
        date: date::today(),
        ..Conversation::default()
    };
    conversation.keep_text(marks, tokenizer);
    let segments = template(server)?.segments(tokenizer, &conversation)?;
    let segments = segments.into_iter().map(|segment| match segment.kind {
        SegmentKind::Anchor => Segment::anchor(segment.ids),
        _ => Segment::new(segment.ids),
    });
    Ok(segments.collect())
}

/// Says in words what a template without tools would leave out.
fn tell(messages: &mut Vec<Message>, tools: Option<&Value>) {
    for message in &mut *messages {
        let calls = message.tool_calls.take().into_iter().flat_map(|calls| match calls {
            Value::Array(calls) => calls,
            other => vec![other],
        });
        let calls = calls.map(|call| format!("<tool_call>{}</tool_call>", call["function"]));
        let calls: String = calls.collect();
        if let Content::Text(text) = &mut message.content {
            text.push_str(&calls);
        }
    }
    let Some(tools) = tools else { return };
    let told = tools::described(tools);
    match messages.first_mut() {
        Some(Message { role, content: Content::Text(text), .. }) if role == "system" => {
            text.push_str(&format!("\n\n{told}"));
        }
        _ => messages.insert(0, Message::new("system", told)),
    }
}

/// The prompt of a text that the client has put together itself: special tokens in it count.
pub fn of_text(
    server: &Server,
    text: &str,
    add_special_tokens: bool,
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = tokenizer(server)?;
    Ok(if add_special_tokens { tokenizer.encode(text)? } else { tokenizer.encode_plain(text)? })
}

pub fn tokenizer(server: &Server) -> Result<&Tokenizer, ApiError> {
    let missing = "this model has no tokenizer; give the prompt as token ids";
    server.engine.tokenizer().ok_or_else(|| ApiError::bad_request(missing))
}

fn template(server: &Server) -> Result<&ChatTemplate, ApiError> {
    let missing = "this model has no chat template; use /v1/completions";
    server.engine.chat_template().ok_or_else(|| ApiError::bad_request(missing))
}
