//! `/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them.

use axum::Json;
use axum::extract::State;
use strand_models::{ChatTemplate, IncrementalDecoder, Tokenizer};

use super::asking::blocking;
use super::body::Asked;
use super::error::ApiError;
use super::logprobs::spelling;
use super::prompt;
use super::state::App;
use super::wire::tokens::{
    DetokenizeRequest, Detokenized, Said, TokenizeRequest, Tokenized, TokenizerInfo,
};

pub async fn tokenize(
    State(app): State<App>,
    Asked(asked): Asked<TokenizeRequest>,
) -> Result<Json<Tokenized>, ApiError> {
    app.model.check(asked.model.as_deref())?;
    let answer = blocking(&app, move |server| {
        let tokens = match asked.said {
            Said::Chat(chat) => {
                let segments = prompt::of_any_chat(server, chat)?;
                segments.into_iter().flat_map(|segment| segment.tokens).collect()
            }
            Said::Text(text) => prompt::of_text(server, &text, asked.add_special_tokens)?,
        };
        let tokenizer = prompt::tokenizer(server)?;
        let texts = || tokens.iter().map(|&token| spelling(tokenizer, token)).collect::<Vec<_>>();
        Ok(Tokenized {
            count: tokens.len(),
            max_model_len: server.engine.plan().max_model_len,
            token_strs: asked.wants_texts.then(texts),
            tokens,
        })
    });
    Ok(Json(answer.await?))
}

pub async fn detokenize(
    State(app): State<App>,
    Asked(asked): Asked<DetokenizeRequest>,
) -> Result<Json<Detokenized>, ApiError> {
    let DetokenizeRequest { model, tokens } = asked;
    app.model.check(model.as_deref())?;
    let tokenizer = prompt::tokenizer(&app)?;
    if let Some(token) = tokens.iter().find(|&&token| tokenizer.token_bytes(token).is_none()) {
        let message = format!("tokens names {token}, which the vocabulary does not have");
        return Err(ApiError::invalid("tokens", message));
    }
    Ok(Json(Detokenized { prompt: with_special(tokenizer, &tokens) }))
}

/// What is said of the tokenizer: enough for a client that works with token ids.
pub async fn info(State(app): State<App>) -> Result<Json<TokenizerInfo>, ApiError> {
    let tokenizer = prompt::tokenizer(&app)?;
    let template = app.engine.chat_template();
    let special = template.map(|template| template.special_tokens().clone());
    Ok(Json(TokenizerInfo {
        tokenizer_class: "PreTrainedTokenizerFast",
        vocab_size: tokenizer.vocab_size(),
        model_max_length: app.engine.plan().max_model_len,
        chat_template: template.map(ChatTemplate::source),
        special_tokens: special.unwrap_or_default(),
    }))
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
