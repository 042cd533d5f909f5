//! What an answer has to look like: JSON, a schema, an expression, a grammar, a call.

use std::sync::OnceLock;

use serde_json::{Value, json};
use strand_engine::EngineHandle;
use strand_engine::grammar::{Grammar, GrammarSpec, Grammars};

use super::asking::blocking;
use super::error::ApiError;
use super::lenient::{Fields, wrong_type};
use super::state::App;
use super::tools::{Style, Tool, Tools, choice_schema, either_schema};

/// What was asked for, and under which name.
#[derive(Debug, Clone, PartialEq)]
pub struct Form {
    param: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Object,
    Schema(Value),
    Regex(String),
    Lark(String),
}

const CHOICES: usize = 1024;

impl Form {
    /// `response_format`, or vLLM's `structured_outputs` and `guided_*`; one at most.
    pub fn read(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let mut forms = Vec::new();
        if let Some(format) = fields.object("response_format")? {
            forms.extend(Self::of_format("response_format", format)?);
        }
        if let Some(mut inner) = fields.object("structured_outputs")? {
            let names = ["json", "regex", "choice", "grammar", "json_object"];
            let found = Self::extensions(&mut inner, names)?;
            if found.is_empty() {
                let message = "structured_outputs must have json, regex, choice or grammar";
                return Err(ApiError::invalid("structured_outputs", message));
            }
            forms.extend(found);
        }
        let names = [
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_json_object",
        ];
        forms.extend(Self::extensions(fields, names)?);
        if forms.len() > 1 {
            let (first, other) = (&forms[0].param, &forms[1].param);
            let message = format!("{other} and {first} ask for two forms, one can be met");
            return Err(ApiError::invalid(other.clone(), message));
        }
        Ok(forms.pop())
    }

    /// `{"type": .., "json_schema": {"schema": ..}}`, or with `schema` beside the type.
    pub fn of_format(name: &str, mut fields: Fields) -> Result<Option<Self>, ApiError> {
        let kind = match fields.required_text("type")?.as_str() {
            "text" => return Ok(None),
            "json_object" => Kind::Object,
            "json_schema" => {
                let mut inner = match fields.object("json_schema")? {
                    Some(inner) => inner,
                    None if fields.has("schema") => fields,
                    None => return Err(fields.missing("json_schema")),
                };
                let path = inner.path("schema");
                let schema = inner.value("schema").ok_or_else(|| inner.missing("schema"))?;
                return Ok(Some(Self { kind: Kind::Schema(checked(&path, schema)?), param: path }));
            }
            other => {
                let path = fields.path("type");
                let expected = "it must be text, json_object or json_schema";
                return Err(ApiError::invalid(&path, format!("{path} is {other:?}, {expected}")));
            }
        };
        Ok(Some(Self { param: name.to_owned(), kind }))
    }

    /// Fields for a schema, an expression, a list, a grammar, and any object.
    fn extensions(fields: &mut Fields, names: [&str; 5]) -> Result<Vec<Self>, ApiError> {
        let [json, regex, choice, grammar, object] = names;
        let mut forms = Vec::new();
        let mut found = |name: &str, fields: &Fields, kind| {
            forms.push(Self { param: fields.path(name), kind });
        };
        if let Some(value) = fields.value(json) {
            let path = fields.path(json);
            // a schema, or its text
            let schema = match value {
                Value::String(text) => serde_json::from_str(&text)
                    .map_err(|error| ApiError::invalid(&path, format!("{path}: {error}")))?,
                other => other,
            };
            found(json, fields, Kind::Schema(checked(&path, schema)?));
        }
        if let Some(text) = fields.text(regex)? {
            found(regex, fields, Kind::Regex(text));
        }
        if fields.has(choice) {
            let choices = fields.texts(choice)?;
            if choices.is_empty() || choices.len() > CHOICES {
                let message = format!("{choice} must have 1 to {CHOICES} strings");
                return Err(ApiError::invalid(fields.path(choice), message));
            }
            found(choice, fields, Kind::Regex(one_of(&choices)));
        }
        if let Some(text) = fields.text(grammar)? {
            found(grammar, fields, Kind::Lark(text));
        }
        if fields.flag(object)? == Some(true) {
            found(object, fields, Kind::Object);
        }
        Ok(forms)
    }
}

/// A schema is an object, or says yes or no to everything.
fn checked(path: &str, schema: Value) -> Result<Value, ApiError> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(schema),
        other => Err(wrong_type(path, "a JSON schema", &other)),
    }
}

/// An expression that matches these texts and no others.
fn one_of(choices: &[String]) -> String {
    let escape = |text: &String| {
        let letters = text.chars().map(|letter| match letter {
            _ if letter.is_ascii_punctuation() => format!("\\{letter}"),
            _ => letter.to_string(),
        });
        letters.collect::<String>()
    };
    choices.iter().map(escape).collect::<Vec<_>>().join("|")
}

