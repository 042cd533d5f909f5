//! The fields of a request: lenient where clients are, strict where it matters.
//!
//! `16.0` is an integer, null is as if absent, unknown fields are left alone. What is out of
//! range or of another type is refused by its full name, `messages[0].content`.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};
use strand_models::Marks;

use super::error::ApiError;

/// A JSON object whose fields are taken out one by one.
#[derive(Debug)]
pub struct Fields {
    /// `messages[0].` for a field inside; nothing for the body itself.
    prefix: String,
    map: Map<String, Value>,
}

/// Fields that OpenAI's clients send and that change nothing about an answer here.
const WITHOUT_EFFECT: [&str; 9] = [
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    // of a message on a socket
    "type",
    "user",
];

impl Fields {
    /// The body of a request.
    pub fn of_body(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body)
            .map_err(|_| ApiError::bad_request("the body is not UTF-8 text"))?;
        let value = serde_json::from_str(text)
            .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))?;
        match value {
            Value::Object(map) => Ok(Self { prefix: String::new(), map }),
            other => {
                let found = kind(&other);
                Err(ApiError::bad_request(format!("the body must be an object, not {found}")))
            }
        }
    }

    /// An object that stands at `name`.
    pub fn of_value(name: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { prefix: format!("{name}."), map }),
            other => Err(wrong_type(name, "an object", &other)),
        }
    }

    /// Marks that no text in here has.
    pub fn marks(&self) -> Marks {
        Marks::absent_from(&self.map.values().collect::<Vec<_>>())
    }

    /// The same object as the whole of a request.
    pub fn into_body(self) -> Self {
        Self { prefix: String::new(), ..self }
    }

    /// A field that stays where it is.
    pub fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name)
    }

    /// Whether a field is there and not taken yet.
    pub fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// Fields that nobody has taken, and that are not known to be without effect.
    pub fn unknown(&self) -> usize {
        self.map.keys().filter(|name| !WITHOUT_EFFECT.contains(&name.as_str())).count()
    }

    /// The full name of a field.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Takes a field as it is; null is as if absent.
    pub fn value(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    pub fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let path = self.path(name);
        self.value(name).map(|value| integer(&path, &value, range)).transpose()
    }

    /// As [`Fields::integer`], for counts.
    pub fn count(
        &mut self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ApiError> {
        let end = |bound: usize| i64::try_from(bound).unwrap_or(i64::MAX);
        let found = self.integer(name, end(*range.start())..=end(*range.end()))?;
        Ok(found.map(|number| number as usize))
    }

    pub fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f32>, ApiError> {
        let path = self.path(name);
        self.value(name).map(|value| number(&path, &value, range)).transpose()
    }

    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong_type(&self.path(name), "true or false", &other)),
        }
    }

    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.path(name), "a string", &other)),
        }
    }

    /// A string that must be there.
    pub fn required_text(&mut self, name: &str) -> Result<String, ApiError> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    pub fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(wrong_type(&self.path(name), "a list", &other)),
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        let path = self.path(name);
        self.value(name).map(|value| Fields::of_value(&path, value)).transpose()
    }

    /// A string, or a list of strings.
    pub fn texts(&mut self, name: &str) -> Result<Vec<String>, ApiError> {
        match self.value(name) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text]),
            Some(Value::Array(values)) => {
                let path = self.path(name);
                let texts = values.into_iter().map(|value| match value {
                    Value::String(text) => Ok(text),
                    other => Err(wrong_type(&path, "a list of strings", &other)),
                });
                texts.collect()
            }
            Some(other) => {
                Err(wrong_type(&self.path(name), "a string or a list of strings", &other))
            }
        }
    }

    /// A list of token ids.
    pub fn tokens(&mut self, name: &str) -> Result<Option<Vec<u32>>, ApiError> {
        let path = self.path(name);
        let list = self.list(name)?;
        list.map(|values| values.iter().map(|value| token(&path, value)).collect()).transpose()
    }

    /// The refusal of a request that lacks a field.
    pub fn missing(&self, name: &str) -> ApiError {
        let path = self.path(name);
        let error = ApiError::invalid(&path, format!("{path} is required"));
        ApiError { code: Some("missing_required_parameter"), ..error }
    }
}

