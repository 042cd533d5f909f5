//! Text to token ids and back.
//!
//! Encoding is the `tokenizers` crate's, so ids equal Hugging Face's. Decoding is done here, from
//! the bytes each token stands for: that makes it incremental by construction. It equals Hugging
//! Face's on every valid text; a run of byte-fallback tokens that is not UTF-8 yields U+FFFD where
//! the text is broken, while `tokenizers` would replace the whole run, sound characters included.
//!
//! Knows nothing of templates and of no file but `tokenizer.json`.

mod length;

use crate::error::Error;
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use tokenizers::tokenizer::{AddedVocabulary, Model, OffsetType, PreTokenizer};

/// A tokenizer; a clone shares the vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    encoder: tokenizers::Tokenizer,
    /// The added tokens, with the special ones not looked for in text.
    literal: AddedVocabulary,
    special: HashSet<u32>,
    bos: Vec<u32>,
    spelling: Spelling,
    /// Most bytes of a text for each of its tokens, where there is such a number.
    bytes_per_token: Option<usize>,
}

/// How the text of a vocabulary entry spells bytes.
#[derive(Debug, Clone, PartialEq)]
enum Spelling {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `space` stands for a blank, `<0x0A>` for a byte (with `byte_fallback`).
    Pieces { space: char, byte_fallback: bool, leading: Leading },
}

/// What of the blank that encoding puts before a text is taken away again.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Leading {
    /// So many blanks at the start of the text.
    Blanks(usize),
    /// Every blank of the first token.
    FirstToken,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size())
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes =
            std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Self::from_bytes(&bytes)
            .map_err(|error| Error::Tokenizer(format!("{}: {error}", path.display())))
    }

    /// Reads the bytes of a `tokenizer.json`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        Self::new(tokenizers::Tokenizer::from_bytes(bytes).map_err(failed)?)
    }

    /// Truncation and padding that the file asks for are for training: they are switched off.
    pub(crate) fn new(mut encoder: tokenizers::Tokenizer) -> Result<Self, Error> {
        encoder.with_truncation(None).map_err(failed)?;
        encoder.with_padding(None);
        let special = encoder
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| id)
            .collect();
        let mut literal = encoder.get_added_vocabulary().clone();
        literal.set_encode_special_tokens(true);
        let spelling = {
            let decoder = encoder.get_decoder().ok_or_else(|| {
                Error::Tokenizer("it has no decoder; ByteLevel or SentencePiece is needed".into())
            })?;
            let decoder = serde_json::to_value(decoder).map_err(|e| failed(e.into()))?;
            Spelling::from_decoder(&decoder)?
        };
        let bos = leading_tokens(&encoder)?;
        let bytes_per_token = length::bytes_per_token(&encoder, &spelling);
        Ok(Self(Arc::new(Inner { encoder, literal, special, bos, spelling, bytes_per_token })))
    }

    /// The ids of a raw prompt: what the tokenizer puts first (BOS), then the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = self.0.bos.clone();
        ids.extend(self.encode_plain(text)?);
        Ok(ids)
    }

    /// The ids of a rendered template: nothing is put first, and special tokens written in the
    /// text are special tokens, as in `apply_chat_template(tokenize=True)`.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.0.encoder.encode_fast(text, false).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of text that must stay text: `<|im_end|>` in it is its ten characters, not a token.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoder = &self.0.encoder;
        let mut pieces = self.0.literal.extract_and_normalize(encoder.get_normalizer(), text);
        if let Some(pre_tokenizer) = encoder.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        pieces.tokenize(|piece| encoder.get_model().tokenize(piece.get())).map_err(failed)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`encode_plain`](Self::encode_plain), with the bytes of the text each token covers.
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<EncodedText, Error> {
        let encoding = self.0.encoder.encode(text, false).map_err(failed)?;
        Ok(EncodedText {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// The text of `ids`, without the special tokens. Ids outside the vocabulary are skipped.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = IncrementalDecoder::new(self.clone(), &[]);
        let mut text = String::new();
        for &id in ids {
            decoder.push_onto(id, &mut text);
        }
        text.push_str(&decoder.finish());
        text
    }

    /// One token as a person would read it: special tokens by name, broken UTF-8 as U+FFFD.
    pub fn token_text(&self, id: u32) -> Option<String> {
        Some(String::from_utf8_lossy(&self.token_bytes(id)?).into_owned())
    }

    /// The bytes a token stands for inside a text; for a special token, those of its name.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.0.encoder.id_to_token(id)?;
        if self.is_special(id) {
            return Some(token.into_bytes());
        }
        Some(self.0.spelling.bytes(token))
    }

    /// How many tokens there are, added ones included; a model may have room for more.
    pub fn vocab_size(&self) -> usize {
        self.0.encoder.get_vocab_size(true)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.encoder.token_to_id(token)
    }

    /// The names of all special tokens.
    pub fn special_tokens(&self) -> Vec<String> {
        self.0.special.iter().filter_map(|&id| self.0.encoder.id_to_token(id)).collect()
    }

    /// What [`encode`](Self::encode) puts first: BOS, or nothing.
    pub fn bos(&self) -> &[u32] {
        &self.0.bos
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.contains(&id)
    }
}

