//! Commands that look at or change what was said.

use serde_json::{Value, json};

use super::Report;
use crate::chat::Chat;

pub fn system(chat: &mut Chat, text: &str) -> Report {
    let text = (!text.is_empty()).then(|| text.to_owned());
    let said = if text.is_some() { "✓ System text set" } else { "✓ System text removed" };
    chat.context.conversation.set_system(text);
    Report::new("/system", said, json!({"system": chat.context.conversation.system()}))
}

pub fn reset(chat: &mut Chat) -> Report {
    let turns = chat.context.conversation.turns().len();
    chat.context.conversation.clear();
    Report::new("/reset", "✓ New conversation", json!({"forgotten_turns": turns}))
}

pub fn history(chat: &Chat) -> Report {
    let conversation = &chat.context.conversation;
    let system = conversation.system().map(|text| ("system", text));
    let turns = conversation.turns().iter().map(|turn| (turn.role.as_str(), turn.text.as_str()));
    let lines: Vec<String> =
        system.into_iter().chain(turns).map(|(role, text)| format!("{role}: {text}")).collect();
    let text = if lines.is_empty() { "Nothing was said yet".to_owned() } else { lines.join("\n") };
    let turns = conversation.turns().iter();
    let turns: Vec<Value> =
        turns.map(|turn| json!({"role": turn.role.as_str(), "text": turn.text})).collect();
    Report::new("/history", text, json!({"system": conversation.system(), "turns": turns}))
}
