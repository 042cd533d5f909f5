//! How few tokens a text can have, by its bytes alone: what can't fit need not be tokenized.
//!
//! A bound that holds for every text, or none. There is one where each byte of a text ends up in
//! a token: the alphabet has all bytes, and nothing that comes before takes any away.

use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer as Encoder};

use super::{Spelling, Tokenizer, byte_of};

/// Bytes of a text that composing (NFC) can make one of: at most 3.5 (U+1FBE U+0308 U+0301, which
/// is U+0390), as a weight for each decomposed character shows.
const COMPOSED: usize = 4;

impl Tokenizer {
    /// The fewest tokens that a text of so many bytes can have, as far as that is known.
    pub fn fewest_tokens(&self, bytes: usize) -> usize {
        self.0.bytes_per_token.map_or(0, |most| bytes.div_ceil(most))
    }
}

/// Most bytes of a text for each of its tokens; `None` where there is no such number. Looks at the
/// whole vocabulary.
pub(super) fn bytes_per_token(encoder: &Encoder, spelling: &Spelling) -> Option<usize> {
    let added = encoder.get_added_tokens_decoder();
    // these take blanks beside them, however many
    let takes_more = added.values().any(|token| token.lstrip || token.rstrip);
    if takes_more || !has_all_bytes(encoder, spelling) {
        return None;
    }
    let factor = of_normalizer(&serde_json::to_value(encoder.get_normalizer()).ok()?)?;
    keeps_all(&serde_json::to_value(encoder.get_pre_tokenizer()).ok()?).then_some(())?;
    let ids = 0..encoder.get_vocab_size(true) as u32;
    let tokens = ids.filter_map(|id| encoder.id_to_token(id));
    let longest = tokens.map(|token| match spelling {
        Spelling::ByteLevel => token.chars().count(),
        Spelling::Pieces { .. } => token.len(),
    });
    longest.max().map(|longest| longest * factor)
}

/// Whether there is a token for whatever byte comes.
fn has_all_bytes(encoder: &Encoder, spelling: &Spelling) -> bool {
    let ModelWrapper::BPE(model) = encoder.get_model() else { return false };
    let has = |token: &str| encoder.token_to_id(token).is_some();
    match spelling {
        Spelling::ByteLevel => {
            let mut letters = ('\0'..='\u{143}').filter(|letter| byte_of(*letter).is_some());
            letters.all(|letter| has(letter.encode_utf8(&mut [0; 4])))
        }
        Spelling::Pieces { .. } => {
            model.byte_fallback && (0..=255u8).all(|byte| has(&format!("<0x{byte:02X}>")))
        }
    }
}

/// How much shorter a normalizer can make a text; `None` where that is not known.
fn of_normalizer(normalizer: &Value) -> Option<usize> {
    match normalizer["type"].as_str() {
        None => normalizer.is_null().then_some(1),
        Some("NFC") => Some(COMPOSED),
        Some("Prepend") => Some(1),
        // a blank becomes a longer one
        Some("Replace") => {
            let (from, to) = (normalizer["pattern"]["String"].as_str()?, &normalizer["content"]);
            to.as_str().is_some_and(|to| to.len() >= from.len()).then_some(1)
        }
        Some("Sequence") => {
            normalizer["normalizers"].as_array()?.iter().map(of_normalizer).product()
        }
        Some(_) => None,
    }
}

/// Whether a pre-tokenizer leaves every byte in.
fn keeps_all(pre_tokenizer: &Value) -> bool {
    match pre_tokenizer["type"].as_str() {
        None => pre_tokenizer.is_null(),
        Some("Split") => pre_tokenizer["behavior"] != "Removed",
        Some("ByteLevel" | "Metaspace" | "Digits") => true,
        Some("Sequence") => {
            let steps = pre_tokenizer["pretokenizers"].as_array();
            steps.is_some_and(|steps| steps.iter().all(keeps_all))
        }
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{FIXTURES, fixture_json, tokenizer};
    use super::*;

    #[test]
    fn no_text_has_fewer_tokens_than_its_bytes_say() {
        for name in FIXTURES {
            let tokenizer = tokenizer(name);
            let most = tokenizer.0.bytes_per_token.expect("all of these keep every byte");
            let mut texts: Vec<String> =
                ["\u{1fbe}\u{308}\u{301}", "\u{212a}", "▁", " ", "🙂", "a"]
                    .map(|text| text.repeat(3000))
                    .to_vec();
            let ids = 0..tokenizer.vocab_size() as u32;
            let tokens = ids.filter_map(|id| tokenizer.token_text(id));
            texts.extend(tokens.max_by_key(String::len).map(|token| token.repeat(500)));
            for text in texts {
                let count = tokenizer.encode_plain(&text).expect("it is text").len();
                assert!(
                    count * most >= text.len(),
                    "{name}: {count} tokens of {} bytes",
                    text.len()
                );
                let start: String = text.chars().take(8).collect();
                let count = tokenizer.encode_text(&text).expect("it is text").len();
                assert!(count * most >= text.len(), "{name}: {count} tokens of {start}...");
            }
        }
    }

    #[test]
    fn where_a_text_may_lose_bytes_there_is_no_bound() {
        let of = |change: &dyn Fn(&mut Value)| {
            let mut json = fixture_json("chatml", "tokenizer.json");
            change(&mut json);
            let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes());
            tokenizer.expect("it can be read").0.bytes_per_token
        };
        assert!(of(&|_| ()).is_some());
        let strip = serde_json::json!({"type": "Strip", "strip_left": true, "strip_right": true});
        assert_eq!(of(&|json| json["normalizer"] = strip.clone()), None);
        assert_eq!(of(&|json| json["added_tokens"][0]["rstrip"] = true.into()), None);
        let removed = serde_json::json!("Removed");
        let split = |json: &mut Value| {
            json["pre_tokenizer"]["pretokenizers"][0]["behavior"] = removed.clone();
        };
        assert_eq!(of(&split), None);
    }
}
