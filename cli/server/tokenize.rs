//! `/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use strand_models::{IncrementalDecoder, Tokenizer};

use super::asking::blocking;
use super::error::ApiError;
use super::lenient::Fields;
use super::logprobs::spelling;
use super::prompt::{self, Chat};
use super::state::App;
use super::tools::Tools;
use super::wire::chat;
use super::wire::messages;

pub async fn tokenize(State(app): State<App>, mut fields: Fields) -> Result<Json<Value>, ApiError> {
    app.model.check(fields.text("model")?.as_deref())?;
    let wants_texts = fields.flag("return_token_strs")?.unwrap_or(false);
    let special = fields.flag("add_special_tokens")?.unwrap_or(true);
    let marks = fields.marks();
    let text = fields.text("prompt")?;
    let chat = match text {
        Some(_) => None,
        None => {
            let messages = messages::read(&mut fields, "messages")?;
            let ending = chat::ending(&mut fields, &messages)?;
            let tools = Tools::read(&mut fields)?.offered();
            Some(Chat { messages, tools, ending, marks })
        }
    };
    let answer = blocking(&app, move |server| {
        let tokens = match chat {
            Some(chat) => {
                let segments = prompt::of_chat(server, chat)?;
                segments.into_iter().flat_map(|segment| segment.tokens).collect()
            }
            None => prompt::of_text(server, &text.unwrap_or_default(), special)?,
        };
        let tokenizer = prompt::tokenizer(server)?;
        let texts = || tokens.iter().map(|&token| spelling(tokenizer, token)).collect::<Vec<_>>();
        Ok(json!({
            "count": tokens.len(),
            "max_model_len": server.engine.plan().max_model_len,
            "tokens": tokens,
            "token_strs": wants_texts.then(texts),
        }))
    });
    Ok(Json(answer.await?))
}

pub async fn detokenize(
    State(app): State<App>,
    mut fields: Fields,
) -> Result<Json<Value>, ApiError> {
    app.model.check(fields.text("model")?.as_deref())?;
    let tokens = fields.tokens("tokens")?.ok_or_else(|| fields.missing("tokens"))?;
    let tokenizer = prompt::tokenizer(&app)?;
    if let Some(token) = tokens.iter().find(|&&token| tokenizer.token_bytes(token).is_none()) {
        let message = format!("tokens names {token}, which the vocabulary does not have");
        return Err(ApiError::invalid("tokens", message));
    }
    Ok(Json(json!({"prompt": with_special(tokenizer, &tokens)})))
}

/// What is said of the tokenizer: enough for a client that works with token ids.
pub async fn info(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let tokenizer = prompt::tokenizer(&app)?;
    let mut info = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": tokenizer.vocab_size(),
        "model_max_length": app.engine.plan().max_model_len,
    });
    if let Some(template) = app.engine.chat_template() {
        info["chat_template"] = template.source().into();
        for (name, token) in template.special_tokens() {
            info[name] = token.as_str().into();
        }
    }
    Ok(Json(info))
}

/// The text of tokens, special ones by their names.
pub fn with_special(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let mut decoder = IncrementalDecoder::new(tokenizer.clone(), &[]);
    let mut text = String::new();
    for &token in tokens {
        if tokenizer.is_special(token) {
            text.push_str(&decoder.finish());
            text.push_str(&tokenizer.token_text(token).unwrap_or_default());
        } else {
            text.push_str(&decoder.push(token));
        }
    }
    text.push_str(&decoder.finish());
    text
}
