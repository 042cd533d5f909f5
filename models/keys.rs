//! The keys of one JSON object, taken out as they are understood; what is left over is refused.
//!
//! An unknown key is harmless only while it is absent in effect (null, false or empty): anything
//! else may change what the model computes, and is named instead of ignored.

use serde_json::{Map, Value};

use crate::error::Error;

/// No single size of a model reaches this; it keeps products of sizes far from overflow.
const LARGEST_SIZE: usize = 1 << 30;

pub(crate) struct Keys {
    place: String,
    map: Map<String, Value>,
}

impl Keys {
    /// `place` is put before the key in errors: `rope_scaling` gives `rope_scaling.factor`.
    pub(crate) fn new(place: &str, map: Map<String, Value>) -> Self {
        Keys { place: place.to_string(), map }
    }

    pub(crate) fn parse(what: &str, text: &str) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(text)
            .map_err(|source| Error::Json { what: what.to_string(), source })?;
        match value {
            Value::Object(map) => Ok(Keys::new("", map)),
            other => Err(Error::ConfigInvalid {
                key: what.to_string(),
                value: shown(&other),
                expected: "expected an object".to_string(),
            }),
        }
    }

    pub(crate) fn contains(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Takes the key out; null counts as absent.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    pub(crate) fn size(&mut self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        match size {
            Some(size) if (1..=LARGEST_SIZE).contains(&size) => Ok(Some(size)),
            _ => {
                let expected = format!("expected a whole number from 1 to {LARGEST_SIZE}");
                Err(self.invalid(key, &value, &expected))
            }
        }
    }

    pub(crate) fn required_size(&mut self, key: &str) -> Result<usize, Error> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number above zero.
    pub(crate) fn positive(&mut self, key: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
            _ => Err(self.invalid(key, &value, "expected a number above 0")),
        }
    }

    pub(crate) fn required_positive(&mut self, key: &str) -> Result<f64, Error> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn flag(&mut self, key: &str) -> Result<Option<bool>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.invalid(key, &other, "expected true or false")),
        }
    }

    pub(crate) fn text(&mut self, key: &str) -> Result<Option<String>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.invalid(key, &other, "expected a string")),
        }
    }

    pub(crate) fn texts(&mut self, key: &str) -> Result<Option<Vec<String>>, Error> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let texts = value.as_array().and_then(|items| {
            let texts = items.iter().map(|item| item.as_str().map(str::to_string));
            texts.collect::<Option<Vec<String>>>()
        });
        match texts {
            Some(texts) => Ok(Some(texts)),
            None => Err(self.invalid(key, &value, "expected a list of strings")),
        }
    }

    /// A token id, or a list of them.
    pub(crate) fn token_ids(&mut self, key: &str) -> Result<Vec<u32>, Error> {
        let Some(value) = self.take(key) else {
            return Ok(Vec::new());
        };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match &value {
            Value::Array(items) => items.iter().map(id).collect(),
            single => id(single).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.invalid(key, &value, "expected a token id or a list of them"))
    }

    pub(crate) fn object(&mut self, key: &str) -> Result<Option<Map<String, Value>>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.invalid(key, &other, "expected an object")),
        }
    }

    pub(crate) fn missing(&self, key: &str) -> Error {
        Error::ConfigMissing { key: self.full_name(key) }
    }

    pub(crate) fn invalid(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::ConfigInvalid {
            key: self.full_name(key),
            value: shown(value),
            expected: expected.to_string(),
        }
    }

    pub(crate) fn unsupported(&self, key: &str, value: &Value, remedy: &str) -> Error {
        Error::ConfigUnsupported {
            key: self.full_name(key),
            value: shown(value),
            remedy: remedy.to_string(),
        }
    }

    /// Refuses what nobody took, unless `neutral` knows the key or its value says "not used".
    pub(crate) fn finish(self, neutral: impl Fn(&str, &Value) -> bool) -> Result<(), Error> {
        let left = self
            .map
            .iter()
            .find(|(key, value)| !is_absent_in_effect(value) && !neutral(key, value));
        match left {
            None => Ok(()),
            Some((key, value)) => Err(self.unsupported(key, value, remedy(key))),
        }
    }

    fn full_name(&self, key: &str) -> String {
        if self.place.is_empty() { key.to_string() } else { format!("{}.{key}", self.place) }
    }
}

fn is_absent_in_effect(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn remedy(key: &str) -> &'static str {
    match key {
        "quantization_config" | "compression_config" => {
            "take the unquantized checkpoint, or a GGUF file of the model"
        }
        "auto_map" => "the model brings its own code; take a checkpoint that needs none",
        _ if key.contains("expert") => "mixtures of experts cannot run here; take a dense model",
        _ => {
            "nothing is known of this key; if it does not change what the model computes, \
             delete it from the config"
        }
    }
}

/// A value as errors print it: JSON, cut short when long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
