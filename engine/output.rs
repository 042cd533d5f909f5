//! From generated tokens to text that may be shown: whole characters, no stop strings.

use strand_models::{IncrementalDecoder, Tokenizer};

use crate::request::Limits;

/// The text of one choice as it grows.
pub(crate) struct OutputText {
    /// Absent where the model has no tokenizer: tokens alone are reported then.
    decoder: Option<IncrementalDecoder>,
    filter: StopFilter,
    /// Tokens that stop strings are not yet looked for in (`min_tokens`, as in vLLM).
    unstoppable: usize,
}

impl OutputText {
    pub fn new(tokenizer: Option<&Tokenizer>, prompt: &[u32], limits: &Limits) -> Self {
        Self {
            decoder: tokenizer.map(|tokenizer| IncrementalDecoder::new(tokenizer.clone(), prompt)),
            filter: StopFilter::new(&limits.stop),
            unstoppable: limits.min_tokens,
        }
    }

    /// Adds a token; returns what is certain by now and whether a stop string was met.
    pub fn push(&mut self, token: u32) -> (String, bool) {
        let Some(decoder) = &mut self.decoder else { return (String::new(), false) };
        let text = decoder.push(token);
        match self.unstoppable.checked_sub(1) {
            None => self.filter.push(&text),
            Some(left) => {
                self.unstoppable = left;
                (text, false)
            }
        }
    }

    /// The rest, once no token will follow.
    pub fn finish(&mut self) -> String {
        let tail = self.decoder.as_mut().map(IncrementalDecoder::finish);
        let (mut text, stopped) = self.filter.push(&tail.unwrap_or_default());
        if !stopped {
            text.push_str(&self.filter.take_held());
        }
        text
    }
}

/// Holds text back while it might be the beginning of a stop string.
struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// Returns text that is certain, and whether a stop string ended it.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            return (self.take_held(), true);
        }
        let certain = self.held.len() - self.longest_beginning();
        let held = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn longest_beginning(&self) -> usize {
        let ends = self.held.char_indices().map(|(at, _)| &self.held[at..]);
        ends.filter(|end| self.stops.iter().any(|stop| stop.starts_with(end)))
            .map(str::len)
            .max()
            .unwrap_or(0)
    }

    fn take_held(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown for text that arrives in the given pieces, and whether it stopped.
    fn shown(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut filter = StopFilter::new(&stops);
        let mut all = String::new();
        for piece in pieces {
            let (text, stopped) = filter.push(piece);
            all.push_str(&text);
            if stopped {
                return (all, true);
            }
        }
        all.push_str(&filter.take_held());
        (all, false)
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_not_shown() {
        assert_eq!(shown(&["END"], &["one E", "N", "D two"]), ("one ".into(), true));
        assert_eq!(shown(&["END"], &["one E", "N", "T"]), ("one ENT".into(), false));
        assert_eq!(shown(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
    }

    #[test]
    fn the_earliest_of_several_stop_strings_ends_the_text() {
        assert_eq!(shown(&["two", "one"], &["zero one two"]), ("zero ".into(), true));
    }

    #[test]
    fn text_that_begins_no_stop_string_is_shown_at_once() {
        let mut filter = StopFilter::new(&["\n\n".to_string()]);
        assert_eq!(filter.push("héllo"), ("héllo".to_string(), false));
        assert_eq!(filter.push("\n"), (String::new(), false));
        assert_eq!(filter.push("x"), ("\nx".to_string(), false));
    }
}
