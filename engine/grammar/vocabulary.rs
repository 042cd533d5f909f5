//! The model's vocabulary as a trie of bytes, as grammars walk it.

use std::sync::Arc;

use strand_models::Tokenizer;
use toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};

use crate::error::Error;

/// Longer tokens are never allowed: the trie counts its depth in ten bits.
const LONGEST_TOKEN: usize = 1000;
/// Nodes that the trie can count; each byte of a token is one at most.
const MOST_BYTES: usize = (1 << 22) - 1;

/// Each token by its bytes, as in a text: what a token stands for, not how it is spelt.
///
/// A special token is known by its name behind a byte that no text has, so that a grammar of text
/// never allows it. Ids without a token, where the model has room for more, are never allowed.
pub fn vocabulary(tokenizer: &Tokenizer, vocab_size: usize, eos: &[u32]) -> Result<TokEnv, Error> {
    let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(|id| word(tokenizer, id)).collect();
    let bytes: usize = words.iter().map(Vec::len).sum();
    if vocab_size == 0 || bytes > MOST_BYTES {
        let reason =
            format!("a vocabulary of {vocab_size} tokens and {bytes} bytes can't be walked");
        return Err(Error::Grammar { reason });
    }
    // No tokenizer: forced text is left to the model to cut into tokens, as all other text is.
    let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, INVALID_TOKEN), &words);
    let known: Vec<u32> = eos.iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
    let trie = if known.is_empty() { trie } else { trie.with_eos_tokens(&known) };
    Ok(Arc::new(ApproximateTokEnv::new(trie)))
}

fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let marker = TokTrie::SPECIAL_TOKEN_MARKER;
    let Some(bytes) = tokenizer.token_bytes(id) else { return Vec::new() };
    match tokenizer.is_special(id) {
        _ if bytes.len() > LONGEST_TOKEN => Vec::new(),
        true => [&[marker], &bytes[..]].concat(),
        // no text has that byte either
        false if bytes.first() == Some(&marker) => Vec::new(),
        false => bytes,
    }
}
