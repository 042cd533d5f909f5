//! Conversations to text, as Hugging Face's `apply_chat_template` renders them.
//!
//! A template is the model's own Jinja source. Rendering has no clock and no randomness: the date
//! that `strftime_now` prints comes in with the conversation. How a rendering is cut into segments
//! is in `template_segments`.

use crate::error::Error;
use crate::template_functions::{self, from_json};
use crate::template_marks::Marks;
use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A compiled chat template; a clone shares it.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Inner>);

struct Inner {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and so on, by the names templates use.
    special_tokens: BTreeMap<String, String>,
    /// The BOS text, if a rendering starts with it before any message does.
    leading_bos: Option<String>,
}

/// What is said. Rendered as a whole: a template may look at any message to write any other.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    pub messages: Vec<Message>,
    /// A list of JSON schemas, as templates expect them.
    pub tools: Option<Value>,
    pub add_generation_prompt: bool,
    /// More variables for the template, such as `enable_thinking`.
    pub extra: Map<String, Value>,
    /// What `strftime_now` writes: `YYYY-MM-DD`, with ` HH:MM:SS` if it matters. Without it the
    /// function is not defined, and templates that ask first print their own default.
    pub date: Option<String>,
    /// Set by [`Conversation::keep_text`].
    pub marks: Option<Marks>,
}

/// One message. Fields whose value is null are as if absent, as in Hugging Face.
#[derive(Debug, Clone, Default)]
pub struct Message {
    pub role: String,
    pub content: Content,
    /// Arguments are passed on as they are; most templates want an object, not its text.
    pub tool_calls: Option<Value>,
    /// `name`, `tool_call_id`, `reasoning_content` and what else a template may read.
    pub extra: Map<String, Value>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub enum Content {
    /// Nothing is said, as in most messages that call tools.
    #[default]
    None,
    Text(String),
    /// `{"type": "text", "text": ..}` and other parts.
    Parts(Vec<Value>),
}

/// Instructions of one rendering: far more than the longest conversation needs, and over
/// in a second or two where a model's template loops for longer.
const FUEL: u64 = 10_000_000;

/// The names under which the text of thinking travels, the preferred one first.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Message {
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self { role: role.into(), content: Content::Text(text.into()), ..Self::default() }
    }

    /// Reads a message as OpenAI's JSON has it.
    pub fn from_json(message: Value) -> Result<Self, Error> {
        let Value::Object(mut extra) = message else {
            return Err(invalid(format!("a message is an object, not {message}")));
        };
        let role = match extra.shift_remove("role") {
            Some(Value::String(role)) => role,
            other => return Err(invalid(format!("a message's role is text, not {other:?}"))),
        };
        let content = match extra.shift_remove("content") {
            None | Some(Value::Null) => Content::None,
            Some(Value::String(text)) => Content::Text(text),
            Some(Value::Array(parts)) => Content::Parts(parts),
            Some(other) => {
                let expected = "text or a list of parts";
                return Err(invalid(format!("a message's content is {expected}, not {other}")));
            }
        };
        let tool_calls = extra.shift_remove("tool_calls").filter(|v| !v.is_null());
        Ok(Self { role, content, tool_calls, extra })
    }

    /// What the template sees.
    pub fn to_json(&self) -> Value {
        let mut message = Map::new();
        let reasoning = REASONING_FIELDS
            .iter()
            .find_map(|&name| self.extra.get(name).filter(|value| !value.is_null()));
        if let Some(reasoning) = reasoning {
            message.insert("thinking".into(), reasoning.clone());
        }
        message.insert("role".into(), Value::from(self.role.as_str()));
        match &self.content {
            Content::None => None,
            Content::Text(text) => message.insert("content".into(), text.as_str().into()),
            Content::Parts(parts) => message.insert("content".into(), parts.clone().into()),
        };
        if let Some(tool_calls) = &self.tool_calls {
            message.insert("tool_calls".into(), tool_calls.clone());
        }
        for (name, value) in self.extra.iter().filter(|(_, value)| !value.is_null()) {
            message.insert(name.clone(), value.clone());
        }
        if let Some(reasoning) = reasoning {
            message.insert("reasoning_content".into(), reasoning.clone());
        }
        Value::Object(message)
    }
}

impl ChatTemplate {
    /// Compiles one template.
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self, Error> {
        Self::compile(&[("default", source)], special_tokens)
    }