pub fn integer(path: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    let whole =
        |number: f64| (number.fract() == 0.0 && number.abs() < 9.0e15).then_some(number as i64);
    let (low, high) = (range.start(), range.end());
    let found = match value {
        Value::Number(number) => number.as_i64().or_else(|| number.as_f64().and_then(whole)),
        other => return Err(wrong_type(path, "an integer", other)),
    };
    found.filter(|number| range.contains(number)).ok_or_else(|| {
        ApiError::invalid(path, format!("{path} is {value}, it must be from {low} to {high}"))
    })
}

pub fn number(path: &str, value: &Value, range: RangeInclusive<f64>) -> Result<f32, ApiError> {
    let Value::Number(number) = value else {
        return Err(wrong_type(path, "a number", value));
    };
    let (low, high) = (range.start(), range.end());
    let found = number.as_f64().filter(|number| range.contains(number));
    found.map(|number| number as f32).ok_or_else(|| {
        ApiError::invalid(path, format!("{path} is {value}, it must be from {low} to {high}"))
    })
}

/// A token id. Whether the vocabulary has it is for the engine to say.
pub fn token(path: &str, value: &Value) -> Result<u32, ApiError> {
    Ok(integer(path, value, 0..=i64::from(u32::MAX))? as u32)
}

pub fn wrong_type(path: &str, expected: &str, found: &Value) -> ApiError {
    let error = ApiError::invalid(path, format!("{path} must be {expected}, not {}", kind(found)));
    ApiError { code: Some("invalid_type"), ..error }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(text: &str) -> Fields {
        Fields::of_body(text.as_bytes()).expect("it is an object")
    }

    #[test]
    fn what_clients_send_is_taken() {
        let mut body = fields(r#"{"a": 16.0, "b": null, "c": "x", "d": ["x", "y"], "e": 1}"#);
        assert_eq!(body.integer("a", 0..=20).unwrap(), Some(16));
        assert_eq!(body.integer("b", 0..=20).unwrap(), None);
        assert_eq!(body.texts("c").unwrap(), ["x"]);
        assert_eq!(body.texts("d").unwrap(), ["x", "y"]);
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_full_name() {
        let refusal = |text: &str| {
            let mut body = fields(text);
            let mut inner = body.object("in").unwrap().expect("it is there");
            let error = inner.integer("n", 1..=8).unwrap_err();
            (error.param.expect("it has a name"), error.message)
        };
        for (value, message) in [
            ("9", "in.n is 9, it must be from 1 to 8"),
            ("1.5", "in.n is 1.5, it must be from 1 to 8"),
            ("1e300", "in.n is 1e+300, it must be from 1 to 8"),
            ("18446744073709551615", "in.n is 18446744073709551615, it must be from 1 to 8"),
            ("\"3\"", "in.n must be an integer, not a string"),
            ("true", "in.n must be an integer, not true or false"),
        ] {
            let expected = ("in.n".to_owned(), message.to_owned());
            assert_eq!(refusal(&format!(r#"{{"in": {{"n": {value}}}}}"#)), expected);
        }
    }

    #[test]
    fn what_is_no_json_object_is_refused() {
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
        for text in ["", "[]", "{", "NaN", "{\"a\": NaN}", "{\"a\": 1e999}", &deep] {
            let error = Fields::of_body(text.as_bytes()).unwrap_err();
            assert_eq!(error.status, 400, "{text:.20}");
        }
        assert_eq!(Fields::of_body(b"{\"a\": \"\xff\"}").unwrap_err().status, 400);
    }
}
