//! From what a client wrote to the segments of a prompt. Blocking: templates and tokenizers.

use serde_json::Value;
use strand_engine::Segment;
use strand_models::{ChatTemplate, Content, Conversation, Marks, Message, SegmentKind, Tokenizer};

use super::error::ApiError;
use super::state::Server;
use super::tools::{self, Style};
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
    let marks = chat.marks;
    let conversation = conversation(server, chat);
    check_rendering(server, &conversation, Some(marks))?;
    segments(server, conversation, marks)
}

/// The same, however long it is.
pub fn of_any_chat(server: &Server, chat: Chat) -> Result<Vec<Segment>, ApiError> {
    let marks = chat.marks;
    segments(server, conversation(server, chat), marks)
}

fn conversation(server: &Server, chat: Chat) -> Conversation {
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
    Conversation {
        messages,
        tools: chat.tools,
        add_generation_prompt: chat.ending == Ending::Opening,
        date: date::today(),
        ..Conversation::default()
    }
}

fn segments(
    server: &Server,
    mut conversation: Conversation,
    marks: Marks,
) -> Result<Vec<Segment>, ApiError> {
    let tokenizer = tokenizer(server)?;
    conversation.keep_text(marks, tokenizer);
    let segments = template(server)?.segments(tokenizer, &conversation)?;
    let segments = segments.into_iter().map(|segment| match segment.kind {
        SegmentKind::Anchor => Segment::anchor(segment.ids),
        _ => Segment::new(segment.ids),
    });
    Ok(segments.collect())
}

/// Refuses what can't be so short as the model needs it, before it is tokenized: that can take
/// seconds a megabyte.
pub fn check_length(server: &Server, bytes: usize, param: &str) -> Result<(), ApiError> {
    let most = server.engine.plan().max_model_len;
    let fewest = tokenizer(server)?.fewest_tokens(bytes);
    if fewest < most {
        return Ok(());
    }
    let message = format!(
        "this model's maximum context length is {most} tokens, but {param} has at least {fewest} \
         ({bytes} bytes), which leaves no room for an answer; shorten it"
    );
    Err(ApiError::too_long(message, param))
}

/// The same for a message that is part of every prompt, whatever gives way.
pub fn check_message(server: &Server, role: &str, text: &str) -> Result<(), ApiError> {
    let messages = vec![Message::new(role, text)];
    check_rendering(server, &Conversation { messages, ..Conversation::default() }, None)
}

/// The same for what a template makes of a conversation, which may be less than was said.
fn check_rendering(
    server: &Server,
    conversation: &Conversation,
    marks: Option<Marks>,
) -> Result<(), ApiError> {
    let said = |message: &Message| match &message.content {
        Content::Text(text) => text.len(),
        _ => 0,
    };
    let tools = conversation.tools.as_ref().map_or(0, |tools| tools.to_string().len());
    let said = conversation.messages.iter().map(said).sum::<usize>() + tools;
    if check_length(server, said, "messages").is_ok() {
        return Ok(());
    }
    let text = template(server)?.render(conversation)?;
    let (end, cuts) = marks.map_or((text.len(), 0), |marks| {
        let end = text.find(marks.end).unwrap_or(text.len());
        (end, text[..end].matches(marks.cut).count() * marks.cut.len_utf8())
    });
    check_length(server, end - cuts, "messages")
}

/// Says in words what a template without tools would leave out.
fn tell(messages: &mut Vec<Message>, tools: Option<&Value>) {
    for message in &mut *messages {
        let calls = message.tool_calls.take();
        if let (Some(calls), Content::Text(text)) = (calls, &mut message.content) {
            text.push_str(&tools::spelt(&calls, Style::Tagged));
        }
    }
    let Some(tools) = tools else { return };
    match messages.first_mut() {
        Some(Message { role, content: Content::Text(text), .. }) if role == "system" => {
            *text = tools::told(Some(text), tools);
        }
        _ => messages.insert(0, Message::new("system", tools::told(None, tools))),
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