    /// The template of `tokenizer_config.json` or, where the model has one, of the file
    /// `chat_template.jinja`, which goes first. None where there is neither.
    pub fn from_tokenizer_config(
        tokenizer_config_json: &str,
        chat_template_jinja: Option<&str>,
    ) -> Result<Option<Self>, Error> {
        let config: Value = serde_json::from_str(tokenizer_config_json)
            .map_err(|source| Error::Json { what: "tokenizer_config.json".into(), source })?;
        let special_tokens = special_tokens(&config);
        if let Some(source) = chat_template_jinja {
            return Self::new(source, &special_tokens).map(Some);
        }
        match &config["chat_template"] {
            Value::Null => Ok(None),
            Value::String(source) => Self::new(source, &special_tokens).map(Some),
            Value::Array(entries) => {
                let sources: Option<Vec<(&str, &str)>> = entries
                    .iter()
                    .map(|entry| Some((entry["name"].as_str()?, entry["template"].as_str()?)))
                    .collect();
                let sources = sources
                    .ok_or_else(|| invalid("a list of templates needs name and template".into()))?;
                Self::compile(&sources, &special_tokens).map(Some)
            }
            other => Err(invalid(format!("expected text or a list, found {other}"))),
        }
    }

    /// What Hugging Face renders for the same conversation.
    pub fn render(&self, conversation: &Conversation) -> Result<String, Error> {
        self.render_with_bos(conversation, None)
    }

    /// The Jinja source, the one for plain conversations where there are several.
    pub fn source(&self) -> String {
        let template = self.0.environment.get_template("default");
        template.expect("checked when compiled").source().to_owned()
    }

    /// `bos_token`, `eos_token` and so on, with the tokens they stand for.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.0.special_tokens
    }

    /// The BOS text that renderings start with.
    pub(crate) fn leading_bos(&self) -> Option<&str> {
        self.0.leading_bos.as_deref()
    }

    fn compile(
        sources: &[(&str, &str)],
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("the default delimiters are valid");
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", template_functions::tojson);
        environment.add_function("raise_exception", template_functions::raise_exception);
        for (name, source) in sources {
            let source = template_functions::without_generation_blocks(source);
            environment
                .add_template_owned(name.to_string(), source)
                .map_err(|error| invalid(error.to_string()))?;
        }
        if !sources.iter().any(|(name, _)| *name == "default") {
            let names: Vec<&str> = sources.iter().map(|(name, _)| *name).collect();
            let names = names.join(", ");
            return Err(invalid(format!("none is named default, only {names}")));
        }
        let mut template = Self(Arc::new(Inner {
            environment,
            special_tokens: special_tokens.clone(),
            leading_bos: None,
        }));
        let leading_bos = template.find_leading_bos();
        Arc::get_mut(&mut template.0).expect("not shared yet").leading_bos = leading_bos;
        Ok(template)
    }

    /// Whether BOS stands before everything, or is merely what each message begins with (models
    /// that name `<|im_start|>` their BOS).
    fn find_leading_bos(&self) -> Option<String> {
        let bos = self.0.special_tokens.get("bos_token")?;
        let mut probe = Conversation {
            messages: vec![
                Message::new("user", "a"),
                Message::new("assistant", "b"),
                Message::new("user", "c"),
            ],
            ..Conversation::default()
        };
        const MARK: &str = "\u{e000}bos\u{e001}";
        let mut marked = self.render_with_bos(&probe, Some(MARK));
        if marked.is_err() {
            probe.date = Some("2000-01-01".into());
            marked = self.render_with_bos(&probe, Some(MARK));
        }
        let marked = marked.ok()?;
        let written_out = || marked.starts_with(bos) && marked.matches(bos).count() == 1;
        (marked.starts_with(MARK) || written_out()).then(|| bos.clone())
    }

    fn render_with_bos(
        &self,
        conversation: &Conversation,
        bos: Option<&str>,
    ) -> Result<String, Error> {
        use minijinja::Value;
        let tool_use = self.0.environment.get_template("tool_use");
        let template = match tool_use {
            Ok(template) if conversation.tools.is_some() => template,
            _ => {
                let default = self.0.environment.get_template("default");
                default.expect("checked when compiled")
            }
        };
        let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, token) in &self.0.special_tokens {
            variables.insert(name, Value::from(token.as_str()));
        }
        if let Some(bos) = bos {
            variables.insert("bos_token", Value::from(bos));
        }
        for (name, value) in &conversation.extra {
            variables.insert(name, from_json(value));
        }
        if let Some(date) = &conversation.date {
            let function = template_functions::strftime_now(date)
                .ok_or_else(|| invalid(format!("date {date} is not YYYY-MM-DD HH:MM:SS")))?;
            variables.insert("strftime_now", function);
        }
        let messages = conversation.messages.iter();
        let messages: Value = messages.map(|message| from_json(&message.to_json())).collect();
        variables.insert("messages", messages);
        let tools = conversation.tools.as_ref().map(from_json);
        variables.insert("tools", tools.unwrap_or(Value::from(())));
        variables.entry("documents").or_insert(Value::from(()));
        let prompt = conversation.add_generation_prompt;
        variables.insert("add_generation_prompt", Value::from(prompt));
        template.render(Value::from_pairs(variables)).map_err(|error| invalid(error.to_string()))
    }
}