/// Token ids with the byte range of the text each of them covers.
pub(crate) struct EncodedText {
    pub ids: Vec<u32>,
    pub offsets: Vec<(usize, usize)>,
}

/// Decodes a stream of tokens: never half a character, never taken back, O(1) per token.
///
/// All pushes and [`finish`](Self::finish) joined equal [`Tokenizer::decode`] of all ids.
pub struct IncrementalDecoder {
    tokenizer: Tokenizer,
    /// The start of a character whose end has not come yet.
    pending: Vec<u8>,
    /// The text has not begun: blanks may still be taken away.
    at_start: bool,
    blanks_left: usize,
}

impl IncrementalDecoder {
    /// `prompt_tail` is text that stands before the stream and is not repeated: with it the
    /// first token keeps the blank that separates it; without it the stream is a text of its own.
    pub fn new(tokenizer: Tokenizer, prompt_tail: &[u32]) -> Self {
        let blanks_left = match tokenizer.0.spelling {
            Spelling::Pieces { leading: Leading::Blanks(count), .. } => count,
            _ => 0,
        };
        let mut decoder = Self { tokenizer, pending: Vec::new(), at_start: true, blanks_left };
        let mut prompt = String::new();
        for &id in prompt_tail {
            decoder.push_onto(id, &mut prompt);
        }
        decoder.pending.clear();
        decoder
    }

    /// The text that this token completes; may be empty.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.push_onto(id, &mut text);
        text
    }

    /// What is left: U+FFFD for a character that was never completed.
    pub fn finish(&mut self) -> String {
        let broken = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&broken).into_owned()
    }

    fn push_onto(&mut self, id: u32, text: &mut String) {
        let inner = &self.tokenizer.0;
        if inner.special.contains(&id) {
            return;
        }
        let Some(token) = inner.encoder.id_to_token(id) else {
            return;
        };
        let mut bytes = match inner.spelling {
            Spelling::Pieces { space, leading: Leading::FirstToken, .. } if self.at_start => {
                token.replace(space, "").into_bytes()
            }
            _ => inner.spelling.bytes(token),
        };
        self.at_start = false;
        // A blank that is taken away is the first byte of the text, so never inside a character.
        while self.blanks_left > 0 && !bytes.is_empty() {
            if bytes[0] != b' ' {
                self.blanks_left = 0;
                break;
            }
            bytes.remove(0);
            self.blanks_left -= 1;
        }
        self.pending.extend_from_slice(&bytes);
        let kept = push_complete(&self.pending, text);
        self.pending.drain(..kept);
    }
}

