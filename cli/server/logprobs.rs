//! Log-probabilities in both of OpenAI's formats.
//!
//! Every token of an answer has an entry, the one that ended it included. That one is no part of
//! the text, so its `bytes` are null: those of all others joined are the text.

use serde::Serialize;
use serde_json::{Map, Value};
use strand_engine::TokenLogprobs;
use strand_models::Tokenizer;
use utoipa::ToSchema;

use crate::answer::shortest;

/// Of a chat.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
    /// Never used: refusals are text like any other.
    pub refusal: Option<Vec<ChatLogprob>>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatLogprob {
    pub token: String,
    pub logprob: f64,
    pub bytes: Option<Vec<u8>>,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f64,
    pub bytes: Option<Vec<u8>>,
}

/// Of a text completion: four lists of one length.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct TextLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f64>>,
    /// Token to log-probability, the likeliest first; the token itself is always among them.
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each token begins, in characters of the text.
    pub text_offset: Vec<usize>,
}

impl ChatLogprobs {
    pub fn push(&mut self, tokenizer: &Tokenizer, one: &TokenLogprobs) {
        let top = one.top.iter().map(|&(id, logprob)| TopLogprob {
            token: spelling(tokenizer, id),
            logprob: finite(logprob),
            bytes: bytes(tokenizer, id),
        });
        self.content.push(ChatLogprob {
            token: spelling(tokenizer, one.token),
            logprob: finite(one.logprob),
            bytes: bytes(tokenizer, one.token),
            top_logprobs: top.collect(),
        });
    }
}

impl TextLogprobs {
    pub fn append(&mut self, mut next: Self) {
        self.tokens.append(&mut next.tokens);
        self.token_logprobs.append(&mut next.token_logprobs);
        self.top_logprobs.append(&mut next.top_logprobs);
        self.text_offset.append(&mut next.text_offset);
    }

    /// The first token of a prompt, about which nothing can be said.
    pub fn push_first(&mut self, tokenizer: &Tokenizer, token: u32, offset: &mut usize) {
        let spelling = spelling(tokenizer, token);
        self.text_offset.push(*offset);
        *offset += spelling.chars().count();
        self.tokens.push(spelling);
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
    }

    /// The next token, which begins at `offset`.
    pub fn push(&mut self, tokenizer: &Tokenizer, one: &TokenLogprobs, offset: &mut usize) {
        let name = spelling(tokenizer, one.token);
        let likeliest = one.top.iter().map(|&(id, logprob)| (spelling(tokenizer, id), logprob));
        let mut top: Map<String, Value> =
            likeliest.map(|(name, logprob)| (name, finite(logprob).into())).collect();
        top.entry(name.clone()).or_insert_with(|| finite(one.logprob).into());
        self.top_logprobs.push(Some(top));
        self.token_logprobs.push(Some(finite(one.logprob)));
        self.text_offset.push(*offset);
        *offset += name.chars().count();
        self.tokens.push(name);
    }
}

/// A token's text; `bytes:\xe2\x80` where it is no text by itself, so that no two look the same.
pub fn spelling(tokenizer: &Tokenizer, token: u32) -> String {
    let bytes = tokenizer.token_bytes(token).unwrap_or_default();
    String::from_utf8(bytes).unwrap_or_else(|error| {
        let bytes = error.into_bytes();
        let digits: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
        format!("bytes:{digits}")
    })
}

fn bytes(tokenizer: &Tokenizer, token: u32) -> Option<Vec<u8>> {
    tokenizer.token_bytes(token).filter(|_| !tokenizer.is_special(token))
}

/// JSON has no infinity; OpenAI writes this for what can't be.
fn finite(logprob: f32) -> f64 {
    shortest(logprob.max(-9999.0))
}