/// `bos_token`, `eos_token` and so on of a `tokenizer_config.json`.
fn special_tokens(config: &Value) -> BTreeMap<String, String> {
    let entries = config.as_object().into_iter().flatten();
    entries
        .filter(|(name, _)| name.ends_with("_token"))
        .filter_map(|(name, value)| {
            let text = value.as_str().or_else(|| value["content"].as_str())?;
            Some((name.clone(), text.to_owned()))
        })
        .collect()
}

fn invalid(message: String) -> Error {
    Error::ChatTemplate(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_template_s_refusal_is_its_own_words() {
        let source = "{{ raise_exception('no system text') }}";
        let template = ChatTemplate::new(source, &BTreeMap::new()).unwrap();
        let error = template.render(&Conversation::default()).unwrap_err();
        assert!(error.to_string().contains("no system text"), "{error}");
        let broken = ChatTemplate::new("{% if %}", &BTreeMap::new());
        assert!(broken.is_err());
    }

    #[test]
    fn a_template_that_would_never_end_is_given_up() {
        let loops =
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
        // before any message in one model's file, behind the first in another's
        for source in [loops.to_owned(), format!("{{% for m in messages %}}{loops}{{% endfor %}}")]
        {
            let said =
                Conversation { messages: vec![Message::new("user", "x")], ..Default::default() };
            let rendered = ChatTemplate::new(&source, &BTreeMap::new());
            let rendered = rendered.and_then(|template| template.render(&said));
            let error = rendered.expect_err("it is given up").to_string();
            assert!(error.contains("fuel"), "{error}");
        }
    }

    #[test]
    fn without_a_date_the_clock_is_not_defined() {
        let source = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'no date' }}";
        let template = ChatTemplate::new(source, &BTreeMap::new()).unwrap();
        let mut conversation = Conversation::default();
        assert_eq!(template.render(&conversation).unwrap(), "no date");
        conversation.date = Some("2024-12-05".into());
        assert_eq!(template.render(&conversation).unwrap(), "05 Dec 2024");
        conversation.date = Some("tomorrow".into());
        assert!(template.render(&conversation).is_err());
    }

    #[test]
    fn a_model_with_two_templates_uses_the_second_for_tools() {
        let config = json!({
            "eos_token": {"content": "</s>", "lstrip": false},
            "chat_template": [
                {"name": "default", "template": "plain{{ eos_token }}"},
                {"name": "tool_use", "template": "tools{{ eos_token }}"},
            ],
        });
        let config = config.to_string();
        let read = |file| ChatTemplate::from_tokenizer_config(&config, file).unwrap();
        let template = read(None).unwrap();
        let mut conversation = Conversation::default();
        assert_eq!(template.render(&conversation).unwrap(), "plain</s>");
        conversation.tools = Some(json!([]));
        assert_eq!(template.render(&conversation).unwrap(), "tools</s>");
        let file = read(Some("from the file{{ eos_token }}")).unwrap();
        assert_eq!(file.render(&conversation).unwrap(), "from the file</s>");
        assert!(ChatTemplate::from_tokenizer_config("{}", None).unwrap().is_none());
    }

    #[test]
    fn messages_are_read_as_openai_writes_them() {
        let message = Message::from_json(json!({
            "role": "assistant", "content": null, "name": "x", "tool_calls": null,
            "reasoning": "because", "refusal": null,
        }));
        let message = message.unwrap();
        assert_eq!(message.content, Content::None);
        let expected = json!({
            "thinking": "because", "role": "assistant", "name": "x", "reasoning": "because",
            "reasoning_content": "because",
        });
        assert_eq!(message.to_json(), expected);
        assert!(Message::from_json(json!({"content": "x"})).is_err());
        assert!(Message::from_json(json!({"role": "user", "content": 3})).is_err());
        assert!(Message::from_json(json!("user")).is_err());
    }
}