/// Appends all that is complete, U+FFFD for what can't become a character, exactly as
/// `String::from_utf8_lossy` would; returns the bytes used.
fn push_complete(bytes: &[u8], text: &mut String) -> usize {
    let mut used = 0;
    loop {
        match std::str::from_utf8(&bytes[used..]) {
            Ok(valid) => {
                text.push_str(valid);
                return bytes.len();
            }
            Err(error) => {
                let end = used + error.valid_up_to();
                let valid = std::str::from_utf8(&bytes[used..end]).expect("valid up to there");
                text.push_str(valid);
                let Some(broken) = error.error_len() else {
                    return end;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                used = end + broken;
            }
        }
    }
}

impl Spelling {
    /// Reads the `decoder` of a `tokenizer.json`.
    fn from_decoder(decoder: &Value) -> Result<Self, Error> {
        let single = std::slice::from_ref(decoder);
        let steps = match decoder["decoders"].as_array() {
            Some(steps) => steps.as_slice(),
            None => single,
        };
        let (mut blank, mut byte_fallback, mut fused) = (None, false, false);
        let mut leading = Leading::Blanks(0);
        for step in steps {
            match step["type"].as_str() {
                Some("ByteLevel") => return Ok(Self::ByteLevel),
                Some("Metaspace") => {
                    blank = step["replacement"].as_str().and_then(single_char);
                    if step["prepend_scheme"] != "never" {
                        leading = Leading::FirstToken;
                    }
                }
                Some("Replace") if step["content"] == " " => {
                    blank = step["pattern"]["String"].as_str().and_then(single_char);
                }
                Some("ByteFallback") => byte_fallback = true,
                Some("Fuse") => fused = true,
                Some("Strip") if fused && step["content"] == " " && step["stop"] == 0 => {
                    let count = step["start"].as_u64().unwrap_or(0);
                    leading = Leading::Blanks(count as usize);
                }
                _ => return Err(unknown_decoder(step)),
            }
        }
        let space = blank.ok_or_else(|| unknown_decoder(decoder))?;
        Ok(Self::Pieces { space, byte_fallback, leading })
    }

    fn bytes(&self, token: String) -> Vec<u8> {
        match self {
            // A token with a character that spells no byte is taken as it stands.
            Self::ByteLevel => match token.chars().map(byte_of).collect() {
                Some(bytes) => bytes,
                None => token.into_bytes(),
            },
            Self::Pieces { space, byte_fallback, .. } => match fallback_byte(&token) {
                Some(byte) if *byte_fallback => vec![byte],
                _ => token.replace(*space, " ").into_bytes(),
            },
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 stands for
/// itself, the 68 others were given U+0100 onwards in ascending order.
fn byte_of(letter: char) -> Option<u8> {
    let code = u32::from(letter);
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match code {
        0..=0xff => printable(code).then_some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// `<0x0A>` -> 10.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let two = digits.len() == 2;
    two.then(|| u8::from_str_radix(digits, 16).ok())?
}

/// What post-processing puts before a text; what it may put after (EOS) is of no use here.
fn leading_tokens(encoder: &tokenizers::Tokenizer) -> Result<Vec<u32>, Error> {
    let plain = encoder.encode_fast("a", false).map_err(failed)?;
    let full = encoder.encode_fast("a", true).map_err(failed)?;
    let (plain, full) = (plain.get_ids(), full.get_ids());
    let start = (0..=full.len()).find(|&start| full[start..].starts_with(plain));
    match start {
        Some(count @ 0..=1) => Ok(full[..count].to_vec()),
        _ => Err(Error::Tokenizer(
            "its post-processor puts more than one token first; at most a BOS is supported".into(),
        )),
    }
}

fn single_char(text: &str) -> Option<char> {
    let mut letters = text.chars();
    letters.next().filter(|_| letters.next().is_none())
}

fn unknown_decoder(step: &Value) -> Error {
    Error::Tokenizer(format!("decoder {step} is not supported; ByteLevel and SentencePiece's are"))
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

#[cfg(test)]
pub(crate) mod tests;