/// What the sampler is held to, and how calls look then.
pub struct Shape {
    /// `None`: nothing.
    pub grammar: Option<Grammar>,
    pub style: Style,
}

pub async fn shape(app: &App, form: Option<Form>, tools: &Tools) -> Result<Shape, ApiError> {
    let grammar = match spec(form, tools)? {
        None => None,
        Some((param, spec)) => Some(compiled(app, param, spec).await?),
    };
    // a grammar for calls allows nothing but an object
    let style = if grammar.is_some() { Style::Object } else { app.model.style };
    Ok(Shape { grammar, style })
}

async fn compiled(app: &App, param: String, spec: GrammarSpec) -> Result<Grammar, ApiError> {
    blocking(app, move |server| {
        let grammars = grammars(&server.engine, &server.grammars)?;
        grammars.compile(&spec).map_err(|error| match ApiError::from(error) {
            error if error.status == 400 => ApiError { param: Some(param), ..error },
            other => other,
        })
    })
    .await
}

/// The compiler, made at first use: it takes a walk over the vocabulary.
fn grammars<'a>(
    engine: &EngineHandle,
    made: &'a OnceLock<Grammars>,
) -> Result<&'a Grammars, ApiError> {
    if let Some(grammars) = made.get() {
        return Ok(grammars);
    }
    let grammars = engine.make_grammars()?;
    Ok(made.get_or_init(|| grammars))
}

/// The grammar of what was asked for, and what it was asked by.
fn spec(form: Option<Form>, tools: &Tools) -> Result<Option<(String, GrammarSpec)>, ApiError> {
    if let Some(forced) = tools.forced() {
        let schema = choice_schema(&forced).to_string();
        return Ok(Some(("tools".to_owned(), GrammarSpec::JsonSchema(schema))));
    }
    let Some(Form { param, kind }) = form else { return Ok(None) };
    if tools.offered().is_some() {
        let answer = match kind {
            Kind::Schema(schema) => schema,
            Kind::Object => json!({"type": "object"}),
            Kind::Regex(_) | Kind::Lark(_) => {
                let message = format!("{param} can't be met while tools may be called");
                return Err(ApiError::invalid(param, message));
            }
        };
        let tools: Vec<&Tool> = tools.list.iter().collect();
        let schema = either_schema(&answer, &tools).to_string();
        return Ok(Some((param, GrammarSpec::JsonSchema(schema))));
    }
    let spec = match kind {
        Kind::Object => GrammarSpec::JsonObject,
        Kind::Schema(schema) => GrammarSpec::JsonSchema(schema.to_string()),
        Kind::Regex(text) => GrammarSpec::Regex(text),
        Kind::Lark(text) => GrammarSpec::Lark(text),
    };
    Ok(Some((param, spec)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Option<Form>, ApiError> {
        Form::read(&mut Fields::of_body(body.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn forms_are_read_in_both_vocabularies() {
        let kind = |body: Value| read(body).unwrap().map(|form| form.kind);
        let schema = json!({"type": "integer"});
        let format = |format: Value| json!({"response_format": format});
        assert_eq!(kind(format(json!({"type": "text"}))), None);
        assert_eq!(kind(format(json!({"type": "json_object"}))), Some(Kind::Object));
        let named = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        assert_eq!(kind(format(named)), Some(Kind::Schema(schema.clone())));
        let text = json!({"guided_json": schema.to_string()});
        assert_eq!(kind(text), Some(Kind::Schema(schema)));
        let choice = json!({"structured_outputs": {"choice": ["a.b", "c"]}});
        assert_eq!(kind(choice), Some(Kind::Regex("a\\.b|c".into())));
    }

    #[test]
    fn forms_that_cannot_be_met_are_refused_by_name() {
        for (param, body) in [
            ("response_format", json!({"response_format": "json"})),
            ("response_format.type", json!({"response_format": {}})),
            ("response_format.type", json!({"response_format": {"type": "xml"}})),
            ("response_format.json_schema", json!({"response_format": {"type": "json_schema"}})),
            (
                "response_format.json_schema.schema",
                json!({"response_format": {"type": "json_schema", "json_schema": {}}}),
            ),
            (
                "response_format.json_schema.schema",
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}),
            ),
            ("structured_outputs", json!({"structured_outputs": {}})),
            ("structured_outputs.choice", json!({"structured_outputs": {"choice": []}})),
            ("guided_json", json!({"guided_json": "{"})),
            ("guided_regex", json!({"guided_json": {}, "guided_regex": "x"})),
        ] {
            let error = read(body.clone()).err().unwrap_or_else(|| panic!("{body} is taken"));
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }
}
